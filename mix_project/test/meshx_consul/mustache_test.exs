defmodule MeshxConsul.MustacheTest do
  use ExUnit.Case, async: true
  alias MeshxConsul.{Json, Mustache}

  @hash %{
    "name" => "cart",
    "port" => 1024,
    "ratio" => 0.5,
    "on" => true,
    "off" => false,
    "none" => nil,
    "tags" => ["a", "b"],
    "empty" => [],
    "zones" => [%{"zone" => "x", "port" => 1}, %{"zone" => "y"}],
    "html" => ~s(<a href="&">)
  }

  test "strings of maps and lists, keys too" do
    template = %{"{{name}}" => ["{{ name }}-{{port}}", %{a: "{{{name}}}{{&port}}"}], "n" => 7}

    assert Mustache.render(template, @hash) ==
             {:ok, %{"cart" => ["cart-1024", %{a: "cart1024"}], "n" => 7}}
  end

  test "values keep their type between {{$ and $}}" do
    for {name, value} <- @hash,
        do: assert(Mustache.render("{{$#{name}$}}", @hash) == {:ok, value})

    assert Mustache.render("{{$ port $}}", @hash) == {:ok, 1024}
    assert Mustache.render("p{{$port$}}", @hash) == {:ok, "p1024"}
  end

  test "sections" do
    for {template, text} <- [
          {"{{#on}}yes{{/on}}{{^on}}no{{/on}}", "yes"},
          {"{{#off}}yes{{/off}}{{^off}}no{{/off}}", "no"},
          {"{{#none}}yes{{/none}}{{^none}}no{{/none}}", "no"},
          {"{{#empty}}yes{{/empty}}{{^empty}}no{{/empty}}", "no"},
          {"{{#missing}}yes{{/missing}}{{^missing}}no{{/missing}}", "no"},
          {"{{#tags}}-t {{.}} {{/tags}}", "-t a -t b "},
          {"{{#zones}}{{zone}}:{{port}};{{/zones}}", "x:1;y:1024;"},
          {"{{#zones}}{{#on}}{{zone}}{{/on}}{{/zones}}", "xy"},
          {"a{{! what it is }}b", "ab"},
          {"{ {x} } {{name}", "{ {x} } {{name}"}
        ],
        do: assert({template, Mustache.render(template, @hash)} == {template, {:ok, text}})
  end

  test "nothing is escaped" do
    assert Mustache.render("{{html}}", @hash) == {:ok, ~s(<a href="&">)}
  end

  test "what is wrong is said" do
    for {template, text} <- [
          {"{{nobody}}", "{{nobody}} is not among"},
          {"{{$nobody$}}", "{{nobody}} is not among"},
          {"{{tags}}", "{{tags}} is [\"a\", \"b\"]"},
          {"{{#on}}", "{{#on}} has no end"},
          {"{{/on}}", "{{/on}} ends no section"},
          {"{{#on}}{{/off}}", "{{/off}} ends no section"},
          {"{{> other}}", "partials"},
          {"{{=<% %>=}}", "delimiters"}
        ] do
      assert {:error, {:invalid_request, seen}} = Mustache.render(template, @hash)
      assert seen =~ text
    end
  end

  test "JSON" do
    for {term, json} <- [
          {%{"a" => [1, -2, 0.5, true, false, nil, :b]}, ~S({"a":[1,-2,0.5,true,false,null,"b"]})},
          {[], "[]"},
          {%{}, "{}"},
          {%{a: %{}}, ~S({"a":{}})},
          {~s(q" b\\ n\n ü), ~S("q\" b\\ n\u000a ü")},
          {<<0, 0x1F, 0x7F>>, ~s("\\u0000\\u001f\d")}
        ],
        do: assert(Json.encode!(term) == json)

    for term <- [{1, 2}, self(), <<0xFF>>, %{1 => 2}, 1..2],
        do: assert_raise(ArgumentError, fn -> Json.encode!(term) end)
  end
end

defmodule MeshxNode.WhyTest do
  # What a scripted agent answers; tests/tests/diagnosis.rs asks a real one.
  use Meshx.DistCase, async: true

  @steps [
    %{ok: true, what: "source", text: "shop@h1 is here", fix: ""},
    %{ok: false, what: "rule", text: "denied", fix: "meshx allow cart shop"}
  ]
  @answer %{allowed: false, cause: :intention_denied, text: "denied", steps: @steps}

  defp answering(context, answer) do
    test = self()

    start_agent(context,
      control: fn
        id, :why, args ->
          send(test, {:asked, args})
          {:reply, {:reply, id, answer}}

        _, _, _ ->
          :default
      end
    )

    start_node(context, "shop@h1")
  end

  test "the decision comes with its steps and is text for people", context do
    shop = answering(context, {:ok, @answer})
    assert {:ok, why} = TestNode.call(shop, MeshxNode, :why, [:cart@h2])
    assert_receive {:asked, %{from: "shop@h1", to: "cart@h2"}}
    assert %MeshxNode.Why{from: :shop@h1, to: :cart@h2, allowed: false} = why
    assert {why.cause, why.text, why.steps} == {:intention_denied, "denied", @steps}

    assert to_string(why) == """
           ok  source  shop@h1 is here
           no  rule    denied -> meshx allow cart shop
           shop@h1 -> cart@h2: refused with intention_denied\
           """

    allowed = %{why | allowed: true, cause: :ok, steps: []}
    assert to_string(allowed) == "shop@h1 -> cart@h2: allowed"
    said = %{why | steps: [%{List.last(@steps) | text: "no: meshx allow cart shop"}]}
    refute to_string(said) =~ "->  "
    assert to_string(said) =~ "no  rule  no: meshx allow cart shop\n"
  end

  test "an answer of another shape is an error, and so is a refusal of the question", context do
    shop = answering(context, {:ok, %{@answer | steps: [%{ok: true}]}})
    assert {:error, {:invalid_request, text}} = TestNode.call(shop, MeshxNode, :why, [:cart@h2])
    assert text =~ "no decision"
  end

  test "an agent without this command says so", context do
    start_agent(context,
      control: fn
        id, :why, _ -> {:reply, {:reply, id, {:error, :invalid_request, "no command why"}}}
        _, _, _ -> :default
      end
    )

    shop = start_node(context, "shop@h1")

    assert TestNode.call(shop, MeshxNode, :why, [:cart@h2]) ==
             {:error, {:invalid_request, "no command why"}}
  end

  test "without distribution nobody is asked", context do
    start_agent(context)
    plain = launch(context, [])
    :ok = TestNode.await_boot(plain)

    assert {:error, {:not_ready, "this VM is not distributed" <> _}} =
             TestNode.call(plain, MeshxNode, :why, [:cart@h2])
  end

  test "the protocol's words for it are known before they come" do
    words =
      ~w(services name id address agent protocol meshx connect status tags local node) ++
        ~w(intentions default source destination action certs service spiffe serial issuer) ++
        ~w(not_before not_after chain roots subject allowed cause text steps ok what fix) ++
        ~w(findings level warning error)

    assert Enum.map(words, &String.to_atom/1) -- :meshx_control.vocabulary() == []
  end
end

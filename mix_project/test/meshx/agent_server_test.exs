defmodule Meshx.AgentServerTest do
  # What the contract cannot see: when the agent is asked, and what is left there.
  use Meshx.MeshCase
  @moduletag :capture_log

  alias Meshx.ScriptedAgent

  # Requests of this command come to the test, which answers them.
  defp hold(agent, command) do
    test = self()

    ScriptedAgent.set(agent, :control, fn
      id, ^command, args, connection ->
        send(test, {command, args, connection, id})
        :silent

      id, command, args, _connection ->
        send(test, {command, args, id})
        :default
    end)
  end

  defp registered(args),
    do: {:ok, %{id: args.id, service: args.name, spiffe: "x", address: {:uds, "/none"}}}

  defp start(name, timeout \\ 10_000) do
    test = self()

    spawn_link(fn ->
      send(test, {:started, name, Meshx.Agent.start({name, name}, nil, true, timeout)})
      Process.sleep(:infinity)
    end)
  end

  test "registrations do not wait for each other, up to a number", %{agent: agent} do
    hold(agent, :register_service)
    for n <- 1..30, do: start("s#{n}")

    held =
      for _ <- 1..24 do
        assert_receive {:register_service, args, connection, id}, 5_000
        {args, connection, id}
      end

    # The agent takes 64 unanswered requests; this is one of two adapters.
    refute_receive {:register_service, _, _, _}, 100

    for {args, connection, id} <- held,
        do: ScriptedAgent.answer(connection, id, registered(args))

    for _ <- 1..6 do
      assert_receive {:register_service, args, connection, id}, 5_000
      ScriptedAgent.answer(connection, id, registered(args))
    end

    for n <- 1..30 do
      name = "s#{n}"
      assert_receive {:started, ^name, {:ok, ^name, {:uds, "/none"}}}, 5_000
    end
  end

  test "what arrives after its caller gave up is given back", %{agent: agent} do
    hold(agent, :register_service)
    start("cart", 100)
    assert_receive {:register_service, args, connection, id}, 5_000
    assert_receive {:started, "cart", {:error, {:timeout, _}}}, 5_000
    ScriptedAgent.answer(connection, id, registered(args))
    assert_receive {:deregister, %{id: "cart"}, _}, 5_000

    # And the name is free.
    start("cart")
    assert_receive {:register_service, args, connection, id}, 5_000
    ScriptedAgent.answer(connection, id, registered(args))
    assert_receive {:started, "cart", {:ok, "cart", _}}, 5_000
  end

  test "what arrives after its owner ended is given back", %{agent: agent} do
    hold(agent, :register_service)
    pid = start("cart")
    assert_receive {:register_service, args, connection, id}, 5_000
    Process.unlink(pid)
    Process.exit(pid, :kill)
    ScriptedAgent.answer(connection, id, registered(args))
    assert_receive {:deregister, %{id: "cart"}, _}, 5_000
  end

  test "an upstream whose owner ended on the way is given back", %{agent: agent} do
    hold(agent, :connect)

    pid = spawn(fn -> Meshx.Agent.connect(["cart"], nil, {"shop", "shop-1"}) end)
    assert_receive {:connect, %{service: "cart", as: "shop"}, connection, id}, 5_000
    Process.exit(pid, :kill)
    ScriptedAgent.answer(connection, id, {:ok, %{upstream: "u7", address: {:uds, "/none"}}})
    assert_receive {:disconnect, %{upstream: "u7"}, _}, 5_000
  end

  defp monitored do
    with server when server != nil <- Process.whereis(Meshx.Agent),
         {:monitors, monitors} <- Process.info(server, :monitors) do
      for {:process, pid} <- monitors, do: pid
    else
      _not_started -> []
    end
  end

  test "a registration that its connection did not survive is made again", context do
    # The old agent's answer and its end come before the new agent: the service is not known there.
    test = self()
    address = {:tcp, "127.0.0.1", 7_001}

    ScriptedAgent.set(context.agent, :control, fn
      id, :register_service, args, connection ->
        send(test, {:register_service, args, connection, id})
        :silent

      _id, _command, _args, _connection ->
        :default
    end)

    # What tests before this one have left there is not ours.
    before = monitored()

    owner =
      spawn_link(fn ->
        template = [address: {:tcp, {127, 0, 0, 1}, 7_001}]
        send(test, {:started, Meshx.Agent.start({"cart", "cart-1"}, template, true, 20_000)})
        Process.sleep(:infinity)
      end)

    assert_receive {:register_service, _args, connection, id}, 5_000

    [job] =
      for pid <- monitored(), pid not in [owner, Process.whereis(:meshx_agent) | before], do: pid

    :erlang.suspend_process(job)
    reply = {:ok, %{id: "cart-1", service: "cart", spiffe: "x", address: address}}
    ScriptedAgent.answer(connection, id, reply)
    # The same socket: what is answered here was read after that.
    assert {:ok, _} = :meshx_agent.call(:names, %{})
    agent = restart_agent(context.directory)

    eventually(fn ->
      match?(%{epoch: epoch, up?: true} when epoch > 0, :sys.get_state(Meshx.Agent))
    end)

    :erlang.resume_process(job)
    assert_receive {:started, {:ok, "cart-1", {:tcp, {127, 0, 0, 1}, 7_001}}}, 5_000
    eventually(fn -> match?(%{"cart-1" => _}, ScriptedAgent.mesh(agent).services) end)
  end

  defp eventually(condition, left \\ 1_000) do
    cond do
      condition.() -> :ok
      left == 0 -> flunk("it never came about")
      true -> Process.sleep(10) && eventually(condition, left - 1)
    end
  end

  test "a template's options are those of the registration", %{agent: agent} do
    template = [
      address: {:tcp, {127, 0, 0, 1}, 7_000},
      tags: ["a"],
      meta: %{"k" => "v"},
      weights: {3, 1},
      ttl: 2_000,
      deregister_after: 60_000,
      token: "s3cret",
      force: true,
      sidecar: {:command, ["haproxy", "-f", "x"]},
      max_proxy_restarts: 0,
      wait: true
    ]

    test = self()

    ScriptedAgent.set(agent, :control, fn
      _id, command, args when command in [:register_service, :connect] ->
        send(test, {command, args})
        :default

      _id, _command, _args ->
        :default
    end)

    assert {:ok, "cart-1", {:tcp, {127, 0, 0, 1}, 7_000}} =
             Meshx.Agent.start({"cart", "cart-1"}, template, false, 2_000)

    assert_receive {:register_service,
                    %{
                      name: "cart",
                      id: "cart-1",
                      address: {:tcp, "127.0.0.1", 7_000},
                      tags: ["a"],
                      meta: %{"k" => "v"},
                      weights: {3, 1},
                      ttl: 2_000,
                      deregister_after: 60_000,
                      token: "s3cret",
                      force: true,
                      sidecar: {:command, ["haproxy", "-f", "x"]},
                      max_proxy_restarts: 0,
                      wait: 2_000
                    } = args}

    refute Map.has_key?(args, :adopt)
    # Neither a report nor `:sys.get_state/1` shows it.
    refute inspect(:sys.get_state(Meshx.Agent), limit: :infinity) =~ "s3cret"

    options = [address: :tcp, purpose: :tcp, token: "s3cret"]

    assert {:ok, [{:ok, {:tcp, {127, 0, 0, 1}, _port}}]} =
             Meshx.Agent.connect([{"cart", "cart-1"}], options, "shop")

    assert_receive {:connect,
                    %{
                      service: "cart",
                      instance: "cart-1",
                      as: "shop",
                      address: :tcp,
                      purpose: :tcp,
                      token: "s3cret"
                    }}

    for wrong <- [[tag: "a"], [tags: "a"], [weights: {0, 1}], [sidecar: "envoy"], [token: ""], 7] do
      assert {:error, {:invalid_request, text}} = Meshx.Agent.start("cart", wrong)
      assert text =~ "template"
    end
  end

  test "answers that are not whole are errors, and the server lives on", %{agent: agent} do
    assert {:ok, "kept", _address} = Meshx.Agent.start({"kept", "kept"}, nil, false, 5_000)

    for answer <- [%{}, %{id: 7, address: {:uds, "/a"}}, %{id: "a", upstream: "a", address: :b}] do
      ScriptedAgent.set(agent, :control, fn
        id, command, _args when command in [:register_service, :connect] ->
          {:reply, {:reply, id, {:ok, answer}}}

        _id, _command, _args ->
          :default
      end)

      assert {:error, {:invalid_request, _}} = Meshx.Agent.start({"a", "a"}, nil, :maybe, 5_000)

      assert {:ok, [{:error, {:invalid_request, _}}]} =
               Meshx.Agent.connect(["cart"], nil, {"shop", "shop-1"})
    end

    assert {:ok, :already_started} = Meshx.Agent.start({"kept", "kept"}, nil, :maybe, 5_000)
    assert {:error, {:invalid_request, _}} = Meshx.Agent.connect(["cart"], nil, 7)
  end

  # `:shutdown` is what `Application.stop(:meshx)` does, under owners that go on.
  for reason <- [:boom, :shutdown, :normal] do
    test "an end by #{inspect(reason)} tells owners, and leaves nothing at the agent",
         %{agent: agent} do
      assert {:ok, "cart-1", _address} = Meshx.Agent.start({"cart", "cart-1"}, nil, false, 5_000)
      GenServer.stop(Meshx.Agent, unquote(reason))
      assert_receive {Meshx.Agent, :lost, "cart-1"}, 5_000
      assert ScriptedAgent.mesh(agent).services == %{}
      assert {:ok, "cart-1", _address} = retry_start()
    end
  end

  test "why an upstream was refused is asked of the agent", %{agent: agent} do
    answers = [
      {%{cause: :no_such_service, text: "nobody", at: 7, more: 1},
       {:ok, %{cause: :no_such_service, text: "nobody", at: 7}}},
      {%{cause: "no_such_service", text: "nobody", at: 7}, :error}
    ]

    for {answer, wanted} <- answers do
      ScriptedAgent.set(agent, :control, fn
        id, :refusal, %{node: "cart"}, _connection -> {:reply, {:reply, id, {:ok, answer}}}
        _id, _command, _args, _connection -> :default
      end)

      assert Meshx.Agent.refusal("cart") == wanted
      assert MeshxConsul.refusal("cart") == wanted
    end

    assert Meshx.Agent.refusal(7) == :error
    assert MeshxConsul.refusal(7) == :error
  end

  defp retry_start do
    case Meshx.Agent.start({"cart", "cart-1"}, nil, false, 5_000) do
      {:error, {:not_ready, _ended}} -> retry_start()
      other -> other
    end
  end
end

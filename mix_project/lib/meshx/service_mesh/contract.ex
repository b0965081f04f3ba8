defmodule Meshx.ServiceMesh.Contract do
  @moduledoc """
  The tests that every adapter of `Meshx.ServiceMesh` passes, for ExUnit.

      defmodule MyMeshTest do
        use Meshx.ServiceMesh.Contract, adapter: MyMesh

        setup do
          # Start what the adapter needs: its application, a mesh, an agent.
          :ok
        end
      end

  Options:

    * `:adapter` - the module (required)
    * `:template`, `:upstream_template` - what `start/4` and `connect/3` get as theirs, default `nil`
    * `:proxy` - on whose behalf the upstreams are, default `nil`
    * `:ownership` - `:process` (default) when a service ends with the process that started it, `:vm` when it lives
      as long as the VM
    * `:cut` - `false` for a mesh that is not in the way of the bytes, and so cannot end live connections when an
      upstream is removed; default `true`
    * `:silence` - `true` when the test module has a function `silence(context)` that lets the mesh behind the
      adapter answer nothing from then on; default `false`

  What `setup` returns is given to `silence/1`. Services get names that begin with `contract-`, and are stopped
  when their test is over.

  ExUnit is needed where this is used, not where it is compiled.
  """

  @doc false
  defmacro __using__(options) do
    quote do
      use ExUnit.Case, async: false

      alias Meshx.ServiceMesh.Contract.Peer

      @moduletag :capture_log
      @contract Map.merge(
                  %{
                    template: nil,
                    upstream_template: nil,
                    proxy: nil,
                    ownership: :process,
                    cut: true,
                    silence: false
                  },
                  Map.new(unquote(options))
                )
      # A start that should go well may take this long, in milliseconds.
      @contract_time 10_000

      unquote(helpers())
      unquote(addresses())
      unquote(names())
      unquote(upstreams())
      unquote(many())
      unquote(ownership())
      unquote(wrong())
      unquote(rpc())
    end
  end

  defp helpers do
    quote do
      defp contract_start(params, force? \\ false, timeout \\ @contract_time) do
        result = @contract.adapter.start(params, @contract.template, force?, timeout)
        with {:ok, id, _address} <- result, do: on_exit(fn -> @contract.adapter.stop(id) end)
        result
      end

      defp contract_serve(params, label, force? \\ false) do
        assert {:ok, id, address} = contract_start(params, force?)
        assert is_binary(id)
        {id, Peer.serve(address, label), address}
      end

      defp contract_connect(upstreams) do
        on_exit(fn -> contract_disconnect(upstreams) end)
        @contract.adapter.connect(upstreams, @contract.upstream_template, @contract.proxy)
      end

      defp contract_connect!(upstream) do
        assert {:ok, [{:ok, address}]} = contract_connect([upstream])
        address
      end

      defp contract_disconnect(upstreams, restart? \\ false) do
        @contract.adapter.disconnect(upstreams, Peer.proxy_id(@contract.proxy), restart?)
      end

      defp contract_reached(address, label),
        do: Peer.ask_until(address, &match?({:ok, ^label, _}, &1))
    end
  end

  defp addresses do
    quote do
      test "bytes go both ways between an upstream and a service" do
        name = Peer.name()
        {_id, _service, _address} = contract_serve(name, "one")
        address = contract_connect!(name)
        assert {:ok, "one", "hello"} = contract_reached(address, "one")
        # More than any buffer on the way.
        text = String.duplicate("0123456789abcdef", 131_072)
        assert {:ok, "one", ^text} = Peer.ask(address, text)
        {:ok, first} = Peer.open(address)
        {:ok, second} = Peer.open(address)
        assert {:ok, "one", "b"} = Peer.say(second, "b")
        assert {:ok, "one", "a"} = Peer.say(first, "a")
      end

      test "addresses are on this host" do
        name = Peer.name()
        {_id, _service, address} = contract_serve(name, "one")

        for address <- [address, contract_connect!(name)] do
          assert {:ok, _address} = MeshxRpc.Address.check(address)
          assert MeshxRpc.Address.local?(address)
        end
      end

      test "an upstream of a service that is not there gives no bytes" do
        case contract_connect([Peer.name()]) do
          {:ok, [{:ok, address}]} -> assert {:error, _reason} = Peer.ask(address)
          {:ok, [{:error, _reason}]} -> :ok
        end
      end
    end
  end

  defp names do
    quote do
      test "names and ids are atoms or strings, and an id is kept" do
        name = Peer.name()
        id = name <> "-a"
        assert {:ok, ^id, _address} = contract_start({String.to_atom(name), String.to_atom(id)})
        assert {:ok, :already_started} = contract_start({name, id})
        assert :ok = @contract.adapter.stop(String.to_atom(id))
      end

      test "a service is started once, and again when it is forced" do
        name = Peer.name()
        {id, service, _address} = contract_serve(name, "one")
        assert {:ok, :already_started} = contract_start(name)
        assert {:ok, "one", _} = contract_reached(contract_connect!(name), "one")
        Peer.stop(service)
        {_id, _service, _address} = contract_serve(name, "two", true)
        assert {:ok, "two", _} = contract_reached(contract_connect!(name), "two")
      end

      test "instances of a name have addresses of their own" do
        name = Peer.name()
        {a, _service, address_a} = contract_serve({name, name <> "-a"}, "a")
        {b, _service, address_b} = contract_serve({name, name <> "-b"}, "b")
        assert {a, b} == {name <> "-a", name <> "-b"}
        assert address_a != address_b

        # A mesh chooses for each connection, or for each upstream.
        for label <- ["a", "b"] do
          ask = fn -> Peer.ask(contract_connect!(name)) end
          assert {:ok, ^label, _} = Peer.until(ask, &match?({:ok, ^label, _}, &1))
        end
      end

      test "a service that was stopped is not there, and can be started again" do
        name = Peer.name()
        {id, service, _address} = contract_serve(name, "one")
        assert {:ok, "one", _} = contract_reached(contract_connect!(name), "one")
        assert :ok = @contract.adapter.stop(id)
        assert {:error, _reason} = @contract.adapter.stop(id)
        Peer.stop(service)

        case contract_connect([name]) do
          {:ok, [{:ok, address}]} ->
            assert {:error, _reason} = Peer.ask_until(address, &match?({:error, _}, &1))

          {:ok, [{:error, _reason}]} ->
            :ok
        end

        {_id, _service, _address} = contract_serve(name, "two")
        assert {:ok, "two", _} = contract_reached(contract_connect!(name), "two")
      end
    end
  end

  defp upstreams do
    quote do
      test "connect answers in the order in which it was asked" do
        names = for n <- 1..5, do: {Peer.name(), "s#{n}"}
        for {name, label} <- Enum.shuffle(names), do: contract_serve(name, label)

        assert {:ok, results} = contract_connect(Enum.map(names, &elem(&1, 0)))

        for {{_name, label}, result} <- Enum.zip(names, results) do
          assert {:ok, address} = result
          assert {:ok, ^label, _} = contract_reached(address, label)
        end

        assert {:ok, []} = contract_connect([])
      end

      test "an upstream that makes no sense is an error in its place" do
        name = Peer.name()
        contract_serve(name, "one")

        assert {:ok, [{:error, _}, {:ok, address}, {:error, _}]} =
                 contract_connect([7, name, {"a", "b", "c"}])

        assert {:ok, "one", _} = contract_reached(address, "one")
      end

      test "disconnect tells what there was, and connecting again works" do
        {one, other} = {Peer.name(), Peer.name()}
        contract_serve(one, "one")
        contract_connect!(one)
        assert {:ok, [^one]} = contract_disconnect([one, other])
        assert {:ok, []} = contract_disconnect([one])
        assert {:ok, "one", _} = contract_reached(contract_connect!(one), "one")
      end

      test "disconnect lets live connections be" do
        name = Peer.name()
        contract_serve(name, "one")
        address = contract_connect!(name)
        assert {:ok, "one", _} = contract_reached(address, "one")
        {:ok, socket} = Peer.open(address)
        assert {:ok, "one", "a"} = Peer.say(socket, "a")
        assert {:ok, [^name]} = contract_disconnect([name])
        assert {:ok, "one", "b"} = Peer.say(socket, "b")
      end

      if @contract.cut do
        test "disconnect cuts live connections when it is told to" do
          name = Peer.name()
          contract_serve(name, "one")
          address = contract_connect!(name)
          assert {:ok, "one", _} = contract_reached(address, "one")
          {:ok, socket} = Peer.open(address)
          assert {:ok, "one", "a"} = Peer.say(socket, "a")
          assert {:ok, [^name]} = contract_disconnect([name], true)
          assert Peer.ended?(socket)
          assert {:error, _reason} = Peer.ask(address)
        end
      end
    end
  end

  defp many do
    quote do
      test "many at once" do
        names = for n <- 1..40, do: {Peer.name(), "s#{n}"}
        test = self()

        # Their owners live as long as the test.
        for {name, label} <- names do
          spawn_link(fn ->
            result = @contract.adapter.start(name, @contract.template, false, @contract_time)
            with {:ok, _id, address} <- result, do: Peer.serve(address, label)
            send(test, {name, result})
            Process.sleep(:infinity)
          end)
        end

        started =
          for {name, _label} <- names do
            assert_receive {^name, {:ok, id, address}}, 2 * @contract_time
            on_exit(fn -> @contract.adapter.stop(id) end)
            {id, address}
          end

        assert started |> Enum.uniq_by(&elem(&1, 0)) |> length() == 40
        assert started |> Enum.uniq_by(&elem(&1, 1)) |> length() == 40

        assert {:ok, results} = contract_connect(Enum.map(names, &elem(&1, 0)))

        for {{_name, label}, {:ok, address}} <- Enum.zip(names, results),
            do: assert({:ok, ^label, _} = contract_reached(address, label))

        assert {:ok, deleted} = contract_disconnect(Enum.map(names, &elem(&1, 0)))
        assert length(deleted) == 40
      end

      test "of many that start the same one, one does" do
        name = Peer.name()
        test = self()

        for _ <- 1..10 do
          spawn_link(fn ->
            result =
              @contract.adapter.start({name, name}, @contract.template, false, @contract_time)

            send(test, {:started, result})
            Process.sleep(:infinity)
          end)
        end

        results =
          for _ <- 1..10 do
            assert_receive {:started, result}, 2 * @contract_time
            result
          end

        on_exit(fn -> @contract.adapter.stop(name) end)
        assert [{:ok, ^name, _address}] = Enum.reject(results, &(&1 == {:ok, :already_started}))
      end
    end
  end

  defp ownership do
    quote do
      if @contract.ownership == :process do
        test "a service ends with the process that started it" do
          name = Peer.name()

          assert {:ok, _id, _address} =
                   Peer.elsewhere(fn ->
                     @contract.adapter.start(name, @contract.template, false, @contract_time)
                   end)

          # Not there any more, as soon as the adapter has heard of it.
          again = Peer.until(fn -> contract_start(name) end, &match?({:ok, _id, _address}, &1))
          assert {:ok, _id, address} = again
          Peer.serve(address, "mine")
          assert {:ok, "mine", _} = contract_reached(contract_connect!(name), "mine")
        end

        test "a service of another process is not taken from it" do
          name = Peer.name()
          {_id, _service, _address} = contract_serve(name, "mine")

          assert {:error, _reason} =
                   Peer.elsewhere(fn ->
                     @contract.adapter.start(name, @contract.template, true, @contract_time)
                   end)

          assert {:ok, "mine", _} = contract_reached(contract_connect!(name), "mine")
        end
      else
        test "a service lives on when the process ends that started it" do
          name = Peer.name()

          assert {:ok, id, address} =
                   Peer.elsewhere(fn ->
                     @contract.adapter.start(name, @contract.template, false, @contract_time)
                   end)

          on_exit(fn -> @contract.adapter.stop(id) end)
          assert {:ok, :already_started} = contract_start(name)
          Peer.serve(address, "ours")
          assert {:ok, "ours", _} = contract_reached(contract_connect!(name), "ours")
        end
      end
    end
  end

  defp wrong do
    quote do
      test "wrong arguments are errors, not exits" do
        for params <- [7, nil, "", {"a", "b", "c"}, %{}, []],
            do: assert({:error, _reason} = contract_start(params))

        assert {:error, _reason} = contract_start(Peer.name(), false, -1)
        assert {:error, _reason} = @contract.adapter.stop(Peer.name())
        assert {:error, _reason} = @contract.adapter.stop({"a", "b"})
        assert {:error, _reason} = @contract.adapter.stop(:"contract-nobody")
      end

      test "a start ends within its time" do
        {time, result} = Peer.timed(fn -> contract_start(Peer.name(), false, 1) end)
        assert elem(result, 0) in [:ok, :error]
        assert time < 3_000
      end

      if @contract.silence do
        test "a start that the mesh does not answer ends within its time", context do
          silence(context)
          name = Peer.name()
          {time, result} = Peer.timed(fn -> contract_start(name, false, 500) end)
          assert {:error, _reason} = result
          assert time < 5_000
        end
      end
    end
  end

  defp rpc do
    quote do
      test "MeshxRpc calls over it" do
        service = Peer.name()
        server = String.to_atom("server-" <> service)
        client = String.to_atom("client-" <> service)
        mesh = [adapter: @contract.adapter, service: service]

        start_supervised!(
          MeshxRpc.Server.Pool.child_spec(server,
            module: Meshx.ServiceMesh.Contract.Echo,
            mesh: mesh ++ [template: @contract.template, timeout: @contract_time],
            drain: 0
          )
        )

        start_supervised!(
          MeshxRpc.Client.Pool.child_spec(client,
            mesh: mesh ++ [template: @contract.upstream_template, as: @contract.proxy],
            pool_opts: [size: 2]
          )
        )

        argument = {:contract, String.duplicate("x", 1_000_000)}
        assert MeshxRpc.Client.Pool.call(client, :echo, argument, 10_000, 200, 50) == argument
      end
    end
  end

  defmodule Echo do
    @moduledoc false
    def echo(argument), do: argument
  end
end

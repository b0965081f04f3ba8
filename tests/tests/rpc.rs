//! MeshxRpc between two hosts, through the mesh, with the NIF codec.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use meshx_tests::{BeamBuilder, Mesh};

#[test]
fn calls_cross_the_mesh_with_the_native_codec() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    for node in [&mut cart, &mut shop] {
        node.expect("MeshxRpc.Codec.impl()", "MeshxRpc.Codec.Nif")
            .unwrap();
    }

    shop.expect(
        "Shop.CartClient.call(:total, [{\"lamp\", 2}, {\"desk\", 1}], 30_000, 60, 500)",
        "16898",
    )
    .unwrap();
    shop.expect(
        "Shop.CartClient.call!(:echo, %{a: [1, 2.0, \"x\"]})",
        "%{a: [1, 2.0, \"x\"]}",
    )
    .unwrap();
    shop.expect("Shop.CartClient.cast(:echo, 1)", ":ok").unwrap();
    shop.eval("blob = :crypto.strong_rand_bytes(64 * 1024 * 1024); :made")
        .unwrap();
    shop.expect("Shop.CartClient.call(:echo, blob) == blob", "true")
        .unwrap();

    // Many at once over one connection, large and small.
    shop.expect(
        "1..200 |> Task.async_stream(fn n -> b = :binary.copy(<<n>>, n * 997); Shop.CartClient.call(:echo, b) == b end, \
         max_concurrency: 50, timeout: 60_000) |> Enum.all?(& &1 == {:ok, true})",
        "true",
    )
    .unwrap();

    // Only the server module's own functions can be reached.
    for name in ["module_info", "child_spec", "__info__", "os_cmd", "stop"] {
        let answer = shop.eval(&format!("Shop.CartClient.call(:{name}, [])")).unwrap();
        assert!(answer.starts_with("{:error_rpc, {:undef,"), "{name}: {answer}");
    }

    // RPC needs one direction only: the way back is not asked for.
    h1.meshx_ok(&["deny", "cart-rpc", "shop"]).unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1)", "1").unwrap();
}

#[test]
fn a_denied_client_gets_no_connection() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    h1.meshx_ok(&["deny", "shop", "cart-rpc"]).unwrap();
    let _cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    let answer = shop.eval("Shop.CartClient.call(:echo, 1, 2_000)").unwrap();
    assert!(answer.starts_with("{:error_rpc, "), "{answer}");
    h2.process
        .wait_log("intention_denied", std::time::Duration::from_secs(30))
        .unwrap();
    h1.meshx_ok(&["allow", "shop", "cart-rpc"]).unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
        .unwrap();
}

/// The mesh cuts the connections of what is not registered any more, so a server stays until it has answered.
#[test]
fn a_server_that_stops_answers_what_it_has_begun() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    cart.eval(
        "defmodule Slow do def wait(x) do :persistent_term.put(:slow, self()); receive do :go -> x end end end; \
         {:ok, server} = MeshxRpc.Server.Pool.start_link(Slow, mesh: [adapter: Meshx.Agent, service: \"slow-rpc\"], drain: 120_000); \
         Process.unlink(server); :started",
    )
    .unwrap();
    shop.eval(
        "{:ok, pool} = MeshxRpc.Client.Pool.start_link(:slow, pool_opts: [size: 1], mesh: [adapter: Meshx.Agent, service: \"slow-rpc\"]); \
         Process.unlink(pool); \
         spawn(fn -> :persistent_term.put(:answer, MeshxRpc.Client.Pool.call(:slow, :wait, :answer, 120_000, 60, 500)) end); :asked",
    )
    .unwrap();
    cart.expect_soon("is_pid(:persistent_term.get(:slow, nil))", "true")
        .unwrap();

    cart.eval(
        "spawn(fn -> :persistent_term.put(:stopped, Supervisor.stop(server, :normal, 120_000)) end); :stops",
    )
    .unwrap();
    // The client has heard that no more is taken.
    shop.expect_soon("MeshxRpc.Client.Pool.info(:slow).connected", "0")
        .unwrap();
    cart.eval("send(:persistent_term.get(:slow), :go); :sent")
        .unwrap();
    shop.expect_soon(":persistent_term.get(:answer, nil)", ":answer")
        .unwrap();

    cart.expect_soon(":persistent_term.get(:stopped, nil)", ":ok")
        .unwrap();
    let services = h2.meshx_ok(&["services"]).unwrap();
    assert!(!services.contains("slow-rpc"), "{services}");
}

//! Consul's intentions, denied, allowed and changed while links are up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::consul::Consul;
use meshx_tests::control::Control;
use meshx_tests::{Beam, BeamBuilder, EchoClient, EchoServer};

/// A denial cuts within 2 s; three times that here.
const CUT: Duration = Duration::from_secs(6);
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_denial_in_either_direction_refuses_and_cuts_a_link() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    for node in [&mut shop, &mut cart] {
        node.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason])")
            .unwrap();
    }
    for (source, destination) in [("shop", "cart"), ("cart", "shop"), ("*", "cart"), ("shop", "*")] {
        shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        // A rule about others changes nothing.
        consul.deny("audit", "cart").unwrap();
        let at = Instant::now();
        consul.deny(source, destination).unwrap();
        let down = format!(
            "receive do {{:nodedown, _, info}} -> info[:nodedown_reason] after {} -> :still_up end",
            CUT.as_millis()
        );
        let reasons = [shop.eval(&down).unwrap(), cart.eval(&down).unwrap()];
        println!(
            "{source} to {destination} denied: cut after {:?}: {reasons:?}",
            at.elapsed()
        );
        assert!(
            reasons.iter().all(|reason| reason.contains(":intention_denied")),
            "{reasons:?}"
        );
        for (node, peer) in [(&mut shop, "cart@h2"), (&mut cart, "shop@h1")] {
            let refused = node.eval(&format!("MeshxNode.connect(:{peer})")).unwrap();
            assert!(refused.starts_with("{:error, {:intention_denied, "), "{refused}");
        }
        consul.forget_intention(source, destination).unwrap();
        wait_allowed(&mut shop);
        shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
        for node in [&mut shop, &mut cart] {
            // The end of this link; what else was told since must not be taken for the next round's.
            node.eval("receive do {:nodedown, _, _} -> :ok after 10_000 -> :none end")
                .unwrap();
            node.eval("drain = fn f -> receive do _ -> f.(f) after 0 -> :ok end end; drain.(drain)")
                .unwrap();
        }
    }
    h1.process.wait_log("intention_denied", SOON).unwrap();
    h2.process.wait_log("intention_denied", SOON).unwrap();
}

/// An allowance takes a moment to reach both agents' copies.
fn wait_allowed(node: &mut Beam) {
    node.expect(
        "wait = fn f, n -> case MeshxNode.connect(:cart@h2) do :ok -> :ok; e when n == 0 -> e; _ -> Process.sleep(50); f.(f, n - 1) end end; wait.(wait, 200)",
        ":ok",
    )
    .unwrap();
}

#[test]
fn calls_need_one_direction_and_end_when_it_is_denied() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    consul.deny("cart-rpc", "shop").unwrap();
    consul.deny("cart", "shop").unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
        .unwrap();
    shop.eval(
        "call = fn f -> case Shop.CartClient.call(:echo, 1, 1_000, 0) do 1 -> Process.sleep(5); f.(f); e -> e end end; task = Task.async(fn -> call.(call) end)",
    )
    .unwrap();
    let at = Instant::now();
    consul.deny("shop", "cart-rpc").unwrap();
    let answer = shop
        .eval(&format!("Task.await(task, {})", CUT.as_millis()))
        .unwrap();
    println!("calls ended {:?} after the denial with {answer}", at.elapsed());
    assert!(answer.starts_with("{:error_rpc, "), "{answer}");
    h2.process.wait_log("intention_denied", SOON).unwrap();
    consul.allow("shop", "cart-rpc").unwrap();
    // Consul answers out of its cache for a moment, so a new connection may be cut once more; what was sent on it is
    // not sent again by itself.
    shop.expect(
        "again = fn f, n -> case Shop.CartClient.call(:echo, 1, 30_000, 60, 500) do 1 -> 1; e when n == 0 -> e; \
         _cut -> f.(f, n - 1) end end; again.(again, 5)",
        "1",
    )
    .unwrap();
    cart.expect("node()", ":cart@h2").unwrap();
}

#[test]
fn a_plain_connection_is_refused_and_cut_as_well() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let server = Control::connect(&h2).unwrap();
    server.serve("echo", echo.address(), vec![]).unwrap();
    let client = Control::connect(&h1).unwrap();
    let address = client.reach("echo", "shop", vec![]).unwrap();
    let mut connection = EchoClient::connect_within(address, SOON).unwrap();
    connection.say(&[3; 200_000]).unwrap();
    consul.deny("shop", "echo").unwrap();
    let took = connection.wait_end(CUT).unwrap();
    println!("cut {took:?} after the denial");
    let answered = echo.answered();
    EchoClient::connect(address, SOON).unwrap_err();
    assert_eq!(
        echo.answered(),
        answered,
        "a denied connection reached the service"
    );
    consul.forget_intention("shop", "echo").unwrap();
    EchoClient::connect_within(address, SOON).unwrap();
}

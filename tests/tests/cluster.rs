//! Two hosts, real BEAMs, distribution through two agents and mutual TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use meshx_tests::{Agent, Beam, BeamBuilder, COOKIE, Mesh};

/// Two agents that are two hosts of one mesh.
fn two_hosts() -> (Mesh, Agent, Agent) {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    (mesh, h1, h2)
}

#[test]
fn nodes_of_two_hosts_do_what_distribution_does() {
    let (_mesh, h1, h2) = two_hosts();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();

    shop.expect("Node.connect(:cart@h2)", "true").unwrap();
    shop.expect("Node.ping(:cart@h2)", ":pong").unwrap();
    cart.expect("Node.list()", "[:shop@h1]").unwrap();
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();

    // A message of 64 MiB, there and back, each byte as it was.
    shop.eval("blob = :crypto.strong_rand_bytes(64 * 1024 * 1024); :made")
        .unwrap();
    shop.expect(
        ":erpc.call(:cart@h2, :crypto, :hash, [:sha256, blob]) == :crypto.hash(:sha256, blob)",
        "true",
    )
    .unwrap();
    shop.expect(
        ":erpc.call(:cart@h2, Function, :identity, [blob]) == blob",
        "true",
    )
    .unwrap();

    // A monitor across the link sees the end of a process with its reason.
    shop.eval("far = Node.spawn(:cart@h2, fn -> receive do reason -> exit(reason) end end)")
        .unwrap();
    shop.eval("ref = Process.monitor(far); send(far, :done)").unwrap();
    shop.expect(
        "receive do {:DOWN, ^ref, :process, ^far, reason} -> reason after 10_000 -> :none end",
        ":done",
    )
    .unwrap();

    // Both ends know whom they talk to, from the certificate and not from the name.
    for (node, peer, service) in [(&mut shop, "cart@h2", "cart"), (&mut cart, "shop@h1", "shop")] {
        let uri = node
            .eval(&format!("{{:ok, p}} = MeshxNode.peer(:{peer}); p.spiffe"))
            .unwrap();
        assert!(
            uri.ends_with(&format!("/ns/default/dc/dc1/svc/{service}\"")),
            "{uri}"
        );
    }

    // The end of a node is told at once, not after a tick.
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();
    cart.process.kill();
    shop.expect(
        "receive do {:nodedown, node} -> node after 3_000 -> :none end",
        ":cart@h2",
    )
    .unwrap();
}

#[test]
fn short_and_long_names_meet_without_dns() {
    let (_mesh, h1, h2) = two_hosts();
    let mut long = Beam::start(&h1, "shop@h1").unwrap();
    let mut short = BeamBuilder::new("cart@h2")
        .run_options(&["--sname"])
        .start(&h2)
        .unwrap();
    long.expect(":net_kernel.longnames()", "true").unwrap();
    short.expect(":net_kernel.longnames()", "false").unwrap();
    short.expect("Node.connect(:shop@h1)", "true").unwrap();
    long.expect_soon("Node.list()", "[:cart@h2]").unwrap();
    long.expect("Node.disconnect(:cart@h2)", "true").unwrap();
    long.expect("Node.connect(:cart@h2)", "true").unwrap();
}

#[test]
fn two_nodes_of_one_host_meet_without_tls_but_with_the_same_checks() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut one = Beam::start(&agent, "shop@h1").unwrap();
    let mut two = Beam::start(&agent, "cart@h1").unwrap();
    one.expect("Node.connect(:cart@h1)", "true").unwrap();
    let links = agent.meshx_ok(&["links", "--json"]).unwrap();
    assert!(links.contains("local") && links.contains("cart@h1"), "{links}");
    one.expect("Node.disconnect(:cart@h1)", "true").unwrap();
    agent.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    let refused = one.eval("MeshxNode.connect(:cart@h1)").unwrap();
    assert!(refused.contains(":intention_denied"), "{refused}");
    two.expect_soon("Node.list()", "[]").unwrap();
}

#[test]
fn simultaneous_connects_end_in_one_link() {
    let (_mesh, h1, h2) = two_hosts();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    for _ in 0..10 {
        // Both evaluate at once: the second line is written before the first is answered.
        shop.process.write_line("Node.connect(:cart@h2)").unwrap();
        cart.process.write_line("Node.connect(:shop@h1)").unwrap();
        let ok = |line: &str| line.starts_with("ok ").then(|| line.to_owned());
        let patience = std::time::Duration::from_secs(30);
        assert_eq!(shop.process.wait_for(patience, ok).unwrap(), "ok true");
        assert_eq!(cart.process.wait_for(patience, ok).unwrap(), "ok true");
        shop.expect("Node.list()", "[:cart@h2]").unwrap();
        cart.expect("Node.list()", "[:shop@h1]").unwrap();
        cart.eval(":net_kernel.monitor_nodes(true)").unwrap();
        shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
        cart.expect(
            "receive do {:nodedown, node} -> node after 10_000 -> :none end",
            ":shop@h1",
        )
        .unwrap();
        cart.eval(":net_kernel.monitor_nodes(false)").unwrap();
        cart.eval("flush = fn f -> receive do _ -> f.(f) after 0 -> :ok end end; flush.(flush)")
            .unwrap();
    }
}

#[test]
fn distribution_stops_and_starts_again_under_the_same_name() {
    let (_mesh, h1, h2) = two_hosts();
    let mut late = BeamBuilder::new("late").start_nameless(&h1).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    late.expect("node()", ":nonode@nohost").unwrap();
    for _ in 0..3 {
        late.expect("Node.start(:late@h1) |> elem(0)", ":ok").unwrap();
        late.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        cart.expect_soon("Node.list()", "[:late@h1]").unwrap();
        late.expect("Node.stop()", ":ok").unwrap();
        h2.wait_name("late@h1", false, std::time::Duration::from_secs(3))
            .unwrap();
        late.expect("node()", ":nonode@nohost").unwrap();
    }
}

#[test]
fn a_wrong_cookie_is_refused() {
    let (_mesh, h1, h2) = two_hosts();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.eval("Node.set_cookie(:\"another cookie\")").unwrap();
    shop.expect("Node.connect(:cart@h2)", "false").unwrap();
    cart.expect("Node.list()", "[]").unwrap();
    shop.eval(&format!("Node.set_cookie(:\"{COOKIE}\")")).unwrap();
    shop.expect("Node.connect(:cart@h2)", "true").unwrap();
}

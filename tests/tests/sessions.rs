//! Nodes that do not listen, tools and nodes without a name of their own: they dial and are nodes of no catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Agent, Beam, BeamBuilder, Mesh, ebin};

const LET_OUT: [&str; 2] = ["--session-service", "operator"];

fn session(name: &str, erl: &str, agent: &Agent) -> Beam {
    BeamBuilder::new(name).erl(erl).start(agent).unwrap()
}

/// A VM that gets its name from the node that it dials.
fn nameless(agent: &Agent) -> Beam {
    BeamBuilder::new("undefined")
        .erl(&format!("-pa {} -sname undefined", ebin().display()))
        .start_nameless(agent)
        .unwrap()
}

#[test]
fn they_reach_nodes_of_their_own_user_here_and_nobody_finds_them() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("Node.connect(:cart@h2)", "true").unwrap();
    // No rule is needed where the kernel says that it is the same user.
    h1.meshx_ok(&["deny", "*", "*"]).unwrap();

    let mut sessions = [
        session("quiet@h1", "-dist_listen false", &h1),
        session("rem-1f-shop@h1", "", &h1),
        session("console@h1", "-meshx_session", &h1),
        nameless(&h1),
    ];
    for session in &mut sessions {
        session.expect("Node.connect(:shop@h1)", "true").unwrap();
        session
            .expect(":erpc.call(:shop@h1, :erlang, :node, [])", ":shop@h1")
            .unwrap();
        let name = session.eval("node()").unwrap();
        // Its peer has the name that it got, no proof of who it is, and a hidden link.
        let seen =
            format!("{name} in Node.list(:hidden) and {name} not in Node.list() and MeshxNode.peer({name})");
        let seen = shop.eval(&seen).unwrap();
        assert!(
            seen.contains("spiffe: \"\"") && seen.contains("service: nil"),
            "{seen}"
        );
        let refused = session.eval("MeshxNode.connect(:cart@h2)").unwrap();
        assert!(
            refused.contains(":not_permitted") && refused.contains("--session-service"),
            "{refused}"
        );
    }
    let names = h1.meshx_ok(&["names"]).unwrap();
    let nodes: Vec<_> = names
        .lines()
        .skip(1)
        .filter_map(|l| l.split(' ').next())
        .collect();
    assert_eq!(nodes, ["cart@h2", "shop@h1"], "{names}");
    assert!(!h1.meshx_ok(&["services"]).unwrap().contains("quiet"));
    cart.expect_soon("Node.list(:connected)", "[]").unwrap();
    let refused = shop.eval("MeshxNode.connect(:nobody@h1)").unwrap();
    assert!(refused.contains(":no_such_node"), "{refused}");
    let refused = sessions[0].eval("MeshxNode.connect(:nobody@h1)").unwrap();
    assert!(refused.contains(":no_such_node"), "{refused}");
    // Nobody else gets a name that a session has, as long as it lives.
    let mut second = BeamBuilder::new("quiet@h1").spawn(&h1).unwrap();
    assert!(
        !second
            .process
            .wait_exit(Duration::from_secs(60))
            .unwrap()
            .success()
    );
    assert!(
        second.process.log().contains("name_taken"),
        "{}",
        second.process.log()
    );
    let [mut quiet, ..] = sessions;
    quiet.process.kill();
    Beam::start(&h1, "quiet@h1").unwrap();
}

#[test]
fn elsewhere_they_are_the_service_that_both_agents_name() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &LET_OUT).unwrap();
    let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &LET_OUT).unwrap();
    // One that takes no sessions.
    let h3 = mesh.agent("c", "127.0.0.4", &["h3"]).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let _search = Beam::start(&h3, "search@h3").unwrap();

    for mut session in [session("rpc-9-shop@h1", "", &h1), nameless(&h1)] {
        session.expect("Node.connect(:cart@h2)", "true").unwrap();
        session
            .expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
            .unwrap();
        let name = session.eval("node()").unwrap();
        let peer = cart
            .eval(&format!(
                "{{:ok, p}} = MeshxNode.peer({name}); {{p.service, {name} in Node.list(:hidden)}}"
            ))
            .unwrap();
        assert_eq!(peer, "{\"operator\", true}");
        let refused = session.eval("MeshxNode.connect(:search@h3)").unwrap();
        assert!(refused.contains(":identity_mismatch"), "{refused}");

        // A denial cuts it, as any link; the other direction counts as well. Whichever agent is first cuts, and the
        // other end sees the connection closed.
        session
            .eval(":net_kernel.monitor_nodes(true, [:nodedown_reason, node_type: :all])")
            .unwrap();
        h1.meshx_ok(&["deny", "cart", "operator"]).unwrap();
        session
            .expect(
                "receive do {:nodedown, :cart@h2, info} -> \
                 info[:nodedown_reason] in [{:meshx, :intention_denied}, :connection_closed] \
                 after 10_000 -> :none end",
                "true",
            )
            .unwrap();
        let refused = session.eval("MeshxNode.connect(:cart@h2)").unwrap();
        assert!(refused.contains(":intention_denied"), "{refused}");
        h1.meshx_ok(&["allow", "cart", "operator"]).unwrap();
    }
}

#[test]
fn a_session_comes_back_after_the_agents_restart() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut quiet = session("quiet@h1", "-dist_listen false", &h1);
    quiet.expect("Node.connect(:shop@h1)", "true").unwrap();
    shop.eval(":net_kernel.monitor_nodes(true, node_type: :all)")
        .unwrap();
    h1.process.kill();
    shop.expect(
        "receive do {:nodedown, node, _} -> node after 10_000 -> :none end",
        ":quiet@h1",
    )
    .unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    h1.wait_name("shop@h1", true, Duration::from_secs(30)).unwrap();
    quiet.eval(":meshx_agent.await() |> elem(0)").unwrap();
    quiet.expect("Node.connect(:shop@h1)", "true").unwrap();
}

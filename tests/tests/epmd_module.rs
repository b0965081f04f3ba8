//! `-epmd_module meshx_epmd`: plain distribution that is led by the agent's control socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Agent, Beam, BeamBuilder, Mesh};

fn two_hosts() -> (Mesh, Agent, Agent) {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1.mesh"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2.mesh"]).unwrap();
    (mesh, h1, h2)
}

fn plain(name: &str, more: &[&str]) -> BeamBuilder {
    BeamBuilder::new(name).run_options(&[&["--plain"], more].concat())
}

#[test]
fn plain_nodes_meet_by_ipv4_and_ipv6_and_come_back_to_a_new_agent() {
    let (mesh, mut h1, h2) = two_hosts();
    let mut shop = plain("shop@h1.mesh", &[]).start(&h1).unwrap();
    let mut cart = plain("cart@h2.mesh", &["--inet6"]).start(&h2).unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[:\"shop@h1.mesh\"]").unwrap();
    // Nothing of `global` is on its way that would make a link anew.
    for node in [&mut shop, &mut cart] {
        node.expect(":global.sync()", ":ok").unwrap();
    }
    shop.expect("Node.disconnect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[]").unwrap();
    cart.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();
    shop.expect(
        ":erpc.call(:\"cart@h2.mesh\", :erlang, :node, [])",
        ":\"cart@h2.mesh\"",
    )
    .unwrap();
    shop.expect(
        ":net_adm.names(:\"h2.mesh\") |> elem(1) |> hd() |> elem(0) |> to_string()",
        "\"cart\"",
    )
    .unwrap();

    // A denial is told to whoever dials, and cuts.
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();
    h1.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    shop.expect(
        "receive do {:nodedown, n} -> n after 9_000 -> :none end",
        ":\"cart@h2.mesh\"",
    )
    .unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "false").unwrap();
    h1.meshx_ok(&["allow", "cart", "shop"]).unwrap();
    // So is a node that is not there, with the cause.
    shop.expect("Node.connect(:\"nobody@h2.mesh\")", "false").unwrap();
    shop.process
        .wait_log(
            "cannot reach nobody@h2.mesh: no_such_node",
            Duration::from_secs(10),
        )
        .unwrap();

    // The name is registered with a secret: nobody takes it by EPMD, and it comes back with its creation.
    let creation = shop.eval(":erlang.system_info(:creation)").unwrap();
    h1.process.kill();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1.mesh"]).unwrap();
    let kept = format!("creation={creation} hidden=false returned=true");
    h1.process.wait_log(&kept, Duration::from_secs(15)).unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();

    // Our own carrier and plain distribution are one cluster.
    let mut ours = Beam::start(&h1, "audit@h1.mesh").unwrap();
    ours.expect("MeshxNode.connect(:\"cart@h2.mesh\")", ":ok")
        .unwrap();
    ours.expect("MeshxNode.connect(:\"shop@h1.mesh\")", ":ok")
        .unwrap();
}

#[test]
fn a_boot_under_a_taken_name_ends_with_the_cause() {
    let (_mesh, h1, _h2) = two_hosts();
    let _shop = plain("shop@h1.mesh", &[]).start(&h1).unwrap();
    let mut second = plain("shop@h1.mesh", &[]).spawn(&h1).unwrap();
    let status = second.process.wait_exit(Duration::from_secs(60)).unwrap();
    assert!(!status.success(), "{status}");
    let log = second.process.log();
    assert!(
        log.contains("meshx: cannot start shop@h1.mesh: name_taken"),
        "{log}"
    );
}

//! What a VM started ends with it; what an agent's restart takes away comes back by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Agent, Beam, BeamBuilder, Mesh};

/// Promised: within 1 s. Three times that is the deadline here.
const FREED: Duration = Duration::from_secs(3);

#[test]
fn a_killed_vm_leaves_no_name_behind_and_the_name_can_be_used_again() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut creations = Vec::new();
    for _ in 0..3 {
        let mut cart = Beam::start(&h2, "cart@h2").unwrap();
        shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        creations.push(
            cart.eval(":erlang.system_info(:creation)")
                .unwrap()
                .parse::<u32>()
                .unwrap(),
        );
        let at = cart.process.kill();
        h1.wait_name("cart@h2", false, FREED).unwrap();
        println!(
            "cart@h2 was free {:?} after SIGKILL, seen from the other host",
            at.elapsed()
        );
    }
    creations.sort_unstable();
    creations.dedup();
    assert_eq!(
        creations.len(),
        3,
        "each registration has a creation of its own: {creations:?}"
    );
    assert!(creations.iter().all(|c| *c >= 4), "{creations:?}");
}

#[test]
fn a_node_registers_again_when_its_agent_comes_back() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let creation = shop.eval(":erlang.system_info(:creation)").unwrap();
    h1.process.kill();
    h2.wait_name("shop@h1", false, FREED).unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    h1.wait_name("shop@h1", true, Duration::from_secs(15)).unwrap();
    cart.expect("MeshxNode.connect(:shop@h1)", ":ok").unwrap();
    assert_eq!(shop.eval(":erlang.system_info(:creation)").unwrap(), creation);
    shop.expect_soon("MeshxNode.peer(:cart@h2) |> elem(0)", ":ok")
        .unwrap();
}

/// Links that an agent took along are made again; what was taken down on purpose just before is not.
#[test]
fn a_node_that_was_disconnected_stays_so_when_the_agent_comes_back() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    // No link but by hand.
    let node = |agent: &Agent, name: &str| {
        let flags = "-connect_all false -kernel prevent_overlapping_partitions false";
        BeamBuilder::new(name).erl(flags).start(agent).unwrap()
    };
    let (_cart, _search) = (node(&h2, "cart@h2"), node(&h2, "search@h2"));
    let mut shop = node(&h1, "shop@h1");
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("MeshxNode.connect(:search@h2)", ":ok").unwrap();
    shop.expect(":net_kernel.monitor_nodes(true)", ":ok").unwrap();
    shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
    h1.process.kill();
    let lost = "receive do {:nodedown, :search@h2} -> :down after 30_000 -> Node.list() end";
    shop.expect(lost, ":down").unwrap();
    let _h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // It is tried in the order of their names.
    let back = "receive do {:nodeup, :search@h2} -> Node.list() after 30_000 -> :none end";
    shop.expect(back, "[:search@h2]").unwrap();
}

#[test]
fn an_agent_that_ends_leaves_no_socket_and_no_entry() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let _shop = Beam::start(&h1, "shop@h1").unwrap();
    h2.wait_name("shop@h1", true, FREED).unwrap();
    let status = h1.process.terminate(Duration::from_secs(10)).unwrap();
    assert!(status.success(), "{status}");
    h2.wait_name("shop@h1", false, FREED).unwrap();
    for socket in ["control.sock", "dist.sock"] {
        assert!(!h1.dir().join(socket).exists(), "{socket} is left");
    }
}

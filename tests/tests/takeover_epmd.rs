//! One build of the agent takes over from another while nodes of plain distribution live by it: no name is lost, no link
//! ends, no call fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use meshx_dist::epmd::Request;
use meshx_tests::epmd::{Alive, alive2, exchange_as_stranger, names, port_please};
use meshx_tests::upgrade::{count, other_build, start_load};
use meshx_tests::{Agent, Beam, BeamBuilder, Mesh, Process, program, wait_until};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Promised: a denial cuts a live link within 2 s. Three times that is the deadline here.
const CUT: Duration = Duration::from_secs(6);
/// Promised: a killed VM is gone within 1 s. Likewise.
const FREED: Duration = Duration::from_secs(3);
/// For what only has to happen.
const SOON: Duration = Duration::from_secs(30);

/// Two nodes that are connected and call each other all the time, and both agents taken over by turns, each three times.
/// Gives the processes that were taken over.
fn upgraded(
    builds: &[PathBuf; 2],
    mut agents: [&mut Agent; 2],
    shop: &mut Beam,
    cart: &mut Beam,
) -> Vec<Process> {
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    let erpc = |node| format!(":erpc.call(:\"{node}\", Function, :identity, [n], 30_000)");
    start_load(shop, &erpc("cart@h2.mesh")).unwrap();
    start_load(cart, &erpc("shop@h1.mesh")).unwrap();
    let mut old = Vec::new();
    for round in 0..3 {
        for (agent, node) in agents.iter_mut().zip(["shop@h1.mesh", "cart@h2.mesh"]) {
            let began = Instant::now();
            let taken = agent.take_over(&builds[round % 2]).unwrap();
            println!(
                "round {round}: {node}'s agent taken over within {:?}",
                began.elapsed()
            );
            taken.wait_log("handed over", SOON).unwrap();
            // Who serves knows the node by its old registration.
            agent.wait_name(node, true, SOON).unwrap();
            assert!(!agent.process.log().contains("node registered"));
            old.push(taken);
        }
    }
    let calls = [count(shop, "task"), count(cart, "task")].map(Result::unwrap);
    println!("calls {calls:?}: none failed");
    for node in [shop, cart] {
        node.expect(
            "receive do {:nodedown, node, why} -> {node, why} after 0 -> :none end",
            ":none",
        )
        .unwrap();
    }
    old
}

/// The rules hold on for a link of the first process, and new links are made by the last.
fn rules_hold(h1: &Agent, shop: &mut Beam, cart: &mut Beam) {
    let at = Instant::now();
    h1.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    shop.expect(
        &format!(
            "receive do {{:nodedown, node, _}} -> node after {} -> :none end",
            CUT.as_millis()
        ),
        ":\"cart@h2.mesh\"",
    )
    .unwrap();
    println!(
        "a denial cut the link of the first process within {:?}",
        at.elapsed()
    );
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "false").unwrap();
    h1.meshx_ok(&["allow", "cart", "shop"]).unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    shop.expect("Node.disconnect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[]").unwrap();
    cart.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();
    cart.expect(
        ":erpc.call(:\"shop@h1.mesh\", :erlang, :node, [])",
        ":\"shop@h1.mesh\"",
    )
    .unwrap();
}

fn all_end(old: Vec<Process>) {
    for mut process in old {
        let status = process.wait_exit(SOON).unwrap();
        assert!(status.success(), "{status}");
    }
}

#[test]
fn nodes_that_registered_by_epmd_keep_their_names_and_links() {
    let mesh = Mesh::new().unwrap();
    let builds = [other_build(mesh.path()).unwrap(), program("meshx").unwrap()];
    let options = [
        "--epmd=127.0.0.1:0",
        "--epmd-nodes",
        "shop",
        "--epmd-nodes",
        "cart",
    ];
    let mut h1 = mesh.agent_with("a", "127.0.0.2", &["h1.mesh"], &options).unwrap();
    let mut h2 = mesh.agent_with("b", "127.0.0.3", &["h2.mesh"], &options).unwrap();
    let start = |name: &str, reach: &str, agent: &Agent| {
        let options = ["--epmd", "--reach", reach];
        let node = BeamBuilder::new(name).run_options(&options).start(agent);
        node.unwrap()
    };
    let mut shop = start("shop@h1.mesh", "h2.mesh", &h1);
    let mut cart = start("cart@h2.mesh", "h1.mesh", &h2);
    let port = h1.epmd().unwrap();
    let tool = Alive::register(port, "rpc-1-shop").unwrap();
    let at = tool.listener.local_addr().unwrap().port();

    let old = upgraded(&builds, [&mut h1, &mut h2], &mut shop, &mut cart);
    assert_eq!(names(port).unwrap(), ["rpc-1-shop", "shop"]);
    assert_eq!(port_please(HERE, port, "rpc-1-shop").unwrap(), Some(at));
    // Whose the tool is went over, too: another user is told of none.
    let mut asked = Vec::new();
    Request::PortPlease2("rpc-1-shop".into())
        .encode(&mut asked)
        .unwrap();
    assert_eq!(exchange_as_stranger(port, &asked, 1024, 30).unwrap(), [119, 1]);
    let (_, taken) = alive2(port, "shop", 9).unwrap();
    assert_eq!(taken.creation(), None, "{taken:?}");
    rules_hold(&h1, &mut shop, &mut cart);

    // What ends now ends with the last process: names with their connections.
    let at = cart.process.kill();
    h2.wait_name("cart@h2.mesh", false, FREED).unwrap();
    println!("a killed VM was gone within {:?}", at.elapsed());
    drop((tool, shop));
    wait_until(SOON, || names(port).is_ok_and(|names| names.is_empty())).unwrap();
    all_end(old);
}

#[test]
fn nodes_of_meshx_epmd_keep_their_names_and_links() {
    let mesh = Mesh::new().unwrap();
    let builds = [other_build(mesh.path()).unwrap(), program("meshx").unwrap()];
    let mut h1 = mesh.agent("a", "127.0.0.2", &["h1.mesh"]).unwrap();
    let mut h2 = mesh.agent("b", "127.0.0.3", &["h2.mesh"]).unwrap();
    let start = |name: &str, agent: &Agent| {
        let node = BeamBuilder::new(name).run_options(&["--plain"]).start(agent);
        node.unwrap()
    };
    let mut shop = start("shop@h1.mesh", &h1);
    let mut cart = start("cart@h2.mesh", &h2);
    let old = upgraded(&builds, [&mut h1, &mut h2], &mut shop, &mut cart);
    rules_hold(&h1, &mut shop, &mut cart);
    let at = cart.process.kill();
    h2.wait_name("cart@h2.mesh", false, FREED).unwrap();
    println!("a killed VM was gone within {:?}", at.elapsed());
    drop(shop);
    all_end(old);
}

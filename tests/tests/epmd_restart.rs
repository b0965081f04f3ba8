//! The agent is killed under nodes that registered by EPMD: they come back by themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use meshx_dist::epmd::{Node, NodeType, Request};
use meshx_tests::epmd::{Alive, exchange_as_stranger, names, port_please};
use meshx_tests::{Agent, BeamBuilder, Mesh};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Promised: 2 to 5 s after the agent is there again. Three times that is the deadline here.
const BACK: Duration = Duration::from_secs(15);

/// An answer to a registration, in bytes.
const ALIVE2_RESP: usize = 6;

fn agent(mesh: &Mesh, name: &str, ip: &str, host: &str, port: u16) -> Agent {
    let place = format!("--epmd=127.0.0.1:{port}");
    let options = [&place, "--epmd-nodes", "shop", "--epmd-nodes", "cart"];
    mesh.agent_with(name, ip, &[host], &options).unwrap()
}

#[test]
fn names_come_back_after_the_agent_was_killed() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = agent(&mesh, "a", "127.0.0.2", "h1.mesh", 0);
    let h2 = agent(&mesh, "b", "127.0.0.3", "h2.mesh", 0);
    let port = h1.epmd().unwrap();
    let options = ["--epmd", "--reach", "h2.mesh"];
    let mut shop = BeamBuilder::new("shop@h1.mesh")
        .run_options(&options)
        .start(&h1)
        .unwrap();
    let options = ["--epmd", "--reach", "h1.mesh"];
    let mut cart = BeamBuilder::new("cart@h2.mesh")
        .run_options(&options)
        .start(&h2)
        .unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    let creation = shop.eval(":erlang.system_info(:creation)").unwrap();
    cart.eval(":net_kernel.monitor_nodes(true)").unwrap();

    h1.process.kill();
    let h1 = agent(&mesh, "a", "127.0.0.2", "h1.mesh", port);
    let at = Instant::now();
    // Asked at once: the answer waits for the node, which looks for EPMD every 2 s.
    let found = port_please(HERE, port, "shop").unwrap();
    println!(
        "shop was found {:?} after the agent came back: {found:?}",
        at.elapsed()
    );
    h1.wait_name("shop@h1.mesh", true, BACK).unwrap();
    println!(
        "shop was registered again {:?} after the agent came back",
        at.elapsed()
    );
    let kept = format!("creation={creation} hidden=false returned=true");
    h1.process.wait_log(&kept, BACK).unwrap();
    // Where other hosts are asked for is as before, without a new inetrc or a restart.
    cart.expect(
        "receive do {:nodedown, n} -> n after 15_000 -> :none end",
        ":\"shop@h1.mesh\"",
    )
    .unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    // What `global` there sends to a node that it has just heard of would make a link anew.
    cart.expect_soon("Node.list()", "[:\"shop@h1.mesh\"]").unwrap();
    for node in [&mut shop, &mut cart] {
        node.expect(":global.sync()", ":ok").unwrap();
    }
    shop.expect("Node.disconnect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[]").unwrap();
    cart.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();
}

#[test]
fn whoever_asks_early_is_kept_waiting_until_the_name_is_there() {
    let mesh = Mesh::new().unwrap();
    let mut h1 = agent(&mesh, "a", "127.0.0.2", "h1", 0);
    let port = h1.epmd().unwrap();
    let shop = Alive::register(port, "shop").unwrap();
    let dist = shop.listener.local_addr().unwrap().port();
    let creation = shop.creation;
    // What is to outlive the agent is written 50 ms later at most.
    let kept = h1.dir().join("epmd.json");
    let written = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("shop"));
    meshx_tests::wait_until(Duration::from_secs(10), written).unwrap();
    h1.process.kill();
    let _h1 = agent(&mesh, "a", "127.0.0.2", "h1", port);
    let asking = std::thread::spawn(move || port_please(HERE, port, "shop").unwrap());
    // Still the same node: it runs under the creation that it had.
    let again = Alive::register_at(port, "shop", dist, shop.listener).unwrap();
    assert_eq!(again.creation, creation);
    assert!(asking.join().unwrap().is_some());
    assert_eq!(names(port).unwrap(), ["shop"]);
    // And one that starts now is another.
    drop(again);
    assert_ne!(Alive::register(port, "shop").unwrap().creation, creation);
}

#[test]
fn a_name_is_kept_for_its_user_over_a_restart() {
    let mesh = Mesh::new().unwrap();
    let start = |port: u16| {
        let place = format!("--epmd=127.0.0.1:{port}");
        let options = [&place, "--epmd-nodes", "*", "--allow-register", "uid:4711=*"];
        mesh.agent_with("a", "127.0.0.2", &["h1"], &options).unwrap()
    };
    let mut h1 = start(0);
    let port = h1.epmd().unwrap();
    let alive = |name: &str| {
        let mut bytes = Vec::new();
        let node = Node::new(name, 9, NodeType::Normal);
        Request::Alive2(node).encode(&mut bytes).unwrap();
        exchange_as_stranger(port, &bytes, ALIVE2_RESP, 30).unwrap()
    };
    let _shop = Alive::register(port, "shop").unwrap();
    let kept = h1.dir().join("epmd.json");
    let written = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("shop"));
    meshx_tests::wait_until(Duration::from_secs(10), written).unwrap();
    assert_eq!(alive("other")[..2], [118, 0], "that user may be every service");
    h1.process.kill();
    let h1 = start(port);
    assert_eq!(alive("shop"), [118, 1, 0, 0, 0, 0]);
    h1.process
        .wait_log("and is kept for it", Duration::from_secs(10))
        .unwrap();
}

#[test]
fn a_taken_port_is_a_warning_that_names_its_owner_and_is_taken_over_when_it_is_free() {
    let mesh = Mesh::new().unwrap();
    let stray = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = stray.local_addr().unwrap().port();
    let h1 = agent(&mesh, "a", "127.0.0.2", "h1", port);
    let owner = format!("(pid {}) has port {port} at 0.0.0.0:{port}", std::process::id());
    h1.process.wait_log(&owner, Duration::from_secs(10)).unwrap();
    let doctor = h1
        .meshx_ok(&["doctor", "--epmd-port", &port.to_string()])
        .unwrap();
    let line = doctor.lines().find(|line| line.contains(&owner)).unwrap();
    assert!(line.starts_with("warning"), "{doctor}");
    assert!(doctor.contains("epmd -kill"), "{doctor}");
    drop(stray);
    let at = Instant::now();
    meshx_tests::wait_until(Duration::from_secs(20), || names(port).is_ok()).unwrap();
    println!("the port was taken over {:?} after it was free", at.elapsed());
    let doctor = h1
        .meshx_ok(&["doctor", "--epmd-port", &port.to_string()])
        .unwrap();
    let epmd: Vec<&str> = doctor.lines().filter(|line| line.contains("epmd")).collect();
    assert!(
        epmd.len() == 2 && epmd.iter().all(|line| line.starts_with("ok")),
        "{doctor}"
    );
}

//! Certificates of the embedded mesh are exchanged under traffic: ten times the leaves, once the root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::control::Control;
use meshx_tests::{Agent, BeamBuilder, EchoClient, EchoServer, Mesh, traffic, wait_until};

const SOON: Duration = Duration::from_secs(60);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

/// Links that this agent has proven anew, and failures of that.
fn proven(agent: &Agent) -> (f64, f64) {
    (
        agent.figure("meshx_reproofs_total").unwrap(),
        agent.figure("meshx_reproofs_failed_total").unwrap(),
    )
}

#[test]
fn ten_leaf_rotations_and_one_of_the_root_go_unnoticed() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &METRICS).unwrap();
    let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &METRICS).unwrap();
    let _cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
        .unwrap();
    let echo = EchoServer::start([127, 0, 0, 1]).unwrap();
    let (server, client) = (Control::connect(&h2).unwrap(), Control::connect(&h1).unwrap());
    server.serve("echo", echo.address(), vec![]).unwrap();
    let address = client.reach("echo", "web", vec![]).unwrap();
    let mut plain = EchoClient::connect(address, SOON).unwrap();
    traffic::start(&mut shop).unwrap();

    let mut rotations = vec![&["rotate"][..]; 10];
    rotations.extend([&["rotate", "--root"][..], &["rotate", "--forget"], &["rotate"]]);
    for rotation in rotations {
        let (before, _) = proven(&h1);
        h1.meshx_ok(rotation).unwrap();
        // One of each: distribution, RPC and plain.
        wait_until(SOON, || {
            EchoClient::connect(address, SOON).unwrap();
            plain.say(&[1; 10_000]).unwrap();
            proven(&h1).0 >= before + 3.0
        })
        .unwrap_or_else(|()| panic!("{rotation:?}: {}", h1.metrics().unwrap()));
    }
    let calls = traffic::stop(&mut shop).unwrap();
    let (proofs, failed) = proven(&h1);
    let took = h1.figure("meshx_reproof_round_trip_seconds_total").unwrap();
    println!(
        "{calls} pairs of calls, {proofs} proofs of {:.1} ms each, {failed} of links that had just ended",
        took / proofs * 1000.0
    );
    assert!(calls > 20, "{calls}");
    for agent in [&h1, &h2] {
        assert_eq!(agent.figure("meshx_links_cut_total").unwrap(), 0.0);
        assert_eq!(agent.figure("meshx_refusals_total").unwrap(), 0.0);
    }
}

//! Connect's authority is exchanged under traffic: Consul signs the new root with the one before, gives all services new
//! leaves, and nobody notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::consul::{Authority, Consul, Setup};
use meshx_tests::control::Control;
use meshx_tests::{BeamBuilder, EchoClient, EchoServer, traffic, wait_until};
use serde_json::json;

/// Consul spreads new leaves over half a minute after its authority changed: three times that, and the proofs.
const SPREAD: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(30);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

#[test]
fn two_rotations_of_the_root_go_unnoticed() {
    let setup = Setup {
        own_connect_ca: true,
        ..Setup::default()
    };
    let consul = Consul::start_with(setup).unwrap();
    let h1 = consul
        .agent_with("a", "127.0.0.2", &["h1"], &METRICS, None)
        .unwrap();
    let h2 = consul
        .agent_with("b", "127.0.0.3", &["h2"], &METRICS, None)
        .unwrap();
    let _cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
        .unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let (server, client) = (Control::connect(&h2).unwrap(), Control::connect(&h1).unwrap());
    server.serve("echo", echo.address(), vec![]).unwrap();
    let address = client.reach("echo", "web", vec![]).unwrap();
    let mut plain = EchoClient::connect_within(address, SOON).unwrap();
    traffic::start(&mut shop).unwrap();
    let refused = [&h1, &h2].map(|agent| agent.figure("meshx_refusals_total").unwrap());

    for name in ["second", "third"] {
        let before = h1.figure("meshx_reproofs_total").unwrap();
        let next = Authority::new(name).unwrap();
        let config = json!({
            "Provider": "consul",
            "Config": { "PrivateKey": next.key_pem(), "RootCert": next.pem(), "RotationPeriod": "2160h" },
        });
        consul.put("/v1/connect/ca/configuration", &config).unwrap();
        // Distribution, RPC and plain, each when its service has its new leaf.
        wait_until(SPREAD, || {
            EchoClient::connect(address, SOON).unwrap();
            plain.say(&[1; 10_000]).unwrap();
            h1.figure("meshx_reproofs_total").unwrap() >= before + 3.0
        })
        .unwrap_or_else(|()| panic!("{name}: {}\n{}", h1.metrics().unwrap(), h1.process.log()));
        println!("{name}: {}", h1.meshx_ok(&["certs"]).unwrap());
    }
    let calls = traffic::stop(&mut shop).unwrap();
    println!("{calls} pairs of calls");
    assert!(calls > 20, "{calls}");
    for (agent, refused) in [&h1, &h2].into_iter().zip(refused) {
        assert_eq!(agent.figure("meshx_links_cut_total").unwrap(), 0.0);
        assert_eq!(agent.figure("meshx_refusals_total").unwrap(), refused);
        // Leaves and roots arrive one after the other: a proof may have to be tried again.
        println!(
            "{} proofs failed",
            agent.figure("meshx_reproofs_failed_total").unwrap()
        );
    }
}

//! Nodes and calls between two hosts of a real Consul, over native agents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::consul::{Consul, Setup, agent_rules};
use meshx_tests::{Agent, Beam, BeamBuilder, wait_until};

const SOON: Duration = Duration::from_secs(20);

fn shop_and_cart(h1: &Agent, h2: &Agent) -> (Beam, Beam) {
    let cart = BeamBuilder::new("cart@h2").app("shop").start(h2).unwrap();
    let shop = BeamBuilder::new("shop@h1").app("shop").start(h1).unwrap();
    (shop, cart)
}

/// What distribution and RPC do, in short; the embedded mesh's tests have all of it.
fn they_work_together(consul: &Consul, shop: &mut Beam, cart: &mut Beam) {
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    shop.eval("blob = :crypto.strong_rand_bytes(16 * 1024 * 1024); :made")
        .unwrap();
    shop.expect(
        ":erpc.call(:cart@h2, Function, :identity, [blob]) == blob",
        "true",
    )
    .unwrap();
    shop.expect(
        "Shop.CartClient.call(:total, [{\"lamp\", 2}, {\"desk\", 1}], 30_000, 60, 500)",
        "16898",
    )
    .unwrap();
    shop.expect("Shop.CartClient.call(:echo, blob) == blob", "true")
        .unwrap();
    // Both ends know whom they talk to, from Consul's certificates.
    for (node, peer, service) in [(shop, "cart@h2", "cart"), (cart, "shop@h1", "shop")] {
        let uri = node
            .eval(&format!("{{:ok, p}} = MeshxNode.peer(:{peer}); p.spiffe"))
            .unwrap();
        assert_eq!(uri, format!("{:?}", consul.spiffe(service).unwrap()));
    }
}

#[test]
fn two_hosts_of_one_consul() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let (mut shop, mut cart) = shop_and_cart(&h1, &h2);
    they_work_together(&consul, &mut shop, &mut cart);

    // Consul has them as native services that pass, at the agents' addresses, under their own names.
    consul.wait_passing("shop", 1, SOON).unwrap();
    for (service, agent) in [("shop", &h1), ("cart", &h2), ("cart-rpc", &h2)] {
        let all = consul
            .get(&format!("/v1/health/connect/{service}?passing"))
            .unwrap();
        let all = all.as_array().unwrap();
        assert_eq!(all.len(), 1, "{service}: {all:?}");
        let service = &all[0]["Service"];
        assert_eq!(service["Connect"]["Native"], true, "{service}");
        assert_eq!(
            format!("{}:{}", service["Address"].as_str().unwrap(), service["Port"]),
            agent.inbound()
        );
    }
    let node = consul.get("/v1/health/connect/cart?passing").unwrap();
    assert_eq!(node[0]["Service"]["ID"], "cart@h2", "{node}");
    let names = h1.meshx_ok(&["names"]).unwrap();
    assert!(names.contains("shop@h1") && names.contains("cart@h2"), "{names}");

    // Two nodes of one service, and one that comes late.
    let mut second = Beam::start(&h1, "cart@h1").unwrap();
    second.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("MeshxNode.connect(:cart@h1)", ":ok").unwrap();
    shop.expect("Node.list() |> Enum.sort()", "[:cart@h1, :cart@h2]")
        .unwrap();
    assert_eq!(
        consul
            .get("/v1/health/connect/cart?passing")
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );

    // What ends in order leaves nothing.
    drop((shop, cart, second));
    for mut agent in [h1, h2] {
        let status = agent.process.terminate(Duration::from_secs(20)).unwrap();
        assert!(status.success(), "{status}");
    }
    // Consul's catalogue follows its agent a moment later.
    wait_until(SOON, || consul.service_names().unwrap().is_empty())
        .unwrap_or_else(|()| panic!("left: {:?}", consul.service_names()));
}

#[test]
fn the_same_behind_acls_and_tls() {
    let consul = Consul::start_with(Setup {
        acl: true,
        tls: true,
        ..Setup::default()
    })
    .unwrap();
    let token = consul.token("agents", &agent_rules()).unwrap();
    let h1 = consul
        .agent_with("a", "127.0.0.2", &["h1"], &[], Some(&token))
        .unwrap();
    let h2 = consul
        .agent_with("b", "127.0.0.3", &["h2"], &[], Some(&token))
        .unwrap();
    let (mut shop, mut cart) = shop_and_cart(&h1, &h2);
    // Default-deny holds for services as well.
    let refused = shop.eval("MeshxNode.connect(:cart@h2)").unwrap();
    assert!(refused.contains(":intention_denied"), "{refused}");
    for (source, destination) in [("shop", "cart"), ("cart", "shop"), ("shop", "cart-rpc")] {
        consul.allow(source, destination).unwrap();
    }
    // An allowance takes a moment to reach Consul's own copy.
    shop.expect_soon("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    they_work_together(&consul, &mut shop, &mut cart);
    // No token is in a log, at whatever level.
    for agent in [&h1, &h2] {
        assert!(!agent.process.log().contains(&token));
    }
}

#[test]
fn agents_come_before_consul_and_by_its_unix_socket() {
    let mut consul = Consul::start_with(Setup {
        unix: true,
        ..Setup::default()
    })
    .unwrap();
    consul.kill();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").spawn(&h1).unwrap();
    h1.process.wait_log("client connected", SOON).unwrap();
    consul.start_again().unwrap();
    // The VM waits at boot, or is started again by whoever supervises it: here it must not fail.
    shop.process
        .wait_for(Duration::from_secs(60), |line| {
            line.starts_with("ready ").then_some(())
        })
        .unwrap();
    consul.wait_passing("shop", 1, SOON).unwrap();
}

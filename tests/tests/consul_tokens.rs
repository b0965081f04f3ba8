//! Consul with ACLs, default-deny: least rights, missing rights, rotation.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::Duration;

use meshx::agent::control::message::text;
use meshx_tests::consul::{Consul, Setup, agent_rules, service_rules};
use meshx_tests::control::Control;
use meshx_tests::{Beam, BeamBuilder, EchoClient, EchoServer};

const SOON: Duration = Duration::from_secs(20);

fn with_acls() -> Consul {
    Consul::start_with(Setup {
        acl: true,
        ..Setup::default()
    })
    .unwrap()
}

/// The agent may look at everything and be nothing.
const AGENT: &str = r#"service_prefix "" { policy = "read" intentions = "read" }
    node_prefix "" { policy = "read" }
    agent_prefix "" { policy = "read" }"#;

#[test]
fn two_services_of_one_host_have_tokens_of_their_own() {
    let consul = with_acls();
    let agent = consul.token("agent", AGENT).unwrap();
    let cart = consul.token("cart", &service_rules("cart")).unwrap();
    let shop = consul.token("shop", &service_rules("shop")).unwrap();
    let h1 = consul
        .agent_with("a", "127.0.0.2", &["h1"], &[], Some(&agent))
        .unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let nowhere: SocketAddr = (consul.ip(), 9).into();
    let token = |token: &str| vec![("token", text(token))];

    let (cart_client, shop_client) = (Control::connect(&h1).unwrap(), Control::connect(&h1).unwrap());
    // Without a token of its own a service has the agent's, which lacks a right; the refusal names it.
    let refused = cart_client.serve("cart", echo.address(), vec![]).unwrap_err();
    assert!(
        refused.starts_with("not_permitted: ") && refused.contains("service:write"),
        "{refused}"
    );
    assert!(refused.contains("cart"), "{refused}");
    // With another service's token neither its place in the catalogue nor its certificate can be had.
    let refused = cart_client
        .serve("cart", echo.address(), token(&shop))
        .unwrap_err();
    assert!(
        refused.starts_with("not_permitted: ") && refused.contains("cart"),
        "{refused}"
    );
    let refused = shop_client.reach("cart", "cart", token(&shop)).unwrap_err();
    assert!(refused.starts_with("not_permitted: "), "{refused}");
    assert_eq!(consul.service_names().unwrap(), [""; 0]);
    for (own, other) in [(&cart, "shop"), (&shop, "cart")] {
        let refused = consul.leaf(Some(own), other).unwrap_err();
        assert!(refused.contains("403"), "{refused}");
    }

    cart_client.serve("cart", echo.address(), token(&cart)).unwrap();
    shop_client.serve("shop", nowhere, token(&shop)).unwrap();
    consul.wait_passing("cart", 1, SOON).unwrap();
    consul.allow("shop", "cart").unwrap();
    let address = shop_client.reach("cart", "shop", token(&shop)).unwrap();
    let mut client = EchoClient::connect_within(address, SOON).unwrap();
    client.say(&[5; 100_000]).unwrap();
    for secret in [&agent, &cart, &shop] {
        assert!(
            !h1.process.log().contains(secret.as_str()),
            "a token is in the log"
        );
    }

    // A node has no token of its own here, and says at boot what is missing.
    let mut node = BeamBuilder::new("audit@h1").spawn(&h1).unwrap();
    let status = node.process.wait_exit(Duration::from_secs(60)).unwrap();
    assert!(!status.success(), "{status}");
    let log = node.process.log();
    assert!(log.contains("service:write") && log.contains("audit"), "{log}");
}

#[test]
fn a_rotated_token_is_taken_up_and_no_link_notices() {
    let consul = with_acls();
    let old = consul.token("old", &agent_rules()).unwrap();
    let file = consul.token_file(&old).unwrap();
    let options = ["--consul-token-file", file.to_str().unwrap()];
    let h1 = consul
        .agent_with("a", "127.0.0.2", &["h1"], &options, None)
        .unwrap();
    let h2 = consul
        .agent_with("b", "127.0.0.3", &["h2"], &options, None)
        .unwrap();
    for (source, destination) in [
        ("shop", "cart"),
        ("cart", "shop"),
        ("late", "cart"),
        ("cart", "late"),
    ] {
        consul.allow(source, destination).unwrap();
    }
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();

    let new = consul.token("new", &agent_rules()).unwrap();
    let written = consul.token_file(&new).unwrap();
    std::fs::rename(written, &file).unwrap();
    consul.revoke(&old).unwrap();
    // What is registered stays so by the new token: longer than the check would live without a refresh.
    let some = |checks: &serde_json::Value| checks.as_array().is_some_and(|checks| !checks.is_empty());
    let critical = consul.until("/v1/health/state/critical", Duration::from_secs(12), some);
    assert!(critical.is_err(), "critical after the rotation: {critical:?}");
    for service in ["shop", "cart"] {
        consul.wait_passing(service, 1, SOON).unwrap();
    }
    let mut late = Beam::start(&h1, "late@h1").unwrap();
    late.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    shop.expect(
        "receive do {:nodedown, node} -> node after 0 -> :none end",
        ":none",
    )
    .unwrap();
    // A denial still reaches them.
    consul.deny("shop", "cart").unwrap();
    shop.expect(
        "receive do {:nodedown, :cart@h2} -> :ok after 20_000 -> :none end",
        ":ok",
    )
    .unwrap();
    cart.expect("node()", ":cart@h2").unwrap();
}

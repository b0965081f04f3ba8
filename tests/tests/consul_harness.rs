//! The other end-to-end tests rest on these: a real Consul, its built-in proxy and Envoy, without meshx.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::Duration;

use meshx_tests::consul::{Consul, Leaf, Service, Setup, service_rules};
use meshx_tests::envoy::Envoy;
use meshx_tests::{EchoClient, EchoServer, wait_until};
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);

fn at(consul: &Consul, port: u16) -> SocketAddr {
    (consul.ip(), port).into()
}

#[test]
fn two_built_in_proxies_carry_a_connection_and_an_intention_denies_it() {
    let consul = Consul::start().unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let cart = Service::new("cart", echo.address(), at(&consul, 20_000));
    let shop =
        Service::new("shop", at(&consul, 9), at(&consul, 20_001)).upstream("cart", at(&consul, 20_002));
    consul.register(&cart).unwrap();
    consul.register(&shop).unwrap();
    let _cart = consul.connect_proxy("cart", None).unwrap();
    let _shop = consul.connect_proxy("shop", None).unwrap();

    let mut client = EchoClient::connect_within(at(&consul, 20_002), SOON).unwrap();
    client.say(&[7; 300_000]).unwrap();
    assert!(echo.answered() > 0);
    consul.deny("shop", "cart").unwrap();
    // The proxy is told from Consul's own copy of the rules, which follows a moment later.
    let refused = || EchoClient::connect(at(&consul, 20_002), SOON).is_err();
    wait_until(SOON, refused).unwrap();
    consul.allow("shop", "cart").unwrap();
    EchoClient::connect_within(at(&consul, 20_002), SOON).unwrap();
    consul.deny("*", "*").unwrap();
    EchoClient::connect(at(&consul, 20_002), SOON)
        .map(|_| ())
        .unwrap();
    consul.forget_intention("shop", "cart").unwrap();
    wait_until(SOON, refused).unwrap();
}

#[test]
fn envoy_and_the_built_in_proxy_carry_a_connection_both_ways() {
    let consul = Consul::start().unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let cart = Service::new("cart", echo.address(), at(&consul, 20_000));
    let shop =
        Service::new("shop", echo.address(), at(&consul, 20_001)).upstream("cart", at(&consul, 20_002));
    consul.register(&cart).unwrap();
    consul.register(&shop).unwrap();
    let _proxy = consul.connect_proxy("shop", None).unwrap();
    let only_shop = [consul.spiffe("shop").unwrap()];
    let envoy = Envoy::new(&consul, "cart")
        .unwrap()
        .inbound(at(&consul, 20_000), echo.address(), &only_shop)
        .upstream("shop", &only_shop[0], at(&consul, 20_003), at(&consul, 20_001));
    let _envoy = envoy.start(&consul).unwrap();
    for port in [20_002, 20_003] {
        let mut client = EchoClient::connect_within(at(&consul, port), SOON).unwrap();
        client.say(&[8; 300_000]).unwrap();
    }

    // Another service is none of those that Envoy lets in; a service of another name is not believed by it.
    let audit =
        Service::new("audit", at(&consul, 9), at(&consul, 20_010)).upstream("cart", at(&consul, 20_011));
    consul.register(&audit).unwrap();
    let _audit = consul.connect_proxy("audit", None).unwrap();
    EchoClient::connect(at(&consul, 20_011), SOON).unwrap_err();
    let wrong = Envoy::new(&consul, "other").unwrap().upstream(
        "shop",
        &consul.spiffe("cart").unwrap(),
        at(&consul, 20_012),
        at(&consul, 20_001),
    );
    let _wrong = wrong.start(&consul).unwrap();
    EchoClient::connect(at(&consul, 20_012), SOON).unwrap_err();
}

#[test]
fn a_killed_consul_comes_back_at_its_address_with_or_without_what_it_knew() {
    let mut consul = Consul::start_with(Setup {
        keeps_state: true,
        acl: true,
        ..Setup::default()
    })
    .unwrap();
    let address = consul.address().to_owned();
    let token = consul.token("cart", &service_rules("cart")).unwrap();
    consul.deny("shop", "cart").unwrap();
    let domain = consul.trust_domain().unwrap();

    consul.kill();
    consul.get("/v1/status/leader").unwrap_err();
    consul.start_again().unwrap();
    assert_eq!(consul.address(), address);
    assert_eq!(consul.trust_domain().unwrap(), domain);
    consul.get_as(Some(&token), "/v1/acl/token/self").unwrap();
    assert_eq!(
        consul
            .get("/v1/connect/intentions")
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        1
    );

    consul.kill();
    consul.lose_state().unwrap();
    consul.start_again().unwrap();
    assert_eq!(consul.address(), address);
    assert_ne!(consul.trust_domain().unwrap(), domain);
    consul.get_as(Some(&token), "/v1/acl/token/self").unwrap_err();
    assert_eq!(consul.get("/v1/connect/intentions").unwrap(), json!([]));
}

#[test]
fn a_token_of_one_service_gets_that_services_certificate_only() {
    let consul = Consul::start_with(Setup {
        acl: true,
        tls: true,
        ..Setup::default()
    })
    .unwrap();
    let token = consul.token("cart", &service_rules("cart")).unwrap();
    let leaf = consul.leaf(Some(&token), "cart").unwrap();
    assert_eq!(leaf.uri, consul.spiffe("cart").unwrap());
    let refused = consul.leaf(Some(&token), "shop").unwrap_err();
    assert!(
        refused.contains("403") && refused.contains("Permission denied"),
        "{refused}"
    );
    consul.revoke(&token).unwrap();
    consul.get_as(Some(&token), "/v1/acl/token/self").unwrap_err();
}

#[test]
fn https_wants_a_certificate_and_a_unix_socket_is_a_way_too() {
    let consul = Consul::start_with(Setup {
        tls: true,
        own_connect_ca: true,
        ..Setup::default()
    })
    .unwrap();
    // The port that would be plain HTTP's speaks TLS only, and the file of the client's certificate is needed.
    let output = std::process::Command::new(meshx_tests::consul::program().unwrap())
        .args(["catalog", "services"])
        .envs(
            consul
                .environment(None)
                .unwrap()
                .into_iter()
                .filter(|(name, _)| !name.starts_with("CONSUL_CLIENT")),
        )
        .output()
        .unwrap();
    assert!(!output.status.success());

    // The test's own authority is Connect's: what it signs chains to Consul's roots.
    let ours = consul.connect_ca().unwrap();
    assert!(consul.root_pem().unwrap().contains(ours.pem().trim()));
    let uri = consul.spiffe("cart").unwrap();
    ours.sign(&Leaf::spiffe(&uri).unwrap().expired()).unwrap();
    consul.leaf(None, "cart").unwrap();

    let consul = Consul::start_with(Setup {
        unix: true,
        ..Setup::default()
    })
    .unwrap();
    assert!(consul.address().starts_with("unix:///"));
    consul.allow("shop", "cart").unwrap();
    let all = consul.get("/v1/connect/intentions").unwrap();
    assert_eq!(all[0]["Action"], "allow");
}

//! Native services and those behind somebody else's proxy, Consul's built-in one and Envoy, both ways.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::Duration;

use meshx_tests::consul::{Consul, Service};
use meshx_tests::control::Control;
use meshx_tests::envoy::Envoy;
use meshx_tests::{Agent, BeamBuilder, EchoClient, EchoServer, Process, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// A denial cuts within 2 s; three times that here.
const CUT: Duration = Duration::from_secs(6);

/// Who stands before the foreign service.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Proxy {
    BuiltIn,
    Envoy,
}

fn at(consul: &Consul, port: u16) -> SocketAddr {
    (consul.ip(), port).into()
}

/// Address and port where Consul has a native instance.
fn registered(consul: &Consul, service: &str) -> SocketAddr {
    let all = consul
        .get(&format!("/v1/health/connect/{service}?passing"))
        .unwrap();
    let entry = &all[0]["Service"];
    format!("{}:{}", entry["Address"].as_str().unwrap(), entry["Port"])
        .parse()
        .unwrap()
}

/// An agent whose instances have ports of their own: the built-in proxy sends no SNI.
fn agent(consul: &Consul, name: &str, host: &str, ports: &str) -> Agent {
    let ip = consul.ip().to_string();
    let options = ["--instance-ports", ports];
    consul.agent_with(name, &ip, &[host], &options, None).unwrap()
}

/// The service `legacy` at `application`, which reaches `native` at port 20_001 of Consul's address, behind a proxy.
fn foreign(consul: &Consul, proxy: Proxy, application: SocketAddr, native: &str) -> Process {
    let (inbound, upstream) = (at(consul, 20_000), at(consul, 20_001));
    let service = Service::new("legacy", application, inbound).upstream(native, upstream);
    consul.register(&service).unwrap();
    match proxy {
        Proxy::BuiltIn => consul.connect_proxy("legacy", None).unwrap(),
        Proxy::Envoy => {
            let allowed = [consul.spiffe("shop").unwrap()];
            let envoy = Envoy::new(consul, "legacy")
                .unwrap()
                .inbound(inbound, application, &allowed);
            let remote = registered(consul, native);
            envoy
                .upstream(native, &consul.spiffe(native).unwrap(), upstream, remote)
                .start(consul)
                .unwrap()
        }
    }
}

fn plain_bytes_go_both_ways(proxy: Proxy) {
    let consul = Consul::start().unwrap();
    let agent = agent(&consul, "a", "h1", "21000-21049");
    let (native, legacy) = (
        EchoServer::start(consul.ip()).unwrap(),
        EchoServer::start(consul.ip()).unwrap(),
    );
    let control = Control::connect(&agent).unwrap();
    control.serve("native", native.address(), vec![]).unwrap();
    let _proxy = foreign(&consul, proxy, legacy.address(), "native");

    let there = control.reach("legacy", "shop", vec![]).unwrap();
    let mut there_client = EchoClient::connect_within(there, SOON).unwrap();
    there_client.say(&[1; 3_000_000]).unwrap();
    let mut back_client = EchoClient::connect_within(at(&consul, 20_001), SOON).unwrap();
    back_client.say(&[2; 3_000_000]).unwrap();
    let native_answered = native.answered();
    assert!(native_answered > 0 && legacy.answered() > 0);

    // Intentions hold for both, for new connections and for the agent's live ones. A rule for one direction
    // changes nothing in the other.
    consul.deny("legacy", "native").unwrap();
    let took = back_client.wait_end(CUT).unwrap();
    println!("{proxy:?} to native: cut {took:?} after the denial");
    EchoClient::connect(at(&consul, 20_001), SOON).unwrap_err();
    agent.process.wait_log("intention_denied", SOON).unwrap();
    assert_eq!(native.answered(), native_answered);
    there_client.say(b"still here").unwrap();
    consul.deny("shop", "legacy").unwrap();
    let took = there_client.wait_end(CUT).unwrap();
    println!("native to {proxy:?}: cut {took:?} after the denial");
    if proxy == Proxy::BuiltIn {
        // The test's Envoy knows the rules of its start only, and who is dialled decides: the built-in proxy by Consul's
        // own copy of the rules, which may follow a moment later.
        wait_until(SOON, || {
            let before = legacy.answered();
            EchoClient::connect(there, SOON).is_err() && legacy.answered() == before
        })
        .unwrap();
    }
}

#[test]
fn plain_bytes_with_the_built_in_proxy() {
    plain_bytes_go_both_ways(Proxy::BuiltIn);
}

#[test]
fn plain_bytes_with_envoy() {
    plain_bytes_go_both_ways(Proxy::Envoy);
}

fn calls_go_both_ways(proxy: Proxy) {
    let consul = Consul::start().unwrap();
    let agent = agent(&consul, "a", "h1", "21000-21049");
    let mut cart = BeamBuilder::new("cart@h1").app("shop").start(&agent).unwrap();
    consul.wait_passing("cart-rpc", 1, SOON).unwrap();
    // A server that knows no mesh, behind the proxy, in a VM of its own name.
    let mut shop = BeamBuilder::new("shop@h1").start(&agent).unwrap();
    let application = at(&consul, 20_002);
    let ip = consul.ip().octets().map(|byte| byte.to_string()).join(", ");
    shop.eval(&format!(
        "defmodule Legacy do use MeshxRpc.Server, address: {{:tcp, {{{ip}}}, 20002}}; def twice(x), do: 2 * x end"
    ))
    .unwrap();
    shop.expect(
        "Supervisor.start_link([Legacy], strategy: :one_for_one) |> elem(0)",
        ":ok",
    )
    .unwrap();
    let _proxy = foreign(&consul, proxy, application, "cart-rpc");

    shop.eval(
        "defmodule ThroughMesh do use MeshxRpc.Client, mesh: [adapter: Meshx.Agent, service: \"legacy\"], \
         retry_hsk_fail: 200, retry_proxy_fail: 200 end; \
         Supervisor.start_link([ThroughMesh], strategy: :one_for_one) |> elem(0)",
    )
    .unwrap();
    // The proxy may have no certificate yet, and what cannot have run is tried again as often as is asked for.
    shop.expect("ThroughMesh.call(:twice, 21, 30_000, 250)", "42")
        .unwrap();
    shop.eval(&format!(
        "defmodule ThroughProxy do use MeshxRpc.Client, address: {{:tcp, {{{ip}}}, 20001}}, \
         cks_mfa: {{MeshxRpc.Protocol.Default, :checksum, []}}, retry_hsk_fail: 200, retry_proxy_fail: 200 end; \
         Supervisor.start_link([ThroughProxy], strategy: :one_for_one) |> elem(0)"
    ))
    .unwrap();
    shop.expect("ThroughProxy.call(:total, [{\"lamp\", 2}], 30_000, 250)", "3998")
        .unwrap();
    shop.eval("blob = :crypto.strong_rand_bytes(8 * 1024 * 1024); :made")
        .unwrap();
    shop.expect("ThroughProxy.call(:echo, blob, 30_000) == blob", "true")
        .unwrap();
    cart.expect("node()", ":cart@h1").unwrap();
}

#[test]
fn calls_with_the_built_in_proxy() {
    calls_go_both_ways(Proxy::BuiltIn);
}

#[test]
fn calls_with_envoy() {
    calls_go_both_ways(Proxy::Envoy);
}

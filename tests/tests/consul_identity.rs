//! Certificates that must not be believed, at either end of a connection: each is refused with its own cause.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::Duration;

use meshx_tests::consul::{Authority, Consul, Leaf, Setup};
use meshx_tests::control::Control;
use meshx_tests::tls::{self, Pair};
use meshx_tests::{Agent, EchoClient, EchoServer};
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

/// A Consul whose Connect authority signs what the test wants, and one that nobody knows.
struct World {
    consul: Consul,
    stranger: Authority,
}

impl World {
    fn new() -> Self {
        let setup = Setup {
            own_connect_ca: true,
            ..Setup::default()
        };
        Self {
            consul: Consul::start_with(setup).unwrap(),
            stranger: Authority::new("stranger").unwrap(),
        }
    }

    /// What is wrong with a certificate of `service`, and the cause that it should be refused with.
    fn bad(&self, service: &str) -> Vec<(&'static str, Pair)> {
        let ca = self.consul.connect_ca().unwrap();
        let right = self.consul.spiffe(service).unwrap();
        let foreign =
            format!("spiffe://00000000-1111-2222-3333-444444444444.consul/ns/default/dc/dc1/svc/{service}");
        let leaf = |uri: &str| Leaf::spiffe(uri).unwrap();
        vec![
            ("unknown_authority", self.stranger.sign(&leaf(&right)).unwrap()),
            ("wrong_trust_domain", ca.sign(&leaf(&foreign)).unwrap()),
            ("certificate_expired", ca.sign(&leaf(&right).expired()).unwrap()),
            ("certificate_invalid", ca.sign(&Leaf::client()).unwrap()),
        ]
    }
}

/// How often this agent has refused with this cause.
fn refusals(agent: &Agent, cause: &str) -> u64 {
    let label = format!("cause=\"{cause}\"");
    let metrics = agent.metrics().unwrap();
    metrics
        .lines()
        .filter(|line| line.starts_with("meshx_refusals_total{") && line.contains(&label))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64)
        .sum()
}

/// `refused` must end with this cause in the agent's log and figures.
fn seen(agent: &Agent, cause: &str, refused: impl FnOnce()) {
    let before = refusals(agent, cause);
    let logged = agent.process.log().matches(cause).count();
    refused();
    agent
        .process
        .wait_log_count(cause, logged + 1, SOON)
        .unwrap_or_else(|e| panic!("{cause}: {e}"));
    assert_eq!(refusals(agent, cause), before + 1, "{cause} in the figures");
}

/// docs/mesh-protocol.md, "Between agents": purpose tcp, any instance, no node.
fn request(service: &str) -> Vec<u8> {
    let str16 = |text: &str| {
        [
            &u16::try_from(text.len()).unwrap().to_be_bytes()[..],
            text.as_bytes(),
        ]
        .concat()
    };
    let body = [&[1, 3][..], &[7; 16], &str16(service), &str16(""), &str16("")].concat();
    [&u16::try_from(body.len()).unwrap().to_be_bytes()[..], &body].concat()
}

#[test]
fn a_caller() {
    let world = World::new();
    let consul = &world.consul;
    let agent = consul
        .agent_with("b", "127.0.0.3", &["h2"], &METRICS, None)
        .unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let server = Control::connect(&agent).unwrap();
    server.serve("echo", echo.address(), vec![]).unwrap();
    let inbound: SocketAddr = agent.inbound().parse().unwrap();
    let name = format!("echo.default.dc1.internal.{}", consul.trust_domain().unwrap());

    // The right one goes through, both ways of speaking.
    let leaf = consul.leaf(None, "shop").unwrap();
    let right = (leaf.certificate, leaf.key);
    let mut plain = tls::dial(inbound, &name, &[], Some(&right)).unwrap();
    assert_eq!(tls::exchange(&mut plain, b"hello").unwrap(), b"hello");
    let mut ours = tls::dial(inbound, &name, &["meshx/1"], Some(&right)).unwrap();
    std::io::Write::write_all(&mut ours, &request("echo")).unwrap();
    // length, version, status ok, no cause, no text
    let mut reply = [0; 7];
    std::io::Read::read_exact(&mut ours, &mut reply).unwrap();
    assert_eq!(reply, [0, 5, 1, 0, 0, 0, 0]);
    assert_eq!(tls::exchange(&mut ours, b"hello").unwrap(), b"hello");
    drop((plain, ours));
    let answered = echo.answered();

    for alpn in [&[][..], &["meshx/1"]] {
        let hello = if alpn.is_empty() {
            b"hello".to_vec()
        } else {
            request("echo")
        };
        seen(&agent, "no_certificate", || {
            let mut stream = tls::dial(inbound, &name, alpn, None).unwrap();
            tls::exchange(&mut stream, &hello).unwrap_err();
        });
        for (cause, pair) in world.bad("shop") {
            seen(&agent, cause, || {
                let mut stream = tls::dial(inbound, &name, alpn, Some(&pair)).unwrap();
                // TLS itself refuses what no root stands for; what the name says is refused in the reply, when there is one.
                if let Ok(reply) = tls::exchange(&mut stream, &hello) {
                    assert_eq!((alpn, reply[3]), (&["meshx/1"][..], 1), "{cause}: accepted");
                }
            });
        }
    }
    assert_eq!(echo.answered(), answered, "somebody got through to the service");
}

#[test]
fn a_server() {
    let world = World::new();
    let consul = &world.consul;
    let agent = consul
        .agent_with("a", "127.0.0.2", &["h1"], &METRICS, None)
        .unwrap();
    let client = Control::connect(&agent).unwrap();
    let serve = |service: &str, pair: &Pair| {
        let address = tls::echo_server(consul.ip(), pair).unwrap();
        let entry = json!({
            "Name": service, "Address": address.ip(), "Port": address.port(), "Connect": {"Native": true},
        });
        consul.put("/v1/agent/service/register", &entry).unwrap();
        consul.wait_passing(service, 1, SOON).unwrap();
        client.reach(service, "shop", vec![]).unwrap()
    };

    let leaf = consul.leaf(None, "right").unwrap();
    let right = serve("right", &(leaf.certificate.clone(), leaf.key.clone()));
    EchoClient::connect_within(right, SOON).unwrap();

    let causes = [
        "unknown_authority",
        "wrong_trust_domain",
        "certificate_expired",
        "certificate_invalid",
    ];
    for cause in causes {
        let service = format!("bad-{}", cause.replace('_', "-"));
        let (_, pair) = world
            .bad(&service)
            .into_iter()
            .find(|(known, _)| *known == cause)
            .unwrap();
        let local = serve(&service, &pair);
        seen(&agent, cause, || {
            EchoClient::connect(local, SOON).unwrap_err();
        });
    }
    // A good certificate, but of another service: whoever has it must not pass for all others.
    let local = serve("other", &(leaf.certificate, leaf.key));
    seen(&agent, "wrong_service", || {
        EchoClient::connect(local, SOON).unwrap_err();
    });
}

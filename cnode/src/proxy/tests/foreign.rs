//! Proxies of another make dial in: the service's own bytes inside mutual TLS, and the same checks.
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificates::{BadLeaf, Forger, Nobody, ask, bad_leaves, only_tls12, request};
use super::services::tcp;
use super::*;
use crate::mesh::Identity;

/// A client as the built-in proxy is one: `h2` by ALPN and no SNI.
fn built_in(identity: &Identity, target: SpiffeId) -> ClientConfig {
    let mut config = (*tls::client_config(identity, target, Protocol::Connect).unwrap()).clone();
    config.enable_sni = false;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

async fn dial(address: SocketAddr, config: ClientConfig, name: String) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(name).unwrap();
    soon("a handshake", connector.connect(name, stream)).await
}

/// As the built-in proxy beside a `service`, to a port of a host.
async fn foreign(
    host: &Host,
    address: SocketAddr,
    leaf: &Identity,
    target: &str,
) -> io::Result<TlsStream<TcpStream>> {
    let target = host.spiffe(target);
    dial(address, built_in(leaf, target.clone()), target.server_name()).await
}

async fn hears(stream: &mut (impl AsyncRead + Unpin), wanted: &[u8]) {
    let mut seen = vec![0; wanted.len()];
    soon("bytes", stream.read_exact(&mut seen)).await.unwrap();
    assert_eq!(seen, wanted);
}

#[tokio::test]
async fn the_bytes_of_a_foreign_client_reach_the_service_as_they_are() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    tcp(&h2, "echo-a").await;
    let (leaf, target) = (h2.identity("web").await, h2.spiffe("echo"));
    let plain = |sni: bool| {
        let mut config = built_in(&leaf, target.clone());
        config.enable_sni = sni;
        config.alpn_protocols.clear();
        config
    };
    let clients = [
        ("the built-in proxy", built_in(&leaf, target.clone())),
        ("a name by SNI", plain(true)),
        ("no name", plain(false)),
        ("Envoy", only_tls12(&leaf)),
    ];
    for (what, config) in clients {
        let mut stream = dial(h2.address, config, target.server_name())
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        // Not a byte is for the agent.
        stream.write_all(b"\x00\x02hello").await.unwrap();
        hears(&mut stream, b"echo-a\x00\x02hello").await;
        let link = h2.links.snapshot().remove(0);
        assert_eq!(
            (link.info.direction, link.info.purpose, link.info.verified),
            (Direction::Inbound, Purpose::Tcp, true),
            "{what}"
        );
        assert_eq!(
            (link.info.local.as_str(), link.info.remote.as_str()),
            ("echo-a", "web")
        );
        assert_eq!(link.info.remote_spiffe, h2.spiffe("web"));
        assert!(link.info.remote_not_after().unwrap() > unix_now());
        assert_eq!((link.bytes_in, link.bytes_out), (7, 13));
        stream.shutdown().await.unwrap();
        assert!(rest(&mut stream).await.is_empty());
        until("no links", || h2.links.snapshot().is_empty()).await;
    }
    assert_eq!(h2.all_refusals(), 0);
}

#[tokio::test]
async fn a_foreign_client_is_held_against_the_rules_before_and_after() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    h2.service("echo-a", "echo", Endpoint::Tcp(listener.local_addr().unwrap()))
        .await;
    let leaf = h2.identity("web").await;
    // One direction counts.
    world.rule("echo", "web", Action::Deny);
    let mut stream = foreign(&h2, h2.address, &leaf, "echo").await.unwrap();
    let (mut near, _) = soon("the service's side", listener.accept()).await.unwrap();
    near.write_all(b"x").await.unwrap();
    hears(&mut stream, b"x").await;

    world.rule("web", "echo", Action::Deny);
    assert_eq!(h2.proxy.reauthorize().await, 1);
    assert!(rest(&mut stream).await.is_empty());
    let mut stream = foreign(&h2, h2.address, &leaf, "echo").await.unwrap();
    assert!(rest(&mut stream).await.is_empty(), "closed without a word");
    assert_eq!(h2.refusals(Cause::IntentionDenied), 1);
    let refusal = h2.links.refusal_of_target("echo-a").unwrap().refusal;
    assert!(refusal.text.contains("web -> echo is denied"), "{refusal}");

    // The next that the service hears of is one that is allowed; it ends with the registration.
    world.rule("web", "echo", Action::Allow);
    let mut stream = foreign(&h2, h2.address, &leaf, "echo").await.unwrap();
    stream.write_all(b"allowed").await.unwrap();
    let (mut near, _) = soon("the service's side", listener.accept()).await.unwrap();
    hears(&mut near, b"allowed").await;
    assert_eq!(h2.links.cut_instance("echo-a", Cause::NoSuchService, "gone"), 1);
    assert!(rest(&mut stream).await.is_empty());
}

#[tokio::test]
async fn a_foreign_client_must_prove_one_service_of_this_mesh() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    h2.service("echo-a", "echo", Endpoint::Tcp(listener.local_addr().unwrap()))
        .await;
    for BadLeaf {
        what, leaf, cause, ..
    } in bad_leaves(&world, &h2, "web").await
    {
        let before = h2.refusals(cause);
        let mut stream = foreign(&h2, h2.address, &leaf, "echo")
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(rest(&mut stream).await.is_empty(), "{what}");
        until(what, || h2.refusals(cause) == before + 1).await;
    }
    let good = h2.identity("web").await;
    let mut anonymous = built_in(&good, h2.spiffe("echo"));
    anonymous.client_auth_cert_resolver = Arc::new(Nobody);
    let mut stream = dial(h2.address, anonymous, h2.spiffe("echo").server_name())
        .await
        .unwrap();
    assert!(rest(&mut stream).await.is_empty());
    until("the log", || h2.refusals(Cause::NoCertificate) == 1).await;
    // Who is refused by TLS 1.2 hears of it inside the handshake.
    let stranger = Forger::stranger(&h2)
        .await
        .leaf(&h2, &[h2.spiffe("web").to_string()], 60);
    let before = h2.refusals(Cause::UnknownAuthority);
    let error = dial(h2.address, only_tls12(&stranger), h2.spiffe("echo").server_name())
        .await
        .unwrap_err();
    assert_eq!(tls::refusal(&error).cause, Cause::UnknownAuthority, "{error}");
    until("the log", || h2.refusals(Cause::UnknownAuthority) == before + 1).await;
    assert!(h2.links.snapshot().is_empty());
    // The service heard of none of them.
    let mut stream = foreign(&h2, h2.address, &good, "echo").await.unwrap();
    stream.write_all(b"good").await.unwrap();
    let (mut near, _) = soon("the service's side", listener.accept()).await.unwrap();
    hears(&mut near, b"good").await;
}

#[tokio::test]
async fn a_port_of_its_own_leads_to_one_instance() {
    let world = World::new();
    let mut h2 = world.host("h2", "127.0.0.3").await;
    tcp(&h2, "echo-a").await;
    let cart = h2.node("cart@h2").await;
    let leaf = h2.identity("web").await;
    // Two services, and none is named.
    foreign(&h2, h2.address, &leaf, "echo").await.unwrap_err();
    until("the log", || h2.refusals(Cause::NoSuchService) == 1).await;

    tcp(&h2, "echo-b").await;
    let port = h2.port_of("echo-b").await;
    for _ in 0..8 {
        let mut stream = foreign(&h2, port, &leaf, "echo").await.unwrap();
        hears(&mut stream, b"echo-b").await;
    }
    // Another service is not reached there, by SNI or by request.
    let mut named = built_in(&leaf, h2.spiffe("cart"));
    named.enable_sni = true;
    dial(port, named.clone(), h2.spiffe("cart").server_name())
        .await
        .unwrap_err();
    until("the log", || h2.refusals(Cause::NoSuchService) == 2).await;
    let agent = (*tls::client_config(&leaf, h2.spiffe("echo"), Protocol::Meshx).unwrap()).clone();
    for (instance, wanted) in [
        ("echo-b", Ok(())),
        ("", Ok(())),
        ("echo-a", Err(Cause::NoSuchService)),
    ] {
        let mut stream = dial(port, agent.clone(), h2.spiffe("echo").server_name())
            .await
            .unwrap();
        let asked = request(Purpose::Rpc, "echo", instance, "");
        let reply = ask(&mut stream, &asked).await.unwrap();
        assert_eq!(reply.map_err(|refusal| refusal.cause), wanted, "{instance}");
        if wanted.is_ok() {
            hears(&mut stream, b"echo-b").await;
        }
    }
    // A node has one, too, and an end.
    let port = h2.port_of("cart@h2").await;
    let h1 = world.host("h1", "127.0.0.2").await;
    let _shop = h1.node("shop@h1").await;
    let shop = h1.identity("shop").await;
    let mut stream = foreign(&h2, port, &shop, "cart").await.unwrap();
    stream.write_all(&name_message("shop@h1")).await.unwrap();
    let (accept, name, _near) = cart.accept().await;
    assert_eq!(
        (accept.remote_node.as_str(), name.as_str()),
        ("shop@h1", "shop@h1")
    );
    h2.local.remove("cart@h2");
    let before = h2.refusals(Cause::NoSuchService);
    foreign(&h2, port, &shop, "cart").await.unwrap_err();
    until("the log", || h2.refusals(Cause::NoSuchService) == before + 1).await;
}

#[tokio::test]
async fn any_instance_here_that_answers_gets_a_foreign_client() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    let leaf = h2.identity("web").await;
    // Nobody listens there, and nobody else will.
    let closed = [(); 2].map(|()| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket
    });
    for (id, gone) in ["echo-x", "echo-y"].into_iter().zip(&closed) {
        h2.service(id, "echo", Endpoint::Tcp(gone.local_addr().unwrap()))
            .await;
    }
    let mut stream = foreign(&h2, h2.address, &leaf, "echo").await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::Unreachable), 1);
    tcp(&h2, "echo-a").await;
    for _ in 0..8 {
        let mut stream = foreign(&h2, h2.address, &leaf, "echo").await.unwrap();
        hears(&mut stream, b"echo-a").await;
    }
}

#[tokio::test]
async fn a_foreign_client_must_be_the_node_that_it_names() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (_shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let h3 = world.host("h3", "127.0.0.4").await;
    let _far = h3.node("search@h3").await;
    let leaf = h1.identity("shop").await;

    let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
    stream.write_all(&name_message("shop@h1")).await.unwrap();
    stream.write_all(b"and on").await.unwrap();
    let (accept, name, mut near) = cart.accept().await;
    assert_eq!(
        (accept.remote_node.as_str(), name.as_str()),
        ("shop@h1", "shop@h1")
    );
    assert_eq!(accept.remote_spiffe, h1.spiffe("shop").to_string());
    hears(&mut near, b"and on").await;
    let link = h2.links.get(accept.link).unwrap();
    assert_eq!(
        (link.info.purpose, link.info.remote.as_str(), link.info.verified),
        (Purpose::Dist, "shop@h1", true)
    );
    drop((stream, near));
    until("no links", || h2.links.snapshot().is_empty()).await;

    let domain = h1.mesh.trust_domain();
    let elsewhere = [format!("spiffe://{domain}/ns/default/dc/dc2/svc/shop")];
    let elsewhere = Forger::of_mesh(&world, &h1).await.leaf(&h1, &elsewhere, 60);
    let own = h2.identity("cart").await;
    // A certificate of another service, an unknown node, a node of this agent, another data centre.
    let cases: [(&Identity, &str); 4] = [
        (&leaf, "search@h3"),
        (&leaf, "shop@h7"),
        (&own, "cart@h2"),
        (&elsewhere, "shop@h1"),
    ];
    for (i, (leaf, name)) in cases.into_iter().enumerate() {
        let mut stream = foreign(&h2, h2.address, leaf, "cart").await.unwrap();
        stream.write_all(&name_message(name)).await.unwrap();
        assert!(rest(&mut stream).await.is_empty(), "{name}");
        assert_eq!(h2.refusals(Cause::IdentityMismatch), i as u64 + 1, "{name}");
    }
    // Whoever wants to be given a name (DFLAG_NAME_ME) says only his host.
    let mut nameless = name_message("h1");
    nameless[6] |= 2;
    let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
    stream.write_all(&nameless).await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::IdentityMismatch), 5);
    // Both directions count, before and after.
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        world.rule(source, destination, Action::Deny);
        let before = h2.refusals(Cause::IntentionDenied);
        let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
        stream.write_all(&name_message("shop@h1")).await.unwrap();
        assert!(rest(&mut stream).await.is_empty());
        assert_eq!(h2.refusals(Cause::IntentionDenied), before + 1);
        world.rule(source, destination, Action::Allow);
        let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
        stream.write_all(&name_message("shop@h1")).await.unwrap();
        let _near = cart.accept().await;
        world.rule(source, destination, Action::Deny);
        assert_eq!(h2.proxy.reauthorize().await, 1);
        assert!(rest(&mut stream).await.is_empty());
        world.rule(source, destination, Action::Allow);
    }
    // What is no name message.
    let nonsense = name_message("nonsense");
    for bytes in [&b"\x00\x07Xabcdef"[..], b"\xff\xffN", b"PING\r\n", &nonsense] {
        let before = h2.refusals(Cause::InvalidRequest);
        let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert!(rest(&mut stream).await.is_empty());
        assert_eq!(h2.refusals(Cause::InvalidRequest), before + 1, "{bytes:?}");
    }
    // Who only looks whether somebody answers (`meshx why` of another agent) is no refusal.
    let before = h2.all_refusals();
    let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.all_refusals(), before);
    // Two nodes of one service, and none was named.
    let _second = h2.node("cart@h2-b").await;
    let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::NoSuchNode), 1);
    assert!(h2.links.snapshot().is_empty());
    let nothing = tokio::time::timeout(Duration::ZERO, cart.listener.accept()).await;
    assert!(nothing.is_err(), "the node heard of no refused one");
}

#[tokio::test]
async fn a_silent_foreign_client_of_a_node_is_given_up() {
    let world = World::new();
    // The handshake has its time.
    let hasty = Settings {
        frame_timeout: hasty().frame_timeout,
        ..settings()
    };
    let h2 = world.host_with("h2", "127.0.0.3", hasty).await;
    let _cart = h2.node("cart@h2").await;
    let leaf = h2.identity("shop").await;
    let mut stream = foreign(&h2, h2.address, &leaf, "cart").await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::Timeout), 1);
}

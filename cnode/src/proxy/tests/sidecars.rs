//! Nodes behind sidecars of another make: nobody tells the agent who dials, and a sidecar can be the way out, too.
use futures::future::BoxFuture;

use super::services::{tcp, upstream};
use super::*;

pub(super) fn trusting() -> Settings {
    Settings {
        allow_unverified_peers: true,
        ..settings()
    }
}

/// The loopback port that the sidecar of a node hands connections to.
pub(super) async fn behind(host: &mut Host, node: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = host.proxy.clone().serve_unverified(listener, node.to_owned());
    host.tasks.push(tokio::spawn(serve).abort_handle());
    address
}

/// Comes through a sidecar and names itself.
pub(super) async fn come(port: SocketAddr, name: &str) -> TcpStream {
    let mut stream = TcpStream::connect(port).await.unwrap();
    stream.write_all(&name_message(name)).await.unwrap();
    stream
}

/// A proxy that carries bytes to `target`, as a pair of sidecars does.
async fn proxy(target: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut far = TcpStream::connect(target).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut far).await });
        }
    });
    address
}

#[derive(Debug)]
struct Ports {
    target: &'static str,
    port: SocketAddr,
}

impl SidecarUpstreams for Ports {
    fn port_for(&self, target: &ServiceName) -> BoxFuture<'_, Result<SocketAddr, Refusal>> {
        let known = target.as_ref() == self.target;
        let answer = known.then_some(self.port);
        let text = format!("the sidecar has no upstream for {target}");
        Box::pin(async move { answer.ok_or_else(|| Cause::NoSuchService.because(text)) })
    }
}

#[tokio::test]
async fn unverified_peers_are_refused_unless_they_are_allowed() {
    let world = World::new();
    let (h1, mut h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (_shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let port = behind(&mut h2, "cart@h2").await;
    let mut stream = come(port, "shop@h1").await;
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::IdentityMismatch), 1);
    let refusal = h2.links.refusal_of_target("cart@h2").unwrap().refusal;
    assert!(
        refusal.text.contains("shop@h1 came through the sidecar")
            && refusal.text.contains("allow_unverified_peers"),
        "{refusal}"
    );
    let of_listener = |at| {
        let refusals = h2.links.totals().refusals;
        refusals
            .iter()
            .filter(|(seen, ..)| *seen == at)
            .map(|(.., count)| count)
            .sum::<u64>()
    };
    assert_eq!(
        (of_listener(Listener::Unverified), of_listener(Listener::Inbound)),
        (1, 0)
    );
    let nothing = timeout(Duration::ZERO, cart.listener.accept()).await;
    assert!(nothing.is_err(), "the node heard nothing");
}

#[tokio::test]
async fn an_unverified_peer_is_marked_and_held_against_the_rules_by_its_name() {
    let world = World::new();
    let (h1, mut h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", trusting()).await,
    );
    let (_shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let port = behind(&mut h2, "cart@h2").await;
    let mut stream = come(port, "shop@h1").await;
    let (accept, name, mut near) = cart.accept().await;
    assert_eq!(
        (accept.remote_node.as_str(), name.as_str()),
        ("shop@h1", "shop@h1")
    );
    assert_eq!(accept.remote_spiffe, "", "nothing is proven");
    near.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    let link = h2.links.get(accept.link).unwrap().info;
    assert_eq!(
        (link.verified, link.direction, link.remote.as_str()),
        (false, Direction::Inbound, "shop@h1")
    );
    assert_eq!((link.remote_not_after(), link.local_not_after()), (None, None));
    drop((stream, near));

    // Who is in no catalogue, or here, is not taken at his word.
    for (i, name) in ["shop@h7", "cart@h2"].into_iter().enumerate() {
        let mut stream = come(port, name).await;
        assert!(rest(&mut stream).await.is_empty(), "{name}");
        assert_eq!(h2.refusals(Cause::IdentityMismatch), i as u64 + 1, "{name}");
    }
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        world.rule(source, destination, Action::Deny);
        let before = h2.refusals(Cause::IntentionDenied);
        let mut stream = come(port, "shop@h1").await;
        assert!(rest(&mut stream).await.is_empty());
        assert_eq!(h2.refusals(Cause::IntentionDenied), before + 1);
        world.rule(source, destination, Action::Allow);
        let mut stream = come(port, "shop@h1").await;
        let _near = cart.accept().await;
        world.rule(source, destination, Action::Deny);
        assert_eq!(h2.proxy.reauthorize().await, 1);
        assert!(rest(&mut stream).await.is_empty());
        world.rule(source, destination, Action::Allow);
    }
    // It ends with the registration, and none comes after.
    let mut stream = come(port, "shop@h1").await;
    let _near = cart.accept().await;
    h2.local.remove("cart@h2");
    h2.links.cut_instance("cart@h2", Cause::NoSuchNode, "gone");
    assert!(rest(&mut stream).await.is_empty());
    let mut stream = come(port, "shop@h1").await;
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(h2.refusals(Cause::NoSuchNode), 1);
}

#[tokio::test]
async fn garbage_silence_and_health_checks_behind_a_sidecar() {
    let world = World::new();
    let quick = Settings {
        allow_unverified_peers: true,
        ..hasty()
    };
    let mut h2 = world.host_with("h2", "127.0.0.3", quick).await;
    let _cart = h2.node("cart@h2").await;
    let port = behind(&mut h2, "cart@h2").await;
    // A check that connects and closes its side is no refusal: no log line every few seconds.
    let mut check = TcpStream::connect(port).await.unwrap();
    check.shutdown().await.unwrap();
    assert!(rest(&mut check).await.is_empty());
    assert_eq!(h2.all_refusals(), 0);
    for (bytes, cause) in [
        (&b""[..], Cause::Timeout),
        (b"\x00", Cause::Timeout),
        (b"GET / HTTP/1.1\r\n", Cause::InvalidRequest),
        (b"\xff\xffN", Cause::InvalidRequest),
    ] {
        let before = h2.refusals(cause);
        let mut stream = TcpStream::connect(port).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert!(rest(&mut stream).await.is_empty());
        assert_eq!(h2.refusals(cause), before + 1, "{bytes:?}");
    }
    // Services get what their sidecars have; there is nothing for the agent to look at.
    tcp(&h2, "echo-a").await;
    let port = behind(&mut h2, "echo-a").await;
    let mut stream = come(port, "shop@h1").await;
    assert!(rest(&mut stream).await.is_empty());
    assert!(h2.refusals(Cause::InvalidRequest) >= 3);
}

/// Whoever cannot be told from somebody else on this host is refused, whatever he says.
#[tokio::test]
async fn whose_process_comes_through_a_sidecar_must_be_known() {
    let world = World::new();
    let (h1, mut h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", trusting()).await,
    );
    let (_shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let port = behind(&mut h2, "cart@h2").await;
    // This runtime has one thread, so the agent sees it when it is gone already.
    let mut stream = std::net::TcpStream::connect(port).unwrap();
    std::io::Write::write_all(&mut stream, &name_message("shop@h1")).unwrap();
    drop(stream);
    until("the refusal", || h2.refusals(Cause::NotPermitted) == 1).await;
}

#[tokio::test]
async fn a_node_dials_through_its_own_sidecar() {
    let world = World::new();
    let (h1, mut h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", trusting()).await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let _search = h2.node("search@h2").await;
    let port = proxy(behind(&mut h2, "cart@h2").await).await;
    let sidecar = Arc::new(Ports { target: "cart", port });
    h1.change("shop@h1", |local| local.sidecar = Some(sidecar));

    let ((mut near, reply), (accept, _, mut far)) = soon("a link", async {
        tokio::join!(
            async {
                let (mut stream, reply) = shop.connect("cart@h2").await;
                stream.write_all(&name_message("shop@h1")).await.unwrap();
                (stream, reply)
            },
            cart.accept()
        )
    })
    .await;
    let ok = ConnectReply::Ok {
        remote_spiffe: String::new(),
        remote_agent: port.to_string(),
    };
    assert_eq!(reply, ok, "the proxy knows who is there, this agent does not");
    assert_eq!(accept.remote_spiffe, "");
    near.write_all(b"x").await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'x');
    let link = h1.links.snapshot().remove(0).info;
    assert_eq!(
        (link.direction, link.verified, link.remote.as_str()),
        (Direction::Outbound, false, "cart@h2")
    );
    assert_eq!(link.remote_spiffe, h1.spiffe("cart"));
    assert_eq!(h1.links.totals().dialled, Default::default(), "no TLS of ours");
    // It is policed at this end as well, and ends with the node.
    world.rule("cart", "shop", Action::Deny);
    assert_eq!(h1.proxy.reauthorize().await, 1);
    assert!(rest(&mut far).await.is_empty());
    assert_eq!(
        shop.dial("cart@h2").await.unwrap_err().cause,
        Cause::IntentionDenied
    );
    world.rule("cart", "shop", Action::Allow);

    // What the sidecar says is what the node hears; nothing goes another way.
    let refusal = shop.dial("search@h2").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::NoSuchService);
    assert!(refusal.text.contains("no upstream for search"), "{refusal}");
    let far = Arc::new(Ports {
        target: "cart",
        port: "192.0.2.1:1".parse().unwrap(),
    });
    h1.change("shop@h1", |local| local.sidecar = Some(far));
    let refusal = shop.dial("cart@h2").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::InvalidRequest);
    assert!(refusal.text.contains("on loopback"), "{refusal}");
}

/// Whose the port is can be told when its process accepts, and nothing is sent before.
#[tokio::test]
async fn a_port_that_nobody_answers_at_is_no_sidecar() {
    let world = World::new();
    let impatient = Settings {
        connect_timeout: Duration::from_millis(100),
        ..settings()
    };
    let (h1, h2) = (
        world.host_with("h1", "127.0.0.2", impatient).await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    // The kernel takes the connection.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap();
    let sidecar = Arc::new(Ports { target: "cart", port });
    h1.change("shop@h1", |local| local.sidecar = Some(sidecar));
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::Unreachable);
    let (mut taken, _) = listener.accept().await.unwrap();
    assert!(rest(&mut taken).await.is_empty());
}

#[tokio::test]
async fn an_upstream_can_go_by_a_sidecar() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (echo, _task) = tcp(&h2, "echo-a").await;
    h1.service("web-1", "web", Endpoint::Uds("/nowhere".into())).await;
    let via = |id: &str| Upstream {
        via: Some(id.to_owned()),
        ..upstream(&h1, None)
    };
    let call = |handle: UpstreamHandle| {
        let path = h1.dir.join("up.sock");
        async move {
            let mut stream = UnixStream::connect(path).await.unwrap();
            let _ = stream.shutdown().await;
            let heard = rest(&mut stream).await;
            drop(handle);
            heard
        }
    };
    assert!(call(h1.proxy.upstream(via("web-1")).unwrap()).await.is_empty());
    assert_eq!(h1.refusals(Cause::InvalidRequest), 1, "it has no sidecar");
    let port = proxy(echo).await;
    let sidecar = Arc::new(Ports { target: "echo", port });
    h1.service("mail-1", "mail", Endpoint::Uds("/nowhere".into()))
        .await;
    for id in ["web-1", "mail-1"] {
        h1.change(id, |local| local.sidecar = Some(sidecar.clone()));
    }
    for other in ["web-2", "mail-1"] {
        assert!(call(h1.proxy.upstream(via(other)).unwrap()).await.is_empty());
    }
    assert_eq!(
        h1.refusals(Cause::NoSuchService),
        2,
        "not an instance of the source"
    );

    let _handle = h1.proxy.upstream(via("web-1")).unwrap();
    let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
    let mut seen = [0; 6];
    stream.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"echo-a");
    let link = h1.links.snapshot().remove(0).info;
    assert_eq!((link.verified, link.remote.as_str()), (false, "echo"));
    assert_eq!(h1.links.cut_instance("web-1", Cause::NoSuchService, "gone"), 1);
    assert!(rest(&mut stream).await.is_empty());
}

//! Instances that a data plane of another make serves: dialled with mutual TLS and nothing of ours inside.
use rustls::server::Acceptor;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificates::{BadLeaf, Forger, bad_leaves};
use super::services::{greeting, upstream};
use super::*;
use crate::mesh::Identity;

/// A host without an agent of ours.
pub(super) struct Elsewhere {
    listener: TcpListener,
    mesh: EmbeddedMesh,
    address: SocketAddr,
}

impl Elsewhere {
    pub(super) async fn new(world: &World) -> Self {
        let listener = TcpListener::bind("127.0.0.5:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mesh = EmbeddedMesh::open(&world.mesh_dir(), "other", vec!["h9".to_owned()], address).unwrap();
        Self {
            listener,
            mesh,
            address,
        }
    }

    pub(super) async fn register(&self, id: &str, service: &str, protocol: Protocol) {
        let instance = Instance {
            id: id.to_owned(),
            service: service.parse().unwrap(),
            node: id.contains('@').then(|| id.to_owned()),
            agent: "other".to_owned(),
            address: self.address,
            protocol,
            meta: Default::default(),
        };
        self.mesh.register(&Entry::plain(instance)).await.unwrap();
    }

    /// Takes a connection; gives what the client asked for by SNI and ALPN.
    pub(super) async fn accept(
        &self,
        leaf: &Identity,
        protocol: Protocol,
    ) -> (Option<String>, bool, io::Result<TlsStream<TcpStream>>) {
        let (stream, _) = soon("a connection", self.listener.accept()).await.unwrap();
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream)
            .await
            .unwrap();
        let name = hello.client_hello().server_name().map(str::to_owned);
        let alpn = hello.client_hello().alpn().is_some();
        let config = tls::server_config(leaf, protocol).unwrap();
        (name, alpn, hello.into_stream(config).await)
    }
}

#[tokio::test]
async fn a_foreign_service_gets_the_callers_bytes_and_nothing_else() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let other = Elsewhere::new(&world).await;
    other.register("echo-9", "echo", Protocol::Connect).await;
    let leaf = h1.identity("echo").await;
    for purpose in [Purpose::Rpc, Purpose::Tcp] {
        let upstream = Upstream {
            purpose,
            ..upstream(&h1, None)
        };
        let handle = h1.proxy.upstream(upstream).unwrap();
        let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let (name, alpn, accepted) = other.accept(&leaf, Protocol::Connect).await;
        assert_eq!(name, Some(h1.spiffe("echo").server_name()));
        assert!(!alpn, "no name by ALPN");
        let mut accepted = accepted.unwrap();
        let shown = accepted.get_ref().1.peer_certificates().unwrap()[0].clone();
        assert_eq!(
            tls::Peer::of(std::slice::from_ref(&shown), h1.mesh.trust_domain())
                .unwrap()
                .id,
            h1.spiffe("web")
        );
        let mut seen = [0; 5];
        accepted.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"hello");
        accepted.write_all(b"back").await.unwrap();
        let mut seen = [0; 4];
        stream.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"back");
        let link = h1.links.snapshot().remove(0);
        assert_eq!(
            (link.info.direction, link.info.purpose, link.info.verified),
            (Direction::Outbound, purpose, true)
        );
        assert_eq!(link.info.remote_spiffe, h1.spiffe("echo"));
        assert_eq!((link.bytes_in, link.bytes_out), (4, 5));
        // The agent holds the rules against it as well, when they change.
        world.rule("web", "echo", Action::Deny);
        assert_eq!(h1.proxy.reauthorize().await, 1);
        assert!(rest(&mut accepted).await.is_empty());
        world.rule("web", "echo", Action::Allow);
        drop(handle);
    }
}

#[tokio::test]
async fn a_foreign_server_must_prove_exactly_the_service_that_was_dialled() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let (shop, other) = (h1.node("shop@h1").await, Elsewhere::new(&world).await);
    other.register("cart@h9", "cart", Protocol::Connect).await;
    let mut leaves = bad_leaves(&world, &h1, "cart").await;
    leaves.push(BadLeaf {
        what: "another service",
        leaf: Forger::of_mesh(&world, &h1)
            .await
            .leaf(&h1, &[h1.spiffe("cart-2").to_string()], 60),
        cause: Cause::WrongService,
        told: Cause::CertificateInvalid,
    });
    for BadLeaf {
        what,
        leaf,
        cause,
        told,
    } in leaves
    {
        let before = h1.refusals(cause);
        let (refusal, (_, _, accepted)) = soon(what, async {
            tokio::join!(shop.dial("cart@h9"), other.accept(&leaf, Protocol::Connect))
        })
        .await;
        assert_eq!(refusal.expect_err(what).cause, cause, "{what}");
        assert_eq!(h1.refusals(cause), before + 1, "{what}");
        let error = accepted.map(|_| ()).unwrap_err();
        assert_eq!(tls::refusal(&error).cause, told, "{what}: {error}");
    }
    assert!(h1.links.snapshot().is_empty());
}

#[tokio::test]
async fn a_node_behind_a_foreign_proxy_gets_the_name_message_first() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let (shop, other) = (h1.node("shop@h1").await, Elsewhere::new(&world).await);
    other.register("cart@h9", "cart", Protocol::Connect).await;
    let leaf = h1.identity("cart").await;
    let (dialled, (_, alpn, accepted)) = soon("a link", async {
        tokio::join!(shop.dial("cart@h9"), other.accept(&leaf, Protocol::Connect))
    })
    .await;
    let (mut dialled, mut accepted) = (dialled.unwrap(), accepted.unwrap());
    assert!(!alpn);
    let message = frame(&mut accepted).await.unwrap();
    assert_eq!(&message[15..], b"shop@h1");
    accepted.write_all(b"\x00\x03sok").await.unwrap();
    assert_eq!(frame(&mut dialled).await.unwrap(), b"sok");

    // The other side cannot be told from here whether the way back is denied: this agent asks before it dials.
    world.rule("cart", "shop", Action::Deny);
    assert_eq!(
        shop.dial("cart@h9").await.unwrap_err().cause,
        Cause::IntentionDenied
    );
    assert!(
        timeout(Duration::ZERO, other.listener.accept()).await.is_err(),
        "nobody was dialled"
    );
}

/// The catalogue says what is spoken, and nothing else is tried.
#[tokio::test]
async fn an_agent_is_not_taken_for_something_else() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let (shop, other) = (h1.node("shop@h1").await, Elsewhere::new(&world).await);
    other.register("cart@h9", "cart", Protocol::Meshx).await;
    let leaf = h1.identity("cart").await;
    // A server that names no protocol, and one that names another.
    let mut mute = (*tls::server_config(&leaf, Protocol::Connect).unwrap()).clone();
    for alpn in [vec![], vec![b"h2".to_vec()]] {
        mute.alpn_protocols = alpn;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(mute.clone()));
        let serve = async {
            let (stream, _) = other.listener.accept().await.unwrap();
            match acceptor.accept(stream).await {
                Ok(mut stream) => rest(&mut stream).await,
                Err(_) => Vec::new(),
            }
        };
        let (refusal, heard) = soon("a refusal", async { tokio::join!(shop.dial("cart@h9"), serve) }).await;
        assert_eq!(refusal.unwrap_err().cause, Cause::VersionMismatch);
        assert!(heard.is_empty(), "not a byte was sent");
    }
    assert_eq!(h1.refusals(Cause::VersionMismatch), 2);
}

/// A foreign server refuses when the handshake is done for the client (TLS 1.3), so it comes as the end of the link.
#[tokio::test]
async fn a_foreign_server_that_does_not_believe_us_is_a_refusal() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let other = Elsewhere::new(&world).await;
    other.register("echo-9", "echo", Protocol::Connect).await;
    let stranger = World::new();
    let roots = stranger
        .host("h1", "127.0.0.6")
        .await
        .identity("any")
        .await
        .roots
        .clone();
    let right = h1.identity("echo").await;
    let leaf = Identity {
        id: right.id.clone(),
        chain: right.chain.clone(),
        key: right.key.clone_key(),
        roots,
        not_after: 0,
    };
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let (heard, (_, _, accepted)) = soon("the end", async {
        tokio::join!(greeting(&h1), other.accept(&leaf, Protocol::Connect))
    })
    .await;
    assert!(heard.is_empty() && accepted.is_err());
    until("the log", || h1.refusals(Cause::UnknownAuthority) == 1).await;
    let refusal = h1.links.refusal_of_target("echo").unwrap().refusal;
    assert!(refusal.text.contains("UnknownCA"), "{refusal}");
}

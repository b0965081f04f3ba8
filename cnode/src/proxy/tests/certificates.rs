//! Certificates that must not be believed, at either end.
use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use time::{Duration as Span, OffsetDateTime};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::mesh::Identity;

/// Signs whatever it is asked to.
pub(super) struct Forger {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
}

impl Forger {
    /// With the key of the mesh.
    pub(super) async fn of_mesh(world: &World, host: &Host) -> Self {
        let read = |name: &str| std::fs::read_to_string(world.mesh_dir().join(name)).unwrap();
        let key = KeyPair::from_pem(&read("ca.key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).unwrap();
        Self {
            issuer,
            roots: host.identity("any").await.roots.clone(),
        }
    }

    /// With a key of its own, believing what the mesh believes.
    pub(super) async fn stranger(host: &Host) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self {
            issuer: Issuer::new(params, key),
            roots: host.identity("any").await.roots.clone(),
        }
    }

    /// With a key of its own and the name of the mesh's authority.
    async fn namesake(world: &World, host: &Host) -> Self {
        let pem = std::fs::read_to_string(world.mesh_dir().join("ca.pem")).unwrap();
        Self {
            issuer: Issuer::from_ca_cert_pem(&pem, KeyPair::generate().unwrap()).unwrap(),
            roots: host.identity("any").await.roots.clone(),
        }
    }

    /// That signs with this key and believes this root.
    pub(super) fn with(issuer: Issuer<'static, KeyPair>, root: &CertificateDer<'static>) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        Self {
            issuer,
            roots: Arc::new(roots),
        }
    }

    /// A leaf with these URIs that is valid until then, unix seconds.
    pub(super) fn leaf_until(&self, host: &Host, uris: &[String], until: i64) -> Identity {
        let now = OffsetDateTime::now_utc();
        let until = OffsetDateTime::from_unix_timestamp(until).unwrap();
        self.leaf_within(host, uris, now - Span::days(2), until)
    }

    /// A leaf with these URIs whose validity ends so many minutes from now.
    pub(super) fn leaf(&self, host: &Host, uris: &[String], minutes: i64) -> Identity {
        let now = OffsetDateTime::now_utc();
        self.leaf_within(host, uris, now - Span::days(2), now + Span::minutes(minutes))
    }

    fn leaf_within(
        &self,
        host: &Host,
        uris: &[String],
        not_before: OffsetDateTime,
        not_after: OffsetDateTime,
    ) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["shop".to_owned(), "cart".to_owned()]).unwrap();
        let uri = |uri: &String| SanType::URI(Ia5String::try_from(uri.as_str()).unwrap());
        params.subject_alt_names.extend(uris.iter().map(uri));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        (params.not_before, params.not_after) = (not_before, not_after);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Identity {
            id: host.spiffe("any"),
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            roots: self.roots.clone(),
            not_after: 0,
        }
    }
}

/// A leaf that proves nothing.
pub(super) struct BadLeaf {
    /// What is wrong with it.
    pub(super) what: &'static str,
    pub(super) leaf: Identity,
    /// The refusal of whoever sees it.
    pub(super) cause: Cause,
    /// What an alert tells of that to whoever showed it.
    pub(super) told: Cause,
}

/// Leaves of `service` that prove nothing.
pub(super) async fn bad_leaves(world: &World, host: &Host, service: &str) -> Vec<BadLeaf> {
    let mesh = Forger::of_mesh(world, host).await;
    let right = host.spiffe(service).to_string();
    let other = host.spiffe("other").to_string();
    let foreign = format!("spiffe://elsewhere.embedded/ns/default/dc/dc1/svc/{service}");
    let one = std::slice::from_ref(&right);
    let tomorrow = OffsetDateTime::now_utc() + Span::days(1);
    let bad = |what, leaf, cause, told| BadLeaf {
        what,
        leaf,
        cause,
        told,
    };
    let (unknown, expired, invalid) = (
        Cause::UnknownAuthority,
        Cause::CertificateExpired,
        Cause::CertificateInvalid,
    );
    let malformed = |what, uris: &[String]| bad(what, mesh.leaf(host, uris, 60), invalid, invalid);
    vec![
        bad(
            "another authority",
            Forger::stranger(host).await.leaf(host, one, 60),
            unknown,
            unknown,
        ),
        bad(
            "an authority of the same name",
            Forger::namesake(world, host).await.leaf(host, one, 60),
            unknown,
            unknown,
        ),
        bad("expired", mesh.leaf(host, one, -60), expired, expired),
        bad(
            "not valid yet",
            mesh.leaf_within(host, one, tomorrow, tomorrow + Span::days(1)),
            expired,
            expired,
        ),
        bad(
            "another trust domain",
            mesh.leaf(host, &[foreign], 60),
            Cause::WrongTrustDomain,
            invalid,
        ),
        malformed("two URIs", &[right.clone(), other]),
        malformed("the same URI twice", &[right.clone(), right.clone()]),
        malformed("no URI", &[]),
        malformed("no service", &["spiffe://x/y".to_owned()]),
        malformed("a longer path", &[format!("{right}/x")]),
    ]
}

/// A good leaf of the mesh.
pub(super) async fn leaf_of_mesh(world: &World, host: &Host, service: &str) -> Identity {
    let mesh = Forger::of_mesh(world, host).await;
    mesh.leaf(host, &[host.spiffe(service).to_string()], 60)
}

/// TLS with a host's inbound port, as whoever the identity says.
pub(super) async fn secure(
    host: &Host,
    identity: &Identity,
    service: &str,
) -> io::Result<TlsStream<TcpStream>> {
    secure_as(Protocol::Meshx, host, identity, service).await
}

/// As an agent, or as a data plane of another make.
pub(super) async fn secure_as(
    protocol: Protocol,
    host: &Host,
    identity: &Identity,
    service: &str,
) -> io::Result<TlsStream<TcpStream>> {
    let target = host.spiffe(service);
    let config = tls::client_config(identity, target.clone(), protocol).unwrap();
    handshake(host, config, target.server_name()).await
}

async fn handshake(host: &Host, config: Arc<ClientConfig>, name: String) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(host.address).await.unwrap();
    let name = ServerName::try_from(name).unwrap();
    soon("a handshake", TlsConnector::from(config).connect(name, stream)).await
}

pub(super) fn request(purpose: Purpose, service: &str, instance: &str, node: &str) -> Request {
    let (service, instance, node) = (service.to_owned(), instance.to_owned(), node.to_owned());
    let mut link = [0; 16];
    getrandom::fill(&mut link).unwrap();
    Request {
        asked: Asked::Link(purpose),
        link: LinkId(link),
        service,
        instance,
        node,
    }
}

/// Sends a request and reads the answer; an error when the other side ends TLS instead.
pub(super) async fn ask(
    stream: &mut TlsStream<TcpStream>,
    request: &Request,
) -> io::Result<Result<(), Refusal>> {
    let mut bytes = Vec::new();
    request.encode(&mut bytes);
    // The alert says more than a failed write.
    let _ = stream.write_all(&bytes).await;
    let _ = stream.flush().await;
    Ok(decode_reply(&frame(stream).await?).unwrap())
}

#[tokio::test]
async fn a_client_must_prove_one_service_of_this_mesh() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
    let leaves = bad_leaves(&world, &h1, "shop").await;
    for BadLeaf {
        what, leaf, cause, ..
    } in &leaves
    {
        let before = h2.refusals(*cause);
        let mut stream = secure(&h2, leaf, "cart")
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        // By the reply or by the alert, the client hears the same cause.
        match ask(&mut stream, &asked).await {
            Ok(reply) => assert_eq!(reply.expect_err(what).cause, *cause, "{what}"),
            Err(error) => assert_eq!(tls::refusal(&error).cause, *cause, "{what}: {error}"),
        }
        assert!(rest(&mut stream).await.is_empty(), "{what}");
        drop(stream);
        until(what, || h2.refusals(*cause) == before + 1).await;
    }
    assert_eq!(h2.all_refusals(), leaves.len() as u64);
    assert_eq!(h2.links.totals().accepted.failed, leaves.len() as u64);
    assert!(h2.links.snapshot().is_empty());
    // The same way with a leaf that holds.
    let good = Forger::of_mesh(&world, &h1)
        .await
        .leaf(&h1, &[h1.spiffe("shop").to_string()], 60);
    let mut stream = secure(&h2, &good, "cart").await.unwrap();
    assert_eq!(ask(&mut stream, &asked).await.unwrap(), Ok(()));
    drop(stream);
    let _ended = soon("the node's side", cart.listener.accept()).await.unwrap();
    shop.link(&cart).await;
}

#[derive(Debug)]
pub(super) struct Nobody;

impl ResolvesClientCert for Nobody {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that speaks TLS 1.2 and nothing newer, as Envoy does by default, and believes everybody.
pub(super) fn only_tls12(identity: &Identity) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous))
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .unwrap()
}

#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[tokio::test]
async fn a_client_needs_a_certificate_and_the_protocol() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    let _cart = h2.node("cart@h2").await;
    let target = h2.spiffe("cart");
    let config = |change: fn(&mut ClientConfig)| {
        let (h2, target) = (&h2, target.clone());
        async move {
            let mut config =
                (*tls::client_config(&*h2.identity("shop").await, target, Protocol::Meshx).unwrap()).clone();
            change(&mut config);
            Arc::new(config)
        }
    };
    let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");

    let anonymous = config(|config| config.client_auth_cert_resolver = Arc::new(Nobody)).await;
    let mut stream = handshake(&h2, anonymous, target.server_name()).await.unwrap();
    let error = ask(&mut stream, &asked).await.unwrap_err();
    assert_eq!(tls::refusal(&error).cause, Cause::NoCertificate, "{error}");
    until("the log", || h2.refusals(Cause::NoCertificate) == 1).await;

    let other = config(|config| config.alpn_protocols = vec![b"http/1.1".to_vec()]).await;
    let error = handshake(&h2, other, target.server_name()).await.unwrap_err();
    assert_eq!(tls::refusal(&error).cause, Cause::VersionMismatch, "{error}");
    until("the log", || h2.refusals(Cause::VersionMismatch) == 1).await;

    // An agent with an older TLS.
    let mut old = only_tls12(&*h2.identity("shop").await);
    old.alpn_protocols = vec![tls::ALPN.to_vec()];
    let error = handshake(&h2, Arc::new(old), target.server_name())
        .await
        .unwrap_err();
    assert_eq!(tls::refusal(&error).cause, Cause::VersionMismatch, "{error}");
    until("the log", || h2.refusals(Cause::VersionMismatch) == 2).await;

    // A service that is not here, and the right service in another trust domain.
    for name in [
        h2.spiffe("nobody").server_name(),
        "cart.default.dc1.internal.elsewhere.embedded".to_owned(),
    ] {
        let error = handshake(&h2, config(|_| ()).await, name).await.unwrap_err();
        assert_eq!(tls::refusal(&error).cause, Cause::Unreachable, "{error}");
    }
    until("the log", || h2.refusals(Cause::NoSuchService) == 2).await;
}

#[tokio::test]
async fn sessions_are_not_resumed() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (_shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    // A client that would gladly resume.
    let mut config = (*tls::client_config(&*h1.identity("shop").await, h2.spiffe("cart"), Protocol::Meshx)
        .unwrap())
    .clone();
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    config.enable_early_data = true;
    let config = Arc::new(config);
    for _ in 0..3 {
        let mut stream = handshake(&h2, config.clone(), h2.spiffe("cart").server_name())
            .await
            .unwrap();
        let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
        assert_eq!(ask(&mut stream, &asked).await.unwrap(), Ok(()));
        assert_eq!(
            stream.get_ref().1.handshake_kind(),
            Some(rustls::HandshakeKind::Full)
        );
        assert_eq!(
            stream.get_ref().1.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
    }
}

#[tokio::test]
async fn a_server_must_prove_exactly_the_service_that_was_dialled() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let shop = h1.node("shop@h1").await;
    // A thief that the catalogue leads to.
    let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let thief = EmbeddedMesh::open(&world.mesh_dir(), "thief", vec!["h9".to_owned()], address).unwrap();
    let instance = Instance {
        id: "cart@h9".to_owned(),
        service: ServiceName::new("cart").unwrap(),
        node: Some("cart@h9".to_owned()),
        agent: "thief".to_owned(),
        address,
        protocol: Protocol::Meshx,
        meta: Default::default(),
    };
    thief.register(&Entry::plain(instance.clone())).await.unwrap();

    let mut leaves = bad_leaves(&world, &h1, "cart").await;
    let forger = Forger::of_mesh(&world, &h1).await;
    for other in ["shop", "cart-2", "car"] {
        leaves.push(BadLeaf {
            what: "another service",
            leaf: forger.leaf(&h1, &[h1.spiffe(other).to_string()], 60),
            cause: Cause::WrongService,
            told: Cause::CertificateInvalid,
        });
    }
    for BadLeaf {
        what,
        leaf,
        cause,
        told,
    } in &leaves
    {
        let before = h1.refusals(*cause);
        let acceptor = TlsAcceptor::from(tls::server_config(leaf, Protocol::Meshx).unwrap());
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            let error = acceptor.accept(stream).await.map(|_| ()).unwrap_err();
            assert_eq!(tls::refusal(&error).cause, *told, "{what}: no request may follow");
        };
        let (refusal, ()) = soon(what, async { tokio::join!(shop.dial("cart@h9"), serve) }).await;
        assert_eq!(refusal.expect_err(what).cause, *cause, "{what}");
        assert_eq!(h1.refusals(*cause), before + 1, "{what}");
    }
    assert_eq!(h1.links.totals().dialled.failed, leaves.len() as u64);

    // Only the right one gets a request.
    let right = forger.leaf(&h1, &[h1.spiffe("cart").to_string()], 60);
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(tls::server_config(&right, Protocol::Meshx).unwrap())
            .accept(stream)
            .await
            .unwrap();
        let asked = Request::decode(&frame(&mut stream).await.unwrap()).unwrap();
        let mut reply = Vec::new();
        encode_reply(&Err(Cause::Limit.because("full")), &mut reply);
        stream.write_all(&reply).await.unwrap();
        asked
    };
    let (refusal, asked) = soon("a request", async { tokio::join!(shop.dial("cart@h9"), serve) }).await;
    assert_eq!(
        (asked.instance.as_str(), asked.node.as_str()),
        ("cart@h9", "shop@h1")
    );
    let refusal = refusal.unwrap_err();
    assert_eq!(refusal.cause, Cause::Limit);
    assert!(
        refusal.text.ends_with("full"),
        "the other agent's words reach the caller: {refusal}"
    );
}

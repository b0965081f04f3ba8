//! Why a link would be refused: as the link itself is, step by step, and without a trace.
use super::*;
use crate::mesh::{
    Answer, Authorization, Catalogue, Decision, Diagnosis, Finding, Identity, Intentions, Listed, Token,
};
use crate::proxy::why::{Step, Why};

fn yes(_: &ServiceName) -> bool {
    true
}

fn no(_: &ServiceName) -> bool {
    false
}

fn whats(why: &Why) -> Vec<&'static str> {
    why.steps.iter().map(|step| step.what).collect()
}

/// The last step, which is the only no, and the refusal.
fn stopped(why: &Why) -> (&Step, &Refusal) {
    let (last, before) = why.steps.split_last().unwrap();
    assert!(!last.ok && before.iter().all(|step| step.ok), "{:?}", why.steps);
    let refusal = why.decision.as_ref().unwrap_err();
    assert_eq!(last.text, refusal.text);
    assert_ne!(last.fix, "", "{refusal}");
    (last, refusal)
}

async fn pair(world: &World) -> (Host, Host, Node, Node) {
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    (h1, h2, shop, cart)
}

#[tokio::test]
async fn every_step_of_a_good_link_is_shown_and_no_refusal_counted() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    let why = h1.proxy.why("shop@h1", "cart@h2", no).await;
    let wanted = [
        "source",
        "target",
        "rule",
        "certificate",
        "agent",
        "tls",
        "rule",
        "cookie",
    ];
    assert_eq!(whats(&why), wanted, "{why:?}");
    assert!(
        why.steps.iter().all(|step| step.ok && step.fix.is_empty()),
        "{why:?}"
    );
    let rules = why.decision.unwrap();
    assert!(
        rules.contains("cart -> shop") && rules.contains("shop -> cart"),
        "{rules}"
    );
    assert_eq!(
        h1.proxy.check("shop@h1", "cart@h2").await.unwrap().len(),
        rules.len()
    );

    // The other agent takes the probe for what it is, and serves on.
    shop.link(&cart).await;
    assert_eq!((h1.all_refusals(), h2.all_refusals()), (0, 0));
    assert!(h2.links.snapshot().len() <= 1, "no link was made by the question");

    // From where nobody would dial, the rest is told all the same.
    let why = h2.proxy.why("shop@h1", "cart@h2", yes).await;
    let wanted = ["source", "target", "rule", "agent", "rule", "endpoint", "cookie"];
    assert_eq!(whats(&why), wanted, "{why:?}");
    assert!(
        why.steps[3]
            .text
            .contains(&format!("the agent at {}", h1.address)),
        "{why:?}"
    );
}

#[tokio::test]
async fn each_no_is_the_one_that_a_link_gets() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        world.rule(source, destination, Action::Deny);
        let why = h1.proxy.why("shop@h1", "cart@h2", no).await;
        let (step, refusal) = stopped(&why);
        assert_eq!((step.what, refusal.cause), ("rule", Cause::IntentionDenied));
        assert_eq!(step.fix, format!("meshx allow {source} {destination}"));
        let of_link = shop.dial("cart@h2").await.unwrap_err();
        assert_eq!(of_link.cause, refusal.cause);
        // The other agent's words come with its address.
        assert!(of_link.text.ends_with(&refusal.text), "{of_link} / {refusal}");
        assert!(of_link.text.contains(&step.fix), "{of_link}");
        world.rule(source, destination, Action::Allow);
    }

    for (from, to, what, cause) in [
        ("shop@h1", "nobody@h2", "target", Cause::NoSuchNode),
        ("nobody@h1", "cart@h2", "source", Cause::NoSuchNode),
        ("shop@h1", "not a node@", "target", Cause::InvalidName),
        ("shop", "nobody", "target", Cause::NoSuchService),
        ("nobody", "cart", "source", Cause::NoSuchService),
        ("shop", "cart@h2", "target", Cause::InvalidRequest),
    ] {
        let why = h1.proxy.why(from, to, no).await;
        let (step, refusal) = stopped(&why);
        assert_eq!((step.what, refusal.cause), (what, cause), "{from} {to}");
    }
    let why = h1.proxy.why("shop", "cart", no).await;
    let (step, _) = stopped(&why);
    assert!(
        step.fix.contains("cart@h2"),
        "a service of nodes is none for RPC: {step:?}"
    );

    // The node is gone, and its agent does not know yet.
    drop(cart);
    let why = h2.proxy.why("shop@h1", "cart@h2", no).await;
    let (step, refusal) = stopped(&why);
    assert_eq!((step.what, refusal.cause), ("endpoint", Cause::Unreachable));
    std::fs::write(world.mesh_dir().join("rules.json"), "{").unwrap();
    let why = h1.proxy.why("shop@h1", "cart@h2", no).await;
    assert_eq!(stopped(&why).1.cause, Cause::NotReady);
}

#[tokio::test]
async fn an_agent_that_is_silent_away_or_no_agent_is_told_apart() {
    let world = World::new();
    let h1 = world.host_with("h1", "127.0.0.2", hasty()).await;
    let _shop = h1.node("shop@h1").await;
    let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let h9 = EmbeddedMesh::open(&world.mesh_dir(), "h9", vec!["h9".to_owned()], address).unwrap();
    let instance = Instance {
        id: "cart@h9".to_owned(),
        service: ServiceName::new("cart").unwrap(),
        node: Some("cart@h9".to_owned()),
        agent: "h9".to_owned(),
        address,
        protocol: Protocol::Meshx,
        meta: Default::default(),
    };
    h9.register(&Entry::plain(instance)).await.unwrap();

    let why = soon("the answer", h1.proxy.why("shop@h1", "cart@h9", no)).await;
    let (step, refusal) = stopped(&why);
    assert_eq!((step.what, refusal.cause), ("tls", Cause::Timeout), "{refusal}");

    let answering = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        rest(&mut stream).await
    };
    let _queued = listener.accept().await.unwrap();
    let (why, _) = tokio::join!(h1.proxy.why("shop@h1", "cart@h9", no), answering);
    assert_eq!(stopped(&why).0.what, "tls");

    drop(listener);
    let why = h1.proxy.why("shop@h1", "cart@h9", no).await;
    let (step, refusal) = stopped(&why);
    assert_eq!(
        (step.what, refusal.cause),
        ("agent", Cause::Unreachable),
        "{refusal}"
    );
}

/// A refusal of the own certificate comes after the handshake in TLS 1.3: it must not pass for a yes.
#[tokio::test]
async fn a_certificate_that_the_other_agent_refuses_is_a_no() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let _shop = h1.node("shop@h1").await;
    let elsewhere = World::new();
    let other = elsewhere.host("h2", "127.0.0.3").await;
    let foreign = other.identity("cart").await;
    let right = certificates::leaf_of_mesh(&world, &h1, "cart").await;
    // It proves to be cart, but believes another authority.
    let picky = crate::mesh::Identity {
        roots: foreign.roots.clone(),
        ..right
    };
    let listener = TcpListener::bind("127.0.0.4:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let h9 = EmbeddedMesh::open(&world.mesh_dir(), "h9", vec!["h9".to_owned()], address).unwrap();
    let instance = Instance {
        id: "cart@h9".to_owned(),
        service: ServiceName::new("cart").unwrap(),
        node: Some("cart@h9".to_owned()),
        agent: "h9".to_owned(),
        address,
        protocol: Protocol::Meshx,
        meta: Default::default(),
    };
    h9.register(&Entry::plain(instance)).await.unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls::server_config(&picky, Protocol::Meshx).unwrap());
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        assert!(acceptor.accept(stream).await.is_err());
    };
    let (why, ()) = tokio::join!(h1.proxy.why("shop@h1", "cart@h9", no), serve);
    let (step, _) = stopped(&why);
    assert_eq!(step.what, "certificate", "{why:?}");
    assert!(step.text.contains("our certificate"), "{step:?}");
}

/// The embedded mesh, but its certificates are long over.
struct Stale(Arc<EmbeddedMesh>);

impl crate::mesh::Certificates for Stale {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        let service = service.clone();
        Box::pin(async move {
            let fresh = self.0.identity(&service).await?;
            Ok(Arc::new(Identity {
                id: fresh.id.clone(),
                chain: fresh.chain.clone(),
                key: fresh.key.clone_key(),
                roots: fresh.roots.clone(),
                not_after: unix_now() - 60,
            }))
        })
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        self.0.spiffe(service)
    }

    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()> {
        self.0.present_token(service, token)
    }
}

impl Catalogue for Stale {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        self.0.node(node)
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        self.0.instances(service)
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        self.0.nodes()
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        self.0.services()
    }
}

impl Authorization for Stale {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        self.0.authorize(source, target)
    }

    fn changed(&self) -> Answer<'_, ()> {
        self.0.changed()
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        self.0.intentions()
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        self.0.fix(source, target)
    }
}

impl Registration for Stale {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        self.0.register(entry)
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        self.0.deregister(id)
    }

    fn passing(&self, id: &str) -> Answer<'_, ()> {
        self.0.passing(id)
    }
}

impl Diagnosis for Stale {
    fn findings(&self) -> futures::future::BoxFuture<'_, Vec<Finding>> {
        self.0.findings()
    }
}

#[tokio::test]
async fn a_certificate_that_is_over_is_not_shown_to_anybody() {
    let world = World::new();
    let (h1, h2, _shop, _cart) = pair(&world).await;
    let stale = Arc::new(Stale(h1.mesh.clone()));
    let proxy = Proxy::new(stale, h1.local.clone(), h1.links.clone(), settings());
    let why = proxy.why("shop@h1", "cart@h2", no).await;
    let (step, refusal) = stopped(&why);
    assert_eq!(
        (step.what, refusal.cause),
        ("certificate", Cause::CertificateExpired)
    );
    let ago = step
        .text
        .split_once("expired ")
        .and_then(|(_, text)| text.split_once(" s ago"));
    let ago: u64 = ago.unwrap().0.parse().unwrap();
    assert!((60..120).contains(&ago), "{step:?}");
    let totals = h2.links.totals();
    assert_eq!(
        (totals.accepted.done, totals.accepted.failed),
        (0, 0),
        "nobody was dialled"
    );
}

#[tokio::test]
async fn a_client_may_speak_as_a_service_that_has_no_instance() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let away = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let gone = away.local_addr().unwrap();
    h2.service("echo-1", "echo", Endpoint::Tcp(gone)).await;
    assert_eq!(
        h1.proxy.why("web", "echo", no).await.decision.unwrap_err().cause,
        Cause::NoSuchService
    );
    let why = h1.proxy.why("web", "echo", yes).await;
    let wanted = ["source", "target", "certificate", "agent", "tls", "rule"];
    assert_eq!(whats(&why), wanted, "{why:?}");
    assert!(why.decision.is_ok());

    // On one agent the instance itself is tried.
    let why = h2.proxy.why("web", "echo", yes).await;
    assert_eq!(whats(&why), ["source", "target", "rule", "endpoint"], "{why:?}");
    drop(away);
    let why = h2.proxy.why("web", "echo", yes).await;
    assert_eq!(stopped(&why).0.what, "endpoint");
    world.rule("web", "echo", Action::Deny);
    for host in [&h1, &h2] {
        let why = host.proxy.why("web", "echo", yes).await;
        let (step, refusal) = stopped(&why);
        assert_eq!((step.what, refusal.cause), ("rule", Cause::IntentionDenied));
        assert_eq!(step.fix, "meshx allow web echo");
    }
}

//! Names that are claimed and not proven.
use std::io::Write;
use std::sync::Mutex;

use meshx_dist::name_frame::refusal_status;

use super::certificates::{Forger, ask, request, secure};
use super::*;

struct Scene {
    h1: Host,
    h2: Host,
    shop: Node,
    cart: Node,
    search: Node,
}

async fn scene(world: &World) -> Scene {
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let search = h2.node("search@h2").await;
    Scene {
        h1,
        h2,
        shop,
        cart,
        search,
    }
}

#[tokio::test]
async fn a_certificate_speaks_for_its_own_service_only() {
    let world = World::new();
    let Scene {
        h1, h2, shop, search, ..
    } = scene(&world).await;
    // A node of a third agent: only its service tells that the certificate does not speak for it.
    let h3 = world.host("h3", "127.0.0.4").await;
    let _far = h3.node("cart@h3").await;
    let leaf = h1.identity("shop").await;
    let claims = ["cart@h3", "cart@h2", "search@h2", "shop@h7", "nonsense", ""];
    for (i, claim) in claims.into_iter().enumerate() {
        let mut stream = secure(&h2, &leaf, "search").await.unwrap();
        let asked = request(Purpose::Dist, "search", "search@h2", claim);
        let refusal = ask(&mut stream, &asked).await.unwrap().expect_err(claim);
        assert_eq!(refusal.cause, Cause::IdentityMismatch, "{claim}: {refusal}");
        assert_eq!(
            h2.refusals(Cause::IdentityMismatch),
            i as u64 + 1,
            "told and logged"
        );
        assert_eq!(h2.links.refusal_of_link(asked.link).unwrap().refusal, refusal);
    }
    assert!(h2.links.snapshot().is_empty());
    shop.link(&search).await;
}

#[tokio::test]
async fn a_node_of_this_agent_does_not_come_in_from_outside() {
    let world = World::new();
    let Scene { h2, cart: _cart, .. } = scene(&world).await;
    let leaf = h2.identity("cart").await;
    let mut stream = secure(&h2, &leaf, "search").await.unwrap();
    let refusal = ask(
        &mut stream,
        &request(Purpose::Dist, "search", "search@h2", "cart@h2"),
    )
    .await
    .unwrap();
    assert_eq!(refusal.unwrap_err().cause, Cause::IdentityMismatch);
}

/// Consul's data centres share a trust domain when they are federated, and a service of the same name in another one is
/// somebody else's.
#[tokio::test]
async fn a_certificate_of_another_data_centre_proves_no_node_of_this_one() {
    let world = World::new();
    let Scene {
        h1, h2, shop, search, ..
    } = scene(&world).await;
    let forger = Forger::of_mesh(&world, &h1).await;
    let domain = h1.mesh.trust_domain();
    let elsewhere = [
        format!("spiffe://{domain}/ns/default/dc/dc2/svc/shop"),
        format!("spiffe://{domain}/ns/other/dc/dc1/svc/shop"),
    ];
    for (i, uri) in elsewhere.iter().enumerate() {
        let leaf = forger.leaf(&h1, std::slice::from_ref(uri), 60);
        let mut stream = secure(&h2, &leaf, "search").await.unwrap();
        let asked = request(Purpose::Dist, "search", "search@h2", "shop@h1");
        let refusal = ask(&mut stream, &asked).await.unwrap().expect_err(uri);
        assert_eq!(refusal.cause, Cause::IdentityMismatch, "{refusal}");
        assert!(refusal.text.contains("dc/dc1/svc/shop"), "{refusal}");
        assert_eq!(h2.refusals(Cause::IdentityMismatch), i as u64 + 1);
    }
    shop.link(&search).await;
}

#[tokio::test]
async fn the_name_in_the_handshake_must_be_the_claimed_one() {
    let world = World::new();
    let Scene { h1, h2, search, .. } = scene(&world).await;
    let leaf = h1.identity("shop").await;
    for (i, name) in ["cart@h2", "shop@h7", "shop@h1x"].into_iter().enumerate() {
        let mut stream = secure(&h2, &leaf, "search").await.unwrap();
        let asked = request(Purpose::Dist, "search", "search@h2", "shop@h1");
        assert_eq!(ask(&mut stream, &asked).await.unwrap(), Ok(()));
        stream.write_all(&name_message(name)).await.unwrap();
        assert_eq!(rest(&mut stream).await, refusal_status(), "{name}");
        assert_eq!(h2.refusals(Cause::IdentityMismatch), i as u64 + 1);
        // The node saw a connection on which nothing came.
        let (mut near, _) = soon("the node's side", search.listener.accept()).await.unwrap();
        assert!(rest(&mut near).await.is_empty());
    }
}

#[tokio::test]
async fn a_node_may_name_no_other_than_itself() {
    let world = World::new();
    let Scene {
        h1,
        h2: _h2,
        shop,
        cart,
        ..
    } = scene(&world).await;
    for (i, name) in ["search@h1", "shop@h2", "shop@h1x"].into_iter().enumerate() {
        let (mut stream, reply) = shop.connect("cart@h2").await;
        assert!(matches!(reply, ConnectReply::Ok { .. }), "{reply:?}");
        stream.write_all(&name_message(name)).await.unwrap();
        assert_eq!(rest(&mut stream).await, refusal_status(), "{name}");
        assert_eq!(h1.refusals(Cause::IdentityMismatch), i as u64 + 1);
        let (mut near, _) = soon("the node's side", cart.listener.accept()).await.unwrap();
        assert!(rest(&mut near).await.is_empty(), "nothing reached the other node");
    }
}

#[tokio::test]
async fn only_a_registration_may_dial() {
    let world = World::new();
    let Scene { h1, shop, .. } = scene(&world).await;
    let mut almost = *shop.secret.expose();
    almost[31] ^= 1;
    for secret in [
        Secret::from_bytes(almost),
        Secret::from_bytes([0; 32]),
        Secret::generate().unwrap(),
    ] {
        let (_, reply) = connect(&shop.dist, &secret, "cart@h2").await;
        assert_eq!(refused(reply).cause, Cause::BadSecret);
    }
    // A secret that was good, until its node was deregistered.
    h1.local.remove("shop@h1");
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::BadSecret);
    assert_eq!(h1.refusals(Cause::BadSecret), 4);

    // A service is no node.
    h1.service("web-1", "web", Endpoint::Uds("/nowhere".into())).await;
    let secret = h1.local.by_id("web-1").unwrap().secret.clone();
    let (_, reply) = connect(&shop.dist, &secret, "cart@h2").await;
    assert_eq!(refused(reply).cause, Cause::InvalidRequest);
}

#[tokio::test]
async fn a_registration_belongs_to_its_uid() {
    let world = World::new();
    let Scene {
        h1, h2, shop, cart, ..
    } = scene(&world).await;
    let give_away = |host: &Host, name: &str| host.change(name, |local| local.uid += 1);
    // The socket is not his: nobody even connects.
    give_away(&h2, "cart@h2");
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::NotPermitted);
    assert!(futures::FutureExt::now_or_never(cart.listener.accept()).is_none());
    // It is, but somebody else listens there. (Giving a file away takes root.)
    let uid = h2.local.by_id("cart@h2").unwrap().uid;
    std::os::unix::fs::chown(h2.dir.join("cart@h2.sock"), Some(uid), None).unwrap();
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::NotPermitted);
    let (mut near, _) = soon("the node's side", cart.listener.accept()).await.unwrap();
    assert!(rest(&mut near).await.is_empty(), "no secret for a stranger");
    // Somebody else dials with a secret that he found.
    give_away(&h1, "shop@h1");
    assert_eq!(
        shop.dial("search@h2").await.unwrap_err().cause,
        Cause::NotPermitted
    );
}

#[tokio::test]
async fn requests_must_go_together() {
    let world = World::new();
    let Scene {
        h1, h2, shop, search, ..
    } = scene(&world).await;
    let leaf = h1.identity("shop").await;
    let cases = [
        (Purpose::Dist, "cart", "cart@h2", Cause::InvalidRequest),
        (Purpose::Dist, "search", "cart@h2", Cause::NoSuchNode),
        (Purpose::Dist, "search", "", Cause::NoSuchNode),
        (Purpose::Rpc, "search", "search@h2", Cause::NoSuchService),
        (Purpose::Tcp, "search", "", Cause::NoSuchService),
    ];
    for (purpose, service, instance, cause) in cases {
        let mut stream = secure(&h2, &leaf, "search").await.unwrap();
        let asked = request(purpose, service, instance, "shop@h1");
        assert_eq!(
            ask(&mut stream, &asked).await.unwrap().unwrap_err().cause,
            cause,
            "{instance}"
        );
    }
    // One id names one link.
    let (_near, _far) = shop.link(&search).await;
    let mut asked = request(Purpose::Dist, "search", "search@h2", "shop@h1");
    asked.link = h2.links.snapshot()[0].info.id;
    let mut stream = secure(&h2, &leaf, "search").await.unwrap();
    assert_eq!(
        ask(&mut stream, &asked).await.unwrap().unwrap_err().cause,
        Cause::InvalidRequest
    );
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_refusal_is_logged_with_its_cause_and_both_names() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_writer(move || writer.clone())
        .finish();
    // The runtime of this test has one thread, so this sees the agents' tasks.
    let _guard = tracing::subscriber::set_default(subscriber);
    let world = World::new();
    let Scene { h1, h2, shop, .. } = scene(&world).await;
    world.rule("shop", "cart", Action::Deny);
    shop.dial("cart@h2").await.unwrap_err();
    let leaf = h1.identity("shop").await;
    let mut stream = secure(&h2, &leaf, "search").await.unwrap();
    let spoof = request(Purpose::Dist, "search", "search@h2", "cart@h2");
    ask(&mut stream, &spoof).await.unwrap().unwrap_err();

    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let refusals: Vec<_> = lines
        .iter()
        .map(|line| &line["fields"])
        .filter(|fields| fields["message"] == "link refused")
        .collect();
    let seen: Vec<_> = refusals
        .iter()
        .map(|f| [&f["at"], &f["cause"], &f["source"], &f["target"]].map(|field| field.as_str().unwrap()))
        .collect();
    assert_eq!(
        seen,
        [
            ["inbound", "intention_denied", "shop@h1 (shop)", "cart@h2"],
            ["dist", "intention_denied", "shop@h1", "cart@h2"],
            ["inbound", "identity_mismatch", "cart@h2 (shop)", "search@h2"],
        ]
    );
    assert_eq!(refusals[2]["link"].as_str().unwrap(), spoof.link.to_string());
    let secret: String = shop
        .secret
        .expose()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(!text.contains(&secret));
}

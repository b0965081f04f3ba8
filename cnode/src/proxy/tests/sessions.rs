//! Nodes that only dial and that no catalogue has.
use meshx_dist::flags::DistFlags;
use meshx_dist::name_frame::{peek_name_frame, refusal_status};

use super::certificates::{ask, request, secure};
use super::*;
use crate::mesh::embedded::Action::{Allow, Deny};

fn of_operator() -> Settings {
    Settings {
        session_service: Some(ServiceName::new("operator").unwrap()),
        ..settings()
    }
}

/// What a session of an agent without `session_service` is beyond its own user's nodes.
fn nobody() -> Result<ServiceName, Refusal> {
    Err(Cause::NotPermitted.because("no session_service"))
}

fn operator() -> Result<ServiceName, Refusal> {
    Ok(ServiceName::new("operator").unwrap())
}

impl Host {
    /// A session of the user that runs the test.
    fn session(&self, name: &str, acts_as: Result<ServiceName, Refusal>) -> Secret {
        let secret = Secret::generate().unwrap();
        self.local.insert_session(Session {
            id: format!("session {name}"),
            name: name.to_owned(),
            secret: secret.clone(),
            owner: 2,
            uid: rustix::process::geteuid().as_raw(),
            acts_as,
            given: Default::default(),
        });
        secret
    }

    async fn connect(&self, secret: &Secret, target: &str) -> Result<UnixStream, Refusal> {
        match connect(&self.dir.join("dist.sock"), secret, target).await {
            (stream, ConnectReply::Ok { .. }) => Ok(stream),
            (_, ConnectReply::Refused(refusal)) => Err(refusal),
        }
    }

    /// Dials and sends the name message.
    async fn dial(&self, secret: &Secret, target: &str, message: &[u8]) -> Result<UnixStream, Refusal> {
        let mut stream = self.connect(secret, target).await?;
        stream.write_all(message).await.unwrap();
        Ok(stream)
    }
}

/// The next link of a node: the ACCEPT frame and the flags and name of the handshake.
async fn accepted(node: &Node) -> (Accept, DistFlags, String, UnixStream) {
    let (mut stream, _) = soon("a link", node.listener.accept()).await.unwrap();
    let accept = Accept::decode(&frame(&mut stream).await.unwrap()).unwrap();
    let message = frame(&mut stream).await.unwrap();
    let mut whole = Vec::from(u16::try_from(message.len()).unwrap().to_be_bytes());
    whole.extend(message);
    let name = peek_name_frame(&whole).unwrap().unwrap();
    (accept, name.flags, name.name.to_owned(), stream)
}

/// `send_name` of a node without a name, or of one that says so.
fn nameless(name: &str) -> Vec<u8> {
    let mut bytes = name_message(name);
    let flags = u64::from_be_bytes(bytes[3..11].try_into().unwrap()) | (1 << 33);
    bytes[3..11].copy_from_slice(&flags.to_be_bytes());
    bytes
}

#[tokio::test]
async fn a_session_reaches_its_own_users_nodes_here_by_no_rule_and_hidden() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let shop = h1.node("shop@h1").await;
    world.rule("*", "*", Deny);
    let session = h1.session("rem-1@h1", nobody());
    let (mut dialled, (accept, flags, name, mut near)) = soon("a link", async {
        tokio::join!(
            async {
                h1.dial(&session, "shop@h1", &name_message("rem-1@h1"))
                    .await
                    .unwrap()
            },
            accepted(&shop)
        )
    })
    .await;
    assert_eq!(
        (accept.remote_node.as_str(), name.as_str()),
        ("rem-1@h1", "rem-1@h1")
    );
    assert_eq!(accept.remote_spiffe, "", "nothing has proved who it is");
    assert!(!flags.contains(DistFlags::PUBLISHED), "hidden, whatever it says");
    assert_eq!(h1.proxy.reauthorize().await, 0, "no rule is about it");
    near.write_all(b"x").await.unwrap();
    let mut byte = [0];
    soon("a byte", dialled.read_exact(&mut byte)).await.unwrap();
}

#[tokio::test]
async fn a_session_does_not_reach_nodes_of_other_users_or_hosts_unless_it_may_be_a_service() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (_shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    h1.change("shop@h1", |local| local.uid += 1);
    let session = h1.session("rem-1@h1", nobody());
    for target in ["shop@h1", "cart@h2"] {
        let refusal = h1.connect(&session, target).await.unwrap_err();
        assert_eq!(refusal, nobody().unwrap_err(), "{target}");
    }
    // The other agent does not know the service as one of sessions.
    let session = h1.session("rem-2@h1", operator());
    let refusal = h1.connect(&session, "cart@h2").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::IdentityMismatch, "{refusal}");
    assert!(h2.links.snapshot().is_empty());
}

#[tokio::test]
async fn as_a_service_a_session_goes_by_its_rules() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", of_operator()).await,
    );
    let cart = h2.node("cart@h2").await;
    let session = h1.session("rem-1@h1", operator());
    for (source, destination) in [("operator", "cart"), ("cart", "operator")] {
        world.rule(source, destination, Deny);
        let refusal = h1.connect(&session, "cart@h2").await.unwrap_err();
        assert_eq!(refusal.cause, Cause::IntentionDenied, "{refusal}");
        world.rule(source, destination, Allow);
    }
    let message = name_message("rem-1@h1");
    let (dialled, (accept, flags, ..)) = soon("a link", async {
        tokio::join!(h1.dial(&session, "cart@h2", &message), accepted(&cart))
    })
    .await;
    let mut dialled = dialled.unwrap();
    assert!(
        accept.remote_spiffe.ends_with("/svc/operator"),
        "{}",
        accept.remote_spiffe
    );
    assert!(!flags.contains(DistFlags::PUBLISHED));
    world.rule("operator", "cart", Deny);
    assert_eq!(h2.proxy.reauthorize().await, 1);
    assert!(rest(&mut dialled).await.is_empty(), "the link was cut");
}

#[tokio::test]
async fn whoever_may_be_a_session_may_be_no_node_beside_that() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", of_operator()).await,
    );
    let (_shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let _search = h2.node("search@h2").await;
    let leaf = h1.identity("operator").await;
    for claim in ["shop@h1", "search@h2", "", "a@b@c", "operator@h1"] {
        let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
        let asked = request(Purpose::Dist, "cart", "cart@h2", claim);
        let refusal = ask(&mut stream, &asked).await.unwrap().expect_err(claim);
        let wanted = [Cause::IdentityMismatch, Cause::InvalidName];
        assert!(wanted.contains(&refusal.cause), "{claim}: {refusal}");
    }
    // Nor is the certificate of another service one of sessions.
    let leaf = h1.identity("shop").await;
    let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
    let asked = request(Purpose::Dist, "cart", "cart@h2", "rem-1@h1");
    let refusal = ask(&mut stream, &asked).await.unwrap().unwrap_err();
    assert_eq!(refusal.cause, Cause::IdentityMismatch, "{refusal}");
}

#[tokio::test]
async fn the_handshake_names_the_session_and_only_one_without_a_name_gets_one() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let (shop, _cart) = (h1.node("shop@h1").await, h1.node("cart@h1").await);
    let (named, unnamed) = (h1.session("rem-1@h1", nobody()), h1.session("h1", nobody()));
    for (secret, message) in [
        (&named, name_message("shop2@h1")),
        (&named, nameless("rem-1@h1")),
        (&named, nameless("h1")),
        (&unnamed, name_message("h1")),
        (&unnamed, nameless("h2")),
        (&unnamed, name_message("rem-1@h1")),
        (&shop.secret, nameless("shop@h1")),
    ] {
        let mut stream = h1.dial(secret, "cart@h1", &message).await.unwrap();
        assert_eq!(rest(&mut stream).await, refusal_status(), "{message:?}");
    }
    assert_eq!(h1.all_refusals(), 7);
}

#[tokio::test]
async fn a_session_without_a_name_goes_by_the_one_that_it_was_given() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let shop = h1.node("shop@h1").await;
    let session = h1.session("h1", nobody());
    let message = nameless("h1");
    let (dialled, (accept, _, name, mut near)) = soon("a link", async {
        tokio::join!(h1.dial(&session, "shop@h1", &message), accepted(&shop))
    })
    .await;
    assert_eq!((accept.remote_node.as_str(), name.as_str()), ("h1", "h1"));
    let mut dialled = dialled.unwrap();
    let status = b"\x00\x11snamed:\x00\x04x@h1\x00\x00\x00\x07";
    near.write_all(status).await.unwrap();
    near.write_all(b"more").await.unwrap();
    let mut read = [0; 23];
    soon("the status", dialled.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"\x00\x11snamed:\x00\x04x@h1\x00\x00\x00\x07more");
    assert!(h1.local.was_given(2, "x@h1"));
    assert!(!h1.local.was_given(2, "y@h1") && !h1.local.was_given(3, "x@h1"));
}

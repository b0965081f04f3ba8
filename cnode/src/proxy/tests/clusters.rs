//! Nodes of different clusters see each other hidden, by each way that a link can come; those of one see what they are.
use super::certificates::{ask, request, secure, secure_as};
use super::connect::Elsewhere;
use super::plain::PlainPorts;
use super::sidecars::{behind, come, trusting};
use super::*;

/// Labels of the dialler and of the acceptor, and whether they are of one cluster.
const LABELS: [(&str, &str, bool); 4] = [
    ("blue", "blue", true),
    ("blue", "green", false),
    ("", "green", false),
    ("blue", "", false),
];

/// `PUBLISHED`, the lowest flag of a name message and of a challenge alike.
fn published(message: &[u8]) -> bool {
    assert_eq!(message[0], b'N', "{message:?}");
    message[8] & 1 == 1
}

/// The name message that comes after ACCEPT.
async fn name_at(node: &Node) -> (UnixStream, bool) {
    let (mut near, _) = soon("a link", node.listener.accept()).await.unwrap();
    Accept::decode(&frame(&mut near).await.unwrap()).unwrap();
    let seen = published(&frame(&mut near).await.unwrap());
    (near, seen)
}

/// The acceptor goes on; whether the dialler sees it as published.
async fn challenge(
    acceptor: &mut (impl AsyncWriteExt + Unpin),
    dialler: &mut (impl AsyncRead + Unpin),
) -> bool {
    let mut bytes = b"\x00\x03sok\x00\x1aN".to_vec();
    bytes.extend(0xd_07df_7fbd_u64.to_be_bytes());
    bytes.extend([1, 2, 3, 4, 0, 0, 0, 7]);
    bytes.extend(b"\x00\x07cart@h2");
    acceptor.write_all(&bytes).await.unwrap();
    acceptor.flush().await.unwrap();
    assert_eq!(frame(dialler).await.unwrap(), b"sok");
    published(&frame(dialler).await.unwrap())
}

#[tokio::test]
async fn on_one_host() {
    for (from, to, same) in LABELS {
        let world = World::new();
        let h1 = world.host("h1", "127.0.0.2").await;
        let (shop, cart) = (h1.node_in("shop@h1", from).await, h1.node_in("cart@h1", to).await);
        let mut dialled = shop.dial("cart@h1").await.unwrap();
        let (mut near, seen) = name_at(&cart).await;
        assert_eq!(seen, same, "the acceptor's view, {from:?} -> {to:?}");
        let seen = challenge(&mut near, &mut dialled).await;
        assert_eq!(seen, same, "the dialler's view, {from:?} -> {to:?}");
    }
}

/// The dialler's agent alone: what it dials leaves everything as it comes.
#[tokio::test]
async fn by_the_diallers_agent() {
    for (label, same) in [("", true), ("blue", false)] {
        let world = World::new();
        let h1 = world.host("h1", "127.0.0.2").await;
        let (shop, other) = (h1.node_in("shop@h1", label).await, Elsewhere::new(&world).await);
        other.register("cart@h9", "cart", Protocol::Meshx).await;
        let leaf = h1.identity("cart").await;
        let serve = async {
            let mut stream = other.accept(&leaf, Protocol::Meshx).await.2.unwrap();
            Request::decode(&frame(&mut stream).await.unwrap()).unwrap();
            let mut reply = Vec::new();
            encode_reply(&Ok(()), &mut reply);
            stream.write_all(&reply).await.unwrap();
            stream.flush().await.unwrap();
            let seen = published(&frame(&mut stream).await.unwrap());
            (stream, seen)
        };
        let (dialled, (mut far, seen)) = tokio::join!(shop.dial("cart@h9"), serve);
        assert_eq!(seen, same, "the acceptor's view, {label:?}");
        let seen = challenge(&mut far, &mut dialled.unwrap()).await;
        assert_eq!(seen, same, "the dialler's view, {label:?}");
    }
}

/// The acceptor's agent alone: an agent of an earlier release knows of no labels.
#[tokio::test]
async fn by_the_acceptors_agent() {
    for (from, to, same) in LABELS {
        let world = World::new();
        let (h1, h2) = (
            world.host("h1", "127.0.0.2").await,
            world.host("h2", "127.0.0.3").await,
        );
        let _shop = h1.node_in("shop@h1", from).await;
        let cart = h2.node_in("cart@h2", to).await;
        let leaf = h1.identity("shop").await;
        let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
        let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
        ask(&mut stream, &asked).await.unwrap().unwrap();
        stream.write_all(&name_message("shop@h1")).await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(name_at(&cart).await.1, same, "{from:?} -> {to:?}");
    }
}

#[tokio::test]
async fn from_a_proxy_of_another_make() {
    for (from, to, same) in LABELS {
        let world = World::new();
        let (h1, h2) = (
            world.host("h1", "127.0.0.2").await,
            world.host("h2", "127.0.0.3").await,
        );
        let _shop = h1.node_in("shop@h1", from).await;
        let cart = h2.node_in("cart@h2", to).await;
        let leaf = h1.identity("shop").await;
        let mut stream = secure_as(Protocol::Connect, &h2, &leaf, "cart").await.unwrap();
        stream.write_all(&name_message("shop@h1")).await.unwrap();
        stream.flush().await.unwrap();
        let (mut near, seen) = name_at(&cart).await;
        assert_eq!(seen, same, "the acceptor's view, {from:?} -> {to:?}");
        let seen = challenge(&mut near, &mut stream).await;
        assert_eq!(seen, same, "the dialler's view, {from:?} -> {to:?}");
    }
}

#[tokio::test]
async fn through_a_sidecar() {
    for (from, to, same) in LABELS {
        let world = World::new();
        let (h1, mut h2) = (
            world.host("h1", "127.0.0.2").await,
            world.host_with("h2", "127.0.0.3", trusting()).await,
        );
        let _shop = h1.node_in("shop@h1", from).await;
        let cart = h2.node_in("cart@h2", to).await;
        let mut stream = come(behind(&mut h2, "cart@h2").await, "shop@h1").await;
        let (mut near, seen) = name_at(&cart).await;
        assert_eq!(seen, same, "the acceptor's view, {from:?} -> {to:?}");
        let seen = challenge(&mut near, &mut stream).await;
        assert_eq!(seen, same, "the dialler's view, {from:?} -> {to:?}");
    }
}

/// A node of plain distribution dials.
#[tokio::test]
async fn from_a_node_of_plain_distribution() {
    for (from, to, same) in LABELS {
        let world = World::new();
        let h1 = world.host("h1", "127.0.0.2").await;
        let _shop = h1.node_in("shop@h1", from).await;
        h1.change("shop@h1", |local| {
            local.endpoint = Endpoint::PlainNode("127.0.0.1:9".parse().unwrap());
        });
        let cart = h1.node_in("cart@h1", to).await;
        let ports = PlainPorts::new(h1.proxy.clone());
        let port = ports.port([127, 0, 0, 1].into(), "cart@h1").unwrap();
        let mut stream = come(([127, 0, 0, 1], port).into(), "shop@h1").await;
        let (mut near, seen) = name_at(&cart).await;
        assert_eq!(seen, same, "the acceptor's view, {from:?} -> {to:?}");
        let seen = challenge(&mut near, &mut stream).await;
        assert_eq!(seen, same, "the dialler's view, {from:?} -> {to:?}");
    }
}

/// A VM that does not answer its agent gets no new link, by whatever way; it gets them again when it answers.
#[tokio::test]
async fn a_node_that_hangs_is_led_to_by_nobody() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, near) = (h1.node("shop@h1").await, h2.node("near@h2").await);
    let cart = h2.node("cart@h2").await;
    h2.local.set_hung("cart@h2", 1, true);
    for dialler in [&shop, &near] {
        let refusal = dialler.dial("cart@h2").await.unwrap_err();
        assert_eq!(refusal.cause, Cause::Unreachable, "{refusal}");
        assert!(refusal.text.contains("hangs"), "{refusal}");
    }
    h2.local.set_hung("cart@h2", 1, false);
    for dialler in [&shop, &near] {
        dialler.link(&cart).await;
    }
}

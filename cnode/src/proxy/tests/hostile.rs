//! Garbage, half messages, silence and crowds at both listeners.
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::certificates::{ask, request, secure};
use super::*;

const HALF_SECOND: Duration = Duration::from_millis(500);

/// Frames that can't be a CONNECT, and the cause that each gets.
fn bad_connects(secret: &Secret) -> Vec<(Vec<u8>, Cause)> {
    let mut good = Vec::new();
    Connect {
        link: LinkId([1; 16]),
        secret: secret.clone(),
        target: "cart@h2".to_owned(),
    }
    .encode(&mut good);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let mut long = good.clone();
    long[1] += 1;
    long.push(0);
    vec![
        (vec![0xff, 0xff], Cause::Limit),
        (vec![0x08, 0x01], Cause::Limit),
        (vec![0, 0], Cause::InvalidRequest),
        (with(2, 2), Cause::VersionMismatch),
        (with(3, 4), Cause::InvalidRequest),
        (with(good.len() - 1, 0xff), Cause::InvalidRequest),
        (long, Cause::InvalidRequest),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), Cause::Limit),
    ]
}

#[tokio::test]
async fn the_dist_socket_refuses_what_it_cannot_read() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    for (bytes, cause) in bad_connects(&shop.secret) {
        let mut stream = UnixStream::connect(&shop.dist).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let reply = ConnectReply::decode(&frame(&mut stream).await.unwrap()).unwrap();
        assert_eq!(refused(reply).cause, cause, "{bytes:?}");
        drop(stream);
    }
    // Half a length or half a frame and gone; gone without a word.
    for (bytes, cause) in [
        (&[0][..], Cause::InvalidRequest),
        (&[0, 90, 1, 1], Cause::InvalidRequest),
        (&[], Cause::Unreachable),
    ] {
        let before = h1.refusals(cause);
        let mut stream = UnixStream::connect(&shop.dist).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        drop(stream);
        until("the log", || h1.refusals(cause) == before + 1).await;
    }
    // Half a TLS handshake and gone.
    let before = h2.refusals(Cause::InvalidRequest);
    let mut stream = TcpStream::connect(h2.address).await.unwrap();
    stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    drop(stream);
    until("the log", || h2.refusals(Cause::InvalidRequest) == before + 1).await;
    // After OK: no name message, half of one, a giant.
    for bytes in [
        &b"\x00\x07Xabcdef"[..],
        b"\xff\xffN",
        b"\x00\x00",
        b"\x00\x07nabcdef",
    ] {
        let (mut stream, _) = shop.connect("cart@h2").await;
        stream.write_all(bytes).await.unwrap();
        assert_eq!(
            rest(&mut stream).await,
            meshx_dist::name_frame::refusal_status(),
            "{bytes:?}"
        );
        let (mut near, _) = soon("the node's side", cart.listener.accept()).await.unwrap();
        assert!(rest(&mut near).await.is_empty());
    }
    shop.link(&cart).await;
}

#[tokio::test]
async fn the_inbound_port_refuses_what_it_cannot_read() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let noise: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
        &[0; 4096],
        &[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0],
    ];
    for (i, bytes) in noise.into_iter().enumerate() {
        let mut stream = TcpStream::connect(h2.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        rest(&mut stream).await;
        drop(stream);
        until("the log", || h2.all_refusals() == i as u64 + 1).await;
    }
    // Inside TLS, from a certified peer.
    let leaf = h1.identity("shop").await;
    let mut good = Vec::new();
    request(Purpose::Dist, "cart", "cart@h2", "shop@h1").encode(&mut good);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    for (bytes, cause) in [
        (vec![0x10, 0x01], Cause::Limit),
        (vec![0, 0], Cause::InvalidRequest),
        (with(2, 9), Cause::VersionMismatch),
        (with(3, 4), Cause::InvalidRequest),
        (with(20, 0xff), Cause::InvalidRequest),
    ] {
        let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let reply = decode_reply(&frame(&mut stream).await.unwrap()).unwrap();
        assert_eq!(reply.unwrap_err().cause, cause, "{bytes:?}");
    }
    for bytes in [&b"\x00\x07Xabcdef"[..], b"\xff\xffN"] {
        let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
        let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
        ask(&mut stream, &asked).await.unwrap().unwrap();
        stream.write_all(bytes).await.unwrap();
        assert_eq!(
            rest(&mut stream).await,
            meshx_dist::name_frame::refusal_status(),
            "{bytes:?}"
        );
        let (mut near, _) = soon("the node's side", cart.listener.accept()).await.unwrap();
        assert!(rest(&mut near).await.is_empty());
    }
    assert!(h2.links.snapshot().is_empty());
    shop.link(&cart).await;
}

#[tokio::test]
async fn silence_is_ended_by_the_deadlines() {
    let world = World::new();
    let h1 = world.host_with("h1", "127.0.0.2", hasty()).await;
    let shop = h1.node("shop@h1").await;
    // The dist socket: nothing, half a frame.
    for (i, bytes) in [&b""[..], &[0], &[0, 90, 1, 1]].into_iter().enumerate() {
        let mut stream = UnixStream::connect(&shop.dist).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let reply = ConnectReply::decode(&frame(&mut stream).await.unwrap()).unwrap();
        let refusal = refused(reply);
        assert_eq!(refusal.cause, Cause::Timeout);
        assert!(refusal.text.contains("100ms"), "{refusal}");
        assert_eq!(h1.refusals(Cause::Timeout), i as u64 + 1);
    }
    // The inbound port: nothing, half a TLS record.
    for (i, bytes) in [&b""[..], &[0x16, 3, 1, 2, 0, 1]].into_iter().enumerate() {
        let mut stream = TcpStream::connect(h1.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        rest(&mut stream).await;
        until("the log", || h1.refusals(Cause::Timeout) == i as u64 + 4).await;
    }
}

#[tokio::test]
async fn silence_after_the_handshake_is_ended_too() {
    let world = World::new();
    let slow = Settings {
        frame_timeout: HALF_SECOND,
        ..settings()
    };
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", slow).await,
    );
    let (_shop, _cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let leaf = h1.identity("shop").await;
    let mut good = Vec::new();
    request(Purpose::Dist, "cart", "cart@h2", "shop@h1").encode(&mut good);
    let half_name = [good.as_slice(), b"\x00\x16N"].concat();
    for (i, bytes) in [&b""[..], &[0], &good[..good.len() - 1], &good, &half_name]
        .into_iter()
        .enumerate()
    {
        let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert!(!rest(&mut stream).await.is_empty(), "a refusal is told");
        assert_eq!(h2.refusals(Cause::Timeout), i as u64 + 1);
        assert!(h2.links.snapshot().is_empty());
    }
}

#[tokio::test]
async fn a_silent_agent_is_given_up() {
    let world = World::new();
    let h1 = world.host_with("h1", "127.0.0.2", hasty()).await;
    let shop = h1.node("shop@h1").await;
    let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mute = EmbeddedMesh::open(&world.mesh_dir(), "mute", vec!["h9".to_owned()], address).unwrap();
    let instance = Instance {
        id: "cart@h9".to_owned(),
        service: ServiceName::new("cart").unwrap(),
        node: Some("cart@h9".to_owned()),
        agent: "mute".to_owned(),
        address,
        protocol: Protocol::Meshx,
        meta: Default::default(),
    };
    mute.register(&Entry::plain(instance.clone())).await.unwrap();
    // The kernel takes the connection; nobody speaks.
    let refusal = shop.dial("cart@h9").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::Timeout);
    assert!(refusal.text.contains(&address.to_string()), "{refusal}");
}

#[tokio::test]
async fn a_crowd_of_half_open_connections_stops_nobody() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let max = settings().max_pending;
    let (mut dist, mut inbound) = (Vec::new(), Vec::new());
    for _ in 0..max * 2 {
        let mut stream = UnixStream::connect(&shop.dist).await.unwrap();
        stream.write_all(&[0]).await.unwrap();
        dist.push(stream);
        let mut stream = TcpStream::connect(h2.address).await.unwrap();
        stream.write_all(&[0x16, 3, 1]).await.unwrap();
        inbound.push(stream);
    }
    let (mut near, mut far) = shop.link(&cart).await;
    near.write_all(b"through").await.unwrap();
    let mut seen = [0; 7];
    far.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"through");
    // The oldest had to go, with the reason where there is a way to tell it.
    let reply = ConnectReply::decode(&frame(&mut dist[0]).await.unwrap()).unwrap();
    assert_eq!(refused(reply).cause, Cause::Limit);
    rest(&mut inbound[0]).await;
    until("the log", || h2.refusals(Cause::Limit) > max as u64).await;
    assert!(h1.refusals(Cause::Limit) > max as u64);
    // A live link does not count, however many come.
    for _ in 0..max * 2 {
        dist.push(UnixStream::connect(&shop.dist).await.unwrap());
        inbound.push(TcpStream::connect(h2.address).await.unwrap());
    }
    far.write_all(b"!").await.unwrap();
    assert_eq!(near.read_u8().await.unwrap(), b'!');
}

#[tokio::test]
async fn a_session_that_ends_without_goodbye_ends_the_link() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (_shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let leaf = h1.identity("shop").await;
    let config = tls::client_config(&leaf, h2.spiffe("cart"), Protocol::Meshx).unwrap();
    let name = ServerName::try_from(h2.spiffe("cart").server_name()).unwrap();
    let stream = TcpStream::connect(h2.address).await.unwrap();
    let mut stream = TlsConnector::from(config).connect(name, stream).await.unwrap();
    ask(&mut stream, &request(Purpose::Dist, "cart", "cart@h2", "shop@h1"))
        .await
        .unwrap()
        .unwrap();
    stream.write_all(&name_message("shop@h1")).await.unwrap();
    let (_, _, mut near) = cart.accept().await;
    // No close_notify: what came may have been cut short, so it must not look like a whole stream.
    let (raw, _) = stream.into_inner();
    drop(raw);
    rest(&mut near).await;
    until("no links", || h2.links.snapshot().is_empty()).await;
}

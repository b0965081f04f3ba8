//! Crowds: who opens many connections pushes out his own, and who has a right to many is not refused.
use std::time::Instant;

use futures::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use tokio::io::Interest;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;

use super::certificates::{ask, request, secure};
use super::*;

/// Nothing ends by its time: what ends makes room for others.
fn patient(max_pending: usize) -> Settings {
    let long = PATIENCE * 10;
    Settings {
        frame_timeout: long,
        handshake_timeout: long,
        connect_timeout: long,
        mesh_timeout: long,
        linger_time: long,
        setup_timeout: long,
        max_pending,
        ..Settings::default()
    }
}

const MAX: usize = 64;

/// A connection from another address than everybody else's here.
async fn stranger(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.66:0".parse().unwrap()).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test]
async fn half_open_connections_of_one_address_push_out_their_own() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", patient(MAX)).await,
    );
    let (_shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    // Was here first, and takes its time.
    let slow = TcpStream::connect(h2.address).await.unwrap();
    let mut crowd = Vec::new();
    for at in 0..MAX * 3 {
        let mut stream = stranger(h2.address).await;
        if at % 2 == 0 {
            stream.write_all(&[0x16, 3, 1]).await.unwrap();
        }
        crowd.push(stream);
    }
    // All of them have come in: the first are gone.
    rest(&mut crowd[MAX]).await;
    let began = Instant::now();
    let leaf = h1.identity("shop").await;
    let target = h2.spiffe("cart");
    let config = tls::client_config(&leaf, target.clone(), Protocol::Meshx).unwrap();
    let name = ServerName::try_from(target.server_name()).unwrap();
    let mut slow = soon("a handshake", TlsConnector::from(config).connect(name, slow))
        .await
        .expect("a slow one was pushed out by others");
    let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
    ask(&mut slow, &asked).await.unwrap().unwrap();
    slow.write_all(&name_message("shop@h1")).await.unwrap();
    let (_, name, _near) = cart.accept().await;
    assert_eq!(name, "shop@h1");
    println!(
        "served after {:?} beside {MAX} half-open connections",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_service_that_has_proven_itself_pushes_out_its_own() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host_with("h2", "127.0.0.3", patient(MAX)).await,
    );
    let _nodes = (h1.node("shop@h1").await, h1.node("web@h1").await);
    let cart = h2.node("cart@h2").await;
    let (shop, web) = (h1.identity("shop").await, h1.identity("web").await);
    let mut slow = secure(&h2, &web, "cart").await.unwrap();
    let mut crowd = Vec::new();
    for _ in 0..MAX * 2 {
        crowd.push(secure(&h2, &shop, "cart").await.unwrap());
    }
    rest(&mut crowd[0]).await;
    // Nor do those who have shown nothing take the places of those who have.
    let strangers: Vec<_> = join_all((0..MAX * 2).map(|_| stranger(h2.address))).await;
    let asked = request(Purpose::Dist, "cart", "cart@h2", "web@h1");
    let answer = ask(&mut slow, &asked).await;
    answer.expect("another service's crowd pushed it out").unwrap();
    slow.write_all(&name_message("web@h1")).await.unwrap();
    assert_eq!(cart.accept().await.1, "web@h1");
    drop((crowd, strangers));
}

#[tokio::test]
async fn a_node_that_dials_much_pushes_out_its_own() {
    let world = World::new();
    let h1 = world.host_with("h1", "127.0.0.2", patient(MAX)).await;
    let (shop, web) = (h1.node("shop@h1").await, h1.node("web@h1").await);
    let near = h1.node("near@h1").await;
    let (mut slow, reply) = web.connect("near@h1").await;
    assert!(matches!(reply, ConnectReply::Ok { .. }), "{reply:?}");
    let mut crowd = Vec::new();
    for _ in 0..MAX * 2 {
        // No name message follows.
        let (stream, reply) = shop.connect("near@h1").await;
        assert!(matches!(reply, ConnectReply::Ok { .. }), "{reply:?}");
        crowd.push(stream);
    }
    assert_eq!(
        rest(&mut crowd[0]).await,
        meshx_dist::name_frame::refusal_status(),
        "the crowd's first makes room"
    );
    slow.write_all(&name_message("web@h1")).await.unwrap();
    assert_eq!(near.accept().await.1, "web@h1");
    until("the others to go", || {
        h1.links.snapshot().len() == 1 + MAX * 3 / 4
    })
    .await;
}

/// Until the other end is closed, and not just done with writing.
async fn gone(stream: &UnixStream) {
    while !stream.ready(Interest::WRITABLE).await.unwrap().is_write_closed() {
        tokio::task::yield_now().await;
    }
}

/// What is refused and does not close counts as long as it is there: else who is refused much takes all open files.
#[tokio::test]
async fn who_is_refused_much_pushes_out_his_own() {
    let world = World::new();
    let (h1, h2) = (
        world.host_with("h1", "127.0.0.2", patient(MAX)).await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let mut crowd = Vec::new();
    for at in 0..MAX {
        let mut stream = UnixStream::connect(&shop.dist).await.unwrap();
        // A frame that is too long.
        stream.write_all(&[0xff, 0xff]).await.unwrap();
        let reply = ConnectReply::decode(&frame(&mut stream).await.unwrap()).unwrap();
        assert_eq!(refused(reply).cause, Cause::Limit, "{at}");
        crowd.push(stream);
    }
    soon("the first to go", gone(&crowd[0])).await;

    // A link whose name message is none likewise.
    let mut nameless = Vec::new();
    for at in 0..MAX {
        let (mut stream, reply) = shop.connect("cart@h2").await;
        assert!(matches!(reply, ConnectReply::Ok { .. }), "{at}: {reply:?}");
        stream.write_all(&[0, 0]).await.unwrap();
        rest(&mut stream).await;
        nameless.push(stream);
    }
    soon("the first without a name to go", gone(&nameless[0])).await;
    drop(cart);
}

#[tokio::test]
async fn six_hundred_links_at_once_wait_for_their_turn() {
    const LINKS: usize = 600;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
    let world = World::new();
    let (h1, h2) = (
        world.host_with("h1", "127.0.0.2", patient(PENDING_MAX)).await,
        // Has room for fewer at a time.
        world.host_with("h2", "127.0.0.3", patient(LINKS / 3)).await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let began = Instant::now();
    let taken = async {
        let mut taken = Vec::new();
        while taken.len() < LINKS {
            taken.push(cart.listener.accept().await.unwrap());
        }
        taken
    };
    let dialled = join_all((0..LINKS).map(|_| shop.dial("cart@h2")));
    let (dialled, taken) = timeout(PATIENCE * 5, async { tokio::join!(dialled, taken) })
        .await
        .unwrap();
    println!("{LINKS} links at once after {:?}", began.elapsed());
    let refused: Vec<_> = dialled
        .iter()
        .filter_map(|dialled| dialled.as_ref().err())
        .collect();
    assert!(
        refused.is_empty(),
        "{} refused, such as {}",
        refused.len(),
        refused[0]
    );
    assert_eq!((h1.all_refusals(), h2.all_refusals()), (0, 0));
    drop(taken);
}

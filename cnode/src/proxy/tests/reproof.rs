//! Certificates exchanged while links live: who proves himself anew stays, who does not is cut.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio_rustls::client::TlsStream;

use super::certificates::{Forger, ask, leaf_of_mesh, request, secure, secure_as};
use super::services::{tcp, upstream};
use super::*;
use crate::mesh::embedded::{Rotation, rotate};
use crate::proxy::reproof::REPROOFS_PER_CONNECTION;
use crate::proxy::tls::Peer;

/// Looks often and has little patience.
fn watchful(grace: Duration) -> Settings {
    Settings {
        proof_look: Duration::from_millis(20),
        reproof_spread: Duration::from_millis(50),
        reproof_grace: grace,
        ..settings()
    }
}

async fn hosts(world: &World, grace: Duration) -> (Host, Host) {
    (
        world.host_with("h1", "127.0.0.2", watchful(grace)).await,
        world.host_with("h2", "127.0.0.3", watchful(grace)).await,
    )
}

fn rotation(world: &World, rotation: Rotation) {
    rotate(&MeshDir::open(&world.mesh_dir()).unwrap(), rotation).unwrap();
}

/// What the other end of a link has shown last.
fn seen(host: &Host, link: LinkId) -> Arc<[rustls::pki_types::CertificateDer<'static>]> {
    let live = host.links.get(link).expect("the link lives");
    live.info.proof.unwrap().peer.chain
}

fn asks(link: LinkId, service: &str, instance: &str, node: &str) -> Request {
    Request {
        asked: Asked::Reproof,
        link,
        ..request(Purpose::Dist, service, instance, node)
    }
}

/// Sends there what comes back, byte by byte, until told to stop. Returns how many bytes did.
async fn echo(near: &mut UnixStream, far: &mut UnixStream, stop: &AtomicBool, count: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        near.write_all(b"?").await.unwrap();
        let byte = far_read(far).await;
        far.write_u8(byte).await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'?');
        count.fetch_add(1, Ordering::Relaxed);
    }
}

async fn far_read(far: &mut UnixStream) -> u8 {
    soon("a byte", far.read_u8()).await.unwrap()
}

#[tokio::test]
async fn ten_leaf_rotations_and_one_of_the_root_drop_no_link_and_refuse_none() {
    let world = World::new();
    let (h1, h2) = hosts(&world, PATIENCE).await;
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    tcp(&h2, "echo-a").await;
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let (mut near, mut far) = shop.link(&cart).await;
    let mut call = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
    let mut greeting = [0; 6];
    call.read_exact(&mut greeting).await.unwrap();
    let links: Vec<LinkId> = h1.links.snapshot().iter().map(|link| link.info.id).collect();
    assert_eq!(links.len(), 2);

    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let rotations = async {
        let mut kinds = vec![Rotation::Leaves; 10];
        kinds.extend([Rotation::Root, Rotation::Forget, Rotation::Leaves]);
        for kind in kinds {
            let before: Vec<_> = links.iter().map(|id| (seen(&h1, *id), seen(&h2, *id))).collect();
            rotation(&world, kind);
            // New links while some of the agents have seen the rotation and others have not.
            for _ in 0..3 {
                shop.link(&cart).await;
                let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
                stream.read_exact(&mut [0; 6]).await.unwrap();
            }
            call.write_all(b"!").await.unwrap();
            assert_eq!(call.read_u8().await.unwrap(), b'!');
            for (id, before) in links.iter().zip(before) {
                let what = format!("{id} proven anew at both ends after {kind:?}");
                until(&what, || {
                    !Arc::ptr_eq(&seen(&h1, *id), &before.0) && !Arc::ptr_eq(&seen(&h2, *id), &before.1)
                })
                .await;
            }
            let carried = count.load(Ordering::Relaxed);
            until("traffic", || count.load(Ordering::Relaxed) > carried + 10).await;
        }
        stop.store(true, Ordering::Relaxed);
    };
    soon("rotations", async {
        tokio::join!(rotations, echo(&mut near, &mut far, &stop, &count))
    })
    .await;
    let (one, other) = (h1.links.totals(), h2.links.totals());
    assert!(
        one.cuts.iter().chain(&other.cuts).all(|(_, cuts)| *cuts == 0),
        "{one:?} {other:?}"
    );
    assert_eq!(h1.all_refusals() + h2.all_refusals(), 0);
    assert_eq!(one.dialled.failed + other.accepted.failed, 0);
    let proven: u64 = one.pairs.iter().map(|pair| pair.proven).sum();
    assert!(proven >= 2 * 13, "{one:?}");
    assert!(
        one.pairs
            .iter()
            .all(|pair| pair.proven == 0 || !pair.proving.is_zero())
    );
}

#[tokio::test]
async fn who_proves_nothing_after_his_root_is_gone_is_cut() {
    let world = World::new();
    let (h1, h2) = hosts(&world, Duration::from_millis(300)).await;
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    // An agent of before, which knows of no re-proofs.
    h1.tasks[2].abort();
    let mut events = h2.links.subscribe(1);
    let (mut near, mut far) = shop.link(&cart).await;
    rotation(&world, Rotation::Root);
    // Its root signs no more and is believed: nothing calls for a cut, however long it takes.
    tokio::time::sleep(Duration::from_millis(600)).await;
    near.write_all(b"x").await.unwrap();
    assert_eq!(far_read(&mut far).await, b'x');

    rotation(&world, Rotation::Forget);
    let event = soon("the cut", events.recv()).await.unwrap();
    assert_eq!(event.cause, Cause::UnknownAuthority);
    assert!(
        event.text.contains("shop@h1") && event.text.contains("300ms"),
        "{}",
        event.text
    );
    assert!(rest(&mut near).await.is_empty());
    // Between agents that do, all is well.
    let (_near, _far) = cart.link(&shop).await;
}

#[tokio::test]
async fn a_certificate_that_ended_cuts_only_who_could_have_shown_another() {
    let world = World::new();
    let (h1, h2) = hosts(&world, Duration::from_secs(1)).await;
    let cart = h2.node("cart@h2").await;
    let (_, _echo) = tcp(&h2, "echo-a").await;
    let forger = Forger::of_mesh(&world, &h1).await;
    // Both handshakes are done by then, on a machine that does much else, too.
    let ends = unix_now() + 8;
    let leaf = forger.leaf_until(&h1, &[h1.spiffe("shop").to_string()], ends);

    let asked = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
    let _shop = h1.node("shop@h1").await;
    let mut native = secure(&h2, &leaf, "cart").await.unwrap();
    ask(&mut native, &asked).await.unwrap().unwrap();
    native.write_all(&name_message("shop@h1")).await.unwrap();
    let (_, _, mut far) = cart.accept().await;
    let mut foreign = secure_as(Protocol::Connect, &h2, &leaf, "echo").await.unwrap();
    let mut greeting = [0; 6];
    foreign.read_exact(&mut greeting).await.unwrap();

    assert!(rest(&mut far).await.is_empty());
    let late = unix_now() - ends;
    assert!(
        late > 1,
        "cut {late} s after the end, wanted more than the grace of 1 s"
    );
    let cuts = h2.links.totals().cuts;
    assert!(cuts.contains(&(Cause::CertificateExpired, 1)), "{cuts:?}");
    foreign.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    soon("the echo", foreign.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"still here");
}

#[tokio::test]
async fn a_proof_is_taken_only_from_the_same_two_ends() {
    let world = World::new();
    let (h1, h2) = hosts(&world, PATIENCE).await;
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let _other = h2.node("cart@h2-b").await;
    let (_near, _far) = shop.link(&cart).await;
    let link = h2.links.snapshot()[0].info.id;
    let (_back_near, _back_far) = cart.link(&shop).await;
    let outbound = h2.links.snapshot().into_iter().find(|live| live.info.id != link);
    let outbound = outbound.unwrap().info.id;
    let before = seen(&h2, link);
    let unchanged = || assert!(Arc::ptr_eq(&before, &seen(&h2, link)));
    // Another service, another node, another instance.
    let thief = leaf_of_mesh(&world, &h1, "thief").await;
    let leaf = leaf_of_mesh(&world, &h1, "shop").await;
    for (leaf, asked) in [
        (&thief, asks(link, "cart", "cart@h2", "shop@h1")),
        (&leaf, asks(link, "cart", "cart@h2", "shop@h2")),
        (&leaf, asks(link, "cart", "cart@h2-b", "shop@h1")),
    ] {
        let refusals = h2.refusals(Cause::IdentityMismatch);
        let mut stream = secure(&h2, leaf, "cart").await.unwrap();
        let refusal = ask(&mut stream, &asked).await.unwrap().unwrap_err();
        assert_eq!(refusal.cause, Cause::IdentityMismatch, "{asked:?}");
        assert!(rest(&mut stream).await.is_empty());
        until("the log", || h2.refusals(Cause::IdentityMismatch) == refusals + 1).await;
        unchanged();
    }
    // A service that is here as well, with the certificate of that.
    let _search = h2.node("search@h2").await;
    let mut stream = secure(&h2, &leaf, "search").await.unwrap();
    let asked = asks(link, "search", "cart@h2", "shop@h1");
    let refusal = ask(&mut stream, &asked).await.unwrap().unwrap_err();
    assert_eq!(refusal.cause, Cause::IdentityMismatch);
    unchanged();
    // A link of a foreign data plane is believed by its own handshake alone.
    let _echo = tcp(&h2, "echo-a").await;
    let mut foreign = secure_as(Protocol::Connect, &h2, &leaf, "echo").await.unwrap();
    soon("a greeting", foreign.read_exact(&mut [0; 6])).await.unwrap();
    let live = h2.links.snapshot();
    let of_foreign = live.iter().find(|live| live.info.local == "echo-a").unwrap();
    let mut stream = secure(&h2, &leaf, "echo").await.unwrap();
    let asked = asks(of_foreign.info.id, "echo", "echo-a", "");
    let refusal = ask(&mut stream, &asked).await.unwrap().unwrap_err();
    assert_eq!(refusal.cause, Cause::InvalidRequest);
    drop((foreign, stream));
    until("two links", || h2.links.snapshot().len() == 2).await;
    // No link, and one that this agent dialled: the next request is answered all the same.
    let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
    for id in [LinkId([9; 16]), outbound] {
        let asked = asks(id, "cart", "cart@h2", "shop@h1");
        let refusal = ask(&mut stream, &asked).await.unwrap().unwrap_err();
        assert_eq!(refusal.cause, Cause::InvalidRequest);
    }
    unchanged();
    let asked = asks(link, "cart", "cart@h2", "shop@h1");
    ask(&mut stream, &asked).await.unwrap().unwrap();
    assert_eq!(seen(&h2, link)[..], leaf.chain[..]);
    // Such a connection becomes no link.
    let wanted = request(Purpose::Dist, "cart", "cart@h2", "shop@h1");
    let refusal = ask(&mut stream, &wanted).await.unwrap().unwrap_err();
    assert_eq!(refusal.cause, Cause::Limit, "{refusal}");
    assert!(rest(&mut stream).await.is_empty());
    // And proves so many links and no more.
    let mut stream = secure(&h2, &leaf, "cart").await.unwrap();
    for _ in 0..REPROOFS_PER_CONNECTION {
        ask(&mut stream, &asked).await.unwrap().unwrap();
    }
    assert_limit(&mut stream, &asked).await;
    assert_eq!(h2.links.snapshot().len(), 2);
}

async fn assert_limit(stream: &mut TlsStream<TcpStream>, asked: &Request) {
    let refusal = ask(stream, asked).await.unwrap().unwrap_err();
    assert_eq!(refusal.cause, Cause::Limit, "{refusal}");
    assert!(refusal.text.contains("REPROOFS_PER_CONNECTION"), "{refusal}");
}

/// Chains with an intermediate, at either end of a link: believed through to the root, and only then.
#[tokio::test]
async fn chains_with_an_intermediate_lead_to_the_root() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let root_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap();
    let issuer = Issuer::new(params.clone(), root_key);
    let middle_key = KeyPair::generate().unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "middle");
    let middle = params.signed_by(&middle_key, &issuer).unwrap();
    let forger = Forger::with(Issuer::new(params, middle_key), root.der());
    let mut identity = forger.leaf(&h1, &[h1.spiffe("shop").to_string()], 60);
    identity.chain.push(middle.der().clone());

    let peer = Peer::of(&identity.chain, h1.mesh.trust_domain()).unwrap();
    let strangers = h1.identity("any").await.roots.clone();
    let short = Peer::of(&identity.chain[..1], h1.mesh.trust_domain()).unwrap();
    for dialled in [true, false] {
        assert!(peer.leads_to(&identity.roots, unix_now(), dialled));
        assert!(!peer.leads_to(&strangers, unix_now(), dialled));
        assert!(!short.leads_to(&identity.roots, unix_now(), dialled));
        // As of the moment of the proof: the end of validity is another question.
        assert!(!peer.leads_to(&identity.roots, unix_now() + 7200, dialled));
    }
    // Through a handshake both ways.
    let acceptor = tokio_rustls::TlsAcceptor::from(tls::server_config(&identity, Protocol::Meshx).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = tls::client_config(&identity, h1.spiffe("shop"), Protocol::Meshx).unwrap();
    let name = rustls::pki_types::ServerName::from(address.ip());
    let (server, client) = tokio::join!(
        async { acceptor.accept(listener.accept().await.unwrap().0).await.unwrap() },
        async {
            let stream = TcpStream::connect(address).await.unwrap();
            let connector = tokio_rustls::TlsConnector::from(config);
            connector.connect(name, stream).await.unwrap()
        }
    );
    for chain in [
        server.get_ref().1.peer_certificates(),
        client.get_ref().1.peer_certificates(),
    ] {
        assert_eq!(chain.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_proof_ages_in_its_last_quarter() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let identity = h1.identity("shop").await;
    let mut peer = Peer::of(&identity.chain, h1.mesh.trust_domain()).unwrap();
    (peer.not_before, peer.not_after) = (1000, 1000 + 3200);
    let mut proof = Proof::new(&identity, &peer, Protocol::Meshx);
    proof.at = 1000;
    assert!(!proof.is_ageing(1000 + 2399) && proof.is_ageing(1000 + 2400));
    // The other end had no new one yet: again after a while.
    proof.at = 1000 + 2400;
    assert!(!proof.is_ageing(proof.at + 100) && proof.is_ageing(proof.at + 101));
    assert!(!proof.is_replaced_by(&identity));
    assert!(proof.is_replaced_by(&leaf_of_mesh(&world, &h1, "shop").await));
}

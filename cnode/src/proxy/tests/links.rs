//! Links between nodes: what is allowed goes through, what is not is refused by its cause.
use meshx_dist::name_frame::refusal_status;

use super::*;
use crate::proxy::totals::{Handshakes, PairTotals};

async fn pair(world: &World) -> (Host, Host, Node, Node) {
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    (h1, h2, shop, cart)
}

#[tokio::test]
async fn nodes_meet_through_mutual_tls() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    let ((mut near, reply), (accept, name, mut far)) = soon("a link", async {
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
        remote_spiffe: h1.spiffe("cart").to_string(),
        remote_agent: h2.address.to_string(),
    };
    assert_eq!((reply, name.as_str()), (ok, "shop@h1"));
    assert_eq!(accept.remote_spiffe, h1.spiffe("shop").to_string());
    assert!(accept.remote_agent.starts_with("127.0.0."));

    for _ in 0..3 {
        near.write_all(b"ping").await.unwrap();
        far.write_all(b"pong!").await.unwrap();
        let (mut a, mut b) = ([0; 4], [0; 5]);
        far.read_exact(&mut a).await.unwrap();
        near.read_exact(&mut b).await.unwrap();
        assert_eq!((&a, &b), (b"ping", b"pong!"));
    }
    let (out, inn) = (
        h1.links.get(accept.link).unwrap(),
        h2.links.get(accept.link).unwrap(),
    );
    assert_eq!(
        (out.info.direction, inn.info.direction),
        (Direction::Outbound, Direction::Inbound)
    );
    assert_eq!(
        (out.info.remote.as_str(), inn.info.remote.as_str()),
        ("cart@h2", "shop@h1")
    );
    assert_eq!(
        (out.info.remote_spiffe.clone(), inn.info.remote_spiffe.clone()),
        (h1.spiffe("cart"), h1.spiffe("shop"))
    );
    assert_eq!(out.info.remote_agent, Some(h2.address));
    assert_eq!(out.info.local_not_after(), inn.info.remote_not_after());
    assert!(out.info.local_not_after().unwrap() > unix_now() + 3600);
    // The name message goes ahead of what is counted.
    assert_eq!(
        (out.bytes_out, out.bytes_in, inn.bytes_out, inn.bytes_in),
        (12, 15, 15, 12)
    );
    drop((near, far));
    until("no links", || {
        h1.links.snapshot().is_empty() && h2.links.snapshot().is_empty()
    })
    .await;
    assert_eq!(h1.all_refusals() + h2.all_refusals(), 0);
    let (dialler, acceptor) = (h1.links.totals(), h2.links.totals());
    let one = Handshakes { done: 1, failed: 0 };
    assert_eq!((dialler.dialled, dialler.accepted), (one, Handshakes::default()));
    assert_eq!(
        (acceptor.dialled, acceptor.accepted),
        (Handshakes::default(), one)
    );
    let services = Some((
        h1.spiffe("shop").service().clone(),
        h1.spiffe("cart").service().clone(),
    ));
    for (totals, direction, carried) in [
        (dialler, Direction::Outbound, (15, 12)),
        (acceptor, Direction::Inbound, (12, 15)),
    ] {
        let wanted = PairTotals {
            services: services.clone(),
            direction,
            purpose: Purpose::Dist,
            opened: 1,
            live: 0,
            bytes_in: carried.0,
            bytes_out: carried.1,
            proven: 0,
            proving: Duration::ZERO,
        };
        assert_eq!(totals.pairs, [wanted]);
    }
}

#[tokio::test]
async fn each_direction_can_be_denied() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    // The accepting agent denies the dialler.
    world.rule("shop", "cart", Action::Deny);
    let refusal = shop.dial("cart@h2").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::IntentionDenied);
    assert!(
        refusal
            .text
            .contains("shop -> cart is denied by rule shop -> cart deny"),
        "{refusal}"
    );
    assert_eq!(
        (
            h1.refusals(Cause::IntentionDenied),
            h2.refusals(Cause::IntentionDenied)
        ),
        (1, 1)
    );
    assert_eq!(
        h2.links.refusal_of_target("cart@h2").unwrap().refusal.cause,
        Cause::IntentionDenied
    );
    assert_eq!(h1.links.refusal_of_target("cart@h2").unwrap().refusal, refusal);
    assert!(
        h2.links.totals().pairs.is_empty(),
        "who is refused is named in no metric"
    );
    let refusal = cart.dial("shop@h1").await.unwrap_err();
    assert!(refusal.text.contains("shop -> cart"), "{refusal}");

    // The dialling agent denies the way back, before anybody is dialled.
    world.rule("shop", "cart", Action::Allow);
    world.rule("cart", "shop", Action::Deny);
    let before = h2.all_refusals();
    let refusal = shop.dial("cart@h2").await.unwrap_err();
    assert_eq!(refusal.cause, Cause::IntentionDenied);
    assert!(refusal.text.contains("cart -> shop is denied"), "{refusal}");
    assert_eq!(h2.all_refusals(), before);

    assert_eq!(
        h1.proxy.check("shop@h1", "cart@h2").await.unwrap_err().cause,
        Cause::IntentionDenied
    );
    assert!(
        h1.proxy.check("shop", "cart").await.is_ok(),
        "between services one direction counts"
    );
    world.rule("cart", "shop", Action::Allow);
    assert!(
        h1.proxy
            .check("shop@h1", "cart@h2")
            .await
            .unwrap()
            .contains("rule cart -> shop allow")
    );
    shop.link(&cart).await;
}

#[tokio::test]
async fn without_readable_rules_nobody_talks() {
    let world = World::new();
    let (h1, h2, shop, _cart) = pair(&world).await;
    std::fs::write(world.mesh_dir().join("rules.json"), "{").unwrap();
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::NotReady);
    assert_eq!(h1.refusals(Cause::NotReady), 1);
    assert_eq!(h2.all_refusals(), 0);
}

#[tokio::test]
async fn what_is_not_there_is_refused_at_once() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    assert_eq!(shop.dial("nobody@h2").await.unwrap_err().cause, Cause::NoSuchNode);
    assert_eq!(
        shop.dial("not a node").await.unwrap_err().cause,
        Cause::InvalidName
    );
    assert_eq!(
        h1.proxy.check("shop@h1", "nobody@h2").await.unwrap_err().cause,
        Cause::NoSuchNode
    );
    assert_eq!(
        h1.proxy.check("shop", "nobody").await.unwrap_err().cause,
        Cause::NoSuchService
    );

    // The node is gone, its agent doesn't know yet.
    drop(cart);
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::Unreachable);
    // The agent has let it go, the catalogue doesn't know yet.
    h2.local.remove("cart@h2");
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::Unreachable);
    let search = h2.node("cart@h2-b").await;
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::NoSuchNode);
    drop(search);
    // The agent was killed and left its entry.
    h2.tasks.iter().for_each(AbortHandle::abort);
    until("a closed port", || {
        std::net::TcpStream::connect(h2.address).is_err()
    })
    .await;
    assert_eq!(shop.dial("cart@h2").await.unwrap_err().cause, Cause::Unreachable);
}

#[tokio::test]
async fn the_short_way_has_the_same_checks() {
    let world = World::new();
    let h1 = world.host("h1", "127.0.0.2").await;
    let (shop, cart) = (h1.node("shop@h1").await, h1.node("cart@h1").await);
    let (mut near, mut far) = shop.link(&cart).await;
    near.write_all(b"x").await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'x');
    let link = &h1.links.snapshot()[0].info;
    assert_eq!((link.direction, link.local_not_after()), (Direction::Local, None));
    assert_eq!(link.remote_spiffe, h1.spiffe("cart"));
    drop((near, far));

    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        world.rule(source, destination, Action::Deny);
        assert_eq!(
            shop.dial("cart@h1").await.unwrap_err().cause,
            Cause::IntentionDenied
        );
        world.rule(source, destination, Action::Allow);
    }
    let (_, reply) = connect(&shop.dist, &Secret::generate().unwrap(), "cart@h1").await;
    assert_eq!(refused(reply).cause, Cause::BadSecret);
    let (mut spoof, _) = shop.connect("cart@h1").await;
    spoof.write_all(&name_message("other@h1")).await.unwrap();
    assert_eq!(rest(&mut spoof).await, refusal_status());
    assert_eq!(h1.refusals(Cause::IdentityMismatch), 1);
}

#[tokio::test]
async fn either_end_may_close_its_direction_first() {
    let world = World::new();
    let (h1, _h2, shop, cart) = pair(&world).await;
    for swap in [false, true] {
        let (near, far) = shop.link(&cart).await;
        let (mut first, mut second) = if swap { (far, near) } else { (near, far) };
        first.write_all(b"last words").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(rest(&mut second).await, b"last words");
        second.write_all(b"still heard").await.unwrap();
        second.shutdown().await.unwrap();
        assert_eq!(rest(&mut first).await, b"still heard");
        until("no links", || h1.links.snapshot().is_empty()).await;
    }
}

#[tokio::test]
async fn sixty_four_mebibytes_arrive_as_they_were_sent() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 64;
    let world = World::new();
    let (_h1, _h2, shop, cart) = pair(&world).await;
    let (near, far) = shop.link(&cart).await;
    let mut pattern = vec![0; CHUNK];
    getrandom::fill(&mut pattern).unwrap();
    let pattern = Arc::new(pattern);
    let send = |mut stream: UnixStream, pattern: Arc<Vec<u8>>| async move {
        for i in 0..CHUNKS {
            let mut chunk = pattern.to_vec();
            chunk.rotate_left(i);
            stream.write_all(&chunk).await.unwrap();
        }
        stream.shutdown().await.unwrap();
        stream
    };
    let receive = |mut stream: UnixStream, pattern: Arc<Vec<u8>>| async move {
        for i in 0..CHUNKS {
            let (mut chunk, mut wanted) = (vec![0; CHUNK], pattern.to_vec());
            wanted.rotate_left(i);
            stream.read_exact(&mut chunk).await.unwrap();
            assert!(chunk == wanted, "chunk {i} differs");
        }
        assert!(rest(&mut stream).await.is_empty());
        stream
    };
    let both = async { tokio::join!(send(near, pattern.clone()), receive(far, pattern.clone())) };
    let (near, far) = soon("64 MiB there", both).await;
    drop((near, far));
    let (near, far) = shop.link(&cart).await;
    soon("64 MiB back", async {
        tokio::join!(send(far, pattern.clone()), receive(near, pattern))
    })
    .await;
}

#[tokio::test]
async fn a_cut_tells_the_owner_and_ends_both_halves() {
    let world = World::new();
    let (h1, h2, shop, cart) = pair(&world).await;
    let mut events = h1.links.subscribe(1);
    let (mut near, mut far) = shop.link(&cart).await;
    assert_eq!(h1.proxy.reauthorize().await, 0);
    world.rule("shop", "cart", Action::Deny);
    assert_eq!(h1.proxy.reauthorize().await, 1);
    let event = soon("the event", events.recv()).await.unwrap();
    assert_eq!(event.cause, Cause::IntentionDenied);
    assert!(rest(&mut far).await.is_empty());
    assert!(
        rest(&mut near).await.is_empty(),
        "after the grace the near end is closed as well"
    );
    until("no links", || {
        h1.links.snapshot().is_empty() && h2.links.snapshot().is_empty()
    })
    .await;
}

#[tokio::test]
async fn the_end_whose_agent_hears_of_a_rule_later_is_told_all_the_same() {
    let world = World::new();
    let patient = Settings {
        cut_grace: PATIENCE,
        ..settings()
    };
    let h1 = world.host("h1", "127.0.0.2").await;
    let h2 = world.host_with("h2", "127.0.0.3", patient).await;
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let mut events = h2.links.subscribe(1);
    let (near, _far) = shop.link(&cart).await;
    world.rule("shop", "cart", Action::Deny);
    assert_eq!(h1.proxy.reauthorize().await, 1);
    drop(near);
    until("the first agent is done with it", || {
        h1.links.snapshot().is_empty()
    })
    .await;
    assert_eq!(h2.proxy.reauthorize().await, 1);
    let event = soon("the event", events.recv()).await.unwrap();
    assert_eq!(event.cause, Cause::IntentionDenied);
}

#[tokio::test]
async fn links_outlive_rules_that_cannot_be_read() {
    let world = World::new();
    let (h1, _h2, shop, cart) = pair(&world).await;
    let (near, far) = shop.link(&cart).await;
    std::fs::write(world.mesh_dir().join("rules.json"), "{").unwrap();
    assert_eq!(h1.proxy.reauthorize().await, 0);
    assert_eq!(h1.links.snapshot().len(), 1);
    drop((near, far));
}

#[tokio::test]
async fn links_of_an_instance_that_is_gone_are_cut_and_those_of_one_that_never_was_stay() {
    let world = World::new();
    let watchful = Settings {
        instance_look: Duration::from_millis(20),
        instance_gone_after: Duration::from_millis(300),
        ..settings()
    };
    let h1 = world.host_with("h1", "127.0.0.2", watchful.clone()).await;
    let h2 = world.host_with("h2", "127.0.0.3", watchful).await;
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let keep = [&h1, &h2].map(|host| tokio::spawn(host.proxy.clone().keep_present()));
    let (mut near, mut far) = shop.link(&cart).await;
    let mut events = h1.links.subscribe(1);
    tokio::time::sleep(Duration::from_millis(100)).await;

    // No answer is no absence.
    let file = world.mesh_dir().join("agents/h2.json");
    let entry = std::fs::read(&file).unwrap();
    std::fs::write(&file, "{").unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    near.write_all(b"x").await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'x');
    std::fs::write(&file, entry).unwrap();

    // Its agent holds the link, and the catalogue has it no more. On a busy machine nobody may have seen it there
    // before, and then nobody misses it.
    let instance = h2.local.by_id("cart@h2").unwrap().instance.clone();
    let event = soon("the cut", async {
        loop {
            let began = std::time::Instant::now();
            h2.mesh.deregister("cart@h2").await.unwrap();
            if let Ok(event) = timeout(Duration::from_secs(5), events.recv()).await {
                assert!(began.elapsed() >= Duration::from_millis(300));
                break event.unwrap();
            }
            h2.mesh.register(&Entry::plain(instance.clone())).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
    .await;
    assert_eq!(event.cause, Cause::NoSuchNode);
    assert!(
        event.text.contains("cart@h2") && event.text.contains("300ms"),
        "{}",
        event.text
    );
    rest(&mut far).await;
    keep.iter().for_each(|task| task.abort());
}

/// An idle link between agents has a running keepalive timer at both ends: `/proc/net/tcp` shows it as timer 2 (proc(5)).
#[tokio::test]
async fn both_agents_look_whether_the_other_host_lives() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let (shop, cart) = (h1.node("shop@h1").await, h2.node("cart@h2").await);
    let (_near, _far) = shop.link(&cart).await;
    // 127.0.0.3:PORT as the table has it: little-endian address, port in hexadecimal.
    let agent = format!("0300007F:{:04X}", h2.address.port());
    let timers = || -> Vec<String> {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let lines = table.lines().skip(1).map(fields);
        let ends = lines.filter(|f| f[3] == "01" && (f[1] == agent || f[2] == agent));
        ends.map(|f| f[5].split(':').next().unwrap().to_owned()).collect()
    };
    // Retransmission has the timer while bytes are on their way.
    until("idle ends", || timers() == ["02", "02"]).await;
}

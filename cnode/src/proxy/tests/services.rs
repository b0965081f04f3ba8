//! RPC and plain connections through upstreams.
use std::os::unix::fs::PermissionsExt;

use super::certificates::{ask, request, secure};
use super::*;

/// A service that says its name, then repeats what it hears.
pub(super) fn echo(listener: TcpListener, name: &'static str) -> AbortHandle {
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (mut reader, mut writer) = stream.into_split();
            tokio::spawn(async move {
                writer.write_all(name.as_bytes()).await?;
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    })
    .abort_handle()
}

pub(super) async fn tcp(host: &Host, id: &'static str) -> (SocketAddr, AbortHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    host.service(id, "echo", Endpoint::Tcp(address)).await;
    (address, echo(listener, id))
}

pub(super) fn upstream(host: &Host, instance: Option<&str>) -> Upstream {
    Upstream {
        source: ServiceName::new("web").unwrap(),
        target: ServiceName::new("echo").unwrap(),
        instance: instance.map(str::to_owned),
        via: None,
        purpose: Purpose::Rpc,
        listen: Listen::Uds(host.dir.join("up.sock")),
        uid: rustix::process::geteuid().as_raw(),
        owner: 2,
    }
}

pub(super) async fn greeting(host: &Host) -> String {
    let mut stream = UnixStream::connect(host.dir.join("up.sock")).await.unwrap();
    let _ = stream.shutdown().await;
    String::from_utf8(rest(&mut stream).await).unwrap()
}

#[tokio::test]
async fn a_service_is_reached_through_a_local_socket() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    // One direction is enough, and only the server's agent decides it.
    world.rule("echo", "web", Action::Deny);
    let handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let path = h1.dir.join("up.sock");
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut seen = [0; 11];
    stream.read_exact(&mut seen).await.unwrap();
    assert_eq!(&seen, b"echo-ahello");
    let (out, inn) = (h1.links.snapshot().remove(0), h2.links.snapshot().remove(0));
    assert_eq!(
        (out.info.purpose, out.info.remote.as_str()),
        (Purpose::Rpc, "echo-a")
    );
    assert_eq!(
        (inn.info.remote.as_str(), inn.info.remote_spiffe),
        ("web", h1.spiffe("web"))
    );
    assert_eq!(
        h1.proxy.reauthorize().await + h2.proxy.reauthorize().await,
        0,
        "the way back is nobody's business"
    );

    world.rule("web", "echo", Action::Deny);
    assert_eq!(h2.proxy.reauthorize().await, 1);
    rest(&mut stream).await;
    assert_eq!(greeting(&h1).await, "");
    assert_eq!(
        h1.links.refusal_of_target("echo").unwrap().refusal.cause,
        Cause::IntentionDenied
    );
    assert_eq!(h2.refusals(Cause::IntentionDenied), 1);

    drop(handle);
    assert!(!path.exists());
    until("no links", || h1.links.snapshot().is_empty()).await;
}

#[tokio::test]
async fn a_client_whose_pair_is_denied_is_closed_at_once() {
    let world = World::new();
    let patient = Settings {
        cut_grace: PATIENCE,
        ..settings()
    };
    let h1 = world.host_with("h1", "127.0.0.2", patient).await;
    let h2 = world.host("h2", "127.0.0.3").await;
    tcp(&h2, "echo-a").await;
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
    stream.read_exact(&mut [0; 6]).await.unwrap();
    world.rule("web", "echo", Action::Deny);
    let began = std::time::Instant::now();
    assert_eq!(h1.proxy.reauthorize().await, 1);
    rest(&mut stream).await;
    assert!(began.elapsed() < PATIENCE / 2, "it waits for no reason");
}

#[tokio::test]
async fn any_instance_that_answers_will_do() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    assert_eq!(greeting(&h1).await, "");
    assert_eq!(
        h1.links.refusal_of_target("echo").unwrap().refusal.cause,
        Cause::NoSuchService
    );
    // A node of the same service is no RPC server.
    let _node = h2.node("echo@h2").await;
    assert_eq!(greeting(&h1).await, "");

    let (_, a) = tcp(&h2, "echo-a").await;
    let (address, _b) = tcp(&h2, "echo-b").await;
    a.abort();
    // Its port may be closed a moment later than its task.
    let gone = h2.local.by_id("echo-a").unwrap().endpoint.clone();
    let Endpoint::Tcp(gone) = gone else {
        panic!("{gone:?}")
    };
    until("a closed port", || std::net::TcpStream::connect(gone).is_err()).await;
    assert_ne!(gone, address);
    for _ in 0..8 {
        assert_eq!(greeting(&h1).await, "echo-b");
    }
    // The nearest comes first, without TLS and with the same rule.
    tcp(&h1, "echo-c").await;
    for _ in 0..4 {
        assert_eq!(greeting(&h1).await, "echo-c");
    }
    world.rule("web", "echo", Action::Deny);
    let before = h1.refusals(Cause::IntentionDenied);
    assert_eq!(greeting(&h1).await, "");
    assert_eq!(h1.refusals(Cause::IntentionDenied), before + 1);
}

#[tokio::test]
async fn links_are_spread_over_the_instances_and_who_fails_is_left_alone() {
    let world = World::new();
    let (h1, h2, h3) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
        world.host("h3", "127.0.0.4").await,
    );
    let (a, b) = (tcp(&h2, "echo-a").await, tcp(&h3, "echo-b").await);
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let mut live = Vec::new();
    for _ in 0..8 {
        let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
        let mut name = [0; 6];
        soon("a greeting", stream.read_exact(&mut name)).await.unwrap();
        live.push((String::from_utf8(name.to_vec()).unwrap(), stream));
    }
    // Each went where there were fewer.
    let to = |id: &str| live.iter().filter(|(name, _)| name == id).count();
    assert_eq!((to("echo-a"), to("echo-b")), (4, 4));
    drop(live);
    until("no links", || h1.links.snapshot().is_empty()).await;

    // Its agent is gone: a few find that out, without losing their own link, and then nobody tries any more.
    h3.tasks.iter().for_each(AbortHandle::abort);
    until("a closed port", || {
        std::net::TcpStream::connect(h3.address).is_err()
    })
    .await;
    for _ in 0..32 {
        assert_eq!(greeting(&h1).await, "echo-a");
    }
    let target = ServiceName::new("echo").unwrap();
    let order = h1.proxy.candidates(&target, None).await.unwrap();
    assert_eq!(
        order.iter().map(|i| i.id.as_str()).collect::<Vec<_>>(),
        ["echo-a", "echo-b"]
    );
    assert_eq!(h1.all_refusals(), 0);
    drop((a, b));
}

#[tokio::test]
async fn one_instance_can_be_asked_for() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h1, "echo-a").await;
    tcp(&h2, "echo-b").await;
    let handle = h1.proxy.upstream(upstream(&h1, Some("echo-b"))).unwrap();
    assert_eq!(greeting(&h1).await, "echo-b");
    drop(handle);
    let _handle = h1.proxy.upstream(upstream(&h1, Some("echo-x"))).unwrap();
    assert_eq!(greeting(&h1).await, "");
}

#[tokio::test]
async fn an_upstream_belongs_to_its_uid_and_a_path_to_one() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    let mut strangers = upstream(&h1, None);
    strangers.uid += 1;
    let _handle = h1.proxy.upstream(strangers).unwrap();
    assert_eq!(greeting(&h1).await, "");
    assert_eq!(h1.refusals(Cause::NotPermitted), 1);
    assert!(h1.proxy.upstream(upstream(&h1, None)).is_err());
    assert_eq!(greeting(&h1).await, "", "the first one is still there");
}

#[tokio::test]
async fn a_unix_service_and_a_claimed_node() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let _shop = h1.node("shop@h1").await;
    let path = h2.dir.join("service.sock");
    let listener = UnixListener::bind(&path).unwrap();
    h2.service("files-1", "files", Endpoint::Uds(path)).await;
    let leaf = h1.identity("shop").await;
    let mut stream = secure(&h2, &leaf, "files").await.unwrap();
    let asked = request(Purpose::Tcp, "files", "files-1", "shop@h1");
    assert_eq!(ask(&mut stream, &asked).await.unwrap(), Ok(()));
    stream.write_all(b"no frame goes ahead").await.unwrap();
    stream.shutdown().await.unwrap();
    let (mut near, _) = soon("a connection", listener.accept()).await.unwrap();
    assert_eq!(rest(&mut near).await, b"no frame goes ahead");
    // A node that is claimed without need must be proven all the same.
    let mut stream = secure(&h2, &leaf, "files").await.unwrap();
    let refusal = ask(&mut stream, &request(Purpose::Tcp, "files", "", "cart@h2"))
        .await
        .unwrap();
    assert_eq!(refusal.unwrap_err().cause, Cause::IdentityMismatch);
}

fn on_port(host: &Host) -> Upstream {
    Upstream {
        listen: Listen::Tcp("127.0.0.1:0".parse().unwrap()),
        ..upstream(host, None)
    }
}

fn port(handle: &UpstreamHandle) -> SocketAddr {
    match handle.address() {
        Listen::Tcp(address) => *address,
        other => panic!("{other:?}"),
    }
}

async fn echoed(stream: &mut TcpStream) {
    stream.write_all(b"hello").await.unwrap();
    let mut seen = [0; 5];
    soon("an echo", stream.read_exact(&mut seen)).await.unwrap();
    assert_eq!(&seen, b"hello");
}

async fn greeted(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut seen = [0; 6];
    soon("a greeting", stream.read_exact(&mut seen)).await.unwrap();
    assert_eq!(&seen, b"echo-a");
    stream
}

#[tokio::test]
async fn an_upstream_can_be_a_loopback_port() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    for ip in ["127.0.0.1:0", "[::1]:0"] {
        let upstream = Upstream {
            listen: Listen::Tcp(ip.parse().unwrap()),
            ..on_port(&h1)
        };
        let handle = h1.proxy.upstream(upstream).unwrap();
        assert_ne!(port(&handle).port(), 0);
        let mut stream = greeted(port(&handle)).await;
        echoed(&mut stream).await;
        assert_eq!(h1.links.snapshot()[0].info.local, "web");
        drop(handle);
        assert!(rest(&mut stream).await.is_empty());
        until("no links", || h1.links.snapshot().is_empty()).await;
    }
    let everywhere = Upstream {
        listen: Listen::Tcp("0.0.0.0:0".parse().unwrap()),
        ..on_port(&h1)
    };
    assert_eq!(
        h1.proxy.upstream(everywhere).unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
}

async fn taken(listener: &TcpListener) -> TcpStream {
    let (stream, _) = soon("a connection", listener.accept()).await.unwrap();
    stream
}

/// Reads to the end, and says how that came.
async fn end(stream: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    let mut seen = Vec::new();
    let end = soon("its end", stream.read_to_end(&mut seen)).await;
    (seen, end.map(drop))
}

fn broken(end: io::Result<()>) -> bool {
    end.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

/// Breaks it off, as the kernel does for a program that is gone.
fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

#[tokio::test]
async fn nobody_takes_a_part_for_the_whole() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    let files = TcpListener::bind("127.0.0.1:0").await.unwrap();
    h2.service("echo-a", "echo", Endpoint::Tcp(files.local_addr().unwrap()))
        .await;
    // By way of both agents, and by one alone.
    for dialler in [&h1, &h2] {
        let handle = dialler.proxy.upstream(on_port(dialler)).unwrap();
        let pair = async || {
            let mut client = TcpStream::connect(port(&handle)).await.unwrap();
            let mut service = taken(&files).await;
            client.write_all(b"part").await.unwrap();
            service.read_exact(&mut [0; 4]).await.unwrap();
            service.write_all(b"part").await.unwrap();
            client.read_exact(&mut [0; 4]).await.unwrap();
            (client, service)
        };
        let (client, mut service) = pair().await;
        reset(client);
        assert!(broken(end(&mut service).await.1), "of a client that is gone");

        let (mut client, service) = pair().await;
        reset(service);
        assert!(broken(end(&mut client).await.1), "of a service that is gone");

        let (mut client, mut service) = pair().await;
        assert_ne!(h2.links.cut_all(Cause::Unreachable, "the agent ends"), 0);
        let ends = (end(&mut client).await, end(&mut service).await);
        assert!(broken(ends.0.1) && broken(ends.1.1), "of a link that was cut");

        // In order all the same, and the last bytes come through.
        let (mut client, mut service) = pair().await;
        let whole = vec![7; 1 << 20];
        let upload = async {
            client.write_all(&whole).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let ((), (seen, ended)) = tokio::join!(upload, end(&mut service));
        assert!(ended.is_ok() && seen == whole);
        service.write_all(b"bye").await.unwrap();
        drop(service);
        let (seen, ended) = end(&mut client).await;
        assert!(ended.is_ok() && seen == b"bye");
    }
}

/// As a web server does that is sent too much.
#[tokio::test]
async fn what_a_service_says_last_is_heard_though_it_takes_no_more() {
    let world = World::new();
    let h2 = world.host("h2", "127.0.0.3").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    h2.service("echo-a", "echo", Endpoint::Tcp(listener.local_addr().unwrap()))
        .await;
    let handle = h2.proxy.upstream(on_port(&h2)).unwrap();
    for _ in 0..20 {
        let client = TcpStream::connect(port(&handle)).await.unwrap();
        let mut service = taken(&listener).await;
        let (mut reader, mut writer) = client.into_split();
        let upload = tokio::spawn(async move { while writer.write_all(&[0; 4096]).await.is_ok() {} });
        service.read_exact(&mut [0; 100_000]).await.unwrap();
        service.write_all(b"413").await.unwrap();
        drop(service);
        let mut seen = Vec::new();
        let _ = soon("its end", reader.read_to_end(&mut seen)).await;
        assert_eq!(seen, b"413");
        upload.await.unwrap();
    }
}

/// As another user, when this one may become that.
fn dial_as(uid: u32, address: SocketAddr) -> Vec<u8> {
    use std::os::unix::process::CommandExt;
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; head -c 1 <&3",
        address.ip(),
        address.port()
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .uid(uid)
        .output();
    output.unwrap().stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loopback_port_serves_its_user_and_root_alone() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    let own = rustix::process::geteuid().as_raw();
    let of_another = Upstream {
        uid: own + 4242,
        ..on_port(&h1)
    };
    let handle = h1.proxy.upstream(of_another).unwrap();
    if own == 0 {
        // Root may use every port, so somebody else has to be refused.
        greeted(port(&handle)).await;
        let strangers = h1.proxy.upstream(on_port(&h1)).unwrap();
        let address = port(&strangers);
        let heard = tokio::task::spawn_blocking(move || dial_as(4242, address))
            .await
            .unwrap();
        assert_eq!(heard, b"");
    } else {
        let mut stream = TcpStream::connect(port(&handle)).await.unwrap();
        assert!(rest(&mut stream).await.is_empty());
    }
    until("the log", || h1.refusals(Cause::NotPermitted) == 1).await;
}

#[tokio::test]
async fn an_upstream_can_be_closed_without_its_links() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    let handle = h1.proxy.upstream(on_port(&h1)).unwrap();
    let address = port(&handle);
    let mut stream = greeted(address).await;
    let links = handle.close(false).expect("links that go on");
    until("a closed port", || std::net::TcpStream::connect(address).is_err()).await;
    echoed(&mut stream).await;
    assert_eq!(h1.links.snapshot()[0].info.owners, [2], "owned as before");
    assert!(!links.is_finished());
    // Under the rules as before.
    world.rule("web", "echo", Action::Deny);
    assert_eq!(h1.proxy.reauthorize().await, 1);
    assert!(rest(&mut stream).await.is_empty());
    until("the end of all", || links.is_finished()).await;
    world.rule("web", "echo", Action::Allow);

    // And until its owner lets go of them.
    let handle = h1.proxy.upstream(on_port(&h1)).unwrap();
    let mut stream = greeted(port(&handle)).await;
    let links = handle.close(false);
    echoed(&mut stream).await;
    drop(links);
    assert!(rest(&mut stream).await.is_empty());

    // With a cut they end at once; a Unix socket goes with its file.
    let handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    let mut stream = UnixStream::connect(h1.dir.join("up.sock")).await.unwrap();
    stream.read_u8().await.unwrap();
    assert!(handle.close(true).is_none());
    assert!(!h1.dir.join("up.sock").exists());
    rest(&mut stream).await;
    until("no links", || h1.links.snapshot().is_empty()).await;
}

//! Envoy from files: client, Envoy, mutual TLS, Envoy, server.

use std::{
    io,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::{
    super::{
        files::Files,
        view::{Sources, Viewer},
        *,
    },
    client::{Client, leaf},
    shaky::Shaky,
    *,
};
use crate::agent::sidecar::envoy;

pub(super) const GREETING: &[u8] = b"hello";
/// What Envoy gives a handshake and a connection, less what differs between clocks.
pub(super) const ENVOY_TIME: Duration = Duration::from_millis(4900);

fn envoy_program() -> PathBuf {
    program("MESHX_ENVOY", "envoy/envoy", "scripts/get-envoy")
}

impl World {
    fn envoys(&self) -> Sidecars {
        self.sidecars(Settings {
            envoy: envoy_program(),
            ..self.settings()
        })
    }
}

/// A server that speaks first and then says everything back, and how often it was dialled.
struct Server {
    address: SocketAddr,
    dialled: Arc<AtomicUsize>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let dialled = Arc::new(AtomicUsize::new(0));
        let count = dialled.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    stream.write_all(GREETING).await?;
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        Self { address, dialled }
    }

    fn dialled(&self) -> usize {
        self.dialled.load(Ordering::SeqCst)
    }
}

/// A service behind an Envoy, registered.
struct Side {
    public: SocketAddr,
    server: Server,
    handle: SidecarHandle,
    /// Kept, so that lines have somewhere to go.
    _events: Events,
}

impl Side {
    async fn start(world: &World, sidecars: &Sidecars, name: &str, upstreams: Vec<SidecarUpstream>) -> Self {
        let server = Server::start().await;
        let spec = SidecarSpec {
            upstreams,
            ..SidecarSpec::new(
                format!("{name}-1"),
                service(name),
                SidecarKind::Envoy,
                server.address,
                anywhere(),
            )
        };
        let public = spec.public;
        world.register(name, public).await;
        let (sender, events) = events();
        let handle = sidecars.start(spec, sender).await.unwrap();
        // Whoever runs already is to let it in.
        sidecars.rules_changed();
        until("the public listener", || {
            std::net::TcpStream::connect(public).is_ok()
        })
        .await;
        Self {
            public,
            server,
            handle,
            _events: events,
        }
    }
}

fn upstream(name: &str) -> SidecarUpstream {
    SidecarUpstream {
        target: service(name),
        bind: anywhere(),
    }
}

/// A connection through an upstream that was greeted; none when it was refused.
async fn greeted(bind: SocketAddr) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(bind).await.ok()?;
    greets(&mut stream).await.then_some(stream)
}

async fn greets(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut greeting = [0; GREETING.len()];
    soon("a greeting or the end", stream.read_exact(&mut greeting))
        .await
        .is_ok()
        && greeting == GREETING
}

/// Until a connection through an upstream is greeted, as when rules or instances are new.
async fn connected(bind: SocketAddr) -> TcpStream {
    soon("a connection that is greeted", async {
        loop {
            match greeted(bind).await {
                Some(stream) => return stream,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await
}

/// Until it is refused.
async fn refused(bind: SocketAddr) {
    soon("a refusal", async {
        while greeted(bind).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Whether it still says back what it is told.
async fn echoes(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), text: &[u8]) -> io::Result<()> {
    stream.write_all(text).await?;
    let mut back = vec![0; text.len()];
    soon("an echo", stream.read_exact(&mut back)).await?;
    assert_eq!(back, text);
    Ok(())
}

#[tokio::test]
async fn two_envoys_carry_a_service() {
    let world = World::new();
    let sidecars = world.envoys();
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let way = upstream("cart");
    let shop = Side::start(&world, &sidecars, "shop", vec![way.clone()]).await;
    let mut stream = connected(way.bind).await;
    let mut block = vec![0; 1 << 20];
    getrandom::fill(&mut block).unwrap();
    let (mut read, mut write) = stream.split();
    let mut back = vec![0; block.len()];
    let (sent, got) = tokio::join!(write.write_all(&block), soon("1 MiB", read.read_exact(&mut back)));
    sent.unwrap();
    got.unwrap();
    assert!(back == block);
    // The end of one direction leaves the other open.
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon("the rest", stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last");

    // Another upstream, later.
    let second = upstream("shop");
    cart.handle.set_upstreams(vec![second.clone()]).unwrap();
    connected(second.bind).await;
    soon("stop", cart.handle.stop()).await;
    soon("stop", shop.handle.stop()).await;
    assert!(std::net::TcpStream::connect(cart.public).is_err());
    assert!(std::net::TcpStream::connect(way.bind).is_err());
}

#[tokio::test]
async fn a_denial_cuts_live_connections_of_that_pair_alone_and_an_allowance_mends() {
    let world = World::new();
    let sidecars = world.envoys();
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let (from_shop, from_bank) = (upstream("cart"), upstream("cart"));
    let _shop = Side::start(&world, &sidecars, "shop", vec![from_shop.clone()]).await;
    let _bank = Side::start(&world, &sidecars, "bank", vec![from_bank.clone()]).await;
    let mut denied = connected(from_shop.bind).await;
    let mut other = connected(from_bank.bind).await;

    world.rule("shop", "cart", Action::Deny);
    sidecars.rules_changed();
    let mut end = [0];
    let read = soon("the cut", denied.read(&mut end)).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    refused(from_shop.bind).await;
    let before = cart.server.dialled();
    assert!(greeted(from_shop.bind).await.is_none());
    assert_eq!(
        cart.server.dialled(),
        before,
        "a denied peer must not reach the application"
    );

    // Long after everything that the denial changed has drained.
    tokio::time::sleep(Duration::from_secs(2)).await;
    echoes(&mut other, b"still here").await.unwrap();
    world.rule("shop", "cart", Action::Allow);
    // Not told: it is seen all the same.
    connected(from_shop.bind).await;
    echoes(&mut other, b"and here").await.unwrap();

    // Nobody at all.
    world.rule("*", "cart", Action::Deny);
    world.rule("shop", "cart", Action::Deny);
    sidecars.rules_changed();
    let read = soon("the cut", other.read(&mut end)).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    refused(from_bank.bind).await;
    refused(from_shop.bind).await;
    let identity = world.mesh.identity(&service("shop")).await.unwrap();
    let refusal = Client::new(Some(&identity)).dial(cart.public).await.unwrap_err();
    assert!(
        refusal.contains("alert"),
        "an empty list must not mean everybody: {refusal}"
    );
}

#[tokio::test]
async fn who_is_not_proven_and_allowed_is_refused_before_the_application_is_dialled() {
    let (world, stranger) = (World::new(), World::new());
    let sidecars = world.envoys();
    for name in ["shop", "evil"] {
        world.register(name, anywhere()).await;
    }
    world.rule("evil", "cart", Action::Deny);
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let uri = |name: &str| world.mesh.spiffe(&service(name)).unwrap().to_string();
    let shop = Client::new(Some(&leaf(&world, &world, &uri("shop"))));
    shop.dial(cart.public).await.unwrap();

    let before = cart.server.dialled();
    let elsewhere = uri("shop").replacen("spiffe://", "spiffe://x", 1);
    let two_names = leaf(&world, &world, &format!("{} {}", uri("shop"), uri("evil")));
    let two_names = Client::new(Some(&two_names));
    for (what, identity) in [
        ("no certificate", None),
        ("another authority", Some(leaf(&world, &stranger, &uri("shop")))),
        ("a denied service", Some(leaf(&world, &world, &uri("evil")))),
        (
            "a service that nobody knows",
            Some(leaf(&world, &world, &uri("new"))),
        ),
        ("another trust domain", Some(leaf(&world, &world, &elsewhere))),
        (
            "a longer name",
            Some(leaf(&world, &world, &format!("{}p", uri("shop")))),
        ),
        ("the name of nobody", Some(leaf(&world, &world, "spiffe://"))),
    ] {
        let refusal = Client::new(identity.as_ref())
            .dial(cart.public)
            .await
            .unwrap_err();
        assert!(
            refusal.contains("alert"),
            "the handshake must refuse {what}: {refusal}"
        );
        assert_eq!(cart.server.dialled(), before, "{what}");
    }
    // One of them is allowed, so the handshake takes it. There is no filter chain for two.
    two_names.dial(cart.public).await.unwrap_err();
    assert_eq!(cart.server.dialled(), before);

    // Who leaves at once may leave a connection behind that was meant for it.
    for _ in 0..50 {
        drop(shop.connect(cart.public).await.unwrap());
        two_names.dial(cart.public).await.unwrap_err();
        shop.dial(cart.public).await.unwrap();
    }
}

#[tokio::test]
async fn no_session_is_taken_up_again() {
    let world = World::new();
    let sidecars = world.envoys();
    world.register("shop", anywhere()).await;
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let identity = world.mesh.identity(&service("shop")).await.unwrap();
    let shop = Client::new(Some(&identity));
    for _ in 0..3 {
        let stream = shop.dial(cart.public).await.unwrap();
        assert_eq!(
            stream.get_ref().1.handshake_kind(),
            Some(rustls::HandshakeKind::Full)
        );
    }
}

#[tokio::test]
async fn a_server_that_is_another_service_is_not_believed() {
    let world = World::new();
    let sidecars = world.envoys();
    let bank = Side::start(&world, &sidecars, "bank", Vec::new()).await;
    // The catalogue says that cart is where bank answers.
    world.register("cart", bank.public).await;
    let (right, wrong) = (upstream("bank"), upstream("cart"));
    let shop = Side::start(&world, &sidecars, "shop", vec![right.clone(), wrong.clone()]).await;
    connected(right.bind).await;
    let before = bank.server.dialled();
    assert!(greeted(wrong.bind).await.is_none());
    assert_eq!(bank.server.dialled(), before);
    shop.handle.stop().await;
}

#[tokio::test]
async fn a_server_whose_certificate_another_authority_signed_is_not_believed() {
    let (world, stranger) = (World::new(), World::new());
    let shaky = Shaky::new(&world);
    let uri = world.mesh.spiffe(&service("cart")).unwrap().to_string();
    let forged = leaf(&world, &stranger, &uri);
    shaky.answers().identity.insert(service("cart"), Arc::new(forged));
    let settings = Settings {
        envoy: envoy_program(),
        ..world.settings()
    };
    let sidecars = Sidecars::new(shaky, world.dir(), settings).unwrap();
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let ways = [upstream("cart"), upstream("bank")];
    let _shop = Side::start(&world, &sidecars, "shop", ways.to_vec()).await;
    let _bank = Side::start(&world, &sidecars, "bank", Vec::new()).await;
    connected(ways[1].bind).await;
    assert!(greeted(ways[0].bind).await.is_none());
    assert_eq!(cart.server.dialled(), 0);
}

#[tokio::test]
async fn new_certificates_and_roots_are_used_and_no_connection_fails_meanwhile() {
    let (world, next) = (World::new(), World::new());
    let shaky = Shaky::new(&world);
    let settings = Settings {
        envoy: envoy_program(),
        ..world.settings()
    };
    let sidecars = Sidecars::new(shaky.clone(), world.dir(), settings).unwrap();
    let cart = Side::start(&world, &sidecars, "cart", Vec::new()).await;
    let way = upstream("cart");
    let _shop = Side::start(&world, &sidecars, "shop", vec![way.clone()]).await;
    let mut long = connected(way.bind).await;
    let uri = |name: &str| world.mesh.spiffe(&service(name)).unwrap().to_string();
    let issue = |authority: &World| {
        for name in ["cart", "shop"] {
            let identity = leaf(&world, authority, &uri(name));
            shaky.answers().identity.insert(service(name), Arc::new(identity));
        }
        sidecars.rules_changed();
    };
    let (old_root, new_root) = (
        world.mesh.roots().await.unwrap(),
        next.mesh.roots().await.unwrap(),
    );
    let client = |authority| Client::new(Some(&leaf(&world, authority, &uri("shop"))));
    let (mut shown, with_old) = (Vec::new(), client(&world));
    shown.push(with_old.leaf_of(cart.public).await);
    let mut new_leaf = async |client: &Client| {
        soon("the new certificate", async {
            let before = shown.len();
            while shown.len() == before {
                let began = Instant::now();
                let failed = greeted(way.bind).await.is_none();
                // On a machine that is too busy Envoy's own limits strike.
                assert!(
                    !failed || began.elapsed() >= ENVOY_TIME,
                    "a new connection failed"
                );
                let leaf = client.leaf_of(cart.public).await;
                if !shown.contains(&leaf) {
                    shown.push(leaf);
                }
            }
        })
        .await;
    };
    for _ in 0..5 {
        issue(&world);
        new_leaf(&with_old).await;
    }

    // Another authority, by Consul's steps: both are believed, then it signs, then the old one is gone.
    let with_new = client(&next);
    with_new.dial(cart.public).await.unwrap_err();
    shaky.answers().roots = Some([old_root, new_root.clone()].concat());
    sidecars.rules_changed();
    soon("belief in the new root", async {
        while with_new.dial(cart.public).await.is_err() {}
    })
    .await;
    issue(&next);
    new_leaf(&with_old).await;
    shaky.answers().roots = Some(new_root);
    sidecars.rules_changed();
    soon("disbelief in the old root", async {
        while with_old.dial(cart.public).await.is_ok() {}
    })
    .await;
    assert!(greeted(way.bind).await.is_some());
    echoes(&mut long, b"still here").await.unwrap();
}

#[tokio::test]
async fn envoy_itself_accepts_what_is_rendered() {
    let world = World::new();
    for name in ["shop", "cart"] {
        world.register(name, anywhere()).await;
    }
    let dir = world.temp.path().join("rendered");
    let mut files = Files::open(&dir).unwrap();
    let spec = SidecarSpec {
        upstreams: vec![upstream("cart"), upstream("nobody")],
        ..SidecarSpec::new(
            "shop-1",
            service("shop"),
            SidecarKind::Envoy,
            anywhere(),
            anywhere(),
        )
    };
    let settings = Settings {
        envoy: envoy_program(),
        ..world.settings()
    };
    let mut viewer = Viewer::new(
        world.mesh.clone(),
        Arc::new(Sources::new(world.mesh.clone())),
        service("shop"),
    );
    let view = viewer.look(&spec.upstreams, Instant::now()).await.unwrap();
    envoy::write(&mut files, &spec, &view).unwrap();
    envoy::program(&settings, &spec, &mut files).unwrap();

    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap() };
    let (listeners, clusters) = (read("listeners.json"), read("clusters.json"));
    let inside = &listeners["resources"][1];
    let uris: Vec<_> = view.allowed.iter().cloned().collect();
    let mut chains: Vec<_> = inside["filter_chains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["name"])
        .collect();
    chains.sort_by_key(|name| name.to_string());
    assert_eq!(chains, uris.iter().collect::<Vec<_>>());
    assert_eq!(uris.len(), 2);
    // Envoy checks listeners and clusters in files only when it serves: put where it checks them before.
    let mut bootstrap = read("bootstrap.json");
    let plain = |of: &Value| -> Vec<Value> {
        let mut all = of["resources"].as_array().unwrap().clone();
        for one in &mut all {
            one.as_object_mut().unwrap().remove("@type");
        }
        all
    };
    bootstrap.as_object_mut().unwrap().remove("dynamic_resources");
    bootstrap["static_resources"] = json!({"listeners": plain(&listeners), "clusters": plain(&clusters)});
    let path = world.temp.path().join("static.json");
    let validate = |bootstrap: &Value| {
        fs::write(&path, bootstrap.to_string()).unwrap();
        Command::new(envoy_program())
            .args(["--mode", "validate", "--config-path"])
            .arg(&path)
            .output()
            .unwrap()
    };
    let output = validate(&bootstrap);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // And it does look.
    bootstrap["static_resources"]["listeners"][0]["no_such_field"] = json!(1);
    assert!(!validate(&bootstrap).status.success());
}

//! A denial, or the end of an instance, that comes while a link is being decided must not miss it, wherever the answer
//! was asked for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use meshx::{
    mesh::{
        Answer, Authorization, Catalogue, Certificates, Decision, Diagnosis, Entry, Finding, Identity,
        Instance, Intentions, Listed, MeshError, Protocol, Registration, ServiceName, SpiffeId, Token,
        embedded::{Action, EmbeddedMesh, MeshDir, Rule, Rules},
    },
    proxy::{
        Listen, Proxy, Settings, Upstream,
        cause::Cause,
        links::{LinkId, LinkTable, Purpose},
        local::{Endpoint, LocalInstance, LocalTable, Secret},
        wire::{Connect, ConnectReply},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    task::AbortHandle,
    time::timeout,
};

/// Beyond any deadline of the data plane.
const PATIENCE: Duration = Duration::from_secs(60);

/// A mesh whose rules change right after its first answer to one pair, before the asker hears that answer.
struct Late {
    mesh: EmbeddedMesh,
    dir: PathBuf,
    proxy: OnceLock<Arc<Proxy>>,
    /// The pair to be denied then.
    denied: Mutex<Option<(&'static str, &'static str)>>,
    local: LocalTable,
    links: LinkTable,
    /// The instance that is gone after the first answer to this pair.
    gone: Mutex<Option<(&'static str, &'static str, &'static str)>>,
    /// The instance that is gone after this node was looked up.
    gone_after_look_up: Mutex<Option<(&'static str, &'static str)>>,
}

impl Late {
    async fn deny_after(&self, source: &SpiffeId, target: &ServiceName) {
        let pair = {
            let mut denied = self.denied.lock().unwrap();
            denied.take_if(|pair| *pair == (source.service().as_ref(), target.as_ref()))
        };
        let Some((source, destination)) = pair else { return };
        let rule = Rule {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            action: Action::Deny,
        };
        Rules::set(&MeshDir::open(&self.dir).unwrap(), rule).unwrap();
        self.proxy.get().unwrap().reauthorize().await;
    }
}

impl Late {
    /// What an agent does when an instance is deregistered.
    fn leave_after(&self, source: &SpiffeId, target: &ServiceName) {
        let mut gone = self.gone.lock().unwrap();
        let now = gone.take_if(|gone| (gone.0, gone.1) == (source.service().as_ref(), target.as_ref()));
        if let Some((_, _, id)) = now {
            self.leave(id);
        }
    }

    fn leave(&self, id: &str) {
        assert!(self.local.remove(id).is_some());
        self.links.cut_instance(id, Cause::NoSuchNode, "gone");
    }
}

impl Authorization for Late {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        let (source, target) = (source.clone(), target.clone());
        Box::pin(async move {
            let answer = self.mesh.authorize(&source, &target).await;
            self.deny_after(&source, &target).await;
            self.leave_after(&source, &target);
            answer
        })
    }

    fn changed(&self) -> Answer<'_, ()> {
        self.mesh.changed()
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        self.mesh.intentions()
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        self.mesh.fix(source, target)
    }
}

impl Certificates for Late {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        self.mesh.identity(service)
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        self.mesh.spiffe(service)
    }

    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()> {
        self.mesh.present_token(service, token)
    }
}

impl Catalogue for Late {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        let node = node.to_owned();
        Box::pin(async move {
            let answer = self.mesh.node(&node).await;
            let gone = self
                .gone_after_look_up
                .lock()
                .unwrap()
                .take_if(|gone| gone.0 == node);
            if let Some((_, id)) = gone {
                self.leave(id);
            }
            answer
        })
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        self.mesh.instances(service)
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        self.mesh.nodes()
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        self.mesh.services()
    }
}

impl Registration for Late {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        self.mesh.register(entry)
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        self.mesh.deregister(id)
    }

    fn passing(&self, id: &str) -> Answer<'_, ()> {
        self.mesh.passing(id)
    }
}

impl Diagnosis for Late {
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>> {
        self.mesh.findings()
    }
}

struct Host {
    name: &'static str,
    dir: PathBuf,
    mesh: Arc<Late>,
    local: LocalTable,
    proxy: Arc<Proxy>,
    address: std::net::SocketAddr,
    tasks: Vec<AbortHandle>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Host {
    async fn start(root: &Path, name: &'static str) -> Self {
        let dir = root.join(name);
        std::fs::create_dir(&dir).unwrap();
        let inbound = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = inbound.local_addr().unwrap();
        let mesh_dir = root.join("mesh");
        let (local, links) = (LocalTable::default(), LinkTable::default());
        let mesh = Arc::new(Late {
            mesh: EmbeddedMesh::open(&mesh_dir, name, vec![name.to_owned()], address).unwrap(),
            dir: mesh_dir,
            proxy: OnceLock::new(),
            denied: Mutex::new(None),
            local: local.clone(),
            links: links.clone(),
            gone: Mutex::new(None),
            gone_after_look_up: Mutex::new(None),
        });
        let proxy = Proxy::new(mesh.clone(), local.clone(), links, Settings::default());
        assert!(mesh.proxy.set(proxy.clone()).is_ok());
        let dist = UnixListener::bind(dir.join("dist.sock")).unwrap();
        let tasks = vec![
            tokio::spawn(proxy.clone().serve_inbound(inbound)).abort_handle(),
            tokio::spawn(proxy.clone().serve_dist(dist)).abort_handle(),
        ];
        Self {
            name,
            dir,
            mesh,
            local,
            proxy,
            address,
            tasks,
        }
    }

    /// Registers an instance: a node when there is an @ in its id.
    async fn register(&self, id: &str) -> (Secret, UnixListener) {
        let path = self.dir.join(id);
        let listener = UnixListener::bind(&path).unwrap();
        let node = id.contains('@');
        let instance = Instance {
            id: id.to_owned(),
            service: if node {
                ServiceName::from_node(id).unwrap()
            } else {
                ServiceName::new(id).unwrap()
            },
            node: node.then(|| id.to_owned()),
            agent: self.name.to_owned(),
            address: self.address,
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        let secret = Secret::generate().unwrap();
        self.local
            .insert(LocalInstance {
                instance: instance.clone(),
                secret: secret.clone(),
                endpoint: if node {
                    Endpoint::NodeSocket(path)
                } else {
                    Endpoint::Uds(path)
                },
                owner: 1,
                uid: rustix::process::geteuid().as_raw(),
                sidecar: None,
            })
            .unwrap();
        self.mesh.register(&Entry::plain(instance.clone())).await.unwrap();
        (secret, listener)
    }

    fn deny_late(&self, source: &'static str, target: &'static str) {
        *self.mesh.denied.lock().unwrap() = Some((source, target));
    }

    /// Dials as a node does, and waits until the link is refused or ended. Panics when it lives.
    async fn dial_in_vain(&self, secret: &Secret, node: &str, target: &str) {
        let mut stream = UnixStream::connect(self.dir.join("dist.sock")).await.unwrap();
        let mut bytes = Vec::new();
        Connect {
            link: LinkId([7; 16]),
            secret: secret.clone(),
            target: target.to_owned(),
        }
        .encode(&mut bytes);
        stream.write_all(&bytes).await.unwrap();
        let len = stream.read_u16().await.unwrap();
        let mut reply = vec![0; len.into()];
        stream.read_exact(&mut reply).await.unwrap();
        if let ConnectReply::Ok { .. } = ConnectReply::decode(&reply).unwrap() {
            let mut name = Vec::from(u16::try_from(15 + node.len()).unwrap().to_be_bytes());
            name.push(b'N');
            name.extend([0; 12]);
            name.extend(u16::try_from(node.len()).unwrap().to_be_bytes());
            name.extend(node.as_bytes());
            stream.write_all(&name).await.unwrap();
        }
        ends(&mut stream).await;
    }
}

async fn ends(stream: &mut UnixStream) {
    let ended = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
    assert!(
        ended.is_ok(),
        "the link lives though its pair is denied or its end is gone"
    );
}

fn keep_open(listener: UnixListener) -> AbortHandle {
    let accept = async move {
        let mut streams = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            streams.push(stream);
        }
    };
    tokio::spawn(accept).abort_handle()
}

#[tokio::test]
async fn a_denial_behind_the_answer_ends_a_link_between_two_agents() {
    for (dialler_asks, pair) in [(true, ("cart", "shop")), (false, ("shop", "cart"))] {
        let root = tempfile::tempdir().unwrap();
        let (h1, h2) = (
            Host::start(root.path(), "h1").await,
            Host::start(root.path(), "h2").await,
        );
        let ((secret, _shop), (_, cart)) = (h1.register("shop@h1").await, h2.register("cart@h2").await);
        keep_open(cart);
        if dialler_asks { &h1 } else { &h2 }.deny_late(pair.0, pair.1);
        h1.dial_in_vain(&secret, "shop@h1", "cart@h2").await;
    }
}

#[tokio::test]
async fn a_denial_behind_the_answer_ends_a_link_within_one_agent() {
    for pair in [("cart", "shop"), ("shop", "cart")] {
        let root = tempfile::tempdir().unwrap();
        let host = Host::start(root.path(), "h1").await;
        let ((secret, _shop), (_, cart)) = (host.register("shop@h1").await, host.register("cart@h1").await);
        keep_open(cart);
        host.deny_late(pair.0, pair.1);
        host.dial_in_vain(&secret, "shop@h1", "cart@h1").await;
    }
}

#[tokio::test]
async fn an_end_that_is_deregistered_behind_the_answer_ends_the_link() {
    for (target, gone) in [
        ("cart@h1", "cart@h1"),
        ("cart@h1", "shop@h1"),
        ("cart@h2", "shop@h1"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let (h1, h2) = (
            Host::start(root.path(), "h1").await,
            Host::start(root.path(), "h2").await,
        );
        let (secret, _shop) = h1.register("shop@h1").await;
        let far = if target.ends_with("h1") { &h1 } else { &h2 };
        let (_, cart) = far.register(target).await;
        keep_open(cart);
        // The first answer that the dialler's agent needs: the link is in no table yet.
        *h1.mesh.gone.lock().unwrap() = Some(("cart", "shop", gone));
        h1.dial_in_vain(&secret, "shop@h1", target).await;
        assert!(h1.mesh.gone.lock().unwrap().is_none());
    }
}

/// The accepting agent looks the dialler up between finding the target and entering the link.
#[tokio::test]
async fn a_target_that_is_deregistered_behind_the_look_up_ends_the_link() {
    let root = tempfile::tempdir().unwrap();
    let (h1, h2) = (
        Host::start(root.path(), "h1").await,
        Host::start(root.path(), "h2").await,
    );
    let ((secret, _shop), (_, cart)) = (h1.register("shop@h1").await, h2.register("cart@h2").await);
    keep_open(cart);
    *h2.mesh.gone_after_look_up.lock().unwrap() = Some(("shop@h1", "cart@h2"));
    h1.dial_in_vain(&secret, "shop@h1", "cart@h2").await;
    assert!(h2.mesh.gone_after_look_up.lock().unwrap().is_none());
}

#[tokio::test]
async fn a_denial_behind_the_answer_ends_a_call_to_a_service() {
    let root = tempfile::tempdir().unwrap();
    let host = Host::start(root.path(), "h1").await;
    let (_, echo) = host.register("echo").await;
    keep_open(echo);
    host.deny_late("web", "echo");
    let path = root.path().join("up");
    let _upstream = host
        .proxy
        .upstream(Upstream {
            source: ServiceName::new("web").unwrap(),
            target: ServiceName::new("echo").unwrap(),
            instance: None,
            via: None,
            purpose: Purpose::Rpc,
            listen: Listen::Uds(path.clone()),
            uid: rustix::process::geteuid().as_raw(),
            owner: 1,
        })
        .unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    ends(&mut stream).await;
}

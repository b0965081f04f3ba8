//! Two agents on two loopback addresses, nodes that speak just the first frames, and hostile peers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod balance;
mod certificates;
mod clusters;
mod connect;
mod crowds;
mod foreign;
mod hostile;
mod links;
mod reproof;
mod services;
mod sessions;
mod sidecars;
mod spoofing;
mod why;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::links::*;
use super::local::*;
use super::wire::*;
use super::*;
use crate::mesh::embedded::{Action, EmbeddedMesh, MeshDir, Rule, Rules};
use crate::mesh::{Certificates, Entry, META_CLUSTER, Protocol, Registration};

/// Beyond any deadline of the data plane: only a hang lasts this long.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> Settings {
    Settings {
        max_pending: 64,
        ..Settings::default()
    }
}

/// Deadlines for tests of silent peers, who only wait for them.
fn hasty() -> Settings {
    let short = Duration::from_millis(100);
    Settings {
        frame_timeout: short,
        handshake_timeout: short,
        ..settings()
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("still waiting for {what}"))
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    soon(what, async {
        while !done() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A machine with one embedded mesh.
struct World {
    temp: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self {
            temp: tempfile::tempdir().unwrap(),
        }
    }

    fn mesh_dir(&self) -> PathBuf {
        self.temp.path().join("mesh")
    }

    fn rule(&self, source: &str, destination: &str, action: Action) {
        let rule = Rule {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            action,
        };
        Rules::set(&MeshDir::open(&self.mesh_dir()).unwrap(), rule).unwrap();
    }

    async fn host(&self, name: &str, ip: &str) -> Host {
        self.host_with(name, ip, settings()).await
    }

    /// An agent with its two listeners.
    async fn host_with(&self, name: &str, ip: &str, settings: Settings) -> Host {
        let dir = self.temp.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let inbound = TcpListener::bind(format!("{ip}:0")).await.unwrap();
        let address = inbound.local_addr().unwrap();
        let mesh =
            Arc::new(EmbeddedMesh::open(&self.mesh_dir(), name, vec![name.to_owned()], address).unwrap());
        let (local, links) = (LocalTable::default(), LinkTable::default());
        let proxy = Proxy::new(mesh.clone(), local.clone(), links.clone(), settings);
        let dist = UnixListener::bind(dir.join("dist.sock")).unwrap();
        let tasks = vec![
            tokio::spawn(proxy.clone().serve_inbound(inbound)).abort_handle(),
            tokio::spawn(proxy.clone().serve_dist(dist)).abort_handle(),
            tokio::spawn(proxy.clone().keep_proven()).abort_handle(),
        ];
        Host {
            name: name.to_owned(),
            dir,
            address,
            mesh,
            local,
            links,
            proxy,
            tasks,
        }
    }
}

struct Host {
    name: String,
    dir: PathBuf,
    address: SocketAddr,
    mesh: Arc<EmbeddedMesh>,
    local: LocalTable,
    links: LinkTable,
    proxy: Arc<Proxy>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Host {
    /// Registers a node and listens for it.
    async fn node(&self, name: &str) -> Node {
        self.node_in(name, "").await
    }

    /// As [`Host::node`], with a label of a cluster.
    async fn node_in(&self, name: &str, cluster: &str) -> Node {
        let path = self.dir.join(format!("{name}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let secret = Secret::generate().unwrap();
        let instance = Instance {
            id: name.to_owned(),
            service: ServiceName::from_node(name).unwrap(),
            node: Some(name.to_owned()),
            agent: self.name.clone(),
            address: self.address,
            protocol: Protocol::Meshx,
            meta: labelled(cluster),
        };
        self.register(instance, secret.clone(), Endpoint::NodeSocket(path))
            .await;
        Node {
            name: name.to_owned(),
            secret,
            listener,
            dist: self.dir.join("dist.sock"),
        }
    }

    /// Registers a service instance.
    async fn service(&self, id: &str, service: &str, endpoint: Endpoint) {
        let instance = Instance {
            id: id.to_owned(),
            service: ServiceName::new(service).unwrap(),
            node: None,
            agent: self.name.clone(),
            address: self.address,
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        self.register(instance, Secret::generate().unwrap(), endpoint)
            .await;
    }

    async fn register(&self, instance: Instance, secret: Secret, endpoint: Endpoint) {
        let uid = rustix::process::geteuid().as_raw();
        let local = LocalInstance {
            instance: instance.clone(),
            secret,
            endpoint,
            owner: 1,
            uid,
            sidecar: None,
        };
        self.local.insert(local).unwrap();
        self.mesh.register(&Entry::plain(instance.clone())).await.unwrap();
    }

    /// Serves a port of its own for an instance.
    async fn port_of(&mut self, instance: &str) -> SocketAddr {
        let listener = TcpListener::bind((self.address.ip(), 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = self.proxy.clone().serve_instance(listener, instance.to_owned());
        self.tasks.push(tokio::spawn(serve).abort_handle());
        address
    }

    /// Replaces what is registered.
    fn change(&self, id: &str, change: impl FnOnce(&mut LocalInstance)) {
        let mut local = LocalInstance::clone(&*self.local.remove(id).unwrap());
        change(&mut local);
        self.local.insert(local).unwrap();
    }

    async fn identity(&self, service: &str) -> Arc<crate::mesh::Identity> {
        self.mesh
            .identity(&ServiceName::new(service).unwrap())
            .await
            .unwrap()
    }

    fn spiffe(&self, service: &str) -> SpiffeId {
        SpiffeId::new(self.mesh.trust_domain(), ServiceName::new(service).unwrap())
    }

    fn refusals(&self, cause: Cause) -> u64 {
        self.links.refusals(cause)
    }

    fn all_refusals(&self) -> u64 {
        Cause::ALL.iter().map(|cause| self.refusals(*cause)).sum()
    }
}

/// A node that speaks the first frames and then whatever the test says.
struct Node {
    name: String,
    secret: Secret,
    listener: UnixListener,
    dist: PathBuf,
}

impl Node {
    async fn connect(&self, target: &str) -> (UnixStream, ConnectReply) {
        connect(&self.dist, &self.secret, target).await
    }

    /// Dials and sends the name message.
    async fn dial(&self, target: &str) -> Result<UnixStream, Refusal> {
        match self.connect(target).await {
            (mut stream, ConnectReply::Ok { .. }) => {
                stream.write_all(&name_message(&self.name)).await.unwrap();
                Ok(stream)
            }
            (_, ConnectReply::Refused(refusal)) => Err(refusal),
        }
    }

    /// Takes the next link: the ACCEPT frame, the name in the handshake, the connection.
    async fn accept(&self) -> (Accept, String, UnixStream) {
        let (mut stream, _) = soon("a link", self.listener.accept()).await.unwrap();
        let accept = Accept::decode(&frame(&mut stream).await.unwrap()).unwrap();
        assert_eq!(accept.secret, self.secret, "the agent proves itself");
        let message = frame(&mut stream).await.unwrap();
        let name = String::from_utf8(message[15..].to_vec()).unwrap();
        (accept, name, stream)
    }

    /// A link between two nodes, from end to end.
    async fn link(&self, other: &Node) -> (UnixStream, UnixStream) {
        let (dialled, (accept, name, accepted)) = soon("a link", async {
            tokio::join!(self.dial(&other.name), other.accept())
        })
        .await;
        assert_eq!(
            (accept.remote_node.as_str(), name.as_str()),
            (self.name.as_str(), self.name.as_str())
        );
        (dialled.unwrap(), accepted)
    }
}

async fn connect(dist: &Path, secret: &Secret, target: &str) -> (UnixStream, ConnectReply) {
    let mut stream = UnixStream::connect(dist).await.unwrap();
    let mut bytes = Vec::new();
    let mut link = [0; 16];
    getrandom::fill(&mut link).unwrap();
    Connect {
        link: LinkId(link),
        secret: secret.clone(),
        target: target.to_owned(),
    }
    .encode(&mut bytes);
    stream.write_all(&bytes).await.unwrap();
    let reply = ConnectReply::decode(&frame(&mut stream).await.unwrap()).unwrap();
    (stream, reply)
}

async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    soon("a frame", async {
        let len = stream.read_u16().await?;
        let mut payload = vec![0; len.into()];
        stream.read_exact(&mut payload).await?;
        Ok(payload)
    })
    .await
}

/// Everything until the end, however it comes.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = soon("the end of a connection", stream.read_to_end(&mut bytes)).await;
    bytes
}

/// A node's metadata with the label of its cluster; none when it is empty.
fn labelled(cluster: &str) -> BTreeMap<String, String> {
    let label = (!cluster.is_empty()).then(|| (META_CLUSTER.to_owned(), cluster.to_owned()));
    label.into_iter().collect()
}

/// `send_name` of OTP 25.
fn name_message(name: &str) -> Vec<u8> {
    let mut bytes = Vec::from(u16::try_from(15 + name.len()).unwrap().to_be_bytes());
    bytes.push(b'N');
    bytes.extend(0xd_07df_7fbd_u64.to_be_bytes());
    bytes.extend(7u32.to_be_bytes());
    bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name.as_bytes());
    bytes
}

fn refused(reply: ConnectReply) -> Refusal {
    match reply {
        ConnectReply::Refused(refusal) => refusal,
        ok => panic!("wanted a refusal, got {ok:?}"),
    }
}

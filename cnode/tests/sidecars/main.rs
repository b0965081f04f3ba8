//! Sidecars beside a real Consul: its built-in proxy, Envoy from files, HAProxy as an own command.
//!
//! Consul is $MESHX_CONSUL or what scripts/get-consul has fetched, Envoy $MESHX_ENVOY or scripts/get-envoy, HAProxy
//! the one in PATH.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// Their Consul; not all of it is used here.
#[allow(dead_code)]
#[path = "../consul_mesh/support.rs"]
mod support;
mod traffic;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use meshx::agent::sidecar::{
    ConsulProgram, Settings, SidecarEvent, SidecarEventKind, SidecarHandle, SidecarKind, SidecarSpec,
    Sidecars, free_loopback,
};
use meshx::mesh::consul::ConsulMesh;
use meshx::mesh::{
    Authorization, Certificates, DataPlane, Entry, Instance, Protocol, Registration, Sidecar, SidecarUpstream,
};
use support::{Consul, LONG, ready, service};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// One agent with its sidecars, and its Consul.
struct World {
    consul: Consul,
    mesh: Arc<ConsulMesh>,
    sidecars: Arc<Sidecars>,
    police: JoinHandle<()>,
    _temp: TempDir,
}

impl World {
    async fn new() -> Self {
        Self::of(Consul::dev().await, None).await
    }

    async fn of(consul: Consul, token: Option<&str>) -> Self {
        let mesh = support::open(consul.settings(token), "a", &["h1"]);
        ready(|| mesh.identity(&service("any"))).await;
        let temp = tempfile::tempdir().unwrap();
        let settings = Settings {
            consul: Some(ConsulProgram {
                program: program("MESHX_CONSUL", "consul/usr/bin/consul", "scripts/get-consul"),
                environment: vec![("CONSUL_HTTP_ADDR".into(), consul.address())],
                token: token.map(meshx::mesh::Token::new),
            }),
            envoy: program("MESHX_ENVOY", "envoy/envoy", "scripts/get-envoy"),
            start_time: LONG,
            ..Settings::default()
        };
        let sidecars = Sidecars::new(mesh.clone(), temp.path().join("sidecars"), settings).unwrap();
        let sidecars = Arc::new(sidecars);
        // As the agent does.
        let police = tokio::spawn({
            let (mesh, sidecars) = (mesh.clone(), sidecars.clone());
            async move {
                while mesh.changed().await.is_ok() {
                    sidecars.rules_changed();
                }
            }
        });
        Self {
            police,
            consul,
            mesh,
            sidecars,
            _temp: temp,
        }
    }

    /// A service with a sidecar: registered, started, and found by the others.
    async fn side(&self, name: &str, kind: SidecarKind, upstreams: &[SidecarUpstream]) -> Side {
        let (local, public) = (server().await, free_loopback().unwrap());
        let id = format!("{name}-1");
        let entry = Entry {
            data_plane: DataPlane::Sidecar(Sidecar {
                bind: [127, 0, 0, 1].into(),
                local,
                upstreams: upstreams.to_vec(),
            }),
            ..Entry::plain(Instance {
                id: id.clone(),
                service: service(name),
                node: None,
                agent: "a".into(),
                address: public,
                protocol: Protocol::Connect,
                meta: Default::default(),
            })
        };
        self.mesh.register(&entry).await.unwrap();
        let spec = SidecarSpec {
            upstreams: upstreams.to_vec(),
            output: true,
            ..SidecarSpec::new(&id, service(name), kind, local, public)
        };
        let (sender, events) = mpsc::channel(4096);
        let handle = self.sidecars.start(spec, sender).await.unwrap();
        timeout(LONG, self.mesh.passing(&id))
            .await
            .expect("the sidecar passes")
            .unwrap();
        Side { handle, events }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.police.abort();
    }
}

struct Side {
    handle: SidecarHandle,
    events: mpsc::Receiver<SidecarEvent>,
}

impl Side {
    /// All that came so far.
    fn events(&mut self) -> Vec<SidecarEventKind> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .map(|event| event.kind)
            .collect()
    }
}

fn upstream(name: &str) -> SidecarUpstream {
    SidecarUpstream {
        target: service(name),
        bind: free_loopback().unwrap(),
    }
}

/// A server that speaks first and then says everything back.
async fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(b"hello").await?;
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    address
}

/// Connects through an upstream. None when it is refused.
async fn greeted(bind: SocketAddr) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(bind).await.ok()?;
    let mut greeting = [0; 5];
    let read = timeout(LONG, stream.read_exact(&mut greeting))
        .await
        .expect("a greeting or the end");
    (read.is_ok() && &greeting == b"hello").then_some(stream)
}

async fn connected(what: &str, bind: SocketAddr) -> TcpStream {
    support::until(what, || greeted(bind)).await
}

async fn refused(what: &str, bind: SocketAddr) {
    support::until(what, || async { greeted(bind).await.is_none().then_some(()) }).await;
}

/// A mebibyte there and back.
async fn echoes(mut stream: TcpStream) {
    let mut block = vec![0; 1 << 20];
    getrandom::fill(&mut block).unwrap();
    let mut back = vec![0; block.len()];
    let (mut read, mut write) = stream.split();
    let both = async { tokio::join!(write.write_all(&block), read.read_exact(&mut back)) };
    let (sent, got) = timeout(LONG, both).await.expect("1 MiB");
    sent.unwrap();
    got.unwrap();
    assert!(block == back);
}

/// Whether the other end closes within [`LONG`].
async fn is_cut(mut stream: TcpStream) {
    let mut rest = [0];
    let read = timeout(LONG, stream.read(&mut rest))
        .await
        .expect("the end of the connection");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

fn program(variable: &str, below_target: &str, script: &str) -> PathBuf {
    let workspace = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path =
        std::env::var_os(variable).map_or_else(|| workspace.join("target").join(below_target), PathBuf::from);
    assert!(
        path.is_file(),
        "there is no program {}: run {script}, or name one in {variable}",
        path.display()
    );
    path
}

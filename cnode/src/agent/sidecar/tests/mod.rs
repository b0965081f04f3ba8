//! Sidecars of an embedded mesh: what they do when they fail, and real traffic through a real Envoy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent_killed;
mod client;
mod envoy;
mod files;
mod handed;
mod shaky;
mod supervision;

use std::{fs, future::Future, path::Path, sync::Arc};

use tokio::sync::mpsc;

use super::*;
use crate::{
    mesh::{
        Answer, Certificates, Entry, Instance, MeshError, Protocol, Registration, ServiceName, Token,
        embedded::{Action, EmbeddedMesh, MeshDir, Rule, Rules},
    },
    node::Backoff,
};

/// Beyond any promise: only a hang lasts this long.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("still waiting for {what}"))
}

/// Asks until it is so: for states of other processes that send no event.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    soon(what, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

fn anywhere() -> SocketAddr {
    free_loopback().unwrap()
}

/// An embedded mesh with one agent.
struct World {
    temp: tempfile::TempDir,
    mesh: Arc<EmbeddedMesh>,
}

impl World {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let mesh = EmbeddedMesh::open(&temp.path().join("mesh"), "a", vec!["h".into()], anywhere()).unwrap();
        Self {
            temp,
            mesh: Arc::new(mesh),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            backoff: Backoff {
                min: Duration::from_millis(10),
                max: Duration::from_millis(20),
            },
            start_time: PATIENCE,
            ..Settings::default()
        }
    }

    fn dir(&self) -> PathBuf {
        self.temp.path().join("sidecars")
    }

    fn sidecars(&self, settings: Settings) -> Sidecars {
        Sidecars::new(self.mesh.clone(), self.dir(), settings).unwrap()
    }

    /// Says who may talk to whom, without telling the sidecars.
    fn rule(&self, source: &str, destination: &str, action: Action) {
        let rule = Rule {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            action,
        };
        Rules::set(&MeshDir::open(&self.temp.path().join("mesh")).unwrap(), rule).unwrap();
    }

    async fn register(&self, name: &str, address: SocketAddr) {
        let instance = Instance {
            id: format!("{name}-1"),
            service: service(name),
            node: None,
            agent: "a".into(),
            address,
            protocol: Protocol::Connect,
            meta: Default::default(),
        };
        self.mesh.register(&Entry::plain(instance)).await.unwrap();
    }
}

/// Shell: starts a process that leads a group of its own (the fifth field of `stat`), and says its id then.
const LEAVES_ITS_GROUP: &str = "setsid sleep 600 & left=$!; \
    until read -r _ _ _ _ group _ </proc/$left/stat && [ \"$group\" = \"$left\" ]; do sleep 0.01; done; echo $left;";

/// A sidecar that runs this shell script.
fn script(text: &str) -> SidecarSpec {
    let command = ["sh", "-c", text].map(str::to_owned).to_vec();
    SidecarSpec {
        output: true,
        ..SidecarSpec::new(
            "shop-1",
            service("shop"),
            SidecarKind::Command(command),
            anywhere(),
            anywhere(),
        )
    }
}

/// The events of a sidecar.
struct Events(mpsc::Receiver<SidecarEvent>);

fn events() -> (mpsc::Sender<SidecarEvent>, Events) {
    let (sender, receiver) = mpsc::channel(1024);
    (sender, Events(receiver))
}

impl Events {
    async fn next(&mut self) -> SidecarEventKind {
        let event = soon("an event", self.0.recv())
            .await
            .expect("the sidecar has ended");
        assert_eq!(event.id, "shop-1");
        event.kind
    }

    /// The next line of its standard output. On the other stream shells tell of what we kill.
    async fn line(&mut self) -> String {
        loop {
            if let SidecarEventKind::Output {
                stream: Stream::Stdout,
                line,
            } = self.next().await
            {
                return String::from_utf8(line).unwrap();
            }
        }
    }

    /// What is told of its next end.
    async fn down(&mut self) -> (String, bool) {
        loop {
            if let SidecarEventKind::Down { text, final_ } = self.next().await {
                return (text, final_);
            }
        }
    }
}

/// Whether a process lives; a zombie does not.
fn lives(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}

/// A program for tests, from a variable, or where the scripts put it.
fn program(variable: &str, below_target: &str, script: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path =
        std::env::var_os(variable).map_or_else(|| root.join("target").join(below_target), PathBuf::from);
    assert!(
        path.is_file(),
        "no program {}: run {script}, or name one with {variable}",
        path.display()
    );
    path
}

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::*;
use crate::mesh::embedded::EmbeddedMesh;
use crate::mesh::observed::Observed;
use crate::mesh::{Instance, Protocol, ServiceName};
use crate::proxy::Settings;
use crate::proxy::cause::Cause;
use crate::proxy::local::{Endpoint, LocalInstance, LocalTable, Secret};

/// Three times what is promised.
const PATIENCE: Duration = Duration::from_secs(15);

struct Server {
    _temp: tempfile::TempDir,
    mesh_dir: PathBuf,
    address: SocketAddr,
    links: LinkTable,
    local: LocalTable,
    task: AbortHandle,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// `prepare` sees the mesh's directory before the first look.
    async fn start(prepare: impl FnOnce(&std::path::Path)) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let mesh_dir = temp.path().join("mesh");
        let port = "127.0.0.1:1".parse().unwrap();
        let mesh = EmbeddedMesh::open(&mesh_dir, "a", vec!["h1".into()], port).unwrap();
        prepare(&mesh_dir);
        let mesh = Arc::new(Observed::new(Arc::new(mesh)));
        let (local, links) = (LocalTable::default(), LinkTable::default());
        let proxy = Proxy::new(mesh.clone(), local.clone(), links.clone(), Settings::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answers = mesh.answers();
        let sources = Sources {
            mesh,
            answers,
            proxy,
            links: links.clone(),
            predecessors: Predecessors::default(),
        };
        let task = tokio::spawn(serve(listener, sources)).abort_handle();
        Self {
            _temp: temp,
            mesh_dir,
            address,
            links,
            local,
            task,
        }
    }

    fn register(&self, id: &str, node: bool) {
        let service = if node {
            ServiceName::from_node(id)
        } else {
            ServiceName::new(id)
        };
        let instance = Instance {
            id: id.to_owned(),
            service: service.unwrap(),
            node: node.then(|| id.to_owned()),
            agent: "a".to_owned(),
            address: "127.0.0.1:1".parse().unwrap(),
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        let local = LocalInstance {
            instance,
            secret: Secret::generate().unwrap(),
            endpoint: Endpoint::Uds("/none".into()),
            owner: 1,
            uid: 0,
            sidecar: None,
        };
        self.local.insert(local).unwrap();
    }

    /// Status line and body.
    async fn ask(&self, request: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // The server closes: one request a connection.
        timeout(PATIENCE, stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (
            head.lines().next().unwrap_or_default().to_owned(),
            body.to_owned(),
        )
    }

    async fn get(&self, path: &str) -> (String, String) {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await
    }

    async fn until(&self, path: &str, wanted: &str) -> String {
        let began = Instant::now();
        loop {
            let (status, body) = self.get(path).await;
            if status.contains(wanted) || body.contains(wanted) {
                return body;
            }
            assert!(began.elapsed() < PATIENCE, "{path}: {status} {body}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn the_page_is_well_formed_and_counts_and_names_no_node() {
    let server = Server::start(|_| {}).await;
    server.register("shop@h1", true);
    server.register("echo", false);
    server.links.refused(
        crate::proxy::Listener::Inbound,
        None,
        "cart@h2",
        &Cause::CertificateExpired.because("x"),
    );
    let page = server.until("/metrics", "service=\"shop\"").await;
    for line in [
        "meshx_registrations{kind=\"node\"} 1",
        "meshx_registrations{kind=\"service\"} 1",
        "meshx_refusals_total{listener=\"inbound\",cause=\"certificate_expired\"} 1",
        "meshx_refusals_total{listener=\"dist\",cause=\"certificate_expired\"} 0",
        "meshx_handshakes_total{side=\"accepted\",result=\"done\"} 0",
        "meshx_links_cut_total{cause=\"intention_denied\"} 0",
        "meshx_mesh_unanswered_total 0",
        "meshx_reproofs_failed_total 0",
        "meshx_links_max 16384",
    ] {
        assert!(page.lines().any(|seen| seen == line), "{line} not in\n{page}");
    }
    let value = |name: &str| {
        let line = page.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let left = value("meshx_certificate_expiry_timestamp_seconds{service=\"shop\"}")
        - crate::proxy::links::unix_now() as f64;
    assert!(
        (70.0..73.0).contains(&(left / 3600.0)),
        "a leaf of 72 h: {left} s"
    );
    assert!(value("meshx_mesh_last_answer_age_seconds") < 15.0);
    assert!(!page.contains('@') && !page.contains("cart"), "{page}");

    // Prometheus' text format: each value belongs to the family above it, and no name comes twice.
    let mut families = Vec::new();
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            families.push(help.split(' ').next().unwrap().to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(families.last().unwrap(), name);
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else {
            let name = line.split(['{', ' ']).next().unwrap();
            assert_eq!(families.last().unwrap(), name, "{line}");
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
    // Each is explained.
    let document =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).unwrap();
    for name in &families {
        assert!(
            document.contains(&format!("`{name}`")),
            "{name} is not in docs/operations.md"
        );
    }
    families.sort();
    families.dedup();
    assert_eq!(page.matches("# HELP ").count(), families.len());
}

#[tokio::test]
async fn only_three_paths_can_be_got() {
    let server = Server::start(|_| {}).await;
    assert_eq!(
        server.get("/health").await,
        ("HTTP/1.1 200 OK".into(), "ok\n".into())
    );
    assert_eq!(server.until("/ready", "200").await, "ready\n");
    for path in ["/", "/metrics/", "/links", "/../metrics"] {
        assert!(server.get(path).await.0.contains(" 404 "), "{path}");
    }
    for method in ["POST", "PUT", "DELETE"] {
        let request = format!("{method} /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
        assert!(server.ask(&request).await.0.contains(" 405 "), "{method}");
    }
    // A second request on the connection is not answered.
    let twice = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2);
    assert_eq!(server.ask(&twice).await.1, "ok\n");
}

#[tokio::test]
async fn ready_when_the_mesh_has_answered_and_then_for_good() {
    let aside = |dir: &std::path::Path| std::fs::rename(dir.join("agents"), dir.join("aside")).unwrap();
    let server = Server::start(aside).await;
    let text = server.until("/ready", "agents").await;
    assert!(text.starts_with("not ready: "), "{text}");
    assert!(server.get("/ready").await.0.contains(" 503 "));
    assert_eq!(server.get("/health").await.1, "ok\n", "the process serves");
    let page = server.get("/metrics").await.1;
    assert!(!page.contains("\nmeshx_mesh_last_answer_age_seconds "), "{page}");

    std::fs::rename(server.mesh_dir.join("aside"), server.mesh_dir.join("agents")).unwrap();
    server.until("/ready", "200").await;
    // How often it was asked in vain, before and in between.
    let unanswered = async || {
        let page = server.get("/metrics").await.1;
        let mut values = page
            .lines()
            .filter_map(|line| line.strip_prefix("meshx_mesh_unanswered_total "));
        values.next().unwrap().parse::<u64>().unwrap()
    };
    let before = unanswered().await;
    assert!(before > 0);
    aside(&server.mesh_dir);
    let again = async {
        while unanswered().await == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, again).await.unwrap();
    assert!(server.get("/ready").await.0.contains(" 200 "));
}

#[tokio::test]
async fn a_connection_has_limits() {
    let server = Server::start(|_| {}).await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_MAX * 16 {
        held.push(TcpStream::connect(server.address).await.unwrap());
    }
    // It does not wait until the silent ones had their time, 16 times as many as there may be.
    let began = Instant::now();
    assert_eq!(server.get("/health").await.1, "ok\n");
    assert!(began.elapsed() < CONNECTION_TIME * 8, "{:?}", began.elapsed());
    for mut stream in held {
        let ended = timeout(PATIENCE, stream.read(&mut [0])).await.unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }

    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let header = format!("x: {}\r\n", "y".repeat(100));
    let request = format!(
        "GET /health HTTP/1.1\r\nhost: x\r\n{}\r\n",
        header.repeat(BYTES_MAX / 100)
    );
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    let short = format!("GET /health HTTP/1.1\r\nhost: x\r\n{}\r\n", header.repeat(10));
    assert_eq!(server.ask(&short).await.1, "ok\n");
}

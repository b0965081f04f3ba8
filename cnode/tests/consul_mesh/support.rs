//! Starts a real Consul, and speaks to it as an operator would.

use rustix::process::Signal;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use meshx::mesh::consul::{ConsulMesh, ConsulSettings};
use meshx::mesh::{Entry, Instance, MeshError, Protocol, ServiceName, Token};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

/// For what has no promise. The machine may be busy.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// What Consul lost is there again when the next refresh of its check has failed: at half its time to live, after at
/// most 2 s while Consul is away. It is waited for three times as long, and less than until entries are compared.
pub(crate) const PROMISED_AGAIN: Duration = Duration::from_secs(3 * 3);
const TTL: Duration = Duration::from_secs(4);
/// The token that may do all.
pub(crate) const MASTER: &str = "11111111-2222-3333-4444-555555555555";

/// A Consul server on loopback, ended when dropped.
pub(crate) struct Consul {
    child: Option<Child>,
    _ports: Ports,
    pub(crate) dir: TempDir,
    pub(crate) http: u16,
    options: Vec<String>,
    token: Option<String>,
    client: reqwest::Client,
}

impl Consul {
    /// In memory, with nothing forbidden.
    pub(crate) async fn dev() -> Self {
        Self::start(&["-dev"], json!({})).await
    }

    /// In memory, where what no token permits is forbidden.
    pub(crate) async fn with_acl() -> Self {
        let mut consul = Self::prepare(
            Ports::take(),
            &["-dev"],
            json!({ "acl": { "enabled": true, "default_policy": "deny", "tokens": { "master": MASTER } } }),
        );
        consul.token = Some(MASTER.to_owned());
        consul.run().await;
        consul
    }

    /// With its state in its directory.
    pub(crate) async fn on_disk() -> Self {
        Self::start(
            &["-server", "-bootstrap-expect=1"],
            json!({ "performance": { "raft_multiplier": 1 } }),
        )
        .await
    }

    pub(crate) async fn start(options: &[&str], config: Value) -> Self {
        Self::start_at(Ports::take(), options, config).await
    }

    pub(crate) async fn start_at(ports: Ports, options: &[&str], config: Value) -> Self {
        let mut consul = Self::prepare(ports, options, config);
        consul.run().await;
        consul
    }

    fn prepare(ports: Ports, options: &[&str], config: Value) -> Self {
        let dir = tempfile::Builder::new().prefix("mxc").tempdir_in("/tmp").unwrap();
        let mut all = json!({
            "ports": ports.config(),
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "connect": { "enabled": true },
            "disable_update_check": true,
        });
        merge(&mut all, config);
        fs::write(dir.path().join("config.json"), all.to_string()).unwrap();
        let mut options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        if !options.iter().any(|option| option == "-dev") {
            options.push(format!("-data-dir={}", dir.path().join("data").display()));
        }
        Self {
            child: None,
            http: ports.http(),
            _ports: ports,
            dir,
            options,
            token: None,
            client: http_client(),
        }
    }

    /// Starts it (again) and waits for its leader.
    pub(crate) async fn run(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap();
        let child = Command::new(program())
            .arg("agent")
            .arg("-config-file")
            .arg(self.dir.path().join("config.json"))
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let began = Instant::now();
        loop {
            // The CA is there a moment after the leader.
            let roots = self.try_call(Method::GET, "connect/ca/roots", None).await;
            let ready =
                roots.is_ok_and(|roots| roots["ActiveRootID"].as_str().is_some_and(|id| !id.is_empty()));
            let acl =
                self.token.is_none() || self.try_call(Method::GET, "acl/token/self", None).await.is_ok();
            if ready && acl {
                return;
            }
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none() && began.elapsed() < LONG,
                "Consul does not serve: {}",
                fs::read_to_string(self.log_path()).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends it without a word.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Stops the process, and returns when all of its threads have stopped: on a busy machine one may still answer.
    pub(crate) async fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.as_ref().unwrap().id());
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
            status.contains("State:\tT")
        };
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.http)
    }

    pub(crate) fn settings(&self, token: Option<&str>) -> ConsulSettings {
        ConsulSettings::plain(&self.address(), token.map(Token::new)).unwrap()
    }

    /// A member of the mesh.
    pub(crate) fn mesh(&self, agent: &str, hosts: &[&str]) -> Arc<ConsulMesh> {
        open(self.settings(None), agent, hosts)
    }

    /// A request with the token that may do all.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        let body = (!body.is_null()).then_some(body);
        self.try_call(method, path, body).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.call(Method::GET, path, Value::Null).await
    }

    async fn try_call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, String> {
        let url = format!("http://127.0.0.1:{}/v1/{path}", self.http);
        let mut request = self.client.request(method, url).timeout(Duration::from_secs(10));
        if let Some(token) = &self.token {
            request = request.header("X-Consul-Token", token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| error.to_string())?;
        if !status.is_success() {
            return Err(format!("{path}: {status}: {text}"));
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// A token with these rules.
    pub(crate) async fn policy(&self, name: &str, rules: &str) -> String {
        self.call(Method::PUT, "acl/policy", json!({ "Name": name, "Rules": rules }))
            .await;
        self.token_of(name).await["SecretID"].as_str().unwrap().to_owned()
    }

    /// Another token of a policy.
    pub(crate) async fn token_of(&self, policy: &str) -> Value {
        self.call(
            Method::PUT,
            "acl/token",
            json!({ "Policies": [{ "Name": policy }] }),
        )
        .await
    }

    /// Sets a rule. Returns its id.
    pub(crate) async fn intention(&self, source: &str, destination: &str, action: &str) -> String {
        let rule = json!({
            "SourceName": source, "DestinationName": destination, "Action": action, "SourceType": "consul"
        });
        let made = self.call(Method::POST, "connect/intentions", rule).await;
        made["ID"].as_str().unwrap().to_owned()
    }

    /// The entry of the Consul agent, if it has it.
    pub(crate) async fn entry(&self, id: &str) -> Option<Value> {
        self.get("agent/services").await.get(id).cloned()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for Consul {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn open(settings: ConsulSettings, agent: &str, hosts: &[&str]) -> Arc<ConsulMesh> {
    let hosts = hosts.iter().map(|&host| host.to_owned()).collect();
    ConsulMesh::open(settings, agent, hosts, address(7000)).unwrap()
}

pub(crate) fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

pub(crate) fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

pub(crate) fn node(agent: &str, node: &str) -> Entry {
    entry(Instance {
        id: node.to_owned(),
        service: ServiceName::from_node(node).unwrap(),
        node: Some(node.to_owned()),
        agent: agent.to_owned(),
        address: address(7000),
        protocol: Protocol::Meshx,
        meta: Default::default(),
    })
}

pub(crate) fn plain(agent: &str, name: &str, id: &str) -> Entry {
    entry(Instance {
        id: id.to_owned(),
        service: service(name),
        node: None,
        agent: agent.to_owned(),
        address: address(7000),
        protocol: Protocol::Meshx,
        meta: Default::default(),
    })
}

fn entry(instance: Instance) -> Entry {
    Entry {
        ttl: Some(TTL),
        ..Entry::plain(instance)
    }
}

/// Asks until the answer is as wanted.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    within(LONG, what, &mut ask).await
}

pub(crate) async fn within<T, F: Future<Output = Option<T>>>(
    time: Duration,
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = ask().await {
            return seen;
        }
        assert!(began.elapsed() < time, "not within {time:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks again while the mesh is not there yet.
pub(crate) async fn ready<T, F: Future<Output = Result<T, MeshError>>>(mut ask: impl FnMut() -> F) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(MeshError::Unavailable(_)) if began.elapsed() < LONG => {}
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// $MESHX_CONSUL, else what scripts/get-consul put into target/.
fn program() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path = std::env::var_os("MESHX_CONSUL")
        .map_or_else(|| workspace.join("target/consul/usr/bin/consul"), PathBuf::from);
    assert!(
        path.is_file(),
        "there is no Consul at {}: run scripts/get-consul, or name one in MESHX_CONSUL",
        path.display()
    );
    path
}

fn http_client() -> reqwest::Client {
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let builder = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0);
    builder.tls_backend_preconfigured(tls).build().unwrap()
}

/// Ports that nobody else gets, also while their Consul is away: the system gives none of them to who asks for any,
/// and another Consul of these tests takes none behind a first one that is held.
pub(crate) struct Ports {
    first: TcpListener,
}

impl Ports {
    /// Those of Consul that have a port here, in the order of their ports.
    const NAMES: [&str; 5] = ["http", "dns", "server", "serf_lan", "serf_wan"];
    const BLOCK: u16 = 10;
    const BLOCKS: u16 = 800;

    pub(crate) fn take() -> Self {
        let bind = |port| TcpListener::bind(("127.0.0.1", port));
        // Whoever begins elsewhere finds his at once.
        let begin = (std::process::id() % u32::from(Self::BLOCKS)) as u16;
        (0..Self::BLOCKS)
            .map(|at| 12_000 + (begin + at) % Self::BLOCKS * Self::BLOCK)
            .find_map(|port| {
                let first = bind(port).ok()?;
                (1..Self::BLOCK)
                    .all(|more| bind(port + more).is_ok())
                    .then_some(Self { first })
            })
            .unwrap()
    }

    fn port(&self, at: u16) -> u16 {
        self.first.local_addr().unwrap().port() + at
    }

    fn http(&self) -> u16 {
        self.port(1)
    }

    /// Not listened on unless the configuration says so.
    pub(crate) fn https(&self) -> u16 {
        self.port(Self::BLOCK - 1)
    }

    fn config(&self) -> Value {
        let mut all = json!({ "https": -1, "grpc": -1 });
        for (name, at) in Self::NAMES.iter().zip(1..) {
            all[*name] = json!(self.port(at));
        }
        all
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

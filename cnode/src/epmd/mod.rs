//! The agent in EPMD's place, for nodes of plain distribution (section "EPMD Protocol" of the distribution protocol).
//!
//! ```text
//! ALIVE2_REQ ----> registry (listed names), or a tool's name that the mesh is not told
//! PORT_PLEASE2 --> a port of proxy::plain at the address that was asked: 127.0.0.1 stands for this host, and each
//!                  other host has an address of its own (hosts)
//! NAMES ---------> the nodes of this host
//! ```
//!
//! Off unless switched on: the protocol carries no secret. Whoever asks is known by the uid of his socket, so it listens
//! on loopback alone. A registration lives as long as its connection.

mod handed;
mod hosts;
mod kept;
mod names;
mod pattern;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub(crate) use self::handed::{HandedEpmd, HandedName, PLACES_MAX, TakenEpmd};
use self::hosts::Hosts;
use self::kept::Kept;
use self::names::Names;
pub use self::pattern::{PatternError, Patterns};
use self::session::Held;
use crate::agent::registry::{Registry, answer};
use crate::listeners;
use crate::log_limit::LogLimit;
use crate::mesh::{Finding, Level};
use crate::proxy::Lanes;
use crate::proxy::admission::Admission;
use crate::proxy::cause::{Cause, Refusal};
use crate::proxy::listener::{self, Listener};
use crate::proxy::plain::PlainPorts;

/// The port of an EPMD that nobody told otherwise.
pub const EPMD_PORT: u16 = 4369;
/// Names of tools that come and go: the mesh is not told of them, and they reach nodes of their own user on this host.
pub const TOOLS: [&str; 6] = [
    "epmd-starter-*",
    "rabbitmqcli-*",
    "rem-*",
    "rpc-*",
    "*_prelaunch_*",
    "*_maint_*",
];
/// A whole request must be there within this time.
pub const REQUEST_TIME: Duration = Duration::from_secs(5);
/// Connections that are not answered yet; one more ends the oldest of the user who has most.
pub const PENDING_MAX: usize = 256;
/// Names that may be registered.
pub const NAMES_MAX: usize = 1024;
/// Names that one user may have registered, unless it is the agent's own.
pub const NAMES_PER_USER_MAX: usize = 256;
/// Other hosts that have an address here.
pub const HOSTS_MAX: usize = 256;
/// How long after its start the agent keeps who asks for an unknown node waiting: nodes that were registered before come
/// back within 2 s (`RECONNECT_TIME` in OTP's erl_epmd), and the mesh may not answer yet.
pub const HOLD: Duration = Duration::from_secs(3);
/// How long after its start a name that was registered before is kept for the user who had it.
pub const RECLAIM: Duration = Duration::from_secs(10);
/// Between attempts to listen where somebody else does.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// What the agent is told about EPMD.
#[derive(Debug, Clone)]
pub struct EpmdConfig {
    /// Where it listens, on loopback. All have one port; 0 is one that the system chooses.
    pub listen: Vec<SocketAddr>,
    /// Names (the part before the `@`) that may be registered in the mesh.
    pub nodes: Patterns,
    /// Names that are registered here alone.
    pub tools: Patterns,
    /// The host part of the nodes that register: they don't say it.
    pub host: String,
}

impl EpmdConfig {
    /// Whether every place may have this port.
    pub(crate) fn is_at(&self, port: u16) -> bool {
        let ports = self.listen.iter().map(SocketAddr::port);
        ports.into_iter().all(|wanted| wanted == 0 || wanted == port)
    }

    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.listen.iter().map(SocketAddr::ip).collect()
    }

    /// Both loopback addresses.
    pub fn loopback(port: u16) -> Vec<SocketAddr> {
        vec![
            (Ipv4Addr::LOCALHOST, port).into(),
            (Ipv6Addr::LOCALHOST, port).into(),
        ]
    }
}

/// The EPMD of one agent.
pub struct Epmd {
    registry: Arc<Registry>,
    ports: Arc<PlainPorts>,
    config: EpmdConfig,
    port: u16,
    started: Instant,
    names: Names,
    hosts: Hosts,
    kept: Kept,
    inetrc: PathBuf,
    /// The next connection that registers something.
    next_owner: AtomicU64,
    /// A node was registered.
    arrived: Notify,
    admission: Arc<Admission>,
    log: LogLimit,
    /// Where it listens, or should: why not.
    // Held for a look-up or a change, never across an await.
    places: Mutex<BTreeMap<SocketAddr, Option<String>>>,
    /// Addresses of hosts that were added.
    added: mpsc::Sender<SocketAddr>,
    /// Connections that hold a name while nobody serves them.
    // Held for a change, never across an await.
    parked: Mutex<Vec<(TcpStream, Held)>>,
}

impl std::fmt::Debug for Epmd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epmd")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// What [`Epmd::serve`] serves. Dropped, it leaves the registrations as they are: another process has them.
#[derive(Debug)]
pub struct Serving {
    places: Vec<(SocketAddr, Option<Arc<TcpListener>>)>,
    added: mpsc::Receiver<SocketAddr>,
    /// Connections that hold a name.
    parked: Vec<(TcpStream, Held)>,
}

impl Epmd {
    /// Listens where it can, and remembers in `dir` what must outlive the agent: addresses of hosts, running creations.
    pub fn open(
        registry: Arc<Registry>,
        ports: Arc<PlainPorts>,
        config: EpmdConfig,
        dir: &Path,
    ) -> (Arc<Self>, Serving) {
        let (mut epmd, added) = Self::new(registry, ports, config, dir, Kept::open(Self::file(dir)));
        let places = epmd.take_places(Vec::new());
        let serving = Serving {
            places,
            added,
            parked: Vec::new(),
        };
        (Arc::new(epmd), serving)
    }

    fn file(dir: &Path) -> PathBuf {
        dir.join("epmd.json")
    }

    fn new(
        registry: Arc<Registry>,
        ports: Arc<PlainPorts>,
        config: EpmdConfig,
        dir: &Path,
        (kept, hosts): (Kept, BTreeMap<String, Ipv4Addr>),
    ) -> (Self, mpsc::Receiver<SocketAddr>) {
        let (sender, added) = mpsc::channel(HOSTS_MAX);
        let own = registry
            .place()
            .hosts
            .iter()
            .cloned()
            .chain([config.host.clone()]);
        let epmd = Self {
            hosts: Hosts::new(own.collect(), hosts),
            registry,
            ports,
            port: 0,
            started: Instant::now(),
            names: Names::default(),
            kept,
            inetrc: dir.join("inetrc"),
            // Beyond those of control connections.
            next_owner: AtomicU64::new(1 << 63),
            arrived: Notify::new(),
            admission: Admission::new(PENDING_MAX),
            log: LogLimit::new("refused EPMD requests"),
            places: Mutex::default(),
            added: sender,
            parked: Mutex::default(),
            config,
        };
        (epmd, added)
    }

    /// Listens where it should: with what a predecessor of this process listened by, else anew.
    fn take_places(
        &mut self,
        handed: Vec<(SocketAddr, OwnedFd)>,
    ) -> Vec<(SocketAddr, Option<Arc<TcpListener>>)> {
        let mut handed: BTreeMap<_, _> = handed.into_iter().collect();
        let mut places = Vec::new();
        let mut take = |epmd: &Self, address| {
            let (address, listener) = epmd.bind(address, handed.remove(&address));
            places.push((address, listener.map(Arc::new)));
            address.port()
        };
        for address in self.config.listen.clone() {
            let port = if address.port() == 0 {
                self.port
            } else {
                address.port()
            };
            self.port = take(self, SocketAddr::new(address.ip(), port));
        }
        for ip in self.hosts.addresses() {
            take(self, (ip, self.port).into());
        }
        self.write_inetrc();
        places
    }

    /// The port where nodes find it.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it was told to listen.
    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.config.addresses()
    }

    /// The host part of the nodes that register.
    pub fn host(&self) -> &str {
        &self.config.host
    }

    /// The file that tells Erlang's resolver of the hosts (`ERL_INETRC`, inet_cfg in the ERTS user's guide).
    pub fn inetrc(&self) -> &Path {
        &self.inetrc
    }

    /// Gives these hosts, and those that have nodes in the mesh, an address each. Hosts of this agent are left out.
    ///
    /// # Errors
    /// [`Cause::InvalidName`], [`Cause::Limit`] beyond [`HOSTS_MAX`], and when the mesh does not answer.
    pub async fn add_hosts(&self, hosts: Vec<String>) -> Result<Vec<(String, Ipv4Addr)>, Refusal> {
        let nodes = answer(self.registry.mesh().nodes()).await?;
        let of_nodes = nodes.into_iter().filter_map(|instance| {
            let (_, host) = instance.node.as_deref()?.split_once('@')?;
            // Erlang has names for them already, or none at all.
            hosts::is_usable(host).then(|| host.to_owned())
        });
        let wanted: BTreeSet<String> = hosts.into_iter().chain(of_nodes).collect();
        let added = self.hosts.add(wanted)?;
        if !added.is_empty() {
            self.kept.set_hosts(self.hosts.all());
            self.write_inetrc();
        }
        for ip in added {
            // There is room for as many as there may be hosts.
            let _ = self.added.try_send((ip, self.port).into());
        }
        Ok(self.hosts.all().into_iter().collect())
    }

    /// What is good and bad about it.
    pub fn finding(&self) -> Finding {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let taken: Vec<_> = places.values().flatten().map(String::as_str).collect();
        let (level, text, fix) = match taken.is_empty() {
            true => (
                Level::Ok,
                format!(
                    "this agent is EPMD on port {} for {} names and {} other hosts",
                    self.port,
                    self.names.len(),
                    self.hosts.all().len()
                ),
                "",
            ),
            false => (
                Level::Warning,
                taken.join("; "),
                "nodes of plain distribution do not find this agent: end what listens there (epmd -kill), and start \
                 nodes with -start_epmd false; the agent listens as soon as it can",
            ),
        };
        Finding {
            level,
            what: "epmd".into(),
            text,
            fix: fix.into(),
        }
    }

    /// Serves until `stop` fires, then until everything is deregistered; or until `freeze` fires, and gives back what it
    /// served. Requests that are under way are answered first.
    pub async fn serve(
        self: Arc<Self>,
        mut serving: Serving,
        stop: CancellationToken,
        freeze: CancellationToken,
    ) -> Serving {
        let (mut listening, mut holding) = (JoinSet::new(), JoinSet::new());
        let until = stop.child_token();
        let listen = |address, listener| {
            let (until, stop, freeze) = (until.clone(), stop.clone(), freeze.clone());
            self.clone().listen(address, listener, until, stop, freeze)
        };
        for (address, listener) in serving.places.drain(..) {
            listening.spawn(listen(address, listener));
        }
        for (stream, held) in serving.parked.drain(..) {
            holding.spawn(self.clone().hold(stream, held, stop.clone(), freeze.clone()));
        }
        let writing = tokio::spawn({
            let epmd = self.clone();
            async move { epmd.kept.keep_writing().await }
        });
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = freeze.cancelled() => break,
                Some(address) = serving.added.recv() => {
                    listening.spawn(listen(address, None));
                }
            }
        }
        until.cancel();
        while let Some(place) = listening.join_next().await {
            serving.places.extend(place);
        }
        while holding.join_next().await.is_some() {}
        writing.abort();
        self.kept.write();
        serving.parked.append(&mut self.parked());
        serving
    }

    fn park(&self, stream: TcpStream, held: Held) {
        self.parked().push((stream, held));
    }

    fn parked(&self) -> MutexGuard<'_, Vec<(TcpStream, Held)>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listen(
        self: Arc<Self>,
        address: SocketAddr,
        bound: Option<Arc<TcpListener>>,
        until: CancellationToken,
        stop: CancellationToken,
        freeze: CancellationToken,
    ) -> (SocketAddr, Option<Arc<TcpListener>>) {
        let mut bound = bound;
        let listener = loop {
            if let Some(listener) = bound.take() {
                break listener;
            }
            bound = self.bind(address, None).1.map(Arc::new);
            if bound.is_none() {
                tokio::select! {
                    () = sleep(LISTEN_AGAIN) => {}
                    () = until.cancelled() => return (address, None),
                }
            }
        };
        let (admission, epmd) = (self.admission.clone(), self);
        let session =
            move |(stream, _), slot| epmd.clone().session(stream, slot, stop.clone(), freeze.clone());
        // A connection here holds a name, and carries nothing.
        let lanes = Lanes::default();
        listener::serve(
            Listener::Epmd,
            listener.clone(),
            admission,
            until,
            &lanes,
            session,
        )
        .await;
        (address, Some(listener))
    }

    /// The address with the chosen port, by the listener that a predecessor of this process had there if there is one;
    /// none when somebody else has the place.
    fn bind(&self, address: SocketAddr, handed: Option<OwnedFd>) -> (SocketAddr, Option<TcpListener>) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let before = places.get(&address).cloned().flatten();
        let bound = match handed {
            Some(handed) => TcpListener::from_std(handed.into()).map(|listener| (listener, address)),
            None => listen_at(address),
        };
        match bound {
            Ok((listener, address)) => {
                info!(%address, "EPMD listens");
                places.insert(address, None);
                (address, Some(listener))
            }
            // A host without IPv6 has no need of it.
            Err(error) if address.is_ipv6() && error.kind() == io::ErrorKind::AddrNotAvailable => {
                (address, None)
            }
            Err(error) => {
                let why = untaken(address, &error);
                if before.as_ref() != Some(&why) {
                    warn!(%address, "EPMD does not listen: {why}");
                }
                places.insert(address, Some(why));
                (address, None)
            }
        }
    }

    fn write_inetrc(&self) {
        if let Err(error) = kept::replace(&self.inetrc, self.hosts.inetrc().as_bytes(), 0o644) {
            warn!(path = %self.inetrc.display(), %error, "cannot be written");
        }
    }

    /// The host that a loopback address stands for.
    fn host_at(&self, ip: IpAddr) -> Option<String> {
        if self.config.listen.iter().any(|address| address.ip() == ip) {
            return Some(self.config.host.clone());
        }
        match ip {
            IpAddr::V4(ip) => self.hosts.at(ip),
            IpAddr::V6(_) => None,
        }
    }

    fn refused(&self, uid: Option<u32>, asked: &str, refusal: &Refusal) {
        self.ports.count_refusal(asked, refusal);
        if self.log.admit() {
            warn!(cause = %refusal.cause, uid, asked, text = refusal.text, "EPMD request refused");
        }
    }
}

fn listen_at(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    // The connections of an agent that ended a moment ago must not keep the next one out.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(1024)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Who has the place instead.
fn untaken(address: SocketAddr, error: &io::Error) -> String {
    if error.kind() != io::ErrorKind::AddrInUse {
        return format!("{address}: {error}");
    }
    let found = listeners::on_port(address.port()).unwrap_or_default();
    let in_the_way = found.iter().find(|other| {
        let ip = other.address.ip();
        ip == address.ip() || ip.is_unspecified()
    });
    match in_the_way {
        Some(other) => format!(
            "{} has port {} at {}",
            other.owner(),
            address.port(),
            other.address
        ),
        None => format!("somebody else has {address}"),
    }
}

/// What a request may not hold.
fn invalid(text: impl Into<String>) -> Refusal {
    Cause::InvalidRequest.because(text)
}

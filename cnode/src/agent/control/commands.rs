//! The commands of the control socket.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use meshx_etf::Term;
use tokio::sync::Semaphore;

use super::{
    args::{Args, missing, wrong},
    heartbeat::Heart,
    message::{map, text},
    options::{options, token},
    upstreams::{Budget, Upstreams},
    watches::Watches,
};
use crate::{
    agent::{
        dir::AgentDir,
        paths,
        registry::{
            NodeListens, NodeRequest, Owner, Registry, ServiceRequest, SessionName, answer, chosen_socket,
        },
        takeover::{Order, ShownLink},
    },
    epmd::{Epmd, HOSTS_MAX},
    log_limit::{LastLine, LogLimit},
    mesh::ServiceName,
    proxy::{
        Listen, Proxy, Upstream,
        cause::{Cause, Refusal},
        links::{LinkId, LinkTable, Purpose, RefusalRecord},
        local::Endpoint,
        plain::PlainPorts,
    },
};

/// Name and version of this program, as clients are told.
pub const PROGRAM: &str = concat!("meshx ", env!("CARGO_PKG_VERSION"));
/// Questions of clients that the mesh is asked at a time; one of each connection. Others wait, so that whoever
/// asks much does not keep links and registrations from their answers.
pub(in crate::agent) const QUESTIONS_MAX: usize = 8;
/// A killed VM's sockets are free this long after its connection closed: its process ends in between.
const SWEEP_DELAY: Duration = Duration::from_millis(1500);

/// Whether a command only asks the mesh or other agents, and may be asked again.
pub(super) fn is_question(command: &str) -> bool {
    [
        "check",
        "names",
        "services",
        "intentions",
        "certs",
        "why",
        "doctor",
    ]
    .contains(&command)
}

/// What all sessions share.
pub(in crate::agent) struct Context {
    pub(in crate::agent) registry: Arc<Registry>,
    pub(in crate::agent) proxy: Arc<Proxy>,
    pub(in crate::agent) links: LinkTable,
    pub(in crate::agent) dir: Arc<AgentDir>,
    /// The mesh's kind.
    pub(in crate::agent) mesh: &'static str,
    pub(in crate::agent) upstreams: Budget,
    /// Ports for nodes of plain distribution.
    pub(in crate::agent) ports: Arc<PlainPorts>,
    pub(in crate::agent) epmd: Option<Arc<Epmd>>,
    /// [`QUESTIONS_MAX`] permits.
    pub(in crate::agent) questions: Semaphore,
    /// [`super::diagnosis::PROBES_MAX`] permits.
    pub(in crate::agent) probes: Semaphore,
    /// For the log lines that clients cause.
    pub(in crate::agent) log: LogLimit,
}

/// One session, as its commands see it.
pub(in crate::agent) struct Client {
    pub(in crate::agent) owner: Owner,
    pub(in crate::agent) upstreams: Upstreams,
    pub(in crate::agent) watches: Watches,
    pub(in crate::agent) heart: Heart,
    /// One permit, held while the mesh is asked for it. Closed when the client has gone: what waits is given up.
    pub(super) asking: Semaphore,
    /// The last refusal that was logged: a VM that waits for its name or for the mesh asks ten times a second.
    pub(super) refused: LastLine,
}

impl Client {
    pub(super) fn new(owner: Owner) -> Self {
        Self::resume(owner, Watches::new(), Heart::new(None))
    }

    /// A client of a predecessor of this process.
    pub(super) fn resume(owner: Owner, watches: Watches, heart: Heart) -> Self {
        Self {
            owner,
            upstreams: Upstreams::new(),
            watches,
            heart,
            asking: Semaphore::new(1),
            refused: LastLine::default(),
        }
    }
}

impl Context {
    /// Whether something is used that a client need not be connected for: a link, a node that EPMD registered.
    pub(super) fn is_used(&self) -> bool {
        !self.links.snapshot().is_empty()
            || !self.registry.local_nodes().is_empty()
            || !self.registry.predecessors().list().is_empty()
    }

    /// The answer to hello.
    pub(super) fn describe(&self, version: i64, features: &[&str]) -> Term {
        let place = self.registry.place();
        map([
            ("version", Term::Int(version)),
            ("features", Term::list(features.iter().map(text))),
            ("agent", text(PROGRAM)),
            ("hosts", Term::list(place.hosts.iter().map(text))),
            ("mesh", text(self.mesh)),
            ("trust_domain", text(self.trust_domain())),
            ("vm_dir", text(place.vm.to_string_lossy())),
            ("dist_socket", text(self.dir.dist_socket().to_string_lossy())),
        ])
    }

    /// Empty before the mesh has told it.
    fn trust_domain(&self) -> String {
        let any = ServiceName::new("meshx").ok();
        let spiffe = any.and_then(|service| self.registry.mesh().spiffe(&service).ok());
        spiffe.map_or_else(String::new, |id| id.trust_domain().to_owned())
    }

    pub(super) async fn run(&self, client: &Client, command: &str, args: &Term) -> Result<Term, Refusal> {
        let (owner, args) = (client.owner, Args(args));
        match command {
            "register_node" => self.register_node(owner, args).await,
            "register_session" => self.register_session(owner, &args),
            "register_service" => self.register_service(owner, args).await,
            "deregister" => {
                self.registry.deregister(owner, args.text("id")?).await?;
                Ok(map([]))
            }
            "connect" => self.connect(client, &args).await,
            "disconnect" => {
                let cut = args.optional_bool("cut")?.unwrap_or(true);
                let id = args.text("upstream")?;
                let existed = client.upstreams.close(id, cut);
                if cut {
                    let (owner, id) = (owner.id, id.to_owned());
                    self.registry
                        .predecessors()
                        .order(&Order::CloseUpstream { owner, id });
                }
                Ok(map([("existed", Term::from(existed))]))
            }
            "node_port" => self.node_port(&args).await,
            "epmd" => self.epmd(owner, &args).await,
            "check" => self.in_turn(client, &self.questions, self.check(&args)).await,
            "names" => self.in_turn(client, &self.questions, self.names()).await,
            "services" => self.in_turn(client, &self.questions, self.services()).await,
            "intentions" => self.in_turn(client, &self.questions, self.intentions()).await,
            "certs" => self.in_turn(client, &self.questions, self.certs()).await,
            "why" => self.in_turn(client, &self.probes, self.why(client, &args)).await,
            "doctor" => self.in_turn(client, &self.probes, self.doctor(&args)).await,
            "links" => {
                let own = self.links.snapshot().into_iter().map(ShownLink::from);
                let mut links: Vec<_> = own.collect();
                links.extend(self.registry.predecessors().links().await);
                Ok(map([("links", Term::list(links.iter().map(link_term)))]))
            }
            "refusal" => self.refusal(&args),
            "cut" => self.cut(owner, &args).await,
            "hello" => Err(Cause::InvalidRequest.because("hello was said already")),
            other => {
                let other: String = other.chars().take(64).collect();
                Err(Cause::InvalidRequest.because(format!("{PROGRAM} has no command {other:?}")))
            }
        }
    }

    pub(super) async fn in_turn<T>(
        &self,
        client: &Client,
        turns: &Semaphore,
        question: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let gone = |_| Cause::InvalidRequest.because("the connection that asked has ended");
        let _own = client.asking.acquire().await.map_err(gone)?;
        let _one = turns.acquire().await.map_err(gone)?;
        question.await
    }

    /// Removes what a killed VM left, once the kernel has let go of it.
    pub(super) fn sweep_later(&self) {
        let dir = self.dir.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SWEEP_DELAY).await;
            // A failure to sweep has been logged; the next sweep tries again.
            let _ = tokio::task::spawn_blocking(move || dir.sweep()).await;
        });
    }

    async fn register_node(&self, owner: Owner, args: Args<'_>) -> Result<Term, Refusal> {
        let name = args.text("node")?;
        let request = NodeRequest {
            node: name,
            listens: node_listens(&args)?,
            creation: args.optional_int("creation")?,
            secret: args.optional_secret("secret")?,
            hidden: args.optional_bool("hidden")?.unwrap_or(false),
            options: options(&args, name, Some(name))?,
        };
        let node = self.registry.register_node(owner, request).await?;
        Ok(map([
            ("creation", Term::from(node.creation)),
            ("secret", Term::binary(*node.secret.expose())),
            ("service", text(&node.service)),
            ("instance", text(name)),
            ("spiffe", text(node.spiffe.to_string())),
        ]))
    }

    fn register_session(&self, owner: Owner, args: &Args<'_>) -> Result<Term, Refusal> {
        let name = match args.optional_text("node")? {
            Some(node) => SessionName::Node(node),
            None => SessionName::Host(args.text("host")?),
        };
        let secret = self.registry.register_session(owner, name)?;
        Ok(map([("secret", Term::binary(*secret.expose()))]))
    }

    async fn register_service(&self, owner: Owner, args: Args<'_>) -> Result<Term, Refusal> {
        let (name, id) = (args.text("name")?, args.optional_text("id")?);
        let request = ServiceRequest {
            name,
            id,
            address: args.term("address").map(endpoint).transpose()?,
            options: options(&args, name, id)?,
        };
        let service = self.registry.register_service(owner, request).await?;
        Ok(map([
            ("id", text(service.id)),
            ("service", text(service.service)),
            ("spiffe", text(service.spiffe.to_string())),
            ("address", endpoint_term(&service.address)),
        ]))
    }

    /// A socket in `up/`, or a loopback port, for this client's user alone.
    async fn connect(&self, client: &Client, args: &Args<'_>) -> Result<Term, Refusal> {
        if self.proxy.is_closed() {
            return Err(Cause::NotReady.because("this agent ends: another one may take its place"));
        }
        let peer = client.owner.peer;
        let name = |key| {
            let text = args.text(key)?;
            ServiceName::new(text)
                .map_err(|error| Cause::InvalidName.because(format!("{key} {text:?}: {error}")))
        };
        let (target, source) = (name("service")?, name("as")?);
        self.registry
            .trust()
            .check(peer, source.as_ref())
            .map_err(|text| Cause::NotPermitted.because(text))?;
        let purpose = match args.term("purpose").map(Term::as_atom) {
            None | Some(Some("rpc")) => Purpose::Rpc,
            Some(Some("tcp")) => Purpose::Tcp,
            Some(_) => return Err(wrong("purpose", "rpc or tcp")),
        };
        if let Some(token) = token(args)? {
            answer(self.registry.mesh().present_token(&source, token)).await?;
        }
        let via = args.optional_text("via")?;
        if let Some(via) = via
            && !self.registry.is_live(client.owner.id, via)
        {
            let text = format!("via {via:?} is not registered through this connection");
            return Err(Cause::InvalidRequest.because(text));
        }
        let path = chosen_socket(&self.registry.place().up)?;
        let id = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let upstream = Upstream {
            source,
            target,
            instance: args.optional_text("instance")?.map(str::to_owned),
            via: via.map(str::to_owned),
            purpose,
            listen: match args.term("address") {
                None => Listen::Uds(path.clone()),
                Some(term) => listen(term, path.clone())?,
            },
            uid: peer.uid,
            owner: client.owner.id,
        };
        let is_socket = matches!(upstream.listen, Listen::Uds(_));
        let user = self.registry.trust().limited(peer.uid);
        let address = client.upstreams.open(&id, &self.upstreams, user, || {
            let fault = |error: String| Cause::NotReady.because(format!("no socket can be made: {error}"));
            let handle = self
                .proxy
                .upstream(upstream)
                .map_err(|error| fault(error.to_string()))?;
            // The socket belongs to the agent's user; whoever connects is checked by the proxy.
            if is_socket && peer.uid != paths::uid() {
                self.dir
                    .open_to_clients(&path)
                    .map_err(|error| fault(error.to_string()))?;
            }
            Ok(handle)
        })?;
        Ok(map([
            ("upstream", text(id)),
            (
                "address",
                endpoint_term(&match address {
                    Listen::Uds(path) => Endpoint::Uds(path),
                    Listen::Tcp(address) => Endpoint::Tcp(address),
                }),
            ),
        ]))
    }

    /// Where nodes of plain distribution dial another one.
    async fn node_port(&self, args: &Args<'_>) -> Result<Term, Refusal> {
        let (node, ip) = (args.text("node")?, loopback(args)?);
        if !self.registry.knows(node).await? {
            return Err(Cause::NoSuchNode.because(format!("no agent has a node {node}")));
        }
        let fault = |error| Cause::NotReady.because(format!("no port can be had: {error}"));
        let port = self.ports.port(ip, node).map_err(fault)?;
        Ok(map([("ip", text(ip.to_string())), ("port", Term::from(port))]))
    }

    /// What a VM of plain distribution is started with.
    async fn epmd(&self, owner: Owner, args: &Args<'_>) -> Result<Term, Refusal> {
        let Some(epmd) = &self.epmd else {
            return Err(Cause::Unsupported.because("this agent is not EPMD: start it with --epmd"));
        };
        let hosts = args.optional_texts("hosts", HOSTS_MAX)?;
        if !hosts.is_empty() && !self.registry.trust().is_operator(owner.peer) {
            return Err(Cause::NotPermitted.because(format!(
                "hosts: only those of the mesh's nodes have an address, unless the agent's user or root asks; uid {} is \
                 neither",
                owner.peer.uid
            )));
        }
        let hosts = epmd.add_hosts(hosts).await?;
        let hosts = hosts
            .into_iter()
            .map(|(host, ip)| map([("host", text(host)), ("address", text(ip.to_string()))]));
        Ok(map([
            ("port", Term::from(epmd.port())),
            ("host", text(epmd.host())),
            ("inetrc", text(epmd.inetrc().to_string_lossy())),
            ("hosts", Term::list(hosts)),
        ]))
    }

    async fn check(&self, args: &Args<'_>) -> Result<Term, Refusal> {
        let decision = self.proxy.check(args.text("from")?, args.text("to")?).await;
        let (cause, why) = match &decision {
            Ok(rules) => ("ok", rules.as_str()),
            Err(refusal) => (refusal.cause.as_str(), refusal.text.as_str()),
        };
        Ok(map([
            ("allowed", Term::from(decision.is_ok())),
            ("cause", Term::atom(cause)),
            ("text", text(why)),
        ]))
    }

    async fn names(&self) -> Result<Term, Refusal> {
        let own = &self.registry.place().agent;
        let nodes = answer(self.registry.mesh().nodes()).await?;
        let nodes = nodes.into_iter().filter_map(|instance| {
            let node = instance.node?;
            let host = node.split_once('@').map_or("", |(_, host)| host);
            Some(map([
                ("host", text(host)),
                ("node", text(&node)),
                ("service", text(instance.service)),
                ("local", Term::from(instance.agent == *own)),
                ("agent", text(instance.address.to_string())),
            ]))
        });
        Ok(map([("nodes", Term::list(nodes))]))
    }

    fn refusal(&self, args: &Args<'_>) -> Result<Term, Refusal> {
        let record = match args.optional_link("link")? {
            Some(link) => self.links.refusal_of_link(LinkId(link)),
            None => {
                self.links
                    .refusal_of_target(args.optional_text("node")?.ok_or_else(|| {
                        missing("link or node", "the 16 bytes of a link, or a binary with a node")
                    })?)
            }
        };
        let Some(RefusalRecord { refusal, at, .. }) = record else {
            return Err(Cause::InvalidRequest.because("no refused link of this name is remembered"));
        };
        Ok(map([
            ("cause", Term::atom(refusal.cause.as_str())),
            ("text", text(refusal.text)),
            ("at", Term::Int(at)),
        ]))
    }

    /// The connection that owns an end may cut a link, and the agent's operator any.
    async fn cut(&self, owner: Owner, args: &Args<'_>) -> Result<Term, Refusal> {
        let id = args
            .optional_link("link")?
            .ok_or_else(|| missing("link", "a binary of 16 bytes"))?;
        let reason = args.text("reason")?;
        let gone = || Cause::InvalidRequest.because(format!("there is no live link {}", LinkId(id)));
        let (link, earlier) = match self.links.get(LinkId(id)) {
            Some(link) => (link, false),
            None => {
                let earlier = self.registry.predecessors().links().await;
                let mut earlier = earlier.into_iter().map(|shown| shown.link);
                let found = earlier.find(|link| link.info.id == LinkId(id));
                (found.ok_or_else(gone)?, true)
            }
        };
        if !link.info.owners.contains(&owner.id) && !self.registry.trust().is_operator(owner.peer) {
            return Err(Cause::NotPermitted.because(format!(
                "link {} is not of this connection, and uid {} is neither the agent's nor root",
                link.info.id, owner.peer.uid
            )));
        }
        let reason = format!("cut on request of uid {}: {reason}", owner.peer.uid);
        if earlier {
            self.registry.predecessors().order(&Order::Cut {
                link: LinkId(id),
                cause: Cause::IntentionDenied,
                text: reason,
            });
            return Ok(map([]));
        }
        match self.links.cut(LinkId(id), Cause::IntentionDenied, &reason) {
            true => Ok(map([])),
            false => Err(gone()),
        }
    }
}

/// `socket`, or the `port` of a node of plain distribution.
fn node_listens<'a>(args: &Args<'a>) -> Result<NodeListens<'a>, Refusal> {
    match args.optional_int("port")? {
        None => Ok(NodeListens::Socket(args.text("socket")?)),
        Some(port) => {
            let port = u16::try_from(port).map_err(|_| wrong("port", "a port"))?;
            Ok(NodeListens::Plain(SocketAddr::new(loopback(args)?, port)))
        }
    }
}

/// The loopback address of `family`.
fn loopback(args: &Args<'_>) -> Result<IpAddr, Refusal> {
    match args.term("family").map(Term::as_atom) {
        None | Some(Some("inet")) => Ok(Ipv4Addr::LOCALHOST.into()),
        Some(Some("inet6")) => Ok(Ipv6Addr::LOCALHOST.into()),
        Some(_) => Err(wrong("family", "inet or inet6")),
    }
}

/// `{tcp, Ip, Port}` or `{uds, Path}`.
fn endpoint(term: &Term) -> Result<Endpoint, Refusal> {
    let endpoint = match term.as_tuple() {
        Some([kind, ip, port]) if kind.as_atom() == Some("tcp") => {
            let ip = ip.as_str().and_then(|ip| ip.parse().ok());
            let port = port.as_int().and_then(|port| u16::try_from(port).ok());
            ip.zip(port)
                .map(|(ip, port)| Endpoint::Tcp(SocketAddr::new(ip, port)))
        }
        Some([kind, path]) if kind.as_atom() == Some("uds") => {
            path.as_str().map(|path| Endpoint::Uds(path.into()))
        }
        _ => None,
    };
    endpoint.ok_or_else(|| wrong("address", "{tcp, Ip :: binary, Port} or {uds, Path :: binary}"))
}

/// Where an upstream is to listen: `uds` (at `path`), `tcp` (a port of 127.0.0.1 that the system chooses) or
/// `{tcp, Ip, Port}`.
fn listen(term: &Term, path: PathBuf) -> Result<Listen, Refusal> {
    match term.as_atom() {
        Some("uds") => return Ok(Listen::Uds(path)),
        Some("tcp") => return Ok(Listen::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))),
        _ => {}
    }
    match endpoint(term) {
        Ok(Endpoint::Tcp(address)) if address.ip().is_loopback() => Ok(Listen::Tcp(address)),
        _ => Err(wrong(
            "address",
            "uds, tcp or {tcp, Ip :: binary, Port} on loopback",
        )),
    }
}

fn endpoint_term(endpoint: &Endpoint) -> Term {
    match endpoint {
        Endpoint::Tcp(address) | Endpoint::PlainNode(address) => Term::tuple([
            Term::atom("tcp"),
            text(address.ip().to_string()),
            Term::from(address.port()),
        ]),
        Endpoint::Uds(path) | Endpoint::NodeSocket(path) => {
            Term::tuple([Term::atom("uds"), text(path.to_string_lossy())])
        }
    }
}

fn link_term(shown: &ShownLink) -> Term {
    let (link, info) = (&shown.link, &shown.link.info);
    let number = |count: u64| Term::from(count);
    let mut pairs = vec![
        ("id", text(info.id.to_string())),
        ("direction", Term::atom(info.direction.as_str())),
        ("purpose", Term::atom(info.purpose.as_str())),
        ("local", text(&info.local)),
        ("remote", text(&info.remote)),
        ("local_spiffe", text(info.local_spiffe.to_string())),
        ("remote_spiffe", text(info.remote_spiffe.to_string())),
        ("verified", Term::from(info.verified)),
        ("since", Term::Int(link.since)),
        ("bytes_in", number(link.bytes_in)),
        ("bytes_out", number(link.bytes_out)),
    ];
    // A link within this agent has no other agent and no certificates.
    pairs.extend(
        info.remote_agent
            .map(|address| ("remote_agent", text(address.to_string()))),
    );
    pairs.extend(shown.local_not_after.map(|at| ("local_not_after", Term::Int(at))));
    pairs.extend(
        shown
            .remote_not_after
            .map(|at| ("remote_not_after", Term::Int(at))),
    );
    Term::map(pairs.into_iter().map(|(key, value)| (Term::atom(key), value)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for address in [
            Endpoint::Tcp("127.0.0.1:80".parse().unwrap()),
            Endpoint::Uds("/x".into()),
            Endpoint::Tcp("[::1]:1".parse().unwrap()),
        ] {
            assert_eq!(endpoint(&endpoint_term(&address)).unwrap(), address);
        }
        for bad in [
            Term::atom("tcp"),
            Term::tuple([Term::atom("tcp"), text("localhost"), Term::Int(1)]),
            Term::tuple([Term::atom("tcp"), text("127.0.0.1"), Term::Int(65_536)]),
            Term::tuple([Term::atom("uds"), Term::Int(1)]),
        ] {
            assert_eq!(endpoint(&bad).unwrap_err().cause, Cause::InvalidRequest);
        }
    }
}

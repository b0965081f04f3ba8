//! Live links proven anew, each by a handshake beside it.
//!
//! Certificates and roots are exchanged while links live, and a link is believed by what its ends showed last. The
//! agent that dialled it shows its new certificate in a handshake of its own and names the link (purpose 4); from the
//! other's yes on both believe the link by that handshake. Bytes flow on meanwhile. One connection serves all links of
//! the same two services between the same two agents.
//!
//! Each agent cuts the links whose other end does not prove itself anew in time: after its root is gone, or after its
//! certificate has ended. The end of validity alone cuts nothing: a foreign data plane cannot prove itself anew.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, yield_now};
use tokio::time::sleep;
use tokio_rustls::server::TlsStream;

use super::Proxy;
use super::cause::{Cause, Refusal};
use super::frames::{read_frame, write_all};
use super::inbound::Shown;
use super::links::{Direction, LinkId, LinkInfo, Purpose, unix_now};
use super::proof::Proof;
use super::tls::Peer;
use super::why::Trail;
use super::wide::Wide;
use super::wire::{Asked, MAX_MESH_FRAME, Request, encode_reply};
use crate::mesh::{Identity, Instance, Protocol, ServiceName};
use crate::node::Backoff;
use crate::node::backoff::Attempts;

/// Links that one connection may prove anew.
pub(super) const REPROOFS_PER_CONNECTION: usize = 256;
/// Connections that one agent makes for it at a time.
const CONNECTIONS_AT_ONCE: usize = 8;
/// After a failure.
const BACKOFF: Backoff = Backoff {
    min: Duration::from_secs(1),
    max: Duration::from_secs(15),
};

/// For each link, when links are proven anew.
const SPREAD: Duration = Duration::from_millis(10);

/// A moment after a rotation, so that not all links come at once.
fn moment(links: usize, max: Duration) -> Duration {
    let spread = (SPREAD.saturating_mul(u32::try_from(links).unwrap_or(u32::MAX))).min(max);
    let share = getrandom::u32().map_or(0, |random| random % 1024);
    spread / 1024 * share
}

/// What goes by one connection: the two services, and where the other agent is.
type Way = (ServiceName, ServiceName, SocketAddr);

/// A link as its keeper sees it.
struct Watched {
    /// The chain and the roots that were held against each other last.
    checked: (Arc<[CertificateDer<'static>]>, Arc<RootCertStore>),
    /// Since when the chain leads to no root.
    rootless: Option<Instant>,
    /// When it is to be proven anew.
    due: Option<Instant>,
    attempts: Attempts,
}

impl Watched {
    fn new(proof: &Proof) -> Self {
        Self {
            checked: (proof.peer.chain.clone(), proof.shown.roots.clone()),
            rootless: None,
            due: None,
            attempts: Attempts::new(BACKOFF),
        }
    }

    /// Holds the other end's chain against the roots of now, when either is another than before.
    fn check(&mut self, proof: &Proof, roots: &Arc<RootCertStore>, dialled: bool) -> bool {
        let (chain, before) = &self.checked;
        let same_roots = Arc::ptr_eq(before, roots) || before.roots == roots.roots;
        if Arc::ptr_eq(chain, &proof.peer.chain) && same_roots {
            return false;
        }
        self.checked = (proof.peer.chain.clone(), roots.clone());
        if proof.is_rooted(roots, dialled) {
            self.rootless = None;
        } else if self.rootless.is_none() {
            self.rootless = Some(Instant::now());
            self.due = Some(Instant::now());
        }
        true
    }
}

impl Proxy {
    /// Has the links of this agent proven anew whenever that is due, and cuts those that cannot be. Until dropped.
    pub async fn keep_proven(self: Arc<Self>) {
        let mut watched: HashMap<LinkId, Watched> = HashMap::new();
        let mut running: JoinSet<Vec<(LinkId, bool)>> = JoinSet::new();
        let at_once = Arc::new(Semaphore::new(CONNECTIONS_AT_ONCE));
        loop {
            sleep(self.settings.proof_look).await;
            while let Some(ended) = running.try_join_next() {
                for (id, proven) in ended.unwrap_or_default() {
                    let Some(link) = watched.get_mut(&id) else {
                        continue;
                    };
                    link.due = (!proven).then(|| Instant::now() + link.attempts.wait());
                    if proven {
                        link.attempts = Attempts::new(BACKOFF);
                    }
                }
            }
            let ways = self.look_at_proofs(&mut watched).await;
            for (way, links) in ways {
                for links in links.chunks(REPROOFS_PER_CONNECTION) {
                    let (proxy, at_once) = (self.clone(), at_once.clone());
                    let (way, links) = (way.clone(), links.to_vec());
                    running.spawn(async move {
                        // It is never closed.
                        let _turn = at_once.acquire().await;
                        proxy.prove_anew(&way, links).await
                    });
                }
            }
        }
    }

    /// Cuts what is not believed any more; returns what is to be proven anew now.
    async fn look_at_proofs(&self, watched: &mut HashMap<LinkId, Watched>) -> HashMap<Way, Vec<LinkInfo>> {
        let links: HashMap<LinkId, (LinkInfo, Proof)> = self
            .links
            .snapshot()
            .into_iter()
            .filter_map(|link| Some((link.info.id, (link.info.clone(), link.info.proof?))))
            .collect();
        watched.retain(|id, _| links.contains_key(id));
        let count = links.len();
        let mut identities: HashMap<ServiceName, Option<Arc<Identity>>> = HashMap::new();
        let mut ways: HashMap<Way, Vec<LinkInfo>> = HashMap::new();
        for (id, (info, proof)) in links {
            let service = info.local_spiffe.service();
            if !identities.contains_key(service) {
                let identity = self.ask(self.mesh.identity(service)).await.ok();
                identities.insert(service.clone(), identity);
            }
            // What the mesh gives no answer about stays believed as it was.
            let Some(Some(identity)) = identities.get(service) else {
                continue;
            };
            let dialled = info.direction == Direction::Outbound;
            let link = watched.entry(id).or_insert_with(|| Watched::new(&proof));
            if link.check(&proof, &identity.roots, dialled) {
                // Signatures of thousands of links may be looked at in a row.
                yield_now().await;
            }
            if let Some(refusal) = self.unproven(&info, &proof, link.rootless) {
                self.links.cut(id, refusal.cause, &refusal.text);
                continue;
            }
            let wanted = proof.is_replaced_by(identity) || proof.is_ageing(unix_now());
            let (true, true, Some(agent)) = (dialled, proof.is_native(), info.remote_agent) else {
                continue;
            };
            if !wanted && link.rootless.is_none() {
                link.due = None;
                continue;
            }
            let (now, max) = (Instant::now(), self.settings.reproof_spread);
            if *link.due.get_or_insert_with(|| now + moment(count, max)) <= now {
                // Beyond any answer, should the attempt be lost.
                link.due = Some(now + self.settings.setup_timeout * 4);
                let way = (service.clone(), info.remote_spiffe.service().clone(), agent);
                ways.entry(way).or_default().push(info);
            }
        }
        ways
    }

    /// Why a link is not believed any more.
    fn unproven(&self, info: &LinkInfo, proof: &Proof, rootless: Option<Instant>) -> Option<Refusal> {
        let grace = self.settings.reproof_grace;
        if rootless.is_some_and(|since| since.elapsed() >= grace) {
            return Some(Cause::UnknownAuthority.because(format!(
                "the root that signed the certificate of {} is gone for {grace:?}, and it has not proven itself anew",
                info.remote
            )));
        }
        let ended = unix_now() - proof.peer.not_after;
        let patience = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        (proof.is_native() && ended > patience).then(|| {
            Cause::CertificateExpired.because(format!(
                "the certificate of {} ended {ended} s ago, and it has not proven itself anew",
                info.remote
            ))
        })
    }

    /// One handshake, and a request for each of the links. Says which of them are proven.
    async fn prove_anew(
        &self,
        (source, service, address): &Way,
        links: Vec<LinkInfo>,
    ) -> Vec<(LinkId, bool)> {
        let target = Instance {
            id: service.to_string(),
            service: service.clone(),
            node: None,
            agent: "of live links".to_owned(),
            address: *address,
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        let mut secured = self.handshake(source, &target, &mut Trail::none()).await;
        let mut proven = Vec::new();
        let mut fault = None;
        for info in links {
            let began = Instant::now();
            let node = match info.purpose {
                Purpose::Dist => info.local,
                Purpose::Rpc | Purpose::Tcp => String::new(),
            };
            let request = Request {
                asked: Asked::Reproof,
                link: info.id,
                service: service.to_string(),
                instance: info.remote,
                node,
            };
            let answer = match &mut secured {
                Ok(secured) => {
                    let answer = self.request(secured, &request, self.settings.frame_timeout).await;
                    answer.map(|()| secured.proof.clone())
                }
                Err(refusal) => Err(refusal.clone()),
            };
            proven.push((info.id, answer.is_ok()));
            match answer {
                Ok(proof) => self.links.prove(info.id, proof, Some(began.elapsed())),
                Err(refusal) => {
                    self.links.count_unproven();
                    fault = Some(refusal);
                }
            }
        }
        if let Some(fault) = fault {
            let failed = proven.iter().filter(|(_, proven)| !proven).count();
            tracing::warn!(
                %source, target = %service, agent = %address, links = failed, cause = %fault.cause, text = fault.text,
                "live links could not be proven anew"
            );
        }
        proven
    }

    /// Answers requests that name live links, until there are no more of them.
    ///
    /// # Errors
    /// The refusal of a request that is no such one. Its reply is still to be sent.
    pub(super) async fn answer_reproofs(
        &self,
        stream: &mut TlsStream<Wide>,
        first: Request,
        peer: &Peer,
        shown: &Shown,
    ) -> Result<(), Refusal> {
        let deadline = self.settings.frame_timeout;
        let mut request = first;
        for _ in 0..REPROOFS_PER_CONNECTION {
            let answer = match self.elsewhere.get() {
                Some(elsewhere)
                    if request.asked == Asked::Reproof && self.links.get(request.link).is_none() =>
                {
                    let theirs = elsewhere.reprove(Forwarded::new(&request, peer, shown)).await;
                    theirs.unwrap_or_else(|| Err(no_such_link(request.link)))
                }
                _ => self.reprove(&request, peer, &shown.service, &shown.identity),
            };
            if let Err(refusal) = &answer {
                self.links.count_unproven();
                // A link that has just ended is nobody's fault.
                if refusal.cause != Cause::InvalidRequest {
                    return answer;
                }
            }
            let mut reply = Vec::new();
            encode_reply(&answer, &mut reply);
            write_all(stream, &reply, deadline).await?;
            request = match read_frame(stream, MAX_MESH_FRAME, deadline).await {
                Err(refusal) if refusal.cause == Cause::Unreachable => return Ok(()),
                frame => Request::decode(&frame?)?,
            };
        }
        Err(Cause::Limit.because(format!(
            "{REPROOFS_PER_CONNECTION} links are proven by one connection (REPROOFS_PER_CONNECTION)"
        )))
    }

    /// Believes a live link by this handshake, when it is between the same two services and instances as the link.
    fn reprove(
        &self,
        request: &Request,
        peer: &Peer,
        shown: &ServiceName,
        identity: &Arc<Identity>,
    ) -> Result<(), Refusal> {
        if request.asked != Asked::Reproof {
            return Err(Cause::Limit.because("a connection that proves links can become none"));
        }
        let none = || no_such_link(request.link);
        let info = self.links.get(request.link).ok_or_else(none)?.info;
        let native = info.proof.as_ref().is_some_and(Proof::is_native);
        if info.direction != Direction::Inbound || !native {
            return Err(none());
        }
        // The service is what was proven; a mesh that was set up anew has another trust domain.
        let same_peer = info.remote_spiffe.in_domain(peer.id.trust_domain()) == peer.id;
        let same_node = info.purpose != Purpose::Dist || info.remote == request.node;
        let same_end = info.local_spiffe.service() == shown && info.local == request.instance;
        if !(same_peer && same_node && same_end && request.service == shown.as_ref()) {
            return Err(Cause::IdentityMismatch.because(format!(
                "{} proves link {} from {:?} to {:?}, which is one of {} from {} to {}",
                peer.id,
                request.link,
                request.node,
                request.instance,
                info.remote_spiffe,
                info.remote,
                info.local
            )));
        }
        let proof = Proof::new(identity, peer, Protocol::Meshx);
        self.links.prove(request.link, proof, None);
        Ok(())
    }

    /// Whom to ask about links that this process does not know.
    pub(crate) fn ask_elsewhere(&self, elsewhere: Arc<dyn Elsewhere>) {
        // Once is enough.
        let _ = self.elsewhere.set(elsewhere);
    }

    /// Believes a live link by a handshake that another process of this agent has answered; none when this one does
    /// not hold it.
    pub(crate) async fn reprove_forwarded(&self, forwarded: Forwarded) -> Option<Result<(), Refusal>> {
        let link = forwarded.request.link;
        self.links.get(link)?;
        let answer = self.reprove_held(forwarded).await;
        match &answer {
            Ok(()) => tracing::info!(%link, "a link of this process was proven anew"),
            Err(refusal) => tracing::warn!(%link, %refusal, "a link of this process was not proven anew"),
        }
        Some(answer)
    }

    async fn reprove_held(&self, forwarded: Forwarded) -> Result<(), Refusal> {
        let Forwarded {
            request,
            shown,
            chain,
        } = forwarded;
        let identity = self.ask(self.mesh.identity(&shown)).await?;
        let chain: Vec<CertificateDer<'static>> = chain.into_iter().map(CertificateDer::from).collect();
        let peer = Peer::of(&chain, identity.id.trust_domain())
            .map_err(|error| Cause::CertificateInvalid.because(error.to_string()))?;
        if !peer.leads_to(&identity.roots, unix_now(), false) {
            let text = format!("{} does not lead to a root of the mesh", peer.id);
            return Err(Cause::UnknownAuthority.because(text));
        }
        let request = Request {
            asked: Asked::Reproof,
            link: request.link,
            service: request.service,
            instance: request.instance,
            node: request.node,
        };
        self.reprove(&request, &peer, &shown, &identity)
    }
}

/// Other processes of this agent that hold links (`agent::takeover`).
pub(crate) trait Elsewhere: Send + Sync {
    /// The answer of the one that holds the link; none when none does.
    fn reprove(&self, forwarded: Forwarded) -> BoxFuture<'_, Option<Result<(), Refusal>>>;
}

/// A proof of a link that another process of this agent holds than the one whose port it came in at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Forwarded {
    request: ForwardedRequest,
    /// Whose certificate was shown.
    shown: ServiceName,
    /// Who came, verified: the leaf, then the intermediates, in DER.
    chain: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct ForwardedRequest {
    link: LinkId,
    service: String,
    instance: String,
    node: String,
}

impl Forwarded {
    fn new(request: &Request, peer: &Peer, shown: &Shown) -> Self {
        Self {
            request: ForwardedRequest {
                link: request.link,
                service: request.service.clone(),
                instance: request.instance.clone(),
                node: request.node.clone(),
            },
            shown: shown.service.clone(),
            chain: peer
                .chain
                .iter()
                .map(|certificate| certificate.to_vec())
                .collect(),
        }
    }
}

fn no_such_link(link: LinkId) -> Refusal {
    Cause::InvalidRequest.because(format!("no live link {link} came in here"))
}

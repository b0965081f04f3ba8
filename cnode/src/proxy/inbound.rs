//! The inbound ports: another agent, or a proxy of another make, dials an instance of this one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::admission::{Origin, Slot};
use super::cause::{Cause, Refusal};
use super::frames::{Duplex, linger, silent, write_all};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::listener::{self, Listener};
use super::local::LocalInstance;
use super::proof::Proof;
use super::tls::{self, Peer};
use super::wide::Wide;
use super::{Attempt, Proxy, keepalive};
use crate::mesh::{Identity, Instance, Protocol, ServiceName, SpiffeId};

/// A connection whose handshake is done.
struct Secured {
    stream: TlsStream<Wide>,
    peer: Result<Peer, Refusal>,
    shown: Shown,
}

/// Where a connection came from, and what it was shown.
pub(super) struct Shown {
    pub(super) address: SocketAddr,
    pub(super) service: ServiceName,
    pub(super) identity: Arc<Identity>,
    pub(super) protocol: Protocol,
}

/// A refusal, and the connection that is still to hear of it, with the last bytes to send there.
pub(super) struct Refused {
    pub(super) refusal: Refusal,
    pub(super) tell: Option<(Box<dyn Duplex>, Vec<u8>)>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, tell: None }
    }
}

/// The near end, the far end and their link: bytes flow next.
pub(super) type Decided = (Box<dyn Duplex>, Box<dyn Duplex>, LinkGuard);

impl Proxy {
    /// Serves the inbound port until dropped, and its links with it.
    pub async fn serve_inbound(self: Arc<Self>, listener: impl Into<Arc<TcpListener>>) {
        self.serve_port(listener.into(), None).await;
    }

    /// Serves an inbound port that leads to this one instance, until dropped, and its links with it. Proxies of another
    /// make that don't say whom they dial need one.
    pub async fn serve_instance(self: Arc<Self>, listener: impl Into<Arc<TcpListener>>, instance: String) {
        self.serve_port(listener.into(), Some(instance.into())).await;
    }

    async fn serve_port(self: Arc<Self>, listener: Arc<TcpListener>, only: Option<Arc<str>>) {
        let proxy = self.clone();
        let link = move |(stream, peer), slot| proxy.clone().inbound_link(stream, peer, only.clone(), slot);
        let (admission, closed) = (self.inbound.clone(), self.closed.clone());
        let serve = listener::serve(
            Listener::Inbound,
            listener,
            admission,
            closed,
            &self.settings.lanes,
            link,
        );
        self.serving.track_future(serve).await;
    }

    async fn inbound_link(
        self: Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        only: Option<Arc<str>>,
        slot: Slot,
    ) {
        let mut attempt = Attempt::new(Listener::Inbound);
        attempt.peer = address.to_string();
        let decided = tokio::select! {
            // In a box of its own: what only the decision needs goes with it.
            decided = Box::pin(self.decide_inbound(stream, address, only.as_deref(), &mut attempt, &slot)) => decided,
            () = slot.evicted() => Err(slot.refusal().into()),
        };
        match decided {
            Ok(None) => {}
            Ok(Some((near, far, link))) => {
                drop(slot);
                self.carry(near, far, &link, &attempt).await;
            }
            Err(Refused { refusal, tell }) => {
                self.refuse(&attempt, &refusal);
                let Some((mut stream, last)) = tell else { return };
                let goodbye = async {
                    let _ = write_all(&mut stream, &last, self.settings.frame_timeout).await;
                    linger(&mut stream, self.settings.linger_time).await;
                };
                tokio::select! {
                    biased;
                    () = goodbye => {}
                    () = slot.evicted() => {}
                }
            }
        }
    }

    /// All that comes before the bytes flow. None when that is all there was to come.
    async fn decide_inbound(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        only: Option<&str>,
        attempt: &mut Attempt,
        slot: &Slot,
    ) -> Result<Option<Decided>, Refused> {
        let deadline = self.settings.handshake_timeout;
        let secured = timeout(deadline, self.secure(stream, address, only, attempt)).await;
        let secured = secured.unwrap_or_else(|_| Err(silent("a TLS handshake", deadline).into()));
        if !attempt.is_probe {
            self.links
                .count_accepted(secured.as_ref().is_ok_and(|secured| secured.peer.is_ok()));
        }
        let Secured { stream, peer, shown } = secured?;
        if let Ok(peer) = &peer {
            attempt.source = peer.id.service().to_string();
            slot.moves(&self.proven, Origin::service(peer.id.clone(), address.ip()));
        }
        match shown.protocol {
            Protocol::Meshx => self.decide_request(stream, peer, shown, only, attempt).await,
            Protocol::Connect => {
                let decided = self.decide_foreign(stream, peer, shown, only, attempt).await;
                decided.map(Some)
            }
        }
    }

    /// The TLS handshake. The certificate is that of the service that the client asks for by SNI.
    async fn secure(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        only: Option<&str>,
        attempt: &mut Attempt,
    ) -> Result<Secured, Refused> {
        // rustls has sent its alert by then.
        let fault = |error: &io::Error, stream: Option<Wide>| Refused {
            refusal: match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    Cause::InvalidRequest.because("closed inside its TLS handshake")
                }
                _ => tls::refusal(error),
            },
            tell: stream.map(|stream| (Box::new(stream) as Box<dyn Duplex>, Vec::new())),
        };
        keepalive::watch(&stream).map_err(|error| fault(&error, None))?;
        if matches!(stream.peek(&mut [0]).await, Ok(0)) {
            attempt.is_probe = true;
        }
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), Wide::new(stream));
        let hello = match (&mut acceptor).await {
            Ok(hello) => hello,
            Err(error) => return Err(fault(&error, acceptor.take_io())),
        };
        let client = hello.client_hello();
        let name = client.server_name().map(str::to_owned);
        let protocol = tls::offered(client.alpn().into_iter().flatten());
        attempt.target = name.clone().unwrap_or_default();
        let Some(service) = self.served(name.as_deref(), only) else {
            let refusal = Cause::NoSuchService.because(match name {
                Some(name) => format!("{name} is not served here"),
                None => "no service was named, and not just one is served here".to_owned(),
            });
            let config =
                tls::no_server_config().map_err(|error| Cause::NotReady.because(error.to_string()))?;
            // Ends with an alert, by which the dialler knows that nobody is here.
            let ended = hello.into_stream(config).into_fallible().await.err();
            return Err(Refused {
                refusal,
                tell: ended.map(|(_, io)| (Box::new(io) as Box<dyn Duplex>, Vec::new())),
            });
        };
        attempt.target = service.to_string();
        let identity = self.ask(self.mesh.identity(&service)).await?;
        let config = tls::server_config(&identity, protocol)
            .map_err(|error| Cause::NotReady.because(format!("certificate of {service}: {error}")))?;
        let handshake = hello.into_stream(config).into_fallible().await;
        let stream = handshake.map_err(|(error, io)| fault(&error, Some(io)))?;
        let chain = stream.get_ref().1.peer_certificates();
        let chain = chain.ok_or_else(|| Cause::NoCertificate.because("the client has no certificate"))?;
        let peer = Peer::of(chain, identity.id.trust_domain()).map_err(Refusal::from);
        Ok(Secured {
            stream,
            peer,
            shown: Shown {
                address,
                service,
                identity,
                protocol,
            },
        })
    }

    /// The service that a client means by this SNI, when it is here: at a port that leads to `only` one instance, that
    /// one's.
    fn served(&self, name: Option<&str>, only: Option<&str>) -> Option<ServiceName> {
        let unnamed = match only {
            Some(id) => self.local.by_id(id).map(|local| local.instance.service.clone()),
            None => self.local.only_service(),
        };
        let Some(name) = name else {
            return unnamed;
        };
        let service = ServiceName::new(name.split('.').next()?).ok()?;
        let wanted = self.spiffe(&service).ok()?.server_name();
        let here = !self.instances_here(&service, only).is_empty();
        (here && wanted.eq_ignore_ascii_case(name)).then_some(service)
    }

    /// The instances of a service that a port leads to.
    pub(super) fn instances_here(
        &self,
        service: &ServiceName,
        only: Option<&str>,
    ) -> Vec<Arc<LocalInstance>> {
        let mut here = self.local.by_service(service);
        here.retain(|local| only.is_none_or(|id| local.instance.id == id));
        here
    }

    /// A link from outside to `local`; `remote` is what its other end is called.
    pub(super) fn inbound_info(
        &self,
        id: LinkId,
        purpose: Purpose,
        (shown, peer): (&Shown, &Peer),
        local: &LocalInstance,
        remote: String,
    ) -> Result<LinkInfo, Refusal> {
        Ok(LinkInfo {
            id,
            direction: Direction::Inbound,
            purpose,
            local: local.instance.id.clone(),
            remote,
            local_spiffe: self.spiffe(&shown.service)?,
            remote_spiffe: peer.id.clone(),
            verified: true,
            remote_agent: Some(shown.address),
            proof: Some(Proof::new(&shown.identity, peer, shown.protocol)),
            instances: vec![local.instance.id.clone()],
            owners: vec![local.owner],
        })
    }

    /// Enters a link from outside to `local`, decides it and connects to its near end. With `both`, nobody else asks for
    /// the way back.
    pub(super) async fn admit(
        &self,
        info: LinkInfo,
        local: &LocalInstance,
        both: bool,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let (here, there) = (info.local_spiffe.clone(), info.remote_spiffe.clone());
        // In the table before it is asked: a denial that comes after the answer finds it there.
        let link = self.links.insert(info)?;
        self.still_here(local)?;
        self.authorize(&there, here.service()).await?;
        if both {
            self.authorize(&here, there.service()).await?;
        }
        Ok((self.reach(local).await?, link))
    }

    /// A claimed node must be an instance of the service that the certificate names.
    pub(super) async fn prove_node(&self, node: &str, peer: &SpiffeId) -> Result<Instance, Refusal> {
        // The name alone tells most spoofers, so that they cannot use up what the mesh may be asked.
        if !peer.service().may_have_node(node) {
            let text = format!("no node of that name is an instance of {}", peer.service());
            return Err(mismatch(&peer.to_string(), node, &text));
        }
        let claimed = self.claimed_node(node, &peer.to_string()).await?;
        // The whole identity: a service of the same name in another data centre or namespace is another one.
        let wanted = self.spiffe(&claimed.service)?;
        if wanted != *peer {
            return Err(mismatch(
                &peer.to_string(),
                node,
                &format!("that is an instance of {wanted}"),
            ));
        }
        Ok(claimed)
    }

    /// The instance of a node that somebody claims to be. It is not one of this agent's own: those don't come in from
    /// outside.
    pub(super) async fn claimed_node(&self, node: &str, by: &str) -> Result<Instance, Refusal> {
        let claimed = match self.find_node(node).await {
            Ok(claimed) => claimed,
            Err(refusal) if refusal.cause == Cause::NotReady => return Err(refusal),
            Err(refusal) => return Err(mismatch(by, node, &refusal.text)),
        };
        if self.local.by_node(node).is_some() {
            return Err(mismatch(by, node, "that node runs on this agent"));
        }
        Ok(claimed)
    }
}

pub(super) fn mismatch(by: &str, node: &str, why: &str) -> Refusal {
    Cause::IdentityMismatch.because(format!("{by} claims {node}: {why}"))
}

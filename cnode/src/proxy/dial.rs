//! From this agent to another, or to a data plane of another make.

use std::net::SocketAddr;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::cause::{Cause, Refusal};
use super::endpoint::not_itself;
use super::frames::{Duplex, read_frame, silent, write_all};
use super::links::{Direction, LinkId, LinkInfo, Purpose, unix_now};
use super::local::{LocalInstance, SidecarUpstreams};
use super::proof::Proof;
use super::tls::{self, Peer};
use super::turns::Turn;
use super::unverified::sidecar_of;
use super::why::{AGENT, CERTIFICATE, TLS, Trail, span};
use super::wide::Wide;
use super::wire::{Asked, MAX_MESH_FRAME, Request, decode_reply};
use super::{Proxy, keepalive, near, peer_uid};
use crate::mesh::{Instance, Protocol, ServiceName};

/// A connection that the other side has accepted, as far as it tells.
pub(super) struct Dialled {
    pub(super) stream: Box<dyn Duplex>,
    address: SocketAddr,
    /// None when somebody else has verified the other end.
    proof: Option<Proof>,
    /// None where nobody has to wait.
    pub(super) turn: Option<Turn>,
}

impl Dialled {
    fn by(secured: Secured, turn: Turn) -> Self {
        Self {
            stream: Box::new(secured.stream),
            address: secured.address,
            proof: Some(secured.proof),
            turn: Some(turn),
        }
    }

    /// Completes what is known of the link.
    pub(super) fn describe(&self, info: &mut LinkInfo) {
        info.direction = Direction::Outbound;
        info.remote_agent = Some(self.address);
        info.verified = self.proof.is_some();
        if let Some(proof) = &self.proof {
            info.remote_spiffe = proof.peer.id.clone();
        }
        info.proof.clone_from(&self.proof);
    }
}

/// A connection whose two ends have proven who they are.
pub(super) struct Secured {
    pub(super) stream: TlsStream<Wide>,
    pub(super) address: SocketAddr,
    pub(super) proof: Proof,
}

impl Proxy {
    /// Connects to the agent of `target`, shows the certificate of `source` and holds the other one against the
    /// target's identity.
    ///
    /// What is spoken is the catalogue's word alone. An agent that does not speak `meshx/1` is not taken for something
    /// else, nor the other way round.
    pub(super) async fn handshake(
        &self,
        source: &ServiceName,
        target: &Instance,
        trail: &mut Trail,
    ) -> Result<Secured, Refusal> {
        let (settings, address) = (&self.settings, target.address);
        trail.look(CERTIFICATE);
        let identity = self.ask(self.mesh.identity(source)).await?;
        let left = identity.not_after - unix_now();
        if left <= 0 {
            let text = format!("the certificate of {source} expired {} ago", span(-left));
            return Err(Cause::CertificateExpired.because(text));
        }
        trail.pass(|| format!("{}, valid for {}", identity.id, span(left)));
        trail.look(AGENT);
        let wanted = self.spiffe(&target.service)?;
        let config = tls::client_config(&identity, wanted.clone(), target.protocol)
            .map_err(|error| Cause::NotReady.because(format!("certificate of {source}: {error}")))?;
        // A name that DNS would not take is left out; the certificate is held against the SPIFFE id either way.
        let name = ServerName::try_from(wanted.server_name()).unwrap_or(ServerName::from(address.ip()));

        let connect = timeout(settings.connect_timeout, TcpStream::connect(address)).await;
        let unreachable = |why: &dyn std::fmt::Display| {
            Cause::Unreachable.because(format!(
                "agent {} at {address} of {}: {why}",
                target.agent, target.id
            ))
        };
        let stream = match connect {
            Ok(connected) => connected.map_err(|error| unreachable(&error))?,
            Err(_) => {
                return Err(unreachable(&format!(
                    "no answer for {:?}",
                    settings.connect_timeout
                )));
            }
        };
        keepalive::watch(&stream).map_err(|error| unreachable(&error))?;
        trail.pass(|| format!("{address} takes connections"));
        trail.look(TLS);
        let handshake = TlsConnector::from(config).connect(name, Wide::new(stream));
        let handshake = match timeout(settings.handshake_timeout, handshake).await {
            Ok(done) => done.map_err(|error| tls::refusal(&error)),
            Err(_) => Err(silent("a TLS handshake", settings.handshake_timeout)),
        };
        self.links.count_dialled(handshake.is_ok());
        let stream = handshake.map_err(|refusal| at(address, refusal))?;
        let (_, session) = stream.get_ref();
        let chain = session.peer_certificates();
        let chain = chain.ok_or_else(|| at(address, Cause::NoCertificate.because("no certificate")))?;
        let peer = Peer::of(chain, wanted.trust_domain()).map_err(|error| at(address, error.into()))?;
        if target.protocol == Protocol::Meshx && session.alpn_protocol() != Some(tls::ALPN) {
            return Err(at(
                address,
                Cause::VersionMismatch.because("the other side does not speak meshx/1"),
            ));
        }
        trail.pass(|| match target.protocol {
            Protocol::Meshx => format!("meshx/1 with {}", peer.id),
            Protocol::Connect => format!("plain mutual TLS with {}", peer.id),
        });
        Ok(Secured {
            stream,
            address,
            proof: Proof::new(&identity, &peer, target.protocol),
        })
    }

    /// Dials the agent of `target` as `source`, and asks for the instance. `node` is the dialling node's name,
    /// or empty. A data plane of another make is asked for nothing: it decides when the handshake is done, and tells
    /// only by closing. Waits for its turn there.
    pub(super) async fn dial(
        &self,
        source: &ServiceName,
        target: &Instance,
        purpose: Purpose,
        link: LinkId,
        node: &str,
    ) -> Result<Dialled, Refusal> {
        let who = if node.is_empty() { source.as_ref() } else { node };
        let turn = self.turns.take(target.address, who).await;
        let mut secured = self.handshake(source, target, &mut Trail::none()).await?;
        if target.protocol == Protocol::Connect {
            return Ok(Dialled::by(secured, turn));
        }
        let request = Request {
            asked: Asked::Link(purpose),
            link,
            service: target.service.to_string(),
            instance: target.id.clone(),
            node: node.to_owned(),
        };
        // The other agent may need all of its own time to decide.
        let deadline = self.settings.setup_timeout;
        self.request(&mut secured, &request, deadline).await?;
        Ok(Dialled::by(secured, turn))
    }

    /// Asks another agent, and waits so long for its yes.
    pub(super) async fn request(
        &self,
        secured: &mut Secured,
        request: &Request,
        deadline: Duration,
    ) -> Result<(), Refusal> {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let stream = &mut secured.stream;
        let exchange = async {
            write_all(stream, &bytes, self.settings.frame_timeout).await?;
            let reply = read_frame(stream, MAX_MESH_FRAME, deadline).await?;
            decode_reply(&reply).map_err(Refusal::from)?
        };
        exchange.await.map_err(|refusal| at(secured.address, refusal))
    }

    /// Dials `target` through the proxy beside `local`. That proxy shows the certificate and verifies the other end; this
    /// agent has its word for it.
    pub(super) async fn dial_sidecar(
        &self,
        local: &LocalInstance,
        sidecar: &dyn SidecarUpstreams,
        target: &ServiceName,
    ) -> Result<Dialled, Refusal> {
        let address = sidecar.port_for(target).await?;
        // What goes there is not encrypted.
        if !address.ip().is_loopback() {
            return Err(Cause::InvalidRequest.because(format!(
                "the sidecar's port for {target} is at {address}, wanted one on loopback"
            )));
        }
        let unreachable = |why: &dyn std::fmt::Display| {
            Cause::Unreachable.because(format!("the sidecar's port for {target} at {address}: {why}"))
        };
        let deadline = self.settings.connect_timeout;
        let connect = async {
            let stream = TcpStream::connect(address)
                .await
                .and_then(not_itself)
                .map_err(|error| unreachable(&error))?;
            near::hasten(&stream).map_err(|error| unreachable(&error))?;
            // While the sidecar is down anybody on this host can have its port.
            sidecar_of(local, peer_uid::of_server(&stream).await?)?;
            Ok::<_, Refusal>(stream)
        };
        let stream = match timeout(deadline, connect).await {
            Ok(connected) => connected?,
            Err(_) => return Err(unreachable(&format!("no answer for {deadline:?}"))),
        };
        Ok(Dialled {
            stream: Box::new(stream),
            address,
            proof: None,
            turn: None,
        })
    }
}

fn at(address: SocketAddr, refusal: Refusal) -> Refusal {
    refusal
        .cause
        .because(format!("agent at {address}: {}", refusal.text))
}

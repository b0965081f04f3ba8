//! From this agent to another.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Proxy;
use super::cause::{Cause, Refusal};
use super::frames::{read_frame, silent, write_all};
use super::keepalive;
use super::links::{LinkId, Purpose, unix_now};
use super::tls::{self, Peer};
use super::why::{AGENT, CERTIFICATE, TLS, Trail, span};
use super::wire::{MAX_MESH_FRAME, Request, decode_reply};
use crate::mesh::{Identity, Instance, ServiceName};

/// A connection to the other agent, with whom each end has proven to be.
pub(super) struct Secured {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) identity: Arc<Identity>,
    pub(super) peer: Peer,
    pub(super) address: SocketAddr,
}

impl Proxy {
    /// Connects to the agent of `target`, shows the certificate of `source` and holds the other one against the
    /// target's identity.
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
        let config = tls::client_config(&identity, wanted.clone())
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
        let handshake = TlsConnector::from(config).connect(name, stream);
        let stream = match timeout(settings.handshake_timeout, handshake).await {
            Ok(done) => done.map_err(|error| at(address, tls::refusal(&error)))?,
            Err(_) => return Err(at(address, silent("a TLS handshake", settings.handshake_timeout))),
        };
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(tls::ALPN) {
            return Err(at(
                address,
                Cause::VersionMismatch.because("the other side does not speak meshx/1"),
            ));
        }
        let leaf = session.peer_certificates().and_then(|chain| chain.first());
        let leaf = leaf.ok_or_else(|| at(address, Cause::CertificateInvalid.because("no certificate")))?;
        let peer = tls::peer(leaf, wanted.trust_domain())
            .map_err(|error| at(address, Cause::CertificateInvalid.because(error.to_string())))?;
        trail.pass(|| format!("meshx/1 with {}", peer.id));
        Ok(Secured {
            stream,
            identity,
            peer,
            address,
        })
    }

    /// Dials the agent of `target` as `source`, and asks for the instance. `node` is the dialling node's name,
    /// or empty.
    pub(super) async fn dial(
        &self,
        source: &ServiceName,
        target: &Instance,
        purpose: Purpose,
        link: LinkId,
        node: &str,
    ) -> Result<Secured, Refusal> {
        let settings = &self.settings;
        let mut secured = self.handshake(source, target, &mut Trail::none()).await?;
        let (stream, address) = (&mut secured.stream, secured.address);
        let mut request = Vec::new();
        Request {
            purpose,
            link,
            service: target.service.to_string(),
            instance: target.id.clone(),
            node: node.to_owned(),
        }
        .encode(&mut request);
        let exchange = async {
            write_all(stream, &request, settings.frame_timeout).await?;
            // The other agent may need all of its own time to decide.
            let reply = read_frame(stream, MAX_MESH_FRAME, settings.setup_timeout).await?;
            decode_reply(&reply).map_err(Refusal::from)?
        };
        exchange.await.map_err(|refusal| at(address, refusal))?;
        Ok(secured)
    }
}

fn at(address: SocketAddr, refusal: Refusal) -> Refusal {
    refusal
        .cause
        .because(format!("agent at {address}: {}", refusal.text))
}

//! The inbound port: another agent dials an instance of this one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use meshx_dist::name_frame::refusal_status;
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::admission::{Admission, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, linger, read_frame, read_name, silent, write_all};
use super::keepalive;
use super::links::{Direction, LinkGuard, LinkInfo, Purpose};
use super::local::{Endpoint, LocalInstance};
use super::splice::splice;
use super::tls::{self, Peer};
use super::wire::{MAX_MESH_FRAME, Request, encode_reply};
use super::{Attempt, Proxy, no_such_service};
use crate::mesh::ServiceName;

/// Pause after a failed accept: descriptors that ran out come back when links end.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// A connection whose handshake is done: who is there, and whom it was shown.
struct Secured {
    stream: TlsStream<TcpStream>,
    peer: Result<Peer, Refusal>,
    service: ServiceName,
    not_after: i64,
}

/// A refusal, and the connection that is still to hear of it, with the last bytes to send there.
struct Refused {
    refusal: Refusal,
    tell: Option<(Box<dyn Duplex>, Vec<u8>)>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, tell: None }
    }
}

/// A link that is allowed and whose near end answers.
struct Prepared {
    near: Box<dyn Duplex>,
    local: Arc<LocalInstance>,
    link: LinkGuard,
    request: Request,
    peer: Peer,
}

impl Proxy {
    /// Serves the inbound port until dropped, and its links with it.
    pub async fn serve_inbound(self: Arc<Self>, listener: TcpListener) {
        let admission = Admission::new(self.settings.max_pending);
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        tasks.spawn(self.clone().inbound_link(stream, peer, admission.enter()));
                    }
                    Err(error) => accept_failed("inbound port", &error).await,
                },
                Some(ended) = tasks.join_next() => task_ended(ended),
            }
        }
    }

    async fn inbound_link(self: Arc<Self>, stream: TcpStream, address: SocketAddr, slot: Slot) {
        let mut attempt = Attempt {
            at: "inbound",
            peer: address.to_string(),
            ..Attempt::default()
        };
        let decided = tokio::select! {
            decided = self.decide_inbound(stream, address, &mut attempt) => decided,
            () = slot.evicted() => Err(slot.refusal().into()),
        };
        match decided {
            Ok((near, far, link)) => {
                drop(slot);
                splice(near, far, &link, self.settings.cut_grace).await;
            }
            Err(Refused { refusal, tell }) => {
                self.refuse(&attempt, &refusal);
                let Some((mut stream, last)) = tell else { return };
                let goodbye = async {
                    let _ = write_all(&mut stream, &last, self.settings.frame_timeout).await;
                    linger(&mut stream).await;
                };
                tokio::select! {
                    () = goodbye => {}
                    () = slot.evicted() => {}
                }
            }
        }
    }

    /// All that comes before the bytes flow.
    async fn decide_inbound(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        attempt: &mut Attempt,
    ) -> Result<(Box<dyn Duplex>, Box<dyn Duplex>, LinkGuard), Refused> {
        let settings = &self.settings;
        let handshake = timeout(settings.handshake_timeout, self.secure(stream, attempt)).await;
        let Secured {
            mut stream,
            peer,
            service,
            not_after,
        } = handshake
            .unwrap_or_else(|_| Err(silent("a TLS handshake", settings.handshake_timeout).into()))?;
        let prepare = self.prepare_inbound(&mut stream, peer, service, not_after, address, attempt);
        let prepared = timeout(settings.setup_timeout, prepare).await;
        let prepared =
            prepared.unwrap_or_else(|_| Err(silent("the decision on a link", settings.setup_timeout)));

        let mut reply = Vec::new();
        encode_reply(&prepared.as_ref().map(|_| ()).map_err(Clone::clone), &mut reply);
        let Prepared {
            mut near,
            local,
            link,
            request,
            peer,
        } = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                return Err(Refused {
                    refusal,
                    tell: Some((Box::new(stream), reply)),
                });
            }
        };
        write_all(&mut stream, &reply, settings.frame_timeout).await?;
        if request.purpose == Purpose::Dist {
            let named = read_name(&mut stream, settings.frame_timeout).await;
            let bytes = match named.and_then(|read| claimed(&request, read)) {
                Ok(bytes) => bytes,
                Err(refusal) => {
                    return Err(Refused {
                        refusal,
                        tell: Some((Box::new(stream), refusal_status().to_vec())),
                    });
                }
            };
            let mut first = accept_frame(
                &local,
                request.link,
                &request.node,
                &peer.id,
                &address.to_string(),
            );
            first.extend_from_slice(&bytes);
            write_all(&mut near, &first, settings.frame_timeout).await?;
        }
        Ok((near, Box::new(stream), link))
    }

    /// The TLS handshake. The certificate is that of the service that the client asks for by SNI.
    async fn secure(&self, stream: TcpStream, attempt: &mut Attempt) -> Result<Secured, Refused> {
        // rustls has sent its alert by then.
        let fault = |error: &io::Error, stream: Option<TcpStream>| Refused {
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
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), stream);
        let hello = match (&mut acceptor).await {
            Ok(hello) => hello,
            Err(error) => return Err(fault(&error, acceptor.take_io())),
        };
        let name = hello.client_hello().server_name().map(str::to_owned);
        attempt.target = name.clone().unwrap_or_default();
        let Some(service) = self.service_by_sni(name.as_deref()) else {
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
        let own = &identity.id;
        let config = tls::server_config(&identity)
            .map_err(|error| Cause::NotReady.because(format!("certificate of {service}: {error}")))?;
        let handshake = hello.into_stream(config).into_fallible().await;
        let stream = handshake.map_err(|(error, io)| fault(&error, Some(io)))?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(tls::ALPN) {
            return Err(Cause::VersionMismatch
                .because("the client does not ask for meshx/1 by ALPN")
                .into());
        }
        let leaf = session.peer_certificates().and_then(|chain| chain.first());
        let leaf = leaf.ok_or_else(|| Cause::CertificateInvalid.because("the client has no certificate"))?;
        let peer = tls::peer(leaf, own.trust_domain())
            .map_err(|error| Cause::CertificateInvalid.because(error.to_string()));
        Ok(Secured {
            stream,
            peer,
            service,
            not_after: identity.not_after,
        })
    }

    fn service_by_sni(&self, name: Option<&str>) -> Option<ServiceName> {
        let Some(name) = name else {
            return self.local.only_service();
        };
        let service = ServiceName::new(name.split('.').next()?).ok()?;
        let wanted = self.spiffe(&service).ok()?.server_name();
        let served = wanted.eq_ignore_ascii_case(name) && !self.local.by_service(&service).is_empty();
        served.then_some(service)
    }

    /// The request, the decision, and the connection to the instance.
    async fn prepare_inbound(
        &self,
        stream: &mut TlsStream<TcpStream>,
        peer: Result<Peer, Refusal>,
        service: ServiceName,
        not_after: i64,
        address: SocketAddr,
        attempt: &mut Attempt,
    ) -> Result<Prepared, Refusal> {
        if let Ok(peer) = &peer {
            attempt.source = peer.id.service().to_string();
        }
        let frame = read_frame(stream, MAX_MESH_FRAME, self.settings.frame_timeout).await;
        attempt.is_probe = peer.is_ok() && matches!(&frame, Err(left) if left.cause == Cause::Unreachable);
        let request = Request::decode(&frame?)?;
        attempt.link = Some(request.link);
        attempt.purpose = Some(request.purpose);
        let peer = peer?;
        if !request.node.is_empty() {
            attempt.source = format!("{} ({})", request.node, peer.id.service());
        }
        if request.service != service.as_ref() {
            let text = format!("{service} was dialled and {:?} is asked for", request.service);
            return Err(Cause::InvalidRequest.because(text));
        }
        let local = self.instance_for(&request, &service)?;
        attempt.target = local.instance.id.clone();
        if request.purpose == Purpose::Dist || !request.node.is_empty() {
            self.prove_node(&request.node, &peer).await?;
        }
        // In the table before it is asked: a denial that comes after the answer finds it there.
        let link = self.links.insert(LinkInfo {
            id: request.link,
            direction: Direction::Inbound,
            purpose: request.purpose,
            local: local.instance.id.clone(),
            remote: if request.node.is_empty() {
                peer.id.service().to_string()
            } else {
                request.node.clone()
            },
            local_spiffe: self.spiffe(&service)?,
            remote_spiffe: peer.id.clone(),
            remote_agent: Some(address),
            local_not_after: Some(not_after),
            remote_not_after: Some(peer.not_after),
            instances: vec![local.instance.id.clone()],
            owners: vec![local.owner],
        })?;
        self.still_here(&local)?;
        self.authorize(&peer.id, &service).await?;
        let near = self.reach(&local).await?;
        Ok(Prepared {
            near,
            local,
            link,
            request,
            peer,
        })
    }

    fn instance_for(&self, request: &Request, service: &ServiceName) -> Result<Arc<LocalInstance>, Refusal> {
        let dist = request.purpose == Purpose::Dist;
        let found = self.local.by_service(service).into_iter().find(|local| {
            let named = local.instance.id == request.instance || (!dist && request.instance.is_empty());
            named && dist == matches!(local.endpoint, Endpoint::NodeSocket(_))
        });
        found.ok_or_else(|| match dist {
            true => Cause::NoSuchNode.because(format!("{:?} is no node of {service} here", request.instance)),
            false if request.instance.is_empty() => no_such_service(service),
            false => Cause::NoSuchService
                .because(format!("{:?} is no instance of {service} here", request.instance)),
        })
    }

    /// A claimed node must be an instance of the service that the certificate names, and not one of this
    /// agent's own: those don't come in from outside.
    async fn prove_node(&self, node: &str, peer: &Peer) -> Result<(), Refusal> {
        let mismatch =
            |why: String| Err(Cause::IdentityMismatch.because(format!("{} claims {node}: {why}", peer.id)));
        let claimed = match self.find_node(node).await {
            Ok(claimed) => claimed,
            Err(refusal) if refusal.cause == Cause::NotReady => return Err(refusal),
            Err(refusal) => return mismatch(refusal.text),
        };
        // The whole identity: a service of the same name in another data centre or namespace is another one.
        let wanted = self.spiffe(&claimed.service)?;
        if wanted != peer.id {
            return mismatch(format!("that is an instance of {wanted}"));
        }
        if self.local.by_node(node).is_some() {
            return mismatch("that node runs on this agent".to_owned());
        }
        Ok(())
    }
}

/// The name message's bytes, when it holds the name that was claimed.
fn claimed(request: &Request, (name, bytes): (String, Vec<u8>)) -> Result<Vec<u8>, Refusal> {
    if name == request.node {
        return Ok(bytes);
    }
    let text = format!("{} names itself {name:?} in the handshake", request.node);
    Err(Cause::IdentityMismatch.because(text))
}

pub(super) async fn accept_failed(listener: &'static str, error: &io::Error) {
    tracing::warn!(listener, %error, "a connection could not be accepted");
    tokio::time::sleep(ACCEPT_BACKOFF).await;
}

pub(super) fn task_ended(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a link's task panicked: this is a bug, please report it");
    }
}

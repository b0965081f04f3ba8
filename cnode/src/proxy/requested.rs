//! What another agent asks for by `meshx/1`, once it has proven who it is.

use std::sync::Arc;

use meshx_dist::name_frame::refusal_status;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, read_frame, read_name, silent, write_all};
use super::inbound::{Decided, Refused, Shown};
use super::links::{LinkGuard, Purpose};
use super::local::LocalInstance;
use super::sessions::check_name;
use super::tls::Peer;
use super::wide::Wide;
use super::wire::{Asked, MAX_MESH_FRAME, Request, encode_reply};
use super::{Attempt, Proxy, no_such_service};
use crate::mesh::{ServiceName, SpiffeId};

/// A link that is allowed and whose near end answers.
struct Prepared {
    near: Box<dyn Duplex>,
    local: Arc<LocalInstance>,
    link: LinkGuard,
    request: Request,
    peer: SpiffeId,
    /// The nodes of a distribution link are to be hidden from each other.
    hidden: bool,
}

impl Proxy {
    /// The request, the decision, the reply and, for distribution, the name message.
    pub(super) async fn decide_request(
        &self,
        mut stream: TlsStream<Wide>,
        peer: Result<Peer, Refusal>,
        shown: Shown,
        only: Option<&str>,
        attempt: &mut Attempt,
    ) -> Result<Option<Decided>, Refused> {
        let settings = &self.settings;
        let prepare = self.prepare_request(&mut stream, peer, &shown, only, attempt);
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
            hidden,
        } = match prepared {
            Ok(Some(prepared)) => prepared,
            Ok(None) => return Ok(None),
            Err(refusal) => {
                return Err(Refused {
                    refusal,
                    tell: Some((Box::new(stream), reply)),
                });
            }
        };
        write_all(&mut stream, &reply, settings.frame_timeout).await?;
        if request.asked == Asked::Link(Purpose::Dist) {
            let named = read_name(&mut stream, settings.frame_timeout).await;
            let bytes = match named.and_then(|read| claimed(&request.node, hidden, read)) {
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
                Some(&peer),
                &shown.address.to_string(),
            );
            first.extend_from_slice(&bytes);
            write_all(&mut near, &first, settings.frame_timeout).await?;
        }
        Ok(Some((near, Box::new(stream), link)))
    }

    /// The request, the decision, and the connection to the instance. None when no link was asked for, but proofs of
    /// live ones.
    async fn prepare_request(
        &self,
        stream: &mut TlsStream<Wide>,
        peer: Result<Peer, Refusal>,
        shown: &Shown,
        only: Option<&str>,
        attempt: &mut Attempt,
    ) -> Result<Option<Prepared>, Refusal> {
        let service = &shown.service;
        let frame = read_frame(stream, MAX_MESH_FRAME, self.settings.frame_timeout).await;
        attempt.is_probe = peer.is_ok() && matches!(&frame, Err(left) if left.cause == Cause::Unreachable);
        let request = Request::decode(&frame?)?;
        attempt.link = Some(request.link);
        let peer = peer?;
        let Asked::Link(purpose) = request.asked else {
            attempt.target = request.instance.clone();
            return self
                .answer_reproofs(stream, request, &peer, shown)
                .await
                .map(|()| None);
        };
        attempt.purpose = Some(purpose);
        if !request.node.is_empty() {
            attempt.source = format!("{} ({})", request.node, peer.id.service());
        }
        if request.service != service.as_ref() {
            let text = format!("{service} was dialled and {:?} is asked for", request.service);
            return Err(Cause::InvalidRequest.because(text));
        }
        let local = self.instance_for(&request, purpose, service, only)?;
        attempt.target = local.instance.id.clone();
        let dialler = match purpose {
            Purpose::Dist => self.prove_dialler(&request.node, &peer.id).await?,
            _ if request.node.is_empty() => None,
            _ => Some(self.prove_node(&request.node, &peer.id).await?),
        };
        let hidden = dialler.is_none_or(|dialler| dialler.cluster() != local.instance.cluster());
        let remote = match request.node.as_str() {
            "" => peer.id.service().to_string(),
            node => node.to_owned(),
        };
        let info = self.inbound_info(request.link, purpose, (shown, &peer), &local, remote)?;
        // The way back of a distribution link is asked for by the other agent.
        let (near, link) = self.admit(info, &local, false).await?;
        Ok(Some(Prepared {
            near,
            local,
            link,
            request,
            peer: peer.id,
            hidden,
        }))
    }

    fn instance_for(
        &self,
        request: &Request,
        purpose: Purpose,
        service: &ServiceName,
        only: Option<&str>,
    ) -> Result<Arc<LocalInstance>, Refusal> {
        let dist = purpose == Purpose::Dist;
        let found = self.instances_here(service, only).into_iter().find(|local| {
            let named = local.instance.id == request.instance || (!dist && request.instance.is_empty());
            named && dist == local.endpoint.is_node()
        });
        found.ok_or_else(|| match dist {
            true => Cause::NoSuchNode.because(format!("{:?} is no node of {service} here", request.instance)),
            false if request.instance.is_empty() => no_such_service(service),
            false => Cause::NoSuchService
                .because(format!("{:?} is no instance of {service} here", request.instance)),
        })
    }
}

/// The name message's bytes, when it holds the name that was claimed.
fn claimed(node: &str, hidden: bool, (_, mut bytes): (String, Vec<u8>)) -> Result<Vec<u8>, Refusal> {
    check_name(&mut bytes, node, hidden)?;
    Ok(bytes)
}

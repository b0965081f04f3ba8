//! The dist socket: a node of this agent dials another node.

use std::io;
use std::sync::Arc;

use meshx_dist::name_frame::refusal_status;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::admission::{Admission, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, linger, read_frame, read_name, silent, write_all};
use super::links::{Direction, LinkGuard, LinkInfo, Purpose};
use super::listener::{self, Listener};
use super::local::LocalInstance;
use super::why::{Approach, Trail};
use super::wire::{Connect, ConnectReply, MAX_DIST_FRAME};
use super::{Attempt, Proxy};

/// The far half of a link whose dialler has not sent its name message yet.
struct Prepared {
    remote: Box<dyn Duplex>,
    link: LinkGuard,
    /// What goes ahead of the name message: the ACCEPT frame of a node on this agent.
    preface: Vec<u8>,
    reply: ConnectReply,
    dialler: Arc<LocalInstance>,
}

impl Proxy {
    /// Serves the dist socket until dropped, and its links with it.
    pub async fn serve_dist(self: Arc<Self>, listener: impl Into<Arc<UnixListener>>) {
        let link = |(stream, _), slot| self.clone().dist_link(stream, slot);
        let (listener, closed) = (listener.into(), self.closed.clone());
        let admission = Admission::new(self.settings.max_pending);
        let serve = listener::serve(Listener::Dist, listener, admission, closed, link);
        self.serving.track_future(serve).await;
    }

    async fn dist_link(self: Arc<Self>, mut stream: UnixStream, slot: Slot) {
        let mut attempt = Attempt::new(Listener::Dist);
        attempt.purpose = Some(Purpose::Dist);
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, Box::pin(self.prepare_dist(&mut stream, &mut attempt))) => {
                prepared.unwrap_or_else(|_| Err(silent("the decision on a link", deadline)))
            }
            () = slot.evicted() => Err(slot.refusal()),
        };
        let mut prepared = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => {
                self.refuse(&attempt, &refusal);
                let mut frame = Vec::new();
                ConnectReply::Refused(refusal).encode(&mut frame);
                let _ = write_all(&mut stream, &frame, self.settings.frame_timeout).await;
                return linger(&mut stream).await;
            }
        };
        let named = tokio::select! {
            named = Box::pin(self.name_dist(&mut stream, &mut prepared)) => named,
            () = slot.evicted() => Err(slot.refusal()),
        };
        drop(slot);
        if let Err(refusal) = named {
            self.refuse(&attempt, &refusal);
            let _ = write_all(&mut stream, refusal_status(), self.settings.frame_timeout).await;
            return linger(&mut stream).await;
        }
        let Prepared { remote, link, .. } = prepared;
        self.carry(Box::new(stream), remote, &link, &attempt).await;
    }

    /// Everything up to the answer to CONNECT.
    async fn prepare_dist(
        &self,
        stream: &mut UnixStream,
        attempt: &mut Attempt,
    ) -> Result<Prepared, Refusal> {
        let fault = |error: io::Error| Cause::InvalidRequest.because(format!("dist socket: {error}"));
        let uid = stream.peer_cred().map_err(fault)?.uid();
        attempt.peer = format!("uid {uid}");
        let frame = read_frame(stream, MAX_DIST_FRAME, self.settings.frame_timeout).await?;
        let Connect { link, secret, target } = Connect::decode(&frame)?;
        attempt.link = Some(link);
        attempt.target = target;
        let target = attempt.target.as_str();
        let dialler = self.local.by_secret(&secret).ok_or_else(|| {
            Cause::BadSecret
                .because("the secret is of no registration: register anew after the agent restarts")
        })?;
        attempt.source = dialler.instance.id.clone();
        if uid != dialler.uid {
            let text = format!(
                "uid {uid} dials as {}, wanted uid {}",
                dialler.instance.id, dialler.uid
            );
            return Err(Cause::NotPermitted.because(text));
        }
        let Some(node) = dialler.instance.node.clone() else {
            return Err(Cause::InvalidRequest.because(format!("{} is not a node", dialler.instance.id)));
        };

        let source = &dialler.instance.service;
        let Approach {
            here,
            found,
            near,
            far,
        } = self.approach(source, target, &mut Trail::none()).await?;

        let mut info = LinkInfo {
            id: link,
            direction: Direction::Local,
            purpose: Purpose::Dist,
            local: node.clone(),
            remote: target.to_owned(),
            local_spiffe: near.clone(),
            remote_spiffe: far,
            verified: true,
            remote_agent: None,
            proof: None,
            instances: vec![dialler.instance.id.clone()],
            owners: vec![dialler.owner],
        };
        // Asked in this order, no denial is missed: one that comes after the answer finds the link in the table.
        if let Some(local) = here {
            info.instances.push(local.instance.id.clone());
            info.owners.push(local.owner);
            let reply = ConnectReply::Ok {
                remote_spiffe: info.remote_spiffe.to_string(),
                remote_agent: "local".into(),
            };
            let far = info.remote_spiffe.clone();
            let link_guard = self.links.insert(info)?;
            self.still_here(&dialler)?;
            self.still_here(&local)?;
            self.authorize(&near, &found.service).await?;
            self.authorize(&far, source).await?;
            let remote = self.reach(&local).await?;
            let preface = accept_frame(&local, link, &node, Some(&near), "local");
            return Ok(Prepared {
                remote,
                link: link_guard,
                preface,
                reply,
                dialler,
            });
        }
        let dialled = match &dialler.sidecar {
            None => self.dial(source, &found, Purpose::Dist, link, &node).await?,
            Some(sidecar) => {
                self.dial_sidecar(&dialler, sidecar.as_ref(), &found.service)
                    .await?
            }
        };
        dialled.describe(&mut info);
        let proven = info.verified.then(|| info.remote_spiffe.to_string());
        let reply = ConnectReply::Ok {
            remote_spiffe: proven.unwrap_or_default(),
            remote_agent: info
                .remote_agent
                .map(|agent| agent.to_string())
                .unwrap_or_default(),
        };
        let far = info.remote_spiffe.clone();
        let link = self.links.insert(info)?;
        self.still_here(&dialler)?;
        self.authorize(&far, source).await?;
        Ok(Prepared {
            remote: dialled.stream,
            link,
            preface: Vec::new(),
            reply,
            dialler,
        })
    }

    /// From OK to the name message on its way: a node may name no other than itself.
    async fn name_dist(&self, stream: &mut UnixStream, prepared: &mut Prepared) -> Result<(), Refusal> {
        let deadline = self.settings.frame_timeout;
        let mut frame = Vec::new();
        prepared.reply.encode(&mut frame);
        write_all(stream, &frame, deadline).await?;
        let (name, bytes) = read_name(stream, deadline).await?;
        if prepared.dialler.instance.node.as_deref() != Some(name.as_str()) {
            let text = format!(
                "{} names itself {name:?} in the handshake",
                prepared.dialler.instance.id
            );
            return Err(Cause::IdentityMismatch.because(text));
        }
        let bytes = [prepared.preface.as_slice(), &bytes].concat();
        write_all(&mut prepared.remote, &bytes, deadline).await
    }
}

//! The dist socket: a node of this agent dials another node.

use std::io;
use std::sync::Arc;

use meshx_dist::name_frame::refusal_status;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::admission::{Admission, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, linger, read_frame, read_name, silent, write_all};
use super::links::{Direction, LinkGuard, LinkInfo, Purpose};
use super::local::LocalInstance;
use super::splice::splice;
use super::why::{Approach, Trail};
use super::wire::{Connect, ConnectReply, MAX_DIST_FRAME};
use super::{Attempt, Proxy, inbound};

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
    pub async fn serve_dist(self: Arc<Self>, listener: UnixListener) {
        let admission = Admission::new(self.settings.max_pending);
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tasks.spawn(self.clone().dist_link(stream, admission.enter()));
                    }
                    Err(error) => inbound::accept_failed("dist socket", &error).await,
                },
                Some(ended) = tasks.join_next() => inbound::task_ended(ended),
            }
        }
    }

    async fn dist_link(self: Arc<Self>, mut stream: UnixStream, slot: Slot) {
        let mut attempt = Attempt {
            at: "dist",
            purpose: Some(Purpose::Dist),
            ..Attempt::default()
        };
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, self.prepare_dist(&mut stream, &mut attempt)) => {
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
            named = self.name_dist(&mut stream, &mut prepared) => named,
            () = slot.evicted() => Err(slot.refusal()),
        };
        drop(slot);
        if let Err(refusal) = named {
            self.refuse(&attempt, &refusal);
            let _ = write_all(&mut stream, refusal_status(), self.settings.frame_timeout).await;
            return linger(&mut stream).await;
        }
        let Prepared { remote, link, .. } = prepared;
        splice(Box::new(stream), remote, &link, self.settings.cut_grace).await;
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
            remote_agent: None,
            local_not_after: None,
            remote_not_after: None,
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
            let preface = accept_frame(&local, link, &node, &near, "local");
            return Ok(Prepared {
                remote,
                link: link_guard,
                preface,
                reply,
                dialler,
            });
        }
        let dialled = self.dial(source, &found, Purpose::Dist, link, &node).await?;
        info.direction = Direction::Outbound;
        info.remote_agent = Some(dialled.address);
        info.local_not_after = Some(dialled.identity.not_after);
        info.remote_not_after = Some(dialled.peer.not_after);
        info.remote_spiffe = dialled.peer.id;
        let reply = ConnectReply::Ok {
            remote_spiffe: info.remote_spiffe.to_string(),
            remote_agent: dialled.address.to_string(),
        };
        let far = info.remote_spiffe.clone();
        let link = self.links.insert(info)?;
        self.still_here(&dialler)?;
        self.authorize(&far, source).await?;
        Ok(Prepared {
            remote: Box::new(dialled.stream),
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

//! The dist socket: a node of this agent dials another node.

use std::io;
use std::sync::Arc;

use meshx_dist::name_frame::refusal_status;
use rustix::net::SendFlags;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::admission::{Admission, Origin, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{
    Duplex, hide_acceptor, linger, read_frame, read_given_name, read_name, silent, write_all,
};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::listener::{self, Listener};
use super::local::{LocalInstance, Secret};
use super::sessions::{Session, check_name};
use super::turns::Turn;
use super::why::{Approach, Trail};
use super::wire::{Connect, ConnectReply, MAX_DIST_FRAME};
use super::{Attempt, Proxy};
use crate::mesh::{Instance, ServiceName};

/// The far half of a link whose dialler has not sent its name message yet.
pub(super) struct Prepared {
    pub(super) remote: Box<dyn Duplex>,
    pub(super) link: LinkGuard,
    /// What goes ahead of the name message: the ACCEPT frame of a node on this agent.
    pub(super) preface: Vec<u8>,
    /// The nodes are to be hidden from each other.
    pub(super) hidden: bool,
    /// To be held until the name message is on its way, which the other agent waits for.
    pub(super) turn: Option<Turn>,
    reply: ConnectReply,
    dialler: Dialler,
}

/// Who dials.
#[derive(Debug, Clone)]
pub(super) struct Dialler {
    id: String,
    /// What its name message must say.
    name: String,
    service: Result<ServiceName, Refusal>,
    owner: u64,
    uid: u32,
    who: Who,
}

impl Dialler {
    /// A registered node.
    pub(super) fn node(local: Arc<LocalInstance>) -> Result<Self, Refusal> {
        let Instance {
            id, service, node, ..
        } = &local.instance;
        let name = node
            .clone()
            .ok_or_else(|| Cause::InvalidRequest.because(format!("{id} is not a node")))?;
        Ok(Self {
            id: id.clone(),
            name,
            service: Ok(service.clone()),
            owner: local.owner,
            uid: local.uid,
            who: Who::Node(local),
        })
    }
}

#[derive(Debug, Clone)]
enum Who {
    Node(Arc<LocalInstance>),
    Session(Arc<Session>),
}

impl Proxy {
    /// Serves the dist socket until dropped, and its links with it.
    pub async fn serve_dist(self: Arc<Self>, listener: impl Into<Arc<UnixListener>>) {
        let proxy = self.clone();
        let link = move |(stream, _), slot| proxy.clone().dist_link(stream, slot);
        let (listener, closed) = (listener.into(), self.closed.clone());
        let admission = Admission::new(self.settings.max_pending);
        let serve = listener::serve(
            Listener::Dist,
            listener,
            admission,
            closed,
            &self.settings.lanes,
            link,
        );
        self.serving.track_future(serve).await;
    }

    async fn dist_link(self: Arc<Self>, mut stream: UnixStream, slot: Slot) {
        let mut attempt = Attempt::new(Listener::Dist);
        attempt.purpose = Some(Purpose::Dist);
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, Box::pin(self.prepare_dist(&mut stream, &mut attempt, &slot))) => {
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
                return self.say_no(&mut stream, &frame, &slot).await;
            }
        };
        let named = tokio::select! {
            named = Box::pin(self.name_dist(&mut stream, &mut prepared)) => named,
            () = slot.evicted() => Err(slot.refusal()),
        };
        if let Err(refusal) = named {
            // It is no link, and another one's turn.
            drop(prepared);
            self.refuse(&attempt, &refusal);
            return self.say_no(&mut stream, refusal_status(), &slot).await;
        }
        drop(slot);
        let Prepared { remote, link, .. } = prepared;
        self.carry(Box::new(stream), remote, &link, &attempt).await;
    }

    /// The last word to a node, for as long as nobody else needs its place.
    async fn say_no(&self, stream: &mut UnixStream, last: &[u8], slot: &Slot) {
        // Who is evicted is told, too, where the word finds room at once. The runtime does not know yet whether there is
        // any at a socket that has just come.
        let sent = rustix::net::send(&*stream, last, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).unwrap_or(0);
        let rest = last.get(sent..).unwrap_or_default();
        let goodbye = async {
            let _ = write_all(stream, rest, self.settings.frame_timeout).await;
            linger(stream, self.settings.linger_time).await;
        };
        tokio::select! {
            biased;
            () = goodbye => {}
            () = slot.evicted() => {}
        }
    }

    /// Everything up to the answer to CONNECT.
    async fn prepare_dist(
        &self,
        stream: &mut UnixStream,
        attempt: &mut Attempt,
        slot: &Slot,
    ) -> Result<Prepared, Refusal> {
        let fault = |error: io::Error| Cause::InvalidRequest.because(format!("dist socket: {error}"));
        let uid = stream.peer_cred().map_err(fault)?.uid();
        attempt.peer = format!("uid {uid}");
        let frame = read_frame(stream, MAX_DIST_FRAME, self.settings.frame_timeout).await?;
        let Connect { link, secret, target } = Connect::decode(&frame)?;
        attempt.link = Some(link);
        attempt.target = target;
        let target = attempt.target.as_str();
        let dialler = self.dialler(&secret)?;
        attempt.source = dialler.id.clone();
        if uid != dialler.uid {
            let text = format!("uid {uid} dials as {}, wanted uid {}", dialler.id, dialler.uid);
            return Err(Cause::NotPermitted.because(text));
        }
        slot.is_of(Origin::registration(uid, &dialler.id));
        self.prepare_between(dialler, target, link).await
    }

    /// The decision on a link of a node or session of this agent, and its far half.
    pub(super) async fn prepare_between(
        &self,
        dialler: Dialler,
        target: &str,
        link: LinkId,
    ) -> Result<Prepared, Refusal> {
        if let Who::Session(session) = &dialler.who
            && let Some(local) = self.local.by_node(target)
            && local.uid == session.uid
        {
            return self.prepare_own(&dialler, &local, link).await;
        }
        let source = match &dialler.service {
            Ok(service) => service,
            // First what is true for everybody.
            Err(refusal) if self.local.by_node(target).is_some() => return Err(refusal.clone()),
            Err(refusal) => return self.find_node(target).await.and(Err(refusal.clone())),
        };
        let Approach {
            here,
            found,
            near,
            far,
        } = self.approach(source, target, &mut Trail::none()).await?;

        let hidden = match &dialler.who {
            Who::Node(local) => local.instance.cluster() != found.cluster(),
            Who::Session(_) => true,
        };
        let mut info = LinkInfo {
            id: link,
            direction: Direction::Local,
            purpose: Purpose::Dist,
            local: dialler.name.clone(),
            remote: target.to_owned(),
            local_spiffe: near.clone(),
            remote_spiffe: far,
            verified: true,
            remote_agent: None,
            proof: None,
            instances: vec![dialler.id.clone()],
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
            self.dialler_still_here(&dialler)?;
            self.still_here(&local)?;
            self.authorize(&near, &found.service).await?;
            self.authorize(&far, source).await?;
            let remote = self.reach(&local).await?;
            let preface = accept_frame(&local, link, &dialler.name, Some(&near), "local");
            return Ok(Prepared {
                remote,
                link: link_guard,
                preface,
                hidden,
                turn: None,
                reply,
                dialler,
            });
        }
        let beside = match &dialler.who {
            Who::Node(local) => local.sidecar.as_ref().map(|sidecar| (local, sidecar)),
            Who::Session(_) => None,
        };
        let dialled = match beside {
            None => {
                self.dial(source, &found, Purpose::Dist, link, &dialler.name)
                    .await?
            }
            Some((local, sidecar)) => self.dial_sidecar(local, sidecar.as_ref(), &found.service).await?,
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
        self.dialler_still_here(&dialler)?;
        self.authorize(&far, source).await?;
        Ok(Prepared {
            remote: dialled.stream,
            link,
            preface: Vec::new(),
            hidden,
            turn: dialled.turn,
            reply,
            dialler,
        })
    }

    /// Of a session to a node of its own user here: nothing but the kernel says who that is, and no rule is asked for.
    async fn prepare_own(
        &self,
        dialler: &Dialler,
        local: &Arc<LocalInstance>,
        link: LinkId,
    ) -> Result<Prepared, Refusal> {
        let spiffe = self.spiffe(&local.instance.service)?;
        let info = LinkInfo {
            id: link,
            direction: Direction::Session,
            purpose: Purpose::Dist,
            local: dialler.name.clone(),
            remote: local.instance.id.clone(),
            local_spiffe: spiffe.clone(),
            remote_spiffe: spiffe.clone(),
            verified: true,
            remote_agent: None,
            proof: None,
            instances: vec![dialler.id.clone(), local.instance.id.clone()],
            owners: vec![dialler.owner, local.owner],
        };
        let guard = self.links.insert(info)?;
        self.dialler_still_here(dialler)?;
        self.still_here(local)?;
        Ok(Prepared {
            remote: self.reach(local).await?,
            link: guard,
            preface: accept_frame(local, link, &dialler.name, None, "local"),
            hidden: true,
            turn: None,
            reply: ConnectReply::Ok {
                remote_spiffe: spiffe.to_string(),
                remote_agent: "local".into(),
            },
            dialler: dialler.clone(),
        })
    }

    /// Whose secret this is. All are looked at, so that time tells nothing.
    fn dialler(&self, secret: &Secret) -> Result<Dialler, Refusal> {
        match (self.local.by_secret(secret), self.local.session_by_secret(secret)) {
            (Some(local), _) => Dialler::node(local),
            (None, Some(session)) => Ok(Dialler {
                id: session.id.clone(),
                name: session.name.clone(),
                service: session.acts_as.clone(),
                owner: session.owner,
                uid: session.uid,
                who: Who::Session(session),
            }),
            (None, None) => Err(Cause::BadSecret
                .because("the secret is of no registration: register anew after the agent restarts")),
        }
    }

    fn dialler_still_here(&self, dialler: &Dialler) -> Result<(), Refusal> {
        match &dialler.who {
            Who::Node(local) => self.still_here(local),
            Who::Session(session) => self.session_still_here(session),
        }
    }

    /// From OK to the name message on its way: a node may name no other than itself.
    async fn name_dist(&self, stream: &mut UnixStream, prepared: &mut Prepared) -> Result<(), Refusal> {
        let deadline = self.settings.frame_timeout;
        let mut frame = Vec::new();
        prepared.reply.encode(&mut frame);
        write_all(stream, &frame, deadline).await?;
        let (_, mut bytes) = read_name(stream, deadline).await?;
        check_name(&mut bytes, &prepared.dialler.name, prepared.hidden)?;
        let bytes = [prepared.preface.as_slice(), &bytes].concat();
        write_all(&mut prepared.remote, &bytes, deadline).await?;
        prepared.turn = None;
        match &prepared.dialler.who {
            Who::Session(session) if session.has_no_name() => {
                let (given, bytes) = read_given_name(&mut prepared.remote, deadline).await?;
                *session.given() = given;
                write_all(stream, &bytes, deadline).await
            }
            // A session is hidden by itself.
            Who::Node(_) if prepared.hidden => {
                hide_acceptor(stream, &mut prepared.remote, self.settings.setup_timeout).await
            }
            _ => Ok(()),
        }
    }
}

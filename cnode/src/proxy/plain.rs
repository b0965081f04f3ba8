//! Nodes of plain distribution (`inet_tcp_dist`, libei): a loopback port for each node that they may dial.
//!
//! Such a node proves nothing. It is believed to be what its name message says when that name is registered as a node of
//! plain distribution and the connection comes from the user who registered it. A name that is not registered is a
//! session (a tool, a remote console): it reaches nodes of this agent that are its own user's, and acts as their service.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use meshx_dist::name_frame::refusal_status;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::admission::{Admission, Origin, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, hide_acceptor, linger, read_name, silent, write_all};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::listener::{self, Listener};
use super::local::Endpoint;
use super::outbound::{Dialler, Prepared};
use super::sessions::check_name;
use super::unverified::has_left;
use super::{Attempt, Proxy, near, peer_uid};
use crate::mesh::split_node;

/// Ports that one agent has open; one more closes the one that nobody has asked for the longest. Its links go on.
pub const PLAIN_PORTS_MAX: usize = 1024;

/// The ports of one agent. Dropping it closes them, and ends their links.
#[derive(Debug)]
pub struct PlainPorts {
    proxy: Arc<Proxy>,
    max: usize,
    admission: Arc<Admission>,
    // Held for a look-up or a change, never across an await.
    ports: Mutex<Ports>,
}

#[derive(Debug, Default)]
struct Ports {
    asked: u64,
    open: HashMap<(IpAddr, Arc<str>), Open>,
    /// Closed ones, whose links may live on.
    closed: Vec<AbortHandle>,
}

#[derive(Debug)]
struct Open {
    port: u16,
    /// When it was asked for last.
    asked: u64,
    listener: Weak<TcpListener>,
    closed: CancellationToken,
    task: AbortHandle,
}

impl PlainPorts {
    /// None is open yet.
    pub fn new(proxy: Arc<Proxy>) -> Self {
        Self::with_max(proxy, PLAIN_PORTS_MAX)
    }

    fn with_max(proxy: Arc<Proxy>, max: usize) -> Self {
        Self {
            max,
            admission: Admission::new(proxy.settings.max_pending),
            proxy,
            ports: Mutex::default(),
        }
    }

    /// Those that are open, for a successor of this process: the node that each leads to. First the one that nobody has
    /// asked for the longest.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn handed(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let ports = self.lock();
        let mut open: Vec<_> = ports.open.iter().collect();
        open.sort_by_key(|(_, open)| open.asked);
        let handed = open.into_iter().map(|((_, target), open)| {
            let listener = open.listener.upgrade();
            let listener = listener.ok_or_else(|| io::Error::other("a port is not served any more"))?;
            Ok((target.to_string(), listener.as_fd().try_clone_to_owned()?))
        });
        handed.collect()
    }

    /// Serves a port that a predecessor of this process had opened.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn resume(&self, target: &str, listener: OwnedFd) -> io::Result<()> {
        let listener = TcpListener::from_std(listener.into())?;
        let ip = listener.local_addr()?.ip();
        let mut ports = self.lock();
        ports.asked += 1;
        self.serve(&mut ports, (ip, target.into()), listener).map(|_| ())
    }

    /// The port of the loopback address `ip` that leads to the node `target`. Whether one may go there is decided for
    /// each connection.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn port(&self, ip: IpAddr, target: &str) -> io::Result<u16> {
        self.open(ip, target, true)
    }

    /// As [`PlainPorts::port`], but not in the place of another one.
    ///
    /// # Errors
    /// When it cannot be opened, or there is no room.
    pub fn port_if_room(&self, ip: IpAddr, target: &str) -> io::Result<u16> {
        self.open(ip, target, false)
    }

    fn open(&self, ip: IpAddr, target: &str, make_room: bool) -> io::Result<u16> {
        if !ip.is_loopback() {
            let text = format!("{ip} is not on loopback");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut ports = self.lock();
        ports.asked += 1;
        let (asked, key) = (ports.asked, (ip, Arc::<str>::from(target)));
        if let Some(open) = ports.open.get_mut(&key) {
            open.asked = asked;
            return Ok(open.port);
        }
        if !make_room && ports.open.len() >= self.max {
            let text = format!(
                "{} ports are open, no more are opened (PLAIN_PORTS_MAX)",
                self.max
            );
            return Err(io::Error::other(text));
        }
        let listener = std::net::TcpListener::bind((ip, 0))?;
        listener.set_nonblocking(true)?;
        self.serve(&mut ports, key, TcpListener::from_std(listener)?)
    }

    fn serve(&self, ports: &mut Ports, key: (IpAddr, Arc<str>), listener: TcpListener) -> io::Result<u16> {
        let port = listener.local_addr()?.port();
        let listener = Arc::new(listener);
        let weak = Arc::downgrade(&listener);
        ports.make_room(self.max);
        let (proxy, admission, closed) = (
            self.proxy.clone(),
            self.admission.clone(),
            self.proxy.closed.child_token(),
        );
        let (target, until) = (key.1.clone(), closed.clone());
        let serve = async move {
            let lanes = proxy.settings.lanes.clone();
            let link = move |(stream, _), slot| proxy.clone().plain_link(stream, target.clone(), slot);
            listener::serve(Listener::Plain, listener, admission, until, &lanes, link).await;
        };
        let task = tokio::spawn(self.proxy.serving.track_future(serve)).abort_handle();
        let open = Open {
            port,
            asked: ports.asked,
            listener: weak,
            closed,
            task,
        };
        ports.open.insert(key, open);
        Ok(port)
    }

    /// Counts and remembers what EPMD did not answer.
    pub(crate) fn count_refusal(&self, asked: &str, refusal: &Refusal) {
        self.proxy.links.refused(Listener::Epmd, None, asked, refusal);
    }

    fn lock(&self) -> MutexGuard<'_, Ports> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ports {
    fn make_room(&mut self, max: usize) {
        self.closed.retain(|task| !task.is_finished());
        while self.open.len() >= max.max(1) {
            let oldest = self.open.iter().min_by_key(|(_, open)| open.asked);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            if let Some(open) = self.open.remove(&oldest) {
                open.closed.cancel();
                self.closed.push(open.task);
            }
        }
    }
}

impl Drop for PlainPorts {
    fn drop(&mut self) {
        let ports = self.lock();
        ports.open.values().for_each(|open| open.task.abort());
        ports.closed.iter().for_each(AbortHandle::abort);
    }
}

impl Proxy {
    async fn plain_link(self: Arc<Self>, mut stream: TcpStream, target: Arc<str>, slot: Slot) {
        let mut attempt = Attempt::new(Listener::Plain);
        attempt.purpose = Some(Purpose::Dist);
        attempt.target = target.to_string();
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, self.prepare_plain(&mut stream, &mut attempt, &slot)) => {
                prepared.unwrap_or_else(|_| Err(silent("the decision on a link", deadline)))
            }
            () = slot.evicted() => Err(slot.refusal()),
        };
        match prepared {
            Ok((remote, link)) => {
                drop(slot);
                self.carry(Box::new(stream), remote, &link, &attempt).await;
            }
            Err(refusal) => {
                self.refuse(&attempt, &refusal);
                // All that the protocol has to say no.
                let goodbye = async {
                    let _ = write_all(&mut stream, refusal_status(), self.settings.frame_timeout).await;
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

    async fn prepare_plain(
        &self,
        stream: &mut TcpStream,
        attempt: &mut Attempt,
        slot: &Slot,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let fault = |error: io::Error| Cause::InvalidRequest.because(format!("plain port: {error}"));
        near::hasten(stream).map_err(fault)?;
        let uid = match peer_uid::of(stream) {
            Ok(uid) => uid,
            Err(untold) => {
                attempt.is_probe = has_left(stream).await;
                return Err(untold);
            }
        };
        attempt.peer = format!("uid {uid}");
        slot.is_of(Origin::user(uid));
        let deadline = self.settings.frame_timeout;
        let named = read_name(stream, deadline).await;
        attempt.is_probe = matches!(&named, Err(left) if left.cause == Cause::Unreachable);
        let (name, mut bytes) = named?;
        attempt.source.clone_from(&name);
        let link = LinkId::generate()?;
        attempt.link = Some(link);
        let (mut remote, guard, mut first, hidden) = match self.local.by_node(&name) {
            Some(dialler) if dialler.uid != uid => {
                let text = format!("uid {uid} dials as {name}, wanted uid {}", dialler.uid);
                return Err(Cause::NotPermitted.because(text));
            }
            Some(dialler) if !matches!(dialler.endpoint, Endpoint::PlainNode(_)) => {
                return Err(Cause::IdentityMismatch.because(format!(
                    "{name} has proven itself by a secret, and dials by the agent's own socket"
                )));
            }
            Some(dialler) => {
                slot.is_of(Origin::registration(uid, &dialler.instance.id));
                let Prepared {
                    remote,
                    link,
                    preface,
                    hidden,
                    ..
                } = self
                    .prepare_between(Dialler::node(dialler)?, &attempt.target, link)
                    .await?;
                check_name(&mut bytes, &name, hidden)?;
                (remote, link, preface, hidden)
            }
            None => {
                // It is hidden, as every session is.
                check_name(&mut bytes, &name, true)?;
                let (remote, guard, preface) =
                    self.prepare_session(&name, uid, &attempt.target, link).await?;
                (remote, guard, preface, false)
            }
        };
        first.extend_from_slice(&bytes);
        write_all(&mut remote, &first, deadline).await?;
        // A tool sees its own end as it likes.
        if hidden {
            hide_acceptor(stream, &mut remote, deadline).await?;
        }
        Ok((remote, guard))
    }

    /// A link of a name that is not registered here.
    async fn prepare_session(
        &self,
        name: &str,
        uid: u32,
        target: &str,
        link: LinkId,
    ) -> Result<(Box<dyn Duplex>, LinkGuard, Vec<u8>), Refusal> {
        let refused = |why: String| {
            Cause::NotPermitted.because(format!(
                "{name} is not registered as a node of plain distribution here, {why}"
            ))
        };
        let Some(local) = self.local.by_node(target) else {
            return Err(refused(format!(
                "and so reaches nodes of this agent only: {target} is none"
            )));
        };
        if local.uid != uid {
            return Err(refused(format!(
                "and so reaches nodes of its own user only: {target} is of uid {}",
                local.uid
            )));
        }
        // What is asked for its name by the other end is a host alone.
        if split_node(name).is_ok() && self.ask(self.mesh.node(name)).await?.is_some() {
            return Err(Cause::IdentityMismatch.because(format!("{name} is a node of another agent")));
        }
        let own = self.spiffe(&local.instance.service)?;
        let info = LinkInfo {
            id: link,
            direction: Direction::Local,
            purpose: Purpose::Dist,
            local: name.to_owned(),
            remote: target.to_owned(),
            local_spiffe: own.clone(),
            remote_spiffe: own.clone(),
            verified: true,
            remote_agent: None,
            proof: None,
            instances: vec![local.instance.id.clone()],
            owners: vec![local.owner],
        };
        let guard = self.links.insert(info)?;
        self.still_here(&local)?;
        self.authorize(&own, &local.instance.service).await?;
        let remote = self.reach(&local).await?;
        let preface = accept_frame(&local, link, name, Some(&own), "local");
        Ok((remote, guard, preface))
    }
}

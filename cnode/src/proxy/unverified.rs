//! Behind a sidecar of another make: it has verified who dials, and tells nobody.
//!
//! Whoever may reach the node's service may then claim to be any node: the rules are asked by the claimed name, and no
//! certificate proves it. So this is off unless `allow_unverified_peers` is on, and such links are marked.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::admission::{Admission, Origin, Slot};
use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, hide_acceptor, linger, read_name, silent, write_all};
use super::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use super::listener::{self, Listener};
use super::local::LocalInstance;
use super::sessions::check_name;
use super::{Attempt, Proxy, peer_uid};

/// How long the end of a connection may take from the kernel to here.
const LEAVING: Duration = Duration::from_millis(100);

impl Proxy {
    /// Serves the loopback port that the sidecar of this node hands inbound connections to, until dropped, and its links
    /// with it.
    pub async fn serve_unverified(self: Arc<Self>, listener: impl Into<Arc<TcpListener>>, instance: String) {
        let instance: Arc<str> = instance.into();
        let proxy = self.clone();
        let link = move |(stream, peer), slot| {
            proxy
                .clone()
                .unverified_link(stream, peer, instance.clone(), slot)
        };
        let (listener, closed) = (listener.into(), self.closed.clone());
        let admission = Admission::new(self.settings.max_pending);
        let serve = listener::serve(
            Listener::Unverified,
            listener,
            admission,
            closed,
            &self.settings.lanes,
            link,
        );
        self.serving.track_future(serve).await;
    }

    async fn unverified_link(
        self: Arc<Self>,
        mut stream: TcpStream,
        address: SocketAddr,
        instance: Arc<str>,
        slot: Slot,
    ) {
        let mut attempt = Attempt::new(Listener::Unverified);
        attempt.peer = address.to_string();
        attempt.purpose = Some(Purpose::Dist);
        attempt.target = instance.to_string();
        let deadline = self.settings.setup_timeout;
        let prepared = tokio::select! {
            prepared = timeout(deadline, self.prepare_unverified(&mut stream, address, &instance, &mut attempt, &slot)) => {
                prepared.unwrap_or_else(|_| Err(silent("the decision on a link", deadline)))
            }
            () = slot.evicted() => Err(slot.refusal()),
        };
        match prepared {
            Ok((near, link)) => {
                drop(slot);
                self.carry(near, Box::new(stream), &link, &attempt).await;
            }
            Err(refusal) => {
                self.refuse(&attempt, &refusal);
                tokio::select! {
                    biased;
                    () = linger(&mut stream, self.settings.linger_time) => {}
                    () = slot.evicted() => {}
                }
            }
        }
    }

    async fn prepare_unverified(
        &self,
        stream: &mut TcpStream,
        address: SocketAddr,
        instance: &str,
        attempt: &mut Attempt,
        slot: &Slot,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let gone = || Cause::NoSuchNode.because(format!("{instance} is not registered here"));
        let local = self.local.by_id(instance).ok_or_else(gone)?;
        if !local.endpoint.is_node() {
            return Err(Cause::InvalidRequest.because(format!("{instance} is not a node")));
        }
        let uid = match peer_uid::of(stream) {
            Ok(uid) => uid,
            Err(untold) => {
                attempt.is_probe = has_left(stream).await;
                return Err(untold);
            }
        };
        slot.is_of(Origin::user(uid));
        sidecar_of(&local, uid)?;
        let deadline = self.settings.frame_timeout;
        let named = read_name(stream, deadline).await;
        // Consul's built-in proxy connects here for each connection that it takes, health checks among them.
        attempt.is_probe = matches!(&named, Err(left) if left.cause == Cause::Unreachable);
        let (name, mut bytes) = named?;
        attempt.source.clone_from(&name);
        if !self.settings.allow_unverified_peers {
            return Err(Cause::IdentityMismatch.because(format!(
                "{name} came through the sidecar of {instance}, so no certificate proves that name to this agent: use \
                 the native data plane, or take unverified peers (allow_unverified_peers)"
            )));
        }
        let claimed = self.claimed_node(&name, "a peer behind a sidecar").await?;
        let hidden = claimed.cluster() != local.instance.cluster();
        check_name(&mut bytes, &name, hidden)?;
        let link = LinkId::generate()?;
        attempt.link = Some(link);
        let info = LinkInfo {
            id: link,
            direction: Direction::Inbound,
            purpose: Purpose::Dist,
            local: local.instance.id.clone(),
            remote: name.clone(),
            local_spiffe: self.spiffe(&local.instance.service)?,
            remote_spiffe: self.spiffe(&claimed.service)?,
            verified: false,
            remote_agent: Some(address),
            proof: None,
            instances: vec![local.instance.id.clone()],
            owners: vec![local.owner],
        };
        let (mut near, link_guard) = self.admit(info, &local, true).await?;
        let mut first = accept_frame(&local, link, &name, None, &address.to_string());
        first.extend_from_slice(&bytes);
        write_all(&mut near, &first, deadline).await?;
        if hidden {
            hide_acceptor(stream, &mut near, deadline).await?;
        }
        Ok((near, link_guard))
    }
}

/// Whether the other end closed without a byte, so early that nobody can tell whose it was.
pub(super) async fn has_left(stream: &TcpStream) -> bool {
    let end = timeout(LEAVING, stream.peek(&mut [0])).await;
    matches!(end, Ok(Ok(0)))
}

/// A sidecar runs as root, as the agent that started it, or as the user whose node it is; anybody else on this host has
/// no business at its ports.
pub(super) fn sidecar_of(local: &LocalInstance, uid: u32) -> Result<(), Refusal> {
    let agent = rustix::process::geteuid().as_raw();
    if [0, agent, local.uid].contains(&uid) {
        return Ok(());
    }
    Err(Cause::NotPermitted.because(format!(
        "uid {uid} has the other end of a port of the sidecar of {}, wanted uid 0, {agent} or {}",
        local.instance.id, local.uid
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::mesh::{Instance, Protocol};
    use crate::proxy::local::{Endpoint, Secret};

    #[test]
    fn only_a_user_who_may_run_the_sidecar_comes_through_it() {
        let local = LocalInstance {
            instance: Instance {
                id: "cart@h2".into(),
                service: "cart".parse().unwrap(),
                node: Some("cart@h2".into()),
                agent: "a".into(),
                address: "127.0.0.1:1".parse().unwrap(),
                protocol: Protocol::Connect,
                meta: Default::default(),
            },
            secret: Secret::generate().unwrap(),
            endpoint: Endpoint::NodeSocket("/x".into()),
            owner: 1,
            uid: 4242,
            sidecar: None,
        };
        for uid in [0, rustix::process::geteuid().as_raw(), 4242] {
            assert!(sidecar_of(&local, uid).is_ok(), "{uid}");
        }
        let refusal = sidecar_of(&local, 4243).unwrap_err();
        assert_eq!(refusal.cause, Cause::NotPermitted);
        assert!(refusal.text.contains("4243"), "{refusal}");
    }
}

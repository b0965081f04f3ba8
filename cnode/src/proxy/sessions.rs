//! Sessions: nodes that only dial and that no catalogue has, such as remote consoles and the tools of a release.
//!
//! On its own agent a session reaches the nodes of its own user. Any other node it reaches as one service, the one that
//! [`Settings::session_service`](super::Settings) names, and by that service's rules; both agents must name it, so
//! without the setting the answer is no at either end. The links of a session are hidden.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshx_dist::name_frame::{clear_published, peek_name_frame};

use super::Proxy;
use super::cause::{Cause, Refusal};
use super::inbound::mismatch;
use super::local::Secret;
use crate::mesh::{Instance, ServiceName, SpiffeId, split_node};

/// A session of this agent.
#[derive(Debug)]
pub struct Session {
    /// Unique on this agent: its name, or one of the agent's own for a node that has none yet.
    pub id: String,
    /// What its name messages must say: the node's name, or the host alone of a node that the other end names
    /// (`-name undefined`).
    pub name: String,
    /// Proof of its connections.
    pub secret: Secret,
    /// The control connection that it lives by.
    pub owner: u64,
    /// Its user.
    pub uid: u32,
    /// The service that it is towards everybody but its own user's nodes here, or why it is none.
    pub acts_as: Result<ServiceName, Refusal>,
    /// The name that another node gave it last.
    // Held for a look or a change.
    pub given: Mutex<Option<String>>,
}

impl Session {
    /// Whether the nodes that it dials name it.
    pub(super) fn has_no_name(&self) -> bool {
        !self.name.contains('@')
    }

    fn was_given(&self, name: &str) -> bool {
        self.given().as_deref() == Some(name)
    }

    pub(crate) fn given(&self) -> MutexGuard<'_, Option<String>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sessions of one agent, by id.
#[derive(Debug, Default)]
pub(super) struct Sessions(HashMap<String, Arc<Session>>);

impl Sessions {
    pub(super) fn insert(&mut self, session: Session) {
        self.0.insert(session.id.clone(), Arc::new(session));
    }

    pub(super) fn all(&self) -> Vec<Arc<Session>> {
        self.0.values().cloned().collect()
    }

    pub(super) fn get(&self, id: &str) -> Option<Arc<Session>> {
        self.0.get(id).cloned()
    }

    /// Looks at all of them, so that time tells nothing.
    pub(super) fn by_secret(&self, secret: &Secret) -> Option<Arc<Session>> {
        let mut found = None;
        for session in self.0.values() {
            if session.secret == *secret {
                found = Some(session.clone());
            }
        }
        found
    }

    /// Whether a session of this control connection was given this name.
    pub(super) fn was_given(&self, owner: u64, name: &str) -> bool {
        let mut own = self.0.values().filter(|session| session.owner == owner);
        own.any(|session| session.was_given(name))
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.0.remove(id);
    }

    pub(super) fn remove_owner(&mut self, owner: u64) -> Vec<Arc<Session>> {
        let mut gone = Vec::new();
        self.0.retain(|_, session| {
            if session.owner == owner {
                gone.push(session.clone());
            }
            session.owner != owner
        });
        gone
    }
}

impl Proxy {
    /// The service that sessions act as, when this agent has one.
    pub fn session_service(&self) -> Option<&ServiceName> {
        self.settings.session_service.as_ref()
    }

    /// Who dials for distribution must be an instance of the service that the certificate names, or a session of the
    /// service that this agent takes sessions of. None for a session.
    pub(super) async fn prove_dialler(
        &self,
        node: &str,
        peer: &SpiffeId,
    ) -> Result<Option<Instance>, Refusal> {
        if peer.service().may_have_node(node) || !self.is_session_service(peer) {
            return self.prove_node(node, peer).await.map(Some);
        }
        let whole = match node.contains('@') {
            true => node.to_owned(),
            false => format!("undefined@{node}"),
        };
        split_node(&whole).map_err(|error| Cause::InvalidName.because(error.to_string()))?;
        // Whoever may be a session may not be a node beside that.
        if self.local.by_node(node).is_some() || self.ask(self.mesh.node(node)).await?.is_some() {
            return Err(mismatch(
                &peer.to_string(),
                node,
                "that is a node of the mesh, and no session",
            ));
        }
        Ok(None)
    }

    /// The whole identity: a service of the same name in another data centre or namespace is another one.
    fn is_session_service(&self, peer: &SpiffeId) -> bool {
        let wanted = self.session_service().map(|service| self.spiffe(service));
        matches!(wanted, Some(Ok(wanted)) if wanted == *peer)
    }

    /// As `still_here`, for a session.
    pub(super) fn session_still_here(&self, session: &Session) -> Result<(), Refusal> {
        match self.local.session(&session.id) {
            Some(now) if now.secret == session.secret => Ok(()),
            _ => Err(gone_session(session)),
        }
    }
}

/// Why the links of a session end.
pub(crate) fn gone_session(session: &Session) -> Refusal {
    Cause::NoSuchNode.because(format!("the session {} has ended", session.id))
}

/// Holds the name message at the front of `bytes` against the name that was claimed. One that is to be `hidden`, because
/// it is a session's or the two nodes are of different clusters, gets the flags of a hidden node: then neither end has
/// the other in `nodes()`, and `global` knows nothing of it. A message that leaves its name to the other end has a host for a name, so it is of a session without
/// one, or is refused.
pub(super) fn check_name(bytes: &mut [u8], claimed: &str, hidden: bool) -> Result<(), Refusal> {
    let fault = |error| Cause::InvalidRequest.because(format!("distribution handshake: {error}"));
    let Some(frame) = peek_name_frame(bytes).map_err(fault)? else {
        return Err(Cause::InvalidRequest.because("distribution handshake: no whole name message"));
    };
    if frame.name != claimed {
        let text = format!("{claimed} names itself {:?} in the handshake", frame.name);
        return Err(Cause::IdentityMismatch.because(text));
    }
    match hidden {
        true => clear_published(bytes).map_err(fault),
        false => Ok(()),
    }
}

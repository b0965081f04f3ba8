//! Sessions: nodes that only dial, and that the mesh never hears of (docs/mesh-protocol.md, "Sessions").

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{Owner, Registry, checks, pending::Pending};
use crate::{
    agent::{hosts, takeover::Order},
    mesh::ServiceName,
    proxy::{
        Session,
        cause::{Cause, Refusal},
        gone_session,
        local::{SECRET_LEN, Secret},
    },
};

/// What a session calls itself.
#[derive(Debug, Clone, Copy)]
pub enum SessionName<'a> {
    /// The name of a node that does not listen, or of a tool.
    Node(&'a str),
    /// The host of a node that gets its name from the node that it dials (`-name undefined`).
    Host(&'a str),
}

/// A session in the hands of a successor of this process.
#[derive(Serialize, Deserialize)]
pub(in crate::agent) struct HandedSession {
    id: String,
    name: String,
    secret: [u8; SECRET_LEN],
    /// Its control connection.
    owner: u64,
    given: Option<String>,
}

/// The names that sessions hold, by the control connections that they live by.
pub(super) type Held = HashMap<u64, Vec<Pending>>;

impl Registry {
    /// Takes a session; its secret lets it dial. It lives as long as its control connection.
    ///
    /// # Errors
    /// `invalid_name`, `host_not_owned`, `name_taken`, `limit`.
    pub fn register_session(
        self: &Arc<Self>,
        owner: Owner,
        name: SessionName<'_>,
    ) -> Result<Secret, Refusal> {
        let (id, name) = match name {
            SessionName::Node(node) => {
                let host = checks::node_name(node)?;
                if !self.local.was_given(owner.id, node) {
                    self.own_host(node, host)?;
                }
                (node.to_owned(), node)
            }
            SessionName::Host(host) if hosts::is_valid(host) => (self.next_session_id(host), host),
            SessionName::Host(host) => {
                return Err(Cause::InvalidName.because(format!("{host:?} is no host part of a node name")));
            }
        };
        let mut held = self.held_sessions();
        // Two links may be dialled at once by a client that has no secret yet.
        if let Some(session) = self.local.session(&id)
            && session.owner == owner.id
        {
            return Ok(session.secret.clone());
        }
        let reserved = self.reserve(owner, &id)?;
        let secret = Secret::generate()
            .map_err(|error| Cause::NotReady.because(format!("the system gave no random bytes: {error}")))?;
        self.local.insert_session(Session {
            id: id.clone(),
            name: name.to_owned(),
            secret: secret.clone(),
            owner: owner.id,
            uid: owner.peer.uid,
            acts_as: self.session_service(owner),
            given: Mutex::default(),
        });
        held.entry(owner.id).or_default().push(reserved);
        drop(held);
        // Its connection may have ended meanwhile, and then nobody else takes it away.
        if !self.lock().owners.contains_key(&owner.id) {
            self.release_sessions(owner.id);
            return Err(super::owner_gone());
        }
        tracing::info!(
            session = id,
            uid = owner.peer.uid,
            client = owner.id,
            "session registered"
        );
        Ok(secret)
    }

    /// A session has its name for its own user only, who need not be allowed to be anything: it gives way to a node of
    /// another that is, unless it is the agent's user's or root's.
    pub(super) fn give_way(&self, owner: Owner, node: &str) {
        let mut held = self.held_sessions();
        let Some(session) = self.local.session(node) else {
            return;
        };
        if session.uid == owner.peer.uid || self.trust.limited(session.uid).is_none() {
            return;
        }
        if let Some(pending) = held.get_mut(&session.owner) {
            // Frees the name.
            pending.retain(|pending| pending.id() != node);
        }
        self.local.remove_session(node);
        let Refusal { cause, text } = gone_session(&session);
        self.links.cut_instance(node, cause, &text);
        let id = node.to_owned();
        self.predecessors.order(&Order::CutInstance { id, cause, text });
        tracing::warn!(
            node,
            uid = session.uid,
            to = owner.peer.uid,
            "a session gave way to the node of its name, of a user who may register it"
        );
    }

    /// The service that a user's sessions are beyond his own nodes here.
    fn session_service(&self, owner: Owner) -> Result<ServiceName, Refusal> {
        let Some(service) = self.carriers.proxy.session_service() else {
            return Err(Cause::NotPermitted.because(
                "a session (a node that does not listen, a remote console or a tool of a release) reaches the nodes of \
                 its own user on its own host alone; to let it out as a service, and the sessions of that service in, \
                 start both agents with --session-service SERVICE",
            ));
        };
        self.permit(owner.peer, service).map(|()| service.clone())
    }

    /// Their control connection has ended. Their links go as those of a node that has lost its own.
    pub(super) fn release_sessions(self: &Arc<Self>, owner: u64) {
        let gone = self.local.remove_sessions(owner);
        // Frees the names.
        drop(self.held_sessions().remove(&owner));
        if gone.is_empty() {
            return;
        }
        let (registry, reclaim) = (Arc::downgrade(self), self.reclaim);
        tokio::spawn(async move {
            tokio::time::sleep(reclaim).await;
            let Some(registry) = registry.upgrade() else {
                return;
            };
            for session in gone {
                // A successor of this process sees to it when this one comes with its links.
                let ours = !registry.carriers.proxy.is_closed();
                if ours && registry.local.session(&session.id).is_none() {
                    let Refusal { cause, text } = gone_session(&session);
                    registry.links.cut_instance(&session.id, cause, &text);
                    let id = session.id.clone();
                    registry
                        .predecessors
                        .order(&Order::CutInstance { id, cause, text });
                }
            }
        });
    }

    /// All sessions, for a successor of this process.
    pub(in crate::agent) fn handed_sessions(&self) -> Vec<HandedSession> {
        let sessions = self.local.all_sessions().into_iter();
        sessions
            .map(|session| HandedSession {
                id: session.id.clone(),
                name: session.name.clone(),
                secret: *session.secret.expose(),
                owner: session.owner,
                given: session.given().clone(),
            })
            .collect()
    }

    /// Knows the sessions of a predecessor of this process, whose clients have entered.
    ///
    /// # Errors
    /// A text, when one has no client, or there are too many.
    pub(in crate::agent) fn resume_sessions(
        self: &Arc<Self>,
        sessions: Vec<HandedSession>,
        owners: &HashMap<u64, Owner>,
    ) -> Result<(), String> {
        let mut held = self.held_sessions();
        for session in sessions {
            let none = || format!("{} belongs to a connection that was not handed over", session.id);
            let owner = *owners.get(&session.owner).ok_or_else(none)?;
            let reserved = self
                .reserve(owner, &session.id)
                .map_err(|refusal| refusal.to_string())?;
            held.entry(owner.id).or_default().push(reserved);
            self.local.insert_session(Session {
                id: session.id,
                name: session.name,
                secret: Secret::from_bytes(session.secret),
                owner: owner.id,
                uid: owner.peer.uid,
                acts_as: self.session_service(owner),
                given: Mutex::new(session.given),
            });
        }
        Ok(())
    }

    fn held_sessions(&self) -> MutexGuard<'_, Held> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No node's name: it has no `@`.
    fn next_session_id(&self, host: &str) -> String {
        let mut state = self.lock();
        state.services += 1;
        format!("session-{}-{host}", state.services)
    }
}

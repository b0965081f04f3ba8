//! What the two ends of a link have proven to each other, and whether that still holds.

use std::sync::Arc;

use rustls::RootCertStore;

use super::links::unix_now;
use super::tls::Peer;
use crate::mesh::{Identity, Protocol};

/// What a handshake proved. A link has that of its own handshake, then that of the last one beside it.
#[derive(Debug, Clone)]
pub struct Proof {
    /// What this end showed, and whom it believes.
    pub(super) shown: Arc<Identity>,
    /// Who the other end is.
    pub(super) peer: Peer,
    /// What was spoken: only an agent can prove itself anew.
    pub(super) protocol: Protocol,
    /// When, unix seconds.
    pub(super) at: i64,
}

impl Proof {
    /// What a handshake that just ended has proven.
    pub(super) fn new(shown: &Arc<Identity>, peer: &Peer, protocol: Protocol) -> Self {
        Self {
            shown: shown.clone(),
            peer: peer.clone(),
            protocol,
            at: unix_now(),
        }
    }

    /// Whether both ends are agents, which can prove themselves anew.
    pub(super) fn is_native(&self) -> bool {
        self.protocol == Protocol::Meshx
    }

    /// Whether the other end's chain leads to one of these roots. The end of its validity is another question.
    pub(super) fn is_rooted(&self, roots: &Arc<RootCertStore>, dialled: bool) -> bool {
        self.peer.leads_to(roots, self.at, dialled)
    }

    /// Whether this end has another certificate by now, which the other end has not seen.
    pub(super) fn is_replaced_by(&self, identity: &Identity) -> bool {
        self.shown.chain != identity.chain
    }

    /// Whether the other end may have another certificate by now, which is to be seen before this one ends: in the last
    /// quarter of its validity, and a few times in that.
    pub(super) fn is_ageing(&self, now: i64) -> bool {
        let Peer {
            not_before,
            not_after,
            ..
        } = self.peer;
        let life = not_after.saturating_sub(not_before).max(0);
        now >= not_after - life / 4 && now > self.at + life / 32
    }
}

//! Live links, held against the rules again.

use std::collections::HashMap;

use super::Proxy;
use super::cause::Cause;
use super::links::{Direction, Purpose};
use crate::mesh::SpiffeId;

/// What came of holding all live links against the rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Recheck {
    /// Links that were cut.
    pub(crate) cut: usize,
    /// Links that the mesh gave no answer for: they are to be asked about again.
    pub(crate) unanswered: usize,
}

impl Proxy {
    /// Asks again for every live link whether its pair may talk, and cuts those that may not. Returns how many.
    ///
    /// To be called when the rules may have changed. A link whose pair the mesh gives no answer for stays: it
    /// was allowed by the last one.
    pub async fn reauthorize(&self) -> usize {
        self.recheck().await.cut
    }

    pub(crate) async fn recheck(&self) -> Recheck {
        let mut result = Recheck::default();
        // Thousands of links may be of a few pairs.
        let mut answers = HashMap::new();
        for link in self.links.snapshot() {
            let info = &link.info;
            // A mesh that was set up anew has another trust domain. What was proved is the service; whether the
            // pair may talk is asked in the words of today.
            let now = |id: &SpiffeId| {
                let today = self.spiffe(id.service());
                today.map_or_else(|_| id.clone(), |today| id.in_domain(today.trust_domain()))
            };
            let (here, there) = (now(&info.local_spiffe), now(&info.remote_spiffe));
            let (out, back) = ((&here, there.service()), (&there, here.service()));
            // The directions that were checked at its start, by this agent or the other.
            let pairs = match (info.purpose, info.direction) {
                (_, Direction::Session) => vec![],
                (Purpose::Dist, _) => vec![out, back],
                (_, Direction::Inbound) => vec![back],
                (_, Direction::Outbound | Direction::Local) => vec![out],
            };
            let mut answered = true;
            for (source, target) in pairs {
                let pair = (source.clone(), target.clone());
                if !answers.contains_key(&pair) {
                    answers.insert(pair.clone(), self.authorize(source, target).await);
                }
                match answers.get(&pair) {
                    // The mesh was set up anew between the words and the answer: that says nothing of the services.
                    Some(Err(_)) if self.is_of_yesterday(source) => answered = false,
                    Some(Err(refusal)) if refusal.cause == Cause::IntentionDenied => {
                        result.cut += usize::from(self.links.cut(info.id, refusal.cause, &refusal.text));
                        answered = true;
                        break;
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => answered = false,
                }
            }
            result.unanswered += usize::from(!answered);
        }
        result
    }

    fn is_of_yesterday(&self, id: &SpiffeId) -> bool {
        let today = self.spiffe(id.service());
        today.is_ok_and(|today| today.trust_domain() != id.trust_domain())
    }
}

//! Live links, held against the rules again.

use super::Proxy;
use super::cause::Cause;
use super::links::{Direction, Purpose};

impl Proxy {
    /// Asks again for every live link whether its pair may talk, and cuts those that may not. Returns how many.
    ///
    /// To be called when the rules may have changed. A link whose pair the mesh gives no answer for stays: it
    /// was allowed by the last one.
    pub async fn reauthorize(&self) -> usize {
        let mut cut = 0;
        for link in self.links.snapshot() {
            let info = &link.info;
            let (here, there) = (&info.local_spiffe, &info.remote_spiffe);
            let (out, back) = ((here, there.service()), (there, here.service()));
            // The directions that were checked at its start, by this agent or the other.
            let pairs = match (info.purpose, info.direction) {
                (Purpose::Dist, _) => vec![out, back],
                (_, Direction::Inbound) => vec![back],
                (_, Direction::Outbound | Direction::Local) => vec![out],
            };
            for (source, target) in pairs {
                if let Err(refusal) = self.authorize(source, target).await
                    && refusal.cause == Cause::IntentionDenied
                {
                    cut += usize::from(self.links.cut(info.id, refusal.cause, &refusal.text));
                    break;
                }
            }
        }
        cut
    }
}

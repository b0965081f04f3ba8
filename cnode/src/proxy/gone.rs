//! Links to instances that are gone from the catalogue.
//!
//! An instance that was there and is absent from one good answer of the mesh after the other is gone, though its link
//! still stands: a host that was taken out, or a network that lets no end of a connection through. One that was never
//! there is none of the mesh's business: a node that never listens is in no catalogue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::Proxy;
use super::cause::Cause;
use super::links::{Direction, LinkId, LinkInfo, Purpose};
use crate::mesh::{Present, ServiceName};

/// What the catalogue has told of a link's other end.
#[derive(Debug, Default)]
struct Watched {
    seen: bool,
    /// Since when it is absent, by answers without a break of this number.
    absent: Option<(Instant, u64)>,
}

impl Proxy {
    /// Cuts the links of instances that have been gone from the catalogue for `instance_gone_after`. Until dropped.
    pub async fn keep_present(self: Arc<Self>) {
        let mut watched = HashMap::new();
        loop {
            sleep(self.settings.instance_look).await;
            self.look_for_gone(&mut watched).await;
        }
    }

    async fn look_for_gone(&self, watched: &mut HashMap<LinkId, Watched>) {
        let links: HashMap<LinkId, LinkInfo> = self
            .links
            .snapshot()
            .into_iter()
            .filter(|link| far_instance(&link.info).is_some())
            .map(|link| (link.info.id, link.info))
            .collect();
        watched.retain(|id, _| links.contains_key(id));
        let mut answers: HashMap<&ServiceName, Option<Present>> = HashMap::new();
        for (id, info) in &links {
            let Some(instance) = far_instance(info) else {
                continue;
            };
            let service = info.remote_spiffe.service();
            if !answers.contains_key(service) {
                let present = self.ask(self.mesh.present(service)).await.ok();
                answers.insert(service, present);
            }
            let present = answers.get(service).and_then(Option::as_ref);
            let link = watched.entry(*id).or_default();
            if link.is_gone_for(instance, present, Instant::now()) >= Some(self.settings.instance_gone_after)
            {
                let cause = match info.purpose {
                    Purpose::Dist => Cause::NoSuchNode,
                    Purpose::Rpc | Purpose::Tcp => Cause::NoSuchService,
                };
                let text = format!(
                    "{instance} has been gone from the catalogue for {:?}",
                    self.settings.instance_gone_after
                );
                self.links.cut(*id, cause, &text);
            }
        }
    }
}

impl Watched {
    /// How long it has been absent from answers in a row, this one included; none unless it is.
    fn is_gone_for(&mut self, instance: &str, present: Option<&Present>, now: Instant) -> Option<Duration> {
        // Silence is no absence, and what was counted before it counts no more.
        let Some(present) = present else {
            self.absent = None;
            return None;
        };
        if present.ids.contains(instance) {
            *self = Self {
                seen: true,
                absent: None,
            };
            return None;
        }
        if !self.seen {
            return None;
        }
        let (since, series) = *self.absent.get_or_insert((now, present.series));
        if series != present.series {
            self.absent = Some((now, present.series));
            return Some(Duration::ZERO);
        }
        Some(now.duration_since(since))
    }
}

/// The instance at the other end, where the link knows it.
fn far_instance(info: &LinkInfo) -> Option<&str> {
    match (info.direction, info.purpose) {
        // Ends with its registration.
        (Direction::Local | Direction::Session, _) => None,
        (_, Purpose::Dist) => Some(&info.remote),
        // A client need be no instance, and a sidecar chooses one by itself.
        (Direction::Outbound, Purpose::Rpc | Purpose::Tcp) => info.verified.then_some(&info.remote),
        (Direction::Inbound, Purpose::Rpc | Purpose::Tcp) => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_good_answers_in_a_row_count() {
        let there = |series| Present {
            ids: ["shop@h1".to_owned()].into(),
            series,
        };
        let empty = |series| Present {
            ids: Default::default(),
            series,
        };
        let (mut link, start) = (Watched::default(), Instant::now());
        let mut at = |seconds, present: Option<Present>| {
            let now = start + Duration::from_secs(seconds);
            let gone = link.is_gone_for("shop@h1", present.as_ref(), now);
            gone.map(|gone| gone.as_secs())
        };
        assert_eq!(at(0, Some(empty(1))), None, "never seen");
        assert_eq!(at(50, Some(empty(1))), None);
        assert_eq!(at(60, Some(there(1))), None);
        assert_eq!(at(65, Some(empty(1))), Some(0));
        assert_eq!(at(95, Some(empty(1))), Some(30));
        assert_eq!(at(100, None), None, "the mesh gave no answer");
        assert_eq!(at(105, Some(empty(1))), Some(0));
        assert_eq!(at(135, Some(empty(1))), Some(30));
        assert_eq!(at(140, Some(empty(2))), Some(0), "the series broke in between");
        assert_eq!(at(190, Some(empty(2))), Some(50));
        assert_eq!(at(195, Some(there(2))), None, "it is back");
        assert_eq!(at(200, Some(empty(2))), Some(0));
    }
}

//! Keeping this agent's entries: checks are refreshed, what Consul lost is registered again, what nobody holds is
//! taken away.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{sleep, sleep_until};

use super::catalogue::ServiceAnswer;
use super::client::{Fault, Request};
use super::form::{check_id, ttl};
use super::registration::Registrar;
use super::{META_AGENT, read, write};
use crate::mesh::{DataPlane, Entry, Instance, ServiceName, Token};
use crate::node::Backoff;
use crate::node::backoff::Attempts;

/// Between refreshes that failed.
const BACKOFF: Backoff = Backoff {
    min: Duration::from_millis(500),
    max: Duration::from_secs(2),
};
/// Between attempts to tell Consul the end of an entry.
const LEAVING: Backoff = Backoff {
    min: Duration::from_secs(1),
    max: COMPARE,
};
/// How often what we hold is compared with what the Consul agent has.
const COMPARE: Duration = Duration::from_secs(30);
/// Entries of this agent's id that nobody holds are left this long after its start: their VMs may come back.
const RECLAIM: Duration = Duration::from_secs(15);

impl Registrar {
    /// Compares what is held with what Consul has, until the mesh ends.
    pub(super) async fn keep_all(self: Arc<Self>) {
        let mut attempts = Attempts::new(LEAVING);
        loop {
            let left = !self.lock().leaving.is_empty();
            let pause = if left {
                attempts.wait()
            } else {
                attempts = Attempts::new(LEAVING);
                COMPARE
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.compare.notified() => {}
                () = sleep(pause) => {}
                () = sleep_until(self.began + RECLAIM), if self.began.elapsed() < RECLAIM => {}
            }
            if let Err(fault) = self.compare().await {
                tracing::debug!(%fault, "the Consul agent's entries cannot be compared with ours now");
            }
        }
    }

    /// Ids of ours that the Consul agent has not.
    pub(super) async fn lost(&self) -> Result<Vec<String>, Fault> {
        let there = self.agent_services(None).await?;
        let held: Vec<_> = {
            let state = self.lock();
            let held = state
                .held
                .iter()
                .map(|(id, held)| (id.clone(), held.entry.clone()));
            held.collect()
        };
        let mut lost = Vec::new();
        for (id, entry) in held {
            if !self.is_there(&entry, &there) && !self.is_seen(&entry).await? {
                lost.push(id);
            }
        }
        Ok(lost)
    }

    /// Refreshes one entry's check for as long as it is held.
    pub(super) async fn keep(&self, id: &str) {
        let mut attempts = Attempts::new(BACKOFF);
        let mut failing = false;
        loop {
            let held = self
                .lock()
                .held
                .get(id)
                .map(|held| (ttl(&held.entry) / 2, held.entry.adopt, held.changed.clone()));
            let Some((half, adopted, changed)) = held else {
                return;
            };
            tokio::select! {
                // A Consul that is back is to know us soon.
                () = sleep(if failing { attempts.wait().min(half) } else { half }) => {}
                () = changed.notified() => {}
            }
            let result = if adopted {
                self.refresh_adopted(id).await
            } else {
                self.refresh(id).await
            };
            let failed = result.is_err();
            match result {
                Ok(()) => {
                    attempts = Attempts::new(BACKOFF);
                    if self.away.swap(false, Ordering::Relaxed) {
                        tracing::info!("Consul is back");
                        self.compare.notify_one();
                    }
                }
                // One line for all entries.
                Err(fault) if fault.is_away() => {
                    if !self.away.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%fault, "checks in Consul cannot be refreshed, trying on");
                    }
                }
                Err(fault) if !failing => {
                    tracing::warn!(id, %fault, "its check in Consul cannot be refreshed, trying on");
                }
                Err(_) => {}
            }
            failing = failed;
        }
    }

    async fn refresh(&self, id: &str) -> Result<(), Fault> {
        let Some((entry, token)) = self.entry(id) else {
            return Ok(());
        };
        let service = &entry.instance.service;
        // What Consul keeps to speak for the entry is the token that it was registered with.
        if token != self.current(service) {
            return self.restore(id, "the token changed").await;
        }
        let request = self
            .report(id, &check_id(id))
            .token(token)
            .right(write(service.as_ref()));
        match self.client.send(&request).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_missing() => self.restore(id, "Consul does not know it any more").await,
            Err(fault) => Err(fault),
        }
    }

    /// What its check is told: that it passes, or why not (Consul API, "TTL Check Pass" and "TTL Check Fail").
    fn report(&self, id: &str, check: &str) -> Request {
        match self.critical(id) {
            None => Request::put(&["agent", "check", "pass", check]),
            Some(reason) => Request::put(&["agent", "check", "fail", check]).query("note", reason),
        }
    }

    /// The check of somebody else's registration is refreshed only when there is one to refresh.
    async fn refresh_adopted(&self, id: &str) -> Result<(), Fault> {
        let Some((entry, _)) = self.entry(id) else {
            return Ok(());
        };
        let service = &entry.instance.service;
        let request = Request::get(&["agent", "checks"])
            .query("filter", format!("ServiceID == \"{id}\" and Type == \"ttl\""))
            .token(self.current(service))
            .large()
            .right(read(service.as_ref()));
        let checks: HashMap<String, serde::de::IgnoredAny> = self.client.send(&request).await?.json()?;
        for check in checks.keys() {
            let request = self
                .report(id, check)
                .token(self.current(service))
                .right(write(service.as_ref()));
            self.client.send(&request).await?;
        }
        Ok(())
    }

    /// Registers again what is still held.
    async fn restore(&self, id: &str, why: &str) -> Result<(), Fault> {
        let _turn = self.turn(id).await;
        let Some((entry, _)) = self.entry(id) else {
            return Ok(());
        };
        if entry.adopt {
            return Ok(());
        }
        let token = self.put(&entry).await?;
        tracing::info!(id, why, "registered again");
        if let Some(held) = self.lock().held.get_mut(id) {
            held.token = token;
            held.changed.notify_one();
        }
        Ok(())
    }

    pub(super) async fn compare(&self) -> Result<(), Fault> {
        for id in self.lost().await? {
            if let Err(fault) = self.restore(&id, "Consul had lost it").await {
                tracing::warn!(id, %fault, "cannot be registered again, trying on");
            }
        }
        let leaving: Vec<_> = {
            let state = self.lock();
            state
                .leaving
                .iter()
                .map(|(id, token)| (id.clone(), token.clone()))
                .collect()
        };
        let there = self.agent_services(None).await?;
        let ours = |answer: &&ServiceAnswer| answer.meta(META_AGENT) == Some(&self.agent);
        let strays = there
            .values()
            .filter(ours)
            .filter(|answer| answer.kind.as_deref().unwrap_or_default().is_empty());
        let mut strays: HashMap<String, Option<Token>> =
            strays.map(|answer| (answer.id.clone(), None)).collect();
        if self.began.elapsed() < RECLAIM {
            strays.clear();
        }
        strays.extend(leaving);
        for (id, token) in strays {
            let _turn = self.turn(&id).await;
            if self.lock().held.contains_key(&id) {
                continue;
            }
            let service = there.get(&id).map(|answer| answer.service.as_str());
            let service = service.unwrap_or_default();
            let presented = || self.tokens.of(&ServiceName::new(service).ok()?);
            let request = Request::put(&["agent", "service", "deregister", &id])
                .token(token.or_else(presented))
                .right(write(service));
            match self.client.send(&request).await {
                Err(fault) if !fault.is_missing() => {
                    tracing::warn!(id, %fault, "an entry that nobody holds any more cannot be removed");
                }
                _ => {
                    self.lock().leaving.remove(&id);
                    tracing::info!(id, "removed an entry that nobody holds any more");
                }
            }
        }
        Ok(())
    }

    /// Whether the Consul agent has it as we registered it.
    fn is_there(&self, entry: &Entry, there: &HashMap<String, ServiceAnswer>) -> bool {
        let Instance { id, service, .. } = &entry.instance;
        let Some(found) = there.get(id) else { return false };
        if found.service != service.as_ref() {
            return false;
        }
        if entry.adopt {
            return true;
        }
        let sidecar = matches!(entry.data_plane, DataPlane::Sidecar(_));
        found.meta(META_AGENT) == Some(&self.agent)
            && (!sidecar || there.contains_key(&format!("{id}-sidecar-proxy")))
    }

    /// The agent's token may not see it, the one that it was registered with does.
    async fn is_seen(&self, entry: &Entry) -> Result<bool, Fault> {
        if entry.adopt {
            return Ok(true);
        }
        let Some(token) = self.tokens.of(&entry.instance.service) else {
            return Ok(false);
        };
        Ok(self.is_there(entry, &self.agent_services(Some(token)).await?))
    }

    async fn agent_services(&self, token: Option<Token>) -> Result<HashMap<String, ServiceAnswer>, Fault> {
        let request = Request::get(&["agent", "services"])
            .token(token)
            .large()
            .right(read("*"));
        self.client.send(&request).await?.json()
    }

    pub(super) async fn agent_service(
        &self,
        id: &str,
        service: &ServiceName,
    ) -> Result<Option<ServiceAnswer>, Fault> {
        let request = Request::get(&["agent", "services"])
            .query("filter", format!("ID == \"{id}\""))
            .token(self.tokens.of(service))
            .large()
            .right(read(service.as_ref()));
        let mut found: HashMap<String, ServiceAnswer> = self.client.send(&request).await?.json()?;
        Ok(found.remove(id))
    }
}

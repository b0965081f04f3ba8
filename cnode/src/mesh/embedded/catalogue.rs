//! Which agents live, and what they serve.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::dir::{MeshDir, Stamp, open_lock, unavailable};
use crate::mesh::{Instance, MeshError};

/// Most entries that are looked at; more is no mesh of one machine.
pub(super) const MAX_AGENTS: usize = 1024;
/// Longest agent id in bytes.
pub(super) const MAX_AGENT_ID: usize = 64;
/// A reader holds an entry's lock for a moment to see whether it is free; longer, and an agent has it.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// The clocks of file systems tick: what was changed so lately may be changed again and look the same.
const SETTLED: Duration = Duration::from_millis(100);

/// `agents/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentEntry {
    id: String,
    hosts: Vec<String>,
    address: SocketAddr,
    /// Nanoseconds since 1970, to tell which of two agents is older.
    started: u64,
    instances: Vec<Record>,
}

/// An instance, and how it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) instance: Instance,
    /// Why it does not pass. A release that does not know this takes it for passing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) critical: Option<String>,
}

impl From<Instance> for Record {
    fn from(instance: Instance) -> Self {
        Self {
            instance,
            critical: None,
        }
    }
}

impl AgentEntry {
    pub(super) fn new(id: &str, hosts: Vec<String>, address: SocketAddr) -> Result<Self, MeshError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        if !(1..=MAX_AGENT_ID).contains(&id.len()) || !id.bytes().all(good) {
            return Err(MeshError::Refused(format!(
                "agent id {id:?} is not 1 to {MAX_AGENT_ID} letters, digits, - and _"
            )));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        Ok(Self {
            id: id.to_owned(),
            hosts,
            address,
            started,
            instances: Vec::new(),
        })
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

/// This agent's entry. It is there as long as the lock is held.
#[derive(Debug)]
pub(super) struct OwnEntry {
    entry: Mutex<AgentEntry>,
    dir: MeshDir,
    id: String,
    /// The lock; none once a successor of this process has the entry.
    alive: Mutex<Option<File>>,
    /// Before it is taken over, the entry is the predecessor's.
    ours: AtomicBool,
    pub(super) entries: Entries,
}

impl OwnEntry {
    /// Enters an agent. The caller holds the mesh's lock.
    pub(super) fn open(dir: &MeshDir, entry: AgentEntry) -> Result<Self, MeshError> {
        sweep(dir)?;
        let path = dir.join(&format!("agents/{}.lock", entry.id));
        let alive = open_lock(&path).map_err(|error| unavailable(&path, &error))?;
        let began = Instant::now();
        while let Err(error) = flock(&alive, FlockOperation::NonBlockingLockExclusive) {
            if began.elapsed() > LOCK_PATIENCE || !matches!(error, Errno::WOULDBLOCK | Errno::INTR) {
                return Err(MeshError::Refused(format!(
                    "an agent of the id {} lives ({error}): stop it or choose another id",
                    entry.id
                )));
            }
            std::thread::sleep(LOCK_RETRY);
        }
        write(dir, &entry)?;
        let id = entry.id.clone();
        Ok(Self {
            entry: Mutex::new(entry),
            dir: dir.clone(),
            id,
            alive: Mutex::new(Some(alive)),
            ours: AtomicBool::new(true),
            entries: Entries::default(),
        })
    }

    /// The entry of a predecessor of this process, whose lock is handed on: as old as it was. Written by
    /// [`OwnEntry::take_over`].
    pub(super) fn succeed(dir: &MeshDir, mut entry: AgentEntry, lock: File) -> Result<Self, MeshError> {
        let name = file(&entry.id);
        let gone = || MeshError::Unavailable(format!("{name}: the predecessor's entry is gone"));
        let text = dir.read(&name)?.ok_or_else(gone)?;
        let before: AgentEntry = serde_json::from_str(&text)
            .map_err(|error| MeshError::Unavailable(format!("{name}: {error}")))?;
        entry.started = before.started;
        let id = entry.id.clone();
        Ok(Self {
            entry: Mutex::new(entry),
            dir: dir.clone(),
            id,
            alive: Mutex::new(Some(lock)),
            ours: AtomicBool::new(false),
            entries: Entries::default(),
        })
    }

    pub(super) fn take_over(&self, dir: &MeshDir, instances: Vec<Instance>) -> Result<(), MeshError> {
        self.ours.store(true, Ordering::Relaxed);
        let _lock = dir.lock()?;
        let mut own = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        own.instances = instances.into_iter().map(Record::from).collect();
        write(dir, &own)
    }

    pub(super) fn lock(&self) -> io::Result<Option<OwnedFd>> {
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        alive
            .as_ref()
            .map(|lock| lock.try_clone().map(OwnedFd::from))
            .transpose()
    }

    /// The lock is the successor's alone from now on.
    pub(super) fn hand_over(&self) {
        self.ours.store(false, Ordering::Relaxed);
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(super) fn register(&self, dir: &MeshDir, instance: Instance) -> Result<(), MeshError> {
        let _lock = dir.lock()?;
        let mut own = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let others = self.entries.live(dir)?;
        let others = others.iter().filter(|other| other.id != own.id);
        for other in others {
            if let Some(host) = shared_host(&own, other) {
                tracing::warn!(
                    agent = own.id,
                    other = other.id,
                    host,
                    "two agents own the same host name"
                );
                if (other.started, &other.id) < (own.started, &own.id) {
                    return Err(MeshError::HostTaken(format!(
                        "agent {} owned host {host} first: give one of them other hosts",
                        other.id
                    )));
                }
            }
            let same = |i: &&Instance| i.id == instance.id || i.node.is_some() && i.node == instance.node;
            if let Some(taken) = other.instances.iter().map(|record| &record.instance).find(same) {
                return Err(MeshError::NameTaken(format!(
                    "{} is registered by agent {}",
                    taken.id, other.id
                )));
            }
        }
        let mut next = own.clone();
        next.instances.retain(|old| old.instance.id != instance.id);
        next.instances.push(instance.into());
        write(dir, &next)?;
        *own = next;
        Ok(())
    }

    pub(super) fn deregister(&self, dir: &MeshDir, id: &str) -> Result<(), MeshError> {
        let _lock = dir.lock()?;
        let mut own = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let before = own.instances.len();
        own.instances.retain(|old| old.instance.id != id);
        if own.instances.len() < before {
            // Should this fail, on a full disk say, the next change takes it out of the file as well.
            write(dir, &own)?;
        }
        Ok(())
    }

    /// Says that an instance does not pass, and why; or that it does.
    pub(super) fn set_critical(
        &self,
        dir: &MeshDir,
        id: &str,
        reason: Option<String>,
    ) -> Result<(), MeshError> {
        let _lock = dir.lock()?;
        let mut own = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = own.clone();
        let Some(record) = next.instances.iter_mut().find(|record| record.instance.id == id) else {
            return Ok(());
        };
        record.critical = reason;
        write(dir, &next)?;
        *own = next;
        Ok(())
    }

    pub(super) fn host_conflicts(&self, dir: &MeshDir) -> Result<Vec<String>, MeshError> {
        let own = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let others = self.entries.live(dir)?;
        let others = others.iter().filter(|other| other.id != own.id);
        let conflict = |other: &Arc<AgentEntry>| {
            shared_host(&own, other)
                .map(|host| format!("agent {} at {} owns {host}", other.id, other.address))
        };
        Ok(others.filter_map(conflict).collect())
    }
}

impl Drop for OwnEntry {
    fn drop(&mut self) {
        if !self.ours.load(Ordering::Relaxed) {
            return;
        }
        // Only the entry: another agent may open the lock file at this moment. The next one sweeps it.
        let _ = fs::remove_file(self.dir.join(&file(&self.id)));
    }
}

fn shared_host<'a>(a: &'a AgentEntry, b: &AgentEntry) -> Option<&'a str> {
    a.hosts
        .iter()
        .find(|host| b.hosts.contains(host))
        .map(String::as_str)
}

fn write(dir: &MeshDir, entry: &AgentEntry) -> Result<(), MeshError> {
    let text = serde_json::to_string(entry).map_err(|error| MeshError::Unavailable(error.to_string()))?;
    dir.replace(&file(&entry.id), &text)
}

/// What the entries of live agents say, each read again only when its file is another: every link asks, and the answer
/// has all nodes of the mesh in it.
#[derive(Debug, Default)]
pub(super) struct Entries(Mutex<HashMap<String, (Stamp, Arc<AgentEntry>)>>);

impl Entries {
    pub(super) fn live(&self, dir: &MeshDir) -> Result<Vec<Arc<AgentEntry>>, MeshError> {
        let mut read = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut live = HashMap::new();
        for id in ids(dir)? {
            if is_free(dir, &id)? {
                continue;
            }
            // Before it is read: what is written meanwhile is seen the next time.
            let stamp = dir.stamp(&file(&id));
            let entry = match read.remove(&id) {
                Some((seen, entry)) if seen == stamp => entry,
                // It may be just about to come or go.
                _ => match load(dir, &id)? {
                    Some(entry) => Arc::new(entry),
                    None => continue,
                },
            };
            live.insert(id, (stamp, entry));
        }
        let entries = live.values().map(|(_, entry)| entry.clone()).collect();
        live.retain(|_, (stamp, _)| is_settled(*stamp));
        *read = live;
        Ok(entries)
    }

    /// The instances of all live agents for which `wanted` holds, passing or not.
    pub(super) fn records(
        &self,
        dir: &MeshDir,
        wanted: impl Fn(&Record) -> bool,
    ) -> Result<Vec<Record>, MeshError> {
        let live = self.live(dir)?;
        let all = live.iter().flat_map(|entry| &entry.instances);
        Ok(all.filter(|record| wanted(record)).cloned().collect())
    }
}

fn is_settled((_, seconds, nanoseconds, _): Stamp) -> bool {
    let (Ok(seconds), Ok(nanoseconds)) = (u64::try_from(seconds), u64::try_from(nanoseconds)) else {
        return false;
    };
    let changed = Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.checked_sub(changed).is_some_and(|age| age > SETTLED)
}

fn file(id: &str) -> String {
    format!("agents/{id}.json")
}

fn load(dir: &MeshDir, id: &str) -> Result<Option<AgentEntry>, MeshError> {
    let name = file(id);
    let Some(text) = dir.read(&name)? else {
        return Ok(None);
    };
    let entry: AgentEntry =
        serde_json::from_str(&text).map_err(|error| MeshError::Unavailable(format!("{name}: {error}")))?;
    if entry.id != id {
        return Err(MeshError::Unavailable(format!(
            "{name} is of agent {:?}",
            entry.id
        )));
    }
    if let Some(far) = entry
        .instances
        .iter()
        .map(|record| &record.instance)
        .find(|instance| !instance.address.ip().is_loopback())
    {
        return Err(MeshError::Unavailable(format!(
            "{name}: {} is not a loopback address",
            far.address
        )));
    }
    Ok(Some(entry))
}

/// Ids of the agents that have a lock file, held or not.
fn ids(dir: &MeshDir) -> Result<Vec<String>, MeshError> {
    let path = dir.join("agents");
    let mut ids = Vec::new();
    for entry in fs::read_dir(&path).map_err(|error| unavailable(&path, &error))? {
        let name = entry.map_err(|error| unavailable(&path, &error))?.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".lock")) else {
            continue;
        };
        if ids.len() == MAX_AGENTS {
            return Err(MeshError::Unavailable(format!(
                "{} has more than {MAX_AGENTS} agents",
                path.display()
            )));
        }
        ids.push(id.to_owned());
    }
    Ok(ids)
}

/// Whether nobody holds this agent's lock.
fn is_free(dir: &MeshDir, id: &str) -> Result<bool, MeshError> {
    let path = dir.join(&format!("agents/{id}.lock"));
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(unavailable(&path, &error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(unavailable(&path, &error.into())),
    }
}

/// Removes what dead agents left. The caller holds the mesh's lock, under which alone lock files are made.
fn sweep(dir: &MeshDir) -> Result<(), MeshError> {
    for id in ids(dir)? {
        if is_free(dir, &id)? {
            let _ = fs::remove_file(dir.join(&file(&id)));
            let _ = fs::remove_file(dir.join(&format!("agents/{id}.lock")));
        }
    }
    Ok(())
}

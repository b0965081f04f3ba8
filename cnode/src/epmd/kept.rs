//! What outlives the agent's process: running creations and the addresses of hosts. A small file in the agent's directory.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::warn;

use super::{HOSTS_MAX, NAMES_MAX};

/// Largest file that is read.
const FILE_MAX: u64 = 1 << 20;
/// Registrations of this time are written together.
const GATHER: Duration = Duration::from_millis(50);

/// A node that was registered when the agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptName {
    pub(super) uid: u32,
    /// Where it listens.
    pub(super) port: u16,
    /// What it runs with.
    pub(super) creation: u32,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Contents {
    #[serde(default)]
    names: BTreeMap<String, KeptName>,
    #[serde(default)]
    hosts: BTreeMap<String, Ipv4Addr>,
}

#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    /// As the file said at the start.
    before: BTreeMap<String, KeptName>,
    // Held for a look-up or a change, never across an await.
    now: Mutex<Contents>,
    changed: Notify,
}

impl Kept {
    /// Reads the file, and gives the hosts in it. A file that cannot be read is as none.
    pub(super) fn open(path: PathBuf) -> (Self, BTreeMap<String, Ipv4Addr>) {
        let mut contents = read(&path).unwrap_or_else(|error| {
            warn!(path = %path.display(), %error, "names and hosts of an earlier agent cannot be read");
            Contents::default()
        });
        if contents.names.len() > NAMES_MAX || contents.hosts.len() > HOSTS_MAX {
            contents = Contents::default();
        }
        let kept = Self {
            path,
            before: std::mem::take(&mut contents.names),
            now: Mutex::new(contents.clone()),
            changed: Notify::new(),
        };
        (kept, contents.hosts)
    }

    /// What a predecessor of this process knew; its names are told by their connections.
    pub(super) fn resume(
        path: PathBuf,
        before: BTreeMap<String, KeptName>,
        hosts: BTreeMap<String, Ipv4Addr>,
    ) -> Self {
        let names = BTreeMap::new();
        Self {
            path,
            before,
            now: Mutex::new(Contents { names, hosts }),
            changed: Notify::new(),
        }
    }

    /// All that [`Kept::before`] knows.
    pub(super) fn all_before(&self) -> BTreeMap<String, KeptName> {
        self.before.clone()
    }

    /// Who has this name.
    pub(super) fn now(&self, name: &str) -> Option<KeptName> {
        self.lock().names.get(name).copied()
    }

    /// Who had this name when the agent before this one ended.
    pub(super) fn before(&self, name: &str) -> Option<KeptName> {
        self.before.get(name).copied()
    }

    pub(super) fn set_name(&self, name: &str, kept: KeptName) {
        self.lock().names.insert(name.to_owned(), kept);
        self.changed.notify_one();
    }

    pub(super) fn forget_name(&self, name: &str) {
        self.lock().names.remove(name);
        self.changed.notify_one();
    }

    pub(super) fn set_hosts(&self, hosts: BTreeMap<String, Ipv4Addr>) {
        self.lock().hosts = hosts;
        self.changed.notify_one();
    }

    /// Writes what changes, for ever.
    pub(super) async fn keep_writing(&self) {
        loop {
            self.changed.notified().await;
            sleep(GATHER).await;
            self.write();
        }
    }

    /// A few kilobytes, to a file that nobody else reads.
    pub(super) fn write(&self) {
        let contents = self.lock().clone();
        let written = serde_json::to_vec(&contents)
            .map_err(io::Error::other)
            .and_then(|bytes| replace(&self.path, &bytes, 0o600));
        if let Err(error) = written {
            warn!(path = %self.path.display(), %error, "names and hosts cannot be kept for the next agent");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path) -> io::Result<Contents> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::other)
}

/// Puts a whole file in the place of another.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let next = path.with_extension("new");
    // One that a killed agent left.
    let _ = fs::remove_file(&next);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&next)?;
    file.write_all(bytes)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(mode))?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const SHOP: KeptName = KeptName {
        uid: 1000,
        port: 4711,
        creation: 77,
    };

    #[test]
    fn what_was_written_is_read_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("epmd.json");
        let (kept, hosts) = Kept::open(path.clone());
        assert!(hosts.is_empty() && kept.before("shop").is_none());
        kept.set_name("shop", SHOP);
        kept.set_name("gone", SHOP);
        kept.forget_name("gone");
        kept.set_hosts(BTreeMap::from([("h2".to_owned(), Ipv4Addr::new(127, 64, 0, 1))]));
        kept.write();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (next, hosts) = Kept::open(path.clone());
        assert_eq!(next.before("shop"), Some(SHOP));
        assert_eq!((next.before("gone"), hosts.len()), (None, 1));
        // Names are those that are registered now.
        next.write();
        assert_eq!(Kept::open(path).0.before("shop"), None);
    }

    #[test]
    fn a_file_that_is_none_is_left_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("epmd.json");
        for bad in [
            "",
            "{",
            "[]",
            r#"{"names": {"a": {"uid": -1}}}"#,
            r#"{"hosts": {"h": "x"}}"#,
        ] {
            fs::write(&path, bad).unwrap();
            assert!(Kept::open(path.clone()).1.is_empty(), "{bad}");
        }
    }
}

//! Names of nodes that were registered when the agent was killed: kept for whoever held them.
//!
//! The file has no secret, only what one is known again by: SHA-256 of it. A secret has 256 random bits, so nothing
//! slower is needed.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::time::Instant;
use tracing::warn;

use super::{INSTANCES_MAX, Registry};
use crate::{
    agent::trust::Peer,
    proxy::{
        cause::{Cause, Refusal},
        local::{Endpoint, SECRET_LEN, Secret},
    },
};

/// Largest file that is read: [`INSTANCES_MAX`] names of 255 bytes.
const FILE_MAX: u64 = 2 << 20;
/// Pause after the file could not be written.
const RETRY: Duration = Duration::from_secs(1);

/// Who held a name.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Holder {
    node: String,
    uid: u32,
    /// SHA-256 of the registration's secret.
    proof: [u8; SECRET_LEN],
}

/// [`Reserved`] in the hands of a successor of this process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct HandedReserved {
    left: Duration,
    holders: Vec<Holder>,
}

/// Names that only their holders may register, for a while.
#[derive(Debug, Default)]
pub(in crate::agent) struct Reserved {
    until: Option<Instant>,
    holders: HashMap<String, Holder>,
}

impl Reserved {
    /// What an agent that was killed left in `file`, for as long as `reclaim`.
    pub(in crate::agent) fn load(file: &Path, reclaim: Duration) -> Self {
        let holders = match read(file) {
            Ok(holders) => holders,
            Err(error) => {
                warn!(file = %file.display(), %error, "names that were registered are not reserved for their holders");
                Vec::new()
            }
        };
        Self::of(holders, reclaim)
    }

    fn of(holders: Vec<Holder>, left: Duration) -> Self {
        Self {
            until: Some(Instant::now() + left),
            holders: holders
                .into_iter()
                .take(INSTANCES_MAX)
                .map(|holder| (holder.node.clone(), holder))
                .collect(),
        }
    }

    /// Those of a predecessor of this process.
    pub(super) fn resume(HandedReserved { left, holders }: HandedReserved) -> Self {
        Self::of(holders, left)
    }

    pub(super) fn handed(&self) -> HandedReserved {
        let left = self
            .until
            .map(|until| until.saturating_duration_since(Instant::now()));
        HandedReserved {
            left: left.unwrap_or_default(),
            holders: self.holders.values().cloned().collect(),
        }
    }

    /// Whether this name is somebody else's still.
    pub(super) fn check(&self, node: &str, peer: Peer, secret: Option<&Secret>) -> Result<(), Refusal> {
        let left = self
            .until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let Some((holder, left)) = self.holders.get(node).zip(left.filter(|left| !left.is_zero())) else {
            return Ok(());
        };
        let is_holder = secret.is_some_and(|secret| bool::from(proof(secret).ct_eq(&holder.proof)));
        if is_holder && peer.uid == holder.uid {
            return Ok(());
        }
        // It passes by itself: whoever boots tries again.
        Err(Cause::NotReady.because(format!(
            "{node} is reserved for who had it registered when the agent was killed, for {} s more",
            left.as_secs() + 1
        )))
    }

    pub(super) fn forget(&mut self, node: &str) {
        self.holders.remove(node);
    }
}

impl Registry {
    /// Keeps the file of names up to date, until the agent hands over or ends.
    pub(in crate::agent) async fn keep_names(self: Arc<Self>, file: PathBuf) {
        loop {
            let holders = self.holders();
            let (to, proxy) = (file.clone(), &self.carriers.proxy);
            if proxy.is_closed() {
                return;
            }
            let written = tokio::task::spawn_blocking(move || write(&to, &holders)).await;
            if let Err(error) = written.map_err(io::Error::other).flatten() {
                warn!(file = %file.display(), %error, "names that are registered cannot be noted, trying on");
                tokio::time::sleep(RETRY).await;
                continue;
            }
            tokio::select! {
                () = self.renamed.notified() => {}
                () = proxy.wait_closed() => return,
            }
        }
    }

    /// Who holds a name, or may come back for it.
    fn holders(&self) -> Vec<Holder> {
        let nodes = self.local.all().into_iter().filter_map(|local| {
            // A node that registers the EPMD way has no secret to show.
            matches!(local.endpoint, Endpoint::NodeSocket(_)).then_some(())?;
            Some(Holder {
                node: local.instance.node.clone()?,
                uid: local.uid,
                proof: proof(&local.secret),
            })
        });
        let mut holders: Vec<_> = nodes.collect();
        let state = self.lock();
        let reserved = &state.reserved;
        if reserved.until.is_some_and(|until| until > Instant::now()) {
            holders.extend(reserved.holders.values().cloned());
        }
        holders
    }
}

fn proof(secret: &Secret) -> [u8; SECRET_LEN] {
    let mut proof = [0; SECRET_LEN];
    proof.copy_from_slice(digest(&SHA256, secret.expose()).as_ref());
    proof
}

fn read(file: &Path) -> io::Result<Vec<Holder>> {
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    opened.take(FILE_MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > FILE_MAX {
        return Err(io::Error::other(format!("more than {FILE_MAX} bytes")));
    }
    serde_json::from_slice(&text).map_err(io::Error::from)
}

fn write(file: &Path, holders: &[Holder]) -> io::Result<()> {
    let new = file.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    opened.write_all(&serde_json::to_vec(holders)?)?;
    fs::rename(&new, file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn peer(uid: u32) -> Peer {
        Peer {
            uid,
            gid: 0,
            pid: None,
        }
    }

    #[test]
    fn a_name_is_its_holders_until_the_time_is_over() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("names.json");
        let (secret, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        let holder = Holder {
            node: "shop@h1".into(),
            uid: 7,
            proof: proof(&secret),
        };
        write(&file, &[holder]).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains(&format!("{:?}", secret.expose()).replace(' ', "")));

        let reserved = Reserved::load(&file, Duration::from_secs(19));
        reserved.check("cart@h1", peer(8), None).unwrap();
        reserved.check("shop@h1", peer(7), Some(&secret)).unwrap();
        for (uid, shown) in [(7, None), (7, Some(&other)), (8, Some(&secret))] {
            let refusal = reserved.check("shop@h1", peer(uid), shown).unwrap_err();
            assert_eq!(refusal.cause, Cause::NotReady);
            assert!(
                refusal.text.contains("reserved") && refusal.text.contains("for 1"),
                "{refusal}"
            );
        }
        // A takeover makes no difference, not even to the time.
        let handed = serde_json::to_string(&reserved.handed()).unwrap();
        let resumed = Reserved::resume(serde_json::from_str(&handed).unwrap());
        assert!(resumed.until.unwrap() <= reserved.until.unwrap() + Duration::from_secs(1));
        resumed.check("shop@h1", peer(7), Some(&secret)).unwrap();
        let refusal = resumed.check("shop@h1", peer(7), Some(&other)).unwrap_err();
        assert_eq!(refusal.cause, Cause::NotReady);
        let over = Reserved::load(&file, Duration::ZERO);
        over.check("shop@h1", peer(8), None).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_read_reserves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("names.json");
        for text in ["{", "[{\"node\": 1}]"] {
            fs::write(&file, text).unwrap();
            assert!(Reserved::load(&file, Duration::from_secs(10)).holders.is_empty());
        }
        File::create(&file).unwrap().set_len(FILE_MAX + 1).unwrap();
        assert!(read(&file).is_err());
    }
}

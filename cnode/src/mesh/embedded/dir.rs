//! The directory: who may look in, and how files in it change.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::mesh::MeshError;
use crate::way::check_way;

/// Largest file of a mesh that is read, in bytes.
pub(super) const MAX_FILE: u64 = 4 << 20;

/// A version of a file, to see that it was replaced: inode, seconds and nanoseconds of its last change (of content,
/// mode or owner; no program can set that time back), size.
pub(super) type Stamp = (u64, i64, i64, u64);

/// The directory of an embedded mesh: mode 0700 and ours.
#[derive(Debug, Clone)]
pub struct MeshDir {
    path: PathBuf,
}

impl MeshDir {
    /// Opens the directory; makes it when it is not there.
    ///
    /// # Errors
    /// [`MeshError::Refused`] when others than its owner may enter it, or it is not ours;
    /// [`MeshError::Unavailable`] when it cannot be made.
    pub fn open(path: &Path) -> Result<Self, MeshError> {
        for path in [path.to_owned(), path.join("agents")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| unavailable(&path, &error))?;
            private(
                &path,
                &fs::symlink_metadata(&path).map_err(|error| unavailable(&path, &error))?,
                0o700,
            )?;
        }
        // As the agent's: with another directory in this one's place anyone signs any name.
        let absolute = std::path::absolute(path).map_err(|error| unavailable(path, &error))?;
        check_way(&absolute, rustix::process::geteuid().as_raw())
            .map_err(|error| MeshError::Refused(error.to_string()))?;
        let dir = Self {
            path: path.to_owned(),
        };
        let lock = dir.lock()?;
        super::rules::Rules::ensure(&dir)?;
        drop(lock);
        Ok(dir)
    }

    /// Path of a file in it.
    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The version of a file; that of one which is not there is zero.
    pub(super) fn stamp(&self, name: &str) -> Stamp {
        fs::metadata(self.join(name))
            .map(|meta| (meta.ino(), meta.ctime(), meta.ctime_nsec(), meta.size()))
            .unwrap_or_default()
    }

    /// Waits for the lock that every change is made under.
    pub(super) fn lock(&self) -> Result<File, MeshError> {
        let path = self.join("lock");
        let file = open_lock(&path).map_err(|error| unavailable(&path, &error))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|error| unavailable(&path, &error.into()))?;
        Ok(file)
    }

    /// A shared lock on the directory itself. Whoever cleans temporary directories by age leaves what lies in a
    /// locked one (systemd-tmpfiles(8)): an idle mesh touches its files for weeks only to lock them.
    pub(super) fn occupy(&self) -> Result<File, MeshError> {
        let file = File::open(&self.path).map_err(|error| unavailable(&self.path, &error))?;
        flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|error| unavailable(&self.path, &error.into()))?;
        Ok(file)
    }

    /// Reads a whole file; `None` when it is not there.
    pub(super) fn read(&self, name: &str) -> Result<Option<String>, MeshError> {
        let path = self.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unavailable(&path, &error)),
        };
        private(
            &path,
            &file.metadata().map_err(|error| unavailable(&path, &error))?,
            0o600,
        )?;
        let mut text = String::new();
        file.take(MAX_FILE + 1)
            .read_to_string(&mut text)
            .map_err(|error| unavailable(&path, &error))?;
        if text.len() as u64 > MAX_FILE {
            return Err(MeshError::Unavailable(format!(
                "{} is longer than {MAX_FILE} bytes",
                path.display()
            )));
        }
        Ok(Some(text))
    }

    /// Replaces a file at once for all readers. The caller holds the lock.
    pub(super) fn replace(&self, name: &str, content: &str) -> Result<(), MeshError> {
        let path = self.join(name);
        let temporary = path.with_extension("new");
        let write = || {
            let _ = fs::remove_file(&temporary);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content.as_bytes())?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|error| unavailable(&path, &error))
    }
}

/// Opens a file that is only locked, never read.
pub(super) fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

pub(super) fn unavailable(path: &Path, error: &io::Error) -> MeshError {
    MeshError::Unavailable(format!("{}: {error}", path.display()))
}

/// Refuses what another user owns or may use: with the key in it anyone signs any name.
fn private(path: &Path, meta: &fs::Metadata, wanted: u32) -> Result<(), MeshError> {
    let (uid, mode) = (rustix::process::geteuid().as_raw(), meta.mode() & 0o777);
    if meta.uid() != uid || mode & 0o077 != 0 || meta.file_type().is_symlink() {
        return Err(MeshError::Refused(format!(
            "{} is of uid {} with mode {mode:04o}, wanted uid {uid} and {wanted:04o}: chmod it or name another directory",
            path.display(),
            meta.uid()
        )));
    }
    Ok(())
}

//! A sidecar's directory: 0700, files 0600, changed by rename, and gone with the sidecar.
//!
//! Envoy looks at a file again when something is renamed into its directory, and at nothing else (Envoy:
//! `PathConfigSource`). Nothing that is written often, such as a log, may lie there: it would wake Envoy each time.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use ring::digest::{SHA256, digest};

use super::{SidecarError, spec::at};

/// Hexadecimal digits of an id's SHA-256 that name its directory: ids may hold `/`.
const NAME_DIGITS: usize = 32;
/// A file on its way to its name.
const NEW: &str = ".new";

/// The directory's name of the sidecar of this instance.
pub(super) fn dir_name(id: &str) -> String {
    let hash = digest(&SHA256, id.as_bytes());
    let mut name: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    name.truncate(NAME_DIGITS);
    name
}

/// Makes a directory where it is missing, and refuses one that others may enter. Returns its absolute path.
pub(super) fn private_dir(path: &Path) -> Result<PathBuf, SidecarError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(path)(error)),
        _ => {}
    }
    let meta = fs::symlink_metadata(path).map_err(at(path))?;
    let (uid, mode) = (rustix::process::geteuid().as_raw(), meta.mode() & 0o777);
    if !meta.is_dir() || meta.uid() != uid || mode & 0o077 != 0 {
        return Err(at(path)(io::Error::other(format!(
            "of uid {} with mode {mode:04o}, wanted a directory of uid {uid} with 0700: it holds keys",
            meta.uid()
        ))));
    }
    path.canonicalize().map_err(at(path))
}

/// Takes a sidecar's directory away, keys and all.
pub(super) fn remove_dir(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a sidecar's directory could not be removed");
    }
}

/// The files of one sidecar.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    /// SHA-256 of what each holds.
    written: HashMap<&'static str, Vec<u8>>,
}

impl Files {
    pub(super) fn open(dir: &Path) -> Result<Self, SidecarError> {
        Ok(Self {
            dir: private_dir(dir)?,
            written: HashMap::new(),
        })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Replaces a file at once for all readers, unless it holds this already. Tells whether it did.
    pub(super) fn put(&mut self, name: &'static str, content: &[u8]) -> Result<bool, SidecarError> {
        let hash = digest(&SHA256, content).as_ref().to_vec();
        if self.written.get(name) == Some(&hash) {
            return Ok(false);
        }
        let path = self.path(name);
        // By a predecessor of this process.
        if !self.written.contains_key(name) && fs::read(&path).is_ok_and(|is| is == content) {
            self.written.insert(name, hash);
            return Ok(false);
        }
        let temporary = self.path(&format!("{name}{NEW}"));
        let write = || {
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(at(&path))?;
        self.written.insert(name, hash);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_private_and_replaced_only_when_they_change() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a");
        let mut files = Files::open(&dir).unwrap();
        assert!(files.put("leaf.pem", b"one").unwrap());
        let inode = |name: &str| fs::metadata(dir.join(name)).unwrap().ino();
        let first = inode("leaf.pem");
        assert!(!files.put("leaf.pem", b"one").unwrap());
        assert_eq!(inode("leaf.pem"), first);
        // What a killed agent left on its way.
        fs::write(dir.join("leaf.pem.new"), "rubbish").unwrap();
        assert!(files.put("leaf.pem", b"two").unwrap());
        assert_ne!(inode("leaf.pem"), first, "a rename, which is what Envoy sees");
        assert_eq!(fs::read(dir.join("leaf.pem")).unwrap(), b"two");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join("leaf.pem"))), (0o700, 0o600));
        // Another process of the agent goes on where this one was.
        let mut later = Files::open(&dir).unwrap();
        let second = inode("leaf.pem");
        assert!(!later.put("leaf.pem", b"two").unwrap());
        assert_eq!(inode("leaf.pem"), second);
        assert!(later.put("leaf.pem", b"three").unwrap());
        remove_dir(&dir);
        assert!(!dir.exists());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let error = Files::open(temp.path()).unwrap_err().to_string();
        assert!(error.contains("0750") && error.contains("wanted"), "{error}");
        let file = temp.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Files::open(&file).is_err());
    }

    #[test]
    fn any_id_names_a_directory_inside() {
        assert_eq!(dir_name("../../etc").len(), NAME_DIGITS);
        assert!(dir_name("a/b").bytes().all(|b| b.is_ascii_hexdigit()));
        assert_ne!(dir_name("a"), dir_name("b"));
    }
}

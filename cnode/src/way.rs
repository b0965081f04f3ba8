//! The way to a directory: whoever may change a directory on it may put another one in its place.
//!
//! Looking up a path reads one name in each of several directories, and symbolic links add more of them
//! (path_resolution(7)). Each of these directories must keep others from taking the name away: nobody but its owner
//! writes to it, or it has the sticky bit, and the name belongs to us or to root. The owners of the directories
//! themselves are trusted, as they are by everything else that lies there.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

/// Symbolic links that are followed, as many as the kernel does.
const LINKS_MAX: usize = 40;
const STICKY: u32 = 0o1000;

/// Why others could put another directory in the place of the one that was named.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WayError {
    /// Others than its owner may change what lies in a directory on the way.
    #[error("directory {dir} on the way to {path} has mode {mode:04o}, so that others may put another one in its place; chmod go-w or +t {dir}, or name a directory elsewhere", dir = dir.display(), path = path.display())]
    Writable {
        /// The directory on the way.
        dir: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Where the way leads.
        path: PathBuf,
    },
    /// In a directory that all may write, a name on the way belongs to somebody else, who can take it away.
    #[error("{entry} on the way to {path} belongs to uid {owner}, wanted uid {uid} or root; name a directory elsewhere", entry = entry.display(), path = path.display())]
    WrongOwner {
        /// What belongs to somebody else.
        entry: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who asks.
        uid: u32,
        /// Where the way leads.
        path: PathBuf,
    },
    /// A part of the way could not be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The part.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl WayError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

/// Checks every directory that the lookup of this absolute path reads; the last name is one in them.
///
/// # Errors
/// [`WayError`].
pub(crate) fn check_way(path: &Path, uid: u32) -> Result<(), WayError> {
    let mut left = names(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        let read = |path: &Path| fs::symlink_metadata(path).map_err(WayError::io(path));
        let (directory, entry) = (read(&at)?, read(&next)?);
        match step(directory.mode(), entry.uid(), uid) {
            Step::Safe => {}
            Step::Writable => {
                return Err(WayError::Writable {
                    dir: at,
                    mode: directory.mode() & 0o7777,
                    path: path.to_path_buf(),
                });
            }
            Step::WrongOwner => {
                return Err(WayError::WrongOwner {
                    entry: next,
                    owner: entry.uid(),
                    uid,
                    path: path.to_path_buf(),
                });
            }
        }
        if !entry.file_type().is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            let error = io::Error::other(format!("more than {LINKS_MAX} symbolic links"));
            return Err(WayError::io(path)(error));
        }
        let target = fs::read_link(&next).map_err(WayError::io(&next))?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        left.extend(names(&target));
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Safe,
    Writable,
    WrongOwner,
}

/// From a directory of this mode to an entry of this owner.
fn step(mode: u32, owner: u32, uid: u32) -> Step {
    match (mode & 0o022 != 0, mode & STICKY != 0) {
        (false, _) => Step::Safe,
        (true, false) => Step::Writable,
        (true, true) if owner != uid && owner != 0 => Step::WrongOwner,
        (true, true) => Step::Safe,
    }
}

/// The names of a path, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    path.components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn made(path: &Path, mode: u32) -> PathBuf {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_path_buf()
    }

    fn way(path: &Path) -> Result<(), String> {
        check_way(path, rustix::process::geteuid().as_raw()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_parent_that_others_may_write_needs_the_sticky_bit() {
        let temp = tempfile::tempdir().unwrap();
        for (mode, allowed) in [
            (0o755, true),
            (0o1777, true),
            (0o1770, true),
            (0o770, false),
            (0o702, false),
        ] {
            let parent = made(&temp.path().join(format!("{mode:o}")), mode);
            let between = made(&parent.join("between"), 0o700);
            let dir = made(&between.join("agent"), 0o700);
            let seen = way(&dir);
            assert_eq!(seen.is_ok(), allowed, "{mode:o}: {seen:?}");
            if let Err(text) = seen {
                let named = format!("{} ", parent.display());
                assert!(
                    text.contains(&named) && text.contains(&format!("{mode:04o}")),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_name_of_another_user_in_a_shared_directory_is_refused() {
        assert_eq!(step(0o1777, 1000, 1000), Step::Safe);
        assert_eq!(step(0o1777, 0, 1000), Step::Safe);
        assert_eq!(step(0o1777, 1001, 1000), Step::WrongOwner);
        assert_eq!(step(0o1777, 1001, 0), Step::WrongOwner, "root is no exception");
        assert_eq!(step(0o755, 1001, 1000), Step::Safe);
    }

    #[test]
    fn links_are_followed_through_the_directories_they_lead_through() {
        let temp = tempfile::tempdir().unwrap();
        let shared = made(&temp.path().join("shared"), 0o777);
        let dir = made(&shared.join("agent"), 0o700);
        let safe = made(&temp.path().join("safe"), 0o700);
        symlink(&dir, safe.join("absolute")).unwrap();
        symlink("../shared/agent", safe.join("relative")).unwrap();
        symlink("../safe", safe.join("back")).unwrap();
        symlink("loop", safe.join("loop")).unwrap();
        for link in ["absolute", "relative"] {
            let text = way(&safe.join(link)).unwrap_err();
            assert!(
                text.contains("shared on the way") && text.contains("0777"),
                "{text}"
            );
        }
        assert_eq!(way(&safe.join("back/back")), Ok(()));
        assert!(way(&safe.join("loop")).unwrap_err().contains("40 symbolic links"));
        assert!(way(&safe.join("none")).is_err());
    }
}

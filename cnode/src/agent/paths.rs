//! Where an agent lives on disk: the one order in which everybody looks for it, and the check that
//! keeps a client from speaking to somebody else's agent.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::way::{WayError, check_way};

/// Environment variable that names the agent's directory.
pub const DIR_VARIABLE: &str = "MESHX_DIR";
/// Environment variable that names the directory of the embedded mesh.
pub const MESH_DIR_VARIABLE: &str = "MESHX_MESH_DIR";
/// Name of the control socket in the agent's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the dist socket in the agent's directory.
pub const DIST_SOCKET: &str = "dist.sock";
/// Name of the socket in the agent's directory by which another process of it takes over.
pub const TAKEOVER_SOCKET: &str = "takeover.sock";
/// Name of the file in the agent's directory by which names outlive an agent that is killed.
pub const NAMES_FILE: &str = "names.json";
/// Name of the file in the agent's directory that holds the log of an agent in the background.
pub const LOG_FILE: &str = "agent.log";
/// Directory below the agent's in which nodes make the sockets that they listen on.
pub const VM_DIR: &str = "vm";
/// Directory below the agent's for the sockets of services and upstreams.
pub const UP_DIR: &str = "up";
/// Below it: the files of sidecars, for the agent alone.
pub const SIDECAR_DIR: &str = "sidecar";

/// Longest path that a Unix socket can have on Linux: `sun_path` is 108 bytes with the final zero
/// (unix(7)).
pub const SUN_PATH_MAX: usize = 107;
/// Longest file name in [`VM_DIR`] and [`UP_DIR`] that fits any agent directory which passes the check.
pub const SOCKET_NAME_MAX: usize = 40;
/// Longest agent directory: what [`SUN_PATH_MAX`] leaves beside `/vm/` and a socket's name.
pub const DIR_MAX: usize = SUN_PATH_MAX - SOCKET_NAME_MAX - "/vm/".len();

/// Why a directory cannot be an agent's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirError {
    /// It could not be read, made or changed.
    #[error("directory {dir}: {action}: {source}", dir = dir.display())]
    Io {
        /// The directory or the file in it.
        dir: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something else has this name, for example a symbolic link.
    #[error("{} is no directory; name another one with --dir or ${DIR_VARIABLE}", .0.display())]
    NotADirectory(PathBuf),
    /// It belongs to another user, who could answer in the agent's place.
    #[error("directory {dir} belongs to uid {owner}, wanted uid {uid} or root; name another one with --dir or ${DIR_VARIABLE}", dir = dir.display())]
    WrongOwner {
        /// The directory.
        dir: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who asks.
        uid: u32,
    },
    /// Others could put their own sockets there.
    #[error("directory {dir} has mode {mode:04o}, others than its owner may write to it; chmod go-w it or name another one", dir = dir.display())]
    WritableByOthers {
        /// The directory.
        dir: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others could put another directory in its place.
    #[error(transparent)]
    Way(#[from] WayError),
    /// The sockets in it would have names that the system cannot hold.
    #[error("directory {dir} is {len} bytes long, at most {DIR_MAX} leave room for the sockets in it; name a shorter one with --dir or ${DIR_VARIABLE}", dir = dir.display())]
    TooLong {
        /// The directory.
        dir: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// A living agent holds its lock.
    #[error("another agent runs in directory {}; stop it, or name another directory with --dir or ${DIR_VARIABLE}", .0.display())]
    Taken(PathBuf),
}

impl DirError {
    pub(crate) fn io(dir: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let dir = dir.to_path_buf();
        move |source| Self::Io { dir, action, source }
    }
}

/// The agent's directory: what was said explicitly (`--dir`, `-meshx_dir`), `$MESHX_DIR`,
/// `$XDG_RUNTIME_DIR/meshx`, `/tmp/meshx-UID`. An empty variable counts as unset.
pub fn agent_dir(explicit: Option<&Path>) -> PathBuf {
    find_agent_dir(explicit, |name| std::env::var_os(name), uid())
}

/// The embedded mesh's directory: what was said explicitly (`--mesh-dir`), `$MESHX_MESH_DIR`,
/// `$XDG_RUNTIME_DIR/meshx-mesh`, `/tmp/meshx-mesh-UID`. It does not depend on the agent's directory,
/// so that all agents of one user meet in the same mesh.
pub fn mesh_dir(explicit: Option<&Path>) -> PathBuf {
    find_mesh_dir(explicit, |name| std::env::var_os(name), uid())
}

/// Where private agents have their directories: `$XDG_RUNTIME_DIR`, `/tmp`.
pub fn private_base() -> PathBuf {
    find_private_base(|name| std::env::var_os(name))
}

/// Whether this process was told where its agent is, so that none is started for it.
pub fn is_configured(explicit: Option<&Path>) -> bool {
    explicit.is_some() || std::env::var_os(DIR_VARIABLE).is_some_and(|value| !value.is_empty())
}

/// The directory, made absolute, after the check that every client owes itself: it is a directory
/// (no symbolic link) of this user or of root, nobody else may write to it, and nobody else may put another one
/// in its place: a directory on the way that a group or others may write has the sticky bit. The one exception is
/// a system agent's: owned by root, mode `0770`, whose group is meant to.
///
/// # Errors
/// [`DirError`], also when there is no such directory.
pub fn checked_client_dir(dir: &Path) -> Result<PathBuf, DirError> {
    let dir = std::path::absolute(dir).map_err(DirError::io(dir, "make it absolute"))?;
    let metadata = fs::symlink_metadata(&dir).map_err(DirError::io(&dir, "read"))?;
    if !metadata.is_dir() {
        return Err(DirError::NotADirectory(dir));
    }
    check_owner(&dir, metadata.uid(), metadata.mode(), uid())?;
    check_length(&dir)?;
    check_way(&dir, uid())?;
    Ok(dir)
}

/// The effective user id of this process.
pub fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

pub(crate) fn check_owner(dir: &Path, owner: u32, mode: u32, uid: u32) -> Result<(), DirError> {
    if owner != uid && owner != 0 {
        return Err(DirError::WrongOwner {
            dir: dir.to_path_buf(),
            owner,
            uid,
        });
    }
    let system_agent = owner == 0 && mode & 0o777 == 0o770;
    if mode & 0o022 != 0 && !system_agent {
        return Err(DirError::WritableByOthers {
            dir: dir.to_path_buf(),
            mode: mode & 0o7777,
        });
    }
    Ok(())
}

pub(crate) fn check_length(dir: &Path) -> Result<(), DirError> {
    let len = dir.as_os_str().len();
    if len > DIR_MAX {
        return Err(DirError::TooLong {
            dir: dir.to_path_buf(),
            len,
        });
    }
    Ok(())
}

fn find_agent_dir(explicit: Option<&Path>, var: impl Fn(&str) -> Option<OsString>, uid: u32) -> PathBuf {
    first(explicit, &var, DIR_VARIABLE, "meshx").unwrap_or_else(|| format!("/tmp/meshx-{uid}").into())
}

fn find_mesh_dir(explicit: Option<&Path>, var: impl Fn(&str) -> Option<OsString>, uid: u32) -> PathBuf {
    first(explicit, &var, MESH_DIR_VARIABLE, "meshx-mesh")
        .unwrap_or_else(|| format!("/tmp/meshx-mesh-{uid}").into())
}

fn find_private_base(var: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let runtime_dir = var("XDG_RUNTIME_DIR").filter(|value| !value.is_empty());
    runtime_dir.map_or_else(|| "/tmp".into(), PathBuf::from)
}

fn first(
    explicit: Option<&Path>,
    var: &impl Fn(&str) -> Option<OsString>,
    variable: &str,
    below_runtime_dir: &str,
) -> Option<PathBuf> {
    let set = |name: &str| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    explicit
        .map(Path::to_path_buf)
        .or_else(|| set(variable))
        .or_else(|| set("XDG_RUNTIME_DIR").map(|dir| dir.join(below_runtime_dir)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn vars<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        move |name| {
            set.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.into())
        }
    }

    #[test]
    fn the_order_is_option_variable_runtime_directory_tmp() {
        let all = [("MESHX_DIR", "/a"), ("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(
            find_agent_dir(Some(Path::new("/x")), vars(&all), 7),
            Path::new("/x")
        );
        assert_eq!(find_agent_dir(None, vars(&all), 7), Path::new("/a"));
        assert_eq!(
            find_agent_dir(None, vars(&all[1..]), 7),
            Path::new("/run/user/7/meshx")
        );
        assert_eq!(
            find_agent_dir(None, vars(&[("MESHX_DIR", "")]), 7),
            Path::new("/tmp/meshx-7")
        );
        assert_eq!(
            find_mesh_dir(None, vars(&all), 7),
            Path::new("/run/user/7/meshx-mesh")
        );
        assert_eq!(find_mesh_dir(None, vars(&[]), 7), Path::new("/tmp/meshx-mesh-7"));
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        let dir = Path::new("/d");
        assert!(check_owner(dir, 1000, 0o700, 1000).is_ok());
        assert!(check_owner(dir, 0, 0o755, 1000).is_ok());
        let error = check_owner(dir, 1001, 0o700, 1000).unwrap_err().to_string();
        assert!(
            error.contains("uid 1001") && error.contains("wanted uid 1000"),
            "{error}"
        );
        assert!(check_owner(dir, 1001, 0o700, 0).is_err(), "root is no exception");
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let dir = Path::new("/d");
        for mode in [0o770, 0o702, 0o1777] {
            let error = check_owner(dir, 1000, mode, 1000).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:04o}")), "{error}");
        }
        assert!(check_owner(dir, 0, 0o770, 1000).is_ok(), "a system agent's group");
        assert!(check_owner(dir, 0, 0o777, 1000).is_err());
    }

    #[test]
    fn links_and_long_names_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(checked_client_dir(temp.path()).is_ok());
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(temp.path(), &link).unwrap();
        assert!(matches!(
            checked_client_dir(&link),
            Err(DirError::NotADirectory(_))
        ));
        assert!(matches!(
            checked_client_dir(&temp.path().join("none")),
            Err(DirError::Io { .. })
        ));
        let long = temp.path().join("x".repeat(DIR_MAX));
        fs::create_dir(&long).unwrap();
        let error = checked_client_dir(&long).unwrap_err().to_string();
        assert!(error.contains("at most 63"), "{error}");
    }
}

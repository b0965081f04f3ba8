//! The agent's own directory: made, locked, swept and taken away again.
//!
//! The lock (`agent.lock`, flock) alone decides whether an agent lives here. Sockets that lie about
//! without it are what a killed agent left, and are replaced.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::fd::OwnedFd,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, Gid, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
};
use tracing::{debug, warn};

use super::paths::{
    self, CONTROL_SOCKET, DIST_SOCKET, DirError, NAMES_FILE, SIDECAR_DIR, TAKEOVER_SOCKET, UP_DIR, VM_DIR,
};

const LOCK: &str = "agent.lock";
/// A younger socket is left alone by [`AgentDir::sweep`]: its owner may be between making the file and
/// being listed by the kernel.
const SWEEP_AGE: Duration = Duration::from_millis(100);

/// Who may open the agent's sockets. The directories follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Permission bits of `control.sock` and `dist.sock`; to connect takes the write bit (unix(7)).
    pub socket_mode: u32,
    /// Group of the sockets and directories, when it is not the agent's own.
    pub group: Option<u32>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            socket_mode: 0o600,
            group: None,
        }
    }
}

impl Access {
    /// Mode of the agent's directory: those who may open the sockets may pass through, none may write.
    fn dir_mode(self) -> u32 {
        match (self.socket_mode & 0o020 != 0, self.socket_mode & 0o002 != 0) {
            (_, true) => 0o755,
            (true, false) => 0o750,
            (false, false) => 0o700,
        }
    }

    /// Mode of `vm/` and `up/`, where clients make sockets: sticky, so that none can take another's away.
    fn shared_mode(self) -> u32 {
        match (self.socket_mode & 0o020 != 0, self.socket_mode & 0o002 != 0) {
            (_, true) => 0o1777,
            (true, false) => 0o1770,
            (false, false) => 0o700,
        }
    }
}

/// A locked agent directory.
#[derive(Debug)]
pub struct AgentDir {
    path: PathBuf,
    access: Access,
    made: bool,
    /// Held as long as this agent lives; none once a successor of this process has the directory.
    lock: Mutex<Option<File>>,
    /// Held on the directory itself, shared: whoever cleans temporary directories by age leaves what lies in a
    /// locked one (systemd-tmpfiles(8)).
    _occupied: File,
}

impl AgentDir {
    /// Makes the directory where it is missing, checks it, takes its lock, and removes what a killed
    /// agent left there.
    ///
    /// # Errors
    /// [`DirError`]; [`DirError::Taken`] when a living agent holds the lock.
    pub fn open(path: &Path, access: Access) -> Result<Self, DirError> {
        let path = std::path::absolute(path).map_err(DirError::io(path, "make it absolute"))?;
        paths::check_length(&path)?;
        let made = make_dir(&path)?;
        paths::checked_client_dir(&path)?;
        let path = path.canonicalize().map_err(DirError::io(&path, "resolve"))?;
        paths::check_length(&path)?;
        let lock = take_lock(&path)?;
        let dir = Self::locked(path, access, made, lock)?;
        // Only now: a second agent must not change a living one's directory.
        let owner = fs::symlink_metadata(&dir.path)
            .map_err(DirError::io(&dir.path, "read"))?
            .uid();
        if owner == paths::uid() {
            dir.restrict(&dir.path, access.dir_mode())?;
        }
        for name in [VM_DIR, UP_DIR] {
            let path = dir.path.join(name);
            make_dir(&path)?;
            let metadata = fs::symlink_metadata(&path).map_err(DirError::io(&path, "read"))?;
            if !metadata.is_dir() {
                return Err(DirError::NotADirectory(path));
            }
            if metadata.uid() != paths::uid() {
                return Err(DirError::WrongOwner {
                    dir: path,
                    owner: metadata.uid(),
                    uid: paths::uid(),
                });
            }
            dir.restrict(&path, access.shared_mode())?;
        }
        for name in [CONTROL_SOCKET, DIST_SOCKET, TAKEOVER_SOCKET] {
            remove_socket(&dir.path.join(name))?;
        }
        dir.sweep();
        Ok(dir)
    }

    /// The directory of a predecessor of this process, which hands over its lock and whether it has `made` the
    /// directory. Everything in it stays.
    ///
    /// # Errors
    /// [`DirError`].
    pub fn take_over(path: &Path, access: Access, made: bool, lock: OwnedFd) -> Result<Self, DirError> {
        let path = paths::checked_client_dir(path)?;
        let path = path.canonicalize().map_err(DirError::io(&path, "resolve"))?;
        Self::locked(path, access, made, lock.into())
    }

    fn locked(path: PathBuf, access: Access, made: bool, lock: File) -> Result<Self, DirError> {
        let occupied = File::open(&path).map_err(DirError::io(&path, "open"))?;
        flock(&occupied, FlockOperation::NonBlockingLockShared)
            .map_err(|error| DirError::io(&path, "lock")(error.into()))?;
        Ok(Self {
            path,
            access,
            made,
            lock: Mutex::new(Some(lock)),
            _occupied: occupied,
        })
    }

    /// Its lock, for a successor of this process, and whether the directory was made by this agent.
    ///
    /// # Errors
    /// What the system said.
    pub fn handed(&self) -> io::Result<(OwnedFd, bool)> {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = lock
            .as_ref()
            .ok_or_else(|| io::Error::other("the directory is handed over"))?;
        Ok((lock.try_clone()?.into(), self.made))
    }

    /// A successor of this process has it: nothing in it is this process's any more.
    pub fn hand_over(&self) {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The directory itself, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where nodes make the sockets that they listen on.
    pub fn vm(&self) -> PathBuf {
        self.path.join(VM_DIR)
    }

    /// Where the sockets of services and upstreams are.
    pub fn up(&self) -> PathBuf {
        self.path.join(UP_DIR)
    }

    /// Where the files of sidecars lie.
    pub fn sidecars(&self) -> PathBuf {
        self.path.join(SIDECAR_DIR)
    }

    /// The file by which names outlive an agent that is killed.
    pub fn names(&self) -> PathBuf {
        self.path.join(NAMES_FILE)
    }

    /// The dist socket's path.
    pub fn dist_socket(&self) -> PathBuf {
        self.path.join(DIST_SOCKET)
    }

    /// Who may open its sockets.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Makes one of the agent's own sockets and listens on it.
    ///
    /// # Errors
    /// [`DirError::Io`].
    pub fn bind(&self, name: &str) -> Result<UnixListener, DirError> {
        let path = self.path.join(name);
        let listener = UnixListener::bind(&path).map_err(DirError::io(&path, "listen"))?;
        listener
            .set_nonblocking(true)
            .map_err(DirError::io(&path, "listen"))?;
        // Whoever takes over gets every client's connection: that is for the agent's own user.
        let mode = match name {
            TAKEOVER_SOCKET => 0o600,
            _ => self.access.socket_mode,
        };
        self.restrict(&path, mode)?;
        Ok(listener)
    }

    /// Gives a socket that the agent made the mode and group of its sockets.
    ///
    /// # Errors
    /// [`DirError::Io`].
    pub fn open_to_clients(&self, socket: &Path) -> Result<(), DirError> {
        self.restrict(socket, self.access.socket_mode)
    }

    /// Removes the sockets in `vm/` and `up/` that no process holds any more. Nobody else would: a VM that
    /// was killed cannot. Those of living nodes stay, also when the agent ends: they register again with
    /// the next one.
    pub fn sweep(&self) {
        // List first, ask the kernel afterwards: a socket made in between is then known to it.
        let listed: Vec<PathBuf> = [self.vm(), self.up()]
            .iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flat_map(|entries| entries.flatten())
            .map(|entry| entry.path())
            .filter(|path| is_old_socket(path))
            .collect();
        if listed.is_empty() {
            return;
        }
        match fs::read("/proc/net/unix") {
            Ok(table) => remove_dead(&listed, &bound_paths(&table)),
            Err(error) => debug!(%error, "cannot tell which sockets are held, none removed"),
        }
    }

    /// Takes away what this agent put there. Directories stay when somebody's sockets are still in them.
    pub fn remove(&self) {
        if self.lock.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return;
        }
        self.sweep();
        for name in [CONTROL_SOCKET, DIST_SOCKET, TAKEOVER_SOCKET, NAMES_FILE, LOCK] {
            let path = self.path.join(name);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                warn!(path = %path.display(), %error, "could not be removed");
            }
        }
        let _ = fs::remove_dir(self.vm());
        let _ = fs::remove_dir(self.up());
        let _ = fs::remove_dir(self.sidecars());
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }

    fn restrict(&self, path: &Path, mode: u32) -> Result<(), DirError> {
        if let Some(group) = self.access.group {
            rustix::fs::chown(path, None, Some(Gid::from_raw(group)))
                .map_err(|error| DirError::io(path, "set its group")(error.into()))?;
        }
        let present = fs::symlink_metadata(path)
            .map_err(DirError::io(path, "read"))?
            .mode()
            & 0o7777;
        if present == mode {
            return Ok(());
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(DirError::io(path, "set its mode"))
    }
}

/// `true` when it was not there before.
fn make_dir(path: &Path) -> Result<bool, DirError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(DirError::io(path, "make")(error)),
    }
}

fn take_lock(dir: &Path) -> Result<File, DirError> {
    let path = dir.join(LOCK);
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(DirError::io(&path, "open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DirError::Taken(dir.to_path_buf())),
            Err(error) => return Err(DirError::io(&path, "lock")(error.into())),
        }
        // An agent that ends removes its lock file: a lock on a file without a name keeps nobody out.
        let held = file.metadata().map_err(DirError::io(&path, "read"))?;
        match fs::symlink_metadata(&path) {
            Ok(named) if named.ino() == held.ino() && named.dev() == held.dev() => return Ok(file),
            _ => continue,
        }
    }
}

fn remove_socket(path: &Path) -> Result<(), DirError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            fs::remove_file(path).map_err(DirError::io(path, "remove"))
        }
        Ok(_) => Err(DirError::io(path, "replace")(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "it is no socket",
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(DirError::io(path, "read")(error)),
    }
}

fn is_old_socket(path: &Path) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return false;
    };
    let age = metadata
        .modified()
        .ok()
        .and_then(|at| SystemTime::now().duration_since(at).ok());
    metadata.file_type().is_socket() && age.is_some_and(|age| age >= SWEEP_AGE)
}

fn remove_dead(sockets: &[PathBuf], held: &HashSet<Vec<u8>>) {
    for path in sockets {
        if !held.contains(path.as_os_str().as_bytes()) && !is_answered(path) {
            debug!(path = %path.display(), "removed a socket that no process holds");
            let _ = fs::remove_file(path);
        }
    }
}

/// The kernel's table shows one network namespace, and a node in a container may have another: only a socket
/// that refuses has nobody behind it. Whoever listens sees a connection without a frame. Never waits.
fn is_answered(path: &Path) -> bool {
    let connect = || {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)
    };
    !matches!(connect(), Err(Errno::CONNREFUSED | Errno::NOENT))
}

/// Paths in the kernel's table of Unix sockets: the eighth column, when there is one (proc(5)).
fn bound_paths(table: &[u8]) -> HashSet<Vec<u8>> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let start = line.iter().position(|byte| *byte == b'/')?;
            Some(line[start..].to_vec())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn it_is_private_unless_the_sockets_are_shared() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent");
        let dir = AgentDir::open(&path, Access::default()).unwrap();
        let _listener = dir.bind(CONTROL_SOCKET).unwrap();
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&dir.vm()), 0o700);
        assert_eq!(mode(&path.join(CONTROL_SOCKET)), 0o600);
        dir.remove();
        drop(dir);
        assert!(!path.exists());

        let shared = Access {
            socket_mode: 0o660,
            group: None,
        };
        let dir = AgentDir::open(&path, shared).unwrap();
        assert_eq!(
            (mode(&path), mode(&dir.vm()), mode(&dir.up())),
            (0o750, 0o1770, 0o1770)
        );
        assert!(paths::checked_client_dir(&path).is_ok());
    }

    #[test]
    fn one_agent_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent");
        let first = AgentDir::open(&path, Access::default()).unwrap();
        let error = AgentDir::open(&path, Access::default()).unwrap_err();
        assert!(matches!(error, DirError::Taken(_)), "{error}");
        first.remove();
        drop(first);
        AgentDir::open(&path, Access::default()).unwrap();
    }

    #[test]
    fn the_directory_is_locked_against_those_who_clean_by_age() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent");
        let agent = AgentDir::open(&path, Access::default()).unwrap();
        let dir = File::open(&path).unwrap();
        assert!(flock(&dir, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(agent);
        flock(&dir, FlockOperation::NonBlockingLockExclusive).unwrap();
    }

    #[test]
    fn what_a_killed_agent_left_is_replaced_and_living_sockets_stay() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent");
        let dir = AgentDir::open(&path, Access::default()).unwrap();
        let old = SystemTime::now() - Duration::from_secs(60);
        let alive_path = dir.vm().join("alive");
        let dead_path = dir.vm().join("dead");
        let alive = UnixListener::bind(&alive_path).unwrap();
        drop(UnixListener::bind(&dead_path).unwrap());
        drop(dir.bind(CONTROL_SOCKET).unwrap());
        for path in [&alive_path, &dead_path] {
            // A socket cannot be opened, so its time is set through its path.
            let stamp = rustix::fs::Timespec {
                tv_sec: old.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64,
                tv_nsec: 0,
            };
            let times = rustix::fs::Timestamps {
                last_access: stamp,
                last_modification: stamp,
            };
            rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
        }
        drop(dir); // Killed: nothing was removed.

        let dir = AgentDir::open(&path, Access::default()).unwrap();
        assert!(alive_path.exists());
        assert!(!dead_path.exists());
        dir.bind(CONTROL_SOCKET).unwrap();
        drop(alive);
    }

    #[test]
    fn a_socket_that_another_network_namespace_holds_stays() {
        let temp = tempfile::tempdir().unwrap();
        let (alive, full, dead) = (
            temp.path().join("alive"),
            temp.path().join("full"),
            temp.path().join("dead"),
        );
        let _alive = UnixListener::bind(&alive).unwrap();
        let listener = UnixListener::bind(&full).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting = std::os::unix::net::UnixStream::connect(&full).unwrap();
        drop(UnixListener::bind(&dead).unwrap());
        // There the kernel's table does not name it.
        remove_dead(&[alive.clone(), full.clone(), dead.clone()], &HashSet::new());
        assert!(alive.exists() && full.exists() && !dead.exists());
    }

    #[test]
    fn a_file_in_a_sockets_place_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(temp.path().join(CONTROL_SOCKET), "letters").unwrap();
        let error = AgentDir::open(temp.path(), Access::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("it is no socket"), "{error}");
        assert!(temp.path().join(CONTROL_SOCKET).exists());
    }

    #[test]
    fn the_kernels_table_is_read() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000: 00000002 00000000 00010000 0001 01 1 /a dir/vm/x\n0000: 00000003 00000000 0 1 03 2\n\
            0000: 2 0 0 1 1 3 @abstract\n";
        assert_eq!(bound_paths(table), HashSet::from([b"/a dir/vm/x".to_vec()]));
    }
}

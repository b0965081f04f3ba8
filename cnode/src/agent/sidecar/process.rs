//! One run of a sidecar's program: its process group, the guard that leads it, and its end.
//!
//! The guard is a shell that waits for its standard input to end. The agent alone holds the other end of that pipe, so
//! it ends when the agent does, SIGKILL included, and then the guard kills the group. Unlike a parent-death signal this
//! also reaches the program's own children, and does not depend on which thread started it. The program joins the
//! guard's group when it is started, so there is no moment without a guard.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    process::{Child, ChildStdin, Command},
    task::JoinSet,
    time::timeout,
};

use super::{SidecarError, Stream, orphans, output};

const SHELL: &str = "/bin/sh";
/// The group's other members get their signals; the guard stays until it is killed.
const GUARD: &str = "trap '' HUP INT TERM; read -r _; kill -s KILL 0";
/// How long what was printed last may take to be read after the end: a process that left the group may hold the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A program, ready to be started any number of times.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// All of its environment but the mark. May hold a token: never shown.
    pub(super) environment: Environment,
}

/// Variables; `Debug` shows only their names.
#[derive(Clone, Default)]
pub(super) struct Environment(pub(super) Vec<(OsString, OsString)>);

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

/// A running program. Dropped, its whole group is killed.
#[derive(Debug)]
pub(super) struct Run {
    child: Child,
    /// Reaped only when this is dropped, so that the group's number stays its own.
    _guard: Child,
    _alive: Option<ChildStdin>,
    group: Pid,
    readers: JoinSet<()>,
    dir: PathBuf,
}

impl Run {
    /// Starts it; `dir` is the sidecar's directory, which marks its processes.
    pub(super) fn start(program: &Program, dir: &Path, sink: &output::Sink) -> Result<Self, SidecarError> {
        let mut guard = Command::new(SHELL)
            .args(["-c", GUARD])
            .env_clear()
            .env(orphans::MARK, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(started(Path::new(SHELL)))?;
        let group = pid(&guard)?;
        let alive = guard.stdin.take();
        let child = Command::new(&program.path)
            .args(&program.arguments)
            .env_clear()
            .envs(program.environment.0.iter().map(|(name, value)| (name, value)))
            .env(orphans::MARK, dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(group.as_raw_pid())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                let _ = kill_process_group(group, Signal::KILL);
                return Err(started(&program.path)(error));
            }
        };
        let mut readers = JoinSet::new();
        if let Some(out) = child.stdout.take() {
            readers.spawn(output::pump(out, Stream::Stdout, sink.clone()));
        }
        if let Some(err) = child.stderr.take() {
            readers.spawn(output::pump(err, Stream::Stderr, sink.clone()));
        }
        let run = Self {
            child,
            _guard: guard,
            _alive: alive,
            group,
            readers,
            dir: dir.to_owned(),
        };
        orphans::record(dir, &[group, pid(&run.child)?])?;
        Ok(run)
    }

    /// Waits for the program's end and takes the rest of its group along. May be called again when it was given up
    /// before it was done.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        self.clear().await;
        Ok(status)
    }

    /// SIGTERM to the group, SIGKILL to what is left of it when the program has ended or the grace is over.
    pub(super) async fn stop(mut self, grace: Duration) {
        let _ = kill_process_group(self.group, Signal::TERM);
        if timeout(grace, self.child.wait()).await.is_err() {
            tracing::debug!(dir = %self.dir.display(), "a sidecar did not end in its grace and is killed");
        }
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait().await;
        self.clear().await;
    }

    /// Tells the program that its files are new, if it listens for that: by default SIGHUP would end it.
    pub(super) fn reload(&self) {
        let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) else {
            return;
        };
        if fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid()))
            .is_ok_and(|status| catches(&status, Signal::HUP))
        {
            let _ = kill_process(pid, Signal::HUP);
        }
    }

    async fn clear(&mut self) {
        let _ = kill_process_group(self.group, Signal::KILL);
        let dir = self.dir.clone();
        let _ = tokio::task::spawn_blocking(move || orphans::end_marked(&dir)).await;
        if timeout(LAST_WORDS, async {
            while self.readers.join_next().await.is_some() {}
        })
        .await
        .is_err()
        {
            self.readers.abort_all();
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = kill_process_group(self.group, Signal::KILL);
    }
}

fn pid(child: &Child) -> Result<Pid, SidecarError> {
    child
        .id()
        .and_then(|id| Pid::from_raw(id as i32))
        .ok_or_else(|| started(Path::new(SHELL))(io::Error::other("it ended at once")))
}

fn started(program: &Path) -> impl Fn(io::Error) -> SidecarError + '_ {
    move |source| SidecarError::System {
        what: format!("start {}", program.display()),
        source,
    }
}

/// Whether a process has a handler for a signal (proc(5), `SigCgt`: bit N-1 in hexadecimal).
fn catches(status: &str, signal: Signal) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_is_seen_in_the_mask() {
        let status = "Name:\tx\nSigIgn:\t0000000000000001\nSigCgt:\t0000000000004002\n";
        assert!(
            !catches(status, Signal::HUP) && catches(status, Signal::INT) && catches(status, Signal::TERM)
        );
        assert!(catches("SigCgt:\t0000000000000001", Signal::HUP));
        assert!(!catches("", Signal::HUP) && !catches("SigCgt:\tno", Signal::HUP));
    }

    #[test]
    fn the_environment_is_not_shown() {
        let environment = Environment(vec![("CONSUL_HTTP_TOKEN".into(), "s3cret".into())]);
        assert_eq!(format!("{environment:?}"), "[\"CONSUL_HTTP_TOKEN\"]");
    }
}

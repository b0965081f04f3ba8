//! One run of a sidecar's program: its process group, the guard that leads it, and its end.
//!
//! The guard is a shell that waits for its standard input to end. The agent alone holds the other end of that pipe, so
//! it ends when the agent does, SIGKILL included, and then the guard kills the group. Unlike a parent-death signal this
//! also reaches the program's own children, and does not depend on which thread started it. The program joins the
//! guard's group when it is started, so there is no moment without a guard.
//!
//! A successor of this process gets handles of both (pidfd_open(2)), the pipe and the program's output (`handed`). It is
//! not their parent: it learns that the program has ended, not how.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::{
    net::unix::pipe,
    process::{Child, Command},
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Program {
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// All of its environment but the mark. May hold a token: never shown.
    pub(super) environment: Environment,
}

/// Variables; `Debug` shows only their names.
#[derive(Clone, Default, Serialize, Deserialize)]
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
    child: Watched,
    /// A child of this process is reaped only when this is dropped, so that the group's number stays its own.
    guard: Watched,
    alive: OwnedFd,
    group: Pid,
    /// What the readers read, for a successor.
    output: [OwnedFd; 2],
    readers: JoinSet<()>,
    dir: PathBuf,
    /// A successor has it.
    left: bool,
}

/// A process, and how it is waited for.
#[derive(Debug)]
enum Watched {
    /// Our child.
    Own(Child),
    /// Another one's: its number, and its handle.
    Handed(Pid, pipe::Receiver),
}

/// Numbers of the guard, whose group it is, and of the program.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct HandedRun {
    group: i32,
    child: i32,
}

/// Open files that go with a [`HandedRun`].
pub(in crate::agent) const RUN_FILES: usize = 5;

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
        let broken = |error| {
            let _ = kill_process_group(group, Signal::KILL);
            started(Path::new(SHELL))(error)
        };
        let alive = guard
            .stdin
            .take()
            .ok_or_else(|| io::Error::other("it has no input"));
        let alive = alive.and_then(|alive| alive.into_owned_fd()).map_err(broken)?;
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
        let number = pid(&child)?;
        let mut output = || {
            let out = child
                .stdout
                .take()
                .ok_or_else(|| io::Error::other("it has no output"))?;
            let err = child
                .stderr
                .take()
                .ok_or_else(|| io::Error::other("it has no output"))?;
            Ok([out.into_owned_fd()?, err.into_owned_fd()?])
        };
        let output = output().map_err(broken)?;
        let readers = read(&output, sink).map_err(broken)?;
        let run = Self {
            child: Watched::Own(child),
            guard: Watched::Own(guard),
            alive,
            group,
            output,
            readers,
            dir: dir.to_owned(),
            left: false,
        };
        orphans::record(dir, &[group, number])?;
        Ok(run)
    }

    /// What a successor needs to know of it, which nobody may wait for meanwhile.
    ///
    /// # Errors
    /// When the program has ended, or there are no descriptors left.
    pub(super) fn handed(&self) -> io::Result<(HandedRun, Vec<OwnedFd>)> {
        let handed = HandedRun {
            group: self.group.as_raw_pid(),
            child: self.child.pid()?.as_raw_pid(),
        };
        let files = vec![
            self.child.handle()?,
            self.guard.handle()?,
            self.alive.try_clone()?,
            self.output[0].try_clone()?,
            self.output[1].try_clone()?,
        ];
        Ok((handed, files))
    }

    /// The run of a predecessor.
    ///
    /// # Errors
    /// When that is none.
    pub(super) fn resume(
        handed: HandedRun,
        files: Vec<OwnedFd>,
        dir: &Path,
        sink: &output::Sink,
    ) -> io::Result<Self> {
        let none = || io::Error::other("what was handed over is no run of a program");
        let [child, guard, alive, out, err] = <[OwnedFd; RUN_FILES]>::try_from(files).map_err(|_| none())?;
        let number = |raw| Pid::from_raw(raw).ok_or_else(none);
        let (group, program) = (number(handed.group)?, number(handed.child)?);
        let output = [out, err];
        // A handle becomes readable as a pipe does, and is polled like one.
        let watch = pipe::Receiver::from_owned_fd_unchecked;
        Ok(Self {
            child: Watched::Handed(program, watch(child)?),
            guard: Watched::Handed(group, watch(guard)?),
            alive,
            group,
            readers: read(&output, sink)?,
            output,
            dir: dir.to_owned(),
            left: false,
        })
    }

    /// A successor has it: nothing of it ends with this process.
    pub(super) fn leave(mut self) {
        self.left = true;
    }

    /// Waits for the program's end, and says how it was; the rest of its group is to be [cleared](Self::clear). May be
    /// called again when it was given up before it was done.
    pub(super) async fn ended(&mut self) -> io::Result<String> {
        let how = self.child.ended().await?;
        Ok(how.map_or_else(
            || "an earlier process of this agent had started it and alone could see how".to_owned(),
            |status| status.to_string(),
        ))
    }

    /// SIGTERM to the group, SIGKILL to what is left of it when the program has ended or the grace is over.
    pub(super) async fn stop(mut self, grace: Duration) {
        self.signal(Signal::TERM);
        if timeout(grace, self.child.ended()).await.is_err() {
            tracing::debug!(dir = %self.dir.display(), "a sidecar did not end in its grace and is killed");
        }
        self.signal(Signal::KILL);
        let _ = self.child.ended().await;
        self.clear().await;
    }

    /// Tells the program that its files are new, if it listens for that: by default SIGHUP would end it.
    pub(super) fn reload(&self) {
        // The handle first: it stays that of the process whose status is read next.
        let (Ok(pid), Ok(handle)) = (self.child.pid(), self.child.handle()) else {
            return;
        };
        if fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid()))
            .is_ok_and(|status| catches(&status, Signal::HUP))
        {
            let _ = pidfd_send_signal(&handle, Signal::HUP);
        }
    }

    /// To the whole group, as long as its number is its own: its guard is there, be it as a zombie.
    fn signal(&self, signal: Signal) {
        let own = match &self.guard {
            Watched::Own(_) => true,
            // To one that does not stop this says nothing.
            Watched::Handed(_, handle) => pidfd_send_signal(handle, Signal::CONT).is_ok(),
        };
        if own {
            let _ = kill_process_group(self.group, signal);
        }
    }

    /// Takes what is left of its group along, and reads what was printed last.
    pub(super) async fn clear(&mut self) {
        self.signal(Signal::KILL);
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
        if !self.left {
            self.signal(Signal::KILL);
        }
    }
}

impl Watched {
    fn pid(&self) -> io::Result<Pid> {
        let pid = match self {
            Self::Own(child) => child.id().and_then(|id| Pid::from_raw(id as i32)),
            Self::Handed(pid, _) => Some(*pid),
        };
        pid.ok_or_else(|| io::Error::other("it has ended"))
    }

    /// As long as a child is not waited for its number is its own.
    fn handle(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Own(_) => Ok(pidfd_open(self.pid()?, PidfdFlags::empty())?),
            Self::Handed(_, handle) => handle.as_fd().try_clone_to_owned(),
        }
    }

    /// Waits for its end; none when only its parent is told how it was.
    async fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Own(child) => child.wait().await.map(Some),
            Self::Handed(_, handle) => {
                // Nothing is ever read: it stays so.
                handle.readable().await?;
                Ok(None)
            }
        }
    }
}

/// Reads what the program prints; the pipes stay open for a successor.
fn read(output: &[OwnedFd; 2], sink: &output::Sink) -> io::Result<JoinSet<()>> {
    let mut readers = JoinSet::new();
    for (pipe, stream) in output.iter().zip([Stream::Stdout, Stream::Stderr]) {
        let pipe = pipe::Receiver::from_owned_fd(pipe.try_clone()?)?;
        readers.spawn(output::pump(pipe, stream, sink.clone()));
    }
    Ok(readers)
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

//! One child process whose output is read as it comes and which never outlives its owner.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::{Context, Result};

/// Process groups that were started and not yet reaped, for [`kill_all`].
static STARTED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills everything that is still running: the way out after Ctrl-C.
pub fn kill_all() {
    for group in locked(&STARTED).drain(..) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}

/// A running child, its standard output as lines, and all that it said.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    group: Pid,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts `program` with `arguments`; `prepare` may set the environment and directory.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start<A: AsRef<std::ffi::OsStr>>(
        name: &str,
        program: impl AsRef<std::ffi::OsStr>,
        arguments: impl IntoIterator<Item = A>,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments);
        for inherited in [
            "ERL_FLAGS",
            "ERL_AFLAGS",
            "ERL_ZFLAGS",
            "ERL_LIBS",
            "MESHX_DIR",
            "MIX_ENV",
        ] {
            command.env_remove(inherited);
        }
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CONSUL_") {
                command.env_remove(name);
            }
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        prepare(&mut command);
        let mut child = command.spawn().context(format_args!("start {name}"))?;
        let group = Pid::from_child(&child);
        locked(&STARTED).push(group);

        let log = Arc::new(Mutex::new(Vec::new()));
        let (sender, lines) = channel();
        let mut readers = Vec::new();
        if let Some(out) = child.stdout.take() {
            let log = log.clone();
            readers.push(read_lines(out, move |line| {
                locked(&log).push(line.clone());
                let _ = sender.send(line);
            }));
        }
        if let Some(err) = child.stderr.take() {
            let log = log.clone();
            readers.push(read_lines(err, move |line| locked(&log).push(line)));
        }
        Ok(Self {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            child,
            group,
            lines,
            log,
            readers,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes one line to its standard input.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn write_line(&mut self, line: &str) -> Result<()> {
        self.write(format!("{line}\n").as_bytes())
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or("its standard input is closed")?;
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .map_err(|e| format!("{}: write to it: {e}\n{}", self.name, self.tail()))
    }

    /// The next line of its standard output for which `pick` gives a value.
    ///
    /// # Errors
    /// When none came within `timeout`, or the process ended: the text has its last output.
    pub fn wait_for<T>(&mut self, timeout: Duration, mut pick: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(value) = pick(&line) {
                        return Ok(value);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!(
                        "{}: no such line within {timeout:?}\n{}",
                        self.name,
                        self.tail()
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    // What it said last is still to be read.
                    self.kill();
                    return Err(format!("{}: it ended\n{}", self.name, self.tail()));
                }
            }
        }
    }

    /// All that it printed so far, standard output and error.
    pub fn log(&self) -> String {
        locked(&self.log).join("\n")
    }

    /// Waits until its output holds `text`.
    ///
    /// # Errors
    /// When it does not within `timeout`.
    pub fn wait_log(&self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_log_count(text, 1, timeout)
    }

    /// Waits until its output holds `text` at least so many times.
    ///
    /// # Errors
    /// When it does not within `timeout`.
    pub fn wait_log_count(&self, text: &str, count: usize, timeout: Duration) -> Result<()> {
        wait_until(timeout, || self.log().matches(text).count() >= count).map_err(|()| {
            format!(
                "{}: {text:?} not {count} times in its log within {timeout:?}\n{}",
                self.name,
                self.tail()
            )
        })
    }

    fn tail(&self) -> String {
        let log = locked(&self.log);
        let from = log.len().saturating_sub(30);
        log[from..].iter().map(|line| format!("  | {line}\n")).collect()
    }

    /// SIGKILL, and waits until it is reaped. Returns the moment of the signal.
    pub fn kill(&mut self) -> Instant {
        let at = Instant::now();
        let _ = rustix::process::kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        self.forget();
        at
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = rustix::process::kill_process(self.group, signal);
    }

    /// SIGTERM, then its exit status.
    ///
    /// # Errors
    /// When it has not ended within `timeout`; it is killed then.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM);
        self.wait_exit(timeout)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended within `timeout`; it is killed then.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let mut status = None;
        let ended = wait_until(timeout, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        self.kill();
        let tail = self.tail();
        match (ended, status) {
            (Ok(()), Some(status)) => Ok(status),
            _ => Err(format!(
                "{}: it did not end within {timeout:?}\n{tail}",
                self.name
            )),
        }
    }

    fn forget(&self) {
        locked(&STARTED).retain(|group| *group != self.group);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.tail());
        }
    }
}

/// Processes, started by whomever, whose command line or environment has `text` in it. Those of other users are not
/// seen.
pub fn processes_with(text: &str) -> Vec<u32> {
    let holds = |path: std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| holds(entry.path().join("cmdline")) || holds(entry.path().join("environ")))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Asks until it is so: for states outside of this process that send no event.
///
/// # Errors
/// When it is not within `timeout`.
#[allow(clippy::result_unit_err)]
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> std::result::Result<(), ()> {
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() >= deadline {
            return Err(());
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Ok(())
}

fn read_lines(
    from: impl Read + Send + 'static,
    mut each: impl FnMut(String) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            each(String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
        }
    })
}

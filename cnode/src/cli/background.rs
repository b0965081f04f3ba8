//! Agents that are started for a user or for one VM, in the background.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::Duration,
};

use meshx_etf::Term;
use rustix::fs::{FlockOperation, OFlags, flock};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use super::{EX_OSERR, EX_UNAVAILABLE, Failure, block_on, print};
use crate::agent::{
    client::{CONNECT_TIME, ClientError, ControlClient},
    control::{
        frame::REPLY_MAX,
        message::{Message, Request, VERSIONS, map, text},
    },
    hosts,
    paths::{self, CONTROL_SOCKET, DIR_VARIABLE, LOG_FILE},
    quoted,
};

/// How long an agent may take until it serves, and another process to start it.
const START_TIME: Duration = Duration::from_secs(30);
/// Pause between two looks at whether somebody else has started it.
const LOOK: Duration = Duration::from_millis(50);
/// How long a shared agent stays when nobody uses it and nothing else is said.
const IDLE_EXIT: u64 = 60;
/// Held by who starts an agent in its directory, so that many make one.
const START_LOCK: &str = "start.lock";
/// What the agent's log calls a connection that keeps it.
const HOLDER: &str = concat!("meshx/", env!("CARGO_PKG_VERSION"), " run");
/// Executes its arguments without the files that this process may have got: somebody may wait for the end of a pipe,
/// as a VM does for that of its port.
const WITHOUT_OTHERS_FILES: &str = r#"exec "$0" "$@" 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-"#;
/// Bytes of what an agent that does not start says that are passed on.
const COMPLAINT_MAX: u64 = 16 << 10;

/// Find this user's agent, or start one in the background
///
/// The agent that is started runs on the embedded mesh, logs to agent.log in its directory, and ends by itself when it
/// is not used. None is started where --dir or MESHX_DIR names the agent of this host. Prints one line:
/// meshx agent ready dir=DIR hosts=NAME,.. mesh=MESH.
#[derive(Debug, clap::Args)]
pub(super) struct StartArgs {
    /// Host part of node names that the agent must own; may be given more than once [default: the short and the full host name]
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// The directory of an agent that runs
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    idle: IdleOption,
}

/// When an agent that is started is to end.
#[derive(Debug, clap::Args)]
pub(super) struct IdleOption {
    /// How long an agent that is started for all of this user's nodes stays when nobody uses it, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = IDLE_EXIT, value_parser = clap::value_parser!(u64).range(1..))]
    idle_exit: u64,
}

pub(super) fn start(args: &StartArgs) -> Result<ExitCode, Failure> {
    let line = block_on(async {
        let client = shared(args.dir.as_deref(), &args.host, &args.idle).await?;
        let owned = &client.hello().hosts;
        if let Some(host) = args.host.iter().find(|host| !owned.contains(host)) {
            return Err(not_owned(host, owned));
        }
        Ok(format!(
            "meshx agent ready dir={} hosts={} mesh={}\n",
            quoted(client.dir()),
            owned.join(","),
            client.hello().mesh
        ))
    })?;
    print(&line)?;
    Ok(ExitCode::SUCCESS)
}

/// A shared agent that runs and does not own this host.
pub(super) fn not_owned(host: &str, owned: &[String]) -> Failure {
    Failure::usage(format!(
        "host_not_owned: the agent that runs for this user owns {}, and not {host}; name the node after one of these, \
         or end what uses the agent, and it ends by itself",
        owned.join(", ")
    ))
}

/// A connection to the agent that is configured, or to the one of this user: one that runs, or one that is started and
/// owns `hosts` besides the names of this host.
pub(super) async fn shared(
    dir: Option<&Path>,
    hosts: &[String],
    idle: &IdleOption,
) -> Result<ControlClient, Failure> {
    if paths::is_configured(dir) {
        return ControlClient::connect(dir).await.map_err(|error| match error {
            ClientError::NoAgent { dir, source } => Failure::new(
                EX_UNAVAILABLE,
                format!(
                    "no agent answers in {dir} ({source}), which --dir or ${DIR_VARIABLE} names as this host's, and none \
                     is started in its place: start it there (meshx agent --dir {dir}), or unset ${DIR_VARIABLE}",
                    dir = dir.display()
                ),
            ),
            error => error.into(),
        });
    }
    let until = Instant::now() + START_TIME;
    loop {
        if let Some(client) = look(until).await? {
            return Ok(client);
        }
        let dir = own_dir(&paths::agent_dir(None))?;
        // Whoever comes at the same time waits for the agent that the first one starts.
        let Some(_lock) = lock(&dir)? else {
            if Instant::now() >= until {
                return Err(Failure::new(
                    EX_UNAVAILABLE,
                    format!(
                        "no agent answers in {}, which another process has been starting for {} s; see {LOG_FILE} there",
                        dir.display(),
                        START_TIME.as_secs()
                    ),
                ));
            }
            sleep(LOOK).await;
            continue;
        };
        if let Some(client) = look(until).await? {
            return Ok(client);
        }
        let mut all = hosts::own_hosts();
        all.extend(
            hosts
                .iter()
                .filter(|host| !all.contains(host))
                .cloned()
                .collect::<Vec<_>>(),
        );
        let idle = idle.idle_exit.to_string();
        let mut words: Vec<&str> = vec!["--mesh", "embedded", "--detached", "--idle-exit", &idle];
        words.extend(all.iter().flat_map(|host| ["--host", host.as_str()]));
        let mut command = program(&words)?;
        command.arg("--dir").arg(&dir).stdin(Stdio::null());
        if let Err(failure) = ready(&mut command).await {
            // Somebody may have started one by hand meanwhile.
            return look(until).await?.ok_or(failure);
        }
        return Ok(ControlClient::connect(None).await?);
    }
}

/// A connection by which the agent is used as long as somebody has it. Nothing more is said on it.
pub(super) fn hold(dir: &Path) -> Result<OwnedFd, Failure> {
    let told = |text: String| {
        Failure::new(
            EX_UNAVAILABLE,
            format!("the agent does not take a connection: {text}"),
        )
    };
    let greet = || -> io::Result<(UnixStream, Vec<u8>)> {
        let mut stream = UnixStream::connect(dir.join(CONTROL_SOCKET))?;
        stream.set_read_timeout(Some(CONNECT_TIME))?;
        let versions = Term::tuple([Term::Int(VERSIONS.0), Term::Int(VERSIONS.1)]);
        let hello = Request {
            id: 1,
            command: "hello".to_owned(),
            args: map([("versions", versions), ("client", text(HOLDER))]),
        };
        stream.write_all(&hello.encode().map_err(io::Error::other)?)?;
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let mut answer = Vec::new();
        let limit = u64::from(u32::from_be_bytes(length)).min(REPLY_MAX as u64);
        (&stream).take(limit).read_to_end(&mut answer)?;
        Ok((stream, answer))
    };
    let (stream, answer) = greet().map_err(|error| told(error.to_string()))?;
    match Message::decode(&answer).map_err(told)? {
        Message::Reply { result: Ok(_), .. } => Ok(stream.into()),
        other => Err(told(format!("it answered {other:?}"))),
    }
}

/// None when nobody answers, or one that ends: its connections break.
async fn look(until: Instant) -> Result<Option<ControlClient>, Failure> {
    match ControlClient::connect(None).await {
        Ok(client) => Ok(Some(client)),
        Err(ClientError::NoAgent { .. } | ClientError::Closed(_)) if Instant::now() < until => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// An agent for this process and what comes of it: it ends once all of them have.
pub(super) struct Private {
    pub(super) dir: PathBuf,
    /// The agent ends when nobody holds this.
    pub(super) life: OwnedFd,
}

/// Starts a private agent that owns this host, or the names of this host.
pub(super) async fn private(host: Option<&str>) -> Result<Private, Failure> {
    let mut words = vec!["--private"];
    words.extend(host.iter().flat_map(|host| ["--host", host]));
    let mut command = program(&words)?;
    command.stdin(Stdio::piped());
    let (line, mut child) = ready(&mut command).await?;
    let life = child.stdin.take().ok_or_else(|| io::Error::other("no pipe"));
    let life = life.and_then(|stdin| stdin.into_owned_fd());
    Ok(Private {
        dir: ready_dir(&line).ok_or_else(|| no_ready_line(&line))?,
        life: life.map_err(|error| Failure::new(EX_OSERR, format!("the private agent: {error}")))?,
    })
}

/// This program, as an agent that is nobody's foreground process.
fn program(words: &[&str]) -> Result<Command, Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::new(EX_OSERR, format!("where this program is: {error}")))?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", WITHOUT_OTHERS_FILES])
        .arg(own)
        .arg("agent")
        .args(words)
        // Nobody's file system is kept from being taken away.
        .current_dir("/")
        // Whoever supervises this process does not supervise the agent.
        .env_remove("NOTIFY_SOCKET")
        .env_remove(DIR_VARIABLE)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(command)
}

/// Starts it, and waits for its line. What it says when it ends instead is the failure.
async fn ready(command: &mut Command) -> Result<(String, Child), Failure> {
    let mut child = command
        .spawn()
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot start an agent: {error}")))?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Failure::new(EX_OSERR, "cannot start an agent: no pipe"));
    };
    let mut line = String::new();
    let mut stdout = BufReader::new(stdout.take(COMPLAINT_MAX));
    match timeout(START_TIME, stdout.read_line(&mut line)).await {
        Ok(Ok(1..)) => return Ok((line, child)),
        Ok(_) => {}
        Err(_) => {
            let _ = child.kill().await;
            let text = format!(
                "the agent that was started did not serve within {} s",
                START_TIME.as_secs()
            );
            return Err(Failure::new(EX_UNAVAILABLE, text));
        }
    }
    let mut text = Vec::new();
    let _ = timeout(START_TIME, stderr.take(COMPLAINT_MAX).read_to_end(&mut text)).await;
    let text = String::from_utf8_lossy(&text);
    let text = text.trim_end().trim_start_matches("meshx: ");
    Err(Failure::new(
        EX_UNAVAILABLE,
        format!("an agent was started and ended: {text}"),
    ))
}

fn no_ready_line(line: &str) -> Failure {
    Failure::new(EX_OSERR, format!("an agent was started and said {line:?}"))
}

/// `dir` in a ready line, quoted as in JSON or up to a blank.
fn ready_dir(line: &str) -> Option<PathBuf> {
    let rest = line.strip_prefix("meshx agent ready dir=")?;
    let dir = match rest.starts_with('"') {
        true => serde_json::Deserializer::from_str(rest)
            .into_iter::<String>()
            .next()?
            .ok()?,
        false => rest.split_whitespace().next()?.to_owned(),
    };
    Some(dir.into())
}

/// The directory for this user's agent, made when it is not there. One of root's is a system agent's.
fn own_dir(dir: &Path) -> Result<PathBuf, Failure> {
    let failed =
        |error: io::Error| Failure::new(EX_UNAVAILABLE, format!("directory {}: {error}", dir.display()));
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let checked =
        paths::checked_client_dir(dir).map_err(|error| Failure::new(EX_UNAVAILABLE, error.to_string()))?;
    let owner = fs::symlink_metadata(&checked).map_err(failed)?.uid();
    if owner != paths::uid() {
        return Err(Failure::new(
            EX_UNAVAILABLE,
            format!(
                "no agent answers in {}, which belongs to uid {owner}: it is the system's, and none is started in its \
                 place; start the system's agent",
                dir.display()
            ),
        ));
    }
    Ok(checked)
}

/// None when another process holds it.
fn lock(dir: &Path) -> Result<Option<File>, Failure> {
    let path = dir.join(START_LOCK);
    let failed = |error: io::Error| Failure::new(EX_OSERR, format!("{}: {error}", path.display()));
    let file = private_file(OpenOptions::new().write(true), &path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed(error.into())),
    }
}

/// Opens a file of an agent in the background, or makes it, 0600.
pub(super) fn private_file(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options
        .create(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_directory_in_a_ready_line() {
        for dir in ["/tmp/meshx-7", "/tmp/a \"b\" c"] {
            let line = format!(
                "meshx agent ready dir={} hosts=h1 mesh=embedded\n",
                quoted(Path::new(dir))
            );
            assert_eq!(ready_dir(&line), Some(dir.into()), "{line}");
        }
        assert_eq!(ready_dir("meshx: no\n"), None);
    }

    #[test]
    fn the_directory_is_made_for_this_user_alone_and_one_process_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let dir = own_dir(&temp.path().join("meshx")).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o700);
        let held = lock(&dir).unwrap();
        assert!(held.is_some() && lock(&dir).unwrap().is_none());
        drop(held);
        assert!(lock(&dir).unwrap().is_some());
        let file = fs::metadata(dir.join(START_LOCK)).unwrap();
        assert_eq!(file.permissions().mode() & 0o7777, 0o600);

        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_dir(&dir).is_err());
    }
}

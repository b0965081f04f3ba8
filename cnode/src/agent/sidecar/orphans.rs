//! What a killed agent left: found by process id and start time, or by a mark in its environment, and ended.
//!
//! The guard of each group ends it when its agent dies. This is for what the guard does not reach: processes that left
//! the group, and groups whose guard was killed, too.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

use super::{SidecarError, files};

/// Variable that every process of a sidecar is started with: the path of its directory.
pub(super) const MARK: &str = "MESHX_SIDECAR";
/// In a sidecar's directory: `PID START` of each process that the agent itself started, the group's leader first. START
/// is in clock ticks since boot (proc(5), `stat` field 22).
const PIDS: &str = "pids";
/// How long killed processes may take to be gone, so that their ports are free.
const GONE_TIME: Duration = Duration::from_secs(2);
const GONE_POLL: Duration = Duration::from_millis(5);

/// Writes down what was started.
pub(super) fn record(dir: &Path, pids: &[Pid]) -> Result<(), SidecarError> {
    let mut text = String::new();
    for pid in pids {
        // One that has ended already needs no finding.
        if let Some(stat) = Stat::read(pid.as_raw_pid()) {
            text.push_str(&format!("{} {}\n", pid.as_raw_pid(), stat.start));
        }
    }
    files::Files::open(dir)?.put(PIDS, text.as_bytes())?;
    Ok(())
}

/// Ends every sidecar whose directory lies in `root`, and removes what is there.
pub(super) fn end_all(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for dir in entries.flatten().map(|entry| entry.path()) {
        let text = fs::read_to_string(dir.join(PIDS)).unwrap_or_default();
        let pids: Vec<(i32, u64)> = text.lines().filter_map(parse).collect();
        // The group's number belongs to the leader as long as that lives; later only what it started is known.
        for &(pid, start) in &pids {
            let alive = Stat::read(pid).filter(|stat| stat.start == start);
            let group = alive.and_then(|stat| Pid::from_raw(stat.group));
            if let Some(group) = group
                && pids
                    .first()
                    .is_some_and(|(leader, _)| *leader == group.as_raw_pid())
            {
                tracing::warn!(
                    group = group.as_raw_pid(),
                    "ending a sidecar that a killed agent left"
                );
                let _ = kill_process_group(group, Signal::KILL);
            }
        }
        end_marked(&dir);
        wait_gone(&pids);
        files::remove_dir(&dir);
    }
}

/// Ends every process of our user that bears the mark of this directory.
pub(super) fn end_marked(dir: &Path) {
    let mut mark = MARK.as_bytes().to_vec();
    mark.push(b'=');
    mark.extend_from_slice(dir.as_os_str().as_bytes());
    let (own, uid) = (std::process::id(), rustix::process::geteuid().as_raw());
    let Ok(processes) = fs::read_dir("/proc") else {
        return;
    };
    let mut ended = Vec::new();
    for entry in processes.flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) else {
            continue;
        };
        if id == own || !entry.metadata().is_ok_and(|meta| meta.uid() == uid) {
            continue;
        }
        // The handle first: it stays that of the process whose environment is read next, whatever the number does.
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        if has_mark(&entry.path().join("environ"), &mark) && pidfd_send_signal(&handle, Signal::KILL).is_ok()
        {
            ended.extend(Stat::read(pid.as_raw_pid()).map(|stat| (pid.as_raw_pid(), stat.start)));
        }
    }
    wait_gone(&ended);
}

fn has_mark(environ: &Path, mark: &[u8]) -> bool {
    // One that has ended, or another user's that we may not look into, has none.
    fs::read(environ).is_ok_and(|all| all.split(|byte| *byte == 0).any(|variable| variable == mark))
}

/// Until none of them lives: a zombie is gone, too, since it holds nothing.
fn wait_gone(pids: &[(i32, u64)]) {
    let began = Instant::now();
    let alive = |&(pid, start): &(i32, u64)| {
        Stat::read(pid).is_some_and(|stat| stat.start == start && !matches!(stat.state, 'Z' | 'X'))
    };
    while pids.iter().any(alive) && began.elapsed() < GONE_TIME {
        std::thread::sleep(GONE_POLL);
    }
}

fn parse(line: &str) -> Option<(i32, u64)> {
    let (pid, start) = line.split_once(' ')?;
    Some((pid.parse().ok()?, start.parse().ok()?))
}

/// What is known of a process.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    group: i32,
    start: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let read = || -> io::Result<String> { fs::read_to_string(format!("/proc/{pid}/stat")) };
        Self::parse(&read().ok()?)
    }

    /// proc(5): the command in parentheses may hold anything, blanks and parentheses included.
    fn parse(stat: &str) -> Option<Self> {
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let group = fields.nth(1)?.parse().ok()?;
        let start = fields.nth(16)?.parse().ok()?;
        Some(Self { state, group, start })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    #[test]
    fn a_stat_line_is_read() {
        let line = "42 (a) b (c) S 1 7 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 2";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.state, stat.group, stat.start), ('S', 7, 987_654));
        for broken in ["", "42 (a", "42 (a) S 1", "42 (a) S 1 x 3"] {
            assert_eq!(Stat::parse(broken), None, "{broken}");
        }
        let own = Stat::read(std::process::id() as i32).unwrap();
        assert!(own.start > 0);
    }

    fn sleeper(dir: Option<&Path>) -> Child {
        let mut command = Command::new("sleep");
        command.arg("600").process_group(0);
        if let Some(dir) = dir {
            command.env(MARK, dir);
        }
        command.spawn().unwrap()
    }

    fn pid(child: &Child) -> Pid {
        Pid::from_child(child)
    }

    #[test]
    fn what_is_written_down_is_ended_unless_its_number_is_another_processes() {
        let temp = tempfile::tempdir().unwrap();
        let (left, reused) = (temp.path().join("left"), temp.path().join("reused"));
        for dir in [&left, &reused] {
            files::private_dir(dir).unwrap();
        }
        // Neither bears a mark, as after a program that rewrote its environment.
        let (mut gone, mut stranger) = (sleeper(None), sleeper(None));
        record(&left, &[pid(&gone)]).unwrap();
        let start = Stat::read(pid(&stranger).as_raw_pid()).unwrap().start;
        fs::write(reused.join(PIDS), format!("{} {}\n", stranger.id(), start + 1)).unwrap();
        end_all(temp.path());
        assert!(!gone.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        assert!(!left.exists() && !reused.exists());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn what_left_its_group_is_found_by_its_mark() {
        let temp = tempfile::tempdir().unwrap();
        let (ours, others) = (temp.path().join("a"), temp.path().join("ab"));
        files::private_dir(&ours).unwrap();
        let (mut gone, mut stranger) = (sleeper(Some(&ours)), sleeper(Some(&others)));
        end_all(temp.path());
        assert!(!gone.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}

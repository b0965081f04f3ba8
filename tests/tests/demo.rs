//! The demo itself: all its steps, and that nothing is left of it, however it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Process, program};
use rustix::process::{Pid, Signal, kill_process, test_kill_process_group};

fn demo(arguments: &[&str], tmp: &std::path::Path) -> Process {
    Process::start("demo", program("demo").unwrap(), arguments, |command| {
        command.env("TMPDIR", tmp);
    })
    .unwrap()
}

/// No file of the demo, and no process that still has its directory in its command line or environment.
fn nothing_left(tmp: &std::path::Path) {
    let files: Vec<_> = std::fs::read_dir(tmp)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert!(files.is_empty(), "left behind: {files:?}");
    let marker = tmp.display().to_string();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(environment) = std::fs::read(process.path().join("environ")) else {
            continue;
        };
        let commandline = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let own = process.file_name().to_string_lossy() == std::process::id().to_string();
        assert!(
            own || !String::from_utf8_lossy(&environment).contains(&marker),
            "still running: {} {}",
            process.file_name().to_string_lossy(),
            String::from_utf8_lossy(&commandline).replace('\0', " ")
        );
    }
}

#[test]
fn every_step_is_ok_and_nothing_is_left() {
    let tmp = tempfile::Builder::new().prefix("dm").tempdir().unwrap();
    let mut demo = demo(&[], tmp.path());
    let status = demo.wait_exit(Duration::from_secs(180)).unwrap();
    let log = demo.log();
    println!("{log}");
    assert!(status.success(), "{status}\n{log}");
    assert!(!log.contains("FAILED"), "{log}");
    nothing_left(tmp.path());
}

#[test]
fn ctrl_c_ends_it_and_leaves_nothing() {
    let tmp = tempfile::Builder::new().prefix("dm").tempdir().unwrap();
    let mut demo = demo(&[], tmp.path());
    demo.wait_for(Duration::from_secs(60), |line| {
        line.contains("nodes meet at boot").then_some(())
    })
    .unwrap();
    let pid = Pid::from_raw(demo.pid().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let status = demo.wait_exit(Duration::from_secs(30)).unwrap();
    assert_eq!(status.code(), Some(130), "{}", demo.log());
    assert!(test_kill_process_group(pid).is_err());
    nothing_left(tmp.path());
}

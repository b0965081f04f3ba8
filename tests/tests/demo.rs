//! The demo itself: all its steps, and that nothing is left of it, however it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Process, processes_with, program, wait_until};
use rustix::process::{Pid, Signal, kill_process, test_kill_process_group};

/// For what ends by itself, on a busy machine.
const END: Duration = Duration::from_secs(30);

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
    // What a VM has started ends when it sees the VM's end.
    let running = || processes_with(tmp.to_str().unwrap());
    wait_until(END, || running().is_empty()).unwrap_or_else(|()| panic!("still running: {:?}", running()));
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

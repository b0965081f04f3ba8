//! `mix meshx.run` in a project that depends on meshx: the command and mix live and end together.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use meshx_tests::{Mesh, Process, program, repository, wait_until};
use rustix::process::Signal;

/// Both VMs boot, on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(60);

/// Prints `up PID` and waits, some minutes at most; on SIGTERM it takes a moment, says so and ends with status 3.
const COMMAND: &str =
    "trap 'sleep 1; echo bye; exit 3' TERM; echo up $$; for i in $(seq 3000); do sleep 0.05; done";

fn start(runtime: &Path) -> (Process, u32) {
    let words = [
        "meshx.run",
        "one@h1",
        "--agent",
        "private",
        "--",
        "sh",
        "-c",
        COMMAND,
    ];
    let mut mix = Process::start("mix meshx.run", "mix", words, |command| {
        command
            .current_dir(repository().join("examples/shop"))
            .env("MIX_ENV", "prod")
            .env("MESHX_PROGRAM", program("meshx").unwrap())
            .env("XDG_RUNTIME_DIR", runtime);
    })
    .unwrap();
    let up = |line: &str| line.strip_prefix("up ").map(|pid| pid.parse().unwrap());
    let pid = mix.wait_for(BOOT, up).unwrap();
    (mix, pid)
}

/// Its private agent has cleared up, and so nobody is left who holds it.
fn wait_empty(runtime: &Path) {
    wait_until(END, || fs::read_dir(runtime).unwrap().count() == 0).unwrap();
}

#[test]
fn sigterm_is_the_commands_and_its_status_is_that_of_mix() {
    let mesh = Mesh::new().unwrap();
    let (mut mix, _) = start(mesh.path());
    let began = Instant::now();
    let status = mix.terminate(END).unwrap();
    println!(
        "mix ended {:?} after SIGTERM, of which the command took one second",
        began.elapsed()
    );
    assert_eq!(status.code(), Some(3), "{}", mix.log());
    assert!(mix.log().contains("bye"), "{}", mix.log());
    wait_empty(mesh.path());
}

#[test]
fn the_command_ends_with_a_mix_that_is_killed() {
    let mesh = Mesh::new().unwrap();
    let (mix, pid) = start(mesh.path());
    // The VM alone: not its process group, in which the command is not.
    mix.signal(Signal::KILL);
    let began = Instant::now();
    wait_until(END, || {
        fs::read(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .is_empty()
    })
    .unwrap();
    println!(
        "the command had ended {:?} after SIGKILL of mix, of which it took one second",
        began.elapsed()
    );
    wait_empty(mesh.path());
}

//! One process of the agent takes over from another that has a sidecar: the program runs on, and is the successor's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use meshx_etf::Term;
use meshx_tests::consul::Consul;
use meshx_tests::control::Control;
use meshx_tests::upgrade::other_build;
use meshx_tests::{EchoClient, EchoServer, processes_with, program, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// A sidecar passes after its own check, every 2 s.
const UP: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(30);
/// Promised: what belongs to an agent is gone within 1 s. Three times that is the deadline here.
const FREED: Duration = Duration::from_secs(3);

/// A kind of sidecar.
struct Kind {
    name: &'static str,
    /// What begins a word of its command line, and of no other program of its Consul and its agents.
    word: &'static [u8],
    ports: &'static str,
    /// Whether it cuts what it carries when that is denied.
    cuts: bool,
}

const CONNECT_PROXY: Kind = Kind {
    name: "connect_proxy",
    word: b"-sidecar-for",
    ports: "21040-21059",
    cuts: false,
};
/// Driven by files that the agent writes.
const ENVOY: Kind = Kind {
    name: "envoy",
    word: b"--config-path",
    ports: "21060-21079",
    cuts: true,
};

/// The sidecars of this test's agents.
fn sidecars(consul: &Consul, kind: &Kind) -> Vec<u32> {
    let mut found = processes_with(consul.address());
    found.extend(processes_with(&consul.path().display().to_string()));
    found.sort_unstable();
    found.dedup();
    found.retain(|pid| {
        let arguments = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline"));
        arguments.is_ok_and(|all| {
            all.split(|byte| *byte == 0)
                .any(|word| word.starts_with(kind.word))
        })
    });
    found
}

#[test]
fn a_built_in_proxy_runs_on_under_the_successor() {
    runs_on_under_the_successor(&CONNECT_PROXY);
}

#[test]
fn an_envoy_runs_on_under_the_successor() {
    runs_on_under_the_successor(&ENVOY);
}

/// Talks on one link all the time.
struct Talk {
    stop: mpsc::Sender<()>,
    said: Arc<AtomicU64>,
    talking: JoinHandle<Result<(), String>>,
}

impl Talk {
    fn start(mut link: EchoClient) -> Self {
        let (stop, stopped) = mpsc::channel();
        let said = Arc::<AtomicU64>::default();
        let count = said.clone();
        let talking = std::thread::spawn(move || {
            while stopped.try_recv().is_err() {
                link.say(b"all the time")?;
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Self { stop, said, talking }
    }

    /// Returns when it has said something more from now on.
    fn wait(&self) {
        let before = self.said.load(Ordering::SeqCst);
        let moved = || self.said.load(Ordering::SeqCst) > before + 1 || self.talking.is_finished();
        wait_until(SOON, moved).unwrap();
    }

    fn stop(self) {
        self.stop.send(()).ok();
        self.talking.join().unwrap().unwrap();
        assert!(self.said.load(Ordering::SeqCst) > 0);
    }
}

fn runs_on_under_the_successor(kind: &Kind) {
    let consul = Consul::start().unwrap();
    // A sidecar that is told by files knows who may call from a rule.
    consul.allow("shop", "echo").unwrap();
    let builds = [other_build(consul.path()).unwrap(), program("meshx").unwrap()];
    let ip = consul.ip().to_string();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut h2 = consul
        .agent_with("b", &ip, &["h2"], &["--instance-ports", kind.ports], None)
        .unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let (server, client) = (Control::connect(&h2).unwrap(), Control::connect(&h1).unwrap());
    let options = vec![
        ("sidecar", Term::atom(kind.name)),
        ("wait", Term::Int(i64::try_from(UP.as_millis()).unwrap())),
    ];
    server.serve("echo", echo.address(), options).unwrap();
    let address = client.reach("echo", "shop", vec![]).unwrap();
    let mut link = EchoClient::connect_within(address, UP).unwrap();
    link.say(b"by the sidecar").unwrap();
    let talk = Talk::start(EchoClient::connect(address, SOON).unwrap());
    let running = sidecars(&consul, kind);
    assert_eq!(running.len(), 1, "{running:?}");

    for round in 0..3 {
        let mut old = h2.take_over(&builds[round % 2]).unwrap();
        // No link is its own: the sidecar's are the sidecar's.
        assert!(old.wait_exit(SOON).unwrap().success());
        link.say(b"and again").unwrap();
        talk.wait();
        EchoClient::connect(address, SOON)
            .unwrap()
            .say(b"a new one")
            .unwrap();
        assert_eq!(sidecars(&consul, kind), running);
    }
    talk.stop();
    // The last process keeps its rules: nobody is let in whom they deny.
    consul.deny("shop", "echo").unwrap();
    wait_until(SOON, || EchoClient::connect(address, SOON).is_err()).unwrap();
    if kind.cuts {
        wait_until(SOON, || link.say(b"denied").is_err()).unwrap();
    }
    consul.allow("shop", "echo").unwrap();
    EchoClient::connect_within(address, UP).unwrap();
    assert_eq!(sidecars(&consul, kind), running);
    // And keeps it up.
    kill_process(
        Pid::from_raw(i32::try_from(running[0]).unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    let mut next = Vec::new();
    wait_until(SOON, || {
        next = sidecars(&consul, kind);
        next.len() == 1 && next != running
    })
    .unwrap();
    EchoClient::connect_within(address, UP).unwrap();
    // And has it no longer than it lives.
    let at = h2.process.kill();
    wait_until(FREED, || sidecars(&consul, kind).is_empty()).unwrap();
    println!(
        "the sidecar of a killed successor was gone within {:?}",
        at.elapsed()
    );
}

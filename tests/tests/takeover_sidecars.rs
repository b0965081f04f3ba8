//! One process of the agent takes over from another that has a sidecar: the program runs on, and is the successor's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
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

/// The proxy of this test's Consul; none but it is told a service's id by this option.
fn proxies(consul: &Consul) -> Vec<u32> {
    let mut found = processes_with(consul.address());
    found.retain(|pid| {
        let arguments = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline"));
        arguments.is_ok_and(|all| {
            all.split(|byte| *byte == 0)
                .any(|word| word.starts_with(b"-sidecar-for"))
        })
    });
    found
}

#[test]
fn a_sidecar_runs_on_under_the_successor() {
    let consul = Consul::start().unwrap();
    let builds = [other_build(consul.path()).unwrap(), program("meshx").unwrap()];
    let ip = consul.ip().to_string();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut h2 = consul
        .agent_with("b", &ip, &["h2"], &["--instance-ports", "21040-21059"], None)
        .unwrap();
    let echo = EchoServer::start(consul.ip()).unwrap();
    let (server, client) = (Control::connect(&h2).unwrap(), Control::connect(&h1).unwrap());
    let options = vec![
        ("sidecar", Term::atom("connect_proxy")),
        ("wait", Term::Int(i64::try_from(UP.as_millis()).unwrap())),
    ];
    server.serve("echo", echo.address(), options).unwrap();
    let address = client.reach("echo", "shop", vec![]).unwrap();
    let mut link = EchoClient::connect_within(address, UP).unwrap();
    link.say(b"by the sidecar").unwrap();
    let running = proxies(&consul);
    assert_eq!(running.len(), 1, "{running:?}");

    for round in 0..3 {
        let mut old = h2.take_over(&builds[round % 2]).unwrap();
        // No link is its own: the sidecar's are the sidecar's.
        assert!(old.wait_exit(SOON).unwrap().success());
        link.say(b"and again").unwrap();
        EchoClient::connect(address, SOON)
            .unwrap()
            .say(b"a new one")
            .unwrap();
        assert_eq!(proxies(&consul), running);
    }
    // The last process keeps it up.
    kill_process(
        Pid::from_raw(i32::try_from(running[0]).unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    let mut next = Vec::new();
    wait_until(SOON, || {
        next = proxies(&consul);
        next.len() == 1 && next != running
    })
    .unwrap();
    EchoClient::connect_within(address, UP).unwrap();
    // And has it no longer than it lives.
    let at = h2.process.kill();
    wait_until(FREED, || proxies(&consul).is_empty()).unwrap();
    println!(
        "the sidecar of a killed successor was gone within {:?}",
        at.elapsed()
    );
}

//! A log that goes to somebody who does not read it.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use meshx::agent::control::message::{map, text};
use meshx_etf::Term;
use rustix::process::Signal;

use crate::support::{Agent, Client, temp};

/// More of them than a pipe and an agent hold: each is a line of more than a kilobyte.
const MANY: u32 = 1000;
const CONNECTED: &str = "client connected";

fn unread(root: &std::path::Path) -> Agent {
    Agent::with_stderr(root, "a", &["h1"], &[], Stdio::piped())
}

fn connect(agent: &Agent, number: u32) {
    let args = map([
        ("versions", Term::tuple([Term::Int(1), Term::Int(1)])),
        ("client", text(format!("number={number} {}", "x".repeat(1000)))),
    ]);
    Client::connect(&agent.dir).ask("hello", args).unwrap();
}

#[test]
fn it_holds_nobody_up() {
    let root = temp();
    let mut agent = unread(root.path());
    (0..MANY).for_each(|number| connect(&agent, number));
    assert!(agent.names().is_empty(), "it answers");
    let began = Instant::now();
    agent.signal(Signal::TERM);
    assert!(agent.wait_exit().success());
    assert!(!agent.dir.join("control.sock").exists(), "it ended in order");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn who_reads_it_late_gets_whole_lines_in_order_and_is_told_of_those_that_were_lost() {
    let root = temp();
    let mut agent = unread(root.path());
    (0..MANY).for_each(|number| connect(&agent, number));
    let mut log = BufReader::new(agent.child.stderr.take().unwrap()).lines();
    let mut seen = Vec::new();
    let lost = loop {
        let line = log.next().unwrap().unwrap();
        if line.contains("lines of the log were lost: nobody read it") {
            break line;
        }
        seen.push(line);
    };
    let count = lost.split(' ').find_map(|word| word.parse::<u32>().ok()).unwrap();
    assert!(count > 0, "{lost}");
    connect(&agent, MANY);
    agent.signal(Signal::TERM);
    assert!(agent.wait_exit().success());
    seen.extend(log.map(Result::unwrap));

    let connected: Vec<u32> = seen
        .iter()
        .filter(|line| line.contains(CONNECTED))
        .map(|line| {
            let (_, number) = line.split_once("number=").unwrap();
            let (number, rest) = number.split_once(' ').unwrap();
            assert!(rest.starts_with(&"x".repeat(1000)), "{line}");
            number.parse().unwrap()
        })
        .collect();
    assert!(connected.is_sorted(), "{connected:?}");
    assert_eq!(connected.first(), Some(&0));
    assert_eq!(connected.last(), Some(&MANY), "what comes later is not lost");
    assert!(connected.len() < MANY as usize);
    assert!(
        seen.iter().any(|line| line.contains("ending")),
        "the last words arrive"
    );
}

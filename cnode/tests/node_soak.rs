//! A BEAM that sends, links, monitors, spawns and kills at random, and an exact account of every signal.
//!
//! The half in Erlang, `node_soak.erl`, checks what comes back of each operation: no signal may be missing, double,
//! out of order or wrong. At the end both halves compare what they counted. It lasts 15 seconds; `MESHX_SOAK_SECONDS`
//! and `MESHX_SOAK_SEED` say otherwise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use meshx::node::{Address, Caller, Mailbox, Message, Node, NodeEvent, Raised, Server, SpawnOptions};
use meshx_etf::{Pid, Term};
use node_support::Epmd;

const WORKERS: u32 = 8;
const SOURCE: &str = include_str!("node_soak.erl");

/// What this half saw.
#[derive(Default)]
struct Seen {
    messages: AtomicU64,
    exits_there: AtomicU64,
    downs_there: AtomicU64,
    spawns_there: AtomicU64,
    spawns_here: AtomicU64,
    to_alias: AtomicU64,
    taken_back: AtomicU64,
    /// The last message of each worker.
    last: Mutex<HashMap<i64, i64>>,
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Makes processes for workers to play with, and answers what has been seen.
struct Factory {
    node: Node,
    seen: Arc<Seen>,
    sink: Pid,
}

impl Server for Factory {
    async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
        let parts = request.as_tuple().unwrap_or_default();
        match parts {
            [new, Term::Pid(owner)] if new.as_atom() == Some("new") => {
                let mailbox = self.node.mailbox();
                let pid = mailbox.pid().clone();
                tokio::spawn(puppet(mailbox, owner.clone(), Arc::clone(&self.seen)));
                Some(Term::Pid(pid))
            }
            [seen, Term::Int(worker)] if seen.as_atom() == Some("seen") => {
                // What the worker sent before is in the sink's mailbox already, but perhaps not yet out of it: the
                // sink answers itself.
                let question = Term::tuple([Term::atom("seen"), Term::Int(*worker)]);
                let (node, sink) = (self.node.clone(), self.sink.clone());
                tokio::spawn(async move {
                    let answer = node.gen_call(sink, question, node_support::LONG).await;
                    let _ = caller
                        .reply(answer.unwrap_or_else(|error| Term::binary(error.to_string())))
                        .await;
                });
                None
            }
            _ if request.as_atom() == Some("sink") => Some(Term::Pid(self.sink.clone())),
            _ => panic!("{request:?}"),
        }
    }
}

/// Takes messages, and holds each against the one before it.
struct Sink(Arc<Seen>);

impl Server for Sink {
    async fn call(&mut self, request: Term, _caller: Caller) -> Option<Term> {
        let worker = request
            .as_tuple()
            .and_then(|parts| parts.get(1))
            .and_then(Term::as_int);
        let last = self.0.last.lock().unwrap().get(&worker.unwrap()).copied();
        Some(Term::Int(last.unwrap_or_default()))
    }

    async fn info(&mut self, message: Message) {
        let Message::Term { term, .. } = message else {
            panic!("{message:?}")
        };
        let Some([Term::Int(worker), Term::Int(number), _]) = term.as_tuple() else {
            panic!("{term:?}")
        };
        let before = self
            .0
            .last
            .lock()
            .unwrap()
            .insert(*worker, *number)
            .unwrap_or_default();
        assert_eq!(
            *number,
            before + 1,
            "worker {worker}: a message is lost, double or out of order"
        );
        add(&self.0.messages);
    }
}

/// Does what its owner says, and tells it of all signals.
async fn puppet(mut mailbox: Mailbox, owner: Pid, seen: Arc<Seen>) {
    let me = Term::Pid(mailbox.pid().clone());
    let mut spawned = None;
    while let Some(message) = mailbox.recv().await {
        let mut answers = Vec::new();
        match message {
            Message::Exit { from, reason } => {
                add(&seen.exits_there);
                answers.push((
                    Address::from(&owner),
                    Term::tuple([Term::atom("exited"), me.clone(), Term::Pid(from), reason]),
                ));
            }
            Message::Down {
                reference,
                target,
                reason,
            } => {
                let whom = match target {
                    _ if spawned.as_ref() == Some(&reference) => {
                        add(&seen.spawns_there);
                        Term::atom("spawned")
                    }
                    Address::Pid(pid) => {
                        add(&seen.downs_there);
                        Term::Pid(pid)
                    }
                    other => panic!("{other:?}"),
                };
                answers.push((
                    Address::from(&owner),
                    Term::tuple([Term::atom("down"), me.clone(), whom, reason]),
                ));
            }
            Message::Spawned { result, .. } => {
                result.expect("erlang:exit/1 can be spawned");
                answers.push((
                    Address::from(&owner),
                    Term::tuple([Term::atom("spawned"), me.clone()]),
                ));
            }
            Message::Term { term, .. } => {
                let Term::Tuple(parts) = term else {
                    panic!("{term:?}")
                };
                let done = |label: &str, rest: Option<Term>| {
                    let head = [Term::atom(label), me.clone()];
                    (Address::from(&owner), Term::tuple(head.into_iter().chain(rest)))
                };
                match (parts[0].as_atom().unwrap(), &parts[1..]) {
                    ("die", [reason]) => return mailbox.close(reason.clone()),
                    ("watch", [Term::Pid(child), Term::Int(times)]) => {
                        for _ in 0..*times {
                            mailbox.monitor(child).await;
                        }
                        answers.push(done("watching", Some(Term::Pid(child.clone()))));
                    }
                    ("watch_and_take_back", [Term::Pid(child)]) => {
                        let reference = mailbox.monitor(child).await;
                        mailbox.link(child).await;
                        mailbox.demonitor(&reference);
                        mailbox.unlink(child);
                        add(&seen.taken_back);
                        answers.push(done("taken_back", Some(Term::Pid(child.clone()))));
                    }
                    ("spawn", [reason]) => {
                        let node = owner.node.as_str();
                        let (options, args) = (SpawnOptions::new().monitor(), vec![reason.clone()]);
                        let asked = mailbox.spawn_request(node, "erlang", "exit", args, options).await;
                        spawned = Some(asked.unwrap());
                    }
                    ("register", [Term::Atom(name)]) => {
                        mailbox.register(name.as_str()).unwrap();
                        answers.push(done("registered", None));
                    }
                    ("to_alias", [Term::Reference(alias), Term::Int(times)]) => {
                        for i in 1..=*times {
                            add(&seen.to_alias);
                            let message = Term::tuple([Term::atom("to_alias"), me.clone(), Term::Int(i)]);
                            answers.push((Address::from((**alias).clone()), message));
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
            other => panic!("{other:?}"),
        }
        for (to, answer) in answers {
            mailbox.send(to, &answer).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_signal_is_accounted_for() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seconds = number("MESHX_SOAK_SECONDS").unwrap_or(15);
    let seed = number("MESHX_SOAK_SEED").unwrap_or_else(|| u64::from(getrandom::u32().unwrap()));
    println!("MESHX_SOAK_SEED={seed} MESHX_SOAK_SECONDS={seconds}");

    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let seen = Arc::new(Seen::default());
    let sink = node.start_server("sink", Sink(Arc::clone(&seen))).unwrap();
    let factory = Factory {
        node: node.clone(),
        seen: Arc::clone(&seen),
        sink,
    };
    node.start_server("factory", factory).unwrap();
    let started = Arc::clone(&seen);
    node.expose("soak", "leave", 1, move |mut args: Vec<Term>| {
        add(&started.spawns_here);
        async move { Err(Raised::Exit(args.remove(0))) }
    });
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    node.connect("cart@127.0.0.1").await.unwrap();
    let mut events = node.events();
    let mut downs = node.events();
    tokio::spawn(async move {
        // Told at once: what fails next only follows from it.
        while let Ok(event) = downs.recv().await {
            if let NodeEvent::Down { .. } = event {
                println!("{event:?}");
            }
        }
    });

    // As text through its console: the BEAM may be one that sees other files.
    let text = SOURCE.replace('\\', "\\\\").replace('"', "\\\"");
    let source = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('%'))
        .collect::<Vec<_>>();
    let load = format!(
        "{{ok, Tokens, _}} = erl_scan:string(\"{}\"), \
         Split = fun(T, {{Form, Forms}}) when element(1, T) =:= dot -> {{[], [lists:reverse([T | Form]) | Forms]}}; \
                    (T, {{Form, Forms}}) -> {{[T | Form], Forms}} end, \
         {{[], Forms}} = lists:foldl(Split, {{[], []}}, Tokens), \
         Parsed = [begin {{ok, F}} = erl_parse:parse_form(X), F end || X <- lists:reverse(Forms)], \
         {{ok, node_soak, Code}} = compile:forms(Parsed), code:load_binary(node_soak, \"node_soak\", Code).",
        source
            .join(" ")
            .replace("?WAIT", "60000")
            .replace("?MODULE", "node_soak")
            .replace("-define(WAIT, 60000).", "")
    );
    assert_eq!(beam.eval(&load).await, "{module,node_soak}");

    let run = format!(
        "node_soak:run('search@127.0.0.1', {seed}, {WORKERS}, {}).",
        seconds * 1000
    );
    beam.ask(&run).await;
    let patience = Duration::from_secs(seconds + 120);
    let counts = tokio::time::timeout(patience, beam.long_answer(patience))
        .await
        .expect("it hangs");
    let counts = counts.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    println!("the BEAM counted {counts}");
    let counts: BTreeMap<String, u64> = counts
        .trim_matches(['[', ']'])
        .split("},{")
        .map(|pair| {
            let (key, value) = pair.trim_matches(['{', '}']).split_once(',').unwrap();
            (key.to_owned(), value.parse().unwrap())
        })
        .collect();
    let ours = [
        ("messages", &seen.messages),
        ("exits_there", &seen.exits_there),
        ("downs_there", &seen.downs_there),
        ("spawns_there", &seen.spawns_there),
        ("spawns_here", &seen.spawns_here),
        ("to_alias", &seen.to_alias),
        ("taken_back", &seen.taken_back),
    ];
    for (name, count) in ours {
        let (theirs, ours) = (
            counts.get(name).copied().unwrap_or(0),
            count.load(Ordering::Relaxed),
        );
        assert_eq!(ours, theirs, "{name}, seed {seed}");
        assert!(
            seconds < 15 || theirs > 20,
            "{name}: {theirs} is too few to tell anything, seed {seed}"
        );
    }
    // The connection stood all the time, and nothing was dropped on the way.
    while let Ok(event) = events.try_recv() {
        assert!(
            matches!(event, NodeEvent::Tick { .. } | NodeEvent::Up { .. }),
            "{event:?}"
        );
    }
    assert_eq!(beam.eval("length([L || P <- processes(), {links, Ls} <- [process_info(P, links)], L <- Ls, is_pid(L), node(L) =/= node()]).").await, "0");
    // Neither side keeps anything of processes that are gone.
    assert_eq!(beam.eval("length([M || P <- processes(), {monitors, Ms} <- [process_info(P, monitors)], {process, M} <- Ms, is_pid(M), node(M) =/= node()]).").await, "0");
}

//! `meshx node`: a node that a script runs by lines of JSON (docs/cli.md).

use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use meshx_etf::Term;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, broadcast, mpsc, watch};
use tokio::time::timeout;

use super::caller::{MemberArgs, call_failure, rpc_failure, send_failure};
use super::json::{from_json, to_json};
use super::{EX_IOERR, EX_OSERR, EX_USAGE, Failure};
use crate::node::{Address, Caller, Message, Node, NodeEvent, Server};

/// Longest line that is read, in bytes.
const LINE_MAX: u64 = 16 << 20;
/// Lines that wait to be read or written.
const LINES_WAITING: usize = 256;
/// Calls of others that wait for a reply; one more and the oldest is given up: its caller times out.
const CALLS_MAX: usize = 4096;
/// Requests of the script that run at once; further lines wait.
const REQUESTS_MAX: usize = 256;
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node that ends waits while standard output takes nothing, and after a signal for all that waits.
const WRITE_TIME: Duration = Duration::from_secs(2);

/// Run a hidden node that a script drives by lines of JSON
///
/// Prints one JSON object a line for everything that its processes receive, and takes one a line on stdin: send, cast,
/// gen_call, call, reply, ping, peers (docs/cli.md). Ends with stdin, with SIGINT or SIGTERM.
#[derive(Debug, clap::Args)]
pub(super) struct NodeArgs {
    /// Name of the node, as name@host
    name: String,
    /// Name of a process that it has; may be given more than once
    #[arg(long = "process", value_name = "NAME", default_value = "main")]
    processes: Vec<String>,
    /// Stay when stdin ends
    #[arg(long)]
    stay: bool,
    #[command(flatten)]
    member: MemberArgs,
}

/// One line of the script.
#[derive(Debug, Deserialize)]
struct Line {
    /// Comes back with the answer.
    #[serde(default)]
    id: Value,
    #[serde(flatten)]
    request: Request,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Request {
    Send {
        #[serde(flatten)]
        to: To,
        term: Value,
    },
    Cast {
        #[serde(flatten)]
        to: To,
        request: Value,
    },
    GenCall {
        #[serde(flatten)]
        to: To,
        request: Value,
        timeout_ms: Option<u64>,
    },
    Call {
        node: String,
        module: String,
        function: String,
        #[serde(default)]
        args: Vec<Value>,
        timeout_ms: Option<u64>,
    },
    Reply {
        call: u64,
        term: Value,
    },
    Ping {
        node: String,
        timeout_ms: Option<u64>,
    },
    Peers,
}

/// A registered name on a node, or a pid or alias that came in a message.
#[derive(Debug, Deserialize)]
struct To {
    node: Option<String>,
    name: Option<String>,
    to: Option<Value>,
}

pub(super) fn run(args: &NodeArgs) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(EX_OSERR, format!("cannot start: {error}")))?;
    let ended = runtime.block_on(serve(args));
    // A thread that waits for stdin cannot be ended otherwise.
    runtime.shutdown_background();
    ended
}

async fn serve(args: &NodeArgs) -> Result<ExitCode, Failure> {
    let system = |error: std::io::Error| Failure::new(EX_OSERR, error.to_string());
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let node = args.member.join(&args.name).await?;
    let (out, lines) = mpsc::channel(LINES_WAITING);
    let (writes, writing) = watch::channel(false);
    let writer = std::thread::spawn(move || write_lines(lines, &writes));
    let calls = Arc::new(Calls::default());
    let events = tokio::spawn(tell_events(node.events(), out.clone()));
    for process in &args.processes {
        let bridge = Bridge {
            process: process.clone(),
            calls: calls.clone(),
            out: out.clone(),
        };
        node.start_server(process, bridge)
            .map_err(|error| Failure::new(EX_USAGE, format!("--process {process}: {error}")))?;
    }
    let ready = json!({"event": "ready", "node": node.name(), "processes": args.processes});
    let _ = out.send(ready).await;
    let desk = Desk {
        node: node.clone(),
        calls,
        out: out.clone(),
        running: Arc::new(Semaphore::new(REQUESTS_MAX)),
        writing: writing.clone(),
    };
    let (fault, limit) = tokio::select! {
        fault = desk.take_all(read_lines(), args.stay) => (fault, Duration::MAX),
        // Nobody reads what comes.
        () = out.closed() => (None, Duration::MAX),
        _ = interrupt.recv() => (None, WRITE_TIME),
        _ = terminate.recv() => (None, WRITE_TIME),
    };
    events.abort();
    node.stop().await;
    drop((desk, out));
    // Servers end with the node, and with the last of them the writer has written all.
    let written = timeout(limit, all_written(writing.clone()))
        .await
        .unwrap_or(false);
    let unwritten = match written.then(|| writer.join()) {
        Some(Ok(Err(error))) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Some(format!("standard output: {error}"))
        }
        // The thread is left to the end of the process.
        None if *writing.borrow() => Some("standard output takes nothing".to_owned()),
        _ => None,
    };
    match fault.or(unwritten) {
        None => Ok(ExitCode::SUCCESS),
        Some(fault) => Err(Failure::new(EX_IOERR, fault)),
    }
}

/// Calls whose reply the script owes.
#[derive(Default)]
struct Calls {
    // Held for a look-up or a change, never across an await.
    open: Mutex<(u64, BTreeMap<u64, Caller>)>,
}

impl Calls {
    fn enter(&self, caller: Caller) -> u64 {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let number = open.0 + 1;
        open.0 = number;
        if open.1.len() >= CALLS_MAX {
            open.1.pop_first();
            tracing::warn!(max = CALLS_MAX, "calls wait for a reply: the oldest was given up");
        }
        open.1.insert(number, caller);
        number
    }

    fn take(&self, number: u64) -> Option<Caller> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.1.remove(&number)
    }
}

/// A process whose messages become lines. While stdout takes none, messages wait in its bounded mailbox.
struct Bridge {
    process: String,
    calls: Arc<Calls>,
    out: mpsc::Sender<Value>,
}

impl Bridge {
    async fn tell(&self, event: &str, mut line: Value) {
        line["event"] = json!(event);
        line["process"] = json!(self.process);
        let _ = self.out.send(line).await;
    }
}

impl Server for Bridge {
    async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
        let call = self.calls.enter(caller);
        self.tell("call", json!({"call": call, "request": to_json(&request)}))
            .await;
        None
    }

    async fn cast(&mut self, request: Term) {
        self.tell("cast", json!({"request": to_json(&request)})).await;
    }

    async fn info(&mut self, message: Message) {
        if let Message::Term { term, .. } = message {
            self.tell("message", json!({"term": to_json(&term)})).await;
        }
    }
}

async fn tell_events(mut events: broadcast::Receiver<NodeEvent>, out: mpsc::Sender<Value>) {
    loop {
        let line = match events.recv().await {
            Ok(NodeEvent::Up { node, identity, .. }) => {
                json!({"event": "up", "node": node, "identity": identity})
            }
            Ok(NodeEvent::Down { node, reason }) => {
                json!({"event": "down", "node": node, "reason": reason.to_string()})
            }
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if out.send(line).await.is_err() {
            return;
        }
    }
}

/// Takes the script's lines.
struct Desk {
    node: Node,
    calls: Arc<Calls>,
    out: mpsc::Sender<Value>,
    running: Arc<Semaphore>,
    /// Whether a line is being written.
    writing: watch::Receiver<bool>,
}

impl Desk {
    /// Until there are no more, or why no more can be read.
    async fn take_all(
        &self,
        mut lines: mpsc::Receiver<Result<Vec<u8>, String>>,
        stay: bool,
    ) -> Option<String> {
        let mut over = None;
        while let Some(line) = lines.recv().await {
            let line = match line {
                Ok(line) if line.trim_ascii().is_empty() => continue,
                Ok(line) => line,
                Err(fault) => {
                    let _ = self.out.send(json!({"error": fault})).await;
                    over = Some(fault);
                    break;
                }
            };
            match serde_json::from_slice::<Line>(&line) {
                Ok(Line { id, request }) => self.take(id, request).await,
                Err(error) => {
                    let text = format!("no request: {error}");
                    let _ = self.out.send(json!({"error": text})).await;
                }
            }
        }
        // Answers that are still to come are waited for, unless there is no way out for them.
        tokio::select! {
            _ = self.running.acquire_many(REQUESTS_MAX as u32) => {}
            () = self.stuck() => {}
        }
        if stay && over.is_none() {
            std::future::pending::<()>().await;
        }
        over
    }

    /// Until as many lines wait as may and standard output takes none of them.
    async fn stuck(&self) {
        let mut writing = self.writing.clone();
        loop {
            match timeout(WRITE_TIME, writing.changed()).await {
                Ok(Ok(())) => {}
                Err(_elapsed) if self.out.capacity() > 0 => {}
                _ => return,
            }
        }
    }

    /// Messages leave in the order of the lines; what waits for an answer does not hold up the next line.
    async fn take(&self, id: Value, request: Request) {
        match request {
            Request::Send { .. } | Request::Cast { .. } | Request::Reply { .. } | Request::Peers => {
                let answer = self.do_at_once(request).await;
                // Silence is success, unless an id asks for a word.
                if answer.is_err() || !id.is_null() {
                    let _ = self.out.send(answered(&id, answer)).await;
                }
            }
            Request::GenCall { .. } | Request::Call { .. } | Request::Ping { .. } => {
                let Ok(permit) = self.running.clone().acquire_owned().await else {
                    return;
                };
                let (node, out) = (self.node.clone(), self.out.clone());
                tokio::spawn(async move {
                    let answer = ask(&node, request).await;
                    let _ = out.send(answered(&id, answer)).await;
                    drop(permit);
                });
            }
        }
    }

    async fn do_at_once(&self, request: Request) -> Result<Value, String> {
        let failed = |error| send_failure(error).to_string();
        match request {
            Request::Send { to, term } => {
                let (to, term) = (address(to)?, from_json(term)?);
                self.node.send(to, &term).await.map_err(failed)?;
            }
            Request::Cast { to, request } => {
                let (to, request) = (address(to)?, from_json(request)?);
                self.node.gen_cast(to, request).await.map_err(failed)?;
            }
            Request::Reply { call, term } => {
                let term = from_json(term)?;
                let caller = self
                    .calls
                    .take(call)
                    .ok_or_else(|| format!("no call {call} waits for a reply"))?;
                caller.reply(term).await.map_err(failed)?;
            }
            _ => {
                let peer =
                    |peer: &crate::node::PeerInfo| json!({"node": peer.node, "identity": peer.identity});
                return Ok(self.node.peers().iter().map(peer).collect());
            }
        }
        Ok(Value::Null)
    }
}

async fn ask(node: &Node, request: Request) -> Result<Value, String> {
    let wait = |ms: Option<u64>| ms.map_or(TIMEOUT, Duration::from_millis);
    match request {
        Request::GenCall {
            to,
            request,
            timeout_ms,
        } => {
            let (to, request) = (address(to)?, from_json(request)?);
            let answer = node.gen_call(to, request, wait(timeout_ms)).await;
            answer
                .map(|term| to_json(&term))
                .map_err(|error| call_failure(error).to_string())
        }
        Request::Call {
            node: target,
            module,
            function,
            args,
            timeout_ms,
        } => {
            let args = args.into_iter().map(from_json).collect::<Result<_, _>>()?;
            let answer = node
                .rpc(&target, &module, &function, args, wait(timeout_ms))
                .await;
            answer
                .map(|term| to_json(&term))
                .map_err(|error| rpc_failure(error).to_string())
        }
        Request::Ping {
            node: target,
            timeout_ms,
        } => {
            let answer = node.ping(&target, wait(timeout_ms)).await;
            answer
                .map(|()| json!("pong"))
                .map_err(|error| call_failure(error).to_string())
        }
        _ => Err("not a question".into()),
    }
}

fn answered(id: &Value, answer: Result<Value, String>) -> Value {
    match answer {
        Ok(value) => json!({"id": id, "ok": value}),
        Err(text) => json!({"id": id, "error": text}),
    }
}

fn address(to: To) -> Result<Address, String> {
    match to {
        To {
            node: Some(node),
            name: Some(name),
            to: None,
        } => Ok(Address::from((name.as_str(), node.as_str()))),
        To {
            node: None,
            name: None,
            to: Some(to),
        } => match from_json(to)? {
            Term::Pid(pid) => Ok(Address::Pid(pid)),
            Term::Reference(alias) => Ok(Address::Alias(*alias)),
            other => Err(format!("to is {other}, wanted a pid or an alias")),
        },
        _ => Err("wanted node and name, or to with a pid".into()),
    }
}

/// Lines of stdin, from a thread that may wait for ever.
fn read_lines() -> mpsc::Receiver<Result<Vec<u8>, String>> {
    let (sender, lines) = mpsc::channel(LINES_WAITING);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut bytes = Vec::new();
            let read = input.by_ref().take(LINE_MAX + 1).read_until(b'\n', &mut bytes);
            let line = match read {
                Ok(0) => return,
                Ok(_) if bytes.len() as u64 > LINE_MAX => {
                    Err(format!("a line of more than {LINE_MAX} bytes"))
                }
                Ok(_) => Ok(bytes),
                Err(error) => Err(format!("stdin: {error}")),
            };
            let last = line.is_err();
            if sender.blocking_send(line).is_err() || last {
                return;
            }
        }
    });
    lines
}

/// Waits for the writer's end. False when standard output takes nothing any more.
async fn all_written(mut writing: watch::Receiver<bool>) -> bool {
    loop {
        match timeout(WRITE_TIME, writing.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_ended)) => return true,
            Err(_elapsed) if !*writing.borrow() => {}
            Err(_elapsed) => return false,
        }
    }
}

/// Until nothing more can come, or nobody reads it.
fn write_lines(mut lines: mpsc::Receiver<Value>, writing: &watch::Sender<bool>) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    while let Some(line) = lines.blocking_recv() {
        writing.send_replace(true);
        writeln!(out, "{line}")?;
        if lines.is_empty() {
            out.flush()?;
        }
        writing.send_replace(false);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_read_as_documented() {
        for line in [
            r#"{"op":"send","node":"a@h","name":"x","term":1}"#,
            r#"{"op":"send","to":{"$external":"8358770361406800000001000000000000000b"},"term":1}"#,
            r#"{"op":"cast","node":"a@h","name":"x","request":1}"#,
            r#"{"id":1,"op":"gen_call","node":"a@h","name":"x","request":1,"timeout_ms":5}"#,
            r#"{"id":"a","op":"call","node":"a@h","module":"m","function":"f"}"#,
            r#"{"op":"reply","call":1,"term":null}"#,
            r#"{"id":[],"op":"ping","node":"a@h"}"#,
            r#"{"op":"peers"}"#,
        ] {
            assert!(serde_json::from_str::<Line>(line).is_ok(), "{line}");
        }
        for line in ["", "1", "{}", r#"{"op":"other"}"#, r#"{"op":"reply","term":1}"#] {
            assert!(serde_json::from_str::<Line>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn an_address_is_a_name_or_a_pid() {
        let to = |json: &str| address(serde_json::from_str(json).unwrap());
        assert!(to(r#"{"node":"a@h","name":"x"}"#).is_ok());
        assert!(to(r#"{"to":{"$external":"8358770361406800000001000000000000000b"}}"#).is_ok());
        for json in [
            r#"{"node":"a@h"}"#,
            r#"{"to":1}"#,
            r#"{"node":"a@h","name":"x","to":1}"#,
            "{}",
        ] {
            assert!(to(json).is_err(), "{json}");
        }
    }
}

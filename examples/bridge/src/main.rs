//! A bridge between programs that speak lines of JSON over TCP and the servers of an Erlang cluster.
//!
//! ```text
//! {"id": 1, "do": "find", "with": "lamp"}        client -> GenServer.call({:search, :"search@h3"}, {:find, "lamp"})
//! {"id": 1, "ok": [{"id": 1, "title": ...}]}     client <- its answer
//! {"subscribe": "orders"}                        client
//! {"topic": "orders", "data": {"id": 7}}         client <- GenServer.cast({:bridge, :"bridge@h4"}, {:publish, "orders", %{id: 7}})
//! ```
//!
//! See README.md for how to run it.

mod client;
mod route;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use client::Event;
use meshx::node::{Caller, Node, Server, read_cookie};
use meshx_etf::{Term, from_term};
use route::Route;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, broadcast};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Clients at a time.
const CLIENTS_MAX: usize = 256;
/// Events that wait for a slow client; older ones are lost to it.
const EVENTS_WAITING: usize = 1024;
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Lines of JSON over TCP to servers of an Erlang cluster, and events back.
#[derive(Debug, Parser)]
struct Args {
    /// Full name of this node; the agent must own the host part
    #[arg(long, value_name = "NODE")]
    name: String,
    /// Where clients connect; whoever can, may use every route
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// What clients may ask for, as find=search@search@h3; may be given more than once
    #[arg(long = "route", value_name = "NAME=PROCESS@NODE")]
    routes: Vec<Route>,
    /// The cluster's cookie; other users of this host can see it in the process list
    #[arg(long, value_name = "COOKIE", conflicts_with = "cookie_file")]
    cookie: Option<String>,
    /// File with the cluster's cookie [default: ~/.erlang.cookie]
    #[arg(long, value_name = "FILE")]
    cookie_file: Option<PathBuf>,
    /// The agent's directory [default: $MESHX_DIR, $XDG_RUNTIME_DIR/meshx, /tmp/meshx-UID]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    // RUST_LOG says what is logged; warnings, if it says nothing.
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bridge: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let cookie = match args.cookie {
        Some(cookie) => cookie,
        None => read_cookie(args.cookie_file.as_deref())?,
    };
    let mut builder = Node::builder(args.name).cookie(cookie);
    if let Some(dir) = args.dir {
        builder = builder.agent_dir(dir);
    }
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let listener = TcpListener::bind(args.listen).await?;
    let node = builder.start().await?;
    let events = broadcast::Sender::new(EVENTS_WAITING);
    let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
    let bridge = Bridge {
        events: events.clone(),
        clients: clients.clone(),
    };
    node.start_server("bridge", bridge)?;
    println!("ready {} listening on {}", node.name(), listener.local_addr()?);
    tokio::select! {
        () = accept(listener, node.clone(), args.routes.into(), events, clients) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    node.stop().await;
    Ok(())
}

/// Serves clients, as many as there is room for; others wait.
async fn accept(
    listener: TcpListener,
    node: Node,
    routes: Arc<[Route]>,
    events: broadcast::Sender<Event>,
    clients: Arc<Semaphore>,
) {
    while let Ok(room) = clients.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("bridge: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let client = client::serve(stream, node.clone(), routes.clone(), events.subscribe());
        tokio::spawn(async move {
            if let Err(error) = client.await {
                eprintln!("bridge: a client was dropped: {error}");
            }
            drop(room);
        });
    }
}

/// The cluster's side: takes what BEAMs publish, and says how many clients there are.
struct Bridge {
    events: broadcast::Sender<Event>,
    clients: Arc<Semaphore>,
}

impl Server for Bridge {
    async fn call(&mut self, request: Term, _caller: Caller) -> Option<Term> {
        Some(match request.as_atom() {
            // One place is held for the client that comes next.
            Some("clients") => {
                Term::from((CLIENTS_MAX - self.clients.available_permits()).saturating_sub(1) as u64)
            }
            _ => Term::tuple([Term::atom("error"), Term::binary("wanted clients")]),
        })
    }

    async fn cast(&mut self, request: Term) {
        let Some([what, topic, data]) = request.as_tuple() else {
            return eprintln!("bridge: a cast was no {{publish, Topic, Data}}");
        };
        match (what.as_atom(), topic.as_str(), from_term(data)) {
            (Some("publish"), Some(topic), Ok(data)) => {
                // Nobody listens: nobody misses it.
                let _ = self.events.send(Event {
                    topic: topic.to_owned(),
                    data,
                });
            }
            (_, _, Err(error)) => eprintln!("bridge: published data has no form in JSON: {error}"),
            _ => eprintln!("bridge: a cast was no {{publish, Topic, Data}}"),
        }
    }
}

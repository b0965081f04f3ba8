//! A search service in Rust that joins an Erlang cluster over the mesh.
//!
//! To the BEAMs it is a hidden node with one server, `search`:
//!
//! ```text
//! GenServer.call({:search, :"search@h3"}, {:find, "lamp"})   [%{id: 1, title: "Desk lamp", text: ...}, ...]
//! GenServer.call({:search, :"search@h3"}, {:stats})          %{documents: 6, words: 32, searches: 1}
//! ```
//!
//! See README.md for how to run it.

mod index;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use index::{Document, Index};
use meshx::node::{Caller, Node, Server, read_cookie};
use meshx_etf::Term;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// A search service that joins an Erlang cluster.
#[derive(Debug, Parser)]
struct Args {
    /// Full name of this node; the agent must own the host part
    #[arg(long, value_name = "NODE")]
    name: String,
    /// The cluster's cookie; other users of this host can see it in the process list
    #[arg(long, value_name = "COOKIE", conflicts_with = "cookie_file")]
    cookie: Option<String>,
    /// File with the cluster's cookie [default: ~/.erlang.cookie]
    #[arg(long, value_name = "FILE")]
    cookie_file: Option<PathBuf>,
    /// The agent's directory [default: $MESHX_DIR, $XDG_RUNTIME_DIR/meshx, /tmp/meshx-UID]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Once ready, ask this BEAM node for its release, and print the answer
    #[arg(long, value_name = "NODE")]
    call_on: Option<String>,
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
            eprintln!("search_node: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let cookie = match args.cookie {
        Some(cookie) => cookie,
        None => read_cookie(args.cookie_file.as_deref())?,
    };
    let mut builder = Node::builder(args.name)
        .cookie(cookie)
        // The default suits nodes with OTP's tick time of a minute. An extra tick costs four bytes, and this way
        // the node also stays in a cluster whose BEAMs run with `-kernel net_ticktime 4`.
        .tick_interval(Duration::from_secs(1));
    if let Some(dir) = args.dir {
        builder = builder.agent_dir(dir);
    }
    // Before the node can be seen, so that a signal never finds the default handler.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let node = builder.start().await?;
    node.start_server(
        "search",
        Search {
            index: Index::with_samples(),
            searches: 0,
        },
    )?;
    println!("ready {} creation={}", node.name(), node.creation());

    if let Some(beam) = args.call_on {
        let started = Instant::now();
        let question = vec![Term::atom("otp_release")];
        let release = node
            .rpc(&beam, "erlang", "system_info", question, Duration::from_secs(10))
            .await?;
        let took = started.elapsed().as_micros();
        println!("called {beam}: erlang:system_info(otp_release) = {release} in {took} us");
    }

    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    // Answers that are queued are still written; then the name is free.
    node.stop().await;
    Ok(())
}

/// The server behind the name `search`: one request at a time, so its state needs no lock.
struct Search {
    index: Index,
    searches: u64,
}

impl Server for Search {
    async fn call(&mut self, request: Term, _caller: Caller) -> Option<Term> {
        let reply = match request.as_tuple() {
            Some([what, query]) if what.as_atom() == Some("find") => self.find(query),
            Some([what]) if what.as_atom() == Some("stats") => self.stats(),
            _ => error("bad_request", "wanted {find, Text} or {stats}"),
        };
        Some(reply)
    }
}

impl Search {
    fn find(&mut self, query: &Term) -> Term {
        // Elixir's strings are binaries, Erlang's are lists.
        let text = query.as_str().map(str::to_owned).or_else(|| query.as_charlist());
        let Some(text) = text else {
            return error("bad_query", "wanted a text");
        };
        self.searches += 1;
        Term::list(self.index.find(&text).into_iter().map(document))
    }

    fn stats(&self) -> Term {
        Term::map([
            (Term::atom("documents"), Term::from(self.index.documents() as u64)),
            (Term::atom("words"), Term::from(self.index.words() as u64)),
            (Term::atom("searches"), Term::from(self.searches)),
        ])
    }
}

fn document(document: &Document) -> Term {
    Term::map([
        (Term::atom("id"), Term::from(document.id)),
        (Term::atom("title"), Term::binary(document.title)),
        (Term::atom("text"), Term::binary(document.text)),
    ])
}

fn error(reason: &str, text: &str) -> Term {
    Term::tuple([
        Term::atom("error"),
        Term::tuple([Term::atom(reason), Term::binary(text)]),
    ])
}

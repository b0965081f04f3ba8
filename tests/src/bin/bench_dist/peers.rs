//! Nodes that are no VMs, many in a process of its own: `bench_dist peers COOKIE DIR NAME DIR NAME ...`.
//!
//! Takes the commands of tests/bench/bench_dist.erl, each for all of its nodes together.

use std::io::BufRead;
use std::time::Duration;

use meshx::node::Node;
use meshx_tests::{Context, Result};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;

/// The first argument.
pub(crate) const WORD: &str = "peers";
/// As many at a time as a VM has.
const AT_ONCE: usize = 8;
const PAUSE_MAX: Duration = Duration::from_secs(5);

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (cookie, places) = arguments
        .split_first()
        .ok_or("wanted: peers COOKIE DIR NAME ...")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let mut nodes = Vec::new();
        for place in places.chunks_exact(2) {
            let builder = Node::builder(&place[1])
                .cookie(cookie)
                .hidden(false)
                .agent_dir(&place[0]);
            nodes.push(builder.start().await.context(&place[1])?);
        }
        println!("ready {}", std::process::id());
        for line in std::io::stdin().lock().lines() {
            let line = line.context("standard input")?;
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let (what, all) = words.split_first().ok_or("an empty line")?;
            let mut tasks = JoinSet::new();
            for node in &nodes {
                let (node, all) = (node.clone(), all.to_vec());
                match what.as_str() {
                    "meet" => tasks.spawn(meet(node, all)),
                    "leave" => tasks.spawn(leave(node)),
                    _ => return Err(format!("no command: {line}")),
                };
            }
            let mut again = 0;
            while let Some(done) = tasks.join_next().await {
                again += done.context("run a task")??;
            }
            println!("done {again}");
        }
        for node in nodes {
            node.stop().await;
        }
        Ok(())
    })
}

/// Dials those that stand behind it, and waits for all. How many attempts were not the first.
async fn meet(node: Node, all: Vec<String>) -> Result<usize> {
    let events = node.events();
    let at = all.iter().position(|name| name == node.name());
    let behind = &all[at.ok_or("it is not among them")? + 1..];
    let mut dialling = JoinSet::new();
    for part in 0..AT_ONCE {
        let names: Vec<String> = behind.iter().skip(part).step_by(AT_ONCE).cloned().collect();
        let node = node.clone();
        dialling.spawn(async move {
            let mut again = 0;
            for name in names {
                let mut failures = 0;
                while node.connect(&name).await.is_err() {
                    // As MeshxNode.Cluster does it.
                    let pause = Duration::from_millis(200 << failures.min(10)).min(PAUSE_MAX);
                    tokio::time::sleep(pause).await;
                    failures += 1;
                }
                again += failures;
            }
            again
        });
    }
    let mut again = 0;
    while let Some(done) = dialling.join_next().await {
        again += done.context("dial")?;
    }
    connected(&node, events, all.len() - 1).await?;
    Ok(again)
}

async fn leave(node: Node) -> Result<usize> {
    let events = node.events();
    for other in node.nodes() {
        node.disconnect(&other);
    }
    connected(&node, events, 0).await.map(|()| 0)
}

type Events = tokio::sync::broadcast::Receiver<meshx::node::NodeEvent>;

async fn connected(node: &Node, mut events: Events, count: usize) -> Result<()> {
    while node.nodes().len() != count {
        match events.recv().await {
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return Err("the node ended".into()),
        }
    }
    Ok(())
}

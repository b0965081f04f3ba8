//! The node of ours that is measured, in a process of its own: `bench_cnode peer NAME COOKIE REMOTE EPMD-PORT`.
//!
//! Commands are those of tests/libei/ei_node.c, and `monitors COUNT`, `mailboxes COUNT`, `drop 0`. The server `echo` answers
//! calls with their request.

use std::io::BufRead;
use std::net::{Ipv4Addr, SocketAddr};

use meshx::node::{Mailbox, Message, Node};
use meshx_etf::Term;
use meshx_tests::{Context, Result};

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [name, cookie, remote, port] = arguments else {
        return Err("wanted: peer NAME COOKIE REMOTE EPMD-PORT".into());
    };
    let port = port.parse().context("the EPMD's port")?;
    let epmd = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // One, as a program of libei has one: with more, another is woken for each piece that comes while the first reads.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let builder = Node::builder(name.as_str())
            .cookie(cookie.as_str())
            .plain_epmd(epmd);
        let node = builder.start().await.context("start the node")?;
        node.connect(remote).await.context(remote)?;
        node.serve("echo", |request| async move { request })
            .context("echo")?;
        let mut bench = node.register("bench").context("bench")?;
        let mut kept: Vec<Mailbox> = Vec::new();
        println!("ready");
        for line in std::io::stdin().lock().lines() {
            let line = line.context("standard input")?;
            let words: Vec<&str> = line.split(' ').collect();
            let number = |text: &str| text.parse::<u32>().context(text);
            match words.as_slice() {
                // In a task, as the work of a program is: this thread is none of the runtime's, and each message would
                // have to wake it.
                ["send", count, size] => {
                    let (node, remote) = (node.clone(), remote.clone());
                    task(send(node, remote, number(count)?, number(size)?)).await?;
                }
                ["receive", count] => {
                    bench = task(receive(bench, remote.clone(), number(count)?)).await?;
                }
                ["monitors", count] => {
                    let mailbox = node.mailbox();
                    for _ in 0..number(count)? {
                        mailbox.monitor(("sink", remote.as_str())).await;
                    }
                    kept.push(mailbox);
                }
                ["mailboxes", count] => kept.extend((0..number(count)?).map(|_| node.mailbox())),
                ["drop", _] => kept.clear(),
                _ => return Err(format!("no command: {line}")),
            }
            println!("done");
        }
        node.stop().await;
        Ok(())
    })
}

async fn task<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.context("run a task")?
}

async fn send(node: Node, remote: String, count: u32, size: u32) -> Result<()> {
    let remote = remote.as_str();
    let mut mailbox = node.mailbox();
    let start = Term::tuple([
        Term::atom("start"),
        Term::from(mailbox.pid().clone()),
        Term::from(i64::from(count)),
    ]);
    let failed = |error| format!("send: {error}");
    mailbox.send(("sink", remote), &start).await.map_err(failed)?;
    let message = Term::binary(vec![0; size as usize]);
    let mut sink = mailbox.route(("sink", remote));
    for _ in 0..count {
        sink.send(&message).await.map_err(failed)?;
    }
    mailbox
        .recv()
        .await
        .map(drop)
        .ok_or_else(|| "the node ended".into())
}

async fn receive(mut bench: Mailbox, remote: String, count: u32) -> Result<Mailbox> {
    for _ in 0..count {
        match bench.recv().await {
            Some(Message::Term { .. }) => {}
            other => return Err(format!("received {other:?}")),
        }
    }
    let done = Term::atom("done");
    let sent = bench.send(("acks", remote.as_str()), &done).await;
    sent.map_err(|error| format!("send: {error}"))?;
    Ok(bench)
}

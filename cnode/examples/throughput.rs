//! Messages to and from a BEAM, timed: `throughput EPMD_PORT COOKIE send|receive|serve PEER SIZE COUNT`.
//!
//! `send`: COUNT binaries of SIZE bytes go to the process `sink` of PEER, which sends `done` back after the last.
//! `receive`: the process `source` of PEER gets `{Pid, SIZE, COUNT}` and sends as many. Both print one line,
//! `SECONDS CPU_SECONDS`, the second being this process's user and system time meanwhile.
//! `serve`: answers `gen_server:call({echo, 'bench@127.0.0.1'}, Term)` with `Term` until its standard input ends.
//!
//! The benchmark of the C-node runs it beside a twin that is written with C's `erl_interface`.
#![allow(clippy::expect_used, missing_docs)]

use std::io::Read;
use std::time::{Duration, Instant};

use meshx::node::{Message, Node};
use meshx_etf::Term;

fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    // utime and stime, the 12th and 13th field behind the name, in hundredths of a second.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 10)
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failed> {
    // Where a program's processes run: a task of the runtime, not the thread that waits for it.
    tokio::spawn(run()).await?
}

async fn run() -> Result<(), Failed> {
    let args: Vec<String> = std::env::args().collect();
    let [_, port, cookie, mode, peer, size, count] = args.as_slice() else {
        return Err("EPMD_PORT COOKIE send|receive|serve PEER SIZE COUNT".into());
    };
    let (size, count): (usize, usize) = (size.parse()?, count.parse()?);
    let epmd = ([127, 0, 0, 1], port.parse()?).into();
    let node = Node::builder("bench@127.0.0.1")
        .cookie(cookie.as_str())
        .plain_epmd(epmd)
        .start()
        .await?;
    let mut mailbox = node.mailbox();
    if mode == "serve" {
        node.serve("echo", |request: Term| async move { request })?;
        node.connect(peer).await?;
        println!("ready");
        tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await??;
        return Ok(());
    }
    node.connect(peer).await?;
    let (started, cpu_before) = (Instant::now(), cpu());
    if mode == "send" {
        let first = Term::tuple([Term::from(mailbox.pid().clone()), Term::Int(count as i64)]);
        mailbox.send(("sink", peer.as_str()), &first).await?;
        let (mut sink, message) = (
            mailbox.route(("sink", peer.as_str())),
            Term::binary(vec![7; size]),
        );
        for _ in 0..count {
            sink.send(&message).await?;
        }
        mailbox.recv().await.ok_or("the node is down")?;
    } else {
        let order = Term::tuple([
            Term::from(mailbox.pid().clone()),
            Term::Int(size as i64),
            Term::Int(count as i64),
        ]);
        mailbox.send(("source", peer.as_str()), &order).await?;
        for _ in 0..count {
            let Some(Message::Term {
                term: Term::Binary(bytes),
                ..
            }) = mailbox.recv().await
            else {
                return Err("not a binary".into());
            };
            assert_eq!(bytes.len(), size);
        }
    }
    println!(
        "{} {}",
        started.elapsed().as_secs_f64(),
        (cpu() - cpu_before).as_secs_f64()
    );
    node.stop().await;
    Ok(())
}

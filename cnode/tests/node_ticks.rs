//! Idle connections stay up, and silent peers are noticed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::time::Duration;

use meshx::node::{DownReason, NodeEvent};
use node_support::{Beam, COOKIE, Epmd, LONG, soon};
use tokio::sync::broadcast::Receiver;

async fn next_tick(events: &mut Receiver<NodeEvent>) -> u64 {
    loop {
        match soon(events.recv()).await.unwrap() {
            NodeEvent::Tick { received, .. } => return received,
            // It may be told a moment after the first answer came.
            NodeEvent::Up { .. } => {}
            other => panic!("{other:?} instead of a tick"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_outlives_the_tick_time_several_times() {
    let epmd = Epmd::start().await;
    let node = epmd
        .builder("search@127.0.0.1")
        .net_ticktime(Duration::from_secs(4))
        .tick_interval(Duration::from_secs(1))
        .start()
        .await
        .unwrap();
    let mut beam = Beam::start(epmd.addr, "cart@127.0.0.1", &["-kernel", "net_ticktime", "4"]).await;
    beam.eval("monitor_node('search@127.0.0.1', true).").await;
    node.ping("cart@127.0.0.1", LONG).await.unwrap();
    let mut events = node.events();
    // A BEAM with this setting ticks once a second: 14 ticks are more than three tick times.
    let first = next_tick(&mut events).await;
    while next_tick(&mut events).await < first + 13 {}
    let peer = node.peers().pop().expect("the connection is up");
    assert!(peer.ticks_in >= 14, "{peer:?}");
    assert!(peer.ticks_out >= 10, "the BEAM was given its ticks: {peer:?}");
    assert_eq!(
        beam.eval("receive {nodedown, N} -> N after 0 -> up end.").await,
        "up"
    );
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_down_after_the_tick_time() {
    let epmd = Epmd::start().await;
    let node = epmd
        .builder("search@127.0.0.1")
        .net_ticktime(Duration::from_secs(2))
        .start()
        .await
        .unwrap();
    // Ticks every 15 s: far too seldom for this node.
    let quiet = epmd.builder("quiet@127.0.0.1").start().await.unwrap();
    let mut events = node.events();
    quiet.ping("search@127.0.0.1", LONG).await.unwrap();
    assert!(matches!(soon(events.recv()).await, Ok(NodeEvent::Up { .. })));
    let down = soon(events.recv()).await.unwrap();
    let reason = DownReason::Silent(Duration::from_secs(2));
    assert_eq!(
        down,
        NodeEvent::Down {
            node: "quiet@127.0.0.1".into(),
            reason
        }
    );
}

#[tokio::test]
async fn ticks_that_are_too_seldom_are_refused() {
    let epmd = Epmd::start().await;
    let builder = epmd.builder("a@127.0.0.1").net_ticktime(Duration::from_secs(4));
    let refused = builder
        .clone()
        .tick_interval(Duration::from_millis(1001))
        .start()
        .await;
    assert!(refused.unwrap_err().to_string().contains("at most a quarter"));
    builder
        .tick_interval(Duration::from_secs(1))
        .start()
        .await
        .unwrap();
    let unsafe_road = meshx::node::Node::builder("a@h")
        .cookie(COOKIE)
        .plain_epmd(([192, 0, 2, 1], 4369).into());
    assert!(
        unsafe_road
            .start()
            .await
            .unwrap_err()
            .to_string()
            .contains("not a loopback address")
    );
}

//! Bytes both ways until both ends have closed.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::flow::{BUFFER, Flow};
use super::frames::Duplex;
use super::keepalive;
use super::links::LinkGuard;

/// Carries bytes until both directions have ended, each for itself, or the link is cut. There is no idle
/// limit: a distribution link has ticks of its own, and an RPC connection may wait for days.
pub(super) async fn splice(
    mut local: Box<dyn Duplex>,
    mut remote: Box<dyn Duplex>,
    link: &LinkGuard,
    grace: Duration,
) -> io::Result<()> {
    link.opened();
    let counters = link.counters();
    let (mut out, mut back) = (Flow::default(), Flow::default());
    // Distribution knows by itself what is whole. A way that ends in order takes this back.
    if !link.is_dist() {
        local.breaks_off(true);
        remote.breaks_off(true);
    }
    let there = remote.addresses();
    let gone = async {
        match there {
            Some((here, there)) => keepalive::gone(here, there).await,
            None => std::future::pending().await,
        }
    };
    let both = async {
        let ended = poll_fn(|cx| {
            let out = out.poll(cx, local.as_mut(), remote.as_mut(), &counters.bytes_out)?;
            let back = back.poll(cx, remote.as_mut(), local.as_mut(), &counters.bytes_in)?;
            match (out, back) {
                (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(io::Result::Ok(())),
                _ => Poll::Pending,
            }
        });
        let ended = ended.await;
        // Who takes no more may have said why, as a web server does that is sent too much.
        if out.refused() || back.refused() {
            let last = poll_fn(|cx| match out.refused() {
                true => back.poll(cx, remote.as_mut(), local.as_mut(), &counters.bytes_in),
                false => out.poll(cx, local.as_mut(), remote.as_mut(), &counters.bytes_out),
            });
            let _ = timeout(grace, last).await;
        }
        ended
    };
    tokio::select! {
        // First: a link that was cut before it began carries nothing.
        biased;
        () = link.cut().cancelled() => {}
        ended = both => {
            tracing::debug!(?ended, "link ended");
            if ended.is_ok() || !(link.is_dist() && link.has_other_agent()) {
                return ended;
            }
            // Without a goodbye: the other agent may have cut it by a rule that this one is just about to hear of. The
            // node is to be told that, and not that the connection was closed. Who ends here for another reason says
            // goodbye, so that nobody waits there.
            let goodbye = timeout(grace, remote.shutdown());
            let (_, cut) = tokio::join!(goodbye, timeout(grace, link.cut().cancelled()));
            if cut.is_err() {
                return ended;
            }
        }
        () = gone => link.is_gone("the other host acknowledges nothing that it is sent"),
    }
    // The far end is closed at once. A node at the near one hears the reason from its agent and closes by itself, so that
    // it can tell its processes why; a service has no ear for it.
    drop(remote);
    if !link.is_dist() {
        return Ok(());
    }
    let mut discarded = vec![0; BUFFER];
    let closed = async { while local.read(&mut discarded).await.is_ok_and(|read| read > 0) {} };
    let _ = timeout(grace, closed).await;
    Ok(())
}

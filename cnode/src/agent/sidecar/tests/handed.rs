//! Sidecars that go to a successor of the agent's process. Both are this one here; what they share is what they would.

use std::os::fd::OwnedFd;

use rustix::process::{Pid, Signal, kill_process};

use super::*;

/// Says its id, and a line for each SIGUSR1.
const TELLS: &str = "trap 'echo here' USR1; echo $$; while :; do sleep 0.02; done";

fn signal(pid: &str, signal: Signal) {
    kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), signal).unwrap();
}

async fn freeze(handle: &SidecarHandle) -> Frozen {
    handle.freezer("shop-1").freeze().await.unwrap().unwrap()
}

fn successor(world: &World) -> Sidecars {
    Sidecars::succeed(world.mesh.clone(), world.dir(), world.settings()).unwrap()
}

/// What would come over a socket.
fn over(frozen: &Frozen) -> (HandedSidecar, Vec<OwnedFd>) {
    let handed = serde_json::to_vec(&frozen.handed).unwrap();
    let files: Vec<_> = frozen
        .files
        .iter()
        .map(|file| file.try_clone().unwrap())
        .collect();
    assert_eq!(frozen.handed.files(), files.len());
    (serde_json::from_slice(&handed).unwrap(), files)
}

/// Started by the one, which hears its first lines, and kept up by the other.
async fn handed_over<const LINES: usize>(
    world: &World,
    text: &str,
) -> ([String; LINES], SidecarHandle, Events) {
    let first = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let handle = first.start(script(text), sender).await.unwrap();
    let mut lines = Vec::new();
    for _ in 0..LINES {
        lines.push(events.line().await);
    }
    let frozen = freeze(&handle).await;
    let (handed, files) = over(&frozen);
    let (sender, later) = super::events();
    let kept = successor(world).resume(handed, files, sender).await.unwrap();
    soon("the first to let go", frozen.leave()).await;
    drop((handle, first));
    assert_eq!(events.0.recv().await, None, "the first says nothing more");
    (lines.try_into().unwrap(), kept, later)
}

#[tokio::test]
async fn a_running_sidecar_is_kept_up_by_the_successor() {
    let world = World::new();
    let ([pid], kept, mut events) = handed_over(&world, TELLS).await;
    signal(&pid, Signal::USR1);
    assert_eq!(events.line().await, "here", "it lives, and is heard");
    // And so on: what was handed over is again, with what it offers by now.
    let offered = SidecarUpstream {
        target: service("cart"),
        bind: anywhere(),
    };
    kept.set_upstreams(vec![offered.clone()]).unwrap();
    let frozen = freeze(&kept).await;
    let (handed, files) = over(&frozen);
    assert_eq!(handed.spec.upstreams, [offered]);
    let (sender, mut events) = super::events();
    let last = successor(&world).resume(handed, files, sender).await.unwrap();
    soon("the second to let go", frozen.leave()).await;
    drop(kept);
    signal(&pid, Signal::USR1);
    assert_eq!(events.line().await, "here");
    assert_eq!(fs::read_dir(world.dir()).unwrap().count(), 1);
    soon("stop", last.stop()).await;
    until("its end", || !lives(&pid)).await;
    assert_eq!(fs::read_dir(world.dir()).unwrap().count(), 0, "keys stay nowhere");
}

#[tokio::test]
async fn one_that_ends_with_the_successor_is_started_again() {
    let world = World::new();
    let text = format!("{LEAVES_ITS_GROUP} {TELLS}");
    let ([child, pid], kept, mut events) = handed_over(&world, &text).await;
    signal(&pid, Signal::KILL);
    let (text, final_) = events.down().await;
    assert!(
        !final_ && text.contains("an earlier process of this agent"),
        "{text}"
    );
    let (next_child, next) = (events.line().await, events.line().await);
    assert_ne!(next, pid);
    // What left the group went with it.
    until("the end of its child", || !lives(&child)).await;
    assert!(lives(&next) && lives(&next_child));
    soon("stop", kept.stop()).await;
    until("the end", || !lives(&next) && !lives(&next_child)).await;
}

#[tokio::test]
async fn without_its_agent_it_ends_as_ever() {
    let world = World::new();
    let ([pid], kept, mut events) = handed_over(&world, TELLS).await;
    // As by SIGKILL: nobody stops it, only the pipe of its guard is gone.
    let frozen = freeze(&kept).await;
    kept.task.abort();
    drop(frozen);
    until("its end", || !lives(&pid)).await;
    assert_eq!(soon("the end of events", events.0.recv()).await, None);
}

#[tokio::test]
async fn when_the_takeover_fails_it_goes_on_here() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let handle = sidecars.start(script(TELLS), sender).await.unwrap();
    let pid = events.line().await;
    let frozen = freeze(&handle).await;
    // What happens meanwhile is seen to later.
    signal(&pid, Signal::KILL);
    let (handed, files) = over(&frozen);
    drop((handed, files, frozen));
    let (_, final_) = events.down().await;
    assert!(!final_);
    let next = events.line().await;
    soon("stop", handle.stop()).await;
    until("its end", || !lives(&next)).await;
}

#[tokio::test]
async fn one_between_two_runs_or_at_its_end_goes_over_as_that() {
    let world = World::new();
    let settings = Settings {
        backoff: Backoff {
            min: PATIENCE,
            max: PATIENCE,
        },
        ..world.settings()
    };
    let sidecars = world.sidecars(settings);
    let (sender, mut events) = events();
    let spec = SidecarSpec {
        max_restarts: 1,
        ..script("echo $$; exit 1")
    };
    let handle = sidecars.start(spec, sender).await.unwrap();
    events.down().await;
    let frozen = freeze(&handle).await;
    let (handed, files) = over(&frozen);
    assert!(files.is_empty(), "nothing runs");
    // The successor has its own backoff, and starts it at once.
    let (sender, mut later) = super::events();
    let kept = successor(&world).resume(handed, files, sender).await.unwrap();
    frozen.leave().await;
    later.line().await;
    while !later.down().await.1 {}
    until("its end", || kept.task.is_finished()).await;
    assert!(kept.freezer("shop-1").freeze().await.unwrap().is_none());
}

#[tokio::test]
async fn one_whose_client_takes_no_events_is_told_of() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    // Its end cannot be told.
    let (sender, receiver) = mpsc::channel(1);
    let handle = sidecars.start(script("echo so; exit 1"), sender).await.unwrap();
    until("a line that nobody takes", || receiver.len() == 1).await;
    let dir = fs::read_dir(world.dir()).unwrap().next().unwrap().unwrap();
    let pids = dir.path().join("pids");
    let ended = || {
        let text = fs::read_to_string(&pids).unwrap_or_default();
        text.lines().all(|line| !lives(line.split(' ').next().unwrap()))
    };
    until("its end", ended).await;
    // Until its end has been noticed it is handed over, and goes on when it is not taken.
    let text = loop {
        match handle.freezer("shop-1").freeze().await {
            Ok(frozen) => drop(frozen.unwrap()),
            Err(text) => break text,
        }
    };
    assert!(text.contains("shop-1 is busy"), "{text}");
}

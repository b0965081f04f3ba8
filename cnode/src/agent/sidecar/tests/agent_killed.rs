//! An agent that is killed leaves no process behind.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use super::*;

/// Set for the process that plays the agent: what it does.
const PLAY: &str = "MESHX_TEST_PLAY_AGENT";
const READY: &str = "sidecar processes: ";

/// Not a test of its own: the process that the others start and kill.
#[tokio::test]
async fn plays_the_agent() {
    let Some(part) = std::env::var_os(PLAY) else {
        return;
    };
    let world = World::new();
    let dir = PathBuf::from(part);
    let sidecars = Sidecars::new(world.mesh.clone(), dir.clone(), world.settings()).unwrap();
    let (sender, mut events) = events();
    let _handle = sidecars
        .start(
            script(&format!(
                "trap '' TERM HUP; sleep 600 & echo $!; {LEAVES_ITS_GROUP} echo $PPID; echo $$; sleep 600"
            )),
            sender,
        )
        .await
        .unwrap();
    let mut pids = Vec::new();
    for _ in 0..4 {
        pids.push(events.line().await);
    }
    println!("{READY}{}", pids.join(" "));
    std::future::pending::<()>().await;
}

/// Starts it and waits for its sidecar: child in the group, child that left it, parent, the sidecar itself.
fn agent(dir: &Path) -> (std::process::Child, Vec<String>) {
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "agent::sidecar::tests::agent_killed::plays_the_agent",
            "--nocapture",
        ])
        .env(PLAY, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pids = BufReader::new(agent.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split(READY).nth(1)?.split(' ').map(str::to_owned).collect()))
        .expect("the agent ended");
    (agent, pids)
}

#[tokio::test]
async fn a_killed_agents_sidecar_ends_and_the_next_agent_finds_the_rest() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("sidecars");
    let (mut agent, pids) = agent(&dir);
    let [child, left, _, own] = pids.as_slice() else {
        panic!("{pids:?}");
    };
    assert!(lives(child) && lives(left) && lives(own));
    agent.kill().unwrap();
    agent.wait().unwrap();
    until("the end of the group", || !lives(child) && !lives(own)).await;
    assert!(lives(left), "it has left the group");

    let world = World::new();
    Sidecars::new(world.mesh.clone(), dir.clone(), world.settings()).unwrap();
    assert!(!lives(left));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "its keys are gone");
}

#[tokio::test]
async fn with_the_guard_killed_too_the_next_agent_finds_all() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("sidecars");
    let (mut agent, pids) = agent(&dir);
    let [child, left, parent, own] = pids.as_slice() else {
        panic!("{pids:?}");
    };
    assert_eq!(parent, &agent.id().to_string());
    let stat = fs::read_to_string(format!("/proc/{own}/stat")).unwrap();
    let group: i32 = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_ascii_whitespace()
        .nth(2)
        .unwrap()
        .parse()
        .unwrap();
    assert_ne!(group.to_string(), *own, "the guard leads the group");
    let guard = rustix::process::Pid::from_raw(group).unwrap();
    rustix::process::kill_process(guard, rustix::process::Signal::KILL).unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert!(lives(child) && lives(left) && lives(own));

    let world = World::new();
    Sidecars::new(world.mesh.clone(), dir, world.settings()).unwrap();
    assert!(!lives(child) && !lives(left) && !lives(own));
}

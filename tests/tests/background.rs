//! Agents that `meshx run` starts when none runs: one for all nodes of a user, or one for a node.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use meshx_tests::{BeamBuilder, Mesh, Process, ebin, processes_with, program, repository, wait_until};

/// What a shared agent of these tests stays unused, in seconds.
const IDLE: &str = "2";
/// A VM boots, on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long its end may take after that: three times what is promised, and no less than a busy machine needs.
const END: Duration = Duration::from_secs(3 * 2 + 30);

/// A user's runtime directory: agents and the mesh are below it.
fn runtime_dir(mesh: &Mesh) -> PathBuf {
    let dir = mesh.path().join("run");
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    dir
}

fn meshx(runtime: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("meshx").unwrap());
    command
        .args(arguments)
        .env("XDG_RUNTIME_DIR", runtime)
        .env_remove("MESHX_DIR")
        .env_remove("MESHX_MESH_DIR")
        .stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}: {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

/// The agents in the background that this user has.
fn agents(runtime: &Path) -> Vec<u32> {
    let is_agent = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        words.any(|word| word == b"--detached" || word == b"--private")
    };
    let of_user = processes_with(runtime.to_str().unwrap());
    of_user.into_iter().filter(is_agent).collect()
}

/// Waits until nothing is left that this user has started.
fn wait_end(runtime: &Path, what: &str) {
    let began = Instant::now();
    let ended = wait_until(END, || processes_with(runtime.to_str().unwrap()).is_empty());
    println!("{what} was gone after {:?}", began.elapsed());
    assert!(
        ended.is_ok(),
        "{what}: {:?} run still",
        processes_with(runtime.to_str().unwrap())
    );
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_shared_agent_serves_all_nodes_and_ends_after_them() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let node = |name: &str| {
        let node = BeamBuilder::new(name).run_options(&["--agent", "shared", "--idle-exit", IDLE]);
        node.start_for(&runtime).unwrap()
    };
    let mut shop = node("shop@h1");
    let first = agents(&runtime);
    let mut cart = node("cart@h1");
    assert_eq!((agents(&runtime), first.len()), (first.clone(), 1));
    shop.expect("Node.ping(:cart@h1)", ":pong").unwrap();
    cart.expect("Node.list()", "[:shop@h1]").unwrap();

    let dir = runtime.join("meshx");
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(
        (mode(&dir.join("agent.log")), mode(&dir.join("start.lock"))),
        (0o600, 0o600)
    );
    let log = fs::read_to_string(dir.join("agent.log")).unwrap();
    assert!(log.contains("agent started"), "{log}");
    // A session of its own: no terminal's signals.
    let stat = fs::read_to_string(format!("/proc/{}/stat", first[0])).unwrap();
    let session = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(session, first[0].to_string(), "{stat}");

    // Another host's node: the agent does not own it.
    let other = meshx(
        &runtime,
        &[
            "run",
            "a@h2",
            "--agent",
            "shared",
            "--ebin",
            ebin().to_str().unwrap(),
            "--",
            "true",
        ],
    );
    let output = { other }.output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(64), "{text}");
    assert!(
        text.contains("host_not_owned: the agent that runs for this user owns ") && text.contains("h1"),
        "{text}"
    );

    shop.process.kill();
    cart.process.kill();
    wait_end(&runtime, "the shared agent, 2 s of idle time");
    let left: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "beside log and lock: {left:?}");
    let log = fs::read_to_string(dir.join("agent.log")).unwrap();
    assert!(log.contains("nobody uses this agent"), "{log}");
}

#[test]
fn many_at_once_start_one_agent() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let ebin = ebin();
    let ebin = ebin.to_str().unwrap();
    let mut running: Vec<_> = (0..8)
        .map(|number| {
            let name = format!("n{number}@h1");
            let options = [
                "run",
                &name,
                "--agent",
                "shared",
                "--idle-exit",
                IDLE,
                "--ebin",
                ebin,
            ];
            let command = ["--", "sh", "-c", "echo \"$MESHX_DIR\"; read end"];
            let mut command = meshx(&runtime, &[&options[..], &command[..]].concat());
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in &mut running {
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.as_mut().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(Path::new(line.trim_end()), runtime.join("meshx"));
    }
    assert_eq!(agents(&runtime).len(), 1);
    let log = fs::read_to_string(runtime.join("meshx/agent.log")).unwrap();
    assert_eq!(log.matches("agent started").count(), 1, "{log}");
    for mut child in running {
        drop(child.stdin.take());
        let _ = child.wait().unwrap();
    }
    wait_end(&runtime, "the agent of eight");
}

/// An agent that is about to end takes nobody with it who comes, and one that has been found stays for as long as the
/// command runs.
#[test]
fn who_comes_while_an_agent_ends_has_an_agent() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let meshx_program = program("meshx").unwrap();
    let ebin = ebin();
    for round in 0..10 {
        let output = meshx(&runtime, &["start", "--host", "h1", "--idle-exit", "1"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        // Around the moment of its end, now before and now after.
        std::thread::sleep(Duration::from_millis(960 + 10 * round));
        // Without a hold on it, it would end while this sleeps.
        let script = "sleep 1.3; exec \"$0\" names";
        let options = [
            "run",
            "shop@h1",
            "--agent",
            "shared",
            "--idle-exit",
            "1",
            "--ebin",
        ];
        let command = ["--", "sh", "-c", script, meshx_program.to_str().unwrap()];
        let output = meshx(
            &runtime,
            &[&options[..], &[ebin.to_str().unwrap()], &command[..]].concat(),
        )
        .output()
        .unwrap();
        assert!(output.status.success(), "round {round}: {}", said(&output));
    }
    wait_end(&runtime, "the last agent");
}

/// Somebody reads a pipe, on descriptor 3, until everybody has closed it.
#[test]
fn an_agent_in_the_background_holds_nobodys_files() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let program = program("meshx").unwrap();
    let script = "\"$0\" start --idle-exit 60 3>&1 >/dev/null";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(program)
        .env("XDG_RUNTIME_DIR", &runtime)
        .env_remove("MESHX_DIR");
    // Returns at the pipe's end.
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let pids = agents(&runtime);
    assert_eq!(pids.len(), 1);
    let pid = rustix::process::Pid::from_raw(pids[0].try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_end(&runtime, "an agent after SIGTERM");
}

/// What an agent that ends does to a connection that it has not accepted yet.
#[test]
fn a_connection_that_breaks_is_tried_again() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let dir = runtime.join("meshx");
    fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    let listener = UnixListener::bind(dir.join("control.sock")).unwrap();
    let ending = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let output = meshx(&runtime, &["start", "--host", "h1", "--idle-exit", "1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    ending.join().unwrap();
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    let wanted = format!("meshx agent ready dir={} hosts=", dir.display());
    assert!(
        line.starts_with(&wanted) && line.ends_with(",h1 mesh=embedded\n"),
        "{line}"
    );
    wait_end(&runtime, "the agent of nobody");
}

#[test]
fn a_private_agent_ends_with_its_node() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let node = |name: &str| {
        let node = BeamBuilder::new(name).run_options(&["--agent", "private"]);
        node.start_for(&runtime).unwrap()
    };
    // Of one name: each has an agent and a mesh of its own.
    let mut first = node("shop@h1");
    let mut second = node("shop@h1");
    let dir = first.eval("System.get_env(\"MESHX_DIR\")").unwrap();
    let dir = PathBuf::from(dir.trim_matches('"'));
    assert!(dir.starts_with(&runtime), "{dir:?}");
    assert_eq!((mode(&dir), mode(&dir.join("agent.log"))), (0o700, 0o600));
    assert_eq!(agents(&runtime).len(), 2);
    first
        .expect("{:ok, names} = MeshxNode.names(); length(names)", "1")
        .unwrap();

    // SIGKILL, which nobody can act upon.
    first.process.kill();
    let began = Instant::now();
    wait_until(END, || !dir.exists()).unwrap();
    println!(
        "the private agent had cleared up {:?} after SIGKILL",
        began.elapsed()
    );
    second
        .expect("{:ok, names} = MeshxNode.names(); length(names)", "1")
        .unwrap();
    second.process.write_line("System.halt(0)").unwrap();
    assert!(second.process.wait_exit(END).unwrap().success());
    wait_end(&runtime, "the second private agent");
    // The mesh that the first node's user would share was not made.
    assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0);
}

#[test]
fn what_a_killed_private_agent_left_is_cleared_up_by_the_next() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let node = || {
        let node = BeamBuilder::new("shop@h1").run_options(&["--agent", "private"]);
        let mut node = node.start_for(&runtime).unwrap();
        let dir = node.eval("System.get_env(\"MESHX_DIR\")").unwrap();
        (node, PathBuf::from(dir.trim_matches('"')))
    };
    let next = || {
        let ebin = ebin();
        let words = [
            "run",
            "next@h1",
            "--agent",
            "private",
            "--ebin",
            ebin.to_str().unwrap(),
            "--",
            "true",
        ];
        let output = meshx(&runtime, &words).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    };
    let (mut killed, left) = node();
    let agent = agents(&runtime);
    let (mut living, kept) = node();
    let agent = Pid::from_raw(agent[0].try_into().unwrap()).unwrap();
    kill_process(agent, Signal::KILL).unwrap();
    wait_until(END, || agents(&runtime).len() == 1).unwrap();
    // Somebody else's, and one of an agent that has just begun.
    let begun = runtime.join(format!("meshx-{}-0123abcd", rustix::process::geteuid().as_raw()));
    let other = runtime.join("meshx-mine");
    for dir in [&begun, &other.join("vm")] {
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .unwrap();
    }

    next();
    assert!(left.exists(), "its node lives");
    killed.process.kill();
    next();
    assert!(!left.exists() && kept.exists() && begun.exists() && other.exists());
    living
        .expect("{:ok, names} = MeshxNode.names(); length(names)", "1")
        .unwrap();
    living.process.kill();
    wait_end(&runtime, "the private agent");
}

/// A VM whose application is configured so, and that `meshx run` has not started.
fn application(runtime: &Path, agent: &str) -> Process {
    let ebin = ebin().display().to_string();
    let script = repository().join("tests/support/console.exs");
    let words = ["-pa", &ebin, script.to_str().unwrap(), "meshx"];
    let mut vm = Process::start(agent, "elixir", words, |command| {
        command
            .env("XDG_RUNTIME_DIR", runtime)
            .env("MESHX_PROGRAM", program("meshx").unwrap())
            .env("ERL_FLAGS", format!("-meshx agent {agent}"));
    })
    .unwrap();
    vm.wait_for(BOOT, |line| line.starts_with("ready ").then_some(()))
        .unwrap();
    vm
}

/// The nodes of its agent, and where it was told to look for it, as Elixir shows them.
fn nodes_and_dir(vm: &mut Process) -> String {
    let ask = "{:ok, _} = :meshx_agent.start(); {:ok, %{nodes: nodes}} = :meshx_agent.call(:names, %{}); {nodes, System.get_env(\"MESHX_DIR\")}";
    vm.write_line(ask).unwrap();
    vm.wait_for(BOOT, |line| line.starts_with("ok ").then(|| line.to_owned()))
        .unwrap()
}

#[test]
fn an_application_is_configured_to_have_an_agent() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let shared = format!("{{shared,[{{idle_exit,{IDLE}}}]}}");
    let mut first = application(&runtime, &shared);
    let mut second = application(&runtime, &shared);
    assert_eq!(agents(&runtime).len(), 1);
    for vm in [&mut first, &mut second] {
        assert_eq!(nodes_and_dir(vm), "ok {[], nil}");
    }
    let mut alone = application(&runtime, "private");
    let told = nodes_and_dir(&mut alone);
    let dir = told.strip_prefix("ok {[], \"").unwrap().trim_end_matches("\"}");
    assert!(Path::new(dir).starts_with(&runtime), "{told}");
    assert_eq!(agents(&runtime).len(), 2);

    alone.kill();
    wait_until(END, || !Path::new(dir).exists()).unwrap();
    first.kill();
    assert_eq!(nodes_and_dir(&mut second), "ok {[], nil}");
    second.kill();
    wait_end(&runtime, "the agent of two applications");
}

#[test]
fn none_is_started_where_one_is_configured() {
    let mesh = Mesh::new().unwrap();
    let runtime = runtime_dir(&mesh);
    let ebin = ebin();
    let run = |which: &str, dir: &Path| {
        let words = [
            "run",
            "shop@h1",
            "--agent",
            which,
            "--ebin",
            ebin.to_str().unwrap(),
            "--",
            "sh",
            "-c",
            "echo $MESHX_DIR",
        ];
        meshx(&runtime, &words).env("MESHX_DIR", dir).output().unwrap()
    };
    let output = run("shared", &mesh.path().join("nobody"));
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    assert!(
        said(&output).contains("none is started in its place"),
        "{}",
        said(&output)
    );
    let output = run("private", &mesh.path().join("nobody"));
    assert_eq!(output.status.code(), Some(64), "{}", said(&output));
    assert!(
        said(&output).contains("none is started beside it"),
        "{}",
        said(&output)
    );

    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let output = run("shared", agent.dir());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim_end(),
        agent.dir().to_str().unwrap()
    );
    assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0, "nothing was started");
}

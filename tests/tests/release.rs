//! A release of `mix release` whose node is in the mesh, and the commands of its script (examples/release).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use meshx_tests::{Agent, Mesh, Process, program, repository};
use rustix::process::{Pid, Signal, kill_process};

const BOOT: Duration = Duration::from_secs(120);

/// The release, and where its node finds its agent.
struct Release {
    root: PathBuf,
    tmp: PathBuf,
    agent: PathBuf,
    mode: &'static str,
}

impl Release {
    /// Assembles it below `mesh`, of what `make test` has compiled and without the network.
    fn build(mesh: &Mesh, mode: &'static str) -> Self {
        let root = mesh.path().join("release");
        let output = Command::new("mix")
            .args(["release", "--no-compile", "--no-deps-check", "--path"])
            .arg(&root)
            .current_dir(repository().join("examples/release"))
            .env("MIX_ENV", "prod")
            .env("MESHX_PROGRAM", program("meshx").unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let tmp = mesh.path().join("tmp");
        std::fs::create_dir(&tmp).unwrap();
        Self {
            root,
            tmp,
            agent: mesh.path().join("a"),
            mode,
        }
    }

    fn script(&self) -> PathBuf {
        self.root.join("bin/counter")
    }

    /// A node that has its name from the environment, as an operator sets it.
    fn configure(&self, command: &mut Command) {
        command
            .env("MESHX_DIR", &self.agent)
            .env("RELEASE_DISTRIBUTION", "name")
            .env("RELEASE_NODE", "counter@h1")
            .env("RELEASE_MODE", self.mode)
            .env("RELEASE_TMP", &self.tmp)
            .env("HOME", &self.tmp);
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.script());
        command.args(arguments);
        self.configure(&mut command);
        command.output().unwrap()
    }

    /// What a command printed, when it succeeds.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The process id that `pid` prints, once the node answers.
    fn wait_pid(&self) -> u32 {
        let deadline = Instant::now() + BOOT;
        loop {
            let output = self.run(&["pid"]);
            if output.status.success() {
                return String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
            }
            assert!(Instant::now() < deadline, "{}", text(&output));
        }
    }

    fn start(&self) -> Process {
        Process::start("counter@h1", self.script(), ["start"], |command| {
            self.configure(command);
        })
        .unwrap()
    }

    /// A program on a terminal of its own, in which lines are typed until one of its lines has `wanted`.
    fn on_terminal(&self, name: &str, command: &str, typed: &str, wanted: &str) -> String {
        let mut shell = Process::start(name, "script", ["-qec", command, "/dev/null"], |c| {
            self.configure(c);
            c.env("TERM", "vt100");
        })
        .unwrap();
        let deadline = Instant::now() + BOOT;
        // What is typed before the shell is there may be lost.
        loop {
            shell.write_line(typed).unwrap();
            let seen = shell.wait_for(Duration::from_secs(2), |line| {
                line.contains(wanted).then(|| line.to_owned())
            });
            match seen {
                Ok(line) => return line,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }
}

/// Ends what was started detached, however the test ends.
struct Daemon(u32);

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn text(output: &Output) -> String {
    let parts = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    format!("{}: {}", output.status, parts.concat())
}

fn is_running(pid: u32) -> bool {
    // One that was not reaped is not running.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn wait_end(pid: u32) {
    meshx_tests::wait_until(Duration::from_secs(60), || !is_running(pid)).unwrap();
}

/// Everything of `priv/` that a node needs beside its beams.
fn shipped(root: &Path) -> PathBuf {
    let libraries = std::fs::read_dir(root.join("lib")).unwrap();
    let meshx = libraries
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("meshx-"))
        .unwrap();
    assert!(meshx.join("priv/native/meshx_nif.so").is_file());
    meshx.join("priv/bin/meshx")
}

fn agent(mesh: &Mesh) -> Agent {
    mesh.agent("a", "127.0.0.2", &["h1"]).unwrap()
}

fn every_command_works(mode: &'static str) {
    let mesh = Mesh::new().unwrap();
    let release = Release::build(&mesh, mode);
    let program = shipped(&release.root);
    let version = Command::new(&program).arg("--version").output().unwrap();
    assert!(version.status.success(), "{}", text(&version));

    // Without an agent the node does not boot, and says what to do.
    let refused = release.run(&["start"]);
    let said = text(&refused);
    assert!(!refused.status.success(), "{said}");
    for part in [
        "cannot start counter@h1: unreachable",
        "start the agent (meshx agent)",
        "priv/bin/meshx agent",
    ] {
        assert!(said.contains(part), "{part:?} not in: {said}");
    }

    let agent = agent(&mesh);
    let mut node = release.start();
    let pid = release.wait_pid();
    assert_eq!(
        release.ok(&[
            "rpc",
            "IO.inspect({node(), Counter.next(), MeshxRpc.Codec.impl()})"
        ]),
        "{:counter@h1, 1, MeshxRpc.Codec.Nif}"
    );
    assert_eq!(
        release.ok(&["eval", "IO.inspect({node(), Counter.__info__(:module)})"]),
        "{:nonode@nohost, Counter}"
    );
    let typed = "IO.puts(\"remote #{20 + 1} #{node()} #{length(Node.list(:hidden))}\")";
    let script = release.script().display().to_string();
    release.on_terminal(
        "remote",
        &format!("{script} remote"),
        typed,
        "remote 21 counter@h1 1",
    );
    let cookie = std::fs::read_to_string(release.root.join("releases/COOKIE")).unwrap();
    let ebin = program
        .parent()
        .unwrap()
        .join("../../ebin")
        .canonicalize()
        .unwrap();
    let iex = format!(
        "iex --name console@h1 --cookie {cookie} --hidden --remsh counter@h1 --erl '-pa {} -proto_dist meshx -no_epmd \
         -meshx_session'",
        ebin.display()
    );
    release.on_terminal("iex --remsh", &iex, typed, "remote 21 counter@h1 1");
    let names = agent.meshx_ok(&["names"]).unwrap();
    assert_eq!(names.lines().count(), 2, "no tool is a node of the mesh: {names}");

    // The same process, with its applications started anew.
    release.ok(&["restart"]);
    let deadline = Instant::now() + BOOT;
    loop {
        let output = release.run(&["rpc", "IO.inspect(Counter.next())"]);
        if text(&output).contains(": 1\n") {
            break;
        }
        assert!(Instant::now() < deadline, "{}", text(&output));
    }
    assert_eq!(release.wait_pid(), pid);

    release.ok(&["stop"]);
    assert!(node.wait_exit(Duration::from_secs(60)).unwrap().success());
    agent
        .wait_name("counter@h1", false, Duration::from_secs(3))
        .unwrap();
    let gone = release.run(&["pid"]);
    assert!(
        !gone.status.success() && text(&gone).contains("no_such_node"),
        "{}",
        text(&gone)
    );

    release.ok(&["daemon"]);
    let daemon = Daemon(release.wait_pid());
    assert_ne!(daemon.0, pid);
    release.ok(&["stop"]);
    wait_end(daemon.0);
}

#[test]
fn every_command_works_in_embedded_mode() {
    every_command_works("embedded");
}

#[test]
fn every_command_works_in_interactive_mode() {
    every_command_works("interactive");
}

//! Start, end, sudden death and return of an agent.

use std::{
    fs,
    io::Read,
    os::unix::{fs::MetadataExt, net::UnixListener},
    path::Path,
    process::{Command, Stdio},
};

use meshx::agent::control::message::{map, text};
use meshx::mesh::embedded::{Action, MeshDir, Rules};
use meshx_etf::Term;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use crate::support::{Agent, LONG, creation, echo_link, temp, until};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn the_ready_line_and_the_modes() {
    let root = temp();
    let agent = Agent::start(
        root.path(),
        "a",
        &["h1", "h1.example"],
        &["--bind", "127.0.0.2:0"],
    );
    let fields: Vec<&str> = agent.ready.split(' ').collect();
    let [_, _, _, dir, inbound, hosts, mesh] = fields.as_slice() else {
        panic!("{}", agent.ready)
    };
    assert_eq!(*dir, format!("dir={}", agent.dir.display()));
    let port = inbound.strip_prefix("inbound=127.0.0.2:").unwrap();
    std::net::TcpStream::connect(("127.0.0.2", port.parse().unwrap())).unwrap();
    assert_eq!((*hosts, *mesh), ("hosts=h1,h1.example", "mesh=embedded"));
    for dir in [
        &agent.dir,
        &agent.vm(),
        &agent.dir.join("up"),
        &root.path().join("mesh"),
    ] {
        assert_eq!(mode(dir), 0o700, "{dir:?}");
    }
    for socket in ["control.sock", "dist.sock"] {
        assert_eq!(mode(&agent.dir.join(socket)), 0o600, "{socket}");
    }
}

#[test]
fn a_second_agent_in_the_directory_is_refused_and_the_first_goes_on() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let output = Agent::command(root.path(), &agent.dir, &["h2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(69));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("another agent runs in directory"), "{text}");
    assert!(output.stdout.is_empty());
    assert!(agent.names().is_empty(), "it answers");
}

#[test]
fn a_signal_ends_it_in_order_and_leaves_nothing() {
    for signal in [Signal::TERM, Signal::INT] {
        let root = temp();
        let mut agent = Agent::start(root.path(), "a", &["h1"], &[]);
        let other = Agent::start(root.path(), "b", &["h2"], &[]);
        let socket = agent.vm().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut client = agent.connect();
        client.register("shop@h1", &socket).unwrap();
        assert_eq!(other.names(), ["shop@h1"]);
        drop(listener);
        fs::remove_file(&socket).unwrap();
        agent.signal(signal);
        assert!(agent.wait_exit().success(), "{}", agent.log());
        assert!(
            !agent.dir.exists(),
            "{:?}",
            fs::read_dir(&agent.dir).map(Iterator::count)
        );
        assert!(other.names().is_empty());
        assert_eq!(client.receive(), None);
    }
}

#[test]
fn a_living_nodes_socket_outlives_the_agent() {
    let root = temp();
    let mut agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut client = agent.connect();
    let before = creation(&client.register("shop@h1", &socket).unwrap());
    agent.signal(Signal::TERM);
    assert!(agent.wait_exit().success());
    assert!(socket.exists() && !agent.dir.join("control.sock").exists());

    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let after = creation(&client.register("shop@h1", &socket).unwrap());
    assert_ne!(before, after, "a node that does not say so is a new one");
}

#[test]
fn after_sigkill_the_directory_is_used_again() {
    let root = temp();
    let other = Agent::start(root.path(), "b", &["h2"], &[]);
    let mut proof: Option<(i64, Vec<u8>)> = None;
    for _ in 0..2 {
        let mut agent = Agent::start(root.path(), "a", &["h1"], &[]);
        let socket = agent.vm().join("s");
        let _ = fs::remove_file(&socket);
        let _listener = UnixListener::bind(&socket).unwrap();
        let mut client = agent.connect();
        let mut node = client.register("shop@h1", &socket);
        if let Some((before, secret)) = &proof {
            // Its name is kept for who proves to have held it.
            let (cause, said) = node.unwrap_err();
            assert!(
                cause == "not_ready" && said.contains("shop@h1 is reserved"),
                "{cause}: {said}"
            );
            let back = |secret: Term| {
                map([
                    ("node", text("shop@h1")),
                    ("socket", text(socket.to_str().unwrap())),
                    ("creation", Term::Int(*before)),
                    ("secret", secret),
                ])
            };
            let wrong = client.ask("register_node", back(Term::binary([7; 32])));
            assert_eq!(wrong.unwrap_err().0, "not_ready");
            node = client.ask("register_node", back(Term::binary(&secret[..])));
            assert_eq!(creation(node.as_ref().unwrap()), *before);
        }
        let node = node.unwrap();
        let secret = node.map_get("secret").unwrap().as_binary().unwrap();
        proof = Some((creation(&node), secret.to_vec()));
        assert_eq!(other.names(), ["shop@h1"]);
        // What is noted of it is in the file.
        until(LONG, "the name to be noted", || {
            fs::read_to_string(agent.dir.join("names.json")).is_ok_and(|names| names.contains("shop@h1"))
        });
        agent.child.kill().unwrap();
        agent.wait_exit();
        assert!(
            agent.dir.join("control.sock").exists(),
            "it had no time to remove it"
        );
        until(LONG, "the dead agent's names to go", || other.names().is_empty());
    }
}

#[test]
fn the_log_can_be_json() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &["--log-format", "json"]);
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    agent.connect().register("shop@h2", &socket).unwrap_err();
    agent.wait_log(&["\"cause\":\"host_not_owned\""]);
    for line in agent.log().lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
}

#[test]
fn wrong_options_are_all_told_and_nothing_is_opened() {
    let root = temp();
    let dir = root.path().join("a");
    let output = Agent::command(root.path(), &dir, &["a@b"])
        .args([
            "--bind",
            "0.0.0.0:0",
            "--socket-mode",
            "0601",
            "--allow-register",
            "x",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8(output.stderr).unwrap();
    for seen in ["a@b", "0.0.0.0:0", "0601", "\"x\""] {
        assert!(text.contains(seen), "{seen} not in {text}");
    }
    assert!(!dir.exists());
}

/// A denial that is said to be set and holds for nobody is an open door.
#[test]
fn rules_are_not_set_in_another_mesh_than_the_agents() {
    let (root, other) = (temp(), temp());
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let _other = Agent::start(other.path(), "b", &["h2"], &[]);
    let mesh = other.path().join("mesh");
    let run = |agent: &Path, arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_meshx"))
            .args(arguments)
            .env("MESHX_DIR", agent)
            .env("MESHX_MESH_DIR", &mesh)
            .output()
            .unwrap()
    };
    for command in [
        &["deny", "a", "b"][..],
        &["rules", "--default", "deny"],
        &["rotate"],
    ] {
        let refused = run(&agent.dir, command);
        let text = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(64), "{command:?}: {text}");
        assert!(
            text.contains("is of another mesh") && text.contains("--mesh-dir"),
            "{text}"
        );
    }
    let rules = fs::read_to_string(mesh.join("rules.json")).unwrap();
    assert!(!rules.contains("deny"), "{rules}");
    // Who names it means it, and without an agent there is no other that could be meant.
    let named = ["deny", "a", "b", "--mesh-dir", mesh.to_str().unwrap()];
    assert!(run(&agent.dir, &named).status.success());
    assert!(
        run(&root.path().join("none"), &["allow", "a", "b"])
            .status
            .success()
    );
}

#[test]
fn the_programs_commands_answer() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_meshx"))
            .args(arguments)
            .env("MESHX_DIR", &agent.dir)
            .env("MESHX_MESH_DIR", root.path().join("mesh"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut client = agent.connect();
    for node in ["shop@h1", "cart@h1"] {
        client.register(node, &socket).unwrap();
    }
    let (code, names, _) = run(&["names"]);
    assert!(
        code == 0 && names.contains("shop@h1") && names.contains("cart@h1"),
        "{names}"
    );
    assert_eq!(run(&["links", "--json"]).1, "[]\n");

    assert_eq!(run(&["check", "shop@h1", "cart@h1"]).0, 0);
    assert_eq!(
        run(&["deny", "cart", "shop"]),
        (0, "deny cart -> shop\n".into(), String::new())
    );
    let (code, text, _) = run(&["check", "shop@h1", "cart@h1"]);
    assert!(
        code == 1 && text.contains("intention_denied"),
        "both directions count: {text}"
    );
    assert_eq!(
        run(&["check", "shop", "cart"]).0,
        0,
        "a service needs one direction"
    );
    assert!(run(&["rules", "--json"]).1.contains("\"deny\""));
    assert_eq!(run(&["rules", "--remove", "cart", "shop"]).0, 0);
    assert_eq!(run(&["allow", "Shop", "cart"]).0, 64);

    let (code, out, _) = run(&[
        "run",
        "x@h1",
        "--",
        "sh",
        "-c",
        "echo $MESHX_DIR; echo $ERL_FLAGS",
    ]);
    assert_eq!((code, out.as_str()), (69, ""), "no carrier in this directory");
    let ebin = root.path().join("my ebin");
    fs::create_dir(&ebin).unwrap();
    fs::write(ebin.join("meshx_dist.beam"), "").unwrap();
    let ebin = ebin.to_str().unwrap();
    let script = "echo \"$MESHX_DIR|$ERL_FLAGS\"; exit 7";
    let (code, out, err) = run(&[
        "run", "x@h1", "--sname", "--hidden", "--ebin", ebin, "--", "sh", "-c", script,
    ]);
    assert_eq!(code, 7, "{err}");
    let wanted = format!(
        "{}|-proto_dist meshx -no_epmd -pa {} -sname x@h1 -hidden\n",
        agent.dir.display(),
        ebin.replace(' ', "\\ ")
    );
    assert_eq!(out, wanted);
    let (code, _, err) = run(&["run", "x@h2", "--ebin", ebin, "--", "true"]);
    assert!(code == 64 && err.contains("host_not_owned"), "{err}");
    let (code, _, err) = run(&["run", "x@h1", "--dir", "/none", "--ebin", ebin, "--", "true"]);
    assert!(
        code == 69 && err.contains("meshx agent --mesh embedded --dir /none"),
        "{err}"
    );
}

/// The change of the rules is seen once; what it says must not be lost because it could not be read then.
#[test]
fn a_denial_that_cannot_be_read_at_first_still_cuts() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let (_, [mut near, _far]) = echo_link(&mut client);
    let mesh = MeshDir::open(&root.path().join("mesh")).unwrap();

    let pid = Some(Pid::from_child(&agent.child));
    let none_left = Rlimit {
        current: Some(0),
        maximum: Some(4096),
    };
    let before = prlimit(pid, Resource::Nofile, none_left).unwrap();
    Rules::set_default(&mesh, Action::Deny).unwrap();
    agent.wait_log(&["the mesh has no answer"]);
    let enough = Rlimit {
        current: Some(4096),
        maximum: Some(4096),
    };
    assert!(before.current.is_none_or(|before| before >= 4096));
    prlimit(pid, Resource::Nofile, enough).unwrap();
    near.set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .unwrap();
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "cut");
    agent.wait_log(&["links that they deny were cut"]);
}

/// By SIGXFSZ a process ends without a word (setrlimit(2), RLIMIT_FSIZE).
#[test]
fn a_file_that_may_not_grow_is_told_and_ends_nothing() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let pid = Some(Pid::from_child(&agent.child));
    let limit = |bytes| Rlimit {
        current: bytes,
        maximum: None,
    };
    prlimit(pid, Resource::Fsize, limit(Some(1))).unwrap();
    let refused = client.ask("register_service", map([("name", text("echo"))]));
    let (cause, why) = refused.unwrap_err();
    assert!(why.contains("File too large"), "{cause}: {why}");
    // It serves on.
    prlimit(pid, Resource::Fsize, limit(None)).unwrap();
    client
        .ask("register_service", map([("name", text("echo"))]))
        .unwrap();
}

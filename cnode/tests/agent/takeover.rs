//! One process of an agent takes over from another, and whatever goes wrong leaves one that serves.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixDatagram, UnixListener, UnixStream},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use meshx::agent::{
    control::message::{Message, map, text},
    takeover::TAKEOVER_VERSIONS,
};
use meshx_etf::Term;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    support::{Agent, Client, LONG, PATIENCE, Refused, creation, echo_link, link_to, service, temp, until},
    takeover_epmd::{EPMD, epmd, epmd_port},
};

/// Another process of the agent, as the one that serves sees it.
pub(crate) struct Peer(UnixStream);

impl Peer {
    fn connect(agent: &Agent) -> Self {
        Self(UnixStream::connect(agent.dir.join("takeover.sock")).unwrap())
    }

    pub(crate) fn send(&mut self, message: &Value) {
        let bytes = message.to_string().into_bytes();
        self.0.write_all(&(bytes.len() as u32).to_be_bytes()).unwrap();
        self.0.write_all(&bytes).unwrap();
    }

    /// None when the other side has closed. Open files that come with it are dropped.
    fn receive(&mut self) -> Option<Value> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let mut payload = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut payload).unwrap();
        Some(serde_json::from_slice(&payload).unwrap())
    }

    fn hello(&mut self, versions: (u32, u32)) -> Value {
        self.send(
            &json!({"versions": [versions.0, versions.1], "program": "meshx 9.9", "role": "successor"}),
        );
        self.receive().unwrap()
    }

    /// Welcomed, as soon as no earlier one is any more.
    pub(crate) fn welcomed(agent: &Agent, versions: (u32, u32)) -> (Self, Value) {
        let mut welcome = None;
        until(LONG, "a welcome", || {
            let mut peer = Self::connect(agent);
            let answer = peer.hello(versions);
            let welcomed = answer.get("welcome").is_some();
            welcome = Some((peer, answer));
            welcomed
        });
        welcome.unwrap()
    }

    /// Everything up to and with the message of this name.
    pub(crate) fn receive_until(&mut self, name: &str) {
        while self.receive().unwrap().get(name).is_none() {}
    }
}

/// A client with a registered node that the agent must keep.
pub(crate) fn client(agent: &Agent) -> (Client, UnixListener) {
    let mut client = agent.connect();
    let socket = agent.vm().join("shop");
    let listener = UnixListener::bind(&socket).unwrap();
    client.register("shop@h1", &socket).unwrap();
    (client, listener)
}

fn take_over(root: &Path, agent: &Agent, options: &[&str]) -> Output {
    let mut command = Agent::command(root, &agent.dir, &["h1"]);
    command.arg("--takeover").args(options).output().unwrap()
}

#[test]
fn a_client_keeps_its_connection_its_names_and_its_links() {
    let root = temp();
    let mut first = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = first.connect();
    let socket = first.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    let node = client.register("shop@h1", &socket).unwrap();
    let mut stranger = first.stranger();
    let (link, [mut near, mut far]) = echo_link(&mut client);

    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    assert_eq!(second.ready, first.ready);
    // The connection is the same; its registrations, too, and no other may have the name.
    assert_eq!(second.names(), ["shop@h1"]);
    let other = second.vm().join("other");
    let _other = UnixListener::bind(&other).unwrap();
    let taken = second.connect().register("shop@h1", &other);
    assert_eq!(taken.unwrap_err().0, "name_taken");
    stranger.hello();
    // The link is the first process's, is shown by the second, and carries bytes.
    let shown = || client.ask("links", map([])).unwrap().to_string().contains(&link);
    until(LONG, "the first process to tell the second of its link", shown);
    near.write_all(b"more").unwrap();
    let mut bytes = [0; 4];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"more");
    assert!(first.child.try_wait().unwrap().is_none(), "it holds a link");
    second.wait_log(&["a predecessor holds links"]);

    // A third at once, and the link is held still.
    let mut third = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    let shown = || {
        let links = third.connect().ask("links", map([])).unwrap();
        links.to_string().contains(&link)
    };
    until(LONG, "the first process to tell the third of its link", shown);
    let deregister = map([("id", text("shop@h1"))]);
    client.ask("deregister", deregister).unwrap();
    let again = client.register("shop@h1", &socket).unwrap();
    assert_ne!(creation(&again), creation(&node), "creations are counted on");

    // With its client the link ends, and then the first process.
    drop(client);
    assert_eq!(near.read(&mut bytes).unwrap(), 0);
    assert!(first.wait_exit().success());
    assert!(first.log().contains("the last link has ended"));
    third.signal(Signal::TERM);
    assert!(third.wait_exit().success());
    assert!(!third.dir.join("control.sock").exists());
}

/// Its client has 10 s to come back, in which the agent is taken over.
#[test]
fn the_links_of_what_went_before_a_takeover_end() {
    let root = temp();
    let mut first = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut gone, mut client) = (first.connect(), first.connect());
    let (echo, mail) = (service(&mut gone, "echo"), service(&mut gone, "mail"));
    let (_, [mut lost, _far]) = link_to(&mut client, "echo", &echo);
    let (_, [mut near, mut far]) = link_to(&mut client, "mail", &mail);
    drop(gone);
    for id in ["echo-1", "mail-1"] {
        first.wait_log(&["deregistered", id]);
    }
    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    second.wait_log(&["a predecessor holds links"]);
    let mut back = second.connect();
    let _mail = service(&mut back, "mail");
    lost.set_read_timeout(Some(LONG)).unwrap();
    assert!(ended(&mut lost), "nobody cut it");
    second.wait_log(&["echo-1", "not registered again"]);
    near.write_all(b"more").unwrap();
    far.read_exact(&mut [0; 4]).unwrap();
    drop((near, far));
    assert!(first.wait_exit().success(), "it was its last link");
}

#[test]
fn the_links_of_what_went_while_nobody_served_end() {
    let root = temp();
    let mut first = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = first.connect();
    let echo = service(&mut client, "echo");
    let (_, [mut lost, _far]) = link_to(&mut client, "echo", &echo);
    let mut second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    second.wait_log(&["a predecessor holds links"]);
    second.child.kill().unwrap();
    second.child.wait().unwrap();
    drop(client);
    let _third = Agent::start(root.path(), "a", &["h1"], &[]);
    lost.set_read_timeout(Some(LONG)).unwrap();
    assert!(ended(&mut lost), "nobody cut it");
    assert!(first.wait_exit().success(), "it was its last link");
}

/// False when nothing comes in time.
fn ended(link: &mut UnixStream) -> bool {
    match link.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn releases_that_have_no_version_in_common_part_and_neighbours_agree() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut client, _listener) = client(&agent);
    let (low, high) = TAKEOVER_VERSIONS;
    for versions in [(high, high + 1), (low.saturating_sub(1), high)] {
        let (_peer, welcome) = Peer::welcomed(&agent, versions);
        assert_eq!(welcome["welcome"]["version"], high, "{welcome}");
    }
    let refused = Peer::connect(&agent).hello((high + 1, high + 2));
    let text = refused["refused"]["text"].as_str().unwrap();
    let wanted = format!("meshx 9.9 speaks versions {} to {}", high + 1, high + 2);
    assert!(
        text.contains(&wanted) && text.contains(env!("CARGO_PKG_VERSION")),
        "{text}"
    );
    agent.wait_log(&["takeover", &wanted]);
    client.ask("names", map([])).unwrap();
}

#[test]
fn a_successor_that_ends_at_any_step_leaves_the_agent_as_it_was() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &EPMD);
    let epmd = epmd_port(&agent);
    let (_cart, _) = epmd::register(epmd, "cart").unwrap();
    let (mut client, _listener) = client(&agent);
    let (link, [mut near, mut far]) = echo_link(&mut client);
    let steps = [
        "hello",
        "welcome",
        "begin",
        "everything",
        "ready",
        "commit",
        "failed",
        "nonsense",
    ];
    for (at, step) in steps.into_iter().enumerate() {
        let mut peer = match step {
            "hello" => Peer::connect(&agent),
            _ => Peer::welcomed(&agent, TAKEOVER_VERSIONS).0,
        };
        if at > 1 {
            peer.send(&json!("begin"));
        }
        if at > 2 {
            peer.receive_until("all");
        }
        match step {
            "ready" => peer.send(&json!("ready")),
            "commit" => {
                peer.send(&json!("ready"));
                assert_eq!(peer.receive().unwrap(), "commit");
            }
            "failed" => peer.send(&json!({"failed": {"text": "the moon is full"}})),
            "nonsense" => peer.send(&json!({"serve": "you"})),
            _ => {}
        }
        drop(peer);
        // Asked over the connection that was there before, which waits until the agent serves it again.
        let names = client.ask("names", map([])).unwrap();
        assert!(
            ["shop@h1", "cart@h1"]
                .iter()
                .all(|name| names.to_string().contains(name)),
            "{step}: {names}"
        );
        let links = client.ask("links", map([])).unwrap();
        assert!(links.to_string().contains(&link), "{step}: {links}");
        near.write_all(b"ping").unwrap();
        far.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(epmd::names(epmd), ["cart", "shop"], "{step}");
    }
    agent.wait_log(&["the takeover failed", "the moon is full"]);
    // After all that it can still be taken over.
    let second = Agent::start(root.path(), "a", &["h1"], &[&EPMD[..], &["--takeover"]].concat());
    let mut kept = second.names();
    kept.sort();
    assert_eq!(kept, ["cart@h1", "shop@h1"]);
}

#[test]
fn what_a_takeover_cannot_change_is_refused_and_both_tell_it() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut client, _listener) = client(&agent);
    let elsewhere = root.path().join("elsewhere");
    for (option, value) in [
        ("--bind", "127.0.0.9:0"),
        ("--advertise", "127.0.0.9:1"),
        ("--http", "127.0.0.1:0"),
        ("--mesh-dir", elsewhere.to_str().unwrap()),
    ] {
        let mut command = Agent::command(root.path(), &agent.dir, &["h1"]);
        if option == "--mesh-dir" {
            command = Command::new(env!("CARGO_BIN_EXE_meshx"));
            command
                .args(["agent", "--mesh", "embedded", "--dir"])
                .arg(&agent.dir);
        }
        let output = command.args(["--takeover", option, value]).output().unwrap();
        assert_eq!(output.status.code(), Some(69), "{option}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(option) && text.contains("cannot change"), "{text}");
        agent.wait_log(&[option, "cannot change"]);
        client.ask("names", map([])).unwrap();
    }
}

#[test]
fn sessions_and_watches_go_over() {
    let root = temp();
    let first = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = first.connect();
    let session = |client: &mut Client| {
        let answer = client.ask("register_session", map([("node", text("quiet@h1"))]))?;
        Ok::<_, Refused>(answer.map_get("secret").cloned().unwrap())
    };
    let secret = session(&mut client).unwrap();
    let mut watcher = first.connect();
    let services = Term::list([text("shop")]);
    watcher
        .ask("watch", map([("watch", text("w")), ("services", services)]))
        .unwrap();
    assert_eq!(told(&mut watcher), "w: ");

    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    // A process that begins to tell tells what there is.
    assert_eq!(told(&mut watcher), "w: ");
    let socket = second.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut other = second.connect();
    other.register("shop@h1", &socket).unwrap();
    assert_eq!(told(&mut watcher), "w: shop@h1");
    // The session is its holder's, by the secret that it had, and goes with it.
    assert_eq!(session(&mut client).unwrap(), secret);
    assert_eq!(session(&mut other).unwrap_err().0, "name_taken");
    drop(client);
    until(PATIENCE, "the end of the session", || session(&mut other).is_ok());
}

/// What the next event of a watch tells.
fn told(client: &mut Client) -> String {
    let Some(Message::Event { name, args }) = client.receive() else {
        panic!("no event")
    };
    assert_eq!(name, "nodes");
    let nodes = args.map_get("nodes").and_then(Term::as_list).unwrap();
    let nodes: Vec<&str> = nodes
        .iter()
        .map(|node| node.map_get("node").and_then(Term::as_str).unwrap())
        .collect();
    let watch = args.map_get("watch").and_then(Term::as_str).unwrap();
    format!("{watch}: {}", nodes.join(", "))
}

/// Systemd's end of sd_notify(3).
#[test]
fn systemd_is_told_who_serves_and_of_no_takeover_that_failed() {
    let root = temp();
    let path = root.path().join("notify");
    let notify = UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(LONG)).unwrap();
    let start = |options: &[&str]| {
        let mut command = Agent::command(root.path(), &root.path().join("a"), &["h1"]);
        command.args(options).env("NOTIFY_SOCKET", &path);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let told = || {
        let mut text = [0; 128];
        let read = notify.recv(&mut text).unwrap();
        String::from_utf8(text[..read].to_vec()).unwrap()
    };
    let serves = |child: &Child| format!("READY=1\nMAINPID={}", child.id());
    let mut first = start(&[]);
    assert_eq!(told(), serves(&first));
    // Whoever is told finds an agent.
    let mut client = Client::connect(&root.path().join("a"));
    client.hello();
    let mut refused = start(&["--takeover", "--http", "127.0.0.1:0"]);
    assert_eq!(refused.wait().unwrap().code(), Some(69));
    let mut second = start(&["--takeover"]);
    assert_eq!(told(), serves(&second), "nothing of the one that was refused");
    client.ask("names", map([])).unwrap();
    assert!(first.wait().unwrap().success());
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn without_an_agent_or_with_one_that_ends_in_between_it_starts_anew() {
    let root = temp();
    let first = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    first.wait_log(&["nothing to take over"]);
    drop(first);

    // A predecessor that is killed after its welcome: its lock is free then.
    let dir = root.path().join("a");
    fs::remove_file(dir.join("takeover.sock")).unwrap();
    let listener = UnixListener::bind(dir.join("takeover.sock")).unwrap();
    let dying = std::thread::spawn(move || {
        let mut peer = Peer(listener.accept().unwrap().0);
        assert_eq!(peer.receive().unwrap()["role"], "successor");
        drop(peer);
    });
    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    dying.join().unwrap();
    second.wait_log(&["the takeover broke off"]);
    assert!(second.names().is_empty(), "it serves");
}

#[test]
fn an_agent_that_refuses_is_left_alone() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut client, _listener) = client(&agent);
    // While one takeover is under way, a second one is refused.
    let mut slow = Peer::connect(&agent);
    slow.hello(TAKEOVER_VERSIONS);
    let output = take_over(root.path(), &agent, &[]);
    assert_eq!(output.status.code(), Some(69));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("cannot take over: another takeover is under way"),
        "{text}"
    );
    client.ask("names", map([])).unwrap();
}

#[test]
fn only_the_agents_own_user_may_take_over() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test starts a process of another user: run it as root"
    );
    let root = temp();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let agent = Agent::start(root.path(), "a", &["h1"], &["--socket-mode", "0666"]);
    let socket = agent.dir.join("takeover.sock");
    assert_eq!(
        fs::metadata(&socket).unwrap().mode() & 0o777,
        0o600,
        "whatever the others' mode is"
    );
    // Were the mode another one, the kernel's word on who calls would still count.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let program = root.path().join("helper");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(&program)
        .args(["--exact", "takeover::stranger_process", "--nocapture", "--quiet"])
        .env(STRANGER, &socket)
        .uid(4711)
        .gid(4711)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("stranger: nothing"), "{text}");
    agent.wait_log(&["a takeover was refused", "uid 4711"]);
}

/// The other way round: a process of another user waits at the takeover socket, and would be told all that is asked.
#[test]
fn nothing_is_taken_over_from_another_user() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test starts a process of another user: run it as root"
    );
    let root = temp();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let dir = agent.dir.clone();
    drop(agent);
    let open = root.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let program = root.path().join("helper");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut stranger = Command::new(&program)
        .args(["--exact", "takeover::stranger_server", "--nocapture", "--quiet"])
        .env(STRANGER, open.join("socket"))
        .uid(4711)
        .gid(4711)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until(LONG, "the stranger's socket", || {
        UnixStream::connect(open.join("socket")).is_ok()
    });
    fs::rename(open.join("socket"), dir.join("takeover.sock")).unwrap();
    let output = Agent::command(root.path(), &dir, &["h1"])
        .arg("--takeover")
        .output()
        .unwrap();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(output.status.code(), Some(69));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("uid 4711 is at the other end of the takeover socket, wanted 0"),
        "{text}"
    );
}

/// Not a test of its own: what another user runs. It refuses whoever it is told something by.
#[test]
fn stranger_server() {
    let Ok(socket) = std::env::var(STRANGER) else {
        return;
    };
    let listener = UnixListener::bind(socket).unwrap();
    for stream in listener.incoming() {
        let mut peer = Peer(stream.unwrap());
        if peer.receive().is_some() {
            peer.send(&json!({"refused": {"text": "a stranger was told"}}));
        }
    }
}

const STRANGER: &str = "MESHX_TEST_STRANGER";

/// Not a test of its own: what another user runs.
#[test]
fn stranger_process() {
    let Ok(socket) = std::env::var(STRANGER) else {
        return;
    };
    let mut peer = Peer(UnixStream::connect(socket).unwrap());
    let bytes = br#"{"versions": [1, 1], "program": "mischief", "role": "successor"}"#;
    let _ = peer.0.write_all(&(bytes.len() as u32).to_be_bytes());
    let _ = peer.0.write_all(bytes);
    match peer.receive() {
        None => println!("\nstranger: nothing"),
        Some(answer) => println!("\nstranger: {answer}"),
    }
}

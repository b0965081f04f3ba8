//! One process of an agent takes over from another, and whatever goes wrong leaves one that serves.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixDatagram, UnixListener, UnixStream},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use meshx::agent::{
    control::message::{Message, map, text},
    takeover::TAKEOVER_VERSIONS,
};
use meshx_etf::Term;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Agent, Client, PATIENCE, Refused, creation, echo_link, temp, until};

/// Another process of the agent, as the one that serves sees it.
struct Peer(UnixStream);

impl Peer {
    fn connect(agent: &Agent) -> Self {
        Self(UnixStream::connect(agent.dir.join("takeover.sock")).unwrap())
    }

    fn send(&mut self, message: &Value) {
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
    fn welcomed(agent: &Agent, versions: (u32, u32)) -> (Self, Value) {
        let mut welcome = None;
        until(PATIENCE, "a welcome", || {
            let mut peer = Self::connect(agent);
            let answer = peer.hello(versions);
            let welcomed = answer.get("welcome").is_some();
            welcome = Some((peer, answer));
            welcomed
        });
        welcome.unwrap()
    }

    /// Everything up to and with the message of this name.
    fn receive_until(&mut self, name: &str) {
        while self.receive().unwrap().get(name).is_none() {}
    }
}

/// For what has no promise.
const LONG: Duration = Duration::from_secs(30);
/// An agent that is EPMD.
const EPMD: [&str; 3] = ["--epmd=127.0.0.1:0", "--epmd-nodes", "*"];

fn epmd_port(agent: &Agent) -> u16 {
    let port = agent.ready.rsplit_once("epmd=").unwrap().1;
    port.parse().unwrap()
}

/// A client of EPMD.
mod epmd {
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };

    use meshx_dist::epmd::{Node, NodeType, Request, decode_alive2_resp, decode_names_resp};

    fn ask(port: u16, request: &Request) -> TcpStream {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(super::LONG)).unwrap();
        stream.write_all(&bytes).unwrap();
        stream
    }

    /// The connection that holds the name, and the node's creation; none when it is refused.
    pub(super) fn register(port: u16, name: &str) -> Option<(TcpStream, u32)> {
        let mut stream = ask(port, &Request::Alive2(Node::new(name, 9, NodeType::Normal)));
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        let creation = decode_alive2_resp(&answer).unwrap().unwrap().creation()?;
        Some((stream, creation))
    }

    pub(super) fn names(port: u16) -> Vec<String> {
        let mut answer = Vec::new();
        ask(port, &Request::Names).read_to_end(&mut answer).unwrap();
        let names = decode_names_resp(&answer).unwrap().nodes.into_iter();
        names.map(|(name, _)| String::from_utf8(name).unwrap()).collect()
    }
}

/// The first message of a distribution handshake, of an OTP 23 and later (ERL_DIST protocol, `send_name`).
fn name_message(name: &str) -> Vec<u8> {
    let mut message = vec![b'N'];
    // The flags of OTP 25.
    message.extend_from_slice(&0x0000_000d_07df_7fbd_u64.to_be_bytes());
    message.extend_from_slice(&7_u32.to_be_bytes());
    message.extend_from_slice(&(name.len() as u16).to_be_bytes());
    message.extend_from_slice(name.as_bytes());
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.append(&mut message);
    framed
}

/// Reads until these bytes have come.
fn read_to(stream: &mut impl Read, bytes: &[u8]) {
    let mut seen = Vec::new();
    while !seen.ends_with(bytes) {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.extend(byte);
    }
}

/// A client with a registered node that the agent must keep.
fn client(agent: &Agent) -> (Client, UnixListener) {
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
    let shown = client.ask("links", map([])).unwrap();
    assert!(shown.to_string().contains(&link), "{shown}");
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
    until(PATIENCE, "the first process to tell the third of its link", shown);
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
fn where_nodes_find_epmd_cannot_change_in_a_takeover() {
    let root = temp();
    let hosts = ["h1", "h1.lan"];
    let agent = Agent::start(root.path(), "a", &hosts, &EPMD);
    let epmd = epmd_port(&agent);
    let (_cart, _) = epmd::register(epmd, "cart").unwrap();
    for (options, seen) in [
        (&[][..], format!("--epmd is {epmd} and would be off")),
        (
            &["--epmd=127.0.0.1:1"],
            format!("--epmd is {epmd} and would be 127.0.0.1:1"),
        ),
        (
            &["--epmd=127.0.0.1:0", "--epmd-host", "h1.lan"],
            "--epmd-host is h1 and would be h1.lan".to_owned(),
        ),
    ] {
        let log = root.path().join("refused.log");
        let mut refused = Agent::command(root.path(), &agent.dir, &hosts)
            .arg("--takeover")
            .args(options)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while refused.try_wait().unwrap().is_none() && began.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Were it one that serves.
        let _ = refused.kill();
        assert_eq!(refused.wait().unwrap().code(), Some(69), "{options:?}");
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains(&seen) && text.contains("cannot change"), "{text}");
        agent.wait_log(&[&seen]);
        assert_eq!(epmd::names(epmd), ["cart"]);
    }
}

#[test]
fn what_epmd_holds_goes_over_with_its_connections() {
    let root = temp();
    let mut first = Agent::start(root.path(), "a", &["h1"], &EPMD);
    let epmd = epmd_port(&first);
    let (cart, given) = epmd::register(epmd, "cart").unwrap();
    let (tool, _) = epmd::register(epmd, "rpc-1-cart").unwrap();
    let mut second = Agent::start(root.path(), "a", &["h1"], &[&EPMD[..], &["--takeover"]].concat());
    assert_eq!(second.ready, first.ready, "EPMD has its port");
    assert!(first.wait_exit().success(), "it holds no link");
    assert_eq!(epmd::names(epmd), ["cart", "rpc-1-cart"]);
    assert_eq!(second.names(), ["cart@h1"]);
    // The same registrations as before, not new ones, and each name is its holder's.
    let log = second.log();
    assert_eq!(log.matches("node registered").count(), 1, "{log}");
    assert!(epmd::register(epmd, "cart").is_none() && epmd::register(epmd, "rpc-1-cart").is_none());
    let (_other, next) = epmd::register(epmd, "search").unwrap();
    assert!(next > given, "creations are counted on: {given}, {next}");

    // A name ends with its connection, and what ends while nobody serves is not missed.
    drop(cart);
    until(PATIENCE, "the end of a name", || second.names() == ["search@h1"]);
    let mut third = Peer::welcomed(&second, TAKEOVER_VERSIONS).0;
    third.send(&json!("begin"));
    third.receive_until("all");
    drop(tool);
    drop(third);
    until(PATIENCE, "the end of a tool", || epmd::names(epmd) == ["search"]);
    second.signal(Signal::TERM);
    assert!(second.wait_exit().success());
}

#[test]
fn a_port_of_plain_distribution_leads_on_and_its_links_live() {
    let root = temp();
    let first = Agent::start(root.path(), "a", &["h1"], &[]);
    let (mut client, listener) = client(&first);
    let port = |client: &mut Client| {
        let asked = map([("node", text("shop@h1")), ("ip", text("127.0.0.1"))]);
        let answer = client.ask("node_port", asked).unwrap();
        answer.map_get("port").and_then(Term::as_int).unwrap() as u16
    };
    let before = port(&mut client);
    // A session: it is of the same user, and so may reach that node.
    let dial = |name: &str| {
        let mut near = TcpStream::connect(("127.0.0.1", before)).unwrap();
        near.write_all(&name_message(name)).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(LONG)).unwrap();
        read_to(&mut far, name.as_bytes());
        (near, far)
    };
    let (mut near, mut far) = dial("console@h1");
    let second = Agent::start(root.path(), "a", &["h1"], &["--takeover"]);
    near.write_all(b"still here").unwrap();
    read_to(&mut far, b"still here");
    assert_eq!(port(&mut client), before);
    let (_near, _far) = dial("another@h1");
    let links = client.ask("links", map([])).unwrap().to_string();
    assert!(
        links.contains("console@h1") && links.contains("another@h1"),
        "{links}"
    );
    assert!(second.names() == ["shop@h1"]);
    // The rules of the new process end the link of the old one.
    // Its end is told beside the answer.
    client.send("deregister", map([("id", text("shop@h1"))]));
    assert_eq!(near.read(&mut [0]).unwrap_or(0), 0);
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
    assert!(first.log().contains("nothing to take over"));
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

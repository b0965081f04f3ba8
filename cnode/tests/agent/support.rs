//! Starts agents and clients.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use meshx::agent::control::message::{Message, Request, map, text};
use meshx_etf::Term;
use tempfile::TempDir;

/// What is promised within a second is waited for three times as long: the machine may be busy.
pub(crate) const PROMISED: Duration = Duration::from_secs(1);
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// For what has no promise.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A short temporary directory (sockets have 108 bytes) with one mesh in it.
pub(crate) fn temp() -> TempDir {
    tempfile::Builder::new().prefix("mx").tempdir_in("/tmp").unwrap()
}

pub(crate) struct Agent {
    pub(crate) child: Child,
    pub(crate) dir: PathBuf,
    pub(crate) ready: String,
    log: PathBuf,
}

impl Agent {
    /// An agent `name` below `root` that owns these hosts.
    pub(crate) fn start(root: &Path, name: &str, hosts: &[&str], options: &[&str]) -> Self {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(root.join(format!("{name}.log")))
            .unwrap();
        Self::with_stderr(root, name, hosts, options, log)
    }

    /// One whose log goes elsewhere.
    pub(crate) fn with_stderr(
        root: &Path,
        name: &str,
        hosts: &[&str],
        options: &[&str],
        stderr: impl Into<Stdio>,
    ) -> Self {
        let dir = root.join(name);
        let log = root.join(format!("{name}.log"));
        let mut command = Self::command(root, &dir, hosts);
        command.args(options).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        let agent = Self {
            child,
            dir,
            ready: ready.trim_end().to_owned(),
            log,
        };
        assert!(
            agent.ready.starts_with("meshx agent ready "),
            "{ready:?}: {}",
            agent.log()
        );
        agent
    }

    pub(crate) fn command(root: &Path, dir: &Path, hosts: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_meshx"));
        command
            .args(["agent", "--mesh", "embedded", "--mesh-dir"])
            .arg(root.join("mesh"));
        command
            .arg("--dir")
            .arg(dir)
            .env("RUST_LOG", "debug")
            .stdin(Stdio::null());
        hosts.iter().for_each(|host| {
            command.args(["--host", host]);
        });
        command
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// The next line of the log in which all of these are.
    pub(crate) fn wait_log(&self, words: &[&str]) {
        until(LONG, &format!("{words:?} in the log"), || {
            self.log()
                .lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
        });
    }

    pub(crate) fn vm(&self) -> PathBuf {
        self.dir.canonicalize().unwrap().join("vm")
    }

    pub(crate) fn connect(&self) -> Client {
        let mut client = self.stranger();
        client.hello();
        client
    }

    /// A connection that has not said hello.
    pub(crate) fn stranger(&self) -> Client {
        Client::connect(&self.dir)
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let mut status = None;
        until(LONG, "the agent's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let answer = self.connect().ask("names", map([])).unwrap();
        let nodes = answer.map_get("nodes").unwrap().as_list().unwrap();
        nodes
            .iter()
            .map(|node| node.map_get("node").unwrap().as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn until(limit: Duration, what: &str, mut reached: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !reached() {
        assert!(began.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    began.elapsed()
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    next: i64,
}

/// A cause and a text.
pub(crate) type Refused = (String, String);

impl Client {
    pub(crate) fn connect(dir: &Path) -> Self {
        let stream = UnixStream::connect(dir.join("control.sock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        Self { stream, next: 1 }
    }

    pub(crate) fn hello(&mut self) -> Term {
        self.ask("hello", hello_args(1, 1)).unwrap()
    }

    pub(crate) fn send(&mut self, command: &str, args: Term) -> i64 {
        let id = self.next;
        self.next += 1;
        let frame = Request {
            id,
            command: command.to_owned(),
            args,
        }
        .encode()
        .unwrap();
        self.stream.write_all(&frame).unwrap();
        id
    }

    pub(crate) fn ask(&mut self, command: &str, args: Term) -> Result<Term, Refused> {
        let sent = self.send(command, args);
        match self.receive() {
            Some(Message::Reply { id, result }) if id == sent => result,
            other => panic!("{command}: {other:?}"),
        }
    }

    /// None when the agent has closed.
    pub(crate) fn receive(&mut self) -> Option<Message> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("no answer within {LONG:?}")
            }
            Err(_) => return None,
        }
        let mut payload = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some(Message::decode(&payload).unwrap())
    }

    /// The text of the protocol error, after which the agent closes.
    pub(crate) fn protocol_error(&mut self) -> String {
        let Some(Message::Event { name, args }) = self.receive() else {
            panic!("no event")
        };
        assert_eq!(name, "protocol_error");
        let text = args.map_get("text").unwrap().as_str().unwrap().to_owned();
        assert_eq!(self.receive(), None, "closed afterwards");
        text
    }

    pub(crate) fn register(&mut self, node: &str, socket: &Path) -> Result<Term, Refused> {
        self.ask(
            "register_node",
            map([("node", text(node)), ("socket", text(socket.to_str().unwrap()))]),
        )
    }
}

pub(crate) fn hello_args(min: i64, max: i64) -> Term {
    map([
        ("versions", Term::tuple([Term::Int(min), Term::Int(max)])),
        ("features", Term::list([])),
        ("client", text("test")),
        ("os_pid", Term::from(std::process::id())),
    ])
}

pub(crate) fn cause<T: std::fmt::Debug>(result: Result<T, Refused>) -> String {
    let (cause, text) = result.expect_err("a refusal");
    println!("{cause}: {text}");
    cause
}

pub(crate) fn creation(node: &Term) -> i64 {
    node.map_get("creation").unwrap().as_int().unwrap()
}

/// A live link from the service web to the service echo, both of this client: its id and its two ends.
pub(crate) fn echo_link(client: &mut Client) -> (String, [UnixStream; 2]) {
    let listener = service(client, "echo");
    link_to(client, "echo", &listener)
}

fn path_in(answer: &Term) -> PathBuf {
    let address = answer.map_get("address").unwrap().as_tuple().unwrap();
    PathBuf::from(address[1].as_str().unwrap())
}

/// Registers the service, of the id `NAME-1`, and listens for it.
pub(crate) fn service(client: &mut Client, name: &str) -> UnixListener {
    let args = map([("name", text(name)), ("id", text(format!("{name}-1")))]);
    let service = client.ask("register_service", args).unwrap();
    UnixListener::bind(path_in(&service)).unwrap()
}

/// A live link from the service web, of this client, to the one that is listened for here: its id and its two ends.
pub(crate) fn link_to(
    client: &mut Client,
    service: &str,
    listener: &UnixListener,
) -> (String, [UnixStream; 2]) {
    let upstream = client
        .ask("connect", map([("service", text(service)), ("as", text("web"))]))
        .unwrap();
    let mut near = UnixStream::connect(path_in(&upstream)).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    let links = client.ask("links", map([])).unwrap();
    let links = links.map_get("links").unwrap().as_list().unwrap();
    let to_service = |link: &&Term| link.to_string().contains(service);
    let Some(link) = links.iter().find(to_service) else {
        panic!("{links:?}")
    };
    (
        link.map_get("id").unwrap().as_str().unwrap().to_owned(),
        [near, far],
    )
}

/// Another process that registers a node and then stays until it is killed.
pub(crate) struct Helper {
    pub(crate) child: Child,
    stdout: BufReader<ChildStdout>,
}

const HELPER: &str = "MESHX_TEST_HELPER";

impl Helper {
    /// Runs this test program again, as another user when one is given.
    pub(crate) fn start(program: &Path, dir: &Path, node: &str, socket: &str, uid: Option<u32>) -> Self {
        let mut command = Command::new(program);
        command.args(["--exact", "support::helper_process", "--nocapture", "--quiet"]);
        command.env(HELPER, format!("{}\n{node}\n{socket}", dir.display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    /// What it was answered: `ok` or the cause and text.
    pub(crate) fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the helper ended");
            if let Some(answer) = line.trim_end().strip_prefix("helper: ") {
                return answer.to_owned();
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: what [`Helper`] runs. Without its variable there is nothing to do.
#[test]
fn helper_process() {
    let Ok(task) = std::env::var(HELPER) else { return };
    let parts: Vec<&str> = task.lines().collect();
    let [dir, node, socket, link @ ..] = parts.as_slice() else {
        panic!("{task:?}")
    };
    let _listener = UnixListener::bind(socket).unwrap();
    let mut client = Client::connect(Path::new(dir));
    client.hello();
    let say = |result: Result<Term, Refused>| {
        let answer = result.map_or_else(|(cause, text)| format!("{cause}: {text}"), |_| "ok".to_owned());
        writeln!(std::io::stdout(), "\nhelper: {answer}").unwrap();
    };
    say(client.register(node, Path::new(socket)));
    if let [link] = link {
        // What a user may not who is only this node.
        let link = u128::from_str_radix(link, 16).unwrap().to_be_bytes();
        say(client.ask(
            "cut",
            map([("link", Term::binary(link)), ("reason", text("mischief"))]),
        ));
        say(client.ask("connect", map([("service", text("echo")), ("as", text("web"))])));
        let elsewhere = Term::tuple([Term::atom("uds"), text("/run/elsewhere.sock")]);
        say(client.ask(
            "register_service",
            map([("name", text("shop-web")), ("address", elsewhere)]),
        ));
        say(client.ask("register_service", map([("name", text("web"))])));
        let why = client.ask("why", map([("from", text("mail")), ("to", text("echo"))]));
        say(
            why.and_then(|why| match why.map_get("allowed").and_then(Term::as_bool) {
                Some(true) => Ok(why),
                _ => Err((why.map_get("cause").unwrap().to_string(), why.to_string())),
            }),
        );
    }
    // Until it is killed, or the test is gone.
    let _ = std::io::stdin().read(&mut [0]);
}

//! One agent inside this process, for bodies that talk to its sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use meshx::agent::Agent;
use meshx::agent::config::{AgentArgs, AgentConfig};
use meshx::agent::control::message::{Message, Request, map, text};
use meshx::agent::paths;
use meshx::proxy::wire::ConnectReply;
use meshx_etf::Term;

/// Longer than any deadline that a socket of the agent has.
const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    dir: PathBuf,
    // Held for as long as the process lives: the agent ends with them.
    _runtime: tokio::runtime::Runtime,
    _agent: Agent,
    _root: tempfile::TempDir,
}

static AGENT: LazyLock<Running> = LazyLock::new(|| {
    let root = tempfile::Builder::new().prefix("mxf").tempdir().unwrap();
    let dir = root.path().join("agent");
    let config = AgentConfig::from_args(AgentArgs {
        mesh: Some("embedded".into()),
        mesh_dir: Some(root.path().join("mesh")),
        dir: Some(dir.clone()),
        host: vec!["h1".into()],
        ..AgentArgs::default()
    })
    .unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let agent = runtime.block_on(Agent::start(config)).unwrap();
    Running {
        dir,
        _runtime: runtime,
        _agent: agent,
        _root: root,
    }
});

/// The control socket of a running agent: whatever a client sends, what comes back are whole frames that a client
/// understands, and the agent goes on. An even first byte: a hello was said before the rest.
pub fn control(data: &[u8]) {
    let Some((choice, rest)) = super::choice(data) else {
        return;
    };
    if let Ok(request) = Request::decode(rest) {
        let bytes = request.encode().unwrap();
        assert_eq!(Request::decode(&bytes[4..]), Ok(request));
    }
    std::hint::black_box(Message::decode(rest).ok());
    let mut sent = Vec::new();
    if choice & 1 == 0 {
        let versions = Term::tuple([Term::Int(1), Term::Int(1)]);
        let hello = Request {
            id: 0,
            command: "hello".into(),
            args: map([("versions", versions), ("client", text("fuzz"))]),
        };
        sent = hello.encode().unwrap();
    }
    sent.extend_from_slice(rest);
    let answer = ask(&AGENT.dir.join(paths::CONTROL_SOCKET), &sent);
    let mut left = answer.as_slice();
    while !left.is_empty() {
        let (len, rest) = left.split_first_chunk::<4>().expect("a whole length");
        let (frame, rest) = rest.split_at(u32::from_be_bytes(*len) as usize);
        Message::decode(frame).unwrap();
        left = rest;
    }
    assert!(choice & 1 == 1 || !answer.is_empty(), "hello was not answered");
}

/// The dist socket of a running agent, likewise: nobody here has a registration's secret, so at most a refusal.
pub(super) fn dist(data: &[u8]) {
    let answer = ask(&AGENT.dir.join(paths::DIST_SOCKET), data);
    if answer.is_empty() {
        return;
    }
    let (len, frame) = answer.split_first_chunk::<2>().expect("a whole length");
    assert_eq!(frame.len(), usize::from(u16::from_be_bytes(*len)));
    assert!(matches!(
        ConnectReply::decode(frame),
        Ok(ConnectReply::Refused(_))
    ));
}

/// Everything is sent, then read to the end.
fn ask(socket: &Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // An agent that has heard enough closes.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    answer
}

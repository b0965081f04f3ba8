//! A program that is rightly registered under one name, and says another one in the distribution handshake.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use meshx::agent::client::ControlClient;
use meshx::agent::control::message::{map, text};
use meshx_dist::name_frame::refusal_status;
use meshx_tests::{Agent, Beam, Mesh, wait_until};

/// For a line in a log, on a busy machine.
const LOGGED: Duration = Duration::from_secs(30);

fn packet_2(body: &[u8]) -> Vec<u8> {
    [&u16::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat()
}

/// docs/mesh-protocol.md, "Dist socket".
fn connect(secret: &[u8], target: &str) -> Vec<u8> {
    let mut link = [0; 16];
    getrandom::fill(&mut link).unwrap();
    packet_2(&[&[1, 1], &link[..], secret, &packet_2(target.as_bytes())].concat())
}

/// The flags of OTP 25, among them DFLAG_MANDATORY_25_DIGEST, which stands for all that are mandatory (dist.hrl).
const FLAGS: u64 = 0xd_07df_7fbd;
const DIGEST: u64 = 0x0400_0000;

/// `send_name`: 'N', flags:64, creation:32, length:16, name.
fn send_name(name: &str, flags: u64) -> Vec<u8> {
    let body = [
        b"N".as_slice(),
        &flags.to_be_bytes(),
        &7_u32.to_be_bytes(),
        &packet_2(name.as_bytes()),
    ];
    packet_2(&body.concat())
}

fn frame(stream: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 2];
    stream.read_exact(&mut len).unwrap();
    let mut body = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut body).unwrap();
    body
}

/// A program that is registered as `evil@h1` at this agent, as long as this lives.
struct Evil {
    secret: Vec<u8>,
    _listener: UnixListener,
    _control: ControlClient,
    _runtime: tokio::runtime::Runtime,
}

impl Evil {
    fn register(agent: &Agent) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let control = runtime
            .block_on(ControlClient::connect(Some(agent.dir())))
            .unwrap();
        let socket = agent.dir().join("vm/evil.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let request = map([
            ("node", text("evil@h1")),
            ("socket", text(socket.display().to_string())),
        ]);
        let registered = runtime
            .block_on(control.request("register_node", request))
            .unwrap();
        let secret = registered.map_get("secret").unwrap().as_binary().unwrap();
        Self {
            secret: secret.to_vec(),
            _listener: listener,
            _control: control,
            _runtime: runtime,
        }
    }

    /// Has the agent connect it to a node.
    fn dial(&self, agent: &Agent, node: &str) -> UnixStream {
        let mut dist = UnixStream::connect(agent.dir().join("dist.sock")).unwrap();
        dist.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        dist.write_all(&connect(&self.secret, node)).unwrap();
        assert_eq!(frame(&mut dist)[1], 2, "evil@h1 itself may dial");
        dist
    }
}

#[test]
fn a_spoofed_name_is_refused_and_logged() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let _shop = Beam::start(&h1, "shop@h1").unwrap();

    let evil = Evil::register(&h1);
    for name in ["shop@h1", "cart@h2", "evil@h2"] {
        let mut dist = evil.dial(&h1, "cart@h2");
        dist.write_all(&send_name(name, FLAGS)).unwrap();
        let mut answer = Vec::new();
        dist.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, refusal_status(), "{name}");
        h1.process
            .wait_log(&format!("names itself \\\"{name}\\\""), LOGGED)
            .unwrap();
    }
    h1.process.wait_log("identity_mismatch", LOGGED).unwrap();

    // A secret that nobody has.
    let mut dist = UnixStream::connect(h1.dir().join("dist.sock")).unwrap();
    dist.write_all(&connect(&[7; 32], "cart@h2")).unwrap();
    let refused = frame(&mut dist);
    assert_eq!(refused[1], 3);
    assert!(String::from_utf8_lossy(&refused).contains("bad_secret"));
    cart.expect("Node.list()", "[]").unwrap();
}

#[test]
fn flags_that_no_node_can_do_without_are_missed_and_nothing_stays() {
    let mesh = Mesh::new().unwrap();
    let metrics = ["--http", "127.0.0.1:0"];
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &metrics).unwrap();
    let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &metrics).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let evil = Evil::register(&h1);
    // None, and all but one of the mandatory ones: EXTENDED_REFERENCES, UTF8_ATOMS.
    for flags in [0, FLAGS & !DIGEST & !4, FLAGS & !DIGEST & !0x1_0000] {
        let mut dist = evil.dial(&h1, "cart@h2");
        dist.write_all(&send_name("evil@h1", flags)).unwrap();
        // OTP says nothing, or `not_allowed`, and closes. It never asks for the cookie.
        let mut answer = Vec::new();
        dist.read_to_end(&mut answer).unwrap();
        assert!(
            answer.is_empty() || answer == refusal_status(),
            "{flags:#x}: {answer:?}"
        );
        drop(dist);
        let links = || [&h1, &h2].map(|agent| agent.figure("meshx_links").unwrap());
        wait_until(Duration::from_secs(30), || links() == [0.0; 2]).unwrap();
    }
    cart.expect("Node.list([:visible, :hidden])", "[]").unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
}

//! A program that is rightly registered under one name, and says another one in the distribution handshake.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use meshx::agent::client::ControlClient;
use meshx::agent::control::message::{map, text};
use meshx_dist::name_frame::refusal_status;
use meshx_tests::{Beam, Mesh};

fn packet_2(body: &[u8]) -> Vec<u8> {
    [&u16::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat()
}

/// docs/mesh-protocol.md, "Dist socket".
fn connect(secret: &[u8], target: &str) -> Vec<u8> {
    let mut link = [0; 16];
    getrandom::fill(&mut link).unwrap();
    packet_2(&[&[1, 1], &link[..], secret, &packet_2(target.as_bytes())].concat())
}

/// `send_name` of OTP 25: 'N', flags:64, creation:32, length:16, name.
fn send_name(name: &str) -> Vec<u8> {
    let body = [
        b"N".as_slice(),
        &0xd_07df_7fbd_u64.to_be_bytes(),
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

#[test]
fn a_spoofed_name_is_refused_and_logged() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let _shop = Beam::start(&h1, "shop@h1").unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let control = runtime.block_on(ControlClient::connect(Some(h1.dir()))).unwrap();
    let socket = h1.dir().join("vm/evil.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let request = map([
        ("node", text("evil@h1")),
        ("socket", text(socket.display().to_string())),
    ]);
    let registered = runtime
        .block_on(control.request("register_node", request))
        .unwrap();
    let secret = registered
        .map_get("secret")
        .unwrap()
        .as_binary()
        .unwrap()
        .to_vec();

    for name in ["shop@h1", "cart@h2", "evil@h2"] {
        let mut dist = UnixStream::connect(h1.dir().join("dist.sock")).unwrap();
        dist.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        dist.write_all(&connect(&secret, "cart@h2")).unwrap();
        assert_eq!(frame(&mut dist)[1], 2, "evil@h1 itself may dial");
        dist.write_all(&send_name(name)).unwrap();
        let mut answer = Vec::new();
        dist.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, refusal_status(), "{name}");
        h1.process
            .wait_log(&format!("names itself \\\"{name}\\\""), Duration::from_secs(3))
            .unwrap();
    }
    h1.process
        .wait_log("identity_mismatch", Duration::from_secs(3))
        .unwrap();

    // A secret that nobody has.
    let mut dist = UnixStream::connect(h1.dir().join("dist.sock")).unwrap();
    dist.write_all(&connect(&[7; 32], "cart@h2")).unwrap();
    let refused = frame(&mut dist);
    assert_eq!(refused[1], 3);
    assert!(String::from_utf8_lossy(&refused).contains("bad_secret"));
    cart.expect("Node.list()", "[]").unwrap();
}

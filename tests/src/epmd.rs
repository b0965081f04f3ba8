//! A client of EPMD, byte for byte, and the first frames of a distribution handshake.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use meshx_dist::epmd::{
    Alive2Resp, Node, NodeType, Port2Resp, Request, decode_alive2_resp, decode_names_resp, decode_port2_resp,
};

use crate::{Context, Result};

/// Longer than anything that is promised.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program that is registered, as long as this lives.
#[derive(Debug)]
pub struct Alive {
    /// Where it is dialled.
    pub listener: TcpListener,
    /// What it was given.
    pub creation: u32,
    /// Its registration.
    pub registration: TcpStream,
}

impl Alive {
    /// Registers `name` and listens on 127.0.0.1.
    ///
    /// # Errors
    /// When it is refused.
    pub fn register(epmd: u16, name: &str) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
        let port = listener.local_addr().context("listen")?.port();
        Self::register_at(epmd, name, port, listener)
    }

    /// As [`Alive::register`], with a port of the caller's choice.
    ///
    /// # Errors
    /// When it is refused.
    pub fn register_at(epmd: u16, name: &str, port: u16, listener: TcpListener) -> Result<Self> {
        let (registration, answer) = alive2(epmd, name, port)?;
        let creation = answer.creation().ok_or_else(|| format!("{name}: {answer:?}"))?;
        Ok(Self {
            listener,
            creation,
            registration,
        })
    }
}

/// Asks for a registration.
///
/// # Errors
/// When there is no answer that is one.
pub fn alive2(epmd: u16, name: &str, port: u16) -> Result<(TcpStream, Alive2Resp)> {
    let request = Request::Alive2(Node::new(name, port, NodeType::Normal));
    let mut stream = asked((Ipv4Addr::LOCALHOST, epmd).into(), &request)?;
    let mut answer = Vec::new();
    loop {
        if let Some(answer) = decode_alive2_resp(&answer).context("read an ALIVE2_RESP")? {
            return Ok((stream, answer));
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).context("read an ALIVE2_RESP")?;
        answer.extend_from_slice(&byte);
    }
}

/// The port of a node, when there is one.
///
/// # Errors
/// When there is no answer that is one.
pub fn port_please(ip: IpAddr, epmd: u16, name: &str) -> Result<Option<u16>> {
    let answer = whole((ip, epmd).into(), &Request::PortPlease2(name.into()))?;
    match decode_port2_resp(&answer).context("read a PORT2_RESP")? {
        Some(Port2Resp::Found(node)) => Ok(Some(node.port)),
        Some(Port2Resp::NotFound(_)) => Ok(None),
        None => Err(format!("half a PORT2_RESP: {answer:?}")),
    }
}

/// All names.
///
/// # Errors
/// When there is no answer that is one.
pub fn names(epmd: u16) -> Result<Vec<String>> {
    let answer = whole((Ipv4Addr::LOCALHOST, epmd).into(), &Request::Names)?;
    let names = decode_names_resp(&answer).context("read a NAMES_RESP")?;
    let names = names.nodes.into_iter();
    Ok(names
        .map(|(name, _)| String::from_utf8_lossy(&name).into_owned())
        .collect())
}

/// Everything that comes back, up to the end.
fn whole(epmd: SocketAddr, request: &Request) -> Result<Vec<u8>> {
    let mut answer = Vec::new();
    asked(epmd, request)?
        .read_to_end(&mut answer)
        .context("read an answer")?;
    Ok(answer)
}

fn asked(epmd: SocketAddr, request: &Request) -> Result<TcpStream> {
    let mut bytes = Vec::new();
    request.encode(&mut bytes).context("write a request")?;
    let mut stream = dial(epmd)?;
    stream.write_all(&bytes).context("send a request")?;
    Ok(stream)
}

/// A connection whose reads end some time.
///
/// # Errors
/// When nobody listens there.
pub fn dial(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).context(format_args!("connect to {address}"))?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .context("set a time limit")?;
    Ok(stream)
}

/// `send_name` of OTP 25: 'N', flags:64, creation:32, length:16, name.
pub fn send_name(name: &str) -> Vec<u8> {
    let body = [
        b"N".as_slice(),
        &0xd_07df_7fbd_u64.to_be_bytes(),
        &7_u32.to_be_bytes(),
        &(name.len() as u16).to_be_bytes(),
        name.as_bytes(),
    ]
    .concat();
    [&(body.len() as u16).to_be_bytes()[..], &body].concat()
}

/// Dials a node as `name` and gives what comes back, up to the end.
///
/// # Errors
/// When nobody listens there.
pub fn dial_as(ip: IpAddr, port: u16, name: &str) -> Result<Vec<u8>> {
    let mut stream = dial((ip, port).into())?;
    stream.write_all(&send_name(name)).context("send a name")?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(answer)
}

/// A user that has nothing here.
pub const STRANGER: u32 = 4711;

/// As [`STRANGER`], sends bytes to a port of 127.0.0.1 and gives what comes back: `most` bytes, or those up to the end,
/// or none within `seconds`.
///
/// # Errors
/// When this process may not become another user.
pub fn exchange_as_stranger(port: u16, bytes: &[u8], most: usize, seconds: u32) -> Result<Vec<u8>> {
    if !rustix::process::geteuid().is_root() {
        return Err("this starts a process of another user: run it as root".to_owned());
    }
    let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{escaped}' >&3; exec timeout {seconds} head -c {most} <&3"
    );
    let uid = STRANGER.to_string();
    let output = Command::new("setpriv")
        .args([
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
            "bash",
            "-c",
            &script,
        ])
        .output()
        .context("run setpriv")?;
    Ok(output.stdout)
}

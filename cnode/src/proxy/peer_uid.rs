//! Whose process is at the other end of a TCP connection on this host, and whether one that is elsewhere answers.
//!
//! The kernel is asked for the socket by its addresses (sock_diag(7)). That finds one socket, however many there
//! are, where `/proc/net/tcp` would have to be read whole and can miss some while it changes.
//!
//! ```text
//! request  nlmsghdr: len:32 type:16=20 flags:16=1 seq:32 pid:32=0
//!          family:8 protocol:8=6 ext:8 pad:8 states:32  socket
//! answer   nlmsghdr
//!          family:8 state:8 timer:8 retrans:8  socket  expires:32 rqueue:32 wqueue:32 uid:32 inode:32
//! socket   source port:16 destination port:16 source:16 bytes destination:16 bytes interface:32 cookie:64
//! ```
//!
//! Ports and addresses are in network order, everything else in the machine's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto, socket_with,
};
use tokio::net::{TcpListener, TcpStream};

use super::cause::{Cause, Refusal};

/// Between looks whether a connection is accepted.
const ACCEPT_POLL: Duration = Duration::from_millis(1);

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct inet_diag_sockid`.
const SOCKET: usize = 48;
/// Bytes of `struct inet_diag_msg`.
const ANSWER: usize = 72;
/// `NLMSG_ERROR`: an errno follows, negative.
const ERROR: u16 = 2;
/// What `timer` is while sent bytes are not acknowledged.
const RETRANSMITS: u8 = 1;
/// And while the other end has no room, or this host no way to it.
const PROBES: u8 = 4;
/// `SOCK_DIAG_BY_FAMILY`
const BY_FAMILY: u16 = 20;

/// The uid of the process at the other end of a connection that was accepted on loopback.
///
/// # Errors
/// [`Cause::NotPermitted`] when it cannot be told: the client is elsewhere, or has closed already (then the kernel gives
/// uid 0 for a socket that is nobody's).
pub(crate) fn of(stream: &TcpStream) -> Result<u32, Refusal> {
    let addresses = || Ok((stream.peer_addr()?, stream.local_addr()?));
    let untold = |why: &dyn std::fmt::Display| {
        Cause::NotPermitted.because(format!("it cannot be told which user connects: {why}"))
    };
    let (client, here) = addresses().map_err(|error: io::Error| untold(&error))?;
    if !client.ip().is_loopback() || !here.ip().is_loopback() {
        return Err(untold(&format!("{client} is not on loopback")));
    }
    let answer = ask(client, here).map_err(|error| untold(&error))?;
    uid(&answer, client, here).map_err(|why| untold(&why))
}

/// The uid of the process that accepts a connection that was made on loopback: waits until it has. The caller sets the
/// deadline.
///
/// # Errors
/// As [`of`], when the other end is gone.
pub(super) async fn of_server(stream: &TcpStream) -> Result<u32, Refusal> {
    loop {
        let told = of(stream);
        // Until then the socket is nobody's, and the kernel tells nobody when it no longer is.
        match told {
            Err(_) if stream.peer_addr().is_ok() => tokio::time::sleep(ACCEPT_POLL).await,
            told => return told,
        }
    }
}

/// As [`of`], for a connection that this process makes to itself: whether it works here.
///
/// # Errors
/// As [`of`], or when there is no loopback.
pub(crate) async fn own() -> Result<u32, Refusal> {
    let connection = async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        let (server, _) = listener.accept().await?;
        Ok((client, server))
    };
    let (_client, server) = connection
        .await
        .map_err(|error: io::Error| Cause::NotPermitted.because(format!("loopback: {error}")))?;
    of(&server)
}

/// How often the kernel has sent bytes again, or asked for room, on the connection from `here` to `there` since the other
/// end last answered. One that has no room answers.
///
/// # Errors
/// When the kernel does not tell.
pub(super) fn retries(here: SocketAddr, there: SocketAddr) -> io::Result<u8> {
    let answer = ask(here, there)?;
    check(&answer, here, there).map_err(io::Error::other)?;
    Ok(match answer.get(HEADER + 2..HEADER + 4) {
        Some([RETRANSMITS | PROBES, retries]) => *retries,
        _ => 0,
    })
}

/// Asks the kernel for the socket of `client` whose other end is `here`.
fn ask(client: SocketAddr, here: SocketAddr) -> io::Result<Vec<u8>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let netlink = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(SOCK_DIAG))?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&netlink, &request(client, here), SendFlags::empty(), &kernel)?;
    // The kernel answers before it lets go of the request.
    let mut answer = vec![0; 512];
    let (read, _, from) = recvfrom(&netlink, &mut answer[..], RecvFlags::empty())?;
    if from.and_then(|from| SocketAddrNetlink::try_from(from).ok()) != Some(kernel) {
        return Err(io::Error::other("the answer is not the kernel's"));
    }
    answer.truncate(read);
    Ok(answer)
}

fn request(client: SocketAddr, here: SocketAddr) -> Vec<u8> {
    const LEN: usize = HEADER + 8 + SOCKET;
    let mut bytes = Vec::with_capacity(LEN);
    bytes.extend_from_slice(&(LEN as u32).to_ne_bytes());
    bytes.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&1u16.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family(client), 6, 0, 0]);
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(&addresses(client, here));
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    // Any cookie.
    bytes.extend_from_slice(&[0xff; 8]);
    bytes
}

fn word(answer: &[u8], at: usize) -> Option<u32> {
    answer.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Whether an answer is of just the socket that was asked for.
fn check(answer: &[u8], client: SocketAddr, here: SocketAddr) -> Result<(), String> {
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(BY_FAMILY) if answer.len() >= HEADER + ANSWER => {}
        Some(ERROR) => {
            let code = word(answer, HEADER).unwrap_or_default().cast_signed();
            return Err(io::Error::from_raw_os_error(code.saturating_neg()).to_string());
        }
        _ => return Err("the kernel's answer is not understood".to_owned()),
    }
    // Without such a socket the kernel gives one that listens there.
    let is_of = |client, here| {
        let wanted = addresses(client, here);
        answer.get(HEADER + 4..HEADER + 4 + wanted.len()) == Some(wanted.as_slice())
    };
    // An IPv6 socket that reaches an IPv4 one is told with mapped addresses.
    if !is_of(client, here) && !is_of(mapped(client), mapped(here)) {
        return Err(format!("{client} has no socket to {here} any more"));
    }
    Ok(())
}

/// The uid in an answer.
fn uid(answer: &[u8], client: SocketAddr, here: SocketAddr) -> Result<u32, String> {
    check(answer, client, here)?;
    let (uid, inode) = (
        word(answer, HEADER + ANSWER - 8),
        word(answer, HEADER + ANSWER - 4),
    );
    match (uid, inode) {
        (Some(uid), Some(inode)) if inode != 0 => Ok(uid),
        _ => Err(format!("{client} has closed already")),
    }
}

/// Ports and addresses as in `struct inet_diag_sockid`.
fn addresses(client: SocketAddr, here: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SOCKET);
    bytes.extend_from_slice(&client.port().to_be_bytes());
    bytes.extend_from_slice(&here.port().to_be_bytes());
    for address in [client.ip(), here.ip()] {
        let octets = match address {
            IpAddr::V4(address) => {
                let mut octets = [0; 16];
                octets[..4].copy_from_slice(&address.octets());
                octets
            }
            IpAddr::V6(address) => address.octets(),
        };
        bytes.extend_from_slice(&octets);
    }
    bytes
}

fn family(address: SocketAddr) -> u8 {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    family.as_raw() as u8
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::time::Instant;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn who_has_no_room_answers_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        client.writable().await.unwrap();
        while client.try_write(&[0; 65_536]).is_ok() {}
        let ends = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        while retries(ends.0, ends.1).unwrap() > 0 {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(ACCEPT_POLL).await;
        }
        drop(server);
    }

    #[tokio::test]
    async fn the_client_of_a_loopback_connection_is_known() {
        let own = rustix::process::geteuid().as_raw();
        for ip in ["127.0.0.1", "127.0.0.9", "[::1]"] {
            let listener = TcpListener::bind(format!("{ip}:0")).await.unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            assert_eq!(of(&stream), Ok(own), "{ip}");
            assert_eq!(of(&client), Ok(own), "{ip}: the accepted end");
        }
    }

    #[tokio::test]
    async fn an_ipv6_client_of_an_ipv4_address_is_known() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(format!("[::ffff:127.0.0.9]:{port}"))
            .await
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        assert_eq!(of(&stream), Ok(rustix::process::geteuid().as_raw()));
        drop(client);
        assert!(of(&stream).is_err());
    }

    /// The kernel says uid 0 of a socket that no process has any more.
    #[tokio::test]
    async fn a_client_that_is_gone_is_nobody_and_not_root() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        drop(client);
        let refusal = of(&stream).unwrap_err();
        assert_eq!(refusal.cause, Cause::NotPermitted, "{refusal}");
    }

    #[tokio::test]
    async fn a_server_is_known_when_it_accepts() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(of(&client).is_err(), "not accepted yet");
        let accept = async {
            tokio::time::sleep(ACCEPT_POLL * 3).await;
            listener.accept().await.unwrap()
        };
        let (told, _accepted) = tokio::join!(of_server(&client), accept);
        assert_eq!(told, Ok(rustix::process::geteuid().as_raw()));
    }

    /// With nothing connected, the kernel finds who listens at the client's address.
    #[tokio::test]
    async fn a_listener_is_not_taken_for_a_client() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (there, here) = (listener.local_addr().unwrap(), "127.0.0.1:9".parse().unwrap());
        let answer = ask(there, here).unwrap();
        let why = uid(&answer, there, here).unwrap_err();
        assert!(why.contains("no socket"), "{why}");
        let why = uid(&ask(here, there).unwrap(), here, there).unwrap_err();
        assert!(why.contains("No such file"), "{why}");
    }

    #[test]
    fn answers_that_are_cut_off_are_no_answers() {
        let (a, b) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        let mut answer = vec![0; HEADER];
        answer[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer.extend([2, 1, 0, 0]);
        answer.extend(addresses(a, b));
        answer.extend([0; 4 + 8 + 12]);
        answer.extend(1000u32.to_ne_bytes());
        answer.extend(1u32.to_ne_bytes());
        assert_eq!(uid(&answer, a, b), Ok(1000));
        for len in 0..answer.len() {
            assert!(uid(&answer[..len], a, b).is_err(), "{len}");
        }
    }
}

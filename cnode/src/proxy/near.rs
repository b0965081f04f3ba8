//! Sockets between this agent and the programs of its host.

use std::io;

use rustix::net::sockopt;
use tokio::net::{TcpStream, UnixStream};

/// What may wait in a Unix socket for a program that does not read yet, in bytes; `net.core.wmem_max` caps it. The
/// kernel grows the buffers of TCP by itself, but never these, and wakes who waits for one only when three quarters of it
/// are free: with its default of 208 KiB both ends wait for each other in turn.
pub(super) const SEND_BUFFER: usize = 1 << 20;

/// Gives the socket its buffer.
pub(super) fn widen(stream: &UnixStream) {
    // Without it bytes flow all the same.
    let _ = sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER);
}

/// Lets what is written to a connection within this host go at once: small writes, and large ones too, which BBR, the
/// default of many hosts, paces even where nothing is lost and nothing is shared. Reno is part of every Linux.
pub(super) fn hasten(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Who is gone already has no address, and that shows soon enough.
    if stream
        .peer_addr()
        .is_ok_and(|peer| peer.ip().to_canonical().is_loopback())
    {
        // Without it bytes flow all the same.
        let _ = sockopt::set_tcp_congestion(stream, "reno");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn nothing_paces_a_connection_within_the_host() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let (client, server) = tokio::join!(
                TcpStream::connect(listener.local_addr().unwrap()),
                listener.accept()
            );
            for stream in [client.unwrap(), server.unwrap().0] {
                hasten(&stream).unwrap();
                assert!(sockopt::tcp_nodelay(&stream).unwrap());
                assert_eq!(sockopt::tcp_congestion(&stream).unwrap(), "reno");
            }
        }
    }

    #[tokio::test]
    async fn a_socket_gets_what_the_host_allows() {
        let most = std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
        let allowed = SEND_BUFFER.min(most.trim().parse().unwrap());
        let (stream, _other) = UnixStream::pair().unwrap();
        widen(&stream);
        // The kernel counts its own overhead in, and doubles what it is asked for (socket(7)).
        assert_eq!(sockopt::socket_send_buffer_size(&stream).unwrap(), 2 * allowed);
    }
}

//! Dead hosts: TCP tells of one only when asked to look.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::peer_uid;

/// Silence after which a probe is sent.
pub(super) const IDLE: Duration = Duration::from_secs(15);
/// Between probes that are not answered.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// Probes that may stay unanswered.
pub(super) const PROBES: u32 = 3;
/// Between looks whether sent bytes are acknowledged.
const LOOK: Duration = Duration::from_secs(5);
/// Looks in a row that find them sent again and again: 25 s to 30 s, as long as the probes take together.
const LOOKS: u32 = 5;
/// How often is again and again: each of them may be lost on the way, and the next come late.
const RETRIES: u8 = 3;

/// For connections between agents: a link to a host that is gone without a word (power, network) ends within 30 s when it
/// is idle, and by [`gone`] when it is sending. Distribution has ticks of its own, RPC and plain TCP may be silent for
/// days.
pub(super) fn watch(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, IDLE)?;
    sockopt::set_tcp_keepintvl(stream, INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

/// Returns when the host at the other end has acknowledged nothing of what it is sent for about 30 s.
///
/// The kernel would look by itself (TCP_USER_TIMEOUT, tcp(7)), but also ends connections whose other end lives and has no
/// room: whoever reads nothing for that long lost his link.
pub(super) async fn gone(here: SocketAddr, there: SocketAddr) {
    let (mut looks, mut before) = (0, 0);
    while looks < LOOKS {
        sleep(LOOK).await;
        // Where the kernel does not tell, it gives up by itself at last (tcp_retries2).
        let retries = peer_uid::retries(here, there).unwrap_or_default();
        looks = match retries >= RETRIES.max(before) {
            true => looks + 1,
            false => 0,
        };
        before = retries;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn a_watched_connection_has_the_options() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        watch(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert!(sockopt::tcp_nodelay(&stream).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), PROBES);
        // It would end links whose reader takes his time.
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 0);
    }
}

//! Dead hosts: TCP tells of one only when asked to look.

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// Silence after which a probe is sent.
pub(super) const IDLE: Duration = Duration::from_secs(15);
/// Between probes that are not answered.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// Probes that may stay unanswered.
pub(super) const PROBES: u32 = 3;
/// How long sent bytes may stay unacknowledged (TCP_USER_TIMEOUT, tcp(7)): as long as the probes take together.
pub(super) const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// For connections between agents: a link to a host that is gone without a word (power, network) ends within 30 s, whether
/// it is idle or sending. Distribution has ticks of its own, RPC and plain TCP may be silent for days.
pub(super) fn watch(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, IDLE)?;
    sockopt::set_tcp_keepintvl(stream, INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    sockopt::set_tcp_user_timeout(
        stream,
        u32::try_from(UNACKNOWLEDGED.as_millis()).unwrap_or(u32::MAX),
    )?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
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
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 30_000);
    }
}

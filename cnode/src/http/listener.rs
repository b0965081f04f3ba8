//! Connections with limits: a peer can hold little, and not for long.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use crate::proxy::admission::{Admission, Origin};

/// Connections at a time, three quarters of them of one address; one more ends the oldest of whoever has most, so that
/// nobody's silent ones keep a probe waiting.
pub const CONNECTIONS_MAX: usize = 32;
/// How long one may last, its answer included.
pub const CONNECTION_TIME: Duration = Duration::from_secs(5);
/// Bytes that a peer may send on one: a request of a few headers.
pub const BYTES_MAX: usize = 8 << 10;
/// Pause after the system could not give a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections with these limits.
pub(super) struct Bounded {
    listener: Arc<TcpListener>,
    admission: Arc<Admission>,
}

impl Bounded {
    pub(super) fn new(listener: Arc<TcpListener>) -> Self {
        Self {
            listener,
            admission: Admission::new(CONNECTIONS_MAX),
        }
    }
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let slot = self.admission.enter(Origin::address(peer.ip()));
                    let connection = Connection {
                        stream,
                        left: BYTES_MAX,
                        end: Some(Box::pin(async move {
                            let _ = timeout(CONNECTION_TIME, slot.evicted()).await;
                        })),
                    };
                    return (connection, peer);
                }
                Err(error) => {
                    tracing::debug!(%error, "an http connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One connection. Beyond a limit it fails.
pub(super) struct Connection {
    stream: TcpStream,
    left: usize,
    /// Has its place, and is ready when it has to end; none after that.
    end: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Connection {
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let over = match &mut self.end {
            Some(end) => end.as_mut().poll(context).is_ready(),
            None => true,
        };
        if over {
            self.end = None;
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.in_time(context)?;
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        match self.left.checked_sub(buffer.filled().len() - before) {
            Some(left) => self.left = left,
            None => return Poll::Ready(Err(io::Error::other("more bytes than a request may have"))),
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.in_time(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// The server reads, and then shuts it down: both find it over.
    #[tokio::test]
    async fn a_connection_that_is_over_says_so_each_time_it_is_asked() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (stream, _peer) = tokio::join!(
            async { TcpStream::connect(listener.local_addr().unwrap()).await.unwrap() },
            async { listener.accept().await.unwrap() },
        );
        let mut connection = Connection {
            stream,
            left: BYTES_MAX,
            end: Some(Box::pin(async {})),
        };
        for _ in 0..2 {
            assert_eq!(
                connection.read_u8().await.unwrap_err().kind(),
                io::ErrorKind::TimedOut
            );
            assert_eq!(
                connection.shutdown().await.unwrap_err().kind(),
                io::ErrorKind::TimedOut
            );
            assert_eq!(
                connection.write_u8(0).await.unwrap_err().kind(),
                io::ErrorKind::TimedOut
            );
        }
    }
}

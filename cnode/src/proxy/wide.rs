//! A TCP connection that is read in large pieces.
//!
//! rustls takes what it reads by single records of 16 KiB. That many system calls cost less than what comes with them:
//! after each, the kernel tells the sender of the room that there is again, and wakes it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

/// What is read at first: a stranger who has not shown his certificate gets no more memory than that of a record or two.
const FIRST: usize = 16 << 10;
/// By how much more after a piece that was full.
const GROWTH: usize = 4;
/// The most that is read at once.
const MOST: usize = 256 << 10;

/// See above. It holds memory only as long as there is something to read.
#[derive(Debug)]
pub(super) struct Wide {
    stream: TcpStream,
    held: BytesMut,
    /// What is read next time.
    piece: usize,
}

impl Wide {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            held: BytesMut::new(),
            piece: FIRST,
        }
    }

    /// Its addresses, here and there.
    pub(super) fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.stream.local_addr()?, self.stream.peer_addr()?))
    }
}

impl AsyncRead for Wide {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, held, piece } = &mut *self;
        if held.is_empty() {
            held.reserve(*piece);
            let read = poll_read_buf(Pin::new(stream), cx, &mut held.limit(*piece));
            if held.is_empty() {
                (*held, *piece) = (BytesMut::new(), FIRST);
            } else if held.len() >= *piece {
                *piece = (*piece * GROWTH).min(MOST);
            }
            ready!(read)?;
        }
        let taken = held.len().min(buffer.remaining());
        buffer.put_slice(held.get(..taken).unwrap_or_default());
        held.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wide {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn what_was_sent_is_read_in_whatever_pieces() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let sent: Vec<u8> = (0..5 * MOST + 7).map(|at| (at % 251) as u8).collect();
        let wanted = sent.clone();
        let (mut wide, mut seen) = (Wide::new(near), Vec::new());
        assert!(futures::poll!(Box::pin(wide.read(&mut [0]))).is_pending());
        assert_eq!(wide.held.capacity(), 0);
        let sending = tokio::spawn(async move { far.write_all(&sent).await });
        for size in (1..).step_by(997) {
            let (mut piece, before) = (vec![0; size], wide.piece);
            match wide.read(&mut piece).await.unwrap() {
                0 => break,
                read => seen.extend_from_slice(&piece[..read]),
            }
            assert!(wide.held.len() <= before, "{} of {before}", wide.held.len());
            assert!(seen.len() > 1 || wide.held.len() < 16 << 10, "at first");
        }
        sending.await.unwrap().unwrap();
        assert!(seen == wanted);
        assert_eq!(wide.held.capacity(), 0);
    }
}

//! Reading and writing the frames of [`super::wire`] on a stream, within a deadline.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use meshx_dist::handshake::Status;
use meshx_dist::name_frame::{
    PeekError, clear_published_of_challenge, peek_challenge_frame, peek_name_frame, peek_status_frame,
};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::{client, server};

use super::cause::{Cause, Refusal};
use super::tls;
use super::wide::Wide;
use super::wire::WireError;

/// Both ways of a connection, whatever carries it.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {
    /// Whether the other side is to see that the connection broke off when it is closed, even by the death of this
    /// process: whoever reads to the end must not take a part for the whole. TLS tells by itself, and a Unix socket
    /// has no way to.
    fn breaks_off(&self, _breaks: bool) {}

    /// Its addresses, here and there, when it leads to another agent.
    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        None
    }
}

impl Duplex for TcpStream {
    fn breaks_off(&self, breaks: bool) {
        // No time to linger: the kernel closes with RST (socket(7), SO_LINGER). Without it bytes flow all the same.
        let _ = sockopt::set_socket_linger(self, breaks.then_some(Duration::ZERO));
    }
}

impl Duplex for UnixStream {}
impl Duplex for Wide {}

impl Duplex for client::TlsStream<Wide> {
    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.get_ref().0.addresses().ok()
    }
}

impl Duplex for server::TlsStream<Wide> {
    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.get_ref().0.addresses().ok()
    }
}

/// Reads one frame without its length, and not a byte more.
pub(super) async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    max: usize,
    deadline: Duration,
) -> Result<Vec<u8>, Refusal> {
    let whole = async {
        let mut header = [0; 2];
        fill(stream, &mut header, 0).await?;
        let len = usize::from(u16::from_be_bytes(header));
        if len > max {
            return Err(WireError::TooLong { len, max }.into());
        }
        let mut payload = vec![0; len];
        fill(stream, &mut payload, header.len()).await?;
        Ok(payload)
    };
    timeout(deadline, whole)
        .await
        .unwrap_or_else(|_| Err(silent("a whole frame", deadline)))
}

/// Reads until `wanted` is full; `before` bytes of the frame have come already. Who closes inside a frame breaks the
/// protocol; who closes without a word is away.
async fn fill(
    stream: &mut (impl AsyncRead + Unpin),
    wanted: &mut [u8],
    before: usize,
) -> Result<(), Refusal> {
    let mut done = 0;
    while let Some(left) = wanted.get_mut(done..).filter(|left| !left.is_empty()) {
        match stream.read(left).await {
            Ok(0) => return Err(ended(before + done)),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(ended(before + done)),
            Err(error) => return Err(tls::refusal(&error)),
        }
    }
    Ok(())
}

fn ended(read: usize) -> Refusal {
    match read {
        0 => Cause::Unreachable.because("the other side closed the connection without a word"),
        _ => Cause::InvalidRequest.because(format!(
            "the other side closed the connection inside a frame, after {read} of its bytes"
        )),
    }
}

/// Reads the dialler's name message; returns the name and all bytes that were read.
///
/// The stream is judged as it comes, so what cannot become a name message is refused at its first wrong byte.
pub(super) async fn read_name(
    stream: &mut (impl AsyncRead + Unpin),
    deadline: Duration,
) -> Result<(String, Vec<u8>), Refusal> {
    let name = |bytes: &[u8]| Ok(peek_name_frame(bytes)?.map(|frame| frame.name.to_owned()));
    read_first(stream, Vec::new(), deadline, "a distribution name message", name).await
}

/// Reads the acceptor's status; returns the name that it gives to a dialler without one, and all bytes that were read.
pub(super) async fn read_given_name(
    stream: &mut (impl AsyncRead + Unpin),
    deadline: Duration,
) -> Result<(Option<String>, Vec<u8>), Refusal> {
    let given = |bytes: &[u8]| {
        Ok(peek_status_frame(bytes)?.map(|frame| match frame.status {
            Status::Named { name, .. } => Some(name.to_owned()),
            _ => None,
        }))
    };
    read_first(stream, Vec::new(), deadline, "a distribution status", given).await
}

/// Between a name message whose `PUBLISHED` was cleared and the rest of the handshake: the acceptor's status and
/// challenge go to the dialler, the challenge without `PUBLISHED` as well, so that both ends see a hidden node.
pub(super) async fn hide_acceptor(
    dialler: &mut (impl AsyncRead + AsyncWrite + Unpin),
    acceptor: &mut (impl AsyncRead + AsyncWrite + Unpin),
    deadline: Duration,
) -> Result<(), Refusal> {
    const STATUS: &str = "a distribution status";
    // How long the status is, and whether the handshake goes on: none, when the dialler is asked first.
    let status = |bytes: &[u8]| {
        Ok(peek_status_frame(bytes)?.map(|frame| {
            let on = match frame.status {
                Status::Ok | Status::OkSimultaneous | Status::Named { .. } | Status::True => Some(true),
                Status::Alive => None,
                Status::Nok | Status::NotAllowed | Status::False => Some(false),
            };
            (frame.consumed, on)
        }))
    };
    let ((len, mut on), mut bytes) = read_first(acceptor, Vec::new(), deadline, STATUS, status).await?;
    let rest = bytes.split_off(len);
    write_all(dialler, &bytes, deadline).await?;
    if on.is_none() {
        let ((_, answer), bytes) = read_first(dialler, Vec::new(), deadline, STATUS, status).await?;
        write_all(acceptor, &bytes, deadline).await?;
        on = answer;
    }
    if on != Some(true) {
        return write_all(dialler, &rest, deadline).await;
    }
    let challenge = "a distribution challenge";
    let (_, mut bytes) = read_first(acceptor, rest, deadline, challenge, peek_challenge_frame).await?;
    clear_published_of_challenge(&mut bytes)
        .map_err(|error| Cause::InvalidRequest.because(format!("distribution handshake: {error}")))?;
    write_all(dialler, &bytes, deadline).await
}

/// Reads on from `bytes` until `peek` finds what it looks for.
async fn read_first<T>(
    stream: &mut (impl AsyncRead + Unpin),
    mut bytes: Vec<u8>,
    deadline: Duration,
    what: &str,
    peek: impl Fn(&[u8]) -> Result<Option<T>, PeekError>,
) -> Result<(T, Vec<u8>), Refusal> {
    const CHUNK: usize = 512;
    let whole = async {
        loop {
            match peek(&bytes) {
                Ok(Some(found)) => return Ok((found, bytes)),
                Ok(None) => {}
                Err(error) => {
                    return Err(Cause::InvalidRequest.because(format!("distribution handshake: {error}")));
                }
            }
            let mut chunk = [0; CHUNK];
            let read = match stream.read(&mut chunk).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                read => read.map_err(|error| tls::refusal(&error))?,
            };
            if read == 0 {
                return Err(ended(bytes.len()));
            }
            bytes.extend_from_slice(chunk.get(..read).unwrap_or_default());
        }
    };
    timeout(deadline, whole)
        .await
        .unwrap_or_else(|_| Err(silent(what, deadline)))
}

/// Writes all and flushes.
pub(super) async fn write_all(
    stream: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    deadline: Duration,
) -> Result<(), Refusal> {
    let write = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    match timeout(deadline, write).await {
        Ok(result) => result.map_err(|error| tls::refusal(&error)),
        Err(_) => Err(Cause::Timeout.because(format!("the other side took nothing for {deadline:?}"))),
    }
}

/// Ends a refused connection so that the other side can read why: closing with unread bytes would reset it.
pub(super) async fn linger(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), patience: Duration) {
    const MAX_DISCARDED: u64 = 64 << 10;
    let _ = timeout(patience, async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(MAX_DISCARDED), &mut tokio::io::sink()).await
    })
    .await;
}

pub(super) fn silent(wanted: &str, deadline: Duration) -> Refusal {
    Cause::Timeout.because(format!("waited {deadline:?} for {wanted}"))
}

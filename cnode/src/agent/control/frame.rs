//! Frames of the control socket: a 32-bit length and that many bytes.

use std::{future::pending, io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};

/// Largest frame that a client may send.
pub const REQUEST_MAX: usize = 64 << 10;
/// Largest frame that the agent sends.
pub const REPLY_MAX: usize = 16 << 20;
/// A frame whose first byte has come must be whole within this time.
pub const FRAME_TIME: Duration = Duration::from_secs(5);

/// Why there is no further frame. The other side is at fault, unless the connection broke.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// It announces more than is taken.
    #[error("a frame of {len} bytes, at most {max} are taken")]
    TooLarge {
        /// Bytes announced.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The rest did not come in time.
    #[error("a frame was not whole within {} s", FRAME_TIME.as_secs())]
    Slow,
    /// The connection ended inside a frame.
    #[error("the connection ended inside a frame")]
    Cut,
    /// It broke.
    #[error("{0}")]
    Io(io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Cut,
            _ => Self::Io(error),
        }
    }
}

/// Reads one frame; none when the other side has closed between two. Waits for the first byte as long as
/// the caller does. Not cancel-safe: what was read of a frame is lost.
///
/// # Errors
/// [`FrameError`]; the connection cannot be read on.
pub async fn read_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
) -> Result<Option<Vec<u8>>, FrameError> {
    match read_frame_unless(reader, max, pending()).await? {
        Next::Frame(frame) => Ok(Some(frame)),
        Next::Closed | Next::Stopped => Ok(None),
    }
}

/// What comes next on a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A whole frame.
    Frame(Vec<u8>),
    /// The other side has closed between two.
    Closed,
    /// Nothing of a frame was read when it was to stop.
    Stopped,
}

/// As [`read_frame`], until `stop` resolves between two frames.
pub(super) async fn read_frame_unless<R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
    stop: impl Future<Output = ()>,
) -> Result<Next, FrameError> {
    let mut length = [0; 4];
    tokio::select! {
        // A frame whose first byte is read is read whole.
        biased;
        () = stop => return Ok(Next::Stopped),
        read = reader.read(&mut length[..1]) => if read? == 0 {
            return Ok(Next::Closed);
        },
    }
    let rest = async {
        reader.read_exact(&mut length[1..]).await?;
        // A u32 fits: the targets are 64-bit; elsewhere a length that does not fit is too large anyway.
        let len = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if len > max {
            return Err(FrameError::TooLarge { len, max });
        }
        // Grows with what comes, not with what was announced.
        let mut payload = Vec::new();
        reader.take(len as u64).read_to_end(&mut payload).await?;
        if payload.len() < len {
            return Err(FrameError::Cut);
        }
        Ok(Next::Frame(payload))
    };
    timeout(FRAME_TIME, rest).await.map_err(|_| FrameError::Slow)?
}

/// A frame around a payload that some encoder appends.
///
/// # Errors
/// The encoder's; none from here: the payload's length is checked against [`REPLY_MAX`] by the reader.
pub fn frame<E>(encode: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Vec<u8>, E> {
    let mut bytes = vec![0; 4];
    encode(&mut bytes)?;
    let len = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&len.to_be_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn framed(payload: &[u8]) -> Vec<u8> {
        frame(|bytes| {
            bytes.extend_from_slice(payload);
            Ok::<(), ()>(())
        })
        .unwrap()
    }

    #[tokio::test]
    async fn a_length_over_the_limit_is_refused_before_its_bytes() {
        let mut bytes: &[u8] = &[0, 1, 0, 1];
        let error = read_frame(&mut bytes, REQUEST_MAX).await.unwrap_err().to_string();
        assert!(error.contains("65537") && error.contains("65536"), "{error}");
        let mut bytes: &[u8] = &[0xff; 4];
        assert!(matches!(
            read_frame(&mut bytes, REPLY_MAX).await,
            Err(FrameError::TooLarge { .. })
        ));
    }

    #[tokio::test]
    async fn an_end_inside_a_frame_is_told_from_one_between_two() {
        assert!(read_frame(&mut &b""[..], 9).await.unwrap().is_none());
        for cut in [1, 3, 4, 6] {
            let bytes = framed(b"abc");
            assert!(
                matches!(read_frame(&mut &bytes[..cut], 9).await, Err(FrameError::Cut)),
                "{cut}"
            );
        }
        assert_eq!(read_frame(&mut &framed(b"")[..], 9).await.unwrap(), Some(vec![]));
    }

    #[tokio::test]
    async fn a_stop_comes_between_two_frames_and_loses_nothing() {
        let (mut near, mut far) = tokio::io::duplex(64);
        near.write_all(&framed(b"one")).await.unwrap();
        let ready = || std::future::ready(());
        assert_eq!(
            read_frame_unless(&mut far, 9, ready()).await.unwrap(),
            Next::Stopped
        );
        assert_eq!(
            read_frame_unless(&mut far, 9, pending()).await.unwrap(),
            Next::Frame(b"one".to_vec())
        );
        // Stopped while it waits for the rest: the frame is still read whole.
        let two = framed(b"two");
        near.write_all(&two[..2]).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let mut reading = Box::pin(read_frame_unless(&mut far, 9, stop.cancelled()));
        assert!(futures::poll!(&mut reading).is_pending());
        stop.cancel();
        near.write_all(&two[2..]).await.unwrap();
        assert_eq!(reading.await.unwrap(), Next::Frame(b"two".to_vec()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_come_whole_however_the_stream_is_split(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 1..6),
            sizes in proptest::collection::vec(1usize..9, 1..20),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let stream: Vec<u8> = payloads.iter().flat_map(|payload| framed(payload)).collect();
                let (mut near, mut far) = tokio::io::duplex(7);
                let writing = tokio::spawn(async move {
                    let mut rest = &stream[..];
                    for size in sizes.iter().cycle() {
                        if rest.is_empty() { break }
                        let (piece, later) = rest.split_at((*size).min(rest.len()));
                        near.write_all(piece).await.unwrap();
                        rest = later;
                    }
                });
                for payload in &payloads {
                    assert_eq!(read_frame(&mut far, 64).await.unwrap().as_ref(), Some(payload));
                }
                assert!(read_frame(&mut far, 64).await.unwrap().is_none());
                writing.await.unwrap();
            });
        }
    }
}

//! Messages between two processes of one agent: JSON in the control socket's framing, with open files beside it
//! (SCM_RIGHTS, unix(7)).

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
    time::timeout,
};

use crate::agent::control::frame::frame;

/// Largest message. A registration is the largest: its request had 64 KiB.
pub(super) const MESSAGE_MAX: usize = 1 << 20;
/// Most open files that go with one message.
pub(super) const FILES_MAX: usize = 8;
/// How long the other process may take to send or take one message, unless it is waited for longer.
pub(super) const MESSAGE_TIME: Duration = Duration::from_secs(5);

/// A connection to another process of this agent.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) stream: UnixStream,
    /// Came with bytes that are read, and were not asked for yet.
    files: VecDeque<OwnedFd>,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            files: VecDeque::new(),
        }
    }

    /// Sends one message, and the files that it speaks of.
    pub(super) async fn send<T: Serialize>(
        &mut self,
        message: &T,
        files: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = frame(|bytes| serde_json::to_writer(bytes, message))?;
        if bytes.len() - 4 > MESSAGE_MAX || files.len() > FILES_MAX {
            return Err(invalid(format!(
                "a message of {} bytes with {} files, at most {MESSAGE_MAX} and {FILES_MAX} are sent",
                bytes.len() - 4,
                files.len()
            )));
        }
        let sending = async {
            let sent = self.send_some(&bytes, files).await?;
            self.stream.write_all(&bytes[sent..]).await
        };
        timeout(MESSAGE_TIME, sending).await.map_err(|_| slow())?
    }

    /// The next message; none when the other process has closed. Not cancel-safe.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        match timeout(MESSAGE_TIME, self.receive_late()).await {
            Ok(received) => received,
            Err(_) => Err(slow()),
        }
    }

    /// As [`Channel::receive`], however long it takes.
    pub(super) async fn receive_late<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut length = [0; 4];
        if !self.fill(&mut length).await? {
            return Ok(None);
        }
        let len = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if len > MESSAGE_MAX {
            return Err(invalid(format!(
                "a message of {len} bytes, at most {MESSAGE_MAX} are taken"
            )));
        }
        let mut payload = vec![0; len];
        if !self.fill(&mut payload).await? && len > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_slice(&payload)
            .map(Some)
            .map_err(io::Error::from)
    }

    /// The next file that came with what was received.
    pub(super) fn file(&mut self) -> io::Result<OwnedFd> {
        let file = self.files.pop_front();
        file.ok_or_else(|| invalid("a message speaks of an open file that did not come with it".to_owned()))
    }

    async fn send_some(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
            let mut beside = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                beside.push(SendAncillaryMessage::ScmRights(files));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut beside, flags)?)
        };
        self.stream.async_io(Interest::WRITABLE, send).await
    }

    /// False when the other process has closed before the first byte.
    async fn fill(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            let read = receive_some(&self.stream, &mut buffer[filled..], &mut self.files).await?;
            if read == 0 {
                return match filled {
                    0 => Ok(false),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
            if self.files.len() > FILES_MAX {
                return Err(invalid(format!(
                    "{} open files wait, at most {FILES_MAX} go with a message",
                    self.files.len()
                )));
            }
            filled += read;
        }
        Ok(true)
    }
}

async fn receive_some(
    stream: &UnixStream,
    buffer: &mut [u8],
    files: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(buffer)], &mut beside, flags)?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        Ok(received.bytes)
    };
    stream.async_io(Interest::READABLE, receive).await
}

pub(super) fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn slow() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the other process was silent for {} s", MESSAGE_TIME.as_secs()),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (near, far) = UnixStream::pair().unwrap();
        (Channel::new(near), Channel::new(far))
    }

    #[tokio::test]
    async fn messages_come_in_order_and_files_with_their_message() {
        let (mut near, mut far) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        let text = "x".repeat(300_000);
        let long = text.clone();
        let sending = tokio::spawn(async move {
            near.send(&"one", &[]).await.unwrap();
            near.send(&long, &[file.as_fd(), file.as_fd()]).await.unwrap();
            near.send(&3, &[]).await.unwrap();
        });
        assert_eq!(far.receive::<String>().await.unwrap().unwrap(), "one");
        assert!(far.file().is_err(), "none came with the first");
        assert_eq!(far.receive::<String>().await.unwrap().unwrap(), text);
        for _ in 0..2 {
            let mut file = std::fs::File::from(far.file().unwrap());
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut read = String::new();
            file.read_to_string(&mut read).unwrap();
            assert_eq!(read, "inside");
        }
        assert!(far.file().is_err());
        assert_eq!(far.receive::<u8>().await.unwrap().unwrap(), 3);
        sending.await.unwrap();
        assert!(far.receive::<u8>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn too_much_is_refused_on_both_sides() {
        let (mut near, mut far) = pair();
        let file = tempfile::tempfile().unwrap();
        let nine = [file.as_fd(); FILES_MAX + 1];
        assert!(
            near.send(&1, &nine)
                .await
                .unwrap_err()
                .to_string()
                .contains("9 files")
        );
        let long = "x".repeat(MESSAGE_MAX);
        assert!(near.send(&long, &[]).await.is_err());
        near.stream.write_all(&[0xff; 4]).await.unwrap();
        let error = far.receive::<u8>().await.unwrap_err().to_string();
        assert!(error.contains("4294967295 bytes"), "{error}");

        // Files that no message speaks of do not pile up.
        let (mut near, mut far) = pair();
        let eight = [file.as_fd(); FILES_MAX];
        for _ in 0..2 {
            near.send(&1, &eight).await.unwrap();
        }
        assert_eq!(far.receive::<u8>().await.unwrap(), Some(1));
        assert!(far.receive::<u8>().await.is_err());
    }

    #[tokio::test]
    async fn an_end_inside_a_message_is_told_from_one_between_two() {
        let (mut near, mut far) = pair();
        near.stream.write_all(&[0, 0, 0, 9, b'1']).await.unwrap();
        drop(near);
        let error = far.receive::<u8>().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

//! What no pair of proxies that encrypt in user space can beat: bytes between a Unix socket and TCP, sealed and opened
//! where they lie, by threads that do nothing else.
//!
//! The records are those of TLS 1.3 with AES-256-GCM by their size and work: 5 bytes of header, at most 16 KiB, 16 bytes
//! of tag (RFC 8446 section 5.2). The key is no secret, and there is no handshake.

use std::cell::Cell;
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Read, Result, Write};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

const HEADER: usize = 5;
const MOST: usize = 16 << 10;
const TAG: usize = 16;
const RECORD: usize = HEADER + MOST + TAG;
/// Records of one read of the Unix socket, as an agent's.
const RECORDS: usize = 8;
/// One read of the TCP connection, as an agent's.
const PIECE: usize = 256 << 10;

struct Records {
    key: LessSafeKey,
    next: Cell<u64>,
}

impl Records {
    fn new() -> Result<Self> {
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| Error::other("key"))?;
        Ok(Self {
            key: LessSafeKey::new(key),
            next: Cell::new(0),
        })
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.next.replace(self.next.get() + 1).to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// From the Unix socket to TCP, until the end.
pub(super) fn seal(mut from: impl Read, mut to: impl Write) -> Result<()> {
    let records = Records::new()?;
    let mut buffer = vec![0; RECORDS * RECORD];
    loop {
        let mut slots: Vec<_> = buffer
            .chunks_exact_mut(RECORD)
            .map(|record| IoSliceMut::new(&mut record[HEADER..HEADER + MOST]))
            .collect();
        let read = from.read_vectored(&mut slots)?;
        if read == 0 {
            return Ok(());
        }
        let (mut left, mut end) = (read, 0);
        for record in buffer.chunks_exact_mut(RECORD).take(read.div_ceil(MOST)) {
            let len = left.min(MOST);
            left -= len;
            let (header, rest) = record.split_at_mut(HEADER);
            header[..3].copy_from_slice(&[23, 3, 3]);
            header[3..].copy_from_slice(&((len + TAG) as u16).to_be_bytes());
            let (body, tag) = rest.split_at_mut(len);
            let seal = records
                .key
                .seal_in_place_separate_tag(records.nonce(), Aad::from(&*header), body);
            tag[..TAG].copy_from_slice(seal.map_err(|_| Error::other("seal"))?.as_ref());
            end += HEADER + len + TAG;
        }
        to.write_all(&buffer[..end])?;
    }
}

/// From TCP to the Unix socket, until the end.
pub(super) fn open(mut from: impl Read, mut to: impl Write) -> Result<()> {
    let records = Records::new()?;
    let mut buffer = vec![0; PIECE + RECORD];
    let mut held = 0;
    loop {
        let read = from.read(&mut buffer[held..])?;
        if read == 0 {
            return Ok(());
        }
        held += read;
        let (mut rest, mut plain) = (&mut buffer[..held], Vec::with_capacity(PIECE / MOST + 1));
        while let Some(header) = rest.first_chunk::<HEADER>().copied() {
            let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
            if rest.len() < HEADER + len {
                break;
            }
            let (record, after) = rest.split_at_mut(HEADER + len);
            let opened =
                records
                    .key
                    .open_in_place(records.nonce(), Aad::from(&header), &mut record[HEADER..]);
            plain.push(IoSlice::new(
                opened.map_err(|_| Error::from(ErrorKind::InvalidData))?,
            ));
            rest = after;
        }
        let left = rest.len();
        let mut plain = &mut plain[..];
        while !plain.is_empty() {
            let written = to.write_vectored(plain)?;
            IoSlice::advance_slices(&mut plain, written);
        }
        buffer.copy_within(held - left..held, 0);
        held = left;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    /// By [`seal`] and [`open`], over a connection that is read in pieces of all sizes.
    fn carried(sent: &[u8], damaged: Option<usize>) -> (Vec<u8>, bool) {
        let [(mut near, entrance), (into, out), (exit, mut far)] =
            [(); 3].map(|()| UnixStream::pair().expect("a pair of sockets"));
        thread::scope(|scope| {
            scope.spawn(move || near.write_all(sent));
            scope.spawn(move || seal(entrance, into));
            let opened = scope.spawn(move || {
                open(
                    Pieces {
                        from: out,
                        read: 0,
                        damaged,
                    },
                    exit,
                )
                .is_ok()
            });
            let mut seen = Vec::new();
            far.read_to_end(&mut seen).expect("read to the end");
            (seen, opened.join().expect("no panic"))
        })
    }

    struct Pieces {
        from: UnixStream,
        read: usize,
        damaged: Option<usize>,
    }

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
            let most = if self.read.is_multiple_of(3) {
                1
            } else {
                buffer.len()
            };
            let read = self.from.read(&mut buffer[..most])?;
            if let Some(at) = self.damaged.and_then(|at| at.checked_sub(self.read)) {
                buffer[..read]
                    .iter_mut()
                    .skip(at)
                    .take(1)
                    .for_each(|byte| *byte ^= 1);
            }
            self.read += read;
            Ok(read)
        }
    }

    #[test]
    fn what_is_sealed_is_opened_again() {
        for len in [1, MOST - 1, MOST, MOST + 1, 3 * RECORDS * MOST + 7] {
            let sent: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            assert!(carried(&sent, None) == (sent, true), "{len} bytes");
        }
    }

    /// It is measured that they are opened, and not just handed on.
    #[test]
    fn a_damaged_record_is_not_opened() {
        let sent = vec![7; 3 * MOST];
        let (seen, ended_well) = carried(&sent, Some(RECORD + 100));
        assert!(seen.len() <= MOST && !ended_well, "{} bytes", seen.len());
    }
}

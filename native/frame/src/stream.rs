//! One stream, and the heads with which its messages begin.

use crate::assembly::Assembly;
use crate::header::{Header, REQUEST_HEAD_FIXED};
use crate::window::Window;
use crate::{Cause, Event, Kind, Status};

const SEQ_MASK: u32 = 0xFF_FFFF;

/// ```text
/// Waiting (client: no response yet) --> Receiving --END--> Used --RESET, CANCEL--> Dead
/// ```
/// Used and Dead streams hold their budget until they are released.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) window: Window,
    pub(crate) state: State,
}

#[derive(Debug)]
pub(crate) enum State {
    Waiting,
    Receiving(Receiving),
    Used { total: u64 },
    Dead { total: u64 },
}

#[derive(Debug)]
pub(crate) struct Receiving {
    pub(crate) head: Head,
    pub(crate) message: Assembly,
    pub(crate) next: u32,
}

#[derive(Debug)]
pub(crate) enum Head {
    Request {
        kind: Kind,
        deadline: Option<u32>,
        fun: Vec<u8>,
        term: u8,
    },
    Response {
        status: Status,
        term: u8,
    },
}

/// Why a stream was ended.
pub(crate) type Fault = (Cause, String);

impl Stream {
    pub(crate) fn data(&mut self, header: &Header, data: &[u8]) -> Result<(), Fault> {
        let State::Receiving(receiving) = &mut self.state else {
            return Err((Cause::Protocol, "data without an open message".to_owned()));
        };
        if header.seq != receiving.next {
            return Err(sequence(header.seq, receiving.next));
        }
        if data.is_empty() && !header.end() {
            return Err((Cause::Protocol, "an empty block that ends nothing".to_owned()));
        }
        receiving.next = (receiving.next + 1) & SEQ_MASK;
        receiving.append(data)
    }
}

impl State {
    pub(crate) fn is_live(&self) -> bool {
        !matches!(self, Self::Dead { .. })
    }

    pub(crate) fn reserved(&self) -> u64 {
        match self {
            Self::Waiting => 0,
            Self::Receiving(receiving) => receiving.message.total() as u64,
            Self::Used { total } | Self::Dead { total } => *total,
        }
    }

    pub(crate) fn check_whole(&self) -> Result<(), Fault> {
        let Self::Receiving(receiving) = self else {
            return Ok(());
        };
        let (len, total) = (receiving.message.len(), receiving.message.total());
        if len == total {
            return Ok(());
        }
        Err((
            Cause::Protocol,
            format!("a message ended after {len} of {total} bytes"),
        ))
    }
}

impl Receiving {
    pub(crate) fn append(&mut self, data: &[u8]) -> Result<(), Fault> {
        let (len, total) = (self.message.len() + data.len(), self.message.total());
        if len > total {
            return Err((Cause::Protocol, format!("{len} bytes of a message of {total}")));
        }
        self.message
            .push(data)
            .map_err(|_| (Cause::Full, format!("no memory for {total} bytes")))
    }

    pub(crate) fn into_event(self, stream: u32) -> Event {
        let bytes = self.message.into_bytes();
        match self.head {
            Head::Request {
                kind,
                deadline,
                fun,
                term,
            } => Event::Request {
                stream,
                kind,
                deadline,
                fun,
                term,
                argument: bytes,
            },
            Head::Response { status, term } => Event::Response {
                stream,
                status,
                term,
                result: bytes,
            },
        }
    }
}

pub(crate) fn split_request(payload: &[u8]) -> Option<(u64, Head, &[u8])> {
    let (fixed, rest) = payload.split_first_chunk::<REQUEST_HEAD_FIXED>()?;
    let &[
        kind,
        d0,
        d1,
        d2,
        d3,
        t0,
        t1,
        t2,
        t3,
        t4,
        t5,
        t6,
        t7,
        term,
        fun_len,
    ] = fixed;
    let kind = match kind {
        1 => Kind::Call,
        2 => Kind::Cast,
        _ => return None,
    };
    if fun_len == 0 {
        return None;
    }
    let (fun, data) = rest.split_at_checked(usize::from(fun_len))?;
    let deadline = Some(u32::from_be_bytes([d0, d1, d2, d3])).filter(|&d| d != u32::MAX);
    let total = u64::from_be_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
    Some((
        total,
        Head::Request {
            kind,
            deadline,
            fun: fun.to_vec(),
            term,
        },
        data,
    ))
}

/// Status, term and total; the header's check has made sure of the length.
pub(crate) fn split_response(payload: &[u8]) -> (Option<(u8, u8, u64)>, &[u8]) {
    let Some((&[status, term, t0, t1, t2, t3, t4, t5, t6, t7], data)) = payload.split_first_chunk::<10>()
    else {
        return (None, &[]);
    };
    (
        Some((status, term, u64::from_be_bytes([t0, t1, t2, t3, t4, t5, t6, t7]))),
        data,
    )
}

pub(crate) fn sequence(seen: u32, wanted: u32) -> Fault {
    (Cause::Sequence, format!("block {seen}, block {wanted} wanted"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::header::frame_type::DATA;

    #[test]
    fn blocks_are_numbered_modulo_2_pow_24() {
        let head = Head::Response {
            status: Status::Result,
            term: 0,
        };
        let message = Assembly::new(3, crate::Memory::default());
        let state = State::Receiving(Receiving {
            head,
            message,
            next: SEQ_MASK,
        });
        let mut stream = Stream {
            window: Window { left: 9, pending: 0 },
            state,
        };
        for seq in [SEQ_MASK, 0, 1] {
            let header = Header {
                len: 1,
                frame_type: DATA,
                flags: 0,
                seq,
                stream: 1,
            };
            stream.data(&header, &[7]).unwrap();
        }
    }
}

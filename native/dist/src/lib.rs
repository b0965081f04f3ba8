//! Erlang distribution and EPMD protocols without sockets.
//!
//! Bytes in, values and bytes out: the caller owns sockets, timers, tasks and random numbers. Every length or
//! count that a peer controls is held against a named limit before anything is kept for it, and nothing here
//! recurses, blocks or panics on what a peer sent. All integers on the wire are big-endian.
//!
//! The sources are the chapters "Distribution Protocol" and "External Term Format" of the ERTS User's Guide of
//! Erlang/OTP; module docs name the sections. Spoken is what OTP 25 and later speak: handshake version 6.
//!
//! | Module | What | Section of the chapter |
//! |---|---|---|
//! | [`epmd`] | requests and responses of the port mapper | EPMD Protocol |
//! | [`flags`] | capability flags `DFLAG_*` | Distribution Flags |
//! | [`handshake`] | both roles as typed states | Distribution Handshake |
//! | [`name_frame`] | the first frame of a link, read by whoever relays it | `send_name` |
//! | [`framing`] | `{packet, 2}` and `{packet, 4}` frames from a byte stream | Protocol between Connected Nodes |
//! | [`control`] | control messages | Protocol between Connected Nodes |
//! | [`link`] | frames to messages and back, fragments included | Distribution Header |
//!
//! # The handshake
//!
//! Each box is a struct; a transition consumes it, so that no step can be skipped: what comes next can be built
//! only from the proof that the step before it left behind.
//!
//! ```text
//!       initiator (A)                                        acceptor (B)
//!
//!  Initiator::start ---------- send_name 'N' ----------->  +-----------+
//!        |                                                 | AwaitName |
//!  +-------------+                                         +-----------+
//!  | AwaitStatus |  <---- nok | not_allowed ----------- refuse |  | on_name
//!  +-------------+                                      +------------+
//!    |       | ^   <---- ok | ok_simultaneous | named --| NameGiven  |
//!    |       | |                                        +------------+
//!    | alive | |   <---- alive --------------------------  |     | alive
//!    |  +-------------+                                    |  +------------------+
//!    |  | DecideAlive | ---- true | false -------------->  |  | AwaitAliveAnswer |
//!    |  +-------------+                                    |  +------------------+
//!  +----------------+  <---- challenge 'N' --------------- +-----'
//!  | AwaitChallenge |                                      +------------+
//!  +----------------+  ----- challenge_reply 'r' ------->  | AwaitReply |
//!        |                                                 +------------+
//!  +----------+        <---- challenge_ack 'a' ----------------- |  digest holds
//!  | AwaitAck |                                                  |
//!  +----------+                                                  |
//!        | digest holds                                          |
//!   Established                                             Established
//! ```
//!
//! # A link, from the first byte to the first message
//!
//! ```
//! use meshx_dist::control::Control;
//! use meshx_dist::framing::{DEFAULT_MAX_FRAME, Frame, HandshakeDecoder};
//! use meshx_dist::handshake::{Admission, AfterStatus, AwaitName, Cookie, Initiator, LocalNode};
//! use meshx_dist::link::{LinkLimits, Receiver, Sender};
//! use meshx_etf::{Atom, Pid, Term};
//!
//! let (mut to_a, mut to_b) = (HandshakeDecoder::new(), HandshakeDecoder::new());
//! let mut out = Vec::new();
//! let cookie = || Cookie::new("monster");
//!
//! let a = Initiator::start(LocalNode::hidden("a@h1", 11), "b@h2", cookie(), &mut out)?;
//! to_b.push(&std::mem::take(&mut out)); // in a program: write, and read at the other end
//!
//! let b = AwaitName::new(LocalNode::hidden("b@h2", 22)).on_name(to_b.next_frame()?.unwrap())?;
//! assert_eq!(b.peer_name(), "a@h1"); // is it who it should be?
//! let b = b.admit(Admission::Ok, cookie(), 0x1234_5678, &mut out)?; // in a program: random
//! to_a.push(&std::mem::take(&mut out));
//!
//! let AfterStatus::Challenge(a) = a.on_status(to_a.next_frame()?.unwrap())? else { unreachable!() };
//! let a = a.on_challenge(to_a.next_frame()?.unwrap(), 0x9abc_def0, &mut out)?;
//! to_b.push(&std::mem::take(&mut out));
//! let b = b.on_reply(to_b.next_frame()?.unwrap(), &mut out)?;
//! to_a.push(&std::mem::take(&mut out));
//! let a = a.on_ack(to_a.next_frame()?.unwrap())?;
//!
//! let from = Pid { node: Atom::from("a@h1"), id: 1, serial: 0, creation: a.local_creation };
//! let message = Control::RegSend { from, to: Atom::from("search"), token: None };
//! Sender::new(a.flags).send(message.clone(), Some(&Term::atom("hello")), &mut out)?;
//!
//! let mut frames = to_b.into_connected(DEFAULT_MAX_FRAME);
//! frames.push(&out);
//! let Some(Frame::Data(frame)) = frames.next_frame()? else { unreachable!() };
//! let mut receiver = Receiver::new(b.flags, LinkLimits::default());
//! let received = receiver.receive(frame)?.unwrap();
//! assert_eq!(received.control, message);
//! assert_eq!(meshx_etf::decode(&received.payload.unwrap().to_vec(), &Default::default())?, Term::atom("hello"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod control;
pub mod epmd;
pub mod flags;
pub mod framing;
pub mod handshake;
pub mod link;
pub mod name_frame;
mod wire;

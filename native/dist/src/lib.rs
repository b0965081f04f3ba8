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

pub mod control;
pub mod epmd;
pub mod flags;
pub mod framing;
pub mod handshake;
pub mod link;
pub mod name_frame;
mod wire;

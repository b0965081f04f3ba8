//! What a decoder reports.

use thiserror::Error;

use crate::Cause;

/// Whether anyone waits for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client waits for the result.
    Call,
    /// The client does not.
    Cast,
}

/// What a response says about its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The bytes are the result.
    Result,
    /// The bytes are the reason of a failure, in external term format.
    Error,
    /// The cast runs.
    Started,
}

/// Something that the connection's owner must know. Text comes from the peer and may hold any bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The client's hello: its fields.
    Hello(Vec<u8>),
    /// The server's hello: its fields.
    HelloAck(Vec<u8>),
    /// The client's proof that it has the key.
    Auth(Vec<u8>),
    /// The server takes requests.
    Ready,
    /// The peer ended the handshake. Nothing follows.
    Refused {
        /// A [`Cause`], or a number of a newer version.
        cause: u16,
        /// The peer's explanation.
        text: Vec<u8>,
    },
    /// A request, whole.
    Request {
        /// Its stream.
        stream: u32,
        /// Call or cast.
        kind: Kind,
        /// Milliseconds that were left when it was sent.
        deadline: Option<u32>,
        /// Name of the function.
        fun: Vec<u8>,
        /// The serializer's flag.
        term: u8,
        /// The argument.
        argument: Vec<u8>,
    },
    /// A response, whole.
    Response {
        /// Its stream.
        stream: u32,
        /// What it is.
        status: Status,
        /// The serializer's flag.
        term: u8,
        /// The result.
        result: Vec<u8>,
    },
    /// Nobody waits for this answer.
    Cancel {
        /// The request's stream.
        stream: u32,
    },
    /// The peer ended this stream.
    Reset {
        /// The stream.
        stream: u32,
        /// A [`Cause`], or a number of a newer version.
        cause: u16,
        /// The peer's explanation.
        text: Vec<u8>,
    },
    /// We ended this stream for something the peer sent; the RESET is in the output.
    StreamError {
        /// The stream.
        stream: u32,
        /// Why.
        cause: Cause,
        /// What was seen and what was wanted.
        text: String,
    },
    /// The peer takes more bytes.
    Window {
        /// The stream, 0 for the connection.
        stream: u32,
        /// How many.
        increment: u32,
    },
    /// The answer to a PING.
    Pong(Vec<u8>),
    /// The peer runs no streams above `last`.
    Goaway {
        /// The last stream that is or was run.
        last: u32,
        /// A [`Cause`], or a number of a newer version.
        cause: u16,
        /// The peer's explanation.
        text: Vec<u8>,
    },
}

/// Why a connection is over. The peer is at fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text}")]
pub struct Failure {
    /// What the GOAWAY or REFUSED in the output says.
    pub cause: Cause,
    /// What was seen and what was wanted.
    pub text: String,
}

impl Failure {
    pub(crate) fn protocol(text: String) -> Self {
        Self {
            cause: Cause::Protocol,
            text,
        }
    }
}

/// Where a decoder puts what it found. The owner empties both after each call.
#[derive(Debug, Default)]
pub struct Output {
    /// In the order of the frames.
    pub events: Vec<Event>,
    /// Bytes that must be sent to the peer.
    pub bytes: Vec<u8>,
}

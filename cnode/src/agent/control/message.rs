//! What the frames of the control socket hold: requests, replies and events as terms.

use meshx_etf::{Limits, Term, decode, encode};

use super::frame::{REPLY_MAX, REQUEST_MAX, frame};
use crate::proxy::cause::Refusal;

/// Lowest and highest version of the control protocol that this program speaks.
pub const VERSIONS: (i64, i64) = (1, 1);
/// Deepest nesting of a client's terms.
pub const REQUEST_DEPTH: u32 = 32;
/// Most terms in one frame of a client, elements counted.
pub const REQUEST_TERMS: usize = 16 << 10;

/// A client's frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Comes back with the reply.
    pub id: i64,
    /// What is to be done.
    pub command: String,
    /// A map.
    pub args: Term,
}

/// The agent's frame, as a client reads it.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// To the request of this id.
    Reply {
        /// The request's.
        id: i64,
        /// The result, or cause and text.
        result: Result<Term, (String, String)>,
    },
    /// Not asked for.
    Event {
        /// Its name.
        name: String,
        /// A map.
        args: Term,
    },
}

impl Request {
    /// Reads a client's frame.
    ///
    /// # Errors
    /// A text that says what was seen and wanted.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let limits = Limits {
            max_depth: REQUEST_DEPTH,
            max_terms: REQUEST_TERMS,
            max_bytes: REQUEST_MAX,
            max_inflated: 0,
            allow_compressed: false,
            ..Limits::default()
        };
        let term = decode(bytes, &limits).map_err(|error| format!("the frame is no term: {error}"))?;
        let Term::Tuple(parts) = term else {
            return Err(Self::shape());
        };
        let Ok([Term::Int(id), Term::Atom(command), args @ Term::Map(_)]) = <[Term; 3]>::try_from(parts)
        else {
            return Err(Self::shape());
        };
        Ok(Self {
            id,
            command: command.as_str().to_owned(),
            args,
        })
    }

    /// The frame for it.
    ///
    /// # Errors
    /// What keeps it from being a term, or its length when it is over the limit.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let term = Term::tuple([
            Term::Int(self.id),
            Term::atom(self.command.as_str()),
            self.args.clone(),
        ]);
        framed(&term, REQUEST_MAX)
    }

    fn shape() -> String {
        "the frame is no {Id :: integer, Command :: atom, Args :: map}".to_owned()
    }
}

impl Message {
    /// Reads an agent's frame.
    ///
    /// # Errors
    /// A text that says what was seen and wanted.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let limits = Limits {
            max_bytes: REPLY_MAX,
            allow_compressed: false,
            ..Limits::default()
        };
        let term =
            decode(bytes, &limits).map_err(|error| format!("the agent's frame is no term: {error}"))?;
        let message = match term.as_tuple() {
            Some([kind, id, result]) if kind.as_atom() == Some("reply") => id.as_int().and_then(|id| {
                let result = match result.as_tuple()? {
                    [ok, result] if ok.as_atom() == Some("ok") => Ok(result.clone()),
                    [error, cause, text] if error.as_atom() == Some("error") => {
                        Err((cause.as_atom()?.to_owned(), text.as_str()?.to_owned()))
                    }
                    _ => return None,
                };
                Some(Self::Reply { id, result })
            }),
            Some([kind, name, args]) if kind.as_atom() == Some("event") => {
                name.as_atom().map(|name| Self::Event {
                    name: name.to_owned(),
                    args: args.clone(),
                })
            }
            _ => None,
        };
        message.ok_or_else(|| "the agent's frame is neither a reply nor an event".to_owned())
    }
}

/// The frame of a reply.
///
/// # Errors
/// As [`Request::encode`].
pub fn reply(id: i64, result: Result<Term, &Refusal>) -> Result<Vec<u8>, String> {
    let result = match result {
        Ok(result) => Term::tuple([Term::atom("ok"), result]),
        Err(refusal) => Term::tuple([
            Term::atom("error"),
            Term::atom(refusal.cause.as_str()),
            Term::binary(refusal.text.as_bytes()),
        ]),
    };
    framed(
        &Term::tuple([Term::atom("reply"), Term::Int(id), result]),
        REPLY_MAX,
    )
}

/// The frame of an event.
///
/// # Errors
/// As [`Request::encode`].
pub fn event(name: &str, args: Term) -> Result<Vec<u8>, String> {
    framed(
        &Term::tuple([Term::atom("event"), Term::atom(name), args]),
        REPLY_MAX,
    )
}

/// A map with atom keys.
pub fn map<const N: usize>(pairs: [(&str, Term); N]) -> Term {
    Term::map(pairs.map(|(key, value)| (Term::atom(key), value)))
}

/// A binary that holds a text.
pub fn text(text: impl AsRef<str>) -> Term {
    Term::binary(text.as_ref().as_bytes())
}

fn framed(term: &Term, max: usize) -> Result<Vec<u8>, String> {
    let bytes = frame(|bytes| encode(term, bytes)).map_err(|error| error.to_string())?;
    match bytes.len() - 4 {
        len if len > max => Err(format!("a frame of {len} bytes, at most {max} can be sent")),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::proxy::cause::Cause;

    #[test]
    fn requests_and_replies_survive_the_wire() {
        let request = Request {
            id: -7,
            command: "hello".into(),
            args: map([("client", text("x")), ("n", Term::Int(1))]),
        };
        assert_eq!(Request::decode(&request.encode().unwrap()[4..]).unwrap(), request);
        let refusal = Cause::NameTaken.because("it is");
        let bytes = reply(3, Err(&refusal)).unwrap();
        assert_eq!(
            Message::decode(&bytes[4..]).unwrap(),
            Message::Reply {
                id: 3,
                result: Err(("name_taken".into(), "it is".into()))
            }
        );
        let bytes = reply(4, Ok(map([]))).unwrap();
        assert_eq!(
            Message::decode(&bytes[4..]).unwrap(),
            Message::Reply {
                id: 4,
                result: Ok(map([]))
            }
        );
        let bytes = event("cut", map([])).unwrap();
        assert_eq!(
            Message::decode(&bytes[4..]).unwrap(),
            Message::Event {
                name: "cut".into(),
                args: map([])
            }
        );
    }

    #[test]
    fn other_shapes_are_refused() {
        let encoded = |term: &Term| {
            let mut bytes = Vec::new();
            encode(term, &mut bytes).unwrap();
            bytes
        };
        for term in [
            Term::Int(1),
            Term::tuple([]),
            Term::tuple([Term::Int(1), Term::atom("hello")]),
            Term::tuple([Term::atom("a"), Term::atom("hello"), map([])]),
            Term::tuple([Term::Int(1), text("hello"), map([])]),
            Term::tuple([Term::Int(1), Term::atom("hello"), Term::list([])]),
        ] {
            assert!(
                Request::decode(&encoded(&term)).unwrap_err().contains("no {Id"),
                "{term}"
            );
            assert!(Message::decode(&encoded(&term)).is_err(), "{term}");
        }
    }

    #[test]
    fn depth_count_and_compression_are_limited() {
        let mut deep = Term::list([]);
        for _ in 0..REQUEST_DEPTH {
            deep = Term::list([deep]);
        }
        let bytes = |args| {
            Request {
                id: 1,
                command: "x".into(),
                args,
            }
            .encode()
            .unwrap()
        };
        let error = Request::decode(&bytes(map([("deep", deep)]))[4..]).unwrap_err();
        assert!(error.contains("32"), "{error}");
        let many = Term::list((0..REQUEST_TERMS).map(|_| Term::Int(1)));
        let error = Request::decode(&bytes(map([("many", many)]))[4..]).unwrap_err();
        assert!(error.contains("16384"), "{error}");
        let error = Request::decode(&[131, 80, 0, 0, 0, 1, 0]).unwrap_err();
        assert!(error.contains("compressed"), "{error}");
        let long = Request {
            id: 1,
            command: "x".into(),
            args: text("x".repeat(REQUEST_MAX)),
        };
        assert!(long.encode().unwrap_err().contains("65536"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(&bytes);
            let _ = Message::decode(&bytes);
            let mut versioned = vec![131];
            versioned.extend(bytes);
            let _ = Request::decode(&versioned);
        }
    }
}

//! Looking into an encoded term without building it.

use crate::cursor::Cursor;
use crate::decode::decode_bare_prefix;
use crate::error::DecodeError;
use crate::limits::Limits;
use crate::term::Term;
use crate::token::{AtomRef, PidRef, PortRef, ReferenceRef, Token};
use crate::walk::term_len;

/// A term where it lies in its encoding. Cheap to copy; nothing it does allocates, but for [`TermRef::to_term`].
///
/// [`TermRef::new`] checks the whole term once; after that every accessor answers `None` for a term of another kind
/// and nothing else. Looking up a key or an element goes past what lies before it: to read all of a large container
/// use its iterator, and [`Walk`](crate::Walk) to read all of a term.
///
/// ```
/// use meshx_etf::{Limits, TermRef, encode, term};
///
/// let mut bytes = Vec::new();
/// encode(&term!({request, #{id => 7, name => "lamp", tags => [new, sale]}}), &mut bytes)?;
///
/// let request = TermRef::new(&bytes, &Limits::default())?;
/// let item = request.element(1).ok_or("no tuple")?;
/// assert_eq!(item.key("id").and_then(TermRef::as_int), Some(7));
/// assert_eq!(item.key("name").and_then(TermRef::as_str), Some("lamp")); // borrowed from `bytes`
/// let tags: Vec<_> = item.key("tags").ok_or("no tags")?.elements().ok_or("no list")?.collect();
/// assert!(tags[1].as_atom().is_some_and(|tag| tag == "sale"));
/// assert_eq!(tags[1].to_term()?.to_string(), "sale");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct TermRef<'a> {
    token: Token<'a>,
    /// From the term's tag on (nothing for an element of a byte list, which has none), through the end of the whole.
    bytes: &'a [u8],
    /// What follows the token: its parts first.
    after: &'a [u8],
}

impl<'a> TermRef<'a> {
    /// Checks an encoded term: a version byte, the term, and nothing after it.
    ///
    /// # Errors
    /// Any [`DecodeError`] but [`DecodeError::DuplicateKey`]: a key that a map has twice is not looked for. A
    /// compressed term has nothing to borrow from and is refused.
    pub fn new(bytes: &'a [u8], limits: &Limits) -> Result<Self, DecodeError> {
        let len = term_len(bytes, limits)?;
        if len != bytes.len() {
            return Err(DecodeError::Trailing {
                offset: len,
                remaining: bytes.len() - len,
            });
        }
        Self::read(bytes.get(1..).unwrap_or_default()).ok_or(DecodeError::Truncated {
            offset: 1,
            needed: 1,
            remaining: 0,
        })
    }

    /// The term at the start of bytes that were checked before.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut cursor = checked(bytes, 1);
        let token = cursor.token().ok()?;
        Some(Self {
            token,
            bytes,
            after: cursor.rest(),
        })
    }

    /// What follows this term.
    fn rest(&self) -> &'a [u8] {
        let mut cursor = checked(self.after, self.token.children());
        while cursor.owed() > 0 && cursor.token().is_ok() {}
        cursor.rest()
    }

    /// Its head: which kind of term this is, and all of it if it has no parts.
    pub fn token(self) -> Token<'a> {
        self.token
    }

    /// The integer, if this is one of at most 64 bits.
    pub fn as_int(self) -> Option<i64> {
        match self.token {
            Token::Int(value) => Some(value),
            _ => None,
        }
    }

    /// The float, if this is one (an integer is not).
    pub fn as_float(self) -> Option<f64> {
        match self.token {
            Token::Float(value) => Some(value),
            _ => None,
        }
    }

    /// The atom, if this is one.
    pub fn as_atom(self) -> Option<AtomRef<'a>> {
        match self.token {
            Token::Atom(atom) => Some(atom),
            _ => None,
        }
    }

    /// The boolean, if this is the atom `true` or `false`.
    pub fn as_bool(self) -> Option<bool> {
        match self.as_atom()?.as_str()? {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// The bytes, if this is a binary.
    pub fn as_binary(self) -> Option<&'a [u8]> {
        match self.token {
            Token::Binary(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The text, if this is a binary that holds UTF-8.
    pub fn as_str(self) -> Option<&'a str> {
        std::str::from_utf8(self.as_binary()?).ok()
    }

    /// The pid, if this is one.
    pub fn as_pid(self) -> Option<PidRef<'a>> {
        match self.token {
            Token::Pid(pid) => Some(pid),
            _ => None,
        }
    }

    /// The port, if this is one.
    pub fn as_port(self) -> Option<PortRef<'a>> {
        match self.token {
            Token::Port(port) => Some(port),
            _ => None,
        }
    }

    /// The reference, if this is one.
    pub fn as_reference(self) -> Option<ReferenceRef<'a>> {
        match self.token {
            Token::Reference(reference) => Some(reference),
            _ => None,
        }
    }

    /// Whether this is the empty list.
    pub fn is_nil(self) -> bool {
        self.token == Token::Nil
    }

    /// Elements of a tuple or pairs of a map; `None` for others (the length of a list shows at its end only).
    pub fn size(self) -> Option<usize> {
        match self.token {
            Token::Tuple { arity } => Some(arity),
            Token::Map { pairs } => Some(pairs),
            _ => None,
        }
    }

    /// The elements, if this is a tuple or a list, from the first on. [`Elements::tail`] has what a list that is not
    /// proper ends with.
    pub fn elements(self) -> Option<Elements<'a>> {
        let mut elements = Elements {
            left: 0,
            rest: self.after,
            bytes: &[],
            list: true,
            tail: None,
        };
        match self.token {
            Token::Tuple { arity } => (elements.left, elements.list) = (arity, false),
            Token::List { len } => elements.left = len,
            Token::ByteList(bytes) => (elements.bytes, elements.list) = (bytes, false),
            Token::Nil => elements.list = false,
            _ => return None,
        }
        Some(elements)
    }

    /// An element by its place, from 0, if this is a tuple or a list that has it.
    pub fn element(self, index: usize) -> Option<Self> {
        self.elements()?.nth(index)
    }

    /// Keys and values in the order in which they came, if this is a map.
    pub fn pairs(self) -> Option<PairRefs<'a>> {
        match self.token {
            Token::Map { pairs } => Some(PairRefs {
                left: pairs,
                rest: self.after,
            }),
            _ => None,
        }
    }

    /// The value of an atom key, if this is a map that has it.
    pub fn key(self, key: &str) -> Option<Self> {
        self.find(|found| matches!(found.token, Token::Atom(atom) if atom == *key))
    }

    /// The value of a key that is this binary, if this is a map that has it.
    pub fn binary_key(self, key: impl AsRef<[u8]>) -> Option<Self> {
        self.find(|found| found.as_binary() == Some(key.as_ref()))
    }

    fn find(self, mut is: impl FnMut(Self) -> bool) -> Option<Self> {
        self.pairs()?.find(|(key, _)| is(*key)).map(|(_, value)| value)
    }

    /// An owned copy.
    ///
    /// # Errors
    /// [`DecodeError::DuplicateKey`], which no borrowed look can see.
    pub fn to_term(self) -> Result<Term, DecodeError> {
        match (self.token, self.bytes) {
            // An element of a byte list.
            (Token::Int(value), []) => Ok(Term::Int(value)),
            (_, bytes) => decode_bare_prefix(bytes, &unlimited()).map(|(term, _)| term),
        }
    }
}

/// Elements of a list or a tuple.
#[derive(Debug, Clone)]
pub struct Elements<'a> {
    left: usize,
    rest: &'a [u8],
    /// Elements of a byte list, before all others that are left.
    bytes: &'a [u8],
    /// Whether a tail follows the last element.
    list: bool,
    tail: Option<TermRef<'a>>,
}

impl<'a> Elements<'a> {
    /// What a list ends with in place of `[]`; `None` before all its elements were taken, and for proper lists.
    pub fn tail(&self) -> Option<TermRef<'a>> {
        self.tail
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = TermRef<'a>;

    fn next(&mut self) -> Option<TermRef<'a>> {
        loop {
            if let Some((&byte, bytes)) = self.bytes.split_first() {
                self.bytes = bytes;
                return Some(TermRef {
                    token: Token::Int(i64::from(byte)),
                    bytes: &[],
                    after: &[],
                });
            }
            if let Some(left) = self.left.checked_sub(1) {
                let item = TermRef::read(self.rest)?;
                (self.left, self.rest) = (left, item.rest());
                return Some(item);
            }
            if !self.list {
                return None;
            }
            // A list whose tail is a list is one longer list.
            let tail = TermRef::read(self.rest)?;
            match tail.token {
                Token::List { len } => (self.left, self.rest) = (len, tail.after),
                Token::ByteList(bytes) => (self.bytes, self.list) = (bytes, false),
                Token::Nil => self.list = false,
                _ => (self.tail, self.list) = (Some(tail), false),
            }
        }
    }
}

/// Pairs of a map.
#[derive(Debug, Clone)]
pub struct PairRefs<'a> {
    left: usize,
    rest: &'a [u8],
}

impl<'a> Iterator for PairRefs<'a> {
    type Item = (TermRef<'a>, TermRef<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let key = TermRef::read(self.rest)?;
        let value = TermRef::read(key.rest())?;
        self.rest = value.rest();
        Some((key, value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for PairRefs<'_> {}

/// A cursor over bytes that were checked within their limits before.
fn checked(bytes: &[u8], owed: usize) -> Cursor<'_> {
    Cursor::resume(bytes, 0, owed, 0, usize::MAX, usize::MAX)
}

fn unlimited() -> Limits {
    Limits {
        max_depth: u32::MAX,
        max_terms: usize::MAX,
        max_bytes: usize::MAX,
        max_integer_bytes: usize::MAX,
        ..Limits::default()
    }
}

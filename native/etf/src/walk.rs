//! Going through a term without building it.

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::limits::Limits;
use crate::tag;
use crate::token::Token;

/// Walks the tokens of one encoded term, borrowing from the input.
///
/// Nothing is built and nothing recurses: the walk keeps one small entry per open container. It checks all that
/// [`decode`](crate::decode()) checks, but for keys that a map has twice. A compressed term has nothing to borrow
/// from: give its bytes to [`inflate`](crate::inflate()) first.
///
/// ```
/// use meshx_etf::{Limits, Token, Walk};
///
/// // {1, []}
/// let mut walk = Walk::new(&[131, 104, 2, 97, 1, 106], &Limits::default())?;
/// assert_eq!(walk.next_token()?, Some(Token::Tuple { arity: 2 }));
/// assert_eq!(walk.next_token()?, Some(Token::Int(1)));
/// assert_eq!(walk.next_token()?, Some(Token::Nil));
/// assert_eq!(walk.next_token()?, None);
/// # Ok::<(), meshx_etf::DecodeError>(())
/// ```
#[derive(Debug)]
pub struct Walk<'a> {
    cursor: Cursor<'a>,
    nesting: Nesting,
}

impl<'a> Walk<'a> {
    /// Begins at the version byte.
    ///
    /// # Errors
    /// [`DecodeError::Version`] and [`DecodeError::TooLong`].
    pub fn new(bytes: &'a [u8], limits: &Limits) -> Result<Self, DecodeError> {
        check_start(bytes, limits)?;
        Ok(Self {
            cursor: Cursor::new(bytes, 1, limits),
            nesting: Nesting::new(limits.depth()),
        })
    }

    /// Begins at a term without a version byte, as terms stand behind a distribution header.
    #[must_use]
    pub fn bare(bytes: &'a [u8], limits: &Limits) -> Self {
        Self {
            cursor: Cursor::new(bytes, 0, limits),
            nesting: Nesting::new(limits.depth()),
        }
    }

    /// The next token, or `None` when the term is complete. Bytes may follow it: see [`Walk::offset`].
    ///
    /// # Errors
    /// Any [`DecodeError`] but those of compression and map keys. Do not go on after an error.
    pub fn next_token(&mut self) -> Result<Option<Token<'a>>, DecodeError> {
        if self.cursor.owed() == 0 {
            return Ok(None);
        }
        self.step().map(Some)
    }

    #[inline]
    fn step(&mut self) -> Result<Token<'a>, DecodeError> {
        let at = self.cursor.pos();
        let token = self.cursor.token()?;
        self.nesting.advance(&token, at, self.cursor.pos())?;
        Ok(token)
    }

    /// Bytes read so far, the version byte included.
    pub fn offset(&self) -> usize {
        self.cursor.pos()
    }

    /// Containers that are open.
    pub fn depth(&self) -> usize {
        self.nesting.depth()
    }
}

/// The length in bytes of the encoded term at the start of `bytes`, its version byte included.
///
/// Terms may follow one another, each with its own version byte, as a control message and its payload do in the
/// distribution protocol. The term is checked but not built.
///
/// # Errors
/// As [`Walk::next_token`]; a compressed term has no length that shows without inflating it and is refused.
pub fn term_len(bytes: &[u8], limits: &Limits) -> Result<usize, DecodeError> {
    let mut walk = Walk::new(bytes, limits)?;
    // Not `next_token`: handing tokens out costs more than reading them.
    while walk.cursor.owed() > 0 {
        walk.step()?;
    }
    Ok(walk.offset())
}

pub(crate) fn check_start(bytes: &[u8], limits: &Limits) -> Result<(), DecodeError> {
    if bytes.len() > limits.max_bytes {
        return Err(DecodeError::TooLong {
            len: bytes.len(),
            limit: limits.max_bytes,
        });
    }
    match bytes.first() {
        Some(&tag::VERSION) => Ok(()),
        found => Err(DecodeError::Version {
            found: found.copied(),
        }),
    }
}

/// Reads the parts of a fun whose token was just read, at `depth` containers, and drops them.
pub(crate) fn skip_fun(
    cursor: &mut Cursor<'_>,
    fun: &Token<'_>,
    at: usize,
    max_depth: usize,
) -> Result<(), DecodeError> {
    let mut nesting = Nesting::new(max_depth);
    nesting.advance(fun, at, cursor.pos())?;
    while nesting.depth() > 0 {
        let at = cursor.pos();
        let token = cursor.token()?;
        nesting.advance(&token, at, cursor.pos())?;
    }
    Ok(())
}

/// The containers a walk is in.
#[derive(Debug)]
pub(crate) struct Nesting {
    open: Vec<Open>,
    deepest: usize,
    max_depth: usize,
    /// Maps around the token that was taken note of last in whose keys it is.
    in_keys: usize,
}

#[derive(Debug)]
struct Open {
    /// Parts still to come.
    left: usize,
    kind: Kind,
}

#[derive(Debug, PartialEq)]
enum Kind {
    List,
    /// With the offset where its size field says that it ends.
    Fun(usize),
    Map,
    Other,
}

impl Nesting {
    pub(crate) fn new(max_depth: usize) -> Self {
        Self {
            open: Vec::new(),
            deepest: 0,
            max_depth,
            in_keys: 0,
        }
    }

    pub(crate) fn depth(&self) -> usize {
        self.open.len()
    }

    /// Of how many maps the last token is in a key, as the key itself or as a part of it.
    pub(crate) fn in_keys(&self) -> usize {
        self.in_keys
    }

    /// The deepest it was so far.
    pub(crate) fn deepest(&self) -> usize {
        self.deepest
    }

    #[inline]
    /// Takes note of a token that began at `at` and whose own bytes end at `end`.
    pub(crate) fn advance(&mut self, token: &Token<'_>, at: usize, end: usize) -> Result<(), DecodeError> {
        let mut in_tail = false;
        if let Some(top) = self.open.last_mut() {
            if top.kind == Kind::Map {
                // Of the parts still to come an even number means that the next is a key.
                if top.left % 2 == 0 {
                    self.in_keys += 1;
                } else {
                    self.in_keys = self.in_keys.saturating_sub(1);
                }
            }
            top.left = top.left.saturating_sub(1);
            in_tail = top.kind == Kind::List && top.left == 0;
        }
        let left = token.children();
        if left > 0 {
            let kind = match token {
                Token::List { .. } => Kind::List,
                Token::Map { .. } => Kind::Map,
                Token::Fun(fun) => Kind::Fun((at + 1).saturating_add(fun.body.len())),
                _ => Kind::Other,
            };
            if in_tail && kind == Kind::List {
                // A list whose tail is a list is one longer list. C nodes write a list of unknown length this
                // way, element by element, so it must not count as nesting.
                self.open.pop();
            }
            if self.open.len() >= self.max_depth {
                return Err(DecodeError::TooDeep {
                    limit: self.max_depth,
                    offset: at,
                });
            }
            self.open.push(Open { left, kind });
            self.deepest = self.deepest.max(self.open.len());
        }
        while let Some(Open { left: 0, kind }) = self.open.last() {
            if let Kind::Fun(announced) = *kind
                && announced != end
            {
                return Err(DecodeError::FunSize {
                    announced,
                    actual: end,
                });
            }
            self.open.pop();
        }
        Ok(())
    }
}

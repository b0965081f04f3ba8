//! Going through a term without building it.

use crate::cursor::{Container, Cursor};
use crate::error::DecodeError;
use crate::limits::Limits;
use crate::tag;
use crate::token::{AtomRef, Token};

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
    #[inline]
    pub fn next_token(&mut self) -> Result<Option<Token<'a>>, DecodeError> {
        if self.cursor.owed() == 0 {
            return Ok(None);
        }
        self.step().map(Some)
    }

    /// Hands all tokens that are left to `see`; returns the bytes read since the beginning, the version byte included.
    ///
    /// The fastest way through a term.
    ///
    /// ```
    /// use meshx_etf::{Limits, Token, Walk};
    ///
    /// // [1, 2 | 3]
    /// let bytes = [131, 108, 0, 0, 0, 2, 97, 1, 97, 2, 97, 3];
    /// let mut sum = 0;
    /// let len = Walk::new(&bytes, &Limits::default())?.for_each(|token| {
    ///     if let Token::Int(value) = token {
    ///         sum += value;
    ///     }
    /// })?;
    /// assert_eq!((sum, len), (6, bytes.len()));
    /// # Ok::<(), meshx_etf::DecodeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Walk::next_token`]; tokens before the fault have been seen by then.
    #[inline]
    pub fn for_each(self, mut see: impl FnMut(Token<'a>)) -> Result<usize, DecodeError> {
        // All locals, so that most of them stay in registers.
        let Self {
            mut cursor,
            nesting: Nesting { mut inner, mut outer },
        } = self;
        while cursor.owed() > 0 {
            // A loop of its own for what has no parts: it needs few registers.
            while cursor.owed() != inner.until {
                if let Some((text, _)) = cursor.next_short_atom() {
                    see(Token::Atom(AtomRef::ascii(text)));
                } else if let Some(value) = cursor.next_int() {
                    see(Token::Int(value));
                } else if let Some(bytes) = cursor.next_binary() {
                    see(Token::Binary(bytes));
                } else if let Some(value) = cursor.next_float() {
                    see(Token::Float(value));
                } else if cursor.next_nil() {
                    see(Token::Nil);
                } else {
                    break;
                }
            }
            if cursor.owed() != inner.until {
                let (at, until) = (cursor.pos(), cursor.owed() - 1);
                if let Some((container, count)) = cursor.next_container() {
                    let (kind, token) = match container {
                        Container::List => (Kind::List, Token::List { len: count }),
                        Container::Map => (Kind::Map, Token::Map { pairs: count }),
                        Container::Tuple => (Kind::Other, Token::Tuple { arity: count }),
                    };
                    inner = outer.enter(inner, Inner { until, kind }, at)?;
                    see(token);
                    continue;
                }
                let token = cursor.token()?;
                inner = outer.begin(inner, &token, at, cursor.owed())?;
                see(token);
            }
            inner = outer.leave(inner, cursor.owed(), cursor.pos())?;
        }
        Ok(cursor.pos())
    }

    #[inline]
    fn step(&mut self) -> Result<Token<'a>, DecodeError> {
        let at = self.cursor.pos();
        let token = self.cursor.token()?;
        self.nesting.advance(&token, at, &self.cursor)?;
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
    Walk::new(bytes, limits)?.for_each(|_| ())
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
    nesting.inner.until = cursor.owed().saturating_sub(fun.children());
    nesting.advance(fun, at, cursor)?;
    while nesting.depth() > 0 {
        let at = cursor.pos();
        let token = cursor.token()?;
        nesting.advance(&token, at, cursor)?;
    }
    Ok(())
}

/// The containers a walk is in: the innermost, and those around it.
#[derive(Debug)]
pub(crate) struct Nesting {
    pub(crate) inner: Inner,
    pub(crate) outer: Outer,
}

/// The innermost container. Small and apart, so that a loop keeps it in registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inner {
    /// Terms that the whole input still owes once all parts of this have come.
    until: usize,
    kind: Kind,
}

/// The containers around the innermost one: only beginning and ending a container touches them.
#[derive(Debug)]
pub(crate) struct Outer {
    around: Vec<Inner>,
    /// Where the funs that are open end by their size fields, innermost last.
    fun_ends: Vec<usize>,
    deepest: usize,
    max_depth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    List,
    Fun,
    Map,
    Other,
}

impl Nesting {
    pub(crate) fn new(max_depth: usize) -> Self {
        Self {
            inner: Inner {
                until: 0,
                kind: Kind::Other,
            },
            outer: Outer {
                around: Vec::new(),
                fun_ends: Vec::new(),
                deepest: 0,
                max_depth,
            },
        }
    }

    pub(crate) fn depth(&self) -> usize {
        self.outer.around.len()
    }

    /// The deepest it was so far.
    pub(crate) fn deepest(&self) -> usize {
        self.outer.deepest
    }

    /// Whether the next token begins a key of the innermost container, when so many terms are owed; `None` if that is
    /// not a map.
    pub(crate) fn next_is_key(&self, owed: usize) -> Option<bool> {
        let left = owed.saturating_sub(self.inner.until);
        (self.inner.kind == Kind::Map).then_some(left.is_multiple_of(2))
    }

    /// Takes note of a token that began at `at`; `after` is behind its own bytes.
    #[inline(always)]
    pub(crate) fn advance(
        &mut self,
        token: &Token<'_>,
        at: usize,
        after: &Cursor<'_>,
    ) -> Result<(), DecodeError> {
        self.inner = self.outer.begin(self.inner, token, at, after.owed())?;
        self.inner = self.outer.leave(self.inner, after.owed(), after.pos())?;
        Ok(())
    }
}

impl Outer {
    /// From the innermost container before a token to that after it, which may be complete. `owed` counts the token's
    /// parts.
    #[inline(always)]
    fn begin(
        &mut self,
        inner: Inner,
        token: &Token<'_>,
        at: usize,
        owed: usize,
    ) -> Result<Inner, DecodeError> {
        let (parts, kind) = match token {
            Token::List { len } => (len.saturating_add(1), Kind::List),
            Token::Map { pairs } => (pairs.saturating_mul(2), Kind::Map),
            Token::Tuple { arity } => (*arity, Kind::Other),
            Token::Fun(fun) => {
                self.fun_ends.push((at + 1).saturating_add(fun.body.len()));
                (token.children(), Kind::Fun)
            }
            _ => return Ok(inner),
        };
        if parts == 0 {
            return Ok(inner);
        }
        let until = owed.saturating_sub(parts);
        self.enter(inner, Inner { until, kind }, at)
    }

    #[inline(always)]
    fn enter(&mut self, inner: Inner, new: Inner, at: usize) -> Result<Inner, DecodeError> {
        // A list whose tail is a list is one longer list. C nodes write a list of unknown length this way, element
        // by element, so it must not count as nesting.
        if !(new.kind == Kind::List && inner.kind == Kind::List && inner.until == new.until) {
            if self.around.len() >= self.max_depth {
                return Err(too_deep(self.max_depth, at));
            }
            self.around.push(inner);
            self.deepest = self.deepest.max(self.around.len());
        }
        Ok(new)
    }

    /// Out of the innermost container if it is complete, and of those around it that waited for it alone.
    #[inline(always)]
    fn leave(&mut self, mut inner: Inner, owed: usize, end: usize) -> Result<Inner, DecodeError> {
        while inner.until == owed {
            if inner.kind == Kind::Fun
                && let Some(announced) = self.fun_ends.pop()
                && announced != end
            {
                return Err(fun_size(announced, end));
            }
            match self.around.pop() {
                Some(outer) => inner = outer,
                None => break,
            }
        }
        Ok(inner)
    }
}

#[cold]
#[inline(never)]
fn too_deep(limit: usize, offset: usize) -> DecodeError {
    DecodeError::TooDeep { limit, offset }
}

#[cold]
#[inline(never)]
fn fun_size(announced: usize, actual: usize) -> DecodeError {
    DecodeError::FunSize { announced, actual }
}

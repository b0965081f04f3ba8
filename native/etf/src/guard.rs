//! Looks through a term that a peer sent, before a BEAM decodes it.
//!
//! `binary_to_term` takes whatever is well formed: terms that inflate a thousandfold, funs, a million new atoms,
//! integers that take seconds to print. The guard walks the bytes first and says no in time. It builds nothing and
//! passes over the contents of binaries in constant time.
//!
//! It works in slices so that a NIF can return to its scheduler: [`Guard::step`] does a bounded amount of work and
//! keeps its place.
//!
//! A compressed term is always refused. What it holds shows only after inflating it, which would be the work the
//! guard is there to avoid.

use thiserror::Error;

use crate::cursor::Cursor;
use crate::error::DecodeError;
use crate::limits::Limits;
use crate::token::{AtomRef, Token};
use crate::walk::{Nesting, check_start};

/// What a peer may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuardPolicy {
    /// Bytes of the encoded term. Default 128 MiB.
    pub max_bytes: usize,
    /// Containers inside one another. Default 256.
    pub max_depth: u32,
    /// Terms in all, elements counted. Default 4,194,304.
    pub max_terms: usize,
    /// Atoms in all, each occurrence counted, names of nodes, modules and functions too. Default 1,048,576.
    pub max_atoms: usize,
    /// Bytes of all their texts together. Default 16 MiB.
    pub max_atom_bytes: usize,
    /// Bytes of one integer's magnitude. Default 4 KiB.
    pub max_integer_bytes: usize,
    /// Words the decoded term may take on a BEAM's heap, see [`GuardStats::heap_words`]. Default 16,777,216
    /// (128 MiB).
    pub max_heap_words: usize,
    /// Funs that carry code and captured values. Default false: calling one runs what the peer chose.
    pub allow_funs: bool,
    /// Funs by name, `fun m:f/1`. Default false, for the same reason.
    pub allow_exports: bool,
    /// Pids. Default true.
    pub allow_pids: bool,
    /// Ports. Default true.
    pub allow_ports: bool,
    /// References. Default true.
    pub allow_references: bool,
}

impl Default for GuardPolicy {
    fn default() -> Self {
        Self {
            max_bytes: 128 << 20,
            max_depth: 256,
            max_terms: 4 << 20,
            max_atoms: 1 << 20,
            max_atom_bytes: 16 << 20,
            max_integer_bytes: 4 << 10,
            max_heap_words: 16 << 20,
            allow_funs: false,
            allow_exports: false,
            allow_pids: true,
            allow_ports: true,
            allow_references: true,
        }
    }
}

/// What a term holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuardStats {
    /// Terms, elements counted.
    pub terms: usize,
    /// The deepest nesting of containers.
    pub depth: usize,
    /// Atoms, each occurrence counted.
    pub atoms: usize,
    /// Bytes of their texts.
    pub atom_bytes: usize,
    /// An upper estimate of the 64-bit words it takes on a BEAM's heap when decoded. Contents of binaries above 64
    /// bytes, which live off the heap, are not in it: they are never more than the term's own bytes.
    pub heap_words: usize,
}

/// Why a term was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GuardError {
    /// It is no term, or one beyond the limits that every decoder has, or compressed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A kind of term that the policy does not allow.
    #[error("a {kind} at offset {offset} is not allowed")]
    NotAllowed {
        /// The kind: `fun`, `fun by name`, `pid`, `port` or `reference`.
        kind: &'static str,
        /// Where it begins.
        offset: usize,
    },
    /// More atoms than the limit.
    #[error("more than {limit} atoms by offset {offset} (max_atoms)")]
    TooManyAtoms {
        /// The limit in force.
        limit: usize,
        /// Where the term that passes it begins.
        offset: usize,
    },
    /// More bytes of atom text than the limit.
    #[error("more than {limit} bytes of atom text by offset {offset} (max_atom_bytes)")]
    TooManyAtomBytes {
        /// The limit in force.
        limit: usize,
        /// Where the term that passes it begins.
        offset: usize,
    },
    /// Decoded, it would take more heap than the limit.
    #[error("{words} heap words by offset {offset}, the limit is {limit} (max_heap_words)")]
    TooManyHeapWords {
        /// Words estimated so far.
        words: usize,
        /// The limit in force.
        limit: usize,
        /// Where the term that passes it begins.
        offset: usize,
    },
    /// The caller handed another input to a later step.
    #[error("the guard began on {began} bytes and was handed {now}: every step needs the same input")]
    OtherInput {
        /// Bytes of the input at the first step.
        began: usize,
        /// Bytes of the input now.
        now: usize,
    },
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Not through yet: call again with the same bytes.
    More,
    /// The term is allowed.
    Done(GuardStats),
}

/// Checks a whole encoded term (version byte, term, nothing after it) in one go.
///
/// # Errors
/// Any [`GuardError`] but [`GuardError::OtherInput`].
pub fn check(bytes: &[u8], policy: &GuardPolicy) -> Result<GuardStats, GuardError> {
    let mut guard = Guard::new(*policy);
    loop {
        if let Step::Done(stats) = guard.step(bytes, usize::MAX)? {
            return Ok(stats);
        }
    }
}

/// What the smallest token counts as in [`Guard::step`]: its handling takes longer than reading its one byte.
const TOKEN_WORK: usize = 8;

/// A check that can be interrupted. It owns no part of the input.
#[derive(Debug)]
pub struct Guard {
    policy: GuardPolicy,
    /// Length of the input, known from the first step on.
    len: Option<usize>,
    pos: usize,
    owed: usize,
    stats: GuardStats,
    nesting: Nesting,
    failed: Option<GuardError>,
}

impl Guard {
    /// A guard at the start of a term.
    pub fn new(policy: GuardPolicy) -> Self {
        Self {
            policy,
            len: None,
            pos: 1,
            owed: 1,
            stats: GuardStats::default(),
            nesting: Nesting::new(policy.max_depth as usize),
            failed: None,
        }
    }

    /// Goes on for about `max_work` bytes of the term and at least one token. Contents of binaries and strings,
    /// which are not looked at, cost nothing; no token counts as less than 8 bytes. One costs at most `max_integer_bytes` or about 2 KiB.
    ///
    /// # Errors
    /// Any [`GuardError`]; further steps then return the same one.
    pub fn step(&mut self, bytes: &[u8], max_work: usize) -> Result<Step, GuardError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.run(bytes, max_work)
            .inspect_err(|error| self.failed = Some(*error))
    }

    /// Bytes passed so far.
    pub fn offset(&self) -> usize {
        self.pos
    }

    fn run(&mut self, bytes: &[u8], max_work: usize) -> Result<Step, GuardError> {
        match self.len {
            None => {
                check_start(
                    bytes,
                    &Limits {
                        max_bytes: self.policy.max_bytes,
                        ..Limits::default()
                    },
                )?;
                self.len = Some(bytes.len());
            }
            Some(began) if began != bytes.len() => {
                return Err(GuardError::OtherInput {
                    began,
                    now: bytes.len(),
                });
            }
            Some(_) => {}
        }
        let GuardPolicy {
            max_terms,
            max_integer_bytes,
            ..
        } = self.policy;
        let mut cursor = Cursor::resume(
            bytes,
            self.pos,
            self.owed,
            self.stats.terms,
            max_terms,
            max_integer_bytes,
        );
        let mut work = 0usize;
        while cursor.owed() > 0 {
            let at = cursor.pos();
            let token = cursor.token()?;
            self.nesting.advance(&token, at, cursor.pos())?;
            self.admit(&token, at)?;
            let read = cursor.pos() - at - unread_len(&token);
            work = work.saturating_add(read.max(TOKEN_WORK));
            if work >= max_work {
                break;
            }
        }
        self.pos = cursor.pos();
        self.owed = cursor.owed();
        self.stats.terms = cursor.seen();
        self.stats.depth = self.nesting.deepest();
        if self.owed > 0 {
            return Ok(Step::More);
        }
        match bytes.len() - self.pos {
            0 => Ok(Step::Done(self.stats)),
            remaining => Err(DecodeError::Trailing {
                offset: self.pos,
                remaining,
            }
            .into()),
        }
    }

    /// Holds one token against the policy and adds it to the figures.
    fn admit(&mut self, token: &Token<'_>, offset: usize) -> Result<(), GuardError> {
        let policy = &self.policy;
        let refused = match token {
            Token::Fun(_) if !policy.allow_funs => Some("fun"),
            Token::Export { .. } if !policy.allow_exports => Some("fun by name"),
            Token::Pid(_) if !policy.allow_pids => Some("pid"),
            Token::Port(_) if !policy.allow_ports => Some("port"),
            Token::Reference(_) if !policy.allow_references => Some("reference"),
            _ => None,
        };
        if let Some(kind) = refused {
            return Err(GuardError::NotAllowed { kind, offset });
        }
        let stats = &mut self.stats;
        for atom in atoms(token).into_iter().flatten() {
            stats.atoms += 1;
            stats.atom_bytes += atom.encoded_len();
        }
        stats.heap_words = stats.heap_words.saturating_add(heap_words(token));
        if stats.atoms > policy.max_atoms {
            return Err(GuardError::TooManyAtoms {
                limit: policy.max_atoms,
                offset,
            });
        }
        if stats.atom_bytes > policy.max_atom_bytes {
            return Err(GuardError::TooManyAtomBytes {
                limit: policy.max_atom_bytes,
                offset,
            });
        }
        if stats.heap_words > policy.max_heap_words {
            let (words, limit) = (stats.heap_words, policy.max_heap_words);
            return Err(GuardError::TooManyHeapWords { words, limit, offset });
        }
        Ok(())
    }
}

/// The atoms that are part of one token.
fn atoms<'a>(token: &Token<'a>) -> [Option<AtomRef<'a>>; 2] {
    match token {
        Token::Atom(atom) => [Some(*atom), None],
        Token::Pid(pid) => [Some(pid.node), None],
        Token::Port(port) => [Some(port.node), None],
        Token::Reference(reference) => [Some(reference.node), None],
        Token::Export { module, function, .. } => [Some(*module), Some(*function)],
        _ => [None, None],
    }
}

/// Bytes of a token that the cursor passed over without reading them.
fn unread_len(token: &Token<'_>) -> usize {
    match token {
        Token::Binary(bytes) | Token::BitBinary { bytes, .. } | Token::ByteList(bytes) => bytes.len(),
        _ => 0,
    }
}

/// Heap words of one token without its parts, for a 64-bit BEAM. Where releases differ, the larger figure.
fn heap_words(token: &Token<'_>) -> usize {
    /// Integers of up to 60 bits are part of the word that holds them.
    const SMALL: std::ops::Range<i64> = -(1 << 59)..1 << 59;
    /// Binaries of up to this size live on the heap.
    const HEAP_BINARY: usize = 64;
    /// Maps of up to this many pairs are two flat arrays; larger ones are trees.
    const FLAT_MAP: usize = 32;
    match token {
        Token::Int(value) if SMALL.contains(value) => 0,
        Token::Int(_) | Token::Float(_) => 2,
        Token::BigInt { magnitude, .. } => 1 + magnitude.len().div_ceil(8),
        Token::Binary(bytes) if bytes.len() <= HEAP_BINARY => 2 + bytes.len().div_ceil(8),
        Token::BitBinary { bytes, .. } if bytes.len() <= HEAP_BINARY => 8 + bytes.len().div_ceil(8),
        Token::Binary(_) | Token::BitBinary { .. } => 12,
        Token::ByteList(bytes) => bytes.len().saturating_mul(2),
        Token::List { len } => len.saturating_mul(2),
        Token::Tuple { arity } => arity.saturating_add(1),
        Token::Map { pairs } if *pairs <= FLAT_MAP => 5 + 2 * pairs,
        Token::Map { pairs } => pairs.saturating_mul(5),
        Token::Pid(_) | Token::Port(_) | Token::Export { .. } => 5,
        Token::Reference(_) => 8,
        Token::Fun(fun) => (fun.num_free as usize).saturating_add(10),
        Token::Atom(_) | Token::Nil => 0,
    }
}

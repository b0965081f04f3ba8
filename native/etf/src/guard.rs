//! Looks through a term that a peer sent, before a BEAM decodes it.
//!
//! `binary_to_term` takes whatever is well formed: terms that inflate a thousandfold, funs, a million new atoms,
//! integers that take seconds to print. The guard walks the bytes first and says no in time. It builds nothing and
//! passes over the contents of binaries in constant time.
//!
//! Maps have limits of their own because a BEAM builds all maps of a term at its end without ever yielding: on OTP
//! 25.2.3, 500,000 pairs held a scheduler for 94 ms, and one binary of 4 MiB as the key of the key of 250 maps for
//! 740 ms, since each map hashes all that is in its keys. Nodes have one because an identifier of a node that the
//! BEAM has not seen before, or not with this creation, takes a place in its table of nodes.
//!
//! It works in slices so that a NIF can return to its scheduler: [`Guard::step`] does a bounded amount of work and
//! keeps its place.
//!
//! A compressed term is always refused. What it holds shows only after inflating it, which would be the work the
//! guard is there to avoid.
//!
//! ```
//! use meshx_etf::guard::{GuardPolicy, check};
//! use meshx_etf::{encode, term};
//!
//! let policy = GuardPolicy { max_atoms: 3, ..GuardPolicy::default() };
//! let mut bytes = Vec::new();
//! encode(&term!({find, [lamp, chair]}), &mut bytes)?;
//! assert!(check(&bytes, &policy).is_ok());
//! bytes.clear();
//! encode(&term!({find, [lamp, chair, table]}), &mut bytes)?;
//! assert!(check(&bytes, &policy).unwrap_err().to_string().contains("max_atoms"));
//! # Ok::<(), meshx_etf::EncodeError>(())
//! ```

use thiserror::Error;

use crate::atom::Atom;
use crate::cursor::{Container, Cursor};
use crate::error::DecodeError;
use crate::indexed::{Indexed, Indexer};
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
    /// Pairs of all maps together. Default 262,144.
    pub max_map_pairs: usize,
    /// Bytes of all map keys together as they are encoded, see [`GuardStats::key_bytes`]. Default 4 MiB.
    pub max_key_bytes: usize,
    /// Nodes that pids, ports and references name, each creation of a node counted. Default 64.
    pub max_nodes: usize,
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
            max_map_pairs: 256 << 10,
            max_key_bytes: 4 << 20,
            max_nodes: 64,
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
    /// Pairs of all maps.
    pub map_pairs: usize,
    /// Bytes of all map keys as they are encoded. What is in the key of a map that is itself in a key counts once
    /// for each of those maps, as it is hashed or compared for each.
    pub key_bytes: usize,
    /// Different pairs of node and creation in pids, ports and references.
    pub nodes: usize,
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
    /// More pairs in maps than the limit.
    #[error("{pairs} pairs in maps by offset {offset}, the limit is {limit} (max_map_pairs)")]
    TooManyMapPairs {
        /// Pairs announced so far.
        pairs: usize,
        /// The limit in force.
        limit: usize,
        /// Where the map that passes it begins.
        offset: usize,
    },
    /// More bytes in keys of maps than the limit.
    #[error("more than {limit} bytes in keys of maps by offset {offset} (max_key_bytes)")]
    TooManyKeyBytes {
        /// The limit in force.
        limit: usize,
        /// Where the term that passes it begins.
        offset: usize,
    },
    /// Pids, ports and references of more nodes than the limit.
    #[error("identifiers of more than {limit} nodes or creations by offset {offset} (max_nodes)")]
    TooManyNodes {
        /// The limit in force.
        limit: usize,
        /// Where the identifier that passes it begins.
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
    /// Of how many maps the token is in a key, as the key itself or as a part of it.
    in_keys: usize,
    /// Nodes and creations seen, at most `max_nodes`.
    nodes: Vec<(Atom, u32)>,
    failed: Option<GuardError>,
    /// Whether to write the term's other form.
    indexing: bool,
    indexer: Option<Box<Indexer>>,
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
            in_keys: 0,
            nodes: Vec::new(),
            failed: None,
            indexing: false,
            indexer: None,
        }
    }

    /// One that also writes the term with its atoms in a table, see [`Guard::indexed`].
    pub fn indexing(policy: GuardPolicy) -> Self {
        Self {
            indexing: true,
            ..Self::new(policy)
        }
    }

    /// When the guard is done, and once: the term with its atoms in a table, if a BEAM decodes it sooner that way, and in
    /// about a millisecond. Such a term has 256 atoms or more, at most 255 different ones, maps of at most 32 pairs with
    /// atoms as keys, no identifiers, no functions, no binaries of more than 1 KiB, and 2 KiB to 1 MiB in all.
    pub fn indexed(&mut self, bytes: &[u8]) -> Option<Indexed> {
        (self.owed == 0 && self.failed.is_none() && self.len == Some(bytes.len()))
            .then(|| self.indexer.take()?.finish(bytes))?
    }

    /// Goes on for about `max_work` bytes of the term and at least one token. Contents of binaries and strings,
    /// which are not looked at, cost nothing; no token counts as less than 8 bytes, and an identifier as so much more
    /// as nodes were named before it. One costs at most `max_integer_bytes` or about 2 KiB.
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
                if self.indexing {
                    self.indexer = Indexer::new(bytes.len());
                }
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
            let is_key = self.nesting.next_is_key(cursor.owed());
            // The usual forms first, each with a copy of what is done with a token: it is known then of which kind it is.
            let done = if let Some((text, short)) = cursor.next_short_atom() {
                let token = Token::Atom(AtomRef::ascii(text));
                self.pass(&token, Some(short), at, is_key, &cursor, bytes)
            } else if let Some(value) = cursor.next_int() {
                self.pass(&Token::Int(value), None, at, is_key, &cursor, bytes)
            } else if let Some(binary) = cursor.next_binary() {
                self.pass(&Token::Binary(binary), None, at, is_key, &cursor, bytes)
            } else if let Some((container, count)) = cursor.next_container() {
                let token = match container {
                    Container::List => Token::List { len: count },
                    Container::Map => Token::Map { pairs: count },
                    Container::Tuple => Token::Tuple { arity: count },
                };
                self.pass(&token, None, at, is_key, &cursor, bytes)
            } else {
                let token = cursor.token()?;
                self.pass(&token, None, at, is_key, &cursor, bytes)
            };
            work = work.saturating_add(done?);
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

    /// Takes one token that began at `at`; `after` is behind its own bytes. Returns the work it was.
    #[inline(always)]
    fn pass(
        &mut self,
        token: &Token<'_>,
        short: Option<u128>,
        at: usize,
        is_key: Option<bool>,
        after: &Cursor<'_>,
        bytes: &[u8],
    ) -> Result<usize, GuardError> {
        match is_key {
            Some(true) => self.in_keys += 1,
            Some(false) => self.in_keys = self.in_keys.saturating_sub(1),
            None => {}
        }
        self.nesting.advance(token, at, after)?;
        let len = after.pos() - at;
        self.admit(token, at, len)?;
        if let Some(indexer) = &mut self.indexer
            && indexer
                .token(bytes, token, short, at, after.pos(), is_key == Some(true))
                .is_none()
        {
            self.indexer = None;
        }
        let mut work = (len - unread_len(token)).max(TOKEN_WORK);
        if let Some((node, creation)) = node(token) {
            work = work.saturating_add(self.nodes.len());
            self.admit_node(node, creation, at)?;
        }
        Ok(work)
    }

    /// Holds one token of `len` bytes against the policy and adds it to the figures.
    #[inline(always)]
    fn admit(&mut self, token: &Token<'_>, offset: usize, len: usize) -> Result<(), GuardError> {
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
        if let Token::Map { pairs } = token {
            stats.map_pairs = stats.map_pairs.saturating_add(*pairs);
        }
        let in_keys = len.saturating_mul(self.in_keys);
        stats.key_bytes = stats.key_bytes.saturating_add(in_keys);
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
        if stats.map_pairs > policy.max_map_pairs {
            let (pairs, limit) = (stats.map_pairs, policy.max_map_pairs);
            return Err(GuardError::TooManyMapPairs { pairs, limit, offset });
        }
        if stats.key_bytes > policy.max_key_bytes {
            return Err(GuardError::TooManyKeyBytes {
                limit: policy.max_key_bytes,
                offset,
            });
        }
        if stats.heap_words > policy.max_heap_words {
            let (words, limit) = (stats.heap_words, policy.max_heap_words);
            return Err(GuardError::TooManyHeapWords { words, limit, offset });
        }
        Ok(())
    }

    fn admit_node(&mut self, node: AtomRef<'_>, creation: u32, offset: usize) -> Result<(), GuardError> {
        if self
            .nodes
            .iter()
            .any(|(seen, of)| *of == creation && node == *seen.as_str())
        {
            return Ok(());
        }
        let limit = self.policy.max_nodes;
        if self.nodes.len() >= limit {
            return Err(GuardError::TooManyNodes { limit, offset });
        }
        self.nodes.push((node.into(), creation));
        self.stats.nodes = self.nodes.len();
        Ok(())
    }
}

/// The node and creation that an identifier names.
fn node<'a>(token: &Token<'a>) -> Option<(AtomRef<'a>, u32)> {
    match token {
        Token::Pid(pid) => Some((pid.node, pid.creation)),
        Token::Port(port) => Some((port.node, port.creation)),
        Token::Reference(reference) => Some((reference.node, reference.creation)),
        _ => None,
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

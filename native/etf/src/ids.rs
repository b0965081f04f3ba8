//! Pids, ports, references and funs: terms that point at something on a node.

use crate::atom::Atom;
use crate::cursor::Cursor;
use crate::limits::Limits;
use crate::token::{AtomRef, PidRef, PortRef, ReferenceRef, Token};

/// A process identifier.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid {
    /// Node it belongs to.
    pub node: Atom,
    /// Process number.
    pub id: u32,
    /// Wraps of the process number.
    pub serial: u32,
    /// Creation of the node.
    pub creation: u32,
}

/// A port identifier.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// Node it belongs to.
    pub node: Atom,
    /// Port number.
    pub id: u64,
    /// Creation of the node.
    pub creation: u32,
}

/// A reference.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// Node that made it.
    pub node: Atom,
    /// Creation of the node.
    pub creation: u32,
    /// Its id words, 1 to 5, in the order of the encoding.
    pub ids: Vec<u32>,
}

/// A fun by name, `fun module:function/arity`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Export {
    /// Module.
    pub module: Atom,
    /// Function.
    pub function: Atom,
    /// Arity.
    pub arity: u8,
}

/// A fun with code and captured values, kept as the bytes it came in.
///
/// Only a decoder makes one: its parts were checked for form then, and it can be sent on as it is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fun {
    /// What follows the tag of `NEW_FUN_EXT`, the size field included.
    body: Vec<u8>,
}

impl Fun {
    pub(crate) fn from_checked(body: &[u8]) -> Self {
        Self { body: body.to_vec() }
    }

    /// What follows the tag of `NEW_FUN_EXT`, the size field included.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The module it was made in.
    pub fn module(&self) -> Option<Atom> {
        let parts = self.body.get(29..)?;
        match Cursor::new(parts, 0, &Limits::default()).token() {
            Ok(Token::Atom(module)) => Some(module.into()),
            _ => None,
        }
    }

    /// Arguments it takes.
    pub fn arity(&self) -> u8 {
        self.body.get(4).copied().unwrap_or_default()
    }
}

impl Pid {
    pub(crate) fn from_ref(pid: &PidRef<'_>, atom: impl FnOnce(AtomRef<'_>) -> Atom) -> Self {
        Self {
            node: atom(pid.node),
            id: pid.id,
            serial: pid.serial,
            creation: pid.creation,
        }
    }
}

impl Port {
    pub(crate) fn from_ref(port: &PortRef<'_>, atom: impl FnOnce(AtomRef<'_>) -> Atom) -> Self {
        Self {
            node: atom(port.node),
            id: port.id,
            creation: port.creation,
        }
    }
}

impl Reference {
    pub(crate) fn from_ref(reference: &ReferenceRef<'_>, atom: impl FnOnce(AtomRef<'_>) -> Atom) -> Self {
        Self {
            node: atom(reference.node),
            creation: reference.creation,
            ids: reference.ids().collect(),
        }
    }
}

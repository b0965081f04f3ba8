//! Whom a message or a monitor is for.

use std::fmt;

use meshx_etf::{Atom, Pid, Reference};

/// A process, here or on another node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A process by its identifier.
    Pid(Pid),
    /// A process by the name that it is registered under on its node.
    Name {
        /// The registered name.
        name: Atom,
        /// The node, as `name@host`.
        node: Atom,
    },
    /// A process by an alias that it made for itself. It can be sent to, but not monitored or linked.
    Alias(Reference),
}

impl Address {
    /// The node that the process is on.
    #[must_use]
    pub fn node(&self) -> &Atom {
        match self {
            Self::Pid(pid) => &pid.node,
            Self::Name { node, .. } => node,
            Self::Alias(reference) => &reference.node,
        }
    }
}

impl From<Pid> for Address {
    fn from(pid: Pid) -> Self {
        Self::Pid(pid)
    }
}

impl From<&Pid> for Address {
    fn from(pid: &Pid) -> Self {
        Self::Pid(pid.clone())
    }
}

impl From<&Self> for Address {
    fn from(address: &Self) -> Self {
        address.clone()
    }
}

/// `(name, node)`, as in Erlang.
impl From<(&str, &str)> for Address {
    fn from((name, node): (&str, &str)) -> Self {
        Self::Name {
            name: name.into(),
            node: node.into(),
        }
    }
}

impl From<Reference> for Address {
    fn from(alias: Reference) -> Self {
        Self::Alias(alias)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "<{}.{}> on {}", pid.id, pid.serial, pid.node.as_str()),
            Self::Name { name, node } => write!(f, "{} on {}", name.as_str(), node.as_str()),
            Self::Alias(reference) => write!(f, "an alias on {}", reference.node.as_str()),
        }
    }
}

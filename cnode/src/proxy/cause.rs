//! Why something was refused, in the words of `docs/mesh-protocol.md`.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! causes {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// Why a connection, a registration or a request was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Cause { $($(#[$doc])* $name,)* }

        impl Cause {
            /// All causes, in the order of their declaration.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name on the wire, in logs and as an atom.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

causes! {
    /// The catalogue has no such node.
    NoSuchNode => "no_such_node",
    /// The catalogue has no such service.
    NoSuchService => "no_such_service",
    /// The instance's agent, or the instance behind it, does not answer.
    Unreachable => "unreachable",
    /// A rule denies this pair.
    IntentionDenied => "intention_denied",
    /// A name was claimed that the certificate or secret does not prove.
    IdentityMismatch => "identity_mismatch",
    /// Chain, validity or SPIFFE name of a certificate do not hold.
    CertificateInvalid => "certificate_invalid",
    /// No chain from a certificate to a root of the mesh.
    UnknownAuthority => "unknown_authority",
    /// A certificate of another trust domain.
    WrongTrustDomain => "wrong_trust_domain",
    /// A certificate that is not valid yet or no longer.
    CertificateExpired => "certificate_expired",
    /// A certificate of another service than the one that was dialled.
    WrongService => "wrong_service",
    /// The peer showed no certificate.
    NoCertificate => "no_certificate",
    /// This uid, or the mesh's token, may not do this.
    NotPermitted => "not_permitted",
    /// The secret does not belong to a registration.
    BadSecret => "bad_secret",
    /// Another instance of this name is registered.
    NameTaken => "name_taken",
    /// The host part of the name is not one of this agent's.
    HostNotOwned => "host_not_owned",
    /// Not a name of a node or service.
    InvalidName => "invalid_name",
    /// The request could not be understood, or asks for what does not go together.
    InvalidRequest => "invalid_request",
    /// No common protocol version.
    VersionMismatch => "version_mismatch",
    /// A limit was reached.
    Limit => "limit",
    /// The other side was silent for too long.
    Timeout => "timeout",
    /// No certificate or no answer from the mesh yet.
    NotReady => "not_ready",
    /// This kind of mesh has no such thing.
    Unsupported => "unsupported",
}

impl Cause {
    /// The cause of this name, when there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|cause| cause.as_str() == name)
    }

    /// Position in [`Cause::ALL`].
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    /// A refusal by this cause.
    pub fn because(self, text: impl Into<String>) -> Refusal {
        Refusal {
            cause: self,
            text: text.into(),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Cause {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).ok_or_else(|| serde::de::Error::custom(format!("no cause is called {name:?}")))
    }
}

/// A cause, and what was seen and wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{cause}: {text}")]
pub struct Refusal {
    /// The cause.
    pub cause: Cause,
    /// For people. Holds no secret.
    pub text: String,
}

impl From<crate::mesh::MeshError> for Refusal {
    /// No answer is a no.
    fn from(error: crate::mesh::MeshError) -> Self {
        use crate::mesh::MeshError;
        let cause = match error {
            MeshError::Forbidden(_) => Cause::NotPermitted,
            MeshError::Unsupported(_) => Cause::Unsupported,
            MeshError::Limit(_) => Cause::Limit,
            _ => Cause::NotReady,
        };
        cause.because(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn every_cause_has_its_own_name() {
        for (i, cause) in Cause::ALL.iter().enumerate() {
            assert_eq!(Cause::parse(cause.as_str()), Some(*cause));
            assert_eq!(cause.index(), i);
        }
        assert_eq!(Cause::parse("nonsense"), None);
    }
}

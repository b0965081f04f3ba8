//! Names that certificates prove.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest service name in bytes: one DNS label (RFC 1035 section 2.3.4), since SNI carries it.
pub const MAX_SERVICE_NAME: usize = 63;
/// Longest node name in bytes: an atom has at most 255 characters, and a name frame must stay small.
pub const MAX_NODE_NAME: usize = 255;
/// Longest SPIFFE id in bytes (SPIFFE ID section 2.3 asks for at most 2048).
pub const MAX_SPIFFE_ID: usize = 512;
/// Hexadecimal digits of SHA-256 that tell apart two node names whose slugs are equal.
const SLUG_HASH_DIGITS: usize = 12;
/// Namespace of every identity that this mesh makes.
const NAMESPACE: &str = "default";
/// Data centre of every identity that this mesh makes.
const DATACENTER: &str = "dc1";

/// A name that is not what it should be.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameError {
    /// Not a service name.
    #[error("service name {0:?} is not 1 to {max} of a-z, 0-9 and inner hyphens", max = MAX_SERVICE_NAME)]
    Service(String),
    /// Not a node name.
    #[error("node name {0:?} is not name@host of at most {max} bytes", max = MAX_NODE_NAME)]
    Node(String),
    /// Not a SPIFFE id of a service.
    #[error("{0:?} is not spiffe://TRUST-DOMAIN/ns/NS/dc/DC/svc/SERVICE of at most {max} bytes", max = MAX_SPIFFE_ID)]
    Spiffe(String),
}

/// The name of a service: 1 to 63 of `a-z`, `0-9` and hyphens that are neither first nor last.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl ServiceName {
    /// Checks a service name.
    ///
    /// # Errors
    /// [`NameError::Service`] when it holds another character or is too long.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let bytes = name.as_bytes();
        let inside = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let edges = bytes.first() != Some(&b'-') && bytes.last() != Some(&b'-');
        if (1..=MAX_SERVICE_NAME).contains(&bytes.len()) && bytes.iter().all(inside) && edges {
            Ok(Self(name.to_owned()))
        } else {
            Err(NameError::Service(shorten(name)))
        }
    }

    /// The service of a node: the part before `@`, when that is a service name as it stands.
    ///
    /// Otherwise its letters in lower case with a hyphen for every run of other characters, cut to
    /// fit, and `-` with 12 hexadecimal digits of the SHA-256 of the part before `@`. So two names
    /// never share a service because of what the slug lost: `my_app` is `my-app-f3d5...`.
    ///
    /// # Errors
    /// [`NameError::Node`] when it is not `name@host`.
    pub fn from_node(node: &str) -> Result<Self, NameError> {
        let (name, _host) = split_node(node)?;
        match Self::new(name) {
            Ok(as_it_stands) => Ok(as_it_stands),
            Err(_) => Self::slug(name),
        }
    }

    /// A service for one node alone: the slug of the whole name, `shop-h1-...` for `shop@h1`, always with the hash.
    ///
    /// For nodes behind sidecars that choose any instance of a service, and where names within one service must
    /// be held apart by certificates.
    ///
    /// # Errors
    /// [`NameError::Node`] when it is not `name@host`.
    pub fn of_single_node(node: &str) -> Result<Self, NameError> {
        split_node(node)?;
        Self::slug(node)
    }

    /// Whether a node of this name can be an instance of this service, by either of the two ways.
    pub fn may_have_node(&self, node: &str) -> bool {
        [Self::from_node(node), Self::of_single_node(node)].contains(&Ok(self.clone()))
    }

    fn slug(name: &str) -> Result<Self, NameError> {
        let mut slug = String::new();
        for c in name.chars() {
            if c.is_ascii_alphanumeric() {
                slug.push(c.to_ascii_lowercase());
            } else if !slug.is_empty() && !slug.ends_with('-') {
                slug.push('-');
            }
        }
        slug.truncate(MAX_SERVICE_NAME - SLUG_HASH_DIGITS - 1);
        let slug = match slug.trim_end_matches('-') {
            "" => "node",
            some => some,
        };
        let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
        let hex: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        Self::new(&format!("{slug}-{}", hex.get(..SLUG_HASH_DIGITS).unwrap_or(&hex)))
    }
}

impl AsRef<str> for ServiceName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for ServiceName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(&name)
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.0
    }
}

/// Splits `name@host`; neither part is empty and there is one `@`.
///
/// # Errors
/// [`NameError::Node`].
pub fn split_node(node: &str) -> Result<(&str, &str), NameError> {
    match node.split_once('@') {
        Some((name, host))
            if !name.is_empty()
                && !host.is_empty()
                && !host.contains('@')
                && node.len() <= MAX_NODE_NAME
                && !node.chars().any(char::is_control) =>
        {
            Ok((name, host))
        }
        _ => Err(NameError::Node(shorten(node))),
    }
}

/// `spiffe://TRUST-DOMAIN/ns/NS/dc/DC/svc/SERVICE`, the one form that names a service.
///
/// Two ids are the same when they are the same text: no part is folded, decoded or normalised.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    trust_domain: String,
    namespace: String,
    datacenter: String,
    service: ServiceName,
}

impl SpiffeId {
    /// The id of a service in this trust domain, in Consul's default namespace and data centre.
    pub fn new(trust_domain: &str, service: ServiceName) -> Self {
        Self::scoped(trust_domain, NAMESPACE, DATACENTER, service)
    }

    /// The id of a service in this trust domain, namespace and data centre.
    pub fn scoped(trust_domain: &str, namespace: &str, datacenter: &str, service: ServiceName) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            datacenter: datacenter.to_owned(),
            service,
        }
    }

    /// The same service of another trust domain.
    pub fn in_domain(&self, trust_domain: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            ..self.clone()
        }
    }

    /// The trust domain: who signs.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The service.
    pub fn service(&self) -> &ServiceName {
        &self.service
    }

    /// The name that a dialler asks for in the TLS handshake, in Consul's form.
    pub fn server_name(&self) -> String {
        let Self {
            trust_domain,
            namespace,
            datacenter,
            service,
        } = self;
        format!("{service}.{namespace}.{datacenter}.internal.{trust_domain}")
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            datacenter,
            service,
        } = self;
        write!(
            f,
            "spiffe://{trust_domain}/ns/{namespace}/dc/{datacenter}/svc/{service}"
        )
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromStr for SpiffeId {
    type Err = NameError;

    /// Parses strictly: no other scheme spelling, no query, no percent encoding, no empty or dot
    /// segment (SPIFFE ID sections 2.1 and 2.2).
    fn from_str(text: &str) -> Result<Self, NameError> {
        let fail = || NameError::Spiffe(shorten(text));
        if text.len() > MAX_SPIFFE_ID {
            return Err(fail());
        }
        let mut parts = text.strip_prefix("spiffe://").ok_or_else(fail)?.split('/');
        let mut next = || parts.next().ok_or_else(fail);
        let trust_domain = next()?;
        let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
        if trust_domain.is_empty() || !trust_domain.bytes().all(lower) {
            return Err(fail());
        }
        let mut labelled = |label: &str| {
            let (seen, value) = (next()?, next()?);
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            let valid = seen == label && !matches!(value, "" | "." | "..") && value.bytes().all(good);
            valid.then_some(value).ok_or_else(fail)
        };
        let (namespace, datacenter) = (labelled("ns")?, labelled("dc")?);
        let service = ServiceName::new(labelled("svc")?).map_err(|_| fail())?;
        if parts.next().is_some() {
            return Err(fail());
        }
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            datacenter: datacenter.to_owned(),
            service,
        })
    }
}

/// The proof that one service has of its name, and what it believes others by.
pub struct Identity {
    /// What the leaf certificate names.
    pub id: SpiffeId,
    /// The leaf, then the intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// Whom to believe.
    pub roots: Arc<RootCertStore>,
    /// End of the leaf's validity, in unix seconds.
    pub not_after: i64,
}

/// Shows no key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("id", &format_args!("{}", self.id))
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// What an error text shows of a name that a peer chose.
fn shorten(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn service_names_are_dns_labels() {
        for good in ["a", "shop", "shop-2", "0", &"x".repeat(63)] {
            assert_eq!(ServiceName::new(good).unwrap().as_ref(), good);
        }
        for bad in [
            "",
            "Shop",
            "a_b",
            "a.b",
            "-a",
            "a-",
            "*",
            "a b",
            "ä",
            &"x".repeat(64),
        ] {
            let error = ServiceName::new(bad).unwrap_err();
            assert!(error.to_string().contains("a-z, 0-9"), "{error}");
        }
        assert!(serde_json::from_str::<ServiceName>("\"a/b\"").is_err());
    }

    #[test]
    fn a_plain_node_is_the_service_of_its_name() {
        assert_eq!(ServiceName::from_node("shop@h1").unwrap().as_ref(), "shop");
        assert_eq!(
            ServiceName::from_node("shop-2@h1.example.org").unwrap().as_ref(),
            "shop-2"
        );
    }

    #[test]
    fn what_a_slug_drops_is_told_apart_by_a_hash() {
        let names = [
            "my_app@h",
            "my.app@h",
            "my-app@h",
            "My-App@h",
            "my__app@h",
            "日本@h",
            "日本語@h",
            "-@h",
        ];
        let slugs: Vec<_> = names.iter().map(|n| ServiceName::from_node(n).unwrap()).collect();
        assert!(slugs[0].as_ref().starts_with("my-app-") && slugs[0].as_ref().len() == 7 + SLUG_HASH_DIGITS);
        assert!(slugs[5].as_ref().starts_with("node-"));
        for (i, a) in slugs.iter().enumerate() {
            assert!(slugs.iter().skip(i + 1).all(|b| a != b), "{a} twice");
        }
    }

    #[test]
    fn a_node_may_have_a_service_of_its_own() {
        let one = |node| ServiceName::of_single_node(node).unwrap();
        assert!(one("shop@h1").as_ref().starts_with("shop-h1-"));
        assert_ne!(one("shop@h1"), one("shop@h-1"));
        assert_ne!(one("shop@h1"), ServiceName::from_node("shop-h1@h1").unwrap());
        assert!(ServiceName::of_single_node("shop").is_err());
        assert!(one("shop@h1").may_have_node("shop@h1") && !one("shop@h1").may_have_node("shop@h2"));
        let shop = ServiceName::new("shop").unwrap();
        assert!(shop.may_have_node("shop@h2") && !shop.may_have_node("cart@h2"));
        assert!(one(&format!("{}@h1", "x".repeat(200))).as_ref().len() <= MAX_SERVICE_NAME);
    }

    #[test]
    fn nodes_need_two_parts_and_one_at_sign() {
        for bad in [
            "shop",
            "@h",
            "shop@",
            "a@b@c",
            "a\n@h",
            "",
            &format!("{}@h", "x".repeat(MAX_NODE_NAME)),
        ] {
            assert!(
                matches!(ServiceName::from_node(bad), Err(NameError::Node(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn spiffe_ids_are_strict() {
        let text = "spiffe://11-22.embedded/ns/default/dc/dc1/svc/shop";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(
            id,
            SpiffeId::new("11-22.embedded", ServiceName::new("shop").unwrap())
        );
        assert_eq!(id.to_string(), text);
        assert_eq!(id.server_name(), "shop.default.dc1.internal.11-22.embedded");
        for bad in [
            "spiffe://td/ns/default/dc/dc1/svc/shop/",
            "spiffe://td/ns/default/dc/dc1/svc/",
            "spiffe://td/ns/default/dc/dc1/svc/shop/x",
            "spiffe://td/ns/default/dc/dc1/svc/Shop",
            "spiffe://td//ns/default/dc/dc1/svc/shop",
            "spiffe://TD/ns/default/dc/dc1/svc/shop",
            "spiffe://td:1/ns/default/dc/dc1/svc/shop",
            "spiffe://u@td/ns/default/dc/dc1/svc/shop",
            "spiffe:///ns/default/dc/dc1/svc/shop",
            "spiffe://td/ns/../dc/dc1/svc/shop",
            "spiffe://td/ns/%64/dc/dc1/svc/shop",
            "spiffe://td/ns/default/dc/dc1/svc/shop?x=1",
            "spiffe://td/ns/default/dc/dc1/svc/shop#x",
            "SPIFFE://td/ns/default/dc/dc1/svc/shop",
            "https://td/ns/default/dc/dc1/svc/shop",
            " spiffe://td/ns/default/dc/dc1/svc/shop",
            "spiffe://td/dc/dc1/ns/default/svc/shop",
            "",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
        let long = format!(
            "spiffe://{}/ns/default/dc/dc1/svc/shop",
            "t".repeat(MAX_SPIFFE_ID)
        );
        assert!(long.parse::<SpiffeId>().is_err());
    }

    proptest! {
        #[test]
        fn every_node_has_a_service(name in "[^@\\p{Cc}]{1,60}", host in "[^@\\p{Cc}]{1,3}") {
            let service = ServiceName::from_node(&format!("{name}@{host}")).unwrap();
            prop_assert!(ServiceName::new(service.as_ref()).is_ok());
        }

        #[test]
        fn any_text_parses_or_fails(text in "\\PC{0,100}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}

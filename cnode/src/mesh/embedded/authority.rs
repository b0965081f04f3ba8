//! The mesh's own certificate authority, and how it is exchanged under traffic.
//!
//! `ca.pem` has the roots that are believed, `ca.key` the key of the one that signs. Both are replaced as a whole, and
//! each agent follows at its next question: a new version of either means new leaves.
//!
//! An authority of one's own need not sign with a root's key: `ca.chain.pem` has the certificate of `ca.key` then, and
//! those between it and a root. Leaves are shown with all of them.

use std::sync::Arc;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::dir::{MeshDir, Stamp};
use crate::mesh::{Identity, MeshError, ServiceName, SpiffeId};

/// How long a leaf is valid, in hours; Consul's default.
const LEAF_HOURS: i64 = 72;
/// A leaf is made anew when less than this of its life is left, in hours.
const RENEW_HOURS: i64 = 24;
/// How long the authority is valid, in days.
const AUTHORITY_DAYS: i64 = 3650;
/// Validity starts this much before now, for clocks that differ.
const BACKDATE: Duration = Duration::minutes(5);
/// Roots that are believed at a time.
const ROOTS_MAX: usize = 8;
/// Version of `mesh.json`.
const VERSION: u32 = 1;
const ROOTS: &str = "ca.pem";
const KEY: &str = "ca.key";
const CHAIN: &str = "ca.chain.pem";
/// Certificates between a leaf and a root.
const CHAIN_MAX: usize = 4;

/// What is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// All leaves: agents have new ones made at their next question.
    Leaves,
    /// The root: a new one signs from now on, and those before stay believed.
    Root,
    /// Only the root that signs stays believed.
    Forget,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeshFile {
    version: u32,
    trust_domain: String,
}

impl MeshFile {
    fn read(text: &str) -> Result<Self, MeshError> {
        serde_json::from_str(text).map_err(|error| MeshError::Unavailable(format!("mesh.json: {error}")))
    }
}

impl MeshDir {
    /// In which trust domain all names of the mesh are; none while it is being made.
    ///
    /// # Errors
    /// [`MeshError::Unavailable`] when it cannot be read.
    pub fn trust_domain(&self) -> Result<Option<String>, MeshError> {
        let text = self.read("mesh.json")?;
        text.map(|text| Ok(MeshFile::read(&text)?.trust_domain))
            .transpose()
    }
}

/// Signs leaf certificates for one trust domain.
pub(super) struct Authority {
    trust_domain: String,
    issuer: Issuer<'static, KeyPair>,
    /// The one that signs comes first, if a root does.
    list: Vec<CertificateDer<'static>>,
    /// Between a leaf and a root, the one that signs first; empty when a root does.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    version: [Stamp; 3],
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the authority of this mesh, or makes it. The caller holds the lock.
    pub(super) fn open(dir: &MeshDir) -> Result<Self, MeshError> {
        // mesh.json is written last: without it an earlier attempt was cut short and nobody used the key.
        if dir.read("mesh.json")?.is_none() {
            make(dir)?;
        }
        Self::load(dir)
    }

    /// Reads the authority as it is now. The caller holds the lock.
    pub(super) fn load(dir: &MeshDir) -> Result<Self, MeshError> {
        let missing = |name: &str| MeshError::Unavailable(format!("{} is gone", dir.join(name).display()));
        let read = |name: &str| dir.read(name)?.ok_or_else(|| missing(name));
        let mesh = MeshFile::read(&read("mesh.json")?)?;
        if mesh.version != VERSION {
            return Err(MeshError::Refused(format!(
                "the mesh has version {}, this program knows {VERSION}: use the program that made it, or another directory",
                mesh.version
            )));
        }
        let version = version(dir);
        let key = KeyPair::from_pem(&read(KEY)?).map_err(|error| broken(KEY, error))?;
        let mut list = certificates(ROOTS, &read(ROOTS)?, ROOTS_MAX)?;
        list.sort_by_key(|root| !is_of(root, &key));
        let mut intermediates = Vec::new();
        if !list.first().is_some_and(|root| is_of(root, &key)) {
            let chain = dir.read(CHAIN)?;
            let chain = chain.ok_or_else(|| broken(ROOTS, "no certificate in it is of the key in ca.key"))?;
            intermediates = certificates(CHAIN, &chain, CHAIN_MAX)?;
            if !intermediates.first().is_some_and(|first| is_of(first, &key)) {
                return Err(broken(CHAIN, "its first certificate is not of the key in ca.key"));
            }
        }
        let signing = intermediates.first().or(list.first());
        let signing = signing.ok_or_else(|| broken(ROOTS, "it is empty"))?;
        let issuer = Issuer::from_ca_cert_der(signing, key).map_err(|error| broken(ROOTS, error))?;
        let mut roots = RootCertStore::empty();
        for root in &list {
            roots.add(root.clone()).map_err(|error| broken(ROOTS, error))?;
        }
        Ok(Self {
            trust_domain: mesh.trust_domain,
            issuer,
            list,
            intermediates,
            roots: Arc::new(roots),
            version,
        })
    }

    /// Whether nothing was exchanged since it was read.
    pub(super) fn is_current(&self, dir: &MeshDir) -> bool {
        self.version == version(dir)
    }

    pub(super) fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The roots that are believed; the one that signs comes first, if a root does.
    pub(super) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.list
    }

    /// Makes a key and a leaf for a service.
    pub(super) fn issue(&self, service: &ServiceName) -> Result<Identity, MeshError> {
        let id = SpiffeId::new(&self.trust_domain, service.clone());
        let sign = || {
            let key = KeyPair::generate()?;
            let now = OffsetDateTime::now_utc();
            let mut params = CertificateParams::default();
            params.distinguished_name = common_name(service.as_ref());
            params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.to_string())?)];
            params.not_before = now - BACKDATE;
            params.not_after = now + Duration::hours(LEAF_HOURS);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            params.use_authority_key_identifier_extension = true;
            let not_after = params.not_after.unix_timestamp();
            let leaf = params.signed_by(&key, &self.issuer)?;
            Ok((leaf.der().clone(), key.serialize_der(), not_after))
        };
        let (leaf, key, not_after) = sign().map_err(|error: rcgen::Error| broken("leaf", error))?;
        self.check(&leaf)?;
        Ok(Identity {
            id,
            chain: [vec![leaf], self.intermediates.clone()].concat(),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)),
            roots: self.roots.clone(),
            not_after,
        })
    }
}

impl Authority {
    /// An authority that was put here must be one that others believe.
    fn check(&self, leaf: &CertificateDer<'static>) -> Result<(), MeshError> {
        let leaf = ParsedCertificate::try_from(leaf).map_err(|error| broken("leaf", error))?;
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        let (between, now) = (&self.intermediates, UnixTime::now());
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.roots, between, now, algorithms).map_err(
            |error| {
                let text = format!("its leaves do not lead to a root in {ROOTS}, by way of {CHAIN}: {error}");
                broken(KEY, text)
            },
        )
    }
}

/// Whether a leaf can still be handed out, being renewed `early` seconds before it must. One that has more than its whole
/// life before it was made when the clock was ahead: it is not valid yet.
pub(super) fn is_fresh(leaf: &Identity, early: i64, now: i64) -> bool {
    let left = leaf.not_after - now;
    left > RENEW_HOURS * 3600 + early && left < LEAF_HOURS * 3600 + BACKDATE.whole_seconds()
}

/// So many seconds earlier than it must is a leaf renewed: those that were made together are not renewed together.
pub(super) fn early() -> i64 {
    const SPREAD: i64 = 6 * 3600;
    getrandom::u32().map_or(0, |random| i64::from(random) % SPREAD)
}

/// Exchanges what the rotation says. Running agents follow by themselves.
///
/// # Errors
/// [`MeshError::Refused`] beyond `ROOTS_MAX` (8) roots, [`MeshError::Unavailable`] when a file cannot be read or written.
pub fn rotate(dir: &MeshDir, rotation: Rotation) -> Result<(), MeshError> {
    let _lock = dir.lock()?;
    let now = Authority::load(dir)?;
    let pem = |roots: &[CertificateDer<'_>]| -> String {
        let pem = |root: &CertificateDer<'_>| pem::encode(&pem::Pem::new("CERTIFICATE", root.to_vec()));
        roots.iter().map(pem).collect()
    };
    match rotation {
        Rotation::Leaves => dir.replace(KEY, &now.issuer.key().serialize_pem()),
        Rotation::Root if now.list.len() >= ROOTS_MAX => Err(MeshError::Refused(format!(
            "{ROOTS_MAX} roots are believed already (ROOTS_MAX): forget those that sign no more first"
        ))),
        Rotation::Root => {
            let (root, key) = self_signed(&now.trust_domain)?;
            // Believed before it signs: whoever stops in between leaves a mesh that works.
            dir.replace(ROOTS, &format!("{root}{}", pem(&now.list)))?;
            dir.replace(KEY, &key)
        }
        Rotation::Forget if !now.intermediates.is_empty() => Err(MeshError::Refused(format!(
            "no root signs, but an intermediate in {CHAIN}: take out of {ROOTS} by hand what is to be forgotten"
        ))),
        Rotation::Forget => dir.replace(ROOTS, &pem(now.list.get(..1).unwrap_or_default())),
    }
}

fn make(dir: &MeshDir) -> Result<(), MeshError> {
    let trust_domain = format!("{}.embedded", random_uuid()?);
    let (root, key) = self_signed(&trust_domain)?;
    let mesh = serde_json::to_string(&MeshFile {
        version: VERSION,
        trust_domain,
    })
    .map_err(|error| broken("mesh.json", error))?;
    dir.replace(KEY, &key)?;
    dir.replace(ROOTS, &root)?;
    dir.replace("mesh.json", &mesh)
}

/// A root and its key, both in PEM.
fn self_signed(trust_domain: &str) -> Result<(String, String), MeshError> {
    let sign = || {
        let key = KeyPair::generate()?;
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("meshx {trust_domain}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!(
            "spiffe://{trust_domain}"
        ))?)];
        params.not_before = now - BACKDATE;
        params.not_after = now + Duration::days(AUTHORITY_DAYS);
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    sign().map_err(|error: rcgen::Error| broken(ROOTS, error))
}

fn version(dir: &MeshDir) -> [Stamp; 3] {
    [ROOTS, KEY, CHAIN].map(|name| dir.stamp(name))
}

fn certificates(file: &str, pem: &str, max: usize) -> Result<Vec<CertificateDer<'static>>, MeshError> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match list.map_err(|error| broken(file, error))? {
        list if (1..=max).contains(&list.len()) => Ok(list),
        list => Err(broken(
            file,
            format!("{} certificates, wanted 1 to {max}", list.len()),
        )),
    }
}

/// Whether this is the certificate of the key.
fn is_of(root: &CertificateDer<'_>, key: &KeyPair) -> bool {
    X509Certificate::from_der(root)
        .is_ok_and(|(_, root)| root.public_key().raw == key.subject_public_key_info())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    // For people who look at a certificate; nothing is decided by it. RFC 5280 allows 64 characters.
    dn.push(DnType::CommonName, name.get(..64).unwrap_or(name));
    dn
}

/// A version 4 UUID (RFC 9562 section 5.4).
fn random_uuid() -> Result<String, MeshError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| broken("trust domain", error))?;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76 | 0b11 << 62) | 4 << 76 | 0b10 << 62;
    let hex = format!("{number:032x}");
    let (a, rest) = hex.split_at(8);
    let (b, rest) = rest.split_at(4);
    let (c, rest) = rest.split_at(4);
    let (d, e) = rest.split_at(4);
    Ok(format!("{a}-{b}-{c}-{d}-{e}"))
}

fn broken(what: &str, error: impl std::fmt::Display) -> MeshError {
    MeshError::Unavailable(format!("{what}: {error}"))
}

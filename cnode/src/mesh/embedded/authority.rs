//! The mesh's own certificate authority.

use std::sync::Arc;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

use super::dir::MeshDir;
use crate::mesh::{Identity, MeshError, ServiceName, SpiffeId};

/// How long a leaf is valid, in hours; Consul's default.
const LEAF_HOURS: i64 = 72;
/// A leaf is made anew when less than this of its life is left, in hours.
const RENEW_HOURS: i64 = 24;
/// How long the authority is valid, in days.
const AUTHORITY_DAYS: i64 = 3650;
/// Validity starts this much before now, for clocks that differ.
const BACKDATE: Duration = Duration::minutes(5);
/// Version of `mesh.json`.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeshFile {
    version: u32,
    trust_domain: String,
}

/// Signs leaf certificates for one trust domain.
pub(super) struct Authority {
    trust_domain: String,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
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
        let missing = |name: &str| MeshError::Unavailable(format!("{} is gone", dir.join(name).display()));
        let read = |name: &str| dir.read(name)?.ok_or_else(|| missing(name));
        let mesh: MeshFile = serde_json::from_str(&read("mesh.json")?)
            .map_err(|error| MeshError::Unavailable(format!("mesh.json: {error}")))?;
        if mesh.version != VERSION {
            return Err(MeshError::Refused(format!(
                "the mesh has version {}, this program knows {VERSION}: use the program that made it, or another directory",
                mesh.version
            )));
        }
        let (cert, key) = (read("ca.pem")?, read("ca.key")?);
        let key = KeyPair::from_pem(&key).map_err(|error| broken("ca.key", error))?;
        let issuer = Issuer::from_ca_cert_pem(&cert, key).map_err(|error| broken("ca.pem", error))?;
        let root =
            CertificateDer::from_pem_slice(cert.as_bytes()).map_err(|error| broken("ca.pem", error))?;
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).map_err(|error| broken("ca.pem", error))?;
        Ok(Self {
            trust_domain: mesh.trust_domain,
            issuer,
            root,
            roots: Arc::new(roots),
        })
    }

    pub(super) fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The authority's own certificate.
    pub(super) fn root(&self) -> &CertificateDer<'static> {
        &self.root
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
        Ok(Identity {
            id,
            chain: vec![leaf],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)),
            roots: self.roots.clone(),
            not_after,
        })
    }
}

/// Whether a leaf can still be handed out. One that has more than its whole life before it was made when the
/// clock was ahead: it is not valid yet.
pub(super) fn is_fresh(leaf: &Identity, now: i64) -> bool {
    let left = leaf.not_after - now;
    left > RENEW_HOURS * 3600 && left < LEAF_HOURS * 3600 + BACKDATE.whole_seconds()
}

fn make(dir: &MeshDir) -> Result<(), MeshError> {
    let trust_domain = format!("{}.embedded", random_uuid()?);
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
    let (cert, key) = sign().map_err(|error: rcgen::Error| broken("ca.pem", error))?;
    let mesh = serde_json::to_string(&MeshFile {
        version: VERSION,
        trust_domain,
    })
    .map_err(|error| broken("mesh.json", error))?;
    dir.replace("ca.key", &key)?;
    dir.replace("ca.pem", &cert)?;
    dir.replace("mesh.json", &mesh)
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

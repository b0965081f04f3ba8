//! Certificate authorities of tests: one that Consul's HTTPS believes, one that is Connect's, or nobody's.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::{Context, Result};

/// Signs whatever a test asks it to.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct Leaf {
    names: Vec<SanType>,
    /// From now; may be in the past.
    valid: Duration,
}

impl Leaf {
    /// For a server at this address.
    pub fn server(ip: Ipv4Addr) -> Self {
        Self {
            names: vec![SanType::IpAddress(IpAddr::V4(ip))],
            valid: Duration::days(1),
        }
    }

    /// For a client without a name.
    pub fn client() -> Self {
        Self {
            names: Vec::new(),
            valid: Duration::days(1),
        }
    }

    /// For a service of a mesh, by its SPIFFE name.
    ///
    /// # Errors
    /// When the name is not ASCII.
    pub fn spiffe(uri: &str) -> Result<Self> {
        let uri = Ia5String::try_from(uri).context("a SPIFFE name")?;
        Ok(Self {
            names: vec![SanType::URI(uri)],
            valid: Duration::days(1),
        })
    }

    /// One whose validity is over for an hour.
    #[must_use]
    pub fn expired(mut self) -> Self {
        self.valid = Duration::hours(-1);
        self
    }
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate().context("make a key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let certificate = params.self_signed(&key).context("sign an authority")?;
        Ok(Self {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Its own certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its key, PKCS #8.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A certificate and its key, both in PEM.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn sign(&self, leaf: &Leaf) -> Result<(String, String)> {
        let key = KeyPair::generate().context("make a key")?;
        let mut params = CertificateParams::default();
        params.subject_alt_names.clone_from(&leaf.names);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = OffsetDateTime::now_utc() - Duration::days(2);
        params.not_after = OffsetDateTime::now_utc() + leaf.valid;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .context("sign a certificate")?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Signs, and writes `ca.pem`, `NAME.pem` and `NAME.key` into `dir`.
    ///
    /// # Errors
    /// When it cannot be signed or written.
    pub fn write_pair(&self, dir: &Path, name: &str, leaf: &Leaf) -> Result<()> {
        let (certificate, key) = self.sign(leaf)?;
        for (file, text) in [
            ("ca.pem".to_owned(), self.pem()),
            (format!("{name}.pem"), &certificate),
            (format!("{name}.key"), &key),
        ] {
            std::fs::write(dir.join(&file), text).context(file)?;
        }
        Ok(())
    }
}

/// A certificate that Consul gave to a service, in PEM.
#[derive(Clone)]
pub struct Issued {
    /// The leaf and what is needed to reach a root.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The SPIFFE name in it.
    pub uri: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued")
            .field("uri", &self.uri)
            .finish_non_exhaustive()
    }
}

impl super::Consul {
    /// The current certificate of `service`, asked for with this token (with ACLs: the management token unless given).
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn leaf(&self, token: Option<&str>, service: &str) -> Result<Issued> {
        let leaf = self.get_as(token, &format!("/v1/agent/connect/ca/leaf/{service}"))?;
        let text = |field: &str| {
            let value = leaf[field].as_str().map(str::to_owned);
            value.ok_or_else(|| format!("a leaf without {field}"))
        };
        Ok(Issued {
            certificate: text("CertPEM")?,
            key: text("PrivateKeyPEM")?,
            uri: text("ServiceURI")?,
        })
    }

    /// All roots of Connect, in PEM.
    ///
    /// # Errors
    /// When Consul does not answer.
    pub fn root_pem(&self) -> Result<String> {
        let roots = self.get("/v1/connect/ca/roots")?;
        let all = roots["Roots"].as_array().into_iter().flatten();
        Ok(all.filter_map(|root| root["RootCert"].as_str()).collect())
    }
}

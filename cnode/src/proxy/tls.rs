//! Mutual TLS: who is shown, and who is believed.
//!
//! TLS 1.3 between agents. Data planes of another make get TLS 1.2 as well, since Envoy's default as a client is that and
//! no more (Envoy: `tls_maximum_protocol_version`). Both sides have a certificate. A resumed session would skip the
//! look at the peer's certificate, so there is no resumption and no early data. Identity is the one SPIFFE URI of a
//! leaf; names in CN or DNS entries count for nothing. The provider is named here, whatever the process default is.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError,
    RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, Validity, X509Certificate};

use super::cause::{Cause, Refusal};
use crate::mesh::{Identity, Protocol, SpiffeId};

/// The protocol between agents (RFC 7301 name).
pub(super) const ALPN: &[u8] = b"meshx/1";
/// What Consul's built-in proxy offers, and nothing else, whatever its service speaks.
const ALPN_CONNECT: &[u8] = b"h2";

/// Between agents.
static VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13];
/// With others.
static VERSIONS_CONNECT: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

/// Versions of TLS with a peer that speaks this.
fn versions(protocol: Protocol) -> &'static [&'static SupportedProtocolVersion] {
    match protocol {
        Protocol::Meshx => VERSIONS,
        Protocol::Connect => VERSIONS_CONNECT,
    }
}

/// What a client speaks who offers these names by ALPN: an agent always says so.
pub(super) fn offered<'a>(mut alpn: impl Iterator<Item = &'a [u8]>) -> Protocol {
    match alpn.any(|name| name == ALPN) {
        true => Protocol::Meshx,
        false => Protocol::Connect,
    }
}

/// Who the other end is, by a chain that was verified.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// The leaf's one identity.
    pub(super) id: SpiffeId,
    /// Begin of the leaf's validity, unix seconds.
    pub(super) not_before: i64,
    /// Its end.
    pub(super) not_after: i64,
    /// The leaf, then the intermediates.
    pub(super) chain: Arc<[CertificateDer<'static>]>,
}

impl Peer {
    /// Who showed this chain.
    ///
    /// # Errors
    /// [`LeafError`].
    pub(super) fn of(chain: &[CertificateDer<'static>], trust_domain: &str) -> Result<Self, LeafError> {
        let leaf = chain.first().ok_or(LeafError::Unreadable)?;
        let (id, validity) = named(leaf, trust_domain)?;
        Ok(Self {
            id,
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            chain: chain.into(),
        })
    }

    /// Whether its chain led to one of these roots at that moment (unix seconds). `dialled`: it was the server.
    pub(super) fn leads_to(&self, roots: &Arc<RootCertStore>, at: i64, dialled: bool) -> bool {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at.unsigned_abs()));
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return false;
        };
        let provider = provider();
        if dialled {
            let algorithms = provider.signature_verification_algorithms.all;
            return ParsedCertificate::try_from(leaf).is_ok_and(|leaf| {
                verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, at, algorithms).is_ok()
            });
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider).build();
        verifier.is_ok_and(|verifier| verifier.verify_client_cert(leaf, intermediates, at).is_ok())
    }
}

/// Why a leaf names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum LeafError {
    /// Not an X.509 certificate.
    #[error("the leaf is no X.509 certificate")]
    Unreadable,
    /// Not exactly one URI among its names.
    #[error("the leaf has {0} URI names, wanted one")]
    UriCount(usize),
    /// The URI is not a service's SPIFFE id.
    #[error(transparent)]
    Name(#[from] crate::mesh::NameError),
    /// Another mesh's identity.
    #[error("the leaf is of trust domain {seen:?}, wanted {wanted:?}")]
    TrustDomain {
        /// What it says.
        seen: String,
        /// Ours.
        wanted: String,
    },
    /// Not the service that was dialled.
    #[error("the leaf names {seen}, wanted {wanted}")]
    Service {
        /// What it says.
        seen: String,
        /// Whom we dialled.
        wanted: String,
    },
}

impl LeafError {
    fn cause(&self) -> Cause {
        match self {
            Self::TrustDomain { .. } => Cause::WrongTrustDomain,
            Self::Service { .. } => Cause::WrongService,
            Self::Unreadable | Self::UriCount(_) | Self::Name(_) => Cause::CertificateInvalid,
        }
    }
}

impl From<LeafError> for Refusal {
    fn from(error: LeafError) -> Self {
        error.cause().because(error.to_string())
    }
}

/// Reads the identity that a leaf names, and when it is valid. Its chain is verified elsewhere.
fn named(leaf: &CertificateDer<'_>, trust_domain: &str) -> Result<(SpiffeId, Validity), LeafError> {
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| LeafError::Unreadable)?;
    // The parser refuses a certificate with two extensions of this kind.
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| LeafError::Unreadable)?;
    let names = names
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris.as_slice() else {
        return Err(LeafError::UriCount(uris.len()));
    };
    let id: SpiffeId = uri.parse()?;
    if id.trust_domain() != trust_domain {
        return Err(LeafError::TrustDomain {
            seen: id.trust_domain().to_owned(),
            wanted: trust_domain.to_owned(),
        });
    }
    Ok((id, certificate.validity().clone()))
}

/// How an agent answers for one of its services.
///
/// # Errors
/// When key, chain and roots do not go together.
pub(super) fn server_config(identity: &Identity, protocol: Protocol) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots.clone(), provider.clone())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions(protocol))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    let alpn = match protocol {
        Protocol::Meshx => ALPN,
        Protocol::Connect => ALPN_CONNECT,
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(restrict(config))
}

/// How an agent answers for a service that it does not serve: with an alert.
///
/// # Errors
/// Only if the provider lacked TLS 1.3.
pub(super) fn no_server_config() -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(Protocol::Connect))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(NoCertificate));
    Ok(restrict(config))
}

fn restrict(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// How an agent dials `target` with the identity of one of its services. Who does not speak meshx is offered no name
/// by ALPN: Consul's built-in proxy and Envoy take that.
///
/// # Errors
/// When key and chain do not go together.
pub(super) fn client_config(
    identity: &Identity,
    target: SpiffeId,
    protocol: Protocol,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let verifier = Arc::new(ExactSpiffe {
        target,
        roots: identity.roots.clone(),
        provider: provider.clone(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions(protocol))?
        .dangerous() // means "a verifier of your own": ours checks the chain as usual, then the exact SPIFFE id
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    if protocol == Protocol::Meshx {
        config.alpn_protocols = vec![ALPN.to_vec()];
    }
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// The cause behind a TLS fault, as the side sees it that got the error.
pub(super) fn refusal(error: &std::io::Error) -> Refusal {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return Cause::Unreachable.because(error.to_string());
    };
    match tls {
        Error::InvalidCertificate(fault) => certificate_refusal(fault),
        Error::NoCertificatesPresented => Cause::NoCertificate.because("the peer shows no certificate"),
        Error::AlertReceived(alert) => alert_refusal(*alert),
        Error::NoApplicationProtocol | Error::PeerIncompatible(_) => no_common_protocol(&tls.to_string()),
        other => Cause::InvalidRequest.because(format!("TLS: {other}")),
    }
}

/// The refusal that a TLS alert tells of, when a connection ended with one that is about our certificate. A foreign
/// server tells only so that it does not believe us, after its handshake is done for us (RFC 8446 section 4.4.2.4).
pub(super) fn late_refusal(error: &std::io::Error) -> Option<Refusal> {
    let tls = error.get_ref()?.downcast_ref::<Error>()?;
    match tls {
        Error::AlertReceived(alert) => Some(alert_refusal(*alert)),
        _ => None,
    }
}

/// Why this side does not believe a certificate.
fn certificate_refusal(fault: &CertificateError) -> Refusal {
    use CertificateError as E;
    let cause = match fault {
        E::Other(OtherError(inner)) => match inner.downcast_ref::<LeafError>() {
            Some(leaf) => return leaf.clone().into(),
            None => Cause::CertificateInvalid,
        },
        // A root of the right name with another key signs badly.
        E::UnknownIssuer | E::BadSignature => Cause::UnknownAuthority,
        E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. } => {
            Cause::CertificateExpired
        }
        _ => Cause::CertificateInvalid,
    };
    cause.because(format!("the peer's certificate: {fault}"))
}

/// Why the other side does not go on, as far as it tells (RFC 8446 section 6.2).
fn alert_refusal(alert: AlertDescription) -> Refusal {
    use AlertDescription as A;
    let cause = match alert {
        A::AccessDenied | A::UnrecognisedName => {
            return Cause::Unreachable.because("the other agent does not serve this service now");
        }
        A::UnknownCA | A::DecryptError => Cause::UnknownAuthority,
        A::CertificateExpired => Cause::CertificateExpired,
        A::CertificateRequired => Cause::NoCertificate,
        A::BadCertificate | A::UnsupportedCertificate | A::CertificateRevoked | A::CertificateUnknown => {
            Cause::CertificateInvalid
        }
        A::NoApplicationProtocol | A::ProtocolVersion | A::HandshakeFailure => {
            return no_common_protocol(&format!("{alert:?}"));
        }
        other => {
            return Cause::InvalidRequest.because(format!("TLS: the other side sent the alert {other:?}"));
        }
    };
    cause.because(format!("the other side does not take our certificate: {alert:?}"))
}

fn no_common_protocol(seen: &str) -> Refusal {
    Cause::VersionMismatch.because(format!(
        "no common protocol, wanted meshx/1 over TLS 1.3 between agents, h2 or no name by ALPN over TLS 1.2 or 1.3 from others: {seen}"
    ))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Believes a server whose chain holds and whose leaf names exactly the service that was dialled.
#[derive(Debug)]
struct ExactSpiffe {
    target: SpiffeId,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ExactSpiffe {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let (seen, _) = named(end_entity, self.target.trust_domain()).map_err(not_named)?;
        if seen != self.target {
            return Err(not_named(LeafError::Service {
                seen: seen.to_string(),
                wanted: self.target.to_string(),
            }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn not_named(error: LeafError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

//! TLS between agents: who is shown, and who is believed.
//!
//! TLS 1.3 only, both sides with a certificate. A resumed session would skip the look at the peer's
//! certificate, so there is no resumption and no early data. Identity is the one SPIFFE URI of a leaf; names
//! in CN or DNS entries count for nothing. The provider is named here, whatever the process default is.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::cause::{Cause, Refusal};
use crate::mesh::{Identity, SpiffeId};

/// The protocol between agents (RFC 7301 name).
pub(super) const ALPN: &[u8] = b"meshx/1";

/// What a verified leaf says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    /// Its one identity.
    pub(super) id: SpiffeId,
    /// End of its validity, unix seconds.
    pub(super) not_after: i64,
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

/// Reads the identity that a leaf names. Its chain is verified elsewhere.
///
/// # Errors
/// [`LeafError`].
pub(super) fn peer(leaf: &CertificateDer<'_>, trust_domain: &str) -> Result<Peer, LeafError> {
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
    Ok(Peer {
        id,
        not_after: certificate.validity().not_after.timestamp(),
    })
}

/// How an agent answers for one of its services.
///
/// # Errors
/// When key, chain and roots do not go together.
pub(super) fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots.clone(), provider.clone())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    Ok(restrict(config))
}

/// How an agent answers for a service that it does not serve: with an alert.
///
/// # Errors
/// Only if the provider lacked TLS 1.3.
pub(super) fn no_server_config() -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(NoCertificate));
    Ok(restrict(config))
}

fn restrict(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// How an agent dials `target` with the identity of one of its services.
///
/// # Errors
/// When key and chain do not go together.
pub(super) fn client_config(identity: &Identity, target: SpiffeId) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let verifier = Arc::new(ExactSpiffe {
        target,
        roots: identity.roots.clone(),
        provider: provider.clone(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous() // means "a verifier of your own": ours checks the chain as usual, then the exact SPIFFE id
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
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
        Error::InvalidCertificate(_)
        | Error::NoCertificatesPresented
        | Error::InvalidCertRevocationList(_) => Cause::CertificateInvalid.because(describe(tls)),
        Error::AlertReceived(AlertDescription::AccessDenied | AlertDescription::UnrecognisedName) => {
            Cause::Unreachable.because("the other agent does not serve this service now")
        }
        Error::AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            | AlertDescription::DecryptError),
        ) => Cause::CertificateInvalid.because(format!("the other agent refused our certificate: {alert:?}")),
        Error::AlertReceived(
            alert @ (AlertDescription::NoApplicationProtocol | AlertDescription::ProtocolVersion),
        )
        | Error::AlertReceived(alert @ AlertDescription::HandshakeFailure) => Cause::VersionMismatch.because(
            format!("the other side does not speak meshx/1 over TLS 1.3: {alert:?}"),
        ),
        Error::NoApplicationProtocol | Error::PeerIncompatible(_) => Cause::VersionMismatch.because(format!(
            "the other side does not speak meshx/1 over TLS 1.3: {tls}"
        )),
        other => Cause::InvalidRequest.because(format!("TLS: {other}")),
    }
}

fn describe(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.to_string(),
        other => other.to_string(),
    }
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
        let seen = peer(end_entity, self.target.trust_domain()).map_err(not_named)?;
        if seen.id != self.target {
            return Err(not_named(LeafError::Service {
                seen: seen.id.to_string(),
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

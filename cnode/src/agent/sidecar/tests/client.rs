//! Clients of an Envoy that prove themselves as a test wants.

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{io::AsyncReadExt, net::TcpStream, time::Instant};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    envoy::{ENVOY_TIME, GREETING},
    *,
};
use crate::mesh::Identity;

/// Believes any server: these clients test what the server believes.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// A client with this certificate, or none.
pub(super) struct Client(TlsConnector);

impl Client {
    pub(super) fn new(identity: Option<&Identity>) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer));
        let config = match identity {
            Some(identity) => config
                .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        Self(TlsConnector::from(Arc::new(config)))
    }

    /// Shakes hands. With TLS 1.3 a client may be done before the server has refused it.
    pub(super) async fn connect(&self, at: SocketAddr) -> Result<TlsStream<TcpStream>, String> {
        let stream = TcpStream::connect(at).await.map_err(|error| error.to_string())?;
        let connecting = self.0.connect(ServerName::try_from("any").unwrap(), stream);
        soon("a handshake", connecting)
            .await
            .map_err(|error| error.to_string())
    }

    /// Connects and waits for the application's greeting.
    pub(super) async fn dial(&self, at: SocketAddr) -> Result<TlsStream<TcpStream>, String> {
        let mut stream = self.connect(at).await?;
        let mut greeting = [0; GREETING.len()];
        let read = soon("a greeting", stream.read_exact(&mut greeting)).await;
        read.map(|_| stream).map_err(|error| error.to_string())
    }

    /// The certificate that is shown there.
    pub(super) async fn leaf_of(&self, at: SocketAddr) -> Vec<u8> {
        let stream = loop {
            let began = Instant::now();
            match self.dial(at).await {
                Ok(stream) => break stream,
                Err(error) => assert!(began.elapsed() >= ENVOY_TIME, "a new connection failed: {error}"),
            }
        };
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }
}

/// A leaf that names this URI, signed by this authority.
pub(super) fn leaf(of: &World, authority: &World, uri: &str) -> Identity {
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType, string::Ia5String};
    let read = |name: &str| fs::read_to_string(authority.temp.path().join("mesh").join(name)).unwrap();
    let issuer =
        Issuer::from_ca_cert_pem(&read("ca.pem"), KeyPair::from_pem(&read("ca.key")).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = uri
        .split(' ')
        .map(|uri| SanType::URI(Ia5String::try_from(uri).unwrap()))
        .collect();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let leaf = params.signed_by(&key, &issuer).unwrap();
    Identity {
        id: uri
            .parse()
            .unwrap_or_else(|_| of.mesh.spiffe(&service("any")).unwrap()),
        chain: vec![leaf.der().clone()],
        key: rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        roots: Arc::new(RootCertStore::empty()),
        not_after: 0,
    }
}

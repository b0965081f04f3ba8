//! TLS ends that show whatever certificate they are given and believe everybody: for what must not be believed.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    ServerConnection, SignatureScheme, StreamOwned,
};

use crate::{Context, Result};

const SOON: Duration = Duration::from_secs(20);

/// A certificate chain and its key, in PEM.
pub type Pair = (String, String);

/// A TLS connection.
pub type Stream = StreamOwned<ClientConnection, TcpStream>;

/// Connects with TLS 1.3. The handshake is not awaited: with TLS 1.3 a client learns what the server thinks of its
/// certificate only when it reads.
///
/// # Errors
/// When the address does not answer, or the certificate cannot be used.
pub fn dial(address: SocketAddr, sni: &str, alpn: &[&str], identity: Option<&Pair>) -> Result<Stream> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("TLS 1.3")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match identity {
        Some(identity) => {
            let (chain, key) = read(identity)?;
            config
                .with_client_auth_cert(chain, key)
                .context("a client's certificate")?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(sni.to_owned()).context("a server name")?;
    let connection = ClientConnection::new(Arc::new(config), name).context("TLS")?;
    let stream = TcpStream::connect_timeout(&address, SOON).context(format_args!("connect to {address}"))?;
    stream.set_read_timeout(Some(SOON)).context("a timeout")?;
    Ok(StreamOwned::new(connection, stream))
}

/// Sends bytes and waits for as many: an error when the other side ends the connection instead.
///
/// # Errors
/// What TLS or TCP said.
pub fn exchange(stream: &mut Stream, bytes: &[u8]) -> Result<Vec<u8>> {
    stream
        .write_all(bytes)
        .and_then(|()| stream.flush())
        .context("send")?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).context("receive")?;
    Ok(back)
}

/// Starts a server on a free port that gives every byte back. It asks for a certificate and takes any. It ends with
/// the test.
///
/// # Errors
/// When the certificate cannot be used.
pub fn echo_server(ip: impl Into<IpAddr>, identity: &Pair) -> Result<SocketAddr> {
    let (chain, key) = read(identity)?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS")?
        .with_client_cert_verifier(Arc::new(Anybody))
        .with_single_cert(chain, key)
        .context("a server's certificate")?;
    let config = Arc::new(config);
    let listener = TcpListener::bind((ip.into(), 0)).context("bind a TLS server")?;
    let address = listener.local_addr().context("its address")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = config.clone();
            std::thread::spawn(move || {
                let Ok(connection) = ServerConnection::new(config) else {
                    return;
                };
                let mut tls = StreamOwned::new(connection, stream);
                let mut buffer = [0; 16_384];
                while let Ok(n @ 1..) = tls.read(&mut buffer) {
                    if tls.write_all(&buffer[..n]).and_then(|()| tls.flush()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(address)
}

fn read((chain, key): &Pair) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<std::result::Result<_, _>>()
        .context("a chain")?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("a key")?;
    Ok((chain, key))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Believes everybody.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

//! HTTPS to Consul: whom to believe and what to show. Other certificates than those of the mesh.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::settings::TlsFiles;

/// Largest file of certificates that is read, in bytes.
const PEM_FILE_MAX: u64 = 4 << 20;
/// Most files of a directory of authorities that are read.
const CA_FILES_MAX: usize = 1024;
/// Where systems keep their authorities, in one file: Debian, Red Hat, Alpine and BSD.
const SYSTEM_CA_FILES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// A TLS client that believes these authorities, by the ring provider whatever the process default is.
///
/// # Errors
/// The file that cannot be used, and why.
pub(super) fn client_config(files: &TlsFiles) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?
        .with_root_certificates(authorities(files)?);
    let Some((certificate, key)) = &files.client else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate)?;
    let pem = read_file(key, PEM_FILE_MAX).map_err(|error| fault(key, error))?;
    let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| fault(key, error))?;
    builder
        .with_client_auth_cert(chain, private)
        .map_err(|error| fault(certificate, error))
}

/// One that is never used for HTTPS.
pub(super) fn no_client_config() -> Result<ClientConfig, String> {
    Ok(
        ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth(),
    )
}

fn authorities(files: &TlsFiles) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    let mut named: Vec<PathBuf> = files.ca_file.iter().cloned().collect();
    if let Some(dir) = &files.ca_path {
        let entries = std::fs::read_dir(dir).map_err(|error| fault(dir, error))?;
        for entry in entries.take(CA_FILES_MAX) {
            let path = entry.map_err(|error| fault(dir, error))?.path();
            if path.is_file() {
                named.push(path);
            }
        }
    }
    if named.is_empty() {
        let system = SYSTEM_CA_FILES.iter().map(Path::new).find(|path| path.is_file());
        let system = system
            .ok_or("this system has no file of certificate authorities: name one with --consul-ca-file")?;
        // A system's list may hold what this program cannot read.
        store.add_parsable_certificates(certificates(system)?);
        return Ok(store);
    }
    for path in named {
        for certificate in certificates(&path)? {
            store.add(certificate).map_err(|error| fault(&path, error))?;
        }
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read_file(path, PEM_FILE_MAX).map_err(|error| fault(path, error))?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all.map_err(|error| fault(path, error))? {
        none if none.is_empty() => Err(fault(path, "there is no certificate in it, wanted PEM")),
        some => Ok(some),
    }
}

fn fault(path: &Path, error: impl std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

/// Reads a whole file of at most `max` bytes.
pub(super) fn read_file(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > max {
        return Err(io::Error::other(format!("more than {max} bytes")));
    }
    Ok(content)
}

//! HTTPS with an authority of one's own and certificates on both sides, and a Unix socket.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use meshx::mesh::consul::{ConsulArgs, ConsulFile, ConsulSettings};
use meshx::mesh::{Certificates, Diagnosis, MeshError, Registration};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::support::{Consul, Ports, node, open, ready, service, until};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
    name: &'static str,
}

impl Authority {
    fn new(dir: &Path, name: &'static str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        std::fs::write(dir.join(format!("{name}.pem")), &pem).unwrap();
        Self {
            issuer: Issuer::from_ca_cert_pem(&pem, key).unwrap(),
            dir: dir.to_owned(),
            name,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(format!("{}.pem", self.name))
    }

    /// A certificate and its key, in files.
    fn issue(&self, name: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let paths = (
            self.dir.join(format!("{name}.crt")),
            self.dir.join(format!("{name}.key")),
        );
        std::fs::write(&paths.0, certificate).unwrap();
        std::fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }
}

async fn https(authority: &Authority, names: &[&str]) -> (Consul, u16) {
    let ports = Ports::take();
    let port = ports.https();
    let (certificate, key) = authority.issue("server", names);
    let config = json!({
        "ports": { "https": port }, "ca_file": authority.path(), "cert_file": certificate, "key_file": key,
        "verify_incoming_https": true,
    });
    (Consul::start_at(ports, &["-dev"], config).await, port)
}

fn settings(env: &[(&str, &Path)], port: u16, more: ConsulArgs) -> Result<ConsulSettings, Vec<String>> {
    let args = ConsulArgs {
        consul_addr: Some(format!("https://127.0.0.1:{port}")),
        ..more
    };
    ConsulSettings::read(args, ConsulFile::default(), |wanted| {
        let found = env.iter().find(|(name, _)| *name == wanted);
        found.map(|(_, value)| OsString::from(value))
    })
}

async fn refused(settings: ConsulSettings, why: &str) {
    let mesh = open(settings, "x", &["x"]);
    let error = mesh.register(&node("x", "shop@x")).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::Unavailable(text) if text.contains(why)),
        "{why}: {error:?}"
    );
}

#[tokio::test]
async fn both_sides_prove_themselves() {
    let temp = tempfile::tempdir().unwrap();
    let (ours, other) = (
        Authority::new(temp.path(), "ours"),
        Authority::new(temp.path(), "other"),
    );
    let (_consul, port) = https(&ours, &["127.0.0.1"]).await;
    let (certificate, key) = ours.issue("client", &["meshx"]);
    let (ca, none) = (ours.path(), ConsulArgs::default);
    let good: &[(&str, &Path)] = &[
        ("CONSUL_CACERT", &ca),
        ("CONSUL_CLIENT_CERT", &certificate),
        ("CONSUL_CLIENT_KEY", &key),
    ];
    let mesh = open(settings(good, port, none()).unwrap(), "a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();

    let no_certificate = settings(&[("CONSUL_CACERT", &ca)], port, none()).unwrap();
    refused(no_certificate, "ertificate").await;
    let other_ca = other.path();
    let wrong_authority: &[(&str, &Path)] = &[("CONSUL_CACERT", &other_ca), good[1], good[2]];
    refused(
        settings(wrong_authority, port, none()).unwrap(),
        "invalid peer certificate",
    )
    .await;
    let (stranger, stranger_key) = other.issue("stranger", &["meshx"]);
    let stranger: &[(&str, &Path)] = &[
        good[0],
        ("CONSUL_CLIENT_CERT", &stranger),
        ("CONSUL_CLIENT_KEY", &stranger_key),
    ];
    refused(settings(stranger, port, none()).unwrap(), "ertificate").await;
    // The system's authorities do not stand in for one that was not named.
    if let Ok(system) = settings(&good[1..], port, none()) {
        refused(system, "invalid peer certificate").await;
    }
    let mixed: &[(&str, &Path)] = &[good[0], good[1], ("CONSUL_CLIENT_KEY", &stranger_key)];
    assert!(
        settings(mixed, port, none()).is_err(),
        "a key of another certificate"
    );
    let bad = open(settings(good, port, none()).unwrap(), "b", &["h2"])
        .findings()
        .await;
    assert!(bad.iter().any(|finding| finding.what == "leader"), "{bad:?}");
}

#[tokio::test]
async fn a_server_name_that_is_not_the_addresss() {
    let temp = tempfile::tempdir().unwrap();
    let ours = Authority::new(temp.path(), "ours");
    let (_consul, port) = https(&ours, &["server.dc1.consul"]).await;
    let (certificate, key) = ours.issue("client", &["meshx"]);
    let ca = ours.path();
    let files: &[(&str, &Path)] = &[
        ("CONSUL_CACERT", &ca),
        ("CONSUL_CLIENT_CERT", &certificate),
        ("CONSUL_CLIENT_KEY", &key),
    ];
    refused(
        settings(files, port, ConsulArgs::default()).unwrap(),
        "not valid for name",
    )
    .await;
    let named = |name: &str| ConsulArgs {
        consul_tls_server_name: Some(name.to_owned()),
        ..ConsulArgs::default()
    };
    refused(
        settings(files, port, named("other.dc1.consul")).unwrap(),
        "not valid for name",
    )
    .await;
    let mesh = open(
        settings(files, port, named("server.dc1.consul")).unwrap(),
        "a",
        &["h1"],
    );
    mesh.register(&node("a", "shop@h1")).await.unwrap();
}

#[tokio::test]
async fn a_client_certificate_that_is_replaced_is_used() {
    let temp = tempfile::tempdir().unwrap();
    let (ours, other) = (
        Authority::new(temp.path(), "ours"),
        Authority::new(temp.path(), "other"),
    );
    let (_consul, port) = https(&ours, &["127.0.0.1"]).await;
    let (certificate, key) = other.issue("client", &["meshx"]);
    let ca = ours.path();
    let files: &[(&str, &Path)] = &[
        ("CONSUL_CACERT", &ca),
        ("CONSUL_CLIENT_CERT", &certificate),
        ("CONSUL_CLIENT_KEY", &key),
    ];
    let mesh = open(
        settings(files, port, ConsulArgs::default()).unwrap(),
        "a",
        &["h1"],
    );
    assert!(mesh.register(&node("a", "shop@h1")).await.is_err());
    ours.issue("client", &["meshx"]);
    until("the new certificate", || async {
        mesh.register(&node("a", "shop@h1")).await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_unix_socket_is_an_address() {
    let temp = tempfile::Builder::new().prefix("mxu").tempdir_in("/tmp").unwrap();
    let socket = temp.path().join("consul.sock");
    let addresses = json!({ "addresses": { "http": format!("127.0.0.1 unix://{}", socket.display()) } });
    let consul = Consul::start(&["-dev"], addresses).await;
    let settings = ConsulSettings::plain(&format!("unix://{}", socket.display()), None).unwrap();
    let mesh = open(settings, "a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    assert!(consul.entry("shop@h1").await.is_some());
}

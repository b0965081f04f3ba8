//! An authority whose root signs no leaves: they come with an intermediate, at every handshake and every re-proof.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::time::Duration;

use meshx_tests::control::Control;
use meshx_tests::{EchoClient, EchoServer, Mesh, wait_until};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

const SOON: Duration = Duration::from_secs(30);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

/// Puts an authority of our own in the place of the mesh's: a root, and what signs below it.
fn import(dir: &Path) {
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        (params, KeyPair::generate().unwrap())
    };
    let (root, root_key) = authority("root");
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let (middle, key) = authority("middle");
    let middle_pem = middle
        .signed_by(&key, &Issuer::new(root, root_key))
        .unwrap()
        .pem();
    for (name, text) in [
        ("ca.chain.pem", middle_pem),
        ("ca.pem", root_pem),
        ("ca.key", key.serialize_pem()),
    ] {
        // As a whole, as everybody who follows expects.
        let next = dir.join(format!("{name}.next"));
        std::fs::write(&next, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&next, mode).unwrap();
        std::fs::rename(next, dir.join(name)).unwrap();
    }
}

#[test]
fn leaves_with_an_intermediate_make_links_and_prove_them_anew() {
    let mesh = Mesh::new().unwrap();
    drop(mesh.agent("a", "127.0.0.2", &["h1"]).unwrap());
    import(&mesh.mesh_dir());
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &METRICS).unwrap();
    let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &METRICS).unwrap();
    let echo = EchoServer::start([127, 0, 0, 1]).unwrap();
    let (server, client) = (Control::connect(&h2).unwrap(), Control::connect(&h1).unwrap());
    server.serve("echo", echo.address(), vec![]).unwrap();
    let address = client.reach("echo", "web", vec![]).unwrap();
    let mut link = EchoClient::connect(address, SOON).unwrap();
    link.say(b"through the root").unwrap();
    for round in 1..=2 {
        h1.meshx_ok(&["rotate"]).unwrap();
        wait_until(SOON, || {
            link.say(b"again").unwrap();
            h1.figure("meshx_reproofs_total").unwrap() >= f64::from(round)
        })
        .unwrap();
    }
    assert_eq!(h1.figure("meshx_reproofs_failed_total").unwrap(), 0.0);

    // Without it nobody could believe the leaves: none is made, and the cause is told. Live links go on.
    std::fs::remove_file(mesh.mesh_dir().join("ca.chain.pem")).unwrap();
    let refused = client
        .reach("echo", "other", vec![])
        .and_then(|address| EchoClient::connect(address, SOON)?.say(b"anybody?"));
    refused.unwrap_err();
    h1.process
        .wait_log("no certificate in it is of the key in ca.key", SOON)
        .unwrap();
    link.say(b"still").unwrap();
}

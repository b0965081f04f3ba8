//! Roots and leaves that change under us.

use std::time::Duration;

use meshx::mesh::{Certificates, Identity};
use reqwest::Method;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::UnixTime;
use rustls::server::ParsedCertificate;
use serde_json::json;

use crate::support::{Consul, ready, service, until, within};

/// Whether `identity` believes the leaf of `other`.
fn believes(identity: &Identity, other: &Identity) -> bool {
    let (leaf, intermediates) = other.chain.split_first().unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let parsed = ParsedCertificate::try_from(leaf).unwrap();
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &identity.roots,
        intermediates,
        UnixTime::now(),
        algorithms,
    )
    .is_ok()
}

#[tokio::test]
async fn a_root_that_is_rotated_is_followed_and_both_believe_each_other() {
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    let shop = ready(|| a.identity(&service("shop"))).await;
    let cart = ready(|| b.identity(&service("cart"))).await;
    assert!(believes(&shop, &cart) && believes(&cart, &shop));
    assert_eq!((shop.chain.len(), shop.roots.len()), (1, 1));

    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let domain = shop.id.trust_domain();
    let uri = rcgen::string::Ia5String::try_from(format!("spiffe://{domain}")).unwrap();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
    params.key_usages = vec![
        rcgen::KeyUsagePurpose::KeyCertSign,
        rcgen::KeyUsagePurpose::CrlSign,
    ];
    let root = params.self_signed(&key).unwrap();
    let config = json!({
        "Provider": "consul",
        "Config": { "PrivateKey": key.serialize_pem(), "RootCert": root.pem(), "LeafCertTTL": "72h" },
    });
    consul.call(Method::PUT, "connect/ca/configuration", config).await;

    // The old leaf with both roots at once, the new leaf within half a minute or so (Consul spreads the load).
    let between = until("both roots", || async {
        let identity = a.identity(&service("shop")).await.unwrap();
        (identity.roots.len() == 2).then_some(identity)
    })
    .await;
    assert!(believes(&between, &cart) && believes(&between, &shop));
    let after = within(Duration::from_secs(120), "a new leaf", || async {
        let identity = a.identity(&service("shop")).await.unwrap();
        (identity.chain[0] != shop.chain[0]).then_some(identity)
    })
    .await;
    assert_eq!(
        after.chain.len(),
        2,
        "the leaf, and the new root signed by the old one"
    );
    assert_eq!(after.id, shop.id);
    assert!(believes(&after, &cart) && believes(&cart, &after));
}

#[tokio::test]
async fn a_consul_that_lost_its_authority_is_followed() {
    let mut consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let before = ready(|| mesh.identity(&service("shop"))).await;
    consul.kill();
    // While it is away the leaf is as good as before.
    assert_eq!(mesh.identity(&service("shop")).await.unwrap().id, before.id);
    consul.run().await;
    let after = until("the new trust domain", || async {
        let identity = mesh.identity(&service("shop")).await.ok()?;
        (identity.id.trust_domain() != before.id.trust_domain()).then_some(identity)
    })
    .await;
    assert!(!believes(&after, &before) && !believes(&before, &after));
    let cart = mesh.spiffe(&service("cart")).unwrap();
    assert_eq!(cart.trust_domain(), after.id.trust_domain());
}

//! Certificates that are not what they should be.

use super::*;
use crate::proxy::cause::{Cause, Refusal};

pub(super) struct Authority {
    trust_domain: String,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new(trust_domain: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            trust_domain: trust_domain.to_owned(),
            issuer: Issuer::from_ca_cert_pem(&pem, key).unwrap(),
            pem,
        }
    }

    pub(super) fn roots(&self) -> Value {
        json!({ "TrustDomain": self.trust_domain, "Roots": [{ "Name": "a", "Active": true, "RootCert": self.pem }] })
    }

    pub(super) fn leaf(&self, uri: &str) -> Value {
        self.leaf_valid(&[uri], -60, 3600)
    }

    fn leaf_valid(&self, uris: &[&str], from: i64, to: i64) -> Value {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::seconds(from);
        params.not_after = now + time::Duration::seconds(to);
        params.subject_alt_names = uris
            .iter()
            .map(|&uri| SanType::URI(Ia5String::try_from(uri).unwrap()))
            .collect();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        json!({ "CertPEM": leaf.pem(), "PrivateKeyPEM": key.serialize_pem() })
    }
}

/// Serves roots and leaf; the index says which edition it is.
pub(super) fn certifies(
    roots: Value,
    leaf: Value,
    edition: u64,
) -> impl Fn(&Uri, &Value) -> Option<Response> + Send + Sync {
    move |uri, _| {
        let body = match uri.path() {
            "/v1/agent/connect/ca/roots" => roots.to_string(),
            path if path.starts_with("/v1/agent/connect/ca/leaf/") => leaf.to_string(),
            _ => return None,
        };
        if index_of(uri) == edition {
            None
        } else {
            answer(edition, body)
        }
    }
}

pub(super) async fn identity_of(mesh: &ConsulMesh, name: &str) -> Result<Arc<Identity>, MeshError> {
    tokio::time::timeout(LONG, mesh.identity(&service(name)))
        .await
        .unwrap()
}

pub(super) const SHOP: &str = "spiffe://td.consul/ns/default/dc/dc7/svc/shop";

#[tokio::test]
async fn a_good_leaf_is_published_with_the_names_in_it() {
    let authority = Authority::new("td.consul");
    let mock = Mock::new(certifies(authority.roots(), authority.leaf(SHOP), 5)).await;
    let mesh = mock.mesh();
    assert!(matches!(
        mesh.spiffe(&service("shop")),
        Err(MeshError::Unavailable(_))
    ));
    let identity = identity_of(&mesh, "shop").await.unwrap();
    assert_eq!(identity.id.to_string(), SHOP);
    let cart = mesh.spiffe(&service("cart")).unwrap();
    assert_eq!(cart.to_string(), "spiffe://td.consul/ns/default/dc/dc7/svc/cart");
}

#[tokio::test]
async fn a_leaf_that_is_not_ours_is_refused() {
    let (ours, other) = (Authority::new("td.consul"), Authority::new("td.consul"));
    let mut swapped = ours.leaf(SHOP);
    swapped["PrivateKeyPEM"] = ours.leaf(SHOP)["PrivateKeyPEM"].clone();
    let mut no_chain = ours.leaf(SHOP);
    no_chain["CertPEM"] = json!("");
    for (leaf, why) in [
        (
            ours.leaf("spiffe://td.consul/ns/default/dc/dc7/svc/cart"),
            "wanted service shop",
        ),
        (
            ours.leaf("spiffe://other.consul/ns/default/dc/dc7/svc/shop"),
            "wanted trust domain",
        ),
        (ours.leaf("https://shop"), "is not spiffe://"),
        (ours.leaf_valid(&[], -60, 3600), "exactly one URI"),
        (ours.leaf_valid(&[SHOP, SHOP], -60, 3600), "exactly one URI"),
        (other.leaf(SHOP), "certificate"),
        (ours.leaf_valid(&[SHOP], -7200, -3600), "expired"),
        (ours.leaf_valid(&[SHOP], 3600, 7200), "not valid yet"),
        (swapped, "KeyMismatch"),
        (no_chain, "0 certificates"),
        (json!({}), "0 certificates"),
        (json!(null), "0 certificates"),
    ] {
        let mock = Mock::new(certifies(ours.roots(), leaf, 5)).await;
        let error = identity_of(&mock.mesh(), "shop").await.unwrap_err();
        assert!(matches!(error, MeshError::Unavailable(_)), "{why}: {error:?}");
        assert!(error.to_string().contains(why), "{why}: {error}");
        assert!(!error.to_string().contains("PRIVATE"), "{error}");
    }
}

/// As after a root rotation of Consul's own authority, or with one whose root signs no leaves itself.
#[tokio::test]
async fn a_leaf_comes_with_its_intermediates_or_is_refused() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap();
    let top = Issuer::new(params.clone(), key);
    let key = KeyPair::generate().unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "middle");
    let middle = params.signed_by(&key, &top).unwrap();
    let authority = Authority {
        trust_domain: "td.consul".to_owned(),
        issuer: Issuer::new(params, key),
        pem: root.pem(),
    };
    let alone = authority.leaf(SHOP);
    let mut whole = alone.clone();
    whole["CertPEM"] = json!(format!("{}{}", alone["CertPEM"].as_str().unwrap(), middle.pem()));
    let mut wrong = alone.clone();
    let stranger = Authority::new("td.consul").pem;
    wrong["CertPEM"] = json!(format!("{}{stranger}", alone["CertPEM"].as_str().unwrap()));
    let mock = Mock::new(certifies(authority.roots(), whole, 5)).await;
    let identity = identity_of(&mock.mesh(), "shop").await.unwrap();
    // The whole chain is shown, or the other end could not believe it.
    assert_eq!(identity.chain.len(), 2);
    assert_eq!(&identity.chain[1], middle.der());
    for leaf in [alone, wrong] {
        let mock = Mock::new(certifies(authority.roots(), leaf, 5)).await;
        let error = identity_of(&mock.mesh(), "shop").await.unwrap_err();
        assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    }
}

#[tokio::test]
async fn roots_that_are_none_are_refused() {
    let ours = Authority::new("td.consul");
    let many = json!({ "TrustDomain": "td.consul", "Roots": vec![ours.roots()["Roots"][0].clone(); 65] });
    for roots in [
        json!(null),
        json!({ "TrustDomain": "td.consul", "Roots": null }),
        json!({ "TrustDomain": "", "Roots": ours.roots()["Roots"] }),
        json!({ "TrustDomain": "a/b", "Roots": ours.roots()["Roots"] }),
        json!({ "TrustDomain": "td.consul", "Roots": [{ "RootCert": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" }] }),
        many,
    ] {
        let mock = Mock::new(certifies(roots.clone(), ours.leaf(SHOP), 5)).await;
        let error = identity_of(&mock.mesh(), "shop").await.unwrap_err();
        assert!(error.to_string().contains("roots"), "{error}");
    }
}

#[tokio::test]
async fn a_bad_leaf_leaves_the_one_before_but_not_with_other_roots() {
    let (first, second) = (Authority::new("td.consul"), Authority::new("td.consul"));
    let mock = Mock::new(certifies(first.roots(), first.leaf(SHOP), 5)).await;
    let mesh = mock.mesh();
    let before = identity_of(&mesh, "shop").await.unwrap();
    let cart = first.leaf("spiffe://td.consul/ns/default/dc/dc7/svc/cart");
    mock.plays(certifies(first.roots(), cart, 6));
    let refused = async || {
        let (_, seen) = mesh.certificates.leaves().remove(0);
        seen.fault
            .filter(|fault| fault.to_string().contains("wanted service shop"))
    };
    until(refused).await;
    assert_eq!(identity_of(&mesh, "shop").await.unwrap().chain, before.chain);

    mock.plays(certifies(second.roots(), first.leaf(SHOP), 7));
    let error = until(async || identity_of(&mesh, "shop").await.err()).await;
    assert!(error.to_string().contains("not used"), "{error}");

    mock.plays(certifies(second.roots(), second.leaf(SHOP), 8));
    let after = until(async || identity_of(&mesh, "shop").await.ok()).await;
    assert_ne!(after.roots.roots, before.roots.roots);
}

#[tokio::test]
async fn another_trust_domain_is_followed() {
    let (first, second) = (Authority::new("one.consul"), Authority::new("two.consul"));
    let shop =
        |authority: &Authority| format!("spiffe://{}/ns/default/dc/dc1/svc/shop", authority.trust_domain);
    let mock = Mock::new(certifies(first.roots(), first.leaf(&shop(&first)), 9)).await;
    let mesh = mock.mesh();
    assert_eq!(
        identity_of(&mesh, "shop").await.unwrap().id.trust_domain(),
        "one.consul"
    );
    mock.plays(certifies(second.roots(), second.leaf(&shop(&second)), 4));
    until(async || {
        let identity = identity_of(&mesh, "shop").await.ok()?;
        (identity.id.trust_domain() == "two.consul").then_some(())
    })
    .await;
    assert_eq!(
        mesh.spiffe(&service("cart")).unwrap().trust_domain(),
        "two.consul"
    );
}

#[tokio::test]
async fn so_many_certificates_are_watched_and_no_more() {
    let authority = Authority::new("td.consul");
    let mock = Mock::new(move |uri, _| {
        if index_of(uri) == 5 {
            return None;
        }
        let leaf = |name| authority.leaf(&format!("spiffe://td.consul/ns/default/dc/dc1/svc/{name}"));
        match uri.path().strip_prefix("/v1/agent/connect/ca/leaf/") {
            Some(name) => answer(5, leaf(name).to_string()),
            None if uri.path().ends_with("/roots") => answer(5, authority.roots().to_string()),
            None => None,
        }
    })
    .await;
    let mesh = mock.mesh();
    for i in 0..CERTIFICATES_MAX {
        identity_of(&mesh, &format!("s{i}")).await.unwrap();
    }
    let error = identity_of(&mesh, "more").await.unwrap_err();
    assert!(error.to_string().contains("CERTIFICATES_MAX"), "{error}");
    assert_eq!(Refusal::from(error).cause, Cause::Limit);
    assert!(identity_of(&mesh, "s0").await.is_ok());
    mesh.certificates.forget(&service("s1"));
    until(async || identity_of(&mesh, "more").await.ok()).await;
}

#[tokio::test]
async fn a_leaf_that_ends_is_given_out_no_more() {
    let authority = Authority::new("td.consul");
    let leaf = authority.leaf_valid(&[SHOP], -60, 8);
    let mock = Mock::new(certifies(authority.roots(), leaf, 5)).await;
    let mesh = mock.mesh();
    identity_of(&mesh, "shop").await.unwrap();
    let error = until(async || identity_of(&mesh, "shop").await.err()).await;
    assert!(error.to_string().contains("expired"), "{error}");
}

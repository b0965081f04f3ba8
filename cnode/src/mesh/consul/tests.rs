//! Faults that a real Consul cannot be made to have, by a server that plays it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request as Asked;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::stream;
use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::net::TcpListener;

use super::authorize::STALE_MAX;
use super::client::{Client, Fault, LARGE, PLAIN_TIME, Request, SMALL};
use super::watch::watch;
use super::*;
use crate::mesh::{DataPlane, Protocol, Sidecar, SidecarUpstream, Weights};

/// Longer than any answer needs.
const LONG: Duration = Duration::from_secs(30);

type Play = dyn Fn(&Uri, &Value) -> Option<Response> + Send + Sync;

/// A server on loopback that answers as it is told, and 404 otherwise.
struct Mock {
    address: String,
    play: Arc<Mutex<Arc<Play>>>,
    changed: Arc<tokio::sync::Notify>,
    asked: Arc<Mutex<Vec<(String, Option<String>)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Mock {
    async fn new(play: impl Fn(&Uri, &Value) -> Option<Response> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let play: Arc<Mutex<Arc<Play>>> = Arc::new(Mutex::new(Arc::new(play)));
        let asked = Arc::<Mutex<Vec<_>>>::default();
        let changed = Arc::<tokio::sync::Notify>::default();
        let (playing, record, change) = (play.clone(), asked.clone(), changed.clone());
        let app = Router::new().fallback(move |request: Asked| {
            let (playing, record, change) = (playing.clone(), record.clone(), change.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
                let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                let token = parts.headers.get("X-Consul-Token");
                let token = token.map(|token| token.to_str().unwrap().to_owned());
                record.lock().unwrap().push((parts.uri.to_string(), token));
                loop {
                    let changed = change.notified();
                    let play = playing.lock().unwrap().clone();
                    match play(&parts.uri, &body) {
                        // A blocking query that nothing happens to yet.
                        None => changed.await,
                        Some(response) => return response,
                    }
                }
            }
        });
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            address,
            play,
            changed,
            asked,
            task,
        }
    }

    fn plays(&self, play: impl Fn(&Uri, &Value) -> Option<Response> + Send + Sync + 'static) {
        *self.play.lock().unwrap() = Arc::new(play);
        self.changed.notify_waiters();
    }

    fn settings(&self) -> ConsulSettings {
        ConsulSettings::plain(&self.address, None).unwrap()
    }

    fn client(&self) -> Arc<Client> {
        Arc::new(Client::new(self.settings()).unwrap())
    }

    fn mesh(&self) -> Arc<ConsulMesh> {
        ConsulMesh::open(
            self.settings(),
            "a",
            vec!["h1".into()],
            "127.0.0.1:7000".parse().unwrap(),
        )
        .unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .map(|(uri, _)| uri.clone())
            .collect()
    }
}

fn answer(index: u64, body: impl Into<Body>) -> Option<Response> {
    Some(([("X-Consul-Index", index.to_string())], body.into()).into_response())
}

fn says(status: u16, body: &'static str) -> Option<Response> {
    Some((StatusCode::from_u16(status).unwrap(), body).into_response())
}

fn service(name: &str) -> ServiceName {
    ServiceName::new(name).unwrap()
}

fn index_of(uri: &Uri) -> u64 {
    let query = uri.query().unwrap_or_default();
    let index = query.split('&').find_map(|pair| pair.strip_prefix("index="));
    index.map_or(0, |index| index.parse().unwrap())
}

// === Requests ===

async fn fault(mock: &Mock, request: Request) -> Fault {
    let asking = tokio::time::timeout(LONG, async { mock.client().send(&request).await });
    match asking.await.expect("an end") {
        Ok(reply) => match reply.json::<HashMap<String, String>>() {
            Err(fault) => fault,
            Ok(seen) => panic!("{seen:?}"),
        },
        Err(fault) => fault,
    }
}

fn question() -> Request {
    Request::get(&["some", "thing"]).right("service:write on \"shop\"")
}

#[tokio::test]
async fn garbage_is_no_answer_and_is_not_shown() {
    for garbage in [
        "s3cret",
        "{\"s3cret\": 1}",
        "[\"s3cret\"]",
        "",
        "{\"a\": \"s3cret\"",
    ] {
        let mock = Mock::new(move |_, _| answer(1, garbage)).await;
        let fault = fault(&mock, question()).await;
        assert!(
            fault.is_away() && !fault.to_string().contains("s3cret"),
            "{fault}"
        );
    }
    let mock = Mock::new(|_, _| Some(([("X-Consul-Index", "-1")], "{}").into_response())).await;
    assert!(fault(&mock, question()).await.is_away());
}

#[tokio::test]
async fn an_answer_has_a_largest_size() {
    for (request, limit) in [(question(), SMALL), (question().large(), LARGE)] {
        let body = Bytes::from(vec![b' '; 1 << 16]);
        let mock = Mock::new(move |_, _| {
            let body = body.clone();
            let endless = stream::repeat_with(move || Ok::<_, std::io::Error>(body.clone()));
            answer(1, Body::from_stream(endless))
        })
        .await;
        let fault = fault(&mock, request).await;
        assert!(
            fault.is_away() && fault.to_string().contains(&limit.to_string()),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn silence_and_a_trickle_end_in_time() {
    let silent = Mock::new(|_, _| None).await;
    let trickle = Mock::new(|_, _| {
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b" ")), ()))
        });
        answer(1, Body::from_stream(drops))
    })
    .await;
    let began = Instant::now();
    let (a, b) = tokio::join!(fault(&silent, question()), fault(&trickle, question()));
    assert!(began.elapsed() < PLAIN_TIME * 3, "{:?}", began.elapsed());
    for fault in [a, b] {
        assert!(
            fault.is_away() && fault.to_string().contains("not done within"),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn what_consul_refuses_is_told_by_kind() {
    let of = async |status, body| {
        let mock = Mock::new(move |_, _| says(status, body)).await;
        fault(&mock, question()).await
    };
    let denied = of(403, "Permission denied").await;
    let text = denied.to_string();
    assert!(
        text.contains("lacks service:write on \"shop\"") && text.contains("no token was given"),
        "{text}"
    );
    assert!(matches!(MeshError::from(denied), MeshError::Forbidden(_)));
    assert!(matches!(of(403, "ACL not found").await, Fault::UnknownToken(_)));
    for (status, body, missing) in [
        (404, "unknown service ID: x", true),
        (500, "Unknown check \"x\"", true),
        (500, "Unknown service {\"x\" {}}", true),
        (500, "No cluster leader", false),
    ] {
        assert_eq!(of(status, body).await.is_missing(), missing, "{body}");
    }
    assert!(of(500, "No cluster leader").await.is_away());
    assert!(of(429, "").await.is_away());
    assert!(
        matches!(of(400, "Bad request\n\u{1b}[2J").await.into(), MeshError::Refused(text) if !text.contains('\u{1b}'))
    );
    // Redirects are not followed: the token would go where they lead.
    let mock = Mock::new(|uri, _| {
        assert_eq!(uri.path(), "/v1/some/thing");
        Some((StatusCode::MOVED_PERMANENTLY, [("Location", "/elsewhere")]).into_response())
    })
    .await;
    assert!(matches!(
        fault(&mock, question()).await,
        Fault::Status { code: 301, .. }
    ));
}

#[tokio::test]
async fn names_cannot_leave_their_place_in_the_path() {
    let mock = Mock::new(|_, _| answer(1, "{}")).await;
    let client = mock.client();
    for name in ["a/b", "../x", "a?b=c", "a#b", "100%", "shop@h1", "日本", "a b"] {
        client
            .send(&Request::get(&["agent", "service", name]))
            .await
            .unwrap();
    }
    let asked = mock.asked();
    assert_eq!(
        asked,
        [
            "/v1/agent/service/a%2Fb",
            "/v1/agent/service/..%2Fx",
            "/v1/agent/service/a%3Fb=c",
            "/v1/agent/service/a%23b",
            "/v1/agent/service/100%25",
            "/v1/agent/service/shop@h1",
            "/v1/agent/service/%E6%97%A5%E6%9C%AC",
            "/v1/agent/service/a%20b",
        ]
    );
    for name in ["", ".", ".."] {
        let refused = client.send(&Request::get(&["agent", "service", name])).await;
        assert!(refused.is_err(), "{name:?}");
    }
    assert_eq!(mock.asked().len(), asked.len(), "nothing was sent");
}

#[tokio::test]
async fn a_token_file_is_read_again_when_it_changes() {
    let mock = Mock::new(|_, _| answer(1, "{}")).await;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("token");
    std::fs::write(&path, "one").unwrap();
    let args = ConsulArgs {
        consul_addr: Some(mock.address.clone()),
        consul_token_file: Some(path.clone()),
        ..ConsulArgs::default()
    };
    let settings = ConsulSettings::read(args, ConsulFile::default(), |_| None).unwrap();
    let client = Client::new(settings).unwrap();
    let ask = async |token: Option<Token>| {
        client.send(&question().token(token)).await.unwrap();
        let asked = mock.asked.lock().unwrap();
        asked.last().unwrap().1.clone().unwrap()
    };
    assert_eq!(ask(None).await, "one");
    let new = temp.path().join("new");
    std::fs::write(&new, "two").unwrap();
    std::fs::rename(&new, &path).unwrap();
    assert_eq!(ask(None).await, "two");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ask(None).await, "two", "the last one is kept");
    assert_eq!(ask(Some(Token::new("own"))).await, "own");
}

// === Watches ===

#[tokio::test]
async fn an_index_that_goes_backwards_starts_over() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(10, "1"),
        10 => answer(3, "2"),
        _ => None,
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    tokio::time::timeout(LONG, seen.wait_for(|seen| seen.version >= 3))
        .await
        .unwrap()
        .unwrap();
    let asked = mock.asked();
    let indices: Vec<u64> = asked
        .iter()
        .map(|uri| index_of(&uri.parse().unwrap()))
        .take(3)
        .collect();
    assert_eq!(indices, [0, 10, 0]);
}

#[tokio::test]
async fn an_index_of_zero_counts_as_one_and_a_missing_one_as_no_answer() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(0, "1"),
        _ => None,
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    tokio::time::timeout(LONG, seen.wait_for(|seen| seen.value == Some(1)))
        .await
        .unwrap()
        .unwrap();
    let held = async {
        while mock.asked().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, held).await.unwrap();
    assert_eq!(index_of(&mock.asked()[1].parse().unwrap()), 1);

    mock.plays(|_, _| Some("1".into_response()));
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    let seen = tokio::time::timeout(LONG, seen.wait_for(super::watch::Seen::is_known))
        .await
        .unwrap()
        .unwrap();
    assert!(
        seen.fault
            .as_ref()
            .unwrap()
            .to_string()
            .contains("X-Consul-Index")
    );
}

#[tokio::test]
async fn answers_that_come_at_once_without_a_change_are_slowed_down() {
    let mock = Mock::new(|_, _| answer(5, "1")).await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    seen.wait_for(|seen| seen.value.is_some()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    // 200, 400, 800 ms and so on, each between a half and the whole.
    let count = mock.asked().len();
    assert!((2..=8).contains(&count), "{count} requests");
    drop(seen);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let count = mock.asked().len();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(mock.asked().len(), count, "nobody listens");
}

#[tokio::test]
async fn a_watch_keeps_its_answer_while_consul_fails_and_goes_on() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(5, "1"),
        _ => says(500, "No cluster leader"),
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    {
        let seen = tokio::time::timeout(LONG, seen.wait_for(|seen| seen.fault.is_some()))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(seen.value, Some(1));
    }
    mock.plays(|uri, _| match index_of(uri) {
        0 => answer(2, "7"),
        _ => None,
    });
    let seen = tokio::time::timeout(LONG, seen.wait_for(|seen| seen.value == Some(7)))
        .await
        .unwrap()
        .unwrap();
    assert!(seen.fault.is_none());
}

// === Certificates ===

struct Authority {
    trust_domain: String,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(trust_domain: &str) -> Self {
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

    fn roots(&self) -> Value {
        json!({ "TrustDomain": self.trust_domain, "Roots": [{ "Name": "a", "Active": true, "RootCert": self.pem }] })
    }

    fn leaf(&self, uri: &str) -> Value {
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
fn certifies(
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

async fn identity_of(mesh: &ConsulMesh, name: &str) -> Result<Arc<Identity>, MeshError> {
    tokio::time::timeout(LONG, mesh.identity(&service(name)))
        .await
        .unwrap()
}

const SHOP: &str = "spiffe://td.consul/ns/default/dc/dc7/svc/shop";

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

async fn until<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(seen) = ask().await {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, asking)
        .await
        .expect("what is waited for")
}

// === Intentions ===

/// A Consul that says `short` of every pair and has these intentions for every destination.
async fn decides(short: Value, rules: Value) -> (Mock, Arc<ConsulMesh>, SpiffeId) {
    let authority = Authority::new("td.consul");
    let (roots, leaf) = (authority.roots(), authority.leaf(SHOP));
    let mock = Mock::new(intends(roots, leaf, short, rules)).await;
    let mesh = mock.mesh();
    identity_of(&mesh, "shop").await.unwrap();
    let source = mesh.spiffe(&service("cart")).unwrap();
    (mock, mesh, source)
}

fn intends(
    roots: Value,
    leaf: Value,
    short: Value,
    rules: Value,
) -> impl Fn(&Uri, &Value) -> Option<Response> + Send + Sync {
    let certifies = certifies(roots, leaf, 5);
    move |uri, body| match uri.path() {
        "/v1/agent/connect/authorize" => answer(1, short.to_string()),
        "/v1/connect/intentions/match" => answer(1, json!({ "shop": rules }).to_string()),
        "/v1/connect/intentions" if index_of(uri) == 3 => None,
        "/v1/connect/intentions" => answer(3, rules.to_string()),
        "/v1/health/connect/shop" if index_of(uri) == 3 => None,
        "/v1/health/connect/shop" => answer(3, json!([health("shop", "shop@h2")]).to_string()),
        "/v1/health/connect/empty" => answer(3, "[]"),
        _ => certifies(uri, body),
    }
}

fn health(name: &str, id: &str) -> Value {
    json!({
        "Node": { "Address": "10.0.0.1" },
        "Service": {
            "ID": id, "Service": name, "Address": "127.0.0.9", "Port": 7, "Connect": { "Native": true },
            "Meta": { "meshx-node": id, "meshx-agent": "b", "meshx-protocol": "meshx/1" },
        },
        "Checks": [{ "Status": "passing" }],
    })
}

fn rule(more: Value) -> Value {
    let mut rule = json!({
        "ID": "1", "Description": "d", "SourceNS": "default", "SourceName": "cart", "DestinationNS": "default",
        "DestinationName": "shop", "SourceType": "consul", "Action": "allow", "Meta": { "a": "b" }, "Precedence": 9,
        "CreatedAt": "2026-01-01T00:00:00Z", "UpdatedAt": "2026-01-01T00:00:00Z", "Hash": "x", "CreateIndex": 1,
        "ModifyIndex": 1, "DefaultAddr": "", "DefaultPort": 0, "Permissions": null, "SourcePeer": "",
        "SourcePartition": "default", "DestinationPartition": "default",
    });
    for (key, value) in more.as_object().unwrap() {
        rule[key] = value.clone();
    }
    rule
}

#[tokio::test]
async fn an_intention_that_is_not_plain_means_no() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    for (more, why) in [
        (
            json!({ "Action": "", "Permissions": [{ "Action": "allow", "HTTP": { "PathPrefix": "/" } }] }),
            "L7 permissions",
        ),
        (
            json!({ "Permissions": [{ "Action": "allow" }] }),
            "L7 permissions",
        ),
        (json!({ "Action": "log" }), "the action \"log\""),
        (json!({ "Action": null }), "the action \"\""),
        (
            json!({ "JWT": { "Providers": [{ "Name": "okta" }] } }),
            "the field JWT",
        ),
        (
            json!({ "SourceSamenessGroup": "all" }),
            "the field SourceSamenessGroup",
        ),
        (json!({ "OnlyOnSundays": true }), "the field OnlyOnSundays"),
        (json!({ "SourceType": "kubernetes" }), "source type kubernetes"),
        (json!({ "Action": "deny" }), "deny"),
        (json!({ "SourceName": "*", "Action": "deny" }), "* -> shop deny"),
    ] {
        let (_mock, mesh, source) = decides(yes.clone(), json!([rule(more)])).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert!(
            !decision.allowed && decision.rule.contains(why),
            "{why}: {decision:?}"
        );
    }
    let plain = rule(json!({ "OnlyOnSundays": false, "JWT": null }));
    let (_mock, mesh, source) = decides(yes, json!([plain])).await;
    assert!(mesh.authorize(&source, &service("shop")).await.unwrap().allowed);
}

#[tokio::test]
async fn the_first_intention_that_fits_counts_and_others_do_not() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    let deny = json!({ "Action": "deny" });
    for (others, allowed) in [
        (
            json!([
                rule(json!({ "SourceName": "other", "Action": "deny" })),
                rule(json!({}))
            ]),
            true,
        ),
        (
            json!([
                rule(json!({})),
                rule(json!({ "SourceName": "*", "Action": "deny" }))
            ]),
            true,
        ),
        (
            json!([rule(deny.clone()), rule(json!({ "SourceName": "*" }))]),
            false,
        ),
        (
            json!([
                rule(json!({ "SourcePeer": "far", "Action": "deny" })),
                rule(json!({}))
            ]),
            true,
        ),
    ] {
        let (_mock, mesh, source) = decides(yes.clone(), others.clone()).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert_eq!(decision.allowed, allowed, "{others}: {decision:?}");
    }
}

#[tokio::test]
async fn answers_that_contradict_each_other_mean_no() {
    for (short, rules) in [
        // It was deleted, and the Consul agent does not know yet.
        (
            json!({ "Authorized": true, "Reason": "Matched intention: x" }),
            json!([]),
        ),
        (
            json!({ "Authorized": false, "Reason": "Matched intention: x" }),
            json!([rule(json!({}))]),
        ),
    ] {
        let (_mock, mesh, source) = decides(short, rules).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert!(
            !decision.allowed && decision.rule.contains("contradict"),
            "{decision:?}"
        );
    }
    let default = json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" });
    let (_mock, mesh, source) = decides(default, json!(null)).await;
    let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
    assert!(
        decision.allowed && decision.rule.contains("Default behavior"),
        "{decision:?}"
    );
}

#[tokio::test]
async fn while_consul_is_away_the_last_answer_holds_and_others_are_refused() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    let (mock, mesh, source) = decides(yes, json!([rule(json!({}))])).await;
    let shop = service("shop");
    assert!(mesh.authorize(&source, &shop).await.unwrap().allowed);
    mock.plays(|_, _| says(500, "No cluster leader"));
    let decision = mesh.authorize(&source, &shop).await.unwrap();
    assert!(
        decision.allowed && decision.rule.contains("No cluster leader"),
        "{decision:?}"
    );
    let unknown = mesh.spiffe(&service("other")).unwrap();
    let error = mesh.authorize(&unknown, &shop).await.unwrap_err();
    assert!(matches!(error, MeshError::Unavailable(_)), "{error:?}");
    // A no of Consul is none of silence.
    mock.plays(|_, _| says(403, "Permission denied"));
    let error = mesh.authorize(&source, &shop).await.unwrap_err();
    assert!(matches!(error, MeshError::Forbidden(_)), "{error:?}");
    mock.plays(|_, _| says(500, "No cluster leader"));
    assert!(
        mesh.authorize(&source, &shop).await.is_err(),
        "what was refused since is forgotten"
    );
}

#[tokio::test]
async fn the_last_answer_does_not_hold_for_ever() {
    let settings = ConsulSettings::plain("127.0.0.1:1", None).unwrap();
    let authorizer = Authorizer::new(Arc::new(Client::new(settings).unwrap()), Arc::default());
    let pair = (SpiffeId::new("td.consul", service("cart")), service("shop"));
    let decision = Decision {
        allowed: true,
        rule: "a rule".into(),
    };
    authorizer.remember(pair.clone(), decision);
    let now = tokio::time::Instant::now();
    for (waits, holds) in [(STALE_MAX - Duration::from_secs(1), true), (STALE_MAX, false)] {
        let seen = authorizer.recall(&pair, Fault::Away("silence".into()), now + waits);
        assert_eq!(seen.is_ok(), holds, "{seen:?}");
    }
}

#[tokio::test]
async fn a_target_that_is_not_there_is_not_answered_for() {
    let yes = json!({ "Authorized": true, "Reason": "Default" });
    let (_mock, mesh, source) = decides(yes, json!([])).await;
    let error = mesh.authorize(&source, &service("empty")).await.unwrap_err();
    assert!(matches!(error, MeshError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn changes_that_may_not_be_seen_are_looked_for_again_and_again() {
    let mock = Mock::new(|_, _| says(403, "ACL not found")).await;
    let mesh = mock.mesh();
    tokio::time::timeout(LONG, mesh.changed())
        .await
        .expect("an end")
        .unwrap();
}

// === Catalogue ===

#[tokio::test]
async fn entries_that_are_no_instances_are_left_out() {
    let with = |field: &str, value: Value| {
        let mut entry = health("shop", "shop@h2");
        entry["Service"][field] = value;
        entry
    };
    let sidecar = json!({
        "Node": { "Address": "10.0.0.1" },
        "Service": {
            "Kind": "connect-proxy", "ID": "shop-1-sidecar-proxy", "Service": "shop-sidecar-proxy", "Address": "",
            "Port": 21000, "Proxy": { "DestinationServiceName": "shop", "DestinationServiceID": "shop-1" },
            "Meta": { "meshx-protocol": "meshx/1" }, "Tags": ["t"],
        },
        "Checks": [{ "Status": "passing" }, { "Status": "warning", "Output": "slow\n" }],
    });
    let mut other_sidecar = sidecar.clone();
    other_sidecar["Service"]["Proxy"]["DestinationServiceName"] = json!("cart");
    let mut critical = health("shop", "shop@h3");
    critical["Checks"] = json!([{ "Status": "passing" }, { "Status": "critical" }, { "Status": "warning" }]);
    let mut strange = health("shop", "shop@h4");
    strange["Checks"] = json!([{ "Status": "fine" }]);
    let mut foreign = health("shop", "shop@h5");
    foreign["Service"]["Meta"] = json!({ "meshx-node": "no node" });
    let entries = json!([
        health("shop", "shop@h2"),
        sidecar,
        critical,
        strange,
        foreign,
        with("Service", json!("cart")),
        with("Connect", json!({})),
        with("Connect", json!(null)),
        with("Kind", json!("mesh-gateway")),
        with("Address", json!("shop.example")),
        with("Address", json!("0.0.0.0")),
        with("Port", json!(0)),
        with("Port", json!(65_536)),
        other_sidecar,
    ]);
    let mock = Mock::new(move |uri, _| match (uri.path(), index_of(uri)) {
        ("/v1/catalog/services", _) => answer(
            1,
            json!({ "shop": [], "Not A Name": [], "consul": [] }).to_string(),
        ),
        ("/v1/health/connect/shop", 0) => answer(5, entries.to_string()),
        ("/v1/health/connect/consul", 0) => answer(5, "null"),
        _ => None,
    })
    .await;
    let mesh = mock.mesh();
    let listed = mesh.services().await.unwrap();
    let seen: Vec<_> = listed
        .iter()
        .map(|listed| {
            (
                listed.instance.id.as_str(),
                listed.status.as_str(),
                listed.instance.protocol,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("shop@h2", "passing", Protocol::Meshx),
            ("shop-1", "warning: slow", Protocol::Connect),
            ("shop@h3", "critical", Protocol::Meshx),
            ("shop@h4", "critical", Protocol::Meshx),
            ("shop@h5", "passing", Protocol::Connect),
        ]
    );
    assert_eq!(listed[1].instance.address, "10.0.0.1:21000".parse().unwrap());
    assert_eq!(listed[1].tags, ["t"]);
    assert_eq!(listed[4].instance.node, None);
    let passing = mesh.instances(&service("shop")).await.unwrap();
    assert_eq!(
        passing
            .iter()
            .map(|instance| instance.id.as_str())
            .collect::<Vec<_>>(),
        ["shop@h2", "shop@h5"]
    );
    assert_eq!(mesh.node("shop@h2").await.unwrap().unwrap().agent, "b");
    assert_eq!(mesh.node("shop@h3").await.unwrap(), None, "it does not pass");
    assert_eq!(mesh.node("no node").await.unwrap(), None);
}

#[tokio::test]
async fn a_missing_name_is_looked_up_once_and_not_for_everybody_at_once() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 if uri.path().starts_with("/v1/health/connect/") => answer(5, "[]"),
        _ => None,
    })
    .await;
    let mesh = mock.mesh();
    let asks = (0..50).map(|_| mesh.node("shop@h1"));
    for answer in futures::future::join_all(asks).await {
        assert_eq!(answer.unwrap(), None);
    }
    let lookups = || {
        mock.asked()
            .iter()
            .filter(|uri| uri.contains("/health/connect/"))
            .count()
    };
    // One, or two when the first has had its time on a slow machine.
    assert!(lookups() <= 2, "{:?}", mock.asked());
    assert!(
        mock.asked().iter().any(|uri| uri.contains("consistent")),
        "{:?}",
        mock.asked()
    );
    let before = lookups();
    let names: Vec<_> = (0..300).map(|i| format!("n{i}@h1")).collect();
    let began = Instant::now();
    let answers = futures::future::join_all(names.iter().map(|name| mesh.node(name))).await;
    let seconds = began.elapsed().as_secs() as usize + 2;
    assert!(lookups() - before <= 100 * seconds, "{}", lookups());
    if began.elapsed() < Duration::from_secs(1) {
        assert!(answers.iter().any(|answer| {
            answer
                .as_ref()
                .is_err_and(|error| error.to_string().contains("looked up"))
        }));
    }
}

// === Registration ===

fn entry(id: &str) -> Entry {
    Entry::plain(Instance {
        id: id.to_owned(),
        service: service("shop"),
        node: None,
        agent: "a".into(),
        address: "127.0.0.1:7000".parse().unwrap(),
        protocol: Protocol::Meshx,
    })
}

/// What is sent to Consul for an entry.
async fn registered(entry: Entry) -> Result<Value, MeshError> {
    let sent = Arc::new(Mutex::new(Value::Null));
    let keep = sent.clone();
    let id = entry.instance.id.clone();
    let mock = Mock::new(move |uri, body| match uri.path() {
        "/v1/agent/services" => answer(1, "{}"),
        "/v1/health/state/any" => answer(1, "[]"),
        "/v1/agent/service/register" => {
            *keep.lock().unwrap() = body.clone();
            answer(1, "")
        }
        "/v1/health/connect/shop" => answer(1, json!([health("shop", &id)]).to_string()),
        _ => None,
    })
    .await;
    mock.mesh().register(&entry).await?;
    let sent = sent.lock().unwrap().clone();
    Ok(sent)
}

#[tokio::test]
async fn a_registration_says_what_the_entry_says() {
    let sent = registered(Entry {
        tags: vec!["t".into()],
        meta: [
            ("m".to_owned(), "1".to_owned()),
            ("meshx-agent".to_owned(), "forged".to_owned()),
        ]
        .into(),
        weights: Some(Weights {
            passing: 3,
            warning: 1,
        }),
        ttl: Some(Duration::from_secs(4)),
        deregister_after: Some(Duration::from_secs(90)),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    assert_eq!(
        sent,
        json!({
            "Name": "shop", "ID": "shop-1", "Address": "127.0.0.1", "Port": 7000, "Tags": ["t"],
            "Meta": { "m": "1", "meshx-agent": "a", "meshx-protocol": "meshx/1" },
            "Weights": { "Passing": 3, "Warning": 1 },
            "Connect": { "Native": true },
            "Check": {
                "CheckID": "meshx:shop-1", "Name": "meshx agent", "Notes": "meshx agent a", "TTL": "4000ms",
                "Status": "passing", "DeregisterCriticalServiceAfter": "90000ms",
            },
        })
    );
}

#[tokio::test]
async fn further_fields_cannot_say_otherwise() {
    let extra = json!({
        "port": 1, "PORT": 2, "name": "other", "Id": "other", "address": "10.0.0.1", "connect": {}, "Token": "t",
        "check": {}, "meta": { "k": "v", "Meshx-Node": "forged@h" }, "tags": ["given"], "Weights": { "Passing": 2 },
        "EnableTagOverride": true, "Checks": [{ "TCP": "127.0.0.1:1", "Interval": "9s" }],
    });
    let sent = registered(Entry {
        extra: extra.as_object().unwrap().clone(),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    let sent = sent.as_object().unwrap();
    let mut keys: Vec<_> = sent.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "Address",
            "Check",
            "Checks",
            "Connect",
            "EnableTagOverride",
            "ID",
            "Meta",
            "Name",
            "Port",
            "Tags",
            "Weights",
        ]
    );
    assert_eq!(
        sent["Meta"],
        json!({ "k": "v", "meshx-agent": "a", "meshx-protocol": "meshx/1" })
    );
    assert_eq!(
        (&sent["Name"], &sent["ID"], &sent["Port"]),
        (&json!("shop"), &json!("shop-1"), &json!(7000))
    );
    assert_eq!(
        (&sent["Tags"], &sent["Weights"]),
        (&json!(["given"]), &json!({ "Passing": 2 }))
    );

    // Go takes the long s for an s when it compares field names.
    let extra = [("addre\u{17f}s".to_owned(), json!("10.0.0.1"))]
        .into_iter()
        .collect();
    let error = registered(Entry {
        extra,
        ..entry("shop-1")
    })
    .await
    .unwrap_err();
    assert!(matches!(error, MeshError::Refused(_)), "{error:?}");
}

#[tokio::test]
async fn a_sidecar_is_registered_with_what_is_behind_and_before_it() {
    let sidecar = Sidecar {
        local: "127.0.0.1:9000".parse().unwrap(),
        upstreams: vec![SidecarUpstream {
            target: service("cart"),
            bind: "127.0.0.1:9001".parse().unwrap(),
        }],
    };
    let sent = registered(Entry {
        data_plane: DataPlane::Sidecar(sidecar),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    assert_eq!(
        (&sent["Address"], &sent["Port"]),
        (&json!("127.0.0.1"), &json!(9000))
    );
    let meta = json!({ "meshx-agent": "a", "meshx-protocol": "connect" });
    assert_eq!(sent["Meta"], meta);
    assert_eq!(
        sent["Connect"]["SidecarService"],
        json!({
            "Address": "127.0.0.1", "Port": 7000, "Meta": meta,
            "Proxy": {
                "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 9000,
                "Upstreams": [
                    { "DestinationName": "cart", "LocalBindAddress": "127.0.0.1", "LocalBindPort": 9001 }
                ],
            },
            "Checks": [
                { "Name": "sidecar port", "TCP": "127.0.0.1:7000", "Interval": "2s" },
                { "Name": "service of the sidecar", "AliasService": "shop-1" },
            ],
        })
    );
    assert_eq!(sent["Check"]["TTL"], json!("10000ms"));
}

#[tokio::test]
async fn entries_that_consul_would_misread_are_refused() {
    for bad in ["", "a\"b", "a\\b", "a\nb", &"x".repeat(513)] {
        let error = registered(entry(bad)).await.unwrap_err();
        assert!(matches!(error, MeshError::Refused(_)), "{bad:?}: {error:?}");
    }
    for ttl in [
        Duration::ZERO,
        Duration::from_millis(999),
        Duration::from_secs(100_000),
    ] {
        let error = registered(Entry {
            ttl: Some(ttl),
            ..entry("shop-1")
        })
        .await
        .unwrap_err();
        assert!(error.to_string().contains("ttl"), "{error}");
    }
}

#[test]
fn an_agents_id_is_its_directorys() {
    let id = ConsulMesh::agent_id(Path::new("/run/meshx"));
    assert_eq!(id, ConsulMesh::agent_id(Path::new("/run/meshx")));
    assert_ne!(id, ConsulMesh::agent_id(Path::new("/run/meshx2")));
    assert!(
        id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
}

//! Faults that a real Consul cannot be made to have, by a server that plays it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

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

mod catalogue;
mod certificates;
mod intentions;
mod registration;
mod requests;

/// Longer than any answer needs.
const LONG: Duration = Duration::from_secs(30);

type Play = dyn Fn(&Uri, &Value) -> Option<Response> + Send + Sync;

/// The path of a request with its query, and its token.
type SeenRequest = (String, Option<String>);

/// A server on loopback that answers as it is told, and 404 otherwise.
struct Mock {
    address: String,
    play: Arc<Mutex<Arc<Play>>>,
    changed: Arc<tokio::sync::Notify>,
    asked: Arc<Mutex<Vec<SeenRequest>>>,
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

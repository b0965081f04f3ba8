//! Health and metrics over HTTP, for Prometheus and for whoever watches over the agent.
//!
//! Three paths, GET alone, nothing that changes anything and nothing that names a node. Off unless `--http` says
//! where. A connection carries one request and has limits on its bytes, its time and the number of its like.

mod listener;
mod metrics;
mod sample;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
pub use listener::{BYTES_MAX, CONNECTION_TIME, CONNECTIONS_MAX};
use tokio::net::TcpListener;

use self::listener::Bounded;
use self::sample::Samples;
use crate::agent::takeover::Predecessors;
use crate::mesh::Mesh;
use crate::mesh::observed::Answers;
use crate::proxy::Proxy;
use crate::proxy::links::LinkTable;

/// How often the mesh is asked for the certificates of registered services, however often others ask here.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(5);

/// What is told from.
pub struct Sources {
    /// Certificates come from here.
    pub mesh: Arc<dyn Mesh>,
    /// How it has answered.
    pub answers: Answers,
    /// Registrations come from here.
    pub proxy: Arc<Proxy>,
    /// Everything about links comes from here.
    pub links: LinkTable,
    /// Earlier processes of this agent.
    pub predecessors: Predecessors,
}

struct Served {
    sources: Sources,
    samples: Samples,
}

/// Serves until dropped, or until the data plane takes no connections any more.
pub async fn serve(listener: impl Into<Arc<TcpListener>>, sources: Sources) {
    let listener = listener.into();
    let served = Arc::new(Served {
        sources,
        samples: Samples::default(),
    });
    let app = Router::new()
        .route("/metrics", get(metrics_page))
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .layer(map_response(last_word))
        .with_state(served.clone());
    let proxy = served.sources.proxy.clone();
    let closed = async move { proxy.wait_closed().await };
    let serving = axum::serve(Bounded::new(listener), app).with_graceful_shutdown(closed);
    tokio::select! {
        result = serving.into_future() => if !served.sources.proxy.is_closed() {
            tracing::error!(?result, "http is no longer served");
        },
        () = served.samples.keep(&served.sources) => {}
    }
}

async fn metrics_page(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let text = metrics::render(&served.sources, &served.samples.last());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn ready(State(served): State<Arc<Served>>) -> (StatusCode, String) {
    match served.samples.last().missing {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    }
}

/// One request a connection: its limits are those of the request.
async fn last_word(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests;

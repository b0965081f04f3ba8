//! Consul's HTTP API, as far as tests need it: JSON in, JSON out, and waiting by blocking queries.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use super::Consul;
use crate::{Context, Result};

/// A client of one Consul agent. Blocking: tests are.
#[derive(Debug)]
pub(super) struct Http {
    address: String,
    base: String,
    token: Option<String>,
    client: reqwest::Client,
    runtime: Mutex<tokio::runtime::Runtime>,
}

/// A JSON answer and the index it belongs to.
struct Reply {
    body: Value,
    index: u64,
}

impl Http {
    /// `tls`: the directory with ca.pem, client.pem and client.key.
    pub(super) fn new(address: &str, token: Option<&str>, tls: Option<&Path>) -> Result<Self> {
        let mut client = reqwest::Client::builder().no_proxy();
        let mut base = address.to_owned();
        if let Some(path) = address.strip_prefix("unix://") {
            client = client.unix_socket(path);
            base = "http://localhost".into();
        }
        let roots = match tls {
            Some(dir) => {
                let read = |name: &str| std::fs::read(dir.join(name)).context(name);
                let identity = [read("client.pem")?, read("client.key")?].concat();
                client = client
                    .identity(reqwest::Identity::from_pem(&identity).context("the client's certificate")?);
                vec![reqwest::Certificate::from_pem(&read("ca.pem")?).context("Consul's authority")?]
            }
            None => Vec::new(),
        };
        // Fails when another has installed it already, which is as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = client
            .tls_certs_only(roots)
            .build()
            .context("make an HTTP client")?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime")?;
        Ok(Self {
            address: address.into(),
            base,
            token: token.map(str::to_owned),
            client,
            runtime: Mutex::new(runtime),
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Reply> {
        let what = format!("{method} {path}");
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.base))
            .timeout(timeout);
        if let Some(token) = token.or(self.token.as_deref()) {
            request = request.header("X-Consul-Token", token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        runtime.block_on(async {
            let response = request.send().await.map_err(|e| format!("{what}: {e:?}"))?;
            let status = response.status();
            let index = response
                .headers()
                .get("X-Consul-Index")
                .and_then(|i| i.to_str().ok()?.parse().ok());
            let text = response.text().await.context(&what)?;
            if !status.is_success() {
                return Err(format!("{what}: {status}: {text}"));
            }
            Ok(Reply {
                body: serde_json::from_str(&text).unwrap_or(Value::Null),
                index: index.unwrap_or(0),
            })
        })
    }
}

impl Consul {
    /// `GET`, by the management token when there is one.
    ///
    /// # Errors
    /// When the answer is no success: its text.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.get_as(None, path)
    }

    /// `GET` with this token.
    ///
    /// # Errors
    /// When the answer is no success: its text.
    pub fn get_as(&self, token: Option<&str>, path: &str) -> Result<Value> {
        Ok(self
            .http
            .request(Method::GET, path, token, None, super::SOON)?
            .body)
    }

    /// `PUT`, by the management token when there is one.
    ///
    /// # Errors
    /// When the answer is no success: its text.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        Ok(self
            .http
            .request(Method::PUT, path, None, Some(body), super::SOON)?
            .body)
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        Ok(self
            .http
            .request(Method::POST, path, None, Some(body), super::SOON)?
            .body)
    }

    pub(super) fn delete(&self, path: &str) -> Result<()> {
        self.http
            .request(Method::DELETE, path, None, None, super::SOON)
            .map(|_| ())
    }

    /// Follows what `GET path` answers by blocking queries until `done` says so; `path` must be one that has an index.
    /// Returns the answer and how long it took.
    ///
    /// # Errors
    /// When it is not so within `timeout`: the last answer.
    pub fn until(
        &self,
        path: &str,
        timeout: Duration,
        mut done: impl FnMut(&Value) -> bool,
    ) -> Result<(Value, Duration)> {
        let from = Instant::now();
        let separator = if path.contains('?') { '&' } else { '?' };
        let mut index = 0;
        let mut last = Value::Null;
        loop {
            let left = timeout.saturating_sub(from.elapsed());
            if left.is_zero() {
                return Err(format!(
                    "{path}: not as wanted within {timeout:?}, last seen: {last}"
                ));
            }
            let query = format!(
                "{path}{separator}index={index}&wait={}ms",
                left.as_millis().max(1)
            );
            let reply = self
                .http
                .request(Method::GET, &query, None, None, left + super::SOON)?;
            if done(&reply.body) {
                return Ok((reply.body, from.elapsed()));
            }
            // https://developer.hashicorp.com/consul/api-docs/features/blocking: an index that goes backwards starts anew.
            index = if reply.index < index { 0 } else { reply.index };
            last = reply.body;
        }
    }
}

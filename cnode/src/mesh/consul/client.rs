//! Requests to Consul's HTTP API: each has a time limit, a size limit and the name of the right that it needs.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Method, StatusCode, Url};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::settings::{Address, ConsulSettings, TokenSource, read_token};
use super::tls;
use crate::mesh::{MeshError, Token};

/// How long a request that does not wait for a change may take. Less than the agent waits for the mesh.
pub(super) const PLAIN_TIME: Duration = Duration::from_secs(4);
/// Largest answer about one thing, in bytes.
pub(super) const SMALL: usize = 1 << 20;
/// Largest answer that is a list, in bytes.
pub(super) const LARGE: usize = 16 << 20;
/// Requests at one time, beside the watches: Consul takes 200 connections of one address
/// (`http_max_conns_per_client`), and other programs of this host need some.
const REQUESTS_MAX: usize = 32;
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How often the files for HTTPS are looked at for a change.
const TLS_LOOK: Duration = Duration::from_secs(1);
/// Shown of an answer that is no success, in characters.
const SHOWN: usize = 200;

/// Why a request brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// Consul was not reached, or was silent, or sent too much or what it should not.
    #[error("{0}")]
    Away(String),
    /// 403; the text names the right.
    #[error("{0}")]
    Forbidden(String),
    /// 403: the token is not (or no longer) one of Consul's.
    #[error("{0}")]
    UnknownToken(String),
    /// Another status than success.
    #[error("Consul answered {code}: {text}")]
    Status { code: u16, text: String },
}

impl Fault {
    /// Whether it is no word of Consul on the question.
    pub(super) fn is_away(&self) -> bool {
        match self {
            Self::Away(_) => true,
            Self::Status { code, .. } => *code >= 500 || *code == 429,
            Self::Forbidden(_) | Self::UnknownToken(_) => false,
        }
    }

    /// Whether there is no such service or check: 404, in 1.8 a 500 that says so, with ACLs in other words.
    pub(super) fn is_missing(&self) -> bool {
        match self {
            Self::Status { code: 404, .. } => true,
            Self::Status { code: 500, text } => {
                let text = text.to_ascii_lowercase();
                let words = ["unknown check", "does not have associated ttl", "unknown service"];
                words.iter().any(|words| text.contains(words))
            }
            _ => false,
        }
    }
}

impl From<Fault> for MeshError {
    fn from(fault: Fault) -> Self {
        let text = fault.to_string();
        match fault {
            Fault::Forbidden(_) | Fault::UnknownToken(_) => Self::Forbidden(text),
            fault if fault.is_away() => Self::Unavailable(text),
            _ => Self::Refused(text),
        }
    }
}

/// What Consul answered.
pub(super) struct Reply {
    /// `X-Consul-Index`, where the endpoint has one.
    pub(super) index: Option<u64>,
    /// `Date`: Consul's clock.
    pub(super) date: Option<String>,
    pub(super) body: Vec<u8>,
}

impl Reply {
    /// Reads the body, in which a `null` may stand for an empty list.
    pub(super) fn json<T: DeserializeOwned + Default>(&self) -> Result<T, Fault> {
        let read: Result<Option<T>, _> = serde_json::from_slice(&self.body);
        // The position and kind of what is wrong, never the body: it may be a key.
        let told = |error: serde_json::Error| {
            Fault::Away(format!(
                "Consul's answer cannot be read: {:?} error at line {} column {}",
                error.classify(),
                error.line(),
                error.column()
            ))
        };
        read.map(Option::unwrap_or_default).map_err(told)
    }
}

/// A request. The path is given in parts, which are percent-encoded.
#[derive(Debug, Clone)]
pub(super) struct Request {
    method: Method,
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    body: Option<serde_json::Value>,
    token: Option<Token>,
    right: String,
    limit: usize,
}

impl Request {
    fn new(method: Method, path: &[&str]) -> Self {
        Self {
            method,
            path: path.iter().map(|&part| part.to_owned()).collect(),
            query: Vec::new(),
            body: None,
            token: None,
            right: "a right".to_owned(),
            limit: SMALL,
        }
    }

    /// `GET /v1/PATH`.
    pub(super) fn get(path: &[&str]) -> Self {
        Self::new(Method::GET, path)
    }

    /// `PUT /v1/PATH`.
    pub(super) fn put(path: &[&str]) -> Self {
        Self::new(Method::PUT, path)
    }

    /// `POST /v1/PATH`.
    pub(super) fn post(path: &[&str]) -> Self {
        Self::new(Method::POST, path)
    }

    /// With a query parameter.
    pub(super) fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    /// With a JSON body.
    pub(super) fn body(mut self, body: serde_json::Value) -> Self {
        self.body = Some(body);
        self
    }

    /// With a token other than the agent's own.
    pub(super) fn token(mut self, token: Option<Token>) -> Self {
        self.token = token;
        self
    }

    /// The right that it needs, as in `service:write on "shop"`.
    pub(super) fn right(mut self, right: impl Into<String>) -> Self {
        self.right = right.into();
        self
    }

    /// With a list as its answer.
    pub(super) fn large(mut self) -> Self {
        self.limit = LARGE;
        self
    }
}

/// Whose token went with a request.
#[derive(Clone, Copy)]
enum Whose {
    Client,
    Agent,
    Nobody,
}

/// The way to one Consul.
pub(super) struct Client {
    settings: ConsulSettings,
    // Each is held for a look or a change, never across an await.
    http: Mutex<Http>,
    token: Mutex<FileToken>,
    requests: Semaphore,
}

struct Http {
    client: reqwest::Client,
    files: Vec<Option<Stamp>>,
    looked: Instant,
}

#[derive(Default)]
struct FileToken {
    token: Option<Token>,
    stamp: Option<Stamp>,
    warned: bool,
}

/// A version of a file: inode, seconds and nanoseconds of its last change, size.
type Stamp = (u64, i64, i64, u64);

impl Client {
    /// Makes the client; nothing is sent yet.
    ///
    /// # Errors
    /// [`MeshError::Refused`] when a file for HTTPS cannot be used.
    pub(super) fn new(settings: ConsulSettings) -> Result<Self, MeshError> {
        let files = stamps(&settings);
        let http = Http {
            client: build(&settings).map_err(MeshError::Refused)?,
            files,
            looked: Instant::now(),
        };
        Ok(Self {
            settings,
            http: Mutex::new(http),
            token: Mutex::default(),
            requests: Semaphore::new(REQUESTS_MAX),
        })
    }

    pub(super) fn settings(&self) -> &ConsulSettings {
        &self.settings
    }

    /// The agent's own token. A token file that changed is read again; one that cannot be read leaves the token
    /// that there was.
    pub(super) fn token(&self) -> Option<Token> {
        let path = match &self.settings.token {
            TokenSource::None => return None,
            TokenSource::Given(token) => return Some(token.clone()),
            TokenSource::File(path) => path,
        };
        let mut held = lock(&self.token);
        let stamp = stamp(path);
        if held.token.is_none() || stamp.is_none() || stamp != held.stamp {
            match read_token(path) {
                Ok(token) => {
                    if held.token.as_ref().is_some_and(|old| *old != token) {
                        tracing::info!(file = %path.display(), "the Consul token changed");
                    }
                    *held = FileToken {
                        token: Some(token),
                        stamp,
                        warned: false,
                    };
                }
                Err(error) if !held.warned => {
                    tracing::warn!(%error, "the Consul token cannot be read again, the one before is used");
                    held.warned = true;
                }
                Err(_) => {}
            }
        }
        held.token.clone()
    }

    /// Sends a request that is answered at once.
    pub(super) async fn send(&self, request: &Request) -> Result<Reply, Fault> {
        let sending = async {
            // Closed never: the semaphore lives as long as this.
            let _slot = self.requests.acquire().await;
            self.exchange(request, &[]).await
        };
        self.within(PLAIN_TIME, sending).await
    }

    /// Sends a blocking query: it is answered when the index is beyond `index`, or after `wait` (and up to a
    /// sixteenth of it more, which Consul adds by chance).
    pub(super) async fn send_blocking(
        &self,
        request: &Request,
        index: u64,
        wait: Duration,
    ) -> Result<Reply, Fault> {
        let query = [
            ("index", index.to_string()),
            ("wait", format!("{}ms", wait.as_millis())),
        ];
        let limit = wait + wait / 16 + PLAIN_TIME;
        self.within(limit, self.exchange(request, &query)).await
    }

    async fn within(
        &self,
        limit: Duration,
        exchange: impl Future<Output = Result<Reply, Fault>>,
    ) -> Result<Reply, Fault> {
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(Fault::Away(format!(
                "Consul at {} was not done within {limit:?}",
                self.settings.address
            )))
        })
    }

    async fn exchange(&self, request: &Request, query: &[(&str, String)]) -> Result<Reply, Fault> {
        let away = |error: reqwest::Error| Fault::Away(describe(&error, &self.settings.address));
        let url = self.url(&request.path)?;
        let mut sent = self
            .http()
            .request(request.method.clone(), url)
            .query(&request.query)
            .query(query)
            .query(&self.scope(&request.path));
        let own = self.token();
        let whose = match (&request.token, &own) {
            (Some(token), own) if own.as_ref() != Some(token) => Whose::Client,
            (_, Some(_)) => Whose::Agent,
            (_, None) => Whose::Nobody,
        };
        // In a header, not in the URL, which servers log.
        if let Some(token) = request.token.as_ref().or(own.as_ref()) {
            sent = sent.header("X-Consul-Token", token.expose());
        }
        if let Some(body) = &request.body {
            sent = sent.json(body);
        }
        let mut answer = sent.send().await.map_err(away)?;
        let header = |name: &str| {
            let value = answer.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        let (index, date) = (header("X-Consul-Index"), header("Date"));
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > request.limit {
                return Err(Fault::Away(format!(
                    "Consul's answer to /v1/{} is longer than {} bytes",
                    request.path.join("/"),
                    request.limit
                )));
            }
            body.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            return Err(self.refusal(status, &body, request, whose));
        }
        let index = index.map(|text| text.parse().map_err(|_| text)).transpose();
        let index =
            index.map_err(|_| Fault::Away("X-Consul-Index of Consul's answer is no number".to_owned()))?;
        Ok(Reply { index, date, body })
    }

    fn refusal(&self, status: StatusCode, body: &[u8], request: &Request, whose: Whose) -> Fault {
        let said = shorten(&String::from_utf8_lossy(body));
        if status != StatusCode::FORBIDDEN {
            return Fault::Status {
                code: status.as_u16(),
                text: said,
            };
        }
        if said.contains("ACL not found") {
            let token = match (whose, &self.settings.token) {
                (Whose::Client, _) => "the client's token".to_owned(),
                (_, TokenSource::File(path)) => format!("the agent's token in {}", path.display()),
                _ => "the agent's token".to_owned(),
            };
            return Fault::UnknownToken(format!(
                "Consul does not know {token} ({said}): it was deleted or has expired, supply a new one"
            ));
        }
        let token = match whose {
            Whose::Client => "the client's token",
            Whose::Agent => "the agent's token",
            Whose::Nobody => "no token was given, and the anonymous one",
        };
        Fault::Forbidden(format!("{token} lacks {} (Consul: {said})", request.right))
    }

    fn url(&self, path: &[String]) -> Result<Url, Fault> {
        // The parts are pushed one by one, so that a slash in a name stays one; these two would be left out.
        if path.iter().any(|part| matches!(part.as_str(), "" | "." | "..")) {
            return Err(Fault::Status {
                code: 400,
                text: format!("{path:?} has a name that cannot be part of a path"),
            });
        }
        let mut url = base(&self.settings).map_err(Fault::Away)?;
        if let Ok(mut parts) = url.path_segments_mut() {
            parts.pop_if_empty().push("v1").extend(path);
        }
        Ok(url)
    }

    /// Sent only when set: Consul without Enterprise refuses namespaces. An agent knows only its own data centre.
    fn scope(&self, path: &[String]) -> Vec<(&'static str, &str)> {
        let ConsulSettings {
            namespace,
            partition,
            datacenter,
            ..
        } = &self.settings;
        [("ns", namespace), ("partition", partition), ("dc", datacenter)]
            .into_iter()
            .filter(|(name, _)| *name != "dc" || path.first().is_none_or(|first| first != "agent"))
            .filter_map(|(name, value)| Some((name, value.as_deref()?)))
            .collect()
    }

    /// The HTTP client, made anew when a certificate file changed.
    fn http(&self) -> reqwest::Client {
        let mut http = lock(&self.http);
        if http.looked.elapsed() > TLS_LOOK {
            http.looked = Instant::now();
            let files = stamps(&self.settings);
            if files != http.files {
                match build(&self.settings) {
                    Ok(client) => {
                        tracing::info!("the certificate files for Consul's HTTPS changed");
                        http.client = client;
                    }
                    Err(error) => tracing::warn!(%error, "changed certificate files cannot be used"),
                }
                http.files = files;
            }
        }
        http.client.clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.ino(), meta.ctime(), meta.ctime_nsec(), meta.size()))
}

fn stamps(settings: &ConsulSettings) -> Vec<Option<Stamp>> {
    let files = &settings.tls;
    let client = files
        .client
        .iter()
        .flat_map(|(certificate, key)| [certificate, key]);
    let named = files.ca_file.iter().chain(&files.ca_path).chain(client);
    named.map(|path| stamp(path)).collect()
}

/// The URL without a path.
fn base(settings: &ConsulSettings) -> Result<Url, String> {
    let url = match &settings.address {
        Address::Unix(_) => Url::parse("http://localhost"),
        Address::Http(url) => Ok(url.clone()),
    };
    let mut url = url.map_err(|error| error.to_string())?;
    if url.scheme() == "https"
        && let Some(name) = &settings.tls.server_name
    {
        url.set_host(Some(name)).map_err(|error| error.to_string())?;
    }
    Ok(url)
}

fn build(settings: &ConsulSettings) -> Result<reqwest::Client, String> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("meshx/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .http1_only()
        .referer(false)
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIME)
        .tcp_keepalive(Duration::from_secs(15))
        .pool_max_idle_per_host(REQUESTS_MAX);
    let tls = match &settings.address {
        Address::Http(url) if url.scheme() == "https" => {
            if settings.tls.server_name.is_some() {
                let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
                builder = builder.dns_resolver(Arc::new(Behind {
                    host: host.to_owned(),
                    port: url.port_or_known_default().unwrap_or_default(),
                }));
            }
            tls::client_config(&settings.tls)?
        }
        _ => tls::no_client_config()?,
    };
    if let Address::Unix(path) = &settings.address {
        builder = builder.unix_socket(PathBuf::from(path));
    }
    let built = builder.tls_backend_preconfigured(tls).build();
    built.map_err(|error| format!("HTTP client: {error}"))
}

/// Finds the server by its address while TLS asks for its name.
struct Behind {
    host: String,
    port: u16,
}

impl Resolve for Behind {
    fn resolve(&self, _: Name) -> Resolving {
        let (host, port) = (self.host.clone(), self.port);
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// What may be shown of a text that came from Consul or from other services through it.
pub(super) fn shorten(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().take(SHOWN).map(clean).collect()
}

/// The innermost cause: the outer ones say only that something failed.
fn describe(error: &reqwest::Error, address: &Address) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    format!(
        "Consul at {address} cannot be asked: {}",
        shorten(&cause.to_string())
    )
}

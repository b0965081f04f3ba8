//! Envoy as somebody else's sidecar: set up by hand from Consul's certificates, as a mesh without meshx would.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::consul::Consul;
use crate::{Context, Process, Result, fetched};

const START: Duration = Duration::from_secs(60);
const TYPE: &str = "type.googleapis.com/envoy.extensions";

/// The program that tests run as Envoy.
///
/// # Errors
/// When there is none: the text says how to get it.
pub fn program() -> Result<PathBuf> {
    fetched("MESHX_ENVOY", "envoy/envoy", "get-envoy")
}

/// What an Envoy is to carry for one service.
#[derive(Debug, Clone)]
pub struct Envoy {
    service: String,
    listeners: Vec<Value>,
    clusters: Vec<Value>,
    tls: Value,
    sni: String,
}

impl Envoy {
    /// For `service`, with its current certificate from Consul.
    ///
    /// # Errors
    /// When Consul gives none.
    pub fn new(consul: &Consul, service: &str) -> Result<Self> {
        let leaf = consul.leaf(None, service)?;
        let tls = json!({
            "tls_certificates": [{
                "certificate_chain": {"inline_string": leaf.certificate},
                "private_key": {"inline_string": leaf.key},
            }],
            "validation_context": {"trusted_ca": {"inline_string": consul.root_pem()?}},
        });
        Ok(Self {
            service: service.into(),
            listeners: Vec::new(),
            clusters: Vec::new(),
            tls,
            sni: format!("default.dc1.internal.{}", consul.trust_domain()?),
        })
    }

    /// Accepts mutual TLS at `listen` for the application at `application`; only services with these SPIFFE names may.
    #[must_use]
    pub fn inbound(mut self, listen: SocketAddr, application: SocketAddr, allowed: &[String]) -> Self {
        let principals: Vec<Value> = allowed
            .iter()
            .map(|uri| json!({"authenticated": {"principal_name": {"exact": uri}}}))
            .collect();
        let rbac = json!({
            "name": "rbac",
            "typed_config": {
                "@type": format!("{TYPE}.filters.network.rbac.v3.RBAC"),
                "stat_prefix": "rbac",
                "rules": {"action": "ALLOW", "policies": {"intentions": {
                    "permissions": [{"any": true}], "principals": principals,
                }}},
            },
        });
        let tls = json!({
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPE}.transport_sockets.tls.v3.DownstreamTlsContext"),
                "require_client_certificate": true,
                "common_tls_context": self.tls,
            },
        });
        let mut listener = listener("inbound", listen, vec![rbac, tcp_proxy("application")]);
        listener["filter_chains"][0]["transport_socket"] = tls;
        self.listeners.push(listener);
        self.clusters.push(cluster("application", application));
        self
    }

    /// Listens at `local` and dials `service`, which must have the SPIFFE name `spiffe`, at `remote`.
    #[must_use]
    pub fn upstream(mut self, service: &str, spiffe: &str, local: SocketAddr, remote: SocketAddr) -> Self {
        let mut common = self.tls.clone();
        common["validation_context"]["match_typed_subject_alt_names"] =
            json!([{"san_type": "URI", "matcher": {"exact": spiffe}}]);
        let mut cluster = cluster(service, remote);
        cluster["transport_socket"] = json!({
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext"),
                "sni": format!("{service}.{}", self.sni),
                "common_tls_context": common,
            },
        });
        self.clusters.push(cluster);
        self.listeners
            .push(listener(service, local, vec![tcp_proxy(service)]));
        self
    }

    /// Starts it; its files are in Consul's [directory](Consul::path).
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn start(self, consul: &Consul) -> Result<Process> {
        let file = consul.path().join(format!("envoy-{}.json", self.service));
        let config = json!({"static_resources": {"listeners": self.listeners, "clusters": self.clusters}});
        std::fs::write(&file, config.to_string()).context("write Envoy's configuration")?;
        let arguments = [
            "--disable-hot-restart".to_owned(),
            "--concurrency".into(),
            "1".into(),
            "-c".into(),
            file.display().to_string(),
        ];
        let process = Process::start(
            &format!("envoy of {}", self.service),
            program()?,
            arguments,
            |_| {},
        )?;
        process.wait_log("starting workers", START)?;
        Ok(process)
    }
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({
        "name": "tcp",
        "typed_config": {
            "@type": format!("{TYPE}.filters.network.tcp_proxy.v3.TcpProxy"),
            "stat_prefix": cluster, "cluster": cluster, "idle_timeout": "0s",
        },
    })
}

fn listener(name: &str, address: SocketAddr, filters: Vec<Value>) -> Value {
    json!({"name": name, "address": socket_address(address), "filter_chains": [{"filters": filters}]})
}

fn cluster(name: &str, address: SocketAddr) -> Value {
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": socket_address(address)}},
        ]}]},
    })
}

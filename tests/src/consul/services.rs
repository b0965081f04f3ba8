//! Services in Consul's catalogue: registering foreign ones, and seeing who is there.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use super::Consul;
use crate::Result;

/// A service that a test registers by hand, as somebody without meshx would.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name; its id, too.
    pub name: String,
    /// Where the application listens.
    pub address: SocketAddr,
    /// Where its sidecar listens for the mesh.
    pub sidecar: SocketAddr,
    /// Services that its sidecar reaches, and the local address for each.
    pub upstreams: Vec<(String, SocketAddr)>,
}

impl Service {
    /// A service without upstreams.
    pub fn new(name: &str, address: SocketAddr, sidecar: SocketAddr) -> Self {
        Self {
            name: name.into(),
            address,
            sidecar,
            upstreams: Vec::new(),
        }
    }

    /// Lets its sidecar reach `service` at `local`.
    #[must_use]
    pub fn upstream(mut self, service: &str, local: SocketAddr) -> Self {
        self.upstreams.push((service.into(), local));
        self
    }
}

impl Consul {
    /// Registers a service with a sidecar of Consul's usual kind. Starts no sidecar.
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn register(&self, service: &Service) -> Result<()> {
        let upstreams: Vec<Value> = service
            .upstreams
            .iter()
            .map(|(name, local)| {
                json!({
                    "DestinationName": name, "LocalBindAddress": local.ip(), "LocalBindPort": local.port(),
                })
            })
            .collect();
        let body = json!({
            "Name": service.name,
            "ID": service.name,
            "Address": service.address.ip(),
            "Port": service.address.port(),
            "Connect": {"SidecarService": {
                "Address": service.sidecar.ip(),
                "Port": service.sidecar.port(),
                // Consul's own choice would be a TCP check that passes only at its second try, 10 s later.
                "Checks": [{"Name": "alias", "AliasService": service.name}],
                "Proxy": {
                    "LocalServiceAddress": service.address.ip(),
                    "Upstreams": upstreams,
                    "Config": {"bind_address": service.sidecar.ip()},
                },
            }},
        });
        self.put("/v1/agent/service/register", &body).map(|_| ())
    }

    /// Waits until exactly `count` instances of `service` pass. Returns how long it took.
    ///
    /// # Errors
    /// When they do not within `timeout`: the last answer.
    pub fn wait_passing(&self, service: &str, count: usize, timeout: Duration) -> Result<Duration> {
        let path = format!("/v1/health/service/{service}?passing");
        let (_, took) = self.until(&path, timeout, |all| {
            all.as_array().is_some_and(|all| all.len() == count)
        })?;
        Ok(took)
    }

    /// Waits until `service` has exactly `count` instances in the catalogue, passing or not.
    ///
    /// # Errors
    /// When it has not within `timeout`: the last answer.
    pub fn wait_instances(&self, service: &str, count: usize, timeout: Duration) -> Result<Duration> {
        let path = format!("/v1/health/service/{service}");
        let (_, took) = self.until(&path, timeout, |all| {
            all.as_array().is_some_and(|all| all.len() == count)
        })?;
        Ok(took)
    }

    /// Names of all services in the catalogue but Consul itself.
    ///
    /// # Errors
    /// When Consul does not answer.
    pub fn service_names(&self) -> Result<Vec<String>> {
        let services = self.get("/v1/catalog/services")?;
        let names = services
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone());
        Ok(names.filter(|name| name != "consul").collect())
    }

    /// The trust domain: `UUID.consul`.
    ///
    /// # Errors
    /// When Consul does not say.
    pub fn trust_domain(&self) -> Result<String> {
        let roots = self.get("/v1/connect/ca/roots")?;
        let domain = roots["TrustDomain"].as_str();
        domain
            .map(str::to_owned)
            .ok_or_else(|| format!("no trust domain: {roots}"))
    }

    /// The SPIFFE name of a service.
    ///
    /// # Errors
    /// When Consul does not say its trust domain.
    pub fn spiffe(&self, service: &str) -> Result<String> {
        Ok(format!(
            "spiffe://{}/ns/default/dc/dc1/svc/{service}",
            self.trust_domain()?
        ))
    }
}

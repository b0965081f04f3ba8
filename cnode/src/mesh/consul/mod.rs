//! Consul as the mesh: any number of hosts, users and makes of data planes.
//!
//! Everything goes through one Consul agent's HTTP API, usually that of this host. What is asked for often is
//! watched by blocking queries and answered from memory; a Consul that goes away and comes back, with or without
//! its state, is followed without a restart.

mod authorize;
mod catalogue;
mod certificates;
mod client;
mod diagnosis;
mod form;
mod keeping;
mod registration;
mod settings;
mod tls;
mod watch;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
pub use settings::{ConsulArgs, ConsulFile, ConsulSettings};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::authorize::Authorizer;
use self::client::Client;
use self::registration::Registrar;
use super::{
    Answer, Authorization, Catalogue, Certificates, Decision, Diagnosis, Entry, Finding, Identity, Instance,
    Intentions, Kept, Listed, MeshError, Present, Registration, ServiceName, SpiffeId, Token,
};

/// Metadata of our entries: the node name, the agent's id, and what is spoken at the address.
const META_NODE: &str = "meshx-node";
const META_AGENT: &str = "meshx-agent";
const META_PROTOCOL: &str = "meshx-protocol";
const PROTOCOL_MESHX: &str = "meshx/1";
const PROTOCOL_CONNECT: &str = "connect";

/// Certificates and services that one agent watches. Each watch is a connection, of which Consul takes 200 from
/// one address (`http_max_conns_per_client`). They are counted apart: whose node names are asked for, peers say.
const CERTIFICATES_MAX: usize = 80;
const SERVICES_MAX: usize = 48;
/// Clients' own tokens that are kept.
const TOKENS_MAX: usize = 1024;
/// A watch that nobody has asked for so long ends.
const IDLE: Duration = Duration::from_secs(600);
/// How often idle watches are looked for.
const IDLE_LOOK: Duration = Duration::from_secs(30);
/// What failed is asked for anew after this, when somebody wants it.
const RETRY: Duration = Duration::from_secs(1);
/// Hexadecimal digits of an agent's id.
const AGENT_ID_DIGITS: usize = 16;

/// One agent's membership in the mesh of a Consul. It ends when this is dropped; entries that are not deregistered
/// by then become critical and are forgotten by Consul.
pub struct ConsulMesh {
    client: Arc<Client>,
    tokens: Arc<Tokens>,
    certificates: Arc<certificates::Certificates>,
    catalogue: Arc<catalogue::Catalogue>,
    authorizer: Authorizer,
    registrar: Arc<Registrar>,
    advertise: SocketAddr,
    _stop: DropGuard,
}

impl std::fmt::Debug for ConsulMesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsulMesh")
            .field("address", &format_args!("{}", self.client.settings().address))
            .finish_non_exhaustive()
    }
}

impl ConsulMesh {
    /// Joins the mesh. Returns at once, also while Consul is away. Call it within a tokio runtime.
    ///
    /// `agent` is this agent's id ([`ConsulMesh::agent_id`]), `hosts` the host parts of node names that it owns,
    /// `advertise` where it accepts mesh connections.
    ///
    /// # Errors
    /// [`MeshError::Refused`] when a certificate file of the settings cannot be used.
    pub fn open(
        settings: ConsulSettings,
        agent: &str,
        hosts: Vec<String>,
        advertise: SocketAddr,
    ) -> Result<Arc<Self>, MeshError> {
        let mesh = Self::succeed(settings, agent, hosts, advertise)?;
        tokio::spawn(mesh.registrar.clone().keep_all());
        Ok(mesh)
    }

    /// As [`ConsulMesh::open`], in the place of another process of the same id: nothing is kept, nor taken away, before
    /// [`Registration::take_over`].
    ///
    /// # Errors
    /// As there.
    pub fn succeed(
        settings: ConsulSettings,
        agent: &str,
        hosts: Vec<String>,
        advertise: SocketAddr,
    ) -> Result<Arc<Self>, MeshError> {
        let client = Arc::new(Client::new(settings)?);
        let tokens = Arc::<Tokens>::default();
        let stop = CancellationToken::new();
        let certificates = Arc::new(certificates::Certificates::new(
            client.clone(),
            tokens.clone(),
            Slots::new(CERTIFICATES_MAX),
        ));
        let catalogue = Arc::new(catalogue::Catalogue::new(
            client.clone(),
            Slots::new(SERVICES_MAX),
        ));
        let registrar = Registrar::new(
            client.clone(),
            tokens.clone(),
            catalogue.clone(),
            agent,
            hosts,
            stop.child_token(),
        );
        tokio::spawn(forget_idle(
            certificates.clone(),
            catalogue.clone(),
            registrar.clone(),
            stop.clone(),
        ));
        Ok(Arc::new(Self {
            authorizer: Authorizer::new(client.clone(), tokens.clone()),
            client,
            tokens,
            certificates,
            catalogue,
            registrar,
            advertise,
            _stop: stop.drop_guard(),
        }))
    }

    /// An id that is the same whenever an agent of this user starts in this directory of this host, so that it knows
    /// the entries that it left behind when it was killed: 16 hexadecimal digits.
    pub fn agent_id(dir: &Path) -> String {
        let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
        let uname = rustix::system::uname();
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        let uid = rustix::process::geteuid().as_raw().to_be_bytes();
        let mut text = Vec::new();
        // Containers of one image may share the machine's id, but not the host name.
        for part in [
            machine.trim_ascii(),
            uname.nodename().to_bytes(),
            &uid,
            dir.as_os_str().as_encoded_bytes(),
        ] {
            text.extend_from_slice(&part.len().to_be_bytes());
            text.extend_from_slice(part);
        }
        let digest = ring::digest::digest(&ring::digest::SHA256, &text);
        let hex: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        hex.chars().take(AGENT_ID_DIGITS).collect()
    }
}

async fn forget_idle(
    certificates: Arc<certificates::Certificates>,
    catalogue: Arc<catalogue::Catalogue>,
    registrar: Arc<Registrar>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(IDLE_LOOK) => {}
        }
        certificates.forget_idle(|service| registrar.serves(service));
        catalogue.forget_idle();
    }
}

/// Clients' own tokens, by the service that they are for.
#[derive(Default)]
struct Tokens {
    // Held for a look or a change, never across an await.
    tokens: Mutex<HashMap<ServiceName, Token>>,
}

impl Tokens {
    /// The token that a client presented; none stands for the agent's own.
    fn of(&self, service: &ServiceName) -> Option<Token> {
        self.lock().get(service).cloned()
    }

    /// Whether it is another one than before.
    fn set(&self, service: &ServiceName, token: Token) -> Result<bool, MeshError> {
        let mut tokens = self.lock();
        if tokens.len() >= TOKENS_MAX && !tokens.contains_key(service) {
            return Err(MeshError::Refused(format!(
                "{TOKENS_MAX} clients' tokens are kept, the one for {service} is not (TOKENS_MAX)"
            )));
        }
        Ok(tokens.insert(service.clone(), token.clone()) != Some(token))
    }

    fn take_back(&self, service: &ServiceName) {
        self.lock().remove(service);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ServiceName, Token>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Places for watches.
struct Slots {
    free: Arc<Semaphore>,
    count: usize,
}

impl Slots {
    fn new(count: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(count)),
            count,
        }
    }

    fn take(&self) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_owned().ok()
    }
}

/// The right to be a service.
fn write(service: &str) -> String {
    format!("service:write on {service:?}")
}

/// The right to find a service.
fn read(service: &str) -> String {
    format!("service:read on {service:?}")
}

/// The right to see who may reach a service; `service:read` brings it.
fn intentions_read(service: &str) -> String {
    format!("intentions:read (or service:read) on {service:?}")
}

impl Certificates for ConsulMesh {
    fn identity(&self, service: &ServiceName) -> Answer<'_, Arc<Identity>> {
        let service = service.clone();
        Box::pin(async move { self.certificates.identity(&service).await })
    }

    fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        self.certificates.spiffe(service)
    }

    fn roots(&self) -> Answer<'_, Vec<rustls::pki_types::CertificateDer<'static>>> {
        let seen = self.certificates.roots();
        let shown = match (seen.value, seen.fault) {
            (Some(roots), _) => Ok(roots.list.iter().map(|root| root.certificate.clone()).collect()),
            (None, fault) => Err(MeshError::Unavailable(format!(
                "no roots of Consul yet: {fault:?}"
            ))),
        };
        Box::pin(std::future::ready(shown))
    }

    fn present_token(&self, service: &ServiceName, token: Token) -> Answer<'_, ()> {
        let service = service.clone();
        Box::pin(async move {
            if self.tokens.of(&service).as_ref() == Some(&token) {
                return Ok(());
            }
            self.certificates.try_token(&service, &token).await?;
            if self.tokens.set(&service, token)? {
                self.certificates.forget(&service);
                self.registrar.refresh_soon(&service);
            }
            Ok(())
        })
    }
}

impl Catalogue for ConsulMesh {
    fn node(&self, node: &str) -> Answer<'_, Option<Instance>> {
        let node = node.to_owned();
        Box::pin(async move { self.catalogue.node(&node).await })
    }

    fn instances(&self, service: &ServiceName) -> Answer<'_, Vec<Instance>> {
        let service = service.clone();
        Box::pin(async move { self.catalogue.passing(&service).await })
    }

    fn weights(&self, service: &ServiceName) -> HashMap<String, u32> {
        self.catalogue.weights(service)
    }

    fn present(&self, service: &ServiceName) -> Answer<'_, Present> {
        let service = service.clone();
        Box::pin(async move { self.catalogue.present(&service).await })
    }

    fn nodes(&self) -> Answer<'_, Vec<Instance>> {
        Box::pin(self.catalogue.nodes())
    }

    fn node_services(&self) -> Answer<'_, Vec<ServiceName>> {
        Box::pin(self.catalogue.node_services())
    }

    fn services(&self) -> Answer<'_, Vec<Listed>> {
        Box::pin(self.catalogue.every())
    }
}

impl Authorization for ConsulMesh {
    fn authorize(&self, source: &SpiffeId, target: &ServiceName) -> Answer<'_, Decision> {
        let (source, target) = (source.clone(), target.clone());
        Box::pin(async move {
            let ours = self.certificates.trust_domain()?;
            if source.trust_domain() != ours {
                let rule = format!("{source} is not of the trust domain {ours}");
                return Ok(Decision { allowed: false, rule });
            }
            let here = self.registrar.serves(&target);
            // Consul also answers for what does not exist. Silence about it is no denial: after a loss of Consul's
            // state it is only not there yet.
            if !here && self.catalogue.all(&target).await?.is_empty() {
                return Err(MeshError::Unavailable(format!(
                    "the service {target} has no instance in Consul's catalogue"
                )));
            }
            self.authorizer.decide(&source, &target, here).await
        })
    }

    fn changed(&self) -> Answer<'_, ()> {
        Box::pin(async {
            self.authorizer.changed().await;
            Ok(())
        })
    }

    fn intentions(&self) -> Answer<'_, Intentions> {
        Box::pin(self.authorizer.intentions())
    }

    fn fix(&self, source: &ServiceName, target: &ServiceName) -> String {
        format!("consul intention create -allow {source} {target}")
    }
}

impl Registration for ConsulMesh {
    fn register(&self, entry: &Entry) -> Answer<'_, ()> {
        let entry = entry.clone();
        Box::pin(async move { self.registrar.register(&entry).await })
    }

    fn adopted(&self, id: &str) -> Option<SocketAddr> {
        self.registrar.adopted_address(id)
    }

    fn deregister(&self, id: &str) -> Answer<'_, ()> {
        let id = id.to_owned();
        Box::pin(async move {
            let service = self.registrar.service_of(&id);
            let result = self.registrar.deregister(&id).await;
            // With the last instance go the client's token and what it brought, and the watch of the certificate: who
            // still speaks as this service has it asked for again.
            if let Some(service) = service
                && !self.registrar.serves(&service)
            {
                self.tokens.take_back(&service);
                self.certificates.forget(&service);
            }
            result
        })
    }

    fn set_critical(&self, id: &str, reason: Option<&str>) -> Answer<'_, ()> {
        self.registrar.set_critical(id, reason);
        Box::pin(std::future::ready(Ok(())))
    }

    fn passing(&self, id: &str) -> Answer<'_, ()> {
        let id = id.to_owned();
        Box::pin(async move {
            let service = self.registrar.service_of(&id).ok_or_else(|| {
                MeshError::Refused(format!("{id} is no instance of this agent: register it first"))
            })?;
            let passes = |listed: &Listed| listed.instance.id == id && listed.is_passing();
            self.catalogue.wait(&service, passes).await;
            Ok(())
        })
    }

    fn hand_over(&self) {
        self.registrar.stop.cancel();
    }

    fn take_over(&self, kept: Vec<Kept>) -> Answer<'_, ()> {
        Box::pin(async move {
            for Kept {
                entry,
                token,
                address,
            } in kept
            {
                let service = &entry.instance.service;
                if let Some(token) = token {
                    self.tokens.set(service, token)?;
                    self.certificates.forget(service);
                }
                self.registrar
                    .hold(&entry, self.registrar.current(service), address);
            }
            tokio::spawn(self.registrar.clone().keep_all());
            Ok(())
        })
    }
}

impl Diagnosis for ConsulMesh {
    fn findings(&self) -> BoxFuture<'_, Vec<Finding>> {
        Box::pin(diagnosis::findings(self))
    }
}

#[cfg(test)]
mod tests;

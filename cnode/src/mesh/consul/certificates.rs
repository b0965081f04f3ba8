//! Certificates from Consul's authority: the roots, and a leaf for each service that is in use.
//!
//! A leaf is published only when it names the service and trust domain that it should, goes with its key and is
//! signed by the roots of now. Consul renews leaves well before their end and wakes the watch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::client::{Client, Fault, Reply, Request};
use super::watch::{Seen, watch};
use super::{IDLE, RETRY, Slots, Tokens, write};
use crate::mesh::{Identity, MeshError, ServiceName, SpiffeId, Token};
use crate::proxy::links::unix_now;

/// Most roots that are taken, and most certificates of a chain: rotations leave a few behind.
const ROOTS_MAX: usize = 64;
const CHAIN_MAX: usize = 8;

/// The mesh's authorities.
#[derive(Debug)]
pub(super) struct Roots {
    pub(super) trust_domain: String,
    pub(super) store: Arc<RootCertStore>,
    pub(super) list: Vec<Root>,
}

/// One of them, for people.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) name: String,
    pub(super) active: bool,
    /// End of its validity, unix seconds.
    pub(super) not_after: i64,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RootsAnswer {
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    roots: Option<Vec<RootAnswer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RootAnswer {
    #[serde(default)]
    name: String,
    #[serde(default)]
    active: bool,
    root_cert: String,
}

/// No `Debug`: it holds a key.
#[derive(Default, Deserialize)]
struct LeafAnswer {
    #[serde(rename = "CertPEM", default)]
    certificate: String,
    #[serde(rename = "PrivateKeyPEM", default)]
    key: String,
}

/// The identities of this agent's services.
pub(super) struct Certificates {
    client: Arc<Client>,
    tokens: Arc<Tokens>,
    slots: Slots,
    roots: watch::Receiver<Seen<Arc<Roots>>>,
    // Each is held for a look or a change, never across an await.
    leaves: Mutex<HashMap<ServiceName, Leaf>>,
    scope: Arc<Mutex<Option<Scope>>>,
}

/// Namespace and data centre of this mesh's identities.
type Scope = (String, String);

struct Leaf {
    identity: watch::Receiver<Seen<Arc<Identity>>>,
    began: Instant,
    used: Instant,
}

impl Certificates {
    /// Begins to watch the roots.
    pub(super) fn new(client: Arc<Client>, tokens: Arc<Tokens>, slots: Slots) -> Self {
        let request = Request::get(&["agent", "connect", "ca", "roots"]);
        let roots = watch(client.clone(), request, None, None, read_roots);
        Self {
            client,
            tokens,
            slots,
            roots,
            leaves: Mutex::default(),
            scope: Arc::default(),
        }
    }

    /// Whether this token may be the service.
    pub(super) async fn try_token(&self, service: &ServiceName, token: &Token) -> Result<(), MeshError> {
        let request = leaf_of(service, Some(token.clone()));
        self.client.send(&request).await?;
        Ok(())
    }

    /// What is known of the roots, for people.
    pub(super) fn roots(&self) -> Seen<Arc<Roots>> {
        self.roots.borrow().clone()
    }

    /// The trust domain of now.
    pub(super) fn trust_domain(&self) -> Result<String, MeshError> {
        let seen = self.roots.borrow();
        match (&seen.value, &seen.fault) {
            (Some(roots), _) => Ok(roots.trust_domain.clone()),
            (None, Some(fault)) => Err(fault.clone().into()),
            (None, None) => Err(MeshError::Unavailable(
                "Consul has not told its trust domain yet".to_owned(),
            )),
        }
    }

    pub(super) fn spiffe(&self, service: &ServiceName) -> Result<SpiffeId, MeshError> {
        let trust_domain = self.trust_domain()?;
        let scope = lock(&self.scope).clone().ok_or_else(|| {
            MeshError::Unavailable(
                "Consul has not given a certificate yet, and with it its data centre".to_owned(),
            )
        })?;
        Ok(SpiffeId::scoped(
            &trust_domain,
            &scope.0,
            &scope.1,
            service.clone(),
        ))
    }

    pub(super) async fn identity(&self, service: &ServiceName) -> Result<Arc<Identity>, MeshError> {
        let mut identity = self.follow(service)?;
        let seen = identity.wait_for(Seen::is_known).await;
        let seen = seen.map_err(|_| MeshError::Unavailable("the watch has ended".to_owned()))?;
        let why = || match &seen.fault {
            Some(fault) => fault.to_string(),
            None => "no fault was seen".to_owned(),
        };
        match (&seen.value, &seen.fault) {
            (Some(identity), _) if identity.not_after > unix_now() => Ok(identity.clone()),
            (Some(identity), _) => Err(MeshError::Unavailable(format!(
                "the certificate of {service} expired {} s ago and Consul has given no new one: {}",
                unix_now() - identity.not_after,
                why()
            ))),
            (None, Some(fault)) => Err(fault.clone().into()),
            (None, None) => Err(MeshError::Unavailable(why())),
        }
    }

    /// What is known of the leaves in use, for people.
    pub(super) fn leaves(&self) -> Vec<(ServiceName, Seen<Arc<Identity>>)> {
        let leaves = lock(&self.leaves);
        let seen = |(service, leaf): (&ServiceName, &Leaf)| (service.clone(), leaf.identity.borrow().clone());
        leaves.iter().map(seen).collect()
    }

    /// Another token is to be used for it, or none: what the one before brought is given up.
    pub(super) fn forget(&self, service: &ServiceName) {
        lock(&self.leaves).remove(service);
    }

    /// Ends the watches of services that nobody has asked about for long.
    pub(super) fn forget_idle(&self, keep: impl Fn(&ServiceName) -> bool) {
        lock(&self.leaves).retain(|service, leaf| leaf.used.elapsed() < IDLE || keep(service));
    }

    fn follow(&self, service: &ServiceName) -> Result<watch::Receiver<Seen<Arc<Identity>>>, MeshError> {
        let mut leaves = lock(&self.leaves);
        if let Some(leaf) = leaves.get_mut(service) {
            leaf.used = Instant::now();
            let seen = leaf.identity.borrow();
            // A refusal is not waited out: the right may have been given since.
            let stuck = seen.value.is_none() && seen.fault.is_some() && leaf.began.elapsed() > RETRY;
            if !stuck {
                return Ok(leaf.identity.clone());
            }
        }
        leaves.remove(service);
        let slot = self.slots.take().ok_or_else(|| {
            MeshError::Limit(format!(
                "the certificates of {} services are in use, that of {service} is not taken (CERTIFICATES_MAX)",
                self.slots.count
            ))
        })?;
        let now = Instant::now();
        let identity = self.start(service, slot);
        leaves.insert(
            service.clone(),
            Leaf {
                identity: identity.clone(),
                began: now,
                used: now,
            },
        );
        Ok(identity)
    }

    fn start(
        &self,
        service: &ServiceName,
        slot: OwnedSemaphorePermit,
    ) -> watch::Receiver<Seen<Arc<Identity>>> {
        let request = leaf_of(service, self.tokens.of(service));
        let leaf = watch(self.client.clone(), request, Some(slot), None, read_leaf);
        let (sender, receiver) = watch::channel(Seen {
            value: None,
            fault: None,
            version: 0,
            breaks: 0,
        });
        let (roots, scope, service) = (self.roots.clone(), self.scope.clone(), service.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = publish(&sender, roots, leaf, &service, &scope) => {}
            }
        });
        receiver
    }
}

/// A leaf as Consul gave it, and not believed yet.
struct RawLeaf {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// Puts leaf and roots together whenever one of them changes. Returns when a watch has ended.
async fn publish(
    sender: &watch::Sender<Seen<Arc<Identity>>>,
    mut roots: watch::Receiver<Seen<Arc<Roots>>>,
    mut leaf: watch::Receiver<Seen<Arc<RawLeaf>>>,
    service: &ServiceName,
    scope: &Mutex<Option<Scope>>,
) {
    loop {
        let (roots_now, leaf_now) = (
            roots.borrow_and_update().clone(),
            leaf.borrow_and_update().clone(),
        );
        let fault = roots_now.fault.or(leaf_now.fault);
        let checked = match (&roots_now.value, &leaf_now.value) {
            (Some(roots), Some(leaf)) => Some(check(leaf, roots, service)),
            _ => None,
        };
        match checked {
            Some(Ok((identity, of))) => {
                *lock(scope) = Some(of);
                sender.send_modify(|seen| {
                    seen.value = Some(Arc::new(identity));
                    seen.fault = fault;
                    seen.version += 1;
                });
            }
            Some(Err(text)) => {
                let fault = Fault::Away(format!(
                    "the certificate that Consul gave for {service} is not used: {text}"
                ));
                tracing::warn!(%service, %fault, "a certificate was refused");
                sender.send_modify(|seen| {
                    // The one before holds as long as it was checked against the roots of now.
                    let roots = roots_now.value.as_ref().map(|now| &now.store.roots);
                    let holds = |old: &Arc<Identity>| roots == Some(&old.roots.roots);
                    seen.value = seen.value.take().filter(holds);
                    seen.fault = Some(fault);
                });
            }
            None if fault.is_some() => sender.send_modify(|seen| seen.fault = fault),
            None => {}
        }
        tokio::select! {
            changed = roots.changed() => if changed.is_err() { return },
            changed = leaf.changed() => if changed.is_err() { return },
        }
    }
}

fn read_roots(reply: &Reply) -> Result<Arc<Roots>, Fault> {
    let broken = |text: String| Fault::Away(format!("Consul's roots: {text}"));
    let answer: RootsAnswer = reply.json()?;
    let roots = answer.roots.unwrap_or_default();
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if answer.trust_domain.is_empty() || !answer.trust_domain.bytes().all(lower) {
        return Err(broken(
            "there is no trust domain; is Connect enabled in Consul's servers?".to_owned(),
        ));
    }
    if roots.is_empty() || roots.len() > ROOTS_MAX {
        return Err(broken(format!(
            "{} of them, wanted 1 to {ROOTS_MAX}",
            roots.len()
        )));
    }
    let mut store = RootCertStore::empty();
    let mut list = Vec::new();
    for root in roots {
        for certificate in CertificateDer::pem_slice_iter(root.root_cert.as_bytes()) {
            let certificate = certificate.map_err(|error| broken(error.to_string()))?;
            let (_, parsed) =
                X509Certificate::from_der(&certificate).map_err(|error| broken(error.to_string()))?;
            list.push(Root {
                certificate: certificate.clone(),
                name: super::client::shorten(&root.name),
                active: root.active,
                not_after: parsed.validity().not_after.timestamp(),
            });
            store
                .add(certificate)
                .map_err(|error| broken(error.to_string()))?;
        }
    }
    Ok(Arc::new(Roots {
        trust_domain: answer.trust_domain,
        store: Arc::new(store),
        list,
    }))
}

fn read_leaf(reply: &Reply) -> Result<Arc<RawLeaf>, Fault> {
    let broken = |text: String| Fault::Away(format!("Consul's leaf certificate: {text}"));
    let answer: LeafAnswer = reply.json()?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(answer.certificate.as_bytes()).collect();
    let chain = chain.map_err(|error| broken(error.to_string()))?;
    if chain.is_empty() || chain.len() > CHAIN_MAX {
        return Err(broken(format!(
            "{} certificates, wanted 1 to {CHAIN_MAX}",
            chain.len()
        )));
    }
    // The error of a key tells nothing of the key.
    let key = PrivateKeyDer::from_pem_slice(answer.key.as_bytes())
        .map_err(|_| broken("its key cannot be read".to_owned()))?;
    Ok(Arc::new(RawLeaf { chain, key }))
}

/// Believes a leaf that names the service in our trust domain, is signed by these roots and goes with its key.
fn check(leaf: &RawLeaf, roots: &Roots, service: &ServiceName) -> Result<(Identity, Scope), String> {
    let RawLeaf { chain, key } = leaf;
    let (end, intermediates) = chain.split_first().ok_or("there is none")?;
    let (id, not_after, scope) = named(end)?;
    if id.trust_domain() != roots.trust_domain {
        let wanted = &roots.trust_domain;
        return Err(format!("it is {id}, wanted trust domain {wanted}"));
    }
    if id.service() != service {
        return Err(format!("it is {id}, wanted service {service}"));
    }
    let provider = ring::default_provider();
    let parsed = ParsedCertificate::try_from(end).map_err(|error| error.to_string())?;
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &roots.store,
        intermediates,
        UnixTime::now(),
        provider.signature_verification_algorithms.all,
    )
    .map_err(|error| error.to_string())?;
    // It holds the key against the leaf.
    CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map_err(|error| error.to_string())?;
    let identity = Identity {
        id,
        chain: chain.clone(),
        key: key.clone_key(),
        roots: roots.store.clone(),
        not_after,
    };
    Ok((identity, scope))
}

/// The one name of a leaf, the end of its validity, and the namespace and data centre in that name.
fn named(leaf: &CertificateDer<'_>) -> Result<(SpiffeId, i64, Scope), String> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| error.to_string())?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let [uri] = uris.collect::<Vec<_>>()[..] else {
        return Err("it has not exactly one URI name".to_owned());
    };
    let id: SpiffeId = uri
        .parse()
        .map_err(|error: crate::mesh::NameError| error.to_string())?;
    let parts: Vec<&str> = uri.split('/').collect();
    let [_, _, _, _, namespace, _, datacenter, ..] = parts[..] else {
        return Err(format!("{id} names no data centre"));
    };
    let scope = (namespace.to_owned(), datacenter.to_owned());
    Ok((id, parsed.validity().not_after.timestamp(), scope))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
fn leaf_of(service: &ServiceName, token: Option<Token>) -> Request {
    Request::get(&["agent", "connect", "ca", "leaf", service.as_ref()])
        .token(token)
        .right(write(service.as_ref()))
}

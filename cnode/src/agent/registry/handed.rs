//! Registrations in the hands of a successor of this process.

use std::{io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::{
    Entry, Phase, Registry,
    carrier::{Carried, PortKind},
    creation::Creations,
};
use crate::{
    mesh::{Kept, MeshError},
    proxy::local::{Endpoint, LocalInstance, SECRET_LEN, Secret},
};

/// What counts on over the registrations of all processes of one agent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(in crate::agent) struct Handed {
    creation: u32,
    services: u64,
}

/// One live registration.
#[derive(Serialize, Deserialize)]
pub(in crate::agent) struct HandedInstance {
    /// Its control connection.
    owner: u64,
    uid: u32,
    secret: [u8; SECRET_LEN],
    endpoint: Endpoint,
    kept: Kept,
    /// Its own ports; a descriptor of each goes with it.
    pub(in crate::agent) ports: Vec<PortKind>,
}

/// Registrations, and the listeners of each one's own ports.
pub(in crate::agent) type HandedInstances = Vec<(HandedInstance, Vec<OwnedFd>)>;

/// Its own ports, not yet served.
pub(in crate::agent) struct HandedPorts {
    id: String,
    ports: Vec<(PortKind, OwnedFd)>,
}

impl Registry {
    /// Why these registrations cannot go to a successor of this process.
    ///
    /// # Errors
    /// A text that says what to do.
    pub(in crate::agent) fn can_be_handed(&self) -> Result<(), String> {
        let state = self.lock();
        let has_sidecar = |entry: &&Entry| entry.carried.as_ref().is_some_and(Carried::has_sidecar);
        match state.ids.values().filter(has_sidecar).count() {
            0 => Ok(()),
            sidecars => Err(format!(
                "{sidecars} registrations have a sidecar, which is a child of the process that serves and would lose \
                 its links: stop the agent and start it anew"
            )),
        }
    }

    /// Everything that is live, while no client is served.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::agent) fn handed(&self) -> io::Result<(Handed, HandedInstances)> {
        let state = self.lock();
        let mut instances = Vec::new();
        for (id, entry) in &state.ids {
            let (Phase::Live, Some(kept), Some(local)) = (entry.phase, &entry.kept, self.local.by_id(id))
            else {
                continue;
            };
            let ports = entry.carried.as_ref().map(Carried::handed).transpose()?;
            let (ports, listeners) = ports.unwrap_or_default().into_iter().unzip();
            let handed = HandedInstance {
                owner: entry.owner,
                uid: local.uid,
                secret: *local.secret.expose(),
                endpoint: local.endpoint.clone(),
                kept: Kept {
                    address: self.mesh.adopted(id),
                    ..kept.clone()
                },
                ports,
            };
            instances.push((handed, listeners));
        }
        let handed = Handed {
            creation: state.creations.upcoming(),
            services: state.services,
        };
        Ok((handed, instances))
    }

    /// Knows what a predecessor of this process had registered, whose clients have entered. Nothing is served yet and
    /// the mesh hears nothing: for that, [`Registry::serve_handed`].
    ///
    /// # Errors
    /// A text, when it contradicts itself.
    pub(in crate::agent) fn resume(
        &self,
        handed: Handed,
        instances: HandedInstances,
    ) -> Result<Vec<HandedPorts>, String> {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.creations = Creations::resume(handed.creation);
        state.services = handed.services;
        let mut all = Vec::new();
        for (handed, listeners) in instances {
            let instance = handed.kept.entry.instance.clone();
            let id = instance.id.clone();
            if handed.ports.len() != listeners.len() || state.ids.contains_key(&id) {
                return Err(format!("the registration of {id} does not hold together"));
            }
            let client = state.owners.get_mut(&handed.owner);
            client
                .ok_or_else(|| format!("{id} belongs to a connection that was not handed over"))?
                .registrations += 1;
            let local = LocalInstance {
                instance,
                secret: Secret::from_bytes(handed.secret),
                endpoint: handed.endpoint,
                owner: handed.owner,
                uid: handed.uid,
                sidecar: None,
            };
            self.local.insert(local).map_err(|refusal| refusal.to_string())?;
            let entry = Entry {
                owner: handed.owner,
                phase: Phase::Live,
                kept: Some(handed.kept),
                carried: None,
            };
            state.ids.insert(id.clone(), entry);
            all.push(HandedPorts {
                id,
                ports: handed.ports.into_iter().zip(listeners).collect(),
            });
        }
        Ok(all)
    }

    /// Serves what was resumed, and keeps it in the mesh.
    ///
    /// # Errors
    /// Ports that cannot be served, or what the mesh said; the rest is served all the same.
    pub(in crate::agent) async fn serve_handed(&self, ports: Vec<HandedPorts>) -> Result<(), MeshError> {
        let kept = {
            let mut state = self.lock();
            for HandedPorts { id, ports } in ports {
                let carried = Carried::resume(&self.carriers.proxy, &id, ports);
                let carried = carried.unwrap_or_else(|error| {
                    tracing::error!(id, %error, "its own port cannot be served any more");
                    Carried::default()
                });
                if let Some(entry) = state.ids.get_mut(&id) {
                    entry.carried = Some(carried);
                }
            }
            state
                .ids
                .values()
                .filter_map(|entry| entry.kept.clone())
                .collect()
        };
        self.mesh.take_over(kept).await
    }

    /// The services of what is registered.
    pub(in crate::agent) fn services(&self) -> Vec<crate::mesh::ServiceName> {
        let mut services: Vec<_> = self
            .local
            .all()
            .iter()
            .map(|local| local.instance.service.clone())
            .collect();
        services.sort();
        services.dedup();
        services
    }
}

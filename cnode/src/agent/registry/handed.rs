//! Registrations in the hands of a successor of this process.

use std::{collections::HashMap, io, os::fd::OwnedFd};

use futures::future::join_all;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Phase, Registry,
    carrier::{Carried, FrozenSidecar, PortKind},
    creation::Creations,
    reserved::{HandedReserved, Reserved},
};
use crate::{
    agent::sidecar::HandedSidecar,
    mesh::{Kept, MeshError},
    proxy::local::{Endpoint, LocalInstance, SECRET_LEN, Secret},
};

/// What counts on over the registrations of all processes of one agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::agent) struct Handed {
    creation: u32,
    services: u64,
    #[serde(default)]
    reserved: HandedReserved,
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
    ports: Vec<PortKind>,
    /// Its sidecar, whose files go with it as well.
    #[serde(default)]
    sidecar: Option<HandedSidecar>,
}

impl HandedInstance {
    /// How many open files go with it.
    pub(in crate::agent) fn files(&self) -> usize {
        self.ports.len() + self.sidecar.as_ref().map_or(0, HandedSidecar::files)
    }
}

/// Registrations, and the open files of each.
pub(in crate::agent) type HandedInstances = Vec<(HandedInstance, Vec<OwnedFd>)>;

/// What an instance has for itself, not yet served.
pub(in crate::agent) struct HandedPorts {
    id: String,
    ports: Vec<(PortKind, OwnedFd)>,
    carried: Carried,
    sidecar: Option<(HandedSidecar, Vec<OwnedFd>)>,
}

/// Sidecars by the ids of their instances.
pub(in crate::agent) type FrozenSidecars = HashMap<String, FrozenSidecar>;

impl Registry {
    /// Freezes all sidecars, while no client is served.
    ///
    /// # Errors
    /// A text, when one cannot be.
    pub(in crate::agent) async fn freeze_sidecars(&self) -> Result<FrozenSidecars, String> {
        let freezing: Vec<_> = {
            let state = self.lock();
            let freezing = state.ids.iter().filter_map(|(id, entry)| {
                let freezing = entry.carried.as_ref()?.freezing(id)?;
                let id = id.clone();
                Some(async move { freezing.await.map(|frozen| (id, frozen)) })
            });
            freezing.collect()
        };
        join_all(freezing).await.into_iter().collect()
    }

    /// Everything that is live, while no client is served.
    ///
    /// # Errors
    /// What the system said.
    pub(in crate::agent) fn handed(
        &self,
        sidecars: &FrozenSidecars,
    ) -> io::Result<(Handed, HandedInstances)> {
        let state = self.lock();
        let mut instances = Vec::new();
        for (id, entry) in &state.ids {
            let (Phase::Live, Some(kept), Some(local)) = (entry.phase, &entry.kept, self.local.by_id(id))
            else {
                continue;
            };
            let ports = entry.carried.as_ref().map(Carried::handed).transpose()?;
            let (ports, mut files): (_, Vec<_>) = ports.unwrap_or_default().into_iter().unzip();
            let frozen = sidecars.get(id);
            let (sidecar, of_sidecar) = frozen.map(FrozenSidecar::handed).transpose()?.unwrap_or_default();
            files.extend(of_sidecar);
            let mut kept = kept.clone();
            if let Some(entry) = frozen.and_then(FrozenSidecar::entry) {
                kept.entry.clone_from(entry);
            }
            let handed = HandedInstance {
                owner: entry.owner,
                uid: local.uid,
                secret: *local.secret.expose(),
                endpoint: local.endpoint.clone(),
                kept: Kept {
                    address: self.mesh.adopted(id),
                    ..kept
                },
                ports,
                sidecar,
            };
            instances.push((handed, files));
        }
        let handed = Handed {
            creation: state.creations.upcoming(),
            services: state.services,
            reserved: state.reserved.handed(),
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
        state.reserved = Reserved::resume(handed.reserved);
        let mut all = Vec::new();
        for (handed, mut files) in instances {
            let instance = handed.kept.entry.instance.clone();
            let id = instance.id.clone();
            if handed.files() != files.len() || state.ids.contains_key(&id) {
                return Err(format!("the registration of {id} does not hold together"));
            }
            let client = state.owners.get_mut(&handed.owner);
            let client =
                client.ok_or_else(|| format!("{id} belongs to a connection that was not handed over"))?;
            client.registrations += 1;
            client.user = self.trust.limited(handed.uid);
            let of_sidecar = files.split_off(handed.ports.len());
            let carried = Carried::resume(&self.mesh, &handed.kept.entry);
            let local = LocalInstance {
                instance,
                secret: Secret::from_bytes(handed.secret),
                endpoint: handed.endpoint,
                owner: handed.owner,
                uid: handed.uid,
                sidecar: carried.upstreams(),
            };
            self.local.insert(local).map_err(|refusal| refusal.to_string())?;
            let entry = Entry {
                owner: handed.owner,
                phase: Phase::Live,
                kept: Some(handed.kept),
                carried: None,
                hung: false,
            };
            state.ids.insert(id.clone(), entry);
            all.push(HandedPorts {
                id,
                ports: handed.ports.into_iter().zip(files).collect(),
                carried,
                sidecar: handed.sidecar.map(|sidecar| (sidecar, of_sidecar)),
            });
        }
        Ok(all)
    }

    /// Serves what was resumed, and keeps it in the mesh.
    ///
    /// # Errors
    /// Ports that cannot be served, or what the mesh said; the rest is served all the same.
    pub(in crate::agent) async fn serve_handed(&self, ports: Vec<HandedPorts>) -> Result<(), MeshError> {
        let mut resuming = Vec::new();
        let kept = {
            let mut guard = self.lock();
            let state = &mut *guard;
            for HandedPorts {
                id,
                ports,
                mut carried,
                sidecar,
            } in ports
            {
                if let Err(error) = carried.resume_ports(&self.carriers.proxy, &id, ports) {
                    tracing::error!(id, %error, "its own port cannot be served any more");
                }
                let Some(entry) = state.ids.get_mut(&id) else {
                    continue;
                };
                let client = state.owners.get(&entry.owner);
                if let Some(((sidecar, place), client)) = sidecar.zip(carried.place()).zip(client) {
                    let resume = self
                        .carriers
                        .resume_sidecar(place, sidecar, client.events.clone());
                    resuming.push(async move {
                        if let Err(error) = resume.await {
                            tracing::error!(id, %error, "its sidecar ends: it cannot be kept up any more");
                        }
                    });
                }
                entry.carried = Some(carried);
            }
            state
                .ids
                .values()
                .filter_map(|entry| entry.kept.clone())
                .collect()
        };
        join_all(resuming).await;
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

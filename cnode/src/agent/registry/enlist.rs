//! From a reserved id to a live registration.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    MESH_TIME, Owner, Registry, State, answer,
    carrier::{Carried, Told},
    options::{Options, SidecarKind},
    owner_gone,
    pending::Pending,
    refused, silent,
};
use crate::{
    mesh::{DataPlane, Instance, Kept, SpiffeId},
    proxy::{
        cause::{Cause, Refusal},
        local::{Endpoint, LocalInstance, Secret},
    },
};

/// What is to become a registration.
pub(super) struct Wish {
    pub(super) instance: Instance,
    pub(super) endpoint: Endpoint,
    pub(super) owner: Owner,
    pub(super) options: Options,
}

impl Registry {
    /// From reserved to live: locally first, so that whoever finds it in the mesh can reach it.
    pub(super) async fn enlist(
        self: &Arc<Self>,
        pending: Pending,
        wish: Wish,
    ) -> Result<(Secret, SpiffeId), Refusal> {
        let Wish {
            instance,
            endpoint,
            owner,
            options,
        } = wish;
        if let Some(token) = options.token.clone() {
            answer(self.mesh.present_token(&instance.service, token)).await?;
        }
        let identity = answer(self.mesh.identity(&instance.service)).await?;
        let secret = Secret::generate()
            .map_err(|error| Cause::NotReady.because(format!("the system gave no random bytes: {error}")))?;
        let kind = options.sidecar.as_ref().unwrap_or(&self.carriers.default).clone();
        let mut entry = options.entry(instance, DataPlane::Native);
        let mut carried = self
            .carriers
            .prepare(&self.mesh, &kind, &mut entry, &endpoint)
            .await?;
        self.local.insert(LocalInstance {
            instance: entry.instance.clone(),
            secret: secret.clone(),
            endpoint,
            owner: owner.id,
            uid: owner.peer.uid,
            sidecar: carried.upstreams(),
        })?;
        let id = entry.instance.id.clone();
        let mesh = self.mesh.clone();
        let kept = Kept {
            entry: entry.clone(),
            token: options.token.clone(),
            address: None,
        };
        let mut registering = tokio::spawn(async move { mesh.register(&entry).await });
        match timeout(MESH_TIME, &mut registering).await {
            Ok(Ok(Ok(()))) => {
                let started = self.start(&id, owner, kind, &options, &mut carried).await;
                let live = match started {
                    Ok(()) if pending.to_live(owner.id, kept, carried) => {
                        return Ok((secret, identity.id.clone()));
                    }
                    Ok(()) => owner_gone(),
                    Err(refusal) => refusal,
                };
                self.drop_local(&id);
                tokio::spawn(pending.withdraw());
                Err(live)
            }
            Ok(Ok(Err(error))) => {
                self.drop_local(&id);
                Err(refused(error))
            }
            Ok(Err(error)) => {
                self.drop_local(&id);
                Err(Cause::NotReady.because(error.to_string()))
            }
            Err(_) => {
                self.drop_local(&id);
                // The mesh may still take it. Until that is undone the name is nobody's.
                tokio::spawn(async move {
                    let _ = registering.await;
                    pending.withdraw().await;
                });
                Err(silent())
            }
        }
    }

    /// The mesh knows it: its sidecar starts, and it is waited for.
    async fn start(
        &self,
        id: &str,
        owner: Owner,
        kind: SidecarKind,
        options: &Options,
        carried: &mut Carried,
    ) -> Result<(), Refusal> {
        if options.adopt
            && let Some(address) = self.mesh.adopted(id)
            && address != self.place.inbound
        {
            self.carriers.listen_as_registered(carried, id, address).await?;
        }
        let client = |state: &State| state.owners.get(&owner.id).map(|client| client.events.clone());
        let told = Told {
            events: client(&self.lock()).ok_or_else(owner_gone)?,
            output: options.proxy_output,
            max_restarts: options.max_proxy_restarts,
            token: options.token.clone(),
        };
        self.carriers.start(carried, kind, told).await?;
        self.wait_passing(id, options.wait).await
    }

    /// For as long as the client asked to, which may be not at all.
    async fn wait_passing(&self, id: &str, wait: Option<Duration>) -> Result<(), Refusal> {
        let Some(wait) = wait else { return Ok(()) };
        match timeout(wait, self.mesh.passing(id)).await {
            Ok(passing) => passing.map_err(refused),
            Err(_) => Err(Cause::Timeout.because(format!(
                "{id} was registered, but did not pass its checks within {} ms: see what they say in the mesh",
                wait.as_millis()
            ))),
        }
    }
}

//! Watches of one control connection: which nodes some services have, told whenever that changes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{task::AbortHandle, time::sleep};

use super::{
    args::Args,
    commands::{Client, Context},
    message::{event, map, text},
    outbox::Outbox,
};
use crate::{
    agent::registry::answer,
    mesh::ServiceName,
    proxy::cause::{Cause, Refusal},
};
use meshx_etf::Term;

/// Watches that one control connection may have.
pub const WATCHES_PER_CLIENT_MAX: usize = 16;
/// Services that one watch may be of.
pub const WATCHED_SERVICES_MAX: usize = 64;
/// Nodes that one event tells; further ones, in the order of their names, are left out.
pub const WATCHED_NODES_MAX: usize = 4096;
/// How often what this agent knows of the services is looked at. Consul tells the agent by itself.
const LOOK: Duration = Duration::from_millis(500);
/// The same for all services: Consul is asked each time which have nodes.
const LOOK_AT_ALL: Duration = Duration::from_secs(1);

/// Those of one client, by name; all end when it goes.
#[derive(Debug)]
pub(in crate::agent) struct Watches {
    /// None once the client has gone.
    // Held for a change, never across an await.
    running: Mutex<Option<HashMap<String, Watch>>>,
}

#[derive(Debug)]
struct Watch {
    /// Of all services when there is none.
    services: Vec<ServiceName>,
    /// None while the client is not served.
    task: Option<AbortHandle>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Watches {
    pub(super) fn new() -> Self {
        Self::of(HashMap::new())
    }

    /// Those that a predecessor of this process had, by name.
    pub(super) fn of(all: HashMap<String, Vec<ServiceName>>) -> Self {
        let watch = |(name, services)| (name, Watch { services, task: None });
        Self {
            running: Mutex::new(Some(all.into_iter().map(watch).collect())),
        }
    }

    pub(super) fn close_all(&self) {
        self.lock().take();
    }

    /// Tells nothing more before [`resume`].
    pub(super) fn pause(&self) {
        for watch in self.lock().iter_mut().flat_map(HashMap::values_mut) {
            if let Some(task) = watch.task.take() {
                task.abort();
            }
        }
    }

    /// All, by name, for a successor of this process.
    pub(in crate::agent) fn handed(&self) -> HashMap<String, Vec<ServiceName>> {
        let running = self.lock();
        let all = running.iter().flatten();
        all.map(|(name, watch)| (name.clone(), watch.services.clone()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<String, Watch>>> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one in the place of that of the same name, or only ends that.
    fn replace(&self, name: &str, begin: Option<impl FnOnce() -> Watch>) -> Result<(), Refusal> {
        let mut guard = self.lock();
        let Some(running) = guard.as_mut() else {
            return Err(Cause::InvalidRequest.because("the connection that asked for it has ended"));
        };
        running.remove(name);
        let Some(begin) = begin else { return Ok(()) };
        if running.len() >= WATCHES_PER_CLIENT_MAX {
            return Err(Cause::Limit.because(format!(
                "{WATCHES_PER_CLIENT_MAX} watches of this connection, more are not begun (WATCHES_PER_CLIENT_MAX)"
            )));
        }
        running.insert(name.to_owned(), begin());
        Ok(())
    }
}

/// The command `watch`.
pub(super) fn watch(
    context: &Arc<Context>,
    client: &Arc<Client>,
    outbox: &Outbox,
    args: &Args<'_>,
) -> Result<Term, Refusal> {
    let name = args.text("watch")?;
    let services = args.optional_texts("services", WATCHED_SERVICES_MAX)?;
    let services = services.iter().map(|service| {
        ServiceName::new(service)
            .map_err(|error| Cause::InvalidName.because(format!("services: {service:?}: {error}")))
    });
    let services: Vec<_> = services.collect::<Result<_, _>>()?;
    let all = args.optional_bool("all")?.unwrap_or(false);
    if all && !services.is_empty() {
        return Err(Cause::InvalidRequest.because("services and all: wanted one of them"));
    }
    let is_end = services.is_empty() && !all;
    let begin = || Watch {
        task: Some(begin(context, client, outbox, name, &services)),
        services,
    };
    client.watches.replace(name, (!is_end).then_some(begin))?;
    Ok(map([]))
}

/// Goes on with what was paused, or is a predecessor's.
pub(super) fn resume(context: &Arc<Context>, client: &Arc<Client>, outbox: &Outbox) {
    for (name, watch) in client.watches.lock().iter_mut().flatten() {
        let services = &watch.services;
        let task = &mut watch.task;
        task.get_or_insert_with(|| begin(context, client, outbox, name, services));
    }
}

fn begin(
    context: &Arc<Context>,
    client: &Arc<Client>,
    outbox: &Outbox,
    name: &str,
    services: &[ServiceName],
) -> AbortHandle {
    let (context, client, outbox) = (context.clone(), client.clone(), outbox.clone());
    let (name, services) = (name.to_owned(), services.to_vec());
    tokio::spawn(async move { follow(&context, &client, &outbox, &name, &services).await }).abort_handle()
}

async fn follow(context: &Context, client: &Client, outbox: &Outbox, name: &str, services: &[ServiceName]) {
    let mut told = None;
    loop {
        let nodes = context.in_turn(client, &context.questions, nodes(context, services));
        // What the mesh does not answer is as it was.
        if let Ok(nodes) = nodes.await
            && told.as_ref() != Some(&nodes)
            && !outbox.is_crowded()
        {
            let terms = nodes.iter().map(|((node, service), meta)| {
                let meta = Term::map(meta.iter().map(|(key, value)| (text(key), text(value))));
                map([("node", text(node)), ("service", text(service)), ("meta", meta)])
            });
            let args = map([("watch", text(name)), ("nodes", Term::list(terms))]);
            if let Ok(frame) = event("nodes", args) {
                outbox.send(frame);
            }
            told = Some(nodes);
        }
        sleep(if services.is_empty() { LOOK_AT_ALL } else { LOOK }).await;
    }
}

type Nodes = BTreeMap<(String, ServiceName), BTreeMap<String, String>>;

/// The passing nodes, by name, and their metadata.
async fn nodes(context: &Context, services: &[ServiceName]) -> Result<Nodes, Refusal> {
    let mesh = context.registry.mesh();
    let every = match services {
        [] => answer(mesh.node_services()).await?,
        _ => Vec::new(),
    };
    let mut all = Vec::new();
    for service in services.iter().chain(&every) {
        all.extend(answer(mesh.instances(service)).await?);
    }
    let named = all
        .into_iter()
        .filter_map(|instance| Some(((instance.node?, instance.service), instance.meta)));
    let nodes: Nodes = named.collect();
    Ok(nodes.into_iter().take(WATCHED_NODES_MAX).collect())
}

//! Watches of one control connection: which nodes some services have, told whenever that changes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
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

/// Those of one client, by name; all end when it goes.
#[derive(Debug)]
pub(super) struct Watches {
    /// None once the client has gone.
    // Held for a change, never across an await.
    running: Mutex<Option<HashMap<String, AbortHandle>>>,
}

impl Watches {
    pub(super) fn new() -> Self {
        Self {
            running: Mutex::new(Some(HashMap::new())),
        }
    }

    pub(super) fn close_all(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        running.into_iter().flatten().for_each(|(_, watch)| watch.abort());
    }

    /// Begins one in the place of that of the same name, or only ends that.
    fn replace(&self, name: &str, begin: Option<impl FnOnce() -> AbortHandle>) -> Result<(), Refusal> {
        let mut guard = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(running) = guard.as_mut() else {
            return Err(Cause::InvalidRequest.because("the connection that asked for it has ended"));
        };
        if let Some(before) = running.remove(name) {
            before.abort();
        }
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
    let is_end = services.is_empty();
    let begin = || {
        let (context, client, outbox) = (context.clone(), client.clone(), outbox.clone());
        let name = name.to_owned();
        tokio::spawn(async move { follow(&context, &client, &outbox, &name, &services).await }).abort_handle()
    };
    client.watches.replace(name, (!is_end).then_some(begin))?;
    Ok(map([]))
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
            let terms = nodes
                .iter()
                .map(|(node, service)| map([("node", text(node)), ("service", text(service))]));
            let args = map([("watch", text(name)), ("nodes", Term::list(terms))]);
            if let Ok(frame) = event("nodes", args) {
                outbox.send(frame);
            }
            told = Some(nodes);
        }
        sleep(LOOK).await;
    }
}

/// The passing nodes, by name.
async fn nodes(context: &Context, services: &[ServiceName]) -> Result<Vec<(String, ServiceName)>, Refusal> {
    let mut nodes = Vec::new();
    for service in services {
        let instances = answer(context.registry.mesh().instances(service)).await?;
        let named = instances
            .into_iter()
            .filter_map(|instance| Some((instance.node?, instance.service)));
        nodes.extend(named);
    }
    nodes.sort();
    nodes.dedup();
    nodes.truncate(WATCHED_NODES_MAX);
    Ok(nodes)
}

//! What the mesh must be asked for: asked now and then, shown whenever somebody looks.

use std::sync::{Mutex, PoisonError};

use tokio::time::{sleep, timeout};

use super::{SAMPLE_EVERY, Sources};
use crate::mesh::ServiceName;

/// Services whose certificates are told, in the order of their names.
const SERVICES_MAX: usize = 1024;

/// One look.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    /// Ends of validity, unix seconds.
    pub(super) certificates: Vec<(ServiceName, i64)>,
    /// What the agent has not got yet; none once it was ready.
    pub(super) missing: Option<String>,
}

/// The last look.
#[derive(Debug)]
pub(super) struct Samples {
    // Held for a look or a change, never across an await.
    last: Mutex<Sample>,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            last: Mutex::new(Sample {
                certificates: Vec::new(),
                missing: Some("the mesh has not been asked yet".to_owned()),
            }),
        }
    }
}

impl Samples {
    pub(super) fn last(&self) -> Sample {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks for as long as it is polled.
    pub(super) async fn keep(&self, sources: &Sources) {
        loop {
            let before = self.last();
            let next = match timeout(SAMPLE_EVERY, look(sources)).await {
                Ok(next) => next,
                Err(_) => Sample {
                    certificates: before.certificates,
                    missing: Some(format!("the mesh was silent for {SAMPLE_EVERY:?}")),
                },
            };
            // Ready once is ready for good: what was known is used while the mesh is away.
            let missing = before.missing.and(next.missing);
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Sample {
                certificates: next.certificates,
                missing,
            };
            sleep(SAMPLE_EVERY).await;
        }
    }
}

async fn look(sources: &Sources) -> Sample {
    // Keeps the age of the last answer true when nobody else asks anything.
    let answered = sources.mesh.nodes().await;
    let local = sources.proxy.local_instances().into_iter();
    let mut services: Vec<ServiceName> = local.map(|local| local.instance.service.clone()).collect();
    services.sort();
    services.dedup();
    services.truncate(SERVICES_MAX);
    let (mut certificates, mut fault) = (Vec::new(), None);
    for service in services {
        match sources.mesh.identity(&service).await {
            Ok(identity) => certificates.push((service, identity.not_after)),
            Err(error) => fault = Some(format!("no certificate of {service}: {error}")),
        }
    }
    let missing = match answered {
        Err(error) => Some(error.to_string()),
        // One certificate shows that the authority signs; without services there is none to be had.
        Ok(_) if certificates.is_empty() => fault,
        Ok(_) => None,
    };
    Sample {
        certificates,
        missing,
    }
}

//! Live links under rules that change.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use tracing::{info, warn};

use crate::{agent::registry::Registry, mesh::Mesh, proxy::Proxy};

/// Pause before the mesh is asked again for changes of the rules or about a link, after it failed to answer.
const POLICE_RETRY: Duration = Duration::from_secs(1);

/// Holds live links against the rules whenever these change.
pub(super) async fn police(mesh: Arc<dyn Mesh>, proxy: Arc<Proxy>, registry: Arc<Registry>) {
    loop {
        match mesh.changed().await {
            Ok(()) => {
                registry.carriers().rules_changed();
                recheck(&proxy).await;
            }
            Err(error) => {
                warn!(%error, "changes of the rules cannot be seen now");
                sleep(POLICE_RETRY).await;
            }
        }
    }
}

/// Until there is an answer for every link: the change that calls for it is told of once.
async fn recheck(proxy: &Proxy) {
    let mut warned = false;
    loop {
        let result = proxy.recheck().await;
        if result.cut > 0 {
            info!(
                links = result.cut,
                "the rules changed: links that they deny were cut"
            );
        }
        if result.unanswered == 0 {
            return;
        }
        if !warned {
            warn!(
                links = result.unanswered,
                "the rules changed, but for these links the mesh has no answer: asking again until it has"
            );
            warned = true;
        }
        sleep(POLICE_RETRY).await;
    }
}

//! The end of an agent.

use std::time::Duration;

use tokio::time::timeout;
use tracing::{info, warn};

use super::Agent;
use crate::{
    agent::control::commands::Context,
    proxy::{Settings, cause::Cause},
};

/// How long clients' registrations may take to be given up when the agent ends.
pub const STOP_TIME: Duration = Duration::from_secs(8);

impl Agent {
    /// Takes no more connections and leaves the mesh, so that nobody is led here; returns when the last link has ended,
    /// or after [`AgentConfig::drain_time`](crate::agent::config::AgentConfig::drain_time), when those that are left have been told.
    pub async fn drain(&mut self) {
        let Context {
            proxy,
            links,
            registry,
            ..
        } = self.context.as_ref();
        proxy.close();
        self.takeover.abort();
        let leaving = async {
            if self.listeners.is_some() {
                registry.leave_mesh().await;
            }
            proxy.drained().await;
        };
        let live = links.snapshot().len();
        if live > 0 {
            info!(links = live, drain_time = ?self.drain_time, "ending: live links may end by themselves first");
        }
        if timeout(self.drain_time, leaving).await.is_err() {
            let text = format!(
                "the agent ends, {} s after it was told to",
                self.drain_time.as_secs()
            );
            let cut = links.cut_all(Cause::Unreachable, &text);
            info!(links = cut, "links were cut: the agent ends");
            // Their ends close them with the reason.
            let _ = timeout(Settings::default().cut_grace, proxy.drained()).await;
        }
    }

    /// Ends: no new connections, everything deregistered, all files removed.
    pub async fn stop(mut self) {
        self.stop.cancel();
        self.takeover.abort();
        let given_up = async {
            if let Some((_, serving)) = &mut self.epmd {
                let _ = serving.await;
            }
            if let Some(control) = &mut self.control
                && !control.is_finished()
            {
                let _ = control.await;
            }
        };
        if timeout(STOP_TIME, given_up).await.is_err() {
            warn!(
                "some registrations were not given up within {} s",
                STOP_TIME.as_secs()
            );
        }
        self.data.shutdown().await;
        self.context.dir.remove();
        info!("agent ended");
    }
}

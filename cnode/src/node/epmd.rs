//! Being known to an EPMD, and asking one.
//!
//! A name is registered for as long as the connection that registered it is open. EPMD sends nothing more on it, so
//! its end is the end of that EPMD; nodes register again with the next one, as OTP's do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use erl_dist::epmd::{EpmdClient, NodeEntry};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::backoff::{Attempts, Backoff};
use super::carrier::Carrier;
use super::event::NodeEvent;
use super::inner::Inner;

/// What is registered, and where.
#[derive(Debug, Clone)]
pub(crate) struct Registrar {
    pub(crate) epmd: SocketAddr,
    /// The part of the node name before `@`.
    pub(crate) name: String,
    pub(crate) hidden: bool,
    pub(crate) port: u16,
    /// Time for one attempt.
    pub(crate) limit: Duration,
}

/// Open for as long as the name is registered.
#[derive(Debug)]
pub(crate) struct Registration(Compat<TcpStream>);

impl Registrar {
    /// Registers the name. Gives the creation as well.
    pub(crate) async fn register(&self) -> Result<(Registration, u32), String> {
        let entry = if self.hidden {
            NodeEntry::new_hidden(&self.name, self.port)
        } else {
            NodeEntry::new(&self.name, self.port)
        };
        let registering = async {
            let socket = TcpStream::connect(self.epmd)
                .await
                .map_err(|error| error.to_string())?;
            let registered = EpmdClient::new(socket.compat()).register(entry).await;
            registered.map_err(|error| error.to_string())
        };
        let registered = tokio::time::timeout(self.limit, registering).await;
        let (connection, creation) =
            registered.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.limit)))?;
        Ok((Registration(connection), creation.get()))
    }
}

impl Registration {
    /// Waits until this EPMD is gone. One that sends something is none.
    async fn lost(&mut self) {
        let _ = self.0.get_mut().read(&mut [0]).await;
    }
}

/// The port of a node that this EPMD knows.
pub(crate) async fn port_of(epmd: SocketAddr, name: &str) -> Result<Option<u16>, PortError> {
    let socket = TcpStream::connect(epmd).await.map_err(PortError::Connect)?;
    let asked = EpmdClient::new(socket.compat()).get_node(name).await;
    let entry = asked.map_err(|error| PortError::Ask(error.to_string()))?;
    Ok(entry.map(|entry| entry.port))
}

/// Why an EPMD gave no answer.
#[derive(Debug)]
pub(crate) enum PortError {
    Connect(std::io::Error),
    Ask(String),
}

/// Stays registered until the node stops.
pub(crate) async fn keep(inner: Arc<Inner>) {
    let Carrier::Plain(plain) = &inner.carrier else {
        return;
    };
    let Some(mut registration) = plain.take_registration() else {
        return;
    };
    let registrar = &plain.registrar;
    let keeping = async {
        loop {
            registration.lost().await;
            tracing::warn!(epmd = %registrar.epmd, "the epmd is gone, looking for it again");
            inner.tell(NodeEvent::RegistrationLost);
            registration = again(registrar).await;
            tracing::info!(epmd = %registrar.epmd, "registered again");
            inner.tell(NodeEvent::RegisteredAgain);
        }
    };
    inner.stop.run_until_cancelled(keeping).await;
}

async fn again(registrar: &Registrar) -> Registration {
    let mut attempts = Attempts::new(Backoff::default());
    loop {
        tokio::time::sleep(attempts.wait()).await;
        match registrar.register().await {
            // The creation stays: pids of this node that others hold are still those of this node.
            Ok((registration, _)) => return registration,
            Err(error) => tracing::warn!(epmd = %registrar.epmd, error, "not registered yet"),
        }
    }
}

//! A client of an agent's control socket that serves and reaches plain TCP services, as a program in any language may.

use std::net::SocketAddr;
use std::time::Duration;

use meshx::agent::client::{ControlClient, Event};
use meshx::agent::control::message::text;
use meshx_etf::Term;
use tokio::sync::mpsc;

use crate::{Agent, Context, Result};

/// A connection to an agent, which owns what is registered through it.
#[derive(Debug)]
pub struct Control {
    // Dropped first: its tasks live in the runtime.
    client: ControlClient,
    events: mpsc::Receiver<Event>,
    runtime: tokio::runtime::Runtime,
}

/// Arguments of a request: names and values.
pub type Args = Vec<(&'static str, Term)>;

impl Control {
    /// Connects.
    ///
    /// # Errors
    /// When no agent answers.
    pub fn connect(agent: &Agent) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let client = runtime
            .block_on(ControlClient::connect(Some(agent.dir())))
            .context("connect to the agent")?;
        let events = client.events();
        Ok(Self {
            client,
            events,
            runtime,
        })
    }

    /// Asks one thing.
    ///
    /// # Errors
    /// When the agent says no: `cause: text`.
    pub fn request(&self, command: &str, args: Args) -> Result<Term> {
        let args = Term::map(args.into_iter().map(|(name, value)| (Term::atom(name), value)));
        let answer = self.runtime.block_on(self.client.request(command, args));
        answer.map_err(|e| e.to_string())
    }

    /// Registers an instance of `service` that listens at `address`, with further options of a registration
    /// (docs/mesh-protocol.md). Returns its id.
    ///
    /// # Errors
    /// When the agent says no.
    pub fn serve(&self, service: &str, address: SocketAddr, options: Args) -> Result<String> {
        let mut args = vec![("name", text(service)), ("address", tcp(address))];
        args.extend(options);
        let answer = self.request("register_service", args)?;
        let id = answer.map_get("id").and_then(Term::as_str);
        id.map(str::to_owned)
            .ok_or_else(|| format!("no id in {answer:?}"))
    }

    /// Makes a local TCP address behind which `service` is, spoken to as the service `source`.
    ///
    /// # Errors
    /// When the agent says no.
    pub fn reach(&self, service: &str, source: &str, options: Args) -> Result<SocketAddr> {
        let mut args = vec![
            ("service", text(service)),
            ("as", text(source)),
            ("purpose", Term::atom("tcp")),
        ];
        if !options.iter().any(|(name, _)| *name == "address") {
            args.push(("address", Term::atom("tcp")));
        }
        args.extend(options);
        let answer = self.request("connect", args)?;
        let address = answer.map_get("address").and_then(Term::as_tuple);
        let read = address.and_then(|parts| match parts {
            [_, ip, port] => {
                let port = u16::try_from(port.as_int()?).ok()?;
                Some(SocketAddr::new(ip.as_str()?.parse().ok()?, port))
            }
            _ => None,
        });
        read.ok_or_else(|| format!("no address in {answer:?}"))
    }

    /// The next event for which `pick` gives a value.
    ///
    /// # Errors
    /// When none came within `timeout`.
    pub fn wait_event<T>(
        &mut self,
        timeout: Duration,
        mut pick: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T> {
        let events = &mut self.events;
        self.runtime.block_on(async {
            let wanted = async {
                loop {
                    let event = events.recv().await.ok_or("the agent closed the connection")?;
                    if let Some(value) = pick(&event) {
                        return Ok(value);
                    }
                }
            };
            tokio::time::timeout(timeout, wanted)
                .await
                .map_err(|_| format!("no such event within {timeout:?}"))?
        })
    }
}

/// A TCP address as the control protocol writes it.
pub fn tcp(address: SocketAddr) -> Term {
    Term::tuple([
        Term::atom("tcp"),
        text(address.ip().to_string()),
        Term::Int(address.port().into()),
    ])
}

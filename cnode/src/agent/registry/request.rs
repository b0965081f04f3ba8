//! What a client wants to be registered, and what it gets.

use std::net::SocketAddr;

use super::options::Options;
use crate::{
    mesh::{ServiceName, SpiffeId},
    proxy::local::{Endpoint, Secret},
};

/// A node's wish to be registered.
#[derive(Debug, Clone)]
pub struct NodeRequest<'a> {
    /// Its name.
    pub node: &'a str,
    /// Where it takes connections.
    pub listens: NodeListens<'a>,
    /// The one that it runs with, when it was registered with an agent before.
    pub creation: Option<i64>,
    /// The secret that it had from that agent.
    pub secret: Option<Secret>,
    /// A hidden node is registered like any other; the log says so.
    pub hidden: bool,
    /// What its entry says beyond its name.
    pub options: Options,
}

/// Where a node takes connections.
#[derive(Debug, Clone, Copy)]
pub enum NodeListens<'a> {
    /// At a Unix socket in [`Place::vm`](super::Place::vm).
    Socket(&'a str),
    /// At a loopback port, by plain distribution.
    Plain(SocketAddr),
}

/// A registered node.
#[derive(Debug)]
pub struct Node {
    /// Differs from that of every earlier registration.
    pub creation: u32,
    /// Proves its later connections.
    pub secret: Secret,
    /// The service that its certificate names.
    pub service: ServiceName,
    /// The identity in that certificate.
    pub spiffe: SpiffeId,
}

/// A service's wish to be registered.
#[derive(Debug, Clone)]
pub struct ServiceRequest<'a> {
    /// Its name.
    pub name: &'a str,
    /// The instance's; the agent makes one when there is none.
    pub id: Option<&'a str>,
    /// Where it takes connections; the agent chooses a socket when there is none.
    pub address: Option<Endpoint>,
    /// What its entry says beyond its name and address.
    pub options: Options,
}

/// A registered service.
#[derive(Debug)]
pub struct Service {
    /// The instance's id.
    pub id: String,
    /// The service.
    pub service: ServiceName,
    /// The identity in its certificate.
    pub spiffe: SpiffeId,
    /// Where the agent connects to it.
    pub address: Endpoint,
}

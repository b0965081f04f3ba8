//! Data planes of another make (Consul's built-in proxy, Envoy, a Connect-native program): mutual TLS, then the
//! service's own bytes.
//!
//! They ask for nothing but a service, so the link has no name but ours, and a node's name is the one in its handshake.
//! Refused, they see the connection closed; why, only this agent's log and counters know.

use std::sync::Arc;

use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::cause::{Cause, Refusal};
use super::endpoint::accept_frame;
use super::frames::{Duplex, hide_acceptor, read_name, silent, write_all};
use super::inbound::{Decided, Refused, Shown};
use super::links::{LinkGuard, LinkId, Purpose};
use super::local::LocalInstance;
use super::sessions::check_name;
use super::tls::Peer;
use super::wide::Wide;
use super::{Attempt, Proxy, no_such_service};

impl Proxy {
    /// The decision on a link of a foreign client.
    pub(super) async fn decide_foreign(
        &self,
        mut stream: TlsStream<Wide>,
        peer: Result<Peer, Refusal>,
        shown: Shown,
        only: Option<&str>,
        attempt: &mut Attempt,
    ) -> Result<Decided, Refused> {
        let deadline = self.settings.setup_timeout;
        let prepare = self.prepare_foreign(&mut stream, peer, &shown, only, attempt);
        let prepared = timeout(deadline, prepare).await;
        match prepared.unwrap_or_else(|_| Err(silent("the decision on a link", deadline))) {
            Ok((near, link)) => Ok((near, Box::new(stream), link)),
            Err(refusal) => Err(Refused {
                refusal,
                tell: Some((Box::new(stream), Vec::new())),
            }),
        }
    }

    async fn prepare_foreign(
        &self,
        stream: &mut TlsStream<Wide>,
        peer: Result<Peer, Refusal>,
        shown: &Shown,
        only: Option<&str>,
        attempt: &mut Attempt,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        let peer = peer?;
        let link = LinkId::generate()?;
        attempt.link = Some(link);
        let (nodes, mut services): (Vec<_>, Vec<_>) = self
            .instances_here(&shown.service, only)
            .into_iter()
            .partition(|local| local.endpoint.is_node());
        if let (false, true) = (nodes.is_empty(), services.is_empty()) {
            return self
                .foreign_node(stream, &peer, shown, link, &nodes, attempt)
                .await;
        }
        attempt.purpose = Some(Purpose::Tcp);
        // In turn, so to speak.
        let first = getrandom::u32().map_err(|error| Cause::NotReady.because(error.to_string()))? as usize;
        let first = first.checked_rem(services.len()).unwrap_or_default();
        services.rotate_left(first);
        let mut last = None;
        for local in services {
            attempt.target = local.instance.id.clone();
            let remote = peer.id.service().to_string();
            let info = self.inbound_info(link, Purpose::Tcp, (shown, &peer), &local, remote)?;
            match self.admit(info, &local, false).await {
                // Another instance may still answer.
                Err(refusal) if refusal.cause == Cause::Unreachable => last = Some(refusal),
                decided => return decided,
            }
        }
        Err(last.unwrap_or_else(|| no_such_service(&shown.service)))
    }

    /// A node of this agent: whoever dials it says which node he is, and must be that.
    async fn foreign_node(
        &self,
        stream: &mut TlsStream<Wide>,
        peer: &Peer,
        shown: &Shown,
        link: LinkId,
        nodes: &[Arc<LocalInstance>],
        attempt: &mut Attempt,
    ) -> Result<(Box<dyn Duplex>, LinkGuard), Refusal> {
        attempt.purpose = Some(Purpose::Dist);
        let [local] = nodes else {
            return Err(Cause::NoSuchNode.because(format!(
                "{} nodes of {} are here and none was named: dial the port of the one that is meant",
                nodes.len(),
                shown.service
            )));
        };
        attempt.target = local.instance.id.clone();
        let named = read_name(stream, self.settings.frame_timeout).await;
        attempt.is_probe = matches!(&named, Err(left) if left.cause == Cause::Unreachable);
        let (name, mut bytes) = named?;
        attempt.source = format!("{name} ({})", peer.id.service());
        let claimed = self.prove_node(&name, &peer.id).await?;
        let hidden = claimed.cluster() != local.instance.cluster();
        check_name(&mut bytes, &name, hidden)?;
        let info = self.inbound_info(link, Purpose::Dist, (shown, peer), local, name.clone())?;
        let (mut near, link_guard) = self.admit(info, local, true).await?;
        let address = shown.address.to_string();
        let mut first = accept_frame(local, link, &name, Some(&peer.id), &address);
        first.extend_from_slice(&bytes);
        write_all(&mut near, &first, self.settings.frame_timeout).await?;
        if hidden {
            hide_acceptor(stream, &mut near, self.settings.frame_timeout).await?;
        }
        Ok((near, link_guard))
    }
}

//! The decision on a link, step by step, for whoever asks why.
//!
//! The question walks the code of a link, `Proxy::approach`, `Proxy::handshake`, `Proxy::authorize` and
//! `Proxy::reach`, in the order in which a link does, and ends where its request or first bytes would follow. So
//! it ends with the refusal that a link would get.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::cause::{Cause, Refusal};
use super::dial::Secured;
use super::frames::silent;
use super::local::LocalInstance;
use super::upstream::is_of_one_instance;
use super::{Proxy, no_such_service, tls};
use crate::mesh::{Instance, Protocol, ServiceName, SpiffeId};

/// One thing that a link needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Whether it is so.
    pub ok: bool,
    /// What was looked at, in a word.
    pub what: &'static str,
    /// What was seen.
    pub text: String,
    /// What to do; empty when nothing.
    pub fix: String,
}

/// A decision, and how it came.
#[derive(Debug, Clone)]
pub struct Why {
    /// The rules that allow it, or the refusal that a link would get.
    pub decision: Result<String, Refusal>,
    /// All steps, or those up to the first no.
    pub steps: Vec<Step>,
}

/// What is written down while a link is decided: nothing for a link, each step for who asks why.
#[derive(Debug, Default)]
pub(super) struct Trail {
    kept: Option<Vec<Step>>,
    /// What is being looked at.
    at: &'static str,
    /// The command that turns a no of the rule being asked for into a yes.
    fix: String,
}

impl Trail {
    pub(super) fn none() -> Self {
        Self::default()
    }

    fn kept() -> Self {
        Self {
            kept: Some(Vec::new()),
            ..Self::default()
        }
    }

    /// What follows is about this.
    pub(super) fn look(&mut self, what: &'static str) {
        self.at = what;
    }

    /// It is so.
    pub(super) fn pass(&mut self, text: impl FnOnce() -> String) {
        if let Some(steps) = &mut self.kept {
            steps.push(Step {
                ok: true,
                what: self.at,
                text: text(),
                fix: String::new(),
            });
        }
    }

    fn refuse(&mut self, refusal: &Refusal, fix: String) {
        if let Some(steps) = &mut self.kept {
            steps.push(Step {
                ok: false,
                what: self.at,
                text: refusal.text.clone(),
                fix,
            });
        }
    }

    fn len(&self) -> usize {
        self.kept.as_ref().map_or(0, Vec::len)
    }

    /// Another road is tried.
    fn back_to(&mut self, len: usize) {
        if let Some(steps) = &mut self.kept {
            steps.truncate(len);
        }
    }

    /// The texts of the rules that were asked for.
    fn rules(&self) -> String {
        let steps = self.kept.as_deref().unwrap_or_default().iter();
        let rules: Vec<_> = steps
            .filter(|step| step.what == RULE)
            .map(|step| step.text.as_str())
            .collect();
        rules.join("; ")
    }
}

/// The step that asks the mesh for a rule.
pub(super) const RULE: &str = "rule";
/// The step that finds the target.
pub(super) const TARGET: &str = "target";
/// The step that needs the source's certificate, at this end and at the other.
pub(super) const CERTIFICATE: &str = "certificate";
/// The step that connects to the target's agent.
pub(super) const AGENT: &str = "agent";
/// The step that proves the target's agent and its protocol.
pub(super) const TLS: &str = "tls";
/// The step that connects to an instance of this agent.
const ENDPOINT: &str = "endpoint";
const SOURCE: &str = "source";

/// Where a distribution link leads, and between whom. The target's service may dial the source's.
pub(super) struct Approach {
    /// When it is on this agent.
    pub(super) here: Option<Arc<LocalInstance>>,
    pub(super) found: Instance,
    pub(super) near: SpiffeId,
    pub(super) far: SpiffeId,
}

/// Who dials.
struct Source {
    service: ServiceName,
    /// None when this agent is the one that would dial.
    elsewhere: Option<Instance>,
    /// A proxy beside it dials.
    has_sidecar: bool,
}

impl Proxy {
    /// May `from` reach `to`? Both are nodes or services; between nodes both directions count. The text
    /// names the rules that decide.
    ///
    /// # Errors
    /// The refusal that a link between them would get, as far as the mesh knows.
    pub async fn check(&self, from: &str, to: &str) -> Result<String, Refusal> {
        let mut trail = Trail::kept();
        let source = self.source(from, false, &mut trail).await?;
        let target = self.service_of(to).await?;
        let (near, far) = (self.spiffe(&source.service)?, self.spiffe(&target)?);
        trail.look(RULE);
        self.note_rule(&near, &target, &mut trail).await?;
        if from.contains('@') && to.contains('@') {
            self.note_rule(&far, &source.service, &mut trail).await?;
        }
        Ok(trail.rules())
    }

    /// As [`Proxy::check`], and by trying: the other agent is dialled as for a link, up to the request. `may_speak`
    /// says whether the caller may be a service that is not registered with this agent.
    pub async fn why(&self, from: &str, to: &str, may_speak: impl Fn(&ServiceName) -> bool) -> Why {
        let mut trail = Trail::kept();
        let may_speak = ServiceName::new(from).is_ok_and(|service| may_speak(&service));
        let decided = self.walk(from, to, may_speak, &mut trail).await;
        if let Err(refusal) = &decided {
            let name = if trail.at == SOURCE { from } else { to };
            let fix = self.fix(name, &trail, refusal).await;
            trail.refuse(refusal, fix);
        }
        Why {
            decision: decided.map(|()| trail.rules()),
            steps: trail.kept.unwrap_or_default(),
        }
    }

    async fn walk(&self, from: &str, to: &str, may_speak: bool, trail: &mut Trail) -> Result<(), Refusal> {
        let source = self.source(from, may_speak, trail).await?;
        match (from.contains('@'), to.contains('@')) {
            (true, true) => {
                let approach = self.approach(&source.service, to, trail).await?;
                self.try_way(&source, &approach.found, approach.here, trail)
                    .await?;
                trail.look("cookie");
                trail.pass(|| {
                    "agents do not see it: the two nodes compare theirs once they are linked".to_owned()
                });
                Ok(())
            }
            (false, true) => {
                trail.look(TARGET);
                Err(Cause::InvalidRequest.because(format!(
                    "{to} is a node and {from} is none: between them there is no link"
                )))
            }
            (_, false) => self.walk_to_service(&source, to, trail).await,
        }
    }

    async fn walk_to_service(&self, source: &Source, to: &str, trail: &mut Trail) -> Result<(), Refusal> {
        trail.look(TARGET);
        let target = ServiceName::new(to).map_err(|error| Cause::InvalidName.because(error.to_string()))?;
        let candidates = self.candidates(&target, None).await?;
        let count = candidates.len();
        let mark = trail.len();
        let mut last = Err(no_such_service(&target));
        for candidate in candidates {
            trail.back_to(mark);
            trail.look(TARGET);
            trail.pass(|| match count {
                1 => format!("{} at {}", candidate.id, candidate.address),
                _ => format!(
                    "{} at {}, one of {count} instances",
                    candidate.id, candidate.address
                ),
            });
            let here = self.local.by_id(&candidate.id);
            last = self.try_way(source, &candidate, here, trail).await;
            // As for a link, but for a mesh that is silent here.
            match &last {
                Err(refusal) if is_of_one_instance(refusal) && refusal.cause != Cause::NotReady => {}
                _ => break,
            }
        }
        last
    }

    /// From this agent to the instance, as a link goes, and the rule that its agent asks for.
    async fn try_way(
        &self,
        source: &Source,
        target: &Instance,
        here: Option<Arc<LocalInstance>>,
        trail: &mut Trail,
    ) -> Result<(), Refusal> {
        let near = self.spiffe(&source.service)?;
        if let Some(elsewhere) = &source.elsewhere {
            trail.look(AGENT);
            trail.pass(|| {
                format!(
                    "not tried from here: the agent at {} would dial, ask there",
                    elsewhere.address
                )
            });
        } else if source.has_sidecar && here.is_none() {
            trail.look(AGENT);
            trail
                .pass(|| "not tried: the sidecar of the source dials, and verifies the other end".to_owned());
        } else if here.is_none() {
            let secured = self.handshake(&source.service, target, trail).await?;
            trail.look(CERTIFICATE);
            self.accepted(secured, target.protocol).await?;
        }
        trail.look(RULE);
        self.note_rule(&near, &target.service, trail).await?;
        if let Some(local) = here {
            trail.look(ENDPOINT);
            self.reach(&local).await?;
            trail.pass(|| format!("{} is on this agent and takes connections", local.instance.id));
        }
        Ok(())
    }

    /// In TLS 1.3 who dials learns only after its handshake that its certificate was refused. An agent that has no
    /// request to expect any more closes.
    async fn accepted(&self, secured: Secured, protocol: Protocol) -> Result<(), Refusal> {
        let Secured {
            mut stream, address, ..
        } = secured;
        let deadline = self.settings.handshake_timeout;
        let answer = async {
            stream.shutdown().await?;
            stream.read(&mut [0]).await
        };
        match (timeout(deadline, answer).await, protocol) {
            (Ok(Err(error)), _) => match tls::late_refusal(&error) {
                Some(refusal) => {
                    let text = format!("agent at {address}: {}", refusal.text);
                    Err(refusal.cause.because(text))
                }
                None => Ok(()),
            },
            (Err(_), Protocol::Meshx) => Err(silent("the end of a connection", deadline)),
            _ => Ok(()),
        }
    }

    /// The instances that are registered with this agent, by id.
    pub(crate) fn local_instances(&self) -> Vec<Arc<LocalInstance>> {
        let mut all = self.local.all();
        all.sort_by(|a, b| a.instance.id.cmp(&b.instance.id));
        all
    }

    /// Whether an instance of this agent takes connections from it.
    pub(crate) async fn takes_connections(&self, local: &LocalInstance) -> Result<(), Refusal> {
        self.reach(local).await.map(drop)
    }

    /// Whether this agent answers for one of its instances where the others are told to dial it.
    pub(crate) async fn answers(&self, own: &Instance) -> Result<(), Refusal> {
        let secured = self.handshake(&own.service, own, &mut Trail::none()).await?;
        self.accepted(secured, own.protocol).await
    }

    /// A distribution link's target, and the rule that lets its service dial the source's. Either end can do anything
    /// on a link, so both must be allowed; the other direction is asked for by the target's agent.
    pub(super) async fn approach(
        &self,
        source: &ServiceName,
        target: &str,
        trail: &mut Trail,
    ) -> Result<Approach, Refusal> {
        trail.look(TARGET);
        let here = self.local.by_node(target);
        let found = match &here {
            Some(local) => local.instance.clone(),
            None => self.find_node(target).await?,
        };
        let (near, far) = (self.spiffe(source)?, self.spiffe(&found.service)?);
        trail.pass(|| match &here {
            Some(_) => format!("{target} is registered with this agent"),
            None => format!("{target} is registered with the agent at {}", found.address),
        });
        trail.look(RULE);
        self.note_rule(&far, source, trail).await?;
        Ok(Approach {
            here,
            found,
            near,
            far,
        })
    }

    async fn note_rule(
        &self,
        source: &SpiffeId,
        target: &ServiceName,
        trail: &mut Trail,
    ) -> Result<(), Refusal> {
        trail.fix = self.mesh.fix(source.service(), target);
        let rule = self.authorize(source, target).await?;
        trail.pass(|| rule);
        Ok(())
    }

    /// A client may speak as a service that has no instance, when the agent's rules let it.
    async fn source(&self, from: &str, may_speak: bool, trail: &mut Trail) -> Result<Source, Refusal> {
        trail.look(SOURCE);
        let found = match from.contains('@') {
            true => match self.local.by_node(from) {
                Some(local) => local.instance.clone(),
                None => self.find_node(from).await?,
            },
            false => {
                let service = self.service_name(from)?;
                let mut instances = self.local.by_service(&service).into_iter();
                match instances.next() {
                    Some(local) => local.instance.clone(),
                    None if may_speak => {
                        trail.pass(|| format!("{service} is not registered here, but its clients may be it"));
                        return Ok(Source {
                            service,
                            elsewhere: None,
                            has_sidecar: false,
                        });
                    }
                    None => {
                        let instances = self.ask(self.mesh.instances(&service)).await?;
                        instances
                            .into_iter()
                            .next()
                            .ok_or_else(|| no_such_service(&service))?
                    }
                }
            }
        };
        let local = self.local.by_id(&found.id);
        let elsewhere = local.is_none();
        trail.pass(|| match elsewhere {
            true => format!("{from} is registered with the agent at {}", found.address),
            false => format!("{from} is registered with this agent"),
        });
        Ok(Source {
            service: found.service.clone(),
            elsewhere: elsewhere.then_some(found),
            has_sidecar: local.is_some_and(|local| local.sidecar.is_some()),
        })
    }

    /// What to do about a refusal; `name` is the end that it is about.
    async fn fix(&self, name: &str, trail: &Trail, refusal: &Refusal) -> String {
        match refusal.cause {
            Cause::IntentionDenied => trail.fix.clone(),
            Cause::NoSuchNode | Cause::NoSuchService => self.fix_missing(name).await,
            Cause::InvalidName => {
                "name a node as NAME@HOST or a service, both as meshx services shows them".into()
            }
            Cause::InvalidRequest if trail.at == TARGET => {
                "name two nodes, or a service as the target".into()
            }
            Cause::Unreachable | Cause::Timeout if trail.at == ENDPOINT => {
                format!("see that the program behind {name} still runs and listens, or start it anew")
            }
            Cause::Unreachable | Cause::Timeout => {
                "see that this agent runs and its port is open: meshx doctor on its host".into()
            }
            Cause::CertificateExpired => {
                "see the clocks of both hosts, and why it was not renewed: meshx doctor on both".into()
            }
            Cause::UnknownAuthority | Cause::WrongTrustDomain => {
                "both agents must be in one mesh: compare meshx certs on both hosts".into()
            }
            Cause::CertificateInvalid | Cause::WrongService | Cause::NoCertificate => {
                "something else than the target's agent answers there: see who listens at this address".into()
            }
            Cause::VersionMismatch => "upgrade the older of the two agents".into(),
            Cause::NotPermitted => "give the mesh's token this right, or let the agent's user have it".into(),
            _ => "meshx doctor says what is wrong with this agent or the mesh".into(),
        }
    }

    /// It may be there and not pass, or be there in another way than asked for.
    async fn fix_missing(&self, name: &str) -> String {
        let listed = self.ask(self.mesh.services()).await.unwrap_or_default();
        let named = |instance: &Instance| match name.contains('@') {
            true => instance.node.as_deref() == Some(name),
            false => instance.service.as_ref() == name,
        };
        match listed.iter().find(|listed| named(&listed.instance)) {
            Some(listed) if !listed.is_passing() => {
                format!(
                    "{} is registered but does not pass its check: {}",
                    listed.instance.id, listed.status
                )
            }
            Some(listed) if listed.instance.node.is_some() => {
                format!(
                    "{name} has only nodes: ask about one of them, {} for example",
                    listed.instance.id
                )
            }
            _ if name.contains('@') => {
                format!("start it through the agent that owns its host: meshx run {name} -- COMMAND")
            }
            _ => format!("start the program that registers {name}; meshx services lists what is there"),
        }
    }

    async fn service_of(&self, name: &str) -> Result<ServiceName, Refusal> {
        if name.contains('@') {
            return Ok(self.find_node(name).await?.service);
        }
        let service = self.service_name(name)?;
        match self.ask(self.mesh.instances(&service)).await? {
            none if none.is_empty() => Err(no_such_service(&service)),
            _ => Ok(service),
        }
    }

    fn service_name(&self, name: &str) -> Result<ServiceName, Refusal> {
        ServiceName::new(name).map_err(|error| Cause::InvalidName.because(error.to_string()))
    }
}

/// A time in seconds, for people.
pub(crate) fn span(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

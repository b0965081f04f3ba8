//! The commands that show the mesh, and say why it does or does not work.

use futures::FutureExt;
use meshx_etf::Term;

use super::{
    args::{Args, wrong},
    commands::{Client, Context},
    message::{map, text},
};
use crate::{
    agent::{certificate::Certificate, clusters, doctor, registry::answer},
    mesh::{Finding, Listed, Protocol, ServiceName},
    proxy::{cause::Refusal, links::Direction, why::Step},
};

/// `why` and `doctor` that are being answered at a time: they dial, and so may wait for others. Further ones wait.
pub(in crate::agent) const PROBES_MAX: usize = 4;

impl Context {
    pub(super) async fn services(&self) -> Result<Term, Refusal> {
        let own = &self.registry.place().agent;
        let services = answer(self.registry.mesh().services()).await?;
        let services = services.into_iter().map(|listed| listed_term(listed, own));
        Ok(map([("services", Term::list(services))]))
    }

    pub(super) async fn intentions(&self) -> Result<Term, Refusal> {
        let intentions = answer(self.registry.mesh().intentions()).await?;
        let rules = intentions.rules.into_iter().map(|rule| {
            map([
                ("source", text(rule.source)),
                ("destination", text(rule.destination)),
                ("action", text(rule.action)),
            ])
        });
        Ok(map([
            ("default", text(intentions.default)),
            ("intentions", Term::list(rules)),
        ]))
    }

    /// Certificates of the services that are registered here or dial from here, and the roots of the mesh.
    pub(super) async fn certs(&self) -> Result<Term, Refusal> {
        let mesh = self.registry.mesh();
        let services = self.certified();
        let asked = services
            .iter()
            .map(|service| answer(mesh.identity(service)).boxed());
        let mut answers = doctor::some(asked.collect()).await.into_iter();
        let certs: Vec<Term> = services
            .iter()
            .map(|service| match answers.next() {
                Some(Ok(identity)) => {
                    let leaf = identity.chain.first();
                    match leaf.and_then(|leaf| Certificate::read(leaf)) {
                        Some(leaf) => {
                            leaf_term(service, &identity.id.to_string(), &leaf, identity.chain.len())
                        }
                        None => fault_term(service, "it cannot be read"),
                    }
                }
                Some(Err(refusal)) => fault_term(service, &refusal.text),
                None => fault_term(service, "the mesh did not give it in time"),
            })
            .collect();
        let roots = answer(mesh.roots()).await?;
        let roots = roots.iter().filter_map(|root| {
            let root = Certificate::read(root)?;
            Some(map([
                ("subject", text(root.subject)),
                ("not_after", Term::Int(root.not_after)),
            ]))
        });
        Ok(map([("certs", Term::list(certs)), ("roots", Term::list(roots))]))
    }

    fn certified(&self) -> Vec<ServiceName> {
        let registered = self.proxy.local_instances().into_iter();
        let mut services: Vec<_> = registered.map(|local| local.instance.service.clone()).collect();
        let links = self.links.snapshot().into_iter().map(|link| link.info);
        let dialling = links.filter(|info| info.direction == Direction::Outbound);
        services.extend(dialling.map(|info| info.local_spiffe.service().clone()));
        services.sort();
        services.dedup();
        services
    }

    pub(super) async fn why(&self, client: &Client, args: &Args<'_>) -> Result<Term, Refusal> {
        let (from, to) = (args.text("from")?, args.text("to")?);
        let trust = self.registry.trust();
        let may_speak = |service: &ServiceName| trust.check(client.owner.peer, service.as_ref()).is_ok();
        let why = self.proxy.why(from, to, may_speak).await;
        let (cause, said) = match &why.decision {
            Ok(rules) => ("ok", rules.as_str()),
            Err(refusal) => (refusal.cause.as_str(), refusal.text.as_str()),
        };
        Ok(map([
            ("allowed", Term::from(why.decision.is_ok())),
            ("cause", Term::atom(cause)),
            ("text", text(said)),
            ("steps", Term::list(why.steps.iter().map(step_term))),
        ]))
    }

    /// Of everything; or of what a denial would do to clusters.
    pub(super) async fn doctor(&self, args: &Args<'_>) -> Result<Term, Refusal> {
        let registry = &self.registry;
        if let Some(denial) = args.term("deny") {
            let [source, destination] = denied(denial)?;
            let findings =
                clusters::findings(registry.mesh().as_ref(), Some((&source, &destination))).await?;
            return Ok(map([("findings", Term::list(findings.iter().map(finding_term)))]));
        }
        let epmd = self.epmd.as_deref();
        let mesh = registry.mesh().as_ref();
        let mut findings = doctor::findings(registry.place(), &self.proxy, mesh, epmd).await;
        // What the mesh does not answer is told of by the others.
        findings.extend(clusters::findings(mesh, None).await.unwrap_or_default());
        findings.extend(doctor::predecessors(&registry.predecessors().list()));
        Ok(map([("findings", Term::list(findings.iter().map(finding_term)))]))
    }
}

/// `{Source, Destination}`: services, nodes that stand for theirs, or `*`.
fn denied(term: &Term) -> Result<[String; 2], Refusal> {
    let pattern = |term: &Term| match term.as_str()? {
        "*" => Some("*".to_owned()),
        node if node.contains('@') => Some(ServiceName::from_node(node).ok()?.to_string()),
        name => Some(ServiceName::new(name).ok()?.to_string()),
    };
    let pair = match term.as_tuple() {
        Some([source, destination]) => pattern(source).zip(pattern(destination)),
        _ => None,
    };
    let (source, destination) =
        pair.ok_or_else(|| wrong("deny", "{Source, Destination} of services, nodes or *"))?;
    Ok([source, destination])
}

fn listed_term(listed: Listed, own: &str) -> Term {
    let Listed {
        instance,
        status,
        tags,
        weight,
    } = listed;
    let protocol = match instance.protocol {
        Protocol::Meshx => "meshx",
        Protocol::Connect => "connect",
    };
    let mut pairs = vec![
        ("name", text(instance.service)),
        ("id", text(instance.id)),
        ("address", text(instance.address.to_string())),
        ("local", Term::from(instance.agent == own)),
        ("agent", text(instance.agent)),
        ("protocol", Term::atom(protocol)),
        ("status", text(status)),
        ("weight", Term::Int(weight.into())),
        ("tags", Term::list(tags.iter().map(text))),
    ];
    pairs.extend(instance.node.map(|node| ("node", text(node))));
    Term::map(pairs.into_iter().map(|(key, value)| (Term::atom(key), value)))
}

fn leaf_term(service: &ServiceName, spiffe: &str, leaf: &Certificate, chain: usize) -> Term {
    map([
        ("service", text(service)),
        ("spiffe", text(spiffe)),
        ("serial", text(&leaf.serial)),
        ("issuer", text(&leaf.issuer)),
        ("not_before", Term::Int(leaf.not_before)),
        ("not_after", Term::Int(leaf.not_after)),
        ("chain", Term::from(chain as u64)),
    ])
}

/// A service without a certificate.
fn fault_term(service: &ServiceName, fault: &str) -> Term {
    map([("service", text(service)), ("text", text(fault))])
}

fn step_term(step: &Step) -> Term {
    map([
        ("ok", Term::from(step.ok)),
        ("what", text(step.what)),
        ("text", text(&step.text)),
        ("fix", text(&step.fix)),
    ])
}

fn finding_term(finding: &Finding) -> Term {
    map([
        ("level", Term::atom(finding.level.as_str())),
        ("what", text(&finding.what)),
        ("text", text(&finding.text)),
        ("fix", text(&finding.fix)),
    ])
}

//! The metrics page, in Prometheus' text format (version 0.0.4). Every name is explained in `docs/operations.md`.
//!
//! Labels are services, causes and other words of the program. Node names, instances and addresses are none: there is
//! no end to them, and a peer chooses some.

use std::fmt::Write as _;

use super::Sources;
use super::sample::Sample;
use crate::proxy::totals::{PairTotals, Totals};

pub(super) fn render(sources: &Sources, sample: &Sample) -> String {
    let mut page = Page::default();
    page.family("meshx_build_info", GAUGE, "The agent's version, always 1.");
    page.value(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family("meshx_links_max", GAUGE, "Links that may live at a time.");
    page.value(&[], sources.links.max());
    let totals = sources.links.totals();
    links(&mut page, &totals);
    reproofs(&mut page, &totals);
    registrations(&mut page, sources);
    let predecessors = sources.predecessors.list();
    page.family(
        "meshx_predecessors",
        GAUGE,
        "Earlier processes of this agent that hold links still.",
    );
    page.value(&[], predecessors.len());
    page.family("meshx_predecessor_links", GAUGE, "Links that they hold.");
    page.value(&[], predecessors.iter().map(|one| one.links).sum::<usize>());
    page.family(
        "meshx_certificate_expiry_timestamp_seconds",
        GAUGE,
        "End of the certificate of a service that is registered here, in unix seconds.",
    );
    for (service, not_after) in &sample.certificates {
        page.value(&[("service", service.as_ref())], not_after);
    }
    page.family(
        "meshx_mesh_unanswered_total",
        COUNTER,
        "Questions that the mesh did not answer, or not in time.",
    );
    page.value(&[], sources.answers.failed());
    page.family(
        "meshx_mesh_last_answer_age_seconds",
        GAUGE,
        "Seconds since the mesh last answered; absent before the first answer.",
    );
    if let Some(age) = sources.answers.age() {
        page.value(&[], age.as_secs_f64());
    }
    page.text
}

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";

fn links(page: &mut Page, totals: &Totals) {
    page.family("meshx_links", GAUGE, "Live links.");
    for pair in &totals.pairs {
        page.value(&labels(pair), pair.live);
    }
    page.family(
        "meshx_links_opened_total",
        COUNTER,
        "Links that came to carry bytes.",
    );
    for pair in &totals.pairs {
        page.value(&labels(pair), pair.opened);
    }
    page.family(
        "meshx_link_bytes_total",
        COUNTER,
        "Bytes that links carried, those that live included: in is towards this agent's end.",
    );
    for pair in &totals.pairs {
        for (way, bytes) in [("in", pair.bytes_in), ("out", pair.bytes_out)] {
            let mut labels = labels(pair).to_vec();
            labels.push(("way", way));
            page.value(&labels, bytes);
        }
    }
    page.family(
        "meshx_links_cut_total",
        COUNTER,
        "Live links that were cut, by cause.",
    );
    for (cause, count) in &totals.cuts {
        page.value(&[("cause", cause.as_str())], count);
    }
    page.family(
        "meshx_refusals_total",
        COUNTER,
        "Links that were refused, by listener and cause.",
    );
    for (listener, cause, count) in &totals.refusals {
        page.value(
            &[("listener", listener.as_str()), ("cause", cause.as_str())],
            count,
        );
    }
    page.family(
        "meshx_handshakes_total",
        COUNTER,
        "TLS handshakes, by who began them and how they ended.",
    );
    for (side, handshakes) in [("accepted", totals.accepted), ("dialled", totals.dialled)] {
        page.value(&[("side", side), ("result", "done")], handshakes.done);
        page.value(&[("side", side), ("result", "failed")], handshakes.failed);
    }
}

fn reproofs(page: &mut Page, totals: &Totals) {
    page.family(
        "meshx_reproofs_total",
        COUNTER,
        "Live links that this agent dialled and proved anew beside their traffic.",
    );
    let proven = |pair: &&PairTotals| pair.proven > 0;
    for pair in totals.pairs.iter().filter(proven) {
        page.value(&labels(pair), pair.proven);
    }
    page.family(
        "meshx_reproof_round_trip_seconds_total",
        COUNTER,
        "From the requests for those proofs to their replies, together.",
    );
    for pair in totals.pairs.iter().filter(proven) {
        page.value(&labels(pair), pair.proving.as_secs_f64());
    }
    page.family(
        "meshx_reproofs_failed_total",
        COUNTER,
        "Live links that could not be proven anew; they are tried again.",
    );
    page.value(&[], totals.unproven);
}

fn labels(pair: &PairTotals) -> [(&'static str, &str); 4] {
    const OTHER: &str = "other";
    let services = pair.services.as_ref();
    let (source, target) = services.map_or((OTHER, OTHER), |(source, target)| {
        (source.as_ref(), target.as_ref())
    });
    [
        ("source", source),
        ("destination", target),
        ("direction", pair.direction.as_str()),
        ("purpose", pair.purpose.as_str()),
    ]
}

fn registrations(page: &mut Page, sources: &Sources) {
    page.family(
        "meshx_registrations",
        GAUGE,
        "Instances that are registered with this agent.",
    );
    let instances = sources.proxy.local_instances();
    let nodes = instances
        .iter()
        .filter(|local| local.instance.node.is_some())
        .count();
    page.value(&[("kind", "node")], nodes);
    page.value(&[("kind", "service")], instances.len() - nodes);
}

/// A page that grows family by family.
#[derive(Default)]
struct Page {
    text: String,
    name: &'static str,
}

impl Page {
    /// The values that follow are of this name.
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.name = name;
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// Labels are words of this program and names of services, which have nothing to be escaped.
    fn value(&mut self, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.text, "{}{labels} {value}", self.name);
    }
}

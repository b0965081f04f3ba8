//! What rules do to clusters of nodes.
//!
//! A rule that separates two nodes of one cluster does more than it says: OTP's `global` (from OTP 25 on, unless
//! `prevent_overlapping_partitions` is off) makes the others drop links, too, until what is left is connected each to
//! each. Between clusters links are hidden, and a rule disturbs nothing else.

use std::collections::BTreeMap;

use super::registry::answer;
use crate::{
    mesh::{Finding, Instance, Intention, Intentions, Level, Mesh, ServiceName},
    proxy::cause::Refusal,
};

/// Separations that are told one by one.
const TOLD_MAX: usize = 20;
/// Nodes that one finding names.
const NAMED_MAX: usize = 8;

/// The nodes of each service of a cluster.
type Services<'a> = BTreeMap<&'a ServiceName, Vec<&'a str>>;

/// Where the rules separate nodes of one cluster, or would if this denial of `source -> destination` were among them.
pub(super) async fn findings(mesh: &dyn Mesh, denial: Option<(&str, &str)>) -> Result<Vec<Finding>, Refusal> {
    let nodes = answer(mesh.nodes()).await?;
    let now = answer(mesh.intentions()).await?;
    let separated = separations(&nodes, &now);
    let Some((source, destination)) = denial else {
        let text = "no rule separates nodes of one cluster";
        return Ok(told(mesh, "is", separated, text));
    };
    let then = with_denial(&now, source, destination);
    let mut new = separations(&nodes, &then);
    new.retain(|pair| !separated.contains(pair));
    let text = format!("to deny {source} -> {destination} would separate no nodes of one cluster");
    Ok(told(mesh, "would be", new, &text))
}

/// Two services of a cluster, and their nodes, that may not be linked.
#[derive(Debug, PartialEq, Eq)]
struct Separation<'a> {
    cluster: &'a str,
    services: [&'a ServiceName; 2],
    nodes: [Vec<&'a str>; 2],
    /// Source and destination, as the rules deny them.
    denied: [&'a ServiceName; 2],
}

fn separations<'a>(nodes: &'a [Instance], rules: &Intentions) -> Vec<Separation<'a>> {
    let mut clusters: BTreeMap<&str, Services<'a>> = BTreeMap::new();
    for instance in nodes {
        let Some(node) = &instance.node else { continue };
        let services = clusters.entry(instance.cluster()).or_default();
        services.entry(&instance.service).or_default().push(node);
    }
    let mut all = Vec::new();
    for (cluster, services) in &clusters {
        let list: Vec<_> = services.iter().collect();
        for (at, (one, its)) in list.iter().enumerate() {
            for (other, theirs) in &list[at..] {
                // A node alone has nobody of its own service to be separated from.
                if one == other && its.len() < 2 {
                    continue;
                }
                let ways = [[**one, **other], [**other, **one]];
                let Some(denied) = ways.into_iter().find(|[from, to]| is_denied(rules, from, to)) else {
                    continue;
                };
                all.push(Separation {
                    cluster,
                    services: [one, other],
                    nodes: [(*its).clone(), (*theirs).clone()],
                    denied,
                });
            }
        }
    }
    all
}

/// The first rule that fits decides.
fn is_denied(rules: &Intentions, source: &ServiceName, destination: &ServiceName) -> bool {
    let fits = |pattern: &str, name: &ServiceName| pattern == "*" || pattern == name.as_ref();
    let mut fitting = rules.rules.iter();
    let decides = fitting.find(|rule| fits(&rule.source, source) && fits(&rule.destination, destination));
    // What the default is may not be known: then nothing is said of it.
    decides.map_or(rules.default == "deny", |rule| rule.action != "allow")
}

/// The rules with one more, which takes the place of that of the same pair.
fn with_denial(rules: &Intentions, source: &str, destination: &str) -> Intentions {
    let coarseness = |source: &str, destination: &str| (destination == "*", source == "*");
    let mut rules = rules.clone();
    rules
        .rules
        .retain(|rule| (rule.source.as_str(), rule.destination.as_str()) != (source, destination));
    let at = rules
        .rules
        .iter()
        .position(|rule| coarseness(&rule.source, &rule.destination) >= coarseness(source, destination));
    let denial = Intention {
        source: source.to_owned(),
        destination: destination.to_owned(),
        action: "deny".to_owned(),
    };
    rules.rules.insert(at.unwrap_or(rules.rules.len()), denial);
    rules
}

fn told(mesh: &dyn Mesh, is: &str, separations: Vec<Separation<'_>>, well: &str) -> Vec<Finding> {
    let finding = |level, text: String, fix: String| Finding {
        level,
        what: "clusters".to_owned(),
        text,
        fix,
    };
    if separations.is_empty() {
        return vec![finding(Level::Ok, well.to_owned(), String::new())];
    }
    let more = separations.len().saturating_sub(TOLD_MAX);
    let mut findings: Vec<_> = separations
        .into_iter()
        .take(TOLD_MAX)
        .map(|separation| {
            let Separation { cluster, services: [one, other], nodes, denied: [from, to] } = separation;
            let cluster = match cluster {
                "" => "the common cluster".to_owned(),
                label => format!("cluster {label}"),
            };
            let text = format!(
                "{one} ({}) and {other} ({}) of {cluster}: {from} -> {to} {is} denied, so their nodes have no links with \
                 each other, and OTP's global makes nodes of that cluster drop further links (prevent_overlapping_partitions)",
                some(&nodes[0]),
                some(&nodes[1])
            );
            let fix = format!(
                "start the nodes of one of them with a cluster of its own (-meshx_cluster, meshx run --cluster), or allow \
                 both directions: {}; {}",
                mesh.fix(one, other),
                mesh.fix(other, one)
            );
            finding(Level::Warning, text, fix)
        })
        .collect();
    if more > 0 {
        findings.push(finding(
            Level::Warning,
            format!("{more} further pairs of services of one cluster are separated"),
            String::new(),
        ));
    }
    findings
}

fn some(nodes: &[&str]) -> String {
    let named = nodes
        .iter()
        .take(NAMED_MAX)
        .copied()
        .collect::<Vec<_>>()
        .join(" ");
    match nodes.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use crate::mesh::{META_CLUSTER, Protocol};

    fn node(name: &str, cluster: &str) -> Instance {
        let label = (!cluster.is_empty()).then(|| (META_CLUSTER.to_owned(), cluster.to_owned()));
        Instance {
            id: name.to_owned(),
            service: ServiceName::from_node(name).unwrap(),
            node: Some(name.to_owned()),
            agent: "a".to_owned(),
            address: "127.0.0.1:1".parse().unwrap(),
            protocol: Protocol::Meshx,
            meta: label.into_iter().collect(),
        }
    }

    fn rules(default: &str, rules: &[(&str, &str, &str)]) -> Intentions {
        let rule = |(source, destination, action): &(&str, &str, &str)| Intention {
            source: (*source).to_owned(),
            destination: (*destination).to_owned(),
            action: (*action).to_owned(),
        };
        Intentions {
            default: default.to_owned(),
            rules: rules.iter().map(rule).collect(),
        }
    }

    /// The pairs that are separated, as text.
    fn seen(nodes: &[Instance], rules: &Intentions) -> Vec<String> {
        let pair = |one: &Separation<'_>| {
            let [a, b] = one.services;
            let [from, to] = one.denied;
            format!("{} {a} {b} {from}>{to}", one.cluster)
        };
        separations(nodes, rules).iter().map(pair).collect()
    }

    #[test]
    fn only_pairs_of_one_cluster_that_have_nodes_are_separated() {
        let nodes = [
            node("shop@h1", ""),
            node("cart@h1", ""),
            node("cart@h2", ""),
            node("shop@h3", "blue"),
            node("stats@h3", "blue"),
        ];
        let allow = |list: &[(&str, &str, &str)]| seen(&nodes, &rules("allow", list));
        assert!(allow(&[]).is_empty());
        assert_eq!(allow(&[("cart", "shop", "deny")]), [" cart shop cart>shop"]);
        // Between clusters, of a service without nodes, and of one node with itself.
        assert!(allow(&[("stats", "cart", "deny")]).is_empty());
        assert!(allow(&[("search", "cart", "deny")]).is_empty());
        assert!(allow(&[("shop", "shop", "deny")]).is_empty());
        assert_eq!(allow(&[("cart", "cart", "deny")]), [" cart cart cart>cart"]);
        // What is not understood allows nothing.
        assert_eq!(allow(&[("stats", "*", "L7")]), ["blue shop stats stats>shop"]);
        let first = [("shop", "cart", "allow"), ("*", "cart", "deny")];
        assert_eq!(allow(&first), [" cart cart cart>cart"]);
        assert_eq!(seen(&nodes, &rules("deny", &[])).len(), 3);
        assert!(seen(&nodes, &rules("unknown", &[])).is_empty());
    }

    #[test]
    fn a_denial_is_held_against_the_rules_that_are_there() {
        let now = rules(
            "allow",
            &[
                ("shop", "cart", "allow"),
                ("*", "cart", "deny"),
                ("shop", "*", "allow"),
            ],
        );
        let order = |source, destination| {
            let then = with_denial(&now, source, destination);
            let name = |rule: &Intention| format!("{}>{} {}", rule.source, rule.destination, rule.action);
            then.rules.iter().map(name).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(order("shop", "cart"), "shop>cart deny, *>cart deny, shop>* allow");
        assert_eq!(order("*", "cart"), "shop>cart allow, *>cart deny, shop>* allow");
        assert_eq!(
            order("*", "*"),
            "shop>cart allow, *>cart deny, shop>* allow, *>* deny"
        );
        assert_eq!(
            order("stats", "*"),
            "shop>cart allow, *>cart deny, stats>* deny, shop>* allow"
        );
    }
}

//! What an agent finds when it looks at itself: its mesh, its services, its port, its limits.
//!
//! Every look has a time limit, and what could not be looked at is a finding, too.

use std::{collections::HashMap, fs, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use rustix::process::{Resource, geteuid, getrlimit};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    certificate::Certificate,
    registry::{Place, answer},
    takeover::Draining,
};
use crate::{
    epmd::Epmd,
    mesh::{Finding, Level, Listed, Mesh, ServiceName},
    proxy::{
        Proxy,
        links::{LINKS_PER_SERVICE_MAX, unix_now},
        local::LocalInstance,
        peer_uid,
        why::span,
    },
};

/// How long the mesh may take to look at itself.
const MESH_TIME: Duration = Duration::from_secs(8);
/// How long all services together may take.
const SERVICES_TIME: Duration = Duration::from_secs(8);
/// How long the agent's own port may take to answer.
const INBOUND_TIME: Duration = Duration::from_secs(8);
/// Services that are looked at beside each other.
const AT_ONCE: usize = 16;
/// Open files below which the limit is worth a warning: those of one service's links, of two descriptors each.
const FILES_WANTED: u64 = 2 * LINKS_PER_SERVICE_MAX as u64;

/// Everything that can be seen from inside the agent.
pub(super) async fn findings(
    place: &Place,
    proxy: &Proxy,
    mesh: &dyn Mesh,
    epmd: Option<&Epmd>,
) -> Vec<Finding> {
    let instances = proxy.local_instances();
    let (mut found, inbound, services, users) = tokio::join!(
        of_mesh(mesh),
        inbound(place, proxy, &instances),
        services(proxy, mesh, &instances),
        users()
    );
    found.extend([inbound, files(), users]);
    found.extend(epmd.map(Epmd::finding));
    // What is well and the mesh has told of is not told twice.
    let told: Vec<String> = found.iter().map(|finding| finding.what.clone()).collect();
    let again = |what: &str| told.iter().any(|told| told.starts_with(what));
    found.extend(
        services
            .into_iter()
            .filter(|finding| finding.level != Level::Ok || !again(&finding.what)),
    );
    found
}

fn finding(level: Level, what: &str, text: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding {
        level,
        what: what.to_owned(),
        text: text.into(),
        fix: fix.into(),
    }
}

async fn of_mesh(mesh: &dyn Mesh) -> Vec<Finding> {
    timeout(MESH_TIME, mesh.findings()).await.unwrap_or_else(|_| {
        vec![finding(
            Level::Error,
            "mesh",
            format!("silent for {} s", MESH_TIME.as_secs()),
            "see that it runs and can be reached from here; until then known pairs only may talk",
        )]
    })
}

/// Whether the address that other agents are told leads back here.
async fn inbound(place: &Place, proxy: &Proxy, instances: &[Arc<LocalInstance>]) -> Finding {
    let address = place.inbound;
    let answers = async {
        match instances.first() {
            // With a service there is a certificate to know it by.
            Some(local) => proxy
                .answers(&local.instance)
                .await
                .map_err(|refusal| refusal.text),
            None => {
                let connected = TcpStream::connect(address).await;
                connected.map(drop).map_err(|error| format!("{address}: {error}"))
            }
        }
    };
    let silent = |_| Err(format!("{address}: no answer for {} s", INBOUND_TIME.as_secs()));
    match timeout(INBOUND_TIME, answers).await.unwrap_or_else(silent) {
        Ok(()) => finding(Level::Ok, "inbound", format!("{address} is this agent"), ""),
        Err(text) => finding(
            Level::Error,
            "inbound",
            text,
            "other agents dial this address: open the port, or name another one with --advertise",
        ),
    }
}

/// Earlier processes of this agent that hold links still.
pub(super) fn predecessors(list: &[Draining]) -> impl Iterator<Item = Finding> + '_ {
    list.iter().map(|one| {
        let text = format!(
            "a draining predecessor (pid {}, {}) holds {} links; it ends with the last of them",
            one.pid, one.program, one.links
        );
        finding(Level::Ok, "predecessor", text, "")
    })
}

/// Whether it can be told who connects to the listeners of upstreams: else they refuse everybody.
async fn users() -> Finding {
    match timeout(INBOUND_TIME, peer_uid::own()).await {
        Ok(Ok(uid)) if uid == geteuid().as_raw() => finding(Level::Ok, "users", "can be told apart", ""),
        seen => {
            let text = match seen {
                Ok(Ok(uid)) => format!("a connection of this agent is taken for one of uid {uid}"),
                Ok(Err(refusal)) => refusal.text,
                Err(_) => format!("no answer for {} s", INBOUND_TIME.as_secs()),
            };
            let fix = "TCP upstreams refuse everybody: let the agent use netlink's sock_diag \
                       (AF_NETLINK in its unit's RestrictAddressFamilies), or reach services at Unix sockets";
            finding(Level::Error, "users", text, fix)
        }
    }
}

/// Each link takes two descriptors.
fn files() -> Finding {
    let Some(limit) = getrlimit(Resource::Nofile).current else {
        return finding(Level::Ok, "files", "no limit", "");
    };
    let used = fs::read_dir("/proc/self/fd").map_or(0, |open| open.count() as u64);
    let level = match used.saturating_mul(10) >= limit.saturating_mul(9) {
        true => Level::Error,
        false if limit < FILES_WANTED => Level::Warning,
        false => Level::Ok,
    };
    let fix = match level {
        Level::Ok => "",
        _ => "raise the limit that the agent starts with: LimitNOFILE=65536 in its unit, or ulimit -n",
    };
    finding(level, "files", format!("{used} of {limit} are open"), fix)
}

async fn services(proxy: &Proxy, mesh: &dyn Mesh, instances: &[Arc<LocalInstance>]) -> Vec<Finding> {
    let listed = match answer(mesh.services()).await {
        Ok(listed) => listed,
        Err(refusal) => {
            let fix = "what is registered cannot be seen now: see what else is wrong with the mesh";
            return vec![finding(Level::Error, "catalogue", refusal.text, fix)];
        }
    };
    let listed: HashMap<&str, &Listed> = listed
        .iter()
        .map(|listed| (listed.instance.id.as_str(), listed))
        .collect();
    let mut found = certificates(mesh, instances).await;
    let looks = instances.iter().map(|local| {
        let listed = listed.get(local.instance.id.as_str()).copied();
        service(proxy, local, listed).boxed()
    });
    let mut seen = some(looks.collect()).await;
    if seen.len() < instances.len() {
        let text = format!(
            "{} of {} were not looked at in time",
            instances.len() - seen.len(),
            instances.len()
        );
        seen.push(finding(
            Level::Warning,
            "service",
            text,
            "ask again when less of them hang",
        ));
    }
    found.append(&mut seen);
    found
}

/// As many answers as there are within [`SERVICES_TIME`], in order.
pub(super) async fn some<T>(looks: Vec<BoxFuture<'_, T>>) -> Vec<T> {
    let looks = stream::iter(looks).buffered(AT_ONCE);
    looks.take_until(sleep(SERVICES_TIME)).collect().await
}

async fn service(proxy: &Proxy, local: &LocalInstance, listed: Option<&Listed>) -> Finding {
    let id = &local.instance.id;
    let told = |level, text: String, fix: &str| finding(level, "service", format!("{id} {text}"), fix);
    match listed {
        None => {
            return told(
                Level::Error,
                "is not in the catalogue".into(),
                "the agent registers it again when the mesh answers: its log says what went wrong",
            );
        }
        Some(listed) if !listed.is_passing() => {
            return told(
                Level::Error,
                format!("does not pass: {}", listed.status),
                "nobody is led to it: see to its check",
            );
        }
        Some(_) => {}
    }
    match proxy.takes_connections(local).await {
        Ok(()) => told(
            Level::Ok,
            "is registered, passes and takes connections".into(),
            "",
        ),
        Err(refusal) => finding(
            Level::Error,
            "service",
            refusal.text,
            "see that its program still runs and listens, or start it anew",
        ),
    }
}

/// One finding for each service's certificate, and one for the clock that they are held against.
async fn certificates(mesh: &dyn Mesh, instances: &[Arc<LocalInstance>]) -> Vec<Finding> {
    let mut services: Vec<&ServiceName> = instances.iter().map(|local| &local.instance.service).collect();
    services.sort();
    services.dedup();
    let now = unix_now();
    let mut behind = 0;
    let mut found = Vec::new();
    let fetches = services.into_iter().map(|service| {
        let identity = mesh.identity(service);
        async move { (service, answer(identity).await) }.boxed()
    });
    let fetched = some(fetches.collect()).await;
    for (service, identity) in &fetched {
        let leaf = identity.as_ref().map(|identity| {
            let leaf = identity.chain.first();
            leaf.and_then(|leaf| Certificate::read(leaf))
        });
        let leaf = match leaf {
            Ok(Some(leaf)) => leaf,
            Ok(None) => {
                let text = format!("{service} has a certificate that cannot be read");
                found.push(finding(
                    Level::Error,
                    "certificate",
                    text,
                    "see meshx certs, and the mesh's authority",
                ));
                continue;
            }
            Err(refusal) => {
                let text = format!("{service} has none: {}", refusal.text);
                let fix = "its links are refused until the mesh gives one";
                found.push(finding(Level::Error, "certificate", text, fix));
                continue;
            }
        };
        behind = behind.max(leaf.not_before - now);
        found.push(validity(service, &leaf, now));
    }
    if behind > 0 {
        let text = format!(
            "this host's clock is behind the authority's by {} or more",
            span(behind)
        );
        found.push(finding(Level::Error, "clock", text, "set it, by NTP for example"));
    } else if !fetched.is_empty() {
        found.push(finding(
            Level::Ok,
            "clock",
            "within the validity of the certificates",
            "",
        ));
    }
    found
}

fn validity(service: &ServiceName, leaf: &Certificate, now: i64) -> Finding {
    let (left, life) = (leaf.not_after - now, leaf.not_after - leaf.not_before);
    let told = |level, text, fix: &str| finding(level, "certificate", format!("{service} {text}"), fix);
    let renew = "it should have been renewed long ago: see what else is wrong with the mesh, and the clock";
    match left {
        ..=0 => told(Level::Error, format!("expired {} ago", span(-left)), renew),
        _ if left < life / 10 => told(Level::Warning, format!("expires in {}", span(left)), renew),
        _ => told(Level::Ok, format!("is valid for {}", span(left)), ""),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_certificate_is_judged_by_what_is_left_of_its_life() {
        let service = ServiceName::new("shop").unwrap();
        let leaf = Certificate {
            serial: String::new(),
            subject: String::new(),
            issuer: String::new(),
            not_before: 1_000,
            not_after: 101_000,
        };
        for (now, level, text) in [
            (1_000, Level::Ok, "shop is valid for 27 h"),
            (90_999, Level::Ok, "shop is valid for 2 h"),
            (91_001, Level::Warning, "shop expires in 2 h"),
            (101_000, Level::Error, "shop expired 0 s ago"),
            (101_060, Level::Error, "shop expired 60 s ago"),
        ] {
            let finding = validity(&service, &leaf, now);
            assert_eq!((finding.level, finding.text.as_str()), (level, text), "{now}");
            assert_eq!(finding.fix.is_empty(), level == Level::Ok);
        }
    }

    #[test]
    fn open_files_are_counted() {
        let finding = files();
        assert!(
            finding.text.contains(" of ") || finding.text == "no limit",
            "{finding:?}"
        );
    }
}

//! What `meshx doctor` tells of Consul.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};
use time::{Date, Month, OffsetDateTime, Time};

use super::client::{Fault, Reply, Request, shorten};
use super::form::TTL;
use super::settings::TokenSource;
use super::{ConsulMesh, ConsulSettings, intentions_read, read, write};
use crate::mesh::{Finding, Level, ServiceName, Token, split_node};
use crate::proxy::links::unix_now;

/// Oldest Consul that this is written for.
const OLDEST: (u32, u32) = (1, 8);
/// Clocks may differ by this much, in seconds; Consul's certificates begin a minute before they are made.
const SKEW_WARN: i64 = 10;
const SKEW_MAX: i64 = 60;
/// An authority that ends sooner is to be rotated, in seconds.
const ROOT_WARN: i64 = 30 * 86_400;
/// Consul renews a leaf much earlier than this before its end, in seconds.
const LEAF_WARN: i64 = 1800;
/// Services whose rights are looked at.
const SERVICES_MAX: usize = 64;

/// Looks at everything that can be seen from here.
pub(super) async fn findings(mesh: &ConsulMesh) -> Vec<Finding> {
    let mut all = vec![way(mesh), advertised(mesh)];
    all.extend(secrets(mesh.client.settings()));
    let leader = Request::get(&["status", "leader"]);
    match mesh.client.send(&leader).await {
        Err(fault) => all.push(Finding {
            level: Level::Error,
            what: "consul".into(),
            text: fault.to_string(),
            fix: "start Consul's agent, or say where it is with --consul-addr or CONSUL_HTTP_ADDR".into(),
        }),
        Ok(reply) => {
            all.push(leads(&reply));
            all.push(clock(&reply));
            all.push(version(mesh).await);
            all.extend(rights(mesh).await);
            all.extend(registrations(mesh).await);
            all.extend(hosts(mesh).await);
            if let Some(fault) = mesh.authorizer.blind() {
                all.push(Finding {
                    level: Level::Error,
                    what: "intentions".into(),
                    text: format!("changes of them cannot be seen: {fault}"),
                    fix: "until then live links are held against them every 10 s: see to the agent's token"
                        .into(),
                });
            }
        }
    }
    all.extend(roots(mesh));
    all.extend(leaves(mesh));
    all
}

fn ok(what: impl Into<String>, text: impl Into<String>) -> Finding {
    Finding {
        level: Level::Ok,
        what: what.into(),
        text: text.into(),
        fix: String::new(),
    }
}

fn way(mesh: &ConsulMesh) -> Finding {
    let address = &mesh.client.settings().address;
    if address.is_open() {
        return Finding {
            level: Level::Warning,
            what: "address".into(),
            text: format!("{address} is another host and no https: tokens and keys can be read on the way"),
            fix: "use the Consul agent of this host, or https".into(),
        };
    }
    ok("address", address.to_string())
}

/// Files with secrets that every user of this host may read.
fn secrets(settings: &ConsulSettings) -> Vec<Finding> {
    let token = match &settings.token {
        TokenSource::File(path) => Some(path),
        _ => None,
    };
    let files = token
        .into_iter()
        .chain(settings.tls.client.iter().map(|(_, key)| key));
    let open = files.filter(|path| std::fs::metadata(path).is_ok_and(|meta| meta.mode() & 0o004 != 0));
    let finding = |path: &PathBuf| Finding {
        level: Level::Warning,
        what: "secret".into(),
        text: format!("every user of this host may read {}", path.display()),
        fix: format!("chmod o-rwx {}", path.display()),
    };
    open.map(finding).collect()
}

fn advertised(mesh: &ConsulMesh) -> Finding {
    let address = mesh.advertise;
    let ip = address.ip();
    if ip.is_unspecified() {
        return Finding {
            level: Level::Error,
            what: "advertise".into(),
            text: format!("{address} is no address that anybody can dial"),
            fix: "name this host's address with --advertise".into(),
        };
    }
    if ip.is_loopback() {
        return Finding {
            level: Level::Warning,
            what: "advertise".into(),
            text: format!("{address} is reached from this host only"),
            fix: "name this host's address with --bind and --advertise when there are other hosts".into(),
        };
    }
    ok("advertise", address.to_string())
}

fn leads(reply: &Reply) -> Finding {
    match reply.json::<String>() {
        Ok(leader) if !leader.is_empty() => ok("leader", shorten(&leader)),
        _ => Finding {
            level: Level::Error,
            what: "leader".into(),
            text: "Consul's servers have no leader: nothing can be registered or decided".into(),
            fix: "see that a majority of the servers runs: consul operator raft list-peers".into(),
        },
    }
}

fn clock(reply: &Reply) -> Finding {
    let Some(theirs) = reply.date.as_deref().and_then(http_date) else {
        return ok("clock", "Consul does not tell its time");
    };
    let skew = unix_now() - theirs;
    let level = match skew.abs() {
        far if far >= SKEW_MAX => Level::Error,
        some if some >= SKEW_WARN => Level::Warning,
        _ => {
            return ok(
                "clock",
                format!("differs from Consul's by {} s at most", skew.abs() + 1),
            );
        }
    };
    Finding {
        level,
        what: "clock".into(),
        text: format!(
            "is {} s {} Consul's",
            skew.abs(),
            if skew > 0 { "ahead of" } else { "behind" }
        ),
        fix: "set both clocks by NTP: certificates are valid by the clock".into(),
    }
}

/// `Thu, 26 Nov 2026 12:29:09 GMT` (RFC 9110 section 5.6.7) in unix seconds.
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let words: Vec<&str> = text.split([' ', ':']).collect();
    let [_, day, month, year, hour, minute, second, "GMT"] = words[..] else {
        return None;
    };
    let month = MONTHS.iter().zip(1u8..).find(|(name, _)| **name == month)?.1;
    let date = Date::from_calendar_date(
        year.parse().ok()?,
        Month::try_from(month).ok()?,
        day.parse().ok()?,
    );
    let time = Time::from_hms(hour.parse().ok()?, minute.parse().ok()?, second.parse().ok()?);
    Some(OffsetDateTime::new_utc(date.ok()?, time.ok()?).unix_timestamp())
}

async fn version(mesh: &ConsulMesh) -> Finding {
    let request = Request::get(&["agent", "self"]).right("agent:read");
    let told: Result<Value, Fault> = mesh.client.send(&request).await.and_then(|reply| reply.json());
    let told = match told {
        Ok(told) => told,
        // The least rights do not have it, and nothing else needs it.
        Err(Fault::Forbidden(text)) => return ok("version", format!("cannot be seen: {text}")),
        Err(fault) => {
            return Finding {
                level: Level::Warning,
                what: "version".into(),
                text: format!("cannot be seen: {fault}"),
                fix: "see what else is wrong with Consul".into(),
            };
        }
    };
    let version = told
        .pointer("/Config/Version")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => {
            ok("version", format!("Consul {}", shorten(version)))
        }
        _ => Finding {
            level: Level::Warning,
            what: "version".into(),
            text: format!(
                "Consul {:?}, wanted {}.{} or newer",
                shorten(version),
                OLDEST.0,
                OLDEST.1
            ),
            fix: "use a newer Consul".into(),
        },
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Allowed {
    #[serde(default)]
    allow: bool,
}

/// Holds the tokens against the rights that are needed, by the question that Consul's own web page asks.
async fn rights(mesh: &ConsulMesh) -> Vec<Finding> {
    let mut served = mesh.registrar.services();
    served.sort();
    let mut used: Vec<_> = mesh
        .certificates
        .leaves()
        .into_iter()
        .map(|(service, _)| service)
        .collect();
    used.sort();
    let names: Vec<&ServiceName> = served
        .iter()
        .chain(used.iter().filter(|name| !served.contains(name)))
        .collect();
    let mut findings = Vec::new();

    let anything = [Right::new("service", "read", ""), Right::new("node", "read", "")];
    findings.extend(hold(mesh, "the agent's token", None, &anything).await);
    for service in names.into_iter().take(SERVICES_MAX) {
        let name = service.as_ref();
        let token = mesh.tokens.of(service);
        let whose = if token.is_some() {
            "the client's token"
        } else {
            "the agent's token"
        };
        let wanted = [
            Right::new("service", "write", name),
            Right::new("service", "read", name),
            Right::new("intention", "read", name),
        ];
        let found = hold(mesh, whose, token, &wanted).await;
        // One word about ACLs that are off, or a token that is not known, is enough.
        let general = found.iter().any(|finding| finding.what == "acl");
        findings.extend(found);
        if general {
            break;
        }
    }
    let mut seen = Vec::new();
    findings.retain(|finding| {
        let new = !seen.contains(finding);
        seen.push(finding.clone());
        new
    });
    findings
}

struct Right {
    resource: &'static str,
    access: &'static str,
    name: String,
}

impl Right {
    fn new(resource: &'static str, access: &'static str, name: &str) -> Self {
        Self {
            resource,
            access,
            name: name.to_owned(),
        }
    }

    fn in_words(&self) -> String {
        match (self.resource, self.access, self.name.as_str()) {
            ("node", _, _) => "node:read on all nodes".to_owned(),
            (_, _, "") => "service:read on all services".to_owned(),
            ("intention", _, name) => intentions_read(name),
            (_, "write", name) => write(name),
            (_, _, name) => read(name),
        }
    }

    /// A mesh of few services works without the right to see all.
    fn level(&self) -> Level {
        if self.name.is_empty() {
            Level::Warning
        } else {
            Level::Error
        }
    }
}

async fn hold(mesh: &ConsulMesh, whose: &str, token: Option<Token>, wanted: &[Right]) -> Vec<Finding> {
    let own = token.is_none();
    let asked: Vec<_> = wanted
        .iter()
        .map(|right| json!({ "Resource": right.resource, "Access": right.access, "Segment": right.name }))
        .collect();
    let request = Request::post(&["internal", "acl", "authorize"])
        .token(token)
        .body(json!(asked));
    let answer = mesh
        .client
        .send(&request)
        .await
        .and_then(|reply| reply.json::<Vec<Allowed>>());
    let acl = |level, text: String, fix: &str| {
        vec![Finding {
            level,
            what: "acl".into(),
            text,
            fix: fix.into(),
        }]
    };
    match answer {
        Ok(allowed) if allowed.len() == wanted.len() => wanted
            .iter()
            .zip(allowed)
            .map(|(right, allowed)| {
                let words = right.in_words();
                if allowed.allow {
                    return ok("right", format!("{whose} has {words}"));
                }
                Finding {
                    level: right.level(),
                    what: "right".into(),
                    text: format!("{whose} lacks {words}"),
                    fix: "add it to the token's policy (docs/security.md has the least ones)".into(),
                }
            })
            .collect(),
        Ok(_) => acl(
            Level::Warning,
            "rights cannot be seen: Consul's answer is not about them".to_owned(),
            "",
        ),
        Err(Fault::Status { code: 401, .. }) => acl(
            Level::Warning,
            "ACLs are off: every program that reaches Consul may be every service".to_owned(),
            "switch ACLs on with default_policy deny (docs/security.md)",
        ),
        Err(fault @ Fault::UnknownToken(_)) => acl(
            Level::Error,
            fault.to_string(),
            if own {
                "put a token that Consul knows into the token file"
            } else {
                "the service's program is to bring another one (option token; of MeshxConsul X-Consul-Token)"
            },
        ),
        Err(fault) => acl(Level::Warning, format!("rights cannot be seen: {fault}"), ""),
    }
}

async fn registrations(mesh: &ConsulMesh) -> Vec<Finding> {
    match mesh.registrar.lost().await {
        Ok(lost) if lost.is_empty() => {
            vec![ok(
                "registrations",
                format!("all {} are with Consul", mesh.registrar.count()),
            )]
        }
        Ok(lost) => lost
            .into_iter()
            .map(|id| Finding {
                level: Level::Error,
                what: "registrations".into(),
                text: format!("Consul has lost {id}"),
                fix: format!(
                    "it is registered again within {} s unless a right is missing, see the log",
                    TTL.as_secs()
                ),
            })
            .collect(),
        Err(fault) => vec![Finding {
            level: Level::Error,
            what: "registrations".into(),
            text: format!("cannot be seen: {fault}"),
            fix: "see to the agent's token".into(),
        }],
    }
}

/// Other agents with nodes of this one's hosts.
async fn hosts(mesh: &ConsulMesh) -> Vec<Finding> {
    let checks = match mesh.catalogue.checks("").await {
        Ok(checks) => checks,
        Err(error) => {
            return vec![Finding {
                level: Level::Warning,
                what: "hosts".into(),
                text: format!("nodes of other agents cannot be seen: {error}"),
                fix: "see to the agent's token".into(),
            }];
        }
    };
    let mut conflicts: Vec<_> = checks
        .iter()
        .filter(|check| check.passing && check.agent != mesh.registrar.agent())
        .filter_map(|check| {
            let (_, host) = split_node(&check.id).ok()?;
            let shared = mesh.registrar.hosts().iter().any(|own| own == host);
            shared.then(|| format!("agent {} has nodes of {host}, too", shorten(&check.agent)))
        })
        .collect();
    conflicts.sort();
    conflicts.dedup();
    let finding = |text| Finding {
        level: Level::Error,
        what: "hosts".into(),
        text,
        fix: "give one of the two agents other hosts with --host".into(),
    };
    conflicts.into_iter().map(finding).collect()
}

fn roots(mesh: &ConsulMesh) -> Vec<Finding> {
    let seen = mesh.certificates.roots();
    let Some(roots) = seen.value else {
        let text = seen
            .fault
            .map_or_else(|| "not there yet".to_owned(), |fault| fault.to_string());
        return vec![Finding {
            level: Level::Error,
            what: "authority".into(),
            text,
            fix: "see that Connect is enabled in Consul's servers and that Consul can be reached".into(),
        }];
    };
    let mut findings = vec![ok("authority", format!("trust domain {}", roots.trust_domain))];
    for root in &roots.list {
        let left = root.not_after - unix_now();
        let name = format!(
            "{}{}",
            root.name,
            if root.active { "" } else { " (being replaced)" }
        );
        let level = match left {
            ended if ended <= 0 => Level::Error,
            soon if soon < ROOT_WARN && root.active => Level::Warning,
            _ => Level::Ok,
        };
        findings.push(Finding {
            level,
            what: "root".into(),
            text: format!("{name} ends in {}", days(left)),
            fix: match level {
                Level::Ok => String::new(),
                _ => "rotate it: consul connect ca set-config".into(),
            },
        });
    }
    findings
}

fn leaves(mesh: &ConsulMesh) -> Vec<Finding> {
    let mut leaves = mesh.certificates.leaves();
    leaves.sort_by(|(a, _), (b, _)| a.cmp(b));
    let finding = |(service, seen): (
        ServiceName,
        super::watch::Seen<std::sync::Arc<crate::mesh::Identity>>,
    )| {
        let what = format!("certificate of {service}");
        let fault = seen.fault.map(|fault| fault.to_string());
        let left = seen.value.map(|identity| identity.not_after - unix_now());
        match (left, fault) {
            (Some(left), None) if left >= LEAF_WARN => ok(what, format!("ends in {}", days(left))),
            (Some(left), fault) if left > 0 => Finding {
                level: Level::Warning,
                what,
                text: format!(
                    "ends in {}, {}",
                    days(left),
                    fault.unwrap_or_else(|| "and Consul has not renewed it yet".into())
                ),
                fix: "it is renewed when Consul can be reached and the token is good".into(),
            },
            (_, fault) => Finding {
                level: Level::Error,
                what,
                text: fault.unwrap_or_else(|| "not there yet, or expired".into()),
                fix: format!("the token needs {}", write(service.as_ref())),
            },
        }
    };
    leaves.into_iter().map(finding).collect()
}

fn days(seconds: i64) -> String {
    match seconds {
        long if long >= 2 * 86_400 => format!("{} days", long / 86_400),
        some if some >= 7200 => format!("{} hours", some / 3600),
        few => format!("{few} s"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn dates_of_http_are_read() {
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:10 GMT"), Some(10));
        assert_eq!(http_date("Thu, 26 Nov 2026 12:29:09 GMT"), Some(1_795_696_149));
        for bad in [
            "",
            "Thu, 26 Nov 2026 12:29:09 CET",
            "Thu, 40 Nov 2026 12:29:09 GMT",
            "GMT",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }
}

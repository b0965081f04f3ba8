//! Who may talk to whom, by Consul's intentions.
//!
//! Consul decides for each pair (`agent/connect/authorize`). It looks neither at the trust domain nor at whether
//! the target exists; both are held against what we know. The intention that fits the pair is read as well: one
//! that says more than allow or deny means no here, whatever Consul's short answer is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::client::{Client, Fault, Request, shorten};
use super::watch::{Seen, watch};
use super::{Tokens, intentions_read, write};
use crate::mesh::{Decision, Intention, Intentions, MeshError, ServiceName, SpiffeId};

/// How long the last answer for a pair holds while Consul is away.
pub(super) const STALE_MAX: Duration = Duration::from_secs(600);
/// Pairs whose last answer is remembered.
const PAIRS_MAX: usize = 16_384;
/// Intentions that are shown.
const INTENTIONS_MAX: usize = 16_384;
/// The Consul agent answers from a copy of the intentions that follows a moment later than our watch wakes: the
/// pairs are asked about once more after this.
const SETTLE: Duration = Duration::from_secs(1);
/// How often pairs are asked about again while changes cannot be watched.
const POLL: Duration = Duration::from_secs(10);
/// How often, and after what pause, answers that contradict each other are asked for again.
const RETRIES: usize = 4;
const RETRY_PAUSE: Duration = Duration::from_millis(150);
/// Longest rule text, in characters.
const RULE_SHOWN: usize = 160;

/// Fields of an intention that narrow nothing (Consul API, "Intentions"). Any other with a value does.
const KNOWN: [&str; 21] = [
    "ID",
    "Description",
    "SourceNS",
    "SourceName",
    "SourcePartition",
    "DestinationNS",
    "DestinationName",
    "DestinationPartition",
    "SourceType",
    "Action",
    "DefaultAddr",
    "DefaultPort",
    "Meta",
    "Precedence",
    "CreatedAt",
    "UpdatedAt",
    "Hash",
    "CreateIndex",
    "ModifyIndex",
    "LegacyID",
    "LegacyMeta",
];

/// Asks Consul for pairs.
pub(super) struct Authorizer {
    client: Arc<Client>,
    tokens: Arc<Tokens>,
    /// Wakes at every change of any intention. The answer itself is not kept.
    changes: watch::Receiver<Seen<()>>,
    // Each is held for a look or a change, never across an await.
    answered: Mutex<HashMap<(SpiffeId, ServiceName), (Instant, Decision)>>,
    told: Mutex<Told>,
}

/// What `changed` has told of.
#[derive(Default)]
struct Told {
    version: u64,
    again_at: Option<Instant>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AuthorizeAnswer {
    #[serde(default)]
    authorized: bool,
    #[serde(default)]
    reason: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CheckAnswer {
    #[serde(default)]
    allowed: bool,
}

/// An intention as JSON: what is not known of it matters, too.
type Rule = Map<String, Value>;

/// Where a service's permission is asked for.
#[derive(Clone, Copy)]
enum Side {
    /// Served by this agent.
    Here,
    /// Served by another one: its token may do what ours may not.
    There,
}

impl Authorizer {
    /// Begins to watch for changes.
    ///
    /// `connect/intentions/match` of a destination would tell less, but gives no index before Consul 1.9.
    pub(super) fn new(client: Arc<Client>, tokens: Arc<Tokens>) -> Self {
        let request = Request::get(&["connect", "intentions"])
            .large()
            .right(intentions_read("*"));
        let changes = watch(client.clone(), request, None, None, |_| Ok(()));
        Self {
            client,
            tokens,
            changes,
            answered: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// The answer for a pair of this mesh whose target exists; `here` when this agent serves the target.
    pub(super) async fn decide(
        &self,
        source: &SpiffeId,
        target: &ServiceName,
        here: bool,
    ) -> Result<Decision, MeshError> {
        let side = if here { Side::Here } else { Side::There };
        let pair = (source.clone(), target.clone());
        match self.ask(source, target, side).await {
            Ok(decision) => {
                self.remember(pair, decision.clone());
                Ok(decision)
            }
            Err(fault) if fault.is_away() => self.recall(&pair, fault, Instant::now()),
            Err(fault) => {
                lock(&self.answered).remove(&pair);
                Err(fault.into())
            }
        }
    }

    /// Resolves when answers may differ from before.
    pub(super) async fn changed(&self) {
        let mut changes = self.changes.clone();
        let poll = Instant::now() + POLL;
        loop {
            let (version, blind) = {
                let seen = changes.borrow_and_update();
                (
                    seen.version,
                    seen.fault.as_ref().is_some_and(|fault| !fault.is_away()),
                )
            };
            let again = {
                let mut told = lock(&self.told);
                if told.version != version {
                    // The first answer is no change, but what was asked before it may have been.
                    told.version = version;
                    told.again_at = Some(Instant::now() + SETTLE);
                    return;
                }
                match told.again_at {
                    Some(at) if at <= Instant::now() => {
                        told.again_at = None;
                        return;
                    }
                    again => again,
                }
            };
            if blind && poll <= Instant::now() {
                return;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { sleep(POLL).await },
                () = sleep_until(again.unwrap_or(poll)), if blind || again.is_some() => {}
            }
        }
    }

    /// Why changes cannot be seen, when they cannot.
    pub(super) fn blind(&self) -> Option<Fault> {
        self.changes.borrow().fault.clone()
    }

    /// All intentions that the agent's token may read.
    pub(super) async fn intentions(&self) -> Result<Intentions, MeshError> {
        let request = Request::get(&["connect", "intentions"])
            .large()
            .right(intentions_read("*"));
        let rules: Vec<Rule> = self.client.send(&request).await?.json()?;
        let mut rules: Vec<(i64, Intention)> = rules
            .iter()
            .take(INTENTIONS_MAX)
            .map(|rule| {
                let precedence = rule.get("Precedence").and_then(Value::as_i64).unwrap_or_default();
                let action = verdict(rule).map_or_else(|why| why, |allow| word(allow).to_owned());
                let intention = Intention {
                    source: shorten(text(rule, "SourceName")),
                    destination: shorten(text(rule, "DestinationName")),
                    action,
                };
                (precedence, intention)
            })
            .collect();
        rules.sort_by(|(a, _), (b, _)| b.cmp(a));
        Ok(Intentions {
            default: self.default_policy().await,
            rules: rules.into_iter().map(|(_, rule)| rule).collect(),
        })
    }

    /// `allow`, `deny`, or `unknown` without `agent:read`.
    async fn default_policy(&self) -> String {
        let request = Request::get(&["agent", "self"]).right("agent:read");
        let told: Result<Value, Fault> = self.client.send(&request).await.and_then(|reply| reply.json());
        let Ok(told) = told else {
            return "unknown".to_owned();
        };
        // 1.8 has the ACL fields at the top, later versions one level deeper.
        let config = told.get("DebugConfig");
        let field = |name: &str| {
            let config = config?;
            let deeper = config
                .get("ACLResolverSettings")
                .and_then(|deeper| deeper.get(name));
            config.get(name).or(deeper)
        };
        let own = field("DefaultIntentionPolicy")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let enabled = field("ACLsEnabled").and_then(Value::as_bool);
        let acl = field("ACLDefaultPolicy")
            .and_then(Value::as_str)
            .unwrap_or_default();
        match (own, enabled, acl) {
            (policy @ ("allow" | "deny"), _, _) => policy.to_owned(),
            (_, Some(false), _) => "allow".to_owned(),
            (_, Some(true), policy @ ("allow" | "deny")) => policy.to_owned(),
            _ => "unknown".to_owned(),
        }
    }

    async fn ask(&self, source: &SpiffeId, target: &ServiceName, side: Side) -> Result<Decision, Fault> {
        for _ in 0..RETRIES {
            let (short, rules) = tokio::try_join!(self.short(source, target, side), self.rules(target))?;
            if let Some(decision) = combine(&short, &rules, source.service(), target) {
                return Ok(decision);
            }
            sleep(RETRY_PAUSE).await;
        }
        Ok(Decision {
            allowed: false,
            rule: "answers of Consul that contradict each other".to_owned(),
        })
    }

    /// Consul's own yes or no.
    async fn short(
        &self,
        source: &SpiffeId,
        target: &ServiceName,
        side: Side,
    ) -> Result<AuthorizeAnswer, Fault> {
        let authorize = Request::post(&["agent", "connect", "authorize"])
            .token(self.tokens.of(target))
            .right(write(target.as_ref()))
            .body(json!({
                "Target": target,
                "ClientCertURI": source.to_string(),
                "ClientCertSerial": "",
            }));
        match (self.client.send(&authorize).await, side) {
            // It takes the right to be the target. Whoever only dials it may ask whether a rule allows that.
            (Err(Fault::Forbidden(_)), Side::There) => {
                let check = Request::get(&["connect", "intentions", "check"])
                    .query("source", source.service().as_ref())
                    .query("destination", target.as_ref())
                    .right(intentions_read(target.as_ref()));
                let answer: CheckAnswer = self.client.send(&check).await?.json()?;
                Ok(AuthorizeAnswer {
                    authorized: answer.allowed,
                    reason: String::new(),
                })
            }
            (reply, _) => reply?.json(),
        }
    }

    /// The intentions for a destination, the first that fits decides.
    async fn rules(&self, target: &ServiceName) -> Result<Vec<Rule>, Fault> {
        let request = Request::get(&["connect", "intentions", "match"])
            .query("by", "destination")
            .query("name", target.as_ref())
            .token(self.tokens.of(target))
            .large()
            .right(intentions_read(target.as_ref()));
        let matches: HashMap<String, Option<Vec<Rule>>> = self.client.send(&request).await?.json()?;
        let mut matches = matches.into_values();
        match (matches.next(), matches.next()) {
            (Some(rules), None) => Ok(rules.unwrap_or_default()),
            _ => Err(Fault::Away(format!(
                "Consul's intentions for {target} are not about it alone"
            ))),
        }
    }

    pub(super) fn remember(&self, pair: (SpiffeId, ServiceName), decision: Decision) {
        let mut answered = lock(&self.answered);
        if answered.len() >= PAIRS_MAX {
            answered.retain(|_, (at, _)| at.elapsed() < STALE_MAX);
        }
        if answered.len() < PAIRS_MAX || answered.contains_key(&pair) {
            answered.insert(pair, (Instant::now(), decision));
        }
    }

    /// The last answer, unless it is too old `now`.
    pub(super) fn recall(
        &self,
        pair: &(SpiffeId, ServiceName),
        fault: Fault,
        now: Instant,
    ) -> Result<Decision, MeshError> {
        match lock(&self.answered).get(pair) {
            Some((at, decision)) if now.duration_since(*at) < STALE_MAX => Ok(Decision {
                allowed: decision.allowed,
                rule: format!(
                    "{}, as of {} s ago: {fault}",
                    decision.rule,
                    now.duration_since(*at).as_secs()
                ),
            }),
            _ => Err(fault.into()),
        }
    }
}

/// Consul's answer held against the intention that fits. `None` when the two cannot both be of now.
fn combine(
    short: &AuthorizeAnswer,
    rules: &[Rule],
    source: &ServiceName,
    target: &ServiceName,
) -> Option<Decision> {
    let fits = |rule: &&Rule| {
        let named = |field: &str, name: &ServiceName| matches!(text(rule, field), any if any == "*" || any == name.as_ref());
        // A rule about services of another cluster is not about ours.
        named("SourceName", source) && named("DestinationName", target) && is_empty(rule.get("SourcePeer"))
    };
    let Some(rule) = rules.iter().find(fits) else {
        // It says that a rule matched, and there is none now.
        if short.authorized && short.reason.contains("atched") {
            return None;
        }
        let reason = match short.reason.as_str() {
            "" => "Consul's default policy",
            reason => reason,
        };
        return Some(Decision {
            allowed: short.authorized,
            rule: cut(reason),
        });
    };
    let (from, to) = (text(rule, "SourceName"), text(rule, "DestinationName"));
    let decision = |allowed, why: &str| Decision {
        allowed,
        rule: cut(&format!("intention {from} -> {to} {why}")),
    };
    match verdict(rule) {
        Err(why) => Some(decision(false, &why)),
        Ok(false) => Some(decision(false, "deny")),
        Ok(true) if short.authorized => Some(decision(true, "allow")),
        Ok(true) => None,
    }
}

/// Whether a rule allows. An error says why it is not clear, which is no.
fn verdict(rule: &Rule) -> Result<bool, String> {
    if !is_empty(rule.get("Permissions")) {
        return Err("has L7 permissions, which say nothing about plain connections: denied".to_owned());
    }
    let narrowing = |(field, value): &(&String, &Value)| {
        !KNOWN.contains(&field.as_str()) && *field != "SourcePeer" && !is_empty(Some(value))
    };
    if let Some((field, _)) = rule.iter().find(narrowing) {
        return Err(format!(
            "has the field {}, which may narrow it: denied",
            shorten(field)
        ));
    }
    match text(rule, "SourceType") {
        "consul" | "" => {}
        other => return Err(format!("has the source type {}: denied", shorten(other))),
    }
    match text(rule, "Action") {
        "allow" => Ok(true),
        "deny" => Ok(false),
        other => Err(format!("has the action {:?}: denied", shorten(other))),
    }
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Bool(true)) => false,
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(all)) => all.is_empty(),
        Some(Value::Object(all)) => all.is_empty(),
    }
}

fn text<'a>(rule: &'a Rule, field: &str) -> &'a str {
    rule.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn word(allow: bool) -> &'static str {
    if allow { "allow" } else { "deny" }
}

fn cut(rule: &str) -> String {
    shorten(rule).chars().take(RULE_SHOWN).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

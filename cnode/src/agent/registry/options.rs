//! What a registration may ask for beyond its name and address (docs/mesh-protocol.md, "Options of a
//! registration").

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::agent::trust::{Peer, Trust};
use crate::mesh::{DataPlane, Entry, Instance, META_CLUSTER, Token, Weights};
use crate::proxy::cause::{Cause, Refusal};

/// Most tags of an instance.
pub const TAGS_MAX: usize = 64;
/// Most pairs of metadata that a client may give: Consul takes 64, the agent needs some itself.
pub const META_MAX: usize = 56;
/// Longest key of metadata, in bytes (Consul's limit).
pub const META_KEY_MAX: usize = 128;
/// Longest value of metadata, in bytes (Consul's limit).
pub const META_VALUE_MAX: usize = 512;
/// Longest label of a cluster, in bytes.
pub const CLUSTER_MAX: usize = 63;
/// Longest time that a reply may wait for an instance to pass.
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// Shortest time to live of a check: its refreshes must not be what keeps Consul busy.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// Longest time to live of a check, and longest time until a critical instance is forgotten.
pub const TTL_MAX: Duration = Duration::from_secs(86_400);
/// Restarts of a sidecar within a minute, unless told otherwise.
pub const PROXY_RESTARTS: u32 = 5;
/// Most restarts of a sidecar within a minute that may be asked for.
pub const PROXY_RESTARTS_MAX: u32 = 1000;

/// The options of one registration.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Tags.
    pub tags: Vec<String>,
    /// Metadata.
    pub meta: BTreeMap<String, String>,
    /// Label of its cluster.
    pub cluster: Option<String>,
    /// Weights.
    pub weights: Option<Weights>,
    /// Time to live of the agent's check.
    pub ttl: Option<Duration>,
    /// How long it may be critical before the mesh forgets it.
    pub deregister_after: Option<Duration>,
    /// How long the reply waits until the instance passes.
    pub wait: Option<Duration>,
    /// The client's own token for this service.
    pub token: Option<Token>,
    /// Serve what somebody else registered.
    pub adopt: bool,
    /// Take over what somebody else registered.
    pub force: bool,
    /// Who carries its traffic; what the agent was told when there is none.
    pub sidecar: Option<SidecarKind>,
    /// The sidecar's lines are wanted.
    pub proxy_output: bool,
    /// Restarts of the sidecar within a minute.
    pub max_proxy_restarts: u32,
    /// Further fields of a Consul registration, checked.
    pub extra: Map<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tags: Vec::new(),
            meta: BTreeMap::new(),
            cluster: None,
            weights: None,
            ttl: None,
            deregister_after: None,
            wait: None,
            token: None,
            adopt: false,
            force: false,
            sidecar: None,
            proxy_output: false,
            max_proxy_restarts: PROXY_RESTARTS,
            extra: Map::new(),
        }
    }
}

/// What carries an instance's traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SidecarKind {
    /// The agent.
    Native,
    /// Consul's built-in proxy.
    ConnectProxy,
    /// Envoy.
    Envoy,
    /// A proxy of the user's own: program and arguments.
    Command(Vec<String>),
}

impl SidecarKind {
    /// As options name it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::ConnectProxy => "connect_proxy",
            Self::Envoy => "envoy",
            Self::Command(_) => "command",
        }
    }

    /// The kind of this name; a command has none.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Native, Self::ConnectProxy, Self::Envoy]
            .into_iter()
            .find(|kind| kind.as_str() == name)
    }
}

impl Options {
    /// Takes fields of a registration in Consul's own form (a JSON object).
    ///
    /// # Errors
    /// [`Cause::InvalidRequest`] for a field that contradicts the registration or is not known,
    /// [`Cause::NotPermitted`] for one that would let the client act with the rights of Consul or the agent.
    pub fn merge_registration(&mut self, json: &str, name: &str, id: Option<&str>) -> Result<(), Refusal> {
        let bad = |text: String| Cause::InvalidRequest.because(format!("registration: {text}"));
        let fields = match serde_json::from_str(json) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => return Err(bad("wanted a JSON object".into())),
            Err(error) => return Err(bad(format!("not JSON: {error}"))),
        };
        for (key, value) in fields {
            match key.as_str() {
                "Name" | "Service" => same(&key, &value, Some(name))?,
                "ID" => same(&key, &value, id)?,
                // Where it listens is said by `address`; a template names it for Consul's sake.
                "Address" | "Port" | "SocketPath" => {}
                "Tags" => self.tags.extend(strings(&key, value)?),
                "Meta" => self.meta.extend(pairs(&key, value)?),
                "Weights" => self.weights = Some(weights(&value)?),
                "EnableTagOverride" | "TaggedAddresses" => {
                    self.extra.insert(key, value);
                }
                "Check" => self.check(value)?,
                "Checks" => match value {
                    Value::Array(checks) => {
                        for check in checks {
                            self.check(check)?;
                        }
                    }
                    _ => return Err(bad("Checks is no array".into())),
                },
                "Connect" => self.connect(value)?,
                other => {
                    return Err(bad(format!(
                        "{other} is not taken; wanted some of Name, ID, Address, Port, Tags, Meta, Weights, \
                         EnableTagOverride, TaggedAddresses, Checks, Connect"
                    )));
                }
            }
        }
        Ok(())
    }

    /// A check that Consul itself makes.
    fn check(&mut self, check: Value) -> Result<(), Refusal> {
        let bad = |text: &str| Cause::InvalidRequest.because(format!("registration: Checks: {text}"));
        let Value::Object(fields) = &check else {
            return Err(bad("a check is no object"));
        };
        if fields.contains_key("TTL") {
            return Err(bad(
                "a TTL check is the agent's own: its time is the option ttl, leave the check out",
            ));
        }
        match self
            .extra
            .entry("Checks")
            .or_insert_with(|| Value::Array(Vec::new()))
        {
            Value::Array(checks) => checks.push(check),
            _ => return Err(bad("no array")),
        }
        Ok(())
    }

    fn connect(&mut self, connect: Value) -> Result<(), Refusal> {
        let bad = |text: String| Cause::InvalidRequest.because(format!("registration: Connect: {text}"));
        let Value::Object(mut fields) = connect else {
            return Err(bad("no object".into()));
        };
        // Which it is, the agent says.
        fields.remove("Native");
        let sidecar = fields.remove("SidecarService");
        if let Some(key) = fields.keys().next() {
            return Err(bad(format!("{key} is not taken, wanted SidecarService")));
        }
        match sidecar {
            None | Some(Value::Null) => {}
            Some(Value::Object(sidecar)) => {
                if let Some(key) = sidecar
                    .keys()
                    .find(|key| !["Port", "Tags", "Meta", "Weights", "Proxy"].contains(&key.as_str()))
                {
                    return Err(bad(format!("SidecarService: {key} is not taken")));
                }
                let connect = Map::from_iter([("SidecarService".to_owned(), Value::Object(sidecar))]);
                self.extra.insert("Connect".to_owned(), Value::Object(connect));
            }
            Some(_) => return Err(bad("SidecarService is no object".into())),
        }
        Ok(())
    }

    /// Whether this user may ask for all of it.
    ///
    /// A check of Consul's own runs with Consul's rights and opens connections from where Consul is, and a sidecar
    /// runs with the agent's: the one takes a token by which the client could ask Consul itself, the other the
    /// agent's own user.
    ///
    /// # Errors
    /// [`Cause::NotPermitted`], [`Cause::Limit`] for what is too much.
    pub fn permit(&self, peer: Peer, trust: &Trust) -> Result<(), Refusal> {
        let limits = [
            ("TAGS_MAX", self.tags.len(), TAGS_MAX),
            ("META_MAX", self.meta.len(), META_MAX),
        ];
        if let Some((name, seen, max)) = limits.iter().find(|(_, seen, max)| seen > max) {
            return Err(Cause::Limit.because(format!("{seen}, at most {max} are taken ({name})")));
        }
        if let Some(tag) = self.tags.iter().find(|tag| tag.len() > META_VALUE_MAX) {
            let text = format!("a tag of {} bytes, at most {META_VALUE_MAX} are taken", tag.len());
            return Err(Cause::Limit.because(text));
        }
        for (key, value) in &self.meta {
            let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            if key.starts_with("meshx") || key.is_empty() || !key.bytes().all(good) {
                return Err(Cause::InvalidRequest.because(format!(
                    "meta: key {key:?}; wanted letters, digits, - and _, not beginning with meshx, which the agent \
                     uses itself"
                )));
            }
            if key.len() > META_KEY_MAX || value.len() > META_VALUE_MAX {
                return Err(Cause::Limit.because(format!(
                    "meta: {key} has {} bytes with a value of {}; at most {META_KEY_MAX} and {META_VALUE_MAX} are \
                     taken",
                    key.len(),
                    value.len()
                )));
            }
        }
        if let Some(label) = &self.cluster {
            let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            if !(1..=CLUSTER_MAX).contains(&label.len()) || !label.bytes().all(good) {
                return Err(Cause::InvalidRequest.because(format!(
                    "cluster: {label:?}; wanted 1 to {CLUSTER_MAX} letters, digits, - and _"
                )));
            }
        }
        if self.extra.contains_key("Checks") && self.token.is_none() {
            return Err(Cause::NotPermitted.because(
                "registration: Checks: a check that Consul makes runs with Consul's rights; bring a Consul token \
                 (option token; of MeshxConsul X-Consul-Token), or leave it to the agent's own check (ttl)",
            ));
        }
        let own_proxy = self
            .sidecar
            .as_ref()
            .is_some_and(|kind| *kind != SidecarKind::Native);
        if (own_proxy || self.extra.contains_key("Connect")) && !trust.is_operator(peer) {
            return Err(Cause::NotPermitted.because(format!(
                "sidecar: a sidecar runs with the agent's rights, and uid {} is neither the agent's nor root; \
                 start the agent with --data-plane to give one to everybody",
                peer.uid
            )));
        }
        Ok(())
    }

    /// The entry that the mesh is given.
    pub fn entry(&self, mut instance: Instance, data_plane: DataPlane) -> Entry {
        instance.meta = self.meta.clone();
        let label = self.cluster.iter();
        instance
            .meta
            .extend(label.map(|label| (META_CLUSTER.to_owned(), label.clone())));
        Entry {
            instance,
            tags: self.tags.clone(),
            meta: self.meta.clone(),
            weights: self.weights,
            ttl: self.ttl,
            deregister_after: self.deregister_after,
            extra: self.extra.clone(),
            adopt: self.adopt,
            force: self.force,
            data_plane,
        }
    }
}

fn same(key: &str, seen: &Value, wanted: Option<&str>) -> Result<(), Refusal> {
    match (seen.as_str(), wanted) {
        (Some(seen), Some(wanted)) if seen == wanted => Ok(()),
        _ => Err(Cause::InvalidRequest.because(format!(
            "registration: {key} is {seen}, wanted {wanted:?}, as the registration itself says"
        ))),
    }
}

fn strings(key: &str, value: Value) -> Result<Vec<String>, Refusal> {
    serde_json::from_value(value).map_err(|_| {
        Cause::InvalidRequest.because(format!("registration: {key}: wanted an array of strings"))
    })
}

fn pairs(key: &str, value: Value) -> Result<BTreeMap<String, String>, Refusal> {
    serde_json::from_value(value).map_err(|_| {
        Cause::InvalidRequest.because(format!("registration: {key}: wanted an object of strings"))
    })
}

fn weights(value: &Value) -> Result<Weights, Refusal> {
    let number = |key: &str| value.get(key).and_then(Value::as_i64);
    number("Passing")
        .zip(number("Warning"))
        .and_then(|(passing, warning)| weights_of(passing, warning))
        .ok_or_else(|| {
            Cause::InvalidRequest.because(format!(
                "registration: Weights is {value}, wanted Passing from 1 and Warning from 0 to 65535"
            ))
        })
}

/// Weights in the range that Consul takes.
pub fn weights_of(passing: i64, warning: i64) -> Option<Weights> {
    let passing = u16::try_from(passing).ok().filter(|passing| *passing > 0)?;
    let warning = u16::try_from(warning).ok()?;
    Some(Weights {
        passing: passing.into(),
        warning: warning.into(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn merged(json: &str) -> Result<Options, Refusal> {
        let mut options = Options::default();
        options.merge_registration(json, "shop", Some("shop-1"))?;
        Ok(options)
    }

    fn peer(uid: u32) -> Peer {
        Peer {
            uid,
            gid: 0,
            pid: None,
        }
    }

    #[test]
    fn a_consul_registration_is_merged() {
        let options = merged(
            r#"{"Name": "shop", "ID": "shop-1", "Address": "127.0.0.1", "Port": 80, "Tags": ["a"], "Meta": {"k": "v"},
                "Weights": {"Passing": 3, "Warning": 1}, "EnableTagOverride": true,
                "Connect": {"Native": false, "SidecarService": {"Proxy": {"Config": {"protocol": "tcp"}}}}}"#,
        )
        .unwrap();
        assert_eq!(
            (options.tags, options.meta["k"].as_str()),
            (vec!["a".to_owned()], "v")
        );
        assert_eq!(options.weights, weights_of(3, 1));
        assert_eq!(options.extra["EnableTagOverride"], true);
        let proxy = &options.extra["Connect"]["SidecarService"]["Proxy"];
        assert_eq!(proxy["Config"]["protocol"], "tcp");
    }

    #[test]
    fn what_contradicts_or_is_not_known_is_named() {
        for (json, named) in [
            ("[]", "JSON object"),
            ("{", "not JSON"),
            (r#"{"Name": "cart"}"#, "Name"),
            (r#"{"ID": "shop-2"}"#, "ID"),
            (r#"{"Kind": "connect-proxy"}"#, "Kind"),
            (r#"{"Token": "x"}"#, "Token"),
            (r#"{"Namespace": "x"}"#, "Namespace"),
            (r#"{"Tags": "x"}"#, "Tags"),
            (r#"{"Meta": {"k": 1}}"#, "Meta"),
            (r#"{"Weights": {"Passing": 0, "Warning": 1}}"#, "Weights"),
            (r#"{"Check": {"TTL": "5s"}}"#, "ttl"),
            (r#"{"Checks": [1]}"#, "Checks"),
            (r#"{"Connect": {"Gateway": {}}}"#, "Gateway"),
            (r#"{"Connect": {"SidecarService": {"Checks": []}}}"#, "Checks"),
        ] {
            let refusal = merged(json).unwrap_err();
            assert_eq!(refusal.cause, Cause::InvalidRequest, "{json}");
            assert!(refusal.text.contains(named), "{json}: {refusal}");
        }
    }

    #[test]
    fn consuls_and_the_agents_rights_are_not_lent() {
        let trust = Trust::new(1000, vec![]);
        let mut script = merged(r#"{"Check": {"Args": ["/bin/sh"], "Interval": "1s"}}"#).unwrap();
        let refusal = script.permit(peer(1000), &trust).unwrap_err();
        assert!(
            refusal.cause == Cause::NotPermitted && refusal.text.contains("token"),
            "{refusal}"
        );
        script.token = Some(Token::new("own"));
        script.permit(peer(1001), &trust).unwrap();

        let command = SidecarKind::Command(vec!["/bin/sh".into()]);
        for kind in [command, SidecarKind::ConnectProxy, SidecarKind::Envoy] {
            let options = Options {
                sidecar: Some(kind),
                ..Options::default()
            };
            options.permit(peer(1000), &trust).unwrap();
            options.permit(peer(0), &trust).unwrap();
            assert_eq!(
                options.permit(peer(1001), &trust).unwrap_err().cause,
                Cause::NotPermitted
            );
        }
        let config = merged(r#"{"Connect": {"SidecarService": {}}}"#).unwrap();
        assert_eq!(
            config.permit(peer(1001), &trust).unwrap_err().cause,
            Cause::NotPermitted
        );
        let native = Options {
            sidecar: Some(SidecarKind::Native),
            ..Options::default()
        };
        native.permit(peer(1001), &trust).unwrap();
    }

    #[test]
    fn limits_of_tags_and_metadata() {
        let trust = Trust::new(0, vec![]);
        let with = |meta: &[(&str, &str)]| Options {
            meta: meta
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..Options::default()
        };
        with(&[("k-1_A", "v")]).permit(peer(0), &trust).unwrap();
        let many = |pairs: usize| Options {
            meta: (0..pairs).map(|at| (format!("k{at}"), String::new())).collect(),
            ..Options::default()
        };
        many(META_MAX).permit(peer(0), &trust).unwrap();
        let long = "x".repeat(META_VALUE_MAX + 1);
        for (options, cause) in [
            (
                Options {
                    tags: vec!["t".into(); TAGS_MAX + 1],
                    ..Options::default()
                },
                Cause::Limit,
            ),
            (
                Options {
                    tags: vec![long.clone()],
                    ..Options::default()
                },
                Cause::Limit,
            ),
            (many(META_MAX + 1), Cause::Limit),
            (with(&[("k", &long)]), Cause::Limit),
            (with(&[(&long, "v")]), Cause::Limit),
            (
                Options {
                    cluster: Some("a b".into()),
                    ..Options::default()
                },
                Cause::InvalidRequest,
            ),
            (
                Options {
                    cluster: Some(String::new()),
                    ..Options::default()
                },
                Cause::InvalidRequest,
            ),
            (
                Options {
                    cluster: Some("x".repeat(CLUSTER_MAX + 1)),
                    ..Options::default()
                },
                Cause::InvalidRequest,
            ),
            (with(&[("meshx-node", "shop@h1")]), Cause::InvalidRequest),
            (with(&[("", "v")]), Cause::InvalidRequest),
            (with(&[("a b", "v")]), Cause::InvalidRequest),
        ] {
            assert_eq!(
                options.permit(peer(0), &trust).unwrap_err().cause,
                cause,
                "{options:?}"
            );
        }
    }

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in [SidecarKind::Native, SidecarKind::ConnectProxy, SidecarKind::Envoy] {
            assert_eq!(SidecarKind::parse(kind.as_str()), Some(kind));
        }
        assert_eq!(SidecarKind::parse("command"), None);
    }
}

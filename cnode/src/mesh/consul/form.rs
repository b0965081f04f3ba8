//! The form of a registration: what Consul is told of an entry, and what it must not be told.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::catalogue::NOTE;
use super::{META_AGENT, META_NODE, META_PROTOCOL, PROTOCOL_CONNECT, PROTOCOL_MESHX};
use crate::mesh::{DataPlane, Entry, Instance, META_CLUSTER, MeshError, Protocol, Sidecar};

/// Time to live of a check, unless the entry says otherwise.
pub(super) const TTL: Duration = Duration::from_secs(10);
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_MAX: Duration = Duration::from_secs(86_400);
/// After this long as critical Consul forgets an entry, unless it says otherwise. Consul takes no less.
const DEREGISTER_AFTER: Duration = Duration::from_secs(60);
/// How often the check of a sidecar's port runs. Consul's own would be 10 s, and as long until it first passes.
const SIDECAR_CHECK: &str = "2s";
/// Longest id, in bytes.
const ID_MAX: usize = 512;
/// Fields of a sidecar's proxy that a registration may give (Consul, "Sidecar Service Registration").
const SIDECARS_OWN: [&str; 3] = ["Config", "Expose", "MeshGateway"];
/// Fields of a registration that are ours (Consul API, "Register Service"), in the form of [`folded`].
const OURS: [&str; 10] = [
    "name", "id", "address", "port", "token", "check", "connect", "meta", "tags", "weights",
];

/// What would make a registration say something else than the entry.
pub(super) fn check_entry(entry: &Entry) -> Result<(), MeshError> {
    let id = &entry.instance.id;
    let refuse = |text: String| Err(MeshError::Refused(text));
    if id.is_empty() || id.len() > ID_MAX || id.chars().any(|c| c.is_control() || c == '"' || c == '\\') {
        return refuse(format!(
            "instance id {id:?}: wanted 1 to {ID_MAX} bytes without control characters, \" and \\"
        ));
    }
    let time = ttl(entry);
    if !(TTL_MIN..=TTL_MAX).contains(&time) {
        return refuse(format!("{id}: ttl {time:?}, wanted {TTL_MIN:?} to {TTL_MAX:?}"));
    }
    // Consul folds more letters than these when it reads field names.
    if let Some(key) = entry.extra.keys().find(|key| !key.is_ascii()) {
        return refuse(format!(
            "{id}: the field {key:?} of its registration is no name in ASCII"
        ));
    }
    Ok(())
}

/// Everything that Consul is told of an entry of this agent (Consul API, "Register Service"); `passing` or not.
pub(super) fn form(entry: &Entry, agent: &str, passing: bool) -> Map<String, Value> {
    let Entry {
        instance,
        tags,
        weights,
        extra,
        data_plane,
        ..
    } = entry;
    // Consul takes field names in any case: what would be one of ours in another spelling is left out.
    let theirs = |key: &String| !OURS.contains(&folded(key).as_str());
    let mut body: Map<String, Value> = extra.clone();
    body.retain(|key, _| theirs(key));
    let given = |name: &str| {
        extra
            .iter()
            .find(|(key, _)| folded(key) == name)
            .map(|(_, value)| value)
    };

    let mut meta: Map<String, Value> = given("meta")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    meta.extend(entry.meta.iter().map(|(key, value)| (key.clone(), json!(value))));
    meta.retain(|key, _| !key.to_ascii_lowercase().starts_with("meshx"));
    meta.extend(
        own_meta(entry, agent)
            .into_iter()
            .map(|(key, value)| (key.to_owned(), json!(value))),
    );
    let address = match data_plane {
        DataPlane::Native => instance.address,
        DataPlane::Sidecar(sidecar) => sidecar.local,
    };
    let fields = [
        ("Name", json!(instance.service)),
        ("ID", json!(instance.id)),
        ("Address", json!(address.ip())),
        ("Port", json!(address.port())),
        ("Check", check(entry, agent, passing)),
        (
            "Connect",
            match data_plane {
                DataPlane::Native => json!({ "Native": true }),
                DataPlane::Sidecar(sidecar) => {
                    json!({ "SidecarService": sidecar_body(entry, sidecar, &meta) })
                }
            },
        ),
        ("Meta", Value::Object(meta)),
    ];
    body.extend(fields.map(|(name, value)| (name.to_owned(), value)));
    match (tags.is_empty(), given("tags")) {
        (true, Some(given)) => body.insert("Tags".to_owned(), given.clone()),
        _ => body.insert("Tags".to_owned(), json!(tags)),
    };
    if let Some(weights) = weights {
        let weights = json!({ "Passing": weights.passing, "Warning": weights.warning });
        body.insert("Weights".to_owned(), weights);
    } else if let Some(given) = given("weights") {
        body.insert("Weights".to_owned(), given.clone());
    }
    body
}

fn own_meta(entry: &Entry, agent: &str) -> BTreeMap<&'static str, String> {
    let protocol = match (&entry.data_plane, entry.instance.protocol) {
        (DataPlane::Native, Protocol::Meshx) => PROTOCOL_MESHX,
        _ => PROTOCOL_CONNECT,
    };
    let mut meta = BTreeMap::from([
        (META_AGENT, agent.to_owned()),
        (META_PROTOCOL, protocol.to_owned()),
    ]);
    if let Some(node) = &entry.instance.node {
        meta.insert(META_NODE, node.clone());
    }
    if let Some(label) = entry.instance.meta.get(META_CLUSTER) {
        meta.insert(META_CLUSTER, label.clone());
    }
    meta
}

fn check(entry: &Entry, agent: &str, passing: bool) -> Value {
    let after = entry.deregister_after.unwrap_or(DEREGISTER_AFTER);
    json!({
        "CheckID": check_id(&entry.instance.id),
        "Name": "meshx agent",
        "Notes": format!("{NOTE}{}", agent),
        "TTL": duration(ttl(entry)),
        "Status": if passing { "passing" } else { "critical" },
        "DeregisterCriticalServiceAfter": duration(after),
    })
}

/// A field name as Consul compares it: `deregister_critical` and `DeregisterCritical` are one.
fn folded(key: &str) -> String {
    key.to_ascii_lowercase().replace('_', "")
}

/// Time to live of its check.
pub(super) fn ttl(entry: &Entry) -> Duration {
    entry.ttl.unwrap_or(TTL)
}

fn duration(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

/// The id of its check.
pub(super) fn check_id(id: &str) -> String {
    format!("meshx:{id}")
}

fn sidecar_body(entry: &Entry, sidecar: &Sidecar, meta: &Map<String, Value>) -> Value {
    let Instance { id, address, .. } = &entry.instance;
    let upstreams: Vec<_> = sidecar
        .upstreams
        .iter()
        .map(|upstream| {
            json!({
                "DestinationName": upstream.target,
                "LocalBindAddress": upstream.bind.ip(),
                "LocalBindPort": upstream.bind.port(),
            })
        })
        .collect();
    let given = entry.extra.get("Connect");
    let given = given.and_then(|connect| connect.get("SidecarService")?.get("Proxy")?.as_object());
    let mut proxy = given.cloned().unwrap_or_default();
    proxy.retain(|key, _| SIDECARS_OWN.contains(&key.as_str()));
    let config = proxy.entry("Config").or_insert_with(|| json!({}));
    if let Some(config) = config.as_object_mut() {
        // Consul's built-in proxy and the Envoy that it drives would listen on all addresses.
        config.insert("bind_address".to_owned(), json!(sidecar.bind));
    }
    proxy.extend([
        ("LocalServiceAddress".to_owned(), json!(sidecar.local.ip())),
        ("LocalServicePort".to_owned(), json!(sidecar.local.port())),
        ("Upstreams".to_owned(), json!(upstreams)),
    ]);
    let mut body = json!({ "Address": address.ip(), "Meta": meta, "Proxy": proxy });
    // Port 0: Consul chooses one of its range, and its own checks.
    if address.port() != 0
        && let Some(fields) = body.as_object_mut()
    {
        fields.insert("Port".to_owned(), json!(address.port()));
        fields.insert(
            "Checks".to_owned(),
            json!([
                { "Name": "sidecar port", "TCP": address.to_string(), "Interval": SIDECAR_CHECK },
                { "Name": "service of the sidecar", "AliasService": id },
            ]),
        );
    }
    body
}

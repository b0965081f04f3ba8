//! Envoy driven by files, where Consul cannot drive it by xDS.
//!
//! ```text
//!  mesh --mTLS--> listener "public" --by name--> listener "inside" --> the service's local address
//!                  1. handshake: the peer's      2. one filter chain
//!                     URI is in "clients"           for each URI
//!  application --> listener "up.ADDRESS" --mTLS, the target's URI--> the target's instances
//! ```
//!
//! **Who may connect** is decided in the handshake: the validation context "clients" names the SPIFFE URIs that the mesh
//! allows, and changes without touching a listener. Envoy's network RBAC filter is no place for it: it looks at a
//! connection only when its first bytes come, and by then the application was dialled and has been heard (seen with
//! Envoy 1.40: a denied peer reads the greeting of a server that speaks first).
//!
//! **A denial cuts live connections**, and only those of the denied service. Envoy checks nobody again, but it closes the
//! connections of a filter chain that is taken out of a listener, once its drain time is over. A chain cannot be chosen by
//! the peer's certificate, which is not known yet when a TCP connection is matched; so "public" hands the verified
//! name on to an internal listener, whose chains are matched by it. The name is a hashable object, so that it is part
//! of the connection pool's key: without that a pooled connection of one peer is given to another.
//!
//! Not done: to cut the connections of a peer whose root is gone or whose instance has left the catalogue, as native
//! links are.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{
    Settings, SidecarError, SidecarSpec, command,
    files::Files,
    process::{Environment, Program},
    view::{Upstream, View},
};

const BOOTSTRAP: &str = "bootstrap.json";
const LISTENERS: &str = "listeners.json";
const CLUSTERS: &str = "clusters.json";
const LEAF: &str = "leaf.json";
const ROOTS: &str = "roots.json";
const CLIENTS: &str = "clients.json";

/// How long after a denial live connections end, in seconds: Envoy's `--drain-time-s`.
const DRAIN_SECONDS: u32 = 1;
/// How long a handshake, or a connection to an instance, may take.
const CONNECT: &str = "5s";
/// Connections of each cluster: as an agent's links.
const CONNECTIONS_MAX: u32 = 16_384;
/// Bytes that a client may send before its connection has somewhere to go.
const EARLY_BYTES: u32 = 65_536;
/// Filter state that carries the verified name of a peer.
const PEER: &str = "meshx.peer";
/// What is in the list of allowed URIs when that is empty: an empty list allows all. No certificate names it, since
/// SPIFFE URIs have a trust domain.
const NOBODY: &str = "spiffe://";

/// Seconds of silence before a peer is probed, between probes, and probes: as the agent's own links.
const KEEPALIVE: (u32, u32, u32) = (15, 5, 3);

/// The program and its arguments; the files must have been written.
pub(super) fn program(
    settings: &Settings,
    spec: &SidecarSpec,
    files: &mut Files,
) -> Result<Program, SidecarError> {
    files.put(BOOTSTRAP, bootstrap(spec, files).to_string().as_bytes())?;
    let arguments = [
        "--config-path".into(),
        files.path(BOOTSTRAP).into(),
        // Two Envoys of one host would share memory by it.
        "--disable-hot-restart".into(),
        "--drain-strategy".into(),
        "immediate".into(),
        "--drain-time-s".into(),
        DRAIN_SECONDS.to_string().into(),
        "--concurrency".into(),
        settings.envoy_workers.to_string().into(),
        "--log-level".into(),
        spec.log_level.clone().unwrap_or_else(|| "warning".into()).into(),
    ];
    Ok(Program {
        path: command::find(&settings.envoy)?,
        arguments: arguments.into(),
        environment: Environment(command::base(settings)),
    })
}

/// Writes what may change. Tells whether anything did.
pub(super) fn write(files: &mut Files, spec: &SidecarSpec, view: &View) -> Result<bool, SidecarError> {
    // Whom to believe before what proves us, and the list of clients before their chains: a denial counts at once, and
    // who is let in a moment too early finds no chain.
    let mut changed = files.put(ROOTS, &secret("roots", roots(view)))?;
    changed |= files.put(CLIENTS, &secret("clients", clients(view)))?;
    changed |= files.put(LEAF, &secret("leaf", leaf(view)))?;
    changed |= files.put(CLUSTERS, &response(clusters(files, spec, view)))?;
    changed |= files.put(LISTENERS, &response(listeners(files, spec, view)))?;
    Ok(changed)
}

fn bootstrap(spec: &SidecarSpec, files: &Files) -> Value {
    json!({
        "node": {"id": spec.id, "cluster": spec.service},
        "dynamic_resources": {
            "lds_config": source(files, LISTENERS),
            "cds_config": source(files, CLUSTERS),
        },
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {"@type": kind("extensions.bootstrap.internal_listener.v3.InternalListener")},
        }],
        // Nobody can read them without an admin interface, and they grow with every peer.
        "stats_config": {"stats_matcher": {"reject_all": true}},
    })
}

fn listeners(files: &Files, spec: &SidecarSpec, view: &View) -> Vec<Value> {
    let mut all = vec![public(files, spec)];
    // Without anybody to let in there is no such listener, and "public" finds none.
    if !view.allowed.is_empty() {
        all.push(inside(view));
    }
    all.extend(view.upstreams.iter().map(|upstream| {
        let filter = tcp_proxy(&upstream.name(), json!({}));
        listener(&upstream.name(), upstream.bind, json!({"filters": [filter]}))
    }));
    all
}

fn public(files: &Files, spec: &SidecarSpec) -> Value {
    let peer = json!({
        "name": "envoy.filters.network.set_filter_state",
        "typed_config": {
            "@type": kind("extensions.filters.network.set_filter_state.v3.Config"),
            "on_downstream_tls_handshake": [{
                "object_key": PEER,
                "factory_key": "envoy.hashable_string",
                "format_string": {"text_format_source": {"inline_string": "%DOWNSTREAM_PEER_URI_SAN%"}},
                "shared_with_upstream": "ONCE",
            }],
        },
    });
    let after_handshake = json!({
        "upstream_connect_mode": "ON_DOWNSTREAM_TLS_HANDSHAKE",
        "max_early_data_bytes": EARLY_BYTES,
    });
    let tls = json!({
        "@type": kind("extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
        "require_client_certificate": true,
        // A session that is taken up again would not be held against the list.
        "disable_stateless_session_resumption": true,
        "disable_stateful_session_resumption": true,
        "common_tls_context": {
            // Consul's own Envoys dial with TLS 1.2 at most.
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [{"name": "leaf", "sds_config": source(files, LEAF)}],
            "validation_context_sds_secret_config": {"name": "clients", "sds_config": source(files, CLIENTS)},
        },
    });
    let chain = json!({
        "filters": [peer, tcp_proxy("inside", after_handshake)],
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
        "transport_socket_connect_timeout": CONNECT,
    });
    listener("public", spec.public, chain)
}

fn inside(view: &View) -> Value {
    let chosen = |uri: &String| {
        let action = json!({"@type": "type.googleapis.com/google.protobuf.StringValue", "value": uri});
        let action = json!({"action": {"name": uri, "typed_config": action}});
        (uri.clone(), action)
    };
    let chains: serde_json::Map<String, Value> = view.allowed.iter().map(chosen).collect();
    let chain = |uri: &String| json!({"name": uri, "filters": [tcp_proxy("local", json!({}))]});
    let input = json!({
        "@type": kind("extensions.matching.common_inputs.network.v3.FilterStateInput"),
        "key": PEER,
    });
    json!({
        "@type": kind("config.listener.v3.Listener"),
        "name": "inside",
        "internal_listener": {},
        "filter_chain_matcher": {"matcher_tree": {
            "input": {"name": "envoy.matching.inputs.filter_state", "typed_config": input},
            "exact_match_map": {"map": chains},
        }},
        "filter_chains": view.allowed.iter().map(chain).collect::<Vec<_>>(),
    })
}

fn listener(name: &str, at: SocketAddr, chain: Value) -> Value {
    json!({
        "@type": kind("config.listener.v3.Listener"),
        "name": name,
        "address": address(at),
        // Else an Envoy that was left behind would share the port, with the rules of its time.
        "enable_reuse_port": false,
        "tcp_keepalive": keepalive(),
        "filter_chains": [chain],
    })
}

/// Idle connections stay: links are quiet for long. Keepalive finds the dead ones.
fn tcp_proxy(cluster: &str, more: Value) -> Value {
    let mut filter = json!({
        "@type": kind("extensions.filters.network.tcp_proxy.v3.TcpProxy"),
        "stat_prefix": cluster,
        "cluster": cluster,
        "idle_timeout": "0s",
    });
    if let (Value::Object(filter), Value::Object(more)) = (&mut filter, more) {
        filter.extend(more);
    }
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": filter})
}

fn clusters(files: &Files, spec: &SidecarSpec, view: &View) -> Vec<Value> {
    let inside = json!({"envoy_internal_address": {"server_listener_name": "inside"}});
    let raw = json!({
        "name": "envoy.transport_sockets.raw_buffer",
        "typed_config": {"@type": kind("extensions.transport_sockets.raw_buffer.v3.RawBuffer")},
    });
    let internal = json!({
        "name": "envoy.transport_sockets.internal_upstream",
        "typed_config": {
            "@type": kind("extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport"),
            "transport_socket": raw,
        },
    });
    let mut all = vec![
        cluster("local", vec![address(spec.local)], None),
        cluster("inside", vec![inside], Some(internal)),
    ];
    all.extend(view.upstreams.iter().map(|upstream| {
        let addresses = upstream.addresses.iter().copied().map(address).collect();
        cluster(&upstream.name(), addresses, Some(upstream_tls(files, upstream)))
    }));
    all
}

fn cluster(name: &str, addresses: Vec<Value>, transport: Option<Value>) -> Value {
    let endpoints: Vec<_> = addresses
        .into_iter()
        .map(|address| json!({"endpoint": {"address": address}}))
        .collect();
    let mut cluster = json!({
        "@type": kind("config.cluster.v3.Cluster"),
        "name": name,
        "type": "STATIC",
        "connect_timeout": CONNECT,
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [{
            "max_connections": CONNECTIONS_MAX,
            "max_pending_requests": CONNECTIONS_MAX,
        }]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    });
    if let (Value::Object(cluster), Some(transport)) = (&mut cluster, transport) {
        cluster.insert("transport_socket".into(), transport);
    }
    if name != "inside"
        && let Value::Object(cluster) = &mut cluster
    {
        cluster.insert(
            "upstream_connection_options".into(),
            json!({"tcp_keepalive": keepalive()}),
        );
    }
    cluster
}

fn upstream_tls(files: &Files, upstream: &Upstream) -> Value {
    let peer = json!({"match_typed_subject_alt_names": [uri(&upstream.spiffe.to_string())]});
    let tls = json!({
        "@type": kind("extensions.transport_sockets.tls.v3.UpstreamTlsContext"),
        "sni": upstream.spiffe.server_name(),
        "max_session_keys": 0,
        "common_tls_context": {
            // Agents speak nothing older, and as a client Envoy speaks 1.2 at most unless told otherwise.
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificate_sds_secret_configs": [{"name": "leaf", "sds_config": source(files, LEAF)}],
            "combined_validation_context": {
                "default_validation_context": peer,
                "validation_context_sds_secret_config": {"name": "roots", "sds_config": source(files, ROOTS)},
            },
        },
    });
    json!({"name": "envoy.transport_sockets.tls", "typed_config": tls})
}

fn leaf(view: &View) -> (&'static str, Value) {
    let leaf = json!({
        "certificate_chain": {"inline_string": command::certificates(&view.identity.chain)},
        "private_key": {"inline_string": command::key(&view.identity.key)},
    });
    ("tls_certificate", leaf)
}

fn roots(view: &View) -> (&'static str, Value) {
    let roots = json!({"trusted_ca": {"inline_string": command::certificates(&view.roots)}});
    ("validation_context", roots)
}

fn clients(view: &View) -> (&'static str, Value) {
    let nobody = [NOBODY.to_owned()];
    let uris: Vec<_> = match view.allowed.is_empty() {
        true => nobody.iter().map(|text| uri(text)).collect(),
        false => view.allowed.iter().map(|text| uri(text)).collect(),
    };
    let (field, mut context) = roots(view);
    if let Value::Object(context) = &mut context {
        context.insert("match_typed_subject_alt_names".into(), json!(uris));
    }
    (field, context)
}

fn secret(name: &str, (field, value): (&'static str, Value)) -> Vec<u8> {
    let kind = kind("extensions.transport_sockets.tls.v3.Secret");
    response(vec![json!({"@type": kind, "name": name, field: value})])
}

/// A discovery response, as a file holds it (Envoy: "xDS REST and gRPC protocol", `DiscoveryResponse`).
fn response(resources: Vec<Value>) -> Vec<u8> {
    json!({"resources": resources}).to_string().into_bytes()
}

fn source(files: &Files, name: &str) -> Value {
    json!({"path_config_source": {"path": files.path(name)}, "resource_api_version": "V3"})
}

fn uri(exact: &str) -> Value {
    json!({"san_type": "URI", "matcher": {"exact": exact}})
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip(), "port_value": at.port()}})
}

fn keepalive() -> Value {
    let (time, interval, probes) = KEEPALIVE;
    json!({"keepalive_time": time, "keepalive_interval": interval, "keepalive_probes": probes})
}

fn kind(of: &str) -> String {
    format!("type.googleapis.com/envoy.{of}")
}

impl Upstream {
    /// Its listener and its cluster.
    fn name(&self) -> String {
        format!("up.{}", self.bind)
    }
}

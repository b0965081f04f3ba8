//! What is sent to Consul for an entry.

use super::*;

fn entry(id: &str) -> Entry {
    Entry::plain(Instance {
        id: id.to_owned(),
        service: service("shop"),
        node: None,
        agent: "a".into(),
        address: "127.0.0.1:7000".parse().unwrap(),
        protocol: Protocol::Meshx,
        meta: Default::default(),
    })
}

/// What is sent to Consul for an entry.
async fn registered(entry: Entry) -> Result<Value, MeshError> {
    let sent = Arc::new(Mutex::new(Value::Null));
    let keep = sent.clone();
    let id = entry.instance.id.clone();
    let mock = Mock::new(move |uri, body| match uri.path() {
        "/v1/agent/services" => answer(1, "{}"),
        "/v1/health/state/any" => answer(1, "[]"),
        "/v1/agent/service/register" => {
            *keep.lock().unwrap() = body.clone();
            answer(1, "")
        }
        "/v1/health/connect/shop" => answer(1, json!([health("shop", &id)]).to_string()),
        _ => None,
    })
    .await;
    mock.mesh().register(&entry).await?;
    let sent = sent.lock().unwrap().clone();
    Ok(sent)
}

#[tokio::test]
async fn a_registration_says_what_the_entry_says() {
    let sent = registered(Entry {
        tags: vec!["t".into()],
        meta: [
            ("m".to_owned(), "1".to_owned()),
            ("meshx-agent".to_owned(), "forged".to_owned()),
        ]
        .into(),
        weights: Some(Weights {
            passing: 3,
            warning: 1,
        }),
        ttl: Some(Duration::from_secs(4)),
        deregister_after: Some(Duration::from_secs(90)),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    assert_eq!(
        sent,
        json!({
            "Name": "shop", "ID": "shop-1", "Address": "127.0.0.1", "Port": 7000, "Tags": ["t"],
            "Meta": { "m": "1", "meshx-agent": "a", "meshx-protocol": "meshx/1" },
            "Weights": { "Passing": 3, "Warning": 1 },
            "Connect": { "Native": true },
            "Check": {
                "CheckID": "meshx:shop-1", "Name": "meshx agent", "Notes": "meshx agent a", "TTL": "4000ms",
                "Status": "passing", "DeregisterCriticalServiceAfter": "90000ms",
            },
        })
    );
}

#[tokio::test]
async fn further_fields_cannot_say_otherwise() {
    let extra = json!({
        "port": 1, "PORT": 2, "name": "other", "Id": "other", "address": "10.0.0.1", "connect": {}, "Token": "t",
        "check": {}, "meta": { "k": "v", "Meshx-Node": "forged@h" }, "tags": ["given"], "Weights": { "Passing": 2 },
        "EnableTagOverride": true, "Checks": [{ "TCP": "127.0.0.1:1", "Interval": "9s" }],
    });
    let sent = registered(Entry {
        extra: extra.as_object().unwrap().clone(),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    let sent = sent.as_object().unwrap();
    let mut keys: Vec<_> = sent.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "Address",
            "Check",
            "Checks",
            "Connect",
            "EnableTagOverride",
            "ID",
            "Meta",
            "Name",
            "Port",
            "Tags",
            "Weights",
        ]
    );
    assert_eq!(
        sent["Meta"],
        json!({ "k": "v", "meshx-agent": "a", "meshx-protocol": "meshx/1" })
    );
    assert_eq!(
        (&sent["Name"], &sent["ID"], &sent["Port"]),
        (&json!("shop"), &json!("shop-1"), &json!(7000))
    );
    assert_eq!(
        (&sent["Tags"], &sent["Weights"]),
        (&json!(["given"]), &json!({ "Passing": 2 }))
    );

    // Go takes the long s for an s when it compares field names.
    let extra = [("addre\u{17f}s".to_owned(), json!("10.0.0.1"))]
        .into_iter()
        .collect();
    let error = registered(Entry {
        extra,
        ..entry("shop-1")
    })
    .await
    .unwrap_err();
    assert!(matches!(error, MeshError::Refused(_)), "{error:?}");
}

#[tokio::test]
async fn a_sidecar_is_registered_with_what_is_behind_and_before_it() {
    let sidecar = Sidecar {
        bind: [127, 0, 0, 1].into(),
        local: "127.0.0.1:9000".parse().unwrap(),
        upstreams: vec![SidecarUpstream {
            target: service("cart"),
            bind: "127.0.0.1:9001".parse().unwrap(),
        }],
    };
    // What carries it and where is ours to say, how it does may be the client's.
    let given = json!({ "SidecarService": { "Port": 1, "Proxy": {
        "Config": { "bind_address": "0.0.0.0", "local_connect_timeout_ms": 9 },
        "LocalServicePort": 1, "DestinationServiceName": "cart", "Expose": { "Checks": true },
    } } });
    let sent = registered(Entry {
        data_plane: DataPlane::Sidecar(sidecar),
        extra: serde_json::Map::from_iter([("Connect".to_owned(), given)]),
        ..entry("shop-1")
    })
    .await
    .unwrap();
    assert_eq!(
        (&sent["Address"], &sent["Port"]),
        (&json!("127.0.0.1"), &json!(9000))
    );
    let meta = json!({ "meshx-agent": "a", "meshx-protocol": "connect" });
    assert_eq!(sent["Meta"], meta);
    assert_eq!(
        sent["Connect"]["SidecarService"],
        json!({
            "Address": "127.0.0.1", "Port": 7000, "Meta": meta,
            "Proxy": {
                "Config": { "bind_address": "127.0.0.1", "local_connect_timeout_ms": 9 },
                "Expose": { "Checks": true },
                "LocalServiceAddress": "127.0.0.1", "LocalServicePort": 9000,
                "Upstreams": [
                    { "DestinationName": "cart", "LocalBindAddress": "127.0.0.1", "LocalBindPort": 9001 }
                ],
            },
            "Checks": [
                { "Name": "sidecar port", "TCP": "127.0.0.1:7000", "Interval": "2s" },
                { "Name": "service of the sidecar", "AliasService": "shop-1" },
            ],
        })
    );
    assert_eq!(sent["Check"]["TTL"], json!("10000ms"));
}

#[tokio::test]
async fn entries_that_consul_would_misread_are_refused() {
    for bad in ["", "a\"b", "a\\b", "a\nb", &"x".repeat(513)] {
        let error = registered(entry(bad)).await.unwrap_err();
        assert!(matches!(error, MeshError::Refused(_)), "{bad:?}: {error:?}");
    }
    for ttl in [
        Duration::ZERO,
        Duration::from_millis(999),
        Duration::from_secs(100_000),
    ] {
        let error = registered(Entry {
            ttl: Some(ttl),
            ..entry("shop-1")
        })
        .await
        .unwrap_err();
        assert!(error.to_string().contains("ttl"), "{error}");
    }
}

#[test]
fn an_agents_id_is_its_directorys() {
    let id = ConsulMesh::agent_id(Path::new("/run/meshx"));
    assert_eq!(id, ConsulMesh::agent_id(Path::new("/run/meshx")));
    assert_ne!(id, ConsulMesh::agent_id(Path::new("/run/meshx2")));
    assert!(
        id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
}

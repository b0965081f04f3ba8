//! Real bytes through each kind, and between the kinds.

use super::*;

#[tokio::test]
async fn built_in_proxies_carry_a_service_and_refuse_what_is_denied() {
    let world = World::new().await;
    let way = upstream("cart");
    let mut cart = world.side("cart", SidecarKind::ConnectProxy, &[]).await;
    let shop = world
        .side("shop", SidecarKind::ConnectProxy, std::slice::from_ref(&way))
        .await;
    echoes(connected("built-in to built-in", way.bind).await).await;

    let said = cart.events();
    let spoke = |kind: &SidecarEventKind| matches!(kind, SidecarEventKind::Output { .. });
    assert!(!said.is_empty() && said.iter().all(spoke), "{said:?}");
    world.consul.intention("shop", "cart", "deny").await;
    refused("a denial", way.bind).await;

    timeout(LONG, shop.handle.stop()).await.unwrap();
    assert!(TcpStream::connect(way.bind).await.is_err());
    cart.handle.set_upstreams(Vec::new()).unwrap();
    timeout(LONG, cart.handle.stop()).await.unwrap();
}

#[tokio::test]
async fn a_built_in_proxy_needs_the_right_token() {
    let consul = Consul::with_acl().await;
    let rules = r#"service "cart" { policy = "write" } service "cart-sidecar-proxy" { policy = "write" }
        service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }"#;
    let token = consul.policy("cart", rules).await;
    let world = World::of(consul, Some(support::MASTER)).await;
    let (local, public) = (server().await, free_loopback().unwrap());
    let mut last = Vec::new();
    for (token, works) in [
        ("99999999-8888-7777-6666-555555555555", false),
        (token.as_str(), true),
    ] {
        let spec = SidecarSpec {
            token: Some(meshx::mesh::Token::new(token)),
            output: true,
            max_restarts: 0,
            ..SidecarSpec::new(
                "cart-1",
                service("cart"),
                SidecarKind::ConnectProxy,
                local,
                public,
            )
        };
        let sidecar = Sidecar {
            bind: [127, 0, 0, 1].into(),
            local,
            upstreams: Vec::new(),
        };
        let entry = Entry {
            data_plane: DataPlane::Sidecar(sidecar),
            ..Entry::plain(Instance {
                id: "cart-1".into(),
                service: service("cart"),
                node: None,
                agent: "a".into(),
                address: public,
                protocol: Protocol::Connect,
                meta: Default::default(),
            })
        };
        world.mesh.register(&entry).await.unwrap();
        let (sender, mut events) = mpsc::channel(4096);
        let handle = world.sidecars.start(spec, sender).await.unwrap();
        let opened = async {
            while TcpStream::connect(public).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let ended = async {
            while let Some(event) = events.recv().await {
                if let SidecarEventKind::Down { text, .. } = event.kind {
                    return text;
                }
            }
            String::new()
        };
        let works_now = tokio::select! {
            () = opened => true,
            text = ended => { last.push(text); false }
            () = tokio::time::sleep(LONG) => panic!("neither opens nor ends"),
        };
        assert_eq!(works_now, works, "{last:?}");
        handle.stop().await;
    }
    assert!(
        last[0].contains("ACL not found") || last[0].contains("403"),
        "{last:?}"
    );
    assert!(!last[0].contains("99999999"));
}

#[tokio::test]
async fn envoy_from_files_and_the_built_in_proxy_talk_both_ways() {
    let world = World::new().await;
    let (to_cart, to_shop, to_own) = (upstream("cart"), upstream("shop"), upstream("cart"));
    let built_in = SidecarKind::ConnectProxy;
    let _cart = world
        .side("cart", SidecarKind::Envoy, &[to_shop.clone(), to_own.clone()])
        .await;
    let _shop = world
        .side("shop", built_in.clone(), std::slice::from_ref(&to_cart))
        .await;
    echoes(connected("built-in to Envoy", to_cart.bind).await).await;
    echoes(connected("Envoy to built-in", to_shop.bind).await).await;
    echoes(connected("Envoy to Envoy", to_own.bind).await).await;

    // Envoy as the server: live ones of the pair are cut, too, which Consul's own proxy does not do.
    let (live, other) = (
        connected("a live one", to_cart.bind).await,
        connected("another's", to_own.bind).await,
    );
    let denial = world.consul.intention("shop", "cart", "deny").await;
    is_cut(live).await;
    refused("a denial", to_cart.bind).await;
    echoes(other).await;
    let path = format!("connect/intentions/{denial}");
    world
        .consul
        .call(reqwest::Method::DELETE, &path, serde_json::Value::Null)
        .await;
    echoes(connected("allowed again", to_cart.bind).await).await;

    // Envoy as the client: the built-in proxy decides.
    world.consul.intention("cart", "shop", "deny").await;
    refused("the other's denial", to_shop.bind).await;
}

#[tokio::test]
async fn envoy_follows_a_new_authority() {
    let world = World::new().await;
    let way = upstream("cart");
    let _cart = world.side("cart", SidecarKind::Envoy, &[]).await;
    let _shop = world
        .side("shop", SidecarKind::Envoy, std::slice::from_ref(&way))
        .await;
    let live = connected("Envoy to Envoy", way.bind).await;
    let roots = world.mesh.roots().await.unwrap();
    let before = world.mesh.identity(&service("cart")).await.unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![
        rcgen::KeyUsagePurpose::KeyCertSign,
        rcgen::KeyUsagePurpose::CrlSign,
    ];
    let domain = format!("spiffe://{}", before.id.trust_domain());
    params.subject_alt_names = vec![rcgen::SanType::URI(domain.try_into().unwrap())];
    let root = params.self_signed(&key).unwrap();
    let config = serde_json::json!({
        "Provider": "consul",
        "Config": {
            "PrivateKey": key.serialize_pem(),
            "RootCert": root.pem(),
            "LeafCertTTL": "72h",
            "RotationPeriod": "2160h",
        },
    });
    let path = "connect/ca/configuration";
    world.consul.call(reqwest::Method::PUT, path, config).await;
    // Until the leaf is one of the new authority, which takes Consul up to half a minute.
    support::within(Duration::from_secs(120), "a new authority", || async {
        let (roots_now, leaf_now) = tokio::join!(world.mesh.roots(), world.mesh.identity(&service("cart")));
        assert!(greeted(way.bind).await.is_some(), "a new connection failed");
        (roots_now.ok()? != roots && leaf_now.ok()?.chain != before.chain).then_some(())
    })
    .await;
    // And a little longer, so that the sidecars have it, too.
    for _ in 0..40 {
        assert!(greeted(way.bind).await.is_some(), "a new connection failed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    echoes(live).await;
}

#[tokio::test]
async fn haproxy_as_an_own_command_lets_in_who_is_allowed() {
    let search = format!("{}:/usr/sbin", std::env::var("PATH").unwrap());
    assert!(
        search
            .split(':')
            .any(|dir| std::path::Path::new(dir).join("haproxy").is_file()),
        "there is no haproxy in {search}: apt-get install haproxy"
    );
    let world = World::new().await;
    let run = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join("examples/haproxy/run");
    let command = SidecarKind::Command(vec![run.to_str().unwrap().to_owned()]);
    let (from_shop, from_evil) = (upstream("cart"), upstream("cart"));
    world.consul.intention("evil", "cart", "deny").await;
    let mut cart = world.side("cart", command, &[]).await;
    let built_in = SidecarKind::ConnectProxy;
    let _shop = world
        .side("shop", built_in.clone(), std::slice::from_ref(&from_shop))
        .await;
    let _evil = world
        .side("evil", built_in, std::slice::from_ref(&from_evil))
        .await;
    let live = connected("built-in to HAProxy", from_shop.bind).await;
    assert!(greeted(from_evil.bind).await.is_none());

    // It is told of rules that change, and loads them without ending what is open.
    let denial = world.consul.intention("shop", "cart", "deny").await;
    refused("a denial", from_shop.bind).await;
    let path = format!("connect/intentions/{denial}");
    world
        .consul
        .call(reqwest::Method::DELETE, &path, serde_json::Value::Null)
        .await;
    echoes(connected("allowed again", from_shop.bind).await).await;
    assert!(greeted(from_evil.bind).await.is_none());
    echoes(live).await;
    let down = |kind: &SidecarEventKind| matches!(kind, SidecarEventKind::Down { .. });
    let said = cart.events();
    assert!(!said.iter().any(down), "{said:?}");
    timeout(LONG, cart.handle.stop()).await.unwrap();
}

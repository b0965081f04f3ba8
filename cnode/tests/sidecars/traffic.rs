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

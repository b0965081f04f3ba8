//! The files of an own command.

use super::*;

#[tokio::test]
async fn an_own_command_finds_its_certificate_and_is_told_of_changes() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    world.register("cart", anywhere()).await;
    world.register("evil", anywhere()).await;
    world.rule("evil", "shop", Action::Deny);
    let (sender, mut events) = events();
    let tell = "for f in \"$MESHX_LEAF\" \"$MESHX_KEY\" \"$MESHX_ROOTS\"; do head -n 1 \"$f\"; done; \
                stat -c %a \"$MESHX_KEY\"; tr '\\n' ' ' <\"$MESHX_ALLOWED\"; echo; cat \"$MESHX_UPSTREAMS\"; echo";
    let spec = SidecarSpec {
        upstreams: vec![SidecarUpstream {
            target: service("cart"),
            bind: anywhere(),
        }],
        ..script(&format!(
            "tell() {{ {tell}; }}; trap tell HUP; tell; while :; do sleep 0.01; done"
        ))
    };
    let handle = sidecars.start(spec.clone(), sender).await.unwrap();
    let cart = world.mesh.spiffe(&service("cart")).unwrap();
    let evil = world.mesh.spiffe(&service("evil")).unwrap();
    for wanted in [
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN CERTIFICATE-----",
        "600",
        &format!("{cart} "),
    ] {
        assert_eq!(events.line().await, wanted);
    }
    let upstreams: serde_json::Value = serde_json::from_str(&events.line().await).unwrap();
    assert_eq!(upstreams[0]["server_name"], cart.server_name());
    assert_eq!(upstreams[0]["addresses"].as_array().unwrap().len(), 1);

    world.rule("evil", "shop", Action::Allow);
    sidecars.rules_changed();
    let mut lines = Vec::new();
    for _ in 0..6 {
        lines.push(events.line().await);
    }
    assert_eq!(lines[4], format!("{cart} {evil} "));

    // Without being told it sees it, too, only later.
    world.rule("cart", "shop", Action::Deny);
    for _ in 0..6 {
        lines.push(events.line().await);
    }
    assert_eq!(lines[10], format!("{evil} "));
    handle.set_upstreams(Vec::new()).unwrap();
    for _ in 0..6 {
        lines.push(events.line().await);
    }
    assert_eq!(lines[17], "[]");
    handle.stop().await;
}

#[tokio::test]
async fn who_does_not_listen_for_sighup_gets_none() {
    let world = World::new();
    let sidecars = world.sidecars(world.settings());
    let (sender, mut events) = events();
    let handle = sidecars
        .start(
            script("cat \"$MESHX_ALLOWED\"; echo up; while ! grep -q svc/cart \"$MESHX_ALLOWED\"; do sleep 0.01; done; \
                    sleep 0.2; echo saw; exec sleep 600"),
            sender,
        )
        .await
        .unwrap();
    assert_eq!(
        events.line().await,
        "up",
        "nobody is known yet, so nobody is let in"
    );
    world.register("cart", anywhere()).await;
    assert_eq!(events.line().await, "saw");
    handle.stop().await;
}

//! Entries that stay in Consul whatever it loses, and whose they are.

use std::time::Duration;

use meshx::mesh::{
    Authorization, Catalogue, Certificates, DataPlane, Diagnosis, Entry, Level, META_CLUSTER, MeshError,
    Protocol, Registration, Sidecar, SidecarUpstream, Weights,
};
use reqwest::Method;
use serde_json::json;
use tokio::net::TcpListener;

use crate::support::{Consul, PROMISED_AGAIN, address, node, plain, ready, service, until, within};

#[tokio::test]
async fn what_a_killed_consul_lost_is_registered_again() {
    let mut consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    mesh.register(&plain("a", "echo", "echo-1")).await.unwrap();
    mesh.register(&plain("a", "gone", "gone-1")).await.unwrap();
    consul.kill();
    // Given up while Consul cannot be told.
    assert!(mesh.deregister("gone-1").await.is_err());
    consul.run().await;
    for id in ["shop@h1", "echo-1"] {
        within(PROMISED_AGAIN, id, || async {
            consul.entry(id).await.map(|_| ())
        })
        .await;
    }
    assert_eq!(consul.entry("gone-1").await, None, "it was not kept");
    let found = until("the node", || async { mesh.node("shop@h1").await.ok().flatten() }).await;
    assert_eq!(found, node("a", "shop@h1").instance);
    // The new Consul made another trust domain; pairs are asked about in its words.
    let decision = until("an answer", || async {
        let source = mesh.spiffe(&service("echo")).ok()?;
        mesh.authorize(&source, &service("shop"))
            .await
            .ok()
            .filter(|decision| decision.allowed)
    })
    .await;
    assert!(decision.rule.contains("default"), "{decision:?}");
}

#[tokio::test]
async fn what_hangs_is_critical_whatever_consul_loses() {
    let mut consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    let mut labelled = node("a", "shop@h1");
    labelled.instance.meta = [(META_CLUSTER.to_owned(), "blue".to_owned())].into();
    mesh.register(&labelled).await.unwrap();
    mesh.set_critical("shop@h1", Some("it hangs & more"))
        .await
        .unwrap();
    let status = async || {
        let all = mesh.services().await.ok()?;
        all.into_iter().find(|listed| listed.instance.id == "shop@h1")
    };
    let hangs = async || {
        status()
            .await
            .filter(|listed| listed.status == "critical: it hangs & more")
    };
    until("critical", hangs).await;
    until("nobody led to it", async || {
        mesh.node("shop@h1").await.ok()?.is_none().then_some(())
    })
    .await;
    // A Consul that has lost it gets it as it is, and not as passing.
    consul.kill();
    consul.run().await;
    within(PROMISED_AGAIN, "the entry", || async {
        consul.entry("shop@h1").await.map(|_| ())
    })
    .await;
    let listed = until("its status", status).await;
    assert!(listed.status.starts_with("critical"), "{listed:?}");
    mesh.set_critical("shop@h1", None).await.unwrap();
    let found = until("the node", || async { mesh.node("shop@h1").await.ok().flatten() }).await;
    assert_eq!(found, labelled.instance);
}

#[tokio::test]
async fn a_consul_that_comes_back_with_its_state_keeps_all_and_forgets_what_was_given_up() {
    let mut consul = Consul::on_disk().await;
    let mesh = consul.mesh("a", &["h1"]);
    let before = ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    mesh.register(&plain("a", "gone", "gone-1")).await.unwrap();
    consul.kill();
    assert!(mesh.deregister("gone-1").await.is_err());
    consul.run().await;
    within(PROMISED_AGAIN, "passing", || async {
        mesh.node("shop@h1").await.ok().flatten().map(|_| ())
    })
    .await;
    within(PROMISED_AGAIN, "its end", || async {
        consul.entry("gone-1").await.is_none().then_some(())
    })
    .await;
    assert_eq!(ready(|| mesh.identity(&service("shop"))).await.id, before.id);
}

/// Consul keeps the status of a check that it knows: of a host that crashed, and of another program's.
#[tokio::test]
async fn an_entry_that_was_critical_passes_as_soon_as_it_is_registered_again() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    let mut shop = node("a", "shop@h1");
    // The next refresh is far beyond this test's patience.
    shop.ttl = Some(Duration::from_secs(3600));
    mesh.register(&shop).await.unwrap();
    let passes = async || mesh.node("shop@h1").await.ok().flatten();
    until("passing", passes).await;
    for _round in 0..3 {
        consul
            .call(Method::PUT, "agent/check/fail/meshx:shop@h1", json!(null))
            .await;
        until("critical", async || passes().await.is_none().then_some(())).await;
        mesh.register(&shop).await.unwrap();
        assert_eq!(until("passing", passes).await, shop.instance);
    }
}

#[tokio::test]
async fn an_entry_that_somebody_else_removed_comes_back() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    // Whenever the mesh brings it back before it is asked, it is removed again.
    until("the loss to be told", async || {
        if consul.entry("shop@h1").await.is_some() {
            consul
                .call(Method::PUT, "agent/service/deregister/shop@h1", json!(null))
                .await;
        }
        let findings = mesh.findings().await;
        findings
            .iter()
            .any(|finding| finding.level == Level::Error && finding.text.contains("lost shop@h1"))
            .then_some(())
    })
    .await;
    within(PROMISED_AGAIN, "the entry", || async {
        consul.entry("shop@h1").await.map(|_| ())
    })
    .await;
}

#[tokio::test]
async fn while_consul_hangs_the_last_answers_hold_and_nothing_is_lost() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    let (shop, cart) = (service("shop"), mesh.spiffe(&service("cart")).unwrap());
    assert!(mesh.authorize(&cart, &shop).await.unwrap().allowed);
    assert!(mesh.node("shop@h1").await.unwrap().is_some());
    consul.stop().await;
    let decision = mesh.authorize(&cart, &shop).await.unwrap();
    assert!(decision.allowed && decision.rule.contains("ago"), "{decision:?}");
    assert!(
        mesh.node("shop@h1").await.unwrap().is_some(),
        "from the warm copy"
    );
    let unknown = mesh.spiffe(&service("other")).unwrap();
    assert!(matches!(
        mesh.authorize(&unknown, &shop).await,
        Err(MeshError::Unavailable(_))
    ));
    // Long enough for the check to become critical once Consul looks at its clock again.
    tokio::time::sleep(Duration::from_secs(6)).await;
    consul.go_on();
    until("passing again", || async {
        let checks = consul.get("health/checks/shop").await;
        (checks[0]["Status"] == "passing").then_some(())
    })
    .await;
    assert!(mesh.authorize(&cart, &shop).await.is_ok());
}

#[tokio::test]
async fn a_check_that_nobody_refreshes_becomes_critical() {
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    let short = Entry {
        ttl: Some(Duration::from_secs(3)),
        ..node("a", "shop@h1")
    };
    a.register(&short).await.unwrap();
    assert!(b.node("shop@h1").await.unwrap().is_some());
    // As if the agent had been killed.
    drop(a);
    until("critical", || async {
        b.node("shop@h1").await.unwrap().is_none().then_some(())
    })
    .await;
    let listed = b.services().await.unwrap();
    assert_eq!(listed[0].status, "critical: TTL expired");
}

#[tokio::test]
async fn an_agent_that_was_killed_finds_its_entries_and_takes_the_stale_ones_away() {
    let consul = Consul::dev().await;
    let first = consul.mesh("a", &["h1"]);
    first.register(&node("a", "shop@h1")).await.unwrap();
    first.register(&plain("a", "echo", "echo-1")).await.unwrap();
    let other = consul.mesh("b", &["h2"]);
    other.register(&plain("b", "other", "other-1")).await.unwrap();
    drop(first);
    let second = consul.mesh("a", &["h1"]);
    second.register(&node("a", "shop@h1")).await.unwrap();
    until("the end of the stale entry", || async {
        consul.entry("echo-1").await.is_none().then_some(())
    })
    .await;
    for id in ["shop@h1", "other-1"] {
        assert!(consul.entry(id).await.is_some(), "{id}");
    }
}

#[tokio::test]
async fn names_and_hosts_belong_to_one_agent() {
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    a.register(&node("a", "shop@h1")).await.unwrap();
    let error = b.register(&node("b", "shop@h1")).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::NameTaken(text) if text.contains("agent a")),
        "{error:?}"
    );

    let thief = consul.mesh("thief", &["h1"]);
    let error = thief.register(&node("thief", "cart@h1")).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::HostTaken(text) if text.contains("agent a") && text.contains("h1")),
        "{error:?}"
    );
    let findings = thief.findings().await;
    assert!(
        findings
            .iter()
            .any(|f| f.level == Level::Error && f.text.contains("agent a has nodes of h1"))
    );
    // Services that are no nodes have no host.
    thief.register(&plain("thief", "echo", "echo-1")).await.unwrap();
    let error = a.register(&plain("a", "echo", "echo-1")).await.unwrap_err();
    assert!(matches!(error, MeshError::NameTaken(_)), "{error:?}");

    a.deregister("shop@h1").await.unwrap();
    until("a free host", || async {
        thief.register(&node("thief", "cart@h1")).await.ok()
    })
    .await;
}

#[tokio::test]
async fn an_id_of_another_program_is_taken_by_force_only() {
    let consul = Consul::dev().await;
    let theirs = json!({ "ID": "echo-1", "Name": "echo", "Port": 1, "Meta": { "whose": "theirs" } });
    consul.call(Method::PUT, "agent/service/register", theirs).await;
    let mesh = consul.mesh("a", &["h1"]);
    let mut entry = plain("a", "echo", "echo-1");
    let error = mesh.register(&entry).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::NameTaken(text) if text.contains("force")),
        "{error:?}"
    );
    assert_eq!(consul.entry("echo-1").await.unwrap()["Meta"]["whose"], "theirs");
    entry.force = true;
    mesh.register(&entry).await.unwrap();
    assert_eq!(consul.entry("echo-1").await.unwrap()["Meta"]["meshx-agent"], "a");
    assert_eq!(mesh.instances(&service("echo")).await.unwrap(), [entry.instance]);
}

#[tokio::test]
async fn an_adopted_entry_stays_somebody_elses() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let mut entry = plain("a", "echo", "echo-1");
    entry.adopt = true;
    let error = mesh.register(&entry).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::Refused(text) if text.contains("adopt")),
        "{error:?}"
    );

    let theirs = json!({
        "ID": "echo-1", "Name": "echo", "Address": "127.0.0.1", "Port": 7777, "Connect": { "Native": true },
        "Check": { "CheckID": "theirs", "TTL": "2s" },
    });
    consul.call(Method::PUT, "agent/service/register", theirs).await;
    mesh.register(&entry).await.unwrap();
    assert_eq!(mesh.adopted("echo-1"), Some(address(7777)));
    until("its check to be refreshed", || async {
        let found = mesh.instances(&service("echo")).await.unwrap();
        (!found.is_empty()).then_some(found)
    })
    .await;
    let found = mesh.instances(&service("echo")).await.unwrap();
    assert_eq!(
        (found[0].protocol, found[0].address),
        (Protocol::Connect, address(7777))
    );
    let error = mesh
        .register(&Entry {
            adopt: true,
            ..plain("a", "shop", "echo-1")
        })
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("registered as service echo"),
        "{error}"
    );

    mesh.deregister("echo-1").await.unwrap();
    assert!(consul.entry("echo-1").await.is_some());
}

#[tokio::test]
async fn an_entry_says_what_it_was_given() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let entry = Entry {
        tags: vec!["blue".into()],
        meta: [("rack".to_owned(), "7".to_owned())].into(),
        weights: Some(Weights {
            passing: 5,
            warning: 2,
        }),
        extra: json!({ "EnableTagOverride": true, "port": 1 })
            .as_object()
            .unwrap()
            .clone(),
        ..node("a", "my_app.Ä/x@h1")
    };
    mesh.register(&entry).await.unwrap();
    let seen = consul.entry(&entry.instance.id).await.unwrap();
    assert_eq!(seen["Service"], json!(entry.instance.service));
    assert_eq!((&seen["Port"], &seen["Tags"]), (&json!(7000), &json!(["blue"])));
    assert_eq!(seen["Weights"], json!({ "Passing": 5, "Warning": 2 }));
    assert_eq!(
        (&seen["Meta"]["rack"], &seen["EnableTagOverride"]),
        (&json!("7"), &json!(true))
    );
    let listed = mesh.services().await.unwrap();
    let instance = meshx::mesh::Instance {
        meta: entry.meta.clone(),
        ..entry.instance.clone()
    };
    assert_eq!((&listed[0].instance, &listed[0].tags), (&instance, &entry.tags));
    mesh.deregister(&entry.instance.id).await.unwrap();
    assert!(consul.entry(&entry.instance.id).await.is_none());
}

#[tokio::test]
async fn what_consul_does_not_take_is_told_in_its_words() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let entry = Entry {
        meta: [("no spaces".to_owned(), "7".to_owned())].into(),
        ..plain("a", "echo", "echo-1")
    };
    let error = mesh.register(&entry).await.unwrap_err();
    assert!(
        matches!(&error, MeshError::Refused(text) if text.contains("no spaces")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_sidecar_passes_when_its_port_answers() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let public = proxy.local_addr().unwrap();
    let mut entry = plain("a", "web", "web-1");
    entry.instance.address = public;
    entry.data_plane = DataPlane::Sidecar(Sidecar {
        bind: [127, 0, 0, 1].into(),
        local: address(9000),
        upstreams: vec![SidecarUpstream {
            target: service("shop"),
            bind: address(9001),
        }],
    });
    mesh.register(&entry).await.unwrap();
    within(Duration::from_secs(30), "passing", || async {
        mesh.passing("web-1").await.ok()
    })
    .await;
    let found = mesh.instances(&service("web")).await.unwrap();
    assert_eq!(
        (found[0].id.as_str(), found[0].protocol, found[0].address),
        ("web-1", Protocol::Connect, public)
    );
    let proxy_entry = consul.entry("web-1-sidecar-proxy").await.unwrap();
    assert_eq!(proxy_entry["Proxy"]["LocalServicePort"], 9000);
    assert_eq!(proxy_entry["Proxy"]["Upstreams"][0]["LocalBindPort"], 9001);
    assert_eq!(consul.entry("web-1").await.unwrap()["Port"], 9000);

    // Its sidecar alone is lost: found by comparing.
    consul
        .call(
            Method::PUT,
            "agent/service/deregister/web-1-sidecar-proxy",
            json!(null),
        )
        .await;
    within(Duration::from_secs(90), "the sidecar", || async {
        consul.entry("web-1-sidecar-proxy").await.map(|_| ())
    })
    .await;
    mesh.deregister("web-1").await.unwrap();
    for id in ["web-1", "web-1-sidecar-proxy"] {
        assert!(consul.entry(id).await.is_none(), "{id}");
    }
}

#[tokio::test]
async fn consul_may_come_later_than_the_agent() {
    let mut consul = Consul::dev().await;
    consul.kill();
    let mesh = consul.mesh("a", &["h1"]);
    let error = mesh.register(&node("a", "shop@h1")).await.unwrap_err();
    assert!(matches!(error, MeshError::Unavailable(_)), "{error:?}");
    assert!(matches!(
        mesh.identity(&service("shop")).await,
        Err(MeshError::Unavailable(_))
    ));
    let findings = mesh.findings().await;
    assert!(
        findings
            .iter()
            .any(|finding| finding.what == "consul" && finding.level == Level::Error)
    );
    consul.run().await;
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    assert!(mesh.node("shop@h1").await.unwrap().is_some());
}

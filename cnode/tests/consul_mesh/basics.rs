//! The ordinary day: a service comes, is found, certified and authorised, and goes.

use meshx::mesh::{
    Authorization, Catalogue, Certificates, Diagnosis, Level, META_CLUSTER, Protocol, Registration,
};
use reqwest::Method;
use serde_json::Value;

use crate::support::{Consul, node, plain, ready, service, until};

#[tokio::test]
async fn a_node_comes_and_goes() {
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    let identity = ready(|| a.identity(&service("shop"))).await;
    assert_eq!(identity.id.service(), &service("shop"));
    assert_eq!(a.spiffe(&service("shop")).unwrap(), identity.id);

    assert_eq!(b.node("shop@h1").await.unwrap(), None);
    a.register(&node("a", "shop@h1")).await.unwrap();
    let found = until("the node", || async { b.node("shop@h1").await.unwrap() }).await;
    assert_eq!(found, node("a", "shop@h1").instance);
    let found = [found];
    assert_eq!(b.instances(&service("shop")).await.unwrap(), found);
    assert_eq!(b.nodes().await.unwrap(), found);
    a.passing("shop@h1").await.unwrap();

    a.register(&plain("a", "echo", "echo-1")).await.unwrap();
    let listed = b.services().await.unwrap();
    let ids: Vec<_> = listed.iter().map(|listed| listed.instance.id.as_str()).collect();
    assert_eq!(ids, ["echo-1", "shop@h1"]);
    assert!(
        listed
            .iter()
            .all(|listed| listed.is_passing() && listed.instance.protocol == Protocol::Meshx)
    );
    assert_eq!(b.nodes().await.unwrap(), found);

    a.deregister("shop@h1").await.unwrap();
    until("the node's end", || async {
        b.node("shop@h1").await.unwrap().is_none().then_some(())
    })
    .await;
    a.deregister("shop@h1").await.unwrap();
}

#[tokio::test]
async fn a_node_is_seen_with_its_label_and_metadata_and_counts_as_a_node_while_it_hangs() {
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    let given = [("tier".to_owned(), "web".to_owned())];
    let label = (META_CLUSTER.to_owned(), "blue".to_owned());
    let mut entry = node("a", "shop@h1");
    entry.meta = given.clone().into();
    entry.instance.meta = given.into_iter().chain([label]).collect();
    a.register(&entry).await.unwrap();
    a.register(&plain("a", "echo", "echo-1")).await.unwrap();
    let found = until("the node", || async { b.node("shop@h1").await.unwrap() }).await;
    assert_eq!(found, entry.instance);
    assert_eq!(found.cluster(), "blue");
    assert_eq!(b.nodes().await.unwrap(), [found]);
    // What is watched for nodes may pass later.
    assert_eq!(b.node_services().await.unwrap(), [service("shop")]);
    a.set_critical("shop@h1", Some("it hangs")).await.unwrap();
    until("the critical node", || async {
        b.nodes().await.unwrap().is_empty().then_some(())
    })
    .await;
    assert_eq!(b.node_services().await.unwrap(), [service("shop")]);
    a.set_critical("shop@h1", None).await.unwrap();
    until("the node that passes again", || async {
        (!b.nodes().await.unwrap().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn intentions_decide_and_changes_are_told() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    let (shop, cart) = (service("shop"), service("cart"));
    ready(|| mesh.identity(&shop)).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    mesh.register(&node("a", "cart@h1")).await.unwrap();
    let source = mesh.spiffe(&cart).unwrap();

    let decision = mesh.authorize(&source, &shop).await.unwrap();
    assert!(decision.allowed, "{decision:?}");
    // Twice for the start.
    mesh.changed().await.unwrap();
    mesh.changed().await.unwrap();
    let id = consul.intention("cart", "shop", "deny").await;
    mesh.changed().await.unwrap();
    let decision = mesh.authorize(&source, &shop).await.unwrap();
    assert!(
        !decision.allowed && decision.rule.contains("cart -> shop deny"),
        "{decision:?}"
    );
    assert!(
        mesh.authorize(&mesh.spiffe(&shop).unwrap(), &cart)
            .await
            .unwrap()
            .allowed
    );
    let intentions = mesh.intentions().await.unwrap();
    assert_eq!(intentions.default, "allow");
    assert_eq!(intentions.rules[0].action, "deny");

    mesh.changed().await.unwrap();
    consul
        .call(Method::DELETE, &format!("connect/intentions/{id}"), Value::Null)
        .await;
    mesh.changed().await.unwrap();
    until("allowed again", || async {
        mesh.authorize(&source, &shop)
            .await
            .unwrap()
            .allowed
            .then_some(())
    })
    .await;

    let other = source.in_domain("another.consul");
    let decision = mesh.authorize(&other, &shop).await.unwrap();
    assert!(
        !decision.allowed && decision.rule.contains("trust domain"),
        "{decision:?}"
    );
    let error = mesh.authorize(&source, &service("nobody")).await.unwrap_err();
    assert!(error.to_string().contains("no instance"), "{error}");
}

#[tokio::test]
async fn a_healthy_mesh_has_no_errors() {
    let consul = Consul::dev().await;
    let mesh = consul.mesh("a", &["h1"]);
    ready(|| mesh.identity(&service("shop"))).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    let findings = mesh.findings().await;
    let bad: Vec<_> = findings
        .iter()
        .filter(|finding| finding.level == Level::Error)
        .collect();
    assert!(bad.is_empty(), "{bad:?}");
    for what in [
        "leader",
        "clock",
        "version",
        "acl",
        "registrations",
        "root",
        "certificate of shop",
    ] {
        assert!(
            findings.iter().any(|finding| finding.what == what),
            "{what}: {findings:?}"
        );
    }
}

#[tokio::test]
async fn many_at_once() {
    const MANY: usize = 150;
    let consul = Consul::dev().await;
    let (a, b) = (consul.mesh("a", &["h1"]), consul.mesh("b", &["h2"]));
    let entries: Vec<_> = (0..MANY)
        .map(|i| plain("a", "echo", &format!("echo-{i}")))
        .collect();
    let registered = futures::future::join_all(entries.iter().map(|entry| a.register(entry))).await;
    assert!(registered.iter().all(Result::is_ok), "{registered:?}");
    assert_eq!(b.instances(&service("echo")).await.unwrap().len(), MANY);
    let gone = futures::future::join_all(entries.iter().map(|entry| a.deregister(&entry.instance.id))).await;
    assert!(gone.iter().all(Result::is_ok), "{gone:?}");
    until("their end", || async {
        b.instances(&service("echo"))
            .await
            .unwrap()
            .is_empty()
            .then_some(())
    })
    .await;
}

//! Tokens of least rights: what each may, and how what it may not is told.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use meshx::mesh::consul::{ConsulArgs, ConsulFile, ConsulSettings};
use meshx::mesh::{Authorization, Catalogue, Certificates, Diagnosis, Level, MeshError, Registration, Token};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Consul, PROMISED_AGAIN, node, open, plain, ready, service, until, within};

/// For an agent whose clients bring their own tokens: it finds, and is nobody.
const AGENT: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" }";

/// For one service.
fn being(name: &str) -> String {
    format!("service \"{name}\" {{ policy = \"write\" }}")
}

#[tokio::test]
async fn two_services_with_their_own_tokens_live_on_one_host() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    let shop_token = Token::new(consul.policy("shop", &being("shop")).await);
    let cart_token = Token::new(consul.policy("cart", &being("cart")).await);
    let (shop, cart) = (service("shop"), service("cart"));
    consul.intention("cart", "shop", "allow").await;

    let mesh = open(consul.settings(Some(&agent)), "a", &["h1"]);
    mesh.present_token(&shop, shop_token).await.unwrap();
    mesh.present_token(&cart, cart_token).await.unwrap();
    let identity = ready(|| mesh.identity(&shop)).await;
    ready(|| mesh.identity(&cart)).await;
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    mesh.register(&node("a", "cart@h1")).await.unwrap();
    let found = until("the node", || async { mesh.node("shop@h1").await.unwrap() }).await;
    assert_eq!(found.service, *identity.id.service());
    mesh.passing("cart@h1").await.unwrap();

    let decision = mesh.authorize(&mesh.spiffe(&cart).unwrap(), &shop).await.unwrap();
    assert!(decision.allowed, "{decision:?}");
    let decision = mesh.authorize(&mesh.spiffe(&shop).unwrap(), &cart).await.unwrap();
    assert!(
        !decision.allowed && decision.rule.contains("Default"),
        "{decision:?}"
    );

    let findings = mesh.findings().await;
    let bad: Vec<_> = findings
        .iter()
        .filter(|finding| finding.level == Level::Error)
        .collect();
    assert!(bad.is_empty(), "{bad:?}");

    // With the last instance goes the token, and with it the certificate.
    mesh.deregister("shop@h1").await.unwrap();
    let error = until("a refusal", || async { mesh.identity(&shop).await.err() }).await;
    assert!(
        matches!(&error, MeshError::Forbidden(text) if text.contains("service:write on \"shop\"")),
        "{error:?}"
    );
    assert!(mesh.identity(&cart).await.is_ok());
}

#[tokio::test]
async fn a_token_brings_no_other_services_certificate() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    let cart_token = consul.policy("cart", &being("cart")).await;
    let mesh = open(consul.settings(Some(&agent)), "a", &["h1"]);
    let shop = service("shop");
    let refused = async |whose: &str| {
        let error = mesh.identity(&shop).await.unwrap_err();
        let MeshError::Forbidden(text) = &error else {
            panic!("{error:?}")
        };
        assert!(
            text.contains(whose) && text.contains("service:write on \"shop\""),
            "{text}"
        );
        let error = mesh.register(&node("a", "shop@h1")).await.unwrap_err();
        let MeshError::Forbidden(text) = &error else {
            panic!("{error:?}")
        };
        assert!(
            text.contains(whose) && text.contains("service:write on \"shop\""),
            "{text}"
        );
    };
    refused("the agent's token").await;
    let text = format!("{:?}", mesh.findings().await);
    let error = mesh.present_token(&shop, Token::new(cart_token.clone())).await;
    let MeshError::Forbidden(refusal) = &error.unwrap_err() else {
        panic!("it took a token of another service")
    };
    assert!(
        refusal.contains("the client's token") && refusal.contains("service:write on \"shop\""),
        "{refusal}"
    );
    refused("the agent's token").await;
    assert!(consul.entry("shop@h1").await.is_none());
    assert!(!text.contains(&agent), "a finding shows a token");

    // Rights that are given later are enough.
    let both = format!("{} {}", being("cart"), being("shop"));
    let policy = consul.get("acl/policies").await;
    let id = policy
        .as_array()
        .unwrap()
        .iter()
        .find(|policy| policy["Name"] == "cart")
        .unwrap()["ID"]
        .clone();
    let path = format!("acl/policy/{}", id.as_str().unwrap());
    consul
        .call(
            Method::PUT,
            &path,
            json!({ "ID": id, "Name": "cart", "Rules": both }),
        )
        .await;
    let again = || async {
        mesh.present_token(&shop, Token::new(cart_token.clone()))
            .await
            .ok()
    };
    until("the token's new right", again).await;
    until("the certificate", || async { mesh.identity(&shop).await.ok() }).await;
}

#[tokio::test]
async fn an_agent_that_may_be_nobody_says_which_right_is_missing() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    let mesh = open(consul.settings(Some(&agent)), "a", &["h1"]);
    let error = mesh.register(&plain("a", "echo", "echo-1")).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the agent's token lacks service:write on \"echo\""),
        "{error}"
    );
    let _ = mesh.identity(&service("echo")).await;
    let findings = mesh.findings().await;
    for text in [
        "the agent's token has service:read on all services",
        "the agent's token lacks service:write on \"echo\"",
    ] {
        assert!(
            findings.iter().any(|finding| finding.text == text),
            "{text}: {findings:?}"
        );
    }

    let blind = consul.policy("blind", "key \"x\" { policy = \"read\" }").await;
    let mesh = open(consul.settings(Some(&blind)), "b", &["h2"]);
    let findings = mesh.findings().await;
    let text = "the agent's token lacks service:read on all services";
    assert!(
        findings
            .iter()
            .any(|finding| finding.level == Level::Warning && finding.text == text),
        "{findings:?}"
    );

    let anonymous = open(consul.settings(None), "c", &["h3"]);
    let error = anonymous
        .register(&plain("c", "echo", "echo-1"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no token was given"), "{error}");
    let unknown = open(
        consul.settings(Some("99999999-2222-3333-4444-555555555555")),
        "d",
        &["h4"],
    );
    let error = unknown.register(&plain("d", "echo", "echo-1")).await.unwrap_err();
    assert!(matches!(&error, MeshError::Forbidden(text) if text.contains("does not know the agent's token")));
}

#[tokio::test]
async fn whoever_only_dials_needs_no_right_to_be_the_target() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    let shop_token = Token::new(consul.policy("shop", &being("shop")).await);
    let cart_token = Token::new(consul.policy("cart", &being("cart")).await);
    let (here, there) = (
        open(consul.settings(Some(&agent)), "a", &["h1"]),
        open(consul.settings(Some(&agent)), "b", &["h2"]),
    );
    here.present_token(&service("cart"), cart_token).await.unwrap();
    ready(|| here.identity(&service("cart"))).await;
    there.present_token(&service("shop"), shop_token).await.unwrap();
    there.register(&node("b", "shop@h2")).await.unwrap();
    let source = here.spiffe(&service("cart")).unwrap();
    let decision = here.authorize(&source, &service("shop")).await.unwrap();
    assert!(!decision.allowed, "{decision:?}");
    consul.intention("cart", "shop", "allow").await;
    let decision = until("an answer", || async {
        here.authorize(&source, &service("shop"))
            .await
            .ok()
            .filter(|decision| decision.allowed)
    })
    .await;
    assert!(decision.rule.contains("cart -> shop allow"), "{decision:?}");
}

#[tokio::test]
async fn whose_token_is_gone_is_told_with_what_to_do() {
    let consul = Consul::with_acl().await;
    for (whose, fix) in [("client", "the service's program"), ("agent", "the token file")] {
        consul.policy(whose, &format!("{AGENT} {}", being("shop"))).await;
        let token = consul.token_of(whose).await;
        let secret = token["SecretID"].as_str().unwrap();
        let other = consul.policy(&format!("other-than-{whose}"), AGENT).await;
        let own = if whose == "agent" { secret } else { &other };
        let mesh = open(consul.settings(Some(own)), whose, &["h1"]);
        if whose == "client" {
            let token = Token::new(secret.to_owned());
            mesh.present_token(&service("shop"), token).await.unwrap();
        }
        mesh.register(&plain(whose, "shop", &format!("shop-{whose}")))
            .await
            .unwrap();
        let path = format!("acl/token/{}", token["AccessorID"].as_str().unwrap());
        consul.call(Method::DELETE, &path, Value::Null).await;
        let gone = until("the finding", async || {
            let findings = mesh.findings().await;
            findings
                .into_iter()
                .find(|found| found.what == "acl" && found.level == Level::Error)
        })
        .await;
        assert!(gone.fix.contains(fix), "{gone:?}");
    }
}

/// Consul takes an entry away with the token that it was registered with.
#[tokio::test]
async fn an_entry_goes_also_when_its_first_token_is_gone() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    consul.policy("shop", &being("shop")).await;
    let mesh = open(consul.settings(Some(&agent)), "a", &["h1"]);
    let shop = service("shop");
    let mut entry = plain("a", "shop", "shop-1");
    // The next refresh is far beyond this test's patience.
    entry.ttl = Some(Duration::from_secs(3600));
    let (old, new) = (consul.token_of("shop").await, consul.token_of("shop").await);
    let token = |token: &Value| Token::new(token["SecretID"].as_str().unwrap().to_owned());
    mesh.present_token(&shop, token(&old)).await.unwrap();
    mesh.register(&entry).await.unwrap();
    let passes = async || {
        let found = mesh.instances(&shop).await.ok()?;
        Some(!found.is_empty())
    };
    until("passing", async || passes().await.filter(|passes| *passes)).await;
    // It passes again once it is registered with the new token, and refreshed.
    consul
        .call(Method::PUT, "agent/check/fail/meshx:shop-1", Value::Null)
        .await;
    until("critical", async || passes().await.filter(|passes| !passes)).await;
    mesh.present_token(&shop, token(&new)).await.unwrap();
    until("passing", async || passes().await.filter(|passes| *passes)).await;
    let path = format!("acl/token/{}", old["AccessorID"].as_str().unwrap());
    consul.call(Method::DELETE, &path, Value::Null).await;
    mesh.deregister("shop-1").await.unwrap();
    until("its end", async || {
        let found = consul.get("catalog/service/shop").await;
        found.as_array().unwrap().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_rotated_token_takes_over_without_a_gap() {
    let consul = Consul::with_acl().await;
    let rules = format!("{AGENT} {}", being("shop"));
    let old = consul.policy("all", &rules).await;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("token");
    std::fs::write(&path, &old).unwrap();
    let args = ConsulArgs {
        consul_addr: Some(consul.address()),
        consul_token_file: Some(path.clone()),
        ..ConsulArgs::default()
    };
    let settings = ConsulSettings::read(args, ConsulFile::default(), |_| None).unwrap();
    let mesh = open(settings, "a", &["h1"]);
    mesh.register(&node("a", "shop@h1")).await.unwrap();
    for (mode, open) in [(0o644, true), (0o640, false)] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let findings = mesh.findings().await;
        assert_eq!(
            findings.iter().any(|finding| finding.what == "secret"),
            open,
            "{findings:?}"
        );
    }

    let new = consul.token_of("all").await["SecretID"]
        .as_str()
        .unwrap()
        .to_owned();
    let accessor = consul.get("acl/tokens").await;
    let tokens = accessor.as_array().unwrap();
    let found = async |secret: &str| {
        for token in tokens {
            let path = format!("acl/token/{}", token["AccessorID"].as_str().unwrap());
            let token = consul.get(&path).await;
            if token["SecretID"] == secret {
                return path;
            }
        }
        panic!("no such token");
    };
    let doomed = found(&old).await;
    let next = temp.path().join("next");
    std::fs::write(&next, &new).unwrap();
    std::fs::rename(&next, &path).unwrap();
    consul.call(Method::DELETE, &doomed, Value::Null).await;
    // Consul's own copy of the entry is kept by the new token, too: it survives longer than its check would.
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(7) {
        let checks = consul.get("health/checks/shop").await;
        assert_eq!(checks[0]["Status"], "passing");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    consul
        .call(Method::PUT, "agent/service/deregister/shop@h1", Value::Null)
        .await;
    within(PROMISED_AGAIN, "the entry", || async {
        consul.entry("shop@h1").await.map(|_| ())
    })
    .await;
    mesh.deregister("shop@h1").await.unwrap();
    assert!(consul.entry("shop@h1").await.is_none());
}

#[tokio::test]
async fn a_worse_token_is_refused_and_takes_the_place_of_none() {
    let consul = Consul::with_acl().await;
    let agent = consul.policy("agent", AGENT).await;
    let shop_token = consul.policy("shop", &being("shop")).await;
    let mesh = open(consul.settings(Some(&agent)), "a", &["h1"]);
    let shop = service("shop");
    mesh.present_token(&shop, Token::new(shop_token)).await.unwrap();
    mesh.identity(&shop).await.unwrap();
    let other = consul.policy("other", &being("other")).await;
    let error = mesh.present_token(&shop, Token::new(other)).await.unwrap_err();
    assert!(matches!(error, MeshError::Forbidden(_)), "{error:?}");
    // A client that lacks the right must not take it from one that has it.
    mesh.register(&plain("a", "shop", "shop-1")).await.unwrap();
    assert!(mesh.identity(&shop).await.is_ok());
}

//! Intentions of later Consuls, and answers that do not go together.

use super::certificates::{Authority, SHOP, certifies, identity_of};
use super::*;

/// A Consul that says `short` of every pair and has these intentions for every destination.
async fn decides(short: Value, rules: Value) -> (Mock, Arc<ConsulMesh>, SpiffeId) {
    let authority = Authority::new("td.consul");
    let (roots, leaf) = (authority.roots(), authority.leaf(SHOP));
    let mock = Mock::new(intends(roots, leaf, short, rules)).await;
    let mesh = mock.mesh();
    identity_of(&mesh, "shop").await.unwrap();
    let source = mesh.spiffe(&service("cart")).unwrap();
    (mock, mesh, source)
}

fn intends(
    roots: Value,
    leaf: Value,
    short: Value,
    rules: Value,
) -> impl Fn(&Uri, &Value) -> Option<Response> + Send + Sync {
    let certifies = certifies(roots, leaf, 5);
    move |uri, body| match uri.path() {
        "/v1/agent/connect/authorize" => answer(1, short.to_string()),
        "/v1/connect/intentions/match" => answer(1, json!({ "shop": rules }).to_string()),
        "/v1/connect/intentions" if index_of(uri) == 3 => None,
        "/v1/connect/intentions" => answer(3, rules.to_string()),
        "/v1/health/connect/shop" if index_of(uri) == 3 => None,
        "/v1/health/connect/shop" => answer(3, json!([health("shop", "shop@h2")]).to_string()),
        "/v1/health/connect/empty" => answer(3, "[]"),
        _ => certifies(uri, body),
    }
}

fn rule(more: Value) -> Value {
    let mut rule = json!({
        "ID": "1", "Description": "d", "SourceNS": "default", "SourceName": "cart", "DestinationNS": "default",
        "DestinationName": "shop", "SourceType": "consul", "Action": "allow", "Meta": { "a": "b" }, "Precedence": 9,
        "CreatedAt": "2026-01-01T00:00:00Z", "UpdatedAt": "2026-01-01T00:00:00Z", "Hash": "x", "CreateIndex": 1,
        "ModifyIndex": 1, "DefaultAddr": "", "DefaultPort": 0, "Permissions": null, "SourcePeer": "",
        "SourcePartition": "default", "DestinationPartition": "default",
    });
    for (key, value) in more.as_object().unwrap() {
        rule[key] = value.clone();
    }
    rule
}

#[tokio::test]
async fn an_intention_that_is_not_plain_means_no() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    for (more, why) in [
        (
            json!({ "Action": "", "Permissions": [{ "Action": "allow", "HTTP": { "PathPrefix": "/" } }] }),
            "L7 permissions",
        ),
        (
            json!({ "Permissions": [{ "Action": "allow" }] }),
            "L7 permissions",
        ),
        (json!({ "Action": "log" }), "the action \"log\""),
        (json!({ "Action": null }), "the action \"\""),
        (
            json!({ "JWT": { "Providers": [{ "Name": "okta" }] } }),
            "the field JWT",
        ),
        (
            json!({ "SourceSamenessGroup": "all" }),
            "the field SourceSamenessGroup",
        ),
        (json!({ "OnlyOnSundays": true }), "the field OnlyOnSundays"),
        (json!({ "SourceType": "kubernetes" }), "source type kubernetes"),
        (json!({ "Action": "deny" }), "deny"),
        (json!({ "SourceName": "*", "Action": "deny" }), "* -> shop deny"),
    ] {
        let (_mock, mesh, source) = decides(yes.clone(), json!([rule(more)])).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert!(
            !decision.allowed && decision.rule.contains(why),
            "{why}: {decision:?}"
        );
    }
    let plain = rule(json!({ "OnlyOnSundays": false, "JWT": null }));
    let (_mock, mesh, source) = decides(yes, json!([plain])).await;
    assert!(mesh.authorize(&source, &service("shop")).await.unwrap().allowed);
}

#[tokio::test]
async fn the_first_intention_that_fits_counts_and_others_do_not() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    let deny = json!({ "Action": "deny" });
    for (others, allowed) in [
        (
            json!([
                rule(json!({ "SourceName": "other", "Action": "deny" })),
                rule(json!({}))
            ]),
            true,
        ),
        (
            json!([
                rule(json!({})),
                rule(json!({ "SourceName": "*", "Action": "deny" }))
            ]),
            true,
        ),
        (
            json!([rule(deny.clone()), rule(json!({ "SourceName": "*" }))]),
            false,
        ),
        (
            json!([
                rule(json!({ "SourcePeer": "far", "Action": "deny" })),
                rule(json!({}))
            ]),
            true,
        ),
    ] {
        let (_mock, mesh, source) = decides(yes.clone(), others.clone()).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert_eq!(decision.allowed, allowed, "{others}: {decision:?}");
    }
}

#[tokio::test]
async fn answers_that_contradict_each_other_mean_no() {
    for (short, rules) in [
        // It was deleted, and the Consul agent does not know yet.
        (
            json!({ "Authorized": true, "Reason": "Matched intention: x" }),
            json!([]),
        ),
        (
            json!({ "Authorized": false, "Reason": "Matched intention: x" }),
            json!([rule(json!({}))]),
        ),
    ] {
        let (_mock, mesh, source) = decides(short, rules).await;
        let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
        assert!(
            !decision.allowed && decision.rule.contains("contradict"),
            "{decision:?}"
        );
    }
    let default = json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" });
    let (_mock, mesh, source) = decides(default, json!(null)).await;
    let decision = mesh.authorize(&source, &service("shop")).await.unwrap();
    assert!(
        decision.allowed && decision.rule.contains("Default behavior"),
        "{decision:?}"
    );
}

#[tokio::test]
async fn while_consul_is_away_the_last_answer_holds_and_others_are_refused() {
    let yes = json!({ "Authorized": true, "Reason": "Matched intention: x" });
    let (mock, mesh, source) = decides(yes, json!([rule(json!({}))])).await;
    let shop = service("shop");
    assert!(mesh.authorize(&source, &shop).await.unwrap().allowed);
    mock.plays(|_, _| says(500, "No cluster leader"));
    let decision = mesh.authorize(&source, &shop).await.unwrap();
    assert!(
        decision.allowed && decision.rule.contains("No cluster leader"),
        "{decision:?}"
    );
    let unknown = mesh.spiffe(&service("other")).unwrap();
    let error = mesh.authorize(&unknown, &shop).await.unwrap_err();
    assert!(matches!(error, MeshError::Unavailable(_)), "{error:?}");
    // A no of Consul is none of silence.
    mock.plays(|_, _| says(403, "Permission denied"));
    let error = mesh.authorize(&source, &shop).await.unwrap_err();
    assert!(matches!(error, MeshError::Forbidden(_)), "{error:?}");
    mock.plays(|_, _| says(500, "No cluster leader"));
    assert!(
        mesh.authorize(&source, &shop).await.is_err(),
        "what was refused since is forgotten"
    );
}

#[tokio::test]
async fn the_last_answer_does_not_hold_for_ever() {
    let settings = ConsulSettings::plain("127.0.0.1:1", None).unwrap();
    let authorizer = Authorizer::new(Arc::new(Client::new(settings).unwrap()), Arc::default());
    let pair = (SpiffeId::new("td.consul", service("cart")), service("shop"));
    let decision = Decision {
        allowed: true,
        rule: "a rule".into(),
    };
    authorizer.remember(pair.clone(), decision);
    let now = tokio::time::Instant::now();
    for (waits, holds) in [(STALE_MAX - Duration::from_secs(1), true), (STALE_MAX, false)] {
        let seen = authorizer.recall(&pair, Fault::Away("silence".into()), now + waits);
        assert_eq!(seen.is_ok(), holds, "{seen:?}");
    }
}

#[tokio::test]
async fn a_target_that_is_not_there_is_not_answered_for() {
    let yes = json!({ "Authorized": true, "Reason": "Default" });
    let (_mock, mesh, source) = decides(yes, json!([])).await;
    let error = mesh.authorize(&source, &service("empty")).await.unwrap_err();
    assert!(matches!(error, MeshError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn changes_that_may_not_be_seen_are_looked_for_again_and_again() {
    let mock = Mock::new(|_, _| says(403, "ACL not found")).await;
    let mesh = mock.mesh();
    tokio::time::timeout(LONG, mesh.changed())
        .await
        .expect("an end")
        .unwrap();
}

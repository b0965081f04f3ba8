//! Entries of any make, and names that are not there.

use super::*;

#[tokio::test]
async fn entries_that_are_no_instances_are_left_out() {
    let with = |field: &str, value: Value| {
        let mut entry = health("shop", "shop@h2");
        entry["Service"][field] = value;
        entry
    };
    let sidecar = json!({
        "Node": { "Address": "10.0.0.1" },
        "Service": {
            "Kind": "connect-proxy", "ID": "shop-1-sidecar-proxy", "Service": "shop-sidecar-proxy", "Address": "",
            "Port": 21000, "Proxy": { "DestinationServiceName": "shop", "DestinationServiceID": "shop-1" },
            "Meta": { "meshx-protocol": "meshx/1" }, "Tags": ["t"],
        },
        "Checks": [{ "Status": "passing" }, { "Status": "warning", "Output": "slow\n" }],
    });
    let mut other_sidecar = sidecar.clone();
    other_sidecar["Service"]["Proxy"]["DestinationServiceName"] = json!("cart");
    let mut critical = health("shop", "shop@h3");
    critical["Checks"] = json!([{ "Status": "passing" }, { "Status": "critical" }, { "Status": "warning" }]);
    let mut strange = health("shop", "shop@h4");
    strange["Checks"] = json!([{ "Status": "fine" }]);
    let mut foreign = health("shop", "shop@h5");
    foreign["Service"]["Meta"] = json!({ "meshx-node": "no node" });
    let entries = json!([
        health("shop", "shop@h2"),
        sidecar,
        critical,
        strange,
        foreign,
        with("Service", json!("cart")),
        with("Connect", json!({})),
        with("Connect", json!(null)),
        with("Kind", json!("mesh-gateway")),
        with("Address", json!("shop.example")),
        with("Address", json!("0.0.0.0")),
        with("Port", json!(0)),
        with("Port", json!(65_536)),
        other_sidecar,
    ]);
    let mock = Mock::new(move |uri, _| match (uri.path(), index_of(uri)) {
        ("/v1/catalog/services", _) => answer(
            1,
            json!({ "shop": [], "Not A Name": [], "consul": [] }).to_string(),
        ),
        ("/v1/health/connect/shop", 0) => answer(5, entries.to_string()),
        ("/v1/health/connect/consul", 0) => answer(5, "null"),
        (path, 0) if path.starts_with("/v1/health/connect/") => answer(5, "[]"),
        _ => None,
    })
    .await;
    let mesh = mock.mesh();
    let listed = mesh.services().await.unwrap();
    let seen: Vec<_> = listed
        .iter()
        .map(|listed| {
            (
                listed.instance.id.as_str(),
                listed.status.as_str(),
                listed.instance.protocol,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("shop@h2", "passing", Protocol::Meshx),
            ("shop-1", "warning: slow", Protocol::Connect),
            ("shop@h3", "critical", Protocol::Meshx),
            ("shop@h4", "critical", Protocol::Meshx),
            ("shop@h5", "passing", Protocol::Connect),
        ]
    );
    assert_eq!(listed[1].instance.address, "10.0.0.1:21000".parse().unwrap());
    assert_eq!(listed[1].tags, ["t"]);
    assert_eq!(listed[4].instance.node, None);
    let passing = mesh.instances(&service("shop")).await.unwrap();
    assert_eq!(
        passing
            .iter()
            .map(|instance| instance.id.as_str())
            .collect::<Vec<_>>(),
        ["shop@h2", "shop@h5"]
    );
    assert_eq!(mesh.node("shop@h2").await.unwrap().unwrap().agent, "b");
    assert_eq!(mesh.node("shop@h3").await.unwrap(), None, "it does not pass");
    assert_eq!(mesh.node("no node").await.unwrap(), None);
}

#[tokio::test]
async fn a_missing_name_is_looked_up_once_and_not_for_everybody_at_once() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 if uri.path().starts_with("/v1/health/connect/") => answer(5, "[]"),
        _ => None,
    })
    .await;
    let mesh = mock.mesh();
    let asks = (0..50).map(|_| mesh.node("shop@h1"));
    for answer in futures::future::join_all(asks).await {
        assert_eq!(answer.unwrap(), None);
    }
    let lookups = || {
        mock.asked()
            .iter()
            .filter(|uri| uri.contains("/health/connect/"))
            .count()
    };
    // One for each service that it may be of, or two when the first has had its time on a slow machine.
    assert!(lookups() <= 4, "{:?}", mock.asked());
    assert!(
        mock.asked().iter().any(|uri| uri.contains("consistent")),
        "{:?}",
        mock.asked()
    );
    let before = lookups();
    let names: Vec<_> = (0..300).map(|i| format!("n{i}@h1")).collect();
    let began = Instant::now();
    let answers = futures::future::join_all(names.iter().map(|name| mesh.node(name))).await;
    let seconds = began.elapsed().as_secs() as usize + 2;
    assert!(lookups() - before <= 100 * seconds, "{}", lookups());
    if began.elapsed() < Duration::from_secs(1) {
        assert!(answers.iter().any(|answer| {
            answer
                .as_ref()
                .is_err_and(|error| error.to_string().contains("looked up"))
        }));
    }
}

#[tokio::test]
async fn a_node_may_be_a_service_of_its_own() {
    let own = ServiceName::of_single_node("shop@h2").unwrap();
    let entries = json!([health(own.as_ref(), "shop@h2")]).to_string();
    let path = format!("/v1/health/connect/{own}");
    let mock = Mock::new(move |uri, _| match index_of(uri) {
        0 if uri.path() == path => answer(5, entries.clone()),
        0 => answer(5, "[]"),
        _ => None,
    })
    .await;
    let mesh = mock.mesh();
    for _ in 0..2 {
        let found = mesh.node("shop@h2").await.unwrap().unwrap();
        assert_eq!((found.service, found.id.as_str()), (own.clone(), "shop@h2"));
    }
    assert_eq!(mesh.node("shop@h1").await.unwrap(), None);
}

#[tokio::test]
async fn services_beyond_the_watches_are_looked_up() {
    let mock = Mock::new(|uri, _| {
        let name = uri.path().strip_prefix("/v1/health/connect/")?.to_owned();
        let id = format!("{name}@h2");
        (index_of(uri) == 0).then(|| answer(5, json!([health(&name, &id)]).to_string()))?
    })
    .await;
    let mesh = mock.mesh();
    for i in 0..SERVICES_MAX + 10 {
        // More than LOOKUPS_PER_SECOND may be asked for in a second; whoever is refused asks again.
        let name = service(&format!("s{i}"));
        until(async || mesh.instances(&name).await.ok().filter(|found| found.len() == 1)).await;
    }
    let watched = || mock.asked().iter().filter(|uri| uri.contains("index=5")).count();
    until(async || (watched() == SERVICES_MAX).then_some(())).await;
}

#[tokio::test]
async fn what_is_present_is_told_only_while_the_watch_sees() {
    let there = json!([health("shop", "shop@h2")]).to_string();
    let plays = |index: u64, body: String| {
        move |uri: &Uri, _: &Value| match (uri.path(), index_of(uri)) {
            ("/v1/health/connect/shop", asked) if asked != index => answer(index, body.clone()),
            _ => None,
        }
    };
    let mock = Mock::new(plays(5, there.clone())).await;
    let (mesh, shop) = (mock.mesh(), service("shop"));
    let first = until(async || mesh.present(&shop).await.ok()).await;
    assert!(first.ids.contains("shop@h2"));
    // It goes, and the series of good answers goes on.
    mock.plays(plays(6, "[]".to_owned()));
    let gone = async || mesh.present(&shop).await.ok().filter(|now| now.ids.is_empty());
    assert_eq!(until(gone).await.series, first.series);
    // Consul is away: what it told before is no answer now.
    mock.plays(|_, _| says(500, "no leader"));
    until(async || mesh.present(&shop).await.err()).await;
    mock.plays(plays(7, "[]".to_owned()));
    let back = until(gone).await;
    assert!(back.series > first.series);
    // Its index goes backwards: it has lost its state, and who is absent may only not be back.
    mock.plays(plays(3, "[]".to_owned()));
    until(async || {
        mesh.present(&shop)
            .await
            .ok()
            .filter(|now| now.series > back.series)
    })
    .await;
}

#[tokio::test]
async fn weights_are_those_of_the_catalogue() {
    let mut heavy = health("shop", "shop@h2");
    heavy["Service"]["Weights"] = json!({ "Passing": 7, "Warning": 1 });
    let entries = json!([heavy, health("shop", "shop@h3")]).to_string();
    let mock = Mock::new(move |uri, _| match (uri.path(), index_of(uri)) {
        ("/v1/health/connect/shop", 0) => answer(5, entries.clone()),
        _ => None,
    })
    .await;
    let (mesh, shop) = (mock.mesh(), service("shop"));
    assert!(mesh.weights(&shop).is_empty(), "nothing is known yet");
    assert_eq!(mesh.instances(&shop).await.unwrap().len(), 2);
    let weights = mesh.weights(&shop);
    assert_eq!((weights["shop@h2"], weights["shop@h3"]), (7, 1));
}

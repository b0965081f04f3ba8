//! What `meshx doctor` and `meshx why` say of a healthy mesh on Consul and of broken ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::consul::{Consul, Setup, agent_rules};
use meshx_tests::{Agent, Beam};

const SOON: Duration = Duration::from_secs(20);

/// What a command said, and its exit code. Printed: `make test-consul` shows people what it looks like.
fn said(agent: &Agent, arguments: &[&str]) -> (String, i32) {
    let output = agent.meshx(arguments).unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let code = output.status.code().unwrap();
    println!("$ meshx {}\n{text}[exit code {code}]\n", arguments.join(" "));
    (text, code)
}

#[test]
fn healthy_and_broken_set_ups() {
    let mut consul = Consul::start_with(Setup {
        acl: true,
        keeps_state: true,
        ..Setup::default()
    })
    .unwrap();
    let token = consul.token("agents", &agent_rules()).unwrap();
    let file = consul.token_file(&token).unwrap();
    let options = ["--consul-token-file", file.to_str().unwrap()];
    let h1 = consul
        .agent_with("a", "127.0.0.2", &["h1"], &options, None)
        .unwrap();
    let mut h2 = consul
        .agent_with("b", "127.0.0.3", &["h2"], &options, None)
        .unwrap();
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        consul.allow(source, destination).unwrap();
    }
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();

    println!("# healthy");
    let (doctor, code) = said(&h1, &["doctor"]);
    assert_eq!(code, 0, "{doctor}");
    let (why, code) = said(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, 0, "{why}");

    println!("# an intention denies one direction");
    consul.deny("cart", "shop").unwrap();
    let (why, code) = said(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, 77, "{why}");
    assert!(
        why.contains("consul intention create -allow cart shop"),
        "no fix in:\n{why}"
    );
    shop.expect(
        "receive do {:nodedown, node} -> node after 6_000 -> :none end",
        ":cart@h2",
    )
    .unwrap();
    // The same text at the node, and in the agent's log.
    let refused = shop.eval("MeshxNode.connect(:cart@h2)").unwrap();
    assert!(
        refused.contains(":intention_denied") && refused.contains("cart -> shop"),
        "{refused}"
    );
    let told = shop.eval("MeshxNode.why(:cart@h2)").unwrap();
    assert!(
        told.contains("intention_denied") && told.contains("cart -> shop"),
        "{told}"
    );
    h1.process.wait_log("cart -> shop", SOON).unwrap();
    consul.allow("cart", "shop").unwrap();
    shop.expect("wait = fn f, n -> case MeshxNode.connect(:cart@h2) do :ok -> :ok; e when n == 0 -> e; _ -> Process.sleep(50); f.(f, n - 1) end end; wait.(wait, 200)", ":ok").unwrap();

    println!("# the other node does not exist");
    let (why, code) = said(&h1, &["why", "shop@h1", "audit@h2"]);
    assert_ne!(code, 0, "{why}");
    assert!(why.contains("audit@h2"), "{why}");

    println!("# the token is not valid any more");
    consul.revoke(&token).unwrap();
    let (doctor, code) = said(&h1, &["doctor"]);
    assert_ne!(code, 0, "{doctor}");
    assert!(doctor.contains("token"), "{doctor}");
    assert!(!doctor.contains(&token), "the token itself is shown");
    let (json, _) = said(&h1, &["doctor", "--json"]);
    assert!(
        json.contains("\"level\":\"error\"") || json.contains("\"level\": \"error\""),
        "{json}"
    );
    let written = consul
        .token_file(&consul.token("anew", &agent_rules()).unwrap())
        .unwrap();
    std::fs::rename(written, &file).unwrap();

    println!("# the token lacks a right");
    let less = r#"service_prefix "" { policy = "read" }
        node_prefix "" { policy = "read" }"#;
    let written = consul.token_file(&consul.token("less", less).unwrap()).unwrap();
    std::fs::rename(written, &file).unwrap();
    let (doctor, code) = said(&h1, &["doctor"]);
    assert_ne!(code, 0, "{doctor}");
    assert!(doctor.contains("lacks service:write on \"shop\""), "{doctor}");
    let written = consul
        .token_file(&consul.token("all", &agent_rules()).unwrap())
        .unwrap();
    std::fs::rename(written, &file).unwrap();

    println!("# the other agent is gone without a word");
    h2.process.kill();
    let (why, code) = said(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_ne!(code, 0, "{why}");
    cart.process.kill();

    println!("# Consul is away");
    consul.kill();
    let (doctor, code) = said(&h1, &["doctor"]);
    assert_ne!(code, 0, "{doctor}");
    assert!(doctor.contains(consul.address()), "{doctor}");
    let (why, code) = said(&h1, &["why", "search@h1", "cart@h2"]);
    assert_ne!(code, 0, "{why}");
    consul.start_again().unwrap();
    consul.wait_passing("shop", 1, Duration::from_secs(60)).unwrap();

    println!("# the advertised address leads nowhere");
    let lost = consul
        .agent_with(
            "c",
            "127.0.0.4",
            &["h3"],
            &["--advertise", "127.0.0.5:9"],
            consul.management(),
        )
        .unwrap();
    let (doctor, code) = said(&lost, &["doctor"]);
    assert_ne!(code, 0, "{doctor}");
    assert!(
        doctor.contains("127.0.0.5:9") && doctor.contains("--advertise"),
        "{doctor}"
    );
    let (certs, code) = said(&h1, &["certs"]);
    assert_eq!(code, 0, "{certs}");
    let (services, code) = said(&h1, &["services"]);
    assert_eq!(code, 0, "{services}");
    let (intentions, code) = said(&h1, &["intentions"]);
    assert_eq!(code, 0, "{intentions}");
}

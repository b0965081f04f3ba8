//! The commands that show the mesh and say what is wrong.

use std::os::unix::net::UnixListener;

use meshx::agent::control::message::{map, text};
use meshx_etf::Term;

use crate::support::{Agent, Client, cause, temp};

fn field(term: &Term, key: &str) -> String {
    let value = term.map_get(key).unwrap_or_else(|| panic!("no {key} in {term}"));
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn rows(client: &mut Client, command: &str, key: &str) -> Vec<Term> {
    let answer = client.ask(command, map([])).unwrap();
    answer.map_get(key).unwrap().as_list().unwrap().to_vec()
}

/// The finding about this, in which this is said.
fn found<'a>(findings: &'a [Term], what: &str, said: &str) -> &'a Term {
    let found = findings
        .iter()
        .find(|term| field(term, "what") == what && field(term, "text").contains(said));
    found.unwrap_or_else(|| panic!("nothing about {what} with {said:?} in {findings:?}"))
}

#[test]
fn services_rules_and_certificates_are_shown() {
    let root = temp();
    let h1 = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let h2 = Agent::start(root.path(), "b", &["h2"], &["--bind", "127.0.0.3:0"]);
    let socket = h1.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut client = h1.connect();
    client.register("shop@h1", &socket).unwrap();
    client
        .ask(
            "register_service",
            map([("name", text("echo")), ("id", text("echo-1"))]),
        )
        .unwrap();

    for (agent, local) in [(&h1, "true"), (&h2, "false")] {
        let services = rows(&mut agent.connect(), "services", "services");
        assert_eq!(services.len(), 2, "{services:?}");
        let shop = services
            .iter()
            .find(|service| field(service, "id") == "shop@h1")
            .unwrap();
        for (key, wanted) in [
            ("name", "shop"),
            ("node", "shop@h1"),
            ("status", "passing"),
            ("protocol", "meshx"),
            ("local", local),
            ("tags", "[]"),
        ] {
            assert_eq!(field(shop, key), wanted, "{shop}");
        }
        assert!(field(shop, "address").starts_with("127.0.0.2:"), "{shop}");
        let echo = services
            .iter()
            .find(|service| field(service, "id") == "echo-1")
            .unwrap();
        assert_eq!(echo.map_get("node"), None, "it is none");
    }

    let mesh = root.path().join("mesh");
    let rules = r#"{"default": "deny", "rules": [{"source": "*", "destination": "echo", "action": "deny"},
        {"source": "shop", "destination": "echo", "action": "allow"}]}"#;
    std::fs::write(mesh.join("rules.json"), rules).unwrap();
    let answer = client.ask("intentions", map([])).unwrap();
    assert_eq!(field(&answer, "default"), "deny");
    let shown: Vec<_> = rows(&mut client, "intentions", "intentions")
        .iter()
        .map(|rule| {
            ["source", "destination", "action"]
                .map(|key| field(rule, key))
                .join(" ")
        })
        .collect();
    assert_eq!(
        shown,
        ["shop echo allow", "* echo deny"],
        "the first that fits decides"
    );

    let certs = rows(&mut client, "certs", "certs");
    assert_eq!(
        certs
            .iter()
            .map(|cert| field(cert, "service"))
            .collect::<Vec<_>>(),
        ["echo", "shop"]
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    for cert in &certs {
        let moment = |key| cert.map_get(key).unwrap().as_int().unwrap();
        assert!(moment("not_before") < now && now < moment("not_after"), "{cert}");
        assert_eq!(moment("chain"), 1);
        assert!(
            field(cert, "spiffe").ends_with(&format!("/svc/{}", field(cert, "service"))),
            "{cert}"
        );
        assert!(
            field(cert, "serial").contains(':') && field(cert, "issuer").contains("meshx"),
            "{cert}"
        );
    }
    let roots = rows(&mut client, "certs", "roots");
    assert_eq!(roots.len(), 1);
    assert_eq!(field(&roots[0], "subject"), field(&certs[0], "issuer"));
    assert!(
        rows(&mut h2.connect(), "certs", "certs").is_empty(),
        "nothing is registered there"
    );
}

#[test]
fn why_walks_the_decision_and_only_as_whom_the_user_may_be() {
    let root = temp();
    let h1 = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let h2 = Agent::start(root.path(), "b", &["h2"], &["--bind", "127.0.0.3:0"]);
    let mut shop = h1.connect();
    let mut echo = h2.connect();
    let socket = h1.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    shop.register("shop@h1", &socket).unwrap();
    echo.ask("register_service", map([("name", text("echo"))]))
        .unwrap();
    let ask = |client: &mut Client, from: &str, to: &str| {
        client
            .ask("why", map([("from", text(from)), ("to", text(to))]))
            .unwrap()
    };
    let steps = |answer: &Term| answer.map_get("steps").unwrap().as_list().unwrap().to_vec();

    let yes = ask(&mut shop, "shop@h1", "echo");
    assert_eq!(
        (field(&yes, "allowed"), field(&yes, "cause")),
        ("true".into(), "ok".into()),
        "{yes}"
    );
    assert!(field(&yes, "text").contains("shop -> echo is allowed"), "{yes}");
    assert!(
        steps(&yes).iter().all(|step| field(step, "ok") == "true"),
        "{yes}"
    );
    // This user may speak as any service, though none of the name is registered.
    let client = ask(&mut shop, "web", "echo");
    assert_eq!(field(&client, "allowed"), "true", "{client}");

    let no = ask(&mut shop, "shop@h1", "cart@h2");
    assert_eq!(
        (field(&no, "allowed"), field(&no, "cause")),
        ("false".into(), "no_such_node".into())
    );
    let last = steps(&no).pop().unwrap();
    assert_eq!(
        (field(&last, "ok"), field(&last, "what")),
        ("false".into(), "target".into())
    );
    assert_eq!(field(&last, "text"), field(&no, "text"));
    assert!(field(&last, "fix").contains("meshx run cart@h2"), "{last}");
    assert_eq!(
        cause(shop.ask("why", map([("from", text("shop@h1"))]))),
        "invalid_request"
    );
    // The other agent has taken no fright.
    assert!(!h2.log().contains("link refused"), "{}", h2.log());
}

#[test]
fn doctor_finds_what_is_well_and_what_is_not() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let mut client = agent.connect();
    let findings = rows(&mut client, "doctor", "findings");
    assert!(
        findings.iter().all(|finding| field(finding, "level") != "error"),
        "{findings:?}"
    );
    found(&findings, "inbound", "127.0.0.2:");

    let socket = agent.vm().join("shop");
    let listener = UnixListener::bind(&socket).unwrap();
    client.register("shop@h1", &socket).unwrap();
    client
        .ask(
            "register_service",
            map([("name", text("echo")), ("id", text("echo-1"))]),
        )
        .unwrap();
    let findings = rows(&mut client, "doctor", "findings");
    for (what, said, level) in [
        ("rules", "0 rules", "ok"),
        ("inbound", "is this agent", "ok"),
        ("certificate", "shop is valid for", "ok"),
        ("certificate", "echo is valid for", "ok"),
        ("clock", "within", "ok"),
        (
            "service",
            "shop@h1 is registered, passes and takes connections",
            "ok",
        ),
        // Nobody has made the socket that the agent chose.
        ("service", "echo-1 does not take connections", "error"),
    ] {
        let finding = found(&findings, what, said);
        assert_eq!(field(finding, "level"), level, "{finding}");
        assert_eq!(field(finding, "fix").is_empty(), level == "ok", "{finding}");
    }

    drop(listener);
    let rules = root.path().join("mesh/rules.json");
    std::fs::write(&rules, "{").unwrap();
    let findings = rows(&mut client, "doctor", "findings");
    assert_eq!(
        field(
            found(&findings, "service", "shop@h1 does not take connections"),
            "level"
        ),
        "error"
    );
    assert_eq!(field(found(&findings, "rules", "rules.json"), "level"), "error");
    // A look is no refused link.
    assert!(!agent.log().contains("link refused"), "{}", agent.log());
}

#[test]
fn doctor_tells_of_a_second_agent_for_the_host_and_of_an_address_that_leads_elsewhere() {
    let root = temp();
    let _first = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let elsewhere = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let address = elsewhere.local_addr().unwrap().to_string();
    drop(elsewhere);
    let options = ["--bind", "127.0.0.2:0", "--advertise", &address];
    let second = Agent::start(root.path(), "b", &["h1", "h2"], &options);
    let mut client = second.connect();
    let findings = rows(&mut client, "doctor", "findings");
    assert_eq!(field(found(&findings, "hosts", "owns h1"), "level"), "error");
    let inbound = found(&findings, "inbound", &address);
    assert_eq!(field(inbound, "level"), "error");
    assert!(field(inbound, "fix").contains("--advertise"), "{inbound}");
}

#[test]
fn an_address_at_which_another_agent_answers_is_not_this_one() {
    let root = temp();
    let other = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.3:0"]);
    let inbound = other
        .ready
        .split(' ')
        .find_map(|field| field.strip_prefix("inbound="))
        .unwrap();
    let agent = Agent::start(
        root.path(),
        "b",
        &["h2"],
        &["--bind", "127.0.0.2:0", "--advertise", inbound],
    );
    let mut client = agent.connect();
    client
        .ask("register_service", map([("name", text("echo"))]))
        .unwrap();
    let findings = rows(&mut client, "doctor", "findings");
    let finding = found(&findings, "inbound", inbound);
    assert_eq!(field(finding, "level"), "error", "{finding}");
}

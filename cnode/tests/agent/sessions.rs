//! Nodes that only dial: the names that they hold.

use std::os::unix::net::UnixListener;

use meshx::agent::{
    control::message::{map, text},
    registry::INSTANCES_PER_CLIENT_MAX,
};
use meshx_etf::Term;

use crate::support::{Agent, Client, PATIENCE, Refused, cause, temp, until};

fn session(client: &mut Client, node: &str) -> Result<Vec<u8>, Refused> {
    let answer = client.ask("register_session", map([("node", text(node))]))?;
    Ok(answer
        .map_get("secret")
        .and_then(Term::as_binary)
        .unwrap()
        .to_vec())
}

#[test]
fn a_session_holds_its_name_as_long_as_its_connection() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = agent.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    let (mut client, mut other) = (agent.connect(), agent.connect());
    let secret = session(&mut client, "quiet@h1").unwrap();
    assert_eq!(secret.len(), 32);
    assert_eq!(session(&mut client, "quiet@h1").unwrap(), secret, "asked again");
    assert_ne!(session(&mut client, "rem-1@h1").unwrap(), secret);
    assert!(agent.names().is_empty());

    assert_eq!(cause(other.register("quiet@h1", &socket)), "name_taken");
    assert_eq!(cause(session(&mut other, "quiet@h1")), "name_taken");
    other.register("shop@h1", &socket).unwrap();
    assert_eq!(cause(session(&mut client, "shop@h1")), "name_taken");
    drop(client);
    until(PATIENCE, "the name", || session(&mut other, "quiet@h1").is_ok());
    let log = agent.log();
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!log.contains(&hex) && !log.contains(&format!("{secret:?}")));
}

#[test]
fn names_of_sessions_are_of_this_host_well_formed_and_not_without_number() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    assert_eq!(cause(session(&mut client, "shop@h2")), "host_not_owned");
    for bad in ["shop", "@h1", "a@b@h1", "a b@h1"] {
        assert_eq!(cause(session(&mut client, bad)), "invalid_name", "{bad}");
    }
    let mut nameless = |host: &str| client.ask("register_session", map([("host", text(host))]));
    for bad in ["", "a@h1", "a b"] {
        assert_eq!(cause(nameless(bad)), "invalid_name", "{bad}");
    }
    for _ in 0..INSTANCES_PER_CLIENT_MAX {
        nameless("anywhere").unwrap();
    }
    assert_eq!(cause(nameless("anywhere")), "limit");
    assert_eq!(cause(client.ask("register_session", map([]))), "invalid_request");
}

//! Names: who gets them, who does not, and when they are free again.

use std::{os::unix::net::UnixListener, path::Path, time::Instant};

use meshx::agent::{
    control::{
        UPSTREAMS_PER_CLIENT_MAX,
        message::{map, text},
    },
    registry::{INSTANCES_PER_CLIENT_MAX, MESH_TIME},
};
use meshx_etf::Term;

use crate::support::{Agent, Helper, PATIENCE, PROMISED, cause, creation, temp, until};

#[test]
fn a_node_is_registered_seen_by_other_agents_and_gone_when_it_leaves() {
    let root = temp();
    let h1 = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let h2 = Agent::start(root.path(), "b", &["h2"], &["--bind", "127.0.0.3:0"]);
    let socket = h1.vm().join("shop");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut client = h1.connect();
    let node = client.register("shop@h1", &socket).unwrap();
    assert!(creation(&node) >= 4);
    assert_eq!(node.map_get("secret").unwrap().as_binary().unwrap().len(), 32);
    assert_eq!(node.map_get("service").unwrap().as_str(), Some("shop"));
    assert_eq!(node.map_get("instance").unwrap().as_str(), Some("shop@h1"));
    let spiffe = node.map_get("spiffe").unwrap().as_str().unwrap();
    assert!(
        spiffe.starts_with("spiffe://") && spiffe.ends_with("/svc/shop"),
        "{spiffe}"
    );

    let answer = h2.connect().ask("names", map([])).unwrap();
    let seen = &answer.map_get("nodes").unwrap().as_list().unwrap()[0];
    assert_eq!(seen.map_get("node").unwrap().as_str(), Some("shop@h1"));
    assert_eq!(seen.map_get("service").unwrap().as_str(), Some("shop"));
    assert_eq!(seen.map_get("host").unwrap().as_str(), Some("h1"));
    assert_eq!(seen.map_get("local").unwrap().as_bool(), Some(false));
    assert!(
        seen.map_get("agent")
            .unwrap()
            .as_str()
            .unwrap()
            .starts_with("127.0.0.2:")
    );
    assert_eq!(h1.names(), ["shop@h1"]);

    // Another connection cannot take it away.
    assert_eq!(
        cause(h1.connect().ask("deregister", map([("id", text("shop@h1"))]))),
        "invalid_request"
    );
    client.ask("deregister", map([("id", text("shop@h1"))])).unwrap();
    assert!(h1.names().is_empty() && h2.names().is_empty());
    // No secret in the log, in whatever form.
    let secret = node.map_get("secret").unwrap().as_binary().unwrap().to_vec();
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!h1.log().contains(&hex) && !h1.log().contains(&format!("{secret:?}")));
}

#[test]
fn each_registration_fault_has_its_cause() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1", "h1.example"], &[]);
    let vm = agent.vm();
    let socket = vm.join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let outside = root.path().join("s");
    let _outside = UnixListener::bind(&outside).unwrap();
    std::fs::write(vm.join("file"), "").unwrap();
    let mut first = agent.connect();
    let mut second = agent.connect();
    first.register("shop@h1", &socket).unwrap();
    first.register("shop@h1.example", &socket).unwrap();
    for (node, socket, wanted) in [
        ("shop@h1", &socket, "name_taken"),
        ("shop@h2", &socket, "host_not_owned"),
        ("shop@H1", &socket, "host_not_owned"),
        ("shop", &socket, "invalid_name"),
        ("@h1", &socket, "invalid_name"),
        ("shop@", &socket, "invalid_name"),
        ("shop@h1@h1", &socket, "invalid_name"),
        (&format!("{}@h1", "x".repeat(253)), &socket, "invalid_name"),
        ("cart@h1", &outside, "invalid_request"),
        ("cart@h1", &vm.join("../../s"), "invalid_request"),
        ("cart@h1", &vm.join("file"), "invalid_request"),
        ("cart@h1", &vm.join("none"), "invalid_request"),
    ] {
        assert_eq!(cause(second.register(node, socket)), wanted, "{node} {socket:?}");
        agent.wait_log(&["refused", "register_node", wanted]);
    }
    assert_eq!(agent.names().len(), 2, "a refusal leaves nothing");
}

#[test]
fn creations_differ_and_a_returning_node_keeps_its_own() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut client = agent.connect();
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(creation(&client.register("shop@h1", &socket).unwrap()));
        client.ask("deregister", map([("id", text("shop@h1"))])).unwrap();
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 5, "{seen:?}");

    let path = socket.to_str().unwrap();
    let back = |creation| {
        map([
            ("node", text("shop@h1")),
            ("socket", text(path)),
            ("creation", Term::Int(creation)),
        ])
    };
    assert_eq!(
        creation(&client.ask("register_node", back(seen[0])).unwrap()),
        seen[0]
    );
    client.ask("deregister", map([("id", text("shop@h1"))])).unwrap();
    for bad in [-1, 3, 1 << 32] {
        assert_eq!(cause(client.ask("register_node", back(bad))), "invalid_request");
    }
}

#[test]
fn a_killed_process_frees_its_name_in_time() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let program = std::env::current_exe().unwrap();
    let mut creations = Vec::new();
    for round in 0..3 {
        let socket = agent.vm().join(format!("s{round}"));
        let node = format!("shop{round}@h1");
        let mut helper = Helper::start(&program, &agent.dir, &node, socket.to_str().unwrap(), None);
        assert_eq!(helper.answer(), "ok");
        assert_eq!(agent.names(), std::slice::from_ref(&node));
        let killed = Instant::now();
        helper.child.kill().unwrap();
        // Free is what another can have; the catalogue lets it go an instant earlier.
        let own = agent.vm().join(format!("own{round}"));
        let _listener = UnixListener::bind(&own).unwrap();
        let mut client = agent.connect();
        let mut registered = None;
        until(PATIENCE, "the name to be free", || {
            registered = client.register(&node, &own).ok();
            registered.is_some()
        });
        println!(
            "free {:?} after SIGKILL (promised: {PROMISED:?})",
            killed.elapsed()
        );
        creations.push(creation(&registered.unwrap()));
        drop(client);
        until(PATIENCE, "that one to be free", || agent.names().is_empty());
        // Nobody else would remove what a killed process left.
        until(3 * PATIENCE, "the socket to be swept", || !socket.exists());
    }
    creations.dedup();
    assert_eq!(creations.len(), 3, "{creations:?}");
}

#[test]
fn a_name_is_free_for_the_next_as_soon_as_the_connection_ends() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut last = 0;
    for _ in 0..20 {
        let mut client = agent.connect();
        let mut node = None;
        until(PATIENCE, "the name", || {
            node = client.register("shop@h1", &socket).ok();
            node.is_some()
        });
        let creation = creation(&node.unwrap());
        assert_ne!(creation, last);
        last = creation;
    }
}

#[test]
fn two_agents_with_the_same_host_are_reported_and_the_newer_registers_nothing() {
    let root = temp();
    let old = Agent::start(root.path(), "a", &["h1"], &[]);
    let new = Agent::start(root.path(), "b", &["h1"], &[]);
    new.wait_log(&["WARN", "h1"]);
    let register = |agent: &Agent, node: &str| {
        let socket = agent.vm().join("s");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let mut client = agent.connect();
        let result = client.register(node, &socket);
        (result, client, listener)
    };
    assert_eq!(cause(register(&new, "cart@h1").0), "host_not_owned");
    let (result, _client, _listener) = register(&old, "shop@h1");
    result.unwrap();
    assert_eq!(cause(register(&new, "shop@h1").0), "name_taken");
}

#[test]
fn an_id_of_another_agents_service_is_taken() {
    let root = temp();
    let old = Agent::start(root.path(), "a", &["h1"], &[]);
    let new = Agent::start(root.path(), "b", &["h2"], &[]);
    let service = || map([("name", text("echo")), ("id", text("echo-1"))]);
    let mut client = old.connect();
    client.ask("register_service", service()).unwrap();
    let (taken, why) = new.connect().ask("register_service", service()).unwrap_err();
    assert_eq!(taken, "name_taken", "{why}");
    assert!(why.contains("echo-1 is registered by agent"), "{why}");
}

#[test]
fn services_and_upstreams_have_sockets_that_go_with_the_connection() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let first = client
        .ask("register_service", map([("name", text("echo"))]))
        .unwrap();
    assert_eq!(first.map_get("id").unwrap().as_str(), Some("echo-h1-1"));
    let [kind, path] = first.map_get("address").unwrap().as_tuple().unwrap() else {
        panic!("{first}")
    };
    assert_eq!(kind.as_atom(), Some("uds"));
    let listening = UnixListener::bind(path.as_str().unwrap()).unwrap();

    let taken = map([("name", text("echo")), ("id", text("echo-h1-1"))]);
    assert_eq!(
        cause(agent.connect().ask("register_service", taken)),
        "name_taken"
    );
    let as_node = map([("name", text("echo")), ("id", text("shop@h1"))]);
    assert_eq!(cause(client.ask("register_service", as_node)), "invalid_name");
    let tcp = |ip: &str, port| Term::tuple([Term::atom("tcp"), text(ip), Term::Int(port)]);
    for (address, ok) in [
        (tcp("127.0.0.1", 80), true),
        (tcp("192.0.2.1", 80), false),
        (tcp("127.0.0.1", 0), false),
        (tcp("127.0.0.1", 65_536), false),
        (text("x"), false),
    ] {
        let args = map([("name", text("web")), ("address", address)]);
        assert_eq!(client.ask("register_service", args).is_ok(), ok);
    }

    let check = client
        .ask("check", map([("from", text("web")), ("to", text("echo"))]))
        .unwrap();
    assert_eq!(check.map_get("allowed").unwrap().as_bool(), Some(true), "{check}");
    let check = client
        .ask("check", map([("from", text("web")), ("to", text("none"))]))
        .unwrap();
    assert_eq!(check.map_get("cause").unwrap().as_atom(), Some("no_such_service"));

    let args = map([("service", text("echo")), ("as", text("web"))]);
    let upstream = client.ask("connect", args).unwrap();
    let [_, path] = upstream.map_get("address").unwrap().as_tuple().unwrap() else {
        panic!("{upstream}")
    };
    let path = Path::new(path.as_str().unwrap());
    {
        use std::io::{Read, Write};
        let mut near = std::os::unix::net::UnixStream::connect(path).unwrap();
        let (mut far, _) = listening.accept().unwrap();
        near.write_all(b"ping").unwrap();
        let mut bytes = [0; 4];
        far.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        let links = client.ask("links", map([])).unwrap();
        let link = &links.map_get("links").unwrap().as_list().unwrap()[0];
        assert_eq!(link.map_get("direction").unwrap().as_atom(), Some("local"));
        assert_eq!(link.map_get("purpose").unwrap().as_atom(), Some("rpc"));
        assert_eq!(link.map_get("local").unwrap().as_str(), Some("web"));
    }
    let id = upstream.map_get("upstream").unwrap().clone();
    for existed in [true, false] {
        let answer = client.ask("disconnect", map([("upstream", id.clone())])).unwrap();
        assert_eq!(answer.map_get("existed").unwrap().as_bool(), Some(existed));
    }
    assert!(!path.exists());
    let args = map([("service", text("echo")), ("as", text("web"))]);
    let upstream = client.ask("connect", args).unwrap();
    let [_, path] = upstream.map_get("address").unwrap().as_tuple().unwrap() else {
        panic!("{upstream}")
    };
    drop(client);
    let path = Path::new(path.as_str().unwrap());
    until(PATIENCE, "the upstream to close", || !path.exists());
}

#[test]
fn what_the_mesh_takes_too_late_is_taken_back() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let socket = agent.vm().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let lock = std::fs::File::open(root.path().join("mesh/lock")).unwrap();
    lock.lock().unwrap();
    let began = Instant::now();
    let mut silent = agent.connect();
    let mut leaving = agent.connect();
    let path = socket.to_str().unwrap();
    leaving.send(
        "register_node",
        map([("node", text("cart@h1")), ("socket", text(path))]),
    );
    drop(leaving);
    assert_eq!(cause(silent.register("shop@h1", &socket)), "not_ready");
    let took = began.elapsed();
    assert!(took >= MESH_TIME && took < 3 * MESH_TIME, "{took:?}");
    assert_eq!(
        cause(silent.register("shop@h1", &socket)),
        "name_taken",
        "not free before it is undone"
    );
    drop(lock);
    let mut other = agent.connect();
    for node in ["shop@h1", "cart@h1"] {
        until(PATIENCE, "the name", || other.register(node, &socket).is_ok());
    }
    drop(other);
    until(PATIENCE, "the names to go", || agent.names().is_empty());
}

#[test]
fn one_connection_has_so_many_registrations_and_upstreams_and_no_more() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    for _ in 0..INSTANCES_PER_CLIENT_MAX {
        client
            .ask("register_service", map([("name", text("echo"))]))
            .unwrap();
    }
    assert_eq!(
        cause(client.ask("register_service", map([("name", text("echo"))]))),
        "limit"
    );
    let upstream = map([("service", text("echo")), ("as", text("echo"))]);
    for _ in 0..UPSTREAMS_PER_CLIENT_MAX {
        client.ask("connect", upstream.clone()).unwrap();
    }
    assert_eq!(cause(client.ask("connect", upstream.clone())), "limit");
    agent.connect().ask("connect", upstream).unwrap();
}

//! Which nodes services have, told whenever that changes.

use std::os::unix::net::UnixListener;

use meshx::agent::control::{
    WATCHED_SERVICES_MAX, WATCHES_PER_CLIENT_MAX,
    message::{Message, map, text},
};
use meshx_etf::Term;

use crate::support::{Agent, Client, Refused, cause, temp};

/// A request, and the events that came before its reply.
fn watch(client: &mut Client, name: &str, services: &[&str]) -> Result<Vec<Message>, Refused> {
    let services = Term::list(services.iter().map(text));
    let sent = client.send("watch", map([("watch", text(name)), ("services", services)]));
    let mut before = Vec::new();
    loop {
        match client.receive().unwrap() {
            Message::Reply { id, result } if id == sent => return result.map(|_| before),
            event @ Message::Event { .. } => before.push(event),
            other => panic!("{other:?}"),
        }
    }
}

/// What an event tells: the watch and its nodes.
fn told(event: Message) -> (String, Vec<String>) {
    let Message::Event { name, args } = event else {
        panic!("{event:?}")
    };
    assert_eq!(name, "nodes");
    let field = |term: &Term, name| term.map_get(name).and_then(Term::as_str).unwrap().to_owned();
    let nodes = args.map_get("nodes").and_then(Term::as_list).unwrap();
    let nodes = nodes
        .iter()
        .map(|node| format!("{} {}", field(node, "service"), field(node, "node")));
    (field(&args, "watch"), nodes.collect())
}

#[test]
fn a_watch_tells_what_there_is_and_each_change_of_its_services_alone() {
    let root = temp();
    let h1 = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let h2 = Agent::start(root.path(), "b", &["h2"], &["--bind", "127.0.0.3:0"]);
    let (first, second) = (h1.vm().join("1"), h2.vm().join("2"));
    let _listeners = [&first, &second].map(|path| UnixListener::bind(path).unwrap());
    let (mut near, mut far) = (h1.connect(), h2.connect());
    near.register("shop@h1", &first).unwrap();

    let mut client = h1.connect();
    let mut events = watch(&mut client, "w", &["shop", "cart"]).unwrap();
    if events.is_empty() {
        events.push(client.receive().unwrap());
    }
    assert_eq!(
        told(events.remove(0)),
        ("w".to_owned(), vec!["shop shop@h1".to_owned()])
    );
    far.register("other@h2", &second).unwrap();
    far.ask("deregister", map([("id", text("other@h2"))])).unwrap();
    far.register("cart@h2", &second).unwrap();
    let (_, nodes) = told(client.receive().unwrap());
    assert_eq!(nodes, ["cart cart@h2", "shop shop@h1"]);
    drop(near);
    assert_eq!(told(client.receive().unwrap()).1, ["cart cart@h2"]);

    // Another in its place, and none.
    let before = watch(&mut client, "w", &["shop"]).unwrap();
    let event = before
        .into_iter()
        .last()
        .unwrap_or_else(|| client.receive().unwrap());
    assert_eq!(told(event).1, Vec::<String>::new());
    watch(&mut client, "w", &[]).unwrap();
    drop(far);
    // Whatever comes now is the answer.
    client.ask("links", map([])).unwrap();
}

#[test]
fn watches_are_bounded_and_their_services_well_formed() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    assert_eq!(cause(watch(&mut client, "w", &["No Service"])), "invalid_name");
    let many = vec!["shop"; WATCHED_SERVICES_MAX + 1];
    assert_eq!(cause(watch(&mut client, "w", &many)), "invalid_request");
    for number in 0..WATCHES_PER_CLIENT_MAX {
        watch(&mut client, &number.to_string(), &["shop"]).unwrap();
    }
    assert_eq!(cause(watch(&mut client, "one more", &["shop"])), "limit");
    watch(&mut client, "0", &["cart"]).unwrap();
    watch(&mut client, "0", &[]).unwrap();
    watch(&mut client, "one more", &["shop"]).unwrap();
}

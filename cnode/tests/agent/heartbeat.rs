//! Clients that are asked whether they live, and what becomes of what they registered.

use std::{
    os::unix::net::UnixListener,
    path::Path,
    time::{Duration, Instant},
};

use meshx::agent::{
    client::ControlClient,
    control::{
        HUNG_AFTER_MIN,
        frame::{REQUEST_MAX, read_frame},
        message::{Message, Request, event, map, reply, text},
    },
};
use meshx_etf::Term;
use tokio::{io::AsyncWriteExt, time::timeout};

use crate::support::{Agent, Client, LONG, cause, temp, until};

/// Longer than a busy machine keeps this test from asking: what passes for as long must be seen to pass.
const HUNG: Duration = HUNG_AFTER_MIN.saturating_mul(3);

/// Says hello as a client that answers pings.
fn asked(agent: &Agent) -> Client {
    let mut client = agent.stranger();
    let hello = map([
        ("versions", Term::tuple([Term::Int(1), Term::Int(1)])),
        ("features", Term::list([text("heartbeat"), text("flying")])),
        ("heartbeat", Term::Int(HUNG.as_millis() as i64)),
    ]);
    let hello = client.ask("hello", hello).unwrap();
    let features = hello.map_get("features").and_then(Term::as_list).unwrap();
    assert_eq!(features, [text("heartbeat")], "what both have");
    client
}

/// An answer, and how many pings came before it.
fn ask(client: &mut Client, command: &str, args: Term) -> usize {
    let sent = client.send(command, args);
    let mut pings = 0;
    loop {
        match client.receive() {
            Some(Message::Event { name, .. }) if name == "ping" => pings += 1,
            Some(Message::Reply { id, result: Ok(_) }) if id == sent => return pings,
            other => panic!("{command}: {other:?}"),
        }
    }
}

fn register(client: &mut Client, node: &str, socket: &Path) {
    let socket = text(socket.to_str().unwrap());
    ask(
        client,
        "register_node",
        map([("node", text(node)), ("socket", socket)]),
    );
}

fn status(agent: &Agent, id: &str) -> String {
    let services = agent.connect().ask("services", map([])).unwrap();
    let all = services.map_get("services").and_then(Term::as_list).unwrap();
    let of = |term: &Term, key: &str| term.map_get(key).and_then(Term::as_str).unwrap().to_owned();
    let found = all.iter().find(|service| of(service, "id") == id);
    found.map_or_else(|| "absent".to_owned(), |service| of(service, "status"))
}

#[test]
fn a_client_that_does_not_answer_is_critical_until_it_does() {
    let root = temp();
    let h1 = Agent::start(root.path(), "a", &["h1"], &["--bind", "127.0.0.2:0"]);
    let h2 = Agent::start(root.path(), "b", &["h2"], &["--bind", "127.0.0.3:0"]);
    let (one, two) = (h1.vm().join("1"), h1.vm().join("2"));
    let _listeners = [&one, &two].map(|path| UnixListener::bind(path).unwrap());
    let mut hanging = asked(&h1);
    register(&mut hanging, "shop@h1", &one);
    let service = map([("name", text("echo")), ("id", text("echo-1"))]);
    ask(&mut hanging, "register_service", service);
    // One of an earlier release says nothing for as long.
    let mut silent = h1.connect();
    silent.register("cart@h1", &two).unwrap();

    hanging.send("pong", map([]));
    let began = Instant::now();
    until(3 * HUNG, "critical", || {
        status(&h2, "shop@h1").starts_with("critical")
    });
    println!(
        "critical {:?} after the last answer, {HUNG:?} are promised",
        began.elapsed()
    );
    until(3 * HUNG, "critical", || {
        status(&h2, "echo-1").starts_with("critical")
    });
    assert!(
        status(&h2, "shop@h1").contains("hangs"),
        "{}",
        status(&h2, "shop@h1")
    );
    assert_eq!(status(&h2, "cart@h1"), "passing");
    assert_eq!(h2.names(), ["cart@h1"]);

    // One ping is all that waits for it, and perhaps one that came before the pong; and any word of it will do.
    let pings = ask(&mut hanging, "links", map([]));
    assert!((1..=2).contains(&pings), "{pings} pings wait");
    let began = Instant::now();
    until(LONG, "passing", || status(&h2, "shop@h1") == "passing");
    println!("passing {:?} after the first word", began.elapsed());
    until(LONG, "passing", || status(&h2, "echo-1") == "passing");
    // It goes on like this.
    until(3 * HUNG, "critical", || {
        status(&h2, "shop@h1").starts_with("critical")
    });
    // What it gave up is not kept as critical.
    ask(&mut hanging, "deregister", map([("id", text("shop@h1"))]));
    register(&mut hanging, "shop@h1", &one);
    assert_eq!(status(&h2, "shop@h1"), "passing");
}

#[test]
fn what_a_client_may_ask_for_is_bounded() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    for bad in [Term::Int(999), Term::Int(86_400_001), Term::Int(-1), text("5000")] {
        let hello = map([
            ("versions", Term::tuple([Term::Int(1), Term::Int(1)])),
            ("features", Term::list([text("heartbeat")])),
            ("heartbeat", bad),
        ]);
        assert_eq!(cause(agent.stranger().ask("hello", hello)), "invalid_request");
    }
    let many = Term::list((0..65).map(|number| text(number.to_string())));
    let hello = map([
        ("versions", Term::tuple([Term::Int(1), Term::Int(1)])),
        ("features", many),
    ]);
    assert_eq!(cause(agent.stranger().ask("hello", hello)), "invalid_request");
}

#[tokio::test]
async fn the_library_answers_by_itself() {
    let root = temp();
    let listener = tokio::net::UnixListener::bind(root.path().join("control.sock")).unwrap();
    let agent = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let hello = read_frame(&mut stream, REQUEST_MAX).await.unwrap().unwrap();
        let hello = Request::decode(&hello).unwrap();
        let features = hello.args.map_get("features").and_then(Term::as_list).unwrap();
        assert_eq!(features, [text("heartbeat")]);
        let answer = map([
            ("version", Term::Int(1)),
            ("agent", text("meshx")),
            ("hosts", Term::list([])),
            ("mesh", text("embedded")),
            ("trust_domain", text("td")),
            ("vm_dir", text("/v")),
            ("dist_socket", text("/d")),
        ]);
        stream
            .write_all(&reply(hello.id, Ok(answer)).unwrap())
            .await
            .unwrap();
        stream.write_all(&event("ping", map([])).unwrap()).await.unwrap();
        let pong = read_frame(&mut stream, REQUEST_MAX).await.unwrap().unwrap();
        assert_eq!(Request::decode(&pong).unwrap().command, "pong");
    };
    let (client, ()) = timeout(LONG, async {
        tokio::join!(ControlClient::connect(Some(root.path())), agent)
    })
    .await
    .unwrap();
    client.unwrap();
}

//! Clients that do not keep to the protocol are told, dropped, and nobody else's concern.

use std::{
    io::{Read, Write},
    time::Instant,
};

use meshx::{
    agent::control::{
        HELLO_TIME, UNANSWERED_MAX,
        frame::{FRAME_TIME, REQUEST_MAX},
        message::{Message, map, text},
    },
    mesh::{Entry, Instance, Protocol, Registration, ServiceName, embedded::EmbeddedMesh},
};
use meshx_etf::Term;

use crate::support::{Agent, Client, LONG, PATIENCE, cause, hello_args, temp, until};

#[test]
fn hello_comes_first_with_a_common_version() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);

    let mut client = agent.stranger();
    let (cause, text) = client.ask("hello", hello_args(7, 9)).unwrap_err();
    assert_eq!(cause, "version_mismatch");
    assert!(text.contains("7 to 9") && text.contains("1 to 1"), "{text}");
    assert_eq!(client.receive(), None);

    let mut client = agent.stranger();
    client.send("names", map([]));
    let text = client.protocol_error();
    assert!(text.contains("names") && text.contains("hello"), "{text}");
    agent.wait_log(&["protocol_error", "wanted hello"]);

    let mut client = agent.stranger();
    let answer = client.ask("hello", hello_args(0, 99)).unwrap();
    assert_eq!(answer.map_get("version").unwrap().as_int(), Some(1));
    assert_eq!(answer.map_get("vm_dir").unwrap().as_str(), agent.vm().to_str());
    assert_eq!(
        answer.map_get("hosts").unwrap().as_list().unwrap()[0].as_str(),
        Some("h1")
    );
    assert!(
        answer
            .map_get("trust_domain")
            .unwrap()
            .as_str()
            .unwrap()
            .ends_with(".embedded")
    );
}

#[test]
fn a_flood_of_refusals_does_not_fill_the_log() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let (asked, began) = (2_000, Instant::now());
    for number in 0..asked {
        // The same again would be one line.
        let command = format!("bogus{number}");
        assert_eq!(cause(client.ask(&command, map([]))), "invalid_request");
    }
    // 50 lines in each second that it took, the one it began in, and the one that the last word waits for.
    let most = 50 * (began.elapsed().as_secs() + 2);
    agent.wait_log(&["left_out", "refused clients and requests"]);
    let log = agent.log();
    let written = log.lines().filter(|line| line.contains("bogus")).count();
    assert!(
        written as u64 <= most && written < asked,
        "{written} of {asked} lines"
    );
}

#[test]
fn garbage_is_dropped_with_a_reason_while_others_go_on() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut other = agent.connect();
    let oversized = (REQUEST_MAX as u32 + 1).to_be_bytes();
    // Tuples in tuples, one level too deep for a client.
    let mut deep = vec![131];
    deep.extend([104, 1].repeat(33));
    deep.push(106);
    let framed = |payload: &[u8]| [&(payload.len() as u32).to_be_bytes()[..], payload].concat();
    for (bytes, reason) in [
        (framed(b"GET / HTTP/1.1"), "no term"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "at most 65536"),
        (oversized.to_vec(), "65537 bytes, at most 65536"),
        (vec![0xff; 64], "at most 65536"),
        (framed(&[]), "no term"),
        (framed(&[131, 106]), "{Id"),
        (framed(&deep), "deeper"),
        (framed(&[131, 108, 0xff, 0xff, 0xff, 0xff]), "no term"),
        (framed(&[131, 80, 0, 0, 0, 1, 0]), "compressed"),
    ] {
        for greeted in [false, true] {
            let mut client = agent.stranger();
            if greeted {
                client.hello();
            }
            client.stream.write_all(&bytes).unwrap();
            let text = client.protocol_error();
            assert!(text.contains(reason), "{text:?} has no {reason:?}");
            other.ask("names", map([])).unwrap();
        }
    }
}

#[test]
fn a_client_that_is_silent_or_slow_is_dropped_in_time() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut other = agent.connect();
    let began = Instant::now();
    let mut silent = agent.stranger();
    let mut half = agent.stranger();
    half.stream.write_all(&[0, 0]).unwrap();
    let mut half_later = agent.connect();
    half_later.stream.write_all(&[0, 0, 0, 9, 131]).unwrap();
    other.ask("names", map([])).unwrap();
    assert!(silent.protocol_error().contains("no hello within 5 s"));
    assert!(half.protocol_error().contains("within 5 s"));
    assert!(half_later.protocol_error().contains("not whole within 5 s"));
    let took = began.elapsed();
    println!("dropped after {took:?}");
    assert!(
        took >= HELLO_TIME.min(FRAME_TIME) && took < 3 * HELLO_TIME.max(FRAME_TIME),
        "{took:?}"
    );
    // One that has said hello may be silent as long as it likes.
    other.ask("names", map([])).unwrap();
}

#[test]
fn a_frame_that_ends_early_is_no_harm() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    for bytes in [&[][..], &[0], &[0, 0, 0, 9, 131, 104]] {
        let mut client = agent.stranger();
        client.stream.write_all(bytes).unwrap();
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        client.stream.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.is_empty(), bytes.is_empty());
    }
    assert!(agent.names().is_empty());
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut other = agent.connect();
    let mut client = agent.connect();
    let frame = meshx::agent::control::message::Request {
        id: 1,
        command: "x".repeat(200),
        args: map([("pad", text("x".repeat(1000)))]),
    };
    let frame = frame.encode().unwrap();
    // Far more than the queue and the socket's buffers hold.
    let broken = (0..1_000_000).any(|_| client.stream.write_all(&frame).is_err());
    assert!(broken, "the agent took a million requests and kept their answers");
    agent.wait_log(&["limit", "does not read"]);
    other.ask("names", map([])).unwrap();
}

#[test]
fn too_many_unanswered_requests_are_refused() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut other = agent.connect();
    let mut client = agent.connect();
    // Who holds the mesh's lock holds up every registration.
    let lock = std::fs::File::open(root.path().join("mesh/lock")).unwrap();
    lock.lock().unwrap();
    for number in 0..=UNANSWERED_MAX {
        client.send(
            "register_service",
            map([("name", text(format!("service-{number}")))]),
        );
    }
    let Some(Message::Reply { id, result }) = client.receive() else {
        panic!("no reply")
    };
    let (cause, text) = result.unwrap_err();
    assert_eq!(
        (id, cause.as_str()),
        (UNANSWERED_MAX as i64 + 2, "limit"),
        "the last one, at once"
    );
    assert!(
        text.contains("64 requests") && text.contains("UNANSWERED_MAX"),
        "{text}"
    );
    other.ask("names", map([])).unwrap();
    drop(lock);
    for _ in 0..UNANSWERED_MAX {
        let Some(Message::Reply { result, .. }) = client.receive() else {
            panic!("no reply")
        };
        // The last of them may have waited for the mesh for all of their time, if its disk is busy.
        assert!(result.is_ok() || result.is_err_and(|(cause, _)| cause == "not_ready"));
    }
}

#[test]
fn unknown_commands_and_arguments_are_refused_and_the_connection_stays() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut client = agent.connect();
    let long = map([("node", text("x".repeat(2000))), ("socket", text("/x"))]);
    for (command, args, wanted) in [
        ("dance", map([]), "invalid_request"),
        ("hello", hello_args(1, 1), "invalid_request"),
        ("register_node", map([]), "invalid_request"),
        ("register_node", map([("node", Term::Int(1))]), "invalid_request"),
        ("register_node", long, "limit"),
        ("deregister", map([("id", text("shop@h1"))]), "invalid_request"),
        ("cut", map([("link", Term::binary([1; 15]))]), "invalid_request"),
        (
            "cut",
            map([("link", Term::binary([1; 16])), ("reason", text("x"))]),
            "invalid_request",
        ),
        ("refusal", map([]), "invalid_request"),
        ("refusal", map([("node", text("shop@h1"))]), "invalid_request"),
        (
            "connect",
            map([("service", text("a b")), ("as", text("x"))]),
            "invalid_name",
        ),
        ("register_service", map([("name", text("A"))]), "invalid_name"),
    ] {
        assert_eq!(cause(client.ask(command, args)), wanted, "{command}");
    }
    agent.wait_log(&["refused", "invalid_request", "dance"]);
}

/// An agent that takes connections and says nothing makes whoever asks why wait for seconds.
#[test]
fn questions_that_dial_keep_nobody_from_the_others() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut good = agent.connect();
    good.ask("register_service", map([("name", text("echo"))]))
        .unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let address = silent.local_addr().unwrap();
    let mesh = root.path().join("mesh");
    let other = EmbeddedMesh::open(&mesh, "silent", vec!["h9".into()], address).unwrap();
    let instance = Instance {
        id: "mute-1".into(),
        service: ServiceName::new("mute").unwrap(),
        node: None,
        agent: "silent".into(),
        address,
        protocol: Protocol::Meshx,
        meta: Default::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(other.register(&Entry::plain(instance))).unwrap();

    let pair = || map([("from", text("echo")), ("to", text("mute"))]);
    let mut crowd: Vec<_> = (0..20).map(|_| agent.connect()).collect();
    for client in &mut crowd {
        client.send("why", pair());
    }
    // As many dial as may; the connection that this test accepts shows that one does.
    let _dialled = silent.accept().unwrap();
    let began = Instant::now();
    for command in ["names", "services", "intentions", "links"] {
        good.ask(command, map([])).unwrap();
    }
    good.ask("check", pair()).unwrap();
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    let refused = |client: &mut Client| match client.receive() {
        Some(Message::Reply { result: Ok(why), .. }) => why.map_get("cause").unwrap().to_string(),
        other => panic!("{other:?}"),
    };
    // The first have their answer after a handshake's time, and the last of the crowd waits for its turn.
    assert_eq!(refused(&mut crowd[0]), "timeout");
    drop(crowd);
    good.ask("names", map([])).unwrap();
}

/// Here the mesh answers nothing for as long as it is asked, and a few clients ask all they may: more than there
/// are threads for the mesh's files.
#[test]
fn clients_that_ask_much_keep_nobody_from_registering() {
    let root = temp();
    let agent = Agent::start(root.path(), "a", &["h1"], &[]);
    let mut good = agent.connect();
    good.ask("register_service", map([("name", text("echo"))]))
        .unwrap();
    let rules = root.path().join("mesh/rules.json");
    std::fs::remove_file(&rules).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &rules, rustix::fs::FileType::Fifo, mode, 0).unwrap();

    let pair = || map([("from", text("echo")), ("to", text("echo"))]);
    let mut crowd: Vec<_> = (0..10).map(|_| agent.connect()).collect();
    for client in &mut crowd {
        for _ in 0..UNANSWERED_MAX {
            client.send("check", pair());
        }
    }
    // The last of them was read: a further one is refused.
    until(LONG, "all requests being read", || {
        crowd.iter_mut().all(|client| {
            client.send("check", pair());
            matches!(client.receive(), Some(Message::Reply { result: Err((cause, _)), .. }) if cause == "limit")
        })
    });
    for _ in 0..200 {
        let service = good
            .ask("register_service", map([("name", text("shop"))]))
            .unwrap();
        let id = service.map_get("id").unwrap().clone();
        good.ask("deregister", map([("id", id)])).unwrap();
    }
}

//! A real BEAM as the peer, in both roles. One BEAM serves all of this file's checks: starting one is slow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use meshx_dist::control::{Control, Proc};
use meshx_dist::flags::DistFlags;
use meshx_dist::handshake::{Admission, HandshakeError, LocalNode};
use meshx_etf::{Atom, Pid, Term};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use support::beam::{Beam, COOKIE};
use support::epmd::{CREATION, Epmd};
use support::peer::{Failed, Peer};
use support::soon;
use tokio::net::TcpListener;

fn node(alive: &str) -> LocalNode {
    LocalNode::hidden(format!("{alive}@127.0.0.1"), 0x0102_0304)
}

fn without_fragments(alive: &str) -> LocalNode {
    let mut local = node(alive);
    local.flags = local.flags.without(DistFlags::FRAGMENTS);
    local
}

#[tokio::test]
async fn a_real_beam_is_met_in_both_roles() {
    let epmd = Epmd::start().await;
    let beam = Beam::start(&epmd, "beam").await;

    let mut peer = Peer::dial(beam.port, node("c1"), &beam.name, COOKIE)
        .await
        .unwrap();
    assert_eq!(
        peer.established.peer_creation, CREATION,
        "the creation came by our EPMD"
    );
    assert!(
        peer.established
            .flags
            .contains(DistFlags::FRAGMENTS | DistFlags::ALIAS | DistFlags::SPAWN)
    );
    is_auth(&mut peer).await;
    echo_of_generated_terms(&mut peer).await;
    monitors_and_links(&mut peer).await;
    large_messages(&mut peer).await;
    assert!(
        peer.fragments >= 15,
        "1 MiB comes in fragments of 64 KiB, saw {}",
        peer.fragments
    );
    gen_server_call(&mut peer).await;
    spawn(&mut peer).await;
    sequential_trace(&mut peer).await;

    let mut plain = Peer::dial(beam.port, without_fragments("c2"), &beam.name, COOKIE)
        .await
        .unwrap();
    is_auth(&mut plain).await;
    echo_of_generated_terms(&mut plain).await;
    large_messages(&mut plain).await;
    assert_eq!(plain.fragments, 0);
    drop(plain);

    a_second_link_of_the_same_name(&beam).await;
    a_dynamic_name(&beam).await;
    refusals_as_initiator(&beam).await;
    the_beam_dials(&epmd, &mut peer).await;

    drop(beam);
    epmd.unregistered("beam").await;
}

#[tokio::test]
async fn a_beam_without_a_name_is_given_one() {
    let epmd = Epmd::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    epmd.register("d", listener.local_addr().unwrap().port());
    let _beam = Beam::start_without_name(&epmd, "d@127.0.0.1");
    let (stream, _) = soon("the BEAM's connection", listener.accept()).await.unwrap();
    let admission = Admission::Named {
        name: "given@127.0.0.1",
        creation: 0x0304_0506,
    };
    let mut peer = Peer::accept_as(stream, node("d"), COOKIE, admission)
        .await
        .unwrap();
    assert!(peer.established.peer_flags.contains(DistFlags::NAME_ME));
    assert_eq!(peer.established.peer_name, "given@127.0.0.1");
    let identity = Term::tuple([Term::atom("given@127.0.0.1"), Term::Int(0x0304_0506)]);
    loop {
        match peer.receive().await {
            (Control::RegSend { from, to, .. }, Some(message)) if to == "named" => {
                assert_eq!((message, from.node.as_str()), (identity, "given@127.0.0.1"));
                break;
            }
            // Background talk of the BEAM's kernel processes.
            (Control::RegSend { .. } | Control::MonitorP { .. }, _) => {}
            other => panic!("waited for its name, got {other:?}"),
        }
    }
}

/// What `net_adm:ping/1` does once the nodes are connected.
async fn is_auth(peer: &mut Peer) {
    let (me, reference) = (peer.pid(), peer.reference());
    let request = Term::tuple([
        Term::atom("is_auth"),
        Term::atom(&peer.established.local_name[..]),
    ]);
    let from = Term::tuple([me.clone().into(), reference.clone().into()]);
    let call = Term::tuple([Term::atom("$gen_call"), from, request]);
    peer.send_to("net_kernel", me.clone(), call).await;
    let answer = message_to(peer, &me).await;
    assert_eq!(answer, Term::tuple([reference.into(), Term::atom("yes")]));
}

async fn message_to(peer: &mut Peer, me: &Pid) -> Term {
    loop {
        match peer.receive().await {
            (Control::Send { to, .. } | Control::SendSender { to, .. }, Some(message)) if to == *me => {
                return message;
            }
            // Background talk of the BEAM's kernel processes.
            (Control::RegSend { .. } | Control::MonitorP { .. } | Control::DemonitorP { .. }, _) => {}
            other => panic!("waited for a message to {me:?}, got {other:?}"),
        }
    }
}

fn terms() -> impl Strategy<Value = Term> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Term::Int),
        any::<i128>().prop_map(Term::from),
        any::<f64>()
            .prop_filter("finite", |f| f.is_finite())
            .prop_map(Term::Float),
        "[a-z\u{e4}\u{4e2d}]{0,12}".prop_map(Term::atom),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Term::binary),
        prop::collection::vec(any::<u8>().prop_map(Term::from), 0..40).prop_map(Term::List),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Term::List),
            prop::collection::vec(inner.clone(), 0..6).prop_map(Term::Tuple),
            prop::collection::vec((inner.clone(), inner), 0..5).prop_map(Term::map),
        ]
    })
}

async fn echo_of_generated_terms(peer: &mut Peer) {
    let mut runner = TestRunner::deterministic();
    let me = peer.pid();
    let mut sent = Vec::new();
    for _ in 0..300 {
        let term = terms().new_tree(&mut runner).unwrap().current();
        let message = Term::tuple([me.clone().into(), term.clone()]);
        peer.send_to("echo", me.clone(), message).await;
        sent.push(term);
    }
    for term in sent {
        assert_eq!(
            message_to(peer, &me).await,
            Term::tuple([Term::atom("echo"), term])
        );
    }
}

async fn large_messages(peer: &mut Peer) {
    let me = peer.pid();
    let bytes: Vec<u8> = (0..1024 * 1024u32).map(|i| (i % 251) as u8).collect();
    let message = Term::tuple([me.clone().into(), Term::binary(bytes.clone())]);
    peer.send_to("echo", me.clone(), message).await;
    let answer = message_to(peer, &me).await;
    assert!(
        answer == Term::tuple([Term::atom("echo"), Term::binary(bytes)]),
        "the binary came back changed"
    );
}

async fn monitors_and_links(peer: &mut Peer) {
    let (me, reference) = (peer.pid(), peer.reference());
    let to = Proc::Name(Atom::from("no_such_name"));
    peer.send(
        Control::MonitorP {
            from: me.clone(),
            to: to.clone(),
            reference: reference.clone(),
        },
        None,
    )
    .await;
    let gone = Control::PayloadMonitorPExit {
        from: to,
        to: me.clone(),
        reference,
    };
    assert_eq!(peer.receive().await, (gone, Some(Term::atom("noproc"))));

    // A link to a process that is made for it, taken back: the BEAM must acknowledge.
    let whereis = Term::list([Term::atom("echo")]);
    let Term::Pid(echo) = apply(peer, "erlang", "whereis", whereis).await else {
        panic!("echo has a pid")
    };
    peer.send(
        Control::Link {
            from: me.clone(),
            to: echo.clone(),
        },
        None,
    )
    .await;
    peer.send(
        Control::UnlinkId {
            id: 1 << 40,
            from: me.clone(),
            to: echo.clone(),
        },
        None,
    )
    .await;
    assert_eq!(
        peer.receive().await.0,
        Control::UnlinkIdAck {
            id: 1 << 40,
            from: echo,
            to: me
        }
    );
}

async fn apply(peer: &mut Peer, module: &str, function: &str, arguments: Term) -> Term {
    let me = peer.pid();
    let request = Term::tuple([
        me.clone().into(),
        Term::atom(module),
        Term::atom(function),
        arguments,
    ]);
    peer.send_to("do", me.clone(), request).await;
    result_to(peer, &me).await
}

async fn result_to(peer: &mut Peer, me: &Pid) -> Term {
    match message_to(peer, me).await {
        Term::Tuple(answer) if answer.len() == 2 && answer[0] == Term::atom("result") => answer[1].clone(),
        other => panic!("wanted {{result, _}}, got {other:?}"),
    }
}

/// The BEAM calls us: a monitor by name, a message to a name, and an answer to an alias.
async fn gen_server_call(peer: &mut Peer) {
    let me = peer.pid();
    let server = Term::tuple([Term::atom("search"), Term::atom(&peer.established.local_name[..])]);
    let arguments = Term::list([server, Term::atom("hello")]);
    let request = Term::tuple([
        me.clone().into(),
        Term::atom("gen_server"),
        Term::atom("call"),
        arguments,
    ]);
    peer.send_to("do", me.clone(), request).await;
    let mut monitored = false;
    loop {
        match peer.receive().await {
            (
                Control::MonitorP {
                    to: Proc::Name(name), ..
                },
                None,
            ) if name == "search" => monitored = true,
            (Control::RegSend { to, .. }, Some(Term::Tuple(call))) if to == "search" => {
                assert_eq!(
                    (call[0].as_atom(), call[2].as_atom()),
                    (Some("$gen_call"), Some("hello"))
                );
                let tag = call[1].as_tuple().unwrap()[1].clone();
                let Term::ImproperList(_, alias) = &tag else {
                    panic!("wanted [alias|Ref], got {tag:?}")
                };
                let alias = alias.as_reference().unwrap().clone();
                let answer = Term::tuple([tag, Term::atom("found")]);
                peer.send(
                    Control::AliasSend {
                        from: me.clone(),
                        alias,
                        token: None,
                    },
                    Some(&answer),
                )
                .await;
                break;
            }
            other => panic!("wanted a call of search, got {other:?}"),
        }
    }
    assert!(monitored, "a call begins with a monitor");
    assert_eq!(result_to(peer, &me).await, Term::atom("found"));
}

/// Both directions of `SPAWN_REQUEST`.
async fn spawn(peer: &mut Peer) {
    let (me, id) = (peer.pid(), peer.reference());
    let request = Control::SpawnRequest {
        id: id.clone(),
        from: me.clone(),
        group_leader: me.clone(),
        module: Atom::from("erlang"),
        function: Atom::from("exit"),
        arity: 1,
        options: vec![Term::atom("monitor")],
        token: None,
    };
    peer.send(request, Some(&Term::list([Term::atom("bye")]))).await;
    let (
        Control::SpawnReply {
            id: answered,
            flags: 2,
            result,
            ..
        },
        None,
    ) = peer.receive().await
    else {
        panic!("wanted a SPAWN_REPLY that says monitored")
    };
    assert_eq!(answered, id);
    let meshx_dist::control::SpawnResult::Pid(spawned) = result else {
        panic!("spawned, got {result:?}")
    };
    let gone = Control::PayloadMonitorPExit {
        from: Proc::Pid(spawned),
        to: me.clone(),
        reference: id,
    };
    assert_eq!(peer.receive().await, (gone, Some(Term::atom("bye"))));

    let local = Term::atom(&peer.established.local_name[..]);
    let (module, function) = (Term::atom("m"), Term::atom("f"));
    let arguments = Term::list([local, module, function, Term::list([Term::Int(7)])]);
    let request = Term::tuple([
        me.clone().into(),
        Term::atom("erlang"),
        Term::atom("spawn_request"),
        arguments,
    ]);
    peer.send_to("do", me.clone(), request).await;
    let (mut asked, mut result) = (None, None);
    while asked.is_none() || result.is_none() {
        match peer.receive().await {
            (
                Control::SpawnRequest {
                    id, module, arity: 1, ..
                },
                Some(arguments),
            ) if module == "m" => {
                assert_eq!(arguments, Term::list([Term::Int(7)]));
                asked = Some(id);
            }
            (Control::Send { to, .. } | Control::SendSender { to, .. }, message) if to == me => {
                result = message
            }
            other => panic!("wanted a SPAWN_REQUEST, got {other:?}"),
        }
    }
    assert_eq!(
        result,
        Some(Term::tuple([Term::atom("result"), asked.unwrap().into()]))
    );
}

/// A trace token that the BEAM made, sent back to it, comes again with the answer.
async fn sequential_trace(peer: &mut Peer) {
    let me = peer.pid();
    let arguments = Term::list([Term::atom("label"), Term::Int(17)]);
    let request = Term::tuple([
        me.clone().into(),
        Term::atom("seq_trace"),
        Term::atom("set_token"),
        arguments,
    ]);
    peer.send_to("do", me.clone(), request).await;
    let (
        Control::Send {
            token: Some(token), ..
        },
        Some(_),
    ) = peer.receive().await
    else {
        panic!("wanted a SEND_TT")
    };
    assert_eq!(
        token.as_tuple().map(|fields| (fields.len(), fields[1].as_int())),
        Some((5, Some(17)))
    );
    let message = Term::tuple([me.clone().into(), Term::atom("traced")]);
    let to = Atom::from("echo");
    peer.send(
        Control::RegSend {
            from: me.clone(),
            to,
            token: Some(token),
        },
        Some(&message),
    )
    .await;
    let (
        Control::Send {
            token: Some(token), ..
        },
        Some(answer),
    ) = peer.receive().await
    else {
        panic!("wanted a SEND_TT that answers")
    };
    assert_eq!(
        token.as_tuple().map(|fields| fields[1].clone()),
        Some(Term::Int(17))
    );
    assert_eq!(answer, Term::tuple([Term::atom("echo"), Term::atom("traced")]));
    // A message without a token ends the trace in the process that gets it.
    let message = Term::tuple([me.clone().into(), Term::atom("untraced")]);
    peer.send_to("echo", me.clone(), message).await;
    assert!(matches!(
        peer.receive().await.0,
        Control::Send { token: None, .. }
    ));
}

async fn a_second_link_of_the_same_name(beam: &Beam) {
    let mut first = Peer::dial(beam.port, node("twice"), &beam.name, COOKIE)
        .await
        .unwrap();
    assert!(!first.was_alive);
    // Its proof is sent a moment before the BEAM counts the link as up.
    is_auth(&mut first).await;
    let mut second = Peer::dial(beam.port, node("twice"), &beam.name, COOKIE)
        .await
        .unwrap();
    assert!(second.was_alive, "the BEAM has to ask");
    is_auth(&mut second).await;
    while first.receive_or_end().await.is_some() {}
}

async fn a_dynamic_name(beam: &Beam) {
    let mut local = LocalNode::hidden("127.0.0.1", 0);
    local.flags = local.flags.with(DistFlags::NAME_ME);
    let mut peer = Peer::dial(beam.port, local, &beam.name, COOKIE).await.unwrap();
    assert!(
        peer.established.local_name.ends_with("@127.0.0.1"),
        "{}",
        peer.established.local_name
    );
    assert!(peer.established.local_creation > 3);
    assert!(
        peer.established.peer_flags.contains(DistFlags::NAME_ME),
        "as our acceptor does"
    );
    is_auth(&mut peer).await;
}

async fn refusals_as_initiator(beam: &Beam) {
    // The BEAM sees our wrong digest first, and closes.
    let refused = Peer::dial(beam.port, node("c3"), &beam.name, "wrong").await.err();
    assert_eq!(refused, Some(Failed::Closed));
    let refused = Peer::dial(beam.port, node("c3"), "other@127.0.0.1", COOKIE)
        .await
        .err();
    let wanted = HandshakeError::WrongName {
        wanted: "other@127.0.0.1".into(),
        got: beam.name.clone(),
    };
    assert_eq!(refused, Some(Failed::Handshake(wanted)));
    let mut local = node("c3");
    local.required_flags = local.required_flags.with(DistFlags::from_bits(1 << 60));
    let refused = Peer::dial(beam.port, local, &beam.name, COOKIE).await.err();
    let missing = DistFlags::from_bits(1 << 60);
    assert_eq!(
        refused,
        Some(Failed::Handshake(HandshakeError::MissingFlags { missing }))
    );
    let mut local = node("c3");
    local.flags = local
        .flags
        .without(DistFlags::MANDATORY_25_DIGEST | DistFlags::BIG_CREATION);
    let refused = Peer::dial(beam.port, local, &beam.name, COOKIE).await.err();
    assert!(
        refused.is_some(),
        "the BEAM refuses a node without a mandatory flag"
    );
}

/// Our EPMD tells the BEAM where we listen; it dials when asked to over the link that we have.
async fn the_beam_dials(epmd: &Epmd, control: &mut Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    epmd.register("d", listener.local_addr().unwrap().port());

    let me = control.pid();
    let connect = async |control: &mut Peer| {
        let arguments = Term::list([Term::atom("d@127.0.0.1")]);
        let (module, function) = (Term::atom("net_kernel"), Term::atom("connect_node"));
        let request = Term::tuple([me.clone().into(), module, function, arguments]);
        control.send_to("do", me.clone(), request).await;
        soon("the BEAM's connection", listener.accept()).await.unwrap().0
    };

    let stream = connect(control).await;
    let name = Peer::refuse(stream, node("d")).await.unwrap();
    assert_eq!(result_to(control, &me).await, Term::atom("false"));

    let stream = connect(control).await;
    let refused = Peer::accept(stream, node("d"), "wrong").await.err();
    let mismatch = HandshakeError::CookieMismatch { peer: name.clone() };
    assert_eq!(refused, Some(Failed::Handshake(mismatch)));
    assert_eq!(result_to(control, &me).await, Term::atom("false"));

    let stream = connect(control).await;
    let mut peer = Peer::accept(stream, node("d"), COOKIE).await.unwrap();
    assert_eq!(result_to(control, &me).await, Term::atom("true"));
    assert_eq!(
        (&peer.established.peer_name, peer.established.peer_creation),
        (&name, CREATION)
    );
    is_auth(&mut peer).await;
    large_messages(&mut peer).await;
}

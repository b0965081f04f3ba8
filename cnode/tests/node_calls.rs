//! Calls in both directions between a node of the library and a real BEAM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use std::time::Duration;

use meshx::node::{CallError, Caller, ConnectError, Context, Message, Request, RpcError, SendError, Server};
use meshx_etf::{Reference, Term};
use node_support::{Epmd, LONG, soon};

#[tokio::test(flavor = "multi_thread")]
async fn pings_go_both_ways() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    assert_eq!(beam.eval("net_adm:ping('search@127.0.0.1').").await, "pong");
    assert_eq!(beam.eval("nodes().").await, "[]", "the node is hidden");
    assert_eq!(beam.eval("nodes(hidden).").await, "['search@127.0.0.1']");
    node.ping("cart@127.0.0.1", LONG).await.unwrap();

    // And the other way round: this node dials.
    assert!(node.disconnect("cart@127.0.0.1"));
    soon(async { while beam.eval("nodes(hidden).").await != "[]" {} }).await;
    node.ping("cart@127.0.0.1", LONG).await.unwrap();
    assert_eq!(beam.eval("nodes(hidden).").await, "['search@127.0.0.1']");
    let missing = node.connect("nobody@127.0.0.1").await;
    assert!(
        matches!(missing, Err(ConnectError::NoSuchNode { .. })),
        "{missing:?}"
    );
    assert_eq!(beam.eval("net_adm:ping('nobody@127.0.0.1').").await, "pang");
}

struct Counter(i64);

impl Server for Counter {
    async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
        match request.as_atom() {
            Some("get") => Some(Term::Int(self.0)),
            Some("later") => {
                tokio::spawn(async move { caller.reply(Term::atom("at_last")).await });
                None
            }
            _ => Some(request),
        }
    }

    async fn cast(&mut self, request: Term) {
        self.0 += request.as_int().unwrap_or_default();
    }

    async fn info(&mut self, message: Message) {
        if let Message::Term { term, .. } = message {
            self.0 += term.as_int().unwrap_or_default();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_beam_calls_servers_here() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    node.serve("search", |request: Term| async move {
        Term::tuple([Term::atom("found"), request])
    })
    .unwrap();
    node.start_server("counter", Counter(0)).unwrap();

    let value = beam
        .eval("gen_server:call({search, 'search@127.0.0.1'}, {find, <<\"rust\">>}).")
        .await;
    assert_eq!(value, "{found,{find,<<\"rust\">>}}");
    beam.eval("C = {counter, 'search@127.0.0.1'}.").await;
    beam.eval("gen_server:cast(C, 40).").await;
    beam.eval("C ! 2.").await;
    assert_eq!(beam.eval("gen_server:call(C, get).").await, "42");
    assert_eq!(beam.eval("gen_server:call(C, later).").await, "at_last");
    let terms = "{1, -1.5, [1,2,3|x], #{a => \"text\", 1 => 2, 1.0 => 3}, <<1,2,3:3>>, 1 bsl 200, self(), make_ref(), \
        'h\u{e9}', fun lists:seq/2, fun(X) -> X + length([C]) end}";
    assert_eq!(
        beam.eval(&format!("T = {terms}, T =:= gen_server:call(C, T)."))
            .await,
        "true"
    );

    // A name that nobody has is told at once, although the timeout is long.
    let started = std::time::Instant::now();
    let error = beam
        .try_eval("gen_server:call({nobody, 'search@127.0.0.1'}, x, 600000).")
        .await
        .unwrap_err();
    assert!(error.starts_with("{exit,{noproc,"), "{error}");
    assert!(started.elapsed() < LONG);
}

/// Watches whom it is told to, and says what it heard.
#[derive(Default)]
struct Watcher {
    context: Option<Context>,
    monitors: Vec<Reference>,
    heard: Vec<Term>,
}

impl Server for Watcher {
    async fn init(&mut self, context: Context) {
        self.context = Some(context);
    }

    async fn call(&mut self, request: Term, caller: Caller) -> Option<Term> {
        let context = self.context.as_ref()?;
        let caller = caller.pid().clone();
        match request.as_atom()? {
            "self" => return Some(context.pid().clone().into()),
            "monitor" => self.monitors.push(context.monitor(caller).await),
            "demonitor" => context.demonitor(&self.monitors.pop()?),
            "link" => context.link(&caller).await,
            "unlink" => context.unlink(&caller),
            "alias" => return Some(context.reply_alias().into()),
            "greet" => context.send(caller, &Term::atom("hello")).await.ok()?,
            "heard" => return Some(Term::list(std::mem::take(&mut self.heard))),
            "stop" => {
                context.trap_exit(false);
                let own = context.pid().clone();
                context.exit(&own, &Term::atom("stopped")).await.ok()?;
            }
            _ => return None,
        }
        Some(Term::atom("ok"))
    }

    async fn info(&mut self, message: Message) {
        self.heard.push(match message {
            Message::Term { term, .. } => term,
            Message::Down { reason, .. } => Term::tuple([Term::atom("down"), reason]),
            Message::Exit { reason, .. } => Term::tuple([Term::atom("exit"), reason]),
            _ => Term::atom("other"),
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_watches_and_is_sent_to_as_the_process_that_it_is() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    node.start_server("watcher", Watcher::default()).unwrap();
    beam.eval("C = {watcher, 'search@127.0.0.1'}.").await;
    beam.eval("Ask = fun(What) -> gen_server:call(C, What) end.")
        .await;
    // What each of them hears of a process that asks for it and ends.
    for (asked, heard) in [
        ("[monitor]", "[{down,done}]"),
        ("[link]", "[{exit,done}]"),
        ("[monitor, demonitor]", "[]"),
        ("[link, unlink]", "[]"),
        ("[monitor, link]", "[{down,done},{exit,done}]"),
    ] {
        let run = format!(
            "(fun() -> {{P, M}} = spawn_monitor(fun() -> [ok = Ask(W) || W <- {asked}], exit(done) end), \
                       receive {{'DOWN', M, process, P, done}} -> ok end end)()."
        );
        beam.eval(&run).await;
        // Signals of one process come in order, and before what this one sends afterwards only if it is the same.
        let mut seen = beam.eval("lists:sort(Ask(heard)).").await;
        soon(async {
            while seen.matches('{').count() < heard.matches('{').count() {
                seen = beam.eval(&format!("lists:sort({seen} ++ Ask(heard)).")).await;
            }
        })
        .await;
        assert_eq!(seen, heard, "{asked}");
    }
    beam.eval("A = Ask(alias), A ! by_alias, A ! too_late.").await;
    assert_eq!(beam.eval("Ask(heard).").await, "[by_alias]");
    assert_eq!(
        beam.eval("ok = Ask(greet), receive hello -> here end.").await,
        "here"
    );
    assert_eq!(beam.eval("Ask(self) ! direct, Ask(heard).").await, "[direct]");

    let stopped = beam
        .eval("M = monitor(process, C), catch Ask(stop), receive {'DOWN', M, process, _, R} -> R end.")
        .await;
    assert_eq!(stopped, "stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_a_beam_are_called_from_here() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    // A gen_server of OTP itself, and a process that plays one by hand.
    let request = [
        Term::atom("call"),
        Term::atom("erlang"),
        Term::atom("node"),
        Term::list([]),
        Term::atom("user"),
    ];
    let answer = node
        .gen_call(("rex", "cart@127.0.0.1"), Term::tuple(request), LONG)
        .await
        .unwrap();
    assert_eq!(answer, Term::atom("cart@127.0.0.1"));
    beam.eval(
        "register(echo, spawn(fun L() -> receive {'$gen_call', From, die} -> exit(boom); \
         {'$gen_call', From, mute} -> L(); {'$gen_call', From, R} -> gen:reply(From, {echo, R}), L() end end)).",
    )
    .await;
    let to = ("echo", "cart@127.0.0.1");
    let answer = node.gen_call(to, Term::from(7), LONG).await.unwrap();
    assert_eq!(answer, Term::tuple([Term::atom("echo"), Term::Int(7)]));
    let silent = node
        .gen_call(to, Term::atom("mute"), Duration::from_millis(200))
        .await;
    assert!(matches!(silent, Err(CallError::Timeout(_))), "{silent:?}");
    let dead = node.gen_call(to, Term::atom("die"), LONG).await;
    assert!(
        matches!(&dead, Err(CallError::Exit(reason)) if *reason == Term::atom("boom")),
        "{dead:?}"
    );
    let gone = node.gen_call(to, Term::from(7), LONG).await;
    assert!(matches!(gone, Err(CallError::NoProcess(_))), "{gone:?}");
    let away = node
        .gen_call(("x", "nobody@127.0.0.1"), Term::from(7), LONG)
        .await;
    assert!(
        matches!(
            away,
            Err(CallError::Send(SendError::Connect(
                ConnectError::NoSuchNode { .. }
            )))
        ),
        "{away:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_of_a_beam_are_called() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let _beam = epmd.beam("cart@127.0.0.1").await;
    let rpc = async |module: &str, function: &str, args: Vec<Term>| {
        node.rpc("cart@127.0.0.1", module, function, args, LONG).await
    };
    let numbers = rpc("lists", "seq", vec![Term::Int(1), Term::Int(5)])
        .await
        .unwrap();
    assert_eq!(numbers, Term::list((1..=5).map(Term::Int)));
    let me = rpc("erlang", "node", vec![]).await.unwrap();
    assert_eq!(me, Term::atom("cart@127.0.0.1"));

    let error = rpc("erlang", "error", vec![Term::atom("oops")]).await;
    assert!(
        matches!(&error, Err(RpcError::Error { reason, .. }) if *reason == Term::atom("oops")),
        "{error:?}"
    );
    let undef = rpc("no_such_module", "f", vec![]).await;
    assert!(
        matches!(&undef, Err(RpcError::Error { reason, .. }) if *reason == Term::atom("undef")),
        "{undef:?}"
    );
    assert!(undef.unwrap_err().is_undef());
    assert!(!error.unwrap_err().is_undef());
    let exit = rpc("erlang", "exit", vec![Term::atom("bye")]).await;
    assert!(
        matches!(&exit, Err(RpcError::Exit { reason, .. }) if *reason == Term::atom("bye")),
        "{exit:?}"
    );
    let throw = rpc("erlang", "throw", vec![Term::Int(3)]).await;
    assert!(
        matches!(
            &throw,
            Err(RpcError::Throw {
                value: Term::Int(3),
                ..
            })
        ),
        "{throw:?}"
    );
    let slow = node.rpc(
        "cart@127.0.0.1",
        "timer",
        "sleep",
        vec![Term::atom("infinity")],
        Duration::from_millis(200),
    );
    let slow = slow.await;
    assert!(
        matches!(slow, Err(RpcError::Call(CallError::Timeout(_)))),
        "{slow:?}"
    );
    let halted = rpc("erlang", "halt", vec![]).await;
    assert!(
        matches!(halted, Err(RpcError::Call(CallError::Disconnected(_)))),
        "{halted:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn several_nodes_are_called_at_once_and_casts_are_not_awaited() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let _beam = epmd.beam("cart@127.0.0.1").await;
    let other = epmd.node("other@127.0.0.1").await;
    other.expose("erlang", "node", 0, |_| async {
        Ok(Term::atom("a_node_in_rust"))
    });
    let nodes = ["cart@127.0.0.1", "nobody@127.0.0.1", "other@127.0.0.1"];
    let results = node.rpc_all(&nodes, "erlang", "node", &[], LONG).await;
    assert!(
        matches!(&results[..], [Ok(beam), Err(RpcError::Call(CallError::Send(_))), Ok(rust)]
            if *beam == Term::atom("cart@127.0.0.1") && *rust == Term::atom("a_node_in_rust")),
        "{results:?}"
    );
    let mut main = node.mailbox();
    let me = Term::from(main.pid().clone());
    node.rpc_cast("cart@127.0.0.1", "erlang", "send", vec![me, Term::atom("cast")])
        .await
        .unwrap();
    let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
        panic!("no message")
    };
    assert_eq!(term, Term::atom("cast"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_calls_and_drops_what_comes_too_late() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    // Answers `hold` only when the next request comes, and says so in its answer.
    beam.eval(
        "register(echo, spawn(fun() -> L = fun L(Held) -> receive {'$gen_call', From, hold} -> L([From | Held]); \
         {'$gen_call', From = {Pid, _}, R} -> [gen:reply(H, late) || H <- Held], Pid ! note, \
         gen:reply(From, {echo, R, length(Held)}), L([]) end end, L([]) end)).",
    )
    .await;
    let mut main = node.mailbox();
    let echo = ("echo", "cart@127.0.0.1");
    let held = main
        .gen_call(echo, Term::atom("hold"), Duration::from_millis(100))
        .await;
    assert!(matches!(held, Err(CallError::Timeout(_))), "{held:?}");
    for (request, held) in [(1, 1), (2, 0)] {
        let answer = main.gen_call(echo, Term::Int(request), LONG).await.unwrap();
        let wanted = [Term::atom("echo"), Term::Int(request), Term::Int(held)];
        assert_eq!(answer, Term::tuple(wanted));
    }
    // What came meanwhile is there; the late answer and the ends of monitors are not.
    for _ in 0..2 {
        let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
            panic!("no message")
        };
        assert_eq!(term, Term::atom("note"));
    }
    let gone = main
        .gen_call(("nobody", "cart@127.0.0.1"), Term::Int(1), LONG)
        .await;
    assert!(matches!(gone, Err(CallError::NoProcess(_))), "{gone:?}");
    assert!(main.recv_timeout(Duration::ZERO).await.is_err());
}

/// As in `select!`: the answer may be on its way still, or in the queue already.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_dropped_leaves_nothing_of_itself() {
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut server = node.register("server").unwrap();
    let mut main = node.mailbox();
    for answered_before in [false, true] {
        server.send(main.pid(), &Term::atom("before")).await.unwrap();
        let target = ("server", "search@127.0.0.1");
        let mut call = Box::pin(main.gen_call(target, Term::Int(1), LONG));
        assert!(futures::poll!(call.as_mut()).is_pending());
        let request = soon(server.recv()).await.unwrap();
        let Request::Call(_, caller) = Request::from_message(request, &server) else {
            panic!("no call")
        };
        server.send(caller.pid(), &Term::atom("meanwhile")).await.unwrap();
        if answered_before {
            caller.reply(Term::atom("late")).await.unwrap();
            drop(call);
        } else {
            drop(call);
            caller.reply(Term::atom("late")).await.unwrap();
        }
        server.send(main.pid(), &Term::atom("after")).await.unwrap();
        for wanted in ["before", "meanwhile", "after"] {
            let Some(Message::Term { term, .. }) = soon(main.recv()).await else {
                panic!("no message")
            };
            assert_eq!(term, Term::atom(wanted), "answered before: {answered_before}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_go_both_ways() {
    const LEN: usize = 8 << 20;
    let epmd = Epmd::start().await;
    let node = epmd.node("search@127.0.0.1").await;
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    node.serve("echo", |request: Term| async move { request })
        .unwrap();
    let same = beam
        .eval(&format!(
            "B = crypto:strong_rand_bytes({LEN}), B =:= gen_server:call({{echo, 'search@127.0.0.1'}}, B, 60000)."
        ))
        .await;
    assert_eq!(same, "true");
    let bytes: Vec<u8> = (0..LEN).map(|i| (i / 7) as u8).collect();
    let args = vec![Term::binary(bytes.clone())];
    let crc = node
        .rpc("cart@127.0.0.1", "erlang", "crc32", args, LONG)
        .await
        .unwrap();
    let back = node
        .rpc(
            "cart@127.0.0.1",
            "binary",
            "copy",
            vec![Term::binary(bytes.clone())],
            LONG,
        )
        .await
        .unwrap();
    assert_eq!(back.as_binary(), Some(bytes.as_slice()));
    assert!(crc.as_int().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_the_library_call_each_other_and_themselves() {
    let epmd = Epmd::start().await;
    let a = epmd.node("a@127.0.0.1").await;
    let b = epmd.node("b@127.0.0.1").await;
    b.serve("twice", |request: Term| async move {
        Term::Int(request.as_int().unwrap_or_default() * 2)
    })
    .unwrap();
    for node in [&a, &b] {
        let answer = node
            .gen_call(("twice", "b@127.0.0.1"), Term::Int(21), LONG)
            .await
            .unwrap();
        assert_eq!(answer, Term::Int(42));
        let nobody = node
            .gen_call(("nobody", "b@127.0.0.1"), Term::Int(21), LONG)
            .await;
        assert!(matches!(nobody, Err(CallError::NoProcess(_))), "{nobody:?}");
    }
    b.expose("math", "twice", 1, |args: Vec<Term>| async move {
        Ok(Term::Int(args[0].as_int().unwrap_or_default() * 2))
    });
    for node in [&a, &b] {
        let result = node.rpc("b@127.0.0.1", "math", "twice", vec![Term::Int(4)], LONG);
        assert_eq!(result.await.unwrap(), Term::Int(8));
        let undef = node.rpc("b@127.0.0.1", "lists", "seq", vec![], LONG).await;
        assert!(
            matches!(&undef, Err(RpcError::Error { reason, .. }) if *reason == Term::atom("undef")),
            "{undef:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_dial_each_other_at_once_get_one_connection() {
    let epmd = Epmd::start().await;
    for round in 0..50 {
        let a = epmd.node(&format!("a{round}@127.0.0.1")).await;
        let b = epmd.node(&format!("b{round}@127.0.0.1")).await;
        let (ab, ba) = soon(async { tokio::join!(a.connect(b.name()), b.connect(a.name())) }).await;
        ab.unwrap();
        ba.unwrap();
        let mut events = a.events();
        a.ping(b.name(), LONG).await.unwrap();
        b.ping(a.name(), LONG).await.unwrap();
        assert_eq!((a.peers().len(), b.peers().len()), (1, 1));
        while let Ok(event) = events.try_recv() {
            assert!(
                !matches!(event, meshx::node::NodeEvent::Down { .. }),
                "round {round}: {event:?}"
            );
        }
    }
}

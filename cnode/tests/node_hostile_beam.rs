//! Terms that a real BEAM sends and a node has to refuse: the connection ends with the limit in its reason, memory stays
//! bounded, and others are served. What no BEAM would send is in `node_hostile`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod node_support;

use meshx::node::{Limits, NodeEvent};
use meshx_etf::Term;
use node_support::{Epmd, LONG, soon};

/// Most that the process may grow by for one of them: the largest is 9 MiB.
const GROWTH: usize = 32 << 20;

/// What the BEAM does with `N`, this node, and the limit that it passes.
const CASES: [(&str, &str); 9] = [
    ("{echo, N} ! Nest(3000)", "max_depth"),
    ("{echo, N} ! Nest(1000000)", "max_depth"),
    ("{echo, N} ! #{key => [{x, Nest(300)}]}", "max_depth"),
    ("catch gen_server:call({echo, N}, Nest(3000))", "max_depth"),
    ("spawn(N, lists, seq, [Nest(3000), 2])", "max_depth"),
    ("exit(get(pid), Nest(3000))", "max_depth"),
    ("{echo, N} ! (1 bsl 800000)", "max_integer_bytes"),
    ("{echo, N} ! lists:duplicate(5000000, [])", "max_terms"),
    ("{echo, N} ! <<0:(9*1024*1024)/unit:8>>", "message_bytes"),
];

/// From OTP 29 on.
const RECORD: (&str, &str) = ("{echo, N} ! nr:make()", "tag 67");
const MAKE_RECORD: &str = r#"
    Lines = ["-module(nr).", "-export([make/0]).", "-record #point{x = 1}.", "make() -> #point{}."],
    Forms = [begin {ok, T, _} = erl_scan:string(L), {ok, F} = erl_parse:parse_form(T), F end || L <- Lines],
    {ok, nr, Code} = compile:forms(Forms),
    code:load_binary(nr, "nr", Code).
"#;

/// The most resident memory since `begin_peak`, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() * 1024
}

/// Lets the peak begin at what is resident now (`clear_refs`, proc(5)).
fn begin_peak() -> usize {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    peak()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_beam_sends_beyond_the_limits_ends_its_connection_alone() {
    let epmd = Epmd::start().await;
    let limits = Limits {
        message_bytes: 8 << 20,
        ..Limits::default()
    };
    let builder = epmd.builder("search@127.0.0.1").limits(limits);
    let node = builder.start().await.unwrap();
    node.serve("echo", |request: Term| async move { request })
        .unwrap();
    let mailbox = node.mailbox();
    let friend = epmd.node("friend@127.0.0.1").await;
    soon(friend.ping("search@127.0.0.1", LONG)).await.unwrap();
    let mut beam = epmd.beam("cart@127.0.0.1").await;
    beam.eval("N = 'search@127.0.0.1', register(console, self()).")
        .await;
    beam.eval("Nest = fun(Levels) -> lists:foldl(fun(_, T) -> {T} end, [], lists:seq(1, Levels)) end.")
        .await;
    let release: u32 = beam
        .eval("list_to_integer(erlang:system_info(otp_release)).")
        .await
        .parse()
        .unwrap();
    let record = (release >= 29).then_some(RECORD);
    if record.is_some() {
        beam.eval(MAKE_RECORD).await;
    }
    for (does, limit) in CASES.into_iter().chain(record) {
        // By its answer the BEAM is connected again.
        let pid = Term::Pid(mailbox.pid().clone());
        mailbox.send(("console", "cart@127.0.0.1"), &pid).await.unwrap();
        beam.eval("put(pid, receive P -> P end), monitor_node(N, true).")
            .await;
        let mut events = node.events();
        let before = begin_peak();
        let ends = format!("{does}, receive {{nodedown, N}} -> down end.");
        assert_eq!(beam.eval(&ends).await, "down", "{does}");
        let reason = loop {
            if let NodeEvent::Down { node, reason } = soon(events.recv()).await.unwrap() {
                assert_eq!(node, "cart@127.0.0.1");
                break reason.to_string();
            }
        };
        let grown = peak().saturating_sub(before);
        println!("{does}: {reason}; {} KiB more at most", grown / 1024);
        assert!(reason.contains(limit), "{does}: {reason}");
        assert!(grown < GROWTH, "{does}: {grown} bytes more");
        let answer = friend.gen_call(("echo", "search@127.0.0.1"), Term::Int(7), LONG);
        assert_eq!(answer.await.unwrap(), Term::Int(7));
        assert!(
            node.nodes().contains(&"friend@127.0.0.1".to_owned()),
            "another connection has ended"
        );
    }
    // The node as such has not had enough of that BEAM.
    let call = "gen_server:call({echo, N}, again).";
    assert_eq!(beam.eval(call).await, "again");
}

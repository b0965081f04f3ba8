//! The commands that act as a node, against real BEAMs: through the mesh, and by plain TCP and EPMD.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use meshx_tests::{Agent, Beam, COOKIE, Mesh, Process, program, wait_until};
use rustix::io::ioctl_fionread;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(30);

/// Exit codes of docs/cli.md.
const REMOTE: i32 = 1;
const USAGE: i32 = 64;
const UNAVAILABLE: i32 = 69;
const UNREADABLE: i32 = 74;
const DENIED: i32 = 77;

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Runs `meshx` with the cookie and expects code, a part of stdout and a part of stderr.
#[track_caller]
fn expect(run: &dyn Fn(&[&str]) -> Output, arguments: &[&str], code: i32, out: &str, err: &str) -> String {
    let seen = said(&run(&[arguments, &["--cookie", COOKIE]].concat()));
    assert!(
        seen.0 == code && seen.1.contains(out) && seen.2.contains(err),
        "{arguments:?}: {seen:?}"
    );
    seen.1
}

/// What holds on both roads; `console` is a BEAM that answers expressions.
fn commands(run: &dyn Fn(&[&str]) -> Output, node: &str, console: &mut dyn FnMut(&str) -> String) {
    let ok = |arguments: &[&str], out: &str| expect(run, arguments, 0, out, "");
    ok(&["ping", node], &format!("pong from {node}"));
    assert_eq!(ok(&["call", node, "lists", "sum", "[[1, 2, 39]]"], ""), "42");
    // As Erlang reads and prints it.
    let typed = r#"{ok,<<"text">>,#{a => [1.5]},nil,"hi",'A'}"#;
    assert_eq!(
        ok(&["call", node, "erlang", "hd", &format!("[[{typed}]]")], ""),
        typed
    );
    // And as JSON that can be given back.
    let args =
        r#"[{"$tuple": [{"$atom": "ok"}, "text", {"$atoms": {"a": [1.5]}}, null, {"$charlist": "hi"}]}]"#;
    assert_eq!(
        ok(
            &["call", node, "erlang", "hd", "--from-json", &format!("[{args}]")],
            "",
        ),
        r#"{ok,<<"text">>,#{a => [1.5]},nil,"hi"}"#
    );
    let json = ok(
        &[
            "call",
            node,
            "erlang",
            "hd",
            "--from-json",
            &format!("[{args}]"),
            "--json",
        ],
        "",
    );
    assert_eq!(
        json,
        r#"{"$tuple":[{"$atom":"ok"},"text",{"$atoms":{"a":[1.5]}},null,[104,105]]}"#
    );
    let again = ok(
        &[
            "call",
            node,
            "erlang",
            "hd",
            "--from-json",
            &format!("[[{json}]]"),
            "--json",
        ],
        "",
    );
    assert_eq!(again, json);
    let pid = ok(&["call", node, "erlang", "whereis", "[kernel_sup]", "--json"], "");
    let alive = ok(
        &[
            "call",
            node,
            "erlang",
            "is_process_alive",
            "--from-json",
            &format!("[{pid}]"),
        ],
        "",
    );
    assert_eq!(alive, "true");

    // The remote function fails, is not there, takes too long.
    expect(
        run,
        &["call", node, "erlang", "error", "[oh]"],
        REMOTE,
        "",
        "raised oh",
    );
    expect(
        run,
        &["call", node, "erlang", "throw", "[1]"],
        REMOTE,
        "",
        "threw 1",
    );
    expect(run, &["call", node, "none", "none"], REMOTE, "", "undef");
    let slow = ["call", node, "timer", "sleep", "[60000]", "--timeout", "1"];
    expect(run, &slow, UNAVAILABLE, "", "1s");
    expect(run, &["call", node, "lists", "sum", "1"], USAGE, "", "list");
    expect(
        run,
        &["send", node, "x", "--from-json", r#"{"$x": 1}"#],
        USAGE,
        "",
        "no such form",
    );
    expect(run, &["ping", "nonsense"], USAGE, "", "nonsense");

    console("register(inbox, self()).");
    ok(&["send", node, "inbox", "{hello, 1}"], "");
    assert_eq!(console("receive {hello, N} -> N end."), "1");
    ok(&["send", "--cast", node, "inbox", "7"], "");
    assert_eq!(console("receive {'$gen_cast', C} -> C end."), "7");
}

/// `meshx node`, driven as a script would.
fn script(mut process: Process, node: &str, own: &str, console: &mut dyn FnMut(&str) -> String) {
    let mut line = |what: &str, parts: &[&str]| -> String {
        process
            .wait_for(PATIENCE, |line| {
                parts
                    .iter()
                    .all(|part| line.contains(part))
                    .then(|| line.to_owned())
            })
            .unwrap_or_else(|error| panic!("{what}: {error}"))
    };
    line("ready", &[r#""event":"ready""#, own]);
    // A message to it, and what comes of a pid that came in it.
    console(&format!("{{main, '{own}'}} ! {{hello, self()}}."));
    let message = line(
        "a message",
        &[r#""event":"message""#, r#""process":"main""#, "hello"],
    );
    let pid = message
        .split(r#"{"$external":""#)
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    // No text at all, which is no request either.
    process.write(b"\xff\n").unwrap();
    let mut write = |text: String| process.write_line(&text).unwrap();
    write(format!(
        r#"{{"op":"send","to":{{"$external":"{pid}"}},"term":{{"$tuple":[{{"$atom":"back"}},1]}}}}"#
    ));
    assert_eq!(console("receive {back, B} -> B end."), "1");
    // Calls in both directions.
    write(format!(
        r#"{{"id":1,"op":"call","node":"{node}","module":"lists","function":"sum","args":[[1,2]]}}"#
    ));
    write(format!(
        r#"{{"id":2,"op":"gen_call","node":"{node}","name":"nobody","request":1}}"#
    ));
    write(format!(r#"{{"id":3,"op":"ping","node":"{node}"}}"#));
    write(r#"{"id":4,"op":"reply","call":99,"term":1}"#.into());
    write("garbage".into());
    let mut wanted = vec![
        vec![r#"{"id":1,"ok":3}"#],
        vec![r#""id":2"#, "no such process"],
        vec![r#"{"id":3,"ok":"pong"}"#],
        vec![r#""id":4"#, "no call 99"],
        vec![r#"{"error":"no request"#],
    ];
    while !wanted.is_empty() {
        let seen = process
            .wait_for(PATIENCE, |line| Some(line.to_owned()))
            .unwrap_or_else(|error| panic!("{wanted:?}: {error}"));
        wanted.retain(|parts| !parts.iter().all(|part| seen.contains(part)));
    }
    console(&format!(
        "spawn(fun() -> X = gen_server:call({{main, '{own}'}}, {{add, 1, 2}}), inbox ! {{sum, X}} end)."
    ));
    let call = process
        .wait_for(PATIENCE, |line| {
            line.contains(r#""event":"call""#).then(|| line.to_owned())
        })
        .unwrap();
    assert!(call.contains(r#"{"$tuple":[{"$atom":"add"},1,2]}"#), "{call}");
    let number: String = call
        .split(r#""call":"#)
        .nth(1)
        .unwrap()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    process
        .write_line(&format!(r#"{{"op":"reply","call":{number},"term":3}}"#))
        .unwrap();
    assert_eq!(console("receive {sum, S} -> S end."), "3");
}

fn evaluate(beam: &mut Beam, erlang: &str) -> String {
    // The console evaluates Elixir, and keeps no bindings of ours: one Erlang expression, in the console's process.
    let text = format!(
        "(fn text -> {{:ok, tokens, _}} = :erl_scan.string(String.to_charlist(text)); \
         {{:ok, exprs}} = :erl_parse.parse_exprs(tokens); {{:value, value, _}} = :erl_eval.exprs(exprs, []); value end).({erlang:?})"
    );
    beam.eval(&text).unwrap()
}

#[test]
fn commands_through_the_mesh() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let run = |arguments: &[&str]| h1.meshx(arguments).unwrap();
    commands(&run, "cart@h2", &mut |erlang| evaluate(&mut cart, erlang));

    expect(&run, &["ping", "nobody@h2"], UNAVAILABLE, "", "no_such_node");
    h1.meshx_ok(&["deny", "tool", "cart"]).unwrap();
    let tool = ["--name", "tool@h1"];
    expect(
        &run,
        &[&["ping", "cart@h2"], &tool[..]].concat(),
        DENIED,
        "",
        "intention_denied",
    );
    expect(
        &run,
        &["ping", "cart@h2", "--dir", "/nonexistent"],
        UNAVAILABLE,
        "",
        "/nonexistent",
    );
    let names = h1.meshx_ok(&["names", "--json"]).unwrap();
    assert!(
        names.contains(r#""node":"cart@h2""#) && names.starts_with('['),
        "{names}"
    );

    let node = node_process(&h1, "script@h1");
    script(node, "cart@h2", "script@h1", &mut |erlang| {
        evaluate(&mut cart, erlang)
    });
}

fn node_process(agent: &Agent, name: &str) -> Process {
    let arguments = ["node", name, "--cookie", COOKIE];
    Process::start(name, program("meshx").unwrap(), arguments, |command| {
        command.env("MESHX_DIR", agent.dir());
    })
    .unwrap()
}

/// A real EPMD on a port of its own.
struct Epmd {
    port: u16,
    _process: Process,
}

impl Epmd {
    fn start() -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let arguments = ["-address", "127.0.0.1", "-port", &port.to_string()].map(str::to_owned);
        let process = Process::start("epmd", "epmd", arguments, |_| ()).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(began.elapsed() < PATIENCE, "epmd does not listen");
            std::thread::yield_now();
        }
        Self {
            port,
            _process: process,
        }
    }
}

/// A BEAM of plain Erlang, whose console evaluates one expression a line.
fn plain_beam(epmd: &Epmd, name: &str) -> Process {
    const CONSOLE: &str = r#"
        Loop = fun Loop() ->
            {ok, Tokens, _} = erl_scan:string(io:get_line("")),
            {ok, Exprs} = erl_parse:parse_exprs(Tokens),
            {value, Value, _} = erl_eval:exprs(Exprs, []),
            io:format("= ~0tp~n", [Value]),
            Loop()
        end,
        io:format("up~n"), Loop()."#;
    let arguments = [
        "-noshell",
        "-start_epmd",
        "false",
        "-setcookie",
        COOKIE,
        "-name",
        name,
        "-eval",
        CONSOLE,
    ];
    let mut process = Process::start(name, "erl", arguments, |command| {
        command
            .env("ERL_EPMD_PORT", epmd.port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1");
    })
    .unwrap();
    process
        .wait_for(PATIENCE, |line| (line == "up").then_some(()))
        .unwrap();
    process
}

#[test]
fn commands_by_plain_epmd() {
    let epmd = Epmd::start();
    let mut beam = plain_beam(&epmd, "cart@127.0.0.1");
    let mut console = |erlang: &str| -> String {
        beam.write_line(erlang).unwrap();
        beam.wait_for(PATIENCE, |line| line.strip_prefix("= ").map(str::to_owned))
            .unwrap()
    };
    // The port is found as Erlang finds it, or said.
    let said_by = |more: &[&str], arguments: &[&str]| {
        let mut command = Command::new(program("meshx").unwrap());
        command.args(arguments).args(more);
        command
            .env("ERL_EPMD_PORT", epmd.port.to_string())
            .output()
            .unwrap()
    };
    let run = |arguments: &[&str]| said_by(&["--epmd"], arguments);
    commands(&run, "cart@127.0.0.1", &mut console);
    let port = format!("--epmd=127.0.0.1:{}", epmd.port);
    let named = said(&said_by(&[&port], &["names"]));
    assert!(named.0 == 0 && named.1.contains("cart"), "{named:?}");
    let json = said(&said_by(&[], &["names", "--json", &port])).1;
    assert!(json.contains(r#""name":"cart""#), "{json}");

    expect(
        &run,
        &["ping", "nobody@127.0.0.1"],
        UNAVAILABLE,
        "",
        "no node nobody@127.0.0.1",
    );
    let wrong = said(&run(&["ping", "cart@127.0.0.1", "--cookie", "wrong"]));
    assert_ne!(wrong.0, 0, "{wrong:?}");
    for (epmd, code, words) in [
        ("--epmd=127.0.0.1:1", UNAVAILABLE, "127.0.0.1:1"),
        ("--epmd=192.0.2.1:4369", USAGE, "loopback"),
        ("--epmd=localhost", USAGE, "127.0.0.1:4369"),
    ] {
        for command in [&["names"][..], &["ping", "a@b", "--cookie", "x"]] {
            let seen = said(&said_by(&[epmd], command));
            assert!(
                seen.0 == code && seen.2.contains(words),
                "{command:?} {epmd}: {seen:?}"
            );
        }
    }

    let arguments = ["node", "script@127.0.0.1", "--cookie", COOKIE, &port];
    let node = Process::start("script", program("meshx").unwrap(), arguments, |_| ()).unwrap();
    script(node, "cart@127.0.0.1", "script@127.0.0.1", &mut console);
}

/// What comes behind such a line cannot be told from the rest of it.
#[test]
fn a_line_that_is_too_long_ends_a_node_with_an_error() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    for stay in [&[][..], &["--stay"]] {
        let mut node = piped_node(&agent, stay);
        let mut input = node.stdin.take().unwrap();
        // It may have read enough and be gone.
        let _ = input.write_all(&vec![b'x'; (16 << 20) + 1]);
        // Standard input stays open until it has ended.
        let seen = said(&node.wait_with_output().unwrap());
        drop(input);
        assert_eq!(seen.0, UNREADABLE, "{seen:?}");
        assert!(seen.1.contains("a line of more than 16777216 bytes"), "{seen:?}");
        assert!(seen.2.contains("a line of more than 16777216 bytes"), "{seen:?}");
    }
}

/// The least that a pipe holds: a page, three lines of these tests.
const PIPE: usize = 4096;

fn piped_node(agent: &Agent, more: &[&str]) -> Child {
    Command::new(program("meshx").unwrap())
        .args(["node", "script@h1", "--cookie", COOKIE])
        .args(more)
        .env("MESHX_DIR", agent.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A node, and its open standard input, that has as many lines to write as the count says, each more than a kilobyte,
/// and whose output fills a pipe that nobody reads.
fn node_unread(agent: &Agent, lines: usize) -> (Child, ChildStdin) {
    let mut node = piped_node(agent, &[]);
    fcntl_setpipe_size(node.stdout.as_ref().unwrap(), PIPE).unwrap();
    let mut input = node.stdin.take().unwrap();
    let id = "x".repeat(1000);
    for number in 0..lines {
        writeln!(
            input,
            r#"{{"id": "{number} {id}", "op": "ping", "node": "none@h1"}}"#
        )
        .unwrap();
    }
    // All is read, and one more line has no room: what is not answered yet is before the node ends.
    let output = node.stdout.as_ref().unwrap();
    let full = || ioctl_fionread(&input).unwrap() == 0 && ioctl_fionread(output).unwrap() > 2900;
    wait_until(PATIENCE, full).expect("a full pipe");
    (node, input)
}

/// What it has to say is lost with who was to read it, but not its end.
#[test]
fn a_node_whose_output_nobody_reads_ends_with_an_error() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // Few lines wait to be written, or so many that answers wait for room as well.
    for lines in [100, 400] {
        for signal in [Some(Signal::TERM), Some(Signal::INT), None] {
            let (mut node, input) = node_unread(&agent, lines);
            let began = Instant::now();
            match signal {
                Some(signal) => kill_process(Pid::from_child(&node), signal).unwrap(),
                None => drop(input),
            }
            let mut ended = None;
            let _ = wait_until(PATIENCE, || {
                ended = node.try_wait().unwrap();
                ended.is_some()
            });
            let took = began.elapsed();
            let _ = node.kill();
            let output = node.wait_with_output().unwrap();
            assert!(ended.is_some(), "{lines} lines, {signal:?}: it has not ended");
            let seen = said(&output);
            assert_eq!(seen.0, UNREADABLE, "{lines} lines, {signal:?}: {}", seen.2);
            assert!(seen.2.contains("standard output takes nothing"), "{}", seen.2);
            assert!(
                took < Duration::from_secs(8),
                "{lines} lines, {signal:?}: {took:?}"
            );
        }
    }
}

#[test]
fn what_is_read_of_a_node_that_ends_still_comes() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    for signal in [Some(Signal::TERM), None] {
        let lines = 100;
        let (node, input) = node_unread(&agent, lines);
        match signal {
            Some(signal) => kill_process(Pid::from_child(&node), signal).unwrap(),
            None => drop(input),
        }
        let seen = said(&node.wait_with_output().unwrap());
        assert_eq!(seen.0, 0, "{}", seen.2);
        let answers = seen.1.matches("\"error\"").count();
        // A signal may come before all lines were taken, but then what was answered is more than a pipe holds.
        assert!(answers == lines || (signal.is_some() && answers > 3), "{answers}");
    }
}

/// By rep movsb an agent would spend most of its time on copies where the processor is one of some: see cli::copying.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[test]
fn an_agent_copies_without_rep_movsb() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // Of the process that was started, so whoever did it finds it under its pid.
    let environment = std::fs::read(format!("/proc/{}/environ", agent.process.pid())).unwrap();
    let wanted = b"GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=0x10000000";
    assert!(
        environment
            .split(|byte| *byte == 0)
            .any(|variable| variable == wanted)
    );
}

/// glibc drops what it is told by the environment of a program that has another owner's rights.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[test]
fn an_agent_with_rights_of_its_own_starts_without_that() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("meshx");
    // By another process: what this one has open for writing, a child that it starts just then has as well, and the
    // program cannot be executed.
    let copied = Command::new("cp")
        .arg(program("meshx").unwrap())
        .arg(&copy)
        .status();
    assert!(copied.unwrap().success());
    std::os::unix::fs::chown(&copy, Some(65534), None).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    begins(&mut Command::new(copy));
}

/// Programs that were linked elsewhere are started so.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[test]
fn an_agent_starts_by_the_loader() {
    begins(Command::new("/lib64/ld-linux-x86-64.so.2").arg(program("meshx").unwrap()));
}

/// Has an agent begin and end at once: there is no such configuration.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
fn begins(program: &mut Command) {
    let missing = "/nowhere/meshx.toml";
    let mut agent = program.args(["agent", "--config", missing]).spawn().unwrap();
    // It ends if it does not begin itself anew without end.
    let ended = wait_until(PATIENCE, || agent.try_wait().unwrap().is_some());
    let _ = agent.kill();
    assert_eq!(agent.wait().unwrap().code(), Some(USAGE), "{ended:?}");
}

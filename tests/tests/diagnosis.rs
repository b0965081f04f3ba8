//! `meshx doctor`, `meshx why` and their like on real agents and nodes: healthy, and broken in known ways.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::time::Duration;

use meshx_tests::{Agent, Beam, COOKIE, Mesh, Process, program};

const PATIENCE: Duration = Duration::from_secs(30);

/// Exit codes of docs/cli.md.
const WARNINGS: i32 = 1;
const UNAVAILABLE: i32 = 69;
const REFUSED: i32 = 77;

/// Exit code and what a person sees, which is shown in the test's output, too.
fn see(agent: &Agent, arguments: &[&str]) -> (i32, String) {
    let output = agent.meshx(arguments).unwrap();
    shown(arguments, &output)
}

fn shown(arguments: &[&str], output: &Output) -> (i32, String) {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code().unwrap();
    println!("$ meshx {}\n{text}{error}(code {code})\n", arguments.join(" "));
    assert!(error.is_empty() || text.is_empty(), "{text}{error}");
    (code, format!("{text}{error}"))
}

/// The line about this, which begins with its level.
#[track_caller]
fn line<'a>(text: &'a str, level: &str, what: &str) -> &'a str {
    let about = |line: &&str| line.split_whitespace().take(2).eq([level, what]);
    text.lines()
        .find(about)
        .unwrap_or_else(|| panic!("no {level} {what} in\n{text}"))
}

fn no_epmd() -> [&'static str; 2] {
    // A port that nobody can listen on.
    ["--epmd-port", "0"]
}

fn doctor(agent: &Agent, more: &[&str]) -> (i32, String) {
    see(agent, &[&["doctor"], &no_epmd() as &[&str], more].concat())
}

/// A hidden node that lives as long as its process.
fn node(agent: &Agent, name: &str) -> Process {
    let arguments = ["node", name, "--stay", "--cookie", COOKIE];
    let mut process = Process::start(name, program("meshx").unwrap(), arguments, |command| {
        command.env("MESHX_DIR", agent.dir());
    })
    .unwrap();
    process
        .wait_for(PATIENCE, |line| line.contains("\"ready\"").then_some(()))
        .unwrap();
    process
}

/// The whole answer of an agent that was started with `--http`.
fn get(agent: &Agent, path: &str) -> String {
    let log = agent.process.log();
    let http = log
        .split_whitespace()
        .find_map(|word| word.strip_prefix("http="))
        .unwrap();
    let mut stream = TcpStream::connect(http).unwrap();
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_healthy_set_up() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let _shop = node(&h1, "shop@h1");
    let _cart = node(&h2, "cart@h2");

    let (code, text) = doctor(&h1, &["--strict"]);
    assert_eq!(code, 0, "{text}");
    for what in [
        "directory",
        "agent",
        "sockets",
        "rules",
        "inbound",
        "users",
        "certificate",
        "clock",
        "service",
        "epmd",
    ] {
        line(&text, "ok", what);
    }
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.ends_with("shop@h1 -> cart@h2: allowed\n"), "{text}");
    for what in [
        "source",
        "target",
        "certificate",
        "agent",
        "tls",
        "rule",
        "cookie",
    ] {
        line(&text, "ok", what);
    }
    assert!(!h2.process.log().contains("link refused"), "{}", h2.process.log());

    let (_, text) = see(&h1, &["services"]);
    assert!(
        text.starts_with("SERVICE ") && text.contains("shop@h1") && text.contains("remote"),
        "{text}"
    );
    let (_, text) = see(&h1, &["certs"]);
    assert!(text.contains("/svc/shop") && text.contains("ROOT"), "{text}");
    let (_, text) = see(&h1, &["intentions"]);
    assert!(text.contains("(default)"), "{text}");

    // All of it as JSON.
    for (arguments, key) in [
        (vec!["services", "--json"], "\"status\": \"passing\""),
        (vec!["intentions", "--json"], "\"default\": \"allow\""),
        (vec!["certs", "--json"], "\"not_after\": 1"),
        (vec!["why", "shop@h1", "cart@h2", "--json"], "\"allowed\": true"),
        (vec!["check", "shop@h1", "cart@h2", "--json"], "\"cause\": \"ok\""),
        (vec!["doctor", "--epmd-port", "0", "--json"], "\"level\": \"ok\""),
        (vec!["names", "--json"], "\"node\":\"shop@h1\""),
        (vec!["links", "--json"], "[]"),
        (vec!["rules", "--json"], "\"default\": \"allow\""),
    ] {
        let (code, text) = see(&h1, &arguments);
        assert!(code == 0 && text.contains(key), "{arguments:?}: {text}");
        assert!(
            text.starts_with(['{', '[']) && text.ends_with(['}', ']', '\n']),
            "{text}"
        );
    }
}

#[test]
fn why_says_what_the_link_and_the_log_say() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let cart = node(&h2, "cart@h2");
    let connect = "{:error, {cause, text}} = MeshxNode.connect(:cart@h2); IO.puts(\"text: \" <> text); cause";
    shop.expect(
        "{:ok, why} = MeshxNode.why(:cart@h2); {why.allowed, why.cause}",
        "{true, :ok}",
    )
    .unwrap();

    // Denied: the command, MeshxNode, the caller's error and the log tell the same and what to do.
    h1.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, REFUSED, "{text}");
    let no = line(&text, "no", "rule");
    let said = "cart -> shop is denied by rule cart -> shop deny; to allow it: meshx allow cart shop";
    assert!(no.ends_with(said), "{no}");
    assert!(
        text.ends_with("shop@h1 -> cart@h2: refused with intention_denied\n"),
        "{text}"
    );
    shop.expect(connect, ":intention_denied").unwrap();
    shop.process.wait_log(&format!("text: {said}"), PATIENCE).unwrap();
    h1.process.wait_log(said, PATIENCE).unwrap();
    let printed = "{:ok, why} = MeshxNode.why(:cart@h2); IO.puts([\"printed\\n \", String.replace(to_string(why), \"\\n\", \"\\n \")]); why.cause";
    shop.expect(printed, ":intention_denied").unwrap();
    shop.process.wait_log(no.trim(), PATIENCE).unwrap();
    // What the text says is what helps.
    h1.meshx_ok(&["allow", "cart", "shop"]).unwrap();
    assert_eq!(see(&h1, &["why", "shop@h1", "cart@h2"]).0, 0);

    // The other direction is the other agent's to refuse.
    h1.meshx_ok(&["deny", "shop", "cart"]).unwrap();
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert!(
        code == REFUSED && text.contains("meshx allow shop cart"),
        "{text}"
    );
    h1.meshx_ok(&["allow", "shop", "cart"]).unwrap();

    let (code, text) = see(&h1, &["why", "shop@h1", "nobody@h2"]);
    assert_eq!(code, REFUSED, "{text}");
    line(&text, "no", "target");
    assert!(text.contains("meshx run nobody@h2"), "{text}");

    // The agent hangs: it is in the mesh still, and answers nobody.
    let pid = rustix::process::Pid::from_raw(i32::try_from(h2.process.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, REFUSED, "{text}");
    line(&text, "ok", "target");
    line(&text, "no", "tls");
    assert!(text.ends_with("refused with timeout\n"), "{text}");

    // Killed, it is gone from the embedded mesh, and its nodes with it.
    h2.process.kill();
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, REFUSED, "{text}");
    line(&text, "no", "target");
    assert!(text.contains("no_such_node"), "{text}");
    drop(cart);
}

#[test]
fn no_agent_at_all_and_one_that_was_killed() {
    let mesh = Mesh::new().unwrap();
    let run = |dir: &std::path::Path, arguments: &[&str]| {
        let mut command = Command::new(program("meshx").unwrap());
        command
            .args(arguments)
            .env("MESHX_DIR", dir)
            .env_remove("ERL_EPMD_PORT");
        shown(arguments, &command.output().unwrap())
    };
    let none = mesh.path().join("none");
    let start = format!("meshx agent --mesh embedded --dir {}", none.display());
    let (code, text) = run(&none, &["doctor"]);
    assert_eq!(code, UNAVAILABLE);
    assert!(
        line(&text, "error", "agent").len() <= 120 && text.contains(&start),
        "{text}"
    );
    for arguments in [
        vec!["why", "a@h1", "b@h1"],
        vec!["services"],
        vec!["intentions"],
        vec!["certs"],
    ] {
        let (code, text) = run(&none, &arguments);
        assert!(
            code == UNAVAILABLE && text.contains(&start),
            "{arguments:?}: {text}"
        );
    }

    let mut agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    agent.process.kill();
    let (code, text) = run(agent.dir(), &["doctor"]);
    assert_eq!(code, UNAVAILABLE);
    line(&text, "ok", "directory");
    line(&text, "error", "agent");
    assert!(text.contains("start one: meshx agent"), "{text}");

    // A directory that others may write to could be anybody's.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(agent.dir(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let (code, text) = run(agent.dir(), &["doctor"]);
    assert_eq!(code, UNAVAILABLE);
    assert!(
        line(&text, "error", "directory").contains("0777") && text.contains("chmod"),
        "{text}"
    );
}

#[test]
fn a_service_whose_process_is_gone_and_rules_that_cannot_be_read() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let _shop = node(&h1, "shop@h1");
    // Who registered it lives, and the program behind the address is gone.
    // This has its port still, so that nobody else gets it, and does not listen.
    let gone = tokio::net::TcpSocket::new_v4().unwrap();
    gone.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = gone.local_addr().unwrap();
    let mut registrar = Beam::start(&h1, "web@h1").unwrap();
    let register = format!(
        "{{:ok, _}} = :meshx_agent.call(:register_service, \
         %{{name: \"echo\", id: \"echo-1\", address: {{:tcp, \"127.0.0.1\", {}}}}}); :ok",
        address.port()
    );
    registrar.expect(&register, ":ok").unwrap();

    let (code, text) = doctor(&h1, &[]);
    assert_eq!(code, UNAVAILABLE);
    let error = line(&text, "error", "service");
    assert!(
        error.contains("echo-1") && text.contains("start it anew"),
        "{text}"
    );
    line(&text, "ok", "service");
    let (code, text) = see(&h1, &["why", "web", "echo"]);
    assert_eq!(code, REFUSED, "{text}");
    line(&text, "no", "endpoint");

    std::fs::write(mesh.mesh_dir().join("rules.json"), "{").unwrap();
    let (code, text) = doctor(&h1, &[]);
    assert_eq!(code, UNAVAILABLE);
    assert!(line(&text, "error", "rules").contains("rules.json"), "{text}");
    let (code, text) = see(&h1, &["why", "shop@h1", "web@h1"]);
    assert_eq!(code, REFUSED, "{text}");
    assert!(
        line(&text, "no", "rule").contains("the mesh did not answer"),
        "{text}"
    );
}

#[test]
fn a_stray_epmd_is_named_with_its_addresses() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // This process stands for it.
    let me = format!("pid {}", std::process::id());
    for (bind, level, code) in [
        ("0.0.0.0:0", "warning", WARNINGS),
        ("[::]:0", "warning", WARNINGS),
        ("127.0.0.1:0", "ok", 0),
    ] {
        let Ok(epmd) = TcpListener::bind(bind) else {
            assert!(bind.starts_with('['), "only IPv6 may be missing");
            continue;
        };
        let address = epmd.local_addr().unwrap();
        let port = address.port().to_string();
        let (strict, text) = see(&h1, &["doctor", "--epmd-port", &port, "--strict"]);
        assert_eq!(strict, code, "{text}");
        let about = line(&text, level, "epmd");
        assert!(
            about.contains(&me) && about.contains(&address.to_string()),
            "{about}"
        );
        assert_eq!(text.contains("epmd -kill"), level == "warning", "{text}");
        let (lenient, _) = see(&h1, &["doctor", "--epmd-port", &port]);
        assert_eq!(lenient, 0, "a warning is no error");
    }
}

#[test]
fn agents_of_two_authorities_do_not_believe_each_other() {
    let mesh = Mesh::new().unwrap();
    let http = ["--http", "127.0.0.1:0"];
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &http).unwrap();
    // A mesh of the same name with an authority of its own, as a restored backup would be.
    let other = Mesh::new().unwrap();
    drop(other.agent("x", "127.0.0.4", &["h9"]).unwrap());
    std::fs::copy(
        mesh.mesh_dir().join("mesh.json"),
        other.mesh_dir().join("mesh.json"),
    )
    .unwrap();
    let h2 = other.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let _cart = node(&h2, "cart@h2");
    // Each knows the other's nodes: what an agent registers, and the lock that shows that it lives.
    let agents = [&mesh, &other].map(|mesh| mesh.mesh_dir().join("agents"));
    for (from, to) in [(0, 1), (1, 0)] {
        for file in std::fs::read_dir(&agents[from]).unwrap() {
            let file = file.unwrap();
            let _ = std::fs::hard_link(file.path(), agents[to].join(file.file_name()));
        }
    }
    let (code, text) = see(&h1, &["why", "shop@h1", "cart@h2"]);
    assert_eq!(code, REFUSED, "{text}");
    line(&text, "no", "tls");
    assert!(
        text.ends_with("refused with unknown_authority\n") && text.contains("meshx certs"),
        "{text}"
    );
    let connect = "{:error, {cause, _}} = MeshxNode.connect(:cart@h2); cause";
    shop.expect(connect, ":unknown_authority").unwrap();
    h1.process.wait_log("unknown_authority", PATIENCE).unwrap();
    let counted = "meshx_refusals_total{listener=\"dist\",cause=\"unknown_authority\"} 1";
    let page = get(&h1, "/metrics");
    assert!(
        page.lines().any(|line| line == counted),
        "{counted} not in\n{page}"
    );
}

#[test]
fn metrics_count_links_and_refusals_of_a_real_agent() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh
        .agent_with("a", "127.0.0.2", &["h1"], &["--http", "127.0.0.1:0"])
        .unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let get = |path: &str| get(&h1, path);
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let _cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.eval("MeshxNode.connect(:nobody@h2)").unwrap();
    let page = get("/metrics");
    println!("{page}");
    let pair = "{source=\"shop\",destination=\"cart\",direction=\"outbound\",purpose=\"dist\"} 1";
    for wanted in [
        &format!("meshx_links{pair}"),
        &format!("meshx_links_opened_total{pair}"),
        "meshx_refusals_total{listener=\"dist\",cause=\"no_such_node\"} 1",
        "meshx_handshakes_total{side=\"dialled\",result=\"done\"} 1",
        "meshx_registrations{kind=\"node\"} 1",
    ] {
        assert!(page.lines().any(|line| line == wanted), "{wanted} not in\n{page}");
    }
    assert!(!page.contains('@'), "no node is named");
    assert!(get("/health").starts_with("HTTP/1.1 200") && get("/none").starts_with("HTTP/1.1 404"));

    // A question makes no refusal, at either end.
    see(&h1, &["why", "shop@h1", "cart@h2"]);
    doctor(&h1, &[]);
    let refusals = |page: &str| {
        page.lines()
            .filter(|line| line.starts_with("meshx_refusals_total") && !line.ends_with(" 0"))
            .count()
    };
    assert_eq!(refusals(&get("/metrics")), 1);
    assert!(!h2.process.log().contains("link refused"), "{}", h2.process.log());
}

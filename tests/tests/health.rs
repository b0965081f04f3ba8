//! A VM that hangs does not pass its check until it answers again; one that is only busy does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::consul::Consul;
use meshx_tests::{Agent, Beam, BeamBuilder, Mesh, program, wait_until};
use rustix::process::Signal;

/// What the nodes here are started with: so long after it stopped a VM is critical.
const HUNG: Duration = Duration::from_secs(2);
/// The catalogue and its watchers follow within 2 s.
const SOON: Duration = Duration::from_secs(6);

/// No tick ends a link while a test runs.
const FLAGS: &str = "-meshx_heartbeat 2000 -kernel net_ticktime 3600";

fn node(name: &str, agent: &Agent) -> Beam {
    let beam = BeamBuilder::new(name).erl(FLAGS).app("shop").start(agent);
    let mut beam = beam.unwrap();
    // It is this process that is stopped.
    beam.expect("System.pid()", &format!("{:?}", beam.process.pid().to_string()))
        .unwrap();
    beam
}

fn status(agent: &Agent, id: &str) -> String {
    let all = agent.meshx_ok(&["services", "--json"]).unwrap();
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    let mut all = all.as_array().unwrap().iter();
    let found = all.find(|service| service["id"] == id);
    found.map_or_else(
        || "absent".into(),
        |found| found["status"].as_str().unwrap().to_owned(),
    )
}

fn wait_status(agent: &Agent, id: &str, wanted: &str, limit: Duration) {
    let mut seen = String::new();
    let reached = wait_until(limit, || {
        seen = status(agent, id);
        seen.starts_with(wanted)
    });
    assert!(reached.is_ok(), "{id}: {seen}, wanted {wanted} within {limit:?}");
}

/// The id of the one RPC service, which another connection than a node's own could have.
fn rpc_service(agent: &Agent) -> String {
    let all = agent.meshx_ok(&["services", "--json"]).unwrap();
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    let mut all = all.as_array().unwrap().iter();
    let found = all
        .find(|service| service["name"] == "cart-rpc")
        .expect("cart-rpc");
    found["id"].as_str().unwrap().to_owned()
}

fn wanted(shop: &mut Beam, nodes: &str) {
    let reached = wait_until(SOON, || shop.eval("MeshxNode.Cluster.wanted()").unwrap() == nodes);
    assert!(reached.is_ok(), "wanted {nodes}");
}

/// Stops and continues `cart@h2`, seen from everywhere.
fn hangs_and_comes_back(h1: &Agent, h2: &Agent) {
    let cart = node("cart@h2", h2);
    let mut shop = node("shop@h1", h1);
    let mut beside = Beam::start(h2, "search@h2").unwrap();
    let mut other = Beam::start(h1, "other@h1").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect(
        "{:ok, pid} = MeshxNode.Cluster.start_link(services: [\"cart\"]); Process.unlink(pid)",
        "true",
    )
    .unwrap();
    wanted(&mut shop, "[:cart@h2]");
    let link = shop
        .eval("{:ok, peer} = MeshxNode.peer(:cart@h2); peer.link")
        .unwrap();
    let rpc = rpc_service(h1);

    cart.process.signal(Signal::STOP);
    let stopped = Instant::now();
    wait_status(h1, "cart@h2", "critical", 3 * HUNG + SOON);
    println!(
        "critical {:?} after SIGSTOP, {HUNG:?} and what the mesh takes are promised",
        stopped.elapsed()
    );
    wait_status(h1, &rpc, "critical", SOON);
    let why = status(h1, "cart@h2");
    assert!(why.contains("hangs"), "{why}");
    h1.wait_name("cart@h2", false, SOON).unwrap();
    wanted(&mut shop, "[]");
    // New links are refused: by the catalogue elsewhere, by the agent itself on its own host.
    let refused = other.eval("MeshxNode.connect(:cart@h2)").unwrap();
    assert!(refused.contains(":no_such_node"), "{refused}");
    let refused = beside.eval("MeshxNode.connect(:cart@h2)").unwrap();
    assert!(
        refused.contains(":unreachable") && refused.contains("hangs"),
        "{refused}"
    );
    let doctor = h2.meshx(&["doctor"]).unwrap();
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("cart@h2 does not pass: critical"), "{doctor}");

    cart.process.signal(Signal::CONT);
    let continued = Instant::now();
    wait_status(h1, "cart@h2", "passing", SOON);
    println!("passing {:?} after SIGCONT", continued.elapsed());
    wait_status(h1, &rpc, "passing", SOON);
    wanted(&mut shop, "[:cart@h2]");
    // The link that lived lives: the same one.
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    shop.expect("{:ok, peer} = MeshxNode.peer(:cart@h2); peer.link", &link)
        .unwrap();
    h1.wait_name("cart@h2", true, SOON).unwrap();
    other.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    beside.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
}

#[test]
fn a_vm_that_hangs_is_critical_in_the_embedded_mesh() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    hangs_and_comes_back(&h1, &h2);
}

#[test]
fn a_vm_that_hangs_is_critical_in_consul() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    hangs_and_comes_back(&h1, &h2);
}

/// The next process of the agent asks as well, and of what the earlier one has found it finds the same.
#[test]
fn a_vm_that_hangs_is_found_by_the_agents_next_process() {
    let mesh = Mesh::new().unwrap();
    let mut agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let cart = node("cart@h1", &agent);
    let _earlier = agent.take_over(&program("meshx").unwrap()).unwrap();
    cart.process.signal(Signal::STOP);
    wait_status(&agent, "cart@h1", "critical", 3 * HUNG + SOON);
    let _earlier = agent.take_over(&program("meshx").unwrap()).unwrap();
    wait_status(&agent, "cart@h1", "critical", 3 * HUNG + SOON);
    cart.process.signal(Signal::CONT);
    wait_status(&agent, "cart@h1", "passing", SOON);
}

/// On all schedulers there are so many processes that never rest that one of their priority waits longer than the VM may
/// be silent. What answers the agent does not wait with them.
#[test]
fn a_vm_that_is_busy_passes() {
    const MAY_BE_SILENT: u64 = 3000;
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let builder = BeamBuilder::new("busy@h1").erl(&format!("-meshx_heartbeat {MAY_BE_SILENT}"));
    let mut busy = builder.start(&agent).unwrap();
    let waited = busy
        .eval(concat!(
            "Process.flag(:priority, :high); ",
            // To compare two lists takes long and counts as nothing, so that a turn takes milliseconds.
            "[one, other] = for key <- [:one, :other] do ",
            "  :persistent_term.put(key, Enum.to_list(1..1_000)); :persistent_term.get(key) end; ",
            "code = 'spin(A, B) when A =:= B -> spin(A, B).'; ",
            "forms = for text <- ['-module(spin).', '-export([spin/2]).', code] do ",
            "  {:ok, tokens, _} = :erl_scan.string(text); {:ok, form} = :erl_parse.parse_form(tokens); form end; ",
            "{:ok, module, program} = :compile.forms(forms); ",
            "{:module, _} = :code.load_binary(module, 'spin', program); ",
            "me = self(); ",
            "turn = fn -> sent = System.monotonic_time(:millisecond); ",
            "  spawn(fn -> send(me, {:turn, System.monotonic_time(:millisecond) - sent}) end); ",
            "  receive do {:turn, waited} -> waited end end; ",
            // Twice as many until it is enough, however fast this machine is.
            "more = fn more, pids, count -> ",
            "  pids = for(_ <- 1..count, do: spawn(:spin, :spin, [one, other])) ++ pids; ",
            "  waited = turn.(); ",
            "  if waited > 6_000 or count > 100_000, do: {pids, waited}, else: more.(more, pids, length(pids)) end; ",
            "{pids, waited} = more.(more, [], 32 * System.schedulers_online()); ",
            "alive = Enum.all?(pids, &Process.alive?/1); ",
            "Enum.each(pids, &Process.exit(&1, :kill)); alive and waited",
        ))
        .unwrap();
    println!("a process of normal priority waited {waited} ms");
    assert!(
        waited.parse::<u64>().unwrap() > 2 * MAY_BE_SILENT,
        "{waited} ms: not busy"
    );
    let log = agent.process.log();
    assert!(!log.contains("does not pass any more"), "{log}");
    assert_eq!(status(&agent, "busy@h1"), "passing");
}

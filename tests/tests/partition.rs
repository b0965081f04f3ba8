//! The network between two hosts fails without a word, and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::network::ADDRESSES;
use meshx_tests::{Agent, Beam, BeamBuilder, Mesh, Network, wait_until};

/// In seconds, of the nodes that look for silence themselves.
const TICK: u64 = 4;
/// Promised: silence is noticed within the tick time and a quarter. Three times that is the deadline here.
const NOTICED: Duration = Duration::from_millis(TICK * 1250 * 3);
/// Promised: agents notice a host that is gone without a word within 30 s. Likewise.
const HOST_GONE: Duration = Duration::from_secs(90);
/// An attempt takes at most OTP's 7 s, and the next follows within 5 s. Likewise.
const TRIED: Duration = Duration::from_secs(21);
const HEALED: Duration = Duration::from_secs(36);

fn node(agent: &Agent, name: &str, tick: u64) -> Beam {
    let flags = format!("-kernel net_ticktime {tick}");
    let mut node = BeamBuilder::new(name).erl(&flags).start(agent).unwrap();
    node.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason])")
        .unwrap();
    node
}

/// Has it keep connected to the nodes of a service.
fn keep(node: &mut Beam, service: &str) {
    let start = format!(
        "{{:ok, pid}} = MeshxNode.Cluster.start_link(services: [\"{service}\"]); Process.unlink(pid)"
    );
    node.expect(&start, "true").unwrap();
}

/// Waits for the next node that comes, or goes: its name and OTP's reason.
fn next(node: &mut Beam, what: &str, within: Duration) -> String {
    node.eval(&format!(
        "receive do {{:{what}, node, info}} -> {{node, info[:nodedown_reason]}} after {} -> :none end",
        within.as_millis()
    ))
    .unwrap()
}

fn links(agent: &Agent) -> usize {
    let links = agent.meshx_ok(&["links", "--json"]).unwrap();
    links.matches("\"id\"").count()
}

#[test]
fn both_sides_find_out_and_find_each_other_again() {
    let network = Network::new().unwrap();
    let mesh = Mesh::new().unwrap();
    let agent = |at: usize, name: &str, host: &str| {
        mesh.agent_on(&network.on(at), name, ADDRESSES[at], &[host], &[])
            .unwrap()
    };
    let (h1, h2) = (agent(0, "a", "h1"), agent(1, "b", "h2"));
    let (mut shop, mut cart) = (node(&h1, "shop@h1", TICK), node(&h2, "cart@h2", TICK));
    // These two leave it to their agents.
    let (mut idle, mut other) = (node(&h1, "idle@h1", 3600), node(&h2, "other@h2", 3600));
    keep(&mut shop, "cart");
    keep(&mut cart, "shop");
    assert_eq!(next(&mut shop, "nodeup", HEALED), "{:cart@h2, nil}");
    assert_eq!(next(&mut cart, "nodeup", HEALED), "{:shop@h1, nil}");
    idle.expect("MeshxNode.connect(:other@h2)", ":ok").unwrap();

    // Shorter than anybody's patience: what was under way arrives.
    network.part().unwrap();
    idle.eval("late = Task.async(fn -> :erpc.call(:other@h2, :erlang, :node, [], 60_000) end); :ok")
        .unwrap();
    network.heal().unwrap();
    idle.expect("Task.await(late, 60_000)", ":other@h2").unwrap();
    assert_eq!(next(&mut idle, "nodedown", Duration::ZERO), ":none");

    let at = Instant::now();
    network.part().unwrap();
    assert_eq!(
        next(&mut shop, "nodedown", NOTICED),
        "{:cart@h2, :net_tick_timeout}"
    );
    assert_eq!(
        next(&mut cart, "nodedown", NOTICED),
        "{:shop@h1, :net_tick_timeout}"
    );
    println!("both nodes knew {:?} after the partition", at.elapsed());
    let tried = Instant::now();
    let answer = shop.eval("MeshxNode.connect(:cart@h2)").unwrap();
    println!("an attempt meanwhile: {answer}, after {:?}", tried.elapsed());
    assert!(
        answer.starts_with("{:error, {:unreachable, ") || answer.starts_with("{:error, {:timeout, "),
        "{answer}"
    );
    assert!(tried.elapsed() < TRIED, "{:?}", tried.elapsed());
    for (node, peer) in [(&mut idle, "other@h2"), (&mut other, "idle@h1")] {
        let down = next(node, "nodedown", HOST_GONE);
        println!("{peer} was gone {:?} after the partition: {down}", at.elapsed());
        assert!(
            down.starts_with(&format!("{{:{peer}, ")) && !down.contains("net_tick_timeout"),
            "{down}"
        );
    }
    // Nothing of those links stays.
    wait_until(HOST_GONE, || links(&h1) + links(&h2) == 0).unwrap();

    let at = Instant::now();
    network.heal().unwrap();
    assert_eq!(next(&mut shop, "nodeup", HEALED), "{:cart@h2, nil}");
    assert_eq!(next(&mut cart, "nodeup", HEALED), "{:shop@h1, nil}");
    println!("healed {:?} after the network", at.elapsed());
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    idle.expect("MeshxNode.connect(:other@h2)", ":ok").unwrap();
    wait_until(TRIED, || [links(&h1), links(&h2)] == [2, 2]).unwrap();
}

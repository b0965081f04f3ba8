//! The network between two hosts fails without a word, and one of them loses Consul with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::consul::Consul;
use meshx_tests::network::ADDRESSES;
use meshx_tests::{Agent, Beam, BeamBuilder, Network, wait_until};

/// In seconds, of all nodes here.
const TICK: u64 = 4;
/// Promised: silence is noticed within the tick time and a quarter. Three times that is the deadline here.
const NOTICED: Duration = Duration::from_millis(TICK * 1250 * 3);
/// A check that nobody refreshes is critical after 10 s, and watchers follow within 2 s. Likewise.
const EXPIRED: Duration = Duration::from_secs(36);
/// A check is refreshed every 5 s, what fails is tried again with a growing pause, up to 15 s for Consul and 5 s for a
/// link. Likewise.
const HEALED: Duration = Duration::from_secs(75);

const NAMES: [&str; 3] = ["shop@h1", "cart@h2", "stats@h3"];

/// One that keeps connected to the others.
fn node(agent: &Agent, name: &str) -> Beam {
    let flags = format!("-kernel net_ticktime {TICK}");
    let mut node = BeamBuilder::new(name).erl(&flags).start(agent).unwrap();
    node.eval(":net_kernel.monitor_nodes(true)").unwrap();
    node.expect(
        "{:ok, pid} = MeshxNode.Cluster.start_link(services: [\"shop\", \"cart\", \"stats\"]); Process.unlink(pid)",
        "true",
    )
    .unwrap();
    node
}

/// Waits until all of `others` have come, or gone, and no more than those.
fn wait(node: &mut Beam, what: &str, others: &[&str], within: Duration) {
    let all: Vec<String> = others.iter().map(|other| format!(":{other}")).collect();
    let (count, within) = (all.len(), within.as_millis());
    let one = format!("(receive do {{:{what}, node}} -> node after {within} -> :none end)");
    let seen = node
        .eval(&format!("Enum.sort(for _ <- 1..{count}, do: {one})"))
        .unwrap();
    assert_eq!(seen, format!("[{}]", all.join(", ")), "{}: {what}", node.name());
}

fn link(node: &mut Beam, other: &str) -> String {
    node.eval(&format!("{{:ok, peer}} = MeshxNode.peer(:{other}); peer.link"))
        .unwrap()
}

#[test]
fn a_host_without_consul_keeps_its_links_and_finds_the_others_again() {
    let network = Network::new().unwrap();
    let consul = Consul::start_on(&network.on(0), ADDRESSES[0].parse().unwrap()).unwrap();
    let agent = |at: usize, name: &str, host: &str| {
        consul
            .agent_on(&network.on(at), name, ADDRESSES[at], &[host])
            .unwrap()
    };
    // Two agents on the host that loses Consul.
    let (h1, h2, h3) = (agent(0, "a", "h1"), agent(1, "b", "h2"), agent(1, "c", "h3"));
    let mut nodes = [node(&h1, NAMES[0]), node(&h2, NAMES[1]), node(&h3, NAMES[2])];
    let mut other = Beam::start(&h2, "other@h2").unwrap();
    let whole = |nodes: &mut [Beam; 3], within: Duration| {
        let listed = |node: &mut Beam| {
            let seen = node.eval("Enum.sort([node() | Node.list()])").unwrap();
            seen == "[:cart@h2, :shop@h1, :stats@h3]"
        };
        wait_until(within, || nodes.iter_mut().all(listed)).expect("the cluster should be whole");
    };
    whole(&mut nodes, HEALED);
    let [shop, cart, stats] = &mut nodes;
    let lives = link(cart, "stats@h3");
    for node in [&mut *shop, &mut *cart, &mut *stats] {
        node.eval("flush = fn flush -> receive do _ -> flush.(flush) after 0 -> :ok end end; flush.(flush)")
            .unwrap();
    }

    let at = Instant::now();
    network.part().unwrap();
    wait(shop, "nodedown", &["cart@h2", "stats@h3"], NOTICED);
    wait(cart, "nodedown", &["shop@h1"], NOTICED);
    wait(stats, "nodedown", &["shop@h1"], NOTICED);
    println!("all nodes knew {:?} after the partition", at.elapsed());
    // The side that has Consul knows that the others are gone, and nobody is led to them.
    for gone in ["cart@h2", "stats@h3", "other@h2"] {
        h1.wait_name(gone, false, EXPIRED).unwrap();
    }
    println!(
        "they were out of the catalogue {:?} after the partition",
        at.elapsed()
    );
    let wanted = wait_until(EXPIRED, || {
        shop.eval("MeshxNode.Cluster.wanted()").unwrap() == "[]"
    });
    wanted.expect("nobody to be connected to");
    // Between agents that reach each other the link lives on, and what was allowed is, as before.
    assert_eq!(link(cart, "stats@h3"), lives);
    cart.expect(":erpc.call(:stats@h3, :erlang, :node, [])", ":stats@h3")
        .unwrap();
    cart.expect("Node.disconnect(:stats@h3)", "true").unwrap();
    wait(stats, "nodedown", &["cart@h2"], NOTICED);
    wait(stats, "nodeup", &["cart@h2"], HEALED);
    // A pair that nobody has asked about is not.
    let refused = other.eval("MeshxNode.connect(:stats@h3)").unwrap();
    assert!(refused.starts_with("{:error, {:not_ready, "), "{refused}");

    let at = Instant::now();
    network.heal().unwrap();
    for back in ["cart@h2", "stats@h3", "other@h2"] {
        h1.wait_name(back, true, HEALED).unwrap();
    }
    println!(
        "in the catalogue again {:?} after the network came back",
        at.elapsed()
    );
    whole(&mut nodes, HEALED);
    println!("whole {:?} after the network came back", at.elapsed());
    other.expect("MeshxNode.connect(:stats@h3)", ":ok").unwrap();
}

//! What a killed VM or agent leaves behind in a real Consul, and for how long.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::Beam;
use meshx_tests::consul::Consul;

/// Promised: within 1 s. Three times that is the deadline here.
const FREED: Duration = Duration::from_secs(3);
const BACK: Duration = Duration::from_secs(60);

#[test]
fn a_killed_vm_leaves_nothing_and_its_name_is_free() {
    let consul = Consul::start().unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    for _ in 0..3 {
        let mut cart = Beam::start(&h2, "cart@h2").unwrap();
        shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        cart.process.kill();
        let took = consul.wait_instances("cart", 0, FREED).unwrap();
        println!("cart@h2 was out of the catalogue {took:?} after SIGKILL");
        h1.wait_name("cart@h2", false, FREED).unwrap();
    }
    // Its check is gone with it.
    let checks = consul.get("/v1/agent/checks").unwrap();
    assert!(!checks.to_string().contains("cart"), "{checks}");
}

#[test]
fn a_killed_agent_comes_back_to_its_nodes_and_forgets_those_that_ended() {
    let consul = Consul::start().unwrap();
    let mut h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut gone = Beam::start(&h1, "gone@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let creation = shop.eval(":erlang.system_info(:creation)").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();

    h1.process.kill();
    gone.process.kill();
    // The other host's link ends at once; nobody waits for a check.
    cart.expect("wait = fn f, n -> if Node.list() == [] or n == 0, do: Node.list(), else: (Process.sleep(20); f.(f, n - 1)) end; wait.(wait, 150)", "[]").unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    consul.wait_passing("shop", 1, BACK).unwrap();
    assert_eq!(shop.eval(":erlang.system_info(:creation)").unwrap(), creation);
    let took = consul.wait_instances("gone", 0, BACK).unwrap();
    println!("gone@h1 left the catalogue {took:?} after shop@h1 was back");
    h1.wait_name("shop@h1", true, FREED).unwrap();
    cart.expect("MeshxNode.connect(:shop@h1)", ":ok").unwrap();
}

#[test]
fn nobody_is_sent_to_a_killed_agent_that_stays_away() {
    let consul = Consul::start().unwrap();
    let mut h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let _shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    consul.wait_passing("shop", 1, FREED).unwrap();
    h1.process.kill();
    // TTL 10 s; nobody is sent there any more.
    let took = consul.wait_passing("shop", 0, Duration::from_secs(30)).unwrap();
    println!("critical after {took:?}");
    let refused = cart.eval("MeshxNode.connect(:shop@h1)").unwrap();
    assert!(
        refused.contains(":no_such_node") || refused.contains(":unreachable"),
        "{refused}"
    );
}

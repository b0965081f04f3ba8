//! Who may not talk is refused at once, and the cause is seen by the caller and in the agent's log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx::agent::control::message::text;
use meshx_tests::control::Control;
use meshx_tests::{Beam, Mesh, ebin};

/// "At once" is well below the 7 s that OTP's own setup timer would take; three times what is promised.
const AT_ONCE: Duration = Duration::from_secs(3);
/// For a line in a log, on a busy machine.
const LOGGED: Duration = Duration::from_secs(30);
/// For a boot that fails.
const BOOT: Duration = Duration::from_secs(60);

fn refused(node: &mut Beam, target: &str, cause: &str) -> String {
    let at = Instant::now();
    let answer = node.eval(&format!("MeshxNode.connect(:\"{target}\")")).unwrap();
    let took = at.elapsed();
    println!("{target}: refused after {took:?}: {answer}");
    assert!(answer.starts_with(&format!("{{:error, {{:{cause}, ")), "{answer}");
    assert!(took < AT_ONCE, "{took:?}");
    // The plain way answers false, and the VM's own log has the cause.
    node.expect(&format!("Node.connect(:\"{target}\")"), "false")
        .unwrap();
    node.process.wait_log(cause, LOGGED).unwrap();
    answer
}

#[test]
fn a_node_that_does_not_exist() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut shop = Beam::start(&agent, "shop@h1").unwrap();
    let answer = refused(&mut shop, "cart@h2", "no_such_node");
    assert!(answer.contains("cart@h2"), "{answer}");
    agent.process.wait_log("no_such_node", LOGGED).unwrap();
}

#[test]
fn a_denied_pair_in_each_direction() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    // Distribution needs both directions: one denied direction is enough, whoever dials.
    for (source, destination) in [("shop", "cart"), ("cart", "shop")] {
        h1.meshx_ok(&["deny", source, destination]).unwrap();
        refused(&mut shop, "cart@h2", "intention_denied");
        refused(&mut cart, "shop@h1", "intention_denied");
        h1.meshx_ok(&["allow", source, destination]).unwrap();
    }
    h1.process.wait_log("intention_denied", LOGGED).unwrap();
    h2.process.wait_log("intention_denied", LOGGED).unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    cart.expect_soon("Node.list()", "[:shop@h1]").unwrap();
}

#[test]
fn a_denial_cuts_a_live_link_and_says_so() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    for node in [&mut shop, &mut cart] {
        node.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason])")
            .unwrap();
    }
    // A rule about others changes nothing.
    h1.meshx_ok(&["deny", "audit", "cart"]).unwrap();
    let at = Instant::now();
    h1.meshx_ok(&["deny", "cart", "shop"]).unwrap();
    // Promised within 2 s. The end whose agent sees the rule first is told the cause; the other may see it closed.
    let down = "receive do {:nodedown, _, info} -> info[:nodedown_reason] after 6_000 -> :still_up end";
    let reasons = [shop.eval(down).unwrap(), cart.eval(down).unwrap()];
    println!("cut after {:?}: {reasons:?}", at.elapsed());
    assert!(
        reasons.iter().any(|reason| reason.contains(":intention_denied")),
        "{reasons:?}"
    );
    assert!(reasons.iter().all(|reason| reason != ":still_up"), "{reasons:?}");
}

#[test]
fn a_host_that_the_agent_does_not_own_and_a_name_that_is_taken() {
    let mesh = Mesh::new().unwrap();
    let agent = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    for (name, cause) in [("shop@elsewhere", "host_not_owned"), ("shop@h1", "name_taken")] {
        let _first = Beam::start(&agent, "shop@h1").ok();
        let mut second = meshx_tests::BeamBuilder::new(name).spawn(&agent).unwrap();
        let status = second.process.wait_exit(BOOT).unwrap();
        assert!(!status.success(), "{status}");
        assert!(second.process.log().contains(cause), "{}", second.process.log());
        if cause == "name_taken" {
            // It asks again and again for some time.
            let refused = format!(
                "pid={} command=\"register_node\" cause={cause}",
                second.process.pid()
            );
            agent.process.wait_log(&refused, LOGGED).unwrap();
            assert_eq!(agent.process.log().matches(&refused).count(), 1);
        }
    }
}

#[test]
fn one_name_from_two_hosts() {
    let mesh = Mesh::new().unwrap();
    let first = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    // Nobody keeps a host from calling itself like another one.
    let newer = mesh.agent("b", "127.0.0.3", &["h1"]).unwrap();
    let mut shop = Beam::start(&first, "shop@h1").unwrap();
    let mut second = meshx_tests::BeamBuilder::new("shop@h1").spawn(&newer).unwrap();
    let status = second.process.wait_exit(BOOT).unwrap();
    assert!(!status.success(), "{status}");
    // Both are told: the VM that may not, and both agents' operators.
    let log = second.process.log();
    let taken = format!("shop@h1 is registered with the agent at {}", first.inbound());
    assert!(log.contains("name_taken") && log.contains(&taken), "{log}");
    // Nor does it get another name of that host.
    let socket = newer.dir().join("vm/other.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let client = Control::connect(&newer).unwrap();
    let arguments = vec![
        ("node", text("other@h1")),
        ("socket", text(socket.display().to_string())),
    ];
    let refused = client.request("register_node", arguments).unwrap_err();
    assert!(
        refused.starts_with("host_not_owned: ") && refused.contains("owned host h1 first"),
        "{refused}"
    );
    for (agent, other) in [(&first, &newer), (&newer, &first)] {
        let told = agent.meshx(&["doctor"]).unwrap();
        let told = String::from_utf8_lossy(&told.stdout);
        assert!(
            told.contains(&format!("at {} owns h1", other.inbound())),
            "{told}"
        );
    }
    newer
        .process
        .wait_log("two agents own the same host name", LOGGED)
        .unwrap();
    // The first one's node goes on, and is the one that is reached.
    let mut cart = Beam::start(&first, "cart@h1").unwrap();
    cart.expect("MeshxNode.connect(:shop@h1)", ":ok").unwrap();
    shop.expect_soon("Node.list()", "[:cart@h1]").unwrap();
}

#[test]
fn an_agent_that_is_gone_is_unreachable_and_no_agent_is_a_clear_boot_error() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let mut h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let _cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();
    h2.process.kill();
    shop.expect(
        "receive do {:nodedown, node} -> node after 3_000 -> :none end",
        ":cart@h2",
    )
    .unwrap();
    let answer = shop.eval("MeshxNode.connect(:cart@h2)").unwrap();
    assert!(
        answer.contains(":no_such_node") || answer.contains(":unreachable"),
        "{answer}"
    );

    let ebin = ebin();
    let run = ["run", "late@h2", "--ebin", ebin.to_str().unwrap(), "--", "true"];
    let output = h2.meshx(&run).unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("meshx agent"),
        "should say how to start one: {text}"
    );
}

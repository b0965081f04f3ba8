//! Programs of OTP that know EPMD and nothing of a mesh: epmd -names, erl_call, a C node of libei.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Command, Output};
use std::time::Duration;

use meshx_tests::{BeamBuilder, COOKIE, Mesh, Process};

#[path = "../../native/etf/tests/common/libei.rs"]
mod libei;

const PATIENCE: Duration = Duration::from_secs(60);
const EI_NODE: &str = include_str!("../libei/ei_node.c");

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// These resolve names by the system's resolver alone, so the host is one that every system knows.
#[test]
fn epmd_names_erl_call_and_a_c_node() {
    let mesh = Mesh::new().unwrap();
    let options = ["--epmd=127.0.0.1:0", "--epmd-nodes", "shop"];
    let agent = mesh
        .agent_with("a", "127.0.0.2", &["127.0.0.1"], &options)
        .unwrap();
    let port = agent.epmd().unwrap().to_string();
    let mut shop = BeamBuilder::new("shop@127.0.0.1")
        .run_options(&["--epmd"])
        .start(&agent)
        .unwrap();

    let names = Command::new("epmd")
        .args(["-port", &port, "-names"])
        .output()
        .unwrap();
    let names = text(&names);
    assert!(
        names.contains(&format!("up and running on port {port}")),
        "{names}"
    );
    assert!(names.contains("name shop at port "), "{names}");
    // It does not end for whoever asks.
    let kill = Command::new("epmd")
        .args(["-port", &port, "-kill"])
        .output()
        .unwrap();
    assert!(text(&kill).contains("not allowed"), "{}", text(&kill));

    let call = || {
        let arguments = ["-n", "shop@127.0.0.1", "-c", COOKIE, "-a", "erlang node"];
        let called = Command::new("erl_call")
            .args(arguments)
            .env("ERL_EPMD_PORT", &port)
            .output();
        text(&called.unwrap())
    };
    assert_eq!(call().trim(), "'shop@127.0.0.1'");

    let program = libei::compile(EI_NODE);
    let arguments = ["ei@127.0.0.1", COOKIE, "shop@127.0.0.1"];
    let mut ei = Process::start("ei", &program, arguments, |command| {
        command.env("ERL_EPMD_PORT", &port);
    })
    .unwrap();
    ei.wait_for(PATIENCE, |line| (line == "ready").then_some(()))
        .unwrap();
    shop.expect_soon("Node.list(:hidden)", "[:\"ei@127.0.0.1\"]")
        .unwrap();
    let links = agent.meshx_ok(&["links", "--json"]).unwrap();
    assert!(links.contains("ei@127.0.0.1"), "{links}");

    // A tool that has nothing to do with this node's rules is held to them all the same.
    agent.meshx_ok(&["deny", "shop", "shop"]).unwrap();
    shop.expect(
        "Enum.find_value(1..1500, fn _ -> Node.list(:hidden) == [] || Process.sleep(10) == :never end)",
        "true",
    )
    .unwrap();
    assert!(!call().contains("'shop@127.0.0.1'"));
    agent
        .process
        .wait_log("intention_denied", Duration::from_secs(10))
        .unwrap();
    std::fs::remove_file(program).unwrap();
}

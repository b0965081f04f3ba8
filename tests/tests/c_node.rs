//! A node written in Rust, in one cluster with BEAMs, through the mesh.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Agent, Beam, BeamBuilder, COOKIE, Mesh, Process, program};

fn search_node(agent: &Agent, more: &[&str]) -> Process {
    let arguments = ["--name", "search@h3", "--cookie", COOKIE].iter().chain(more);
    let mut search = Process::start(
        "search@h3",
        program("search_node").unwrap(),
        arguments,
        |command| {
            command.env("MESHX_DIR", agent.dir());
        },
    )
    .unwrap();
    search
        .wait_for(Duration::from_secs(30), |line| {
            line.starts_with("ready").then_some(())
        })
        .unwrap();
    search
}

#[test]
fn a_rust_node_is_called_calls_and_stays() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h3 = mesh.agent("b", "127.0.0.3", &["h2", "h3"]).unwrap();
    // Ticks once a second: staying connected past several of them takes seconds, not minutes.
    let mut shop = BeamBuilder::new("shop@h1")
        .erl("-kernel net_ticktime 4")
        .start(&h1)
        .unwrap();
    let _search = search_node(&h3, &[]);

    shop.expect(":net_adm.ping(:search@h3)", ":pong").unwrap();
    shop.expect("Node.list(:hidden)", "[:search@h3]").unwrap();
    shop.expect("Node.list()", "[]").unwrap();
    let found = shop
        .eval("GenServer.call({:search, :search@h3}, {:find, \"lamp\"})")
        .unwrap();
    assert!(found.contains("lamp"), "{found}");

    // A name that nobody has is told at once.
    let missing =
        shop.eval("catch_exit = try do GenServer.call({:nobody, :search@h3}, 1) catch :exit, e -> e end");
    assert!(missing.as_ref().unwrap().contains(":noproc"), "{missing:?}");

    // Past three whole tick times the link is still the same one: nodedown would have come.
    shop.eval(":net_kernel.monitor_nodes(true, node_type: :hidden)")
        .unwrap();
    shop.expect(
        "receive do {:nodedown, node, _} -> node after 12_500 -> :still_up end",
        ":still_up",
    )
    .unwrap();
    shop.expect("Node.list(:hidden)", "[:search@h3]").unwrap();
}

#[test]
fn a_rust_node_calls_a_beam_and_prints_the_result() {
    let mesh = Mesh::new().unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2", "h3"]).unwrap();
    let _cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let search = search_node(&h2, &["--call-on", "cart@h2"]);
    search.wait_log("called ", Duration::from_secs(30)).unwrap();
}

#[test]
fn ping_and_call_from_the_command_line() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let _cart = Beam::start(&h2, "cart@h2").unwrap();
    let options = ["--name", "tool@h1", "--cookie", COOKIE];
    let pong = h1
        .meshx_ok(&[&["ping", "cart@h2"], &options[..]].concat())
        .unwrap();
    assert!(pong.contains("pong"), "{pong}");
    let sum = h1
        .meshx_ok(&[&["call", "cart@h2", "lists", "sum", "[[1, 2, 39]]"], &options[..]].concat())
        .unwrap();
    assert_eq!(sum.trim(), "42");
    let missing = h1
        .meshx(&[&["ping", "nobody@h2"], &options[..]].concat())
        .unwrap();
    assert!(!missing.status.success());
    let text = String::from_utf8_lossy(&missing.stderr);
    assert!(text.contains("no_such_node"), "{text}");
}

/// The example as a whole: an Elixir application and its worker, which comes, goes, and comes back.
#[test]
fn the_shop_asks_its_search_worker() {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h3 = mesh.agent("b", "127.0.0.3", &["h2", "h3"]).unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    let mut search = search_node(&h3, &[]);
    let find = "Shop.Search.find(:search@h3, \"reading lamp\")";
    // It waits 2 s for an answer, of which a first connection may take more on a busy machine.
    let connect = "MeshxNode.connect(:search@h3)";
    shop.expect(connect, ":ok").unwrap();
    let found = shop.eval(find).unwrap();
    assert!(
        found.starts_with("{:ok, [%{") && found.contains("Floor lamp"),
        "{found}"
    );
    let stats = shop.eval("Shop.Search.stats(:search@h3)").unwrap();
    assert!(
        stats.starts_with("{:ok, %{") && stats.contains("searches: 1"),
        "{stats}"
    );
    shop.expect(
        "Shop.Search.find(:search@h3, :no_text)",
        "{:error, {:bad_query, \"wanted a text\"}}",
    )
    .unwrap();

    search.terminate(Duration::from_secs(10)).unwrap();
    shop.expect(find, "{:error, {:nodedown, :search@h3}}").unwrap();
    let _search = search_node(&h3, &[]);
    shop.expect(connect, ":ok").unwrap();
    assert!(shop.eval(find).unwrap().contains("Floor lamp"));
}

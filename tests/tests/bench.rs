//! The benchmarks run: a table that nobody can make any more is worth nothing. What they measure is not judged here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

/// One round decides nothing, and says so.
const UNDECIDED: &str = "undecided";

/// Runs a benchmark for one short round; its report must have all of `wanted`.
fn measures(program: &str, arguments: &[&str], wanted: &[&str]) {
    let output = Command::new(program)
        .args(["--rounds", "1"])
        .args(arguments)
        .output()
        .unwrap();
    let (text, log) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}\n{log}");
    for wanted in wanted {
        assert!(text.contains(wanted), "{wanted:?} is missing in\n{text}\n{log}");
    }
    assert!(!text.contains("NaN") && !text.contains("| met "), "{text}");
}

#[test]
fn bench_rpc_measures_and_writes_its_tables() {
    measures(
        env!("CARGO_BIN_EXE_bench_rpc"),
        &["--ms", "20", "--row", "1", "--peers", "rpc,tls,mesh"],
        &[
            "| 64 B x 1 ",
            "| 64 B x 128 ",
            "| MeshxRpc, agents ",
            "bench/rpc.svg",
            UNDECIDED,
        ],
    );
}

#[test]
fn bench_mesh_measures_and_writes_its_tables() {
    measures(
        env!("CARGO_BIN_EXE_bench_mesh"),
        &["--ms", "20"],
        &[
            "| native ",
            "| native / inet_tls_dist ",
            "| native / built-in proxies ",
            "| native / Envoy pair ",
            "| bare relays ",
            "| carrier alone / inet_tcp_dist ",
            "| between two network namespaces ",
            "bench/mesh.svg",
            UNDECIDED,
        ],
    );
}

#[test]
fn bench_cnode_measures_and_writes_its_table() {
    measures(
        env!("CARGO_BIN_EXE_bench_cnode"),
        &["--percent", "1"],
        &[
            "| decode 10k maps ",
            "| walk 10k maps ",
            "| messages/s to a BEAM, 64 B ",
            "| CPU per message from a BEAM, 16 KiB ",
            "| GenServer.call round trip from a BEAM ",
            "- 1000 monitors in our node: ",
            "bench/cnode.svg",
            UNDECIDED,
        ],
    );
}

#[test]
fn bench_dist_measures_and_writes_its_tables() {
    measures(
        env!("CARGO_BIN_EXE_bench_dist"),
        &["--nodes", "2,5", "--vms", "3", "--ms", "20"],
        &[
            "| 2     | 2           | 1     |",
            "| 5     | 3           | 10    |",
            "| inet_tcp_dist, epmd ",
            "| meshx run ",
            "| registrations ",
            "| lookups ",
            "bench/dist.md",
        ],
    );
}

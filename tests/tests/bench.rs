//! The benchmarks run: a table that nobody can make any more is worth nothing. What they measure is not judged here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

#[test]
fn bench_rpc_measures_and_writes_its_tables() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench_rpc"))
        .args([
            "--rounds",
            "1",
            "--ms",
            "20",
            "--row",
            "1",
            "--peers",
            "rpc,tls,mesh",
        ])
        .output()
        .unwrap();
    let (text, log) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}\n{log}");
    // One round decides nothing, and says so.
    for wanted in [
        "| 64 B x 1 ",
        "| 64 B x 128 ",
        "| MeshxRpc, agents ",
        "undecided",
        "bench/rpc.svg",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is missing in\n{text}\n{log}");
    }
    assert!(!text.contains("NaN") && !text.contains("| met "), "{text}");
}

#[test]
fn bench_mesh_measures_and_writes_its_tables() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench_mesh"))
        .args(["--rounds", "1", "--ms", "20"])
        .output()
        .unwrap();
    let (text, log) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}\n{log}");
    for wanted in [
        "| native ",
        "| native / inet_tls_dist ",
        "| native / built-in proxies ",
        "| native / Envoy pair ",
        "| carrier alone / inet_tcp_dist ",
        "undecided",
        "bench/mesh.svg",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is missing in\n{text}\n{log}");
    }
    assert!(!text.contains("NaN") && !text.contains("| met "), "{text}");
}

#[test]
fn bench_cnode_measures_and_writes_its_table() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench_cnode"))
        .args(["--rounds", "1", "--percent", "1"])
        .output()
        .unwrap();
    let (text, log) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{text}\n{log}");
    for wanted in [
        "| decode 10k maps ",
        "| walk 10k maps ",
        "| messages/s to a BEAM, 64 B ",
        "| CPU per message from a BEAM, 16 KiB ",
        "| GenServer.call round trip from a BEAM ",
        "- 1000 monitors in our node: ",
        "undecided",
        "bench/cnode.svg",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is missing in\n{text}\n{log}");
    }
    assert!(!text.contains("NaN") && !text.contains("| met "), "{text}");
}

//! The contract of adapters, in Elixir, on a real agent whose mesh is a real Consul.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;
use std::time::Duration;

use meshx_tests::consul::Consul;
use meshx_tests::{repository, wait_until};

/// What a VM had goes within a second of its end; three times that.
const GIVEN_BACK: Duration = Duration::from_secs(3);

fn passes(file: &str) {
    let consul = Consul::start().unwrap();
    let ip = consul.ip().to_string();
    let options = ["--instance-ports", "21000-21199"];
    let agent = consul.agent_with("a", &ip, &["h1"], &options, None).unwrap();
    let output = Command::new("mix")
        .args(["test", "--warnings-as-errors", file])
        .current_dir(repository().join("mix_project"))
        .envs([("MIX_ENV", "test"), ("MESHX_NIF", "require")])
        .env("MESHX_DIR", agent.dir())
        .output()
        .unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    println!("{text}");
    assert!(output.status.success(), "{}", output.status);
    // The VM gave back what it had, and nobody had to be told. Promised is a second.
    let mut left = Vec::new();
    let none = || {
        left = consul.service_names().unwrap();
        left.is_empty()
    };
    assert!(wait_until(GIVEN_BACK, none).is_ok(), "{left:?}");
}

#[test]
fn meshx_agent() {
    passes("contract/meshx_agent_test.exs");
}

#[test]
fn meshx_consul() {
    passes("contract/meshx_consul_test.exs");
}

#[test]
fn meshx_consul_with_proxies() {
    passes("contract/meshx_consul_proxy_test.exs");
}

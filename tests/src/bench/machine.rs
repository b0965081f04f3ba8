//! The facts about this machine without which a table says nothing.

use std::fs;
use std::process::Command;

/// One fact a line, as `name: value`.
pub fn machine() -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let cpu = read("/proc/cpuinfo").and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let facts = [
        ("CPU", cpu.map(|cpu| format!("{cores} x {cpu}"))),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("OTP", otp()),
        (
            "TCP congestion control of the host (within it MeshxRpc and agents use Reno)",
            read("/proc/sys/net/ipv4/tcp_congestion_control"),
        ),
        (
            "what the kernel may take over from TCP's users (kTLS would be tls)",
            read("/proc/sys/net/ipv4/tcp_available_ulp"),
        ),
        (
            "net.core.wmem_max, which caps the send buffers that are asked for",
            read("/proc/sys/net/core/wmem_max"),
        ),
        ("load when started", read("/proc/loadavg")),
    ];
    facts
        .into_iter()
        .map(|(name, value)| format!("{name}: {}", value.unwrap_or_else(|| "unknown".into())))
        .collect()
}

fn otp() -> Option<String> {
    let eval = "io:put_chars(erlang:system_info(system_version)), halt().";
    let out = Command::new("erl")
        .args(["-noshell", "-boot", "start_clean", "-eval", eval])
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

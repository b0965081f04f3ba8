//! Runs a test in a process of small means.
//!
//! Each test runs again as a process of its own that may use 384 MiB of address space and a few seconds of CPU, on a
//! thread with a 512 KiB stack: a decoder that believes a count, recurses or inflates without end fails there.

use std::process::Command;
use std::thread;

const CONFINED: &str = "MESHX_ETF_CONFINED";
pub(crate) const ADDRESS_SPACE_KIB: usize = 384 << 10;
const CPU_SECONDS: usize = 20;
const STACK: usize = 512 << 10;

/// Runs `body` in a process of small means; `name` is the name of the calling test.
pub(crate) fn confined(name: &str, body: fn()) {
    if std::env::var_os(CONFINED).is_some() {
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(body)
            .unwrap()
            .join()
            .unwrap();
        println!("confined body ran");
        return;
    }
    let limits = format!("ulimit -v {ADDRESS_SPACE_KIB} && ulimit -t {CPU_SECONDS} && exec \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &limits, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CONFINED, "1")
        .output()
        .expect("sh must be there");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("confined body ran"),
        "{}: {text}",
        output.status
    );
}

//! The demo's steps in order. A step that fails says why; the steps that can still run do.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use meshx_tests::{Agent, Beam, BeamBuilder, COOKIE, Context, Mesh, Process, Result, program};

const PROMISED: Duration = Duration::from_secs(1);
/// A deadline in a test is three times what is promised.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asked to end early.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<(AtomicBool, Mutex<()>, Condvar)>);

impl Stop {
    pub(crate) fn now(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        let _held = self.0.1.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.2.notify_all();
    }

    fn asked(&self) -> bool {
        self.0.0.load(Ordering::SeqCst)
    }

    fn wait(&self) {
        let mut held = self.0.1.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.asked() {
            held = self.0.2.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Counts what went well.
struct Report<'a> {
    stop: &'a Stop,
    ok: u32,
    failed: u32,
}

impl Report<'_> {
    /// Runs one step and prints its line. `None` when it failed.
    fn step<T>(&mut self, title: &str, step: impl FnOnce() -> Result<(T, String)>) -> Option<T> {
        if self.stop.asked() {
            return None;
        }
        match step() {
            Ok((value, text)) => {
                self.ok += 1;
                println!("  ok      {title:<26} {text}");
                Some(value)
            }
            Err(_) if self.stop.asked() => None,
            Err(error) => {
                self.failed += 1;
                println!("  FAILED  {title:<26} {error}");
                None
            }
        }
    }
}

pub(crate) fn tell(stop: &Stop, keep: bool) -> ExitCode {
    let started = Instant::now();
    println!("meshx demo: two agents, two BEAM nodes and one Rust node on the embedded mesh\n");
    let mut report = Report {
        stop,
        ok: 0,
        failed: 0,
    };
    let mesh = match Mesh::new() {
        Ok(mesh) => mesh,
        Err(e) => {
            println!("  FAILED  {e}");
            return ExitCode::FAILURE;
        }
    };
    let path = mesh.path().to_owned();
    run(&mut report, &mesh, keep);
    drop(mesh);
    if path.exists() {
        report.failed += 1;
        println!("  FAILED  {:<26} {} is still there", "clean up", path.display());
    }
    if stop.asked() && !keep {
        println!("\nstopped; every process and file of the demo is gone");
        return ExitCode::FAILURE;
    }
    let seconds = started.elapsed().as_secs_f32();
    println!(
        "\n{} steps ok, {} failed, {seconds:.1} s; nothing is left running",
        report.ok, report.failed
    );
    if report.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(report: &mut Report<'_>, mesh: &Mesh, keep: bool) {
    let Some((mut h1, mut h2)) = report.step("two agents", || {
        let h1 = mesh.agent("a", "127.0.0.2", &["h1"])?;
        let h2 = mesh.agent("b", "127.0.0.3", &["h2", "h3"])?;
        let text = format!("h1 behind {}, h2 and h3 behind {}", h1.inbound(), h2.inbound());
        Ok(((h1, h2), text))
    }) else {
        return;
    };
    let Some((mut cart, mut shop)) = report.step("nodes meet at boot", || boot(mesh.path(), &h1, &h2)) else {
        return;
    };
    report.step("identity seen by shop@h1", || {
        identity(&mut shop, "cart@h2", "cart")
    });
    report.step("identity seen by cart@h2", || {
        identity(&mut cart, "shop@h1", "shop")
    });
    report.step("RPC call", || rpc_latency(&mut shop));
    report.step("RPC, 64 MiB with crc32", || rpc_transfer(&mut shop));
    let search = report.step("Rust node calls cart@h2", || rust_node_calls(&h2));
    if search.is_some() {
        report.step("shop@h1 calls Rust node", || rust_node_called(&mut shop));
        report.step("denied pair", || denied(&h1, &mut shop));
    }
    let again = report.step("SIGKILL frees the name", || killed(&h2, &mut cart, &mut shop));
    if keep && !report.stop.asked() {
        println!("\nstill up. A shell on shop@h1, in another terminal:\n");
        println!("  {}\n\nCtrl-C ends the demo.", shell(&h1));
        report.stop.wait();
    }
    drop((shop, cart, again, search));
    report.step("agents end when told", || {
        for agent in [&mut h1, &mut h2] {
            let status = agent.process.terminate(Duration::from_secs(10))?;
            if !status.success() {
                return Err(format!("an agent ended with {status}"));
            }
        }
        Ok(((), "exit code 0, sockets removed".into()))
    });
}

fn boot(dir: &Path, h1: &Agent, h2: &Agent) -> Result<((Beam, Beam), String)> {
    let cart = BeamBuilder::new("cart@h2").app("shop").start(h2)?;
    let at = Instant::now();
    // OTP's own boot-time clustering: the kernel application waits for these nodes before any other starts. In a file:
    // on the way through the script `elixir` the list would be a pattern for names of files.
    let config = dir.join("boot");
    let wanted = "[{kernel,[{sync_nodes_mandatory,['cart@h2']},{sync_nodes_timeout,10000}]}].\n";
    std::fs::write(config.with_extension("config"), wanted).context("write a configuration")?;
    let mut shop = BeamBuilder::new("shop@h1")
        .app("shop")
        .erl(&format!("-config {}", config.display()))
        .start(h1)?;
    let took = at.elapsed().as_secs_f32();
    shop.expect("Node.list()", "[:cart@h2]")?;
    let ping = shop.eval(&median("Node.ping(:cart@h2)", ":pong", 101))?;
    Ok((
        (cart, shop),
        format!("shop@h1 booted in {took:.1} s and sees [:cart@h2]; ping: {ping} us (median of 101)"),
    ))
}

fn identity(node: &mut Beam, peer: &str, service: &str) -> Result<((), String)> {
    let uri = node.eval(&format!(
        "{{:ok, peer}} = MeshxNode.peer(:\"{peer}\"); peer.spiffe"
    ))?;
    let uri = uri.trim_matches('"').to_owned();
    if uri.starts_with("spiffe://") && uri.ends_with(&format!("/svc/{service}")) {
        Ok(((), uri))
    } else {
        Err(format!(
            "seen {uri}, wanted a SPIFFE URI of the service {service}"
        ))
    }
}

fn rpc_latency(shop: &mut Beam) -> Result<((), String)> {
    shop.expect(
        "Shop.CartClient.call(:total, [{\"lamp\", 2}, {\"desk\", 1}], 5_000, 100, 100)",
        "16898",
    )?;
    let median = shop.eval(&median("Shop.CartClient.call(:echo, 7)", "7", 1001))?;
    let p99 = shop.eval("Enum.at(times, 990)")?;
    Ok((
        (),
        format!("total of a cart: 16898; 1001 calls: {median} us median, {p99} us p99"),
    ))
}

fn rpc_transfer(shop: &mut Beam) -> Result<((), String)> {
    shop.eval("blob = :crypto.strong_rand_bytes(64 * 1024 * 1024); :made")?;
    shop.expect(
        "Shop.CartClient.call(:digest, blob) == {byte_size(blob), :crypto.hash(:sha256, blob)}",
        "true",
    )?;
    let time = shop.eval(&median("Shop.CartClient.call(:size, blob)", "67_108_864", 5))?;
    let rate = shop.eval(&format!("round(67_108_864 / {time})"))?;
    Ok((
        (),
        format!("SHA-256 equal at both ends; {rate} MB/s (median of 5)"),
    ))
}

/// Elixir that makes a call `rounds` times, leaves the sorted microseconds in `times`, and gives their median.
fn median(call: &str, answer: &str, rounds: usize) -> String {
    let middle = rounds / 2;
    format!(
        "times = for(_ <- 1..{rounds}, do: elem(:timer.tc(fn -> {answer} = {call} end), 0)) |> Enum.sort(); \
         Enum.at(times, {middle})"
    )
}

fn rust_node_calls(h3: &Agent) -> Result<(Process, String)> {
    let arguments = ["--name", "search@h3", "--cookie", COOKIE, "--call-on", "cart@h2"];
    let mut search = Process::start("search@h3", program("search_node")?, arguments, |command| {
        command.env("MESHX_DIR", h3.dir());
    })?;
    let line = search.wait_for(Duration::from_secs(30), |line| {
        line.starts_with("called ").then(|| line.to_owned())
    })?;
    Ok((search, format!("search@h3: {line}")))
}

fn rust_node_called(shop: &mut Beam) -> Result<((), String)> {
    shop.expect("Node.ping(:search@h3)", ":pong")?;
    let found = shop.eval("GenServer.call({:search, :search@h3}, {:find, \"dimmer\"})")?;
    if !found.contains("dimmer") {
        return Err(format!("seen {found}, wanted documents with \"dimmer\""));
    }
    Ok((
        (),
        format!("hidden: {}; answer {found}", shop.eval("Node.list(:hidden)")?),
    ))
}

fn denied(h1: &Agent, shop: &mut Beam) -> Result<((), String)> {
    shop.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason, node_type: :hidden])")?;
    let at = Instant::now();
    h1.meshx_ok(&["deny", "shop", "search"])?;
    shop.expect(
        "receive do {:nodedown, node, _} -> node after 6_000 -> :still_up end",
        ":search@h3",
    )?;
    let cut = at.elapsed().as_millis();
    let refused = shop.eval("MeshxNode.connect(:search@h3)")?;
    if !refused.contains(":intention_denied") {
        return Err(format!(
            "seen {refused}, wanted {{:error, {{:intention_denied, text}}}}"
        ));
    }
    h1.process.wait_log("intention_denied", PATIENCE)?;
    h1.meshx_ok(&["allow", "shop", "search"])?;
    shop.expect("MeshxNode.connect(:search@h3)", ":ok")?;
    Ok((
        (),
        format!("live link cut after {cut} ms; then {refused}; allowed again: connected"),
    ))
}

fn killed(h2: &Agent, cart: &mut Beam, shop: &mut Beam) -> Result<(Beam, String)> {
    shop.eval(":net_kernel.monitor_nodes(true)")?;
    let at = cart.process.kill();
    h2.wait_name("cart@h2", false, PATIENCE)?;
    let free = at.elapsed();
    shop.expect(
        "receive do {:nodedown, node} -> node after 5000 -> :no_nodedown end",
        ":cart@h2",
    )?;
    let again = BeamBuilder::new("cart@h2").app("shop").start(h2)?;
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok")?;
    // The client's pool redials by itself: a call that could not be sent is tried again, here for up to 10 s.
    shop.expect(
        "Shop.CartClient.call(:total, [{\"lamp\", 1}], 5_000, 100, 100)",
        "1999",
    )?;
    let promised = PROMISED.as_secs();
    Ok((
        again,
        format!(
            "after {} ms (promised: {promised} s); cart@h2 is back, RPC works again",
            free.as_millis()
        ),
    ))
}

fn shell(h1: &Agent) -> String {
    let meshx = program("meshx").map_or_else(|_| "meshx".into(), |path| path.display().to_string());
    format!(
        "MESHX_DIR={} {meshx} run ops@h1 --hidden --cookie {COOKIE} --ebin {} -- iex --remsh shop@h1",
        h1.dir().display(),
        meshx_tests::ebin().display()
    )
}

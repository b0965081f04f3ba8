//! One build of the agent takes over from another: no link ends, no call fails, and the rules hold on for links of the
//! old process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use meshx_tests::consul::Consul;
use meshx_tests::control::Control;
use meshx_tests::upgrade::{count, other_build, start_load};
use meshx_tests::{Agent, Beam, BeamBuilder, EchoClient, EchoServer, Mesh, Process, program, wait_until};
use rustix::process::Signal;

/// Promised: a denial cuts a live link within 2 s. Three times that is the deadline here.
const CUT: Duration = Duration::from_secs(6);
/// Promised: a killed VM is gone within 1 s. Likewise.
const FREED: Duration = Duration::from_secs(3);
/// Promised: links are back 5 s after a crash. Likewise.
const BACK: Duration = Duration::from_secs(15);
/// For what only has to happen.
const SOON: Duration = Duration::from_secs(30);

/// Two tables on two nodes that write all the time, one transaction after the other.
fn start_mnesia(shop: &mut Beam, cart: &mut Beam) {
    for node in [&mut *shop, &mut *cart] {
        node.expect(":mnesia.start()", ":ok").unwrap();
        node.eval("{:ok, _} = :mnesia.subscribe(:system)").unwrap();
    }
    shop.expect(
        ":mnesia.change_config(:extra_db_nodes, [:cart@h2])",
        "{:ok, [:cart@h2]}",
    )
    .unwrap();
    shop.expect(
        ":mnesia.create_table(:counts, ram_copies: [node(), :cart@h2])",
        "{:atomic, :ok}",
    )
    .unwrap();
    for node in [shop, cart] {
        node.eval(
            "write = fn f, n, bad -> r = :mnesia.transaction(fn -> :mnesia.write({:counts, node(), n}) end); \
             bad = if r == {:atomic, :ok}, do: bad, else: [r | bad]; \
             receive do :stop -> {n, bad} after 0 -> f.(f, n + 1, bad) end end; :made",
        )
        .unwrap();
        node.eval("writer = Task.async(fn -> write.(write, 1, []) end); :ok")
            .unwrap();
    }
}

/// Waits until both nodes have written once more.
fn writers_go_on(shop: &mut Beam) {
    shop.expect(
        "seen = fn -> Enum.map([:shop@h1, :cart@h2], &:mnesia.dirty_read(:counts, &1)) end; before = seen.(); \
         moved = fn f, left -> cond do \
         before |> Enum.zip(seen.()) |> Enum.all?(fn {a, b} -> a != b end) -> true; \
         left == 0 -> false; \
         true -> Process.sleep(10); f.(f, left - 1) end end; moved.(moved, 2_000)",
        "true",
    )
    .unwrap();
}

fn no_node_went_down(node: &mut Beam) {
    node.expect(
        "receive do {:nodedown, node, why} -> {node, why} after 0 -> :none end",
        ":none",
    )
    .unwrap();
    node.expect(
        "receive do {:mnesia_system_event, {:inconsistent_database, _, _} = e} -> e after 0 -> :none end",
        ":none",
    )
    .unwrap();
}

/// Makes one new connection after the other through both agents, and talks on each.
struct Dialler {
    stop: mpsc::Sender<()>,
    made: Arc<AtomicU64>,
    dialling: JoinHandle<Result<(), String>>,
    _clients: [Control; 2],
}

impl Dialler {
    fn start(from: &Agent, to: &Agent) -> Self {
        let server = EchoServer::start([127, 0, 0, 1]).unwrap();
        let clients = [Control::connect(from).unwrap(), Control::connect(to).unwrap()];
        clients[1].serve("echo", server.address(), vec![]).unwrap();
        let address = clients[0].reach("echo", "web", vec![]).unwrap();
        let (stop, stopped) = mpsc::channel();
        let made = Arc::<AtomicU64>::default();
        let count = made.clone();
        let dialling = std::thread::spawn(move || {
            while stopped.try_recv().is_err() {
                EchoClient::connect(address, SOON)?.say(b"and again")?;
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Self {
            stop,
            made,
            dialling,
            _clients: clients,
        }
    }

    /// Returns when `more` have been made from now on.
    fn wait(&self, more: u64) {
        let wanted = self.made.load(Ordering::SeqCst) + more;
        let made = || self.made.load(Ordering::SeqCst) >= wanted || self.dialling.is_finished();
        wait_until(SOON, made).unwrap();
    }

    fn stop(self) -> u64 {
        self.stop.send(()).ok();
        self.dialling.join().unwrap().unwrap();
        self.made.load(Ordering::SeqCst)
    }
}

struct World {
    h1: Agent,
    h2: Agent,
    shop: Beam,
    cart: Beam,
}

impl World {
    fn start(h1: Agent, h2: Agent) -> Self {
        let cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
        let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
        shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
            .unwrap();
        Self { h1, h2, shop, cart }
    }

    /// The creation and the registration's secret: a node that registers again would get others.
    fn registrations(&mut self) -> Vec<String> {
        [&mut self.shop, &mut self.cart]
            .map(|node| {
                node.eval("{:ok, secret} = :meshx_agent.secret(); :erlang.phash2(secret)")
                    .unwrap()
            })
            .to_vec()
    }
}

/// Takes each agent over several times, by turns with the one build and the other, under load; then `rotate` sees the
/// first agent and the processes that were taken over, and `deny` forbids shop to reach cart.
fn upgrades(
    mut world: World,
    builds: [PathBuf; 2],
    rounds: usize,
    rotate: impl FnOnce(&Agent, &[Process]),
    deny: impl FnOnce(&Agent),
) {
    let before = world.registrations();
    let World { h1, h2, shop, cart } = &mut world;
    let erpc = |node| format!(":erpc.call(:\"{node}\", Function, :identity, [n], 30_000)");
    start_load(
        shop,
        &format!("Shop.CartClient.call(:echo, {}, 30_000)", erpc("cart@h2")),
    )
    .unwrap();
    start_load(cart, &erpc("shop@h1")).unwrap();
    start_mnesia(shop, cart);
    let dialler = Dialler::start(h1, h2);
    let mut old: Vec<Process> = Vec::new();
    for round in 0..rounds {
        for agent in [&mut *h1, &mut *h2] {
            let began = Instant::now();
            let taken = agent.take_over(&builds[round % 2]).unwrap();
            println!("round {round}: taken over within {:?}", began.elapsed());
            taken.wait_log("handed over", SOON).unwrap();
            old.push(taken);
            dialler.wait(5);
            writers_go_on(shop);
        }
    }
    // The first process holds the link, and says what was proven of it as soon as it has found the last one.
    let proven = "{:ok, peer} = MeshxNode.peer(:cart@h2); match?(%DateTime{}, peer.certificate_expires_at)";
    wait_until(SOON, || shop.eval(proven).unwrap() == "true").unwrap();
    let dialled = dialler.stop();
    let calls = [count(shop, "task"), count(cart, "task")].map(Result::unwrap);
    let writes = [count(shop, "writer"), count(cart, "writer")].map(Result::unwrap);
    println!("calls {calls:?}, transactions {writes:?}, new connections {dialled}: none failed");
    let upgrades = old.len() as u64;
    assert!(
        calls
            .iter()
            .chain(&writes)
            .chain(&[dialled])
            .all(|n| *n > upgrades)
    );
    for (node, n) in [("shop@h1", writes[0]), ("cart@h2", writes[1])] {
        for on in [&mut *shop, &mut *cart] {
            // A transaction is done when the other node is sure to commit: it may do so a moment later.
            on.expect_soon(
                &format!(":mnesia.dirty_read(:counts, :\"{node}\")"),
                &format!("[{{:counts, :{node}, {n}}}]"),
            )
            .unwrap();
        }
    }
    no_node_went_down(shop);
    no_node_went_down(cart);
    assert_eq!(world.registrations(), before, "nobody had to register again");
    let World { h1, shop, .. } = &mut world;

    // The link of the nodes is the first process's still, and everybody is told so.
    let mut told = String::new();
    let tells = || {
        told = String::from_utf8_lossy(&h1.meshx(&["doctor"]).unwrap().stdout).into_owned();
        told.contains("a draining predecessor (pid")
    };
    wait_until(SOON, tells).unwrap_or_else(|()| panic!("{told}"));
    let links = h1.meshx_ok(&["links"]).unwrap();
    assert!(links.contains("cart@h2"), "{links}");

    // A denial cuts it, with its cause, through the process that serves now.
    rotate(h1, &old);
    let at = Instant::now();
    deny(h1);
    let down = "receive do {:nodedown, _, why} -> why[:nodedown_reason] after 10_000 -> :none end";
    let reasons = [shop.eval(down).unwrap(), world.cart.eval(down).unwrap()];
    let took = at.elapsed();
    println!("a denial cut the old process's link within {took:?}: {reasons:?}");
    assert!(took < CUT, "{took:?}");
    // The end whose agent sees the rule first is told the cause; the other may see it closed.
    assert!(
        reasons
            .iter()
            .any(|reason| reason == "{:meshx, :intention_denied}"),
        "{reasons:?}"
    );

    // A VM that is killed after all that is gone at once, and the old processes end with their last link.
    let at = world.cart.process.kill();
    world.h1.wait_name("cart@h2", false, FREED).unwrap();
    println!("a killed VM was gone within {:?}", at.elapsed());
    drop(world.shop);
    for mut process in old {
        let status = process.wait_exit(SOON).unwrap();
        assert!(status.success(), "{status}");
    }
}

#[test]
fn several_upgrades_in_a_row_drop_no_link_and_fail_no_call() {
    let mesh = Mesh::new().unwrap();
    let builds = [other_build(mesh.path()).unwrap(), program("meshx").unwrap()];
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let rotate = |agent: &Agent, old: &[Process]| {
        // Links prove themselves anew, though the process that holds the one end has no port any more.
        agent.meshx_ok(&["rotate"]).unwrap();
        old[1].wait_log("was proven anew", SOON).unwrap();
        let log = old[0].log();
        assert!(!log.contains("could not be proven anew"), "{log}");
    };
    let deny = |agent: &Agent| {
        agent.meshx_ok(&["deny", "shop", "cart"]).unwrap();
    };
    upgrades(World::start(h1, h2), builds, 4, rotate, deny);
}

#[test]
fn the_same_with_consul() {
    let consul = Consul::start().unwrap();
    let builds = [other_build(consul.path()).unwrap(), program("meshx").unwrap()];
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    upgrades(
        World::start(h1, h2),
        builds,
        2,
        |_, _| {},
        |_| {
            consul.deny("shop", "cart").unwrap();
        },
    );
}

/// Two nodes that are connected, and hear when they are not.
fn pair(mesh: &Mesh, options: &[&str]) -> (Agent, Agent, Beam, Beam) {
    let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], options).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let cart = Beam::start(&h2, "cart@h2").unwrap();
    shop.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason])")
        .unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    (h1, h2, shop, cart)
}

#[test]
fn after_a_sigkill_links_are_back_by_themselves() {
    let mesh = Mesh::new().unwrap();
    let (mut h1, _h2, mut shop, mut cart) = pair(&mesh, &[]);
    h1.process.kill();
    shop.expect(
        "receive do {:nodedown, node, _} -> node after 30_000 -> :none end",
        ":cart@h2",
    )
    .unwrap();
    let _h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let at = Instant::now();
    // Nobody calls the other node.
    let back = format!(
        "receive do {{:nodeup, node, _}} -> node after {} -> :none end",
        BACK.as_millis()
    );
    shop.expect(
        "receive do {:nodeup, :cart@h2, _} -> :first after 0 -> :none end",
        ":first",
    )
    .unwrap();
    shop.expect(&back, ":cart@h2").unwrap();
    println!(
        "the link was back {:?} after the next agent was ready",
        at.elapsed()
    );
    // The end that was dialled may know a moment later.
    cart.expect(
        "up = fn f, left -> Node.list() == [:shop@h1] or (left > 0 and (Process.sleep(10); f.(f, left - 1))) end; \
         up.(up, 1_000)",
        "true",
    )
    .unwrap();
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
}

#[test]
fn sigterm_lets_what_runs_come_to_its_end() {
    let mesh = Mesh::new().unwrap();
    let (mut h1, h2, mut shop, _cart) = pair(&mesh, &["--drain-time", "8"]);
    shop.eval("call = Task.async(fn -> :erpc.call(:cart@h2, Process, :sleep, [3_000]) end); :ok")
        .unwrap();
    h1.process.signal(Signal::TERM);
    // Nobody is led there any more, while the link lives.
    h2.wait_name("shop@h1", false, FREED).unwrap();
    shop.expect("Task.await(call, 30_000)", ":ok").unwrap();
    shop.expect(
        "receive do {:nodedown, _, why} -> why[:nodedown_reason] after 30_000 -> :none end",
        "{:meshx, :unreachable}",
    )
    .unwrap();
    let status = h1.process.wait_exit(SOON).unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_second_sigterm_ends_the_agent_at_once() {
    let mesh = Mesh::new().unwrap();
    let (mut h1, _h2, mut shop, _cart) = pair(&mesh, &["--drain-time", "3600"]);
    h1.process.signal(Signal::TERM);
    h1.process
        .wait_log("live links may end by themselves", SOON)
        .unwrap();
    shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
        .unwrap();
    h1.process.signal(Signal::TERM);
    let status = h1.process.wait_exit(SOON).unwrap();
    assert_eq!(status.code(), Some(0));
}

//! A VM or an agent stops (SIGSTOP) or dies (SIGKILL) at each stage of a link's way: what waits for it is answered in its
//! time, nothing stays behind, and the next attempt works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::{Agent, Beam, BeamBuilder, Mesh, Process, wait_until};
use rustix::process::Signal;

/// OTP's time for a connection here, in seconds; 7 by default.
const SETUP: u64 = 3;
/// Promised: an attempt ends within the setup time. Three times that is the deadline here.
const ANSWERED: Duration = Duration::from_secs(SETUP * 3);
/// Promised: an agent has decided after 10 s at the latest. Likewise.
const SETTLED: Duration = Duration::from_secs(30);
/// For what only has to happen.
const SOON: Duration = Duration::from_secs(30);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

/// Two hosts with a node each, and what they have open while nothing goes on.
struct World {
    h1: Agent,
    h2: Agent,
    shop: Beam,
    cart: Beam,
    open: [usize; 4],
    // Removed after what lives in it.
    mesh: Mesh,
}

fn descriptors(process: &Process) -> usize {
    let listed = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
    listed.count()
}

/// Connections to an agent's control socket, taken by it or waiting to be (proc_pid_net(5): 03 is connected).
fn clients(agent: &Agent) -> usize {
    let socket = agent.dir().join("control.sock").display().to_string();
    let listed = std::fs::read_to_string("/proc/net/unix").unwrap();
    let ours = |line: &&str| line.ends_with(&socket) && line.split_whitespace().nth(5) != Some("01");
    listed.lines().filter(ours).count()
}

/// Connections to an agent's pages that it has open still (proc_pid_net(5): 0A listens, and what its process has closed
/// has no inode).
fn readers(agent: &Agent) -> usize {
    let port: std::net::SocketAddr = agent.http().unwrap().parse().unwrap();
    let (address, listed) = (
        format!("0100007F:{:04X}", port.port()),
        std::fs::read_to_string("/proc/net/tcp").unwrap(),
    );
    let ours = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words[1] == address && words[3] != "0A" && words[9] != "0"
    };
    listed.lines().skip(1).filter(ours).count()
}

/// One that makes links only when it is told: what ended shortly before an agent is made again by itself otherwise.
fn node(agent: &Agent, name: &str) -> Beam {
    let flags = format!("-kernel net_setuptime {SETUP} -kernel dist_auto_connect never");
    BeamBuilder::new(name).erl(&flags).start(agent).unwrap()
}

impl World {
    fn start() -> Self {
        let mesh = Mesh::new().unwrap();
        let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &METRICS).unwrap();
        let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &METRICS).unwrap();
        let (shop, cart) = (node(&h1, "shop@h1"), node(&h2, "cart@h2"));
        let mut world = Self {
            h1,
            h2,
            shop,
            cart,
            open: [usize::MAX; 4],
            mesh,
        };
        // What is opened once, and for good.
        world.works();
        // Who was asked for figures may not have closed the connection yet.
        wait_until(SOON, || [&world.h1, &world.h2].map(readers) == [0; 2]).unwrap();
        world.open = world.now_open();
        world
    }

    fn now_open(&self) -> [usize; 4] {
        [
            &self.h1.process,
            &self.h2.process,
            &self.shop.process,
            &self.cart.process,
        ]
        .map(descriptors)
    }

    /// Nothing is left of what was tried, and a link can be made.
    fn recovers(&mut self, what: &str) {
        let mut seen = String::new();
        let at = Instant::now();
        let settled = || {
            let links = [&self.h1, &self.h2].map(|agent| agent.figure("meshx_links").unwrap());
            let open = self.now_open();
            seen = format!("links {links:?}, open {open:?}, wanted at most {:?}", self.open);
            links == [0.0; 2] && open.iter().zip(self.open).all(|(now, then)| *now <= then)
        };
        wait_until(SETTLED, settled).unwrap_or_else(|()| panic!("{what}: {seen}"));
        println!("{what}: settled after {:?}", at.elapsed());
        self.works();
    }

    fn works(&mut self) {
        for agent in [&self.h1, &self.h2] {
            for name in ["shop@h1", "cart@h2"] {
                agent.wait_name(name, true, SOON).unwrap();
            }
        }
        let Self { shop, cart, .. } = self;
        shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
        shop.expect(":erpc.call(:cart@h2, :erlang, :node, [])", ":cart@h2")
            .unwrap();
        shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
        cart.expect(
            "gone = fn f, left -> Node.list() == [] or (left > 0 and (Process.sleep(10); f.(f, left - 1))) end; \
             gone.(gone, 3_000)",
            "true",
        )
        .unwrap();
        let links = || [&self.h1, &self.h2].map(|agent| agent.figure("meshx_links").unwrap());
        wait_until(SOON, || links() == [0.0; 2]).unwrap();
    }

    /// Begins an attempt of shop to connect to cart.
    fn dial(&mut self) {
        self.shop
            .process
            .write_line("MeshxNode.connect(:cart@h2)")
            .unwrap();
    }

    /// How the attempt ended: not well, with a cause, and in time.
    fn refused(&mut self, what: &str) {
        let at = Instant::now();
        let answer = |line: &str| line.strip_prefix("ok ").map(str::to_owned);
        let answer = self.shop.process.wait_for(ANSWERED, answer).unwrap();
        println!("{what}: {answer} after {:?}", at.elapsed());
        assert!(answer.starts_with("{:error, {:"), "{what}: {answer}");
    }

    /// Waits until the attempt has come to the node that is dialled: its name message was let through.
    fn reached_node(&self) {
        let live = || self.h2.figure("meshx_links").unwrap() == 1.0;
        wait_until(SOON, live).unwrap();
    }

    /// Waits until a process has opened more than it had: the attempt has come so far.
    fn reached(&self, who: usize, more: usize) {
        let wanted = self.open[who] + more;
        wait_until(SOON, || self.now_open()[who] >= wanted)
            .unwrap_or_else(|()| panic!("process {who} has {:?} open, wanted {wanted}", self.now_open()));
    }

    fn restart(&mut self, at_h1: bool) {
        let agent = if at_h1 {
            self.mesh.agent_with("a", "127.0.0.2", &["h1"], &METRICS)
        } else {
            self.mesh.agent_with("b", "127.0.0.3", &["h2"], &METRICS)
        };
        *(if at_h1 { &mut self.h1 } else { &mut self.h2 }) = agent.unwrap();
    }
}

const H1: usize = 0;
const SHOP: usize = 2;

#[test]
fn whoever_stops_on_the_way_of_a_link_holds_nobody_up() {
    let mut world = World::start();

    // The request to its own agent.
    world.h1.process.signal(Signal::STOP);
    world.dial();
    world.refused("its agent stopped");
    world.h1.process.signal(Signal::CONT);
    world.recovers("its agent stopped");

    // TLS with the other agent.
    world.h2.process.signal(Signal::STOP);
    world.dial();
    world.reached(H1, 2);
    world.refused("the other agent stopped");
    world.h2.process.signal(Signal::CONT);
    world.recovers("the other agent stopped");

    // The nodes' handshake: the name was sent, the status does not come.
    world.cart.process.signal(Signal::STOP);
    world.dial();
    world.reached_node();
    world.refused("the other node stopped");
    world.cart.process.signal(Signal::CONT);
    world.recovers("the other node stopped");

    // The challenge was sent, the answer does not come. OTP's own table has the connection that is being made.
    world
        .cart
        .eval(
            "until = fn f, there -> if (:ets.lookup(:sys_dist, :shop@h1) != []) == there, do: :ok, \
             else: (Process.sleep(5); f.(f, there)) end; \
             waited = Task.async(fn -> until.(until, true); :timer.tc(fn -> until.(until, false) end) |> elem(0) end); :ok",
        )
        .unwrap();
    world.cart.process.signal(Signal::STOP);
    world.dial();
    world.reached_node();
    world.shop.process.signal(Signal::STOP);
    world.cart.process.signal(Signal::CONT);
    let micros: u64 = world
        .cart
        .eval("Task.await(waited, 60_000)")
        .unwrap()
        .parse()
        .unwrap();
    println!("the node that was dialled waited for {micros} us");
    assert!(Duration::from_micros(micros) < ANSWERED, "{micros} us");
    world.shop.process.signal(Signal::CONT);
    world.refused("the dialling node stopped");
    world.recovers("the dialling node stopped");
}

#[test]
fn whoever_dies_on_the_way_of_a_link_leaves_nothing() {
    let mut world = World::start();

    // The request to its own agent.
    world.h1.process.signal(Signal::STOP);
    world.dial();
    world.reached(SHOP, 1);
    world.h1.process.kill();
    world.refused("its agent died");
    world.restart(true);
    world.recovers("its agent died");

    // TLS with the other agent.
    world.h2.process.signal(Signal::STOP);
    world.dial();
    world.reached(H1, 2);
    world.h2.process.kill();
    world.refused("the other agent died");
    world.restart(false);
    world.recovers("the other agent died");

    // The dialling node, while the other agent is silent, and while the other node is.
    for (what, stopped) in [("agent", false), ("node", true)] {
        let silent = if stopped {
            &world.cart.process
        } else {
            &world.h2.process
        };
        silent.signal(Signal::STOP);
        world.dial();
        if stopped {
            world.reached_node();
        } else {
            world.reached(H1, 2);
        }
        world.shop.process.kill();
        let silent = if stopped {
            &world.cart.process
        } else {
            &world.h2.process
        };
        silent.signal(Signal::CONT);
        world.shop = node(&world.h1, "shop@h1");
        world.recovers(&format!("the dialling node died before the silent {what}"));
    }

    // The other node, in the middle of the handshake.
    world.cart.process.signal(Signal::STOP);
    world.dial();
    world.reached_node();
    world.cart.process.kill();
    world.refused("the other node died");
    world.cart = node(&world.h2, "cart@h2");
    world.recovers("the other node died");
}

#[test]
fn a_registration_goes_on_with_its_agent_and_ends_with_it() {
    let mut world = World::start();
    // Distribution is started when the VM runs: nothing but its own client talks to the agent.
    let nameless = |world: &World| BeamBuilder::new("late").start_nameless(&world.h1).unwrap();
    // Comes as far as the stopped agent's socket.
    let begin = |world: &World, node: &mut Beam| {
        let before = clients(&world.h1);
        world.h1.process.signal(Signal::STOP);
        node.process
            .write_line("Node.start(:late@h1) |> elem(0)")
            .unwrap();
        wait_until(SOON, || clients(&world.h1) > before).unwrap();
    };
    let answered = |node: &mut Beam| {
        let answer = |line: &str| line.strip_prefix("ok ").map(str::to_owned);
        node.process.wait_for(SOON, answer).unwrap()
    };

    // It goes on where it stopped.
    let mut dies = nameless(&world);
    begin(&world, &mut dies);
    world.h1.process.signal(Signal::CONT);
    assert_eq!(answered(&mut dies), ":ok", "{}", dies.process.log());
    world.h2.wait_name("late@h1", true, SOON).unwrap();
    dies.expect("Node.stop()", ":ok").unwrap();
    world.h2.wait_name("late@h1", false, SOON).unwrap();

    // Who died meanwhile is not registered, or only for a moment: its name is free.
    let mut late = nameless(&world);
    begin(&world, &mut dies);
    dies.process.kill();
    world.h1.process.signal(Signal::CONT);
    late.expect("Node.start(:late@h1) |> elem(0)", ":ok").unwrap();
    late.expect("Node.stop()", ":ok").unwrap();
    world.h2.wait_name("late@h1", false, SOON).unwrap();
    world.recovers("a VM died while it registered");

    // The agent dies: the node is told at once, and starts with the next one.
    begin(&world, &mut late);
    let at = world.h1.process.kill();
    assert_eq!(answered(&mut late), ":error", "{}", late.process.log());
    println!("told {:?} after the agent's end", at.elapsed());
    late.process.wait_log("unreachable", SOON).unwrap();
    world.restart(true);
    late.expect("Node.start(:late@h1) |> elem(0)", ":ok").unwrap();
    world.h2.wait_name("late@h1", true, SOON).unwrap();
    drop(late);
    world.recovers("the agent died while a VM registered");
}

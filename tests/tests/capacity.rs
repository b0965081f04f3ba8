//! What links cost: memory of idle ones and of those whose reader is slow, and who gets through a crowd.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use meshx_tests::control::Control;
use meshx_tests::{Agent, EchoClient, EchoServer, Mesh, wait_until};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const SOON: Duration = Duration::from_secs(120);
const METRICS: [&str; 2] = ["--http", "127.0.0.1:0"];

/// Two hosts, and clients of them.
struct World {
    h1: Agent,
    h2: Agent,
    server: Control,
    client: Control,
    _mesh: Mesh,
}

impl World {
    fn new() -> Self {
        let limit = getrlimit(Resource::Nofile).maximum;
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )
        .unwrap();
        let mesh = Mesh::new().unwrap();
        let h1 = mesh.agent_with("a", "127.0.0.2", &["h1"], &METRICS).unwrap();
        let h2 = mesh.agent_with("b", "127.0.0.3", &["h2"], &METRICS).unwrap();
        Self {
            server: Control::connect(&h2).unwrap(),
            client: Control::connect(&h1).unwrap(),
            h1,
            h2,
            _mesh: mesh,
        }
    }

    /// An address on the first host that leads to this service on the second.
    fn reach(&self, service: SocketAddr) -> SocketAddr {
        self.server.serve("echo", service, vec![]).unwrap();
        self.client.reach("echo", "web", vec![]).unwrap()
    }

    fn resident(&self) -> [u64; 2] {
        [&self.h1, &self.h2].map(|agent| agent.resident().unwrap())
    }

    fn live(&self) -> [f64; 2] {
        [&self.h1, &self.h2].map(|agent| agent.figure("meshx_links").unwrap())
    }
}

/// An idle link may take 40 KiB of each agent.
#[test]
fn a_thousand_idle_links_take_forty_kibibytes_each() {
    const LINKS: usize = 1000;
    const LIMIT: u64 = 40;
    let world = World::new();
    let echo = EchoServer::start([127, 0, 0, 1]).unwrap();
    let address = world.reach(echo.address());
    // What the first ones need for all.
    let mut links: Vec<_> = (0..50)
        .map(|_| EchoClient::connect(address, SOON).unwrap())
        .collect();
    let before = world.resident();
    links.extend((0..LINKS).map(|_| EchoClient::connect(address, SOON).unwrap()));
    // Each has carried as much as all buffers on its way hold, and is idle then.
    for link in &mut links {
        link.say(&[5; 100_000]).unwrap();
    }
    assert_eq!(world.live(), [links.len() as f64; 2]);
    for ((agent, before), after) in ["dialling", "accepting"].iter().zip(before).zip(world.resident()) {
        let each = after.saturating_sub(before) / LINKS as u64;
        println!("{agent}: {before} KiB, with {LINKS} more links {after} KiB: {each} KiB each");
        assert!(
            each <= LIMIT,
            "{agent}: {each} KiB for an idle link, wanted {LIMIT}"
        );
    }
    drop(links);
    wait_until(SOON, || world.live() == [0.0; 2]).unwrap();
}

/// Silent ones, half hellos and port scans: ten thousand of them, while others go about their business.
#[test]
fn ten_thousand_half_open_connections_hold_nobody_up() {
    const CROWD: usize = 10_000;
    let world = World::new();
    let echo = EchoServer::start([127, 0, 0, 1]).unwrap();
    let address = world.reach(echo.address());
    let mut first = EchoClient::connect(address, SOON).unwrap();
    let inbound: SocketAddr = world.h2.inbound().parse().unwrap();
    let (mut crowd, mut slowest) = (Vec::new(), Duration::ZERO);
    let before = world.resident();
    for at in 0..CROWD {
        let mut stream = TcpStream::connect(inbound).unwrap();
        match at % 3 {
            0 => crowd.push(stream),
            1 => {
                // May have been shown the door already.
                let _ = stream.write_all(&[0x16, 3, 1, 2]);
                crowd.push(stream);
            }
            _ => drop(stream),
        }
        if at % 500 == 0 {
            let began = Instant::now();
            first.say(b"still here").unwrap();
            EchoClient::connect(address, SOON).unwrap();
            slowest = slowest.max(began.elapsed());
        }
    }
    println!(
        "{} half-open connections, the slowest good one took {slowest:?}, resident {before:?} -> {:?} KiB",
        crowd.len(),
        world.resident()
    );
    first.say(&[1; 100_000]).unwrap();
    // Each of them is ended by its time, or made room for newer ones.
    for mut stream in crowd {
        stream.set_read_timeout(Some(SOON)).unwrap();
        let ended = stream.read(&mut [0; 64]);
        assert!(
            !matches!(&ended, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
            "still open: {ended:?}"
        );
    }
    assert!(world.h2.figure("meshx_refusals_total").unwrap() >= (CROWD / 2) as f64);
    first.say(b"and still").unwrap();
}

/// Much goes through, each direction ends for itself, and who does not read holds the sender, not memory.
#[test]
fn a_gibibyte_goes_through_in_constant_memory() {
    // For a run of its own, in GiB; what `make test` does is enough to see memory grow.
    let gib = std::env::var("MESHX_TEST_THROUGH_GIB").map_or(Ok(1), |gib| gib.parse::<usize>());
    let total = gib.unwrap() << 30;
    const MORE: u64 = 16 << 10;
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = world.reach(listener.local_addr().unwrap());
    let chunk: Vec<u8> = (0..1 << 20).map(|at: usize| (at % 251) as u8).collect();

    let mut sender = TcpStream::connect(address).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let before = world.resident();
    let mut most = before;
    let mut look = |what: &str| {
        let now = world.resident();
        for at in 0..2 {
            most[at] = most[at].max(now[at]);
            let more = now[at].saturating_sub(before[at]);
            assert!(more <= MORE, "{what}: {more} KiB more than before, wanted {MORE}");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..total / chunk.len() {
                sender.write_all(&chunk).unwrap();
            }
            sender.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            sender.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, total.to_string(), "the other direction is open still");
        });
        // Nobody reads: all buffers on the way are filled, and the sender waits.
        wait_until(SOON, || world.h1.figure("meshx_link_bytes_total").unwrap() > 1e6).unwrap();
        look("a reader that does not read");
        let (mut seen, mut buffer) = (0, vec![0; 1 << 20]);
        let began = Instant::now();
        loop {
            let n = receiver.read(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            for (at, byte) in buffer[..n].iter().enumerate().step_by(4093) {
                assert_eq!(*byte, ((seen + at) % (1 << 20) % 251) as u8, "byte {}", seen + at);
            }
            if (seen >> 26) != ((seen + n) >> 26) {
                look("bytes go through");
            }
            seen += n;
        }
        println!("{} MiB in {:?}", seen >> 20, began.elapsed());
        receiver.write_all(seen.to_string().as_bytes()).unwrap();
        drop(receiver);
    });
    println!("resident {before:?} -> at most {most:?} KiB");
    wait_until(SOON, || world.live() == [0.0; 2]).unwrap();
}

/// He reads nothing for longer than an agent waits for a host that does not answer.
#[test]
fn a_reader_that_takes_his_time_keeps_his_link() {
    const PAUSE: Duration = Duration::from_secs(40);
    // More than there is room for on the way.
    const TOTAL: usize = 64 << 20;
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = world.reach(listener.local_addr().unwrap());
    let mut sender = TcpStream::connect(address).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    // The service is reached before either agent has its link.
    wait_until(SOON, || world.live() == [1.0; 2]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sender.write_all(&vec![7; TOTAL]).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let cut = wait_until(PAUSE, || world.live() == [0.0; 2]);
        assert!(cut.is_err(), "the link was cut");
        let mut seen = Vec::new();
        receiver.read_to_end(&mut seen).unwrap();
        assert_eq!(seen.len(), TOTAL);
    });
}

/// More at once than one agent decides at a time: they wait, and nobody hears `limit`.
#[test]
fn six_hundred_links_at_once_all_come_through() {
    const LINKS: usize = 600;
    let world = World::new();
    let echo = EchoServer::start([127, 0, 0, 1]).unwrap();
    let address = world.reach(echo.address());
    let dial = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        // May have been refused already.
        let _ = stream.write_all(b"!");
        stream
    };
    let began = Instant::now();
    let (mut waiting, mut again) = ((0..LINKS).map(|_| dial()).collect::<Vec<_>>(), 0);
    let mut through = Vec::new();
    while let Some(mut stream) = waiting.pop() {
        if matches!(stream.read(&mut [0]), Ok(1)) {
            through.push(stream);
        } else {
            // Its time was over, on a busy machine.
            again += 1;
            assert!(
                began.elapsed() < SOON,
                "{} of {LINKS} came through",
                through.len()
            );
            waiting.push(dial());
        }
    }
    println!(
        "{LINKS} links at once after {:?}, {again} of them tried again",
        began.elapsed()
    );
    // Those that were tried again may be ending still.
    wait_until(SOON, || world.live() == [LINKS as f64; 2]).unwrap();
    for agent in [&world.h1, &world.h2] {
        let metrics = agent.metrics().unwrap();
        let limited = |line: &&str| line.starts_with("meshx_refusals_total") && line.contains("\"limit\"");
        for line in metrics.lines().filter(limited) {
            assert!(line.ends_with(" 0"), "{line}");
        }
    }
}

//! Two hosts with a cable between them that can be pulled: network namespaces (network_namespaces(7)) and a veth pair.
//!
//! Agents run in them; their VMs, which know only Unix sockets, may run anywhere. The hosts have the loopback addresses
//! that the embedded mesh wants, each on its own side of the cable (`route_localnet`, ip-sysctl).

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{Context, Process, Result, wait_until};

/// The address of each host.
pub const ADDRESSES: [&str; 2] = ["127.0.0.2", "127.0.0.3"];

/// What goes onto a limited cable at once: a few of the largest packets that TCP hands down.
const BURST: &str = "256kb";
/// The longest that a packet waits before it.
const QUEUE: &str = "50ms";

const CABLE: [&str; 2] = ["mesh0", "mesh1"];

/// The two hosts. They are gone with their last process, and the cable with them.
#[derive(Debug)]
pub struct Network {
    // Nothing but the owner of its namespace.
    hosts: [Process; 2],
}

impl Network {
    /// Makes both hosts, connected.
    ///
    /// # Errors
    /// When this process may not, or the kernel has no such thing: the text says what it takes.
    pub fn new() -> Result<Self> {
        Self::make().map_err(|e| {
            format!("{e}\nthis makes network namespaces: run it as root, with unshare and nsenter (util-linux) and ip (iproute2), on a kernel that has veth and lets it")
        })
    }

    fn make() -> Result<Self> {
        let host = |name| Process::start(name, "unshare", ["--net", "sleep", "infinity"], |_| {});
        let network = Self {
            hosts: [host("host 0")?, host("host 1")?],
        };
        let ours = namespace("self")?;
        for host in &network.hosts {
            let apart = || namespace(host.pid()).is_ok_and(|theirs| theirs != ours);
            wait_until(Duration::from_secs(10), apart)
                .map_err(|()| format!("unshare --net made no namespace\n{}", host.log()))?;
        }
        let pids = network.hosts.each_ref().map(|host| host.pid().to_string());
        let [one, other] = CABLE;
        run(&[
            "ip", "link", "add", one, "netns", &pids[0], "type", "veth", "peer", "name", other, "netns",
            &pids[1],
        ])?;
        for (host, (address, cable)) in ADDRESSES.iter().zip(CABLE).enumerate() {
            network.run(
                host,
                &["sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet"],
            )?;
            network.run(host, &["ip", "link", "set", "lo", "up"])?;
            // Else all of 127.0.0.0/8 is this host.
            network.run(host, &["ip", "address", "del", "127.0.0.1/8", "dev", "lo"])?;
            network.run(
                host,
                &["ip", "address", "add", &format!("{address}/32"), "dev", "lo"],
            )?;
            network.run(host, &["ip", "link", "set", cable, "up"])?;
            network.route(host)?;
        }
        Ok(network)
    }

    /// What starts a program on a host: to be put before its command line.
    pub fn on(&self, host: usize) -> Vec<String> {
        vec![
            "nsenter".into(),
            format!("--net=/proc/{}/ns/net", self.hosts[host].pid()),
        ]
    }

    /// Pulls the cable out of the second host: that one has no way any more, the first one sends into nothing.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn part(&self) -> Result<()> {
        self.run(1, &["ip", "link", "set", CABLE[1], "down"])
    }

    /// Puts it back.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn heal(&self) -> Result<()> {
        self.run(1, &["ip", "link", "set", CABLE[1], "up"])?;
        self.route(1)
    }

    /// Lets no more than so many bits per second onto the cable, each way (token bucket, tc-tbf(8)), with a router's
    /// queue before it.
    ///
    /// # Errors
    /// When `tc` fails.
    pub fn limit(&self, rate: u64) -> Result<()> {
        for (host, cable) in CABLE.iter().enumerate() {
            self.run(
                host,
                &[
                    "tc",
                    "qdisc",
                    "add",
                    "dev",
                    cable,
                    "root",
                    "tbf",
                    "rate",
                    &format!("{rate}bit"),
                    "burst",
                    BURST,
                    "latency",
                    QUEUE,
                ],
            )?;
        }
        Ok(())
    }

    fn route(&self, host: usize) -> Result<()> {
        let other = format!("{}/32", ADDRESSES[1 - host]);
        self.run(
            host,
            &[
                "ip",
                "route",
                "add",
                &other,
                "dev",
                CABLE[host],
                "src",
                ADDRESSES[host],
            ],
        )
    }

    fn run(&self, host: usize, words: &[&str]) -> Result<()> {
        let on = self.on(host);
        run(&on
            .iter()
            .map(String::as_str)
            .chain(words.iter().copied())
            .collect::<Vec<_>>())
    }
}

fn namespace(pid: impl std::fmt::Display) -> Result<std::path::PathBuf> {
    let path = format!("/proc/{pid}/ns/net");
    std::fs::read_link(Path::new(&path)).context(path)
}

fn run(words: &[&str]) -> Result<()> {
    let text = words.join(" ");
    let output = Command::new(words[0]).args(&words[1..]).output().context(&text)?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!(
            "{text}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

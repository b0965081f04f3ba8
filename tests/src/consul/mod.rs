//! Real Consul agents, each alone in a data centre of its own on a loopback address of its own.
//!
//! The program is `$MESHX_CONSUL`, else the one that `scripts/get-consul` put into target/. What differs between
//! versions of Consul is asked for by version here, so that tests need not know.

mod acl;
mod authority;
mod http;
mod intentions;
mod proxy;
mod services;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::acl::{agent_rules, service_rules};
pub use self::authority::{Authority, Issued, Leaf};
use self::http::Http;
pub use self::services::Service;
use crate::process::wait_until;
use crate::{Agent, Context, Process, Result, fetched};

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(60);
/// How long anything that Consul does in milliseconds may take on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// How a Consul agent is to be started. The default: as `consul agent -dev`, no ACLs, plain HTTP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setup {
    /// A data directory: what Consul knows survives [`Consul::kill`] and [`Consul::start_again`].
    pub keeps_state: bool,
    /// ACLs, default-deny. [`Consul::management`] is the token that may do all.
    pub acl: bool,
    /// HTTPS only, with a private authority; clients must show a certificate of it.
    pub tls: bool,
    /// HTTP on a Unix socket only.
    pub unix: bool,
    /// A Connect authority whose key the test holds ([`Consul::connect_ca`]): it can sign what Consul would not.
    pub own_connect_ca: bool,
}

/// A running Consul agent, alone and its own server.
#[derive(Debug)]
pub struct Consul {
    /// The process itself.
    pub process: Process,
    /// What stands before its command line.
    on: Vec<String>,
    setup: Setup,
    dir: TempDir,
    ip: Ipv4Addr,
    ports: u16,
    management: Option<String>,
    https: Option<Authority>,
    connect_ca: Option<Authority>,
    http: Http,
}

impl Consul {
    /// Starts one with the defaults.
    ///
    /// # Errors
    /// When there is no program, or it does not get ready.
    pub fn start() -> Result<Self> {
        Self::start_with(Setup::default())
    }

    /// Starts one.
    ///
    /// # Errors
    /// When there is no program, or it does not get ready.
    pub fn start_with(setup: Setup) -> Result<Self> {
        Self::start_at(setup, own_address(), &[])
    }

    /// Starts one on a host of a [`crate::Network`], at its address. This process, which is not there, asks it at a Unix
    /// socket.
    ///
    /// # Errors
    /// When there is no program, or it does not get ready.
    pub fn start_on(on: &[String], ip: Ipv4Addr) -> Result<Self> {
        let setup = Setup {
            unix: true,
            ..Setup::default()
        };
        Self::start_at(setup, ip, on)
    }

    fn start_at(setup: Setup, ip: Ipv4Addr, on: &[String]) -> Result<Self> {
        // Short: socket paths have 108 bytes.
        let dir = tempfile::Builder::new()
            .prefix("mc")
            .tempdir()
            .context("make a temporary directory")?;
        // Several of one process differ by port, those of others by address.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let ports = 8300 + 10 * NEXT.fetch_add(1, Ordering::Relaxed);
        let management = setup.acl.then(uuid).transpose()?;
        let https = setup.tls.then(|| Authority::new("Consul's HTTPS")).transpose()?;
        let connect_ca = setup
            .own_connect_ca
            .then(|| Authority::new("Connect"))
            .transpose()?;
        if let Some(authority) = &https {
            authority.write_pair(dir.path(), "server", &Leaf::server(ip))?;
            authority.write_pair(dir.path(), "client", &Leaf::client())?;
        }
        let address = if setup.unix {
            format!("unix://{}", dir.path().join("http.sock").display())
        } else {
            let scheme = if setup.tls { "https" } else { "http" };
            format!("{scheme}://{}", SocketAddrV4::new(ip, ports + 1))
        };
        let http = Http::new(
            &address,
            management.as_deref(),
            https.as_ref().map(|_| dir.path()),
        )?;
        let process = run(
            dir.path(),
            &config(
                setup,
                ip,
                ports,
                dir.path(),
                management.as_deref(),
                connect_ca.as_ref(),
                !on.is_empty(),
            ),
            setup.keeps_state,
            on,
        )?;
        let mut consul = Self {
            process,
            on: on.to_vec(),
            setup,
            dir,
            ip,
            ports,
            management,
            https,
            connect_ca,
            http,
        };
        consul.wait_ready()?;
        Ok(consul)
    }

    /// SIGKILL. Returns the moment of the signal.
    pub fn kill(&mut self) -> Instant {
        self.process.kill()
    }

    /// Starts it again at the same address, after [`Consul::kill`]. Unless it [keeps state](Setup::keeps_state) it has
    /// forgotten everything: services, intentions, tokens but the management token, and its Connect authority.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn start_again(&mut self) -> Result<()> {
        let config = config(
            self.setup,
            self.ip,
            self.ports,
            self.dir.path(),
            self.management.as_deref(),
            self.connect_ca.as_ref(),
            !self.on.is_empty(),
        );
        self.process = run(self.dir.path(), &config, self.setup.keeps_state, &self.on)?;
        self.wait_ready()
    }

    /// Removes what a killed one [keeps](Setup::keeps_state): [`Consul::start_again`] then starts it empty.
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub fn lose_state(&self) -> Result<()> {
        std::fs::remove_dir_all(self.dir.path().join("data")).context("remove Consul's data")
    }

    /// The value of `CONSUL_HTTP_ADDR` that reaches it.
    pub fn address(&self) -> &str {
        self.http.address()
    }

    /// The loopback address that is this Consul's own: free for sidecars and services of the same test.
    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// A directory that lives as long as this value, for files of the test.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The token that may do everything, with ACLs.
    pub fn management(&self) -> Option<&str> {
        self.management.as_deref()
    }

    /// The Connect authority, when it is [ours](Setup::own_connect_ca).
    pub fn connect_ca(&self) -> Option<&Authority> {
        self.connect_ca.as_ref()
    }

    /// Environment with which `consul` and `meshx agent` find it: address, token (by file), authority, certificate.
    ///
    /// # Errors
    /// When the token cannot be written to its file.
    pub fn environment(&self, token: Option<&str>) -> Result<Vec<(String, String)>> {
        let mut variables = vec![("CONSUL_HTTP_ADDR".to_owned(), self.address().to_owned())];
        if let Some(token) = token {
            let file = self.token_file(token)?;
            variables.push(("CONSUL_HTTP_TOKEN_FILE".into(), file.display().to_string()));
        }
        if self.https.is_some() {
            for (name, file) in [
                ("CONSUL_CACERT", "ca.pem"),
                ("CONSUL_CLIENT_CERT", "client.pem"),
                ("CONSUL_CLIENT_KEY", "client.key"),
            ] {
                variables.push((name.into(), self.dir.path().join(file).display().to_string()));
            }
        }
        Ok(variables)
    }

    /// A file, mode 0600, that holds this token.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn token_file(&self, token: &str) -> Result<PathBuf> {
        let file = tempfile::Builder::new()
            .prefix("token")
            .tempfile_in(self.dir.path())
            .and_then(|mut file| {
                std::io::Write::write_all(&mut file, token.as_bytes())?;
                Ok(file.keep()?.1)
            })
            .context("write a token")?;
        Ok(file)
    }

    /// Starts `meshx agent --mesh consul` as the host `hosts` at `ip`; with ACLs by the management token.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent(&self, name: &str, ip: &str, hosts: &[&str]) -> Result<Agent> {
        self.agent_with(name, ip, hosts, &[], self.management())
    }

    /// As [`Consul::agent`], with further options and this token.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent_with(
        &self,
        name: &str,
        ip: &str,
        hosts: &[&str],
        options: &[&str],
        token: Option<&str>,
    ) -> Result<Agent> {
        self.agent_at(&[], name, ip, hosts, options, &self.environment(token)?)
    }

    /// As [`Consul::agent`], on a host of the network that this Consul [is on](Consul::start_on).
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent_on(&self, on: &[String], name: &str, ip: &str, hosts: &[&str]) -> Result<Agent> {
        let address = format!("http://{}", SocketAddrV4::new(self.ip, self.ports + 1));
        let environment = [("CONSUL_HTTP_ADDR".to_owned(), address)];
        self.agent_at(on, name, ip, hosts, &[], &environment)
    }

    fn agent_at(
        &self,
        on: &[String],
        name: &str,
        ip: &str,
        hosts: &[&str],
        options: &[&str],
        environment: &[(String, String)],
    ) -> Result<Agent> {
        let (consul, envoy) = (program()?, crate::envoy::program()?);
        let programs = [consul, envoy].map(|path| path.display().to_string());
        let ours = [
            "--mesh",
            "consul",
            "--consul-program",
            &programs[0],
            "--envoy-program",
            &programs[1],
        ];
        let arguments = [&ours, options].concat();
        Agent::start(
            on,
            name,
            &self.dir.path().join(name),
            &format!("{ip}:0"),
            hosts,
            &arguments,
            environment,
        )
    }

    /// Waits until Consul has a leader, knows itself, has a Connect authority and its own tokens (a leader that has just
    /// come back takes a moment to leave the ACLs of old).
    fn wait_ready(&mut self) -> Result<()> {
        let mut last = String::new();
        wait_until(START, || {
            let ready = self.get("/v1/connect/ca/roots").and_then(|roots| {
                let nodes = self.get("/v1/catalog/nodes")?;
                let known = nodes.as_array().is_some_and(|nodes| !nodes.is_empty());
                let signed = roots["Roots"].as_array().is_some_and(|roots| !roots.is_empty());
                if self.management.is_some() {
                    self.get("/v1/acl/token/self")?;
                }
                if known && signed {
                    Ok(())
                } else {
                    Err(format!("nodes {nodes}, roots {roots}"))
                }
            });
            ready.map_err(|e| last = e).is_ok()
        })
        .map_err(|()| {
            format!(
                "Consul was not ready within {START:?}: {last}\n{}",
                self.process.log()
            )
        })
    }
}

/// The program that tests run as Consul.
///
/// # Errors
/// When there is none: the text says how to get it.
pub fn program() -> Result<PathBuf> {
    fetched("MESHX_CONSUL", "consul/usr/bin/consul", "get-consul")
}

/// Its version: major and minor.
///
/// # Errors
/// When it does not say it.
pub fn version() -> Result<(u32, u32)> {
    static VERSION: OnceLock<Result<(u32, u32)>> = OnceLock::new();
    VERSION
        .get_or_init(|| {
            let output = Command::new(program()?)
                .arg("version")
                .output()
                .context("ask Consul's version")?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let numbers = text
                .split_whitespace()
                .find_map(|word| word.strip_prefix('v'))
                .unwrap_or_default();
            let mut numbers = numbers.split('.').map(str::parse);
            match (numbers.next(), numbers.next()) {
                (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
                _ => Err(format!("no version in what consul version says: {text}")),
            }
        })
        .clone()
}

/// A loopback address that belongs to this process: every port of it is free, without asking.
fn own_address() -> Ipv4Addr {
    // Linux gives pids below 2^22. 127.64.0.0 and up is used by nothing else here.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + (high & 0x3f), middle, low)
}

/// Random, in the form that Consul wants for tokens.
fn uuid() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("random bytes")?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Ok(parts.join("-"))
}

fn config(
    setup: Setup,
    ip: Ipv4Addr,
    ports: u16,
    dir: &Path,
    management: Option<&str>,
    connect_ca: Option<&Authority>,
    also_tcp: bool,
) -> Value {
    let (http, https) = if setup.tls {
        (-1, i32::from(ports) + 1)
    } else {
        (i32::from(ports) + 1, -1)
    };
    let file = |name: &str| dir.join(name).display().to_string();
    let mut config = json!({
        "node_name": "host",
        "bind_addr": ip,
        "client_addr": ip,
        "ports": {
            "http": http, "https": https, "grpc": ports + 2, "server": ports, "serf_lan": ports + 3,
            "serf_wan": -1, "dns": -1,
        },
        "connect": {"enabled": true},
        "performance": {"raft_multiplier": 1},
        "disable_update_check": true,
    });
    if setup.keeps_state {
        config["server"] = json!(true);
        config["bootstrap_expect"] = json!(1);
        config["data_dir"] = json!(file("data"));
    }
    if setup.unix {
        let tcp = if also_tcp { format!(" {ip}") } else { String::new() };
        config["addresses"] = json!({"http": format!("unix://{}{tcp}", file("http.sock"))});
    }
    if setup.tls {
        config["ca_file"] = json!(file("ca.pem"));
        config["cert_file"] = json!(file("server.pem"));
        config["key_file"] = json!(file("server.key"));
        config["verify_incoming_https"] = json!(true);
    }
    if let Some(token) = management {
        let initial = if version().is_ok_and(|version| version >= (1, 11)) {
            "initial_management"
        } else {
            "master"
        };
        config["acl"] = json!({
            "enabled": true,
            "default_policy": "deny",
            "tokens": {initial: token, "agent": token},
        });
    }
    if let Some(authority) = connect_ca {
        config["connect"]["ca_provider"] = json!("consul");
        config["connect"]["ca_config"] =
            json!({"private_key": authority.key_pem(), "root_cert": authority.pem()});
    }
    config
}

fn run(dir: &Path, config: &Value, keeps_state: bool, on: &[String]) -> Result<Process> {
    let file = dir.join("consul.json");
    std::fs::write(&file, config.to_string()).context("write Consul's configuration")?;
    let mut words = on.to_vec();
    words.extend([
        program()?.display().to_string(),
        "agent".into(),
        "-config-file".into(),
        file.display().to_string(),
    ]);
    if !keeps_state {
        words.push("-dev".into());
    }
    let first = words.remove(0);
    Process::start("consul", first, words, |_| {})
}

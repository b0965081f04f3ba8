//! Agents of one embedded mesh, each a "host" on its own loopback address.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;

use crate::{Context, Process, Result, program};

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(30);

/// One embedded mesh directory, and a short path for everything else of a test.
#[derive(Debug)]
pub struct Mesh {
    dir: TempDir,
}

impl Mesh {
    /// A new mesh in a temporary directory, removed with it.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new() -> Result<Self> {
        // Short: socket paths have 108 bytes.
        let dir = tempfile::Builder::new()
            .prefix("mx")
            .tempdir()
            .context("make a temporary directory")?;
        Ok(Self { dir })
    }

    /// The directory that holds everything of this mesh.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The embedded mesh's own directory.
    pub fn mesh_dir(&self) -> PathBuf {
        self.dir.path().join("mesh")
    }

    /// Starts the agent `name`, inbound port on `ip`, that owns `hosts`.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent(&self, name: &str, ip: &str, hosts: &[&str]) -> Result<Agent> {
        self.agent_with(name, ip, hosts, &[])
    }

    /// As [`Mesh::agent`], with further options.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent_with(&self, name: &str, ip: &str, hosts: &[&str], options: &[&str]) -> Result<Agent> {
        self.agent_on(&[], name, ip, hosts, options)
    }

    /// As [`Mesh::agent_with`], started by what stands in `on` (see [`crate::Network::on`]).
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent_on(
        &self,
        on: &[String],
        name: &str,
        ip: &str,
        hosts: &[&str],
        options: &[&str],
    ) -> Result<Agent> {
        self.agent_at(on, name, &format!("{ip}:0"), hosts, options)
    }

    /// As [`Mesh::agent_on`], inbound port at `bind`: for those that advertise another address.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn agent_at(
        &self,
        on: &[String],
        name: &str,
        bind: &str,
        hosts: &[&str],
        options: &[&str],
    ) -> Result<Agent> {
        let mesh_dir = self.mesh_dir().display().to_string();
        let arguments = [&["--mesh", "embedded", "--mesh-dir", &mesh_dir], options].concat();
        // The commands of an operator find the mesh by it.
        let environment = [("MESHX_MESH_DIR".to_owned(), mesh_dir.clone())];
        Agent::start(
            on,
            name,
            &self.dir.path().join(name),
            bind,
            hosts,
            &arguments,
            &environment,
        )
    }
}

/// An agent's process and its ready line.
fn spawn(
    on: &[String],
    name: &str,
    program: &Path,
    arguments: &[String],
    environment: &[(String, String)],
) -> Result<(Process, String)> {
    let program = program.display().to_string();
    let mut words = on.iter().chain(std::iter::once(&program)).chain(arguments);
    let first = words.next().cloned().unwrap_or_default();
    let mut process = Process::start(&format!("agent {name}"), first, words, |c| {
        c.env("RUST_LOG", "info").envs(environment.iter().cloned());
    })?;
    let ready = process.wait_for(START, |line| {
        line.starts_with("meshx agent ready").then(|| line.to_owned())
    })?;
    Ok((process, ready))
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// The process itself.
    pub process: Process,
    name: String,
    dir: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    inbound: String,
    http: Option<String>,
    epmd: Option<u16>,
}

impl Agent {
    /// Starts `meshx agent` in `dir`, inbound port at `bind`, that owns `hosts`. The environment is also that of
    /// [`Agent::meshx`]. `on` is put before the command line.
    pub(crate) fn start(
        on: &[String],
        name: &str,
        dir: &Path,
        bind: &str,
        hosts: &[&str],
        options: &[&str],
        environment: &[(String, String)],
    ) -> Result<Self> {
        let mut arguments: Vec<String> = vec![
            "agent".into(),
            "--dir".into(),
            dir.display().to_string(),
            "--bind".into(),
            bind.to_owned(),
        ];
        for host in hosts {
            arguments.extend(["--host".into(), (*host).to_owned()]);
        }
        arguments.extend(options.iter().map(|o| (*o).to_owned()));
        let (process, ready) = spawn(on, name, &program("meshx")?, &arguments, environment)?;
        let field = |name: &str| ready.split(' ').find_map(|field| field.strip_prefix(name));
        Ok(Self {
            process,
            name: name.to_owned(),
            dir: dir.to_owned(),
            arguments,
            environment: environment.to_vec(),
            inbound: field("inbound=").unwrap_or_default().to_owned(),
            http: field("http=").map(str::to_owned),
            epmd: field("epmd=").and_then(|port| port.parse().ok()),
        })
    }

    /// Has it taken over by a process of `program` (`meshx agent --takeover`), which is this agent from now on. Returns
    /// the process that was taken over.
    ///
    /// # Errors
    /// When the new process does not get ready; the old one is this agent still.
    pub fn take_over(&mut self, program: &Path) -> Result<Process> {
        let arguments = [&self.arguments[..], &["--takeover".to_owned()]].concat();
        let (process, ready) = spawn(&[], &self.name, program, &arguments, &self.environment)?;
        if !ready.contains(&format!("inbound={} ", self.inbound)) {
            return Err(format!("{ready}: wanted inbound={}", self.inbound));
        }
        Ok(std::mem::replace(&mut self.process, process))
    }

    /// Its directory, with the sockets.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Address and port where other agents dial it.
    pub fn inbound(&self) -> &str {
        &self.inbound
    }

    /// The port where it is EPMD. It must have been started with `--epmd`.
    ///
    /// # Errors
    /// When it was not.
    pub fn epmd(&self) -> Result<u16> {
        self.epmd.ok_or_else(|| "this agent has no --epmd".to_owned())
    }

    /// Address and port of its pages. It must have been started with `--http`.
    ///
    /// # Errors
    /// When it was not.
    pub fn http(&self) -> Result<&str> {
        self.http
            .as_deref()
            .ok_or_else(|| "this agent has no --http".to_owned())
    }

    /// Its figures, in Prometheus' text form. It must have been started with `--http`.
    ///
    /// # Errors
    /// When it does not give them.
    pub fn metrics(&self) -> Result<String> {
        let address = self.http()?;
        let mut stream = TcpStream::connect(address).context("connect to the agent's HTTP")?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        let mut answer = String::new();
        stream
            .write_all(request.as_bytes())
            .and_then(|()| stream.read_to_string(&mut answer))
            .context("ask for metrics")?;
        if answer.starts_with("HTTP/1.1 200 ") {
            Ok(answer)
        } else {
            Err(format!("no metrics: {answer}"))
        }
    }

    /// The sum of all values of one of its figures.
    ///
    /// # Errors
    /// When it does not give them, or a value is no number.
    pub fn figure(&self, name: &str) -> Result<f64> {
        let metrics = self.metrics()?;
        let of_name = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        };
        let value = |line: &str| line.rsplit(' ').next().unwrap_or_default().parse::<f64>();
        metrics
            .lines()
            .filter(of_name)
            .map(value)
            .sum::<std::result::Result<f64, _>>()
            .context(name)
    }

    /// Memory that it has now (VmRSS, proc(5)), in KiB.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn resident(&self) -> Result<u64> {
        let status = format!("/proc/{}/status", self.process.pid());
        let status = std::fs::read_to_string(&status).context(&status)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.ok_or("no VmRSS")?.parse().context("VmRSS")
    }

    /// Runs `meshx` with these arguments against this agent.
    ///
    /// # Errors
    /// When it cannot be started; its own failure is in the output.
    pub fn meshx(&self, arguments: &[&str]) -> Result<Output> {
        Command::new(program("meshx")?)
            .args(arguments)
            .env("MESHX_DIR", &self.dir)
            .envs(self.environment.iter().cloned())
            .output()
            .context("run meshx")
    }

    /// As [`Agent::meshx`]; its standard output, and an error when it fails.
    ///
    /// # Errors
    /// When the program exits with another code than 0.
    pub fn meshx_ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.meshx(arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok(text)
        } else {
            let error = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "meshx {}: {}: {text}{error}",
                arguments.join(" "),
                output.status
            ))
        }
    }

    /// Waits until `meshx names` at this agent lists `node` (or does not, when `present` is false).
    ///
    /// # Errors
    /// When it stays otherwise for `timeout`.
    pub fn wait_name(&self, node: &str, present: bool, timeout: Duration) -> Result<()> {
        let mut last = String::new();
        crate::process::wait_until(timeout, || {
            last = self.meshx_ok(&["names"]).unwrap_or_else(|e| e);
            last.split_whitespace().any(|word| word == node) == present
        })
        .map_err(|()| format!("{node}: present should be {present} within {timeout:?}, names says:\n{last}"))
    }
}

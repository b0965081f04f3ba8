//! Real BEAM nodes that answer one Elixir expression a line (`tests/support/console.exs`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Agent, Context, Process, Result, fetched, program, repository, wait_until};

/// The cookie of every node in tests and demo.
pub const COOKIE: &str = "meshx-test-cookie";

const START: Duration = Duration::from_secs(60);
const EVAL: Duration = Duration::from_secs(120);
/// How long what another process brings about by itself may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// How a node is to be started.
#[derive(Debug, Clone)]
pub struct BeamBuilder {
    name: String,
    run_options: Vec<String>,
    erl: String,
    apps: Vec<String>,
    otp: Option<&'static str>,
}

impl BeamBuilder {
    /// A node of this full name.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            run_options: Vec::new(),
            erl: String::new(),
            apps: vec!["meshx".into()],
            otp: None,
        }
    }

    /// Runs on this OTP out of `scripts/get-otp`, with what was compiled for it.
    #[must_use]
    pub fn otp(mut self, version: &'static str) -> Self {
        self.otp = Some(version);
        self
    }

    /// Options of `meshx run`.
    #[must_use]
    pub fn run_options(mut self, options: &[&str]) -> Self {
        self.run_options.extend(options.iter().map(|o| (*o).to_owned()));
        self
    }

    /// Emulator flags, as in `elixir --erl`.
    #[must_use]
    pub fn erl(mut self, flags: &str) -> Self {
        self.erl = flags.into();
        self
    }

    /// Applications to start besides `:meshx`.
    #[must_use]
    pub fn app(mut self, app: &str) -> Self {
        self.apps.push(app.into());
        self
    }

    /// Starts it with `meshx run` at this agent, and waits until it answers.
    ///
    /// # Errors
    /// When it does not boot: the text has its output.
    pub fn start(self, agent: &Agent) -> Result<Beam> {
        let mut beam = self.spawn(agent)?;
        beam.process
            .wait_for(START, |line| line.starts_with("ready ").then_some(()))?;
        Ok(beam)
    }

    /// Starts it without waiting: for nodes that should fail to boot.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn spawn(self, agent: &Agent) -> Result<Beam> {
        self.spawn_with("MESHX_DIR", agent.dir())
    }

    /// Starts it for a user with this `XDG_RUNTIME_DIR`, and waits until it answers: `meshx run` is to find the agent
    /// or to start one.
    ///
    /// # Errors
    /// When it does not boot: the text has its output.
    pub fn start_for(self, runtime_dir: &Path) -> Result<Beam> {
        let mut beam = self.spawn_with("XDG_RUNTIME_DIR", runtime_dir)?;
        beam.process
            .wait_for(START, |line| line.starts_with("ready ").then_some(()))?;
        Ok(beam)
    }

    fn spawn_with(self, variable: &str, directory: &Path) -> Result<Beam> {
        let mut arguments = vec![
            "run".to_owned(),
            self.name.clone(),
            "--cookie".into(),
            COOKIE.into(),
        ];
        let libraries = libraries(self.otp);
        let ebin = ebin_on(self.otp);
        arguments.extend(["--ebin".into(), ebin.display().to_string()]);
        arguments.extend(self.run_options);
        arguments.extend(["--".into(), "elixir".into()]);
        arguments.extend(console(&libraries, &self.erl, &self.apps));
        let path = match self.otp {
            None => None,
            Some(version) => Some(otp_path(version)?),
        };
        start(
            self.name,
            program("meshx")?,
            arguments,
            path,
            (variable, directory),
        )
    }

    /// Starts a VM without a name, by hand and not by `meshx run`: it may start distribution later.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn start_nameless(self, agent: &Agent) -> Result<Beam> {
        let flags = format!("-proto_dist meshx -no_epmd -setcookie {COOKIE} {}", self.erl);
        let arguments = console(&libraries(None), &flags, &self.apps);
        let mut beam = start(
            self.name,
            "elixir".into(),
            arguments,
            None,
            ("MESHX_DIR", agent.dir()),
        )?;
        beam.process
            .wait_for(START, |line| line.starts_with("ready ").then_some(()))?;
        Ok(beam)
    }
}

/// The arguments of `elixir` for a VM that answers expressions.
fn console(libraries: &Path, erl: &str, apps: &[String]) -> Vec<String> {
    let mut arguments = vec!["-pa".to_owned(), format!("{}/*/ebin", libraries.display())];
    if !erl.is_empty() {
        arguments.extend(["--erl".into(), erl.into()]);
    }
    arguments.push(
        repository()
            .join("tests/support/console.exs")
            .display()
            .to_string(),
    );
    arguments.extend(apps.iter().cloned());
    arguments
}

fn start(
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    path: Option<OsString>,
    (variable, directory): (&str, &Path),
) -> Result<Beam> {
    let process = Process::start(&name, program, arguments, |command| {
        command.env(variable, directory);
        if let Some(path) = path {
            command.env("PATH", path);
        }
    })
    .context("start a node")?;
    Ok(Beam { process, name })
}

/// Whether this OTP is here, and the carrier compiled for it.
pub fn has_otp(version: &str) -> bool {
    otp_path(version).is_ok() && ebin_on(Some(version)).is_dir()
}

/// The search path with the programs of this OTP in front.
///
/// # Errors
/// When `scripts/get-otp` has not fetched it.
pub fn otp_path(version: &str) -> Result<OsString> {
    let erl = fetched(
        "",
        &format!("otp/{version}/bin/erl"),
        &format!("get-otp {version}"),
    )?;
    let bin = erl.parent().map(Path::to_owned).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(bin).chain(std::env::split_paths(&path)))
        .context("put an OTP into the search path")
}

/// Where the carrier is.
pub fn ebin() -> PathBuf {
    ebin_on(None)
}

/// Where the carrier is that was compiled for this OTP out of `scripts/get-otp`.
pub fn ebin_on(otp: Option<&str>) -> PathBuf {
    libraries(otp).join("meshx/ebin")
}

/// Where `make build` and `make test` put the compiled example with its dependency `:meshx`: for the VM on the search
/// path below mix' own `$MIX_BUILD_ROOT`, for another OTP below `_build/otp-VERSION`.
fn libraries(otp: Option<&str>) -> PathBuf {
    let root = match otp {
        Some(version) => format!("_build/otp-{version}"),
        None => std::env::var("MIX_BUILD_ROOT").unwrap_or_else(|_| "_build".to_owned()),
    };
    repository().join("examples/shop").join(root).join("prod/lib")
}

/// A running node.
#[derive(Debug)]
pub struct Beam {
    /// The process itself.
    pub process: Process,
    name: String,
}

impl Beam {
    /// Starts a node with the defaults.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn start(agent: &Agent, name: &str) -> Result<Self> {
        BeamBuilder::new(name).start(agent)
    }

    /// Its node name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Evaluates one line of Elixir. The value as `inspect` prints it.
    ///
    /// # Errors
    /// When the expression fails: what it raised.
    pub fn eval(&mut self, expression: &str) -> Result<String> {
        self.process.write_line(expression)?;
        self.process.wait_for(EVAL, |line| {
            let ok = line.strip_prefix("ok ").map(|value| Ok(value.to_owned()));
            ok.or_else(|| {
                line.strip_prefix("error ")
                    .map(|e| Err(format!("{expression}: {e}")))
            })
        })?
    }

    /// Evaluates, and holds the value against what it should be.
    ///
    /// # Errors
    /// When it is another, or the expression fails.
    pub fn expect(&mut self, expression: &str, value: &str) -> Result<()> {
        let seen = self.eval(expression)?;
        if seen == value {
            Ok(())
        } else {
            Err(format!(
                "{}: {expression}: seen {seen}, wanted {value}",
                self.name
            ))
        }
    }
    /// Evaluates until the value is as it should be: for what is so a moment after the caller has reason to ask. The end
    /// that was dialled, for one, knows of a link after the one that dialled.
    ///
    /// # Errors
    /// As [`Beam::expect`], when it still is so after a minute.
    pub fn expect_soon(&mut self, expression: &str, value: &str) -> Result<()> {
        let mut last = Ok(());
        let _ = wait_until(SOON, || {
            last = self.expect(expression, value);
            last.is_ok()
        });
        last
    }
}

//! `meshx allow`, `meshx deny`, `meshx rules`: who may talk in the embedded mesh. `meshx rotate`: its certificates.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{EX_NOPERM, EX_SOFTWARE, EX_UNAVAILABLE, Failure, block_on, connect, print, table};
use crate::{
    agent::paths,
    mesh::{
        MeshError, ServiceName,
        embedded::{Action, MeshDir, Pattern, Rotation, Rule, Rules, rotate},
    },
};

#[derive(Debug, clap::Args)]
struct MeshOption {
    /// Directory of the embedded mesh [default: $MESHX_MESH_DIR, $XDG_RUNTIME_DIR/meshx-mesh, /tmp/meshx-mesh-UID]
    #[arg(long, value_name = "DIR")]
    mesh_dir: Option<PathBuf>,
}

/// Set the rule for a pair of services of the embedded mesh
///
/// It holds for new links at once. A distribution link needs both directions.
#[derive(Debug, clap::Args)]
pub(super) struct PairArgs {
    /// Service that dials, a node of it, or * for any
    source: String,
    /// Service that is dialled, a node of it, or * for any
    destination: String,
    #[command(flatten)]
    mesh: MeshOption,
}

/// List or change the rules of the embedded mesh
#[derive(Debug, clap::Args)]
pub(super) struct RulesArgs {
    /// Print the rules as JSON
    #[arg(long)]
    json: bool,
    /// Remove the rule for a pair
    #[arg(long, num_args = 2, value_names = ["SOURCE", "DESTINATION"])]
    remove: Option<Vec<String>>,
    /// Set what holds when no rule matches: allow or deny
    #[arg(long, value_name = "ACTION")]
    default: Option<String>,
    #[command(flatten)]
    mesh: MeshOption,
}

/// Exchange the certificates of the embedded mesh, under traffic
///
/// Without an option all agents get new leaves. Live links prove themselves anew and stay.
#[derive(Debug, clap::Args)]
pub(super) struct RotateArgs {
    /// Make a new root that signs from now on; those before stay believed until --forget
    #[arg(long, conflicts_with = "forget")]
    root: bool,
    /// Believe only the root that signs; links that do not prove themselves anew by it are cut
    #[arg(long)]
    forget: bool,
    #[command(flatten)]
    mesh: MeshOption,
}

pub(super) fn rotate_certificates(args: &RotateArgs) -> Result<ExitCode, Failure> {
    let rotation = match (args.root, args.forget) {
        (true, _) => Rotation::Root,
        (_, true) => Rotation::Forget,
        _ => Rotation::Leaves,
    };
    rotate(&args.mesh.open()?, rotation)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn allow(args: &PairArgs) -> Result<ExitCode, Failure> {
    set(args, Action::Allow)
}

pub(super) fn deny(args: &PairArgs) -> Result<ExitCode, Failure> {
    set(args, Action::Deny)
}

pub(super) fn run(args: &RulesArgs) -> Result<ExitCode, Failure> {
    let dir = args.mesh.open()?;
    if let Some(action) = &args.default {
        Rules::set_default(&dir, action_of(action)?)?;
    }
    if let Some([source, destination]) = args.remove.as_deref() {
        let (source, destination) = (pattern(source)?, pattern(destination)?);
        if !Rules::remove(&dir, &source, &destination)? {
            return Err(Failure::usage(format!(
                "there is no rule for {source} -> {destination}"
            )));
        }
    }
    let rules = Rules::load(&dir)?;
    if args.json {
        let json = serde_json::to_string_pretty(&rules);
        let json = json.map_err(|error| Failure::new(EX_SOFTWARE, error.to_string()))?;
        print(&format!("{json}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows: Vec<[String; 3]> = rules
        .rules
        .iter()
        .map(|rule| {
            [
                rule.source.to_string(),
                rule.destination.to_string(),
                word(rule.action).to_owned(),
            ]
        })
        .collect();
    rows.sort();
    rows.push([
        "(default)".to_owned(),
        String::new(),
        word(rules.default).to_owned(),
    ]);
    print(&table(["SOURCE", "DESTINATION", "ACTION"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

impl MeshOption {
    fn open(&self) -> Result<MeshDir, Failure> {
        let dir = paths::mesh_dir(self.mesh_dir.as_deref());
        let there = dir.join("mesh.json").try_exists().map_err(|error| {
            let code = match error.kind() {
                ErrorKind::PermissionDenied => EX_NOPERM,
                _ => EX_UNAVAILABLE,
            };
            Failure::new(code, format!("cannot look into {}: {error}", dir.display()))
        })?;
        if !there {
            return Err(Failure::new(
                EX_UNAVAILABLE,
                format!(
                    "there is no embedded mesh in {dir}; name its directory with --mesh-dir or ${variable}, or \
                     start an agent in it: meshx agent --mesh embedded --mesh-dir {dir}",
                    dir = dir.display(),
                    variable = paths::MESH_DIR_VARIABLE
                ),
            ));
        }
        let found = MeshDir::open(&dir)?;
        if self.mesh_dir.is_none() {
            is_of_the_agent(&found, &dir)?;
        }
        Ok(found)
    }
}

/// A rule in another mesh than that of this host's agent would be said to be set, and hold for nobody here. Without
/// an agent there is none that could be meant.
fn is_of_the_agent(found: &MeshDir, dir: &Path) -> Result<(), Failure> {
    let Ok(client) = block_on(connect(None)) else {
        return Ok(());
    };
    let hello = client.hello();
    if found.trust_domain()?.as_ref() == Some(&hello.trust_domain) {
        return Ok(());
    }
    let agent = client.dir().display();
    Err(Failure::usage(match hello.mesh.as_str() {
        "embedded" => format!(
            "the agent in {agent} is of another mesh than that in {}; name its directory with --mesh-dir or \
             ${}, as the agent's own command line has it",
            dir.display(),
            paths::MESH_DIR_VARIABLE
        ),
        mesh => format!(
            "the agent in {agent} is on {mesh}, and who may talk is for the rules there, as intentions of \
             Consul; an embedded mesh is named with --mesh-dir"
        ),
    }))
}

impl From<MeshError> for Failure {
    fn from(error: MeshError) -> Self {
        let code = match error {
            MeshError::Unavailable(_) => EX_UNAVAILABLE,
            _ => EX_NOPERM,
        };
        Self::new(code, error.to_string())
    }
}

fn set(args: &PairArgs, action: Action) -> Result<ExitCode, Failure> {
    let (source, destination) = (pattern(&args.source)?, pattern(&args.destination)?);
    let text = format!("{} {source} -> {destination}\n", word(action));
    Rules::set(
        &args.mesh.open()?,
        Rule {
            source,
            destination,
            action,
        },
    )?;
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// A service, a node that stands for its service, or `*`.
fn pattern(text: &str) -> Result<Pattern, Failure> {
    let wrong = |error| Failure::usage(format!("{text:?}: {error}"));
    match text.contains('@') {
        true => Ok(Pattern::Exact(ServiceName::from_node(text).map_err(wrong)?)),
        false => text.parse().map_err(wrong),
    }
}

fn action_of(text: &str) -> Result<Action, Failure> {
    match text {
        "allow" => Ok(Action::Allow),
        "deny" => Ok(Action::Deny),
        other => Err(Failure::usage(format!("default {other:?}: wanted allow or deny"))),
    }
}

fn word(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
    }
}

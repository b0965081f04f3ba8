//! `meshx names`.

use std::process::ExitCode;

use meshx_etf::Term;

use super::{AgentOption, EX_SOFTWARE, Failure, block_on, connect, print, table};
use crate::agent::control::message::map;

/// List the nodes of the mesh
#[derive(Debug, clap::Args)]
pub(super) struct NamesArgs {
    #[command(flatten)]
    agent: AgentOption,
}

pub(super) fn run(args: &NamesArgs) -> Result<ExitCode, Failure> {
    let answer = block_on(async {
        let client = connect(args.agent.dir.as_deref()).await?;
        Ok(client.request("names", map([])).await?)
    })?;
    let nodes = answer.map_get("nodes").and_then(Term::as_list);
    let nodes = nodes.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no nodes"))?;
    let mut rows: Vec<[String; 4]> = nodes
        .iter()
        .map(|node| {
            let text = |key| {
                node.map_get(key)
                    .and_then(Term::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let local = node.map_get("local").and_then(Term::as_bool) == Some(true);
            let place = if local { "local" } else { "remote" };
            [text("node"), text("service"), text("agent"), place.to_owned()]
        })
        .collect();
    rows.sort();
    print(&table(["NODE", "SERVICE", "AGENT", "PLACE"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

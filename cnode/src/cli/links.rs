//! `meshx links`.

use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::Value;

use super::answer::{ask, json, list, print_json, text};
use super::{AgentOption, Failure, print, table};
use crate::agent::control::message::map;

/// List the live links of the agent, with the identities proven at both ends
#[derive(Debug, clap::Args)]
pub(super) struct LinksArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON array of objects, with all that is known
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &LinksArgs) -> Result<ExitCode, Failure> {
    let answer = ask(&args.agent, "links", map([]))?;
    let mut links: Vec<&Term> = list(&answer, "links")?;
    links.sort_by_key(|link| ["local", "remote", "id"].map(|key| text(link, key)));
    if args.json {
        return print_json(&links.into_iter().map(json).collect::<Value>());
    }
    let rows: Vec<[String; 7]> = links
        .into_iter()
        .map(|link| {
            [
                "local",
                "direction",
                "remote",
                "purpose",
                "remote_spiffe",
                "bytes_in",
                "bytes_out",
            ]
            .map(|key| match key {
                "remote_spiffe" => identity(link),
                key => text(link, key),
            })
        })
        .collect();
    print(&table(
        [
            "LOCAL",
            "DIRECTION",
            "REMOTE",
            "PURPOSE",
            "REMOTE IDENTITY",
            "BYTES IN",
            "BYTES OUT",
        ],
        &rows,
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Who is at the other end, and whether the agent knows it or has been told.
fn identity(link: &Term) -> String {
    let identity = text(link, "remote_spiffe");
    match link.map_get("verified").and_then(Term::as_bool) {
        Some(false) => format!("{identity} (unverified)"),
        _ => identity,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_that_nothing_proves_is_marked() {
        let link = |verified| {
            map([
                ("remote_spiffe", Term::binary("spiffe://x")),
                ("verified", Term::from(verified)),
            ])
        };
        assert_eq!(identity(&link(true)), "spiffe://x");
        assert_eq!(identity(&link(false)), "spiffe://x (unverified)");
        assert_eq!(json(&link(false))["verified"], Value::Bool(false));
    }
}

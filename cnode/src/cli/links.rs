//! `meshx links`.

use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::{Map, Value};

use super::{AgentOption, EX_SOFTWARE, Failure, block_on, connect, print, table};
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
    let answer = block_on(async {
        let client = connect(args.agent.dir.as_deref()).await?;
        Ok(client.request("links", map([])).await?)
    })?;
    let links = answer.map_get("links").and_then(Term::as_list);
    let links = links.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no links"))?;
    let mut links: Vec<&Term> = links.iter().collect();
    links.sort_by_key(|link| ["local", "remote", "id"].map(|key| text(link, key)));
    if args.json {
        let all = Value::Array(links.into_iter().map(json).collect());
        print(&format!("{all:#}\n"))?;
        return Ok(ExitCode::SUCCESS);
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

/// A value of the flat map that a link is, for people.
fn text(link: &Term, key: &str) -> String {
    match link.map_get(key) {
        Some(Term::Atom(atom)) => atom.as_str().to_owned(),
        Some(term) => term.as_str().map_or_else(|| term.to_string(), str::to_owned),
        None => String::new(),
    }
}

fn json(link: &Term) -> Value {
    let pairs = link.as_map().into_iter().flat_map(|map| map.iter());
    let pairs = pairs.filter_map(|(key, value)| Some((key.as_atom()?.to_owned(), json_value(value))));
    Value::Object(pairs.collect::<Map<_, _>>())
}

fn json_value(value: &Term) -> Value {
    match value {
        Term::Int(number) => (*number).into(),
        Term::Atom(atom) => value.as_bool().map_or_else(|| atom.as_str().into(), Value::Bool),
        other => other
            .as_str()
            .map_or_else(|| other.to_string().into(), Into::into),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
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

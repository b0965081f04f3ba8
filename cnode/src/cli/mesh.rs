//! `meshx services`, `meshx intentions` and `meshx certs`: what the mesh has, as the agent sees it.

use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::Value;

use super::answer::{ask, json, list, moment, print_json, text};
use super::{AgentOption, Failure, print, table};
use crate::agent::control::message::map;
use crate::proxy::{links::unix_now, why::span};

/// Longest status in a table; `--json` has all of it.
const STATUS_SHOWN: usize = 40;

/// List all instances of services of the mesh, passing or not
#[derive(Debug, clap::Args)]
pub(super) struct ServicesArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON array with one object per instance
    #[arg(long)]
    json: bool,
}

/// List the rules of the mesh, the first that fits a pair decides
#[derive(Debug, clap::Args)]
pub(super) struct IntentionsArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON object with the default and the rules
    #[arg(long)]
    json: bool,
}

/// List the certificates of this agent's services, and the roots of the mesh
///
/// Serial numbers and issuers are in the JSON.
#[derive(Debug, clap::Args)]
pub(super) struct CertsArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON object with certificates and roots
    #[arg(long)]
    json: bool,
}

pub(super) fn services(args: &ServicesArgs) -> Result<ExitCode, Failure> {
    let answer = ask(&args.agent, "services", map([]))?;
    let mut services = list(&answer, "services")?;
    services.sort_by_key(|service| ["name", "id"].map(|key| text(service, key)));
    if args.json {
        return print_json(&services.into_iter().map(json).collect::<Value>());
    }
    let row = |service: &Term| {
        let local = service.map_get("local").and_then(Term::as_bool) == Some(true);
        let tags = service.map_get("tags").map(json).unwrap_or_default();
        let tags = tags.as_array().into_iter().flatten().filter_map(Value::as_str);
        [
            text(service, "name"),
            text(service, "id"),
            text(service, "address"),
            text(service, "protocol"),
            if local { "local" } else { "remote" }.to_owned(),
            shortened(&text(service, "status")),
            tags.collect::<Vec<_>>().join(","),
        ]
    };
    let rows: Vec<_> = services.into_iter().map(row).collect();
    let head = ["SERVICE", "ID", "AGENT", "PROTOCOL", "PLACE", "STATUS", "TAGS"];
    print(&table(head, &rows))?;
    Ok(ExitCode::SUCCESS)
}

/// The beginning of a text that somebody else chose, on one line.
fn shortened(status: &str) -> String {
    let line = status.split(char::is_control).next().unwrap_or_default();
    match line.chars().count() > STATUS_SHOWN || line.len() < status.len() {
        true => format!("{}...", line.chars().take(STATUS_SHOWN).collect::<String>()),
        false => line.to_owned(),
    }
}

pub(super) fn intentions(args: &IntentionsArgs) -> Result<ExitCode, Failure> {
    let answer = ask(&args.agent, "intentions", map([]))?;
    let rules = list(&answer, "intentions")?;
    if args.json {
        return print_json(&json(&answer));
    }
    let row = |rule: &Term| ["source", "destination", "action"].map(|key| text(rule, key));
    let mut rows: Vec<_> = rules.into_iter().map(row).collect();
    rows.push(["(default)".to_owned(), String::new(), text(&answer, "default")]);
    print(&table(["SOURCE", "DESTINATION", "ACTION"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn certs(args: &CertsArgs) -> Result<ExitCode, Failure> {
    let answer = ask(&args.agent, "certs", map([]))?;
    let (certs, roots) = (list(&answer, "certs")?, list(&answer, "roots")?);
    if args.json {
        return print_json(&json(&answer));
    }
    let row = |cert: &Term| {
        let [service, chain, spiffe, fault] =
            ["service", "chain", "spiffe", "text"].map(|key| text(cert, key));
        match fault.is_empty() {
            true => [service, expiry(cert), chain, spiffe],
            false => [service, format!("none: {fault}"), chain, spiffe],
        }
    };
    let rows: Vec<_> = certs.into_iter().map(row).collect();
    let certs = table(["SERVICE", "EXPIRES", "CHAIN", "IDENTITY"], &rows);
    let row = |root: &Term| [text(root, "subject"), expiry(root)];
    let rows: Vec<_> = roots.into_iter().map(row).collect();
    print(&format!("{certs}\n{}", table(["ROOT", "EXPIRES"], &rows)))?;
    Ok(ExitCode::SUCCESS)
}

fn expiry(cert: &Term) -> String {
    let Some(at) = cert.map_get("not_after").and_then(Term::as_int) else {
        return String::new();
    };
    match at - unix_now() {
        left @ 1.. => format!("{} (in {})", moment(at), span(left)),
        left => format!("{} ({} ago)", moment(at), span(-left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_short_line() {
        assert_eq!(shortened("passing"), "passing");
        assert_eq!(shortened("critical: a\nb"), "critical: a...");
        assert_eq!(
            shortened(&"x".repeat(50)),
            format!("{}...", "x".repeat(STATUS_SHOWN))
        );
    }
}

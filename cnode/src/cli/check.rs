//! `meshx check`.

use std::process::ExitCode;

use meshx_etf::Term;

use super::answer::{ask, json, print_json};
use super::{AgentOption, EX_SOFTWARE, Failure, print};
use crate::agent::control::message::{map, text};

/// Say whether one service or node may talk to another, and why
///
/// Exit code 0 when it may, 1 when it may not.
#[derive(Debug, clap::Args)]
pub(super) struct CheckArgs {
    /// Node or service that dials
    from: String,
    /// Node or service that is dialled
    to: String,
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON object with the decision
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let pair = map([("from", text(&args.from)), ("to", text(&args.to))]);
    let answer = ask(&args.agent, "check", pair)?;
    let allowed = answer.map_get("allowed").and_then(Term::as_bool);
    let allowed = allowed.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no decision"))?;
    if args.json {
        print_json(&json(&answer))?;
        return Ok(if allowed {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let why = answer.map_get("text").and_then(Term::as_str).unwrap_or_default();
    let (from, to) = (&args.from, &args.to);
    if allowed {
        print(&format!("allowed: {from} -> {to}: {why}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let cause = answer
        .map_get("cause")
        .and_then(Term::as_atom)
        .unwrap_or("unknown");
    print(&format!("denied: {from} -> {to}: {cause}: {why}\n"))?;
    Ok(ExitCode::FAILURE)
}

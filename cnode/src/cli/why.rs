//! `meshx why`.

use std::process::ExitCode;

use meshx_etf::Term;

use super::answer::{ask, json, list, print_json, text};
use super::report::{Row, report};
use super::{AgentOption, EX_NOPERM, EX_SOFTWARE, Failure, print};
use crate::agent::control::message::{map, text as binary};

/// Say step by step why one node or service may talk to another, or may not and what to do
///
/// Walks the decision on a link as this host's agent makes it, other agent and certificates included, and stops at the
/// first no. Ask on the host of SOURCE: elsewhere its agent is not tried. Exit code 0 when it may, 77 when it may not.
#[derive(Debug, clap::Args)]
pub(super) struct WhyArgs {
    /// Node or service that dials
    source: String,
    /// Node or service that is dialled
    target: String,
    #[command(flatten)]
    agent: AgentOption,
    /// Print a JSON object with decision and steps
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &WhyArgs) -> Result<ExitCode, Failure> {
    let pair = map([("from", binary(&args.source)), ("to", binary(&args.target))]);
    let answer = ask(&args.agent, "why", pair)?;
    let allowed = answer.map_get("allowed").and_then(Term::as_bool);
    let allowed = allowed.ok_or_else(|| Failure::new(EX_SOFTWARE, "the agent's answer has no decision"))?;
    let steps = list(&answer, "steps")?;
    let code = if allowed {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EX_NOPERM)
    };
    if args.json {
        print_json(&json(&answer))?;
        return Ok(code);
    }
    let row = |step: &Term| Row {
        level: match step.map_get("ok").and_then(Term::as_bool) {
            Some(true) => "ok".to_owned(),
            _ => "no".to_owned(),
        },
        what: text(step, "what"),
        text: text(step, "text"),
        fix: text(step, "fix"),
    };
    let rows: Vec<_> = steps.into_iter().map(row).collect();
    let verdict = match allowed {
        true => "allowed".to_owned(),
        false => format!("refused with {}", text(&answer, "cause")),
    };
    let (source, target) = (&args.source, &args.target);
    print(&format!("{}{source} -> {target}: {verdict}\n", report(&rows)))?;
    Ok(code)
}

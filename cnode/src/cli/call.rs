//! `meshx ping`, `meshx call` and `meshx send`: a hidden node that joins, does one thing, and leaves.

use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::Value;

use super::caller::{CallerArgs, call_failure, rpc_failure, send_failure};
use super::json::{from_json, to_json};
use super::{Failure, block_on, print};

/// Ask a node whether it answers
///
/// Joins the cluster as a hidden node and prints pong and the time that it took, or says on stderr why not.
#[derive(Debug, clap::Args)]
pub(super) struct PingArgs {
    /// The node to ask, as name@host
    node: String,
    #[command(flatten)]
    caller: CallerArgs,
}

/// Call a function on a node and print its result
///
/// ARGS is a JSON array with one element per argument. Strings become binaries, null becomes nil, true and false
/// themselves, numbers integers or floats, arrays lists, objects maps with binary keys. What JSON lacks is an object
/// with one member: {"$atom": "x"}, {"$tuple": [1, 2]}, {"$charlist": "text"}, {"$atoms": {"key": 1}} and more
/// (docs/cli.md). Exit code 1: the function failed.
#[derive(Debug, clap::Args)]
pub(super) struct CallArgs {
    /// The node to call, as name@host
    node: String,
    /// Module; one of Elixir with its full name, Elixir.String for example
    module: String,
    /// Function
    function: String,
    /// Arguments as a JSON array
    #[arg(default_value = "[]")]
    args: String,
    /// Print the result as JSON, in the forms that ARGS has, instead of as Erlang prints it
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    caller: CallerArgs,
}

/// Send a message to a registered process
///
/// Exit code 0 says that the node was reached and the message written. As in Erlang, nothing tells whether a process of
/// this name is there.
#[derive(Debug, clap::Args)]
pub(super) struct SendArgs {
    /// The node of the process, as name@host
    node: String,
    /// The registered name
    process: String,
    /// The message as JSON, in the forms of meshx call
    term: String,
    /// Send it as GenServer.cast does
    #[arg(long)]
    cast: bool,
    #[command(flatten)]
    caller: CallerArgs,
}

pub(super) fn ping(args: &PingArgs) -> Result<ExitCode, Failure> {
    let timeout = args.caller.timeout();
    let took = block_on(async {
        let node = args.caller.join(&args.node).await?;
        let started = std::time::Instant::now();
        let answer = node.ping(&args.node, timeout).await;
        let took = started.elapsed();
        node.stop().await;
        answer.map(|()| took).map_err(call_failure)
    })?;
    print(&format!(
        "pong from {} in {} us, connecting included\n",
        args.node,
        took.as_micros()
    ))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn call(args: &CallArgs) -> Result<ExitCode, Failure> {
    let terms = arguments(&args.args)?;
    let timeout = args.caller.timeout();
    let result = block_on(async {
        let node = args.caller.join(&args.node).await?;
        let result = node
            .rpc(&args.node, &args.module, &args.function, terms, timeout)
            .await;
        node.stop().await;
        result.map_err(rpc_failure)
    })?;
    print(&match args.json {
        true => format!("{}\n", to_json(&result)),
        false => format!("{result}\n"),
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn send(args: &SendArgs) -> Result<ExitCode, Failure> {
    let term = serde_json::from_str(&args.term)
        .map_err(|error| error.to_string())
        .and_then(from_json)
        .map_err(|error| Failure::usage(format!("TERM: {error}")))?;
    let timeout = args.caller.timeout();
    block_on(async {
        let node = args.caller.join(&args.node).await?;
        let to = (args.process.as_str(), args.node.as_str());
        let sending = async {
            match args.cast {
                true => node.gen_cast(to, term).await,
                false => node.send(to, &term).await,
            }
        };
        let sent = tokio::time::timeout(timeout, sending).await;
        // What is queued is still written.
        node.stop().await;
        match sent {
            Ok(sent) => sent.map_err(send_failure),
            Err(_) => Err(Failure::new(
                super::EX_UNAVAILABLE,
                format!("{} was not reached within {timeout:?}", args.node),
            )),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn arguments(json: &str) -> Result<Vec<Term>, Failure> {
    match serde_json::from_str(json) {
        Ok(Value::Array(items)) => items
            .into_iter()
            .map(|item| from_json(item).map_err(|error| Failure::usage(format!("ARGS: {error}"))))
            .collect(),
        Ok(_) => Err(Failure::usage(
            "ARGS must be a JSON array, one element per argument",
        )),
        Err(error) => Err(Failure::usage(format!("ARGS is no JSON: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::EX_USAGE;

    #[test]
    fn arguments_are_an_array() {
        assert_eq!(arguments("[1, []]").unwrap(), [Term::Int(1), Term::list([])]);
        for json in ["", "1", "{}", "[1", r#"[{"$atom": 1}]"#, r#"[{"$tuple": "x"}]"#] {
            assert_eq!(arguments(json).unwrap_err().code, EX_USAGE, "{json}");
        }
        assert!(arguments(&"[".repeat(100_000)).is_err());
    }
}

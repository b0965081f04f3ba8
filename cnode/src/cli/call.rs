//! `meshx ping`, `meshx call` and `meshx send`: a hidden node that joins, does one thing, and leaves.

use std::process::ExitCode;

use meshx_etf::{Limits, Term};
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
/// ARGS is a list of terms in Erlang's syntax, one per argument: [1, foo, <<"x">>, {a, "b"}, #{id => 7}]. With
/// --from-json it is a JSON array: strings become binaries, null becomes nil, true and false themselves, numbers integers
/// or floats, arrays lists, objects maps with binary keys, and what JSON lacks is an object with one member, such as
/// {"$atom": "x"} (docs/cli.md). Exit code 1: the function failed.
#[derive(Debug, clap::Args)]
pub(super) struct CallArgs {
    /// The node to call, as name@host
    node: String,
    /// Module; one of Elixir with its full name, Elixir.String for example
    module: String,
    /// Function
    function: String,
    /// Arguments, as a list in Erlang's syntax
    #[arg(default_value = "[]")]
    args: String,
    /// Read ARGS as JSON
    #[arg(long)]
    from_json: bool,
    /// Print the result as JSON, in the forms that --from-json reads, instead of as Erlang prints it
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
    /// The message, a term in Erlang's syntax
    term: String,
    /// Read TERM as JSON, in the forms of meshx call
    #[arg(long)]
    from_json: bool,
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
    let terms = arguments(&args.args, args.from_json)?;
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
    let term = term(&args.term, args.from_json);
    let term = term.map_err(|error| Failure::usage(format!("TERM: {error}")))?;
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

fn arguments(text: &str, from_json: bool) -> Result<Vec<Term>, Failure> {
    match term(text, from_json) {
        Ok(Term::List(arguments)) => Ok(arguments),
        Ok(_) if from_json => Err(Failure::usage(
            "ARGS must be a JSON array, one element per argument",
        )),
        Ok(_) => Err(Failure::usage(
            "ARGS must be a list in Erlang's syntax, one element per argument",
        )),
        Err(error) => Err(Failure::usage(format!("ARGS: {error}"))),
    }
}

fn term(text: &str, is_json: bool) -> Result<Term, String> {
    if is_json {
        let value = serde_json::from_str::<Value>(text).map_err(|error| format!("no JSON: {error}"))?;
        return from_json(value);
    }
    meshx_etf::parse(text, &Limits::default()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::EX_USAGE;

    #[test]
    fn arguments_are_a_list() {
        for json in [false, true] {
            assert_eq!(
                arguments("[1, []]", json).unwrap(),
                [Term::Int(1), Term::list([])]
            );
            for text in [
                "",
                "1",
                "{}",
                "[1",
                "[1|2]",
                r#"[{"$atom": 1}]"#,
                r#"[{"$tuple": "x"}]"#,
            ] {
                assert_eq!(arguments(text, json).unwrap_err().code, EX_USAGE, "{text}");
            }
            assert!(arguments(&"[".repeat(100_000), json).is_err());
        }
        let text = r#"[foo, <<"x">>, "b"]"#;
        let terms = [Term::atom("foo"), Term::binary("x"), Term::charlist("b")];
        assert_eq!(arguments(text, false).unwrap(), terms);
    }
}

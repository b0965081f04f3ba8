//! `meshx ping` and `meshx call`: a hidden node that joins, does one thing, and leaves.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use meshx_etf::Term;
use serde_json::Value;

use super::{AgentOption, EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, Failure, block_on, connect, print};
use crate::node::{CallError, ConnectError, Node, RpcError, SendError, StartError, read_cookie};

/// Exit code when the remote function failed.
const EX_REMOTE: u8 = 1;

/// Who calls, and for how long it waits.
#[derive(Debug, clap::Args)]
struct CallerArgs {
    #[command(flatten)]
    agent: AgentOption,
    /// Name of the node that joins for this command [default: tool-PID@ and the agent's first host]
    #[arg(long, value_name = "NODE")]
    name: Option<String>,
    /// The cluster's cookie; other users of this host can see it in the process list
    #[arg(long, value_name = "COOKIE", conflicts_with = "cookie_file")]
    cookie: Option<String>,
    /// File with the cluster's cookie [default: ~/.erlang.cookie]
    #[arg(long, value_name = "FILE")]
    cookie_file: Option<PathBuf>,
    /// Seconds to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u32,
}

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
/// with one member: {"$atom": "x"}, {"$tuple": [1, 2]}, {"$charlist": "text"}. Exit code 1: the function failed.
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
    #[command(flatten)]
    caller: CallerArgs,
}

pub(super) fn ping(args: &PingArgs) -> Result<ExitCode, Failure> {
    let timeout = args.caller.timeout();
    let took = block_on(async {
        let node = args.caller.join().await?;
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
        let node = args.caller.join().await?;
        let result = node
            .rpc(&args.node, &args.module, &args.function, terms, timeout)
            .await;
        node.stop().await;
        result.map_err(rpc_failure)
    })?;
    print(&format!("{result}\n"))?;
    Ok(ExitCode::SUCCESS)
}

impl CallerArgs {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.into())
    }

    async fn join(&self) -> Result<Node, Failure> {
        let cookie = match &self.cookie {
            Some(cookie) => cookie.clone(),
            None => read_cookie(self.cookie_file.as_deref())
                .map_err(|error| Failure::usage(format!("{error}; or give --cookie")))?,
        };
        let name = match &self.name {
            Some(name) => name.clone(),
            None => {
                let agent = connect(self.agent.dir.as_deref()).await?;
                let host = agent.hello().hosts.first();
                let host = host.ok_or_else(|| Failure::usage("the agent owns no host: give --name"))?;
                format!("tool-{}@{host}", std::process::id())
            }
        };
        let mut builder = Node::builder(name).cookie(cookie);
        if let Some(dir) = &self.agent.dir {
            builder = builder.agent_dir(dir);
        }
        builder.start().await.map_err(|error| {
            let code = match error {
                StartError::InvalidName(_) | StartError::NoCookie => EX_USAGE,
                _ => EX_UNAVAILABLE,
            };
            Failure::new(code, error.to_string())
        })
    }
}

fn call_failure(error: CallError) -> Failure {
    let code = match &error {
        CallError::Send(SendError::Connect(ConnectError::Refused { cause, .. }))
            if cause == "intention_denied" || cause == "not_permitted" =>
        {
            EX_NOPERM
        }
        CallError::Exit(_) => EX_REMOTE,
        _ => EX_UNAVAILABLE,
    };
    Failure::new(code, error.to_string())
}

fn rpc_failure(error: RpcError) -> Failure {
    match error {
        RpcError::Call(error) => call_failure(error),
        // With the term as Erlang prints it.
        RpcError::Error { mfa, reason, .. } => Failure::new(EX_REMOTE, format!("{mfa} raised {reason}")),
        RpcError::Exit { mfa, reason } => Failure::new(EX_REMOTE, format!("{mfa} exited with {reason}")),
        RpcError::Throw { mfa, value } => Failure::new(EX_REMOTE, format!("{mfa} threw {value}")),
        other => Failure::new(EX_REMOTE, other.to_string()),
    }
}

fn arguments(json: &str) -> Result<Vec<Term>, Failure> {
    match serde_json::from_str(json) {
        Ok(Value::Array(items)) => items.into_iter().map(term).collect(),
        Ok(_) => Err(Failure::usage(
            "ARGS must be a JSON array, one element per argument",
        )),
        Err(error) => Err(Failure::usage(format!("ARGS is no JSON: {error}"))),
    }
}

/// As [`CallArgs`] says. `serde_json` bounds the depth.
fn term(value: Value) -> Result<Term, Failure> {
    Ok(match value {
        Value::Null => Term::atom("nil"),
        Value::Bool(value) => Term::from(value),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(int), _, _) => Term::Int(int),
            (_, Some(int), _) => Term::from(int),
            (_, _, Some(float)) => Term::from(float),
            _ => {
                return Err(Failure::usage(format!(
                    "{number} is no number that a term can hold"
                )));
            }
        },
        Value::String(text) => Term::binary(text),
        Value::Array(items) => Term::List(items.into_iter().map(term).collect::<Result<_, _>>()?),
        Value::Object(members) => {
            if let Some(special) = special(&members)? {
                return Ok(special);
            }
            let pairs = members
                .into_iter()
                .map(|(key, value)| Ok((Term::binary(key), term(value)?)));
            Term::map(pairs.collect::<Result<Vec<_>, Failure>>()?)
        }
    })
}

/// What JSON lacks: an object with one member whose name begins with `$`.
fn special(members: &serde_json::Map<String, Value>) -> Result<Option<Term>, Failure> {
    let mut all = members.iter();
    let (Some((key, value)), None) = (all.next(), all.next()) else {
        return Ok(None);
    };
    Ok(Some(match (key.as_str(), value) {
        ("$atom", Value::String(text)) => Term::atom(text.as_str()),
        ("$charlist", Value::String(text)) => Term::charlist(text),
        ("$tuple", Value::Array(items)) => {
            Term::Tuple(items.iter().cloned().map(term).collect::<Result<_, _>>()?)
        }
        ("$atom" | "$charlist" | "$tuple", other) => {
            return Err(Failure::usage(format!(
                "{key} with {other}: $atom and $charlist take a string, $tuple an array"
            )));
        }
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn json_becomes_terms_as_documented() {
        let json = r#"[null, true, -1, 18446744073709551615, 1.5, "é", [1, []], {"a": 1, "b": {}}]"#;
        let printed: Vec<String> = arguments(json).unwrap().iter().map(ToString::to_string).collect();
        let wanted = ["nil", "true", "-1", "18446744073709551615", "1.5"];
        assert_eq!(printed[..5], wanted);
        let terms = arguments(json).unwrap();
        assert_eq!(terms[5], Term::binary("é"));
        assert_eq!(terms[6], Term::list([Term::Int(1), Term::list([])]));
        assert_eq!(
            terms[7].as_map().unwrap().get(&Term::binary("a")),
            Some(&Term::Int(1))
        );
    }

    #[test]
    fn what_json_lacks_has_a_form() {
        let json =
            r#"[{"$atom": "ok"}, {"$tuple": [{"$atom": "x"}, 1]}, {"$charlist": "hi"}, {"$other": 1}]"#;
        let terms = arguments(json).unwrap();
        assert_eq!(terms[0], Term::atom("ok"));
        assert_eq!(terms[1], Term::tuple([Term::atom("x"), Term::Int(1)]));
        assert_eq!(terms[2], Term::charlist("hi"));
        assert!(terms[3].as_map().is_some());
    }

    #[test]
    fn other_arguments_are_usage_errors() {
        for json in ["", "1", "{}", "[1", r#"[{"$atom": 1}]"#, r#"[{"$tuple": "x"}]"#] {
            assert_eq!(arguments(json).unwrap_err().code, EX_USAGE, "{json}");
        }
        assert!(arguments(&"[".repeat(100_000)).is_err());
    }
}

//! What an agent answers, read and shown.

use std::process::ExitCode;

use meshx_etf::Term;
use serde_json::{Map, Value};

use super::{AgentOption, EX_SOFTWARE, Failure, block_on, connect, print};

/// Asks the agent one thing.
pub(super) fn ask(agent: &AgentOption, command: &str, args: Term) -> Result<Term, Failure> {
    block_on(async {
        let client = connect(agent.dir.as_deref()).await?;
        Ok(client.request(command, args).await?)
    })
}

/// A list that the answer must have.
pub(super) fn list<'a>(answer: &'a Term, key: &str) -> Result<Vec<&'a Term>, Failure> {
    let items = answer.map_get(key).and_then(Term::as_list);
    let items = items.ok_or_else(|| Failure::new(EX_SOFTWARE, format!("the agent's answer has no {key}")))?;
    Ok(items.iter().collect())
}

/// A value of a flat map, for people; empty when it is not there.
pub(super) fn text(map: &Term, key: &str) -> String {
    match map.map_get(key) {
        Some(Term::Atom(atom)) => atom.as_str().to_owned(),
        Some(term) => term.as_str().map_or_else(|| term.to_string(), str::to_owned),
        None => String::new(),
    }
}

/// Atoms and binaries as strings, maps with atom keys as objects.
pub(super) fn json(term: &Term) -> Value {
    match term {
        Term::Int(number) => (*number).into(),
        Term::Atom(atom) => match atom.as_str() {
            "true" => true.into(),
            "false" => false.into(),
            word => word.into(),
        },
        Term::List(items) => items.iter().map(json).collect(),
        Term::Map(map) => {
            let members = map.iter();
            let members = members.filter_map(|(key, value)| Some((key.as_atom()?.to_owned(), json(value))));
            Value::Object(members.collect::<Map<_, _>>())
        }
        other => other
            .as_str()
            .map_or_else(|| other.to_string().into(), Into::into),
    }
}

/// Prints JSON and is done.
pub(super) fn print_json(value: &Value) -> Result<ExitCode, Failure> {
    print(&format!("{value:#}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// A moment, for people.
pub(super) fn moment(unix_seconds: i64) -> String {
    let format = time::format_description::well_known::Rfc3339;
    let moment = time::OffsetDateTime::from_unix_timestamp(unix_seconds).ok();
    let moment = moment.and_then(|moment| moment.format(&format).ok());
    moment.unwrap_or_else(|| unix_seconds.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::agent::control::message::{map, text as binary};

    #[test]
    fn answers_are_shown_as_they_are() {
        let answer = map([
            ("links", Term::list([Term::Int(1)])),
            ("local", Term::from(true)),
            ("status", binary("passing")),
            ("level", Term::atom("ok")),
        ]);
        assert_eq!(
            json(&answer),
            json!({"links": [1], "local": true, "status": "passing", "level": "ok"})
        );
        assert_eq!(
            ["local", "status", "level", "none"]
                .map(|key| text(&answer, key))
                .join(" "),
            "true passing ok "
        );
        assert_eq!(list(&answer, "links").unwrap().len(), 1);
        assert!(list(&answer, "nodes").unwrap_err().text.contains("no nodes"));
        assert_eq!(moment(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(moment(i64::MAX), i64::MAX.to_string());
    }
}

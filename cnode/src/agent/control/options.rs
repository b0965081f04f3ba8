//! Reads the options of a registration.

use std::collections::BTreeMap;
use std::time::Duration;

use meshx_etf::Term;

use super::args::{Args, wrong};
use crate::agent::registry::options::{
    Options, PROXY_RESTARTS, PROXY_RESTARTS_MAX, SidecarKind, TTL_MAX, TTL_MIN, WAIT_MAX, weights_of,
};
use crate::mesh::Token;
use crate::proxy::cause::{Cause, Refusal};

/// Longest `registration`, in bytes. A whole frame has 64 KiB.
const REGISTRATION_MAX: usize = 48 << 10;
/// Most words of a sidecar's command.
const COMMAND_WORDS_MAX: usize = 256;
/// Longest word of a sidecar's command, in bytes.
const COMMAND_WORD_MAX: usize = 4096;

/// The options among the arguments of `register_node` or `register_service`.
pub(super) fn options(args: &Args<'_>, name: &str, id: Option<&str>) -> Result<Options, Refusal> {
    let flag = |key| args.optional_bool(key).map(|flag| flag.unwrap_or(false));
    let mut options = Options {
        tags: args.term("tags").map(tags).transpose()?.unwrap_or_default(),
        meta: args.term("meta").map(meta).transpose()?.unwrap_or_default(),
        cluster: args.optional_text("cluster")?.map(str::to_owned),
        weights: match args.term("weights") {
            None => None,
            Some(term) => Some(weights(term).ok_or_else(|| {
                wrong(
                    "weights",
                    "{Passing, Warning} with Passing from 1 and Warning from 0 to 65535",
                )
            })?),
        },
        ttl: milliseconds(args, "ttl", TTL_MIN, TTL_MAX)?,
        deregister_after: milliseconds(args, "deregister_after", TTL_MIN, TTL_MAX)?,
        wait: milliseconds(args, "wait", Duration::ZERO, WAIT_MAX)?,
        token: token(args)?,
        adopt: flag("adopt")?,
        force: flag("force")?,
        sidecar: args.term("sidecar").map(sidecar).transpose()?,
        proxy_output: flag("proxy_output")?,
        max_proxy_restarts: match args.optional_int("max_proxy_restarts")? {
            None => PROXY_RESTARTS,
            Some(count) => u32::try_from(count)
                .ok()
                .filter(|count| *count <= PROXY_RESTARTS_MAX)
                .ok_or_else(|| wrong("max_proxy_restarts", &format!("0 to {PROXY_RESTARTS_MAX}")))?,
        },
        extra: serde_json::Map::new(),
    };
    if let Some(registration) = args.term("registration") {
        let json = registration
            .as_str()
            .ok_or_else(|| wrong("registration", "a binary that holds a JSON object"))?;
        if json.len() > REGISTRATION_MAX {
            let text = format!(
                "registration has {} bytes, at most {REGISTRATION_MAX} are taken",
                json.len()
            );
            return Err(Cause::Limit.because(text));
        }
        options.merge_registration(json, name, id)?;
    }
    Ok(options)
}

/// The mesh's token that a client brings.
pub(super) fn token(args: &Args<'_>) -> Result<Option<Token>, Refusal> {
    match args.optional_text("token")? {
        Some(token) if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(wrong("token", "a token of visible ASCII characters"))
        }
        token => Ok(token.map(Token::new)),
    }
}

fn tags(term: &Term) -> Result<Vec<String>, Refusal> {
    let tags = term.as_list().and_then(|tags| tags.iter().map(text).collect());
    tags.ok_or_else(|| wrong("tags", "a list of binaries"))
}

fn meta(term: &Term) -> Result<BTreeMap<String, String>, Refusal> {
    let pairs = term.as_map().and_then(|map| {
        map.iter()
            .map(|(key, value)| text(key).zip(text(value)))
            .collect()
    });
    pairs.ok_or_else(|| wrong("meta", "a map of binaries"))
}

fn weights(term: &Term) -> Option<crate::mesh::Weights> {
    match term.as_tuple()? {
        [passing, warning] => weights_of(passing.as_int()?, warning.as_int()?),
        _ => None,
    }
}

fn text(term: &Term) -> Option<String> {
    term.as_str().map(str::to_owned)
}

pub(super) fn milliseconds(
    args: &Args<'_>,
    key: &str,
    min: Duration,
    max: Duration,
) -> Result<Option<Duration>, Refusal> {
    let Some(value) = args.optional_int(key)? else {
        return Ok(None);
    };
    u64::try_from(value)
        .ok()
        .map(Duration::from_millis)
        .filter(|time| (min..=max).contains(time))
        .map(Some)
        .ok_or_else(|| {
            let (min, max) = (min.as_millis(), max.as_millis());
            wrong(key, &format!("milliseconds from {min} to {max}"))
        })
}

fn sidecar(term: &Term) -> Result<SidecarKind, Refusal> {
    let named = term.as_atom().and_then(SidecarKind::parse);
    let command = || match term.as_tuple()? {
        [kind, words] if kind.as_atom() == Some("command") => {
            let words: Option<Vec<String>> = words.as_list()?.iter().map(text).collect();
            words.map(SidecarKind::Command)
        }
        _ => None,
    };
    let kind = named
        .or_else(command)
        .ok_or_else(|| wrong("sidecar", "native, connect_proxy, envoy or {command, [binary]}"))?;
    if let SidecarKind::Command(words) = &kind {
        if words.first().is_none_or(String::is_empty) {
            return Err(wrong("sidecar", "{command, [Program | Arguments]}"));
        }
        if words.len() > COMMAND_WORDS_MAX || words.iter().any(|word| word.len() > COMMAND_WORD_MAX) {
            return Err(Cause::Limit.because(format!(
                "sidecar: a command has at most {COMMAND_WORDS_MAX} words of {COMMAND_WORD_MAX} bytes"
            )));
        }
        if words.iter().any(|word| word.contains('\0')) {
            return Err(wrong("sidecar", "a command without zero bytes"));
        }
    }
    Ok(kind)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use crate::agent::control::message::{map, text};

    fn read<const N: usize>(pairs: [(&'static str, Term); N]) -> Result<Options, Refusal> {
        options(&Args(&map(pairs)), "shop", Some("shop-1"))
    }

    #[test]
    fn every_option_is_read() {
        let options = read([
            ("tags", Term::list([text("a"), text("b")])),
            ("meta", Term::map([(text("k"), text("v"))])),
            ("cluster", text("blue")),
            ("weights", Term::tuple([Term::Int(3), Term::Int(0)])),
            ("ttl", Term::Int(2000)),
            ("deregister_after", Term::Int(60_000)),
            ("wait", Term::Int(0)),
            ("token", text("t0k3n")),
            ("adopt", Term::from(true)),
            ("force", Term::from(true)),
            (
                "sidecar",
                Term::tuple([Term::atom("command"), Term::list([text("haproxy"), text("-f")])]),
            ),
            ("proxy_output", Term::from(true)),
            ("max_proxy_restarts", Term::Int(0)),
            ("registration", text(r#"{"Tags": ["c"]}"#)),
        ])
        .unwrap();
        assert_eq!(options.tags, ["a", "b", "c"]);
        assert_eq!(options.meta["k"], "v");
        assert_eq!(options.cluster.as_deref(), Some("blue"));
        assert_eq!(options.weights, weights_of(3, 0));
        assert_eq!(options.ttl, Some(Duration::from_secs(2)));
        assert_eq!(options.deregister_after, Some(Duration::from_secs(60)));
        assert_eq!(options.wait, Some(Duration::ZERO));
        assert_eq!(options.token.as_ref().unwrap().expose(), "t0k3n");
        assert!(options.adopt && options.force && options.proxy_output);
        assert_eq!(
            options.sidecar,
            Some(SidecarKind::Command(vec!["haproxy".into(), "-f".into()]))
        );
        assert_eq!(options.max_proxy_restarts, 0);
        assert_eq!(read([]).unwrap(), Options::default());
    }

    #[test]
    fn every_bad_value_is_named() {
        let command = |words: Vec<Term>| Term::tuple([Term::atom("command"), Term::list(words)]);
        let long = "x".repeat(COMMAND_WORD_MAX + 1);
        for (key, value, cause) in [
            ("tags", text("a"), Cause::InvalidRequest),
            ("meta", Term::list([]), Cause::InvalidRequest),
            ("cluster", Term::atom("blue"), Cause::InvalidRequest),
            (
                "weights",
                Term::tuple([Term::Int(0), Term::Int(0)]),
                Cause::InvalidRequest,
            ),
            ("ttl", Term::Int(999), Cause::InvalidRequest),
            ("ttl", Term::Int(-1), Cause::InvalidRequest),
            ("deregister_after", Term::Int(i64::MAX), Cause::InvalidRequest),
            ("wait", Term::Int(300_001), Cause::InvalidRequest),
            ("token", text(""), Cause::InvalidRequest),
            ("token", text("a\r\nX-Header: b"), Cause::InvalidRequest),
            ("adopt", Term::Int(1), Cause::InvalidRequest),
            ("sidecar", Term::atom("nginx"), Cause::InvalidRequest),
            ("sidecar", command(vec![]), Cause::InvalidRequest),
            (
                "sidecar",
                command(vec![text("a"), text("\0")]),
                Cause::InvalidRequest,
            ),
            ("sidecar", command(vec![text(long)]), Cause::Limit),
            ("max_proxy_restarts", Term::Int(1001), Cause::InvalidRequest),
            ("registration", Term::Int(1), Cause::InvalidRequest),
            (
                "registration",
                text("x".repeat(REGISTRATION_MAX + 1)),
                Cause::Limit,
            ),
        ] {
            let refusal = read([(key, value)]).unwrap_err();
            assert_eq!(refusal.cause, cause, "{key}: {refusal}");
            assert!(refusal.text.contains(key), "{key}: {refusal}");
        }
    }
}

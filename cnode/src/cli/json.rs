//! Terms as JSON and back, nothing lost (docs/cli.md, "Terms in JSON").

use std::fmt::Write as _;

use meshx_etf::{Limits, Term, decode, encode};
use serde_json::{Map, Value, json};

/// The longest decimal integer that is read.
const DIGITS_MAX: usize = 2_000;

/// The term as JSON. What JSON lacks is an object with one member whose name begins with `$`.
pub(super) fn to_json(term: &Term) -> Value {
    let items = |items: &[Term]| Value::Array(items.iter().map(to_json).collect());
    match term {
        Term::Int(int) => json!(int),
        Term::BigInt(big) => match big.to_u64() {
            Some(int) => json!(int),
            None => external_if_long(term, big.magnitude_le().len()),
        },
        // Only finite ones can be decoded.
        Term::Float(float) => json!(float),
        Term::Atom(atom) => match atom.as_str() {
            "nil" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            text => json!({ "$atom": text }),
        },
        Term::Binary(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(_) => json!({ "$binary": to_hex(bytes) }),
        },
        Term::List(list) => items(list),
        Term::Tuple(parts) => json!({ "$tuple": items(parts) }),
        Term::ImproperList(list, tail) => json!({ "$improper": [items(list), to_json(tail)] }),
        Term::Map(map) => map_to_json(map),
        Term::BitBinary { .. }
        | Term::Pid(_)
        | Term::Port(_)
        | Term::Reference(_)
        | Term::Fun(_)
        | Term::Export(_) => external(term),
    }
}

/// An object when all keys are texts, `$atoms` when all are atoms, else `$map` with pairs.
fn map_to_json(pairs: &meshx_etf::Map) -> Value {
    let object = |name: fn(&Term) -> Option<&str>| {
        let members = pairs
            .iter()
            .map(|(key, value)| Some((name(key)?.to_owned(), to_json(value))));
        members.collect::<Option<Map<_, _>>>()
    };
    let special = |key: &Term| key.as_str().is_some_and(|key| key.starts_with('$'));
    let like_special = pairs.len() == 1 && pairs.iter().any(|(key, _)| special(key));
    if !like_special && let Some(texts) = object(|key| key.as_str()) {
        return Value::Object(texts);
    }
    if let Some(atoms) = object(|key| key.as_atom()) {
        return json!({ "$atoms": atoms });
    }
    let pairs: Vec<Value> = pairs
        .iter()
        .map(|(key, value)| json!([to_json(key), to_json(value)]))
        .collect();
    json!({ "$map": pairs })
}

/// Decimal takes time quadratic in the length, so a long integer is written as its bytes.
fn external_if_long(term: &Term, bytes: usize) -> Value {
    if bytes > DIGITS_MAX / 3 {
        external(term)
    } else {
        json!({ "$integer": term.to_string() })
    }
}

/// External term format in hexadecimal: for what only Erlang has.
fn external(term: &Term) -> Value {
    let mut bytes = Vec::new();
    match encode(term, &mut bytes) {
        Ok(()) => json!({ "$external": to_hex(&bytes) }),
        // Whatever was decoded can be encoded.
        Err(error) => json!({ "$unprintable": error.to_string() }),
    }
}

/// The term that a JSON value stands for. `serde_json` bounds its depth.
///
/// # Errors
/// What is wrong with it.
pub(super) fn from_json(value: Value) -> Result<Term, String> {
    Ok(match value {
        Value::Null => Term::atom("nil"),
        Value::Bool(value) => Term::from(value),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(int), _, _) => Term::Int(int),
            (_, Some(int), _) => Term::from(int),
            (_, _, Some(float)) => Term::from(float),
            _ => return Err(format!("{number} is no number that a term can hold")),
        },
        Value::String(text) => Term::binary(text),
        Value::Array(items) => Term::List(all(items)?),
        Value::Object(mut members) => {
            if members.len() == 1
                && let Some(name) = members
                    .keys()
                    .next()
                    .filter(|name| name.starts_with('$'))
                    .cloned()
            {
                let value = members.remove(&name).unwrap_or_default();
                return special(&name, value);
            }
            let pairs = members
                .into_iter()
                .map(|(key, value)| Ok((Term::binary(key), from_json(value)?)));
            Term::map(pairs.collect::<Result<Vec<_>, String>>()?)
        }
    })
}

fn all(items: Vec<Value>) -> Result<Vec<Term>, String> {
    items.into_iter().map(from_json).collect()
}

fn special(name: &str, value: Value) -> Result<Term, String> {
    Ok(match (name, value) {
        ("$atom", Value::String(text)) if text.chars().count() <= 255 => Term::atom(text.as_str()),
        ("$charlist", Value::String(text)) => Term::charlist(&text),
        ("$tuple", Value::Array(items)) => Term::Tuple(all(items)?),
        ("$atoms", Value::Object(members)) => {
            let pairs = members.into_iter().map(|(key, value)| {
                if key.chars().count() > 255 {
                    return Err("an atom has at most 255 characters".to_owned());
                }
                Ok((Term::atom(key.as_str()), from_json(value)?))
            });
            Term::map(pairs.collect::<Result<Vec<_>, String>>()?)
        }
        ("$map", Value::Array(pairs)) => {
            let pairs = pairs.into_iter().map(|pair| match pair {
                Value::Array(pair) => match <[Value; 2]>::try_from(pair) {
                    Ok([key, value]) => Ok((from_json(key)?, from_json(value)?)),
                    Err(_) => Err("$map takes arrays of a key and a value".to_owned()),
                },
                _ => Err("$map takes arrays of a key and a value".to_owned()),
            });
            Term::map(pairs.collect::<Result<Vec<_>, String>>()?)
        }
        ("$improper", Value::Array(parts)) => match <[Value; 2]>::try_from(parts) {
            Ok([Value::Array(items), tail]) if !items.is_empty() => {
                Term::list_with_tail(all(items)?, from_json(tail)?)
            }
            _ => return Err("$improper takes an array of elements and a tail".into()),
        },
        ("$integer", Value::String(text)) => {
            integer(&text).ok_or_else(|| format!("{text:?} is no decimal integer"))?
        }
        ("$binary", Value::String(hex)) => {
            Term::binary(from_hex(&hex).ok_or("$binary takes bytes in hexadecimal")?)
        }
        ("$external", Value::String(hex)) => {
            let bytes = from_hex(&hex).ok_or("$external takes bytes in hexadecimal")?;
            decode(&bytes, &Limits::default()).map_err(|error| format!("$external: {error}"))?
        }
        (name, value) => {
            let value = value.to_string().chars().take(60).collect::<String>();
            return Err(format!("{name} with {value}: no such form (docs/cli.md)"));
        }
    })
}

fn integer(text: &str) -> Option<Term> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    if digits.is_empty() || digits.len() > DIGITS_MAX {
        return None;
    }
    let mut magnitude: Vec<u8> = Vec::new();
    for digit in digits.bytes() {
        let mut carry = u32::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
        for byte in &mut magnitude {
            carry += u32::from(*byte) * 10;
            *byte = carry as u8;
            carry >>= 8;
        }
        if carry > 0 {
            magnitude.push(carry as u8);
        }
    }
    Some(Term::integer_from_le_bytes(negative, &magnitude))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    pairs
        .iter()
        .map(|[high, low]| Some((digit(*high)? * 16 + digit(*low)?) as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use meshx_etf::{Export, Pid, Reference};
    use proptest::prelude::*;

    use super::*;

    fn read(json: &str) -> Result<Term, String> {
        from_json(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn json_becomes_terms_as_documented() {
        for (json, printed) in [
            ("null", "nil"),
            ("true", "true"),
            ("-1", "-1"),
            ("18446744073709551615", "18446744073709551615"),
            ("1.5", "1.5"),
            ("1.0", "1.0"),
            (r#""a""#, "<<\"a\">>"),
            (r#"[300, []]"#, "[300,[]]"),
            (r#"{"a": 1}"#, "#{<<\"a\">> => 1}"),
            (r#"{"$atom": "ok"}"#, "ok"),
            (r#"{"$tuple": [{"$atom": "x"}, 1]}"#, "{x,1}"),
            (r#"{"$charlist": "hi"}"#, "\"hi\""),
            (r#"{"$atoms": {"a": 1}}"#, "#{a => 1}"),
            (r#"{"$map": [[1, 2]]}"#, "#{1 => 2}"),
            (r#"{"$improper": [[1], 2]}"#, "[1|2]"),
            (
                r#"{"$integer": "-36893488147419103232"}"#,
                "-36893488147419103232",
            ),
            (r#"{"$binary": "00fF"}"#, "<<0,255>>"),
            (r#"{"$external": "836a"}"#, "[]"),
        ] {
            assert_eq!(read(json).unwrap().to_string(), printed, "{json}");
        }
    }

    #[test]
    fn what_has_no_form_is_refused_with_words() {
        let long = format!(r#"{{"$atom": "{}"}}"#, "x".repeat(256));
        for (json, words) in [
            (r#"{"$atom": 1}"#, "$atom with 1"),
            (r#"{"$other": 1}"#, "no such form"),
            (r#"{"$map": [[1]]}"#, "a key and a value"),
            (r#"{"$improper": [[], 1]}"#, "a tail"),
            (r#"{"$integer": "1x"}"#, "decimal"),
            (r#"{"$integer": "-"}"#, "decimal"),
            (r#"{"$binary": "0"}"#, "hexadecimal"),
            (r#"{"$binary": "0g"}"#, "hexadecimal"),
            (r#"{"$external": "00"}"#, "$external"),
            (&long, "no such form"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn identifiers_and_awkward_maps_survive() {
        let pid = Pid {
            node: "a@h".into(),
            id: 1,
            serial: 2,
            creation: 3,
        };
        let reference = Reference {
            node: "a@h".into(),
            creation: 3,
            ids: vec![1, 2, 3],
        };
        let export = Export {
            module: "m".into(),
            function: "f".into(),
            arity: 1,
        };
        for term in [
            Term::from(pid),
            Term::from(reference),
            Term::from(export),
            Term::bit_string(vec![0xE0], 3).unwrap(),
            Term::map([(Term::binary("$atom"), Term::binary("x"))]),
            Term::map([(Term::binary([0xFF]), Term::Int(1))]),
            Term::map([(Term::atom("a"), Term::Int(1)), (Term::Int(1), Term::Int(2))]),
            Term::map([(Term::atom("nil"), Term::atom("nil"))]),
            Term::integer_from_le_bytes(true, &[7; 5_000]),
        ] {
            assert_eq!(from_json(to_json(&term)), Ok(term.clone()), "{}", to_json(&term));
        }
    }

    fn term() -> impl Strategy<Value = Term> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(Term::from),
            any::<i128>().prop_map(Term::from),
            (-1e300..1e300f64).prop_map(Term::from),
            "\\PC{0,6}".prop_map(Term::atom),
            prop::collection::vec(any::<u8>(), 0..6).prop_map(Term::binary),
            "\\PC{0,6}".prop_map(Term::binary),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            let items = prop::collection::vec(inner.clone(), 0..5);
            prop_oneof![
                items.clone().prop_map(Term::List),
                items.clone().prop_map(Term::Tuple),
                prop::collection::vec((inner.clone(), inner), 0..4).prop_map(Term::map),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_term_comes_back(term in term()) {
            let text = to_json(&term).to_string();
            prop_assert_eq!(read(&text), Ok(term), "{}", text);
        }
    }
}

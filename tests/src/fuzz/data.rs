use std::collections::BTreeMap;
use std::fmt::Debug;

use meshx_etf::{Atom, Limits, Pid, Term, decode, from_bytes, from_term, to_bytes, to_term, with};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

/// Every kind of field, each of which may be missing, so that few bytes get far.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "Elixir.Item", default)]
struct Item {
    a: i128,
    b: Option<String>,
    c: Vec<Item>,
    #[serde(with = "with::bytes")]
    d: Vec<u8>,
    #[serde(with = "with::atom")]
    e: String,
    #[serde(with = "with::charlist")]
    f: String,
    #[serde(with = "with::keyword")]
    g: BTreeMap<String, u8>,
    h: Option<Event>,
    i: Option<(f64, char, bool)>,
    j: BTreeMap<i64, f32>,
    k: Option<Pid>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    A,
    B(u64),
    C(i8, [u16; 2]),
    D { a: Result<(), Vec<u32>>, b: u128 },
    E(Box<Event>),
    F(Atom),
}

/// Rust values from terms: whatever was read is written and read again to the same.
pub fn data(data: &[u8]) {
    again::<Item>(data);
    again::<Event>(data);
    again::<Vec<Event>>(data);
    again::<BTreeMap<String, Event>>(data);
    again::<Term>(data);
    std::hint::black_box(from_bytes::<IgnoredAny>(data, &Limits::default()).is_ok());
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    let value = match from_bytes::<T>(data, &Limits::default()) {
        Ok(value) => value,
        Err(error) => {
            std::hint::black_box(error.to_string());
            return;
        }
    };
    // Text that was a binary may be too long for the atom that it is written as.
    let Ok(term) = to_term(&value) else { return };
    assert_eq!(from_term::<T>(&term).unwrap(), value);
    let bytes = to_bytes(&value).unwrap();
    let limits = Limits {
        max_bytes: usize::MAX,
        ..Limits::default()
    };
    assert_eq!(decode(&bytes, &limits).unwrap(), term);
}

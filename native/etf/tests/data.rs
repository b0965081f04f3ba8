//! Rust values to terms and back.
#![cfg(feature = "serde")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::thread;

use common::{encoded, term as any_term};
use meshx_etf::{
    Atom, DATA_DEPTH, DEPTH_CEILING, Export, Keys, Limits, Pid, Reference, Term, decode, from_bytes,
    from_term, term, to_bytes, to_term, to_term_with, with,
};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The value becomes the term, and the term the value.
fn both<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: T, term: Term) {
    assert_eq!(to_term(&value).unwrap(), term);
    assert_eq!(from_term::<T>(&term).unwrap(), value);
    let bytes = to_bytes(&value).unwrap();
    assert_eq!(bytes, encoded(&term));
    assert_eq!(from_bytes::<T>(&bytes, &Limits::default()).unwrap(), value);
}

fn error<T: DeserializeOwned + Debug>(term: &Term) -> String {
    from_term::<T>(term).unwrap_err().to_string()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Item {
    id: u64,
    name: String,
    note: Option<String>,
    price: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename = "Elixir.Shop.Item")]
struct Elixir {
    id: u64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    Started,
    Renamed(String),
    Moved(i64, i64),
    Sold { to: String, at: i128 },
    Nested(Box<Event>),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Unit;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Meters(u32);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Place(u8, String);

fn item() -> Item {
    Item {
        id: 7,
        name: "lamp".into(),
        note: None,
        price: 1.5,
    }
}

#[test]
fn plain_values() {
    both(true, term!(true));
    both(-7i8, term!(-7));
    both(u64::MAX, Term::from(u64::MAX));
    both(i64::MIN, Term::from(i64::MIN));
    both(u128::MAX, Term::from(u128::MAX));
    both(i128::MIN, Term::from(i128::MIN));
    both(i128::from(i64::MIN) - 1, Term::from(i128::from(i64::MIN) - 1));
    both(1.5f32, term!(1.5));
    both('ü', term!("ü"));
    both("text".to_owned(), term!("text"));
    both((), term!(nil));
    both(Some(1), term!(1));
    both(None::<u8>, term!(nil));
    both(vec![1u32, 2], term!([1, 2]));
    both([1u32, 2], term!({1, 2}));
    both((1u8, "a".to_owned()), term!({1, "a"}));
    both(Unit, term!(Unit));
    both(Meters(5), term!(5));
    both(Place(5, "a".into()), term!({5, "a"}));
    both(BTreeMap::from([(1, "one".to_owned())]), term!(#{1 => "one"}));
    both(HashMap::from([("one".to_owned(), 1)]), term!(#{"one" => 1}));
}

#[test]
fn structs() {
    both(
        item(),
        term!(#{id => 7, name => "lamp", note => nil, price => 1.5}),
    );
    let binary_keys = term!(#{"id" => 7, "name" => "lamp", "note" => nil, "price" => 1.5});
    assert_eq!(to_term_with(&item(), Keys::Binaries).unwrap(), binary_keys);
    for term in [
        binary_keys,
        // Keyword lists, missing options, integers for floats, other text, fields nobody asked for.
        term!([{id, 7}, {name, "lamp"}, {price, 1.5}]),
        term!(#{id => 7, name => (Term::charlist("lamp")), note => undefined, price => 1.5, more => []}),
        term!(#{id => 7, name => lamp, note => nil, price => 1.5, __struct__ => @"Elixir.Other"}),
    ] {
        assert_eq!(from_term::<Item>(&term).unwrap(), item(), "{term}");
    }
    assert_eq!(from_term::<f64>(&term!(3)).unwrap(), 3.0);
    assert!(from_term::<f64>(&Term::from((1i64 << 53) + 1)).is_err());
}

#[test]
fn elixir_structs() {
    both(
        Elixir { id: 7 },
        term!(#{__struct__ => @"Elixir.Shop.Item", id => 7}),
    );
    let wanted = "Elixir.Shop.Item wanted, got another kind of struct, or none";
    for term in [
        term!(#{id => 7}),
        term!(#{__struct__ => @"Elixir.Shop.Other", id => 7}),
        term!(7),
    ] {
        assert_eq!(error::<Elixir>(&term), wanted);
    }
    // The key stays an atom where others are binaries.
    assert_eq!(
        to_term_with(&Elixir { id: 7 }, Keys::Binaries).unwrap(),
        term!(#{__struct__ => @"Elixir.Shop.Item", "id" => 7})
    );
    // Told apart by it, and kept by who asks for it.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Any {
        __struct__: Atom,
    }
    both(
        Any {
            __struct__: "Elixir.Date".into(),
        },
        term!(#{__struct__ => @"Elixir.Date"}),
    );
    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Strict {
        id: u8,
    }
    let term = term!(#{__struct__ => @"Elixir.Date", id => 1});
    assert_eq!(from_term::<Strict>(&term).unwrap(), Strict { id: 1 });
}

#[test]
fn enums() {
    both(Event::Started, term!(started));
    both(Event::Renamed("x".into()), term!({renamed, "x"}));
    both(Event::Moved(-1, 2), term!({moved, -1, 2}));
    both(
        Event::Sold {
            to: "ann".into(),
            at: 1 << 70,
        },
        term!({sold, #{to => "ann", at => (1i128 << 70)}}),
    );
    both(Event::Nested(Box::new(Event::Started)), term!({nested, started}));
    assert_eq!(from_term::<Event>(&term!("started")).unwrap(), Event::Started);
    let keyword = term!({sold, [{to, "ann"}, {at, 1}]});
    assert!(from_term::<Event>(&keyword).is_ok());
    both(Ok::<u8, String>(1), term!({ok, 1}));
    both(Err::<u8, String>("no".into()), term!({error, "no"}));
    assert_eq!(from_term::<Result<(), String>>(&term!(ok)).unwrap(), Ok(()));
    assert!(error::<Event>(&term!(stopped)).contains("unknown variant `stopped`"));
    assert!(error::<Event>(&term!({started, 1})).contains("no value wanted, got 1"));
    assert!(error::<Event>(&term!({moved, 1})).contains("at moved: "));
    assert!(error::<Event>(&term!({moved, 1, 2, 3})).contains("1 too many"));
    assert_eq!(
        error::<Event>(&term!({1, 2})),
        "an atom, or a tuple that begins with one wanted, got a tuple"
    );
}

#[test]
fn fields_written_in_other_ways() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Request {
        #[serde(with = "with::atom")]
        table: String,
        #[serde(with = "with::charlist")]
        host: String,
        #[serde(with = "with::bytes")]
        body: Vec<u8>,
        #[serde(with = "with::keyword")]
        options: BTreeMap<String, u32>,
    }
    let request = || Request {
        table: "items".into(),
        host: "hé".into(),
        body: vec![0, 255],
        options: BTreeMap::from([("a".into(), 1), ("b".into(), 2)]),
    };
    both(
        request(),
        term!(#{table => items, host => (Term::charlist("hé")), body => b"\x00\xFF", options => [{a, 1}, {b, 2}]}),
    );
    // Bytes are read from either, and empty lists are any empty thing.
    assert_eq!(from_term::<Vec<u8>>(&term!(b"\x01\x02")).unwrap(), [1, 2]);
    assert_eq!(from_term::<Vec<u8>>(&term!([1, 2])).unwrap(), [1, 2]);
    assert_eq!(from_term::<String>(&term!([])).unwrap(), "");
    assert!(from_term::<BTreeMap<String, u8>>(&term!([])).unwrap().is_empty());
    let long = Request {
        table: "x".repeat(256),
        ..request()
    };
    assert_eq!(
        to_term(&long).unwrap_err().to_string(),
        "at table: an atom has at most 255 characters"
    );
    assert_eq!(from_term::<&str>(&term!("borrowed")).unwrap(), "borrowed");
}

/// serde holds on to the fields of a flattened struct before it knows what they are to be.
#[test]
fn bytes_of_a_flattened_struct_are_read_back() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Message {
        id: u8,
        #[serde(flatten)]
        body: Body,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Body {
        #[serde(with = "with::bytes")]
        data: Vec<u8>,
    }
    // What is text, what is none, and nothing.
    for data in [b"AB".to_vec(), vec![255, 0], vec![]] {
        let binary = Term::binary(data.clone());
        let value = || Message {
            id: 1,
            body: Body { data: data.clone() },
        };
        // Written by serde as a map, whose keys are text.
        both(value(), term!(#{"id" => 1, "data" => (binary.clone())}));
        let atoms = term!(#{id => 1, data => (binary)});
        assert_eq!(from_term::<Message>(&atoms).unwrap(), value());
        let list = Term::list(data.iter().map(|byte| Term::Int(i64::from(*byte))));
        let list = term!(#{id => 1, data => (list)});
        assert_eq!(from_term::<Message>(&list).unwrap(), value());
    }
    assert!(from_term::<Message>(&term!(#{id => 1, data => [256]})).is_err());
    assert!(from_term::<Message>(&term!(#{id => 1, data => 7})).is_err());
}

#[test]
fn terms_inside_values() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Call {
        from: (Pid, Reference),
        reply: Atom,
        export: Option<Export>,
        request: Term,
    }
    let pid = Pid {
        node: "shop@h1".into(),
        id: 1,
        serial: 2,
        creation: 3,
    };
    let reference = Reference {
        node: "shop@h1".into(),
        creation: 3,
        ids: vec![1, 2, 3],
    };
    let request = term!([#{{1, 2} => -1.5}, 3; tail]);
    let term = term!(#{
        from => {(pid.clone()), (reference.clone())}, reply => ok, export => nil, request => (request.clone()),
    });
    both(
        Call {
            from: (pid, reference),
            reply: "ok".into(),
            export: None,
            request,
        },
        term,
    );
    assert_eq!(error::<Pid>(&term!(1)), "a pid wanted, got an integer");
    assert_eq!(error::<Atom>(&term!("ok")), "an atom wanted, got a binary");
}

#[test]
fn errors_name_the_path_and_quote_little() {
    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Order {
        items: Vec<Item>,
        by: BTreeMap<String, (u8, u8)>,
    }
    let order = |price: Term, by: Term| term!(#{items => [#{id => 1, name => "a", price => 1.5}, #{id => 2, name => "b", price => (price)}], by => (by)});
    let text = error::<Order>(&order(term!(free), term!(#{})));
    assert_eq!(text, "at items[1].price: invalid type: an atom, expected f64");
    let text = error::<Order>(&order(term!(1), term!(#{"x" => {1, 300}})));
    assert_eq!(text, "at by.x[1]: invalid value: integer `300`, expected u8");
    assert_eq!(error::<Item>(&term!(#{id => 1})), "missing field `name`");
    let wrong = from_term::<Order>(&order(term!(free), term!(#{}))).unwrap_err();
    assert_eq!(wrong.path(), "items[1].price");

    // Secrets and long texts of a peer stay out, and what could steer a terminal.
    let secret = term!("a secret");
    for text in [
        error::<u8>(&secret),
        error::<bool>(&secret),
        error::<Vec<String>>(&secret),
    ] {
        assert!(!text.contains("secret"), "{text}");
    }
    let long = Term::binary("k".repeat(1 << 20));
    let text = error::<Event>(&long);
    assert!(text.len() < 400, "{} bytes", text.len());
    let text = error::<BTreeMap<String, u8>>(&Term::map([(long, term!(x))]));
    assert!(text.len() < 400, "{} bytes", text.len());
    let text = error::<Event>(&Term::atom("\u{1b}[2J"));
    assert!(!text.contains('\u{1b}'), "{text:?}");

    assert_eq!(
        to_term(&[f64::NAN]).unwrap_err().to_string(),
        "at [0]: a float must be finite to be a term"
    );
    assert!(error::<i64>(&Term::from(u64::MAX)).contains("expected i64"));
    assert!(error::<u128>(&Term::integer_from_le_bytes(false, &[1; 17])).contains("more than 128 bits"));
    assert!(error::<Item>(&term!([1, 2])).contains("a keyword list wanted"));
    assert!(error::<String>(&term!(nil)).contains("nil"));
    assert!(error::<(u8, u8)>(&term!({1, 2, 3})).contains("1 too many"));
    assert!(
        from_bytes::<u8>(&[131, 97], &Limits::default())
            .unwrap_err()
            .to_string()
            .contains("cut short")
    );
}

/// A type that follows its input as deep as that goes.
#[derive(Debug, Serialize, Deserialize)]
struct Deep(Vec<Deep>);

#[test]
fn depth_is_bounded_on_a_small_stack() {
    let nested = |levels: u32| (0..levels).fold(term!([]), |inner, _| Term::List(vec![inner]));
    let run = move || {
        // The deepest that can be decoded, then a term that only a program can build.
        let deepest = from_term::<Deep>(&nested(DATA_DEPTH - 1)).unwrap();
        assert!(to_term(&deepest).is_ok());
        let text = from_term::<Deep>(&nested(DATA_DEPTH + 1))
            .unwrap_err()
            .to_string();
        assert!(text.ends_with("nested deeper than 128"), "{}", text.len());
        let mut deep = Deep(vec![]);
        for _ in 0..=DATA_DEPTH {
            deep = Deep(vec![deep]);
        }
        assert!(to_term(&deep).is_err());
        // A term within a value counts with it.
        let within = (0u8, (0u8, nested(DEPTH_CEILING - 1)));
        assert!(to_term(&within).is_err());
    };
    thread::Builder::new()
        .stack_size(1 << 20)
        .spawn(run)
        .unwrap()
        .join()
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_term_passes_through(term in any_term()) {
        prop_assert_eq!(to_term(&term), Ok(term.clone()));
        prop_assert_eq!(from_term::<Term>(&term), Ok(term));
    }

    #[test]
    fn values_come_back(
        value in any::<(Option<i128>, u128, String, Vec<(bool, char)>, BTreeMap<String, Result<i64, Vec<u8>>>)>(),
    ) {
        type Value = (Option<i128>, u128, String, Vec<(bool, char)>, BTreeMap<String, Result<i64, Vec<u8>>>);
        let term = to_term(&value).unwrap();
        prop_assert_eq!(from_term::<Value>(&term), Ok(value.clone()));
        let bytes = to_bytes(&value).unwrap();
        prop_assert_eq!(decode(&bytes, &Limits::default()), Ok(term));
        prop_assert_eq!(from_bytes::<Value>(&bytes, &Limits::default()), Ok(value));
    }

    #[test]
    fn no_term_makes_reading_panic(term in any_term()) {
        let _ = from_term::<Item>(&term);
        let _ = from_term::<Event>(&term);
        let _ = from_term::<Vec<Option<Place>>>(&term);
        let _ = from_term::<BTreeMap<String, Result<(), Atom>>>(&term);
    }
}

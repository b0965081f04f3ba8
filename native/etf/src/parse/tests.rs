#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::number::MAX_DIGITS;
use super::*;
use crate::term;

fn read(text: &str) -> Result<Term, ParseError> {
    parse(text, &Limits::default())
}

#[test]
fn what_a_user_types() {
    let cases = [
        ("[]", term!([])),
        (" [ 1 , -2,+3 ] % done", term!([1, -2, 3])),
        ("[1, foo, <<\"x\">>, {a, \"b\"}]", term!([1, foo, "x", {a, [98]}])),
        ("[a|b]", term!([a; b])),
        ("[a|[b|[c]]]", term!([a, b, c])),
        ("#{a=>#{},<<>> => {}}", term!(#{a => #{}, "" => {}})),
        ("'Elixir.Shop'", Term::atom("Elixir.Shop")),
        ("'it\\'s'", Term::atom("it's")),
        ("''", Term::atom("")),
        ("shop@h1", Term::atom("shop@h1")),
        ("\"a\" \"b\"", Term::charlist("ab")),
        ("\"\\x{e9}\\351\\xe9\\n\\s\\^a\"", Term::charlist("ééé\n \u{1}")),
        ("$a", Term::from(97)),
        ("$\\n", Term::from(10)),
        ("$ ", Term::from(32)),
        ("<<1,2, 255>>", Term::binary([1, 2, 255])),
        ("<<5:3>>", Term::bit_string(vec![0b1010_0000], 3).unwrap()),
        ("<<\"é\">>", Term::binary([0xE9])),
        ("<<\"é\"/utf8, 0>>", Term::binary("é\0")),
        ("1_000", Term::from(1000)),
        ("16#fF", Term::from(255)),
        ("-2#101", Term::from(-5)),
        ("36#z", Term::from(35)),
        ("18446744073709551616", Term::from(1u128 << 64)),
        ("-16#100000000000000000", Term::from(-(1i128 << 68))),
        ("1.5e-3", Term::from(0.0015)),
        ("-0.0", Term::from(-0.0)),
        ("1.0E+2", Term::from(100.0)),
        ("true", Term::from(true)),
    ];
    for (text, term) in cases {
        assert_eq!(read(text), Ok(term), "{text}");
    }
    assert_eq!(read("fun lists:'sum'/1").unwrap().to_string(), "fun lists:sum/1");
}

#[test]
fn what_is_no_term() {
    let cases = [
        ("", 1),
        ("[", 2),
        ("[1,", 4),
        ("[1 2]", 4),
        ("{1,2]", 5),
        ("1 1", 3),
        ("Var", 1),
        ("end", 4),
        ("#{a}", 4),
        ("#a{}", 2),
        ("'a", 3),
        ("\"\\", 3),
        ("\"\\xg\"", 4),
        ("\"\\x{110000}\"", 11),
        ("<<256>>", 6),
        ("<<-1>>", 5),
        ("<<1:3,2>>", 6),
        ("<<1:9>>", 6),
        ("<<\"☃\">>", 6),
        ("1.", 2),
        ("1.0e", 5),
        ("1.0e999", 8),
        ("37#1", 3),
        ("2#2", 3),
        ("fun () -> ok end", 5),
        ("<0.1.0>", 2),
        ("f(x)", 2),
        ("1 + 1", 3),
    ];
    for (text, position) in cases {
        assert_eq!(
            read(text).unwrap_err().position,
            position,
            "{text}: {:?}",
            read(text)
        );
    }
}

#[test]
fn limits_hold() {
    let limits = Limits {
        max_depth: 3,
        max_terms: 10,
        max_bytes: 60,
        max_integer_bytes: 8,
        ..Limits::default()
    };
    let refused = |text: &str, name: &str| {
        let error = parse(text, &limits).unwrap_err().to_string();
        assert!(error.contains(name), "{text}: {error}");
    };
    assert!(parse("[[[1]]]", &limits).is_ok());
    refused("[[[[1]]]]", "max_depth");
    assert!(parse("\"123456789\"", &limits).is_ok());
    refused("\"1234567890\"", "max_terms");
    refused("[1,2,3,4,5,6,7,8,9,10]", "max_terms");
    refused(&" ".repeat(61), "max_bytes");
    assert!(parse("16#ffffffffffffffff", &limits).is_ok());
    refused("16#fffffffffffffffff", "digits");
    assert!(read(&"9".repeat(MAX_DIGITS)).is_ok());
    assert!(read(&"9".repeat(MAX_DIGITS + 1)).is_err());
    // Deep enough to end a parser that recurses.
    assert!(read(&"[".repeat(1_000_000)).is_err());
    let long = format!("'{}'", "a".repeat(256));
    assert!(read(&long).is_err());
}

/// Text in which one leaf begins within another, without end, comes back as an error.
#[test]
fn leaves_within_leaves_take_no_stack() {
    let repeated = [
        "<<",
        "<< ",
        "fun ",
        "fun a:",
        "<<fun ",
        "fun <<",
        "<<1,",
        "<<\"a\",<<",
        "[<<",
        "{fun ",
        "#{<<",
        "#{a=>fun ",
        "[a|<<",
    ];
    for part in repeated {
        let text = part.repeat(200_000);
        for text in [
            text.clone(),
            format!("[{text}"),
            format!("[1,{{#{{a=>[b|{text}"),
            format!("#{{{text}"),
        ] {
            assert!(read(&text).is_err(), "{part}");
        }
    }
    // Well-formed but for what the parts may be.
    let closed = format!("{}1{}", "<<".repeat(200_000), ">>".repeat(200_000));
    assert_eq!(
        read(&closed).unwrap_err().to_string(),
        "at character 3: a byte or text is wanted"
    );
    assert_eq!(
        read(&"fun ".repeat(200_000)).unwrap_err().to_string(),
        "at character 8: 'fun' is reserved; an atom of that name stands in quotes"
    );
}

#[test]
fn what_a_leaf_lacks_is_named() {
    let cases = [
        ("[1,", "a term is wanted, and the text ends"),
        ("?", "a term is wanted"),
        ("<<foo>>", "a byte or text is wanted"),
        ("<<1,", "a byte or text is wanted, and the text ends"),
        ("<<1.5>>", "a byte is wanted, or bits as in 5:3 at the end"),
        (
            "<<X>>",
            "a variable has no value here; an atom that begins so stands in single quotes",
        ),
        ("fun 1:a/1", "an atom as in fun lists:sum/1 is wanted"),
        (
            "fun a:",
            "an atom as in fun lists:sum/1 is wanted, and the text ends",
        ),
        (
            "fun a:end/1",
            "'end' is reserved; an atom of that name stands in quotes",
        ),
        ("fun a:b/256", "an arity of 0 to 255 is wanted"),
    ];
    for (text, what) in cases {
        assert_eq!(read(text).unwrap_err().what, what, "{text}");
    }
}

//! Terms as text, in Erlang's syntax.
//!
//! As `io_lib:format("~0tp", [Term])` prints on a node that counts all of Unicode as printable, with two
//! differences: a pid, port or reference shows its node's name (the number that the shell shows in its place means
//! something on one node only), and characters that could steer a terminal are escaped wherever a peer put them.

use std::fmt::{self, Display, Formatter, Write};

use crate::atom::Atom;
use crate::ids::{Export, Fun, Pid, Port, Reference};
use crate::map::Map;
use crate::term::Term;

impl Display for Term {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::BigInt(value) => Display::fmt(value, f),
            Self::Float(value) => write_float(f, *value),
            Self::Atom(atom) => atom.fmt(f),
            Self::Binary(bytes) => write_binary(f, bytes, None),
            Self::BitBinary { bytes, bits } => write_binary(f, bytes, Some(*bits)),
            Self::List(items) => match printable(items) {
                Some(text) => write_quoted(f, '"', text.chars()),
                None => write_items(f, '[', items, ']'),
            },
            Self::ImproperList(items, tail) => {
                f.write_char('[')?;
                write_separated(f, items)?;
                write!(f, "|{tail}]")
            }
            Self::Tuple(items) => write_items(f, '{', items, '}'),
            Self::Map(map) => map.fmt(f),
            Self::Pid(pid) => pid.fmt(f),
            Self::Port(port) => port.fmt(f),
            Self::Reference(reference) => reference.fmt(f),
            Self::Fun(fun) => fun.fmt(f),
            Self::Export(export) => export.fmt(f),
        }
    }
}

impl Display for Map {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("#{")?;
        for (index, (key, value)) in self.iter().enumerate() {
            if index > 0 {
                f.write_char(',')?;
            }
            write!(f, "{key} => {value}")?;
        }
        f.write_char('}')
    }
}

impl Display for Atom {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if is_bare_atom(self.as_str()) {
            f.write_str(self.as_str())
        } else {
            write_quoted(f, '\'', self.as_str().chars())
        }
    }
}

impl Display for Pid {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "<{}.{}.{}>", self.node, self.id, self.serial)
    }
}

impl Display for Port {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "#Port<{}.{}>", self.node, self.id)
    }
}

impl Display for Reference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "#Ref<{}", self.node)?;
        // The BEAM prints the last word first.
        self.ids.iter().rev().try_for_each(|id| write!(f, ".{id}"))?;
        f.write_char('>')
    }
}

impl Display for Fun {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.module() {
            Some(module) => write!(f, "#Fun<{module}/{}>", self.arity()),
            None => write!(f, "#Fun</{}>", self.arity()),
        }
    }
}

impl Display for Export {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "fun {}:{}/{}", self.module, self.function, self.arity)
    }
}

macro_rules! debug_as_display {
    ($($type:ty),*) => {$(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
                Display::fmt(self, f)
            }
        }
    )*};
}
debug_as_display!(Term, Map, Pid, Port, Reference, Fun, Export);

fn write_items(f: &mut Formatter<'_>, open: char, items: &[Term], close: char) -> fmt::Result {
    f.write_char(open)?;
    write_separated(f, items)?;
    f.write_char(close)
}

fn write_separated(f: &mut Formatter<'_>, items: &[Term]) -> fmt::Result {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            f.write_char(',')?;
        }
        item.fmt(f)?;
    }
    Ok(())
}

/// As `float_to_list(Float, [short])` does: the fewest digits that read back as the same number, and an exponent where the
/// text is shorter with it, or where not every integer is a float any more.
fn write_float(f: &mut Formatter<'_>, value: f64) -> fmt::Result {
    const EXACT: f64 = (1_u64 << 53) as f64;
    if !value.is_finite() {
        return write!(f, "{value:?}");
    }
    if value.is_sign_negative() {
        f.write_char('-')?;
    }
    let shortest = format!("{:e}", value.abs());
    let behind = shortest.find('e').unwrap_or_default().saturating_sub(2);
    // Of two that are as short and as near, the even one.
    let text = format!("{:.behind$e}", value.abs());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = mantissa.replace('.', "");
    let (first, rest) = digits.split_at(1);
    // The point stands behind so many of the digits.
    let place = exponent.parse::<i64>().unwrap_or_default() + 1;
    // What an exponent takes: its digits, the letter, and the point, behind which there must be a digit.
    let cost = exponent.len() as i64 + if rest.is_empty() { 3 } else { 2 };
    let zeros = |count: i64| "0".repeat(usize::try_from(count).unwrap_or_default());
    match usize::try_from(place) {
        Ok(0) => write!(f, "0.{digits}"),
        Ok(at) if at < digits.len() => {
            let (whole, fraction) = digits.split_at(at);
            write!(f, "{whole}.{fraction}")
        }
        Ok(at) if (at - digits.len()) as i64 + 2 <= cost && value.abs() < EXACT => {
            write!(f, "{digits}{}.0", zeros((at - digits.len()) as i64))
        }
        Err(_) if 2 - place <= cost => write!(f, "0.{}{digits}", zeros(-place)),
        _ if rest.is_empty() => write!(f, "{first}.0e{exponent}"),
        _ => write!(f, "{first}.{rest}e{exponent}"),
    }
}

fn write_binary(f: &mut Formatter<'_>, bytes: &[u8], bits: Option<u8>) -> fmt::Result {
    f.write_str("<<")?;
    match std::str::from_utf8(bytes) {
        Ok(text) if bits.is_none() && !text.is_empty() && text.chars().all(is_printable) => {
            write_quoted(f, '"', text.chars())?;
            if !text.is_ascii() {
                f.write_str("/utf8")?;
            }
        }
        // What is no UTF-8 may be text in Latin-1, whose bytes are code points.
        Err(_) if bits.is_none() && bytes.iter().all(|&b| is_printable(char::from(b))) => {
            write_quoted(f, '"', bytes.iter().map(|&b| char::from(b)))?;
        }
        _ => {
            for (index, &byte) in bytes.iter().enumerate() {
                if index > 0 {
                    f.write_char(',')?;
                }
                match bits {
                    Some(bits @ 1..=7) if index + 1 == bytes.len() => {
                        write!(f, "{}:{bits}", byte >> (8 - bits))?
                    }
                    _ => write!(f, "{byte}")?,
                }
            }
        }
    }
    f.write_str(">>")
}

/// The text of a non-empty list that holds nothing but printable characters.
fn printable(items: &[Term]) -> Option<String> {
    if items.is_empty() {
        return None;
    }
    let char_of =
        |item: &Term| char::from_u32(u32::try_from(item.as_int()?).ok()?).filter(|&c| is_printable(c));
    items.iter().map(char_of).collect()
}

/// What `io_lib:printable_unicode_list/1` takes, but for characters that reverse or hide text.
fn is_printable(c: char) -> bool {
    match c {
        '\n' | '\r' | '\t' | '\u{8}' | '\u{B}' | '\u{C}' | '\u{1B}' => true,
        '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}' => false,
        ' '..='~' | '\u{A0}'..='\u{FFFD}' | '\u{10000}'.. => true,
        _ => false,
    }
}

fn write_quoted(f: &mut Formatter<'_>, quote: char, text: impl Iterator<Item = char>) -> fmt::Result {
    f.write_char(quote)?;
    for c in text {
        match c {
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            '\u{8}' => f.write_str("\\b")?,
            '\u{B}' => f.write_str("\\v")?,
            '\u{C}' => f.write_str("\\f")?,
            '\u{1B}' => f.write_str("\\e")?,
            '\u{7F}' => f.write_str("\\d")?,
            c if c == quote => write!(f, "\\{c}")?,
            c if c < ' ' || ('\u{80}'..'\u{A0}').contains(&c) => write!(f, "\\{:03o}", u32::from(c))?,
            c if is_printable(c) => f.write_char(c)?,
            c => write!(f, "\\x{{{:X}}}", u32::from(c))?,
        }
    }
    f.write_char(quote)
}

/// Words that Erlang reserves, `maybe` and `else` of OTP 25 and later included.
const RESERVED: [&str; 29] = [
    "after", "and", "andalso", "band", "begin", "bnot", "bor", "bsl", "bsr", "bxor", "case", "catch", "cond",
    "div", "else", "end", "fun", "if", "let", "maybe", "not", "of", "or", "orelse", "receive", "rem", "try",
    "when", "xor",
];

pub(crate) fn is_reserved(word: &str) -> bool {
    RESERVED.contains(&word)
}

/// Whether an atom reads back without quotes: a lower-case Latin-1 letter, then Latin-1 letters, digits, `_`, `@`.
fn is_bare_atom(text: &str) -> bool {
    let lower = |c: char| c.is_ascii_lowercase() || matches!(c, 'ß'..='ö' | 'ø'..='ÿ');
    let inner =
        |c: char| lower(c) || c.is_ascii_alphanumeric() || matches!(c, 'À'..='Ö' | 'Ø'..='Þ' | '_' | '@');
    let mut chars = text.chars();
    chars.next().is_some_and(lower) && chars.all(inner) && !is_reserved(text)
}

#[cfg(test)]
mod tests {
    use crate::{Reference, Term};

    #[test]
    fn reads_as_erlang() {
        let cases = [
            (Term::tuple([Term::atom("ok"), Term::from(1)]), "{ok,1}"),
            (Term::atom("Elixir.Shop"), "'Elixir.Shop'"),
            (Term::atom("shop@h1"), "shop@h1"),
            (Term::atom("a-b"), "'a-b'"),
            (Term::atom("end"), "'end'"),
            (Term::atom(""), "''"),
            (Term::atom("it's"), r"'it\'s'"),
            (Term::charlist("hé\"y\n"), r#""hé\"y\n""#),
            (Term::list([]), "[]"),
            (Term::list([Term::from(1), Term::from(2)]), "[1,2]"),
            (
                Term::list_with_tail(vec![Term::atom("alias")], Term::from(7)),
                "[alias|7]",
            ),
            (Term::binary("abc"), r#"<<"abc">>"#),
            (Term::binary("日"), r#"<<"日"/utf8>>"#),
            (Term::binary([0, 255]), "<<0,255>>"),
            (Term::binary([]), "<<>>"),
            (
                Term::BitBinary {
                    bytes: [1, 0b1010_0000].into(),
                    bits: 3,
                },
                "<<1,5:3>>",
            ),
            (Term::from(1.0), "1.0"),
            (Term::from(1e300), "1.0e300"),
            (Term::from(-1.5e-9), "-1.5e-9"),
            (
                Term::map([(Term::atom("b"), Term::from(2)), (Term::from(1), Term::list([]))]),
                "#{1 => [],b => 2}",
            ),
        ];
        for (term, text) in cases {
            assert_eq!(term.to_string(), text);
        }
        let reference = Reference {
            node: "a@b".into(),
            creation: 1,
            ids: vec![1, 2, 3],
        };
        assert_eq!(Term::from(reference).to_string(), "#Ref<a@b.3.2.1>");
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_printed() {
        let hostile = "a\u{1b}[2J\u{7}\u{9b}\u{202e}";
        for term in [
            Term::atom(hostile),
            Term::charlist(hostile),
            Term::binary(hostile),
        ] {
            let text = term.to_string();
            assert!(
                !text.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']),
                "{text:?}"
            );
        }
    }
}

//! Terms from text, in Erlang's syntax.
//!
//! What can be written down: numbers, atoms, strings, binaries, lists, tuples, maps and `fun m:f/1`, as in a program's
//! source; nothing is evaluated. What is a term only on some node can't be: pids, ports, references, funs with code.
//! All that [`Display`](std::fmt::Display) prints of the former reads back as the same term.

use std::iter::Peekable;
use std::str::CharIndices;

use thiserror::Error;

use crate::atom::Atom;
use crate::cursor::MAX_ATOM_CHARS;
use crate::display::is_reserved;
use crate::ids::Export;
use crate::limits::Limits;
use crate::term::Term;

/// Most digits of an integer that is not hexadecimal: they take time quadratic in their number.
const MAX_DIGITS: usize = 2_500;

/// Why a text is not a term.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("at character {position}: {what}")]
pub struct ParseError {
    /// Which character of the text, from 1; one behind the last where the text ends too early.
    pub position: usize,
    /// What is wrong there.
    pub what: String,
}

/// Reads one term.
///
/// ```
/// use meshx_etf::{Limits, parse, term};
///
/// let text = r#"[1, foo, <<"x">>, {'Elixir.A', "b"}, #{id => 16#ff}]"#;
/// assert_eq!(parse(text, &Limits::default())?, term!([1, foo, "x", {@"Elixir.A", [98]}, #{id => 255}]));
/// # Ok::<(), meshx_etf::ParseError>(())
/// ```
///
/// # Errors
/// [`ParseError`]; also beyond `max_bytes` of text, `max_depth`, `max_terms` (each character of a string is one) and
/// `max_integer_bytes`.
pub fn parse(text: &str, limits: &Limits) -> Result<Term, ParseError> {
    let mut parser = Parser {
        chars: text.char_indices().peekable(),
        text,
        limits,
        terms: 0,
    };
    if text.len() > limits.max_bytes {
        return Err(parser.error(format!("at most {} bytes are read (max_bytes)", limits.max_bytes)));
    }
    parser.whole()
}

struct Parser<'a> {
    chars: Peekable<CharIndices<'a>>,
    text: &'a str,
    limits: &'a Limits,
    terms: usize,
}

/// A container that waits for more of its parts.
enum Open {
    List(Vec<Term>),
    Tail(Vec<Term>),
    Tuple(Vec<Term>),
    Key(Vec<(Term, Term)>),
    Value(Vec<(Term, Term)>, Term),
}

impl<'a> Parser<'a> {
    fn whole(&mut self) -> Result<Term, ParseError> {
        let mut open: Vec<Open> = Vec::new();
        loop {
            let mut value = match self.opening()? {
                Some(container) => {
                    if open.len() >= self.limits.depth() {
                        let limit = self.limits.depth();
                        return Err(self.error(format!("nested deeper than {limit} (max_depth)")));
                    }
                    match self.closing(&container) {
                        Some(empty) => empty,
                        None => {
                            open.push(container);
                            continue;
                        }
                    }
                }
                None => self.leaf()?,
            };
            // The value may complete the containers around it.
            loop {
                self.count(1)?;
                self.skip_blanks();
                let Some(inner) = open.pop() else {
                    return match self.peek() {
                        None => Ok(value),
                        Some(_) => Err(self.error("the term ends before this".to_owned())),
                    };
                };
                let (next, complete) = self.put(inner, value)?;
                open.extend(next);
                match complete {
                    Some(whole) => value = whole,
                    None => break,
                }
            }
        }
    }

    /// The start of a container, if one is here.
    fn opening(&mut self) -> Result<Option<Open>, ParseError> {
        self.skip_blanks();
        Ok(match self.peek() {
            Some('[') => {
                self.next();
                Some(Open::List(Vec::new()))
            }
            Some('{') => {
                self.next();
                Some(Open::Tuple(Vec::new()))
            }
            Some('#') => {
                self.next();
                self.expect("{")?;
                Some(Open::Key(Vec::new()))
            }
            _ => None,
        })
    }

    /// The container, if it ends at once.
    fn closing(&mut self, container: &Open) -> Option<Term> {
        self.skip_blanks();
        let (end, empty) = match container {
            Open::List(_) | Open::Tail(_) => (']', Term::List(Vec::new())),
            Open::Tuple(_) => ('}', Term::Tuple(Vec::new())),
            Open::Key(_) | Open::Value(..) => ('}', Term::map([])),
        };
        self.take(end).then_some(empty)
    }

    /// Adds a value to its container: what waits for more then, or the whole of it.
    fn put(&mut self, container: Open, value: Term) -> Result<(Option<Open>, Option<Term>), ParseError> {
        Ok(match container {
            Open::List(mut items) => {
                items.push(value);
                if self.take(',') {
                    (Some(Open::List(items)), None)
                } else if self.take('|') {
                    (Some(Open::Tail(items)), None)
                } else {
                    self.expect("]")?;
                    (None, Some(Term::List(items)))
                }
            }
            Open::Tail(items) => {
                self.expect("]")?;
                (None, Some(Term::list_with_tail(items, value)))
            }
            Open::Tuple(mut items) => {
                items.push(value);
                if self.take(',') {
                    (Some(Open::Tuple(items)), None)
                } else {
                    self.expect("}")?;
                    (None, Some(Term::Tuple(items)))
                }
            }
            Open::Key(pairs) => {
                self.expect("=>")?;
                (Some(Open::Value(pairs, value)), None)
            }
            Open::Value(mut pairs, key) => {
                pairs.push((key, value));
                if self.take(',') {
                    (Some(Open::Key(pairs)), None)
                } else {
                    self.expect("}")?;
                    (None, Some(Term::map(pairs)))
                }
            }
        })
    }

    fn leaf(&mut self) -> Result<Term, ParseError> {
        let Some(first) = self.peek() else {
            return Err(self.error("a term is wanted, and the text ends".to_owned()));
        };
        match first {
            '"' => {
                let mut text = Vec::new();
                // Strings side by side are one.
                while self.peek() == Some('"') {
                    text.append(&mut self.quoted('"')?);
                    self.skip_blanks();
                }
                self.count(text.len())?;
                let code = |c: u32| Term::Int(i64::from(c));
                Ok(Term::List(text.into_iter().map(code).collect()))
            }
            '\'' => {
                let text = self.quoted('\'')?;
                let text: Option<String> = text.into_iter().map(char::from_u32).collect();
                match text {
                    Some(text) => self.atom(&text),
                    None => Err(self.error("an atom of characters is wanted".to_owned())),
                }
            }
            '<' => self.binary(),
            '$' => {
                self.next();
                let character = self.character()?;
                Ok(Term::Int(i64::from(character)))
            }
            '-' | '+' => {
                self.next();
                self.skip_blanks();
                self.number(first == '-')
            }
            '0'..='9' => self.number(false),
            c if is_lower(c) => match self.word() {
                "fun" => self.export(),
                word if is_reserved(word) => Err(self.error(format!(
                    "'{word}' is reserved; an atom of that name stands in quotes"
                ))),
                word => self.atom(word),
            },
            'A'..='Z' | '_' => Err(self.error(
                "a variable has no value here; an atom that begins so stands in single quotes".to_owned(),
            )),
            _ => Err(self.error("a term is wanted".to_owned())),
        }
    }

    fn atom(&self, text: &str) -> Result<Term, ParseError> {
        match text.chars().count() {
            0..=MAX_ATOM_CHARS => Ok(Term::atom(text)),
            chars => Err(self.error(format!("an atom of {chars} characters, at most 255 are possible"))),
        }
    }

    /// What follows the word `fun`.
    fn export(&mut self) -> Result<Term, ParseError> {
        let mut name = |end: &str| -> Result<Atom, ParseError> {
            self.skip_blanks();
            match self.leaf()? {
                Term::Atom(atom) => self.expect(end).map(|()| atom),
                _ => Err(self.error("an atom is wanted, as in fun lists:sum/1".to_owned())),
            }
        };
        let (module, function) = (name(":")?, name("/")?);
        self.skip_blanks();
        match self.number(false)?.as_int().map(u8::try_from) {
            Some(Ok(arity)) => Ok(Term::from(Export {
                module,
                function,
                arity,
            })),
            _ => Err(self.error("an arity of 0 to 255 is wanted".to_owned())),
        }
    }

    fn binary(&mut self) -> Result<Term, ParseError> {
        self.expect("<<")?;
        let mut bytes: Vec<u8> = Vec::new();
        self.skip_blanks();
        if self.peek() == Some('>') {
            self.expect(">>")?;
            return Ok(Term::binary(bytes));
        }
        loop {
            self.skip_blanks();
            let mut bits = 8;
            if self.peek() == Some('"') {
                let text = self.quoted('"')?;
                self.put_text(&text, &mut bytes)?;
            } else {
                let value = self.leaf()?.as_int();
                if self.take(':') {
                    self.skip_blanks();
                    bits = self.number(false)?.as_int().unwrap_or_default();
                }
                match (value, bits) {
                    (Some(value @ 0..=255), 1..=8) if value < 1 << bits => {
                        bytes.push((value as u8) << (8 - bits));
                    }
                    _ => return Err(self.error("a byte is wanted, or bits as in 5:3 at the end".to_owned())),
                }
            }
            if bits == 8 && self.take(',') {
                continue;
            }
            self.expect(">>")?;
            let whole = Term::bit_string(bytes, bits as u8);
            return whole.ok_or_else(|| self.error("1 to 8 bits are wanted".to_owned()));
        }
    }

    /// Text in a binary: its bytes, or with `/utf8` those of its UTF-8.
    fn put_text(&mut self, text: &[u32], bytes: &mut Vec<u8>) -> Result<(), ParseError> {
        if self.take('/') {
            self.expect("utf8")?;
            let text: Option<String> = text.iter().map(|&c| char::from_u32(c)).collect();
            match text {
                Some(text) => bytes.extend_from_slice(text.as_bytes()),
                None => return Err(self.error("text without surrogates is wanted".to_owned())),
            }
            return Ok(());
        }
        for &c in text {
            let byte = u8::try_from(c);
            bytes.push(byte.map_err(|_| self.error("write /utf8 behind text beyond Latin-1".to_owned()))?);
        }
        Ok(())
    }

    /// The code points between quotes.
    fn quoted(&mut self, quote: char) -> Result<Vec<u32>, ParseError> {
        self.next();
        let mut text = Vec::new();
        while !self.at(quote) {
            text.push(self.character()?);
        }
        self.next();
        Ok(text)
    }

    /// One character, or an escape for one.
    fn character(&mut self) -> Result<u32, ParseError> {
        let missing = "the text ends where a character is wanted";
        match self.next() {
            Some('\\') => {}
            Some(c) => return Ok(u32::from(c)),
            None => return Err(self.error(missing.to_owned())),
        }
        let Some(escaped) = self.next() else {
            return Err(self.error(missing.to_owned()));
        };
        Ok(match escaped {
            'b' => 8,
            't' => 9,
            'n' => 10,
            'v' => 11,
            'f' => 12,
            'r' => 13,
            'e' => 27,
            's' => 32,
            'd' => 127,
            '^' => match self.next() {
                Some(c @ '@'..='_') => u32::from(c) & 31,
                Some(c @ 'a'..='z') => u32::from(c) & 31,
                Some('?') => 127,
                _ => return Err(self.error("a control character as in \\^a is wanted".to_owned())),
            },
            '0'..='7' => {
                let mut value = u32::from(escaped) - 48;
                for _ in 0..2 {
                    match self.peek().and_then(|c| c.to_digit(8)) {
                        Some(digit) => value = value * 8 + digit,
                        None => break,
                    }
                    self.next();
                }
                value
            }
            'x' => self.hexadecimal()?,
            other => u32::from(other),
        })
    }

    /// What follows `\x`: two digits, or any number of them in braces.
    fn hexadecimal(&mut self) -> Result<u32, ParseError> {
        let braces = self.at('{');
        if braces {
            self.next();
        }
        let mut value = 0u32;
        let mut digits = 0;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(16)) {
            if !braces && digits == 2 {
                break;
            }
            self.next();
            digits += 1;
            value = value.saturating_mul(16).saturating_add(digit);
        }
        if braces && !self.at('}') || digits == 0 || !braces && digits < 2 || value > u32::from(char::MAX) {
            return Err(self.error("a code point as in \\x{e9} is wanted".to_owned()));
        }
        if braces {
            self.next();
        }
        Ok(value)
    }

    fn number(&mut self, negative: bool) -> Result<Term, ParseError> {
        let mut digits = self.digits(10)?;
        if self.at('.') && self.follows(|c| c.is_ascii_digit()) {
            self.next();
            return self.float(negative, &digits);
        }
        let mut base = 10;
        if self.at('#') {
            base = match digits.parse() {
                Ok(base @ 2..=36) => base,
                _ => return Err(self.error("a base from 2 to 36 is wanted before #".to_owned())),
            };
            self.next();
            digits = self.digits(base)?;
        }
        let max_digits = match base {
            16 => self.limits.max_integer_bytes.saturating_mul(2),
            _ => MAX_DIGITS,
        };
        if digits.len() > max_digits {
            return Err(self.error(format!(
                "an integer of {} digits, at most {max_digits}",
                digits.len()
            )));
        }
        Ok(Term::integer_from_le_bytes(negative, &magnitude(&digits, base)))
    }

    /// What follows the point.
    fn float(&mut self, negative: bool, whole: &str) -> Result<Term, ParseError> {
        let mut text = format!("{}{whole}.{}", if negative { "-" } else { "" }, self.digits(10)?);
        if self.at('e') || self.at('E') {
            self.next();
            text.push('e');
            if self.at('-') || self.at('+') {
                text.extend(self.next());
            }
            text.push_str(&self.digits(10)?);
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Term::Float(value)),
            _ => Err(self.error("the float is too large".to_owned())),
        }
    }

    /// Digits, at least one, with single underscores between them taken out.
    fn digits(&mut self, base: u32) -> Result<String, ParseError> {
        let mut digits = String::new();
        loop {
            match self.peek() {
                Some(c) if c.is_digit(base) => digits.push(c),
                Some('_') if !digits.is_empty() && self.follows(|c| c.is_digit(base)) => {}
                _ => break,
            }
            self.next();
        }
        if digits.is_empty() {
            return Err(self.error(format!("digits of base {base} are wanted")));
        }
        Ok(digits)
    }

    /// The letters, digits, `_` and `@` that are here.
    fn word(&mut self) -> &'a str {
        let start = self.offset();
        while self.peek().is_some_and(is_inner) {
            self.next();
        }
        let end = self.offset();
        self.text.get(start..end).unwrap_or_default()
    }

    /// Blanks, and comments to the end of their line.
    fn skip_blanks(&mut self) {
        while let Some(c) = self.peek() {
            match c {
                '%' => while self.next().is_some_and(|c| c != '\n') {},
                // What Erlang takes for white space: all up to the blank, and from 128 to 160.
                '\0'..=' ' | '\u{80}'..='\u{A0}' => {
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn peek(&mut self) -> Option<char> {
        self.chars.peek().map(|&(_, c)| c)
    }

    fn next(&mut self) -> Option<char> {
        self.chars.next().map(|(_, c)| c)
    }

    fn at(&mut self, wanted: char) -> bool {
        self.peek() == Some(wanted)
    }

    /// Whether what comes after the next character is such a one.
    fn follows(&self, is: impl FnOnce(char) -> bool) -> bool {
        let mut ahead = self.chars.clone();
        ahead.next();
        ahead.next().is_some_and(|(_, c)| is(c))
    }

    /// Takes a character, and blanks before it, if it is the next.
    fn take(&mut self, wanted: char) -> bool {
        self.skip_blanks();
        let is_here = self.at(wanted);
        if is_here {
            self.next();
        }
        is_here
    }

    fn expect(&mut self, wanted: &str) -> Result<(), ParseError> {
        self.skip_blanks();
        for c in wanted.chars() {
            if !self.at(c) {
                return Err(self.error(format!("{wanted} is wanted")));
            }
            self.next();
        }
        Ok(())
    }

    fn count(&mut self, terms: usize) -> Result<(), ParseError> {
        self.terms = self.terms.saturating_add(terms);
        if self.terms > self.limits.max_terms {
            let limit = self.limits.max_terms;
            return Err(self.error(format!("more than {limit} terms (max_terms)")));
        }
        Ok(())
    }

    fn offset(&self) -> usize {
        let next = self.chars.clone().next();
        next.map_or(self.text.len(), |(at, _)| at)
    }

    fn error(&self, what: String) -> ParseError {
        let before = self.text.get(..self.offset()).unwrap_or_default();
        ParseError {
            position: before.chars().count() + 1,
            what,
        }
    }
}

fn is_lower(c: char) -> bool {
    c.is_ascii_lowercase() || matches!(c, 'ß'..='ö' | 'ø'..='ÿ')
}

fn is_inner(c: char) -> bool {
    is_lower(c) || c.is_ascii_alphanumeric() || matches!(c, 'À'..='Ö' | 'Ø'..='Þ' | '_' | '@')
}

/// Least byte first.
fn magnitude(digits: &str, base: u32) -> Vec<u8> {
    let values = digits.chars().filter_map(|c| c.to_digit(base));
    if base == 16 {
        let nibbles: Vec<u8> = values.rev().map(|digit| digit as u8).collect();
        let byte = |pair: &[u8]| pair.iter().rev().fold(0, |byte, nibble| byte << 4 | nibble);
        return nibbles.chunks(2).map(byte).collect();
    }
    let mut bytes: Vec<u8> = Vec::new();
    for digit in values {
        let mut carry = digit;
        for byte in &mut bytes {
            carry += u32::from(*byte) * base;
            *byte = carry as u8;
            carry >>= 8;
        }
        if carry > 0 {
            bytes.push(carry as u8);
        }
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
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
}

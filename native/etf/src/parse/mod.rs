//! Terms from text, in Erlang's syntax.
//!
//! What can be written down: numbers, atoms, strings, binaries, lists, tuples, maps and `fun m:f/1`, as in a program's
//! source; nothing is evaluated. What is a term only on some node can't be: pids, ports, references, funs with code.
//! All that [`Display`](std::fmt::Display) prints of the former reads back as the same term.

mod leaf;
mod number;
mod text;

#[cfg(test)]
mod tests;

use std::iter::Peekable;
use std::str::CharIndices;

use thiserror::Error;

use crate::limits::Limits;
use crate::term::Term;

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

//! What has no parts: atoms, funs, binaries, and where each kind begins.

use super::{ParseError, Parser};
use crate::atom::Atom;
use crate::cursor::MAX_ATOM_CHARS;
use crate::display::is_reserved;
use crate::ids::Export;
use crate::term::Term;

impl<'a> Parser<'a> {
    /// A term that is no container.
    ///
    /// Nothing that is called from here may call this again: the depth of such calls would be the text's choice.
    pub(super) fn leaf(&mut self) -> Result<Term, ParseError> {
        match self.peek() {
            Some('"') => self.string(),
            Some('<') => self.binary(),
            Some('\'') => self.quoted_atom().map(Term::Atom),
            Some('$' | '-' | '+' | '0'..='9') => self.numeral(),
            Some(c) if is_lower(c) => match self.word() {
                "fun" => self.export(),
                word => self.bare_atom(word).map(Term::Atom),
            },
            _ => Err(self.missing("a term")),
        }
    }

    /// What is wanted is not here.
    fn missing(&mut self, wanted: &str) -> ParseError {
        let what = match self.peek() {
            None => format!("{wanted} is wanted, and the text ends"),
            Some('A'..='Z' | '_') => {
                "a variable has no value here; an atom that begins so stands in single quotes".to_owned()
            }
            Some(_) => format!("{wanted} is wanted"),
        };
        self.error(what)
    }

    fn string(&mut self) -> Result<Term, ParseError> {
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

    /// A number, or the code of a character.
    fn numeral(&mut self) -> Result<Term, ParseError> {
        match self.peek() {
            Some('$') => {
                self.next();
                let character = self.character()?;
                Ok(Term::Int(i64::from(character)))
            }
            Some(sign @ ('-' | '+')) => {
                self.next();
                self.skip_blanks();
                self.number(sign == '-')
            }
            _ => self.number(false),
        }
    }

    fn quoted_atom(&mut self) -> Result<Atom, ParseError> {
        let text = self.quoted('\'')?;
        let text: Option<String> = text.into_iter().map(char::from_u32).collect();
        match text {
            Some(text) => self.atom(&text),
            None => Err(self.error("an atom of characters is wanted".to_owned())),
        }
    }

    fn bare_atom(&self, word: &str) -> Result<Atom, ParseError> {
        if is_reserved(word) {
            return Err(self.error(format!(
                "'{word}' is reserved; an atom of that name stands in quotes"
            )));
        }
        self.atom(word)
    }

    fn atom(&self, text: &str) -> Result<Atom, ParseError> {
        match text.chars().count() {
            0..=MAX_ATOM_CHARS => Ok(Atom::new(text)),
            chars => Err(self.error(format!("an atom of {chars} characters, at most 255 are possible"))),
        }
    }

    /// What follows the word `fun`.
    fn export(&mut self) -> Result<Term, ParseError> {
        let (module, function) = (self.name(":")?, self.name("/")?);
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

    /// An atom behind the word `fun`, with what ends it.
    fn name(&mut self, end: &str) -> Result<Atom, ParseError> {
        self.skip_blanks();
        let atom = match self.peek() {
            Some('\'') => self.quoted_atom()?,
            Some(c) if is_lower(c) => {
                let word = self.word();
                self.bare_atom(word)?
            }
            _ => return Err(self.missing("an atom as in fun lists:sum/1")),
        };
        self.expect(end)?;
        Ok(atom)
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
            match self.peek() {
                Some('"') => {
                    let text = self.quoted('"')?;
                    self.put_text(&text, &mut bytes)?;
                }
                Some('$' | '-' | '+' | '0'..='9') => {
                    let value = self.numeral()?.as_int();
                    if self.take(':') {
                        self.skip_blanks();
                        bits = self.number(false)?.as_int().unwrap_or_default();
                    }
                    match (value, bits) {
                        (Some(value @ 0..=255), 1..=8) if value < 1 << bits => {
                            bytes.push((value as u8) << (8 - bits));
                        }
                        _ => {
                            return Err(
                                self.error("a byte is wanted, or bits as in 5:3 at the end".to_owned())
                            );
                        }
                    }
                }
                _ => return Err(self.missing("a byte or text")),
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

    /// The letters, digits, `_` and `@` that are here.
    fn word(&mut self) -> &'a str {
        let start = self.offset();
        while self.peek().is_some_and(is_inner) {
            self.next();
        }
        let end = self.offset();
        self.text.get(start..end).unwrap_or_default()
    }
}

fn is_lower(c: char) -> bool {
    c.is_ascii_lowercase() || matches!(c, 'ß'..='ö' | 'ø'..='ÿ')
}

fn is_inner(c: char) -> bool {
    is_lower(c) || c.is_ascii_alphanumeric() || matches!(c, 'À'..='Ö' | 'Ø'..='Þ' | '_' | '@')
}

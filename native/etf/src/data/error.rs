//! What went wrong between a value and a term, and where.

use std::fmt;

use crate::error::{DecodeError, EncodeError};

/// Characters of a message or of a key in a path that are kept: both may quote what a peer sent.
const QUOTED: usize = 200;

/// Why a value could not become a term or a term a value, and the path to it from the outside, such as
/// `items[3].price`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataError(Box<Inner>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inner {
    text: String,
    /// Innermost first.
    path: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Key(String),
    Index(usize),
}

impl DataError {
    pub(crate) fn new(text: impl fmt::Display) -> Self {
        Self(Box::new(Inner {
            text: shorten(&text.to_string()),
            path: Vec::new(),
        }))
    }

    /// What a term is, instead of what was wanted.
    pub(crate) fn wanted(what: &str, got: &str) -> Self {
        Self::new(format_args!("{what} wanted, got {got}"))
    }

    pub(crate) fn in_key(mut self, key: impl fmt::Display) -> Self {
        self.0.path.push(Part::Key(shorten(&key.to_string())));
        self
    }

    pub(crate) fn at_index(mut self, index: usize) -> Self {
        self.0.path.push(Part::Index(index));
        self
    }

    /// The path from the outermost value, such as `items[3].price`; empty for that value itself. Elements of tuples
    /// count like those of lists, from 0; values of variants have the variant's name.
    pub fn path(&self) -> String {
        let mut path = String::new();
        for part in self.0.path.iter().rev() {
            match part {
                Part::Key(key) if path.is_empty() => path.push_str(key),
                Part::Key(key) => {
                    path.push('.');
                    path.push_str(key);
                }
                Part::Index(index) => path.push_str(&format!("[{index}]")),
            }
        }
        path
    }
}

fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTED).map(visible).collect();
    if short.len() < text.len() && text.chars().nth(QUOTED).is_some() {
        short.push_str("...");
    }
    short
}

/// Control characters could steer a terminal.
fn visible(c: char) -> char {
    if c.is_control()
        || matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
    {
        '\u{FFFD}'
    } else {
        c
    }
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.path.is_empty() {
            write!(f, "at {}: ", self.path())?;
        }
        f.write_str(&self.0.text)
    }
}

impl std::error::Error for DataError {}

impl serde::ser::Error for DataError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::new(text)
    }
}

impl serde::de::Error for DataError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::new(text)
    }
}

impl From<DecodeError> for DataError {
    fn from(error: DecodeError) -> Self {
        Self::new(error)
    }
}

impl From<EncodeError> for DataError {
    fn from(error: EncodeError) -> Self {
        Self::new(error)
    }
}

//! Just enough of HCL to read a job file: blocks, attributes, strings, numbers, lists. No expressions.

use meshx_tests::Result;

/// A block of HCL: `kind "label" { ... }`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Block {
    /// What comes before the brace: the kind, and the label when it has one.
    pub(super) head: Vec<String>,
    /// `name = value`.
    pub(super) attributes: Vec<(String, Value)>,
    /// The blocks in it.
    pub(super) blocks: Vec<Block>,
}

/// A value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// A string; what is in `${...}` stays as it is.
    Text(String),
    /// A number, `true` or `false`, as it is written.
    Word(String),
    /// A list.
    List(Vec<Value>),
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Text(String),
    Word(String),
    Sign(char),
    Line,
}

impl Block {
    /// Reads a file.
    ///
    /// # Errors
    /// What is not understood.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut tokens = tokens(text)?;
        tokens.reverse();
        let mut file = Self::default();
        file.body(&mut tokens)?;
        match tokens.last() {
            None => Ok(file),
            Some(token) => Err(format!("{token:?} where the file should end")),
        }
    }

    /// The blocks of this kind, at any depth.
    pub(super) fn all(&self, kind: &str) -> Vec<&Self> {
        let mut found = Vec::new();
        for block in &self.blocks {
            if block.head.first().is_some_and(|head| head == kind) {
                found.push(block);
            }
            found.extend(block.all(kind));
        }
        found
    }

    /// The value of an attribute of this block.
    pub(super) fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }

    fn body(&mut self, tokens: &mut Vec<Token>) -> Result<()> {
        loop {
            match tokens.pop() {
                Some(Token::Line) => {}
                Some(Token::Word(name)) if tokens.last() == Some(&Token::Sign('=')) => {
                    tokens.pop();
                    if self.attribute(&name).is_some() {
                        return Err(format!("{name} is set twice"));
                    }
                    self.attributes.push((name, value(tokens)?));
                    end_of_line(tokens)?;
                }
                Some(Token::Word(kind)) => {
                    let mut block = Self {
                        head: vec![kind],
                        ..Self::default()
                    };
                    while let Some(Token::Text(label)) = tokens.last() {
                        block.head.push(label.clone());
                        tokens.pop();
                    }
                    expect(tokens, '{')?;
                    block.body(tokens)?;
                    expect(tokens, '}')?;
                    self.blocks.push(block);
                }
                Some(other) => {
                    tokens.push(other);
                    return Ok(());
                }
                None => return Ok(()),
            }
        }
    }
}

fn value(tokens: &mut Vec<Token>) -> Result<Value> {
    match tokens.pop() {
        Some(Token::Text(text)) => Ok(Value::Text(text)),
        Some(Token::Word(word)) => Ok(Value::Word(word)),
        Some(Token::Sign('[')) => {
            let mut list = Vec::new();
            loop {
                skip_lines(tokens);
                if tokens.last() == Some(&Token::Sign(']')) {
                    tokens.pop();
                    return Ok(Value::List(list));
                }
                list.push(value(tokens)?);
                skip_lines(tokens);
                if tokens.last() != Some(&Token::Sign(']')) {
                    expect(tokens, ',')?;
                }
            }
        }
        other => Err(format!("{other:?} where a value should be")),
    }
}

fn expect(tokens: &mut Vec<Token>, sign: char) -> Result<()> {
    match tokens.pop() {
        Some(Token::Sign(seen)) if seen == sign => Ok(()),
        other => Err(format!("{other:?} where {sign} should be")),
    }
}

fn end_of_line(tokens: &[Token]) -> Result<()> {
    match tokens.last() {
        Some(Token::Line | Token::Sign('}')) | None => Ok(()),
        Some(other) => Err(format!("{other:?} where the line should end")),
    }
}

fn skip_lines(tokens: &mut Vec<Token>) {
    while tokens.last() == Some(&Token::Line) {
        tokens.pop();
    }
}

fn tokens(text: &str) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\n' => tokens.push(Token::Line),
            c if c.is_whitespace() => {}
            '#' => while rest.next_if(|c| *c != '\n').is_some() {},
            '"' => {
                let mut string = String::new();
                loop {
                    match rest.next() {
                        Some('"') => break,
                        Some('\\') => match rest.next() {
                            Some(c @ ('"' | '\\')) => string.push(c),
                            other => return Err(format!("a backslash before {other:?}")),
                        },
                        Some('\n') | None => return Err(format!("a string that does not end: {string:?}")),
                        Some(c) => string.push(c),
                    }
                }
                tokens.push(Token::Text(string));
            }
            '{' | '}' | '[' | ']' | '=' | ',' => tokens.push(Token::Sign(c)),
            c if c.is_ascii_alphanumeric() || c == '_' => {
                let mut word = String::from(c);
                while let Some(c) = rest.next_if(|c| c.is_ascii_alphanumeric() || "_-.".contains(*c)) {
                    word.push(c);
                }
                tokens.push(Token::Word(word));
            }
            other => return Err(format!("{other:?} is not expected here")),
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn blocks_lists_and_strings_are_read_and_faults_are_told() {
        let file =
            Block::parse("# x\na \"b\" {\n n = 1\n l = [\n  \"x\\\"${Y}\", \"z\",\n ]\n c {}\n}\n").unwrap();
        let a = file.all("a")[0];
        assert_eq!(a.head, ["a", "b"]);
        assert_eq!(a.attribute("n"), Some(&Value::Word("1".into())));
        let list = vec![Value::Text("x\"${Y}".into()), Value::Text("z".into())];
        assert_eq!(a.attribute("l"), Some(&Value::List(list)));
        assert_eq!(file.all("c").len(), 1);
        for fault in [
            "a {",
            "a }",
            "a = ",
            "a = 1 b = 2",
            "a = \"x",
            "a = [1 2]",
            "a \"b\" \"c\"",
            "a = 1\na = 2",
            "}",
            "a ? {}",
        ] {
            assert!(Block::parse(fault).is_err(), "{fault}");
        }
    }
}

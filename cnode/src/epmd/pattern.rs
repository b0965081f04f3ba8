//! Patterns of node names: `*` stands for any characters.

/// Names that fit one of some patterns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Patterns(Vec<String>);

/// A pattern that fits no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "pattern {pattern:?}: wanted the part of a node name before the @, with * for any characters, such as shop*"
)]
pub struct PatternError {
    pattern: String,
}

impl Patterns {
    /// Checks and takes them.
    ///
    /// # Errors
    /// The first that no name can fit.
    pub fn new<T: Into<String>>(patterns: impl IntoIterator<Item = T>) -> Result<Self, PatternError> {
        let checked = patterns.into_iter().map(|pattern| {
            let pattern = pattern.into();
            let bad = |c: char| c == '@' || c.is_whitespace() || c.is_control();
            match pattern.is_empty() || pattern.contains(bad) {
                true => Err(PatternError { pattern }),
                false => Ok(pattern),
            }
        });
        checked.collect::<Result<_, _>>().map(Self)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this name fits one of them.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| fits(pattern, name))
    }
}

/// The parts between the stars must follow one another, the first at the beginning and the last at the end. Each is
/// looked for once, so the time is bounded by both lengths.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut left) = name.strip_prefix(first) else {
        return false;
    };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        match left.find(part) {
            Some(at) => left = left.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    left.ends_with(last)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, fit, misfit) in [
            ("shop", vec!["shop"], vec!["shop1", "ashop", ""]),
            ("shop*", vec!["shop", "shop_1"], vec!["sho", "ashop"]),
            (
                "*_prelaunch_*",
                vec!["r1_prelaunch_7", "_prelaunch_"],
                vec!["r1_prelaunch", "prelaunch_7"],
            ),
            (
                "a*b*c",
                vec!["abc", "a-b-c", "abbc"],
                vec!["ab", "acb", "bc", "abcd"],
            ),
            ("a*a", vec!["aa", "aba"], vec!["a"]),
            ("*", vec!["", "x"], vec![]),
            ("a**b", vec!["ab", "a-b"], vec!["a"]),
        ] {
            let patterns = Patterns::new([pattern]).unwrap();
            fit.iter()
                .for_each(|name| assert!(patterns.matches(name), "{pattern} {name}"));
            misfit
                .iter()
                .for_each(|name| assert!(!patterns.matches(name), "{pattern} {name}"));
        }
        assert!(!Patterns::default().matches("shop"));
    }

    #[test]
    fn what_no_name_can_fit_is_refused() {
        for bad in ["", "shop@h1", "a b", "a\n"] {
            assert!(Patterns::new([bad]).is_err(), "{bad:?}");
        }
    }
}

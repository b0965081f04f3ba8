//! Who may talk to whom.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::dir::{MeshDir, Stamp};
use crate::mesh::{Decision, MeshError, NameError, ServiceName};

/// Most rules in a file.
pub(super) const MAX_RULES: usize = 4096;
const FILE: &str = "rules.json";

/// What a rule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The pair may talk.
    Allow,
    /// It may not.
    Deny,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// One service, or `*`: any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Any service.
    Any,
    /// This one.
    Exact(ServiceName),
}

impl Pattern {
    fn matches(&self, service: &ServiceName) -> bool {
        matches!(self, Self::Any) || self.is_exact(service)
    }

    fn is_exact(&self, service: &ServiceName) -> bool {
        matches!(self, Self::Exact(name) if name == service)
    }
}

impl FromStr for Pattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text == "*" {
            Ok(Self::Any)
        } else {
            ServiceName::new(text).map(Self::Exact)
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(name) => name.fmt(f),
        }
    }
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Who dials.
    pub source: Pattern,
    /// Who is dialled.
    pub destination: Pattern,
    /// What then.
    pub action: Action,
}

/// `rules.json`. A field that is not known might narrow a rule, so it makes the file unreadable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// What holds when no rule matches.
    pub default: Action,
    /// The rules, in no order: the most precise one holds.
    pub rules: Vec<Rule>,
}

impl Rules {
    /// Writes the first rules of a mesh, by which all may talk. The caller holds the lock.
    pub(super) fn ensure(dir: &MeshDir) -> Result<(), MeshError> {
        // Later a missing file is no answer: had it been a yes, then losing the file would allow all.
        match (dir.read("mesh.json")?, dir.read(FILE)?) {
            (None, None) => Self {
                default: Action::Allow,
                rules: Vec::new(),
            }
            .store(dir),
            _ => Ok(()),
        }
    }

    /// Reads the rules of a mesh.
    ///
    /// # Errors
    /// [`MeshError::Unavailable`] when the file is gone or not understood.
    pub fn load(dir: &MeshDir) -> Result<Self, MeshError> {
        let path = dir.join(FILE);
        let text = dir
            .read(FILE)?
            .ok_or_else(|| MeshError::Unavailable(format!("{} is gone", path.display())))?;
        let rules: Self = serde_json::from_str(&text)
            .map_err(|error| MeshError::Unavailable(format!("{}: {error}", path.display())))?;
        if rules.rules.len() > MAX_RULES {
            return Err(MeshError::Unavailable(format!(
                "{} has {} rules, at most {MAX_RULES} are read",
                path.display(),
                rules.rules.len()
            )));
        }
        Ok(rules)
    }

    /// Which version of the rules there is; all zero when it cannot be seen.
    pub(super) fn stamp(dir: &MeshDir) -> Stamp {
        dir.stamp(FILE)
    }

    /// Adds a rule, or replaces the one for the same pair.
    ///
    /// # Errors
    /// As [`Rules::load`], and when there are too many.
    pub fn set(dir: &MeshDir, rule: Rule) -> Result<(), MeshError> {
        let _lock = dir.lock()?;
        let mut rules = Self::load(dir)?;
        rules
            .rules
            .retain(|old| (&old.source, &old.destination) != (&rule.source, &rule.destination));
        if rules.rules.len() == MAX_RULES {
            return Err(MeshError::Refused(format!(
                "there are {MAX_RULES} rules: remove one first"
            )));
        }
        rules.rules.push(rule);
        rules.store(dir)
    }

    /// Removes the rule for a pair. False when there is none.
    ///
    /// # Errors
    /// As [`Rules::load`].
    pub fn remove(dir: &MeshDir, source: &Pattern, destination: &Pattern) -> Result<bool, MeshError> {
        let _lock = dir.lock()?;
        let mut rules = Self::load(dir)?;
        let before = rules.rules.len();
        rules
            .rules
            .retain(|old| (&old.source, &old.destination) != (source, destination));
        let removed = rules.rules.len() < before;
        if removed {
            rules.store(dir)?;
        }
        Ok(removed)
    }

    /// Sets what holds when no rule matches.
    ///
    /// # Errors
    /// As [`Rules::load`].
    pub fn set_default(dir: &MeshDir, action: Action) -> Result<(), MeshError> {
        let _lock = dir.lock()?;
        let mut rules = Self::load(dir)?;
        rules.default = action;
        rules.store(dir)
    }

    /// The decision for a pair: exact destination before `*`, then exact source before `*`; of two rules
    /// for one pair the denial.
    pub fn decide(&self, source: &ServiceName, destination: &ServiceName) -> Decision {
        let matching = self
            .rules
            .iter()
            .filter(|r| r.source.matches(source) && r.destination.matches(destination));
        let precise = |rule: &&Rule| {
            (
                rule.destination.is_exact(destination),
                rule.source.is_exact(source),
                rule.action == Action::Deny,
            )
        };
        match matching.max_by_key(precise) {
            Some(rule) => Decision {
                allowed: rule.action == Action::Allow,
                rule: format!("rule {} -> {} {}", rule.source, rule.destination, rule.action),
            },
            None => Decision {
                allowed: self.default == Action::Allow,
                rule: format!("default {}", self.default),
            },
        }
    }

    /// The rules in an order in which the first that fits a pair is the one that decides.
    pub(super) fn by_precision(&self) -> Vec<&Rule> {
        let mut rules: Vec<&Rule> = self.rules.iter().collect();
        rules.sort_by_key(|rule| {
            (
                rule.destination == Pattern::Any,
                rule.source == Pattern::Any,
                rule.action == Action::Allow,
            )
        });
        rules
    }

    fn store(&self, dir: &MeshDir) -> Result<(), MeshError> {
        let text =
            serde_json::to_string_pretty(self).map_err(|error| MeshError::Unavailable(error.to_string()))?;
        dir.replace(FILE, &text)
    }
}

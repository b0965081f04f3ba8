//! Local trust: which user of this host may be which service.
//!
//! The kernel says who is at the other end of a Unix socket (SO_PEERCRED, unix(7)); rules say which
//! services that user may register and speak as. Without rules it is the agent's own user alone.

use std::{fmt, io, str::FromStr};

use tokio::net::UnixStream;

/// Who is at the other end of a Unix socket, as of its `connect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id; supplementary groups are not told.
    pub gid: u32,
    /// Process id, for logs only: a process can end and its id be used again.
    pub pid: Option<i32>,
}

impl Peer {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What the system said.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        Ok(Self {
            uid: credentials.uid(),
            gid: credentials.gid(),
            pid: credentials.pid(),
        })
    }
}

/// One `allow_register` rule: `uid:1000=shop*,cart`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowRule {
    who: Who,
    services: Vec<Pattern>,
}

/// A rule was not written as `uid:NUMBER=SERVICE,...` or `gid:NUMBER=SERVICE,...`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule:?}: {fault}; wanted for example uid:1000=shop*,cart")]
pub struct RuleError {
    rule: String,
    fault: &'static str,
}

/// All rules of an agent.
#[derive(Debug, Clone)]
pub struct Trust {
    own_uid: u32,
    rules: Vec<AllowRule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Uid(u32),
    Gid(u32),
}

/// A service name, or its beginning when `any_end`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    text: String,
    any_end: bool,
}

impl Trust {
    /// The agent's own user may be every service; others what the rules say.
    pub fn new(own_uid: u32, rules: Vec<AllowRule>) -> Self {
        Self { own_uid, rules }
    }

    /// May this user register, and speak as, this service?
    ///
    /// # Errors
    /// The refusal's text: what was asked by whom, and which rule would allow it.
    pub fn check(&self, peer: Peer, service: &str) -> Result<(), String> {
        if peer.uid == self.own_uid || self.rules.iter().any(|rule| rule.allows(peer, service)) {
            return Ok(());
        }
        let (uid, gid) = (peer.uid, peer.gid);
        Err(format!(
            "uid {uid} (gid {gid}) may not be service {service}; the agent runs as uid {own}, start it with \
             --allow-register uid:{uid}={service} to allow it",
            own = self.own_uid
        ))
    }

    /// The user, when he may have a share only of what one agent has room for: all but its own and root.
    pub fn limited(&self, uid: u32) -> Option<u32> {
        (uid != self.own_uid && uid != 0).then_some(uid)
    }

    /// May this user cut links that are not its own? Only the agent's own and root.
    pub fn is_operator(&self, peer: Peer) -> bool {
        self.limited(peer.uid).is_none()
    }
}

impl AllowRule {
    fn allows(&self, peer: Peer, service: &str) -> bool {
        let who = match self.who {
            Who::Uid(uid) => uid == peer.uid,
            Who::Gid(gid) => gid == peer.gid,
        };
        who && self.services.iter().any(|pattern| pattern.matches(service))
    }
}

impl Pattern {
    fn matches(&self, service: &str) -> bool {
        if self.any_end {
            service.starts_with(&self.text)
        } else {
            service == self.text
        }
    }
}

impl FromStr for AllowRule {
    type Err = RuleError;

    fn from_str(rule: &str) -> Result<Self, RuleError> {
        let fault = |fault| RuleError {
            rule: rule.to_owned(),
            fault,
        };
        let (who, services) = rule.split_once('=').ok_or_else(|| fault("there is no ="))?;
        let (kind, id) = who
            .split_once(':')
            .ok_or_else(|| fault("there is no : before the ="))?;
        let id = id.parse().map_err(|_| fault("the id is no number"))?;
        let who = match kind {
            "uid" => Who::Uid(id),
            "gid" => Who::Gid(id),
            _ => return Err(fault("it starts neither with uid: nor with gid:")),
        };
        let services = services
            .split(',')
            .map(|text| {
                let pattern = match text.strip_suffix('*') {
                    Some(start) => Pattern {
                        text: start.to_owned(),
                        any_end: true,
                    },
                    None => Pattern {
                        text: text.to_owned(),
                        any_end: false,
                    },
                };
                let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                if !pattern.text.chars().all(valid) {
                    return Err(fault(
                        "a service name has only a-z, 0-9 and -, and * only at its end",
                    ));
                }
                if pattern.text.is_empty() && !pattern.any_end {
                    return Err(fault("a service name is empty"));
                }
                Ok(pattern)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { who, services })
    }
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.who {
            Who::Uid(uid) => write!(f, "uid:{uid}=")?,
            Who::Gid(gid) => write!(f, "gid:{gid}=")?,
        }
        for (index, pattern) in self.services.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let star = if pattern.any_end { "*" } else { "" };
            write!(f, "{comma}{}{star}", pattern.text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn peer(uid: u32, gid: u32) -> Peer {
        Peer { uid, gid, pid: None }
    }

    #[test]
    fn without_rules_only_the_agents_own_user_may() {
        let trust = Trust::new(1000, vec![]);
        assert!(trust.check(peer(1000, 1), "shop").is_ok());
        for other in [0, 1001] {
            let text = trust.check(peer(other, 1000), "shop").unwrap_err();
            assert!(
                text.contains(&format!("uid {other}")) && text.contains("uid 1000"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_rule_allows_its_user_its_services_and_no_more() {
        let trust = Trust::new(
            0,
            vec![
                "uid:1000=shop*,cart".parse().unwrap(),
                "gid:50=search".parse().unwrap(),
            ],
        );
        for (uid, gid, service, allowed) in [
            (1000, 1, "shop", true),
            (1000, 1, "shop-eu", true),
            (1000, 1, "cart", true),
            (1000, 1, "cart2", false),
            (1000, 1, "search", false),
            (1001, 50, "search", true),
            (1001, 50, "cart", false),
            (50, 1000, "shop", false),
            (50, 1000, "search", false),
        ] {
            assert_eq!(
                trust.check(peer(uid, gid), service).is_ok(),
                allowed,
                "{uid} {gid} {service}"
            );
        }
    }

    #[test]
    fn rules_are_printed_as_they_are_written() {
        for rule in ["uid:1000=shop*,cart", "gid:0=*"] {
            assert_eq!(rule.parse::<AllowRule>().unwrap().to_string(), rule);
        }
    }

    #[test]
    fn each_fault_of_a_rule_is_named() {
        for (rule, fault) in [
            ("uid:1000", "no ="),
            ("1000=shop", "no :"),
            ("uid:bob=shop", "no number"),
            ("uid:-1=shop", "no number"),
            ("pid:1=shop", "neither"),
            ("uid:1=", "empty"),
            ("uid:1=a,,b", "empty"),
            ("uid:1=a*b", "only at its end"),
            ("uid:1=Shop", "only a-z"),
        ] {
            let error = rule.parse::<AllowRule>().unwrap_err().to_string();
            assert!(error.contains(fault) && error.contains(rule), "{error}");
        }
    }
}

//! Other hosts: each has a loopback address of its own, by which a look-up says which host is meant.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::HOSTS_MAX;
use crate::agent::hosts;
use crate::proxy::cause::{Cause, Refusal};

/// Hosts and their addresses, within 127.64.0.0/10.
#[derive(Debug)]
pub(super) struct Hosts {
    /// Host parts of this agent.
    own: BTreeSet<String>,
    // Held for a look-up or a change, never across an await.
    others: Mutex<BTreeMap<String, Ipv4Addr>>,
}

impl Hosts {
    /// `kept` are those of an earlier life; what has become this agent's own, or is no such address, is left out.
    pub(super) fn new(own: BTreeSet<String>, kept: BTreeMap<String, Ipv4Addr>) -> Self {
        let mut taken = BTreeSet::new();
        let mut others = kept;
        others.retain(|host, ip| {
            let [first, second, ..] = ip.octets();
            let ours = (first, second >> 6) == (127, 1);
            is_usable(host) && !own.contains(host) && ours && taken.insert(*ip)
        });
        Self {
            own,
            others: Mutex::new(others),
        }
    }

    /// Gives each of them an address that has none yet, and says which ones are new.
    pub(super) fn add(&self, hosts: impl IntoIterator<Item = String>) -> Result<Vec<Ipv4Addr>, Refusal> {
        let mut others = self.lock();
        let new: Vec<String> = hosts
            .into_iter()
            .filter(|host| !self.own.contains(host) && !others.contains_key(host))
            .collect();
        if let Some(bad) = new.iter().find(|host| !is_usable(host)) {
            return Err(Cause::InvalidName.because(format!(
                "host {bad:?}: wanted a host name of letters, digits, dots, _ and -, and no address"
            )));
        }
        if others.len() + new.len() > HOSTS_MAX {
            return Err(Cause::Limit.because(format!(
                "{} hosts, at most {HOSTS_MAX} have an address here (HOSTS_MAX)",
                others.len() + new.len()
            )));
        }
        let mut taken: BTreeSet<Ipv4Addr> = others.values().copied().collect();
        let added: Vec<Ipv4Addr> = new
            .into_iter()
            .map(|host| {
                let ip = free_address(&host, &taken);
                taken.insert(ip);
                others.insert(host, ip);
                ip
            })
            .collect();
        Ok(added)
    }

    /// The host of an address.
    pub(super) fn at(&self, ip: Ipv4Addr) -> Option<String> {
        let others = self.lock();
        let found = others.iter().find(|(_, address)| **address == ip);
        found.map(|(host, _)| host.clone())
    }

    pub(super) fn addresses(&self) -> Vec<Ipv4Addr> {
        self.lock().values().copied().collect()
    }

    pub(super) fn all(&self) -> BTreeMap<String, Ipv4Addr> {
        self.lock().clone()
    }

    /// The file of Erlang's resolver. IPv6 reaches the same addresses by their mapped form (RFC 4291, section 2.5.5.2).
    pub(super) fn inetrc(&self) -> String {
        let mut text =
            "%% Written by meshx agent: each other host of the mesh has a loopback address here.\n\
                        {lookup, [file, native]}.\n"
                .to_owned();
        let own = self.own.iter().map(String::as_str).chain(["localhost"]);
        let own: BTreeSet<&str> = own.filter(|host| is_usable(host)).collect();
        let own: Vec<String> = own.into_iter().map(|host| format!("\"{host}\"")).collect();
        let own = own.join(", ");
        // A String takes all that is written.
        let _ = writeln!(
            text,
            "{{host, {{127,0,0,1}}, [{own}]}}.\n{{host, {{0,0,0,0,0,0,0,1}}, [{own}]}}."
        );
        for (host, ip) in self.lock().iter() {
            let [a, b, c, d] = ip.octets();
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let _ = writeln!(
                text,
                "{{host, {{{a},{b},{c},{d}}}, [\"{host}\"]}}.\n\
                 {{host, {{0,0,0,0,0,65535,{high},{low}}}, [\"{host}\"]}}."
            );
        }
        text
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Ipv4Addr>> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that can stand in the resolver's file, and is no address, which needs none.
pub(super) fn is_usable(host: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    hosts::is_valid(host) && host.chars().all(plain) && host.parse::<IpAddr>().is_err()
}

/// By the name, so that it is the same on every host and after a loss of what was kept; the next free one when another
/// host has it. The last byte is neither 0 nor 255.
fn free_address(host: &str, taken: &BTreeSet<Ipv4Addr>) -> Ipv4Addr {
    /// 64 * 256 * 254.
    const ADDRESSES: u32 = 64 * 256 * 254;
    let start = (fnv1a(host.as_bytes()) % u64::from(ADDRESSES)) as u32;
    let address = |number: u32| {
        let (upper, last) = (number / 254, number % 254);
        Ipv4Addr::new(127, 64 + (upper / 256) as u8, (upper % 256) as u8, 1 + last as u8)
    };
    // Far more addresses than hosts: one is free.
    (0..ADDRESSES)
        .map(|step| address((start + step) % ADDRESSES))
        .find(|ip| !taken.contains(ip))
        .unwrap_or(Ipv4Addr::LOCALHOST)
}

/// FNV-1a of 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hosts() -> Hosts {
        Hosts::new(["h1".to_owned()].into(), BTreeMap::new())
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn each_host_has_an_address_of_its_own_and_keeps_it() {
        let first = hosts();
        assert_eq!(first.add(names(&["h2", "h3", "h1"])).unwrap().len(), 2);
        assert!(first.add(names(&["h2"])).unwrap().is_empty());
        let all = first.all();
        assert_eq!(first.at(all["h2"]).unwrap(), "h2");
        assert!(first.at(Ipv4Addr::LOCALHOST).is_none() && !all.contains_key("h1"));
        let again = Hosts::new(["h1".to_owned()].into(), all.clone());
        assert_eq!(again.all(), all);
        let own_now = Hosts::new(["h2".to_owned()].into(), all.clone());
        assert!(!own_now.all().contains_key("h2"));
    }

    #[test]
    fn addresses_are_within_the_range_and_never_twice() {
        let mut taken = BTreeSet::new();
        for number in 0..300 {
            // The same name each time: the worst case.
            let ip = free_address("h2", &taken);
            let [a, b, _, d] = ip.octets();
            assert!(
                a == 127 && (64..128).contains(&b) && (1..=254).contains(&d),
                "{ip}"
            );
            assert!(taken.insert(ip), "{number}: {ip}");
        }
    }

    #[test]
    fn what_was_kept_is_not_believed_blindly() {
        let kept = |host: &str, ip: [u8; 4]| (host.to_owned(), Ipv4Addr::from(ip));
        let hosts = Hosts::new(
            BTreeSet::new(),
            BTreeMap::from([
                kept("good", [127, 64, 0, 1]),
                kept("twice", [127, 64, 0, 1]),
                kept("here", [127, 0, 0, 1]),
                kept("outside", [10, 64, 0, 1]),
                kept("bad\"]}.", [127, 64, 0, 2]),
            ]),
        );
        assert_eq!(hosts.all().into_keys().collect::<Vec<_>>(), ["good"]);
    }

    #[test]
    fn names_that_the_file_cannot_hold_and_too_many_are_refused() {
        let hosts = hosts();
        for bad in ["", "a\"b", "h 2", "h2\n", "127.0.0.5", "::1", "ü"] {
            assert_eq!(
                hosts.add(names(&[bad])).unwrap_err().cause,
                Cause::InvalidName,
                "{bad:?}"
            );
        }
        let many = (0..=HOSTS_MAX).map(|number| format!("x{number}"));
        assert_eq!(hosts.add(many).unwrap_err().cause, Cause::Limit);
        assert!(hosts.all().is_empty());
    }

    /// The reader is a real emulator.
    #[test]
    fn erlang_resolves_by_the_file() {
        let hosts = hosts();
        hosts.add(names(&["h2", "h3.example"])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("inetrc");
        std::fs::write(&path, hosts.inetrc()).unwrap();
        let script = "[io:format(\"~p~n\", [inet:getaddr(H, F)]) || {H, F} <- [{\"h2\", inet}, {\"h3.example\", inet}, \
                      {\"h1\", inet}, {\"h1\", inet6}, {\"h2\", inet6}, {\"localhost\", inet}]], halt().";
        let output = std::process::Command::new("erl")
            .env("ERL_INETRC", &path)
            .args(["-noinput", "-eval", script])
            .output()
            .unwrap();
        let all = hosts.all();
        let v4 = |ip: Ipv4Addr| {
            let [a, b, c, d] = ip.octets();
            format!("{{ok,{{{a},{b},{c},{d}}}}}")
        };
        let [a, b, c, d] = all["h2"].octets().map(u32::from);
        let wanted = [
            v4(all["h2"]),
            v4(all["h3.example"]),
            v4(Ipv4Addr::LOCALHOST),
            "{ok,{0,0,0,0,0,0,0,1}}".to_owned(),
            format!("{{ok,{{0,0,0,0,0,65535,{},{}}}}}", a << 8 | b, c << 8 | d),
            v4(Ipv4Addr::LOCALHOST),
        ];
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().collect::<Vec<_>>(), wanted);
    }
}

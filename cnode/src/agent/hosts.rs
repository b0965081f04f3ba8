//! What this host is called: the host parts of node names that an agent owns by default.

use std::fs;

/// Longest host part that is accepted: a DNS name's limit (RFC 1035, section 2.3.4).
pub const HOST_MAX: usize = 253;

/// The short host name and, where it can be told, the full one.
pub fn own_hosts() -> Vec<String> {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    names(&name, &hosts, &resolv)
}

/// Is this a host part that a node name may end in? No `@`, no blanks, no control characters.
pub fn is_valid(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= HOST_MAX
        && !host.contains(|c: char| c == '@' || c.is_whitespace() || c.is_control())
}

/// The emulator makes its long name from the host name, or from what the resolver knows about it; so does
/// this, without asking a name server.
fn names(node_name: &str, hosts: &str, resolv: &str) -> Vec<String> {
    let short = node_name.split('.').next().unwrap_or_default();
    if !is_valid(short) {
        return vec!["localhost".to_owned()];
    }
    let full = if node_name.contains('.') {
        Some(node_name.to_owned())
    } else {
        full_name_in_hosts(short, hosts).or_else(|| domain(resolv).map(|domain| format!("{short}.{domain}")))
    };
    let mut names = vec![short.to_owned()];
    names.extend(full.filter(|full| full != short && is_valid(full)));
    names
}

/// hosts(5): an address, the canonical name, aliases.
fn full_name_in_hosts(short: &str, hosts: &str) -> Option<String> {
    let start = format!("{short}.");
    hosts
        .lines()
        .filter_map(|line| line.split('#').next())
        .filter(|line| line.split_whitespace().skip(1).any(|name| name == short))
        .flat_map(|line| line.split_whitespace().skip(1))
        .find(|name| name.starts_with(&start) && name.len() > start.len())
        .map(str::to_owned)
}

/// resolv.conf(5): `domain NAME`, or the first of `search NAME...`; the last line wins.
fn domain(resolv: &str) -> Option<String> {
    resolv
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            matches!(words.next(), Some("domain" | "search"))
                .then(|| words.next())
                .flatten()
        })
        .next_back()
        .map(|name| name.trim_end_matches('.').to_owned())
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_full_names() {
        let hosts = "127.0.0.1 localhost localhost.lan\n10.0.0.5 h1.shop.example h1 # h1.old\n";
        let resolv = "nameserver 10.0.0.1\nsearch lan.example other.example\n";
        for (node_name, hosts, resolv, wanted) in [
            ("h1.example", "", "", vec!["h1", "h1.example"]),
            ("h1", hosts, resolv, vec!["h1", "h1.shop.example"]),
            ("h2", hosts, resolv, vec!["h2", "h2.lan.example"]),
            ("h2", hosts, "search .\n", vec!["h2"]),
            ("h2", "", "", vec!["h2"]),
            ("", "", "", vec!["localhost"]),
        ] {
            assert_eq!(names(node_name, hosts, resolv), wanted, "{node_name}");
        }
    }

    #[test]
    fn host_parts_are_checked() {
        for bad in ["", "a@b", "a b", "a\nb", &"x".repeat(HOST_MAX + 1)] {
            assert!(!is_valid(bad), "{bad:?}");
        }
        assert!(is_valid("h1") && is_valid("127.0.0.2") && is_valid(&"x".repeat(HOST_MAX)));
    }

    #[test]
    fn this_host_has_a_name() {
        assert!(own_hosts().iter().all(|name| is_valid(name)));
    }
}

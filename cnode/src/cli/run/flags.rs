//! The emulator flags of a node on the mesh, and how they are written in `ERL_FLAGS`.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
};

use crate::agent::hosts;

/// Longest node name: an atom's length (255 characters), of ASCII before the `@`.
const NODE_NAME_MAX: usize = 255;

/// Longest cookie in characters: an atom's length.
const COOKIE_MAX: usize = 255;

/// What a node is started with.
pub(super) struct NodeFlags<'a> {
    pub(super) name: &'a str,
    pub(super) short: bool,
    pub(super) cookie: Option<&'a str>,
    pub(super) hidden: bool,
    pub(super) cluster: Option<&'a str>,
    /// `KEY=VALUE`.
    pub(super) meta: &'a [String],
    pub(super) carrier: Carrier<'a>,
    /// With plain distribution: IPv6.
    pub(super) inet6: bool,
}

/// What the node's distribution goes by.
pub(super) enum Carrier<'a> {
    /// Our own, whose modules are there.
    Meshx(&'a Path),
    /// Plain distribution on loopback; our module, which is there, stands for the port mapper.
    Plain(&'a Path),
    /// Plain distribution on loopback of an unmodified VM.
    Epmd,
}

impl NodeFlags<'_> {
    /// The flags, quoted. `-no_epmd` also keeps the emulator from starting one.
    pub(super) fn to_erl_flags(&self) -> OsString {
        let mut words: Vec<&OsStr> = Vec::new();
        let mut flags = |flags: &[&'static str]| words.extend(flags.iter().map(|flag| OsStr::new(*flag)));
        match self.carrier {
            Carrier::Meshx(_) => flags(&["-proto_dist", "meshx", "-no_epmd"]),
            Carrier::Plain(_) => flags(&["-epmd_module", "meshx_epmd", "-start_epmd", "false"]),
            Carrier::Epmd => flags(&["-start_epmd", "false"]),
        }
        if !matches!(self.carrier, Carrier::Meshx(_)) {
            // The agent alone is to connect.
            flags(&["-kernel", "inet_dist_use_interface"]);
            match self.inet6 {
                true => flags(&["{0,0,0,0,0,0,0,1}", "-proto_dist", "inet6_tcp"]),
                false => flags(&["{127,0,0,1}"]),
            }
        }
        if let Carrier::Meshx(ebin) | Carrier::Plain(ebin) = self.carrier {
            words.extend([OsStr::new("-pa"), ebin.as_os_str()]);
        }
        words.push(OsStr::new(if self.short { "-sname" } else { "-name" }));
        words.push(OsStr::new(self.name));
        if let Some(cookie) = self.cookie {
            words.extend([OsStr::new("-setcookie"), OsStr::new(cookie)]);
        }
        if self.hidden {
            words.push(OsStr::new("-hidden"));
        }
        if let Some(label) = self.cluster {
            words.extend([OsStr::new("-meshx_cluster"), OsStr::new(label)]);
        }
        if !self.meta.is_empty() {
            words.push(OsStr::new("-meshx_meta"));
            words.extend(self.meta.iter().map(OsStr::new));
        }
        let mut line = Vec::new();
        for word in words {
            if !line.is_empty() {
                line.push(b' ');
            }
            quote(word.as_bytes(), &mut line);
        }
        OsString::from_vec(line)
    }
}

/// Appends one word as `erlexec` reads it from `ERL_FLAGS`: blanks separate words, a backslash makes the
/// next byte an ordinary one (`build_args_from_env` in OTP's erlexec.c).
fn quote(word: &[u8], line: &mut Vec<u8>) {
    for byte in word {
        if !byte.is_ascii_alphanumeric() && !b"@-_./:+,=%".contains(byte) && byte.is_ascii() {
            line.push(b'\\');
        }
        line.push(*byte);
    }
}

/// `own` in front of what was there, without the flags of a `meshx run` that this one runs inside of.
pub(super) fn prepend(own: &OsStr, present: &OsStr, outer: &OsStr) -> OsString {
    let present = match present.as_bytes().strip_prefix(outer.as_bytes()) {
        Some(rest) if !outer.is_empty() && rest.first().is_none_or(u8::is_ascii_whitespace) => rest,
        _ => present.as_bytes(),
    };
    let mut line = own.as_bytes().to_vec();
    if !present.trim_ascii().is_empty() {
        line.push(b' ');
        line.extend_from_slice(present.trim_ascii_start());
    }
    OsString::from_vec(line)
}

/// `NAME@HOST` or `NAME` as the emulator takes it (`net_kernel` accepts A-Z, a-z, 0-9, _ and - before
/// the @); it adds the host name to the latter.
pub(super) fn check_name(node: &str) -> Result<(), String> {
    let (name, host) = match node.split_once('@') {
        Some((name, host)) => (name, Some(host)),
        None => (node, None),
    };
    let wanted = "wanted for example shop@h1";
    if name.is_empty()
        || !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    {
        return Err(format!(
            "node name {node:?} needs letters, digits, _ or - before the @; {wanted}"
        ));
    }
    if name == "undefined" || name.starts_with('-') {
        return Err(format!(
            "node name {node:?} has a special meaning to the emulator; {wanted}"
        ));
    }
    if host.is_some_and(|host| !hosts::is_valid(host)) {
        return Err(format!(
            "node name {node:?} needs one host name after one @; {wanted}"
        ));
    }
    if node.len() > NODE_NAME_MAX {
        return Err(format!(
            "node name of {} bytes, at most {NODE_NAME_MAX} are possible",
            node.len()
        ));
    }
    Ok(())
}

/// Labels and metadata that reach the emulator as values: the agent checks the rest.
pub(super) fn check_labels(cluster: Option<&str>, meta: &[String]) -> Result<(), String> {
    let word = |word: &str| word.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    if let Some(label) = cluster.filter(|label| !word(label)) {
        return Err(format!("--cluster {label:?}: wanted letters, digits, - and _"));
    }
    match meta.iter().find(|pair| !word(pair) || !pair.contains('=')) {
        Some(pair) => Err(format!("--meta {pair:?}: wanted KEY=VALUE")),
        None => Ok(()),
    }
}

/// A cookie that reaches the emulator as the value of `-setcookie`: an empty word or one that looks like a flag
/// does not, and the node would take the cookie in the home directory instead.
pub(super) fn check_cookie(cookie: &str) -> Result<(), String> {
    let fault = match cookie.chars().next() {
        None => "is empty".to_owned(),
        Some(first @ ('-' | '+')) => format!("starts with {first}, which the emulator takes for a flag"),
        Some(_) if cookie.chars().count() > COOKIE_MAX => {
            format!("is longer than {COOKIE_MAX} characters")
        }
        Some(_) if cookie.contains(char::is_control) => "has control characters".to_owned(),
        Some(_) => return Ok(()),
    };
    Err(format!(
        "the cookie {fault}; give another one, or leave --cookie out to use the cookie file"
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::process::Command;

    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["shop@h1", "shop_2-x@h1.example", "shop", "a@127.0.0.2"] {
            assert_eq!(check_name(good), Ok(()));
        }
        for bad in [
            "",
            "@h1",
            "shop@",
            "a@b@c",
            "sh op@h1",
            "shop@h 1",
            "-s@h",
            "undefined",
            "ä@h1",
            "a\n@h",
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(
            check_name(&format!("{}@h1", "x".repeat(253)))
                .unwrap_err()
                .contains("at most 255")
        );
    }

    #[test]
    fn cookies_are_checked_and_not_shown() {
        for good in ["c", "a b", "x-y+z", &"ä".repeat(COOKIE_MAX)] {
            assert_eq!(check_cookie(good), Ok(()));
        }
        for (bad, fault) in [
            ("", "is empty"),
            ("-hidden", "starts with -"),
            ("+S", "starts with +"),
            ("sec\nret", "control"),
            (&"x".repeat(COOKIE_MAX + 1), "longer than 255"),
        ] {
            let text = check_cookie(bad).unwrap_err();
            assert!(
                text.contains(fault) && (bad.is_empty() || !text.contains(bad)),
                "{text}"
            );
        }
    }

    #[test]
    fn present_flags_stay_behind_ours_but_those_of_an_outer_run_go() {
        let of =
            |own: &str, present: &str, outer: &str| prepend(own.as_ref(), present.as_ref(), outer.as_ref());
        assert_eq!(of("-name a", "", ""), "-name a");
        assert_eq!(of("-name a", "+S 2", ""), "-name a +S 2");
        assert_eq!(of("-name b", "-name a +S 2", "-name a"), "-name b +S 2");
        assert_eq!(of("-name b", "-name a", "-name a"), "-name b");
        assert_eq!(of("-name b", "+S 2", "-name a"), "-name b +S 2");
        assert_eq!(of("-name b", "-name ab +S 2", "-name a"), "-name b -name ab +S 2");
    }

    #[test]
    fn labels_reach_the_emulator_or_are_refused() {
        let good = ["tier=a b".to_owned(), "_z=".to_owned()];
        assert_eq!(check_labels(Some("blue"), &good), Ok(()));
        assert_eq!(check_labels(None, &[]), Ok(()));
        for (cluster, meta) in [
            (Some("-x"), "a=1"),
            (Some(""), "a=1"),
            (None, "a"),
            (None, "-a=1"),
            (None, "+a=1"),
        ] {
            assert!(
                check_labels(cluster, &[meta.to_owned()]).is_err(),
                "{cluster:?} {meta}"
            );
        }
    }

    /// The reader is a real emulator: what it says its arguments are is what was meant.
    #[test]
    fn a_real_emulator_reads_the_words_as_they_are() {
        let flags = NodeFlags {
            name: "shop@h1",
            short: false,
            cookie: Some("a 'b\"c\\d$e`f;g*(h)~i"),
            hidden: true,
            cluster: Some("blue"),
            meta: &["tier=a b".to_owned(), "zone=1".to_owned()],
            inet6: false,
            carrier: Carrier::Meshx(Path::new("/tmp/with  two blanks/it's \"x\"/ünï/$HOME/ebin")),
        };
        // No -name here, lest the emulator start distribution.
        let line = flags
            .to_erl_flags()
            .into_string()
            .unwrap()
            .replace("-name ", "-node_name ");
        let line = line.replace("-setcookie", "-cookie_word");
        let print = "io:setopts([{encoding, unicode}]), [io:format(\"~s=~ts~n\", [F, V]) || {F, Vs} <- init:get_arguments(), V <- Vs], halt().";
        let output = Command::new("erl")
            .env(ERL_FLAGS_NAME, &line)
            .args(["+pc", "unicode", "-noinput", "-eval", print])
            .env("LC_ALL", "C.UTF-8")
            .output()
            .expect("erl must be installed to run the tests");
        let text = String::from_utf8(output.stdout).unwrap();
        for wanted in [
            "proto_dist=meshx",
            "node_name=shop@h1",
            "pa=/tmp/with  two blanks/it's \"x\"/ünï/$HOME/ebin",
            "meshx_cluster=blue",
            "meshx_meta=tier=a b",
            "meshx_meta=zone=1",
            "cookie_word=a 'b\"c\\d$e`f;g*(h)~i",
        ] {
            assert!(
                text.lines().any(|line| line == wanted),
                "{wanted} not in\n{text}\nfrom {line}"
            );
        }
    }

    #[test]
    fn a_plain_node_listens_on_loopback_alone() {
        let flags = |carrier, inet6| {
            NodeFlags {
                name: "shop@h1",
                short: true,
                cookie: None,
                hidden: false,
                cluster: None,
                meta: &[],
                carrier,
                inet6,
            }
            .to_erl_flags()
            .into_string()
            .unwrap()
        };
        assert_eq!(
            flags(Carrier::Epmd, false),
            "-start_epmd false -kernel inet_dist_use_interface \\{127,0,0,1\\} -sname shop@h1"
        );
        let six = flags(Carrier::Plain(Path::new("/e")), true);
        assert!(
            six.contains("-epmd_module meshx_epmd") && six.contains("-pa /e"),
            "{six}"
        );
        assert!(
            six.contains("inet_dist_use_interface \\{0,0,0,0,0,0,0,1\\} -proto_dist inet6_tcp"),
            "{six}"
        );
    }

    const ERL_FLAGS_NAME: &str = "ERL_FLAGS";
}

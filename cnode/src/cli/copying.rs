//! How glibc copies memory in an agent.
//!
//! On processors that announce fast short copies, glibc copies whatever is longer than 2,112 bytes by `rep movsb`. On
//! AMD's Zen 3 and 4 that is up to forty times as slow as its loop of vectors when the copy's ends lie nearly alike within
//! their pages (glibc bug 30994), as those of TLS records often do: 2.3 instead of 93 GB/s were measured, and an agent
//! spent two fifths of its time there. The limit can only be set by the environment, and before a program starts.

use std::env;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

const TUNABLES: &str = "GLIBC_TUNABLES";
/// Set when this program has begun itself anew: glibc takes the other variable away from a program with capabilities or
/// another owner's rights (`AT_SECURE`), which must not try for ever.
const DONE: &str = "MESHX_BEGAN_ANEW";
const THRESHOLD: &str = "glibc.cpu.x86_rep_movsb_threshold";
/// Beyond all that an agent copies at once.
const NEVER: &str = "0x10000000";

/// Begins this program anew where the limit is to be set first. Returns where it need not or cannot be: then copies are
/// as glibc has them.
pub(super) fn by_vectors() {
    if !cfg!(all(target_arch = "x86_64", target_env = "gnu")) || env::var_os(DONE).is_some() {
        return;
    }
    let Some(tunables) = tunables(&env::var(TUNABLES).unwrap_or_default()) else {
        return;
    };
    let mut arguments = env::args_os();
    let (Ok(program), Some(name)) = (env::current_exe(), arguments.next()) else {
        return;
    };
    if is_loader(&program) {
        return;
    }
    // Comes back only if it fails.
    let _ = Command::new(program)
        .arg0(name)
        .args(arguments)
        .env(TUNABLES, tunables)
        .env(DONE, "1")
        .exec();
}

/// Whether the dynamic loader was started, and this program by it (`ld.so meshx agent`): it would take the arguments for
/// its own.
fn is_loader(program: &Path) -> bool {
    let name = program.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b"ld-") || name.starts_with(b"ld.so")
}

/// What is set, with the limit; none when the user has set one.
fn tunables(set: &str) -> Option<String> {
    match set {
        set if set.contains(THRESHOLD) => None,
        "" => Some(format!("{THRESHOLD}={NEVER}")),
        set => Some(format!("{set}:{THRESHOLD}={NEVER}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn what_a_user_has_set_is_kept() {
        let ours = "glibc.cpu.x86_rep_movsb_threshold=0x10000000";
        assert_eq!(tunables("").unwrap(), ours);
        let theirs = "glibc.malloc.arena_max=2";
        assert_eq!(tunables(theirs).unwrap(), format!("{theirs}:{ours}"));
        assert_eq!(tunables("glibc.cpu.x86_rep_movsb_threshold=4096"), None);
        assert_eq!(tunables(ours), None);
    }
}

use super::HandshakeError;
use crate::flags::DistFlags;

/// Longest node name taken, in bytes: 255 characters of at most 4 bytes each, rounded up.
pub const MAX_NAME_LEN: usize = 1024;

/// Checks a name against the flags it came with: `name@host`, or the host alone with `NAME_ME`.
pub(super) fn check(name: &[u8], flags: DistFlags) -> Result<&str, HandshakeError> {
    if name.len() > MAX_NAME_LEN {
        return Err(HandshakeError::NameTooLong {
            len: name.len(),
            max: MAX_NAME_LEN,
        });
    }
    let host_only = flags.contains(DistFlags::NAME_ME);
    let fits = |text: &&str| {
        let well_formed = if host_only {
            !text.is_empty() && !text.contains('@')
        } else {
            text.split_once('@')
                .is_some_and(|(alive, host)| !alive.is_empty() && !host.is_empty() && !host.contains('@'))
        };
        well_formed && !text.contains(char::is_control)
    };
    std::str::from_utf8(name)
        .ok()
        .filter(fits)
        .ok_or_else(|| HandshakeError::BadName {
            name: String::from_utf8_lossy(name).into_owned(),
            wanted: if host_only {
                "a host without '@'"
            } else {
                "name@host"
            },
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_a_node_can_have_pass() {
        let full = DistFlags::default();
        for good in ["a@b", "caf\u{e9}@h1", "a@127.0.0.1", "a b@h"] {
            assert_eq!(check(good.as_bytes(), full), Ok(good));
        }
        for bad in [
            &b""[..],
            b"a",
            b"a@",
            b"@b",
            b"a@b@c",
            b"a\n@b",
            b"\xff@b",
            b"a@b\0",
        ] {
            assert!(
                matches!(check(bad, full), Err(HandshakeError::BadName { .. })),
                "{bad:?}"
            );
        }
        assert_eq!(check(b"h1", DistFlags::NAME_ME), Ok("h1"));
        assert!(check(b"a@h1", DistFlags::NAME_ME).is_err());
    }

    #[test]
    fn the_longest_name_passes_and_one_byte_more_is_refused() {
        let mut name = vec![b'x'; MAX_NAME_LEN - 2];
        name.extend_from_slice(b"@h");
        assert!(check(&name, DistFlags::default()).is_ok());
        name.push(b'h');
        let refused = HandshakeError::NameTooLong {
            len: MAX_NAME_LEN + 1,
            max: MAX_NAME_LEN,
        };
        assert_eq!(check(&name, DistFlags::default()), Err(refused));
    }
}

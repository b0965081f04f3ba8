use std::fmt;

use md5::{Digest as _, Md5};
use subtle::ConstantTimeEq as _;

/// Bytes of a digest.
pub const DIGEST_LEN: usize = 16;

/// The shared secret of a cluster. Its text never appears in output.
#[derive(Clone)]
pub struct Cookie(Box<[u8]>);

impl Cookie {
    /// A cookie from its text as `erlang:get_cookie/0` gives it.
    #[must_use]
    pub fn new(text: impl AsRef<[u8]>) -> Self {
        Self(text.as_ref().into())
    }

    /// MD5 over the cookie followed by the challenge in decimal digits.
    #[must_use]
    pub fn digest(&self, challenge: u32) -> [u8; DIGEST_LEN] {
        Md5::new()
            .chain_update(&self.0)
            .chain_update(challenge.to_string())
            .finalize()
            .into()
    }

    /// Whether `digest` answers `challenge`, in a time that doesn't depend on where they differ.
    #[must_use]
    pub fn proves(&self, challenge: u32, digest: &[u8; DIGEST_LEN]) -> bool {
        self.digest(challenge).ct_eq(digest).into()
    }
}

impl fmt::Debug for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookie(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_dist_util() {
        // erlang:md5([atom_to_list(secret), integer_to_list(4294967295)])
        let expected = [
            0x5d, 0xfd, 0x18, 0x1e, 0x69, 0xaa, 0x58, 0x7c, 0xc8, 0x12, 0xeb, 0x33, 0x3e, 0x65, 0x36, 0xb6,
        ];
        let cookie = Cookie::new("secret");
        assert_eq!(cookie.digest(u32::MAX), expected);
        assert!(cookie.proves(u32::MAX, &expected));
        assert!(!cookie.proves(1, &expected));
        assert!(!Cookie::new("Secret").proves(u32::MAX, &expected));
    }

    #[test]
    fn the_text_is_never_shown() {
        assert_eq!(format!("{:?}", Cookie::new("secret")), "Cookie(..)");
    }
}

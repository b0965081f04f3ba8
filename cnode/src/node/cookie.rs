//! The cookie from its usual place.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Longest cookie that is taken from a file, in bytes.
const MAX_COOKIE: u64 = 1024;

/// Why a file gave no cookie.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CookieError {
    /// There is no home directory to look in.
    #[error("$HOME is not set or empty, so there is no ~/.erlang.cookie: say where the cookie is")]
    NoHome,
    /// It could not be read.
    #[error("the cookie file {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others may read it.
    #[error("the cookie file {} has mode {mode:04o}: others than its owner may read it, chmod it to 0400", path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds nothing, or too much.
    #[error("the cookie file {} holds {len} bytes, 1 to {MAX_COOKIE} wanted", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its size, cut off.
        len: usize,
    },
}

/// The cookie in a file, by default `~/.erlang.cookie`, where BEAMs keep theirs. Blanks around it don't count.
///
/// # Errors
/// [`CookieError`]; as OTP does, it refuses a file that others than its owner may read.
pub fn read_cookie(path: Option<&Path>) -> Result<String, CookieError> {
    let path = match path {
        Some(path) => path.to_path_buf(),
        None => usual(std::env::var_os("HOME"))?,
    };
    let io = |error| CookieError::Io {
        path: path.clone(),
        error,
    };
    let file = fs::File::open(&path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CookieError::Permissions { path, mode });
    }
    let mut text = String::new();
    file.take(MAX_COOKIE + 1).read_to_string(&mut text).map_err(io)?;
    let len = text.len();
    match text.trim() {
        cookie if cookie.is_empty() || len as u64 > MAX_COOKIE => Err(CookieError::Length { path, len }),
        cookie => Ok(cookie.to_owned()),
    }
}

/// An empty one would lead to whatever directory the program was started in.
fn usual(home: Option<OsString>) -> Result<PathBuf, CookieError> {
    match home {
        Some(home) if !home.is_empty() => Ok(Path::new(&home).join(".erlang.cookie")),
        _ => Err(CookieError::NoHome),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_a_private_file_with_something_in_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cookie");
        let write = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            read_cookie(Some(&path))
        };
        assert_eq!(write(" SECRET\n", 0o600).unwrap(), "SECRET");
        assert!(matches!(
            write("SECRET", 0o640),
            Err(CookieError::Permissions { mode: 0o640, .. })
        ));
        assert!(matches!(write("\n", 0o600), Err(CookieError::Length { .. })));
        assert!(matches!(
            write(&"x".repeat(2000), 0o600),
            Err(CookieError::Length { .. })
        ));
        assert!(matches!(
            read_cookie(Some(dir.path().join("none").as_path())),
            Err(CookieError::Io { .. })
        ));
    }

    #[test]
    fn an_empty_home_is_none() {
        assert_eq!(usual(Some("/h".into())).unwrap(), Path::new("/h/.erlang.cookie"));
        assert!(matches!(usual(Some("".into())), Err(CookieError::NoHome)));
        assert!(matches!(usual(None), Err(CookieError::NoHome)));
    }
}

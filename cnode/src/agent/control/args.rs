//! Reads the arguments of a command.

use meshx_etf::Term;

use crate::proxy::{
    cause::{Cause, Refusal},
    local::{SECRET_LEN, Secret},
};

/// Longest text that any argument may be, unless a command says less.
pub(super) const TEXT_MAX: usize = 1024;

/// The arguments of one command. Keys that it does not know are left alone: a newer client may send more.
pub(super) struct Args<'a>(pub(super) &'a Term);

impl<'a> Args<'a> {
    /// A text that must be there.
    pub(super) fn text(&self, key: &str) -> Result<&'a str, Refusal> {
        self.optional_text(key)?.ok_or_else(|| missing(key, "a binary"))
    }

    /// A text, when it is there.
    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'a str>, Refusal> {
        let Some(term) = self.0.map_get(key) else {
            return Ok(None);
        };
        let text = term
            .as_str()
            .ok_or_else(|| wrong(key, "a binary that holds utf-8"))?;
        if text.len() > TEXT_MAX {
            let text = format!("{key} has {} bytes, at most {TEXT_MAX} are taken", text.len());
            return Err(Cause::Limit.because(text));
        }
        Ok(Some(text))
    }

    /// An integer, when it is there.
    pub(super) fn optional_int(&self, key: &str) -> Result<Option<i64>, Refusal> {
        self.0
            .map_get(key)
            .map(|term| term.as_int().ok_or_else(|| wrong(key, "an integer")))
            .transpose()
    }

    /// A boolean, when it is there.
    pub(super) fn optional_bool(&self, key: &str) -> Result<Option<bool>, Refusal> {
        self.0
            .map_get(key)
            .map(|term| term.as_bool().ok_or_else(|| wrong(key, "true or false")))
            .transpose()
    }

    /// Texts, none when they are not there.
    pub(super) fn optional_texts(&self, key: &str, max: usize) -> Result<Vec<String>, Refusal> {
        let Some(term) = self.0.map_get(key) else {
            return Ok(Vec::new());
        };
        let wrong = || wrong(key, &format!("a list of at most {max} binaries that hold utf-8"));
        let items = term
            .as_list()
            .filter(|items| items.len() <= max)
            .ok_or_else(wrong)?;
        items
            .iter()
            .map(|item| {
                let text = item.as_str().filter(|text| text.len() <= TEXT_MAX);
                text.map(str::to_owned).ok_or_else(wrong)
            })
            .collect()
    }

    /// Sixteen bytes, when they are there.
    pub(super) fn optional_link(&self, key: &str) -> Result<Option<[u8; 16]>, Refusal> {
        let Some(term) = self.0.map_get(key) else {
            return Ok(None);
        };
        let bytes = term.as_binary().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Some).ok_or_else(|| wrong(key, "a binary of 16 bytes"))
    }

    /// A registration's secret, when it is there.
    pub(super) fn optional_secret(&self, key: &str) -> Result<Option<Secret>, Refusal> {
        let Some(term) = self.0.map_get(key) else {
            return Ok(None);
        };
        let bytes = term.as_binary().and_then(|bytes| bytes.try_into().ok());
        let secret = bytes.map(Secret::from_bytes);
        secret
            .map(Some)
            .ok_or_else(|| wrong(key, &format!("a binary of {SECRET_LEN} bytes")))
    }

    /// Whatever is there.
    pub(super) fn term(&self, key: &str) -> Option<&'a Term> {
        self.0.map_get(key)
    }
}

/// An argument that is not there.
pub(super) fn missing(key: &str, wanted: &str) -> Refusal {
    Cause::InvalidRequest.because(format!("{key} is missing, wanted {wanted}"))
}

/// An argument of another kind than wanted.
pub(super) fn wrong(key: &str, wanted: &str) -> Refusal {
    Cause::InvalidRequest.because(format!("{key} is not {wanted}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use crate::agent::control::message::{map, text};

    #[test]
    fn each_kind_is_read_or_refused() {
        let term = map([
            ("node", text("a@h")),
            ("n", Term::Int(4)),
            ("hidden", Term::from(true)),
            ("link", Term::binary([7; 16])),
            ("long", text("x".repeat(TEXT_MAX + 1))),
            ("bytes", Term::binary([0xff])),
        ]);
        let args = Args(&term);
        assert_eq!(args.text("node").unwrap(), "a@h");
        assert_eq!(args.optional_int("n").unwrap(), Some(4));
        assert_eq!(args.optional_bool("hidden").unwrap(), Some(true));
        assert_eq!(args.optional_link("link").unwrap(), Some([7; 16]));
        assert_eq!(args.optional_text("none").unwrap(), None);
        assert!(args.text("none").unwrap_err().text.contains("none is missing"));
        assert_eq!(args.text("long").unwrap_err().cause, Cause::Limit);
        for error in [
            args.text("bytes").unwrap_err(),
            args.text("n").unwrap_err(),
            args.optional_int("node").unwrap_err(),
            args.optional_bool("n").unwrap_err(),
            args.optional_link("node").unwrap_err(),
            args.optional_secret("link").unwrap_err(),
        ] {
            assert_eq!(error.cause, Cause::InvalidRequest, "{error}");
        }
    }
}

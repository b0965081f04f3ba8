//! What clients may ask for: names that the operator gave, never names that a client made up.

use std::str::FromStr;

/// `find=search@search@h3`: the request `{find, Argument}` to the server `search` on the node `search@h3`.
///
/// A client says the name, and only names on the command line become atoms: a BEAM never forgets an atom, so strangers
/// must not be able to make any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) name: String,
    pub(crate) process: String,
    pub(crate) node: String,
}

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: wanted NAME=PROCESS@NODE, find=search@search@h3 for example");
        let (name, target) = text.split_once('=').ok_or_else(wrong)?;
        let (process, node) = target.split_once('@').ok_or_else(wrong)?;
        if name.is_empty() || process.is_empty() || !node.contains('@') {
            return Err(wrong());
        }
        Ok(Self {
            name: name.to_owned(),
            process: process.to_owned(),
            node: node.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_names_a_request_a_process_and_a_node() {
        let route = Route {
            name: "find".into(),
            process: "search".into(),
            node: "search@h3".into(),
        };
        assert_eq!("find=search@search@h3".parse(), Ok(route));
        for bad in [
            "",
            "find",
            "find=search",
            "find=search@h3",
            "=search@search@h3",
            "find=@search@h3",
        ] {
            assert!(bad.parse::<Route>().is_err(), "{bad}");
        }
    }
}

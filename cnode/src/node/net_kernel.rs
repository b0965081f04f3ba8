//! The process `net_kernel`, which answers `net_adm:ping/1`.
//!
//! A ping is a `gen_server:call` of `{is_auth, Node}` to `net_kernel`, and `yes` its answer
//! (`net_adm.erl` and `net_kernel.erl` in kernel).

use meshx_etf::{Atom, Term};

use super::call::Caller;
use super::server::Server;

pub(crate) struct NetKernel;

impl Server for NetKernel {
    async fn call(&mut self, request: Term, _caller: Caller) -> Option<Term> {
        let answer = match &request {
            Term::Tuple(parts) => match parts.as_slice() {
                [Term::Atom(label), Term::Atom(_)] if label.as_str() == "is_auth" => "yes",
                _ => "error",
            },
            _ => "error",
        };
        Some(Term::Atom(Atom::from(answer)))
    }
}

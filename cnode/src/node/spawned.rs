//! Processes that peers start here: spawn requests, and the calls of `erpc` that come as such.
//!
//! What runs is what the program [exposes](super::Node::expose). A function that it does not expose fails as it would
//! on a BEAM that has no such module: the process is started, and ends at once with `undef`, which `spawn`,
//! `erpc:call` and `rpc:call` each report in their own way.
//!
//! `erpc:call` starts `erpc:execute_call(Mark, M, F, Args)` and monitors it; the outcome is its exit reason (see
//! [`super::rpc`]). `erpc:cast` starts `erpc:execute_cast(M, F, Args)`.

use std::sync::Arc;

use meshx_dist::control::{Control, SpawnResult};
use meshx_etf::{Atom, Term};

use super::dispatch::Peer;
use super::event::DownReason;
use super::exits::UNSENDABLE_REASON;
use super::exposed::{Bounds, Outcome, Raised, Slot};
use super::inner::Inner;
use super::mailbox::Mailbox;
use super::payload::Payload;
use super::process::Process;
use super::watch::{Incoming, TooMany, Watched};

/// Flags of `SPAWN_REPLY`.
pub(crate) const LINKED: u32 = 1;
pub(crate) const MONITORED: u32 = 2;

/// The error that the caller of a function gets whose outcome cannot be sent.
pub(crate) const UNSENDABLE_RESULT: &str = "unsendable_result";

/// Options that tune a process of a BEAM and mean nothing here (`spawn_opt/5`).
const IGNORED: [&str; 8] = [
    "priority",
    "fullsweep_after",
    "min_heap_size",
    "min_bin_vheap_size",
    "max_heap_size",
    "message_queue_data",
    "async_dist",
    "scheduler",
];

/// Module, function and arguments of something to run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    pub(crate) module: Atom,
    pub(crate) function: Atom,
    pub(crate) args: Vec<Term>,
}

/// A peer's spawn request.
///
/// # Errors
/// Why the connection must end.
pub(crate) fn request(
    inner: &Arc<Inner>,
    peer: &Peer<'_>,
    request: Control,
    payload: Option<Payload>,
) -> Result<(), DownReason> {
    let Control::SpawnRequest {
        id,
        from,
        module,
        function,
        arity,
        options,
        ..
    } = request
    else {
        return Ok(());
    };
    let reply = |flags, result| Control::SpawnReply {
        id: id.clone(),
        to: from.clone(),
        flags,
        result,
        token: None,
    };
    let refuse = |error: &str| peer.answer(inner, reply(0, SpawnResult::Error(Atom::from(error))), None);
    let Some(flags) = flags(&options) else {
        return refuse("badopt");
    };
    let node = match peer {
        Peer::Local => &inner.name,
        Peer::Remote(connection) => &connection.node,
    };
    let bytes = payload.as_ref().map_or(0, Payload::len);
    let Some(slot) = inner.slot(node, bytes) else {
        return refuse("system_limit");
    };
    let process = inner.processes.spawn(false, false);
    let guard = Guard {
        inner: Arc::clone(inner),
        process: Arc::clone(&process),
    };
    process.set_watched();
    let watcher = peer.known(from.clone());
    let room = peer.watch(inner, |watch| {
        if flags & LINKED != 0 {
            watch.peer_links(&process.pid, watcher.clone())?;
        }
        if flags & MONITORED != 0 {
            let monitor = Incoming {
                watcher,
                watched: Watched::Pid(process.pid.clone()),
                local: process.pid.clone(),
            };
            watch.peer_monitors(id.clone(), monitor)?;
        }
        Ok(())
    });
    room.map_err(|TooMany| peer.too_many(inner))?;
    // Before anything that the process itself causes.
    peer.answer(inner, reply(flags, SpawnResult::Pid(process.pid.clone())), None)?;
    let start = Start {
        module,
        function,
        arity,
        args: payload.map(Payload::into_vec).unwrap_or_default(),
    };
    inner.spawn(run(guard, start, slot));
    Ok(())
}

/// The flags of the answer; `None` when there is an option that nobody knows.
fn flags(options: &[Term]) -> Option<u32> {
    let mut flags = 0;
    for option in options {
        let name = match option {
            Term::Atom(name) => name,
            Term::Tuple(parts) => match parts.first() {
                Some(Term::Atom(name)) => name,
                _ => return None,
            },
            _ => return None,
        };
        match name.as_str() {
            "link" => flags |= LINKED,
            "monitor" => flags |= MONITORED,
            name if IGNORED.contains(&name) => {}
            _ => return None,
        }
    }
    Some(flags)
}

/// Ends the process with `panic` if the function that it runs panics.
struct Guard {
    inner: Arc<Inner>,
    process: Arc<Process>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.inner.retire(&self.process, &Term::atom("panic"));
    }
}

/// A spawn request, its arguments not looked at yet.
struct Start {
    module: Atom,
    function: Atom,
    arity: u8,
    args: Vec<u8>,
}

/// Runs until the function returns, or an exit signal ends its process.
async fn run(guard: Guard, start: Start, slot: Slot) {
    let Guard { inner, process } = &guard;
    let is_erpc = start.module == "erpc" && start.function == "execute_call";
    let running = async {
        let args = meshx_etf::decode(&start.args, &inner.limits.terms);
        // Else it would stay for as long as the function runs.
        drop(start.args);
        let Ok(Term::List(args)) = args else {
            return Term::atom("badarg");
        };
        if args.len() != usize::from(start.arity) {
            return Term::atom("badarg");
        }
        let call = Call {
            module: start.module,
            function: start.function,
            args,
        };
        exit_reason(inner, process, call).await
    };
    tokio::select! {
        biased;
        () = process.ended() => {}
        reason = running => {
            let instead = instead_of(&reason, is_erpc);
            inner.finish(process, &reason, &instead).await;
        }
    }
    drop(slot);
}

/// What a peer gets when the reason cannot be sent, `erpc:call` as an error of the function.
fn instead_of(reason: &Term, is_erpc: bool) -> Term {
    match reason {
        Term::Tuple(parts) if is_erpc => Term::Tuple(vec![
            parts.first().cloned().unwrap_or_else(|| Term::atom("undefined")),
            Term::atom("error"),
            Term::atom(UNSENDABLE_RESULT),
            Term::list([]),
        ]),
        _ => Term::atom(UNSENDABLE_REASON),
    }
}

/// Runs what a spawn request asks for; the reason that its process ends with.
async fn exit_reason(inner: &Arc<Inner>, process: &Arc<Process>, call: Call) -> Term {
    let arity = call.args.len();
    let is = |function: &str| call.module == "erpc" && call.function == function;
    if is("execute_call") && arity == 4 {
        let mut args = call.args;
        let rest = args.split_off(1);
        let mark = args.pop().unwrap_or_else(|| Term::atom("undefined"));
        return erpc_reason(inner, process, mark, rest).await;
    }
    let call = if is("execute_cast") && arity == 3 {
        match of_terms(call.args) {
            Ok(call) => call,
            Err(_) => return Term::atom("badarg"),
        }
    } else {
        call
    };
    match apply(inner, process, call).await {
        Ok(_) => Term::atom("normal"),
        Err((raised, stack)) => match raised {
            Raised::Error(reason) => Term::tuple([reason, stack]),
            Raised::Exit(reason) => reason,
            Raised::Throw(value) => Term::tuple([Term::tuple([Term::atom("nocatch"), value]), stack]),
        },
    }
}

/// What `erpc:execute_call/4` exits with.
async fn erpc_reason(inner: &Arc<Inner>, process: &Arc<Process>, mark: Term, mfa: Vec<Term>) -> Term {
    let class = |class: &str, rest: Vec<Term>| {
        let mut parts = vec![mark.clone(), Term::atom(class)];
        parts.extend(rest);
        Term::Tuple(parts)
    };
    let Ok(call) = of_terms(mfa) else {
        let badarg = Term::tuple([Term::atom("erpc"), Term::atom("badarg")]);
        return class("error", vec![badarg]);
    };
    match apply(inner, process, call).await {
        Ok(value) => class("return", vec![value]),
        Err((Raised::Error(reason), stack)) => class("error", vec![reason, stack]),
        Err((Raised::Exit(reason), _)) => class("exit", vec![reason]),
        Err((Raised::Throw(value), _)) => class("throw", vec![value]),
    }
}

/// `[Module, Function, Args]`; what it is not is given back.
pub(crate) fn of_terms(terms: Vec<Term>) -> Result<Call, Vec<Term>> {
    match <[Term; 3]>::try_from(terms) {
        Ok([Term::Atom(module), Term::Atom(function), Term::List(args)]) => Ok(Call {
            module,
            function,
            args,
        }),
        Ok(other) => Err(other.into()),
        Err(other) => Err(other),
    }
}

/// Sees through `erlang:apply/2` of an external fun and `erlang:apply/3`, however often one is in the other.
fn unwrap(mut call: Call) -> Call {
    loop {
        if call.module != "erlang" || call.function != "apply" {
            return call;
        }
        let inner = match <[Term; 2]>::try_from(call.args) {
            Ok([Term::Export(fun), Term::List(args)]) => Ok(Call {
                module: fun.module,
                function: fun.function,
                args,
            }),
            Ok(other) => Err(other.into()),
            Err(args) => of_terms(args),
        };
        match inner {
            Ok(inner) => call = inner,
            Err(args) => {
                call.args = args;
                return call;
            }
        }
    }
}

/// Runs an exposed function in a process. What it raised comes with a stack trace as Erlang has it.
pub(crate) async fn apply(
    inner: &Arc<Inner>,
    process: &Arc<Process>,
    call: Call,
) -> Result<Term, (Raised, Term)> {
    let Call {
        module,
        function,
        args,
    } = unwrap(call);
    let stack = |last: Term| {
        let parts = [
            Term::Atom(module.clone()),
            Term::Atom(function.clone()),
            last,
            Term::list([]),
        ];
        Term::list([Term::tuple(parts)])
    };
    let arity = u8::try_from(args.len()).ok();
    let exposed = arity.and_then(|arity| inner.exposed.get(&(module.clone(), function.clone(), arity)));
    let Some(exposed) = exposed else {
        let undef = Raised::Error(Term::atom("undef"));
        return Err((undef, stack(Term::List(args))));
    };
    let arity = Term::from(i64::from(arity.unwrap_or_default()));
    let mailbox = Mailbox::of(Arc::clone(inner), Arc::clone(process));
    let outcome: Outcome = exposed(mailbox, args).await;
    outcome.map_err(|raised| (raised, stack(arity)))
}

/// A process for something that is not a spawn request of its own.
pub(crate) async fn apply_alone(inner: &Arc<Inner>, call: Call) -> Result<Term, (Raised, Term)> {
    let process = inner.processes.spawn(false, false);
    let guard = Guard {
        inner: Arc::clone(inner),
        process: Arc::clone(&process),
    };
    let outcome = tokio::select! {
        biased;
        () = process.ended() => {
            let reason = process.killed().unwrap_or_else(|| Term::atom("shutdown"));
            Err((Raised::Exit(reason), Term::list([])))
        }
        outcome = apply(inner, &process, call) => outcome,
    };
    inner.retire(&guard.process, &Term::atom("normal"));
    outcome
}

impl Inner {
    /// The right to run what a peer asks for in so many bytes.
    pub(crate) fn slot(&self, peer: &Atom, bytes: usize) -> Option<Slot> {
        let bounds = Bounds {
            per_peer: self.limits.spawned_per_peer,
            bytes_per_peer: self.limits.spawned_bytes_per_peer,
            total: self.limits.spawned_processes,
        };
        let slot = self.exposed.slot(peer, bytes, bounds);
        if slot.is_none() {
            tracing::debug!(
                node = peer.as_str(),
                "a process was not started: limit `spawned_per_peer`, `spawned_bytes_per_peer` or `spawned_processes`"
            );
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use meshx_etf::Export;

    use super::*;

    #[test]
    fn options_become_flags_or_are_refused() {
        let named = |name: &str| Term::tuple([Term::atom(name), Term::list([])]);
        assert_eq!(flags(&[]), Some(0));
        assert_eq!(flags(&[Term::atom("link")]), Some(LINKED));
        assert_eq!(
            flags(&[named("monitor"), named("priority"), Term::atom("link")]),
            Some(LINKED | MONITORED)
        );
        for unknown in [Term::atom("fast"), named("fast"), Term::tuple([]), Term::Int(1)] {
            assert_eq!(flags(std::slice::from_ref(&unknown)), None, "{unknown:?}");
        }
    }

    #[test]
    fn apply_is_seen_through_however_deep() {
        let fun = Term::Export(Box::new(Export {
            module: "m".into(),
            function: "f".into(),
            arity: 1,
        }));
        let apply = |args| Call {
            module: "erlang".into(),
            function: "apply".into(),
            args,
        };
        let mut call = apply(vec![fun, Term::list([Term::Int(7)])]);
        for _ in 0..100 {
            call = apply(vec![
                Term::Atom(call.module),
                Term::Atom(call.function),
                Term::List(call.args),
            ]);
        }
        let wanted = Call {
            module: "m".into(),
            function: "f".into(),
            args: vec![Term::Int(7)],
        };
        assert_eq!(unwrap(call), wanted);
        let odd = apply(vec![Term::Int(1), Term::Int(2)]);
        assert_eq!(unwrap(odd.clone()), odd);
    }
}

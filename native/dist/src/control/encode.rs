use meshx_etf::Term;

use super::{Control, Proc, SpawnResult, Target, altact};

impl From<Proc> for Term {
    fn from(process: Proc) -> Self {
        match process {
            Proc::Pid(pid) => Self::Pid(pid),
            Proc::Name(name) => Self::Atom(name),
        }
    }
}

impl From<SpawnResult> for Term {
    fn from(result: SpawnResult) -> Self {
        match result {
            SpawnResult::Pid(pid) => Self::Pid(pid),
            SpawnResult::Error(error) => Self::Atom(error),
        }
    }
}

/// The tuple that is sent. Fields that the specification calls unused are the empty atom, as in `erl_interface`.
impl From<Control> for Term {
    fn from(control: Control) -> Self {
        let op = control.op().0;
        let unused = || Term::atom("");
        let mut tuple = vec![Term::Int(op)];
        let mut last = None;
        match control {
            Control::Link { from, to } | Control::Unlink { from, to } | Control::GroupLeader { from, to } => {
                tuple.extend([from.into(), to.into()]);
            }
            Control::Send { to, token } => {
                tuple.extend([unused(), to.into()]);
                last = token;
            }
            Control::Exit {
                from,
                to,
                reason,
                token,
            }
            | Control::Exit2 {
                from,
                to,
                reason,
                token,
            } => {
                tuple.extend([from.into(), to.into()]);
                tuple.extend(token);
                last = Some(reason);
            }
            Control::NodeLink => {}
            Control::RegSend { from, to, token } => {
                tuple.extend([from.into(), unused(), to.into()]);
                last = token;
            }
            Control::MonitorP { from, to, reference } | Control::DemonitorP { from, to, reference } => {
                tuple.extend([from.into(), to.into(), reference.into()]);
            }
            Control::MonitorPExit {
                from,
                to,
                reference,
                reason,
            } => {
                tuple.extend([from.into(), to.into(), reference.into(), reason]);
            }
            Control::SendSender { from, to, token }
            | Control::PayloadExit { from, to, token }
            | Control::PayloadExit2 { from, to, token } => {
                tuple.extend([from.into(), to.into()]);
                last = token;
            }
            Control::PayloadMonitorPExit { from, to, reference } => {
                tuple.extend([from.into(), to.into(), reference.into()]);
            }
            Control::SpawnRequest {
                id,
                from,
                group_leader,
                module,
                function,
                arity,
                options,
                token,
            } => {
                let entry = Term::tuple([module.into(), function.into(), arity.into()]);
                tuple.extend([
                    id.into(),
                    from.into(),
                    group_leader.into(),
                    entry,
                    Term::List(options),
                ]);
                last = token;
            }
            Control::SpawnReply {
                id,
                to,
                flags,
                result,
                token,
            } => {
                tuple.extend([id.into(), to.into(), flags.into(), result.into()]);
                last = token;
            }
            Control::AliasSend { from, alias, token } => {
                tuple.extend([from.into(), alias.into()]);
                last = token;
            }
            Control::UnlinkId { id, from, to } | Control::UnlinkIdAck { id, from, to } => {
                tuple.extend([id.into(), from.into(), to.into()]);
            }
            Control::AltactSig {
                from,
                to,
                priority,
                exit,
                token,
            } => {
                let bit = |set: bool, bit| if set { bit } else { 0 };
                let (kind, to) = match to {
                    Target::Pid(pid) => (0, pid.into()),
                    Target::Name(name) => (altact::NAME, name.into()),
                    Target::Alias(alias) => (altact::ALIAS, alias.into()),
                };
                let flags = kind
                    | bit(priority, altact::PRIORITY)
                    | bit(exit, altact::EXIT)
                    | bit(token.is_some(), altact::TOKEN);
                tuple.extend([Term::Int(flags), from.into(), to]);
                last = token;
            }
            Control::Unknown { fields, .. } => tuple.extend(fields),
        }
        tuple.extend(last);
        Term::Tuple(tuple)
    }
}

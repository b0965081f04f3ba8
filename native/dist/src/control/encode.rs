use meshx_etf::{Atom, EncodeError, Pid, Reference, Term, encode_bare};

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

const SMALL_TUPLE: u8 = 104;
const SMALL_INTEGER: u8 = 97;
const SMALL_ATOM_UTF8: u8 = 119;
const NEW_PID: u8 = 88;
const NEWER_REFERENCE: u8 = 90;

impl Control {
    /// Appends the encoded tuple to `out`, without a version byte. The messages that make nearly all traffic are
    /// written without building a term first; a test holds both ways against each other.
    pub(crate) fn encode(self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        if self.put(out).is_some() {
            return Ok(());
        }
        out.truncate(start);
        encode_bare(&Term::from(self), out)
    }

    /// `None` for what goes the general way.
    fn put(&self, out: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::SendSender {
                from,
                to,
                token: None,
            } => {
                out.extend_from_slice(&[SMALL_TUPLE, 3, SMALL_INTEGER, 22]);
                put_pid(from, out)?;
                put_pid(to, out)
            }
            Self::Send { to, token: None } => {
                out.extend_from_slice(&[SMALL_TUPLE, 3, SMALL_INTEGER, 2, SMALL_ATOM_UTF8, 0]);
                put_pid(to, out)
            }
            Self::RegSend {
                from,
                to,
                token: None,
            } => {
                out.extend_from_slice(&[SMALL_TUPLE, 4, SMALL_INTEGER, 6]);
                put_pid(from, out)?;
                out.extend_from_slice(&[SMALL_ATOM_UTF8, 0]);
                put_atom(to, out)
            }
            Self::AliasSend {
                from,
                alias,
                token: None,
            } => {
                out.extend_from_slice(&[SMALL_TUPLE, 3, SMALL_INTEGER, 33]);
                put_pid(from, out)?;
                put_reference(alias, out)
            }
            Self::AltactSig {
                from,
                to: Target::Alias(alias),
                priority: false,
                exit: false,
                token: None,
            } => {
                let flags = altact::ALIAS as u8;
                out.extend_from_slice(&[SMALL_TUPLE, 4, SMALL_INTEGER, 37, SMALL_INTEGER, flags]);
                put_pid(from, out)?;
                put_reference(alias, out)
            }
            _ => None,
        }
    }
}

fn put_atom(atom: &Atom, out: &mut Vec<u8>) -> Option<()> {
    let text = atom.as_str();
    // So many bytes have no more characters than an atom may have.
    let len = u8::try_from(text.len()).ok()?;
    out.extend_from_slice(&[SMALL_ATOM_UTF8, len]);
    out.extend_from_slice(text.as_bytes());
    Some(())
}

fn put_pid(pid: &Pid, out: &mut Vec<u8>) -> Option<()> {
    out.push(NEW_PID);
    put_atom(&pid.node, out)?;
    let mut words = [0; 12];
    for (place, word) in words.chunks_exact_mut(4).zip([pid.id, pid.serial, pid.creation]) {
        place.copy_from_slice(&word.to_be_bytes());
    }
    out.extend_from_slice(&words);
    Some(())
}

fn put_reference(reference: &Reference, out: &mut Vec<u8>) -> Option<()> {
    let count = u8::try_from(reference.ids.len())
        .ok()
        .filter(|count| (1..=5).contains(count))?;
    out.extend_from_slice(&[NEWER_REFERENCE, 0, count]);
    put_atom(&reference.node, out)?;
    for word in std::iter::once(&reference.creation).chain(&reference.ids) {
        out.extend_from_slice(&word.to_be_bytes());
    }
    Some(())
}

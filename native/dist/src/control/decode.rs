use meshx_etf::{Atom, Pid, Reference, Term};

use super::{Control, Op, Proc, SpawnResult, Target, altact};

/// Why a term is not a control message. The connection is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Not a tuple that begins with an integer of 64 bits.
    #[error("control message is {got}, wanted a tuple that begins with an operation")]
    NoOperation {
        /// What it is instead.
        got: &'static str,
    },
    /// Too few or too many fields for the operation.
    #[error("{op} has {got} fields behind the operation, wanted {wanted}")]
    Arity {
        /// The operation.
        op: Op,
        /// Fields that came.
        got: usize,
        /// Fields of this operation.
        wanted: usize,
    },
    /// A field of another type, or out of its range.
    #[error("field {position} of {op} is {got}, wanted {wanted}")]
    Field {
        /// The operation.
        op: Op,
        /// Position in the tuple; the operation's is 1.
        position: usize,
        /// Type of the field that came.
        got: &'static str,
        /// What fits there.
        wanted: &'static str,
    },
}

impl TryFrom<Term> for Control {
    type Error = ControlError;

    /// Reads a control message; an unknown operation is kept, a known one must be exact.
    fn try_from(term: Term) -> Result<Self, ControlError> {
        let got = kind(&term);
        let Term::Tuple(tuple) = term else {
            return Err(ControlError::NoOperation { got });
        };
        let mut tuple = tuple.into_iter();
        let op = match tuple.next() {
            Some(Term::Int(op)) => Op(op),
            Some(other) => return Err(ControlError::NoOperation { got: kind(&other) }),
            None => {
                return Err(ControlError::NoOperation {
                    got: "an empty tuple",
                });
            }
        };
        let fields = Fields {
            op,
            position: 1,
            fields: tuple,
        };
        match op {
            Op::LINK | Op::UNLINK | Op::GROUP_LEADER => fields.pair(),
            Op::SEND
            | Op::SEND_TT
            | Op::REG_SEND
            | Op::REG_SEND_TT
            | Op::SEND_SENDER
            | Op::SEND_SENDER_TT => fields.send(),
            Op::ALIAS_SEND | Op::ALIAS_SEND_TT => fields.alias_send(),
            Op::EXIT | Op::EXIT_TT | Op::EXIT2 | Op::EXIT2_TT => fields.exit(),
            Op::PAYLOAD_EXIT | Op::PAYLOAD_EXIT_TT | Op::PAYLOAD_EXIT2 | Op::PAYLOAD_EXIT2_TT => {
                fields.payload_exit()
            }
            Op::MONITOR_P | Op::DEMONITOR_P => fields.monitor(),
            Op::MONITOR_P_EXIT | Op::PAYLOAD_MONITOR_P_EXIT => fields.monitor_exit(),
            Op::SPAWN_REQUEST | Op::SPAWN_REQUEST_TT => fields.spawn_request(),
            Op::SPAWN_REPLY | Op::SPAWN_REPLY_TT => fields.spawn_reply(),
            Op::UNLINK_ID | Op::UNLINK_ID_ACK => fields.unlink_id(),
            Op::NODE_LINK => fields.exactly(0).map(|_| Self::NodeLink),
            Op::ALTACT_SIG => fields.altact_sig(),
            Op(op) => Ok(Self::Unknown {
                op,
                fields: fields.fields.collect(),
            }),
        }
    }
}

/// The elements behind the operation. Arity is checked before the first is taken.
struct Fields {
    op: Op,
    position: usize,
    fields: std::vec::IntoIter<Term>,
}

impl Fields {
    fn pair(self) -> Result<Control, ControlError> {
        let mut f = self.exactly(2)?;
        let (from, to) = (f.pid()?, f.pid()?);
        Ok(match f.op {
            Op::LINK => Control::Link { from, to },
            Op::UNLINK => Control::Unlink { from, to },
            _ => Control::GroupLeader { from, to },
        })
    }

    fn send(self) -> Result<Control, ControlError> {
        match self.op {
            Op::SEND | Op::SEND_TT => {
                let mut f = self.with_token(2, Op::SEND_TT)?;
                f.unused()?;
                Ok(Control::Send {
                    to: f.pid()?,
                    token: f.token()?,
                })
            }
            Op::REG_SEND | Op::REG_SEND_TT => {
                let mut f = self.with_token(3, Op::REG_SEND_TT)?;
                let from = f.pid()?;
                f.unused()?;
                Ok(Control::RegSend {
                    from,
                    to: f.atom()?,
                    token: f.token()?,
                })
            }
            _ => {
                let mut f = self.with_token(2, Op::SEND_SENDER_TT)?;
                Ok(Control::SendSender {
                    from: f.pid()?,
                    to: f.pid()?,
                    token: f.token()?,
                })
            }
        }
    }

    fn alias_send(self) -> Result<Control, ControlError> {
        let mut f = self.with_token(2, Op::ALIAS_SEND_TT)?;
        Ok(Control::AliasSend {
            from: f.pid()?,
            alias: f.reference()?,
            token: f.token()?,
        })
    }

    /// The token comes before the reason.
    fn exit(self) -> Result<Control, ControlError> {
        let traced = matches!(self.op, Op::EXIT_TT | Op::EXIT2_TT);
        let mut f = self.exactly(if traced { 4 } else { 3 })?;
        let (from, to) = (f.pid()?, f.pid()?);
        let token = if traced {
            Some(f.term("a trace token")?)
        } else {
            None
        };
        let reason = f.term("an exit reason")?;
        Ok(match f.op {
            Op::EXIT | Op::EXIT_TT => Control::Exit {
                from,
                to,
                reason,
                token,
            },
            _ => Control::Exit2 {
                from,
                to,
                reason,
                token,
            },
        })
    }

    fn payload_exit(self) -> Result<Control, ControlError> {
        let of_link = matches!(self.op, Op::PAYLOAD_EXIT | Op::PAYLOAD_EXIT_TT);
        let mut f = self.with_token(
            2,
            if of_link {
                Op::PAYLOAD_EXIT_TT
            } else {
                Op::PAYLOAD_EXIT2_TT
            },
        )?;
        let (from, to, token) = (f.pid()?, f.pid()?, f.token()?);
        Ok(if of_link {
            Control::PayloadExit { from, to, token }
        } else {
            Control::PayloadExit2 { from, to, token }
        })
    }

    fn monitor(self) -> Result<Control, ControlError> {
        let mut f = self.exactly(3)?;
        let (from, to, reference) = (f.pid()?, f.process()?, f.reference()?);
        Ok(match f.op {
            Op::MONITOR_P => Control::MonitorP { from, to, reference },
            _ => Control::DemonitorP { from, to, reference },
        })
    }

    fn monitor_exit(self) -> Result<Control, ControlError> {
        let with_reason = self.op == Op::MONITOR_P_EXIT;
        let mut f = self.exactly(if with_reason { 4 } else { 3 })?;
        let (from, to, reference) = (f.process()?, f.pid()?, f.reference()?);
        Ok(if with_reason {
            Control::MonitorPExit {
                from,
                to,
                reference,
                reason: f.term("an exit reason")?,
            }
        } else {
            Control::PayloadMonitorPExit { from, to, reference }
        })
    }

    fn spawn_request(self) -> Result<Control, ControlError> {
        let mut f = self.with_token(5, Op::SPAWN_REQUEST_TT)?;
        let (id, from, group_leader) = (f.reference()?, f.pid()?, f.pid()?);
        let entry = |term| match term {
            Term::Tuple(mfa) => match <[Term; 3]>::try_from(mfa) {
                Ok([Term::Atom(module), Term::Atom(function), Term::Int(arity)]) => {
                    u8::try_from(arity).ok().map(|arity| (module, function, arity))
                }
                _ => None,
            },
            _ => None,
        };
        let (module, function, arity) =
            f.field("{module, function, arity} with an arity of at most 255", entry)?;
        let list = |term| {
            if let Term::List(items) = term {
                Some(items)
            } else {
                None
            }
        };
        let options = f.field("a list of options", list)?;
        Ok(Control::SpawnRequest {
            id,
            from,
            group_leader,
            module,
            function,
            arity,
            options,
            token: f.token()?,
        })
    }

    fn spawn_reply(self) -> Result<Control, ControlError> {
        let mut f = self.with_token(4, Op::SPAWN_REPLY_TT)?;
        let (id, to) = (f.reference()?, f.pid()?);
        let flags = f.field("flags of 32 bits", |term| u32::try_from(term.as_int()?).ok())?;
        let result = f.field("a pid or an atom", |term| match term {
            Term::Pid(pid) => Some(SpawnResult::Pid(pid)),
            Term::Atom(error) => Some(SpawnResult::Error(error)),
            _ => None,
        })?;
        Ok(Control::SpawnReply {
            id,
            to,
            flags,
            result,
            token: f.token()?,
        })
    }

    fn unlink_id(self) -> Result<Control, ControlError> {
        let mut f = self.exactly(3)?;
        let id = f.field("an id from 1 to 2^64 - 1", |term| match term {
            Term::Int(id) => u64::try_from(id).ok().filter(|id| *id > 0),
            Term::BigInt(id) => id.to_u64(),
            _ => None,
        })?;
        let (from, to) = (f.pid()?, f.pid()?);
        Ok(match f.op {
            Op::UNLINK_ID => Control::UnlinkId { id, from, to },
            _ => Control::UnlinkIdAck { id, from, to },
        })
    }

    /// The flags say what kind of target comes, and whether there is a token.
    fn altact_sig(mut self) -> Result<Control, ControlError> {
        let traced = self.fields.len() == 4;
        self = self.exactly(if traced { 4 } else { 3 })?;
        let known = altact::PRIORITY | altact::TOKEN | altact::ALIAS | altact::NAME | altact::EXIT;
        let wanted = "flags of 5 bits that fit the other fields";
        let flags = self.field(wanted, |term| {
            let flags = term.as_int()?;
            let has = |bit| flags & bit != 0;
            let kind = !(has(altact::NAME) && (has(altact::ALIAS) || has(altact::EXIT)));
            (flags & !known == 0 && has(altact::TOKEN) == traced && kind).then_some(flags)
        })?;
        let from = self.pid()?;
        let to = if flags & altact::ALIAS != 0 {
            Target::Alias(self.reference()?)
        } else if flags & altact::NAME != 0 {
            Target::Name(self.atom()?)
        } else {
            Target::Pid(self.pid()?)
        };
        Ok(Control::AltactSig {
            from,
            to,
            priority: flags & altact::PRIORITY != 0,
            exit: flags & altact::EXIT != 0,
            token: self.token()?,
        })
    }

    fn exactly(self, wanted: usize) -> Result<Self, ControlError> {
        match self.fields.len() {
            got if got == wanted => Ok(self),
            got => Err(ControlError::Arity {
                op: self.op,
                got,
                wanted,
            }),
        }
    }

    /// For operations whose traced form has the token as one more field at the end.
    fn with_token(self, plain: usize, traced: Op) -> Result<Self, ControlError> {
        let wanted = plain + usize::from(self.op == traced);
        self.exactly(wanted)
    }

    /// What is left once the arity was checked and the other fields were taken: the token or nothing.
    fn token(&mut self) -> Result<Option<Term>, ControlError> {
        if self.fields.len() == 0 {
            Ok(None)
        } else {
            self.term("a trace token").map(Some)
        }
    }

    fn field<T>(
        &mut self,
        wanted: &'static str,
        read: impl FnOnce(Term) -> Option<T>,
    ) -> Result<T, ControlError> {
        self.position += 1;
        let (op, position) = (self.op, self.position);
        let missing = ControlError::Field {
            op,
            position,
            got: "missing",
            wanted,
        };
        let term = self.fields.next().ok_or(missing)?;
        let got = kind(&term);
        read(term).ok_or(ControlError::Field {
            op,
            position,
            got,
            wanted,
        })
    }

    fn term(&mut self, wanted: &'static str) -> Result<Term, ControlError> {
        self.field(wanted, Some)
    }

    fn unused(&mut self) -> Result<(), ControlError> {
        self.term("anything").map(drop)
    }

    fn pid(&mut self) -> Result<Pid, ControlError> {
        self.field("a pid", |term| {
            if let Term::Pid(pid) = term {
                Some(pid)
            } else {
                None
            }
        })
    }

    fn atom(&mut self) -> Result<Atom, ControlError> {
        self.field("an atom", |term| {
            if let Term::Atom(atom) = term {
                Some(atom)
            } else {
                None
            }
        })
    }

    fn reference(&mut self) -> Result<Reference, ControlError> {
        self.field("a reference", |term| {
            if let Term::Reference(it) = term {
                Some(*it)
            } else {
                None
            }
        })
    }

    fn process(&mut self) -> Result<Proc, ControlError> {
        self.field("a pid or a name", |term| match term {
            Term::Pid(pid) => Some(Proc::Pid(pid)),
            Term::Atom(name) => Some(Proc::Name(name)),
            _ => None,
        })
    }
}

fn kind(term: &Term) -> &'static str {
    match term {
        Term::Int(_) | Term::BigInt(_) => "an integer",
        Term::Float(_) => "a float",
        Term::Atom(_) => "an atom",
        Term::Binary(_) => "a binary",
        Term::BitBinary { .. } => "a bit string",
        Term::List(_) => "a list",
        Term::ImproperList(..) => "an improper list",
        Term::Tuple(_) => "a tuple",
        Term::Map(_) => "a map",
        Term::Pid(_) => "a pid",
        Term::Port(_) => "a port",
        Term::Reference(_) => "a reference",
        Term::Fun(_) | Term::Export(_) => "a fun",
    }
}

use meshx_etf::{Atom, AtomRef, Limits, Pid, PidRef, Reference, Token, Walk, decode_bare_prefix};

use super::LinkError;
use crate::control::{Control, Op};

/// Node names that are kept: on a link nearly all are those of its two ends.
const NAMES: usize = 4;

/// Reads control messages; the ones that carry messages, nearly all of a busy link, without building a term first.
///
/// This is a shortcut and no second definition: what it doesn't take word for word goes the general way, through
/// [`Control::try_from`], and a test holds the two against each other.
#[derive(Debug, Default)]
pub(super) struct CommonDecoder {
    names: [Option<Atom>; NAMES],
    /// The entry that is given up next.
    oldest: usize,
}

impl CommonDecoder {
    /// The control message at the start of `bytes`, which has no version byte, and what follows it.
    pub(super) fn decode<'a>(
        &mut self,
        bytes: &'a [u8],
        limits: &Limits,
    ) -> Result<(Control, &'a [u8]), LinkError> {
        if let Some((control, end)) = self.common(bytes, limits) {
            return Ok((control, bytes.get(end..).unwrap_or_default()));
        }
        let (term, behind) = decode_bare_prefix(bytes, limits)?;
        Ok((term.try_into()?, behind))
    }

    fn common(&mut self, bytes: &[u8], limits: &Limits) -> Option<(Control, usize)> {
        let mut walk = Walk::bare(bytes, limits);
        let mut next = || walk.next_token().ok().flatten();
        let Token::Tuple { arity } = next()? else {
            return None;
        };
        let Token::Int(op) = next()? else { return None };
        let control = match (Op(op), arity) {
            (Op::SEND_SENDER, 3) => {
                let (Token::Pid(from), Token::Pid(to)) = (next()?, next()?) else {
                    return None;
                };
                let (from, to) = (self.pid(from), self.pid(to));
                Control::SendSender {
                    from,
                    to,
                    token: None,
                }
            }
            (Op::SEND, 3) => {
                let (Token::Atom(_), Token::Pid(to)) = (next()?, next()?) else {
                    return None;
                };
                let to = self.pid(to);
                Control::Send { to, token: None }
            }
            (Op::REG_SEND, 4) => {
                let (Token::Pid(from), Token::Atom(_), Token::Atom(to)) = (next()?, next()?, next()?) else {
                    return None;
                };
                let (from, to) = (self.pid(from), Atom::from(to));
                Control::RegSend {
                    from,
                    to,
                    token: None,
                }
            }
            (Op::ALIAS_SEND, 3) => {
                let (Token::Pid(from), Token::Reference(alias)) = (next()?, next()?) else {
                    return None;
                };
                let alias = Reference {
                    node: self.name(alias.node),
                    creation: alias.creation,
                    ids: alias.ids().collect(),
                };
                let from = self.pid(from);
                Control::AliasSend {
                    from,
                    alias,
                    token: None,
                }
            }
            _ => return None,
        };
        Some((control, walk.offset()))
    }

    fn pid(&mut self, pid: PidRef<'_>) -> Pid {
        Pid {
            node: self.name(pid.node),
            id: pid.id,
            serial: pid.serial,
            creation: pid.creation,
        }
    }

    fn name(&mut self, name: AtomRef<'_>) -> Atom {
        if let Some(known) = self.names.iter().flatten().find(|known| name == **known) {
            return known.clone();
        }
        let atom = Atom::from(name);
        if let Some(entry) = self.names.get_mut(self.oldest) {
            *entry = Some(atom.clone());
        }
        self.oldest = (self.oldest + 1) % NAMES;
        atom
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use meshx_etf::{Term, encode_bare};
    use proptest::prelude::*;

    use super::*;

    fn fields() -> impl Strategy<Value = Term> {
        let pid = (0..9usize, any::<u32>(), any::<u32>()).prop_map(|(node, id, creation)| {
            Term::Pid(Pid {
                node: Atom::from(format!("n{node}@h")),
                id,
                serial: 0,
                creation,
            })
        });
        let reference = (0..9usize, prop::collection::vec(any::<u32>(), 1..6)).prop_map(|(node, ids)| {
            Term::from(Reference {
                node: Atom::from(format!("n{node}@h")),
                creation: 5,
                ids,
            })
        });
        prop_oneof![
            4 => pid,
            2 => reference,
            2 => "[a-zä]{0,4}".prop_map(Term::atom),
            1 => any::<i64>().prop_map(Term::Int),
            1 => Just(Term::list([Term::Int(1), Term::atom("a")])),
        ]
    }

    proptest! {
        /// Also with one decoder for all, so that a name that it keeps never stands for another.
        #[test]
        fn the_shortcut_reads_what_the_general_way_reads(
            messages in prop::collection::vec((
                prop::sample::select(vec![2i64, 6, 22, 33, 12, 1, 37]),
                prop::collection::vec(fields(), 1..5),
                prop::collection::vec(any::<u8>(), 0..5),
            ), 1..20),
        ) {
            let limits = Limits::default();
            let mut decoder = CommonDecoder::default();
            for (op, fields, behind) in messages {
                let mut tuple = vec![Term::Int(op)];
                tuple.extend(fields);
                let term = Term::Tuple(tuple);
                let mut bytes = Vec::new();
                encode_bare(&term, &mut bytes).unwrap();
                bytes.extend_from_slice(&behind);
                let general = Control::try_from(term).map(|control| (control, &behind[..])).map_err(LinkError::from);
                prop_assert_eq!(decoder.decode(&bytes, &limits), general);
            }
        }
    }
}

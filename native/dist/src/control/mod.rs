//! Control messages (section "Protocol between Connected Nodes").
//!
//! Each is a tuple whose first element is the operation. Operations that come in two forms, with and without a
//! sequential trace token (`_TT`), are one variant here: the token decides which is written.

mod decode;
mod encode;
mod op;

pub use decode::ControlError;
pub use op::Op;

use meshx_etf::{Atom, Pid, Reference, Term};

/// A process named by pid or by registered name.
#[derive(Debug, Clone, PartialEq)]
pub enum Proc {
    /// By pid.
    Pid(Pid),
    /// By the name it has registered on its node.
    Name(Atom),
}

/// What came of a spawn request.
#[derive(Debug, Clone, PartialEq)]
pub enum SpawnResult {
    /// The new process.
    Pid(Pid),
    /// Why there is none, `notsup` for instance.
    Error(Atom),
}

/// Whom an `ALTACT_SIG_SEND` is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// A process by pid.
    Pid(Pid),
    /// A process by registered name.
    Name(Atom),
    /// A process by alias.
    Alias(Reference),
}

/// The bits of the second field of `ALTACT_SIG_SEND`, as `ERTS_DOP_ALTACT_SIG_FLG_*` in the emulator's `dist.h`.
mod altact {
    pub(super) const PRIORITY: i64 = 1;
    pub(super) const TOKEN: i64 = 1 << 1;
    pub(super) const ALIAS: i64 = 1 << 2;
    pub(super) const NAME: i64 = 1 << 3;
    pub(super) const EXIT: i64 = 1 << 4;
}

/// A control message, the payload that some carry behind them apart ([`Control::payload`]).
#[derive(Debug, Clone, PartialEq)]
#[allow(
    missing_docs,
    reason = "the fields are the specification's: who sends, to whom, about what"
)]
pub enum Control {
    /// `LINK` (1).
    Link { from: Pid, to: Pid },
    /// `SEND` (2), `SEND_TT` (12): a message to a pid.
    Send { to: Pid, token: Option<Term> },
    /// `EXIT` (3), `EXIT_TT` (13): a link has broken.
    Exit {
        from: Pid,
        to: Pid,
        reason: Term,
        token: Option<Term>,
    },
    /// `UNLINK` (4), obsolete since `UNLINK_ID`.
    Unlink { from: Pid, to: Pid },
    /// `NODE_LINK` (5).
    NodeLink,
    /// `REG_SEND` (6), `REG_SEND_TT` (16): a message to a name.
    RegSend {
        from: Pid,
        to: Atom,
        token: Option<Term>,
    },
    /// `GROUP_LEADER` (7): `from` becomes the group leader of `to`.
    GroupLeader { from: Pid, to: Pid },
    /// `EXIT2` (8), `EXIT2_TT` (18): a call of `exit/2`.
    Exit2 {
        from: Pid,
        to: Pid,
        reason: Term,
        token: Option<Term>,
    },
    /// `MONITOR_P` (19).
    MonitorP {
        from: Pid,
        to: Proc,
        reference: Reference,
    },
    /// `DEMONITOR_P` (20).
    DemonitorP {
        from: Pid,
        to: Proc,
        reference: Reference,
    },
    /// `MONITOR_P_EXIT` (21): the monitored process is gone.
    MonitorPExit {
        from: Proc,
        to: Pid,
        reference: Reference,
        reason: Term,
    },
    /// `SEND_SENDER` (22), `SEND_SENDER_TT` (23): `SEND` that says who sends.
    SendSender { from: Pid, to: Pid, token: Option<Term> },
    /// `PAYLOAD_EXIT` (24), `PAYLOAD_EXIT_TT` (25): the reason is the payload.
    PayloadExit { from: Pid, to: Pid, token: Option<Term> },
    /// `PAYLOAD_EXIT2` (26), `PAYLOAD_EXIT2_TT` (27): the reason is the payload.
    PayloadExit2 { from: Pid, to: Pid, token: Option<Term> },
    /// `PAYLOAD_MONITOR_P_EXIT` (28): the reason is the payload.
    PayloadMonitorPExit {
        from: Proc,
        to: Pid,
        reference: Reference,
    },
    /// `SPAWN_REQUEST` (29), `SPAWN_REQUEST_TT` (30): the list of arguments is the payload.
    SpawnRequest {
        id: Reference,
        from: Pid,
        group_leader: Pid,
        module: Atom,
        function: Atom,
        arity: u8,
        options: Vec<Term>,
        token: Option<Term>,
    },
    /// `SPAWN_REPLY` (31), `SPAWN_REPLY_TT` (32). Bit 0 of `flags`: linked, bit 1: monitored.
    SpawnReply {
        id: Reference,
        to: Pid,
        flags: u32,
        result: SpawnResult,
        token: Option<Term>,
    },
    /// `ALIAS_SEND` (33), `ALIAS_SEND_TT` (34).
    AliasSend {
        from: Pid,
        alias: Reference,
        token: Option<Term>,
    },
    /// `UNLINK_ID` (35). `id` is not 0.
    UnlinkId { id: u64, from: Pid, to: Pid },
    /// `UNLINK_ID_ACK` (36). `id` is that of the `UNLINK_ID` which it answers.
    UnlinkIdAck { id: u64, from: Pid, to: Pid },
    /// `ALTACT_SIG_SEND` (37) of OTP 28 and later: a message or, with `exit`, an exit signal whose reason is the
    /// payload. Used for aliases and for priority signals, and only between nodes that have both said
    /// [`crate::flags::DistFlags::ALTACT_SIG`].
    AltactSig {
        from: Pid,
        to: Target,
        priority: bool,
        exit: bool,
        token: Option<Term>,
    },
    /// An operation that is not known here, kept as it is.
    Unknown { op: i64, fields: Vec<Term> },
}

/// Whether a message has a payload behind its control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// It must.
    Required,
    /// It must not.
    Forbidden,
    /// Not known: it depends on fields that are kept as they are.
    Optional,
}

impl Control {
    /// Whether a payload belongs to this message.
    #[must_use]
    pub fn payload(&self) -> Payload {
        match self {
            Self::Send { .. }
            | Self::RegSend { .. }
            | Self::SendSender { .. }
            | Self::PayloadExit { .. }
            | Self::PayloadExit2 { .. }
            | Self::PayloadMonitorPExit { .. }
            | Self::SpawnRequest { .. }
            | Self::AliasSend { .. }
            | Self::AltactSig { .. } => Payload::Required,
            Self::Unknown { .. } => Payload::Optional,
            Self::Link { .. }
            | Self::Exit { .. }
            | Self::Unlink { .. }
            | Self::NodeLink
            | Self::GroupLeader { .. }
            | Self::Exit2 { .. }
            | Self::MonitorP { .. }
            | Self::DemonitorP { .. }
            | Self::MonitorPExit { .. }
            | Self::SpawnReply { .. }
            | Self::UnlinkId { .. }
            | Self::UnlinkIdAck { .. } => Payload::Forbidden,
        }
    }

    /// The operation that is written for this message.
    #[must_use]
    pub fn op(&self) -> Op {
        let either = |token: &Option<Term>, plain, traced| if token.is_some() { traced } else { plain };
        match self {
            Self::Link { .. } => Op::LINK,
            Self::Send { token, .. } => either(token, Op::SEND, Op::SEND_TT),
            Self::Exit { token, .. } => either(token, Op::EXIT, Op::EXIT_TT),
            Self::Unlink { .. } => Op::UNLINK,
            Self::NodeLink => Op::NODE_LINK,
            Self::RegSend { token, .. } => either(token, Op::REG_SEND, Op::REG_SEND_TT),
            Self::GroupLeader { .. } => Op::GROUP_LEADER,
            Self::Exit2 { token, .. } => either(token, Op::EXIT2, Op::EXIT2_TT),
            Self::MonitorP { .. } => Op::MONITOR_P,
            Self::DemonitorP { .. } => Op::DEMONITOR_P,
            Self::MonitorPExit { .. } => Op::MONITOR_P_EXIT,
            Self::SendSender { token, .. } => either(token, Op::SEND_SENDER, Op::SEND_SENDER_TT),
            Self::PayloadExit { token, .. } => either(token, Op::PAYLOAD_EXIT, Op::PAYLOAD_EXIT_TT),
            Self::PayloadExit2 { token, .. } => either(token, Op::PAYLOAD_EXIT2, Op::PAYLOAD_EXIT2_TT),
            Self::PayloadMonitorPExit { .. } => Op::PAYLOAD_MONITOR_P_EXIT,
            Self::SpawnRequest { token, .. } => either(token, Op::SPAWN_REQUEST, Op::SPAWN_REQUEST_TT),
            Self::SpawnReply { token, .. } => either(token, Op::SPAWN_REPLY, Op::SPAWN_REPLY_TT),
            Self::AliasSend { token, .. } => either(token, Op::ALIAS_SEND, Op::ALIAS_SEND_TT),
            Self::UnlinkId { .. } => Op::UNLINK_ID,
            Self::UnlinkIdAck { .. } => Op::UNLINK_ID_ACK,
            Self::AltactSig { .. } => Op::ALTACT_SIG,
            Self::Unknown { op, .. } => Op(*op),
        }
    }
}

#[cfg(test)]
mod tests;

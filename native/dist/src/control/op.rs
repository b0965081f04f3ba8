use std::fmt;

/// The first element of a control message.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Op(pub i64);

macro_rules! ops {
    ($($name:ident = $value:literal;)*) => {
        #[allow(missing_docs, reason = "the specification's names")]
        impl Op {
            $(pub const $name: Self = Self($value);)*

            /// Every operation that has a name, with that name.
            pub const NAMED: &'static [(&'static str, Self)] = &[$((stringify!($name), Self::$name)),*];
        }
    };
}

ops! {
    LINK = 1;
    SEND = 2;
    EXIT = 3;
    UNLINK = 4;
    NODE_LINK = 5;
    REG_SEND = 6;
    GROUP_LEADER = 7;
    EXIT2 = 8;
    SEND_TT = 12;
    EXIT_TT = 13;
    REG_SEND_TT = 16;
    EXIT2_TT = 18;
    MONITOR_P = 19;
    DEMONITOR_P = 20;
    MONITOR_P_EXIT = 21;
    SEND_SENDER = 22;
    SEND_SENDER_TT = 23;
    PAYLOAD_EXIT = 24;
    PAYLOAD_EXIT_TT = 25;
    PAYLOAD_EXIT2 = 26;
    PAYLOAD_EXIT2_TT = 27;
    PAYLOAD_MONITOR_P_EXIT = 28;
    SPAWN_REQUEST = 29;
    SPAWN_REQUEST_TT = 30;
    SPAWN_REPLY = 31;
    SPAWN_REPLY_TT = 32;
    ALIAS_SEND = 33;
    ALIAS_SEND_TT = 34;
    UNLINK_ID = 35;
    UNLINK_ID_ACK = 36;
    ALTACT_SIG = 37;
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(_, op)| op == self) {
            Some((name, _)) => write!(f, "{name} ({})", self.0),
            None => write!(f, "operation {}", self.0),
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

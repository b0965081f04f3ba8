//! Links and monitors between this node and one other: plain data, no I/O.
//!
//! Rules: chapter "Distribution Protocol", sections "Control Messages" and "Link Protocol".

use std::collections::{HashMap, HashSet};

use meshx_etf::{Atom, Pid, Reference};

use super::address::Address;

/// What a monitor of a process here was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Watched {
    Pid(Pid),
    /// By registered name; the `DOWN` names it so.
    Name(Atom),
}

/// A monitor that the peer holds on a process here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Incoming {
    pub(crate) watcher: Pid,
    pub(crate) watched: Watched,
    /// The process here, whatever it was asked for by.
    pub(crate) local: Pid,
}

/// A monitor that a process here holds on one of the peer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) local: Pid,
    pub(crate) target: Address,
}

/// The peer has reached [`Limits::watches_per_connection`](super::Limits::watches_per_connection).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany;

/// What ends with a process or a connection.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// (here, there)
    pub(crate) links: Vec<(Pid, Pid)>,
    pub(crate) incoming: Vec<(Reference, Incoming)>,
    pub(crate) outgoing: Vec<(Reference, Outgoing)>,
}

#[derive(Debug)]
pub(crate) struct Watch {
    max: usize,
    /// (here, there)
    links: HashSet<(Pid, Pid)>,
    /// Links given up whose acknowledgement is awaited: an `EXIT` that crosses it counts for nothing.
    unlinking: HashMap<(Pid, Pid), u64>,
    next_unlink: u64,
    incoming: HashMap<Reference, Incoming>,
    outgoing: HashMap<Reference, Outgoing>,
}

impl Watch {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            links: HashSet::new(),
            unlinking: HashMap::new(),
            next_unlink: 1,
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
        }
    }

    fn check_room(&self) -> Result<(), TooMany> {
        let held = self.links.len().saturating_add(self.incoming.len());
        if held < self.max { Ok(()) } else { Err(TooMany) }
    }

    /// The peer's `LINK`.
    pub(crate) fn peer_links(&mut self, local: Pid, remote: Pid) -> Result<(), TooMany> {
        let pair = (local, remote);
        if !self.links.contains(&pair) {
            self.check_room()?;
        }
        self.unlinking.remove(&pair);
        self.links.insert(pair);
        Ok(())
    }

    /// A link asked for here; false when it is there already, and nothing is to be sent.
    pub(crate) fn link(&mut self, local: Pid, remote: Pid) -> bool {
        let pair = (local, remote);
        self.unlinking.remove(&pair);
        self.links.insert(pair)
    }

    /// A link given up here: the id for `UNLINK_ID`, never 0. `None` when there is no such link.
    pub(crate) fn unlink(&mut self, local: Pid, remote: Pid) -> Option<u64> {
        let pair = (local, remote);
        if !self.links.remove(&pair) {
            return None;
        }
        let id = self.next_unlink;
        self.next_unlink = self.next_unlink.checked_add(1).unwrap_or(1);
        self.unlinking.insert(pair, id);
        Some(id)
    }

    /// The peer's `UNLINK_ID`, to be acknowledged in any case.
    pub(crate) fn peer_unlinks(&mut self, local: &Pid, remote: &Pid) {
        self.links.remove(&(local.clone(), remote.clone()));
    }

    /// The peer's `UNLINK_ID_ACK`.
    pub(crate) fn unlink_acknowledged(&mut self, local: &Pid, remote: &Pid, id: u64) {
        let pair = (local.clone(), remote.clone());
        if self.unlinking.get(&pair) == Some(&id) {
            self.unlinking.remove(&pair);
        }
    }

    /// The peer's `EXIT` over a link: whether there was one.
    pub(crate) fn link_broke(&mut self, local: &Pid, remote: &Pid) -> bool {
        self.links.remove(&(local.clone(), remote.clone()))
    }

    /// The peer's `MONITOR_P`.
    pub(crate) fn peer_monitors(&mut self, reference: Reference, monitor: Incoming) -> Result<(), TooMany> {
        self.check_room()?;
        self.incoming.insert(reference, monitor);
        Ok(())
    }

    /// The peer's `DEMONITOR_P`, or the end of a monitor that came too late.
    pub(crate) fn peer_demonitors(&mut self, reference: &Reference) -> Option<Incoming> {
        self.incoming.remove(reference)
    }

    /// A monitor made here.
    pub(crate) fn monitor(&mut self, reference: Reference, monitor: Outgoing) {
        self.outgoing.insert(reference, monitor);
    }

    /// The end of a monitor made here: the peer's `MONITOR_P_EXIT`, or taken back.
    pub(crate) fn take_outgoing(&mut self, reference: &Reference) -> Option<Outgoing> {
        self.outgoing.remove(reference)
    }

    /// A monitor taken back by the process that made it.
    pub(crate) fn take_outgoing_of(&mut self, reference: &Reference, local: &Pid) -> Option<Outgoing> {
        self.outgoing
            .get(reference)
            .filter(|monitor| monitor.local == *local)?;
        self.outgoing.remove(reference)
    }

    /// All that hangs on one process here, which ends.
    pub(crate) fn take_process(&mut self, local: &Pid) -> Ended {
        self.unlinking.retain(|(here, _), _| here != local);
        Ended {
            links: self.links.extract_if(|(here, _)| here == local).collect(),
            incoming: self
                .incoming
                .extract_if(|_, monitor| monitor.local == *local)
                .collect(),
            outgoing: self
                .outgoing
                .extract_if(|_, monitor| monitor.local == *local)
                .collect(),
        }
    }

    /// Everything, since the connection ended.
    pub(crate) fn take_all(&mut self) -> Ended {
        self.unlinking.clear();
        Ended {
            links: self.links.drain().collect(),
            incoming: self.incoming.drain().collect(),
            outgoing: self.outgoing.drain().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pid(node: &str, id: u32) -> Pid {
        Pid {
            node: node.into(),
            id,
            serial: 0,
            creation: 4,
        }
    }

    fn reference(id: u32) -> Reference {
        Reference {
            node: "b@h".into(),
            creation: 4,
            ids: vec![id, 0, 0],
        }
    }

    fn incoming(local: u32) -> Incoming {
        Incoming {
            watcher: pid("b@h", 9),
            watched: Watched::Pid(pid("a@h", local)),
            local: pid("a@h", local),
        }
    }

    #[test]
    fn what_a_peer_may_hold_is_bounded() {
        let mut watch = Watch::new(2);
        let (here, there) = (pid("a@h", 1), pid("b@h", 1));
        watch.peer_links(here.clone(), there.clone()).unwrap();
        watch.peer_links(here.clone(), there.clone()).unwrap();
        watch.peer_monitors(reference(1), incoming(1)).unwrap();
        assert_eq!(watch.peer_monitors(reference(2), incoming(1)), Err(TooMany));
        assert_eq!(watch.peer_links(here.clone(), pid("b@h", 2)), Err(TooMany));
        watch.peer_demonitors(&reference(1)).unwrap();
        watch.peer_monitors(reference(2), incoming(1)).unwrap();
    }

    #[test]
    fn an_exit_that_crosses_an_unlink_counts_for_nothing() {
        let mut watch = Watch::new(10);
        let (here, there) = (pid("a@h", 1), pid("b@h", 1));
        assert!(watch.link(here.clone(), there.clone()));
        assert!(!watch.link(here.clone(), there.clone()));
        let id = watch.unlink(here.clone(), there.clone()).unwrap();
        assert_ne!(id, 0);
        assert_eq!(watch.unlink(here.clone(), there.clone()), None);
        assert!(!watch.link_broke(&here, &there));
        watch.unlink_acknowledged(&here, &there, id + 1);
        assert_eq!(watch.unlinking.len(), 1);
        watch.unlink_acknowledged(&here, &there, id);
        assert!(watch.unlinking.is_empty());
    }

    #[test]
    fn a_process_takes_its_own_with_it() {
        let mut watch = Watch::new(10);
        watch.link(pid("a@h", 1), pid("b@h", 1));
        watch.link(pid("a@h", 2), pid("b@h", 1));
        watch.peer_monitors(reference(1), incoming(1)).unwrap();
        watch.peer_monitors(reference(2), incoming(2)).unwrap();
        watch.monitor(
            reference(3),
            Outgoing {
                local: pid("a@h", 1),
                target: ("x", "b@h").into(),
            },
        );
        let ended = watch.take_process(&pid("a@h", 1));
        assert_eq!(
            (ended.links.len(), ended.incoming.len(), ended.outgoing.len()),
            (1, 1, 1)
        );
        let rest = watch.take_all();
        assert_eq!(
            (rest.links.len(), rest.incoming.len(), rest.outgoing.len()),
            (1, 1, 0)
        );
    }
}

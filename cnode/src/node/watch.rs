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
    /// (here, there, asked for here)
    pub(crate) links: Vec<(Pid, Pid, bool)>,
    pub(crate) incoming: Vec<(Reference, Incoming)>,
    pub(crate) outgoing: Vec<(Reference, Outgoing)>,
    pub(crate) spawning: Vec<(Reference, Spawning)>,
}

/// A spawn request sent to the peer that it has not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spawning {
    pub(crate) local: Pid,
    pub(crate) link: bool,
    pub(crate) monitor: bool,
}

/// One link, as this side sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// `ours`: asked for here. The end of such a link is never dropped.
    Up { ours: bool },
    /// Given up here, with the id whose acknowledgement is awaited: an `EXIT` or a `LINK` that crosses it counts for
    /// nothing.
    Unlinking(u64),
}

/// All that hangs on one process here.
#[derive(Debug, Default)]
struct Local {
    links: HashMap<Pid, Link>,
    incoming: HashSet<Reference>,
    outgoing: HashSet<Reference>,
    spawning: HashSet<Reference>,
}

impl Local {
    fn is_empty(&self) -> bool {
        let Self {
            links,
            incoming,
            outgoing,
            spawning,
        } = self;
        links.is_empty() && incoming.is_empty() && outgoing.is_empty() && spawning.is_empty()
    }
}

#[derive(Debug)]
pub(crate) struct Watch {
    max: usize,
    /// Links and monitors of the peer's making, which `max` bounds.
    held: usize,
    next_unlink: u64,
    locals: HashMap<Pid, Local>,
    incoming: HashMap<Reference, Incoming>,
    outgoing: HashMap<Reference, Outgoing>,
    spawning: HashMap<Reference, Spawning>,
}

impl Watch {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            held: 0,
            next_unlink: 1,
            locals: HashMap::new(),
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            spawning: HashMap::new(),
        }
    }

    fn take_room(&mut self) -> Result<(), TooMany> {
        if self.held >= self.max {
            return Err(TooMany);
        }
        self.held += 1;
        Ok(())
    }

    /// Changes what hangs on one process, and forgets it when nothing is left.
    fn at<T>(&mut self, local: &Pid, change: impl FnOnce(&mut Local) -> T) -> Option<T> {
        let entry = self.locals.get_mut(local)?;
        let result = change(entry);
        if entry.is_empty() {
            self.locals.remove(local);
        }
        Some(result)
    }

    /// The peer's `LINK`. One that crosses this side's `UNLINK_ID` is ended by it at the peer, so it counts for
    /// nothing here either.
    pub(crate) fn peer_links(&mut self, local: &Pid, remote: Pid) -> Result<(), TooMany> {
        let known = self.locals.get(local).and_then(|at| at.links.get(&remote));
        if known.is_some() {
            return Ok(());
        }
        self.take_room()?;
        let links = &mut self.locals.entry(local.clone()).or_default().links;
        links.insert(remote, Link::Up { ours: false });
        Ok(())
    }

    pub(crate) fn is_linked(&self, local: &Pid, remote: &Pid) -> bool {
        let link = self.locals.get(local).and_then(|at| at.links.get(remote));
        matches!(link, Some(Link::Up { .. }))
    }

    /// A link asked for here; false when it is there already, and nothing is to be sent.
    pub(crate) fn link(&mut self, local: &Pid, remote: Pid) -> bool {
        let links = &mut self.locals.entry(local.clone()).or_default().links;
        match links.insert(remote, Link::Up { ours: true }) {
            Some(Link::Up { ours }) => {
                self.held -= usize::from(!ours);
                false
            }
            _ => true,
        }
    }

    /// A link given up here: the id for `UNLINK_ID`, never 0. `None` when there is no such link.
    pub(crate) fn unlink(&mut self, local: &Pid, remote: &Pid) -> Option<u64> {
        let id = self.next_unlink;
        let link = self.locals.get_mut(local)?.links.get_mut(remote)?;
        let Link::Up { ours } = *link else { return None };
        *link = Link::Unlinking(id);
        self.held -= usize::from(!ours);
        self.next_unlink = id.checked_add(1).unwrap_or(1);
        Some(id)
    }

    /// Takes a link away if `which` says so; what it was.
    fn take_link(&mut self, local: &Pid, remote: &Pid, which: impl FnOnce(&Link) -> bool) -> Option<Link> {
        let taken = self.at(local, |at| {
            let wanted = at.links.get(remote).is_some_and(which);
            if wanted { at.links.remove(remote) } else { None }
        });
        let link = taken.flatten()?;
        self.held -= usize::from(link == Link::Up { ours: false });
        Some(link)
    }

    /// The peer's `UNLINK_ID`, to be acknowledged in any case.
    pub(crate) fn peer_unlinks(&mut self, local: &Pid, remote: &Pid) {
        self.take_link(local, remote, |link| matches!(link, Link::Up { .. }));
    }

    /// The peer's `UNLINK_ID_ACK`.
    pub(crate) fn unlink_acknowledged(&mut self, local: &Pid, remote: &Pid, id: u64) {
        self.take_link(local, remote, |link| *link == Link::Unlinking(id));
    }

    /// The peer's `EXIT` over a link, or the end of the process here: whether there was a link, and if so, whether it
    /// was asked for here.
    pub(crate) fn link_broke(&mut self, local: &Pid, remote: &Pid) -> Option<bool> {
        match self.take_link(local, remote, |link| matches!(link, Link::Up { .. }))? {
            Link::Up { ours } => Some(ours),
            Link::Unlinking(_) => None,
        }
    }

    /// The peer's `MONITOR_P`.
    pub(crate) fn peer_monitors(&mut self, reference: Reference, monitor: Incoming) -> Result<(), TooMany> {
        // A reference that is used twice is one monitor.
        self.peer_demonitors(&reference);
        self.take_room()?;
        let at = self.locals.entry(monitor.local.clone()).or_default();
        at.incoming.insert(reference.clone());
        self.incoming.insert(reference, monitor);
        Ok(())
    }

    /// The peer's `DEMONITOR_P`, or the end of a monitor that came too late.
    pub(crate) fn peer_demonitors(&mut self, reference: &Reference) -> Option<Incoming> {
        let monitor = self.incoming.remove(reference)?;
        self.held -= 1;
        self.at(&monitor.local, |at| at.incoming.remove(reference));
        Some(monitor)
    }

    /// A monitor made here.
    pub(crate) fn monitor(&mut self, reference: Reference, monitor: Outgoing) {
        let at = self.locals.entry(monitor.local.clone()).or_default();
        at.outgoing.insert(reference.clone());
        self.outgoing.insert(reference, monitor);
    }

    /// The end of a monitor made here: the peer's `MONITOR_P_EXIT`, or taken back.
    pub(crate) fn take_outgoing(&mut self, reference: &Reference) -> Option<Outgoing> {
        let monitor = self.outgoing.remove(reference)?;
        self.at(&monitor.local, |at| at.outgoing.remove(reference));
        Some(monitor)
    }

    /// A monitor taken back by the process that made it.
    pub(crate) fn take_outgoing_of(&mut self, reference: &Reference, local: &Pid) -> Option<Outgoing> {
        self.outgoing
            .get(reference)
            .filter(|monitor| monitor.local == *local)?;
        self.take_outgoing(reference)
    }

    /// A spawn request made here.
    pub(crate) fn spawn(&mut self, id: Reference, spawning: Spawning) {
        let at = self.locals.entry(spawning.local.clone()).or_default();
        at.spawning.insert(id.clone());
        self.spawning.insert(id, spawning);
    }

    /// The answer to a spawn request made here, or its failure; `None` when there was no such request.
    pub(crate) fn take_spawning(&mut self, id: &Reference) -> Option<Spawning> {
        let spawning = self.spawning.remove(id)?;
        self.at(&spawning.local, |at| at.spawning.remove(id));
        Some(spawning)
    }

    /// All that hangs on one process here, which ends.
    pub(crate) fn take_process(&mut self, local: &Pid) -> Ended {
        let Some(at) = self.locals.remove(local) else {
            return Ended::default();
        };
        let links: Vec<_> = at
            .links
            .into_iter()
            .filter_map(|(remote, link)| match link {
                Link::Up { ours } => Some((local.clone(), remote, ours)),
                Link::Unlinking(_) => None,
            })
            .collect();
        let incoming: Vec<_> = at
            .incoming
            .into_iter()
            .filter_map(|reference| self.incoming.remove_entry(&reference))
            .collect();
        let outgoing = at
            .outgoing
            .into_iter()
            .filter_map(|reference| self.outgoing.remove_entry(&reference))
            .collect();
        for id in &at.spawning {
            // Nobody is told: an answer that still comes finds that nobody waits for it.
            self.spawning.remove(id);
        }
        let theirs = links.iter().filter(|(_, _, ours)| !ours).count();
        self.held -= theirs + incoming.len();
        Ended {
            links,
            incoming,
            outgoing,
            spawning: Vec::new(),
        }
    }

    /// Everything, since the connection ended.
    pub(crate) fn take_all(&mut self) -> Ended {
        self.held = 0;
        let locals = std::mem::take(&mut self.locals);
        let links = locals.into_iter().flat_map(|(local, at)| {
            at.links.into_iter().filter_map(move |(remote, link)| match link {
                Link::Up { ours } => Some((local.clone(), remote, ours)),
                Link::Unlinking(_) => None,
            })
        });
        Ended {
            links: links.collect(),
            incoming: self.incoming.drain().collect(),
            outgoing: self.outgoing.drain().collect(),
            spawning: self.spawning.drain().collect(),
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
        watch.peer_links(&here, there.clone()).unwrap();
        watch.peer_links(&here, there.clone()).unwrap();
        watch.peer_monitors(reference(1), incoming(1)).unwrap();
        watch.peer_monitors(reference(1), incoming(1)).unwrap();
        assert_eq!(watch.peer_monitors(reference(2), incoming(1)), Err(TooMany));
        assert_eq!(watch.peer_links(&here, pid("b@h", 2)), Err(TooMany));
        watch.peer_demonitors(&reference(1)).unwrap();
        watch.peer_monitors(reference(2), incoming(1)).unwrap();
        watch.peer_unlinks(&here, &there);
        watch.peer_links(&here, pid("b@h", 2)).unwrap();
        assert_eq!(watch.peer_links(&here, pid("b@h", 3)), Err(TooMany));
        watch.take_process(&here);
        assert_eq!((watch.held, watch.locals.len()), (0, 0));
    }

    #[test]
    fn what_crosses_an_unlink_counts_for_nothing() {
        let mut watch = Watch::new(10);
        let (here, there) = (pid("a@h", 1), pid("b@h", 1));
        assert!(watch.link(&here, there.clone()));
        assert!(!watch.link(&here, there.clone()));
        let id = watch.unlink(&here, &there).unwrap();
        assert_ne!(id, 0);
        assert_eq!(watch.unlink(&here, &there), None);
        assert_eq!(watch.link_broke(&here, &there), None);
        watch.peer_links(&here, there.clone()).unwrap();
        assert_eq!(watch.link_broke(&here, &there), None);
        watch.unlink_acknowledged(&here, &there, id + 1);
        assert_eq!(watch.locals.len(), 1);
        watch.unlink_acknowledged(&here, &there, id);
        assert_eq!((watch.locals.len(), watch.held), (0, 0));
        // Behind the acknowledgement, a link is a new one.
        watch.peer_links(&here, there.clone()).unwrap();
        assert_eq!(watch.link_broke(&here, &there), Some(false));
    }

    #[test]
    fn a_link_made_anew_outlives_the_acknowledgement_of_the_old_one() {
        let mut watch = Watch::new(10);
        let (here, there) = (pid("a@h", 1), pid("b@h", 1));
        assert!(watch.link(&here, there.clone()));
        let id = watch.unlink(&here, &there).unwrap();
        assert!(watch.link(&here, there.clone()), "LINK must be sent again");
        watch.unlink_acknowledged(&here, &there, id);
        assert_eq!(watch.link_broke(&here, &there), Some(true));
        assert_eq!(watch.held, 0);
    }

    #[test]
    fn a_spawn_request_ends_with_its_process_or_its_answer() {
        let mut watch = Watch::new(10);
        let spawning = || Spawning {
            local: pid("a@h", 1),
            link: true,
            monitor: true,
        };
        watch.spawn(reference(1), spawning());
        assert_eq!(watch.take_spawning(&reference(1)), Some(spawning()));
        assert_eq!(watch.take_spawning(&reference(1)), None);
        assert_eq!((watch.spawning.len(), watch.locals.len()), (0, 0));
        watch.spawn(reference(2), spawning());
        watch.take_process(&pid("a@h", 2));
        assert_eq!(watch.spawning.len(), 1);
        let ended = watch.take_process(&pid("a@h", 1));
        assert_eq!(ended.spawning.len(), 0, "nobody is told");
        assert_eq!((watch.spawning.len(), watch.locals.len()), (0, 0));
    }

    #[test]
    fn a_process_takes_its_own_with_it() {
        let mut watch = Watch::new(10);
        watch.link(&pid("a@h", 1), pid("b@h", 1));
        watch.link(&pid("a@h", 2), pid("b@h", 1));
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

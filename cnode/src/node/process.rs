//! The processes of this node: their identifiers, names and queues.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshx_etf::{Atom, Pid, Reference, Term};
use tokio::sync::Notify;

use super::address::Address;
use super::mailbox::Message;
use super::payload::Payload;

/// Something in a mailbox.
#[derive(Debug)]
pub(crate) enum Item {
    /// A message as it came, decoded when it is read: so the queue's bound in bytes is the memory it takes.
    Encoded {
        from: Option<Pid>,
        /// The peer that sent it, unless `from` is of that peer.
        peer: Option<Atom>,
        payload: Payload,
    },
    /// Made here: its sender bounds it.
    Ready(Message),
    /// An exit signal of a peer, its reason as it came.
    Exit { from: Pid, reason: Vec<u8> },
    /// The end of a monitor at a peer, its reason as it came.
    Down {
        reference: Reference,
        target: Address,
        reason: Vec<u8>,
    },
}

impl Item {
    /// Bytes of memory. The names of nodes are the peers' choice, and each identifier has its own.
    pub(crate) fn cost(&self) -> usize {
        let (node, bytes) = match self {
            Self::Encoded { from, payload, .. } => (from.as_ref().map(|from| &from.node), payload.len()),
            Self::Exit { from, reason } => (Some(&from.node), reason.len()),
            Self::Down {
                reference, reason, ..
            } => (Some(&reference.node), reason.len()),
            Self::Ready(_) => return 0,
        };
        size_of::<Self>() + node.map_or(0, |node| node.as_str().len()) + bytes
    }
}

/// An empty queue with more room than this gives it back.
const ROOM_KEPT: usize = 1024;

/// What an exit signal does to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnExit {
    /// It becomes a message.
    Message,
    /// Nothing.
    Nothing,
    /// The process ends for the reason of the signal.
    End,
    /// The process ends, `killed`.
    Kill,
}

/// One process: the queue behind a [`Mailbox`](super::Mailbox).
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    queue: Mutex<Queue>,
    /// Held while it ends and those who watch it are taken.
    ending: Mutex<()>,
    /// Wakes its reader.
    pub(crate) ready: Notify,
    /// Wakes whoever runs it.
    end: Notify,
    traps: AtomicBool,
    /// One of the node's own, which no peer can end.
    protected: bool,
    /// Whether it ever had a name or an alias, and a link or a monitor: most processes live for one call and have none.
    named: AtomicBool,
    watched: AtomicBool,
    max_messages: usize,
    max_bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    bytes: usize,
    /// Messages taken out and set aside by a selective receive; their bytes are still in `bytes`.
    aside: usize,
    dropped: u64,
    closed: bool,
    /// Why it ended, if it was ended by a signal.
    killed: Option<Term>,
}

impl Process {
    /// Puts a message into the queue; false when it was full, or its owner is gone.
    pub(crate) fn deliver(&self, item: Item) -> bool {
        self.put(item, false)
    }

    /// Puts a signal into the queue that the process waits for. Its own links and monitors bound how many there are.
    pub(crate) fn deliver_owed(&self, signal: Item) {
        self.put(signal, true);
    }

    fn put(&self, item: Item, owed: bool) -> bool {
        let mut queue = self.lock();
        if queue.closed {
            return false;
        }
        let bytes = queue.bytes.saturating_add(item.cost());
        let count = queue.items.len() + queue.aside;
        let full = count >= self.max_messages || bytes > self.max_bytes;
        if full && !owed && count > 0 {
            queue.dropped += 1;
            if queue.dropped.is_power_of_two() {
                tracing::warn!(pid = ?self.pid, dropped = queue.dropped, "a full mailbox drops messages");
            }
            return false;
        }
        queue.bytes = bytes;
        queue.items.push_back(item);
        drop(queue);
        self.ready.notify_one();
        true
    }

    /// The oldest message. `Err(())`: the queue is closed and empty.
    pub(crate) fn take(&self) -> Result<Option<Item>, ()> {
        let mut queue = self.lock();
        match queue.items.pop_front() {
            Some(item) => {
                queue.bytes = queue.bytes.saturating_sub(item.cost());
                if queue.items.is_empty() && queue.items.capacity() > ROOM_KEPT {
                    queue.items = VecDeque::new();
                }
                Ok(Some(item))
            }
            None if queue.closed => Err(()),
            None => Ok(None),
        }
    }

    /// Counts a message that was taken, and set aside, as one that is in the queue still.
    pub(crate) fn set_aside(&self, cost: usize) {
        let mut queue = self.lock();
        queue.aside += 1;
        queue.bytes = queue.bytes.saturating_add(cost);
    }

    /// Takes back [`Process::set_aside`].
    pub(crate) fn give_out(&self, cost: usize) {
        let mut queue = self.lock();
        queue.aside = queue.aside.saturating_sub(1);
        queue.bytes = queue.bytes.saturating_sub(cost);
    }

    /// Takes the `DOWN` of this monitor out of the queue.
    pub(crate) fn flush_down(&self, monitor: &Reference) {
        let mut queue = self.lock();
        let found = queue.items.iter().position(|item| match item {
            Item::Down { reference, .. } | Item::Ready(Message::Down { reference, .. }) => {
                reference == monitor
            }
            _ => false,
        });
        if let Some(item) = found.and_then(|at| queue.items.remove(at)) {
            queue.bytes = queue.bytes.saturating_sub(item.cost());
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    pub(crate) fn trap_exit(&self, traps: bool) -> bool {
        self.traps.swap(traps, Ordering::AcqRel)
    }

    /// To be said before a link or a monitor is made, so that the end of the process looks for it.
    pub(crate) fn set_watched(&self) {
        self.watched.store(true, Ordering::Release);
    }

    pub(crate) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Acquire)
    }

    /// What an exit signal with this reason does. `sent_by`: who sent it, if it is one of `exit/2`.
    pub(crate) fn on_exit(&self, reason: &Term, sent_by: Option<&Pid>) -> OnExit {
        if sent_by.is_some() && reason.as_atom() == Some("kill") && !self.protected {
            return OnExit::Kill;
        }
        if self.traps.load(Ordering::Acquire) {
            return OnExit::Message;
        }
        // `exit(self(), normal)` ends a process, as the manual of `exit/2` says.
        let ignored = reason.as_atom() == Some("normal") && sent_by != Some(&self.pid);
        if self.protected || ignored {
            return OnExit::Nothing;
        }
        OnExit::End
    }

    pub(crate) fn ending(&self) -> MutexGuard<'_, ()> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a signal ended it.
    pub(crate) fn killed(&self) -> Option<Term> {
        self.lock().killed.clone()
    }

    /// Waits until it has ended, or the node has.
    pub(crate) async fn ended(&self) {
        while !self.lock().closed {
            self.end.notified().await;
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
        self.end.notify_one();
    }

    /// Ends it where it stands: what it has not received yet is lost.
    fn kill(&self, reason: Term) {
        let mut queue = self.lock();
        if queue.killed.is_none() {
            queue.killed = Some(reason);
        }
        queue.items.clear();
        queue.bytes = 0;
        drop(queue);
        self.close();
    }

    /// Held for short, synchronous sections only.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a name was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// Another mailbox of this node has the name.
    #[error("the name {0:?} is registered already")]
    Taken(String),
    /// An atom has 1 to 255 characters, and `undefined` is no name.
    #[error("{0:?} is not a name: 1 to 255 characters wanted, and not `undefined`")]
    Invalid(String),
    /// The mailbox's node has shut down.
    #[error("the node has shut down")]
    NodeDown,
    /// An exit signal has ended the mailbox.
    #[error("the mailbox has ended")]
    Ended,
}

/// The table of all processes.
#[derive(Debug)]
pub(crate) struct Processes {
    node: Atom,
    creation: u32,
    max_messages: usize,
    max_bytes: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next_pid: u64,
    next_reference: u64,
    by_pid: HashMap<Pid, Arc<Process>>,
    names: HashMap<Atom, Arc<Process>>,
    aliases: HashMap<Reference, Alias>,
    /// What to take away with a process, for those that have any.
    held: HashMap<Pid, Held>,
    closed: bool,
}

#[derive(Debug)]
struct Alias {
    process: Arc<Process>,
    /// Ends with the first message that comes by it.
    once: bool,
}

#[derive(Debug, Default)]
struct Held {
    names: Vec<Atom>,
    aliases: HashSet<Reference>,
}

impl Processes {
    pub(crate) fn new(node: Atom, creation: u32, max_messages: usize, max_bytes: usize) -> Self {
        Self {
            node,
            creation,
            max_messages,
            max_bytes,
            table: Mutex::default(),
        }
    }

    /// A process. `protected`: no peer can end it.
    pub(crate) fn spawn(&self, traps: bool, protected: bool) -> Arc<Process> {
        let mut table = self.lock();
        table.next_pid += 1;
        let pid = self.pid(table.next_pid);
        let process = Arc::new(Process {
            pid: pid.clone(),
            queue: Mutex::new(Queue {
                closed: table.closed,
                ..Queue::default()
            }),
            ending: Mutex::default(),
            ready: Notify::new(),
            end: Notify::new(),
            traps: AtomicBool::new(traps),
            protected,
            watched: AtomicBool::new(false),
            named: AtomicBool::new(false),
            max_messages: self.max_messages,
            max_bytes: self.max_bytes,
        });
        if !table.closed {
            table.by_pid.insert(pid, Arc::clone(&process));
        }
        process
    }

    /// 15 bits of `id`, as every version of OTP has them, and the rest in `serial`: distinct for 2^47 processes.
    fn pid(&self, number: u64) -> Pid {
        Pid {
            node: self.node.clone(),
            id: (number & 0x7FFF) as u32,
            serial: (number >> 15) as u32,
            creation: self.creation,
        }
    }

    /// A reference that this node has not made before: 18 bits in the first word, as every version has them.
    pub(crate) fn make_reference(&self) -> Reference {
        let mut table = self.lock();
        table.next_reference += 1;
        let number = table.next_reference;
        let ids = vec![
            (number & 0x3_FFFF) as u32,
            (number >> 18) as u32,
            (number >> 50) as u32,
        ];
        Reference {
            node: self.node.clone(),
            creation: self.creation,
            ids,
        }
    }

    pub(crate) fn register(&self, name: &str, process: &Arc<Process>) -> Result<(), RegisterError> {
        if name.is_empty() || name == "undefined" || name.chars().count() > 255 {
            return Err(RegisterError::Invalid(name.to_owned()));
        }
        let mut table = self.lock();
        if table.closed {
            return Err(RegisterError::NodeDown);
        }
        if !table.by_pid.contains_key(&process.pid) {
            return Err(RegisterError::Ended);
        }
        let name = Atom::from(name);
        match table.names.entry(name.clone()) {
            Entry::Occupied(_) => return Err(RegisterError::Taken(name.as_str().to_owned())),
            Entry::Vacant(entry) => entry.insert(Arc::clone(process)),
        };
        table.held(process).names.push(name);
        Ok(())
    }

    /// Takes a name away from this process; false when it does not have it.
    pub(crate) fn unregister(&self, name: &str, process: &Arc<Process>) -> bool {
        let mut table = self.lock();
        let held = table
            .names
            .get(name)
            .is_some_and(|holder| Arc::ptr_eq(holder, process));
        if held {
            table.held(process).names.retain(|held| held.as_str() != name);
            table.names.remove(name);
        }
        held
    }

    pub(crate) fn add_alias(&self, process: &Arc<Process>, once: bool) -> Reference {
        let reference = self.make_reference();
        let mut table = self.lock();
        if table.by_pid.contains_key(&process.pid) {
            let alias = Alias {
                process: Arc::clone(process),
                once,
            };
            table.aliases.insert(reference.clone(), alias);
            table.held(process).aliases.insert(reference.clone());
        }
        reference
    }

    pub(crate) fn remove_alias(&self, alias: &Reference, process: &Arc<Process>) -> bool {
        let mut table = self.lock();
        let held = table
            .aliases
            .get(alias)
            .is_some_and(|held| Arc::ptr_eq(&held.process, process));
        held && table.take_alias(alias).is_some()
    }

    /// The process with exactly this pid: an earlier incarnation's are not found.
    pub(crate) fn by_pid(&self, pid: &Pid) -> Option<Arc<Process>> {
        self.lock().by_pid.get(pid).cloned()
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<Arc<Process>> {
        self.lock().names.get(name).cloned()
    }

    /// The process that a message sent to this alias is for. An alias for one message ends with it.
    pub(crate) fn by_alias(&self, alias: &Reference) -> Option<Arc<Process>> {
        let mut table = self.lock();
        let held = table.aliases.get(alias)?;
        if held.once {
            return table.take_alias(alias);
        }
        Some(Arc::clone(&held.process))
    }

    /// Ends a process, for this reason when a signal does: from here on nobody finds it. False when it had ended before.
    pub(crate) fn remove(&self, process: &Arc<Process>, killed: Option<&Term>) -> bool {
        let mut table = self.lock();
        let removed = table.by_pid.remove(&process.pid).is_some();
        if process.named.load(Ordering::Relaxed)
            && let Some(held) = table.held.remove(&process.pid)
        {
            for name in &held.names {
                table.names.remove(name);
            }
            for alias in &held.aliases {
                table.aliases.remove(alias);
            }
        }
        drop(table);
        match killed {
            // Its reader must not find it closed without the reason.
            Some(reason) if removed => process.kill(reason.clone()),
            _ => process.close(),
        }
        removed
    }

    /// Ends all, now and later: every mailbox gives what it has and then says that the node is down.
    pub(crate) fn close(&self) {
        let mut table = self.lock();
        table.closed = true;
        table.names.clear();
        table.aliases.clear();
        table.held.clear();
        let processes = std::mem::take(&mut table.by_pid);
        drop(table);
        for process in processes.values() {
            process.close();
        }
    }

    /// Held for short, synchronous sections only.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn held(&mut self, process: &Process) -> &mut Held {
        process.named.store(true, Ordering::Relaxed);
        self.held.entry(process.pid.clone()).or_default()
    }

    fn take_alias(&mut self, alias: &Reference) -> Option<Arc<Process>> {
        let Alias { process, .. } = self.aliases.remove(alias)?;
        if let Some(held) = self.held.get_mut(&process.pid) {
            held.aliases.remove(alias);
        }
        Some(process)
    }
}

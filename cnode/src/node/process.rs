//! The processes of this node: their identifiers, names and queues.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use meshx_etf::{Atom, Pid, Reference};
use tokio::sync::Notify;

use super::mailbox::Message;

/// Something in a mailbox.
#[derive(Debug)]
pub(crate) enum Item {
    /// A message as it came, decoded when it is read: so the queue's bound in bytes is the memory it takes.
    Encoded { from: Option<Pid>, payload: Vec<u8> },
    /// Made here, or a signal.
    Ready(Message),
}

impl Item {
    fn cost(&self) -> usize {
        match self {
            Self::Encoded { payload, .. } => payload.len(),
            // Signals are bounded by the links and monitors that cause them, local messages by their sender.
            Self::Ready(_) => 0,
        }
    }
}

/// One process: the queue behind a [`Mailbox`](super::Mailbox).
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    queue: Mutex<Queue>,
    pub(crate) ready: Notify,
    /// Whether it ever had a name or an alias: most processes live for one call and never do.
    named: AtomicBool,
    max_messages: usize,
    max_bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    bytes: usize,
    dropped: u64,
    closed: bool,
}

impl Process {
    /// Puts a message into the queue; false when it was full, or its owner is gone.
    pub(crate) fn deliver(&self, item: Item) -> bool {
        let mut queue = self.lock();
        if queue.closed {
            return false;
        }
        let signal = matches!(&item, Item::Ready(message) if !matches!(message, Message::Term { .. }));
        let bytes = queue.bytes.saturating_add(item.cost());
        let full = queue.items.len() >= self.max_messages || bytes > self.max_bytes;
        if full && !signal && !queue.items.is_empty() {
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
                Ok(Some(item))
            }
            None if queue.closed => Err(()),
            None => Ok(None),
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
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
    aliases: HashMap<Reference, Arc<Process>>,
    closed: bool,
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

    pub(crate) fn spawn(&self) -> Arc<Process> {
        let mut table = self.lock();
        table.next_pid += 1;
        let pid = self.pid(table.next_pid);
        let process = Arc::new(Process {
            pid: pid.clone(),
            queue: Mutex::new(Queue {
                closed: table.closed,
                ..Queue::default()
            }),
            ready: Notify::new(),
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
        match table.names.entry(Atom::from(name)) {
            Entry::Occupied(_) => Err(RegisterError::Taken(name.to_owned())),
            Entry::Vacant(entry) => {
                process.named.store(true, Ordering::Relaxed);
                entry.insert(Arc::clone(process));
                Ok(())
            }
        }
    }

    /// Takes a name away from this process; false when it does not have it.
    pub(crate) fn unregister(&self, name: &str, process: &Arc<Process>) -> bool {
        let mut table = self.lock();
        let held = table
            .names
            .get(name)
            .is_some_and(|holder| Arc::ptr_eq(holder, process));
        held && table.names.remove(name).is_some()
    }

    pub(crate) fn add_alias(&self, process: &Arc<Process>) -> Reference {
        let reference = self.make_reference();
        let mut table = self.lock();
        if !table.closed {
            process.named.store(true, Ordering::Relaxed);
            table.aliases.insert(reference.clone(), Arc::clone(process));
        }
        reference
    }

    pub(crate) fn remove_alias(&self, alias: &Reference, process: &Arc<Process>) -> bool {
        let mut table = self.lock();
        let held = table
            .aliases
            .get(alias)
            .is_some_and(|holder| Arc::ptr_eq(holder, process));
        held && table.aliases.remove(alias).is_some()
    }

    /// The process with exactly this pid: an earlier incarnation's are not found.
    pub(crate) fn by_pid(&self, pid: &Pid) -> Option<Arc<Process>> {
        self.lock().by_pid.get(pid).cloned()
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<Arc<Process>> {
        self.lock().names.get(name).cloned()
    }

    pub(crate) fn by_alias(&self, alias: &Reference) -> Option<Arc<Process>> {
        self.lock().aliases.get(alias).cloned()
    }

    /// Ends a process: from here on nobody finds it.
    pub(crate) fn remove(&self, process: &Arc<Process>) {
        let mut table = self.lock();
        table.by_pid.remove(&process.pid);
        if process.named.load(Ordering::Relaxed) {
            table.names.retain(|_, holder| !Arc::ptr_eq(holder, process));
            table.aliases.retain(|_, holder| !Arc::ptr_eq(holder, process));
        }
        drop(table);
        process.close();
    }

    /// Ends all, now and later: every mailbox gives what it has and then says that the node is down.
    pub(crate) fn close(&self) {
        let mut table = self.lock();
        table.closed = true;
        table.names.clear();
        table.aliases.clear();
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

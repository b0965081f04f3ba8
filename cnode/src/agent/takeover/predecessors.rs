//! Earlier processes of this agent: taken over, and still holding links.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{
    io::AsyncWriteExt,
    net::{UnixStream, unix::OwnedReadHalf},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{info, warn};

use super::{
    Reception,
    message::{Order, Report, ShownLink},
    wire::{MESSAGE_MAX, MESSAGE_TIME},
};
use crate::{
    agent::control::frame::{frame, read_frame},
    proxy::{
        Elsewhere, Forwarded,
        cause::Refusal,
        links::{LINKS_MAX, LinkTable},
    },
};

/// Earlier processes that are known at a time. Others hold their links all the same; they are not told of.
pub(super) const PREDECESSORS_MAX: usize = 16;
/// Orders that may wait for one of them.
const ORDERS_MAX: usize = 1024;
/// How long one may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// Those that are connected. Clones share one list.
#[derive(Debug, Clone, Default)]
pub struct Predecessors {
    next: Arc<AtomicU64>,
    // Held for a look or a change, never across an await.
    all: Arc<Mutex<HashMap<u64, Predecessor>>>,
}

#[derive(Debug)]
struct Predecessor {
    pid: i32,
    program: String,
    links: Arc<AtomicUsize>,
    orders: mpsc::Sender<(Order, Option<Asked>)>,
}

/// Who waits for an answer. They come in the order of the questions.
#[derive(Debug)]
enum Asked {
    Links(oneshot::Sender<Vec<ShownLink>>, Vec<ShownLink>),
    Proof(oneshot::Sender<Option<Result<(), Refusal>>>),
}

/// One of them, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draining {
    /// Its process.
    pub pid: i32,
    /// Name and version of its program.
    pub program: String,
    /// Links that it holds.
    pub links: usize,
}

impl Predecessors {
    /// All of them.
    pub fn list(&self) -> Vec<Draining> {
        let mut all: Vec<_> = self
            .lock()
            .values()
            .map(|one| Draining {
                pid: one.pid,
                program: one.program.clone(),
                links: one.links.load(Ordering::Relaxed),
            })
            .collect();
        all.sort_by_key(|one| one.pid);
        all
    }

    /// Tells all of them. What one does not take because it hangs is lost, as it is when it has ended.
    pub(in crate::agent) fn order(&self, order: &Order) {
        for one in self.lock().values() {
            if one.orders.try_send((order.clone(), None)).is_err() {
                warn!(pid = one.pid, "a predecessor takes no orders");
            }
        }
    }

    /// Their live links; those of one that is silent are left out.
    pub(in crate::agent) async fn links(&self) -> Vec<ShownLink> {
        let answers = self
            .ask(&Order::Links, |tell| Asked::Links(tell, Vec::new()))
            .await;
        answers.into_iter().flatten().collect()
    }

    async fn ask<T>(&self, order: &Order, asked: impl Fn(oneshot::Sender<T>) -> Asked) -> Vec<T> {
        let told: Vec<_> = {
            let all = self.lock();
            all.values()
                .filter_map(|one| {
                    let (tell, told) = oneshot::channel();
                    one.orders.try_send((order.clone(), Some(asked(tell)))).ok()?;
                    Some(told)
                })
                .collect()
        };
        let answers = told.into_iter().map(|told| timeout(ANSWER_TIME, told));
        let answers = futures::future::join_all(answers).await;
        answers.into_iter().flatten().flatten().collect()
    }

    /// Gives all of them up: they look for the successor of this process.
    pub(in crate::agent) fn dismiss(&self) {
        self.lock().clear();
    }

    /// Serves one that has said hello, until it has ended or is dismissed.
    pub(super) async fn serve(
        &self,
        stream: UnixStream,
        pid: i32,
        program: String,
        reception: &Arc<Reception>,
    ) {
        let (orders, mut waiting) = mpsc::channel(ORDERS_MAX);
        // The first order there is: what it holds is looked at once.
        let (tell, told) = oneshot::channel();
        let _ = orders.try_send((Order::Links, Some(Asked::Links(tell, Vec::new()))));
        let came = reception.clone();
        tokio::spawn(async move {
            if let Ok(links) = told.await {
                (came.came)(&links);
            }
        });
        let holding = Arc::new(AtomicUsize::new(0));
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut all = self.lock();
            if all.len() >= PREDECESSORS_MAX {
                warn!(
                    pid,
                    "{PREDECESSORS_MAX} predecessors are known, this one is not (PREDECESSORS_MAX)"
                );
                return;
            }
            let one = Predecessor {
                pid,
                program: program.clone(),
                links: holding.clone(),
                orders,
            };
            all.insert(number, one);
        }
        info!(pid, program, "a predecessor holds links");
        let (reader, mut writer) = stream.into_split();
        let asked = Mutex::new(VecDeque::new());
        let giving = async {
            while let Some((order, tell)) = waiting.recv().await {
                let Ok(bytes) = frame(|bytes| serde_json::to_writer(bytes, &order)) else {
                    continue;
                };
                if let Some(tell) = tell {
                    let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                    asked.push_back(tell);
                }
                if !matches!(timeout(MESSAGE_TIME, writer.write_all(&bytes)).await, Ok(Ok(()))) {
                    return;
                }
            }
        };
        tokio::select! {
            () = giving => {}
            () = hear(reader, &holding, &asked, &reception.links) => {}
        }
        if self.lock().remove(&number).is_some() {
            info!(pid, "a predecessor has ended");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Predecessor>> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Elsewhere for Predecessors {
    fn reprove(&self, forwarded: Forwarded) -> BoxFuture<'_, Option<Result<(), Refusal>>> {
        Box::pin(async move {
            let answers = self.ask(&Order::Prove(forwarded), Asked::Proof).await;
            answers.into_iter().flatten().next()
        })
    }
}

async fn hear(
    mut reader: OwnedReadHalf,
    holding: &AtomicUsize,
    asked: &Mutex<VecDeque<Asked>>,
    links: &LinkTable,
) {
    while let Ok(Some(bytes)) = read_frame(&mut reader, MESSAGE_MAX).await {
        match serde_json::from_slice(&bytes) {
            Ok(Report::Holding { links }) => holding.store(links, Ordering::Relaxed),
            Ok(Report::Cut { owner, event }) => links.tell(owner, event),
            Ok(Report::Links { links, last }) => {
                let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(Asked::Links(_, told)) = asked.front_mut() else {
                    return;
                };
                told.extend(links);
                if told.len() > LINKS_MAX {
                    return;
                }
                if last && let Some(Asked::Links(tell, told)) = asked.pop_front() {
                    let _ = tell.send(told);
                }
            }
            Ok(Report::Proven { answer }) => {
                let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(Asked::Proof(tell)) = asked.pop_front() else {
                    return;
                };
                let _ = tell.send(answer);
            }
            // Of another release.
            Err(error) => warn!(%error, "a predecessor's report is not understood"),
        }
    }
}

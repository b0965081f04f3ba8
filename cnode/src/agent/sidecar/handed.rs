//! A running sidecar in the hands of a successor of this process.
//!
//! The program is nobody's child then but init's. The successor watches and signals it by handles, and holds the pipe by
//! whose end the guard knows that its agent has ended (`process`). Until it serves, both processes hold all of that, and
//! this one does nothing with it: [`Frozen`].

use std::{io, os::fd::OwnedFd, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::{
    SidecarHandle, SidecarSpec,
    process::{HandedRun, Program, RUN_FILES},
};
use crate::mesh::SidecarUpstream;

/// How long a sidecar may take to be between two things that its agent does with it: it may be cleared away.
const FREEZE_TIME: Duration = Duration::from_secs(4);

/// What a successor must know of it. Open files go with its run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::agent) struct HandedSidecar {
    pub(super) spec: SidecarSpec,
    /// As it was started, and is started again.
    pub(super) program: Program,
    /// It reads its certificates, instances and rules from files that the agent writes.
    pub(super) keeps_files: bool,
    /// None between two runs.
    pub(super) run: Option<HandedRun>,
}

impl HandedSidecar {
    /// How many open files go with it.
    pub(in crate::agent) fn files(&self) -> usize {
        self.run.map_or(0, |_| RUN_FILES)
    }
}

/// As [`HandedSidecar`], with its files.
pub(super) struct Taken {
    pub(super) program: Program,
    pub(super) keeps_files: bool,
    pub(super) run: Option<(HandedRun, Vec<OwnedFd>)>,
}

impl Taken {
    pub(super) fn of(handed: HandedSidecar, files: Vec<OwnedFd>) -> (SidecarSpec, Self) {
        let taken = Self {
            program: handed.program,
            keeps_files: handed.keeps_files,
            run: handed.run.map(|run| (run, files)),
        };
        (handed.spec, taken)
    }
}

type Described = io::Result<(HandedSidecar, Vec<OwnedFd>)>;

/// Asks a sidecar's supervisor to describe it, and to do nothing until it is told.
#[derive(Debug)]
pub(super) struct HandOver {
    describe: oneshot::Sender<Described>,
    /// Ends when the sidecar stays; else who waits until it was left.
    decided: oneshot::Receiver<oneshot::Sender<()>>,
}

impl HandOver {
    /// Something when a successor has it: to be dropped once this process has let go.
    pub(super) async fn give(self, described: Described) -> Option<Left> {
        self.describe.send(described).ok()?;
        self.decided.await.ok().map(Left)
    }
}

/// Tells, by its end, that a sidecar was left.
#[derive(Debug)]
pub(super) struct Left(#[allow(dead_code, reason = "its end is the message")] oneshot::Sender<()>);

/// A sidecar of which this process does nothing. Dropped, it goes on.
#[derive(Debug)]
pub(in crate::agent) struct Frozen {
    pub(in crate::agent) handed: HandedSidecar,
    pub(in crate::agent) files: Vec<OwnedFd>,
    decide: oneshot::Sender<oneshot::Sender<()>>,
}

impl Frozen {
    /// A successor has it; returns when this process has let go.
    pub(in crate::agent) async fn leave(self) {
        let (leaving, left) = oneshot::channel();
        if self.decide.send(leaving).is_ok() {
            let _ = left.await;
        }
    }
}

/// Can have a sidecar frozen.
#[derive(Debug, Clone)]
pub(in crate::agent) struct Freezer {
    id: String,
    hand_over: mpsc::Sender<HandOver>,
    upstreams: watch::Receiver<Vec<SidecarUpstream>>,
}

impl SidecarHandle {
    /// For the sidecar of this instance.
    pub(in crate::agent) fn freezer(&self, id: &str) -> Freezer {
        Freezer {
            id: id.to_owned(),
            hand_over: self.control.hand_over.clone(),
            upstreams: self.control.upstreams.subscribe(),
        }
    }
}

impl Freezer {
    /// None when it has ended for good.
    ///
    /// # Errors
    /// A text, when it cannot be handed over now.
    pub(in crate::agent) async fn freeze(self) -> Result<Option<Frozen>, String> {
        let (describe, described) = oneshot::channel();
        let (decide, decided) = oneshot::channel();
        let asked = async {
            let hand_over = HandOver { describe, decided };
            self.hand_over.send(hand_over).await.ok()?;
            described.await.ok()
        };
        let described = timeout(FREEZE_TIME, asked).await.map_err(|_| {
            format!(
                "the sidecar of {} is busy for {} s: its client does not take its events",
                self.id,
                FREEZE_TIME.as_secs()
            )
        })?;
        match described {
            None => Ok(None),
            Some(Ok((mut handed, files))) => {
                handed.spec.upstreams.clone_from(&self.upstreams.borrow());
                Ok(Some(Frozen {
                    handed,
                    files,
                    decide,
                }))
            }
            Some(Err(error)) => Err(format!("the sidecar of {}: {error}", self.id)),
        }
    }
}

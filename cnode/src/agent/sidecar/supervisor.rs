//! One sidecar's life: its files kept current, its program kept up, until it is told to stop or fails too often.

use std::{collections::VecDeque, future::Future, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Settings, SidecarError, SidecarEvent, SidecarEventKind, SidecarKind, SidecarSpec, command, envoy,
    files::Files,
    handed::{HandOver, HandedSidecar, Left, Taken},
    output::Sink,
    process::{HandedRun, Program, Run},
    view::{POLL, Sources, View, Viewer},
};
use crate::{
    mesh::{Mesh, MeshError, SidecarUpstream},
    node::backoff::Attempts,
};

/// Restarts are counted over this long.
const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// Everything that a sidecar is made of.
pub(super) struct Parts {
    pub(super) mesh: Arc<dyn Mesh>,
    pub(super) sources: Arc<Sources>,
    pub(super) settings: Settings,
    pub(super) dir: PathBuf,
    pub(super) spec: SidecarSpec,
    pub(super) events: mpsc::Sender<SidecarEvent>,
    pub(super) upstreams: watch::Receiver<Vec<SidecarUpstream>>,
    pub(super) wake: watch::Receiver<u64>,
    pub(super) stop: CancellationToken,
    pub(super) hand_overs: mpsc::Receiver<HandOver>,
}

/// Prepares a sidecar and starts its program once. The future that comes back is the rest of its life here.
pub(super) async fn start(parts: Parts) -> Result<impl Future<Output = Option<Left>> + Send, SidecarError> {
    let mut files = Files::open(&parts.dir)?;
    let (program, keeper) = prepare(&parts, &mut files).await?;
    live(parts, files, program, keeper, None)
}

/// As [`start`], with the program of a predecessor of this process.
pub(super) fn resume(
    parts: Parts,
    taken: Taken,
) -> Result<impl Future<Output = Option<Left>> + Send, SidecarError> {
    let files = Files::open(&parts.dir)?;
    let keeper = taken.keeps_files.then(|| Keeper::new(&parts));
    live(parts, files, taken.program, keeper, taken.run)
}

fn live(
    parts: Parts,
    files: Files,
    program: Program,
    keeper: Option<Keeper>,
    taken: Option<(HandedRun, Vec<OwnedFd>)>,
) -> Result<impl Future<Output = Option<Left>> + Send, SidecarError> {
    let Parts {
        settings,
        dir,
        spec,
        events,
        stop,
        mut hand_overs,
        ..
    } = parts;
    let lines = spec.output.then(|| events.clone());
    let secret = spec
        .token
        .clone()
        .or_else(|| settings.consul.as_ref()?.token.clone());
    let supervisor = Supervisor {
        sink: Sink::new(spec.id.clone(), lines, secret),
        program,
        dir,
        spec,
        settings,
        events,
        keeps_files: keeper.is_some(),
        stop: stop.clone(),
    };
    let run = match taken {
        None => supervisor.run(),
        Some((run, files)) => {
            let run = Run::resume(run, files, &supervisor.dir, &supervisor.sink);
            run.map_err(|source| SidecarError::System {
                what: "watch a predecessor's program".to_owned(),
                source,
            })
        }
    }?;
    let (reload, reloads) = watch::channel(());
    Ok(async move {
        match keeper {
            Some(keeper) => {
                tokio::select! {
                    left = supervisor.keep_up(run, reloads, &mut hand_overs) => left,
                    () = keeper.keep_current(files, parts.upstreams, parts.wake, reload) => None,
                }
            }
            None => supervisor.keep_up(run, reloads, &mut hand_overs).await,
        }
    })
}

/// The program, and who keeps its files current where that is us.
async fn prepare(parts: &Parts, files: &mut Files) -> Result<(Program, Option<Keeper>), SidecarError> {
    let (settings, spec) = (&parts.settings, &parts.spec);
    if spec.kind == SidecarKind::ConnectProxy {
        return Ok((command::connect_proxy(settings, spec)?, None));
    }
    if spec.kind == SidecarKind::Envoy
        && let Some(program) = command::consul_envoy(settings, spec).await?
    {
        return Ok((program, None));
    }
    let mut keeper = Keeper::new(parts);
    let wanted = parts.upstreams.borrow().clone();
    let view = timeout(settings.start_time, keeper.viewer.look(&wanted, Instant::now()))
        .await
        .map_err(|_| {
            MeshError::Unavailable(format!(
                "no certificate and roots for {} within {} s",
                spec.service,
                settings.start_time.as_secs()
            ))
        })??;
    keeper.write(files, &view)?;
    let program = match &spec.kind {
        SidecarKind::Command(own) => command::own(settings, spec, own, &view.identity.id, files)?,
        _ => envoy::program(settings, spec, files)?,
    };
    Ok((program, Some(keeper)))
}

/// Keeps the files of a sidecar current that reads its certificates, instances and rules from them.
struct Keeper {
    viewer: Viewer,
    spec: SidecarSpec,
}

impl Keeper {
    fn new(parts: &Parts) -> Self {
        let spec = parts.spec.clone();
        Self {
            viewer: Viewer::new(parts.mesh.clone(), parts.sources.clone(), spec.service.clone()),
            spec,
        }
    }

    fn write(&self, files: &mut Files, view: &View) -> Result<bool, SidecarError> {
        match &self.spec.kind {
            SidecarKind::Command(_) => command::write(files, view),
            _ => envoy::write(files, &self.spec, view),
        }
    }

    async fn keep_current(
        mut self,
        mut files: Files,
        mut upstreams: watch::Receiver<Vec<SidecarUpstream>>,
        mut wake: watch::Receiver<u64>,
        reload: watch::Sender<()>,
    ) {
        let mut failing = false;
        loop {
            tokio::select! {
                () = sleep(POLL) => {}
                // Senders that are gone tell nothing more; the poll goes on.
                Ok(()) = upstreams.changed() => {}
                Ok(()) = wake.changed() => self.viewer.rules_changed(Instant::now()),
            }
            let wanted = upstreams.borrow_and_update().clone();
            let written = match self.viewer.look(&wanted, Instant::now()).await {
                Ok(view) => self.write(&mut files, &view),
                Err(error) => Err(error.into()),
            };
            match written {
                Ok(changed) => {
                    if failing {
                        info!(id = self.spec.id, "the files of a sidecar are current again");
                    }
                    failing = false;
                    if changed {
                        reload.send_replace(());
                    }
                }
                Err(error) => {
                    if !failing {
                        warn!(id = self.spec.id, %error, "the files of a sidecar cannot be kept current now");
                    }
                    failing = true;
                }
            }
        }
    }
}

struct Supervisor {
    program: Program,
    dir: PathBuf,
    spec: SidecarSpec,
    settings: Settings,
    events: mpsc::Sender<SidecarEvent>,
    sink: Sink,
    /// It reads its certificates, instances and rules from files that this agent writes.
    keeps_files: bool,
    stop: CancellationToken,
}

/// Why a run is watched no more.
enum Watch {
    /// It has ended by itself: how, in words.
    Ended(String),
    /// It was told to stop.
    Stopped,
    /// A successor of this process has it.
    Left(Left),
}

impl Supervisor {
    fn run(&self) -> Result<Run, SidecarError> {
        Run::start(&self.program, &self.dir, &self.sink)
    }

    /// Until it is over, or a successor of this process keeps it up.
    async fn keep_up(
        self,
        first: Run,
        mut reloads: watch::Receiver<()>,
        hand_overs: &mut mpsc::Receiver<HandOver>,
    ) -> Option<Left> {
        let mut attempts = Attempts::new(self.settings.backoff);
        let mut restarts = Restarts::new(self.spec.max_restarts);
        let mut run: Result<Run, SidecarError> = Ok(first);
        loop {
            let began = Instant::now();
            let text = match run {
                Ok(run) => match self.watch(run, &mut reloads, hand_overs).await {
                    Watch::Ended(text) => text,
                    Watch::Stopped => return None,
                    Watch::Left(left) => return Some(left),
                },
                Err(error) => error.to_string(),
            };
            attempts.succeeded(began.elapsed());
            let again = restarts.admit(Instant::now());
            // Not the text: the program's own words in it are its owner's.
            warn!(id = self.spec.id, again, "a sidecar ended by itself");
            let text = match again {
                true => text,
                false => format!(
                    "{text}; it is not started again after {} restarts within {} s (max_proxy_restarts)",
                    self.spec.max_restarts,
                    RESTART_WINDOW.as_secs()
                ),
            };
            let wait = attempts.wait();
            tokio::select! {
                () = self.tell_down(text, !again) => {}
                () = self.stop.cancelled() => return None,
            }
            if !again {
                return None;
            }
            let until = Instant::now() + wait;
            loop {
                tokio::select! {
                    () = sleep_until(until) => break,
                    () = self.stop.cancelled() => return None,
                    Some(hand_over) = hand_overs.recv() => {
                        if let Some(left) = self.hand_over(None, hand_over).await {
                            return Some(left);
                        }
                    }
                }
            }
            run = self.run();
        }
    }

    /// One run, to its end here.
    async fn watch(
        &self,
        mut run: Run,
        reloads: &mut watch::Receiver<()>,
        hand_overs: &mut mpsc::Receiver<HandOver>,
    ) -> Watch {
        let name = self.program.path.display();
        loop {
            tokio::select! {
                status = run.ended() => {
                    run.clear().await;
                    let end = status.unwrap_or_else(|error| error.to_string());
                    let last = self.sink.take_last();
                    return Watch::Ended(match last.is_empty() {
                        true => format!("{name} ended: {end}"),
                        false => format!("{name} ended: {end}; it said last: {last}"),
                    });
                }
                () = self.stop.cancelled() => {
                    debug!(id = self.spec.id, "stopping a sidecar");
                    run.stop(self.settings.grace).await;
                    return Watch::Stopped;
                }
                Some(hand_over) = hand_overs.recv() => {
                    if let Some(left) = self.hand_over(Some(&run), hand_over).await {
                        run.leave();
                        return Watch::Left(left);
                    }
                }
                Ok(()) = reloads.changed() => run.reload(),
            }
        }
    }

    /// Describes it, and does nothing until its new owner is known.
    async fn hand_over(&self, run: Option<&Run>, hand_over: HandOver) -> Option<Left> {
        let run = run.map(Run::handed).transpose();
        let handed = run.map(|run| {
            let (run, files) = run.unzip();
            let handed = HandedSidecar {
                spec: self.spec.clone(),
                program: self.program.clone(),
                keeps_files: self.keeps_files,
                run,
            };
            (handed, files.unwrap_or_default())
        });
        hand_over.give(handed).await
    }

    async fn tell_down(&self, text: String, final_: bool) {
        let event = SidecarEvent {
            id: self.spec.id.clone(),
            kind: SidecarEventKind::Down { text, final_ },
        };
        // Nobody there to hear it is no fault.
        let _ = self.events.send(event).await;
    }
}

/// How often it may be started again.
#[derive(Debug)]
struct Restarts {
    max: usize,
    at: VecDeque<Instant>,
}

impl Restarts {
    fn new(max: u32) -> Self {
        Self {
            max: usize::try_from(max).unwrap_or(usize::MAX),
            at: VecDeque::new(),
        }
    }

    /// Whether it may be started again now; counts it when it may.
    fn admit(&mut self, now: Instant) -> bool {
        while self
            .at
            .front()
            .is_some_and(|at| now.duration_since(*at) >= RESTART_WINDOW)
        {
            self.at.pop_front();
        }
        let admitted = self.at.len() < self.max;
        if admitted {
            self.at.push_back(now);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_are_counted_over_a_minute() {
        let (mut restarts, now) = (Restarts::new(2), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        assert!(restarts.admit(now) && restarts.admit(after(30)));
        assert!(!restarts.admit(after(59)));
        assert!(restarts.admit(after(60)), "the first is a minute old");
        assert!(!restarts.admit(after(61)));
        assert!(!Restarts::new(0).admit(now));
    }
}

//! One sidecar's life: its files kept current, its program kept up, until it is told to stop or fails too often.

use std::{collections::VecDeque, future::Future, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Settings, SidecarError, SidecarEvent, SidecarEventKind, SidecarKind, SidecarSpec, command, envoy,
    files::Files,
    output::Sink,
    process::{Program, Run},
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
}

/// Prepares a sidecar and starts its program once. The future that comes back is the rest of its life.
pub(super) async fn start(parts: Parts) -> Result<impl Future<Output = ()> + Send, SidecarError> {
    let mut files = Files::open(&parts.dir)?;
    let (program, keeper) = prepare(&parts, &mut files).await?;
    let Parts {
        settings,
        dir,
        spec,
        events,
        stop,
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
        stop: stop.clone(),
    };
    let run = supervisor.run()?;
    let (reload, reloads) = watch::channel(());
    Ok(async move {
        match keeper {
            Some(keeper) => {
                tokio::select! {
                    () = supervisor.keep_up(run, reloads) => {}
                    () = keeper.keep_current(files, parts.upstreams, parts.wake, reload) => {}
                }
            }
            None => supervisor.keep_up(run, reloads).await,
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
    let mut keeper = Keeper {
        viewer: Viewer::new(parts.mesh.clone(), parts.sources.clone(), spec.service.clone()),
        spec: spec.clone(),
    };
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
    stop: CancellationToken,
}

impl Supervisor {
    fn run(&self) -> Result<Run, SidecarError> {
        Run::start(&self.program, &self.dir, &self.sink)
    }

    async fn keep_up(self, first: Run, mut reloads: watch::Receiver<()>) {
        let mut attempts = Attempts::new(self.settings.backoff);
        let mut restarts = Restarts::new(self.spec.max_restarts);
        let mut run: Result<Run, SidecarError> = Ok(first);
        loop {
            let began = Instant::now();
            let text = match run {
                Ok(run) => match self.watch(run, &mut reloads).await {
                    Some(text) => text,
                    None => return,
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
                () = self.stop.cancelled() => return,
            }
            if !again {
                return;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = self.stop.cancelled() => return,
            }
            run = self.run();
        }
    }

    /// One run, to its end, in words; none when it was told to stop.
    async fn watch(&self, mut run: Run, reloads: &mut watch::Receiver<()>) -> Option<String> {
        let name = self.program.path.display();
        loop {
            tokio::select! {
                status = run.ended() => {
                    let end = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                    let last = self.sink.take_last();
                    return Some(match last.is_empty() {
                        true => format!("{name} ended: {end}"),
                        false => format!("{name} ended: {end}; it said last: {last}"),
                    });
                }
                () = self.stop.cancelled() => {
                    debug!(id = self.spec.id, "stopping a sidecar");
                    run.stop(self.settings.grace).await;
                    return None;
                }
                Ok(()) = reloads.changed() => run.reload(),
            }
        }
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

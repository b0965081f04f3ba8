//! Data planes that are programs of their own: started, kept up, told of changes, and ended with their service.
//!
//! | Kind | What runs | Who tells it of certificates, instances and rules |
//! |---|---|---|
//! | [`SidecarKind::ConnectProxy`] | `consul connect proxy` | Consul |
//! | [`SidecarKind::Envoy`] | `consul connect envoy`, when that Consul speaks xDS v3 | Consul |
//! | [`SidecarKind::Envoy`] | `envoy` | this agent, by files (`envoy`) |
//! | [`SidecarKind::Command`] | the user's own program | this agent, by PEM files (`command`) |
//!
//! Each sidecar has a directory (0700) below that of [`Sidecars::new`]; everything in it goes with the sidecar.
//!
//! **No orphans.** The program runs in a process group that a guard leads: a shell that waits for the end of a pipe
//! whose other end only the agent holds (`process`). However the agent ends, the guard kills the group. What left
//! the group is found by a variable in its environment, at the sidecar's end or by the next agent (`orphans`).
//!
//! **Upgrades.** A successor of the agent's process gets all running programs, the ends of their pipes included
//! (`handed`): nothing in them notices.

mod command;
mod envoy;
mod files;
mod handed;
mod orphans;
mod output;
mod process;
mod spec;
mod supervisor;
mod view;

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedMutexGuard, mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub(in crate::agent) use handed::{Frozen, HandedSidecar};
use handed::{HandOver, Left, Taken};
pub use spec::{
    ConsulProgram, RESTARTS_DEFAULT, START_TIME, STOP_GRACE, Settings, SidecarError, SidecarEvent,
    SidecarEventKind, SidecarKind, SidecarSpec, Stream, UPSTREAMS_PER_SIDECAR_MAX,
};
use spec::{check, check_upstreams};

use crate::mesh::{Mesh, SidecarUpstream};

/// Sidecars that one agent may have.
pub const SIDECARS_MAX: usize = 256;
/// How long a predecessor of the same id may take to end beyond its grace.
const PREDECESSOR_TIME: Duration = Duration::from_secs(3);

/// The sidecars of one agent.
pub struct Sidecars {
    mesh: Arc<dyn Mesh>,
    dir: PathBuf,
    settings: Settings,
    sources: Arc<view::Sources>,
    /// One lock for each sidecar's directory, held while it lives: a successor waits for its predecessor's end.
    // The outer lock is held for a look-up, never across an await.
    places: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Counts up when the rules may have changed.
    wake: watch::Sender<u64>,
}

impl Sidecars {
    /// Takes `dir`, which must be below the agent's own: nobody else may use it, which the agent's lock sees to. Ends
    /// whatever sidecars a killed agent left there. Blocks for a moment: call it at start.
    ///
    /// # Errors
    /// [`SidecarError::Files`] when the directory cannot be made or others may enter it.
    pub fn new(mesh: Arc<dyn Mesh>, dir: PathBuf, settings: Settings) -> Result<Self, SidecarError> {
        let sidecars = Self::succeed(mesh, dir, settings)?;
        orphans::end_all(&sidecars.dir);
        Ok(sidecars)
    }

    /// As [`Sidecars::new`], for a successor of this agent's process: what runs there is its predecessor's, and comes
    /// by [`Sidecars::resume`].
    ///
    /// # Errors
    /// Likewise.
    pub(in crate::agent) fn succeed(
        mesh: Arc<dyn Mesh>,
        dir: PathBuf,
        settings: Settings,
    ) -> Result<Self, SidecarError> {
        Ok(Self {
            sources: Arc::new(view::Sources::new(mesh.clone())),
            mesh,
            dir: files::private_dir(&dir)?,
            settings,
            places: Mutex::default(),
            wake: watch::channel(0).0,
        })
    }

    /// Starts a sidecar once the mesh has given what it needs; a predecessor of the same id ends first. `events`
    /// gets what it does: lines are left out when that is full, its end is not.
    ///
    /// # Errors
    /// [`SidecarError`]; nothing is left behind then.
    pub async fn start(
        &self,
        spec: SidecarSpec,
        events: mpsc::Sender<SidecarEvent>,
    ) -> Result<SidecarHandle, SidecarError> {
        let (place, parts, control) = self.parts(spec, events).await?;
        let running = supervisor::start(parts).await?;
        Ok(control.spawn(place, running))
    }

    /// A sidecar of a predecessor of this process, which has left it.
    ///
    /// # Errors
    /// [`SidecarError`]; it is ended then.
    pub(in crate::agent) async fn resume(
        &self,
        handed: HandedSidecar,
        files: Vec<OwnedFd>,
        events: mpsc::Sender<SidecarEvent>,
    ) -> Result<SidecarHandle, SidecarError> {
        let (spec, taken) = Taken::of(handed, files);
        let (place, parts, control) = self.parts(spec, events).await?;
        let running = supervisor::resume(parts, taken)?;
        Ok(control.spawn(place, running))
    }

    async fn parts(
        &self,
        spec: SidecarSpec,
        events: mpsc::Sender<SidecarEvent>,
    ) -> Result<(Place, supervisor::Parts, Control), SidecarError> {
        check(&spec)?;
        let name = files::dir_name(&spec.id);
        let place = Place {
            _lock: self.occupy(&spec.id, &name).await?,
            dir: self.dir.join(name),
            left: false,
        };
        let (upstreams, offered) = watch::channel(spec.upstreams.clone());
        let (hand_over, hand_overs) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let parts = supervisor::Parts {
            mesh: self.mesh.clone(),
            sources: self.sources.clone(),
            settings: self.settings.clone(),
            dir: place.dir.clone(),
            spec,
            events,
            upstreams: offered,
            wake: self.wake.subscribe(),
            stop: stop.clone(),
            hand_overs,
        };
        let control = Control {
            upstreams,
            stop,
            hand_over,
        };
        Ok((place, parts, control))
    }

    /// To be called when the rules may have changed, so that a denial counts at once. Without it, it is seen within
    /// half a minute.
    pub fn rules_changed(&self) {
        self.wake.send_modify(|count| *count = count.wrapping_add(1));
    }

    async fn occupy(&self, id: &str, name: &str) -> Result<OwnedMutexGuard<()>, SidecarError> {
        let place = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            // One reference is the map's own.
            places.retain(|_, place| Arc::strong_count(place) > 1);
            if places.len() >= SIDECARS_MAX && !places.contains_key(name) {
                return Err(SidecarError::Limit(format!(
                    "{SIDECARS_MAX} sidecars run, more are not started (SIDECARS_MAX)"
                )));
            }
            places.entry(name.to_owned()).or_default().clone()
        };
        timeout(self.settings.grace + PREDECESSOR_TIME, place.lock_owned())
            .await
            .map_err(|_| {
                SidecarError::Invalid(format!(
                    "a sidecar of {id} runs already: stop it first, or choose another id"
                ))
            })
    }
}

/// One sidecar's directory, its own as long as this lives.
struct Place {
    dir: PathBuf,
    _lock: OwnedMutexGuard<()>,
    /// A successor of this process has it.
    left: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.left {
            files::remove_dir(&self.dir);
        }
    }
}

/// How a sidecar is told of what is wanted.
#[derive(Debug)]
struct Control {
    upstreams: watch::Sender<Vec<SidecarUpstream>>,
    stop: CancellationToken,
    hand_over: mpsc::Sender<HandOver>,
}

impl Control {
    fn spawn(
        self,
        mut place: Place,
        running: impl Future<Output = Option<Left>> + Send + 'static,
    ) -> SidecarHandle {
        let task = tokio::spawn(async move {
            let left = running.await;
            place.left = left.is_some();
            drop(place);
            // Whoever waits for it may end this process.
            drop(left);
        });
        SidecarHandle { control: self, task }
    }
}

/// A running sidecar. It ends when this is dropped, in the background.
#[derive(Debug)]
pub struct SidecarHandle {
    control: Control,
    task: JoinHandle<()>,
}

impl SidecarHandle {
    /// What it offers locally from now on. Sidecars that Consul tells of changes learn it from the registration; an
    /// own command that catches SIGHUP gets one.
    ///
    /// # Errors
    /// [`SidecarError::Invalid`] and [`SidecarError::Limit`], as at the start.
    pub fn set_upstreams(&self, upstreams: Vec<SidecarUpstream>) -> Result<(), SidecarError> {
        check_upstreams(&upstreams)?;
        self.control.upstreams.send_replace(upstreams);
        Ok(())
    }

    /// Ends it, and returns when all its processes are gone.
    pub async fn stop(mut self) {
        self.control.stop.cancel();
        let _ = (&mut self.task).await;
    }
}

impl Drop for SidecarHandle {
    fn drop(&mut self) {
        self.control.stop.cancel();
    }
}

/// A TCP port of 127.0.0.1 that is free now: for [`SidecarUpstream::bind`] and [`SidecarSpec::public`]. Nothing keeps
/// it free until the sidecar takes it.
///
/// # Errors
/// What the system says.
pub fn free_loopback() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

#[cfg(test)]
mod tests;

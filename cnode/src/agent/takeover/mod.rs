//! One process of an agent takes over from another, and no link drops.
//!
//! ```text
//! predecessor                                       successor
//!                <--- takeover.sock ---  hello (versions)
//!   welcome                        --->  joins the mesh, fetches certificates
//!                                  <---  begin
//!   clients come between two frames
//!   locks, listeners, clients,
//!   upstreams, registrations,
//!   EPMD, its names and ports      --->  knows them, serves nothing yet
//!                                  <---  ready
//!   commit                         --->  serves
//!                                  <---  serving
//!   takes no more connections, holds its links under the rules, looks for whoever serves
//!                <--- takeover.sock ---  predecessor's hello: cuts and the links that are left
//! ```
//!
//! Until `commit` the predecessor serves; until `serving` it can go on serving. The listeners of links are never
//! paused; clients of the control socket and of EPMD wait from `begin` to `serving`. Clients, the VMs, keep their connections.

mod follow;
mod give;
mod message;
mod predecessors;
mod take;
mod wire;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub(super) use follow::{Follower, merge};
pub(super) use give::{About, Given, Listeners, Whole, give, refuse};
pub use message::TAKEOVER_VERSIONS;
use message::{Answer, Hello, Role, Welcome};
pub(super) use message::{EpmdPlace, Order, ShownLink};
pub use predecessors::{Draining, Predecessors};
pub(super) use take::{TakeFault, Taken, TakenClient, fail, find, prepare, ready, receive, serving};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tracing::warn;
use wire::Channel;

use super::{control::PROGRAM, paths, trust::Peer};
use crate::{log_limit::LogLimit, proxy::links::LinkTable};

/// Connections to the takeover socket that are served at a time.
const MEETINGS_MAX: usize = predecessors::PREDECESSORS_MAX + 4;
/// Pause after the system could not give a connection: others may close meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Name and version of this program. Tests of an upgrade run one program under two versions.
pub(super) fn program() -> String {
    PROGRAM.to_owned()
}

/// A process that wants to take over, and was welcomed.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    /// Its process and its program.
    pub(super) pid: i32,
    pub(super) program: String,
}

/// Another process of this agent that has answered hello.
struct Meeting {
    channel: Channel,
    welcome: Box<Welcome>,
}

/// Whoever serves in a directory; none when nobody does.
async fn meet(socket: &Path, role: Role) -> io::Result<Option<Meeting>> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    own_process(&stream)?;
    let mut channel = Channel::new(stream);
    let hello = Hello {
        versions: TAKEOVER_VERSIONS,
        program: program(),
        role,
    };
    channel.send(&hello, &[]).await?;
    // It may be about to hand over to somebody else.
    match timeout(MEETING_TIME, channel.receive_late()).await {
        Ok(answer) => match answer? {
            Some(Answer::Welcome(welcome)) => Ok(Some(Meeting { channel, welcome })),
            Some(Answer::Refused { text }) => Err(io::Error::other(text)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        },
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the agent did not answer within {} s", MEETING_TIME.as_secs()),
        )),
    }
}

/// A hello waits for its answer while another takeover goes on.
const MEETING_TIME: Duration = Duration::from_secs(20);

/// The kernel says whose process is at the other end: its process id, when it is one of this user's.
fn own_process(stream: &UnixStream) -> io::Result<i32> {
    let peer = Peer::of(stream)?;
    let own = paths::uid();
    if peer.uid != own {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "uid {} is at the other end of the takeover socket, wanted {own}",
                peer.uid
            ),
        ));
    }
    Ok(peer.pid.unwrap_or_default())
}

/// Takes the links of a predecessor.
type Came = Box<dyn Fn(&[ShownLink]) + Send + Sync>;

/// What those who come to the takeover socket are told.
pub(super) struct Reception {
    pub(super) welcome: Box<dyn Fn() -> io::Result<Given> + Send + Sync>,
    pub(super) predecessors: Predecessors,
    pub(super) links: LinkTable,
    /// Looks at what a predecessor that has come holds.
    pub(super) came: Came,
    pub(super) successors: mpsc::Sender<Successor>,
}

/// Serves the takeover socket until dropped; those who were served go on until they end or are dismissed.
pub(super) async fn serve(listener: Arc<UnixListener>, reception: Arc<Reception>) {
    let log = LogLimit::new("refused takeovers");
    let places = Arc::new(Semaphore::new(MEETINGS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "a takeover connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            if log.admit() {
                warn!("{MEETINGS_MAX} takeover connections are open, one more was closed (MEETINGS_MAX)");
            }
            continue;
        };
        match own_process(&stream) {
            Ok(pid) => {
                let reception = reception.clone();
                tokio::spawn(async move {
                    if let Err(error) = receive_one(stream, pid, &reception).await {
                        warn!(pid, %error, "a takeover connection was closed");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                if log.admit() {
                    warn!(%error, "a takeover was refused");
                }
            }
        }
    }
}

async fn receive_one(stream: UnixStream, pid: i32, reception: &Arc<Reception>) -> io::Result<()> {
    let mut channel = Channel::new(stream);
    let Some(hello) = channel.receive::<Hello>().await? else {
        return Ok(());
    };
    let refuse = async |mut channel: Channel, text: String| {
        channel.send(&Answer::Refused { text: text.clone() }, &[]).await?;
        Err(io::Error::other(text))
    };
    let version = match message::common_version(hello.versions, &hello.program) {
        Ok(version) => version,
        Err(text) => return refuse(channel, text).await,
    };
    let Given { mut welcome, lock } = (reception.welcome)()?;
    welcome.version = version;
    match hello.role {
        Role::Predecessor => {
            welcome.entry_lock = false;
            channel.send(&Answer::Welcome(Box::new(welcome)), &[]).await?;
            reception
                .predecessors
                .serve(channel.stream, pid, hello.program, reception)
                .await;
            Ok(())
        }
        Role::Successor => {
            let Ok(place) = reception.successors.clone().try_reserve_owned() else {
                return refuse(channel, "another takeover is under way".to_owned()).await;
            };
            give::welcome(&mut channel, welcome, lock).await?;
            // Nothing is held up before it says so.
            if give::begun(&mut channel).await? {
                place.send(Successor {
                    channel,
                    pid,
                    program: hello.program,
                });
            }
            Ok(())
        }
    }
}

/// Where the agent in `dir` is taken over.
pub(super) fn socket(dir: &Path) -> PathBuf {
    dir.join(paths::TAKEOVER_SOCKET)
}

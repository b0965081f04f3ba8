//! A client of an agent's control socket: what a C-node and the command line speak through.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicI64, atomic::Ordering},
    time::Duration,
};

use meshx_etf::Term;
use tokio::{
    io::AsyncWriteExt,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, mpsc, oneshot},
    task::AbortHandle,
    time::timeout,
};
use tracing::{debug, warn};

use super::{
    control::{
        UNANSWERED_MAX,
        frame::{REPLY_MAX, read_frame},
        message::{Message, Request, VERSIONS, map, text},
    },
    paths::{self, CONTROL_SOCKET, DirError},
};

/// How long the agent may take to answer one request.
pub const REQUEST_TIME: Duration = Duration::from_secs(30);
/// How long it may take to accept a connection and answer the first one.
pub const CONNECT_TIME: Duration = Duration::from_secs(5);
/// Events that may wait for the program; further ones are dropped with a warning.
pub const EVENTS_MAX: usize = 256;

/// What went wrong between a program and its agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The directory is not to be trusted, or is not there.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// Nobody listens on the control socket.
    #[error("no agent answers in {dir} ({source}); start one with: meshx agent --mesh embedded --dir {dir}", dir = dir.display())]
    NoAgent {
        /// The agent's directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An agent is there, and this user may not open its control socket.
    #[error("uid {uid} may not open the agent's socket in {dir} ({source}); run this as the agent's user, or start the agent with --socket-mode 0660 --socket-group GROUP", uid = paths::uid(), dir = dir.display())]
    NotAllowed {
        /// The agent's directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The agent said no.
    #[error("{cause}: {text}")]
    Refused {
        /// One of the causes in the protocol.
        cause: String,
        /// For people.
        text: String,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer {command} within {} s", seconds.as_secs())]
    Timeout {
        /// What was asked.
        command: String,
        /// How long was waited.
        seconds: Duration,
    },
    /// The connection is over; what was registered through it is gone.
    #[error("the connection to the agent is closed: {0}")]
    Closed(String),
    /// The agent answered something that this program does not understand.
    #[error("the agent's answer is not understood: {0}")]
    Protocol(String),
    /// The request cannot be sent.
    #[error("the request cannot be sent: {0}")]
    Request(String),
}

impl ClientError {
    /// The cause, when the agent said no.
    pub fn cause(&self) -> Option<&str> {
        match self {
            Self::Refused { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of the control protocol that is spoken.
    pub version: i64,
    /// Program and version.
    pub agent: String,
    /// Host parts of node names that it owns.
    pub hosts: Vec<String>,
    /// The mesh's kind.
    pub mesh: String,
    /// Every SPIFFE name of this mesh lies in it.
    pub trust_domain: String,
    /// Where a node makes the socket that it listens on.
    pub vm_dir: PathBuf,
    /// Where a node dials others.
    pub dist_socket: PathBuf,
}

/// What the agent says unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `cut` or `protocol_error`.
    pub name: String,
    /// A map.
    pub args: Term,
}

/// A connection to an agent. Dropping it gives up what was registered through it.
///
/// ```no_run
/// # async fn example() -> Result<(), meshx::agent::client::ClientError> {
/// use meshx::agent::{client::ControlClient, control::message::{map, text}};
///
/// let client = ControlClient::connect(None).await?;
/// println!("{} owns {:?}", client.hello().agent, client.hello().hosts);
/// let decision = client.request("check", map([("from", text("shop")), ("to", text("cart"))])).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct ControlClient {
    dir: PathBuf,
    hello: Hello,
    link: Link,
}

impl ControlClient {
    /// Finds the agent ([`paths::agent_dir`]), checks that its directory can be trusted, and says hello.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub async fn connect(dir: Option<&Path>) -> Result<Self, ClientError> {
        Self::connect_as(dir, concat!("meshx/", env!("CARGO_PKG_VERSION"))).await
    }

    /// As [`ControlClient::connect`], with the name that the agent's log calls this program by.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub async fn connect_as(dir: Option<&Path>, program: &str) -> Result<Self, ClientError> {
        let dir = paths::agent_dir(dir);
        let dir = match paths::checked_client_dir(&dir) {
            Err(DirError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ClientError::NoAgent { dir, source });
            }
            checked => checked?,
        };
        let connecting = timeout(CONNECT_TIME, UnixStream::connect(dir.join(CONTROL_SOCKET)));
        let stream = connecting
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
            .flatten()
            .map_err(|source| {
                let dir = dir.clone();
                match source.kind() {
                    io::ErrorKind::PermissionDenied => ClientError::NotAllowed { dir, source },
                    _ => ClientError::NoAgent { dir, source },
                }
            })?;
        let link = Link::start(stream);
        let args = map([
            (
                "versions",
                Term::tuple([Term::Int(VERSIONS.0), Term::Int(VERSIONS.1)]),
            ),
            ("features", Term::list([text("heartbeat")])),
            ("client", text(program)),
            ("os_pid", Term::from(std::process::id())),
        ]);
        let answer = link.request("hello", args, CONNECT_TIME).await?;
        let hello = Hello::read(&answer)
            .ok_or_else(|| ClientError::Protocol("hello lacks what every agent must tell".to_owned()))?;
        Ok(Self { dir, hello, link })
    }

    /// The agent's directory, absolute.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Asks one thing and waits for the answer, a map. Many may ask at the same time.
    ///
    /// # Errors
    /// Any [`ClientError`]; [`ClientError::Refused`] when the agent said no.
    pub async fn request(&self, command: &str, args: Term) -> Result<Term, ClientError> {
        self.link.request(command, args, REQUEST_TIME).await
    }

    /// The events from now on, until the connection ends (the receiver then gives none). A second call
    /// takes them from the receiver of the first.
    pub fn events(&self) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(EVENTS_MAX);
        let mut shared = self.link.shared.lock();
        if shared.closed.is_none() {
            shared.events = Some(sender);
        }
        receiver
    }
}

impl Hello {
    fn read(answer: &Term) -> Option<Self> {
        let text = |key| answer.map_get(key).and_then(Term::as_str).map(str::to_owned);
        let hosts = answer.map_get("hosts")?.as_list()?;
        Some(Self {
            version: answer.map_get("version")?.as_int()?,
            agent: text("agent")?,
            hosts: hosts
                .iter()
                .map(|host| host.as_str().map(str::to_owned))
                .collect::<Option<_>>()?,
            mesh: text("mesh")?,
            trust_domain: text("trust_domain")?,
            vm_dir: text("vm_dir")?.into(),
            dist_socket: text("dist_socket")?.into(),
        })
    }
}

/// The connection itself: a task that reads and one that writes.
#[derive(Debug)]
struct Link {
    shared: Shared,
    outgoing: mpsc::Sender<Vec<u8>>,
    next_id: AtomicI64,
    slots: Semaphore,
    tasks: [AbortHandle; 2],
}

#[derive(Debug, Clone, Default)]
struct Shared(Arc<Mutex<State>>);

// Held for a look-up or a change, never across an await.
#[derive(Debug, Default)]
struct State {
    waiting: HashMap<i64, oneshot::Sender<Result<Term, ClientError>>>,
    events: Option<mpsc::Sender<Event>>,
    /// Why there will be no more answers.
    closed: Option<String>,
}

impl Link {
    fn start(stream: UnixStream) -> Self {
        let shared = Shared::default();
        let (reader, writer) = stream.into_split();
        let (outgoing, queue) = mpsc::channel(UNANSWERED_MAX);
        let tasks = [
            tokio::spawn(read(reader, shared.clone(), outgoing.clone())).abort_handle(),
            tokio::spawn(write(writer, queue, shared.clone())).abort_handle(),
        ];
        Self {
            shared,
            outgoing,
            next_id: AtomicI64::new(1),
            slots: Semaphore::new(UNANSWERED_MAX),
            tasks,
        }
    }

    async fn request(&self, command: &str, args: Term, limit: Duration) -> Result<Term, ClientError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let request = Request {
            id,
            command: command.to_owned(),
            args,
        };
        let frame = request.encode().map_err(ClientError::Request)?;
        let answer = timeout(limit, async {
            // The agent refuses more than this many at once, so further ones wait here.
            let _slot = self.slots.acquire().await.map_err(|_| self.shared.closed())?;
            let answer = self.shared.expect(id)?;
            self.outgoing
                .send(frame)
                .await
                .map_err(|_| self.shared.closed())?;
            answer.await.map_err(|_| self.shared.closed())?
        });
        answer.await.unwrap_or_else(|_| {
            self.shared.lock().waiting.remove(&id);
            Err(ClientError::Timeout {
                command: command.to_owned(),
                seconds: limit,
            })
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under the lock, so what it holds is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, id: i64) -> Result<oneshot::Receiver<Result<Term, ClientError>>, ClientError> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        match &state.closed {
            Some(reason) => Err(ClientError::Closed(reason.clone())),
            None => {
                state.waiting.insert(id, sender);
                Ok(receiver)
            }
        }
    }

    fn closed(&self) -> ClientError {
        ClientError::Closed(
            self.lock()
                .closed
                .clone()
                .unwrap_or_else(|| "it was dropped".to_owned()),
        )
    }

    /// Ends everything that waits; the first reason stays.
    fn close(&self, reason: String) {
        let mut state = self.lock();
        state.closed.get_or_insert(reason);
        state.waiting.clear();
        state.events = None;
    }

    fn deliver(&self, message: Message) {
        let mut state = self.lock();
        match message {
            Message::Reply { id, result } => match state.waiting.remove(&id) {
                Some(waiting) => {
                    let result = result.map_err(|(cause, text)| ClientError::Refused { cause, text });
                    // Whoever asked may have given up.
                    let _ = waiting.send(result);
                }
                None => debug!(id, "an answer that nobody waits for"),
            },
            Message::Event { name, args } => {
                if name == "protocol_error" {
                    let text = args.map_get("text").and_then(Term::as_str).unwrap_or("no text");
                    state.closed.get_or_insert_with(|| text.to_owned());
                }
                if let Some(sender) = &state.events
                    && sender.try_send(Event { name, args }).is_err()
                {
                    warn!(
                        limit = EVENTS_MAX,
                        "an event of the agent was dropped: the program does not read them"
                    );
                }
            }
        }
    }
}

async fn read(mut reader: OwnedReadHalf, shared: Shared, outgoing: mpsc::Sender<Vec<u8>>) {
    let reason = loop {
        match read_frame(&mut reader, REPLY_MAX).await {
            Ok(Some(frame)) => match Message::decode(&frame) {
                Ok(Message::Event { name, .. }) if name == "ping" => answer_ping(&outgoing),
                Ok(message) => shared.deliver(message),
                Err(error) => break error,
            },
            Ok(None) => break "the agent closed it".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    shared.close(reason);
}

/// When there is no room, the agent hears something else.
fn answer_ping(outgoing: &mpsc::Sender<Vec<u8>>) {
    let pong = Request {
        id: 0,
        command: "pong".to_owned(),
        args: map([]),
    };
    if let Ok(frame) = pong.encode() {
        let _ = outgoing.try_send(frame);
    }
}

async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, shared: Shared) {
    while let Some(frame) = queue.recv().await {
        if let Err(error) = writer.write_all(&frame).await {
            // The reader may still have the agent's reason; without one, this is it.
            debug!(%error, "the agent takes no more requests");
            if error.kind() != io::ErrorKind::BrokenPipe {
                shared.close(error.to_string());
            }
            return;
        }
    }
}

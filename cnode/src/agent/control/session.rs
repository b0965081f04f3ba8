//! One control connection, from hello to the release of what was registered through it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use meshx_etf::Term;
use tokio::{
    net::{UnixStream, unix::OwnedReadHalf},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tracing::{debug, info, warn};

use super::{
    UNANSWERED_MAX,
    args::{Args, TEXT_MAX},
    commands::{Client, Context, PROGRAM, is_question},
    frame::{Next, REQUEST_MAX, read_frame_unless},
    heartbeat::{self, HUNG_AFTER, HUNG_AFTER_MAX, HUNG_AFTER_MIN},
    message::{Request, VERSIONS, event, map, reply, text},
    options::milliseconds,
    outbox::Outbox,
    slots::Slot,
    watches::{self, watch},
};
use crate::{
    agent::{
        sidecar::{SidecarEvent, SidecarEventKind, Stream},
        takeover::Order,
    },
    proxy::{
        cause::{Cause, Refusal},
        links::CutEvent,
    },
};

/// `hello` must be there, whole, within this time.
pub const HELLO_TIME: Duration = Duration::from_secs(5);
/// Features that one client may have.
const FEATURES_MAX: usize = 64;
/// How long a question to the mesh may go on when its client is to come between two frames.
const QUESTION_GRACE: Duration = Duration::from_secs(1);
/// How long the last words to a client may take.
const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// A client whose every frame is read and answered: this process may serve it, or another one.
pub(in crate::agent) struct Parked {
    /// Its connection.
    pub(in crate::agent) stream: UnixStream,
    pub(in crate::agent) client: Arc<Client>,
    /// Whether its hello was answered.
    pub(in crate::agent) greeted: bool,
    /// What it is told unasked.
    events: Events,
    pub(super) slot: Slot,
}

/// Events for one client.
struct Events {
    cuts: mpsc::Receiver<CutEvent>,
    sidecars: mpsc::Receiver<SidecarEvent>,
}

impl Parked {
    /// A successor of this process has its connection; what is left is for the links that live.
    pub(in crate::agent) fn leave(self) -> (Arc<Client>, (u64, mpsc::Receiver<CutEvent>)) {
        let owner = self.client.owner.id;
        (self.client, (owner, self.events.cuts))
    }

    /// A client that comes now, or one of a predecessor of this process.
    pub(super) fn new(
        stream: UnixStream,
        client: Client,
        greeted: bool,
        slot: Slot,
        context: &Context,
    ) -> Self {
        let owner = client.owner.id;
        let events = Events {
            cuts: context.links.subscribe(owner),
            sidecars: context.registry.enter(owner),
        };
        Self {
            stream,
            client: Arc::new(client),
            greeted,
            events,
            slot,
        }
    }
}

/// Serves one client until it closes, breaks the protocol, does not read, or `stop` fires. Once `freeze` has fired it
/// comes back as soon as it is between two frames.
pub(super) async fn run(
    parked: Parked,
    context: Arc<Context>,
    stop: CancellationToken,
    freeze: CancellationToken,
) -> Option<Parked> {
    let Parked {
        stream,
        client,
        mut greeted,
        events,
        slot,
    } = parked;
    let owner = client.owner;
    let (mut reader, writer) = stream.into_split();
    let (outbox, queue) = Outbox::new(stop.clone());
    let mut writing = tokio::spawn(queue.write_to(writer));
    let session = Session {
        client,
        context,
        outbox,
        unanswered: Arc::default(),
        commands: TaskTracker::new(),
    };
    watches::resume(&session.context, &session.client, &session.outbox);
    let quiet = CancellationToken::new();
    let mut forwarding = tokio::spawn(session.forward_events(events, quiet.clone()));
    let frozen = tokio::select! {
        frozen = session.converse(&mut reader, &mut greeted, &freeze) => frozen,
        () = stop.cancelled() => false,
    };
    let Session {
        client,
        context,
        outbox,
        commands,
        ..
    } = session;
    if frozen {
        let settle = async {
            commands.close();
            commands.wait().await;
            client.watches.pause();
            quiet.cancel();
            let events = (&mut forwarding).await.ok();
            // With the last outbox gone the writer ends once it has written what waits.
            drop(outbox);
            let writer = (&mut writing).await.ok().flatten();
            events.zip(writer)
        };
        let settled = tokio::select! {
            settled = settle => settled,
            () = stop.cancelled() => None,
        };
        if let Some((events, writer)) = settled
            && let Ok(stream) = reader.reunite(writer)
        {
            return Some(Parked {
                stream,
                client,
                greeted,
                events,
                slot,
            });
        }
        end(&client, &context, &commands).await;
        return None;
    }
    forwarding.abort();
    end(&client, &context, &commands).await;
    drop(outbox);
    if timeout(FAREWELL_TIME, writing).await.is_err() {
        debug!(client = owner.id, "did not read the last words");
    }
    None
}

/// Gives up what was registered. What is still being registered finds its owner gone.
async fn end(client: &Client, context: &Context, commands: &TaskTracker) {
    let owner = client.owner;
    let upstreams = client.upstreams.close_all();
    let order = Order::ClientGone { owner: owner.id };
    context.registry.predecessors().order(&order);
    client.watches.close_all();
    client.asking.close();
    let released = context.registry.release(owner.id).await;
    commands.close();
    commands.wait().await;
    debug!(client = owner.id, released, upstreams, "client gone");
    if released > 0 {
        context.sweep_later();
    }
}

struct Session {
    client: Arc<Client>,
    context: Arc<Context>,
    outbox: Outbox,
    unanswered: Arc<AtomicUsize>,
    commands: TaskTracker,
}

impl Session {
    /// True when it was frozen.
    async fn converse(
        &self,
        reader: &mut OwnedReadHalf,
        greeted: &mut bool,
        freeze: &CancellationToken,
    ) -> bool {
        if !*greeted {
            let hello = read_frame_unless(reader, REQUEST_MAX, freeze.cancelled());
            let answered = match timeout(HELLO_TIME, hello).await {
                Ok(Ok(Next::Frame(frame))) => self.greet(&frame),
                Ok(Ok(Next::Closed)) => return false,
                Ok(Ok(Next::Stopped)) => return true,
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no hello within {} s", HELLO_TIME.as_secs())),
            };
            match answered {
                Ok(true) => *greeted = true,
                Ok(false) => return false,
                Err(fault) => {
                    self.drop_client(fault);
                    return false;
                }
            }
        }
        let quiet = CancellationToken::new();
        let asking = heartbeat::follow(
            self.context.clone(),
            self.client.clone(),
            self.outbox.clone(),
            quiet.clone(),
        );
        let asking = AbortOnDropHandle::new(tokio::spawn(asking));
        let served = self.serve(reader, freeze).await;
        if served == Ok(true) {
            // A successor of this process asks next: what the mesh is being told is told before.
            quiet.cancel();
            let _ = asking.await;
        }
        match served {
            Ok(frozen) => frozen,
            Err(fault) => {
                self.drop_client(fault);
                false
            }
        }
    }

    /// It does not speak the protocol.
    fn drop_client(&self, fault: String) {
        if self.context.log.admit() {
            warn!(
                client = self.client.owner.id,
                uid = self.client.owner.peer.uid,
                pid = self.client.owner.peer.pid,
                cause = "protocol_error",
                text = fault,
                "client dropped"
            );
        }
        self.send(event("protocol_error", map([("text", text(fault))])));
    }

    /// False when the client was answered no; an error when it did not speak the protocol.
    fn greet(&self, frame: &[u8]) -> Result<bool, String> {
        let request = Request::decode(frame)?;
        if request.command != "hello" {
            let command: String = request.command.chars().take(64).collect();
            return Err(format!("the first command is {command}, wanted hello"));
        }
        match self.hello(&request.args) {
            Ok(result) => {
                self.send(reply(request.id, Ok(result)));
                Ok(true)
            }
            Err(refusal) => {
                self.log_refusal("hello", &refusal);
                self.send(reply(request.id, Err(&refusal)));
                Ok(false)
            }
        }
    }

    fn hello(&self, args: &Term) -> Result<Term, Refusal> {
        let owner = self.client.owner;
        let versions = args
            .map_get("versions")
            .and_then(Term::as_tuple)
            .map(|pair| match pair {
                [min, max] => min.as_int().zip(max.as_int()),
                _ => None,
            });
        let Some(Some((min, max))) = versions else {
            return Err(Cause::InvalidRequest.because("hello needs versions => {Min, Max}"));
        };
        let version = max.min(VERSIONS.1);
        if version < min.max(VERSIONS.0) {
            return Err(Cause::VersionMismatch.because(format!(
                "the client speaks versions {min} to {max} of the control protocol, {PROGRAM} speaks {} to {}",
                VERSIONS.0, VERSIONS.1
            )));
        }
        let offered = Args(args).optional_texts("features", FEATURES_MAX)?;
        let after = milliseconds(&Args(args), "heartbeat", HUNG_AFTER_MIN, HUNG_AFTER_MAX)?;
        let name = args.map_get("client").and_then(Term::as_str).unwrap_or("no name");
        let name: String = name.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect();
        info!(
            client = owner.id,
            uid = owner.peer.uid,
            gid = owner.peer.gid,
            pid = owner.peer.pid,
            program = name,
            "client connected"
        );
        let mut features = Vec::new();
        if offered.iter().any(|feature| feature == heartbeat::FEATURE) {
            self.client.heart.begin(after.unwrap_or(HUNG_AFTER));
            features.push(heartbeat::FEATURE);
        }
        Ok(self.context.describe(version, &features))
    }

    /// Until the client closes, or it is frozen (true); an error when it breaks the protocol.
    async fn serve(&self, reader: &mut OwnedReadHalf, freeze: &CancellationToken) -> Result<bool, String> {
        loop {
            let next = read_frame_unless(reader, REQUEST_MAX, freeze.cancelled()).await;
            let frame = match next.map_err(|error| error.to_string())? {
                Next::Frame(frame) => frame,
                Next::Closed => return Ok(false),
                Next::Stopped => return Ok(true),
            };
            let request = Request::decode(&frame)?;
            self.client.heart.beat();
            if request.command == "pong" {
                continue;
            }
            if self.unanswered.fetch_add(1, Ordering::Relaxed) >= UNANSWERED_MAX {
                self.unanswered.fetch_sub(1, Ordering::Relaxed);
                let refusal = Cause::Limit.because(format!(
                    "{UNANSWERED_MAX} requests are unanswered, more are not taken (UNANSWERED_MAX)"
                ));
                self.log_refusal(&request.command, &refusal);
                self.send(reply(request.id, Err(&refusal)));
                continue;
            }
            self.start(request, freeze.clone());
        }
    }

    /// Commands run beside each other: one that waits for the mesh holds up no other.
    fn start(&self, request: Request, freeze: CancellationToken) {
        let (context, client) = (self.context.clone(), self.client.clone());
        let (outbox, unanswered) = (self.outbox.clone(), self.unanswered.clone());
        self.commands.spawn(async move {
            let running = async {
                match request.command.as_str() {
                    "watch" => watch(&context, &client, &outbox, &Args(&request.args)),
                    _ => context.run(&client, &request.command, &request.args).await,
                }
            };
            // What changes nothing need not be waited for: it is asked again.
            let hurry = async {
                freeze.cancelled().await;
                sleep(QUESTION_GRACE).await;
            };
            let result = tokio::select! {
                result = running => result,
                () = hurry, if is_question(&request.command) => {
                    Err(Cause::NotReady.because("another process takes this agent over: ask it again"))
                }
            };
            if let Err(refusal) = &result {
                log_refusal(&context, &client, &request.command, refusal);
            }
            unanswered.fetch_sub(1, Ordering::Relaxed);
            send(&outbox, answer(request.id, result));
        });
    }

    /// Until `quiet` fires: what has not been told then is told later, by whoever has the events.
    fn forward_events(
        &self,
        mut events: Events,
        quiet: CancellationToken,
    ) -> impl Future<Output = Events> + Send + 'static {
        let outbox = self.outbox.clone();
        async move {
            loop {
                let frame = tokio::select! {
                    biased;
                    () = quiet.cancelled() => return events,
                    Some(cut) = events.cuts.recv() => cut_event(cut),
                    Some(sidecar) = events.sidecars.recv() => {
                        // A proxy that talks much must not cost its client the connection.
                        if outbox.is_crowded() && matches!(sidecar.kind, SidecarEventKind::Output { .. }) {
                            continue;
                        }
                        sidecar_event(sidecar)
                    }
                    else => return events,
                };
                send(&outbox, frame);
            }
        }
    }

    fn send(&self, frame: Result<Vec<u8>, String>) {
        send(&self.outbox, frame);
    }

    fn log_refusal(&self, command: &str, refusal: &Refusal) {
        log_refusal(&self.context, &self.client, command, refusal);
    }
}

fn cut_event(cut: CutEvent) -> Result<Vec<u8>, String> {
    let args = map([
        ("link", Term::binary(cut.link.0)),
        ("cause", Term::atom(cut.cause.as_str())),
        ("text", text(cut.text)),
    ]);
    event("cut", args)
}

fn sidecar_event(SidecarEvent { id, kind }: SidecarEvent) -> Result<Vec<u8>, String> {
    match kind {
        SidecarEventKind::Output { stream, line } => {
            let stream = match stream {
                Stream::Stdout => "stdout",
                Stream::Stderr => "stderr",
            };
            let args = map([
                ("id", text(id)),
                ("stream", Term::atom(stream)),
                ("line", Term::binary(line)),
            ]);
            event("proxy_output", args)
        }
        SidecarEventKind::Down { text: why, final_ } => {
            let args = map([
                ("id", text(id)),
                ("text", text(why)),
                ("final", Term::from(final_)),
            ]);
            event("proxy_down", args)
        }
    }
}

fn answer(id: i64, result: Result<Term, Refusal>) -> Result<Vec<u8>, String> {
    match result {
        Ok(result) => reply(id, Ok(result)).or_else(|fault| reply(id, Err(&Cause::Limit.because(fault)))),
        Err(refusal) => reply(id, Err(&refusal)),
    }
}

fn send(outbox: &Outbox, frame: Result<Vec<u8>, String>) {
    match frame {
        Ok(frame) => outbox.send(frame),
        Err(fault) => warn!(fault, "an answer could not be written"),
    }
}

fn log_refusal(context: &Context, client: &Client, command: &str, refusal: &Refusal) {
    if !client.refused.differs((command, refusal.cause, &refusal.text)) || !context.log.admit() {
        return;
    }
    let owner = client.owner;
    let command: String = command.chars().take(64).collect();
    warn!(
        client = owner.id, uid = owner.peer.uid, pid = owner.peer.pid, command,
        cause = %refusal.cause, text = refusal.text, "refused"
    );
}

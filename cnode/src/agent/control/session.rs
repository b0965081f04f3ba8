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
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use super::{
    UNANSWERED_MAX,
    args::{Args, TEXT_MAX},
    commands::{Client, Context, PROGRAM},
    frame::{REQUEST_MAX, read_frame},
    message::{Request, VERSIONS, event, map, reply, text},
    outbox::Outbox,
    watches::watch,
};
use crate::{
    agent::{
        registry::Owner,
        sidecar::{SidecarEvent, SidecarEventKind, Stream},
    },
    proxy::{
        cause::{Cause, Refusal},
        links::CutEvent,
    },
};

/// `hello` must be there, whole, within this time.
pub const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long the last words to a client may take.
const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// Serves one client until it closes, breaks the protocol, does not read, or `stop` fires.
pub(super) async fn run(stream: UnixStream, owner: Owner, context: Arc<Context>, stop: CancellationToken) {
    let (reader, writer) = stream.into_split();
    let (outbox, queue) = Outbox::new(stop.clone());
    let writing = tokio::spawn(queue.write_to(writer));
    let session = Session {
        client: Arc::new(Client::new(owner)),
        context,
        outbox,
        unanswered: Arc::default(),
        commands: TaskTracker::new(),
    };
    let sidecars = session.context.registry.enter(owner.id);
    let events = tokio::spawn(session.forward_events(sidecars));
    tokio::select! {
        () = session.converse(reader) => {}
        () = stop.cancelled() => {}
    }
    events.abort();
    session.end().await;
    // With the last outbox gone the writer ends once it has written what waits.
    if timeout(FAREWELL_TIME, writing).await.is_err() {
        debug!(client = owner.id, "did not read the last words");
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
    async fn converse(&self, mut reader: OwnedReadHalf) {
        let hello = timeout(HELLO_TIME, read_frame(&mut reader, REQUEST_MAX)).await;
        let greeted = match hello {
            Ok(Ok(Some(frame))) => self.greet(&frame),
            Ok(Ok(None)) => return,
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no hello within {} s", HELLO_TIME.as_secs())),
        };
        let fault = match greeted {
            Ok(true) => self.serve(&mut reader).await,
            Ok(false) => return,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = fault {
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
        Ok(self.context.describe(version))
    }

    /// Until the client closes; an error when it breaks the protocol.
    async fn serve(&self, reader: &mut OwnedReadHalf) -> Result<(), String> {
        loop {
            let frame = read_frame(reader, REQUEST_MAX)
                .await
                .map_err(|error| error.to_string())?;
            let Some(frame) = frame else { return Ok(()) };
            let request = Request::decode(&frame)?;
            if self.unanswered.fetch_add(1, Ordering::Relaxed) >= UNANSWERED_MAX {
                self.unanswered.fetch_sub(1, Ordering::Relaxed);
                let refusal = Cause::Limit.because(format!(
                    "{UNANSWERED_MAX} requests are unanswered, more are not taken (UNANSWERED_MAX)"
                ));
                self.log_refusal(&request.command, &refusal);
                self.send(reply(request.id, Err(&refusal)));
                continue;
            }
            self.start(request);
        }
    }

    /// Commands run beside each other: one that waits for the mesh holds up no other.
    fn start(&self, request: Request) {
        let (context, client) = (self.context.clone(), self.client.clone());
        let (outbox, unanswered) = (self.outbox.clone(), self.unanswered.clone());
        self.commands.spawn(async move {
            let result = match request.command.as_str() {
                "watch" => watch(&context, &client, &outbox, &Args(&request.args)),
                _ => context.run(&client, &request.command, &request.args).await,
            };
            if let Err(refusal) = &result {
                log_refusal(&context, client.owner, &request.command, refusal);
            }
            unanswered.fetch_sub(1, Ordering::Relaxed);
            send(&outbox, answer(request.id, result));
        });
    }

    fn forward_events(
        &self,
        mut sidecars: mpsc::Receiver<SidecarEvent>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let mut cuts = self.context.links.subscribe(self.client.owner.id);
        let outbox = self.outbox.clone();
        async move {
            loop {
                let frame = tokio::select! {
                    biased;
                    Some(cut) = cuts.recv() => cut_event(cut),
                    Some(sidecar) = sidecars.recv() => {
                        // A proxy that talks much must not cost its client the connection.
                        if outbox.is_crowded() && matches!(sidecar.kind, SidecarEventKind::Output { .. }) {
                            continue;
                        }
                        sidecar_event(sidecar)
                    }
                    else => return,
                };
                send(&outbox, frame);
            }
        }
    }

    /// Gives up what was registered. What is still being registered finds its owner gone.
    async fn end(self) {
        let owner = self.client.owner;
        let upstreams = self.client.upstreams.close_all();
        self.client.watches.close_all();
        self.client.asking.close();
        let released = self.context.registry.release(owner.id).await;
        self.commands.close();
        self.commands.wait().await;
        debug!(client = owner.id, released, upstreams, "client gone");
        if released > 0 {
            self.context.sweep_later();
        }
    }

    fn send(&self, frame: Result<Vec<u8>, String>) {
        send(&self.outbox, frame);
    }

    fn log_refusal(&self, command: &str, refusal: &Refusal) {
        log_refusal(&self.context, self.client.owner, command, refusal);
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

fn log_refusal(context: &Context, owner: Owner, command: &str, refusal: &Refusal) {
    if !context.log.admit() {
        return;
    }
    let command: String = command.chars().take(64).collect();
    warn!(
        client = owner.id, uid = owner.peer.uid, pid = owner.peer.pid, command,
        cause = %refusal.cause, text = refusal.text, "refused"
    );
}

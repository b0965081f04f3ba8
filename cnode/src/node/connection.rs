//! One connection: a reader and a writer, each in a task of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use meshx_dist::flags::DistFlags;
use meshx_dist::framing::{Frame, FrameDecoder, TICK};
use meshx_etf::Atom;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::dispatch::{self, Peer};
use super::event::{Direction, DownReason, NodeEvent, PeerInfo};
use super::handshake::{Ready, Transport};
use super::inner::Inner;
use super::outbound::Outbound;
use super::watch::Watch;
use super::wire::Assembler;
use crate::proxy::links::LinkId;

/// Room for one read.
const READ: usize = 64 * 1024;

/// A connection that stands, or stood.
pub(crate) struct Connection {
    pub(crate) node: Atom,
    /// What both ends can do.
    pub(crate) flags: DistFlags,
    pub(crate) link: Option<LinkId>,
    pub(crate) outbound: Outbound,
    /// Largest message that is sent, in bytes.
    pub(crate) max_message: usize,
    /// Numbers messages, so that their fragments can be told apart.
    sequence: AtomicU64,
    watch: Mutex<Watch>,
    /// Held while what came is handled.
    turn: Mutex<()>,
    hidden: bool,
    direction: Direction,
    identity: Option<String>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    ticks_in: AtomicU64,
    ticks_out: AtomicU64,
    stop: CancellationToken,
    /// Whether all that was queued is written, and nothing more will be.
    left: AtomicBool,
    reason: OnceLock<DownReason>,
    /// Whether its end has been told.
    told: AtomicBool,
}

impl Connection {
    pub(crate) fn new(inner: &Inner, ready: &Ready, direction: Direction) -> Self {
        let limits = &inner.limits;
        Self {
            node: Atom::from(ready.established.peer_name.as_str()),
            flags: ready.established.flags,
            link: ready.transport.link,
            outbound: Outbound::new(
                limits.send_queue_bytes,
                limits.reply_queue_bytes,
                limits.answer_queue_bytes,
                limits.notice_queue_bytes,
            ),
            max_message: limits.message_bytes,
            sequence: AtomicU64::new(1),
            watch: Mutex::new(Watch::new(limits.watches_per_connection)),
            turn: Mutex::default(),
            hidden: !ready.established.peer_flags.contains(DistFlags::PUBLISHED),
            direction,
            identity: ready.transport.identity.clone(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            ticks_in: AtomicU64::new(0),
            ticks_out: AtomicU64::new(0),
            stop: CancellationToken::new(),
            left: AtomicBool::new(false),
            reason: OnceLock::new(),
            told: AtomicBool::new(false),
        }
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Ends it at once. The first reason counts.
    pub(crate) fn close(&self, reason: DownReason) {
        let _ = self.reason.set(reason);
        self.outbound.close();
        self.stop.cancel();
    }

    /// This end has nothing more to say. What still comes is thrown away: whoever would answer it no longer can.
    fn leave(&self) {
        let _ = self.reason.set(DownReason::Disconnected);
        self.left.store(true, Ordering::Release);
    }

    fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Waits until it has ended.
    pub(crate) async fn over(&self) {
        self.stop.cancelled().await;
    }

    /// Why it ended.
    pub(crate) fn reason(&self) -> DownReason {
        self.reason.get().cloned().unwrap_or(DownReason::Closed)
    }

    /// True once.
    pub(crate) fn tell_end(&self) -> bool {
        !self.told.swap(true, Ordering::AcqRel)
    }

    /// Held for short, synchronous sections only, and never while a message is delivered or encoded.
    pub(crate) fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until what is being handled of what came has been.
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn info(&self) -> PeerInfo {
        PeerInfo {
            node: self.node.as_str().to_owned(),
            direction: self.direction,
            hidden: self.hidden,
            identity: self.identity.clone(),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            ticks_in: self.ticks_in.load(Ordering::Relaxed),
            ticks_out: self.ticks_out.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn up_event(&self) -> NodeEvent {
        NodeEvent::Up {
            node: self.node.as_str().to_owned(),
            direction: self.direction,
            identity: self.identity.clone(),
        }
    }
}

/// Serves a connection until it ends.
pub(crate) async fn run(
    inner: Arc<Inner>,
    connection: Arc<Connection>,
    transport: Transport,
    decoder: FrameDecoder,
) {
    let Transport { read, write, .. } = transport;
    let writer = inner.spawn({
        let connection = Arc::clone(&connection);
        let (tick, ticktime) = (inner.tick_interval, inner.net_ticktime);
        async move {
            let end = tokio::select! {
                end = write_all(&connection, write, tick, ticktime) => end,
                () = connection.stop.cancelled() => return,
            };
            match end {
                // The reader closes it, once the peer has: a socket that is closed with unread bytes in it takes what
                // is still to be sent along.
                Ok(()) => connection.leave(),
                Err(reason) => connection.close(reason),
            }
        }
    });
    let reason = tokio::select! {
        reason = read_all(&inner, &connection, read, decoder) => reason,
        () = connection.stop.cancelled() => DownReason::Closed,
    };
    connection.close(reason);
    let _ = writer.await;
    inner.ended(&connection);
}

/// Reads until the connection ends. Nothing here waits for anything but the peer.
async fn read_all(
    inner: &Arc<Inner>,
    connection: &Arc<Connection>,
    mut read: Box<dyn AsyncRead + Send + Unpin>,
    mut decoder: FrameDecoder,
) -> DownReason {
    let mut assembler = Assembler::new(connection.flags, &inner.limits);
    loop {
        loop {
            if connection.has_left() {
                discard(read).await;
                return DownReason::Disconnected;
            }
            match decoder.next_shared() {
                Ok(None) => break,
                Ok(Some((Frame::Tick, _))) => {
                    let received = connection.ticks_in.fetch_add(1, Ordering::Relaxed) + 1;
                    inner.tell(NodeEvent::Tick {
                        node: connection.node.as_str().to_owned(),
                        received,
                    });
                }
                Ok(Some((Frame::Data(frame), buffer))) => {
                    let handled = match assembler.take(frame, buffer, &inner.buffers) {
                        Ok(None) => Ok(()),
                        Ok(Some(message)) => {
                            let _turn = connection.turn();
                            if connection.is_over() {
                                return DownReason::Closed;
                            }
                            dispatch::handle(inner, &Peer::Remote(connection), message)
                        }
                        Err(reason) => Err(reason),
                    };
                    if let Err(reason) = handled {
                        return reason;
                    }
                }
                Err(error) => return DownReason::Protocol(error.to_string()),
            }
        }
        if decoder.is_lent_out() {
            // Receivers have their turn: the buffer is filled again while it is in the CPU's cache, and what comes next
            // need not be copied for them.
            tokio::task::yield_now().await;
        }
        let buffer = decoder.read_buf();
        buffer.reserve(READ);
        match timeout(inner.net_ticktime, read.read_buf(buffer)).await {
            Err(_) => return DownReason::Silent(inner.net_ticktime),
            Ok(Ok(0)) => return DownReason::Closed,
            Ok(Ok(count)) => {
                connection.bytes_in.fetch_add(count as u64, Ordering::Relaxed);
            }
            Ok(Err(error)) => return DownReason::Io(error.to_string()),
        }
    }
}

/// Throws away what comes, until the peer has closed or nobody waits for that any more.
async fn discard(mut read: Box<dyn AsyncRead + Send + Unpin>) {
    let mut buffer = vec![0; READ];
    while let Ok(1..) = read.read(&mut buffer).await {}
}

/// Writes what is queued, and a tick whenever there was nothing to write for a while.
async fn write_all(
    connection: &Connection,
    mut write: Box<dyn AsyncWrite + Send + Unpin>,
    tick: Duration,
    ticktime: Duration,
) -> Result<(), DownReason> {
    loop {
        match timeout(tick, connection.outbound.next()).await {
            Ok(Some(batch)) => {
                write_bytes(connection, &mut write, &batch.bytes, ticktime).await?;
                connection.outbound.written(batch);
            }
            Ok(None) => {
                let _ = timeout(ticktime, write.shutdown()).await;
                return Ok(());
            }
            Err(_) => {
                write_bytes(connection, &mut write, &TICK, ticktime).await?;
                connection.ticks_out.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

async fn write_bytes(
    connection: &Connection,
    write: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    ticktime: Duration,
) -> Result<(), DownReason> {
    while !bytes.is_empty() {
        match timeout(ticktime, write.write(bytes)).await {
            Err(_) => return Err(DownReason::Stalled(ticktime)),
            Ok(Ok(0)) => return Err(DownReason::Closed),
            Ok(Ok(count)) => {
                connection.bytes_out.fetch_add(count as u64, Ordering::Relaxed);
                bytes = bytes.get(count..).unwrap_or_default();
            }
            Ok(Err(error)) => return Err(DownReason::Io(error.to_string())),
        }
    }
    Ok(())
}

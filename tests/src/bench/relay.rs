//! The delay of a long way for TCP connections, where the kernel has none to offer (netem). Its rate is the affair of
//! [`crate::Network::limit`].

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Context, Result};

/// A way, each direction for itself.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// From one end to the other; a round trip takes twice that.
    pub delay: Duration,
    /// Bits per second.
    pub rate: u64,
}

impl Way {
    /// Bytes that are under way when it is full, and a router's queue of as much again.
    fn room(&self) -> usize {
        (self.rate as f64 / 8.0 * self.delay.as_secs_f64() * 2.0) as usize
    }
}

/// An address beside `target` that leads there with the delay of a way. TCP ends here at both sides: what is held back is
/// bytes, not packets, so TCP's own windows see none of the delay.
///
/// # Errors
/// When no port can be had.
pub fn relay(way: Way, target: SocketAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((target.ip(), 0)).context("bind a relay")?;
    let address = listener.local_addr().context("read its address")?;
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            // Without a target the connection ends here.
            let _ = TcpStream::connect(target).and_then(|far| both(near, far, way));
        }
    });
    Ok(address)
}

fn both(near: TcpStream, far: TcpStream, way: Way) -> std::io::Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    one(near, far, way);
    one(far_too, near_too, way);
    Ok(())
}

/// One direction: a thread that takes bytes in, and one that gives them out after the delay.
fn one(from: TcpStream, to: TcpStream, way: Way) {
    let under_way = Arc::new(UnderWay::default());
    let incoming = under_way.clone();
    std::thread::spawn(move || {
        take_in(from, &incoming, way);
        incoming.push(Instant::now() + way.delay, Vec::new());
    });
    std::thread::spawn(move || give_out(to, &under_way));
}

fn take_in(mut from: TcpStream, under_way: &UnderWay, way: Way) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let due = Instant::now() + way.delay;
        under_way.wait_for_room(way.room());
        under_way.push(due, buffer[..read].to_vec());
    }
}

fn give_out(mut to: TcpStream, under_way: &UnderWay) {
    loop {
        let (due, bytes) = under_way.pop();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if bytes.is_empty() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        if to.write_all(&bytes).is_err() {
            // Who still sends is to hear of it.
            let _ = to.shutdown(Shutdown::Both);
            under_way.close();
            return;
        }
        under_way.out(bytes.len());
    }
}

/// What is between the ends.
#[derive(Default)]
struct UnderWay {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// When each is due, and its bytes; none are the end.
    chunks: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    closed: bool,
}

impl UnderWay {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_room(&self, room: usize) {
        let mut state = self.lock();
        while state.bytes > room && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn push(&self, due: Instant, bytes: Vec<u8>) {
        let mut state = self.lock();
        state.bytes += bytes.len();
        state.chunks.push_back((due, bytes));
        self.changed.notify_all();
    }

    fn pop(&self) -> (Instant, Vec<u8>) {
        let mut state = self.lock();
        loop {
            if let Some(first) = state.chunks.pop_front() {
                return first;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn out(&self, bytes: usize) {
        self.lock().bytes -= bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_through_no_sooner_than_the_way_lets_them() -> Result<()> {
        let way = Way {
            delay: Duration::from_millis(30),
            rate: 80_000_000,
        };
        let listener = TcpListener::bind("127.0.0.1:0").context("bind")?;
        let address = relay(way, listener.local_addr().context("address")?)?;
        let mut near = TcpStream::connect(address).context("connect")?;
        let (mut far, _) = listener.accept().context("accept")?;
        let sent: Vec<u8> = (0..2_000_000_usize).map(|at| (at % 251) as u8).collect();
        let began = Instant::now();
        let (mut first, mut seen) = ([0], Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = near.write_all(&sent);
                let _ = near.shutdown(Shutdown::Write);
            });
            far.read_exact(&mut first).context("read")?;
            assert!(began.elapsed() >= way.delay);
            far.read_to_end(&mut seen).context("read")
        })?;
        assert!(first[..] == sent[..1] && seen[..] == sent[1..]);
        // The other direction is for itself, and is still there.
        far.write_all(b"back").context("write")?;
        drop(far);
        let mut back = String::new();
        near.read_to_string(&mut back).context("read")?;
        assert_eq!(back, "back");
        Ok(())
    }
}

//! A plain TCP service and its client: the application behind whatever carries the bytes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::wait_until;
use crate::{Context, Result};

/// Gives back every byte that it gets, until its peer ends. Ends with the test.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    answered: Arc<AtomicUsize>,
}

impl EchoServer {
    /// Starts one on a free port of `ip`.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start(ip: impl Into<IpAddr>) -> Result<Self> {
        let listener = TcpListener::bind((ip.into(), 0)).context("bind an echo server")?;
        let address = listener.local_addr().context("the echo server's address")?;
        let answered = Arc::new(AtomicUsize::new(0));
        let count = answered.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let count = count.clone();
                std::thread::spawn(move || echo(stream, &count));
            }
        });
        Ok(Self { address, answered })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections on which it gave back at least one byte: those that proxies open and close to see whether it
    /// lives do not count.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }
}

fn echo(mut stream: TcpStream, answered: &AtomicUsize) {
    let _ = stream.set_nodelay(true);
    let mut buffer = [0; 65_536];
    let mut first = true;
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if std::mem::take(&mut first) {
            answered.fetch_add(1, Ordering::SeqCst);
        }
        if stream.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

/// A client's connection to an echo server, through whatever is between.
#[derive(Debug)]
pub struct EchoClient(TcpStream);

impl EchoClient {
    /// Connects, and sends something there and back: only then the whole way is known to stand.
    ///
    /// # Errors
    /// When the connection is refused or ends, or nothing comes back within `timeout`.
    pub fn connect(address: SocketAddr, timeout: Duration) -> Result<Self> {
        let stream =
            TcpStream::connect_timeout(&address, timeout).context(format_args!("connect to {address}"))?;
        stream.set_nodelay(true).context("nodelay")?;
        stream.set_read_timeout(Some(timeout)).context("a timeout")?;
        let mut client = Self(stream);
        client.say(b"hello")?;
        Ok(client)
    }

    /// Connects as soon as it can, for set-ups in which nobody tells when the way stands.
    ///
    /// # Errors
    /// When it cannot within `timeout`: the last failure.
    pub fn connect_within(address: SocketAddr, timeout: Duration) -> Result<Self> {
        let mut client = Err(String::new());
        let _ = wait_until(timeout, || {
            client = Self::connect(address, timeout);
            client.is_ok()
        });
        client
    }

    /// Sends `bytes` and reads them back.
    ///
    /// # Errors
    /// When the connection ends, or other bytes come back.
    pub fn say(&mut self, bytes: &[u8]) -> Result<()> {
        // Beside the reading: more than the buffers on the way hold must not stop both.
        let mut writer = self.0.try_clone().context("the other half")?;
        let mut back = vec![0; bytes.len()];
        std::thread::scope(|scope| {
            let written = scope.spawn(move || writer.write_all(bytes));
            self.0.read_exact(&mut back).context("read it back")?;
            written
                .join()
                .map_err(|_| "the writer panicked".to_owned())?
                .context("send")
        })?;
        if back == bytes {
            Ok(())
        } else {
            Err(format!("{} bytes came back, but other ones", bytes.len()))
        }
    }

    /// Waits until the other side ends this connection. Returns how long that took.
    ///
    /// # Errors
    /// When it is still there after `timeout`.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<Duration> {
        let from = Instant::now();
        self.0.set_read_timeout(Some(timeout)).context("a timeout")?;
        match self.0.read(&mut [0]) {
            Ok(1..) => Err("a byte came that nobody sent".into()),
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                Err(format!("the connection still stands after {timeout:?}"))
            }
            Ok(0) | Err(_) => Ok(from.elapsed()),
        }
    }
}

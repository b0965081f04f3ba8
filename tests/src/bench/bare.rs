//! What no proxy can beat: bytes handed on unseen, by threads that do nothing else.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};

use super::sealed::{open, seal};
use crate::{Context, Result};

/// The most that an unprivileged process may ask for (pipe(7)).
const PIPE: usize = 1 << 20;
/// As an agent's at a node.
const SEND_BUFFER: usize = 1 << 20;

/// Takes connections at a Unix socket on to an address.
///
/// # Errors
/// When the socket cannot be had.
pub fn bare_entrance(path: &Path, to: SocketAddr, sealed: bool) -> Result<()> {
    let listener = UnixListener::bind(path).context(path.display())?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // Without a target the connection ends here.
            let _ = TcpStream::connect(to).and_then(|far| both(far, near, sealed));
        }
    });
    Ok(())
}

/// Takes connections on to the only Unix socket in a directory, as it is when they come; returns where they are to come.
///
/// # Errors
/// When no port can be had.
pub fn bare_exit(dir: PathBuf, sealed: bool) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("bind a relay")?;
    let address = listener.local_addr().context("read its address")?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let _ = socket_in(&dir)
                .and_then(UnixStream::connect)
                .and_then(|far| both(near, far, sealed));
        }
    });
    Ok(address)
}

fn socket_in(dir: &Path) -> std::io::Result<PathBuf> {
    let entries: Vec<_> = std::fs::read_dir(dir)?.collect::<std::io::Result<_>>()?;
    let is_socket = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "s");
    let found = entries.iter().map(std::fs::DirEntry::path).find(is_socket);
    found.ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

fn both(tcp: TcpStream, unix: UnixStream, sealed: bool) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&unix, SEND_BUFFER)?;
    let (tcp, unix) = (Arc::new(tcp), Arc::new(unix));
    let (tcp_too, unix_too) = (tcp.clone(), unix.clone());
    thread::spawn(move || {
        let _ = match sealed {
            true => open(&*tcp, &*unix),
            false => spliced(&tcp, &unix),
        };
        unix.shutdown(Shutdown::Write)
    });
    thread::spawn(move || {
        let _ = match sealed {
            true => seal(&*unix_too, &*tcp_too),
            false => spliced(&unix_too, &tcp_too),
        };
        tcp_too.shutdown(Shutdown::Write)
    });
    Ok(())
}

/// One way, without a copy of its own: splice(2).
fn spliced(from: &impl AsFd, to: &impl AsFd) -> std::io::Result<()> {
    let (out, into) = pipe()?;
    let room = fcntl_setpipe_size(&into, PIPE)?;
    loop {
        let mut left = splice(from, None, &into, None, room, SpliceFlags::MOVE)?;
        if left == 0 {
            return Ok(());
        }
        while left > 0 {
            left -= splice(&out, None, to, None, left, SpliceFlags::MOVE)?;
        }
    }
}

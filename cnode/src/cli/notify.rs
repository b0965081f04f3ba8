//! Tells systemd that the agent serves, and by which process (sd_notify(3)): after a takeover that is another one.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// Where systemd listens, for a service of `Type=notify`.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Does nothing when nobody wants to know.
pub(super) fn ready() -> io::Result<()> {
    match std::env::var_os(VARIABLE) {
        Some(socket) => send(&socket, &format!("READY=1\nMAINPID={}", std::process::id())),
        None => Ok(()),
    }
}

fn send(socket: &OsStr, text: &str) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn both_kinds_of_sockets_are_told() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("notify");
        let name = format!("meshx-test-{}", std::process::id());
        let named = UnixDatagram::bind(&path).unwrap();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let abstract_one = UnixDatagram::bind_addr(&address).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        send(OsStr::new(&format!("@{name}")), "READY=1").unwrap();
        for socket in [named, abstract_one] {
            let mut text = [0; 32];
            let read = socket.recv(&mut text).unwrap();
            assert_eq!(&text[..read], b"READY=1");
        }
        assert!(send(OsStr::new("/nonexistent/notify"), "READY=1").is_err());
    }
}

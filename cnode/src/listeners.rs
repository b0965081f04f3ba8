//! Who listens on a TCP port of this host, by what the kernel shows in /proc (proc_net(5), proc(5)).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A socket that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    uid: u32,
    inode: u64,
    /// Name and id; none for a process that this user may not look into.
    process: Option<(String, u32)>,
}

impl Listener {
    /// In words.
    pub(crate) fn owner(&self) -> String {
        match &self.process {
            Some((name, pid)) => format!("{name} (pid {pid})"),
            None => format!("a process of uid {}", self.uid),
        }
    }
}

/// All sockets that listen on this port, of IPv4 first.
pub(crate) fn on_port(port: u16) -> io::Result<Vec<Listener>> {
    let mut found = parse(&fs::read_to_string("/proc/net/tcp")?, port);
    // A kernel without IPv6 has no such file.
    found.extend(parse(
        &fs::read_to_string("/proc/net/tcp6").unwrap_or_default(),
        port,
    ));
    if !found.is_empty() {
        name_processes(&mut found);
    }
    Ok(found)
}

fn parse(table: &str, port: u16) -> Vec<Listener> {
    /// TCP_LISTEN (net/tcp_states.h).
    const LISTEN: &str = "0A";
    let listener = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, LISTEN, _, _, _, uid, _, inode, ..] = fields.as_slice() else {
            return None;
        };
        let address = address(local)?;
        (address.port() == port).then_some(Listener {
            address,
            uid: uid.parse().ok()?,
            inode: inode.parse().ok()?,
            process: None,
        })
    };
    table.lines().filter_map(listener).collect()
}

/// Hexadecimal: 32-bit words in the byte order of this machine, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words = (0..ip.len() / 8).map(|word| u32::from_str_radix(ip.get(word * 8..word * 8 + 8)?, 16).ok());
    let bytes: Vec<u8> = words
        .collect::<Option<Vec<_>>>()?
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Looks which process holds a socket: each descriptor is a link to `socket:[INODE]`.
fn name_processes(found: &mut [Listener]) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let open = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for target in open.filter_map(|fd| fs::read_link(fd.path()).ok()) {
            let inode = target
                .to_str()
                .and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']'));
            let Some(inode) = inode.and_then(|inode| inode.parse::<u64>().ok()) else {
                continue;
            };
            for listener in found.iter_mut().filter(|listener| listener.inode == inode) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                listener.process = Some((name.trim().to_owned(), pid));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 00000000:1111 00000000:0000 0A 00000000:00000000 00:00000000 00000000   105        0 4711 1 0\n\
            1: 0100007F:1112 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n\
            2: 0100007F:1111 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n\
            3: nonsense\n4: 0:1111 0:0 0A 0 0 0 0 0 1\n";
        let found = parse(table, 0x1111);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].owner(), "a process of uid 105");
        if cfg!(target_endian = "little") {
            assert_eq!(found[0].address, "0.0.0.0:4369".parse().unwrap());
            assert_eq!(
                address("0100007F:1112").unwrap(),
                "127.0.0.1:4370".parse().unwrap()
            );
            let v6 = "00000000000000000000000001000000:1111";
            assert_eq!(address(v6).unwrap(), "[::1]:4369".parse().unwrap());
        }
    }

    #[test]
    fn a_listener_of_this_process_is_found_with_its_name() {
        for bind in ["127.0.0.1:0", "0.0.0.0:0"] {
            let listener = TcpListener::bind(bind).unwrap();
            let address = listener.local_addr().unwrap();
            let found = on_port(address.port()).unwrap();
            let own = found.iter().find(|found| found.address == address).unwrap();
            assert!(
                own.owner().contains(&format!("pid {}", std::process::id())),
                "{own:?}"
            );
        }
    }
}

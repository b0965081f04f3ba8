//! What a registration may say.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

use super::{Place, creation::LOWEST};
use crate::{
    agent::{
        hosts,
        paths::SUN_PATH_MAX,
        trust::{Peer, Trust},
    },
    mesh::MAX_NODE_NAME,
    proxy::{
        cause::{Cause, Refusal},
        local::Endpoint,
    },
};

/// Longest id of a service's instance, in bytes.
pub(super) const SERVICE_ID_MAX: usize = 255;

/// The host part of a node name that is well-formed.
pub(super) fn node_name(node: &str) -> Result<&str, Refusal> {
    let invalid =
        |fault| Cause::InvalidName.because(format!("node {node:?} {fault}, wanted for example shop@h1"));
    if node.len() > MAX_NODE_NAME {
        let text = format!(
            "a node name of {} bytes, at most {MAX_NODE_NAME} are possible",
            node.len()
        );
        return Err(Cause::InvalidName.because(text));
    }
    let (name, host) = node.split_once('@').ok_or_else(|| invalid("has no @"))?;
    if name.is_empty() {
        return Err(invalid("has nothing before the @"));
    }
    if host.is_empty() {
        return Err(invalid("has nothing after the @"));
    }
    if host.contains('@') {
        return Err(invalid("has more than one @"));
    }
    if !hosts::is_valid(host) || name.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Err(invalid(
            "has blanks or control characters, or a host that is too long",
        ));
    }
    Ok(host)
}

/// A path in `vm/` that is a socket of the user who registers it: nobody can have the agent connect to
/// what is not his.
pub(super) fn node_socket(vm: &Path, socket: &str, peer: Peer) -> Result<PathBuf, Refusal> {
    let path = in_directory(vm, socket)?;
    let metadata = fs::symlink_metadata(&path)
        .map_err(|error| Cause::InvalidRequest.because(format!("socket {socket:?}: {error}")))?;
    if !metadata.file_type().is_socket() {
        return Err(Cause::InvalidRequest.because(format!("socket {socket:?} is no socket")));
    }
    if metadata.uid() != peer.uid {
        return Err(Cause::NotPermitted.because(format!(
            "socket {socket:?} belongs to uid {}, but uid {} registers it",
            metadata.uid(),
            peer.uid
        )));
    }
    Ok(path)
}

/// Whose port it is, is asked at each connection to it.
pub(super) fn plain_node(address: SocketAddr) -> Result<Endpoint, Refusal> {
    if address.ip().is_loopback() && address.port() != 0 {
        return Ok(Endpoint::PlainNode(address));
    }
    Err(Cause::InvalidRequest.because(format!(
        "a node of plain distribution at {address}: wanted a port on loopback"
    )))
}

pub(super) fn creation(creation: i64) -> Result<u32, Refusal> {
    u32::try_from(creation)
        .ok()
        .filter(|creation| *creation >= LOWEST)
        .ok_or_else(|| {
            Cause::InvalidRequest.because(format!("creation {creation}, wanted {LOWEST} to {}", u32::MAX))
        })
}

/// An id cannot be a node's, which is the node's name.
pub(super) fn service_id(id: &str) -> Result<&str, Refusal> {
    let valid = !id.is_empty()
        && id.len() <= SERVICE_ID_MAX
        && !id.contains(|c: char| c == '@' || c.is_control() || c.is_whitespace());
    if valid {
        return Ok(id);
    }
    Err(Cause::InvalidName.because(format!(
        "id {:?}: wanted 1 to {SERVICE_ID_MAX} bytes without @, blanks and control characters",
        id.chars().take(SERVICE_ID_MAX).collect::<String>()
    )))
}

/// The agent connects there for others, perhaps with more rights than the client has: only to this host,
/// and for other users only to sockets in its own directories.
pub(super) fn endpoint(
    endpoint: Endpoint,
    place: &Place,
    peer: Peer,
    trust: &Trust,
) -> Result<Endpoint, Refusal> {
    match endpoint {
        Endpoint::Tcp(address) if address.port() == 0 || !is_local(address) => Err(Cause::InvalidRequest
            .because(format!(
                "address {address}: wanted an address of this host, best on loopback, and a port"
            ))),
        Endpoint::Uds(path) => {
            let text = path.to_string_lossy();
            if path.as_os_str().len() > SUN_PATH_MAX || !path.is_absolute() {
                return Err(Cause::InvalidRequest.because(format!(
                    "address {text:?}: wanted an absolute path of at most {SUN_PATH_MAX} bytes"
                )));
            }
            if !trust.is_operator(peer) {
                in_directory(&place.up, &text).map_err(|refusal| {
                    Cause::NotPermitted.because(format!("uid {}: {}", peer.uid, refusal.text))
                })?;
            }
            Ok(Endpoint::Uds(path))
        }
        other => Ok(other),
    }
}

/// A fresh name in `up/`: for an upstream, or a service that did not say where it listens.
pub(in crate::agent) fn chosen_socket(up: &Path) -> Result<PathBuf, Refusal> {
    let random = getrandom::u64()
        .map_err(|error| Cause::NotReady.because(format!("the system gave no random bytes: {error}")))?;
    Ok(up.join(format!("{random:016x}")))
}

/// Only an address of this host can be bound to (bind(2)).
fn is_local(address: SocketAddr) -> bool {
    let ip: IpAddr = address.ip();
    !ip.is_unspecified() && !ip.is_multicast() && UdpSocket::bind((ip, 0)).is_ok()
}

/// Exactly one name below the directory.
fn in_directory(dir: &Path, path: &str) -> Result<PathBuf, Refusal> {
    let name = Path::new(path).strip_prefix(dir).ok();
    let mut components = name.into_iter().flat_map(Path::components);
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if dir.join(name).as_os_str() == path => {
            let path = dir.join(name);
            if path.as_os_str().len() > SUN_PATH_MAX {
                let text = format!(
                    "{path:?} is {} bytes, at most {SUN_PATH_MAX} fit",
                    path.as_os_str().len()
                );
                return Err(Cause::InvalidRequest.because(text));
            }
            Ok(path)
        }
        _ => Err(Cause::InvalidRequest.because(format!("{path:?} does not lie in {}", dir.display()))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::net::UnixListener;

    use super::*;

    const ME: fn() -> Peer = || Peer {
        uid: crate::agent::paths::uid(),
        gid: 0,
        pid: None,
    };

    #[test]
    fn node_names() {
        assert_eq!(node_name("shop@h1").unwrap(), "h1");
        assert_eq!(node_name("läden@h1.example").unwrap(), "h1.example");
        let long = format!("{}@h", "x".repeat(MAX_NODE_NAME - 2));
        assert!(node_name(&long).is_ok());
        for bad in [
            "",
            "shop",
            "@h1",
            "shop@",
            "a@b@c",
            "a b@h",
            "a@h\n",
            &format!("x{long}"),
        ] {
            assert_eq!(node_name(bad).unwrap_err().cause, Cause::InvalidName, "{bad:?}");
        }
    }

    #[test]
    fn a_node_socket_is_the_users_own_socket_in_the_directory() {
        let temp = tempfile::tempdir().unwrap();
        let vm = temp.path().join("vm");
        fs::create_dir(&vm).unwrap();
        let good = vm.join("s");
        let _listener = UnixListener::bind(&good).unwrap();
        let outside = temp.path().join("s");
        let _other = UnixListener::bind(&outside).unwrap();
        fs::write(vm.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, vm.join("link")).unwrap();
        let check = |path: &Path, peer| node_socket(&vm, path.to_str().unwrap(), peer);

        assert_eq!(check(&good, ME()).unwrap(), good);
        for bad in [
            outside.clone(),
            vm.join("../s"),
            vm.join("./s"),
            vm.join("none"),
            vm.join("file"),
            vm.join("link"),
            vm.clone(),
            "s".into(),
        ] {
            assert_eq!(
                check(&bad, ME()).unwrap_err().cause,
                Cause::InvalidRequest,
                "{bad:?}"
            );
        }
        let stranger = Peer {
            uid: ME().uid + 1,
            ..ME()
        };
        assert_eq!(check(&good, stranger).unwrap_err().cause, Cause::NotPermitted);
    }

    #[test]
    fn creations_that_a_node_may_bring() {
        assert_eq!(creation(4).unwrap(), 4);
        assert_eq!(creation(i64::from(u32::MAX)).unwrap(), u32::MAX);
        for bad in [-1, 0, 3, 1 << 32, i64::MAX] {
            assert_eq!(creation(bad).unwrap_err().cause, Cause::InvalidRequest);
        }
    }

    #[test]
    fn service_ids() {
        assert!(service_id("rpc-h1-1").is_ok());
        for bad in ["", "a@b", "a b", "a\0", &"x".repeat(SERVICE_ID_MAX + 1)] {
            assert_eq!(service_id(bad).unwrap_err().cause, Cause::InvalidName, "{bad:?}");
        }
    }

    #[test]
    fn services_are_on_this_host_and_strangers_in_our_directory() {
        let place = Place {
            agent: "a".into(),
            inbound: "127.0.0.1:1".parse().unwrap(),
            hosts: vec!["h1".into()],
            vm: "/d/vm".into(),
            up: "/d/up".into(),
            node_service: crate::agent::config::NodeService::Name,
        };
        let trust = Trust::new(1000, vec![]);
        let own = Peer {
            uid: 1000,
            gid: 0,
            pid: None,
        };
        let stranger = Peer { uid: 1001, ..own };
        let tcp = |text: &str| Endpoint::Tcp(text.parse().unwrap());
        let uds = |text: &str| Endpoint::Uds(text.into());
        assert!(endpoint(tcp("127.0.0.1:80"), &place, stranger, &trust).is_ok());
        for bad in ["127.0.0.1:0", "0.0.0.0:80", "192.0.2.1:80", "224.0.0.1:80"] {
            let refusal = endpoint(tcp(bad), &place, own, &trust).unwrap_err();
            assert_eq!(refusal.cause, Cause::InvalidRequest, "{bad}");
        }
        assert!(endpoint(uds("/run/x.sock"), &place, own, &trust).is_ok());
        assert!(endpoint(uds("/d/up/x"), &place, stranger, &trust).is_ok());
        for bad in ["/run/x.sock", "/d/up/../x", "/d/up/x/y", "/d/vm/x"] {
            let refusal = endpoint(uds(bad), &place, stranger, &trust).unwrap_err();
            assert_eq!(refusal.cause, Cause::NotPermitted, "{bad}");
        }
        assert!(endpoint(uds("x.sock"), &place, own, &trust).is_err());
        let long = format!("/{}", "x".repeat(SUN_PATH_MAX));
        assert!(endpoint(uds(&long), &place, own, &trust).is_err());
    }
}

//! Limits that would take thousands of clients to reach.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::mesh::embedded::EmbeddedMesh;

#[test]
fn an_agent_takes_so_many_registrations_and_no_more() {
    let temp = tempfile::tempdir().unwrap();
    let address = "127.0.0.1:1".parse().unwrap();
    let dir = temp.path().join("mesh");
    let mesh = EmbeddedMesh::open(&dir, "a", vec!["h1".to_owned()], address).unwrap();
    let place = Place {
        agent: "a".into(),
        inbound: address,
        hosts: vec!["h1".into()],
        vm: "/vm".into(),
        up: "/up".into(),
    };
    let trust = Trust::new(0, vec![]);
    let registry = Arc::new(Registry::new(Arc::new(mesh), LocalTable::default(), trust, place).unwrap());
    let owner = |id| Owner {
        id,
        peer: Peer {
            uid: 0,
            gid: 0,
            pid: None,
        },
    };
    let mut held = Vec::new();
    for number in 0..INSTANCES_MAX {
        let id = (number / INSTANCES_PER_CLIENT_MAX) as u64;
        if number % INSTANCES_PER_CLIENT_MAX == 0 {
            registry.enter(id);
        }
        held.push(registry.reserve(owner(id), &format!("i{number}")).ok().unwrap());
    }
    registry.enter(99);
    let refusal = registry.reserve(owner(99), "more").err().unwrap();
    assert!(
        refusal.cause == Cause::Limit && refusal.text.contains("INSTANCES_MAX"),
        "{refusal}"
    );
    held.pop();
    let refusal = registry.reserve(owner(0), "more").err().unwrap();
    assert!(refusal.text.contains("INSTANCES_PER_CLIENT_MAX"), "{refusal}");
    assert!(
        registry.reserve(owner(100), "more").is_err(),
        "a connection that is not there"
    );
    assert!(registry.reserve(owner(99), "more").is_ok());
}

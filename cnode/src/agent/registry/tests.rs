//! Limits that would take thousands of clients to reach, and what becomes of links.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::options::{Options, SidecarKind};
use super::*;
use crate::agent::sidecar::{self, Sidecars};
use crate::mesh::SpiffeId;
use crate::mesh::embedded::EmbeddedMesh;
use crate::proxy::links::{Direction, LinkGuard, LinkId, LinkInfo, Purpose};
use crate::proxy::{Proxy, Settings};

fn registry(temp: &tempfile::TempDir) -> (Arc<Registry>, LinkTable) {
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let dir = temp.path().join("mesh");
    let mesh = EmbeddedMesh::open(&dir, "a", vec!["h1".to_owned()], address).unwrap();
    let place = Place {
        agent: "a".into(),
        inbound: address,
        hosts: vec!["h1".into()],
        vm: "/vm".into(),
        up: "/up".into(),
        node_service: NodeService::Name,
    };
    let trust = Trust::new(0, vec!["uid:1001=cart*".parse().unwrap()]);
    let links = LinkTable::default();
    let (mesh, local): (Arc<dyn Mesh>, _) = (Arc::new(mesh), LocalTable::default());
    let carriers = Carriers {
        proxy: Proxy::new(mesh.clone(), local.clone(), links.clone(), Settings::default()),
        sidecars: Sidecars::new(
            mesh.clone(),
            temp.path().join("sidecar"),
            sidecar::Settings::default(),
        )
        .unwrap(),
        bind: address.ip(),
        ports: None,
        default: SidecarKind::Native,
    };
    let mut registry = Registry::new(mesh, local, links.clone(), trust, place, carriers).unwrap();
    registry.reclaim = Duration::from_secs(2);
    (Arc::new(registry), links)
}

fn owner(id: u64) -> Owner {
    owner_of(id, 0)
}

fn owner_of(id: u64, uid: u32) -> Owner {
    Owner {
        id,
        peer: Peer {
            uid,
            gid: 0,
            pid: None,
        },
    }
}

#[test]
fn an_agent_takes_so_many_registrations_and_no_more() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, _) = registry(&temp);
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

#[test]
fn one_user_leaves_room_for_others() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, _) = registry(&temp);
    let mut held = Vec::new();
    for number in 0..INSTANCES_PER_USER_MAX {
        let id = (number / INSTANCES_PER_CLIENT_MAX) as u64;
        if number % INSTANCES_PER_CLIENT_MAX == 0 {
            registry.enter(id);
        }
        held.push(
            registry
                .reserve(owner_of(id, 1000), &format!("i{number}"))
                .ok()
                .unwrap(),
        );
    }
    registry.enter(99);
    let refusal = registry.reserve(owner_of(99, 1000), "more").err().unwrap();
    assert!(
        refusal.cause == Cause::Limit && refusal.text.contains("INSTANCES_PER_USER_MAX"),
        "{refusal}"
    );
    for (id, uid) in [(100, 1001), (101, 0)] {
        registry.enter(id);
        assert!(registry.reserve(owner_of(id, uid), &format!("of-{uid}")).is_ok());
    }
    held.pop();
    assert!(registry.reserve(owner_of(99, 1000), "more").is_ok());
}

/// Who may be nothing cannot keep a name from those who may.
#[tokio::test]
async fn a_session_gives_way_to_a_node_of_its_name() {
    let temp = tempfile::tempdir().unwrap();
    for (session_of, node_of, gives_way) in [
        (1000, 0, true),
        (1000, 1001, true),
        (0, 1001, false),
        (1001, 1001, false),
    ] {
        let (registry, _) = registry(&temp);
        registry.enter(1);
        registry.enter(2);
        let name = "cart@h1";
        let secret = registry
            .register_session(owner_of(1, session_of), SessionName::Node(name))
            .unwrap();
        let request = NodeRequest {
            node: name,
            listens: NodeListens::Plain("127.0.0.1:9".parse().unwrap()),
            creation: None,
            secret: None,
            hidden: false,
            options: Options::default(),
        };
        let node = registry.register_node(owner_of(2, node_of), request).await;
        let case = format!("session of {session_of}, node of {node_of}");
        assert_eq!(
            registry.local.session_by_secret(&secret).is_none(),
            gives_way,
            "{case}"
        );
        match node {
            Ok(_) => assert!(gives_way, "{case}"),
            Err(refusal) => assert!(
                !gives_way && refusal.cause == Cause::NameTaken,
                "{case}: {refusal}"
            ),
        }
        registry.release(1).await;
        registry.release(2).await;
    }
}

async fn service(registry: &Arc<Registry>, by: u64) {
    let request = ServiceRequest {
        name: "echo",
        id: Some("echo-1"),
        address: None,
        options: Options::default(),
    };
    registry.register_service(owner(by), request).await.unwrap();
}

fn link(links: &LinkTable, instance: &str, number: u8) -> LinkGuard {
    let spiffe = |name| SpiffeId::new("td", ServiceName::new(name).unwrap());
    let info = LinkInfo {
        id: LinkId([number; 16]),
        direction: Direction::Inbound,
        purpose: Purpose::Tcp,
        local: instance.to_owned(),
        remote: "cart".to_owned(),
        local_spiffe: spiffe("echo"),
        remote_spiffe: spiffe("cart"),
        verified: true,
        remote_agent: None,
        proof: None,
        instances: vec![instance.to_owned()],
        owners: vec![1],
    };
    links.insert(info).unwrap()
}

#[tokio::test]
async fn the_links_of_a_deregistered_instance_end_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, links) = registry(&temp);
    registry.enter(1);
    service(&registry, 1).await;
    let mut told = links.subscribe(1);
    let (its, other) = (link(&links, "echo-1", 1), link(&links, "echo-2", 2));
    registry.deregister(owner(1), "echo-1").await.unwrap();
    assert!(its.cut().is_cancelled() && !other.cut().is_cancelled());
    let event = told.recv().await.unwrap();
    assert_eq!(event.cause, Cause::NoSuchService);
    assert_eq!(event.text, "echo-1 was deregistered");
}

#[tokio::test]
async fn links_outlive_a_lost_control_connection_for_as_long_as_it_may_come_back() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, links) = registry(&temp);
    for (round, returns) in [(1, true), (3, false)] {
        registry.enter(round);
        service(&registry, round).await;
        let link = link(&links, "echo-1", 1);
        registry.release(round).await;
        assert!(!link.cut().is_cancelled());
        if returns {
            registry.enter(round + 1);
            service(&registry, round + 1).await;
        }
        // Three times as long says that it stays; a minute that it does not.
        let patience = if returns {
            registry.reclaim * 3
        } else {
            Duration::from_secs(60)
        };
        let cut = timeout(patience, link.cut().cancelled()).await;
        assert_eq!(cut.is_err(), returns, "round {round}");
        registry.deregister(owner(round + 1), "echo-1").await.ok();
    }
}

/// What one process of the agent says of its registrations, and another knows then.
#[tokio::test]
async fn registrations_that_do_not_hold_together_are_not_taken_over() {
    let temp = tempfile::tempdir().unwrap();
    let (first, _) = registry(&temp);
    first.enter(7);
    let request = ServiceRequest {
        name: "echo",
        id: Some("echo-1"),
        address: Some(Endpoint::Tcp("127.0.0.1:9".parse().unwrap())),
        options: Options::default(),
    };
    first.register_service(owner(7), request).await.unwrap();
    let handed = || {
        let (handed, instances) = first.handed(&HashMap::new()).unwrap();
        let again = |handed| serde_json::from_value(serde_json::to_value(handed).unwrap()).unwrap();
        let instances: HandedInstances = instances
            .into_iter()
            .map(|(handed, files)| (again(handed), files))
            .collect();
        assert_eq!(instances.len(), 1);
        (handed, instances)
    };
    let file = || tempfile::tempfile().unwrap().into();
    let resumed = |enters: bool, files: usize, twice: bool| {
        // The state of the mesh is of no account here: nothing is served.
        let temp = tempfile::tempdir().unwrap();
        let (next, _) = registry(&temp);
        if enters {
            next.enter(7);
        }
        let (agent, mut instances) = handed();
        instances[0].1.extend((0..files).map(|_| file()));
        if twice {
            instances.extend(handed().1);
        }
        let resumed = next.resume(agent, instances);
        resumed.map(|_| next.is_live(7, "echo-1"))
    };
    assert_eq!(resumed(true, 0, false), Ok(true));
    for (enters, files, twice, seen) in [
        (false, 0, false, "a connection that was not handed over"),
        (true, 1, false, "does not hold together"),
        (true, 0, true, "does not hold together"),
    ] {
        let text = resumed(enters, files, twice).unwrap_err();
        assert!(text.contains(seen), "{text}");
    }
}

/// Whoever had his share before a takeover has it still, and no second one.
#[tokio::test]
async fn a_users_share_is_taken_over_with_what_he_has_registered() {
    let temp = tempfile::tempdir().unwrap();
    let (first, _) = registry(&temp);
    first.enter(7);
    let request = ServiceRequest {
        name: "cart",
        id: Some("cart-1"),
        address: Some(Endpoint::Tcp("127.0.0.1:9".parse().unwrap())),
        options: Options::default(),
    };
    first.register_service(owner_of(7, 1001), request).await.unwrap();
    let (agent, instances) = first.handed(&HashMap::new()).unwrap();
    let next_temp = tempfile::tempdir().unwrap();
    let (next, _) = registry(&next_temp);
    next.enter(7);
    assert!(next.resume(agent, instances).is_ok());
    let mut held = Vec::new();
    let refusal = (0..).find_map(|number| {
        let id = 8 + (number / INSTANCES_PER_CLIENT_MAX) as u64;
        if number % INSTANCES_PER_CLIENT_MAX == 0 {
            next.enter(id);
        }
        let reserved = next.reserve(owner_of(id, 1001), &format!("i{number}"));
        reserved.map(|pending| held.push(pending)).err()
    });
    assert!(refusal.unwrap().text.contains("INSTANCES_PER_USER_MAX"));
    assert_eq!(held.len(), INSTANCES_PER_USER_MAX - 1);
}

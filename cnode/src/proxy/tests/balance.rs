//! Upstreams whose instances are bad in one way or another.
use futures::future::join_all;
use tokio_rustls::TlsAcceptor;

use super::services::{greeting, tcp, upstream};
use super::*;

/// Enters instances of `echo` with an agent at an address where something else is.
async fn elsewhere(world: &World, ids: &[&str], address: SocketAddr) -> EmbeddedMesh {
    let name = "elsewhere";
    let mesh = EmbeddedMesh::open(&world.mesh_dir(), name, vec![name.to_owned()], address).unwrap();
    for id in ids {
        let instance = Instance {
            id: (*id).to_owned(),
            service: ServiceName::new("echo").unwrap(),
            node: None,
            agent: name.to_owned(),
            address,
            protocol: Protocol::Meshx,
            meta: Default::default(),
        };
        mesh.register(&Entry::plain(instance)).await.unwrap();
    }
    mesh
}

/// It has no links, so it would be the first for every new one.
#[tokio::test]
async fn an_agent_with_a_fault_of_its_own_keeps_nobody_from_the_others() {
    let world = World::new();
    let (h1, h2) = (
        world.host("h1", "127.0.0.2").await,
        world.host("h2", "127.0.0.3").await,
    );
    tcp(&h2, "echo-a").await;
    let port = TcpListener::bind("127.0.0.5:0").await.unwrap();
    let _mesh = elsewhere(&world, &["echo-b"], port.local_addr().unwrap()).await;
    let leaf = h2.identity("files").await;
    let acceptor = TlsAcceptor::from(tls::server_config(&leaf, Protocol::Meshx).unwrap());
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = port.accept().await {
            let _ = acceptor.accept(stream).await;
        }
    });
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    for _ in 0..32 {
        assert_eq!(greeting(&h1).await, "echo-a");
    }
    // It was tried three times, and its fault is told though nobody lost a link by it.
    assert_eq!((h1.refusals(Cause::WrongService), h1.all_refusals()), (3, 3));
    server.abort();
    // A rule is not its agent's alone.
    world.rule("web", "echo", Action::Deny);
    assert_eq!(greeting(&h1).await, "");
    assert_eq!(h1.refusals(Cause::IntentionDenied), 1);
}

#[tokio::test]
async fn instances_that_hang_leave_time_for_those_that_answer() {
    let world = World::new();
    let long = Duration::from_secs(18);
    let patient = Settings {
        frame_timeout: long,
        handshake_timeout: long,
        setup_timeout: long,
        ..settings()
    };
    let h1 = world.host_with("h1", "127.0.0.2", patient).await;
    let h2 = world.host("h2", "127.0.0.3").await;
    tcp(&h2, "echo-a").await;
    let hangs = TcpListener::bind("127.0.0.5:0").await.unwrap();
    let _mesh = elsewhere(&world, &["echo-b", "echo-c"], hangs.local_addr().unwrap()).await;
    let _handle = h1.proxy.upstream(upstream(&h1, None)).unwrap();
    // More than may dial one agent at a time.
    let all = join_all((0..40).map(|_| greeting(&h1))).await;
    assert!(all.iter().all(|seen| seen == "echo-a"), "{all:?}");
    assert_eq!(h1.all_refusals(), 0);
    drop(hangs);
}

//! `MeshxNode.Cluster`: nodes that find and keep each other by the catalogue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use meshx_tests::{Agent, Beam, BeamBuilder, Mesh};

/// Promised within 2 s of the change in the catalogue.
const PROMISED: Duration = Duration::from_secs(2);

fn cluster(node: &mut Beam, options: &str) {
    // Before anything is connected.
    node.eval(":net_kernel.monitor_nodes(true)").unwrap();
    node.expect(
        &format!("{{:ok, pid}} = MeshxNode.Cluster.start_link({options}); Process.unlink(pid)"),
        "true",
    )
    .unwrap();
}

/// The next node that comes or goes.
fn next(node: &mut Beam, what: &str) -> String {
    node.eval(&format!(
        "receive do {{:{what}, node}} -> node after 30_000 -> :none end"
    ))
    .unwrap()
}

fn hosts(mesh: &Mesh) -> (Agent, Agent) {
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    (h1, mesh.agent("b", "127.0.0.3", &["h2"]).unwrap())
}

#[test]
fn a_node_is_connected_when_it_comes_and_again_when_its_link_was_lost() {
    let mesh = Mesh::new().unwrap();
    let (mut h1, h2) = hosts(&mesh);
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let _other = Beam::start(&h2, "other@h2").unwrap();
    cluster(&mut shop, "services: [\"cart\"]");
    let mut cart = Beam::start(&h2, "cart@h2").unwrap();
    let came = Instant::now();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");
    eprintln!("connected {:?} after its boot", came.elapsed());
    assert!(came.elapsed() < 3 * PROMISED, "{:?}", came.elapsed());
    shop.expect("Node.list()", "[:cart@h2]").unwrap();

    // A link that is lost, and a node that is killed and comes back under its name.
    shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
    assert_eq!(next(&mut shop, "nodedown"), ":cart@h2");
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");
    cart.process.kill();
    assert_eq!(next(&mut shop, "nodedown"), ":cart@h2");
    let cart = Beam::start(&h2, "cart@h2").unwrap();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");

    // What separates them ends: they find each other.
    h1.meshx_ok(&["deny", "shop", "cart"]).unwrap();
    assert_eq!(next(&mut shop, "nodedown"), ":cart@h2");
    h1.meshx_ok(&["allow", "shop", "cart"]).unwrap();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");

    // The next agent watches as well.
    h1.process.kill();
    assert_eq!(next(&mut shop, "nodedown"), ":cart@h2");
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");
    drop(cart);
    assert_eq!(next(&mut shop, "nodedown"), ":cart@h2");
    let _local = Beam::start(&h1, "cart@h1").unwrap();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h1");
    shop.expect_soon("MeshxNode.Cluster.wanted()", "[:cart@h1]")
        .unwrap();
}

#[test]
fn nodes_of_all_services_are_found_by_their_metadata() {
    let mesh = Mesh::new().unwrap();
    let (h1, h2) = hosts(&mesh);
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    cluster(&mut shop, "services: :all, meta: %{\"tier\" => \"web\"}");
    let with = |name: &str, meta: &[&str]| {
        let options: Vec<&str> = meta.iter().flat_map(|pair| ["--meta", *pair]).collect();
        BeamBuilder::new(name).run_options(&options).start(&h2).unwrap()
    };
    let _plain = Beam::start(&h2, "plain@h2").unwrap();
    let _back = with("back@h2", &["tier=back"]);
    let _cart = with("cart@h2", &["tier=web", "zone=1"]);
    let came = Instant::now();
    assert_eq!(next(&mut shop, "nodeup"), ":cart@h2");
    eprintln!("connected {:?} after its boot", came.elapsed());
    assert!(came.elapsed() < 3 * PROMISED, "{:?}", came.elapsed());
    shop.expect("MeshxNode.Cluster.wanted()", "[:cart@h2]").unwrap();
}

#[test]
fn a_degree_is_kept() {
    let mesh = Mesh::new().unwrap();
    let (h1, h2) = hosts(&mesh);
    let mut shop = Beam::start(&h1, "shop@h1").unwrap();
    let (_a, _b) = (
        Beam::start(&h2, "cart@h2").unwrap(),
        Beam::start(&h1, "cart@h1").unwrap(),
    );
    cluster(&mut shop, "services: [:cart], max_degree: 1");
    let first = next(&mut shop, "nodeup");
    shop.expect("length(MeshxNode.Cluster.wanted())", "1").unwrap();
    shop.expect("Node.list()", &format!("[{first}]")).unwrap();
}

//! Unmodified VMs: plain distribution, with the agent in EPMD's place.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::{Agent, Beam, BeamBuilder, COOKIE, Mesh};

/// An agent that is EPMD at a port of its own.
fn agent(mesh: &Mesh, name: &str, ip: &str, host: &str, more: &[&str]) -> Agent {
    let options = [&["--epmd=127.0.0.1:0"], more].concat();
    mesh.agent_with(name, ip, &[host], &options).unwrap()
}

fn two_hosts() -> (Mesh, Agent, Agent) {
    let mesh = Mesh::new().unwrap();
    let nodes = ["--epmd-nodes", "shop*", "--epmd-nodes", "cart"];
    let h1 = agent(&mesh, "a", "127.0.0.2", "h1.mesh", &nodes);
    let h2 = agent(&mesh, "b", "127.0.0.3", "h2.mesh", &nodes);
    (mesh, h1, h2)
}

/// A VM that knows nothing of meshx.
fn unmodified(name: &str, reach: &[&str]) -> BeamBuilder {
    let reach = reach.iter().flat_map(|host| ["--reach", host]);
    let options: Vec<&str> = ["--epmd"].into_iter().chain(reach).collect();
    BeamBuilder::new(name).run_options(&options)
}

#[test]
fn unmodified_vms_of_two_hosts_do_what_distribution_does() {
    let (_mesh, h1, h2) = two_hosts();
    // Neither is there when the other starts.
    let mut shop = unmodified("shop@h1.mesh", &["h2.mesh"]).start(&h1).unwrap();
    let mut cart = unmodified("cart@h2.mesh", &["h1.mesh"]).start(&h2).unwrap();
    shop.expect(":code.is_loaded(:meshx_dist)", "false").unwrap();

    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[:\"shop@h1.mesh\"]").unwrap();
    shop.expect(
        ":erpc.call(:\"cart@h2.mesh\", :erlang, :node, [])",
        ":\"cart@h2.mesh\"",
    )
    .unwrap();
    shop.eval("blob = :crypto.strong_rand_bytes(16 * 1024 * 1024); :made")
        .unwrap();
    shop.expect(
        ":erpc.call(:\"cart@h2.mesh\", Function, :identity, [blob]) == blob",
        "true",
    )
    .unwrap();
    // The other way round, too.
    shop.expect("Node.disconnect(:\"cart@h2.mesh\")", "true").unwrap();
    cart.expect_soon("Node.list()", "[]").unwrap();
    cart.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();

    // A node that is there for the first time, on a host that is known: no restart of anything.
    let mut late = unmodified("shop_2@h1.mesh", &[]).start(&h1).unwrap();
    late.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    late.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();
    let names = h2.meshx_ok(&["names"]).unwrap();
    for node in ["shop@h1.mesh", "shop_2@h1.mesh", "cart@h2.mesh"] {
        assert!(names.contains(node), "{names}");
    }

    // Links are the mesh's links, each with its proven service.
    let links = h1.meshx_ok(&["links", "--json"]).unwrap();
    assert!(
        links.contains("svc/cart") && links.contains("\"verified\": true"),
        "{links}"
    );

    let at = cart.process.kill();
    h1.wait_name("cart@h2.mesh", false, Duration::from_secs(3))
        .unwrap();
    println!(
        "cart was free {:?} after SIGKILL, seen from the other host",
        at.elapsed()
    );
    let _again = unmodified("cart@h2.mesh", &[]).start(&h2).unwrap();
    shop.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
}

#[test]
fn unmodified_vms_and_nodes_of_our_carrier_are_one_cluster() {
    let (_mesh, h1, h2) = two_hosts();
    let mut plain = unmodified("shop@h1.mesh", &["h2.mesh"]).start(&h1).unwrap();
    let mut ours = Beam::start(&h2, "cart@h2.mesh").unwrap();
    let mut near = Beam::start(&h1, "audit@h1.mesh").unwrap();
    ours.expect("MeshxNode.connect(:\"shop@h1.mesh\")", ":ok")
        .unwrap();
    plain.expect_soon("Node.list()", "[:\"cart@h2.mesh\"]").unwrap();
    // Nothing of `global` is on its way that would make a link anew.
    for node in [&mut plain, &mut ours] {
        node.expect(":global.sync()", ":ok").unwrap();
    }
    plain
        .expect("Node.disconnect(:\"cart@h2.mesh\")", "true")
        .unwrap();
    plain.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    // On one host, too.
    plain.expect("Node.connect(:\"audit@h1.mesh\")", "true").unwrap();
    near.expect_soon(":\"shop@h1.mesh\" in Node.list()", "true")
        .unwrap();
    near.expect("Node.disconnect(:\"shop@h1.mesh\")", "true").unwrap();
    near.expect("MeshxNode.connect(:\"shop@h1.mesh\")", ":ok")
        .unwrap();
    assert_eq!(
        COOKIE,
        plain
            .eval("Node.get_cookie() |> Atom.to_string()")
            .unwrap()
            .trim_matches('"')
    );
}

#[test]
fn an_unmodified_vm_of_ipv6_meets_one_of_ipv4() {
    let mesh = Mesh::new().unwrap();
    let agent = |name, ip, host| {
        let options = ["--epmd=0", "--epmd-nodes", "*"];
        mesh.agent_with(name, ip, &[host], &options).unwrap()
    };
    let (h1, h2) = (
        agent("a", "127.0.0.2", "h1.mesh"),
        agent("b", "127.0.0.3", "h2.mesh"),
    );
    let mut six = BeamBuilder::new("shop@h1.mesh")
        .run_options(&["--epmd", "--inet6", "--reach", "h2.mesh"])
        .start(&h1)
        .unwrap();
    let mut four = unmodified("cart@h2.mesh", &["h1.mesh"]).start(&h2).unwrap();
    six.expect("Node.connect(:\"cart@h2.mesh\")", "true").unwrap();
    four.expect_soon("Node.list()", "[:\"shop@h1.mesh\"]").unwrap();
    for node in [&mut six, &mut four] {
        node.expect(":global.sync()", ":ok").unwrap();
    }
    four.expect("Node.disconnect(:\"shop@h1.mesh\")", "true").unwrap();
    four.expect("Node.connect(:\"shop@h1.mesh\")", "true").unwrap();
}

//! Neighbouring releases of OTP in one mesh: distribution and RPC both ways, with one NIF library for all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use meshx_tests::{Beam, BeamBuilder, Mesh};

#[test]
fn otp_25_and_27() {
    meet(None, Some("27"));
}

#[test]
fn otp_27_and_29() {
    meet(Some("27"), Some("29"));
}

fn meet(older: Option<&'static str>, newer: Option<&'static str>) {
    let mesh = Mesh::new().unwrap();
    let h1 = mesh.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = mesh.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let node = |name: &str, otp: Option<&'static str>| {
        let builder = BeamBuilder::new(name).app("shop");
        otp.map_or(builder.clone(), |version| builder.otp(version))
    };
    let mut shop = node("shop@h1", older).start(&h1).unwrap();
    let mut cart = node("cart@h2", newer).start(&h2).unwrap();
    for (node, otp) in [(&mut shop, older), (&mut cart, newer)] {
        if let Some(version) = otp {
            node.expect("System.otp_release()", &format!("\"{version}\""))
                .unwrap();
        }
        node.expect("MeshxRpc.Codec.impl()", "MeshxRpc.Codec.Nif")
            .unwrap();
    }

    shop.expect("Node.connect(:cart@h2)", "true").unwrap();
    for (node, peer) in [(&mut shop, "cart@h2"), (&mut cart, "shop@h1")] {
        distribution(node, peer);
    }
    shop.eval(":net_kernel.monitor_nodes(true)").unwrap();

    shop.expect(
        "Shop.CartClient.call(:total, [{\"lamp\", 2}, {\"desk\", 1}], 30_000, 60, 500)",
        "16898",
    )
    .unwrap();
    shop.expect(
        "term = %{{:b, 2 ** 70} => \"ü\", a: [1, -2.5, nil, <<1, 255>>]}; Shop.CartClient.call!(:echo, term) == term",
        "true",
    )
    .unwrap();
    shop.expect(
        "blob = :crypto.strong_rand_bytes(16 * 1024 * 1024); Shop.CartClient.call(:echo, blob) == blob",
        "true",
    )
    .unwrap();

    cart.process.kill();
    shop.expect(
        "receive do {:nodedown, node} -> node after 10_000 -> :none end",
        ":cart@h2",
    )
    .unwrap();
}

/// What this node does with the other one.
fn distribution(node: &mut Beam, peer: &str) {
    node.expect(
        &format!(":erpc.call(:{peer}, :erlang, :node, [])"),
        &format!(":{peer}"),
    )
    .unwrap();
    node.expect(
        &format!("blob = :crypto.strong_rand_bytes(32 * 1024 * 1024); :erpc.call(:{peer}, Function, :identity, [blob]) == blob"),
        "true",
    )
    .unwrap();
    node.expect(
        &format!(
            "{{far, ref}} = :erlang.spawn_monitor(:{peer}, :erlang, :exit, [:done]); \
             receive do {{:DOWN, ^ref, :process, ^far, reason}} -> reason after 10_000 -> :none end"
        ),
        ":done",
    )
    .unwrap();
    // A name that is registered before is told of later.
    node.expect(":global.sync()", ":ok").unwrap();
    node.expect(":global.register_name({:on, node()}, self())", ":yes")
        .unwrap();
    node.expect(
        &format!("me = node(); :erpc.call(:{peer}, :global, :whereis_name, [{{:on, me}}]) == self()"),
        "true",
    )
    .unwrap();
}

//! Consul is killed and comes back, with what it knew and without: what is registered comes back by itself, and
//! neither a live link nor a sequence of calls over it notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use meshx_tests::consul::{Consul, Setup};
use meshx_tests::{Agent, Beam, BeamBuilder, traffic, wait_until};

/// A check is refreshed every 5 s, and a registration tried again with a growing pause: three times that.
const BACK: Duration = Duration::from_secs(60);

struct World {
    consul: Consul,
    h1: Agent,
    h2: Agent,
    shop: Beam,
    cart: Beam,
    search: Beam,
}

fn world(setup: Setup) -> World {
    let consul = Consul::start_with(setup).unwrap();
    let h1 = consul.agent("a", "127.0.0.2", &["h1"]).unwrap();
    let h2 = consul.agent("b", "127.0.0.3", &["h2"]).unwrap();
    let cart = BeamBuilder::new("cart@h2").app("shop").start(&h2).unwrap();
    let search = Beam::start(&h2, "search@h2").unwrap();
    let mut shop = BeamBuilder::new("shop@h1").app("shop").start(&h1).unwrap();
    shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    shop.expect("Shop.CartClient.call(:echo, 1, 30_000, 60, 500)", "1")
        .unwrap();
    traffic::start(&mut shop).unwrap();
    World {
        consul,
        h1,
        h2,
        shop,
        cart,
        search,
    }
}

/// The calls went on all the time, and the link never ended.
fn nothing_was_noticed(world: &mut World) {
    let calls = traffic::stop(&mut world.shop).unwrap();
    println!("{calls} pairs of calls");
    assert!(calls > 20, "{calls}");
}

fn all_are_back(consul: &Consul) {
    for service in ["shop", "cart", "search", "cart-rpc"] {
        let took = consul.wait_passing(service, 1, BACK).unwrap();
        println!("{service} passes {took:?} after Consul's return");
    }
}

#[test]
fn with_its_state() {
    let mut world = world(Setup {
        keeps_state: true,
        ..Setup::default()
    });
    world.consul.kill();
    // A pair that was never asked about may not connect while nobody can be asked, however well its ends are known.
    for node in ["cart@h2", "shop@h1"] {
        let refused = world.search.eval(&format!("MeshxNode.connect(:{node})")).unwrap();
        assert!(refused.starts_with("{:error, {:not_ready, "), "{refused}");
    }
    world.consul.start_again().unwrap();
    all_are_back(&world.consul);
    world.search.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    nothing_was_noticed(&mut world);

    // Allowed before, and again while Consul is away.
    world.consul.kill();
    world.shop.expect("Node.disconnect(:cart@h2)", "true").unwrap();
    world.shop.expect("MeshxNode.connect(:cart@h2)", ":ok").unwrap();
    world.cart.expect_soon(":shop@h1 in Node.list()", "true").unwrap();
}

#[test]
fn without_its_state() {
    let mut world = world(Setup::default());
    let domain = world.consul.trust_domain().unwrap();
    for _ in 0..2 {
        world.consul.kill();
        world.consul.start_again().unwrap();
        all_are_back(&world.consul);
    }
    assert_ne!(
        world.consul.trust_domain().unwrap(),
        domain,
        "Consul should have forgotten all"
    );
    nothing_was_noticed(&mut world);
    // New links are made with the certificates of the new authority, once both agents have them.
    let wanted = format!("{:?}", world.consul.spiffe("cart").unwrap());
    let mut seen = Vec::new();
    let shop = &mut world.shop;
    wait_until(BACK, || {
        let steps = [
            "Node.disconnect(:cart@h2)",
            "MeshxNode.connect(:cart@h2)",
            "with {:ok, p} <- MeshxNode.peer(:cart@h2), do: p.spiffe",
        ];
        seen = steps.map(|step| shop.eval(step).unwrap()).to_vec();
        seen[1..] == [":ok", wanted.as_str()]
    })
    .unwrap_or_else(|()| panic!("{seen:?}, wanted {wanted}"));
    world
        .search
        .expect_soon("MeshxNode.connect(:cart@h2)", ":ok")
        .unwrap();
    for agent in [&world.h1, &world.h2] {
        assert!(agent.meshx_ok(&["names"]).unwrap().contains("cart@h2"));
    }
    // A rule of the new Consul counts. What was lost before is no answer.
    world
        .shop
        .eval("flush = fn f -> receive do _ -> f.(f) after 0 -> :ok end end; flush.(flush)")
        .unwrap();
    world.consul.deny("shop", "cart").unwrap();
    world
        .shop
        .expect(
            "receive do {:nodedown, :cart@h2} -> :ok after 20_000 -> :none end",
            ":ok",
        )
        .unwrap();
}

//! Calls one after the other, by RPC and by distribution, until they are told to stop: whoever drops one is found out.

use crate::{Beam, Context, Result};

/// Begins calls from a node with the application `shop` to `cart@h2`, and watches its links.
///
/// # Errors
/// When the node does not do as it is told.
pub fn start(shop: &mut Beam) -> Result<()> {
    shop.eval(
        "seq = fn f, n, bad -> r = [Shop.CartClient.call(:echo, n, 5_000, 0), :erpc.call(:cart@h2, Function, :identity, [n], 5_000)]; \
         bad = if r == [n, n], do: bad, else: [r | bad]; \
         receive do :stop -> {n, bad} after 5 -> f.(f, n + 1, bad) end end; :made",
    )?;
    shop.eval(":net_kernel.monitor_nodes(true)")?;
    shop.eval("task = Task.async(fn -> seq.(seq, 1, []) end)")?;
    Ok(())
}

/// Ends them; says how many there were.
///
/// # Errors
/// When a call failed, or a link ended.
pub fn stop(shop: &mut Beam) -> Result<u32> {
    shop.eval("send(task.pid, :stop); {n, bad} = Task.await(task, 60_000); n")?;
    let calls = shop.eval("n")?.parse().context("a count")?;
    shop.expect("bad", "[]")?;
    shop.expect(
        "receive do {:nodedown, node} -> node after 0 -> :none end",
        ":none",
    )?;
    Ok(calls)
}

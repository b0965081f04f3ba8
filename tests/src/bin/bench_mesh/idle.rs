//! What an idle link takes of what is between its ends.

use std::time::Duration;

use meshx_tests::bench::{free_port, memory};
use meshx_tests::control::Control;
use meshx_tests::{EchoClient, EchoServer, Result};

use crate::peers::{Kind, Stage, local};

const SOON: Duration = Duration::from_secs(60);
/// Opened first: what they need is needed once for all.
const FIRST: usize = 50;
const LINKS: usize = 500;
/// What each carries before it is idle: as much as buffers on its way may hold.
const SAID: usize = 100_000;

/// Bytes for each idle link of a plain service, at one end's agent or proxy; none where nothing is between.
pub(crate) fn idle(stage: &Stage, kind: Kind) -> Result<Option<f64>> {
    let echo = EchoServer::start([127, 0, 0, 1])?;
    let [first, second] = &stage.agents;
    // What is registered ends with its control connection.
    let (mut controls, mut proxies) = (Vec::new(), Vec::new());
    let (address, pids) = match kind {
        Kind::Native => {
            let (server, client) = (Control::connect(second)?, Control::connect(first)?);
            server.serve("idle", echo.address(), vec![])?;
            let address = client.reach("idle", "idle-client", vec![])?;
            controls.extend([server, client]);
            (address, vec![first.process.pid(), second.process.pid()])
        }
        Kind::Proxies | Kind::Envoys => {
            let upstream = local(free_port()?);
            proxies = stage.sidecars(kind, "idle", echo.address(), upstream)?;
            (upstream, proxies.iter().map(|proxy| proxy.pid()).collect())
        }
        Kind::Carrier | Kind::Relays | Kind::Sealed | Kind::Tcp | Kind::Tls | Kind::TlsTuned => {
            return Ok(None);
        }
    };
    let mut links = vec![EchoClient::connect_within(address, SOON)?];
    let mut open = |count: usize| -> Result<u64> {
        for _ in 0..count {
            let mut link = EchoClient::connect(address, SOON)?;
            link.say(&[5; SAID])?;
            links.push(link);
        }
        pids.iter().map(|pid| memory(*pid)).sum()
    };
    let (before, after) = (open(FIRST)?, open(LINKS)?);
    drop((controls, proxies));
    Ok(Some(
        after.saturating_sub(before) as f64 / (LINKS * pids.len()) as f64,
    ))
}

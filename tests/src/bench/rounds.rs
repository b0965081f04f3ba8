//! Rounds in which all peers take their turns.

use std::time::{Duration, Instant};

use crate::Result;

/// Peer by peer, its samples of all rounds. Each round begins with another peer, so that none always follows the same.
///
/// # Errors
/// The first failure of a measurement.
pub fn rounds<P, S: Clone>(
    peers: &mut [P],
    rounds: usize,
    name: &str,
    mut each: impl FnMut(&mut P) -> Result<S>,
) -> Result<Vec<Vec<S>>> {
    let started = Instant::now();
    let mut samples = vec![Vec::new(); peers.len()];
    for round in 0..rounds {
        for turn in 0..peers.len() {
            let at = (turn + round) % peers.len();
            samples[at].push(each(&mut peers[at])?);
        }
    }
    let took = Duration::from_secs(started.elapsed().as_secs());
    eprintln!("{name}: {rounds} rounds of {} peers in {took:?}", peers.len());
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_peer_is_measured_in_every_round_and_begins_in_its_turn() -> Result<()> {
        let mut order = Vec::new();
        let samples = rounds(&mut ['a', 'b'], 3, "test", |peer| {
            order.push(*peer);
            Ok(order.len())
        })?;
        assert_eq!(order, ['a', 'b', 'b', 'a', 'a', 'b']);
        assert_eq!(samples, [[1, 4, 5], [2, 3, 6]]);
        Ok(())
    }
}

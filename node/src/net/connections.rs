//! Which of a peer's connections are of use.
//!
//! A message goes by any of them, in turn. One to a process that was killed, or that a cut has severed, takes messages until it
//! times out ([`super::control`]); meanwhile a part of what is sent goes nowhere. So those are closed as soon as one can tell:
//!
//! - **another life.** Each process draws a number and says it when a connection is made (libp2p's identify, in the agent's
//!   name, written as RFC 9110 section 10.1.5 writes products). What is older than a connection to the latest life, and led to
//!   another, is closed.
//! - **the same life**, or one that says nothing. Who dials although there is a connection has lost that one, unless both have
//!   dialled at the same time ([`SAME_TIME`]).
//!
//! **Bounds.** As many as libp2p's limits let be established.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

/// A second connection to one life of a peer younger than this is a simultaneous dial.
const SAME_TIME: Duration = Duration::from_secs(3);
const PRODUCT: &str = "life/";

/// One process of a node; another has another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life(u64);

impl Life {
    /// A number of its own.
    pub(super) fn draw() -> Life {
        Life(fastrand::u64(..))
    }

    /// What a node says that it is.
    pub(super) fn agent(self) -> String {
        format!("moyai/{} {PRODUCT}{:016x}", env!("CARGO_PKG_VERSION"), self.0)
    }

    /// Whose life an agent says it is; `None` for those who do not say.
    pub(super) fn of(agent: &str) -> Option<Life> {
        let digits = agent.split(' ').find_map(|product| product.strip_prefix(PRODUCT))?;
        u64::from_str_radix(digits, 16).ok().map(Life)
    }
}

struct Open {
    id: ConnectionId,
    since: Instant,
    life: Option<Life>,
}

/// All that are established, of each peer the oldest first.
#[derive(Default)]
pub(super) struct Connections(HashMap<PeerId, Vec<Open>>);

impl Connections {
    /// There is one more; those that are to be closed for it.
    pub(super) fn established(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        dialled: bool,
        now: Instant,
    ) -> Vec<ConnectionId> {
        let open = self.0.entry(peer).or_default();
        let lost = |known: &&Open| !dialled && now.duration_since(known.since) > SAME_TIME;
        let stale = open.iter().filter(lost).map(|known| known.id).collect();
        open.push(Open { id, since: now, life: None });
        stale
    }

    /// It leads to that life; those that are to be closed, since they do not lead to the latest.
    pub(super) fn identified(&mut self, peer: &PeerId, id: ConnectionId, life: Life) -> Vec<ConnectionId> {
        let Some(open) = self.0.get_mut(peer) else { return Vec::new() };
        if let Some(known) = open.iter_mut().find(|known| known.id == id) {
            known.life = Some(life);
        }
        let latest = open.iter().rev().find_map(|known| known.life);
        let earlier = |known: &&Open| known.life.is_some() && known.life != latest;
        open.iter().filter(earlier).map(|known| known.id).collect()
    }

    /// It is no more.
    pub(super) fn closed(&mut self, peer: &PeerId, id: ConnectionId) {
        if let Some(open) = self.0.get_mut(peer) {
            open.retain(|known| known.id != id);
            if open.is_empty() {
                self.0.remove(peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_an_earlier_life_is_closed_whoever_tells_first() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let [one, two, three] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let (earlier, later) = (Life(1), Life(2));
        for late in [false, true] {
            let mut all = Connections::default();
            assert_eq!(all.established(peer, one, false, now), []);
            if !late {
                assert_eq!(all.identified(&peer, one, earlier), []);
            }
            assert_eq!(all.established(peer, two, false, now), [], "both may have dialled");
            assert_eq!(all.identified(&peer, two, later), if late { vec![] } else { vec![one] });
            if late {
                // It said so while it lived, and that was not heard until now.
                assert_eq!(all.identified(&peer, one, earlier), [one]);
            }
            all.closed(&peer, one);
            assert_eq!(all.established(peer, three, true, now), []);
            assert_eq!(all.identified(&peer, three, later), [], "of one life there may be several");
            all.closed(&peer, two);
            all.closed(&peer, three);
            assert!(all.0.is_empty());
        }
    }

    #[test]
    fn who_dials_again_has_lost_what_is_older() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let [one, two, three] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let mut all = Connections::default();
        assert_eq!(all.established(peer, one, true, now), []);
        assert_eq!(all.established(peer, two, true, now + SAME_TIME * 2), [], "this side has its reasons");
        assert_eq!(all.established(peer, three, false, now + SAME_TIME * 2), [one]);
    }

    #[test]
    fn a_life_is_said_among_other_things() {
        let life = Life::draw();
        assert_eq!(Life::of(&life.agent()), Some(life));
        assert_eq!(Life::of("moyai/0.1.0"), None);
        assert_eq!(Life::of("moyai/0.1.0 life/nothing"), None);
    }
}

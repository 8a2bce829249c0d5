//! Which of a peer's connections are of use.
//!
//! A message goes by any of them, in turn. One to a process that was killed, or that a cut has severed, takes messages until it
//! times out ([`super::control`]); meanwhile a part of what is sent goes nowhere. So those are closed as soon as one can tell,
//! which is when the next is established:
//!
//! - **another life** ([`Life`], said before a connection is established). What is older and led to another is closed.
//! - **the same life.** Who dials although there is a connection has lost that one, unless both have dialled at the same time
//!   ([`SAME_TIME`]).
//!
//! **Who writes what.** The transport notes whom it admitted, and the swarm tells of the connection a moment later; that names
//! the peer alone, so the connection is taken for one of the life noted last. Should two lives be admitted within that moment,
//! the earlier's connection stays until it times out.
//!
//! **Bounds.** As many as libp2p's limits let be established; of those noted one for each that was ever a member.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

use super::admission::Life;

/// A second connection to one life of a peer younger than this is a simultaneous dial.
const SAME_TIME: Duration = Duration::from_secs(3);

struct Open {
    id: ConnectionId,
    life: Life,
    since: Instant,
}

/// All that are established, of each peer the oldest first.
#[derive(Default)]
pub(super) struct Connections(HashMap<PeerId, Vec<Open>>);

impl Connections {
    /// There is one more, to that life; those that are to be closed for it.
    pub(super) fn established(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        life: Life,
        dialled: bool,
        now: Instant,
    ) -> Vec<ConnectionId> {
        let open = self.0.entry(peer).or_default();
        let is_lost = |known: &&Open| !dialled && now.duration_since(known.since) > SAME_TIME;
        let stale = open.iter().filter(|known| known.life != life || is_lost(known)).map(|known| known.id).collect();
        open.push(Open { id, life, since: now });
        stale
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
    fn what_leads_to_an_earlier_life_is_closed() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let [one, two, three] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let [earlier, later] = [1, 2].map(Life::of_test);
        for dialled in [false, true] {
            let mut all = Connections::default();
            assert_eq!(all.established(peer, one, earlier, dialled, now), []);
            assert_eq!(all.established(peer, two, later, dialled, now), [one]);
            all.closed(&peer, one);
            assert_eq!(all.established(peer, three, later, dialled, now), [], "both may have dialled");
            all.closed(&peer, two);
            all.closed(&peer, three);
            assert!(all.0.is_empty());
        }
    }

    #[test]
    fn who_dials_again_has_lost_what_is_older() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let [one, two, three] = [1, 2, 3].map(ConnectionId::new_unchecked);
        let life = Life::of_test(1);
        let mut all = Connections::default();
        assert_eq!(all.established(peer, one, life, true, now), []);
        assert_eq!(all.established(peer, two, life, true, now + SAME_TIME * 2), [], "this side has its reasons");
        assert_eq!(all.established(peer, three, life, false, now + SAME_TIME * 2), [one]);
    }
}

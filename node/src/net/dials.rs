//! Whom to dial, when again, and whom to ask others for.
//!
//! Of a peer that is not connected: *nothing known*, *under way* (at most [`MAX_WAITING`] messages wait for it), or
//! *failed* a moment ago, and then it is left alone for [`DIAL_REST`]. Only the swarm's task writes it; a message that is
//! refused is lost, as any may be.
//!
//! **Asking others** (a Kademlia look-up) dials on its own account, and those dials fail too where the network is gone.
//! A look-up that begins at each failure is a loop then, and one that grows: eight nodes whose switch was taken
//! away kept two cores busy for as long as it lasted. So only a dial of ours that failed asks, of each peer once in
//! [`LOOK_UP_REST`], at most [`MAX_LOOK_UPS`] at a time.
//!
//! Bounds: peers are the mesh's members, for nobody else is sent to.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Messages that wait for one dial.
const MAX_WAITING: u32 = 64;
/// A member that could not be dialled is not dialled again sooner.
const DIAL_REST: Duration = Duration::from_millis(700);
/// Others are not asked for a member again sooner.
const LOOK_UP_REST: Duration = Duration::from_secs(30);
const MAX_LOOK_UPS: usize = 4;

/// What to do about a message to a peer that is not connected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Drop it.
    Drop,
    /// Let it wait for the dial that is under way.
    Wait,
    /// Dial, and let it wait.
    Dial,
}

#[derive(Default)]
struct Dial {
    under_way: bool,
    waiting: u32,
    failed: Option<Instant>,
    asked: Option<Instant>,
}

/// All of it, by peers `P` and look-ups `Q`.
pub(super) struct Dials<P, Q> {
    each: HashMap<P, Dial>,
    look_ups: HashSet<Q>,
}

impl<P, Q> Default for Dials<P, Q> {
    fn default() -> Self {
        Self { each: HashMap::new(), look_ups: HashSet::new() }
    }
}

impl<P: Eq + Hash, Q: Eq + Hash> Dials<P, Q> {
    /// A message wants to go to a peer that is not connected.
    pub(super) fn message(&mut self, peer: P, now: Instant) -> Wish {
        let dial = self.each.entry(peer).or_default();
        let resting = dial.failed.is_some_and(|failed| now.duration_since(failed) < DIAL_REST);
        if resting || dial.waiting >= MAX_WAITING {
            return Wish::Drop;
        }
        dial.waiting += 1;
        if std::mem::replace(&mut dial.under_way, true) { Wish::Wait } else { Wish::Dial }
    }

    /// The dial that was wished for has not begun, and nothing will be heard of it.
    pub(super) fn not_begun(&mut self, peer: &P) {
        if let Some(dial) = self.each.get_mut(peer) {
            (dial.under_way, dial.waiting) = (false, 0);
        }
    }

    /// It is connected, or nobody says any more where it could be.
    pub(super) fn forget(&mut self, peer: &P) {
        self.each.remove(peer);
    }

    /// A dial failed, whoever began it. Whether others shall be asked where it is, by a look-up that is then told to
    /// [`Self::look_up_began`].
    pub(super) fn failed(&mut self, peer: P, now: Instant) -> bool {
        let dial = self.each.entry(peer).or_default();
        let ours = std::mem::replace(&mut dial.under_way, false);
        (dial.waiting, dial.failed) = (0, Some(now));
        let rested = dial.asked.is_none_or(|asked| now.duration_since(asked) >= LOOK_UP_REST);
        let ask = ours && rested && self.look_ups.len() < MAX_LOOK_UPS;
        if ask {
            dial.asked = Some(now);
        }
        ask
    }

    /// Others are being asked.
    pub(super) fn look_up_began(&mut self, look_up: Q) {
        self.look_ups.insert(look_up);
    }

    /// A look-up is over, of ours or not.
    pub(super) fn look_up_over(&mut self, look_up: &Q) {
        self.look_ups.remove(look_up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the swarm does without a network: each dial fails, and each look-up dials every member, which fails.
    /// Returns the look-ups that began.
    fn without_network(members: u32, seconds: u32) -> usize {
        let mut dials: Dials<u32, usize> = Dials::default();
        let (start, mut begun) = (Instant::now(), 0);
        for step in 0..seconds * 10 {
            let now = start + Duration::from_millis(100) * step;
            let mut failing: Vec<u32> = (0..members).filter(|peer| dials.message(*peer, now) == Wish::Dial).collect();
            while let Some(peer) = failing.pop() {
                if dials.failed(peer, now) {
                    dials.look_up_began(begun);
                    begun += 1;
                    assert!(begun < 10_000, "each failure begins another");
                    failing.extend(0..members);
                }
            }
            (0..begun).for_each(|look_up| dials.look_up_over(&look_up));
        }
        begun
    }

    #[test]
    fn a_node_without_network_asks_for_each_member_once_in_a_while() {
        let begun = without_network(7, 60);
        assert!((7..=21).contains(&begun), "{begun} look-ups in a minute for seven members");
    }

    #[test]
    fn look_ups_at_one_time_are_few() {
        let mut dials: Dials<u32, usize> = Dials::default();
        let now = Instant::now();
        let asked = (0..50).filter(|peer| {
            assert_eq!(dials.message(*peer, now), Wish::Dial);
            let ask = dials.failed(*peer, now);
            if ask {
                dials.look_up_began(*peer as usize);
            }
            ask
        });
        assert_eq!(asked.count(), MAX_LOOK_UPS);
    }

    #[test]
    fn messages_wait_for_one_dial_and_few_of_them() {
        let mut dials: Dials<u32, usize> = Dials::default();
        let now = Instant::now();
        assert_eq!(dials.message(1, now), Wish::Dial);
        let waiting = (0..100).filter(|_| dials.message(1, now) == Wish::Wait).count();
        assert_eq!(waiting, MAX_WAITING as usize - 1);
        dials.failed(1, now);
        assert_eq!(dials.message(1, now), Wish::Drop, "it rests");
        assert_eq!(dials.message(1, now + DIAL_REST), Wish::Dial);
        dials.not_begun(&1);
        assert_eq!(dials.message(1, now + DIAL_REST), Wish::Dial);
    }
}

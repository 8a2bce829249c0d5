//! Whose turn it is to fetch something from outside of the mesh, so that nodes which want the same at one time do not each fetch
//! it: one does, and the others have it from that one.
//!
//! **States** of a name, at its *steward*, the first live member by rendezvous hash of both: nobody's → somebody's, for [`TURN`]
//! after each time it asks again → over. Of one that ended well, whoever waited for it, or does not ask for the newest, is told the root for
//! [`REMEMBERED`];
//! one that failed or fell silent is nobody's again, and the next to ask has it.
//!
//! **Who writes.** The steward alone, in memory. Nobody needs its word: whoever hears none for a while fetches by itself, as does
//! whoever asks a steward that has lost it. Two stewards (of a mesh that is parted, or one that has just changed) cost a second
//! fetch, and so does a second name for the same; nothing else depends on it.
//!
//! A member that may not submit has no turn, and fetches when it likes: others would not take a name from it.
//!
//! **Bounds.** [`MAX_TURNS`] names at a steward, and [`MAX_ASKED`] that a node asks about; beyond them everybody's turn is now.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::{ChunkId, NodeId};
use crate::reference::Reference;
use crate::time::Instant;

/// For so long a turn is somebody's who does not ask again.
pub const TURN: Duration = Duration::from_secs(20);
/// For so long after its end it is told what came of it.
const REMEMBERED: Duration = Duration::from_secs(120);
const MAX_TURNS: usize = 1024;
const MAX_ASKED: usize = 64;

/// What a steward answers.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Turn {
    /// Fetch it.
    Yours,
    /// This one fetches it: ask again.
    Theirs(NodeId),
    /// It has been fetched: the image of this root.
    Over(ChunkId),
}

#[derive(Copy, Clone, Debug)]
enum Held {
    By(NodeId),
    Over(ChunkId),
}

#[derive(Debug)]
struct Asked {
    reference: Reference,
    steward: NodeId,
    answer: Option<Turn>,
}

/// What a node knows of turns: those it decides on, and those it has asked about.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Each until then.
    held: BTreeMap<Reference, (Held, Instant)>,
    /// Of whom, and what they answered; what was asked about first comes first.
    asked: VecDeque<Asked>,
}

impl Turns {
    /// Somebody asks for a turn, or for more time; `shares` is whether what another has fetched a moment ago
    /// will do.
    pub(crate) fn request(&mut self, from: NodeId, reference: Reference, shares: bool, now: Instant) -> Turn {
        self.held.retain(|_, (_, until)| *until > now);
        match self.held.get(&reference) {
            Some((Held::By(other), _)) if *other != from => return Turn::Theirs(*other),
            Some((Held::Over(root), _)) if shares => return Turn::Over(*root),
            None if self.held.len() >= MAX_TURNS => return Turn::Yours,
            _ => {}
        }
        self.held.insert(reference, (Held::By(from), now + TURN));
        Turn::Yours
    }

    /// Whose turn it was has ended it, with this image or none.
    pub(crate) fn end(&mut self, from: NodeId, reference: Reference, root: Option<ChunkId>, now: Instant) {
        let is_theirs = matches!(self.held.get(&reference), Some((Held::By(who), _)) if *who == from);
        match root {
            _ if !is_theirs => {}
            Some(root) => drop(self.held.insert(reference, (Held::Over(root), now + REMEMBERED))),
            None => drop(self.held.remove(&reference)),
        }
    }

    /// This node asks `steward`.
    pub(crate) fn asks(&mut self, steward: NodeId, reference: Reference) {
        if let Some(asked) = self.asked.iter_mut().find(|asked| asked.reference == reference) {
            (asked.steward, asked.answer) = (steward, None);
            return;
        }
        if self.asked.len() >= MAX_ASKED {
            self.asked.pop_front();
        }
        self.asked.push_back(Asked { reference, steward, answer: None });
    }

    /// It answers.
    pub(crate) fn answered(&mut self, from: NodeId, reference: &Reference, turn: Turn) {
        let mut asked = self.asked.iter_mut().filter(|asked| asked.reference == *reference && asked.steward == from);
        if let Some(asked) = asked.next() {
            asked.answer = Some(turn);
        }
    }

    /// What the steward has answered since it was asked last.
    pub(crate) fn answer(&self, reference: &Reference) -> Option<Turn> {
        self.asked.iter().find(|asked| asked.reference == *reference)?.answer
    }

    /// Whether its bounds hold.
    pub(crate) fn invariants(&self) {
        assert!(self.held.len() <= MAX_TURNS && self.asked.len() <= MAX_ASKED, "turns are bounded");
    }

    /// This node asks no more; whom it asked last.
    pub(crate) fn forget(&mut self, reference: &Reference) -> Option<NodeId> {
        let at = self.asked.iter().position(|asked| asked.reference == *reference)?;
        self.asked.remove(at).map(|asked| asked.steward)
    }
}

/// The steward of a name among `members`.
pub(crate) fn steward(reference: &Reference, members: impl Iterator<Item = NodeId>) -> Option<NodeId> {
    let rank = |node: &NodeId| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(reference.to_string().as_bytes());
        hasher.update(&node.0);
        *hasher.finalize().as_bytes()
    };
    members.max_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "quay.io/a/b:1";

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 32])
    }

    fn reference() -> Reference {
        NAME.parse().expect("a name")
    }

    #[test]
    fn one_fetches_and_who_waited_hears_what_came_of_it() {
        let (mut turns, now) = (Turns::default(), Instant::ZERO + Duration::from_secs(1));
        let root = ChunkId([7; 32]);
        assert_eq!(turns.request(node(1), reference(), false, now), Turn::Yours);
        assert_eq!(turns.request(node(2), reference(), false, now), Turn::Theirs(node(1)));
        assert_eq!(turns.request(node(1), reference(), false, now), Turn::Yours, "it asks for more time");
        turns.end(node(2), reference(), Some(root), now);
        assert_eq!(turns.request(node(2), reference(), true, now), Turn::Theirs(node(1)), "it was not theirs to end");
        turns.end(node(1), reference(), Some(root), now);
        assert_eq!(turns.request(node(2), reference(), true, now), Turn::Over(root));
        // Somebody who wants what the registry has now.
        assert_eq!(turns.request(node(3), reference(), false, now), Turn::Yours);
    }

    #[test]
    fn a_turn_that_failed_or_fell_silent_is_the_next_one_s() {
        let (mut turns, mut now) = (Turns::default(), Instant::ZERO + Duration::from_secs(1));
        assert_eq!(turns.request(node(1), reference(), false, now), Turn::Yours);
        turns.end(node(1), reference(), None, now);
        assert_eq!(turns.request(node(2), reference(), true, now), Turn::Yours);
        now = now + TURN / 2;
        assert_eq!(turns.request(node(3), reference(), true, now), Turn::Theirs(node(2)));
        now = now + TURN / 2;
        assert_eq!(turns.request(node(3), reference(), true, now), Turn::Yours);
        turns.end(node(2), reference(), Some(ChunkId([7; 32])), now);
        assert_eq!(turns.request(node(2), reference(), true, now), Turn::Theirs(node(3)), "it came too late");
    }

    #[test]
    fn only_who_was_asked_answers() {
        let mut turns = Turns::default();
        turns.answered(node(1), &reference(), Turn::Yours);
        turns.asks(node(1), reference());
        turns.answered(node(2), &reference(), Turn::Over(ChunkId([7; 32])));
        assert_eq!(turns.answer(&reference()), None);
        turns.answered(node(1), &reference(), Turn::Yours);
        assert_eq!(turns.answer(&reference()), Some(Turn::Yours));
        for at in 0..=MAX_ASKED {
            turns.asks(node(1), format!("quay.io/a/b:{at}").parse().expect("a name"));
        }
        assert_eq!(turns.asked.len(), MAX_ASKED);
        turns.invariants();
        assert!(
            turns.asked.iter().all(|asked| asked.reference != reference()),
            "the one that was asked about first is given up"
        );
    }

    #[test]
    fn a_steward_of_a_thousand_names_says_no_to_nobody() {
        let (mut turns, now) = (Turns::default(), Instant::ZERO);
        for at in 0..2 * MAX_TURNS {
            let name: Reference = format!("quay.io/a/b:{at}").parse().expect("a name");
            assert_eq!(turns.request(node(1), name, false, now), Turn::Yours);
        }
        assert_eq!(turns.held.len(), MAX_TURNS);
    }
}

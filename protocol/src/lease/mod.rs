//! At most one of it, anywhere, at any time: leases for `--singleton` workloads (Gray, Cheriton 1989).
//!
//! **Who grants.** A workload's *custodians*: 1, 3 or 5 nodes that are written down as its [`Seats`], each set with a
//! number, its term. A replica runs only while a majority of them has granted a lease of [`TTL`] to its node.
//!
//! **Time.** The holder counts the ttl from before it asked, shortened by the bound on clock rates ([`SHORT`]); a custodian
//! counts it from when it answered, lengthened by it ([`LONG`]). So with clocks that run up to 1 % wrong the holder's
//! lease is over before any custodian of that majority grants another. [`MARGIN`] before its end the container is
//! killed by a process beside its shim that does nothing else: it reads the time of the end, and needs no daemon for it.
//!
//! **A custodian that may have forgotten** what it granted, because it has just started, grants nothing for one
//! [`LONG`]. Leases are therefore never written to disk. Terms, promises and votes are, before they are answered.
//!
//! **Changing the seats.** Replacing a dead custodian, or adding one to a mesh that has grown, is a decision of a
//! majority of the old ones, one change at a time: single-decree Paxos (Lamport 2001) for each next term. A custodian
//! that has *accepted* the next seats grants nothing under the old ones any more, so once they are decided no old majority
//! can grant; leases that it granted before last for one `LONG` at most, and a node that is new among the seats
//! grants nothing for as long. A majority of the new seats has such a node in it, or consists of old ones alone, of
//! which one at least remembers what any old majority granted: one change at a time is what makes that true.
//!
//! **If either side dies between two messages.** A lost request or grant is asked for again; a proposer that dies leaves
//! promises and votes, and whoever has voted and sees no decision proposes what it has voted for. If a majority is
//! gone for good nothing is ever granted again, and an admin may force new seats ([`Seats::forced`]) with what that
//! risks: the old holder may still run on the other side of a cut.
//!
//! **What is trusted.** Custodians may die, and may be slow; they do not lie: one that does could grant twice. What others
//! say of seats is not believed: the first seats and forced ones are the submitters' word, in the workload's fact; later
//! ones are taken only from who had a seat before. Leases are given only to who has been awarded the placement.
//!
//! **Bounds.** [`MAX_SEATS`] custodians; [`MAX_SEATED`] workloads a node is custodian of; eight requests under way for each
//! lease; one proposal a workload.

mod custodian;
mod holder;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::NodeId;

pub use custodian::{Ballot, Custodian, SeatRecord};
pub use holder::{Holder, News};

/// How long a lease lasts.
pub const TTL: Duration = Duration::from_secs(8);
/// As its holder counts: a clock that is 1 % slow still ends it in time.
pub const SHORT: Duration = Duration::from_millis(7_920);
/// As its custodians count: a clock that is 1 % fast does not end it too soon.
pub const LONG: Duration = Duration::from_millis(8_080);
/// Between two renewals.
pub const RENEW: Duration = Duration::from_secs(2);
/// Between two requests for a lease that is not held yet.
const ASK: Duration = Duration::from_millis(500);
/// So long before the end of its lease a container is killed: it must be dead by then.
pub const MARGIN: Duration = Duration::from_secs(1);
/// A custodian that has been down for this long is replaced.
pub const REPLACE: Duration = Duration::from_secs(10);
/// The most custodians of one workload.
pub const MAX_SEATS: usize = 5;
/// The most workloads that one node is custodian of; beyond it, it grants nothing for a further one.
pub const MAX_SEATED: usize = 10_000;
/// Terms that an admin has forced are multiples of this, and a number.
const ERA: u64 = 1 << 32;
/// The highest term: what names a higher one is nobody's, so that arithmetic on terms never wraps.
const MAX_TERM: u64 = 1 << 62;

/// Who grants the leases of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seats {
    /// Of two, the higher is right. From 1.
    pub term: u64,
    /// The custodians, first the one that proposes changes.
    pub nodes: Vec<NodeId>,
}

impl Seats {
    /// The first of a workload.
    pub fn first(nodes: Vec<NodeId>) -> Seats {
        Seats { term: 1, nodes }
    }

    /// Those that an admin puts in place of these, whatever they still decide. Two admins that do so at once make two
    /// terms, of which one is the higher. None when no term is left.
    pub fn forced(&self, nodes: Vec<NodeId>) -> Option<Seats> {
        let own = blake3::hash(&crate::codec::encode(&nodes));
        let number = u64::from(u16::from_be_bytes([own.as_bytes()[0], own.as_bytes()[1]])) << 15;
        let seats = Seats { term: (self.era() + 1).checked_mul(ERA)?.checked_add(number)?, nodes };
        seats.is_good().then_some(seats)
    }

    /// How often they were forced.
    pub fn era(&self) -> u64 {
        self.term / ERA
    }

    /// Whether `later` may have been decided by these, or by those that these decided on, as `author` says.
    pub fn may_become(&self, later: &Seats, author: &NodeId) -> bool {
        later.is_good() && later.era() == self.era() && later.term > self.term && self.nodes.contains(author)
    }

    /// How many a majority is.
    pub fn majority(&self) -> usize {
        self.nodes.len() / 2 + 1
    }

    /// Whether these can be anybody's.
    pub fn is_good(&self) -> bool {
        (1..=MAX_TERM).contains(&self.term)
            && (1..=MAX_SEATS).contains(&self.nodes.len())
            && self.nodes.iter().enumerate().all(|(at, node)| !self.nodes[..at].contains(node))
    }

    /// Those with one change, if one is due: a custodian that is `lost` is replaced by the first of `others`, and seats
    /// are added while a mesh of `members` should have more.
    pub fn changed(&self, lost: impl Fn(&NodeId) -> bool, others: &[NodeId], members: usize) -> Option<Seats> {
        let new = others.iter().find(|node| !self.nodes.contains(node))?;
        let mut nodes = self.nodes.clone();
        match self.nodes.iter().position(lost) {
            Some(at) => {
                nodes.remove(at);
                nodes.push(*new);
            }
            None if nodes.len() < seats_for(members) => nodes.push(*new),
            None => return None,
        }
        let seats = Seats { term: self.term.checked_add(1)?, nodes };
        seats.is_good().then_some(seats)
    }
}

/// How many custodians a workload has in a mesh of so many nodes: an even number would only be one more to lose.
pub fn seats_for(members: usize) -> usize {
    match members {
        0..3 => 1,
        3..50 => 3,
        _ => MAX_SEATS,
    }
}

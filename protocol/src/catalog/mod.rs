//! What the mesh knows, replicated to every node; each fact with one writer at a time (see [`Fact`]).
//!
//! **States.** A fact is absent, present in one version, or a tombstone. The higher stamp wins, then the higher
//! content hash, so that two nodes given the same facts in any order hold the same.
//!
//! **Spread.** A fact that is new to a node is pushed at once: by its author to everybody in a mesh of up to
//! [`PUSH_ALL`], else by each node that learns it to [`FANOUT`] others. What pushing misses, [`reconcile`] finds: every
//! [`RECONCILE`] with one random member, and at once with a member that comes back.
//!
//! **If either side dies between two messages** nothing is lost but time: pushes are not answered, and reconciliation
//! keeps no state between messages.
//!
//! **Bounds.** [`MAX_FACTS`] facts of at most [`fact::MAX_FACT`] bytes; a stamp more than [`hlc::MAX_SKEW`] ahead is
//! refused and its author told. Tombstones are forgotten after [`TOMBSTONE`]; a node that was away for longer drops
//! its copy before it speaks, so nothing deleted comes back.

pub mod fact;
pub mod hlc;
pub mod reconcile;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::id::{KeyHash, MeshId, NodeId, WorkloadId};
use crate::time::UnixMillis;

pub use fact::{Body, Fact, FactError, ImageHeld, Key, NodeFact, PlacementFact, Said, WorkloadFact};
pub use hlc::{Clock, Hlc, MAX_SKEW};
pub use reconcile::Range;

/// In a mesh of up to this many nodes, an author pushes to all.
pub const PUSH_ALL: usize = 16;
/// In a larger one, each node pushes what is new to it to so many.
pub const FANOUT: usize = 4;
/// Between two reconciliations started by one node.
pub const RECONCILE: Duration = Duration::from_secs(2);
/// The most facts a node keeps; a new key beyond it is refused.
pub const MAX_FACTS: usize = 200_000;
/// Of those, the most by one author: one member cannot fill the catalog for all.
pub const MAX_BY_AUTHOR: usize = 50_000;
/// How long a tombstone is kept.
pub const TOMBSTONE: Duration = Duration::from_secs(7 * 24 * 3600);

/// One fact with what it says.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As it travels.
    pub fact: Arc<Fact>,
    /// What it says.
    pub said: Said,
}

/// What came of offering a fact to the catalog.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was new, or newer.
    New,
    /// This or a later version was here.
    Known,
}

/// Why a fact was not taken up. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotTaken {
    /// It is not to be believed.
    #[error(transparent)]
    Fact(#[from] FactError),
    /// Its author's clock is wrong.
    #[error("a fact stamped {ahead} ms in the future")]
    Future {
        /// By how much.
        ahead: i64,
    },
    /// Its author has not shown its certificates: they come with its node's report, which comes first.
    #[error("a fact by node {}, which has shown no certificate", author.short())]
    Stranger {
        /// Who wrote it.
        author: NodeId,
    },
    /// There is no room for another key.
    #[error("the catalog holds {limit} facts already")]
    Full {
        /// Of all authors, or of this one.
        limit: usize,
    },
}

/// The facts one node knows.
#[derive(Debug)]
pub struct Catalog {
    mesh: MeshId,
    facts: BTreeMap<Key, Entry>,
    keys: BTreeMap<KeyHash, Key>,
    index: reconcile::Index,
    /// Placement keys again, by what runs rather than where.
    located: BTreeSet<(WorkloadId, u32, NodeId)>,
    by_author: BTreeMap<NodeId, usize>,
}

impl Catalog {
    /// Nothing known yet.
    pub fn new(mesh: MeshId) -> Self {
        Catalog {
            mesh,
            facts: BTreeMap::new(),
            keys: BTreeMap::new(),
            index: BTreeMap::new(),
            located: BTreeSet::new(),
            by_author: BTreeMap::new(),
        }
    }

    /// Takes a fact up if it is good and newer than what is here.
    pub fn offer(&mut self, fact: Arc<Fact>, now: UnixMillis) -> Result<Taken, NotTaken> {
        if self.facts.get(&fact.key).is_some_and(|entry| !supersedes(&fact, &entry.fact)) {
            return Ok(Taken::Known);
        }
        let ahead = fact.version.ahead_of(now);
        if ahead > MAX_SKEW.as_millis() as i64 {
            return Err(NotTaken::Future { ahead });
        }
        if self.facts.len() >= MAX_FACTS && !self.facts.contains_key(&fact.key) {
            return Err(NotTaken::Full { limit: MAX_FACTS });
        }
        // A key is quickly made: only a node whose certificates are known here says anything else.
        let reports = matches!(fact.key, Key::Node(_) | Key::Workload(_));
        if !reports && self.node(&fact.author).is_none() {
            return Err(NotTaken::Stranger { author: fact.author });
        }
        let said = fact.open(&self.mesh)?;
        let replaced = self.facts.get(&fact.key).map(|entry| entry.fact.author);
        if replaced != Some(fact.author) {
            if self.by_author.get(&fact.author).copied().unwrap_or(0) >= MAX_BY_AUTHOR {
                return Err(NotTaken::Full { limit: MAX_BY_AUTHOR });
            }
            if let Some(before) = replaced {
                self.uncount(&before);
            }
            *self.by_author.entry(fact.author).or_default() += 1;
        }
        let hash = fact.key.hash();
        self.index.insert(hash, fact.version);
        self.keys.insert(hash, fact.key);
        if let Key::Placement(node, workload, replica) = fact.key {
            self.located.insert((workload, replica, node));
        }
        self.facts.insert(fact.key, Entry { fact, said });
        Ok(Taken::New)
    }

    /// Forgets tombstones, and what nodes said that are gone, once older than [`TOMBSTONE`]; returns their keys.
    pub fn expire(&mut self, now: UnixMillis, is_live: impl Fn(&NodeId) -> bool) -> Vec<Key> {
        let old = |entry: &Entry| now.0.saturating_sub(entry.fact.version.time().0) > TOMBSTONE.as_millis() as u64;
        let dead = |entry: &Entry| match &entry.said {
            Said::Gone => true,
            Said::Workload { fact, .. } => fact.removed,
            _ => entry.fact.key.owner().is_some_and(|owner| !is_live(&owner)),
        };
        let keys: Vec<Key> =
            self.facts.iter().filter(|(_, entry)| dead(entry) && old(entry)).map(|(key, _)| *key).collect();
        for key in &keys {
            self.forget(key);
        }
        keys
    }

    /// Takes a fact out as if it had never been heard of.
    pub fn forget(&mut self, key: &Key) -> Option<Entry> {
        let hash = key.hash();
        self.keys.remove(&hash);
        self.index.remove(&hash);
        if let Key::Placement(node, workload, replica) = key {
            self.located.remove(&(*workload, *replica, *node));
        }
        let entry = self.facts.remove(key)?;
        self.uncount(&entry.fact.author);
        Some(entry)
    }

    fn uncount(&mut self, author: &NodeId) {
        if let Some(count) = self.by_author.get_mut(author) {
            *count -= 1;
            if *count == 0 {
                self.by_author.remove(author);
            }
        }
    }

    /// The stamps, for reconciliation.
    pub fn index(&self) -> &reconcile::Index {
        &self.index
    }

    /// The fact with this key hash.
    pub fn by_hash(&self, hash: &KeyHash) -> Option<&Arc<Fact>> {
        self.keys.get(hash).and_then(|key| self.facts.get(key)).map(|entry| &entry.fact)
    }

    /// One fact.
    pub fn get(&self, key: &Key) -> Option<&Entry> {
        self.facts.get(key)
    }

    /// Every fact, tombstones too.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.facts.iter()
    }

    /// What a node says of itself.
    pub fn node(&self, node: &NodeId) -> Option<&NodeFact> {
        match self.facts.get(&Key::Node(*node)).map(|entry| &entry.said) {
            Some(Said::Node(fact)) => Some(fact),
            _ => None,
        }
    }

    /// Every node's report.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &NodeFact)> {
        let last = Key::Placement(NodeId([0; 32]), WorkloadId([0; 16]), 0);
        self.facts.range(Key::Node(NodeId([0; 32]))..last).filter_map(|(key, entry)| match (key, &entry.said) {
            (Key::Node(node), Said::Node(fact)) => Some((*node, fact)),
            _ => None,
        })
    }

    /// A workload that is not removed.
    pub fn workload(&self, id: &WorkloadId) -> Option<Workload<'_>> {
        self.facts.get(&Key::Workload(*id)).and_then(Workload::of)
    }

    /// Every workload that is not removed.
    pub fn workloads(&self) -> impl Iterator<Item = Workload<'_>> {
        self.facts.range(Key::Workload(WorkloadId([0; 16]))..).filter_map(|(_, entry)| Workload::of(entry))
    }

    /// Every placement that some node tells of.
    pub fn placements(&self) -> impl Iterator<Item = Placement<'_>> {
        let first = Key::Placement(NodeId([0; 32]), WorkloadId([0; 16]), 0);
        let last = Key::Pending(NodeId([0; 32]), WorkloadId([0; 16]));
        self.facts.range(first..last).filter_map(|(key, entry)| match (key, &entry.said) {
            (Key::Placement(node, workload, replica), Said::Placement(fact)) => {
                Some(Placement { node: *node, workload: *workload, replica: *replica, fact })
            }
            _ => None,
        })
    }

    /// Every placement of one workload, by replica.
    pub fn placements_of(&self, workload: &WorkloadId) -> impl Iterator<Item = Placement<'_>> {
        let first = (*workload, 0, NodeId([0; 32]));
        let last = (*workload, u32::MAX, NodeId([255; 32]));
        self.located.range(first..=last).filter_map(|&(workload, replica, node)| {
            match self.facts.get(&Key::Placement(node, workload, replica)).map(|entry| &entry.said) {
                Some(Said::Placement(fact)) => Some(Placement { node, workload, replica, fact }),
                _ => None,
            }
        })
    }

    /// Failures to place a workload, each with the auctioneer that met it.
    pub fn pending(&self) -> impl Iterator<Item = (NodeId, WorkloadId, &crate::auction::Record)> {
        let first = Key::Pending(NodeId([0; 32]), WorkloadId([0; 16]));
        let last = Key::Workload(WorkloadId([0; 16]));
        self.facts.range(first..last).filter_map(|(key, entry)| match (key, &entry.said) {
            (Key::Pending(node, workload), Said::Pending(record)) => Some((*node, *workload, record)),
            _ => None,
        })
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert_eq!(self.facts.len(), self.keys.len());
        assert_eq!(self.facts.len(), self.index.len());
        assert!(self.facts.len() <= MAX_FACTS);
        assert_eq!(self.by_author.values().sum::<usize>(), self.facts.len());
    }
}

/// The order of two versions of one fact.
fn supersedes(new: &Fact, old: &Fact) -> bool {
    // The signature breaks ties: it is as arbitrary as a hash of the content, and already there.
    (new.version, new.signature) > (old.version, old.signature)
}

/// A workload as the catalog has it.
#[derive(Copy, Clone, Debug)]
pub struct Workload<'a> {
    /// As it travels.
    pub signed: &'a Arc<Fact>,
    /// How many are wanted.
    pub fact: &'a WorkloadFact,
    /// What is asked for.
    pub spec: &'a Arc<crate::workload::Spec>,
    /// Who asked.
    pub submitter: NodeId,
}

impl<'a> Workload<'a> {
    fn of(entry: &'a Entry) -> Option<Workload<'a>> {
        match &entry.said {
            Said::Workload { fact, spec, submitter } if !fact.removed => {
                Some(Workload { signed: &entry.fact, fact, spec, submitter: *submitter })
            }
            _ => None,
        }
    }
}

/// A placement as the catalog has it.
#[derive(Copy, Clone, Debug)]
pub struct Placement<'a> {
    /// Where.
    pub node: NodeId,
    /// Of which workload.
    pub workload: WorkloadId,
    /// Which replica, from 0.
    pub replica: u32,
    /// What the node says of it.
    pub fact: &'a PlacementFact,
}

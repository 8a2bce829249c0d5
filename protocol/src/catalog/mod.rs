//! What the mesh knows, replicated to every node; each fact with one writer at a time (see [`Fact`]).
//!
//! **States.** A fact is absent, present in one version, or a tombstone. The higher stamp wins, then the higher
//! content hash, so that two nodes given the same facts in any order hold the same.
//!
//! **Spread.** A fact that is new to a node is pushed at once: by its author to everybody in a mesh of up to
//! [`PUSH_ALL`], else by each node that learns it to [`FANOUT`] others. What pushing misses, [`crate::reconcile`] finds:
//! every [`RECONCILE`] with one random member, and at once with a member that comes back.
//!
//! **If either side dies between two messages** nothing is lost but time: pushes are not answered, and reconciliation
//! keeps no state between messages.
//!
//! **Bounds.** [`MAX_FACTS`] facts of at most [`fact::MAX_FACT`] bytes; a stamp more than [`hlc::MAX_SKEW`] ahead is
//! refused and its author told. Tombstones are forgotten after [`TOMBSTONE`]; a node that was away for longer drops
//! its copy before it speaks, so nothing deleted comes back.

pub mod fact;
pub mod hlc;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::id::{KeyHash, MeshId, NodeId, WorkloadId};
use crate::memo::Memo;
use crate::time::UnixMillis;

pub use fact::{Body, Fact, FactError, ImageHeld, Key, NodeFact, PlacementFact, Said, WorkloadFact};
pub use hlc::{Clock, Hlc, MAX_SKEW};

use crate::id::Fingerprint;
use crate::reconcile::{Index, Item};

/// In a mesh of up to this many nodes, an author pushes to all.
pub const PUSH_ALL: usize = 16;
/// In a larger one, each node pushes what is new to it to so many.
pub const FANOUT: usize = 6;
/// Between two reconciliations started by one node.
pub const RECONCILE: Duration = Duration::from_secs(2);
/// The most facts a node keeps; a new key beyond it is refused.
pub const MAX_FACTS: usize = 200_000;
/// Of those, the most by one author: one member cannot fill the catalog for all.
pub const MAX_BY_AUTHOR: u32 = 50_000;
/// And their bytes, at the most.
pub const MAX_BYTES_BY_AUTHOR: usize = 64 << 20;
/// How long a tombstone is kept.
pub const TOMBSTONE: Duration = Duration::from_secs(7 * 24 * 3600);

/// One fact with what it says.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As it travels.
    pub fact: Arc<Fact>,
    /// What it says.
    pub said: Said,
    hash: KeyHash,
    fingerprint: u128,
}

impl Entry {
    /// Opens a fact: every check that makes it worth believing.
    pub(crate) fn open(fact: Arc<Fact>, mesh: &MeshId) -> Result<Entry, FactError> {
        let said = fact.open(mesh)?;
        let hash = fact.key.hash();
        let print = blake3::hash(&crate::codec::encode(&(hash, fact.signature)));
        let fingerprint = u128::from_be_bytes(print.as_bytes()[..16].try_into().expect("half a hash"));
        Ok(Entry { fact, said, hash, fingerprint })
    }
}

impl Item for Arc<Entry> {
    fn hash(&self) -> KeyHash {
        self.hash
    }

    fn version(&self) -> u128 {
        // Two authors may stamp one workload alike; then the signature decides, as in `supersedes`.
        let signature = self.fact.signature.0[..8].try_into().expect("a part of it");
        u128::from(self.fact.version.bits()) << 64 | u128::from(u64::from_be_bytes(signature))
    }

    fn fingerprint(&self) -> u128 {
        self.fingerprint
    }
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
    memo: Option<Arc<Memo>>,
    facts: Index<Arc<Entry>>,
    workloads: BTreeMap<WorkloadId, Arc<Entry>>,
    /// Placement keys again, by what runs, and by where.
    located: BTreeSet<(WorkloadId, u32, NodeId)>,
    placed: BTreeSet<(NodeId, WorkloadId, u32)>,
    pending: BTreeSet<(NodeId, WorkloadId)>,
    /// How many facts and bytes of them, reports aside, of which each node has one.
    by_author: BTreeMap<NodeId, (u32, usize)>,
}

impl Catalog {
    /// Nothing known yet. What `memo` has opened is not opened again.
    pub fn new(mesh: MeshId, memo: Option<Arc<Memo>>) -> Self {
        Catalog {
            mesh,
            memo,
            facts: Index::default(),
            workloads: BTreeMap::new(),
            located: BTreeSet::new(),
            placed: BTreeSet::new(),
            pending: BTreeSet::new(),
            by_author: BTreeMap::new(),
        }
    }

    /// Takes a fact up if it is good and newer than what is here.
    pub fn offer(&mut self, fact: Arc<Fact>, now: UnixMillis) -> Result<Taken, NotTaken> {
        let known = self.get(&fact.key).map(|entry| (supersedes(&fact, &entry.fact), entry.fact.author));
        if known.is_some_and(|(newer, _)| !newer) {
            return Ok(Taken::Known);
        }
        // What was taken when this clock was wrong is followed by what is as far ahead; nothing else is.
        let limit = MAX_SKEW.as_millis() as i64;
        let before = self.get(&fact.key).map(|entry| entry.fact.version).filter(|before| before.ahead_of(now) > limit);
        let ahead = fact.version.ahead_of(before.map_or(now, Hlc::time));
        if ahead > limit {
            return Err(NotTaken::Future { ahead });
        }
        if self.facts.len() >= MAX_FACTS && known.is_none() {
            return Err(NotTaken::Full { limit: MAX_FACTS });
        }
        // A key is quickly made: only a node whose certificates are known here says anything else.
        let reports = matches!(fact.key, Key::Node(_) | Key::Workload(_));
        if !reports && self.node(&fact.author).is_none() {
            return Err(NotTaken::Stranger { author: fact.author });
        }
        let (count, bytes) = self.by_author.get(&fact.author).copied().unwrap_or_default();
        let new = known.is_none_or(|(_, author)| author != fact.author);
        let replaced = self.get(&fact.key).filter(|_| !new).map_or(0, |entry| entry.fact.content.len());
        let grows = fact.content.len() > replaced;
        let full = (new && count >= MAX_BY_AUTHOR)
            || (grows && bytes - replaced.min(bytes) + fact.content.len() > MAX_BYTES_BY_AUTHOR);
        if full && !matches!(fact.key, Key::Node(_)) {
            return Err(NotTaken::Full { limit: MAX_BY_AUTHOR as usize });
        }
        let entry = match &self.memo {
            Some(memo) => memo.open(fact, &self.mesh)?,
            None => Arc::new(Entry::open(fact, &self.mesh)?),
        };
        let old = now.0.saturating_sub(entry.fact.version.time().0) > TOMBSTONE.as_millis() as u64;
        let ended = match &entry.said {
            Said::Gone => true,
            Said::Workload { fact, .. } => fact.removed,
            // Said again each day while its node lives.
            Said::Node(_) => true,
            Said::Placement(_) | Said::Pending(_) => false,
        };
        if known.is_none() && old && ended {
            // Forgotten here already; a node that has not come to it yet must not bring it back.
            return Ok(Taken::Known);
        }
        self.put(entry);
        Ok(Taken::New)
    }

    /// Takes up facts that another node of the mesh has opened, as they are.
    pub fn resume(&mut self, facts: &[Arc<Entry>]) {
        for entry in facts {
            self.put(Arc::clone(entry));
        }
    }

    fn put(&mut self, entry: Arc<Entry>) {
        self.count(&entry);
        match entry.fact.key {
            Key::Node(_) => {}
            Key::Placement(node, workload, replica) => {
                self.located.insert((workload, replica, node));
                self.placed.insert((node, workload, replica));
            }
            Key::Pending(node, workload) => drop(self.pending.insert((node, workload))),
            Key::Workload(workload) => drop(self.workloads.insert(workload, Arc::clone(&entry))),
        }
        if let Some(before) = self.facts.insert(entry) {
            self.uncount(&before);
        }
    }

    /// Forgets tombstones, and what nodes said that are gone, once older than [`TOMBSTONE`]; returns their keys.
    pub fn expire(&mut self, now: UnixMillis, is_live: impl Fn(&NodeId) -> bool) -> Vec<Key> {
        let old = |entry: &Entry| now.0.saturating_sub(entry.fact.version.time().0) > TOMBSTONE.as_millis() as u64;
        let dead = |entry: &Entry| match &entry.said {
            Said::Gone => true,
            Said::Workload { fact, .. } => fact.removed,
            // The last of what it said: without its certificates nothing else would be believed.
            Said::Node(_) if self.by_author.contains_key(&entry.fact.author) => false,
            _ => entry.fact.key.owner().is_some_and(|owner| !is_live(&owner)),
        };
        let gone = self.facts.iter().filter(|entry| dead(entry) && old(entry));
        let keys: Vec<Key> = gone.map(|entry| entry.fact.key).collect();
        for key in &keys {
            self.forget(key);
        }
        keys
    }

    /// Takes a fact out as if it had never been heard of.
    pub fn forget(&mut self, key: &Key) -> Option<Arc<Entry>> {
        match key {
            Key::Node(_) => {}
            Key::Placement(node, workload, replica) => {
                self.located.remove(&(*workload, *replica, *node));
                self.placed.remove(&(*node, *workload, *replica));
            }
            Key::Pending(node, workload) => drop(self.pending.remove(&(*node, *workload))),
            Key::Workload(workload) => drop(self.workloads.remove(workload)),
        }
        let entry = self.facts.remove(&key.hash())?;
        self.uncount(&entry);
        Some(entry)
    }

    fn count(&mut self, entry: &Entry) {
        if !matches!(entry.fact.key, Key::Node(_)) {
            let (count, bytes) = self.by_author.entry(entry.fact.author).or_default();
            (*count, *bytes) = (*count + 1, *bytes + entry.fact.content.len());
        }
    }

    fn uncount(&mut self, entry: &Entry) {
        if matches!(entry.fact.key, Key::Node(_)) {
            return;
        }
        if let Some((count, bytes)) = self.by_author.get_mut(&entry.fact.author) {
            (*count, *bytes) = (*count - 1, *bytes - entry.fact.content.len());
            if *count == 0 {
                self.by_author.remove(&entry.fact.author);
            }
        }
    }

    /// All facts, for reconciliation.
    pub fn index(&self) -> &Index<Arc<Entry>> {
        &self.facts
    }

    /// The same on nodes that know the same.
    pub fn fingerprint(&self) -> Fingerprint {
        self.facts.fingerprint()
    }

    /// The fact with this key hash.
    pub fn by_hash(&self, hash: &KeyHash) -> Option<&Arc<Fact>> {
        self.facts.get(hash).map(|entry| &entry.fact)
    }

    /// One fact.
    pub fn get(&self, key: &Key) -> Option<&Arc<Entry>> {
        self.facts.get(&key.hash())
    }

    /// Every fact, tombstones too, in the order of their key hashes.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Arc<Entry>)> {
        self.facts.iter().map(|entry| (&entry.fact.key, entry))
    }

    /// What a node says of itself.
    pub fn node(&self, node: &NodeId) -> Option<&NodeFact> {
        match self.get(&Key::Node(*node)).map(|entry| &entry.said) {
            Some(Said::Node(fact)) => Some(fact),
            _ => None,
        }
    }

    /// Every node's report.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &NodeFact)> {
        self.facts.iter().filter_map(|entry| match (&entry.fact.key, &entry.said) {
            (Key::Node(node), Said::Node(fact)) => Some((*node, fact)),
            _ => None,
        })
    }

    /// A workload that is not removed.
    pub fn workload(&self, id: &WorkloadId) -> Option<Workload<'_>> {
        self.workloads.get(id).and_then(Workload::of)
    }

    /// Every workload that is not removed.
    pub fn workloads(&self) -> impl Iterator<Item = Workload<'_>> {
        self.workloads.values().filter_map(Workload::of)
    }

    /// Every placement that some node tells of.
    pub fn placements(&self) -> impl Iterator<Item = Placement<'_>> {
        self.placed.iter().filter_map(|(node, workload, replica)| self.placement(*node, *workload, *replica))
    }

    /// Every placement that one node tells of.
    pub fn placements_on(&self, node: &NodeId) -> impl Iterator<Item = Placement<'_>> {
        let first = (*node, WorkloadId([0; 16]), 0);
        let last = (*node, WorkloadId([255; 16]), u32::MAX);
        self.placed
            .range(first..=last)
            .filter_map(|(node, workload, replica)| self.placement(*node, *workload, *replica))
    }

    /// Every placement of one workload, by replica.
    pub fn placements_of(&self, workload: &WorkloadId) -> impl Iterator<Item = Placement<'_>> {
        let first = (*workload, 0, NodeId([0; 32]));
        let last = (*workload, u32::MAX, NodeId([255; 32]));
        self.located
            .range(first..=last)
            .filter_map(|(workload, replica, node)| self.placement(*node, *workload, *replica))
    }

    fn placement(&self, node: NodeId, workload: WorkloadId, replica: u32) -> Option<Placement<'_>> {
        match self.get(&Key::Placement(node, workload, replica)).map(|entry| &entry.said) {
            Some(Said::Placement(fact)) => Some(Placement { node, workload, replica, fact }),
            _ => None,
        }
    }

    /// Failures to place a workload, each with the auctioneer that met it.
    pub fn pending(&self) -> impl Iterator<Item = (NodeId, WorkloadId, &crate::auction::Record)> {
        self.pending.iter().filter_map(|(node, workload)| {
            match self.get(&Key::Pending(*node, *workload)).map(|entry| &entry.said) {
                Some(Said::Pending(record)) => Some((*node, *workload, record)),
                _ => None,
            }
        })
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.facts.len() <= MAX_FACTS);
        assert_eq!(self.located.len(), self.placed.len());
        let counted = self.by_author.values().map(|(count, _)| *count as usize).sum::<usize>();
        assert_eq!(counted, self.located.len() + self.pending.len() + self.workloads.len());
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
    fn of(entry: &'a Arc<Entry>) -> Option<Workload<'a>> {
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

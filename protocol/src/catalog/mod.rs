//! What the mesh knows, replicated to every node; each fact with one writer at a time (see [`Fact`]).
//!
//! **States.** A fact is absent, present in one version, or a tombstone. The higher stamp wins, then the higher
//! content hash, so that two nodes given the same facts in any order hold the same.
//!
//! **Spread.** A fact that is new to a node is pushed at once: by its author to everybody in a mesh of up to
//! [`PUSH_ALL`], else by each node that learns it to [`FANOUT`] others. When there is much that is new, it is collected for
//! [`BATCH`], a fact that changes again meanwhile goes once, and of more than [`EAGER`] bytes only the names are pushed:
//! most of those told have it already. What pushing misses, [`crate::reconcile`] finds:
//! every [`RECONCILE`] with one random member, and at once with a member that comes back.
//!
//! **If either side dies between two messages** nothing is lost but time: pushes are not answered, and reconciliation
//! keeps no state between messages.
//!
//! **Bounds.** [`MAX_FACTS`] facts of at most [`fact::MAX_FACT`] bytes, and [`MAX_BYTES`] of them all; beside its bytes a
//! fact takes about 600 bytes of memory (its opened form, four entries in trees). A placement has about 700 bytes: a mesh
//! of 1,000 nodes with 10,000 of them takes 13 MB on each. A stamp more than [`hlc::MAX_SKEW`] ahead is
//! refused and its author told. Tombstones are forgotten after [`TOMBSTONE`]; a node that was away for longer drops
//! its copy before it speaks, so nothing deleted comes back.

pub mod fact;
pub mod hlc;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::auction::{Journal, Record};
use crate::id::{KeyHash, MeshId, NodeId, WorkloadId};
use crate::lease::Seats;
use crate::memo::Memo;
use crate::time::UnixMillis;
use crate::trust::{Chain, Role};

pub use fact::{
    Body, Fact, FactError, ImageHeld, Key, MAX_DETAIL, NodeFact, OrderFact, OriginalHeld, PlacementFact, Rollout, Said,
    WorkloadFact, form, vouch,
};
pub use hlc::{Clock, Hlc, MAX_SKEW};

use crate::id::Fingerprint;
use crate::reconcile::{Index, Item};

/// In a mesh of up to this many nodes, an author pushes to all.
pub const PUSH_ALL: usize = 16;
/// In a larger one, each node pushes what is new to it to so many.
pub const FANOUT: usize = 6;
/// Between two pushes of one node, when there is much to be pushed.
pub const BATCH: Duration = Duration::from_millis(50);
/// The most bytes of facts that are pushed whole to those who may have them: about what one packet holds.
pub const EAGER: usize = 1500;
/// Between two reconciliations started by one node.
pub const RECONCILE: Duration = Duration::from_secs(2);
/// The most facts a node keeps; a new key beyond it is refused.
pub const MAX_FACTS: usize = 200_000;
/// Of reports, workloads and orders so many more, and so many KiB.
pub const SPARE: usize = 20_000;
/// Of those, the most by one author: one member cannot fill the catalog for all.
pub const MAX_BY_AUTHOR: u32 = 50_000;
/// And their bytes, at the most.
pub const MAX_BYTES_BY_AUTHOR: usize = 64 << 20;
/// The bytes of all facts that a node keeps, at the most; more are refused.
pub const MAX_BYTES: usize = 512 << 20;
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

    /// Whether it was said longer ago than a tombstone is kept.
    fn is_old(&self, now: UnixMillis) -> bool {
        now.0.saturating_sub(self.fact.version.time().0) > TOMBSTONE.as_millis() as u64
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
    /// Its author, or who certified its author, is a member no more.
    #[error("a fact by node {}, whose certificates are revoked", author.short())]
    Revoked {
        /// Who wrote it.
        author: NodeId,
    },
    /// It is about a workload that is not known here: that comes first.
    #[error("what is remembered of workload {}, which is not known here", .0.short())]
    NoWorkload(WorkloadId),
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
    journals: BTreeSet<(WorkloadId, NodeId)>,
    seats: BTreeSet<(WorkloadId, NodeId)>,
    /// Nodes that are members no more. What they say, and what is said with certificates they signed, is not taken.
    revoked: BTreeSet<NodeId>,
    /// How many facts and bytes of them, reports aside, of which each node has one.
    by_author: BTreeMap<NodeId, (u32, usize)>,
    /// Of all facts.
    bytes: usize,
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
            journals: BTreeSet::new(),
            seats: BTreeSet::new(),
            revoked: BTreeSet::new(),
            by_author: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// Takes a fact up if it is good and newer than what is here.
    pub fn offer(&mut self, fact: Arc<Fact>, now: UnixMillis) -> Result<Taken, NotTaken> {
        let known = self.get(&fact.key).cloned();
        if known.as_ref().is_some_and(|known| !supersedes(&fact, &known.fact)) {
            return Ok(Taken::Known);
        }
        // What was taken when this clock was wrong is followed by what is as far ahead; nothing else is.
        let limit = MAX_SKEW.as_millis() as i64;
        let before = known.as_ref().map(|known| known.fact.version).filter(|before| before.ahead_of(now) > limit);
        let ahead = fact.version.ahead_of(before.map_or(now, Hlc::time));
        if ahead > limit {
            return Err(NotTaken::Future { ahead });
        }
        self.has_room(&fact, known.as_deref())?;
        let entry = match &self.memo {
            Some(memo) => memo.open(fact, &self.mesh)?,
            None => Arc::new(Entry::open(fact, &self.mesh)?),
        };
        let revokes = matches!(entry.fact.key, Key::Revoked(_));
        if !revokes && entry.said.author_chain().is_some_and(|chain| self.is_revoked(&entry.fact.author, chain)) {
            return Err(NotTaken::Revoked { author: entry.fact.author });
        }
        if let (Key::Journal(_, workload) | Key::Seats(_, workload), Said::Journal(_) | Said::Seats(_)) =
            (entry.fact.key, &entry.said)
            && !self.workloads.contains_key(&workload)
        {
            return Err(NotTaken::NoWorkload(workload));
        }
        let ended = match &entry.said {
            Said::Gone => true,
            Said::Workload { fact, .. } => fact.removed,
            Said::Order(order) => !order.holds,
            // Said again each day while its node lives.
            Said::Node(_) => true,
            Said::Placement(_) | Said::Journal(_) | Said::Seats(_) => false,
        };
        if known.is_none() && ended && entry.is_old(now) {
            // Forgotten here already; a node that has not come to it yet must not bring it back.
            return Ok(Taken::Known);
        }
        self.put(entry);
        Ok(Taken::New)
    }

    /// Whether a fact in place of `known` stays within the bounds, and its author may say anything at all.
    fn has_room(&self, fact: &Fact, known: Option<&Entry>) -> Result<(), NotTaken> {
        let grows = fact.content.len() > known.map_or(0, |known| known.fact.content.len());
        // Who is a member, what is wanted and what is not any more has room when nothing else has.
        let spare = if matches!(fact.key, Key::Placement(..) | Key::Journal(..) | Key::Seats(..)) { 0 } else { SPARE };
        if grows && self.bytes + fact.content.len() > MAX_BYTES + spare * 1024 {
            return Err(NotTaken::Full { limit: self.facts.len() });
        }
        if self.facts.len() >= MAX_FACTS + spare && known.is_none() {
            return Err(NotTaken::Full { limit: MAX_FACTS });
        }
        // A key is quickly made: only a node whose certificates are known here says what does not come with them.
        let reports = !matches!(fact.key, Key::Placement(..) | Key::Journal(..) | Key::Seats(..));
        if self.revoked.contains(&fact.author) && !matches!(fact.key, Key::Revoked(_)) {
            return Err(NotTaken::Revoked { author: fact.author });
        }
        if !reports && self.node(&fact.author).is_none() {
            return Err(NotTaken::Stranger { author: fact.author });
        }
        let (count, bytes) = self.by_author.get(&fact.author).copied().unwrap_or_default();
        let own = known.filter(|known| known.fact.author == fact.author);
        let replaced = own.map_or(0, |known| known.fact.content.len());
        let grows = fact.content.len() > replaced;
        let full = (own.is_none() && count >= MAX_BY_AUTHOR)
            || (grows && bytes - replaced.min(bytes) + fact.content.len() > MAX_BYTES_BY_AUTHOR);
        if full && !matches!(fact.key, Key::Node(_)) {
            return Err(NotTaken::Full { limit: MAX_BY_AUTHOR as usize });
        }
        Ok(())
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
            Key::Journal(node, workload) => drop(self.journals.insert((workload, node))),
            Key::Seats(node, workload) => drop(self.seats.insert((workload, node))),
            Key::Drain(_) => {}
            Key::Revoked(node) => drop(self.revoked.insert(node)),
            Key::Workload(workload) => drop(self.workloads.insert(workload, Arc::clone(&entry))),
        }
        if let Some(before) = self.facts.insert(entry) {
            self.uncount(&before);
        }
    }

    /// Forgets tombstones, and what nodes said that are gone, once older than [`TOMBSTONE`]; returns their keys.
    pub fn expire(&mut self, now: UnixMillis, is_live: impl Fn(&NodeId) -> bool) -> Vec<Key> {
        let dead = |entry: &Entry| match &entry.said {
            Said::Gone => true,
            Said::Workload { fact, .. } => fact.removed,
            Said::Order(order) => !order.holds,
            // What leads from a workload's first custodians to its present ones, each said by one of those before.
            Said::Seats(_) => match &entry.fact.key {
                Key::Seats(_, workload) => !self.workloads.contains_key(workload),
                _ => true,
            },
            // The last of what it said: without its certificates nothing else would be believed.
            Said::Node(_) if self.by_author.contains_key(&entry.fact.author) => false,
            _ => entry.fact.key.owner().is_some_and(|owner| !is_live(&owner)),
        };
        let gone = self.facts.iter().filter(|entry| dead(entry) && entry.is_old(now));
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
            Key::Journal(node, workload) => drop(self.journals.remove(&(*workload, *node))),
            Key::Seats(node, workload) => drop(self.seats.remove(&(*workload, *node))),
            Key::Drain(_) => {}
            Key::Revoked(node) => drop(self.revoked.remove(node)),
            Key::Workload(workload) => drop(self.workloads.remove(workload)),
        }
        let entry = self.facts.remove(&key.hash())?;
        self.uncount(&entry);
        Some(entry)
    }

    fn count(&mut self, entry: &Entry) {
        self.bytes += entry.fact.content.len();
        if !matches!(entry.fact.key, Key::Node(_)) {
            let (count, bytes) = self.by_author.entry(entry.fact.author).or_default();
            (*count, *bytes) = (*count + 1, *bytes + entry.fact.content.len());
        }
    }

    fn uncount(&mut self, entry: &Entry) {
        self.bytes -= entry.fact.content.len();
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

    /// Every placement of one replica.
    pub fn placements_of_replica(&self, workload: &WorkloadId, replica: u32) -> impl Iterator<Item = Placement<'_>> {
        let all = (*workload, replica, NodeId([0; 32]))..=(*workload, replica, NodeId([255; 32]));
        self.located.range(all).filter_map(|(workload, replica, node)| self.placement(*node, *workload, *replica))
    }

    /// What a node says of one replica.
    pub fn placement(&self, node: NodeId, workload: WorkloadId, replica: u32) -> Option<Placement<'_>> {
        match self.get(&Key::Placement(node, workload, replica)).map(|entry| &entry.said) {
            Some(Said::Placement(fact)) => Some(Placement { node, workload, replica, fact }),
            _ => None,
        }
    }

    /// What is remembered of a workload's auctions, each with the auctioneer that does.
    pub fn journals_of(&self, workload: &WorkloadId) -> impl Iterator<Item = (NodeId, &Journal)> {
        let all = (*workload, NodeId([0; 32]))..=(*workload, NodeId([255; 32]));
        self.journals.range(all).filter_map(|(workload, node)| self.journal(node, workload).map(|known| (*node, known)))
    }

    /// The custodians of a singleton that each node tells of.
    pub fn told_seats(&self, workload: &WorkloadId) -> impl Iterator<Item = (&NodeId, &Seats)> {
        let all = (*workload, NodeId([0; 32]))..=(*workload, NodeId([255; 32]));
        self.seats.range(all).filter_map(|(workload, node)| {
            match self.get(&Key::Seats(*node, *workload)).map(|entry| &entry.said) {
                Some(Said::Seats(seats)) => Some((node, seats)),
                _ => None,
            }
        })
    }

    /// The latest custodians of a singleton, as far as those who may say so tell: the submitter of the first, admins of
    /// any, and who had a seat of the next.
    pub fn seats_of(&self, workload: &WorkloadId) -> Option<&Seats> {
        let first = self.workloads.get(workload).and_then(Workload::of)?.fact.seats.as_ref()?;
        let told: Vec<(&NodeId, &Seats)> = self.told_seats(workload).collect();
        let is_admin = |node: &NodeId| self.node(node).and_then(NodeFact::role) == Some(Role::Admin);
        let by_admins = told.iter().filter(|(author, _)| is_admin(author)).map(|(_, seats)| *seats);
        let mut latest = by_admins.chain([first]).max_by_key(|seats| seats.term)?;
        // From there on each by one who had a seat before it.
        while let Some((_, later)) = told.iter().find(|(author, later)| latest.may_become(later, author)) {
            latest = later;
        }
        Some(latest)
    }

    /// What one auctioneer remembers of one workload.
    pub fn journal(&self, node: &NodeId, workload: &WorkloadId) -> Option<&Journal> {
        // Asked for each fact of a workload, and mostly not there: that is seen without a hash.
        if !self.journals.contains(&(*workload, *node)) {
            return None;
        }
        match self.get(&Key::Journal(*node, *workload)).map(|entry| &entry.said) {
            Some(Said::Journal(journal)) => Some(journal),
            _ => None,
        }
    }

    /// The last auction of a workload that found no taker, if nothing has taken it since.
    pub fn pending(&self, workload: &WorkloadId) -> Option<&Record> {
        let pending = self.journals_of(workload).filter(|(_, journal)| journal.pending);
        pending.filter_map(|(_, journal)| journal.records.last()).max_by_key(|record| record.at)
    }

    /// Whether a node is to be emptied.
    pub fn is_draining(&self, node: &NodeId) -> bool {
        let order = self.get(&Key::Drain(*node)).map(|entry| &entry.said);
        matches!(order, Some(Said::Order(order)) if order.holds)
    }

    /// Nodes that are members no more.
    pub fn revoked(&self) -> &BTreeSet<NodeId> {
        &self.revoked
    }

    /// Whether what `author` says with these certificates is not to be taken any more.
    pub fn is_revoked(&self, author: &NodeId, chain: &Chain) -> bool {
        !self.revoked.is_empty()
            && (self.revoked.contains(author) || chain.issuers().any(|issuer| self.revoked.contains(&issuer)))
    }

    /// What would not be taken any more by these revocations; to be forgotten.
    pub fn of_revoked(&self) -> Vec<Key> {
        let stands = |entry: &Entry| {
            let author = &entry.fact.author;
            let chain = match entry.fact.key {
                Key::Revoked(_) => return true,
                _ => entry.said.author_chain().or_else(|| self.node(author).map(|fact| &fact.chain)),
            };
            match chain {
                Some(chain) => !self.is_revoked(author, chain),
                None => !self.revoked.contains(author),
            }
        };
        self.facts.iter().filter(|entry| !stands(entry)).map(|entry| entry.fact.key).collect()
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.facts.len() <= MAX_FACTS + SPARE);
        assert_eq!(self.bytes, self.facts.iter().map(|entry| entry.fact.content.len()).sum::<usize>());
        assert_eq!(self.located.len(), self.placed.len());
        let counted = self.by_author.values().map(|(count, _)| *count as usize).sum::<usize>();
        let orders = self.facts.iter().filter(|entry| matches!(entry.fact.key, Key::Drain(_) | Key::Revoked(_)));
        let owned = self.located.len() + self.journals.len() + self.seats.len();
        assert_eq!(counted, owned + self.workloads.len() + orders.count());
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

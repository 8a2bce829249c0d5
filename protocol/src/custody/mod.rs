//! Who makes up for what is missing: failover without a controller.
//!
//! A workload's custodians are the live members in the order of rendezvous hashing (Thaler, Ravishankar 1998) of
//! (workload, node). The first of them acts: it compares what is wanted with what the catalog shows, and holds an
//! auction for what is missing, one epoch above the highest it has seen. When it dies, the next one is first.
//!
//! **Who writes.** The custodian writes nothing but a `Pending` fact when nobody takes the replica; the worker that
//! accepts publishes the placement.
//!
//! **If two act at once** (in a change-over each may think itself first): two placements of one replica. The higher
//! epoch stays, then the lower node id; the others stop themselves. [`keeps`] is that rule, known to every node.
//!
//! **Waits.** A replica whose node went down is auctioned at once: the suspicion was wait enough. One that is missing
//! for another reason is given [`SETTLE`], for the submitting node's own auction or the gossip of its result to come.
//! One that found no taker is tried again when a node appears, reports more room, or ends a placement, never on a
//! blind timer alone.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::auction::Cause;
use crate::catalog::{Catalog, Placement, Workload};
use crate::id::{NodeId, WorkloadId};
use crate::time::Instant;
use crate::worker::PlacementState;

/// How long news needs to come around before a custodian calls something missing.
pub const SETTLE: Duration = Duration::from_secs(2);
/// After an auction without taker, not sooner than this even when capacity seems to have been freed.
const RETRY: Duration = Duration::from_millis(500);
/// And also without any sign after this: a sign may have been lost.
const RETRY_ANYWAY: Duration = Duration::from_secs(30);

/// The rank of `node` among the custodians of `workload`: the highest is first.
pub fn rank(workload: &WorkloadId, node: &NodeId) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&workload.0);
    hasher.update(&node.0);
    hasher.finalize().as_bytes()[..16].try_into().expect("half a hash")
}

/// The first of `nodes` for `workload`.
pub fn first(workload: &WorkloadId, nodes: impl Iterator<Item = NodeId>) -> Option<NodeId> {
    nodes.max_by_key(|node| rank(workload, node))
}

/// Whether a replica on `mine` stays when one on `other` exists too: the higher epoch, then the lower node.
pub fn keeps(mine: (u64, NodeId), other: (u64, NodeId)) -> bool {
    (mine.0, std::cmp::Reverse(mine.1)) > (other.0, std::cmp::Reverse(other.1))
}

/// A replica that nobody runs.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub replica: u32,
    /// The epoch to place it with.
    pub epoch: u64,
    /// Why it is missing, as far as the catalog shows.
    pub cause: Cause,
}

/// What of a workload is missing, by what the catalog shows and who is live.
pub fn missing(workload: &Workload<'_>, catalog: &Catalog, is_live: impl Fn(&NodeId) -> bool) -> Vec<Missing> {
    let mut by_replica: BTreeMap<u32, Vec<Placement<'_>>> = BTreeMap::new();
    for placement in catalog.placements_of(&workload.spec.id) {
        by_replica.entry(placement.replica).or_default().push(placement);
    }
    (0..workload.fact.replicas)
        .filter_map(|replica| {
            let tries = by_replica.get(&replica).map_or(&[][..], Vec::as_slice);
            if tries.iter().any(|placement| stands(workload, placement, &is_live)) {
                return None;
            }
            let last = tries.iter().max_by_key(|placement| placement.fact.epoch);
            let cause = match last {
                None if workload.fact.generation == 0 => Cause::Submitted,
                None => Cause::Missing,
                Some(last) if !is_live(&last.node) => Cause::NodeDown(last.node),
                Some(last) => Cause::Lost(last.node),
            };
            Some(Missing { replica, epoch: last.map_or(0, |last| last.fact.epoch).saturating_add(1), cause })
        })
        .collect()
}

/// Whether this placement is the replica, or was and has done its work.
fn stands(workload: &Workload<'_>, placement: &Placement<'_>, is_live: &impl Fn(&NodeId) -> bool) -> bool {
    match &placement.fact.state {
        // What has finished stays finished, wherever its node is now. A workload started again after a stop has a
        // later generation than the one its containers ended in.
        PlacementState::Exited(_) => !placement.fact.stopped && placement.fact.generation >= workload.fact.revived,
        state => state.is_active() && is_live(&placement.node),
    }
}

#[derive(Debug)]
struct Watch {
    /// Missing since when, as this node noticed.
    since: Instant,
    /// The last auction without a taker.
    failed: Option<Instant>,
    /// Whether something happened since that may let it succeed.
    hope: bool,
    due: Instant,
}

/// The waits of one node that is, or may become, a custodian.
#[derive(Debug, Default)]
pub struct Custody {
    watches: BTreeMap<WorkloadId, Watch>,
    dirty: BTreeSet<WorkloadId>,
}

impl Custody {
    /// Look at this workload again.
    pub fn touch(&mut self, workload: WorkloadId) {
        self.dirty.insert(workload);
    }

    /// Workloads to look at again.
    pub fn take_dirty(&mut self) -> BTreeSet<WorkloadId> {
        std::mem::take(&mut self.dirty)
    }

    /// Nothing of it is missing, or another node is its custodian.
    pub fn settled(&mut self, workload: &WorkloadId) {
        self.watches.remove(workload);
    }

    /// Something is missing and this node is the first custodian: whether to hold an auction now. `urgent` is for what
    /// needs no settling time.
    pub fn is_due(&mut self, workload: WorkloadId, urgent: bool, now: Instant) -> bool {
        let wait = if urgent { Duration::ZERO } else { SETTLE };
        let watch = self.watches.entry(workload).or_insert_with(|| Watch {
            since: now,
            failed: None,
            hope: false,
            due: now + wait,
        });
        watch.due = match watch.failed {
            Some(failed) if watch.hope => failed + RETRY,
            Some(failed) => failed + RETRY_ANYWAY,
            None => watch.since + wait,
        };
        watch.due <= now
    }

    /// There is no room for another auction: look again a little later.
    pub fn wait(&mut self, workload: &WorkloadId, now: Instant) {
        if let Some(watch) = self.watches.get_mut(workload) {
            watch.due = now + RETRY;
        }
    }

    /// An auction of this node found no taker.
    pub fn no_taker(&mut self, workload: WorkloadId, now: Instant) {
        let due = now + RETRY_ANYWAY;
        let watch = self.watches.entry(workload).or_insert(Watch { since: now, failed: None, hope: false, due });
        watch.failed = Some(now);
        watch.hope = false;
        watch.due = due;
    }

    /// Capacity was freed somewhere: what found no taker may find one now.
    pub fn hope(&mut self) {
        for (workload, watch) in &mut self.watches {
            if watch.failed.is_some() {
                watch.hope = true;
                self.dirty.insert(*workload);
            }
        }
    }

    /// The time at which [`Custody::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.watches.values().map(|watch| watch.due).min()
    }

    /// Marks what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        for (workload, watch) in &mut self.watches {
            if watch.due <= now {
                self.dirty.insert(*workload);
                // Whoever looks sets the next wait; until then do not come back at once.
                watch.due = now + RETRY;
            }
        }
    }
}

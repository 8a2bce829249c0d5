//! Who makes up for what is missing: failover without a controller.
//!
//! A workload's custodians are the live members in the order of rendezvous hashing (Thaler, Ravishankar 1998) of
//! (workload, node). The first of them acts: it compares what is wanted with what the catalog shows, and holds an
//! auction for what is missing, one epoch above the highest it has seen. When it dies, the next one is first.
//!
//! **Who writes.** The custodian writes nothing but its journal of the workload; the worker that accepts publishes the
//! placement.
//!
//! **If two act at once** (in a change-over each may think itself first): two placements of one replica. The higher
//! epoch stays, then the lower node id; the others stop themselves. [`keeps`] is that rule, known to every node.
//!
//! **Moves.** What runs as it was before an update, or on a node that is being drained, still stands; but it is placed once
//! more, with the next epoch, and gives way when its successor runs ([`gives_way`]). A singleton cannot run twice for
//! that: it gives way at once. An update goes on while its successors stay up: so many at a time as its rollout allows,
//! on other nodes first, in their own place where no other node has room. If a successor does not stay up the first
//! custodian that may submit puts the earlier form back; the predecessors that still run then stand again.
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
use crate::catalog::{Catalog, Placement, Workload, WorkloadFact};
use crate::id::{NodeId, WorkloadId};
use crate::time::Instant;
use crate::time::UnixMillis;
use crate::worker::PlacementState;

/// How long news needs to come around before a custodian calls something missing.
pub const SETTLE: Duration = Duration::from_secs(2);
/// After an auction without taker, not sooner than this even when capacity seems to have been freed.
const RETRY: Duration = Duration::from_millis(500);
/// And also without any sign after this: a sign may have been lost.
const RETRY_ANYWAY: Duration = Duration::from_secs(30);

/// A successor that has run for so long stays up.
pub const STEADY: Duration = Duration::from_secs(3);
/// An update is judged while something of it is still to be done, and so long after it was asked for: what fails later is
/// not its fault.
pub const JUDGED: Duration = Duration::from_secs(120);
/// What changed a workload is known everywhere after this.
const UNHEARD: Duration = Duration::from_secs(60);
/// A successor that was started so often does not.
const UNSTEADY: u32 = 3;

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

/// One of two placements of one replica.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// Its fencing token.
    pub epoch: u64,
    /// Where.
    pub node: NodeId,
    /// Whether its container runs.
    pub running: bool,
    /// Whether it has waited for a lease for so long that another must be holding it.
    pub waited: bool,
    /// Whether it is what is wanted, where it may be: of the workload's present form, on a node that is not drained.
    pub stays: bool,
}

impl Rival {
    /// As the catalog shows it.
    pub fn of(placement: &Placement<'_>, wanted: &WorkloadFact, catalog: &Catalog, now: UnixMillis) -> Rival {
        // One that was awarded under a later generation is of a form that is not known here yet; of one that never comes to
        // be known, because it lost against another on the other side of a cut, it is not for long.
        let young = now.0.abs_diff(placement.fact.accepted) < UNHEARD.as_millis() as u64;
        let ahead = placement.fact.generation > wanted.generation && young;
        let present = placement.fact.form == wanted.form() || ahead;
        Rival {
            epoch: placement.fact.epoch,
            node: placement.node,
            running: placement.fact.state == PlacementState::Running,
            waited: false,
            stays: present && !catalog.is_draining(&placement.node),
        }
    }
}

/// Whether one of two placements of a replica ends for the other: what is to be moved goes on until its successor runs, a
/// successor does not end for what it is to replace; else [`keeps`] decides. Of a singleton one that runs, and so has
/// the lease, comes before one that waits for it: which ends when it has waited for long, since what a node that was away
/// says of itself may be old. What is to be moved ends at once.
pub fn gives_way(mine: &Rival, other: &Rival, singleton: bool) -> bool {
    match (mine.stays, other.stays) {
        // Nor does it start once the other has a later epoch: both end, and it is placed with a still later one.
        (true, false) => mine.epoch < other.epoch && !mine.running,
        (false, true) => singleton || other.running,
        _ if singleton && mine.running != other.running => other.running && mine.waited,
        _ => !keeps((mine.epoch, mine.node), (other.epoch, other.node)),
    }
}

/// How far an update is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Replicas that are as they are to be, and have been up for [`STEADY`].
    pub steady: u32,
    /// Replicas of the new form that are not there yet.
    pub unsteady: u32,
    /// Replicas of the old form.
    pub outdated: u32,
    /// A replica of the new form that does not stay up, and why.
    pub failing: Option<(u32, String)>,
}

/// How far the last update of a workload is.
pub fn progress(
    workload: &Workload<'_>,
    catalog: &Catalog,
    is_live: impl Fn(&NodeId) -> bool,
    now: UnixMillis,
) -> Progress {
    let form = workload.fact.form();
    let mut progress = Progress::default();
    let live = catalog.placements_of(&workload.spec.id).filter(|placement| is_live(&placement.node));
    for tries in
        by_replica(live).into_iter().filter(|(replica, _)| *replica < workload.fact.replicas).map(|(_, tries)| tries)
    {
        let new = tries.iter().filter(|placement| placement.fact.form == form).max_by_key(|new| new.fact.epoch);
        if tries.iter().any(|placement| placement.fact.form != form && placement.fact.state.is_active()) {
            progress.outdated += 1;
        }
        let Some(new) = new else { continue };
        let up_for = now.0.saturating_sub(new.fact.started);
        // What an earlier try of the same form left says nothing of this one.
        let earlier = new.fact.generation < workload.fact.revived;
        let failed = match &new.fact.state {
            _ if earlier => false,
            PlacementState::Failed => true,
            PlacementState::Exited(status) => status.code != 0 && !new.fact.stopped,
            state => state.is_active() && new.fact.restarts >= UNSTEADY && up_for < STEADY.as_millis() as u64,
        };
        if failed {
            progress.failing = Some((new.replica, new.fact.detail.clone()));
        }
        match new.fact.state {
            PlacementState::Running if up_for >= STEADY.as_millis() as u64 => progress.steady += 1,
            PlacementState::Exited(status) if status.code == 0 => progress.steady += 1,
            _ if new.fact.state.is_active() => progress.unsteady += 1,
            _ => {}
        }
    }
    progress
}

fn by_replica<'a>(placements: impl Iterator<Item = Placement<'a>>) -> BTreeMap<u32, Vec<Placement<'a>>> {
    let mut replicas: BTreeMap<u32, Vec<Placement<'_>>> = BTreeMap::new();
    for placement in placements {
        replicas.entry(placement.replica).or_default().push(placement);
    }
    replicas
}

/// What of a workload runs, and is to run elsewhere or in another form; each with the node it is on.
pub fn moves(
    workload: &Workload<'_>,
    catalog: &Catalog,
    is_live: impl Fn(&NodeId) -> bool,
    now: UnixMillis,
) -> Vec<(Missing, NodeId)> {
    let form = workload.fact.form();
    let tries = by_replica(catalog.placements_of(&workload.spec.id));
    let wanted = tries.into_iter().filter(|(replica, _)| *replica < workload.fact.replicas);
    wanted
        .filter_map(|(replica, tries)| {
            let epoch = tries.iter().map(|placement| placement.fact.epoch).max()?.saturating_add(1);
            let active = || tries.iter().filter(|p| p.fact.state.is_active() && is_live(&p.node));
            let settled = active().any(|placement| Rival::of(placement, workload.fact, catalog, now).stays);
            let old = active().max_by_key(|placement| placement.fact.epoch).filter(|_| !settled)?;
            let cause = match old.fact.form == form {
                true => Cause::Drained(old.node),
                false => Cause::Updated(old.node),
            };
            Some((Missing { replica, epoch, cause }, old.node))
        })
        .collect()
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
pub fn missing(
    workload: &Workload<'_>,
    catalog: &Catalog,
    is_live: impl Fn(&NodeId) -> bool,
    now: UnixMillis,
) -> Vec<Missing> {
    let placements = by_replica(catalog.placements_of(&workload.spec.id));
    // A replica whose placements are all gone had epochs all the same: its auctioneers remember the last ones.
    let placed = catalog.journals_of(&workload.spec.id).flat_map(|(_, journal)| &journal.records);
    let mut remembered: BTreeMap<u32, u64> = BTreeMap::new();
    // No epoch is later than its time: one that is would keep every next one from being accepted.
    for (replica, epoch, _) in placed.flat_map(|record| &record.placed).filter(|(_, epoch, _)| *epoch < now.0) {
        let known = remembered.entry(*replica).or_default();
        *known = (*known).max(*epoch);
    }
    (0..workload.fact.replicas)
        .filter_map(|replica| {
            let tries = placements.get(&replica).map_or(&[][..], Vec::as_slice);
            if tries.iter().any(|placement| stands(workload, placement, &is_live)) {
                return None;
            }
            let last = tries.iter().max_by_key(|placement| placement.fact.epoch);
            let cause = match last {
                None if workload.fact.generation == 0 => Cause::Submitted,
                None => Cause::Missing,
                Some(last) if !is_live(&last.node) => Cause::NodeDown(last.node),
                Some(last) if last.fact.state == PlacementState::Evicted => Cause::Evicted(last.node),
                Some(last) => Cause::Lost(last.node),
            };
            let known = last.map_or(0, |last| last.fact.epoch).max(remembered.get(&replica).copied().unwrap_or(0));
            Some(Missing { replica, epoch: known.saturating_add(1), cause })
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
    /// How many there were.
    tries: u32,
    /// Whether something happened since that may let it succeed.
    hope: bool,
    due: Instant,
}

/// The waits of one node that is, or may become, a custodian.
#[derive(Debug, Default)]
pub struct Custody {
    watches: BTreeMap<WorkloadId, Watch>,
    /// When to look at a workload again, whatever happens.
    looks: BTreeMap<WorkloadId, Instant>,
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
            tries: 0,
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

    /// Look at it again then.
    pub fn look_at(&mut self, workload: WorkloadId, at: Instant) {
        let look = self.looks.entry(workload).or_insert(at);
        *look = at.min(*look);
    }

    /// What found no taker may find one then.
    pub fn hope_at(&mut self, workload: WorkloadId, at: Instant) {
        if let Some(watch) = self.watches.get_mut(&workload) {
            watch.hope = true;
            watch.due = watch.due.min(at);
            self.look_at(workload, at);
        }
    }

    /// How many auctions have found no taker since something of it was missing, or to be moved.
    pub fn tries(&self, workload: &WorkloadId) -> u32 {
        self.watches.get(workload).map_or(0, |watch| watch.tries)
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
        let new = Watch { since: now, failed: None, tries: 0, hope: false, due };
        let watch = self.watches.entry(workload).or_insert(new);
        watch.failed = Some(now);
        watch.tries = watch.tries.saturating_add(1);
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
        self.watches.values().map(|watch| watch.due).chain(self.looks.values().copied()).min()
    }

    /// Marks what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let dirty = &mut self.dirty;
        self.looks.retain(|workload, at| {
            let due = *at <= now;
            if due {
                dirty.insert(*workload);
            }
            !due
        });
        for (workload, watch) in &mut self.watches {
            if watch.due <= now {
                self.dirty.insert(*workload);
                // Whoever looks sets the next wait; until then do not come back at once.
                watch.due = now + RETRY;
            }
        }
    }
}

//! What this node runs, and at what price it would run more.
//!
//! **States of a placement.** `Fetching` (its image is on the way) → `Blocked` (what makes room for it is still here, or
//! its predecessor, or a singleton has no lease yet) → `Starting` → `Running` → `Exited`; `Running` → `Waiting` →
//! `Starting` when its restart policy says so. `Failed` (this node could not start it), `Lost` (its container vanished
//! with the machine's power, or its lease lapsed) and `Evicted` (it made way for a higher priority) end it here, and
//! the custodian has it placed anew. A placement that is not wanted any more is stopped, its container deleted, and
//! its fact replaced by a tombstone.
//!
//! **Making way.** What is evicted counts no more as reserved at once, but what it makes way for starts only when its
//! container has ended. An update's successor on the same node takes the placement over and starts when the container
//! of its predecessor has been deleted.
//!
//! **Who writes.** This node alone publishes its placements, and no other fact changes them: a removed workload, a
//! smaller number of replicas or a later epoch elsewhere are reasons for this node to stop its own.
//!
//! **If either side dies.** Accepting an award writes the placement down before anything starts. After a restart each
//! placement that was starting or running is looked for: the container still runs (its shim outlives the daemon), or
//! left an exit code, or is gone and so `Lost`. No earlier epoch is ever started again.
//!
//! **Bounds.** [`MAX_PLACEMENTS`] placements; one effect in flight for each; [`MAX_CANCELLED`] awards remembered as
//! refused.

mod offer;
mod price;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::auction::{Award, Refusal};
use crate::catalog::PlacementFact;
use crate::confinement::Offers;
use crate::contract::{Effect, Outcome};
use crate::id::{ChunkId, NodeId, WorkloadId};
use crate::lease::MARGIN;
use crate::time::{Instant, UnixMillis};
use crate::workload::{PlacementId, Resources, Spec};

pub use offer::Hold;
pub use price::Situation;
pub use state::{Adopted, ExitStatus, PlacementState, StartError};

/// The most bytes that are said of a container.
const MAX_NOTE: usize = 200;
/// The most placements one node runs.
pub const MAX_PLACEMENTS: usize = 1024;
/// Awards that this node was asked about and had not seen; they are refused if they come late.
const MAX_CANCELLED: usize = 1024;
/// The wait before the first restart; it doubles up to [`MAX_BACKOFF`], as docker's does.
const BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// A container that ran this long starts with the shortest wait again.
const STABLE: Duration = Duration::from_secs(10);
/// A replica that failed here is not taken again for this long.
const SHUN: Duration = Duration::from_secs(30);
/// Features that this release understands; a workload that requires another is refused.
pub const FEATURES: [&str; 10] =
    ["gang", "singleton", "apart", "confinement", "network", "devices", "io", "limits", "lookup", "init"];
/// A lease must last so much longer than [`MARGIN`] for a container to be started with it.
const WORTH_STARTING: Duration = Duration::from_millis(500);

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Intent {
    Run,
    /// Stop it, keep what it left.
    Stop,
    /// Stop it, keep what it left, and say that it made way.
    Evict,
    /// Stop it and delete what it left.
    Drop,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Busy {
    Starting,
    Adopting,
    Removing,
}

/// One placement that this node accepted.
#[derive(Debug)]
pub struct Held {
    /// What to run.
    pub spec: Arc<Spec>,
    /// As published.
    pub fact: PlacementFact,
    intent: Intent,
    busy: Option<Busy>,
    stop_sent: bool,
    restart_at: Option<Instant>,
    started: Option<Instant>,
    image_here: bool,
    /// Until when its lease lets it run, of a singleton.
    lease: Option<Instant>,
    /// Its lease has ended while its container ran.
    lapsed: bool,
    /// It runs of an image that turned out to be damaged.
    quarantined: Option<String>,
    /// It makes way, whatever else becomes of it: what it takes is promised to another.
    leaving: bool,
    /// What was said of it while it ran.
    note: String,
    predecessor: Option<Predecessor>,
}

/// The container of an earlier form of the same replica, which is being ended.
#[derive(Debug)]
struct Predecessor {
    epoch: u64,
    spec: Arc<Spec>,
    grace: Duration,
    removing: bool,
}

/// What the worker wants done. The node carries it out in order.
#[derive(Debug)]
pub enum Action {
    /// Do this for that placement, and come back with its end.
    Effect(PlacementId, Effect),
    /// The placement's fact changed.
    Publish(WorkloadId, u32),
    /// The placement is no more.
    Retract(WorkloadId, u32),
    /// This image is needed.
    Fetch(ChunkId),
    /// This may run only with a lease.
    Lease(PlacementId),
    /// This has ended and does not start again.
    Unlease(PlacementId),
    /// This does not start again, and may not have ended.
    Abandon(PlacementId),
}

/// The placements of one node.
#[derive(Debug, Default)]
pub struct Worker {
    capacity: Resources,
    labels: BTreeMap<String, String>,
    offers: Offers,
    pressure: u8,
    bandwidth: u64,
    placements: BTreeMap<(WorkloadId, u32), Held>,
    /// By who asked, since one auctioneer cannot have another's awards refused, and up to which of its auctions: the next one may
    /// try the same epoch again.
    cancelled: VecDeque<(NodeId, PlacementId, UnixMillis)>,
    /// Until then nothing from an earlier life is started: it may have been moved meanwhile.
    hold_until: Instant,
    /// Replicas that failed here, and until when they are not taken again.
    shunned: BTreeMap<(WorkloadId, u32), Instant>,
    /// Room for parts of gangs, by who asked and in which auction.
    holds: BTreeMap<(NodeId, u64), Hold>,
    draining: bool,
    actions: Vec<Action>,
}

impl Worker {
    /// A worker with nothing to do.
    pub fn new(labels: BTreeMap<String, String>, offers: Offers) -> Self {
        // 100 MB/s until measured: a gigabit link.
        Worker { labels, offers, bandwidth: 100_000_000, ..Worker::default() }
    }

    /// Nothing from an earlier life is started before `until`.
    pub fn hold_starts(&mut self, until: Instant) {
        self.hold_until = until;
    }

    /// Whether this node is being emptied: it takes nothing more.
    pub fn set_draining(&mut self, draining: bool) {
        self.draining = draining;
    }

    /// What the machine can give, and how busy its processors are (0–100).
    pub fn set_load(&mut self, capacity: Resources, pressure: u8, now: Instant) {
        let grown = self.capacity != capacity;
        self.capacity = capacity;
        self.pressure = pressure.min(100);
        if grown {
            self.made_way(now);
        }
    }

    /// All that the machine can give.
    pub fn capacity(&self) -> Resources {
        self.capacity
    }

    /// How fast images came lately, in bytes a second.
    pub fn measured_bandwidth(&mut self, bytes: u64, elapsed: Duration) {
        // Small transfers say more about latency than about bandwidth.
        if bytes >= 256 * 1024 && !elapsed.is_zero() {
            let sample = (bytes as f64 / elapsed.as_secs_f64()) as u64;
            self.bandwidth = (self.bandwidth * 3 + sample) / 4;
        }
    }

    /// Every placement here.
    pub fn placements(&self) -> impl Iterator<Item = (&(WorkloadId, u32), &Held)> {
        self.placements.iter()
    }

    /// One placement here.
    pub fn placement(&self, workload: &WorkloadId, replica: u32) -> Option<&Held> {
        self.placements.get(&(*workload, replica))
    }

    /// Images that containers here have, or are to have: also of what is just being replaced.
    pub fn images(&self) -> impl Iterator<Item = ChunkId> {
        self.placements.values().flat_map(|held| {
            let own = Some(held.spec.image.root).filter(|_| held.fact.state.is_active());
            own.into_iter().chain(held.predecessor.as_ref().map(|old| old.spec.image.root))
        })
    }

    /// What the caller must carry out now.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Accepts an award, or refuses it. Saying yes again to one that is held is right: the verdict may have been lost.
    #[expect(clippy::too_many_arguments, reason = "each says another thing of one award")]
    pub fn award(
        &mut self,
        from: NodeId,
        placement: PlacementId,
        spec: &Arc<Spec>,
        award: Award,
        (generation, form): (u64, u64),
        image_here: bool,
        (now, wall): (Instant, UnixMillis),
    ) -> Result<(), Refusal> {
        let key = (placement.workload, placement.replica);
        if let Some(held) = self.placements.get(&key) {
            if held.fact.epoch == placement.epoch && held.intent == Intent::Run {
                return Ok(());
            }
            if held.fact.epoch >= placement.epoch {
                return Err(Refusal::Superseded { epoch: held.fact.epoch });
            }
            let ends = held.intent != Intent::Run || held.fact.form == form;
            let ending = held.busy == Some(Busy::Removing) || held.predecessor.is_some();
            if (held.fact.state.is_active() && ends) || ending {
                // The earlier try is still being ended here.
                return Err(Refusal::FailedHere);
            }
        }
        let asked_about =
            |(by, of, at): &(NodeId, PlacementId, UnixMillis)| (*by, *of) == (from, placement) && award.at <= *at;
        if self.cancelled.iter().any(asked_about) {
            return Err(Refusal::NotSeen);
        }
        self.suits(spec, now, Some(key), false)?;
        self.use_hold(from, &placement.workload);
        let replaced = self.placements.get(&key).map(|held| (held.spec.resources, held.fact.state.is_active()));
        let victims = match replaced {
            // It takes the place of what it replaces, and needs no other.
            Some((resources, true)) => self.room(spec, &resources)?,
            _ => self.room(spec, &Resources::default())?,
        };
        for victim in victims {
            self.evict(victim, spec);
        }
        let predecessor = self.placements.remove(&key).and_then(|held| self.replace(placement, held));
        let state = if image_here { PlacementState::Blocked } else { PlacementState::Fetching };
        let fact = PlacementFact {
            epoch: placement.epoch,
            state,
            detail: String::new(),
            restarts: 0,
            stopped: false,
            generation,
            form,
            accepted: wall.0,
            started: 0,
            award,
        };
        let mut held = Held::new(Arc::clone(spec), fact);
        held.image_here = image_here;
        held.predecessor = predecessor;
        self.placements.insert(key, held);
        if spec.singleton {
            self.actions.push(Action::Lease(placement));
        }
        if image_here {
            self.begin(key, now);
        } else {
            self.actions.push(Action::Publish(key.0, key.1));
            self.actions.push(Action::Fetch(spec.image.root));
        }
        Ok(())
    }

    /// Ends an earlier try of a replica that is placed here anew; what is left of it when its container runs.
    fn replace(&mut self, placement: PlacementId, held: Held) -> Option<Predecessor> {
        let old = PlacementId { epoch: held.fact.epoch, ..placement };
        let grace = Duration::from_secs(u64::from(held.spec.stop_timeout));
        let running = held.fact.state == PlacementState::Running && held.busy.is_none();
        if running {
            self.actions.push(Action::Effect(old, Effect::Stop { placement: old, grace }));
        } else if !held.fact.state.may_run() && held.busy.is_none() {
            self.actions.push(Action::Effect(old, Effect::Remove { placement: old }));
            // An ended container's name is its epoch's: nothing has to wait for its deletion, but where one that was
            // thought to be gone must not run on beside its successor.
            let waits = held.spec.singleton;
            let (spec, grace) = (held.spec, Duration::ZERO);
            return waits.then_some(Predecessor { epoch: old.epoch, spec, grace, removing: true });
        }
        Some(Predecessor { epoch: old.epoch, spec: held.spec, grace, removing: false })
    }

    /// A container of a lower priority makes way.
    fn evict(&mut self, key: (WorkloadId, u32), by: &Spec) {
        if let Some(held) = self.placements.get_mut(&key) {
            held.fact.detail = format!("made way for {}, priority {}", by.name, by.priority);
            held.leaving = true;
            if held.busy.is_some() {
                // It is stopped when what is in flight has ended; a life that begins meanwhile must know it too.
                held.fact.state = PlacementState::Stopping;
                self.actions.push(Action::Publish(key.0, key.1));
            }
            self.intend(key, Intent::Evict);
        }
    }

    /// What the containers that may run here take, whether they are to stay or not.
    fn occupied(&self) -> Resources {
        self.placements.values().fold(Resources::default(), |sum, held| {
            let sum = if held.occupies() { sum.plus(&held.spec.resources) } else { sum };
            held.predecessor.as_ref().map_or(sum, |old| sum.plus(&old.spec.resources))
        })
    }

    /// Whether this award is held here; one that was never seen is refused from now on.
    pub fn query(&mut self, from: NodeId, placement: PlacementId, at: UnixMillis) -> Result<(), Refusal> {
        match self.placements.get(&(placement.workload, placement.replica)) {
            Some(held) if held.fact.epoch == placement.epoch => Ok(()),
            Some(held) if held.fact.epoch > placement.epoch => Err(Refusal::Superseded { epoch: held.fact.epoch }),
            _ => {
                if self.cancelled.len() >= MAX_CANCELLED {
                    self.cancelled.pop_front();
                }
                self.cancelled.push_back((from, placement, at));
                Err(Refusal::NotSeen)
            }
        }
    }

    /// Takes up a placement from this node's earlier life.
    pub fn restore(&mut self, workload: WorkloadId, replica: u32, spec: Arc<Spec>, fact: PlacementFact) {
        let mut held = Held::new(spec, fact);
        let placement = PlacementId { workload, replica, epoch: held.fact.epoch };
        match held.fact.state {
            // Nothing was started yet, or only waited for: its custodian may have moved it meanwhile, and if not, it
            // goes on from here.
            PlacementState::Fetching | PlacementState::Blocked => {
                held.fact.state = PlacementState::Fetching;
                self.actions.push(Action::Fetch(held.spec.image.root));
            }
            PlacementState::Starting | PlacementState::Running | PlacementState::Stopping | PlacementState::Waiting => {
                if held.fact.state == PlacementState::Stopping {
                    // Nothing says why it was being stopped; if it is not wanted any more, that comes on top.
                    held.intent = Intent::Evict;
                    held.leaving = true;
                }
                held.busy = Some(Busy::Adopting);
                held.image_here = true;
                self.actions.push(Action::Effect(placement, Effect::Adopt { placement }));
            }
            PlacementState::Exited(_) | PlacementState::Failed | PlacementState::Lost | PlacementState::Evicted => {}
        }
        if held.spec.singleton && held.fact.state.is_active() {
            self.actions.push(Action::Lease(placement));
        }
        self.placements.insert((workload, replica), held);
    }

    /// An image is complete here.
    pub fn image_here(&mut self, root: &ChunkId, now: Instant) {
        self.image_ready(root, false, now);
    }

    /// What names an image's contents is here: enough for what waits for no more.
    pub fn image_listed(&mut self, root: &ChunkId, now: Instant) {
        self.image_ready(root, true, now);
    }

    fn image_ready(&mut self, root: &ChunkId, lazy: bool, now: Instant) {
        let ready = |held: &Held| {
            let waits = held.spec.image.root == *root && held.fact.state == PlacementState::Fetching;
            waits && (held.spec.lazy || !lazy)
        };
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| ready(held)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(held) = self.placements.get_mut(&key) {
                held.image_here = true;
            }
            self.begin(key, now);
        }
    }

    /// Says something of a container that runs.
    pub fn note(&mut self, placement: PlacementId, mut detail: String) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key).filter(|held| held.fact.epoch == placement.epoch) else {
            return;
        };
        detail.truncate(detail.floor_char_boundary(MAX_NOTE));
        // It may come from the container, and goes to terminals.
        let detail: String = detail.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if held.fact.state == PlacementState::Running && held.fact.detail != detail {
            held.note.clone_from(&detail);
            held.fact.detail = detail;
            self.actions.push(Action::Publish(key.0, key.1));
        }
    }

    /// A singleton's lease lets it run until then.
    pub fn leased(&mut self, placement: PlacementId, until: Instant, now: Instant) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key).filter(|held| held.fact.epoch == placement.epoch) else {
            return;
        };
        held.lease = Some(until);
        if held.lapsed {
            // It is being stopped already; the next try has its own lease.
            return;
        }
        if held.fact.state.may_run() {
            self.actions.push(Action::Effect(placement, Effect::Extend { placement, until }));
        }
        self.begin(key, now);
    }

    /// A singleton's lease is about to end: its container is being killed by its shim, and not started again.
    pub fn lapsed(&mut self, placement: PlacementId) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key).filter(|held| held.fact.epoch == placement.epoch) else {
            return;
        };
        held.lease = None;
        if !held.fact.state.may_run() {
            return;
        }
        held.lapsed = true;
        held.fact.detail = "its lease lapsed: no majority of its custodians renewed it".to_owned();
        if held.fact.state == PlacementState::Running {
            held.stop_sent = true;
            held.fact.state = PlacementState::Stopping;
            self.actions.push(Action::Effect(placement, Effect::Stop { placement, grace: Duration::ZERO }));
            self.actions.push(Action::Publish(key.0, key.1));
        }
    }

    /// An image cannot be had here. What was started before all of it was here goes on with what there is, unless it is `damaged`:
    /// then nothing of it is to be believed.
    pub fn image_failed(&mut self, root: &ChunkId, damaged: bool, reason: &str, now: Instant) {
        let of_it = |held: &Held| held.spec.image.root == *root;
        let runs = |held: &Held| damaged && of_it(held) && held.spec.lazy && held.occupies();
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| runs(held)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(held) = self.placements.get_mut(&key) {
                held.quarantined = Some(format!("its image turned out to be damaged while it ran: {reason}"));
                self.end_quarantined(key);
            }
        }
        let waits = |held: &Held| {
            let begun = matches!(held.fact.state, PlacementState::Waiting | PlacementState::Blocked) && held.spec.lazy;
            of_it(held) && held.busy.is_none() && (held.fact.state == PlacementState::Fetching || (damaged && begun))
        };
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| waits(held)).map(|(key, _)| *key).collect();
        for key in keys {
            self.fail(key, reason.to_owned(), now);
        }
    }

    /// Kills what runs of an image that is not to be believed.
    fn end_quarantined(&mut self, key: (WorkloadId, u32)) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        if held.quarantined.is_none() || held.busy.is_some() || held.fact.state != PlacementState::Running {
            return;
        }
        let placement = PlacementId { workload: key.0, replica: key.1, epoch: held.fact.epoch };
        held.stop_sent = true;
        held.fact.state = PlacementState::Stopping;
        self.actions.push(Action::Effect(placement, Effect::Stop { placement, grace: Duration::ZERO }));
        self.actions.push(Action::Publish(key.0, key.1));
    }

    /// How many replicas of a workload are wanted; none at all when it is `removed`.
    pub fn want(&mut self, workload: &WorkloadId, replicas: u32, removed: bool) {
        let range = (*workload, 0)..=(*workload, u32::MAX);
        let keys: Vec<_> = self.placements.range(range).map(|(key, _)| *key).collect();
        for key in keys {
            if removed {
                self.intend(key, Intent::Drop);
            } else if key.1 >= replicas {
                // Scaled to none is `stop`, which keeps what the container left; scaled down is not.
                self.intend(key, if replicas == 0 { Intent::Stop } else { Intent::Drop });
            }
        }
    }

    /// Another node runs this replica with a right that is better than this node's.
    pub fn superseded(&mut self, workload: WorkloadId, replica: u32, by: NodeId, epoch: u64) {
        if let Some(held) = self.placements.get_mut(&(workload, replica)) {
            held.fact.detail = format!("replaced by epoch {epoch} on node {}", by.short());
            self.intend((workload, replica), Intent::Drop);
        }
    }

    /// Whether a placement that is to be started is still wanted.
    pub fn may_start(&self, placement: &PlacementId) -> bool {
        let held = self.placements.get(&(placement.workload, placement.replica));
        held.is_some_and(|held| held.fact.epoch == placement.epoch && held.intent == Intent::Run && !held.lapsed)
    }

    /// It was not, and nothing was begun.
    pub fn not_started(&mut self, placement: PlacementId, now: Instant) {
        let key = (placement.workload, placement.replica);
        if let Some(held) = self.placements.get_mut(&key).filter(|held| held.fact.epoch == placement.epoch) {
            held.busy = None;
            self.lost(key, now);
        } else {
            let nothing = StartError::Node("it was not begun".to_owned());
            self.predecessor_ended(placement, &Outcome::Started(Err(nothing)), now);
        }
    }

    /// An effect for a placement ended.
    pub fn ended(&mut self, placement: PlacementId, outcome: Outcome, now: Instant, wall: UnixMillis) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key) else { return };
        if held.fact.epoch != placement.epoch {
            return self.predecessor_ended(placement, &outcome, now);
        }
        match outcome {
            Outcome::Started(Ok(())) | Outcome::Adopted(Adopted::Running) => {
                if held.busy == Some(Busy::Starting) {
                    held.fact.started = wall.0;
                }
                held.busy = None;
                held.stop_sent = false;
                held.started = Some(now);
                held.fact.state = PlacementState::Running;
                held.fact.detail.clear();
                let (lapsed, lease) = (held.lapsed, held.lease);
                self.actions.push(Action::Effect(placement, Effect::Watch { placement }));
                if lapsed {
                    self.lapsed(placement);
                } else if let Some(until) = lease {
                    // It may have been renewed while the container was being made.
                    self.actions.push(Action::Effect(placement, Effect::Extend { placement, until }));
                }
                self.actions.push(Action::Publish(key.0, key.1));
                self.end_quarantined(key);
                self.pursue(key);
            }
            Outcome::Started(Err(StartError::Workload { code, reason })) => {
                held.busy = None;
                held.fact.detail = reason;
                self.exited(key, ExitStatus { code, out_of_memory: false }, false, false, now);
            }
            Outcome::Started(Err(StartError::Node(reason))) => {
                held.busy = None;
                self.fail(key, reason, now);
            }
            Outcome::Exited(status) => {
                held.busy = None;
                self.exited(key, status, true, false, now);
            }
            Outcome::Adopted(Adopted::Exited(status)) => {
                held.busy = None;
                self.exited(key, status, true, true, now);
            }
            Outcome::Adopted(Adopted::Gone) => {
                held.busy = None;
                held.fact.detail = "its container was gone when this node started".to_owned();
                if held.spec.singleton {
                    // Gone is what does not answer: its lease runs out, and is not given back.
                    self.actions.push(Action::Abandon(placement));
                }
                self.lost(key, now);
            }
            Outcome::Done if held.busy == Some(Busy::Removing) => {
                if let Some(held) = self.placements.remove(&key).filter(|held| held.spec.singleton) {
                    self.actions.push(Action::Unlease(PlacementId { epoch: held.fact.epoch, ..placement }));
                }
                self.actions.push(Action::Retract(key.0, key.1));
                self.made_way(now);
            }
            _ => {}
        }
    }

    /// Something became of the container that is to be gone before its successor starts.
    fn predecessor_ended(&mut self, placement: PlacementId, outcome: &Outcome, now: Instant) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key) else { return };
        let Some(old) = held.predecessor.as_mut().filter(|old| old.epoch == placement.epoch) else { return };
        match outcome {
            Outcome::Started(Ok(())) | Outcome::Adopted(Adopted::Running) => {
                let grace = old.grace;
                self.actions.push(Action::Effect(placement, Effect::Watch { placement }));
                self.actions.push(Action::Effect(placement, Effect::Stop { placement, grace }));
            }
            Outcome::Done if old.removing => {
                held.predecessor = None;
                self.pursue(key);
                self.made_way(now);
            }
            Outcome::Started(Err(_)) | Outcome::Exited(_) | Outcome::Adopted(_) if !old.removing => {
                old.removing = true;
                self.actions.push(Action::Effect(placement, Effect::Remove { placement }));
            }
            _ => {}
        }
    }

    /// A container has ended: what waits for its room may start.
    fn made_way(&mut self, now: Instant) {
        let blocked = |held: &Held| held.fact.state == PlacementState::Blocked;
        let waits: Vec<_> = self.placements.iter().filter(|(_, held)| blocked(held)).map(|(key, _)| *key).collect();
        for waiting in waits {
            self.begin(waiting, now);
        }
    }

    /// It is over here, and is to be placed anew.
    fn lost(&mut self, key: (WorkloadId, u32), now: Instant) {
        if let Some(held) = self.placements.get_mut(&key) {
            held.fact.state = if held.intent == Intent::Evict { PlacementState::Evicted } else { PlacementState::Lost };
        }
        self.over(key, now);
    }

    /// Its container has ended and is not started again.
    fn over(&mut self, key: (WorkloadId, u32), now: Instant) {
        let Some(held) = self.placements.get(&key) else { return };
        let placement = PlacementId { workload: key.0, replica: key.1, epoch: held.fact.epoch };
        if held.spec.singleton {
            self.actions.push(Action::Unlease(placement));
        }
        self.actions.push(Action::Publish(key.0, key.1));
        self.pursue(key);
        self.made_way(now);
    }

    /// The time at which [`Worker::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.placements.values().filter_map(|held| held.restart_at).chain(self.next_hold()).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.shunned.retain(|_, until| *until > now);
        self.holds_due(now);
        let due = |held: &Held| held.restart_at.is_some_and(|at| at <= now);
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| due(held)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(held) = self.placements.get_mut(&key) {
                held.restart_at = None;
                held.fact.restarts += 1;
                held.fact.state = PlacementState::Blocked;
                self.begin(key, now);
            }
        }
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.placements.len() <= MAX_PLACEMENTS);
        assert!(self.cancelled.len() <= MAX_CANCELLED);
        let reserved = self.reserved();
        let shrunk = self.capacity == Resources::default();
        assert!(
            shrunk || (reserved.cpu_milli <= self.capacity.cpu_milli && reserved.memory <= self.capacity.memory),
            "a node over its capacity: {reserved:?} of {:?}",
            self.capacity
        );
        for held in self.placements.values() {
            assert_eq!(held.restart_at.is_some(), held.fact.state == PlacementState::Waiting && held.busy.is_none());
        }
    }

    /// Starts what is to run and has not been started, as soon as nothing is in its way any more.
    fn begin(&mut self, key: (WorkloadId, u32), now: Instant) {
        let Some(held) = self.placements.get(&key) else { return };
        let waits = matches!(held.fact.state, PlacementState::Fetching | PlacementState::Blocked);
        if !waits || held.intent != Intent::Run || held.busy.is_some() || !held.image_here {
            return;
        }
        let placement = PlacementId { workload: key.0, replica: key.1, epoch: held.fact.epoch };
        let leased = !held.spec.singleton || held.lease.is_some_and(|until| until > now + MARGIN + WORTH_STARTING);
        let room = self.capacity.fits(&self.occupied(), &held.spec.resources);
        // What other containers still have, and what those that were here before them have.
        let others = self.placements.iter().filter(|(other, _)| **other != key).flat_map(|(_, other)| {
            let own = Some(&other.spec).filter(|_| other.occupies());
            own.into_iter().chain(other.predecessor.as_ref().map(|old| &old.spec))
        });
        let clear = !others.clone().any(|other| held.spec.clashes(other).is_some())
            && self.offers.copies(&held.spec.confinement, others.map(|other| &other.confinement)).is_ok();
        let leaving = |other: &Held| {
            let stops = other.intent != Intent::Run || other.leaving || other.lapsed || other.predecessor.is_some();
            stops || other.fact.state == PlacementState::Stopping
        };
        if !room && held.predecessor.is_none() && !self.placements.values().any(leaving) {
            // The machine has less than it had, and nobody makes way: let another have it.
            if let Some(held) = self.placements.get_mut(&key) {
                held.fact.detail = "this node has not enough room for it any more".to_owned();
            }
            return self.lost(key, now);
        }
        let Some(held) = self.placements.get_mut(&key) else { return };
        let obstacle = if held.predecessor.is_some() {
            "its predecessor here is being stopped"
        } else if !room {
            "what makes way for it is being stopped"
        } else if !clear {
            "a port or device that it asks for is being given up"
        } else if !leased {
            "waits for a lease from a majority of its custodians"
        } else {
            held.fact.state = PlacementState::Starting;
            held.fact.detail.clear();
            held.busy = Some(Busy::Starting);
            let (spec, until) = (Arc::clone(&held.spec), held.lease);
            self.actions.push(Action::Effect(placement, Effect::Start { placement, spec, until }));
            return self.actions.push(Action::Publish(key.0, key.1));
        };
        if held.fact.state != PlacementState::Blocked || held.fact.detail != obstacle {
            held.fact.state = PlacementState::Blocked;
            held.fact.detail = obstacle.to_owned();
            self.actions.push(Action::Publish(key.0, key.1));
        }
    }

    fn fail(&mut self, key: (WorkloadId, u32), reason: String, now: Instant) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        held.restart_at = None;
        held.fact.state = PlacementState::Failed;
        held.fact.detail = reason;
        self.shunned.insert(key, now + SHUN);
        self.over(key, now);
    }

    fn exited(&mut self, key: (WorkloadId, u32), status: ExitStatus, may_restart: bool, adopted: bool, now: Instant) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        if let Some(reason) = held.quarantined.take().filter(|_| held.intent == Intent::Run) {
            return self.fail(key, reason, now);
        }
        let restarts = held.fact.restarts;
        if held.fact.detail == std::mem::take(&mut held.note) {
            held.fact.detail.clear();
        }
        // Killed with its lease, which an earlier life may have held.
        const KILLED: i32 = 137;
        let unleased =
            held.spec.singleton && status.code == KILLED && held.lease.is_none_or(|until| until <= now + MARGIN);
        if unleased && !held.lapsed {
            held.fact.detail = "killed when its lease was over".to_owned();
        }
        if held.lapsed || unleased || held.intent == Intent::Evict {
            return self.lost(key, now);
        }
        if may_restart && held.intent == Intent::Run && held.spec.restart.applies(status.code, restarts) {
            let stable = held.started.is_some_and(|started| now.since(started) >= STABLE);
            let doubled = if stable { 0 } else { restarts.min(10) };
            let wait = (BACKOFF * (1 << doubled)).min(MAX_BACKOFF);
            held.restart_at = Some(if adopted { self.hold_until.max(now + wait) } else { now + wait });
            held.fact.state = PlacementState::Waiting;
            held.fact.detail = format!("exited with {}", status.code);
            self.actions.push(Action::Publish(key.0, key.1));
            self.pursue(key);
        } else {
            held.fact.state = PlacementState::Exited(status);
            held.fact.stopped = held.intent != Intent::Run;
            self.over(key, now);
        }
    }

    fn intend(&mut self, key: (WorkloadId, u32), intent: Intent) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        if held.intent != Intent::Drop {
            held.intent = intent;
        }
        self.pursue(key);
    }

    /// Takes the next step towards what is intended, when nothing is in flight that will lead here again.
    fn pursue(&mut self, key: (WorkloadId, u32)) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        let placement = PlacementId { workload: key.0, replica: key.1, epoch: held.fact.epoch };
        if held.intent == Intent::Run || held.busy.is_some() || held.predecessor.is_some() {
            return;
        }
        match held.fact.state {
            PlacementState::Running if !held.stop_sent => {
                held.stop_sent = true;
                held.fact.state = PlacementState::Stopping;
                let grace = Duration::from_secs(u64::from(held.spec.stop_timeout));
                self.actions.push(Action::Effect(placement, Effect::Stop { placement, grace }));
                self.actions.push(Action::Publish(key.0, key.1));
            }
            PlacementState::Running | PlacementState::Stopping | PlacementState::Starting => {}
            PlacementState::Waiting if held.intent == Intent::Stop => {
                held.restart_at = None;
                held.fact.state = PlacementState::Exited(ExitStatus::default());
                held.fact.stopped = true;
                if held.spec.singleton {
                    self.actions.push(Action::Unlease(placement));
                }
                self.actions.push(Action::Publish(key.0, key.1));
            }
            PlacementState::Waiting | PlacementState::Fetching | PlacementState::Blocked
                if held.intent == Intent::Evict =>
            {
                held.restart_at = None;
                held.fact.state = PlacementState::Evicted;
                if held.spec.singleton {
                    self.actions.push(Action::Unlease(placement));
                }
                self.actions.push(Action::Publish(key.0, key.1));
            }
            PlacementState::Exited(_) | PlacementState::Failed | PlacementState::Lost | PlacementState::Evicted
                if held.intent != Intent::Drop => {}
            PlacementState::Waiting
            | PlacementState::Fetching
            | PlacementState::Blocked
            | PlacementState::Exited(_)
            | PlacementState::Failed
            | PlacementState::Evicted
            | PlacementState::Lost => {
                held.restart_at = None;
                held.busy = Some(Busy::Removing);
                if held.fact.state.is_active() {
                    held.fact.state = PlacementState::Stopping;
                }
                self.actions.push(Action::Effect(placement, Effect::Remove { placement }));
            }
        }
    }
}

impl Held {
    fn new(spec: Arc<Spec>, fact: PlacementFact) -> Self {
        Held {
            spec,
            fact,
            intent: Intent::Run,
            busy: None,
            stop_sent: false,
            restart_at: None,
            started: None,
            image_here: false,
            lease: None,
            lapsed: false,
            quarantined: None,
            leaving: false,
            note: String::new(),
            predecessor: None,
        }
    }

    /// Whether its container may exist, so that what it uses is in use.
    fn occupies(&self) -> bool {
        self.fact.state.may_run() || matches!(self.busy, Some(Busy::Starting | Busy::Adopting))
    }

    /// Whether it is on its way out, so that what it takes is promised to another.
    fn is_leaving(&self) -> bool {
        self.leaving
    }
}

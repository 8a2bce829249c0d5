//! What this node runs, and at what price it would run more.
//!
//! **States of a placement.** `Fetching` (its image is on the way) → `Starting` → `Running` → `Exited`; `Running` →
//! `Waiting` → `Starting` when its restart policy says so. `Failed` (this node could not start it) and `Lost` (its
//! container vanished with the machine's power) end it here, and the custodian has it placed anew. A placement that is
//! not wanted any more is stopped, its container deleted, and its fact replaced by a tombstone.
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

mod price;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::auction::{Award, Basis, Refusal};
use crate::catalog::PlacementFact;
use crate::contract::{Effect, Outcome};
use crate::id::{ChunkId, NodeId, WorkloadId};
use crate::time::{Instant, UnixMillis};
use crate::workload::{PlacementId, Resources, Spec};

pub use price::Situation;

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
pub const FEATURES: [&str; 0] = [];

/// How far a placement is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlacementState {
    /// The image is on its way.
    Fetching,
    /// The container is being made.
    Starting,
    /// Its process runs.
    Running,
    /// It exited and is started again after a wait.
    Waiting,
    /// It is being stopped.
    Stopping,
    /// It ended by itself or was stopped.
    Exited(ExitStatus),
    /// This node could not start it.
    Failed,
    /// Its container vanished with the machine's last boot.
    Lost,
}

impl PlacementState {
    /// Whether a replica in this state counts as present.
    pub fn is_active(&self) -> bool {
        !matches!(self, PlacementState::Exited(_) | PlacementState::Failed | PlacementState::Lost)
    }
}

/// How a container ended.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// As a shell says it: 128 + n for signal n.
    pub code: i32,
    /// The kernel killed it for memory.
    pub out_of_memory: bool,
}

/// Why a container did not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartError {
    /// What was asked for cannot run anywhere: no such command, say. `code` is docker's: 126 or 127, else 125.
    Workload {
        /// The exit code to report.
        code: i32,
        /// In words.
        reason: String,
    },
    /// This machine could not: no space, no permission. Another may.
    Node(String),
}

/// What an earlier life's container is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It runs.
    Running,
    /// It ended meanwhile.
    Exited(ExitStatus),
    /// Nothing is left of it.
    Gone,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Intent {
    Run,
    /// Stop it, keep what it left.
    Stop,
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
}

/// The placements of one node.
#[derive(Debug, Default)]
pub struct Worker {
    capacity: Resources,
    labels: BTreeMap<String, String>,
    pressure: u8,
    bandwidth: u64,
    placements: BTreeMap<(WorkloadId, u32), Held>,
    /// By who asked: one auctioneer cannot have another's awards refused.
    cancelled: VecDeque<(NodeId, PlacementId)>,
    /// Until then nothing from an earlier life is started: it may have been moved meanwhile.
    hold_until: Instant,
    /// Replicas that failed here, and until when they are not taken again.
    shunned: BTreeMap<(WorkloadId, u32), Instant>,
    actions: Vec<Action>,
}

impl Worker {
    /// A worker with nothing to do.
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        // 100 MB/s until measured: a gigabit link.
        Worker { labels, bandwidth: 100_000_000, ..Worker::default() }
    }

    /// Nothing from an earlier life is started before `until`.
    pub fn hold_starts(&mut self, until: Instant) {
        self.hold_until = until;
    }

    /// What the machine can give, and how busy its processors are (0–100).
    pub fn set_load(&mut self, capacity: Resources, pressure: u8) {
        self.capacity = capacity;
        self.pressure = pressure.min(100);
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

    /// What is reserved by placements that are not over.
    pub fn reserved(&self) -> Resources {
        let active = self.placements.values().filter(|held| held.fact.state.is_active());
        active.fold(Resources::default(), |sum, held| sum.plus(&held.spec.resources))
    }

    /// What the caller must carry out now.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Prices for up to `replicas` further replicas, or why not even one.
    pub fn bid(&self, spec: &Spec, replicas: u32, missing: u64, now: Instant) -> Result<(Vec<u32>, Basis), Refusal> {
        self.refuse(spec, now, None)?;
        let situation = self.situation(missing, spec.image.size);
        let mut prices = Vec::new();
        let mut reserved = self.reserved();
        while prices.len() < replicas as usize && self.capacity.fits(&reserved, &spec.resources) {
            prices.push(situation.price(&self.capacity, &reserved, &spec.resources, prices.len() as u32));
            reserved = reserved.plus(&spec.resources);
        }
        Ok((prices, situation.basis(&self.capacity, &self.reserved())))
    }

    /// Accepts an award, or refuses it. Saying yes again to one that is held is right: the verdict may have been lost.
    #[expect(clippy::too_many_arguments, reason = "each says another thing of one award")]
    pub fn award(
        &mut self,
        from: NodeId,
        placement: PlacementId,
        spec: &Arc<Spec>,
        award: Award,
        generation: u64,
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
            if held.fact.state.is_active() || held.busy.is_some() {
                // The earlier try is still being ended here.
                return Err(Refusal::FailedHere);
            }
            let placement = PlacementId { epoch: held.fact.epoch, ..placement };
            self.actions.push(Action::Effect(placement, Effect::Remove { placement }));
        }
        if self.cancelled.contains(&(from, placement)) {
            return Err(Refusal::NotSeen);
        }
        self.refuse(spec, now, Some(key))?;
        let state = if image_here { PlacementState::Starting } else { PlacementState::Fetching };
        let fact = PlacementFact {
            epoch: placement.epoch,
            state,
            detail: String::new(),
            restarts: 0,
            stopped: false,
            generation,
            accepted: wall.0,
            started: 0,
            award,
        };
        self.placements.insert(key, Held::new(Arc::clone(spec), fact));
        if image_here {
            self.start(key);
        } else {
            self.actions.push(Action::Publish(key.0, key.1));
            self.actions.push(Action::Fetch(spec.image.root));
        }
        Ok(())
    }

    /// Whether this award is held here; one that was never seen is refused from now on.
    pub fn query(&mut self, from: NodeId, placement: PlacementId) -> Result<(), Refusal> {
        match self.placements.get(&(placement.workload, placement.replica)) {
            Some(held) if held.fact.epoch == placement.epoch => Ok(()),
            Some(held) if held.fact.epoch > placement.epoch => Err(Refusal::Superseded { epoch: held.fact.epoch }),
            _ => {
                if self.cancelled.len() >= MAX_CANCELLED {
                    self.cancelled.pop_front();
                }
                self.cancelled.push_back((from, placement));
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
            PlacementState::Fetching => self.actions.push(Action::Fetch(held.spec.image.root)),
            PlacementState::Starting | PlacementState::Running | PlacementState::Stopping | PlacementState::Waiting => {
                held.busy = Some(Busy::Adopting);
                self.actions.push(Action::Effect(placement, Effect::Adopt { placement }));
            }
            PlacementState::Exited(_) | PlacementState::Failed | PlacementState::Lost => {}
        }
        self.placements.insert((workload, replica), held);
    }

    /// An image is complete here.
    pub fn image_here(&mut self, root: &ChunkId) {
        let ready = |held: &Held| held.spec.image.root == *root && held.fact.state == PlacementState::Fetching;
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| ready(held)).map(|(key, _)| *key).collect();
        for key in keys {
            self.start(key);
        }
    }

    /// An image cannot be had here.
    pub fn image_failed(&mut self, root: &ChunkId, reason: &str, now: Instant) {
        let waits = |held: &Held| held.spec.image.root == *root && held.fact.state == PlacementState::Fetching;
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| waits(held)).map(|(key, _)| *key).collect();
        for key in keys {
            self.fail(key, reason.to_owned(), now);
        }
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
        held.is_some_and(|held| held.fact.epoch == placement.epoch && held.intent == Intent::Run)
    }

    /// It was not, and nothing was begun.
    pub fn not_started(&mut self, placement: PlacementId) {
        let key = (placement.workload, placement.replica);
        if let Some(held) = self.placements.get_mut(&key).filter(|held| held.fact.epoch == placement.epoch) {
            held.busy = None;
            held.fact.state = PlacementState::Lost;
            self.actions.push(Action::Publish(key.0, key.1));
            self.pursue(key);
        }
    }

    /// An effect for a placement ended.
    pub fn ended(&mut self, placement: PlacementId, outcome: Outcome, now: Instant, wall: UnixMillis) {
        let key = (placement.workload, placement.replica);
        let Some(held) = self.placements.get_mut(&key) else { return };
        if held.fact.epoch != placement.epoch {
            return;
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
                self.actions.push(Action::Effect(placement, Effect::Watch { placement }));
                self.actions.push(Action::Publish(key.0, key.1));
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
                held.fact.state = PlacementState::Lost;
                held.fact.detail = "its container was gone when this node started".to_owned();
                self.actions.push(Action::Publish(key.0, key.1));
                self.pursue(key);
            }
            Outcome::Done if held.busy == Some(Busy::Removing) => {
                self.placements.remove(&key);
                self.actions.push(Action::Retract(key.0, key.1));
            }
            _ => {}
        }
    }

    /// The time at which [`Worker::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.placements.values().filter_map(|held| held.restart_at).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.shunned.retain(|_, until| *until > now);
        let due = |held: &Held| held.restart_at.is_some_and(|at| at <= now);
        let keys: Vec<_> = self.placements.iter().filter(|(_, held)| due(held)).map(|(key, _)| *key).collect();
        for key in keys {
            if let Some(held) = self.placements.get_mut(&key) {
                held.restart_at = None;
                held.fact.restarts += 1;
                self.start(key);
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

    /// Why this node would not run one replica of `spec`. `replaces` is a placement here that it would take the place of.
    fn refuse(&self, spec: &Spec, now: Instant, replaces: Option<(WorkloadId, u32)>) -> Result<(), Refusal> {
        for (name, value) in &spec.on {
            if self.labels.get(name) != Some(value) {
                return Err(Refusal::Label { name: name.clone(), value: value.clone() });
            }
        }
        if let Some(feature) = spec.requires.iter().find(|feature| !FEATURES.contains(&feature.as_str())) {
            return Err(Refusal::Requires(feature.clone()));
        }
        if self.placements.len() >= MAX_PLACEMENTS {
            return Err(Refusal::Full);
        }
        let mut shunned = self.shunned.iter().filter(|(_, until)| **until > now).map(|(key, _)| *key);
        if shunned.any(|key| replaces.map_or(key.0 == spec.id, |replaces| key == replaces)) {
            return Err(Refusal::FailedHere);
        }
        let reserved = self.reserved();
        let free = Resources {
            cpu_milli: self.capacity.cpu_milli.saturating_sub(reserved.cpu_milli),
            memory: self.capacity.memory.saturating_sub(reserved.memory),
        };
        if spec.resources.memory > free.memory {
            return Err(Refusal::Memory { asked: spec.resources.memory, free: free.memory });
        }
        if spec.resources.cpu_milli > free.cpu_milli {
            return Err(Refusal::Cpu { asked: spec.resources.cpu_milli, free: free.cpu_milli });
        }
        Ok(())
    }

    fn situation(&self, missing: u64, size: u64) -> Situation {
        let starting = |held: &&Held| matches!(held.fact.state, PlacementState::Starting | PlacementState::Fetching);
        let starting = self.placements.values().filter(starting).count() as u32;
        let running = self.placements.values().filter(|held| held.fact.state.is_active()).count() as u32;
        Situation { missing, size, bandwidth: self.bandwidth, starting, running, pressure: self.pressure }
    }

    fn start(&mut self, key: (WorkloadId, u32)) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        held.fact.state = PlacementState::Starting;
        held.busy = Some(Busy::Starting);
        let placement = PlacementId { workload: key.0, replica: key.1, epoch: held.fact.epoch };
        let spec = Arc::clone(&held.spec);
        self.actions.push(Action::Effect(placement, Effect::Start { placement, spec }));
        self.actions.push(Action::Publish(key.0, key.1));
    }

    fn fail(&mut self, key: (WorkloadId, u32), reason: String, now: Instant) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        held.fact.state = PlacementState::Failed;
        held.fact.detail = reason;
        self.shunned.insert(key, now + SHUN);
        self.actions.push(Action::Publish(key.0, key.1));
        self.pursue(key);
    }

    fn exited(&mut self, key: (WorkloadId, u32), status: ExitStatus, may_restart: bool, adopted: bool, now: Instant) {
        let Some(held) = self.placements.get_mut(&key) else { return };
        let restarts = held.fact.restarts;
        if may_restart && held.intent == Intent::Run && held.spec.restart.applies(status.code, restarts) {
            let stable = held.started.is_some_and(|started| now.since(started) >= STABLE);
            let doubled = if stable { 0 } else { restarts.min(10) };
            let wait = (BACKOFF * (1 << doubled)).min(MAX_BACKOFF);
            held.restart_at = Some(if adopted { self.hold_until.max(now + wait) } else { now + wait });
            held.fact.state = PlacementState::Waiting;
            held.fact.detail = format!("exited with {}", status.code);
        } else {
            held.fact.state = PlacementState::Exited(status);
            held.fact.stopped = held.intent != Intent::Run;
        }
        self.actions.push(Action::Publish(key.0, key.1));
        self.pursue(key);
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
        if held.intent == Intent::Run || held.busy.is_some() {
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
                self.actions.push(Action::Publish(key.0, key.1));
            }
            PlacementState::Exited(_) | PlacementState::Failed | PlacementState::Lost
                if held.intent == Intent::Stop => {}
            PlacementState::Waiting
            | PlacementState::Fetching
            | PlacementState::Exited(_)
            | PlacementState::Failed
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
        Held { spec, fact, intent: Intent::Run, busy: None, stop_sent: false, restart_at: None, started: None }
    }
}

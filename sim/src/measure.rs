//! What a run measures, and its report.

use std::collections::BTreeMap;

use moyai_protocol::catalog::Key;
use moyai_protocol::id::WorkloadId;
use moyai_protocol::time::Instant;
use serde::Serialize;

use crate::options::Options;

/// Milliseconds of many things.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// Half of them took at most so long.
    pub p50: f64,
    /// 99 of 100.
    pub p99: f64,
    /// All of them.
    pub max: f64,
    /// How many there were.
    pub count: usize,
}

impl Distribution {
    /// Of these; `None` when there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Distribution> {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values.get(((values.len() as f64 * share).ceil() as usize).max(1) - 1).copied();
        Some(Distribution { p50: at(0.5)?, p99: at(0.99)?, max: at(1.0)?, count: values.len() })
    }
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Decides everything.
    pub seed: u64,
    /// How many hosts.
    pub nodes: usize,
    /// What was done to them.
    pub scenario: String,
    /// What did not hold: checker and sentence.
    pub violations: Vec<(String, String)>,
    /// Virtual seconds.
    pub simulated_s: f64,
    /// Real ones.
    pub wall_s: f64,
    /// Until 99 of 100 nodes knew something new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread_ms: Option<Distribution>,
    /// From the death of a machine to the start of what ran there on another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failover_ms: Option<Distribution>,
    /// From a submission to the start of each of its replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement_ms: Option<Distribution>,
    /// Bytes of protocol messages that a node sent in a second.
    pub bytes_per_node_s: f64,
    /// Replicas started in a second, from the first submission until 99 of 100 of those that were started had been.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placements_per_s: Option<f64>,
    /// What found a place, as a share of what a scheduler that sees everything finds one for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<f64>,
    /// Nodes that were called down by somebody while they had power and could be reached.
    pub false_deaths: usize,
    /// Messages sent.
    pub messages: u64,
    /// Workloads accepted.
    pub workloads: usize,
    /// All of what the run was like.
    pub options: Options,
}

/// A fact on its way.
struct Spreading {
    said: Instant,
    known_by: usize,
    at_99: Option<Instant>,
}

/// What is measured while a mesh runs.
#[derive(Default)]
pub(crate) struct Measures {
    spreading: BTreeMap<Key, Spreading>,
    submitted: BTreeMap<WorkloadId, Instant>,
    lost: BTreeMap<(WorkloadId, u32), Instant>,
    spread: Vec<f64>,
    pub(crate) failover: Vec<f64>,
    pub(crate) placement: Vec<f64>,
    first_submission: Option<Instant>,
    starts: Vec<Instant>,
    pub(crate) false_deaths: usize,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) quality: Option<f64>,
}

impl Measures {
    /// A node is about to say something that nobody knows.
    pub(crate) fn says(&mut self, key: Key, now: Instant) {
        self.spreading.insert(key, Spreading { said: now, known_by: 0, at_99: None });
    }

    /// A node has heard it.
    pub(crate) fn hears(&mut self, key: &Key, nodes: usize, now: Instant) {
        let Some(fact) = self.spreading.get_mut(key) else { return };
        fact.known_by += 1;
        if fact.known_by * 100 >= nodes * 99 && fact.at_99.is_none() {
            fact.at_99 = Some(now);
            self.spread.push(millis(fact.said, now));
        }
    }

    /// Facts that 99 of 100 nodes never knew.
    pub(crate) fn unheard(&self) -> usize {
        self.spreading.values().filter(|fact| fact.at_99.is_none()).count()
    }

    pub(crate) fn submitted(&mut self, workload: WorkloadId, at: Instant) {
        self.first_submission.get_or_insert(at);
        self.submitted.insert(workload, at);
    }

    pub(crate) fn lost(&mut self, workload: WorkloadId, replica: u32, now: Instant) {
        self.lost.insert((workload, replica), now);
    }

    pub(crate) fn started(&mut self, workload: WorkloadId, replica: u32, epoch: u64, now: Instant) {
        if let Some(lost) = self.lost.remove(&(workload, replica)) {
            self.failover.push(millis(lost, now));
        } else if let Some(at) = self.submitted.get(&workload).filter(|_| epoch == 1) {
            self.placement.push(millis(*at, now));
            self.starts.push(now);
        }
    }

    pub(crate) fn spread(&mut self) -> Option<Distribution> {
        Distribution::of(std::mem::take(&mut self.spread))
    }

    pub(crate) fn placements_per_s(&self) -> Option<f64> {
        // What found no room at first and waits says nothing about the rate.
        let most = self.starts.len() * 99 / 100;
        let took = self.starts.get(most)?.since(self.first_submission?).as_secs_f64();
        (took > 0.0).then(|| most as f64 / took)
    }
}

fn millis(from: Instant, to: Instant) -> f64 {
    to.since(from).as_secs_f64() * 1000.0
}

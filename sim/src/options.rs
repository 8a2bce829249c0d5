//! What a run is like, all of it from its seed unless told otherwise.

use std::time::Duration;

use fastrand::Rng;
use serde::Serialize;

/// What a run is like.
#[derive(Clone, Debug, Serialize)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// How many hosts.
    pub nodes: usize,
    /// How many workloads are submitted.
    pub workloads: usize,
    /// Share of messages that are lost in the safety phase.
    pub loss: f64,
    /// Share of messages that arrive twice.
    pub duplicates: f64,
    /// The least delay of a message.
    pub latency_min: Duration,
    /// The most.
    pub latency_max: Duration,
    /// How many hosts lose their power in the safety phase, and get it back.
    pub crashes: usize,
    /// How long the safety phase lasts.
    pub safety: Duration,
    /// How long the mesh has afterwards to come right.
    pub liveness: Duration,
}

impl Options {
    /// Random options for this seed.
    pub fn random(seed: u64, nodes: usize) -> Options {
        let mut rng = Rng::with_seed(seed ^ 0x6f70_7469_6f6e_7300);
        let latency_min = Duration::from_micros(rng.u64(50..2000));
        Options {
            seed,
            nodes,
            workloads: rng.usize(1..=nodes.clamp(1, 60)),
            loss: rng.f64() * 0.05,
            duplicates: rng.f64() * 0.02,
            latency_min,
            latency_max: latency_min + Duration::from_micros(rng.u64(100..40_000)),
            crashes: rng.usize(0..=(nodes / 10).max(1)),
            safety: Duration::from_secs(rng.u64(40..90)),
            liveness: Duration::from_secs(90),
        }
    }
}

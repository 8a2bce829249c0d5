//! What a run is like: all of it from its seed unless told otherwise.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use fastrand::Rng;
use serde::Serialize;

/// What is done to a mesh, and so what a run measures.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// Anything, by the seed: loss, crashes, splits, skewed clocks, slow nodes, a mesh that has just begun.
    Chaos,
    /// Nothing happens: what does a quiet mesh cost, and is anybody called dead who is not?
    Idle,
    /// One node after the other says something new: how soon does everybody know?
    Spread,
    /// Machines that run something die: how soon does it run elsewhere?
    Failover,
    /// Many submit much at once: how many placements a second?
    Storm,
    /// The network is cut in two, and healed.
    Split,
    /// Machines die and come back all the time.
    Churn,
    /// Singletons, with everything that might make one run twice: cuts, deaths of machines and of daemons alone, clocks that
    /// run up to 1 % wrong.
    Singleton,
    /// Work is submitted until half of the mesh is taken: how much of it finds a place?
    Load50,
    /// The same until nine tenths are.
    Load90,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Scenario; 10] = [
        Scenario::Chaos,
        Scenario::Idle,
        Scenario::Spread,
        Scenario::Failover,
        Scenario::Storm,
        Scenario::Split,
        Scenario::Churn,
        Scenario::Singleton,
        Scenario::Load50,
        Scenario::Load90,
    ];
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Scenario::ALL.into_iter().find(|scenario| scenario.to_string() == text);
        known.ok_or_else(|| {
            let names: Vec<String> = Scenario::ALL.iter().map(ToString::to_string).collect();
            format!("no scenario is called `{text}`; there are {}", names.join(", "))
        })
    }
}

/// A property that a modelled machine breaks on purpose, to show that a checker sees it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sabotage {
    /// Containers that are told to stop say that they have, and go on.
    NeverStops,
    /// Each container that starts brings a second one that nobody asked for.
    Overbooks,
    /// Containers are said to run and do not.
    RunsNothing,
    /// The first machine hears nothing that is said in the catalog.
    IsDeaf,
    /// The first machine sends nothing.
    IsMute,
    /// A machine that lost its power brings its containers back by itself.
    Revives,
    /// Containers whose lease has ended go on.
    OutlivesLeases,
}

/// What a run is like.
#[derive(Clone, Debug, Serialize)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// How many hosts.
    pub nodes: usize,
    /// What is done to them.
    pub scenario: Scenario,
    /// Whether the nodes know nobody but the first at the beginning, instead of being in step.
    pub cold: bool,
    /// How many workloads are submitted.
    pub workloads: usize,
    /// Share of messages that are lost in the safety phase.
    pub loss: f64,
    /// Share of messages that arrive twice.
    pub duplicates: f64,
    /// The least delay of a message.
    pub latency_min: Duration,
    /// What is added to it on average; exponentially distributed, so that messages overtake one another.
    pub latency_mean: Duration,
    /// Share of nodes that take up to a second longer for each message.
    pub slow: f64,
    /// How many hosts lose their power in the safety phase, and get it back.
    pub crashes: usize,
    /// How many daemons are killed while their containers go on, and come back.
    pub kills: usize,
    /// How many nodes are drained for a while.
    pub drains: usize,
    /// How many workloads are updated.
    pub updates: usize,
    /// Share of workloads that are singletons; as many are gangs.
    pub singletons: f64,
    /// How often the network is cut in two and healed, half of the cuts in one direction only.
    pub splits: usize,
    /// By how much clocks run too fast or too slow, at the most, in millionths.
    pub skew_ppm: u32,
    /// By how much clocks are off at the beginning, at the most.
    pub offset: Duration,
    /// How long the safety phase lasts.
    pub safety: Duration,
    /// How long the mesh has afterwards to come right.
    pub liveness: Duration,
    /// Whether to say on standard error what happens.
    pub trace: bool,
    /// What a test breaks.
    pub sabotage: Option<Sabotage>,
}

impl Options {
    /// What a scenario is like with this seed.
    pub fn new(scenario: Scenario, seed: u64, nodes: usize) -> Options {
        let secs = Duration::from_secs;
        let calm = Options {
            seed,
            nodes,
            scenario,
            cold: false,
            workloads: 0,
            loss: 0.0,
            duplicates: 0.0,
            latency_min: Duration::from_micros(500),
            latency_mean: Duration::from_millis(5),
            slow: 0.0,
            crashes: 0,
            kills: 0,
            drains: 0,
            updates: 0,
            singletons: 0.0,
            splits: 0,
            skew_ppm: 100,
            offset: Duration::from_millis(50),
            safety: secs(60),
            liveness: secs(30),
            trace: false,
            sabotage: None,
        };
        match scenario {
            Scenario::Chaos => Options::chaos(seed, nodes),
            Scenario::Idle => Options { liveness: secs(0), ..calm },
            Scenario::Spread => Options { workloads: 20, safety: secs(45), liveness: secs(5), ..calm },
            Scenario::Failover => {
                let workloads = 40.min(nodes);
                Options { workloads, crashes: (nodes / 3).clamp(1, 20), loss: 0.01, safety: secs(60), ..calm }
            }
            Scenario::Storm => Options { workloads: 50.min(nodes), safety: secs(20), liveness: secs(10), ..calm },
            Scenario::Split => Options { workloads: 30.min(nodes), splits: 1, safety: secs(60), ..calm },
            Scenario::Churn => Options { workloads: 30.min(nodes), crashes: nodes.div_ceil(4), loss: 0.01, ..calm },
            Scenario::Singleton => Options {
                workloads: 6.min(nodes),
                singletons: 1.0,
                crashes: nodes.div_ceil(4),
                kills: nodes.div_ceil(4),
                drains: nodes.div_ceil(12),
                updates: 2,
                splits: 3,
                loss: 0.02,
                skew_ppm: 10_000,
                safety: secs(120),
                liveness: secs(60),
                ..calm
            },
            Scenario::Load50 | Scenario::Load90 => Options { safety: secs(40), liveness: secs(5), ..calm },
        }
    }

    /// Random options for this seed.
    fn chaos(seed: u64, nodes: usize) -> Options {
        let mut rng = Rng::with_seed(seed ^ 0x6f70_7469_6f6e_7300);
        let latency_min = Duration::from_micros(rng.u64(50..2000));
        Options {
            seed,
            nodes,
            scenario: Scenario::Chaos,
            cold: rng.bool(),
            workloads: rng.usize(1..=nodes.clamp(1, 60)),
            loss: rng.f64() * 0.05,
            duplicates: rng.f64() * 0.02,
            latency_min,
            latency_mean: Duration::from_micros(rng.u64(100..40_000)),
            slow: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
            crashes: rng.usize(0..=(nodes / 4).max(1)),
            kills: rng.usize(0..=(nodes / 6).max(1)),
            drains: rng.usize(0..=(nodes / 8).max(1)),
            updates: rng.usize(0..=2),
            singletons: rng.f64() * 0.4,
            splits: rng.usize(0..=2),
            skew_ppm: rng.u32(0..10_000),
            offset: Duration::from_millis(rng.u64(0..5_000)),
            safety: Duration::from_secs(rng.u64(40..90)),
            liveness: Duration::from_secs(90),
            trace: false,
            sabotage: None,
        }
    }
}

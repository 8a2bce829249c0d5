//! What each scenario does, and when; decided before the first step, from the seed.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use moyai_protocol::id::{ChunkId, ImageId, WorkloadId};
use moyai_protocol::workload::{ImagePin, Layout, PRIORITY, Resources, Restart, Spec};

use crate::Simulator;
use crate::host::CAPACITY;
use crate::options::{Options, Scenario};

/// Something done to a mesh.
#[derive(Debug)]
pub(crate) enum Deed {
    /// A machine gets its power, for the first time or again.
    Boot { at: usize },
    /// A user submits something.
    Submit { at: usize, spec: Box<Spec> },
    /// A machine loses its power.
    Crash { at: usize },
    /// A daemon is killed; what it started goes on.
    Kill { at: usize },
    /// A user has a node emptied, or takes that back.
    Drain { at: usize, of: usize, draining: bool },
    /// A user has something run in another form.
    Update { at: usize, number: usize },
    /// Some machine that runs something does.
    CrashBusy,
    /// A node says something new, each time another thing.
    Say { at: usize, number: u64 },
    /// The network is cut in two.
    Cut { one_way: bool },
    /// It is whole again.
    Heal,
    /// Nothing fails any more.
    Calm,
    /// What was placed is compared with what could have been.
    Judge,
}

/// Everything that will be done, and when.
pub(crate) fn plan(options: &Options, rng: &mut Rng) -> Vec<(Duration, Deed)> {
    let secs = Duration::from_secs;
    let within =
        |rng: &mut Rng, from: u64, to: u64| Duration::from_millis(rng.u64(from * 1000..to.max(from + 1) * 1000));
    let mut deeds = Vec::new();
    let safety = options.safety.as_secs();
    if options.cold {
        deeds.extend((0..options.nodes).map(|at| (Duration::from_millis(rng.u64(0..3000)), Deed::Boot { at })));
    }
    let begin = if options.cold { 12 } else { 2 };
    match options.scenario {
        Scenario::Spread => {
            for number in 0..options.workloads as u64 {
                deeds.push((secs(2 + 2 * number), Deed::Say { at: rng.usize(..options.nodes), number }));
            }
        }
        Scenario::Storm => {
            // As many submitters, each with a batch, all within a tenth of a second: two placements for each node.
            let replicas = (2 * options.nodes as u32 / options.workloads.max(1) as u32).clamp(1, 500);
            for number in 0..options.workloads {
                let at = rng.usize(..options.nodes);
                let spec = Box::new(spec(number, Resources { cpu_milli: 500, memory: 64 << 20 }, replicas));
                deeds.push((secs(2) + Duration::from_millis(rng.u64(0..100)), Deed::Submit { at, spec }));
            }
        }
        Scenario::Load50 | Scenario::Load90 => {
            let share = if options.scenario == Scenario::Load50 { 0.5 } else { 0.9 };
            let wanted = share * CAPACITY.cpu_milli as f64 * options.nodes as f64;
            let (mut asked, mut number) = (0.0, 0);
            while asked < wanted {
                let resources = demand(rng);
                asked += resources.cpu_milli as f64;
                let at = rng.usize(..options.nodes);
                let spec = Box::new(spec(number, resources, 1));
                deeds.push((within(rng, 2, 22), Deed::Submit { at, spec }));
                number += 1;
            }
            deeds.push((options.safety, Deed::Judge));
        }
        _ => {
            let until = if options.scenario == Scenario::Chaos { begin + 18 } else { begin + 2 };
            for number in 0..options.workloads {
                let at = rng.usize(..options.nodes);
                let resources = Resources { cpu_milli: rng.u64(1..=5) * 100, memory: rng.u64(1..=8) << 26 };
                let mut spec = Box::new(spec(number, resources, rng.u32(1..=2)));
                let kind = rng.f64();
                spec.singleton = kind < options.singletons;
                spec.gang = kind > 1.0 - options.singletons && !spec.singleton;
                if options.scenario == Scenario::Chaos {
                    spec.priority = [10, 50, 50, 90][rng.usize(..4)];
                    spec.layout = [Layout::Balance, Layout::Balance, Layout::Spread, Layout::Pack][rng.usize(..4)];
                }
                deeds.push((within(rng, begin, until), Deed::Submit { at, spec }));
            }
        }
    }
    for number in 0..options.crashes {
        if options.scenario == Scenario::Failover {
            deeds.push((secs(8) + secs(40) * number as u32 / options.crashes as u32, Deed::CrashBusy));
            continue;
        }
        let at = rng.usize(..options.nodes);
        let crash = within(rng, begin + 3, safety - 5);
        let off = Duration::from_millis(rng.u64(100..20_000));
        deeds.push((crash, Deed::Crash { at }));
        deeds.push(((crash + off).min(options.safety), Deed::Boot { at }));
    }
    for _ in 0..options.kills {
        let at = rng.usize(..options.nodes);
        let kill = within(rng, begin + 3, safety - 5);
        let off = Duration::from_millis(rng.u64(100..20_000));
        deeds.push((kill, Deed::Kill { at }));
        deeds.push(((kill + off).min(options.safety), Deed::Boot { at }));
    }
    for _ in 0..options.drains {
        let (at, of) = (rng.usize(..options.nodes), rng.usize(..options.nodes));
        let drain = within(rng, begin + 3, safety - 5);
        let back = drain + Duration::from_millis(rng.u64(1000..30_000));
        deeds.push((drain, Deed::Drain { at, of, draining: true }));
        if back < options.safety {
            deeds.push((back, Deed::Drain { at, of, draining: false }));
        }
    }
    for _ in 0..options.updates {
        let at = rng.usize(..options.nodes);
        deeds.push((within(rng, begin + 8, safety), Deed::Update { at, number: rng.usize(..1000) }));
    }
    for _ in 0..options.splits {
        let cut = within(rng, begin + 5, safety / 2 + 5);
        let heal = cut + Duration::from_millis(rng.u64(500..30_000));
        let one_way = matches!(options.scenario, Scenario::Chaos | Scenario::Singleton) && rng.bool();
        deeds.push((cut, Deed::Cut { one_way }));
        deeds.push((heal.min(options.safety), Deed::Heal));
    }
    deeds.push((options.safety, Deed::Calm));
    deeds
}

/// What arrivals ask for: much that is small, some that is large.
fn demand(rng: &mut Rng) -> Resources {
    let cpu_milli = [100, 200, 250, 500, 500, 1000, 1000, 2000][rng.usize(..8)];
    Resources { cpu_milli, memory: [64, 128, 256, 512, 1024][rng.usize(..5)] << 20 }
}

fn spec(number: usize, resources: Resources, replicas: u32) -> Spec {
    Spec { resources, replicas, ..service(&format!("w{number}")) }
}

/// Something that runs until it is stopped, with an image that is filled in when it is submitted.
pub fn service(name: &str) -> Spec {
    let image = ImagePin {
        reference: "image".parse().expect("a good name"),
        id: ImageId([0; 32]),
        root: ChunkId([0; 32]),
        size: 0,
    };
    Spec {
        id: WorkloadId([0; 16]),
        name: name.to_owned(),
        image,
        entrypoint: None,
        command: vec!["serve".to_owned()],
        env: Vec::new(),
        user: None,
        workdir: None,
        hostname: None,
        resources: Resources::default(),
        pids: 0,
        replicas: 1,
        restart: Restart::Always,
        on: BTreeMap::new(),
        stop_signal: None,
        stop_timeout: 10,
        auto_remove: false,
        gang: false,
        singleton: false,
        lazy: false,
        priority: PRIORITY,
        layout: Layout::Balance,
        near: Vec::new(),
        apart: Vec::new(),
        terminal: false,
        input: false,
        health: None,
        confinement: Default::default(),
        requires: Vec::new(),
    }
}

/// What runs, as a share of what a scheduler that sees every machine would have found a place for: best fit, the
/// arrivals one after the other.
pub(crate) fn quality(mesh: &Simulator) -> f64 {
    let mut free: Vec<Resources> = mesh.hosts().iter().map(|host| host.capacity).collect();
    let mut placed = 0.0;
    for (workload, replicas) in mesh.accepted() {
        let Some(asked) = mesh.asked(workload) else { continue };
        for _ in 0..replicas {
            let fits = free.iter_mut().filter(|free| free.cpu_milli >= asked.cpu_milli && free.memory >= asked.memory);
            if let Some(best) = fits.min_by_key(|free| (free.cpu_milli, free.memory)) {
                best.cpu_milli -= asked.cpu_milli;
                best.memory -= asked.memory;
                placed += asked.cpu_milli as f64;
            }
        }
    }
    let running = mesh.running();
    let runs: f64 = running.keys().filter_map(|(workload, _)| mesh.asked(workload)).map(|a| a.cpu_milli as f64).sum();
    if placed == 0.0 { 1.0 } else { runs / placed }
}

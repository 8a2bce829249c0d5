//! The driver: virtual time, one queue of what will happen, and the modelled network between the hosts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use fastrand::Rng;
use moyai_protocol::catalog::{Hlc, ImageHeld};
use moyai_protocol::contract::{Command, CommandId, Completion, Effect, EffectId, Event, Input, Output, Piece, Reply};
use moyai_protocol::id::{ImageId, NodeId, WorkloadId};
use moyai_protocol::membership::State;
use moyai_protocol::node::Node;
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::trust::{Membership, Role};
use moyai_protocol::workload::{ImagePin, Resources, Restart, Spec};
use serde::Serialize;

use crate::checkers::{self, Checker};
use crate::host::{FakeHost, PIECE, PIECES, image};
use crate::options::Options;

/// Where virtual time begins, in milliseconds since 1970.
const EPOCH: u64 = 1_800_000_000_000;
/// What a simulated link carries, in bytes a second.
const LINK: f64 = 100e6;

enum Due {
    Message {
        to: usize,
        from: NodeId,
        bytes: Vec<u8>,
    },
    Complete {
        host: usize,
        life: u64,
        completion: Completion,
    },
    /// A fetch is over on the wire.
    Fetched {
        host: usize,
        life: u64,
        id: EffectId,
        provider: NodeId,
        pieces: Vec<Piece>,
        took: Duration,
    },
    Submit {
        at: usize,
        number: usize,
    },
    Crash {
        at: usize,
    },
    Restart {
        at: usize,
    },
    Calm,
}

/// A simulated mesh.
pub struct Simulator {
    options: Options,
    now: Instant,
    rng: Rng,
    hosts: Vec<FakeHost>,
    by_id: BTreeMap<NodeId, usize>,
    queue: BTreeMap<(Instant, u64), Due>,
    timers: BTreeSet<(Instant, usize)>,
    timer_of: Vec<Option<Instant>>,
    sequence: u64,
    calm: bool,
    touched: Option<usize>,
    wanted: BTreeMap<u64, (usize, Resources, u32)>,
    accepted: BTreeMap<WorkloadId, (Resources, u32)>,
    messages: u64,
    bytes: u64,
    steps: u64,
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Decides everything.
    pub seed: u64,
    /// How many hosts.
    pub nodes: usize,
    /// What did not hold: checker and sentence.
    pub violations: Vec<(String, String)>,
    /// Virtual seconds.
    pub simulated_s: f64,
    /// Messages sent.
    pub messages: u64,
    /// Bytes a node sent in a second, on average.
    pub bytes_per_node_s: f64,
    /// Workloads accepted.
    pub workloads: usize,
    /// Virtual milliseconds from a crash to the last verdict "down" about it, for each crash that was noticed.
    pub down_ms: Vec<u64>,
}

/// Runs one mesh through both phases.
pub fn run(options: Options) -> Report {
    let mut mesh = Simulator::new(options);
    let mut checkers = checkers::all();
    let mut violations = Vec::new();
    let end = Instant::ZERO + mesh.options.safety + mesh.options.liveness;
    while mesh.step(end) {
        check(&mut checkers, &mut violations, |checker| checker.step(&mesh));
        if !violations.is_empty() {
            break;
        }
    }
    if violations.is_empty() {
        check(&mut checkers, &mut violations, |checker| checker.end(&mesh));
    }
    mesh.report(violations)
}

fn check(
    checkers: &mut [Box<dyn Checker>],
    violations: &mut Vec<(String, String)>,
    mut look: impl FnMut(&mut dyn Checker) -> Option<String>,
) {
    for checker in checkers {
        if let Some(violation) = look(checker.as_mut()) {
            violations.push((checker.name().to_owned(), violation));
        }
    }
}

impl Simulator {
    /// A mesh whose nodes all start within the first seconds and know one of them.
    pub fn new(options: Options) -> Simulator {
        let root = SigningKey::from_bytes(&[9; 32]);
        let rng = Rng::with_seed(options.seed);
        let hosts: Vec<FakeHost> = (0..options.nodes).map(|at| FakeHost::new(at, &root, UnixMillis(EPOCH))).collect();
        let by_id = hosts.iter().enumerate().map(|(at, host)| (host.id, at)).collect();
        let mut mesh = Simulator {
            timer_of: vec![None; options.nodes],
            options,
            now: Instant::ZERO,
            rng,
            hosts,
            by_id,
            queue: BTreeMap::new(),
            timers: BTreeSet::new(),
            sequence: 0,
            calm: false,
            touched: None,
            wanted: BTreeMap::new(),
            accepted: BTreeMap::new(),
            messages: 0,
            bytes: 0,
            steps: 0,
        };
        mesh.plan();
        mesh
    }

    /// Puts everything that the seed has in store into the queue.
    fn plan(&mut self) {
        let nodes = self.options.nodes;
        for at in 0..nodes {
            let wait = Duration::from_millis(self.rng.u64(0..3000));
            self.later(wait, Due::Restart { at });
        }
        for number in 0..self.options.workloads {
            let at = self.rng.usize(..nodes);
            let wait = Duration::from_millis(self.rng.u64(12_000..30_000));
            self.later(wait, Due::Submit { at, number });
        }
        let safety = self.options.safety;
        for _ in 0..self.options.crashes {
            let at = self.rng.usize(..nodes);
            let crash = Duration::from_secs(15) + Duration::from_millis(self.rng.u64(0..20_000));
            let off = Duration::from_millis(self.rng.u64(100..20_000));
            self.later(crash, Due::Crash { at });
            self.later((crash + off).min(safety), Due::Restart { at });
        }
        self.later(safety, Due::Calm);
    }

    fn later(&mut self, wait: Duration, due: Due) {
        self.sequence += 1;
        self.queue.insert((self.now + wait, self.sequence), due);
    }

    fn wall(&self) -> UnixMillis {
        UnixMillis(EPOCH + self.now.as_nanos() / 1_000_000)
    }

    /// Every node that has power.
    pub fn up(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.hosts.iter().enumerate().filter_map(|(at, host)| host.node.as_ref().map(|node| (at, node)))
    }

    /// The host that the last step was about.
    pub fn last_touched(&self) -> Option<(usize, &FakeHost)> {
        self.touched.map(|at| (at, &self.hosts[at]))
    }

    /// What a workload asks for.
    pub fn asked(&self, workload: &WorkloadId) -> Option<Resources> {
        self.accepted.get(workload).map(|(asked, _)| *asked)
    }

    /// Workloads that some node said yes to, and how many replicas of each.
    pub fn accepted(&self) -> impl Iterator<Item = (&WorkloadId, u32)> {
        self.accepted.iter().map(|(workload, (_, replicas))| (workload, *replicas))
    }

    /// Where each replica of a workload runs.
    pub fn replicas_running(&self, workload: &WorkloadId) -> BTreeMap<u32, Vec<usize>> {
        let mut running: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (at, host) in self.hosts.iter().enumerate() {
            for placement in host.running.keys().filter(|placement| placement.workload == *workload) {
                running.entry(placement.replica).or_default().push(at);
            }
        }
        running
    }

    /// The modelled machines.
    pub fn hosts(&self) -> &[FakeHost] {
        &self.hosts
    }

    /// Lets the next thing happen; whether there was one before `end`.
    pub fn step(&mut self, end: Instant) -> bool {
        let timer = self.timers.first().copied();
        let due = self.queue.first_key_value().map(|(at, _)| *at);
        let next = match (timer, due) {
            (Some((time, at)), due) if due.is_none_or(|(other, _)| time <= other) => Ok((time, at)),
            (_, Some(key)) => Err(key),
            _ => return false,
        };
        let time = match next {
            Ok((time, _)) | Err((time, _)) => time,
        };
        if time > end {
            return false;
        }
        self.steps += 1;
        self.now = self.now.max(time);
        match next {
            Ok((_, at)) => {
                let now = self.now;
                if let Some(node) = &mut self.hosts[at].node {
                    node.handle_timeout(now);
                }
                self.drain(at);
            }
            Err(key) => {
                if let Some(due) = self.queue.remove(&key) {
                    self.happen(due);
                }
            }
        }
        true
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Message { to, from, bytes } => self.give(to, Input::Message { from, bytes }),
            Due::Complete { host, life, completion } => {
                if self.hosts[host].life == life {
                    self.give(host, Input::Completion(completion));
                }
            }
            Due::Fetched { host, life, id, provider, pieces, took } => {
                let from = self.by_id[&provider];
                let served = self.hosts[from].node.is_some().then(|| self.hosts[from].serve(&pieces));
                if self.hosts[host].life == life {
                    let outcome = moyai_protocol::Outcome::Fetched(self.hosts[host].keep(served, took));
                    self.give(host, Input::Completion(Completion { id, outcome }));
                }
            }
            Due::Submit { at, number } => self.submit(at, number),
            Due::Crash { at } => {
                self.hosts[at].cut_power();
                self.drain(at);
            }
            Due::Restart { at } => self.restart(at),
            Due::Calm => {
                self.calm = true;
                let dark: Vec<usize> = (0..self.hosts.len()).filter(|at| self.hosts[*at].node.is_none()).collect();
                for at in dark {
                    self.restart(at);
                }
            }
        }
    }

    fn restart(&mut self, at: usize) {
        if self.hosts[at].node.is_some() {
            return;
        }
        let (now, wall, seed) = (self.now, self.wall(), self.options.seed.wrapping_mul(31).wrapping_add(at as u64));
        let first = self.hosts[at].life == 0;
        self.hosts[at].start(at, seed, now, wall);
        if first && at == 0 {
            self.hosts[at].give_image();
            let held = ImageHeld {
                reference: "image".parse().expect("a good name"),
                id: ImageId(image().0),
                root: image(),
                size: u64::from(PIECES) * u64::from(PIECE),
                named: Hlc::default(),
            };
            self.command(at, Command::ImageAdded(held));
        }
        if first {
            // As a joiner is told by its inviter.
            for (a, b) in [(at, 0), (0, at)] {
                let membership = Membership { node: self.hosts[b].id, role: Role::Admin, not_after: u64::MAX };
                if a != b {
                    self.command(a, Command::Admitted { membership, address: Some(format!("/memory/{b}")) });
                }
            }
        }
        self.drain(at);
    }

    fn submit(&mut self, at: usize, number: usize) {
        let cpu_milli = self.rng.u64(1..=5) * 100;
        let resources = Resources { cpu_milli, memory: self.rng.u64(1..=8) << 26 };
        let spec = Spec {
            id: WorkloadId([0; 16]),
            name: format!("w{number}"),
            image: ImagePin {
                reference: "image".parse().expect("a good name"),
                id: ImageId(image().0),
                root: image(),
                size: u64::from(PIECES) * u64::from(PIECE),
            },
            entrypoint: None,
            command: vec!["serve".to_owned()],
            env: Vec::new(),
            user: None,
            workdir: None,
            hostname: None,
            resources,
            pids: 0,
            replicas: self.rng.u32(1..=2),
            restart: Restart::Always,
            on: BTreeMap::new(),
            stop_signal: None,
            stop_timeout: 10,
            auto_remove: false,
            requires: Vec::new(),
        };
        let replicas = spec.replicas;
        let id = self.command(at, Command::Submit(Box::new(spec)));
        self.wanted.insert(id, (at, resources, replicas));
        self.collect_replies(at);
    }

    fn command(&mut self, at: usize, command: Command) -> u64 {
        self.sequence += 1;
        let id = self.sequence;
        self.give(at, Input::Command { id: CommandId(id), command });
        id
    }

    fn give(&mut self, at: usize, input: Input) {
        let now = self.now;
        if let Some(node) = &mut self.hosts[at].node {
            node.handle(now, input);
            self.drain(at);
        }
    }

    /// Carries out what a node wants, and notes its next timeout.
    fn drain(&mut self, at: usize) {
        self.touched = Some(at);
        let outputs: Vec<Output> = match &mut self.hosts[at].node {
            Some(node) => {
                if self.steps.is_multiple_of(64) {
                    node.invariants();
                }
                std::iter::from_fn(|| node.poll_output()).collect()
            }
            None => Vec::new(),
        };
        for output in outputs {
            match output {
                Output::Transmit { to, bytes } => self.transmit(at, to, bytes),
                Output::Effect { id, effect } => self.effect(at, id, effect),
                Output::Event(Event::Reply { id, result }) => {
                    self.hosts[at].replies.insert(id.0, result);
                    self.collect_replies(at);
                }
                Output::Event(event @ Event::Member { state: State::Down, .. }) => {
                    let now = self.now;
                    self.hosts[at].events.push((now, event));
                }
                Output::Event(_) => {}
            }
        }
        if let Some(old) = self.timer_of[at].take() {
            self.timers.remove(&(old, at));
        }
        if let Some(next) = self.hosts[at].node.as_ref().and_then(Node::poll_timeout) {
            self.timers.insert((next, at));
            self.timer_of[at] = Some(next);
        }
    }

    fn collect_replies(&mut self, at: usize) {
        for (id, reply) in std::mem::take(&mut self.hosts[at].replies) {
            if let Ok(Reply::Submitted(workload)) = reply
                && let Some((_, asked, replicas)) = self.wanted.remove(&id)
            {
                self.accepted.insert(workload, (asked, replicas));
            }
        }
    }

    fn transmit(&mut self, from: usize, to: NodeId, bytes: Vec<u8>) {
        self.messages += 1;
        self.bytes += bytes.len() as u64;
        let Some(&to) = self.by_id.get(&to) else { return };
        if !self.calm && self.rng.f64() < self.options.loss {
            return;
        }
        let copies = if !self.calm && self.rng.f64() < self.options.duplicates { 2 } else { 1 };
        let (least, most) = (self.options.latency_min.as_nanos() as u64, self.options.latency_max.as_nanos() as u64);
        let from = self.hosts[from].id;
        for _ in 0..copies {
            let wait = Duration::from_nanos(self.rng.u64(least..=most));
            self.later(wait, Due::Message { to, from, bytes: bytes.clone() });
        }
    }

    fn effect(&mut self, at: usize, id: EffectId, effect: Effect) {
        let life = self.hosts[at].life;
        if let Effect::Fetch { provider, pieces } = effect {
            let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
            let took = self.options.latency_max + Duration::from_secs_f64(bytes as f64 / LINK);
            return self.later(took, Due::Fetched { host: at, life, id, provider, pieces, took });
        }
        for (wait, id, outcome) in self.hosts[at].world(id, effect) {
            self.later(wait, Due::Complete { host: at, life, completion: Completion { id, outcome } });
        }
    }

    fn report(&self, violations: Vec<(String, String)>) -> Report {
        let seconds = self.now.since(Instant::ZERO).as_secs_f64();
        let mut down: BTreeMap<NodeId, Instant> = BTreeMap::new();
        for (at, event) in self.hosts.iter().flat_map(|host| &host.events) {
            if let Event::Member { node, .. } = event {
                let last = down.entry(*node).or_insert(*at);
                *last = (*last).max(*at);
            }
        }
        Report {
            seed: self.options.seed,
            nodes: self.options.nodes,
            violations,
            simulated_s: seconds,
            messages: self.messages,
            bytes_per_node_s: self.bytes as f64 / seconds / self.options.nodes as f64,
            workloads: self.accepted.len(),
            down_ms: down.values().map(|at| at.since(Instant::ZERO).as_millis() as u64).collect(),
        }
    }
}

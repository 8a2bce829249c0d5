//! The driver: virtual time, and one queue of what will happen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use fastrand::Rng;
use moyai_protocol::catalog::{Hlc, ImageHeld, Key, Rollout};
use moyai_protocol::contract::{
    Command, CommandId, Completion, Effect, EffectId, Event, Input, Outcome, Output, Piece, RecordKey, Refused, Reply,
};
use moyai_protocol::id::{ChunkId, ImageId, NodeId, WorkloadId};
use moyai_protocol::lease::MARGIN;
use moyai_protocol::membership::State;
use moyai_protocol::memo::Memo;
use moyai_protocol::node::{Node, Snapshot};
use moyai_protocol::time::Instant;
use moyai_protocol::trust::{Membership, Role};
use moyai_protocol::worker::ExitStatus;
use moyai_protocol::workload::{PlacementId, Resources, Spec};

use crate::checkers::{self, Checker, Happened};
use crate::host::{FakeClock, FakeHost, IMAGE, image};
use crate::measure::{Distribution, Measures, Report};
use crate::network::FakeNetwork;
use crate::options::{Options, Sabotage, Scenario};
use crate::scenario::{self, Deed};

/// Where virtual time begins, in milliseconds since 1970.
pub(crate) const EPOCH: u64 = 1_800_000_000_000;
/// What a simulated link carries, in bytes a second.
const LINK: f64 = 100e6;
/// So many steps for each machine take no time at the most.
const STILL: u64 = 100_000;
/// Between two looks of the checkers.
const TICK: Duration = Duration::from_secs(1);

enum Due {
    Message {
        to: usize,
        from: NodeId,
        bytes: Arc<[u8]>,
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
    Do(Deed),
    /// A container that was asked to end does.
    Ends {
        host: usize,
        placement: PlacementId,
    },
    /// Records are on the disk.
    Persisted {
        host: usize,
        life: u64,
        id: EffectId,
        records: Vec<(RecordKey, Option<Vec<u8>>)>,
    },
    /// A container whose lease is over is dead at last.
    Killed {
        host: usize,
        placement: PlacementId,
    },
    /// Whoever ends a container with its lease looks whether it may run longer.
    Deadline {
        host: usize,
        placement: PlacementId,
    },
    /// A machine has brought back what ran on it, which it should not.
    Revived {
        at: usize,
        placement: PlacementId,
    },
    Tick,
}

/// A simulated mesh.
pub struct Simulator {
    options: Options,
    now: Instant,
    rng: Rng,
    network: FakeNetwork,
    hosts: Vec<FakeHost>,
    by_id: BTreeMap<NodeId, usize>,
    queue: BTreeMap<(Instant, u64), Due>,
    timers: BTreeSet<(Instant, usize)>,
    timer_of: Vec<Option<Instant>>,
    sequence: u64,
    steps: u64,
    /// Of those, since time passed last.
    still: u64,
    asked: BTreeMap<u64, (Spec, Instant)>,
    accepted: BTreeMap<WorkloadId, Spec>,
    happened: Vec<Happened>,
    /// A second has passed since the checkers looked.
    ticked: bool,
    measures: Measures,
}

/// Runs one mesh through both phases.
pub fn run(options: Options) -> Report {
    let began = std::time::Instant::now();
    let mut mesh = Simulator::new(options);
    let mut checkers = checkers::all();
    let mut violations = Vec::new();
    let end = Instant::ZERO + mesh.options.safety + mesh.options.liveness;
    while violations.is_empty() && mesh.step(end) {
        for what in std::mem::take(&mut mesh.happened) {
            check(&mut checkers, &mut violations, |checker| checker.happened(&mesh, &what));
        }
        if std::mem::take(&mut mesh.ticked) {
            check(&mut checkers, &mut violations, |checker| checker.tick(&mesh));
        }
    }
    if violations.is_empty() {
        check(&mut checkers, &mut violations, |checker| checker.end(&mesh));
    }
    mesh.report(violations, began.elapsed())
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
    /// A mesh at its beginning: in step, or of nodes that know one of them.
    pub fn new(options: Options) -> Simulator {
        let mut mesh = Simulator::bare(options, BTreeMap::from([(image(), IMAGE)]));
        if !mesh.options.cold {
            mesh.begin_in_step();
        }
        for (wait, deed) in scenario::plan(&mesh.options, &mut mesh.rng) {
            mesh.later(wait, Due::Do(deed));
        }
        mesh
    }

    /// Machines without power, and images with their sizes.
    pub(crate) fn bare(options: Options, images: BTreeMap<ChunkId, u64>) -> Simulator {
        let root = SigningKey::from_bytes(&[9; 32]);
        let mut rng = Rng::with_seed(options.seed);
        let memo = Arc::new(Memo::default());
        let images = Arc::new(images);
        let mut hosts: Vec<FakeHost> =
            (0..options.nodes).map(|at| FakeHost::new(at, &root, &memo, &images, EPOCH)).collect();
        let (ppm, offset) = (i64::from(options.skew_ppm), options.offset.as_millis() as i64);
        for (at, host) in hosts.iter_mut().enumerate() {
            host.clock = FakeClock { ppm: rng.i64(-ppm..=ppm), ahead: rng.i64(-offset..=offset) };
            host.slow =
                if rng.f64() < options.slow { Duration::from_millis(rng.u64(10..1000)) } else { Duration::ZERO };
            let everywhere = !matches!(options.sabotage, Some(Sabotage::IsDeaf | Sabotage::IsMute));
            // Nobody restarts in a storm, and fifty million records are more than there is room for.
            host.keeps = options.scenario != Scenario::Storm;
            host.sabotage = options.sabotage.filter(|_| everywhere || at == 0);
        }
        let by_id = hosts.iter().enumerate().map(|(at, host)| (host.id, at)).collect();
        let mut mesh = Simulator {
            timer_of: vec![None; options.nodes],
            network: FakeNetwork::new(&options),
            now: Instant::ZERO,
            rng,
            hosts,
            by_id,
            queue: BTreeMap::new(),
            timers: BTreeSet::new(),
            sequence: 0,
            steps: 0,
            still: 0,
            asked: BTreeMap::new(),
            accepted: BTreeMap::new(),
            happened: Vec::new(),
            ticked: false,
            measures: Measures::default(),
            options,
        };
        mesh.later(TICK, Due::Tick);
        mesh
    }

    /// As after a long time in which nothing happened: everybody knows everybody, and has the image.
    fn begin_in_step(&mut self) {
        let everywhere = !matches!(self.options.scenario, Scenario::Chaos);
        for at in 0..self.hosts.len() {
            let has_image = everywhere || at < 3;
            if has_image {
                self.hosts[at].give_image(&image());
            }
            self.boot(at);
            if has_image {
                self.command(at, Command::ImageAdded(held()));
            }
        }
        self.know_one_another();
    }

    /// Everybody that has power is told what all of them know.
    pub(crate) fn know_one_another(&mut self) {
        let mut snapshot = Snapshot::default();
        for host in &self.hosts {
            let Some(node) = &host.node else { continue };
            snapshot.members.push((Arc::clone(node.membership().own_word()), State::Alive));
            snapshot.facts.extend(node.catalog().iter().map(|(_, entry)| Arc::clone(entry)));
        }
        let snapshot = Arc::new(snapshot);
        for at in 0..self.hosts.len() {
            self.hosts[at].resume(&snapshot, self.now);
            self.drain(at);
        }
        self.measures = Measures::default();
    }

    fn later(&mut self, wait: Duration, due: Due) {
        self.sequence += 1;
        self.queue.insert((self.now + wait, self.sequence), due);
    }

    /// True time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Every node that has power.
    pub fn up(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.hosts.iter().enumerate().filter_map(|(at, host)| host.node.as_ref().map(|node| (at, node)))
    }

    /// What a workload asks for.
    pub fn asked(&self, workload: &WorkloadId) -> Option<Resources> {
        self.accepted.get(workload).map(|spec| spec.resources)
    }

    /// Workloads that some node said yes to, and how many replicas of each.
    pub fn accepted(&self) -> impl Iterator<Item = (&WorkloadId, u32)> {
        self.accepted.iter().map(|(workload, spec)| (workload, spec.replicas))
    }

    /// Whether a workload is one that never runs twice.
    pub fn is_singleton(&self, workload: &WorkloadId) -> bool {
        self.accepted.get(workload).is_some_and(|spec| spec.singleton)
    }

    /// Whether all that was accepted fits easily.
    pub fn has_room_for_all(&self) -> bool {
        let asked: u64 = self.accepted.values().map(|spec| spec.resources.cpu_milli * u64::from(spec.replicas)).sum();
        asked * 2 <= self.hosts.iter().map(|host| host.capacity.cpu_milli).sum()
    }

    /// Where each replica runs.
    pub fn running(&self) -> BTreeMap<(WorkloadId, u32), Vec<usize>> {
        let mut running: BTreeMap<(WorkloadId, u32), Vec<usize>> = BTreeMap::new();
        for (at, host) in self.hosts.iter().enumerate() {
            for placement in host.running.keys() {
                running.entry((placement.workload, placement.replica)).or_default().push(at);
            }
        }
        running
    }

    /// Replicas that run more than once on machines that can talk with one another.
    pub fn running_twice(&self) -> BTreeMap<(WorkloadId, u32), Vec<usize>> {
        let talk = |places: &Vec<usize>| {
            let pairs = places.iter().enumerate().flat_map(|(n, a)| places[n + 1..].iter().map(move |b| (*a, *b)));
            pairs.into_iter().any(|(a, b)| self.network.connects(a, b))
        };
        self.running().into_iter().filter(|(_, places)| places.len() > 1 && talk(places)).collect()
    }

    /// What happened since this was last asked.
    pub(crate) fn take_happened(&mut self) -> Vec<Happened> {
        std::mem::take(&mut self.happened)
    }

    /// A machine loses its power.
    pub(crate) fn kill_machine(&mut self, at: usize) {
        self.crash(at);
    }

    /// A modelled machine, to be changed before it has power.
    pub(crate) fn host_mut(&mut self, at: usize) -> &mut FakeHost {
        &mut self.hosts[at]
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
        self.still = if time > self.now { 0 } else { self.still + 1 };
        let most = STILL * self.hosts.len() as u64;
        assert!(self.still < most, "{most} steps without a moment passing: some node's timeout has passed and stays");
        self.now = self.now.max(time);
        match next {
            Ok((_, at)) => {
                let now = self.hosts[at].clock.shows(self.now);
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
            Due::Message { to, from, bytes } => {
                if self.hosts[to].sabotage != Some(Sabotage::IsDeaf) || !speaks_of_facts(&bytes) {
                    self.give(to, Input::Message { from, bytes: bytes.to_vec() });
                }
            }
            Due::Complete { host, life, completion } => {
                if self.hosts[host].life == life {
                    self.give(host, Input::Completion(completion));
                }
            }
            Due::Fetched { host, life, id, provider, pieces, took } => {
                let from = self.by_id[&provider];
                let reached = self.hosts[from].node.is_some() && self.network.connects(from, host);
                let served = reached.then(|| self.hosts[from].serve(&pieces));
                if self.hosts[host].life == life {
                    let outcome = Outcome::Fetched(self.hosts[host].keep(served, took));
                    self.give(host, Input::Completion(Completion { id, outcome }));
                }
            }
            Due::Do(deed) => self.carry_out(deed),
            Due::Ends { host, placement } => {
                if self.hosts[host].running.get(&placement).is_some_and(|container| container.ending) {
                    self.container_ends(host, placement, 143);
                }
            }
            Due::Deadline { host, placement } => self.deadline(host, placement),
            Due::Killed { host, placement } => self.container_ends(host, placement, 137),
            Due::Persisted { host, life, id, records } => {
                // A write that was under way when the daemon or the machine died did not take place.
                if self.hosts[host].life == life && self.hosts[host].node.is_some() {
                    self.hosts[host].persist(records);
                    self.give(host, Input::Completion(Completion { id, outcome: Outcome::Persisted }));
                }
            }
            Due::Revived { at, placement } => self.happened.push(Happened::Started { at, placement }),
            Due::Tick => {
                self.ticked = true;
                self.later(TICK, Due::Tick);
            }
        }
    }

    fn carry_out(&mut self, deed: Deed) {
        self.trace(0, || format!("*** {deed:?}").chars().take(200).collect());
        match deed {
            Deed::Boot { at } => self.restart(at),
            Deed::Submit { at, spec } => self.submit(at, *spec),
            Deed::Crash { at } => self.crash(at),
            Deed::Kill { at } => {
                self.hosts[at].kill_daemon();
                self.happened.push(Happened::Disturbed);
                self.drain(at);
            }
            Deed::Drain { at, of, draining } => {
                let node = self.hosts[of].id;
                self.happened.push(Happened::Disturbed);
                self.command(at, Command::Drain { node, draining });
            }
            Deed::Update { at, number } => self.update(at, number),
            Deed::CrashBusy => {
                let busy: Vec<usize> = (0..self.hosts.len()).filter(|at| !self.hosts[*at].running.is_empty()).collect();
                if !busy.is_empty() {
                    let at = busy[self.rng.usize(..busy.len())];
                    self.crash(at);
                }
            }
            Deed::Say { at, number } => {
                self.measures.says(Key::Node(self.hosts[at].id), self.now);
                let all = self.hosts[at].capacity;
                let capacity = Resources { memory: all.memory + 1 + number, ..all };
                self.command(at, Command::Load { capacity, pressure: 0 });
            }
            Deed::Cut { one_way } => {
                let hosts = self.hosts.len();
                self.network.cut(hosts, one_way, &mut self.rng);
                self.happened.push(Happened::Disturbed);
            }
            Deed::Heal => {
                self.network.heal();
                self.happened.push(Happened::Disturbed);
            }
            Deed::Calm => {
                self.network.calm();
                for at in 0..self.hosts.len() {
                    self.hosts[at].slow = Duration::ZERO;
                    if self.hosts[at].node.is_none() && self.options.scenario != Scenario::Failover {
                        self.restart(at);
                    }
                }
                let ids: Vec<NodeId> = self.hosts.iter().map(|host| host.id).collect();
                for at in 0..self.hosts.len() {
                    for node in &ids {
                        if self.hosts[at].is_draining(node) {
                            self.command(at, Command::Drain { node: *node, draining: false });
                        }
                    }
                }
                self.happened.push(Happened::Disturbed);
            }
            Deed::Judge => self.measures.quality = Some(scenario::quality(self)),
        }
    }

    fn crash(&mut self, at: usize) {
        let now = self.now;
        for placement in self.hosts[at].running.keys() {
            self.measures.lost(placement.workload, placement.replica, now);
        }
        let ended = self.hosts[at].running.keys().map(|placement| Happened::Ended { at, placement: *placement });
        self.happened.extend(ended);
        self.happened.push(Happened::Disturbed);
        self.hosts[at].cut_power();
        self.drain(at);
    }

    pub(crate) fn boot(&mut self, at: usize) {
        let seed = self.options.seed.wrapping_mul(31).wrapping_add(at as u64);
        self.hosts[at].start(at, seed, self.now, EPOCH);
        self.happened.push(Happened::Disturbed);
        for placement in self.hosts[at].revive() {
            self.later(Duration::from_secs(10), Due::Revived { at, placement });
        }
        self.drain(at);
    }

    fn restart(&mut self, at: usize) {
        if self.hosts[at].node.is_some() {
            return;
        }
        let first = self.hosts[at].life == 0;
        if first && at == 0 {
            self.hosts[at].give_image(&image());
        }
        self.boot(at);
        if first && at == 0 {
            self.command(at, Command::ImageAdded(held()));
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
    }

    fn submit(&mut self, at: usize, mut spec: Spec) {
        spec.image.id = ImageId(image().0);
        spec.image.root = image();
        spec.image.size = IMAGE;
        self.sequence += 1;
        let id = self.sequence;
        self.asked.insert(id, (spec.clone(), self.now));
        self.give(at, Input::Command { id: CommandId(id), command: Command::Submit(Box::new(spec)) });
    }

    /// Some workload that was accepted runs another command from now on.
    fn update(&mut self, at: usize, number: usize) {
        let count = self.accepted.len().max(1);
        let Some((workload, spec)) = self.accepted.iter().nth(number % count) else { return };
        let (workload, mut spec) = (*workload, Box::new(spec.clone()));
        spec.command.push(number.to_string());
        let rollout = Rollout { max_surge: self.rng.u32(0..3), max_unavailable: 1 };
        self.happened.push(Happened::Disturbed);
        self.command(at, Command::Update { workload, spec, rollout });
    }

    fn container_ends(&mut self, host: usize, placement: PlacementId, code: i32) {
        if !self.hosts[host].running.contains_key(&placement) {
            return;
        }
        self.trace(host, || format!("{placement} ends with {code}"));
        self.happened.push(Happened::Ended { at: host, placement });
        if let Some((id, outcome)) = self.hosts[host].end(&placement, code) {
            self.give(host, Input::Completion(Completion { id, outcome }));
        }
    }

    /// A shim's timer: it kills the container unless it has been told of a later time meanwhile.
    fn deadline(&mut self, host: usize, placement: PlacementId) {
        let Some(until) = self.hosts[host].running.get(&placement).and_then(|container| container.until) else {
            return;
        };
        let last = Instant::from_nanos(until.as_nanos().saturating_sub(MARGIN.as_nanos() as u64));
        let at = self.hosts[host].clock.true_time(last);
        if at <= self.now {
            if self.hosts[host].sabotage != Some(Sabotage::OutlivesLeases) {
                // The kernel takes its time: at the worst all that the margin allows.
                let most = self.hosts[host].clock.true_time(until).since(self.now);
                let takes = if self.rng.bool() { most } else { most.mul_f64(self.rng.f64()) };
                self.later(takes.saturating_sub(Duration::from_micros(1)), Due::Killed { host, placement });
            }
        } else {
            self.later(at.since(self.now), Due::Deadline { host, placement });
        }
    }

    pub(crate) fn command(&mut self, at: usize, command: Command) {
        self.sequence += 1;
        self.give(at, Input::Command { id: CommandId(self.sequence), command });
    }

    fn give(&mut self, at: usize, input: Input) {
        let now = self.hosts[at].clock.shows(self.now);
        if let Some(node) = &mut self.hosts[at].node {
            node.handle(now, input);
            self.drain(at);
        }
    }

    /// Carries out what a node wants, and notes its next timeout.
    fn drain(&mut self, at: usize) {
        // Looking at everything costs as much as there is to look at.
        let rarely = 64 * (self.hosts.len() as u64 / 64).max(1).pow(2);
        let outputs: Vec<Output> = match &mut self.hosts[at].node {
            Some(node) => {
                if self.steps.is_multiple_of(rarely) {
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
                // What is under way comes to its end by itself.
                Output::Cancel(_) => {}
                Output::Event(event) => self.event(at, event),
            }
        }
        if let Some(old) = self.timer_of[at].take() {
            self.timers.remove(&(old, at));
        }
        if let Some(next) = self.hosts[at].node.as_ref().and_then(Node::poll_timeout) {
            let next = self.hosts[at].clock.true_time(next);
            self.timers.insert((next, at));
            self.timer_of[at] = Some(next);
        }
    }

    /// A line about what happens, for whoever looks for the reason of a violation.
    fn trace(&self, at: usize, what: impl FnOnce() -> String) {
        if self.options.trace {
            let seconds = self.now.since(Instant::ZERO).as_secs_f64();
            eprintln!("{seconds:10.4}  {at:>4}  {}", what());
        }
    }

    fn trace_event(&self, at: usize, event: &Event) {
        let number = |node: &NodeId| self.by_id[node];
        match event {
            Event::Changed(Key::Placement(node, workload, replica)) if *node == self.hosts[at].id => {
                let fact = self.hosts[at].node.as_ref().and_then(|node| node.worker().placement(workload, *replica));
                let text = fact.map_or("gone".to_owned(), |held| {
                    format!("epoch {} {:?} {}", held.fact.epoch, held.fact.state, held.fact.detail)
                });
                self.trace(at, || format!("{}.{} {text}", workload.short(), replica + 1));
            }
            Event::Changed(Key::Placement(node, workload, replica)) => {
                let (name, of) = (workload.short(), number(node));
                self.trace(at, || format!("{name}.{} on {of}, as it hears", replica + 1));
            }
            Event::Changed(Key::Drain(node)) => self.trace(at, || format!("hears a drain of {}", number(node))),
            Event::Member { node, state } => self.trace(at, || format!("{} is {state:?}", number(node))),
            Event::Placed { placement, node, .. } => {
                self.trace(at, || format!("auction: {placement} to {}", number(node)));
            }
            Event::Pending { workload, record } => {
                self.trace(at, || format!("auction: none for {}: {:?}", workload.short(), record.refused));
            }
            Event::Noted { workload, text } => self.trace(at, || format!("{}: {text}", workload.short())),
            _ => {}
        }
    }

    fn event(&mut self, at: usize, event: Event) {
        if self.options.trace {
            self.trace_event(at, &event);
        }
        match event {
            Event::Reply { id, result } => {
                if let Some((spec, asked)) = self.asked.remove(&id.0) {
                    match result {
                        Ok(Reply::Submitted(workload)) => {
                            self.accepted.insert(workload, spec);
                            self.measures.submitted(workload, asked);
                        }
                        Ok(Reply::Done) | Err(Refused::NameTaken { .. }) => {}
                        Err(error) => panic!("a good workload was refused: {error}"),
                    }
                }
            }
            Event::Changed(key) => self.measures.hears(&key, self.hosts.len(), self.now),
            Event::Member { node, state: State::Down } => {
                let about = self.by_id[&node];
                if self.hosts[about].node.is_some() && self.network.connects(at, about) {
                    self.measures.false_deaths += 1;
                }
            }
            _ => {}
        }
    }

    fn transmit(&mut self, from: usize, to: NodeId, bytes: Vec<u8>) {
        self.measures.messages += 1;
        self.measures.bytes += bytes.len() as u64;
        let Some(&to) = self.by_id.get(&to) else { return };
        if !self.network.reaches(from, to) || self.hosts[from].sabotage == Some(Sabotage::IsMute) {
            return;
        }
        let slow = self.hosts[to].slow;
        let bytes: Arc<[u8]> = bytes.into();
        let delays: Vec<Duration> = self.network.delays(&mut self.rng).collect();
        for delay in delays {
            let slower = if slow.is_zero() { slow } else { slow.mul_f64(self.rng.f64()) };
            let from = self.hosts[from].id;
            self.later(delay + slower, Due::Message { to, from, bytes: Arc::clone(&bytes) });
        }
    }

    fn effect(&mut self, at: usize, id: EffectId, effect: Effect) {
        let life = self.hosts[at].life;
        match effect {
            Effect::Fetch { provider, pieces, .. } => {
                let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
                let took = self.network.delay(&mut self.rng) * 2 + Duration::from_secs_f64(bytes as f64 / LINK);
                return self.later(took, Due::Fetched { host: at, life, id, provider, pieces, took });
            }
            Effect::Persist(records) => {
                // All take the same time: they end in the order in which they were asked for.
                let due = Due::Persisted { host: at, life, id, records };
                return self.later(Duration::from_millis(2), due);
            }
            Effect::Start { placement, until, .. } => {
                self.started(at, placement);
                if until.is_some() {
                    self.later(Duration::ZERO, Due::Deadline { host: at, placement });
                }
            }
            Effect::Stop { placement, grace } => {
                let completion = Completion { id, outcome: Outcome::Asked };
                self.later(Duration::from_millis(1), Due::Complete { host: at, life, completion });
                let patience = Duration::from_millis(if grace.is_zero() { 20 } else { self.rng.u64(20..500) });
                return self.stop(at, placement, patience);
            }
            _ => {}
        }
        for (wait, id, outcome) in self.hosts[at].world(id, effect) {
            self.later(wait, Due::Complete { host: at, life, completion: Completion { id, outcome } });
        }
    }

    fn stop(&mut self, at: usize, placement: PlacementId, patience: Duration) {
        if self.hosts[at].sabotage == Some(Sabotage::NeverStops) {
            // It says that it has.
            let life = self.hosts[at].life;
            let watch = self.hosts[at].running.get_mut(&placement).and_then(|container| container.watch.take());
            if let Some(id) = watch {
                let outcome = Outcome::Exited(ExitStatus { code: 143, out_of_memory: false });
                self.later(patience, Due::Complete { host: at, life, completion: Completion { id, outcome } });
            }
        } else if let Some(container) = self.hosts[at].running.get_mut(&placement) {
            container.ending = true;
            self.later(patience, Due::Ends { host: at, placement });
        }
    }

    fn started(&mut self, at: usize, placement: PlacementId) {
        self.trace(at, || format!("starts {placement}"));
        self.measures.started(placement.workload, placement.replica, placement.epoch, self.now);
        self.happened.push(Happened::Started { at, placement });
    }

    fn report(mut self, violations: Vec<(String, String)>, wall: Duration) -> Report {
        let seconds = self.now.since(Instant::ZERO).as_secs_f64().max(1e-9);
        let mut violations = violations;
        if self.options.scenario == Scenario::Spread && violations.is_empty() && self.measures.unheard() > 0 {
            let unheard = self.measures.unheard();
            violations.push(("everybody hears".to_owned(), format!("{unheard} facts never came to 99 % of nodes")));
        }
        let measures = &mut self.measures;
        Report {
            seed: self.options.seed,
            nodes: self.options.nodes,
            scenario: self.options.scenario.to_string(),
            violations,
            simulated_s: seconds,
            wall_s: wall.as_secs_f64(),
            spread_ms: measures.spread(),
            failover_ms: Distribution::of(std::mem::take(&mut measures.failover)),
            placement_ms: Distribution::of(std::mem::take(&mut measures.placement)),
            bytes_per_node_s: measures.bytes as f64 / seconds / self.options.nodes as f64,
            placements_per_s: measures.placements_per_s(),
            quality: measures.quality,
            false_deaths: measures.false_deaths,
            messages: measures.messages,
            workloads: self.accepted.len(),
            options: self.options,
        }
    }
}

/// The image under the name that workloads ask for.
fn held() -> ImageHeld {
    ImageHeld {
        reference: "image".parse().expect("a good name"),
        id: ImageId(image().0),
        root: image(),
        size: IMAGE,
        named: Hlc::default(),
        here: true,
        original: None,
    }
}

fn speaks_of_facts(bytes: &[u8]) -> bool {
    use moyai_protocol::message::Message;
    let message = moyai_protocol::codec::decode_message(bytes);
    matches!(message, Ok(Message::Facts { .. } | Message::Reconcile { .. } | Message::Want { .. }))
}

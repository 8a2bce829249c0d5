//! Many nodes in memory: virtual time, a lossy network, containers and disks that are modelled.

mod orders;
mod turns;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use super::*;
use crate::contract::{Completion, FetchFault, Fetched, Outcome, Piece, Survey};
use crate::id::{ImageId, WorkloadId};
use crate::trust::{Membership as Member, mesh_of};
use crate::worker::{Adopted, ExitStatus, PlacementState};
use crate::workload::{Resources, Restart, Spec, tests::spec};

const WALL: u64 = 1_800_000_000_000;
const CHUNKS: u32 = 40;

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// One host: a node, and the world that is its own.
struct Host {
    node: Option<Node>,
    key: SigningKey,
    chain: Chain,
    seed: u64,
    disk: BTreeMap<RecordKey, Vec<u8>>,
    chunks: BTreeSet<ChunkId>,
    /// Running containers, and who waits for their end.
    running: BTreeMap<PlacementId, Option<EffectId>>,
    exited: BTreeMap<PlacementId, ExitStatus>,
    replies: BTreeMap<u64, Result<Reply, Refused>>,
    events: Vec<Event>,
    /// Whether it serves bytes that are not what was asked for.
    lies: bool,
    /// Whether writes do not end, and those that have not.
    disk_hangs: bool,
    unwritten: Vec<EffectId>,
}

enum Due {
    Message { to: usize, from: NodeId, bytes: Vec<u8> },
    Complete { host: usize, life: u64, completion: Completion },
}

pub(crate) struct Mesh {
    now: Instant,
    hosts: Vec<Host>,
    due: BTreeMap<(Instant, u64), Due>,
    seq: u64,
    rng: Rng,
    loss: f64,
    /// Pairs that cannot talk.
    cut: BTreeSet<(usize, usize)>,
    root: SigningKey,
    lives: Vec<u64>,
    messages: u64,
    /// By how many milliseconds nodes that start now are behind.
    clock_behind: u64,
    /// Messages that arrived, for those who want to see some; the first few thousand.
    heard: Vec<Vec<u8>>,
}

fn image() -> ChunkId {
    spec("any").image.root
}

fn pieces() -> Vec<Piece> {
    (0..CHUNKS).map(|at| Piece { chunk: ChunkId(*blake3::hash(&at.to_be_bytes()).as_bytes()), len: 65_536 }).collect()
}

impl Mesh {
    pub(crate) fn new(count: usize, seed: u64) -> Mesh {
        let root = SigningKey::from_bytes(&[200; 32]);
        let mut mesh = Mesh {
            now: Instant::ZERO + secs(1000),
            hosts: Vec::new(),
            due: BTreeMap::new(),
            seq: 0,
            rng: Rng::with_seed(seed),
            loss: 0.0,
            cut: BTreeSet::new(),
            root,
            lives: vec![0; count],
            messages: 0,
            clock_behind: 0,
            heard: Vec::new(),
        };
        for at in 0..count {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&(at as u64 + 1).to_be_bytes());
            let key = SigningKey::from_bytes(&bytes);
            let chain = Chain::root(&mesh.root, node_of(&key), WALL / 1000, 100_000_000);
            mesh.hosts.push(Host {
                node: None,
                key,
                chain,
                seed: seed ^ at as u64,
                disk: BTreeMap::new(),
                chunks: BTreeSet::new(),
                running: BTreeMap::new(),
                exited: BTreeMap::new(),
                replies: BTreeMap::new(),
                events: Vec::new(),
                lies: false,
                disk_hangs: false,
                unwritten: Vec::new(),
            });
            mesh.start(at);
        }
        for at in 1..count {
            mesh.introduce(at, 0);
        }
        mesh
    }

    fn wall(&self) -> UnixMillis {
        UnixMillis(WALL + self.now.as_nanos() / 1_000_000)
    }

    fn start(&mut self, at: usize) {
        let wall = UnixMillis(self.wall().0 - self.clock_behind);
        let now = self.now;
        self.lives[at] += 1;
        let host = &mut self.hosts[at];
        let mut restored = Restored::default();
        for (key, value) in &host.disk {
            match key {
                RecordKey::Fact(_) => restored.facts.push(codec::decode(value).unwrap()),
                RecordKey::Member(node) => restored.members.push((*node, codec::decode(value).unwrap())),
                RecordKey::Seat(workload) => restored.seats.push((*workload, codec::decode(value).unwrap())),
            }
        }
        let complete = pieces().iter().all(|piece| host.chunks.contains(&piece.chunk));
        let config = Config {
            key: host.key.clone(),
            mesh: mesh_of(&node_of(&self.root)),
            chain: host.chain.clone(),
            name: format!("n{at}"),
            version: "test".to_owned(),
            labels: BTreeMap::from([("number".to_owned(), at.to_string())]),
            offers: Offers::default(),
            wall,
            restored,
            images: if complete { BTreeSet::from([image()]) } else { BTreeSet::new() },
            image_copies: 2,
            memo: None,
        };
        let seed = host.seed + self.lives[at];
        host.node = Some(Node::new(config, seed, now));
        host.replies.clear();
        let capacity = Resources { cpu_milli: 4000, memory: 1 << 30 };
        self.command(at, Command::Load { capacity, pressure: 0 });
        self.command(at, Command::Listening { addresses: vec![format!("/memory/{at}")], data: Vec::new() });
    }

    /// The process is gone; with its containers, when the machine is.
    fn kill(&mut self, at: usize, machine: bool) {
        self.hosts[at].node = None;
        if machine {
            self.hosts[at].running.clear();
        }
    }

    fn introduce(&mut self, at: usize, to: usize) {
        for (a, b) in [(at, to), (to, at)] {
            let membership = Member { node: self.id(b), role: Role::Admin, not_after: u64::MAX };
            self.command(a, Command::Admitted { membership, address: Some(format!("/memory/{b}")) });
        }
    }

    fn id(&self, at: usize) -> NodeId {
        node_of(&self.hosts[at].key)
    }

    fn at(&self, node: &NodeId) -> usize {
        (0..self.hosts.len()).find(|at| self.id(*at) == *node).unwrap()
    }

    fn node(&self, at: usize) -> &Node {
        self.hosts[at].node.as_ref().unwrap()
    }

    fn command(&mut self, at: usize, command: Command) -> u64 {
        self.seq += 1;
        let id = self.seq;
        let now = self.now;
        if let Some(node) = &mut self.hosts[at].node {
            node.handle(now, Input::Command { id: CommandId(id), command });
            self.drain(at);
        }
        id
    }

    fn load_image(&mut self, at: usize) {
        self.hosts[at].chunks.extend(pieces().iter().map(|piece| piece.chunk));
        let pin = spec("any").image;
        let image = ImageHeld {
            reference: pin.reference,
            id: ImageId([1; 32]),
            root: pin.root,
            size: pin.size,
            named: catalog::Hlc::default(),
            here: true,
            original: None,
        };
        self.command(at, Command::ImageAdded(image));
    }

    fn submit(&mut self, at: usize, spec: Spec) -> WorkloadId {
        let id = self.command(at, Command::Submit(Box::new(spec)));
        self.run(Duration::from_millis(1));
        match self.hosts[at].replies.remove(&id) {
            Some(Ok(Reply::Submitted(workload))) => workload,
            other => panic!("{other:?}"),
        }
    }

    fn drain(&mut self, at: usize) {
        let life = self.lives[at];
        let me = self.id(at);
        let Some(node) = &mut self.hosts[at].node else { return };
        node.invariants();
        let outputs: Vec<Output> = std::iter::from_fn(|| node.poll_output()).collect();
        for output in outputs {
            match output {
                Output::Transmit { to, bytes } => {
                    self.messages += 1;
                    assert_ne!(to, me, "messages to oneself stay inside");
                    let to = self.at(&to);
                    if self.rng.f64() >= self.loss {
                        let latency = Duration::from_micros(self.rng.u64(200..5000));
                        self.later(latency, Due::Message { to, from: me, bytes });
                    }
                }
                Output::Effect { id, effect } => {
                    if let Some((wait, outcome)) = self.world(at, id, effect) {
                        let completion = Completion { id, outcome };
                        self.later(wait, Due::Complete { host: at, life, completion });
                    }
                }
                Output::Cancel(_) => {}
                Output::Event(Event::Reply { id, result }) => {
                    self.hosts[at].replies.insert(id.0, result);
                }
                Output::Event(event) => self.hosts[at].events.push(event),
            }
        }
    }

    /// What the outside does with an effect; `None` ends later.
    fn world(&mut self, at: usize, id: EffectId, effect: Effect) -> Option<(Duration, Outcome)> {
        let ms = Duration::from_millis;
        match effect {
            Effect::Persist(records) => {
                for (key, value) in records {
                    match value {
                        Some(value) => self.hosts[at].disk.insert(key, value),
                        None => self.hosts[at].disk.remove(&key),
                    };
                }
                if self.hosts[at].disk_hangs {
                    self.hosts[at].unwritten.push(id);
                    return None;
                }
                Some((Duration::from_micros(100), Outcome::Persisted))
            }
            Effect::Extend { .. } => Some((ms(1), Outcome::Extended)),
            Effect::Start { placement, spec, .. } => {
                let host = &mut self.hosts[at];
                assert!(pieces().iter().all(|piece| host.chunks.contains(&piece.chunk)), "no start without the image");
                if spec.command == ["nowhere"] {
                    let error = crate::worker::StartError::Node("no space".to_owned());
                    return Some((ms(5), Outcome::Started(Err(error))));
                }
                if spec.command == ["first"] && placement.replica > 0 {
                    let error = crate::worker::StartError::Node("no space for a second".to_owned());
                    return Some((ms(5), Outcome::Started(Err(error))));
                }
                host.running.insert(placement, None);
                if spec.command == ["exit"] {
                    host.exited.insert(placement, ExitStatus { code: 3, out_of_memory: false });
                }
                Some((ms(5), Outcome::Started(Ok(()))))
            }
            Effect::Adopt { placement } => {
                let adopted =
                    if self.hosts[at].running.contains_key(&placement) { Adopted::Running } else { Adopted::Gone };
                Some((ms(1), Outcome::Adopted(adopted)))
            }
            Effect::Watch { placement } => {
                let host = &mut self.hosts[at];
                if let Some(status) = host.exited.remove(&placement) {
                    host.running.remove(&placement);
                    return Some((ms(20), Outcome::Exited(status)));
                }
                host.running.insert(placement, Some(id));
                None
            }
            Effect::Stop { placement, .. } => {
                let life = self.lives[at];
                if let Some(Some(watch)) = self.hosts[at].running.remove(&placement) {
                    let outcome = Outcome::Exited(ExitStatus { code: 143, out_of_memory: false });
                    let completion = Completion { id: watch, outcome };
                    self.later(ms(5), Due::Complete { host: at, life, completion });
                }
                Some((ms(6), Outcome::Asked))
            }
            Effect::Remove { .. } => Some((ms(1), Outcome::Done)),
            Effect::Survey { .. } => {
                let host = &self.hosts[at];
                let present: Vec<bool> = pieces().iter().map(|piece| host.chunks.contains(&piece.chunk)).collect();
                let complete = present.iter().all(|here| *here);
                let survey = Survey { complete, contents: true, pieces: pieces(), present };
                Some((ms(1), Outcome::Surveyed(Ok(survey))))
            }
            Effect::Fetch { provider, pieces, .. } => {
                let from = self.at(&provider);
                let unreachable = self.hosts[from].node.is_none() || self.cut.contains(&(at, from));
                let mut fetched = Fetched { got: Vec::new(), bytes: 0, elapsed: ms(10), has: None, fault: None };
                if unreachable {
                    fetched.fault = Some(FetchFault::Unreachable("no route".to_owned()));
                    return Some((secs(1), Outcome::Fetched(fetched)));
                }
                for piece in pieces {
                    if self.hosts[from].lies {
                        fetched.fault = Some(FetchFault::WrongChunk(piece.chunk));
                        break;
                    }
                    if !self.hosts[from].chunks.contains(&piece.chunk) {
                        fetched.fault = Some(FetchFault::Missing(piece.chunk));
                        break;
                    }
                    fetched.got.push(piece.chunk);
                    fetched.bytes += u64::from(piece.len);
                }
                self.hosts[at].chunks.extend(fetched.got.iter().copied());
                Some((ms(10), Outcome::Fetched(fetched)))
            }
        }
    }

    fn disk_recovers(&mut self, at: usize) {
        let life = self.lives[at];
        for id in std::mem::take(&mut self.hosts[at].unwritten) {
            let completion = Completion { id, outcome: Outcome::Persisted };
            self.later(Duration::from_millis(1), Due::Complete { host: at, life, completion });
        }
    }

    fn later(&mut self, wait: Duration, due: Due) {
        self.seq += 1;
        self.due.insert((self.now + wait, self.seq), due);
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_until(until, |_| false);
    }

    /// Runs until `done`, or panics after `time`.
    fn wait(&mut self, what: &str, time: Duration, done: impl Fn(&Mesh) -> bool) {
        let until = self.now + time;
        assert!(self.run_until(until, &done), "not within {time:?}: {what}");
    }

    fn run_until(&mut self, until: Instant, done: impl Fn(&Mesh) -> bool) -> bool {
        let mut timers: BinaryHeap<Reverse<(Instant, usize)>> = BinaryHeap::new();
        loop {
            if done(self) {
                return true;
            }
            timers.clear();
            for (at, host) in self.hosts.iter().enumerate() {
                if let Some(timeout) = host.node.as_ref().and_then(Node::poll_timeout) {
                    timers.push(Reverse((timeout, at)));
                }
            }
            let timer = timers.peek().map(|Reverse(timer)| *timer);
            let next = self.due.keys().next().copied();
            match (timer, next) {
                (Some((time, at)), next) if next.is_none_or(|(due, _)| time <= due) => {
                    if time > until {
                        break;
                    }
                    self.now = self.now.max(time);
                    let now = self.now;
                    self.hosts[at].node.as_mut().unwrap().handle_timeout(now);
                    self.drain(at);
                }
                (_, Some((time, seq))) => {
                    if time > until {
                        break;
                    }
                    self.now = time;
                    let due = self.due.remove(&(time, seq)).unwrap();
                    self.arrive(due);
                }
                (_, None) => break,
            }
        }
        self.now = until;
        done(self)
    }

    fn arrive(&mut self, due: Due) {
        let now = self.now;
        let (at, input) = match due {
            Due::Message { to, from, bytes } => {
                let from_at = self.at(&from);
                if self.cut.contains(&(from_at, to)) {
                    return;
                }
                if self.heard.len() < 4000 {
                    self.heard.push(bytes.clone());
                }
                (to, Input::Message { from, bytes })
            }
            Due::Complete { host, life, completion } if life == self.lives[host] => {
                (host, Input::Completion(completion))
            }
            Due::Complete { .. } => return,
        };
        if let Some(node) = &mut self.hosts[at].node {
            node.handle(now, input);
            self.drain(at);
        }
    }

    fn everybody_alive(&self) -> bool {
        let up: Vec<usize> = (0..self.hosts.len()).filter(|at| self.hosts[*at].node.is_some()).collect();
        up.iter().all(|at| {
            let alive = self.node(*at).membership().members().filter(|(_, member)| member.state == State::Alive);
            alive.count() == up.len() - 1
        })
    }

    fn catalogs_agree(&self) -> bool {
        let up: Vec<&Node> = self.hosts.iter().filter_map(|host| host.node.as_ref()).collect();
        up.windows(2).all(|pair| pair[0].catalog().fingerprint() == pair[1].catalog().fingerprint())
    }

    /// Hosts on which a replica runs.
    fn running(&self, workload: &WorkloadId) -> Vec<usize> {
        let runs = |host: &Host| host.running.keys().any(|placement| placement.workload == *workload);
        (0..self.hosts.len()).filter(|at| runs(&self.hosts[*at])).collect()
    }

    fn cut_between(&mut self, left: &[usize], right: &[usize]) {
        for a in left {
            for b in right {
                self.cut.insert((*a, *b));
                self.cut.insert((*b, *a));
            }
        }
    }
}

fn service(name: &str) -> Spec {
    Spec { command: vec!["serve".to_owned()], restart: Restart::Always, ..spec(name) }
}

#[test]
fn two_nodes_meet_and_know_the_same() {
    let mut mesh = Mesh::new(2, 1);
    mesh.wait("both alive", secs(2), Mesh::everybody_alive);
    mesh.wait("same catalog", secs(5), Mesh::catalogs_agree);
    assert_eq!(mesh.node(0).catalog().nodes().count(), 2);
}

#[test]
fn thirty_nodes_that_know_one_find_all_despite_loss() {
    let mut mesh = Mesh::new(30, 2);
    mesh.loss = 0.1;
    mesh.wait("all alive", secs(40), Mesh::everybody_alive);
    mesh.wait("same catalog", secs(40), Mesh::catalogs_agree);
}

#[test]
fn a_dead_node_is_noticed_and_a_living_one_is_not_accused_for_long() {
    for seed in 0..5 {
        let mut mesh = Mesh::new(10, seed);
        mesh.loss = 0.02;
        mesh.run(secs(20));
        let down = |mesh: &Mesh, node: NodeId| {
            (0..9).all(|at| mesh.node(at).membership().member(&node).is_some_and(|m| m.state == State::Down))
        };
        let said_down = |mesh: &Mesh| {
            mesh.hosts
                .iter()
                .flat_map(|host| &host.events)
                .filter(|event| matches!(event, Event::Member { state: State::Down, .. }))
                .count()
        };
        assert_eq!(said_down(&mesh), 0, "nobody died yet (seed {seed})");
        let dead = mesh.id(9);
        mesh.kill(9, true);
        mesh.wait("down everywhere", secs(8), |mesh| down(mesh, dead));
        assert!(mesh.everybody_alive());
    }
}

#[test]
fn a_workload_goes_where_its_image_is_and_anybody_can_stop_it() {
    let mut mesh = Mesh::new(3, 3);
    mesh.run(secs(3));
    mesh.load_image(2);
    mesh.run(secs(1));
    let web = mesh.submit(1, service("web"));
    mesh.wait("running", secs(2), |mesh| mesh.running(&web) == [2]);
    mesh.wait("known everywhere", secs(2), |mesh| {
        (0..3).all(|at| mesh.node(at).catalog().placements_of(&web).any(|p| p.fact.state == PlacementState::Running))
    });
    mesh.run(Duration::from_millis(200));
    let placement = mesh.node(0).catalog().placements_of(&web).next().unwrap();
    let journal = mesh.node(0).catalog().journal(&placement.fact.award.auctioneer, &web).unwrap();
    let record = journal.records.iter().find(|record| record.at == placement.fact.award.at).unwrap();
    assert_eq!((record.asked, record.quotes[0].node), (3, mesh.id(2)));
    assert_eq!(record.placed, [(0, 1, mesh.id(2))]);
    mesh.command(0, Command::Scale { workload: web, replicas: 0 });
    mesh.wait("stopped", secs(2), |mesh| mesh.running(&web).is_empty());
    mesh.command(1, Command::Scale { workload: web, replicas: 1 });
    mesh.wait("started again", secs(5), |mesh| mesh.running(&web).len() == 1);
    mesh.command(0, Command::Remove { workload: web });
    mesh.wait("gone", secs(2), |mesh| {
        mesh.running(&web).is_empty() && (0..3).all(|at| mesh.node(at).catalog().placements().count() == 0)
    });
}

#[test]
fn an_image_is_kept_on_a_second_node_and_its_holder_may_die() {
    let mut mesh = Mesh::new(3, 4);
    mesh.run(secs(3));
    mesh.load_image(0);
    mesh.wait("a second copy", secs(20), |mesh| {
        mesh.hosts.iter().filter(|host| host.chunks.len() == CHUNKS as usize).count() >= 2
    });
    let web = mesh.submit(1, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    let first = mesh.running(&web)[0];
    mesh.run(secs(3));
    mesh.kill(first, true);
    mesh.wait("running elsewhere", secs(10), |mesh| mesh.running(&web).len() == 1);
    let second = mesh.running(&web)[0];
    assert_ne!(first, second);
    let epoch = mesh.node(second).worker().placement(&web, 0).unwrap().fact.epoch;
    assert!(epoch >= 2);
    mesh.start(first);
    mesh.introduce(first, second);
    mesh.run(secs(15));
    assert_eq!(mesh.running(&web), [second], "what came back does not revive an old epoch");
}

#[test]
fn who_has_no_room_for_a_copy_is_passed_over() {
    for seed in 0..6 {
        let mut mesh = Mesh::new(5, seed);
        mesh.run(secs(3));
        let has = |mesh: &Mesh, at: usize| mesh.hosts[at].chunks.len() == CHUNKS as usize;
        let copies = |mesh: &Mesh| (0..5).filter(|at| has(mesh, *at)).collect::<Vec<usize>>();
        // All but one, which is the last of all for some of these.
        for at in 1..4 {
            mesh.command(at, Command::StoreFull(true));
        }
        mesh.load_image(0);
        mesh.wait("a copy where there is room", secs(600), |mesh| copies(mesh) == [0, 4]);
        for at in 1..4 {
            mesh.command(at, Command::StoreFull(false));
        }
        mesh.run(secs(600));
        assert_eq!(copies(&mesh), [0, 4], "enough are enough");
    }
}

#[test]
fn what_an_image_was_made_of_goes_where_there_is_room_for_it() {
    for seed in 0..4 {
        let mut mesh = Mesh::new(4, seed);
        mesh.run(secs(3));
        mesh.load_image(0);
        let has = |mesh: &Mesh, at: usize| mesh.node(at).images().iter().any(|image| image.here);
        mesh.wait("a second copy", secs(30), |mesh| (1..4).any(|at| has(mesh, at)));
        let second = (1..4).find(|at| has(&mesh, *at)).unwrap();
        mesh.command(second, Command::StoreFull(true));
        let (digest, size) = (ImageId([2; 32]), 1);
        let mut held = mesh.node(0).images()[0].clone();
        held.original = Some(catalog::OriginalHeld { root: ChunkId([9; 32]), digest, size, here: true });
        mesh.command(0, Command::ImageAdded(held));
        let fetches = |mesh: &Mesh, at: usize| mesh.node(at).exchange().wanted().any(|root| root == ChunkId([9; 32]));
        mesh.run(secs(60));
        assert!(!(1..4).any(|at| fetches(&mesh, at)), "who has the image comes first");
        mesh.wait("another to fetch it", secs(400), |mesh| (1..4).any(|at| at != second && fetches(mesh, at)));
    }
}

#[test]
fn an_image_and_what_it_was_made_of_are_given_up_together_and_the_last_stay() {
    let nodes = 5;
    for seed in 0..6 {
        let mut mesh = Mesh::new(nodes, seed);
        mesh.run(secs(3));
        let [image, other, original] = [1, 2, 3].map(|kind| ChunkId([kind * 40 + seed as u8; 32]));
        for at in 0..nodes {
            let (digest, size, named) = (ImageId([2; 32]), 1, catalog::Hlc::default());
            // One has the image alone; one has made another of it, as a machine of another kind does.
            let root = if at == 4 { other } else { image };
            let original = Some(catalog::OriginalHeld { root: original, digest, size, here: at > 0 });
            let reference = "made:latest".parse().unwrap();
            let held = ImageHeld { reference, id: ImageId([1; 32]), root, size, named, here: true, original };
            mesh.command(at, Command::ImageAdded(held));
            // Nothing is copied meanwhile.
            mesh.command(at, Command::StoreFull(true));
        }
        let holders = |mesh: &Mesh, root: ChunkId| {
            let has = |at: &usize| mesh.node(*at).images().iter().any(|image| image.held().any(|held| held == root));
            (0..nodes).filter(has).collect::<Vec<usize>>()
        };
        // From one turn's begin to the next one's.
        let early = SLOT - Duration::from_millis(mesh.wall().0 % SLOT.as_millis() as u64) + secs(3);
        mesh.run(early);
        for _ in 0..3 * nodes {
            let spare: Vec<_> = (0..nodes).map(|at| mesh.node(at).spare_images(mesh.now)).collect();
            let givers: Vec<usize> = (0..nodes).filter(|at| !spare[*at].is_empty()).collect();
            assert!(givers.len() <= 1, "{givers:?} give up the same at one time");
            for giver in givers {
                let mut all = mesh.node(giver).images()[0].held().collect::<BTreeSet<ChunkId>>();
                // Nobody else has that; what it was made of may go alone.
                all.remove(&other);
                assert_eq!(spare[giver], [all], "node {giver}");
                for roots in spare[giver].clone() {
                    mesh.command(giver, Command::ImagesGivenUp(roots.into_iter().collect()));
                }
            }
            mesh.run(SLOT);
        }
        let left = [image, other, original].map(|root| holders(&mesh, root).len());
        assert_eq!(left, [1, 1, 1], "what one alone has stays, and so does what is made of it there");
    }
}

#[test]
fn a_daemon_that_comes_back_adopts_its_containers() {
    let mut mesh = Mesh::new(2, 5);
    mesh.load_image(0);
    mesh.run(secs(8));
    let web = mesh.submit(0, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    let at = mesh.running(&web)[0];
    mesh.run(secs(1));
    mesh.kill(at, false);
    mesh.start(at);
    mesh.introduce(at, 1 - at);
    mesh.run(secs(20));
    assert_eq!(mesh.running(&web), [at]);
    assert_eq!(mesh.node(at).worker().placement(&web, 0).unwrap().fact.epoch, 1);
    assert!(mesh.catalogs_agree());
}

#[test]
fn a_mesh_that_lost_all_power_runs_its_work_again() {
    let mut mesh = Mesh::new(3, 6);
    mesh.load_image(0);
    mesh.run(secs(15));
    let web = mesh.submit(0, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(3));
    for at in 0..3 {
        mesh.kill(at, true);
    }
    mesh.run(secs(5));
    for at in 0..3 {
        mesh.start(at);
    }
    // No introduction: they remember one another's addresses.
    mesh.wait("all alive", secs(30), Mesh::everybody_alive);
    mesh.wait("running again", secs(20), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(20));
    assert_eq!(mesh.running(&web).len(), 1);
}

#[test]
fn both_halves_of_a_split_mesh_run_it_and_one_stops_when_they_meet() {
    let mut mesh = Mesh::new(4, 7);
    for at in 0..4 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let web = mesh.submit(0, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    mesh.cut_between(&[0, 1], &[2, 3]);
    mesh.wait("on both sides", secs(20), |mesh| mesh.running(&web).len() == 2);
    mesh.cut.clear();
    mesh.wait("on one", secs(30), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(10));
    assert_eq!(mesh.running(&web).len(), 1);
    mesh.wait("same catalog", secs(10), Mesh::catalogs_agree);
}

#[test]
fn what_nobody_can_take_waits_with_its_reasons_and_starts_when_one_can() {
    let mut mesh = Mesh::new(3, 8);
    for at in 0..3 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let big = |name: &str| Spec { resources: Resources { cpu_milli: 3000, memory: 600 << 20 }, ..service(name) };
    let taken: Vec<WorkloadId> = (0..3).map(|n| mesh.submit(0, big(&format!("big{n}")))).collect();
    mesh.run(secs(3));
    assert!(taken.iter().all(|workload| mesh.running(workload).len() == 1));
    let late = mesh.submit(1, big("late"));
    mesh.run(secs(3));
    assert!(mesh.running(&late).is_empty());
    let record = mesh.node(2).catalog().pending(&late).unwrap();
    assert_eq!(record.refused, [("memory".to_owned(), 3)]);
    mesh.command(2, Command::Remove { workload: taken[1] });
    mesh.wait("taken when there is room", secs(5), |mesh| mesh.running(&late).len() == 1);
    mesh.run(secs(1));
    assert!(mesh.node(0).catalog().pending(&late).is_none());
}

#[test]
fn a_finished_workload_stays_finished_when_its_node_dies() {
    let mut mesh = Mesh::new(3, 9);
    mesh.load_image(0);
    mesh.load_image(1);
    mesh.run(secs(8));
    let job = mesh.submit(2, Spec { command: vec!["exit".to_owned()], ..spec("job") });
    let exited = |mesh: &Mesh, observer: usize| {
        let mut placements = mesh.node(observer).catalog().placements_of(&job);
        placements.any(|placement| {
            placement.fact.state == PlacementState::Exited(ExitStatus { code: 3, out_of_memory: false })
        })
    };
    mesh.wait("exited", secs(3), |mesh| (0..3).all(|observer| exited(mesh, observer)));
    let at = mesh.at(&mesh.node(2).catalog().placements_of(&job).next().unwrap().node);
    mesh.kill(at, true);
    mesh.run(secs(20));
    assert!(mesh.running(&job).is_empty());
    assert!(exited(&mesh, (at + 1) % 3));
}

#[test]
fn what_is_to_be_removed_when_it_ends_leaves_nothing() {
    let mut mesh = Mesh::new(3, 21);
    mesh.load_image(0);
    mesh.run(secs(8));
    let ran = |mesh: &Mesh, id: WorkloadId| {
        let started = |event: &Event| matches!(event, Event::Placed { placement, .. } if placement.workload == id);
        mesh.hosts.iter().flat_map(|host| &host.events).any(started)
    };
    let job = || Spec { command: vec!["exit".to_owned()], auto_remove: true, ..spec("job") };
    let ended = mesh.submit(2, job());
    mesh.wait("it ran", secs(3), |mesh| ran(mesh, ended));
    let stopped = mesh.submit(2, Spec { auto_remove: true, ..service("web") });
    mesh.wait("running", secs(3), |mesh| mesh.running(&stopped).len() == 1);
    mesh.command(0, Command::Scale { workload: stopped, replicas: 0 });
    mesh.wait("both are forgotten", secs(5), |mesh| {
        (0..3).all(|at| {
            let catalog = mesh.node(at).catalog();
            [ended, stopped].iter().all(|id| catalog.workload(id).is_none()) && catalog.placements().count() == 0
        })
    });
    // Whoever submits it is the one that would remove it: not before it has run.
    let mut alone = Mesh::new(1, 22);
    alone.load_image(0);
    alone.run(secs(8));
    let ended = alone.submit(0, job());
    alone.wait("it ran", secs(3), |mesh| ran(mesh, ended));
    alone.wait("forgotten", secs(3), |mesh| mesh.node(0).catalog().workload(&ended).is_none());
}

#[test]
fn a_restart_with_a_clock_that_is_behind_forgets_nothing() {
    let mut mesh = Mesh::new(2, 23);
    mesh.load_image(0);
    mesh.run(secs(8));
    let web = mesh.submit(0, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(1));
    let at = mesh.running(&web)[0];
    mesh.kill(at, false);
    // A small machine that has no clock of its own begins an hour before it went.
    mesh.clock_behind = 3_600_000;
    mesh.start(at);
    assert!(mesh.node(at).worker().placement(&web, 0).is_some());
    assert!(!mesh.node(at).images().is_empty());
    mesh.clock_behind = 0;
    let right = mesh.wall();
    mesh.command(at, Command::WallClock(right));
    mesh.introduce(at, 1 - at);
    mesh.run(secs(15));
    assert_eq!(mesh.running(&web), [at]);
    assert_eq!(mesh.node(at).worker().placement(&web, 0).unwrap().fact.epoch, 1);
    assert!(mesh.catalogs_agree());
}

#[test]
fn no_epoch_is_so_high_that_there_is_none_after_it() {
    let mut mesh = Mesh::new(2, 24);
    for at in 0..2 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let on = BTreeMap::from([("number".to_owned(), "0".to_owned())]);
    let web = mesh.submit(0, Spec { on, ..service("web") });
    mesh.wait("running", secs(3), |mesh| mesh.running(&web) == [0]);
    mesh.run(secs(1));
    // A member awards itself what it likes, and says that it failed.
    let (from, now, wall) = (mesh.id(1), mesh.now, mesh.wall());
    let mut fact = mesh.node(0).worker().placement(&web, 0).unwrap().fact.clone();
    let thief = &mesh.hosts[1];
    let say = |epoch: u64, fact: &mut catalog::PlacementFact| {
        fact.epoch = epoch;
        fact.state = PlacementState::Failed;
        let placement = PlacementId { workload: web, replica: 0, epoch };
        let chain = Arc::new(thief.chain.clone());
        fact.award = auction::Award::sign(&placement, &from, fact.award.at, &thief.key, chain);
        let body = catalog::Body::Placement(fact.clone());
        let fact = Fact::sign(Key::Placement(from, web, 0), catalog::Hlc::at(wall), &body, &thief.key);
        codec::encode_message(&Message::Facts { facts: vec![Arc::new(fact)] })
    };
    let (beyond, highest) = (say(u64::MAX, &mut fact), say(wall.0, &mut fact));
    for bytes in [beyond, highest] {
        mesh.hosts[0].node.as_mut().unwrap().handle(now, Input::Message { from, bytes });
        mesh.drain(0);
    }
    assert_eq!(mesh.node(0).dropped().facts, 1);
    mesh.kill(0, true);
    mesh.run(secs(3));
    mesh.start(0);
    mesh.introduce(0, 1);
    mesh.wait("running again", secs(30), |mesh| mesh.running(&web) == [0]);
}

#[test]
fn a_node_that_cannot_start_it_gives_way_to_another() {
    let mut mesh = Mesh::new(2, 10);
    mesh.load_image(0);
    mesh.load_image(1);
    mesh.run(secs(8));
    let web = mesh.submit(0, Spec { command: vec!["nowhere".to_owned()], ..spec("web") });
    mesh.run(secs(10));
    let epochs: Vec<u64> = mesh.node(0).catalog().placements_of(&web).map(|p| p.fact.epoch).collect();
    assert_eq!(epochs.iter().max(), Some(&2), "the second try is elsewhere, and neither node is asked again at once");
    let tried = |host: &Host| host.events.iter().any(|event| matches!(event, Event::Placed { .. }));
    assert!(mesh.hosts.iter().any(tried));
    let pending = mesh.node(1).catalog().pending(&web);
    assert_eq!(pending.unwrap().refused, [("failed there a moment ago".to_owned(), 2)]);
}

#[test]
fn a_lying_provider_is_left_and_the_image_comes_from_the_honest_one() {
    let mut mesh = Mesh::new(3, 11);
    mesh.load_image(0);
    mesh.load_image(1);
    mesh.hosts[0].lies = true;
    mesh.run(secs(4));
    let on = BTreeMap::from([("number".to_owned(), "2".to_owned())]);
    let web = mesh.submit(0, Spec { on, ..service("web") });
    mesh.wait("running on the third", secs(10), |mesh| mesh.running(&web) == [2]);
}

#[test]
fn names_are_unique_and_replicas_spread() {
    let mut mesh = Mesh::new(3, 12);
    for at in 0..3 {
        mesh.load_image(at);
    }
    mesh.run(secs(4));
    let web = mesh.submit(0, Spec { replicas: 3, ..service("web") });
    mesh.wait("one each", secs(3), |mesh| mesh.running(&web) == [0, 1, 2]);
    let again = mesh.command(1, Command::Submit(Box::new(service("web"))));
    mesh.run(secs(1));
    assert!(matches!(mesh.hosts[1].replies[&again], Err(Refused::NameTaken { .. })));
}

#[test]
fn malformed_and_forged_messages_are_counted_and_change_nothing() {
    let mut mesh = Mesh::new(2, 13);
    mesh.run(secs(3));
    let from = mesh.id(1);
    let now = mesh.now;
    let before = mesh.node(0).catalog().fingerprint();
    let node = mesh.hosts[0].node.as_mut().unwrap();
    for bytes in [vec![], vec![9], vec![1, 255, 255], vec![1; 2000], vec![0; 3 << 20]] {
        node.handle(now, Input::Message { from, bytes });
    }
    assert_eq!(node.dropped().undecoded, 5);
    let mut forged = Fact::clone(&node.catalog().get(&Key::Node(from)).unwrap().fact);
    forged.version = catalog::Hlc::at(UnixMillis(forged.version.time().0 + 1));
    let bytes = codec::encode_message(&Message::Facts { facts: vec![Arc::new(forged)] });
    node.handle(now, Input::Message { from, bytes });
    assert_eq!(node.dropped().facts, 1);
    assert_eq!(node.catalog().fingerprint(), before);
}

#[test]
fn nobody_speaks_for_another_member() {
    let mut mesh = Mesh::new(3, 17);
    mesh.run(secs(4));
    let (victim, liar) = (mesh.id(1), mesh.id(2));
    let known = mesh.node(0).membership().member(&victim).unwrap().clone();
    let forged = |incarnation: u64, state: State, boot: u64| membership::Update {
        node: victim,
        incarnation,
        boot,
        state,
        accuser: None,
        addresses: vec!["/memory/9".to_owned(); 100],
        signature: known.signature.unwrap(),
    };
    let now = mesh.now;
    for update in [
        forged(u64::MAX, State::Down, known.boot),
        forged(known.incarnation + 1, State::Alive, 1),
        forged(known.incarnation, State::Left, known.boot),
    ] {
        let bytes = codec::encode_message(&Message::MembersPush { updates: vec![update] });
        for at in 0..2 {
            let node = mesh.hosts[at].node.as_mut().unwrap();
            node.handle(now, Input::Message { from: liar, bytes: bytes.clone() });
            mesh.drain(at);
        }
    }
    let after = mesh.node(0).membership().member(&victim).unwrap();
    assert_eq!((after.incarnation, after.state, &after.addresses), (known.incarnation, State::Alive, &known.addresses));
    assert!(!mesh.hosts[1].events.iter().any(|event| matches!(event, Event::Cloned { .. })));
    mesh.run(secs(5));
    assert!(mesh.everybody_alive());
}

#[test]
fn a_clock_a_day_ahead_poisons_nobody_and_its_owner_is_told() {
    let mut mesh = Mesh::new(2, 14);
    mesh.run(secs(3));
    let day = 86_400_000;
    let wall = UnixMillis(mesh.wall().0 + day);
    mesh.command(1, Command::WallClock(wall));
    mesh.load_image(1);
    mesh.run(secs(3));
    assert!(mesh.node(0).catalog().node(&mesh.id(1)).unwrap().images.is_empty());
    let told = |event: &Event| matches!(event, Event::ClockOff { ahead, .. } if *ahead > day as i64 - 60_000);
    assert!(mesh.hosts[1].events.iter().any(told));

    // Set right, by its owner or by NTP: what it said meanwhile is said again.
    let right = mesh.wall();
    mesh.command(1, Command::WallClock(right));
    mesh.wait("its image is known", secs(5), |mesh| {
        !mesh.node(0).catalog().node(&mesh.id(1)).unwrap().images.is_empty() && mesh.catalogs_agree()
    });
}

#[test]
fn keys_without_certificates_become_no_members_and_say_nothing() {
    let mut mesh = Mesh::new(2, 18);
    mesh.run(secs(3));
    let (from, now, wall) = (mesh.id(1), mesh.now, mesh.wall());
    let invented = SigningKey::from_bytes(&[77; 32]);
    let stranger = node_of(&invented);
    let mut alone = Membership::new(invented.clone(), wall.0, now);
    alone.set_addresses(vec!["/memory/1".to_owned()]);
    let (mut rng, mut sent) = (Rng::with_seed(1), Vec::new());
    let mut cx = membership::Context { now, rng: &mut rng, certified: &|_| true, memo: None, out: &mut sent };
    alone.meet(from, None, &mut cx);
    let (_, word) = sent.remove(0);
    let gone =
        Fact::sign(Key::Journal(stranger, spec("web").id), catalog::Hlc::at(wall), &catalog::Body::Gone, &invented);
    let node = mesh.hosts[0].node.as_mut().unwrap();
    node.handle(now, Input::Message { from, bytes: codec::encode_message(&word) });
    let report = Fact::sign(Key::Node(stranger), catalog::Hlc::at(wall), &catalog::Body::Gone, &invented);
    let facts = vec![Arc::new(gone), Arc::new(report)];
    node.handle(now, Input::Message { from, bytes: codec::encode_message(&Message::Facts { facts }) });
    assert!(node.membership().member(&stranger).is_none());
    assert_eq!(node.dropped().facts, 2);

    // With a certificate it is one: its word came before its report, and counts when the report comes.
    let chain = Chain::root(&mesh.root, stranger, WALL / 1000, 100_000_000);
    let mut report = node.catalog().node(&from).unwrap().clone();
    report.vouch = catalog::vouch(&invented, &chain);
    report.chain = chain;
    let report = Fact::sign(Key::Node(stranger), catalog::Hlc::at(wall), &catalog::Body::Node(report), &invented);
    let facts = vec![Arc::new(report)];
    node.handle(now, Input::Message { from, bytes: codec::encode_message(&Message::Facts { facts }) });
    assert!(node.membership().member(&stranger).is_some());
}

#[test]
fn a_placement_that_nobody_awarded_takes_nothing_down() {
    let mut mesh = Mesh::new(3, 19);
    mesh.load_image(0);
    mesh.run(secs(8));
    let web = mesh.submit(0, service("web"));
    mesh.wait("running", secs(3), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(1));
    let holder = mesh.running(&web)[0];
    let thief = (holder + 1) % 3;
    let (from, now, wall) = (mesh.id(thief), mesh.now, mesh.wall());
    let mut fact = mesh.node(holder).worker().placement(&web, 0).unwrap().fact.clone();
    fact.epoch += 1;
    let theft = |fact: catalog::PlacementFact| {
        let key = Key::Placement(from, web, 0);
        Fact::sign(key, catalog::Hlc::at(wall), &catalog::Body::Placement(fact), &mesh.hosts[thief].key)
    };
    let bytes = codec::encode_message(&Message::Facts { facts: vec![Arc::new(theft(fact))] });
    mesh.hosts[holder].node.as_mut().unwrap().handle(now, Input::Message { from, bytes });
    mesh.drain(holder);
    assert_eq!(mesh.node(holder).dropped().facts, 1);
    mesh.run(secs(5));
    assert_eq!(mesh.running(&web), [holder]);
}

#[test]
fn nothing_starts_and_no_award_is_accepted_before_it_is_written_down() {
    let mut mesh = Mesh::new(2, 20);
    mesh.load_image(1);
    mesh.run(secs(8));
    // The disk of the only node that may run it hangs.
    mesh.hosts[1].disk_hangs = true;
    let on = BTreeMap::from([("number".to_owned(), "1".to_owned())]);
    let web = mesh.submit(0, Spec { on, ..service("web") });
    mesh.run(Duration::from_millis(400));
    assert!(mesh.running(&web).is_empty());
    assert!(!mesh.hosts[0].events.iter().any(|event| matches!(event, Event::Placed { .. })));
    mesh.hosts[1].disk_hangs = false;
    mesh.disk_recovers(1);
    mesh.wait("running", secs(3), |mesh| mesh.running(&web) == [1]);
}

#[test]
fn the_later_of_two_machines_with_one_key_stops() {
    let mut mesh = Mesh::new(3, 15);
    mesh.run(secs(5));
    // A cloned disk: host 2 has host 1's key, and starts later.
    mesh.hosts[2].node = None;
    mesh.hosts[2].disk.clear();
    mesh.run(secs(15));
    let (wall, now) = (mesh.wall(), mesh.now);
    let config = |mesh: &Mesh| Config {
        key: mesh.hosts[1].key.clone(),
        mesh: mesh_of(&node_of(&mesh.root)),
        chain: mesh.hosts[1].chain.clone(),
        name: "clone".to_owned(),
        version: "test".to_owned(),
        labels: BTreeMap::new(),
        offers: Offers::default(),
        wall,
        restored: Restored::default(),
        images: BTreeSet::new(),
        image_copies: 2,
        memo: None,
    };
    let mut clone = Node::new(config(&mesh), 99, now);
    let twin = clone.id();
    let peer = mesh.id(0);
    let membership = Member { node: peer, role: Role::Admin, not_after: u64::MAX };
    clone.handle(now, Input::Command { id: CommandId(1), command: Command::Admitted { membership, address: None } });
    let mut cloned = false;
    for step in 0..200u64 {
        let now = now + Duration::from_millis(50 * step);
        mesh.run(Duration::from_millis(50));
        clone.handle_timeout(now);
        while let Some(output) = clone.poll_output() {
            match output {
                Output::Transmit { to, bytes } if to == peer => {
                    mesh.hosts[0].node.as_mut().unwrap().handle(mesh.now, Input::Message { from: twin, bytes });
                    // What node 0 answers to this key reaches both machines here.
                    let node = mesh.hosts[0].node.as_mut().unwrap();
                    let outputs: Vec<Output> = std::iter::from_fn(|| node.poll_output()).collect();
                    for output in outputs {
                        if let Output::Transmit { to, bytes } = output
                            && to == twin
                        {
                            clone.handle(now, Input::Message { from: peer, bytes: bytes.clone() });
                            mesh.hosts[1].node.as_mut().unwrap().handle(mesh.now, Input::Message { from: peer, bytes });
                            mesh.drain(1);
                        }
                    }
                }
                Output::Event(Event::Cloned { .. }) => cloned = true,
                _ => {}
            }
        }
    }
    assert!(cloned, "the later machine is told");
    let first = mesh.hosts[1].events.iter().any(|event| matches!(event, Event::Cloned { .. }));
    assert!(!first, "the earlier one goes on");
}

#[test]
fn a_certificate_is_renewed_before_it_ends() {
    let mut mesh = Mesh::new(2, 16);
    let root_chain = mesh.hosts[0].chain.clone();
    let wall = mesh.wall().as_secs();
    let id = mesh.id(1);
    let short = root_chain.issue(&mesh.hosts[0].key.clone(), id, Role::Submitter, wall, 90, 7);
    mesh.command(1, Command::Certified(short));
    mesh.run(secs(85));
    let renewed = mesh.node(1).chain().leaf().unwrap();
    assert!(renewed.not_after > wall + 1000);
    assert_eq!(renewed.role, Role::Submitter);
}

#[test]
fn a_node_that_ran_more_than_can_be_auctioned_at_once_is_made_up_for() {
    let mut mesh = Mesh::new(2, 25);
    for at in 0..2 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let small = |name: &str| Spec { resources: Resources { cpu_milli: 1, memory: 1 << 20 }, ..service(name) };
    for number in 0..600 {
        mesh.submit(number % 2, small(&format!("w{number}")));
    }
    let count = |mesh: &Mesh, at: usize| mesh.hosts[at].running.len();
    mesh.wait("all run", secs(30), |mesh| count(mesh, 0) + count(mesh, 1) == 600);
    let at = usize::from(count(&mesh, 1) > count(&mesh, 0));
    mesh.run(secs(3));
    assert!(count(&mesh, at) > auction::MAX_AUCTIONS);
    mesh.kill(at, true);
    mesh.wait("all run on the other", secs(60), |mesh| count(mesh, 1 - at) == 600);
}

/// What a hostile member sends: real messages with something changed, in any order, from anybody.
fn garble(rng: &mut Rng, heard: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = heard[rng.usize(..heard.len())].clone();
    for _ in 0..rng.usize(0..4) {
        if bytes.len() < 2 {
            break;
        }
        let at = rng.usize(1..bytes.len());
        match rng.u8(..6) {
            0 => bytes[at] ^= 1 << rng.u8(..8),
            1 => bytes[at] = rng.u8(..),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, [0, 1, 250, 251, 252, 253, 254, 255][rng.usize(..8)]),
            4 => drop(bytes.remove(at)),
            _ => {
                let other = &heard[rng.usize(..heard.len())];
                let from = rng.usize(..other.len());
                bytes.splice(at.., other[from..].iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn no_bytes_from_a_member_bring_a_node_down_or_over_its_bounds() {
    let mut mesh = Mesh::new(4, 26);
    mesh.load_image(0);
    mesh.run(secs(8));
    let on = BTreeMap::from([("number".to_owned(), "3".to_owned())]);
    let far = mesh.submit(0, Spec { on, ..service("far") });
    let web = mesh.submit(1, Spec { replicas: 3, ..service("web") });
    mesh.wait("running", secs(10), |mesh| mesh.running(&web).len() >= 2 && mesh.running(&far) == [3]);
    mesh.kill(2, true);
    mesh.run(secs(8));
    let heard = std::mem::take(&mut mesh.heard);
    let kinds: BTreeSet<u8> = heard.iter().map(|bytes| bytes[1]).collect();
    assert!(kinds.len() >= 12, "of most kinds of messages: {kinds:?}");
    let mut rng = Rng::with_seed(26);
    for step in 0..40_000u32 {
        let from = mesh.id([1, 2, 3][rng.usize(..3)]);
        let (bytes, now) = (garble(&mut rng, &heard), mesh.now);
        mesh.hosts[0].node.as_mut().unwrap().handle(now, Input::Message { from, bytes });
        // Checks every invariant.
        mesh.drain(0);
        if step % 500 == 0 {
            mesh.run(Duration::from_millis(100));
        }
    }
    let undecoded = mesh.node(0).dropped().undecoded;
    assert!(undecoded < 30_000, "{undecoded} of 40,000 were not even messages");
    // And when it is over, all goes on as before.
    mesh.start(2);
    mesh.introduce(2, 1);
    mesh.wait("all alive", secs(60), Mesh::everybody_alive);
    mesh.wait("all of it runs", secs(60), |mesh| {
        let count = mesh.hosts.iter().flat_map(|host| host.running.keys()).filter(|p| p.workload == web).count();
        count == 3 && mesh.running(&far) == [3]
    });
}

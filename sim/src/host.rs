//! One modelled machine around a real protocol node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use moyai_protocol::catalog::Fact;
use moyai_protocol::codec;
use moyai_protocol::confinement::Offers;
use moyai_protocol::contract::{
    Command, CommandId, Effect, EffectId, FetchFault, Fetched, Input, Outcome, Piece, RecordKey, Survey,
};
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_protocol::memo::Memo;
use moyai_protocol::node::{Config, Node, Restored, Snapshot};
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::trust::{Chain, mesh_of, node_of};
use moyai_protocol::worker::{Adopted, ExitStatus};
use moyai_protocol::workload::{PlacementId, Resources};

use crate::options::Sabotage;

/// Chunks of an image.
const PIECES: u64 = 32;
/// Bytes of the image that a simulated mesh has when nothing else is said.
pub(crate) const IMAGE: u64 = 2 << 20;
/// What a simulated machine has when nothing else is said.
pub(crate) const CAPACITY: Resources = Resources { cpu_milli: 4000, memory: 4 << 30 };

/// A machine that is modelled: its disk is a map, its containers are entries in another, its clock runs as it likes.
/// The protocol node on it is the real one.
pub struct FakeHost {
    /// The node, while the machine has power.
    pub node: Option<Node>,
    /// Containers that run on it.
    pub running: BTreeMap<PlacementId, FakeContainer>,
    /// What people call it.
    pub name: String,
    /// All that it has.
    pub capacity: Resources,
    /// What constraints are matched against.
    pub labels: BTreeMap<String, String>,
    pub(crate) id: NodeId,
    pub(crate) life: u64,
    pub(crate) clock: FakeClock,
    /// How much longer each message takes to be looked at, at the most.
    pub(crate) slow: Duration,
    pub(crate) sabotage: Option<Sabotage>,
    key: SigningKey,
    chain: Chain,
    root: NodeId,
    memo: Arc<Memo>,
    /// Whether anybody will ever ask what is on its disk.
    pub(crate) keeps: bool,
    /// What was on the disk when the mesh began in step.
    base: Option<Arc<Snapshot>>,
    disk: BTreeMap<RecordKey, Option<Vec<u8>>>,
    chunks: BTreeSet<ChunkId>,
    /// Images of the mesh, with their sizes.
    images: Arc<BTreeMap<ChunkId, u64>>,
    /// What ran when the power went.
    ran: Vec<PlacementId>,
    /// How containers ended that nobody was waiting for.
    exited: BTreeMap<PlacementId, ExitStatus>,
}

/// A container that is modelled: it runs until somebody ends it.
#[derive(Copy, Clone, Debug, Default)]
pub struct FakeContainer {
    /// Who waits for its end.
    pub(crate) watch: Option<EffectId>,
    /// When its shim kills it, by this machine's clock, unless it is told of a later time.
    pub(crate) until: Option<Instant>,
    /// It has been asked to end.
    pub(crate) ending: bool,
}

/// A clock that is off, and runs too fast or too slow.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct FakeClock {
    /// Millionths that it runs too fast.
    pub(crate) ppm: i64,
    /// Milliseconds that its wall clock was ahead at the beginning.
    pub(crate) ahead: i64,
}

impl FakeClock {
    /// What it shows at a moment of true time.
    pub(crate) fn shows(&self, at: Instant) -> Instant {
        let nanos = i128::from(at.as_nanos());
        Instant::from_nanos((nanos + nanos * i128::from(self.ppm) / 1_000_000) as u64)
    }

    /// The first moment of true time at which it shows at least `at`.
    pub(crate) fn true_time(&self, at: Instant) -> Instant {
        let nanos = i128::from(at.as_nanos());
        let rate = 1_000_000 + i128::from(self.ppm);
        Instant::from_nanos(((nanos * 1_000_000 + rate - 1) / rate) as u64 + 1)
    }

    fn wall(&self, at: Instant, epoch: u64) -> UnixMillis {
        let millis = self.shows(at).as_nanos() / 1_000_000;
        UnixMillis((epoch + millis).saturating_add_signed(self.ahead))
    }
}

/// The image's root chunk.
pub(crate) fn image() -> ChunkId {
    ChunkId(*blake3::hash(b"image").as_bytes())
}

fn pieces(root: &ChunkId, size: u64) -> Vec<Piece> {
    let chunk = |at: u64| ChunkId(*blake3::keyed_hash(&root.0, &at.to_be_bytes()).as_bytes());
    (0..PIECES).map(|at| Piece { chunk: chunk(at), len: (size / PIECES).clamp(1, 1 << 30) as u32 }).collect()
}

impl FakeHost {
    pub(crate) fn new(
        at: usize,
        root: &SigningKey,
        memo: &Arc<Memo>,
        images: &Arc<BTreeMap<ChunkId, u64>>,
        epoch: u64,
    ) -> FakeHost {
        let key = SigningKey::from_bytes(blake3::hash(&(at as u64).to_be_bytes()).as_bytes());
        // Its certificate is older than any of the clocks.
        let chain = Chain::root(root, node_of(&key), epoch / 1000 - 3600, 1 << 30);
        FakeHost {
            node: None,
            running: BTreeMap::new(),
            name: format!("node-{at}"),
            capacity: CAPACITY,
            labels: BTreeMap::from([("number".to_owned(), at.to_string())]),
            id: node_of(&key),
            life: 0,
            clock: FakeClock::default(),
            slow: Duration::ZERO,
            sabotage: None,
            key,
            chain,
            root: node_of(root),
            memo: Arc::clone(memo),
            keeps: true,
            base: None,
            disk: BTreeMap::new(),
            chunks: BTreeSet::new(),
            images: Arc::clone(images),
            ran: Vec::new(),
            exited: BTreeMap::new(),
        }
    }

    /// Gives the machine power.
    pub(crate) fn start(&mut self, at: usize, seed: u64, now: Instant, epoch: u64) {
        self.life += 1;
        let config = Config {
            key: self.key.clone(),
            mesh: mesh_of(&self.root),
            chain: self.chain.clone(),
            name: self.name.clone(),
            version: "sim".to_owned(),
            labels: self.labels.clone(),
            offers: Offers::default(),
            wall: self.clock.wall(now, epoch),
            restored: self.restored(),
            images: self.images.keys().filter(|root| self.has_image(root)).copied().collect(),
            image_copies: 3,
            memo: Some(Arc::clone(&self.memo)),
        };
        let now = self.clock.shows(now);
        let mut node = Node::new(config, seed.wrapping_add(self.life), now);
        if self.sabotage.is_none() {
            // The daemon deletes what no placement accounts for before it does anything else: a predecessor that was
            // being stopped when the daemon died.
            let held = |placement: &PlacementId| node.worker().placement(&placement.workload, placement.replica);
            self.running.retain(|known, _| held(known).is_some_and(|held| held.fact.epoch == known.epoch));
        }
        for command in [
            Command::Load { capacity: self.capacity, pressure: 0 },
            Command::Listening { addresses: vec![format!("/memory/{at}")], data: Vec::new() },
        ] {
            node.handle(now, Input::Command { id: CommandId(0), command });
        }
        self.node = Some(node);
    }

    /// What a machine that should not brings back by itself.
    pub(crate) fn revive(&mut self) -> Vec<PlacementId> {
        let ran = std::mem::take(&mut self.ran);
        if self.sabotage != Some(Sabotage::Revives) {
            return Vec::new();
        }
        self.running.extend(ran.iter().map(|placement| (*placement, FakeContainer::default())));
        ran
    }

    /// What was written down: at first by all, since then by this one.
    fn restored(&self) -> Restored {
        let mut restored = Restored::default();
        for entry in self.base.iter().flat_map(|base| &base.facts) {
            if !self.disk.contains_key(&RecordKey::Fact(entry.fact.key)) {
                restored.facts.push(Fact::clone(&entry.fact));
            }
        }
        for (word, _) in self.base.iter().flat_map(|base| &base.members) {
            if word.node != self.id && !self.disk.contains_key(&RecordKey::Member(word.node)) {
                restored.members.push((word.node, word.addresses.clone()));
            }
        }
        for (key, value) in &self.disk {
            match (key, value) {
                (RecordKey::Fact(_), Some(value)) => {
                    restored.facts.push(codec::decode(value).expect("written by this code"));
                }
                (RecordKey::Seat(workload), Some(value)) => {
                    restored.seats.push((*workload, codec::decode(value).expect("written by this code")));
                }
                (RecordKey::Member(node), Some(value)) => {
                    restored.members.push((*node, codec::decode(value).expect("written by this code")));
                }
                (_, None) => {}
            }
        }
        restored
    }

    /// Puts the machine into the middle of a mesh that has been there for long.
    pub(crate) fn resume(&mut self, snapshot: &Arc<Snapshot>, now: Instant) {
        let now = self.clock.shows(now);
        if let Some(node) = &mut self.node {
            node.resume(snapshot, now);
        }
        self.base = Some(Arc::clone(snapshot));
        self.disk.clear();
    }

    /// Takes its power away, and with it everything that ran.
    pub(crate) fn cut_power(&mut self) {
        self.node = None;
        self.ran = std::mem::take(&mut self.running).into_keys().collect();
    }

    /// Kills its daemon alone: what runs goes on.
    pub(crate) fn kill_daemon(&mut self) {
        self.node = None;
        for container in self.running.values_mut() {
            container.watch = None;
        }
    }

    /// What it signs with, and shows.
    pub(crate) fn keys(&self) -> (&SigningKey, &Chain) {
        (&self.key, &self.chain)
    }

    /// What was written is on the disk.
    pub(crate) fn persist(&mut self, records: Vec<(RecordKey, Option<Vec<u8>>)>) {
        if self.keeps {
            self.disk.extend(records);
        }
    }

    /// Puts something on its disk.
    pub(crate) fn write(&mut self, key: RecordKey, value: Vec<u8>) {
        self.disk.insert(key, Some(value));
    }

    /// Whether it knows that a node is to be emptied.
    pub(crate) fn is_draining(&self, node: &NodeId) -> bool {
        self.node.as_ref().is_some_and(|own| own.catalog().is_draining(node))
    }

    /// Ends a container; who waited for that.
    pub(crate) fn end(&mut self, placement: &PlacementId, code: i32) -> Option<(EffectId, Outcome)> {
        let container = self.running.remove(placement)?;
        let status = ExitStatus { code, out_of_memory: false };
        if container.watch.is_none() {
            self.exited.insert(*placement, status);
        }
        container.watch.map(|watch| (watch, Outcome::Exited(status)))
    }

    pub(crate) fn give_image(&mut self, root: &ChunkId) {
        self.chunks.extend(self.pieces(root).iter().map(|piece| piece.chunk));
    }

    fn pieces(&self, root: &ChunkId) -> Vec<Piece> {
        pieces(root, self.images.get(root).copied().unwrap_or(IMAGE))
    }

    fn has_image(&self, root: &ChunkId) -> bool {
        self.pieces(root).iter().all(|piece| self.chunks.contains(&piece.chunk))
    }

    /// What this host has of `wanted`; what is missing ends the list.
    pub(crate) fn serve(&self, wanted: &[Piece]) -> (Vec<Piece>, Option<FetchFault>) {
        let here: Vec<Piece> = wanted.iter().take_while(|piece| self.chunks.contains(&piece.chunk)).copied().collect();
        let fault = wanted.get(here.len()).map(|piece| FetchFault::Missing(piece.chunk));
        (here, fault)
    }

    /// Keeps what was fetched.
    pub(crate) fn keep(&mut self, served: Option<(Vec<Piece>, Option<FetchFault>)>, elapsed: Duration) -> Fetched {
        let Some((here, fault)) = served else {
            let fault = Some(FetchFault::Unreachable("no route".to_owned()));
            return Fetched { got: Vec::new(), bytes: 0, elapsed, has: None, fault };
        };
        self.chunks.extend(here.iter().map(|piece| piece.chunk));
        let bytes = here.iter().map(|piece| u64::from(piece.len)).sum();
        Fetched { got: here.into_iter().map(|piece| piece.chunk).collect(), bytes, elapsed, has: None, fault }
    }

    /// The modelled outside, for every effect that concerns this host alone. What is not in the answer ends later.
    pub(crate) fn world(&mut self, id: EffectId, effect: Effect) -> Vec<(Duration, EffectId, Outcome)> {
        let ms = Duration::from_millis;
        match effect {
            Effect::Persist(_) => unreachable!("on the disk when it is over: the simulator does it"),
            Effect::Start { placement, spec, until } => {
                assert!(self.has_image(&spec.image.root), "a container was started without its image");
                let container = FakeContainer { until, ..FakeContainer::default() };
                match self.sabotage {
                    Some(Sabotage::RunsNothing) => {}
                    Some(Sabotage::Overbooks) => {
                        let more = PlacementId { replica: placement.replica + 1000, ..placement };
                        self.running.extend([(placement, container), (more, container)]);
                    }
                    _ => drop(self.running.insert(placement, container)),
                }
                vec![(ms(10), id, Outcome::Started(Ok(())))]
            }
            Effect::Extend { placement, until } => {
                if let Some(container) = self.running.get_mut(&placement) {
                    container.until = Some(until);
                }
                vec![(ms(1), id, Outcome::Extended)]
            }
            Effect::Adopt { placement } => {
                let adopted = match self.exited.remove(&placement) {
                    Some(status) => Adopted::Exited(status),
                    None if self.running.contains_key(&placement) => Adopted::Running,
                    None => Adopted::Gone,
                };
                vec![(ms(1), id, Outcome::Adopted(adopted))]
            }
            Effect::Watch { placement } => match (self.running.get_mut(&placement), self.exited.remove(&placement)) {
                (Some(container), _) => {
                    container.watch = Some(id);
                    Vec::new()
                }
                (None, Some(status)) => vec![(ms(1), id, Outcome::Exited(status))],
                // It never ran: a machine that runs nothing says that it does.
                (None, None) => Vec::new(),
            },
            Effect::Stop { .. } => unreachable!("takes its time: the simulator does it"),
            // One that runs is killed first, as the real one is.
            Effect::Remove { placement } => {
                if self.sabotage != Some(Sabotage::NeverStops) {
                    self.running.remove(&placement);
                }
                self.exited.remove(&placement);
                vec![(ms(1), id, Outcome::Done)]
            }
            Effect::Survey { root } => {
                let pieces = self.pieces(&root);
                let present: Vec<bool> = pieces.iter().map(|piece| self.chunks.contains(&piece.chunk)).collect();
                let complete = present.iter().all(|here| *here);
                let survey = Survey { complete, contents: true, pieces, present };
                vec![(ms(5), id, Outcome::Surveyed(Ok(survey)))]
            }
            Effect::Fetch { .. } => unreachable!("concerns two hosts: the simulator does it"),
        }
    }
}

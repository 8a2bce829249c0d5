//! One modelled machine around a real protocol node.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use moyai_protocol::codec;
use moyai_protocol::contract::{
    Command, CommandId, Effect, EffectId, Event, FetchFault, Fetched, Outcome, Piece, RecordKey, Refused, Reply, Survey,
};
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_protocol::node::{Config, Node, Restored};
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::trust::{Chain, mesh_of, node_of};
use moyai_protocol::worker::{Adopted, ExitStatus};
use moyai_protocol::workload::{PlacementId, Resources};

/// Chunks of the one image of a simulated mesh.
pub(crate) const PIECES: u32 = 32;
/// Bytes of each.
pub(crate) const PIECE: u32 = 64 * 1024;
/// What a simulated machine has.
pub(crate) const CAPACITY: Resources = Resources { cpu_milli: 4000, memory: 4 << 30 };

/// A machine that is modelled: its disk is a map, its containers are entries in another. The protocol node on it is
/// the real one.
pub struct FakeHost {
    /// The node, while the machine has power.
    pub node: Option<Node>,
    /// Containers that run on it, each with who waits for its end.
    pub running: BTreeMap<PlacementId, Option<EffectId>>,
    /// Events of its node, counted by kind by whoever looks at them.
    pub events: Vec<(Instant, Event)>,
    pub(crate) id: NodeId,
    pub(crate) life: u64,
    pub(crate) replies: BTreeMap<u64, Result<Reply, Refused>>,
    key: SigningKey,
    chain: Chain,
    root: NodeId,
    disk: BTreeMap<RecordKey, Vec<u8>>,
    chunks: BTreeSet<ChunkId>,
}

/// The image's root chunk.
pub(crate) fn image() -> ChunkId {
    ChunkId(*blake3::hash(b"image").as_bytes())
}

fn pieces() -> Vec<Piece> {
    let chunk = |at: u32| ChunkId(*blake3::hash(&at.to_be_bytes()).as_bytes());
    (0..PIECES).map(|at| Piece { chunk: chunk(at), len: PIECE }).collect()
}

impl FakeHost {
    pub(crate) fn new(at: usize, root: &SigningKey, wall: UnixMillis) -> FakeHost {
        let key = SigningKey::from_bytes(blake3::hash(&(at as u64).to_be_bytes()).as_bytes());
        let chain = Chain::root(root, node_of(&key), wall.as_secs(), 1 << 30);
        FakeHost {
            node: None,
            running: BTreeMap::new(),
            events: Vec::new(),
            id: node_of(&key),
            life: 0,
            replies: BTreeMap::new(),
            key,
            chain,
            root: node_of(root),
            disk: BTreeMap::new(),
            chunks: BTreeSet::new(),
        }
    }

    /// Gives the machine power.
    pub(crate) fn start(&mut self, at: usize, seed: u64, now: Instant, wall: UnixMillis) {
        self.life += 1;
        let mut restored = Restored::default();
        for (key, value) in &self.disk {
            match key {
                RecordKey::Fact(_) => restored.facts.push(codec::decode(value).expect("written by this code")),
                RecordKey::Member(node) => {
                    restored.members.push((*node, codec::decode(value).expect("written by this code")));
                }
            }
        }
        let config = Config {
            key: self.key.clone(),
            mesh: mesh_of(&self.root),
            chain: self.chain.clone(),
            name: format!("node-{at}"),
            version: "sim".to_owned(),
            labels: BTreeMap::new(),
            wall,
            restored,
            images: if self.has_image() { BTreeSet::from([image()]) } else { BTreeSet::new() },
            image_copies: 3,
        };
        let mut node = Node::new(config, seed.wrapping_add(self.life), now);
        for command in [
            Command::Load { capacity: CAPACITY, pressure: 0 },
            Command::Listening { addresses: vec![format!("/memory/{at}")], data: Vec::new() },
        ] {
            node.handle(now, moyai_protocol::Input::Command { id: CommandId(0), command });
        }
        self.node = Some(node);
    }

    /// Takes it away, and with it everything that ran.
    pub(crate) fn cut_power(&mut self) {
        self.node = None;
        self.running.clear();
    }

    pub(crate) fn give_image(&mut self) {
        self.chunks.extend(pieces().iter().map(|piece| piece.chunk));
    }

    fn has_image(&self) -> bool {
        pieces().iter().all(|piece| self.chunks.contains(&piece.chunk))
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
            return Fetched { got: Vec::new(), bytes: 0, elapsed, fault };
        };
        self.chunks.extend(here.iter().map(|piece| piece.chunk));
        let bytes = here.iter().map(|piece| u64::from(piece.len)).sum();
        Fetched { got: here.into_iter().map(|piece| piece.chunk).collect(), bytes, elapsed, fault }
    }

    /// The modelled outside, for every effect that concerns this host alone. `None` ends later, or never.
    pub(crate) fn world(&mut self, id: EffectId, effect: Effect) -> Vec<(Duration, EffectId, Outcome)> {
        let ms = Duration::from_millis;
        match effect {
            Effect::Persist(records) => {
                for (key, value) in records {
                    match value {
                        Some(value) => self.disk.insert(key, value),
                        None => self.disk.remove(&key),
                    };
                }
                vec![(ms(2), id, Outcome::Persisted)]
            }
            Effect::Start { placement, .. } => {
                assert!(self.has_image(), "a container was started without its image");
                self.running.insert(placement, None);
                vec![(ms(10), id, Outcome::Started(Ok(())))]
            }
            Effect::Adopt { placement } => {
                let there = self.running.contains_key(&placement);
                vec![(ms(1), id, Outcome::Adopted(if there { Adopted::Running } else { Adopted::Gone }))]
            }
            Effect::Watch { placement } => {
                self.running.insert(placement, Some(id));
                Vec::new()
            }
            Effect::Stop { placement, .. } => {
                let exited = Outcome::Exited(ExitStatus { code: 143, out_of_memory: false });
                let watch = self.running.remove(&placement).flatten();
                let ended = watch.map(|watch| (ms(20), watch, exited));
                ended.into_iter().chain([(ms(1), id, Outcome::Done)]).collect()
            }
            Effect::Remove { .. } => vec![(ms(1), id, Outcome::Done)],
            Effect::Survey { .. } => {
                let present: Vec<bool> = pieces().iter().map(|piece| self.chunks.contains(&piece.chunk)).collect();
                let complete = present.iter().all(|here| *here);
                let survey = Survey { complete, contents: true, pieces: pieces(), present };
                vec![(ms(5), id, Outcome::Surveyed(Ok(survey)))]
            }
            Effect::Fetch { .. } => unreachable!("concerns two hosts: the simulator does it"),
        }
    }
}

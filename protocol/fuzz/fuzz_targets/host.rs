//! The world around the node under test: a disk, containers and chunks that are modelled, as a driver would report them.
//! What becomes of an effect is the input's choice among what a truthful driver may say; where the input ends, all goes
//! well.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use moyai_protocol::codec::{self, MESSAGE_LIMIT};
use moyai_protocol::contract::{
    Command, CommandId, Completion, Effect, EffectId, Event, FetchFault, Fetched, Input, Outcome, Output, Piece,
    RecordKey, Reply, Survey, SurveyFault,
};
use moyai_protocol::id::{ChunkId, NodeId, WorkloadId};
use moyai_protocol::message::Message;
use moyai_protocol::node::{Config, Node, Restored};
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::trust::{Membership, Role};
use moyai_protocol::worker::{Adopted, ExitStatus, StartError};
use moyai_protocol::workload::PlacementId;

use crate::{CAPACITY, IMAGES, ME, NOW, image, members, mesh, report, workload};

/// Chunks of an image.
const PIECES: u8 = 6;
/// The node's clock at the beginning.
const START: Instant = Instant::from_nanos(1_000_000_000_000);
/// Messages that are kept to be answered; the latest.
const HEARD: usize = 48;
/// Members of a mesh that is no small one.
const CROWD: u8 = 20;
/// Timers that one moment may set off one after the other.
const AT_ONCE: usize = 32;

/// What is to be written down; `None` deletes.
type Records = Vec<(RecordKey, Option<Vec<u8>>)>;

/// A machine with a node on it.
pub struct Host {
    /// The node.
    pub node: Node,
    /// Its clock.
    pub now: Instant,
    /// What it has sent, and to whom.
    pub heard: VecDeque<(NodeId, Message)>,
    /// Workloads that messages are about.
    pub workloads: Vec<WorkloadId>,
    /// Members that are none any more: the driver lets them in no more.
    revoked: BTreeSet<NodeId>,
    life: u64,
    disk: BTreeMap<RecordKey, Vec<u8>>,
    /// Records that are being written, in the order in which they were asked for.
    writes: VecDeque<(EffectId, Records)>,
    effects: BTreeMap<EffectId, Effect>,
    running: BTreeSet<PlacementId>,
    exited: BTreeMap<PlacementId, ExitStatus>,
    chunks: BTreeSet<ChunkId>,
}

/// What an image is made of, here.
pub fn pieces(root: &ChunkId) -> Vec<Piece> {
    let chunk = |at: u8| {
        let mut id = root.0;
        id[31] ^= at;
        ChunkId(id)
    };
    (1..=PIECES).map(|at| Piece { chunk: chunk(at), len: 300_000 }).collect()
}

impl Host {
    /// A node that has just started, with an image, and has met nobody.
    pub fn start() -> Host {
        let (now, disk) = (START, BTreeMap::new());
        let mut host = Host {
            node: node(&disk, BTreeSet::from([image(ME as u8)]), 1, now),
            now,
            heard: VecDeque::new(),
            workloads: (0..6).map(workload).collect(),
            revoked: BTreeSet::new(),
            life: 1,
            disk,
            writes: VecDeque::new(),
            effects: BTreeMap::new(),
            running: BTreeSet::new(),
            exited: BTreeMap::new(),
            chunks: pieces(&image(ME as u8)).iter().map(|piece| piece.chunk).collect(),
        };
        host.begin();
        host
    }

    fn begin(&mut self) {
        self.drain();
        self.command(Command::Load { capacity: CAPACITY, pressure: 0 });
        self.command(Command::Listening { addresses: vec!["/memory/0".to_owned()], data: Vec::new() });
        for at in 0..IMAGES {
            self.load(image(at));
        }
    }

    /// The wall clock as it should be.
    pub fn wall(&self) -> UnixMillis {
        NOW.after(self.now.since(START))
    }

    /// A command of the user, or of the driver.
    pub fn command(&mut self, command: Command) {
        self.node.handle(self.now, Input::Command { id: CommandId(1), command });
        self.drain();
    }

    /// A connection to a member was admitted, if it may be.
    pub fn admit(&mut self, at: usize) {
        let member = &members()[at];
        if !self.revoked.contains(&member.id) {
            let role = member.chain.leaf().map_or(Role::Worker, |leaf| leaf.role);
            let membership = Membership { node: member.id, role, not_after: u64::MAX };
            self.command(Command::Admitted { membership, address: Some(format!("/memory/{at}")) });
        }
    }

    /// So many others are met that the node passes on and asks as in a large mesh. They say nothing.
    pub fn crowd(&mut self) {
        for at in 1..=CROWD {
            let membership = Membership { node: NodeId([at; 32]), role: Role::Worker, not_after: u64::MAX };
            self.command(Command::Admitted { membership, address: None });
        }
    }

    /// An image is loaded, if the machine has it.
    pub fn load(&mut self, root: ChunkId) {
        if self.has_image(&root) {
            let held = report(ME).images.into_iter().next().expect("it has one");
            self.command(Command::ImageAdded(moyai_protocol::catalog::ImageHeld { root, ..held }));
        }
    }

    /// A message came.
    pub fn message(&mut self, from: usize, bytes: Vec<u8>) {
        self.node.handle(self.now, Input::Message { from: members()[from].id, bytes });
        self.drain();
    }

    /// Time passes, and what is due by then is done late.
    pub fn sleep(&mut self, time: Duration) {
        self.now = self.now + time;
        self.timers();
    }

    /// Time passes until something is due, and that is done.
    pub fn wait(&mut self) {
        if let Some(due) = self.node.poll_timeout() {
            self.now = self.now.max(due);
            self.timers();
        }
    }

    fn timers(&mut self) {
        for _ in 0..AT_ONCE {
            self.node.handle_timeout(self.now);
            self.drain();
            if self.node.poll_timeout().is_none_or(|due| due > self.now) {
                return;
            }
        }
        panic!("a timer that is due stays due: the daemon would never rest");
    }

    /// Everything that was asked for ends well, but for containers, which run on.
    pub fn work(&mut self) -> Result<()> {
        for _ in 0..AT_ONCE {
            let waits = |(_, effect): &(&EffectId, &Effect)| !matches!(effect, Effect::Watch { .. });
            let next = self.effects.iter().find(waits).map(|(id, _)| *id);
            let Some(id) = self.writes.front().map(|(id, _)| *id).or(next) else { break };
            self.end(id, &mut Unstructured::new(&[]))?;
        }
        Ok(())
    }

    /// One of the effects under way ends, in some way.
    pub fn complete(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // Records are written in order, all else ends in any.
        let first = self.writes.front().map(|(id, _)| *id);
        let ids: Vec<EffectId> = first.into_iter().chain(self.effects.keys().copied()).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let at = u.choose_index(ids.len())?;
        self.end(ids[at], u)
    }

    fn end(&mut self, id: EffectId, u: &mut Unstructured<'_>) -> Result<()> {
        let outcome = if self.writes.front().is_some_and(|(first, _)| *first == id) {
            let (_, records) = self.writes.pop_front().expect("there is one");
            self.write(records);
            Outcome::Persisted
        } else {
            let Some(effect) = self.effects.remove(&id) else { return Ok(()) };
            self.world(effect, u)?
        };
        self.node.handle(self.now, Input::Completion(Completion { id, outcome }));
        self.drain();
        Ok(())
    }

    fn write(&mut self, records: Records) {
        for (key, value) in records {
            match value {
                Some(value) => drop(self.disk.insert(key, value)),
                None => drop(self.disk.remove(&key)),
            }
        }
    }

    fn world(&mut self, effect: Effect, u: &mut Unstructured<'_>) -> Result<Outcome> {
        let luck = u.int_in_range(0..=7)?;
        Ok(match effect {
            Effect::Persist(_) => unreachable!("is among the writes"),
            Effect::Start { placement, .. } => Outcome::Started(match luck {
                6 => Err(StartError::Workload { code: 127, reason: "no such command".to_owned() }),
                7 => Err(StartError::Node("no space".to_owned())),
                _ => {
                    self.running.insert(placement);
                    Ok(())
                }
            }),
            Effect::Extend { .. } => Outcome::Extended,
            Effect::Adopt { placement } => Outcome::Adopted(match self.exited.remove(&placement) {
                Some(status) => Adopted::Exited(status),
                None if self.running.contains(&placement) => Adopted::Running,
                None => Adopted::Gone,
            }),
            Effect::Watch { placement } => {
                let alone = self.running.remove(&placement).then_some(luck % 4);
                let code = alone.unwrap_or(137);
                let status = self.exited.remove(&placement).unwrap_or(ExitStatus { code, out_of_memory: luck == 3 });
                Outcome::Exited(status)
            }
            Effect::Stop { placement, .. } => {
                if self.running.remove(&placement) {
                    self.exited.insert(placement, ExitStatus { code: 143, out_of_memory: false });
                }
                Outcome::Asked
            }
            Effect::Remove { placement } => {
                self.running.remove(&placement);
                self.exited.remove(&placement);
                Outcome::Done
            }
            Effect::Survey { root } => Outcome::Surveyed(if luck == 7 {
                Err(SurveyFault { damaged: u.arbitrary()?, reason: "the store cannot be read".to_owned() })
            } else {
                let pieces = pieces(&root);
                let present: Vec<bool> = pieces.iter().map(|piece| self.chunks.contains(&piece.chunk)).collect();
                let complete = present.iter().all(|here| *here);
                // The lists come before the contents, now and then.
                Ok(Survey { complete, contents: luck < 6, pieces, present })
            }),
            Effect::Fetch { pieces, .. } => {
                let count = pieces.len();
                let came = if luck < 4 { count } else { u.int_in_range(0..=count)? };
                let missing = pieces.get(came).or(pieces.first()).map(|piece| piece.chunk);
                let fault = match (luck, missing) {
                    (4, Some(chunk)) => Some(FetchFault::Missing(chunk)),
                    (5, Some(chunk)) => Some(FetchFault::WrongChunk(chunk)),
                    (6, _) => Some(FetchFault::Unreachable("no route".to_owned())),
                    (7, _) => Some(FetchFault::Storage("no space".to_owned())),
                    _ => None,
                };
                let got: Vec<ChunkId> = pieces[..came].iter().map(|piece| piece.chunk).collect();
                let bytes = pieces[..came].iter().map(|piece| u64::from(piece.len)).sum();
                self.chunks.extend(&got);
                let has = if luck == 3 { Some(vec![u.arbitrary()?; 4]) } else { None };
                Outcome::Fetched(Fetched { got, bytes, elapsed: Duration::from_millis(10), has, fault })
            }
        })
    }

    /// The daemon dies and starts again; with `power`, the machine does. Some of what was being written is on the disk.
    pub fn restart(&mut self, power: bool, written: usize) {
        for _ in 0..written {
            let Some((_, records)) = self.writes.pop_front() else { break };
            self.write(records);
        }
        self.writes.clear();
        self.effects.clear();
        self.heard.clear();
        if power {
            self.running.clear();
        }
        self.life += 1;
        let images = (0..IMAGES).map(image).filter(|root| self.has_image(root)).collect();
        self.node = node(&self.disk, images, self.life, self.now);
        self.begin();
    }

    fn has_image(&self, root: &ChunkId) -> bool {
        pieces(root).iter().all(|piece| self.chunks.contains(&piece.chunk))
    }

    /// Takes what the node wants, and checks what must hold of it after every step.
    fn drain(&mut self) {
        self.node.invariants();
        while let Some(output) = self.node.poll_output() {
            match output {
                Output::Transmit { to, bytes } => {
                    assert_ne!(to, members()[ME].id, "messages to oneself stay inside");
                    assert!(bytes.len() <= MESSAGE_LIMIT, "a message of {} bytes", bytes.len());
                    let message = codec::decode_message(&bytes).expect("others read what this node sends");
                    self.heard.push_back((to, message));
                    if self.heard.len() > HEARD {
                        self.heard.pop_front();
                    }
                }
                Output::Effect { id, effect: Effect::Persist(records) } => self.writes.push_back((id, records)),
                Output::Effect { id, effect } => {
                    if let Effect::Start { placement, spec, .. } = &effect {
                        // What is lazy is started when the image's lists are here.
                        let ready = spec.lazy || self.has_image(&spec.image.root);
                        assert!(ready, "a container is started without its image");
                        assert!(!self.running.contains(placement), "a container is started twice");
                    }
                    let before = self.effects.insert(id, effect);
                    assert!(before.is_none(), "one id for two effects");
                }
                Output::Event(Event::Reply { result: Ok(Reply::Submitted(workload)), .. }) => {
                    self.workloads.push(workload);
                }
                Output::Event(Event::Revoked { node }) => drop(self.revoked.insert(node)),
                Output::Event(_) | Output::Cancel(_) => {}
            }
        }
    }
}

/// A node that begins, or begins again with what is on its disk.
fn node(disk: &BTreeMap<RecordKey, Vec<u8>>, images: BTreeSet<ChunkId>, life: u64, now: Instant) -> Node {
    let own = "this node reads what it wrote";
    let mut restored = Restored::default();
    for (key, value) in disk {
        match key {
            RecordKey::Fact(_) => restored.facts.push(codec::decode(value).expect(own)),
            RecordKey::Member(node) => restored.members.push((*node, codec::decode(value).expect(own))),
            RecordKey::Seat(workload) => restored.seats.push((*workload, codec::decode(value).expect(own))),
        }
    }
    let me = &members()[ME];
    let config = Config {
        key: me.key.clone(),
        mesh: mesh(),
        chain: me.chain.clone(),
        name: "n0".to_owned(),
        version: "fuzz".to_owned(),
        offers: Default::default(),
        labels: BTreeMap::from([("number".to_owned(), "0".to_owned())]),
        wall: NOW.after(now.since(START)),
        restored,
        images,
        image_copies: 2,
        memo: None,
    };
    Node::new(config, life, now)
}

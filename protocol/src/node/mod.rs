//! One node of a mesh: the machines composed behind the driver contract.
//!
//! Each input is given to the machine it concerns; what the machines then want of one another is carried out until
//! nothing is left ([`Node::settle`]), and what they want of the world is in the output queue. A message from a node to
//! itself never leaves: it is handled in the same step.

mod facts;
mod gossip;
mod leases;
mod orders;
mod placing;
mod renewal;
mod settle;
#[cfg(test)]
pub(crate) mod tests;

pub use facts::taken_back;
pub use renewal::{ADMIN_LIFE, CERTIFICATE_LIFE, certificate_life};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use fastrand::Rng;

use crate::auction::{self, Auctioneer};
use crate::catalog::{self, Catalog, Clock, Entry, Fact, ImageHeld, Key, NodeFact, Said};
use crate::codec;
use crate::confinement::Offers;
use crate::contract::{Command, CommandId, Effect, EffectId, Event, Input, Output, RecordKey, Refused, Reply};
use crate::custody::Custody;
use crate::exchange::{self, Bitfield, Exchange, MAX_PIECES};
use crate::id::{ChunkId, MeshId, NodeId, Signature, WorkloadId};
use crate::lease::{Custodian, Holder, SeatRecord};
use crate::membership::{self, Change, Membership, State, jitter};
use crate::memo::Memo;
use crate::message::Message;
use crate::reconcile;
use crate::reference::Reference;
use crate::time::{Instant, UnixMillis};
use crate::trust::{Chain, Role, node_of};
use crate::turns::{Turn, Turns, steward};
use crate::worker::Worker;
use crate::workload::PlacementId;
use gossip::Gossip;
use settle::Unwritten;

/// After a start, and after the process was frozen, custody waits so long for the others to be heard: a node that has
/// just begun to listen would think everybody dead and run everything itself.
pub const WARM_UP: Duration = Duration::from_secs(6);
/// Nodes that are asked how far they are with one image.
const MAX_PARTS: usize = 256;
/// Images that are asked about at one time.
const MAX_ASKED_PARTS: usize = 4;
/// Each holder of an image may give it up for so long, one after the other; the last third is for the others to hear of it.
const SLOT: Duration = Duration::from_secs(30);
/// Images that were given up for want of room, and are not copied here again by the mesh's own wish.
const MAX_GIVEN_UP: usize = 1024;
/// A process that did nothing for this long was stopped or starved, and its timers say nothing about others.
const FROZEN: Duration = Duration::from_secs(5);
/// Between two looks at this node's own certificate.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(30);
/// Between two looks at how many copies of each image there are, when nothing seems to have changed.
const SPREAD: Duration = Duration::from_secs(60);
/// Whose copy of an image has not begun after so long is passed over: it has no room, or cannot get it.
const PASSED_OVER: Duration = Duration::from_secs(90);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Between two looks for tombstones to forget.
const EXPIRY: Duration = Duration::from_secs(3600);
/// The most bytes of facts in one message.
const FACTS_BYTES: usize = 256 * 1024;
/// The most messages of them in one answer; what is left over is found by the next reconciliation.
const FACTS_MESSAGES: usize = 8;

/// What a node begins with.
#[derive(Debug)]
pub struct Config {
    /// Its identity.
    pub key: SigningKey,
    /// Its mesh.
    pub mesh: MeshId,
    /// Its certificates.
    pub chain: Chain,
    /// What people call it.
    pub name: String,
    /// Release of its software.
    pub version: String,
    /// What constraints are matched against.
    pub labels: BTreeMap<String, String>,
    /// What its machine gives to containers besides processors and memory.
    pub offers: Offers,
    /// The wall clock at `now`.
    pub wall: UnixMillis,
    /// What an earlier life wrote down.
    pub restored: Restored,
    /// Images that are complete here.
    pub images: BTreeSet<ChunkId>,
    /// On how many nodes an image is kept, when there are as many.
    pub image_copies: usize,
    /// What nodes of one simulated mesh have checked; none in a daemon.
    pub memo: Option<Arc<Memo>>,
}

/// What an earlier life wrote down by [`Effect::Persist`].
#[derive(Debug, Default)]
pub struct Restored {
    /// Facts of the catalog.
    pub facts: Vec<Fact>,
    /// Members, and where they were seen last.
    pub members: Vec<(NodeId, Vec<String>)>,
    /// What it promised and voted for as custodian of singletons.
    pub seats: Vec<(WorkloadId, SeatRecord)>,
    /// Images, and what they were made of, that were found damaged and are to be fetched again.
    pub damaged: BTreeSet<ChunkId>,
}

/// What a mesh believes at some moment: simulated nodes begin from it, as if they had been there for long.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Everybody, and what is believed of each.
    pub members: Vec<(Arc<membership::Word>, State)>,
    /// Everything known.
    pub facts: Vec<Arc<Entry>>,
}

/// Whose effect it is.
#[derive(Debug)]
enum Owner {
    Placement(PlacementId),
    Survey(ChunkId),
    Batch(ChunkId, u64),
    Persist(Unwritten),
}

/// Messages that were not taken, by reason; never fatal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Not decoded: malformed, oversized, or of a newer release.
    pub undecoded: u64,
    /// Facts not believed.
    pub facts: u64,
    /// Messages of nodes whose certificates are revoked.
    pub revoked: u64,
}

/// One node of a mesh.
#[derive(Debug)]
pub struct Node {
    me: NodeId,
    key: SigningKey,
    mesh: MeshId,
    chain: Chain,
    name: String,
    version: String,
    labels: BTreeMap<String, String>,
    data: Vec<String>,
    image_copies: usize,
    images: Vec<ImageHeld>,
    /// Names that were taken back here.
    unnamed: Vec<(Reference, catalog::Hlc)>,
    /// What it had, when it began, it also had names for.
    names_known: bool,
    /// What was found damaged here and is fetched again: it keeps its names meanwhile.
    damaged: BTreeSet<ChunkId>,
    /// Its word for `chain`.
    vouch: Signature,
    memo: Option<Arc<Memo>>,

    rng: Rng,
    wall: (Instant, UnixMillis),
    clock: Clock,
    last_active: Instant,
    custody_from: Instant,
    next_reconcile: Instant,
    next_certificate_check: Instant,
    next_expiry: Instant,
    next_spread: Instant,
    next_tend: Instant,
    /// Some node got or lost an image, or went: it may be on too few.
    images_moved: bool,
    /// Images that were on too few nodes at the last look, and since when.
    short: BTreeMap<ChunkId, Instant>,
    /// No copy of an image is taken that nothing here asks for.
    store_full: bool,
    /// Images that were given up for want of room.
    given_up: BTreeSet<ChunkId>,
    /// Images whose parts somebody asked about lately, and what each node that is getting one said.
    parts: VecDeque<(ChunkId, BTreeMap<NodeId, Option<u32>>)>,
    turns: Turns,

    membership: Membership,
    catalog: Catalog,
    auctioneer: Auctioneer,
    worker: Worker,
    custody: Custody,
    custodian: Custodian,
    holder: Holder,
    exchange: Exchange,
    dropped: Dropped,

    outputs: VecDeque<Output>,
    /// Messages the machines want sent, before those to this node itself are taken out.
    sends: Vec<(NodeId, Message)>,
    gossip: Gossip,
    records: BTreeMap<RecordKey, Option<Vec<u8>>>,
    /// What waits until `records` is written down.
    unwritten: Unwritten,
    /// Writes that have not been reported done.
    writes: usize,
    next_effect: u64,
    effects: BTreeMap<EffectId, Owner>,
}

impl Node {
    /// A node that begins, or begins again. All its randomness comes from `seed`.
    pub fn new(config: Config, seed: u64, now: Instant) -> Self {
        let me = node_of(&config.key);
        let mut node = Node {
            me,
            mesh: config.mesh,
            vouch: catalog::vouch(&config.key, &config.chain),
            chain: config.chain,
            name: config.name,
            version: config.version,
            labels: config.labels.clone(),
            data: Vec::new(),
            image_copies: config.image_copies,
            images: Vec::new(),
            unnamed: Vec::new(),
            names_known: true,
            damaged: BTreeSet::new(),
            memo: config.memo.clone(),
            rng: Rng::with_seed(seed),
            wall: (now, config.wall),
            clock: Clock::default(),
            last_active: now,
            custody_from: now + WARM_UP,
            next_reconcile: now + catalog::RECONCILE,
            next_certificate_check: now,
            next_expiry: now + EXPIRY,
            next_spread: now,
            next_tend: now + leases::TEND,
            images_moved: true,
            short: BTreeMap::new(),
            store_full: false,
            given_up: BTreeSet::new(),
            parts: VecDeque::new(),
            turns: Turns::default(),
            membership: Membership::new(config.key.clone(), config.wall.0, now),
            catalog: Catalog::new(config.mesh, config.memo),
            auctioneer: Auctioneer::default(),
            worker: Worker::new(config.labels, config.offers),
            custody: Custody::default(),
            custodian: Custodian::new(me, now),
            holder: Holder::new(seed >> 1),
            exchange: Exchange::new(me),
            dropped: Dropped::default(),
            outputs: VecDeque::new(),
            sends: Vec::new(),
            gossip: Gossip::new(now),
            records: BTreeMap::new(),
            unwritten: Unwritten::default(),
            writes: 0,
            next_effect: 0,
            effects: BTreeMap::new(),
            key: config.key,
        };
        node.restore(config.restored, &config.images, now);
        node.settle(now);
        node
    }

    /// Takes up what the others believe, at once and without a word: for simulated meshes that begin in step.
    pub fn resume(&mut self, snapshot: &Snapshot, now: Instant) {
        self.membership.resume(&snapshot.members, now);
        self.catalog.resume(&snapshot.facts);
        self.custody_from = now;
        self.custodian.resume(now);
        (self.images_moved, self.next_spread) = (false, now + jitter(SPREAD, &mut self.rng));
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.thaw(now);
        match input {
            Input::Message { from, .. } if self.is_cast_out(&from) => self.dropped.revoked += 1,
            Input::Message { from, bytes } => match codec::decode_message::<Message>(&bytes) {
                Ok(message) => self.receive(from, message, now),
                Err(error) => {
                    self.dropped.undecoded += 1;
                    self.tell(Event::Dropped { from, reason: error.to_string() });
                }
            },
            Input::Command { id, command } => self.command(id, command, now),
            Input::Completion(completion) => self.complete(completion, now),
        }
        self.settle(now);
    }

    /// The time that [`Node::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.thaw(now);
        self.with_membership(now, |membership, cx| membership.handle_timeout(cx));
        self.with_auctioneer(now, |auctioneer, cx| auctioneer.handle_timeout(cx));
        self.worker.handle_timeout(now);
        self.exchange.handle_timeout(now, &mut self.rng);
        self.custody.handle_timeout(now);
        self.sends.extend(self.holder.handle_timeout(now));
        if now >= self.next_tend {
            self.next_tend = now + jitter(leases::TEND, &mut self.rng);
            self.tend_seats(now);
            if self.holder.waits() {
                self.settle_all(now, |_| true);
            }
        }
        if now >= self.next_reconcile {
            self.next_reconcile = now + jitter(catalog::RECONCILE, &mut self.rng);
            for to in self.membership.sample(1, &mut self.rng, |member| member.state.is_live()) {
                self.reconcile_with(to);
            }
            if std::mem::take(&mut self.images_moved) || now >= self.next_spread {
                self.next_spread = now + jitter(SPREAD, &mut self.rng);
                self.forget_unnamed(now);
                self.spread_images(now);
            }
        }
        if now >= self.next_certificate_check {
            self.next_certificate_check = now + CERTIFICATE_CHECK;
            self.renew_certificate(now);
        }
        if now >= self.next_expiry {
            self.next_expiry = now + EXPIRY;
            let (membership, wall) = (&self.membership, self.wall_at(now));
            for key in self.catalog.expire(wall, |node| membership.is_live(node)) {
                self.records.insert(RecordKey::Fact(key), None);
            }
            self.end_orphans(now);
            // Said again each day, so that a catalog with nothing newer is one that was out of touch.
            let stamp = self.catalog.get(&Key::Node(self.me)).map_or(0, |entry| entry.fact.version.time().0);
            if wall.0.saturating_sub(stamp) > DAY.as_millis() as u64 {
                self.publish_node_again(now);
            }
        }
        self.settle(now);
    }

    /// What is to be done next; asked until there is nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Node::handle_timeout`] is to be called, at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let regular =
            [self.next_reconcile, self.next_certificate_check, self.next_expiry, self.membership.poll_timeout()];
        let warm = (self.last_active < self.custody_from).then_some(self.custody_from);
        let machines = [
            self.auctioneer.poll_timeout(),
            self.worker.poll_timeout(),
            self.exchange.poll_timeout(),
            self.custody.poll_timeout(),
            self.holder.poll_timeout(),
            self.gossip.poll_timeout(),
            (self.custodian.seated().next().is_some() || self.holder.waits()).then_some(self.next_tend),
            warm,
        ];
        regular.into_iter().chain(machines.into_iter().flatten()).min()
    }

    /// Who this is.
    pub fn id(&self) -> NodeId {
        self.me
    }

    /// The members, as this node sees them.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// What this node knows.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What this node runs.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// What is on its way here.
    pub fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    /// This node's certificates.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Roots of images and of what they were made of, that something here still needs: a name, a workload, a download. `None` when
    /// that is not known, because the names of what was here were lost.
    pub fn wanted_images(&self) -> Option<BTreeSet<ChunkId>> {
        if !self.names_known {
            return None;
        }
        let named = self.images.iter().flat_map(|image| {
            [Some(image.root), image.original.as_ref().map(|original| original.root)].into_iter().flatten()
        });
        Some(named.chain(self.worker.images()).chain(self.exchange.wanted()).collect())
    }

    /// How many chunks of an image's contents are on the nodes that are getting it, this one among them: as they said last.
    pub fn parts(&self, root: &ChunkId) -> BTreeMap<NodeId, u32> {
        let said = self.parts.iter().filter(|(asked, _)| asked == root).flat_map(|(_, parts)| parts);
        let said = said.filter_map(|(node, count)| Some((*node, (*count)?)));
        said.chain(self.exchange.bitfield(root).map(|bits| (self.me, bits.count()))).collect()
    }

    /// Whose turn it is to fetch this from outside of the mesh, once that is known.
    pub fn turn(&self, reference: &Reference) -> Option<Turn> {
        let turn = self.turns.answer(reference)?;
        let is_nobody = |node: NodeId| node == self.me || !self.membership.is_live(&node);
        Some(if matches!(turn, Turn::Theirs(node) if is_nobody(node)) { Turn::Yours } else { turn })
    }

    fn steward(&self, reference: &Reference) -> NodeId {
        steward(reference, self.membership.live().chain([self.me])).unwrap_or(self.me)
    }

    /// What is here of images that nothing here runs or fetches, and that enough other nodes have: what was named longest ago comes
    /// first. Each is an image with what it was made of, as far as that may go: most of their bytes are the same, so that an image
    /// alone is not worth its loss; what it was made of may go without it. Whoever has any of one may give it up in its own time
    /// alone, [`SLOT`] by [`SLOT`] in the order of rendezvous hash: when the next one's comes, it has heard of it.
    pub fn spare_images(&self, now: Instant) -> Vec<BTreeSet<ChunkId>> {
        let used: BTreeSet<ChunkId> = self.worker.images().chain(self.exchange.wanted()).collect();
        let others = self.catalog.nodes().filter(|(node, _)| *node != self.me && self.membership.is_live(node));
        let others = others.flat_map(|(node, fact)| fact.images.iter().map(move |image| (node, image)));
        let known: Vec<(NodeId, &ImageHeld)> = others.chain(self.images.iter().map(|image| (self.me, image))).collect();
        let made_into = facts::made_into(known.iter().map(|(_, image)| *image));
        let whole = |root: ChunkId| made_into.get(&root).copied().unwrap_or(root);

        let mut holders: BTreeMap<ChunkId, BTreeSet<NodeId>> = BTreeMap::new();
        let mut of_any: BTreeMap<ChunkId, BTreeSet<NodeId>> = BTreeMap::new();
        for (node, image) in &known {
            for root in image.held() {
                holders.entry(root).or_default().insert(*node);
                of_any.entry(whole(root)).or_default().insert(*node);
            }
        }
        let mut here: BTreeMap<ChunkId, (catalog::Hlc, BTreeSet<ChunkId>)> = BTreeMap::new();
        for image in &self.images {
            for root in image.held() {
                let (last, parts) = here.entry(whole(root)).or_default();
                *last = image.named.max(*last);
                parts.insert(root);
            }
        }
        let enough = self.image_copies.saturating_sub(1).max(1);
        let wall = u128::from(self.wall_at(now).0);
        let early = wall % SLOT.as_millis() < SLOT.as_millis() * 2 / 3;
        let is_turn = |image: &ChunkId| {
            let mut holders: Vec<&NodeId> = of_any[image].iter().collect();
            holders.sort_by_key(|node| facts::copy_rank(image, node));
            early && *holders[(wall / SLOT.as_millis()) as usize % holders.len()] == self.me
        };
        let mut spare: Vec<(catalog::Hlc, BTreeSet<ChunkId>)> = Vec::new();
        for (image, (last, parts)) in here {
            let may_go = |root: &ChunkId| !used.contains(root) && holders[root].len() > enough;
            let mut going: BTreeSet<ChunkId> = parts.iter().copied().filter(may_go).collect();
            if going.len() < parts.len() {
                going.remove(&image);
            }
            if !going.is_empty() && is_turn(&image) {
                spare.push((last, going));
            }
        }
        spare.sort_unstable();
        spare.into_iter().map(|(_, roots)| roots).collect()
    }

    /// Images that are here, and what they were made of, by every name.
    pub fn images(&self) -> &[ImageHeld] {
        &self.images
    }

    /// What was not taken, counted.
    pub fn dropped(&self) -> &Dropped {
        &self.dropped
    }

    /// The wall clock at `now`.
    pub fn wall_at(&self, now: Instant) -> UnixMillis {
        self.wall.1.after(now.since(self.wall.0))
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        self.membership.invariants();
        self.catalog.invariants();
        self.auctioneer.invariants();
        self.worker.invariants();
        self.exchange.invariants();
        self.custodian.invariants();
        self.turns.invariants();
        assert!(self.damaged.len() <= facts::MAX_DAMAGED);
        assert!(self.sends.is_empty() && self.records.is_empty(), "a step is whole");
    }

    /// What this node would do with its own old state. Members count as down until they answer.
    fn restore(&mut self, restored: Restored, images: &BTreeSet<ChunkId>, now: Instant) {
        let wall = self.wall_at(now);
        for (node, addresses) in restored.members {
            self.membership.restore(node, addresses, now);
        }
        for (workload, record) in restored.seats {
            self.custodian.restore(workload, record);
        }
        let newest = restored.facts.iter().map(|fact| fact.version).max().unwrap_or_default();
        // Away for longer than a tombstone lives: what was deleted meanwhile would come back with these.
        let stale = wall.0.saturating_sub(newest.time().0) > catalog::TOMBSTONE.as_millis() as u64;
        let mut facts = restored.facts;
        facts.sort_by_key(|fact| facts::order(&fact.key));
        for fact in facts {
            let own = fact.key.owner() == Some(self.me) || matches!(fact.key, Key::Revoked(_));
            if stale && !own {
                self.records.insert(RecordKey::Fact(fact.key), None);
                continue;
            }
            self.clock.observe(fact.version);
            // Judged by their own time, not by today's: facts do not expire with their author's certificate, and a clock
            // that is behind what was written down is no reason to forget it.
            let (key, at) = (fact.key, fact.version.time());
            if self.catalog.offer(Arc::new(fact), at).is_err() {
                self.dropped.facts += 1;
                self.records.insert(RecordKey::Fact(key), None);
            }
        }
        let has_none = images.is_empty() && restored.damaged.is_empty();
        self.names_known = has_none || self.catalog.node(&self.me).is_some();
        self.damaged = restored.damaged.into_iter().take(facts::MAX_DAMAGED).collect();
        if let Some(own) = self.catalog.node(&self.me) {
            self.images = own.images.clone();
            self.unnamed = own.unnamed.clone();
            for image in &mut self.images {
                image.here &= images.contains(&image.root);
                if let Some(original) = &mut image.original {
                    original.here &= images.contains(&original.root);
                }
            }
            self.forget_nameless();
        }
        self.worker.hold_starts(self.custody_from);
        self.worker.set_draining(self.catalog.is_draining(&self.me));
        if !self.catalog.revoked().is_empty() {
            self.carry_out_revocations(now);
        }
        let seated: Vec<_> = self.catalog.workloads().map(|known| known.spec.id).collect();
        for workload in seated {
            self.learn_seats(workload, now);
        }
        let removed: Vec<_> = self.custodian.seated().map(|(workload, _)| workload).collect();
        for workload in removed.into_iter().filter(|workload| self.catalog.workload(workload).is_none()) {
            self.custodian.forget(&workload, now);
        }
        self.keep_seats(now);
        self.take_up_placements(now);
        for workload in self.worker.placements().map(|((workload, _), _)| *workload).collect::<BTreeSet<_>>() {
            self.check_wanted(workload, now);
        }
        let workloads: Vec<_> = self.catalog.workloads().map(|workload| workload.spec.id).collect();
        for workload in workloads {
            self.custody.touch(workload);
        }
        self.publish_node(now);
    }

    /// A process that was stopped and woken knows nothing of the time between.
    fn thaw(&mut self, now: Instant) {
        if now.since(self.last_active) > FROZEN {
            self.custody_from = now + WARM_UP;
            self.membership.thaw(now);
        }
        self.last_active = now;
    }

    fn receive(&mut self, from: NodeId, message: Message, now: Instant) {
        match message {
            Message::Ping { .. }
            | Message::Ack { .. }
            | Message::PingReq { .. }
            | Message::Nack { .. }
            | Message::MembersPush { .. }
            | Message::MembersReconcile { .. }
            | Message::MembersWant { .. }
            | Message::Leave { .. } => self.with_membership(now, |membership, cx| membership.handle(from, message, cx)),

            Message::Facts { mut facts } => {
                facts.sort_by_key(|fact| facts::order(&fact.key));
                for fact in facts {
                    self.learn(from, fact, now);
                }
            }
            Message::Reconcile { ranges } => {
                let found = reconcile::compare(self.catalog.index(), ranges);
                self.send_facts(from, &found.offer);
                if !found.want.is_empty() {
                    let mut keys = found.want;
                    self.rng.shuffle(&mut keys);
                    keys.truncate(4096);
                    self.sends.push((from, Message::Want { keys }));
                }
                if !found.ranges.is_empty() {
                    self.sends.push((from, Message::Reconcile { ranges: found.ranges }));
                }
            }
            Message::Want { keys } => self.send_facts(from, &keys),
            Message::Have { items } => self.told_of(from, items, now),
            Message::ClockOff { ahead } => {
                self.mend_clock(now);
                self.tell(Event::ClockOff { by: from, ahead });
            }

            Message::Announcement { auction, workload, replicas, in_place } => {
                self.announced(from, auction, workload, (replicas, in_place), now);
            }
            Message::Hold { auction, workload, replicas } => {
                self.asked_to_hold(from, auction, workload, replicas, now);
            }
            Message::Unhold { auction } => self.worker.unhold(from, auction),
            Message::Award { placement, workload, award } => self.awarded(from, placement, workload, award, now),
            Message::AwardQuery { placement, at } => {
                let refusal = self.worker.query(from, placement, at).err();
                self.sends.push((from, Message::Verdict { placement, refusal }));
            }
            Message::Bid { .. } | Message::Refusal { .. } | Message::Held { .. } | Message::Verdict { .. } => {
                self.with_auctioneer(now, |auctioneer, cx| auctioneer.handle(from, message, cx));
            }

            Message::BitfieldRequest { root, bits } => {
                if let Some(bits) = bits {
                    self.exchange.bitfield_from(from, &root, &bits, false, now, &mut self.rng);
                }
                let complete = self.has_image(&root);
                let bits = self.exchange.bitfield(&root).map(Bitfield::to_bytes).unwrap_or_default();
                self.sends.push((from, Message::Bitfield { root, bits, complete }));
            }
            Message::Bitfield { root, bits, complete } => {
                if let Some((_, parts)) = self.parts.iter_mut().find(|(asked, _)| *asked == root)
                    && let Some(part) = parts.get_mut(&from)
                {
                    *part = Some(Bitfield::from_bytes(&bits, MAX_PIECES).count()).filter(|_| !complete);
                }
                self.exchange.bitfield_from(from, &root, &bits, complete, now, &mut self.rng);
            }

            Message::LeaseRequest { .. }
            | Message::LeaseGranted { .. }
            | Message::LeaseDenied { .. }
            | Message::LeaseRelease { .. }
            | Message::SeatsPrepare { .. }
            | Message::SeatsPromise { .. }
            | Message::SeatsAccept { .. }
            | Message::SeatsAccepted { .. }
            | Message::SeatsDecided { .. } => self.lease_message(from, message, now),

            Message::TurnRequest { reference, shares } => {
                // Nobody waits for a name that is not this one's to give.
                let may_name = self.catalog.node(&from).and_then(NodeFact::role) >= Some(Role::Submitter);
                let turn = match may_name {
                    true => self.turns.request(from, reference.clone(), shares, now),
                    false => Turn::Yours,
                };
                self.sends.push((from, Message::Turn { reference, turn }));
            }
            Message::Turn { reference, turn } => self.turns.answered(from, &reference, turn),
            Message::TurnEnd { reference, root } => self.turns.end(from, reference, root, now),

            Message::Renew { chain } => self.renew_for(from, &chain, now),
            Message::Renewed { chain } => self.renewed(chain, now),
        }
    }

    fn command(&mut self, id: CommandId, command: Command, now: Instant) {
        let result = match command {
            Command::WallClock(wall) => {
                self.wall = (now, wall);
                Ok(Reply::Done)
            }
            Command::Admitted { membership, address } => {
                self.with_membership(now, |members, cx| members.meet(membership.node, address, cx));
                self.reconcile_with(membership.node);
                Ok(Reply::Done)
            }
            Command::Listening { addresses, data } => {
                self.membership.set_addresses(addresses);
                self.data = data;
                self.publish_node(now);
                Ok(Reply::Done)
            }
            Command::Certified(chain) => {
                self.set_chain(chain);
                self.publish_node(now);
                Ok(Reply::Done)
            }
            Command::Load { capacity, pressure } => {
                let changed = self.worker.capacity() != capacity;
                self.worker.set_load(capacity, pressure, now);
                if changed {
                    self.publish_node(now);
                }
                Ok(Reply::Done)
            }
            Command::Note { placement, detail } => {
                self.worker.note(placement, detail);
                Ok(Reply::Done)
            }
            Command::ImageAdded(mut image) => {
                image.named = self.clock.stamp(self.wall_at(now));
                self.room_for_name(&image).map(|()| {
                    self.image_here(image, now);
                    Reply::Done
                })
            }
            Command::ImagesGivenUp(roots) => {
                for root in &roots {
                    if self.given_up.insert(*root)
                        && self.given_up.len() > MAX_GIVEN_UP
                        && let Some(other) = self.given_up.iter().find(|other| !roots.contains(other)).copied()
                    {
                        self.given_up.remove(&other);
                    }
                }
                self.images_gone(&roots, now);
                Ok(Reply::Done)
            }
            Command::ImagesRemoved(roots) => {
                self.images_gone(&roots, now);
                Ok(Reply::Done)
            }
            Command::ImageDamaged(root) => {
                self.image_damaged(root, now);
                Ok(Reply::Done)
            }
            Command::StoreFull(full) => {
                self.store_full = full;
                if full {
                    self.exchange.drop_copies(now);
                    self.publish_node(now);
                }
                Ok(Reply::Done)
            }
            Command::Unname(reference) => self.unname(reference, now),
            Command::FetchImage { root } => {
                if !self.has_image(&root) {
                    self.exchange.want(root, exchange::Need::Use, now);
                    self.publish_node(now);
                }
                Ok(Reply::Done)
            }
            Command::AskParts { root } => {
                let fetching = self.providers(&root).into_iter().filter(|(_, whole)| !whole);
                let asked: Vec<NodeId> = fetching.map(|(node, _)| node).take(MAX_PARTS).collect();
                self.sends.extend(asked.iter().map(|node| (*node, Message::BitfieldRequest { root, bits: None })));
                self.parts.retain(|(other, _)| *other != root);
                self.parts.truncate(MAX_ASKED_PARTS - 1);
                self.parts.push_front((root, asked.into_iter().map(|node| (node, None)).collect()));
                Ok(Reply::Done)
            }
            Command::AskTurn { reference, shares } => {
                let steward = self.steward(&reference);
                self.turns.asks(steward, reference.clone());
                self.sends.push((steward, Message::TurnRequest { reference, shares }));
                Ok(Reply::Done)
            }
            Command::EndTurn { reference, root } => {
                let asked = self.turns.forget(&reference).unwrap_or_else(|| self.steward(&reference));
                self.sends.push((asked, Message::TurnEnd { reference, root }));
                Ok(Reply::Done)
            }
            Command::DemandChunks { root, chunks } => {
                if !self.has_image(&root) {
                    self.exchange.want(root, exchange::Need::Use, now);
                    self.exchange.demand(&root, &chunks, now, &mut self.rng);
                    self.publish_node(now);
                }
                Ok(Reply::Done)
            }
            Command::Submit(spec) => self.submit(*spec, now),
            Command::Scale { workload, replicas } => self.scale(workload, replicas, now),
            Command::Update { workload, spec, rollout } => self.update(workload, *spec, rollout, now),
            Command::Rollback { workload } => self.roll_back(workload, "as was asked for", now),
            Command::Drain { node, draining } => self.order_drain(node, draining, now),
            Command::Revoke { node, reason, root } => self.order_revocation(node, reason, root.as_deref(), now),
            Command::Reseat { workload } => self.reseat(workload, now),
            Command::Remove { workload } => self.remove(workload, now),
            Command::Leave => {
                self.with_membership(now, |membership, cx| membership.leave(cx));
                Ok(Reply::Done)
            }
        };
        match result {
            Ok(reply) if !self.records.is_empty() => self.unwritten.replies.push((id, reply)),
            result => self.tell(Event::Reply { id, result }),
        }
    }

    fn tell(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    fn with_membership(&mut self, now: Instant, step: impl FnOnce(&mut Membership, &mut membership::Context<'_>)) {
        let catalog = &self.catalog;
        let certified = |node: &NodeId| catalog.node(node).is_some();
        let memo = self.memo.as_deref();
        let mut cx = membership::Context { now, rng: &mut self.rng, certified: &certified, memo, out: &mut self.sends };
        step(&mut self.membership, &mut cx);
    }

    fn with_auctioneer(&mut self, now: Instant, step: impl FnOnce(&mut Auctioneer, &mut auction::Context<'_>)) {
        let mut cx = auction::Context { now, me: self.me, key: &self.key, chain: &self.chain, out: &mut self.sends };
        step(&mut self.auctioneer, &mut cx);
    }

    fn member_changed(&mut self, change: Change, now: Instant) {
        match change {
            Change::Addresses(node) => {
                let Some(member) = self.membership.member(&node) else { return };
                let addresses = member.addresses.clone();
                self.records.insert(RecordKey::Member(node), Some(codec::encode(&addresses)));
                self.tell(Event::Addresses { node, addresses });
            }
            Change::State(node, state) => {
                self.tell(Event::Member { node, state });
                let placements: Vec<_> = self
                    .catalog
                    .placements_on(&node)
                    .map(|placement| (placement.workload, placement.replica))
                    .collect();
                for (workload, _) in &placements {
                    self.custody.touch(*workload);
                }
                match state {
                    State::Alive => {
                        for (workload, replica) in placements {
                            self.settle_conflict(workload, replica, now);
                        }
                        self.custody.hope();
                        self.reconcile_with(node);
                    }
                    State::Down | State::Left => {
                        for (workload, _) in &placements {
                            // Also of what has another replica that found no taker: the lost one is not to wait for that.
                            self.custody.hope_at(*workload, now);
                        }
                        self.with_auctioneer(now, |auctioneer, cx| auctioneer.peer_down(&node, cx));
                        self.images_moved = true;
                        self.touch_inherited();
                    }
                    State::Suspect => {}
                }
                self.refresh_providers(now);
            }
            Change::Forgotten(node) => {
                self.records.insert(RecordKey::Member(node), None);
            }
            Change::Cloned { other_boot } => self.tell(Event::Cloned { other_boot }),
        }
    }

    /// This node may be first custodian now of what a lost one looked after.
    fn touch_inherited(&mut self) {
        let inherited: Vec<WorkloadId> =
            self.catalog.workloads().map(|known| known.spec.id).filter(|id| self.looks_after(id)).collect();
        for workload in inherited {
            self.custody.touch(workload);
        }
    }

    fn transfer(&mut self, action: exchange::Action, now: Instant) {
        match action {
            exchange::Action::Survey(root) => {
                self.effect(Effect::Survey { root }, Owner::Survey(root));
                self.refresh_providers(now);
            }
            exchange::Action::Fetch { root, batch, provider, pieces, at } => {
                self.effect(Effect::Fetch { root, provider, pieces, at }, Owner::Batch(root, batch));
            }
            exchange::Action::Cancel { root, batch } => {
                let fetches =
                    |owner: &Owner| matches!(owner, Owner::Batch(of, which) if (*of, *which) == (root, batch));
                let effect = self.effects.iter().find(|(_, owner)| fetches(owner)).map(|(id, _)| *id);
                self.outputs.extend(effect.map(Output::Cancel));
            }
            exchange::Action::Send(to, message) => self.sends.push((to, message)),
            exchange::Action::Measured(bytes, elapsed) => self.worker.measured_bandwidth(bytes, elapsed),
            exchange::Action::Listed(root) => self.worker.image_listed(&root, now),
            exchange::Action::Complete(root) => self.image_complete(root, now),
            exchange::Action::Faulty(node, reason) => self.tell(Event::Faulty { node, reason }),
            exchange::Action::Lied(provider, chunk) => {
                let reason =
                    format!("bytes that are not chunk {}; it is asked for no more of that image", chunk.short());
                self.tell(Event::Dropped { from: provider, reason });
            }
            exchange::Action::Failed { root, damaged, reason } => {
                self.worker.image_failed(&root, damaged, &reason, now);
                self.tell(Event::ImageFailed { root, reason });
                self.publish_node(now);
            }
        }
    }

    fn refuse_unless_submitter(&self, now: Instant) -> Result<(), Refused> {
        let wall = self.wall_at(now).as_secs();
        let member = self.chain.verify(&self.mesh, wall).map_err(|error| Refused::Certificate(error.to_string()))?;
        if member.role < Role::Submitter {
            return Err(Refused::Role { role: member.role });
        }
        Ok(())
    }

    fn said(&self, key: &Key) -> Option<&Said> {
        self.catalog.get(key).map(|entry| &entry.said)
    }
}

/// Facts in groups that fit a message.
fn split(facts: impl IntoIterator<Item = Arc<Fact>>) -> Vec<Vec<Arc<Fact>>> {
    let mut groups = Vec::new();
    let (mut group, mut bytes) = (Vec::new(), 0);
    for fact in facts {
        bytes += fact.weight();
        if bytes > FACTS_BYTES && !group.is_empty() {
            groups.push(std::mem::take(&mut group));
            bytes = fact.weight();
        }
        group.push(fact);
    }
    if !group.is_empty() {
        groups.push(group);
    }
    groups
}

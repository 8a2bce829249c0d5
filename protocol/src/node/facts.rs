//! What this node says, learns and passes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{FACTS_MESSAGES, Node, PASSED_OVER};
use crate::catalog::{
    self, Body, Entry, Fact, ImageHeld, Key, NodeFact, NotTaken, Placement, Said, Taken, fact::MAX_IMAGES,
};
use crate::codec;
use crate::contract::{Event, RecordKey, Refused, Reply};
use crate::custody::{self, Rival};
use crate::exchange::{GIVE_UP, Need};
use crate::id::{ChunkId, KeyHash, NodeId, WorkloadId};
use crate::message::Message;
use crate::reconcile::{self, Item};
use crate::reference::Reference;
use crate::time::Instant;
use crate::trust::Role;

/// Names that are given within so long may have been given by two who did not know of one another.
const CONTEST: Duration = Duration::from_secs(60);
/// How long it is said that a name was taken back.
const UNNAMED: Duration = Duration::from_secs(14 * 24 * 3600);
/// How long at least, when many are.
const HEARD: Duration = Duration::from_secs(3600);
/// The most that is known to be damaged here: an image and what it was made of for each name.
pub(super) const MAX_DAMAGED: usize = 2 * MAX_IMAGES;
/// The most bytes of a report to which a name is added: certificates, labels and what is on its way need room beside.
const MAX_REPORT: usize = catalog::fact::MAX_FACT * 3 / 4;

impl Node {
    /// Says something: stamps, signs, keeps and pushes it.
    pub(super) fn publish(&mut self, key: Key, body: &Body, now: Instant) {
        if let Err(error) = self.try_publish(key, body, now) {
            self.dropped.facts += 1;
            self.tell(Event::Dropped { from: self.me, reason: error.to_string() });
        }
    }

    /// As [`Node::publish`], for what a user asked for and must be told of.
    pub(super) fn try_publish(&mut self, key: Key, body: &Body, now: Instant) -> Result<(), NotTaken> {
        let known = self.catalog.get(&key).map_or(catalog::Hlc::default(), |entry| entry.fact.version);
        let version = self.clock.stamp(self.wall_at(now)).max(known.next());
        self.take_own(Arc::new(Fact::sign(key, version, body, &self.key)), now)
    }

    /// Takes up a fact that this node is the first to know.
    pub(super) fn take_own(&mut self, fact: Arc<Fact>, now: Instant) -> Result<(), NotTaken> {
        let version = fact.version;
        // Its own word is not judged by its own clock; peers that refuse the stamp say so.
        self.catalog.offer(Arc::clone(&fact), version.time())?;
        self.took(&fact, None, now);
        Ok(())
    }

    /// A peer did not take a stamp of this node's. If its own clock says the same, it ran ahead and was set back: what it
    /// said of itself in the meantime nobody else took, and what it says next would be stamped later still. So it says
    /// all of that again, with stamps of today. (A clock that is behind what it wrote down needs nothing: its next
    /// stamps follow the ones before, and others take them.) What others said
    /// stays as it is; a workload stamped ahead is changed by stamps later still (see [`catalog::Catalog::offer`]).
    pub(super) fn mend_clock(&mut self, now: Instant) {
        let wall = self.wall_at(now);
        if !self.clock.is_ahead(wall) {
            return;
        }
        let limit = catalog::MAX_SKEW.as_millis() as i64;
        let (mut seen, mut own) = (catalog::Hlc::at(wall), Vec::new());
        for (key, entry) in self.catalog.iter() {
            if entry.fact.version.ahead_of(wall) <= limit {
                seen = seen.max(entry.fact.version);
            } else if key.owner() == Some(self.me) {
                own.push(*key);
            }
        }
        self.clock.set_back(seen);
        let names = self.images.iter_mut().map(|image| &mut image.named);
        for named in names.chain(self.unnamed.iter_mut().map(|(_, at)| at)) {
            if named.ahead_of(wall) > limit {
                *named = self.clock.stamp(wall);
            }
        }
        // The report first: nothing else of this node is believed without it.
        own.sort_unstable();
        for key in own {
            if let Some(entry) = self.catalog.forget(&key) {
                let body = match key {
                    Key::Node(_) => Body::Node(self.own_report()),
                    _ => entry.said.body(),
                };
                if self.try_publish(key, &body, now).is_err() {
                    // As it was, rather than not at all.
                    self.catalog.resume(&[entry]);
                }
            }
        }
        self.publish_node(now);
    }

    /// Takes up a fact that a peer sent.
    pub(super) fn learn(&mut self, from: NodeId, fact: Arc<Fact>, now: Instant) {
        let wall = self.wall_at(now);
        let before = self.catalog.get(&fact.key).cloned();
        // This node's own word from before its clock was set back, which others took because theirs were wrong too: it
        // stands, and what is said next comes after it.
        let own = fact.key.owner() == Some(self.me);
        let at = if own { wall.max(fact.version.time()) } else { wall };
        match self.catalog.offer(Arc::clone(&fact), at) {
            Ok(Taken::Known) => {}
            Ok(Taken::New) => {
                if let Some(entry) = self.catalog.get(&fact.key) {
                    self.gossip.came(&entry.hash());
                }
                if let Some(Said::Node(report)) = self.said(&fact.key) {
                    let before = match before.as_deref() {
                        Some(Entry { said: Said::Node(before), .. }) => Some(before),
                        _ => None,
                    };
                    let moved = before
                        .is_none_or(|before| before.images != report.images || before.fetching != report.fetching);
                    let unnamed = before.map_or(&[][..], |before| &before.unnamed) != report.unnamed;
                    let named = report.images.iter().filter(|image| {
                        let known = before.is_some_and(|before| before.images.iter().any(|old| old.agrees_with(image)));
                        !known && image.is_image()
                    });
                    let named: Vec<ImageHeld> = named.cloned().collect();
                    // A worker's names decide nothing.
                    let may_name = report.role() >= Some(Role::Submitter);
                    self.images_moved |= moved;
                    if let Some(node) = fact.key.owner().filter(|node| *node != self.me && may_name) {
                        named.iter().for_each(|image| self.contest(image, node));
                    }
                    if unnamed {
                        self.forget_unnamed(now);
                    }
                }
                if fact.version.time() <= wall.after(catalog::MAX_SKEW) {
                    self.clock.observe(fact.version);
                }
                self.took(&fact, Some(from), now);
            }
            Err(error) => {
                self.dropped.facts += 1;
                if let NotTaken::Future { ahead } = error {
                    self.sends.push((from, Message::ClockOff { ahead }));
                }
                self.tell(Event::Dropped { from, reason: error.to_string() });
            }
        }
    }

    /// A fact is new here: write it down, pass it on, and draw the consequences.
    fn took(&mut self, fact: &Arc<Fact>, from: Option<NodeId>, now: Instant) {
        self.records.insert(RecordKey::Fact(fact.key), Some(codec::encode(&**fact)));
        self.push(fact, from, now);
        self.tell(Event::Changed(fact.key));
        if from.is_some() && fact.key.owner() == Some(self.me) {
            return self.hear_own(fact.key, now);
        }
        match fact.key {
            Key::Node(node) => {
                self.with_membership(now, |membership, cx| membership.certified(node, cx));
                self.custody.hope();
                self.refresh_providers(now);
            }
            Key::Placement(_, workload, replica) => {
                self.settle_conflict(workload, replica, now);
                self.drop_own_pending(workload, now);
                self.custody.touch(workload);
                let ended = match self.said(&fact.key) {
                    Some(Said::Placement(placement)) => !placement.state.is_active(),
                    _ => true,
                };
                if ended {
                    self.custody.hope();
                }
            }
            Key::Workload(workload) => {
                if self.catalog.workload(&workload).is_none() {
                    self.custodian.forget(&workload, now);
                }
                self.learn_seats(workload, now);
                self.keep_seats(now);
                self.check_wanted(workload, now);
                self.custody.touch(workload);
            }
            Key::Seats(_, workload) => {
                self.learn_seats(workload, now);
                self.keep_seats(now);
                self.custody.touch(workload);
            }
            Key::Drain(node) => {
                if node == self.me {
                    self.worker.set_draining(self.catalog.is_draining(&node));
                }
                self.settle_all(now, |_| true);
                let placed: Vec<_> = self.catalog.placements_on(&node).map(|placement| placement.workload).collect();
                for workload in placed {
                    self.custody.touch(workload);
                }
                self.custody.hope();
            }
            Key::Revoked(_) => self.carry_out_revocations(now),
            Key::Journal(..) => {}
        }
    }

    /// The mesh remembers something of this node that this life did not say: what was on its disk is lost.
    fn hear_own(&mut self, key: Key, now: Instant) {
        match key {
            Key::Node(_) => self.publish_node(now),
            Key::Placement(_, workload, replica) => self.publish_placement(workload, replica, now),
            Key::Journal(_, workload) => self.drop_own_pending(workload, now),
            Key::Workload(_) | Key::Seats(..) | Key::Drain(_) | Key::Revoked(_) => {}
        }
    }

    pub(super) fn publish_node(&mut self, now: Instant) {
        let fact = self.own_report();
        let same = self.catalog.node(&self.me) == Some(&fact);
        if !same {
            self.publish(Key::Node(self.me), &Body::Node(fact), now);
        }
    }

    fn own_report(&self) -> NodeFact {
        let mut images = self.images.clone();
        images.sort_by_key(|image| std::cmp::Reverse(image.named));
        images.truncate(MAX_IMAGES);
        NodeFact {
            name: self.name.clone(),
            version: self.version.clone(),
            capacity: self.worker.capacity(),
            labels: self.labels.clone(),
            data: self.data.clone(),
            images,
            unnamed: self.unnamed.clone(),
            fetching: self.exchange.downloads().map(|(root, _)| *root).collect(),
            chain: self.chain.clone(),
            vouch: self.vouch,
        }
    }

    /// The same once more, under a new stamp.
    pub(super) fn publish_node_again(&mut self, now: Instant) {
        if let Some(fact) = self.catalog.node(&self.me).cloned() {
            self.publish(Key::Node(self.me), &Body::Node(fact), now);
        }
    }

    pub(super) fn publish_placement(&mut self, workload: WorkloadId, replica: u32, now: Instant) {
        let body = match self.worker.placement(&workload, replica) {
            Some(held) => {
                let mut fact = held.fact.clone();
                let most = (0..=catalog::MAX_DETAIL).rev().find(|at| fact.detail.is_char_boundary(*at));
                fact.detail.truncate(most.unwrap_or(0));
                Body::Placement(fact)
            }
            None => Body::Gone,
        };
        self.publish(Key::Placement(self.me, workload, replica), &body, now);
    }

    fn drop_own_pending(&mut self, workload: WorkloadId, now: Instant) {
        let Some(journal) = self.catalog.journal(&self.me, &workload) else { return };
        let body = match self.catalog.workload(&workload) {
            None => Body::Gone,
            Some(_) if !journal.pending => return,
            Some(wanted) => {
                let live = |node: &NodeId| self.membership.is_live(node);
                if !custody::missing(&wanted, &self.catalog, live, self.wall_at(now)).is_empty() {
                    return;
                }
                Body::Journal(crate::auction::Journal { pending: false, ..journal.clone() })
            }
        };
        self.publish(Key::Journal(self.me, workload), &body, now);
    }

    /// Makes what runs here follow what is wanted.
    pub(super) fn check_wanted(&mut self, workload: WorkloadId, now: Instant) {
        let (replicas, removed) = match self.said(&Key::Workload(workload)) {
            Some(Said::Workload { fact, .. }) => (fact.replicas, fact.removed),
            _ => return,
        };
        self.worker.want(&workload, replicas, removed);
        self.settle_all(now, |key| key.0 == workload);
        if replicas == 0 || removed {
            self.auctioneer.forget(&workload);
            self.drop_own_pending(workload, now);
        }
    }

    /// Ends what runs here of workloads that nobody knows any more: their submitter is a member no more.
    pub(super) fn end_orphans(&mut self, now: Instant) {
        let held = self.worker.placements().map(|((workload, _), _)| *workload);
        let unknown: BTreeSet<WorkloadId> =
            held.filter(|workload| self.said(&Key::Workload(*workload)).is_none()).collect();
        for workload in unknown {
            self.worker.want(&workload, 0, true);
            self.settle_all(now, |key| key.0 == workload);
        }
    }

    /// If this node and another live one both run a replica, the rule of [`custody::keeps`] decides.
    pub(super) fn settle_conflict(&mut self, workload: WorkloadId, replica: u32, now: Instant) {
        let Some(held) = self.worker.placement(&workload, replica) else { return };
        let Some(Said::Workload { fact: wanted, .. }) = self.said(&Key::Workload(workload)) else { return };
        let singleton = held.spec.singleton;
        let mine = Placement { node: self.me, workload, replica, fact: &held.fact };
        let wall = self.wall_at(now);
        let since = wall.0.saturating_sub(held.fact.accepted);
        let waited = singleton && since > 2 * crate::lease::LONG.as_millis() as u64;
        let mine = Rival { waited, ..Rival::of(&mine, wanted, &self.catalog, wall) };
        let rival = self
            .catalog
            .placements_of_replica(&workload, replica)
            .filter(|other| other.node != self.me)
            .filter(|other| self.membership.is_live(&other.node))
            // One that has ended elsewhere is no reason to take this one down.
            .filter(|other| other.fact.state.is_active())
            .map(|other| Rival::of(&other, wanted, &self.catalog, wall))
            .find(|other| custody::gives_way(&mine, other, singleton));
        if let Some(rival) = rival {
            self.worker.superseded(workload, replica, rival.node, rival.epoch);
        }
    }

    /// As [`Node::settle_conflict`], for all that runs here and is meant.
    pub(super) fn settle_all(&mut self, now: Instant, meant: impl Fn(&(WorkloadId, u32)) -> bool) {
        let keys: Vec<_> = self.worker.placements().map(|(key, _)| *key).filter(meant).collect();
        for (workload, replica) in keys {
            self.settle_conflict(workload, replica, now);
        }
    }

    pub(super) fn reconcile_with(&mut self, node: NodeId) {
        let ranges = reconcile::open(self.catalog.index());
        self.sends.push((node, Message::Reconcile { ranges }));
    }

    pub(super) fn send_facts(&mut self, to: NodeId, keys: &[KeyHash]) {
        let mut known: Vec<&Arc<Fact>> = keys.iter().filter_map(|key| self.catalog.by_hash(key)).collect();
        // What others rest on first, and the others in any order: what the peer refuses each time must not keep the rest
        // from it.
        self.rng.shuffle(&mut known);
        known.sort_by_key(|fact| order(&fact.key));
        let groups = super::split(known.into_iter().cloned());
        self.sends.extend(groups.into_iter().take(FACTS_MESSAGES).map(|facts| (to, Message::Facts { facts })));
    }

    // Images.

    pub(super) fn has_image(&self, root: &ChunkId) -> bool {
        self.images.iter().any(|image| image.holds(root))
    }

    /// Tells of a name that another node gives to one image and this one to another, both a moment ago: neither may have known.
    fn contest(&mut self, theirs: &ImageHeld, node: NodeId) {
        let same = |own: &&ImageHeld| own.reference == theirs.reference && own.root != theirs.root && own.is_image();
        let Some(own) = self.images.iter().filter(same).max_by_key(|own| own.named) else { return };
        let (own_at, their_at) = (own.named.time().0, theirs.named.time().0);
        let told = |(other, fact): (NodeId, &NodeFact)| {
            other != node && fact.images.iter().any(|image| image.agrees_with(theirs))
        };
        if u128::from(own_at.abs_diff(their_at)) > CONTEST.as_millis() || self.catalog.nodes().any(told) {
            return;
        }
        let (mut meant, mut other) = ((own.id, self.me), (theirs.id, node));
        if (own.named, own.root) < (theirs.named, theirs.root) {
            std::mem::swap(&mut meant, &mut other);
        }
        let reference = own.reference.clone();
        self.tell(Event::NameContested { reference, meant, other });
    }

    /// An image is here, or what it was made of, under this name. Of two images with one name, the one named last is meant.
    pub(super) fn image_here(&mut self, mut image: ImageHeld, now: Instant) {
        // The one may have come before the other, or under another name.
        image.here |= self.has_image(&image.root);
        if let Some(original) = &mut image.original {
            original.here |= self.images.iter().any(|other| other.holds(&original.root));
        }
        // What had the name before is nobody's, unless something is to run it. Of the same image the last word counts.
        let superseded = |other: &ImageHeld| {
            let run = || self.catalog.workloads().any(|known| known.spec.image.root == other.root);
            other.reference == image.reference && (other.root == image.root || (other.named < image.named && !run()))
        };
        let images = std::mem::take(&mut self.images);
        self.images = images.into_iter().filter(|other| !superseded(other)).collect();
        // What it was made of may be fetched now.
        self.images_moved = true;
        for root in image.held().filter(|root| self.damaged.remove(root)) {
            // Its other names have it again as well.
            for other in &mut self.images {
                other.here |= other.root == root;
                if let Some(original) = &mut other.original {
                    original.here |= original.root == root;
                }
            }
        }
        let root = Some(image.root).filter(|_| image.here);
        self.images.push(image);
        if let Some(root) = root {
            self.worker.image_here(&root, now);
        }
        self.publish_node(now);
        root.into_iter().for_each(|root| self.tell(Event::ImageComplete { root }));
    }

    /// An image has come completely, or what one was made of: take it up under every name that the mesh has for it.
    pub(super) fn image_complete(&mut self, root: ChunkId, now: Instant) {
        self.damaged.remove(&root);
        let mut names: BTreeMap<_, ImageHeld> = BTreeMap::new();
        let made_of = |image: &ImageHeld| image.original.as_ref().is_some_and(|original| original.root == root);
        let known = self.catalog.nodes().flat_map(|(_, fact)| fact.images.iter().map(|image| (fact.role(), image)));
        // Whoever may submit says what a name is and what that was made of; a worker only where nobody else does.
        let mut known: Vec<_> = known.filter(|(_, image)| image.root == root || made_of(image)).collect();
        known.sort_by_key(|(role, image)| (*role >= Some(Role::Submitter), image.named));
        for (_, image) in known {
            let mut image = image.clone();
            image.here = image.root == root;
            if let Some(original) = &mut image.original {
                original.here = original.root == root;
            }
            names.insert((image.reference.clone(), image.root), image);
        }
        let pins = self.worker.placements().map(|(_, held)| &held.spec.image).filter(|pin| pin.root == root);
        for pin in pins {
            names.entry((pin.reference.clone(), root)).or_insert_with(|| ImageHeld {
                reference: pin.reference.clone(),
                id: pin.id,
                root,
                size: pin.size,
                named: catalog::Hlc::default(),
                here: true,
                original: None,
            });
        }
        for image in names.into_values() {
            self.image_here(image, now);
        }
    }

    /// Takes a name back, here and, as they hear of it, on every node.
    pub(super) fn unname(&mut self, reference: Reference, now: Instant) -> Result<Reply, Refused> {
        self.refuse_unless_submitter(now)?;
        let at = self.clock.stamp(self.wall_at(now));
        self.unnamed.retain(|(other, _)| *other != reference);
        // The oldest have been heard of long since, or must be heard of yet.
        let wall = self.wall_at(now);
        let heard = |at: &catalog::Hlc| at.time().after(HEARD) < wall;
        while self.unnamed.len() >= MAX_IMAGES / 2 {
            if !self.unnamed.first().is_some_and(|(_, at)| heard(at)) {
                return Err(Refused::Names(self.unnamed.len()));
            }
            self.unnamed.remove(0);
        }
        self.images.retain(|image| image.reference != reference);
        self.unnamed.push((reference, at));
        self.publish_node(now);
        Ok(Reply::Done)
    }

    /// Whether the report has room for one name more.
    pub(super) fn room_for_name(&self, image: &ImageHeld) -> Result<(), Refused> {
        let replaced = self.images.iter().any(|other| other.reference == image.reference);
        let mut report = self.own_report();
        report.images.push(image.clone());
        if self.images.len() < MAX_IMAGES && codec::encode(&report).len() < MAX_REPORT || replaced {
            return Ok(());
        }
        Err(Refused::Names(self.images.len()))
    }

    /// What these roots list is here no more.
    pub(super) fn images_gone(&mut self, roots: &[ChunkId], now: Instant) {
        self.not_here(roots);
        self.damaged.retain(|root| !roots.contains(root));
        self.forget_nameless();
        self.publish_node(now);
    }

    /// Lets go of names of what is not here, but for what is to be here again.
    pub(super) fn forget_nameless(&mut self) {
        let damaged = &self.damaged;
        let comes = |image: &ImageHeld| {
            let original = image.original.as_ref().map(|original| original.root);
            [Some(image.root), original].into_iter().flatten().any(|root| damaged.contains(&root))
        };
        self.images.retain(|image| image.held().next().is_some() || comes(image));
    }

    /// What this root lists is not here for now: it is fetched again, and these names are its names then.
    pub(super) fn image_damaged(&mut self, root: ChunkId, now: Instant) {
        self.not_here(&[root]);
        // Beyond that nothing of what is damaged has a name here, and it is fetched for whoever wants it alone.
        if self.damaged.len() < MAX_DAMAGED {
            self.damaged.insert(root);
        }
        self.exchange.want(root, crate::exchange::Need::Use, now);
        self.publish_node(now);
    }

    fn not_here(&mut self, roots: &[ChunkId]) {
        for image in &mut self.images {
            image.here &= !roots.contains(&image.root);
            if let Some(original) = &mut image.original {
                original.here &= !roots.contains(&original.root);
            }
        }
    }

    /// Lets go of names that were taken back after they were given; the word of it is kept for [`UNNAMED`], in which every node
    /// that is not gone for good hears it.
    pub(super) fn forget_unnamed(&mut self, now: Instant) {
        let wall = self.wall_at(now);
        let (before, old) =
            (self.images.len() + self.unnamed.len(), |at: &catalog::Hlc| at.time().after(UNNAMED) < wall);
        self.unnamed.retain(|(_, at)| !old(at));
        let taken_back = taken_back(&self.catalog);
        self.images.retain(|image| taken_back.get(&image.reference).is_none_or(|at| image.named > *at));
        if self.images.len() + self.unnamed.len() != before {
            self.publish_node(now);
        }
    }

    /// Keeps each image on enough nodes: one that exists only where it was loaded would die with that node, and with
    /// it every chance to run its workloads elsewhere. The first nodes by rendezvous hash fetch it; where they do not, for want
    /// of room, the next ones do, [`PASSED_OVER`] later for each.
    ///
    /// What an image was made of goes where the image is, and after it: most of it is the same chunks.
    pub(super) fn spread_images(&mut self, now: Instant) {
        if self.store_full {
            self.short.clear();
            return;
        }
        let mut holders: BTreeMap<ChunkId, Vec<NodeId>> = BTreeMap::new();
        for (node, fact) in self.catalog.nodes().filter(|(node, _)| self.membership.is_live(node)) {
            for root in fact.images.iter().flat_map(ImageHeld::held).chain(fact.fetching.iter().copied()) {
                let nodes = holders.entry(root).or_default();
                // Who else has it is of no interest once there are enough.
                if nodes.len() < self.image_copies && !nodes.contains(&node) {
                    nodes.push(node);
                }
            }
        }
        holders.retain(|root, _| self.is_vouched_for(root));
        let live = self.catalog.nodes().filter(|(node, _)| self.membership.is_live(node));
        let vouched = live.flat_map(|(_, fact)| &fact.images).filter(|image| holders.contains_key(&image.root));
        let made_into = made_into(vouched);
        let before = std::mem::take(&mut self.short);
        for (root, nodes) in holders {
            // What could not be had is fetched again when something needs it, not for its own sake.
            let hopeless = self.exchange.failure(&root).is_some() || self.given_up.contains(&root);
            let image = made_into.get(&root);
            let too_soon = image.is_some_and(|image| !self.has_image(image));
            if nodes.len() >= self.image_copies {
                // Also of one that was to be this node's, and waits for others until now.
                self.exchange.want_no_copy(&root);
                continue;
            }
            if self.has_image(&root) || hopeless {
                continue;
            }
            let have_image: Vec<NodeId> = image.map_or_else(Vec::new, |image| {
                let others = self.providers(image).into_iter().filter_map(|(node, whole)| whole.then_some(node));
                others.chain(Some(self.me).filter(|_| !too_soon)).collect()
            });
            // Who has no image waits until all have it that are to have it.
            if too_soon && have_image.len() < self.image_copies {
                continue;
            }
            let key = image.unwrap_or(&root);
            let place = |node: &NodeId| (!have_image.contains(node), std::cmp::Reverse(copy_rank(key, node)));
            let own = place(&self.me);
            let ahead = self.membership.live().filter(|node| !nodes.contains(node) && place(node) < own).count();
            let since = before.get(&root).copied().unwrap_or(now);
            self.short.insert(root, since);
            let missing = self.image_copies - nodes.len();
            let passes = (ahead + 1).saturating_sub(missing).max(usize::from(too_soon));
            if now.since(since) >= PASSED_OVER * passes as u32 {
                self.exchange.want(root, Need::Copy, now);
                self.publish_node(now);
            }
        }
    }

    /// Whether an image was named by a node that may submit, or a workload asks for it: others' disks are not for what
    /// any worker claims to have.
    fn is_vouched_for(&self, root: &ChunkId) -> bool {
        let names = |(_, fact): (NodeId, &NodeFact)| {
            fact.role() >= Some(Role::Submitter) && fact.images.iter().any(|image| image.holds(root))
        };
        self.catalog.nodes().any(names) || self.catalog.workloads().any(|known| known.spec.image.root == *root)
    }

    /// Tells the exchange who has what now.
    pub(super) fn refresh_providers(&mut self, now: Instant) {
        let wanted: Vec<ChunkId> = self.exchange.downloads().map(|(root, _)| *root).collect();
        for root in wanted {
            let providers = self.providers(&root);
            self.exchange.set_providers(&root, &providers, now, &mut self.rng);
        }
    }

    /// Whether a live node other than this has all of it.
    pub fn is_elsewhere(&self, root: &ChunkId) -> bool {
        self.holders(root).next().is_some()
    }

    /// Live nodes other than this that have all of it.
    pub fn holders(&self, root: &ChunkId) -> impl Iterator<Item = NodeId> + use<> {
        self.providers(root).into_iter().filter(|(_, complete)| *complete).map(|(node, _)| node)
    }

    /// Why an image cannot be had: it failed when it was wanted last, and no live node has any of it. A moment after that
    /// those do not count that are fetching it: they gave nothing then, and may be waiting as this one does.
    pub fn out_of_reach(&self, root: &ChunkId, now: Instant) -> Option<&str> {
        let (reason, at) = self.exchange.failed(root)?;
        let a_moment_ago = now.since(at) < GIVE_UP;
        let gives = self.providers(root).iter().any(|(_, complete)| *complete || !a_moment_ago);
        (!gives && !self.has_image(root)).then_some(reason)
    }

    /// Live nodes other than this that have an image, and whether all of it.
    pub(super) fn providers(&self, root: &ChunkId) -> Vec<(NodeId, bool)> {
        let reports = self.catalog.nodes().filter(|(node, _)| *node != self.me && self.membership.is_live(node));
        reports
            .filter_map(|(node, fact)| {
                let complete = fact.images.iter().any(|image| image.holds(root));
                (complete || fact.fetching.contains(root)).then_some((node, complete))
            })
            .collect()
    }
}

/// What each of those that images were made of was made into; of several the smallest, so that all who know the same say the same.
pub(super) fn made_into<'a>(known: impl Iterator<Item = &'a ImageHeld>) -> BTreeMap<ChunkId, ChunkId> {
    let mut made_into: BTreeMap<ChunkId, ChunkId> = BTreeMap::new();
    for image in known.filter(|image| image.is_image()) {
        if let Some(original) = &image.original {
            let root = made_into.entry(original.root).or_insert(image.root);
            *root = image.root.min(*root);
        }
    }
    made_into
}

/// The rank of a node among those that keep copies of an image: the highest is first.
pub(super) fn copy_rank(root: &ChunkId, node: &NodeId) -> [u8; 16] {
    custody::rank(&WorkloadId(root.0[..16].try_into().expect("half an id")), node)
}

/// Names that were taken back, by whom names are given, and when last.
pub fn taken_back(catalog: &catalog::Catalog) -> BTreeMap<&Reference, catalog::Hlc> {
    let may_name = catalog.nodes().filter(|(_, fact)| fact.role() >= Some(Role::Submitter));
    let mut last: BTreeMap<&Reference, catalog::Hlc> = BTreeMap::new();
    for (reference, at) in may_name.flat_map(|(_, fact)| &fact.unnamed) {
        let known = last.entry(reference).or_default();
        *known = (*known).max(*at);
    }
    last
}

/// What comes first of many facts: reports, without which nothing else that a node says is believed; then workloads, without
/// which nothing about them is.
pub(super) fn order(key: &Key) -> u8 {
    match key {
        Key::Node(_) => 0,
        Key::Workload(_) => 1,
        _ => 2,
    }
}

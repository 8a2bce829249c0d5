//! What this node does about workloads: as the node a user talks to, as bidder, as auctioneer and as custodian.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Node, Owner};
use crate::auction::{self, ASK_ALL, Award, Cause, Ended, Lot, Record, Refusal, SAMPLE, WIDEST};
use crate::catalog::{self, Body, Fact, Key, NodeFact, NotTaken, Rollout, Said, Workload, WorkloadFact};
use crate::contract::{Effect, Event, Refused, Reply};
use crate::custody::{self, Missing};
use crate::exchange::Need;
use crate::id::{NodeId, WorkloadId};
use crate::membership::State;
use crate::message::Message;
use crate::time::Instant;
use crate::trust::Role;
use crate::worker::Action;
use crate::workload::{PlacementId, SignedSpec, Spec};

impl Node {
    // As the node a user talks to.

    /// Writes a workload down and places it at once, without waiting for its custodian.
    pub(super) fn submit(&mut self, mut spec: Spec, now: Instant) -> Result<Reply, Refused> {
        self.refuse_unless_submitter(now)?;
        if let Some(taken) = self.catalog.workloads().find(|other| other.spec.name == spec.name) {
            return Err(Refused::NameTaken { name: spec.name, by: taken.spec.id });
        }
        let id = WorkloadId(self.rng.u128(..).to_be_bytes());
        spec.id = id;
        spec.requires = spec.features();
        let seats = spec.singleton.then(|| crate::lease::Seats::first(self.custodians(&id)));
        let wall = self.wall_at(now).as_secs();
        let replicas = spec.replicas;
        let spec = SignedSpec::sign(&spec, &self.key, self.chain.clone(), wall)
            .map_err(|error| Refused::Spec(error.to_string()))?;
        let author = self.chain.clone();
        let fact = WorkloadFact {
            spec,
            generation: 0,
            revived: 0,
            replicas,
            removed: false,
            previous: None,
            rollout: Rollout::default(),
            setback: String::new(),
            seats,
            author,
        };
        self.try_publish(Key::Workload(id), &Body::Workload(fact), now).map_err(refused)?;
        self.auction_now(id, now);
        Ok(Reply::Submitted(id))
    }

    pub(super) fn scale(&mut self, workload: WorkloadId, replicas: u32, now: Instant) -> Result<Reply, Refused> {
        self.change(workload, now, |fact| {
            fact.generation = fact.generation.saturating_add(1);
            if fact.replicas == 0 && replicas > 0 {
                fact.revived = fact.generation;
            }
            fact.replicas = replicas.min(crate::workload::MAX_REPLICAS);
        })?;
        self.auction_now(workload, now);
        Ok(Reply::Done)
    }

    pub(super) fn remove(&mut self, workload: WorkloadId, now: Instant) -> Result<Reply, Refused> {
        self.change(workload, now, |fact| {
            fact.generation = fact.generation.saturating_add(1);
            fact.replicas = 0;
            fact.removed = true;
        })?;
        Ok(Reply::Done)
    }

    /// Has it run something else from now on, one replica after the other.
    pub(super) fn update(
        &mut self,
        workload: WorkloadId,
        mut spec: Spec,
        rollout: Rollout,
        now: Instant,
    ) -> Result<Reply, Refused> {
        let known = self.catalog.workload(&workload).ok_or(Refused::NoWorkload(workload))?;
        if spec.singleton != known.spec.singleton {
            return Err(Refused::Spec(
                "what is a singleton stays one, and what is none does not become one".to_owned(),
            ));
        }
        (spec.id, spec.name) = (workload, known.spec.name.clone());
        spec.requires = spec.features();
        let wall = self.wall_at(now).as_secs();
        let spec = SignedSpec::sign(&spec, &self.key, self.chain.clone(), wall)
            .map_err(|error| Refused::Spec(error.to_string()))?;
        if rollout.max_surge == 0 && rollout.max_unavailable == 0 {
            return Err(Refused::Spec("no replica more and none less: nothing could ever be replaced".to_owned()));
        }
        self.change(workload, now, |fact| {
            fact.generation = fact.generation.saturating_add(1);
            fact.revived = fact.generation;
            fact.previous = Some(std::mem::replace(&mut fact.spec, spec));
            fact.rollout = rollout;
            fact.setback.clear();
        })?;
        Ok(Reply::Done)
    }

    /// Goes back to what ran before the last update.
    pub(super) fn roll_back(&mut self, workload: WorkloadId, why: &str, now: Instant) -> Result<Reply, Refused> {
        let known = self.catalog.workload(&workload).ok_or(Refused::NoWorkload(workload))?;
        if known.fact.previous.is_none() {
            return Err(Refused::Nothing(format!("{} has not been updated since it was submitted", known.spec.name)));
        }
        self.change(workload, now, |fact| {
            fact.generation = fact.generation.saturating_add(1);
            // What ended in the form that is taken back has not done its work.
            fact.revived = fact.generation;
            if let Some(previous) = fact.previous.take() {
                fact.spec = previous;
            }
            fact.setback = why.chars().take(200).collect();
        })?;
        self.tell(Event::Noted { workload, text: format!("goes back to what it was before the update: {why}") });
        Ok(Reply::Done)
    }

    pub(super) fn change(
        &mut self,
        workload: WorkloadId,
        now: Instant,
        edit: impl FnOnce(&mut WorkloadFact),
    ) -> Result<(), Refused> {
        self.refuse_unless_submitter(now)?;
        let known = self.catalog.workload(&workload).ok_or(Refused::NoWorkload(workload))?;
        let mut fact = known.fact.clone();
        fact.author = self.chain.clone();
        edit(&mut fact);
        self.try_publish(Key::Workload(workload), &Body::Workload(fact), now).map_err(refused)
    }

    /// Whoever was asked holds the first auction: its custodian would only learn of it later.
    fn auction_now(&mut self, workload: WorkloadId, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload) else { return };
        let missing = self.missing(&wanted, now);
        if !missing.is_empty() && self.auctioneer.has_room() {
            self.hold_auction(workload, &missing, Whom::Anybody, now);
        }
    }

    // As bidder.

    pub(super) fn announced(
        &mut self,
        from: NodeId,
        auction: u64,
        workload: Arc<Fact>,
        (replicas, in_place): (u32, bool),
        now: Instant,
    ) {
        let answer = self.take_workload(from, &workload, now).and_then(|(spec, fact)| {
            let missing = if self.has_image(&spec.image.root) {
                0
            } else if self.providers(&spec.image.root).is_empty() {
                return Err(Refusal::NoImage);
            } else {
                spec.image.size
            };
            self.worker.bid(&spec, replicas.min(fact.replicas), missing, in_place, now)
        });
        let message = match answer {
            Ok((prices, basis)) => Message::Bid { auction, prices, basis },
            Err(refusal) => Message::Refusal { auction, refusal },
        };
        self.sends.push((from, message));
    }

    /// Whether room for a part of a gang is kept.
    pub(super) fn asked_to_hold(
        &mut self,
        from: NodeId,
        auction: u64,
        workload: Arc<Fact>,
        replicas: u32,
        now: Instant,
    ) {
        let taken = self.take_workload(from, &workload, now);
        let held = taken.and_then(|(spec, fact)| {
            if !spec.gang || replicas > fact.replicas {
                return Err(Refusal::Unwanted);
            }
            self.worker.hold(from, auction, &spec, replicas, now)
        });
        let refusal = held.err();
        self.sends.push((from, Message::Held { auction, refusal }));
    }

    pub(super) fn awarded(
        &mut self,
        from: NodeId,
        placement: PlacementId,
        workload: Arc<Fact>,
        award: Award,
        now: Instant,
    ) {
        let wall = self.wall_at(now);
        let checked = if award.auctioneer != from {
            Err("an award that its sender did not sign".to_owned())
        } else {
            award.verify(&placement, &self.me, &self.mesh)
        };
        if let Err(flaw) = checked {
            let refusal = Some(Refusal::Unauthorised(flaw).bounded());
            return self.sends.push((from, Message::Verdict { placement, refusal }));
        }
        let verdict = self.take_workload(from, &workload, now).and_then(|(spec, fact)| {
            let beyond_time = placement.epoch > wall.0;
            if spec.id != placement.workload || placement.replica >= fact.replicas || beyond_time {
                return Err(Refusal::Unwanted);
            }
            let form = fact.form();
            let elsewhere = self.catalog.placements_of_replica(&spec.id, placement.replica).filter(|other| {
                other.node != self.me && other.fact.state.is_active() && self.membership.is_live(&other.node)
            });
            if let Some(epoch) = elsewhere.map(|other| other.fact.epoch).max().filter(|epoch| *epoch >= placement.epoch)
            {
                return Err(Refusal::Superseded { epoch });
            }
            let root = spec.image.root;
            let whole = self.has_image(&root);
            let listed = spec.lazy && self.exchange.is_listed(&root);
            let at = (fact.generation, form);
            self.worker.award(from, placement, &spec, award, at, whole || listed, (now, wall))?;
            if listed && !whole {
                // The rest comes now because it is used.
                self.act(Action::Fetch(root), now);
            }
            Ok(())
        });
        self.sends.push((from, Message::Verdict { placement, refusal: verdict.err() }));
    }

    /// The workload as this node knows it after having been shown `workload`: an announcement may be ahead of gossip,
    /// or behind it.
    fn take_workload(
        &mut self,
        from: NodeId,
        workload: &Arc<Fact>,
        now: Instant,
    ) -> Result<(Arc<Spec>, WorkloadFact), Refusal> {
        let Key::Workload(id) = workload.key else {
            return Err(Refusal::Unauthorised("this is no workload".to_owned()));
        };
        if from != self.me {
            if let Err(error) = workload.open(&self.mesh) {
                return Err(Refusal::Unauthorised(error.to_string()));
            }
            self.learn(from, Arc::clone(workload), now);
        }
        match self.catalog.workload(&id) {
            Some(known) => Ok((Arc::clone(known.spec), known.fact.clone())),
            None => Err(Refusal::Unwanted),
        }
    }

    /// Carries out what the worker wants.
    pub(super) fn act(&mut self, action: Action, now: Instant) {
        match action {
            Action::Effect(placement, effect) => self.effect(effect, Owner::Placement(placement)),
            Action::Publish(workload, replica) | Action::Retract(workload, replica) => {
                self.publish_placement(workload, replica, now);
            }
            Action::Fetch(root) => {
                self.exchange.want(root, Need::Use, now);
                self.publish_node(now);
            }
            Action::Lease(placement) => self.want_lease(placement, now),
            Action::Unlease(placement) => self.sends.extend(self.holder.end(placement, true)),
            Action::Abandon(placement) => self.sends.extend(self.holder.end(placement, false)),
        }
    }

    /// The placements that this node's earlier life published.
    pub(super) fn take_up_placements(&mut self, now: Instant) {
        let own: Vec<_> = self
            .catalog
            .placements()
            .filter(|placement| placement.node == self.me)
            .map(|placement| (placement.workload, placement.replica, placement.fact.clone()))
            .collect();
        for (workload, replica, fact) in own {
            // Also of a removed workload: its container is still to be stopped. What it runs may be of before an update.
            let spec = match self.said(&Key::Workload(workload)) {
                Some(Said::Workload { spec, fact: wanted, .. }) if wanted.form() == fact.form => Some(Arc::clone(spec)),
                Some(Said::Workload { fact: wanted, .. }) => {
                    let old = wanted.previous.as_ref().filter(|previous| catalog::form(previous) == fact.form);
                    old.and_then(|previous| previous.open(&self.mesh).ok()).map(|(previous, _)| Arc::new(previous))
                }
                _ => None,
            };
            let Some(spec) = spec else {
                // Its workload is forgotten here, or has been updated twice: whatever is left of it goes, and the others
                // are told.
                let placement = PlacementId { workload, replica, epoch: fact.epoch };
                self.effect(Effect::Remove { placement }, Owner::Placement(placement));
                self.publish(Key::Placement(self.me, workload, replica), &Body::Gone, now);
                continue;
            };
            if spec.lazy && fact.state.is_active() && !self.has_image(&spec.image.root) {
                // It may have been started before all of it was here.
                self.exchange.want(spec.image.root, Need::Use, now);
            }
            self.worker.restore(workload, replica, spec, fact);
        }
    }

    // As auctioneer.

    fn hold_auction(&mut self, workload: WorkloadId, missing: &[Missing], whom: Whom, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload) else { return };
        let signed = Arc::clone(wanted.signed);
        let spec = Arc::clone(wanted.spec);
        let cause = missing.iter().map(|replica| replica.cause).next().unwrap_or(Cause::Missing);
        let mut crowded: BTreeMap<NodeId, u32> = BTreeMap::new();
        for placement in self.catalog.placements_of(&workload) {
            if placement.fact.state.is_active() && self.membership.is_live(&placement.node) {
                *crowded.entry(placement.node).or_default() += 1;
            }
        }
        let replicas: Vec<(u32, u64)> = missing.iter().map(|replica| (replica.replica, replica.epoch)).collect();
        let in_place = matches!(whom, Whom::Only(_));
        let (candidates, ask) = match whom {
            Whom::Anybody => self.candidates(&spec, replicas.len()),
            Whom::Only(node) => (vec![node], 1),
            Whom::AnybodyBut(nodes) => {
                let (mut candidates, ask) = self.candidates(&spec, replicas.len());
                candidates.retain(|node| !nodes.contains(node));
                (candidates, ask)
            }
        };
        let (gang, layout) = (spec.gang, spec.layout);
        let lot = Lot { workload, signed, replicas, cause, crowded, layout, gang, in_place };
        let at = self.wall_at(now);
        self.with_auctioneer(now, |auctioneer, cx| auctioneer.open(lot, candidates, ask, at, cx));
    }

    /// Whom to ask, in which order, and how many at first.
    fn candidates(&mut self, spec: &Spec, replicas: usize) -> (Vec<NodeId>, usize) {
        let suits = |node: &NodeId| {
            !self.catalog.is_draining(node)
                && self.catalog.node(node).is_none_or(|fact| {
                    fact.capacity.fits(&Default::default(), &spec.resources)
                        && spec.on.iter().all(|(name, value)| fact.labels.get(name) == Some(value))
                })
        };
        if self.membership.count() < ASK_ALL {
            let of_state = |state: State| {
                let members = self.membership.members().filter(move |(_, member)| member.state == state);
                members.map(|(node, _)| *node)
            };
            let mut nodes: Vec<NodeId> = of_state(State::Alive).chain([self.me]).collect();
            let alive = nodes.len();
            // Whoever is only suspected is asked when nobody else will do: it may be the one that is wanted.
            nodes.extend(of_state(State::Suspect));
            return (nodes, alive);
        }
        let ask = SAMPLE.max(2 * replicas);
        let mut nodes = self
            .membership
            .sample(ask * WIDEST, &mut self.rng, |member| member.state == State::Alive && suits(&member.node));
        if suits(&self.me) {
            nodes.insert(self.rng.usize(..=nodes.len()), self.me);
        }
        // Where its neighbours are is no matter of chance.
        for neighbour in self.nodes_of(&spec.near).into_iter().filter(|node| suits(node)).take(ask) {
            nodes.retain(|node| *node != neighbour);
            nodes.insert(0, neighbour);
        }
        (nodes, ask)
    }

    /// Live nodes that run any of these workloads.
    fn nodes_of(&self, names: &[String]) -> BTreeSet<NodeId> {
        if names.is_empty() {
            return BTreeSet::new();
        }
        let named = self.catalog.workloads().filter(|known| names.contains(&known.spec.name));
        let placements = named.flat_map(|known| self.catalog.placements_of(&known.spec.id));
        let active = placements.filter(|p| p.fact.state.is_active() && self.membership.is_live(&p.node));
        active.map(|placement| placement.node).collect()
    }

    pub(super) fn auction_ended(&mut self, end: auction::Ended, now: Instant) {
        match end {
            Ended::Placed { placement, node, record } => {
                self.tell(Event::Placed { placement, node, record });
            }
            Ended::Closed { workload, record, missing } => {
                let pending = missing > 0;
                self.remember(workload, record.clone(), pending, now);
                if pending {
                    self.custody.no_taker(workload, now);
                    if record.refusals.iter().any(|(_, refusal)| *refusal == Refusal::OnHold) {
                        // Two gangs got in each other's way: not again at the same time.
                        let pause = Duration::from_millis(self.rng.u64(1000..4000));
                        self.custody.hope_at(workload, now + pause);
                    }
                    self.tell(Event::Pending { workload, record: Arc::new(record) });
                }
            }
        }
    }

    pub(super) fn remember(&mut self, workload: WorkloadId, record: Record, pending: bool, now: Instant) {
        if self.catalog.workload(&workload).is_none() {
            return;
        }
        let key = Key::Journal(self.me, workload);
        let journal = self.catalog.journal(&self.me, &workload).cloned().unwrap_or_default().with(record, pending);
        self.publish(key, &Body::Journal(journal), now);
    }

    // As custodian.

    fn missing(&self, wanted: &Workload<'_>, now: Instant) -> Vec<Missing> {
        let live = |node: &NodeId| self.membership.is_live(node);
        let missing = custody::missing(wanted, &self.catalog, live, self.wall_at(now));
        self.not_held(&wanted.spec.id, missing)
    }

    /// Without what an auction here is about already.
    fn not_held(&self, workload: &WorkloadId, mut missing: Vec<Missing>) -> Vec<Missing> {
        missing.retain(|replica| !self.auctioneer.holds(workload, replica.replica));
        missing
    }

    /// Whether nothing of a workload is under way any more.
    fn is_over(&self, workload: &WorkloadId) -> bool {
        let mut placements = self.catalog.placements_of(workload);
        !placements.any(|placement| placement.fact.state.is_active() && self.membership.is_live(&placement.node))
    }

    /// Whether this node has to look at a workload when something about it changes: all others leave it alone, so it must
    /// be cheap to see that it does not.
    pub(super) fn looks_after(&self, workload: &WorkloadId) -> bool {
        let Some(wanted) = self.catalog.workload(workload) else { return false };
        let writes = wanted.spec.auto_remove || wanted.fact.previous.is_some();
        self.is_first(workload) || (writes && self.is_first_submitter(workload))
    }

    fn is_first(&self, workload: &WorkloadId) -> bool {
        let mine = custody::rank(workload, &self.me);
        !self.membership.live().any(|node| custody::rank(workload, &node) > mine)
    }

    /// Compares what is wanted of a workload with what the catalog shows; if this node is its first custodian and the
    /// time has come, holds an auction for the difference.
    pub(super) fn look_after(&mut self, workload: WorkloadId, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload).filter(|_| self.looks_after(&workload)) else {
            return self.custody.settled(&workload);
        };
        if wanted.fact.previous.is_some() && self.judge_update(workload, now) {
            return;
        }
        let Some(wanted) = self.catalog.workload(&workload) else { return };
        let (live, wall) = (|node: &NodeId| self.membership.is_live(node), self.wall_at(now));
        let missing = custody::missing(&wanted, &self.catalog, live, wall);
        let moves = custody::moves(&wanted, &self.catalog, live, wall);
        if missing.is_empty() && wanted.spec.auto_remove && self.is_over(&workload) {
            if self.is_first_submitter(&workload) {
                // If it may not any more, another will when it has noticed.
                let _refused = self.remove(workload, now);
            }
            return self.custody.settled(&workload);
        }
        let missing = self.not_held(&workload, missing);
        if (missing.is_empty() && moves.is_empty()) || !self.is_first(&workload) {
            return self.custody.settled(&workload);
        }
        if wanted.spec.singleton && !self.has_majority(&workload) {
            return self.without_majority(workload, now);
        }
        let urgent = missing.iter().any(|replica| matches!(replica.cause, Cause::NodeDown(_) | Cause::Evicted(_)));
        let due = self.custody.is_due(workload, urgent || missing.is_empty(), now);
        if due {
            // What is auctioned now is settled by its end; what cannot be yet is looked at again then.
            self.custody.wait(&workload, now);
        }
        let due = due && self.auctioneer.has_room();
        if due && !missing.is_empty() {
            self.hold_auction(workload, &missing, Whom::Anybody, now);
        }
        if due && !moves.is_empty() {
            self.move_on(workload, moves, now);
        }
    }

    /// Whether this node is the first custodian of those that may submit: what is to be written into the workload's own
    /// fact is its to write. If it may not any more, another will when it has noticed.
    fn is_first_submitter(&self, workload: &WorkloadId) -> bool {
        let mine = custody::rank(workload, &self.me);
        let may = |node: &NodeId| self.catalog.node(node).and_then(NodeFact::role) >= Some(Role::Submitter);
        may(&self.me) && !self.membership.live().any(|node| custody::rank(workload, &node) > mine && may(&node))
    }

    /// Looks how an update goes; whether it was taken back.
    fn judge_update(&mut self, workload: WorkloadId, now: Instant) -> bool {
        let Some(wanted) = self.catalog.workload(&workload) else { return false };
        let wall = self.wall_at(now);
        let progress = custody::progress(&wanted, &self.catalog, |node| self.membership.is_live(node), wall);
        // Since the update: a later change of something else is no reason to judge it again.
        let age = wall.0.saturating_sub(wanted.fact.spec.signed_at.saturating_mul(1000));
        let done = progress.outdated == 0
            && (progress.steady >= wanted.fact.replicas || age > custody::JUDGED.as_millis() as u64);
        let Some((replica, reason)) = progress.failing.filter(|_| !done && self.is_first_submitter(&workload)) else {
            if progress.unsteady > 0 {
                self.custody.look_at(workload, now + Duration::from_secs(1));
            }
            return false;
        };
        let name = &wanted.spec.name;
        let why = format!("{name}.{} did not stay up: {reason}", replica + 1);
        self.roll_back(workload, &why, now).is_ok()
    }

    /// Places successors of what is to be moved.
    fn move_on(&mut self, workload: WorkloadId, moves: Vec<(Missing, NodeId)>, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload) else { return };
        let (rollout, singleton) = (wanted.fact.rollout, wanted.spec.singleton);
        let wall = self.wall_at(now);
        let progress = custody::progress(&wanted, &self.catalog, |node| self.membership.is_live(node), wall);
        let held = |replica: u32| self.auctioneer.holds(&workload, replica);
        let drained: Vec<Missing> = moves
            .iter()
            .filter(|(missing, _)| matches!(missing.cause, Cause::Drained(_)) && !held(missing.replica))
            .map(|(missing, _)| *missing)
            .collect();
        let auctioned = moves.iter().filter(|(missing, _)| held(missing.replica)).count() as u32;
        let most = rollout.max_surge.saturating_add(rollout.max_unavailable).max(1);
        let budget = most.saturating_sub(progress.unsteady + auctioned);
        let updated = |missing: &Missing| matches!(missing.cause, Cause::Updated(_)) && !held(missing.replica);
        let next: Vec<(Missing, NodeId)> =
            moves.iter().filter(|(missing, _)| updated(missing)).take(budget as usize).copied().collect();
        if !drained.is_empty() {
            self.hold_auction(workload, &drained, Whom::Anybody, now);
        }
        if next.is_empty() {
            return self.custody.look_at(workload, now + Duration::from_secs(1));
        }
        // A singleton does not run beside its successor, and is replaced where it is; so is what has no room elsewhere. What
        // found none at its last try tries the other way.
        // Among several, what cannot be replaced where it is lets the next one try.
        let tries = self.custody.tries(&workload);
        let (first, node) = next[tries as usize / 2 % next.len()];
        let here = singleton || rollout.max_surge == 0;
        let alone = self.membership.live_count() == 0;
        let in_place = (alone || here == tries.is_multiple_of(2)) && (singleton || rollout.max_unavailable > 0);
        if in_place && !self.catalog.is_draining(&node) {
            self.hold_auction(workload, &[first], Whom::Only(node), now);
        } else {
            let nodes = next.iter().map(|(_, node)| *node).collect();
            let missing: Vec<Missing> =
                next.iter().map(|(missing, _)| *missing).take(rollout.max_surge.max(1) as usize).collect();
            self.hold_auction(workload, &missing, Whom::AnybodyBut(nodes), now);
        }
    }
}

/// Who is asked in an auction.
enum Whom {
    Anybody,
    AnybodyBut(BTreeSet<NodeId>),
    /// In the place of what runs there.
    Only(NodeId),
}

fn refused(error: NotTaken) -> Refused {
    match error {
        NotTaken::Full { limit } => Refused::Full { limit },
        error => Refused::Spec(error.to_string()),
    }
}

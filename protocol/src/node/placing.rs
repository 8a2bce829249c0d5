//! What this node does about workloads: as the node a user talks to, as bidder, as auctioneer and as custodian.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Node, Owner};
use crate::auction::{self, ASK_ALL, Award, Cause, Ended, Lot, MAX_RECORD, Refusal, SAMPLE, WIDEST};
use crate::catalog::{Body, Fact, Key, NotTaken, Said, Workload, WorkloadFact};
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
        let wall = self.wall_at(now).as_secs();
        let replicas = spec.replicas;
        let spec = SignedSpec::sign(&spec, &self.key, self.chain.clone(), wall)
            .map_err(|error| Refused::Spec(error.to_string()))?;
        let author = self.chain.clone();
        let fact = WorkloadFact { spec, generation: 0, revived: 0, replicas, removed: false, author };
        self.try_publish(Key::Workload(id), &Body::Workload(fact), now).map_err(refused)?;
        self.auction_now(id, now);
        Ok(Reply::Submitted(id))
    }

    pub(super) fn scale(&mut self, workload: WorkloadId, replicas: u32, now: Instant) -> Result<Reply, Refused> {
        self.change(workload, now, |fact| {
            fact.generation += 1;
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
            fact.generation += 1;
            fact.replicas = 0;
            fact.removed = true;
        })?;
        Ok(Reply::Done)
    }

    fn change(
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
        let missing = self.missing(&wanted);
        if !missing.is_empty() && self.auctioneer.has_room() {
            self.hold_auction(workload, missing, now);
        }
    }

    // As bidder.

    pub(super) fn announced(&mut self, from: NodeId, auction: u64, workload: Arc<Fact>, replicas: u32, now: Instant) {
        let answer = self.take_workload(from, &workload, now).and_then(|(spec, _)| {
            let missing = if self.has_image(&spec.image.root) {
                0
            } else if self.providers(&spec.image.root).is_empty() {
                return Err(Refusal::NoImage);
            } else {
                spec.image.size
            };
            self.worker.bid(&spec, replicas, missing, now)
        });
        let message = match answer {
            Ok((prices, basis)) => Message::Bid { auction, prices, basis },
            Err(refusal) => Message::Refusal { auction, refusal },
        };
        self.sends.push((from, message));
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
        let checked = if crate::codec::encode(&*award.record).len() > MAX_RECORD {
            Err("a record larger than records are".to_owned())
        } else if award.record.auctioneer != from {
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
            let elsewhere = self.catalog.placements_of(&spec.id).filter(|other| {
                other.replica == placement.replica
                    && other.node != self.me
                    && other.fact.state.is_active()
                    && self.membership.is_live(&other.node)
            });
            if let Some(epoch) = elsewhere.map(|other| other.fact.epoch).max().filter(|epoch| *epoch >= placement.epoch)
            {
                return Err(Refusal::Superseded { epoch });
            }
            let here = self.has_image(&spec.image.root);
            self.worker.award(from, placement, &spec, award, fact.generation, here, (now, wall))
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
            // Also of a removed workload: its container is still to be stopped.
            let Some(Said::Workload { spec, .. }) = self.said(&Key::Workload(workload)) else {
                // Its workload is forgotten here: whatever is left of it goes, and the others are told.
                let placement = PlacementId { workload, replica, epoch: fact.epoch };
                self.effect(Effect::Remove { placement }, Owner::Placement(placement));
                self.publish(Key::Placement(self.me, workload, replica), &Body::Gone, now);
                continue;
            };
            let spec = Arc::clone(spec);
            self.worker.restore(workload, replica, spec, fact);
        }
    }

    // As auctioneer.

    fn hold_auction(&mut self, workload: WorkloadId, missing: Vec<Missing>, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload) else { return };
        let signed = Arc::clone(wanted.signed);
        let spec = Arc::clone(wanted.spec);
        let cause = missing.iter().map(|replica| replica.cause).next().unwrap_or(Cause::Missing);
        let crowded: BTreeSet<NodeId> = self
            .catalog
            .placements_of(&workload)
            .filter(|placement| placement.fact.state.is_active() && self.membership.is_live(&placement.node))
            .map(|placement| placement.node)
            .collect();
        let replicas: Vec<(u32, u64)> = missing.iter().map(|replica| (replica.replica, replica.epoch)).collect();
        let (candidates, ask) = self.candidates(&spec, replicas.len());
        let lot = Lot { workload, signed, replicas, cause, crowded };
        let at = self.wall_at(now);
        self.with_auctioneer(now, |auctioneer, cx| auctioneer.open(lot, candidates, ask, at, cx));
    }

    /// Whom to ask, in which order, and how many at first.
    fn candidates(&mut self, spec: &Spec, replicas: usize) -> (Vec<NodeId>, usize) {
        let suits = |node: &NodeId| {
            self.catalog.node(node).is_none_or(|fact| {
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
        (nodes, ask)
    }

    pub(super) fn auction_ended(&mut self, end: auction::Ended, now: Instant) {
        match end {
            Ended::Placed { placement, node, record } => {
                self.tell(Event::Placed { placement, node, record });
            }
            Ended::NoTaker { workload, record } => {
                self.custody.no_taker(workload, now);
                if self.catalog.workload(&workload).is_some() {
                    self.publish(Key::Pending(self.me, workload), &Body::Pending(record.clone()), now);
                }
                self.tell(Event::Pending { workload, record: Arc::new(record) });
            }
        }
    }

    // As custodian.

    fn missing(&self, wanted: &Workload<'_>) -> Vec<Missing> {
        let missing = custody::missing(wanted, &self.catalog, |node| self.membership.is_live(node));
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

    fn role_of(&self, node: &NodeId) -> Option<Role> {
        self.catalog.node(node)?.chain.leaf().map(|leaf| leaf.role)
    }

    /// Compares what is wanted of a workload with what the catalog shows; if this node is its first custodian and the
    /// time has come, holds an auction for the difference.
    pub(super) fn look_after(&mut self, workload: WorkloadId, now: Instant) {
        let Some(wanted) = self.catalog.workload(&workload) else {
            self.lacking.remove(&workload);
            return self.custody.settled(&workload);
        };
        let missing = custody::missing(&wanted, &self.catalog, |node| self.membership.is_live(node));
        if missing.is_empty() {
            self.lacking.remove(&workload)
        } else {
            self.lacking.insert(workload)
        };
        if missing.is_empty() && wanted.spec.auto_remove && self.is_over(&workload) {
            let may_remove = |node: &NodeId| self.role_of(node) >= Some(Role::Submitter);
            let removers = self.membership.live().chain([self.me]).filter(may_remove);
            if custody::first(&workload, removers) == Some(self.me) {
                // If it may not any more, another will when it has noticed.
                let _refused = self.remove(workload, now);
            }
            return self.custody.settled(&workload);
        }
        let missing = self.not_held(&workload, missing);
        let members = self.membership.live().chain([self.me]);
        if missing.is_empty() || custody::first(&workload, members) != Some(self.me) {
            return self.custody.settled(&workload);
        }
        let urgent = missing.iter().any(|replica| matches!(replica.cause, Cause::NodeDown(_)));
        if self.custody.is_due(workload, urgent, now) {
            if self.auctioneer.has_room() {
                self.hold_auction(workload, missing, now);
            } else {
                self.custody.wait(&workload, now);
            }
        }
    }
}

fn refused(error: NotTaken) -> Refused {
    match error {
        NotTaken::Full { limit } => Refused::Full { limit },
        error => Refused::Spec(error.to_string()),
    }
}

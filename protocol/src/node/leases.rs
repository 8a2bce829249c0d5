//! What this node does about singletons: as holder of leases, and as custodian that grants them (see [`crate::lease`]).

use std::time::Duration;

use super::Node;
use crate::auction::{Cause, Record, Refusal};
use crate::catalog::{Body, Key, Said};
use crate::codec;
use crate::contract::{Event, RecordKey, Refused, Reply};
use crate::custody;
use crate::id::{NodeId, WorkloadId};
use crate::lease::{News, REPLACE, Seats, seats_for};
use crate::membership::State;
use crate::message::Message;
use crate::time::Instant;
use crate::trust::Role;
use crate::workload::PlacementId;

/// Between two looks at the custodians of this node's singletons.
pub(super) const TEND: Duration = Duration::from_secs(1);

impl Node {
    /// Those that grant a new workload's leases: the first of the live members, as many as such a mesh has.
    pub(super) fn custodians(&self, workload: &WorkloadId) -> Vec<NodeId> {
        let mut nodes = self.by_rank(workload);
        nodes.truncate(seats_for(self.membership.live_count() + 1));
        if nodes.is_empty() {
            // All of them are being drained.
            nodes.push(self.me);
        }
        nodes
    }

    /// Live members that are to stay, the first custodian first.
    fn by_rank(&self, workload: &WorkloadId) -> Vec<NodeId> {
        let members = self.membership.members().filter(|(_, member)| member.state == State::Alive);
        let stays = |node: &NodeId| !self.catalog.is_draining(node);
        let mut nodes: Vec<NodeId> = members.map(|(node, _)| *node).chain([self.me]).filter(stays).collect();
        nodes.sort_by_cached_key(|node| std::cmp::Reverse(custody::rank(workload, node)));
        nodes
    }

    pub(super) fn want_lease(&mut self, placement: PlacementId, now: Instant) {
        let known = self.custodian.seats(&placement.workload);
        let told = self.catalog.seats_of(&placement.workload);
        let latest = known.into_iter().chain(told).max_by_key(|seats| seats.term).cloned();
        if let Some(seats) = latest {
            self.holder.begin(placement, seats, now);
        }
    }

    /// The seats of a workload, as the catalog has them, may be later ones.
    pub(super) fn learn_seats(&mut self, workload: WorkloadId, now: Instant) {
        if let Some(seats) = self.catalog.seats_of(&workload).cloned() {
            self.custodian.keep(&workload);
            self.custodian.learn(workload, &seats, now);
            self.holder.learn(&workload, &seats, now);
        }
    }

    /// A member says which seats a workload has now: it is believed if it had one of those before.
    fn told_seats(&mut self, from: &NodeId, workload: WorkloadId, seats: &Seats, now: Instant) {
        let own = self.custodian.seats(&workload);
        let known = own.into_iter().chain(self.catalog.seats_of(&workload)).max_by_key(|seats| seats.term);
        if known.is_some_and(|known| known.may_become(seats, from)) {
            self.custodian.learn(workload, seats, now);
            self.holder.learn(&workload, seats, now);
        }
    }

    /// Whether a member may have a lease of that: the mesh wants it, and it was awarded to that member.
    fn was_awarded(&self, from: &NodeId, placement: &PlacementId) -> bool {
        let wanted = self.catalog.workload(&placement.workload);
        let held = || {
            let own = self.worker.placement(&placement.workload, placement.replica).map(|held| held.fact.epoch);
            let told = self.catalog.placement(*from, placement.workload, placement.replica);
            own.filter(|_| *from == self.me).or(told.map(|told| told.fact.epoch))
        };
        wanted.is_some_and(|wanted| wanted.spec.singleton) && held() == Some(placement.epoch)
    }

    /// Takes one of the messages about leases and seats.
    pub(super) fn lease_message(&mut self, from: NodeId, message: Message, now: Instant) {
        match message {
            Message::LeaseRequest { placement, seats, seq } => {
                let answer = if self.was_awarded(&from, &placement) {
                    self.custodian.requested(from, placement, &seats, seq, now)
                } else {
                    Message::LeaseDenied { placement, seq, seats: None }
                };
                self.sends.push((from, answer));
            }
            Message::LeaseGranted { placement, term, seq } => self.holder.granted(from, placement, term, seq),
            Message::LeaseDenied { placement, seats: Some(seats), .. } => {
                self.told_seats(&from, placement.workload, &seats, now);
            }
            Message::LeaseRelease { placement } => self.custodian.released(from, placement, now),
            Message::SeatsPrepare { workload, term, ballot } => {
                self.sends.extend(self.custodian.prepare(from, workload, term, ballot).map(|answer| (from, answer)));
            }
            Message::SeatsPromise { workload, term, ballot, accepted } => {
                self.sends.extend(self.custodian.promised(from, workload, (term, ballot), accepted));
            }
            Message::SeatsAccept { workload, ballot, seats } => {
                let vote = self.custodian.accept(from, workload, ballot, seats, now);
                self.sends.extend(vote.map(|answer| (from, answer)));
            }
            Message::SeatsAccepted { workload, term, ballot } => {
                self.sends.extend(self.custodian.voted(from, workload, term, ballot, now));
            }
            Message::SeatsDecided { workload, seats } => self.told_seats(&from, workload, &seats, now),
            _ => {}
        }
        self.keep_seats(now);
    }

    /// Writes down what a custodian must not forget, and tells the mesh of seats that were decided here.
    pub(super) fn keep_seats(&mut self, now: Instant) {
        for (workload, record) in self.custodian.take_records() {
            self.records.insert(RecordKey::Seat(workload), record.map(|record| codec::encode(&record)));
        }
        for (workload, seats) in self.custodian.take_decided() {
            self.holder.learn(&workload, &seats, now);
            let names: Vec<String> = seats.nodes.iter().map(NodeId::short).collect();
            let text = format!("its custodians are now {} (term {})", names.join(", "), seats.term);
            self.tell(Event::Noted { workload, text });
            self.publish(Key::Seats(self.me, workload), &Body::Seats(seats), now);
        }
    }

    /// What became of leases that are held here.
    pub(super) fn lease_news(&mut self, news: News, now: Instant) {
        match news {
            News::Until(placement, until) => self.worker.leased(placement, until, now),
            News::Lapsed(placement) => self.worker.lapsed(placement),
        }
    }

    /// Sees to it that the singletons this node is custodian of have enough others: replaces the lost, adds in a mesh
    /// that has grown, and ends what another has begun.
    pub(super) fn tend_seats(&mut self, now: Instant) {
        let catalog = &self.catalog;
        self.custodian.expire(now, |workload| catalog.get(&Key::Workload(*workload)).is_some());
        let seated: Vec<(WorkloadId, Seats)> =
            self.custodian.seated().map(|(workload, seats)| (workload, seats.clone())).collect();
        let members = self.membership.live_count() + 1;
        for (workload, seats) in seated {
            let lost = |node: &NodeId| {
                let member = self.membership.member(node);
                let gone = member.is_none_or(|member| {
                    !member.state.is_live() && (member.state == State::Left || now.since(member.changed) > REPLACE)
                });
                (*node != self.me && gone) || self.catalog.is_draining(node)
            };
            let needed = seats.nodes.iter().any(lost) || seats.nodes.len() < seats_for(members);
            let stuck = self.custodian.is_stuck(&workload, now);
            // Where all are to go, the first of them sees to it that others come.
            let first = seats.nodes.iter().find(|node| !lost(node)).or(seats.nodes.first()) == Some(&self.me);
            let value = match self.custodian.accepted(&workload) {
                Some(accepted) => Some(accepted.clone()),
                None if needed && first => seats.changed(lost, &self.by_rank(&workload), members),
                None => None,
            };
            let own = Key::Seats(self.me, workload);
            let unsaid = !matches!(self.said(&own), Some(Said::Seats(said)) if *said == seats);
            let told = self.catalog.seats_of(&workload);
            if unsaid && told.is_some_and(|told| told.may_become(&seats, &self.me)) {
                // Whoever told of them is gone, and what it told with it; this node's word is believed.
                self.publish(Key::Seats(self.me, workload), &Body::Seats(seats.clone()), now);
            }
            if let Some(value) = value.filter(|_| stuck || (needed && first)) {
                self.sends.extend(self.custodian.propose(workload, value, now));
            }
        }
        self.keep_seats(now);
    }

    /// Whether a majority of a singleton's custodians is live, as far as this node sees.
    pub(super) fn has_majority(&self, workload: &WorkloadId) -> bool {
        let Some(seats) = self.catalog.seats_of(workload) else { return true };
        let seats = self.custodian.seats(workload).filter(|known| known.term > seats.term).unwrap_or(seats);
        seats.nodes.iter().filter(|node| self.membership.is_live(node)).count() >= seats.majority()
    }

    /// No lease could be had, so no auction is held; whoever asks is told why.
    pub(super) fn without_majority(&mut self, workload: WorkloadId, now: Instant) {
        self.custody.settled(&workload);
        self.custody.look_at(workload, now + Duration::from_secs(5));
        if self.catalog.pending(&workload).is_some() {
            return;
        }
        let seats = self.catalog.seats_of(&workload).cloned();
        let dead = seats.into_iter().flat_map(|seats| seats.nodes).filter(|node| !self.membership.is_live(node));
        let refusals: Vec<(NodeId, Refusal)> = dead.map(|node| (node, Refusal::NoMajority)).collect();
        let (members, took) = (self.membership.live_count() as u32 + 1, Duration::ZERO);
        let (at, quotes, placed) = (self.wall_at(now), Vec::new(), Vec::new());
        let record = Record::new(self.me, at, Cause::Missing, (members, 0), took, quotes, refusals, placed);
        self.remember(workload, record.clone(), true, now);
        self.tell(Event::Pending { workload, record: std::sync::Arc::new(record) });
    }

    /// New custodians by an admin's order, though a majority of the old ones cannot be asked.
    pub(super) fn reseat(&mut self, workload: WorkloadId, now: Instant) -> Result<Reply, Refused> {
        let known = self.catalog.workload(&workload).ok_or(Refused::NoWorkload(workload))?;
        if !known.spec.singleton {
            return Err(Refused::Spec(format!("{} is no singleton: it has no custodians of its own", known.spec.name)));
        }
        let role = self.chain.leaf().map(|leaf| leaf.role);
        if role < Some(Role::Admin) {
            let role = role.map_or_else(String::new, |role| role.to_string());
            return Err(Refused::NotAllowed(format!("this node is a {role}, and only an admin may force custodians")));
        }
        if self.has_majority(&workload) {
            return Err(Refused::NotAllowed(format!(
                "a majority of the custodians of {} is alive: they replace the others by themselves",
                known.spec.name
            )));
        }
        let nodes = self.custodians(&workload);
        let told = self.catalog.seats_of(&workload).into_iter().chain(self.custodian.seats(&workload));
        let latest = told.max_by_key(|seats| seats.term).cloned();
        let seats = match latest {
            Some(latest) => latest.forced(nodes).ok_or_else(|| {
                let name = &known.spec.name;
                Refused::NotAllowed(format!("the custodians of {name} were forced too often: remove it, run it anew"))
            })?,
            None => Seats::first(nodes),
        };
        // No part of the workload's own fact: whoever changes that elsewhere at the same time would undo it unknowingly.
        let said = self.try_publish(Key::Seats(self.me, workload), &Body::Seats(seats), now);
        said.map_err(|error| Refused::NotAllowed(error.to_string()))?;
        Ok(Reply::Done)
    }

    /// Before a node is a member no more, and what it said is forgotten: an admin says itself which custodians there are
    /// where that node, or one that falls with it, was among those who told of them.
    pub(super) fn anchor_seats(&mut self, node: &NodeId, now: Instant) {
        if self.chain.leaf().is_none_or(|leaf| leaf.role < Role::Admin) {
            return;
        }
        let falls = |author: &NodeId| {
            let chain = self.catalog.node(author).map(|fact| &fact.chain);
            author == node || chain.is_some_and(|chain| chain.issuers().any(|issuer| issuer == *node))
        };
        let leads = |workload: &WorkloadId| self.catalog.told_seats(workload).any(|(author, _)| falls(author));
        let singletons = self.catalog.workloads().filter(|known| known.fact.seats.is_some() && leads(&known.spec.id));
        let seats =
            singletons.filter_map(|known| Some((known.spec.id, self.catalog.seats_of(&known.spec.id)?.clone())));
        for (workload, seats) in seats.collect::<Vec<_>>() {
            self.publish(Key::Seats(self.me, workload), &Body::Seats(seats), now);
        }
    }
}

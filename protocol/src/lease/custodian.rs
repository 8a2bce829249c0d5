//! The custodian's side: what it has granted, and who may grant.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{LONG, MAX_SEATED, Seats};
use crate::id::{NodeId, WorkloadId};
use crate::message::Message;
use crate::time::Instant;
use crate::workload::PlacementId;

/// Orders proposals: the round, then who proposes.
pub type Ballot = (u64, NodeId);
/// A proposal that has not been decided after this is given up, and made again with a higher ballot.
const PATIENCE: Duration = Duration::from_secs(1);

/// What must survive a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatRecord {
    seats: Seats,
    promised: Option<Ballot>,
    accepted: Option<(Ballot, Seats)>,
}

#[derive(Debug)]
struct Lease {
    epoch: u64,
    node: NodeId,
    until: Instant,
}

#[derive(Debug)]
struct Seat {
    record: SeatRecord,
    /// New among the seats: grants nothing before.
    quiet_until: Instant,
    /// Since when the workload is not wanted any more. It may be wanted again: what was granted is remembered.
    gone: Option<Instant>,
    /// Since when something accepted waits to be decided.
    accepted_at: Instant,
    leases: BTreeMap<u32, Lease>,
    proposal: Option<Proposal>,
}

#[derive(Debug)]
struct Proposal {
    ballot: Ballot,
    value: Seats,
    promises: BTreeMap<NodeId, Option<(Ballot, Seats)>>,
    accepted: BTreeSet<NodeId>,
    accepting: bool,
    until: Instant,
}

/// All workloads that this node is, was, or may become custodian of.
#[derive(Debug)]
pub struct Custodian {
    me: NodeId,
    /// It may have forgotten what an earlier life granted: grants nothing before.
    quiet_until: Instant,
    seats: BTreeMap<WorkloadId, Seat>,
    /// What is to be written down.
    dirty: BTreeSet<WorkloadId>,
    decided: Vec<(WorkloadId, Seats)>,
}

impl Custodian {
    /// One that has just started.
    pub fn new(me: NodeId, now: Instant) -> Custodian {
        Custodian { me, quiet_until: now + LONG, seats: BTreeMap::new(), dirty: BTreeSet::new(), decided: Vec::new() }
    }

    /// Takes up what an earlier life wrote down.
    pub fn restore(&mut self, workload: WorkloadId, record: SeatRecord) {
        let (quiet_until, accepted_at) = (self.quiet_until, Instant::ZERO);
        let leases = BTreeMap::new();
        let seat = Seat { record, quiet_until, gone: None, accepted_at, leases, proposal: None };
        self.seats.insert(workload, seat);
    }

    /// Nothing was granted by anybody before this moment: a simulated mesh begins so.
    pub fn resume(&mut self, now: Instant) {
        self.quiet_until = now;
    }

    /// The latest seats of a workload that this node knows of.
    pub fn seats(&self, workload: &WorkloadId) -> Option<&Seats> {
        self.seats.get(workload).map(|seat| &seat.record.seats)
    }

    /// These are the seats of a workload, unless later ones are known.
    pub fn learn(&mut self, workload: WorkloadId, seats: &Seats, now: Instant) {
        if !seats.is_good() {
            return;
        }
        match self.seats.get(&workload).map(|seat| seat.record.seats.term) {
            Some(term) if term >= seats.term => return,
            Some(_) => {}
            // Others' workloads are no business of this node's.
            None if !seats.nodes.contains(&self.me) || !self.make_room() => return,
            None => {}
        }
        let known = self.seats.remove(&workload);
        let had_a_seat = |seat: &Seat| {
            seat.record.seats.nodes.contains(&self.me) && seat.record.seats.term.checked_add(1) == Some(seats.term)
        };
        // Nobody granted anything before the first term. Before any other somebody did, and only who had a seat in the
        // very term before knows enough of it; one that was new then still is.
        let quiet_until = match &known {
            Some(seat) if had_a_seat(seat) => seat.quiet_until,
            None if seats.term == 1 => self.quiet_until,
            _ => now + LONG,
        };
        let gone = known.as_ref().and_then(|seat| seat.gone);
        let leases = known.map(|seat| seat.leases).unwrap_or_default();
        let record = SeatRecord { seats: seats.clone(), promised: None, accepted: None };
        let seat = Seat { record, quiet_until, gone, accepted_at: now, leases, proposal: None };
        self.seats.insert(workload, seat);
        self.dirty.insert(workload);
    }

    /// Whether there is room for another workload; what was removed longest ago makes way for it.
    fn make_room(&mut self) -> bool {
        if self.seats.len() < MAX_SEATED {
            return true;
        }
        let gone = self.seats.iter().filter_map(|(workload, seat)| Some((seat.gone?, *workload)));
        let Some((_, oldest)) = gone.min() else { return false };
        self.seats.remove(&oldest);
        self.dirty.insert(oldest);
        true
    }

    /// The workload is wanted: again, if it was removed on one side of a cut and changed on the other.
    pub fn keep(&mut self, workload: &WorkloadId) {
        if let Some(seat) = self.seats.get_mut(workload) {
            seat.gone = None;
        }
    }

    /// The workload is removed.
    pub fn forget(&mut self, workload: &WorkloadId, now: Instant) {
        if let Some(seat) = self.seats.get_mut(workload) {
            seat.gone.get_or_insert(now);
        }
    }

    /// Forgets what has been gone for so long that nothing granted for it can last, and that nobody remembers any more:
    /// until then it may come back.
    pub fn expire(&mut self, now: Instant, is_remembered: impl Fn(&WorkloadId) -> bool) {
        let old = |seat: &Seat| seat.gone.is_some_and(|gone| now.since(gone) > LONG * 2);
        let old: Vec<WorkloadId> = self
            .seats
            .iter()
            .filter(|(workload, seat)| old(seat) && !is_remembered(workload))
            .map(|(workload, _)| *workload)
            .collect();
        for workload in old {
            self.seats.remove(&workload);
            self.dirty.insert(workload);
        }
    }

    /// What changed and is to be written down before anything is answered; `None` is to be deleted.
    pub fn take_records(&mut self) -> Vec<(WorkloadId, Option<SeatRecord>)> {
        let dirty = std::mem::take(&mut self.dirty).into_iter();
        dirty.map(|workload| (workload, self.seats.get(&workload).map(|seat| seat.record.clone()))).collect()
    }

    /// Seats that a majority decided on, as this node is the first to know.
    pub fn take_decided(&mut self) -> Vec<(WorkloadId, Seats)> {
        std::mem::take(&mut self.decided)
    }

    /// A node asks for a lease, or for more time. The caller has seen that it was awarded the placement.
    pub fn requested(
        &mut self,
        from: NodeId,
        placement: PlacementId,
        seats: &Seats,
        seq: u64,
        now: Instant,
    ) -> Message {
        let denied = |seats: Option<Seats>| Message::LeaseDenied { placement, seq, seats };
        let (me, quiet_until) = (self.me, self.quiet_until);
        let Some(seat) = self.seats.get_mut(&placement.workload) else { return denied(None) };
        let current = &seat.record.seats;
        if *current != *seats || !current.nodes.contains(&me) {
            return denied(Some(current.clone()));
        }
        // Whoever has voted for the next term grants nothing in this one.
        if seat.record.accepted.is_some() || now < seat.quiet_until.max(quiet_until) {
            return denied(None);
        }
        let held = seat.leases.get(&placement.replica);
        let free = held.is_none_or(|lease| {
            // A node hands over to its own next placement: it starts none before the one before has ended.
            let same = lease.epoch <= placement.epoch && lease.node == from;
            same || lease.until <= now
        });
        if !free {
            return denied(None);
        }
        let lease = Lease { epoch: placement.epoch, node: from, until: now + LONG };
        seat.leases.insert(placement.replica, lease);
        Message::LeaseGranted { placement, term: seats.term, seq }
    }

    /// A holder's container has ended: nobody has to wait for its lease.
    pub fn released(&mut self, from: NodeId, placement: PlacementId, now: Instant) {
        let Some(seat) = self.seats.get_mut(&placement.workload) else { return };
        let own = |lease: &&mut Lease| lease.epoch == placement.epoch && lease.node == from;
        if let Some(lease) = seat.leases.get_mut(&placement.replica).filter(own) {
            lease.until = now;
        }
    }

    /// Whether this node is to see to a change of the seats, or to end one that was begun.
    pub fn is_stuck(&self, workload: &WorkloadId, now: Instant) -> bool {
        let Some(seat) = self.seats.get(workload) else { return false };
        seat.record.accepted.is_some() && now.since(seat.accepted_at) > PATIENCE * 2
    }

    /// Proposes `value` for the next term, unless a proposal of this node's is under way.
    pub fn propose(&mut self, workload: WorkloadId, value: Seats, now: Instant) -> Vec<(NodeId, Message)> {
        let me = self.me;
        let Some(seat) = self.seats.get_mut(&workload) else { return Vec::new() };
        if !seat.record.seats.nodes.contains(&me) || seat.proposal.as_ref().is_some_and(|known| known.until > now) {
            return Vec::new();
        }
        let before = seat.proposal.as_ref().map_or(0, |known| known.ballot.0);
        let round = seat.record.promised.map_or(0, |ballot| ballot.0).max(before).saturating_add(1);
        let ballot = (round, me);
        // Written down before it is said: no later life uses it for something else.
        seat.record.promised = Some(ballot);
        self.dirty.insert(workload);
        let term = seat.record.seats.term;
        seat.proposal = Some(Proposal {
            ballot,
            value,
            promises: BTreeMap::new(),
            accepted: BTreeSet::new(),
            accepting: false,
            until: now + PATIENCE,
        });
        let nodes = seat.record.seats.nodes.iter();
        nodes.map(|node| (*node, Message::SeatsPrepare { workload, term, ballot })).collect()
    }

    /// What this node has voted for, or would have.
    pub fn accepted(&self, workload: &WorkloadId) -> Option<&Seats> {
        self.seats.get(workload)?.record.accepted.as_ref().map(|(_, seats)| seats)
    }

    /// A proposer asks for a promise: to take part in no earlier proposal.
    pub fn prepare(&mut self, from: NodeId, workload: WorkloadId, term: u64, ballot: Ballot) -> Option<Message> {
        let me = self.me;
        let seat = self.seats.get_mut(&workload)?;
        let record = &mut seat.record;
        if record.seats.term > term {
            return Some(Message::SeatsDecided { workload, seats: record.seats.clone() });
        }
        let seated = record.seats.nodes.contains(&me) && record.seats.nodes.contains(&from);
        if record.seats.term < term
            || !seated
            || ballot.1 != from
            || record.promised.is_some_and(|promised| ballot < promised)
        {
            return None;
        }
        record.promised = Some(ballot);
        let accepted = record.accepted.clone();
        self.dirty.insert(workload);
        Some(Message::SeatsPromise { workload, term, ballot, accepted })
    }

    /// A promise came.
    pub fn promised(
        &mut self,
        from: NodeId,
        workload: WorkloadId,
        (term, ballot): (u64, Ballot),
        accepted: Option<(Ballot, Seats)>,
    ) -> Vec<(NodeId, Message)> {
        let Some(seat) = self.seats.get_mut(&workload) else { return Vec::new() };
        let seats = &seat.record.seats;
        let Some(proposal) = seat.proposal.as_mut().filter(|known| known.ballot == ballot && seats.term == term) else {
            return Vec::new();
        };
        if proposal.accepting || !seats.nodes.contains(&from) {
            return Vec::new();
        }
        let next = |(_, seats): &(Ballot, Seats)| seats.is_good() && seats.term.checked_sub(1) == Some(term);
        proposal.promises.insert(from, accepted.filter(next));
        if proposal.promises.len() < seats.majority() {
            return Vec::new();
        }
        // What may have been decided already is proposed again.
        if let Some((_, value)) = proposal.promises.values().flatten().max_by_key(|(ballot, _)| *ballot) {
            proposal.value = value.clone();
        }
        proposal.accepting = true;
        let accept = |node: &NodeId| (*node, Message::SeatsAccept { workload, ballot, seats: proposal.value.clone() });
        seats.nodes.iter().map(accept).collect()
    }

    /// A proposer asks for a vote.
    pub fn accept(
        &mut self,
        from: NodeId,
        workload: WorkloadId,
        ballot: Ballot,
        value: Seats,
        now: Instant,
    ) -> Option<Message> {
        let me = self.me;
        let seat = self.seats.get_mut(&workload)?;
        let record = &mut seat.record;
        let seated = record.seats.nodes.contains(&me) && record.seats.nodes.contains(&from);
        let stale = record.promised.is_some_and(|promised| ballot < promised);
        if !value.is_good()
            || value.term.checked_sub(1) != Some(record.seats.term)
            || !seated
            || ballot.1 != from
            || stale
        {
            return None;
        }
        record.promised = Some(ballot);
        record.accepted = Some((ballot, value));
        let term = record.seats.term;
        seat.accepted_at = now;
        self.dirty.insert(workload);
        Some(Message::SeatsAccepted { workload, term, ballot })
    }

    /// A vote came. With a majority of them the next seats are decided; everybody concerned is told.
    pub fn voted(
        &mut self,
        from: NodeId,
        workload: WorkloadId,
        term: u64,
        ballot: Ballot,
        now: Instant,
    ) -> Vec<(NodeId, Message)> {
        let Some(seat) = self.seats.get_mut(&workload) else { return Vec::new() };
        let seats = &seat.record.seats;
        let ours = |known: &&mut Proposal| known.ballot == ballot && known.accepting && seats.term == term;
        let Some(proposal) = seat.proposal.as_mut().filter(ours).filter(|_| seats.nodes.contains(&from)) else {
            return Vec::new();
        };
        proposal.accepted.insert(from);
        if proposal.accepted.len() < seats.majority() {
            return Vec::new();
        }
        let value = proposal.value.clone();
        let told: BTreeSet<NodeId> = seats.nodes.iter().chain(&value.nodes).copied().collect();
        self.learn(workload, &value, now);
        self.decided.push((workload, value.clone()));
        let me = self.me;
        let tell = |node: NodeId| (node, Message::SeatsDecided { workload, seats: value.clone() });
        told.into_iter().filter(|node| *node != me).map(tell).collect()
    }

    /// Workloads that this node has a seat for.
    pub fn seated(&self) -> impl Iterator<Item = (WorkloadId, &Seats)> {
        let own = |seat: &Seat| seat.gone.is_none() && seat.record.seats.nodes.contains(&self.me);
        let seats = self.seats.iter().filter(move |(_, seat)| own(seat));
        seats.map(|(workload, seat)| (*workload, &seat.record.seats))
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.seats.len() <= MAX_SEATED);
        for seat in self.seats.values() {
            assert!(seat.record.seats.is_good());
            if let Some((ballot, value)) = &seat.record.accepted {
                assert_eq!(value.term, seat.record.seats.term + 1);
                assert!(seat.record.promised.is_some_and(|promised| promised >= *ballot));
            }
        }
    }
}

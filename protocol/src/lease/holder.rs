//! The holder's side: until when a majority lets a replica run here.

use std::collections::BTreeMap;

use super::{ASK, MARGIN, RENEW, SHORT, Seats};
use crate::id::{NodeId, WorkloadId};
use crate::message::Message;
use crate::time::Instant;
use crate::workload::PlacementId;

/// Requests whose answers are still waited for, of one lease.
const MAX_ASKED: usize = 8;

/// What became of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It is held until then, at the least; [`MARGIN`] before that its container must be killed.
    Until(PlacementId, Instant),
    /// It was held, and ends in [`MARGIN`].
    Lapsed(PlacementId),
}

#[derive(Debug)]
struct Lease {
    placement: PlacementId,
    seats: Seats,
    /// When each request was sent.
    asked: BTreeMap<u64, Instant>,
    /// By whom it is granted, each with when that was asked for.
    grants: BTreeMap<NodeId, Instant>,
    until: Option<Instant>,
    next: Instant,
}

/// The leases that this node holds, or would hold.
#[derive(Debug, Default)]
pub struct Holder {
    seq: u64,
    leases: BTreeMap<(WorkloadId, u32), Lease>,
    news: Vec<News>,
}

impl Holder {
    /// One that numbers its requests from `seq` on: an answer to an earlier life's is not taken for one to its own.
    pub fn new(seq: u64) -> Holder {
        Holder { seq, ..Holder::default() }
    }

    /// A placement that may run here only with a lease.
    pub fn begin(&mut self, placement: PlacementId, seats: Seats, now: Instant) {
        let key = (placement.workload, placement.replica);
        if self.leases.get(&key).is_none_or(|known| known.placement != placement) {
            let (asked, grants) = (BTreeMap::new(), BTreeMap::new());
            self.leases.insert(key, Lease { placement, seats, asked, grants, until: None, next: now });
        }
    }

    /// It will not start again. Only where its container has surely `ended` the lease is given back.
    pub fn end(&mut self, placement: PlacementId, ended: bool) -> Vec<(NodeId, Message)> {
        let key = (placement.workload, placement.replica);
        match self.leases.remove(&key) {
            Some(lease) if lease.placement == placement && ended => {
                lease.seats.nodes.iter().map(|node| (*node, Message::LeaseRelease { placement })).collect()
            }
            Some(other) if other.placement != placement => {
                self.leases.insert(key, other);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// Later seats of a workload.
    pub fn learn(&mut self, workload: &WorkloadId, seats: &Seats, now: Instant) {
        for (_, lease) in self.leases.range_mut((*workload, 0)..=(*workload, u32::MAX)) {
            if lease.seats.term < seats.term && seats.is_good() {
                lease.seats = seats.clone();
                // What the old ones granted holds to its end; the new ones grant for themselves.
                lease.grants.clear();
                lease.asked.clear();
                lease.next = now;
            }
        }
    }

    /// A custodian has granted it.
    pub fn granted(&mut self, from: NodeId, placement: PlacementId, term: u64, seq: u64) {
        let key = (placement.workload, placement.replica);
        let Some(lease) = self.leases.get_mut(&key).filter(|known| known.placement == placement) else { return };
        if lease.seats.term != term || !lease.seats.nodes.contains(&from) {
            return;
        }
        let Some(asked) = lease.asked.get(&seq).copied() else { return };
        let known = lease.grants.entry(from).or_insert(asked);
        *known = asked.max(*known);
        let mut times: Vec<Instant> = lease.grants.values().copied().collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        if let Some(oldest) = times.get(lease.seats.majority() - 1) {
            let until = *oldest + SHORT;
            if lease.until.is_none_or(|known| known < until) {
                lease.until = Some(until);
                self.news.push(News::Until(placement, until));
            }
        }
    }

    /// Whether some placement here waits for its lease.
    pub fn waits(&self) -> bool {
        self.leases.values().any(|lease| lease.until.is_none())
    }

    /// Until when a placement may run, as far as this node knows.
    pub fn until(&self, placement: &PlacementId) -> Option<Instant> {
        let lease = self.leases.get(&(placement.workload, placement.replica))?;
        lease.until.filter(|_| lease.placement == *placement)
    }

    /// What changed since this was last asked.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// The time at which [`Holder::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.until.map_or(lease.next, |until| lease.next.min(last(until)))).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<(NodeId, Message)> {
        let mut out = Vec::new();
        for lease in self.leases.values_mut() {
            let placement = lease.placement;
            if lease.until.is_some_and(|until| last(until) <= now) {
                lease.until = None;
                self.news.push(News::Lapsed(placement));
            }
            if lease.next > now {
                continue;
            }
            lease.next = now + if lease.until.is_some() { RENEW } else { ASK };
            self.seq += 1;
            lease.asked.insert(self.seq, now);
            while lease.asked.len() > MAX_ASKED {
                lease.asked.pop_first();
            }
            let (seats, seq) = (&lease.seats, self.seq);
            let ask = |node: &NodeId| (*node, Message::LeaseRequest { placement, seats: seats.clone(), seq });
            out.extend(seats.nodes.iter().map(ask));
        }
        out
    }
}

/// When a container whose lease ends at `until` must be killed at the latest. A lease is never so short that this is
/// before it began.
fn last(until: Instant) -> Instant {
    Instant::from_nanos(until.as_nanos().saturating_sub(MARGIN.as_nanos() as u64))
}

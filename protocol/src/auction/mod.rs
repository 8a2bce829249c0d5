//! Which node runs a replica: announcement, bid, award (Contract Net, Smith 1980), immediate or cancel.
//!
//! **States of an auction.** *Asking* (until everybody asked has answered, or a deadline) → *Awarding* (each replica
//! has been promised to one bidder, whose verdict is awaited) → ended, each replica placed or without a taker. A gang
//! has a step between: *Holding* (every bidder of a plan that places all of it is asked to keep the room), so that it is
//! placed whole or not at all.
//!
//! **Who writes.** The auctioneer chooses the epoch and the winner and signs both ([`Award`]); the winner alone publishes
//! the placement, after pricing again under its own reservations, and the award with it: nobody believes a placement
//! that no member awarded. The auctioneer publishes how it came to that, in its [`Journal`] of the workload. A bid
//! reserves nothing; what is held for a gang is free again after a few seconds by itself.
//!
//! **If either side dies between two messages.** Before the award: nothing happened. After the award, before the
//! verdict: the auctioneer asks what became of it ([`Message::AwardQuery`]), three times; a bidder that never saw the
//! award answers so and refuses it from then on. If it stays silent the replica is awarded to the next bidder with the
//! next epoch: should the silent one run it after all, the catalog shows both and the lower epoch stops itself. If the
//! auctioneer dies, the custodian finds what is missing (see [`crate::custody`]). If a bidder dies between its yes to
//! a hold and its yes to the award, the rest of the gang is placed and that part is auctioned anew, as when its node dies
//! later.
//!
//! **Bounds.** [`MAX_AUCTIONS`] auctions at a time; a record keeps [`MAX_QUOTES`] quotes and as many refusals, the rest
//! counted.
//!
//! Differs from Contract Net: bids carry a price for each further replica, so many replicas are one auction; a timeout
//! is not a refusal. From Sparrow (Ousterhout, Wendell, Zaharia, Stoica 2013) come the sample of twice as many machines as
//! replicas and the late binding: an award is priced again where it arrives. Sparrow's probes wait in queues at the
//! machines; here what finds no place waits with its custodian, because a machine that is full may not be for long, or
//! may be gone.

mod award;
mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;

pub use award::Award;
pub use record::{Basis, Cause, Journal, MAX_QUOTES, MAX_RECORD, Quote, Record, Refusal};

use crate::catalog::Fact;
use crate::id::{NodeId, WorkloadId};
use crate::message::Message;
use crate::time::{Instant, UnixMillis};
use crate::trust::Chain;
use crate::workload::{Layout, PlacementId};

/// Everybody is asked in a mesh of up to this many nodes; in a larger one a sample.
pub const ASK_ALL: usize = 16;
/// The least sample.
pub const SAMPLE: usize = 10;
/// How many times as many are asked, at the most, when those asked first do not suffice.
pub const WIDEST: usize = 16;
/// With at least one bid, latecomers are not waited for longer than this.
const PATIENCE: Duration = Duration::from_millis(250);
/// With none, not longer than this.
const DEADLINE: Duration = Duration::from_secs(1);
/// Until the auctioneer asks what became of an award.
const VERDICT: Duration = Duration::from_millis(500);
/// How often it asks before it gives the replica to another.
const QUERIES: u32 = 3;
/// Auctions one node holds at a time; more wait with the custodian.
pub const MAX_AUCTIONS: usize = 256;
/// What each further replica on one node costs more, in milliseconds: replicas are there to survive a node.
const CROWDING: u32 = 50;
/// The same for what is to be spread.
const CROWDING_SPREAD: u32 = 1000;

/// What is to be placed.
#[derive(Clone, Debug)]
pub struct Lot {
    /// Of which workload.
    pub workload: WorkloadId,
    /// As its submitter signed it.
    pub signed: Arc<Fact>,
    /// Replicas, each with the epoch it is placed with.
    pub replicas: Vec<(u32, u64)>,
    /// Why now.
    pub cause: Cause,
    /// Nodes that run replicas of it already, and how many.
    pub crowded: BTreeMap<NodeId, u32>,
    /// How they are laid out.
    pub layout: Layout,
    /// All of them or none.
    pub gang: bool,
    /// Whether what runs in an earlier form on whoever takes it ends for it.
    pub in_place: bool,
}

/// How an auction ended for one workload.
#[derive(Clone, Debug)]
pub enum Ended {
    /// A bidder accepted.
    Placed {
        /// What.
        placement: PlacementId,
        /// Where.
        node: NodeId,
        /// How it came to that.
        record: Arc<Record>,
    },
    /// The auction is over.
    Closed {
        /// Of which workload.
        workload: WorkloadId,
        /// How it went, node by node.
        record: Record,
        /// Replicas that nobody would take.
        missing: usize,
    },
}

/// A plan for a whole gang, while its bidders are asked to keep the room.
#[derive(Debug)]
struct Holding {
    plan: BTreeMap<u32, NodeId>,
    waiting: BTreeSet<NodeId>,
    until: Instant,
}

#[derive(Debug)]
enum Need {
    /// To be awarded, with this epoch.
    Open(u64),
    /// Promised; a verdict is awaited.
    Awarded { epoch: u64, to: NodeId, next: Instant, queries: u32 },
}

#[derive(Debug)]
struct Auction {
    lot: Lot,
    opened: Instant,
    at: UnixMillis,
    members: u32,
    asked: BTreeSet<NodeId>,
    /// Candidates not asked yet, for widening.
    reserve: Vec<NodeId>,
    waiting: BTreeSet<NodeId>,
    asking_until: Option<Instant>,
    /// When the last of those asked were.
    asked_at: Instant,
    needs: BTreeMap<u32, Need>,
    bids: BTreeMap<NodeId, (Vec<u32>, Basis)>,
    won: BTreeMap<u32, (u64, NodeId)>,
    holding: Option<Holding>,
    refusals: BTreeMap<NodeId, Refusal>,
}

/// All auctions this node holds.
#[derive(Debug, Default)]
pub struct Auctioneer {
    next: u64,
    auctions: BTreeMap<u64, Auction>,
    ended: Vec<Ended>,
}

/// What the auctioneer needs of the world for one step.
pub struct Context<'a> {
    /// The monotonic clock.
    pub now: Instant,
    /// This node.
    pub me: NodeId,
    /// What it signs awards with.
    pub key: &'a SigningKey,
    /// And shows with them.
    pub chain: &'a Chain,
    /// Messages to send.
    pub out: &'a mut Vec<(NodeId, Message)>,
}

impl Auctioneer {
    /// Whether a replica of `workload` is being auctioned here.
    pub fn holds(&self, workload: &WorkloadId, replica: u32) -> bool {
        self.auctions.values().any(|auction| auction.lot.workload == *workload && auction.needs.contains_key(&replica))
    }

    /// Whether there is room for another auction.
    pub fn has_room(&self) -> bool {
        self.auctions.len() < MAX_AUCTIONS
    }

    /// Begins one. `candidates` are asked in their order: the first `ask` now, the others when those do not suffice.
    pub fn open(&mut self, lot: Lot, mut candidates: Vec<NodeId>, ask: usize, at: UnixMillis, cx: &mut Context<'_>) {
        self.next += 1;
        let reserve = candidates.split_off(ask.min(candidates.len()));
        let mut auction = Auction {
            needs: lot.replicas.iter().map(|(replica, epoch)| (*replica, Need::Open(*epoch))).collect(),
            lot,
            opened: cx.now,
            at,
            members: (candidates.len() + reserve.len()) as u32,
            asked: BTreeSet::new(),
            reserve,
            waiting: BTreeSet::new(),
            asking_until: None,
            asked_at: cx.now,
            bids: BTreeMap::new(),
            won: BTreeMap::new(),
            holding: None,
            refusals: BTreeMap::new(),
        };
        auction.ask(self.next, candidates, cx);
        self.auctions.insert(self.next, auction);
        self.advance(self.next, cx);
    }

    /// Takes one of this machine's messages.
    pub fn handle(&mut self, from: NodeId, message: Message, cx: &mut Context<'_>) {
        match message {
            Message::Bid { auction: id, mut prices, basis } => {
                let Some(auction) = self.auctions.get_mut(&id) else { return };
                if auction.waiting.remove(&from) {
                    prices.truncate(auction.needs.len());
                    auction.bids.insert(from, (prices, basis));
                }
                self.advance(id, cx);
            }
            Message::Refusal { auction: id, refusal } => {
                let Some(auction) = self.auctions.get_mut(&id) else { return };
                if auction.waiting.remove(&from) {
                    auction.refusals.insert(from, refusal.bounded());
                }
                self.advance(id, cx);
            }
            Message::Held { auction: id, refusal } => {
                let Some(auction) = self.auctions.get_mut(&id) else { return };
                auction.held(id, from, refusal.map(Refusal::bounded), cx);
                self.advance(id, cx);
            }
            Message::Verdict { placement, refusal } => {
                self.verdict(from, placement, refusal.map(Refusal::bounded), cx);
            }
            _ => {}
        }
    }

    /// A member is gone: nothing more is expected of it.
    pub fn peer_down(&mut self, node: &NodeId, cx: &mut Context<'_>) {
        let ids: Vec<u64> = self.auctions.keys().copied().collect();
        for id in ids {
            let Some(auction) = self.auctions.get_mut(&id) else { continue };
            if auction.waiting.remove(node) || auction.bids.remove(node).is_some() {
                auction.refusals.insert(*node, Refusal::NoAnswer);
            }
            auction.held(id, *node, Some(Refusal::NoAnswer), cx);
            for need in auction.needs.values_mut() {
                if let Need::Awarded { epoch, to, .. } = need
                    && to == node
                {
                    *need = Need::Open(*epoch + 1);
                }
            }
            self.advance(id, cx);
        }
    }

    /// The workload is not wanted any more.
    pub fn forget(&mut self, workload: &WorkloadId) {
        self.auctions.retain(|_, auction| auction.lot.workload != *workload);
    }

    /// The time at which [`Auctioneer::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.auctions.values().filter_map(Auction::next_timeout).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        let due = |auction: &Auction| auction.next_timeout().is_some_and(|at| at <= cx.now);
        let ids: Vec<u64> = self.auctions.iter().filter(|(_, auction)| due(auction)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(auction) = self.auctions.get_mut(&id) else { continue };
            auction.verdicts_due(cx);
            auction.holds_due(id, cx);
            self.advance(id, cx);
        }
    }

    /// How auctions ended since this was last asked.
    pub fn take_ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.auctions.len() <= MAX_AUCTIONS);
        for auction in self.auctions.values() {
            assert!(!auction.needs.is_empty(), "an auction without needs has ended");
            assert!(auction.waiting.is_subset(&auction.asked));
            assert!(auction.next_timeout().is_some(), "an open auction always ends by itself");
        }
    }

    fn verdict(&mut self, from: NodeId, placement: PlacementId, refusal: Option<Refusal>, cx: &mut Context<'_>) {
        let concerns = |auction: &Auction| {
            auction.lot.workload == placement.workload
                && matches!(auction.needs.get(&placement.replica),
                    Some(Need::Awarded { epoch, to, .. }) if *epoch == placement.epoch && *to == from)
        };
        let Some((&id, auction)) = self.auctions.iter_mut().find(|(_, auction)| concerns(auction)) else { return };
        match refusal {
            None => {
                auction.needs.remove(&placement.replica);
                auction.won.insert(placement.replica, (placement.epoch, from));
                let record = Arc::new(auction.record(cx));
                self.ended.push(Ended::Placed { placement, node: from, record });
            }
            Some(refusal) => {
                // It reserved nothing, so the same epoch may go to another; its other prices are stale too.
                auction.bids.remove(&from);
                // A bidder that knows a later epoch than the auctioneer did says so.
                let epoch = match &refusal {
                    // No epoch is later than the time (see `Fact::open`), whatever a bidder says.
                    Refusal::Superseded { epoch } => placement.epoch.max((*epoch).min(auction.at.0) + 1),
                    _ => placement.epoch,
                };
                auction.refusals.insert(from, refusal);
                auction.needs.insert(placement.replica, Need::Open(epoch));
            }
        }
        self.advance(id, cx);
    }

    fn advance(&mut self, id: u64, cx: &mut Context<'_>) {
        let Some(auction) = self.auctions.get_mut(&id) else { return };
        if auction.waiting.is_empty() {
            auction.asking_until = None;
        }
        if let Some(until) = auction.asking_until {
            let impatient = auction.has_offers() && cx.now >= auction.asked_at + PATIENCE;
            if cx.now < until && !impatient {
                return;
            }
            for late in std::mem::take(&mut auction.waiting) {
                auction.refusals.insert(late, Refusal::NoAnswer);
            }
            auction.asking_until = None;
        }
        if auction.holding.is_some() {
            return;
        }
        if !auction.lot.gang {
            auction.award(None, cx);
        } else if auction.hold(id, cx) {
            return;
        }
        let open = auction.needs.values().any(|need| matches!(need, Need::Open(_)));
        if open && !auction.reserve.is_empty() {
            // Nobody left to award to: ask more, twice as many as so far.
            let more = auction.reserve.len().min(auction.asked.len().max(SAMPLE));
            let more = auction.reserve.drain(..more).collect();
            auction.ask(id, more, cx);
            return;
        }
        if auction.needs.values().all(|need| matches!(need, Need::Open(_))) {
            let (workload, record, missing) = (auction.lot.workload, auction.record(cx), auction.needs.len());
            self.ended.push(Ended::Closed { workload, record, missing });
            self.auctions.remove(&id);
        }
    }
}

impl Auction {
    fn ask(&mut self, id: u64, nodes: Vec<NodeId>, cx: &mut Context<'_>) {
        self.asking_until = Some(cx.now + DEADLINE);
        self.asked_at = cx.now;
        let replicas = self.needs.len() as u32;
        for node in nodes {
            self.asked.insert(node);
            self.waiting.insert(node);
            let workload = Arc::clone(&self.lot.signed);
            let in_place = self.lot.in_place;
            cx.out.push((node, Message::Announcement { auction: id, workload, replicas, in_place }));
        }
    }

    /// Whether some bidder would take more than it was promised.
    fn has_offers(&self) -> bool {
        self.bids.iter().any(|(node, (prices, _))| {
            let awarded = |need: &&Need| matches!(need, Need::Awarded { to, .. } if to == node);
            let taken = self.needs.values().filter(awarded).count();
            prices.len() > taken + self.won.values().filter(|(_, winner)| winner == node).count()
        })
    }

    /// The cheapest bidder that is left for every open replica, as far as there are any.
    fn plan(&self) -> BTreeMap<u32, NodeId> {
        let mut promised: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (_, node) in self.won.values() {
            *promised.entry(*node).or_default() += 1;
        }
        for need in self.needs.values() {
            if let Need::Awarded { to, .. } = need {
                *promised.entry(*to).or_default() += 1;
            }
        }
        let crowding = match self.lot.layout {
            Layout::Balance => CROWDING,
            Layout::Spread => CROWDING_SPREAD,
            Layout::Pack => 0,
        };
        // Each bidder once, at the price of its next replica: the cheapest is first, and comes back at its next price.
        let offer = |node: &NodeId, taken: usize| {
            let (prices, _) = self.bids.get(node)?;
            let crowd = taken as u32 + self.lot.crowded.get(node).copied().unwrap_or(0);
            Some((prices.get(taken)?.saturating_add(crowd.saturating_mul(crowding)), *node, taken))
        };
        let next = |node: &NodeId| offer(node, promised.get(node).copied().unwrap_or(0));
        let mut offers: BTreeSet<(u32, NodeId, usize)> = self.bids.keys().filter_map(next).collect();
        let mut plan = BTreeMap::new();
        for (replica, need) in &self.needs {
            let Need::Open(_) = need else { continue };
            let Some((_, node, taken)) = offers.pop_first() else { break };
            offers.extend(offer(&node, taken + 1));
            plan.insert(*replica, node);
        }
        plan
    }

    /// Promises every open replica by a plan, or to the cheapest bidder that is left.
    fn award(&mut self, plan: Option<BTreeMap<u32, NodeId>>, cx: &mut Context<'_>) {
        let plan = plan.unwrap_or_else(|| self.plan());
        let chain = Arc::new(cx.chain.clone());
        for (replica, node) in plan {
            let Some(need) = self.needs.get_mut(&replica) else { continue };
            let Need::Open(epoch) = *need else { continue };
            *need = Need::Awarded { epoch, to: node, next: cx.now + VERDICT, queries: 0 };
            let placement = PlacementId { workload: self.lot.workload, replica, epoch };
            let award = Award::sign(&placement, &node, self.at, cx.key, Arc::clone(&chain));
            cx.out.push((node, Message::Award { placement, workload: Arc::clone(&self.lot.signed), award }));
        }
    }

    /// Asks for room for all of a gang; whether there is a plan for all of it, or a verdict is awaited.
    fn hold(&mut self, id: u64, cx: &mut Context<'_>) -> bool {
        let open = self.needs.values().filter(|need| matches!(need, Need::Open(_))).count();
        if open == 0 || open < self.needs.len() {
            // Verdicts of what was awarded come first.
            return open < self.needs.len();
        }
        let plan = self.plan();
        if plan.len() < open {
            if !plan.is_empty() {
                let part = Refusal::Part { found: plan.len() as u32, wanted: open as u32 };
                self.refusals.insert(cx.me, part);
            }
            return false;
        }
        let mut counts: BTreeMap<NodeId, u32> = BTreeMap::new();
        for node in plan.values() {
            *counts.entry(*node).or_default() += 1;
        }
        for (node, replicas) in &counts {
            let workload = Arc::clone(&self.lot.signed);
            cx.out.push((*node, Message::Hold { auction: id, workload, replicas: *replicas }));
        }
        let waiting = counts.into_keys().collect();
        self.holding = Some(Holding { plan, waiting, until: cx.now + VERDICT * 2 });
        true
    }

    /// A bidder keeps the room, or does not: then nobody has to, and another plan is made.
    fn held(&mut self, id: u64, from: NodeId, refusal: Option<Refusal>, cx: &mut Context<'_>) {
        let Some(holding) = &mut self.holding else { return };
        if !holding.waiting.remove(&from) && (refusal.is_none() || !holding.plan.values().any(|node| *node == from)) {
            return;
        }
        if let Some(refusal) = refusal {
            self.bids.remove(&from);
            self.refusals.insert(from, refusal);
            self.release(id, cx);
        } else if holding.waiting.is_empty() {
            let plan = self.holding.take().map(|holding| holding.plan);
            self.award(plan, cx);
        }
    }

    fn release(&mut self, id: u64, cx: &mut Context<'_>) {
        let plan = self.holding.take().map(|holding| holding.plan).unwrap_or_default();
        let nodes: BTreeSet<NodeId> = plan.into_values().collect();
        cx.out.extend(nodes.into_iter().map(|node| (node, Message::Unhold { auction: id })));
    }

    fn holds_due(&mut self, id: u64, cx: &mut Context<'_>) {
        let Some(holding) = self.holding.as_ref().filter(|holding| holding.until <= cx.now) else { return };
        for silent in holding.waiting.clone() {
            self.bids.remove(&silent);
            self.refusals.insert(silent, Refusal::NoAnswer);
        }
        self.release(id, cx);
    }

    fn verdicts_due(&mut self, cx: &mut Context<'_>) {
        for (replica, need) in &mut self.needs {
            let Need::Awarded { epoch, to, next, queries } = need else { continue };
            if *next > cx.now {
                continue;
            }
            if *queries < QUERIES {
                *queries += 1;
                *next = cx.now + VERDICT;
                let placement = PlacementId { workload: self.lot.workload, replica: *replica, epoch: *epoch };
                cx.out.push((*to, Message::AwardQuery { placement, at: self.at }));
            } else {
                self.bids.remove(to);
                self.refusals.insert(*to, Refusal::NoAnswer);
                *need = Need::Open(*epoch + 1);
            }
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        let verdicts = self.needs.values().filter_map(|need| match need {
            Need::Awarded { next, .. } => Some(*next),
            Need::Open(_) => None,
        });
        let asking = self.asking_until.map(|until| {
            let patience = self.asked_at + PATIENCE;
            if self.has_offers() { until.min(patience) } else { until }
        });
        let holding = self.holding.as_ref().map(|holding| holding.until);
        verdicts.chain(asking).chain(holding).min()
    }

    fn record(&self, cx: &Context<'_>) -> Record {
        let winners = self.needs.iter().filter_map(|(replica, need)| match need {
            Need::Awarded { to, .. } => Some((*to, *replica)),
            Need::Open(_) => None,
        });
        let winners: Vec<(NodeId, u32)> =
            winners.chain(self.won.iter().map(|(replica, (_, node))| (*node, *replica))).collect();
        let won = |node: &NodeId| winners.iter().filter(|(to, _)| to == node).map(|(_, replica)| *replica).collect();
        let quotes = self.bids.iter().filter_map(|(node, (prices, basis))| {
            Some(Quote { node: *node, price: *prices.first()?, basis: basis.clone(), won: won(node) })
        });
        Record::new(
            cx.me,
            self.at,
            self.lot.cause,
            (self.members, self.asked.len() as u32),
            cx.now.since(self.opened),
            quotes.collect(),
            self.refusals.iter().map(|(node, refusal)| (*node, refusal.clone())).collect(),
            self.won.iter().map(|(replica, (epoch, node))| (*replica, *epoch, *node)).collect(),
        )
    }
}

//! Who is alive: SWIM (Das, Gupta, Motivala 2002) with the corrections of Lifeguard (Dadgar, Phillips, Currey 2018).
//!
//! **States.** `Alive` → `Suspect` (a probe failed) → `Down` (nobody refuted in time) or `Left` (said so itself). A
//! higher incarnation undoes any of them, and only its owner raises it: to refute, or because it restarted (an
//! incarnation starts at the wall clock's milliseconds).
//!
//! **Who writes.** A member's incarnation and addresses: the member, signed. That it is suspect or down: whoever probed,
//! and only about what the member has said, so nobody can accuse it beyond its own last incarnation.
//!
//! **Probes.** Each interval the next member of a shuffled list is pinged. No answer in time: three helpers are asked
//! to ping it too. Helpers that hear nothing say so (Nack), which tells a prober with a bad link of its own (fewer
//! nacks than helpers) from a dead target: its health score rises and it becomes slower to accuse (LHM). A suspicion
//! lasts the longer the fewer others confirm it.
//!
//! **If either side dies between two messages** the other's timer ends the exchange; nothing is held for a reply but
//! one entry per probe and relay, each with a deadline.
//!
//! **Who is taken up.** A key is quickly made, and anybody can sign its own word with it. A node becomes a member here
//! once its certificates are known: it was admitted on a connection, or the catalog has its report. What is heard of
//! others waits, at most [`MAX_STRANGERS`] words of it, until the report comes.
//!
//! **Bounds.** [`MAX_MEMBERS`] members, [`MAX_UPDATES`] updates a message, one probe per interval, [`MAX_RELAYS`] relays.
//! Differs from the papers: members that are down are still offered a push-pull now and then, so that two halves of a
//! healed network meet again without help; and a random member is asked every [`RECONCILE`] whether it believes the
//! same, by reconciliation of fingerprints, because gossip alone leaves gaps (99.05 % after a minute at 100 nodes,
//! measured with foca): forty bytes between nodes in step, where Lifeguard's push-pull sends the whole list.

mod member;
mod rumours;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use fastrand::Rng;

use crate::id::{KeyHash, NodeId, Signature};
use crate::memo::Memo;
use crate::message::Message;
use crate::reconcile::{self, Index, Range};
use crate::time::Instant;
use member::{News, place};
use rumours::Rumours;

pub use member::{MAX_ADDRESSES, Member, State, Update, Word};

/// Between two probes of one node.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Until helpers are asked, and again until they have failed.
const PROBE_TIMEOUT: Duration = Duration::from_millis(300);
/// Helpers asked per failed probe.
const HELPERS: usize = 3;
/// Suspicion lasts at least this many probe intervals in a mesh of ten, and half as many more for each tenfold size: news
/// takes a round longer when the mesh is three times as large, and a round is [`GOSSIP`].
const SUSPICION_MULT: f64 = 2.0;
/// A suspicion that nobody confirms lasts so many times longer.
const SUSPICION_MAX: u32 = 2;
/// So many other accusers shorten it to the least, in a mesh that has as many.
const CONFIRMATIONS: usize = 2;
/// The worst local health: probes are then this many times slower, plus one (Lifeguard's S).
const MAX_HEALTH: u32 = 8;
/// Between two exchanges with a random member.
const RECONCILE: Duration = Duration::from_secs(15);
/// Between two tries to reach a member that is down.
const KNOCK: Duration = Duration::from_secs(3);
/// The same for a node that has just started and has met nobody yet: twice as long each time. Whoever knows nobody that is live
/// tries so many at once.
const KNOCK_ALONE: Duration = Duration::from_millis(200);
const KNOCKS_ALONE: usize = 3;
/// How often an update is passed on: this times log₂ of the mesh's size.
const RETRANSMIT: f64 = 2.0;
/// While there is news, it is sent to a few so often, besides what travels with probes.
const GOSSIP: Duration = Duration::from_millis(100);
/// To how many.
const GOSSIP_TO: usize = 3;
/// One in so many answers tells the prober what is believed of itself: a machine with a copy of another's key learns of
/// the other so.
const MIRROR: u64 = 8;
/// Bytes of updates in one message that answers a reconciliation.
const MOST_PUSHED: usize = 512 << 10;
/// Updates of one message that are looked at: more than fit one.
const MOST_HEARD: usize = 4096;
/// Messages of those in one answer; what is left over is found by the next exchange.
const MAX_PUSHES: usize = 8;
/// Updates on board of one probe message.
pub const MAX_UPDATES: usize = 12;
/// Probes relayed for others at one time; more are ignored, as if the request were lost.
const MAX_RELAYS: usize = 64;
/// Members of all states. Beyond it a new one is not taken until old ones are forgotten.
pub const MAX_MEMBERS: usize = 20_000;
/// Words of nodes whose certificates are not known yet; beyond it the one of the lowest id is dropped, and heard again.
const MAX_STRANGERS: usize = 4096;
/// A member that is down or left is forgotten after this.
const FORGET: Duration = Duration::from_secs(24 * 3600);

/// What the machine needs of the world for one step.
pub struct Context<'a> {
    /// The monotonic clock.
    pub now: Instant,
    /// The node's own randomness.
    pub rng: &'a mut Rng,
    /// Whether a node's certificates are known.
    pub certified: &'a dyn Fn(&NodeId) -> bool,
    /// Words that were checked before, in a simulated mesh.
    pub memo: Option<&'a Memo>,
    /// Messages to send.
    pub out: &'a mut Vec<(NodeId, Message)>,
}

/// Something that the rest of the node must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A member's state.
    State(NodeId, State),
    /// A member's addresses, or a new member.
    Addresses(NodeId),
    /// A member that has been gone for so long that it is not remembered any more.
    Forgotten(NodeId),
    /// Another machine has this node's key and started first.
    Cloned {
        /// When it started, in milliseconds since 1970.
        other_boot: u64,
    },
}

#[derive(Debug)]
struct Probe {
    target: NodeId,
    /// Its last word when the probe began: silence accuses that one, not what it has said since.
    incarnation: u64,
    asked_helpers: bool,
    /// When the next stage begins.
    next: Instant,
    nacks_due: u32,
    nacks: u32,
}

#[derive(Debug)]
struct Relay {
    origin: NodeId,
    origin_seq: u64,
    nack_at: Option<Instant>,
    until: Instant,
}

#[derive(Debug)]
struct Suspicion {
    since: Instant,
    /// Who suspects it: each after the first shortens the wait.
    accusers: Vec<NodeId>,
    /// How many confirmations shorten it to the least.
    expected: u32,
}

/// A walk over all members in an order of its own: each `stride`th, around and around, so that every one is probed once
/// in as many probes as there are members, without a shuffled list of them.
#[derive(Debug, Default)]
struct Round {
    left: usize,
    at: usize,
    stride: usize,
}

/// The member list of one node and the probes that keep it true.
#[derive(Debug)]
pub struct Membership {
    me: NodeId,
    key: SigningKey,
    boot: u64,
    incarnation: u64,
    addresses: Vec<String>,
    leaving: bool,
    /// This node too, so that nodes which believe the same have the same fingerprint.
    members: Index<Member>,
    /// How many others are live.
    live: usize,
    suspicions: BTreeMap<NodeId, Suspicion>,
    /// What nodes have said whose certificates are not known yet.
    strangers: BTreeMap<NodeId, News>,
    gossip: Rumours,
    round: Round,
    seq: u64,
    probes: BTreeMap<u64, Probe>,
    relays: BTreeMap<u64, Relay>,
    health: u32,
    next_probe: Instant,
    next_reconcile: Instant,
    next_knock: Instant,
    /// How long it waits for an answer, while it has met nobody.
    patience: Duration,
    next_gossip: Instant,
    changes: Vec<Change>,
}

impl Membership {
    /// A node alone. `boot` is when it started, in milliseconds since 1970, and its first incarnation.
    pub fn new(key: SigningKey, boot: u64, now: Instant) -> Self {
        let me = crate::trust::node_of(&key);
        let mut membership = Membership {
            key,
            me,
            boot,
            incarnation: boot,
            addresses: Vec::new(),
            leaving: false,
            members: Index::default(),
            live: 0,
            suspicions: BTreeMap::new(),
            strangers: BTreeMap::new(),
            gossip: Rumours::default(),
            round: Round::default(),
            seq: 0,
            probes: BTreeMap::new(),
            relays: BTreeMap::new(),
            health: 0,
            next_probe: now + PROBE_INTERVAL,
            next_reconcile: now + RECONCILE,
            next_knock: now + KNOCK,
            patience: KNOCK_ALONE,
            next_gossip: now,
            changes: Vec::new(),
        };
        membership.say(boot);
        membership
    }

    /// Takes up a member known from an earlier life; it counts as down until it answers.
    pub fn restore(&mut self, node: NodeId, addresses: Vec<String>, now: Instant) {
        if node != self.me && self.members.len() < MAX_MEMBERS {
            let word = Arc::new(Word::unheard(node, addresses));
            self.add(News { word, state: State::Down, accuser: None }, now);
            self.changes.push(Change::Addresses(node));
            self.next_knock = now;
        }
    }

    /// Takes up what another node believed at some moment: a simulated mesh begins from it.
    pub fn resume(&mut self, members: &[(Arc<Word>, State)], now: Instant) {
        for (word, state) in members {
            if word.node != self.me && self.members.len() < MAX_MEMBERS {
                self.add(News { word: Arc::clone(word), state: *state, accuser: None }, now);
            }
        }
    }

    /// This node's own word.
    pub fn own_word(&self) -> &Arc<Word> {
        &self.members.get(&place(&self.me)).expect("this node is in its own list").word
    }

    fn own_update(&self) -> Update {
        self.members.get(&place(&self.me)).and_then(Member::update).expect("this node has said something")
    }

    /// Everybody else this node knows of, in every state.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter().map(|member| (&member.word.node, member)).filter(|(node, _)| **node != self.me)
    }

    /// One member.
    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.get(&place(node)).filter(|member| member.word.node == *node && *node != self.me)
    }

    /// How many others this node knows of, in every state.
    pub fn count(&self) -> usize {
        self.members.len() - 1
    }

    /// How many others are live.
    pub fn live_count(&self) -> usize {
        self.live
    }

    /// Whether `node` may still be running: itself, or neither down nor gone.
    pub fn is_live(&self, node: &NodeId) -> bool {
        *node == self.me || self.member(node).is_some_and(|member| member.state.is_live())
    }

    /// Every live member but this one.
    pub fn live(&self) -> impl Iterator<Item = NodeId> {
        self.members().filter(|(_, member)| member.state.is_live()).map(|(node, _)| *node)
    }

    /// Up to `count` different members that suit, at random; all of them when there are not more.
    pub fn sample(&self, count: usize, rng: &mut Rng, suits: impl Fn(&Member) -> bool) -> Vec<NodeId> {
        let all = self.members.len();
        let suits = |member: &Member| member.word.node != self.me && suits(member);
        let mut found: Vec<NodeId> = Vec::with_capacity(count.min(all));
        // Most suit as a rule: looking here and there finds them without a walk through all.
        for _ in 0..if all > 8 * count { 4 * count } else { 0 } {
            if let Some(member) = self.members.nth(rng.usize(..all)).filter(|member| suits(member))
                && !found.contains(&member.word.node)
            {
                found.push(member.word.node);
                if found.len() == count {
                    return found;
                }
            }
        }
        let mut all: Vec<NodeId> = self.members.iter().filter(|member| suits(member)).map(|m| m.word.node).collect();
        rng.shuffle(&mut all);
        all.truncate(count);
        all
    }

    /// What changed since this was last asked.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Where this node says it listens.
    pub fn own_addresses(&self) -> &[String] {
        &self.addresses
    }

    /// This node's own addresses, told to everybody.
    pub fn set_addresses(&mut self, addresses: Vec<String>) {
        if self.addresses != addresses {
            self.addresses = addresses;
            self.addresses.truncate(MAX_ADDRESSES);
            self.say(self.incarnation.saturating_add(1));
        }
    }

    /// A connection proved that `node` is there; exchange members with it.
    pub fn meet(&mut self, node: NodeId, address: Option<String>, cx: &mut Context<'_>) {
        if node == self.me {
            return;
        }
        if self.member(&node).is_none() && self.members.len() < MAX_MEMBERS {
            // Until its own word comes, it counts as alive here, and is not passed on.
            let word = Arc::new(Word::unheard(node, address.into_iter().collect()));
            self.add(News { word, state: State::Alive, accuser: None }, cx.now);
            self.news(node, Some(State::Alive), true);
        }
        cx.out.push((node, Message::MembersPush { updates: vec![self.own_update()] }));
        self.reconcile(node, cx);
    }

    /// A node's certificates have become known: what it has said before counts now.
    pub fn certified(&mut self, node: NodeId, cx: &mut Context<'_>) {
        if let Some(news) = self.strangers.remove(&node) {
            self.apply(news, cx);
        }
    }

    /// A node is a member no more, and not to be heard again until its certificates are known anew.
    pub fn expel(&mut self, node: &NodeId) {
        self.strangers.remove(node);
        self.suspicions.remove(node);
        self.gossip.forget(node);
        if *node == self.me || self.member(node).is_none() {
            return;
        }
        if let Some(member) = self.members.remove(&place(node)) {
            self.live -= usize::from(member.state.is_live());
        }
        self.probes.retain(|_, probe| probe.target != *node);
    }

    /// Tells some members that this node goes. It answers no more probes afterwards.
    pub fn leave(&mut self, cx: &mut Context<'_>) {
        self.leaving = true;
        self.say(self.incarnation.saturating_add(1));
        let update = self.own_update();
        for node in self.sample(16, cx.rng, |member| member.state.is_live()) {
            cx.out.push((node, Message::Leave { update: update.clone() }));
        }
    }

    /// The time at which [`Membership::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Instant {
        let probes = self.probes.values().map(|probe| probe.next);
        let relays = self.relays.values().map(|relay| relay.nack_at.unwrap_or(relay.until));
        let suspicions = self.suspicions.values().map(|suspicion| self.suspicion_end(suspicion));
        let gossip = (!self.gossip.is_empty() && self.live > 0).then_some(self.next_gossip);
        let regular = [self.next_probe, self.next_reconcile, self.next_knock].into_iter().chain(gossip);
        probes.chain(relays).chain(suspicions).chain(regular).min().unwrap_or(self.next_probe)
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        self.relays_due(cx);
        self.probes_due(cx);
        self.suspicions_due(cx);
        if cx.now >= self.next_probe {
            self.next_probe = cx.now + PROBE_INTERVAL * (self.health + 1);
            self.probe_next(cx);
        }
        if cx.now >= self.next_gossip && !self.gossip.is_empty() {
            self.next_gossip = cx.now + GOSSIP;
            for node in self.sample(GOSSIP_TO, cx.rng, |member| member.state.is_live()) {
                let updates = self.take_updates(&node);
                if !updates.is_empty() {
                    cx.out.push((node, Message::MembersPush { updates }));
                }
            }
        }
        if cx.now >= self.next_reconcile {
            self.next_reconcile = cx.now + jitter(RECONCILE, cx.rng);
            self.forget_old(cx.now);
            for node in self.sample(1, cx.rng, |member| member.state.is_live()) {
                self.reconcile(node, cx);
            }
        }
        if cx.now >= self.next_knock {
            let (rest, some) = if self.live == 0 { (self.patience, KNOCKS_ALONE) } else { (KNOCK, 1) };
            self.patience = (rest * 2).min(KNOCK);
            self.next_knock = cx.now + jitter(rest, cx.rng);
            // Nobody is down as a rule, and then there is nothing to look for.
            if self.live < self.count() {
                for node in self.sample(some, cx.rng, |member| member.state == State::Down) {
                    cx.out.push((node, Message::MembersPush { updates: vec![self.own_update()] }));
                    self.reconcile(node, cx);
                }
            }
        }
    }

    /// Takes one of this machine's messages.
    pub fn handle(&mut self, from: NodeId, message: Message, cx: &mut Context<'_>) {
        match message {
            Message::Ping { seq, target, updates } => {
                self.apply_all(updates, from, cx);
                if target == self.me && !self.leaving {
                    let mut updates = self.take_updates(&from);
                    if seq.is_multiple_of(MIRROR) {
                        updates.extend(self.told(&from));
                    }
                    cx.out.push((from, Message::Ack { seq, updates }));
                }
            }
            Message::Ack { seq, updates } => {
                self.apply_all(updates, from, cx);
                self.acked(seq, cx);
            }
            Message::PingReq { seq, target, updates } => {
                self.apply_all(updates, from, cx);
                self.relay(from, seq, target, cx);
            }
            Message::Nack { seq } => {
                if let Some(probe) = self.probes.get_mut(&seq) {
                    probe.nacks += 1;
                }
            }
            Message::MembersPush { updates } => self.apply_all(updates, from, cx),
            Message::MembersReconcile { ranges } if !self.leaving => self.compare(from, ranges, cx),
            Message::MembersWant { keys } if !self.leaving => self.push(from, &keys, cx),
            Message::Leave { update } if update.node == from => {
                let _known = self.hear(Update { state: State::Left, ..update }, from, cx);
            }
            _ => {}
        }
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        let own = self.members.get(&place(&self.me)).expect("this node is in its own list");
        assert_eq!(own.incarnation, self.incarnation);
        assert_eq!(self.live, self.live().count());
        assert!(self.members.len() <= MAX_MEMBERS);
        assert!(self.strangers.len() <= MAX_STRANGERS);
        assert!(self.relays.len() <= MAX_RELAYS);
        assert!(self.health <= MAX_HEALTH);
        for node in self.suspicions.keys() {
            assert_eq!(self.member(node).map(|member| member.state), Some(State::Suspect));
        }
        let suspects = self.members.iter().filter(|member| member.state == State::Suspect).count();
        assert_eq!(suspects, self.suspicions.len(), "each suspect has a clock running");
    }

    /// This process was stopped for a while: whatever its timers say about others is void.
    pub fn thaw(&mut self, now: Instant) {
        self.probes.clear();
        self.relays.clear();
        for suspicion in self.suspicions.values_mut() {
            suspicion.since = now;
        }
        self.next_probe = self.next_probe.max(now + PROBE_INTERVAL);
    }

    // Probing.

    fn probe_next(&mut self, cx: &mut Context<'_>) {
        let Some(target) = self.next_target(cx.rng) else { return };
        self.seq += 1;
        let next = cx.now + PROBE_TIMEOUT * (self.health + 1);
        let incarnation = self.member(&target).map_or(0, |member| member.incarnation);
        self.probes.insert(self.seq, Probe { target, incarnation, asked_helpers: false, next, nacks_due: 0, nacks: 0 });
        self.ping(self.seq, target, cx);
    }

    fn next_target(&mut self, rng: &mut Rng) -> Option<NodeId> {
        let all = self.members.len();
        if self.live == 0 {
            return None;
        }
        // Two rounds at most: one may be at its end, the next meets a live member.
        for _ in 0..2 * all {
            if self.round.left == 0 {
                let coprime = |stride: &usize| gcd(*stride, all) == 1;
                let stride = std::iter::repeat_with(|| rng.usize(1..=all)).find(coprime).unwrap_or(1);
                self.round = Round { left: all, at: rng.usize(..all), stride };
            }
            self.round.left -= 1;
            self.round.at = (self.round.at + self.round.stride) % all;
            let member = self.members.nth(self.round.at)?;
            if member.state.is_live() && member.word.node != self.me {
                return Some(member.word.node);
            }
        }
        None
    }

    fn ping(&mut self, seq: u64, target: NodeId, cx: &mut Context<'_>) {
        let updates = self.take_updates(&target);
        cx.out.push((target, Message::Ping { seq, target, updates }));
    }

    fn probes_due(&mut self, cx: &mut Context<'_>) {
        let due: Vec<u64> = self.probes.iter().filter(|(_, probe)| probe.next <= cx.now).map(|(seq, _)| *seq).collect();
        for seq in due {
            let Some(probe) = self.probes.get_mut(&seq) else { continue };
            if probe.asked_helpers {
                let probe = self.probes.remove(&seq).expect("just seen");
                if self.member(&probe.target).is_none_or(|member| member.incarnation != probe.incarnation) {
                    // It has restarted, or refuted, meanwhile.
                    continue;
                }
                // Lifeguard: a missing nack means that this node, not the target, may be the one cut off.
                let missing = probe.nacks_due.saturating_sub(probe.nacks);
                self.health = (self.health + missing.max(u32::from(probe.nacks_due == 0))).min(MAX_HEALTH);
                self.suspect(probe.target, cx);
                continue;
            }
            probe.asked_helpers = true;
            probe.next = cx.now + PROBE_TIMEOUT * (self.health + 1);
            let target = probe.target;
            let suits = |member: &Member| member.state == State::Alive && member.word.node != target;
            let helpers = self.sample(HELPERS, cx.rng, suits);
            if let Some(probe) = self.probes.get_mut(&seq) {
                probe.nacks_due = helpers.len() as u32;
            }
            for helper in helpers {
                let updates = self.take_updates(&helper);
                cx.out.push((helper, Message::PingReq { seq, target, updates }));
            }
            // The first ping may have been lost; another costs little.
            self.ping(seq, target, cx);
        }
    }

    fn acked(&mut self, seq: u64, cx: &mut Context<'_>) {
        if let Some(relay) = self.relays.remove(&seq) {
            let updates = self.take_updates(&relay.origin);
            cx.out.push((relay.origin, Message::Ack { seq: relay.origin_seq, updates }));
        } else if self.probes.remove(&seq).is_some() {
            // From the target, or from a helper that reached it.
            self.health = self.health.saturating_sub(1);
        }
    }

    fn relay(&mut self, origin: NodeId, origin_seq: u64, target: NodeId, cx: &mut Context<'_>) {
        if self.relays.len() >= MAX_RELAYS || target == self.me || self.member(&target).is_none() {
            return;
        }
        self.seq += 1;
        // Nack a little before the origin gives up, Lifeguard says at 80 % of its wait.
        let nack_at = Some(cx.now + PROBE_TIMEOUT * 8 / 10);
        self.relays.insert(self.seq, Relay { origin, origin_seq, nack_at, until: cx.now + PROBE_TIMEOUT * 4 });
        self.ping(self.seq, target, cx);
    }

    fn relays_due(&mut self, cx: &mut Context<'_>) {
        for relay in self.relays.values_mut() {
            if relay.nack_at.is_some_and(|at| at <= cx.now) {
                relay.nack_at = None;
                cx.out.push((relay.origin, Message::Nack { seq: relay.origin_seq }));
            }
        }
        self.relays.retain(|_, relay| relay.until > cx.now);
    }

    // Suspicion.

    fn suspect(&mut self, target: NodeId, cx: &mut Context<'_>) {
        let Some(member) = self.member(&target).filter(|member| member.state.is_live()) else { return };
        if member.word.signature.is_some() {
            let word = Arc::clone(&member.word);
            self.apply(News { word, state: State::Suspect, accuser: Some(self.me) }, cx);
        } else {
            // It has never said a word, so there is nothing to accuse, and nobody to tell.
            self.give_up(target, cx.now);
        }
    }

    fn suspicion_end(&self, suspicion: &Suspicion) -> Instant {
        let size = (self.members.len() + 1).max(10) as f64;
        let least = PROBE_INTERVAL.mul_f64(SUSPICION_MULT * (1.0 + size.log10()) / 2.0);
        let most = least * SUSPICION_MAX;
        let confirmed = suspicion.accusers.len().saturating_sub(1) as u32;
        if confirmed >= suspicion.expected {
            return suspicion.since + least;
        }
        // Lifeguard: timeout = max − (max − min) · log(C + 1) / log(K + 1).
        let share = f64::from(confirmed + 1).ln() / f64::from(suspicion.expected + 1).ln();
        suspicion.since + (most - (most - least).mul_f64(share)).max(least)
    }

    fn suspicions_due(&mut self, cx: &mut Context<'_>) {
        let due: Vec<NodeId> = self
            .suspicions
            .iter()
            .filter(|(_, suspicion)| self.suspicion_end(suspicion) <= cx.now)
            .map(|(node, _)| *node)
            .collect();
        for node in due {
            let Some(word) = self.member(&node).map(|member| Arc::clone(&member.word)) else { continue };
            self.apply(News { word, state: State::Down, accuser: None }, cx);
        }
    }

    // Gossip.

    fn apply_all(&mut self, updates: Vec<Update>, from: NodeId, cx: &mut Context<'_>) {
        for update in updates.into_iter().take(MOST_HEARD) {
            // An honest peer passes on only what it has checked: the rest is not worth checking either.
            if !self.hear(update, from, cx) {
                return;
            }
        }
    }

    /// Takes news from outside: only what the member itself has said, or an accusation of it.
    /// Whether it was said by the member.
    fn hear(&mut self, update: Update, from: NodeId, cx: &mut Context<'_>) -> bool {
        let update = update.bounded();
        let (state, accuser) = (update.state, Some(update.accuser.unwrap_or(from)));
        let known = self.member(&update.node).map(|member| &member.word).filter(|word| word.is_in(&update));
        let word = match (known, cx.memo) {
            (Some(word), _) => Some(Arc::clone(word)),
            (None, Some(memo)) => memo.word(&update),
            (None, None) => update.genuine().map(Arc::new),
        };
        let Some(word) = word else { return false };
        let (node, news) = (word.node, News { word, state, accuser });
        if node == self.me || self.member(&node).is_some() || (cx.certified)(&node) {
            self.apply(news, cx);
        } else {
            let known = self.strangers.get(&node).map(|known| (known.word.incarnation, known.state));
            if known.is_none_or(|known| (news.word.incarnation, news.state) > known) {
                self.strangers.insert(node, news);
            }
            if self.strangers.len() > MAX_STRANGERS {
                self.strangers.pop_first();
            }
        }
        true
    }

    fn give_up(&mut self, node: NodeId, now: Instant) {
        if self.change(&node, |member| (member.state, member.changed) = (State::Down, now)).is_some() {
            self.changes.push(Change::State(node, State::Down));
        }
    }

    fn add(&mut self, news: News, now: Instant) {
        let live = news.state.is_live();
        if self.members.get(&place(&news.word.node)).is_none() {
            self.members.insert(Member::new(news, now));
            self.live += usize::from(live);
        }
    }

    fn change<R>(&mut self, node: &NodeId, change: impl FnOnce(&mut Member) -> R) -> Option<R> {
        let (was, is, result) = self.members.change(&place(node), |member| {
            let was = member.state.is_live();
            let result = change(member);
            (was, member.state.is_live(), result)
        })?;
        self.live = self.live + usize::from(is) - usize::from(was);
        Some(result)
    }

    /// A new word of this node's own.
    fn say(&mut self, incarnation: u64) {
        self.incarnation = incarnation;
        let state = if self.leaving { State::Left } else { State::Alive };
        let (node, boot, addresses) = (self.me, self.boot, self.addresses.clone());
        let update = Update { node, incarnation, boot, state, accuser: None, addresses, signature: Signature([0; 64]) }
            .sign(&self.key);
        let word = Arc::new(Word::of(update));
        self.members.insert(Member::new(News { word, state, accuser: None }, Instant::ZERO));
        self.gossip.tell(self.me);
    }

    fn apply(&mut self, news: News, cx: &mut Context<'_>) {
        let node = news.word.node;
        if node == self.me {
            return self.hear_of_me(&news);
        }
        let Some(member) = self.member(&node) else {
            // One that is gone and not known here was forgotten, and must not be brought back.
            if self.members.len() < MAX_MEMBERS && news.state.is_live() {
                let (state, accuser) = (news.state, news.accuser);
                self.add(news, cx.now);
                if state == State::Suspect {
                    self.begin_suspicion(node, accuser, cx.now);
                }
                self.news(node, Some(state), true);
            }
            return;
        };
        if !news.overrides(member) {
            if news.state == State::Suspect && news.word.incarnation == member.incarnation {
                self.confirm(node, news.accuser);
            }
            return;
        }
        let (old_state, old_word) = (member.state, Arc::clone(&member.word));
        let (state, accuser, moved) = (news.state, news.accuser, news.word.addresses != old_word.addresses);
        self.change(&node, |member| member.take(news, cx.now));
        self.suspicions.remove(&node);
        if state == State::Suspect {
            self.begin_suspicion(node, accuser, cx.now);
        }
        if old_state == State::Down && state == State::Alive {
            // It may have missed much, or the network was split: learn all it knows at once.
            self.reconcile(node, cx);
        }
        self.news(node, (state != old_state).then_some(state), moved);
    }

    fn news(&mut self, node: NodeId, state: Option<State>, moved: bool) {
        self.gossip.tell(node);
        if moved {
            self.changes.push(Change::Addresses(node));
        }
        if let Some(state) = state {
            self.changes.push(Change::State(node, state));
        }
    }

    fn begin_suspicion(&mut self, node: NodeId, accuser: Option<NodeId>, now: Instant) {
        let expected = self.live.saturating_sub(1).min(CONFIRMATIONS) as u32;
        self.suspicions.insert(node, Suspicion { since: now, accusers: accuser.into_iter().collect(), expected });
    }

    /// Lifeguard: only another accuser confirms, and what is confirmed is passed on again.
    fn confirm(&mut self, node: NodeId, accuser: Option<NodeId>) {
        let (Some(suspicion), Some(accuser)) = (self.suspicions.get_mut(&node), accuser) else { return };
        if suspicion.accusers.len() <= suspicion.expected as usize && !suspicion.accusers.contains(&accuser) {
            suspicion.accusers.push(accuser);
            self.gossip.tell(node);
        }
    }

    fn hear_of_me(&mut self, news: &News) {
        let word = &news.word;
        let another_boot = word.boot != 0 && word.boot != self.boot;
        if another_boot && news.state == State::Alive && word.incarnation > self.incarnation {
            // Only a machine with this key raises this incarnation.
            if word.boot < self.boot {
                self.changes.push(Change::Cloned { other_boot: word.boot });
            }
            self.say(word.incarnation.saturating_add(1));
        } else if news.state != State::Alive && word.incarnation >= self.incarnation && !self.leaving {
            self.say(word.incarnation.saturating_add(1));
            self.health = (self.health + 1).min(MAX_HEALTH);
        }
    }

    /// News for `to`, freshest first; what is said of `to` itself always goes along when it is accused, so that it
    /// can refute at once (Lifeguard's buddy system).
    fn take_updates(&mut self, to: &NodeId) -> Vec<Update> {
        let limit = (RETRANSMIT * ((self.members.len() + 2) as f64).log2()).ceil() as u32;
        let mut updates = Vec::new();
        if let Some(member) = self.member(to).filter(|member| member.state != State::Alive) {
            updates.extend(self.told(&member.word.node));
        }
        for node in self.gossip.take(MAX_UPDATES, limit) {
            // Also what is said of `to`: another machine with its key may be saying it.
            updates.extend(self.told(&node));
        }
        updates
    }

    /// What is passed on of a member, with the latest of its accusers.
    fn told(&self, node: &NodeId) -> Option<Update> {
        let update = self.members.get(&place(node))?.update()?;
        let accuser = self.suspicions.get(node).and_then(|suspicion| suspicion.accusers.last().copied());
        Some(Update { accuser, ..update })
    }

    // What gossip missed.

    fn reconcile(&self, to: NodeId, cx: &mut Context<'_>) {
        cx.out.push((to, Message::MembersReconcile { ranges: reconcile::open(&self.members) }));
    }

    fn compare(&mut self, from: NodeId, ranges: Vec<Range>, cx: &mut Context<'_>) {
        let found = reconcile::compare(&self.members, ranges);
        self.push(from, &found.offer, cx);
        if !found.want.is_empty() {
            cx.out.push((from, Message::MembersWant { keys: found.want }));
        }
        if !found.ranges.is_empty() {
            cx.out.push((from, Message::MembersReconcile { ranges: found.ranges }));
        }
    }

    fn push(&self, to: NodeId, keys: &[KeyHash], cx: &mut Context<'_>) {
        let keys: BTreeSet<&KeyHash> = keys.iter().collect();
        let mut known = keys.into_iter().filter_map(|key| self.told(&self.members.get(key)?.word.node)).peekable();
        for _ in 0..MAX_PUSHES {
            let (mut updates, mut bytes) = (Vec::new(), 0);
            while let Some(update) = known.next_if(|update| bytes + update.weight() <= MOST_PUSHED) {
                bytes += update.weight();
                updates.push(update);
            }
            if updates.is_empty() {
                return;
            }
            cx.out.push((to, Message::MembersPush { updates }));
        }
    }

    fn forget_old(&mut self, now: Instant) {
        // A node that has left is still in its own list.
        let old = |member: &&Member| {
            member.word.node != self.me && !member.state.is_live() && now.since(member.changed) > FORGET
        };
        let gone: Vec<NodeId> = self.members.iter().filter(old).map(|member| member.word.node).collect();
        for node in gone {
            self.members.remove(&place(&node));
            self.gossip.forget(&node);
            self.changes.push(Change::Forgotten(node));
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `period`, a tenth more or less, so that nodes started together do not stay in step.
pub(crate) fn jitter(period: Duration, rng: &mut Rng) -> Duration {
    period.mul_f64(0.9 + 0.2 * rng.f64())
}

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
//! healed network meet again without help; and a full exchange of members (push-pull) happens with a random member
//! every [`PUSH_PULL`], because gossip alone leaves gaps (99.05 % after a minute at 100 nodes, measured with foca).

mod member;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use fastrand::Rng;

use crate::id::{NodeId, Signature};
use crate::message::Message;
use crate::time::Instant;

pub use member::{MAX_ADDRESSES, Member, State, Update};

/// Between two probes of one node.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Until helpers are asked, and again until they have failed.
const PROBE_TIMEOUT: Duration = Duration::from_millis(300);
/// Helpers asked per failed probe.
const HELPERS: usize = 3;
/// Suspicion lasts at least this many probe intervals, times log₁₀ of the mesh's size.
const SUSPICION_MULT: f64 = 2.0;
/// A suspicion that nobody confirms lasts so many times longer.
const SUSPICION_MAX: u32 = 3;
/// The worst local health: probes are then this many times slower, plus one (Lifeguard's S).
const MAX_HEALTH: u32 = 8;
/// Between two full exchanges.
const PUSH_PULL: Duration = Duration::from_secs(15);
/// Between two tries to reach a member that is down.
const KNOCK: Duration = Duration::from_secs(3);
/// How often an update is passed on: this times log₂ of the mesh's size.
const RETRANSMIT: f64 = 3.0;
/// Updates on board of one probe message.
pub const MAX_UPDATES: usize = 12;
/// Probes relayed for others at one time; more are ignored, as if the request were lost.
const MAX_RELAYS: usize = 64;
/// Members of all states. Beyond it a new one is not taken until old ones are forgotten.
pub const MAX_MEMBERS: usize = 20_000;
/// Words of nodes whose certificates are not known yet; beyond it the one of the lowest id is dropped, and heard again.
const MAX_STRANGERS: usize = 256;
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
    /// Who suspects it besides the first: each shortens the wait.
    confirmed_by: Vec<NodeId>,
    /// How many confirmations shorten it to the least.
    expected: u32,
}

/// The member list of one node and the probes that keep it true.
#[derive(Debug)]
pub struct Membership {
    me: NodeId,
    key: SigningKey,
    own: Update,
    boot: u64,
    incarnation: u64,
    addresses: Vec<String>,
    leaving: bool,
    members: BTreeMap<NodeId, Member>,
    suspicions: BTreeMap<NodeId, Suspicion>,
    /// What nodes have said whose certificates are not known yet.
    strangers: BTreeMap<NodeId, Update>,
    /// How often each news has been passed on.
    gossip: BTreeMap<NodeId, u32>,
    round: VecDeque<NodeId>,
    seq: u64,
    probes: BTreeMap<u64, Probe>,
    relays: BTreeMap<u64, Relay>,
    health: u32,
    next_probe: Instant,
    next_push_pull: Instant,
    next_knock: Instant,
    changes: Vec<Change>,
}

impl Membership {
    /// A node alone. `boot` is when it started, in milliseconds since 1970, and its first incarnation.
    pub fn new(key: SigningKey, boot: u64, now: Instant) -> Self {
        let me = crate::trust::node_of(&key);
        let own = Update {
            node: me,
            incarnation: boot,
            boot,
            state: State::Alive,
            addresses: Vec::new(),
            signature: Signature([0; 64]),
        };
        Membership {
            own: own.sign(&key),
            key,
            me,
            boot,
            incarnation: boot,
            addresses: Vec::new(),
            leaving: false,
            members: BTreeMap::new(),
            suspicions: BTreeMap::new(),
            strangers: BTreeMap::new(),
            gossip: BTreeMap::new(),
            round: VecDeque::new(),
            seq: 0,
            probes: BTreeMap::new(),
            relays: BTreeMap::new(),
            health: 0,
            next_probe: now + PROBE_INTERVAL,
            next_push_pull: now + PUSH_PULL,
            next_knock: now + KNOCK,
            changes: Vec::new(),
        }
    }

    /// Takes up a member known from an earlier life; it counts as down until it answers.
    pub fn restore(&mut self, node: NodeId, addresses: Vec<String>, now: Instant) {
        if node != self.me && self.members.len() < MAX_MEMBERS {
            let signature = Signature([0; 64]);
            let update = Update { node, incarnation: 0, boot: 0, state: State::Down, addresses, signature };
            self.members.insert(node, Member::new(update.bounded(), now));
            self.changes.push(Change::Addresses(node));
        }
    }

    /// Everybody else this node knows of, in every state.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    /// One member.
    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.get(node)
    }

    /// Whether `node` may still be running: itself, or neither down nor gone.
    pub fn is_live(&self, node: &NodeId) -> bool {
        *node == self.me || self.members.get(node).is_some_and(|member| member.state.is_live())
    }

    /// Every live member but this one.
    pub fn live(&self) -> impl Iterator<Item = NodeId> {
        self.members.iter().filter(|(_, member)| member.state.is_live()).map(|(node, _)| *node)
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
        let known = self.members.get(&node);
        let addresses = known.map_or_else(|| address.into_iter().collect(), |member| member.addresses.clone());
        if known.is_none() {
            // Until its own word comes, it counts as alive here, and is not passed on.
            if self.members.len() < MAX_MEMBERS {
                let signature = Signature([0; 64]);
                let update = Update { node, incarnation: 0, boot: 0, state: State::Alive, addresses, signature };
                self.members.insert(node, Member::new(update.bounded(), cx.now));
                self.news(node, Some(State::Alive), true);
            }
        }
        self.push_pull(node, true, cx);
    }

    /// A node's certificates have become known: what it has said before counts now.
    pub fn certified(&mut self, node: NodeId, cx: &mut Context<'_>) {
        if let Some(update) = self.strangers.remove(&node) {
            self.apply(update, node, cx);
        }
    }

    /// Tells some members that this node goes. It answers no more probes afterwards.
    pub fn leave(&mut self, cx: &mut Context<'_>) {
        self.leaving = true;
        self.say(self.incarnation.saturating_add(1));
        let update = self.own.clone();
        let live: Vec<NodeId> = self.live().collect();
        for node in live.into_iter().take(16) {
            cx.out.push((node, Message::Leave { update: update.clone() }));
        }
    }

    /// The time at which [`Membership::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Instant {
        let probes = self.probes.values().map(|probe| probe.next);
        let relays = self.relays.values().map(|relay| relay.nack_at.unwrap_or(relay.until));
        let suspicions = self.suspicions.values().map(|suspicion| self.suspicion_end(suspicion));
        let regular = [self.next_probe, self.next_push_pull, self.next_knock];
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
        if cx.now >= self.next_push_pull {
            self.next_push_pull = cx.now + jitter(PUSH_PULL, cx.rng);
            self.forget_old(cx.now);
            if let Some(node) = pick(cx.rng, self.live()) {
                self.push_pull(node, true, cx);
            }
        }
        if cx.now >= self.next_knock {
            self.next_knock = cx.now + jitter(KNOCK, cx.rng);
            let down = self.members.iter().filter(|(_, member)| member.state == State::Down).map(|(node, _)| *node);
            if let Some(node) = pick(cx.rng, down) {
                self.push_pull(node, true, cx);
            }
        }
    }

    /// Takes one of this machine's messages.
    pub fn handle(&mut self, from: NodeId, message: Message, cx: &mut Context<'_>) {
        match message {
            Message::Ping { seq, target, updates } => {
                self.apply_all(updates, from, cx);
                if target == self.me && !self.leaving {
                    let updates = self.take_updates(&from);
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
            Message::MembersPush { updates, answer } => {
                self.apply_all(updates, from, cx);
                if answer && !self.leaving {
                    self.push_pull(from, false, cx);
                }
            }
            Message::Leave { update } if update.node == from => {
                self.hear(Update { state: State::Left, ..update }, from, cx);
            }
            _ => {}
        }
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(!self.members.contains_key(&self.me), "a node is no member of its own list");
        assert!(self.members.len() <= MAX_MEMBERS);
        assert!(self.strangers.len() <= MAX_STRANGERS);
        assert!(self.relays.len() <= MAX_RELAYS);
        assert!(self.health <= MAX_HEALTH);
        for node in self.suspicions.keys() {
            assert_eq!(self.members.get(node).map(|member| member.state), Some(State::Suspect));
        }
        let suspects = self.members.values().filter(|member| member.state == State::Suspect).count();
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
        let target = loop {
            match self.round.pop_front() {
                Some(node) if self.members.get(&node).is_some_and(|member| member.state.is_live()) => break node,
                Some(_) => {}
                None => {
                    let mut round: Vec<NodeId> = self.live().collect();
                    if round.is_empty() {
                        return;
                    }
                    cx.rng.shuffle(&mut round);
                    self.round = round.into();
                }
            }
        };
        self.seq += 1;
        let next = cx.now + PROBE_TIMEOUT * (self.health + 1);
        self.probes.insert(self.seq, Probe { target, asked_helpers: false, next, nacks_due: 0, nacks: 0 });
        self.ping(self.seq, target, cx);
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
                // Lifeguard: a missing nack means that this node, not the target, may be the one cut off.
                let missing = probe.nacks_due.saturating_sub(probe.nacks);
                self.health = (self.health + missing.max(u32::from(probe.nacks_due == 0))).min(MAX_HEALTH);
                self.suspect(probe.target, cx);
                continue;
            }
            probe.asked_helpers = true;
            probe.next = cx.now + PROBE_TIMEOUT * (self.health + 1);
            let target = probe.target;
            let mut helpers: Vec<NodeId> = self
                .members
                .iter()
                .filter(|(node, member)| member.state == State::Alive && **node != target)
                .map(|(node, _)| *node)
                .collect();
            cx.rng.shuffle(&mut helpers);
            helpers.truncate(HELPERS);
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
        if self.relays.len() >= MAX_RELAYS || target == self.me || !self.members.contains_key(&target) {
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
        let Some(member) = self.members.get(&target) else { return };
        if member.state.is_live() {
            match member.update(target) {
                Some(update) => self.apply(Update { state: State::Suspect, ..update }, self.me, cx),
                // It has never said a word, so there is nothing to accuse, and nobody to tell.
                None => self.give_up(target, cx.now),
            }
        }
    }

    fn suspicion_end(&self, suspicion: &Suspicion) -> Instant {
        let size = (self.members.len() + 1).max(10) as f64;
        let least = PROBE_INTERVAL.mul_f64(SUSPICION_MULT * size.log10());
        let most = least * SUSPICION_MAX;
        let confirmed = suspicion.confirmed_by.len() as u32;
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
            let Some(member) = self.members.get(&node) else { continue };
            if let Some(update) = member.update(node) {
                self.apply(Update { state: State::Down, ..update }, self.me, cx);
            }
        }
    }

    // Gossip.

    fn apply_all(&mut self, updates: Vec<Update>, from: NodeId, cx: &mut Context<'_>) {
        for update in updates.into_iter().take(MAX_MEMBERS) {
            self.hear(update, from, cx);
        }
    }

    /// Takes news from outside: only what the member itself has said, or an accusation of it.
    fn hear(&mut self, update: Update, from: NodeId, cx: &mut Context<'_>) {
        let update = update.bounded();
        let known = self.members.get(&update.node);
        let same_word = known.is_some_and(|member| {
            member.signature == Some(update.signature)
                && (member.incarnation, member.boot) == (update.incarnation, update.boot)
                && member.addresses == update.addresses
                && (member.state == State::Left) == (update.state == State::Left)
        });
        if !same_word && !update.is_genuine() {
            return;
        }
        if known.is_some() || update.node == self.me || (cx.certified)(&update.node) {
            self.apply(update, from, cx);
        } else {
            self.strangers.insert(update.node, update);
            if self.strangers.len() > MAX_STRANGERS {
                self.strangers.pop_first();
            }
        }
    }

    fn give_up(&mut self, node: NodeId, now: Instant) {
        if let Some(member) = self.members.get_mut(&node) {
            member.state = State::Down;
            member.changed = now;
            self.changes.push(Change::State(node, State::Down));
        }
    }

    /// A new word of this node's own.
    fn say(&mut self, incarnation: u64) {
        self.incarnation = incarnation;
        let state = if self.leaving { State::Left } else { State::Alive };
        let (node, boot, addresses) = (self.me, self.boot, self.addresses.clone());
        let signature = Signature([0; 64]);
        self.own = Update { node, incarnation, boot, state, addresses, signature }.sign(&self.key);
        self.gossip.insert(self.me, 0);
    }

    fn apply(&mut self, update: Update, from: NodeId, cx: &mut Context<'_>) {
        if update.node == self.me {
            return self.hear_of_me(&update);
        }
        let node = update.node;
        let Some(member) = self.members.get_mut(&node) else {
            if self.members.len() < MAX_MEMBERS {
                let state = update.state;
                self.members.insert(node, Member::new(update, cx.now));
                if state == State::Suspect {
                    self.begin_suspicion(node, cx.now);
                }
                self.news(node, Some(state), true);
            }
            return;
        };
        if !update.overrides(member) {
            if update.state == State::Suspect && update.incarnation == member.incarnation {
                self.confirm(node, from);
            }
            return;
        }
        let (old_state, old_addresses) = (member.state, member.addresses.clone());
        member.take(update, cx.now);
        let (state, moved) = (member.state, member.addresses != old_addresses);
        self.suspicions.remove(&node);
        if state == State::Suspect {
            self.begin_suspicion(node, cx.now);
        }
        if old_state == State::Down && state == State::Alive {
            // It may have missed much, or the network was split: learn all it knows at once.
            self.push_pull(node, true, cx);
        }
        self.news(node, (state != old_state).then_some(state), moved);
    }

    fn news(&mut self, node: NodeId, state: Option<State>, moved: bool) {
        self.gossip.insert(node, 0);
        if moved {
            self.changes.push(Change::Addresses(node));
        }
        if let Some(state) = state {
            self.changes.push(Change::State(node, state));
        }
    }

    fn begin_suspicion(&mut self, node: NodeId, now: Instant) {
        let others = self.members.values().filter(|member| member.state.is_live()).count().saturating_sub(1);
        let expected = others.min(HELPERS) as u32;
        self.suspicions.insert(node, Suspicion { since: now, confirmed_by: Vec::new(), expected });
    }

    fn confirm(&mut self, node: NodeId, from: NodeId) {
        if let Some(suspicion) = self.suspicions.get_mut(&node)
            && from != self.me
            && suspicion.confirmed_by.len() < suspicion.expected as usize
            && !suspicion.confirmed_by.contains(&from)
        {
            suspicion.confirmed_by.push(from);
            // Lifeguard: a new confirmation is passed on again.
            self.gossip.insert(node, 0);
        }
    }

    fn hear_of_me(&mut self, update: &Update) {
        let another_boot = update.boot != 0 && update.boot != self.boot;
        if another_boot && update.state == State::Alive && update.incarnation > self.incarnation {
            // Only a machine with this key raises this incarnation.
            if update.boot < self.boot {
                self.changes.push(Change::Cloned { other_boot: update.boot });
            }
            self.say(update.incarnation.saturating_add(1));
        } else if update.state != State::Alive && update.incarnation >= self.incarnation && !self.leaving {
            self.say(update.incarnation.saturating_add(1));
            self.health = (self.health + 1).min(MAX_HEALTH);
        }
    }

    /// News for `to`, freshest first; what is said of `to` itself always goes along when it is accused, so that it
    /// can refute at once (Lifeguard's buddy system).
    fn take_updates(&mut self, to: &NodeId) -> Vec<Update> {
        let limit = (RETRANSMIT * ((self.members.len() + 2) as f64).log2()).ceil() as u32;
        let mut waiting: Vec<(u32, NodeId)> = self.gossip.iter().map(|(node, sent)| (*sent, *node)).collect();
        waiting.sort_unstable();
        let mut updates = Vec::new();
        if let Some(member) = self.members.get(to).filter(|member| member.state != State::Alive) {
            updates.extend(member.update(*to));
        }
        for (sent, node) in waiting.into_iter().take(MAX_UPDATES) {
            if sent + 1 >= limit {
                self.gossip.remove(&node);
            } else {
                self.gossip.insert(node, sent + 1);
            }
            if node == self.me {
                updates.push(self.own.clone());
            } else if let Some(member) = self.members.get(&node) {
                // Also what is said of `to`: another machine with its key may be saying it.
                updates.extend(member.update(node));
            }
        }
        updates
    }

    fn push_pull(&self, to: NodeId, answer: bool, cx: &mut Context<'_>) {
        // Half of a message's limit, at about 200 bytes a member, so that it always fits.
        const MOST: usize = 2500;
        let mut updates: Vec<Update> = self.members.iter().filter_map(|(node, member)| member.update(*node)).collect();
        cx.rng.shuffle(&mut updates);
        updates.truncate(MOST);
        updates.push(self.own.clone());
        cx.out.push((to, Message::MembersPush { updates, answer }));
    }

    fn forget_old(&mut self, now: Instant) {
        let old = |member: &Member| !member.state.is_live() && now.since(member.changed) > FORGET;
        let gone = self.members.iter().filter(|(_, member)| old(member)).map(|(node, _)| Change::Forgotten(*node));
        self.changes.extend(gone);
        self.members.retain(|_, member| !old(member));
        let members = &self.members;
        self.gossip.retain(|node, _| *node == self.me || members.contains_key(node));
    }
}

fn pick(rng: &mut Rng, nodes: impl Iterator<Item = NodeId>) -> Option<NodeId> {
    let nodes: Vec<NodeId> = nodes.collect();
    (!nodes.is_empty()).then(|| nodes[rng.usize(..nodes.len())])
}

/// `period`, a tenth more or less, so that nodes started together do not stay in step.
pub(crate) fn jitter(period: Duration, rng: &mut Rng) -> Duration {
    period.mul_f64(0.9 + 0.2 * rng.f64())
}

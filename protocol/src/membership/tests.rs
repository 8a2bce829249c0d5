//! Nodes in memory that know nothing but who is alive: virtual time, messages lost, doubled and out of order.

mod failures;

use std::collections::BTreeSet;

use super::*;
use crate::trust::node_of;

const BOOT: u64 = 1_800_000_000_000;

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn key(at: usize) -> SigningKey {
    SigningKey::from_bytes(blake3::hash(&at.to_be_bytes()).as_bytes())
}

struct Mesh {
    now: Instant,
    ids: Vec<NodeId>,
    nodes: Vec<Option<Membership>>,
    due: BTreeMap<(Instant, u64), (usize, NodeId, Message)>,
    sent: u64,
    rng: Rng,
    /// For each node, the share of what it sends, and again of what is sent to it, that is lost.
    loss: Vec<f64>,
    doubled: f64,
    /// Nodes of different sides do not hear each other.
    side: Vec<usize>,
    uncertified: BTreeSet<NodeId>,
    changes: Vec<(Instant, usize, Change)>,
}

impl Mesh {
    fn new(count: usize, seed: u64) -> Mesh {
        Mesh {
            now: Instant::ZERO,
            ids: (0..count).map(|at| node_of(&key(at))).collect(),
            nodes: (0..count).map(|at| Some(Membership::new(key(at), BOOT, Instant::ZERO))).collect(),
            due: BTreeMap::new(),
            sent: 0,
            rng: Rng::with_seed(seed),
            loss: vec![0.0; count],
            doubled: 0.1,
            side: vec![0; count],
            uncertified: BTreeSet::new(),
            changes: Vec::new(),
        }
    }

    /// All have found each other, each having met the first one only.
    fn joined(count: usize, seed: u64) -> Mesh {
        let mut mesh = Mesh::new(count, seed);
        mesh.introduce();
        assert!(mesh.run_until(secs(60), Mesh::all_alive), "{count} nodes, seed {seed}");
        mesh.changes.clear();
        mesh
    }

    fn introduce(&mut self) {
        for at in 1..self.ids.len() {
            self.meet(at, 0);
            self.meet(0, at);
        }
    }

    fn meet(&mut self, at: usize, other: usize) {
        let id = self.ids[other];
        self.on(at, |node, cx| node.meet(id, Some(format!("/memory/{other}")), cx));
    }

    /// Lets one node do something, and sends what comes of it.
    fn on(&mut self, at: usize, act: impl FnOnce(&mut Membership, &mut Context<'_>)) {
        let Some(node) = &mut self.nodes[at] else { return };
        let mut out = Vec::new();
        let certified = |node: &NodeId| !self.uncertified.contains(node);
        act(node, &mut Context { now: self.now, rng: &mut self.rng, certified: &certified, memo: None, out: &mut out });
        node.invariants();
        self.changes.extend(node.take_changes().into_iter().map(|change| (self.now, at, change)));
        for (to, message) in out {
            self.send(at, to, message);
        }
    }

    fn news(&mut self, at: usize, updates: Vec<Update>) {
        // Whoever passes it on: a ping for another is heard and not answered.
        let (from, target) = (self.ids[1], self.ids[1]);
        self.on(at, |node, cx| node.handle(from, Message::Ping { seq: 0, target, updates }, cx));
    }

    fn send(&mut self, from: usize, to: NodeId, message: Message) {
        if let Message::Ping { updates, .. } | Message::Ack { updates, .. } | Message::PingReq { updates, .. } =
            &message
        {
            assert!(updates.len() <= MAX_UPDATES + 1, "one more for what the receiver is accused of");
        }
        let Some(to) = self.ids.iter().position(|id| *id == to) else { return };
        for _ in 0..1 + usize::from(self.rng.f64() < self.doubled) {
            let lost = self.rng.f64() < self.loss[from] || self.rng.f64() < self.loss[to];
            if !lost && self.side[from] == self.side[to] {
                self.sent += 1;
                let at = self.now + Duration::from_micros(self.rng.u64(200..40_000));
                self.due.insert((at, self.sent), (to, self.ids[from], message.clone()));
            }
        }
    }

    /// Whether `condition` came true within `limit`.
    fn run_until(&mut self, limit: Duration, condition: impl Fn(&Mesh) -> bool) -> bool {
        let end = self.now + limit;
        while !condition(self) {
            let message = self.due.keys().next().copied();
            let timer = self.nodes.iter().flatten().map(Membership::poll_timeout).min();
            let next = message.map(|(at, _)| at).into_iter().chain(timer).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return condition(self);
            };
            // What is due at once may be dated earlier.
            self.now = self.now.max(next);
            if let Some((to, from, message)) = message.filter(|(at, _)| *at == next).and_then(|id| self.due.remove(&id))
            {
                self.on(to, |node, cx| node.handle(from, message, cx));
                continue;
            }
            for at in 0..self.nodes.len() {
                if self.nodes[at].as_ref().is_some_and(|node| node.poll_timeout() <= self.now) {
                    self.on(at, |node, cx| node.handle_timeout(cx));
                    let again = self.nodes[at].as_ref().map(Membership::poll_timeout);
                    assert!(again > Some(self.now), "what was due is done");
                }
            }
        }
        true
    }

    fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    fn node(&self, at: usize) -> &Membership {
        self.nodes[at].as_ref().unwrap()
    }

    fn state(&self, at: usize, of: usize) -> Option<State> {
        self.node(at).member(&self.ids[of]).map(|member| member.state)
    }

    /// Whether every node that runs believes this of another.
    fn all_say(&self, of: usize, state: State) -> bool {
        (0..self.nodes.len())
            .filter(|at| *at != of && self.nodes[*at].is_some())
            .all(|at| self.state(at, of) == Some(state))
    }

    fn all_alive(&self) -> bool {
        (0..self.nodes.len()).filter(|of| self.nodes[*of].is_some()).all(|of| self.all_say(of, State::Alive))
    }

    /// When each node came to believe this of another, the first one first.
    fn said(&self, of: usize, state: State) -> Vec<Instant> {
        let wanted = Change::State(self.ids[of], state);
        self.changes.iter().filter(|(_, _, change)| *change == wanted).map(|(at, ..)| *at).collect()
    }
}

#[test]
fn two_that_meet_see_each_other_and_where_they_are() {
    let mut mesh = Mesh::new(2, 1);
    mesh.on(1, |node, _| node.set_addresses(vec!["/memory/one".to_owned()]));
    mesh.introduce();
    assert!(mesh.run_until(secs(1), Mesh::all_alive));
    mesh.run(secs(1));
    let one = mesh.node(0).member(&mesh.ids[1]).unwrap();
    assert_eq!((one.incarnation, one.boot, &one.addresses[..]), (BOOT + 1, BOOT, &["/memory/one".to_owned()][..]));
    assert!(mesh.node(0).is_live(&mesh.ids[0]) && mesh.node(0).live().eq([mesh.ids[1]]));
}

#[test]
fn twenty_that_know_one_find_all_though_a_tenth_of_the_messages_is_lost() {
    for seed in 0..5 {
        let mut mesh = Mesh::new(20, seed);
        // Lost on either side: a tenth in all.
        mesh.loss = vec![0.05; 20];
        mesh.introduce();
        assert!(mesh.run_until(secs(40), Mesh::all_alive), "seed {seed}");
    }
}

#[test]
fn a_node_without_known_certificates_waits_and_counts_once_they_are_known() {
    let mut mesh = Mesh::new(3, 1);
    let stranger = mesh.ids[2];
    mesh.uncertified.insert(stranger);
    for (at, other) in [(0, 1), (1, 0), (1, 2), (2, 1)] {
        mesh.meet(at, other);
    }
    mesh.run(secs(5));
    assert_eq!((mesh.state(1, 2), mesh.state(0, 2)), (Some(State::Alive), None), "admitted by one, unknown to another");
    assert!(mesh.node(0).strangers.contains_key(&stranger));
    mesh.on(0, |node, cx| node.certified(stranger, cx));
    assert_eq!(mesh.state(0, 2), Some(State::Alive));
    assert!(mesh.node(0).strangers.is_empty());
}

#[test]
fn more_strangers_than_are_kept_push_out_none_of_the_members() {
    let mut mesh = Mesh::joined(3, 1);
    let state = State::Alive;
    let word = |at: usize| {
        let (node, signature) = (node_of(&key(at)), Signature([0; 64]));
        Update { node, incarnation: BOOT, boot: BOOT, state, accuser: None, addresses: Vec::new(), signature }
            .sign(&key(at))
    };
    let mut updates: Vec<Update> = (100..140 + MAX_STRANGERS).map(word).collect();
    mesh.uncertified.extend(updates.iter().map(|update| update.node));
    for part in updates.chunks(MOST_HEARD) {
        mesh.news(0, part.to_vec());
    }
    assert_eq!((mesh.node(0).strangers.len(), mesh.node(0).members().count()), (MAX_STRANGERS, 2));
    updates.sort_by_key(|update| update.node);
    let (dropped, kept) = (updates[0].clone(), updates[updates.len() - 1].node);
    for (node, counts) in [(kept, true), (dropped.node, false)] {
        mesh.on(0, |membership, cx| membership.certified(node, cx));
        assert_eq!(mesh.node(0).is_live(&node), counts);
    }
    mesh.uncertified.clear();
    let node = dropped.node;
    mesh.news(0, vec![dropped]);
    assert!(mesh.node(0).is_live(&node), "it is heard again");
}

#[test]
fn a_flood_of_requests_is_relayed_up_to_the_bound_and_forgotten() {
    let mut mesh = Mesh::joined(3, 1);
    let (origin, target) = (mesh.ids[1], mesh.ids[2]);
    mesh.loss[2] = 1.0;
    for seq in 0..10 * MAX_RELAYS as u64 {
        let request = Message::PingReq { seq, target, updates: Vec::new() };
        mesh.on(0, |node, cx| node.handle(origin, request, cx));
    }
    assert_eq!(mesh.node(0).relays.len(), MAX_RELAYS);
    mesh.run(2 * PROBE_TIMEOUT * 4);
    assert!(mesh.node(0).relays.len() <= 4, "only what is asked for in earnest is left");
    mesh.on(0, |node, _| node.set_addresses((0..20).map(|port| format!("/memory/{port}")).collect()));
    assert_eq!(mesh.node(0).own_addresses().len(), MAX_ADDRESSES);
    assert!(mesh.run_until(secs(20), |mesh| {
        mesh.node(1).member(&mesh.ids[0]).is_some_and(|member| member.addresses.len() == MAX_ADDRESSES)
    }));
}

#[test]
fn a_mesh_that_restarts_as_a_whole_finds_itself_again() {
    for seed in 0..5 {
        let mut mesh = Mesh::joined(8, seed);
        mesh.due.clear();
        for at in 0..8 {
            let mut node = Membership::new(key(at), BOOT + 100_000, mesh.now);
            for other in 0..8 {
                node.restore(mesh.ids[other], vec![format!("/memory/{other}")], mesh.now);
            }
            node.invariants();
            assert_eq!(node.live().count(), 0, "who was known before counts as down until it answers");
            mesh.nodes[at] = Some(node);
        }
        assert!(mesh.run_until(secs(20), Mesh::all_alive), "seed {seed}");
        assert!(mesh.changes.iter().all(|(_, _, change)| !matches!(change, Change::Cloned { .. })), "seed {seed}");
    }
}

#[test]
fn a_node_that_starts_meets_others_at_once_also_when_some_are_gone() {
    for seed in 0..20 {
        let mut mesh = Mesh::joined(8, seed);
        (0..3).for_each(|at| mesh.nodes[at] = None);
        let mut node = Membership::new(key(7), BOOT + 100_000, mesh.now);
        for other in 0..7 {
            node.restore(mesh.ids[other], vec![format!("/memory/{other}")], mesh.now);
        }
        mesh.nodes[7] = Some(node);
        let met = |mesh: &Mesh| mesh.node(7).live().next().is_some();
        assert!(mesh.run_until(Duration::from_millis(900), met), "seed {seed}");
    }
}

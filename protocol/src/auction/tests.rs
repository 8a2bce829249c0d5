//! An auctioneer and bidders that follow the protocol in memory: virtual time, messages lost, doubled, out of order.

mod faults;

use fastrand::Rng;

use super::*;
use crate::catalog::{Body, Hlc, Key};
use crate::trust::{Chain, mesh_of, node_of};

const WALL: UnixMillis = UnixMillis(1_800_000_000_000);
const WORKLOAD: WorkloadId = WorkloadId([7; 16]);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn verdict(epoch: u64, refusal: Option<Refusal>) -> Message {
    Message::Verdict { placement: PlacementId { workload: WORKLOAD, replica: 3, epoch }, refusal }
}

/// What a node would do, and what it has done.
#[derive(Clone, Default)]
struct Bidder {
    prices: Vec<u32>,
    refuses: Option<Refusal>,
    /// What it says to awards.
    rejects: Option<Refusal>,
    deaf: bool,
    keeps_no_room: bool,
    /// Room that it keeps.
    holding: u32,
    /// So many of its verdicts are lost.
    unsaid: u32,
    held: BTreeSet<PlacementId>,
    rejected: BTreeSet<PlacementId>,
}

impl Bidder {
    fn bids(prices: &[u32]) -> Bidder {
        Bidder { prices: prices.to_vec(), ..Bidder::default() }
    }

    fn random(rng: &mut Rng) -> Bidder {
        Bidder {
            prices: (0..rng.usize(..5)).map(|_| rng.u32(..300)).collect(),
            refuses: (rng.u8(..4) == 0).then_some(Refusal::Full),
            rejects: match rng.u8(..8) {
                0 => Some(Refusal::Unwanted),
                1 => Some(Refusal::Superseded { epoch: rng.u64(..5) }),
                _ => None,
            },
            deaf: rng.u8(..16) == 0,
            ..Bidder::default()
        }
    }

    fn answer(&mut self, me: NodeId, message: Message) -> Option<Message> {
        let placement = match message {
            _ if self.deaf => return None,
            Message::Announcement { auction, .. } => {
                let (prices, basis) = (self.prices.clone(), Basis::default());
                return Some(match self.refuses.clone() {
                    Some(refusal) => Message::Refusal { auction, refusal },
                    None => Message::Bid { auction, prices, basis },
                });
            }
            Message::Award { placement, award, .. } => {
                let mesh = mesh_of(&award.auctioneer);
                assert_eq!(award.verify(&placement, &me, &mesh), Ok(()));
                if self.rejects.is_none() && !self.rejected.contains(&placement) {
                    self.held.insert(placement);
                }
                placement
            }
            Message::AwardQuery { placement, .. } => placement,
            Message::Hold { auction, replicas, .. } => {
                let refusal = self.keeps_no_room.then_some(Refusal::OnHold);
                self.holding = if refusal.is_none() { replicas } else { 0 };
                return Some(Message::Held { auction, refusal });
            }
            Message::Unhold { .. } => {
                self.holding = 0;
                return None;
            }
            other => panic!("no message for a bidder: {other:?}"),
        };
        let refusal = if self.held.contains(&placement) {
            None
        } else {
            // What was refused once, or asked about before it was seen, stays refused.
            self.rejected.insert(placement);
            Some(self.rejects.clone().unwrap_or(Refusal::NotSeen))
        };
        if self.unsaid > 0 {
            self.unsaid -= 1;
            return None;
        }
        Some(Message::Verdict { placement, refusal })
    }
}

struct Hall {
    now: Instant,
    key: SigningKey,
    auctioneer: Auctioneer,
    bidders: BTreeMap<NodeId, Bidder>,
    /// By when it arrives: to whom or from whom, whether it is for the auctioneer, and what.
    due: BTreeMap<(Instant, u64), (NodeId, bool, Message)>,
    sent: Vec<(NodeId, Message)>,
    count: u64,
    rng: Rng,
    loss: f64,
    doubled: f64,
    /// The slowest message, in milliseconds.
    slowest: u64,
    /// Replica, epoch and node, and how it came to that.
    placed: BTreeMap<(u32, u64, NodeId), Arc<Record>>,
    no_taker: Vec<Record>,
    gang: bool,
}

impl Hall {
    fn new(bidders: impl IntoIterator<Item = Bidder>) -> Hall {
        Hall {
            now: Instant::ZERO + ms(1000),
            key: SigningKey::from_bytes(&[200; 32]),
            auctioneer: Auctioneer::default(),
            bidders: (1..).map(node).zip(bidders).collect(),
            due: BTreeMap::new(),
            sent: Vec::new(),
            count: 0,
            rng: Rng::with_seed(1),
            loss: 0.0,
            doubled: 0.0,
            slowest: 20,
            placed: BTreeMap::new(),
            no_taker: Vec::new(),
            gang: false,
        }
    }

    fn open(&mut self, replicas: &[(u32, u64)], ask: usize, crowded: &[NodeId]) {
        let signed = Arc::new(Fact::sign(Key::Workload(WORKLOAD), Hlc::default(), &Body::Gone, &self.key));
        let (replicas, crowded) = (replicas.to_vec(), crowded.iter().map(|node| (*node, 1)).collect());
        let (gang, layout) = (self.gang, Layout::Balance);
        let lot = Lot {
            workload: WORKLOAD,
            signed,
            replicas,
            cause: Cause::Submitted,
            crowded,
            layout,
            gang,
            in_place: false,
        };
        let candidates = self.bidders.keys().copied().collect();
        self.on(|auctioneer, cx| auctioneer.open(lot, candidates, ask, WALL, cx));
    }

    /// Lets the auctioneer do something, and sends what comes of it.
    fn on(&mut self, act: impl FnOnce(&mut Auctioneer, &mut Context<'_>)) {
        let (mut out, me) = (Vec::new(), node_of(&self.key));
        let chain = Chain::root(&self.key, me, WALL.as_secs(), 1000);
        let cx = &mut Context { now: self.now, me, key: &self.key, chain: &chain, out: &mut out };
        act(&mut self.auctioneer, cx);
        self.auctioneer.invariants();
        for ended in self.auctioneer.take_ended() {
            match ended {
                Ended::Closed { missing: 0, .. } => {}
                Ended::Closed { record, .. } => self.no_taker.push(record),
                Ended::Placed { placement: PlacementId { replica, epoch, .. }, node, record } => {
                    let before = self.placed.insert((replica, epoch, node), record);
                    assert!(before.is_none(), "placed twice");
                }
            }
        }
        for (to, message) in out {
            self.sent.push((to, message.clone()));
            self.send(to, false, message);
        }
    }

    fn hear(&mut self, from: NodeId, message: Message) {
        self.on(|auctioneer, cx| auctioneer.handle(from, message, cx));
    }

    fn send(&mut self, who: NodeId, back: bool, message: Message) {
        for _ in 0..1 + usize::from(self.rng.f64() < self.doubled) {
            if self.rng.f64() >= self.loss {
                self.count += 1;
                let at = self.now + ms(self.rng.u64(1..=self.slowest));
                self.due.insert((at, self.count), (who, back, message.clone()));
            }
        }
    }

    /// The next message or timeout; `false` when nothing is left to come.
    fn step(&mut self) -> bool {
        let message = self.due.keys().next().copied();
        let timer = self.auctioneer.poll_timeout();
        let Some(next) = message.map(|(at, _)| at).into_iter().chain(timer).min() else { return false };
        self.now = self.now.max(next);
        match message.filter(|(at, _)| *at == next).and_then(|id| self.due.remove(&id)) {
            Some((from, true, message)) => self.hear(from, message),
            Some((to, false, message)) => {
                let answer = self.bidders.get_mut(&to).and_then(|bidder| bidder.answer(to, message));
                if let Some(answer) = answer {
                    self.send(to, true, answer);
                }
            }
            None => {
                self.on(|auctioneer, cx| auctioneer.handle_timeout(cx));
                assert!(self.auctioneer.poll_timeout().is_none_or(|at| at > self.now), "what was due is done");
            }
        }
        true
    }

    fn finish(&mut self) {
        let ends = (0..100_000).any(|_| !self.step());
        assert!(ends, "{:?}", self.auctioneer);
    }

    fn count(&self, kind: impl Fn(&Message) -> bool) -> usize {
        self.sent.iter().filter(|(_, message)| kind(message)).count()
    }
}

#[test]
fn of_two_bidders_the_cheaper_one_gets_it() {
    let mut hall = Hall::new([Bidder::bids(&[80]), Bidder::bids(&[30])]);
    hall.open(&[(0, 1)], 2, &[]);
    assert!(hall.auctioneer.holds(&WORKLOAD, 0) && !hall.auctioneer.holds(&WORKLOAD, 1));
    hall.finish();
    let quotes = hall.placed[&(0, 1, node(2))].quotes.iter();
    let quotes: Vec<_> = quotes.map(|quote| (quote.node, quote.price, &quote.won[..])).collect();
    assert_eq!(quotes, [(node(2), 30, &[0][..]), (node(1), 80, &[])]);
    assert!(hall.no_taker.is_empty());
}

#[test]
fn when_all_refuse_the_reasons_are_kept_and_nobody_is_waited_for() {
    let full = Bidder { refuses: Some(Refusal::Full), ..Bidder::default() };
    let label = Refusal::Label { name: "zone".to_owned(), value: "x".repeat(1000) };
    let mut hall = Hall::new([full.clone(), Bidder { refuses: Some(label), ..Bidder::default() }, full]);
    hall.open(&[(0, 1), (1, 1)], 3, &[]);
    hall.finish();
    let [record] = &hall.no_taker[..] else { panic!("one end for all its replicas: {:?}", hall.no_taker) };
    assert!(u64::from(record.took) <= 2 * hall.slowest);
    assert_eq!((record.members, record.asked, record.refusals.len()), (3, 3, 3));
    assert_eq!(record.refused[0], ("too many placements".to_owned(), 2));
    assert!(record.refused[1].0.len() < 200, "a peer's words are cut");
}

#[test]
fn when_all_are_silent_it_ends_at_the_deadline_and_says_so() {
    let mut hall = Hall::new(vec![Bidder { deaf: true, ..Bidder::default() }; 3]);
    hall.open(&[(0, 1)], 3, &[]);
    hall.finish();
    assert_eq!(hall.no_taker[0].took, DEADLINE.as_millis() as u32);
    assert_eq!(hall.no_taker[0].refusals, [1, 2, 3].map(|n| (node(n), Refusal::NoAnswer)));
}

#[test]
fn when_the_first_asked_refuse_the_others_are_asked() {
    let refuses = || Bidder { refuses: Some(Refusal::NoImage), ..Bidder::default() };
    let mut hall = Hall::new((1..=40).map(|n| if n <= 25 { refuses() } else { Bidder::bids(&[100 - n]) }));
    hall.open(&[(0, 1)], SAMPLE, &[]);
    assert_eq!(hall.sent.len(), SAMPLE);
    hall.finish();
    assert_eq!(hall.count(|message| matches!(message, Message::Announcement { .. })), 40);
    let record = &hall.placed[&(0, 1, node(40))];
    assert_eq!((record.members, record.asked, record.refused[0].1), (40, 40, 25));
    assert_eq!((record.quotes.len(), record.refusals.len()), (15, MAX_QUOTES));
}

#[test]
fn many_replicas_spread_by_price_and_crowding() {
    let takers = |crowded: &[NodeId]| {
        let mut hall = Hall::new([&[10, 20, 30][..], &[40, 50, 60], &[300]].map(Bidder::bids));
        hall.open(&[0, 1, 2, 3, 4, 5].map(|replica| (replica, 1)), 3, crowded);
        hall.finish();
        hall.placed.keys().map(|(_, _, NodeId(id))| id[0]).collect::<Vec<u8>>()
    };
    assert_eq!(takers(&[]), [1, 2, 1, 2, 1, 2], "10, 40, 20 + 50, 50 + 50, 30 + 100, 60 + 100");
    assert_eq!(takers(&[node(1)]), [2, 1, 2, 1, 2, 1], "who runs one already counts as if it had won one");
}

#[test]
fn a_gang_is_placed_whole_or_not_at_all() {
    let replicas = [0, 1, 2, 3].map(|replica| (replica, 1));
    // Room for three of four.
    let mut hall = Hall::new([Bidder::bids(&[10, 20]), Bidder::bids(&[40])]);
    hall.gang = true;
    hall.open(&replicas, 2, &[]);
    hall.finish();
    assert!(hall.placed.is_empty() && hall.no_taker.len() == 1);
    assert_eq!(hall.count(|message| matches!(message, Message::Award { .. } | Message::Hold { .. })), 0);
    // Room for all, until one that has bid says that it keeps none: the others are let go, and another plan is made.
    let liar = Bidder { keeps_no_room: true, ..Bidder::bids(&[1, 2]) };
    let mut hall = Hall::new([liar, Bidder::bids(&[10, 20]), Bidder::bids(&[30, 40])]);
    hall.gang = true;
    hall.open(&replicas, 3, &[]);
    hall.finish();
    assert_eq!(hall.placed.len(), 4);
    assert!(hall.placed.keys().all(|(_, _, winner)| *winner != node(1)));
    assert!(hall.no_taker.is_empty());
    // Nobody else has room: whoever kept some does so no more.
    let liar = Bidder { keeps_no_room: true, ..Bidder::bids(&[1, 2]) };
    let mut hall = Hall::new([liar, Bidder::bids(&[10, 20])]);
    hall.gang = true;
    hall.open(&replicas, 2, &[]);
    hall.finish();
    assert!(hall.placed.is_empty() && hall.bidders.values().all(|bidder| bidder.holding == 0));
}

#[test]
fn a_gang_comes_through_lost_and_doubled_messages_whole_or_not_at_all() {
    for seed in 0..200 {
        let mut hall = Hall::new([Bidder::bids(&[10, 20]), Bidder::bids(&[40, 50]), Bidder::bids(&[5])]);
        (hall.rng, hall.gang, hall.doubled) = (Rng::with_seed(seed), true, 0.1);
        hall.loss = if seed % 2 == 0 { 0.0 } else { 0.2 };
        hall.open(&[0, 1, 2].map(|replica| (replica, 1)), 3, &[]);
        hall.finish();
        // A lost verdict may leave the auctioneer without knowing; what it knows is whole, or it says what is missing.
        assert!(hall.placed.len() >= 3 || !hall.no_taker.is_empty(), "seed {seed}");
        assert!(hall.loss > 0.0 || hall.placed.len() == 3, "seed {seed}");
    }
}

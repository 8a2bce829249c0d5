//! One auctioneer and bidders that follow the protocol in memory: virtual time, messages lost, doubled and out of order.

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
                let mesh = mesh_of(&award.record.auctioneer);
                assert_eq!(award.verify(&placement, &me, &mesh), Ok(()));
                if self.rejects.is_none() && !self.rejected.contains(&placement) {
                    self.held.insert(placement);
                }
                placement
            }
            Message::AwardQuery { placement } => placement,
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
        }
    }

    fn open(&mut self, replicas: &[(u32, u64)], ask: usize, crowded: &[NodeId]) {
        let signed = Arc::new(Fact::sign(Key::Workload(WORKLOAD), Hlc::default(), &Body::Gone, &self.key));
        let (replicas, crowded) = (replicas.to_vec(), crowded.iter().copied().collect());
        let lot = Lot { workload: WORKLOAD, signed, replicas, cause: Cause::Submitted, crowded };
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
                Ended::NoTaker { record, .. } => self.no_taker.push(record),
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
        self.now = next;
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
                assert!(self.auctioneer.poll_timeout().is_none_or(|at| at > next), "what was due is done");
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
fn a_lost_verdict_is_asked_for_and_nothing_is_placed_twice() {
    for unsaid in 1..=QUERIES {
        let mut hall = Hall::new([Bidder { unsaid, ..Bidder::bids(&[10]) }, Bidder::bids(&[20])]);
        hall.doubled = f64::from(unsaid - 1);
        hall.open(&[(0, 1)], 2, &[]);
        hall.finish();
        let queries = hall.count(|message| matches!(message, Message::AwardQuery { .. }));
        assert!(queries > 0 && queries <= unsaid as usize);
        assert!(hall.placed.keys().eq(&[(0, 1, node(1))]) && hall.no_taker.is_empty());
    }
}

#[test]
fn what_the_winner_says_to_its_award_decides_the_epoch_of_the_next() {
    let rejects = |refusal: Refusal| Bidder { rejects: Some(refusal), ..Bidder::bids(&[10]) };
    let silent = Bidder { unsaid: 99, ..Bidder::bids(&[10]) };
    for (winner, epoch) in [
        (rejects(Refusal::Full), 4),
        (rejects(Refusal::Superseded { epoch: 8 }), 9),
        (rejects(Refusal::Superseded { epoch: 1 }), 4),
        (silent, 5),
    ] {
        let mut hall = Hall::new([winner, Bidder::bids(&[20])]);
        hall.open(&[(3, 4)], 2, &[]);
        hall.finish();
        assert!(hall.placed.keys().eq(&[(3, epoch, node(2))]), "{:?}", hall.placed.keys());
        // It says at last that it took it, when nobody waits for it any more.
        hall.hear(node(1), verdict(4, None));
        assert_eq!(hall.placed.len(), 1);
    }
}

#[test]
fn a_winner_that_goes_down_before_its_verdict_is_replaced_at_once() {
    let mut hall = Hall::new([Bidder { unsaid: 99, ..Bidder::bids(&[10]) }, Bidder::bids(&[20])]);
    hall.open(&[(0, 1)], 2, &[]);
    while hall.count(|message| matches!(message, Message::Award { .. })) == 0 {
        assert!(hall.step());
    }
    let awarded = hall.now;
    hall.on(|auctioneer, cx| auctioneer.peer_down(&node(1), cx));
    hall.finish();
    assert!(hall.placed.keys().eq(&[(0, 2, node(2))]));
    assert!(hall.now.since(awarded) < VERDICT);
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
fn only_the_first_answer_of_who_was_asked_counts() {
    let mut hall = Hall::new(vec![Bidder { deaf: true, ..Bidder::default() }; 3]);
    hall.open(&[(3, 1)], 2, &[]);
    let bid = |auction: u64, price: u32| Message::Bid { auction, prices: vec![price; 9], basis: Basis::default() };
    hall.hear(node(1), bid(1, 50));
    // Again and cheaper, from one that was not asked, and for an auction that is not.
    hall.hear(node(1), bid(1, 5));
    hall.hear(node(1), Message::Refusal { auction: 1, refusal: Refusal::Full });
    hall.hear(node(3), bid(1, 1));
    hall.hear(node(2), bid(9, 1));
    hall.hear(node(2), bid(1, 40));
    assert!(matches!(hall.sent.last(), Some((to, Message::Award { .. })) if *to == node(2)));
    hall.hear(node(1), verdict(1, None));
    hall.hear(node(2), verdict(2, None));
    assert!(hall.placed.is_empty(), "another's verdict, and one on another epoch");
    hall.hear(node(2), verdict(1, Some(Refusal::Full)));
    hall.hear(node(2), verdict(1, None));
    hall.hear(node(2), verdict(1, Some(Refusal::Superseded { epoch: 70 })));
    hall.hear(node(1), verdict(1, None));
    hall.hear(node(1), verdict(1, Some(Refusal::Full)));
    assert!(hall.placed.keys().eq(&[(3, 1, node(1))]) && hall.no_taker.is_empty());
}

#[test]
fn whatever_is_lost_doubled_late_or_dies_every_auction_ends_and_no_epoch_has_two_takers() {
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let count = rng.u8(1..30);
        let bidders: Vec<Bidder> = (0..count).map(|_| Bidder::random(&mut rng)).collect();
        let mut hall = Hall::new(bidders);
        (hall.loss, hall.doubled, hall.slowest) = (rng.f64() * 0.4, rng.f64() * 0.5, [20, 200, 1500][rng.usize(..3)]);
        let replicas: Vec<(u32, u64)> = (0..rng.u32(1..8)).map(|replica| (replica, 1)).collect();
        hall.open(&replicas, rng.usize(1..20), &[]);
        while hall.step() {
            if rng.u8(..100) == 0 {
                let dead = node(rng.u8(1..=count));
                hall.bidders.entry(dead).and_modify(|bidder| bidder.deaf = true);
                hall.on(|auctioneer, cx| auctioneer.peer_down(&dead, cx));
            }
        }
        let placed: BTreeSet<u32> = hall.placed.keys().map(|(replica, ..)| *replica).collect();
        assert_eq!(placed.len(), hall.placed.len(), "seed {seed}: each replica once");
        let left = usize::from(placed.len() < replicas.len());
        assert_eq!(hall.no_taker.len(), left, "seed {seed}: what was not placed found no taker, once");
        assert!(replicas.iter().all(|(replica, _)| !hall.auctioneer.holds(&WORKLOAD, *replica)), "seed {seed}");
        let held: Vec<PlacementId> = hall.bidders.values().flat_map(|bidder| bidder.held.clone()).collect();
        assert_eq!(held.len(), BTreeSet::from_iter(&held).len(), "seed {seed}: one epoch, one taker");
        for (replica, epoch, node) in hall.placed.keys() {
            let took = |held: &&PlacementId| (held.replica, held.epoch) == (*replica, *epoch);
            assert!(hall.bidders[node].held.iter().any(|held| took(&held)), "seed {seed}: who is named accepted");
        }
    }
}

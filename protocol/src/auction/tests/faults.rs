//! What is lost, doubled, late, refused after all, or dies in the middle.

use super::*;

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

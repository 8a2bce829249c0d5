//! Leases among modelled custodians: who may hold one, and when; and that a term has one set of seats, whoever proposes.

use std::collections::BTreeMap;

use fastrand::Rng;

use super::*;
use crate::id::WorkloadId;
use crate::message::Message;
use crate::time::Instant;
use crate::workload::PlacementId;

const WORKLOAD: WorkloadId = WorkloadId([7; 16]);

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn at(millis: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(millis)
}

fn placement(epoch: u64) -> PlacementId {
    PlacementId { workload: WORKLOAD, replica: 0, epoch }
}

fn seats(term: u64, nodes: &[u8]) -> Seats {
    Seats { term, nodes: nodes.iter().copied().map(node).collect() }
}

/// Custodians that have been there for long.
fn custodians(seats: &Seats) -> BTreeMap<NodeId, Custodian> {
    let made = seats.nodes.iter().map(|node| {
        let mut custodian = Custodian::new(*node, Instant::ZERO);
        custodian.learn(WORKLOAD, seats, Instant::ZERO);
        (*node, custodian)
    });
    made.collect()
}

fn grants(custodian: &mut Custodian, holder: u8, epoch: u64, seats: &Seats, now: Instant) -> bool {
    matches!(custodian.requested(node(holder), placement(epoch), seats, 1, now), Message::LeaseGranted { .. })
}

#[test]
fn a_clock_that_is_one_percent_wrong_ends_no_lease_too_late_and_none_too_soon() {
    // The holder's clock runs slow, so that its short ttl takes longer; the custodian's runs fast.
    let (holder, custodian) = (SHORT.as_secs_f64() / 0.99, LONG.as_secs_f64() / 1.01);
    assert!(holder <= TTL.as_secs_f64() + 1e-9 && TTL.as_secs_f64() <= custodian + 1e-9);
    assert!(RENEW * 2 + MARGIN < SHORT, "two renewals may be lost");
}

#[test]
fn a_majority_makes_a_lease_and_it_counts_from_before_it_was_asked_for() {
    let three = seats(1, &[1, 2, 3]);
    let mut holder = Holder::default();
    holder.begin(placement(1), three.clone(), at(10_000));
    let asked = holder.handle_timeout(at(10_000));
    assert_eq!(asked.len(), 3);
    let Message::LeaseRequest { seq, .. } = asked[0].1 else { panic!("{asked:?}") };
    holder.granted(node(1), placement(1), 1, seq);
    holder.granted(node(1), placement(1), 1, seq);
    holder.granted(node(9), placement(1), 1, seq);
    holder.granted(node(2), placement(1), 2, seq);
    assert_eq!(holder.until(&placement(1)), None, "one custodian twice, one that is none, and another term's");
    holder.granted(node(2), placement(1), 1, seq);
    assert_eq!(holder.until(&placement(1)), Some(at(10_000) + SHORT));
    assert_eq!(holder.take_news(), [News::Until(placement(1), at(10_000) + SHORT)]);
    // Nobody renews it: it is given up a margin before its end.
    let end = at(10_000) + SHORT;
    let last = Instant::from_nanos(end.as_nanos() - MARGIN.as_nanos() as u64);
    assert!(holder.handle_timeout(Instant::from_nanos(last.as_nanos() - 1)).len() == 3);
    assert!(holder.take_news().is_empty());
    holder.handle_timeout(last);
    assert_eq!(holder.take_news(), [News::Lapsed(placement(1))]);
}

#[test]
fn a_lease_is_granted_to_one_until_it_is_over_or_given_back() {
    let three = seats(1, &[1, 2, 3]);
    let mut all = custodians(&three);
    let custodian = all.get_mut(&node(1)).unwrap();
    assert!(!grants(custodian, 8, 1, &three, at(100)), "it has just started, and may have granted it before");
    let start = Instant::ZERO + LONG;
    assert!(grants(custodian, 8, 1, &three, start));
    assert!(grants(custodian, 8, 1, &three, start + RENEW), "its holder renews it");
    assert!(!grants(custodian, 9, 2, &three, start + LONG), "a later epoch waits all the same");
    assert!(grants(custodian, 9, 2, &three, start + RENEW + LONG));
    assert!(grants(custodian, 9, 3, &three, start + RENEW + LONG), "a node hands over to its own next placement");
    assert!(!grants(custodian, 9, 2, &three, start + RENEW + LONG), "and not back");
    custodian.released(node(8), placement(1), start + RENEW + LONG);
    assert!(!grants(custodian, 8, 3, &three, start + RENEW + LONG), "only its holder gives it back");
    custodian.released(node(9), placement(3), start + RENEW + LONG);
    assert!(grants(custodian, 8, 3, &three, start + RENEW + LONG));
    custodian.invariants();
}

#[test]
fn who_has_voted_for_other_seats_grants_nothing_and_who_is_new_waits() {
    let (old, new) = (seats(1, &[1, 2, 3]), seats(2, &[1, 2, 4]));
    let mut all = custodians(&old);
    let now = Instant::ZERO + LONG;
    let first = all.get_mut(&node(1)).unwrap();
    let ballot = (1, node(2));
    assert!(first.prepare(node(2), WORKLOAD, 1, ballot).is_some());
    assert!(grants(first, 8, 1, &old, now), "a promise alone changes nothing");
    assert!(first.accept(node(2), WORKLOAD, ballot, new.clone(), now).is_some());
    assert!(!grants(first, 8, 1, &old, now), "a vote does");
    assert!(first.prepare(node(3), WORKLOAD, 1, (0, node(3))).is_none(), "an earlier ballot");
    first.learn(WORKLOAD, &new, now);
    assert!(grants(first, 8, 1, &new, now), "it remembers that this one holds it");
    assert!(!grants(first, 9, 2, &new, now));
    let mut newcomer = Custodian::new(node(4), Instant::ZERO);
    newcomer.learn(WORKLOAD, &new, now);
    assert!(!grants(&mut newcomer, 9, 2, &new, now), "others granted what it does not know of");
    assert!(grants(&mut newcomer, 9, 2, &new, now + LONG));
    // Found by the seeds: new in term 2, it is so still when term 3 comes before its wait is over.
    let mut newcomer = Custodian::new(node(4), Instant::ZERO);
    newcomer.learn(WORKLOAD, &new, now);
    newcomer.learn(WORKLOAD, &seats(3, &[2, 4, 5]), now + RENEW);
    assert!(!grants(&mut newcomer, 9, 2, &seats(3, &[2, 4, 5]), now + RENEW));
    // Who missed a term knows nothing of what was granted in it, though it had a seat before.
    let third = all.get_mut(&node(3)).unwrap();
    third.learn(WORKLOAD, &seats(3, &[1, 2, 3]), now);
    assert!(!grants(third, 9, 2, &seats(3, &[1, 2, 3]), now));
    assert!(!grants(third, 9, 2, &old, now + LONG), "what was is not granted under any more");
}

#[test]
fn one_change_at_a_time_and_only_when_it_is_due() {
    let three = seats(1, &[1, 2, 3]);
    let others = [4, 1, 5].map(node);
    let lost = |gone: u8| move |other: &NodeId| *other == node(gone);
    assert_eq!(three.changed(lost(9), &others, 3), None);
    assert_eq!(three.changed(lost(2), &others, 4), Some(seats(2, &[1, 3, 4])));
    assert_eq!(three.changed(lost(2), &[node(1)], 3), None, "nobody to take its seat");
    assert_eq!(seats(1, &[1]).changed(lost(9), &others, 3), Some(seats(2, &[1, 4])), "a mesh that has grown");
    let (one, other) = (three.forced(vec![node(1)]).unwrap(), three.forced(vec![node(2)]).unwrap());
    assert!(one.era() == 1 && one.term != other.term, "two admins that force others at once make two terms");
    assert!(three.may_become(&seats(2, &[1, 2, 4]), &node(3)) && !three.may_become(&seats(2, &[1, 2, 4]), &node(4)));
    assert!(!three.may_become(&one, &node(1)), "no custodian forces");
    let last = seats(MAX_TERM, &[1]);
    assert_eq!((last.forced(vec![node(2)]), last.changed(lost(1), &others, 3)), (None, None), "no term is left");
    assert!(last.is_good() && !seats(MAX_TERM + 1, &[1]).is_good() && !seats(u64::MAX, &[1]).is_good());
    assert!(!seats(1, &[1, 1]).is_good() && !seats(0, &[1]).is_good() && !seats(1, &[]).is_good());
}

/// A proposer dies, messages are lost, doubled and late, others propose other seats: of a term there is one set.
#[test]
fn a_term_has_one_set_of_seats_whoever_proposes() {
    let mut decided_in = 0;
    for seed in 0..3000 {
        let mut rng = Rng::with_seed(seed);
        let old = seats(1, &[1, 2, 3, 4, 5]);
        let mut all = custodians(&old);
        let mut now = Instant::ZERO + LONG;
        let mut wire: Vec<(NodeId, NodeId, Message)> = Vec::new();
        let mut decided: Vec<Seats> = Vec::new();
        for step in 0..400 {
            now = now + Duration::from_millis(rng.u64(0..20));
            if step % 40 == 0 {
                let proposer = node(rng.u8(1..=5));
                let mut nodes = old.nodes.clone();
                nodes.remove(rng.usize(..5));
                nodes.push(node(rng.u8(10..20)));
                let custodian = all.get_mut(&proposer).unwrap();
                let value = custodian.accepted(&WORKLOAD).cloned().unwrap_or(Seats { term: 2, nodes });
                let out = custodian.propose(WORKLOAD, value, now + Duration::from_secs(2 * step / 40));
                wire.extend(out.into_iter().map(|(to, message)| (proposer, to, message)));
            }
            if wire.is_empty() {
                continue;
            }
            let (from, to, message) = wire.swap_remove(rng.usize(..wire.len()));
            if rng.f64() < 0.1 {
                continue;
            }
            if rng.f64() < 0.1 {
                wire.push((from, to, message.clone()));
            }
            let Some(custodian) = all.get_mut(&to) else { continue };
            let answers: Vec<(NodeId, Message)> = match message {
                Message::SeatsPrepare { workload, term, ballot } => {
                    custodian.prepare(from, workload, term, ballot).into_iter().map(|answer| (from, answer)).collect()
                }
                Message::SeatsPromise { workload, term, ballot, accepted } => {
                    custodian.promised(from, workload, (term, ballot), accepted)
                }
                Message::SeatsAccept { workload, ballot, seats } => {
                    let vote = custodian.accept(from, workload, ballot, seats, now);
                    vote.into_iter().map(|answer| (from, answer)).collect()
                }
                Message::SeatsAccepted { workload, term, ballot } => custodian.voted(from, workload, term, ballot, now),
                // Those that have not heard go on under the old seats: the worst case.
                _ => Vec::new(),
            };
            custodian.invariants();
            decided.extend(custodian.take_decided().into_iter().map(|(_, seats)| seats));
            wire.extend(answers.into_iter().map(|(to_whom, message)| (to, to_whom, message)));
        }
        decided_in += usize::from(!decided.is_empty());
        let one = decided.first();
        assert!(decided.iter().all(|seats| Some(seats) == one), "seed {seed}: {decided:?}");
    }
    assert!(decided_in > 2000, "the proposals are decided as a rule: {decided_in}");
}

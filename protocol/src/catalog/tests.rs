use std::collections::BTreeMap;

use fastrand::Rng;

use super::hlc::{Clock, Hlc};
use super::reconcile::{Content, Index, compare, open};
use crate::id::KeyHash;
use crate::time::UnixMillis;

fn key(n: u64) -> KeyHash {
    KeyHash(blake3::hash(&n.to_be_bytes()).as_bytes()[..16].try_into().unwrap())
}

/// Lets two indices talk until neither has more to say; returns the messages and stamps it took.
fn exchange(a: &mut Index, b: &mut Index) -> (usize, usize) {
    let mut ranges = open(a);
    let (mut messages, mut moved) = (1, 0);
    let mut turn = true;
    while !ranges.is_empty() {
        let (receiver, sender) = if turn { (&mut *b, &mut *a) } else { (&mut *a, &mut *b) };
        let found = compare(receiver, ranges);
        for key in &found.want {
            receiver.insert(*key, sender[key]);
        }
        for key in &found.offer {
            sender.insert(*key, receiver[key]);
        }
        moved += found.want.len() + found.offer.len();
        ranges = found.ranges;
        messages += usize::from(!ranges.is_empty());
        turn = !turn;
    }
    (messages, moved)
}

#[test]
fn two_in_step_pay_one_fingerprint_whatever_their_size() {
    let mut a: Index = (0..10_000).map(|n| (key(n), Hlc::at(UnixMillis(n)))).collect();
    let mut b = a.clone();
    assert_eq!(open(&a).len(), 1);
    assert!(matches!(open(&a)[0].content, Content::Fingerprint(_)));
    assert_eq!(exchange(&mut a, &mut b), (1, 0));
}

#[test]
fn any_two_sets_become_their_union_of_newest() {
    let mut rng = Rng::with_seed(1);
    for round in 0..200 {
        let (mut a, mut b) = (Index::new(), Index::new());
        for n in 0..rng.u64(0..300) {
            let (left, right) = (rng.u8(..4), rng.u8(..4));
            if left > 0 {
                a.insert(key(n), Hlc::at(UnixMillis(u64::from(left))));
            }
            if right > 0 {
                b.insert(key(n), Hlc::at(UnixMillis(u64::from(right))));
            }
        }
        let mut union: BTreeMap<KeyHash, Hlc> = a.clone();
        for (key, version) in &b {
            let newest = union.entry(*key).or_insert(*version);
            *newest = (*newest).max(*version);
        }
        exchange(&mut a, &mut b);
        assert_eq!(a, union, "round {round}");
        assert_eq!(b, union, "round {round}");
    }
}

#[test]
fn the_cost_grows_with_the_difference() {
    let mut a: Index = (0..10_000).map(|n| (key(n), Hlc::at(UnixMillis(1)))).collect();
    let mut b = a.clone();
    b.insert(key(77), Hlc::at(UnixMillis(2)));
    let (messages, moved) = exchange(&mut a, &mut b);
    // What is listed around the difference may be offered back; it is a handful, not the set.
    assert!(moved <= 2, "{moved} facts for one difference");
    assert!(messages <= 7, "{messages} messages");
}

#[test]
fn ranges_out_of_order_are_not_followed() {
    let index: Index = (0..100).map(|n| (key(n), Hlc::at(UnixMillis(1)))).collect();
    let mut ranges = open(&index);
    ranges.insert(0, super::Range { end: Some(KeyHash([255; 16])), content: Content::Skip });
    ranges.insert(1, super::Range { end: Some(KeyHash([1; 16])), content: Content::Items(Vec::new()) });
    assert!(compare(&index, ranges).offer.is_empty());
}

#[test]
fn a_clock_never_stamps_twice_and_follows_what_it_saw() {
    let mut clock = Clock::default();
    let first = clock.stamp(UnixMillis(1000));
    let second = clock.stamp(UnixMillis(999));
    assert!(second > first);
    clock.observe(Hlc::at(UnixMillis(5000)));
    let third = clock.stamp(UnixMillis(1001));
    assert!(third > Hlc::at(UnixMillis(5000)));
    assert_eq!(third.ahead_of(UnixMillis(1001)), 3999);
}

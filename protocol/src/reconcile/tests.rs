use std::collections::BTreeMap;

use fastrand::Rng;

use super::*;

#[derive(Clone, Debug, PartialEq)]
struct Thing(KeyHash, u64);

impl Item for Thing {
    fn hash(&self) -> KeyHash {
        self.0
    }

    fn version(&self) -> u128 {
        self.1.into()
    }

    fn fingerprint(&self) -> u128 {
        let hash = blake3::hash(&crate::codec::encode(&(self.0, self.1)));
        u128::from_be_bytes(hash.as_bytes()[..16].try_into().unwrap())
    }
}

fn key(n: u64) -> KeyHash {
    KeyHash(blake3::hash(&n.to_be_bytes()).as_bytes()[..16].try_into().unwrap())
}

fn set(things: impl IntoIterator<Item = (u64, u64)>) -> Index<Thing> {
    let mut index = Index::default();
    for (n, version) in things {
        index.insert(Thing(key(n), version));
    }
    index
}

fn all(index: &Index<Thing>) -> BTreeMap<KeyHash, u64> {
    index.iter().map(|thing| (thing.0, thing.1)).collect()
}

/// Lets two sets talk until neither has more to say; returns the messages and items it took.
fn exchange(a: &mut Index<Thing>, b: &mut Index<Thing>) -> (usize, usize) {
    let mut ranges = open(a);
    let (mut messages, mut moved) = (1, 0);
    let mut turn = true;
    while !ranges.is_empty() {
        let (receiver, sender) = if turn { (&mut *b, &mut *a) } else { (&mut *a, &mut *b) };
        let found = compare(receiver, ranges);
        for key in &found.want {
            receiver.insert(sender.get(key).unwrap().clone());
        }
        for key in &found.offer {
            sender.insert(receiver.get(key).unwrap().clone());
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
    let mut a = set((0..10_000).map(|n| (n, n)));
    let mut b = set((0..10_000).rev().map(|n| (n, n)));
    assert_eq!(open(&a).len(), 1);
    assert!(matches!(open(&a)[0].content, Content::Fingerprint(_)));
    assert_eq!(exchange(&mut a, &mut b), (1, 0));
}

#[test]
fn any_two_sets_become_their_union_of_newest() {
    let mut rng = Rng::with_seed(1);
    for round in 0..200 {
        let (mut a, mut b) = (Index::default(), Index::default());
        for n in 0..rng.u64(0..3000) {
            let (left, right) = (rng.u64(..4), rng.u64(..4));
            if left > 0 {
                a.insert(Thing(key(n), left));
            }
            if right > 0 {
                b.insert(Thing(key(n), right));
            }
        }
        let mut union = all(&a);
        for (key, version) in all(&b) {
            let newest = union.entry(key).or_insert(version);
            *newest = (*newest).max(version);
        }
        exchange(&mut a, &mut b);
        assert_eq!(all(&a), union, "round {round}");
        assert_eq!(all(&b), union, "round {round}");
    }
}

#[test]
fn the_cost_grows_with_the_difference() {
    let mut a = set((0..10_000).map(|n| (n, 1)));
    let mut b = set((0..10_000).map(|n| (n, 1 + u64::from(n == 77))));
    let (messages, moved) = exchange(&mut a, &mut b);
    assert_eq!(moved, 1, "one difference");
    assert!(messages <= 5, "{messages} messages");
}

#[test]
fn ranges_out_of_order_are_not_followed() {
    let index = set((0..100).map(|n| (n, 1)));
    let mut ranges = open(&index);
    ranges.insert(0, Range { end: Some(KeyHash([255; 16])), content: Content::Skip });
    ranges.insert(1, Range { end: Some(KeyHash([1; 16])), content: Content::Items(Vec::new()) });
    assert!(compare(&index, ranges).offer.is_empty());
}

#[test]
fn an_index_is_its_items_whatever_way_they_came() {
    let mut rng = Rng::with_seed(2);
    let (mut index, mut plain) = (Index::default(), BTreeMap::new());
    for step in 0..20_000u64 {
        let (hash, version) = (key(rng.u64(..500)), rng.u64(..50));
        match rng.u8(..4) {
            0 => assert_eq!(index.remove(&hash).map(|thing: Thing| thing.1), plain.remove(&hash)),
            1 => {
                let changed = index.change(&hash, |thing| thing.1 = version);
                assert_eq!(changed, plain.get_mut(&hash).map(|old| *old = version));
            }
            _ => assert_eq!(index.insert(Thing(hash, version)).map(|thing| thing.1), plain.insert(hash, version)),
        }
        if step % 100 == 99 {
            let mut fresh = Index::default();
            for (hash, version) in &plain {
                fresh.insert(Thing(*hash, *version));
            }
            let (a, b) = (key(rng.u64(..500)), key(rng.u64(..500)));
            assert_eq!(index.sum(a.min(b), Some(a.max(b))), fresh.sum(a.min(b), Some(a.max(b))));
            assert_eq!(index.range(a.min(b), Some(a.max(b))).count(), plain.range(a.min(b)..a.max(b)).count());
            assert_eq!((index.len(), index.fingerprint()), (plain.len(), fresh.fingerprint()));
            let at = rng.usize(..plain.len());
            assert_eq!(index.nth(at).map(|thing| thing.0), plain.keys().nth(at).copied());
        }
    }
}

//! A set in the order of its items' hashes that knows the fingerprint of any part of itself at once.
//!
//! 256 buckets by the first byte of the hash, each sorted and with the sum of its items' fingerprints: a part costs one
//! addition for each whole bucket in it, and a look at the items of the two it cuts through. Sixteen bytes and a pointer
//! for each item and nothing else, because a node keeps one for each member and each fact of the mesh.
//!
//! Sums are modulo 2¹²⁸ over fingerprints that only a hash of the item's bytes can choose. Whoever could make them
//! collide would keep a fact from spreading by reconciliation, and has to be its author to do so.

use crate::id::{Fingerprint, KeyHash};

const BUCKETS: usize = 256;

/// What such a set is made of.
pub trait Item {
    /// Its place. Two versions of one thing have the same.
    fn hash(&self) -> KeyHash;
    /// Its version: the higher is newer.
    fn version(&self) -> u128;
    /// Of place and version: as good as random.
    fn fingerprint(&self) -> u128;
}

#[derive(Debug)]
struct Bucket<T> {
    items: Vec<T>,
    sum: u128,
}

/// The set.
#[derive(Debug)]
pub struct Index<T> {
    buckets: Vec<Bucket<T>>,
    len: usize,
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| Bucket { items: Vec::new(), sum: 0 }).collect();
        Index { buckets, len: 0 }
    }
}

impl<T: Item> Index<T> {
    /// How many items there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The item at a place.
    pub fn get(&self, hash: &KeyHash) -> Option<&T> {
        let items = &self.bucket(hash).items;
        items.binary_search_by_key(hash, Item::hash).ok().map(|at| &items[at])
    }

    /// Puts an item at its place and returns what was there.
    pub fn insert(&mut self, item: T) -> Option<T> {
        let hash = item.hash();
        let bucket = &mut self.buckets[usize::from(hash.0[0])];
        bucket.sum = bucket.sum.wrapping_add(item.fingerprint());
        match bucket.items.binary_search_by_key(&hash, Item::hash) {
            Ok(at) => {
                let old = std::mem::replace(&mut bucket.items[at], item);
                bucket.sum = bucket.sum.wrapping_sub(old.fingerprint());
                Some(old)
            }
            Err(at) => {
                bucket.items.insert(at, item);
                self.len += 1;
                None
            }
        }
    }

    /// Takes an item out.
    pub fn remove(&mut self, hash: &KeyHash) -> Option<T> {
        let bucket = &mut self.buckets[usize::from(hash.0[0])];
        let at = bucket.items.binary_search_by_key(hash, Item::hash).ok()?;
        let old = bucket.items.remove(at);
        bucket.sum = bucket.sum.wrapping_sub(old.fingerprint());
        self.len -= 1;
        Some(old)
    }

    /// Changes an item where it is; not its place.
    pub fn change<R>(&mut self, hash: &KeyHash, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        let bucket = &mut self.buckets[usize::from(hash.0[0])];
        let at = bucket.items.binary_search_by_key(hash, Item::hash).ok()?;
        let item = &mut bucket.items[at];
        bucket.sum = bucket.sum.wrapping_sub(item.fingerprint());
        let result = change(item);
        debug_assert_eq!(item.hash(), *hash, "an item keeps its place");
        bucket.sum = bucket.sum.wrapping_add(item.fingerprint());
        Some(result)
    }

    /// All items in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.buckets.iter().flat_map(|bucket| &bucket.items)
    }

    /// The item before which `position` others are.
    pub fn nth(&self, mut position: usize) -> Option<&T> {
        for bucket in &self.buckets {
            match bucket.items.get(position) {
                Some(item) => return Some(item),
                None => position -= bucket.items.len(),
            }
        }
        None
    }

    /// The items from `start` up to and excluding `end`; `None` is the end of everything.
    pub fn range(&self, start: KeyHash, end: Option<KeyHash>) -> impl Iterator<Item = &T> {
        self.parts(start, end).flat_map(|(_, items)| items)
    }

    /// How many those are, and the sum of their fingerprints.
    pub fn sum(&self, start: KeyHash, end: Option<KeyHash>) -> (usize, Fingerprint) {
        let (mut count, mut sum) = (0, 0u128);
        for (bucket, items) in self.parts(start, end) {
            count += items.len();
            let part = if items.len() == bucket.items.len() {
                bucket.sum
            } else {
                items.iter().fold(0, |sum: u128, item| sum.wrapping_add(item.fingerprint()))
            };
            sum = sum.wrapping_add(part);
        }
        (count, Fingerprint(sum.to_be_bytes()))
    }

    /// The sum over everything.
    pub fn fingerprint(&self) -> Fingerprint {
        self.sum(KeyHash([0; 16]), None).1
    }

    fn bucket(&self, hash: &KeyHash) -> &Bucket<T> {
        &self.buckets[usize::from(hash.0[0])]
    }

    fn parts(&self, start: KeyHash, end: Option<KeyHash>) -> impl Iterator<Item = (&Bucket<T>, &[T])> {
        let last = end.map_or(BUCKETS - 1, |end| usize::from(end.0[0]));
        let first = usize::from(start.0[0]).min(last);
        self.buckets[first..=last].iter().map(move |bucket| {
            let from = bucket.items.partition_point(|item| item.hash() < start);
            let to = end.map_or(bucket.items.len(), |end| bucket.items.partition_point(|item| item.hash() < end));
            (bucket, &bucket.items[from.min(to)..to])
        })
    }
}

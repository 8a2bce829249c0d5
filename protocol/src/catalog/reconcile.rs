//! Range-based set reconciliation (Meyer 2022, 2023): two nodes find where they differ by comparing fingerprints of
//! ranges of key hashes, and splitting those that differ.
//!
//! Stateless: each message carries ranges that together cover what is still open, and the answer depends on it and on
//! the receiver's catalog alone. A lost message ends the exchange; the next one starts afresh. Two nodes in step pay
//! one message of one fingerprint. Each answer either closes a range or splits it eightfold, so an exchange over n
//! facts ends after log₈ n rounds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::hlc::Hlc;
use crate::id::{Fingerprint, KeyHash};

/// A range with no more items than this is listed, not split.
const LIST: usize = 16;
/// Into how many parts a differing range is split.
const SPLIT: usize = 8;
/// The most ranges in one message; more wait for the next exchange.
pub const MAX_RANGES: usize = 512;

/// A part of the order of key hashes, from where the one before ended up to and excluding `end`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// `None` is the end of everything.
    pub end: Option<KeyHash>,
    /// What the sender has there.
    pub content: Content,
}

/// What a sender has in a range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Nothing to settle here.
    Skip,
    /// The exclusive or of its items' hashes.
    Fingerprint(Fingerprint),
    /// All its items.
    Items(Vec<(KeyHash, Hlc)>),
}

/// What came of comparing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// What is still open, to be sent back; empty is the end.
    pub ranges: Vec<Range>,
    /// What the peer has and this node lacks.
    pub want: Vec<KeyHash>,
    /// What this node has and the peer lacks.
    pub offer: Vec<KeyHash>,
}

/// A catalog's stamps in the order of their key hashes.
pub type Index = BTreeMap<KeyHash, Hlc>;

/// The opening message: everything, in one fingerprint.
pub fn open(index: &Index) -> Vec<Range> {
    vec![Range { end: None, content: Content::Fingerprint(fingerprint(index.iter())) }]
}

/// Compares a peer's ranges with this catalog.
pub fn compare(index: &Index, ranges: Vec<Range>) -> Comparison {
    let mut result = Comparison::default();
    let mut start = KeyHash([0; 16]);
    let mut done = false;
    for range in ranges.into_iter().take(MAX_RANGES) {
        if done || range.end.is_some_and(|end| end < start) {
            break;
        }
        let mine: Vec<(KeyHash, Hlc)> = match range.end {
            Some(end) => index.range(start..end).map(|(key, version)| (*key, *version)).collect(),
            None => index.range(start..).map(|(key, version)| (*key, *version)).collect(),
        };
        match range.content {
            Content::Skip => result.skip(range.end),
            Content::Fingerprint(theirs) if theirs == fingerprint(mine.iter().map(|(key, v)| (key, v))) => {
                result.skip(range.end);
            }
            Content::Fingerprint(_) if mine.len() <= LIST || result.ranges.len() + SPLIT > MAX_RANGES => {
                let listed = mine.into_iter().take(LIST * SPLIT).collect();
                result.ranges.push(Range { end: range.end, content: Content::Items(listed) });
            }
            Content::Fingerprint(_) => result.split(&mine, range.end),
            Content::Items(theirs) => {
                result.settle(&mine, theirs);
                result.skip(range.end);
            }
        }
        match range.end {
            Some(end) => start = end,
            None => done = true,
        }
    }
    if result.ranges.iter().all(|range| range.content == Content::Skip) {
        result.ranges.clear();
    }
    result
}

impl Comparison {
    fn skip(&mut self, end: Option<KeyHash>) {
        match self.ranges.last_mut() {
            Some(last) if last.content == Content::Skip => last.end = end,
            _ => self.ranges.push(Range { end, content: Content::Skip }),
        }
    }

    fn split(&mut self, mine: &[(KeyHash, Hlc)], end: Option<KeyHash>) {
        let step = mine.len().div_ceil(SPLIT);
        for (at, part) in mine.chunks(step).enumerate() {
            let end = mine.get((at + 1) * step).map_or(end, |(key, _)| Some(*key));
            let content = Content::Fingerprint(fingerprint(part.iter().map(|(key, v)| (key, v))));
            self.ranges.push(Range { end, content });
        }
    }

    fn settle(&mut self, mine: &[(KeyHash, Hlc)], theirs: Vec<(KeyHash, Hlc)>) {
        let mine: BTreeMap<KeyHash, Hlc> = mine.iter().copied().collect();
        let theirs: BTreeMap<KeyHash, Hlc> = theirs.into_iter().collect();
        let newer = |a: &BTreeMap<KeyHash, Hlc>, b: &BTreeMap<KeyHash, Hlc>| -> Vec<KeyHash> {
            let lacks = |(key, version): &(&KeyHash, &Hlc)| b.get(key).is_none_or(|other| other < version);
            a.iter().filter(lacks).map(|(key, _)| *key).collect()
        };
        self.want.extend(newer(&theirs, &mine));
        self.offer.extend(newer(&mine, &theirs));
    }
}

/// The exclusive or of the hashes of items; of none it is zero.
pub fn fingerprint<'a>(items: impl Iterator<Item = (&'a KeyHash, &'a Hlc)>) -> Fingerprint {
    let mut sum = [0; 16];
    for (key, version) in items {
        let hash = blake3::hash(&crate::codec::encode(&(key, version)));
        for (byte, other) in sum.iter_mut().zip(hash.as_bytes()) {
            *byte ^= other;
        }
    }
    Fingerprint(sum)
}

//! Range-based set reconciliation (Meyer 2022, 2023): two nodes find where they differ by comparing fingerprints of
//! ranges of key hashes, and splitting those that differ. Facts of the catalog and words of members go through it.
//!
//! Stateless: each message carries ranges that together cover what is still open, and the answer depends on it and on
//! the receiver's set alone. A lost message ends the exchange; the next one starts afresh. Two nodes in step pay one
//! message of one fingerprint. Each answer either closes a range or splits it sixteenfold, so an exchange over n items
//! ends after log₁₆ n rounds.
//!
//! Differs from the paper: ranges are split in equal parts of the space of hashes, not of the items, since hashes are
//! spread evenly and an [`Index`] then knows the parts' fingerprints without looking at their items.

mod index;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use index::{Index, Item};

use crate::id::{Fingerprint, KeyHash};

/// A range with no more items than this is listed, not split.
const LIST: usize = 48;
/// Into how many parts a differing range is split.
const SPLIT: u128 = 16;
/// The most ranges in one message; more wait for the next exchange.
pub const MAX_RANGES: usize = 512;
/// The most items listed in one message: about 600 KiB of them.
const MAX_LISTED: usize = 24_000;

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
    /// The sum of its items' fingerprints.
    Fingerprint(Fingerprint),
    /// All its items: place and version.
    Items(Vec<(KeyHash, u128)>),
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

/// The opening message: everything, in one fingerprint.
pub fn open<T: Item>(index: &Index<T>) -> Vec<Range> {
    vec![Range { end: None, content: Content::Fingerprint(index.fingerprint()) }]
}

/// Compares a peer's ranges with this set.
pub fn compare<T: Item>(index: &Index<T>, ranges: Vec<Range>) -> Comparison {
    let mut result = Comparison::default();
    let mut start = KeyHash([0; 16]);
    let mut listed = 0;
    for range in ranges.into_iter().take(MAX_RANGES) {
        // What is left over is found by the next exchange.
        if range.end.is_some_and(|end| end < start) || result.ranges.len() >= MAX_RANGES {
            break;
        }
        match range.content {
            Content::Skip => result.skip(range.end),
            Content::Fingerprint(theirs) => {
                let (count, mine) = index.sum(start, range.end);
                if mine == theirs {
                    result.skip(range.end);
                } else if count <= LIST && listed + count <= MAX_LISTED {
                    listed += count;
                    let items = index.range(start, range.end).map(|item| (item.hash(), item.version())).collect();
                    result.ranges.push(Range { end: range.end, content: Content::Items(items) });
                } else if count > LIST && result.ranges.len() + SPLIT as usize <= MAX_RANGES {
                    result.split(index, start, range.end);
                } else {
                    // What comes before it is settled by then.
                    result.skip(range.end);
                }
            }
            Content::Items(theirs) => {
                result.settle(index, start, range.end, theirs);
                result.skip(range.end);
            }
        }
        match range.end {
            Some(end) => start = end,
            None => break,
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

    fn split<T: Item>(&mut self, index: &Index<T>, start: KeyHash, end: Option<KeyHash>) {
        let from = u128::from_be_bytes(start.0);
        let width = end.map_or(u128::MAX, |end| u128::from_be_bytes(end.0)) - from;
        let mut start = start;
        for part in 1..=SPLIT {
            // Rounded up, so that parts of everything begin where buckets do.
            let border = from + width / SPLIT * part + (width % SPLIT * part).div_ceil(SPLIT);
            let end = if part == SPLIT { end } else { Some(KeyHash(border.to_be_bytes())) };
            let (_, fingerprint) = index.sum(start, end);
            self.ranges.push(Range { end, content: Content::Fingerprint(fingerprint) });
            start = end.unwrap_or(start);
        }
    }

    fn settle<T: Item>(
        &mut self,
        index: &Index<T>,
        start: KeyHash,
        end: Option<KeyHash>,
        theirs: Vec<(KeyHash, u128)>,
    ) {
        let theirs: BTreeMap<KeyHash, u128> = theirs.into_iter().collect();
        for item in index.range(start, end) {
            if theirs.get(&item.hash()).is_none_or(|version| *version < item.version()) {
                self.offer.push(item.hash());
            }
        }
        for (hash, version) in theirs {
            if index.get(&hash).is_none_or(|item| item.version() < version) {
                self.want.push(hash);
            }
        }
    }
}

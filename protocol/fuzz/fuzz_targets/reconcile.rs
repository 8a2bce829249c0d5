//! A peer's ranges may be anything: out of order, overlapping, without end, of more items than there are. Comparing them
//! with an index offers only what is in it and wants only what is not, and the answer covers the same space in order,
//! within the bounds that a message of ranges has.
//!
//! The input is the encoded ranges, or, after a first byte of 0, a few bytes for each range, so that a short input has
//! as many of them as a message may.
#![no_main]

use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use moyai_protocol::codec;
use moyai_protocol::id::{Fingerprint, KeyHash};
use moyai_protocol::reconcile::{Content, Index, Item, MAX_RANGES, Range, compare};

/// The most items that an answer lists.
const MAX_LISTED: usize = 24_000;
/// So many that some ranges are split and others listed.
const ITEMS: u32 = 3000;

#[derive(Clone, Copy)]
struct Thing(KeyHash);

impl Item for Thing {
    fn hash(&self) -> KeyHash {
        self.0
    }

    fn version(&self) -> u128 {
        5
    }

    fn fingerprint(&self) -> u128 {
        u128::from_be_bytes(self.0.0).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
    }
}

static INDEX: LazyLock<Index<Thing>> = LazyLock::new(|| {
    let mut index = Index::default();
    for at in 0..ITEMS {
        // Spread over the first two bytes, so that the input can name them.
        index.insert(Thing(place((at * 21) as u16, at as u8)));
    }
    index
});

fn place(high: u16, low: u8) -> KeyHash {
    let mut hash = [0; 16];
    hash[..2].copy_from_slice(&high.to_be_bytes());
    hash[15] = low;
    KeyHash(hash)
}

fuzz_target!(|bytes: &[u8]| {
    let ranges = match bytes.split_first() {
        Some((0, rest)) => short(&mut Unstructured::new(rest)).ok(),
        _ => codec::decode::<Vec<Range>>(bytes).ok(),
    };
    let Some(ranges) = ranges else { return };
    let most_wanted: usize = ranges.iter().map(|range| items(range).len()).sum();
    let found = compare(&INDEX, ranges);
    assert!(found.ranges.len() <= MAX_RANGES, "{} ranges in answer", found.ranges.len());
    assert!(found.ranges.iter().map(|range| items(range).len()).sum::<usize>() <= MAX_LISTED);
    assert!(found.want.len() <= most_wanted, "more is wanted than was listed");
    assert!(found.want.iter().all(|hash| INDEX.get(hash).is_none_or(|item| item.version() == 5)));
    assert!(found.offer.iter().all(|hash| INDEX.get(hash).is_some()), "what is not here is offered");
    assert!(found.offer.len() <= INDEX.len(), "one thing is offered more than once");
    let ends: Vec<KeyHash> = found.ranges.iter().map(|range| range.end.unwrap_or(KeyHash([255; 16]))).collect();
    assert!(ends.is_sorted(), "ranges out of order");
    let unending = found.ranges.iter().filter(|range| range.end.is_none()).count();
    assert!(unending <= 1, "{unending} ranges without end");
    // An honest peer that gets this answer takes all of it.
    let answer = codec::encode(&found.ranges);
    assert_eq!(codec::decode::<Vec<Range>>(&answer).as_ref(), Ok(&found.ranges));
});

fn items(range: &Range) -> &[(KeyHash, u128)] {
    match &range.content {
        Content::Items(items) => items,
        Content::Skip | Content::Fingerprint(_) => &[],
    }
}

fn short(u: &mut Unstructured<'_>) -> Result<Vec<Range>> {
    let mut ranges = Vec::new();
    let mut start = 0u16;
    while !u.is_empty() && ranges.len() <= 2 * MAX_RANGES {
        let kind: u8 = u.arbitrary()?;
        // Forward as a rule, by as much as is split or listed.
        let end = match kind & 0x80 {
            0 => start.saturating_add(5 * u16::from(u.arbitrary::<u8>()?)),
            _ => u.arbitrary()?,
        };
        let content = match kind & 3 {
            0 => Content::Skip,
            1 => Content::Fingerprint(Fingerprint([0; 16])),
            2 => Content::Fingerprint(INDEX.sum(place(start, 0), Some(place(end, 0))).1),
            _ => {
                let count = u.int_in_range(0..=8)?;
                let item =
                    |u: &mut Unstructured<'_>| Ok((place(u.arbitrary()?, u.arbitrary()?), u.int_in_range(4..=6)?));
                Content::Items((0..count).map(|_| item(u)).collect::<Result<_>>()?)
            }
        };
        let end = if kind & 0x7c == 0x7c { None } else { Some(place(end, 0)) };
        start = end.map_or(start, |end| u16::from_be_bytes([end.0[0], end.0[1]]));
        ranges.push(Range { end, content });
    }
    Ok(ranges)
}

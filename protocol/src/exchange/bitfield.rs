//! One bit per piece of an image's contents.

use std::ops::Range;

/// A set of pieces, by position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitfield {
    /// Low bit of the first is the first piece.
    words: Vec<u64>,
}

impl Bitfield {
    /// From what a peer sent, cut to `pieces`.
    pub fn from_bytes(bytes: &[u8], pieces: usize) -> Self {
        let bytes = &bytes[..bytes.len().min(pieces.div_ceil(8))];
        let word = |eight: &[u8]| {
            let mut word = [0; 8];
            word[..eight.len()].copy_from_slice(eight);
            u64::from_le_bytes(word)
        };
        let mut words: Vec<u64> = bytes.chunks(8).map(word).collect();
        if let Some(last) = words.get_mut(pieces / 64) {
            *last &= (1 << (pieces % 64)) - 1;
        }
        Bitfield { words }
    }

    /// As it travels: low bit of the first byte is the first piece.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        bytes
    }

    /// Sixty-four of them, from the first on.
    pub(super) fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or_default()
    }

    /// Whether piece `at` is in the set.
    pub fn has(&self, at: usize) -> bool {
        self.word(at / 64) & (1 << (at % 64)) != 0
    }

    /// How many are in the set.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Adds piece `at`.
    pub fn set(&mut self, at: usize) {
        if self.words.len() <= at / 64 {
            self.words.resize(at / 64 + 1, 0);
        }
        self.words[at / 64] |= 1 << (at % 64);
    }

    /// Adds all of another's.
    pub(super) fn add(&mut self, other: &Bitfield) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// Removes what is not in another.
    pub(super) fn retain(&mut self, other: &Bitfield) {
        self.words.iter_mut().enumerate().for_each(|(at, word)| *word &= other.word(at));
    }

    /// Removes what is in another.
    pub(super) fn remove(&mut self, other: &Bitfield) {
        self.words.iter_mut().enumerate().for_each(|(at, word)| *word &= !other.word(at));
    }

    /// An upper bound of the bytes that it has as it travels.
    pub fn max_bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// Removes piece `at`.
    pub fn clear(&mut self, at: usize) {
        if let Some(word) = self.words.get_mut(at / 64) {
            *word &= !(1 << (at % 64));
        }
    }

    /// Whether all of the first `pieces` are in the set.
    pub fn is_full(&self, pieces: usize) -> bool {
        pieces_in(0..pieces, |at| !self.word(at)).next().is_none()
    }
}

/// Pieces in the range that are in the set whose words `word` gives, in order.
pub(super) fn pieces_in(range: Range<usize>, word: impl Fn(usize) -> u64) -> impl Iterator<Item = usize> {
    (range.start / 64..range.end.div_ceil(64)).flat_map(move |at| {
        let mut left = word(at);
        if at == range.start / 64 {
            left &= !0 << (range.start % 64);
        }
        if at == range.end / 64 {
            left &= (1 << (range.end % 64)) - 1;
        }
        std::iter::from_fn(move || {
            let first = (left != 0).then(|| at * 64 + left.trailing_zeros() as usize);
            left &= left.wrapping_sub(1);
            first
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_set_of_pieces_however_it_travelled() {
        let mut rng = fastrand::Rng::with_seed(7);
        for pieces in [0, 1, 7, 8, 63, 64, 65, 128, 500] {
            let (mut set, mut plain) = (Bitfield::default(), vec![false; pieces]);
            for at in (0..pieces).filter(|_| rng.bool()).collect::<Vec<_>>() {
                set.set(at);
                plain[at] = true;
            }
            let bytes = set.to_bytes();
            assert!(bytes.len() <= pieces.div_ceil(8));
            assert!(
                plain
                    .iter()
                    .enumerate()
                    .all(|(at, has)| bytes.get(at / 8).unwrap_or(&0) >> (at % 8) & 1 == u8::from(*has))
            );
            let came = Bitfield::from_bytes(&bytes, pieces);
            assert!(plain.iter().enumerate().all(|(at, has)| came.has(at) == *has && set.has(at) == *has));
            assert_eq!(came.count() as usize, plain.iter().filter(|has| **has).count());
            assert!(!came.has(pieces));
            let other = Bitfield::from_bytes(&[0x5a; 8], pieces);
            let (mut both, mut rest) = (set.clone(), set.clone());
            both.retain(&other);
            rest.remove(&other);
            assert!(plain.iter().enumerate().all(|(at, has)| both.has(at) == (*has && other.has(at))));
            assert!(plain.iter().enumerate().all(|(at, has)| rest.has(at) == (*has && !other.has(at))));
            let (start, end) = (rng.usize(..=pieces), rng.usize(..=pieces));
            let expected: Vec<usize> = (start..end).filter(|at| plain[*at]).collect();
            if start <= end {
                assert_eq!(pieces_in(start..end, |at| came.word(at)).collect::<Vec<_>>(), expected);
            }
            // What says more than there is is cut.
            let all = Bitfield::from_bytes(&[0xff; 100], pieces);
            assert!(all.is_full(pieces) && all.count() as usize == pieces.min(800));
            if pieces > 0 {
                let mut less = all;
                less.clear(rng.usize(..pieces));
                assert!(!less.is_full(pieces));
            }
        }
    }
}

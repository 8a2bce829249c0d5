//! One bit per piece of an image's contents.

/// A set of pieces, by position; low bit of the first byte is the first piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitfield {
    bytes: Vec<u8>,
}

impl Bitfield {
    /// From what a peer sent, cut to `pieces`.
    pub fn from_bytes(mut bytes: Vec<u8>, pieces: usize) -> Self {
        bytes.truncate(pieces.div_ceil(8));
        if let Some(last) = bytes.get_mut(pieces / 8) {
            *last &= (1 << (pieces % 8)) - 1;
        }
        Bitfield { bytes }
    }

    /// As it travels.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether piece `at` is in the set.
    pub fn has(&self, at: usize) -> bool {
        self.bytes.get(at / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0)
    }

    /// How many are in the set.
    pub fn count(&self) -> u32 {
        self.bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Adds piece `at`.
    pub fn set(&mut self, at: usize) {
        if self.bytes.len() <= at / 8 {
            self.bytes.resize(at / 8 + 1, 0);
        }
        self.bytes[at / 8] |= 1 << (at % 8);
    }

    /// Removes piece `at`.
    pub fn clear(&mut self, at: usize) {
        if let Some(byte) = self.bytes.get_mut(at / 8) {
            *byte &= !(1 << (at % 8));
        }
    }

    /// Whether all of the first `pieces` are in the set.
    pub fn is_full(&self, pieces: usize) -> bool {
        let whole = pieces / 8;
        self.bytes.len() >= pieces.div_ceil(8)
            && self.bytes[..whole].iter().all(|byte| *byte == 0xff)
            && (whole * 8..pieces).all(|at| self.has(at))
    }
}

//! Which pieces to ask a provider for next.

use std::ops::Range;

use fastrand::Rng;

use super::bitfield::pieces_in;
use super::{
    BATCH_BYTES, BATCH_PIECES, BELIEVED, BLOCK_BYTES, Batch, Bitfield, Download, ENDGAME, MAX_BATCHES, Provider,
    SHARED_BATCH_BYTES,
};
use crate::contract::Piece;
use crate::id::{ChunkId, NodeId};
use crate::time::Instant;

/// With so many batches in flight, for each provider that has everything, a node has enough to do.
const FEW: usize = 2;

impl Download {
    /// A run of missing pieces that `provider` has, as many as fit one batch.
    pub(super) fn pick(&self, provider: &Provider, now: Instant, rng: &mut Rng) -> Vec<u32> {
        let count = self.pieces.len();
        if count == 0 {
            return Vec::new();
        }
        let from = rng.usize(..count);
        let around = || self.wanted(provider, from..count).chain(self.wanted(provider, 0..from));
        // Only this node's share of who has everything, as long as there is some of it that nobody has.
        let shared = self.is_shared() && provider.complete;
        let is_own = |at: usize| self.share.has(at) && self.partly[at] == 0;
        let own = if shared { around().find(|at| is_own(*at)) } else { None };
        if shared && own.is_none() && self.is_contended(provider, now) {
            return Vec::new();
        }
        let Some(start) = own.or_else(|| around().min_by_key(|at| self.partly[*at])) else { return Vec::new() };
        let most = if self.is_shared() { SHARED_BATCH_BYTES } else { BATCH_BYTES };
        let mut bytes = 0;
        let mut run = Vec::new();
        for at in self.wanted(provider, start..count).chain(self.wanted(provider, 0..start)) {
            let is_known = shared && self.partly[start] == 0 && self.partly[at] > 0;
            if is_known || (own.is_some() && !self.share.has(at)) {
                continue;
            }
            bytes += u64::from(self.pieces[at].len);
            if run.len() >= BATCH_PIECES || (!run.is_empty() && bytes > most) {
                break;
            }
            run.push(at as u32);
        }
        run
    }

    /// Whether others take much of what this provider can give: then it is for them to take what is their share. As it said a
    /// moment ago, with what it gave; of one that does not say, as it seems.
    fn is_contended(&self, provider: &Provider, now: Instant) -> bool {
        match provider.gives_others {
            Some(gives_others) => gives_others && provider.heard.is_some_and(|heard| now.since(heard) < BELIEVED),
            None => self.is_busy(now) && self.is_slow(provider, now),
        }
    }

    /// Whether enough is on its way, and comes.
    fn is_busy(&self, now: Instant) -> bool {
        let complete = self.providers.values().filter(|provider| provider.complete && provider.is_able(now)).count();
        let comes = |batch: &&Batch| !batch.called_off && !batch.doubled && now.since(batch.asked) < ENDGAME;
        self.batches.values().filter(comes).count() >= (FEW * complete).min(MAX_BATCHES / 2)
    }

    /// Whether a provider's batches take longer than all take: many ask it.
    fn is_slow(&self, provider: &Provider, now: Instant) -> bool {
        provider.believed(now) > self.usual * 5 / 4
    }

    /// Missing pieces in this range that `provider` has, and nobody is asked for.
    fn wanted(&self, provider: &Provider, range: Range<usize>) -> impl Iterator<Item = usize> {
        let has_all = self.has_all(provider);
        pieces_in(range, move |at| {
            let offered = if has_all { !0 } else { provider.has.word(at) };
            offered & !self.have.word(at) & !self.in_flight.word(at)
        })
    }

    /// What of the demanded pieces `provider` has, as many as fit one batch.
    pub(super) fn pick_demanded(&self, provider: &Provider) -> Vec<u32> {
        let mut bytes = 0;
        let wanted = |at: usize| !self.have.has(at) && !self.in_flight.has(at) && self.offers(provider, at);
        let pieces = self.demanded.iter().copied().filter(|at| wanted(*at as usize));
        let fit = pieces.take_while(|at| {
            bytes += u64::from(self.pieces[*at as usize].len);
            bytes <= SHARED_BATCH_BYTES.max(u64::from(self.pieces[*at as usize].len))
        });
        fit.take(BATCH_PIECES).collect()
    }

    /// Whether others receive the image too, and can give and take parts of it.
    pub(super) fn is_shared(&self) -> bool {
        self.contents && self.receivers.len() > 1
    }

    /// Whether `provider` is believed to have piece `at`.
    pub(super) fn offers(&self, provider: &Provider, at: usize) -> bool {
        self.has_all(provider) || provider.has.has(at)
    }

    /// Before the contents are known there are no bitfields, and whoever has a part has the lists.
    fn has_all(&self, provider: &Provider) -> bool {
        !self.contents || provider.complete
    }
}

/// The pieces that are `me`'s among `receivers`: of as many blocks as there are receivers, each has one, by rank.
pub(super) fn share(pieces: &[Piece], root: &ChunkId, me: &NodeId, receivers: &[NodeId]) -> Bitfield {
    let seeds: Vec<u64> = receivers.iter().map(|node| mix(word(&node.0) ^ word(&root.0))).collect();
    let own = mix(word(&me.0) ^ word(&root.0));
    let (mut share, mut round, mut turn, mut offset) = (Bitfield::default(), u64::MAX, 0, 0);
    for (at, piece) in pieces.iter().enumerate() {
        let block = offset / BLOCK_BYTES;
        offset += u64::from(piece.len);
        if block / seeds.len() as u64 != round {
            round = block / seeds.len() as u64;
            let rank = |seed: u64| mix(seed ^ round);
            turn = seeds.iter().filter(|seed| rank(**seed) < rank(own)).count() as u64;
        }
        if block % seeds.len() as u64 == turn {
            share.set(at);
        }
    }
    share
}

fn word(id: &[u8; 32]) -> u64 {
    u64::from_le_bytes(id[..8].try_into().expect("eight of thirty-two"))
}

/// Spreads the bits of a number (the finaliser of SplitMix64, Steele et al. 2014).
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_is_one_node_s_share_and_shares_are_alike() {
        let (root, nodes) = (ChunkId([1; 32]), (0..7).map(|at| NodeId([at; 32])).collect::<Vec<NodeId>>());
        let pieces: Vec<Piece> = (0..400).map(|_| Piece { chunk: root, len: (BLOCK_BYTES / 4) as u32 }).collect();
        let shares: Vec<Bitfield> = nodes.iter().map(|node| share(&pieces, &root, node, &nodes)).collect();
        for at in 0..pieces.len() {
            assert_eq!(shares.iter().filter(|share| share.has(at)).count(), 1, "piece {at}");
        }
        let counts = shares.iter().map(Bitfield::count);
        // A block of four pieces more, at the most.
        assert!(counts.clone().max().unwrap() - counts.min().unwrap() <= 4);
    }
}

//! Which pieces to ask a provider for next.

use fastrand::Rng;

use super::{BATCH_BYTES, BATCH_PIECES, Download, Provider};

/// Until this share of the pieces is here, the pick is random; then it is one of the rarest.
const RANDOM_FIRST: usize = 16;

impl Download {
    /// A run of missing pieces that `provider` has, as many as fit one batch.
    pub(super) fn pick(&self, provider: &Provider, rng: &mut Rng) -> Vec<u32> {
        let count = self.pieces.len();
        if count == 0 {
            return Vec::new();
        }
        let wanted = |at: usize| !self.have.has(at) && !self.in_flight.has(at) && self.offers(provider, at);
        let from = rng.usize(..count);
        let around = (from..count).chain(0..from).filter(|at| wanted(*at));
        let here = self.batches.len() + self.received as usize / BATCH_BYTES as usize;
        let start = if here < RANDOM_FIRST || self.providers.len() < 3 {
            around.into_iter().next()
        } else {
            around.min_by_key(|at| self.providers.values().filter(|provider| self.offers(provider, *at)).count())
        };
        let Some(start) = start else { return Vec::new() };
        let mut bytes = 0;
        let mut run = Vec::new();
        for at in (start..count).chain(0..start).filter(|at| wanted(*at)) {
            bytes += u64::from(self.pieces[at].len);
            if run.len() >= BATCH_PIECES || (!run.is_empty() && bytes > BATCH_BYTES) {
                break;
            }
            run.push(at as u32);
        }
        run
    }

    /// Whether `provider` is believed to have piece `at`. Before the contents are known there are no bitfields, and
    /// whoever has a part has the lists.
    fn offers(&self, provider: &Provider, at: usize) -> bool {
        !self.contents || provider.complete || provider.has.has(at)
    }
}

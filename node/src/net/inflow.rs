//! How much one peer may send, and how much of it waits for the loop.
//!
//! A member is believed only as far as its signatures reach, and its appetite not at all. Each peer has a bucket of
//! bytes ([`BURST`]) that fills again at [`RATE`]; what does not fit is dropped, as if the network had lost it. What
//! has been taken in and not yet handled is at most [`MAX_WAITING`] bytes of all peers together.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A peer that has been quiet may send so much at once: a catalog, when it is joined.
const BURST: f64 = 32e6;
/// Bytes a second, for as long as it likes. An idle mesh of 100 sends each node about 2,000.
const RATE: f64 = 8e6;
/// What one message costs besides its bytes: its handling.
const MESSAGE: f64 = 400.0;
/// Bytes taken in and not yet handled.
const MAX_WAITING: usize = 64 << 20;
/// A bucket that has been full for this long says nothing.
const FORGET: Duration = Duration::from_secs(60);

struct Bucket {
    level: f64,
    at: Instant,
}

/// The buckets of all peers, and the room for what waits.
pub struct Inflow {
    buckets: HashMap<PeerId, Bucket>,
    room: Arc<Semaphore>,
}

impl Inflow {
    /// Nothing taken in yet.
    pub fn new() -> Inflow {
        Inflow { buckets: HashMap::new(), room: Arc::new(Semaphore::new(MAX_WAITING)) }
    }

    /// Room for `bytes` of this peer, to be held until they have been handled; `None` is to drop them.
    pub fn take(&mut self, peer: PeerId, bytes: usize, now: Instant) -> Option<OwnedSemaphorePermit> {
        let bucket = self.buckets.entry(peer).or_insert(Bucket { level: BURST, at: now });
        let filled = bucket.level + now.duration_since(bucket.at).as_secs_f64() * RATE;
        (bucket.level, bucket.at) = (filled.min(BURST), now);
        let cost = bytes as f64 + MESSAGE;
        if bucket.level < cost {
            return None;
        }
        let place = Arc::clone(&self.room).try_acquire_many_owned(bytes as u32).ok()?;
        bucket.level -= cost;
        Some(place)
    }

    /// Drops the buckets that say nothing any more.
    pub fn forget_quiet(&mut self, now: Instant) {
        self.buckets.retain(|_, bucket| now.duration_since(bucket.at) < FORGET);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_the_rate_and_others_are_not() {
        let mut inflow = Inflow::new();
        let (flooder, other, start) = (PeerId::random(), PeerId::random(), Instant::now());
        let mut taken = 0;
        for step in 0..2000 {
            let now = start + Duration::from_millis(step * 5);
            taken += inflow.take(flooder, 1 << 20, now).map_or(0, |_| 1 << 20);
            assert!(inflow.take(other, 1000, now).is_some());
        }
        // A burst, and ten seconds at the rate.
        let allowed = BURST + 10.0 * RATE;
        assert!((0.9 * allowed..=allowed).contains(&f64::from(taken)), "{taken}");
        inflow.forget_quiet(start + Duration::from_secs(100));
        assert!(inflow.buckets.is_empty());
    }

    #[test]
    fn what_waits_is_bounded_whoever_sends_it() {
        let mut inflow = Inflow::new();
        let now = Instant::now();
        let held: Vec<_> = (0..100).filter_map(|_| inflow.take(PeerId::random(), 1 << 20, now)).collect();
        assert_eq!(held.len(), 64);
        drop(held);
        assert!(inflow.take(PeerId::random(), 1 << 20, now).is_some());
    }
}

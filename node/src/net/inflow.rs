//! How much one peer may send, and how much may be on its way to it.
//!
//! A member is believed only as far as its signatures reach, and its appetite not at all. Each peer has a bucket of
//! bytes ([`BURST`]) that fills again at [`RATE`], and room for [`MAX_IN`] bytes that have come and are not handled yet;
//! what does not fit is dropped, as if the network had lost it. So is what this node would send while [`MAX_OUT`] bytes
//! are still on their way to a peer: one that asks and does not read costs no more than that.
//!
//! Before a message is whole it is read in pieces; beyond the first [`SMALL`] bytes it needs one of [`LARGE_READS`]
//! places, so that what is being read from all peers together is bounded too.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::request_response::OutboundRequestId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A peer that has been quiet may send so much at once: a catalog, when it is joined.
const BURST: f64 = 32e6;
/// Bytes a second, for as long as it likes. An idle mesh of 100 sends each node about 200.
const RATE: f64 = 8e6;
/// What one message costs besides its bytes: its handling, a signature or two.
const MESSAGE: f64 = 2000.0;
/// Bytes of one peer that have come and wait for the loop.
const MAX_IN: usize = 8 << 20;
/// Bytes on their way to one peer.
const MAX_OUT: usize = 8 << 20;
/// A bucket that has been full for this long says nothing.
const FORGET: Duration = Duration::from_secs(60);
/// A message of up to this size is read without more ado.
pub const SMALL: u64 = 64 << 10;
/// Larger ones that are read at one time.
pub const LARGE_READS: usize = 128;
/// For each of them.
pub const LARGE_PATIENCE: Duration = Duration::from_secs(2);

struct Bucket {
    level: f64,
    at: Instant,
    room: Arc<Semaphore>,
}

/// The buckets of all peers.
#[derive(Default)]
pub struct Inflow {
    buckets: HashMap<PeerId, Bucket>,
}

impl Inflow {
    /// Room for `bytes` of this peer, to be held until they have been handled; `None` is to drop them.
    pub fn take(&mut self, peer: PeerId, bytes: usize, now: Instant) -> Option<OwnedSemaphorePermit> {
        let new = || Bucket { level: BURST, at: now, room: Arc::new(Semaphore::new(MAX_IN)) };
        let bucket = self.buckets.entry(peer).or_insert_with(new);
        let filled = bucket.level + now.duration_since(bucket.at).as_secs_f64() * RATE;
        (bucket.level, bucket.at) = (filled.min(BURST), now);
        let cost = bytes as f64 + MESSAGE;
        if bucket.level < cost {
            return None;
        }
        let place = Arc::clone(&bucket.room).try_acquire_many_owned(bytes as u32).ok()?;
        bucket.level -= cost;
        Some(place)
    }

    /// Drops the buckets that say nothing any more.
    pub fn forget_quiet(&mut self, now: Instant) {
        self.buckets.retain(|_, bucket| now.duration_since(bucket.at) < FORGET);
    }
}

/// What is on its way to each peer.
#[derive(Default)]
pub struct Outflow {
    peers: HashMap<PeerId, usize>,
    requests: HashMap<OutboundRequestId, (PeerId, usize)>,
}

impl Outflow {
    /// Whether `bytes` more may be sent to this peer.
    pub fn has_room(&self, peer: &PeerId, bytes: usize) -> bool {
        self.peers.get(peer).copied().unwrap_or(0) + bytes <= MAX_OUT
    }

    /// They are being sent.
    pub fn sent(&mut self, request: OutboundRequestId, peer: PeerId, bytes: usize) {
        *self.peers.entry(peer).or_default() += bytes;
        self.requests.insert(request, (peer, bytes));
    }

    /// They have arrived, or never will.
    pub fn over(&mut self, request: &OutboundRequestId) {
        let Some((peer, bytes)) = self.requests.remove(request) else { return };
        if let Some(sum) = self.peers.get_mut(&peer) {
            *sum -= bytes;
            if *sum == 0 {
                self.peers.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_the_rate_and_others_are_not() {
        let mut inflow = Inflow::default();
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
    fn what_waits_of_one_peer_takes_no_room_from_another() {
        let mut inflow = Inflow::default();
        let (flooder, other, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let held: Vec<_> = (0..20).filter_map(|_| inflow.take(flooder, 1 << 20, now)).collect();
        assert_eq!(held.len(), 8);
        assert!(inflow.take(other, 1 << 20, now).is_some());
        drop(held);
        assert!(inflow.take(flooder, 1 << 20, now).is_some());
    }
}

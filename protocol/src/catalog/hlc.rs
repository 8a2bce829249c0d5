//! Hybrid logical clocks (Kulkarni, Demirbas et al. 2014): wall-clock milliseconds with a counter below them, so that
//! what was seen is always stamped before what is said next, and stamps still read as times.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::UnixMillis;

/// Bits for the counter: 65,536 stamps a millisecond before the time part is pushed ahead.
const COUNTER_BITS: u32 = 16;

/// How far ahead of this node's clock a stamp may be. Beyond it a peer's clock is wrong, and its facts would beat
/// every honest one for as long as that.
pub const MAX_SKEW: Duration = Duration::from_secs(60);

/// A stamp: total order over everything said in the mesh, as far as one author is concerned.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hlc(u64);

impl Hlc {
    /// The first stamp of a millisecond.
    pub const fn at(time: UnixMillis) -> Hlc {
        Hlc(time.0 << COUNTER_BITS)
    }

    /// The wall clock's part.
    pub const fn time(self) -> UnixMillis {
        UnixMillis(self.0 >> COUNTER_BITS)
    }

    /// As one number, in the same order.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The one after it.
    pub const fn next(self) -> Hlc {
        Hlc(self.0.saturating_add(1))
    }

    /// By how many milliseconds this is ahead of `now`; negative is behind.
    pub fn ahead_of(self, now: UnixMillis) -> i64 {
        self.time().0 as i64 - now.0 as i64
    }
}

/// The clock of one node.
#[derive(Debug, Default)]
pub struct Clock {
    last: Hlc,
}

impl Clock {
    /// A stamp after everything seen so far.
    pub fn stamp(&mut self, now: UnixMillis) -> Hlc {
        self.last = Hlc(self.last.0 + 1).max(Hlc::at(now));
        self.last
    }

    /// Whether the next stamp would be further ahead than others take.
    pub fn is_ahead(&self, now: UnixMillis) -> bool {
        self.last.ahead_of(now) > MAX_SKEW.as_millis() as i64
    }

    /// The wall clock was set back: goes on after `seen`, the latest of what others take.
    pub fn set_back(&mut self, seen: Hlc) {
        self.last = seen;
    }

    /// Takes note of another's stamp, which the caller has checked against [`MAX_SKEW`].
    pub fn observe(&mut self, seen: Hlc) {
        self.last = self.last.max(seen);
    }
}

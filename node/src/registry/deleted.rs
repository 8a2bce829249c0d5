//! Manifests that were deleted by digest at this node: their bytes may lie here for a while yet, and are not to be given out.
//!
//! That holds until the repository gets another name: what is pushed then may need them. Elsewhere, and after a restart, they are given
//! out to whoever asks by digest until they are gone. The latest [`MAX`] are remembered.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moyai_protocol::catalog::Hlc;

const MAX: usize = 1024;

struct Deletion {
    repository: String,
    digest: [u8; 32],
    /// The latest that a name of the repository was given before.
    after: Hlc,
}

#[derive(Clone, Default)]
pub(super) struct Deleted(Arc<Mutex<VecDeque<Deletion>>>);

impl Deleted {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Deletion>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is deleted, where the repository's latest name is of `after`.
    pub(super) fn insert(&self, repository: &str, digest: [u8; 32], after: Hlc) {
        let mut all = self.lock();
        all.retain(|other| other.repository != repository || other.digest != digest);
        all.truncate(MAX - 1);
        all.push_front(Deletion { repository: repository.to_owned(), digest, after });
    }

    /// Whether it is, where the repository's latest name is of `now`.
    pub(super) fn has(&self, repository: &str, digest: &[u8; 32], now: Hlc) -> bool {
        let is_it = |other: &Deletion| other.repository == repository && other.digest == *digest && now <= other.after;
        self.lock().iter().any(is_it)
    }
}

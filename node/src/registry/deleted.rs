//! Manifests that were deleted by digest at this node: their bytes may lie here for a while yet, and are not to be given out.
//!
//! Elsewhere, and after a restart, they are given out to whoever asks by digest until they are gone. The latest [`MAX`] are remembered.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const MAX: usize = 1024;

/// Of each the repository and the digest, the latest first.
type Latest = VecDeque<(String, [u8; 32])>;

#[derive(Clone, Default)]
pub(super) struct Deleted(Arc<Mutex<Latest>>);

impl Deleted {
    fn lock(&self) -> MutexGuard<'_, Latest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, name: &str, digest: [u8; 32]) {
        self.remove(name, &digest);
        let mut all = self.lock();
        all.truncate(MAX - 1);
        all.push_front((name.to_owned(), digest));
    }

    /// It is pushed anew.
    pub(super) fn remove(&self, name: &str, digest: &[u8; 32]) {
        self.lock().retain(|(other, deleted)| other != name || deleted != digest);
    }

    pub(super) fn has(&self, name: &str, digest: &[u8; 32]) -> bool {
        self.lock().iter().any(|(other, deleted)| other == name && deleted == digest)
    }
}

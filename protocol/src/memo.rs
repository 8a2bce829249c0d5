//! What has been checked once, kept for all nodes of a simulated mesh.
//!
//! Opening a fact (signatures, certificates, decoding) depends on its bytes and the mesh alone, and so does a member's
//! word. Ten thousand simulated nodes that are shown the same check it once, and hold one copy of what it says. A
//! daemon has no memo.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::catalog::{Entry, Fact, FactError};
use crate::id::{MeshId, Signature};
use crate::membership::{Update, Word};

/// Checked facts and words by their signatures.
#[derive(Debug, Default)]
pub struct Memo {
    facts: Mutex<BTreeMap<Signature, Arc<Entry>>>,
    words: Mutex<BTreeMap<Signature, Arc<Word>>>,
}

impl Memo {
    /// As [`Entry::open`], at once for a fact that was opened before.
    pub(crate) fn open(&self, fact: Arc<Fact>, mesh: &MeshId) -> Result<Arc<Entry>, FactError> {
        let mut facts = self.facts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A signature alone proves nothing: all of the fact must be the one that was opened.
        if let Some(entry) = facts.get(&fact.signature).filter(|entry| entry.fact == fact) {
            return Ok(Arc::clone(entry));
        }
        let entry = Arc::new(Entry::open(Arc::clone(&fact), mesh)?);
        facts.insert(fact.signature, Arc::clone(&entry));
        Ok(entry)
    }

    /// The word in an update, if its member has said it.
    pub(crate) fn word(&self, update: &Update) -> Option<Arc<Word>> {
        let mut words = self.words.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(word) = words.get(&update.signature).filter(|word| word.is_in(update)) {
            return Some(Arc::clone(word));
        }
        let word = Arc::new(update.clone().genuine()?);
        words.insert(update.signature, Arc::clone(&word));
        Some(word)
    }
}

//! The catalog converges: in the end every node holds the same facts in the same versions.

use std::collections::BTreeMap;

use moyai_protocol::reconcile::Item;

use super::Checker;
use crate::Simulator;

/// See above.
pub(super) struct Converges;

impl Checker for Converges {
    fn name(&self) -> &'static str {
        "the catalog converges"
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        let (first, reference) = mesh.up().next()?;
        let (at, node) =
            mesh.up().find(|(_, node)| node.catalog().fingerprint() != reference.catalog().fingerprint())?;
        let all = |node: &moyai_protocol::Node| -> BTreeMap<_, _> {
            node.catalog().iter().map(|(key, entry)| (*key, entry.version())).collect()
        };
        let (mine, theirs) = (all(node), all(reference));
        let differ = mine.iter().filter(|(key, version)| theirs.get(*key) != Some(*version)).map(|(key, _)| *key);
        let missing = theirs.keys().filter(|key| !mine.contains_key(key)).copied();
        let keys: Vec<_> = differ.chain(missing).collect();
        Some(format!("nodes {first} and {at} differ in {} facts, the first of them {:?}", keys.len(), keys.first()))
    }
}

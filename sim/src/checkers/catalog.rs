//! The catalog converges: in the end every node holds the same facts in the same versions.

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
        mesh.up().find_map(|(at, node)| {
            let (mine, theirs) = (node.catalog().index(), reference.catalog().index());
            let differ = mine.iter().filter(|(key, version)| theirs.get(*key) != Some(version)).count();
            (mine != theirs).then(|| format!("nodes {first} and {at} differ in {differ} facts or more"))
        })
    }
}

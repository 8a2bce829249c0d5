//! No old epoch is revived: a node does not start a placement while it knows a later epoch of it on a node that it
//! thinks alive.

use super::{Checker, Happened};
use crate::Simulator;

/// See above.
pub(super) struct NoRevival;

impl Checker for NoRevival {
    fn name(&self) -> &'static str {
        "no old epoch is revived"
    }

    fn happened(&mut self, mesh: &Simulator, what: &Happened) -> Option<String> {
        let Happened::Started { at, placement } = what else { return None };
        let node = mesh.hosts()[*at].node.as_ref()?;
        let form = node.catalog().workload(&placement.workload).map(|known| known.fact.form());
        let held = node.worker().placement(&placement.workload, placement.replica);
        // What is to be moved goes on, restarts and all, until its successor runs.
        let moves = node.catalog().is_draining(&node.id()) || held.is_some_and(|held| Some(held.fact.form) != form);
        let later = node.catalog().placements_of(&placement.workload).find(|other| {
            other.replica == placement.replica
                && other.node != node.id()
                && other.fact.epoch > placement.epoch
                && other.fact.state.is_active()
                // A later try of an earlier form, by a custodian that had not heard of the last update, ends for this one.
                && Some(other.fact.form) == form
                && (!moves || other.fact.state == moyai_protocol::worker::PlacementState::Running)
                && node.membership().is_live(&other.node)
        })?;
        Some(format!("node {at} started {placement}, and knows epoch {} on {}", later.fact.epoch, later.node.short()))
    }
}

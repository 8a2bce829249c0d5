//! Nothing accepted is lost: a workload that some node said yes to is known in the end, and runs as often as it was
//! asked for, when there is room for all of them.

use super::Checker;
use crate::Simulator;

/// See above.
pub(super) struct NothingLost;

impl Checker for NothingLost {
    fn name(&self) -> &'static str {
        "nothing accepted is lost"
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        let forgotten = mesh.accepted().find_map(|(workload, _)| {
            let (at, _) = mesh.up().find(|(_, node)| node.catalog().workload(workload).is_none())?;
            Some(format!("node {at} does not know workload {}", workload.short()))
        });
        let running = mesh.running();
        let idle = || {
            mesh.accepted().find_map(|(workload, replicas)| {
                let count = running.range((*workload, 0)..=(*workload, u32::MAX)).count();
                ((count as u32) < replicas)
                    .then(|| format!("workload {} runs {count} times of {replicas}", workload.short()))
            })
        };
        forgotten.or_else(|| if mesh.has_room_for_all() { idle() } else { None })
    }
}

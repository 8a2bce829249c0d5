//! Nothing accepted is lost: a workload that some node said yes to is known in the end, and runs as often as it was
//! asked for, since there is room for all of them.

use super::Checker;
use crate::Simulator;

/// See above.
pub(super) struct NothingLost;

impl Checker for NothingLost {
    fn name(&self) -> &'static str {
        "nothing accepted is lost"
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        mesh.accepted().find_map(|(workload, replicas)| {
            let running = mesh.replicas_running(workload).len();
            ((running as u32) < replicas)
                .then(|| format!("workload {} runs {running} times of {replicas}", workload.short()))
        })
    }
}

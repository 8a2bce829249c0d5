//! One of each: in the end no replica runs twice, and nothing runs that nobody asked for.

use super::Checker;
use crate::Simulator;

/// See above.
pub(super) struct OneEach;

impl Checker for OneEach {
    fn name(&self) -> &'static str {
        "no replica runs twice"
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        mesh.accepted().find_map(|(workload, _)| {
            let running = mesh.replicas_running(workload);
            running.into_iter().find(|(_, places)| places.len() > 1).map(|(replica, places)| {
                format!("replica {} of {} runs on nodes {places:?}", replica + 1, workload.short())
            })
        })
    }
}

//! One of each: no replica runs twice among nodes that reach one another for longer than [`SETTLING`], and in the end
//! none does. Both halves of a split mesh may run it; that is what they are to do.

use std::collections::BTreeMap;

use moyai_protocol::id::WorkloadId;
use moyai_protocol::time::Instant;

use super::{Checker, Happened};
use crate::Simulator;

/// Until a node that was away is known to be back, has heard what was placed anew meanwhile, and has stopped its own.
const SETTLING: std::time::Duration = std::time::Duration::from_secs(30);

/// See above.
#[derive(Default)]
pub(super) struct OneEach {
    disturbed: Instant,
    /// Replicas that run more than once, and since when.
    doubled: BTreeMap<(WorkloadId, u32), Instant>,
}

impl Checker for OneEach {
    fn name(&self) -> &'static str {
        "no replica runs twice"
    }

    fn happened(&mut self, mesh: &Simulator, what: &Happened) -> Option<String> {
        if matches!(what, Happened::Disturbed) {
            self.disturbed = mesh.now();
        }
        None
    }

    fn tick(&mut self, mesh: &Simulator) -> Option<String> {
        let now = mesh.now();
        let doubled = mesh.running_twice();
        self.doubled.retain(|replica, _| doubled.contains_key(replica));
        for (replica, places) in doubled {
            let since = (*self.doubled.entry(replica).or_insert(now)).max(self.disturbed);
            if now.since(since) > SETTLING {
                let (workload, number) = replica;
                let seconds = now.since(since).as_secs();
                return Some(format!(
                    "replica {} of {} has run on nodes {places:?} for {seconds} s",
                    number + 1,
                    workload.short()
                ));
            }
        }
        None
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        let (replica, places) = mesh.running_twice().into_iter().next()?;
        Some(format!("replica {} of {} runs on nodes {places:?}", replica.1 + 1, replica.0.short()))
    }
}

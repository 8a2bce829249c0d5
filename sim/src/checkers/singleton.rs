//! A singleton never runs twice: of no replica are there ever two containers at once, on whatever machines, cut off from one
//! another or not, with a daemon or without. What is counted are the containers of the modelled machines, in true time.

use super::{Checker, Happened};
use crate::Simulator;

/// See above.
pub(super) struct NeverTwice;

impl Checker for NeverTwice {
    fn name(&self) -> &'static str {
        "a singleton never runs twice"
    }

    fn happened(&mut self, mesh: &Simulator, what: &Happened) -> Option<String> {
        let Happened::Started { at, placement } = what else { return None };
        if !mesh.is_singleton(&placement.workload) {
            return None;
        }
        let replica = |other: &moyai_protocol::workload::PlacementId| {
            (other.workload, other.replica) == (placement.workload, placement.replica)
        };
        let places: Vec<usize> = mesh
            .hosts()
            .iter()
            .enumerate()
            .flat_map(|(at, host)| host.running.keys().filter(|other| replica(other)).map(move |_| at))
            .collect();
        let two = places.len() > 1;
        two.then(|| format!("node {at} started {placement} while it ran on nodes {places:?}"))
    }
}

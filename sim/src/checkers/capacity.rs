//! No node over its capacity: what runs on a machine never asks for more than it has. The containers counted are those
//! of the modelled machine, not what the node believes.

use moyai_protocol::workload::Resources;

use super::{Checker, Happened};
use crate::Simulator;

/// See above.
pub(super) struct NeverExceeded;

impl Checker for NeverExceeded {
    fn name(&self) -> &'static str {
        "no node over its capacity"
    }

    fn happened(&mut self, mesh: &Simulator, what: &Happened) -> Option<String> {
        let Happened::Started { at, .. } = what else { return None };
        let asked = mesh.hosts()[*at].running.keys().filter_map(|placement| mesh.asked(&placement.workload));
        let sum = asked.fold(Resources::default(), |sum, asked| sum.plus(&asked));
        let all = mesh.hosts()[*at].capacity;
        let over = sum.cpu_milli > all.cpu_milli || sum.memory > all.memory;
        over.then(|| format!("node {at} runs what asks for {sum:?}, and has {all:?}"))
    }
}

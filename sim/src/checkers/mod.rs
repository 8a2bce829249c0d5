//! What must hold, a file each. Each checker looks at the whole simulated mesh and says what is wrong. `tests/checkers.rs`
//! breaks each property on purpose and shows that its checker says so.

mod accepted;
mod capacity;
mod catalog;
mod epochs;
mod membership;
mod replicas;
mod singleton;

use moyai_protocol::workload::PlacementId;

use crate::Simulator;

/// Something that happened to the modelled machines.
#[derive(Clone, Debug)]
pub enum Happened {
    /// A container was started.
    Started {
        /// On which host.
        at: usize,
        /// Which.
        placement: PlacementId,
    },
    /// A container is gone.
    Ended {
        /// On which host.
        at: usize,
        /// Which.
        placement: PlacementId,
    },
    /// Machines died or came back, or the network was cut or healed: what must come right has its time from now on.
    Disturbed,
}

/// Looks at a mesh. A violation is a sentence.
pub trait Checker {
    /// Its name, as reports show it.
    fn name(&self) -> &'static str;
    /// When something happened: what is wrong now.
    fn happened(&mut self, _mesh: &Simulator, _what: &Happened) -> Option<String> {
        None
    }
    /// Each virtual second: what is wrong now.
    fn tick(&mut self, _mesh: &Simulator) -> Option<String> {
        None
    }
    /// At the end, when nothing has failed for a while.
    fn end(&mut self, _mesh: &Simulator) -> Option<String> {
        None
    }
}

/// All of them.
pub fn all() -> Vec<Box<dyn Checker>> {
    vec![
        Box::new(membership::Converges),
        Box::new(catalog::Converges),
        Box::new(capacity::NeverExceeded),
        Box::new(accepted::NothingLost),
        Box::new(replicas::OneEach::default()),
        Box::new(epochs::NoRevival),
        Box::new(singleton::NeverTwice),
    ]
}

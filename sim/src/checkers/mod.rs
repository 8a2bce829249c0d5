//! What must hold, a file each. Each checker looks at the whole simulated mesh and says what is wrong.

mod accepted;
mod capacity;
mod catalog;
mod membership;
mod replicas;

use crate::Simulator;

/// Looks at a mesh. A violation is a sentence.
pub trait Checker {
    /// Its name, as reports show it.
    fn name(&self) -> &'static str;
    /// After every step: what is wrong now.
    fn step(&mut self, _mesh: &Simulator) -> Option<String> {
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
        Box::new(replicas::OneEach),
    ]
}

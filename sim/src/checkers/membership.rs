//! Membership converges: in the end every node that has power knows every other as alive, and nobody else.

use moyai_protocol::membership::State;

use super::Checker;
use crate::Simulator;

/// See above.
pub(super) struct Converges;

impl Checker for Converges {
    fn name(&self) -> &'static str {
        "membership converges"
    }

    fn end(&mut self, mesh: &Simulator) -> Option<String> {
        let up = mesh.up().count();
        mesh.up().find_map(|(at, node)| {
            let alive = node.membership().members().filter(|(_, member)| member.state == State::Alive).count();
            (alive + 1 != up).then(|| format!("node {at} sees {} of {up} nodes alive", alive + 1))
        })
    }
}

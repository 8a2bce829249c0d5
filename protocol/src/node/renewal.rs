//! Certificates that renew themselves long before they end.
//!
//! Once two thirds of its time are over, a node asks a random live admin at each look for another certificate of the same
//! role; the admin signs one for whoever shows a chain that is still good. Either side may die between the two messages:
//! the next look asks again, and two certificates of one node harm nobody. The driver keeps the new one.

use super::Node;
use crate::catalog::NodeFact;
use crate::contract::Event;
use crate::id::NodeId;
use crate::message::Message;
use crate::time::Instant;
use crate::trust::{Chain, Role};

/// How long a certificate signed here is good for, in seconds.
pub const CERTIFICATE_LIFE: u64 = 30 * 24 * 3600;
/// An admin's: with it, others' certificates end, so it outlives the machine that founded the mesh.
pub const ADMIN_LIFE: u64 = 3650 * 24 * 3600;

/// How long a certificate for this role is good for, in seconds.
pub fn certificate_life(role: Role) -> u64 {
    if role == Role::Admin { ADMIN_LIFE } else { CERTIFICATE_LIFE }
}

impl Node {
    pub(super) fn renew_certificate(&mut self, now: Instant) {
        let Some(leaf) = self.chain.leaf() else { return };
        let wall = self.wall_at(now).as_secs();
        let two_thirds = leaf.not_before + (leaf.not_after.saturating_sub(leaf.not_before)) / 3 * 2;
        if wall < two_thirds {
            return;
        }
        let is_admin = |node: &NodeId| self.catalog.node(node).and_then(NodeFact::role) == Some(Role::Admin);
        let admins: Vec<NodeId> = self.membership.live().filter(is_admin).collect();
        if !admins.is_empty() {
            let to = admins[self.rng.usize(..admins.len())];
            self.sends.push((to, Message::Renew { chain: self.chain.clone() }));
        }
    }

    pub(super) fn renew_for(&mut self, from: NodeId, chain: &Chain, now: Instant) {
        let wall = self.wall_at(now).as_secs();
        let am_admin = self.chain.verify(&self.mesh, wall).is_ok_and(|member| member.role == Role::Admin);
        match chain.verify_shown_by(&from, &self.mesh, wall) {
            // What was signed by one who is a member no more is not made good by another signature.
            Ok(_) if self.catalog.is_revoked(&from, chain) => self.dropped.revoked += 1,
            Ok(member) if am_admin => {
                let serial = self.rng.u64(..);
                let chain = self.chain.issue(&self.key, from, member.role, wall, certificate_life(member.role), serial);
                self.sends.push((from, Message::Renewed { chain }));
            }
            Ok(_) => {}
            Err(error) => self.tell(Event::Dropped { from, reason: error.to_string() }),
        }
    }

    pub(super) fn set_chain(&mut self, chain: Chain) {
        self.vouch = crate::catalog::vouch(&self.key, &chain);
        self.chain = chain;
    }

    pub(super) fn renewed(&mut self, chain: Chain, now: Instant) {
        let wall = self.wall_at(now).as_secs();
        let Ok(member) = chain.verify_shown_by(&self.me, &self.mesh, wall) else { return };
        let longer = self.chain.leaf().is_none_or(|old| member.not_after > old.not_after && member.role == old.role);
        if longer {
            self.set_chain(chain.clone());
            self.tell(Event::Renewed(chain));
            self.publish_node(now);
        }
    }
}

//! What admins want of nodes: to be emptied, and to be members no more.

use std::time::Duration;

use super::Node;
use crate::catalog::{Body, Key, OrderFact, Said};
use crate::contract::{Event, RecordKey, Refused, Reply};
use crate::id::NodeId;
use crate::message::Message;
use crate::time::Instant;
use crate::trust::{Chain, Role, mesh_of, node_of};

/// From a revocation to a look at what is left of it.
const AFTER_REVOCATION: Duration = Duration::from_secs(60);

impl Node {
    /// Has a node emptied, or takes that back.
    pub(super) fn order_drain(&mut self, node: NodeId, draining: bool, now: Instant) -> Result<Reply, Refused> {
        let wall = self.wall_at(now).as_secs();
        let member = self.chain.verify(&self.mesh, wall).map_err(|error| Refused::Certificate(error.to_string()))?;
        if self.catalog.node(&node).is_none() {
            return Err(Refused::NoNode(node));
        }
        if member.role < Role::Admin && node != self.me {
            return Err(Refused::NotAllowed(format!(
                "this node is a {}: it may drain itself, and no other",
                member.role
            )));
        }
        let order = OrderFact { holds: draining, reason: String::new(), target: None, author: self.chain.clone() };
        let said = self.try_publish(Key::Drain(node), &Body::Order(order), now);
        said.map_err(|error| Refused::NotAllowed(error.to_string()))?;
        Ok(Reply::Done)
    }

    /// Makes a node a member no more. Workloads whose last word it had are said again by this node: they are the
    /// submitter's, and not to be lost with whoever scaled them last.
    pub(super) fn order_revocation(
        &mut self,
        node: NodeId,
        reason: String,
        root: Option<&ed25519_dalek::SigningKey>,
        now: Instant,
    ) -> Result<Reply, Refused> {
        if node == self.me {
            return Err(Refused::NotAllowed("a node does not revoke itself: `moyai down --leave`".to_owned()));
        }
        // With the root key also a node that has been away for so long that it is not known any more.
        let target = self.catalog.node(&node).map(|fact| (fact.chain.clone(), fact.vouch));
        if target.is_none() && root.is_none() {
            return Err(Refused::NoNode(node));
        }
        if self.chain.issuers().any(|issuer| issuer == node) {
            return Err(Refused::NotAllowed(format!(
                "this node was certified by node {}, and would be a member no more either: revoke it from another",
                node.short()
            )));
        }
        if root.is_some_and(|root| mesh_of(&node_of(root)) != self.mesh) {
            return Err(Refused::NotAllowed("this is not the root key of this mesh".to_owned()));
        }
        let own = root.is_none();
        let above = |chain: &Chain| {
            chain.leaf().is_none_or(|leaf| leaf.role < Role::Admin) || chain.issuers().any(|issuer| issuer == self.me)
        };
        if own && !target.as_ref().is_some_and(|(chain, _)| above(chain)) {
            return Err(Refused::NotAllowed(format!(
                "node {} is an admin that this one did not certify",
                node.short()
            )));
        }
        let wall = self.wall_at(now).as_secs();
        let member = self.chain.verify(&self.mesh, wall).map_err(|error| Refused::Certificate(error.to_string()))?;
        if own && member.role < Role::Admin {
            return Err(Refused::NotAllowed(format!("this node is a {}, and only an admin may revoke", member.role)));
        }
        self.take_over_workloads(&node, now);
        self.anchor_seats(&node, now);
        let key = self.key.clone();
        let signer = root.unwrap_or(&key);
        let author = if own { self.chain.clone() } else { Chain(Vec::new()) };
        let order = OrderFact { holds: true, reason, target, author };
        let version = self.clock.stamp(self.wall_at(now));
        let fact =
            std::sync::Arc::new(crate::catalog::Fact::sign(Key::Revoked(node), version, &Body::Order(order), signer));
        // An honest one ends what it runs when it hears that.
        self.sends.push((node, Message::Facts { facts: vec![std::sync::Arc::clone(&fact)] }));
        self.take_own(fact, now).map_err(|error| Refused::NotAllowed(error.to_string()))?;
        Ok(Reply::Done)
    }

    fn take_over_workloads(&mut self, node: &NodeId, now: Instant) {
        let falls = |chain: &Chain| chain.issuers().any(|issuer| issuer == *node);
        let theirs: Vec<Key> = self
            .catalog
            .iter()
            .filter(|(key, entry)| {
                let chain = entry.said.author_chain();
                matches!(key, Key::Workload(_)) && (entry.fact.author == *node || chain.is_some_and(falls))
            })
            .map(|(key, _)| *key)
            .collect();
        for key in theirs {
            if let Some(Said::Workload { fact, .. }) = self.said(&key) {
                let fact = crate::catalog::WorkloadFact { author: self.chain.clone(), ..fact.clone() };
                self.publish(key, &Body::Workload(fact), now);
            }
        }
    }

    /// A node is a member no more, and neither is whoever it certified: what they said is forgotten.
    pub(super) fn carry_out_revocations(&mut self, now: Instant) {
        let keys = self.catalog.of_revoked();
        let mut gone = Vec::new();
        for key in keys {
            if let Key::Node(node) = key {
                gone.push(node);
            }
            if let Key::Placement(_, workload, _) = key {
                self.custody.touch(workload);
            }
            self.catalog.forget(&key);
            self.records.insert(RecordKey::Fact(key), None);
        }
        gone.extend(self.catalog.revoked().iter().filter(|node| self.membership.member(node).is_some()));
        gone.sort_unstable();
        gone.dedup();
        for node in gone {
            self.membership.expel(&node);
            self.records.insert(RecordKey::Member(node), None);
            self.with_auctioneer(now, |auctioneer, cx| auctioneer.peer_down(&node, cx));
            self.tell(Event::Revoked { node });
        }
        self.touch_inherited();
        self.refresh_providers(now);
        // By then what the mesh wants of theirs has been said again by whoever revoked them.
        self.next_expiry = self.next_expiry.min(now + AFTER_REVOCATION);
        if self.catalog.is_revoked(&self.me, &self.chain) {
            // Itself, or who certified it: nobody hears it any more, and what it runs is placed elsewhere.
            self.tell(Event::CastOut);
        }
    }

    /// Whether what `from` sends is not looked at any more.
    pub(super) fn is_cast_out(&self, from: &NodeId) -> bool {
        let chain = || self.catalog.node(from).map(|fact| &fact.chain);
        !self.catalog.revoked().is_empty()
            && (self.catalog.revoked().contains(from)
                || chain().is_some_and(|chain| self.catalog.is_revoked(from, chain)))
    }
}

//! What is new is passed on: at once when it is little, in batches when it is much and the mesh is large (see
//! [`crate::catalog`]).
//!
//! **States.** Nothing new; or some keys that are to be pushed, and when. What is pushed is what the catalog holds then,
//! so that a fact which changed twice meanwhile goes once. Of a large batch the names go ([`Message::Have`]); whoever
//! lacks one asks for it ([`Message::Want`]), of the first that named it, and of another only after [`ANSWER`].
//!
//! **If either side dies between two messages** the next one that names it is asked, or reconciliation finds it.
//!
//! **Bounds.** Keys of facts in the catalog; [`MAX_ASKED`] names asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::Node;
use crate::catalog::{self, Fact, Key, Said};
use crate::codec;
use crate::contract::Output;
use crate::id::{KeyHash, NodeId};
use crate::membership::Member;
use crate::message::Message;
use crate::reconcile::Item;
use crate::time::Instant;
use crate::worker::PlacementState;

/// After this a fact that was asked for is asked for again.
const ANSWER: Duration = Duration::from_millis(300);
/// The most facts that are waited for; beyond it more are asked for twice.
const MAX_ASKED: usize = 65_536;
/// The most names in one message: 600 KiB of them.
const MAX_NAMES: usize = 12_000;

/// What is to be passed on, and what was asked for.
#[derive(Debug)]
pub(super) struct Gossip {
    fresh: BTreeSet<Key>,
    /// Who told of the only fresh fact, which needs not be told of it.
    from: Option<NodeId>,
    due: Option<Instant>,
    last: Instant,
    asked: BTreeMap<KeyHash, (u128, Instant)>,
}

impl Gossip {
    pub(super) fn new(now: Instant) -> Gossip {
        Gossip { fresh: BTreeSet::new(), from: None, due: None, last: now, asked: BTreeMap::new() }
    }

    /// A fact has come, and is waited for no more.
    pub(super) fn came(&mut self, hash: &KeyHash) {
        self.asked.remove(hash);
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }
}

impl Node {
    /// A fact is new here, and to be passed on.
    pub(super) fn push(&mut self, fact: &Arc<Fact>, from: Option<NodeId>, now: Instant) {
        if self.membership.live_count() < catalog::PUSH_ALL {
            // In a small mesh its author pushes it to everybody, and at once: there is never much of it.
            if from.is_none() {
                self.gossip.fresh.insert(fact.key);
                self.gossip.due = Some(now);
            }
            return;
        }
        // What is being started runs in a moment, and is told of then.
        let passing = from.is_none()
            && matches!(self.said(&fact.key), Some(Said::Placement(said)) if said.state == PlacementState::Starting);
        let soon = if passing { now + catalog::BATCH } else { now };
        let gossip = &mut self.gossip;
        gossip.from = if gossip.fresh.is_empty() { from } else { None };
        gossip.fresh.insert(fact.key);
        let due = soon.max(gossip.last + catalog::BATCH).min(now + catalog::BATCH);
        let due = if soon == now && now.since(gossip.last) >= catalog::BATCH { now } else { due };
        gossip.due = Some(gossip.due.map_or(due, |known| known.min(due)));
    }

    /// Passes on what is due.
    pub(super) fn pass_on(&mut self, now: Instant) {
        if self.gossip.due.is_none_or(|due| due > now) {
            return;
        }
        let (fresh, from) = (std::mem::take(&mut self.gossip.fresh), self.gossip.from.take());
        (self.gossip.due, self.gossip.last) = (None, now);
        let facts: Vec<_> = fresh.iter().filter_map(|key| self.catalog.get(key).cloned()).collect();
        let all = self.membership.live_count() < catalog::PUSH_ALL;
        let bytes: usize = facts.iter().map(|entry| entry.fact.weight()).sum();
        let messages: Vec<Message> = if all || bytes <= catalog::EAGER {
            let facts = facts.iter().map(|entry| Arc::clone(&entry.fact));
            super::split(facts).into_iter().map(|facts| Message::Facts { facts }).collect()
        } else {
            let items: Vec<(KeyHash, u128)> = facts.iter().map(|entry| (entry.hash(), entry.version())).collect();
            items.chunks(MAX_NAMES).map(|items| Message::Have { items: items.to_vec() }).collect()
        };
        let suits = |member: &Member| member.state.is_live() && Some(member.node) != from;
        let count = if all { catalog::PUSH_ALL } else { catalog::FANOUT };
        let targets = self.membership.sample(count, &mut self.rng, suits);
        for message in messages {
            let bytes = codec::encode_message(&message);
            self.outputs.extend(targets.iter().map(|to| Output::Transmit { to: *to, bytes: bytes.clone() }));
        }
    }

    /// A peer names facts that are new to it: those that are not here are asked for.
    pub(super) fn told_of(&mut self, from: NodeId, items: Vec<(KeyHash, u128)>, now: Instant) {
        let asked = &mut self.gossip.asked;
        if asked.len() > MAX_ASKED / 2 {
            asked.retain(|_, (_, at)| now.since(*at) < ANSWER);
        }
        let mut keys = Vec::new();
        for (hash, version) in items.into_iter().take(MAX_NAMES) {
            let here = self.catalog.index().get(&hash).map_or(0, Item::version);
            let waits = asked.get(&hash).is_some_and(|(known, at)| *known >= version && now.since(*at) < ANSWER);
            if here < version && !waits {
                keys.push(hash);
                if asked.len() < MAX_ASKED {
                    asked.insert(hash, (version, now));
                }
            }
        }
        if !keys.is_empty() {
            self.sends.push((from, Message::Want { keys }));
        }
    }
}

//! How a step comes to its end: what the machines want of one another is carried out until nothing is left; what they want
//! of the world is put out, or waits until the step's records are on the disk.

use std::collections::BTreeSet;

use super::{Node, Owner};
use crate::codec;
use crate::contract::{CommandId, Completion, Effect, EffectId, Event, Outcome, Output, Reply};
use crate::message::Message;
use crate::time::Instant;

/// What must not happen before a step's records are on the disk.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    /// Accepted means written down: the user's answer waits for it.
    pub(super) replies: Vec<(CommandId, Reply)>,
    /// So do starts, and the yes to an award: a power cut must not leave a container that nothing accounts for, nor an
    /// auctioneer that was told yes by a node that has forgotten it.
    pub(super) outputs: Vec<Output>,
    /// What this node says to itself as custodian: its own promise and vote count no sooner than another's.
    pub(super) own: Vec<Message>,
}

impl Unwritten {
    fn is_empty(&self) -> bool {
        self.replies.is_empty() && self.outputs.is_empty() && self.own.is_empty()
    }
}

impl Node {
    pub(super) fn complete(&mut self, Completion { id, outcome }: Completion, now: Instant) {
        let Some(owner) = self.effects.remove(&id) else { return };
        match (owner, outcome) {
            (Owner::Persist(unwritten), _) => {
                self.writes -= 1;
                for output in unwritten.outputs {
                    self.release(output, now);
                }
                for message in unwritten.own {
                    self.receive(self.me, message, now);
                }
                for (id, reply) in unwritten.replies {
                    self.tell(Event::Reply { id, result: Ok(reply) });
                }
            }
            (Owner::Placement(placement), outcome) => {
                let wall = self.wall_at(now);
                self.worker.ended(placement, outcome, now, wall);
            }
            (Owner::Survey(root), Outcome::Surveyed(result)) => {
                self.exchange.surveyed(root, result, now, &mut self.rng);
            }
            (Owner::Batch(root, batch), Outcome::Fetched(result)) => {
                self.exchange.fetched(root, batch, result, now, &mut self.rng);
            }
            (owner, outcome) => panic!("the driver ended {owner:?} with {outcome:?}"),
        }
    }

    /// Carries out what the machines want of one another, until nothing is left.
    pub(super) fn settle(&mut self, now: Instant) {
        loop {
            let changes = self.membership.take_changes();
            let actions = self.worker.take_actions();
            let ended = self.auctioneer.take_ended();
            let transfers = self.exchange.take_actions();
            let dirty = if now >= self.custody_from { self.custody.take_dirty() } else { BTreeSet::new() };
            let sends = std::mem::take(&mut self.sends);
            let leases = self.holder.take_news();
            if changes.is_empty()
                && actions.is_empty()
                && ended.is_empty()
                && transfers.is_empty()
                && dirty.is_empty()
                && leases.is_empty()
                && sends.is_empty()
            {
                break;
            }
            for change in changes {
                self.member_changed(change, now);
            }
            for action in actions {
                self.act(action, now);
            }
            for end in ended {
                self.auction_ended(end, now);
            }
            for transfer in transfers {
                self.transfer(transfer, now);
            }
            for news in leases {
                self.lease_news(news, now);
            }
            for workload in dirty {
                self.look_after(workload, now);
            }
            for (to, message) in sends {
                let seats = matches!(
                    message,
                    Message::SeatsPrepare { .. } | Message::SeatsPromise { .. } | Message::SeatsAccepted { .. }
                );
                if to == self.me && seats {
                    self.unwritten.own.push(message);
                } else if to == self.me {
                    self.receive(self.me, message, now);
                } else {
                    let waits = seats || matches!(message, Message::Verdict { refusal: None, .. });
                    self.put(Output::Transmit { to, bytes: codec::encode_message(&message) }, waits);
                }
            }
        }
        self.pass_on(now);
        self.flush();
    }

    /// Has written down what changed.
    pub(super) fn flush(&mut self) {
        let unwritten = std::mem::take(&mut self.unwritten);
        if !self.records.is_empty() || (self.writes > 0 && !unwritten.is_empty()) {
            let records = std::mem::take(&mut self.records).into_iter().collect();
            self.writes += 1;
            self.effect(Effect::Persist(records), Owner::Persist(unwritten));
        } else {
            debug_assert!(unwritten.replies.is_empty() && unwritten.own.is_empty(), "these wait only for records");
            self.outputs.extend(unwritten.outputs);
        }
    }

    pub(super) fn effect(&mut self, effect: Effect, owner: Owner) {
        self.next_effect += 1;
        let id = EffectId(self.next_effect);
        self.effects.insert(id, owner);
        let waits = matches!(effect, Effect::Start { .. });
        self.put(Output::Effect { id, effect }, waits);
    }

    /// Puts an output out, or by what waits for the disk.
    pub(super) fn put(&mut self, output: Output, waits: bool) {
        if waits { self.unwritten.outputs.push(output) } else { self.outputs.push_back(output) }
    }

    /// Lets out what waited for the disk; a start only if it is still wanted: a later epoch may have come up elsewhere.
    pub(super) fn release(&mut self, output: Output, now: Instant) {
        if let Output::Effect { id, effect: Effect::Start { placement, .. } } = &output
            && !self.worker.may_start(placement)
        {
            self.effects.remove(id);
            return self.worker.not_started(*placement, now);
        }
        self.outputs.push_back(output);
    }
}

//! One member as another sees it, and the rule by which news about it replaces what is known.

use ed25519_dalek::SigningKey;

use crate::codec;
use crate::id::{NodeId, Signature};
use crate::time::Instant;
use crate::trust::{sign, verify};

use serde::{Deserialize, Serialize};

/// The purpose that members' own words are bound to.
const DOMAIN: &str = "moyai member v1";

/// The most addresses kept and passed on for one member.
pub const MAX_ADDRESSES: usize = 8;
const MAX_ADDRESS_LEN: usize = 128;

/// What is believed of a member.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It answers.
    Alive,
    /// Somebody's probe failed; it may still refute.
    Suspect,
    /// Nobody has heard of it in time.
    Down,
    /// It said that it goes.
    Left,
}

impl State {
    /// Whether work placed there counts as running.
    pub fn is_live(self) -> bool {
        matches!(self, State::Alive | State::Suspect)
    }
}

/// News about one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// About whom.
    pub node: NodeId,
    /// Which of its own statements this builds on.
    pub incarnation: u64,
    /// When it started, in milliseconds since 1970; 0 is not known.
    pub boot: u64,
    /// What is said.
    pub state: State,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// The member's own, over all but `state`, and whether it leaves. Nobody else can raise an incarnation, and who
    /// accuses can only accuse what the member has said.
    pub signature: Signature,
}

impl Update {
    /// The member's own word.
    pub(super) fn sign(mut self, key: &SigningKey) -> Self {
        self = self.bounded();
        self.signature = sign(key, DOMAIN, &self.signed());
        self
    }

    /// Whether the member has said this; an accusation is of what it has said.
    pub(super) fn is_genuine(&self) -> bool {
        verify(&self.node, DOMAIN, &self.signed(), &self.signature)
    }

    fn signed(&self) -> Vec<u8> {
        let leaves = self.state == State::Left;
        codec::encode(&(self.node, self.incarnation, self.boot, &self.addresses, leaves))
    }

    /// Cut to what one member may take up.
    pub(super) fn bounded(mut self) -> Self {
        self.addresses.retain(|address| address.len() <= MAX_ADDRESS_LEN);
        self.addresses.truncate(MAX_ADDRESSES);
        self
    }

    /// SWIM's order: a later incarnation wins; within one, the worse news does.
    pub(super) fn overrides(&self, member: &Member) -> bool {
        (self.incarnation, self.state) > (member.incarnation, member.state)
    }
}

/// What this node knows of another.
#[derive(Clone, Debug)]
pub struct Member {
    /// The last of its own statements that was heard of.
    pub incarnation: u64,
    /// When it started, in milliseconds since 1970; 0 is not known.
    pub boot: u64,
    /// What is believed.
    pub state: State,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// Its own, over what it said last; nothing while it has not been heard of.
    pub signature: Option<Signature>,
    /// Since when `state` is believed.
    pub changed: Instant,
}

impl Member {
    pub(super) fn new(update: Update, now: Instant) -> Self {
        let Update { incarnation, boot, state, addresses, signature, .. } = update;
        let signature = (incarnation > 0).then_some(signature);
        Member { incarnation, boot, state, addresses, signature, changed: now }
    }

    pub(super) fn take(&mut self, update: Update, now: Instant) {
        if update.state != self.state {
            self.changed = now;
        }
        self.incarnation = update.incarnation;
        self.state = update.state;
        self.boot = update.boot;
        self.addresses = update.addresses;
        self.signature = Some(update.signature);
    }

    /// What can be passed on about it; nothing before it has said something itself.
    pub(super) fn update(&self, node: NodeId) -> Option<Update> {
        let (incarnation, boot, state, signature) = (self.incarnation, self.boot, self.state, self.signature?);
        Some(Update { node, incarnation, boot, state, addresses: self.addresses.clone(), signature })
    }
}

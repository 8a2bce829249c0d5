//! One member as another sees it, and the rule by which news about it replaces what is known.

use std::sync::Arc;

use ed25519_dalek::SigningKey;

use crate::codec;
use crate::id::{KeyHash, NodeId, Signature};
use crate::reconcile::Item;
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
    /// Who says so, of a suspicion: the same accusation heard twice is one.
    pub accuser: Option<NodeId>,
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

    /// The word in it, if the member has said that; an accusation is of what it has said.
    pub(crate) fn genuine(self) -> Option<Word> {
        let genuine = verify(&self.node, DOMAIN, &self.signed(), &self.signature);
        genuine.then(|| Word::of(self))
    }

    fn signed(&self) -> Vec<u8> {
        let leaves = self.state == State::Left;
        codec::encode(&(self.node, self.incarnation, self.boot, &self.addresses, leaves))
    }

    /// Bytes it takes in a message, at most.
    pub(super) fn weight(&self) -> usize {
        192 + self.addresses.iter().map(|address| address.len() + 4).sum::<usize>()
    }

    /// Cut to what one member may take up.
    pub(super) fn bounded(mut self) -> Self {
        self.addresses = bounded(self.addresses);
        self
    }
}

/// A member's word, and what is believed of it.
#[derive(Clone, Debug)]
pub(super) struct News {
    pub(super) word: Arc<Word>,
    pub(super) state: State,
    pub(super) accuser: Option<NodeId>,
}

impl News {
    /// SWIM's order: a later incarnation wins; within one, the worse news does.
    pub(super) fn overrides(&self, member: &Member) -> bool {
        (self.word.incarnation, self.state) > (member.incarnation, member.state)
    }
}

/// What a member has said of itself; the same on all nodes.
#[derive(Debug)]
pub struct Word {
    /// Who.
    pub node: NodeId,
    /// Which of its own statements; 0 while it has not been heard of.
    pub incarnation: u64,
    /// When it started, in milliseconds since 1970; 0 is not known.
    pub boot: u64,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// Whether it said that it goes.
    pub leaves: bool,
    /// Its own; nothing while it has not been heard of.
    pub signature: Option<Signature>,
}

/// What this node knows of another.
#[derive(Clone, Debug)]
pub struct Member {
    at: KeyHash,
    /// What it has said last.
    pub word: Arc<Word>,
    /// What is believed.
    pub state: State,
    /// Since when `state` is believed.
    pub changed: Instant,
}

impl std::ops::Deref for Member {
    type Target = Word;

    fn deref(&self) -> &Word {
        &self.word
    }
}

/// Where a node stands in the order of members: keys are as good as random.
pub(super) fn place(node: &NodeId) -> KeyHash {
    KeyHash(node.0[..16].try_into().expect("half a key"))
}

impl Member {
    pub(super) fn new(news: News, now: Instant) -> Self {
        Member { at: place(&news.word.node), word: news.word, state: news.state, changed: now }
    }

    pub(super) fn take(&mut self, news: News, now: Instant) {
        if news.state != self.state {
            self.changed = now;
        }
        self.state = news.state;
        self.word = news.word;
    }

    /// What can be passed on about it; nothing before it has said something itself.
    pub(super) fn update(&self) -> Option<Update> {
        let word = &self.word;
        Some(Update {
            node: word.node,
            incarnation: word.incarnation,
            boot: word.boot,
            state: self.state,
            accuser: None,
            addresses: word.addresses.clone(),
            signature: word.signature?,
        })
    }
}

impl Word {
    pub(super) fn of(update: Update) -> Word {
        let Update { node, incarnation, boot, addresses, signature, state, .. } = update;
        Word { node, incarnation, boot, addresses, leaves: state == State::Left, signature: Some(signature) }
    }

    /// Of a node that has not said anything yet.
    pub(super) fn unheard(node: NodeId, addresses: Vec<String>) -> Word {
        Word { node, incarnation: 0, boot: 0, addresses: bounded(addresses), leaves: false, signature: None }
    }

    /// Whether this is the word that an update carries.
    pub(crate) fn is_in(&self, update: &Update) -> bool {
        self.signature == Some(update.signature)
            && (self.node, self.incarnation, self.boot) == (update.node, update.incarnation, update.boot)
            && self.addresses == update.addresses
            && self.leaves == (update.state == State::Left)
    }
}

fn bounded(mut addresses: Vec<String>) -> Vec<String> {
    addresses.retain(|address| address.len() <= MAX_ADDRESS_LEN);
    addresses.truncate(MAX_ADDRESSES);
    addresses
}

impl Item for Member {
    fn hash(&self) -> KeyHash {
        self.at
    }

    fn version(&self) -> u128 {
        // Not worth comparing before it has said something itself: nothing could be passed on.
        if self.word.signature.is_none() { 0 } else { u128::from(self.word.incarnation) << 8 | self.state as u128 }
    }

    fn fingerprint(&self) -> u128 {
        let Some(signature) = self.word.signature else { return 0 };
        // A signature is as good as random; times an odd number of its own for each state it stays so.
        const OF_STATE: [u128; 4] = [
            0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835,
            0xc2b2_ae3d_27d4_eb4f_1656_67b1_9e37_79f9,
            0x2545_f491_4f6c_dd1d_853c_49e6_748f_ea9b,
            0xda94_2042_e4dd_58b5_9fb2_1c65_1e98_df25,
        ];
        let word = u128::from_be_bytes(signature.0[..16].try_into().expect("a part of it"));
        word.wrapping_mul(OF_STATE[self.state as usize])
    }
}

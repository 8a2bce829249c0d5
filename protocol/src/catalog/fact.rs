//! Facts: what one author says about one thing, stamped and signed.
//!
//! | key | author | body |
//! |---|---|---|
//! | `Node` | the node | capacity, labels, addresses, images, certificates |
//! | `Placement` | the node that runs it | epoch and state of one replica |
//! | `Journal` | the auctioneer | its auctions of one workload: bids, refusals, who took what |
//! | `Drain` | the node itself, or an admin | whether it is to be emptied |
//! | `Revoked` | an admin | that the node's certificates are good no more |
//! | `Seats` | a custodian of a singleton | who its custodians are now |
//! | `Workload` | any member that may submit | the submitter's signed specification, how many replicas are wanted now |
//!
//! `Gone` in place of a body is a tombstone. A workload's tombstone is a [`WorkloadFact`] that is `removed`, because
//! it must show that its author may say so.

use std::collections::BTreeMap;
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use super::hlc::{Hlc, MAX_SKEW};
use crate::auction::{Award, Journal, MAX_RECORD};
use crate::codec;
use crate::id::{ChunkId, ImageId, KeyHash, MeshId, NodeId, Signature, WorkloadId};
use crate::lease::Seats;
use crate::reference::Reference;
use crate::trust::{Chain, Role, mesh_of, node_of, sign, verify};
use crate::worker::PlacementState;
use crate::workload::{MAX_REPLICAS, PlacementId, Resources, SignedSpec, Spec};

const DOMAIN: &str = "moyai fact v1";
/// The most bytes a fact's content may have.
pub const MAX_FACT: usize = 96 * 1024;
/// The same of a placement or an order: certificates, and a sentence.
pub const MAX_SMALL: usize = 8 * 1024;
/// The longest sentence in one, in bytes.
pub const MAX_DETAIL: usize = 1024;
/// The most images one node tells of; those loaded last.
pub const MAX_IMAGES: usize = 256;

/// What a fact is about.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Key {
    /// A node's report of itself.
    Node(NodeId),
    /// One replica on one node.
    Placement(NodeId, WorkloadId, u32),
    /// What an auctioneer remembers of a workload.
    Journal(NodeId, WorkloadId),
    /// A workload.
    Workload(WorkloadId),
    /// Whether a node is to be emptied.
    Drain(NodeId),
    /// That a node is a member no more.
    Revoked(NodeId),
    /// Who grants the leases of a singleton, as one of its custodians says.
    Seats(NodeId, WorkloadId),
}

impl Key {
    /// Where this stands in the order of reconciliation.
    pub fn hash(&self) -> KeyHash {
        let hash = blake3::hash(&codec::encode(self));
        KeyHash(hash.as_bytes()[..16].try_into().expect("half a hash"))
    }

    /// The only node that may write this, where there is one.
    pub fn owner(&self) -> Option<NodeId> {
        match self {
            Key::Node(node) | Key::Placement(node, ..) | Key::Journal(node, _) | Key::Seats(node, _) => Some(*node),
            Key::Workload(_) | Key::Drain(_) | Key::Revoked(_) => None,
        }
    }
}

/// What an author says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Body {
    /// Of [`Key::Node`].
    Node(NodeFact),
    /// Of [`Key::Placement`].
    Placement(PlacementFact),
    /// Of [`Key::Journal`].
    Journal(Journal),
    /// Of [`Key::Workload`].
    Workload(WorkloadFact),
    /// Of a placement or a journal, when it no longer holds.
    Gone,
    /// Of [`Key::Drain`] and [`Key::Revoked`].
    Order(OrderFact),
    /// Of [`Key::Seats`].
    Seats(Seats),
}

/// A node's report of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeFact {
    /// What people call it.
    pub name: String,
    /// Release of its software.
    pub version: String,
    /// All it can give.
    pub capacity: Resources,
    /// What constraints are matched against.
    pub labels: BTreeMap<String, String>,
    /// Where its data plane listens.
    pub data: Vec<String>,
    /// Images that are here, or what they were made of, under every name.
    pub images: Vec<ImageHeld>,
    /// Names that were taken back here, and when: what was given them before is not theirs any more.
    pub unnamed: Vec<(Reference, Hlc)>,
    /// Images that are on their way here, and can be fetched from here in part.
    pub fetching: Vec<ChunkId>,
    /// Its certificates.
    pub chain: Chain,
    /// Its own, over its certificates alone: who revokes it must show those that it shows itself.
    pub vouch: Signature,
}

/// The purpose that a node's word for its certificates is bound to.
const VOUCH: &str = "moyai certificates shown v1";

/// A node's word for its own certificates.
pub fn vouch(key: &SigningKey, chain: &Chain) -> Signature {
    sign(key, VOUCH, &codec::encode(chain))
}

impl NodeFact {
    /// What the node may do, by its own certificate.
    pub fn role(&self) -> Option<Role> {
        self.chain.leaf().map(|leaf| leaf.role)
    }
}

/// An image on a node, or what it was made of, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHeld {
    /// What it is called; of two images with one name, the one loaded last has it.
    pub reference: Reference,
    /// SHA-256 of its config.
    pub id: ImageId,
    /// The chunk that lists its parts.
    pub root: ChunkId,
    /// Bytes of all its chunks.
    pub size: u64,
    /// When the name was given.
    pub named: Hlc,
    /// It is complete here, ready to be run.
    pub here: bool,
    /// What it was made of, where that is known.
    pub original: Option<OriginalHeld>,
}

/// What an image was made of, bit for bit: the manifest and blobs that its tools know it by. Also of what is no image of this
/// mesh's machines, and then [`ImageHeld::root`] is its root and [`ImageHeld::id`] its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginalHeld {
    /// The chunk that lists its parts.
    pub root: ChunkId,
    /// SHA-256 of its manifest or index.
    pub digest: ImageId,
    /// Bytes that it takes beyond the image's files.
    pub size: u64,
    /// It is complete here.
    pub here: bool,
}

impl ImageHeld {
    /// Whether all that `root` lists is here.
    pub fn holds(&self, root: &ChunkId) -> bool {
        let original = self.original.as_ref().filter(|original| original.root == *root);
        original.map_or(self.here && self.root == *root, |original| original.here)
    }

    /// Whether both give one name to one image.
    pub fn agrees_with(&self, other: &ImageHeld) -> bool {
        (&self.reference, self.root) == (&other.reference, other.root)
    }

    /// Whether it can be run: it may be something else that was given a name.
    pub fn is_image(&self) -> bool {
        self.original.as_ref().is_none_or(|original| original.root != self.root)
    }

    /// Everything of it that is here.
    pub fn held(&self) -> impl Iterator<Item = ChunkId> {
        let original = self.original.iter().filter(|original| original.here).map(|original| original.root);
        Some(self.root).filter(|_| self.is_image() && self.here).into_iter().chain(original)
    }
}

/// One replica, as the node that runs it sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlacementFact {
    /// The fencing token.
    pub epoch: u64,
    /// How far it is.
    pub state: PlacementState,
    /// Why, where the state alone does not say.
    pub detail: String,
    /// Starts after the first.
    pub restarts: u32,
    /// It ended because it was stopped: wanted again, it is missing, whatever order the two wishes arrived in.
    pub stopped: bool,
    /// The workload's generation it was awarded under.
    pub generation: u64,
    /// What it runs: [`WorkloadFact::form`] of then.
    pub form: u64,
    /// When this node accepted it, in milliseconds since 1970.
    pub accepted: u64,
    /// When its container started last, in milliseconds since 1970; 0 is not yet.
    pub started: u64,
    /// The auction that brought it here.
    pub award: Award,
}

/// A workload, as the mesh wants it now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadFact {
    /// What was asked for, verbatim.
    pub spec: SignedSpec,
    /// Counts changes to `replicas`.
    pub generation: u64,
    /// The generation in which it was last started from nothing: replicas that ended in an earlier one are wanted anew.
    pub revived: u64,
    /// How many are wanted now.
    pub replicas: u32,
    /// Whether it is to be forgotten.
    pub removed: bool,
    /// What was asked for before the last update, to go back to; none before the first, and after going back.
    pub previous: Option<SignedSpec>,
    /// How an update replaces what runs.
    pub rollout: Rollout,
    /// Why the last update was taken back; empty when it was not.
    pub setback: String,
    /// Of a singleton: who grants its leases at first, and when an admin has forced others.
    pub seats: Option<Seats>,
    /// The certificates of this fact's author.
    pub author: Chain,
}

impl WorkloadFact {
    /// What is to run, as one number: the same specification is the same form, whichever generation it came with.
    pub fn form(&self) -> u64 {
        form(&self.spec)
    }
}

/// The form of a specification.
pub fn form(spec: &SignedSpec) -> u64 {
    u64::from_be_bytes(blake3::hash(&spec.bytes).as_bytes()[..8].try_into().expect("a part of it"))
}

/// How an update replaces what runs: one after the other, so many at a time.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// How many may run besides those wanted.
    pub max_surge: u32,
    /// How many of those wanted may be missing.
    pub max_unavailable: u32,
}

impl Default for Rollout {
    fn default() -> Self {
        Rollout { max_surge: 1, max_unavailable: 1 }
    }
}

/// What an admin wants of a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OrderFact {
    /// Whether it holds; an order to drain can be taken back, a revocation cannot.
    pub holds: bool,
    /// Why, in the admin's words; [`MAX_DETAIL`] bytes at the most.
    pub reason: String,
    /// Of a revocation: certificates of the node it is about, as that node has shown them, from which it is seen that its
    /// author stands above it.
    pub target: Option<(Chain, Signature)>,
    /// The certificates of this fact's author.
    pub author: Chain,
}

/// A fact as it travels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fact {
    /// About what.
    pub key: Key,
    /// When it was said.
    pub version: Hlc,
    /// Who says it.
    pub author: NodeId,
    /// The encoded [`Body`], verbatim, so that it can be passed on by nodes that know fewer fields.
    pub content: Vec<u8>,
    /// The author's signature over all of that.
    pub signature: Signature,
}

/// Why a fact is not believed. Nothing was changed; its author, or whoever changed it on the way, is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FactError {
    /// Larger than facts are.
    #[error("a fact of {len} bytes, {most} is the most of its kind")]
    TooLarge {
        /// How large.
        len: usize,
        /// The bound.
        most: usize,
    },
    /// Written by somebody who may not write it.
    #[error("node {} wrote a fact that is node {}'s to write", author.short(), owner.short())]
    NotOwner {
        /// Who wrote.
        author: NodeId,
        /// Whose it is.
        owner: NodeId,
    },
    /// The signature is not the author's.
    #[error("a fact that its author {} did not sign", author.short())]
    Forged {
        /// The alleged author.
        author: NodeId,
    },
    /// The content is not what the key says.
    #[error("a fact whose content does not fit its key: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// Said by somebody who may not: no member, no submitter, or nobody's winner.
    #[error("said without the right to: {reason}")]
    Unauthorised {
        /// What is wrong.
        reason: String,
    },
}

impl Said {
    /// The same, to be said again.
    pub fn body(&self) -> Body {
        match self {
            Said::Node(fact) => Body::Node(fact.clone()),
            Said::Placement(fact) => Body::Placement(fact.clone()),
            Said::Journal(journal) => Body::Journal(journal.clone()),
            Said::Order(order) => Body::Order(order.clone()),
            Said::Seats(seats) => Body::Seats(seats.clone()),
            Said::Workload { fact, .. } => Body::Workload(fact.clone()),
            Said::Gone => Body::Gone,
        }
    }
}

impl Said {
    /// Certificates that its author shows with it.
    pub fn author_chain(&self) -> Option<&Chain> {
        match self {
            Said::Node(fact) => Some(&fact.chain),
            Said::Workload { fact, .. } => Some(&fact.author),
            Said::Order(order) => Some(&order.author),
            Said::Placement(_) | Said::Journal(_) | Said::Seats(_) | Said::Gone => None,
        }
    }
}

/// What a believed fact says, with a workload's specification already opened.
#[derive(Clone, Debug)]
pub enum Said {
    /// A node's report.
    Node(NodeFact),
    /// A replica.
    Placement(PlacementFact),
    /// What an auctioneer remembers.
    Journal(Journal),
    /// What an admin wants of a node.
    Order(OrderFact),
    /// Who grants leases.
    Seats(Seats),
    /// A workload.
    Workload {
        /// How many are wanted, and whether at all.
        fact: WorkloadFact,
        /// What is asked for.
        spec: Arc<Spec>,
        /// Who asked.
        submitter: NodeId,
    },
    /// A tombstone.
    Gone,
}

impl Fact {
    /// A fact by the owner of `key_pair`.
    pub fn sign(key: Key, version: Hlc, body: &Body, key_pair: &SigningKey) -> Fact {
        let author = node_of(key_pair);
        let content = codec::encode(body);
        let signature = sign(key_pair, DOMAIN, &signed_bytes(&key, version, &author, &content));
        Fact { key, version, author, content, signature }
    }

    /// Bytes it takes in a message, at most: its content, and room for the rest.
    pub(crate) fn weight(&self) -> usize {
        self.content.len() + 160
    }

    /// What it says, after every check that makes it worth believing.
    pub fn open(&self, mesh: &MeshId) -> Result<Said, FactError> {
        let most = match self.key {
            Key::Placement(..) | Key::Drain(_) | Key::Revoked(_) | Key::Seats(..) => MAX_SMALL,
            Key::Journal(..) => 2 * MAX_RECORD,
            Key::Node(_) | Key::Workload(_) => MAX_FACT,
        };
        if self.content.len() > most {
            return Err(FactError::TooLarge { len: self.content.len(), most });
        }
        if let Some(owner) = self.key.owner().filter(|owner| *owner != self.author) {
            return Err(FactError::NotOwner { author: self.author, owner });
        }
        let signed = signed_bytes(&self.key, self.version, &self.author, &self.content);
        if !verify(&self.author, DOMAIN, &signed, &self.signature) {
            return Err(FactError::Forged { author: self.author });
        }
        let body: Body =
            codec::decode(&self.content).map_err(|error| FactError::Malformed { reason: error.to_string() })?;
        match (self.key, body) {
            (Key::Node(_), Body::Node(fact)) => self.open_node(fact, mesh),
            (Key::Placement(node, workload, replica), Body::Placement(fact)) => {
                // Epochs count from 1, one for each try: no try a millisecond since 1970. So there is always a later one.
                if replica >= MAX_REPLICAS || fact.epoch > self.version.time().0 {
                    return Err(FactError::Malformed { reason: format!("replica {replica}, epoch {}", fact.epoch) });
                }
                let placement = PlacementId { workload, replica, epoch: fact.epoch };
                let checked = fact.award.verify(&placement, &node, mesh);
                checked.map_err(|reason| FactError::Unauthorised { reason })?;
                Ok(Said::Placement(fact))
            }
            (Key::Journal(..), Body::Journal(journal)) => {
                // As of placements: a later epoch there always is.
                let good = |(replica, epoch, _): &(u32, u64, NodeId)| {
                    *replica < MAX_REPLICAS && *epoch <= self.version.time().0
                };
                if journal.is_bounded() && journal.records.iter().flat_map(|record| &record.placed).all(good) {
                    return Ok(Said::Journal(journal));
                }
                Err(FactError::Malformed { reason: "a journal of what cannot have been".to_owned() })
            }
            (Key::Drain(node) | Key::Revoked(node), Body::Order(order)) => self.open_order(node, order, mesh),
            (Key::Workload(id), Body::Workload(fact)) => self.open_workload(id, fact, mesh),
            (Key::Seats(..), Body::Seats(seats)) if seats.is_good() => Ok(Said::Seats(seats)),
            (Key::Placement(..) | Key::Journal(..) | Key::Seats(..), Body::Gone) => Ok(Said::Gone),
            (key, _) => Err(FactError::Malformed { reason: format!("{key:?} with another kind of content") }),
        }
    }

    fn open_node(&self, fact: NodeFact, mesh: &MeshId) -> Result<Said, FactError> {
        fact.chain
            .verify_shown_by(&self.author, mesh, self.version.time().as_secs())
            .map_err(|error| FactError::Unauthorised { reason: error.to_string() })?;
        if !verify(&self.author, VOUCH, &codec::encode(&fact.chain), &fact.vouch) {
            return Err(FactError::Unauthorised { reason: "certificates that their owner does not show".to_owned() });
        }
        let latest = self.version.time().after(MAX_SKEW);
        let named = fact.images.iter().map(|image| image.named).chain(fact.unnamed.iter().map(|(_, at)| *at));
        if named.into_iter().any(|named| named.time() > latest) {
            return Err(FactError::Malformed { reason: "an image named in the future".to_owned() });
        }
        if [fact.images.len(), fact.fetching.len(), fact.unnamed.len()].into_iter().any(|count| count > MAX_IMAGES) {
            return Err(FactError::Malformed { reason: format!("more than {MAX_IMAGES} images") });
        }
        Ok(Said::Node(fact))
    }

    fn open_order(&self, node: NodeId, order: OrderFact, mesh: &MeshId) -> Result<Said, FactError> {
        let unauthorised = |reason: String| FactError::Unauthorised { reason };
        let revokes = matches!(self.key, Key::Revoked(_));
        if (revokes && !order.holds) || order.reason.len() > MAX_DETAIL {
            return Err(FactError::Malformed { reason: "an order that cannot be given".to_owned() });
        }
        // Nobody revokes the root, from which all certificates come.
        if revokes && mesh_of(&node) == *mesh {
            return Err(unauthorised("the root is no member, and not revoked".to_owned()));
        }
        if revokes && mesh_of(&self.author) == *mesh {
            return Ok(Said::Order(order));
        }
        let author = order
            .author
            .verify_shown_by(&self.author, mesh, self.version.time().as_secs())
            .map_err(|error| unauthorised(error.to_string()))?;
        if author.role < Role::Admin && (revokes || self.author != node) {
            return Err(unauthorised(format!("node {} is a {}", author.node.short(), author.role)));
        }
        if revokes {
            let (target, word) =
                order.target.as_ref().ok_or_else(|| unauthorised("a revocation of nobody".to_owned()))?;
            if !verify(&node, VOUCH, &codec::encode(target), word)
                || order.author.issuers().any(|issuer| issuer == node)
            {
                return Err(unauthorised(format!("node {} does not stand under its author", node.short())));
            }
            let begun = target.leaf().map_or(0, |leaf| leaf.not_before);
            let member = target.verify_shown_by(&node, mesh, begun).map_err(|error| unauthorised(error.to_string()))?;
            // Two admins that revoked one another would split the mesh for good: one stands above the other, or neither
            // can. The root key stands above all.
            if member.role == Role::Admin && !target.issuers().any(|issuer| issuer == self.author) {
                return Err(unauthorised(format!(
                    "admin {} was not certified by {}",
                    node.short(),
                    author.node.short()
                )));
            }
        }
        Ok(Said::Order(order))
    }

    fn open_workload(&self, id: WorkloadId, fact: WorkloadFact, mesh: &MeshId) -> Result<Said, FactError> {
        let unauthorised = |reason: String| FactError::Unauthorised { reason };
        let author = fact
            .author
            .verify_shown_by(&self.author, mesh, self.version.time().as_secs())
            .map_err(|error| unauthorised(error.to_string()))?;
        if author.role < Role::Submitter {
            return Err(unauthorised(format!("node {} is a {}", author.node.short(), author.role)));
        }
        let (spec, submitter) = fact.spec.open(mesh).map_err(|error| unauthorised(error.to_string()))?;
        if let Some(previous) = &fact.previous {
            let (previous, _) = previous.open(mesh).map_err(|error| unauthorised(error.to_string()))?;
            if previous.id != id {
                return Err(FactError::Malformed { reason: "what it was before is another workload".to_owned() });
            }
        }
        if fact.seats.as_ref().is_some_and(|seats| !seats.is_good()) {
            return Err(FactError::Malformed { reason: "custodians that cannot be".to_owned() });
        }
        if fact.replicas > MAX_REPLICAS {
            return Err(FactError::Malformed { reason: format!("{} replicas", fact.replicas) });
        }
        if spec.id != id {
            return Err(FactError::Malformed { reason: format!("workload {} under the key of another", spec.id) });
        }
        Ok(Said::Workload { fact, spec: Arc::new(spec), submitter: submitter.node })
    }
}

fn signed_bytes(key: &Key, version: Hlc, author: &NodeId, content: &[u8]) -> Vec<u8> {
    let mut bytes = codec::encode(&(key, version, author));
    bytes.extend_from_slice(content);
    bytes
}

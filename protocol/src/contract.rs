//! How a [`Node`](crate::Node) and its driver talk. The daemon and the simulator are two drivers of the same code.
//!
//! The driver calls `handle(now, Input)` when something happened and `handle_timeout(now)` when the time that
//! `poll_timeout()` named has come; after each it takes everything from `poll_output()`. Nothing else goes in or out.
//!
//! - **Messages** may be lost, doubled or reordered; the driver says truthfully who sent them.
//! - **Effects** are what only the outside can do. Each has an id and ends in exactly one [`Completion`], also when it
//!   failed. After a restart no effect of the earlier life completes; the node asks again.
//! - **Commands** come from the local user or the driver and are answered by at most one [`Event::Reply`] with their id.
//!
//! Bounds: outputs are taken after each input, so the queue holds what one input causes; effects in flight are bounded
//! by the placements, exchanges and facts they are about.

use std::sync::Arc;
use std::time::Duration;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::auction::Record;
use crate::catalog::{ImageHeld, Key, Rollout};
use crate::id::{ChunkId, NodeId, WorkloadId};
use crate::time::{Instant, UnixMillis};
use crate::trust::{Chain, Membership};
use crate::worker::{Adopted, ExitStatus, StartError};
use crate::workload::{PlacementId, Resources, Spec};

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// An admitted peer sent these bytes.
    Message {
        /// Who, by the connection's key.
        from: NodeId,
        /// What.
        bytes: Vec<u8>,
    },
    /// The local user, or the driver itself, wants something.
    Command {
        /// Comes back in the reply.
        id: CommandId,
        /// What.
        command: Command,
    },
    /// An effect ended.
    Completion(Completion),
}

/// What the driver is to do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send these bytes; losing them is allowed.
    Transmit {
        /// To whom.
        to: NodeId,
        /// What.
        bytes: Vec<u8>,
    },
    /// Do this and report its end.
    Effect {
        /// Comes back in the completion.
        id: EffectId,
        /// What.
        effect: Effect,
    },
    /// What this effect does is wanted no more. It still ends in its completion, the sooner the better.
    Cancel(EffectId),
    /// Something worth telling.
    Event(Event),
}

/// Names one effect of one life of a node.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EffectId(pub u64);

/// Names one command; the driver chooses it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// What only the outside can do.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Write these records so that they survive a restart; `None` deletes. Ends in [`Outcome::Persisted`], in the order
    /// in which they were asked for; an empty list is over when those before it are.
    Persist(Vec<(RecordKey, Option<Vec<u8>>)>),
    /// Unpack the image and start the container. Ends in [`Outcome::Started`].
    Start {
        /// Which placement, and so which container.
        placement: PlacementId,
        /// What to run.
        spec: Arc<Spec>,
        /// Of a singleton: it must be dead one [`MARGIN`](crate::lease::MARGIN) before, whatever becomes of the daemon,
        /// unless an [`Effect::Extend`] comes.
        until: Option<Instant>,
    },
    /// Let a singleton's container run longer, see [`Effect::Start`]. Ends in [`Outcome::Extended`].
    Extend {
        /// Which placement.
        placement: PlacementId,
        /// Until when.
        until: Instant,
    },
    /// Find a container that an earlier life of this node started. Ends in [`Outcome::Adopted`].
    Adopt {
        /// Which placement.
        placement: PlacementId,
    },
    /// Wait until a running container exits. Ends in [`Outcome::Exited`].
    Watch {
        /// Which placement.
        placement: PlacementId,
    },
    /// Ask a container to stop, and kill it after `grace`. Ends in [`Outcome::Asked`]; its exit comes from `Watch`.
    Stop {
        /// Which placement.
        placement: PlacementId,
        /// Between the stop signal and SIGKILL.
        grace: Duration,
    },
    /// Delete what a stopped container left: its writable layer and its logs. Ends in [`Outcome::Done`].
    Remove {
        /// Which placement.
        placement: PlacementId,
    },
    /// Say which chunks of an image are missing here. Ends in [`Outcome::Surveyed`].
    Survey {
        /// The image's root chunk.
        root: ChunkId,
    },
    /// Get chunks from a provider, check each, keep them. Ends in [`Outcome::Fetched`].
    Fetch {
        /// Of which image.
        root: ChunkId,
        /// From whom.
        provider: NodeId,
        /// Which, with their lengths.
        pieces: Vec<Piece>,
        /// Where those are in the list of its contents, for the provider to tell others; nothing where that is not known yet.
        at: Vec<u32>,
    },
}

/// A chunk and its length in bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Piece {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Bytes.
    pub len: u32,
}

/// What a persisted record is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RecordKey {
    /// A fact of the catalog.
    Fact(Key),
    /// A member and where it was last seen.
    Member(NodeId),
    /// What a custodian has promised and voted for.
    Seat(WorkloadId),
}

/// The end of an effect.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Which effect.
    pub id: EffectId,
    /// How it ended.
    pub outcome: Outcome,
}

/// How an effect ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Of [`Effect::Persist`]. A failure is fatal to the daemon, not to the node: it is told by the driver.
    Persisted,
    /// Of [`Effect::Start`].
    Started(Result<(), StartError>),
    /// Of [`Effect::Adopt`].
    Adopted(Adopted),
    /// Of [`Effect::Watch`].
    Exited(ExitStatus),
    /// Of [`Effect::Stop`]: it has been asked, and may still run.
    Asked,
    /// Of [`Effect::Remove`].
    Done,
    /// Of [`Effect::Extend`].
    Extended,
    /// Of [`Effect::Survey`].
    Surveyed(Result<Survey, SurveyFault>),
    /// Of [`Effect::Fetch`].
    Fetched(Fetched),
}

/// What an image still needs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Everything of the image is here, checked and ready to run.
    pub complete: bool,
    /// Whether `pieces` are the contents, which every node lists in the same order, so that bitfields over them mean
    /// the same everywhere; before that they are the lists themselves.
    pub contents: bool,
    /// All pieces of this stage, in order.
    pub pieces: Vec<Piece>,
    /// Which of them are here.
    pub present: Vec<bool>,
}

/// Why the store cannot say what an image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurveyFault {
    /// It is not an image: what it names is not what it says of it. Nobody's copy of it is any better.
    pub damaged: bool,
    /// In words.
    pub reason: String,
}

/// What came of asking a provider for chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Checked and kept.
    pub got: Vec<ChunkId>,
    /// Bytes of those.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// What the provider has of the image's contents by now, if it says so ([`crate::exchange::Bitfield`]); of one that has all of
    /// it, what it has given already.
    pub has: Option<Vec<u8>>,
    /// Why the rest did not come.
    pub fault: Option<FetchFault>,
}

/// Why a provider did not deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchFault {
    /// No connection, or it broke.
    Unreachable(String),
    /// It sent bytes that are not the chunk.
    WrongChunk(ChunkId),
    /// It does not have one of them.
    Missing(ChunkId),
    /// This node could not keep them: a full disk, say.
    Storage(String),
}

/// What a local user or the driver wants.
#[derive(Clone, Debug)]
pub enum Command {
    /// The wall clock, at start and whenever it may have jumped.
    WallClock(UnixMillis),
    /// A connection to this peer was admitted. The chain behind it has been verified by the driver.
    Admitted {
        /// Who.
        membership: Membership,
        /// Where it was reached, when this side dialled.
        address: Option<String>,
    },
    /// This node's own addresses changed.
    Listening {
        /// Of libp2p, as multiaddresses.
        addresses: Vec<String>,
        /// Of the data plane, as socket addresses.
        data: Vec<String>,
    },
    /// A new certificate chain of this node.
    Certified(Chain),
    /// What this machine can give and how busy it is.
    Load {
        /// All of it.
        capacity: Resources,
        /// Share of time that some task waited for a processor, 0–100 (PSI).
        pressure: u8,
    },
    /// Something is to be said of a container that runs here, in words; it is forgotten when its state changes.
    Note {
        /// Of which.
        placement: PlacementId,
        /// What.
        detail: String,
    },
    /// An image was loaded here.
    ImageAdded(ImageHeld),
    /// A name is nobody's any more, here and on every node.
    Unname(crate::reference::Reference),
    /// Images, or what they were made of, are being given up here for want of room: they are not copied here again unless
    /// something here asks for them.
    ImagesGivenUp(Vec<ChunkId>),
    /// Images, or what they were made of, are here no more.
    ImagesRemoved(Vec<ChunkId>),
    /// An image, or what it was made of, is damaged here: it is fetched again, and keeps its names meanwhile.
    ImageDamaged(ChunkId),
    /// Whether images take as much room here as they may: then no copy is taken that nothing here asks for.
    StoreFull(bool),
    /// Fetch an image, or what it was made of, from whoever has it.
    FetchImage {
        /// Its root chunk.
        root: ChunkId,
    },
    /// Ask the nodes that are getting an image how far they are: [`Node::parts`](crate::node::Node::parts).
    AskParts {
        /// Its root chunk.
        root: ChunkId,
    },
    /// Ask whose turn it is to fetch this from outside of the mesh: [`Node::turn`](crate::node::Node::turn). Whose turn it is asks
    /// again within [`TURN`](crate::turns::TURN).
    AskTurn {
        /// What.
        reference: crate::reference::Reference,
        /// What another node has fetched a moment ago will do.
        shares: bool,
    },
    /// This node asks no more whose turn it is; if it was its own, it is over.
    EndTurn {
        /// Of what.
        reference: crate::reference::Reference,
        /// The image that it came to.
        root: Option<ChunkId>,
    },
    /// Something that runs already reads these chunks of an image: they come before all others of it.
    DemandChunks {
        /// The image's root chunk.
        root: ChunkId,
        /// Which, in the order in which they are wanted.
        chunks: Vec<ChunkId>,
    },
    /// Run this. Answered when it is written down here.
    Submit(Box<Spec>),
    /// Change how many replicas are wanted; zero stops it and keeps its name.
    Scale {
        /// Of which workload.
        workload: WorkloadId,
        /// How many.
        replicas: u32,
    },
    /// Run this instead, one replica after the other.
    Update {
        /// Which workload.
        workload: WorkloadId,
        /// What to run; its id and name stay what they are.
        spec: Box<Spec>,
        /// How many at a time.
        rollout: Rollout,
    },
    /// Run again what ran before the last update.
    Rollback {
        /// Which workload.
        workload: WorkloadId,
    },
    /// Empty a node, or take that back.
    Drain {
        /// Which node.
        node: NodeId,
        /// Whether it is to be empty.
        draining: bool,
    },
    /// Make a node a member no more, with everybody that it certified.
    Revoke {
        /// Which node.
        node: NodeId,
        /// Why, in the admin's words.
        reason: String,
        /// The mesh's root key; an admin's own, where it stands above the node, does without.
        root: Option<Box<SigningKey>>,
    },
    /// Give a singleton new custodians, though a majority of the old ones cannot be asked.
    Reseat {
        /// Which workload.
        workload: WorkloadId,
    },
    /// Stop it and forget it.
    Remove {
        /// Which workload.
        workload: WorkloadId,
    },
    /// Tell the others that this node goes.
    Leave,
}

/// Something worth telling the user or the driver.
#[derive(Clone, Debug)]
pub enum Event {
    /// The answer to a command.
    Reply {
        /// The command's id.
        id: CommandId,
        /// What came of it.
        result: Result<Reply, Refused>,
    },
    /// A member changed its state.
    Member {
        /// Who.
        node: NodeId,
        /// To what.
        state: crate::membership::State,
    },
    /// An auction ended with a placement.
    Placed {
        /// What was placed.
        placement: PlacementId,
        /// Where.
        node: NodeId,
        /// How it came to that.
        record: Arc<Record>,
    },
    /// An auction ended without a taker for some replicas.
    Pending {
        /// Which workload.
        workload: WorkloadId,
        /// How it came to that.
        record: Arc<Record>,
    },
    /// A fact became known, or changed.
    Changed(Key),
    /// Where a member can be reached; the driver dials these when it has something to send.
    Addresses {
        /// Who.
        node: NodeId,
        /// As multiaddresses.
        addresses: Vec<String>,
    },
    /// A peer's message or fact was not taken.
    Dropped {
        /// Who sent it.
        from: NodeId,
        /// Why.
        reason: String,
    },
    /// Another machine runs with this node's key and was there first: this one must stop.
    Cloned {
        /// When the other one started, in milliseconds since 1970.
        other_boot: u64,
    },
    /// A peer says that this node's clock is off.
    ClockOff {
        /// Who says so.
        by: NodeId,
        /// By how much, in milliseconds; positive is ahead.
        ahead: i64,
    },
    /// A node is a member no more: the driver cuts its connections and lets it in no more.
    Revoked {
        /// Who.
        node: NodeId,
    },
    /// This node is a member no more, or who certified it is not: the driver ends what runs here, and itself.
    CastOut,
    /// Something was done about a workload that is worth telling.
    Noted {
        /// Which.
        workload: WorkloadId,
        /// What, in words.
        text: String,
    },
    /// A fresh certificate came before the old one ended; the driver keeps it.
    Renewed(Chain),
    /// An image could not be had; it is tried again where it is still wanted.
    ImageFailed {
        /// Its root chunk.
        root: ChunkId,
        /// Why.
        reason: String,
    },
    /// A provider did not give of an image what it says it has; it is asked for elsewhere.
    Faulty {
        /// Who.
        node: NodeId,
        /// In words.
        reason: String,
    },
    /// Two images were given one name at about the same time: the later word counts. Each is told with one that has it.
    NameContested {
        /// The name.
        reference: crate::reference::Reference,
        /// Which is meant from now on.
        meant: (crate::id::ImageId, NodeId),
        /// And which is not.
        other: (crate::id::ImageId, NodeId),
    },
    /// An image is complete here.
    ImageComplete {
        /// Its root chunk.
        root: ChunkId,
    },
}

/// The good answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It was done.
    Done,
    /// A workload was written down under this id.
    Submitted(WorkloadId),
}

/// Why a command was refused. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// No such workload.
    #[error("no workload {}", .0.short())]
    NoWorkload(WorkloadId),
    /// The name is taken.
    #[error("the name `{name}` is used by workload {}", by.short())]
    NameTaken {
        /// The name.
        name: String,
        /// Whose it is.
        by: WorkloadId,
    },
    /// No such node.
    #[error("no node {}", .0.short())]
    NoNode(NodeId),
    /// This node's certificates do not let it do that.
    #[error("{0}")]
    NotAllowed(String),
    /// There is nothing to go back to.
    #[error("{0}")]
    Nothing(String),
    /// This node may not submit.
    #[error("this node is a {role}, which may not submit")]
    Role {
        /// What it is.
        role: crate::trust::Role,
    },
    /// This node's certificate has ended.
    #[error("{0}")]
    Certificate(String),
    /// The specification cannot be taken.
    #[error("{0}")]
    Spec(String),
    /// This node has as many names of images as it can tell of.
    #[error("this node has {0} names of images, and can tell of no more")]
    Names(usize),
    /// The catalog is at its bound.
    #[error("the mesh keeps {limit} facts at the most, and has them")]
    Full {
        /// The bound.
        limit: usize,
    },
}

//! What nodes say to one another.
//!
//! A variant never changes its shape once shipped and new ones come at the end; see [`crate::codec`]. Every list in a
//! message is bounded by its sender and cut by its receiver.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::auction::{Award, Basis, Refusal};
use crate::catalog::Fact;
use crate::id::{ChunkId, KeyHash, NodeId, WorkloadId};
use crate::lease::{Ballot, Seats};
use crate::membership::Update;
use crate::reconcile::Range;
use crate::reference::Reference;
use crate::time::UnixMillis;
use crate::trust::Chain;
use crate::turns::Turn;
use crate::workload::PlacementId;

/// One message between two nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// Are you there? (SWIM)
    Ping {
        /// Comes back in the answer.
        seq: u64,
        /// Who is meant: a ping for an earlier owner of an address is not answered.
        target: NodeId,
        /// Gossip on board.
        updates: Vec<Update>,
    },
    /// I am here.
    Ack {
        /// Of the ping.
        seq: u64,
        /// Gossip on board.
        updates: Vec<Update>,
    },
    /// Please ping somebody for me. (SWIM)
    PingReq {
        /// Comes back in the answer.
        seq: u64,
        /// Whom.
        target: NodeId,
        /// Gossip on board.
        updates: Vec<Update>,
    },
    /// I am here, but the one you asked about has not answered me. (Lifeguard)
    Nack {
        /// Of the ping request.
        seq: u64,
    },
    /// What I know of some members, and you do not.
    MembersPush {
        /// Them.
        updates: Vec<Update>,
    },
    /// Do we believe the same of everybody? Ranges that together cover all members, by the first halves of their ids.
    MembersReconcile {
        /// In order; each begins where the one before it ended.
        ranges: Vec<Range>,
    },
    /// Tell me of these members.
    MembersWant {
        /// By the first halves of their ids.
        keys: Vec<KeyHash>,
    },
    /// Facts that are new to the sender.
    Facts {
        /// Them.
        facts: Vec<Arc<Fact>>,
    },
    /// Do we know the same? Ranges of key hashes that together cover everything.
    Reconcile {
        /// In order; each begins where the one before it ended.
        ranges: Vec<Range>,
    },
    /// New to me, and perhaps to you: too much to be sent to whoever has it already.
    Have {
        /// By key hash, and in which version.
        items: Vec<(KeyHash, u128)>,
    },
    /// Send me these.
    Want {
        /// By key hash.
        keys: Vec<KeyHash>,
    },
    /// A fact of yours was stamped too far in the future.
    ClockOff {
        /// How far ahead of the sender's clock, in milliseconds.
        ahead: i64,
    },
    /// Who would run replicas of this? (Contract Net)
    Announcement {
        /// The auctioneer's number.
        auction: u64,
        /// The workload, as its submitter signed it.
        workload: Arc<Fact>,
        /// How many replicas are to be placed.
        replicas: u32,
        /// Whether what runs there in an earlier form would end for it.
        in_place: bool,
    },
    /// I would, for these prices.
    Bid {
        /// Of the announcement.
        auction: u64,
        /// For the first, second, … further replica, in expected milliseconds.
        prices: Vec<u32>,
        /// What the first price is made of.
        basis: Basis,
    },
    /// I would not.
    Refusal {
        /// Of the announcement.
        auction: u64,
        /// Why.
        refusal: Refusal,
    },
    /// It is yours, now or never.
    Award {
        /// What.
        placement: PlacementId,
        /// The workload, as its submitter signed it.
        workload: Arc<Fact>,
        /// Signed by the auctioneer, with how it came to that.
        award: Award,
    },
    /// What came of an award.
    Verdict {
        /// Of which award.
        placement: PlacementId,
        /// `None` is: accepted.
        refusal: Option<Refusal>,
    },
    /// What became of this award? One that was never seen is refused from now on; those of later auctions are not.
    AwardQuery {
        /// Of which award.
        placement: PlacementId,
        /// When its auction was opened, as the award says.
        at: UnixMillis,
    },
    /// Which chunks of this image do you have?
    BitfieldRequest {
        /// The image's root chunk.
        root: ChunkId,
        /// What this one has, if it receives the image too: as in its answer.
        bits: Option<Vec<u8>>,
    },
    /// These.
    Bitfield {
        /// The image's root chunk.
        root: ChunkId,
        /// One bit per piece of the image's contents, in order, low bit first; empty with `complete`.
        bits: Vec<u8>,
        /// All of them.
        complete: bool,
    },
    /// My certificate ends soon: please sign another of the same role.
    Renew {
        /// The old one, still valid.
        chain: Chain,
    },
    /// Here it is.
    Renewed {
        /// The new one.
        chain: Chain,
    },
    /// I am going; this is not a failure.
    Leave {
        /// The leaver's own word.
        update: Update,
    },
    /// Would you keep room for this part of a gang, until I know that all of it has a place?
    Hold {
        /// The auctioneer's number.
        auction: u64,
        /// The workload, as its submitter signed it.
        workload: Arc<Fact>,
        /// How many replicas.
        replicas: u32,
    },
    /// Whether it is kept, for a few seconds.
    Held {
        /// Of the request.
        auction: u64,
        /// `None` is: kept.
        refusal: Option<Refusal>,
    },
    /// The room is not needed.
    Unhold {
        /// Of the request.
        auction: u64,
    },
    /// May I run this for another while?
    LeaseRequest {
        /// What.
        placement: PlacementId,
        /// Who decides on it, as far as the sender knows.
        seats: Seats,
        /// Comes back in the answer.
        seq: u64,
    },
    /// You may.
    LeaseGranted {
        /// What.
        placement: PlacementId,
        /// Under which seats.
        term: u64,
        /// Of the request.
        seq: u64,
    },
    /// Not now.
    LeaseDenied {
        /// What.
        placement: PlacementId,
        /// Of the request.
        seq: u64,
        /// Who decides on it, where the sender knows better.
        seats: Option<Seats>,
    },
    /// It has ended here, and does not start again.
    LeaseRelease {
        /// What.
        placement: PlacementId,
    },
    /// Paxos 1a: take part in nothing before this ballot, for the seats after `term`.
    SeatsPrepare {
        /// Of which workload.
        workload: WorkloadId,
        /// The seats now.
        term: u64,
        /// Which try.
        ballot: Ballot,
    },
    /// Paxos 1b: I promise, and this is what I have voted for.
    SeatsPromise {
        /// Of which workload.
        workload: WorkloadId,
        /// The seats now.
        term: u64,
        /// Which try.
        ballot: Ballot,
        /// The last vote.
        accepted: Option<(Ballot, Seats)>,
    },
    /// Paxos 2a: vote for these seats.
    SeatsAccept {
        /// Of which workload.
        workload: WorkloadId,
        /// Which try.
        ballot: Ballot,
        /// The next seats.
        seats: Seats,
    },
    /// Paxos 2b: I have.
    SeatsAccepted {
        /// Of which workload.
        workload: WorkloadId,
        /// The seats now.
        term: u64,
        /// Which try.
        ballot: Ballot,
    },
    /// A majority has.
    SeatsDecided {
        /// Of which workload.
        workload: WorkloadId,
        /// The seats from now on.
        seats: Seats,
    },
    /// May I fetch this from outside of the mesh?
    TurnRequest {
        /// What.
        reference: Reference,
        /// What another node has fetched a moment ago will do.
        shares: bool,
    },
    /// Whose turn it is.
    Turn {
        /// Of the request.
        reference: Reference,
        /// The answer.
        turn: Turn,
    },
    /// My turn is over.
    TurnEnd {
        /// Of the request.
        reference: Reference,
        /// What came of it, if it came to something.
        root: Option<ChunkId>,
    },
}

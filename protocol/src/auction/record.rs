//! What is remembered of an auction, so that `moyai why` can show every quote, refusal and epoch on any node, also
//! after the auctioneer is gone: each auctioneer keeps a [`Journal`] of each workload, which is a fact of the catalog.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::time::UnixMillis;

/// The most quotes, and the most refusals, that a record keeps one by one.
pub const MAX_QUOTES: usize = 16;
/// The most placements that a record names.
pub const MAX_PLACED: usize = 256;
/// The most records of one workload that an auctioneer keeps; the oldest goes first.
pub const MAX_RECORDS: usize = 8;

/// Why a node would not run a replica.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Refusal {
    /// Not enough memory is free.
    Memory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes not reserved by others.
        free: u64,
    },
    /// Not enough processor time is free.
    Cpu {
        /// Thousandths of a core asked for.
        asked: u64,
        /// Thousandths not reserved by others.
        free: u64,
    },
    /// A label is missing or different.
    Label {
        /// Its name.
        name: String,
        /// What was asked for.
        value: String,
    },
    /// The node does not know a feature that the workload needs.
    Requires(String),
    /// Its signature or role is not good here.
    Unauthorised(String),
    /// It may not run more placements.
    Full,
    /// It knows this replica with a later epoch.
    Superseded {
        /// The epoch it knows.
        epoch: u64,
    },
    /// It did not see the award and takes it no more.
    NotSeen,
    /// The workload is removed, or wants fewer replicas by now.
    Unwanted,
    /// It did not answer in time.
    NoAnswer,
    /// This replica failed on it a moment ago.
    FailedHere,
    /// It has not got the image, and knows no live node that has.
    NoImage,
    /// It is being drained.
    Draining,
    /// It runs something that the workload, or that which runs there, wants to be apart from.
    Apart {
        /// The other's name.
        from: String,
    },
    /// What it would need is held for a gang that is being placed.
    OnHold,
    /// All bids together have room for a part of the gang, and it runs whole or not at all.
    Part {
        /// Replicas that would have a place.
        found: u32,
        /// Replicas of the gang.
        wanted: u32,
    },
    /// Fewer than a majority of the workload's custodians are live here: no lease could be had.
    NoMajority,
    /// Its machine does not have this, or does not give it to containers.
    NotOffered(String),
    /// A port of its machine leads to another workload.
    Port {
        /// As it was asked for.
        port: String,
        /// The other's name.
        by: String,
    },
    /// Every device of this kind is in use.
    Devices(String),
}

impl Refusal {
    /// Cut to what a record can carry: it comes from a peer, and goes into facts.
    pub fn bounded(self) -> Refusal {
        const MOST: usize = 120;
        let cut = |text: String| text.chars().take(MOST).collect::<String>();
        match self {
            Refusal::Label { name, value } => Refusal::Label { name: cut(name), value: cut(value) },
            Refusal::Requires(feature) => Refusal::Requires(cut(feature)),
            Refusal::Apart { from } => Refusal::Apart { from: cut(from) },
            Refusal::Unauthorised(reason) => Refusal::Unauthorised(cut(reason)),
            Refusal::NotOffered(what) => Refusal::NotOffered(cut(what)),
            Refusal::Port { port, by } => Refusal::Port { port: cut(port), by: cut(by) },
            Refusal::Devices(kind) => Refusal::Devices(cut(kind)),
            other => other,
        }
    }

    /// The reason without its amounts, by which refusals are counted.
    pub fn kind(&self) -> String {
        match self {
            Refusal::Memory { .. } => "memory".to_owned(),
            Refusal::Cpu { .. } => "cpus".to_owned(),
            Refusal::Label { name, value } => format!("no label {name}={value}"),
            Refusal::Requires(feature) => format!("does not know {feature}"),
            Refusal::Unauthorised(_) => "signature or role".to_owned(),
            Refusal::Full => "too many placements".to_owned(),
            Refusal::Superseded { .. } => "later epoch known".to_owned(),
            Refusal::NotSeen => "award not seen in time".to_owned(),
            Refusal::Unwanted => "not wanted any more".to_owned(),
            Refusal::NoAnswer => "no answer".to_owned(),
            Refusal::NoImage => "no live node has the image".to_owned(),
            Refusal::FailedHere => "failed there a moment ago".to_owned(),
            Refusal::Draining => "being drained".to_owned(),
            Refusal::Apart { from } => format!("wants to be apart from {from}"),
            Refusal::OnHold => "held for a gang".to_owned(),
            Refusal::Part { found, wanted } => format!("room for {found} of the gang's {wanted}"),
            Refusal::NoMajority => "no majority of its custodians is live".to_owned(),
            Refusal::NotOffered(what) => format!("does not offer {what}"),
            Refusal::Port { port, by } => format!("port {port} leads to {by}"),
            Refusal::Devices(kind) => format!("no {kind} is free"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| bytes >> 20;
        match self {
            Refusal::Memory { asked, free } => {
                write!(f, "memory (asked {} MiB, {} MiB free)", mib(asked), mib(free))
            }
            Refusal::Cpu { asked, free } => {
                write!(f, "cpus (asked {}, {} free)", Milli(*asked), Milli(*free))
            }
            Refusal::Unauthorised(reason) => write!(f, "signature or role: {reason}"),
            Refusal::Superseded { epoch } => write!(f, "epoch {epoch} is known there"),
            other => f.write_str(&other.kind()),
        }
    }
}

struct Milli(u64);

impl fmt::Display for Milli {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// What a price is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// Bytes of the image that are not on the node.
    pub missing: u64,
    /// Bytes of the image in all.
    pub size: u64,
    /// Bytes a second that the node expects to fetch them with.
    pub bandwidth: u64,
    /// Containers being started there.
    pub starting: u32,
    /// Share of its processors that is reserved, 0–100.
    pub reserved: u8,
    /// Share of time that some task waited for a processor, 0–100.
    pub pressure: u8,
    /// Workloads it wants to be near to that are not there.
    pub far: u32,
    /// Placements of lower priority that would make way.
    pub evicts: u32,
}

/// One bid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quote {
    /// Whose.
    pub node: NodeId,
    /// Expected milliseconds for the first replica it was offered.
    pub price: u32,
    /// What it is made of.
    pub basis: Basis,
    /// Replicas it was given.
    pub won: Vec<u32>,
}

/// Why an auction was held.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Somebody asked for it.
    Submitted,
    /// The node that ran it went down.
    NodeDown(NodeId),
    /// It was lost or failed where it ran.
    Lost(NodeId),
    /// It made way there for something of a higher priority.
    Evicted(NodeId),
    /// It runs on a node that is being drained, and goes on there until it runs elsewhere.
    Drained(NodeId),
    /// It runs as it was before the last update, and goes on so until its successor runs.
    Updated(NodeId),
    /// Nobody runs it, for another reason: the first auction found no taker, or more replicas are wanted.
    Missing,
}

/// An auction in retrospect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Who held it.
    pub auctioneer: NodeId,
    /// When it was opened, in milliseconds since 1970.
    pub at: UnixMillis,
    /// Why.
    pub cause: Cause,
    /// How many nodes could have been asked.
    pub members: u32,
    /// How many were.
    pub asked: u32,
    /// Milliseconds from opening to this record.
    pub took: u32,
    /// The cheapest bids, in order; winners first of all.
    pub quotes: Vec<Quote>,
    /// Bids beyond those kept.
    pub more_quotes: u32,
    /// Some refusals, each with its amounts.
    pub refusals: Vec<(NodeId, Refusal)>,
    /// All refusals by kind.
    pub refused: Vec<(String, u32)>,
    /// What came of it: replica, epoch, and who took it; [`MAX_PLACED`] at the most.
    pub placed: Vec<(u32, u64, NodeId)>,
}

/// What one auctioneer remembers of one workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Journal {
    /// Its auctions, the last one last; [`MAX_RECORDS`] and [`MAX_RECORD`] bytes at the most.
    pub records: Vec<Record>,
    /// Whether the last one left something without a taker that has none yet.
    pub pending: bool,
}

impl Journal {
    /// Whether it is no more than its author may keep.
    pub fn is_bounded(&self) -> bool {
        let bounded = |record: &Record| record.placed.len() <= MAX_PLACED && record.quotes.len() <= MAX_QUOTES;
        self.records.len() <= MAX_RECORDS && self.records.iter().all(bounded)
    }

    /// With one more auction.
    pub fn with(&self, record: Record, pending: bool) -> Journal {
        let mut journal = Journal { records: self.records.clone(), pending };
        // An auction tried again and again in vain is one line of history.
        if pending && self.pending && journal.records.last().is_some_and(|last| last.placed.is_empty()) {
            journal.records.pop();
        }
        journal.records.push(record);
        while journal.records.len() > 1
            && (journal.records.len() > MAX_RECORDS || crate::codec::encode(&journal).len() > MAX_RECORD)
        {
            journal.records.remove(0);
        }
        journal
    }
}

/// The most bytes of a record, as its bounds allow, and of a journal.
pub const MAX_RECORD: usize = 32 * 1024;

impl Record {
    #[expect(clippy::too_many_arguments, reason = "each is another part of what is remembered")]
    pub(crate) fn new(
        auctioneer: NodeId,
        at: UnixMillis,
        cause: Cause,
        (members, asked): (u32, u32),
        took: Duration,
        mut quotes: Vec<Quote>,
        mut refusals: Vec<(NodeId, Refusal)>,
        mut placed: Vec<(u32, u64, NodeId)>,
    ) -> Record {
        quotes.sort_by_key(|quote| (quote.won.is_empty(), quote.price, quote.node));
        let more_quotes = quotes.len().saturating_sub(MAX_QUOTES) as u32;
        quotes.truncate(MAX_QUOTES);
        let mut refused: Vec<(String, u32)> = Vec::new();
        for (_, refusal) in &refusals {
            let kind = refusal.kind();
            match refused.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, count)) => *count += 1,
                None => refused.push((kind, 1)),
            }
        }
        refused.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        refused.truncate(MAX_QUOTES);
        refusals.truncate(MAX_QUOTES);
        placed.truncate(MAX_PLACED);
        let took = took.as_millis() as u32;
        Record { auctioneer, at, cause, members, asked, took, quotes, more_quotes, refusals, refused, placed }
    }
}

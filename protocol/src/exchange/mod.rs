//! How an image's chunks get here: from several providers at once, each chunk checked, and passed on while the rest is
//! still coming.
//!
//! **States of a download.** *Surveying* (the store says which pieces of the next list are missing) → *Fetching* (in
//! batches, from whoever has them) → *Surveying* again: first the image's root, then the lists it names, then the
//! contents those name → complete, or failed for want of a provider or of room.
//!
//! **Who writes.** Only this node changes what it has. Providers say what they have by bitfield, behind each batch that they give
//! and when they are asked, which they are where nothing was heard of them for a while; a bitfield is a hint, and the hash of each
//! chunk decides.
//!
//! **If a provider dies or lies.** A batch that fails goes back among the missing pieces; a provider that cannot be
//! reached rests for [`REST`]; one that sends a wrong chunk is not asked again in this download. When all that had the
//! whole image are such, and those still fetching it have had nothing to give for [`STALEMATE`], it has failed.
//!
//! **Which piece.** A run of neighbours (a disk reads them together). Who has all of the image is asked by each node for
//! another share of it first, which hashes give it among those receiving it: its uplink then carries each byte
//! about once, and the rest goes between the receivers, from one of the rarest pieces on (BitTorrent, Cohen 2003). Without
//! shares sixteen nodes had 1.7 copies from the first, and waited for its uplink. Shares are alike, or the largest would come last,
//! and to all others from one. Who has everything tells behind each batch what it has given already, and that is a matter of those
//! who have it. Whose share is done takes what is left of others' only where those take nothing, and else a batch now and then, to
//! hear of it: so a share of a node that is slow or gone costs time, and nothing else. (When all whose shares were
//! done took it, from an uplink that is what all wait for, the last fifth of an image came twice.)
//! Nothing of it is agreed upon: nodes that count the receivers differently fetch some pieces twice.
//!
//! **What a container waits for** that was started before all of its image is here comes before everything else of the image:
//! [`Exchange::demand`]. For [`QUIET`] after a demand nothing else of it is asked for, so that the next one does not queue behind
//! it; for at most [`MAX_QUIET`] in all, since an image must be whole one day.
//!
//! **At the end**, and where a provider has nothing else to give, what is in flight for much longer than usual is asked for a second
//! time elsewhere; whichever comes last is called off. Before the end that is for seconds: what is only late comes twice, and takes
//! the place of something else (3 % of a spread to fifteen nodes).
//!
//! **Bounds.** [`MAX_DOWNLOADS`] downloads, [`MAX_BATCHES`] batches in flight for each and [`MAX_IN_FLIGHT`] bytes, and
//! [`PER_PROVIDER`] more of what is demanded or hangs elsewhere; [`PER_PROVIDER`] batches with one provider
//! ([`PER_PROVIDER_DEMANDED`] of what is demanded, [`WITH_THE_ONLY_ONE`] where there is no other, [`WITH_THE_FIRST`] with who has
//! all of what others receive too), a batch of at most
//! [`BATCH_BYTES`] and [`BATCH_PIECES`] pieces.

mod bitfield;
mod picker;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use fastrand::Rng;

pub use bitfield::Bitfield;
use bitfield::pieces_in;

use crate::contract::{FetchFault, Fetched, Piece, Survey, SurveyFault};
use crate::id::{ChunkId, NodeId};
use crate::message::Message;
use crate::time::Instant;

/// Images received at one time; more wait until one is complete.
pub const MAX_DOWNLOADS: usize = 16;
/// Images that wait for their turn.
const MAX_WAITING: usize = 256;
/// Failures that are remembered for whoever asks.
const MAX_FAILURES: usize = 64;
/// Receipts that are remembered.
const MAX_RECEIPTS: usize = 64;
/// Batches in flight for one image, and their bytes (a single batch may be more).
pub const MAX_BATCHES: usize = 16;
const MAX_IN_FLIGHT: u64 = 8 << 20;
/// Of those, with one provider: while one is written the next is on its way.
pub const PER_PROVIDER: usize = 2;
/// The same with who has all of what others receive too, as long as they come soon: its uplink is what all wait for, and is not to
/// stand idle.
const WITH_THE_FIRST: usize = 3;
/// The same where there is no other: two are on their way while two are checked and written.
pub const WITH_THE_ONLY_ONE: usize = 4;
/// The most bytes in a batch.
pub const BATCH_BYTES: u64 = 1 << 20;
/// The same where others receive the image too: the sooner it is here, the sooner they have it from here.
const SHARED_BATCH_BYTES: u64 = 256 << 10;
/// Consecutive pieces of about so many bytes are of one node's share.
const BLOCK_BYTES: u64 = SHARED_BATCH_BYTES;
/// The most pieces in a batch.
pub const BATCH_PIECES: usize = 512;
/// How long a provider that could not be reached is left alone.
const REST: Duration = Duration::from_secs(3);
/// The same doubles with each try of which nothing came, so often at the most.
const MAX_DOUBLED: u32 = 3;
/// Between two looks at who has what.
const LOOK: Duration = Duration::from_millis(500);
/// In flight for longer than this at the end, and than three times as long as batches take, one is asked for elsewhere too.
const ENDGAME: Duration = Duration::from_millis(500);
/// The same before the end.
const LATE: Duration = Duration::from_secs(2);
/// However long batches take, so long one is waited for before another provider has its turn.
const MAX_PATIENCE: Duration = Duration::from_secs(5);
/// Who is overtaken after so long is said to be slow.
const SLOW: Duration = Duration::from_secs(3);
/// Without any piece for this long, a download has failed.
pub(crate) const GIVE_UP: Duration = Duration::from_secs(60);
/// The same where every node that had all of it has sent a wrong chunk: those that are left are fetching it themselves.
const STALEMATE: Duration = Duration::from_secs(5);
/// After a demand nothing else of its image is asked for, so long and so long in all.
const QUIET: Duration = Duration::from_secs(1);
const MAX_QUIET: Duration = Duration::from_secs(60);
/// Pieces of an image that are demanded; whoever waits for more asks again.
const MAX_DEMANDED: usize = 4096;
/// Batches with one provider while something is demanded.
const PER_PROVIDER_DEMANDED: usize = 4;
/// How long a provider's batches took is believed by half after so long without any, and what it gives to others no more.
const BELIEVED: Duration = Duration::from_secs(2);
/// The most pieces of one image: a bitfield over them fills half a message.
pub(crate) const MAX_PIECES: usize = 1 << 22;

/// Why an image is wanted here.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// So that the mesh has another copy of it.
    Copy,
    /// Something here is to run it, or somebody asked for it. Takes the place of a copy when there is none left.
    Use,
}

/// How an image came here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes from each node, checked.
    pub from: BTreeMap<NodeId, u64>,
    /// Bytes of its contents that were here before.
    pub had: u64,
    /// How long it took.
    pub took: Duration,
}

/// What the exchange wants done.
#[derive(Debug)]
pub enum Action {
    /// Ask the store what is missing.
    Survey(ChunkId),
    /// Get this batch.
    Fetch {
        /// Of which image.
        root: ChunkId,
        /// Comes back with the result.
        batch: u64,
        /// From whom.
        provider: NodeId,
        /// Which pieces.
        pieces: Vec<Piece>,
        /// Where those are in the list of the image's contents; nothing of what is no content.
        at: Vec<u32>,
    },
    /// This batch is wanted no more; its end is still to be told.
    Cancel {
        /// Of which image.
        root: ChunkId,
        /// Which.
        batch: u64,
    },
    /// Send this.
    Send(NodeId, Message),
    /// What names its contents is here.
    Listed(ChunkId),
    /// Everything is here.
    Complete(ChunkId),
    /// It cannot be had.
    Failed {
        /// Which.
        root: ChunkId,
        /// It is not what it says it is.
        damaged: bool,
        /// In words.
        reason: String,
    },
    /// This provider did not give what it said it has, or not in time.
    Faulty(NodeId, String),
    /// This provider sent bytes that are not the chunk it was asked for.
    Lied(NodeId, ChunkId),
    /// A batch of so many bytes took so long.
    Measured(u64, Duration),
}

#[derive(Debug, Default)]
struct Provider {
    complete: bool,
    /// As it has said, piece by piece; of one that has all of it, what it has given since this node heard of it first.
    has: Bitfield,
    /// Of one that has all: what it had given before that, or to this node in vain. Those it went to may be gone, and who is here
    /// tells so himself.
    before: Option<Bitfield>,
    /// All that it had given when it said so last.
    last: Bitfield,
    /// It sent a wrong chunk.
    banned: bool,
    rest_until: Instant,
    /// Batches of which nothing came, one after the other.
    idle: u32,
    /// When it said last what it has.
    heard: Option<Instant>,
    /// How long its batches take, smoothed, and when the last of them came.
    usual: Duration,
    gave: Instant,
    /// Of one that has all: pieces that others were given and that this node asked for, of late: each report halves what was before it.
    took: (usize, usize),
    /// Whether others were given at least twice as many as this node, as far as that can be told.
    gives_others: Option<bool>,
}

#[derive(Debug)]
struct Batch {
    provider: NodeId,
    pieces: Vec<u32>,
    bytes: u64,
    asked: Instant,
    doubled: bool,
    called_off: bool,
}

/// One image on its way here.
#[derive(Debug)]
pub struct Download {
    need: Need,
    surveying: bool,
    contents: bool,
    pieces: Vec<Piece>,
    index: BTreeMap<ChunkId, u32>,
    have: Bitfield,
    in_flight: Bitfield,
    /// For each piece, providers that have said so, piece by piece: those that receive the image too, or did, and those that have all
    /// of it and have given it to somebody.
    partly: Vec<u16>,
    /// Who receives it, this node among them.
    receivers: Vec<NodeId>,
    /// What is this node's share among them.
    share: Bitfield,
    /// What somebody waits for, in that order.
    demanded: VecDeque<u32>,
    /// Nothing but that is asked for until then.
    quiet_until: Instant,
    /// How long it has been so.
    quiet: Duration,
    /// How long batches take, smoothed.
    usual: Duration,
    providers: BTreeMap<NodeId, Provider>,
    batches: BTreeMap<u64, Batch>,
    last_progress: Instant,
    next_look: Instant,
    begun: Instant,
    receipt: Receipt,
    last_fault: Option<String>,
    last_lie: Option<String>,
}

/// All images on their way here.
#[derive(Debug)]
pub struct Exchange {
    me: NodeId,
    downloads: BTreeMap<ChunkId, Download>,
    /// Those that are to be used before those that are only copied, each in their order.
    waiting: Vec<(ChunkId, Need)>,
    /// Why downloads failed, and when, until they are wanted again; the latest [`MAX_FAILURES`].
    failures: VecDeque<(ChunkId, String, Instant)>,
    /// How images came, for whoever asks; the latest [`MAX_RECEIPTS`].
    receipts: VecDeque<(ChunkId, Receipt)>,
    next_batch: u64,
    actions: Vec<Action>,
}

impl Exchange {
    /// Of this node.
    pub fn new(me: NodeId) -> Self {
        Exchange {
            me,
            downloads: BTreeMap::new(),
            waiting: Vec::new(),
            failures: VecDeque::new(),
            receipts: VecDeque::new(),
            next_batch: 0,
            actions: Vec::new(),
        }
    }

    /// Begins to fetch an image, unless it is on its way already.
    pub fn want(&mut self, root: ChunkId, need: Need, now: Instant) {
        if let Some(download) = self.downloads.get_mut(&root) {
            download.need = download.need.max(need);
            return;
        }
        if self.downloads.len() >= MAX_DOWNLOADS {
            let copied = self.downloads.iter().find(|(_, download)| download.need < need).map(|(root, _)| *root);
            let Some(copied) = copied else { return self.wait(root, need) };
            // Its chunks stay; it goes on when there is a place again.
            self.remove(&copied);
            self.wait(copied, Need::Copy);
        }
        self.waiting.retain(|(waiting, _)| *waiting != root);
        self.failures.retain(|(failed, ..)| *failed != root);
        self.downloads.insert(root, Download::new(need, now));
        self.actions.push(Action::Survey(root));
    }

    fn wait(&mut self, root: ChunkId, need: Need) {
        let known = self.waiting.iter().find(|(waiting, _)| *waiting == root).map(|(_, need)| *need);
        let need = known.map_or(need, |known| known.max(need));
        self.waiting.retain(|(waiting, _)| *waiting != root);
        let at = self.waiting.partition_point(|(_, other)| *other >= need);
        self.waiting.insert(at, (root, need));
        // Beyond the bound it is not remembered; whoever needs it asks again.
        self.waiting.truncate(MAX_WAITING);
    }

    /// Images on their way, with what is known of their pieces.
    pub fn downloads(&self) -> impl Iterator<Item = (&ChunkId, &Download)> {
        self.downloads.iter()
    }

    /// How an image came, if it came in this node's life.
    pub fn receipt(&self, root: &ChunkId) -> Option<&Receipt> {
        self.receipts.iter().find(|(other, _)| other == root).map(|(_, receipt)| receipt)
    }

    /// Why an image could not be had, when it was wanted last.
    pub fn failure(&self, root: &ChunkId) -> Option<&str> {
        self.failed(root).map(|(reason, _)| reason)
    }

    /// Why and when.
    pub(crate) fn failed(&self, root: &ChunkId) -> Option<(&str, Instant)> {
        let (_, reason, at) = self.failures.iter().find(|(failed, ..)| failed == root)?;
        Some((reason, *at))
    }

    /// Gives up what is only copied.
    pub fn drop_copies(&mut self, now: Instant) {
        self.waiting.retain(|(_, need)| *need > Need::Copy);
        let copied = self.downloads.iter().filter(|(_, download)| download.need == Need::Copy);
        for root in copied.map(|(root, _)| *root).collect::<Vec<ChunkId>>() {
            self.finish(root, now);
        }
    }

    /// There are enough copies of it: one that has not begun here is not taken.
    pub fn want_no_copy(&mut self, root: &ChunkId) {
        self.waiting.retain(|(waiting, need)| waiting != root || *need > Need::Copy);
    }

    /// Whether what names its contents is here.
    pub fn is_listed(&self, root: &ChunkId) -> bool {
        self.downloads.get(root).is_some_and(|download| download.contents)
    }

    /// Somebody waits for these chunks. Before the contents are known nothing is done: they are to be demanded again.
    pub fn demand(&mut self, root: &ChunkId, chunks: &[ChunkId], now: Instant, rng: &mut Rng) {
        let Some(download) = self.downloads.get_mut(root).filter(|download| download.contents) else { return };
        let mut missing = false;
        for at in chunks.iter().filter_map(|chunk| download.index.get(chunk)) {
            let here = download.have.has(*at as usize);
            missing |= !here;
            if !here && !download.demanded.contains(at) && download.demanded.len() < MAX_DEMANDED {
                download.demanded.push_back(*at);
            }
        }
        // Nobody has it: then what others have may as well come.
        let offered = download.demanded.iter().any(|at| {
            let mut able = download.providers.values().filter(|provider| provider.is_able(now));
            able.any(|provider| download.offers(provider, *at as usize))
        });
        if missing && offered && download.quiet < MAX_QUIET {
            download.quiet += (now + QUIET).since(download.quiet_until.max(now));
            download.quiet_until = now + QUIET;
        }
        self.pump(*root, now, rng);
    }

    /// Everything that is on its way here, or waits for its turn.
    pub fn wanted(&self) -> impl Iterator<Item = ChunkId> {
        self.downloads.keys().copied().chain(self.waiting.iter().map(|(root, _)| *root))
    }

    /// Whether an image waits until others are complete.
    pub fn is_waiting(&self, root: &ChunkId) -> bool {
        self.waiting.iter().any(|(waiting, _)| waiting == root)
    }

    /// Who may have an image: all of it, or some.
    pub fn set_providers(&mut self, root: &ChunkId, providers: &[(NodeId, bool)], now: Instant, rng: &mut Rng) {
        let Some(download) = self.downloads.get_mut(root) else { return };
        let gone = download.providers.keys().filter(|node| !providers.iter().any(|(other, _)| other == *node));
        for node in gone.copied().collect::<Vec<NodeId>>() {
            download.has_now(&node, Bitfield::default());
            download.providers.retain(|other, provider| provider.banned || *other != node);
        }
        for (node, complete) in providers {
            download.providers.entry(*node).or_default();
            if *complete {
                download.completes(node);
            }
        }
        download.count_receivers(root, &self.me);
        self.pump(*root, now, rng);
    }

    /// What this node can give of an image that is still coming.
    pub fn bitfield(&self, root: &ChunkId) -> Option<&Bitfield> {
        self.downloads.get(root).filter(|download| download.contents).map(|download| &download.have)
    }

    /// A provider says what it has.
    pub fn bitfield_from(
        &mut self,
        from: NodeId,
        root: &ChunkId,
        bits: &[u8],
        complete: bool,
        now: Instant,
        rng: &mut Rng,
    ) {
        let Some(download) = self.downloads.get_mut(root) else { return };
        if !download.providers.contains_key(&from) {
            return;
        }
        if complete {
            download.completes(&from);
            download.count_receivers(root, &self.me);
        } else if download.contents {
            download.told(&from, Bitfield::from_bytes(bits, download.pieces.len()), now);
        }
        self.pump(*root, now, rng);
    }

    /// The store's answer to [`Action::Survey`].
    pub fn surveyed(&mut self, root: ChunkId, result: Result<Survey, SurveyFault>, now: Instant, rng: &mut Rng) {
        // One that was displaced and began again has two on their way; it takes the first.
        let Some(download) = self.downloads.get_mut(&root).filter(|download| download.surveying) else { return };
        match result {
            Ok(survey) if survey.complete => {
                self.receipts.retain(|(other, _)| *other != root);
                if self.receipts.len() >= MAX_RECEIPTS {
                    self.receipts.pop_front();
                }
                if !download.contents {
                    // All that it lists was here.
                    download.receipt.had = survey.pieces.iter().map(|piece| u64::from(piece.len)).sum();
                }
                let took = now.since(download.begun);
                self.receipts.push_back((root, Receipt { took, ..std::mem::take(&mut download.receipt) }));
                self.finish(root, now);
                self.actions.push(Action::Complete(root));
            }
            Ok(survey) if survey.pieces.len() > MAX_PIECES => {
                let reason = format!("the image has {} pieces, {MAX_PIECES} is the most", survey.pieces.len());
                self.fail(root, true, reason, now);
            }
            Ok(survey) => {
                let listed = survey.contents && !download.contents;
                download.take(survey);
                if listed {
                    download.receipt.had = download.progress().0;
                    self.actions.push(Action::Listed(root));
                }
                download.receivers.clear();
                download.count_receivers(&root, &self.me);
                download.next_look = now;
                // The store's time is not the providers'.
                download.last_progress = now;
                self.pump(root, now, rng);
            }
            Err(SurveyFault { damaged, reason }) => self.fail(root, damaged, reason, now),
        }
    }

    /// The end of a batch.
    pub fn fetched(&mut self, root: ChunkId, batch: u64, result: Fetched, now: Instant, rng: &mut Rng) {
        let Some(download) = self.downloads.get_mut(&root) else { return };
        let Some(Batch { provider: node, pieces, called_off, .. }) = download.batches.remove(&batch) else { return };
        for chunk in &result.got {
            if let Some(at) = download.index.get(chunk) {
                download.have.set(*at as usize);
            }
        }
        if !result.got.is_empty() {
            download.last_progress = now;
            *download.receipt.from.entry(node).or_default() += result.bytes;
            download.usual = smoothed(download.usual, result.elapsed);
            self.actions.push(Action::Measured(result.bytes, result.elapsed));
        }
        for at in pieces.iter().copied() {
            let mut elsewhere = download.batches.values_mut().filter(|batch| batch.pieces.contains(&at)).peekable();
            if elsewhere.peek().is_none() {
                download.in_flight.clear(at as usize);
            } else if !download.have.has(at as usize) {
                // Its double came to nothing: it may have another.
                elsewhere.for_each(|batch| batch.doubled = false);
            }
        }
        let nothing = result.got.is_empty();
        if let Some(provider) = download.providers.get_mut(&node) {
            provider.took.1 += pieces.len();
        }
        if let Some(bits) = result.has.filter(|_| download.contents) {
            download.told_behind(&node, &bits, now);
        }
        let missing: Vec<u32> = pieces.into_iter().filter(|at| !download.have.has(*at as usize)).collect();
        download.gave_not(&node, &missing);
        if let Some(provider) = download.providers.get_mut(&node) {
            if !nothing {
                provider.idle = 0;
                provider.usual = smoothed(provider.believed(now), result.elapsed);
                provider.gave = now;
            } else if provider.rest_until <= now {
                // What ends together is one outage.
                provider.idle += 1;
            }
            if nothing && called_off {
                // It was overtaken before anything came: the next one is not to wait for it as well.
                provider.rest(now);
            }
        }
        if let Some(fault) = result.fault {
            download.last_fault = Some(describe(&fault, &node));
            match (fault, download.providers.get_mut(&node)) {
                (FetchFault::Storage(reason), _) => return self.fail(root, false, reason, now),
                (FetchFault::WrongChunk(chunk), _) => {
                    download.last_lie = download.last_fault.clone();
                    download.has_now(&node, Bitfield::default());
                    // Also when it was taken off the list meanwhile: it may be put on it again.
                    download.providers.entry(node).or_default().banned = true;
                    download.count_receivers(&root, &self.me);
                    self.actions.push(Action::Lied(node, chunk));
                }
                (FetchFault::Missing(chunk), Some(provider)) => {
                    if provider.complete {
                        let reason = format!("it has no chunk {} of an image that it says it has", chunk.short());
                        self.actions.push(Action::Faulty(node, reason));
                    }
                    provider.rest_until = now + LOOK * (1 << provider.idle.min(MAX_DOUBLED));
                    let at = download.index.get(&chunk).copied();
                    download.has_not(&node, at);
                }
                (FetchFault::Unreachable(reason), Some(provider)) => {
                    provider.rest(now);
                    self.actions.push(Action::Faulty(node, reason));
                }
                (_, None) => {}
            }
        }
        for (batch, superfluous) in &mut download.batches {
            if !superfluous.called_off && superfluous.pieces.iter().all(|at| download.have.has(*at as usize)) {
                superfluous.called_off = true;
                let waited = now.since(superfluous.asked);
                if waited >= SLOW {
                    let reason = format!("too slow: another sent it while it was waited for, {} s", waited.as_secs());
                    self.actions.push(Action::Faulty(superfluous.provider, reason));
                }
                self.actions.push(Action::Cancel { root, batch: *batch });
            }
        }
        if download.have.is_full(download.pieces.len()) && !download.surveying {
            download.surveying = true;
            self.actions.push(Action::Survey(root));
            return;
        }
        self.pump(root, now, rng);
    }

    /// The time at which [`Exchange::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.downloads.values().map(|download| download.next_look).min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut Rng) {
        let due: Vec<ChunkId> =
            self.downloads.iter().filter(|(_, download)| download.next_look <= now).map(|(root, _)| *root).collect();
        for root in due {
            let Some(download) = self.downloads.get_mut(&root) else { continue };
            download.next_look = now + LOOK;
            if let Some(reason) = download.hopeless(now) {
                self.fail(root, false, reason, now);
                continue;
            }
            if download.contents {
                // Whoever has asked this one a moment ago has said what it has with that; a batch may have told it too. Who answers is
                // asked at each other look.
                let is_due = |provider: &Provider| provider.heard.is_none_or(|heard| now.since(heard) >= LOOK);
                let asked = download.providers.iter().filter(|(_, provider)| !provider.complete && is_due(provider));
                let bits = Some(download.have.to_bytes());
                let ask = |(node, _): (&NodeId, &Provider)| {
                    Action::Send(*node, Message::BitfieldRequest { root, bits: bits.clone() })
                };
                self.actions.extend(asked.map(ask));
            }
            self.pump(root, now, rng);
        }
    }

    /// What the caller must carry out now.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// What must hold after every step.
    pub fn invariants(&self) {
        assert!(self.downloads.len() <= MAX_DOWNLOADS);
        for download in self.downloads.values() {
            assert!(download.batches.len() <= MAX_BATCHES + PER_PROVIDER);
            assert_eq!(download.index.len(), download.pieces.len(), "pieces of one list are distinct");
            let some = download.partly.len() / 64 + 1;
            for (at, partly) in download.partly.iter().enumerate().step_by(some) {
                let has = download.providers.values().filter(|provider| provider.has.has(at)).count();
                assert_eq!(usize::from(*partly), has, "it counts who has a piece");
            }
            for batch in download.batches.values() {
                assert!(batch.pieces.iter().all(|at| download.in_flight.has(*at as usize)));
            }
        }
    }

    fn pump(&mut self, root: ChunkId, now: Instant, rng: &mut Rng) {
        let Some(download) = self.downloads.get_mut(&root) else { return };
        if download.surveying {
            return;
        }
        let mut providers: Vec<NodeId> = download.providers.keys().copied().collect();
        rng.shuffle(&mut providers);
        let have = &download.have;
        download.demanded.retain(|at| !have.has(*at as usize));
        // One batch for each provider in turn, so that none gets all the work.
        for _ in 0..PER_PROVIDER_DEMANDED {
            for node in &providers {
                let provider = &download.providers[node];
                let busy = download.batches.values().filter(|batch| batch.provider == *node).count();
                if !provider.is_able(now) || busy >= PER_PROVIDER_DEMANDED {
                    continue;
                }
                let in_flight: u64 = download.batches.values().map(|batch| batch.bytes).sum();
                let room = busy < download.most_batches(provider)
                    && download.batches.len() < MAX_BATCHES
                    && in_flight < MAX_IN_FLIGHT;
                // Beyond the bound for what somebody waits for, and for what hangs elsewhere and fills it.
                let spare = download.batches.len() < MAX_BATCHES + PER_PROVIDER;
                let mut pieces = Vec::new();
                if spare {
                    pieces = download.pick_demanded(&download.providers[node]);
                }
                if pieces.is_empty() && spare {
                    pieces = download.endgame(node, now, true);
                }
                if pieces.is_empty() && room && now >= download.quiet_until {
                    pieces = download.pick(&download.providers[node], now, rng);
                }
                if pieces.is_empty() && spare && busy == 0 {
                    pieces = download.endgame(node, now, false);
                }
                if pieces.is_empty() {
                    continue;
                }
                for at in &pieces {
                    download.in_flight.set(*at as usize);
                }
                self.next_batch += 1;
                let wanted: Vec<Piece> = pieces.iter().map(|at| download.pieces[*at as usize]).collect();
                let bytes = wanted.iter().map(|piece| u64::from(piece.len)).sum();
                let at = if download.contents { pieces.clone() } else { Vec::new() };
                let batch = Batch { provider: *node, pieces, bytes, asked: now, doubled: false, called_off: false };
                download.batches.insert(self.next_batch, batch);
                self.actions.push(Action::Fetch { root, batch: self.next_batch, provider: *node, pieces: wanted, at });
            }
        }
    }

    fn fail(&mut self, root: ChunkId, damaged: bool, reason: String, now: Instant) {
        self.finish(root, now);
        if self.failures.len() >= MAX_FAILURES {
            self.failures.pop_front();
        }
        self.failures.push_back((root, reason.clone(), now));
        self.actions.push(Action::Failed { root, damaged, reason });
    }

    /// What of it is in flight is wanted no more.
    fn remove(&mut self, root: &ChunkId) {
        let batches = self.downloads.remove(root).map(|download| download.batches).unwrap_or_default();
        let wanted = batches.into_iter().filter(|(_, batch)| !batch.called_off);
        self.actions.extend(wanted.map(|(batch, _)| Action::Cancel { root: *root, batch }));
    }

    fn finish(&mut self, root: ChunkId, now: Instant) {
        self.remove(&root);
        if !self.waiting.is_empty() {
            let (next, need) = self.waiting.remove(0);
            self.want(next, need, now);
        }
    }
}

impl Provider {
    /// Whether it may be asked.
    fn is_able(&self, now: Instant) -> bool {
        !self.banned && self.rest_until <= now
    }

    /// Of one that has all: takes what it has given in all, leaves of it what it gave since this node heard of it first, and finds whether
    /// that goes to others; `own` are the words of what this node has or asks for, of a list of `count` pieces.
    fn has_given(&mut self, has: &mut Bitfield, own: impl Fn(usize) -> u64, count: usize) {
        let is_first = self.before.is_none();
        // What it does not say twice it has taken back: one that says it not may be older.
        let last = std::mem::replace(&mut self.last, has.clone());
        has.add(&last);
        let before = self.before.get_or_insert_with(|| has.clone());
        // And may give it again.
        before.retain(has);
        // Where nothing is left that it could give for the first time, nothing tells.
        let tells = pieces_in(0..count, |at| !(has.word(at) | own(at))).next().is_some();
        has.remove(before);
        self.took.0 += pieces_in(0..count, |at| has.word(at) & !self.has.word(at) & !own(at)).count();
        self.gives_others = (tells && !is_first).then_some(self.took.0 >= 2 * self.took.1);
        self.took = (self.took.0 / 2, self.took.1 / 2);
    }

    /// What it has given of another list, or before it turned out not to have all, tells nothing.
    fn forget_given(&mut self) {
        (self.before, self.last, self.took, self.gives_others) = (None, Bitfield::default(), (0, 0), None);
    }

    /// How long its batches take, as far as that is still believed.
    fn believed(&self, now: Instant) -> Duration {
        let halves = now.since(self.gave).as_millis() / BELIEVED.as_millis();
        self.usual / (1 << halves.min(31) as u32)
    }

    /// Nothing came of it: it is left alone, longer each time.
    fn rest(&mut self, now: Instant) {
        self.rest_until = now + REST * (1 << self.idle.saturating_sub(1).min(MAX_DOUBLED));
    }
}

impl Download {
    fn new(need: Need, now: Instant) -> Self {
        Download {
            need,
            surveying: true,
            contents: false,
            pieces: Vec::new(),
            index: BTreeMap::new(),
            have: Bitfield::default(),
            in_flight: Bitfield::default(),
            partly: Vec::new(),
            receivers: Vec::new(),
            share: Bitfield::default(),
            demanded: VecDeque::new(),
            quiet_until: now,
            quiet: Duration::ZERO,
            usual: Duration::ZERO,
            providers: BTreeMap::new(),
            batches: BTreeMap::new(),
            last_progress: now,
            next_look: now + LOOK,
            begun: now,
            receipt: Receipt::default(),
            last_fault: None,
            last_lie: None,
        }
    }

    /// Batches in flight with a provider: more with the only one there is, as long as they come and nobody waits for any of them.
    fn most_batches(&self, provider: &Provider) -> usize {
        let is_only = self.providers.values().filter(|provider| !provider.banned).nth(1).is_none();
        let gives = provider.gave > Instant::ZERO && provider.idle == 0;
        if is_only && gives && self.quiet.is_zero() {
            WITH_THE_ONLY_ONE
        } else if provider.complete && gives && provider.usual < LATE && self.is_shared() {
            WITH_THE_FIRST
        } else {
            PER_PROVIDER
        }
    }

    /// Why nothing more is to be expected.
    fn hopeless(&self, now: Instant) -> Option<String> {
        if self.surveying || !self.batches.is_empty() || now < self.quiet_until {
            return None;
        }
        let waited = now.since(self.last_progress);
        if let Some(lie) = &self.last_lie {
            let mut left = self.providers.values().filter(|provider| !provider.banned).peekable();
            let nobody = left.peek().is_none();
            if nobody || (waited >= STALEMATE && !left.any(|provider| provider.complete)) {
                return Some(format!("every node that has it sent wrong bytes: {lie}"));
            }
        }
        let fault = self.last_fault.as_deref().unwrap_or("no live node has it");
        (waited >= GIVE_UP).then(|| format!("nothing of the image came for {} s: {fault}", GIVE_UP.as_secs()))
    }

    /// Bytes here and bytes in all, of the stage it is in.
    pub fn progress(&self) -> (u64, u64) {
        let total = self.pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let here = self.pieces.iter().enumerate().filter(|(at, _)| self.have.has(*at));
        (here.map(|(_, piece)| u64::from(piece.len)).sum(), total)
    }

    /// What has come so far.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }

    fn take(&mut self, survey: Survey) {
        self.surveying = false;
        self.contents = survey.contents;
        self.pieces = Vec::with_capacity(survey.pieces.len());
        self.index.clear();
        self.have = Bitfield::default();
        self.in_flight = Bitfield::default();
        self.batches.clear();
        self.demanded.clear();
        // What a provider has was told of the list before.
        for provider in self.providers.values_mut() {
            (provider.has, provider.heard) = (Bitfield::default(), None);
            provider.forget_given();
        }
        for (piece, present) in survey.pieces.into_iter().zip(survey.present) {
            let at = self.pieces.len() as u32;
            // A list that names one chunk twice would make two nodes count differently.
            if let Entry::Vacant(new) = self.index.entry(piece.chunk) {
                new.insert(at);
                self.pieces.push(piece);
                if present {
                    self.have.set(at as usize);
                }
            }
        }
        self.partly = vec![0; self.pieces.len()];
    }

    /// A provider has all of it.
    fn completes(&mut self, node: &NodeId) {
        let Some(provider) = self.providers.get_mut(node).filter(|provider| !provider.complete) else { return };
        provider.complete = true;
        // What it has is no news any more, and what it gives is another matter.
        provider.forget_given();
        self.has_now(node, Bitfield::default());
    }

    /// A provider has said what it has of the contents.
    fn told(&mut self, node: &NodeId, has: Bitfield, now: Instant) {
        let Some(provider) = self.providers.get_mut(node) else { return };
        provider.heard = Some(now);
        if !provider.banned {
            self.has_now(node, has);
        }
    }

    /// The same behind a batch. It was so when the batch ended: what was heard while that was written, or on another line, may be later.
    fn told_behind(&mut self, node: &NodeId, bits: &[u8], now: Instant) {
        let Some(provider) = self.providers.get_mut(node) else { return };
        let mut has = Bitfield::from_bytes(bits, self.pieces.len());
        if provider.complete {
            let own = |at| self.have.word(at) | self.in_flight.word(at);
            provider.has_given(&mut has, own, self.pieces.len());
        } else {
            has.add(&provider.has);
        }
        self.told(node, has, now);
    }

    /// A provider that has these pieces has not given them: where it says that it has, that tells nothing.
    fn gave_not(&mut self, node: &NodeId, pieces: &[u32]) {
        let Some(provider) = self.providers.get_mut(node) else { return };
        let Some(before) = &mut provider.before else { return };
        for at in pieces.iter().map(|at| *at as usize) {
            before.set(at);
            if provider.has.has(at) {
                provider.has.clear(at);
                self.partly[at] -= 1;
            }
        }
    }

    /// A provider has not this piece, as it turns out, nor all others then.
    fn has_not(&mut self, node: &NodeId, piece: Option<u32>) {
        let Some(provider) = self.providers.get_mut(node) else { return };
        let mut has = provider.has.clone();
        if std::mem::take(&mut provider.complete) {
            // That is what it gave.
            has = Bitfield::default();
            provider.forget_given();
        }
        piece.inspect(|at| has.clear(*at as usize));
        self.has_now(node, has);
    }

    /// A provider has these pieces, as far as is known.
    fn has_now(&mut self, node: &NodeId, has: Bitfield) {
        let Some(provider) = self.providers.get_mut(node) else { return };
        for at in pieces_in(0..self.partly.len(), |at| has.word(at) ^ provider.has.word(at)) {
            match has.has(at) {
                true => self.partly[at] += 1,
                false => self.partly[at] -= 1,
            }
        }
        provider.has = has;
    }

    /// Finds this node's share of the image among those that receive it.
    fn count_receivers(&mut self, root: &ChunkId, me: &NodeId) {
        let others = self.providers.iter().filter(|(_, provider)| !provider.complete && !provider.banned);
        let receivers: Vec<NodeId> = others.map(|(node, _)| *node).chain([*me]).collect();
        if receivers == self.receivers {
            return;
        }
        self.receivers = receivers;
        self.share = picker::share(&self.pieces, root, me, &self.receivers);
    }

    /// Whether all that is missing is on its way.
    fn is_ending(&self) -> bool {
        let neither = |at| !(self.have.word(at) | self.in_flight.word(at));
        pieces_in(0..self.pieces.len(), neither).next().is_none()
    }

    /// What is still in flight elsewhere for too long, to be asked of `node` as well; only what is `demanded`, or anything.
    fn endgame(&mut self, node: &NodeId, now: Instant, demanded: bool) -> Vec<u32> {
        let provider = &self.providers[node];
        let least = if demanded || self.is_ending() { ENDGAME } else { LATE };
        let patience = (self.usual * 3).clamp(least, MAX_PATIENCE);
        let slow = |batch: &Batch| {
            batch.provider != *node && !batch.doubled && !batch.called_off && now.since(batch.asked) >= patience
        };
        let wanted = |at: &u32| {
            let missing = !self.have.has(*at as usize) && self.offers(provider, *at as usize);
            missing && (!demanded || self.demanded.contains(at))
        };
        let mut slow = self.batches.iter().filter(|(_, batch)| slow(batch));
        let found = slow.find_map(|(id, batch)| {
            let pieces: Vec<u32> = batch.pieces.iter().copied().filter(wanted).collect();
            (!pieces.is_empty()).then_some((*id, pieces))
        });
        let Some((id, pieces)) = found else { return Vec::new() };
        if let Some(batch) = self.batches.get_mut(&id) {
            batch.doubled = true;
        }
        pieces
    }
}

fn smoothed(before: Duration, now: Duration) -> Duration {
    if before.is_zero() { now } else { (before * 7 + now) / 8 }
}

fn describe(fault: &FetchFault, provider: &NodeId) -> String {
    match fault {
        // It may say whom it could not reach.
        FetchFault::Unreachable(reason) if reason.contains(&provider.short()) => reason.clone(),
        FetchFault::Unreachable(reason) => format!("node {}: {reason}", provider.short()),
        FetchFault::WrongChunk(chunk) => {
            format!("node {} sent wrong bytes for chunk {}", provider.short(), chunk.short())
        }
        FetchFault::Missing(chunk) => format!("node {} has no chunk {}", provider.short(), chunk.short()),
        FetchFault::Storage(reason) => reason.clone(),
    }
}

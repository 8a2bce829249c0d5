//! How chunks are asked for and given, on whatever stream.
//!
//! ```text
//! asked:     of which image, the ids of at most [`BATCH_PIECES`] chunks, where they are in the list of its contents
//! answered:  for each: length (4 bytes, all ones for "not here"), bytes
//!            and where a stream goes on after it: [`END`] in place of a length; then what else the provider has of the image,
//!            or where it has all, what it has given ([`Partly`]): length (4 bytes), a bitfield
//! ```
//!
//! A provider reads a slab of [`SLAB`] bytes at a time; whoever asked may leave between two slabs. Under an upload limit
//! they go out in pieces of [`PIECE`] bytes, to one member after the other, so that nobody waits long for the first of them.
//! What comes is bounded by what was asked for: a chunk of another length than its list says ends the batch, and so does one of
//! more than [`MAX_CHUNK`] bytes, nothing for [`STALL`], and [`MAX_BATCH`] in all, by which a provider that sends a byte now and
//! then is known.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::BufMut;
use moyai_protocol::contract::{FetchFault, Piece};
use moyai_protocol::exchange::{BATCH_PIECES, Bitfield};
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_runtime::store::{LastRead, Store, StoreError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a daemon of the tests sends in place of a chunk, which it may have; others send what they have.
pub type ChunkTamper = fn(Option<Vec<u8>>) -> Vec<u8>;

/// Also of an image's root, which is one chunk however many layers it has.
const MAX_CHUNK: u32 = 4 << 20;
const NOT_HERE: u32 = u32::MAX;
/// Of a length.
const LEN: usize = 4;
/// Nothing more of this batch comes.
pub(super) const END: u32 = u32::MAX - 1;
/// Read from the disk, and written to the network, at one time; more only where one chunk is more.
const SLAB: usize = 256 << 10;
/// Timers are no finer: who would wait no longer goes at once, and what a late one has lost may be made up for, up to this.
const SHORT: Duration = Duration::from_millis(2);
const CREDIT: Duration = Duration::from_millis(5);
/// Sent at one time under an upload limit.
const PIECE: usize = 16 << 10;
/// A batch that delivers nothing for this long is given to another provider.
pub(super) const STALL: Duration = Duration::from_secs(10);
/// For a whole batch: the least upload limit takes half of that for one.
const MAX_BATCH: Duration = Duration::from_secs(120);
/// What is sent and not taken for this long is given up, and its request with it.
const WRITE_STALL: Duration = Duration::from_secs(30);

/// What is told with each batch: what is here of an image that is still coming, so that whoever fetches from here need not ask; and of
/// one that is all here what was given of it, so that the next takes what nobody has yet. That is believed of whoever asks, and an
/// untruth costs others time.
#[derive(Debug, Default)]
pub struct Partly {
    coming: Mutex<HashMap<ChunkId, Arc<[u8]>>>,
    /// At most [`Partly::MAX_GIVEN`], as those who asked have said where the pieces are, without those that are too long; and when one
    /// asked last.
    given: Mutex<HashMap<ChunkId, (Option<Bitfield>, Instant)>>,
}

impl Partly {
    /// The longest bitfield that is told so: of about 64 GiB.
    pub const MAX: usize = 128 << 10;
    /// Up to so many bytes it is told behind each batch, and a longer one when so many times its bytes have gone before it.
    const SHORT: usize = 2048;
    const BESIDE: usize = 64;
    /// Images of which it is remembered what was given.
    const MAX_GIVEN: usize = 64;
    /// When nobody has asked for so long, those it was given to may have left.
    const REMEMBERED: Duration = Duration::from_secs(60);

    /// Of these, and of no others. Bounded by the downloads at one time.
    pub fn set<'a>(&self, images: impl Iterator<Item = (ChunkId, &'a Bitfield)>) {
        let told = |bits: &Bitfield| if bits.max_bytes() <= Self::MAX { bits.to_bytes() } else { Vec::new() };
        *locked(&self.coming) = images.map(|(root, bits)| (root, told(bits).into())).collect();
    }

    /// Forgets all but these.
    pub fn retain(&self, is_coming: impl Fn(&ChunkId) -> bool) {
        locked(&self.coming).retain(|root, _| is_coming(root));
    }

    /// Somebody is given these pieces of an image; which of them nobody was given before.
    fn gives(&self, root: &ChunkId, mut at: Vec<u32>) -> Vec<u32> {
        let (mut given, now) = (locked(&self.given), Instant::now());
        given.retain(|_, (_, asked)| now.duration_since(*asked) < Self::REMEMBERED);
        if given.len() >= Self::MAX_GIVEN && !given.contains_key(root) {
            return Vec::new();
        }
        let (known, asked) = given.entry(*root).or_insert((Some(Bitfield::default()), now));
        *asked = now;
        if at.iter().any(|at| *at as usize >= 8 * Self::MAX) {
            *known = None;
        }
        let Some(bits) = known else { return Vec::new() };
        at.retain(|at| !bits.has(*at as usize));
        at.iter().for_each(|at| bits.set(*at as usize));
        at
    }

    /// They were not.
    fn gives_not(&self, root: &ChunkId, at: &[u32]) {
        if let Some((Some(bits), _)) = locked(&self.given).get_mut(root) {
            at.iter().for_each(|at| bits.clear(*at as usize));
        }
    }

    /// Tells what is here of an image, or was given of it, in its length and as many bytes; at once with a word before it. `gone` are the
    /// bytes of chunks that went this way since a long one was told.
    async fn tell<W: AsyncWrite + Unpin>(
        &self,
        word: u32,
        root: &ChunkId,
        gone: &mut usize,
        send: &mut W,
    ) -> io::Result<()> {
        let coming = locked(&self.coming).get(root).cloned();
        let is_due = |len: usize| len <= Self::SHORT || len * Self::BESIDE <= *gone;
        let given = || {
            let given = locked(&self.given);
            given.get(root)?.0.as_ref().filter(|bits| is_due(bits.max_bytes())).map(|bits| bits.to_bytes().into())
        };
        let bits: Arc<[u8]> = coming.or_else(given).filter(|bits| is_due(bits.len())).unwrap_or_default();
        if bits.len() > Self::SHORT {
            *gone = 0;
        }
        let words = [word, bits.len() as u32].map(u32::to_be_bytes).concat();
        send.write_all(&[&words[..], &bits].concat()).await
    }

    /// What a provider has told; nothing where it has nothing to tell.
    async fn read<R: AsyncRead + Unpin>(receive: &mut R) -> io::Result<Option<Vec<u8>>> {
        let len = receive.read_u32().await? as usize;
        if len > Self::MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a bitfield of {len} bytes")));
        }
        let mut bits = vec![0; len];
        receive.read_exact(&mut bits).await?;
        Ok(Some(bits).filter(|bits| !bits.is_empty()))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Pieces that somebody is being given for the first time; were they not when this is dropped, they are still to be given.
pub(super) struct Noted<'a> {
    partly: &'a Partly,
    root: ChunkId,
    at: Vec<u32>,
}

impl Noted<'_> {
    /// They were given, or are wanted no more.
    pub(super) fn stays(mut self) {
        self.at.clear();
    }
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        self.partly.gives_not(&self.root, &self.at);
    }
}

/// Where chunks are given from.
#[derive(Clone)]
pub struct Shelf {
    /// They are here.
    pub store: Arc<Store>,
    /// What becomes of them on their way out.
    pub tamper: Option<ChunkTamper>,
    /// How fast they may go out, to all together.
    pub limit: Arc<Limit>,
    /// What is told with them.
    pub partly: Arc<Partly>,
}

/// Bytes a second, to members in turn: however many streams one has, it waits for its next piece like any other.
#[derive(Debug)]
pub struct Limit {
    rate: Option<u64>,
    /// Locked by whoever's piece is next, in the order in which they came.
    free: tokio::sync::Mutex<Instant>,
    /// Locked by the stream of a member whose piece is next.
    turns: Mutex<HashMap<NodeId, Weak<tokio::sync::Mutex<()>>>>,
}

impl Limit {
    /// So many bytes a second; nothing for as many as go.
    pub fn new(rate: Option<u64>) -> Self {
        Limit {
            rate: rate.filter(|rate| *rate > 0),
            free: tokio::sync::Mutex::new(Instant::now()),
            turns: Mutex::default(),
        }
    }

    /// Waits until so many bytes may go to this member.
    async fn take(&self, member: NodeId, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let turn = {
            let mut turns = locked(&self.turns);
            turns.retain(|other, turn| *other == member || turn.strong_count() > 0);
            let turn = turns.entry(member).or_default();
            turn.upgrade().unwrap_or_else(|| {
                let new = Arc::default();
                *turn = Arc::downgrade(&new);
                new
            })
        };
        let _turn = turn.lock().await;
        // Until it may go: else whoever a late timer wakes first would take what was lost, and be the first again.
        let mut free = self.free.lock().await;
        let now = Instant::now();
        let at = (*free).max(now.checked_sub(CREDIT).unwrap_or(now));
        *free = at + Duration::from_secs_f64(bytes as f64 / rate as f64);
        let wait = at.saturating_duration_since(now);
        if wait >= SHORT {
            tokio::time::sleep(wait).await;
        }
    }
}

impl Shelf {
    /// Remembers that somebody is given chunks of an image, if all of it is here.
    pub(super) async fn note(&self, root: ChunkId, ids: &[ChunkId], mut at: Vec<u32>) -> Noted<'_> {
        at.truncate(ids.len().min(BATCH_PIECES));
        let new = if at.is_empty() || !self.has_all(root).await { Vec::new() } else { self.partly.gives(&root, at) };
        Noted { partly: &self.partly, root, at: new }
    }

    /// Whether all of an image is here; of what was given before, the store is not asked again.
    async fn has_all(&self, root: ChunkId) -> bool {
        if locked(&self.partly.coming).contains_key(&root) {
            return false;
        }
        if locked(&self.partly.given).contains_key(&root) {
            return true;
        }
        let store = Arc::clone(&self.store);
        matches!(tokio::task::spawn_blocking(move || store.is_complete(&root.0)).await, Ok(Ok(true)))
    }

    /// Gives this member these chunks, until all are given or `enough` says so before a slab; how many bytes that were.
    pub(super) async fn give<W: AsyncWrite + Unpin>(
        &self,
        member: NodeId,
        ids: Vec<ChunkId>,
        send: &mut W,
        mut enough: impl FnMut() -> io::Result<bool>,
    ) -> io::Result<usize> {
        let mut gone = 0;
        let mut ids = ids.into_iter().take(BATCH_PIECES).peekable();
        while ids.peek().is_some() && !enough()? {
            let (store, tamper) = (Arc::clone(&self.store), self.tamper);
            let read = tokio::task::spawn_blocking(move || {
                let slab = slab(&store, tamper, &mut ids)?;
                Ok::<_, StoreError>((slab, ids))
            });
            let slab;
            (slab, ids) = read.await?.map_err(io::Error::other)?;
            gone += slab.len();
            for piece in slab.chunks(if self.limit.rate.is_some() { PIECE } else { slab.len() }) {
                self.limit.take(member, piece.len()).await;
                tokio::time::timeout(WRITE_STALL, send.write_all(piece)).await??;
            }
        }
        Ok(gone)
    }

    /// Ends a batch on a stream that goes on, on which so many bytes have gone since something was told.
    pub(super) async fn end<W: AsyncWrite + Unpin>(
        &self,
        root: &ChunkId,
        gone: &mut usize,
        send: &mut W,
    ) -> io::Result<()> {
        let ending = async {
            self.partly.tell(END, root, gone, send).await?;
            send.flush().await
        };
        tokio::time::timeout(WRITE_STALL, ending).await?
    }
}

/// The next chunks, as they are sent.
fn slab(
    store: &Store,
    tamper: Option<ChunkTamper>,
    ids: &mut impl Iterator<Item = ChunkId>,
) -> Result<Vec<u8>, StoreError> {
    let mut slab = Vec::with_capacity(SLAB + SLAB / 4);
    let mut last = LastRead::default();
    while slab.len() < SLAB {
        let Some(id) = ids.next() else { break };
        if let Some(tamper) = tamper {
            slab.extend(tamper(store.chunk(&id.0)?));
            continue;
        }
        // Its length comes first, and is known last.
        let at = slab.len();
        slab.extend_from_slice(&NOT_HERE.to_be_bytes());
        if store.append_chunk(&id.0, &mut slab, &mut last)? {
            let len = (slab.len() - at - LEN) as u32;
            slab[at..at + LEN].copy_from_slice(&len.to_be_bytes());
        }
    }
    Ok(slab)
}

/// What came of a batch, so far.
#[derive(Default)]
pub(super) struct Came {
    pub(super) chunks: Vec<(ChunkId, Vec<u8>)>,
    pub(super) missing: Option<ChunkId>,
    /// The provider has said that nothing more comes.
    pub(super) ended: bool,
    /// What it has of the image, a bitfield.
    pub(super) has: Option<Vec<u8>>,
}

impl Came {
    /// Reads the answer to a request for `pieces`.
    pub(super) async fn read<R: AsyncRead + Unpin>(
        &mut self,
        pieces: &[Piece],
        receive: &mut R,
    ) -> Result<(), FetchFault> {
        let until = tokio::time::Instant::now() + MAX_BATCH;
        for piece in pieces {
            let word = tokio::time::timeout_at(until, read_chunk(receive)).await;
            match word.map_err(|_| broken("it is too slow"))?.map_err(broken)? {
                Word::End => {
                    self.ended = true;
                    return Ok(());
                }
                Word::NotHere => self.missing = self.missing.or(Some(piece.chunk)),
                // A root's length is known only when it comes.
                Word::Chunk(bytes) if piece.len != 0 && bytes.len() != piece.len as usize => {
                    return Err(FetchFault::WrongChunk(piece.chunk));
                }
                Word::Chunk(bytes) => self.chunks.push((piece.chunk, bytes)),
            }
        }
        Ok(())
    }

    /// Reads what comes after the end of a batch; whether the stream is of use after it, which is no matter of the batch any more.
    pub(super) async fn read_has<R: AsyncRead + Unpin>(&mut self, receive: &mut R) -> Result<bool, FetchFault> {
        match tokio::time::timeout(STALL, Partly::read(receive)).await {
            Err(_) => Err(broken("it stalled")),
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => Err(broken(error)),
            Ok(Err(_)) => Ok(false),
            Ok(Ok(has)) => {
                self.has = has;
                Ok(true)
            }
        }
    }

    /// Checks and keeps what came: which, and how many bytes.
    pub(super) async fn keep(self, store: &Arc<Store>) -> Result<(Vec<ChunkId>, u64), FetchFault> {
        let ids = self.chunks.iter().map(|(id, _)| *id).collect();
        let bytes = self.chunks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let store = Arc::clone(store);
        let chunks: Vec<([u8; 32], Vec<u8>)> = self.chunks.into_iter().map(|(id, bytes)| (id.0, bytes)).collect();
        let kept = tokio::task::spawn_blocking(move || store.put_chunks(chunks)).await;
        match kept.map_err(|error| FetchFault::Storage(error.to_string()))? {
            Ok(()) => Ok((ids, bytes)),
            Err(StoreError::WrongChunk(chunk)) => Err(FetchFault::WrongChunk(ChunkId(chunk))),
            Err(error) => Err(FetchFault::Storage(error.to_string())),
        }
    }
}

/// The provider, or the way to it, is at fault.
pub(super) fn broken(error: impl std::fmt::Display) -> FetchFault {
    FetchFault::Unreachable(format!("{error:#}"))
}

enum Word {
    Chunk(Vec<u8>),
    NotHere,
    End,
}

async fn read_chunk<R: AsyncRead + Unpin>(receive: &mut R) -> io::Result<Word> {
    let mut len = [0; LEN];
    fill(receive, &mut &mut len[..]).await?;
    let len = match u32::from_be_bytes(len) {
        NOT_HERE => return Ok(Word::NotHere),
        END => return Ok(Word::End),
        len if len > MAX_CHUNK => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a chunk of {len} bytes")));
        }
        len => len,
    };
    let mut bytes = Vec::with_capacity(len as usize);
    fill(receive, &mut (&mut bytes).limit(len as usize)).await?;
    Ok(Word::Chunk(bytes))
}

/// Reads until there is no room left, each time for [`STALL`] at the most.
async fn fill<R: AsyncRead + Unpin>(receive: &mut R, room: &mut impl BufMut) -> io::Result<()> {
    while room.has_remaining_mut() {
        let read = tokio::time::timeout(STALL, receive.read_buf(room)).await;
        if read.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it stalled"))?? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn what_was_given_is_told_unless_it_was_not() {
        let (root, partly) = (ChunkId([1; 32]), Partly::default());
        let told = async || {
            let (mut provider, mut asker) = tokio::io::duplex(1 << 16);
            partly.tell(END, &root, &mut 0, &mut provider).await.unwrap();
            assert_eq!(asker.read_u32().await.unwrap(), END);
            Partly::read(&mut asker).await.unwrap()
        };
        let note = |at| Noted { partly: &partly, root, at: partly.gives(&root, at) };
        note(vec![1, 3]).stays();
        assert_eq!(told().await, Some(vec![0b1010]));
        // Another was given the one of them before.
        let breaks = note(vec![3, 4]);
        assert_eq!(told().await, Some(vec![0b1_1010]));
        drop(breaks);
        assert_eq!(told().await, Some(vec![0b1010]));
        // What this node receives itself is another matter, also where that is too long to be told.
        let long = Bitfield::from_bytes(&[1; Partly::MAX + 8], 8 * (Partly::MAX + 8));
        partly.set([(root, &long)].into_iter());
        assert_eq!(told().await, None);
        partly.retain(|_| false);
        assert_eq!(told().await, Some(vec![0b1010]));
        note(vec![8 * Partly::MAX as u32]).stays();
        assert_eq!(told().await, None, "a part of what was given would be an untruth");
        note(vec![5]).stays();
        assert_eq!(told().await, None);
        for at in 2..=Partly::MAX_GIVEN as u8 + 1 {
            partly.gives(&ChunkId([at; 32]), vec![0]);
        }
        assert_eq!(locked(&partly.given).len(), Partly::MAX_GIVEN);
    }

    #[tokio::test]
    async fn what_is_here_of_an_image_is_told_behind_a_batch() {
        let (coming, other) = (ChunkId([1; 32]), ChunkId([2; 32]));
        let (partly, mut came) = (Partly::default(), Came::default());
        let (mut provider, mut asker) = tokio::io::duplex(1 << 16);
        let bits = Bitfield::from_bytes(&[5, 0, 7], 24);
        let long = Bitfield::from_bytes(&[1; Partly::MAX + 8], 8 * (Partly::MAX + 8));
        partly.set([(coming, &bits), (other, &long)].into_iter());
        for (root, told) in [(coming, Some(vec![5, 0, 7])), (other, None), (coming, Some(vec![5, 0, 7]))] {
            partly.tell(END, &root, &mut 0, &mut provider).await.unwrap();
            assert_eq!(asker.read_u32().await.unwrap(), END);
            assert!(matches!(came.read_has(&mut asker).await, Ok(true)));
            assert_eq!(came.has, told);
        }
        partly.retain(|root| *root == other);
        partly.tell(END, &coming, &mut 0, &mut provider).await.unwrap();
        assert_eq!(asker.read_u32().await.unwrap(), END);
        assert!(matches!(came.read_has(&mut asker).await, Ok(true)) && came.has.is_none());
        // Of a large one now and then.
        let large = Bitfield::from_bytes(&[1; Partly::SHORT + 8], 8 * (Partly::SHORT + 8));
        partly.set([(coming, &large)].into_iter());
        let (mut gone, mut told) = (0, Vec::new());
        for batch in 1..=6 {
            gone += 50_000;
            partly.tell(END, &coming, &mut gone, &mut provider).await.unwrap();
            assert_eq!(asker.read_u32().await.unwrap(), END);
            assert!(matches!(came.read_has(&mut asker).await, Ok(true)));
            told.extend(came.has.take().map(|bits| (batch, bits.len())));
        }
        assert_eq!(told, [(3, Partly::SHORT + 8), (6, Partly::SHORT + 8)]);
        // More than anybody tells; and one that dies before it has told.
        provider.write_u32(Partly::MAX as u32 + 1).await.unwrap();
        assert!(came.read_has(&mut asker).await.is_err());
        provider.write_u32(1).await.unwrap();
        drop(provider);
        assert!(matches!(came.read_has(&mut asker).await, Ok(false)));
    }

    #[tokio::test]
    async fn a_member_with_many_streams_is_given_no_more_than_one_with_one() {
        // Each piece takes a millisecond.
        let limit = Arc::new(Limit::new(Some(1000 * PIECE as u64)));
        let given = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let mut streams = Vec::new();
        for at in [0, 0, 0, 0, 0, 0, 0, 0, 1] {
            let (limit, given) = (Arc::clone(&limit), Arc::clone(&given));
            streams.push(tokio::spawn(async move {
                loop {
                    limit.take(NodeId([at; 32]), PIECE).await;
                    given[usize::from(at)].fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        while given[1].load(Ordering::Relaxed) < 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let many = given[0].load(Ordering::Relaxed);
        streams.iter().for_each(tokio::task::JoinHandle::abort);
        assert!(many < 75, "{many} pieces, and the other 50");
    }
}

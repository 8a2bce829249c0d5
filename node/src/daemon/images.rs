//! Images beyond their chunks: having one here, giving up what nothing needs any more.
//!
//! What is here and nothing names, runs or fetches any more is removed, two rounds of [`ROUND`] after it was seen so: an image
//! that has just been loaded gets its name a moment later. A removal that a user asks for does not wait. What belongs to nothing at
//! all, as what a download left that was given up, goes with a sweep each [`SWEEP`] rounds, or when a user asks for it.
//!
//! Under a *budget*, what other nodes have often enough and nothing here runs is given up until the store fits it; until then no copy
//! is taken that only the mesh wants. What is loaded, pulled or run here is not refused for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use moyai_protocol::catalog::ImageHeld;
use moyai_protocol::contract::Command;
use moyai_protocol::exchange::Receipt;
use moyai_protocol::id::ChunkId;
use moyai_runtime::image::Original;
use moyai_runtime::store::{Damage, Doubted, Removed, Store, StoreError};
use tracing::{info, warn};

use super::driver::Handle;

/// Between two looks at what is needed.
const ROUND: Duration = Duration::from_secs(20);
/// Rounds between two sweeps: two hours. The first is in the third round after a start.
const SWEEP: u64 = 360;
const FIRST_SWEEP: u64 = 3;
/// An image has lists of lists of lists: so often at most is it read from the beginning.
const MAX_VERIFICATIONS: usize = 8;
/// Between two looks at how far a download is.
const LOOK: Duration = Duration::from_millis(50);

/// How far something is on its way here.
pub enum Fetching {
    /// Bytes of this stage that are here, and all of them; nodes that gave some.
    Progress(u64, u64, u32),
    /// All of it is here; how it came, if it came in this node's life.
    Done(Option<Receipt>),
    /// It cannot be had.
    Failed(String),
}

/// What a sweep has come to.
pub enum Swept {
    /// So many bytes are free again.
    Freed(u64),
    /// Something is imported, and nothing was removed.
    Busy,
    /// It is not known what is needed: the names were lost, and this daemon removes nothing.
    Unknown,
}

/// What becomes of damage.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// There is none any more: other images here had the same bytes.
    Done,
    /// It is fetched again from other nodes.
    Coming,
    /// No other node has it.
    Nobody,
    /// It is not here any more.
    Gone,
}

/// The images of this node.
#[derive(Clone)]
pub struct Images {
    handle: Handle,
    store: Arc<Store>,
}

impl Images {
    /// Those in this store.
    pub fn new(handle: Handle, store: Arc<Store>) -> Images {
        Images { handle, store }
    }

    /// How far something is whose fetching was commanded.
    pub async fn look(&self, root: ChunkId) -> Fetching {
        let looked = self.handle.ask(move |node, _| {
            if node.images().iter().any(|image| image.holds(&root)) {
                return Fetching::Done(node.exchange().receipt(&root).cloned());
            }
            match node.exchange().downloads().find(|(other, _)| **other == root) {
                Some((_, download)) => {
                    let (here, all) = download.progress();
                    Fetching::Progress(here, all, download.receipt().from.len() as u32)
                }
                None if node.exchange().is_waiting(&root) => Fetching::Progress(0, 0, 0),
                None => Fetching::Failed(node.exchange().failure(&root).unwrap_or("it was given up").to_owned()),
            }
        });
        looked.await.unwrap_or_else(|_| Fetching::Failed("the daemon ends".to_owned()))
    }

    /// Has it here, from other nodes if need be.
    pub async fn fetch(&self, root: ChunkId) -> Result<(), String> {
        match self.handle.command(Command::FetchImage { root }).await {
            Ok(Ok(_)) => {}
            Ok(Err(refused)) => return Err(refused.to_string()),
            Err(_) => return Err("the daemon ends".to_owned()),
        }
        loop {
            match self.look(root).await {
                Fetching::Done(_) => return Ok(()),
                Fetching::Failed(reason) => return Err(reason),
                Fetching::Progress(..) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// What an image was made of, which is here when this returns.
    pub async fn original(&self, image: &ImageHeld) -> Result<Original, String> {
        let held = image.original.as_ref().ok_or("it is not known what it was made of")?;
        self.fetch(held.root).await?;
        let (store, root) = (Arc::clone(&self.store), held.root.0);
        let read = tokio::task::spawn_blocking(move || store.original(&root)).await;
        let original = read.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        original.ok_or_else(|| "what it was made of has just been removed".to_owned())
    }

    /// Reads all of something that is here, and has what is damaged made whole; what that was, and what becomes of it.
    pub async fn verify(&self, root: ChunkId) -> Result<(Vec<String>, Repair), StoreError> {
        let mut told = Vec::new();
        let mut last = Damage::default();
        for _ in 0..MAX_VERIFICATIONS {
            let damage = self.by_store(move |store| store.verify(&root.0)).await?;
            if damage.is_none() {
                return Ok((told, Repair::Done));
            }
            let again = damage == last;
            if !again {
                told.extend(damage.told.iter().cloned());
            }
            if again || !damage.has_places() {
                return Ok((told, Repair::Nobody));
            }
            last = damage.clone();
            let others = self.handle.ask(move |node, _| node.is_elsewhere(&root)).await.unwrap_or(false);
            match self.by_store(move |store| store.doubt(&root.0, &damage, others)).await? {
                // What a damaged list names has not been looked at yet.
                Doubted::Mended => {}
                Doubted::Open if others => {
                    // When the daemon ends, the next one does it.
                    let _ended = self.handle.command(Command::ImageDamaged(root)).await;
                    return Ok((told, Repair::Coming));
                }
                Doubted::Open => return Ok((told, Repair::Nobody)),
                Doubted::Gone => return Ok((told, Repair::Gone)),
            }
        }
        // A disk that forgets faster than it is written to.
        Ok((told, Repair::Nobody))
    }

    /// Has the store do something that takes its time.
    async fn by_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.unwrap_or_else(|broken| Err(StoreError::Index(broken.to_string())))
    }

    /// Has what has a damaged list brought again.
    async fn mend_lists(&self) -> Result<(), StoreError> {
        for root in self.by_store(Store::unlisted).await?.into_iter().map(ChunkId) {
            let (told, repair) = match self.verify(root).await {
                Ok(verified) => verified,
                Err(error) => {
                    warn!(root = %root.short(), %error, "cannot read an image that is damaged here");
                    continue;
                }
            };
            let next = match repair {
                Repair::Done => "it is whole again",
                Repair::Coming => "it is fetched again",
                Repair::Nobody => "no other node has it: load it again, or remove it",
                Repair::Gone => continue,
            };
            warn!(root = %root.short(), parts = told.len(), "an image is damaged here: {next}");
        }
        Ok(())
    }

    /// Removes what nothing here needs, whole or in part.
    pub async fn sweep(&self) -> Result<Swept, StoreError> {
        let Ok(Some(wanted)) = self.handle.ask(|node, _| node.wanted_images()).await else { return Ok(Swept::Unknown) };
        let keep: Vec<[u8; 32]> = wanted.into_iter().map(|root| root.0).collect();
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || store.sweep(&keep)).await {
            Ok(Ok(Removed::Freed(bytes))) => Ok(Swept::Freed(bytes)),
            Ok(Ok(Removed::Busy)) | Err(_) => Ok(Swept::Busy),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Gives up what others have too, until what is here fits `budget` bytes or nothing is left that may go. Whatever comes of
    /// that, no copies are taken while it does not fit.
    async fn keep_to(&self, budget: u64, obstacle: &mut Option<ChunkId>) -> Result<(), StoreError> {
        let mut used = self.size().await;
        let fitted = if used > budget { self.give_up_for(budget, &mut used, obstacle).await } else { Ok(()) };
        // When the daemon ends, the next one is told.
        let _ended = self.handle.command(Command::StoreFull(used >= budget)).await;
        fitted
    }

    async fn size(&self) -> u64 {
        self.by_store(|store| Ok(store.size())).await.unwrap_or_default()
    }

    /// `used` is what is here, before and after; `obstacle` what was told of last as being in the way.
    async fn give_up_for(&self, budget: u64, used: &mut u64, obstacle: &mut Option<ChunkId>) -> Result<(), StoreError> {
        let Ok(spare) = self.handle.ask(|node, now| node.spare_images(now)).await else { return Ok(()) };
        // Nothing is removed while somebody does not know what it needs: then nothing is given up for it either.
        // Every list may be read for that, so only where something would go.
        let unknown = match spare.is_empty() {
            true => Vec::new(),
            false => self.by_store(unknown).await?,
        };
        let last = std::mem::replace(obstacle, unknown.first().copied().map(ChunkId));
        if let Some(root) = obstacle {
            if last != Some(*root) {
                warn!(root = %root.short(), "nothing is given up for the budget while an image is damaged");
            }
            return Ok(());
        }
        for roots in spare {
            // Each removal takes its time, and what was spare may be needed now.
            let asked = roots.clone();
            let still = self.handle.ask(move |node, now| node.spare_images(now).contains(&asked)).await;
            if !still.unwrap_or(false) {
                continue;
            }
            // First of all, so that nothing is started on it meanwhile.
            let _ended = self.handle.command(Command::ImagesGivenUp(roots.iter().copied().collect())).await;
            let Ok(Some(wanted)) = self.handle.ask(|node, _| node.wanted_images()).await else { return Ok(()) };
            let freed = self.give_up(roots.clone(), &wanted).await?;
            if freed == 0 {
                // Something is imported, or others need all of it: it is nobody's now, and goes in a later round.
                break;
            }
            info!(?roots, bytes = freed, "given up for the budget: other nodes have it");
            *used = self.size().await;
            if *used <= budget {
                break;
            }
        }
        Ok(())
    }

    /// Removes what of `candidates` nothing here needs any more; how many bytes are free again.
    pub async fn release(&self, candidates: BTreeSet<ChunkId>) -> Result<u64, StoreError> {
        // When the daemon ends, the next one does it.
        let Ok(Some(wanted)) = self.handle.ask(|node, _| node.wanted_images()).await else { return Ok(0) };
        self.give_up(candidates.difference(&wanted).copied().collect(), &wanted).await
    }

    /// Removes these, whatever needs them, but for what others of `wanted` reach: they may be on their way here, or run before all
    /// of them is.
    async fn give_up(&self, roots: BTreeSet<ChunkId>, wanted: &BTreeSet<ChunkId>) -> Result<u64, StoreError> {
        if roots.is_empty() {
            return Ok(0);
        }
        let coming: Vec<[u8; 32]> = wanted.difference(&roots).map(|root| root.0).collect();
        let doomed: Vec<[u8; 32]> = roots.iter().map(|root| root.0).collect();
        let (store, roots) = (Arc::clone(&self.store), roots.into_iter().collect());
        let removed = tokio::task::spawn_blocking(move || store.remove(&doomed, &coming)).await;
        match removed {
            Ok(Ok(Removed::Freed(bytes))) => {
                // One of them may have been named again meanwhile: it is fetched again then.
                let _ended = self.handle.command(Command::ImagesRemoved(roots)).await;
                Ok(bytes)
            }
            Ok(Ok(Removed::Busy)) | Err(_) => Ok(0),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Gives up, round after round, what nothing needs.
    pub async fn collect(self, budget: Option<u64>) {
        let mut rounds = 0;
        let mut unneeded = BTreeSet::new();
        let mut obstacle = None;
        let mut failed = None;
        let mut round = tokio::time::interval(ROUND);
        loop {
            round.tick().await;
            rounds += 1;
            let store = Arc::clone(&self.store);
            let complete = tokio::task::spawn_blocking(move || {
                let images = store.images()?.into_iter().map(|image| ChunkId(image.root));
                let originals = store.originals()?.into_iter().map(|original| ChunkId(original.root));
                let doubted: BTreeSet<ChunkId> = store.doubted()?.into_iter().map(ChunkId).collect();
                Ok::<_, StoreError>((images.chain(originals).collect::<BTreeSet<ChunkId>>(), doubted))
            });
            let Ok(wanted) = self.handle.ask(|node, _| node.wanted_images()).await else { return };
            let Some(wanted) = wanted else {
                warn!("the names of this node's images were lost: nothing is removed until it starts again");
                return;
            };
            let Ok(Ok((mut complete, doubted))) = complete.await else { continue };
            for root in doubted.intersection(&wanted).copied() {
                // It may have been given up meanwhile, or be of an earlier life; or have come by now.
                if self.by_store(move |store| Ok(store.doubted()?.contains(&root.0))).await.unwrap_or(false) {
                    let _ended = self.handle.command(Command::ImageDamaged(root)).await;
                }
            }
            complete.extend(doubted);
            let now: BTreeSet<ChunkId> = complete.difference(&wanted).copied().collect();
            let for_long = now.intersection(&unneeded).copied().collect();
            match self.release(for_long).await {
                Ok(bytes) => {
                    failed = None;
                    if bytes > 0 {
                        info!(bytes, "removed images that nothing needs any more");
                    }
                }
                Err(error) => {
                    // Once, while it stays so.
                    let reason = Some(error.to_string());
                    if failed != reason {
                        warn!(%error, "cannot remove images that nothing needs any more");
                        failed = reason;
                    }
                }
            }
            unneeded = now;
            if rounds % SWEEP == FIRST_SWEEP {
                match self.sweep().await {
                    Ok(Swept::Freed(0) | Swept::Busy | Swept::Unknown) => {}
                    Ok(Swept::Freed(bytes)) => info!(bytes, "removed what belonged to nothing"),
                    Err(error) => {
                        warn!(%error, "cannot look for what belongs to nothing");
                        if let Err(error) = self.mend_lists().await {
                            warn!(%error, "cannot look for what is damaged");
                        }
                    }
                }
            }
            if let Some(budget) = budget
                && let Err(error) = self.keep_to(budget, &mut obstacle).await
            {
                warn!(%error, "cannot keep to the budget");
            }
        }
    }
}

/// What is complete, or was, and nobody knows the needs of.
fn unknown(store: &Store) -> Result<Vec<[u8; 32]>, StoreError> {
    let doubted = store.doubted()?;
    if doubted.is_empty() { store.unlisted() } else { Ok(doubted) }
}

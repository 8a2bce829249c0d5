//! Containers that run before all of their image is here.
//!
//! A start with `--lazy` takes an image whose lists are here ([`Store::startable`]); the container's keeper
//! ([`moyai_runtime::lazy`]) then asks here for what it reads. What is missing the exchange fetches before everything else of the
//! image, and a read is answered when it came. Where the kernel or this process's rights do not allow it, the start waits
//! for all of the image.
//!
//! **If the daemon dies:** keepers connect to the next one, and ask again.
//!
//! **Bounds.** A line asks one thing at a time, and a keeper has a few; the contents of an image are known here once, while it
//! is asked about.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moyai_protocol::contract::Command;
use moyai_protocol::id::ChunkId;
use moyai_runtime::image::{Content, ContentId};
use moyai_runtime::lazy::{self, FAILED, Read};
use moyai_runtime::store::{Runnable, Startable, Store, StoreError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Notify};
use tracing::{debug, warn};

use super::driver::Handle;
use super::images::{Fetching, Images};

/// Something that was demanded is demanded again after so long: the exchange does not know contents before it has surveyed them.
const AGAIN: Duration = Duration::from_millis(250);

/// A line that asks nothing for so long is closed; its keeper makes another when it needs one. What an image's contents are is
/// known for so long after it was asked about.
const IDLE: Duration = Duration::from_secs(60);

type Contents = HashMap<ContentId, Content>;

/// By image, and when somebody asked last.
type Known = HashMap<[u8; 32], (Arc<Contents>, Instant)>;

/// Gives containers what they read of images that are still coming.
#[derive(Clone)]
pub struct Reads {
    handle: Handle,
    store: Arc<Store>,
    images: Images,
    /// Told when chunks have come.
    arrived: Arc<Notify>,
    known: Arc<Mutex<Known>>,
}

impl Reads {
    /// Of the images of this store.
    pub fn new(handle: Handle, store: Arc<Store>, images: Images) -> Reads {
        Reads { handle, store, images, arrived: Arc::default(), known: Arc::default() }
    }

    /// Chunks have come.
    pub fn arrived(&self) {
        self.arrived.notify_waiters();
    }

    /// Answers keepers from now on.
    pub fn listen(&self) -> std::io::Result<()> {
        let listener = lazy::listen(&self.store.lazy_socket())?;
        listener.set_nonblocking(true)?;
        let (listener, reads) = (UnixListener::from_std(listener)?, self.clone());
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((line, _)) => {
                        let reads = reads.clone();
                        tokio::spawn(async move {
                            // A keeper that ends closes its lines.
                            if let Err(error) = reads.serve(line).await {
                                debug!(%error, "a keeper's line has ended");
                            }
                        });
                    }
                    Err(error) => {
                        warn!(%error, "cannot take a keeper's line");
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        });
        Ok(())
    }

    /// What a container is to run on: all of its image, or what is needed to begin, when the one or the other is here.
    pub async fn runnable(&self, root: ChunkId, lazy: bool) -> Result<Runnable, String> {
        loop {
            let store = Arc::clone(&self.store);
            let found = self.blocking(move || {
                let whole = store.runnable(&root.0)?.map(|image| Startable::Now(Box::new(image)));
                Ok(match whole {
                    Some(whole) => whole,
                    None if lazy => store.startable(&root.0)?,
                    None => Startable::No,
                })
            });
            match found.await? {
                Startable::Now(image) => return Ok(*image),
                Startable::After(chunks) => self.need(root, chunks.into_iter().map(ChunkId).collect()).await?,
                Startable::No if lazy => self.images.fetch(root).await?,
                Startable::No => return Err("its image is not complete here".to_owned()),
            }
        }
    }

    /// Returns when these chunks of an image are here.
    async fn need(&self, root: ChunkId, mut chunks: Vec<ChunkId>) -> Result<(), String> {
        let mut whole = false;
        loop {
            let came = self.arrived.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            let store = Arc::clone(&self.store);
            chunks = self
                .blocking(move || {
                    let mut missing = Vec::new();
                    for chunk in chunks {
                        if store.chunk(&chunk.0)?.is_none() {
                            missing.push(chunk);
                        }
                    }
                    Ok(missing)
                })
                .await?;
            if chunks.is_empty() {
                return Ok(());
            }
            // A file's bytes are asked for more than once, and each time would wait for as long as the first.
            let out_of_reach = self.handle.ask(move |node, now| node.out_of_reach(&root, now).map(str::to_owned));
            if let Ok(Some(reason)) = out_of_reach.await {
                return Err(reason);
            }
            let demand = Command::DemandChunks { root, chunks: chunks.clone() };
            if self.handle.command(demand).await.is_err() {
                return Err("the daemon ends".to_owned());
            }
            if tokio::time::timeout(AGAIN, came).await.is_err() {
                match self.images.look(root).await {
                    Fetching::Failed(reason) => return Err(reason),
                    // The next look at the store was the last one.
                    Fetching::Done(_) if whole => {
                        return Err("its disk has lost it: `moyai image verify` says more".to_owned());
                    }
                    Fetching::Done(_) => whole = true,
                    Fetching::Progress(..) => {}
                }
            }
        }
    }

    async fn serve(&self, mut line: UnixStream) -> anyhow::Result<()> {
        let mut root = [0; 32];
        line.read_exact(&mut root).await?;
        let mut asked = [0; Read::SIZE];
        loop {
            // A keeper whose image is whole asks no more, and says nothing of it.
            tokio::time::timeout(IDLE, line.read_exact(&mut asked)).await??;
            let read = match self.contents(root).await {
                Ok(contents) => self.read(ChunkId(root), &contents, Read::decode(&asked)).await,
                Err(reason) => Err(reason),
            };
            match read {
                Ok(bytes) => {
                    line.write_u32_le(bytes.len() as u32).await?;
                    line.write_all(&bytes).await?;
                }
                Err(reason) => {
                    warn!(image = %ChunkId(root).short(), reason, "a container cannot read of its image, which is not all here");
                    line.write_u32_le(FAILED).await?;
                }
            }
        }
    }

    async fn read(&self, root: ChunkId, contents: &Contents, read: Read) -> Result<Vec<u8>, String> {
        let content = contents.get(&read.content).ok_or("the image has no such content")?;
        let touched = read.chunks(content);
        loop {
            let (store, parts) = (Arc::clone(&self.store), touched.clone());
            let found = self.blocking(move || {
                let mut bytes = Vec::new();
                for (chunk, range) in parts {
                    let Some(part) = store.chunk(&chunk)? else { return Ok(None) };
                    let part =
                        part.get(range).ok_or_else(|| StoreError::Damaged("a chunk that is too short".to_owned()))?;
                    bytes.extend_from_slice(part);
                }
                Ok(Some(bytes))
            });
            if let Some(bytes) = found.await? {
                return Ok(bytes);
            }
            self.need(root, touched.iter().map(|(chunk, _)| ChunkId(*chunk)).collect()).await?;
        }
    }

    async fn contents(&self, root: [u8; 32]) -> Result<Arc<Contents>, String> {
        let mut known = self.known.lock().await;
        if let Some((contents, used)) = known.get_mut(&root) {
            *used = Instant::now();
            return Ok(Arc::clone(contents));
        }
        let store = Arc::clone(&self.store);
        let contents = Arc::new(self.blocking(move || store.contents_of(&root)).await?);
        known.retain(|_, (_, used)| used.elapsed() < IDLE);
        known.insert(root, (Arc::clone(&contents), Instant::now()));
        Ok(contents)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, String> {
        let done = tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?;
        done.map_err(|error| error.to_string())
    }
}

//! Writing contents as an import reads them.

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use super::buffer::Buffer;
use super::index::{Changes, Location};
use super::spool::{Line, Spool};
use super::{Held, HeldOriginal, Store, StoreError, lock};
use crate::image::{
    Chunk, Chunker, Content, ContentId, ImportError, ORIGINAL, Original, OriginalRoot, Progress, Root, Tree,
    content_of, read_full,
};

/// A file up to this long is read whole before it is known whether it must be written at all.
const IN_MEMORY: u64 = 4 << 20;
const BUFFER: usize = 256 * 1024;
/// What of a longer one is written at one time.
const SLAB: usize = 1 << 20;

/// One import's writes. Dropped without [`Writer::commit`], it removes what it wrote.
pub struct Writer<'a> {
    store: &'a Store,
    /// None before there is something to write.
    spool: Option<Spool>,
    progress: &'a Progress,
    limit: u64,
    bytes: u64,
    changes: Changes,
    met: BTreeSet<Chunk>,
    /// Those of them that the store did not have.
    new: BTreeSet<Chunk>,
    written: Vec<(PathBuf, Option<Content>)>,
    trees: Vec<(Root, Vec<Tree>)>,
    images: Vec<Held>,
    originals: Vec<(HeldOriginal, Vec<[u8; 32]>)>,
    /// Contents that are written already.
    placed: HashSet<ContentId>,
    /// Their chunks.
    placed_chunks: BTreeSet<Chunk>,
    /// Contents that the store had, and this counts on.
    known: HashSet<ContentId>,
    /// How often the disk had not taken what was written, when this began.
    losses: usize,
}

/// A content on its way to the disk.
pub(crate) struct Sink {
    path: PathBuf,
    file: Arc<File>,
    line: Line,
    /// Has no room before there is something to write.
    slab: Buffer,
    chunker: Chunker,
    /// Bytes that may still come, of what its import may bring in all.
    left: u64,
    limit: u64,
}

impl Sink {
    /// Adds bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(StoreError::Limit { limit: self.limit })?;
        let Ok(()) = self.chunker.push(bytes, &mut |_: &Chunk, _: &[u8]| Ok::<(), Infallible>(()));
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.slab.is_empty() {
                self.slab = self.line.buffer(SLAB);
            }
            let room = SLAB - self.slab.len();
            let (now, later) = rest.split_at(rest.len().min(room));
            self.slab.fill(now);
            rest = later;
            if self.slab.len() == SLAB {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    fn pass_on(&mut self) -> Result<(), StoreError> {
        self.line.more(&self.file, &self.path, std::mem::take(&mut self.slab))
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes).map_err(|error| match error {
            StoreError::Io { source, .. } => source,
            StoreError::DiskFull { .. } => io::Error::from_raw_os_error(libc::ENOSPC),
            other => io::Error::other(other),
        })?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Store {
    /// Begins an import of at most `limit` bytes of files.
    pub fn writer<'a>(&'a self, limit: u64, progress: &'a Progress) -> Writer<'a> {
        // A removal that goes on would not know what this is about to need.
        let _none_goes_on = self.changing();
        self.importing.fetch_add(1, Ordering::AcqRel);
        Writer {
            store: self,
            spool: None,
            progress,
            limit,
            bytes: 0,
            changes: Changes::default(),
            met: BTreeSet::new(),
            new: BTreeSet::new(),
            written: Vec::new(),
            trees: Vec::new(),
            images: Vec::new(),
            originals: Vec::new(),
            placed: HashSet::new(),
            placed_chunks: BTreeSet::new(),
            known: HashSet::new(),
            losses: self.losses(),
        }
    }
}

impl Writer<'_> {
    /// Adds a file of `size` bytes. `name` is what errors call the layer it is in.
    pub(crate) fn add(&mut self, file: &mut impl Read, size: u64, name: &str) -> Result<Content, ImportError> {
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limit {
            return Err(ImportError::TooLarge { name: name.to_owned(), limit: self.limit });
        }
        if size > IN_MEMORY {
            return self.add_large(file, size, name);
        }
        let mut bytes = self.line()?.buffer(size as usize);
        read_all(file, bytes.grow(size as usize), name)?;
        self.progress.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(self.add_buffer(content_of(&bytes), bytes)?)
    }

    /// Adds a content that is all in memory.
    pub(crate) fn add_bytes(&mut self, bytes: &[u8]) -> Result<Content, StoreError> {
        self.add_buffer(content_of(bytes), bytes.into())
    }

    fn add_buffer(&mut self, content: Content, bytes: Buffer) -> Result<Content, StoreError> {
        let id = content.id();
        if self.is_known(&id, &content)? {
            self.line()?.give_back(bytes);
        } else {
            let temporary = self.temporary();
            self.line()?.whole(temporary.clone(), bytes)?;
            self.place(temporary, id, &content)?;
        }
        self.note(&content, id)?;
        Ok(content)
    }

    fn add_large(&mut self, file: &mut impl Read, size: u64, name: &str) -> Result<Content, ImportError> {
        let mut sink = self.sink()?;
        let mut buffer = vec![0; BUFFER];
        let mut left = size;
        while left > 0 {
            let want = buffer.len().min(left as usize);
            read_all(file, &mut buffer[..want], name)?;
            sink.push(&buffer[..want])?;
            self.progress.bytes.fetch_add(want as u64, Ordering::Relaxed);
            left -= want as u64;
        }
        Ok(self.keep(sink)?)
    }

    /// Begins a content of unknown length.
    pub(crate) fn sink(&mut self) -> Result<Sink, StoreError> {
        let path = self.temporary();
        let file = File::create(&path).map_err(|error| StoreError::io("make", &path, error))?;
        self.written.push((path.clone(), None));
        let left = self.limit.saturating_sub(self.bytes);
        let (line, chunker) = (self.line()?.clone(), Chunker::default());
        Ok(Sink { path, file: Arc::new(file), line, slab: Buffer::default(), chunker, left, limit: self.limit })
    }

    /// Adds the content that was written to it.
    pub(crate) fn keep(&mut self, mut sink: Sink) -> Result<Content, StoreError> {
        sink.pass_on()?;
        let Sink { path, chunker, .. } = sink;
        let Ok(content) = chunker.finish(&mut |_: &Chunk, _: &[u8]| Ok::<(), Infallible>(()));
        let id = content.id();
        if self.is_known(&id, &content)? {
            // What of it is not written yet goes the same way when its descriptor is closed.
            fs::remove_file(&path).map_err(|error| StoreError::io("remove", &path, error))?;
        } else {
            self.place(path, id, &content)?;
        }
        self.note(&content, id)?;
        Ok(content)
    }

    /// Adds an image whose contents have all been added; returns its root chunk, its size, and its chunks: all, new.
    pub(crate) fn add_image(
        &mut self,
        root: &Root,
        trees: &[&Tree],
        id: [u8; 32],
    ) -> Result<(Chunk, u64, (u64, u64)), StoreError> {
        let content = self.add_root(&root.encode())?;
        let chunk = content.id();
        let mut distinct: BTreeSet<(Chunk, u32)> = content.chunks.into_iter().collect();
        distinct.extend(root.config.chunks.iter().copied());
        distinct.extend(root.layers.iter().flat_map(|layer| layer.tree.chunks.iter().copied()));
        distinct
            .extend(trees.iter().flat_map(|tree| tree.contents()).flat_map(|content| content.chunks.iter().copied()));
        let size = distinct.iter().map(|(_, len)| u64::from(*len)).sum();
        self.images.push(Held { id, root: chunk, size });
        self.trees.push((root.clone(), trees.iter().map(|tree| (*tree).clone()).collect()));
        let new = distinct.iter().filter(|(chunk, _)| self.new.contains(chunk)).count();
        Ok((chunk, size, (distinct.len() as u64, new as u64)))
    }

    /// Adds an original whose contents have all been added.
    pub(crate) fn add_original(&mut self, original: &Original) -> Result<HeldOriginal, StoreError> {
        let list = self.add_bytes(&original.encode())?;
        let size = list.size() + original.own_size();
        let root = self.add_root(&OriginalRoot { version: ORIGINAL, list }.encode())?.id();
        let held = HeldOriginal { root, digest: original.manifest().digest, size };
        self.originals.push((held.clone(), original.blobs.iter().map(|blob| blob.digest).collect()));
        Ok(held)
    }

    /// Adds the root of something. It is one chunk, however long: it is what everything else is found by.
    fn add_root(&mut self, encoded: &[u8]) -> Result<Content, StoreError> {
        let chunk = *blake3::hash(encoded).as_bytes();
        let content = Content { chunks: vec![(chunk, encoded.len() as u32)] };
        if !self.is_known(&chunk, &content)? {
            let temporary = self.temporary();
            self.line()?.whole(temporary.clone(), encoded.into())?;
            self.place(temporary, chunk, &content)?;
        }
        self.note(&content, chunk)?;
        Ok(content)
    }

    /// Makes everything known at once, or, when it fails, nothing.
    pub(crate) fn commit(mut self) -> Result<(), StoreError> {
        self.spool.as_ref().map_or(Ok(()), Spool::finish)?;
        self.store.sync_since(self.losses)?;
        self.store.index.add(&self.changes, true)?;
        // From here on the contents are the store's; an image without its layers is not yet an image.
        for (_, content) in std::mem::take(&mut self.written) {
            if let Some(content) = content {
                self.alone(&content.id());
            }
        }
        for (root, trees) in &self.trees {
            self.store.make_rootfs(blake3::hash(&root.encode()).as_bytes(), root, trees)?;
        }
        let (images, originals) = (std::mem::take(&mut self.images), std::mem::take(&mut self.originals));
        {
            let _none_is_doubted = self.store.changing();
            let index = &self.store.index;
            let is_whole = index.has_contents(self.changes.contents.iter().chain(&self.known))?
                && index.has_chunks(self.met.difference(&self.placed_chunks))?;
            if !is_whole {
                let reason = "a part of it was found damaged while it came: bring it once more".to_owned();
                return Err(StoreError::Damaged(reason));
            }
            // The chunks once more: where they were known to lie before may have been found damaged since.
            let chunks = std::mem::take(&mut self.changes.chunks);
            self.store.index.add(&Changes { chunks, images, originals, ..Changes::default() }, true)?;
        }
        // They may have been started before all of them was here.
        self.trees.iter().try_for_each(|(root, _)| self.store.tell_keepers(blake3::hash(&root.encode()).as_bytes()))
    }

    fn note(&mut self, content: &Content, id: ContentId) -> Result<(), StoreError> {
        let is_placed = self.placed.contains(&id);
        for (chunk, at) in Location::of(content, id) {
            if self.met.insert(chunk) {
                self.progress.chunks.fetch_add(1, Ordering::Relaxed);
                if self.store.index.chunk(&chunk)?.is_none() {
                    self.new.insert(chunk);
                    self.progress.new_chunks.fetch_add(1, Ordering::Relaxed);
                }
            }
            // Also one that is known to lie elsewhere: there it may turn out to be damaged.
            if is_placed && self.placed_chunks.insert(chunk) {
                self.changes.chunks.push((chunk, at));
            }
        }
        if !is_placed {
            self.known.insert(id);
        }
        Ok(())
    }

    /// Whether it is here already, with each of its chunks: one that the index has forgotten was found damaged.
    fn is_known(&self, id: &ContentId, content: &Content) -> Result<bool, StoreError> {
        let index = &self.store.index;
        if self.placed.contains(id) {
            return Ok(true);
        }
        if !index.content(id)? || !self.store.object(id).exists() {
            return Ok(false);
        }
        index.has_chunks(content.chunks.iter().map(|(chunk, _)| chunk))
    }

    fn temporary(&self) -> PathBuf {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let unique = format!("import-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.store.dir.join("tmp").join(unique)
    }

    fn line(&mut self) -> Result<&Line, StoreError> {
        let spool = match self.spool.take() {
            Some(spool) => spool,
            None => Spool::start()?,
        };
        Ok(self.spool.insert(spool).line())
    }

    fn place(&mut self, temporary: PathBuf, id: ContentId, content: &Content) -> Result<(), StoreError> {
        let path = self.store.object(&id);
        *lock(&self.store.placed).entry(id).or_default() += 1;
        self.written.push((path.clone(), Some(content.clone())));
        if self.placed.insert(id) {
            self.changes.contents.push(id);
        }
        self.line()?.place(temporary, path)
    }
}

/// Reads as much of a file as `buffer` holds.
fn read_all(file: &mut impl Read, buffer: &mut [u8], name: &str) -> Result<(), ImportError> {
    let len = read_full(file, buffer).map_err(|error| ImportError::damaged(name, &error))?;
    if len < buffer.len() {
        let reason = "it ends inside a file".to_owned();
        return Err(ImportError::Damaged { name: name.to_owned(), reason });
    }
    Ok(())
}

impl Writer<'_> {
    /// Has nothing more to do with a content that it put in place; whether no other import has.
    fn alone(&self, id: &ContentId) -> bool {
        let mut placed = lock(&self.store.placed);
        let count = placed.entry(*id).or_insert(1);
        *count -= 1;
        let alone = *count == 0;
        if alone {
            placed.remove(id);
        }
        alone
    }
}

impl Writer<'_> {
    /// Removes what was written to `path`, unless another import or a download counts on it. What cannot be removed is left for a
    /// sweep to find.
    fn take_back(&self, path: &Path, content: Option<&Content>) {
        let Some(content) = content else { return drop(fs::remove_file(path)) };
        let id = content.id();
        let index = &self.store.index;
        let lies_here =
            |(chunk, _): &(Chunk, u32)| index.chunk(chunk).is_ok_and(|at| at.is_some_and(|at| at.content == id));
        // Without an index nobody can say that nobody needs it.
        let shared = index.content(&id).unwrap_or(true) || content.chunks.iter().any(lies_here);
        if self.alone(&id) && !shared {
            self.store.discard(&id);
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // Nothing is written from here on.
        self.spool = None;
        let written = std::mem::take(&mut self.written);
        if !written.is_empty() {
            // Whoever takes up chunks or completes an image has said by then which files it counts on.
            let _nobody_else = self.store.changing.write().unwrap_or_else(PoisonError::into_inner);
            written.iter().for_each(|(path, content)| self.take_back(path, content.as_ref()));
        }
        self.store.importing.fetch_sub(1, Ordering::AcqRel);
        crate::sys::give_memory_back();
    }
}

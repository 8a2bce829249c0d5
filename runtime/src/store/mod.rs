//! Contents, chunks and images on disk.
//!
//! ```text
//! objects/ab/abcd…     one file for each distinct content, under its id; sparse while its chunks still come
//! rootfs/0123456789…/  an image's file system without its files' bytes, where the kernel can put both together
//! layers/0123456789…/  a layer, unpacked, where it cannot: a lower layer of overlayfs; its files are links to objects
//! index.redb           where each chunk lies, which contents, layers, images and originals are complete
//! tmp/                 what is being written or removed; emptied at start
//! ```
//!
//! **Order of writing.** Bytes first, then `syncfs`, then the index: a chunk that the index names is on the disk. A
//! crash loses what came since the last commit (a second, while receiving), and files without an entry, which are
//! overwritten when they come again.
//!
//! **Who writes.** Imports and downloads may run side by side: objects are written under their hash, so two writers of
//! one object write the same bytes; unpacking is one at a time, because an object takes the owner and mode of the
//! first file that links to it.
//!
//! **Checked before use.** A chunk is hashed before it is written and again before it is served: a disk that lies, or
//! a stranger's write, ends as "not here", never as wrong bytes at a peer.

mod blobs;
mod buffer;
mod collect;
mod damage;
mod index;
mod receive;
mod rootfs;
mod spool;
#[cfg(test)]
mod tests;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

pub use collect::{Removed, Usage};
pub use damage::{Damage, Doubted};
pub use receive::Missing;
pub use rootfs::{Form, ImageFile, NoForm};
pub(crate) use write::Sink;
pub use write::Writer;

use crate::image::erofs::MAX_ENTRIES;
use crate::image::{Chunk, Content, ContentId, ImageConfig, MAX_ROOT, Root, Tree, UnpackError};
use crate::sys;
use index::{Index, Location};

/// How long an image that was asked about is kept from a sweep, and how many.
const RECENT: Duration = Duration::from_secs(600);
const MAX_RECENT: usize = 4096;

/// Why the store could not do something. What it held before, it still holds.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file could not be read or written.
    #[error("cannot {step} {path}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No room.
    #[error("the disk that holds {path} is full")]
    DiskFull {
        /// Where.
        path: PathBuf,
    },
    /// The index could not be read or written.
    #[error("the store's index: {0}")]
    Index(String),
    /// Something that was checked when it was written is not what it was.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// Bytes that are not what their name says.
    #[error("these bytes are not chunk {}", hex(.0))]
    WrongChunk(Chunk),
    /// A layer could not be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// File system images were asked for.
    #[error("this machine cannot mount images over the store's files (that takes Linux 6.12, root, and a disk): {0}")]
    NoImages(#[source] io::Error),
    /// The bytes of one import are more than allowed.
    #[error("more than {limit} bytes, which is the limit for one import")]
    Limit {
        /// The limit.
        limit: u64,
    },
}

impl StoreError {
    pub(crate) fn io(step: &'static str, path: &Path, source: io::Error) -> StoreError {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => StoreError::DiskFull { path: path.to_owned() },
            _ => StoreError::Io { step, path: path.to_owned(), source },
        }
    }

    /// Whether it is for want of room.
    pub fn is_full(&self) -> bool {
        match self {
            StoreError::DiskFull { .. } => true,
            StoreError::Unpack(error) => error.source.raw_os_error() == Some(libc::ENOSPC),
            _ => false,
        }
    }
}

/// An image that is complete, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// SHA-256 of its config.
    pub id: [u8; 32],
    /// Its root chunk.
    pub root: Chunk,
    /// Bytes of its distinct chunks.
    pub size: u64,
}

/// An original that is complete, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldOriginal {
    /// Its root chunk.
    pub root: Chunk,
    /// SHA-256 of its manifest or index.
    pub digest: [u8; 32],
    /// Bytes that it takes beyond the files of its images.
    pub size: u64,
}

/// What is needed to run an image.
#[derive(Clone, Debug)]
pub struct Runnable {
    /// SHA-256 of its config.
    pub id: [u8; 32],
    /// Its config.
    pub config: ImageConfig,
    /// Its layers' folders, lowest first; none where there is a file system for all of them.
    pub layers: Vec<PathBuf>,
    /// That file system.
    pub file: Option<ImageFile>,
    /// Folders, the topmost last, in one of which its `etc/passwd` and `etc/group` are, if it has any.
    pub accounts: Vec<PathBuf>,
}

/// Whether an image can be run before all of it is here.
#[derive(Debug)]
pub enum Startable {
    /// With this.
    Now(Box<Runnable>),
    /// When these chunks are here: its users are in them.
    After(Vec<Chunk>),
    /// Not here, or not yet.
    No,
}

/// What one read of a chunk has found out for the next, a moment later: where chunks lie, and the file of the last content.
#[derive(Debug, Default)]
pub struct LastRead {
    places: Option<index::Places>,
    file: Option<(ContentId, File)>,
}

/// Keeps a store from removing anything.
pub struct Hold(Arc<Store>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.importing.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Contents, chunks and images.
pub struct Store {
    dir: PathBuf,
    form: Form,
    can_be_lazy: bool,
    index: Index,
    /// Where chunks that are awaited go.
    awaited: Mutex<BTreeMap<Chunk, Location>>,
    fresh: Mutex<receive::Fresh>,
    /// Chunks that came since the disk was last known to have all: those of a second.
    unsynced: Mutex<Vec<Chunk>>,
    /// The store's folder, open as long as the store is: it is told of every loss since then.
    folder: Mutex<File>,
    /// How often the disk did not take what was written.
    losses: AtomicUsize,
    last_commit: Mutex<Instant>,
    unpacking: Mutex<()>,
    /// Held for reading by whoever adds to it step by step, for writing by a removal.
    changing: RwLock<()>,
    /// Images that were asked about, and when: a sweep keeps what they reach, though nobody may have told it of them yet.
    recent: Mutex<BTreeMap<Chunk, Instant>>,
    /// Held by whoever removes.
    removing: Mutex<()>,
    /// Imports that run.
    importing: AtomicUsize,
    /// Contents whose files imports have just put in place, each with how many did.
    placed: Mutex<BTreeMap<ContentId, usize>>,
}

impl Store {
    /// Opens the store in `dir`, making it if need be. Images get this form, or by default the best that the kernel can.
    pub fn open(dir: &Path, form: Option<Form>) -> Result<Store, StoreError> {
        for sub in ["", "objects", "rootfs", "layers", "tmp"] {
            let path = dir.join(sub);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| StoreError::io("make", &path, error))?;
        }
        let tmp = dir.join("tmp");
        for left in fs::read_dir(&tmp).map_err(|error| StoreError::io("read", &tmp, error))?.flatten() {
            let gone =
                if left.path().is_dir() { fs::remove_dir_all(left.path()) } else { fs::remove_file(left.path()) };
            gone.map_err(|error| StoreError::io("remove", &left.path(), error))?;
        }
        let form = match form {
            Some(Form::Folders) => Form::Folders,
            wanted => match (rootfs::try_image(dir), wanted) {
                (Ok(()), _) => Form::Image,
                (Err(error), Some(_)) => return Err(StoreError::NoImages(error)),
                (Err(_), None) => Form::Folders,
            },
        };
        Ok(Store {
            form,
            can_be_lazy: crate::lazy::is_possible(),
            index: Index::open(&dir.join("index.redb"))?,
            dir: dir.to_owned(),
            awaited: Mutex::new(BTreeMap::new()),
            fresh: Mutex::default(),
            unsynced: Mutex::default(),
            folder: Mutex::new(File::open(dir).map_err(|error| StoreError::io("open", dir, error))?),
            losses: AtomicUsize::new(0),
            last_commit: Mutex::new(Instant::now()),
            unpacking: Mutex::new(()),
            changing: RwLock::new(()),
            recent: Mutex::new(BTreeMap::new()),
            removing: Mutex::new(()),
            importing: AtomicUsize::new(0),
            placed: Mutex::new(BTreeMap::new()),
        })
    }

    /// While this is held nothing is removed: for whoever imports something and then gives it its name.
    pub fn hold(self: &Arc<Self>) -> Hold {
        let _none_goes_on = self.changing();
        self.importing.fetch_add(1, Ordering::AcqRel);
        Hold(Arc::clone(self))
    }

    /// Whether all of an image or of an original is here.
    pub fn is_complete(&self, root: &Chunk) -> Result<bool, StoreError> {
        Ok(self.index.image(root)?.is_some() || self.index.original(root)?)
    }

    /// Every complete image.
    pub fn images(&self) -> Result<Vec<Held>, StoreError> {
        self.index.images()
    }

    /// What is needed to run a complete image; `None` when it is not.
    pub fn runnable(&self, root: &Chunk) -> Result<Option<Runnable>, StoreError> {
        let Some(held) = self.index.image(root)? else { return Ok(None) };
        let parsed = self.root(root)?;
        let config = parse_config(&self.content(&parsed.config)?)?;
        let (layers, file, accounts) = self.rootfs(root, &parsed)?;
        Ok(Some(Runnable { id: held.id, config, layers, file, accounts }))
    }

    /// What is needed to run an image of which what names its contents is here, and perhaps no more.
    pub fn startable(&self, root: &Chunk) -> Result<Startable, StoreError> {
        if self.form != Form::Image || !self.can_be_lazy {
            return Ok(Startable::No);
        }
        let _not_removed = self.changing();
        let lacks = |chunks: &mut dyn Iterator<Item = &Chunk>| {
            let mut missing = Vec::new();
            for chunk in chunks {
                if self.chunk(chunk)?.is_none() {
                    missing.push(*chunk);
                }
            }
            Ok::<Vec<Chunk>, StoreError>(missing)
        };
        if !lacks(&mut [root].into_iter())?.is_empty() {
            return Ok(Startable::No);
        }
        self.touched(root);
        let parsed = self.root(root)?;
        let lists = receive::lists_of(&parsed)?.into_iter();
        if !lacks(&mut lists.flat_map(|list| &list.chunks).map(|(chunk, _)| chunk))?.is_empty() {
            return Ok(Startable::No);
        }
        let config = self.content(&parsed.config)?;
        let id = <sha2::Sha256 as sha2::Digest>::digest(&config).into();
        let (config, trees) = (parse_config(&config)?, self.trees(&parsed)?);
        let Ok(merged) = crate::image::erofs::merge(&trees) else { return Ok(Startable::No) };
        let accounts = rootfs::accounts(&merged).flat_map(|(_, content)| &content.chunks);
        let missing = lacks(&mut accounts.map(|(chunk, _)| chunk))?;
        if !missing.is_empty() {
            return Ok(Startable::After(missing));
        }
        let Some((file, accounts)) = self.make_lazy(root, &merged, &trees)? else { return Ok(Startable::No) };
        Ok(Startable::Now(Box::new(Runnable { id, config, layers: Vec::new(), file: Some(file), accounts })))
    }

    /// The contents of an image's files, by id; its lists are here.
    pub fn contents_of(&self, root: &Chunk) -> Result<HashMap<ContentId, Content>, StoreError> {
        let mut contents = HashMap::new();
        let root = self.root(root)?;
        receive::lists_of(&root)?;
        for tree in self.trees(&root)? {
            contents.extend(tree.contents().map(|content| (content.id(), content.clone())));
        }
        Ok(contents)
    }

    /// The config of an image whose lists are here.
    pub fn config(&self, root: &Chunk) -> Result<ImageConfig, StoreError> {
        let root = self.root(root)?;
        receive::lists_of(&root)?;
        parse_config(&self.content(&root.config)?)
    }

    /// Something is about to need what this image reaches, as far as it is here.
    fn touched(&self, root: &Chunk) {
        let mut recent = lock(&self.recent);
        recent.retain(|_, at| at.elapsed() < RECENT);
        if recent.len() < MAX_RECENT {
            recent.insert(*root, Instant::now());
        }
    }

    /// What was asked about lately.
    fn recent(&self) -> Vec<Chunk> {
        let recent = lock(&self.recent);
        recent.iter().filter(|(_, at)| at.elapsed() < RECENT).map(|(root, _)| *root).collect()
    }

    /// Where keepers ([`crate::lazy`]) are to reach the daemon.
    pub fn lazy_socket(&self) -> PathBuf {
        self.dir.join("lazy.sock")
    }

    /// The form that images get here.
    pub fn form(&self) -> Form {
        self.form
    }

    /// A chunk's bytes, checked; `None` when it is not here.
    pub fn chunk(&self, chunk: &Chunk) -> Result<Option<Vec<u8>>, StoreError> {
        let mut bytes = Vec::new();
        Ok(self.append_chunk(chunk, &mut bytes, &mut LastRead::default())?.then_some(bytes))
    }

    /// Adds a chunk's bytes, checked, to `all`; whether it is here. The next one may lie in the same file as the last.
    pub fn append_chunk(&self, chunk: &Chunk, all: &mut Vec<u8>, last: &mut LastRead) -> Result<bool, StoreError> {
        let places = match last.places.take() {
            Some(places) => places,
            None => self.index.places()?,
        };
        let location = last.places.insert(places).of(chunk)?;
        let Some(location) = location else { return Ok(false) };
        self.append_right(chunk, &location, all, last)
    }

    /// The chunk's bytes, if that is what lies there.
    fn right_at(&self, chunk: &Chunk, location: &Location) -> Result<Option<Vec<u8>>, StoreError> {
        let mut bytes = Vec::new();
        Ok(self.append_right(chunk, location, &mut bytes, &mut LastRead::default())?.then_some(bytes))
    }

    fn append_right(
        &self,
        chunk: &Chunk,
        location: &Location,
        all: &mut Vec<u8>,
        last: &mut LastRead,
    ) -> Result<bool, StoreError> {
        let before = all.len();
        let right = self.read_at(location, all, last)? && blake3::hash(&all[before..]) == *chunk;
        if !right {
            all.truncate(before);
        }
        Ok(right)
    }

    /// Writes there anew.
    fn write_at(&self, location: &Location, bytes: &[u8]) -> Result<(), StoreError> {
        let file = self.open_object(&location.content)?;
        let written = rewrite(&file, || file.write_all_at(bytes, location.offset));
        written.map_err(|error| StoreError::io("write", &self.object(&location.content), error))
    }

    /// A content that lies complete under its id.
    fn content(&self, content: &Content) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        for (chunk, _) in &content.chunks {
            let piece = self.chunk(chunk)?;
            bytes.extend(piece.ok_or_else(|| StoreError::Damaged(format!("chunk {} is gone", hex(chunk))))?);
        }
        Ok(bytes)
    }

    fn root(&self, root: &Chunk) -> Result<Root, StoreError> {
        let bytes =
            self.chunk(root)?.ok_or_else(|| StoreError::Damaged(format!("image root {} is gone", hex(root))))?;
        if bytes.len() > MAX_ROOT {
            return Err(StoreError::Damaged(format!("an image root of {} bytes", bytes.len())));
        }
        Root::decode(&bytes).map_err(StoreError::Damaged)
    }

    fn tree(&self, tree: &Content) -> Result<Tree, StoreError> {
        Tree::decode(&self.content(tree)?).map_err(StoreError::Damaged)
    }

    /// An image's layers, the lowest first. They have no more entries than one file system can be made of.
    fn trees(&self, root: &Root) -> Result<Vec<Tree>, StoreError> {
        let (mut trees, mut entries) = (Vec::new(), 0);
        for layer in &root.layers {
            let tree = self.tree(&layer.tree)?;
            entries += tree.entries.len();
            if entries > MAX_ENTRIES {
                return Err(StoreError::Damaged(format!("an image of more than {MAX_ENTRIES} entries")));
            }
            trees.push(tree);
        }
        Ok(trees)
    }

    fn object(&self, id: &ContentId) -> PathBuf {
        object_in(&self.dir, id)
    }

    /// No removal goes on while this is held.
    fn changing(&self) -> RwLockReadGuard<'_, ()> {
        self.changing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what lies there to `all`; whether there is so much.
    fn read_at(&self, location: &Location, all: &mut Vec<u8>, last: &mut LastRead) -> Result<bool, StoreError> {
        let file = match last.file.take() {
            Some((content, file)) if content == location.content => file,
            _ => {
                let path = self.object(&location.content);
                match File::open(&path) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                    Err(error) => return Err(StoreError::io("open", &path, error)),
                }
            }
        };
        let read = sys::append_at(&file, all, location.len as usize, location.offset);
        last.file = Some((location.content, file));
        match read {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            // A disk that has lost it says so; what is written there anew it has again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADMSG)) => Ok(false),
            Err(error) => Err(StoreError::io("read", &self.object(&location.content), error)),
        }
    }

    /// Makes a content's file, or finds it. It is never made shorter while chunks come: another may have been written
    /// further on a moment ago.
    fn open_object(&self, id: &ContentId) -> Result<File, StoreError> {
        let path = self.object(id);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().expect("an object is in a folder");
                fs::create_dir_all(parent).map_err(|error| StoreError::io("make", parent, error))?;
                options.open(&path)
            }
            file => file,
        };
        file.map_err(|error| StoreError::io("make", &path, error))
    }

    /// Everything written so far is on the disk when this returns. The kernel says once to each open descriptor that it is not, and
    /// then takes those bytes for written: chunks that came since the last time are forgotten.
    fn sync(&self) -> Result<(), StoreError> {
        // Whoever is told of nothing is told after whoever is told of a loss has counted it.
        let folder = lock(&self.folder);
        let since = std::mem::take(&mut *lock(&self.unsynced));
        // SAFETY: the descriptor is open for the whole call, and there is no pointer.
        if unsafe { libc::syncfs(folder.as_raw_fd()) } != 0 {
            let error = io::Error::last_os_error();
            self.lose(&since)?;
            return Err(StoreError::io("sync", &self.dir, error));
        }
        Ok(())
    }

    /// The same for whoever began to write when there had been so many `losses`: it is not told of another's.
    fn sync_since(&self, losses: usize) -> Result<(), StoreError> {
        self.sync()?;
        self.none_lost_since(losses)
    }

    /// How often the disk did not take what was written.
    fn losses(&self) -> usize {
        self.losses.load(Ordering::Acquire)
    }

    fn none_lost_since(&self, losses: usize) -> Result<(), StoreError> {
        if self.losses() == losses {
            return Ok(());
        }
        Err(StoreError::Io { step: "sync", path: self.dir.clone(), source: io::Error::from_raw_os_error(libc::EIO) })
    }

    /// These chunks, and all that came meanwhile, may not be what the page cache says.
    fn lose(&self, chunks: &[Chunk]) -> Result<(), StoreError> {
        self.losses.fetch_add(1, Ordering::AcqRel);
        *lock(&self.fresh) = receive::Fresh::default();
        let meanwhile = std::mem::take(&mut *lock(&self.unsynced));
        self.index.forget(&[chunks, &meanwhile].concat())
    }

    /// Removes a content's file, if it is there.
    fn discard(&self, id: &ContentId) {
        lock(&self.fresh).forget(id);
        drop(fs::remove_file(self.object(id)));
    }
}

fn parse_config(bytes: &[u8]) -> Result<ImageConfig, StoreError> {
    ImageConfig::parse(bytes).map_err(|error| StoreError::Damaged(error.to_string()))
}

fn object_in(dir: &Path, id: &ContentId) -> PathBuf {
    object_below(&dir.join("objects"), id)
}

/// Writes to an object. Unpacked layers may have links to it: mode and times are those of their files then, and stay.
fn rewrite<T>(object: &File, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    /// Whoever looked while another writes would take its time for the file's.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if object.metadata()?.nlink() <= 1 {
        return write();
    }
    let _nobody_else = lock(&ONE_AT_A_TIME);
    let before = object.metadata()?;
    let done = write();
    object.set_permissions(before.permissions())?;
    object.set_times(fs::FileTimes::new().set_accessed(before.accessed()?).set_modified(before.modified()?))?;
    done
}

/// Where a content is below a folder of objects.
pub(crate) fn object_below(objects: &Path, id: &ContentId) -> PathBuf {
    let name = hex(id);
    objects.join(&name[..2]).join(name)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding it left plain data behind, whole at each step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(bytes: &[u8; 32]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

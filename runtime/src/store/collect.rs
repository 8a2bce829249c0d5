//! What takes room, and giving it back.
//!
//! An image and an original *reach* their lists, and the contents and layers that those name. What is removed with them is what
//! nothing else reaches: no other complete image or original, and none that is on its way here (`keep`). A *sweep* removes what
//! nothing at all reaches: what downloads left that were given up, and what was removed but for its file.
//!
//! **Races.** A removal waits until nobody takes up chunks or completes an image, and those wait for it; it does not begin
//! while an import runs, which does not yet say what it will reach. Most of what must stay is found before that, without holding
//! anybody up: only what was completed since is found then. Files are only moved away meanwhile; to free what they take can last
//! for seconds, and comes after it. Whoever asks for it keeps what containers use.
//!
//! **If it dies.** The index forgets first, in one transaction; files that then stay are in nobody's way, and go with the next
//! sweep, or where they were moved away, at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{MutexGuard, PoisonError, RwLockWriteGuard};

use super::index::{Location, Removal};
use super::{Store, StoreError, hex, lock};
use crate::image::{Chunk, Content, ContentId, Source, Tree};

/// What an image or an original needs.
#[derive(Default)]
pub(super) struct Reached {
    pub(super) contents: BTreeMap<ContentId, Content>,
    layers: BTreeSet<ContentId>,
    pub(super) blobs: BTreeMap<[u8; 32], Chunk>,
}

/// The store while nobody else changes it.
struct Still<'a> {
    /// Every complete image and original.
    complete: Vec<Chunk>,
    /// What those reach that stay.
    kept: Reached,
    locks: (MutexGuard<'a, ()>, RwLockWriteGuard<'a, ()>),
}

/// Files and folders that are in nobody's way any more, and bytes that are free already.
#[derive(Default)]
pub(super) struct Away {
    moved: Vec<PathBuf>,
    freed: u64,
}

/// How much room something takes.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that it needs.
    pub size: u64,
    /// Of those, what nothing else needs.
    pub own: u64,
}

/// What a removal has come to.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// So many bytes are free again.
    Freed(u64),
    /// An import runs: nothing was removed, for now.
    Busy,
}

impl Store {
    /// How much room each of these takes: some images and originals that belong together. What is not complete takes none.
    pub fn usage(&self, groups: &[Vec<Chunk>]) -> Result<Vec<Usage>, StoreError> {
        let complete = self.roots()?;
        let mut users: BTreeMap<ContentId, (u32, u64)> = BTreeMap::new();
        let mut all: Vec<Vec<ContentId>> = Vec::new();
        for group in groups {
            let mut reached = Reached::default();
            for root in group.iter().filter(|root| complete.contains(root)) {
                // What a damaged list names counts for nothing until it is whole again.
                self.reach_listed(root, &mut reached)?;
            }
            for (id, content) in &reached.contents {
                users.entry(*id).or_insert((0, content.size())).0 += 1;
            }
            all.push(reached.contents.into_keys().collect());
        }
        let usage = |ids: Vec<ContentId>| {
            let known = ids.iter().filter_map(|id| users.get(id));
            known.fold(Usage::default(), |sum, (count, size)| Usage {
                size: sum.size + size,
                own: sum.own + if *count == 1 { *size } else { 0 },
            })
        };
        Ok(all.into_iter().map(usage).collect())
    }

    /// Bytes of this store on its disk, but for its index.
    pub fn size(&self) -> u64 {
        let objects = folders(&self.dir.join("objects")).flat_map(|folder| folders(&folder));
        let objects: u64 =
            objects.filter_map(|file| fs::symlink_metadata(file).ok()).map(|file| file.blocks() * 512).sum();
        // Of unpacked layers, what is not a link to those.
        let mut copies = 0;
        let mut left: Vec<PathBuf> =
            ["rootfs", "layers"].iter().flat_map(|name| folders(&self.dir.join(name))).collect();
        while let Some(path) = left.pop() {
            match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => left.extend(folders(&path)),
                Ok(found) => copies += own_blocks(&found),
                Err(_) => {}
            }
        }
        objects + copies
    }

    /// Removes what neither a complete image or original reaches, nor one of `keep` as far as it is here.
    pub fn sweep(&self, keep: &[Chunk]) -> Result<Removed, StoreError> {
        let objects: Vec<PathBuf> = folders(&self.dir.join("objects")).flat_map(|folder| folders(&folder)).collect();
        // It outlives the locks also where something fails.
        let mut away = Away::default();
        let Some(Still { complete, mut kept, locks }) = self.still(&[])? else { return Ok(Removed::Busy) };
        let stays = kept.contents.clone();
        let keep: Vec<Chunk> = self.recent().into_iter().chain(keep.iter().copied()).collect();
        for root in keep.iter().filter(|root| !complete.contains(root)) {
            drop(self.reach(root, &mut kept));
        }
        // Whoever still waits for these was given up.
        lock(&self.awaited).retain(|_, location| kept.contents.contains_key(&location.content));
        let goes = |id: &ContentId| !kept.contents.contains_key(id);
        // What complete images have of their own, and the index knows only in what goes.
        let mut elsewhere = BTreeMap::new();
        for (chunk, _) in stays.values().flat_map(|content| &content.chunks) {
            if self.index.chunk(chunk)?.is_some_and(|location| goes(&location.content)) {
                elsewhere.insert(*chunk, None);
            }
        }
        self.place_elsewhere(&stays, &mut elsewhere)?;
        self.index.sweep(&elsewhere, &goes, &|layer| !kept.layers.contains(layer))?;
        for path in objects {
            let id = path.file_name().and_then(|name| data_encoding::HEXLOWER.decode(name.as_encoded_bytes()).ok());
            let id: Option<ContentId> = id.and_then(|id| id.try_into().ok());
            match id {
                Some(id) if goes(&id) => _ = self.move_object_away(&id, &mut away),
                Some(_) => {}
                None => _ = self.move_away(&path, &mut away),
            }
        }
        let used: BTreeSet<PathBuf> = complete.iter().chain(&keep).map(|root| self.rootfs_dir(root)).collect();
        let layers: BTreeSet<PathBuf> = kept.layers.iter().map(|layer| self.layer_dir(layer)).collect();
        // Those have links to the files, whose room is free only without.
        let folders = ["rootfs", "layers"].iter().flat_map(|name| folders(&self.dir.join(name)));
        for dir in folders.filter(|dir| !used.contains(dir) && !layers.contains(dir)) {
            self.move_away(&dir, &mut away);
        }
        drop(locks);
        Ok(Removed::Freed(away.free()))
    }

    /// Removes images and originals, and what nothing else reaches. `keep` are those on their way here.
    pub fn remove(&self, roots: &[Chunk], keep: &[Chunk]) -> Result<Removed, StoreError> {
        let mut away = Away::default();
        let Some(Still { complete, mut kept, locks }) = self.still(roots)? else { return Ok(Removed::Busy) };
        let mut doomed = Reached::default();
        let stays = Reached { contents: kept.contents.clone(), blobs: kept.blobs.clone(), ..Reached::default() };
        for root in keep.iter().filter(|root| !complete.contains(root)) {
            // As far as its lists are here: what they name is not, or is reached already.
            drop(self.reach(root, &mut kept));
        }
        let awaited: BTreeSet<ContentId> = lock(&self.awaited).values().map(|location| location.content).collect();
        for root in roots.iter().filter(|root| complete.contains(root)) {
            // What a damaged list names is left for the next sweep.
            self.reach_listed(root, &mut doomed)?;
        }
        doomed.contents.retain(|id, _| !kept.contents.contains_key(id) && !awaited.contains(id));
        doomed.layers.retain(|layer| !kept.layers.contains(layer));
        let removal = self.removal(roots, &stays, &doomed)?;
        roots.iter().for_each(|root| _ = self.move_away(&self.rootfs_dir(root), &mut away));
        self.index.remove(&removal)?;
        doomed.layers.iter().for_each(|layer| _ = self.move_away(&self.layer_dir(layer), &mut away));
        let mut freed = 0;
        for (id, content) in &doomed.contents {
            if self.move_object_away(id, &mut away) {
                freed += content.size();
            }
        }
        drop(locks);
        away.free();
        Ok(Removed::Freed(freed))
    }

    /// Takes a content's file away; whether it is gone.
    fn move_object_away(&self, id: &ContentId, away: &mut Away) -> bool {
        lock(&self.fresh).forget(id);
        self.move_away(&self.object(id), away)
    }

    /// Takes a file or a folder away, whole; whether it is gone.
    pub(super) fn move_away(&self, path: &Path, away: &mut Away) -> bool {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let to = self.dir.join("tmp").join(format!("gone-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        match fs::rename(path, &to) {
            Ok(()) => away.moved.push(to),
            // A full disk may have no room for its name. A folder stays as it is.
            Err(error) if error.kind() != io::ErrorKind::NotFound && path.is_file() => match remove(path) {
                Ok(freed) => away.freed += freed,
                Err(_) => return false,
            },
            Err(_) => return false,
        }
        true
    }

    /// What of the index goes, and what must be looked for elsewhere from now on: in what is complete, where it is put if it is
    /// not there yet (lists are not brought together when they come).
    fn removal(&self, roots: &[Chunk], kept: &Reached, doomed: &Reached) -> Result<Removal, StoreError> {
        let mut chunks: BTreeMap<Chunk, Option<Location>> = BTreeMap::new();
        for (id, content) in &doomed.contents {
            for (chunk, _) in &content.chunks {
                if self.index.chunk(chunk)?.is_some_and(|location| location.content == *id) {
                    chunks.insert(*chunk, None);
                }
            }
        }
        self.place_elsewhere(&kept.contents, &mut chunks)?;
        let (contents, layers) = (doomed.contents.keys().copied().collect(), doomed.layers.iter().copied().collect());
        Ok(Removal { roots: roots.to_vec(), contents, layers, chunks, blobs: kept.blobs.clone() })
    }

    /// Where else those of `chunks` are to be looked for that `kept` contents have too.
    fn place_elsewhere(
        &self,
        kept: &BTreeMap<ContentId, Content>,
        chunks: &mut BTreeMap<Chunk, Option<Location>>,
    ) -> Result<(), StoreError> {
        let (losses, mut moved) = (self.losses(), false);
        for (id, content) in kept {
            for (chunk, there) in Location::of(content, *id) {
                if let Some(place @ None) = chunks.get_mut(&chunk) {
                    if self.right_at(&chunk, &there)?.is_none() {
                        // Another may have it right.
                        let Some(bytes) = self.chunk(&chunk)? else { continue };
                        self.write_at(&there, &bytes)?;
                        moved = true;
                    }
                    *place = Some(there);
                }
            }
        }
        if moved { self.sync_since(losses) } else { Ok(()) }
    }

    /// Holds the store still; `None` while something is imported. What `except` reach is not among what is kept.
    fn still(&self, except: &[Chunk]) -> Result<Option<Still<'_>>, StoreError> {
        let one_at_a_time = lock(&self.removing);
        if let Some(doubted) = self.index.doubted()?.iter().find(|root| !except.contains(root)) {
            let reason = format!("{} is not whole again yet, and nobody knows what it needs", hex(doubted));
            return Err(StoreError::Damaged(reason));
        }
        let mut kept = Reached::default();
        let before = self.roots()?;
        for root in before.iter().filter(|root| !except.contains(root)) {
            self.reach(root, &mut kept)?;
        }
        let nobody_else = self.changing.write().unwrap_or_else(PoisonError::into_inner);
        if self.importing.load(Ordering::Acquire) > 0 {
            return Ok(None);
        }
        let complete = self.roots()?;
        for root in complete.iter().filter(|root| !except.contains(root) && !before.contains(root)) {
            self.reach(root, &mut kept)?;
        }
        Ok(Some(Still { complete, kept, locks: (one_at_a_time, nobody_else) }))
    }

    pub(super) fn roots(&self) -> Result<Vec<Chunk>, StoreError> {
        let images = self.index.images()?.into_iter().map(|image| image.root);
        Ok(images.chain(self.index.originals()?.into_iter().map(|original| original.root)).collect())
    }

    /// As far as its lists are right; what is wrong with the first that is not.
    pub(super) fn reach_listed(&self, root: &Chunk, reached: &mut Reached) -> Result<Option<String>, StoreError> {
        match self.reach(root, reached) {
            Ok(()) => Ok(None),
            Err(StoreError::Damaged(reason)) => Ok(Some(reason)),
            Err(error) => Err(error),
        }
    }

    fn reach(&self, root: &Chunk, reached: &mut Reached) -> Result<(), StoreError> {
        let mut add = |content: &Content| {
            reached.contents.entry(content.id()).or_insert_with(|| content.clone());
        };
        let bytes = self.chunk(root)?.ok_or_else(|| StoreError::Damaged("a root is gone".to_owned()))?;
        add(&Content { chunks: vec![(*root, bytes.len() as u32)] });
        if bytes.first() == Some(&crate::image::ORIGINAL) {
            add(&self.original_root(root)?.list);
            for blob in self.original_at(root)?.blobs {
                match &blob.source {
                    Source::Verbatim(content) => add(content),
                    Source::Recipe(recipe) => {
                        add(recipe);
                        self.recipe(recipe)?.contents().for_each(&mut add);
                    }
                }
                reached.blobs.insert(blob.digest, *root);
            }
            return Ok(());
        }
        let image = self.root(root)?;
        // The lists first: of what is on its way they may not all be here.
        image.lists().for_each(&mut add);
        for layer in &image.layers {
            Tree::contents(&self.tree(&layer.tree)?).for_each(&mut add);
            reached.layers.insert(layer.tree.id());
        }
        Ok(())
    }
}

impl Away {
    /// Removes them, the last first; how many bytes of files are free again. What stays goes at the next start.
    pub(super) fn free(mut self) -> u64 {
        self.freed + self.moved.drain(..).rev().filter_map(|path| remove(&path).ok()).sum::<u64>()
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        self.moved.iter().for_each(|path| drop(remove(path)));
    }
}

/// Removes a file or a folder, and tells how many bytes of a file are free again.
fn remove(path: &Path) -> io::Result<u64> {
    let found = fs::symlink_metadata(path)?;
    if found.is_dir() {
        return fs::remove_dir_all(path).map(|()| 0);
    }
    fs::remove_file(path).map(|()| own_blocks(&found))
}

/// Bytes that are free again when this is removed.
fn own_blocks(file: &fs::Metadata) -> u64 {
    if file.nlink() > 1 { 0 } else { file.blocks() * 512 }
}

/// What is in a folder; nothing, when that cannot be read.
fn folders(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

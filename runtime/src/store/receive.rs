//! Taking up an image's chunks as they come from other nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};

use super::index::{Changes, Location};
use super::{Held, HeldOriginal, Store, StoreError, lock, rewrite, spool};
use crate::image::{Chunk, Content, ContentId, MAX_CHUNK, MAX_ROOT, ORIGINAL, Recipe, Root, Source, Tree};

/// How much of a download a crash may cost.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// The most bytes of an image's config, and of its layers' trees together: both are read into memory.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_TREE: u64 = 256 << 20;
/// The most layers; docker's is 127.
const MAX_LAYERS: usize = 1024;
/// The most bytes of an image's files, as its trees state them.
const MAX_FILES: u64 = 256 << 30;
/// Chunks that are remembered as just written: those of about 64 GiB.
const MAX_FRESH: usize = 1 << 20;

/// What an image still needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Everything is here and unpacked.
    pub complete: bool,
    /// Whether `pieces` are the files' contents; before that they are the lists that name them.
    pub contents: bool,
    /// Distinct chunks of this stage, in the order in which the image names them.
    pub pieces: Vec<(Chunk, u32)>,
    /// Which of them are here.
    pub present: Vec<bool>,
}

/// What this life of the daemon has checked and written at its place: it is not read and checked once more when all of its
/// content is here. Of what is forgotten here everything is; so is what lies in a file that somebody else was the last to write
/// to, or in another file than this was written to.
#[derive(Default)]
pub(super) struct Fresh {
    contents: HashMap<ContentId, (Mark, BTreeSet<u64>)>,
    count: usize,
}

/// Which file, and when it was last written (the kernel's own time of that: the other may be set). A file that is new may have the
/// inode of one that is gone, but not its time of birth, where the file system has one.
#[derive(Copy, Clone, Default, PartialEq, Eq)]
struct Mark {
    inode: u64,
    born: Option<SystemTime>,
    written: (i64, i64),
}

impl Mark {
    fn of(file: &File, path: &Path) -> Result<Mark, StoreError> {
        let about = file.metadata().map_err(|error| StoreError::io("look at", path, error))?;
        Ok(Mark { inode: about.ino(), born: about.created().ok(), written: (about.ctime(), about.ctime_nsec()) })
    }
}

impl Fresh {
    /// A chunk was written there; the file's mark is from after that.
    fn written(&mut self, location: &Location, mark: Mark) {
        if self.count >= MAX_FRESH {
            *self = Fresh::default();
        }
        let (last, offsets) = self.contents.entry(location.content).or_default();
        if (last.inode, last.born) != (mark.inode, mark.born) {
            self.count -= offsets.len();
            (*last, *offsets) = (mark, BTreeSet::new());
        }
        // Another batch's chunk may have been written since, and be noted already.
        last.written = last.written.max(mark.written);
        self.count += usize::from(offsets.insert(location.offset));
    }

    /// Where in this file chunks of this content need no other look.
    fn take(&mut self, content: &ContentId, mark: Mark) -> BTreeSet<u64> {
        let Some((last, offsets)) = self.contents.remove(content) else { return BTreeSet::new() };
        self.count -= offsets.len();
        if last == mark { offsets } else { BTreeSet::new() }
    }

    /// The file of this content is gone.
    pub(super) fn forget(&mut self, content: &ContentId) {
        if let Some((_, offsets)) = self.contents.remove(content) {
            self.count -= offsets.len();
        }
    }
}

/// The lists that an image names, unless they are larger than any honest one's.
pub(super) fn lists_of(root: &Root) -> Result<Vec<&Content>, StoreError> {
    let trees = root.layers.iter().map(|layer| &layer.tree);
    let trees_size = trees.fold(0u64, |sum, tree| sum.saturating_add(tree.size()));
    if root.config.size() > MAX_CONFIG || trees_size > MAX_TREE || root.layers.len() > MAX_LAYERS {
        return Err(StoreError::Damaged("an image whose lists are larger than any honest one's".to_owned()));
    }
    Ok(root.lists().collect())
}

impl Store {
    /// Says what an image still needs, stage by stage: its root, the lists it names, the contents those name. When
    /// nothing is missing, makes it complete.
    pub fn survey(&self, root: &Chunk) -> Result<Missing, StoreError> {
        let _not_removed = self.changing();
        self.touched(root);
        if self.is_complete(root)? {
            self.tell_keepers(root)?;
            return Ok(Missing { complete: true, contents: true, pieces: Vec::new(), present: Vec::new() });
        }
        // A root's length is not known beforehand; it is bounded when it comes.
        let mut stage = self.stage(false, vec![(*root, 0)], BTreeMap::new())?;
        self.recheck(&mut stage)?;
        if !stage.present[0] {
            return Ok(stage);
        }
        if self.chunk(root)?.is_some_and(|bytes| bytes.first() == Some(&ORIGINAL)) {
            return self.survey_original(root);
        }
        let parsed = self.root(root)?;
        let lists = lists_of(&parsed)?;
        let mut stage = self.contents_stage(false, &lists)?;
        self.recheck(&mut stage)?;
        if stage.present.iter().any(|here| !here) {
            return Ok(stage);
        }
        let trees = self.trees(&parsed)?;
        let contents: Vec<&Content> = trees.iter().flat_map(Tree::contents).collect();
        if contents.iter().fold(0u64, |sum, content| sum.saturating_add(content.size())) > MAX_FILES {
            return Err(StoreError::Damaged(format!("an image of more than {MAX_FILES} bytes")));
        }
        let stage = self.contents_stage(true, &contents)?;
        if stage.present.iter().any(|here| !here) {
            return Ok(stage);
        }
        let lost = self.complete(root, &parsed, &trees, &stage.pieces)?;
        if lost.is_empty() {
            return Ok(Missing { complete: true, ..stage });
        }
        // The disk does not hold what the index says: those chunks are fetched again.
        self.index.forget(&lost)?;
        self.contents_stage(true, &contents)
    }

    /// The same for an original: its list, the recipes that names, the contents.
    fn survey_original(&self, root: &Chunk) -> Result<Missing, StoreError> {
        let list = self.original_root(root)?.list;
        let too_large = || StoreError::Damaged("an original whose lists are larger than any honest one's".to_owned());
        if list.size() > MAX_TREE {
            return Err(too_large());
        }
        let mut stage = self.contents_stage(false, &[&list])?;
        self.recheck(&mut stage)?;
        if stage.present.iter().any(|here| !here) {
            return Ok(stage);
        }
        let original = self.original_at(root)?;
        let sources = || original.blobs.iter().map(|blob| &blob.source);
        let recipes: Vec<&Content> = sources()
            .filter_map(|source| if let Source::Recipe(recipe) = source { Some(recipe) } else { None })
            .collect();
        if recipes.iter().fold(0u64, |sum, recipe| sum.saturating_add(recipe.size())) > MAX_TREE {
            return Err(too_large());
        }
        let mut stage = self.contents_stage(false, &recipes)?;
        self.recheck(&mut stage)?;
        if stage.present.iter().any(|here| !here) {
            return Ok(stage);
        }
        let recipes = recipes.into_iter().map(|recipe| self.recipe(recipe)).collect::<Result<Vec<Recipe>, _>>()?;
        let verbatim =
            sources().filter_map(|source| if let Source::Verbatim(content) = source { Some(content) } else { None });
        let contents: Vec<&Content> = verbatim.chain(recipes.iter().flat_map(Recipe::contents)).collect();
        if contents.iter().fold(0u64, |sum, content| sum.saturating_add(content.size())) > MAX_FILES {
            return Err(StoreError::Damaged(format!("an original of more than {MAX_FILES} bytes")));
        }
        let stage = self.contents_stage(true, &contents)?;
        if stage.present.iter().any(|here| !here) {
            return Ok(stage);
        }
        let losses = self.losses();
        let (done, lost) = self.assemble_all(contents.iter().copied())?;
        if !lost.is_empty() {
            self.index.forget(&lost)?;
            return self.contents_stage(true, &contents);
        }
        // Others may be given them by these digests.
        if let Some(wrong) = self.wrong_blobs(&original)?.first() {
            return Err(StoreError::Damaged(format!("an original in which {wrong} is something else")));
        }
        self.sync_since(losses)?;
        let (digest, size) = (original.manifest().digest, original.own_size() + list.size());
        let held = HeldOriginal { root: *root, digest, size };
        let blobs = original.blobs.iter().map(|blob| blob.digest).collect();
        let changes = Changes { contents: done, originals: vec![(held, blobs)], ..Changes::default() };
        self.index.add(&changes, true)?;
        Ok(Missing { complete: true, ..stage })
    }

    /// Checks a chunk and keeps it. Seen by others at once; on disk within [`COMMIT_EVERY`].
    pub fn put_chunks(&self, chunks: Vec<(Chunk, Vec<u8>)>) -> Result<(), StoreError> {
        let _not_removed = self.changing();
        let losses = self.losses();
        let mut changes = Changes::default();
        let wrong = |(chunk, bytes): &&(Chunk, Vec<u8>)| blake3::hash(bytes) != *chunk || bytes.len() > MAX_ROOT;
        if let Some((chunk, _)) = chunks.iter().find(wrong) {
            return Err(StoreError::WrongChunk(*chunk));
        }
        let mut last: Option<(ContentId, File)> = None;
        // Bytes that were written to it.
        let mut fresh = 0;
        for (chunk, bytes) in chunks {
            let awaited = lock(&self.awaited).remove(&chunk);
            let len = bytes.len() as u32;
            let location = match awaited {
                Some(location) if location.len == len => location,
                // A root, or a length that its list had wrong; by itself it is whole under its own hash.
                _ => Location { content: chunk, offset: 0, len },
            };
            let path = self.object(&location.content);
            let (_, file) = match last.take() {
                Some(same) if same.0 == location.content => last.insert(same),
                other => {
                    other.iter().for_each(|(_, file)| spool::begin(file, fresh));
                    fresh = 0;
                    last.insert((location.content, self.open_object(&location.content)?))
                }
            };
            rewrite(file, || file.write_all_at(&bytes, location.offset))
                .map_err(|error| StoreError::io("write", &path, error))?;
            fresh += bytes.len();
            let mark = Mark::of(file, &path)?;
            lock(&self.fresh).written(&location, mark);
            changes.chunks.push((chunk, location));
        }
        last.iter().for_each(|(_, file)| spool::begin(file, fresh));
        let durable = {
            let mut last = lock(&self.last_commit);
            let due = last.elapsed() >= COMMIT_EVERY;
            if due {
                *last = Instant::now();
            }
            due
        };
        if durable {
            self.sync()?;
        }
        let came: Vec<Chunk> = changes.chunks.iter().map(|(chunk, _)| *chunk).collect();
        lock(&self.unsynced).extend(&came);
        self.index.add(&changes, durable)?;
        let lost = self.none_lost_since(losses);
        if lost.is_err() {
            // Another was told that the disk did not take what was written meanwhile, perhaps this.
            self.index.forget(&came)?;
        }
        lost
    }

    /// Lists that the disk has lost, or changed, are fetched again.
    fn recheck(&self, stage: &mut Missing) -> Result<(), StoreError> {
        for ((chunk, _), here) in stage.pieces.iter().zip(&mut stage.present) {
            if *here && self.chunk(chunk)?.is_none() {
                self.index.forget(&[*chunk])?;
                *here = false;
            }
        }
        Ok(())
    }

    fn contents_stage(&self, contents: bool, list: &[&Content]) -> Result<Missing, StoreError> {
        let mut pieces = Vec::new();
        let mut seen = BTreeSet::new();
        let mut places = BTreeMap::new();
        for content in list {
            for (chunk, at) in Location::of(content, content.id()) {
                let len = at.len;
                // A chunk has one length. A list that states another could have a file cut to it that is somebody else's.
                let known = self.index.chunk(&chunk)?;
                if known.is_some_and(|location| location.len != len) {
                    return Err(StoreError::Damaged(format!("an image that names a chunk with a wrong length, {len}")));
                }
                if len as usize > MAX_CHUNK {
                    return Err(StoreError::Damaged(format!("an image that names a chunk of {len} bytes")));
                }
                if seen.insert(chunk) {
                    pieces.push((chunk, len));
                    places.insert(chunk, at);
                }
            }
        }
        self.stage(contents, pieces, places)
    }

    fn stage(
        &self,
        contents: bool,
        pieces: Vec<(Chunk, u32)>,
        places: BTreeMap<Chunk, Location>,
    ) -> Result<Missing, StoreError> {
        let present = self.index.have(pieces.iter().map(|(chunk, _)| chunk))?;
        let mut awaited = lock(&self.awaited);
        for ((chunk, _), here) in pieces.iter().zip(&present) {
            if let Some(place) = places.get(chunk).filter(|_| !here) {
                awaited.insert(*chunk, *place);
            }
        }
        Ok(Missing { complete: false, contents, pieces, present })
    }

    /// Every chunk is somewhere: brings each content together in its own file, unpacks, and says so. Chunks that are
    /// not what they were when they came are returned, and the image is then not complete.
    fn complete(
        &self,
        root: &Chunk,
        parsed: &Root,
        trees: &[Tree],
        pieces: &[(Chunk, u32)],
    ) -> Result<Vec<Chunk>, StoreError> {
        let losses = self.losses();
        let config = self.content(&parsed.config)?;
        let (contents, lost) = self.assemble_all(trees.iter().flat_map(Tree::contents))?;
        if !lost.is_empty() {
            return Ok(lost);
        }
        self.sync_since(losses)?;
        self.index.add(&Changes { contents, ..Changes::default() }, true)?;
        self.make_rootfs(root, parsed, trees)?;
        let listed: u64 = parsed.lists().map(Content::size).sum();
        let size = pieces.iter().map(|(_, len)| u64::from(*len)).sum::<u64>() + listed + parsed.encode().len() as u64;
        let held = Held { id: Sha256::digest(&config).into(), root: *root, size };
        self.index.add(&Changes { images: vec![held], ..Changes::default() }, true)?;
        self.tell_keepers(root)?;
        Ok(Vec::new())
    }

    /// Brings contents together that are not yet; those, and chunks that are not what they were when they came.
    fn assemble_all<'a>(
        &self,
        contents: impl Iterator<Item = &'a Content>,
    ) -> Result<(Vec<ContentId>, Vec<Chunk>), StoreError> {
        let (mut met, mut done, mut lost) = (BTreeSet::new(), Vec::new(), Vec::new());
        for content in contents {
            let id = content.id();
            if met.insert(id) && !(self.index.content(&id)? && self.object(&id).exists()) {
                self.assemble(content, &id, &mut lost)?;
                done.push(id);
            }
        }
        Ok((done, lost))
    }

    fn assemble(&self, content: &Content, id: &ContentId, lost: &mut Vec<Chunk>) -> Result<(), StoreError> {
        let path = self.object(id);
        let file = self.open_object(id)?;
        let fresh = lock(&self.fresh).take(id, Mark::of(&file, &path)?);
        rewrite(&file, || file.set_len(content.size())).map_err(|error| StoreError::io("size", &path, error))?;
        for (chunk, here) in Location::of(content, *id) {
            let at_its_place = self.index.chunk(&chunk)? == Some(here);
            if !(at_its_place && fresh.contains(&here.offset)) {
                match self.chunk(&chunk)? {
                    None => lost.push(chunk),
                    Some(_) if at_its_place => {}
                    Some(bytes) => {
                        let written = rewrite(&file, || file.write_all_at(&bytes, here.offset));
                        written.map_err(|error| StoreError::io("write", &path, error))?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_known_by_its_file() {
        let born = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let mark = |inode, at, nanoseconds| Mark { inode, born: born(at), written: (5, nanoseconds) };
        let (content, location) = ([1; 32], |offset| Location { content: [1; 32], offset, len: 1 });
        let mut fresh = Fresh::default();
        fresh.written(&location(0), mark(7, 1, 1));
        fresh.written(&location(9), mark(7, 1, 2));
        assert_eq!(fresh.take(&content, mark(7, 1, 2)), BTreeSet::from([0, 9]));
        fresh.written(&location(0), mark(7, 1, 1));
        assert_eq!(fresh.take(&content, mark(7, 1, 2)), BTreeSet::new(), "somebody has written to it since");
        fresh.written(&location(0), mark(7, 1, 1));
        // The file is gone, and the next has its inode.
        fresh.written(&location(9), mark(7, 2, 2));
        assert_eq!(fresh.take(&content, mark(7, 2, 2)), BTreeSet::from([9]));
        fresh.written(&location(0), mark(7, 1, 1));
        fresh.forget(&content);
        assert_eq!(fresh.take(&content, mark(7, 1, 1)), BTreeSet::new());
        assert_eq!(fresh.count, 0);
    }
}

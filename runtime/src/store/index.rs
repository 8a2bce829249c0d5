//! The store's index: redb, one table for each question.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use redb::{Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, Table, TableDefinition};

use super::{Held, HeldOriginal, StoreError};
use crate::image::{Chunk, Content, ContentId};

/// Chunk → content, offset, length.
const CHUNKS: TableDefinition<&[u8; 32], ([u8; 32], u64, u32)> = TableDefinition::new("chunks");
/// Contents whose file is whole.
const CONTENTS: TableDefinition<&[u8; 32], ()> = TableDefinition::new("contents");
/// Layers whose folder is whole, by their tree's id.
const LAYERS: TableDefinition<&[u8; 32], ()> = TableDefinition::new("layers");
/// Complete images: root chunk → id, size.
const IMAGES: TableDefinition<&[u8; 32], ([u8; 32], u64)> = TableDefinition::new("images");

/// Originals that are complete: root chunk → manifest's digest, bytes beyond the images' own.
const ORIGINALS: TableDefinition<&[u8; 32], ([u8; 32], u64)> = TableDefinition::new("originals");
/// Blob → the original that it is part of.
const BLOBS: TableDefinition<&[u8; 32], [u8; 32]> = TableDefinition::new("blobs");

/// What was complete, was found damaged, and is not complete again yet.
const DOUBTED: TableDefinition<&[u8; 32], ()> = TableDefinition::new("doubted");

/// The index's own memory; what is read often is small.
const CACHE: usize = 4 << 20;

/// Where a chunk lies.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) content: ContentId,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Location {
    /// Where a content's chunks lie in its own file, in order.
    pub(super) fn of(content: &Content, id: ContentId) -> impl Iterator<Item = (Chunk, Location)> + use<'_> {
        let mut offset = 0;
        content.chunks.iter().map(move |(chunk, len)| {
            let at = Location { content: id, offset, len: *len };
            offset += u64::from(*len);
            (*chunk, at)
        })
    }
}

pub(super) struct Index {
    db: Database,
}

/// Where chunks lay at one time.
#[derive(Debug)]
pub(super) struct Places(ReadOnlyTable<&'static [u8; 32], ([u8; 32], u64, u32)>);

impl Places {
    pub(super) fn of(&self, chunk: &Chunk) -> Result<Option<Location>, StoreError> {
        let found = self.0.get(chunk).map_err(failed)?;
        Ok(found.map(|entry| {
            let (content, offset, len) = entry.value();
            Location { content, offset, len }
        }))
    }
}

/// What one commit adds.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) chunks: Vec<(Chunk, Location)>,
    pub(super) contents: Vec<ContentId>,
    pub(super) images: Vec<Held>,
    /// Each with its blobs.
    pub(super) originals: Vec<(HeldOriginal, Vec<[u8; 32]>)>,
}

/// What one commit takes away.
pub(super) struct Removal {
    pub(super) roots: Vec<Chunk>,
    pub(super) contents: Vec<ContentId>,
    pub(super) layers: Vec<ContentId>,
    /// Chunks that lay in those contents, and where else they lie.
    pub(super) chunks: BTreeMap<Chunk, Option<Location>>,
    /// Blobs of the originals that stay, and which has them.
    pub(super) blobs: BTreeMap<[u8; 32], Chunk>,
}

/// What is not known any more, because it is damaged.
pub(super) struct Doubt {
    pub(super) chunks: BTreeSet<Chunk>,
    pub(super) contents: BTreeSet<ContentId>,
    /// Nor that the image or original is complete.
    pub(super) incomplete: bool,
    /// Blobs of other originals, and which has them.
    pub(super) blobs: BTreeMap<[u8; 32], Chunk>,
}

/// Blobs of what is gone are looked for in what else has them.
fn leave_to_others(
    table: &mut Table<&[u8; 32], [u8; 32]>,
    gone: &[Chunk],
    others: &BTreeMap<[u8; 32], Chunk>,
) -> Result<(), StoreError> {
    let mut left = Vec::new();
    let stays = |blob: &[u8; 32], root: Chunk| {
        let goes = gone.contains(&root);
        if goes {
            left.push(*blob);
        }
        !goes
    };
    table.retain(stays).map_err(failed)?;
    for (blob, root) in left.iter().filter_map(|blob| Some((blob, others.get(blob)?))) {
        table.insert(blob, *root).map_err(failed)?;
    }
    Ok(())
}

fn failed(error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Io(error) => StoreError::io("write", Path::new("index.redb"), error),
        other => StoreError::Index(other.to_string()),
    }
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Index, StoreError> {
        let db = Database::builder().set_cache_size(CACHE).create(path).map_err(failed)?;
        let write = db.begin_write().map_err(failed)?;
        write.open_table(CHUNKS).map_err(failed)?;
        write.open_table(CONTENTS).map_err(failed)?;
        write.open_table(LAYERS).map_err(failed)?;
        write.open_table(IMAGES).map_err(failed)?;
        write.open_table(ORIGINALS).map_err(failed)?;
        write.open_table(BLOBS).map_err(failed)?;
        write.open_table(DOUBTED).map_err(failed)?;
        write.commit().map_err(failed)?;
        Ok(Index { db })
    }

    /// Where chunks lie now: to look up several.
    pub(super) fn places(&self) -> Result<Places, StoreError> {
        Ok(Places(self.db.begin_read().map_err(failed)?.open_table(CHUNKS).map_err(failed)?))
    }

    pub(super) fn chunk(&self, chunk: &Chunk) -> Result<Option<Location>, StoreError> {
        self.places()?.of(chunk)
    }

    /// Which of `chunks` are here.
    pub(super) fn have<'a>(&self, chunks: impl Iterator<Item = &'a Chunk>) -> Result<Vec<bool>, StoreError> {
        let places = self.places()?;
        chunks.map(|chunk| Ok(places.of(chunk)?.is_some())).collect()
    }

    /// Whether all of `chunks` are here.
    pub(super) fn has_chunks<'a>(&self, chunks: impl Iterator<Item = &'a Chunk>) -> Result<bool, StoreError> {
        let places = self.places()?;
        for chunk in chunks {
            if places.of(chunk)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn content(&self, id: &ContentId) -> Result<bool, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(CONTENTS).map_err(failed)?;
        Ok(table.get(id).map_err(failed)?.is_some())
    }

    /// Whether all of these are whole.
    pub(super) fn has_contents<'a>(&self, ids: impl Iterator<Item = &'a ContentId>) -> Result<bool, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(CONTENTS).map_err(failed)?;
        for id in ids {
            if table.get(id).map_err(failed)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn layer(&self, id: &ContentId) -> Result<bool, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(LAYERS).map_err(failed)?;
        Ok(table.get(id).map_err(failed)?.is_some())
    }

    pub(super) fn image(&self, root: &Chunk) -> Result<Option<Held>, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(IMAGES).map_err(failed)?;
        let found = table.get(root).map_err(failed)?;
        Ok(found.map(|entry| Held { root: *root, id: entry.value().0, size: entry.value().1 }))
    }

    pub(super) fn images(&self) -> Result<Vec<Held>, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(IMAGES).map_err(failed)?;
        let mut images = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (root, value) = entry.map_err(failed)?;
            images.push(Held { root: *root.value(), id: value.value().0, size: value.value().1 });
        }
        Ok(images)
    }

    pub(super) fn originals(&self) -> Result<Vec<HeldOriginal>, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(ORIGINALS).map_err(failed)?;
        let mut originals = Vec::new();
        for entry in table.iter().map_err(failed)? {
            let (root, value) = entry.map_err(failed)?;
            let (digest, size) = value.value();
            originals.push(HeldOriginal { root: *root.value(), digest, size });
        }
        Ok(originals)
    }

    pub(super) fn original(&self, root: &Chunk) -> Result<bool, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(ORIGINALS).map_err(failed)?;
        Ok(table.get(root).map_err(failed)?.is_some())
    }

    /// The original that has a blob.
    pub(super) fn blob(&self, digest: &[u8; 32]) -> Result<Option<Chunk>, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(BLOBS).map_err(failed)?;
        Ok(table.get(digest).map_err(failed)?.map(|entry| entry.value()))
    }

    pub(super) fn add_layer(&self, id: &ContentId) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        write.open_table(LAYERS).map_err(failed)?.insert(id, ()).map_err(failed)?;
        write.commit().map_err(failed)
    }

    /// Forgets where chunks lie.
    pub(super) fn forget(&self, chunks: &[Chunk]) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        {
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for chunk in chunks {
                table.remove(chunk).map_err(failed)?;
            }
        }
        write.commit().map_err(failed)
    }

    /// Forgets what of this image or original is damaged.
    pub(super) fn doubt(&self, root: &Chunk, doubt: &Doubt) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        {
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for chunk in &doubt.chunks {
                table.remove(chunk).map_err(failed)?;
            }
            let mut table = write.open_table(CONTENTS).map_err(failed)?;
            for content in &doubt.contents {
                table.remove(content).map_err(failed)?;
            }
            if doubt.incomplete {
                write.open_table(IMAGES).map_err(failed)?.remove(root).map_err(failed)?;
                write.open_table(ORIGINALS).map_err(failed)?.remove(root).map_err(failed)?;
                write.open_table(DOUBTED).map_err(failed)?.insert(root, ()).map_err(failed)?;
                leave_to_others(&mut write.open_table(BLOBS).map_err(failed)?, &[*root], &doubt.blobs)?;
            }
        }
        write.commit().map_err(failed)
    }

    /// These chunks are to be looked for there, wherever they were before.
    pub(super) fn point(&self, places: &[(Chunk, Location)]) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        {
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for (chunk, at) in places {
                table.insert(chunk, (at.content, at.offset, at.len)).map_err(failed)?;
            }
        }
        write.commit().map_err(failed)
    }

    /// What was found damaged, and is not complete again yet.
    pub(super) fn doubted(&self) -> Result<Vec<Chunk>, StoreError> {
        let table = self.db.begin_read().map_err(failed)?.open_table(DOUBTED).map_err(failed)?;
        let roots = table.iter().map_err(failed)?.map(|entry| Ok(*entry.map_err(failed)?.0.value()));
        roots.collect()
    }

    /// Takes all of it away or nothing.
    pub(super) fn remove(&self, removal: &Removal) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        {
            let mut images = write.open_table(IMAGES).map_err(failed)?;
            let mut originals = write.open_table(ORIGINALS).map_err(failed)?;
            let mut doubted = write.open_table(DOUBTED).map_err(failed)?;
            for root in &removal.roots {
                images.remove(root).map_err(failed)?;
                originals.remove(root).map_err(failed)?;
                doubted.remove(root).map_err(failed)?;
            }
            let mut table = write.open_table(CONTENTS).map_err(failed)?;
            for content in &removal.contents {
                table.remove(content).map_err(failed)?;
            }
            let mut table = write.open_table(LAYERS).map_err(failed)?;
            for layer in &removal.layers {
                table.remove(layer).map_err(failed)?;
            }
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for (chunk, elsewhere) in &removal.chunks {
                match elsewhere {
                    Some(at) => drop(table.insert(chunk, (at.content, at.offset, at.len)).map_err(failed)?),
                    None => drop(table.remove(chunk).map_err(failed)?),
                }
            }
            leave_to_others(&mut write.open_table(BLOBS).map_err(failed)?, &removal.roots, &removal.blobs)?;
        }
        write.commit().map_err(failed)
    }

    /// Forgets contents that go, what lies in them but for what lies `elsewhere` too, and layers that go.
    pub(super) fn sweep(
        &self,
        elsewhere: &BTreeMap<Chunk, Option<Location>>,
        goes: &dyn Fn(&ContentId) -> bool,
        layer_goes: &dyn Fn(&ContentId) -> bool,
    ) -> Result<(), StoreError> {
        let write = self.db.begin_write().map_err(failed)?;
        {
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for (chunk, at) in elsewhere.iter().filter_map(|(chunk, at)| Some((chunk, at.as_ref()?))) {
                table.insert(chunk, (at.content, at.offset, at.len)).map_err(failed)?;
            }
            table.retain(|_, (content, ..)| !goes(&content)).map_err(failed)?;
            write.open_table(CONTENTS).map_err(failed)?.retain(|id, ()| !goes(id)).map_err(failed)?;
            write.open_table(LAYERS).map_err(failed)?.retain(|id, ()| !layer_goes(id)).map_err(failed)?;
        }
        write.commit().map_err(failed)
    }

    /// Adds all of it or nothing. Without `durable` it is seen at once and on disk with the next durable commit.
    pub(super) fn add(&self, changes: &Changes, durable: bool) -> Result<(), StoreError> {
        let mut write = self.db.begin_write().map_err(failed)?;
        if !durable {
            write.set_durability(Durability::None).map_err(|error| StoreError::Index(error.to_string()))?;
        }
        {
            // While an image comes there are chunks alone, and many commits.
            let mut table = write.open_table(CHUNKS).map_err(failed)?;
            for (chunk, at) in &changes.chunks {
                // Where it was first is as good as where it is now.
                if table.get(chunk).map_err(failed)?.is_none() {
                    table.insert(chunk, (at.content, at.offset, at.len)).map_err(failed)?;
                }
            }
            if !changes.contents.is_empty() {
                let mut table = write.open_table(CONTENTS).map_err(failed)?;
                for content in &changes.contents {
                    table.insert(content, ()).map_err(failed)?;
                }
            }
            if !changes.images.is_empty() {
                let mut table = write.open_table(IMAGES).map_err(failed)?;
                let mut doubted = write.open_table(DOUBTED).map_err(failed)?;
                for image in &changes.images {
                    table.insert(&image.root, (image.id, image.size)).map_err(failed)?;
                    doubted.remove(&image.root).map_err(failed)?;
                }
            }
            if !changes.originals.is_empty() {
                let mut table = write.open_table(ORIGINALS).map_err(failed)?;
                let mut doubted = write.open_table(DOUBTED).map_err(failed)?;
                let mut blobs_table = write.open_table(BLOBS).map_err(failed)?;
                for (original, blobs) in &changes.originals {
                    table.insert(&original.root, (original.digest, original.size)).map_err(failed)?;
                    doubted.remove(&original.root).map_err(failed)?;
                    for blob in blobs {
                        // This one was looked at a moment ago; what had it before may be damaged by now.
                        blobs_table.insert(blob, original.root).map_err(failed)?;
                    }
                }
            }
        }
        write.commit().map_err(failed)
    }
}

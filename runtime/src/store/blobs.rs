//! Blobs by their SHA-256, out of the originals that are complete here.

use std::fs::File;
use std::io;

use super::{HeldOriginal, Store, StoreError, hex};
use crate::image::{Blob, BlobReader, Chunk, Content, Open, Original, OriginalRoot, Recipe, Source, digest_text};

impl Store {
    /// Every complete original.
    pub fn originals(&self) -> Result<Vec<HeldOriginal>, StoreError> {
        self.index.originals()
    }

    /// A complete original; `None` when it is not.
    pub fn original(&self, root: &Chunk) -> Result<Option<Original>, StoreError> {
        if !self.index.original(root)? {
            return Ok(None);
        }
        self.original_at(root).map(Some)
    }

    /// The list of an original whose chunks up to it are here.
    pub(super) fn original_at(&self, root: &Chunk) -> Result<Original, StoreError> {
        let list = self.original_root(root)?.list;
        Original::decode(&self.content(&list)?).map_err(StoreError::Damaged)
    }

    pub(super) fn original_root(&self, root: &Chunk) -> Result<OriginalRoot, StoreError> {
        let bytes = self.chunk(root)?.ok_or_else(|| StoreError::Damaged(format!("original {} is gone", hex(root))))?;
        let parsed = OriginalRoot::decode(&bytes);
        parsed.unwrap_or_else(|| Err("it is an image's".to_owned())).map_err(StoreError::Damaged)
    }

    /// A blob of a complete original, and its bytes; `None` when none has it.
    pub fn blob(&self, digest: &[u8; 32]) -> Result<Option<(Blob, BlobReader)>, StoreError> {
        let Some(root) = self.index.blob(digest)? else { return Ok(None) };
        match self.blob_of(&root, digest) {
            // Whoever asks has it from another node, or brings it again.
            Err(StoreError::Damaged(_)) => Ok(None),
            read => read.map(Some),
        }
    }

    fn blob_of(&self, root: &Chunk, digest: &[u8; 32]) -> Result<(Blob, BlobReader), StoreError> {
        let original = self.original_at(root)?;
        let blob = original.blobs.into_iter().find(|blob| blob.digest == *digest);
        let blob = blob.ok_or_else(|| StoreError::Damaged(format!("blob {} is in no list", hex(digest))))?;
        let reader = self.read_blob(&blob)?;
        Ok((blob, reader))
    }

    /// The bytes of a blob of a complete original.
    pub fn read_blob(&self, blob: &Blob) -> Result<BlobReader, StoreError> {
        let failed = |source| StoreError::io("read a part of", &self.dir, source);
        match &blob.source {
            Source::Verbatim(content) => Ok(BlobReader::verbatim(blob, self.opener()(content).map_err(failed)?)),
            Source::Recipe(recipe) => {
                let recipe = self.recipe(recipe)?;
                BlobReader::recipe(blob, recipe, self.opener()).map_err(failed)
            }
        }
    }

    /// Blobs whose bytes are not what their digest says.
    pub(super) fn wrong_blobs(&self, original: &Original) -> Result<Vec<String>, StoreError> {
        let mut wrong = Vec::new();
        for blob in &original.blobs {
            if io::copy(&mut self.read_blob(blob)?, &mut io::sink()).is_err() {
                wrong.push(format!("blob {}", digest_text(&blob.digest)));
            }
        }
        Ok(wrong)
    }

    pub(super) fn recipe(&self, recipe: &Content) -> Result<Recipe, StoreError> {
        Recipe::decode(&self.content(recipe)?).map_err(StoreError::Damaged)
    }

    /// Opens contents that lie whole in their files.
    fn opener(&self) -> Open {
        let dir = self.dir.clone();
        Box::new(move |content| {
            if content.chunks.is_empty() {
                return Ok(Box::new(io::empty()));
            }
            let file = File::open(super::object_in(&dir, &content.id()))?;
            Ok(Box::new(io::BufReader::with_capacity(256 * 1024, file)))
        })
    }
}

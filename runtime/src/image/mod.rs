//! Images: from archives of real tools into trees of entries and distinct contents, and from those into folders.
//!
//! An image here is a [`Root`]: its OCI config, verbatim, and a [`Tree`] for each layer. A tree lists every entry of
//! the layer with its metadata; a regular file names its content by the chunks it consists of. Root and trees are
//! contents themselves, cut and named in the same way, so an image is fetched by following hashes from one chunk. What
//! it was made of, bit for bit, is kept beside it as an [`Original`].
//!
//! Encodings are postcard (a specified, stable format) and versioned by [`VERSION`]: they are hashed, so a change is a
//! new version, never an edit.

mod archive;
mod chunker;
mod config;
pub mod erofs;
mod layer;
pub mod media;
mod original;
#[cfg(test)]
mod tests;
mod unpack;

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use archive::{ImportError, Imported, Limits, OpenBlob, Progress, Pushed, import, import_pushed};
pub(crate) use archive::{Metered, read_full};
pub(crate) use chunker::content_of;
pub use chunker::{Chunker, MAX_CHUNK, WHOLE};
pub use config::{ARCHITECTURE, ConfigError, HealthCheck, ImageConfig, Process};
pub(crate) use original::Open;
pub use original::{Blob, BlobReader, MAX_BLOBS, ORIGINAL, Original, OriginalRoot, Recipe, Source};
pub use unpack::{UnpackError, unpack};

/// The version of the encodings in this module.
pub const VERSION: u8 = 1;
/// The most bytes an image's root may have: a thousand layers.
pub const MAX_ROOT: usize = 4 << 20;

/// SHA-256 of `bytes`, hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(bytes))
}

/// A SHA-256 as images name it: `sha256:<hex>`.
pub fn digest_text(digest: &[u8; 32]) -> String {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(digest))
}

/// The bytes of `sha256:<hex>`.
pub fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let hex = text.strip_prefix("sha256:")?;
    data_encoding::HEXLOWER.decode(hex.as_bytes()).ok()?.try_into().ok()
}

/// BLAKE3 of a chunk's bytes.
pub type Chunk = [u8; 32];
/// Names a content; see [`Content::id`].
pub type ContentId = [u8; 32];

/// A sequence of bytes, cut into chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Chunks in order, each with its length in bytes.
    pub chunks: Vec<(Chunk, u32)>,
}

impl Content {
    /// Of a single chunk, its hash; of more, the hash of their list; of none, the hash of nothing.
    pub fn id(&self) -> ContentId {
        match self.chunks.as_slice() {
            [] => *blake3::hash(b"").as_bytes(),
            [(chunk, _)] => *chunk,
            many => {
                let mut hasher = blake3::Hasher::new_derive_key("moyai content v1");
                for (chunk, len) in many {
                    hasher.update(chunk);
                    hasher.update(&len.to_le_bytes());
                }
                *hasher.finalize().as_bytes()
            }
        }
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.chunks.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

/// Everything an image is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// [`VERSION`].
    pub version: u8,
    /// The OCI config, verbatim; its SHA-256 is the image's id.
    pub config: Content,
    /// From the lowest to the topmost.
    pub layers: Vec<Layer>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// SHA-256 of the uncompressed tar archive it came as.
    pub diff_id: [u8; 32],
    /// An encoded [`Tree`].
    pub tree: Content,
}

/// All entries of a layer, sorted by path, so that a folder comes before what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Them.
    pub entries: Vec<Entry>,
}

/// One entry of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative, without `.` or `..`; bytes, because a path is no text.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, in seconds since 1970.
    pub mtime: i64,
    /// Extended attributes.
    #[serde(deserialize_with = "few")]
    pub xattrs: Attributes,
}

/// Names and values.
type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// The most entries a layer may have.
const MAX_ENTRIES: usize = 2_000_000;
/// Bytes an entry takes in memory besides its path and attributes, about.
const ENTRY: usize = 160;
/// And an attribute besides its bytes.
const ATTRIBUTE: usize = 64;
/// The most bytes that the extended attributes of one entry may take (the kernel's XATTR_SIZE_MAX).
const MAX_XATTRS: usize = 64 * 1024;
/// And all entries of a layer, besides their contents: as much as an import of it may hold.
const MAX_TREE: usize = archive::MAX_METADATA as usize;

/// What attributes take in memory.
fn weight(xattrs: &[(Vec<u8>, Vec<u8>)]) -> usize {
    xattrs.iter().map(|(key, value)| key.len() + value.len() + ATTRIBUTE).sum()
}

/// Attributes of an entry that may be made up: two bytes are one that takes fifty in memory.
fn few<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Attributes, D::Error> {
    struct Few;
    impl<'de> Visitor<'de> for Few {
        type Value = Attributes;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("extended attributes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Attributes, A::Error> {
            let (mut all, mut taken) = (Vec::new(), 0);
            while let Some(one) = seq.next_element()? {
                taken += weight(std::slice::from_ref(&one));
                if taken > MAX_XATTRS {
                    return Err(A::Error::custom("more extended attributes than a file can have"));
                }
                all.push(one);
            }
            Ok(all)
        }
    }
    deserializer.deserialize_seq(Few)
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A folder; `opaque` hides what lower layers have in it.
    Directory {
        /// See above.
        opaque: bool,
    },
    /// A regular file.
    File(Content),
    /// A symbolic link to these bytes.
    Symlink(Vec<u8>),
    /// Another name for a regular file of this layer.
    Hardlink(Vec<u8>),
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// What lower layers have here is gone.
    Whiteout,
}

/// Whether overlayfs would obey an attribute of this name.
pub(crate) fn is_overlay_mark(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

impl Root {
    /// What names the image's contents: its config, then its layers' trees.
    pub fn lists(&self) -> impl Iterator<Item = &Content> {
        [&self.config].into_iter().chain(self.layers.iter().map(|layer| &layer.tree))
    }

    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a plain value always encodes")
    }

    /// From bytes whose hash was checked.
    pub fn decode(bytes: &[u8]) -> Result<Root, String> {
        let root: Root = postcard::from_bytes(bytes).map_err(|error| format!("a malformed image root: {error}"))?;
        if root.version != VERSION {
            return Err(format!("an image root of version {}, this release knows {VERSION}", root.version));
        }
        Ok(root)
    }
}

impl Tree {
    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a plain value always encodes")
    }

    /// From bytes whose hash was checked. They come from a peer that may have made them up, so paths are checked again.
    pub fn decode(bytes: &[u8]) -> Result<Tree, String> {
        // One by one: entries that say next to nothing take twenty times their bytes in memory.
        let malformed = |error: postcard::Error| format!("a malformed layer tree: {error}");
        let (count, mut rest) = postcard::take_from_bytes::<usize>(bytes).map_err(malformed)?;
        let (mut tree, mut taken) = (Tree::default(), 0);
        for _ in 0..count {
            let (entry, after) = postcard::take_from_bytes::<Entry>(rest).map_err(malformed)?;
            if tree.entries.last().is_some_and(|last| last.path >= entry.path) {
                return Err("a layer tree out of order".to_owned());
            }
            taken += ENTRY + entry.path.len() + weight(&entry.xattrs);
            if taken > MAX_TREE || tree.entries.len() == MAX_ENTRIES {
                return Err("a layer tree that is larger than any honest one".to_owned());
            }
            tree.entries.push(entry);
            rest = after;
        }
        let folders: BTreeSet<&[u8]> = tree
            .entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::Directory { .. }))
            .map(|entry| entry.path.as_slice())
            .collect();
        let adrift = |path: &[u8]| {
            let parent = path.iter().rposition(|byte| *byte == b'/').map(|at| &path[..at]);
            parent.is_some_and(|parent| !folders.contains(parent))
        };
        if let Some(entry) = tree.entries.iter().find(|entry| adrift(&entry.path)) {
            return Err(format!("a layer tree where `{}` is in no folder", String::from_utf8_lossy(&entry.path)));
        }
        let bad = |path: &[u8]| {
            path.is_empty()
                || path.contains(&0)
                || path.split(|byte| *byte == b'/').any(|part| part.is_empty() || part == b"." || part == b"..")
        };
        // A link's target must be a file of this tree: only then is each folder on the way to it one that is unpacked
        // from here, and no symbolic link leads to the host's files.
        let files: BTreeSet<&[u8]> = tree
            .entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::File(_) | Kind::Symlink(_)))
            .map(|entry| entry.path.as_slice())
            .collect();
        let links = |entry: &Entry| matches!(&entry.kind, Kind::Hardlink(target) if !files.contains(target.as_slice()));
        let obeyed = |entry: &Entry| entry.xattrs.iter().any(|(name, _)| is_overlay_mark(name));
        if let Some(entry) = tree.entries.iter().find(|entry| obeyed(entry)) {
            return Err(format!("overlayfs's own marks on `{}`", String::from_utf8_lossy(&entry.path)));
        }
        if let Some(entry) = tree.entries.iter().find(|entry| bad(&entry.path) || links(entry)) {
            return Err(format!("a layer tree with the path `{}`", String::from_utf8_lossy(&entry.path)));
        }
        Ok(tree)
    }

    /// Every regular file's content.
    pub fn contents(&self) -> impl Iterator<Item = &Content> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            Kind::File(content) => Some(content),
            _ => None,
        })
    }
}

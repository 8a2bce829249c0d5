//! An image's layers as one read-only file system that has all of the metadata and none of the files' bytes.
//!
//! [`merge()`] makes one tree of all layers, [`write()`] makes an EROFS image of it. In that image a regular file has
//! its size and a hole; two attributes tell overlayfs where its bytes are: `trusted.overlay.metacopy`, and
//! `trusted.overlay.redirect` with a path in the store's objects, which are mounted as a data-only lower layer
//! (`lowerdir=<this image>::<objects>`). So a file's owner, mode, time and attributes are the image's own, its bytes
//! are shared with every image that has the same content, and no layer is ever unpacked.
//!
//! **What is in the image.** Block 0 is the superblock. From block 1 on inodes, breadth first from the root, each
//! followed by its attributes and, if all of it fits a block, by its entries or its target. Then larger folders and
//! targets, in blocks of their own. No clock and no chance: the same layers give the same bytes.
//!
//! **What is not.** Attributes whose names EROFS has no index for (all but `user.`, `trusted.`, `security.` and the two
//! POSIX access control lists) are left out. The times of access and of status change are that of the last change.
//!
//! **Bounds.** [`MAX_ENTRIES`] of all layers. [`merge()`] takes less than 300 bytes of memory for each and borrows the
//! rest from the layers; [`write()`] takes sixteen for each that is left, and the largest folder's entries and one
//! inode's attributes (256 KiB) at a time. Neither goes deeper into the stack for a deeper path. What the format cannot
//! hold is an [`ErofsError`], found before the first byte is written.
//!
//! **Needs** Linux 5.15 for holes (chunk-based files), 6.5 for data-only layers (with `metacopy=on,redirect_dir=on`
//! before 6.16), 6.12 to be mounted without a loop device, from a file system that caches pages by reading them (not
//! tmpfs, not overlayfs). Only overlayfs with trusted marks sees the bytes: with `userxattr`, or with no overlay, every
//! file reads as zeros. With `xino=auto` all files of a container are of one device, as they are over folders; without,
//! `du -x` passes them over.
//!
//! Sources: the kernel's Documentation/filesystems/erofs.rst and overlayfs.rst ("Data-only lower layers"), and the
//! on-disk structures in fs/erofs/erofs_fs.h (GPL-2.0-only or Apache-2.0). The idea is that of composefs.

mod attributes;
mod directory;
mod inode;
mod merge;
#[cfg(test)]
mod tests;

use std::io::{self, BufWriter, Write};

use super::{ContentId, Entry, Kind, Tree, is_overlay_mark};
use inode::Draft;
use merge::ROOT;
pub use merge::{MAX_ENTRIES, Merged, merge};

/// Bytes of a block: the one size that every kernel with EROFS takes.
const BLOCK: u64 = 4096;
/// Inodes lie at multiples of this, and are named by them.
const SLOT: u64 = 32;
/// Where the superblock is within block 0, and its size.
const SUPERBLOCK: usize = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock has a checksum; times of inodes are those of the last change (`EROFS_FEATURE_COMPAT_*`).
const COMPATIBLE: u32 = 0x1 | 0x2;
/// Some files are chunk-based (`EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`).
const INCOMPATIBLE: u32 = 0x4;

/// Why layers could not become an image. Of a half-written one nothing is of use.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// An entry whose folder is not there, or a hard link to what is no file; [`Tree::decode`] lets neither through.
    #[error("a layer whose `{path}` leads nowhere")]
    Adrift {
        /// Of the entry.
        path: String,
    },
    /// An attribute that overlayfs would obey; [`Tree::decode`] does not let it through either.
    #[error("overlayfs's own marks on `{path}`")]
    Mark {
        /// Of the entry.
        path: String,
    },
    /// A value that the format has no room for.
    #[error("`{path}` has {what} of {size}, of which {limit} is the limit")]
    Limit {
        /// Of the entry.
        path: String,
        /// What is too large.
        what: &'static str,
        /// How large it is.
        size: u64,
        /// How large it may be.
        limit: u64,
    },
    /// A link's target that is empty or has a zero byte in it.
    #[error("`{path}` is a symbolic link to no path")]
    Target {
        /// Of the link.
        path: String,
    },
    /// More entries than [`MAX_ENTRIES`].
    #[error("layers of {entries} entries in all, of which {MAX_ENTRIES} is the limit")]
    Entries {
        /// How many there are.
        entries: usize,
    },
    /// More than block numbers can name.
    #[error("a file system of {blocks} blocks, of which 2^32 is the limit")]
    Blocks {
        /// How many there are.
        blocks: u64,
    },
    /// The image could not be written.
    #[error("cannot write the image: {0}")]
    Io(#[from] io::Error),
}

impl ErofsError {
    /// Unless `size` is within `limit`, an error that says so.
    fn check(path: &[u8], what: &'static str, size: u64, limit: u64) -> Result<(), ErofsError> {
        if size > limit {
            return Err(ErofsError::Limit { path: text(path), what, size, limit });
        }
        Ok(())
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Where an inode is, and the first of its blocks when what it has does not fit behind it.
struct Place {
    offset: u64,
    block: Option<u32>,
}

impl Place {
    /// The number that directories name it by.
    fn nid(&self) -> u64 {
        self.offset / SLOT
    }
}

/// Writes `merged` as an EROFS image. `object` says where a content is, relative to the data-only layer and without a
/// `/` before it. `uuid` should be made from the image's id and not be zero: by it overlayfs knows, when it is mounted
/// again, which file one in the upper layer was copied from, and with that the inode number. Nothing is synced.
pub fn write(
    merged: &Merged<'_>,
    uuid: [u8; 16],
    object: impl Fn(&ContentId) -> Vec<u8>,
    out: impl Write,
) -> Result<(), ErofsError> {
    let (places, blocks) = places(merged, &object)?;
    let mut out = Counted { out: BufWriter::new(out), at: 0 };
    out.put(&superblock(uuid, &places, blocks))?;
    for (index, place) in places.iter().enumerate() {
        let draft = Draft::of(merged, index, &object)?;
        let inline = if place.block.is_none() { draft.data(&places) } else { Vec::new() };
        out.pad_to(place.offset)?;
        out.put(&draft.encode(index, place))?;
        out.put(&inline)?;
    }
    for (index, place) in places.iter().enumerate() {
        let Some(block) = place.block else { continue };
        out.pad_to(u64::from(block) * BLOCK)?;
        out.put(&Draft::of(merged, index, &object)?.data(&places))?;
    }
    out.pad_to(u64::from(blocks) * BLOCK)?;
    Ok(out.out.flush()?)
}

/// Where every inode goes, and how many blocks that makes in all.
fn places(merged: &Merged<'_>, object: &dyn Fn(&ContentId) -> Vec<u8>) -> Result<(Vec<Place>, u32), ErofsError> {
    let mut places = Vec::with_capacity(merged.nodes.len());
    // Those that get blocks of their own, with how many: which ones is known when the last inode has its place.
    let mut large = Vec::new();
    let mut end = BLOCK;
    for index in 0..merged.nodes.len() {
        let draft = Draft::of(merged, index, object)?;
        let (head, data) = (draft.head(), draft.data_size());
        let mut offset = end.next_multiple_of(SLOT);
        end = if head + data > BLOCK && data > 0 {
            large.push((index, data.div_ceil(BLOCK)));
            offset + head
        } else {
            // What follows an inode may not cross into another block, and old kernels want a link's inode there too.
            if data > 0 && offset % BLOCK + head + data > BLOCK {
                offset = offset.next_multiple_of(BLOCK);
            }
            offset + head + data
        };
        places.push(Place { offset, block: None });
    }
    let mut next = end.div_ceil(BLOCK);
    for (index, count) in large {
        places[index].block = Some(block_number(next)?);
        next += count;
    }
    Ok((places, block_number(next)?))
}

fn block_number(block: u64) -> Result<u32, ErofsError> {
    u32::try_from(block).map_err(|_| ErofsError::Blocks { blocks: block })
}

/// Block 0.
fn superblock(uuid: [u8; 16], places: &[Place], blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; SUPERBLOCK];
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // the checksum, see below
    bytes.extend(COMPATIBLE.to_le_bytes());
    bytes.extend([BLOCK.ilog2() as u8, 0]); // no extension slots
    // The root is the first inode of all: always in range.
    bytes.extend((places[ROOT].nid() as u16).to_le_bytes());
    bytes.extend((places.len() as u64).to_le_bytes());
    bytes.extend([0; 12]); // build time: only for inodes without a time of their own
    bytes.extend(blocks.to_le_bytes());
    bytes.extend([0; 8]); // inodes are counted from block 0; no shared attributes
    bytes.extend(uuid);
    bytes.extend([0; 16]); // no name
    bytes.extend(INCOMPATIBLE.to_le_bytes());
    debug_assert!(bytes.len() < SUPERBLOCK + SUPERBLOCK_SIZE);
    bytes.resize(BLOCK as usize, 0);
    let checksum = crc32c(&bytes[SUPERBLOCK..]);
    bytes[SUPERBLOCK + 4..SUPERBLOCK + 8].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// CRC-32C as EROFS has it: from all ones, and not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }))
    })
}

/// A stream that knows how far it is.
struct Counted<W> {
    out: W,
    at: u64,
}

impl<W: Write> Counted<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Zeros up to `offset`, which is less than a block away and never behind.
    fn pad_to(&mut self, offset: u64) -> io::Result<()> {
        debug_assert!((self.at..self.at + BLOCK).contains(&offset));
        let missing = offset.saturating_sub(self.at).min(BLOCK) as usize;
        self.put(&[0; BLOCK as usize][..missing])
    }
}

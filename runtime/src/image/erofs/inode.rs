//! An inode: 64 bytes, attributes, and what a file of its type has beyond that.
//!
//! Always of the extended form, the only one with a time and full owners. A regular file that is not empty is a single
//! chunk without a block, so its image reads as zeros where no overlay is over it.

use super::merge::{Merged, Node};
use super::{BLOCK, ContentId, Entry, ErofsError, Kind, Place, attributes, directory, text};

/// Bytes of an extended inode.
const SIZE: u64 = 64;
/// Layouts (`EROFS_INODE_*`): in blocks of its own, right behind the inode, in chunks.
const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const CHUNKS: u16 = 4;
/// The bit beside the layout that says extended.
const EXTENDED: u16 = 1;
/// A chunk without a block (`EROFS_NULL_ADDR`).
const HOLE: u32 = u32::MAX;
/// The largest chunk has 2^31 blocks, and a file of ours has one.
const MAX_FILE: u64 = BLOCK << 31;
/// A path's bytes without the zero behind it (`PATH_MAX`).
const MAX_TARGET: u64 = 4095;
/// What a device number has room for (`new_encode_dev`).
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

/// The two ways of saying what type a file is of.
pub(super) struct FileType {
    /// `S_IF*`.
    mode: u16,
    /// `FT_*`.
    pub(super) in_directory: u8,
}

pub(super) fn file_type(entry: Option<&Entry>) -> FileType {
    let Some(entry) = entry else { return FileType { mode: 0o040_000, in_directory: 2 } };
    let (mode, in_directory) = match entry.kind {
        Kind::File(_) => (0o100_000, 1),
        Kind::Directory { .. } => (0o040_000, 2),
        Kind::CharDevice(..) => (0o020_000, 3),
        Kind::BlockDevice(..) => (0o060_000, 4),
        // No node is ever made of the last two.
        Kind::Fifo | Kind::Hardlink(_) | Kind::Whiteout => (0o010_000, 5),
        Kind::Symlink(_) => (0o120_000, 7),
    };
    FileType { mode, in_directory }
}

/// An inode, checked, before it is known where others are.
pub(super) struct Draft<'m, 'a> {
    merged: &'m Merged<'a>,
    node: &'m Node<'a>,
    attributes: Vec<u8>,
    rest: Rest<'a>,
}

enum Rest<'a> {
    Nothing,
    File(u64),
    Device(u32),
    Target(&'a [u8]),
    Entries(Vec<(&'a [u8], usize)>),
}

impl<'m, 'a> Draft<'m, 'a> {
    pub(super) fn of(
        merged: &'m Merged<'a>,
        index: usize,
        object: &dyn Fn(&ContentId) -> Vec<u8>,
    ) -> Result<Draft<'m, 'a>, ErofsError> {
        let node = &merged.nodes[index];
        let rest = match node.entry {
            Some(entry) if !node.is_directory() => rest(entry)?,
            _ => Rest::Entries(directory::entries(merged, index)),
        };
        let redirect = match (&rest, node.entry.map(|entry| &entry.kind)) {
            (Rest::File(1..), Some(Kind::File(content))) => Some(object(&content.id())),
            _ => None,
        };
        let attributes = node.entry.map(|entry| attributes::encode(entry, redirect)).transpose()?.unwrap_or_default();
        Ok(Draft { merged, node, attributes, rest })
    }

    /// Bytes of [`Draft::encode`].
    pub(super) fn head(&self) -> u64 {
        let map = if matches!(self.rest, Rest::File(1..)) { 4 } else { 0 };
        SIZE + self.attributes.len() as u64 + map
    }

    /// Bytes of [`Draft::data`].
    pub(super) fn data_size(&self) -> u64 {
        match &self.rest {
            Rest::Target(target) => target.len() as u64,
            Rest::Entries(entries) => directory::size(entries),
            Rest::Nothing | Rest::File(_) | Rest::Device(_) => 0,
        }
    }

    /// What is behind the inode or in blocks of its own.
    pub(super) fn data(&self, places: &[Place]) -> Vec<u8> {
        match &self.rest {
            Rest::Target(target) => target.to_vec(),
            Rest::Entries(entries) => directory::encode(entries, self.merged, places),
            Rest::Nothing | Rest::File(_) | Rest::Device(_) => Vec::new(),
        }
    }

    /// The inode and what belongs to it wherever its data is. `index` is its number in a 32-bit `stat`.
    pub(super) fn encode(&self, index: usize, place: &Place) -> Vec<u8> {
        let (layout, size, detail) = match &self.rest {
            Rest::Nothing | Rest::File(0) => (PLAIN, 0, 0),
            Rest::File(size) => (CHUNKS, *size, chunk_bits(*size)),
            Rest::Device(number) => (PLAIN, 0, *number),
            Rest::Target(_) | Rest::Entries(_) => match place.block {
                Some(block) => (PLAIN, self.data_size(), block),
                None => (INLINE, self.data_size(), 0),
            },
        };
        let (mode, uid, gid, mtime) = match self.node.entry {
            // As for every link that Linux makes.
            Some(entry) if matches!(entry.kind, Kind::Symlink(_)) => (0o777, entry.uid, entry.gid, entry.mtime),
            Some(entry) => ((entry.mode & 0o7777) as u16, entry.uid, entry.gid, entry.mtime),
            None => (0o755, 0, 0, 0),
        };
        let mut bytes = Vec::with_capacity(self.head() as usize);
        bytes.extend((layout << 1 | EXTENDED).to_le_bytes());
        bytes.extend(attributes::count(&self.attributes).to_le_bytes());
        bytes.extend((file_type(self.node.entry).mode | mode).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(detail.to_le_bytes());
        bytes.extend((index as u32).wrapping_add(1).to_le_bytes());
        bytes.extend(uid.to_le_bytes());
        bytes.extend(gid.to_le_bytes());
        bytes.extend(mtime.to_le_bytes());
        bytes.extend([0; 4]); // nanoseconds
        bytes.extend(self.node.links.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(&self.attributes);
        if layout == CHUNKS {
            bytes.extend(HOLE.to_le_bytes());
        }
        bytes
    }
}

/// What an entry that is no folder has beyond its inode.
fn rest(entry: &Entry) -> Result<Rest<'_>, ErofsError> {
    let check = |what, size, limit| ErofsError::check(&entry.path, what, size, limit);
    match &entry.kind {
        Kind::File(content) => {
            let size = content.size();
            check("a size", size, MAX_FILE)?;
            Ok(Rest::File(size))
        }
        Kind::Symlink(target) => {
            if target.is_empty() || target.contains(&0) {
                return Err(ErofsError::Target { path: text(&entry.path) });
            }
            check("a target", target.len() as u64, MAX_TARGET)?;
            Ok(Rest::Target(target))
        }
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
            check("a major device number", u64::from(*major), u64::from(MAX_MAJOR))?;
            check("a minor device number", u64::from(*minor), u64::from(MAX_MINOR))?;
            Ok(Rest::Device((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)))
        }
        _ => Ok(Rest::Nothing),
    }
}

/// The binary logarithm of the blocks that a chunk has to have if `size` bytes are to be one.
fn chunk_bits(size: u64) -> u32 {
    size.div_ceil(BLOCK).next_power_of_two().ilog2()
}

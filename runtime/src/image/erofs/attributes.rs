//! Extended attributes, right behind their inode.

use std::collections::BTreeMap;

use super::{Entry, ErofsError, is_overlay_mark, text};

/// Bytes before the first attribute, and what all are aligned to.
const HEADER: usize = 12;
const ALIGN: usize = 4;
/// Bytes of a whole name, which is the kernel's limit (`XATTR_NAME_MAX`).
const MAX_NAME: u64 = 255;
/// Bytes of a value: one less than the kernel's limit, because its length is 16 bits wide.
const MAX_VALUE: u64 = u16::MAX as u64;
/// Bytes of all of an inode's: their length is 16 bits wide too, in fours and from one.
const MAX_ALL: u64 = (HEADER + (u16::MAX as usize - 1) * ALIGN) as u64;
/// What an index stands for (`EROFS_XATTR_INDEX_*`). The ACLs, whose values are those of getxattr(2), have no more to
/// their names.
const PREFIXES: [(&[u8], u8, bool); 5] = [
    (b"user.", 1, false),
    (b"system.posix_acl_access", 2, true),
    (b"system.posix_acl_default", 3, true),
    (b"trusted.", TRUSTED, false),
    (b"security.", 6, false),
];
const TRUSTED: u8 = 4;

/// An entry's attributes as they are on disk, and overlayfs's marks if its bytes are at `redirect`; empty when it has
/// none. Those without an index, or without a name that could be asked for, are left out; of a name that comes twice,
/// the last is taken.
pub(super) fn encode(entry: &Entry, redirect: Option<Vec<u8>>) -> Result<Vec<u8>, ErofsError> {
    let check = |what, size, limit| ErofsError::check(&entry.path, what, size as u64, limit);
    let mut attributes: BTreeMap<(u8, &[u8]), &[u8]> = BTreeMap::new();
    for (name, value) in &entry.xattrs {
        if is_overlay_mark(name) {
            return Err(ErofsError::Mark { path: text(&entry.path) });
        }
        check("an attribute's name", name.len(), MAX_NAME)?;
        if let Some(key) = split(name) {
            attributes.insert(key, value.as_slice());
        }
    }
    let redirect = redirect.map(|object| [b"/", object.as_slice()].concat());
    if let Some(redirect) = &redirect {
        attributes.insert((TRUSTED, b"overlay.metacopy"), b"");
        attributes.insert((TRUSTED, b"overlay.redirect"), redirect);
    }
    if attributes.is_empty() {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; HEADER];
    for ((index, name), value) in attributes {
        check("an attribute", value.len(), MAX_VALUE)?;
        bytes.extend([name.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        // Here, so that no more than this is ever put together.
        check("attributes", bytes.len(), MAX_ALL)?;
    }
    Ok(bytes)
}

/// What an inode says of attributes that take these bytes.
pub(super) fn count(attributes: &[u8]) -> u16 {
    match attributes.len().checked_sub(HEADER) {
        Some(entries) => (entries / ALIGN + 1) as u16,
        None => 0,
    }
}

/// A name as its prefix's index and what follows.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, index, whole)| {
        let rest = name.strip_prefix(*prefix)?;
        (rest.is_empty() == *whole && !rest.contains(&0)).then_some((*index, rest))
    })
}

//! What is in a folder, in blocks of their own format: first an entry of fixed size for each name, then the names.
//!
//! The kernel searches the blocks by their first names and then one block by its names, so all are sorted by their
//! bytes, `.` and `..` among the others.

use super::{BLOCK, Merged, Place, inode};

/// Bytes of an entry, without its name.
const ENTRY: usize = 12;

/// A folder's entries: names, and the nodes that they are of.
pub(super) fn entries<'a>(merged: &Merged<'a>, folder: usize) -> Vec<(&'a [u8], usize)> {
    let node = &merged.nodes[folder];
    let mut entries = Vec::with_capacity(node.children.len() + 2);
    entries.extend([(&b"."[..], folder), (&b".."[..], node.parent)]);
    entries.extend(&node.children);
    entries.sort_unstable();
    entries
}

/// Bytes that [`encode`] will give.
pub(super) fn size(entries: &[(&[u8], usize)]) -> u64 {
    blocks(entries).fold(0, |size: u64, block| size.next_multiple_of(BLOCK) + used(block) as u64)
}

/// The blocks one after another; the last is as long as it has to be.
pub(super) fn encode(entries: &[(&[u8], usize)], merged: &Merged<'_>, places: &[Place]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in blocks(entries) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        // The first of these also says how many entries the block has.
        let mut name_at = block.len() * ENTRY;
        for (name, node) in block {
            bytes.extend(places[*node].nid().to_le_bytes());
            bytes.extend((name_at as u16).to_le_bytes());
            bytes.extend([inode::file_type(merged.nodes[*node].entry).in_directory, 0]);
            name_at += name.len();
        }
        for (name, _) in block {
            bytes.extend(*name);
        }
    }
    bytes
}

/// As many entries as fit, block by block.
fn blocks<'e, 'a>(mut rest: &'e [(&'a [u8], usize)]) -> impl Iterator<Item = &'e [(&'a [u8], usize)]> {
    std::iter::from_fn(move || {
        let mut room = BLOCK as usize;
        let fits = |(name, _): &&(&[u8], usize)| {
            let left = room.checked_sub(ENTRY + name.len());
            room = left.unwrap_or(room);
            left.is_some()
        };
        let count = rest.iter().take_while(fits).count();
        let (block, after) = rest.split_at(count);
        rest = after;
        (count > 0).then_some(block)
    })
}

fn used(block: &[(&[u8], usize)]) -> usize {
    block.iter().map(|(name, _)| ENTRY + name.len()).sum()
}

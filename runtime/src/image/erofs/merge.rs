//! Many layers become one tree, by the rules of the OCI image specification ("Image Layer Filesystem Changeset").
//!
//! - An entry replaces what lower layers have at its path, and all that is below that.
//! - Except that a folder over a folder keeps what is in it, with the upper one's owner, mode, time and attributes; an
//!   opaque one keeps nothing.
//! - A whiteout removes. So does a character device 0/0, which overlayfs takes for one.
//! - A hard link is another name of a file of its own layer. If a higher layer replaces one name, the others stay.
//! - The root, which no layer lists, is a folder of root's that all may read, as of time zero.

use std::collections::{BTreeMap, VecDeque};

use super::{Entry, ErofsError, Kind, Tree, text};
use crate::image::Content;

/// The root's number.
pub(super) const ROOT: usize = 0;
/// The most entries of all layers: twenty times as many as the largest images have.
pub const MAX_ENTRIES: usize = 1 << 22;
/// Bytes of a name (`EROFS_NAME_LEN`).
const MAX_NAME: u64 = 255;

/// The tree of an image, all layers in one.
#[derive(Debug)]
pub struct Merged<'a> {
    /// Breadth first from the root, children by name: their numbers are the inodes' order.
    pub(super) nodes: Vec<Node<'a>>,
}

/// A file of any kind, under as many names as it has.
#[derive(Debug)]
pub(super) struct Node<'a> {
    /// What it is; the root alone has none.
    pub(super) entry: Option<&'a Entry>,
    /// Of a folder, what is in it, sorted by name.
    pub(super) children: Vec<(&'a [u8], usize)>,
    /// Of a folder, the one that it is in; of the root, itself.
    pub(super) parent: usize,
    /// Names that it has; of a folder, `.` and its subfolders' `..` among them.
    pub(super) links: u32,
}

impl Node<'_> {
    pub(super) fn is_directory(&self) -> bool {
        is_directory(self.entry)
    }
}

fn is_directory(entry: Option<&Entry>) -> bool {
    entry.is_none_or(|entry| matches!(entry.kind, Kind::Directory { .. }))
}

impl Merged<'_> {
    /// The plain file of that path, no folder of which is a symbolic link.
    pub fn file(&self, path: &str) -> Option<&Content> {
        let mut at = ROOT;
        for name in path.split('/') {
            let children = &self.nodes[at].children;
            let found = children.binary_search_by(|(other, _)| (*other).cmp(name.as_bytes())).ok()?;
            at = children[found].1;
        }
        match &self.nodes[at].entry?.kind {
            Kind::File(content) => Some(content),
            _ => None,
        }
    }
}

/// Merges layers, the lowest first. Those whose entries are more than [`MAX_ENTRIES`] are not looked at.
pub fn merge(layers: &[Tree]) -> Result<Merged<'_>, ErofsError> {
    let entries = layers.iter().map(|layer| layer.entries.len()).sum();
    if entries > MAX_ENTRIES {
        return Err(ErofsError::Entries { entries });
    }
    let mut growing = Growing { nodes: vec![None], children: BTreeMap::new() };
    for layer in layers {
        for entry in &layer.entries {
            growing.apply(entry)?;
        }
        // Their targets sort anywhere.
        for entry in &layer.entries {
            growing.link(entry)?;
        }
    }
    Ok(growing.finish())
}

/// While layers are added. What was replaced stays here, but nothing that the root leads to names it.
struct Growing<'a> {
    /// What each is, in the order in which they came.
    nodes: Vec<Option<&'a Entry>>,
    /// Every folder's children, by folder and name: one map, because many small ones take ten times the memory.
    children: BTreeMap<(usize, &'a [u8]), usize>,
}

impl<'a> Growing<'a> {
    fn apply(&mut self, entry: &'a Entry) -> Result<(), ErofsError> {
        let place = self.place(&entry.path)?;
        match entry.kind {
            Kind::Hardlink(_) => {}
            Kind::Whiteout | Kind::CharDevice(0, 0) => {
                self.children.remove(&place);
            }
            Kind::Directory { opaque } => {
                let kept = self.children.get(&place).filter(|at| is_directory(self.nodes[**at]) && !opaque);
                match kept {
                    Some(at) => self.nodes[*at] = Some(entry),
                    None => self.add(place, entry),
                }
            }
            _ => self.add(place, entry),
        }
        Ok(())
    }

    fn add(&mut self, place: (usize, &'a [u8]), entry: &'a Entry) {
        self.children.insert(place, self.nodes.len());
        self.nodes.push(Some(entry));
    }

    fn link(&mut self, entry: &'a Entry) -> Result<(), ErofsError> {
        let Kind::Hardlink(target) = &entry.kind else { return Ok(()) };
        let place = self.place(&entry.path)?;
        let target = self.find(target).filter(|at| !is_directory(self.nodes[*at]));
        let target = target.ok_or_else(|| ErofsError::Adrift { path: text(&entry.path) })?;
        self.children.insert(place, target);
        Ok(())
    }

    /// The folder that a path is in, and its name there.
    fn place(&self, path: &'a [u8]) -> Result<(usize, &'a [u8]), ErofsError> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (self.find(&path[..at]), &path[at + 1..]),
            None => (Some(ROOT), path),
        };
        let is_name = !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
        let parent = parent.filter(|at| is_name && is_directory(self.nodes[*at]));
        let parent = parent.ok_or_else(|| ErofsError::Adrift { path: text(path) })?;
        ErofsError::check(path, "a name", name.len() as u64, MAX_NAME)?;
        Ok((parent, name))
    }

    fn find(&self, path: &[u8]) -> Option<usize> {
        path.split(|byte| *byte == b'/').try_fold(ROOT, |at, name| self.children.get(&(at, name)).copied())
    }

    /// Numbers what the root leads to, breadth first, and counts names.
    fn finish(self) -> Merged<'a> {
        let mut numbers: Vec<Option<usize>> = vec![None; self.nodes.len()];
        let mut nodes = vec![Node { entry: None, children: Vec::new(), parent: ROOT, links: 2 }];
        let mut folders = VecDeque::from([(ROOT, ROOT)]);
        while let Some((old, number)) = folders.pop_front() {
            let children = self.children.range((old, &b""[..])..(old + 1, &b""[..]));
            for ((_, name), child) in children {
                let entry = self.nodes[*child];
                let at = *numbers[*child].get_or_insert_with(|| {
                    nodes.push(Node { entry, children: Vec::new(), parent: number, links: 0 });
                    nodes.len() - 1
                });
                nodes[number].children.push((name, at));
                // There are fewer names than fit this, see MAX_ENTRIES.
                if is_directory(entry) {
                    nodes[at].links = 2;
                    nodes[number].links += 1;
                    folders.push_back((*child, at));
                } else {
                    nodes[at].links += 1;
                }
            }
        }
        Merged { nodes }
    }
}

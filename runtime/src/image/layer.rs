//! One layer's tar archive becomes a tree; its files' contents go to the store.
//!
//! Nothing is written at the paths that the archive names: they only become entries, checked here and again where a
//! tree is unpacked, so a hostile path has nothing to act on. Whiteouts are those of the OCI image-spec, layer.md.
//!
//! What lies between the files' contents is noted on the way where it is wanted ([`Notes`]): with it, and with them, the same
//! archive can be made again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::Path;

use super::archive::{Budget, ImportError, each_file};
use super::{Content, ENTRY, Entry, Kind, MAX_ENTRIES, MAX_XATTRS, Recipe, Tree, weight};
use crate::store::{Sink, StoreError, Writer};

/// PATH_MAX.
const MAX_PATH: usize = 4096;
const OPAQUE: &[u8] = b".wh..wh..opq";
const WHITEOUT: &[u8] = b".wh.";

/// What a recipe takes in memory for each file, besides its chunks.
const PART: usize = 48;

/// An archive, and what a recipe of it needs, if one is wanted.
pub(super) struct Noting<R> {
    inner: RefCell<R>,
    notes: Option<RefCell<Notes>>,
}

/// What has been read of an archive that is no file's content.
struct Notes {
    literals: zstd::stream::write::Encoder<'static, Sink>,
    /// Of the literals, since the last file.
    since: u64,
    parts: Vec<(u64, Content)>,
    /// What is read now is a file's content.
    in_file: bool,
}

impl<R: Read> Noting<R> {
    /// Notes what is read of `inner`, into `sink` if there is one.
    pub(super) fn new(inner: R, sink: Option<Sink>) -> io::Result<Noting<R>> {
        let notes = |sink| {
            let literals = zstd::stream::write::Encoder::new(sink, 0)?;
            Ok::<_, io::Error>(RefCell::new(Notes { literals, since: 0, parts: Vec::new(), in_file: false }))
        };
        Ok(Noting { inner: RefCell::new(inner), notes: sink.map(notes).transpose()? })
    }

    /// How the archive is made again.
    pub(super) fn finish(self, writer: &mut Writer<'_>) -> Result<Option<Recipe>, StoreError> {
        let Some(notes) = self.notes else { return Ok(None) };
        let Notes { literals, parts, .. } = notes.into_inner();
        let sink = literals.finish().map_err(|error| StoreError::io("write", Path::new("the store"), error))?;
        Ok(Some(Recipe { literals: writer.keep(sink)?, parts }))
    }

    /// Whether what is read from now on is a file's content.
    fn in_file(&self, now: bool) {
        if let Some(notes) = &self.notes {
            notes.borrow_mut().in_file = now;
        }
    }

    /// This has been read as a file's content.
    fn file(&self, content: &Content) {
        if let Some(notes) = self.notes.as_ref().filter(|_| !content.chunks.is_empty()) {
            let mut notes = notes.borrow_mut();
            let before = std::mem::take(&mut notes.since);
            notes.parts.push((before, content.clone()));
        }
    }
}

impl<R: Read> Read for &Noting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.borrow_mut().read(buffer)?;
        if let Some(notes) = &self.notes {
            let mut notes = notes.borrow_mut();
            if !notes.in_file {
                notes.literals.write_all(&buffer[..len])?;
                notes.since += len as u64;
            }
        }
        Ok(len)
    }
}

/// Reads a layer. `name` is what errors call it.
pub(super) fn read(
    archive: &Noting<impl Read>,
    name: &str,
    writer: &mut Writer<'_>,
    budget: &Budget,
) -> Result<Tree, ImportError> {
    let mut entries: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
    let mut whiteouts: Vec<Vec<u8>> = Vec::new();
    let mut opaque: Vec<Vec<u8>> = Vec::new();
    each_file(archive, name, |file| {
        if entries.len() + whiteouts.len() >= MAX_ENTRIES {
            return Err(ImportError::TooMany { name: name.to_owned(), limit: MAX_ENTRIES });
        }
        let raw = file.path_bytes().into_owned();
        let Some(path) = normalise(&raw, name)? else { return Ok(()) };
        // The path is a key as well.
        budget.spend(ENTRY + 2 * path.len(), name)?;
        through_link(&path, &entries, name)?;
        let (parent, base) = split(&path);
        if base == OPAQUE {
            opaque.push(parent.to_vec());
        } else if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(ImportError::Escape { name: name.to_owned(), path: text(&raw) });
            }
            whiteouts.push(join(parent, hidden));
        } else if let Some(entry) = entry(file, path, (name, archive), writer)? {
            let link = match &entry.kind {
                Kind::Symlink(target) | Kind::Hardlink(target) => target.len(),
                _ => 0,
            };
            budget.spend(link + weight(&entry.xattrs) + PART, name)?;
            insert(&mut entries, entry);
        }
        Ok(())
    })?;
    finish(entries, whiteouts, opaque, name, budget)
}

fn entry(
    file: &mut tar::Entry<'_, impl Read>,
    path: Vec<u8>,
    (name, archive): (&str, &Noting<impl Read>),
    writer: &mut Writer<'_>,
) -> Result<Option<Entry>, ImportError> {
    let damaged = |error: io::Error| ImportError::damaged(name, &error);
    let header = file.header();
    let (mode, uid, gid) = (header.mode().map_err(damaged)?, id(header.uid(), name)?, id(header.gid(), name)?);
    let kind = header.entry_type();
    let mut mtime = header.mtime().map_err(damaged)? as i64;
    let device = match kind {
        tar::EntryType::Char | tar::EntryType::Block => {
            (header.device_major().map_err(damaged)?.unwrap_or(0), header.device_minor().map_err(damaged)?.unwrap_or(0))
        }
        _ => (0, 0),
    };
    let link = file.link_name_bytes().map(|link| link.into_owned());
    let (mut xattrs, mut owner) = (Vec::new(), (uid, gid));
    for extension in file.pax_extensions().map_err(damaged)?.into_iter().flatten() {
        let extension = extension.map_err(damaged)?;
        let value = extension.value_bytes();
        let number = || std::str::from_utf8(value).ok().and_then(|text| text.split('.').next()?.parse::<i64>().ok());
        match extension.key_bytes() {
            b"mtime" => mtime = number().unwrap_or(mtime),
            b"uid" => owner.0 = number().and_then(|id| id.try_into().ok()).unwrap_or(owner.0),
            b"gid" => owner.1 = number().and_then(|id| id.try_into().ok()).unwrap_or(owner.1),
            key => {
                if let Some(key) = key.strip_prefix(b"SCHILY.xattr.") {
                    // Overlay's own marks would be obeyed when the layer is mounted.
                    if !super::is_overlay_mark(key) {
                        xattrs.push((key.to_vec(), value.to_vec()));
                    }
                }
            }
        }
    }
    if weight(&xattrs) > MAX_XATTRS {
        return Err(ImportError::TooMany { name: name.to_owned(), limit: MAX_XATTRS });
    }
    let kind = match kind {
        tar::EntryType::Directory => Kind::Directory { opaque: false },
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            let size = file.size();
            // A sparse file's content is not what the archive has of it: that is noted as it comes.
            let plain = kind != tar::EntryType::GNUSparse;
            archive.in_file(plain);
            let content = writer.add(file, size, name)?;
            archive.in_file(false);
            if plain {
                archive.file(&content);
            }
            Kind::File(content)
        }
        tar::EntryType::Symlink => {
            let target = link.unwrap_or_default();
            if target.len() > MAX_PATH {
                return Err(ImportError::Escape { name: name.to_owned(), path: text(&path) });
            }
            Kind::Symlink(target)
        }
        tar::EntryType::Link => {
            let target = normalise(&link.unwrap_or_default(), name)?;
            Kind::Hardlink(target.ok_or_else(|| ImportError::Escape { name: name.to_owned(), path: text(&path) })?)
        }
        tar::EntryType::Char => Kind::CharDevice(device.0, device.1),
        tar::EntryType::Block => Kind::BlockDevice(device.0, device.1),
        tar::EntryType::Fifo => Kind::Fifo,
        // Global headers and volume labels describe the archive, not a file.
        _ => return Ok(None),
    };
    Ok(Some(Entry { path, kind, mode: mode & 0o7777, uid: owner.0, gid: owner.1, mtime, xattrs }))
}

/// A later entry of the same path replaces the earlier one, as it would on disk.
fn insert(entries: &mut BTreeMap<Vec<u8>, Entry>, entry: Entry) {
    let was_folder = entries.get(&entry.path).is_some_and(|old| matches!(old.kind, Kind::Directory { .. }));
    if was_folder && !matches!(entry.kind, Kind::Directory { .. }) {
        let inside = [entry.path.as_slice(), b"/"].concat();
        let below = entries.range(inside.clone()..).map(|(path, _)| path).take_while(|path| path.starts_with(&inside));
        for path in below.cloned().collect::<Vec<_>>() {
            entries.remove(&path);
        }
    }
    entries.insert(entry.path.clone(), entry);
}

fn finish(
    mut entries: BTreeMap<Vec<u8>, Entry>,
    whiteouts: Vec<Vec<u8>>,
    opaque: Vec<Vec<u8>>,
    name: &str,
    budget: &Budget,
) -> Result<Tree, ImportError> {
    for path in opaque {
        match entries.get_mut(&path).map(|entry| &mut entry.kind) {
            Some(Kind::Directory { opaque }) => *opaque = true,
            Some(_) => return Err(ImportError::ThroughLink { name: name.to_owned(), path: text(&path) }),
            None if path.is_empty() => {}
            None => {
                entries.insert(path.clone(), folder(path, true));
            }
        }
    }
    for path in whiteouts {
        match entries.get_mut(&path).map(|entry| &mut entry.kind) {
            // Removed and made anew in one layer: what was below is hidden, what is here stays.
            Some(Kind::Directory { opaque }) => *opaque = true,
            Some(_) => {}
            None => {
                let entry = Entry { kind: Kind::Whiteout, ..folder(path.clone(), false) };
                entries.insert(path, entry);
            }
        }
    }
    for path in entries.keys().cloned().collect::<Vec<_>>() {
        // From the nearest up: above a folder that is there already, all are.
        for parent in ancestors(&path).collect::<Vec<_>>().into_iter().rev() {
            match entries.get(parent).map(|entry| &entry.kind) {
                Some(Kind::Directory { .. }) => break,
                Some(_) => return Err(ImportError::ThroughLink { name: name.to_owned(), path: text(parent) }),
                None => {
                    budget.spend(ENTRY + 2 * parent.len(), name)?;
                    entries.insert(parent.to_vec(), folder(parent.to_vec(), false));
                }
            }
        }
    }
    let is_file = |target: &Vec<u8>| {
        matches!(entries.get(target).map(|entry| &entry.kind), Some(Kind::File(_) | Kind::Symlink(_)))
    };
    for entry in entries.values() {
        if let Kind::Hardlink(target) = &entry.kind
            && !is_file(target)
        {
            return Err(ImportError::BadLink { name: name.to_owned(), path: text(&entry.path), target: text(target) });
        }
    }
    Ok(Tree { entries: entries.into_values().collect() })
}

fn folder(path: Vec<u8>, opaque: bool) -> Entry {
    Entry { path, kind: Kind::Directory { opaque }, mode: 0o755, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() }
}

fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}

/// The path without leading slash and `.`; `None` is the root itself. `..` is refused, never resolved.
fn normalise(raw: &[u8], name: &str) -> Result<Option<Vec<u8>>, ImportError> {
    let escape = || ImportError::Escape { name: name.to_owned(), path: text(raw) };
    if raw.len() > MAX_PATH || raw.contains(&0) {
        return Err(escape());
    }
    let mut path: Vec<u8> = Vec::with_capacity(raw.len());
    for part in raw.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(escape()),
            part => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(part);
            }
        }
    }
    Ok((!path.is_empty()).then_some(path))
}

/// Refuses an entry below a symbolic link of the same layer: on disk it would end up where the link points.
fn through_link(path: &[u8], entries: &BTreeMap<Vec<u8>, Entry>, name: &str) -> Result<(), ImportError> {
    let leads_away =
        |parent: &[u8]| entries.get(parent).is_some_and(|entry| !matches!(entry.kind, Kind::Directory { .. }));
    if ancestors(path).any(leads_away) {
        return Err(ImportError::ThroughLink { name: name.to_owned(), path: text(path) });
    }
    Ok(())
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn join(parent: &[u8], base: &[u8]) -> Vec<u8> {
    if parent.is_empty() { base.to_vec() } else { [parent, b"/", base].concat() }
}

fn id(value: io::Result<u64>, name: &str) -> Result<u32, ImportError> {
    let value = value.map_err(|error| ImportError::damaged(name, &error))?;
    // Ids above 32 bits exist in no kernel; nobody is a safer owner than root.
    Ok(u32::try_from(value).unwrap_or(65534))
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

//! Image archives: what `docker save`, `skopeo` and `umoci` write, read in one pass and without a copy on disk.
//!
//! A docker-archive names its layers in `manifest.json`, which comes last; an OCI layout in `index.json` and the
//! manifests it names. So every member that is a tar archive is imported as a layer when it goes by, its digests are
//! taken on the way, and what the manifests say is checked against them at the end. Layers that nothing names are
//! dropped. Nothing is known to the store before the very end, and on any error what was written is removed.
//!
//! Chunking and BLAKE3 run on a second thread, reading, decompressing and SHA-256 on the caller's; [`QUEUE`] buffers of
//! [`BUFFER`] bytes lie between them. A third one writes, which is the most work of all where memory is new to the machine.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    ARCHITECTURE, Blob, Chunk, ConfigError, Content, ImageConfig, Layer, MAX_BLOBS, Original, Root, Source, Tree,
    VERSION, digest_text, layer, media, parse_digest,
};
use crate::store::{HeldOriginal, Sink, Store, StoreError, Writer};

const BUFFER: usize = 256 * 1024;
/// For who reads little by little; a whole buffer is read past it, without a copy.
const READER: usize = 32 * 1024;
/// Half as much again as the longest file that is read whole: its bytes are hashed while those after it come.
const QUEUE: usize = 24;
/// The most bytes of a manifest, an index or a config.
const MAX_DOCUMENT: usize = 4 << 20;
/// The most bytes of documents, names and attributes in one import: they are held in memory until its end.
pub(super) const MAX_METADATA: u64 = 512 << 20;
/// The most bytes between two files of a tar archive: long names and extended attributes, which its reader collects.
const MAX_HEADERS: u64 = 2 << 20;
/// Bytes a member takes in memory besides its names, about.
const MEMBER: usize = 128;
/// The most members an archive may have.
const MAX_MEMBERS: usize = 10_000;
/// How deep indexes may name one another.
const MAX_NESTING: usize = 4;

/// What an import may use.
#[derive(Copy, Clone, Debug)]
pub struct Limits {
    /// Bytes of all files of all layers, decompressed.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { bytes: 32 << 30 }
    }
}

/// What one import may still hold in memory besides its buffers.
pub(super) struct Budget(AtomicU64);

impl Budget {
    /// Takes `bytes` out of it.
    pub(super) fn spend(&self, bytes: usize, name: &str) -> Result<(), ImportError> {
        let taken = self.0.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes as u64));
        taken.map(drop).map_err(|_| ImportError::Metadata { name: name.to_owned(), limit: MAX_METADATA })
    }
}

/// A tar archive's bytes. The tar reader collects long names and attributes before it shows the file they belong to:
/// while it looks for the next file it gets no more than [`MAX_HEADERS`].
pub(crate) struct Metered<'a, R> {
    pub(crate) inner: R,
    /// What it may still give.
    pub(crate) left: &'a Cell<u64>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.left.set(self.left.get().saturating_sub(len as u64));
        if self.left.get() == 0 {
            return Err(io::Error::other("too much before a file"));
        }
        Ok(len)
    }
}

/// Shows each file of a tar archive in turn.
pub(super) fn each_file<R: Read>(
    archive: R,
    name: &str,
    mut look: impl FnMut(&mut tar::Entry<'_, Metered<'_, R>>) -> Result<(), ImportError>,
) -> Result<(), ImportError> {
    let left = Cell::new(MAX_HEADERS);
    let mut archive = tar::Archive::new(Metered { inner: archive, left: &left });
    let damaged = |error: io::Error| ImportError::damaged(name, &error);
    let mut files = archive.entries().map_err(damaged)?;
    loop {
        left.set(MAX_HEADERS);
        let Some(file) = files.next() else { return Ok(()) };
        let within = left.replace(u64::MAX) > 0;
        let mut file = file.map_err(|error| match within {
            true => damaged(error),
            false => ImportError::Metadata { name: name.to_owned(), limit: MAX_HEADERS },
        })?;
        look(&mut file)?;
        // Otherwise the tar reader skips it on its way to the next one. A sparse file claims holes of any length: those
        // are never worth reading.
        let sparse = file.header().entry_type().is_gnu_sparse();
        let rest = io::copy(&mut (&mut file).take(if sparse { 1 } else { u64::MAX }), &mut io::sink());
        if rest.map_err(damaged)? > 0 && sparse {
            return Err(ImportError::Damaged {
                name: name.to_owned(),
                reason: "a sparse file that is none".to_owned(),
            });
        }
    }
}

/// How far an import is, to be read from another thread.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of files read so far.
    pub bytes: AtomicU64,
    /// Chunks met so far.
    pub chunks: AtomicU64,
    /// How many of them were new.
    pub new_chunks: AtomicU64,
}

/// One image of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Names that the archive gives it, as written there.
    pub names: Vec<String>,
    /// SHA-256 of its config.
    pub id: [u8; 32],
    /// Its root chunk.
    pub root: Chunk,
    /// Bytes of all its distinct chunks.
    pub size: u64,
    /// Chunks it has, and how many of them the store did not have.
    pub chunks: (u64, u64),
    /// What it was made of.
    pub original: HeldOriginal,
}

/// Why an archive was not imported. Nothing was stored.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It could not be read.
    #[error("cannot read the archive: {0}")]
    Read(String),
    /// It ends too early, or is not what it seems.
    #[error("{name}: the archive is damaged or cut short: {reason}")]
    Damaged {
        /// Which part.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Neither of the known kinds.
    #[error(
        "this is no image archive: there is neither a manifest.json (docker-archive) nor an index.json (OCI layout) in it"
    )]
    NotAnImage,
    /// A manifest names something that is not there.
    #[error("{name}: the archive names it and does not have it")]
    Missing {
        /// What.
        name: String,
    },
    /// Content that is not what its digest says.
    #[error("{name}: its digest should be sha256:{expected} and is sha256:{actual}")]
    Digest {
        /// Of what.
        name: String,
        /// As named.
        expected: String,
        /// As computed.
        actual: String,
    },
    /// A path that leaves the image.
    #[error("{name}: the path `{path}` leads out of the image")]
    Escape {
        /// Which layer.
        name: String,
        /// The path.
        path: String,
    },
    /// A path below something that is no folder.
    #[error("{name}: the path `{path}` leads through a symbolic link or a file")]
    ThroughLink {
        /// Which layer.
        name: String,
        /// The path.
        path: String,
    },
    /// A hard link to nothing.
    #[error("{name}: `{path}` is a hard link to `{target}`, which is no file of this layer")]
    BadLink {
        /// Which layer.
        name: String,
        /// The link.
        path: String,
        /// What it names.
        target: String,
    },
    /// More bytes than allowed: perhaps a decompression bomb.
    #[error("{name}: its files have more than {limit} bytes, which is the limit for one import")]
    TooLarge {
        /// Where the limit was passed.
        name: String,
        /// The limit.
        limit: u64,
    },
    /// Documents, names and attributes that would fill the memory.
    #[error("{name}: more than {limit} bytes of documents, names and attributes in one archive")]
    Metadata {
        /// Where the limit was passed.
        name: String,
        /// The limit.
        limit: u64,
    },
    /// More of something than any image has.
    #[error("{name}: more than {limit} entries or attributes")]
    TooMany {
        /// Where.
        name: String,
        /// The limit.
        limit: usize,
    },
    /// JSON that is not what it should be.
    #[error("{name}: {reason}")]
    Document {
        /// Which.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The config cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store could not keep it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImportError {
    fn cut_short(name: &str) -> Self {
        ImportError::Damaged { name: name.to_owned(), reason: "it ends too early".to_owned() }
    }

    pub(crate) fn damaged(name: &str, error: &io::Error) -> Self {
        if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
            // What is read is also written down, on the way.
            return StoreError::DiskFull { path: "the store".into() }.into();
        }
        ImportError::Damaged { name: name.to_owned(), reason: error.to_string() }
    }
}

enum Member {
    Layer(Box<LayerMember>),
    /// Anything, as it is; only what is pushed may have such.
    Other {
        digest: [u8; 32],
        size: u64,
        source: Source,
    },
    Document {
        digest: [u8; 32],
        bytes: Vec<u8>,
    },
    Link(String),
}

/// A layer as an archive has it.
struct LayerMember {
    digest: [u8; 32],
    diff_id: [u8; 32],
    size: u64,
    tree: Tree,
    source: Source,
    /// The end of its media type.
    compression: &'static str,
}

/// Imports every image of an archive. `archive` may be compressed with gzip or zstd.
pub fn import(
    archive: impl Read,
    store: &Store,
    limits: Limits,
    progress: &Progress,
) -> Result<Vec<Imported>, ImportError> {
    let mut writer = store.writer(limits.bytes, progress);
    let budget = Budget(AtomicU64::new(MAX_METADATA));
    let outer = decompress(BufReader::with_capacity(READER, archive))?;
    let mut members = BTreeMap::new();
    each_file(outer, "the archive", |entry| {
        if members.len() >= MAX_MEMBERS {
            return Err(ImportError::TooMany { name: "the archive".to_owned(), limit: MAX_MEMBERS });
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
        let link = entry.link_name_bytes().map(|link| String::from_utf8_lossy(&link).into_owned());
        budget.spend(name.len() + link.as_ref().map_or(0, String::len) + MEMBER, "the archive")?;
        match entry.header().entry_type() {
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let link = link.unwrap_or_default();
                // A relative link is seen from the folder it is in; a hard link from the top.
                let target =
                    if entry.header().entry_type() == tar::EntryType::Link { link } else { resolve(&name, &link) };
                members.insert(name, Member::Link(target));
            }
            tar::EntryType::Regular => {
                let size = entry.size();
                let member = read_member(entry, size, &name, &mut writer, &budget, false)?;
                members.insert(name, member);
            }
            _ => {}
        }
        Ok(())
    })?;
    let members = Members(members);
    let images = if members.0.contains_key("index.json") {
        members.oci_layout()?
    } else if members.0.contains_key("manifest.json") {
        members.docker_archive()?
    } else {
        return Err(ImportError::NotAnImage);
    };
    let mut imported = Vec::new();
    for image in &images {
        imported.push(keep(image, &members, &mut writer)?);
    }
    writer.commit()?;
    Ok(imported)
}

/// What was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The image that this machine can run, if it is or has one: its id, root and size.
    pub image: Option<([u8; 32], Chunk, u64)>,
    /// All of it.
    pub original: HeldOriginal,
}

/// Opens a blob by its digest: how long it is, and its bytes.
pub type OpenBlob<'a> = &'a dyn Fn(&[u8; 32]) -> Option<(u64, Box<dyn Read + Send>)>;

/// Imports a manifest or an index that was pushed, with all that it names.
pub fn import_pushed(
    manifest: &[u8],
    media_type: &str,
    open: OpenBlob<'_>,
    store: &Store,
    limits: Limits,
) -> Result<Pushed, ImportError> {
    let progress = Progress::default();
    let mut writer = store.writer(limits.bytes, &progress);
    let budget = Budget(AtomicU64::new(MAX_METADATA));
    let mut members = BTreeMap::new();
    let digest: [u8; 32] = Sha256::digest(manifest).into();
    let top = Descriptor::new(&digest, media_type);
    members.insert(blob_name(&top)?, Member::Document { digest, bytes: manifest.to_vec() });
    let mut todo: Vec<(Descriptor, usize)> =
        descriptors(manifest, media_type).into_iter().map(|(one, _)| (one, 1)).collect();
    while let Some((descriptor, depth)) = todo.pop() {
        let name = blob_name(&descriptor)?;
        if members.contains_key(&name) {
            continue;
        }
        if members.len() >= MAX_MEMBERS || depth > MAX_NESTING + 1 {
            return Err(ImportError::TooMany { name: "the manifest".to_owned(), limit: MAX_MEMBERS });
        }
        let opened = parse_digest(&descriptor.digest).and_then(|digest| open(&digest));
        let (size, mut bytes) = opened.ok_or_else(|| ImportError::Missing { name: descriptor.digest.clone() })?;
        let mut entry = bytes.by_ref().take(size);
        let member = match read_member(&mut entry, size, &name, &mut writer, &budget, true) {
            // It looks like a layer and is none: of what is no image anything may be a part.
            Err(error) if !matches!(error, ImportError::Store(_) | ImportError::TooLarge { .. }) => {
                let again = parse_digest(&descriptor.digest).and_then(|digest| open(&digest));
                let (_, bytes) = again.ok_or(error)?;
                read_other(Vec::new(), bytes.take(size), &name, &mut writer)?
            }
            member => member?,
        };
        if let Member::Document { bytes, .. } = &member {
            todo.extend(descriptors(bytes, &descriptor.media_type).into_iter().map(|(one, _)| (one, depth + 1)));
        }
        members.insert(name, member);
    }
    let members = Members(members);
    let image = match members.oci_image(&top, 0) {
        // For another kind of machine, or not an image at all: it is kept, and cannot be run here.
        Ok(image) if members.document(&image.config).is_ok_and(is_for_here) => {
            Some(keep_image(&image, &members, &mut writer)?)
        }
        _ => None,
    };
    let manifest = Some((blob_name(&top)?, media_type.to_owned()));
    let all = Described { names: Vec::new(), manifest, config: String::new(), layers: Vec::new() };
    let original = original(&all, &members, &mut writer)?;
    let original = writer.add_original(&original)?;
    writer.commit()?;
    Ok(Pushed { image: image.map(|(id, root, size, _)| (id, root, size)), original })
}

/// Whether a config is that of an image for this machine.
fn is_for_here(config: &[u8]) -> bool {
    ImageConfig::parse(config).is_ok_and(|parsed| parsed.diff_ids().is_ok_and(|ids| !ids.is_empty()))
}

/// An image as its archive describes it: a config, and layers in order.
struct Described {
    names: Vec<String>,
    /// Its manifest or index, with its media type; a docker-archive has none.
    manifest: Option<(String, String)>,
    config: String,
    layers: Vec<String>,
}

struct Members(BTreeMap<String, Member>);

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// A part of an image, as its manifest names it (OCI image-spec, descriptor.md).
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) digest: String,
    #[serde(default)]
    pub(crate) media_type: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
}

impl Descriptor {
    fn new(digest: &[u8; 32], media_type: &str) -> Descriptor {
        let digest = digest_text(digest);
        Descriptor { digest, media_type: media_type.to_owned(), annotations: None, platform: None }
    }
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Members {
    fn docker_archive(&self) -> Result<Vec<Described>, ImportError> {
        let manifests: Vec<DockerManifest> = self.json("manifest.json")?;
        if manifests.is_empty() {
            return Err(ImportError::NotAnImage);
        }
        Ok(manifests
            .into_iter()
            .map(|manifest| Described {
                // A name without a tag is a name; in an OCI layout it is a tag.
                names: manifest.repo_tags.unwrap_or_default().into_iter().map(with_tag).collect(),
                manifest: None,
                config: manifest.config,
                layers: manifest.layers,
            })
            .collect())
    }

    fn oci_layout(&self) -> Result<Vec<Described>, ImportError> {
        let index: Index = self.json("index.json")?;
        let mut images: Vec<Described> = Vec::new();
        for descriptor in &index.manifests {
            let annotation = |name: &str| descriptor.annotations.as_ref().and_then(|all| all.get(name)).cloned();
            let name =
                annotation("io.containerd.image.name").or_else(|| annotation("org.opencontainers.image.ref.name"));
            let mut image = self.oci_image(descriptor, 0)?;
            image.manifest = Some((blob_name(descriptor)?, descriptor.media_type.clone()));
            match images.iter_mut().find(|known| known.manifest == image.manifest) {
                Some(known) => known.names.extend(name),
                None => {
                    image.names.extend(name);
                    images.push(image);
                }
            }
        }
        if images.is_empty() { Err(ImportError::NotAnImage) } else { Ok(images) }
    }

    fn oci_image(&self, descriptor: &Descriptor, depth: usize) -> Result<Described, ImportError> {
        let name = blob_name(descriptor)?;
        if depth > MAX_NESTING {
            return Err(ImportError::Document { name, reason: "indexes nested too deep".to_owned() });
        }
        if media::is_index(&descriptor.media_type) {
            let index: Index = self.json(&name)?;
            let fits = |platform: &Platform| platform.os == "linux" && platform.architecture == ARCHITECTURE;
            let here = index.manifests.iter().find(|one| one.platform.as_ref().is_some_and(fits));
            let here = here.or_else(|| index.manifests.iter().find(|one| one.platform.is_none()));
            let here = here.ok_or_else(|| {
                let reason = format!("no image for linux/{ARCHITECTURE} among its platforms");
                ImportError::Document { name: name.clone(), reason }
            })?;
            return self.oci_image(here, depth + 1);
        }
        let manifest: Manifest = self.json(&name)?;
        let layers = manifest.layers.iter().map(blob_name).collect::<Result<_, _>>()?;
        Ok(Described { names: Vec::new(), manifest: None, config: blob_name(&manifest.config)?, layers })
    }

    fn json<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Result<T, ImportError> {
        let bytes = self.document(name)?;
        serde_json::from_slice(bytes)
            .map_err(|error| ImportError::Document { name: name.to_owned(), reason: error.to_string() })
    }

    fn document(&self, name: &str) -> Result<&[u8], ImportError> {
        match self.find(name)? {
            Member::Document { bytes, digest } => {
                check_name(name, digest)?;
                Ok(bytes)
            }
            _ => Err(ImportError::Document { name: name.to_owned(), reason: "this is no document".to_owned() }),
        }
    }

    fn layer(&self, name: &str) -> Result<&LayerMember, ImportError> {
        match self.find(name)? {
            Member::Layer(layer) => {
                check_name(name, &layer.digest)?;
                Ok(layer)
            }
            _ => Err(ImportError::Document { name: name.to_owned(), reason: "this is no layer archive".to_owned() }),
        }
    }

    fn find(&self, name: &str) -> Result<&Member, ImportError> {
        let missing = || ImportError::Missing { name: name.to_owned() };
        let mut seen = BTreeSet::new();
        let mut at = name.trim_start_matches("./");
        loop {
            match self.0.get(at).ok_or_else(missing)? {
                Member::Link(target) if seen.insert(at) => at = target,
                Member::Link(_) => return Err(missing()),
                member => return Ok(member),
            }
        }
    }
}

fn with_tag(name: String) -> String {
    if name.rsplit('/').next().is_some_and(|last| last.contains(':')) { name } else { format!("{name}:latest") }
}

/// Checks a descriptor's digest and says where a layout keeps it.
fn blob_name(descriptor: &Descriptor) -> Result<String, ImportError> {
    match parse_digest(&descriptor.digest) {
        Some(digest) => Ok(format!("blobs/sha256/{}", hex(&digest))),
        None => Err(ImportError::Document {
            name: descriptor.digest.clone(),
            reason: "only SHA-256 digests are known".to_owned(),
        }),
    }
}

/// A member whose name is a digest must have it.
fn check_name(name: &str, digest: &[u8; 32]) -> Result<(), ImportError> {
    let base = name.rsplit('/').next().unwrap_or(name);
    let base = base.strip_suffix(".json").or_else(|| base.strip_suffix(".tar")).unwrap_or(base);
    let is_digest = base.len() == 64 && base.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_digest && base != hex(digest) {
        return Err(ImportError::Digest { name: name.to_owned(), expected: base.to_owned(), actual: hex(digest) });
    }
    Ok(())
}

/// Checks an image's parts against its config and writes its root.
fn keep(image: &Described, members: &Members, writer: &mut Writer<'_>) -> Result<Imported, ImportError> {
    let (id, root, size, chunks) = keep_image(image, members, writer)?;
    let original = original(image, members, writer)?;
    let original = writer.add_original(&original)?;
    Ok(Imported { names: image.names.clone(), id, root, size, chunks, original })
}

/// An image's id, root chunk, size, and chunks: all, new.
type Kept = ([u8; 32], Chunk, u64, (u64, u64));

fn keep_image(image: &Described, members: &Members, writer: &mut Writer<'_>) -> Result<Kept, ImportError> {
    let config = members.document(&image.config)?;
    let parsed = ImageConfig::parse(config)?;
    let diff_ids = parsed.diff_ids()?;
    if diff_ids.len() != image.layers.len() {
        let reason = format!("it names {} layers and the manifest {}", diff_ids.len(), image.layers.len());
        return Err(ImportError::Document { name: image.config.clone(), reason });
    }
    let mut layers = Vec::new();
    for (at, (name, expected)) in image.layers.iter().zip(&diff_ids).enumerate() {
        let layer = members.layer(name)?;
        if layer.diff_id != *expected {
            let name = format!("layer {} of {} ({name})", at + 1, image.layers.len());
            return Err(ImportError::Digest { name, expected: hex(expected), actual: hex(&layer.diff_id) });
        }
        layers.push(Layer { diff_id: layer.diff_id, tree: writer.add_bytes(&layer.tree.encode())? });
    }
    let trees =
        image.layers.iter().map(|name| Ok(&members.layer(name)?.tree)).collect::<Result<Vec<_>, ImportError>>()?;
    let id: [u8; 32] = Sha256::digest(config).into();
    let root = Root { version: VERSION, config: writer.add_bytes(config)?, layers };
    let (root, size, chunks) = writer.add_image(&root, &trees, id)?;
    Ok((id, root, size, chunks))
}

/// What an image was made of: everything below its manifest that the archive has. One that came without gets the manifest
/// that a push would give it.
fn original(image: &Described, members: &Members, writer: &mut Writer<'_>) -> Result<Original, ImportError> {
    let mut blobs: Vec<Blob> = Vec::new();
    let mut todo: Vec<(String, String, usize)> = Vec::new();
    match &image.manifest {
        Some((name, media_type)) => todo.push((name.clone(), media_type.clone(), 0)),
        None => {
            let bytes = manifest_of(image, members)?;
            let source = Source::Verbatim(writer.add_bytes(&bytes)?);
            let (digest, size) = (Sha256::digest(&bytes).into(), bytes.len() as u64);
            blobs.push(Blob { digest, size, media_type: media::MANIFEST.to_owned(), source });
            todo.extend([&image.config].into_iter().chain(&image.layers).map(|name| (name.clone(), String::new(), 0)));
        }
    }
    let mut seen = BTreeSet::new();
    while let Some((name, media_type, depth)) = todo.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let too_deep = || ImportError::Document { name: name.clone(), reason: "indexes nested too deep".to_owned() };
        match members.find(&name) {
            Ok(Member::Layer(layer)) => {
                check_name(&name, &layer.digest)?;
                let (digest, size, source) = (layer.digest, layer.size, layer.source.clone());
                blobs.push(Blob { digest, size, media_type: String::new(), source });
            }
            Ok(Member::Other { digest, size, source }) => {
                check_name(&name, digest)?;
                let (digest, size, source) = (*digest, *size, source.clone());
                blobs.push(Blob { digest, size, media_type: String::new(), source });
            }
            Ok(_) => {
                let bytes = members.document(&name)?;
                for (descriptor, lists) in descriptors(bytes, &media_type) {
                    if lists && depth > MAX_NESTING {
                        return Err(too_deep());
                    }
                    let media_type = if lists { descriptor.media_type.clone() } else { String::new() };
                    todo.push((blob_name(&descriptor)?, media_type, depth + 1));
                }
                let source = Source::Verbatim(writer.add_bytes(bytes)?);
                let (digest, size) = (Sha256::digest(bytes).into(), bytes.len() as u64);
                blobs.push(Blob { digest, size, media_type, source });
            }
            // Of other platforms an archive need not have everything (`skopeo copy` of one of them).
            Err(_) => {}
        }
        if blobs.len() > MAX_BLOBS {
            return Err(ImportError::TooMany { name: "the archive".to_owned(), limit: MAX_BLOBS });
        }
    }
    Ok(Original { blobs })
}

/// What a manifest or an index names, and whether that is again such a list.
pub(crate) fn descriptors(bytes: &[u8], media_type: &str) -> Vec<(Descriptor, bool)> {
    if media::is_index(media_type) {
        let index: Option<Index> = serde_json::from_slice(bytes).ok();
        return index.into_iter().flat_map(|index| index.manifests).map(|one| (one, true)).collect();
    }
    if media::is_manifest(media_type) {
        let manifest: Option<Manifest> = serde_json::from_slice(bytes).ok();
        let parts = manifest.into_iter().flat_map(|manifest| [manifest.config].into_iter().chain(manifest.layers));
        return parts.map(|one| (one, false)).collect();
    }
    Vec::new()
}

/// An OCI manifest for an image that came without one.
fn manifest_of(image: &Described, members: &Members) -> Result<Vec<u8>, ImportError> {
    let named = |media_type: String, digest: &[u8; 32], size: u64| serde_json::json!({"mediaType": media_type, "digest": digest_text(digest), "size": size});
    let config = members.document(&image.config)?;
    let layers = image.layers.iter().map(|name| {
        let layer = members.layer(name)?;
        Ok(named(format!("{}{}", media::LAYER, layer.compression), &layer.digest, layer.size))
    });
    let layers = layers.collect::<Result<Vec<_>, ImportError>>()?;
    let config = named(media::CONFIG.to_owned(), &Sha256::digest(config).into(), config.len() as u64);
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media::MANIFEST, "config": config, "layers": layers,
    });
    Ok(serde_json::to_vec(&manifest).expect("plain data"))
}

fn read_member(
    entry: &mut impl Read,
    size: u64,
    name: &str,
    writer: &mut Writer<'_>,
    budget: &Budget,
    anything: bool,
) -> Result<Member, ImportError> {
    let mut head = Vec::new();
    entry.take(512).read_to_end(&mut head).map_err(|error| ImportError::damaged(name, &error))?;
    if (head.len() as u64) < size.min(512) {
        return Err(ImportError::cut_short(name));
    }
    if is_gzip(&head) || is_zstd(&head) || is_tar(&head) {
        return read_layer(head, entry, size, name, writer, budget);
    }
    if size > MAX_DOCUMENT as u64 && anything {
        return read_other(head, entry, name, writer);
    }
    if size > MAX_DOCUMENT as u64 {
        let reason = format!("{size} bytes that are neither a layer nor a document");
        return Err(ImportError::Document { name: name.to_owned(), reason });
    }
    budget.spend(size as usize, name)?;
    let mut bytes = head;
    entry.read_to_end(&mut bytes).map_err(|error| ImportError::damaged(name, &error))?;
    if bytes.len() as u64 != size {
        return Err(ImportError::cut_short(name));
    }
    Ok(Member::Document { digest: Sha256::digest(&bytes).into(), bytes })
}

/// Keeps what is neither a layer nor a document as it is.
fn read_other(head: Vec<u8>, entry: impl Read, name: &str, writer: &mut Writer<'_>) -> Result<Member, ImportError> {
    let (copy, hash) = (Some(writer.sink()?), Sha256::new());
    let mut raw = Hashing { inner: io::Cursor::new(head).chain(entry), hash, read: 0, copy };
    io::copy(&mut raw, &mut io::sink()).map_err(|error| ImportError::damaged(name, &error))?;
    let copy = raw.copy.expect("it was given one");
    let (digest, source) = (raw.hash.finalize().into(), Source::Verbatim(writer.keep(copy)?));
    Ok(Member::Other { digest, size: raw.read, source })
}

fn read_layer(
    head: Vec<u8>,
    entry: &mut impl Read,
    size: u64,
    name: &str,
    writer: &mut Writer<'_>,
    budget: &Budget,
) -> Result<Member, ImportError> {
    // Uncompressed, the blob's digest and the layer's are one and the same.
    let compression = if is_gzip(&head) {
        "+gzip"
    } else if is_zstd(&head) {
        "+zstd"
    } else {
        ""
    };
    let compressed = !compression.is_empty();
    let sink = writer.sink()?;
    let (copy, notes) = if compressed { (Some(sink), None) } else { (None, Some(sink)) };
    let mut raw = Hashing { inner: io::Cursor::new(head).chain(entry), hash: Sha256::new(), read: 0, copy };
    let lent = &mut *writer;
    let (tree, recipe, diff_id) = thread::scope(|scope| {
        let (sender, receiver) = sync_channel(QUEUE);
        let (used, empty) = channel();
        let parser = scope.spawn(move || {
            let input = Pieces { receiver, used, piece: Vec::new(), at: 0, total: 0 };
            let damaged = |error: io::Error| ImportError::damaged(name, &error);
            let input = layer::Noting::new(input, notes).map_err(damaged)?;
            let tree = layer::read(&input, name, lent, budget)?;
            // The digest covers what follows the last entry, too.
            io::copy(&mut &input, &mut io::sink()).map_err(damaged)?;
            let recipe = input.finish(lent)?.map(|recipe| lent.add_bytes(&recipe.encode())).transpose()?;
            Ok((tree, recipe))
        });
        let hashed = pump(&mut raw, &sender, &empty, compressed).and_then(|diff_id| {
            // What follows the compressed stream belongs to the blob's digest too.
            io::copy(&mut raw, &mut io::sink())?;
            Ok(diff_id)
        });
        if let Err(error) = &hashed {
            // The parser may have stopped already; then its own error is the one to tell.
            let same = error.raw_os_error().map_or_else(
                || io::Error::new(error.kind(), error.to_string()),
                // A full disk stays one.
                io::Error::from_raw_os_error,
            );
            drop(sender.send(Err(same)));
        }
        drop(sender);
        let parsed: Result<(Tree, Option<Content>), ImportError> = parser.join().expect("the parser does not panic");
        let (tree, recipe) = parsed?;
        Ok::<_, ImportError>((tree, recipe, hashed.map_err(|error| ImportError::damaged(name, &error))?))
    })?;
    if raw.read != size {
        return Err(ImportError::cut_short(name));
    }
    let digest = raw.hash.finalize().into();
    let source = match (raw.copy, recipe) {
        (Some(copy), _) => Source::Verbatim(writer.keep(copy)?),
        (None, Some(recipe)) => Source::Recipe(recipe),
        (None, None) => unreachable!("what is not copied is noted"),
    };
    let diff_id = diff_id.unwrap_or(digest);
    Ok(Member::Layer(Box::new(LayerMember { digest, diff_id, size, tree, source, compression })))
}

/// Decompresses and hands over; with `again` it also returns the digest of what it handed over. Buffers come back by `empty`:
/// memory that is new costs the kernel more than the copy into it.
fn pump(
    raw: &mut impl Read,
    sender: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
    again: bool,
) -> io::Result<Option<[u8; 32]>> {
    let mut plain = decompress(BufReader::with_capacity(READER, raw)).map_err(io::Error::other)?;
    let mut hash = again.then(Sha256::new);
    loop {
        let mut piece = empty.try_recv().unwrap_or_default();
        piece.resize(BUFFER, 0);
        let len = read_full(&mut plain, &mut piece)?;
        piece.truncate(len);
        if piece.is_empty() {
            return Ok(hash.map(|hash| hash.finalize().into()));
        }
        if let Some(hash) = &mut hash {
            hash.update(&piece);
        }
        if sender.send(Ok(piece)).is_err() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the parser has stopped"));
        }
    }
}

/// Fills `buffer`, or as much of it as there is; how much that is.
pub(crate) fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match input.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
    read: u64,
    /// Where it is kept as it is, if it is.
    copy: Option<Sink>,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.hash.update(&buffer[..len]);
        self.read += len as u64;
        if let Some(copy) = &mut self.copy {
            copy.write_all(&buffer[..len])?;
        }
        Ok(len)
    }
}

/// The reading end of the queue between the two threads.
struct Pieces {
    receiver: Receiver<io::Result<Vec<u8>>>,
    /// Where buffers go that have been read.
    used: Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    total: u64,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            match self.receiver.recv() {
                Ok(piece) => {
                    let read = std::mem::replace(&mut self.piece, piece?);
                    self.at = 0;
                    // The other side may have read all there is.
                    let _over = self.used.send(read);
                }
                // Some tools leave the last block short (umoci insert). The digest says whether anything is missing.
                Err(_) => {
                    let short = (512 - self.total % 512) % 512;
                    (self.piece, self.at) = (vec![0; short as usize], 0);
                }
            }
            self.total += self.piece.len() as u64;
        }
        let len = buffer.len().min(self.piece.len() - self.at);
        buffer[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

fn decompress<'a>(mut input: BufReader<impl Read + 'a>) -> Result<Box<dyn Read + 'a>, ImportError> {
    use std::io::BufRead;
    let head = input.fill_buf().map_err(|error| ImportError::Read(error.to_string()))?;
    if is_gzip(head) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input)));
    }
    if is_zstd(head) {
        let decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(|e| ImportError::Read(e.to_string()))?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(input))
}

fn is_gzip(head: &[u8]) -> bool {
    head.starts_with(&[0x1f, 0x8b])
}

fn is_zstd(head: &[u8]) -> bool {
    head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

/// A tar header has a checksum; an empty archive is zeros.
fn is_tar(head: &[u8]) -> bool {
    if head.len() < 512 {
        return false;
    }
    if head.iter().all(|byte| *byte == 0) {
        return true;
    }
    let header = tar::Header::from_byte_slice(head);
    let sum: u32 =
        head.iter().enumerate().map(|(at, byte)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte })).sum();
    header.cksum().is_ok_and(|stored| stored == sum)
}

fn resolve(name: &str, link: &str) -> String {
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn hex(bytes: &[u8; 32]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

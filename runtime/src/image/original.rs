//! What an image was made of, bit for bit: manifests, configs and layers as its tool wrote them, each under its SHA-256.
//!
//! To run an image nobody needs that; to give it back to tools by the digests they know, nothing else will do. A document
//! and a compressed layer are kept as they are. An uncompressed layer is a *recipe*: its files' contents, which are in the
//! store anyway, and every byte that lies between them (headers, padding), in one compressed content of their own.
//!
//! An original is fetched like an image, by following hashes from one chunk: root → [`Original`] → recipes → contents.
//!
//! **Bounds.** [`MAX_BLOBS`] blobs; what is read into memory (the list, a recipe) is bounded as an image's trees are.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Content, VERSION, digest_text};

/// The version byte of an original's root, which no image's root has.
pub const ORIGINAL: u8 = 128 + VERSION;
/// The most blobs that one may have: a few images for each of some platforms.
pub const MAX_BLOBS: usize = 20_000;

/// The chunk that an original is found by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginalRoot {
    /// [`ORIGINAL`].
    pub version: u8,
    /// An encoded [`Original`].
    pub list: Content,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Original {
    /// The first is the manifest or index that everything else is found from.
    pub blobs: Vec<Blob>,
}

/// Some bytes that a tool named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256 of its bytes.
    pub digest: [u8; 32],
    /// How many there are.
    pub size: u64,
    /// Of a manifest or index; empty for what others name.
    pub media_type: String,
    /// Where they are.
    pub source: Source,
}

/// How a blob's bytes are had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// They are this content.
    Verbatim(Content),
    /// They are made by this encoded [`Recipe`].
    Recipe(Content),
}

/// How an uncompressed layer is made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// All bytes that are no file's, one after another, as a zstd stream.
    pub literals: Content,
    /// In turn: so many of those bytes, then a file's content.
    pub parts: Vec<(u64, Content)>,
}

impl OriginalRoot {
    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a plain value always encodes")
    }

    /// From bytes whose hash was checked; `None` when they are an image's root.
    pub fn decode(bytes: &[u8]) -> Option<Result<OriginalRoot, String>> {
        (bytes.first() == Some(&ORIGINAL))
            .then(|| postcard::from_bytes(bytes).map_err(|error| format!("a malformed original: {error}")))
    }
}

impl Original {
    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a plain value always encodes")
    }

    /// From bytes whose hash was checked.
    pub fn decode(bytes: &[u8]) -> Result<Original, String> {
        let original: Original =
            postcard::from_bytes(bytes).map_err(|error| format!("a malformed list of blobs: {error}"))?;
        if original.blobs.is_empty() || original.blobs.len() > MAX_BLOBS {
            return Err(format!("an original of {} blobs", original.blobs.len()));
        }
        Ok(original)
    }

    /// The manifest or index that everything else is found from.
    pub fn manifest(&self) -> &Blob {
        // There is one: `decode` checks, and nothing else makes one without.
        &self.blobs[0]
    }

    /// Bytes of its blobs that are no file's.
    pub(crate) fn own_size(&self) -> u64 {
        let own = |blob: &Blob| match &blob.source {
            Source::Verbatim(content) | Source::Recipe(content) => content.size(),
        };
        self.blobs.iter().map(own).sum()
    }
}

impl Recipe {
    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a plain value always encodes")
    }

    /// From bytes whose hash was checked.
    pub fn decode(bytes: &[u8]) -> Result<Recipe, String> {
        // Part by part: one that names nothing takes a hundred times its bytes in memory, and no honest one does.
        let malformed = |error: postcard::Error| format!("a malformed recipe: {error}");
        let (literals, rest) = postcard::take_from_bytes::<Content>(bytes).map_err(malformed)?;
        let (count, mut rest) = postcard::take_from_bytes::<u64>(rest).map_err(malformed)?;
        let mut parts = Vec::new();
        for _ in 0..count {
            let (part, after) = postcard::take_from_bytes::<(u64, Content)>(rest).map_err(malformed)?;
            if part.1.chunks.is_empty() {
                return Err("a recipe that names an empty file".to_owned());
            }
            parts.push(part);
            rest = after;
        }
        Ok(Recipe { literals, parts })
    }

    /// Every content that it needs.
    pub fn contents(&self) -> impl Iterator<Item = &Content> {
        [&self.literals].into_iter().chain(self.parts.iter().map(|(_, file)| file))
    }
}

/// A content's bytes.
pub(crate) type Part = Box<dyn Read + Send>;
/// Opens a content.
pub(crate) type Open = Box<dyn Fn(&Content) -> io::Result<Part> + Send>;

/// A blob's bytes, made as they are read, and compared with its digest before the last of them are passed on.
pub struct BlobReader {
    digest: [u8; 32],
    hash: Sha256,
    open: Open,
    literals: Part,
    parts: std::vec::IntoIter<(u64, Content)>,
    /// Of the literals, before the next file; after the last, all that are left.
    before: u64,
    next: Option<Content>,
    file: Option<Part>,
    /// Bytes not read yet.
    left: u64,
}

impl BlobReader {
    /// Of a blob that is one content.
    pub(crate) fn verbatim(blob: &Blob, content: Part) -> BlobReader {
        let open: Open = Box::new(|_| Err(io::Error::other("it has no parts")));
        BlobReader { before: u64::MAX, ..BlobReader::new(blob, content, Vec::new(), open) }
    }

    /// Of a blob that this recipe makes.
    pub(crate) fn recipe(blob: &Blob, recipe: Recipe, open: Open) -> io::Result<BlobReader> {
        let literals = Box::new(zstd::stream::read::Decoder::new(open(&recipe.literals)?)?);
        let mut reader = BlobReader::new(blob, literals, recipe.parts, open);
        reader.advance();
        Ok(reader)
    }

    fn new(blob: &Blob, literals: Part, parts: Vec<(u64, Content)>, open: Open) -> BlobReader {
        let (digest, hash, parts) = (blob.digest, Sha256::new(), parts.into_iter());
        BlobReader { digest, hash, open, literals, parts, before: 0, next: None, file: None, left: blob.size }
    }

    fn advance(&mut self) {
        match self.parts.next() {
            Some((before, file)) => (self.before, self.next) = (before, Some(file)),
            None => (self.before, self.next) = (u64::MAX, None),
        }
    }

    /// The next bytes, as many as fit at the most; none when there are no more.
    fn make(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(file) = &mut self.file {
                match file.read(buffer)? {
                    0 => {
                        self.file = None;
                        self.advance();
                    }
                    len => return Ok(len),
                }
            } else if self.before > 0 {
                let most = buffer.len().min(usize::try_from(self.before).unwrap_or(usize::MAX));
                let len = self.literals.read(&mut buffer[..most])?;
                if len == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the blob is not all here"));
                }
                self.before -= len as u64;
                return Ok(len);
            } else if let Some(next) = self.next.take() {
                self.file = Some((self.open)(&next)?);
            } else {
                return Ok(0);
            }
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let len = if most == 0 { 0 } else { self.make(&mut buffer[..most])? };
        self.hash.update(&buffer[..len]);
        self.left -= len as u64;
        let ended = len == 0 || self.left == 0;
        if ended && (self.left > 0 || <[u8; 32]>::from(self.hash.clone().finalize()) != self.digest) {
            return Err(io::Error::other(format!("blob {} is not what it was", digest_text(&self.digest))));
        }
        Ok(len)
    }
}

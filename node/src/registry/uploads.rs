//! Blobs and manifests on their way in: what a push has brought and no manifest names yet.
//!
//! ```text
//! uploads/<id>        an upload that goes on; whoever sends may come back to it
//! uploads/<sha256>    a blob that is whole and was compared with its digest
//! ```
//!
//! **Who writes.** A request takes its upload out of the table while it adds to it, so that there is one at a time; one whose
//! sender vanishes goes back with what came. **Bounds.** [`MAX_UPLOADS`] uploads of at most [`MAX_BLOB`] bytes, [`MAX_BYTES`] with what
//! is staged; what nobody has
//! touched for [`IDLE`] is deleted, and all of it when the daemon starts.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use futures::StreamExt;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

const MAX_UPLOADS: usize = 256;
const MAX_STAGED: usize = 20_000;
const MAX_BLOB: u64 = 64 << 30;
/// Of all of it; the last that is begun may go beyond.
const MAX_BYTES: u64 = 128 << 30;
const IDLE: Duration = Duration::from_secs(3600);

/// What has been brought.
pub(super) struct Uploads {
    dir: PathBuf,
    open: Mutex<HashMap<String, Upload>>,
    staged: Mutex<HashMap<[u8; 32], Staged>>,
}

/// An upload between two requests; what is dropped before it is finished is deleted.
pub(super) struct Upload {
    id: String,
    path: PathBuf,
    finished: bool,
    file: tokio::fs::File,
    hash: Sha256,
    len: u64,
    touched: Instant,
}

/// A blob that is whole.
#[derive(Clone, Debug)]
pub(super) struct Staged {
    /// Bytes.
    pub(super) size: u64,
    /// Of a manifest; empty for others.
    pub(super) media_type: String,
    touched: Instant,
}

/// Why bytes were not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    /// There is no such upload, or another request adds to it.
    #[error("no such upload, or another request adds to it")]
    Unknown,
    /// There are too many.
    #[error("{MAX_UPLOADS} uploads are under way already")]
    TooMany,
    /// The sender went away.
    #[error("the sender went away after {0} bytes")]
    Broken(u64),
    /// It does not begin where the upload ends.
    #[error("the upload ends at {0}")]
    Range(u64),
    /// It is too long.
    #[error("more than {MAX_BLOB} bytes")]
    TooLong,
    /// The bytes have another digest.
    #[error("these bytes have the digest sha256:{0}")]
    Digest(String),
    /// The disk.
    #[error("cannot keep it: {0}")]
    Disk(#[from] io::Error),
}

impl Uploads {
    /// Begins with nothing, in a folder of its own.
    pub(super) fn new(dir: &Path) -> io::Result<Uploads> {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        fs::create_dir_all(dir)?;
        Ok(Uploads { dir: dir.to_owned(), open: Mutex::default(), staged: Mutex::default() })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Upload>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn staged(&self) -> MutexGuard<'_, HashMap<[u8; 32], Staged>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blob_path(&self, digest: &[u8; 32]) -> PathBuf {
        self.dir.join(data_encoding::HEXLOWER.encode(digest))
    }

    /// Begins an upload.
    pub(super) async fn begin(&self) -> Result<Upload, UploadError> {
        let bytes = self.open().values().map(|upload| upload.len).sum::<u64>()
            + self.staged().values().map(|staged| staged.size).sum::<u64>();
        if self.open().len() >= MAX_UPLOADS || self.staged().len() >= MAX_STAGED || bytes >= MAX_BYTES {
            return Err(UploadError::TooMany);
        }
        let id = crate::daemon::home::random::<16>().map_err(|error| io::Error::other(error.to_string()))?;
        let id = data_encoding::HEXLOWER.encode(&id);
        let path = self.dir.join(&id);
        let file = tokio::fs::File::create(&path).await?;
        Ok(Upload { id, path, finished: false, file, hash: Sha256::new(), len: 0, touched: Instant::now() })
    }

    /// Takes an upload out of the table; [`Uploads::put_back`] returns it.
    pub(super) fn take(&self, id: &str) -> Result<Upload, UploadError> {
        self.open().remove(id).ok_or(UploadError::Unknown)
    }

    /// It waits for another request.
    pub(super) fn put_back(&self, mut upload: Upload) {
        upload.touched = Instant::now();
        self.open().insert(upload.id.clone(), upload);
    }

    /// How long an upload is by now.
    pub(super) fn len(&self, id: &str) -> Option<u64> {
        self.open().get(id).map(|upload| upload.len)
    }

    /// Gives an upload up.
    pub(super) fn cancel(&self, id: &str) -> Result<(), UploadError> {
        self.take(id).map(drop)
    }

    /// The upload is all there is of a blob.
    pub(super) async fn finish(
        &self,
        mut upload: Upload,
        digest: &[u8; 32],
        media_type: &str,
    ) -> Result<(), UploadError> {
        upload.file.flush().await?;
        let actual: [u8; 32] = upload.hash.clone().finalize().into();
        if actual != *digest {
            return Err(UploadError::Digest(data_encoding::HEXLOWER.encode(&actual)));
        }
        fs::rename(&upload.path, self.blob_path(digest))?;
        upload.finished = true;
        let staged = Staged { size: upload.len, media_type: media_type.to_owned(), touched: Instant::now() };
        self.staged().insert(*digest, staged);
        Ok(())
    }

    /// A blob that is whole and belongs to nothing yet.
    pub(super) fn blob(&self, digest: &[u8; 32]) -> Option<Staged> {
        let mut all = self.staged();
        let staged = all.get_mut(digest)?;
        staged.touched = Instant::now();
        Some(staged.clone())
    }

    /// Its bytes.
    pub(super) fn read(&self, digest: &[u8; 32]) -> Option<(u64, Box<dyn Read + Send>)> {
        let staged = self.blob(digest)?;
        let file = File::open(self.blob_path(digest)).ok()?;
        Some((staged.size, Box::new(io::BufReader::with_capacity(256 * 1024, file))))
    }

    /// It belongs to something now, or is not wanted.
    pub(super) fn forget(&self, digest: &[u8; 32]) {
        if self.staged().remove(digest).is_some() {
            // It is deleted at the next start at the latest.
            drop(fs::remove_file(self.blob_path(digest)));
        }
    }

    /// Deletes what nobody has touched for long.
    pub(super) fn expire(&self) {
        let old = |touched: &Instant| touched.elapsed() > IDLE;
        let uploads: Vec<String> =
            self.open().values().filter(|upload| old(&upload.touched)).map(|upload| upload.id.clone()).collect();
        uploads.iter().for_each(|id| drop(self.cancel(id)));
        let blobs: Vec<[u8; 32]> =
            self.staged().iter().filter(|(_, staged)| old(&staged.touched)).map(|(digest, _)| *digest).collect();
        blobs.iter().for_each(|digest| self.forget(digest));
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.finished {
            // It is deleted at the next start at the latest.
            drop(fs::remove_file(&self.path));
        }
    }
}

impl Upload {
    /// By what it is known.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Adds what a request brings, which says it begins at `from`.
    pub(super) async fn add(&mut self, body: Body, from: Option<u64>) -> Result<(), UploadError> {
        if from.is_some_and(|from| from != self.len) {
            return Err(UploadError::Range(self.len));
        }
        let mut pieces = body.into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|_| UploadError::Broken(self.len))?;
            if self.len + piece.len() as u64 > MAX_BLOB {
                return Err(UploadError::TooLong);
            }
            self.file.write_all(&piece).await?;
            self.hash.update(&piece);
            self.len += piece.len() as u64;
        }
        // Errors of what was written last show here.
        self.file.flush().await?;
        Ok(())
    }
}

//! Writing to the disk beside whoever makes the bytes: one thread, which writes what it is given in that order.
//!
//! Whoever writes waits: for the disk, where it goes past the kernel's cache ([`super::buffer`]), or for pages of that cache. An
//! import that wrote by itself would use one core where two are idle.
//!
//! **When a write fails** nothing more is written, whoever gives the next one is told why, and so is [`Spool::finish`].
//! Nothing is on the disk's way before `finish` has returned; a spool that is dropped has written all it was given, or failed.
//!
//! **Bounds.** [`MAX_BYTES`] are waiting, and one piece more; [`MAX_SPARE`] buffers are kept for the next pieces, none larger
//! than [`MAX_BYTES`].

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use super::buffer::{Buffer, append};
use super::{StoreError, lock, rewrite};

/// Bytes that wait to be written.
const MAX_BYTES: usize = 8 << 20;
/// A piece from this length on is on its way to the disk at once; small ones are better written many together.
const AT_ONCE: usize = 256 << 10;
/// What an entry counts besides its bytes, so that many empty ones are bounded too.
const JOB: usize = 256;
const MAX_SPARE: usize = 4;

enum Job {
    /// A new file of these bytes.
    Whole(PathBuf, Buffer),
    /// More bytes of an open one.
    More(Arc<File>, PathBuf, Buffer),
    /// What was written first goes to its place.
    Place(PathBuf, PathBuf),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    bytes: usize,
    /// The writer has something in its hands.
    is_busy: bool,
    closed: bool,
    failed: Option<StoreError>,
    spare: Vec<Buffer>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is a job, or no more of them.
    ready: Condvar,
    /// There is room, or nothing left to write.
    room: Condvar,
}

/// The thread, for its owner.
pub(super) struct Spool {
    lines: Line,
    thread: Option<JoinHandle<()>>,
}

/// A way to the thread.
#[derive(Clone)]
pub(super) struct Line(Arc<Shared>);

impl Spool {
    pub(super) fn start() -> Result<Spool, StoreError> {
        let shared = Arc::new(Shared::default());
        let its = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("store-writer".to_owned()).spawn(move || its.work());
        let thread = thread.map_err(|error| StoreError::io("start a thread for", Path::new("the store"), error))?;
        Ok(Spool { lines: Line(shared), thread: Some(thread) })
    }

    pub(super) fn line(&self) -> &Line {
        &self.lines
    }

    /// Waits until everything is written.
    pub(super) fn finish(&self) -> Result<(), StoreError> {
        let Line(shared) = &self.lines;
        let mut state = lock(&shared.state);
        while (state.is_busy || !state.jobs.is_empty()) && state.failed.is_none() {
            state = wait(&shared.room, state);
        }
        state.failed.as_ref().map_or(Ok(()), |error| Err(again(error)))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        lock(&self.lines.0.state).closed = true;
        self.lines.0.ready.notify_all();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, what it wrote is removed all the same.
            drop(thread.join());
        }
    }
}

impl Line {
    /// An empty buffer with room for `len` bytes, perhaps a used one: new memory is what costs.
    pub(super) fn buffer(&self, len: usize) -> Buffer {
        let mut buffer = lock(&self.0.state).spare.pop().unwrap_or_default();
        buffer.begin(len);
        buffer
    }

    /// Takes a buffer that is not needed after all.
    pub(super) fn give_back(&self, buffer: Buffer) {
        lock(&self.0.state).keep(buffer);
    }

    /// Has a file written.
    pub(super) fn whole(&self, path: PathBuf, bytes: Buffer) -> Result<(), StoreError> {
        self.push(Job::Whole(path, bytes))
    }

    /// Has bytes added to a file, which errors call by `path`.
    pub(super) fn more(&self, file: &Arc<File>, path: &Path, bytes: Buffer) -> Result<(), StoreError> {
        self.push(Job::More(Arc::clone(file), path.to_owned(), bytes))
    }

    /// Has a file brought to its place, whose folder is made if need be.
    pub(super) fn place(&self, from: PathBuf, to: PathBuf) -> Result<(), StoreError> {
        self.push(Job::Place(from, to))
    }

    fn push(&self, job: Job) -> Result<(), StoreError> {
        let mut state = lock(&self.0.state);
        while state.bytes >= MAX_BYTES && state.failed.is_none() {
            state = wait(&self.0.room, state);
        }
        if let Some(error) = &state.failed {
            return Err(again(error));
        }
        state.bytes += job.cost();
        state.jobs.push_back(job);
        self.0.ready.notify_one();
        Ok(())
    }
}

impl State {
    fn keep(&mut self, buffer: Buffer) {
        if self.spare.len() < MAX_SPARE && (1..=MAX_BYTES).contains(&buffer.room()) {
            self.spare.push(buffer);
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            let Some(job) = state.jobs.pop_front() else {
                if state.closed {
                    return;
                }
                state = wait(&self.ready, state);
                continue;
            };
            state.is_busy = true;
            drop(state);
            let cost = job.cost();
            let (buffer, done) = job.run();
            state = lock(&self.state);
            state.is_busy = false;
            state.bytes -= cost;
            state.keep(buffer);
            if let Err(error) = done {
                state.failed = Some(error);
                state.jobs.clear();
                state.bytes = 0;
            }
            self.room.notify_all();
        }
    }
}

impl Job {
    fn cost(&self) -> usize {
        match self {
            Job::Whole(_, bytes) | Job::More(_, _, bytes) => bytes.len() + JOB,
            Job::Place(..) => JOB,
        }
    }

    /// Does it; its buffer may be used again.
    fn run(self) -> (Buffer, Result<(), StoreError>) {
        match self {
            Job::Whole(path, bytes) => {
                let written =
                    File::create(&path).and_then(|file| append(&file, &bytes).map(|cached| begin(&file, cached)));
                (bytes, written.map_err(|error| StoreError::io("write", &path, error)))
            }
            Job::More(file, path, bytes) => {
                let written = append(&file, &bytes).map(|cached| begin(&file, cached));
                (bytes, written.map_err(|error| StoreError::io("write", &path, error)))
            }
            Job::Place(from, to) => (Buffer::default(), place(&from, &to)),
        }
    }
}

/// Has the kernel begin to bring to the disk what was written: else the disk would rest until somebody waits for it.
pub(super) fn begin(file: &File, len: usize) {
    if len >= AT_ONCE {
        // A file system that cannot has it to do at the end.
        // SAFETY: the descriptor is open for the whole call, and there is no pointer.
        let _at_the_end = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

fn place(from: &Path, to: &Path) -> Result<(), StoreError> {
    // What was there before is damaged, or the same. Unpacked layers have links to it, which are to see what it is now.
    if fs::symlink_metadata(to).is_ok_and(|before| before.nlink() > 1) {
        return overwrite(from, to).map_err(|error| StoreError::io("write", to, error));
    }
    let renamed = match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = to.parent().expect("an object is in a folder");
            fs::create_dir_all(parent).map_err(|error| StoreError::io("make", parent, error))?;
            fs::rename(from, to)
        }
        renamed => renamed,
    };
    renamed.map_err(|error| StoreError::io("rename", from, error))
}

fn overwrite(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (File::open(from)?, File::options().write(true).open(to)?);
    rewrite(&target, || target.set_len(io::copy(&mut &source, &mut &target)?))?;
    fs::remove_file(from)
}

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The same once more, for whoever asks next.
fn again(error: &StoreError) -> StoreError {
    match error {
        StoreError::DiskFull { path } => StoreError::DiskFull { path: path.clone() },
        StoreError::Io { step, path, source } => {
            let source = source.raw_os_error().map_or_else(|| source.kind().into(), io::Error::from_raw_os_error);
            StoreError::Io { step, path: path.clone(), source }
        }
        other => StoreError::Damaged(other.to_string()),
    }
}

//! Running an image before all of it is here.
//!
//! The image's file system is there as soon as its lists are ([`crate::store`]); its files' bytes come through a FUSE file system
//! that has the shape of the store's `objects`, one for each such container. Who serves it is the *keeper*, a fork of the
//! container's shim: it reads a content's own file once the whole image is here, and until then asks the daemon, which gives
//! checked bytes and has them fetched before all others.
//!
//! ```text
//! keeper  →  the image's root chunk, 32 bytes, once for each line
//!         →  content, 32 bytes; offset, 8; length, 4: little endian       ([`Read`])
//! daemon  ←  the same length, 4, and so many bytes; or [`FAILED`]
//! ```
//!
//! **States** of an image, as a keeper knows them: *coming* → *whole*, when there is a file `complete` beside its file system, which
//! the store writes when everything of it was checked.
//!
//! **If one dies.** The daemon: reads that need it wait for the next one; what the kernel has in its page cache, and images that are
//! whole, need none. The keeper: its container's reads fail (ENOTCONN), nothing reads as zeros; it dies with the shim, and the
//! container with that. The providers: reads wait as long as the exchange hopes, then fail with EIO, and the next read tries
//! again.
//!
//! **Bounds.** [`THREADS`] reads of a container at one time, others wait in the kernel; a read is of at most [`MAX_READ`] bytes.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request, Session, SessionACL,
};
use nix::unistd::ForkResult;
use serde::{Deserialize, Serialize};

use crate::image::{Chunk, Content, ContentId};
use crate::sys;

/// The most bytes of one read.
pub const MAX_READ: u32 = 1 << 20;
/// In place of a length: these bytes cannot be had.
pub const FAILED: u32 = u32::MAX;
/// Reads of one container that are waited for at one time.
const THREADS: usize = 16;
/// Between two tries to reach the daemon.
const RETRY: Duration = Duration::from_millis(200);
/// What is named by its hash never changes.
const FOREVER: Duration = Duration::from_secs(1 << 30);
/// An id and a size in the list of contents.
const LISTED: u64 = 40;
/// Folders are numbered from here on by their byte, contents by their place in the list after them.
const FOLDERS: u64 = 2;
const CONTENTS: u64 = FOLDERS + 256;

/// Where a keeper finds what it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lazy {
    /// The image.
    pub root: Chunk,
    /// Its contents and their sizes ([`list`]).
    pub contents: PathBuf,
    /// There once everything of the image is.
    pub complete: PathBuf,
    /// The daemon's.
    pub socket: PathBuf,
}

/// A part of a content that somebody waits for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of which content.
    pub content: ContentId,
    /// From where on.
    pub offset: u64,
    /// How much.
    pub len: u32,
}

impl Read {
    /// Bytes of one on the line.
    pub const SIZE: usize = 44;

    fn encode(&self) -> [u8; Read::SIZE] {
        let mut bytes = [0; Read::SIZE];
        bytes[..32].copy_from_slice(&self.content);
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// As it came; at most [`MAX_READ`] bytes of a content.
    pub fn decode(bytes: &[u8; Read::SIZE]) -> Read {
        let (content, rest) = bytes.split_at(32);
        let (offset, len) = rest.split_at(8);
        let len = u32::from_le_bytes(len.try_into().expect("four of forty-four"));
        Read {
            content: content.try_into().expect("thirty-two of forty-four"),
            offset: u64::from_le_bytes(offset.try_into().expect("eight of forty-four")),
            len: len.min(MAX_READ),
        }
    }

    /// The chunks that it touches, and what of each: `from..to`.
    pub fn chunks(&self, content: &Content) -> Vec<(Chunk, std::ops::Range<usize>)> {
        let end = self.offset.saturating_add(u64::from(self.len));
        let (mut touched, mut at) = (Vec::new(), 0);
        for (chunk, len) in &content.chunks {
            let next = at + u64::from(*len);
            if next > self.offset && at < end {
                let (from, to) = (self.offset.max(at) - at, end.min(next) - at);
                touched.push((*chunk, from as usize..to as usize));
            }
            at = next;
        }
        touched
    }
}

/// The list that a keeper knows contents by: in the order of their ids, each with its size.
pub(crate) fn list<'a>(contents: impl Iterator<Item = &'a Content>) -> Vec<u8> {
    let sizes: std::collections::BTreeMap<ContentId, u64> =
        contents.map(|content| (content.id(), content.size())).collect();
    sizes.iter().flat_map(|(id, size)| [&id[..], &size.to_le_bytes()].concat()).collect()
}

/// Whether this machine can: it takes FUSE.
pub(crate) fn is_possible() -> bool {
    open_device().is_ok()
}

fn open_device() -> io::Result<OwnedFd> {
    File::options().read(true).write(true).open("/dev/fuse").map(Into::into)
}

/// The daemon's end: where keepers connect.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::bind(socket)
}

/// Forks a keeper; a detached mount of what it serves.
///
/// # Safety
/// The calling process must have one thread, so that the child may go on running Rust code.
pub(crate) unsafe fn mount(lazy: &Lazy, objects: &Path) -> io::Result<OwnedFd> {
    let device = open_device()?;
    let shim = sys::pidfd_open(std::process::id() as i32)?;
    let filesystem = sys::open_filesystem(c"fuse")?;
    let fd = std::ffi::CString::new(device.as_raw_fd().to_string())?;
    let most = std::ffi::CString::new(MAX_READ.to_string())?;
    let plain = [(c"rootmode", c"40000"), (c"user_id", c"0"), (c"group_id", c"0")];
    for (key, value) in [(c"fd", &*fd), (c"max_read", &*most)].into_iter().chain(plain) {
        sys::set_option(filesystem.as_fd(), key, value)?;
    }
    for flag in [c"allow_other", c"default_permissions"] {
        sys::set_flag(filesystem.as_fd(), flag)?;
    }
    // The device belongs to no file system before, and is not to be read.
    let mounted = sys::mount_filesystem(filesystem.as_fd(), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV)?;
    // SAFETY: the caller has one thread.
    if let ForkResult::Child = unsafe { nix::unistd::fork()? } {
        sys::die_with_parent();
        sys::name_process(c"moyai-keeper");
        sys::close_all_but(&[device.as_raw_fd(), shim.as_raw_fd()]);
        // It may have died before it was tied to.
        let code = if is_readable(&shim) { 0 } else { i32::from(keep(lazy, objects, device).is_err()) };
        std::process::exit(code)
    }
    Ok(mounted)
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// A keeper's life.
fn keep(lazy: &Lazy, objects: &Path, device: OwnedFd) -> io::Result<()> {
    let contents = File::open(&lazy.contents)?;
    let count = contents.metadata()?.len() / LISTED;
    let files =
        Files { lazy: lazy.clone(), objects: objects.to_owned(), contents, count, whole: AtomicBool::new(false) };
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    Session::from_fd(files, device, SessionACL::All, config)?.run()
}

/// What a keeper serves: folders of two letters, and in them contents by their ids.
struct Files {
    lazy: Lazy,
    objects: PathBuf,
    contents: File,
    count: u64,
    whole: AtomicBool,
}

thread_local! {
    /// Each thread's line to the daemon.
    static LINE: RefCell<Option<UnixStream>> = const { RefCell::new(None) };
}

impl Files {
    /// The content at a place in the list, and its size.
    fn at(&self, place: u64) -> io::Result<(ContentId, u64)> {
        if place >= self.count {
            return Err(io::ErrorKind::NotFound.into());
        }
        let mut entry = [0; LISTED as usize];
        self.contents.read_exact_at(&mut entry, place * LISTED)?;
        let (id, size) = entry.split_at(32);
        Ok((id.try_into().expect("thirty-two"), u64::from_le_bytes(size.try_into().expect("eight"))))
    }

    /// Where a content is in the list.
    fn find(&self, wanted: &ContentId) -> io::Result<Option<(u64, u64)>> {
        let (mut from, mut to) = (0, self.count);
        while from < to {
            let middle = from + (to - from) / 2;
            let (id, size) = self.at(middle)?;
            match id.cmp(wanted) {
                std::cmp::Ordering::Equal => return Ok(Some((middle, size))),
                std::cmp::Ordering::Less => from = middle + 1,
                std::cmp::Ordering::Greater => to = middle,
            }
        }
        Ok(None)
    }

    fn is_whole(&self) -> bool {
        let whole = self.whole.load(Ordering::Relaxed) || self.lazy.complete.exists();
        self.whole.store(whole, Ordering::Relaxed);
        whole
    }

    fn read(&self, read: &Read) -> io::Result<Vec<u8>> {
        loop {
            if self.is_whole() {
                let file = File::open(crate::store::object_below(&self.objects, &read.content))?;
                let mut bytes = vec![0; read.len as usize];
                file.read_exact_at(&mut bytes, read.offset)?;
                return Ok(bytes);
            }
            let (asked, new) = LINE.with_borrow_mut(|line| {
                let new = line.is_none();
                let answer = self.ask(line, read);
                if answer.is_err() {
                    *line = None;
                }
                (answer, new)
            });
            match asked {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => return Err(io::Error::from_raw_os_error(libc::EIO)),
                // There will be another daemon. One that only closed what was idle is there.
                Err(_) if new => std::thread::sleep(RETRY),
                Err(_) => {}
            }
        }
    }

    /// `None` when it cannot be had.
    fn ask(&self, line: &mut Option<UnixStream>, read: &Read) -> io::Result<Option<Vec<u8>>> {
        let line = match line {
            Some(line) => line,
            None => {
                let mut new = sys::connect(&self.lazy.socket)?;
                new.write_all(&self.lazy.root)?;
                line.insert(new)
            }
        };
        line.write_all(&read.encode())?;
        let mut len = [0; 4];
        line.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len);
        if len == FAILED {
            return Ok(None);
        }
        if len != read.len {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of another length"));
        }
        let mut bytes = vec![0; len as usize];
        line.read_exact(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn attributes(&self, number: u64) -> Option<FileAttr> {
        let folder = number == INodeNo::ROOT.0 || (FOLDERS..CONTENTS).contains(&number);
        let size = if folder { 0 } else { self.at(number.checked_sub(CONTENTS)?).ok()?.1 };
        Some(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if folder { FileType::Directory } else { FileType::RegularFile },
            perm: if folder { 0o555 } else { 0o444 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn look_up(&self, parent: u64, name: &[u8]) -> Option<u64> {
        let hex = |text: &[u8]| data_encoding::HEXLOWER.decode(text).ok();
        if parent == INodeNo::ROOT.0 {
            return match hex(name)?[..] {
                [byte] => Some(FOLDERS + u64::from(byte)),
                _ => None,
            };
        }
        let id: ContentId = hex(name)?.try_into().ok()?;
        if parent != FOLDERS + u64::from(id[0]) {
            return None;
        }
        self.find(&id).ok()?.map(|(place, _)| CONTENTS + place)
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look_up(parent.0, name.as_bytes()).and_then(|number| self.attributes(number)) {
            Some(attributes) => reply.entry(&FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(number.0) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = number.0.checked_sub(CONTENTS).ok_or(io::ErrorKind::IsADirectory.into()).and_then(|place| {
            let (content, whole) = self.at(place)?;
            let len = u64::from(size.min(MAX_READ)).min(whole.saturating_sub(offset)) as u32;
            if len == 0 { Ok(Vec::new()) } else { Files::read(self, &Read { content, offset, len }) }
        });
        match bytes {
            Ok(bytes) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(lens: &[u32]) -> Content {
        Content { chunks: lens.iter().enumerate().map(|(at, len)| ([at as u8; 32], *len)).collect() }
    }

    #[test]
    fn a_read_is_of_the_chunks_that_it_touches() {
        let content = content(&[100, 50, 200]);
        let touched = |offset, len| {
            let read = Read { content: content.id(), offset, len };
            let touched = read.chunks(&content);
            touched.into_iter().map(|(chunk, range)| (chunk[0], range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(touched(0, 350), [(0, 0, 100), (1, 0, 50), (2, 0, 200)]);
        assert_eq!(touched(99, 2), [(0, 99, 100), (1, 0, 1)]);
        assert_eq!(touched(100, 50), [(1, 0, 50)]);
        assert_eq!(touched(340, 100), [(2, 190, 200)]);
        assert_eq!(touched(350, 1), []);
        assert_eq!(touched(u64::MAX, 9), []);
    }

    #[test]
    fn a_read_comes_as_it_was_sent_but_for_one_that_is_too_long() {
        let read = Read { content: [7; 32], offset: 1 << 40, len: 4096 };
        assert_eq!(Read::decode(&read.encode()), read);
        assert_eq!(Read::decode(&Read { len: u32::MAX, ..read }.encode()).len, MAX_READ);
    }

    #[test]
    fn contents_are_found_by_their_ids() {
        let dir = tempfile::tempdir().unwrap();
        let contents: Vec<Content> = (1..200).map(|len| content(&[len, len])).collect();
        let path = dir.path().join("contents");
        fs::write(&path, list(contents.iter().chain(&contents))).unwrap();
        let files = Files {
            lazy: Lazy { root: [0; 32], contents: path.clone(), complete: "".into(), socket: "".into() },
            objects: dir.path().to_owned(),
            contents: File::open(&path).unwrap(),
            count: contents.len() as u64,
            whole: AtomicBool::new(false),
        };
        for content in &contents {
            let id = content.id();
            let folder = files.look_up(1, format!("{:02x}", id[0]).as_bytes()).unwrap();
            let name = data_encoding::HEXLOWER.encode(&id);
            let number = files.look_up(folder, name.as_bytes()).unwrap();
            assert_eq!(files.attributes(number).unwrap().size, content.size());
            assert_eq!(files.look_up(folder ^ 1, name.as_bytes()), None, "in another folder");
        }
        for name in ["", "0", "000", "zz", "..", "00/"] {
            assert_eq!(files.look_up(1, name.as_bytes()), None, "{name}");
        }
        assert_eq!(files.look_up(2, "00".repeat(32).as_bytes()), None);
        assert!(files.attributes(0).is_none() && files.attributes(u64::MAX).is_none());
    }
}

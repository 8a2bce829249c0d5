//! A layer's tree becomes a folder that overlayfs can use as a lower layer.
//!
//! Files are hard links to the store's contents where owner, mode and time agree (nearly always), so there is no second
//! copy, and where the layer has not linked that content already: two files of one layer that are alike are still two
//! files, with inodes of their own (`cp` and `mv` ask). Else they are copied, shared by reflink where the file system can. Nothing ever writes to them: overlayfs
//! copies up. Whiteouts are overlayfs's own, a character device 0/0, and `trusted.overlay.opaque`.
//!
//! The target is a fresh folder that only root may enter, and each path's parents are folders of the same tree
//! ([`Tree::decode`] checks that), so plain paths cannot be led astray.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid};

use crate::rootless::is_rootless;

use super::{ContentId, Entry, Kind, Tree};

/// Why a layer could not be unpacked. Its folder is incomplete and must be deleted.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}: {source}")]
pub struct UnpackError {
    step: &'static str,
    path: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, UnpackError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, UnpackError> {
        self.map_err(|source| UnpackError { step, path: path.to_owned(), source: source.into() })
    }
}

/// Unpacks `tree` into `target`, which must not exist. `object` says where a content lies.
pub fn unpack(tree: &Tree, target: &Path, object: &dyn Fn(&ContentId) -> PathBuf) -> Result<(), UnpackError> {
    fs::create_dir(target).step("make", target)?;
    fs::set_permissions(target, fs::Permissions::from_mode(0o755)).step("set the mode of", target)?;
    // Hard links last: their target sorts anywhere.
    let (links, others): (Vec<&Entry>, Vec<&Entry>) =
        tree.entries.iter().partition(|entry| matches!(entry.kind, Kind::Hardlink(_)));
    let mut linked = BTreeSet::new();
    for entry in others {
        make(entry, &at(target, &entry.path), object, &mut linked)?;
    }
    for entry in links {
        if let Kind::Hardlink(to) = &entry.kind {
            let path = at(target, &entry.path);
            fs::hard_link(at(target, to), &path).step("link", &path)?;
        }
    }
    // What was made inside a folder changed its time.
    for entry in tree.entries.iter().rev().filter(|entry| matches!(entry.kind, Kind::Directory { .. })) {
        set_time(entry, &at(target, &entry.path))?;
    }
    Ok(())
}

fn at(target: &Path, path: &[u8]) -> PathBuf {
    target.join(OsStr::from_bytes(path))
}

fn make(
    entry: &Entry,
    path: &Path,
    object: &dyn Fn(&ContentId) -> PathBuf,
    linked: &mut BTreeSet<ContentId>,
) -> Result<(), UnpackError> {
    let node = |kind: SFlag, major: u32, minor: u32| {
        mknod(path, kind, Mode::from_bits_truncate(0o600), makedev(u64::from(major), u64::from(minor)))
            .step("make the device", path)
    };
    match &entry.kind {
        Kind::File(content) => {
            let id = content.id();
            return file(entry, path, &object(&id), linked.insert(id));
        }
        Kind::Directory { opaque } => {
            fs::create_dir(path).step("make", path)?;
            if *opaque {
                // What only the machine's root may set, root of a user namespace sets as a user (overlayfs, `userxattr`).
                let name = if is_rootless() { "user.overlay.opaque" } else { "trusted.overlay.opaque" };
                xattr::set(path, name, b"y").step("mark as opaque", path)?;
            }
        }
        Kind::Symlink(to) => symlink(OsStr::from_bytes(to), path).step("make the link", path)?,
        // No device of an image is ever opened, and root of a user namespace may not make any.
        Kind::CharDevice(..) | Kind::BlockDevice(..) if is_rootless() => return Ok(()),
        Kind::CharDevice(major, minor) => node(SFlag::S_IFCHR, *major, *minor)?,
        Kind::BlockDevice(major, minor) => node(SFlag::S_IFBLK, *major, *minor)?,
        Kind::Fifo => node(SFlag::S_IFIFO, 0, 0)?,
        Kind::Whiteout => return node(SFlag::S_IFCHR, 0, 0),
        Kind::Hardlink(_) => return Ok(()),
    }
    dress(entry, path)?;
    if matches!(entry.kind, Kind::Directory { .. }) { Ok(()) } else { set_time(entry, path) }
}

fn file(entry: &Entry, path: &Path, object: &Path, may_link: bool) -> Result<(), UnpackError> {
    if entry.xattrs.is_empty() && may_link {
        let meta = fs::metadata(object).step("look at", object)?;
        let agrees = (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.mtime())
            == (entry.uid, entry.gid, entry.mode, entry.mtime);
        if !agrees && meta.nlink() == 1 {
            // Nobody uses the content yet: it takes the metadata of its first user.
            dress(entry, object)?;
            set_time(entry, object)?;
        }
        if agrees || meta.nlink() == 1 {
            match fs::hard_link(object, path) {
                // The file system's limit: 65,000 names on ext4. An empty file gets there.
                Err(error) if error.raw_os_error() == Some(libc::EMLINK) => {}
                // An import has just put the same bytes in its place, and nobody's metadata.
                Ok(()) if fs::metadata(path).is_ok_and(|linked| linked.ino() != meta.ino()) => {
                    fs::remove_file(path).step("remove", path)?;
                }
                result => return result.step("link", path),
            }
        }
    }
    copy(object, path)?;
    dress(entry, path)?;
    set_time(entry, path)
}

fn copy(from: &Path, to: &Path) -> Result<(), UnpackError> {
    let source = File::open(from).step("open", from)?;
    let target = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).step("make", to)?;
    // SAFETY: both descriptors are open for the whole call and FICLONE takes no pointer.
    let cloned = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE as _, source.as_raw_fd()) };
    if cloned != 0 {
        io::copy(&mut &source, &mut &target).step("copy to", to)?;
    }
    Ok(())
}

/// Owner, then mode (a change of owner clears setuid), then attributes (a change of owner clears capabilities).
fn dress(entry: &Entry, path: &Path) -> Result<(), UnpackError> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    let given = nix::unistd::fchownat(
        nix::fcntl::AT_FDCWD,
        path,
        Some(uid),
        Some(gid),
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    );
    given
        .map_err(|error| match error {
            // What the kernel says of an id that the user namespace has not (user_namespaces(7)).
            nix::errno::Errno::EINVAL if is_rootless() => io::Error::other(format!(
                "{uid}:{gid} is not among this user's ids, which /etc/subuid and /etc/subgid give"
            )),
            error => error.into(),
        })
        .step("set the owner of", path)?;
    if !matches!(entry.kind, Kind::Symlink(_)) {
        fs::set_permissions(path, fs::Permissions::from_mode(entry.mode)).step("set the mode of", path)?;
    }
    for (name, value) in &entry.xattrs {
        xattr::set(path, OsStr::from_bytes(name), value).step("set an attribute of", path)?;
    }
    Ok(())
}

fn set_time(entry: &Entry, path: &Path) -> Result<(), UnpackError> {
    let time = TimeSpec::new(entry.mtime, 0);
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).step("set the time of", path)
}

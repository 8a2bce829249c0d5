//! Copies between a container and its user's machine: a tar stream, made on one side and taken apart on the other.
//!
//! Neither side trusts the other. Who packs sends what is there, links as links. Who unpacks makes names only below the folder
//! it was told, opened by openat2 without following any link (RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS), so that a stream which
//! first brings a link and then a file behind it comes to nothing (docker's CVE-2018-15664 and kubectl's CVE-2019-1002101 were
//! such); devices are not made, and set-user-ID bits are not kept. In a container both run with its root as theirs
//! ([`crate::launch`]).
//!
//! **Bounds.** [`MAX_ENTRIES`] in one stream, [`MAX_FOLDERS`] of them folders, whose times are remembered until the end; [`MAX_HEADERS`]
//! bytes of names and attributes before each, a path of [`MAX_PATH`]; the rest streams.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, UtimensatFlags, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, linkat, symlinkat, unlinkat};

use crate::image::Metered;

/// The most files and folders in one stream.
pub const MAX_ENTRIES: usize = 1 << 20;
/// The most folders of these: their times are remembered until the end.
pub const MAX_FOLDERS: usize = 1 << 16;
/// The longest path (limits.h, PATH_MAX).
const MAX_PATH: usize = 4096;
/// The most bytes of names and attributes before one of them.
const MAX_HEADERS: u64 = 1 << 20;

/// Why a copy stopped. What came before it is there.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A file could not be read or written.
    #[error("cannot {step} {path}: {source}")]
    File {
        /// What was tried.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The stream has something that is never made.
    #[error("{path}: {reason}")]
    Refused {
        /// Which of its files.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The stream ended early, or is no tar stream.
    #[error("the stream is damaged: {0}")]
    Stream(io::Error),
}

trait Step<T> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, CopyError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: &Path) -> Result<T, CopyError> {
        self.map_err(|source| CopyError::File { step, path: path.to_owned(), source: source.into() })
    }
}

/// Whether a path as a user writes it means what is in a folder, rather than the folder (`cp /etc/. there`).
pub fn means_contents(path: &str) -> bool {
    path == "." || path.ends_with("/.")
}

/// Packs `path`, which appears in the stream under its own name, or without one when what is in it is meant; how many files of
/// kinds that are not copied were left out. A file that grows meanwhile is cut where it ended, one that shrinks is filled up: what
/// follows in the stream is never its content.
pub fn pack(path: &Path, contents: bool, out: impl Write) -> Result<usize, CopyError> {
    let name = match path.file_name() {
        Some(name) if !contents => PathBuf::from(name),
        _ => PathBuf::from("."),
    };
    let (mut builder, mut left_out) = (tar::Builder::new(out), 0);
    append(&mut builder, path, &name, &mut left_out)?;
    builder.into_inner().and_then(|mut out| out.flush()).step("pack", path)?;
    Ok(left_out)
}

fn append(
    builder: &mut tar::Builder<impl Write>,
    path: &Path,
    name: &Path,
    left_out: &mut usize,
) -> Result<(), CopyError> {
    let metadata = fs::symlink_metadata(path).step("find", path)?;
    let kind = metadata.file_type();
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    if kind.is_dir() {
        builder.append_data(&mut header, name, io::empty()).step("pack", path)?;
        let mut entries: Vec<OsString> = Vec::new();
        for entry in fs::read_dir(path).step("list", path)? {
            entries.push(entry.step("list", path)?.file_name());
        }
        entries.sort();
        return entries.iter().try_for_each(|entry| append(builder, &path.join(entry), &name.join(entry), left_out));
    }
    if kind.is_symlink() {
        let to = fs::read_link(path).step("read the link", path)?;
        header.set_size(0);
        return builder.append_link(&mut header, name, to).step("pack", path);
    }
    if !kind.is_file() {
        *left_out += 1;
        return Ok(());
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(AT_FDCWD, path, flags, Mode::empty()).step("open", path)?);
    let metadata = file.metadata().step("look at", path)?;
    if !metadata.is_file() {
        *left_out += 1;
        return Ok(());
    }
    header.set_metadata(&metadata);
    let exactly = file.chain(io::repeat(0)).take(metadata.len());
    builder.append_data(&mut header, name, exactly).step("pack", path)
}

/// Where what comes is put.
struct Target {
    folder: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// Instead of the name in the stream.
    rename: Option<OsString>,
}

impl Target {
    /// As cp(1) has it: into a folder that is there, else by that name into the folder above it.
    fn of(path: &Path) -> Result<Target, CopyError> {
        let open = |path: &Path| {
            let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
            openat(AT_FDCWD, path, flags, Mode::empty())
        };
        if let Ok(folder) = open(path) {
            return Ok(Target { folder, path: path.to_owned(), rename: None });
        }
        let Some(name) = path.file_name() else {
            return Err(CopyError::Refused { path: path.to_owned(), reason: "is no folder".to_owned() });
        };
        let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = open(above).step("open the folder", above)?;
        Ok(Target { folder, path: above.to_owned(), rename: Some(name.to_owned()) })
    }

    /// Where a name of the stream is put.
    fn place(&self, named: &Path, contents: bool) -> PathBuf {
        match &self.rename {
            None => named.to_owned(),
            Some(name) if contents => [Path::new(name), named].iter().flat_map(|part| part.iter()).collect(),
            Some(name) => std::iter::once(name.as_os_str()).chain(named.iter().skip(1)).collect(),
        }
    }
}

/// Unpacks a stream at `target`. Owners are kept for whoever asks, else all is whose who runs this; returns how many files
/// and folders there were. Where `named` says what was asked for, nothing else is taken.
pub fn unpack(stream: impl Read, target: &Path, named: Option<&OsStr>, keep_owners: bool) -> Result<usize, CopyError> {
    let wanted = named;
    let target = Target::of(target)?;
    let left = Cell::new(MAX_HEADERS);
    let mut archive = tar::Archive::new(Metered { inner: stream, left: &left });
    let mut entries = archive.entries().map_err(CopyError::Stream)?;
    let (mut count, mut contents) = (0, false);
    let mut folders: BTreeMap<PathBuf, tar::Header> = BTreeMap::new();
    loop {
        left.set(MAX_HEADERS);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(CopyError::Stream)?;
        left.set(u64::MAX);
        let named = plain(&entry.path().map_err(CopyError::Stream)?)?;
        count += 1;
        if count > MAX_ENTRIES {
            return Err(CopyError::Refused { path: named, reason: format!("more than {MAX_ENTRIES} files") });
        }
        contents |= count == 1 && named.as_os_str().is_empty();
        if let Some(wanted) = wanted.filter(|_| !contents)
            && named.iter().next() != Some(wanted)
        {
            return Err(CopyError::Refused { path: named, reason: "was not asked for".to_owned() });
        }
        let path = target.place(&named, contents);
        let header = entry.header().clone();
        if path.as_os_str().is_empty() {
            continue;
        }
        if header.entry_type().is_dir() {
            drop(open_folder(&target, &path, true)?);
            folders.insert(path, header);
            if folders.len() > MAX_FOLDERS {
                let reason = format!("more than {MAX_FOLDERS} folders");
                return Err(CopyError::Refused { path: target.path, reason });
            }
            continue;
        }
        let linked = match header.entry_type() {
            tar::EntryType::Link => Some(target.place(&plain(&entry_link(&entry).unwrap_or_default())?, contents)),
            _ => None,
        };
        make(&target, &path, linked, &mut entry, keep_owners)?;
    }
    // What was made in a folder changed its time, and a folder that nobody may write to had to be filled first.
    for (path, header) in folders.iter().rev() {
        let shown = target.path.join(path);
        let folder = open_folder(&target, path, false)?;
        let file = File::from(readable(&folder, &shown)?);
        finish(&file, header, keep_owners, &shown)?;
    }
    Ok(count)
}

/// A name in the stream as it may be used: below where it is put, and nowhere else.
fn plain(path: &Path) -> Result<PathBuf, CopyError> {
    if path.as_os_str().len() > MAX_PATH {
        let reason = format!("a path of more than {MAX_PATH} bytes");
        return Err(CopyError::Refused { path: PathBuf::new(), reason });
    }
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => {
                let reason = "leads out of the folder that it is copied to".to_owned();
                return Err(CopyError::Refused { path: path.to_owned(), reason });
            }
        }
    }
    Ok(plain)
}

fn beneath(flags: OFlag) -> OpenHow {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve)
}

/// A folder below the target; `make` makes what is missing of the way to it.
fn open_folder(target: &Target, path: &Path, make: bool) -> Result<OwnedFd, CopyError> {
    let how = || beneath(OFlag::O_PATH | OFlag::O_DIRECTORY);
    let shown = || target.path.join(path);
    if path.as_os_str().is_empty() {
        return target.folder.try_clone().step("open", &target.path);
    }
    if let Ok(folder) = openat2(&target.folder, path, how()) {
        return Ok(folder);
    }
    let mut folder = target.folder.try_clone().step("open", &target.path)?;
    for part in path {
        if make {
            match mkdirat(&folder, part, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
                Err(error) => return Err(error).step("make the folder", &shown()),
            }
        }
        folder = openat2(&folder, part, how()).map_err(|error| match error {
            nix::errno::Errno::ELOOP => {
                CopyError::Refused { path: shown(), reason: "there is a link in the way".to_owned() }
            }
            error => CopyError::File { step: "open the folder", path: shown(), source: error.into() },
        })?;
    }
    Ok(folder)
}

fn readable(folder: &OwnedFd, shown: &Path) -> Result<OwnedFd, CopyError> {
    let how = beneath(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
    openat2(folder, ".", how).step("open the folder", shown)
}

fn make(
    target: &Target,
    path: &Path,
    linked: Option<PathBuf>,
    entry: &mut tar::Entry<'_, impl Read>,
    keep_owners: bool,
) -> Result<(), CopyError> {
    let (shown, header) = (target.path.join(path), entry.header().clone());
    let refuse = |reason: &str| CopyError::Refused { path: shown.clone(), reason: reason.to_owned() };
    let parent = open_folder(target, path.parent().unwrap_or(Path::new("")), true)?;
    let name = path.file_name().ok_or_else(|| refuse("has no name"))?;
    match header.entry_type() {
        tar::EntryType::Regular | tar::EntryType::Continuous => {
            clear(&parent, name, &shown)?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
            let how = beneath(flags).mode(Mode::from_bits_truncate(0o600));
            let mut file = File::from(openat2(&parent, name, how).step("make", &shown)?);
            io::copy(entry, &mut file).step("write", &shown)?;
            finish(&file, &header, keep_owners, &shown)
        }
        tar::EntryType::Symlink => {
            let to = entry_link(entry).ok_or_else(|| refuse("is a link to nothing"))?;
            clear(&parent, name, &shown)?;
            symlinkat(&to, &parent, name).step("make the link", &shown)?;
            if keep_owners {
                let (uid, gid) = owners(&header, &shown)?;
                nix::unistd::fchownat(&parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
                    .step("set the owner of", &shown)?;
            }
            let time = TimeSpec::new(header.mtime().unwrap_or(0) as i64, 0);
            utimensat(&parent, name, &time, &time, UtimensatFlags::NoFollowSymlink).step("set the time of", &shown)
        }
        tar::EntryType::Link => {
            let to = linked.ok_or_else(|| refuse("is a link to nothing"))?;
            let known = open_folder(target, to.parent().unwrap_or(Path::new("")), false)?;
            let known_name = to.file_name().ok_or_else(|| refuse("is a link to nothing"))?;
            clear(&parent, name, &shown)?;
            linkat(&known, known_name, &parent, name, AtFlags::empty()).step("link", &shown)
        }
        tar::EntryType::XGlobalHeader => Ok(()),
        tar::EntryType::Char | tar::EntryType::Block | tar::EntryType::Fifo => {
            Err(refuse("is a device or a pipe, which is not copied"))
        }
        // A sparse file claims holes of any length, for a few bytes of stream.
        _ => Err(refuse("is of a kind that is not copied")),
    }
}

fn entry_link(entry: &tar::Entry<'_, impl Read>) -> Option<PathBuf> {
    Some(PathBuf::from(OsStr::from_bytes(&entry.link_name_bytes()?)))
}

/// Takes away what is to be replaced; a folder is not.
fn clear(parent: &OwnedFd, name: &OsStr, shown: &Path) -> Result<(), CopyError> {
    match unlinkat(parent.as_fd(), name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(error) => Err(error).step("replace", shown),
    }
}

fn owners(header: &tar::Header, shown: &Path) -> Result<(Uid, Gid), CopyError> {
    let wrong = |_| CopyError::Refused { path: shown.to_owned(), reason: "has an owner that is none".to_owned() };
    let (uid, gid) = (header.uid().map_err(wrong)?, header.gid().map_err(wrong)?);
    Ok((Uid::from_raw(uid as u32), Gid::from_raw(gid as u32)))
}

fn finish(file: &File, header: &tar::Header, keep_owners: bool, shown: &Path) -> Result<(), CopyError> {
    let mode = header.mode().unwrap_or(0o644);
    // A program that becomes somebody else when it is run is not to come out of a container, or go into one.
    let mode = mode & 0o1777;
    if keep_owners {
        let (uid, gid) = owners(header, shown)?;
        fchown(file, Some(uid), Some(gid)).step("set the owner of", shown)?;
    }
    file.set_permissions(fs::Permissions::from_mode(mode)).step("set the mode of", shown)?;
    let time = TimeSpec::new(header.mtime().unwrap_or(0) as i64, 0);
    futimens(file, &time, &time).step("set the time of", shown)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn header(kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o4755);
        header.set_mtime(1_000_000);
        header
    }

    /// A stream with these files; a link's content is where it leads.
    fn stream(files: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in files {
            let mut header = header(*kind, if kind.is_file() { content.len() as u64 } else { 0 });
            // As an attacker does it: not by what the crate lets through.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            if kind.is_symlink() || kind.is_hard_link() {
                header.as_gnu_mut().unwrap().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, if kind.is_file() { content.as_bytes() } else { &[] }).unwrap();
        }
        builder.into_inner().unwrap()
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;
    const FOLDER: tar::EntryType = tar::EntryType::Directory;
    const LINK: tar::EntryType = tar::EntryType::Symlink;
    const HARD: tar::EntryType = tar::EntryType::Link;

    #[test]
    fn what_is_packed_comes_out_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::write(from.join("sub/file"), "text").unwrap();
        fs::set_permissions(from.join("sub/file"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("/nowhere", from.join("link")).unwrap();
        let long = from.join("x".repeat(200));
        fs::write(&long, vec![7; 300_000]).unwrap();
        for (contents, target, root) in [(false, "new", "new"), (true, "new2", "new2"), (false, "", "from")] {
            let mut bytes = Vec::new();
            pack(&from, contents, &mut bytes).unwrap();
            let into = dir.path().join("into");
            fs::create_dir_all(&into).unwrap();
            unpack(&bytes[..], &into.join(target), None, false).unwrap();
            let root = into.join(root);
            assert_eq!(fs::read_to_string(root.join("sub/file")).unwrap(), "text", "{target}");
            assert_eq!(fs::metadata(root.join("sub/file")).unwrap().mode() & 0o7777, 0o640);
            assert!(root.join("sub/empty").is_dir());
            assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("/nowhere"));
            assert_eq!(fs::read(root.join("x".repeat(200))).unwrap().len(), 300_000);
            fs::remove_dir_all(into).unwrap();
        }
    }

    #[test]
    fn a_file_takes_the_name_it_is_given_and_replaces_one_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = stream(&[("a", FILE, "new")]);
        let there = dir.path().join("b");
        fs::write(&there, "old").unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "untouched").unwrap();
        for prepare in [0, 1] {
            if prepare == 1 {
                fs::remove_file(&there).unwrap();
                std::os::unix::fs::symlink(&outside, &there).unwrap();
            }
            unpack(&bytes[..], &there, None, false).unwrap();
            assert_eq!(fs::read_to_string(&there).unwrap(), "new");
            assert!(fs::symlink_metadata(&there).unwrap().is_file());
        }
        assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
        assert_eq!(fs::metadata(&there).unwrap().mode() & 0o7000, 0, "no set-user-ID bit");
    }

    #[test]
    fn nothing_is_made_outside_of_where_it_is_put() {
        for files in [
            &[("../out", FILE, "x")][..],
            &[("/out", FILE, "x")],
            &[("a/../../out", FILE, "x")],
            &[("a", LINK, ".."), ("a/out", FILE, "x")],
            &[("a", LINK, "/"), ("a/out", FOLDER, "")],
            &[("d", FOLDER, ""), ("d/a", LINK, "../.."), ("d/a/out", FILE, "x")],
            &[("a", HARD, "../secret")],
            &[("a", LINK, ".."), ("b", HARD, "a/secret")],
            &[("a", tar::EntryType::Char, "")],
            &[("a", tar::EntryType::Fifo, "")],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let into = dir.path().join("into");
            fs::create_dir(&into).unwrap();
            fs::write(dir.path().join("secret"), "s").unwrap();
            assert!(unpack(&stream(files)[..], &into, None, false).is_err(), "{files:?}");
            assert!(!dir.path().join("out").exists() && !Path::new("/out").exists(), "{files:?}");
        }
    }

    #[test]
    fn nothing_comes_that_was_not_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let asked = Some(OsStr::new("log"));
        let two = stream(&[("log", FILE, "x"), (".bashrc", FILE, "x")]);
        assert!(unpack(&two[..], dir.path(), asked, false).is_err());
        assert!(dir.path().join("log").exists() && !dir.path().join(".bashrc").exists());
        assert!(unpack(&stream(&[("./log", FILE, "x")])[..], dir.path(), asked, false).is_ok());
        assert!(unpack(&stream(&[("./.bashrc", FILE, "x")])[..], dir.path(), asked, false).is_err());
    }

    /// A file that grows while it is read, which no metadata tells.
    #[test]
    fn what_a_file_grows_by_is_not_taken_for_what_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "x".repeat(700)).unwrap();
        let path = log.clone();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let until = std::sync::Arc::clone(&stop);
        let writer = std::thread::spawn(move || {
            let forged = stream(&[("planted", FILE, "x")]);
            let mut file = fs::File::options().append(true).open(path).unwrap();
            while !until.load(std::sync::atomic::Ordering::Relaxed) {
                file.write_all(&forged).unwrap();
                if file.metadata().unwrap().len() > 1 << 24 {
                    file.set_len(700).unwrap();
                }
            }
        });
        for round in 0..50 {
            let mut bytes = Vec::new();
            pack(&log, false, &mut bytes).unwrap();
            let into = dir.path().join(format!("into-{round}"));
            fs::create_dir(&into).unwrap();
            assert_eq!(unpack(&bytes[..], &into, None, false).unwrap(), 1);
            assert!(!into.join("planted").exists());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
    }

    #[test]
    fn sockets_and_pipes_are_left_out_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let mut bytes = Vec::new();
        assert_eq!(pack(dir.path(), true, &mut bytes).unwrap(), 2);
        let into = tempfile::tempdir().unwrap();
        unpack(&bytes[..], into.path(), None, false).unwrap();
        assert!(into.path().join("file").exists());
    }

    #[test]
    fn what_is_cut_off_or_no_stream_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = stream(&[("a", FILE, &"x".repeat(5000))]);
        assert!(unpack(&whole[..2000], dir.path(), None, false).is_err());
        assert!(unpack(&[1; 1024][..], dir.path(), None, false).is_err());
        let mut long = tar::Header::new_gnu();
        long.set_entry_type(tar::EntryType::GNULongName);
        long.set_size(1 << 30);
        long.set_cksum();
        let endless = io::Read::chain(&long.as_bytes()[..], io::repeat(b'x'));
        assert!(unpack(endless, dir.path(), None, false).is_err(), "a name without an end");
    }
}

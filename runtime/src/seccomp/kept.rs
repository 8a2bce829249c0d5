//! Filters that another process has compiled: to read Docker's profile and compile it takes longer than the rest of a bundle.
//!
//! ```text
//! ROOT/~filters/HASH    the build, the profile's text, its filter, a checksum; HASH is of the text
//! ```
//!
//! No container can be called that. A file is written whole, and never changed.
//!
//! **Who is believed.** `ROOT` must be this user's or root's and nobody else's to write; the folder and the file this user's, nobody
//! else's to read or to write, and no links. A filter is taken if the same build has compiled it from the very same text, and if its
//! checksum is right: what the power has gone away under may have lost a part. Else it is compiled again.
//!
//! **What is kept** is a filter that asks nobody and lets all pass that a start itself calls (`oci/trampoline.rs`), since its profile is
//! not looked at again. The first start of all below `ROOT` keeps none: `ROOT` is made later than that.
//!
//! **If two write at once** they write the same. **If one dies** what it has begun is among the [`MAX_FILES`], of which those go that
//! were taken least lately, by the hour: 10 MiB at most, but for what is written at the same moment. Nobody removes the folder. What
//! cannot be written, or not be read, costs time and nothing else.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use serde::{Deserialize, Serialize};

use super::{Filter, Instruction};

/// The folder beside those of the containers.
const FOLDER: &str = "~filters";
/// Of filters that are kept, and of what was begun.
const MAX_FILES: usize = 32;
/// Of a profile that is kept. Docker's has 15 KB.
const MAX_TEXT: usize = 256 << 10;
/// Of a file: the text, and at most 4,096 instructions of 10 bytes.
const MAX_FILE: u64 = MAX_TEXT as u64 + (64 << 10);
/// How exactly it is written down when one was taken.
const OFTEN: Duration = Duration::from_secs(3600);
const BUILD: &str = env!("MOYAI_RUNTIME_BUILD");

/// What a file says.
#[derive(Serialize, Deserialize)]
struct Entry<'a> {
    build: &'a str,
    text: &'a str,
    /// A [`Short`].
    filter: &'a [u8],
    /// Of those bytes.
    sum: u64,
}

/// A filter that asks nobody.
#[derive(Serialize, Deserialize)]
struct Short {
    program: Vec<Instruction>,
    flags: u64,
}

/// Those of one runtime, which has its containers below that folder.
#[derive(Debug)]
pub(crate) struct Kept(PathBuf);

impl Kept {
    /// Those below `root`.
    pub(crate) fn below(root: &Path) -> Kept {
        Kept(root.to_owned())
    }

    /// The filter of a profile's text.
    pub(super) fn find(&self, text: &str) -> Option<Filter> {
        if text.len() > MAX_TEXT {
            return None;
        }
        let folder = self.open(false)?;
        // What is no file, as a FIFO, is not to be waited for.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = File::from(openat(&folder, name(text).as_str(), flags, Mode::empty()).ok()?);
        let about = file.metadata().ok()?;
        if !about.is_file() || !is_own(&about) || about.len() > MAX_FILE {
            return None;
        }
        let mut bytes = Vec::with_capacity(about.len() as usize);
        (&file).take(MAX_FILE).read_to_end(&mut bytes).ok()?;
        let entry: Entry<'_> = postcard::from_bytes(&bytes).ok()?;
        if entry.build != BUILD || entry.text != text || entry.sum != hash(entry.filter) {
            return None;
        }
        let Short { program, flags } = postcard::from_bytes(entry.filter).ok()?;
        let now = SystemTime::now();
        if about.modified().is_ok_and(|taken| now.duration_since(taken).is_ok_and(|age| age > OFTEN)) {
            let _noted = file.set_modified(now);
        }
        Some(Filter { program, flags, asks: false })
    }

    /// Keeps one for whoever comes next, if it is of that text; `None` if it cannot be. Of the same text there may be one already
    /// that has not helped.
    pub(crate) fn keep(&self, text: &str, filter: &Filter, is_of: impl FnOnce() -> bool) -> Option<()> {
        if text.len() > MAX_TEXT || filter.asks {
            return None;
        }
        let folder = self.open(true)?;
        if self.find(text).is_some() {
            return Some(());
        }
        if !is_of() {
            return None;
        }
        let short = Short { program: filter.program.clone(), flags: filter.flags };
        let filter = postcard::to_allocvec(&short).ok()?;
        let entry = Entry { build: BUILD, text, filter: &filter, sum: hash(&filter) };
        let bytes = postcard::to_allocvec(&entry).ok()?;
        remove_oldest(&folder)?;
        // Another of that number may have died.
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let new = format!(".{}-{now:x}", std::process::id());
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&folder, new.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR).ok()?;
        let written = File::from(file).write_all(&bytes).ok();
        let named = written.and_then(|()| renameat(&folder, new.as_str(), &folder, name(text).as_str()).ok());
        if named.is_none() {
            let _gone = unlinkat(&folder, new.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        named
    }

    /// The folder, which is made if that is wished.
    fn open(&self, make: bool) -> Option<File> {
        let root = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&self.0).ok()?;
        let about = root.metadata().ok()?;
        if ![0, geteuid().as_raw()].contains(&about.uid()) || about.mode() & 0o022 != 0 {
            return None;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let open = || openat(&root, FOLDER, flags, Mode::empty()).ok().map(File::from);
        let folder = match open() {
            None if make => {
                // Another may have made it.
                let _made = mkdirat(&root, FOLDER, Mode::S_IRWXU);
                open()
            }
            folder => folder,
        };
        folder.filter(|folder| folder.metadata().is_ok_and(|about| is_own(&about)))
    }
}

/// Whether it is this user's, and nobody else's to look at or to change.
fn is_own(about: &std::fs::Metadata) -> bool {
    about.uid() == geteuid().as_raw() && about.mode() & 0o077 == 0
}

/// Makes room for one more, if need be by removing what was taken or written first. What is called otherwise is not this program's.
fn remove_oldest(folder: &File) -> Option<()> {
    let mut files = Vec::new();
    for entry in
        Dir::openat(folder, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok()?
    {
        let name = entry.ok()?.file_name().to_owned();
        let bytes = name.to_bytes();
        let is_ours = bytes.starts_with(b".") || bytes.len() == 16 && bytes.iter().all(u8::is_ascii_hexdigit);
        if is_ours
            && let Ok(about) = fstatat(folder.as_fd(), name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            && SFlag::S_IFMT & SFlag::from_bits_truncate(about.st_mode) == SFlag::S_IFREG
        {
            files.push((about.st_mtime, about.st_mtime_nsec, name));
        }
    }
    files.sort();
    let over = (files.len() + 1).saturating_sub(MAX_FILES);
    for (.., name) in &files[..over] {
        // Another may have done so.
        let _gone = unlinkat(folder, name.as_c_str(), UnlinkatFlags::NoRemoveDir);
    }
    Some(())
}

fn name(text: &str) -> String {
    format!("{:016x}", hash(text.as_bytes()))
}

/// Against accidents only: whoever could write such a file need not write a wrong one.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::seccomp::{default_profile, strict_profile};

    fn compiled() -> (String, Filter) {
        let profile = default_profile();
        (serde_json::to_string(&profile).expect("JSON"), Filter::compile(&profile).expect("a filter"))
    }

    fn keep() -> (tempfile::TempDir, Kept, String, Filter) {
        let (dir, (text, filter)) = (tempfile::tempdir().expect("a folder"), compiled());
        let kept = Kept::below(dir.path());
        assert_eq!(kept.find(&text), None);
        assert_eq!(kept.keep(&text, &filter, || false), None);
        assert_eq!(kept.find(&text), None);
        assert_eq!(kept.keep(&text, &filter, || true), Some(()));
        assert_eq!(kept.find(&text).as_ref(), Some(&filter));
        (dir, kept, text, filter)
    }

    fn folder(kept: &Kept) -> PathBuf {
        kept.0.join(FOLDER)
    }

    fn path(kept: &Kept, text: &str) -> PathBuf {
        folder(kept).join(name(text))
    }

    #[test]
    fn a_filter_is_found_by_the_text_of_its_profile_and_no_other() {
        let (_dir, kept, text, filter) = keep();
        let other = text.replacen("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", 1);
        assert_eq!(kept.find(&other), None);
        // By a name that two have.
        fs::copy(path(&kept, &text), path(&kept, &other)).expect("a copy");
        assert_eq!(kept.find(&other), None);
        let inode = || fs::metadata(path(&kept, &text)).expect("a file").ino();
        let first = inode();
        assert_eq!(kept.keep(&text, &filter, || panic!("it is there")), Some(()));
        assert_eq!(inode(), first);
        let long = " ".repeat(MAX_TEXT + 1);
        assert_eq!(kept.keep(&long, &filter, || true), None);
        let asks = Filter::compile(&strict_profile("shim")).expect("a filter");
        assert_eq!(kept.keep("{}", &asks, || true), None);
        assert_eq!(fs::read_dir(folder(&kept)).expect("a folder").count(), 2);
    }

    #[test]
    fn what_was_damaged_is_not_believed() {
        let (_dir, kept, text, filter) = keep();
        let path = path(&kept, &text);
        let whole = fs::read(&path).expect("a file");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).expect("written");
            assert_eq!(kept.find(&text), None, "byte {at}");
        }
        for len in (0..whole.len()).step_by(97) {
            fs::write(&path, &whole[..len]).expect("written");
            assert_eq!(kept.find(&text), None, "{len} bytes");
        }
        fs::write(&path, vec![0; whole.len()]).expect("written");
        assert_eq!(kept.find(&text), None);
        assert_eq!(kept.keep(&text, &filter, || true), Some(()));
        assert_eq!(kept.find(&text), Some(filter));
    }

    #[test]
    fn what_is_others_to_change_is_not_believed() {
        let (dir, kept, text, filter) = keep();
        let (folder, path) = (folder(&kept), path(&kept, &text));
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
        for (path, usual, bad) in [
            (&kept.0, 0o755, &[0o020, 0o002][..]),
            (&folder, 0o700, &[0o020, 0o002, 0o004]),
            (&path, 0o600, &[0o020, 0o002, 0o004]),
        ] {
            for others in bad {
                mode(path, usual | others);
                assert_eq!(kept.find(&text), None, "{path:?} {others:o}");
            }
            mode(path, usual);
            assert_eq!(kept.find(&text).as_ref(), Some(&filter));
        }
        let aside = dir.path().join("aside");
        for path in [&path, &folder] {
            fs::rename(path, &aside).expect("moved");
            symlink(&aside, path).expect("a link");
            assert_eq!(kept.find(&text), None, "a link");
            fs::remove_file(path).expect("removed");
            fs::rename(&aside, path).expect("moved back");
        }
        assert_eq!(kept.find(&text), Some(filter.clone()));
        if geteuid().is_root() {
            for path in [&path, &folder, &kept.0] {
                std::os::unix::fs::chown(path, Some(12345), None).expect("given away");
                assert_eq!(kept.find(&text), None, "another's");
                std::os::unix::fs::chown(path, Some(0), None).expect("taken back");
            }
            assert_eq!(kept.find(&text), Some(filter));
        }
        // Neither a folder nor what would be waited for.
        fs::remove_file(&path).expect("removed");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).expect("a FIFO");
        assert_eq!(kept.find(&text), None);
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let (_dir, kept, text, filter) = keep();
        let folder = folder(&kept);
        // What was begun counts too, and what somebody has put there does not.
        for name in [".1", "notes"] {
            fs::write(folder.join(name), "text").expect("written");
        }
        let texts: Vec<String> = (0..3 * MAX_FILES).map(|number| format!("{{\"{number}\":0}}")).collect();
        for (number, text) in texts.iter().enumerate() {
            assert_eq!(kept.keep(text, &filter, || true), Some(()));
            // Ticks of a file system's clock are longer than that.
            let written = SystemTime::now() + Duration::from_secs(number as u64);
            File::open(path(&kept, text)).and_then(|file| file.set_modified(written)).expect("a time");
        }
        assert_eq!(fs::read_dir(&folder).expect("a folder").count(), MAX_FILES + 1);
        assert_eq!(kept.find(&text), None);
        let found = texts.iter().filter(|text| kept.find(text).is_some());
        assert!(found.eq(&texts[2 * MAX_FILES..]));
        assert!(!folder.join(".1").exists() && folder.join("notes").exists());
        // What is taken stays.
        let first = &texts[2 * MAX_FILES];
        let long_ago = SystemTime::now() - 2 * OFTEN;
        let file = File::open(path(&kept, first)).expect("a file");
        file.set_modified(long_ago).expect("a time");
        assert!(kept.find(first).is_some());
        assert!(file.metadata().and_then(|about| about.modified()).expect("a time") > long_ago + OFTEN);
    }
}

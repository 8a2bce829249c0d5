//! A place to mount images in, and what can be seen of them there.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::*;

const NONE: Option<&str> = None;

/// A folder for one test, in a mount namespace that ends with it.
pub(super) struct Lab {
    dir: tempfile::TempDir,
}

/// Runs `test` on a thread of its own, whose mounts nobody else sees.
pub(super) fn in_a_lab(test: impl FnOnce(&Lab) + Send) {
    let lab = Lab { dir: tempfile::tempdir().unwrap() };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("these tests mount: run them as root");
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
            for sub in ["objects", "erofs", "upper", "work", "root", "plain"] {
                fs::create_dir(lab.at(sub)).unwrap();
            }
            test(&lab);
        });
        thread.join().unwrap();
    });
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(lab.dir.path().to_str().unwrap()), "a mount is left");
}

impl Lab {
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An object as another image would have left it: nothing but its bytes is anybody's business.
    pub(super) fn store(&self, bytes: &[u8]) {
        let path = self.at("objects").join(OsStr::from_bytes(&object(&content(bytes).id())));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(12345), Some(54321)).unwrap();
    }

    /// Writes the image and mounts it, straight from its file.
    pub(super) fn mount_image(&self, layers: &[Tree]) {
        let path = self.at("image");
        write(&merge(layers).unwrap(), [7; 16], object, File::create(&path).unwrap()).unwrap();
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
        mount(Some(&path), &self.at("erofs"), Some("erofs"), flags, NONE).unwrap();
    }

    /// `options` begins with a comma.
    pub(super) fn mount_overlay(&self, options: &str) {
        let dir = self.dir.path().display();
        let layers = format!("lowerdir={dir}/erofs::{dir}/objects,upperdir={dir}/upper,workdir={dir}/work");
        let options = layers + options;
        mount(Some("overlay"), &self.at("root"), Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    }

    pub(super) fn umount(&self, names: &[&str]) {
        for name in names {
            umount(&self.at(name)).unwrap();
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "{mounts}");
    }
}

/// What can be seen of a file from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    mtime: i64,
    device: u64,
    pub(super) links: u64,
    /// Its bytes, or the path that it leads to.
    pub(super) bytes: Vec<u8>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Everything below `root`.
pub(super) fn survey(root: &Path) -> BTreeMap<Vec<u8>, Facts> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(&folder).unwrap() {
            let item = item.unwrap();
            let (path, kind) = (item.path(), item.file_type().unwrap());
            // Of a whiteout that hides nothing overlayfs shows the name, and then says that there is nothing.
            if path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                continue;
            }
            let facts = facts(&path);
            assert_eq!(facts.mode & 0o170_000, of_type(kind), "what readdir says of {}", path.display());
            found.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), facts);
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn of_type(kind: fs::FileType) -> u32 {
    match kind {
        kind if kind.is_dir() => 0o040_000,
        kind if kind.is_symlink() => 0o120_000,
        kind if kind.is_char_device() => 0o020_000,
        kind if kind.is_block_device() => 0o060_000,
        kind if kind.is_fifo() => 0o010_000,
        _ => 0o100_000,
    }
}

fn facts(path: &Path) -> Facts {
    let meta = fs::symlink_metadata(path).unwrap();
    let bytes = match meta.file_type() {
        kind if kind.is_file() => fs::read(path).unwrap(),
        kind if kind.is_symlink() => fs::read_link(path).unwrap().into_os_string().into_vec(),
        _ => Vec::new(),
    };
    if !meta.is_dir() {
        assert_eq!(meta.len(), bytes.len() as u64, "the size of {}", path.display());
    }
    let xattrs = xattr::list(path).unwrap().map(|name| {
        let value = xattr::get(path, &name).unwrap().unwrap();
        (name.into_vec(), value)
    });
    Facts {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: meta.mtime(),
        device: meta.rdev(),
        links: if meta.is_dir() { 0 } else { meta.nlink() },
        bytes,
        xattrs: xattrs.collect(),
    }
}

/// What should be seen of a model through the overlay; `bytes` has the contents.
pub(super) fn expected(model: &Model, bytes: &BTreeMap<ContentId, Vec<u8>>) -> BTreeMap<Vec<u8>, Facts> {
    let facts = |entry: &Rc<Entry>| {
        let (kind, bytes, device) = match &entry.kind {
            Kind::File(content) => (0o100_000, bytes[&content.id()].clone(), 0),
            Kind::Directory { .. } => (0o040_000, Vec::new(), 0),
            Kind::Symlink(target) => (0o120_000, target.clone(), 0),
            Kind::CharDevice(major, minor) => (0o020_000, Vec::new(), makedev((*major).into(), (*minor).into())),
            Kind::BlockDevice(major, minor) => (0o060_000, Vec::new(), makedev((*major).into(), (*minor).into())),
            _ => (0o010_000, Vec::new(), 0),
        };
        Facts {
            mode: kind | if kind == 0o120_000 { 0o777 } else { entry.mode },
            owner: (entry.uid, entry.gid),
            mtime: entry.mtime,
            device,
            links: if kind == 0o040_000 { 0 } else { Rc::strong_count(entry) as u64 },
            bytes,
            xattrs: entry.xattrs.iter().cloned().collect(),
        }
    };
    model.iter().map(|(path, entry)| (path.clone(), facts(entry))).collect()
}

/// What the layers would be to overlayfs if they were folders.
pub(super) fn unpack(tree: &Tree, to: &Path, bytes: &BTreeMap<ContentId, Vec<u8>>) {
    fs::create_dir(to).unwrap();
    let at = |path: &[u8]| to.join(OsStr::from_bytes(path));
    for entry in &tree.entries {
        let path = at(&entry.path);
        let node = |kind, device| mknod(&path, kind, Mode::empty(), device).unwrap();
        match &entry.kind {
            Kind::File(content) => fs::write(&path, &bytes[&content.id()]).unwrap(),
            Kind::Directory { opaque } => {
                fs::create_dir(&path).unwrap();
                if *opaque {
                    xattr::set(&path, "trusted.overlay.opaque", b"y").unwrap();
                }
            }
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            Kind::CharDevice(major, minor) => node(SFlag::S_IFCHR, makedev((*major).into(), (*minor).into())),
            Kind::Fifo => node(SFlag::S_IFIFO, 0),
            Kind::Whiteout => node(SFlag::S_IFCHR, 0),
            _ => continue,
        }
        lchown(&path, Some(entry.uid), Some(entry.gid)).unwrap();
        if !matches!(entry.kind, Kind::Symlink(_)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode)).unwrap();
        }
    }
    for entry in &tree.entries {
        if let Kind::Hardlink(target) = &entry.kind {
            fs::hard_link(at(target), at(&entry.path)).unwrap();
        }
    }
    for entry in tree.entries.iter().filter(|entry| !matches!(entry.kind, Kind::Hardlink(_))).rev() {
        let time = TimeSpec::new(entry.mtime, 0);
        utimensat(AT_FDCWD, &at(&entry.path), &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
    }
}

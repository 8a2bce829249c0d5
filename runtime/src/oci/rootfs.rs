//! A container's file system: what is mounted into it, its devices, and the step inside.
//!
//! Every path inside the image is opened with openat2 and RESOLVE_IN_ROOT (Linux 5.6), and mounted on by descriptor: an
//! image whose `/proc` is a link to `/etc` of the host mounts nothing there (CVE-2019-19921, CVE-2021-30465). What is bound
//! from outside is taken by the parent, before there is anything of the container's, as detached mounts (open_tree(2)).
//! Masks are bound from descriptors that were checked, not from paths (CVE-2025-31133).

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mkdirat, mknodat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxIdMapping, Mount, Spec};

use super::ahead::Tree;
use super::mounts::{self, Options};
use super::others::{MountId, open_plain};
use super::shift;
use super::spawn::MountRoot;
use crate::sys::{self, MountChange};

/// Why a file system could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("{field}cannot {step} {path}: {source}")]
pub(crate) struct RootfsError {
    field: String,
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl RootfsError {
    fn of(mut self, field: impl Into<String>) -> RootfsError {
        self.field = format!("{}: ", field.into());
        self
    }
}

pub(crate) trait Step<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError> {
        self.map_err(|source| RootfsError {
            field: String::new(),
            step,
            path: path.as_ref().to_owned(),
            source: source.into(),
        })
    }
}

const NONE: Option<&str> = None;

/// What is bound into a container, taken from the host before the container is made; by the number of its mount.
pub(super) struct Sources {
    mounts: Vec<Option<(OwnedFd, bool)>>,
    /// The host's devices, for a container that may not make its own.
    devices: Vec<(PathBuf, OwnedFd)>,
    /// The host's /proc: that of a namespace that is joined may be anything.
    proc: OwnedFd,
}

/// What every container has in /dev (runtime-spec config-linux.md, "Default Devices").
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

impl Sources {
    /// Takes them, as this process sees them; `plain` refuses links in their paths.
    pub(super) fn take(spec: &Spec, bundle: &Path, binds_devices: bool, plain: bool) -> Result<Sources, RootfsError> {
        let linux = spec.linux().as_ref();
        let own = linux.and_then(|linux| Some((linux.uid_mappings().as_deref()?, linux.gid_mappings().as_deref()?)));
        let proc = open(Path::new("/proc"), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let mut sources = Sources { mounts: Vec::new(), devices: Vec::new(), proc };
        // A copy of a mount of the host's is its peer: what was mounted on it inside would appear outside.
        let root = linux.and_then(|linux| linux.rootfs_propagation().as_deref()).and_then(mounts::propagation);
        let follows = root.is_some_and(|flag| flag.intersects(MsFlags::MS_SLAVE | MsFlags::MS_SHARED));
        let outside = if follows { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE } | MsFlags::MS_REC;
        for (at, entry) in spec.mounts().iter().flatten().enumerate() {
            let options = mounts::parse(entry);
            let taken = options.bind.then(|| take(entry, &options, bundle, own, (plain, outside)));
            sources.mounts.push(taken.transpose().map_err(|error| error.of(format!("mounts[{at}]")))?);
        }
        if binds_devices {
            let named = DEVICES.iter().map(|(name, ..)| Path::new("/dev").join(name));
            let more = linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
            for path in named.chain(more.map(|device| device.path().clone())) {
                let device = open(&path, OFlag::O_PATH)?;
                let mount = sys::clone_mount(device.as_fd(), false).step("take", &path)?;
                sources.devices.push((path, mount));
            }
        }
        Ok(sources)
    }

    /// Goes to the host's /proc, where paths of it begin.
    pub(super) fn enter_proc(&self) -> Result<(), RootfsError> {
        nix::unistd::fchdir(&self.proc).step("enter", "/proc")
    }
}

type Ids<'a> = (&'a [LinuxIdMapping], &'a [LinuxIdMapping]);

/// A detached copy of what an entry binds, and whether it is a file.
fn take(
    entry: &Mount,
    options: &Options,
    bundle: &Path,
    own: Option<Ids<'_>>,
    (plain, outside): (bool, MsFlags),
) -> Result<(OwnedFd, bool), RootfsError> {
    let source = bundle.join(entry.source().as_deref().unwrap_or(Path::new("")));
    let links = if plain { ResolveFlag::RESOLVE_NO_SYMLINKS } else { ResolveFlag::empty() };
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(links);
    let fd = openat2(nix::fcntl::AT_FDCWD, &source, how).step("open", &source)?;
    let is_file = !is_dir(&fd).step("look at", &source)?;
    let tree = sys::clone_mount(fd.as_fd(), options.recursive).step("take", &source)?;
    if let Some(below) = options.shifted {
        let ids = entry.uid_mappings().as_deref().zip(entry.gid_mappings().as_deref()).filter(|ids| !ids.0.is_empty());
        let Some((uids, gids)) = ids.or(own) else {
            return Err(io::Error::other("idmap without mappings, its own or the container's")).step("shift", &source);
        };
        let users = shift::user_namespace(uids, gids).step("make the ids of", &source)?;
        let change = MountChange { shifted_by: Some(users.as_fd()), ..MountChange::default() };
        let shifted = sys::change_mount(tree.as_fd(), &change, below).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::other("its file system cannot be shown with other owners by this kernel"),
            _ => error,
        });
        shifted.step("shift the ids of", &source)?;
    }
    let spread = options.propagation.unwrap_or(outside);
    let (spread, spreads_below) = ((spread - MsFlags::MS_REC).bits(), spread.contains(MsFlags::MS_REC));
    let below = MountChange { set: options.set_below, clear: options.clear_below, ..MountChange::default() };
    if below.set | below.clear != 0 {
        sys::change_mount(tree.as_fd(), &below, true).step("set options below", &source)?;
    }
    let change = MountChange { set: options.set, clear: options.clear, propagation: spread, shifted_by: None };
    if change.set | change.clear | change.propagation != 0 {
        let below = spreads_below;
        if below && change.set | change.clear != 0 {
            let only = MountChange { propagation: 0, ..change };
            sys::change_mount(tree.as_fd(), &only, false).step("set options of", &source)?;
            let only = MountChange { propagation: spread, ..MountChange::default() };
            sys::change_mount(tree.as_fd(), &only, true).step("set the propagation of", &source)?;
        } else {
            sys::change_mount(tree.as_fd(), &change, below).step("set options of", &source)?;
        }
    }
    Ok((tree, is_file))
}

/// What a root file system is put together from.
pub(super) struct Plan<'a> {
    pub(super) spec: &'a Spec,
    pub(super) root: &'a Path,
    /// Mounts it, where it is not there.
    pub(super) mount_root: Option<&'a MountRoot<'a>>,
    pub(super) sources: &'a Sources,
    /// Whether it has cgroups of its own to be shown.
    pub(super) own_cgroups: bool,
    /// The folders of its cgroup.
    pub(super) groups: &'a [PathBuf],
    /// Whether the mount namespace was made for it.
    pub(super) owns_mounts: bool,
    /// What is there of its mounts.
    pub(super) ahead: &'a [Tree],
}

/// A root file system that is put together, and not yet entered.
pub(super) struct Rootfs {
    root: PathBuf,
    fd: OwnedFd,
    /// Its mount is among others' mounts: with it goes what is mounted inside.
    among_others: bool,
}

impl Plan<'_> {
    /// Has something at its root that can become one, inside the container's mount namespace, by a process in the host's /proc.
    pub(super) fn attach(&self) -> Result<Rootfs, RootfsError> {
        if !self.owns_mounts {
            return self.attach_among_others();
        }
        let linux = self.spec.linux().as_ref();
        let spread = linux.and_then(|linux| linux.rootfs_propagation().as_deref()).and_then(mounts::propagation);
        // What the host mounts later may come in; what is mounted here never goes out.
        let private = spread.is_none_or(|flag| flag.intersects(MsFlags::MS_PRIVATE | MsFlags::MS_UNBINDABLE));
        let kind = if private { MsFlags::MS_PRIVATE } else { MsFlags::MS_SLAVE };
        mount(NONE, "/", NONE, MsFlags::MS_REC | kind, NONE).step("make private", "/")?;
        if let Some(mount_root) = self.mount_root {
            mount_root()?;
            self.sources.enter_proc()?;
            return Rootfs::at(self.root);
        }
        let fd = open(self.root, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        // Only a mount can become a root, and of a namespace with users of its own only one that was made there.
        let tree = sys::clone_mount(fd.as_fd(), true).step("bind", self.root)?;
        sys::attach_mount(tree.as_fd(), fd.as_fd()).step("bind", self.root)?;
        Rootfs::at(self.root)
    }

    /// The same where others live too. What comes to those who follow their mounts goes with it, since nothing is mounted inside that is
    /// not its own.
    fn attach_among_others(&self) -> Result<Rootfs, RootfsError> {
        let below = open_plain(self.root).step("open", self.root)?;
        let fd = sys::clone_mount(below.as_fd(), false).step("bind", self.root)?;
        sys::attach_mount(fd.as_fd(), below.as_fd()).step("bind", self.root)?;
        let root = Rootfs { root: self.root.to_owned(), fd, among_others: true };
        let alone = MountChange { propagation: MsFlags::MS_PRIVATE.bits(), ..MountChange::default() };
        match sys::change_mount(root.fd.as_fd(), &alone, false).step("make private", self.root) {
            Ok(()) => Ok(root),
            Err(error) => {
                root.detach();
                Err(error)
            }
        }
    }

    /// Puts it together; what of its paths is hidden already.
    pub(super) fn fill(&self, root: &Rootfs) -> Result<Hidden, RootfsError> {
        // Devices have the modes that are asked for; the program gets its own umask later.
        nix::sys::stat::umask(Mode::empty());
        let linux = self.spec.linux().as_ref();
        let entries = self.spec.mounts().as_deref().unwrap_or_default();
        let mut ahead: Vec<&Tree> = self.ahead.iter().collect();
        let (mut own_dev, mut has_devices, mut hidden) = (true, false, Hidden::default());
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            let of = |error: RootfsError| error.of(format!("mounts[{at}]"));
            let is_dev = destination(entry) == Path::new("/dev");
            if let Some(found) = ahead.iter().position(|tree| tree.of.is_at(at, entries, linux)) {
                let tree = ahead.swap_remove(found);
                root.attach(entry, tree).map_err(of)?;
                hidden.add(&tree.hidden);
                has_devices |= is_dev;
                at += tree.of.entries.len();
                continue;
            }
            own_dev &= !is_dev || self.sources.mounts[at].is_none();
            has_devices &= !is_dev;
            let mounted = match &self.sources.mounts[at] {
                Some((tree, is_file)) => root.bind(entry, tree, *is_file),
                None if is_cgroup(entry) => self.mount_cgroups(root, entry),
                None => root.mount_new(entry),
            };
            mounted.map_err(of)?;
            at += 1;
        }
        // A /dev that is the host's has what it has.
        if own_dev {
            self.make_devices(root, has_devices)?;
        }
        nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
        Ok(hidden)
    }

    /// `has_usual` is for a /dev that came with the usual ones.
    fn make_devices(&self, root: &Rootfs, has_usual: bool) -> Result<(), RootfsError> {
        let dev = root.make(Path::new("/dev"), false)?;
        if self.sources.devices.is_empty() {
            for (name, major, minor) in DEVICES.iter().filter(|_| !has_usual) {
                make_device(&dev, Path::new(name), SFlag::S_IFCHR, makedev(*major, *minor), 0o666, None)
                    .step("make /dev", name)?;
            }
            let more = self.spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
            for (at, device) in more.into_iter().flatten().enumerate() {
                root.make_listed(device).map_err(|error| error.of(format!("linux.devices[{at}]")))?;
            }
        } else {
            for (path, tree) in &self.sources.devices {
                let target = root.make(path, true)?;
                sys::attach_mount(tree.as_fd(), target.as_fd()).step("bind", path)?;
            }
        }
        for (name, to) in LINKS.iter().filter(|_| !has_usual) {
            match nix::unistd::symlinkat(*to, &dev, *name) {
                Err(nix::errno::Errno::EEXIST) => {}
                made => made.step("link /dev", name)?,
            }
        }
        Ok(())
    }

    /// The container's own cgroups: one tree on v2, the ones in use on v1.
    fn mount_cgroups(&self, root: &Rootfs, entry: &Mount) -> Result<(), RootfsError> {
        let top = &*destination(entry);
        let options = mounts::parse(entry);
        let target = root.make(top, false)?;
        let read_only = options.flags & MsFlags::MS_RDONLY;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        if cgroups_rs::fs::hierarchies::is_cgroup2_unified_mode() {
            if self.own_cgroups {
                return mount(Some("cgroup"), &by_fd(&target), Some("cgroup2"), flags | read_only, NONE)
                    .step("mount", top);
            }
            let group = self.groups.first().map_or(Path::new("/sys/fs/cgroup"), PathBuf::as_path);
            return bind_group(group, &target, read_only);
        }
        mount(Some("tmpfs"), &by_fd(&target), Some("tmpfs"), flags, Some("mode=755")).step("mount", top)?;
        for group in self.groups {
            // /sys/fs/cgroup/CONTROLLER/GROUP
            let Some(controller) = group.strip_prefix("/sys/fs/cgroup").ok().and_then(|path| path.iter().next()) else {
                continue;
            };
            let inside = root.make(&top.join(controller), false)?;
            if self.own_cgroups {
                let name = controller.to_string_lossy();
                let data = if name == "systemd" { "none,name=systemd".to_owned() } else { name.into_owned() };
                // A controller that shares its hierarchy has no mount of its own; what is missing is not shown.
                let _unseen = mount(Some("cgroup"), &by_fd(&inside), Some("cgroup"), flags | read_only, Some(&*data));
            } else {
                bind_group(group, &inside, read_only)?;
            }
        }
        if read_only.is_empty() {
            return Ok(());
        }
        let again = root.open(top).step("open", top)?;
        let change = MountChange { set: libc::MOUNT_ATTR_RDONLY, ..MountChange::default() };
        sys::change_mount(again.as_fd(), &change, false).step("make read-only", top)
    }
}

fn bind_group(group: &Path, target: &OwnedFd, read_only: MsFlags) -> Result<(), RootfsError> {
    let fd = open(group, OFlag::O_PATH)?;
    let tree = sys::clone_mount(fd.as_fd(), false).step("take", group)?;
    let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let set = if read_only.is_empty() { set } else { set | libc::MOUNT_ATTR_RDONLY };
    sys::change_mount(tree.as_fd(), &MountChange { set, ..MountChange::default() }, false).step("change", group)?;
    sys::attach_mount(tree.as_fd(), target.as_fd()).step("bind", group)
}

impl Rootfs {
    /// What is mounted at `path`, in a mount namespace that is this process's alone.
    pub(super) fn at(path: &Path) -> Result<Rootfs, RootfsError> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        Ok(Rootfs { root: path.to_owned(), fd, among_others: false })
    }

    /// A detached copy of what these mounts have made, which lie in each other.
    pub(super) fn tree(&self, entries: &[Mount]) -> Result<OwnedFd, RootfsError> {
        let top = entries.first().map(destination).unwrap_or_default();
        let fd = self.open(&top).step("open", &top)?;
        sys::clone_mount(fd.as_fd(), true).step("take", &top)
    }

    /// Puts a tree where the first of its mounts would be.
    fn attach(&self, entry: &Mount, tree: &Tree) -> Result<(), RootfsError> {
        let path = &destination(entry);
        let target = self.place(entry)?;
        sys::attach_mount(tree.mount.as_fd(), target.as_fd()).step("mount", path)
    }

    /// Its root folder.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Opens `path` inside, wherever its links lead, but never out.
    fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(&self.fd, path, how)?)
    }

    /// The same; makes what is missing: folders, and a file at the end if `file`.
    pub(super) fn make(&self, path: &Path, file: bool) -> Result<OwnedFd, RootfsError> {
        self.make_through(path, file, MAX_LINKS)
    }

    /// The same through so many links that lead to what is missing.
    fn make_through(&self, path: &Path, file: bool, links: u32) -> Result<OwnedFd, RootfsError> {
        if let Ok(found) = self.open(path) {
            return Ok(found);
        }
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return self.open(path).step("open", path);
        };
        let folder = self.make_through(above, false, links)?;
        let made = if file {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
            nix::fcntl::openat(&folder, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        } else {
            mkdirat(&folder, name, Mode::from_bits_truncate(0o755))
        };
        match made {
            Err(nix::errno::Errno::EEXIST) if links > 0 => {
                // A link to what is not there: that is made, inside the root wherever the link leads.
                let to = nix::fcntl::readlinkat(&folder, name).step("read the link", path)?;
                self.make_through(&within(above, Path::new(&to)), file, links - 1)
            }
            made => {
                made.step("make", path)?;
                self.open(path).step("open", path)
            }
        }
    }

    fn bind(&self, entry: &Mount, tree: &OwnedFd, is_file: bool) -> Result<(), RootfsError> {
        let path = &destination(entry);
        let target = self.make(path, is_file)?;
        sys::attach_mount(tree.as_fd(), target.as_fd()).step("bind", path)
    }

    fn mount_new(&self, entry: &Mount) -> Result<(), RootfsError> {
        let (path, options) = (&destination(entry), mounts::parse(entry));
        let kind = entry.typ().as_deref().unwrap_or("none");
        let target = self.place(entry)?;
        let source = entry.source().as_deref().unwrap_or(Path::new(kind));
        let data = options.data.join(",");
        let data = (!data.is_empty()).then_some(data.as_str());
        // A tmpfs that is filled first becomes read-only afterwards.
        let late = options.flags & if options.copy_up { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        let flags = options.flags - late;
        mount(Some(source), &by_fd(&target), Some(kind), flags, data).step("mount", path)?;
        let spread = options.propagation.map_or(0, |flag| (flag - MsFlags::MS_REC).bits());
        if !options.copy_up && spread == 0 && options.clear_below | options.set_below == 0 {
            return Ok(());
        }
        let mounted = self.open(path).step("open", path)?;
        if options.copy_up {
            copy_tree(&target, &mounted).step("copy what was in", path)?;
        }
        let set = options.set_below | if late.is_empty() { 0 } else { libc::MOUNT_ATTR_RDONLY };
        let change = MountChange { set, clear: options.clear_below, propagation: spread, shifted_by: None };
        sys::change_mount(mounted.as_fd(), &change, false).step("set options of", path)
    }

    /// Where a new mount goes.
    fn place(&self, entry: &Mount) -> Result<OwnedFd, RootfsError> {
        let path = &destination(entry);
        let target = self.make(path, false)?;
        if ["proc", "sysfs"].contains(&entry.typ().as_deref().unwrap_or_default()) {
            // What is masked later must be what was mounted here: a link could lead to where another container moves it
            // about (CVE-2019-19921).
            let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC);
            let how = how.resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
            openat2(&self.fd, path, how).step("mount where a link is,", path)?;
        }
        Ok(target)
    }

    fn make_listed(&self, device: &LinuxDevice) -> Result<(), RootfsError> {
        let path = device.path();
        let kind = match device.typ() {
            LinuxDeviceType::B => SFlag::S_IFBLK,
            LinuxDeviceType::P => SFlag::S_IFIFO,
            LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => SFlag::S_IFCHR,
        };
        let (folder, name) = (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or_default());
        let folder = self.make(folder, false)?;
        let number = makedev(device.major().max(0) as u64, device.minor().max(0) as u64);
        let owner = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
        make_device(&folder, Path::new(name), kind, number, mode, Some(owner)).step("make", path)
    }

    /// Its mount, where that is among others' mounts.
    pub(super) fn among_others(&self) -> io::Result<Option<MountId>> {
        if self.among_others { MountId::of(&self.fd).map(Some) } else { Ok(None) }
    }

    /// Takes that away, as long as it is not entered.
    pub(super) fn detach(&self) {
        let _gone = umount2(&by_fd(&self.fd), MntFlags::MNT_DETACH);
    }

    /// Binds a terminal on /dev/console.
    pub(super) fn console(&self, terminal: &OwnedFd) -> Result<(), RootfsError> {
        let path = Path::new("/dev/console");
        let target = self.make(path, true)?;
        let tree = sys::clone_mount(terminal.as_fd(), false).step("take the terminal for", path)?;
        sys::attach_mount(tree.as_fd(), target.as_fd()).step("bind", path)
    }

    /// Makes it this process's root, and closes what the container is not to see or change.
    pub(super) fn enter(&self, spec: &Spec, pivot: bool, hidden: &Hidden) -> Result<(), RootfsError> {
        nix::unistd::fchdir(&self.fd).step("enter", &self.root)?;
        if self.among_others {
            nix::unistd::chroot(".").step("enter", &self.root)?;
        } else if pivot {
            // Stacking the old root under the new one at the same place saves a folder for it in the image (pivot_root(2)).
            nix::unistd::pivot_root(".", ".").step("pivot into", &self.root)?;
            umount2(".", MntFlags::MNT_DETACH).step("detach the old root under", &self.root)?;
        } else {
            mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE).step("move to the root", &self.root)?;
            nix::unistd::chroot(".").step("enter", &self.root)?;
        }
        std::env::set_current_dir("/").step("enter", "/")?;
        let linux = spec.linux().as_ref();
        let read_only = linux.and_then(|linux| linux.readonly_paths().as_ref());
        let masked = linux.and_then(|linux| linux.masked_paths().as_ref());
        let read_only =
            read_only.into_iter().flatten().enumerate().filter(|(_, path)| !hidden.read_only.contains(path));
        let masked = masked.into_iter().flatten().enumerate().filter(|(_, path)| !hidden.masked.contains(path));
        let _hidden = self.hide(read_only, masked)?;
        std::env::set_current_dir("/").step("enter", "/")?;
        if spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) {
            let change = MountChange { set: libc::MOUNT_ATTR_RDONLY, ..MountChange::default() };
            sys::change_mount(self.fd.as_fd(), &change, false).step("make read-only", "/")?;
        }
        let spread = linux.and_then(|linux| linux.rootfs_propagation().as_deref()).and_then(mounts::propagation);
        if let Some(spread) = spread {
            mount(NONE, "/", NONE, spread, NONE).step("set the propagation of", "/")?;
        }
        Ok(())
    }

    /// Makes some paths read-only and masks others, each with its place in the bundle: those of them that are there, which are returned.
    /// The current folder may be another one then.
    pub(super) fn hide<'a>(
        &self,
        read_only: impl Iterator<Item = (usize, &'a String)>,
        masked: impl Iterator<Item = (usize, &'a String)>,
    ) -> Result<Hidden, RootfsError> {
        let mut hidden = Hidden::default();
        for (at, path) in read_only {
            let done = self.read_only(path).map_err(|error| error.of(format!("linux.readonlyPaths[{at}]")))?;
            hidden.read_only.extend(done.then(|| path.clone()));
        }
        let mut empty = Masks::default();
        for (at, path) in masked {
            let done = self.mask(path, &mut empty).map_err(|error| error.of(format!("linux.maskedPaths[{at}]")))?;
            hidden.masked.extend(done.then(|| path.clone()));
        }
        Ok(hidden)
    }

    /// Whether it is there.
    fn read_only(&self, path: &str) -> Result<bool, RootfsError> {
        let target = match self.open(Path::new(path)) {
            Err(error) if is_absent(&error) => return Ok(false),
            found => found.step("open", path)?,
        };
        let tree = sys::clone_mount(target.as_fd(), true).step("take", path)?;
        let change = MountChange { set: libc::MOUNT_ATTR_RDONLY, ..MountChange::default() };
        sys::change_mount(tree.as_fd(), &change, true).step("make read-only", path)?;
        sys::attach_mount(tree.as_fd(), target.as_fd()).step("bind", path).map(|()| true)
    }

    /// Whether it is there.
    fn mask(&self, path: &str, masks: &mut Masks) -> Result<bool, RootfsError> {
        let target = match self.open(Path::new(path)) {
            Err(error) if is_absent(&error) => return Ok(false),
            found => found.step("open", path)?,
        };
        if !is_dir(&target).step("look at", path)? {
            let null = masks.null(self)?;
            let tree = sys::clone_mount(null.as_fd(), false).step("take", "/dev/null")?;
            return sys::attach_mount(tree.as_fd(), target.as_fd()).step("mask", path).map(|()| true);
        }
        if let Some(empty) = &masks.empty {
            let tree = sys::clone_mount(empty.as_fd(), false).step("take", "the empty folder")?;
            return sys::attach_mount(tree.as_fd(), target.as_fd()).step("mask", path).map(|()| true);
        }
        // The container's own /proc may be anything by now; mounting on the current folder needs no path.
        nix::unistd::fchdir(&target).step("enter", path)?;
        mount(Some("tmpfs"), ".", Some("tmpfs"), MsFlags::MS_RDONLY, Some("nr_blocks=1,nr_inodes=1"))
            .step("mask", path)?;
        masks.empty = Some(self.open(Path::new(path)).step("open", path)?);
        Ok(true)
    }
}

/// Paths of the bundle that need no more to be done.
#[derive(Clone, Default)]
pub(super) struct Hidden {
    masked: Vec<String>,
    read_only: Vec<String>,
}

impl Hidden {
    fn add(&mut self, other: &Hidden) {
        self.masked.extend(other.masked.iter().cloned());
        self.read_only.extend(other.read_only.iter().cloned());
    }

    /// Those below a place.
    pub(super) fn below(&self, top: &Path) -> Hidden {
        let below = |list: &[String]| list.iter().filter(|path| Path::new(path).starts_with(top)).cloned().collect();
        Hidden { masked: below(&self.masked), read_only: below(&self.read_only) }
    }
}

/// What is put over what is not to be seen: the null device, and one empty folder for all.
#[derive(Default)]
struct Masks {
    null: Option<OwnedFd>,
    empty: Option<OwnedFd>,
}

impl Masks {
    /// The container's null device, seen to be one by the descriptor that is then bound: a link there leads nowhere.
    fn null(&mut self, root: &Rootfs) -> Result<&OwnedFd, RootfsError> {
        if self.null.is_none() {
            let null = root.open(Path::new("/dev/null")).step("open", "/dev/null")?;
            let seen = fstat(&null).step("look at", "/dev/null")?;
            if seen.st_mode & libc::S_IFMT != libc::S_IFCHR || seen.st_rdev != makedev(1, 3) {
                return Err(io::Error::other("it is not the null device")).step("trust", "/dev/null");
            }
            self.null = Some(null);
        }
        Ok(self.null.as_ref().expect("just put there"))
    }
}

/// The most links on the way to one place, as the kernel has it (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// Where a mount goes; a relative one is below the root.
pub(super) fn destination(entry: &Mount) -> PathBuf {
    Path::new("/").join(entry.destination())
}

fn is_cgroup(entry: &Mount) -> bool {
    entry.typ().as_deref() == Some("cgroup")
}

/// Where a link in `folder` leads, `..` at the root being the root.
fn within(folder: &Path, to: &Path) -> PathBuf {
    let mut path = PathBuf::from("/");
    let start = if to.is_absolute() { Path::new("") } else { folder };
    for part in start.components().chain(to.components()) {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

fn open(path: &Path, flags: OFlag) -> Result<OwnedFd, RootfsError> {
    nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, Mode::empty()).step("open", path)
}

fn is_dir(fd: &OwnedFd) -> io::Result<bool> {
    Ok(fstat(fd)?.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

/// The descriptor as a path that mount(2) takes, while this process is in the host's /proc ([`Sources::enter_proc`]).
fn by_fd(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("self/fd/{}", fd.as_raw_fd()))
}

fn make_device(
    folder: &OwnedFd,
    name: &Path,
    kind: SFlag,
    number: u64,
    mode: u32,
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    match mknodat(folder, name, kind, Mode::from_bits_truncate(mode), number) {
        Err(nix::errno::Errno::EEXIST) => {
            // One of the same kind and number is as good.
            let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
            let there = fstat(openat2(folder, name, how)?)?;
            let same =
                there.st_mode & libc::S_IFMT == kind.bits() && (kind == SFlag::S_IFIFO || there.st_rdev == number);
            if !same {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            if owner.is_some() {
                // No link: it was opened as what it is.
                let path = by_fd(folder).join(name);
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
                let (uid, gid) = owner.unzip();
                std::os::unix::fs::lchown(&path, uid, gid)?;
            }
            return Ok(());
        }
        made => made?,
    }
    match owner.filter(|owner| *owner != (0, 0)) {
        Some((uid, gid)) => std::os::unix::fs::lchown(by_fd(folder).join(name), Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// Copies a folder with what is in it: folders, files and links, with owners and modes.
fn copy_tree(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    copy_folder(&by_fd(from), &by_fd(to))
}

fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    fs::set_permissions(to, meta.permissions())?;
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        if meta.is_dir() {
            fs::create_dir(&target)?;
            copy_folder(&source, &target)?;
        } else if meta.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
            std::os::unix::fs::lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
        } else if meta.is_file() {
            fs::copy(&source, &target)?;
            std::os::unix::fs::chown(&target, Some(meta.uid()), Some(meta.gid()))?;
        }
    }
    Ok(())
}

//! A container's file system: the overlay, what is mounted into it, and the step inside.
//!
//! Every path inside the image is opened with openat2 and RESOLVE_IN_ROOT (Linux 5.6), and mounted on by descriptor: an
//! image whose `/proc` is a link to `/etc` of the host mounts nothing there (CVE-2019-19921, CVE-2021-30465).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mkdirat, mknod};
use oci_spec::runtime::{Mount, Spec};

use crate::container::Launch;

/// Why a file system could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}: {source}")]
pub(super) struct RootfsError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError> {
        self.map_err(|source| RootfsError { step, path: path.as_ref().to_owned(), source: source.into() })
    }
}

const NONE: Option<&str> = None;

/// Mounts the overlay on `rootfs`, in the shim's own mount namespace. The current folder is the container's.
pub(super) fn mount_overlay(launch: &Launch) -> Result<(), RootfsError> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).step("make private", "/")?;
    let here = std::env::current_dir().step("find", ".")?;
    let shown = |path: &Path| path.display().to_string().replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:");
    // Names relative to the layers' folder, so that the page the kernel has for options holds a hundred of them.
    let folder = launch.layers.first().and_then(|layer| layer.parent()).map(Path::to_owned);
    let lower: Vec<String> = launch
        .layers
        .iter()
        .rev()
        .map(|layer| match (&folder, layer.file_name()) {
            (Some(folder), Some(name)) if layer.parent() == Some(folder) => shown(Path::new(name)),
            _ => shown(layer),
        })
        .collect();
    // An image without layers has an empty folder to stand on.
    let lower = if lower.is_empty() { shown(&here.join("work")) } else { lower.join(":") };
    let (upper, work) = (shown(&here.join("upper")), shown(&here.join("work")));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let target = here.join("rootfs");
    if let Some(folder) = &folder {
        std::env::set_current_dir(folder).step("enter", folder)?;
    }
    // No device node of an image is ever opened: what a container may have is made in its own /dev.
    let mounted = mount(Some("overlay"), &target, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()));
    std::env::set_current_dir(&here).step("enter", &here)?;
    mounted.step("mount the overlay on", &target)
}

/// Inside the new namespaces: mounts what the spec asks for, and makes the rootfs this process's root.
pub(super) fn enter(spec: &Spec, bundle: &Path) -> Result<(), RootfsError> {
    let root = bundle.join("rootfs");
    let root_fd = open_dir(&root)?;
    for entry in spec.mounts().iter().flatten() {
        if entry.destination() == Path::new("/sys/fs/cgroup") {
            mount_cgroups(&root_fd)?;
        } else {
            mount_inside(entry, &root_fd, bundle)?;
        }
        if entry.destination() == Path::new("/dev") {
            make_devices(&root_fd)?;
        }
    }
    std::env::set_current_dir(&root).step("enter", &root)?;
    // Stacking the old root under the new one at the same place saves a folder for it in the image (pivot_root(2)).
    nix::unistd::pivot_root(".", ".").step("pivot into", &root)?;
    umount2(".", MntFlags::MNT_DETACH).step("detach the old root under", &root)?;
    std::env::set_current_dir("/").step("enter", "/")?;
    let linux = spec.linux().as_ref();
    for path in linux.and_then(|linux| linux.readonly_paths().as_ref()).into_iter().flatten() {
        read_only(path)?;
    }
    for path in linux.and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten() {
        mask(path)?;
    }
    Ok(())
}

fn open_dir(path: &Path) -> Result<OwnedFd, RootfsError> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step("open", path)
}

/// Opens `path` inside the root, wherever its links lead, but never out.
fn open_inside(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    Ok(openat2(root, path, how)?)
}

/// As [`open_inside`]; makes what is missing: folders, and a file at the end if `file`.
fn make_inside(root: &OwnedFd, path: &Path, file: bool) -> Result<OwnedFd, RootfsError> {
    if let Ok(found) = open_inside(root, path) {
        return Ok(found);
    }
    let relative = path.strip_prefix("/").unwrap_or(path);
    let parts: Vec<_> = relative.components().collect();
    let mut at = open_inside(root, Path::new("/")).step("open the root of", path)?;
    let mut so_far = PathBuf::from("/");
    for (number, part) in parts.iter().enumerate() {
        so_far.push(part);
        if let Ok(next) = open_inside(root, &so_far) {
            at = next;
            continue;
        }
        let name = Path::new(part.as_os_str());
        if file && number + 1 == parts.len() {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
            nix::fcntl::openat(&at, name, flags, Mode::from_bits_truncate(0o644)).step("make", &so_far)?;
        } else {
            mkdirat(&at, name, Mode::from_bits_truncate(0o755)).step("make", &so_far)?;
        }
        at = open_inside(root, &so_far).step("open", &so_far)?;
    }
    Ok(at)
}

/// The descriptor as a path that mount(2) takes.
fn by_fd(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn mount_inside(entry: &Mount, root: &OwnedFd, bundle: &Path) -> Result<(), RootfsError> {
    let path = entry.destination();
    let (flags, data) = options(entry.options().as_deref().unwrap_or_default());
    let kind = entry.typ().as_deref().unwrap_or("bind");
    if kind == "bind" {
        let source = bundle.join(entry.source().as_deref().unwrap_or(Path::new("")));
        let is_file = fs::metadata(&source).step("look at", &source)?.is_file();
        let target = make_inside(root, path, is_file)?;
        return mount(Some(&source), &by_fd(&target), NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .step("bind", path);
    }
    let target = make_inside(root, path, false)?;
    let data = (!data.is_empty()).then_some(data.as_str());
    mount(Some(kind), &by_fd(&target), Some(kind), flags, data).step("mount", path)
}

fn options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "ro" => flags |= MsFlags::MS_RDONLY,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "rbind" | "bind" | "rprivate" | "private" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Docker's devices, made afresh on the container's own /dev.
fn make_devices(root: &OwnedFd) -> Result<(), RootfsError> {
    // Kept open as long as the path through it is used.
    let dev = open_inside(root, Path::new("/dev")).step("open", "/dev")?;
    let base = by_fd(&dev);
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        let path = base.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor)).step("make /dev", name)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).step("set the mode of /dev", name)?;
    }
    for (name, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
        ("core", "/proc/kcore"),
    ] {
        std::os::unix::fs::symlink(to, base.join(name)).step("link /dev", name)?;
    }
    Ok(())
}

/// The container's own cgroups, read-only: one tree on v2, the ones in use on v1.
fn mount_cgroups(root: &OwnedFd) -> Result<(), RootfsError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let top = Path::new("/sys/fs/cgroup");
    let Ok(target) = open_inside(root, top) else { return Ok(()) };
    if cgroups_rs::fs::hierarchies::is_cgroup2_unified_mode() {
        return mount(Some("cgroup"), &by_fd(&target), Some("cgroup2"), flags | MsFlags::MS_RDONLY, NONE)
            .step("mount", top);
    }
    mount(Some("tmpfs"), &by_fd(&target), Some("tmpfs"), flags, Some("mode=755")).step("mount", top)?;
    for controller in ["memory", "cpu", "cpuacct", "pids"] {
        let path = top.join(controller);
        let inside = make_inside(root, &path, false)?;
        // Not every host has every controller on v1, nor each by itself; what is missing is not shown.
        let _unseen =
            mount(Some("cgroup"), &by_fd(&inside), Some("cgroup"), flags | MsFlags::MS_RDONLY, Some(controller));
    }
    let again = open_inside(root, top).step("open", top)?;
    let remount = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NONE, &by_fd(&again), NONE, remount, NONE).step("make read-only", top)
}

fn read_only(path: &str) -> Result<(), RootfsError> {
    match mount(Some(path), path, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE) {
        Err(nix::errno::Errno::ENOENT) => return Ok(()),
        result => result.step("bind", path)?,
    }
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(NONE, path, NONE, flags, NONE).step("make read-only", path)
}

fn mask(path: &str) -> Result<(), RootfsError> {
    let Ok(meta) = fs::metadata(path) else { return Ok(()) };
    if meta.is_dir() {
        return mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, NONE).step("mask", path);
    }
    // /dev/null in a container is its own; bound from there it could not be confused with the host's (CVE-2025-31133).
    let null = fs::metadata("/dev/null").step("look at", "/dev/null")?;
    if std::os::unix::fs::MetadataExt::rdev(&null) != makedev(1, 3) {
        return Err(RootfsError {
            step: "trust",
            path: PathBuf::from("/dev/null"),
            source: io::Error::other("it is not the null device"),
        });
    }
    mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE).step("mask", path)
}

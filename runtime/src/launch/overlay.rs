//! The overlay that a container's root file system is: mounted by its first process, which takes it along when it ends, or by its shim.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::{disk, shim};
use crate::container::{IDS, Launch, OPEN_ROOT};
use crate::lazy;
use crate::oci::{RootfsError, Step, user_namespace};
use crate::store::ImageFile;
use crate::sys::{self, MountChange};

/// Longer than anybody holds what is left of a container.
const PATIENCE: Duration = Duration::from_secs(15);

const FOLDER: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// Whether the shim mounts it, in a mount namespace of its own: what serves it or holds it is to outlive the first process's start, or
/// its root has no rights on the machine. Otherwise the first process does, in its own.
pub(super) fn is_the_shims(launch: &Launch) -> bool {
    let serves = launch.file.as_ref().is_some_and(|file| file.lazy.is_some());
    serves || launch.storage.is_some() || launch.shifted_by.is_some() || launch.runtime.is_some()
}

/// Mounts the overlay of the container whose folder is `here`, on its `rootfs`, in this process's mount namespace, which is nobody
/// else's. The current folder is that one afterwards.
pub(super) fn mount_overlay(launch: &Launch, here: &Path) -> Result<(), RootfsError> {
    wait_for_last_life(here).step("wait for the last life of", here)?;
    let shown = |path: &Path| path.display().to_string().replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:");
    let layers = match (&launch.file, launch.shifted_by) {
        (Some(file), base) => vec![image(file, here, base)?],
        (None, Some(base)) => shifted(&launch.layers, here, base)?,
        (None, None) => launch.layers.clone(),
    };
    // Names relative to the layers' folder, so that the page the kernel has for options holds a hundred of them.
    let folder = layers.first().and_then(|layer| layer.parent()).map(Path::to_owned);
    let lower: Vec<String> = layers
        .iter()
        .rev()
        .map(|layer| match (&folder, layer.file_name()) {
            (Some(folder), Some(name)) if layer.parent() == Some(folder) => shown(Path::new(name)),
            _ => shown(layer),
        })
        .collect();
    // An image without layers has an empty folder to stand on.
    let mut lower = if lower.is_empty() { shown(&here.join("work")) } else { lower.join(":") };
    if let Some(file) = &launch.file {
        let objects = match &file.lazy {
            Some(lazy) => {
                // SAFETY: a shim is a fork of the single-threaded zygote and starts no thread.
                let served = unsafe { lazy::mount(lazy, &file.objects) }.step("serve", &file.objects)?;
                attach(&served, &file.objects, None, here, "objects")?
            }
            None => file.objects.clone(),
        };
        // All files are of one device then, as over folders.
        lower = format!("{lower}::{},xino=auto", shown(&objects));
    }
    let writable = launch.storage.map_or_else(|| Ok(here.to_owned()), |size| disk::mount_own(here, size))?;
    let (upper, work) = (shown(&writable.join("upper")), shown(&writable.join("work")));
    let own = if crate::rootless::is_rootless() { ",userxattr" } else { "" };
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}{own}");
    let target = match launch.shifted_by {
        Some(base) => open_root(&writable, base)?,
        None => here.join("rootfs"),
    };
    if let Some(folder) = &folder {
        std::env::set_current_dir(folder).step("enter", folder)?;
    }
    // No device node of an image is ever opened: what a container may have is made in its own /dev.
    let mount = |options: &str| mount(Some("overlay"), &target, Some("overlay"), MsFlags::MS_NODEV, Some(options));
    let mut mounted = mount(&options);
    if launch.file.is_some() && mounted == Err(Errno::EINVAL) {
        // Before Linux 6.16 files without bytes have to be asked for.
        mounted = mount(&format!("{options},metacopy=on,redirect_dir=on"));
    }
    std::env::set_current_dir(here).step("enter", here)?;
    mounted.step("mount the overlay on", &target)
}

/// Waits until the shim of the container's last life has let go of its mounts: the kernel wants no two overlays with one writable layer.
fn wait_for_last_life(here: &Path) -> io::Result<()> {
    let socket = here.join(shim::LAST);
    if !socket.exists() {
        return Ok(());
    }
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, Interrupted, NotFound, TimedOut, WouldBlock};
    let mut line = match sys::connect(&socket) {
        // Whoever was there and does not listen any more has none.
        Err(error) if matches!(error.kind(), ConnectionRefused | NotFound) => return Ok(()),
        connected => connected?,
    };
    line.set_read_timeout(Some(PATIENCE))?;
    loop {
        match line.read(&mut [0]).map_err(|error| (error.kind(), error)) {
            // It says nothing, and closes.
            Ok(_) | Err((ConnectionReset, _)) => return Ok(()),
            Err((Interrupted, _)) => {}
            Err((WouldBlock, _)) => return Err(TimedOut.into()),
            Err((_, error)) => return Err(error),
        }
    }
}

/// The layers as they are owned in a sandbox whose root is `base`, mounted below the container's folder in this mount
/// namespace (overlayfs takes such layers since Linux 5.19).
fn shifted(layers: &[PathBuf], here: &Path, base: u32) -> Result<Vec<PathBuf>, RootfsError> {
    let users = users(here, base)?;
    let mut made = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let fd = nix::fcntl::open(layer, FOLDER, Mode::empty()).step("open", layer)?;
        let tree = sys::clone_mount(fd.as_fd(), false).step("take", layer)?;
        made.push(attach(&tree, layer, Some(&users), here, &at.to_string())?);
    }
    Ok(made)
}

/// The file system of an image, mounted below the container's folder in this mount namespace.
fn image(file: &ImageFile, here: &Path, base: Option<u32>) -> Result<PathBuf, RootfsError> {
    let users = base.map(|base| users(here, base)).transpose()?;
    let mounted = file.mount().step("mount", &file.image)?;
    attach(&mounted, &file.image, users.as_ref(), here, "image")
}

/// The user namespace that owners are shifted by.
fn users(here: &Path, base: u32) -> Result<OwnedFd, RootfsError> {
    let ids: [LinuxIdMapping; 1] = [LinuxIdMappingBuilder::default()
        .container_id(0u32)
        .host_id(base)
        .size(IDS)
        .build()
        .map_err(std::io::Error::other)
        .step("make the ids of", here)?];
    user_namespace(&ids, &ids).step("make the ids of", here)
}

/// Mounts `tree`, which is what `of` was, at `lower/name`.
fn attach(tree: &OwnedFd, of: &Path, users: Option<&OwnedFd>, here: &Path, name: &str) -> Result<PathBuf, RootfsError> {
    if let Some(users) = users {
        let change = MountChange { shifted_by: Some(users.as_fd()), ..MountChange::default() };
        sys::change_mount(tree.as_fd(), &change, false).step("shift the ids of", of)?;
    }
    let place = here.join("lower").join(name);
    fs::create_dir_all(&place).step("make", &place)?;
    let to = nix::fcntl::open(&place, FOLDER, Mode::empty()).step("open", &place)?;
    sys::attach_mount(tree.as_fd(), to.as_fd()).step("mount on", &place)?;
    Ok(place)
}

/// A place that the sandbox's root may walk to, and a writable layer that is its own.
fn open_root(writable: &Path, base: u32) -> Result<PathBuf, RootfsError> {
    for name in ["upper", "work"] {
        let path = writable.join(name);
        std::os::unix::fs::chown(&path, Some(base), Some(base)).step("change the owner of", &path)?;
    }
    let target = PathBuf::from(OPEN_ROOT);
    fs::create_dir_all(&target).step("make", &target)?;
    Ok(target)
}

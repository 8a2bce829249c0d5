//! The overlay that a container's root file system is.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use crate::container::{IDS, Launch, OPEN_ROOT};
use crate::oci::{RootfsError, Step, user_namespace};
use crate::sys::{self, MountChange};

const NONE: Option<&str> = None;

/// Mounts the overlay on `rootfs`, in the shim's own mount namespace. The current folder is the container's.
pub(super) fn mount_overlay(launch: &Launch) -> Result<(), RootfsError> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).step("make private", "/")?;
    let here = std::env::current_dir().step("find", ".")?;
    let shown = |path: &Path| path.display().to_string().replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:");
    let layers = match launch.shifted_by {
        Some(base) => shifted(&launch.layers, &here, base)?,
        None => launch.layers.clone(),
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
    let lower = if lower.is_empty() { shown(&here.join("work")) } else { lower.join(":") };
    let (upper, work) = (shown(&here.join("upper")), shown(&here.join("work")));
    let own = if crate::rootless::is_rootless() { ",userxattr" } else { "" };
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}{own}");
    let target = match launch.shifted_by {
        Some(base) => open_root(&here, base)?,
        None => here.join("rootfs"),
    };
    if let Some(folder) = &folder {
        std::env::set_current_dir(folder).step("enter", folder)?;
    }
    // No device node of an image is ever opened: what a container may have is made in its own /dev.
    let mounted = mount(Some("overlay"), &target, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()));
    std::env::set_current_dir(&here).step("enter", &here)?;
    mounted.step("mount the overlay on", &target)
}

/// The layers as they are owned in a sandbox whose root is `base`, mounted below the container's folder in this mount
/// namespace (overlayfs takes such layers since Linux 5.19).
fn shifted(layers: &[PathBuf], here: &Path, base: u32) -> Result<Vec<PathBuf>, RootfsError> {
    let ids: [LinuxIdMapping; 1] = [LinuxIdMappingBuilder::default()
        .container_id(0u32)
        .host_id(base)
        .size(IDS)
        .build()
        .map_err(std::io::Error::other)
        .step("make the ids of", here)?];
    let users = user_namespace(&ids, &ids).step("make the ids of", here)?;
    let mut made = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(layer, flags, Mode::empty()).step("open", layer)?;
        let tree = sys::clone_mount(fd.as_fd(), false).step("take", layer)?;
        let change = MountChange { shifted_by: Some(users.as_fd()), ..MountChange::default() };
        sys::change_mount(tree.as_fd(), &change, false).step("shift the ids of", layer)?;
        let place = here.join("lower").join(at.to_string());
        fs::create_dir_all(&place).step("make", &place)?;
        let to = nix::fcntl::open(&place, flags, Mode::empty()).step("open", &place)?;
        sys::attach_mount(tree.as_fd(), to.as_fd()).step("mount on", &place)?;
        made.push(place);
    }
    Ok(made)
}

/// A place that the sandbox's root may walk to, and a writable layer that is its own.
fn open_root(here: &Path, base: u32) -> Result<PathBuf, RootfsError> {
    for name in ["upper", "work"] {
        let path = here.join(name);
        std::os::unix::fs::chown(&path, Some(base), Some(base)).step("change the owner of", &path)?;
    }
    let target = PathBuf::from(OPEN_ROOT);
    fs::create_dir_all(&target).step("make", &target)?;
    Ok(target)
}

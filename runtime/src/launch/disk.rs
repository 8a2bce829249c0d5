//! A disk of its own for a container's writable layer, as large as that may get: `--storage-opt size=`.
//!
//! It is a sparse file in the container's folder with an ext4 in it, on a loop device: what is not used takes no room, and whatever
//! runs inside meets the end of its own disk before the machine's, if that has so much: nothing is reserved. Project quotas would
//! cost less, but few machines have their file systems mounted with them.
//!
//! ```text
//! disk.new   while it is formatted; begun anew by the next start
//! disk       whole, as large as it was first asked for: it stays while the container does
//! own/       where it is mounted, in the shim's mount namespace alone; upper/ and work/ are in it
//! ```
//!
//! One life of the container has it mounted at a time: the next one waits for the file's lock, which the device holds ([`alone`]).
//!
//! **If the shim dies** its mount namespace ends, with it the mount, and the device frees itself (LO_FLAGS_AUTOCLEAR). **If the
//! machine dies** the file system's journal is what it goes by.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

use crate::oci::{RootfsError, Step};
use crate::sys;

const FORMATTERS: [&str; 4] =
    ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4", "/usr/local/sbin/mkfs.ext4"];

/// For a disk that is being unmounted, which first has to take what was written to it.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// Mounts the disk of the container in the folder `here`, with `size` bytes if it is new; where its writable layer is.
pub(super) fn mount_own(here: &Path, size: u64) -> Result<PathBuf, RootfsError> {
    let (disk, own) = (here.join("disk"), here.join("own"));
    if !disk.try_exists().step("look for", &disk)? {
        make(&here.join("disk.new"), &disk, size).step("make", &disk)?;
    }
    fs::create_dir_all(&own).step("make", &own)?;
    let file = File::options().read(true).write(true).open(&disk).step("open", &disk)?;
    alone(&file).step("use", &disk)?;
    // It is open until it is mounted: a device that nobody has frees itself.
    let (_device, path) = sys::loop_device(&file).step("find a loop device for", &disk)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // What is deleted inside takes no room outside.
    mount(Some(&path), &own, Some("ext4"), flags, Some("discard")).step("mount", &disk)?;
    for (name, mode) in [("upper", 0o755), ("work", 0o700)] {
        let path = own.join(name);
        fs::create_dir_all(&path)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .step("make", &path)?;
    }
    Ok(own)
}

/// Waits until the container's last life has let go of the disk: two mounts of one would destroy it. The lock is the open file's,
/// which the loop device keeps open, and so as good as the device is: also when something that a container gave away holds it.
fn alone(file: &File) -> io::Result<()> {
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if since.elapsed() < PATIENCE => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::other(
                    "it is mounted still: somebody holds a file of the container's last life",
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

fn make(new: &Path, disk: &Path, size: u64) -> io::Result<()> {
    let formatter = FORMATTERS.iter().find(|path| Path::new(path).exists());
    let formatter = formatter.ok_or_else(|| io::Error::other("this machine has no mkfs.ext4 (package e2fsprogs)"))?;
    // One that is being formatted still, by what a killed shim left, is another file.
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = File::create_new(new)?;
    fs::set_permissions(new, fs::Permissions::from_mode(0o600))?;
    file.set_len(size)?;
    // Nothing is kept for root: inside there may be one.
    let options = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"];
    let made = Command::new(formatter).args(options).arg(new).stdin(Stdio::null()).output()?;
    if !made.status.success() {
        let told = String::from_utf8_lossy(&made.stderr);
        return Err(io::Error::other(format!("mkfs.ext4: {}", told.lines().last().unwrap_or("it failed"))));
    }
    file.sync_all()?;
    fs::rename(new, disk)
}

//! This program where nothing can write to it.
//!
//! Whatever enters a container can be made to run its own program inside (a shell that is replaced by `#!/proc/self/exe`), and
//! whoever is root inside could then open that program through /proc/PID/exe, keep it, and overwrite it when nobody runs it any
//! more (CVE-2019-5736). So it first becomes itself again, from a read-only mount of its own that is attached nowhere: what is
//! opened through that cannot be written to, and nobody can find the mount to change it.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use crate::sys::{self, MountChange};

/// Does nothing when that is so already; returns otherwise only when it cannot be: an ordinary user makes no mounts, and its
/// containers' root is nobody who could write to what it cannot. To be called before there is anything else.
pub fn seal() -> io::Result<()> {
    let own = own()?;
    if is_read_only(&own)? {
        return Ok(());
    }
    let mount = mount_read_only(own.as_fd())?;
    Err(sys::exec_fd(mount.as_fd(), &words(std::env::args_os())?, &environment(std::env::vars_os())?))
}

/// Whether it is so already.
pub(super) fn is_sealed() -> bool {
    own().and_then(|own| is_read_only(&own)).unwrap_or(false)
}

fn own() -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open("/proc/self/exe", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

fn is_read_only(file: &OwnedFd) -> io::Result<bool> {
    Ok(fstatvfs(file)?.flags().contains(FsFlags::ST_RDONLY))
}

/// A read-only mount of a file alone, attached nowhere.
pub(crate) fn mount_read_only(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mount = sys::clone_mount(file, false)?;
    let change = MountChange { set: libc::MOUNT_ATTR_RDONLY, ..MountChange::default() };
    sys::change_mount(mount.as_fd(), &change, false)?;
    Ok(mount)
}

/// Variables as exec takes them.
pub(crate) fn environment(variables: impl Iterator<Item = (OsString, OsString)>) -> io::Result<Vec<CString>> {
    words(variables.map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    }))
}

/// Arguments as exec takes them.
pub(crate) fn words(words: impl Iterator<Item = OsString>) -> io::Result<Vec<CString>> {
    words.map(|word| CString::new(word.into_vec()).map_err(io::Error::other)).collect()
}

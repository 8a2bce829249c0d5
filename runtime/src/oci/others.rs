//! A root among others' mounts: that of a container without a mount namespace of its own (runtime-spec config-linux.md, "Namespaces"),
//! which has its caller's, or one that it joins.
//!
//! **Who writes.** Init attaches a copy of the root on the bundle's root and tells which mount that is; the parent writes it down before
//! anything is mounted inside. Whoever deletes the container takes the mount away, with all that is inside, and then what was written.
//!
//! **If one dies.** The parent before it was written: init takes the mount away. Later: `delete --force` finds it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use super::namespaces::flag;
use super::{Failure, failure, reap};
use crate::sys;

/// Which mount something is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MountId {
    /// As mountinfo has it (statx(2), Linux 5.8); it is given again.
    listed: u64,
    /// It never is (Linux 6.8).
    unique: Option<u64>,
}

impl MountId {
    /// The one in which a descriptor lies.
    pub(super) fn of(fd: &OwnedFd) -> io::Result<MountId> {
        /// In libc for some targets only.
        const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
        let number = |wanted: u32| {
            // SAFETY: statx is plain data; zero is a valid value for it.
            let mut found: libc::statx = unsafe { std::mem::zeroed() };
            // SAFETY: the path is an empty string that ends with NUL, and the kernel writes one statx, which lives for the whole call.
            match unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, wanted, &mut found) } {
                0 => Ok((found.stx_mask & wanted != 0).then_some(found.stx_mnt_id)),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let listed = number(libc::STATX_MNT_ID)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS))?;
        Ok(MountId { listed, unique: number(STATX_MNT_ID_UNIQUE)? })
    }
}

/// A root that is mounted among others' mounts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Mounted {
    /// Which mount it is.
    pub(super) mount: MountId,
    /// Where it was mounted.
    pub(super) root: PathBuf,
}

impl Mounted {
    /// Takes it away, if it is there still; not what others have mounted over it. This process must have one thread.
    pub(super) fn unmount(&self, spec: &Spec) -> Result<(), Failure> {
        let failed = |error: io::Error| {
            let reason = match error.raw_os_error() {
                Some(libc::EBUSY) => "something else is mounted over it".to_owned(),
                _ => error.to_string(),
            };
            failure(format!("{} stays mounted: {reason}", self.root.display()))
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let proc = nix::fcntl::open("/proc", flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
        let mut joined = Vec::new();
        // The users' first: they have the right to the mounts.
        for kind in [LinuxNamespaceType::User, LinuxNamespaceType::Mount] {
            let Some(path) = listed.iter().find(|it| it.typ() == kind).and_then(|it| it.path().as_ref()) else {
                continue;
            };
            match File::open(path) {
                Ok(file) => joined.push((flag(kind), file)),
                // It is gone, and its mounts with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(failed(error)),
            }
        }
        if joined.is_empty() {
            return self.unmount_here(&proc).map_err(failed);
        }
        // SAFETY: by this function's contract there is one thread.
        match unsafe { sys::clone_into(0) }.map_err(failed)? {
            sys::Cloned::Child => {
                let mut entered = joined.iter().map(|(kind, file)| sys::enter_namespaces(file.as_fd(), *kind));
                let entered = entered.find(Result::is_err).unwrap_or(Ok(()));
                let unmounted = entered.and_then(|()| self.unmount_here(&proc));
                std::process::exit(unmounted.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0))
            }
            sys::Cloned::Parent { pidfd, .. } => match reap(&pidfd) {
                0 => Ok(()),
                errno => Err(failed(io::Error::from_raw_os_error(errno))),
            },
        }
    }

    /// In this process's mount namespace; `proc` is the host's /proc.
    fn unmount_here(&self, proc: &OwnedFd) -> io::Result<()> {
        let mut table = Vec::new();
        let file = openat(proc, "self/mountinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).read_to_end(&mut table)?;
        // Wherever it is by now: a folder above it may have got another name.
        let Some(point) = mount_point(&table, self.mount.listed) else { return Ok(()) };
        let found = MountId::of(&open_plain(&point)?)?;
        if found == self.mount {
            return Ok(umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?);
        }
        // Another one has its number, or lies over it.
        if found.listed == self.mount.listed { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBUSY)) }
    }
}

/// Opens a folder whose path has no links, which others could change.
pub(super) fn open_plain(path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
    Ok(openat2(nix::fcntl::AT_FDCWD, path, how.resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))?)
}

/// Where a mount is, by mountinfo (proc_pid_mountinfo(5)): its first field is the number, its fifth the place, in which some
/// characters are three octal digits after a backslash.
fn mount_point(table: &[u8], listed: u64) -> Option<PathBuf> {
    let number = listed.to_string();
    let mut lines = table.split(|byte| *byte == b'\n');
    let mut rest = lines.find_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        (fields.next()? == number.as_bytes()).then(|| fields.nth(3)).flatten()
    })?;
    let mut place = Vec::with_capacity(rest.len());
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        rest = if byte.is_some() { &after[3..] } else { after };
        place.push(byte.unwrap_or(*first));
    }
    Some(OsString::from_vec(place).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_s_place_is_found_by_its_number() {
        let table = b"21 1 8:1 / / rw - ext4 /dev/a rw\n210 21 0:5 /x /a\\040b\\134c rw,relatime - tmpfs t rw\n";
        assert_eq!(mount_point(table, 21), Some("/".into()));
        assert_eq!(mount_point(table, 210), Some("/a b\\c".into()));
        assert_eq!(mount_point(table, 2), None);
    }
}

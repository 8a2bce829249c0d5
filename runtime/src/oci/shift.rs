//! A user namespace that is nothing but a table of ids, for mounts whose owners are shifted (mount_setattr(2)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use oci_spec::runtime::LinuxIdMapping;

use super::namespaces::write_map;
use crate::sys;

/// Makes it. It lives as long as the descriptor, or a mount that uses it.
pub(crate) fn user_namespace(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> io::Result<OwnedFd> {
    let (mut until, hold) = io::pipe()?;
    // SAFETY: whoever puts a container together has one thread.
    match unsafe { sys::clone_into(libc::CLONE_NEWUSER as u64)? } {
        sys::Cloned::Child => {
            drop(hold);
            // There for its namespace alone, until the parent has it, or has died.
            drop(until.read(&mut [0]));
            std::process::exit(0)
        }
        sys::Cloned::Parent { pid, pidfd } => {
            drop(until);
            // Of the mount: ids on the disk to ids as they are seen.
            let made = write_map(pid, "gid_map", gids)
                .and_then(|()| write_map(pid, "uid_map", uids))
                .and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
            drop(hold);
            super::reap(&pidfd);
            Ok(made?.into())
        }
    }
}

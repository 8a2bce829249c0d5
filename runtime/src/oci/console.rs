//! A container's terminal: made inside, by the container's own devpts, and handed out by descriptor.
//!
//! Nothing here follows a path that the image could have prepared: the other end is opened through the master
//! (TIOCGPTPEER), and bound on /dev/console by descriptor (CVE-2025-52565).

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::statfs::fstatfs;
use oci_spec::runtime::Process;

use super::{Failure, failure};
use crate::sys;

/// DEVPTS_SUPER_MAGIC (linux/magic.h).
const DEVPTS: i64 = 0x1cd1;

/// A terminal for the program, whose other end goes to whoever listens at `socket`; it is this session's.
pub(super) fn make(process: &Process, root: &OwnedFd, socket: Option<&UnixStream>) -> Result<OwnedFd, Failure> {
    let socket = socket.ok_or_else(|| failed(io::Error::other("nobody takes the other end of it")))?;
    let (master, terminal) = open(root).map_err(failed)?;
    if let Some(size) = process.console_size() {
        sys::set_terminal_size(&master, size.height() as u16, size.width() as u16).map_err(failed)?;
    }
    hand_out(&master, socket).map_err(failed)?;
    sys::control_terminal(&terminal).map_err(failed)?;
    Ok(terminal)
}

/// Makes it this process's input and output.
pub(super) fn pass(terminal: &OwnedFd) -> Result<(), Failure> {
    (0..3).try_for_each(|to| sys::pass(terminal.as_raw_fd(), to)).map_err(failed)
}

fn failed(error: io::Error) -> Failure {
    failure(format!("process.terminal: {error}"))
}

/// A new terminal of the devpts in the root `root`: its master, and the end for the program.
fn open(root: &OwnedFd) -> io::Result<(File, OwnedFd)> {
    let how =
        OpenHow::new().flags(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let master = openat2(root, "/dev/pts/ptmx", how)
        .map_err(|error| io::Error::other(format!("/dev/pts/ptmx: {error} (does the bundle mount a devpts there?)")))?;
    if fstatfs(&master)?.filesystem_type().0 != DEVPTS {
        return Err(io::Error::other("/dev/pts/ptmx is not on a devpts"));
    }
    sys::unlock_terminal(&master)?;
    let peer = sys::terminal_peer(&master)?;
    Ok((File::from(master), peer))
}

/// Sends the master to whoever listens at the other end of `socket`, as runc and crun do: one byte string, one descriptor.
fn hand_out(master: &File, socket: &UnixStream) -> io::Result<()> {
    send_fd(socket.as_fd(), b"/dev/ptmx", master.as_fd())
}

/// Sends bytes with a descriptor.
pub(super) fn send_fd(socket: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

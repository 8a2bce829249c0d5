//! Between a person's terminal and a container's: what is typed goes in as it is, what comes out is shown, and the size
//! follows. The person's terminal is put back as it was, whatever ends the container.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::sys;

const PIECE: usize = 16 * 1024;

/// A terminal in which nothing is interpreted, until this is dropped.
pub struct Raw {
    before: Option<Termios>,
}

impl Raw {
    /// Of standard input; does nothing where that is no terminal.
    pub fn enter() -> Raw {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            // Where it cannot be, keys arrive line by line.
            let _cooked = tcsetattr(io::stdin(), SetArg::TCSANOW, &raw);
        }
        Raw { before }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _gone = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// The descriptor that a container sends: of its terminal, or of its filter's questions.
pub(crate) fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    // What comes with it fits, or is of no interest.
    let mut bytes = [0; 64];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(io::Error::other("no descriptor came"))
}

/// Gives a container's terminal the size of this one's.
pub(super) fn follow_size(master: &File) {
    if let Ok((rows, columns)) = sys::terminal_size(&io::stdout()) {
        // One that has ended has no size.
        drop(sys::set_terminal_size(master, rows, columns));
    }
}

/// Copies both ways until the process has ended and all of its output was shown. `signalled` is looked at for what comes in
/// between.
pub(super) fn relay(master: &mut File, pidfd: &OwnedFd, signals: &OwnedFd, mut signalled: impl FnMut(&mut File)) {
    let _raw = Raw::enter();
    let mut buffer = vec![0; PIECE];
    let mut input = true;
    loop {
        let stdin = io::stdin();
        let mut fds = vec![
            PollFd::new(master.as_fd(), PollFlags::POLLIN),
            PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        if input {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        drop(fds);
        if ready[2] {
            signalled(master);
        }
        if ready[0] {
            match master.read(&mut buffer) {
                // EIO: nobody has the other end open any more.
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    let mut stdout = io::stdout().lock();
                    if stdout.write_all(&buffer[..len]).and_then(|()| stdout.flush()).is_err() {
                        return;
                    }
                }
            }
        } else if ready[1] {
            return;
        }
        if input && ready[3] {
            match stdin.lock().read(&mut buffer) {
                Ok(0) | Err(_) => input = false,
                Ok(len) => drop(master.write_all(&buffer[..len])),
            }
        }
    }
}

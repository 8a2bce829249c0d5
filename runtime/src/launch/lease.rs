//! The process that ends a container when its lease is over, whatever has become of everybody else.
//!
//! A shim whose container runs by a lease forks it as soon as there are its first process and its cgroup, and before that
//! process goes on. It does nothing but wait, for that process to end or for the time in `deadline` to come, which the
//! daemon moves on as the lease is renewed; then it looks once more, and kills. It writes nothing and reads eight bytes of
//! a file that it has open: a shim that waits for a slow disk to take a line of the log does not hold it up.
//!
//! The timer runs on the boot clock, which goes on while the machine sleeps: a machine that wakes after its lease has
//! ended kills first. What no process can see is a virtual machine that its host has stopped and started again: whatever
//! such a container writes to is to refuse an old `MOYAI_EPOCH`.
//!
//! **If one dies.** The shim: the container dies with it. This process: only by a signal from outside, as the kernel kills
//! for memory; the shim, which then sees its child end before the container, kills the container itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags};

use crate::container::deadline_in;
use crate::host::boot_time;
use crate::sys;

/// Forks it. The descriptor becomes readable when it has ended.
///
/// # Safety
/// The calling process must have one thread, so that the child may go on running Rust code.
pub(super) unsafe fn watch(container: BorrowedFd<'_>, deadline: &File) -> io::Result<OwnedFd> {
    let shim = sys::pidfd_open(std::process::id() as i32)?;
    // SAFETY: the caller has one thread.
    match unsafe { sys::clone_into(0)? } {
        sys::Cloned::Parent { pidfd, .. } => Ok(pidfd),
        sys::Cloned::Child => {
            sys::name_process(c"moyai-lease");
            sys::close_all_but(&[container.as_raw_fd(), deadline.as_raw_fd(), shim.as_raw_fd()]);
            // Nobody can be told; a container without a timer must not run.
            if wait(container, deadline, shim.as_fd()).is_err() {
                drop(sys::signal_pidfd(container, libc::SIGKILL));
            }
            std::process::exit(0)
        }
    }
}

/// Until the container has ended, or its time, or its shim: what ties it to that is gone when it has changed its user (prctl(2),
/// PR_SET_PDEATHSIG).
fn wait(container: BorrowedFd<'_>, deadline: &File, shim: BorrowedFd<'_>) -> io::Result<()> {
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
    loop {
        let end = deadline_in(deadline)?;
        if end <= boot_time() {
            return sys::signal_pidfd(container, libc::SIGKILL);
        }
        timer.set(Expiration::OneShot(TimeSpec::from_duration(end)), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        let mut fds = [container, timer.as_fd(), shim].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if ready[0] {
            return Ok(());
        }
        if ready[2] {
            return sys::signal_pidfd(container, libc::SIGKILL);
        }
    }
}

//! The OCI runtime: it makes a container of any valid bundle (runtime-spec 1.2).
//!
//! Two drive it: a shim, for the daemon's containers ([`crate::launch`]), and the command line `moyai oci`, with runc's verbs
//! and flags, for other tools ([`container`]). Both call [`spawn()`], in a process with one thread. For a shim there may be a first
//! process already, that waits for its bundle ([`ahead`]).
//!
//! ```text
//! parent (shim, or `moyai oci create`)        usher                        init
//! takes what is bound in, opens namespaces,
//! raises its limits to what is asked for;
//! is in a network that is joined
//! clone3 ───────────────────────────────────→ (only where other namespaces are joined,
//!                                              or a clock is set)
//!   makes its cgroups                                                        makes its network namespace (with an usher, later)
//!                                 ─────────→ (without an usher, ──────────→) joins its cgroups
//!                                              setns …, clone3 CLONE_PARENT →
//!                                 ←───────── Pid
//!                                 ─────────────────────────────────────────→ (after an usher)
//!                                 ←──────────────────────────────────────── Number (where its filter has a listener)
//!   the number it has here        ─────────────────────────────────────────→
//!   writes uid_map, gid_map       ←──────────────────────────────────────── Map    (new user namespace)
//!                                 ─────────────────────────────────────────→ go on
//!                                                                            settings, mounts, devices
//!   remembers its root's mount    ←──────────────────────────────────────── Mounted (where that is among others' mounts)
//!   prestart, createRuntime hooks ←──────────────────────────────────────── Hooks
//!                                 ─────────────────────────────────────────→ go on
//!                                                                            createContainer hooks, pivot_root, masks
//!                                 ←──────────────────────────────────────── Created (where it waits for `start`)
//!   writes its state down         ─────────────────────────────────────────→ go on
//!                                                                            waits at its gate, a socket
//!                                                                            limits, user
//!                                                                            filter, exec
//!                                 ←──────────────────────────────────────── the end of the channel, or Error
//! ```
//!
//! **Who writes.** The parent alone writes a container's state; init tells it over one channel, and by closing it.
//!
//! **If one dies.** The parent before `Created`: init reads the end of the channel and ends. Init: the parent reads the end
//! of the channel without anything said, reaps it and says so. After `Created` init waits for whoever connects to its gate; if
//! that one dies it goes on, since it was let go; the container's state is what its process is.
//!
//! **Bounds.** One message at a time on the channel, of at most [`spawn::MAX_MESSAGE`] bytes.

mod ahead;
mod config;
mod console;
pub mod container;
mod exec;
mod features;
mod hooks;
mod init;
mod mounts;
mod namespaces;
mod others;
mod process;
mod reaper;
mod relay;
mod rootfs;
mod seal;
mod shift;
mod spawn;
mod trampoline;
mod unambiguous;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

pub(crate) use ahead::{Order, Usual, Waiting, Wish};
pub use config::{Config, ConfigError};
pub(crate) use exec::{Added, add};
pub use features::features;
pub(crate) use process::{highest_limit, missing_capabilities};
pub(crate) use reaper::ANNOTATION as INIT;
pub use relay::Raw;
pub(crate) use relay::receive_fd;
pub(crate) use rootfs::{RootfsError, Step};
pub use seal::seal;
pub(crate) use seal::{environment, mount_read_only, words};
pub(crate) use shift::user_namespace;
pub(crate) use spawn::{Job, Stdio, spawn};

pub use crate::container::Failure;
use crate::sys;

/// Ends this process at once. What was said is flushed; what is registered with atexit(3) and destructors are not run, since what they
/// would put in order goes with the process anyway.
pub fn end(code: u8) -> ! {
    // Nobody may be reading.
    drop(std::io::stdout().flush());
    sys::end(code.into())
}

/// The version of the runtime-spec that this follows.
pub const VERSION: &str = "1.2.1";

/// A terminal's size as a spec has it.
pub(crate) fn terminal_size(rows: u16, columns: u16) -> Option<oci_spec::runtime::Box> {
    oci_spec::runtime::BoxBuilder::default().height(u64::from(rows)).width(u64::from(columns)).build().ok()
}

/// What another machine might be able to do.
pub(crate) fn failure(reason: String) -> Failure {
    Failure { code: 125, machine: true, reason }
}

/// What no machine could do, with the code that a shell has for it.
fn workload(code: i32, reason: String) -> Failure {
    Failure { code, machine: false, reason }
}

/// Ends a child that is not to run after all. It may have ended by itself.
fn kill_and_reap(pidfd: &OwnedFd) {
    drop(sys::signal_pidfd(pidfd.as_fd(), libc::SIGKILL));
    reap(pidfd);
}

/// Waits for a child and says how it ended, as a shell does.
pub(crate) fn reap(pidfd: &OwnedFd) -> i32 {
    loop {
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED) {
            Ok(WaitStatus::Exited(_, code)) => return code,
            Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return 255,
        }
    }
}

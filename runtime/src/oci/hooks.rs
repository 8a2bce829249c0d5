//! Programs that a bundle has run at certain points (runtime-spec config.md, "POSIX-platform Hooks").
//!
//! Each gets the container's state as JSON on its standard input, and nothing of this process's environment. One that fails
//! before the container has started stops it; later ones are warnings (runtime.md, "Lifecycle").

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::Hook;

use super::{Failure, failure};
use crate::sys;

/// Runs the hooks of one point, in their order. Without any nobody asks for the state.
pub(super) fn run(point: &str, hooks: Option<&Vec<Hook>>, state: &dyn Fn() -> Vec<u8>) -> Result<(), Failure> {
    for (at, hook) in hooks.into_iter().flatten().enumerate() {
        run_one(hook, &state())
            .map_err(|reason| failure(format!("hooks.{point}[{at}]: {}: {reason}", hook.path().display())))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<(), String> {
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for entry in hook.env().iter().flatten() {
        if let Some((name, value)) = entry.split_once('=') {
            command.env(name, value);
        }
    }
    // From a file in memory: one that does not read it must not hold this up.
    let stdin = in_memory(state).map_err(|error| format!("cannot be given the state: {error}"))?;
    let mut child = command.stdin(stdin).spawn().map_err(|error| format!("cannot be run: {error}"))?;
    if let Some(seconds) = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()) {
        let pidfd = sys::pidfd_open(child.id() as i32).map_err(|error| error.to_string())?;
        if !ends_within(&pidfd, Duration::from_secs(seconds)) {
            // It may have ended a moment ago.
            drop(child.kill());
            drop(child.wait());
            return Err(format!("killed: it took longer than {seconds} s"));
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("failed with {status}")) }
}

fn in_memory(bytes: &[u8]) -> io::Result<Stdio> {
    let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

fn ends_within(pidfd: &impl AsFd, limit: Duration) -> bool {
    // For longer than any machine runs is without end.
    let until = Instant::now().checked_add(limit).unwrap_or_else(|| Instant::now() + Duration::from_secs(1 << 32));
    loop {
        let left = until.saturating_duration_since(Instant::now()).as_millis().min(i32::MAX as u128);
        let timeout = PollTimeout::try_from(left as i32).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(0) if Instant::now() < until => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

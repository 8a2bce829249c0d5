//! A first process that is not the container's program, but looks after it (`--init`, and a bundle's annotation [`ANNOTATION`]).
//!
//! Process 1 of a PID namespace gets every orphan in it, and no signal that it has no handler for (pid_namespaces(7)); few programs
//! expect either. Here it forks once more: the child becomes the program, and this one waits for whatever ends, gives the program
//! each signal that it gets, and ends with the program's code.
//!
//! It has the program's user, rights and filter, and no descriptor beside the standard three. It stays this program, out of reach as
//! that was until now ([`super::seal()`]), so nothing is put into the container for it.

use std::io;

use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Pid, fork, getpid, setpgid, tcsetpgrp};
use oci_spec::runtime::Spec;

use crate::sys;

/// `true` in a bundle asks for it.
pub(crate) const ANNOTATION: &str = "moyai.init";

/// Whether a bundle asks for it.
pub(super) fn is_wanted(spec: &Spec) -> bool {
    spec.annotations().as_ref().and_then(|all| all.get(ANNOTATION)).is_some_and(|value| value == "true")
}

/// Returns in the child, which is to become the program; the parent stays behind. To be called when all has been given up that the
/// program is not to have, with no signal blocked. On a `terminal` the program is what that listens to.
pub(super) fn stay_behind(terminal: bool) -> io::Result<()> {
    // None is delivered any more, but to whoever waits for it.
    SigSet::all().thread_set_mask()?;
    // SAFETY: this process has one thread, so the child may run any code.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => look_after(child),
        ForkResult::Child => {
            // A group of its own, so that what the terminal sends comes to it once. Whoever touches that from behind is stopped by a
            // signal, which is blocked still.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            if terminal {
                tcsetpgrp(io::stdin(), getpid())?;
            }
            sys::reset_signals();
            Ok(())
        }
    }
}

fn look_after(program: Pid) -> ! {
    // A change of user may have undone it.
    sys::hide_from_others();
    sys::name_process(c"moyai-init");
    sys::close_all_but(&[]);
    loop {
        // A filter may refuse it: then only the end of processes is waited for.
        let signal = sys::wait_for_signal();
        loop {
            match sys::reap(signal.is_err()) {
                Ok(Some((pid, code))) if pid == program => std::process::exit(code),
                Ok(Some(_)) => {}
                Ok(None) => break,
                // Nobody is left, nor the program.
                Err(_) => std::process::exit(1),
            }
        }
        if let Some(signal) = signal.ok().filter(|signal| *signal != libc::SIGCHLD) {
            // It may have become another user's, whom it is not for this one to stop.
            let _refused = sys::signal(program, signal);
        }
    }
}

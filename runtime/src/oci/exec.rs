//! Adding a process to a container that runs: into all its namespaces at once by the pidfd of its first process (setns(2),
//! Linux 5.8), so that none of them can be another's by then.
//!
//! The process that enters is hidden from what runs inside until it has become the program (PR_SET_DUMPABLE,
//! CVE-2016-9962), and has no descriptor of the host open that survives exec (CVE-2024-21626).

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use oci_spec::runtime::Process;

use super::config::owns_mounts;
use super::init::{close_all_but, join_groups, set_oom_score};
use super::namespaces::{KINDS, file_name};
use super::process::{self, Program};
use super::spawn::{Message, Spawned, Stdio, receive, tell};
use super::{Config, Failure, console, failure, reap};
use crate::cgroup::Group;
use crate::sys;

/// What is added, and to what.
pub(crate) struct Added<'a> {
    pub(crate) config: &'a Config,
    pub(crate) process: &'a Process,
    /// Its first process.
    pub(crate) container: (i32, &'a OwnedFd),
    pub(crate) group: &'a Group,
    pub(crate) stdio: Stdio,
    pub(crate) console: Option<&'a UnixStream>,
    pub(crate) preserve: u32,
}

/// Adds it. This process must have one thread.
pub(crate) fn add(added: &Added<'_>) -> Result<Spawned, Failure> {
    let labels = [added.process.apparmor_profile(), added.process.selinux_label()];
    if labels.into_iter().flatten().any(|label| !label.is_empty()) {
        // It would run without; better not at all.
        return Err(failure("a process with an AppArmor profile or SELinux label cannot be added".to_owned()));
    }
    let failed = |error: std::io::Error| failure(format!("cannot add a process: {error}"));
    let (mut mine, its) = UnixStream::pair().map_err(failed)?;
    let mut warnings = process::raise_limits(added.process);
    // SAFETY: by this function's contract there is one thread.
    let usher = match unsafe { sys::clone_into(0) }.map_err(failed)? {
        sys::Cloned::Child => {
            drop(mine);
            enter(added, its)
        }
        sys::Cloned::Parent { pidfd, .. } => pidfd,
    };
    drop(its);
    let mut known = None;
    let result = loop {
        match receive(&mut mine) {
            Ok(Some(Message::Pid(pid))) => match sys::pidfd_open(pid) {
                Ok(pidfd) => known = Some((pid, pidfd)),
                Err(error) => break Err(failed(error)),
            },
            Ok(Some(Message::Warning(text))) => warnings.push(text),
            Ok(Some(Message::Error(error))) => break Err(error),
            Ok(_) if known.is_some() => break Ok(()),
            Ok(_) => break Err(failure("the process died before it could say why".to_owned())),
            Err(error) => break Err(failed(error)),
        }
    };
    reap(&usher);
    Spawned::settle(result, known, warnings)
}

/// Enters the container, and makes the process there as a child of this one's parent.
fn enter(added: &Added<'_>, mut channel: UnixStream) -> ! {
    sys::hide_from_others();
    // SAFETY: a clone of a process with one thread has one thread.
    match move_in(added).map(|()| unsafe { sys::clone_sibling(0) }) {
        Ok(Ok(sys::Cloned::Child)) => {
            // Not before the parent knows its number.
            let error = become_it(added, &mut channel);
            tell(&mut channel, &Message::Error(error));
        }
        Ok(Ok(sys::Cloned::Parent { pid, .. })) => tell(&mut channel, &Message::Pid(pid)),
        Ok(Err(error)) => tell(&mut channel, &Message::Error(failure(format!("cannot make a process: {error}")))),
        Err(error) => tell(&mut channel, &Message::Error(error)),
    }
    std::process::exit(0)
}

/// Has this process be in the container's groups, namespaces and root.
fn move_in(added: &Added<'_>) -> Result<(), Failure> {
    let (pid, pidfd) = added.container;
    process::run_on(added.process, process::INITIAL)?;
    join_groups(added.group.dirs())?;
    process::run_on(added.process, process::FINAL)?;
    // Through the host's /proc; what is left out was told of when the container was made.
    set_oom_score(Some(added.process), Path::new("/proc"))?;
    let kinds = different(pid);
    let root = if owns_mounts(&added.config.spec) { None } else { Some(root_of(pid, pidfd)?) };
    sys::enter_namespaces(pidfd.as_fd(), kinds)
        .map_err(|error| failure(format!("cannot enter the container's namespaces: {error}")))?;
    let enter = |root: &OwnedFd| nix::unistd::fchdir(root).and_then(|()| nix::unistd::chroot("."));
    let entered = root.as_ref().map_or(Ok(()), enter);
    entered.map_err(|error| failure(format!("cannot enter the container's root: {error}")))
}

/// The root of a process: where it has others' mounts, that is not their namespace's.
fn root_of(pid: i32, pidfd: &OwnedFd) -> Result<OwnedFd, Failure> {
    let failed = |error: io::Error| failure(format!("cannot open the container's root: {error}"));
    let path = format!("/proc/{pid}/root");
    let root = nix::fcntl::open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let root = root.map_err(|error| failed(error.into()))?;
    // Another may have got its number; if it lives still, that is its root.
    sys::signal_pidfd(pidfd.as_fd(), 0).map_err(failed)?;
    Ok(root)
}

/// The kinds of namespace in which the container is another one than this process.
fn different(pid: i32) -> u64 {
    let of =
        |pid: &str, kind: u64| fs::metadata(format!("/proc/{pid}/ns/{}", file_name(kind))).map(|meta| meta.ino()).ok();
    let pid = pid.to_string();
    KINDS.into_iter().filter(|kind| of("self", *kind) != of(&pid, *kind)).fold(0, |kinds, kind| kinds | kind)
}

fn become_it(added: &Added<'_>, channel: &mut UnixStream) -> Failure {
    match prepare(added, channel) {
        Ok(program) => program.become_it(added.process, added.config.filter.as_ref(), None, false, &Program::execute),
        Err(error) => error,
    }
}

fn prepare(added: &Added<'_>, channel: &mut UnixStream) -> Result<Program, Failure> {
    let process = added.process;
    sys::own_keyring();
    nix::unistd::setsid().map_err(|error| failure(format!("cannot make a session: {error}")))?;
    added.stdio.pass_on()?;
    if process.terminal().unwrap_or(false) {
        let root = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let root = root.map_err(|error| failure(format!("process.terminal: {error}")))?;
        console::pass(&console::make(process, &root, added.console)?)?;
    }
    close_all_but(added.preserve, [channel.as_raw_fd()].into_iter())?;
    process::set_personality(&added.config.spec)?;
    process::foresee(process).into_iter().for_each(|text| tell(channel, &Message::Warning(text)));
    process::limit(process)?;
    let program = Program::find(process)?;
    program.check(process.cwd())?;
    Ok(program)
}

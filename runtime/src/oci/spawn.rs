//! The parent's part of a start; see [`super`].

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use oci_spec::runtime::{Hook, Hooks};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ahead::Ahead;
use super::init::Init;
use super::namespaces::{self, Namespaces};
use super::others::MountId;
use super::process::{self, Listener, Unstarted};
use super::rootfs::{RootfsError, Sources};
use super::trampoline::Trampoline;
use super::{Config, Failure, failure, hooks, kill_and_reap, reap};
use crate::cgroup::Planned;
use crate::rootless::is_rootless;
use crate::sys;

/// Of one message on the channel.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;

/// Where a program reads and writes.
#[derive(Copy, Clone)]
pub(crate) enum Stdio {
    /// Where this process does.
    Inherit,
    /// Nothing to read, and these to write to.
    Output([RawFd; 2]),
    /// These three.
    Pipes([RawFd; 3]),
}

impl Stdio {
    /// Makes them this process's, which is to be the program.
    pub(super) fn pass_on(self) -> Result<(), Failure> {
        let fds: Vec<(RawFd, RawFd)> = match self {
            Stdio::Inherit => Vec::new(),
            Stdio::Output([output, errors]) => vec![(output, 1), (errors, 2)],
            Stdio::Pipes([input, output, errors]) => vec![(input, 0), (output, 1), (errors, 2)],
        };
        for (fd, to) in fds {
            sys::pass(fd, to).map_err(|error| failure(format!("cannot pass on input and output: {error}")))?;
        }
        Ok(())
    }
}

/// What is to be started.
pub(crate) struct Job<'a> {
    pub(crate) config: &'a Config,
    pub(crate) id: &'a str,
    /// Its cgroup, made when there is a first process, and before that joins it.
    pub(crate) cgroup: &'a Planned<'a>,
    pub(crate) stdio: Stdio,
    /// Where the master of its terminal goes.
    pub(crate) console: Option<&'a UnixStream>,
    /// Where it waits until it is let go; without one it starts at once.
    pub(crate) gate: Option<&'a UnixListener>,
    /// It dies with this process.
    pub(crate) tied: bool,
    /// pivot_root is not possible on an initramfs.
    pub(crate) pivot: bool,
    pub(crate) keyring: bool,
    /// Descriptors after the first three that the program gets.
    pub(crate) preserve: u32,
    /// Who answers its filter's questions, instead of who listens at the path that the bundle names.
    pub(crate) questions: Option<UnixStream>,
    /// What is bound in has no link in its path: it was looked at before, and is not to be another by now.
    pub(crate) plain_sources: bool,
    /// What keeps this program out of its reach, where that is not out of reach itself.
    pub(crate) trampoline: Option<&'a Trampoline>,
    /// Called with its first process when that and its cgroup are there; meanwhile it waits.
    pub(crate) born: Option<&'a Born<'a>>,
    /// Called with its root's mount, where that is among others' mounts ([`super::others`]).
    pub(crate) rooted: Option<&'a Rooted<'a>>,
    /// Mounts its root, in the container's own mount namespace; without it that is there.
    pub(crate) root: Option<&'a MountRoot<'a>>,
    /// What of it is there, in the first process itself.
    pub(crate) ahead: Option<&'a Ahead>,
}

/// What is done with a process that has just been made.
pub(crate) type Born<'a> = dyn Fn(BorrowedFd<'_>) -> Result<(), Failure> + 'a;

/// What is done with a root's mount that has just been made.
pub(crate) type Rooted<'a> = dyn Fn(MountId) -> Result<(), Failure> + 'a;

/// What mounts the root of what is started; it may change the current folder.
pub(crate) type MountRoot<'a> = dyn Fn() -> Result<(), RootfsError> + 'a;

/// What was started.
pub(crate) struct Spawned {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// What could not be done and does not keep it from running.
    pub(crate) warnings: Vec<String>,
    /// Of one that waits at its gate: it opens it when it hears something here, and ends when it does not.
    channel: Option<UnixStream>,
}

impl Spawned {
    /// What was written down: it may wait now.
    pub(crate) fn recorded(&mut self) -> Result<(), Failure> {
        self.channel.take().map_or(Ok(()), |mut channel| go_on(&mut channel))
    }

    /// How a start came out: what was made runs and waits for nothing, or is ended.
    pub(super) fn settle(
        result: Result<(), Failure>,
        known: Option<(i32, OwnedFd)>,
        warnings: Vec<String>,
    ) -> Result<Spawned, Failure> {
        match (result, known) {
            (Ok(()), Some((pid, pidfd))) => Ok(Spawned { pid, pidfd, warnings, channel: None }),
            (Ok(()), None) => Err(failure("it was made, and has no number".to_owned())),
            (Err(error), known) => {
                if let Some((_, pidfd)) = known {
                    kill_and_reap(&pidfd);
                }
                Err(error)
            }
        }
    }
}

/// What init tells.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// The usher has made it, under this number.
    Pid(i32),
    /// What is its number, as the parent sees it? A listener is told.
    Number,
    /// It is in a new user namespace that has no ids yet.
    Map,
    /// Its root is this mount, among others' mounts; it waits until that is written down.
    Mounted(MountId),
    /// Its file system is put together, and not yet entered.
    Hooks,
    /// It waits at its gate, or for its bundle.
    Created,
    /// That bundle asks for what it has not.
    Unsuited,
    /// Something was left out.
    Warning(String),
    /// It ends.
    Error(Failure),
    /// The trampoline could not execute the program; an errno follows, of four bytes.
    Unstarted(Unstarted),
}

/// The state that hooks and listeners are given (runtime-spec runtime.md, "State").
pub(crate) fn state(config: &Config, id: &str, status: &str, pid: i32) -> serde_json::Value {
    let mut state = serde_json::json!({
        "ociVersion": super::VERSION, "id": id, "status": status, "bundle": config.bundle,
        "annotations": config.spec.annotations().clone().unwrap_or_default(),
    });
    if pid > 0 {
        state["pid"] = pid.into();
    }
    state
}

/// Starts it. This process must have one thread.
pub(crate) fn spawn(job: &Job<'_>) -> Result<Spawned, Failure> {
    let config = job.config;
    let spec = &config.spec;
    let namespaces = Namespaces::of(spec)?;
    let own_users = namespaces.all & libc::CLONE_NEWUSER as u64 != 0;
    // Who may not make device nodes binds those of the machine.
    let binds_devices = own_users || is_rootless();
    let sources = Sources::take(spec, &config.bundle, binds_devices, job.plain_sources)
        .map_err(|error| failure(error.to_string()))?;
    let listener = listen(job)?;
    let (mut mine, its) = UnixStream::pair().map_err(|error| failure(format!("cannot make a channel: {error}")))?;
    let kept_limits = spec.process().as_ref().map(process::raise_limits).unwrap_or_default();
    let init = Init { job, namespaces: &namespaces, sources, listener };
    let failed = |error: std::io::Error| failure(format!("cannot make the container's namespaces: {error}"));
    let made = if namespaces.needs_usher() {
        // SAFETY: by this function's contract there is one thread.
        match unsafe { sys::clone_into(0) }.map_err(failed)? {
            sys::Cloned::Child => {
                drop(mine);
                init.usher(its)
            }
            sys::Cloned::Parent { pidfd, .. } => {
                drop((its, init));
                Made::Ushered(pidfd)
            }
        }
    } else {
        let network = namespaces.enter_network()?;
        // SAFETY: as above.
        let cloned = unsafe { sys::clone_into(namespaces.with_clone()) };
        if let Ok(sys::Cloned::Child) = cloned {
            drop(mine);
            init.run(its)
        }
        // Before anything else is started. The first process waits for this one's word.
        let back = network.as_ref().map_or(Ok(()), namespaces::leave_network);
        match cloned.map_err(failed)? {
            sys::Cloned::Child => unreachable!("it goes on elsewhere"),
            sys::Cloned::Parent { pid, pidfd } => {
                drop((its, init));
                back.inspect_err(|_| kill_and_reap(&pidfd))?;
                Made::Known(pid, pidfd)
            }
        }
    };
    let mut spawned = attend(job, &mut mine, made)?;
    spawned.warnings.extend(kept_limits);
    spawned.channel = job.gate.map(|_| mine);
    Ok(spawned)
}

enum Made {
    Known(i32, OwnedFd),
    /// By a process that goes before it.
    Ushered(OwnedFd),
}

/// Answers what init asks until it has become the program, waits at its gate, or has failed.
fn attend(job: &Job<'_>, channel: &mut UnixStream, made: Made) -> Result<Spawned, Failure> {
    let (mut known, usher) = match made {
        Made::Known(pid, pidfd) => (Some((pid, pidfd)), None),
        Made::Ushered(usher) => (None, Some(usher)),
    };
    let mut warnings = job.config.left_out.clone();
    let born = |pidfd: &OwnedFd| job.born.map_or(Ok(()), |born| born(pidfd.as_fd()));
    let grouped = job.cgroup.make().map_err(|error| failure(error.to_string()));
    let grouped = grouped.map(|left_out| warnings.extend(left_out));
    let grouped = grouped.and_then(|()| known.as_ref().map_or(Ok(()), |(_, pidfd)| born(pidfd)));
    let mut begun = grouped.and_then(|()| go_on(channel)).inspect_err(|_| {
        // Whoever waits for it ends.
        drop(channel.shutdown(Shutdown::Both));
    });
    let result = loop {
        if let Err(error) = begun {
            break Err(error);
        }
        let pid = known.as_ref().map_or(0, |(pid, _)| *pid);
        match receive(channel) {
            Ok(Some(Message::Pid(pid))) => match sys::pidfd_open(pid) {
                Ok(pidfd) => {
                    begun = born(&pidfd).and_then(|()| go_on(channel));
                    known = Some((pid, pidfd));
                }
                Err(error) => break Err(failure(format!("the first process is gone already: {error}"))),
            },
            Ok(Some(Message::Number)) => {
                if let Err(error) = channel.write_all(&pid.to_ne_bytes()) {
                    break Err(failure(format!("the first process has ended: {error}")));
                }
            }
            Ok(Some(Message::Map)) => {
                let written = namespaces::write_mappings(&job.config.spec, pid).and_then(|()| go_on(channel));
                if let Err(error) = written {
                    break Err(error);
                }
            }
            Ok(Some(Message::Mounted(mount))) => {
                begun = job.rooted.map_or(Ok(()), |rooted| rooted(mount)).and_then(|()| go_on(channel));
            }
            Ok(Some(Message::Hooks)) => {
                let ran = run_early_hooks(job, pid).and_then(|()| go_on(channel));
                if let Err(error) = ran {
                    break Err(error);
                }
            }
            Ok(Some(Message::Created)) => break Ok(()),
            Ok(Some(Message::Unsuited)) => break Err(failure("the first process wants another bundle".to_owned())),
            Ok(Some(Message::Warning(text))) => warnings.push(text),
            Ok(Some(Message::Error(error))) => break Err(error),
            Ok(Some(Message::Unstarted(program))) => {
                let mut errno = [0; 4];
                // Its four bytes come at once, from one that lives a moment longer than this needs.
                let error = channel.read_exact(&mut errno).err();
                break Err(
                    program.failure(&error.unwrap_or(std::io::Error::from_raw_os_error(i32::from_ne_bytes(errno))))
                );
            }
            Ok(None) if known.is_some() && job.gate.is_none() => break Ok(()),
            Ok(None) => break Err(failure("the process that was to make it died before it could say why".to_owned())),
            Err(error) => break Err(failure(format!("cannot hear from the first process: {error}"))),
        }
    };
    if let Some(usher) = usher {
        reap(&usher);
    }
    Spawned::settle(result, known, warnings)
}

fn go_on(channel: &mut UnixStream) -> Result<(), Failure> {
    channel.write_all(&[0]).map_err(|error| failure(format!("the first process has ended: {error}")))
}

/// prestart and createRuntime: in the runtime's namespaces, when the container's exist.
fn run_early_hooks(job: &Job<'_>, pid: i32) -> Result<(), Failure> {
    let state = |status| state(job.config, job.id, status, pid).to_string().into_bytes();
    let own = job.config.spec.hooks().as_ref();
    // Before there were others it was the last of what is done before the start: so it is told still.
    hooks::run("prestart", own.and_then(prestart), &|| state("created"))?;
    hooks::run("createRuntime", own.and_then(|hooks| hooks.create_runtime().as_ref()), &|| state("creating"))
}

fn prestart(hooks: &Hooks) -> Option<&Vec<Hook>> {
    hooks.prestart().as_ref()
}

/// Whether somebody waits for init to have its file system.
pub(super) fn has_early_hooks(hooks: &Hooks) -> bool {
    [prestart(hooks), hooks.create_runtime().as_ref()].into_iter().flatten().any(|list| !list.is_empty())
}

/// Connects to whoever answers the filter's questions, while its socket's path still means what it says.
fn listen(job: &Job<'_>) -> Result<Option<Listener>, Failure> {
    let profile = job.config.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let asks = job.config.filter.as_ref().is_some_and(|filter| filter.asks);
    let Some((profile, path)) = profile.filter(|_| asks).and_then(|it| Some((it, it.listener_path().as_ref()?))) else {
        return Ok(None);
    };
    let failed = |error| failure(format!("linux.seccomp.listenerPath: {}: {error}", path.display()));
    let socket = match &job.questions {
        Some(socket) => socket.try_clone().map_err(failed)?,
        None => UnixStream::connect(path).map_err(failed)?,
    };
    let state = serde_json::json!({
        "ociVersion": super::VERSION, "fds": ["seccompFd"], "pid": 0,
        "metadata": profile.listener_metadata().clone().unwrap_or_default(),
        "state": state(job.config, job.id, "creating", 0),
    });
    Ok(Some(Listener { socket, state }))
}

/// Says something to the parent. Whoever reads is the parent; when it is gone there is nobody to tell.
pub(super) fn tell(channel: &mut UnixStream, message: &Message) {
    drop(channel.write_all(&framed(message)));
}

/// As it goes over the channel: its length, and JSON.
pub(super) fn framed(message: &impl Serialize) -> Vec<u8> {
    let text = serde_json::to_vec(message).unwrap_or_default();
    let len = (text.len() as u32).to_ne_bytes();
    [&len[..], &text].concat()
}

/// The next message; `None` at the end.
pub(super) fn receive<T: DeserializeOwned>(channel: &mut UnixStream) -> std::io::Result<Option<T>> {
    let mut len = [0; 4];
    match channel.read_exact(&mut len) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let len = u32::from_ne_bytes(len) as usize;
    if len > MAX_MESSAGE {
        return Err(std::io::Error::other(format!("a message of {len} bytes")));
    }
    let mut text = vec![0; len];
    channel.read_exact(&mut text)?;
    serde_json::from_slice(&text).map(Some).map_err(std::io::Error::other)
}

/// Asks the parent for this process's number.
pub(super) fn number(channel: &mut UnixStream) -> Result<i32, Failure> {
    tell(channel, &Message::Number);
    let mut bytes = [0; 4];
    channel.read_exact(&mut bytes).map_err(|error| failure(format!("whoever starts it is gone: {error}")))?;
    Ok(i32::from_ne_bytes(bytes))
}

/// Waits until the parent says so.
pub(super) fn wait(channel: &mut UnixStream) -> Result<(), Failure> {
    channel.read_exact(&mut [0]).map_err(|error| failure(format!("whoever starts it is gone: {error}")))
}

//! The first process inside, until it becomes the container's program; see [`super`].
//!
//! The order matters: cgroups before the cgroup namespace, so that its root is the container's own; what is written to the
//! host's /proc before the root changes, since the image's may be anything (CVE-2025-52881).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use oci_spec::runtime::{Process, Spec};

use super::config::asks_for_mounts;
use super::namespaces::{self, Namespaces};
use super::process::{self, Listener, Program};
use super::rootfs::{Plan, Rootfs, Sources};
use super::spawn::{Job, Message, Stdio, framed, has_early_hooks, number, state, tell, wait};
use super::trampoline::Trampoline;
use super::{Failure, console, failure, hooks, reaper};
use crate::sys;

/// What init is made of.
pub(super) struct Init<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) namespaces: &'a Namespaces,
    pub(super) sources: Sources,
    pub(super) listener: Option<Listener>,
}

impl Init<'_> {
    /// The process that goes before: it enters what exists, and makes init in it as a child of its own parent.
    pub(super) fn usher(self, mut channel: UnixStream) -> ! {
        let spec = &self.job.config.spec;
        // Whoever lives in what is entered is not to look into this one (CVE-2016-9962).
        sys::hide_from_others();
        let entered = self
            .join_made_groups(&mut channel)
            .and_then(|()| {
                if self.namespaces.makes(namespaces::CLONE_NEWTIME as i32) {
                    namespaces::make_time(spec)
                } else {
                    Ok(())
                }
            })
            .and_then(|()| self.namespaces.join());
        if let Err(error) = entered {
            tell(&mut channel, &Message::Error(error));
            std::process::exit(1);
        }
        // SAFETY: a clone of a process with one thread has one thread.
        match unsafe { sys::clone_sibling(self.namespaces.with_clone()) } {
            Ok(sys::Cloned::Child) => self.run(channel),
            Ok(sys::Cloned::Parent { pid, .. }) => {
                tell(&mut channel, &Message::Pid(pid));
                std::process::exit(0)
            }
            Err(error) => {
                tell(
                    &mut channel,
                    &Message::Error(failure(format!("cannot make the container's namespaces: {error}"))),
                );
                std::process::exit(1)
            }
        }
    }

    /// Goes through all steps, and becomes the program.
    pub(super) fn run(mut self, mut channel: UnixStream) -> ! {
        if self.job.tied {
            sys::die_with_parent();
        }
        // The parent learns its number from the usher, and is to know it before anything else that is said.
        if self.namespaces.needs_usher() && wait(&mut channel).is_err() {
            std::process::exit(1);
        }
        let begun = self.begin(&mut channel);
        if begun.is_ok()
            && let Some(listener) = &mut self.listener
            && let Ok(number) = number(&mut channel)
        {
            listener.state["pid"] = number.into();
            listener.state["state"]["pid"] = number.into();
        }
        let error = match begun.and_then(|()| self.prepare(&mut channel)) {
            Ok(program) => {
                if let Some(gate) = self.job.gate {
                    tell(&mut channel, &Message::Created);
                    // Not before it is written down that there is somebody to be started.
                    if wait(&mut channel).is_err() {
                        std::process::exit(1);
                    }
                    drop(channel);
                    self.at_gate(gate, program)
                }
                self.finish(program, Some(&channel))
            }
            Err(error) => error,
        };
        tell(&mut channel, &Message::Error(error));
        std::process::exit(1)
    }

    fn spec(&self) -> &Spec {
        &self.job.config.spec
    }

    /// From the moment at which it is in its namespaces and its cgroups, without a gate; returns only why it did not become the program.
    pub(super) fn go_on(&self, channel: &mut UnixStream) -> Failure {
        match self.prepare(channel) {
            Ok(program) => self.finish(program, Some(channel)),
            Err(error) => error,
        }
    }

    /// Makes its network namespace, without an usher while its parent makes its cgroups; and joins them.
    fn begin(&self, channel: &mut UnixStream) -> Result<(), Failure> {
        let made = if self.namespaces.makes(libc::CLONE_NEWNET) { unshare(CloneFlags::CLONE_NEWNET) } else { Ok(()) };
        // The usher has, and this process with it.
        if !self.namespaces.needs_usher() {
            self.join_made_groups(channel)?;
        }
        // Not before its parent listens.
        made.map_err(|error| failure(format!("cannot make a network namespace: {error}")))
    }

    /// Joins its cgroups when its parent has made them.
    fn join_made_groups(&self, channel: &mut UnixStream) -> Result<(), Failure> {
        wait(channel)?;
        join_groups(self.groups())
    }

    fn groups(&self) -> &[PathBuf] {
        self.job.cgroup.group().dirs()
    }

    /// Everything up to the moment at which the container is created.
    fn prepare(&self, channel: &mut UnixStream) -> Result<Option<Program>, Failure> {
        let spec = self.spec();
        self.sources.enter_proc().map_err(|error| failure(error.to_string()))?;
        // While this is still a process of the host's root.
        if let Some(text) = set_oom_score(spec.process().as_ref(), Path::new(""))? {
            tell(channel, &Message::Warning(text));
        }
        if self.namespaces.makes(libc::CLONE_NEWUSER) {
            tell(channel, &Message::Map);
            wait(channel)?;
        }
        if self.namespaces.all & libc::CLONE_NEWUSER as u64 != 0 {
            become_root()?;
        }
        if self.namespaces.makes(libc::CLONE_NEWCGROUP) && !self.job.ahead.is_some_and(|ahead| ahead.cgroups) {
            unshare(CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| failure(format!("cannot make a cgroup namespace: {error}")))?;
        }
        self.job.stdio.pass_on()?;
        // A session of its own: no terminal of the host's to push characters into (CVE-2016-2568).
        nix::unistd::setsid().map_err(|error| failure(format!("cannot make a session: {error}")))?;
        if self.job.keyring {
            sys::own_keyring();
        }
        if self.namespaces.makes(libc::CLONE_NEWNET) && self.job.ahead.is_none() {
            sys::loopback_up().map_err(|error| failure(format!("cannot bring the loopback device up: {error}")))?;
        }
        if let Some(name) = spec.hostname() {
            nix::unistd::sethostname(name).map_err(|error| failure(format!("hostname: cannot be set: {error}")))?;
        }
        if let Some(name) = spec.domainname() {
            sys::set_domain_name(name).map_err(|error| failure(format!("domainname: cannot be set: {error}")))?;
        }
        self.settle()?;
        self.enter_root(channel)?;
        self.pass_terminal(channel)?;
        let Some(process) = spec.process() else { return Ok(None) };
        process::foresee(process).into_iter().for_each(|text| tell(channel, &Message::Warning(text)));
        let program = Program::find(process)?;
        program.check(process.cwd())?;
        if let Some(trampoline) = self.job.trampoline {
            // While it may write as much as it likes.
            let unstarted = framed(&Message::Unstarted(program.unstarted(process.cwd())));
            let written = trampoline.lead_to(program.path(), channel.as_raw_fd(), &unstarted);
            written.map_err(|error| failure(format!("cannot write a program into memory: {error}")))?;
        }
        if self.job.gate.is_none() {
            self.limits()?;
        }
        Ok(Some(program))
    }

    /// Limits of the program; of one that waits at its gate after that, since the gate needs a descriptor.
    fn limits(&self) -> Result<(), Failure> {
        self.spec().process().as_ref().map_or(Ok(()), process::limit)
    }

    /// What is set through the host's /proc, in which this process is.
    fn settle(&self) -> Result<(), Failure> {
        let spec = self.spec();
        for (name, value) in spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten() {
            let path = Path::new("sys").join(name.replace('.', "/"));
            fs::write(&path, value).map_err(|error| {
                failure(format!("linux.sysctl[{name}]: cannot write /proc/{}: {error}", path.display()))
            })?;
        }
        let process = spec.process().as_ref();
        if let Some(profile) =
            process.and_then(|process| process.apparmor_profile().as_ref()).filter(|it| !it.is_empty())
        {
            let file = Path::new("self/attr/apparmor/exec");
            let file = if file.exists() { file } else { Path::new("self/attr/exec") };
            let enabled =
                fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'));
            if !enabled {
                return Err(failure(format!("process.apparmorProfile: {profile}: this kernel runs without AppArmor")));
            }
            fs::write(file, format!("exec {profile}"))
                .map_err(|error| failure(format!("process.apparmorProfile: {profile}: {error}")))?;
        }
        if let Some(label) = process.and_then(|process| process.selinux_label().as_ref()).filter(|it| !it.is_empty()) {
            if !Path::new("/sys/fs/selinux/enforce").exists() {
                return Err(failure(format!("process.selinuxLabel: {label}: this kernel runs without SELinux")));
            }
            fs::write("self/attr/exec", label)
                .map_err(|error| failure(format!("process.selinuxLabel: {label}: {error}")))?;
        }
        process::set_personality(spec)?;
        Ok(())
    }

    /// Puts the file system together and enters it; hooks run in between.
    fn enter_root(&self, channel: &mut UnixStream) -> Result<(), Failure> {
        let (spec, config) = (self.spec(), self.job.config);
        let all_hooks = spec.hooks().as_ref();
        let early = all_hooks.is_some_and(has_early_hooks);
        let inside = all_hooks.and_then(|hooks| hooks.create_container().as_ref());
        let run_hooks = |channel: &mut UnixStream| {
            if early {
                tell(channel, &Message::Hooks);
                wait(channel)?;
            }
            hooks::run("createContainer", inside, &|| self.state("creating"))
        };
        let owns_mounts = self.namespaces.makes(libc::CLONE_NEWNS);
        if !owns_mounts && !asks_for_mounts(spec) {
            let joined = self.namespaces.all & libc::CLONE_NEWNS as u64 != 0;
            // Not the host's /proc, where this process was.
            let folder = if joined { Path::new("/") } else { &config.root };
            let entered = nix::unistd::chdir(folder);
            entered.map_err(|error| failure(format!("cannot enter {}: {error}", folder.display())))?;
            run_hooks(channel)?;
            if joined {
                return Ok(());
            }
            // With the host's mounts: its files are found by their names from another root.
            return nix::unistd::chroot(&config.root)
                .and_then(|()| nix::unistd::chdir("/"))
                .map_err(|error| failure(format!("cannot enter {}: {error}", config.root.display())));
        }
        let own_cgroups = self.namespaces.makes(libc::CLONE_NEWCGROUP);
        let (root, sources, groups) = (&config.root, &self.sources, self.groups());
        let ahead = self.job.ahead.map(|ahead| &*ahead.trees).unwrap_or_default();
        let plan = Plan { spec, root, mount_root: self.job.root, sources, own_cgroups, groups, owns_mounts, ahead };
        let root = plan.attach().map_err(|error| failure(error.to_string()))?;
        remember(&root, channel).inspect_err(|_| root.detach())?;
        let hidden = plan.fill(&root).map_err(|error| failure(error.to_string()))?;
        nix::unistd::fchdir(root.fd()).map_err(|error| failure(format!("cannot enter its root: {error}")))?;
        run_hooks(channel)?;
        let process = spec.process().as_ref().filter(|process| process.terminal().unwrap_or(false));
        let terminal = process.map(|process| console::make(process, root.fd(), self.job.console)).transpose()?;
        if let Some(terminal) = &terminal {
            root.console(terminal).map_err(|error| failure(error.to_string()))?;
        }
        root.enter(spec, self.job.pivot, &hidden).map_err(|error| failure(error.to_string()))?;
        if let Some(terminal) = terminal {
            console::pass(&terminal)?;
        }
        Ok(())
    }

    /// Input from nowhere, where it has none; and nothing of the host's stays open, to be found by a name below /proc/self/fd.
    fn pass_terminal(&self, channel: &UnixStream) -> Result<(), Failure> {
        if matches!(self.job.stdio, Stdio::Output(_)) {
            // The container's own, made a moment ago: not even a descriptor of the host's devices stays open inside.
            let null = File::open("/dev/null").map_err(|error| failure(format!("cannot open /dev/null: {error}")))?;
            sys::pass(null.as_raw_fd(), 0).map_err(|error| failure(format!("cannot pass on its input: {error}")))?;
        }
        let trampoline = self.job.trampoline.map(Trampoline::number);
        let own = [Some(channel.as_raw_fd()), self.job.gate.map(|gate| gate.as_raw_fd()), trampoline];
        let listener = self.listener.as_ref().map(|listener| listener.socket.as_raw_fd());
        close_all_but(self.job.preserve, own.into_iter().chain([listener]).flatten())
    }

    fn state(&self, status: &str) -> Vec<u8> {
        // As it is numbered inside: a hook that runs here sees no other.
        state(self.job.config, self.job.id, status, std::process::id() as i32).to_string().into_bytes()
    }

    /// From the moment at which it is let go, with the channel if that is open still.
    fn finish(&self, program: Option<Program>, channel: Option<&UnixStream>) -> Failure {
        let spec = self.spec();
        let Some((process, program)) = spec.process().as_ref().zip(program) else {
            return failure("process: missing, so there is nothing to start".to_owned());
        };
        let list = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_ref());
        // They are the image's programs, and have no more rights than its own.
        let wants_init = reaper::is_wanted(spec);
        if wants_init && is_labelled(process) {
            let reason = "process 1 would be without the label that its program gets";
            return failure(format!("annotations[{}]: {reason}", reaper::ANNOTATION));
        }
        let last = |program: &Program| {
            hooks::run("startContainer", list, &|| self.state("created"))?;
            if wants_init {
                let terminal = process.terminal().unwrap_or(false);
                let error = |error| failure(format!("annotations[{}]: cannot fork: {error}", reaper::ANNOTATION));
                reaper::stay_behind(terminal).map_err(error)?;
            }
            match self.job.trampoline.zip(channel) {
                Some((trampoline, channel)) => program.execute_by(trampoline, channel),
                None => program.execute(),
            }
        };
        let filter = self.job.config.filter.as_ref();
        program.become_it(process, filter, self.listener.as_ref(), self.job.tied, &last)
    }

    /// Waits until somebody connects; tells that one why it did not become the program, if it does not.
    fn at_gate(&self, gate: &UnixListener, program: Option<Program>) -> ! {
        if let Ok(mut visitor) = answer_at_gate(gate) {
            let error = self.limits().map_or_else(|error| error, |()| self.finish(program, None));
            tell(&mut visitor, &Message::Error(error));
        }
        std::process::exit(1)
    }
}

/// Where its mount is among others' mounts, the parent is to know it before anything is inside.
fn remember(root: &Rootfs, channel: &mut UnixStream) -> Result<(), Failure> {
    let mount = root.among_others();
    let mount = mount.map_err(|error| failure(format!("cannot tell its root from others' mounts: {error}")))?;
    mount.map_or(Ok(()), |mount| {
        tell(channel, &Message::Mounted(mount));
        wait(channel)
    })
}

/// Whether AppArmor or SELinux is to confine it, which they do from its next exec on.
pub(super) fn is_labelled(process: &Process) -> bool {
    [process.apparmor_profile(), process.selinux_label()].into_iter().flatten().any(|label| !label.is_empty())
}

/// Lets in whoever says that it is to start.
pub(super) fn answer_at_gate(gate: &UnixListener) -> io::Result<UnixStream> {
    loop {
        let (mut visitor, _) = gate.accept()?;
        // One that goes without a word has not let it go.
        if visitor.read_exact(&mut [0]).is_ok() {
            return Ok(visitor);
        }
    }
}

/// Closes what is neither the program's nor one of these, which are closed when it begins.
pub(super) fn close_all_but(preserve: u32, own: impl Iterator<Item = RawFd>) -> Result<(), Failure> {
    let program = (3..3 + preserve).map(|fd| fd as RawFd);
    sys::close_all_but(&program.chain(own).collect::<Vec<_>>());
    sys::close_all_on_exec(3 + preserve).map_err(|error| failure(format!("cannot close what is open: {error}")))
}

/// Sets how soon the kernel kills this process for memory. What it may not set is told.
pub(super) fn set_oom_score(process: Option<&Process>, proc: &Path) -> Result<Option<String>, Failure> {
    let Some(score) = process.and_then(|process| process.oom_score_adj()) else { return Ok(None) };
    let file = proc.join("self/oom_score_adj");
    let now = fs::read_to_string(&file).unwrap_or_default();
    match if now.trim() == score.to_string() { Ok(()) } else { fs::write(&file, score.to_string()) } {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Some(format!(
            "process.oomScoreAdj stays at {}: this process may not lower it (CAP_SYS_RESOURCE)",
            now.trim()
        ))),
        set => set.map(|()| None).map_err(|error| failure(format!("process.oomScoreAdj: cannot be set: {error}"))),
    }
}

/// Joins the groups by writing itself into each.
///
/// On v1 into `tasks`: moving the one thread that writes needs no lock against forks, which `cgroup.procs` takes, and with it
/// an RCU grace period of 10 to 20 ms.
pub(super) fn join_groups(groups: &[PathBuf]) -> Result<(), Failure> {
    for dir in groups {
        let open = |file: &str| File::options().write(true).open(dir.join(file));
        let opened = match open("tasks") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => open("cgroup.procs"),
            opened => opened,
        };
        let joined = opened.and_then(|mut file| file.write_all(b"0"));
        joined.map_err(|error| failure(format!("cannot join the cgroup {}: {error}", dir.display())))?;
    }
    Ok(())
}

/// Becomes the root of a new user namespace, if it has one.
fn become_root() -> Result<(), Failure> {
    let failed = |error| failure(format!("linux.uidMappings: nobody is root in the container: {error}"));
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).map_err(failed)?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).map_err(failed)
}

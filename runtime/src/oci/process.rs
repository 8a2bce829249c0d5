//! What a process in a container is: its program, its limits, its user and rights. The same for the first one and for
//! those that are added to it.
//!
//! The order matters: limits and the bounding set while still privileged; the filter before the change of user when
//! no_new_privs does not allow it to an ordinary one, else last, since it forbids most of what comes before.

use std::collections::HashSet;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{
    Capability, IOPriorityClass, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType,
    Process, Scheduler, Spec,
};
use serde::{Deserialize, Serialize};

use super::trampoline::Trampoline;
use super::{Failure, console, failure, workload};
use crate::rootless::is_rootless;
use crate::seccomp::Filter;
use crate::sys::{self, Processors};

/// The highest capability of Linux 6.18 (CAP_CHECKPOINT_RESTORE), and room for what comes.
const LAST_CAPABILITY: u32 = 63;
/// As much of a script as the kernel looks at (BINPRM_BUF_SIZE).
const HEAD: usize = 256;

/// Where what is added to a container runs, before it has joined the container's cgroup and after that (runtime-spec config.md, "Linux
/// Process").
pub(super) const INITIAL: &str = "execCPUAffinity.initial";
pub(super) const FINAL: &str = "execCPUAffinity.final";

/// What becomes the program.
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Who is asked about calls that a filter puts to a listener, and what it is told first.
pub(super) struct Listener {
    pub(super) socket: UnixStream,
    pub(super) state: serde_json::Value,
}

/// What will be left out, and does not keep it from running.
pub(super) fn foresee(process: &Process) -> Vec<String> {
    let mut left_out = Vec::new();
    let had = sys::bounding_set();
    let sets = process.capabilities().as_ref();
    let mut lacking: Vec<Capability> =
        sets.and_then(|sets| sets.bounding().as_ref()).into_iter().flatten().copied().collect();
    lacking.retain(|capability| had & 1 << number(*capability) == 0);
    lacking.sort_by_key(|capability| number(*capability));
    for capability in lacking {
        left_out.push(format!("process.capabilities: CAP_{capability} left out: this process has not got it"));
    }
    let missing = raisable(process, had).1;
    if !missing.is_empty() {
        let names: Vec<String> = missing.iter().map(|capability| format!("CAP_{capability}")).collect();
        left_out.push(format!(
            "process.capabilities.ambient: {} left out: what is ambient must be permitted and inheritable too",
            names.join(", ")
        ));
    }
    left_out
}

/// The highest hard limit that this process may give; none is any.
pub(crate) fn highest_limit(kind: PosixRlimitType) -> Option<u64> {
    // In a user namespace nobody may (prlimit(2)).
    if is_rootless() || !sys::may_raise_limits() {
        return sys::limits(resource(kind)).ok().map(|(_, hard)| hard);
    }
    // Of descriptors nobody has more (proc_sys_fs(5)).
    let text =
        if kind == PosixRlimitType::RlimitNofile { fs::read_to_string("/proc/sys/fs/nr_open").ok() } else { None };
    text.and_then(|text| text.trim().parse().ok())
}

/// Raises this process's own hard limits to those that a program is to have, whose process inherits them: that may be in a user
/// namespace, and cannot raise them there. What cannot be raised is returned, and the program goes without.
pub(super) fn raise_limits(process: &Process) -> Vec<String> {
    let mut left_out = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let kind = resource(limit.typ());
        let Ok((soft, hard)) = sys::limits(kind) else { continue };
        let most = match highest_limit(limit.typ()) {
            Some(highest) if limit.hard() > highest => highest,
            _ if limit.hard() > hard && sys::set_limit(kind, soft, limit.hard()).is_err() => hard,
            _ => continue,
        };
        left_out.push(format!(
            "process.rlimits: {} stays as it is: this process may not give more than {most}",
            limit.typ()
        ));
    }
    left_out
}

/// Limits and scheduling, but for what [`raise_limits`] has told of.
pub(super) fn limit(process: &Process) -> Result<(), Failure> {
    for limit in process.rlimits().iter().flatten() {
        match sys::set_limit(resource(limit.typ()), limit.soft(), limit.hard()) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            set => set.map_err(|error| failure(format!("process.rlimits: cannot set {}: {error}", limit.typ())))?,
        }
    }
    if let Some(priority) = process.io_priority() {
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let set = sys::set_io_priority(class, priority.priority() as i32);
        set.map_err(|error| failure(format!("process.ioPriority: {error}")))?;
    }
    if let Some(scheduler) = process.scheduler() {
        sys::set_scheduling(&scheduling(scheduler)).map_err(|error| failure(format!("process.scheduler: {error}")))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// The lists of processors that a process which is added has, each with its field's name.
pub(super) fn affinity(process: &Process) -> impl Iterator<Item = (&'static str, &str)> {
    let own = process.exec_cpu_affinity().as_ref();
    let initial = own.and_then(|own| own.initial().as_deref());
    let last = own.and_then(|own| own.cpu_affinity_final().as_deref());
    [(INITIAL, initial), (FINAL, last)].into_iter().filter_map(|(name, list)| Some((name, list?)))
}

/// Has this process run on the processors of that list only, where there is one.
pub(super) fn run_on(process: &Process, name: &str) -> Result<(), Failure> {
    let failed = |reason: String| failure(format!("{name}: {reason}"));
    let Some((_, list)) = affinity(process).find(|(other, _)| *other == name) else { return Ok(()) };
    let set = sys::run_on(&processors(list).map_err(failed)?);
    set.map_err(|error| failed(format!("cannot run on {list}: {error}")))
}

/// The processors of a list like `0-3,7`, or why it is none.
pub(super) fn processors(list: &str) -> Result<Processors, String> {
    let mut all = Processors::default();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number < Processors::MAX);
        let range = number(first).zip(number(last)).filter(|(first, last)| first <= last);
        let none = || format!("`{part}`: neither a processor, 0 to {}, nor a range of them", Processors::MAX - 1);
        let (first, last) = range.ok_or_else(none)?;
        (first..=last).for_each(|processor| all.insert(processor));
    }
    Ok(all)
}

/// The execution domain of the container's processes.
pub(super) fn set_personality(spec: &Spec) -> Result<(), Failure> {
    let Some(personality) = spec.linux().as_ref().and_then(|linux| linux.personality().as_ref()) else { return Ok(()) };
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 0x0008,
    };
    sys::set_personality(domain).map_err(|error| failure(format!("linux.personality: {error}")))
}

/// sched_setattr(2)
fn scheduling(scheduler: &Scheduler) -> sys::Scheduling {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    sys::Scheduling {
        policy: policy as u32,
        flags: scheduler.flags().iter().flatten().fold(0, |flags, one| flags | flag(one)),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).max(0) as u32,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..sys::Scheduling::unset()
    }
}

/// As docker does, a working folder that is missing is made; and entered, unless only its user may.
pub(super) fn enter_workdir(path: &Path) -> Result<bool, Failure> {
    if !path.is_dir() {
        match fs::create_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
            made => made.map_err(|error| no_workdir(path, &error))?,
        }
    }
    match std::env::set_current_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        Err(error) => Err(no_workdir(path, &error)),
    }
}

/// A folder outside of the container's root has no path that begins there (CVE-2024-21626).
fn check_workdir(path: &Path) -> Result<(), Failure> {
    let cwd = std::env::current_dir().map_err(|error| no_workdir(path, &error))?;
    if cwd.starts_with("/") {
        return Ok(());
    }
    Err(no_workdir(path, &io::Error::other("it is outside of the container")))
}

fn no_workdir(path: &Path, error: &io::Error) -> Failure {
    workload(126, format!("cannot enter the working folder {}: {error}", path.display()))
}

impl Program {
    /// Finds it, in the present root.
    pub(super) fn find(process: &Process) -> Result<Program, Failure> {
        let strings = |list: &Option<Vec<String>>| {
            list.iter().flatten().map(|text| CString::new(text.as_str())).collect::<Result<Vec<_>, _>>()
        };
        let nul = |_| workload(125, "an argument or variable has a NUL in it".to_owned());
        let args = strings(process.args()).map_err(nul)?;
        let env = strings(process.env()).map_err(nul)?;
        let name = process.args().iter().flatten().next().cloned().unwrap_or_default();
        let path = if name.contains('/') { PathBuf::from(&name) } else { search(&name, process)? };
        let path = CString::new(path.into_os_string().into_encoded_bytes()).map_err(nul)?;
        Ok(Program { path, args, env })
    }

    /// Whether it is there and may be executed, as far as can be seen before.
    pub(super) fn check(&self, cwd: &Path) -> Result<(), Failure> {
        let name = self.path.to_string_lossy();
        let path = cwd.join(&*name);
        match fs::metadata(&path) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Ok(()),
            Ok(meta) if meta.is_file() => Err(workload(126, format!("`{name}` is in the image and is not executable"))),
            Ok(_) => Err(workload(126, format!("`{name}` is no file"))),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                Err(workload(127, format!("there is no `{name}` in the image")))
            }
            // Its user may see what this process, without rights over its ids, does not.
            Err(_) => Ok(()),
        }
    }

    /// Where it was found, in the root that it was looked for in.
    pub(super) fn path(&self) -> &CStr {
        &self.path
    }

    /// Becomes it; returns only why it could not.
    pub(super) fn execute(&self) -> Result<Infallible, Failure> {
        let error = sys::exec(&self.path, &self.args, &self.env);
        Err(self.unstarted(Path::new("")).failure(&error))
    }

    /// The same by a trampoline that leads to it.
    pub(super) fn execute_by(&self, trampoline: &Trampoline, channel: &UnixStream) -> Result<Infallible, Failure> {
        let error = trampoline.exec(channel.as_raw_fd(), &self.args, &self.env);
        Err(match error.raw_os_error() {
            // As it would be without.
            Some(libc::E2BIG | libc::ENOMEM | libc::EAGAIN) => self.unstarted(Path::new("")).failure(&error),
            _ => failure(format!("cannot execute a program in memory: {error}; `create` and `start` do without")),
        })
    }

    /// What can be said of it should it not be executable.
    pub(super) fn unstarted(&self, cwd: &Path) -> Unstarted {
        let program = self.path.to_string_lossy().into_owned();
        let interpreter = interpreter(&cwd.join(&program));
        Unstarted { program, interpreter }
    }

    /// Gives up what the process is not to have, and becomes it; returns only why it could not.
    /// `tied` is for one that is to die with its parent; `last` is done when it has no more rights than the program, and becomes
    /// the program.
    pub(super) fn become_it(
        self,
        process: &Process,
        filter: Option<&Filter>,
        listener: Option<&Listener>,
        tied: bool,
        last: &dyn Fn(&Program) -> Result<Infallible, Failure>,
    ) -> Failure {
        match self.try_become(process, filter, listener, tied, last) {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn try_become(
        self,
        process: &Process,
        filter: Option<&Filter>,
        listener: Option<&Listener>,
        tied: bool,
        last: &dyn Fn(&Program) -> Result<Infallible, Failure>,
    ) -> Result<Infallible, Failure> {
        let umask = process.user().umask().unwrap_or(0o022);
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
        let entered = enter_workdir(process.cwd())?;
        if entered {
            // Before the filter, which may refuse the call that this takes.
            check_workdir(process.cwd())?;
        }
        own_stdio(process);
        let no_new_privileges = process.no_new_privileges().unwrap_or(false);
        // Not to be looked into, nor its program found, by what runs in the container already.
        sys::hide_from_others();
        if !no_new_privileges {
            // Only now it has the right to.
            install(filter, listener)?;
        }
        become_user(process)?;
        if tied {
            // A change of user has cleared it.
            sys::die_with_parent();
        }
        if !entered {
            std::env::set_current_dir(process.cwd()).map_err(|error| no_workdir(process.cwd(), &error))?;
            check_workdir(process.cwd())?;
        }
        sys::reset_signals();
        if no_new_privileges {
            sys::no_new_privileges().map_err(|error| failure(format!("cannot set no_new_privs: {error}")))?;
            install(filter, listener)?;
        }
        last(&self)
    }
}

fn install(filter: Option<&Filter>, listener: Option<&Listener>) -> Result<(), Failure> {
    let Some(filter) = filter else { return Ok(()) };
    let failed = |error: io::Error| failure(format!("cannot install the system call filter: {error}"));
    let asks = if filter.asks { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER } else { 0 };
    let questions = sys::install_filter(&filter.program, filter.flags | asks).map_err(failed)?;
    if let (Some(questions), Some(listener)) = (questions, listener) {
        console::send_fd(listener.socket.as_fd(), listener.state.to_string().as_bytes(), questions.as_fd())
            .map_err(|error| failure(format!("linux.seccomp.listenerPath: {error}")))?;
    }
    Ok(())
}

/// Standard input and output belong to the process's user, or it could not open them again by name.
fn own_stdio(process: &Process) {
    let user = process.user();
    if user.uid() == 0 {
        return;
    }
    for fd in [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()] {
        let is_file = nix::sys::stat::fstat(fd).is_ok_and(|stat| {
            matches!(stat.st_mode & libc::S_IFMT, libc::S_IFIFO)
                || (stat.st_mode & libc::S_IFMT == libc::S_IFCHR && nix::sys::stat::major(stat.st_rdev) == 136)
        });
        if is_file {
            // One on a file system that does not let itself be owned is used as it is.
            let _refused = nix::unistd::fchown(fd, Some(Uid::from_raw(user.uid())), None);
        }
    }
}

fn search(name: &str, process: &Process) -> Result<PathBuf, Failure> {
    let entries = process.env().iter().flatten();
    let path = entries.filter_map(|entry| entry.strip_prefix("PATH=")).next().unwrap_or("/usr/bin:/bin");
    let mut found_plain = false;
    for folder in path.split(':') {
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        if let Ok(meta) = fs::metadata(&candidate)
            && meta.is_file()
        {
            if meta.permissions().mode() & 0o111 != 0 {
                return Ok(candidate);
            }
            found_plain = true;
        }
    }
    if found_plain {
        return Err(workload(126, format!("`{name}` is in the image and is not executable")));
    }
    Err(workload(127, format!("there is no `{name}` in the image's PATH ({path})")))
}

/// A program that could not be executed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Unstarted {
    program: String,
    /// What it needs to be run, if it is there itself.
    interpreter: Option<String>,
}

impl Unstarted {
    /// Runtimes say "no such file" of a script whose interpreter is missing (runc #1773); here it is named.
    pub(super) fn failure(&self, error: &io::Error) -> Failure {
        let program = &self.program;
        match (error.raw_os_error(), &self.interpreter) {
            (Some(libc::ENOENT), Some(interpreter)) => {
                workload(127, format!("`{program}` is in the image, but its interpreter is not: {interpreter}"))
            }
            (Some(libc::ENOENT), None) => workload(127, format!("there is no `{program}` in the image")),
            (Some(libc::EACCES), _) => workload(126, format!("`{program}` may not be executed: permission denied")),
            (Some(libc::ENOEXEC), _) => workload(126, format!("`{program}` is no program that this machine can run")),
            _ => workload(126, format!("`{program}` cannot be executed: {error}")),
        }
    }
}

/// What the kernel needs to run a program; `None` when that is not there itself.
fn interpreter(path: &Path) -> Option<String> {
    let mut head = [0; HEAD];
    let len = match File::open(path) {
        Ok(mut file) => file.read(&mut head).unwrap_or(0),
        // Not everything that may be executed may be read.
        Err(_) => fs::metadata(path).map(|_| 0).ok()?,
    };
    let line = head[..len].split(|byte| *byte == b'\n').next().unwrap_or_default();
    let script = line.strip_prefix(b"#!").map(|line| String::from_utf8_lossy(line).trim().to_owned());
    Some(script.unwrap_or_else(|| "dynamic loader that it names".to_owned()))
}

fn become_user(process: &Process) -> Result<(), Failure> {
    let user = process.user();
    let sets = process.capabilities().as_ref();
    let mask = |set: Option<&HashSet<Capability>>| {
        set.into_iter().flatten().fold(0u64, |mask, capability| mask | 1 << number(*capability))
    };
    // What this process has not got, it cannot give; `foresee` has told of it.
    let had = sys::bounding_set();
    let mask = |set| mask(set) & had;
    let bounding = mask(sets.and_then(|sets| sets.bounding().as_ref()));
    let permitted = mask(sets.and_then(|sets| sets.permitted().as_ref()));
    let effective = mask(sets.and_then(|sets| sets.effective().as_ref()));
    let inheritable = mask(sets.and_then(|sets| sets.inheritable().as_ref()));
    for capability in (0..=LAST_CAPABILITY).filter(|capability| had & !bounding & (1 << capability) != 0) {
        sys::drop_bounding(capability);
    }
    let failed = |error: nix::errno::Errno| failure(format!("cannot become user {}: {error}", user.uid()));
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    sys::keep_capabilities().map_err(|error| failure(format!("cannot keep capabilities: {error}")))?;
    match setgroups(&groups) {
        // In a user namespace whose groups cannot be changed there are none to give up.
        Err(nix::errno::Errno::EPERM) if groups.is_empty() => {}
        set => set.map_err(failed)?,
    }
    let gid = Gid::from_raw(user.gid());
    setresgid(gid, gid, gid).map_err(failed)?;
    let uid = Uid::from_raw(user.uid());
    setresuid(uid, uid, uid).map_err(failed)?;
    sys::set_capabilities(effective, permitted, inheritable)
        .map_err(|error| failure(format!("process.capabilities: cannot be set: {error}")))?;
    for capability in raisable(process, had).0 {
        sys::raise_ambient(number(capability)).map_err(|error| {
            failure(format!("process.capabilities.ambient: {capability} cannot be raised: {error}"))
        })?;
    }
    Ok(())
}

/// Ambient capabilities that the kernel lets be raised by whoever `had` these, and those that it does not (capabilities(7)).
pub(super) fn raisable(process: &Process, had: u64) -> (Vec<Capability>, Vec<Capability>) {
    let Some(sets) = process.capabilities() else { return (Vec::new(), Vec::new()) };
    let has = |set: &Option<HashSet<Capability>>, one: &Capability| set.as_ref().is_some_and(|set| set.contains(one));
    let mut asked: Vec<Capability> = sets.ambient().iter().flatten().copied().collect();
    asked.sort_by_key(|capability| number(*capability));
    asked.retain(|one| had & 1 << number(*one) != 0);
    asked.into_iter().partition(|one| has(sets.permitted(), one) && has(sets.inheritable(), one))
}

/// The number of a capability: its place in linux/capability.h.
fn number(capability: Capability) -> u32 {
    CAPABILITIES.iter().position(|known| *known == capability).map_or(LAST_CAPABILITY, |at| at as u32)
}

/// Those that nothing that this process starts can have, by name.
pub(crate) fn missing_capabilities() -> Vec<String> {
    let had = sys::bounding_set();
    let names = capability_names().into_iter().enumerate();
    names.filter(|(number, _)| had & 1 << number == 0).map(|(_, name)| name).collect()
}

/// All of them by name.
pub(super) fn capability_names() -> Vec<String> {
    CAPABILITIES
        .iter()
        .map(|capability| serde_json::to_value(capability).ok())
        .filter_map(|name| Some(name?.as_str()?.to_owned()))
        .collect()
}

/// In the order of linux/capability.h.
const CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

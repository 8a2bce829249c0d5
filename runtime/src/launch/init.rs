//! The first process inside, until it becomes the container's program.
//!
//! The order matters: cgroups before the cgroup namespace, so that its root is the container's own; mounts and names
//! while still privileged; the bounding set before the change of user; the filter last, since it forbids most of what
//! came before.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, sethostname, setresgid, setresuid};
use oci_spec::runtime::{Capability, Process, Spec};
use serde::{Deserialize, Serialize};

use super::{rootfs, sys};
use crate::seccomp::Instruction;

/// The highest capability of Linux 6.18 (CAP_CHECKPOINT_RESTORE), and room for what comes.
const LAST_CAPABILITY: u32 = 63;

/// Why the program did not start.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InitError {
    pub(super) code: i32,
    pub(super) machine: bool,
    pub(super) reason: String,
}

/// The filter as the bundle has it.
pub(super) fn parse_filter(bytes: &[u8]) -> Vec<Instruction> {
    let half = |bytes: &[u8]| u16::from_ne_bytes([bytes[0], bytes[1]]);
    let word = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    bytes
        .chunks_exact(8)
        .map(|step| Instruction { code: half(step), jt: step[2], jf: step[3], k: word(&step[4..]) })
        .collect()
}

/// Goes through all steps; returns only why one failed.
pub(super) fn run(spec: &Spec, cgroups: &[PathBuf], filter: &[Instruction], output: [&OwnedFd; 2]) -> InitError {
    match steps(spec, cgroups, filter, output) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn machine(what: &str, error: impl std::fmt::Display) -> InitError {
    InitError { code: 125, machine: true, reason: format!("cannot {what}: {error}") }
}

fn workload(code: i32, reason: String) -> InitError {
    InitError { code, machine: false, reason }
}

fn steps(
    spec: &Spec,
    cgroups: &[PathBuf],
    filter: &[Instruction],
    output: [&OwnedFd; 2],
) -> Result<std::convert::Infallible, InitError> {
    let process = spec.process().as_ref().ok_or_else(|| machine("start", "the spec has no process"))?;
    sys::die_with_parent();
    for dir in cgroups {
        let file = dir.join("cgroup.procs");
        fs::write(&file, "0").map_err(|error| machine(&format!("join {}", file.display()), error))?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP).map_err(|error| machine("make a cgroup namespace", error))?;
    for (fd, to) in [(output[0].as_raw_fd(), 1), (output[1].as_raw_fd(), 2)] {
        pass(fd, to)?;
    }
    // A session of its own: no terminal of the host's to push characters into (CVE-2016-2568).
    nix::unistd::setsid().map_err(|error| machine("make a session", error))?;
    sys::own_keyring();
    sys::loopback_up().map_err(|error| machine("bring the loopback device up", error))?;
    if let Some(name) = spec.hostname() {
        sethostname(name).map_err(|error| machine("set the host name", error))?;
    }
    let bundle = std::env::current_dir().map_err(|error| machine("find the bundle", error))?;
    rootfs::enter(spec, &bundle).map_err(|error| machine("make the file system", error))?;

    // The container's own, made a moment ago: not even a descriptor of the host's devices stays open inside.
    let null = fs::File::open("/dev/null").map_err(|error| machine("open /dev/null", error))?;
    pass(null.as_raw_fd(), 0)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    sys::close_all_on_exec(3).map_err(|error| machine("close what is open", error))?;
    enter_workdir(process.cwd())?;
    let (program, args, env) = command(process)?;
    become_user(process)?;
    // A change of user has cleared it.
    sys::die_with_parent();
    sys::reset_signals();
    sys::no_new_privileges().map_err(|error| machine("set no_new_privs", error))?;
    sys::install_filter(filter).map_err(|error| machine("install the system call filter", error))?;
    let error = sys::exec(&program, &args, &env);
    Err(not_started(&program.to_string_lossy(), &error))
}

/// Makes an open descriptor one of the first three.
fn pass(fd: i32, to: i32) -> Result<(), InitError> {
    // SAFETY: dup2 takes integers; `fd` is open, and 0 to 2 are the shim's own copies of nothing it needs.
    if unsafe { libc::dup2(fd, to) } < 0 {
        return Err(machine("pass on input and output", io::Error::last_os_error()));
    }
    Ok(())
}

/// As docker does, a working folder that is missing is made.
fn enter_workdir(path: &Path) -> Result<(), InitError> {
    let failed =
        |error: io::Error| workload(126, format!("cannot enter the working folder {}: {error}", path.display()));
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(failed)?;
    }
    std::env::set_current_dir(path).map_err(failed)
}

fn command(process: &Process) -> Result<(CString, Vec<CString>, Vec<CString>), InitError> {
    let strings = |list: &Option<Vec<String>>| {
        list.iter().flatten().map(|text| CString::new(text.as_str())).collect::<Result<Vec<_>, _>>()
    };
    let nul = |_| workload(125, "an argument or variable has a NUL in it".to_owned());
    let args = strings(process.args()).map_err(nul)?;
    let env = strings(process.env()).map_err(nul)?;
    let name = process.args().iter().flatten().next().cloned().unwrap_or_default();
    let path = if name.contains('/') { PathBuf::from(&name) } else { search(&name, process)? };
    let program = CString::new(path.into_os_string().into_encoded_bytes()).map_err(nul)?;
    Ok((program, args, env))
}

fn search(name: &str, process: &Process) -> Result<PathBuf, InitError> {
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

/// Runtimes say "no such file" of a script whose interpreter is missing (runc #1773); here it is named.
fn not_started(program: &str, error: &io::Error) -> InitError {
    match error.raw_os_error() {
        Some(libc::ENOENT) if Path::new(program).exists() => {
            let head = fs::read(program).unwrap_or_default();
            let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let interpreter = line.strip_prefix(b"#!").map(|line| String::from_utf8_lossy(line).trim().to_owned());
            let what = interpreter.unwrap_or_else(|| "dynamic loader that it names".to_owned());
            workload(127, format!("`{program}` is in the image, but its interpreter is not: {what}"))
        }
        Some(libc::ENOENT) => workload(127, format!("there is no `{program}` in the image")),
        Some(libc::EACCES) => workload(126, format!("`{program}` may not be executed: permission denied")),
        Some(libc::ENOEXEC) => workload(126, format!("`{program}` is no program that this machine can run")),
        _ => workload(126, format!("`{program}` cannot be executed: {error}")),
    }
}

fn become_user(process: &Process) -> Result<(), InitError> {
    let user = process.user();
    let sets = process.capabilities().as_ref();
    let mask = |set: Option<&std::collections::HashSet<Capability>>| {
        set.into_iter().flatten().fold(0, |mask, capability| mask | 1 << number(*capability))
    };
    let bounding = mask(sets.and_then(|sets| sets.bounding().as_ref()));
    let permitted = mask(sets.and_then(|sets| sets.permitted().as_ref()));
    let effective = mask(sets.and_then(|sets| sets.effective().as_ref()));
    for capability in (0..=LAST_CAPABILITY).filter(|capability| bounding & (1 << capability) == 0) {
        sys::drop_bounding(capability);
    }
    let failed = |error: nix::errno::Errno| machine(&format!("become user {}", user.uid()), error);
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    sys::keep_capabilities().map_err(|error| machine("keep capabilities", error))?;
    setgroups(&groups).map_err(failed)?;
    let gid = Gid::from_raw(user.gid());
    setresgid(gid, gid, gid).map_err(failed)?;
    let uid = Uid::from_raw(user.uid());
    setresuid(uid, uid, uid).map_err(failed)?;
    sys::set_capabilities(effective, permitted, 0).map_err(|error| machine("set capabilities", error))
}

/// linux/capability.h
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

//! Which namespaces a container has of its own, which it shares, and with whom.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use super::{Failure, failure};
use crate::rootless::is_rootless;
use crate::sys;

/// A container's namespaces.
pub(super) struct Namespaces {
    /// Made with its first process: `CLONE_NEW*`. Of cgroups it is made later: its root is then the container's group. Of the network
    /// it is made by that process, which takes as long as all others, beside its parent's work.
    pub(super) new: u64,
    /// Entered by it, in this order.
    pub(super) joined: Vec<(u64, OwnedFd)>,
    /// Those of both kinds.
    pub(super) all: u64,
}

/// `CLONE_NEW*` of a kind.
pub(super) fn flag(kind: LinuxNamespaceType) -> u64 {
    kind as u64
}

/// The file of a kind in /proc/PID/ns.
pub(super) fn file_name(kind: u64) -> &'static str {
    match kind as i32 {
        libc::CLONE_NEWNS => "mnt",
        libc::CLONE_NEWCGROUP => "cgroup",
        libc::CLONE_NEWUTS => "uts",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWUSER => "user",
        libc::CLONE_NEWPID => "pid",
        libc::CLONE_NEWNET => "net",
        _ => "time",
    }
}

/// Every kind.
pub(super) const KINDS: [u64; 8] = [
    libc::CLONE_NEWUSER as u64,
    libc::CLONE_NEWNS as u64,
    libc::CLONE_NEWCGROUP as u64,
    libc::CLONE_NEWUTS as u64,
    libc::CLONE_NEWIPC as u64,
    libc::CLONE_NEWPID as u64,
    libc::CLONE_NEWNET as u64,
    CLONE_NEWTIME,
];
/// Missing in libc for some targets.
pub(super) const CLONE_NEWTIME: u64 = 0x80;

impl Namespaces {
    /// As a spec has them; opens those that exist.
    pub(super) fn of(spec: &Spec) -> Result<Namespaces, Failure> {
        let mut namespaces = Namespaces { new: 0, joined: Vec::new(), all: 0 };
        let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        for (at, namespace) in listed.into_iter().flatten().enumerate() {
            let kind = flag(namespace.typ());
            namespaces.all |= kind;
            let Some(path) = namespace.path() else {
                namespaces.new |= kind;
                continue;
            };
            let file = File::open(path)
                .map_err(|error| failure(format!("linux.namespaces[{at}].path: {}: {error}", path.display())))?;
            namespaces.joined.push((kind, file.into()));
        }
        // A user namespace first: it gives the right to enter the others. A mount namespace last: it changes what paths mean.
        namespaces.joined.sort_by_key(|(kind, _)| match *kind as i32 {
            libc::CLONE_NEWUSER => 0,
            libc::CLONE_NEWNS => 2,
            _ => 1,
        });
        Ok(namespaces)
    }

    /// Whether a kind is made new.
    pub(super) fn makes(&self, kind: i32) -> bool {
        self.new & kind as u64 != 0
    }

    /// What the clone that makes the first process makes with it.
    pub(super) fn with_clone(&self) -> u64 {
        self.new & !(libc::CLONE_NEWCGROUP as u64 | libc::CLONE_NEWNET as u64 | CLONE_NEWTIME)
    }

    /// Whether another process has to go first: to enter what exists, which a process does with its children only, or to set
    /// a new clock, which is set before anybody lives by it. A network alone the parent enters itself while it clones, where it may go
    /// back to its own: that is not its user namespace's, in one of an ordinary user.
    pub(super) fn needs_usher(&self) -> bool {
        let is_entered = |kind: u64| kind == libc::CLONE_NEWNET as u64 && !is_rootless();
        self.joined.iter().any(|(kind, _)| !is_entered(*kind)) || self.new & CLONE_NEWTIME != 0
    }

    /// Where the parent goes back to when it has cloned the first process, after entering what that is to be in.
    pub(super) fn enter_network(&self) -> Result<Option<OwnedFd>, Failure> {
        if self.joined.is_empty() || self.needs_usher() {
            return Ok(None);
        }
        let home = File::open("/proc/self/ns/net");
        let home = home.map_err(|error| failure(format!("cannot find this process's network namespace: {error}")))?;
        self.join().map(|()| Some(home.into()))
    }

    /// Enters those that exist.
    pub(super) fn join(&self) -> Result<(), Failure> {
        for (kind, fd) in &self.joined {
            sys::enter_namespaces(fd.as_fd(), *kind)
                .map_err(|error| failure(format!("cannot enter the {} namespace: {error}", file_name(*kind))))?;
        }
        Ok(())
    }
}

/// Goes back to a network namespace of this process's own.
pub(super) fn leave_network(home: &OwnedFd) -> Result<(), Failure> {
    sys::enter_namespaces(home.as_fd(), libc::CLONE_NEWNET as u64)
        .map_err(|error| failure(format!("cannot go back to the net namespace: {error}")))
}

/// Makes a time namespace for this process's children, whose clocks are off by what the spec says.
pub(super) fn make_time(spec: &Spec) -> Result<(), Failure> {
    let failed = |error: std::io::Error| failure(format!("cannot make a time namespace: {error}"));
    nix::sched::unshare(nix::sched::CloneFlags::from_bits_retain(CLONE_NEWTIME as i32))
        .map_err(|error| failed(error.into()))?;
    let offsets = spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref());
    for (clock, offset) in offsets.into_iter().flatten() {
        let line = format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        let mut file = File::options().write(true).open("/proc/self/timens_offsets").map_err(failed)?;
        file.write_all(line.as_bytes())
            .map_err(|error| failure(format!("linux.timeOffsets.{clock}: cannot be set: {error}")))?;
    }
    Ok(())
}

/// Writes the ids of a new user namespace, as the parent of its first process `pid`.
pub(super) fn write_mappings(spec: &Spec, pid: i32) -> Result<(), Failure> {
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default();
    let gids = linux.and_then(|linux| linux.gid_mappings().as_deref()).unwrap_or_default();
    if let Err(error) = write_map(pid, "gid_map", gids) {
        if !nix::unistd::geteuid().is_root() && gids.len() == 1 {
            // An ordinary user maps its own group alone, and gives up changing groups for it (user_namespaces(7)).
            let deny = std::fs::write(format!("/proc/{pid}/setgroups"), "deny");
            deny.and_then(|()| write_map(pid, "gid_map", gids))
                .map_err(|error| failure(format!("linux.gidMappings: {error}")))?;
        } else {
            run_mapper("newgidmap", pid, gids, &error)?;
        }
    }
    match write_map(pid, "uid_map", uids) {
        Ok(()) => Ok(()),
        Err(error) => run_mapper("newuidmap", pid, uids, &error),
    }
}

/// Writes one table of ids of the process `pid`, which must be in a user namespace that has none yet.
pub(super) fn write_map(pid: i32, file: &str, list: &[LinuxIdMapping]) -> std::io::Result<()> {
    let text: String =
        list.iter().map(|entry| format!("{} {} {}\n", entry.container_id(), entry.host_id(), entry.size())).collect();
    std::fs::write(format!("/proc/{pid}/{file}"), text)
}

/// shadow's helper, which may map what /etc/subuid and /etc/subgid give an ordinary user.
fn run_mapper(program: &str, pid: i32, list: &[LinuxIdMapping], why: &std::io::Error) -> Result<(), Failure> {
    let failed = |reason: String| {
        let name = if program == "newuidmap" { "uidMappings" } else { "gidMappings" };
        failure(format!("linux.{name}: the kernel says: {why}; and {program} says: {reason}"))
    };
    let numbers = list.iter().flat_map(|entry| [entry.container_id(), entry.host_id(), entry.size()]);
    let output = std::process::Command::new(program).arg(pid.to_string()).args(numbers.map(|n| n.to_string())).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

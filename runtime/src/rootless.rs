//! An ordinary user as root of a user namespace (user_namespaces(7)), in which the daemon and its containers live.
//!
//! **States.** A command that starts a daemon becomes, before it does anything else, a child in a namespace in which its user is
//! root and the ids that /etc/subuid and /etc/subgid give that user are the others; without those, root is the only id, and
//! images whose files have other owners cannot be unpacked. The parent waits, and ends as the child does. Containers of an
//! earlier daemon are in its namespace, which nobody but its members may reach into: the next daemon joins it, by whichever shim
//! is still there.
//!
//! **What is not had there**: groups of cgroups, and with them limits; the machine's network to be changed, and with it a bridge
//! and ports; device nodes (those of the machine are bound); ids beyond those given, and with them the strict sandbox.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::oci::reap;
use crate::sys;

/// Whether this process is root of a user namespace that has not all ids.
pub fn is_rootless() -> bool {
    static IS: OnceLock<bool> = OnceLock::new();
    *IS.get_or_init(|| {
        // `inside outside count`: the machine's own namespace has all of 32 bits but the last.
        let text = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let whole = |line: &str| line.split_whitespace().eq(["0", "0", "4294967295"]);
        !text.lines().next().is_none_or(whole)
    })
}

/// Whether there is a group `gid` in this process's user namespace.
pub(crate) fn has_ids(gid: u32) -> bool {
    let text = fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    text.lines().any(|line| {
        let mut numbers = line.split_whitespace().filter_map(|number| number.parse::<u32>().ok());
        let (first, count) = (numbers.next(), numbers.nth(1));
        first.zip(count).is_some_and(|(first, count)| gid >= first && gid - first < count)
    })
}

/// Whether this process is an ordinary user, who is nobody's root yet.
pub fn is_ordinary() -> bool {
    !nix::unistd::geteuid().is_root()
}

/// How a command that was run as root of a namespace ended.
pub struct Ended {
    /// Its exit code, as a shell says it.
    pub code: i32,
}

/// Runs this program again with the same arguments as root of a user namespace, and `env` besides what it has. What could not
/// be had is told to `warn`. The process must have one thread.
pub fn enter(env: &[(&str, &str)], warn: &dyn Fn(&str)) -> io::Result<Ended> {
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).envs(env.iter().copied());
    if let Some(users) = of_a_shim() {
        // The owner of a namespace has every right in it. Its mounts are this process's own from here on.
        sys::enter_namespaces(users.as_fd(), libc::CLONE_NEWUSER as u64)?;
        nix::unistd::setgid(0.into())?;
        nix::unistd::setuid(0.into())?;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        return Err(command.exec());
    }
    let (mut until, mut begin) = io::pipe()?;
    // SAFETY: the caller has one thread.
    match unsafe { sys::clone_into((libc::CLONE_NEWUSER | libc::CLONE_NEWNS) as u64)? } {
        sys::Cloned::Child => {
            drop(begin);
            // Without a byte its ids could not be mapped, and the parent says why.
            if !matches!(until.read(&mut [0]), Ok(1)) {
                std::process::exit(1);
            }
            let became = nix::unistd::setgid(0.into()).and_then(|()| nix::unistd::setuid(0.into()));
            let error = became.map_or_else(io::Error::from, |()| command.exec());
            eprintln!("error: cannot become root of a user namespace: {error}");
            std::process::exit(1)
        }
        sys::Cloned::Parent { pid, pidfd } => {
            drop(until);
            let mapped = map(pid, warn);
            if mapped.is_ok() {
                begin.write_all(&[0])?;
            }
            drop(begin);
            // Keys that stop a command reach both of them, and it is the child's to stop.
            sys::ignore_signals(&[libc::SIGINT, libc::SIGQUIT]);
            let code = reap(&pidfd);
            mapped.map(|()| Ended { code })
        }
    }
}

/// Gives a new namespace its ids.
fn map(pid: i32, warn: &dyn Fn(&str)) -> io::Result<()> {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let ranges = range("/etc/subuid", uid).zip(range("/etc/subgid", uid));
    let Some((uids, gids)) = ranges else {
        warn(
            "/etc/subuid and /etc/subgid give this user no ids: images whose files have other owners than root cannot be used",
        );
        return map_alone(pid, uid, gid);
    };
    let helped = helper("newgidmap", pid, gid, gids).and_then(|()| helper("newuidmap", pid, uid, uids));
    if let Err(error) = helped {
        warn(&format!("{error}: images whose files have other owners than root cannot be used"));
        return map_alone(pid, uid, gid);
    }
    Ok(())
}

/// Root alone, for which no helper is needed; then it cannot change its groups.
fn map_alone(pid: i32, uid: u32, gid: u32) -> io::Result<()> {
    let write = |file: &str, text: String| {
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, text).map_err(|error| io::Error::other(format!("cannot write {path}: {error}")))
    };
    // One that newgidmap wrote is as good.
    if fs::read_to_string(format!("/proc/{pid}/gid_map")).is_ok_and(|map| map.trim().is_empty()) {
        write("setgroups", "deny".to_owned())?;
        write("gid_map", format!("0 {gid} 1\n"))?;
    }
    write("uid_map", format!("0 {uid} 1\n"))
}

/// shadow's helpers, which map what /etc/subuid and /etc/subgid give.
fn helper(program: &str, pid: i32, own: u32, (first, count): (u32, u32)) -> io::Result<()> {
    let numbers = [pid.unsigned_abs(), 0, own, 1, 1, first, count].map(|number| number.to_string());
    let output = Command::new(program).args(numbers).stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| io::Error::other(format!("cannot run {program} (Debian's package uidmap): {error}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// The first range that a file gives a user, by name or number (subuid(5)).
fn range(file: &str, uid: u32) -> Option<(u32, u32)> {
    let name = nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name);
    range_in(&fs::read_to_string(file).ok()?, uid, name.as_deref())
}

fn range_in(text: &str, uid: u32, name: Option<&str>) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut parts = line.trim().split(':');
        let (who, first, count) = (parts.next()?, parts.next()?, parts.next()?);
        let own = Some(who) == name || who.parse() == Ok(uid);
        if own { Some((first.parse().ok()?, count.parse().ok()?)) } else { None }
    })
}

/// The user namespace of a shim of this user, if one is there: containers of an earlier daemon run in it.
fn of_a_shim() -> Option<OwnedFd> {
    let (uid, own) = (nix::unistd::getuid().as_raw(), fs::read_link("/proc/self/ns/user").ok()?);
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    processes
        .filter(|dir| fs::metadata(dir).is_ok_and(|metadata| metadata.uid() == uid))
        .filter(|dir| fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.trim() == "moyai-shim"))
        .map(|dir| dir.join("ns/user"))
        .filter(|path| fs::read_link(path).is_ok_and(|users| users != own))
        .find_map(|path| File::open(path).ok().map(OwnedFd::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_s_ids_are_found_by_name_or_number() {
        let text = "ann:100000:65536\n# ben:1:1\n1001:300000:1000\nben:400000:7\nbroken\ncat:x:1\n";
        assert_eq!(range_in(text, 1000, Some("ann")), Some((100_000, 65_536)));
        assert_eq!(range_in(text, 1001, None), Some((300_000, 1000)));
        assert_eq!(range_in(text, 5, Some("ben")), Some((400_000, 7)));
        assert_eq!(range_in(text, 5, Some("cat")), None);
        assert_eq!(range_in(text, 5, Some("dan")), None);
    }
}

//! How much of its machine's parts a container has, beyond the cores, memory and processes that every workload can ask for.
//!
//! The names, units and meanings are docker's. A node that has no cgroups to hold a container to them with, or not those processors,
//! or may not raise a process limit so far, does not bid on it ([`Offers::lacks`](crate::confinement::Offers::lacks)). What else a
//! machine's kernel may not grant (swap that is not counted) is known there alone, and is as it would be without.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::confinement::plain;
use crate::workload::SpecError;

/// The most limits of disks that a container has.
const MAX_IO_LIMITS: usize = 16;
/// How the disk is called that a node keeps its containers on.
pub const OWN_DISK: &str = ".";
/// The highest number of a processor or a memory node, above what Linux can be built for.
const MAX_NUMBER: u32 = 8191;
/// The most settings of the kernel that a container has, and the longest name or value of one.
const MAX_SYSCTLS: usize = 64;
const MAX_SYSCTL: usize = 256;
/// The least memory that is of use at `/dev/shm`: a page.
const LEAST_SHM: u64 = 4096;
/// The least disk that has room for a file system and something in it, and the most that one can be.
const LEAST_STORAGE: u64 = 16 << 20;
const MOST_STORAGE: u64 = 16 << 40;
/// How much more than the machine's own limits nobody asks for: what `setrlimit` takes for none.
pub const UNLIMITED: u64 = u64::MAX;

/// What a process may have of one thing, by `setrlimit(2)`'s names in small letters and without `RLIMIT_`.
pub const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Settings of the kernel that belong to a container's IPC namespace, beside `fs.mqueue.` and, of its network, `net.`.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// See above; the default is what every container has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Its share of the processors where several want them, 2 to 262,144; none said is 1,024.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u32>,
    /// Processors that it runs on, as a list: `0-3,6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    /// Memory nodes (NUMA) that its memory is of, as a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mems: Option<String>,
    /// Bytes of memory and swap together, -1 for any; none said is as much as its memory, and so no swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_swap: Option<i64>,
    /// Bytes of `/dev/shm`; none said is 64 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shm_size: Option<u64>,
    /// Bytes that its own files may take beyond its image's, on a disk of its own; none said is what its machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<u64>,
    /// What each of its processes may have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ulimits: Vec<Ulimit>,
    /// Settings of the kernel for its namespaces.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
}

/// What a process may have of one thing; [`UNLIMITED`] is any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// One of [`ULIMITS`].
    pub name: String,
    /// What it has.
    pub soft: u64,
    /// What it may raise that to.
    pub hard: u64,
}

impl Limits {
    /// Whether it has what every container has.
    pub fn is_usual(&self) -> bool {
        *self == Limits::default()
    }

    /// Whether it takes what an ordinary user's node has not: cgroups, or a disk.
    pub(crate) fn need_root(&self) -> bool {
        self.storage.is_some()
            || self.cpu_shares.is_some()
            || self.cpus.is_some()
            || self.mems.is_some()
            || self.memory_swap.is_some()
    }

    pub(crate) fn check(&self) -> Result<(), SpecError> {
        let wrong = |what: String, reason: String| Err(SpecError::Limit { what, reason });
        if let Some(shares) = self.cpu_shares.filter(|shares| !(2..=262_144).contains(shares)) {
            return wrong("cpu shares".to_owned(), format!("{shares}: it is 2 to 262144"));
        }
        for (what, list) in [("cpuset cpus", &self.cpus), ("cpuset mems", &self.mems)] {
            if let Some(list) = list.as_ref().filter(|list| numbers(list).is_none()) {
                return wrong(what.to_owned(), format!("`{list}` is no list of numbers like 0-3,6"));
            }
        }
        if let Some(size) = self.shm_size.filter(|size| !(LEAST_SHM..=i64::MAX as u64).contains(size)) {
            return wrong("shm size".to_owned(), format!("{size} bytes: {LEAST_SHM} is the least"));
        }
        if let Some(size) = self.storage.filter(|size| !(LEAST_STORAGE..=MOST_STORAGE).contains(size)) {
            let reason = format!("{size} bytes: {LEAST_STORAGE} is the least, {MOST_STORAGE} the most");
            return wrong("storage size".to_owned(), reason);
        }
        for (at, Ulimit { name, soft, hard }) in self.ulimits.iter().enumerate() {
            let what = || format!("ulimit {}", name.replace('\0', "\\0"));
            if !ULIMITS.contains(&name.as_str()) {
                return wrong(what(), format!("there is none of this name: {}", ULIMITS.join(", ")));
            }
            if soft > hard {
                return wrong(what(), format!("the soft limit, {soft}, is above the hard one, {hard}"));
            }
            if self.ulimits[..at].iter().any(|other| other.name == *name) {
                return wrong(what(), "it is set twice".to_owned());
            }
        }
        if self.sysctls.len() > MAX_SYSCTLS {
            return wrong("sysctls".to_owned(), format!("{}: {MAX_SYSCTLS} at the most", self.sysctls.len()));
        }
        for (name, value) in &self.sysctls {
            let what = || format!("sysctl {}", name.escape_default());
            let word =
                |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || "_-/".contains(c));
            let own =
                IPC_SYSCTLS.contains(&name.as_str()) || ["fs.mqueue.", "net."].iter().any(|it| name.starts_with(it));
            if !own || !name.split('.').all(word) || name.len() > MAX_SYSCTL {
                return wrong(
                    what(),
                    "it is none of those that a container has for itself: net.*, fs.mqueue.*, and of \
                                      kernel.* those of IPC"
                        .to_owned(),
                );
            }
            if value.len() > MAX_SYSCTL || value.contains(char::is_control) {
                return wrong(what(), format!("`{}` is no value of it", value.escape_default()));
            }
        }
        Ok(())
    }

    /// The same where it depends on its memory in bytes, 0 where none was said.
    pub(crate) fn check_with(&self, memory: u64) -> Result<(), SpecError> {
        let wrong = |reason: String| Err(SpecError::Limit { what: "memory swap".to_owned(), reason });
        match self.memory_swap {
            None => Ok(()),
            Some(_) if memory == 0 => wrong("it needs a limit of memory".to_owned()),
            Some(both) if both != -1 && both < memory.min(i64::MAX as u64) as i64 => {
                wrong(format!("{both} bytes: it is memory and swap together, and so at least the memory's {memory}"))
            }
            Some(_) => Ok(()),
        }
    }
}

/// The numbers of a list like `0-3,6` (cpuset(7), "List format"); `None` for what is none.
pub fn numbers(list: &str) -> Option<BTreeSet<u32>> {
    let number = |text: &str| {
        let plain = !text.is_empty() && text.len() <= 4 && text.bytes().all(|digit| digit.is_ascii_digit());
        text.parse::<u32>().ok().filter(|number| plain && *number <= MAX_NUMBER)
    };
    // As much work as each number once, whatever is repeated.
    let (mut all, mut count) = (BTreeSet::new(), 0);
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        count += last.checked_sub(first)? + 1;
        if count > MAX_NUMBER + 1 {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

/// How much of a machine's disks a container has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Io {
    /// Its share where several want a disk, 10 to 1,000; none said is 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// What it has at the most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<IoLimit>,
}

/// What a container may do with one disk at the most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimit {
    /// A disk of the machine below `/dev`, or something the node offers that lies on it; or [`OWN_DISK`].
    pub path: String,
    /// Of what.
    pub kind: IoKind,
    /// How much a second.
    pub rate: u64,
}

/// What of a disk's work is limited.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoKind {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

impl Io {
    /// Whether it has what there is.
    pub fn is_usual(&self) -> bool {
        *self == Io::default()
    }

    pub(crate) fn check(&self) -> Result<(), SpecError> {
        let wrong = |path: &str, reason: String| Err(SpecError::Disk { path: path.to_owned(), reason });
        if let Some(weight) = self.weight.filter(|weight| !(10..=1000).contains(weight)) {
            return wrong("all of them", format!("a share of {weight}: it is 10 to 1000"));
        }
        if self.limits.len() > MAX_IO_LIMITS {
            return wrong("all of them", format!("{} limits: {MAX_IO_LIMITS} at the most", self.limits.len()));
        }
        for IoLimit { path, kind, rate } in &self.limits {
            if path != OWN_DISK && !plain(path) {
                return wrong(
                    &path.replace('\0', "\\0"),
                    format!("a disk is `{OWN_DISK}` or an absolute path without `..`"),
                );
            }
            // Whoever waits for a disk cannot be killed meanwhile, and may keep others waiting for it.
            let (least, most) = match kind {
                IoKind::ReadBytes | IoKind::WriteBytes => (64 << 10, u64::MAX),
                IoKind::Reads | IoKind::Writes => (16, u64::from(u32::MAX)),
            };
            if !(least..=most).contains(rate) {
                return wrong(path, format!("a limit of {rate} a second: {least} is the least, {most} the most"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(limits: &Limits) -> String {
        limits.check().and_then(|()| limits.check_with(0)).expect_err("it is refused").to_string()
    }

    #[test]
    fn lists_are_the_kernels() {
        let list = |text: &str| numbers(text).map(|all| all.into_iter().collect::<Vec<_>>());
        assert_eq!(list("0-3,6"), Some(vec![0, 1, 2, 3, 6]));
        assert_eq!(list("5"), Some(vec![5]));
        assert_eq!(list("0-8191").map(|all| all.len()), Some(8192));
        for bad in ["0-8191,0-8191", "", ",", "0,", "3-1", "-1", "0-", "+1", "a", "0 - 1", "8192", "00000", "0-1-2"] {
            assert_eq!(list(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        let usual = Limits::default;
        let ulimit = |soft, hard| Ulimit { name: "nofile".to_owned(), soft, hard };
        let sysctl = |name: &str, value: &str| Limits {
            sysctls: BTreeMap::from([(name.to_owned(), value.to_owned())]),
            ..usual()
        };
        let cases = [
            (Limits { cpu_shares: Some(1), ..usual() }, "cpu shares: 1: it is 2 to 262144"),
            (Limits { cpus: Some("3-1".to_owned()), ..usual() }, "cpuset cpus: `3-1` is no list"),
            (Limits { storage: Some(1), ..usual() }, "storage size: 1 bytes: 16777216 is the least"),
            (Limits { shm_size: Some(1), ..usual() }, "shm size: 1 bytes: 4096 is the least"),
            (Limits { memory_swap: Some(1), ..usual() }, "memory swap: it needs a limit of memory"),
            (Limits { ulimits: vec![ulimit(2, 1)], ..usual() }, "ulimit nofile: the soft limit, 2, is above"),
            (Limits { ulimits: vec![ulimit(1, 1), ulimit(1, 1)], ..usual() }, "set twice"),
            (sysctl("kernel.panic", "1"), "sysctl kernel.panic: it is none of those"),
            (sysctl("net.../../x", "1"), "none of those"),
            (sysctl("net.core.somaxconn", "1\n2"), "is no value"),
        ];
        for (limits, reason) in cases {
            let told = refused(&limits);
            assert!(told.contains(reason), "{told}");
        }
        let good = Limits {
            cpu_shares: Some(512),
            cpus: Some("0-1".to_owned()),
            memory_swap: Some(-1),
            shm_size: Some(1 << 30),
            ulimits: vec![ulimit(1024, UNLIMITED)],
            ..sysctl("net.ipv4.ip_unprivileged_port_start", "0")
        };
        assert!(good.check().is_ok() && good.check_with(1 << 20).is_ok());
    }
}

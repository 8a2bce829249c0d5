//! Limits on a container's processes, through cgroups-rs, on v2, v1 and hybrid hosts.
//!
//! cgroups-rs takes a hybrid host for v1, which is right for the controllers we set; `auto` decides by what
//! `/sys/fs/cgroup` itself is, and is never overridden: forcing v2 on a hybrid host makes plain folders and says Ok.
//! Processes join by writing `0` to each `cgroup.procs` themselves, before they are anything but a fork of the shim.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cgroups_rs::fs::cgroup::Cgroup;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::hierarchies;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use cgroups_rs::fs::{MaxValue, Subsystem};
use serde::{Deserialize, Serialize};

/// The kernel's usual scheduling period, in microseconds.
const CPU_PERIOD: u64 = 100_000;
/// Controllers that are used where they are mounted.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];

/// What a container may use; zero is no limit.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// Why a limit could not be set up. The group may exist in part; [`Group::delete`] removes it.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The group could not be made.
    #[error("cannot make the cgroup {path}: {reason}")]
    Create {
        /// Below the hierarchies' roots.
        path: String,
        /// What the kernel or the crate said.
        reason: String,
    },
    /// A limit was refused.
    #[error("cannot set {limit} of the cgroup {path}: {reason}")]
    Limit {
        /// Which.
        limit: &'static str,
        /// Below the hierarchies' roots.
        path: String,
        /// What the kernel or the crate said.
        reason: String,
    },
    /// No hierarchy has the controller for a limit that was asked for.
    #[error("this machine has no `{controller}` controller in its cgroups, so {limit} cannot be enforced")]
    NoController {
        /// Which.
        controller: &'static str,
        /// What was asked for.
        limit: &'static str,
    },
}

/// One container's group, in every hierarchy.
pub struct Group {
    path: String,
    inner: Cgroup,
    dirs: Vec<PathBuf>,
}

impl Group {
    /// Makes the group `path` (no leading slash) and sets `limits`.
    pub fn create(path: &str, limits: &Limits) -> Result<Group, CgroupError> {
        let failed = |reason: String| CgroupError::Create { path: path.to_owned(), reason };
        let hierarchy = hierarchies::auto();
        let controllers = available(&*hierarchy);
        let inner = Cgroup::new_with_specified_controllers(hierarchy, path, Some(controllers))
            .map_err(|error| failed(describe(&error)))?;
        let group = Group { path: path.to_owned(), dirs: dirs(&inner), inner };
        if let Some(missing) = group.dirs.iter().find(|dir| !dir.join("cgroup.procs").exists()) {
            return Err(failed(format!("{} is no cgroup", missing.display())));
        }
        group.limit(limits)?;
        Ok(group)
    }

    /// The group `path` as it is.
    pub fn load(path: &str) -> Group {
        let hierarchy = hierarchies::auto();
        let controllers = available(&*hierarchy);
        let inner = Cgroup::load_with_specified_controllers(hierarchy, path, controllers);
        Group { path: path.to_owned(), dirs: dirs(&inner), inner }
    }

    /// The folders whose `cgroup.procs` a process must write itself into.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// How many processes the kernel has killed in it for memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.inner.v2() { "memory.events" } else { "memory.oom_control" };
        self.dirs
            .iter()
            .filter_map(|dir| fs::read_to_string(dir.join(file)).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| line.strip_prefix("oom_kill ").and_then(|count| count.trim().parse().ok()))
            .max()
            .unwrap_or(0)
    }

    /// Removes the group, which must be empty by now, and its children if it made any.
    pub fn delete(&self) -> io::Result<()> {
        let mut result = Ok(());
        for dir in &self.dirs {
            if let Err(error) = remove_tree(dir) {
                result = Err(error);
            }
        }
        result
    }

    fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        let failed = |limit, reason: String| CgroupError::Limit { limit, path: self.path.clone(), reason };
        if limits.memory > 0 {
            let memory: &MemController = self
                .inner
                .controller_of()
                .ok_or(CgroupError::NoController { controller: "memory", limit: "--memory" })?;
            memory.set_limit(limits.memory as i64).map_err(|error| failed("memory", describe(&error)))?;
            // Docker's default allows as much swap again; a limit that a host's swap softens surprises more. Kernels
            // without swap accounting refuse this, and have nothing to limit.
            if let Err(error) = memory.set_memswap_limit(if self.inner.v2() { 0 } else { limits.memory as i64 }) {
                drop(error);
            }
        }
        if limits.cpu_milli > 0 {
            let cpu: &CpuController =
                self.inner.controller_of().ok_or(CgroupError::NoController { controller: "cpu", limit: "--cpus" })?;
            // The kernel takes no quota below a millisecond.
            let quota = (limits.cpu_milli * CPU_PERIOD / 1000).max(1000);
            cpu.set_cfs_quota_and_period(Some(quota as i64), Some(CPU_PERIOD))
                .map_err(|error| failed("cpu", describe(&error)))?;
        }
        if limits.pids > 0 {
            let pids: &PidController = self
                .inner
                .controller_of()
                .ok_or(CgroupError::NoController { controller: "pids", limit: "--pids-limit" })?;
            pids.set_pid_max(MaxValue::Value(limits.pids as i64)).map_err(|error| failed("pids", describe(&error)))?;
        }
        Ok(())
    }
}

fn available(hierarchy: &dyn cgroups_rs::fs::Hierarchy) -> Vec<String> {
    let mounted = hierarchy.subsystems();
    let mounted: Vec<String> = mounted.iter().map(Subsystem::controller_name).collect();
    CONTROLLERS.iter().filter(|name| mounted.iter().any(|have| have == *name)).map(|name| (*name).to_owned()).collect()
}

fn dirs(group: &Cgroup) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> =
        group.subsystems().iter().map(|subsystem| subsystem.to_controller().path().to_owned()).collect();
    dirs.sort();
    dirs.dedup();
    dirs
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn describe(error: &cgroups_rs::fs::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

//! The part of the machine's cgroups that a host takes for all of them.
//!
//! On a v1 or hybrid machine that is one folder in each hierarchy, on a v2 machine one folder in the only one. There a
//! group with controllers for its children may have no processes of its own (cgroups(7), "no internal processes"), and
//! the host's root is no real root: its first process makes the group the root of a cgroup namespace, then moves to a
//! child called `system`, where the host's processes live, as they do below systemd.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";
/// What a v2 group gives to its children, as far as it has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// One host's cgroups.
#[derive(Clone, Debug)]
pub struct Cgroups {
    /// The host's folder in each hierarchy, with what the hierarchy is called.
    dirs: Vec<(String, PathBuf)>,
    v2: bool,
}

impl Cgroups {
    /// The groups called `name`; made by [`Cgroups::create`].
    pub fn new(name: &str) -> Cgroups {
        let v2 = Path::new(ROOT).join("cgroup.controllers").exists();
        let dirs = if v2 {
            vec![("unified".to_owned(), Path::new(ROOT).join(name))]
        } else {
            mounted().into_iter().map(|(kind, dir)| (kind, dir.join(name))).collect()
        };
        assert!(!dirs.is_empty(), "no cgroups are mounted below {ROOT}");
        Cgroups { dirs, v2 }
    }

    /// Makes them.
    pub fn create(&self) {
        for (kind, dir) in &self.dirs {
            let parent = dir.parent().expect("a folder below the root");
            fs::create_dir_all(dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));
            if kind == "cpuset" {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let value = fs::read_to_string(parent.join(file)).unwrap_or_default();
                    put(&dir.join(file), &value);
                }
                put(&dir.join("cgroup.clone_children"), "1");
            }
            if self.v2 {
                let has = fs::read_to_string(parent.join("cgroup.controllers")).expect("a group of v2");
                for name in has.split_whitespace().filter(|name| CONTROLLERS.contains(name)) {
                    put(&parent.join("cgroup.subtree_control"), &format!("+{name}"));
                }
            }
        }
    }

    /// The files that the host's first process writes itself into, before it makes a cgroup namespace.
    pub fn roots(&self) -> Vec<PathBuf> {
        self.dirs.iter().map(|(_, dir)| dir.join("cgroup.procs")).collect()
    }

    /// The files that a process writes itself into to be on the host.
    pub fn entries(&self) -> Vec<PathBuf> {
        let system = if self.v2 { "system/cgroup.procs" } else { "cgroup.procs" };
        self.dirs.iter().map(|(_, dir)| dir.join(system)).collect()
    }

    /// What makes the host's groups the root of all, as shell commands in its mount namespace.
    pub fn mounts(&self) -> String {
        if self.v2 {
            return format!(
                "mount -t cgroup2 cgroup2 {ROOT}; mkdir {ROOT}/system; echo $$ > {ROOT}/system/cgroup.procs
                for name in $(grep -owE '{}' {ROOT}/cgroup.controllers); do
                    echo +$name > {ROOT}/cgroup.subtree_control
                done\n",
                CONTROLLERS.join("|")
            );
        }
        let mut script = format!("mount -t tmpfs tmpfs {ROOT}\n");
        for (kind, _) in &self.dirs {
            let option = if kind == "systemd" { "none,name=systemd" } else { kind };
            script.push_str(&format!("mkdir {ROOT}/{kind}; mount -t cgroup -o {option} cgroup {ROOT}/{kind}\n"));
        }
        script
    }

    /// Every process on the host.
    pub fn processes(&self) -> BTreeSet<u32> {
        let mut found = BTreeSet::new();
        self.dirs.iter().for_each(|(_, dir)| collect(dir, &mut found));
        found
    }

    /// The processes of the groups whose name contains `part`, in the hierarchy that limits memory.
    pub fn processes_of(&self, part: &str) -> BTreeSet<u32> {
        let mut found = BTreeSet::new();
        for dir in self.groups("memory", part) {
            collect(&dir, &mut found);
        }
        found
    }

    /// The value of `file` of the one group whose name contains `part`, in the hierarchy of `controller`.
    #[track_caller]
    pub fn value(&self, controller: &str, part: &str, file: &str) -> String {
        let groups = self.groups(controller, part);
        let [group] = groups.as_slice() else { panic!("not one {controller} cgroup for {part}: {groups:?}") };
        let path = group.join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        text.trim().to_owned()
    }

    /// Whether this machine has cgroup v2 alone.
    pub fn v2(&self) -> bool {
        self.v2
    }

    /// The groups below the host's whose name contains `part`.
    pub fn groups(&self, controller: &str, part: &str) -> Vec<PathBuf> {
        let dir = self.dirs.iter().find(|(kind, _)| self.v2 || kind == controller).map(|(_, dir)| dir.clone());
        let mut found = Vec::new();
        dir.into_iter().for_each(|dir| find(&dir, part, &mut found));
        found
    }

    /// Those of containers, in the hierarchy that limits memory.
    pub fn containers(&self) -> Vec<PathBuf> {
        let is_spare = |dir: &PathBuf| dir.to_string_lossy().contains("moyai-spare-");
        self.groups("memory", "moyai-").into_iter().filter(|dir| !is_spare(dir)).collect()
    }

    /// Removes them, as far as nothing runs in them any more.
    pub fn remove(&self) {
        self.dirs.iter().for_each(|(_, dir)| remove(dir));
    }
}

/// The v1 hierarchies below [`ROOT`]: what they are called, and where they are.
fn mounted() -> Vec<(String, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("read /proc/self/mounts");
    let mut found = Vec::new();
    for line in mounts.lines() {
        let [_, at, kind, ..] = line.split(' ').collect::<Vec<_>>()[..] else {
            continue;
        };
        let at = Path::new(at);
        if kind == "cgroup" && at.parent() == Some(Path::new(ROOT)) {
            let name = at.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, at.to_owned()));
        }
    }
    found
}

fn put(path: &Path, value: &str) {
    fs::write(path, value.trim())
        .unwrap_or_else(|error| panic!("cannot write `{value}` to {}: {error}", path.display()));
}

fn folders(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

fn collect(dir: &Path, found: &mut BTreeSet<u32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    folders(dir).for_each(|below| collect(&below, found));
}

fn find(dir: &Path, part: &str, found: &mut Vec<PathBuf>) {
    for below in folders(dir) {
        if below.file_name().is_some_and(|name| name.to_string_lossy().contains(part)) {
            found.push(below);
        } else {
            find(&below, part, found);
        }
    }
}

fn remove(dir: &Path) {
    folders(dir).for_each(|below| remove(&below));
    let _gone_or_busy = fs::remove_dir(dir);
}

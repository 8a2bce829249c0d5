//! Limits on a container's processes, through cgroups-rs, on v2, v1 and hybrid hosts.
//!
//! cgroups-rs finds the hierarchies and makes the groups of v1; those of v2 we make. It takes a hybrid host for v1, which
//! is right for the controllers we set; `auto` decides by what `/sys/fs/cgroup` itself is, and is never overridden: forcing
//! v2 on a hybrid host makes plain folders and says Ok. What the OCI spec can ask for is more than it has names for:
//! `settings` says which file each field is, in both versions. Processes join by writing `0` to each `cgroup.procs` (v1:
//! `tasks`) themselves, before they are anything but a clone of whoever starts them.

pub(crate) mod devices;
mod settings;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use cgroups_rs::fs::Subsystem;
use cgroups_rs::fs::cgroup::Cgroup;
use cgroups_rs::fs::hierarchies;
use oci_spec::runtime::LinuxResources;

use self::settings::Need;
use crate::rootless::is_rootless;
use crate::sys;

/// Controllers of every container, where v1 has them mounted.
const ALWAYS: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "devices", "freezer"];
/// The same on v2, where devices and freezing need none.
const ALWAYS_V2: [&str; 3] = ["memory", "cpu", "pids"];
const TOP: &str = "/sys/fs/cgroup";

/// Why a limit could not be set up.
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
    #[error("linux.resources.{field}: cannot write `{value}` to {path}: {source}")]
    Limit {
        /// Which field of the spec.
        field: String,
        /// The file of the cgroup.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It has not the controller for a limit that was asked for: no hierarchy has, or a group above does not hand it down.
    #[error(
        "linux.resources.{field}: its cgroup has no `{controller}` controller to enforce it with: this machine has none, or a group \
above does not hand it down"
    )]
    NoController {
        /// Which.
        controller: String,
        /// What was asked for.
        field: String,
    },
    /// Nothing of an ordinary user's container is limited.
    #[error("linux.resources: an ordinary user has no cgroups")]
    Ordinary,
    /// Only the other version of cgroups has it.
    #[error("linux.resources.{field}: only cgroup {has} has it, and this machine's controllers are {own}'s")]
    Other {
        /// What was asked for.
        field: String,
        /// Whose it is.
        has: &'static str,
        /// What there is.
        own: &'static str,
    },
    /// More is in use than is to be allowed. v1 itself refuses what it cannot take back.
    #[error("linux.resources.memory.limit: {limit} bytes, but {used} are in use, and checkBeforeUpdate is set")]
    InUse {
        /// What was asked for.
        limit: i64,
        /// What its processes have.
        used: i64,
    },
    /// The devices could not be limited.
    #[error("linux.resources.devices: {0}")]
    Devices(#[source] io::Error),
}

/// One container's group, in every hierarchy.
pub struct Group {
    v2: bool,
    dirs: Vec<PathBuf>,
}

/// A group that is to be made. Where it will be is known before, so that it can be made beside whoever is to join it.
pub(crate) struct Planned<'a> {
    group: Group,
    path: &'a str,
    resources: Option<&'a LinuxResources>,
    settings: Vec<settings::Setting>,
    /// Of v1.
    inner: Option<Cgroup>,
    /// It was a [`Spare`]: it is there, and the usual devices may be used.
    was_spare: bool,
}

/// A group of v1 that is made before it is known whose it will be. One of v2 has one name for ever (cgroups(7)).
pub(crate) struct Spare(Group);

impl Spare {
    /// One with the controllers of every container, which may use the usual devices. None on v2.
    pub(crate) fn make(name: &str) -> Result<Option<Spare>, CgroupError> {
        let planned = Planned::new(name, None);
        if planned.inner.is_none() {
            return Ok(None);
        }
        // Whoever was of this number before may have left one.
        drop(planned.group.delete());
        if planned.group.dirs.iter().any(|dir| dir.exists()) {
            return Err(CgroupError::Create { path: name.to_owned(), reason: "it is somebody else's".to_owned() });
        }
        match planned.make() {
            Ok(_) => Ok(Some(Spare(planned.group))),
            Err(error) => {
                drop(planned.group.delete());
                Err(error)
            }
        }
    }

    pub(crate) fn group(&self) -> &Group {
        &self.0
    }

    /// Has it become the group `path`, which is not there and lies beside it; where it cannot, it stays what it is.
    pub(crate) fn rename(self, path: &str) -> Result<Group, Spare> {
        let renamed = self.0.renamed(path);
        let names = self.0.dirs.iter().zip(&renamed.dirs);
        for (at, (from, to)) in names.clone().enumerate() {
            if fs::rename(from, to).is_err() {
                names.take(at).for_each(|(from, to)| drop(fs::rename(to, from)));
                return Err(self);
            }
        }
        Ok(renamed)
    }

    /// Removes what was left by whoever had one of a name that begins so and goes on with the number of a process that has ended.
    pub(crate) fn sweep(prefix: &str) {
        let hierarchies = fs::read_dir(TOP).into_iter().flatten().flatten();
        for entry in hierarchies.flat_map(|hierarchy| fs::read_dir(hierarchy.path())).flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<i32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                drop(remove_tree(&entry.path()));
            }
        }
    }
}

impl<'a> Planned<'a> {
    /// The group `path` (no leading slash) with its limits. An ordinary user's containers have none, and no limits.
    pub(crate) fn new(path: &'a str, resources: Option<&'a LinuxResources>) -> Planned<'a> {
        let planned = |v2, dirs, settings, inner| Planned {
            group: Group { v2, dirs },
            path,
            resources,
            settings,
            inner,
            was_spare: false,
        };
        if is_rootless() {
            return planned(false, Vec::new(), settings::of(resources, false), None);
        }
        let hierarchy = hierarchies::auto();
        let v2 = hierarchy.v2();
        let settings = settings::of(resources, v2);
        if v2 {
            return planned(v2, vec![Path::new(TOP).join(path)], settings, None);
        }
        let wanted = ALWAYS.into_iter().chain(settings.iter().map(|setting| setting.controller));
        let controllers = available(&*hierarchy, wanted);
        let inner = Cgroup::load_with_specified_controllers(hierarchy, path, controllers);
        planned(v2, dirs(&inner), settings, Some(inner))
    }

    /// The same, of what was a [`Spare`] and is renamed; none where that lacks a controller.
    pub(crate) fn of_spare(path: &'a str, spare: &Group, resources: Option<&'a LinuxResources>) -> Option<Planned<'a>> {
        let settings = settings::of(resources, spare.v2);
        let group = spare.renamed(path);
        if settings.iter().any(|setting| group.dir(setting.controller).is_none()) {
            return None;
        }
        Some(Planned { group, path, resources, settings, inner: None, was_spare: true })
    }

    /// Makes it and sets its limits, and says which this machine has not. When that fails it may be there in part:
    /// [`Group::delete`] removes it.
    pub(crate) fn make(&self) -> Result<Vec<String>, CgroupError> {
        let group = &self.group;
        if is_rootless() {
            return Ok(left_out_for_user(&self.settings));
        }
        let failed = |reason: String| CgroupError::Create { path: self.path.to_owned(), reason };
        group.refuse_others(&self.settings)?;
        if let Some(inner) = &self.inner {
            inner.create().map_err(|error| failed(describe(&error)))?;
        } else if !self.was_spare {
            let made = group.dirs.iter().try_for_each(|dir| make_v2(dir, &self.settings));
            made.map_err(|error| failed(error.to_string()))?;
        }
        let left_out = group.set_all(&self.settings)?;
        let rules = devices::rules(self.resources.and_then(|it| it.devices().as_deref()).unwrap_or_default());
        if !self.was_spare || rules != devices::rules(&[]) {
            group.limit_devices(&rules)?;
        }
        Ok(left_out)
    }

    /// What it will be, or is in part.
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// What it is.
    pub(crate) fn into_group(self) -> Group {
        self.group
    }
}

impl Group {
    /// The group `path` as it is.
    pub fn load(path: &str) -> Group {
        if is_rootless() {
            return Group { v2: false, dirs: Vec::new() };
        }
        let hierarchy = hierarchies::auto();
        let v2 = hierarchy.v2();
        if v2 {
            let dir = Path::new(TOP).join(path);
            return Group { v2, dirs: Some(dir).filter(|dir| dir.is_dir()).into_iter().collect() };
        }
        let controllers = available(&*hierarchy, ALWAYS.into_iter().chain(settings::CONTROLLERS));
        let inner = Cgroup::load_with_specified_controllers(hierarchy, path, controllers);
        Group { v2, dirs: dirs(&inner).into_iter().filter(|dir| dir.is_dir()).collect() }
    }

    /// The group `path` beside it, with the same controllers.
    fn renamed(&self, path: &str) -> Group {
        Group { v2: self.v2, dirs: self.dirs.iter().map(|dir| dir.with_file_name(path)).collect() }
    }

    /// Gives it another name, on v1, so that a new one may have its own at once: what is left to be deleted. On v2 none.
    pub(crate) fn set_aside(&self, name: &str) -> Option<Group> {
        if self.v2 || self.dirs.is_empty() {
            return None;
        }
        Spare(Group { v2: self.v2, dirs: self.dirs.clone() }).rename(name).ok()
    }

    /// Changes the limits of a group that exists, and says which this machine has not.
    pub fn update(&self, resources: &LinuxResources) -> Result<Vec<String>, CgroupError> {
        if is_rootless() {
            return Err(CgroupError::Ordinary);
        }
        let memory = resources.memory().filter(|memory| memory.check_before_update().unwrap_or(false));
        if let Some(limit) = memory.and_then(|memory| memory.limit()).filter(|limit| self.v2 && *limit > 0) {
            let used = self.read("memory", "memory.current").and_then(|text| text.trim().parse().ok());
            if let Some(used) = used.filter(|used| *used > limit) {
                return Err(CgroupError::InUse { limit, used });
            }
        }
        let settings = settings::of(Some(resources), self.v2);
        self.refuse_others(&settings)?;
        if let Some(dir) = self.dirs.first().filter(|_| self.v2) {
            // What nothing has needed before. Where it does not work, the limit itself says so.
            let wanted: Vec<&str> = settings.iter().map(|setting| setting.hierarchy()).collect();
            let above: Vec<&Path> = dir.ancestors().skip(1).take_while(|above| above.starts_with(TOP)).collect();
            above.into_iter().rev().for_each(|above| drop(hand_down(above, &wanted)));
        }
        self.set_all(&settings)
    }

    /// The folders whose `cgroup.procs` a process must write itself into.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Whether this machine has one tree for all controllers.
    pub fn is_v2(&self) -> bool {
        self.v2
    }

    /// How many processes the kernel has killed in it for memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        let text = self.read("memory", file).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        count.unwrap_or(0)
    }

    /// Stops all its processes where they are, or lets them go on.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let (file, value) = match (self.v2, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        let dir = self.dir("freezer").ok_or_else(|| io::Error::other("this machine has no freezer in its cgroups"))?;
        fs::write(dir.join(file), value)
    }

    /// Puts this process into it.
    pub fn join(&self) -> io::Result<()> {
        self.dirs.iter().try_for_each(|dir| fs::write(dir.join("cgroup.procs"), "0"))
    }

    /// Whether they are stopped, or being stopped.
    pub fn is_frozen(&self) -> bool {
        match self.v2 {
            true => self.read("freezer", "cgroup.freeze").is_some_and(|text| text.trim() == "1"),
            false => self.read("freezer", "freezer.state").is_some_and(|text| text.trim() != "THAWED"),
        }
    }

    /// Kills every process in it, again and again until none is left; whether none is.
    pub fn kill(&self) -> bool {
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                return true;
            }
            // On v1 what is frozen does not die.
            drop(self.freeze(false));
            for pid in left {
                // It may have ended a moment ago, and another have its number by now: not in the time between these calls.
                drop(sys::pidfd_open(pid).and_then(|pidfd| sys::signal_pidfd(pidfd.as_fd(), libc::SIGKILL)));
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        false
    }

    /// Every process in it, and in groups below it.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        if let Some(dir) = self.dirs.first() {
            collect(dir, &mut pids);
        }
        pids
    }

    /// What a file of a controller says.
    pub fn read(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.dir(controller)?.join(file)).ok()
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

    /// The same, when its last process died a moment ago: until the kernel has cleared that away the group is busy.
    pub fn delete_soon(&self) -> io::Result<()> {
        for _ in 0..100 {
            match self.delete() {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                result => return result,
            }
        }
        self.delete()
    }

    /// The folder in the hierarchy of a controller.
    fn dir(&self, controller: &str) -> Option<&Path> {
        if self.v2 {
            return self.dirs.first().map(PathBuf::as_path);
        }
        let of = |dir: &&PathBuf| {
            let hierarchy = dir.strip_prefix("/sys/fs/cgroup").ok().and_then(|path| path.iter().next());
            // Several controllers may share one: `cpu,cpuacct`.
            hierarchy.is_some_and(|name| name.to_string_lossy().split(',').any(|part| part == controller))
        };
        self.dirs.iter().find(of).map(PathBuf::as_path)
    }

    /// Refuses what only the other version of cgroups has, before anything is changed.
    fn refuse_others(&self, settings: &[settings::Setting]) -> Result<(), CgroupError> {
        let Some(other) = settings.iter().find(|setting| setting.need == Need::Other) else { return Ok(()) };
        let (has, own) = if self.v2 { ("v1", "v2") } else { ("v2", "v1") };
        Err(CgroupError::Other { field: other.field.clone(), has, own })
    }

    /// Sets them, and says which optional ones this machine has not.
    fn set_all(&self, settings: &[settings::Setting]) -> Result<Vec<String>, CgroupError> {
        let mut done = Vec::new();
        let mut left_out: Vec<(&settings::Setting, String)> = Vec::new();
        for setting in settings {
            match self.set(setting)? {
                None => done.push(&setting.field),
                Some(reason) if setting.limits() => left_out.push((setting, reason)),
                Some(_) => {}
            }
        }
        // Of files that mean the same one is enough.
        left_out.retain(|(setting, _)| !done.contains(&&setting.field));
        left_out.dedup_by_key(|(setting, _)| &setting.field);
        Ok(left_out.into_iter().map(|(setting, reason)| setting.left_out(&reason)).collect())
    }

    /// Sets it; if it is optional, and this machine has it not, says why.
    fn set(&self, setting: &settings::Setting) -> Result<Option<String>, CgroupError> {
        let field = setting.field.clone();
        let no_controller = |name: &str| match setting.need {
            Need::May => Ok(Some(format!("its cgroup has no `{name}` controller"))),
            _ => Err(CgroupError::NoController { controller: name.to_owned(), field: setting.field.clone() }),
        };
        let Some(dir) = self.dir(setting.controller) else { return no_controller(setting.controller) };
        let path = dir.join(&setting.file);
        if setting.controller == "cpuset" && !self.v2 {
            // A new group of v1 has no processors and no memory at all, and neither may those above it.
            settings::inherit_cpuset(dir);
        }
        match write_existing(&path, &setting.value) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.lacks(setting.hierarchy()) => {
                no_controller(setting.hierarchy())
            }
            // Kernels without swap accounting, or without that scheduler for block devices.
            Err(error) if setting.need == Need::May && error.kind() == io::ErrorKind::NotFound => {
                Ok(Some(format!("this kernel has no {}", setting.file)))
            }
            Err(error) if setting.need == Need::May && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Ok(Some(format!("{}: {error}", setting.file)))
            }
            Err(source) => Err(CgroupError::Limit { field, path, value: setting.value.clone(), source }),
        }
    }

    /// Whether a controller of v2 is not handed down to it, because the machine has none or a group above keeps it.
    fn lacks(&self, controller: &str) -> bool {
        let has = |dir: &Path| controllers(dir).is_ok_and(|names| names.iter().any(|have| have == controller));
        // What begins so is no controller's.
        self.v2 && controller != "cgroup" && !self.dirs.first().is_some_and(|dir| has(dir))
    }

    fn limit_devices(&self, rules: &[devices::Rule]) -> Result<(), CgroupError> {
        let Some(dir) = self.dir("devices") else { return Ok(()) };
        let limited = if self.v2 { devices::attach(dir, rules) } else { devices::write(dir, rules) };
        limited.map_err(CgroupError::Devices)
    }
}

/// Controllers, by their names in v2, that some workloads ask for and none can have on this machine.
pub(crate) fn missing() -> Vec<&'static str> {
    // An ordinary user's containers have none at all.
    if is_rootless() {
        return Vec::new();
    }
    let hierarchy = hierarchies::auto();
    let v2 = hierarchy.v2();
    let has = if v2 {
        controllers(Path::new(TOP)).unwrap_or_default()
    } else {
        available(&*hierarchy, settings::CONTROLLERS.into_iter())
    };
    // By their names in v2 and v1.
    let asked_for = [("cpuset", "cpuset"), ("io", "blkio")];
    let is_there = |(name, v1): &(&str, &str)| has.iter().any(|have| have == if v2 { name } else { v1 });
    asked_for.into_iter().filter(|names| !is_there(names)).map(|(name, _)| name).collect()
}

/// The controllers that a group of v2 has.
fn controllers(dir: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(dir.join("cgroup.controllers"))?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// What an ordinary user's containers lose: they have no groups.
fn left_out_for_user(settings: &[settings::Setting]) -> Vec<String> {
    let lost = settings.iter().filter(|setting| setting.limits());
    let mut left_out: Vec<String> = lost.map(|setting| setting.left_out("an ordinary user has no cgroups")).collect();
    left_out.dedup();
    left_out
}

/// Writes to a file that is there: the kernel's folders let none be made, and say so in another way than "not found".
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    io::Write::write_all(&mut fs::File::options().write(true).open(path)?, value.as_bytes())
}

/// Makes a group of v2, with the controllers that its limits need handed down to it. cgroups-rs takes the freezer for a
/// controller there, and refuses what has none.
fn make_v2(dir: &Path, settings: &[settings::Setting]) -> io::Result<()> {
    let mut wanted: Vec<&str> =
        ALWAYS_V2.into_iter().chain(settings.iter().map(|setting| setting.hierarchy())).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut at = PathBuf::from(TOP);
    for part in dir.strip_prefix(TOP).unwrap_or(dir) {
        hand_down(&at, &wanted)?;
        at.push(part);
        match fs::create_dir(&at) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    Ok(())
}

/// Lets the groups below one of v2 have these controllers.
fn hand_down(from: &Path, wanted: &[&str]) -> io::Result<()> {
    let there = controllers(from)?;
    for name in wanted.iter().filter(|name| there.iter().any(|have| have == **name)) {
        // Where it is handed down already, or cannot be because processes sit there, the limit itself says so.
        drop(write_existing(&from.join("cgroup.subtree_control"), &format!("+{name}")));
    }
    Ok(())
}

fn collect(dir: &Path, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids);
        }
    }
}

fn available<'a>(hierarchy: &dyn cgroups_rs::fs::Hierarchy, wanted: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mounted = hierarchy.subsystems();
    let mounted: Vec<String> = mounted.iter().map(Subsystem::controller_name).collect();
    let mut names: Vec<String> =
        wanted.filter(|name| mounted.iter().any(|have| have == name)).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

fn dirs(group: &Cgroup) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> =
        group.subsystems().iter().map(|subsystem| subsystem.to_controller().path().to_owned()).collect();
    dirs.sort();
    dirs.dedup();
    dirs
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    // Nearly always it has none below it.
    if fs::remove_dir(dir).is_ok() {
        return Ok(());
    }
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

//! A bundle's `config.json`, checked: what cannot be carried out is refused before anything is made, with the field's path.
//!
//! What a field refers to outside (files, groups, namespaces) is looked at when it is used, not here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use nix::mount::MsFlags;
use oci_spec::runtime::{
    Capability, Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, LinuxSeccompAction,
    Mount, Process, Spec,
};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use super::mounts;
use super::process::{affinity, processors};
use super::trampoline::Trampoline;
use super::unambiguous::Unambiguous;
use crate::seccomp::{Filter, FilterError, Kept, filter_of, known};

/// Where a spec has its process.
const IN_SPEC: &str = "process.";
/// A `config.json` is read whole; no sane one comes near this.
const MAX_CONFIG: u64 = 16 << 20;
/// Kinds of namespace that settings belong to.
const IPC_SETTINGS: [&str; 9] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.shm_next_id",
];

/// Why a bundle cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not what the specification says.
    #[error("{path}: {field}: {reason}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        field: String,
        /// What the parser said.
        reason: String,
    },
    /// A field that cannot be carried out.
    #[error("{field}: {reason}")]
    Field {
        /// Its path.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The system call filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

/// A bundle that can be run.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it says; without the system call filter where that was compiled before, which then lets all pass that a start's
    /// [`Trampoline`] calls: no other is kept.
    pub spec: Spec,
    /// Its folder, absolute.
    pub bundle: PathBuf,
    /// Its root file system, absolute.
    pub root: PathBuf,
    /// Its system call filter, compiled.
    pub filter: Option<Filter>,
    /// What it asks for in vain, in words.
    pub left_out: Vec<String>,
}

impl Config {
    /// Reads and checks the bundle in `bundle`.
    pub fn load(bundle: &Path) -> Result<Config, ConfigError> {
        Config::load_with(bundle, None)
    }

    /// The same, of a runtime that keeps filters.
    pub(super) fn load_with(bundle: &Path, kept: Option<&Kept>) -> Result<Config, ConfigError> {
        let bundle =
            fs::canonicalize(bundle).map_err(|source| ConfigError::Read { path: bundle.to_owned(), source })?;
        let path = bundle.join("config.json");
        let text = read(&path)?;
        Config::parse(&text, &path, bundle, kept)
    }

    /// The bundle in `bundle` of a container that runs: its root file system is out of sight, in a mount namespace.
    pub(crate) fn load_started(bundle: &Path) -> Result<Config, ConfigError> {
        Config::load_started_with(bundle, None)
    }

    /// The same, of a runtime that keeps filters.
    pub(super) fn load_started_with(bundle: &Path, kept: Option<&Kept>) -> Result<Config, ConfigError> {
        let path = bundle.join("config.json");
        let text = read(&path)?;
        let (spec, filter) =
            match parse_known(&text, kept) {
                Some((spec, _, filter)) => (spec, Some(filter)),
                None => {
                    let (spec, _) = parse::<Spec>(&text, IN_SPEC)
                        .map_err(|(field, reason)| ConfigError::Malformed { path, field, reason })?;
                    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
                    let filter = profile.map(filter_of).transpose()?;
                    (spec, filter)
                }
            };
        Ok(Config { spec, bundle: bundle.to_owned(), root: PathBuf::new(), filter, left_out: Vec::new() })
    }

    /// The same of a text that was read from `path`.
    fn parse(text: &[u8], path: &Path, bundle: PathBuf, kept: Option<&Kept>) -> Result<Config, ConfigError> {
        let parsed = match parse_known(text, kept) {
            Some((spec, left_out, filter)) => Ok((spec, left_out, Some(filter))),
            None => parse(text, IN_SPEC).map(|(spec, left_out)| (spec, left_out, None)),
        };
        let (spec, left_out, known) = parsed.map_err(|(field, reason)| {
            let field = if field == "." { "the top".to_owned() } else { field };
            ConfigError::Malformed { path: path.to_owned(), field, reason }
        })?;
        check(&spec)?;
        let root = spec.root().as_ref().map(|root| bundle.join(root.path())).unwrap_or_default();
        let root = fs::canonicalize(&root)
            .map_err(|error| field("root.path", format!("cannot find {}: {error}", root.display())))?;
        if !root.is_dir() {
            return Err(field("root.path", format!("{} is no folder", root.display())));
        }
        let mut left_out = left_out;
        if mounts_among_others(&spec) {
            if root == Path::new("/") {
                let reason =
                    "the machine's own, and linux.namespaces has no new mount: what is mounted would be the machine's";
                return Err(field("root.path", reason));
            }
            let reason =
                "linux.namespaces: no new mount: what is masked or read-only binds nobody who may change his root";
            left_out.push(reason.to_owned());
        }
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        let filter = if known.is_some() { known } else { profile.map(filter_of).transpose()? };
        if let (Some(kept), Some(profile), Some(filter)) = (kept, profile, &filter)
            && Trampoline::is_let_pass(profile)
        {
            // For whoever comes next; this one has it already. By the text that it was read from, and by no other.
            let is_its = |text: &str| serde_json::from_str(text).is_ok_and(|read| profile == &read);
            let _kept = profile_in(text).and_then(|text| kept.keep(text, filter, || is_its(text)));
        }
        Ok(Config { spec, bundle, root, filter, left_out })
    }
}

/// A spec whose system call filter need not be compiled, which is read as if it had none, and what was left out of it; nothing if
/// that is not so, or if something is wrong with it.
pub(super) fn parse_known(text: &[u8], kept: Option<&Kept>) -> Option<(Spec, Vec<String>, Filter)> {
    // In no profile that is compiled: it takes the place of the known one, to see that it is read as that and as nothing else.
    const PLACE: &[u8] = br#"{"defaultAction":"SCMP_ACT_TRACE","defaultErrnoRet":4294967295}"#;
    let profile = profile_in(text)?;
    let filter = known(profile, kept)?;
    let start = profile.as_ptr().addr() - text.as_ptr().addr();
    let short = [&text[..start], PLACE, &text[start + profile.len()..]].concat();
    let (mut spec, left_out) = parse::<Spec>(&short, IN_SPEC).ok()?;
    let seccomp = spec.linux_mut().as_mut()?.seccomp_mut().take()?;
    let is_it = seccomp.default_action() == LinuxSeccompAction::ScmpActTrace
        && seccomp.default_errno_ret() == Some(u32::MAX)
        && seccomp.syscalls().is_none();
    is_it.then_some((spec, left_out, filter))
}

/// The text of a bundle's system call filter, within the bundle's; nothing if a key beside it is written with escapes.
fn profile_in(text: &[u8]) -> Option<&str> {
    #[derive(Deserialize)]
    struct Outline<'a> {
        #[serde(borrow)]
        linux: BTreeMap<&'a str, IgnoredAny>,
    }
    let outline = serde_json::from_slice::<Outline<'_>>(text).ok()?;
    let (key, _) = outline.linux.get_key_value("seccomp")?;
    // A key is a part of the text: behind it come a quote, a colon, and what it names.
    let behind = &text[key.as_ptr().addr() + key.len() - text.as_ptr().addr()..];
    let behind = behind.strip_prefix(b"\"")?.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    let mut documents = serde_json::Deserializer::from_slice(behind).into_iter::<IgnoredAny>();
    documents.next()?.ok()?;
    std::str::from_utf8(&behind[..documents.byte_offset()]).ok()
}

/// Reads a document, takes out of its process what is no error there, unknown capabilities and empty lists of processors, and returns
/// warnings of it; or the field that is wrong, and why. `prefix` is what the process's fields begin with: [`IN_SPEC`], or nothing if it
/// is alone.
fn parse<T: DeserializeOwned>(text: &[u8], prefix: &str) -> Result<(T, Vec<String>), (String, String)> {
    let wrong =
        |error: serde_path_to_error::Error<serde_json::Error>| (error.path().to_string(), error.inner().to_string());
    if let Ok(parsed) = serde_json::from_slice(text) {
        return Ok((parsed, Vec::new()));
    }
    // Once more, minding the path, which costs as much again.
    let mut again = serde_json::Deserializer::from_slice(text);
    let (field, reason) = match serde_path_to_error::deserialize::<_, T>(&mut again).map_err(wrong) {
        Ok(_) => (".".to_owned(), again.end().err().map_or_else(String::new, |error| error.to_string())),
        Err(error) => error,
    };
    let inside = field.strip_prefix(prefix);
    if !inside.is_some_and(|field| field.starts_with("capabilities.") || field.starts_with("execCPUAffinity.")) {
        return Err((field, reason));
    }
    let mut again = serde_json::Deserializer::from_slice(text);
    let Unambiguous(mut value) = serde_path_to_error::deserialize(&mut again).map_err(wrong)?;
    again.end().map_err(|error| (".".to_owned(), error.to_string()))?;
    let process = if prefix == IN_SPEC { value.get_mut("process") } else { Some(&mut value) };
    let left_out = process.map(|process| leave_out(process, prefix)).unwrap_or_default();
    serde_path_to_error::deserialize(value).map(|parsed| (parsed, left_out)).map_err(wrong)
}

/// Takes out of a process what is no error there, and says what is lost.
fn leave_out(process: &mut Value, prefix: &str) -> Vec<String> {
    let mut left_out = Vec::new();
    // A capability that this release does not know is a warning (runtime-spec config.md, "Linux Process").
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(|set| set.as_array_mut()) {
        set.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok() || !name.is_string();
            if !known {
                let text = format!("{prefix}capabilities: {name} left out: no such capability is known");
                left_out.extend(Some(text).filter(|text| !left_out.contains(text)));
            }
            known
        });
    }
    // No processors are as good as no list (there, "execCPUAffinity").
    if let Some(lists) = process.get_mut("execCPUAffinity").and_then(Value::as_object_mut) {
        lists.retain(|_, list| list != "");
    }
    left_out
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_CONFIG {
        return Err(failed(io::Error::other(format!("{size} bytes, {MAX_CONFIG} is the most"))));
    }
    fs::read(path).map_err(failed)
}

/// A process as `exec` takes one from a file, checked, and what it asks for in vain.
pub fn load_process(path: &Path) -> Result<(Process, Vec<String>), ConfigError> {
    let parsed = parse(&read(path)?, "");
    let (process, left_out) =
        parsed.map_err(|(field, reason)| ConfigError::Malformed { path: path.to_owned(), field, reason })?;
    check_process(&process, "")?;
    Ok((process, left_out))
}

fn field(field: impl Into<String>, reason: impl Into<String>) -> ConfigError {
    ConfigError::Field { field: field.into(), reason: reason.into() }
}

fn check(spec: &Spec) -> Result<(), ConfigError> {
    check_version(spec.version())?;
    match spec.root() {
        None => return Err(field("root", "missing, and no container runs without a root file system")),
        Some(root) if root.path().as_os_str().is_empty() => return Err(field("root.path", "empty")),
        Some(_) => {}
    }
    if let Some(process) = spec.process() {
        check_process(process, IN_SPEC)?;
    }
    let empty = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&empty);
    check_namespaces(linux)?;
    let isolated = |kind| linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind);
    for (name, set) in [("hostname", spec.hostname().is_some()), ("domainname", spec.domainname().is_some())] {
        if set && !isolated(LinuxNamespaceType::Uts) {
            return Err(field(name, "set, but linux.namespaces has no uts: it would be the host's"));
        }
    }
    for (at, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(at, mount)?;
    }
    if mounts_among_others(spec) {
        check_among_others(linux)?;
    }
    check_linux(linux, &isolated)?;
    check_hooks(spec.hooks().as_ref())
}

/// SemVer 2.0.0, of a major version that this runtime knows.
fn check_version(version: &str) -> Result<(), ConfigError> {
    if version.is_empty() {
        return Err(field("ociVersion", "missing"));
    }
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<Option<u64>> = core.split('.').map(|part| part.parse().ok()).collect();
    match numbers.as_slice() {
        [Some(1), Some(_), Some(_)] => Ok(()),
        [Some(_), Some(_), Some(_)] => Err(field("ociVersion", format!("`{version}` is none of 1.x.y"))),
        _ => Err(field("ociVersion", format!("`{version}` is no version (SemVer 2.0.0)"))),
    }
}

fn check_process(process: &Process, prefix: &str) -> Result<(), ConfigError> {
    if process.args().as_ref().is_none_or(|args| args.first().is_none_or(String::is_empty)) {
        return Err(field(format!("{prefix}args"), "empty: there is nothing to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(field(format!("{prefix}cwd"), format!("`{}` is no absolute path", process.cwd().display())));
    }
    let words = process.args().iter().flatten().enumerate().map(|(at, word)| (format!("{prefix}args[{at}]"), word));
    let env = process.env().iter().flatten().enumerate().map(|(at, word)| (format!("{prefix}env[{at}]"), word));
    if let Some((name, _)) = words.chain(env).find(|(_, word)| word.contains('\0')) {
        return Err(field(name, "has a NUL in it, which no process can be given"));
    }
    let limits = process.rlimits().as_deref().unwrap_or_default();
    for (at, limit) in limits.iter().enumerate() {
        if limits[..at].iter().any(|other| other.typ() == limit.typ()) {
            return Err(field(format!("{prefix}rlimits[{at}].type"), format!("{} is there twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(field(format!("{prefix}rlimits[{at}].soft"), "above the hard limit"));
        }
    }
    for (name, list) in affinity(process) {
        processors(list).map_err(|reason| field(format!("{prefix}{name}"), reason))?;
    }
    Ok(())
}

fn check_namespaces(linux: &Linux) -> Result<(), ConfigError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    for (at, namespace) in namespaces.iter().enumerate() {
        if namespaces[..at].iter().any(|other| other.typ() == namespace.typ()) {
            return Err(field(format!("linux.namespaces[{at}].type"), format!("{} is there twice", namespace.typ())));
        }
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.is_absolute()) {
            return Err(field(format!("linux.namespaces[{at}].path"), format!("{} is not absolute", path.display())));
        }
    }
    let user = namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::User);
    for (name, list) in [("uidMappings", linux.uid_mappings()), ("gidMappings", linux.gid_mappings())] {
        let list = list.as_deref().unwrap_or_default();
        match user.map(|user| user.path().is_some()) {
            None if !list.is_empty() => {
                return Err(field(format!("linux.{name}"), "set, but linux.namespaces has no user"));
            }
            Some(true) if !list.is_empty() => {
                return Err(field(format!("linux.{name}"), "set, but the user namespace is one that exists"));
            }
            Some(false) if list.is_empty() => {
                return Err(field(format!("linux.{name}"), "missing, and a new user namespace needs it"));
            }
            _ => check_mappings(&format!("linux.{name}"), list)?,
        }
    }
    Ok(())
}

/// No id twice on either side, and none beyond what an id can be.
fn check_mappings(name: &str, list: &[LinuxIdMapping]) -> Result<(), ConfigError> {
    let overlap = |a: (u32, u32), b: (u32, u32)| {
        u64::from(a.0) < u64::from(b.0) + u64::from(b.1) && u64::from(b.0) < u64::from(a.0) + u64::from(a.1)
    };
    for (at, entry) in list.iter().enumerate() {
        let name = format!("{name}[{at}]");
        if entry.size() == 0 {
            return Err(field(format!("{name}.size"), "zero"));
        }
        for first in [entry.host_id(), entry.container_id()] {
            if u64::from(first) + u64::from(entry.size()) > u64::from(u32::MAX) {
                return Err(field(name, "goes beyond the highest id"));
            }
        }
        for other in &list[..at] {
            if overlap((entry.container_id(), entry.size()), (other.container_id(), other.size()))
                || overlap((entry.host_id(), entry.size()), (other.host_id(), other.size()))
            {
                return Err(field(name, "overlaps an earlier one"));
            }
        }
    }
    Ok(())
}

fn check_mount(at: usize, mount: &Mount) -> Result<(), ConfigError> {
    let destination = mount.destination();
    if destination.as_os_str().is_empty() {
        return Err(field(format!("mounts[{at}].destination"), "empty"));
    }
    if destination.components().any(|part| part == Component::ParentDir) {
        return Err(field(format!("mounts[{at}].destination"), format!("{} has a `..` in it", destination.display())));
    }
    let options = mounts::parse(mount);
    if options.bind && mount.source().is_none() {
        return Err(field(format!("mounts[{at}].source"), "missing, and a bind mount has one"));
    }
    if options.data.iter().any(|option| option.contains('\0')) {
        return Err(field(format!("mounts[{at}].options"), "has a NUL in it"));
    }
    for (name, list) in [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())] {
        check_mappings(&format!("mounts[{at}].{name}"), list.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

/// What cannot be had among others' mounts.
fn check_among_others(linux: &Linux) -> Result<(), ConfigError> {
    let spread = linux.rootfs_propagation().as_deref().and_then(mounts::propagation);
    if spread.is_some_and(|flag| flag.intersects(MsFlags::MS_SLAVE | MsFlags::MS_SHARED)) {
        let reason = "linux.namespaces has no new mount: what is mounted inside would be mounted outside";
        return Err(field("linux.rootfsPropagation", reason));
    }
    let own = linux.namespaces().iter().flatten().filter(|it| it.path().is_none());
    if own.into_iter().any(|it| it.typ() == LinuxNamespaceType::User) {
        let reason = "a new user and no new mount: whoever lives in the one may mount nothing in others' mounts";
        return Err(field("linux.namespaces", reason));
    }
    Ok(())
}

/// Whether a container has a mount namespace that is made for it.
pub(super) fn owns_mounts(spec: &Spec) -> bool {
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    listed.into_iter().flatten().any(|it| it.typ() == LinuxNamespaceType::Mount && it.path().is_none())
}

fn mounts_among_others(spec: &Spec) -> bool {
    !owns_mounts(spec) && asks_for_mounts(spec)
}

/// Whether something is mounted at or below its root, or made there. Where it has others' mounts, and not that either, nothing is: its
/// root is a changed one then, or in a namespace that it joins that one's.
pub(super) fn asks_for_mounts(spec: &Spec) -> bool {
    let empty = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&empty);
    let any = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    spec.mounts().as_ref().is_some_and(|mounts| !mounts.is_empty())
        || spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false))
        || spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false))
        || any(linux.masked_paths())
        || any(linux.readonly_paths())
        || linux.devices().as_ref().is_some_and(|devices| !devices.is_empty())
        || linux.rootfs_propagation().is_some()
}

fn check_linux(linux: &Linux, isolated: &dyn Fn(LinuxNamespaceType) -> bool) -> Result<(), ConfigError> {
    for (name, value) in linux.sysctl().iter().flatten() {
        let name_of = |reason: &str| field(format!("linux.sysctl[{name}]"), reason.to_owned());
        if name.split(['.', '/']).any(|part| part.is_empty()) || value.contains('\0') {
            return Err(name_of("is no setting"));
        }
        let dotted = name.replace('/', ".");
        let needs = if dotted.starts_with("net.") {
            LinuxNamespaceType::Network
        } else if IPC_SETTINGS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            LinuxNamespaceType::Ipc
        } else if dotted == "kernel.domainname" || dotted == "kernel.hostname" {
            LinuxNamespaceType::Uts
        } else {
            return Err(name_of("belongs to the whole machine, not to a namespace"));
        };
        if !isolated(needs) {
            return Err(name_of("would change the host: linux.namespaces lacks its namespace"));
        }
    }
    for (at, device) in linux.devices().iter().flatten().enumerate() {
        check_device(at, device)?;
    }
    let masked = linux.masked_paths().iter().flatten().enumerate().map(|(at, path)| ("maskedPaths", at, path));
    let read_only = linux.readonly_paths().iter().flatten().enumerate().map(|(at, path)| ("readonlyPaths", at, path));
    for (name, at, path) in masked.chain(read_only) {
        if !path.starts_with('/') {
            return Err(field(format!("linux.{name}[{at}]"), format!("`{path}` is no absolute path")));
        }
    }
    if let Some(name) = linux.rootfs_propagation()
        && mounts::propagation(name).is_none()
    {
        return Err(field(
            "linux.rootfsPropagation",
            format!("`{name}` is none of shared, slave, private, unbindable"),
        ));
    }
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()) {
        if !isolated(LinuxNamespaceType::Time) {
            return Err(field("linux.timeOffsets", "set, but linux.namespaces has no time"));
        }
        let names = linux.time_offsets().iter().flatten().map(|(name, _)| name);
        if let Some(name) = names.into_iter().find(|name| !["monotonic", "boottime"].contains(&name.as_str())) {
            return Err(field("linux.timeOffsets", format!("`{name}` is none of monotonic, boottime")));
        }
    }
    if linux.personality().as_ref().is_some_and(|it| it.flags().as_ref().is_some_and(|flags| !flags.is_empty())) {
        return Err(field("linux.personality.flags", "the specification defines none"));
    }
    if let Some(path) =
        linux.cgroups_path().as_ref().filter(|path| path.components().any(|part| part == Component::ParentDir))
    {
        return Err(field("linux.cgroupsPath", format!("{} has a `..` in it", path.display())));
    }
    let resources = linux.resources().as_ref();
    let files = resources.and_then(|it| it.unified().as_ref()).into_iter().flatten().map(|(name, _)| name);
    if let Some(name) = files.into_iter().find(|name| name.contains('/') || !name.contains('.')) {
        return Err(field("linux.resources.unified", format!("`{name}` is no file of a cgroup")));
    }
    let pages = resources.and_then(|it| it.hugepage_limits().as_ref()).into_iter().flatten();
    if let Some(limit) = pages.into_iter().find(|limit| limit.page_size().contains(['/', '\0'])) {
        return Err(field("linux.resources.hugepageLimits", format!("`{}` is no size", limit.page_size())));
    }
    if linux.intel_rdt().is_some() {
        return Err(field("linux.intelRdt", "not supported by this runtime"));
    }
    if linux.memory_policy().is_some() {
        return Err(field("linux.memoryPolicy", "not supported by this runtime"));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(field("linux.netDevices", "not supported by this runtime"));
    }
    match linux.mount_label() {
        // Without SELinux a label means nothing, and nothing is lost with it.
        Some(label) if !label.is_empty() && Path::new("/sys/fs/selinux/enforce").exists() => {
            Err(field("linux.mountLabel", "not supported: this runtime does not label mounts for SELinux"))
        }
        _ => Ok(()),
    }
}

fn check_device(at: usize, device: &LinuxDevice) -> Result<(), ConfigError> {
    let name = |part: &str| format!("linux.devices[{at}].{part}");
    if !device.path().is_absolute() || device.path().components().any(|part| part == Component::ParentDir) {
        return Err(field(name("path"), format!("{} is no absolute path without `..`", device.path().display())));
    }
    match device.typ() {
        LinuxDeviceType::A => Err(field(name("type"), "`a` is no kind of device: it is one of c, b, u, p")),
        LinuxDeviceType::P => Ok(()),
        _ if device.major() < 0 || device.minor() < 0 => Err(field(name("major"), "a device has two numbers")),
        _ => Ok(()),
    }
}

fn check_hooks(hooks: Option<&Hooks>) -> Result<(), ConfigError> {
    let Some(hooks) = hooks else { return Ok(()) };
    let lists = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in lists {
        for (at, hook) in list.iter().flatten().enumerate() {
            if !hook.path().is_absolute() {
                let reason = format!("{} is no absolute path", hook.path().display());
                return Err(field(format!("hooks.{name}[{at}].path"), reason));
            }
            if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                return Err(field(format!("hooks.{name}[{at}].timeout"), "must be above zero"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::{default_profile, prepare, strict_profile};

    fn bundle(linux: Linux) -> Spec {
        let mut spec = crate::container::example_spec().expect("an example");
        spec.set_linux(Some(linux));
        spec
    }

    fn text(spec: &Spec) -> String {
        serde_json::to_string(spec).expect("JSON")
    }

    #[test]
    fn a_known_profile_is_not_read_and_nothing_else_is_taken_for_it() {
        prepare();
        let with = |profile| {
            let mut linux = Linux::default();
            linux.set_seccomp(Some(profile));
            bundle(linux)
        };
        let spec = with(default_profile());
        let (mut read, left_out, filter) = parse_known(text(&spec).as_bytes(), None).expect("a known one");
        assert_eq!((Ok(filter), left_out), (Filter::compile(&default_profile()), vec![]));
        assert_eq!(read.linux_mut().as_mut().and_then(|linux| linux.seccomp_mut().replace(default_profile())), None);
        assert_eq!(read, spec);
        // One whose questions go somewhere, one that is another, and one that is somewhere else.
        assert!(parse_known(text(&with(strict_profile("shim"))).as_bytes(), None).is_none());
        let other = text(&spec).replacen("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", 1);
        assert!(parse_known(other.as_bytes(), None).is_none());
        let (none, profile) =
            (text(&bundle(Linux::default())), serde_json::to_string(&default_profile()).expect("JSON"));
        let elsewhere = none.replacen('{', &format!(r#"{{"else":{{"seccomp":{profile}}},"#), 1);
        assert!(serde_json::from_str::<Spec>(&elsewhere).is_ok());
        assert!(parse_known(elsewhere.as_bytes(), None).is_none());
    }

    #[test]
    fn a_known_profile_makes_no_document_good_that_is_not() {
        prepare();
        let mut linux = Linux::default();
        linux.set_seccomp(Some(default_profile()));
        let spec = text(&bundle(linux));
        assert!(parse_known(spec.as_bytes(), None).is_some());
        let other = r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#;
        let profile = serde_json::to_string(&default_profile()).expect("JSON");
        let twice = |name: &str| format!(r#""{name}":{profile},{other}"#);
        let once = format!(r#""seccomp":{profile}"#);
        let place = r#""seccomp":{"defaultAction":"SCMP_ACT_TRACE","defaultErrnoRet":4294967295}"#;
        let end = spec.len() - 1;
        for wrong in [
            spec.replacen(&once, &twice("seccomp"), 1),
            spec.replacen(&once, &twice("secc\\u006fmp"), 1),
            spec.replacen(&once, &format!("{other},{once}"), 1),
            spec.replacen(&once, &format!("{once},{place}"), 1),
            spec.replacen(&once, &format!("{place},{once}"), 1),
            format!(r#"{},"linux":{{{other}}}}}"#, &spec[..end]),
            format!("{spec}{{}}"),
            spec[..end].to_owned(),
            format!("[{spec}]"),
        ] {
            assert_ne!(wrong, spec);
            // With something else that is read in another way, too.
            let odd = wrong.replacen(r#""permitted":["#, r#""permitted":["CAP_NONE","#, 1);
            assert_ne!(odd, wrong);
            for wrong in [wrong, odd] {
                assert!(parse::<Spec>(wrong.as_bytes(), IN_SPEC).is_err(), "{wrong}");
                assert!(parse_known(wrong.as_bytes(), None).is_none(), "{wrong}");
            }
        }
        // A list may be read as fields, too; and another way to write the name is the same name: they are compiled.
        let listed = format!(r#"{{"ociVersion":"1.0.0","linux":[{profile}]}}"#);
        assert!(parse_known(listed.as_bytes(), None).is_none());
        let written = spec.replacen(r#""seccomp":"#, r#""secc\u006fmp" : "#, 1);
        assert!(serde_json::from_str::<Spec>(&written).is_ok());
        assert!(parse_known(written.as_bytes(), None).is_none());
    }

    #[test]
    fn a_profile_is_found_where_it_is() {
        let find = |text: &str| profile_in(text.as_bytes()).map(str::to_owned);
        let found = |text: &str| Some(text.to_owned());
        assert_eq!(
            find(r#"{"a":{"seccomp":1},"linux":{"b":["seccomp",{}],"seccomp":{"c":"}\"é"} ,"d":0}}"#),
            found(r#"{"c":"}\"é"}"#)
        );
        assert_eq!(find("{\"linux\":\n{\"seccomp\"\t:\r\n [1, 2]}}\n"), found("[1, 2]"));
        assert_eq!(find(r#"{"linux":{"seccomp":null}}"#), found("null"));
        for none in [r#"{"linux":{}}"#, r#"{"linux":null}"#, r#"{"seccomp":{}}"#, "[]", "", r#"{"linux":{"seccomp":{"#]
        {
            assert_eq!(find(none), None, "{none}");
        }
    }

    #[test]
    fn what_another_process_has_compiled_is_taken_with_what_is_left_out() {
        let dir = tempfile::tempdir().expect("a folder");
        let (bundle_dir, kept) = (dir.path().join("bundle"), Kept::below(dir.path()));
        fs::create_dir_all(bundle_dir.join("rootfs")).expect("folders");
        let mut linux = Linux::default();
        // Of no process's that has prepared: a profile of its own.
        let mut profile = default_profile();
        profile.set_default_errno_ret(Some(77));
        linux.set_seccomp(Some(profile.clone()));
        linux.set_namespaces(
            crate::container::example_spec()
                .expect("an example")
                .linux()
                .as_ref()
                .and_then(|all| all.namespaces().clone()),
        );
        let spec = text(&bundle(linux));
        let filter = Filter::compile(&profile).ok();
        for (spec, left_out) in
            [(spec.clone(), 0), (spec.replacen(r#""permitted":["#, r#""permitted":["CAP_NONE","#, 1), 1)]
        {
            fs::write(bundle_dir.join("config.json"), spec).expect("written");
            let load = || Config::load_with(&bundle_dir, Some(&kept)).expect("a bundle");
            let (first, second) = (load(), load());
            let has_profile =
                |config: &Config| config.spec.linux().as_ref().is_some_and(|linux| linux.seccomp().is_some());
            assert!(!has_profile(&second));
            for config in [&first, &second] {
                assert_eq!(config.left_out.len(), left_out, "{:?}", config.left_out);
                assert_eq!(config.filter, filter);
            }
            let started = Config::load_started_with(&bundle_dir, Some(&kept)).expect("a bundle");
            assert!(!has_profile(&started));
            assert_eq!(started.filter, filter);
        }
    }
}

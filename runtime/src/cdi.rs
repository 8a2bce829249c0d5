//! Devices of this machine for containers: device nodes, and what CDI files say of them (Container Device Interface 1.0,
//! github.com/cncf-tags/container-device-interface, SPEC.md).
//!
//! A vendor's tool writes a file for each kind of device (`nvidia-ctk cdi generate` does), with what a container needs to use one:
//! device nodes, libraries to be mounted, variables, hooks. The files are the machine's administrator's word, and so are the hooks
//! in them, which run as root outside of the container.
//!
//! **Bounds.** [`MAX_FILE`] bytes of one file, [`MAX_FILES`] of them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    HookBuilder, Hooks, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, MountBuilder, Spec,
};
use serde::Deserialize;

use crate::rootless::is_rootless;

/// Where files are looked for; a later folder's word counts more (SPEC.md, "CDI JSON Specification", directories).
pub const FOLDERS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 256;

/// Why a container cannot be given a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It is not there, or is no device.
    #[error("{path} is no device of this machine: {reason}")]
    Node {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No CDI file names it.
    #[error("no CDI file of this machine names {kind}={name}")]
    Unknown {
        /// `vendor/class`.
        kind: String,
        /// Which of it.
        name: String,
    },
    /// The spec could not be put together.
    #[error("cannot make an OCI spec of it: {0}")]
    Spec(#[from] OciSpecError),
}

/// What a container gets with a device (SPEC.md, "containerEdits"). What is not known here is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Edits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    mounts: Vec<EditMount>,
    hooks: Vec<EditHook>,
    #[serde(alias = "additionalGIDs")]
    additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DeviceNode {
    path: PathBuf,
    host_path: Option<PathBuf>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
    file_mode: Option<u32>,
    /// It was asked for by a path without links, and is not to be another by now.
    #[serde(skip)]
    plain: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EditMount {
    host_path: PathBuf,
    container_path: PathBuf,
    r#type: Option<String>,
    options: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EditHook {
    hook_name: String,
    path: PathBuf,
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    timeout: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Edits,
}

/// What the CDI files of a machine say.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// By kind and name: edits of the device, and of its file.
    devices: BTreeMap<(String, String), (Edits, Edits)>,
}

impl Registry {
    /// Reads all files of `folders`; what cannot be used is said in words and left out.
    pub fn load(folders: &[&Path]) -> (Registry, Vec<String>) {
        let (mut registry, mut warnings) = (Registry::default(), Vec::new());
        for folder in folders {
            let mut files: Vec<PathBuf> =
                fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            files.retain(|path| path.extension().is_some_and(|kind| kind == "json" || kind == "yaml"));
            files.sort();
            let mut here: BTreeMap<(String, String), (Edits, Edits)> = BTreeMap::new();
            for path in files.into_iter().take(MAX_FILES) {
                match read(&path) {
                    Ok(document) => {
                        for device in document.devices {
                            let key = (document.kind.clone(), device.name);
                            if here.contains_key(&key) {
                                warnings.push(format!("{}: {}={} is named twice", path.display(), key.0, key.1));
                                continue;
                            }
                            here.insert(key, (device.container_edits, document.container_edits.clone()));
                        }
                    }
                    Err(reason) => warnings.push(format!("{}: {reason}", path.display())),
                }
            }
            registry.devices.extend(here);
        }
        (registry, warnings)
    }

    /// Names of devices, by `vendor/class`.
    pub fn kinds(&self) -> BTreeMap<String, Vec<String>> {
        let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut known: Vec<(&String, &Vec<DeviceNode>)> = Vec::new();
        // `all` is by convention every device of the kind, and none of its own. One device may have several names, by number and
        // by serial number: it counts once, by the first of them.
        for ((kind, name), (edits, _)) in self.devices.iter().filter(|((_, name), _)| name != "all") {
            let nodes = &edits.device_nodes;
            if !nodes.is_empty() && known.contains(&(kind, nodes)) {
                continue;
            }
            known.push((kind, nodes));
            kinds.entry(kind.clone()).or_default().push(name.clone());
        }
        kinds
    }

    /// What a container gets with these devices; what their files say of each kind once.
    pub fn edits(&self, devices: &[(String, String)]) -> Result<Vec<Edits>, DeviceError> {
        let mut edits = Vec::new();
        for (kind, name) in devices {
            let known = self.devices.get(&(kind.clone(), name.clone()));
            let (own, common) = known.ok_or_else(|| DeviceError::Unknown { kind: kind.clone(), name: name.clone() })?;
            if !edits.contains(common) {
                edits.push(common.clone());
            }
            edits.push(own.clone());
        }
        Ok(edits)
    }
}

impl Edits {
    /// One device node, whose path has no links, at `target`, which may be used as `access` says: some of `r`, `w` and `m`.
    pub fn node(source: &str, target: &str, access: &str) -> Edits {
        let node = DeviceNode {
            path: target.into(),
            host_path: Some(source.into()),
            permissions: Some(access.to_owned()),
            plain: true,
            ..DeviceNode::default()
        };
        Edits { device_nodes: vec![node], ..Edits::default() }
    }
}

fn read(path: &Path) -> Result<Document, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("more than {MAX_FILE} bytes"));
    }
    // JSON is YAML, but its errors say more.
    let document: Document = if path.extension().is_some_and(|kind| kind == "json") {
        serde_json::from_str(&text).map_err(|error| error.to_string())?
    } else {
        serde_saphyr::from_str(&text).map_err(|error| error.to_string())?
    };
    match document.kind.split_once('/') {
        Some((vendor, class)) if !vendor.is_empty() && !class.is_empty() => Ok(document),
        _ => Err(format!("its kind `{}` is not vendor/class", document.kind)),
    }
}

/// Puts devices into a spec.
pub fn apply(spec: &mut Spec, edits: &[Edits]) -> Result<(), DeviceError> {
    for edit in edits {
        for node in &edit.device_nodes {
            add_node(spec, node)?;
        }
        if let Some(process) = spec.process_mut() {
            let mut env = process.env().clone().unwrap_or_default();
            let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
            for entry in &edit.env {
                env.retain(|old| name(old) != name(entry));
                env.push(entry.clone());
            }
            process.set_env(Some(env));
            let user = process.user_mut();
            let mut groups = user.additional_gids().clone().unwrap_or_default();
            groups.extend(edit.additional_gids.iter().filter(|gid| **gid != 0));
            user.set_additional_gids(Some(groups));
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &edit.mounts {
            // Unless it says otherwise, as the reference implementation does.
            let kind = mount.r#type.clone().unwrap_or_else(|| "bind".to_owned());
            let mut options = mount.options.clone();
            if kind == "bind" && !options.iter().any(|option| option.ends_with("bind")) {
                options.push("rbind".to_owned());
            }
            // What is bound in has no link in its path; where the administrator's file says one, it is followed here.
            let source = fs::canonicalize(&mount.host_path).unwrap_or_else(|_| mount.host_path.clone());
            let mount = MountBuilder::default()
                .destination(&mount.container_path)
                .source(source)
                .typ(kind)
                .options(options)
                .build()?;
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
        for hook in &edit.hooks {
            add_hook(spec, hook)?;
        }
    }
    Ok(())
}

fn add_node(spec: &mut Spec, node: &DeviceNode) -> Result<(), DeviceError> {
    let source = node.host_path.as_ref().unwrap_or(&node.path);
    let wrong = |reason: &str| DeviceError::Node { path: source.clone(), reason: reason.to_owned() };
    let links = if node.plain { ResolveFlag::RESOLVE_NO_SYMLINKS } else { ResolveFlag::empty() };
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(links);
    let metadata = openat2(AT_FDCWD, source, how)
        .map_err(io::Error::from)
        .and_then(|fd| File::from(fd).metadata())
        .map_err(|error| wrong(&error.to_string()))?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return Err(wrong("it is a file or folder")),
    };
    if is_rootless() {
        // Who may not make one binds the machine's own; what is at that place instead by then is no device of another.
        let source = fs::canonicalize(source).map_err(|error| wrong(&error.to_string()))?;
        return bind_node(spec, node, source);
    }
    let (major, minor) = (nix::sys::stat::major(metadata.rdev()) as i64, nix::sys::stat::minor(metadata.rdev()) as i64);
    let device = LinuxDeviceBuilder::default()
        .path(&node.path)
        .typ(kind)
        .major(major)
        .minor(minor)
        .file_mode(node.file_mode.unwrap_or(metadata.mode() & 0o777))
        .uid(node.uid.unwrap_or(metadata.uid()))
        .gid(node.gid.unwrap_or(metadata.gid()))
        .build()?;
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(kind)
        .major(major)
        .minor(minor)
        .access(node.permissions.clone().unwrap_or_else(|| "rwm".to_owned()))
        .build()?;
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.retain(|known| known.path() != device.path());
    devices.push(device);
    linux.set_devices(Some(devices));
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

fn bind_node(spec: &mut Spec, node: &DeviceNode, source: PathBuf) -> Result<(), DeviceError> {
    let mut options = vec!["bind".to_owned(), "rprivate".to_owned(), "nosuid".to_owned(), "noexec".to_owned()];
    if node.permissions.as_ref().is_some_and(|access| !access.contains('w')) {
        options.push("ro".to_owned());
    }
    let mount = MountBuilder::default().destination(&node.path).source(source).typ("bind").options(options).build()?;
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn add_hook(spec: &mut Spec, hook: &EditHook) -> Result<(), DeviceError> {
    let mut built = HookBuilder::default().path(&hook.path);
    if let Some(args) = &hook.args {
        built = built.args(args.clone());
    }
    if let Some(env) = &hook.env {
        built = built.env(env.clone());
    }
    if let Some(timeout) = hook.timeout {
        built = built.timeout(timeout);
    }
    let built = built.build()?;
    let mut hooks: Hooks = spec.hooks().clone().unwrap_or_default();
    let with = |list: &Option<Vec<_>>| Some(list.iter().flatten().cloned().chain([built.clone()]).collect::<Vec<_>>());
    match hook.hook_name.as_str() {
        // Deprecated, and what the files of many vendors still say.
        "prestart" => hooks.set_prestart(with(hooks.prestart())),
        "createRuntime" => hooks.set_create_runtime(with(hooks.create_runtime())),
        "createContainer" => hooks.set_create_container(with(hooks.create_container())),
        "startContainer" => hooks.set_start_container(with(hooks.start_container())),
        "poststart" => hooks.set_poststart(with(hooks.poststart())),
        "poststop" => hooks.set_poststop(with(hooks.poststop())),
        _ => return Ok(()),
    };
    spec.set_hooks(Some(hooks));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(files: &[(&str, &str, &str)]) -> (Registry, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let folders = [dir.path().join("etc"), dir.path().join("run")];
        folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
        for (folder, name, text) in files {
            fs::write(dir.path().join(folder).join(name), text).unwrap();
        }
        Registry::load(&[&folders[0], &folders[1]])
    }

    const GPU: &str = r#"
cdiVersion: "0.6.0"
kind: example.org/gpu
devices:
  - name: "0"
    containerEdits:
      deviceNodes:
        - path: /dev/gpu0
          hostPath: /dev/null
          permissions: rw
  - name: "1"
    containerEdits:
      env: [GPU=1]
containerEdits:
  env: [DRIVER=yes, "PATH=/driver"]
  additionalGIDs: [44]
  mounts:
    - {hostPath: /usr/lib, containerPath: /driver, options: [ro]}
  hooks:
    - {hookName: createContainer, path: /usr/bin/true, args: [true, update]}
    - {hookName: unknown, path: /nowhere}
"#;

    #[test]
    fn what_a_vendor_s_file_says_comes_with_its_devices() {
        let (registry, warnings) = registry(&[("etc", "gpu.yaml", GPU)]);
        assert_eq!(warnings, Vec::<String>::new());
        let names = vec!["0".to_owned(), "1".to_owned()];
        assert_eq!(registry.kinds(), BTreeMap::from([("example.org/gpu".to_owned(), names)]));
        let both = ["0", "1"].map(|name| ("example.org/gpu".to_owned(), name.to_owned()));
        let edits = registry.edits(&both).unwrap();
        assert_eq!(edits.len(), 3, "what is common comes once");
        let mut spec = crate::container::example_spec().unwrap();
        apply(&mut spec, &edits).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let device = &linux.devices().as_ref().unwrap()[0];
        assert_eq!((device.path().to_str(), device.major(), device.minor()), (Some("/dev/gpu0"), 1, 3));
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        assert_eq!(rules[0].access().as_deref(), Some("rw"));
        let process = spec.process().as_ref().unwrap();
        let env = process.env().as_ref().unwrap();
        assert!(
            ["DRIVER=yes", "GPU=1", "PATH=/driver"].iter().all(|entry| env.iter().any(|have| have == entry)),
            "{env:?}"
        );
        assert_eq!(env.iter().filter(|entry| entry.starts_with("PATH=")).count(), 1);
        assert_eq!(process.user().additional_gids().as_deref(), Some(&[44][..]));
        let mount = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(mount.options().as_ref().unwrap(), &["ro", "rbind"]);
        let hooks = spec.hooks().as_ref().unwrap();
        assert_eq!(hooks.create_container().as_ref().unwrap().len(), 1);
        let unknown = registry.edits(&[("example.org/gpu".to_owned(), "7".to_owned())]);
        assert!(matches!(unknown, Err(DeviceError::Unknown { .. })));
    }

    #[test]
    fn later_folders_count_more_and_what_is_wrong_is_said_and_left_out() {
        let json = r#"{"cdiVersion": "0.6.0", "kind": "example.org/gpu", "devices": [{"name": "0", "containerEdits": {"env": ["FROM=run"]}}]}"#;
        let (registry, warnings) = registry(&[
            ("etc", "gpu.yaml", GPU),
            ("etc", "twice.yaml", GPU),
            ("etc", "wrong.json", "{"),
            ("etc", "kind.yaml", "kind: gpu\n"),
            ("etc", "other.txt", "not read"),
            ("run", "gpu.json", json),
        ]);
        assert_eq!(warnings.len(), 4, "{warnings:?}");
        let edits = registry.edits(&[("example.org/gpu".to_owned(), "0".to_owned())]).unwrap();
        assert_eq!(edits[1].env, ["FROM=run"]);
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for path in ["/etc/passwd", "/dev", "/dev/nosuch"] {
            let mut spec = crate::container::example_spec().unwrap();
            assert!(
                matches!(apply(&mut spec, &[Edits::node(path, "/dev/x", "rw")]), Err(DeviceError::Node { .. })),
                "{path}"
            );
        }
    }
}

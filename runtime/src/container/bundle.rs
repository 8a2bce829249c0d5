//! An OCI runtime-spec bundle, made from an image's config and what the workload asks for.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxMemoryBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResourcesBuilder, Mount, MountBuilder,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use super::{Launch, user};
use crate::cgroup::Limits;
use crate::seccomp;
use crate::store::Runnable;

/// Docker's default search path.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Docker's default capabilities but CAP_MKNOD: with it and without a device filter, which v2 hosts have only as eBPF,
/// root inside could make itself the host's disk.
const CAPABILITIES: [Capability; 13] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Docker's list.
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const MASKED_TOO: [&str; 1] = ["/sys/devices/virtual/powercap"];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What a workload asks for, over the image's own defaults.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Replaces the entrypoint, and with it the image's command.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working folder.
    pub workdir: Option<String>,
    /// What it calls itself.
    pub hostname: String,
    /// What it may use.
    pub limits: Limits,
    /// Its cgroup, below the hierarchies' roots.
    pub cgroup: String,
}

/// Why a bundle could not be made. Its folder is incomplete and must be deleted.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Neither the image nor the workload says what to run.
    #[error("neither the image nor the command line says what to run")]
    NoCommand,
    /// The user is none of the image's.
    #[error("{0}")]
    User(String),
    /// A working folder that is none.
    #[error("the working folder `{0}` is not an absolute path")]
    Workdir(String),
    /// A file of the bundle could not be written.
    #[error("cannot write {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The spec could not be put together.
    #[error("cannot make an OCI spec of it: {0}")]
    Spec(#[from] OciSpecError),
}

/// Writes the bundle of a new container into `dir`, or of one that is started again: its writable layer stays.
pub fn write(dir: &Path, image: &Runnable, request: &Request) -> Result<(), BundleError> {
    let spec = spec(image, request)?;
    for sub in ["", "rootfs", "upper", "work"] {
        let path = dir.join(sub);
        let mode = if sub == "upper" { 0o755 } else { 0o700 };
        let made = fs::DirBuilder::new().recursive(true).mode(mode).create(&path);
        made.map_err(|source| BundleError::Io { path, source })?;
    }
    let launch = Launch { layers: image.layers.clone(), cgroup: request.cgroup.clone(), limits: request.limits };
    let hosts =
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{}\n", request.hostname);
    let resolv = fs::read("/etc/resolv.conf").unwrap_or_default();
    let filter: Vec<u8> = seccomp::program()
        .iter()
        .flat_map(|step| [&step.code.to_ne_bytes()[..], &[step.jt, step.jf], &step.k.to_ne_bytes()].concat())
        .collect();
    let files: [(&str, Vec<u8>); 6] = [
        ("config.json", serde_json::to_vec(&spec).expect("a spec is plain data")),
        ("launch.json", serde_json::to_vec(&launch).expect("plain data")),
        ("seccomp.bpf", filter),
        ("hosts", hosts.into_bytes()),
        ("hostname", format!("{}\n", request.hostname).into_bytes()),
        ("resolv.conf", resolv),
    ];
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::write(&path, bytes).map_err(|source| BundleError::Io { path, source })?;
    }
    for left in ["exit.json", "shim.sock"] {
        match fs::remove_file(dir.join(left)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(BundleError::Io { path: dir.join(left), source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn spec(image: &Runnable, request: &Request) -> Result<Spec, BundleError> {
    let defaults = image.config.process();
    let args: Vec<String> = match &request.entrypoint {
        Some(entrypoint) => entrypoint.iter().chain(&request.command).cloned().collect(),
        None => {
            let command =
                if request.command.is_empty() { defaults.cmd.unwrap_or_default() } else { request.command.clone() };
            defaults.entrypoint.unwrap_or_default().into_iter().chain(command).collect()
        }
    };
    if args.first().is_none_or(String::is_empty) {
        return Err(BundleError::NoCommand);
    }
    let user = request.user.clone().or(defaults.user).unwrap_or_default();
    let user = user::resolve(&user, &image.layers).map_err(BundleError::User)?;
    let workdir = request.workdir.clone().or(defaults.working_dir).filter(|dir| !dir.is_empty());
    let workdir = workdir.unwrap_or_else(|| "/".to_owned());
    if !workdir.starts_with('/') {
        return Err(BundleError::Workdir(workdir));
    }
    let home = user.home.clone().unwrap_or_else(|| "/".to_owned());
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", request.hostname), format!("HOME={home}")];
    for entry in defaults.env.unwrap_or_default().into_iter().chain(request.env.iter().cloned()) {
        set(&mut env, entry);
    }
    let capabilities: Capabilities = CAPABILITIES.into_iter().collect();
    let held = if user.uid == 0 { capabilities.clone() } else { Capabilities::new() };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(capabilities)
        .permitted(held.clone())
        .effective(held)
        // Never inheritable: CVE-2022-24769.
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()?;
    let process = ProcessBuilder::default()
        .args(args)
        .env(env)
        .cwd(workdir)
        .user(UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.groups).build()?)
        .capabilities(capabilities)
        .no_new_privileges(true)
        .rlimits(Vec::new())
        .build()?;
    Ok(SpecBuilder::default()
        .version("1.2.0")
        .process(process)
        .root(RootBuilder::default().path("rootfs").readonly(false).build()?)
        .hostname(request.hostname.clone())
        .mounts(mounts()?)
        .linux(linux(request)?)
        .build()?)
}

fn set(env: &mut Vec<String>, entry: String) {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    match env.iter_mut().find(|old| name(old) == name(&entry)) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}

fn linux(request: &Request) -> Result<oci_spec::runtime::Linux, OciSpecError> {
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces = namespaces
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build())
        .collect::<Result<Vec<_>, _>>()?;
    let mut resources = LinuxResourcesBuilder::default();
    if request.limits.memory > 0 {
        resources = resources.memory(LinuxMemoryBuilder::default().limit(request.limits.memory as i64).build()?);
    }
    if request.limits.cpu_milli > 0 {
        let quota = (request.limits.cpu_milli * 100).max(1000) as i64;
        resources = resources.cpu(LinuxCpuBuilder::default().quota(quota).period(100_000u64).build()?);
    }
    if request.limits.pids > 0 {
        resources = resources.pids(LinuxPidsBuilder::default().limit(request.limits.pids as i64).build()?);
    }
    let paths = |list: &[&str]| list.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources.build()?)
        .cgroups_path(Path::new("/").join(&request.cgroup))
        .masked_paths([paths(&MASKED), paths(&MASKED_TOO)].concat())
        .readonly_paths(paths(&READ_ONLY))
        .build()
}

fn mounts() -> Result<Vec<Mount>, OciSpecError> {
    let mount = |to: &str, kind: &str, from: &str, options: &[&str]| {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        MountBuilder::default().destination(to).typ(kind).source(from).options(options).build()
    };
    Ok(vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/etc/hosts", "bind", "hosts", &["rbind", "rprivate"])?,
        mount("/etc/hostname", "bind", "hostname", &["rbind", "rprivate"])?,
        mount("/etc/resolv.conf", "bind", "resolv.conf", &["rbind", "rprivate"])?,
    ])
}

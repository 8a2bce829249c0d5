//! An OCI runtime-spec bundle, made from an image's config and what the workload asks for.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder, LinuxCpu, LinuxCpuBuilder,
    LinuxIdMappingBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder,
    LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, ProcessBuilder,
    RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use super::disks::{DiskError, Throttle, block_io};
use super::{Launch, SOCKET, user};
use crate::cdi::{self, DeviceError, Edits};
use crate::launch::Kind;
use crate::oci::Usual;
use crate::rootless::{has_ids, is_rootless};
use crate::seccomp;
use crate::store::Runnable;

/// The group of terminals, on Debian and its kin, and in docker's containers.
const TTY: u32 = 5;
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

/// What a container may use; zero is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Its share of the processors, as cgroup v1 counts it.
    pub cpu_shares: Option<u64>,
    /// Processors that it runs on, as a list (cpuset(7)).
    pub cpus: Option<String>,
    /// Memory nodes that its memory is of, as a list.
    pub mems: Option<String>,
    /// Bytes of memory and swap together, -1 for any; as much as its memory where none is said.
    pub memory_and_swap: Option<i64>,
}

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
    /// Bytes that its writable layer may have.
    pub storage: Option<u64>,
    /// Bytes of its `/dev/shm`.
    pub shm_size: Option<u64>,
    /// What each of its processes may have: name without `RLIMIT_`, soft and hard limit.
    pub rlimits: Vec<(String, u64, u64)>,
    /// Settings of the kernel for its namespaces.
    pub sysctls: HashMap<String, String>,
    /// What is put into it, in order.
    pub puts: Vec<Put>,
    /// Its own files cannot be changed.
    pub read_only: bool,
    /// Capabilities beyond the usual, without `CAP_`.
    pub cap_add: Vec<String>,
    /// Capabilities of the usual that it does not get; `ALL` is every one.
    pub cap_drop: Vec<String>,
    /// Of a strict sandbox: what its root is on the machine.
    pub strict: Option<u32>,
    /// What network it has.
    pub network: Network,
    /// How it finds others by name.
    pub lookup: Lookup,
    /// Devices of the machine, and what comes with them.
    pub devices: Vec<Edits>,
    /// Process 1 is not its program, but looks after that.
    pub init: bool,
    /// It runs on a terminal.
    pub terminal: bool,
    /// Somebody may write to its standard input.
    pub input: bool,
    /// The OCI runtime that makes it, instead of this program.
    pub runtime: Option<PathBuf>,
    /// Its share of the disks, 10 to 1,000.
    pub io_weight: Option<u16>,
    /// What of disks it may use at the most.
    pub throttles: Vec<Throttle>,
}

impl Request {
    /// What it has in common with others, as a container of that image.
    pub fn kind(&self, image: &Runnable) -> Kind {
        let limits = &self.limits;
        let unusual_groups =
            limits.cpus.is_some() || limits.mems.is_some() || self.io_weight.is_some() || !self.throttles.is_empty();
        let own_way = self.strict.is_some() || self.runtime.is_some() || self.storage.is_some();
        let lazy = image.file.as_ref().is_some_and(|file| file.lazy.is_some());
        match self.network {
            _ if own_way || unusual_groups || lazy || self.terminal || self.input => Kind::Other,
            // What comes with a device may be hooks.
            _ if !self.devices.is_empty() => Kind::Other,
            Network::Alone => Kind::Alone,
            Network::Joined { .. } | Network::Host => Kind::Joined,
        }
    }
}

/// What network a container has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// A namespace of its own, with nothing but itself in it.
    #[default]
    Alone,
    /// The machine's.
    Host,
    /// A namespace that was made for it ([`crate::network::Endpoint`]).
    Joined {
        /// Where it is found while the container starts.
        namespace: PathBuf,
        /// Its address there.
        address: Ipv4Addr,
        /// The machine's, as it is reached from there.
        gateway: Ipv4Addr,
        /// Who answers for names; without one the machine's own are asked.
        nameserver: Option<Ipv4Addr>,
    },
}

/// How a container finds others by name, over what the machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Lines of its hosts file; without an address it is the machine.
    pub hosts: Vec<(String, Option<IpAddr>)>,
    /// Who is asked; of a network that has a nameserver, by that one.
    pub servers: Vec<IpAddr>,
    /// Domains in which names are looked for.
    pub search: Vec<String>,
    /// What resolvers mind.
    pub options: Vec<String>,
}

/// One thing that is put into a container.
#[derive(Clone, Debug)]
pub struct Put {
    /// A folder or file of the machine, without links in its path; none is memory.
    pub source: Option<PathBuf>,
    /// Where it appears.
    pub target: String,
    /// It can only be read.
    pub read_only: bool,
    /// The most bytes of memory; zero is the kernel's limit, half of the machine's.
    pub size: u64,
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
    /// A device is not there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A disk that is to be limited is none, or not there.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A limit of processes that there is not.
    #[error("there is no limit `{0}`")]
    Limit(String),
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
    let launch = Launch {
        layers: image.layers.clone(),
        file: image.file.clone(),
        cgroup: request.cgroup.clone(),
        shifted_by: request.strict,
        input: request.input,
        runtime: request.runtime.clone(),
        storage: request.storage,
        // Of memory /dev and /dev/shm are left, with 64 MiB each at the most.
        lingers: request.puts.is_empty() && request.devices.is_empty() && request.shm_size.is_none(),
    };
    let files: [(&str, Vec<u8>); 5] = [
        ("config.json", serde_json::to_vec(&spec).expect("a spec is plain data")),
        ("launch.json", serde_json::to_vec(&launch).expect("plain data")),
        ("hosts", hosts(request).into_bytes()),
        ("hostname", format!("{}\n", request.hostname).into_bytes()),
        ("resolv.conf", resolv_conf(&machine_resolv_conf(), &request.network, &request.lookup).into_bytes()),
    ];
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::write(&path, bytes).map_err(|source| BundleError::Io { path, source })?;
    }
    for left in ["exit.json", SOCKET] {
        match fs::remove_file(dir.join(left)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(BundleError::Io { path: dir.join(left), source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn hosts(request: &Request) -> String {
    let (own, machine) = match request.network {
        Network::Joined { address, gateway, .. } => (address, Some(gateway)),
        // Debian's, for a machine that has no address of its own.
        Network::Host => (Ipv4Addr::new(127, 0, 1, 1), Some(Ipv4Addr::LOCALHOST)),
        Network::Alone => (Ipv4Addr::new(127, 0, 1, 1), None),
    };
    let added = request.lookup.hosts.iter().filter_map(|(name, address)| {
        let address = address.or(machine.map(IpAddr::V4))?;
        Some(format!("{address}\t{name}\n"))
    });
    let usual = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let all = usual + &format!("{own}\t{}\n", request.hostname);
    all + &added.collect::<String>()
}

fn machine_resolv_conf() -> String {
    // Without the file there is nobody to ask; resolv.conf(5) has a default for that.
    fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
}

/// Whom it asks for names, and how. Its own loopback is not the machine's: what listens there (a stub of systemd-resolved, dnsmasq) is
/// left out.
fn resolv_conf(machine: &str, network: &Network, lookup: &Lookup) -> String {
    let nameserver = if let Network::Joined { nameserver, .. } = network { *nameserver } else { None };
    let servers: Vec<IpAddr> = match nameserver {
        // It asks those that are asked for.
        Some(server) => vec![server.into()],
        None => lookup.servers.clone(),
    };
    let has_own_loopback = *network != Network::Host;
    let stays = |line: &&str| match line.split_ascii_whitespace().next() {
        Some("nameserver") => {
            let server = line.split_ascii_whitespace().nth(1).and_then(|server| server.parse().ok());
            let is_loopback = server.is_some_and(|server: IpAddr| server.is_loopback());
            servers.is_empty() && !(has_own_loopback && is_loopback)
        }
        Some("search" | "domain") => lookup.search.is_empty(),
        Some("options") => lookup.options.is_empty(),
        _ => true,
    };
    let servers = servers.iter().map(|server| format!("nameserver {server}\n"));
    let mut text: String = servers.chain(machine.lines().filter(stays).map(|line| format!("{line}\n"))).collect();
    for (what, words) in [("search", &lookup.search), ("options", &lookup.options)] {
        // A lone dot asks for no domain at all.
        if !words.is_empty() && *words != ["."] {
            text += &format!("{what} {}\n", words.join(" "));
        }
    }
    text
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
    let user = user::resolve(&user, &image.accounts).map_err(BundleError::User)?;
    let workdir = request.workdir.clone().or(defaults.working_dir).filter(|dir| !dir.is_empty());
    let workdir = workdir.unwrap_or_else(|| "/".to_owned());
    if !workdir.starts_with('/') {
        return Err(BundleError::Workdir(workdir));
    }
    let home = user.home.clone().unwrap_or_else(|| "/".to_owned());
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", request.hostname), format!("HOME={home}")];
    if request.terminal {
        // As docker does: what the image or the user says of it comes after.
        env.push("TERM=xterm".to_owned());
    }
    for entry in defaults.env.unwrap_or_default().into_iter().chain(request.env.iter().cloned()) {
        set(&mut env, entry);
    }
    let capabilities = capabilities(request);
    let held = if user.uid == 0 { capabilities.clone() } else { Capabilities::new() };
    let capabilities = capability_sets(capabilities, held)?;
    let process = ProcessBuilder::default()
        .args(args)
        .env(env)
        .terminal(request.terminal)
        .cwd(workdir)
        .user(UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.groups).build()?)
        .capabilities(capabilities)
        .no_new_privileges(true)
        .rlimits(request.rlimits.iter().map(rlimit).collect::<Result<Vec<_>, _>>()?)
        .build()?;
    let mut spec = SpecBuilder::default()
        .version("1.0.2")
        .process(process)
        .root(root(request)?)
        .hostname(request.hostname.clone())
        .mounts(mounts(request)?)
        .linux(linux(request)?)
        .build()?;
    // The builder's default has some.
    spec.set_hooks(None);
    if request.init {
        spec.set_annotations(Some(HashMap::from([(crate::oci::INIT.to_owned(), "true".to_owned())])));
    }
    cdi::apply(&mut spec, &request.devices)?;
    Ok(spec)
}

fn capability_sets(bounding: Capabilities, held: Capabilities) -> Result<LinuxCapabilities, OciSpecError> {
    LinuxCapabilitiesBuilder::default()
        .bounding(bounding)
        .permitted(held.clone())
        .effective(held)
        // Never inheritable: CVE-2022-24769.
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()
}

/// An ordinary container that runs a shell in the folder `rootfs`: what `moyai oci spec` writes.
pub fn example() -> Result<Spec, BundleError> {
    let request = Request { hostname: "moyai".to_owned(), ..Request::default() };
    let held = capabilities(&request);
    let sets = capability_sets(held.clone(), held)?;
    let process = ProcessBuilder::default()
        .terminal(true)
        .args(vec!["sh".to_owned()])
        .env(vec![PATH.to_owned(), "TERM=xterm".to_owned()])
        .cwd("/")
        .user(UserBuilder::default().uid(0u32).gid(0u32).build()?)
        .capabilities(sets)
        .no_new_privileges(true)
        .rlimits(Vec::new())
        .build()?;
    let mut linux = linux(&request)?;
    linux.set_cgroups_path(None);
    // What is bound in lies beside a node's own bundles.
    let mounts = mounts(&request)?.into_iter().filter(|mount| mount.typ().as_deref() != Some("bind"));
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .process(process)
        .root(root(&request)?)
        .hostname(request.hostname.clone())
        .mounts(mounts.collect::<Vec<_>>())
        .linux(linux)
        .build()?;
    Ok(spec)
}

fn root(request: &Request) -> Result<oci_spec::runtime::Root, OciSpecError> {
    let path = if request.strict.is_some() { super::OPEN_ROOT } else { "rootfs" };
    RootBuilder::default().path(path).readonly(request.read_only || request.strict.is_some()).build()
}

/// The capability of a name, without `CAP_`.
pub(super) fn capability(name: &str) -> Option<Capability> {
    serde_json::from_value(serde_json::Value::String(format!("CAP_{name}"))).ok()
}

/// Docker's usual ones, with what was asked for; none in a strict sandbox.
fn capabilities(request: &Request) -> Capabilities {
    if request.strict.is_some() {
        return Capabilities::new();
    }
    let listed = |names: &[String], name: &str| names.iter().any(|other| other == name);
    let named = |names: &[String]| names.iter().filter_map(|name| capability(name)).collect::<Capabilities>();
    let mut set: Capabilities = if listed(&request.cap_drop, "ALL") {
        Capabilities::new()
    } else {
        let dropped = named(&request.cap_drop);
        CAPABILITIES.into_iter().filter(|capability| !dropped.contains(capability)).collect()
    };
    set.extend(named(&request.cap_add));
    set
}

fn set(env: &mut Vec<String>, entry: String) {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    match env.iter_mut().find(|old| name(old) == name(&entry)) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}

fn linux(request: &Request) -> Result<oci_spec::runtime::Linux, BundleError> {
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Cgroup,
    ];
    let users = request.strict.map(|_| LinuxNamespaceType::User);
    let mut namespaces = namespaces
        .into_iter()
        .chain(users)
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build())
        .collect::<Result<Vec<_>, _>>()?;
    let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    match &request.network {
        Network::Alone => namespaces.push(network.build()?),
        Network::Joined { namespace, .. } => namespaces.push(network.path(namespace.clone()).build()?),
        Network::Host => {}
    }
    let mut resources = LinuxResourcesBuilder::default();
    if request.limits.memory > 0 {
        // Docker's default allows as much swap again; a limit that a host's swap softens surprises more.
        let limit = request.limits.memory as i64;
        let both = request.limits.memory_and_swap.unwrap_or(limit);
        resources = resources.memory(LinuxMemoryBuilder::default().limit(limit).swap(both).build()?);
    }
    if let Some(cpu) = cpu(&request.limits)? {
        resources = resources.cpu(cpu);
    }
    if let Some(io) = block_io(request.io_weight, &request.throttles)? {
        resources = resources.block_io(io);
    }
    if request.limits.pids > 0 {
        resources = resources.pids(LinuxPidsBuilder::default().limit(request.limits.pids as i64).build()?);
    }
    let paths = |list: &[&str]| list.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    let profile = match request.strict {
        // The shim answers; nobody listens at a path.
        Some(_) => seccomp::strict_profile(seccomp::ASKS_SHIM),
        None => seccomp::default_profile(),
    };
    let mut linux = LinuxBuilder::default();
    if let Some(base) = request.strict {
        let ids = LinuxIdMappingBuilder::default().container_id(0u32).host_id(base).size(super::IDS).build()?;
        linux = linux.uid_mappings(vec![ids]).gid_mappings(vec![ids]);
    }
    if !request.sysctls.is_empty() {
        linux = linux.sysctl(request.sysctls.clone());
    }
    let linux = linux
        .namespaces(namespaces)
        .resources(resources.build()?)
        .cgroups_path(Path::new("/").join(&request.cgroup))
        .seccomp(profile)
        .masked_paths([paths(&MASKED), paths(&MASKED_TOO)].concat())
        .readonly_paths(paths(&READ_ONLY))
        .build()?;
    Ok(linux)
}

fn cpu(limits: &Limits) -> Result<Option<LinuxCpu>, OciSpecError> {
    let Limits { cpu_milli, cpu_shares, cpus, mems, .. } = limits;
    if *cpu_milli == 0 && cpu_shares.is_none() && cpus.is_none() && mems.is_none() {
        return Ok(None);
    }
    let mut cpu = LinuxCpuBuilder::default().build()?;
    if *cpu_milli > 0 {
        cpu.set_quota(Some((cpu_milli * 100).max(1000) as i64)).set_period(Some(100_000));
    }
    cpu.set_shares(*cpu_shares).set_cpus(cpus.clone()).set_mems(mems.clone());
    Ok(Some(cpu))
}

/// What the specification calls the limit of a process that is called `name` here.
pub(crate) fn limit_kind(name: &str) -> Option<PosixRlimitType> {
    serde_json::from_value(format!("RLIMIT_{}", name.to_ascii_uppercase()).into()).ok()
}

fn rlimit((name, soft, hard): &(String, u64, u64)) -> Result<PosixRlimit, BundleError> {
    let kind = limit_kind(name).ok_or_else(|| BundleError::Limit(name.clone()))?;
    Ok(PosixRlimitBuilder::default().typ(kind).soft(*soft).hard(*hard).build()?)
}

/// What most containers have mounted on and below `/proc` and `/dev`, and `with_groups` their cgroups, with `/sys` below these where that
/// shows a network of their own.
pub(crate) fn usual(own_network: bool, with_groups: bool) -> Vec<Usual> {
    let all = mounts(&Request::default()).unwrap_or_default();
    let masked = [&MASKED[..], &MASKED_TOO].concat();
    let usual = |top: &str, wanted: &dyn Fn(&str) -> bool| {
        let is_wanted = |mount: &&Mount| mount.destination().to_str().is_some_and(wanted);
        let entries: Vec<Mount> = all.iter().filter(is_wanted).cloned().collect();
        let is_there = entries.iter().any(|mount| mount.destination() == Path::new(top));
        let below = |list: &[&str]| {
            let paths = list.iter().filter(|path| is_there && Path::new(path).starts_with(top));
            paths.map(|path| (*path).to_owned()).collect()
        };
        Usual { masked: below(&masked), read_only: below(&READ_ONLY), entries }
    };
    let is_sys = |to: &str| with_groups && (own_network && to == "/sys" || to == "/sys/fs/cgroup");
    let parts =
        [usual("/proc", &|to| to == "/proc"), usual("/dev", &|to| to.starts_with("/dev")), usual("/sys", &is_sys)];
    parts.into_iter().filter(|usual| !usual.entries.is_empty()).collect()
}

fn mounts(request: &Request) -> Result<Vec<Mount>, OciSpecError> {
    let mount = |to: &str, kind: &str, from: &str, options: &[&str]| {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        MountBuilder::default().destination(to).typ(kind).source(from).options(options).build()
    };
    // An ordinary user without more ids has no group for terminals.
    let terminals: &[&str] = match has_ids(TTY) {
        true => &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        false => &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    };
    let shm_size = format!("size={}", request.shm_size.unwrap_or(64 << 20));
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount("/dev/pts", "devpts", "devpts", terminals)?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/etc/hosts", "bind", "hosts", &["rbind", "rprivate"])?,
        mount("/etc/hostname", "bind", "hostname", &["rbind", "rprivate"])?,
        mount("/etc/resolv.conf", "bind", "resolv.conf", &["rbind", "rprivate"])?,
    ];
    if request.strict.is_some() {
        // Nothing of the machine is to be seen: no /sys. What it writes, it writes to memory that is limited with it.
        for folder in ["/tmp", "/run", "/var/tmp"] {
            let options = ["nosuid", "nodev", "noexec", "mode=1777", "size=64m"];
            mounts.push(mount(folder, "tmpfs", "tmpfs", &options)?);
        }
    } else if is_rootless() {
        // Only who owns a network may have a view of it mounted; no group of cgroups is an ordinary user's.
        mounts.push(match request.network {
            Network::Host => mount("/sys", "bind", "/sys", &["rbind", "rprivate", "nosuid", "noexec", "nodev", "rro"])?,
            _ => mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        });
    } else {
        mounts.push(mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?);
        mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"])?);
    }
    for put in &request.puts {
        let access = if put.read_only { "ro" } else { "rw" };
        mounts.push(match &put.source {
            Some(source) => {
                // With what is mounted below it; what is read-only there stays so.
                let mut options = vec!["rbind", "rprivate", "rnosuid", "rnodev"];
                if put.read_only {
                    options.push("rro");
                }
                if request.strict.is_some() {
                    options.push("idmap");
                }
                mount(&put.target, "bind", &source.to_string_lossy(), &options)?
            }
            None => {
                let size = format!("size={}", put.size);
                let mut options = vec!["nosuid", "nodev", "mode=1777", access];
                if put.size > 0 {
                    options.push(&size);
                }
                mount(&put.target, "tmpfs", "tmpfs", &options)?
            }
        });
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_as_asked_for_and_otherwise_as_the_machine_does() {
        let machine = "# of the lab\nnameserver 127.0.0.53\nnameserver 10.0.0.53\nsearch lab.example\noptions edns0\n";
        let (address, gateway) = (Ipv4Addr::new(10, 210, 0, 2), Ipv4Addr::new(10, 210, 0, 1));
        let joined = |nameserver| Network::Joined { namespace: PathBuf::new(), address, gateway, nameserver };
        let usual = Lookup::default();
        assert_eq!(
            resolv_conf(machine, &joined(Some(gateway)), &usual),
            "nameserver 10.210.0.1\n# of the lab\nsearch lab.example\noptions edns0\n"
        );
        // Where the node cannot answer at the bridge.
        let others = "# of the lab\nnameserver 10.0.0.53\nsearch lab.example\noptions edns0\n";
        assert_eq!(resolv_conf(machine, &joined(None), &usual), others);
        assert_eq!(resolv_conf(machine, &Network::Host, &usual), machine);
        let asked = Lookup {
            servers: vec![[9, 9, 9, 9].into()],
            search: vec!["a.example".to_owned(), "b.example".to_owned()],
            options: vec!["ndots:2".to_owned()],
            ..Lookup::default()
        };
        let own = "search a.example b.example\noptions ndots:2\n";
        assert_eq!(
            resolv_conf(machine, &joined(Some(gateway)), &asked),
            format!("nameserver 10.210.0.1\n# of the lab\n{own}")
        );
        for network in [joined(None), Network::Host, Network::Alone] {
            assert_eq!(resolv_conf(machine, &network, &asked), format!("nameserver 9.9.9.9\n# of the lab\n{own}"));
        }
        let request = |network| Request {
            hostname: "web".to_owned(),
            network,
            lookup: Lookup {
                hosts: vec![("db".to_owned(), Some([10, 0, 0, 7].into())), ("node".to_owned(), None)],
                ..Lookup::default()
            },
            ..Request::default()
        };
        let lines = hosts(&request(joined(None)));
        assert!(lines.ends_with("10.210.0.2\tweb\n10.0.0.7\tdb\n10.210.0.1\tnode\n"), "{lines}");
        assert!(hosts(&request(Network::Host)).ends_with("10.0.0.7\tdb\n127.0.0.1\tnode\n"));
        assert!(hosts(&request(Network::Alone)).ends_with("10.0.0.7\tdb\n"));
    }
}

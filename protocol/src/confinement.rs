//! What a container is given of its machine beyond its image, and what it is kept from.
//!
//! The names are docker's. What a machine gives of itself is that machine's to say: its node has [`Offers`], and refuses to bid on
//! what asks for more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::limits::{Io, Limits, OWN_DISK, UNLIMITED, Ulimit, numbers};
use crate::lookup::Lookup;
use crate::workload::{SpecError, is_name};

/// The most mounts of one container.
pub const MAX_MOUNTS: usize = 64;
/// The most published ports of one container.
pub const MAX_PORTS: usize = 256;
/// The most devices that one container asks for by name.
pub const MAX_DEVICES: usize = 64;

/// See above; the default is an ordinary container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Confinement {
    /// What is put into it, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Whether its own files cannot be changed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Capabilities beyond the usual, without `CAP_`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_add: Vec<String>,
    /// Capabilities of the usual that it does not get; `ALL` is every one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_drop: Vec<String>,
    /// How hostile it may be.
    pub sandbox: Sandbox,
    /// What network it has; none said is the bridge, and no network in a strict sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Ports of its machine that lead into it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Devices of its machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// The OCI runtime that makes it, instead of the built-in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// How much of its machine's disks it has.
    #[serde(skip_serializing_if = "Io::is_usual")]
    pub io: Io,
    /// What it has of its machine's other parts.
    #[serde(skip_serializing_if = "Limits::is_usual")]
    pub limits: Limits,
    /// Whether process 1 in it is not its program, but waits for orphans and passes signals on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub init: bool,
    /// How it finds others by name.
    #[serde(skip_serializing_if = "Lookup::is_usual")]
    pub lookup: Lookup,
}

/// What network a container has.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// Its machine's bridge, with an address of its own and a way out.
    Bridge,
    /// Its machine's own, which the machine must offer.
    Host,
    /// Itself alone.
    None,
}

/// A port of the machine that leads into the container.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// At which of the machine's addresses; none is at each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<Ipv4Addr>,
    /// Of the machine.
    pub host: u16,
    /// Of the container.
    pub container: u16,
    /// UDP instead of TCP.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub udp: bool,
}

impl Port {
    /// Whether one machine cannot have both.
    pub fn clashes(&self, other: &Port) -> bool {
        let apart = matches!((self.host_ip, other.host_ip), (Some(one), Some(two)) if one != two);
        self.host == other.host && self.udp == other.udp && !apart
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ip) = self.host_ip {
            write!(f, "{ip}:")?;
        }
        write!(f, "{}:{}{}", self.host, self.container, if self.udp { "/udp" } else { "" })
    }
}

/// A device of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A device node, which the machine must offer.
    Node {
        /// Where it is on the machine.
        source: String,
        /// Where it appears inside.
        target: String,
        /// Some of `r`, `w` and `m`.
        access: String,
    },
    /// One that the machine's CDI files name (Container Device Interface).
    Named {
        /// `vendor/class`.
        kind: String,
        /// Which of it.
        name: String,
    },
    /// So many of a kind, whichever are free.
    Count {
        /// `vendor/class`, or a class of any vendor.
        kind: String,
        /// How many; zero is all that the machine has.
        count: u32,
    },
}

/// What a machine gives to containers besides processors and memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// Folders, with all below them, and device nodes.
    pub paths: Vec<String>,
    /// Its own network.
    pub host_network: bool,
    /// Devices of its CDI files: names by `vendor/class`.
    pub devices: BTreeMap<String, Vec<String>>,
    /// OCI runtimes that are installed there.
    pub runtimes: Vec<String>,
    /// Processors that its containers may run on.
    pub processors: BTreeSet<u32>,
    /// Memory nodes (NUMA) that they may have memory of.
    pub memory_nodes: BTreeSet<u32>,
    /// The highest hard limits of processes that it may give, by their names ([`ULIMITS`](crate::limits::ULIMITS)); of those that are
    /// not here any.
    pub ulimits: BTreeMap<String, u64>,
    /// Controllers of cgroups that containers would be limited by, and that it has not.
    pub missing_controllers: BTreeSet<String>,
    /// Capabilities, without `CAP_`, that its node has not got itself.
    pub missing_capabilities: BTreeSet<String>,
    /// Its node runs as an ordinary user: it has no bridge, no limits and no ids for a strict sandbox.
    pub ordinary: bool,
}

impl Offers {
    /// What `asked` wants and this machine does not give to anybody, in words.
    pub fn lacks(&self, asked: &Confinement) -> Option<String> {
        if asked.network() == Network::Host && !self.host_network {
            return Some("its own network".to_owned());
        }
        if self.ordinary {
            let bridge = asked.network == Some(Network::Bridge)
                || !asked.ports.is_empty()
                || (asked.lookup.names_machine() && asked.network() == Network::Bridge);
            let lacks = |what: &str| Some(format!("{what}, as it runs as an ordinary user"));
            if bridge {
                return lacks("a bridge");
            }
            if asked.sandbox == Sandbox::Strict {
                return lacks("a strict sandbox");
            }
            if !asked.io.is_usual() {
                return lacks("limits of its disks");
            }
            if asked.limits.need_root() {
                return lacks("shares and limits of its processors, memory and storage");
            }
        }
        let sets = asked.limits.cpus.is_some() || asked.limits.mems.is_some();
        let limited = [
            (sets, "cpuset", "sets of processors or memory nodes"),
            (!asked.io.is_usual(), "io", "limits of its disks"),
        ];
        let lacking =
            |(asked, controller, _): &(bool, &str, &str)| *asked && self.missing_controllers.contains(*controller);
        if let Some((_, controller, what)) = limited.into_iter().find(lacking) {
            return Some(format!("{what}, as it has no {controller} controller in its cgroups"));
        }
        if let Some(name) = asked.cap_add.iter().find(|name| self.missing_capabilities.contains(*name)) {
            return Some(format!("the capability {name}, as its node has not got it"));
        }
        for Ulimit { name, hard, .. } in &asked.limits.ulimits {
            if let Some(most) = self.ulimits.get(name).filter(|most| hard > most) {
                let asked = if *hard == UNLIMITED { "no limit".to_owned() } else { format!("a limit of {hard}") };
                return Some(format!("{asked} for {name}, as it may not give more than {most}"));
            }
        }
        let parts = [
            ("processor", &asked.limits.cpus, &self.processors),
            ("memory node", &asked.limits.mems, &self.memory_nodes),
        ];
        for (what, asked, given) in parts {
            let asked = asked.as_deref().and_then(numbers).unwrap_or_default();
            if let Some(number) = asked.difference(given).next() {
                return Some(format!("{what} {number}"));
            }
        }
        if let Some(runtime) = asked.runtime.as_ref().filter(|runtime| !self.runtimes.contains(runtime)) {
            return Some(format!("the OCI runtime {runtime}"));
        }
        let bound = asked.mounts.iter().filter(|mount| mount.kind == MountKind::Bind).map(|mount| &mount.source);
        let nodes = asked.devices.iter().filter_map(|device| match device {
            Device::Node { source, .. } => Some(source),
            _ => None,
        });
        let disks = asked.io.limits.iter().map(|limit| &limit.path);
        let disks = disks.filter(|path| *path != OWN_DISK && !path.starts_with("/dev/"));
        if let Some(path) = bound.chain(nodes).chain(disks).find(|path| !self.gives(path)) {
            return Some(path.clone());
        }
        asked.devices.iter().find_map(|device| match device {
            Device::Named { kind, name } => {
                let known = self.devices.get(kind).is_some_and(|names| names.contains(name));
                (!known).then(|| format!("{kind}={name}"))
            }
            Device::Count { kind, count } => {
                let all: usize = self.of_kind(kind).map(|(_, names)| names.len()).sum();
                (all == 0 || (*count as usize) > all).then(|| format!("{} {kind}", (*count).max(1)))
            }
            Device::Node { .. } => None,
        })
    }

    /// Whether `path` or a folder above it is given. Where it leads by links is the machine's to see when it is bound.
    fn gives(&self, path: &str) -> bool {
        let below = |offer: &String| {
            let rest = path.strip_prefix(offer.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.paths.iter().any(below)
    }

    /// Devices of a kind, or of a class of any vendor.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a String, &'a Vec<String>)> {
        self.devices.iter().filter(move |(other, _)| is_of_kind(other, kind))
    }

    /// How many containers that each ask for `asked` have devices beside those of `held`; else what is not free even for one. A
    /// class of any vendor and a kind of that class count against each other whole: which of them a container was given is
    /// said when it starts.
    pub fn copies<'a>(
        &self,
        asked: &Confinement,
        held: impl Iterator<Item = &'a Confinement> + Clone,
    ) -> Result<usize, String> {
        let mut copies = usize::MAX;
        let all = |kind: &str| self.of_kind(kind).map(|(_, names)| names.len()).sum::<usize>();
        let wanted = |device: &Device| match device {
            Device::Node { .. } => 0,
            Device::Named { .. } => 1,
            Device::Count { kind, count: 0 } => all(kind),
            Device::Count { count, .. } => *count as usize,
        };
        let meets = |device: &Device, kind: &str| {
            device.kind().is_some_and(|other| is_of_kind(other, kind) || is_of_kind(kind, other))
        };
        for device in &asked.devices {
            let Some(kind) = device.kind() else { continue };
            if let Device::Named { name, .. } = device {
                if held.clone().any(|held| held.devices.contains(device)) {
                    return Err(format!("{kind}={name}"));
                }
                copies = copies.min(1);
            }
            let of_kind =
                |devices: &[Device]| devices.iter().filter(|other| meets(other, kind)).map(wanted).sum::<usize>();
            let used: usize = held.clone().map(|held| of_kind(&held.devices)).sum();
            let each = of_kind(&asked.devices).max(1);
            match all(kind).saturating_sub(used) / each {
                0 => return Err(kind.to_owned()),
                fit => copies = copies.min(fit),
            }
        }
        Ok(copies)
    }
}

impl Device {
    /// Of which kind it is, if it is one that is counted.
    fn kind(&self) -> Option<&str> {
        match self {
            Device::Node { .. } => None,
            Device::Named { kind, .. } | Device::Count { kind, .. } => Some(kind),
        }
    }
}

/// Whether `known`, `vendor/class`, is of the kind `asked`, which may be a class alone.
fn is_of_kind(known: &str, asked: &str) -> bool {
    known == asked || known.split_once('/').is_some_and(|(_, class)| class == asked)
}

/// How hostile what runs in a container may be.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// As docker has it.
    #[default]
    Standard,
    /// For what is known to be hostile: its root is nobody outside, it has no capability, its files are read-only, it reaches
    /// no network, and what it tries beyond a short list of calls is refused and written down.
    Strict,
}

/// One thing that is put into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What.
    pub kind: MountKind,
    /// A folder of the machine, or a volume's name; empty for a tmpfs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Where it appears inside.
    pub target: String,
    /// Whether it can only be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// The most bytes of a tmpfs; zero is half of what the container may use, or of the machine.
    #[serde(default)]
    pub size: u64,
}

/// What is put into a container.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKind {
    /// A folder or file of the machine, which its node must offer.
    Bind,
    /// A folder that the node keeps under a name, and makes when it is asked for first. It stays on its node.
    Volume,
    /// Memory, gone with the container.
    Tmpfs,
}

impl Confinement {
    /// Whether it is an ordinary container.
    pub fn is_usual(&self) -> bool {
        *self == Confinement::default()
    }

    /// What this code would accept from a user.
    pub fn check(&self) -> Result<(), SpecError> {
        if self.mounts.len() > MAX_MOUNTS {
            return Err(SpecError::Mount {
                target: String::new(),
                reason: format!("{} mounts: {MAX_MOUNTS} at the most", self.mounts.len()),
            });
        }
        self.mounts.iter().try_for_each(Mount::check)?;
        for name in self.cap_add.iter().chain(&self.cap_drop) {
            let good = !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
            if !good || name.len() > 32 {
                return Err(SpecError::Unpassable { what: "capability", value: name.clone() });
            }
        }
        self.io.check()?;
        self.limits.check()?;
        if self.network() == Network::Host
            && let Some(name) = self.limits.sysctls.keys().find(|name| name.starts_with("net."))
        {
            return Err(SpecError::Limit {
                what: format!("sysctl {name}"),
                reason: "on the machine's own network it would be the machine's".to_owned(),
            });
        }
        self.lookup.check(self.network() == Network::Bridge)?;
        if self.network() == Network::None && self.lookup.names_machine() {
            return Err(SpecError::Contradiction { one: "no network", other: "a name for its machine" });
        }
        self.check_network()?;
        self.check_devices()?;
        let strict = self.sandbox == Sandbox::Strict;
        if strict && !self.cap_add.is_empty() {
            return Err(SpecError::Contradiction { one: "the strict sandbox", other: "more capabilities" });
        }
        if strict && self.runtime.is_some() {
            return Err(SpecError::Contradiction { one: "the strict sandbox", other: "another OCI runtime" });
        }
        if self.init && self.runtime.is_some() {
            return Err(SpecError::Contradiction {
                one: "an init that waits for orphans",
                other: "another OCI runtime",
            });
        }
        if let Some(runtime) = self.runtime.as_ref().filter(|runtime| !is_name(runtime)) {
            return Err(SpecError::Name { name: runtime.clone() });
        }
        if strict && self.mounts.iter().any(|mount| mount.kind == MountKind::Bind) {
            return Err(SpecError::Contradiction { one: "the strict sandbox", other: "files of the machine" });
        }
        Ok(())
    }

    /// What network it has.
    pub fn network(&self) -> Network {
        let usual = if self.sandbox == Sandbox::Strict { Network::None } else { Network::Bridge };
        self.network.unwrap_or(usual)
    }

    fn check_network(&self) -> Result<(), SpecError> {
        let wrong =
            |port: &Port, reason: &str| Err(SpecError::Port { port: port.to_string(), reason: reason.to_owned() });
        if self.sandbox == Sandbox::Strict && self.network() != Network::None {
            return Err(SpecError::Contradiction { one: "the strict sandbox", other: "a network" });
        }
        let Some(first) = self.ports.first() else { return Ok(()) };
        if self.network() != Network::Bridge {
            return wrong(first, "only what is on the bridge has ports to publish");
        }
        if self.ports.len() > MAX_PORTS {
            return wrong(first, &format!("{} ports: {MAX_PORTS} at the most", self.ports.len()));
        }
        if let Some(port) = self.ports.iter().find(|port| port.host == 0 || port.container == 0) {
            return wrong(port, "there is no port 0");
        }
        for (at, port) in self.ports.iter().enumerate() {
            if self.ports[..at].iter().any(|other| other.clashes(port)) {
                return wrong(port, "it is published twice");
            }
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), SpecError> {
        let wrong = |device: &str, reason: &str| {
            Err(SpecError::Device { device: device.to_owned(), reason: reason.to_owned() })
        };
        if self.devices.len() > MAX_DEVICES {
            return wrong("", &format!("{} devices: {MAX_DEVICES} at the most", self.devices.len()));
        }
        if self.sandbox == Sandbox::Strict && !self.devices.is_empty() {
            return Err(SpecError::Contradiction { one: "the strict sandbox", other: "devices of the machine" });
        }
        for device in &self.devices {
            match device {
                Device::Node { source, target, access } => {
                    if ![source, target].iter().all(|path| plain(path) && path.len() > 1) {
                        return wrong(source, "its paths are absolute, without `..`");
                    }
                    if access.is_empty() || access.len() > 3 || !access.chars().all(|c| "rwm".contains(c)) {
                        return wrong(source, "how it may be used is some of `r`, `w` and `m`");
                    }
                }
                Device::Named { kind, name } => {
                    // Container Device Interface, SPEC.md, "kind" and "name".
                    let word = |text: &str| {
                        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
                    };
                    let good = kind.split_once('/').is_some_and(|(vendor, class)| word(vendor) && word(class));
                    if !good || !word(name) {
                        return wrong(&format!("{kind}={name}"), "a device of CDI is named vendor/class=name");
                    }
                }
                Device::Count { kind, .. } => {
                    if kind.is_empty() || kind.len() > 255 {
                        return wrong(kind, "it is no kind of devices");
                    }
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn plain(path: &str) -> bool {
    path.starts_with('/') && !path.split('/').any(|part| part == "..") && !path.contains('\0')
}

impl Mount {
    fn check(&self) -> Result<(), SpecError> {
        let wrong = |reason: &str| {
            let (target, reason) = (self.target.clone(), reason.to_owned());
            Err(SpecError::Mount { target, reason })
        };
        if !plain(&self.target) || self.target.trim_matches('/').is_empty() {
            return wrong("where it is to appear is an absolute path without `..`, and not the root");
        }
        match self.kind {
            MountKind::Bind if !plain(&self.source) => wrong("what is bound is an absolute path without `..`"),
            MountKind::Volume if !is_name(&self.source) => {
                wrong("a volume's name has letters, digits, `_`, `.` and `-`, and begins with a letter or digit")
            }
            MountKind::Tmpfs if !self.source.is_empty() => wrong("a tmpfs has no source"),
            _ => Ok(()),
        }
    }
}

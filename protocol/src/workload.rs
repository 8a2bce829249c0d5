//! What a user asks for: an image, what to run in it, how much of a machine, how many times.
//!
//! A [`Spec`] travels as JSON inside a [`SignedSpec`], byte for byte as its submitter signed it, so that a node which
//! does not know a new field still passes it on unchanged. What a node must understand to run the workload safely is
//! named in `requires`: one that does not know a name there refuses to bid.

use std::collections::BTreeMap;
use std::fmt;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::confinement::{Confinement, Port};
use crate::id::{ChunkId, ImageId, MeshId, NodeId, Signature, WorkloadId};
use crate::reference::Reference;
use crate::trust::{Chain, ChainError, Membership, Role, sign, verify};

const DOMAIN: &str = "moyai workload v1";
/// The most bytes a specification may have.
pub const MAX_SPEC: usize = 32 * 1024;
/// The most replicas one workload may ask for.
pub const MAX_REPLICAS: u32 = 1000;
/// The shortest time between two health checks, in milliseconds: each costs a process, and what it changes is told to the mesh.
pub const MIN_INTERVAL: u64 = 500;
/// The longest name.
pub const MAX_NAME: usize = 63;

/// Amounts of a machine.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
}

impl Resources {
    /// Whether `asked` fits into what is left of this after `used`.
    pub fn fits(&self, used: &Resources, asked: &Resources) -> bool {
        used.cpu_milli.saturating_add(asked.cpu_milli) <= self.cpu_milli
            && used.memory.saturating_add(asked.memory) <= self.memory
    }

    /// So many times as much, saturating.
    pub fn times(&self, count: u32) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli.saturating_mul(count.into()),
            memory: self.memory.saturating_mul(count.into()),
        }
    }

    /// The difference, not below zero.
    pub fn minus(&self, other: &Resources) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory: self.memory.saturating_sub(other.memory),
        }
    }

    /// The sum, saturating.
    pub fn plus(&self, other: &Resources) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory: self.memory.saturating_add(other.memory),
        }
    }
}

/// Which image, pinned when it was submitted: a tag that moves later changes nothing that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePin {
    /// The name it was asked for by.
    pub reference: Reference,
    /// SHA-256 of its config.
    pub id: ImageId,
    /// The chunk that lists everything the image is made of.
    pub root: ChunkId,
    /// Bytes of all its chunks.
    pub size: u64,
}

/// What to do when the container exits by itself.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It is finished.
    #[default]
    No,
    /// Start it again when it failed, so many times.
    OnFailure {
        /// Restarts before it is left alone; 0 is without end.
        max: u32,
    },
    /// Start it again, always.
    Always,
}

impl Restart {
    /// Whether a container that exited with `code` after `restarts` restarts is started again.
    pub fn applies(&self, code: i32, restarts: u32) -> bool {
        match *self {
            Restart::No => false,
            Restart::OnFailure { max } => code != 0 && (max == 0 || restarts < max),
            Restart::Always => true,
        }
    }
}

/// How a container is known to be well: a command in it that ends with 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What is run; nothing is no check, whatever the image says.
    pub command: Vec<String>,
    /// Milliseconds between two checks.
    pub interval: u64,
    /// Milliseconds that one may take.
    pub timeout: u64,
    /// So many failures in a row, and it is not well.
    pub retries: u32,
    /// Milliseconds from its start in which failures do not count.
    pub start_period: u64,
}

/// How work is laid out over machines.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Where it runs best.
    #[default]
    Balance,
    /// On as many machines as possible.
    Spread,
    /// On as few as possible.
    Pack,
}

/// The priority of what names none.
pub const PRIORITY: u8 = 50;
/// The highest.
pub const MAX_PRIORITY: u8 = 100;
/// The most names that a workload wants to be near to, or apart from.
pub const MAX_NAMES: usize = 16;

fn default_priority() -> u8 {
    PRIORITY
}

fn is_default_priority(priority: &u8) -> bool {
    *priority == PRIORITY
}

/// What a user asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Chosen by the node it was submitted to.
    pub id: WorkloadId,
    /// Unique in the mesh, as far as the submitting node knew.
    pub name: String,
    /// The image to run.
    pub image: ImagePin,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// `NAME=value`, over the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Replaces the image's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Replaces the image's working folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Replaces the host name inside; the default is the workload's short id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Reserved on the node and enforced by the kernel; zero is no limit.
    pub resources: Resources,
    /// The most processes; zero is no limit.
    #[serde(default)]
    pub pids: u64,
    /// How many are wanted at first.
    pub replicas: u32,
    /// What to do when it exits.
    #[serde(default)]
    pub restart: Restart,
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub on: BTreeMap<String, String>,
    /// Replaces the image's stop signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Seconds between the stop signal and SIGKILL.
    pub stop_timeout: u32,
    /// Whether it is forgotten, with its logs, once all of it has ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_remove: bool,
    /// All replicas or none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gang: bool,
    /// Never two of one replica at once: see [`crate::lease`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub singleton: bool,
    /// It is started as soon as its image's lists are there, and waits for the bytes that it reads.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lazy: bool,
    /// What has a lower one makes way when there is no room; up to [`MAX_PRIORITY`].
    #[serde(default = "default_priority", skip_serializing_if = "is_default_priority")]
    pub priority: u8,
    /// How its replicas are laid out.
    #[serde(default)]
    pub layout: Layout,
    /// Names of workloads on whose nodes it would rather be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub near: Vec<String>,
    /// Names of workloads on whose nodes it must not be; its own name keeps its replicas apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apart: Vec<String>,
    /// Whether it runs on a terminal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub terminal: bool,
    /// Whether somebody may write to its standard input.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub input: bool,
    /// How it is known to be well; none is as its image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// What it is given of its machine, and kept from.
    #[serde(default, skip_serializing_if = "Confinement::is_usual")]
    pub confinement: Confinement,
    /// Names of what a node must understand to run this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
}

/// Why a specification cannot be taken. Nothing was changed; the submitter is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Too large to be passed around.
    #[error("the specification has {len} bytes, {MAX_SPEC} is the most")]
    TooLarge {
        /// How large it is.
        len: usize,
    },
    /// Not the JSON it should be.
    #[error("the specification is malformed: {reason}")]
    Malformed {
        /// What the parser said.
        reason: String,
    },
    /// A name that cannot be one.
    #[error(
        "`{name}` is no name: letters, digits, `_`, `.` and `-`, {MAX_NAME} at most, beginning with a letter or digit"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// Too many or none.
    #[error("{replicas} replicas: between 1 and {MAX_REPLICAS} can be asked for")]
    Replicas {
        /// What was given.
        replicas: u32,
    },
    /// Higher than there is.
    #[error("priority {priority}: {MAX_PRIORITY} is the highest")]
    Priority {
        /// What was given.
        priority: u8,
    },
    /// Too many names to be near to, or apart from.
    #[error("{count} names to be near to or apart from: {MAX_NAMES} of each at the most")]
    Names {
        /// How many.
        count: usize,
    },
    /// Two wishes that no mesh can grant together.
    #[error("{one} and {other} exclude each other")]
    Contradiction {
        /// One of them.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
    /// An environment entry without a name, or anything with a NUL in it.
    #[error("{what} `{value}` cannot be passed to a process")]
    Unpassable {
        /// Which field.
        what: &'static str,
        /// What was given.
        value: String,
    },
    /// A disk that cannot be shared or limited so.
    #[error("disk `{path}`: {reason}")]
    Disk {
        /// Which.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A limit that no container can have.
    #[error("{what}: {reason}")]
    Limit {
        /// Which.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that cannot be put into a container.
    #[error("mount on `{target}`: {reason}")]
    Mount {
        /// Where it was to appear.
        target: String,
        /// What is wrong.
        reason: String,
    },
    /// A health check that could not be one.
    #[error("a health check's interval is half a second or more, its timeout and retries more than 0")]
    Health,
    /// A port that cannot be published.
    #[error("port {port}: {reason}")]
    Port {
        /// As it was asked for.
        port: String,
        /// What is wrong.
        reason: String,
    },
    /// A device that cannot be given.
    #[error("device {device}: {reason}")]
    Device {
        /// As it was asked for.
        device: String,
        /// What is wrong.
        reason: String,
    },
    /// Signed by somebody else, or changed on the way.
    #[error("the signature of workload {} is not its submitter's", id.short())]
    Forged {
        /// Which workload.
        id: WorkloadId,
    },
    /// The submitter is not a member, or was not when it signed.
    #[error("the submitter of workload {} shows {error}", id.short())]
    Submitter {
        /// Which workload.
        id: WorkloadId,
        /// What is wrong with its certificates.
        error: ChainError,
    },
    /// A member that may not submit.
    #[error("node {} has the role {role}, which may not submit", node.short())]
    Role {
        /// Who signed.
        node: NodeId,
        /// What it is.
        role: Role,
    },
}

impl Spec {
    /// What this code would accept from a user.
    pub fn check(&self) -> Result<(), SpecError> {
        if !is_name(&self.name) {
            return Err(SpecError::Name { name: self.name.clone() });
        }
        if self.replicas == 0 || self.replicas > MAX_REPLICAS {
            return Err(SpecError::Replicas { replicas: self.replicas });
        }
        if self.priority > MAX_PRIORITY {
            return Err(SpecError::Priority { priority: self.priority });
        }
        let names = self.near.len().max(self.apart.len());
        if names > MAX_NAMES {
            return Err(SpecError::Names { count: names });
        }
        if let Some(name) = self.near.iter().chain(&self.apart).find(|name| !is_name(name)) {
            return Err(SpecError::Name { name: name.clone() });
        }
        if self.near.iter().any(|name| self.apart.contains(name)) {
            return Err(SpecError::Contradiction { one: "near", other: "apart from the same workload" });
        }
        let words = [("argument", &self.command), ("environment", &self.env)];
        let words = words.into_iter().chain(self.entrypoint.iter().map(|words| ("entrypoint", words)));
        for (what, list) in words {
            if let Some(value) = list.iter().find(|word| word.contains('\0')) {
                return Err(SpecError::Unpassable { what, value: value.replace('\0', "\\0") });
            }
        }
        if let Some(value) = self.env.iter().find(|entry| entry.starts_with('=') || !entry.contains('=')) {
            return Err(SpecError::Unpassable { what: "environment", value: value.clone() });
        }
        if let Some(health) = &self.health {
            if let Some(word) = health.command.iter().find(|word| word.contains('\0')) {
                return Err(SpecError::Unpassable { what: "health check", value: word.replace('\0', "\\0") });
            }
            if health.interval < MIN_INTERVAL || health.timeout == 0 || health.retries == 0 {
                return Err(SpecError::Health);
            }
        }
        self.confinement.limits.check_with(self.resources.memory)?;
        self.confinement.check()
    }
}

impl Spec {
    /// Names of what a node must understand to run this safely.
    pub fn features(&self) -> Vec<String> {
        let (apart, confined) = (!self.apart.is_empty(), !self.confinement.is_usual());
        let networked = self.confinement.network.is_some() || !self.confinement.ports.is_empty();
        let devices = !self.confinement.devices.is_empty();
        let asked = [
            ("gang", self.gang),
            ("singleton", self.singleton),
            ("apart", apart),
            ("confinement", confined),
            ("network", networked),
            ("devices", devices),
            ("io", !self.confinement.io.is_usual()),
            ("limits", !self.confinement.limits.is_usual()),
            ("lookup", !self.confinement.lookup.is_usual()),
            ("init", self.confinement.init),
        ];
        asked.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned()).collect()
    }

    /// The first of its ports that `other` has on the same machine.
    pub fn clashes(&self, other: &Spec) -> Option<Port> {
        let taken = |port: &&Port| other.confinement.ports.iter().any(|other| other.clashes(port));
        self.confinement.ports.iter().find(taken).copied()
    }

    /// Whether it must not be on a node with `other`.
    pub fn shuns(&self, other: &Spec) -> bool {
        self.apart.contains(&other.name)
    }

    /// Whether each of its replicas is to have a node of its own.
    pub fn is_apart_from_itself(&self) -> bool {
        self.apart.contains(&self.name) || !self.confinement.ports.is_empty()
    }
}

/// Whether this can name a workload or a node.
pub fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// A specification as its submitter signed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedSpec {
    /// JSON, verbatim.
    pub bytes: Vec<u8>,
    /// When it was signed, in seconds since 1970; the certificates are judged as of then.
    pub signed_at: u64,
    /// The submitter's certificates.
    pub submitter: Chain,
    /// The submitter's signature over time and bytes.
    pub signature: Signature,
}

impl SignedSpec {
    /// Signs `spec` by the owner of `submitter`.
    pub fn sign(spec: &Spec, key: &SigningKey, submitter: Chain, now: u64) -> Result<SignedSpec, SpecError> {
        spec.check()?;
        let bytes = serde_json::to_vec(spec).map_err(|error| SpecError::Malformed { reason: error.to_string() })?;
        if bytes.len() > MAX_SPEC {
            return Err(SpecError::TooLarge { len: bytes.len() });
        }
        let signature = sign(key, DOMAIN, &Self::signed_bytes(now, &bytes));
        Ok(SignedSpec { bytes, signed_at: now, submitter, signature })
    }

    /// The specification, after every check that makes it worth reading.
    pub fn open(&self, mesh: &MeshId) -> Result<(Spec, Membership), SpecError> {
        if self.bytes.len() > MAX_SPEC {
            return Err(SpecError::TooLarge { len: self.bytes.len() });
        }
        let spec: Spec =
            serde_json::from_slice(&self.bytes).map_err(|error| SpecError::Malformed { reason: error.to_string() })?;
        spec.check()?;
        let id = spec.id;
        let member = self.submitter.verify(mesh, self.signed_at).map_err(|error| SpecError::Submitter { id, error })?;
        if member.role < Role::Submitter {
            return Err(SpecError::Role { node: member.node, role: member.role });
        }
        let signed = Self::signed_bytes(self.signed_at, &self.bytes);
        if !verify(&member.node, DOMAIN, &signed, &self.signature) {
            return Err(SpecError::Forged { id });
        }
        Ok((spec, member))
    }

    fn signed_bytes(at: u64, bytes: &[u8]) -> Vec<u8> {
        [&at.to_be_bytes(), bytes].concat()
    }
}

/// One replica of one workload, at one try. The epoch is the fencing token: of two, the higher is right.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PlacementId {
    /// Of which workload.
    pub workload: WorkloadId,
    /// Which replica, from 0; people see it from 1.
    pub replica: u32,
    /// Which try, from 1.
    pub epoch: u64,
}

impl fmt::Display for PlacementId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}", self.workload.short(), self.replica + 1, self.epoch)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::trust::{mesh_of, node_of};

    /// A small workload for tests.
    pub(crate) fn spec(name: &str) -> Spec {
        Spec {
            id: WorkloadId(blake3::hash(name.as_bytes()).as_bytes()[..16].try_into().unwrap()),
            name: name.to_owned(),
            image: ImagePin {
                reference: "alpine".parse().unwrap(),
                id: ImageId([1; 32]),
                root: ChunkId([2; 32]),
                size: 1 << 20,
            },
            entrypoint: None,
            command: vec!["true".to_owned()],
            env: Vec::new(),
            user: None,
            workdir: None,
            hostname: None,
            resources: Resources { cpu_milli: 500, memory: 64 << 20 },
            pids: 0,
            replicas: 1,
            restart: Restart::No,
            on: BTreeMap::new(),
            stop_signal: None,
            stop_timeout: 10,
            auto_remove: false,
            gang: false,
            singleton: false,
            lazy: false,
            priority: PRIORITY,
            layout: Layout::Balance,
            near: Vec::new(),
            apart: Vec::new(),
            terminal: false,
            input: false,
            health: None,
            confinement: Confinement::default(),
            requires: Vec::new(),
        }
    }

    #[test]
    fn a_signed_specification_opens_only_unchanged_and_by_a_submitter() {
        let (root, admin, worker) = ([1, 2, 3].map(|seed| SigningKey::from_bytes(&[seed; 32]))).into();
        let mesh = mesh_of(&node_of(&root));
        let chain = Chain::root(&root, node_of(&admin), 1000, 100);
        let signed = SignedSpec::sign(&spec("web"), &admin, chain.clone(), 1000).unwrap();
        assert_eq!(signed.open(&mesh).unwrap().0, spec("web"));

        let mut changed = signed.clone();
        changed.bytes = serde_json::to_vec(&spec("wed")).unwrap();
        assert!(matches!(changed.open(&mesh), Err(SpecError::Forged { .. })));
        let mut late = signed.clone();
        late.signed_at = 2000;
        assert!(matches!(late.open(&mesh), Err(SpecError::Submitter { .. })));

        let chain = chain.issue(&admin, node_of(&worker), Role::Worker, 1000, 100, 1);
        let signed = SignedSpec::sign(&spec("web"), &worker, chain, 1000).unwrap();
        assert!(matches!(signed.open(&mesh), Err(SpecError::Role { role: Role::Worker, .. })));
    }

    #[test]
    fn what_no_process_could_get_is_refused() {
        let with = |change: fn(&mut Spec)| {
            let mut spec = spec("web");
            change(&mut spec);
            spec.check()
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|spec| spec.name = "-x".to_owned()).is_err());
        assert!(with(|spec| spec.name = "a/b".to_owned()).is_err());
        assert!(with(|spec| spec.replicas = 0).is_err());
        assert!(with(|spec| spec.env = vec!["=x".to_owned()]).is_err());
        assert!(with(|spec| spec.command = vec!["a\0".to_owned()]).is_err());
    }
}

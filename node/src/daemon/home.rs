//! A node's folder: what makes it this node, and survives everything.
//!
//! ```text
//! node.key       its identity (ed25519 secret, hexadecimal), readable by root only
//! root.key       the mesh's root key, on the node that began it
//! mesh.json      which mesh, its name here, how it listens
//! certificates   who says that it is a member
//! vouchers.json  invitations it gave
//! peers.json     where a joiner first looks for the others
//! state.redb     catalog and members
//! store/         images
//! containers/    containers
//! volumes/       volumes, by name
//! lock           held by the daemon
//! ```
//!
//! Each file is written whole under another name and renamed, so a crash leaves the old or the new one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ed25519_dalek::SigningKey;
use moyai_protocol::codec;
use moyai_protocol::id::{MeshId, NodeId};
use moyai_protocol::trust::{Chain, Vouchers};
use moyai_runtime::store::Form;
use serde::{Deserialize, Serialize};

/// What a node keeps of its mesh and of how it is to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Its mesh.
    pub mesh: MeshId,
    /// What people call this node.
    pub name: String,
    /// Where it listens, `address:port`; TCP and QUIC both, the data plane on the next port.
    pub listen: String,
    /// What constraints are matched against.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it looks for others on the LAN.
    pub mdns: bool,
    /// What it gives to the mesh; nothing is all of the machine.
    #[serde(default)]
    pub cpus: Option<u64>,
    /// Bytes of memory it gives.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Folders of the machine that containers may be given.
    #[serde(default)]
    pub offers: Vec<PathBuf>,
    /// Where its registry listens, `address:port`, or `off`; nothing is the usual place.
    #[serde(default)]
    pub registry: Option<String>,
    /// What images become here; nothing is the best that the kernel can.
    #[serde(default)]
    pub rootfs: Option<Form>,
    /// Bytes that images may take here; nothing is as much as there is.
    #[serde(default)]
    pub image_budget: Option<u64>,
    /// Bytes a second that it gives of its images to others; nothing is as fast as it goes.
    #[serde(default)]
    pub upload_limit: Option<u64>,
    /// Whether containers may be given the machine's own network.
    #[serde(default)]
    pub offer_host_network: bool,
}

/// A node's folder.
#[derive(Clone, Debug)]
pub struct Home {
    dir: PathBuf,
}

fn parse_key(text: &str, path: &Path) -> anyhow::Result<SigningKey> {
    let bytes = data_encoding::HEXLOWER.decode(text.trim().as_bytes()).ok();
    let bytes: Option<[u8; 32]> = bytes.and_then(|bytes| bytes.try_into().ok());
    let Some(bytes) = bytes else { bail!("{} is damaged: it is no key", path.display()) };
    Ok(SigningKey::from_bytes(&bytes))
}

/// The key in a file.
pub fn read_key(path: &Path) -> anyhow::Result<SigningKey> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_key(&text, path)
}

impl Home {
    /// The folder `dir`, whether it exists or not.
    pub fn new(dir: &Path) -> Home {
        Home { dir: dir.to_owned() }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether a node lives here.
    pub fn is_member(&self) -> bool {
        self.path("mesh.json").exists()
    }

    /// Makes the folder.
    pub fn create(&self) -> anyhow::Result<()> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| format!("cannot make {}", self.dir.display()))
    }

    /// This node's key; a new one if there is none.
    pub fn key(&self) -> anyhow::Result<SigningKey> {
        self.key_file("node.key")
    }

    /// The mesh's root key, where it is kept here.
    pub fn root_key(&self) -> anyhow::Result<Option<SigningKey>> {
        if self.path("root.key").exists() { self.key_file("root.key").map(Some) } else { Ok(None) }
    }

    /// Makes the mesh's root key.
    pub fn new_root_key(&self) -> anyhow::Result<SigningKey> {
        self.key_file("root.key")
    }

    fn key_file(&self, name: &str) -> anyhow::Result<SigningKey> {
        let path = self.path(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // A key that cannot be read is not a key that is not there.
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        if let Some(text) = text {
            return parse_key(&text, &path);
        }
        let secret: [u8; 32] = random()?;
        self.write(name, format!("{}\n", data_encoding::HEXLOWER.encode(&secret)).as_bytes())?;
        Ok(SigningKey::from_bytes(&secret))
    }

    /// What it keeps of its mesh.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        self.json("mesh.json")
    }

    /// Keeps that.
    pub fn set_settings(&self, settings: &Settings) -> anyhow::Result<()> {
        self.write("mesh.json", &serde_json::to_vec_pretty(settings)?)
    }

    /// Remembers that this node is a member no more.
    pub fn set_revoked(&self) -> anyhow::Result<()> {
        self.write("revoked", b"this node's certificates are revoked\n")
    }

    /// Whether it is a member no more.
    pub fn is_revoked(&self) -> bool {
        self.path("revoked").exists()
    }

    /// This node's certificates.
    pub fn chain(&self) -> anyhow::Result<Chain> {
        let path = self.path("certificates");
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        codec::decode(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Keeps those.
    pub fn set_chain(&self, chain: &Chain) -> anyhow::Result<()> {
        self.write("certificates", &codec::encode(chain))
    }

    /// Invitations it gave.
    pub fn vouchers(&self) -> anyhow::Result<Vouchers> {
        if self.path("vouchers.json").exists() { self.json("vouchers.json") } else { Ok(Vouchers::default()) }
    }

    /// Keeps those.
    pub fn set_vouchers(&self, vouchers: &Vouchers) -> io::Result<()> {
        self.write("vouchers.json", &serde_json::to_vec(vouchers)?).map_err(io::Error::other)
    }

    /// Where a joiner first looks for the others.
    pub fn peers(&self) -> Vec<(NodeId, Vec<String>)> {
        self.json("peers.json").unwrap_or_default()
    }

    /// Keeps those.
    pub fn set_peers(&self, peers: &[(NodeId, Vec<String>)]) -> anyhow::Result<()> {
        self.write("peers.json", &serde_json::to_vec(peers)?)
    }

    /// Becomes the only daemon of this folder, until the result is dropped.
    pub fn lock(&self) -> anyhow::Result<File> {
        let path = self.path("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => Err(super::problem(
                "a daemon runs with this folder already",
                "`moyai nodes` shows its mesh; `moyai down` stops it",
            )),
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> anyhow::Result<T> {
        let path = self.path(name);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let (path, new) = (self.path(name), self.path(&format!("{name}.new")));
        let written =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&new).and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()
            });
        written.with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("cannot rename {}", new.display()))?;
        let folder = File::open(&self.dir).and_then(|folder| folder.sync_all());
        folder.with_context(|| format!("cannot sync {}", self.dir.display()))
    }
}

/// Bytes from the kernel's random number generator.
pub fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    io::Read::read_exact(&mut File::open("/dev/urandom").context("cannot open /dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

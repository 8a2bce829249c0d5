//! The networks of this node's containers: which has which address, and which ports lead to it.
//!
//! **Who writes.** `network.json` in a container's folder says what it was given. It is written before anything of it is
//! published, and removed when the container has ended; from these files a new daemon knows what is in use. The bridge itself
//! ([`moyai_runtime::network`]) is made when the first container wants it.
//!
//! **If the daemon dies** between giving an address and starting the container, the namespace goes with the daemon, and the
//! sweep deletes the folder. Between a container's end and the removal of its file, the next daemon finds it ended and takes
//! the address back.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moyai_protocol::confinement;
use moyai_protocol::worker::StartError;
use moyai_protocol::workload::Spec;
use moyai_runtime::container::Network;
use moyai_runtime::network::{Bridge, Endpoint, Port};
use serde::{Deserialize, Serialize};

use super::names::{self, Names};

const FILE: &str = "network.json";

/// What a container was given.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Given {
    address: Ipv4Addr,
    ports: Vec<Port>,
    name: String,
    replica: u32,
    /// Who is asked what this node does not know; none are whom it asks itself.
    #[serde(default)]
    servers: Vec<IpAddr>,
}

/// What a container is started with; its namespace lives while this is held, until the container is in it.
pub(super) struct Joined {
    pub(super) network: Network,
    _endpoint: Option<Endpoint>,
}

/// The bridge, when there is one, and who is on it.
pub(super) struct Networks {
    tag: String,
    containers: PathBuf,
    names: Names,
    runtime: tokio::runtime::Handle,
    open: Mutex<Option<Open>>,
}

#[derive(Clone)]
struct Open {
    bridge: Arc<Bridge>,
    nameserver: Option<Ipv4Addr>,
    /// Sockets that keep other programs of this machine from the ports that lead to containers.
    kept: Arc<Mutex<BTreeMap<Ipv4Addr, Vec<Kept>>>>,
}

/// Held, never used: packets to it go to a container before they would come here.
enum Kept {
    Tcp(#[expect(dead_code, reason = "it is there to be there")] TcpListener),
    Udp(#[expect(dead_code, reason = "it is there to be there")] UdpSocket),
}

impl Networks {
    /// Of the node whose id begins with `tag`, for the containers in `containers`.
    pub(super) fn new(tag: &str, containers: PathBuf) -> Networks {
        let runtime = tokio::runtime::Handle::current();
        Networks { tag: tag.to_owned(), containers, names: Names::default(), runtime, open: Mutex::default() }
    }

    /// Takes up what containers of an earlier daemon have. Blocks.
    pub(super) fn resume(&self) {
        // Also where nothing is left of what was on it: its rules lead nowhere any more, and go.
        if (self.found().next().is_some() || Bridge::exists(&self.tag))
            && let Err(error) = self.open()
        {
            tracing::warn!(%error, "cannot take up the network of the containers that run");
        }
    }

    /// Gives a container whose folder is `dir` what its workload asks for. Blocks.
    pub(super) fn join(&self, dir: &Path, spec: &Spec, replica: u32) -> Result<Joined, StartError> {
        let network = match spec.confinement.network() {
            confinement::Network::None => Network::Alone,
            confinement::Network::Host => Network::Host,
            // Its bid has said that there is no bridge to be asked for.
            confinement::Network::Bridge if moyai_runtime::rootless::is_rootless() => Network::Alone,
            confinement::Network::Bridge => return self.bridged(dir, spec, replica),
        };
        Ok(Joined { network, _endpoint: None })
    }

    fn bridged(&self, dir: &Path, spec: &Spec, replica: u32) -> Result<Joined, StartError> {
        let machine = |error: &dyn std::fmt::Display| StartError::Node(error.to_string());
        // What it had when it ran before.
        self.leave(dir);
        let open = self.open().map_err(|error| machine(&error))?;
        let ports: Vec<Port> = spec.confinement.ports.iter().map(port).collect();
        let kept = ports.iter().map(keep).collect::<Result<Vec<_>, _>>()?;
        let endpoint = open.bridge.endpoint().map_err(|error| machine(&error))?;
        let address = endpoint.address;
        let servers = spec.confinement.lookup.servers.clone();
        let given = Given { address, ports, name: spec.name.clone(), replica, servers };
        let published = std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(dir.join(FILE), serde_json::to_vec(&given).expect("plain data")))
            .map_err(|error| machine(&format!("cannot write {}: {error}", dir.join(FILE).display())))
            .and_then(|()| open.bridge.publish(address, &given.ports).map_err(|error| machine(&error)));
        if let Err(error) = published {
            self.leave(dir);
            // Also where the file could not be written.
            drop(open.bridge.release(address));
            return Err(error);
        }
        open.kept().insert(address, kept);
        self.names.insert(address, &given.name, replica, given.servers);
        let namespace = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), endpoint.namespace.as_raw_fd()));
        let gateway = open.bridge.subnet().gateway();
        let network = Network::Joined { namespace, address, gateway, nameserver: open.nameserver };
        Ok(Joined { network, _endpoint: Some(endpoint) })
    }

    /// The container whose folder is `dir` has ended. Blocks.
    pub(super) fn leave(&self, dir: &Path) {
        let Some(given) = read(dir) else { return };
        self.names.remove(given.address);
        if let Some(open) = self.lock().clone() {
            open.kept().remove(&given.address);
            if let Err(error) = open.bridge.release(given.address) {
                tracing::warn!(address = %given.address, %error, "cannot take a container's network back");
            }
        }
        match std::fs::remove_file(dir.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(dir = %dir.display(), %error, "cannot remove network.json");
            }
            _ => {}
        }
    }

    /// Removes the bridge, where no container is on it: the daemon ends.
    pub(super) fn close(&self) {
        if let Some(open) = self.lock().take()
            && let Err(error) = open.bridge.close()
        {
            tracing::warn!(%error, "cannot remove the bridge");
        }
    }

    /// Removes the bridge, whatever is on it: this node is a member no more, and its containers have been ended.
    pub(super) fn end(&self) {
        if let Some(open) = self.lock().take()
            && let Err(error) = open.bridge.remove()
        {
            tracing::warn!(%error, "cannot remove the bridge");
        }
    }

    fn open(&self) -> Result<Open, moyai_runtime::network::NetworkError> {
        let mut state = self.lock();
        if let Some(open) = &*state {
            return Ok(open.clone());
        }
        let found: Vec<Given> = self.found().collect();
        let used = found.iter().map(|given| (given.address, given.ports.clone())).collect();
        let bridge = Bridge::open(&self.tag, used)?;
        let kept =
            found.iter().map(|given| (given.address, given.ports.iter().filter_map(|port| keep(port).ok()).collect()));
        let kept = Arc::new(Mutex::new(kept.collect()));
        for Given { address, name, replica, servers, .. } in found {
            self.names.insert(address, &name, replica, servers);
        }
        let nameserver = match names::serve(&self.names, bridge.subnet(), &self.runtime) {
            Ok(()) => Some(bridge.subnet().gateway()),
            Err(error) => {
                tracing::warn!(%error, "cannot answer for the names of containers: something else listens at port 53");
                None
            }
        };
        let open = Open { bridge: Arc::new(bridge), nameserver, kept };
        *state = Some(open.clone());
        Ok(open)
    }

    /// What containers have that may still run.
    fn found(&self) -> impl Iterator<Item = Given> {
        let folders = std::fs::read_dir(&self.containers).into_iter().flatten().flatten().map(|entry| entry.path());
        folders.filter(|dir| !dir.join("exit.json").exists()).filter_map(|dir| read(&dir))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<Ipv4Addr, Vec<Kept>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(dir: &Path) -> Option<Given> {
    serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()
}

fn port(port: &confinement::Port) -> Port {
    Port { host_ip: port.host_ip, host: port.host, container: port.container, udp: port.udp }
}

/// Takes a port of the machine, so that nothing else does; where something has it, says so.
fn keep(port: &Port) -> Result<Kept, StartError> {
    let at = SocketAddr::from((port.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED), port.host));
    let taken = if port.udp { UdpSocket::bind(at).map(Kept::Udp) } else { TcpListener::bind(at).map(Kept::Tcp) };
    let (kind, host) = (if port.udp { "/udp" } else { "" }, port.host);
    taken.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            StartError::Node(format!("port {host}{kind} of this machine is in use by another program"))
        }
        io::ErrorKind::AddrNotAvailable => StartError::Node(format!("this machine has no address {}", at.ip())),
        _ => StartError::Node(format!("cannot take port {host}{kind} of this machine: {error}")),
    })
}

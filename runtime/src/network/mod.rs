//! The network of one host: a bridge, a cable from each container to it, and what the kernel translates between it and the
//! world.
//!
//! **States.** A [`Bridge`] is a link, its address, and a table of packet rules ([`filter`]); all three live in the kernel and
//! outlive the daemon, so that connections of containers go on while it is away. An [`Endpoint`] is a network namespace with one
//! end of a cable, an address and a way out; it lives as long as somebody holds its namespace: first whoever made it, then
//! the container's processes. Nothing is mounted or named, so an endpoint that its maker forgets in a crash goes by itself, and
//! its cable with it.
//!
//! **Who writes.** One daemon has one bridge, named by its node. It alone makes and removes endpoints on it, and publishes ports.
//!
//! **After a crash.** The next daemon finds the bridge by its name, keeps its range of addresses, and makes the table anew, in
//! one transaction, from what its containers' folders say is still in use. Ports of containers that ended meanwhile are gone
//! with that.
//!
//! **Bounds.** A bridge has at most 1,024 ports (BR_MAX_PORTS), so a node has at most that many containers on it;
//! [`Bridge::endpoint`] says so. A range is a /16, and an address is given again only after all others were.

mod filter;
mod link;
mod netlink;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use netlink::Line;

/// Ranges that are tried in turn, each a /16: the first that this machine has no route into.
const RANGES: std::ops::Range<u8> = 210..250;
const PREFIX: u8 = 16;
/// What the names of all bridges begin with.
pub(crate) const BRIDGE_PREFIX: &str = "moyai-";

/// A port of this machine that leads into a container.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Port {
    /// At which of this machine's addresses; none is at each.
    pub host_ip: Option<Ipv4Addr>,
    /// Of this machine.
    pub host: u16,
    /// Of the container.
    pub container: u16,
    /// UDP instead of TCP.
    pub udp: bool,
}

/// A range of addresses.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The first.
    pub base: Ipv4Addr,
    /// How many bits all of them share.
    pub prefix: u8,
}

impl Subnet {
    /// The bridge's own address: the first that a machine may have.
    pub fn gateway(&self) -> Ipv4Addr {
        self.at(1)
    }

    /// Whether it has this address.
    pub fn has(&self, address: Ipv4Addr) -> bool {
        self.meets((address, 32))
    }

    fn at(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + offset)
    }

    fn len(&self) -> u32 {
        1 << (32 - u32::from(self.prefix))
    }

    fn meets(&self, (base, prefix): (Ipv4Addr, u8)) -> bool {
        let shared = 32 - u32::from(self.prefix.min(prefix));
        u32::from(self.base).checked_shr(shared).unwrap_or(0) == u32::from(base).checked_shr(shared).unwrap_or(0)
    }
}

/// Why containers have no network here. What had been made of it is still there, and is used by the next try.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel would not.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What it was asked for.
        what: String,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// This machine has routes into every range that would be taken.
    #[error("every range of 10.210.0.0/16 to 10.249.0.0/16 is in use on this machine")]
    NoRange,
    /// Every address is in use.
    #[error("no address of {base}/{prefix} is free")]
    Full {
        /// The range.
        base: Ipv4Addr,
        /// Its prefix.
        prefix: u8,
    },
}

fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |source| NetworkError::Kernel { what, source }
}

/// A network namespace for one container.
#[derive(Debug)]
pub struct Endpoint {
    /// The namespace; it goes when nobody has it open and no process is in it.
    pub namespace: OwnedFd,
    /// The container's address.
    pub address: Ipv4Addr,
}

/// A bridge, and the containers on it.
pub struct Bridge {
    tag: String,
    name: String,
    subnet: Subnet,
    index: u32,
    state: Mutex<State>,
}

struct State {
    links: Line,
    filter: Line,
    /// Addresses in use, with the ports that lead to them.
    used: BTreeMap<Ipv4Addr, Vec<Port>>,
    /// Where the search for a free address goes on.
    cursor: u32,
}

impl Bridge {
    /// Makes the bridge of the node whose id begins with `tag` (six characters), or takes over what an earlier daemon made;
    /// `used` are addresses of containers that still run, with the ports that lead to them.
    pub fn open(tag: &str, used: BTreeMap<Ipv4Addr, Vec<Port>>) -> Result<Bridge, NetworkError> {
        let tag: String = tag.chars().take(6).collect();
        let name = format!("{BRIDGE_PREFIX}{tag}");
        let mut links = Line::route().map_err(cannot("open a netlink socket"))?;
        let mut filter = Line::netfilter().map_err(cannot("open a netlink socket to nf_tables"))?;
        let subnet = match existing(&name) {
            Some(subnet) => subnet,
            None => free_range(&mut links)?,
        };
        // Locally administered (IEEE 802), and the same each time.
        let [_, b, c, d] = subnet.base.octets();
        let made = link::add_bridge(&mut links, &name, [0x02, 0x6d, 0x79, b, c, d]);
        made.map_err(cannot(format!("make the bridge {name} (has the kernel its bridge module?)")))?;
        let index = link::index(&name).map_err(cannot(format!("find the bridge {name}")))?;
        let addressed = link::add_address(&mut links, index, subnet.gateway(), subnet.prefix);
        addressed.map_err(cannot(format!("give {name} the address {}", subnet.gateway())))?;
        // Before it is on: what a container says of itself as a router is not to be believed (CVE-2020-13401).
        match set_sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1") {
            Err(NetworkError::Kernel { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
        link::up(&mut links, index).map_err(cannot(format!("switch {name} on")))?;
        for (path, value) in [
            ("ip_forward".to_owned(), "1"),
            (format!("conf/{name}/route_localnet"), "1"),
            (format!("conf/{name}/rp_filter"), "2"),
        ] {
            set_sysctl(&format!("ipv4/{path}"), value)?;
        }
        let published = ports_of(&used);
        filter::install(&mut filter, &name, &name, subnet, &published)
            .map_err(cannot("make packet rules (has the kernel nf_tables with nat and fib?)"))?;
        let state = Mutex::new(State { links, filter, used, cursor: 1 });
        Ok(Bridge { tag, name, subnet, index, state })
    }

    /// Whether an earlier daemon of the node made one.
    pub fn exists(tag: &str) -> bool {
        let tag: String = tag.chars().take(6).collect();
        existing(&format!("{BRIDGE_PREFIX}{tag}")).is_some()
    }

    /// What addresses it gives.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// Makes a network namespace on it.
    pub fn endpoint(&self) -> Result<Endpoint, NetworkError> {
        let mut state = self.state();
        let address = self.reserve(&mut state)?;
        let made = self.connect(&mut state, address);
        if made.is_err() {
            state.used.remove(&address);
        }
        made.map(|namespace| Endpoint { namespace, address })
    }

    fn reserve(&self, state: &mut State) -> Result<Ipv4Addr, NetworkError> {
        // The first is the bridge's, the last is for broadcast.
        for _ in 0..self.subnet.len() {
            state.cursor = if state.cursor + 2 >= self.subnet.len() { 2 } else { state.cursor + 1 };
            let address = self.subnet.at(state.cursor);
            if let Entry::Vacant(free) = state.used.entry(address) {
                free.insert(Vec::new());
                return Ok(address);
            }
        }
        Err(NetworkError::Full { base: self.subnet.base, prefix: self.subnet.prefix })
    }

    fn connect(&self, state: &mut State, address: Ipv4Addr) -> Result<OwnedFd, NetworkError> {
        let (namespace, mut inside) = new_namespace()?;
        let cable = self.cable(address);
        // One of this name is left where the kernel has not yet cleared away what had the address before.
        link::delete(&mut state.links, &cable).map_err(cannot(format!("remove the old link {cable}")))?;
        link::add_cable(&mut state.links, &cable, self.index, namespace.as_fd()).map_err(|source| {
            // EXFULL: there is no other cause for it here.
            let full = source.raw_os_error() == Some(libc::EXFULL);
            let what = if full {
                "have more than 1,023 containers on one bridge"
            } else {
                "connect a container to the bridge"
            };
            NetworkError::Kernel { what: what.to_owned(), source }
        })?;
        let configured = (|| {
            let (loopback, index) = (link::index_of(&mut inside, "lo")?, link::index_of(&mut inside, "eth0")?);
            link::up(&mut inside, loopback)?;
            link::add_address(&mut inside, index, address, self.subnet.prefix)?;
            link::up(&mut inside, index)?;
            link::add_default_route(&mut inside, index, self.subnet.gateway())
        })();
        configured.map_err(cannot(format!("set up the network of a container at {address}")))?;
        Ok(namespace)
    }

    /// Lets ports of this machine lead to the container at `address`, instead of those that did before.
    pub fn publish(&self, address: Ipv4Addr, ports: &[Port]) -> Result<(), NetworkError> {
        let mut state = self.state();
        let pairs = |ports: &[Port]| ports.iter().map(|port| (address, *port)).collect::<Vec<_>>();
        let old = state.used.get(&address).cloned().unwrap_or_default();
        let published = filter::withdraw(&mut state.filter, &self.name, &pairs(&old))
            .and_then(|()| filter::publish(&mut state.filter, &self.name, &pairs(ports)));
        match published {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                // Somebody has flushed the rules of the machine: all of them are put back.
                let before = state.used.insert(address, ports.to_vec());
                let State { filter, used, .. } = &mut *state;
                let put_back = filter::install(filter, &self.name, &self.name, self.subnet, &ports_of(used));
                if put_back.is_err() {
                    state.used.insert(address, before.unwrap_or_default());
                }
                put_back.map_err(cannot("put the packet rules back"))
            }
            Err(error) => Err(cannot("publish ports")(error)),
            Ok(()) => {
                // Known only now: another's are not to be withdrawn as these.
                state.used.insert(address, ports.to_vec());
                Ok(())
            }
        }
    }

    /// The container at `address` is gone: its ports lead nowhere, and another may have its address. Its cable goes with its
    /// namespace; whatever should still be in there is cut off when another gets the address.
    pub fn release(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        let mut state = self.state();
        let Some(ports) = state.used.get(&address) else { return Ok(()) };
        let pairs: Vec<_> = ports.iter().map(|port| (address, *port)).collect();
        filter::withdraw(&mut state.filter, &self.name, &pairs).map_err(cannot("withdraw ports"))?;
        state.used.remove(&address);
        Ok(())
    }

    /// Removes it, if nothing is on it.
    pub fn close(&self) -> Result<(), NetworkError> {
        let mut state = self.state();
        if !state.used.is_empty() {
            return Ok(());
        }
        self.remove_from(&mut state)
    }

    /// Removes it, whatever is on it: the node is a member no more.
    pub fn remove(&self) -> Result<(), NetworkError> {
        self.remove_from(&mut self.state())
    }

    fn remove_from(&self, state: &mut State) -> Result<(), NetworkError> {
        filter::remove(&mut state.filter, &self.name).map_err(cannot("remove packet rules"))?;
        link::delete(&mut state.links, &self.name).map_err(cannot(format!("remove the bridge {}", self.name)))
    }

    fn cable(&self, address: Ipv4Addr) -> String {
        format!("mv{}-{:04x}", self.tag, u32::from(address) & 0xffff)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ports_of(used: &BTreeMap<Ipv4Addr, Vec<Port>>) -> Vec<(Ipv4Addr, Port)> {
    used.iter().flat_map(|(address, ports)| ports.iter().map(|port| (*address, *port))).collect()
}

/// The range of a bridge that is there.
fn existing(name: &str) -> Option<Subnet> {
    let of_bridge = nix::ifaddrs::getifaddrs().ok()?.filter(|interface| interface.interface_name == name);
    let address = of_bridge.filter_map(|interface| interface.address?.as_sockaddr_in().map(|v4| v4.ip())).next()?;
    let [a, b, ..] = address.octets();
    Some(Subnet { base: Ipv4Addr::new(a, b, 0, 0), prefix: PREFIX })
}

fn free_range(links: &mut Line) -> Result<Subnet, NetworkError> {
    let routes = link::routes(links).map_err(cannot("list this machine's routes"))?;
    let mut ranges = RANGES.map(|second| Subnet { base: Ipv4Addr::new(10, second, 0, 0), prefix: PREFIX });
    // A default route leads everywhere, and is in nobody's way; so are its halves, as VPNs have them.
    let free = |range: &Subnet| !routes.iter().any(|route| route.1 > 1 && range.meets(*route));
    ranges.find(free).ok_or(NetworkError::NoRange)
}

/// Makes a network namespace, and a line to its links. A thread goes there and comes back no more; the line stays there.
fn new_namespace() -> Result<(OwnedFd, Line), NetworkError> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        // There is no IPv6 on the bridge: without this, each link looks for neighbours that are not there.
        match fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // As docker has it: a port below 1024 means nothing in a namespace of one's own.
        fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok((OwnedFd::from(namespace), Line::route()?))
    });
    let made = made.join().map_err(|_| io::Error::other("its thread died")).and_then(|made| made);
    made.map_err(cannot("make a network namespace"))
}

fn set_sysctl(path: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/{path}");
    let is = fs::read_to_string(&path).unwrap_or_default();
    if is.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(cannot(format!("set {path} to {value}")))
}

#[cfg(test)]
mod tests;

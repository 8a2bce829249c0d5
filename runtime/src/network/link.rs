//! Links, addresses and routes (rtnetlink(7); linux/if_link.h, linux/veth.h).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::netlink::{CREATE, EXCLUSIVE, Line, Message, Nest, attributes};

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_MODE: u16 = 4;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// The index of a link by its name, in this thread's network namespace.
pub(super) fn index(name: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

/// The same of another network namespace.
pub(super) fn index_of(line: &mut Line, name: &str) -> io::Result<u32> {
    let found = line.request(Message::new(libc::RTM_GETLINK, 0, &of(0, false)).text(IFLA_IFNAME, name))?;
    let index = found.first().and_then(|body| body.get(4..8)?.try_into().ok()).map(u32::from_ne_bytes);
    index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}

/// struct ifinfomsg: family, type, index, flags, which flags to change.
fn of(index: u32, up: bool) -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let flag = libc::IFF_UP as u32;
    if up {
        fixed[8..12].copy_from_slice(&flag.to_ne_bytes());
        fixed[12..16].copy_from_slice(&flag.to_ne_bytes());
    }
    fixed
}

/// Makes a bridge, switched off; one that is there already is no error.
pub(super) fn add_bridge(line: &mut Line, name: &str, mac: [u8; 6]) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &of(0, false))
        .text(IFLA_IFNAME, name)
        // Without one of its own a bridge has the lowest of its ports', which come and go.
        .attribute(IFLA_ADDRESS, &mac)
        .nested(IFLA_LINKINFO, Nest::default().text(IFLA_INFO_KIND, "bridge"));
    ignore(line.request(message), libc::EEXIST)
}

/// Makes two ends of a cable: `name` here, on the bridge, and `eth0` in another network namespace.
pub(super) fn add_cable(line: &mut Line, name: &str, bridge: u32, other: BorrowedFd<'_>) -> io::Result<()> {
    let peer = Nest::fixed(&of(0, false))
        .text(IFLA_IFNAME, "eth0")
        .attribute(IFLA_NET_NS_FD, &other.as_raw_fd().to_ne_bytes());
    let kind = Nest::default()
        .text(IFLA_INFO_KIND, "veth")
        .nested(IFLA_INFO_DATA, Nest::default().nested(VETH_INFO_PEER, peer));
    let message = Message::new(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, &of(0, true))
        .text(IFLA_IFNAME, name)
        .attribute(IFLA_MASTER, &bridge.to_ne_bytes())
        .nested(IFLA_LINKINFO, kind);
    line.request(message)?;
    // Where a bridge's packets pass through the rules as well (br_netfilter), what a container sends to its own published port
    // has to leave by the cable it came by.
    let back = Nest::default().attribute(IFLA_BRPORT_MODE, &[1]);
    let port = Nest::default().text(IFLA_INFO_SLAVE_KIND, "bridge").nested(IFLA_INFO_SLAVE_DATA, back);
    let message = Message::new(libc::RTM_NEWLINK, 0, &of(0, false)).text(IFLA_IFNAME, name);
    line.request(message.nested(IFLA_LINKINFO, port)).map(drop)
}

/// Removes a link; one that is not there is no error.
pub(super) fn delete(line: &mut Line, name: &str) -> io::Result<()> {
    let message = Message::new(libc::RTM_DELLINK, 0, &of(0, false)).text(IFLA_IFNAME, name);
    ignore(line.request(message), libc::ENODEV)
}

/// Switches a link on.
pub(super) fn up(line: &mut Line, index: u32) -> io::Result<()> {
    line.request(Message::new(libc::RTM_NEWLINK, 0, &of(index, true))).map(drop)
}

/// Gives a link an address; one that it has already is no error.
pub(super) fn add_address(line: &mut Line, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut fixed = vec![libc::AF_INET as u8, prefix, 0, 0];
    fixed.extend_from_slice(&index.to_ne_bytes());
    let message = Message::new(libc::RTM_NEWADDR, CREATE | EXCLUSIVE, &fixed)
        .attribute(IFA_LOCAL, &address.octets())
        .attribute(IFA_ADDRESS, &address.octets());
    ignore(line.request(message), libc::EEXIST)
}

/// Sends whatever has no better way to `gateway`.
pub(super) fn add_default_route(line: &mut Line, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWROUTE, CREATE | EXCLUSIVE, &route(0))
        .attribute(RTA_GATEWAY, &gateway.octets())
        .attribute(RTA_OIF, &index.to_ne_bytes());
    line.request(message).map(drop)
}

/// struct rtmsg: family, lengths of destination and source, type of service, table, who made it, scope, type, flags.
fn route(prefix: u8) -> [u8; 12] {
    let (table, made_by, scope) = (libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, libc::RT_SCOPE_UNIVERSE);
    [libc::AF_INET as u8, prefix, 0, 0, table, made_by, scope, libc::RTN_UNICAST, 0, 0, 0, 0]
}

/// Where this network namespace has routes to other than by default: address, and length of its prefix.
pub(super) fn routes(line: &mut Line) -> io::Result<Vec<(Ipv4Addr, u8)>> {
    let found = line.dump(Message::new(libc::RTM_GETROUTE, 0, &route(0)))?;
    let entry = |body: &Vec<u8>| {
        let (prefix, attributes) = (*body.get(1)?, attributes(body.get(12..)?).collect::<Vec<_>>());
        let value = |kind| attributes.iter().find(|(other, _)| *other == kind).map(|(_, value)| *value);
        let to: [u8; 4] = value(RTA_DST)?.try_into().ok()?;
        Some((Ipv4Addr::from(to), prefix))
    };
    Ok(found.iter().filter_map(entry).collect())
}

fn ignore(result: io::Result<Vec<Vec<u8>>>, code: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(code) => Ok(()),
        result => result.map(drop),
    }
}

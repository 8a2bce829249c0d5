//! What the kernel does with packets of containers: a table of nf_tables for each node (linux/netfilter/nf_tables.h).
//!
//! ```text
//! table ip NAME {
//!   map exact { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }   -p 10.0.0.5:8080:80
//!   map any   { type inet_proto . inet_service : ipv4_addr . inet_service }               -p 8080:80
//!   chain raw         { type filter hook prerouting priority raw;    iifname BRIDGE ip daddr 127.0.0.0/8 drop;
//!                                                                    iifname BRIDGE ip saddr != RANGE drop }
//!   chain prerouting  { type nat hook prerouting priority dstnat;    dnat to exact; fib daddr type local dnat to any }
//!   chain output      { type nat hook output priority dstnat;        the same }
//!   chain postrouting { type nat hook postrouting priority srcnat;   out of the bridge from 127.0.0.0/8, or back into it
//!                                                                    after dnat: masquerade; elsewhere from it: masquerade }
//!   chain forward     { type filter hook forward priority filter;    into the bridge from elsewhere: answers and dnat only }
//! }
//! ```
//!
//! A published port is an element of a map: rules never change while containers come and go. `raw` is there because packets
//! from this machine to 127.0.0.1:8080 must be allowed to leave it (route_localnet), and containers must not reach the
//! machine's own loopback that way (CVE-2020-8558); nor say that they are somebody else. `forward` keeps neighbours on the LAN, who could name this machine as their
//! way to the containers, from ports that were not published.
//!
//! A table is made in one transaction, and made anew the same way: whoever finds an old one takes its place without a gap.

use std::io;
use std::net::Ipv4Addr;

use super::netlink::{APPEND, CREATE, Line, Message, Nest};
use super::{Port, Subnet};

const TABLE_NAME: u16 = 1;
const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;

/// NFT_DATA types of nft's own, by which `nft list` shows keys: six bits each.
const IPV4_ADDR: u32 = 7;
const INET_PROTO: u32 = 12;
const INET_SERVICE: u32 = 13;

const REGISTER: u32 = libc::NFT_REG32_00 as u32;
const EXACT: &str = "exact";
const ANY: &str = "any";

fn message(kind: i32, flags: u16, table: &str) -> Message {
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16;
    // struct nfgenmsg: family, version, resource. The first attribute of every kind is the table's name.
    Message::new(kind, flags, &[libc::AF_INET as u8, 0, 0, 0]).text(TABLE_NAME, table)
}

/// Makes the table, or makes it anew, with these ports published.
pub(super) fn install(
    line: &mut Line,
    table: &str,
    bridge: &str,
    subnet: Subnet,
    ports: &[(Ipv4Addr, Port)],
) -> io::Result<()> {
    let new = || message(libc::NFT_MSG_NEWTABLE, CREATE, table);
    // What is not there cannot be deleted; what is made twice is there once.
    let mut batch = vec![new(), message(libc::NFT_MSG_DELTABLE, 0, table), new()];
    let concatenated = |types: &[u32]| types.iter().fold(0, |sum, kind| sum << 6 | kind);
    for (id, (name, key)) in [(EXACT, &[IPV4_ADDR, INET_PROTO, INET_SERVICE][..]), (ANY, &[INET_PROTO, INET_SERVICE])]
        .into_iter()
        .enumerate()
    {
        let number = |value: u32| value.to_be_bytes();
        let (key_type, data_type) = (concatenated(key), concatenated(&[IPV4_ADDR, INET_SERVICE]));
        batch.push(
            message(libc::NFT_MSG_NEWSET, CREATE, table)
                .text(2, name)
                .attribute(3, &number(8 /* NFT_SET_MAP */))
                .attribute(4, &number(key_type))
                .attribute(5, &number(4 * key.len() as u32))
                .attribute(6, &number(data_type))
                .attribute(7, &number(8))
                .attribute(10, &number(id as u32 + 1)),
        );
    }
    for (name, hook, priority, nat) in [
        ("raw", libc::NF_INET_PRE_ROUTING, libc::NF_IP_PRI_RAW, false),
        ("prerouting", libc::NF_INET_PRE_ROUTING, libc::NF_IP_PRI_NAT_DST, true),
        ("output", libc::NF_INET_LOCAL_OUT, libc::NF_IP_PRI_NAT_DST, true),
        ("postrouting", libc::NF_INET_POST_ROUTING, libc::NF_IP_PRI_NAT_SRC, true),
        ("forward", libc::NF_INET_FORWARD, libc::NF_IP_PRI_FILTER, false),
    ] {
        let hook = Nest::default().number(1, hook as u32).number(2, priority as u32);
        let chain = message(libc::NFT_MSG_NEWCHAIN, CREATE, table).text(3, name).nested(4, hook);
        batch.push(chain.text(7, if nat { "nat" } else { "filter" }));
    }
    let mut rule = |chain: &str, parts: &[Part<'_>]| {
        let list = parts.iter().flat_map(Part::expressions).fold(Nest::default(), |list, (name, data)| {
            list.nested(LIST_ELEM, Nest::default().text(1, name).nested(2, data))
        });
        batch.push(message(libc::NFT_MSG_NEWRULE, CREATE | APPEND, table).text(2, chain).nested(4, list));
    };
    let (loopback, own) = ((Ipv4Addr::new(127, 0, 0, 0), 8), (subnet.base, subnet.prefix));
    rule("raw", &[Part::From(bridge), Part::Destination(loopback), Part::Drop]);
    rule("raw", &[Part::From(bridge), Part::NotSource(own), Part::Drop]);
    for chain in ["prerouting", "output"] {
        rule(chain, &[Part::Translate(EXACT)]);
        rule(chain, &[Part::ToThisMachine, Part::Translate(ANY)]);
    }
    rule("postrouting", &[Part::Source(loopback), Part::To(bridge), Part::Masquerade]);
    rule("postrouting", &[Part::Source(own), Part::To(bridge), Part::Translated, Part::Masquerade]);
    rule("postrouting", &[Part::Source(own), Part::NotTo(bridge), Part::Masquerade]);
    rule("forward", &[Part::To(bridge), Part::Answers, Part::Accept]);
    rule("forward", &[Part::To(bridge), Part::Translated, Part::Accept]);
    rule("forward", &[Part::To(bridge), Part::NotFrom(bridge), Part::Drop]);
    batch.extend(elements(libc::NFT_MSG_NEWSETELEM, table, ports));
    line.batch(batch)
}

/// Publishes ports.
pub(super) fn publish(line: &mut Line, table: &str, ports: &[(Ipv4Addr, Port)]) -> io::Result<()> {
    match elements(libc::NFT_MSG_NEWSETELEM, table, ports) {
        messages if messages.is_empty() => Ok(()),
        messages => line.batch(messages),
    }
}

/// Withdraws ports; those that are not published are no error.
pub(super) fn withdraw(line: &mut Line, table: &str, ports: &[(Ipv4Addr, Port)]) -> io::Result<()> {
    for port in ports {
        let messages = elements(libc::NFT_MSG_DELSETELEM, table, std::slice::from_ref(port));
        match line.batch(messages) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Removes the table; one that is not there is no error.
pub(super) fn remove(line: &mut Line, table: &str) -> io::Result<()> {
    let new = message(libc::NFT_MSG_NEWTABLE, CREATE, table);
    line.batch(vec![new, message(libc::NFT_MSG_DELTABLE, 0, table)])
}

fn elements(kind: i32, table: &str, ports: &[(Ipv4Addr, Port)]) -> Vec<Message> {
    let flags = if kind == libc::NFT_MSG_NEWSETELEM { CREATE } else { 0 };
    let value = |bytes: &[u8]| Nest::default().attribute(DATA_VALUE, bytes);
    let word = |port: u16| [port.to_be_bytes(), [0; 2]].concat();
    let element = |(address, port): &(Ipv4Addr, Port)| {
        let protocol = if port.udp { libc::IPPROTO_UDP } else { libc::IPPROTO_TCP };
        let mut key: Vec<u8> = port.host_ip.map_or(Vec::new(), |ip| ip.octets().to_vec());
        key.extend([protocol as u8, 0, 0, 0]);
        key.extend(word(port.host));
        let data = [&address.octets()[..], &word(port.container)].concat();
        let element = Nest::default().nested(1, value(&key)).nested(2, value(&data));
        let set = if port.host_ip.is_some() { EXACT } else { ANY };
        message(kind, flags, table).text(2, set).nested(3, Nest::default().nested(LIST_ELEM, element))
    };
    ports.iter().map(element).collect()
}

/// Parts of rules.
enum Part<'a> {
    /// It came in by this link.
    From(&'a str),
    NotFrom(&'a str),
    /// It goes out by this link.
    To(&'a str),
    NotTo(&'a str),
    Source((Ipv4Addr, u8)),
    NotSource((Ipv4Addr, u8)),
    Destination((Ipv4Addr, u8)),
    /// Its destination is an address of this machine.
    ToThisMachine,
    /// It belongs to what was begun before.
    Answers,
    /// Its destination was changed.
    Translated,
    /// Its destination becomes what the map says; what the map does not have goes on.
    Translate(&'a str),
    Masquerade,
    Accept,
    Drop,
}

type Expression = (&'static str, Nest);

impl Part<'_> {
    fn expressions(&self) -> Vec<Expression> {
        match *self {
            Part::From(link) => link_is(libc::NFT_META_IIFNAME, link, true),
            Part::NotFrom(link) => link_is(libc::NFT_META_IIFNAME, link, false),
            Part::To(link) => link_is(libc::NFT_META_OIFNAME, link, true),
            Part::NotTo(link) => link_is(libc::NFT_META_OIFNAME, link, false),
            Part::Source(range) => address_is(12, range, true),
            Part::NotSource(range) => address_is(12, range, false),
            Part::Destination(range) => address_is(16, range, true),
            Part::ToThisMachine => {
                // NFTA_FIB_RESULT_ADDRTYPE of the destination.
                let fib = Nest::default().number(1, REGISTER).number(2, 3).number(3, 2);
                vec![("fib", fib), compare(true, &u32::from(libc::RTN_LOCAL).to_ne_bytes())]
            }
            // IP_CT_ESTABLISHED and IP_CT_RELATED, both ways.
            Part::Answers => conntrack(libc::NFT_CT_STATE, 1 << 1 | 1 << 2),
            // IPS_DST_NAT.
            Part::Translated => conntrack(libc::NFT_CT_STATUS, 1 << 5),
            Part::Translate(map) => {
                let mut list = Vec::new();
                let mut register = REGISTER;
                if map == EXACT {
                    list.push(load(1, 16, 4, register));
                    register += 1;
                }
                let protocol = Nest::default().number(1, register).number(2, libc::NFT_META_L4PROTO as u32);
                list.push(("meta", protocol));
                // The destination's port, in TCP and UDP alike; what has none ends the rule.
                list.push(load(2, 2, 2, register + 1));
                list.push(("lookup", Nest::default().text(1, map).number(2, REGISTER).number(3, REGISTER)));
                let nat = Nest::default().number(1, libc::NFT_NAT_DNAT as u32).number(2, libc::AF_INET as u32);
                list.push(("nat", nat.number(3, REGISTER).number(5, REGISTER + 1)));
                list
            }
            Part::Masquerade => vec![("masq", Nest::default())],
            Part::Accept => verdict(libc::NF_ACCEPT),
            Part::Drop => verdict(libc::NF_DROP),
        }
    }
}

fn link_is(key: i32, link: &str, is: bool) -> Vec<Expression> {
    let mut name = [0; libc::IFNAMSIZ];
    name[..link.len()].copy_from_slice(link.as_bytes());
    let meta = Nest::default().number(1, REGISTER).number(2, key as u32);
    vec![("meta", meta), compare(is, &name)]
}

/// Loads `len` bytes of a header: 1 is the network's, 2 the transport's.
fn load(header: u32, offset: u32, len: u32, register: u32) -> Expression {
    ("payload", Nest::default().number(1, register).number(2, header).number(3, offset).number(4, len))
}

fn address_is(offset: u32, (base, prefix): (Ipv4Addr, u8), inside: bool) -> Vec<Expression> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    vec![load(1, offset, 4, REGISTER), masked(&mask.to_be_bytes()), compare(inside, &base.octets())]
}

fn conntrack(key: i32, bits: u32) -> Vec<Expression> {
    let ct = Nest::default().number(1, REGISTER).number(2, key as u32);
    vec![("ct", ct), masked(&bits.to_ne_bytes()), compare(false, &[0; 4])]
}

fn masked(mask: &[u8; 4]) -> Expression {
    let value = |bytes: &[u8]| Nest::default().attribute(DATA_VALUE, bytes);
    let bitwise = Nest::default().number(1, REGISTER).number(2, REGISTER).number(3, 4);
    ("bitwise", bitwise.nested(4, value(mask)).nested(5, value(&[0; 4])))
}

fn compare(equal: bool, to: &[u8]) -> Expression {
    let op = if equal { libc::NFT_CMP_EQ } else { libc::NFT_CMP_NEQ };
    let value = Nest::default().attribute(DATA_VALUE, to);
    ("cmp", Nest::default().number(1, REGISTER).number(2, op as u32).nested(3, value))
}

fn verdict(code: i32) -> Vec<Expression> {
    let verdict = Nest::default().number(1, code as u32);
    let data = Nest::default().nested(2, verdict);
    vec![("immediate", Nest::default().number(1, libc::NFT_REG_VERDICT as u32).nested(2, data))]
}

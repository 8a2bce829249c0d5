//! Netlink, as far as links, addresses, routes and nf_tables need it: requests of nested attributes, and the kernel's answer
//! to each (RFC 3549; linux/netlink.h, linux/netfilter/nfnetlink.h).
//!
//! No crate under a licence that fits speaks nf_tables without libnftnl, which is C, or by running `nft`; what that needs makes
//! links as well.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};

/// The kernel's answers are read in pieces of this size; one message is never longer (NLMSG_GOODSIZE is 8 KiB).
const PIECE: usize = 32 * 1024;
const HEADER: usize = 16;

pub(super) const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub(super) const ACK: u16 = libc::NLM_F_ACK as u16;
pub(super) const CREATE: u16 = libc::NLM_F_CREATE as u16;
pub(super) const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
pub(super) const APPEND: u16 = libc::NLM_F_APPEND as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
const NESTED: u16 = libc::NLA_F_NESTED as u16;

/// One message, as it is put together.
pub(super) struct Message {
    bytes: Vec<u8>,
    flags: u16,
}

impl Message {
    /// Of a type, with the fixed part that this type has.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Message {
        let mut message = Message { bytes: vec![0; HEADER], flags: flags | REQUEST };
        message.bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        message.bytes.extend_from_slice(fixed);
        message
    }

    /// Adds an attribute.
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Message {
        put(&mut self.bytes, kind, value);
        self
    }

    /// Adds an attribute that is a string, which ends with a NUL.
    pub(super) fn text(self, kind: u16, value: &str) -> Message {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute of attributes.
    pub(super) fn nested(self, kind: u16, inner: Nest) -> Message {
        self.attribute(kind | NESTED, &inner.0)
    }

    fn finish(&mut self, sequence: u32) -> &[u8] {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&self.flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.bytes
    }
}

/// Attributes inside an attribute.
#[derive(Clone, Default)]
pub(super) struct Nest(Vec<u8>);

impl Nest {
    /// What an attribute begins with that is not an attribute.
    pub(super) fn fixed(bytes: &[u8]) -> Nest {
        Nest(bytes.to_vec())
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Nest {
        put(&mut self.0, kind, value);
        self
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Nest {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// A number in network order, as nf_tables has them.
    pub(super) fn number(self, kind: u16, value: u32) -> Nest {
        self.attribute(kind, &value.to_be_bytes())
    }

    pub(super) fn nested(self, kind: u16, inner: Nest) -> Nest {
        self.attribute(kind | NESTED, &inner.0)
    }
}

fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = 4 + value.len() as u16;
    bytes.extend_from_slice(&len.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in what the kernel sent.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    })
}

/// A line to one part of the kernel, in the network namespace of the thread that opened it.
pub(super) struct Line {
    socket: OwnedFd,
    sequence: u32,
}

impl Line {
    /// To links, addresses and routes.
    pub(super) fn route() -> io::Result<Line> {
        Line::open(SockProtocol::NetlinkRoute)
    }

    /// To nf_tables.
    pub(super) fn netfilter() -> io::Result<Line> {
        Line::open(SockProtocol::NetlinkNetFilter)
    }

    fn open(protocol: SockProtocol) -> io::Result<Line> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // A table with all that is published goes in one message.
        setsockopt(&socket, sockopt::SndBuf, &(1 << 20))?;
        Ok(Line { socket, sequence: 0 })
    }

    /// Has one thing done; what the kernel says of it, without the header.
    pub(super) fn request(&mut self, mut message: Message) -> io::Result<Vec<Vec<u8>>> {
        message.flags |= ACK;
        self.exchange(vec![message])
    }

    /// Has a batch of nf_tables done, all of it or nothing.
    pub(super) fn batch(&mut self, mut messages: Vec<Message>) -> io::Result<()> {
        let edge = |kind: i32| {
            // linux/netfilter/nfnetlink.h: struct nfgenmsg, with the subsystem in network order.
            let fixed = [0, 0, 0, libc::NFNL_SUBSYS_NFTABLES as u8];
            Message::new(kind as u16, 0, &fixed)
        };
        if let Some(last) = messages.last_mut() {
            last.flags |= ACK;
        }
        messages.insert(0, edge(libc::NFNL_MSG_BATCH_BEGIN));
        messages.push(edge(libc::NFNL_MSG_BATCH_END));
        self.exchange(messages).map(drop)
    }

    /// Everything of a kind: what follows the header of each message.
    pub(super) fn dump(&mut self, mut message: Message) -> io::Result<Vec<Vec<u8>>> {
        message.flags |= DUMP;
        self.exchange(vec![message])
    }

    /// Sends, and reads until the acknowledgement of the one that asks for one, the end of a dump, or an error.
    fn exchange(&mut self, mut messages: Vec<Message>) -> io::Result<Vec<Vec<u8>>> {
        let mut bytes = Vec::new();
        let first = self.sequence + 1;
        for message in &mut messages {
            self.sequence += 1;
            bytes.extend_from_slice(message.finish(self.sequence));
        }
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut buffer, mut found) = (vec![0; PIECE], Vec::new());
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                result => result?,
            };
            let mut rest = &buffer[..len];
            while let Some((kind, sequence, body)) = next(&mut rest) {
                if sequence < first {
                    // The rest of an answer that was given up.
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_ERROR => {
                        let code = body.get(..4).map_or(0, |code| i32::from_ne_bytes(code.try_into().expect("four")));
                        return if code == 0 { Ok(found) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    libc::NLMSG_DONE => return Ok(found),
                    _ => found.push(body.to_vec()),
                }
            }
        }
    }
}

fn next<'a>(rest: &mut &'a [u8]) -> Option<(u16, u32, &'a [u8])> {
    let number = |at: usize, rest: &[u8]| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?));
    let len = number(0, rest)? as usize;
    let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
    let sequence = number(8, rest)?;
    let body = rest.get(HEADER..len)?;
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_together_is_taken_apart_again() {
        let inner = Nest::default().number(1, 7).text(2, "lo");
        let message = Message::new(16, 0, &[0; 16]).attribute(3, &[1, 2, 3]).nested(4, inner);
        let found: Vec<_> = attributes(&message.bytes[HEADER + 16..]).collect();
        assert_eq!(found[0], (3, &[1, 2, 3][..]));
        let inner: Vec<_> = attributes(found[1].1).collect();
        assert_eq!((found[1].0, inner), (4, vec![(1, &[0, 0, 0, 7][..]), (2, &b"lo\0"[..])]));
    }

    #[test]
    fn what_is_cut_off_or_lies_about_its_length_ends_the_list() {
        for bytes in [&[][..], &[1], &[4, 0, 1], &[255, 255, 1, 0, 0], &[3, 0, 1, 0, 9, 9, 9, 9], &[0; 64]] {
            assert!(attributes(bytes).count() <= 1, "{bytes:?}");
            let mut rest = bytes;
            assert!(next(&mut rest).is_none(), "{bytes:?}");
        }
    }
}

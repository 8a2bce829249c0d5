//! The one line that `moyai invite` prints and `moyai join` takes.
//!
//! `moyai1` + base32 (RFC 4648, lower case, no padding) of: version, MeshId, inviter's NodeId, secret, expiry, role,
//! addresses, and four bytes of BLAKE3 over all of that, so that a line cut short in a chat window is told from a
//! line that is wrong.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE32_NOPAD, Encoding};
use serde::{Deserialize, Serialize};

use super::Role;
use crate::codec;
use crate::id::{MeshId, NodeId};

const PREFIX: &str = "moyai1";
const CHECKSUM: usize = 4;
/// Longer than any ticket this code makes.
const MAX_TEXT: usize = 2048;
/// The most addresses a ticket carries.
pub(super) const MAX_ADDRESSES: usize = 6;

/// An invitation: whom to ask, where, and the secret that proves it was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The mesh one is invited to.
    pub mesh: MeshId,
    /// The admin that redeems this ticket; nobody else can.
    pub inviter: NodeId,
    /// Names the voucher at the inviter, and proves it was given.
    pub secret: [u8; 16],
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// What the joiner will be.
    pub role: Role,
    /// Where the inviter listens, as multiaddresses.
    pub addresses: Vec<String>,
}

/// Why a text is no ticket. Nothing was changed; the text is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TicketError {
    /// Does not begin as tickets do.
    #[error("this is not an invitation: one begins with `{PREFIX}`")]
    NotATicket,
    /// A letter that no ticket has.
    #[error("the invitation has a character at position {position} that no invitation has")]
    Character {
        /// Counted from the start of the line.
        position: usize,
    },
    /// The checksum says that something is missing or changed.
    #[error("the invitation is cut short or mistyped: its checksum does not fit")]
    Damaged,
}

impl Ticket {
    /// A ticket with no more than the addresses a ticket may carry.
    pub fn bounded(mut self) -> Self {
        self.addresses.truncate(MAX_ADDRESSES);
        self
    }
}

fn alphabet() -> Encoding {
    let mut lower = BASE32_NOPAD.specification();
    lower.symbols = "abcdefghijklmnopqrstuvwxyz234567".to_owned();
    lower.encoding().expect("a fixed alphabet is valid")
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = codec::encode(self);
        let sum = blake3::hash(&bytes);
        bytes.extend(&sum.as_bytes()[..CHECKSUM]);
        write!(f, "{PREFIX}{}", alphabet().encode(&bytes))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TicketError::NotATicket)?;
        if body.len() > MAX_TEXT {
            return Err(TicketError::Damaged);
        }
        let allowed = |c: char| c.is_ascii_lowercase() || ('2'..='7').contains(&c);
        if let Some(at) = body.chars().position(|c| !allowed(c)) {
            return Err(TicketError::Character { position: PREFIX.len() + at + 1 });
        }
        let bytes = alphabet().decode(body.as_bytes()).map_err(|_| TicketError::Damaged)?;
        let split = bytes.len().checked_sub(CHECKSUM).ok_or(TicketError::Damaged)?;
        let (content, sum) = bytes.split_at(split);
        if blake3::hash(content).as_bytes()[..CHECKSUM] != *sum {
            return Err(TicketError::Damaged);
        }
        codec::decode(content).map_err(|_| TicketError::Damaged)
    }
}

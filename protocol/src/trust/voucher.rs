//! The inviter's side of a ticket: how often it may still be used, and until when.
//!
//! Only the inviter counts, so "used up" needs no agreement. It keeps the hash of the secret, never the secret. The
//! driver writes the vouchers to disk before the joiner gets its certificate: a crash between the two can cost a use,
//! and never grants one twice. One joiner that asks again (its answer was lost on the way) is not counted again.

use serde::{Deserialize, Serialize};

use super::Role;
use crate::id::NodeId;

/// The most vouchers one node keeps; the oldest expired ones make room.
const MAX_VOUCHERS: usize = 256;

/// One invitation as its inviter remembers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voucher {
    /// BLAKE3 of the ticket's secret.
    pub secret_hash: [u8; 32],
    /// What the joiner becomes.
    pub role: Role,
    /// How many nodes may use it.
    pub uses: u32,
    /// Who has used it, and when (seconds since 1970).
    pub used_by: Vec<(NodeId, u64)>,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
}

/// A voucher was good: what the joiner is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redeemed {
    /// The role to certify.
    pub role: Role,
}

/// Why a voucher does not let a node in. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum VoucherError {
    /// Never given here, or forgotten after it ended.
    #[error("this invitation is not known here")]
    Unknown,
    /// Too late.
    #[error("this invitation expired at {expires}")]
    Expired {
        /// When, in seconds since 1970.
        expires: u64,
    },
    /// All its uses are gone.
    #[error("this invitation was used up ({uses} of {uses}), the last time at {last}")]
    UsedUp {
        /// How many it had.
        uses: u32,
        /// The last use, in seconds since 1970.
        last: u64,
    },
    /// More invitations are open than one node keeps.
    #[error("{MAX_VOUCHERS} invitations are open here; wait for one to expire")]
    TooMany,
}

/// All invitations this node gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vouchers {
    vouchers: Vec<Voucher>,
}

impl Vouchers {
    /// Remembers a new invitation.
    pub fn add(
        &mut self,
        secret: &[u8; 16],
        role: Role,
        uses: u32,
        expires: u64,
        now: u64,
    ) -> Result<(), VoucherError> {
        if self.vouchers.len() >= MAX_VOUCHERS {
            self.vouchers.retain(|voucher| voucher.expires >= now);
        }
        if self.vouchers.len() >= MAX_VOUCHERS {
            return Err(VoucherError::TooMany);
        }
        let secret_hash = *blake3::hash(secret).as_bytes();
        self.vouchers.push(Voucher { secret_hash, role, uses, used_by: Vec::new(), expires });
        Ok(())
    }

    /// Uses one invitation once for `node`.
    pub fn redeem(&mut self, secret: &[u8; 16], node: NodeId, now: u64) -> Result<Redeemed, VoucherError> {
        let hash = blake3::hash(secret);
        let voucher = self
            .vouchers
            .iter_mut()
            // blake3::Hash compares in constant time.
            .find(|voucher| hash == voucher.secret_hash)
            .ok_or(VoucherError::Unknown)?;
        if now > voucher.expires {
            return Err(VoucherError::Expired { expires: voucher.expires });
        }
        if voucher.used_by.iter().any(|(used, _)| *used == node) {
            return Ok(Redeemed { role: voucher.role });
        }
        if voucher.used_by.len() >= voucher.uses as usize {
            let last = voucher.used_by.last().map_or(0, |(_, at)| *at);
            return Err(VoucherError::UsedUp { uses: voucher.uses, last });
        }
        voucher.used_by.push((node, now));
        Ok(Redeemed { role: voucher.role })
    }
}

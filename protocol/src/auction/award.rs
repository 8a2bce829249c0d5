//! An award as it is signed: this member gave this placement to that node.
//!
//! It stays with the placement and travels in its fact, so that every node can check that a placement was awarded, and
//! by whom. It does not say that the auctioneer chose well: a member that holds an auction it has no call to hold is
//! known by its signature, and is to be revoked.

use std::sync::Arc;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use super::Record;
use crate::codec;
use crate::id::{MeshId, NodeId, Signature};
use crate::trust::{Chain, node_of, sign, verify};
use crate::workload::PlacementId;

const DOMAIN: &str = "moyai award v1";

/// A replica given to a node, and how it came to that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Award {
    /// The auction; its auctioneer is who signs.
    pub record: Arc<Record>,
    /// The auctioneer's certificates: what it awarded stands when it has long been gone.
    pub chain: Arc<Chain>,
    /// The auctioneer's, over the placement, the node it is given to, and the record.
    pub signature: Signature,
}

impl Award {
    /// Gives `placement` to `winner`. `key` and `chain` are those of the record's auctioneer.
    pub fn sign(
        placement: &PlacementId,
        winner: &NodeId,
        record: Arc<Record>,
        key: &SigningKey,
        chain: Arc<Chain>,
    ) -> Award {
        debug_assert_eq!(record.auctioneer, node_of(key), "an auctioneer signs its own awards");
        let signature = sign(key, DOMAIN, &codec::encode(&(placement, winner, &record)));
        Award { record, chain, signature }
    }

    /// Whether a member of `mesh`, which the record's auctioneer was at the time, gave `placement` to `winner`.
    pub fn verify(&self, placement: &PlacementId, winner: &NodeId, mesh: &MeshId) -> Result<(), String> {
        let auctioneer = &self.record.auctioneer;
        self.chain.verify_shown_by(auctioneer, mesh, self.record.at.as_secs()).map_err(|error| error.to_string())?;
        let signed = codec::encode(&(placement, winner, &self.record));
        if !verify(auctioneer, DOMAIN, &signed, &self.signature) {
            return Err(format!("nobody gave placement {placement} to node {}", winner.short()));
        }
        Ok(())
    }
}

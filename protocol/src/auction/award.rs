//! An award as it is signed: this member gave this placement to that node.
//!
//! It stays with the placement and travels in its fact, so that every node can check that a placement was awarded, and
//! by whom. It does not say that the auctioneer chose well: a member that holds an auction it has no call to hold is
//! known by its signature, and is to be revoked.

use std::sync::Arc;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::codec;
use crate::id::{MeshId, NodeId, Signature};
use crate::time::UnixMillis;
use crate::trust::{Chain, node_of, sign, verify};
use crate::workload::PlacementId;

const DOMAIN: &str = "moyai award v1";

/// A replica given to a node. How it came to that is in the auctioneer's own journal, under the same time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Award {
    /// Who held the auction, and signs.
    pub auctioneer: NodeId,
    /// When it was opened, in milliseconds since 1970.
    pub at: UnixMillis,
    /// The auctioneer's certificates: what it awarded stands when it has long been gone.
    pub chain: Arc<Chain>,
    /// The auctioneer's, over the placement, the node it is given to, and the time.
    pub signature: Signature,
}

impl Award {
    /// Gives `placement` to `winner`, by the owner of `key` and `chain`.
    pub fn sign(
        placement: &PlacementId,
        winner: &NodeId,
        at: UnixMillis,
        key: &SigningKey,
        chain: Arc<Chain>,
    ) -> Award {
        let auctioneer = node_of(key);
        let signature = sign(key, DOMAIN, &codec::encode(&(placement, winner, at)));
        Award { auctioneer, at, chain, signature }
    }

    /// Whether a member of `mesh`, which the auctioneer was at the time, gave `placement` to `winner`.
    pub fn verify(&self, placement: &PlacementId, winner: &NodeId, mesh: &MeshId) -> Result<(), String> {
        let auctioneer = &self.auctioneer;
        self.chain.verify_shown_by(auctioneer, mesh, self.at.as_secs()).map_err(|error| error.to_string())?;
        let signed = codec::encode(&(placement, winner, self.at));
        if !verify(auctioneer, DOMAIN, &signed, &self.signature) {
            return Err(format!("nobody gave placement {placement} to node {}", winner.short()));
        }
        Ok(())
    }
}

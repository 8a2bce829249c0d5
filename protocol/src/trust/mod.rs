//! Who is in the mesh, and what each member may do.
//!
//! A node is its ed25519 key. A mesh is its root key, named by the hash of the public half. A [`Certificate`] binds a
//! node to a role until it expires; it is signed by an admin's key whose own certificate chains to the root, and the
//! whole [`Chain`] is shown on every connection before anything else is spoken. A [`Ticket`] is the one line by which
//! a machine that has no certificate yet finds an admin that will sign one.
//!
//! Nothing here trusts a byte it has not checked: a [`Chain`] becomes a [`Membership`] only by [`Chain::verify`].

mod certificate;
mod ticket;
mod voucher;

pub use certificate::{Certificate, Chain, ChainError, Membership, Role, SignedCertificate};
pub use ticket::{Ticket, TicketError};
pub use voucher::{Redeemed, Voucher, VoucherError, Vouchers};

use ed25519_dalek::{Signer, SigningKey, Verifier, VerifyingKey};

use crate::id::{MeshId, NodeId, Signature};

/// The mesh whose root has this public key.
pub fn mesh_of(root: &NodeId) -> MeshId {
    MeshId(*blake3::hash(&root.0).as_bytes())
}

/// The public half of `key`.
pub fn node_of(key: &SigningKey) -> NodeId {
    NodeId(key.verifying_key().to_bytes())
}

/// Signs `bytes` for one purpose: a signature made for one `domain` never verifies in another.
pub fn sign(key: &SigningKey, domain: &str, bytes: &[u8]) -> Signature {
    Signature(key.sign(&digest(domain, bytes)).to_bytes())
}

/// Whether `signature` is `signer`'s, over `bytes`, for this purpose.
pub fn verify(signer: &NodeId, domain: &str, bytes: &[u8], signature: &Signature) -> bool {
    let Ok(key) = VerifyingKey::from_bytes(&signer.0) else { return false };
    key.verify(&digest(domain, bytes), &ed25519_dalek::Signature::from_bytes(&signature.0)).is_ok()
}

fn digest(domain: &str, bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key(domain, bytes)
}

/// A name people can say for a mesh, the same on every node because it comes from the id alone.
pub fn mesh_name(mesh: &MeshId) -> String {
    const QUALITY: [&str; 32] = [
        "amber", "autumn", "brisk", "bright", "calm", "clear", "coastal", "copper", "crisp", "deep", "distant",
        "early", "evening", "fair", "gentle", "golden", "hidden", "inner", "keen", "late", "long", "misty", "northern",
        "outer", "pale", "quiet", "silver", "slow", "southern", "steady", "still", "winter",
    ];
    const PLACE: [&str; 32] = [
        "anchor",
        "basin",
        "bay",
        "beacon",
        "bight",
        "breakwater",
        "buoy",
        "cape",
        "channel",
        "cove",
        "current",
        "delta",
        "dock",
        "estuary",
        "ferry",
        "fjord",
        "harbour",
        "haven",
        "inlet",
        "island",
        "jetty",
        "lagoon",
        "lantern",
        "mooring",
        "pier",
        "quay",
        "reef",
        "shoal",
        "slip",
        "sound",
        "strait",
        "wharf",
    ];
    let pick = |byte: u8| usize::from(byte % 32);
    format!("{}-{}", QUALITY[pick(mesh.0[0])], PLACE[pick(mesh.0[1])])
}

#[cfg(test)]
mod tests;

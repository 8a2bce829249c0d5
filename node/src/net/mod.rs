//! How this node reaches others.
//!
//! - [`admission`]: the first exchange on every connection; until it is done nothing else is spoken
//! - [`transport`]: libp2p's TCP and QUIC with that exchange built in, so that no protocol exists before it
//! - [`control`]: the libp2p swarm: messages of the protocol, mDNS, Kademlia, identify, ping
//! - [`connections`]: which of those to a peer lead to the process that lives
//! - [`doorstep`], [`inflow`]: what strangers and members may take of this node
//! - [`data`]: quinn connections for bulk: chunks, logs, processes; [`bulk`]: chunks by TCP, where possible; [`tls`]: of both
//! - [`join`]: a machine without a certificate asks for one
//!
//! A node is its ed25519 key everywhere: [`peer_id`] and [`node_id`] go between libp2p's name for it and ours.

pub mod admission;
mod awaiting;
mod bulk;
pub mod chunks;
mod connections;
pub mod control;
pub mod data;
mod dials;
pub mod doorstep;
pub mod inflow;
pub mod join;
pub mod tls;
pub mod transport;

use std::net::IpAddr;

use libp2p::identity::{Keypair, PublicKey, ed25519};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use moyai_protocol::id::NodeId;

/// libp2p's name for a node; `None` when the bytes are no key.
pub fn peer_id(node: &NodeId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&node.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// The node behind a PeerId; `None` when its key is not ed25519.
pub fn node_id(peer: &PeerId) -> Option<NodeId> {
    // The PeerId of a short key is the key itself (libp2p peer-ids specification).
    let key = PublicKey::try_decode_protobuf(peer.as_ref().digest()).ok()?;
    Some(NodeId(key.try_into_ed25519().ok()?.to_bytes()))
}

/// The key pair as libp2p wants it.
pub fn key_pair(key: &ed25519_dalek::SigningKey) -> Keypair {
    let mut secret = key.to_bytes();
    Keypair::ed25519_from_bytes(&mut secret).expect("32 bytes are an ed25519 secret")
}

/// The IP address in an address; `None` when it has a name or nothing instead.
pub fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_name_everywhere() {
        let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let node = moyai_protocol::trust::node_of(&key);
        let peer = key_pair(&key).public().to_peer_id();
        assert_eq!(node_id(&peer), Some(node));
        assert_eq!(peer_id(&node), Some(peer));
    }
}

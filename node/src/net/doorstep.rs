//! How many connections one address may have at the door: open, and no certificate shown yet.
//!
//! Without it whoever opens connections and says nothing holds all the places, and keeps joiners and members out for as
//! long as admission is waited for. Places are counted by address, an IPv6 address by its /64 (one machine has all of
//! it); a refused connection is closed at once, which a member's dial takes for "busy" and tries again.

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, ListenFailure, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use super::ip_of;

/// Places of one address: as many members may stand behind one router and come at once.
pub const MAX_PER_ADDRESS: usize = 16;

/// Places that are counted by who takes them.
pub struct Places<K: Eq + Hash>(Arc<Mutex<HashMap<K, usize>>>);

/// One place; given back when it is dropped.
pub struct Place<K: Eq + Hash> {
    places: Places<K>,
    key: K,
}

impl<K: Eq + Hash> Clone for Places<K> {
    fn clone(&self) -> Self {
        Places(Arc::clone(&self.0))
    }
}

impl<K: Eq + Hash> Default for Places<K> {
    fn default() -> Self {
        Places(Arc::default())
    }
}

impl<K: Eq + Hash + Copy> Places<K> {
    /// Takes a place, unless `key` has `most` of them.
    pub fn enter(&self, key: K, most: usize) -> Option<Place<K>> {
        let mut taken = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = taken.entry(key).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { places: Places(Arc::clone(&self.0)), key })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

/// The places before one door.
#[derive(Default)]
pub struct Doorstep(Places<IpAddr>);

impl Doorstep {
    /// Takes a place, unless this address has all of its own.
    pub fn enter(&self, address: IpAddr) -> Option<Place<IpAddr>> {
        self.0.enter(network_of(address), MAX_PER_ADDRESS)
    }
}

/// What is counted as one address.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(address) => IpAddr::V4(address),
            None => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        },
        address => address,
    }
}

/// This address has all the places it may have.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_PER_ADDRESS} connections from {0} wait for admission already")]
struct Crowded(IpAddr);

/// The doorstep of a swarm.
#[derive(Default)]
pub struct Behaviour {
    doorstep: Doorstep,
    pending: HashMap<ConnectionId, Place<IpAddr>>,
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let Some(address) = ip_of(remote) else { return Ok(()) };
        let place = self.doorstep.enter(address).ok_or_else(|| ConnectionDenied::new(Crowded(address)))?;
        self.pending.insert(connection, place);
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pending.remove(&connection);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event {
            self.pending.remove(&connection_id);
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_takes_only_its_own_places_and_gives_them_back() {
        let doorstep = Doorstep::default();
        let crowd = |last: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, last));
        let mut places: Vec<Place<IpAddr>> =
            (0..MAX_PER_ADDRESS as u16).filter_map(|at| doorstep.enter(crowd(at))).collect();
        assert_eq!(places.len(), MAX_PER_ADDRESS);
        assert!(doorstep.enter(crowd(99)).is_none(), "all of a /64 is one machine's");
        assert!(doorstep.enter(IpAddr::V4([10, 0, 0, 1].into())).is_some());
        places.pop();
        assert!(doorstep.enter(crowd(99)).is_some());
        drop(places);
        assert!(doorstep.0.0.lock().unwrap().is_empty());
    }
}

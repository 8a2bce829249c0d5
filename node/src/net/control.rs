//! The libp2p swarm of one node, in a task of its own.
//!
//! Protocol messages travel by request-response with an empty answer: the answer only says that the bytes arrived.
//! Losing a message is allowed, so nothing is kept for a peer that cannot be reached ([`super::dials`]).
//!
//! Discovery: mDNS on the LAN; addresses from gossip; for a member whose addresses have all gone stale, Kademlia, in
//! which the admins are servers and the others clients (in server mode everybody dials nearly everybody).
//!
//! **Strangers.** Before they have shown a good certificate they are libp2p "pending" connections, at most
//! [`MAX_PENDING`], and few of one address ([`doorstep`]). What an admitted peer may send, and what it may have sent to
//! it, is bounded too ([`super::inflow`]). A peer found by mDNS that turned out to be of another mesh is left alone for
//! [`STRANGER_REST`].

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::prelude::*;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, NetworkBehaviour, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, connection_limits, identify, kad, mdns, ping, request_response,
};
use moyai_protocol::codec::MESSAGE_LIMIT;
use moyai_protocol::id::NodeId;
use moyai_protocol::trust::{Membership, Role};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{debug, info};

use super::admission::{Admitted, Gate, unix_now};
use super::connections::Connections;
use super::dials::{Dials, Wish};
use super::inflow::{Inflow, LARGE_PATIENCE, LARGE_READS, Outflow, SMALL};
use super::{doorstep, ip_of, key_pair, node_id, peer_id, transport};

const MAX_PENDING: u32 = 256;
const MAX_STRANGERS: usize = 256;
/// Peers that mDNS has told of, and addresses of each; the latest are kept.
const MAX_SEEN: usize = 512;
const MAX_SEEN_EACH: usize = 4;
const STRANGER_REST: Duration = Duration::from_secs(600);
/// A connection that carries nothing is closed; probes keep those of a small mesh open.
const IDLE: Duration = Duration::from_secs(120);
/// For a listener to have an address.
const LISTEN_PATIENCE: Duration = Duration::from_secs(10);
/// For a listener to have another of the machine's addresses.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(1);

/// What the swarm tells the driver.
#[derive(Debug)]
pub enum Incoming {
    /// A peer was admitted.
    Admitted {
        /// Who, and what it may do.
        membership: Membership,
        /// Where, when this side dialled.
        address: Option<String>,
    },
    /// A peer's message.
    Message {
        /// Who sent it.
        from: NodeId,
        /// What.
        bytes: Vec<u8>,
        /// Its room in what waits, until it has been handled.
        place: OwnedSemaphorePermit,
    },
    /// Where this node listens, all of it.
    Listening(Vec<String>),
}

/// A message that the driver wants sent.
#[derive(Debug)]
pub struct Outgoing {
    /// To whom.
    pub to: NodeId,
    /// What.
    pub bytes: Vec<u8>,
}

/// Where members are to be found. The driver writes it and the swarm reads it; not a channel, because each of the two
/// waits for the other's queue at times.
#[derive(Clone, Default)]
pub struct AddressBook(Arc<Mutex<HashMap<PeerId, Vec<Multiaddr>>>>);

impl AddressBook {
    /// A member is to be found there. Members are bounded by the membership, addresses by each of them.
    pub fn insert(&self, node: &NodeId, addresses: &[String]) {
        let parsed: Vec<Multiaddr> = addresses.iter().filter_map(|text| text.parse().ok()).collect();
        if let Some(peer) = peer_id(node).filter(|_| !parsed.is_empty()) {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(peer, parsed);
        }
    }

    fn get(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(peer).cloned().unwrap_or_default()
    }
}

/// One protocol message and nothing.
#[derive(Clone)]
struct Codec {
    /// Places for large messages that are being read.
    large: Arc<Semaphore>,
}

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = ();

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut bytes = Vec::new();
        io.take(SMALL).read_to_end(&mut bytes).await?;
        if bytes.len() as u64 == SMALL {
            let _place = self.large.acquire().await.map_err(io::Error::other)?;
            let mut rest = io.take(MESSAGE_LIMIT as u64 + 2 - SMALL);
            tokio::time::timeout(LARGE_PATIENCE, rest.read_to_end(&mut bytes)).await??;
        }
        Ok(bytes)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<()>
    where
        T: AsyncRead + Unpin + Send,
    {
        Ok(())
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, bytes: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&bytes).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, _: &mut T, (): ()) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        Ok(())
    }
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    limits: connection_limits::Behaviour,
    doorstep: doorstep::Behaviour,
    messages: request_response::Behaviour<Codec>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
    mdns: Toggle<mdns::tokio::Behaviour>,
}

/// Why the node cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has the port.
    #[error("port {port} is in use on this machine")]
    InUse {
        /// Which.
        port: u16,
    },
    /// Anything else.
    #[error("cannot listen on {address}: {reason}")]
    Other {
        /// Where.
        address: String,
        /// What went wrong.
        reason: String,
    },
}

/// Starts the swarm. Returns once every address is listened on.
pub async fn start(
    key: &ed25519_dalek::SigningKey,
    gate: Arc<Gate>,
    role: Role,
    listen: &[Multiaddr],
    use_mdns: bool,
    addresses: AddressBook,
    incoming: mpsc::Sender<Incoming>,
) -> Result<mpsc::Sender<Outgoing>, ListenError> {
    let other = |address: &str, error: &dyn std::fmt::Display| ListenError::Other {
        address: address.to_owned(),
        reason: error.to_string(),
    };
    let keys = key_pair(key);
    let peer = keys.public().to_peer_id();
    let admitted: Arc<Mutex<HashMap<PeerId, Admitted>>> = Arc::default();
    let note = {
        let admitted = Arc::clone(&admitted);
        Arc::new(move |peer, member| {
            admitted.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(peer, member);
        })
    };
    let transport =
        transport::admitting(&keys, Arc::clone(&gate), note).map_err(|error| other("the network", &error))?;
    let kad_config = kad::Config::new(StreamProtocol::new("/moyai/kad/1"));
    let mut kad = kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), kad_config);
    kad.set_mode(Some(if role == Role::Admin { kad::Mode::Server } else { kad::Mode::Client }));
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(MAX_PENDING))
        .with_max_established_per_peer(Some(4));
    let mdns = use_mdns
        .then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), peer))
        .and_then(|made| made.map_err(|error| info!("no discovery on the LAN: {error}")).ok());
    let protocols = [(StreamProtocol::new("/moyai/messages/1"), request_response::ProtocolSupport::Full)];
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        doorstep: doorstep::Behaviour::default(),
        messages: request_response::Behaviour::with_codec(
            Codec { large: Arc::new(Semaphore::new(LARGE_READS)) },
            protocols,
            request_response::Config::default()
                .with_request_timeout(Duration::from_secs(5))
                // Of all connections of a peer together fewer than there are places for large messages.
                .with_max_concurrent_streams(24),
        ),
        identify: identify::Behaviour::new(identify::Config::new("/moyai/1".to_owned(), keys.public())),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(Duration::from_secs(30))),
        kad,
        mdns: Toggle::from(mdns),
    };
    let config = libp2p::swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE);
    let mut swarm = Swarm::new(transport, behaviour, peer, config);
    for address in listen {
        swarm.listen_on(address.clone()).map_err(|error| listen_error(address, &whole(&error)))?;
    }
    let mut control = Control {
        gate,
        swarm,
        incoming,
        admitted,
        addresses,
        listening: Vec::new(),
        dials: Dials::default(),
        strangers: HashMap::new(),
        seen: HashMap::new(),
        connections: Connections::default(),
        inflow: Inflow::default(),
        outflow: Outflow::default(),
    };
    let early = control.wait_for_listeners(listen).await?;
    // Before anybody can ask for an invitation, which has these addresses in it.
    control.tell_listening().await;
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(control.run(receiver, early));
    Ok(sender)
}

/// An error with its causes; libp2p's own words for what a transport says are empty.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    if text.trim_matches([':', ' ']).is_empty() { format!("{error:?}") } else { text }
}

fn listen_error(address: &Multiaddr, reason: &str) -> ListenError {
    let port = address.iter().find_map(|part| match part {
        libp2p::multiaddr::Protocol::Tcp(port) | libp2p::multiaddr::Protocol::Udp(port) => Some(port),
        _ => None,
    });
    match port {
        Some(port) if ["in use", "os error 98", "AddrInUse"].iter().any(|word| reason.contains(word)) => {
            ListenError::InUse { port }
        }
        _ => ListenError::Other { address: address.to_string(), reason: reason.to_owned() },
    }
}

struct Control {
    gate: Arc<Gate>,
    swarm: Swarm<Behaviour>,
    incoming: mpsc::Sender<Incoming>,
    /// The latest of each member, until its certificate ends.
    admitted: Arc<Mutex<HashMap<PeerId, Admitted>>>,
    addresses: AddressBook,
    listening: Vec<Multiaddr>,
    dials: Dials<PeerId, kad::QueryId>,
    strangers: HashMap<PeerId, Instant>,
    /// Where mDNS has seen peers. It tells once, perhaps while an old address is being dialled: later dials need it.
    seen: HashMap<PeerId, Vec<Multiaddr>>,
    connections: Connections,
    inflow: Inflow,
    outflow: Outflow,
}

impl Control {
    /// Until each of them has an address, and those for any address have all that the machine has: libp2p tells them one
    /// after the other, the loopback's first. What else happens meanwhile is returned, to be handled afterwards.
    async fn wait_for_listeners(
        &mut self,
        listen: &[Multiaddr],
    ) -> Result<Vec<SwarmEvent<BehaviourEvent>>, ListenError> {
        let mut missing = listen.len();
        let mut early = Vec::new();
        let begun = tokio::time::Instant::now();
        let mut seen = std::collections::HashSet::new();
        let expected: Vec<IpAddr> = listen.iter().filter_map(ip_of).flat_map(every_address).collect();
        let complete = |listening: &[Multiaddr]| {
            let told = |ip: &IpAddr| listening.iter().filter(|address| ip_of(address) == Some(*ip)).count();
            expected.iter().all(|ip| told(ip) >= expected.iter().filter(|other| *other == ip).count())
        };
        while missing > 0 || !complete(&self.listening) {
            let patience = if missing > 0 { LISTEN_PATIENCE } else { ADDRESS_PATIENCE };
            match tokio::time::timeout_at(begun + patience, self.swarm.select_next_some()).await {
                Ok(SwarmEvent::NewListenAddr { listener_id, address }) => {
                    missing -= usize::from(seen.insert(listener_id));
                    self.listening.push(address);
                }
                // Gone meanwhile, or nothing that libp2p listens at.
                Err(_) if missing == 0 => return Ok(early),
                Ok(SwarmEvent::ListenerError { error, .. }) => {
                    return Err(listen_error(&listen[0], &error.to_string()));
                }
                Ok(SwarmEvent::ListenerClosed { reason: Err(error), .. }) => {
                    return Err(listen_error(&listen[0], &error.to_string()));
                }
                // As many as come in so short a time, through the limits on connections.
                Ok(event) => early.push(event),
                Err(_) => {
                    let text = format!("nothing happened for {} s", LISTEN_PATIENCE.as_secs());
                    return Err(listen_error(&listen[0], &text));
                }
            }
        }
        Ok(early)
    }

    async fn run(mut self, mut outgoing: mpsc::Receiver<Outgoing>, early: Vec<SwarmEvent<BehaviourEvent>>) {
        for event in early {
            self.event(event).await;
        }
        let mut check = tokio::time::interval(Duration::from_secs(30));
        let Some(mut cut) = self.gate.to_cut() else { return };
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.event(event).await,
                message = outgoing.recv() => match message {
                    Some(Outgoing { to, bytes }) => self.send(&to, bytes),
                    // The driver is gone, and with it the daemon.
                    None => return,
                },
                Some(node) = cut.recv() => {
                    if let Some(peer) = peer_id(&node).filter(|peer| self.swarm.is_connected(peer)) {
                        info!(%peer, "its certificates are revoked: cutting its connections");
                        // Not connected any more is what is wanted.
                        let _gone = self.swarm.disconnect_peer_id(peer);
                    }
                }
                _ = check.tick() => {
                    self.drop_expired();
                    self.inflow.forget_quiet(Instant::now());
                }
            }
        }
    }

    fn send(&mut self, to: &NodeId, bytes: Vec<u8>) {
        let Some(peer) = peer_id(to) else { return };
        if !self.outflow.has_room(&peer, bytes.len()) {
            debug!(%peer, bytes = bytes.len(), "dropped a message: what was sent before is still on its way");
            return;
        }
        if !self.swarm.is_connected(&peer) {
            let wish = self.dials.message(peer, Instant::now());
            if wish == Wish::Drop {
                return;
            }
            if wish == Wish::Dial {
                let mut known = self.addresses.get(&peer);
                known.extend(self.seen.get(&peer).into_iter().flatten().cloned());
                let options =
                    DialOpts::peer_id(peer).addresses(known).condition(PeerCondition::DisconnectedAndNotDialing);
                if let Err(error) = self.swarm.dial(options.build()) {
                    debug!(%peer, %error, "cannot dial");
                    // No event follows, and nothing is under way.
                    self.dials.not_begun(&peer);
                }
            }
        }
        let len = bytes.len();
        let request = self.swarm.behaviour_mut().messages.send_request(&peer, bytes);
        self.outflow.sent(request, peer, len);
    }

    async fn event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Messages(request_response::Event::Message {
                peer,
                message: request_response::Message::Request { request, channel, .. },
                ..
            })) => {
                // Nobody waits for it when the connection has gone.
                let _gone = self.swarm.behaviour_mut().messages.send_response(channel, ());
                let place = self.inflow.take(peer, request.len(), Instant::now());
                match (node_id(&peer), place) {
                    (Some(from), Some(place)) => self.tell(Incoming::Message { from, bytes: request, place }).await,
                    _ => debug!(%peer, bytes = request.len(), "dropped a message: too much of its sender waits"),
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Messages(
                request_response::Event::Message {
                    message: request_response::Message::Response { request_id, .. },
                    ..
                }
                | request_response::Event::OutboundFailure { request_id, .. },
            )) => self.outflow.over(&request_id),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => self.discovered(found),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. })) => {
                // A peer's loopback is somebody else's unless both are one machine.
                let loopback = |address: &Multiaddr| ip_of(address).is_some_and(|ip| ip.is_loopback());
                let here = loopback(&info.observed_addr);
                for address in info.listen_addrs.into_iter().filter(|address| here || !loopback(address)).take(8) {
                    self.swarm.behaviour_mut().kad.add_address(&peer_id, address);
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed { id, step, .. }))
                if step.last =>
            {
                self.dials.look_up_over(&id);
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.established(peer_id, connection_id, &endpoint).await;
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => {
                self.connections.closed(&peer_id, connection_id);
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), error, .. } => {
                self.dial_failed(peer, &error.to_string())
            }
            SwarmEvent::IncomingConnectionError { error, send_back_addr, .. } => {
                debug!(%send_back_addr, %error, "a connection was not admitted");
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.listening.push(address);
                self.tell_listening().await;
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.listening.retain(|known| *known != address);
                self.tell_listening().await;
            }
            _ => {}
        }
    }

    async fn established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &libp2p::core::ConnectedPoint) {
        let admitted = self.admitted.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(&peer).cloned();
        let Some(Admitted { membership, life }) = admitted else {
            debug!(%peer, "its certificate has ended while it was let in");
            self.swarm.close_connection(id);
            return;
        };
        for stale in self.connections.established(peer, id, life, endpoint.is_dialer(), Instant::now()) {
            debug!(%peer, "closing a connection to an earlier life of it, or that it has lost");
            self.swarm.close_connection(stale);
        }
        if super::node_id(&peer).is_some_and(|node| self.gate.is_revoked(&node)) {
            // Admitted a moment before that was known.
            self.swarm.close_connection(id);
        }
        self.dials.forget(&peer);
        self.strangers.remove(&peer);
        let address = endpoint.is_dialer().then(|| without_peer(endpoint.get_remote_address().clone()).to_string());
        self.tell(Incoming::Admitted { membership, address }).await;
    }

    fn dial_failed(&mut self, peer: PeerId, reason: &str) {
        debug!(%peer, reason, "cannot reach");
        let known = self.addresses.get(&peer);
        if !known.is_empty() {
            // A member that has moved: somebody may know where to.
            if self.dials.failed(peer, Instant::now()) {
                let look_up = self.swarm.behaviour_mut().kad.get_closest_peers(peer);
                self.dials.look_up_began(look_up);
            }
        } else {
            self.dials.forget(&peer);
            if self.strangers.len() >= MAX_STRANGERS {
                self.strangers.retain(|_, since| since.elapsed() < STRANGER_REST);
            }
            if self.strangers.len() < MAX_STRANGERS {
                self.strangers.insert(peer, Instant::now());
            }
        }
    }

    fn discovered(&mut self, found: Vec<(PeerId, Multiaddr)>) {
        for (peer, address) in found {
            if self.seen.len() < MAX_SEEN || self.seen.contains_key(&peer) {
                let seen = self.seen.entry(peer).or_default();
                let address = without_peer(address.clone());
                if !seen.contains(&address) {
                    seen.insert(0, address);
                    seen.truncate(MAX_SEEN_EACH);
                }
            }
            let stranger = self.strangers.get(&peer).is_some_and(|since| since.elapsed() < STRANGER_REST);
            if stranger || self.swarm.is_connected(&peer) || peer == *self.swarm.local_peer_id() {
                continue;
            }
            let options = DialOpts::peer_id(peer)
                .addresses(vec![without_peer(address)])
                .condition(PeerCondition::DisconnectedAndNotDialing);
            if let Err(error) = self.swarm.dial(options.build()) {
                debug!(%peer, %error, "cannot dial");
            }
        }
    }

    /// A certificate may end while its owner is connected.
    fn drop_expired(&mut self) {
        let now = unix_now();
        let mut admitted = self.admitted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let expired: Vec<PeerId> =
            admitted.extract_if(|_, member| member.membership.not_after < now).map(|(peer, _)| peer).collect();
        drop(admitted);
        for peer in expired {
            // Not connected any more is what is wanted.
            if self.swarm.disconnect_peer_id(peer).is_ok() {
                info!(%peer, "its certificate has ended");
            }
        }
    }

    async fn tell_listening(&mut self) {
        let loopback = |address: &Multiaddr| {
            ip_of(address).is_some_and(|ip| match ip {
                IpAddr::V4(ip) => ip.is_loopback(),
                IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
            })
        };
        let bridges = moyai_runtime::host::bridge_addresses();
        let bridge = |address: &Multiaddr| ip_of(address).is_some_and(|ip| bridges.contains(&ip));
        let elsewhere = |address: &&Multiaddr| !loopback(address) && !bridge(address);
        let mut reachable: Vec<&Multiaddr> = self.listening.iter().filter(elsewhere).collect();
        if reachable.is_empty() {
            reachable = self.listening.iter().collect();
        }
        // QUIC first: one round trip less.
        reachable.sort_by_key(|address| !address.to_string().contains("quic"));
        let addresses = reachable.into_iter().map(ToString::to_string).collect();
        self.tell(Incoming::Listening(addresses)).await;
    }

    /// By an exclusive reference: the swarm inside may be sent between threads, and not shared.
    async fn tell(&mut self, what: Incoming) {
        // The driver is gone, and with it the daemon.
        let _gone = self.incoming.send(what).await;
    }
}

/// The addresses that are listened at with this one: itself, or all of its family.
fn every_address(ip: IpAddr) -> Vec<IpAddr> {
    let own = || moyai_runtime::host::addresses().into_iter();
    if ip.is_unspecified() { own().filter(|other| other.is_ipv4() == ip.is_ipv4()).collect() } else { vec![ip] }
}

fn without_peer(mut address: Multiaddr) -> Multiaddr {
    if matches!(address.iter().last(), Some(libp2p::multiaddr::Protocol::P2p(_))) {
        address.pop();
    }
    address
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use moyai_protocol::trust::node_of;
    use tokio::runtime::Runtime;

    use super::*;

    struct Peer {
        messages: mpsc::Sender<Outgoing>,
        incoming: mpsc::Receiver<Incoming>,
        addresses: AddressBook,
        /// Where it listens.
        at: Vec<String>,
    }

    /// A node that listens at the loopback.
    async fn peer(key: &SigningKey) -> Peer {
        let gate = Gate::of_test(key);
        let (sender, mut incoming) = mpsc::channel(64);
        let (addresses, listen) = (AddressBook::default(), "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap());
        let messages =
            start(key, Arc::new(gate), Role::Admin, &[listen], false, addresses.clone(), sender).await.unwrap();
        let Some(Incoming::Listening(at)) = incoming.recv().await else { panic!("it listens first") };
        Peer { messages, incoming, addresses, at }
    }

    impl Peer {
        async fn says(&self, to: &SigningKey, text: &str) {
            let message = Outgoing { to: node_of(to), bytes: text.as_bytes().to_vec() };
            self.messages.send(message).await.unwrap();
        }

        async fn hears(&mut self) -> String {
            loop {
                if let Incoming::Message { bytes, .. } = self.incoming.recv().await.expect("it runs") {
                    return String::from_utf8(bytes).unwrap();
                }
            }
        }
    }

    #[test]
    fn all_that_is_said_reaches_a_second_life_that_comes_at_once() {
        const BATCH: usize = 16;
        let [one, two] = [1, 2].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let main = Runtime::new().unwrap();
        let mut steady = main.block_on(peer(&one));
        let comes = |life: &Runtime, steady: &mut Peer| {
            life.block_on(async {
                let peer = peer(&two).await;
                peer.addresses.insert(&node_of(&one), &steady.at);
                peer.says(&one, "here").await;
                while !matches!(steady.incoming.recv().await.expect("it runs"), Incoming::Admitted { .. }) {}
                peer
            })
        };
        let first = Runtime::new().unwrap();
        let early = comes(&first, &mut steady);
        // As killed: it says no goodbye.
        first.shutdown_background();
        drop(early);

        let second = Runtime::new().unwrap();
        let mut late = comes(&second, &mut steady);
        // Shorter than any connection takes to be given up (10 s).
        let whole = main.block_on(async {
            let begun = Instant::now();
            let mut batch = 0;
            while begun.elapsed() < Duration::from_secs(8) {
                batch += 1;
                for at in 0..BATCH {
                    steady.says(&two, &format!("{batch}.{at}")).await;
                }
                let mut heard = 0;
                while let Ok(text) = tokio::time::timeout(Duration::from_secs(1), late.hears()).await {
                    heard += usize::from(text.starts_with(&format!("{batch}.")));
                    if heard == BATCH {
                        return true;
                    }
                }
            }
            false
        });
        assert!(whole, "a part of what is said goes nowhere");
    }
}

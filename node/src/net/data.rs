//! Bulk between nodes: chunks of images, logs of containers, lines to processes; on connections of their own, so that
//! gossip never waits behind them. Chunks go by TCP where that is possible ([`super::bulk`]), all else by quinn.
//!
//! TLS authenticates by the same keys as libp2p's (libp2p-tls), the first stream of a connection is the admission
//! exchange, and each stream after it is one request.
//!
//! ```text
//! Request::Chunks(root, ids, at)  →  the chunks ([`super::chunks`])
//! Request::Logs(…)                →  frames of [`LogFrame`], until the log has ended or the asker goes
//! Request::Exec(…)                ⇄  the frames of `moyai_runtime::launch::exec`, unread here
//! Request::Greeting               →  nothing but the stream's end
//! ```
//!
//! **Bounds.** [`MAX_CONNECTIONS`] connections and [`MAX_STREAMS`] requests on each; a request of at most
//! [`moyai_protocol::exchange::BATCH_PIECES`] chunks; a connection that asks nothing ends after [`IDLE`].

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use moyai_protocol::contract::{FetchFault, Fetched, Piece};
use moyai_protocol::exchange::BATCH_PIECES;
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_protocol::node::Node;
use moyai_protocol::trust::Role;
use moyai_protocol::workload::PlacementId;
use moyai_runtime::launch::exec::Task;
use moyai_runtime::store::Store;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::admission::{AdmissionError, Gate, PATIENCE, read_frame, unix_now, write_frame};
use super::bulk::{self, Bulk};
use super::chunks::{Came, Partly, STALL, Shelf, broken};
use super::doorstep::{Doorstep, Place, Places};
use super::{key_pair, node_id, peer_id, tls};

const ALPN: &[u8] = b"moyai-data/1";
const MAX_CONNECTIONS: usize = 256;
const MAX_STREAMS: u32 = 64;
/// Of one member: one to fetch by, and those of its earlier lives that have not timed out.
const MAX_PER_NODE: usize = 4;
/// Of the connections, those that have not shown a certificate yet: strangers take no member's place.
const MAX_UNADMITTED: usize = 128;
/// The most addresses of one node that are dialled.
const MAX_ADDRESSES: usize = 8;
/// What one address gets before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);
/// The most last lines of a log that are looked for.
const MAX_TAIL: u32 = 10_000;
const IDLE: Duration = Duration::from_secs(30);
/// Bytes of a connection's id, as quinn has them by default.
const ID: usize = 8;
/// Without it the kernel's default loses packets at a few hundred MB/s (measured, PEERS of the design).
const SOCKET_BUFFER: usize = 8 << 20;

/// Chunks of an image, to be fetched together.
#[derive(Debug)]
pub struct Batch {
    /// Of which.
    pub root: ChunkId,
    /// In this order.
    pub pieces: Vec<Piece>,
    /// Where those are in the list of its contents, where that is known.
    pub at: Vec<u32>,
}

/// Where a node gives such things, as it has said.
pub fn addresses_of(node: &Node, of: &NodeId) -> Vec<SocketAddr> {
    let told = node.catalog().node(of).into_iter().flat_map(|fact| &fact.data);
    told.filter_map(|text| text.parse().ok()).collect()
}

/// What one node asks another.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// These chunks, in this order: of which image, and where they are in the list of its contents.
    Chunks(ChunkId, Vec<ChunkId>, Vec<u32>),
    /// What a container wrote.
    Logs(LogRequest),
    /// Something is to be done in a container.
    Exec(ExecRequest),
    /// Nothing is wanted but an answer: before what must not be asked twice.
    Greeting,
}

/// What is to be done in a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// To which.
    pub placement: PlacementId,
    /// What.
    pub task: Task,
}

/// Which part of a log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogRequest {
    /// Of which container.
    pub placement: PlacementId,
    /// Go on as it grows.
    pub follow: bool,
    /// Only so many of the last lines.
    pub tail: Option<u32>,
    /// What its sandbox refused, instead of what it wrote.
    pub audit: bool,
}

/// One line of a log on its way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogFrame {
    /// stdout, stderr, or audit.
    pub stream: String,
    /// RFC 3339.
    pub time: String,
    /// With its newline.
    pub text: Vec<u8>,
}

/// What a node gives to others.
#[derive(Clone)]
pub struct Offer {
    /// Chunks of its images.
    pub shelf: Shelf,
    /// What its containers wrote.
    pub logs: Arc<dyn LogSource>,
    /// Adds processes to its containers.
    pub execs: Arc<dyn ExecSource>,
}

/// Adds processes to containers; the driver's side knows where they are.
pub trait ExecSource: Send + Sync {
    /// Does it, and returns the line to it. Blocks, within tokio's runtime.
    fn exec(&self, request: ExecRequest) -> io::Result<tokio::net::UnixStream>;
}

/// Sends logs; the driver's side knows where they lie and whether the container still runs.
pub trait LogSource: Send + Sync {
    /// Sends every line of the log to `sink` until it has ended or nobody listens.
    fn send(
        &self,
        request: LogRequest,
        sink: tokio::sync::mpsc::Sender<LogFrame>,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// This node's end of the data plane.
pub struct DataPlane {
    endpoint: quinn::Endpoint,
    keys: libp2p::identity::Keypair,
    gate: Arc<Gate>,
    store: Arc<Store>,
    partly: Arc<Partly>,
    bulk: Bulk,
    entrance: Arc<Entrance>,
    /// Connections that others opened.
    guests: Places<NodeId>,
    /// Connections this node opened. An entry is locked while it is dialled, so that a peer is dialled once.
    connections: Mutex<HashMap<NodeId, Arc<Mutex<Option<quinn::Connection>>>>>,
}

impl DataPlane {
    /// Listens on `address`; port 0 takes any.
    pub fn start(
        address: SocketAddr,
        key: &ed25519_dalek::SigningKey,
        gate: Arc<Gate>,
        offer: Offer,
    ) -> io::Result<Arc<DataPlane>> {
        let keys = key_pair(key);
        let tls = tls::server(&keys, ALPN).map_err(io::Error::other)?;
        let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport_config()));
        let socket = socket(address)?;
        let port = socket.local_addr()?.port();
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config(key), Some(config), socket, runtime)?;
        let entrance = Arc::new(Entrance::default());
        match std::net::TcpListener::bind(SocketAddr::new(address.ip(), port)).and_then(into_tokio) {
            Ok(listener) => {
                let serve =
                    bulk::serve(listener, keys.clone(), Arc::clone(&gate), offer.shelf.clone(), Arc::clone(&entrance));
                tokio::spawn(async move {
                    if let Err(error) = serve.await {
                        warn!("no chunks by TCP: {error:#}");
                    }
                });
            }
            Err(error) => warn!(port, "chunks go by QUIC alone, which costs more: {error}"),
        }
        let plane = DataPlane {
            endpoint,
            bulk: Bulk::new(keys.clone(), Arc::clone(&gate)),
            keys,
            gate,
            store: Arc::clone(&offer.shelf.store),
            partly: Arc::clone(&offer.shelf.partly),
            entrance,
            guests: Places::default(),
            connections: Mutex::default(),
        };
        let plane = Arc::new(plane);
        tokio::spawn(Arc::clone(&plane).serve(offer));
        Ok(plane)
    }

    /// What is here of images that are still coming, for those who fetch from here.
    pub fn partly(&self) -> &Partly {
        &self.partly
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.endpoint.local_addr().map_or(0, |address| address.port())
    }

    async fn serve(self: Arc<Self>, offer: Offer) {
        while let Some(incoming) = self.endpoint.accept().await {
            if self.entrance.is_busy() && !incoming.remote_address_validated() {
                // Anybody can send from any address; a busy door first asks whether somebody is there (RFC 9000, 8.1).
                // It fails only for those that were asked already.
                let _asked = incoming.retry();
                continue;
            }
            let Some(entry) = self.entrance.enter(incoming.remote_address().ip()) else {
                incoming.refuse();
                continue;
            };
            let (plane, offer) = (Arc::clone(&self), offer.clone());
            tokio::spawn(async move {
                if let Err(error) = plane.serve_one(incoming, &offer, entry).await {
                    debug!(%error, "a data connection ended");
                }
            });
        }
    }

    async fn serve_one(&self, incoming: quinn::Incoming, offer: &Offer, entry: Entry) -> anyhow::Result<()> {
        let admitted = async {
            let connection = incoming.await?;
            let peer = peer_of_connection(&connection)?;
            let (send, receive) = connection.accept_bi().await?;
            let admitted = self.gate.listen(peer, tokio::io::join(receive, send)).await?;
            Ok::<_, anyhow::Error>((connection, admitted.membership))
        };
        let (connection, membership) = tokio::time::timeout(PATIENCE * 2, admitted).await??;
        drop(entry);
        let _place = self.entrance.admit()?;
        let own = self.guests.enter(membership.node, MAX_PER_NODE);
        let _own =
            own.with_context(|| format!("node {} has {MAX_PER_NODE} connections already", membership.node.short()))?;
        let mut revocations = self.gate.revocations();
        // They end with the connection: nobody is there to be answered.
        let mut answers = JoinSet::new();
        while unix_now() <= membership.not_after {
            while answers.try_join_next().is_some() {}
            let cast_out = revocations.wait_for(|revoked| revoked.contains(&membership.node));
            let (send, receive) = tokio::select! {
                streams = connection.accept_bi() => match streams {
                    Ok(streams) => streams,
                    Err(_) => return Ok(()),
                },
                _ = cast_out => {
                    connection.close(0u32.into(), b"revoked");
                    return Ok(());
                }
            };
            let (offer, member) = (offer.clone(), (membership.node, membership.role));
            // Bounded by MAX_STREAMS, which the peer cannot exceed.
            answers.spawn(async move {
                if let Err(error) = answer(offer, member, send, receive).await {
                    debug!(%error, "a request was not answered");
                }
            });
        }
        Ok(())
    }

    /// Gets chunks from a provider, checks each, keeps them; fewer when there is `enough` before its end.
    pub async fn fetch(&self, provider: NodeId, addresses: &[SocketAddr], batch: Batch, enough: &Notify) -> Fetched {
        let started = Instant::now();
        let mut fetched = Fetched { got: Vec::new(), bytes: 0, elapsed: Duration::ZERO, has: None, fault: None };
        let mut came = Came::default();
        let fault = self.bring(provider, addresses, &batch, enough, &mut came).await.err();
        let missing = came.missing.map(FetchFault::Missing);
        fetched.has = came.has.take();
        // Of what a wrong chunk came with, nothing is believed to be worth the disk.
        fetched.fault = match fault {
            Some(fault @ FetchFault::WrongChunk(_)) => Some(fault),
            fault => match came.keep(&self.store).await {
                Ok((got, bytes)) => {
                    (fetched.got, fetched.bytes) = (got, bytes);
                    fault.or(missing)
                }
                Err(fault) => Some(fault),
            },
        };
        fetched.elapsed = started.elapsed();
        fetched
    }

    /// Gets the bytes of chunks that follow each other, each checked, and keeps none. `root` is that of what they belong to. Of one
    /// alone the length may be 0, and is what it is then.
    pub async fn read(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        root: ChunkId,
        chunks: &[([u8; 32], u32)],
    ) -> anyhow::Result<Vec<u8>> {
        anyhow::ensure!(chunks.len() == 1 || chunks.iter().all(|(_, len)| *len > 0), "a list with a chunk of no bytes");
        let mut bytes = Vec::new();
        for some in chunks.chunks(BATCH_PIECES) {
            let pieces = some.iter().map(|(chunk, len)| Piece { chunk: ChunkId(*chunk), len: *len }).collect();
            let (batch, mut came) = (Batch { root, pieces, at: Vec::new() }, Came::default());
            let brought = self.bring(provider, addresses, &batch, &Notify::new(), &mut came).await;
            let wrong = |(id, chunk): &&(ChunkId, Vec<u8>)| *blake3::hash(chunk).as_bytes() != id.0;
            let missing = came.missing.map(FetchFault::Missing);
            let fault =
                brought.err().or(missing).or(came.chunks.iter().find(wrong).map(|(id, _)| FetchFault::WrongChunk(*id)));
            if let Some(fault) = fault {
                anyhow::bail!("node {}: {fault:?}", provider.short());
            }
            came.chunks.iter().for_each(|(_, chunk)| bytes.extend_from_slice(chunk));
        }
        Ok(bytes)
    }

    /// Has a batch come, unchecked, by whatever way there is.
    async fn bring(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        batch: &Batch,
        enough: &Notify,
        came: &mut Came,
    ) -> Result<(), FetchFault> {
        match self.bulk.fetch(provider, addresses, batch, enough, came).await {
            Ok(()) => Ok(()),
            Err(bulk::Failure::Fault(fault)) => Err(fault),
            Err(bulk::Failure::NoWay) => {
                *came = Came::default();
                self.fetch_by_quic(provider, addresses, batch, enough, came).await
            }
        }
    }

    async fn fetch_by_quic(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        batch: &Batch,
        enough: &Notify,
        came: &mut Came,
    ) -> Result<(), FetchFault> {
        let Batch { root, pieces, at } = batch;
        let ids = pieces.iter().map(|piece| piece.chunk).collect();
        let asked = self.ask(provider, addresses, &Request::Chunks(*root, ids, at.clone())).await;
        let (connection, mut receive) = asked.map_err(broken)?;
        let read = tokio::select! {
            read = came.read(pieces, &mut receive) => read,
            // The stream is dropped, which stops the other side.
            () = enough.notified() => return Ok(()),
        };
        if let Err(FetchFault::Unreachable(_)) = &read {
            // It may be to an earlier life of that node, and would stall until it times out.
            self.forget(&provider, &connection).await;
        }
        if read.is_ok() && came.ended { Err(broken("it ended a batch before its end")) } else { read }
    }

    /// Asks for a log. Frames come until the other side ends it.
    pub async fn logs(
        &self,
        node: NodeId,
        addresses: &[SocketAddr],
        request: LogRequest,
        sink: tokio::sync::mpsc::Sender<LogFrame>,
    ) -> anyhow::Result<()> {
        let request = Request::Logs(request);
        let (mut connection, mut receive) = self.ask(node, addresses, &request).await?;
        let mut heard = false;
        loop {
            tokio::select! {
                frame = read_frame::<_, LogFrame>(&mut receive) => match frame {
                    Ok(frame) => {
                        heard = true;
                        if sink.send(frame).await.is_err() {
                            return Ok(());
                        }
                    }
                    Err(_) if !heard && connection.close_reason().is_some() => {
                        // It was to an earlier life of that node, which has said so: asked again, once.
                        heard = true;
                        self.forget(&node, &connection).await;
                        (connection, receive) = self.ask(node, addresses, &request).await?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    Err(error) => return Err(error.into()),
                },
                () = sink.closed() => return Ok(()),
            }
        }
    }

    /// Asks for another process in a container: what goes in, and what comes out.
    pub async fn exec(
        &self,
        node: NodeId,
        addresses: &[SocketAddr],
        request: ExecRequest,
    ) -> anyhow::Result<(quinn::SendStream, quinn::RecvStream)> {
        // The connection may be to an earlier life of that node. That is found out before: what is to be done once cannot be
        // asked a second time when its answer does not come.
        if self.greet(node, addresses).await.is_err() {
            self.greet(node, addresses).await?;
        }
        let (_, send, receive) = self.open(node, addresses, &Request::Exec(request)).await?;
        Ok((send, receive))
    }

    /// Has an answer of the node, on the connection that the next request takes.
    async fn greet(&self, node: NodeId, addresses: &[SocketAddr]) -> anyhow::Result<()> {
        let (connection, mut receive) = self.ask(node, addresses, &Request::Greeting).await?;
        let answered = tokio::time::timeout(STALL, receive.read_to_end(0)).await;
        if !matches!(answered, Ok(Ok(_))) {
            self.forget(&node, &connection).await;
        }
        answered.with_context(|| format!("no answer in {} s", STALL.as_secs()))??;
        Ok(())
    }

    async fn ask(
        &self,
        node: NodeId,
        addresses: &[SocketAddr],
        request: &Request,
    ) -> anyhow::Result<(quinn::Connection, quinn::RecvStream)> {
        let (connection, mut send, receive) = self.open(node, addresses, request).await?;
        send.finish()?;
        Ok((connection, receive))
    }

    async fn open(
        &self,
        node: NodeId,
        addresses: &[SocketAddr],
        request: &Request,
    ) -> anyhow::Result<(quinn::Connection, quinn::SendStream, quinn::RecvStream)> {
        let connection = self.connect(node, addresses).await?;
        let asked = async {
            let (mut send, receive) = connection.open_bi().await?;
            write_frame(&mut send, request).await?;
            Ok::<_, anyhow::Error>((send, receive))
        };
        match tokio::time::timeout(STALL, asked).await {
            Ok(Ok((send, receive))) => Ok((connection, send, receive)),
            Ok(Err(error)) => {
                self.forget(&node, &connection).await;
                Err(error)
            }
            Err(_) => {
                self.forget(&node, &connection).await;
                anyhow::bail!("no answer in {} s", STALL.as_secs())
            }
        }
    }

    /// The node has come to this one anew: what was opened to it before may be to an earlier life of it.
    pub fn begin_anew(self: &Arc<Self>, node: NodeId) {
        self.bulk.begin_anew(&node);
        let plane = Arc::clone(self);
        tokio::spawn(async move {
            let slot = plane.connections.lock().await.get(&node).cloned();
            if let Some(slot) = slot {
                // What is under way on it goes on; what is asked next opens another.
                *slot.lock().await = None;
            }
        });
    }

    /// Uses a connection no more, unless another has taken its place already.
    async fn forget(&self, node: &NodeId, connection: &quinn::Connection) {
        let slot = self.connections.lock().await.get(node).cloned();
        if let Some(slot) = slot {
            let mut slot = slot.lock().await;
            if slot.as_ref().is_some_and(|current| current.stable_id() == connection.stable_id()) {
                *slot = None;
            }
        }
    }

    async fn connect(&self, node: NodeId, addresses: &[SocketAddr]) -> anyhow::Result<quinn::Connection> {
        let slot = {
            let mut connections = self.connections.lock().await;
            if connections.len() >= MAX_CONNECTIONS && !connections.contains_key(&node) {
                connections.clear();
            }
            Arc::clone(connections.entry(node).or_default())
        };
        let mut slot = slot.lock().await;
        anyhow::ensure!(!self.gate.is_revoked(&node), "the certificates of node {} are revoked", node.short());
        if let Some(connection) = slot.as_ref().filter(|connection| connection.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let peer = peer_id(&node).ok_or_else(|| anyhow::anyhow!("node {} has no key", node.short()))?;
        let tls = tls::client(&self.keys, peer, ALPN)?;
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        config.transport_config(Arc::new(transport_config()));
        let dialled = first_of(addresses, PATIENCE, |address| self.dial(node, address, config.clone())).await;
        let connection = dialled.with_context(|| format!("node {}", node.short()))?;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    async fn dial(
        &self,
        node: NodeId,
        address: SocketAddr,
        config: quinn::ClientConfig,
    ) -> anyhow::Result<quinn::Connection> {
        let connection = self.endpoint.connect_with(config, address, "l")?.await?;
        let (send, receive) = connection.open_bi().await?;
        self.gate.dial(node, tokio::io::join(receive, send)).await?;
        Ok(connection)
    }
}

/// Who comes and who is in, by whatever way; places for both are counted together.
pub(super) struct Entrance {
    room: Semaphore,
    hall: Arc<Semaphore>,
    doorstep: Doorstep,
}

/// A place before the door.
pub(super) type Entry = (OwnedSemaphorePermit, Place<IpAddr>);

impl Default for Entrance {
    fn default() -> Self {
        let (room, hall) = (Semaphore::new(MAX_CONNECTIONS), Arc::new(Semaphore::new(MAX_UNADMITTED)));
        Entrance { room, hall, doorstep: Doorstep::default() }
    }
}

impl Entrance {
    /// Takes a place for somebody who has shown nothing yet.
    pub(super) fn enter(&self, from: IpAddr) -> Option<Entry> {
        Some((Arc::clone(&self.hall).try_acquire_owned().ok()?, self.doorstep.enter(from)?))
    }

    /// Takes a place for a member.
    pub(super) fn admit(&self) -> anyhow::Result<tokio::sync::SemaphorePermit<'_>> {
        self.room.try_acquire().with_context(|| format!("there are {MAX_CONNECTIONS} connections already"))
    }

    fn is_busy(&self) -> bool {
        self.hall.available_permits() < MAX_UNADMITTED * 3 / 4
    }
}

/// Dials these addresses, the next one beside the one before it, which may be one that nothing answers, or at once when
/// that one fails (RFC 8305).
pub(super) async fn first_of<T, F: Future<Output = anyhow::Result<T>>>(
    addresses: &[SocketAddr],
    patience: Duration,
    dial: impl Fn(SocketAddr) -> F,
) -> anyhow::Result<T> {
    let mut untried = addresses.iter().take(MAX_ADDRESSES);
    let mut dials = FuturesUnordered::new();
    let mut last = anyhow::anyhow!("it has told no address for data");
    loop {
        if let Some(&address) = untried.next() {
            let dialled = tokio::time::timeout(patience, dial(address));
            dials.push(
                async move { dialled.await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer from {address}"))) },
            );
        } else if dials.is_empty() {
            return Err(last);
        }
        let more = untried.len() > 0;
        tokio::select! {
            Some(dialled) = dials.next() => match dialled {
                Ok(reached) => return Ok(reached),
                Err(error) => last = error,
            },
            () = tokio::time::sleep(HEAD_START), if more => {}
        }
    }
}

fn peer_of_connection(connection: &quinn::Connection) -> Result<NodeId, AdmissionError> {
    let identity = connection.peer_identity();
    let certificates = identity.and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    peer_of(&certificates.unwrap_or_default())
}

/// Whose certificates these are.
pub(super) fn peer_of(certificates: &[CertificateDer<'_>]) -> Result<NodeId, AdmissionError> {
    let stranger = |reason: &str| AdmissionError::Stranger(reason.to_owned());
    let first = certificates.first().ok_or_else(|| stranger("no certificate"))?;
    let parsed = libp2p_tls::certificate::parse(first).map_err(|error| stranger(&error.to_string()))?;
    node_id(&parsed.peer_id()).ok_or_else(|| stranger("a key that is not ed25519"))
}

fn into_tokio(listener: std::net::TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::DGRAM, None)?;
    // What the kernel does not grant is gone without.
    let _smaller = (socket.set_recv_buffer_size(SOCKET_BUFFER), socket.set_send_buffer_size(SOCKET_BUFFER));
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// The same in every life of a node, so that it can tell others that their connections to an earlier one are gone: whoever sends
/// on such a connection is answered with its reset token (RFC 9000 section 10.3), and need not wait until it times out.
fn endpoint_config(key: &ed25519_dalek::SigningKey) -> quinn::EndpointConfig {
    let tokens = ResetKey(blake3::derive_key("moyai data plane reset tokens v1", key.as_bytes()));
    let mut config = quinn::EndpointConfig::new(Arc::new(tokens));
    config.cid_generator(|| Box::new(AnyId));
    config
}

/// Random ids; those of an earlier life are not told from others, since they are to be answered too.
struct AnyId;

impl quinn::ConnectionIdGenerator for AnyId {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        let mut id = [0; ID];
        // It fails only when no file can be opened; quinn asks again for an id that is taken.
        if let Ok(random) = crate::daemon::home::random::<ID>() {
            id = random;
        }
        quinn::ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// What reset tokens are made with.
struct ResetKey([u8; 32]);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        signature.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        // Compared in constant time, by its type.
        let right =
            <[u8; blake3::OUT_LEN]>::try_from(signature).is_ok_and(|given| blake3::keyed_hash(&self.0, data) == given);
        if right { Ok(()) } else { Err(quinn::crypto::CryptoError) }
    }
}

fn transport_config() -> quinn::TransportConfig {
    let mut config = quinn::TransportConfig::default();
    config
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(0u8.into())
        .stream_receive_window((4u32 << 20).into())
        .receive_window((16u32 << 20).into())
        .send_window(16 << 20)
        .keep_alive_interval(Some(IDLE / 3))
        .max_idle_timeout(Some(IDLE.try_into().expect("seconds fit")));
    config
}

async fn answer(
    offer: Offer,
    (member, role): (NodeId, Role),
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) -> anyhow::Result<()> {
    let request = tokio::time::timeout(PATIENCE, read_frame::<_, Request>(&mut receive)).await??;
    match request {
        Request::Chunks(root, ids, at) => {
            let noted = offer.shelf.note(root, &ids, at).await;
            // Who wants no more of it stops the stream, and writing fails.
            offer.shelf.give(member, ids, &mut send, || Ok(false)).await?;
            noted.stays();
        }
        Request::Greeting => {}
        Request::Exec(_) if role < Role::Submitter => anyhow::bail!("a worker asked for a process"),
        Request::Exec(request) => {
            let execs = Arc::clone(&offer.execs);
            let line = tokio::task::spawn_blocking(move || execs.exec(request)).await??;
            pass_on(line, &mut send, &mut receive).await?
        }
        Request::Logs(_) if role < Role::Submitter => anyhow::bail!("a worker asked for a log"),
        Request::Logs(mut request) => {
            request.tail = request.tail.map(|tail| tail.min(MAX_TAIL));
            let (sink, mut frames) = tokio::sync::mpsc::channel(64);
            tokio::spawn(offer.logs.send(request, sink));
            loop {
                tokio::select! {
                    frame = frames.recv() => match frame {
                        Some(frame) => write_frame(&mut send, &frame).await?,
                        None => break,
                    },
                    _ = send.stopped() => return Ok(()),
                }
            }
        }
    }
    send.finish()?;
    Ok(())
}

/// Copies between a process and whoever asked for it, until the process has ended, or that one is gone.
async fn pass_on(
    line: tokio::net::UnixStream,
    send: &mut quinn::SendStream,
    receive: &mut quinn::RecvStream,
) -> io::Result<()> {
    let (mut out, mut into) = line.into_split();
    let there = async {
        let copied = tokio::io::copy(receive, &mut into).await;
        // It has nothing more to say. What the process writes still comes.
        drop(into);
        copied
    };
    let back = tokio::io::copy(&mut out, send);
    let mut there = std::pin::pin!(there);
    let mut back = std::pin::pin!(back);
    tokio::select! {
        copied = &mut back => copied.map(drop),
        _ = &mut there => back.await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use moyai_protocol::exchange::Bitfield;
    use moyai_protocol::trust::node_of;

    use super::super::chunks::{ChunkTamper, Limit};
    use super::*;

    /// Has no containers.
    struct Nothing;

    impl ExecSource for Nothing {
        fn exec(&self, _: ExecRequest) -> io::Result<tokio::net::UnixStream> {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    impl LogSource for Nothing {
        fn send(
            &self,
            _: LogRequest,
            _: tokio::sync::mpsc::Sender<LogFrame>,
        ) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
            Box::pin(std::future::ready(()))
        }
    }

    /// A node that listens at the loopback, with a store in this folder.
    fn plane(key: &SigningKey, dir: &std::path::Path, tamper: Option<ChunkTamper>) -> Arc<DataPlane> {
        let shelf = Shelf {
            store: Arc::new(Store::open(dir, None).unwrap()),
            tamper,
            limit: Arc::new(Limit::new(None)),
            partly: Arc::default(),
        };
        let offer = Offer { shelf, logs: Arc::new(Nothing), execs: Arc::new(Nothing) };
        DataPlane::start("127.0.0.1:0".parse().unwrap(), key, Arc::new(Gate::of_test(key)), offer).unwrap()
    }

    /// Has these chunks there.
    fn put(plane: &DataPlane, chunks: Vec<Vec<u8>>) -> Vec<Piece> {
        let piece =
            |bytes: &Vec<u8>| Piece { chunk: ChunkId(*blake3::hash(bytes).as_bytes()), len: bytes.len() as u32 };
        let pieces: Vec<Piece> = chunks.iter().map(piece).collect();
        plane.store.put_chunks(pieces.iter().map(|piece| piece.chunk.0).zip(chunks).collect()).unwrap();
        pieces
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_read_of_another_node_is_checked_and_not_kept() {
        let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let keys = [1, 2, 3].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let zeros: ChunkTamper = |bytes| vec![0; bytes.map_or(0, |bytes| bytes.len())];
        let tampers = [None, Some(zeros), None];
        let [honest, liar, asker] = [0, 1, 2].map(|at| plane(&keys[at], dirs[at].path(), tampers[at]));
        // More than a batch has.
        let chunks: Vec<Vec<u8>> = (0..BATCH_PIECES as u32 + 10).map(|at| at.to_be_bytes().to_vec()).collect();
        let pieces = put(&honest, chunks.clone());
        put(&liar, chunks.clone());
        let mut wanted: Vec<([u8; 32], u32)> = pieces.iter().map(|piece| (piece.chunk.0, piece.len)).collect();
        let read = async |from: usize, provider: &DataPlane, wanted: &[([u8; 32], u32)]| {
            let address = SocketAddr::from(([127, 0, 0, 1], provider.port()));
            asker.read(node_of(&keys[from]), &[address], ChunkId([9; 32]), wanted).await
        };
        assert_eq!(read(0, &honest, &wanted).await.unwrap(), chunks.concat());
        assert_eq!(asker.store.chunk(&wanted[0].0).unwrap(), None);
        assert!(read(1, &liar, &wanted).await.is_err());
        // A chunk that is not there, and one of another length than was said.
        wanted.push(([7; 32], 4));
        assert!(read(0, &honest, &wanted).await.is_err());
        wanted.pop();
        wanted[3].1 = 5;
        assert!(read(0, &honest, &wanted).await.is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_line_tells_behind_each_batch_what_else_is_here_and_goes_on_also_after_one_that_was_called_off() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let keys = [1, 2].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let [provider, asker] = [0, 1].map(|at| plane(&keys[at], dirs[at].path(), None));
        let pieces = put(&provider, (0..20u8).map(|at| vec![at; 100_000]).collect());
        let (root, node) = (ChunkId([9; 32]), node_of(&keys[0]));
        let address = SocketAddr::from(([127, 0, 0, 1], provider.port()));
        let enough = Notify::new();
        for (at, bits) in [0b1, 0b11, 0b111].into_iter().enumerate() {
            provider.partly().set([(root, &Bitfield::from_bytes(&[bits], 8))].into_iter());
            if at == 1 {
                enough.notify_one();
            }
            let batch = Batch { root, pieces: pieces[at..at + 16].to_vec(), at: Vec::new() };
            let fetched = asker.fetch(node, &[address], batch, &enough).await;
            assert_eq!((fetched.fault, fetched.has), (None, Some(vec![bits])), "batch {at}");
            assert!(fetched.got.len() == 16 || at == 1, "batch {at}: {}", fetched.got.len());
        }
        provider.partly().retain(|_| false);
        let batch = Batch { root, pieces: pieces[..1].to_vec(), at: vec![0] };
        let fetched = asker.fetch(node, &[address], batch, &enough).await;
        assert_eq!((fetched.got.len(), fetched.fault, fetched.has), (1, None, None), "it does not have all of it");
        assert_eq!(asker.bulk.idle_lines(&node), 1, "one line was enough");
    }
}

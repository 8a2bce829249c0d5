//! Bulk between nodes: chunks of images and logs of containers, on quinn connections of their own, so that gossip never
//! waits behind them.
//!
//! TLS authenticates by the same keys as libp2p's (libp2p-tls), the first stream of a connection is the admission
//! exchange, and each stream after it is one request.
//!
//! ```text
//! Request::Chunks(ids)  →  for each: length (4 bytes, all ones for "not here"), bytes
//! Request::Logs(…)      →  frames of [`LogFrame`], until the log has ended or the asker goes
//! Request::Exec(…)      ⇄  the frames of `moyai_runtime::launch::exec`, unread here
//! Request::Greeting     →  nothing but the stream's end
//! ```
//!
//! **Bounds.** [`MAX_CONNECTIONS`] connections and [`MAX_STREAMS`] requests on each; a request of at most
//! [`BATCH_PIECES`] chunks; a chunk of at most [`MAX_CHUNK`] bytes; a connection that asks nothing ends after [`IDLE`].

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
use moyai_protocol::trust::Role;
use moyai_protocol::workload::PlacementId;
use moyai_runtime::launch::exec::Task;
use moyai_runtime::store::Store;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::admission::{AdmissionError, Gate, PATIENCE, read_frame, unix_now, write_frame};
use super::doorstep::{Doorstep, Place, Places};
use super::{key_pair, node_id, peer_id};

const ALPN: &[u8] = b"moyai-data/1";
const MAX_CONNECTIONS: usize = 256;
const MAX_STREAMS: u32 = 64;
/// Of one member: one to fetch by, and those of its earlier lives that have not timed out.
const MAX_PER_NODE: usize = 4;
/// What is sent and not taken for this long is given up, and its request with it.
const WRITE_STALL: Duration = Duration::from_secs(30);
/// Of the connections, those that have not shown a certificate yet: strangers take no member's place.
const MAX_UNADMITTED: usize = 128;
/// The most addresses of one node that are dialled.
const MAX_ADDRESSES: usize = 8;
/// What one address gets before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);
/// The most last lines of a log that are looked for.
const MAX_TAIL: u32 = 10_000;
/// Also of an image's root, which is one chunk however many layers it has.
const MAX_CHUNK: u32 = 4 << 20;
const IDLE: Duration = Duration::from_secs(30);
const NOT_HERE: u32 = u32::MAX;
/// A batch that delivers nothing for this long is given to another provider.
const STALL: Duration = Duration::from_secs(10);
/// Bytes of a connection's id, as quinn has them by default.
const ID: usize = 8;
/// Without it the kernel's default loses packets at a few hundred MB/s (measured, PEERS of the design).
const SOCKET_BUFFER: usize = 8 << 20;

/// What one node asks another.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// These chunks, in this order.
    Chunks(Vec<ChunkId>),
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

/// What a daemon of the tests does to each chunk it serves; others do nothing.
pub type ChunkTamper = fn(Vec<u8>) -> Vec<u8>;

/// What a node gives to others.
#[derive(Clone)]
pub struct Offer {
    /// Chunks of its images are here.
    pub store: Arc<Store>,
    /// What becomes of them on their way out.
    pub tamper: Option<ChunkTamper>,
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
        let mut tls = libp2p_tls::make_server_config(&keys).map_err(io::Error::other)?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport_config()));
        let socket = socket(address)?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config(key), Some(config), socket, runtime)?;
        let store = Arc::clone(&offer.store);
        let plane = DataPlane { endpoint, keys, gate, store, guests: Places::default(), connections: Mutex::default() };
        let plane = Arc::new(plane);
        tokio::spawn(Arc::clone(&plane).serve(offer));
        Ok(plane)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.endpoint.local_addr().map_or(0, |address| address.port())
    }

    async fn serve(self: Arc<Self>, offer: Offer) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let hall = Arc::new(Semaphore::new(MAX_UNADMITTED));
        let doorstep = Doorstep::default();
        while let Some(incoming) = self.endpoint.accept().await {
            if hall.available_permits() < MAX_UNADMITTED * 3 / 4 && !incoming.remote_address_validated() {
                // Anybody can send from any address; a busy door first asks whether somebody is there (RFC 9000, 8.1).
                // It fails only for those that were asked already.
                let _asked = incoming.retry();
                continue;
            }
            let entry = (Arc::clone(&hall).try_acquire_owned().ok(), doorstep.enter(incoming.remote_address().ip()));
            let (Some(place), Some(step)) = entry else {
                incoming.refuse();
                continue;
            };
            let entry = (place, step);
            let (plane, offer, room) = (Arc::clone(&self), offer.clone(), Arc::clone(&room));
            tokio::spawn(async move {
                if let Err(error) = plane.serve_one(incoming, &offer, entry, &room).await {
                    debug!(%error, "a data connection ended");
                }
            });
        }
    }

    async fn serve_one(
        &self,
        incoming: quinn::Incoming,
        offer: &Offer,
        entry: (OwnedSemaphorePermit, Place<IpAddr>),
        room: &Semaphore,
    ) -> anyhow::Result<()> {
        let admitted = async {
            let connection = incoming.await?;
            let peer = peer_of(&connection)?;
            let (send, receive) = connection.accept_bi().await?;
            let membership = self.gate.listen(peer, tokio::io::join(receive, send)).await?;
            Ok::<_, anyhow::Error>((connection, membership))
        };
        let (connection, membership) = tokio::time::timeout(PATIENCE * 2, admitted).await??;
        drop(entry);
        let _place = room.try_acquire()?;
        let own = self.guests.enter(membership.node, MAX_PER_NODE);
        let _own =
            own.with_context(|| format!("node {} has {MAX_PER_NODE} connections already", membership.node.short()))?;
        let mut revocations = self.gate.revocations();
        while unix_now() <= membership.not_after {
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
            let (offer, role) = (offer.clone(), membership.role);
            // Bounded by MAX_STREAMS, which the peer cannot exceed.
            tokio::spawn(async move {
                if let Err(error) = answer(offer, role, send, receive).await {
                    debug!(%error, "a request was not answered");
                }
            });
        }
        Ok(())
    }

    /// Gets chunks from a provider, checks each, keeps them.
    pub async fn fetch(&self, provider: NodeId, addresses: &[SocketAddr], pieces: Vec<Piece>) -> Fetched {
        let started = Instant::now();
        let mut fetched = Fetched { got: Vec::new(), bytes: 0, elapsed: Duration::ZERO, fault: None };
        let mut used = None;
        if let Err(fault) = self.fetch_into(provider, addresses, &pieces, &mut used, &mut fetched).await {
            if let (FetchFault::Unreachable(_), Some(connection)) = (&fault, used) {
                // It may be to an earlier life of that node, and would stall until it times out.
                self.forget(&provider, &connection).await;
            }
            fetched.fault = Some(fault);
        }
        fetched.elapsed = started.elapsed();
        fetched
    }

    async fn fetch_into(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        pieces: &[Piece],
        used: &mut Option<quinn::Connection>,
        fetched: &mut Fetched,
    ) -> Result<(), FetchFault> {
        let broken = |error: &dyn std::fmt::Display| FetchFault::Unreachable(error.to_string());
        let ids = pieces.iter().map(|piece| piece.chunk).collect();
        let asked = self.ask(provider, addresses, &Request::Chunks(ids)).await;
        let (connection, mut receive) = asked.map_err(|error| broken(&error))?;
        *used = Some(connection);
        let mut waiting = Vec::new();
        let mut missing = None;
        for piece in pieces {
            let bytes = tokio::time::timeout(STALL, read_chunk(&mut receive)).await;
            let bytes = bytes.map_err(|_| broken(&"it stalled"))?.map_err(|error| broken(&error))?;
            match bytes {
                None => missing = missing.or(Some(piece.chunk)),
                // A root's length is known only when it comes.
                Some(bytes) if piece.len != 0 && bytes.len() != piece.len as usize => {
                    return Err(FetchFault::WrongChunk(piece.chunk));
                }
                Some(bytes) => waiting.push((piece.chunk, bytes)),
            }
        }
        let (ids, bytes): (Vec<ChunkId>, u64) =
            (waiting.iter().map(|(id, _)| *id).collect(), waiting.iter().map(|(_, bytes)| bytes.len() as u64).sum());
        let store = Arc::clone(&self.store);
        let chunks: Vec<([u8; 32], Vec<u8>)> = waiting.into_iter().map(|(id, bytes)| (id.0, bytes)).collect();
        let kept = tokio::task::spawn_blocking(move || store.put_chunks(chunks)).await;
        match kept.map_err(|error| FetchFault::Storage(error.to_string()))? {
            Ok(()) => {}
            Err(moyai_runtime::store::StoreError::WrongChunk(chunk)) => {
                return Err(FetchFault::WrongChunk(ChunkId(chunk)));
            }
            Err(error) => return Err(FetchFault::Storage(error.to_string())),
        }
        fetched.got = ids;
        fetched.bytes = bytes;
        missing.map_or(Ok(()), |chunk| Err(FetchFault::Missing(chunk)))
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
        let mut tls = libp2p_tls::make_client_config(&self.keys, Some(peer))?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        config.transport_config(Arc::new(transport_config()));
        // The next address is tried beside the one before it, which may be one that nothing answers, or at once when
        // that one fails (RFC 8305).
        let mut untried = addresses.iter().take(MAX_ADDRESSES);
        let mut dials = FuturesUnordered::new();
        let mut last = anyhow::anyhow!("node {} has told no address for data", node.short());
        loop {
            if let Some(address) = untried.next() {
                let dial = self.dial(node, *address, config.clone());
                dials.push(async move {
                    let dialled = tokio::time::timeout(PATIENCE, dial).await;
                    dialled.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer from {address}")))
                });
            } else if dials.is_empty() {
                return Err(last);
            }
            let more = untried.len() > 0;
            tokio::select! {
                Some(dialled) = dials.next() => match dialled {
                    Ok(connection) => {
                        *slot = Some(connection.clone());
                        return Ok(connection);
                    }
                    Err(error) => last = error,
                },
                () = tokio::time::sleep(HEAD_START), if more => {}
            }
        }
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

fn peer_of(connection: &quinn::Connection) -> Result<NodeId, AdmissionError> {
    let stranger = |reason: &str| AdmissionError::Stranger(reason.to_owned());
    let identity = connection.peer_identity().ok_or_else(|| stranger("no certificate"))?;
    let certificates = identity
        .downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>()
        .map_err(|_| stranger("no certificate"))?;
    let first = certificates.first().ok_or_else(|| stranger("no certificate"))?;
    let parsed = libp2p_tls::certificate::parse(first).map_err(|error| stranger(&error.to_string()))?;
    node_id(&parsed.peer_id()).ok_or_else(|| stranger("a key that is not ed25519"))
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
    role: Role,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) -> anyhow::Result<()> {
    let request = tokio::time::timeout(PATIENCE, read_frame::<_, Request>(&mut receive)).await??;
    match request {
        Request::Chunks(ids) => {
            for id in ids.into_iter().take(BATCH_PIECES) {
                let store = Arc::clone(&offer.store);
                let bytes = tokio::task::spawn_blocking(move || store.chunk(&id.0)).await??;
                let bytes = match offer.tamper {
                    Some(tamper) => bytes.map(tamper),
                    None => bytes,
                };
                let written = async {
                    match bytes {
                        Some(bytes) => {
                            send.write_all(&(bytes.len() as u32).to_be_bytes()).await?;
                            send.write_all(&bytes).await
                        }
                        None => send.write_all(&NOT_HERE.to_be_bytes()).await,
                    }
                };
                tokio::time::timeout(WRITE_STALL, written).await??;
            }
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

async fn read_chunk(receive: &mut quinn::RecvStream) -> io::Result<Option<Vec<u8>>> {
    let len = receive.read_u32().await?;
    if len == NOT_HERE {
        return Ok(None);
    }
    if len > MAX_CHUNK {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a chunk of {len} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    receive.read_exact(&mut bytes).await.map_err(io::Error::other)?;
    Ok(Some(bytes))
}

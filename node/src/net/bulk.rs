//! Chunks over TCP and TLS, which take most bytes between nodes.
//!
//! The kernel cuts TCP into packets and joins them again, QUIC's it does not: a byte costs less than half the processor
//! this way (measured; figures in the design). Whoever cannot be reached by TCP is asked by QUIC ([`super::data`]), and
//! not dialled here again for [`REST`].
//!
//! The certificates are the same, and the admission exchange comes first. Then one batch after the other:
//!
//! ```text
//! Ask::Chunks(root, ids, at)  →
//!                             ←  the chunks ([`super::chunks`])
//! Ask::Enough                 →  at any time: the rest of them is wanted no more
//!                             ←  END, 4 bytes, after the last one sent, and what else the provider has of the image
//! ```
//!
//! `Enough` may cross the end of what it is about; between two batches it means nothing.
//!
//! **If the other side dies:** the kernel says so when it was the process; [`STALL`] does when it was the machine. A line
//! that was idle may be to an earlier life of the provider, so a batch of which nothing came on one is asked for once more on
//! another.
//!
//! **Bounds.** As for QUIC, and counted together with it ([`super::data::Entrance`]): [`MAX_PER_NODE`] lines of one member,
//! of which this node opens [`MAX_LINES`]; a line on which nothing is asked or given ends after [`IDLE`].

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use moyai_protocol::contract::FetchFault;
use moyai_protocol::exchange::WITH_THE_ONLY_ONE;
use moyai_protocol::id::{ChunkId, NodeId};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tracing::debug;

use super::admission::{Gate, PATIENCE, read_frame, unix_now, write_frame};
use super::awaiting::Awaiting;
use super::chunks::{Came, END, STALL, Shelf, broken};
use super::data::{Batch, Entrance, first_of, peer_of};
use super::doorstep::Places;
use super::{peer_id, tls};

const ALPN: &[u8] = b"moyai-bulk/1";
/// Lines to one provider: for the batches of two images that nobody else has.
const MAX_LINES: usize = 2 * WITH_THE_ONLY_ONE;
/// Lines from one member: those of its earlier lives may not have ended.
const MAX_PER_NODE: usize = 2 * MAX_LINES;
/// A line that asks nothing for this long ends; whoever opened it uses it no longer than half of that.
const IDLE: Duration = Duration::from_secs(30);
/// A provider that cannot be reached this way is not dialled again sooner.
const REST: Duration = Duration::from_secs(300);
/// For a connection: where a firewall drops it, QUIC is to have its turn soon.
const DIAL: Duration = Duration::from_secs(2);
/// What is read from a socket at one time: rustls by itself asks for four kilobytes.
const READ: usize = 128 << 10;
/// Providers that are remembered.
const MAX_PROVIDERS: usize = 1024;

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// Of the image of that root, and where they are in the list of its contents.
    Chunks(ChunkId, Vec<ChunkId>, Vec<u32>),
    Enough,
}

type Line = client::TlsStream<BufReader<Awaiting>>;

/// The lines to one provider.
struct Lines {
    places: Semaphore,
    idle: Mutex<Vec<(Line, Instant)>>,
    /// Until when it is not dialled.
    rests: Mutex<Option<Instant>>,
}

/// This node's end.
pub(super) struct Bulk {
    keys: libp2p::identity::Keypair,
    gate: Arc<Gate>,
    providers: Mutex<HashMap<NodeId, Arc<Lines>>>,
}

/// Why a batch did not come this way.
pub(super) enum Failure {
    /// There is no way to the provider by TCP.
    NoWay,
    /// It is at fault.
    Fault(FetchFault),
}

impl Bulk {
    pub(super) fn new(keys: libp2p::identity::Keypair, gate: Arc<Gate>) -> Self {
        Bulk { keys, gate, providers: Mutex::default() }
    }

    /// Gets a batch, or what comes of it until there is `enough`.
    pub(super) async fn fetch(
        &self,
        provider: NodeId,
        addresses: &[SocketAddr],
        wanted: &Batch,
        enough: &Notify,
        came: &mut Came,
    ) -> Result<(), Failure> {
        let lines = self.lines(provider);
        let _place = lines.places.acquire().await.map_err(|_| Failure::NoWay)?;
        if self.gate.is_revoked(&provider) {
            return Err(Failure::NoWay);
        }
        while let Some(mut line) = lines.idle() {
            match ask(&mut line, wanted, enough, came).await {
                Ok(is_of_use) => {
                    if is_of_use {
                        lines.keep(line);
                    }
                    return Ok(());
                }
                Err(FetchFault::Unreachable(_)) if came.chunks.is_empty() && came.missing.is_none() => {
                    *came = Came::default();
                }
                Err(fault) => return Err(Failure::Fault(fault)),
            }
        }
        let mut line = self.dial(provider, addresses, &lines).await.ok_or(Failure::NoWay)?;
        if ask(&mut line, wanted, enough, came).await.map_err(Failure::Fault)? {
            lines.keep(line);
        }
        Ok(())
    }

    /// Lines to a provider that wait for the next batch.
    #[cfg(test)]
    pub(super) fn idle_lines(&self, provider: &NodeId) -> usize {
        self.lock()[provider].idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len()
    }

    /// The node has come to this one anew: lines to its earlier life are of no use.
    pub(super) fn begin_anew(&self, node: &NodeId) {
        self.lock().remove(node);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<NodeId, Arc<Lines>>> {
        self.providers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn lines(&self, provider: NodeId) -> Arc<Lines> {
        let mut providers = self.lock();
        if providers.len() >= MAX_PROVIDERS && !providers.contains_key(&provider) {
            providers.clear();
        }
        Arc::clone(providers.entry(provider).or_default())
    }

    async fn dial(&self, provider: NodeId, addresses: &[SocketAddr], lines: &Lines) -> Option<Line> {
        if lines.rests() {
            return None;
        }
        let dialled = first_of(addresses, DIAL, |address| self.dial_one(provider, address));
        match dialled.await {
            Ok(line) => Some(line),
            Err(error) => {
                debug!(node = %provider.short(), "no TCP for chunks: {error:#}");
                lines.rest();
                None
            }
        }
    }

    async fn dial_one(&self, provider: NodeId, address: SocketAddr) -> anyhow::Result<Line> {
        let peer = peer_id(&provider).with_context(|| format!("node {} has no key", provider.short()))?;
        let tls = tls::client(&self.keys, peer, ALPN)?;
        let stream = buffered(TcpStream::connect(address).await?)?;
        let name = ServerName::try_from("l").expect("a letter is a name");
        let mut line = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
        self.gate.dial(provider, &mut line).await?;
        Ok(line)
    }
}

impl Default for Lines {
    fn default() -> Self {
        Lines { places: Semaphore::new(MAX_LINES), idle: Mutex::default(), rests: Mutex::default() }
    }
}

impl Lines {
    fn idle(&self) -> Option<Line> {
        let mut idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        idle.retain(|(_, since)| since.elapsed() < IDLE / 2);
        idle.pop().map(|(line, _)| line)
    }

    /// As many as have a place.
    fn keep(&self, line: Line) {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((line, Instant::now()));
    }

    fn rests(&self) -> bool {
        let rests = self.rests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        rests.is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        *self.rests.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Instant::now() + REST);
    }
}

/// Asks for a batch and reads it to its end; whether the line can be used again.
async fn ask(line: &mut Line, wanted: &Batch, enough: &Notify, came: &mut Came) -> Result<bool, FetchFault> {
    let Batch { root, pieces, at } = wanted;
    let ids = pieces.iter().map(|piece| piece.chunk).collect();
    let asked = tokio::time::timeout(STALL, write_frame(line, &Ask::Chunks(*root, ids, at.clone()))).await;
    asked.map_err(|_| broken("it takes no request"))?.map_err(broken)?;
    line.get_mut().0.get_mut().expect(pieces.iter().map(|piece| u64::from(piece.len)).sum());
    let (mut receive, mut send) = tokio::io::split(line);
    let mut called_off = false;
    {
        let mut reading = std::pin::pin!(came.read(pieces, &mut receive));
        tokio::select! {
            read = &mut reading => read?,
            () = enough.notified() => {
                called_off = true;
                write_frame(&mut send, &Ask::Enough).await.map_err(broken)?;
                reading.await?;
            }
        }
    }
    if came.ended && !called_off {
        return Err(broken("it ended a batch before its end"));
    }
    if !came.ended {
        let end = tokio::time::timeout(STALL, receive.read_u32()).await;
        came.ended = end.map_err(|_| broken("it stalled"))?.map_err(broken)? == END;
        if !came.ended {
            return Err(broken("it sends more than was asked for"));
        }
    }
    came.read_has(&mut receive).await
}

/// Gives chunks to whoever comes by TCP.
pub(super) async fn serve(
    listener: TcpListener,
    keys: libp2p::identity::Keypair,
    gate: Arc<Gate>,
    shelf: Shelf,
    entrance: Arc<Entrance>,
) -> anyhow::Result<()> {
    let tls = tls::server(&keys, ALPN)?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let guests: Places<NodeId> = Places::default();
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            // Out of descriptors, say: there may be some again in a moment.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Some(entry) = entrance.enter(from.ip()) else { continue };
        let (gate, shelf, entrance) = (Arc::clone(&gate), shelf.clone(), Arc::clone(&entrance));
        let (acceptor, guests) = (acceptor.clone(), guests.clone());
        tokio::spawn(async move {
            let served = async {
                let admitted = async {
                    let mut line = acceptor.accept(buffered(stream)?).await?;
                    let peer = peer_of(line.get_ref().1.peer_certificates().unwrap_or_default())?;
                    let admitted = gate.listen(peer, &mut line).await?;
                    Ok::<_, anyhow::Error>((line, admitted.membership))
                };
                let (line, membership) = tokio::time::timeout(PATIENCE * 2, admitted).await??;
                drop(entry);
                let _place = entrance.admit()?;
                let _own = guests.enter(membership.node, MAX_PER_NODE).context("it has all its lines already")?;
                let mut revocations = gate.revocations();
                let left = Duration::from_secs(membership.not_after.saturating_sub(unix_now()));
                tokio::select! {
                    served = serve_line(membership.node, line, &shelf) => served,
                    _ = revocations.wait_for(|revoked| revoked.contains(&membership.node)) => Ok(()),
                    () = tokio::time::sleep(left) => Ok(()),
                }
            };
            if let Err(error) = served.await {
                debug!(%error, "a line for chunks ended");
            }
        });
    }
}

async fn serve_line(member: NodeId, line: server::TlsStream<BufReader<Awaiting>>, shelf: &Shelf) -> anyhow::Result<()> {
    let (mut receive, mut send) = tokio::io::split(line);
    // Frames come whole, also while chunks are sent.
    let (sender, mut asks) = mpsc::channel(2);
    let is_giving = AtomicBool::new(false);
    let reading = async {
        loop {
            let frame = read_frame::<_, Ask>(&mut receive);
            tokio::pin!(frame);
            let ask = loop {
                match tokio::time::timeout(IDLE, &mut frame).await {
                    // Whoever waits for a batch says nothing.
                    Err(_) if is_giving.load(Ordering::Relaxed) => {}
                    Ok(Ok(ask)) => break Some(ask),
                    Ok(Err(_)) | Err(_) => break None,
                }
            };
            let Some(ask) = ask else { break };
            if sender.send(ask).await.is_err() {
                break;
            }
        }
        drop(sender);
    };
    let giving = async {
        let mut gone = 0;
        while let Some(ask) = asks.recv().await {
            let Ask::Chunks(root, ids, at) = ask else { continue };
            let noted = shelf.note(root, &ids, at).await;
            let enough = || match asks.try_recv() {
                Ok(Ask::Enough) => Ok(true),
                Ok(Ask::Chunks(..)) => Err(io::Error::new(io::ErrorKind::InvalidData, "two batches at once")),
                Err(mpsc::error::TryRecvError::Empty) => Ok(false),
                Err(mpsc::error::TryRecvError::Disconnected) => Err(io::ErrorKind::ConnectionAborted.into()),
            };
            is_giving.store(true, Ordering::Relaxed);
            gone += shelf.give(member, ids, &mut send, enough).await?;
            noted.stays();
            is_giving.store(false, Ordering::Relaxed);
            shelf.end(&root, &mut gone, &mut send).await?;
        }
        Ok::<_, io::Error>(())
    };
    tokio::pin!(reading, giving);
    tokio::select! {
        given = &mut giving => given?,
        () = &mut reading => giving.await?,
    }
    Ok(())
}

fn buffered(stream: TcpStream) -> io::Result<BufReader<Awaiting>> {
    stream.set_nodelay(true)?;
    Ok(BufReader::with_capacity(READ, Awaiting::new(stream)))
}

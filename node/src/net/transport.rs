//! libp2p's transports with admission as their last step.
//!
//! libp2p's own place for refusing a peer is the swarm, where identify and ping have already been opened. Here the
//! exchange is part of establishing the connection: it runs on the first substream, and a connection that fails it
//! never reaches the swarm.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use futures::future::{Either, select};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::transport::{Boxed, OrTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, quic, tcp, tls, yamux};
use tokio_util::compat::FuturesAsyncReadCompatExt;

use super::admission::{AdmissionError, Admitted, Gate, PATIENCE};
use super::node_id;

/// Called with every admitted peer, before the swarm sees the connection.
pub type OnAdmitted = Arc<dyn Fn(PeerId, Admitted) + Send + Sync>;

/// TCP (TLS, yamux) and QUIC, authenticated and multiplexed, without admission.
pub fn plain(keys: &Keypair) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let tls = tls::Config::new(keys).map_err(io::Error::other)?;
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .upgrade(Version::V1Lazy)
        .authenticate(tls)
        .multiplex(yamux::Config::default())
        .boxed();
    let quic = quic::tokio::Transport::new(quic::Config::new(keys))
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)));
    Ok(OrTransport::new(quic, tcp).map(|either, _| either.into_inner()).boxed())
}

/// The same, with admission.
pub fn admitting(keys: &Keypair, gate: Arc<Gate>, admitted: OnAdmitted) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let transport = plain(keys)?.and_then(move |(peer, muxer), endpoint| {
        let (gate, admitted, dialler) = (Arc::clone(&gate), Arc::clone(&admitted), endpoint.is_dialer());
        async move {
            let (member, muxer) = admit(&gate, peer, muxer, dialler).await?;
            admitted(peer, member);
            Ok::<_, AdmissionError>((peer, muxer))
        }
    });
    Ok(libp2p::core::transport::timeout::TransportTimeout::new(transport, PATIENCE * 2).boxed())
}

async fn admit(
    gate: &Gate,
    peer: PeerId,
    mut muxer: StreamMuxerBox,
    dialler: bool,
) -> Result<(Admitted, StreamMuxerBox), AdmissionError> {
    let node = node_id(&peer).ok_or_else(|| AdmissionError::Stranger("a key that is not ed25519".to_owned()))?;
    let stream = first_substream(&mut muxer, dialler).await?.compat();
    let exchange = async { if dialler { gate.dial(node, stream).await } else { gate.listen(node, stream).await } };
    let admitted = drive(&mut muxer, exchange).await??;
    Ok((admitted, muxer))
}

/// Opens, or accepts, the substream that comes first.
pub async fn first_substream(muxer: &mut StreamMuxerBox, dialler: bool) -> io::Result<SubstreamBox> {
    let open = poll_fn(|cx| {
        if let Poll::Ready(Err(error)) = muxer.poll_unpin(cx) {
            return Poll::Ready(Err(error));
        }
        if dialler { muxer.poll_outbound_unpin(cx) } else { muxer.poll_inbound_unpin(cx) }
    });
    match tokio::time::timeout(PATIENCE, open).await {
        Ok(stream) => stream,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no substream in time")),
    }
}

/// Runs `exchange` while the connection below it is kept going.
pub async fn drive<T>(muxer: &mut StreamMuxerBox, exchange: impl Future<Output = T>) -> io::Result<T> {
    let going = poll_fn(|cx| {
        loop {
            match muxer.poll_unpin(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let exchange = std::pin::pin!(exchange);
    match select(exchange, going).await {
        Either::Left((result, _)) => Ok(result),
        Either::Right((error, _)) => Err(error),
    }
}

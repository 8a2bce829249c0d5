//! `moyai join`: a machine without a certificate dials the inviter, and gets one for its ticket.

use std::time::Duration;

use ed25519_dalek::SigningKey;
use libp2p::core::transport::{DialOpts, PortUse};
use libp2p::core::{Endpoint, muxing::StreamMuxerBox};
use libp2p::{Multiaddr, PeerId, Transport};
use moyai_protocol::id::NodeId;
use moyai_protocol::trust::{Chain, Membership, Ticket, VoucherError};
use tokio_util::compat::FuturesAsyncReadCompatExt;

use super::admission::{Answer, Hello, Refused, read_frame, unix_now, write_frame};
use super::{key_pair, node_id, transport};

/// Per address; a machine that is off must not make the next address wait long.
const PATIENCE: Duration = Duration::from_secs(6);

/// What a joiner gets.
pub struct Joined {
    /// Its certificates.
    pub chain: Chain,
    /// What they say.
    pub membership: Membership,
    /// Some members, and where they listen; the inviter among them.
    pub members: Vec<(NodeId, Vec<String>)>,
}

/// Why a machine did not become a member. Nothing was changed on either side, unless the answer was lost: then asking
/// again costs no second use.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The ticket says itself that it is too late.
    #[error("this invitation expired at {expires}")]
    Expired {
        /// Seconds since 1970.
        expires: u64,
    },
    /// The inviter says no.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: Refused,
    },
    /// It answered something else.
    #[error("the node at {address} is not the one that gave this invitation: {reason}")]
    WrongNode {
        /// Where.
        address: String,
        /// What was wrong.
        reason: String,
    },
    /// None of the ticket's addresses answers.
    #[error("none of the inviter's addresses answers: {tried}")]
    Unreachable {
        /// Each with its reason.
        tried: String,
    },
}

impl JoinError {
    /// What the user can do.
    pub fn hint(&self) -> &'static str {
        match self {
            JoinError::Expired { .. }
            | JoinError::Refused {
                reason: Refused::Voucher(VoucherError::Expired { .. } | VoucherError::UsedUp { .. }),
            } => "ask an admin for a new one: `moyai invite`",
            JoinError::Refused { reason: Refused::OtherMesh } => {
                "the machine that gave it has left that mesh since; ask for a new one"
            }
            JoinError::Refused { .. } => "ask an admin of the mesh for a new one: `moyai invite`",
            JoinError::WrongNode { .. } => "another machine has that address now; ask for a new invitation",
            JoinError::Unreachable { .. } => {
                "is the daemon up there (`moyai nodes`), and does a firewall let its port through (TCP and UDP)?"
            }
        }
    }
}

/// Turns a ticket into certificates for `key`.
pub async fn join(ticket: &Ticket, key: &SigningKey) -> Result<Joined, JoinError> {
    if unix_now() > ticket.expires {
        return Err(JoinError::Expired { expires: ticket.expires });
    }
    let mut tried = Vec::new();
    for address in &ticket.addresses {
        match tokio::time::timeout(PATIENCE, ask(address, ticket, key)).await {
            Ok(Ok(Answer::Welcome { chain, mut members })) => {
                let me = moyai_protocol::trust::node_of(key);
                let membership = chain.verify_shown_by(&me, &ticket.mesh, unix_now());
                let membership = membership
                    .map_err(|error| JoinError::WrongNode { address: address.clone(), reason: error.to_string() })?;
                if !members.iter().any(|(node, _)| *node == ticket.inviter) {
                    members.push((ticket.inviter, ticket.addresses.clone()));
                }
                return Ok(Joined { chain, membership, members });
            }
            Ok(Ok(Answer::Refused(reason))) => return Err(JoinError::Refused { reason }),
            Ok(Ok(Answer::Member { .. })) => {
                let reason = "it answered what was not asked".to_owned();
                return Err(JoinError::WrongNode { address: address.clone(), reason });
            }
            Ok(Err(error)) => tried.push(format!("{address}: {error}")),
            Err(_) => tried.push(format!("{address}: no answer in {} s", PATIENCE.as_secs())),
        }
    }
    Err(JoinError::Unreachable { tried: tried.join("; ") })
}

async fn ask(address: &str, ticket: &Ticket, key: &SigningKey) -> anyhow::Result<Answer> {
    let address: Multiaddr = address.parse()?;
    let (peer, mut muxer) = dial(address, key).await?;
    if node_id(&peer) != Some(ticket.inviter) {
        anyhow::bail!("another node listens there ({peer})");
    }
    let mut stream = transport::first_substream(&mut muxer, true).await?.compat();
    let hello = Hello::Join { mesh: ticket.mesh, secret: ticket.secret };
    let answer = transport::drive(&mut muxer, async {
        write_frame(&mut stream, &hello).await?;
        read_frame::<_, Answer>(&mut stream).await
    });
    Ok(answer.await??)
}

async fn dial(address: Multiaddr, key: &SigningKey) -> anyhow::Result<(PeerId, StreamMuxerBox)> {
    let mut transport = transport::plain(&key_pair(key))?;
    let dialling = transport.dial(address, DialOpts { role: Endpoint::Dialer, port_use: PortUse::New })?;
    // QUIC's endpoint is driven by the transport, not by the dial.
    let mut dialling = std::pin::pin!(dialling);
    let connected = std::future::poll_fn(|cx| {
        let _no_listeners = std::pin::Pin::new(&mut transport).poll(cx);
        dialling.as_mut().poll(cx)
    });
    Ok(connected.await?)
}

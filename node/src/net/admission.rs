//! The first exchange on every connection, libp2p or quinn.
//!
//! ```text
//! dialler                                   listener
//! Hello::Member(certificates, life)  →      verifies; shows its own only to a member
//!                                    ←      Answer::Member(certificates, life), or Refused(reason)
//! verifies
//!
//! Hello::Join(secret, …)             →      redeems the voucher, signs a certificate
//!                                    ←      Answer::Welcome(certificates, members), or Refused(reason)
//! (and the connection ends)
//! ```
//!
//! TLS has proved beforehand that the other side owns the key of its PeerId; a certificate of another node is refused.
//!
//! **Bounds.** One frame of at most [`MAX_FRAME`] bytes each way within [`PATIENCE`]; the number of connections that are
//! still at it is bounded by whoever listens. A refused stranger learns the reason and nothing else.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::SigningKey;
use moyai_protocol::codec;
use moyai_protocol::id::{MeshId, NodeId};
use moyai_protocol::node::certificate_life;
use moyai_protocol::trust::{Chain, Membership, Role, VoucherError, Vouchers};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

/// The most bytes of one frame.
const MAX_FRAME: usize = 64 * 1024;
/// For the whole exchange.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The most members a joiner is told; it learns the others by gossip.
const MAX_WELCOME: usize = 32;

/// One process of a node; another has another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life(u64);

impl Life {
    fn draw() -> Life {
        Life(fastrand::u64(..))
    }

    /// That one.
    #[cfg(test)]
    pub(super) fn of_test(number: u64) -> Life {
        Life(number)
    }
}

/// A member that was let in, or that let this node in.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Who, and what it may do.
    pub membership: Membership,
    /// Which of its lives.
    pub life: Life,
}

/// What the dialler says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Hello {
    /// I am a member.
    Member {
        /// And here is who says so.
        chain: Chain,
        /// This is which of its lives.
        life: Life,
    },
    /// I was invited.
    Join {
        /// To this mesh.
        mesh: MeshId,
        /// With this ticket.
        secret: [u8; 16],
    },
}

/// What the listener answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// So am I.
    Member {
        /// And here is who says so.
        chain: Chain,
        /// This is which of its lives.
        life: Life,
    },
    /// Now you are.
    Welcome {
        /// Your certificates.
        chain: Chain,
        /// Some members, and where they listen.
        members: Vec<(NodeId, Vec<String>)>,
    },
    /// No.
    Refused(Refused),
}

/// Why a listener does not talk.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Refused {
    /// The certificates are not good here.
    #[error("{0}")]
    Certificate(String),
    /// The ticket is for another mesh.
    #[error("that node belongs to another mesh")]
    OtherMesh,
    /// The voucher is not good.
    #[error("{0}")]
    Voucher(VoucherError),
    /// This node may not sign certificates.
    #[error("that node is no admin of its mesh any more")]
    NotAdmin,
    /// It cannot keep its word: its disk fails.
    #[error("that node cannot write down that the invitation was used")]
    Storage,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The stream broke, or took too long.
    #[error("the connection broke before certificates were shown: {0}")]
    Io(#[from] io::Error),
    /// The other side says no.
    #[error("refused by the other node: {0}")]
    Refused(Refused),
    /// This side says no.
    #[error("{0}")]
    Stranger(String),
    /// The other side joined and goes again, as it should.
    #[error("the other node got its certificate")]
    Joined,
}

/// Writes vouchers down.
pub type Keep = Box<dyn Fn(&Vouchers) -> io::Result<()> + Send + Sync>;

/// What a node needs to admit others and be admitted.
pub struct Gate {
    mesh: MeshId,
    key: SigningKey,
    /// This process.
    life: Life,
    chain: RwLock<Chain>,
    vouchers: Mutex<Vouchers>,
    /// Writes the vouchers down; called before a joiner gets its certificate.
    keep: Keep,
    members: RwLock<Vec<(NodeId, Vec<String>)>>,
    /// Nodes that are members no more; bounded by those that ever were.
    revoked: watch::Sender<BTreeSet<NodeId>>,
    /// Nodes whose connections are to be cut.
    cut: mpsc::UnboundedSender<NodeId>,
    to_cut: Mutex<Option<mpsc::UnboundedReceiver<NodeId>>>,
}

impl Gate {
    /// The gate of the owner of `chain`.
    pub fn new(mesh: MeshId, key: SigningKey, chain: Chain, vouchers: Vouchers, keep: Keep) -> Self {
        // As many as are ever revoked.
        let (cut, to_cut) = mpsc::unbounded_channel();
        Gate {
            cut,
            to_cut: Mutex::new(Some(to_cut)),
            mesh,
            key,
            life: Life::draw(),
            chain: RwLock::new(chain),
            vouchers: Mutex::new(vouchers),
            keep,
            members: RwLock::default(),
            revoked: watch::Sender::new(BTreeSet::new()),
        }
    }

    /// Of a node of the mesh whose root's key is of sevens.
    #[cfg(test)]
    pub(super) fn of_test(key: &SigningKey) -> Gate {
        use moyai_protocol::trust::{mesh_of, node_of};
        let root = SigningKey::from_bytes(&[7; 32]);
        let chain = Chain::root(&root, node_of(key), unix_now(), 3600);
        Gate::new(mesh_of(&node_of(&root)), key.clone(), chain, Vouchers::default(), Box::new(|_| Ok(())))
    }

    /// These are members no more: they are let in no more, and neither is whoever shows certificates that they signed.
    pub fn revoke(&self, nodes: impl IntoIterator<Item = NodeId>) {
        self.revoked.send_modify(|revoked| revoked.extend(nodes));
    }

    /// Whether it is a member no more.
    pub fn is_revoked(&self, node: &NodeId) -> bool {
        self.revoked.borrow().contains(node)
    }

    /// Has the connections of a node cut. One that only fell with who certified it may come back with other certificates.
    pub fn cut(&self, node: NodeId) {
        // The network may have ended before the driver.
        let _ended = self.cut.send(node);
    }

    /// Whose connections to cut; for the one who holds them.
    pub fn to_cut(&self) -> Option<mpsc::UnboundedReceiver<NodeId>> {
        self.to_cut.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    /// Tells when somebody is a member no more.
    pub fn revocations(&self) -> watch::Receiver<BTreeSet<NodeId>> {
        self.revoked.subscribe()
    }

    /// What `chain` makes of `peer`, unless it or whoever certified it is a member no more.
    fn admit(&self, chain: &Chain, life: Life, peer: &NodeId) -> Result<Admitted, String> {
        let membership = chain.verify_shown_by(peer, &self.mesh, unix_now()).map_err(|error| error.to_string())?;
        let revoked = self.revoked.borrow();
        match std::iter::once(*peer).chain(chain.issuers()).find(|node| revoked.contains(node)) {
            Some(node) if node == *peer => Err(format!("the certificates of node {} are revoked", node.short())),
            Some(node) => Err(format!(
                "node {} was certified by node {}, whose certificates are revoked",
                peer.short(),
                node.short()
            )),
            None => Ok(Admitted { membership, life }),
        }
    }

    /// A new chain replaces the old one on connections from now on.
    pub fn set_chain(&self, chain: Chain) {
        *self.chain.write().unwrap_or_else(std::sync::PoisonError::into_inner) = chain;
    }

    /// Whom joiners are told of.
    pub fn set_members(&self, mut members: Vec<(NodeId, Vec<String>)>) {
        members.truncate(MAX_WELCOME);
        *self.members.write().unwrap_or_else(std::sync::PoisonError::into_inner) = members;
    }

    /// Gives an invitation.
    pub fn invite(&self, secret: &[u8; 16], role: Role, uses: u32, expires: u64) -> Result<(), InviteError> {
        if self.role() != Some(Role::Admin) {
            return Err(InviteError::NotAdmin);
        }
        let mut vouchers = self.vouchers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        vouchers.add(secret, role, uses, expires, unix_now())?;
        (self.keep)(&vouchers)?;
        Ok(())
    }

    fn chain(&self) -> Chain {
        self.chain.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn role(&self) -> Option<Role> {
        self.chain().verify(&self.mesh, unix_now()).ok().map(|member| member.role)
    }

    /// The dialler's part.
    pub async fn dial<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        peer: NodeId,
        mut stream: S,
    ) -> Result<Admitted, AdmissionError> {
        within(async {
            write_frame(&mut stream, &Hello::Member { chain: self.chain(), life: self.life }).await?;
            match read_frame(&mut stream).await? {
                Answer::Member { chain, life } => self.admit(&chain, life, &peer).map_err(AdmissionError::Stranger),
                Answer::Refused(reason) => Err(AdmissionError::Refused(reason)),
                Answer::Welcome { .. } => Err(AdmissionError::Stranger("an answer to what was not asked".to_owned())),
            }
        })
        .await
    }

    /// The listener's part.
    pub async fn listen<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        peer: NodeId,
        mut stream: S,
    ) -> Result<Admitted, AdmissionError> {
        within(async {
            let (answer, result) = match read_frame(&mut stream).await? {
                Hello::Member { chain, life } => match self.admit(&chain, life, &peer) {
                    Ok(admitted) => (Answer::Member { chain: self.chain(), life: self.life }, Ok(admitted)),
                    Err(reason) => {
                        (Answer::Refused(Refused::Certificate(reason.clone())), Err(AdmissionError::Stranger(reason)))
                    }
                },
                Hello::Join { mesh, secret } => match self.certify(peer, &mesh, &secret) {
                    Ok(answer) => (answer, Err(AdmissionError::Joined)),
                    Err(reason) => (Answer::Refused(reason.clone()), Err(AdmissionError::Stranger(reason.to_string()))),
                },
            };
            write_frame(&mut stream, &answer).await?;
            if result.is_err() {
                // The answer must arrive before the connection goes: wait until the other side has read it and left.
                stream.shutdown().await?;
                let mut rest = [0; 64];
                while matches!(stream.read(&mut rest).await, Ok(1..)) {}
            }
            result
        })
        .await
    }

    fn certify(&self, peer: NodeId, mesh: &MeshId, secret: &[u8; 16]) -> Result<Answer, Refused> {
        if *mesh != self.mesh {
            return Err(Refused::OtherMesh);
        }
        if self.role() != Some(Role::Admin) {
            return Err(Refused::NotAdmin);
        }
        if self.revoked.borrow().contains(&peer) {
            return Err(Refused::Certificate(format!("the certificates of node {} are revoked", peer.short())));
        }
        let now = unix_now();
        let redeemed = {
            let mut vouchers = self.vouchers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let redeemed = vouchers.redeem(secret, peer, now).map_err(Refused::Voucher)?;
            (self.keep)(&vouchers).map_err(|_| Refused::Storage)?;
            redeemed
        };
        let serial = now << 16 | u64::from(peer.0[0]) << 8 | u64::from(peer.0[1]);
        let chain = self.chain().issue(&self.key, peer, redeemed.role, now, certificate_life(redeemed.role), serial);
        let members = self.members.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        Ok(Answer::Welcome { chain, members })
    }
}

/// Why no invitation was given.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// Only admins invite.
    #[error("this node is no admin, and only admins invite")]
    NotAdmin,
    /// Too many are open.
    #[error(transparent)]
    Voucher(#[from] VoucherError),
    /// It could not be written down.
    #[error("cannot write the invitation down: {0}")]
    Io(#[from] io::Error),
}

/// Seconds since 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

async fn within<T>(exchange: impl Future<Output = Result<T, AdmissionError>>) -> Result<T, AdmissionError> {
    match tokio::time::timeout(PATIENCE, exchange).await {
        Ok(result) => result,
        Err(_) => Err(AdmissionError::Io(io::Error::new(io::ErrorKind::TimedOut, "no certificates in time"))),
    }
}

/// Writes one length-prefixed value.
pub async fn write_frame<S: AsyncWrite + Unpin, T: Serialize>(stream: &mut S, value: &T) -> io::Result<()> {
    let bytes = codec::encode(value);
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&len.to_be_bytes()).await?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Reads one length-prefixed value of at most [`MAX_FRAME`] bytes.
pub async fn read_frame<S: AsyncRead + Unpin, T: DeserializeOwned>(stream: &mut S) -> io::Result<T> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).await?;
    let len = u32::from_be_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await?;
    codec::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

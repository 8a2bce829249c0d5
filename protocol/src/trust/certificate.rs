//! Certificates: a node, its role, and until when, signed by somebody who may say so.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use super::{mesh_of, node_of, sign, verify};
use crate::codec;
use crate::id::{MeshId, NodeId, Signature};

/// The purpose that certificate signatures are bound to.
const DOMAIN: &str = "moyai certificate v1";

/// How far a chain may reach: a node, three admins, and the root that signed the last of them.
const DEPTH: usize = 4;

/// How far two honest clocks may be apart when a certificate is young, in seconds.
const CLOCK_TOLERANCE: u64 = 300;

/// What a member may do. Each role includes the ones before it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs what others submit.
    Worker,
    /// Also submits, scales and stops workloads.
    Submitter,
    /// Also invites and certifies others.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Worker => "worker",
            Role::Submitter => "submitter",
            Role::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "worker" => Ok(Role::Worker),
            "submitter" => Ok(Role::Submitter),
            "admin" => Ok(Role::Admin),
            other => Err(format!("`{other}` is no role; roles are worker, submitter, admin")),
        }
    }
}

/// What an issuer says of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The mesh this is about.
    pub mesh: MeshId,
    /// The node this is about.
    pub node: NodeId,
    /// What it may do.
    pub role: Role,
    /// Valid from, in seconds since 1970.
    pub not_before: u64,
    /// Valid until, in seconds since 1970.
    pub not_after: u64,
    /// Tells apart two certificates of one issuer.
    pub serial: u64,
    /// Whose key signs: an admin's, or the root's.
    pub issuer: NodeId,
}

/// A certificate and its issuer's signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedCertificate {
    /// What is said.
    pub certificate: Certificate,
    /// The issuer's signature over it.
    pub signature: Signature,
}

/// A node's certificate, its issuer's, and so on to one that the root signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain(pub Vec<SignedCertificate>);

/// What a verified chain says of its first node. Only [`Chain::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The member.
    pub node: NodeId,
    /// What it may do.
    pub role: Role,
    /// The earliest expiry in the chain, in seconds since 1970.
    pub not_after: u64,
}

/// Why a chain makes nobody a member. Nothing was changed; whoever showed the chain is at fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// No certificate at all.
    #[error("an empty certificate chain")]
    Empty,
    /// Longer than any chain an admin makes.
    #[error("a certificate chain of {length}, where {DEPTH} is the most")]
    TooLong {
        /// How many there were.
        length: usize,
    },
    /// Made for, or rooted in, another mesh.
    #[error("a certificate of another mesh ({mesh})")]
    Foreign {
        /// The other mesh.
        mesh: MeshId,
    },
    /// A signature that its issuer did not make.
    #[error("a forged certificate for node {}", node.short())]
    Forged {
        /// Whom it was about.
        node: NodeId,
    },
    /// Issued by a member that is no admin.
    #[error("node {} signed a certificate and is no admin", issuer.short())]
    NotAdmin {
        /// Who signed.
        issuer: NodeId,
    },
    /// Two neighbours in the chain that do not fit.
    #[error("a certificate chain with a gap after node {}", node.short())]
    Gap {
        /// The certificate before the gap.
        node: NodeId,
    },
    /// Too old.
    #[error("the certificate of node {} expired at {not_after}", node.short())]
    Expired {
        /// Whose.
        node: NodeId,
        /// When, in seconds since 1970.
        not_after: u64,
    },
    /// Not valid yet: one of two clocks is wrong.
    #[error("the certificate of node {} is valid only from {not_before}: is a clock wrong?", node.short())]
    NotYet {
        /// Whose.
        node: NodeId,
        /// From when, in seconds since 1970.
        not_before: u64,
    },
    /// A good chain, shown by somebody else.
    #[error("node {} showed the certificate of node {}", shown_by.short(), node.short())]
    Stolen {
        /// Whose it is.
        node: NodeId,
        /// Who showed it.
        shown_by: NodeId,
    },
}

impl Certificate {
    /// This certificate, signed. The caller is `issuer`'s owner.
    pub fn sign(self, key: &SigningKey) -> SignedCertificate {
        debug_assert_eq!(self.issuer, node_of(key), "an issuer signs with its own key");
        let signature = sign(key, DOMAIN, &codec::encode(&self));
        SignedCertificate { certificate: self, signature }
    }
}

impl Chain {
    /// The certificate the chain is about.
    pub fn leaf(&self) -> Option<&Certificate> {
        self.0.first().map(|signed| &signed.certificate)
    }

    /// Who signed each certificate, from the leaf's issuer up to the root.
    pub fn issuers(&self) -> impl Iterator<Item = NodeId> {
        self.0.iter().map(|signed| signed.certificate.issuer)
    }

    /// A chain for `node`, signed by `key`, the owner of this chain.
    pub fn issue(&self, key: &SigningKey, node: NodeId, role: Role, now: u64, lifetime: u64, serial: u64) -> Chain {
        let own = self.leaf().expect("an issuer has a certificate");
        let certificate = Certificate {
            mesh: own.mesh,
            node,
            role,
            not_before: now,
            not_after: now.saturating_add(lifetime).min(own.not_after),
            serial,
            issuer: node_of(key),
        };
        let mut chain = vec![certificate.sign(key)];
        chain.extend(self.0.iter().cloned());
        Chain(chain)
    }

    /// The first chain of a mesh: the root certifies `node` as an admin.
    pub fn root(root: &SigningKey, node: NodeId, now: u64, lifetime: u64) -> Chain {
        let issuer = node_of(root);
        let certificate = Certificate {
            mesh: mesh_of(&issuer),
            node,
            role: Role::Admin,
            not_before: now,
            not_after: now.saturating_add(lifetime),
            serial: now,
            issuer,
        };
        Chain(vec![certificate.sign(root)])
    }

    /// Checks every link up to the root of `mesh`, as of `now` (seconds since 1970).
    pub fn verify(&self, mesh: &MeshId, now: u64) -> Result<Membership, ChainError> {
        let leaf = self.leaf().ok_or(ChainError::Empty)?;
        if self.0.len() > DEPTH {
            return Err(ChainError::TooLong { length: self.0.len() });
        }
        let mut not_after = u64::MAX;
        for (at, signed) in self.0.iter().enumerate() {
            let this = &signed.certificate;
            if this.mesh != *mesh {
                return Err(ChainError::Foreign { mesh: this.mesh });
            }
            match self.0.get(at + 1).map(|next| &next.certificate) {
                Some(next) if next.node != this.issuer => return Err(ChainError::Gap { node: this.node }),
                Some(next) if next.role != Role::Admin => return Err(ChainError::NotAdmin { issuer: next.node }),
                Some(_) => {}
                None if mesh_of(&this.issuer) != *mesh => {
                    return Err(ChainError::Foreign { mesh: mesh_of(&this.issuer) });
                }
                None => {}
            }
            if !verify(&this.issuer, DOMAIN, &codec::encode(this), &signed.signature) {
                return Err(ChainError::Forged { node: this.node });
            }
            if now > this.not_after {
                return Err(ChainError::Expired { node: this.node, not_after: this.not_after });
            }
            if now.saturating_add(CLOCK_TOLERANCE) < this.not_before {
                return Err(ChainError::NotYet { node: this.node, not_before: this.not_before });
            }
            not_after = not_after.min(this.not_after);
        }
        Ok(Membership { node: leaf.node, role: leaf.role, not_after })
    }

    /// As [`Chain::verify`], for a chain that `peer` showed as its own.
    pub fn verify_shown_by(&self, peer: &NodeId, mesh: &MeshId, now: u64) -> Result<Membership, ChainError> {
        let membership = self.verify(mesh, now)?;
        if membership.node != *peer {
            return Err(ChainError::Stolen { node: membership.node, shown_by: *peer });
        }
        Ok(membership)
    }
}

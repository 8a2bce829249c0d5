//! Certificates decide who is a member, so what a chain must be is said here once more, apart from the code that checks it:
//! the input's bytes are a chain as it is decoded, and they choose the fields of up to five certificates that are signed
//! with the keys of the root, of members of every role, and of a stranger. Whatever verifies is good by the rules below,
//! whatever is good verifies, and a good admin's chain makes good chains until it is as long as a chain may be.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use mesh::{NOW, members, mesh, root};
use moyai_protocol::codec;
use moyai_protocol::id::{MeshId, NodeId};
use moyai_protocol::trust::{Certificate, Chain, Role, SignedCertificate, node_of};

/// A node, three admins and the root's signature.
const DEPTH: usize = 4;
/// Seconds that two honest clocks may be apart.
const TOLERANCE: u64 = 300;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(chain) = codec::decode::<Chain>(bytes) {
        assert_eq!(codec::decode(&codec::encode(&chain)).as_ref(), Ok(&chain));
        let _ = (chain.verify(&mesh(), NOW.as_secs()), chain.issuers().count());
    }
    let _ = issued(&mut Unstructured::new(bytes));
});

fn issued(u: &mut Unstructured<'_>) -> Result<()> {
    let now = moment(u)?;
    let mut certificates: Vec<SignedCertificate> = Vec::new();
    let mut forged = false;
    for _ in 0..u.int_in_range(0..=5)? {
        // As a rule a certificate is about whoever signed the one before.
        let above = certificates.last().map(|signed| signed.certificate.issuer);
        let node = match above {
            Some(issuer) if !u.ratio(1, 8)? => issuer,
            _ => members()[u.choose_index(members().len())?].id,
        };
        let key = match u.choose_index(members().len() + 1)? {
            0 => root(),
            at => &members()[at - 1].key,
        };
        let certificate = Certificate {
            mesh: if u.ratio(1, 16)? { MeshId([7; 32]) } else { mesh() },
            node,
            role: if u.ratio(1, 4)? { *u.choose(&[Role::Worker, Role::Submitter])? } else { Role::Admin },
            not_before: moment(u)?,
            not_after: moment(u)?,
            serial: u.arbitrary()?,
            issuer: node_of(key),
        };
        let mut signed = certificate.sign(key);
        if u.ratio(1, 16)? {
            let at = u.choose_index(64)?;
            signed.signature.0[at] ^= 1 << u.int_in_range(0..=7)?;
            forged = true;
        }
        certificates.push(signed);
    }
    let chain = Chain(certificates);
    let verified = chain.verify(&mesh(), now);
    assert_eq!(verified.is_ok(), !forged && is_good(&chain, now), "{verified:?} of {chain:?} at {now}");
    let Ok(member) = verified else { return Ok(()) };
    let stranger = NodeId([9; 32]);
    assert!(chain.verify_shown_by(&stranger, &mesh(), now).is_err());
    assert_eq!(chain.verify_shown_by(&member.node, &mesh(), now).as_ref(), Ok(&member));
    if let Some(owner) = members().iter().find(|owner| owner.id == member.node) {
        let lifetime = u.arbitrary()?;
        let longer = chain.issue(&owner.key, stranger, Role::Worker, now, lifetime, 1);
        let fits = member.role == Role::Admin && longer.0.len() <= DEPTH;
        let verified = longer.verify(&mesh(), now);
        assert_eq!(verified.is_ok(), fits, "{verified:?}");
        assert!(verified.is_ok_and(|new| new.not_after <= member.not_after) == fits, "it outlives its issuer");
    }
    Ok(())
}

fn is_good(chain: &Chain, now: u64) -> bool {
    let links: Vec<&Certificate> = chain.0.iter().map(|signed| &signed.certificate).collect();
    (1..=DEPTH).contains(&links.len())
        && links.windows(2).all(|pair| pair[0].issuer == pair[1].node && pair[1].role == Role::Admin)
        && links.last().is_some_and(|last| last.issuer == node_of(root()))
        && links.iter().all(|link| link.mesh == mesh())
        && links.iter().all(|link| now <= link.not_after && link.not_before <= now.saturating_add(TOLERANCE))
}

/// A time at which something begins or ends, or nearly.
fn moment(u: &mut Unstructured<'_>) -> Result<u64> {
    let now = NOW.as_secs();
    let odd =
        [0, now - TOLERANCE - 1, now - TOLERANCE, now - 1, now + 1, now + TOLERANCE, now + TOLERANCE + 1, u64::MAX];
    Ok(match u.int_in_range(0..=15)? {
        at @ 0..8 => odd[at],
        8 => u.arbitrary()?,
        _ => now,
    })
}

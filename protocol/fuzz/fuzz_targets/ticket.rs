//! A ticket is typed or pasted by somebody who has no certificate yet. As text it may be anything; behind the checksum too,
//! since anybody can make one: so the input is read as the line itself, and as what a line carries. What parses is written
//! as a line that parses to the same, if it is no longer than lines may be. And however vouchers are asked for, none is
//! used by more nodes than it was given for, nor after its end.
#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use moyai_protocol::codec;
use moyai_protocol::id::NodeId;
use moyai_protocol::trust::{Role, Ticket, VoucherError, Vouchers};

/// The longest line that is looked at.
const LONGEST: usize = "moyai1".len() + 2048;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(ticket) = text.parse::<Ticket>()
    {
        survives(&ticket);
    }
    if let Ok(ticket) = codec::decode::<Ticket>(bytes) {
        survives(&ticket);
        survives(&ticket.bounded());
    }
    if let Ok(vouchers) = codec::decode::<Vouchers>(bytes) {
        assert_eq!(codec::decode(&codec::encode(&vouchers)), Ok(vouchers));
    }
    let _ = redeem(&mut Unstructured::new(bytes));
});

fn survives(ticket: &Ticket) {
    let text = ticket.to_string();
    if text.len() <= LONGEST {
        assert_eq!(text.parse().as_ref(), Ok(ticket), "{text}");
    }
}

/// Few secrets, few nodes and a short life, so that uses and ends are met.
fn redeem(u: &mut Unstructured<'_>) -> Result<()> {
    let mut vouchers = Vouchers::default();
    let mut given: Vec<(u32, u64, Vec<NodeId>)> = Vec::new();
    while !u.is_empty() {
        let now = u64::from(u.arbitrary::<u8>()?);
        if u.ratio(1, 4)? {
            let (uses, expires) = (u.int_in_range(0..=3)?, u64::from(u.arbitrary::<u8>()?));
            let secret = [given.len() as u8; 16];
            match vouchers.add(&secret, Role::Worker, uses, expires, now) {
                Ok(()) => given.push((uses, expires, Vec::new())),
                Err(error) => assert_eq!(error, VoucherError::TooMany),
            }
        } else {
            let at = u.int_in_range(0..=7)?;
            let node = NodeId([u.int_in_range(0..=4)?; 32]);
            let redeemed = vouchers.redeem(&[at as u8; 16], node, now).is_ok();
            let Some((uses, expires, users)) = given.get_mut(at) else {
                assert!(!redeemed, "a voucher that nobody gave");
                continue;
            };
            assert!(!redeemed || now <= *expires);
            if redeemed && !users.contains(&node) {
                users.push(node);
            }
            assert!(users.len() <= *uses as usize, "used by more than it was given for");
        }
        if given.len() >= 200 {
            break;
        }
    }
    Ok(())
}

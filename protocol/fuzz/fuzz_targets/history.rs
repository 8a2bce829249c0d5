//! What happens to a node, as an input tells it: steps, separated by [`BETWEEN`], so that steps can be taken out, put in and
//! moved without a change to the others. The first byte of a step says what happens (see [`step`]), the rest how. Two of
//! the kinds carry an encoded message: one as it is, the other with all its signatures made good, since nothing of what is
//! behind them would be reached otherwise.

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use moyai_protocol::catalog::{Body, Hlc, Key, Rollout};
use moyai_protocol::codec;
use moyai_protocol::contract::Command;
use moyai_protocol::membership::State;
use moyai_protocol::message::Message;
use moyai_protocol::time::UnixMillis;

use crate::host::Host;
use crate::speech::{self, count, node, number, replicas};
use crate::{CAPACITY, KNOWN, ME, STRANGER, hello, members, mend, report, root, sign_fact};

/// Between two steps.
pub const BETWEEN: [u8; 3] = [0xa5, 0x5a, 0xa5];
/// The most steps of one input; the rest is not looked at.
const MAX_STEPS: usize = 64;

/// One life, or several, of a node.
pub fn live(input: &[u8]) {
    let mut host = among_members();
    for bytes in steps(input).take(MAX_STEPS) {
        // A step that the input does not tell to its end does not happen.
        let _ = step(&mut host, bytes);
    }
}

/// The steps of an input.
pub fn steps(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = rest.windows(BETWEEN.len()).position(|part| part == BETWEEN);
        let (step, after) = at.map_or((rest, &[][..]), |at| (&rest[..at], &rest[at + BETWEEN.len()..]));
        rest = after;
        Some(step)
    })
}

/// A node that knows two others, and believes them.
pub fn among_members() -> Host {
    let mut host = Host::start();
    for by in KNOWN {
        let report = codec::encode(&Body::Node(report(by)));
        let fact = sign_fact(Key::Node(members()[by].id), Hlc::at(host.wall()), report, by);
        host.admit(by);
        say(&mut host, by, &Message::Facts { facts: vec![fact.into()] });
        say(&mut host, by, &Message::MembersPush { updates: vec![hello(by)] });
        let member = host.node.membership().member(&members()[by].id).expect("it was admitted");
        assert!(member.state == State::Alive && member.signature.is_some(), "its word is not believed");
        assert!(host.node.catalog().node(&members()[by].id).is_some(), "its report is not believed");
    }
    assert_eq!(host.node.dropped(), &Default::default());
    host
}

fn say(host: &mut Host, from: usize, message: &Message) {
    host.message(from, codec::encode_message(message));
}

/// Carries out one step.
pub fn step(host: &mut Host, bytes: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(bytes);
    let u = &mut u;
    match u.arbitrary::<u8>()? % 13 {
        0 => {
            let from = sender(u)?;
            host.message(from, u.bytes(u.len())?.to_vec());
        }
        1 => {
            let from = sender(u)?;
            let Ok(mut message) = codec::decode_message(u.bytes(u.len())?) else { return Ok(()) };
            mend(&mut message, from);
            say(host, from, &message);
        }
        2 | 3 => {
            let from = sender(u)?;
            let message = speech::message(u, host, from)?;
            say(host, from, &message);
        }
        4 | 5 => {
            if let Some((from, message)) = speech::answer(u, host)? {
                say(host, from, &message);
            }
        }
        6 => host.complete(u)?,
        7 => host.work()?,
        8 => {
            // Up to a few days.
            let scale: u32 = u.int_in_range(0..=21)?;
            host.sleep(Duration::from_millis(u64::from(u.arbitrary::<u8>()?) << scale));
        }
        9 => host.wait(),
        10 => command(host, u)?,
        11 => host.restart(u.arbitrary()?, u.int_in_range(0..=3)?),
        _ => host.crowd(),
    }
    Ok(())
}

/// Whoever was admitted: members, and now and then a machine with a copy of this node's key.
fn sender(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=9)? {
        9 => ME,
        at => 1 + at % (STRANGER - 1),
    })
}

fn command(host: &mut Host, u: &mut Unstructured<'_>) -> Result<()> {
    let workload = speech::workload(u, host)?;
    host.command(match u.int_in_range(0..=22)? {
        0..=2 => Command::Submit(Box::new(speech::wish(u)?)),
        3 => Command::Scale { workload, replicas: replicas(u)? },
        4 => {
            let rollout = Rollout { max_surge: count(u)?, max_unavailable: count(u)? };
            Command::Update { workload, spec: Box::new(speech::wish(u)?), rollout }
        }
        5 => Command::Rollback { workload },
        6 => Command::Drain { node: node(u)?, draining: u.arbitrary()? },
        7 => {
            let root = if u.arbitrary()? { Some(Box::new(root().clone())) } else { None };
            Command::Revoke { node: node(u)?, reason: "lost".to_owned(), root }
        }
        8 => Command::Reseat { workload },
        9 => Command::Remove { workload },
        10 => Command::Leave,
        11 => Command::WallClock(UnixMillis(number(u)?)),
        12 => Command::WallClock(host.wall()),
        // A machine does not shrink.
        13 => Command::Load { capacity: CAPACITY, pressure: u.arbitrary()? },
        14 => Command::FetchImage { root: speech::image(u)? },
        18 => Command::StoreFull(u.arbitrary()?),
        21 => Command::AskTurn { reference: speech::outside(u)?, shares: u.arbitrary()? },
        22 => Command::EndTurn { reference: speech::outside(u)?, root: Some(speech::image(u)?) },
        19 => Command::ImagesGivenUp(vec![speech::image(u)?]),
        17 => {
            let root = speech::image(u)?;
            Command::DemandChunks { root, chunks: crate::host::pieces(&root).iter().map(|piece| piece.chunk).collect() }
        }
        15 => Command::Listening { addresses: vec![format!("/memory/{}", count(u)?)], data: Vec::new() },
        16 => {
            let root = speech::image(u)?;
            host.load(root);
            return Ok(());
        }
        _ => {
            let at = 1 + u.choose_index(STRANGER - 1)?;
            host.admit(at);
            return Ok(());
        }
    });
    Ok(())
}

//! What members say to the node under test, put together from a few bytes of the input: about workloads, placements and
//! numbers that mean something to it, with every signature good. Numbers are small, or as large as there are.

use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use moyai_protocol::auction::{Award, Basis, Cause, Journal, Record, Refusal};
use moyai_protocol::catalog::{
    self, Body, Fact, Hlc, Key, OrderFact, OriginalHeld, PlacementFact, Rollout, Said, WorkloadFact,
};
use moyai_protocol::codec;
use moyai_protocol::id::{ChunkId, Fingerprint, KeyHash, NodeId, WorkloadId};
use moyai_protocol::lease::{Ballot, Seats};
use moyai_protocol::membership::{State, Update};
use moyai_protocol::message::Message;
use moyai_protocol::reconcile::{Content, Range};
use moyai_protocol::reference::Reference;
use moyai_protocol::time::UnixMillis;
use moyai_protocol::trust::Chain;
use moyai_protocol::turns::Turn;
use moyai_protocol::worker::{ExitStatus, PlacementState};
use moyai_protocol::workload::{PlacementId, Resources, Spec};

use crate::host::Host;
use crate::{ME, NOW, hello, members, report, root, sign_fact, sign_update, workload_fact};

type Input<'a, 'b> = &'a mut Unstructured<'b>;

/// A number: as a rule small.
pub fn number(u: Input<'_, '_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=11)? {
        0 => u64::MAX,
        1 => u64::MAX - 1,
        2 => u64::from(u32::MAX),
        3 => 1 << 32,
        4 => NOW.0,
        5 => NOW.as_secs(),
        6 => u.arbitrary()?,
        7 => u64::from(u.arbitrary::<u16>()?),
        _ => u64::from(u.int_in_range(0..=5u8)?),
    })
}

/// A number of 32 bits, of the same kind.
pub fn count(u: Input<'_, '_>) -> Result<u32> {
    number(u).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
}

/// How many replicas are wanted: few as a rule, since a thousand take their time.
pub fn replicas(u: Input<'_, '_>) -> Result<u32> {
    if u.int_in_range(0..=31)? == 31 { count(u) } else { u.int_in_range(0..=4) }
}

/// A member, or a stranger.
pub fn node(u: Input<'_, '_>) -> Result<NodeId> {
    Ok(members()[u.choose_index(members().len())?].id)
}

/// A workload that there is, or may be.
pub fn workload(u: Input<'_, '_>, host: &Host) -> Result<WorkloadId> {
    u.choose(&host.workloads).copied()
}

/// A root chunk of one of the mesh's images.
pub fn image(u: Input<'_, '_>) -> Result<ChunkId> {
    u.arbitrary().map(crate::image)
}

/// What somebody may ask for: one of the mesh's workloads, with changes.
pub fn wish(u: Input<'_, '_>) -> Result<Spec> {
    let mut spec = crate::spec(u.arbitrary()?);
    let changes: u8 = u.arbitrary()?;
    let has = |bit: u8| changes & 1 << bit != 0;
    if has(0) {
        spec.resources = Resources { cpu_milli: number(u)?, memory: number(u)? };
        (spec.image.size, spec.stop_timeout) = (number(u)?, count(u)?);
    }
    if has(1) {
        spec.replicas = replicas(u)?;
    }
    if has(2) {
        spec.priority = u.int_in_range(0..=101)?;
    }
    if has(3) {
        (spec.gang, spec.auto_remove) = (!spec.gang, !spec.auto_remove);
    }
    if has(4) {
        spec.singleton = !spec.singleton;
    }
    if has(5) {
        spec.apart = vec![spec.name.clone()];
    }
    if has(6) {
        spec.on.insert("number".to_owned(), u.int_in_range(0..=3u8)?.to_string());
    }
    if has(7) {
        spec.image.root = image(u)?;
        spec.command = vec![u.int_in_range(0..=3u8)?.to_string()];
    }
    Ok(spec)
}

/// What a member may say first.
pub fn message(u: Input<'_, '_>, host: &Host, from: usize) -> Result<Message> {
    Ok(match u.int_in_range(0..=33)? {
        0 => Message::Ping { seq: number(u)?, target: node(u)?, updates: updates(u)? },
        1 => Message::PingReq { seq: number(u)?, target: node(u)?, updates: updates(u)? },
        2 => Message::MembersPush { updates: updates(u)? },
        3 => Message::MembersReconcile { ranges: ranges(u)? },
        4 => Message::MembersWant { keys: keys(u, host)? },
        5 => Message::Reconcile { ranges: ranges(u)? },
        6 => Message::Want { keys: keys(u, host)? },
        7 => Message::ClockOff { ahead: number(u)? as i64 },
        8 | 9 => Message::Announcement {
            auction: number(u)?,
            workload: offered(u, host, from)?,
            replicas: count(u)?,
            in_place: u.arbitrary()?,
        },
        10..=12 => award(u, host, from)?,
        13 => Message::AwardQuery { placement: placement(u, host)?, at: UnixMillis(number(u)?) },
        14 => Message::BitfieldRequest { root: image(u)?, bits: u.arbitrary()? },
        15 => Message::Bitfield { root: image(u)?, bits: vec![u.arbitrary()?; 2], complete: u.arbitrary()? },
        16 => Message::Renew { chain: members()[from].chain.clone() },
        17 => Message::Renewed { chain: renewed(u)? },
        18 => Message::Leave { update: update(u)? },
        19 => Message::Hold { auction: number(u)?, workload: offered(u, host, from)?, replicas: count(u)? },
        20 => Message::Unhold { auction: number(u)? },
        21 => Message::LeaseRequest { placement: placement(u, host)?, seats: seats(u)?, seq: number(u)? },
        22 => Message::LeaseDenied { placement: placement(u, host)?, seq: number(u)?, seats: Some(seats(u)?) },
        23 => Message::LeaseRelease { placement: placement(u, host)? },
        24 => Message::SeatsPrepare { workload: workload(u, host)?, term: number(u)?, ballot: ballot(u, from)? },
        25 => Message::SeatsAccept { workload: workload(u, host)?, ballot: ballot(u, from)?, seats: seats(u)? },
        26 => Message::SeatsDecided { workload: workload(u, host)?, seats: seats(u)? },
        27 => Message::Have { items: items(u, host)? },
        31 => Message::TurnRequest { reference: outside(u)?, shares: u.arbitrary()? },
        32 => Message::Turn { reference: outside(u)?, turn: turn(u)? },
        33 => Message::TurnEnd { reference: outside(u)?, root: Some(image(u)?) },
        _ => {
            let mut facts = vec![fact(u, host, from)?];
            while facts.len() < 4 && u.ratio(1, 4)? {
                facts.push(fact(u, host, from)?);
            }
            Message::Facts { facts }
        }
    })
}

/// Something of a registry that is not the mesh; now and then one of very many.
pub fn outside(u: Input<'_, '_>) -> Result<Reference> {
    let tag: u16 = if u.ratio(1, 4)? { u.arbitrary()? } else { 1 };
    Ok(format!("quay.io/a/b:{tag}").parse().expect("a good reference"))
}

fn turn(u: Input<'_, '_>) -> Result<Turn> {
    Ok(match u.int_in_range(0..=2)? {
        0 => Turn::Yours,
        1 => Turn::Theirs(node(u)?),
        _ => Turn::Over(image(u)?),
    })
}

/// What a member says to something that the node under test has sent; nothing while it has sent nothing.
pub fn answer(u: Input<'_, '_>, host: &Host) -> Result<Option<(usize, Message)>> {
    if host.heard.is_empty() {
        return Ok(None);
    }
    // The latest first.
    let back = u.choose_index(host.heard.len())?;
    let (to, heard) = &host.heard[host.heard.len() - 1 - back];
    // Of a crowd nobody answers.
    let Some(from) = members().iter().position(|member| member.id == *to) else { return Ok(None) };
    let answer = match heard {
        Message::Ping { seq, .. } => Message::Ack { seq: *seq, updates: updates(u)? },
        Message::PingReq { seq, .. } if u.arbitrary()? => Message::Nack { seq: *seq },
        Message::PingReq { seq, .. } => Message::Ack { seq: *seq, updates: updates(u)? },
        Message::MembersReconcile { .. } => Message::MembersReconcile { ranges: ranges(u)? },
        Message::Reconcile { .. } => Message::Reconcile { ranges: ranges(u)? },
        Message::Want { .. } => Message::Facts { facts: vec![fact(u, host, from)?] },
        Message::Have { items } => Message::Want { keys: items.iter().map(|(key, _)| *key).collect() },
        Message::Announcement { auction, .. } => match refusal(u)? {
            Some(refusal) => Message::Refusal { auction: *auction, refusal },
            None => {
                let prices = (0..u.int_in_range(0..=3u8)?).map(|_| count(u)).collect::<Result<_>>()?;
                Message::Bid { auction: *auction, prices, basis: Basis::default() }
            }
        },
        Message::Hold { auction, .. } => Message::Held { auction: *auction, refusal: refusal(u)? },
        Message::Award { placement, .. } | Message::AwardQuery { placement, .. } => {
            Message::Verdict { placement: *placement, refusal: refusal(u)? }
        }
        Message::TurnRequest { reference, .. } => Message::Turn { reference: reference.clone(), turn: turn(u)? },
        Message::BitfieldRequest { root, .. } => {
            Message::Bitfield { root: *root, bits: vec![u.arbitrary()?], complete: u.arbitrary()? }
        }
        Message::Bid { auction, .. } => {
            // The auction's number and the bidder's price are of no more use: it is awarded, or was held for.
            let workload = offered(u, host, from)?;
            Message::Hold { auction: *auction, workload, replicas: count(u)? }
        }
        Message::Renew { .. } => Message::Renewed { chain: renewed(u)? },
        Message::LeaseRequest { placement, seats, seq } => match u.int_in_range(0..=3)? {
            0 => Message::LeaseDenied { placement: *placement, seq: *seq, seats: None },
            1 => {
                let seats = Some(self::seats(u)?);
                Message::LeaseDenied { placement: *placement, seq: *seq, seats }
            }
            _ => Message::LeaseGranted { placement: *placement, term: seats.term, seq: *seq },
        },
        Message::SeatsPrepare { workload, term, ballot } => {
            let accepted = if u.arbitrary()? { Some((self::ballot(u, from)?, seats(u)?)) } else { None };
            Message::SeatsPromise { workload: *workload, term: *term, ballot: *ballot, accepted }
        }
        Message::SeatsAccept { workload, ballot, seats } => {
            Message::SeatsAccepted { workload: *workload, term: seats.term.wrapping_sub(1), ballot: *ballot }
        }
        Message::SeatsAccepted { workload, ballot: _, .. } => {
            Message::SeatsDecided { workload: *workload, seats: seats(u)? }
        }
        // Said once more, by whoever it was said to: it may be anything but an answer.
        other => other.clone(),
    };
    Ok(Some((from, answer)))
}

fn refusal(u: Input<'_, '_>) -> Result<Option<Refusal>> {
    Ok(match u.int_in_range(0..=9)? {
        0 => Some(Refusal::Superseded { epoch: number(u)? }),
        1 => Some(Refusal::Memory { asked: number(u)?, free: number(u)? }),
        2 => Some(Refusal::OnHold),
        3 => Some(Refusal::NotSeen),
        4 => Some(Refusal::Requires("é".repeat(usize::from(u.arbitrary::<u8>()?)))),
        _ => None,
    })
}

fn award(u: Input<'_, '_>, host: &Host, from: usize) -> Result<Message> {
    let workload = offered(u, host, from)?;
    let mut placement = placement(u, host)?;
    if let Key::Workload(id) = workload.key {
        placement.workload = id;
    }
    let award = Award::sign(
        &placement,
        &members()[ME].id,
        host.wall(),
        &members()[from].key,
        Arc::new(members()[from].chain.clone()),
    );
    Ok(Message::Award { placement, workload, award })
}

/// A workload as the node knows it, or as this member would have it.
fn offered(u: Input<'_, '_>, host: &Host, from: usize) -> Result<Arc<Fact>> {
    let known = host.node.catalog().workload(&workload(u, host)?);
    match known {
        Some(known) if !u.ratio(1, 4)? => Ok(Arc::clone(known.signed)),
        _ => wanted(u, host, from),
    }
}

fn placement(u: Input<'_, '_>, host: &Host) -> Result<PlacementId> {
    let known: Vec<PlacementId> = host
        .node
        .catalog()
        .placements()
        .map(|known| PlacementId { workload: known.workload, replica: known.replica, epoch: known.fact.epoch })
        .collect();
    if !known.is_empty() && u.arbitrary()? {
        return u.choose(&known).copied();
    }
    let replica = if u.ratio(1, 8)? { count(u)? } else { u.int_in_range(0..=2)? };
    Ok(PlacementId { workload: workload(u, host)?, replica, epoch: number(u)? })
}

fn ballot(u: Input<'_, '_>, from: usize) -> Result<Ballot> {
    Ok((number(u)?, if u.ratio(1, 8)? { node(u)? } else { members()[from].id }))
}

fn seats(u: Input<'_, '_>) -> Result<Seats> {
    let which: u8 = u.arbitrary()?;
    let nodes = members().iter().enumerate().filter(|(at, _)| which & 1 << at != 0).map(|(_, member)| member.id);
    Ok(Seats { term: number(u)?, nodes: nodes.collect() })
}

fn updates(u: Input<'_, '_>) -> Result<Vec<Update>> {
    (0..u.int_in_range(0..=2u8)?).map(|_| update(u)).collect()
}

fn update(u: Input<'_, '_>) -> Result<Update> {
    let by = u.choose_index(members().len())?;
    let mut update = hello(by);
    update.state = *u.choose(&[State::Alive, State::Suspect, State::Down, State::Left])?;
    if u.arbitrary()? {
        update.incarnation = number(u)?;
        update.boot = number(u)?;
    }
    if u.arbitrary()? {
        update.accuser = Some(node(u)?);
    }
    if u.ratio(1, 8)? {
        update.addresses = vec!["/memory/9".to_owned(); usize::from(u.arbitrary::<u8>()?)];
    }
    Ok(sign_update(update, by))
}

fn keys(u: Input<'_, '_>, host: &Host) -> Result<Vec<KeyHash>> {
    let known = host.node.catalog().index();
    let member = |id: NodeId| KeyHash(id.0[..16].try_into().expect("half an id"));
    let one = |u: Input<'_, '_>| match u.int_in_range(0..=2)? {
        0 => Ok(known.nth(u.choose_index(known.len().max(1))?).map_or(KeyHash([0; 16]), |entry| entry.fact.key.hash())),
        1 => node(u).map(member),
        _ => Ok(KeyHash([u.arbitrary()?; 16])),
    };
    (0..u.int_in_range(0..=8u8)?).map(|_| one(u)).collect()
}

fn items(u: Input<'_, '_>, host: &Host) -> Result<Vec<(KeyHash, u128)>> {
    let version = |u: Input<'_, '_>| Ok(u128::from(number(u)?) << if u.arbitrary()? { 64 } else { 0 });
    keys(u, host)?.into_iter().map(|key| Ok((key, version(u)?))).collect()
}

fn ranges(u: Input<'_, '_>) -> Result<Vec<Range>> {
    let one = |u: Input<'_, '_>| {
        let content = match u.int_in_range(0..=2)? {
            0 => Content::Skip,
            1 => Content::Fingerprint(Fingerprint([u.arbitrary()?; 16])),
            _ => {
                let item = |u: Input<'_, '_>| Ok((KeyHash([u.arbitrary()?; 16]), u128::from(number(u)?) << 64));
                Content::Items((0..u.int_in_range(0..=3u8)?).map(|_| item(u)).collect::<Result<_>>()?)
            }
        };
        let end = if u.ratio(1, 3)? { None } else { Some(KeyHash([u.arbitrary()?; 16])) };
        Ok(Range { end, content })
    };
    (0..u.int_in_range(0..=4u8)?).map(|_| one(u)).collect()
}

/// The node's own certificate, good for longer or shorter.
fn renewed(u: Input<'_, '_>) -> Result<Chain> {
    Ok(Chain::root(root(), members()[ME].id, NOW.as_secs() - 10, number(u)?))
}

fn version(u: Input<'_, '_>, host: &Host) -> Result<Hlc> {
    let wall = host.wall();
    Ok(match u.int_in_range(0..=7)? {
        0 => Hlc::at(UnixMillis(number(u)?)),
        1 => Hlc::at(wall.after(Duration::from_secs(59))),
        2 => Hlc::at(wall.after(Duration::from_secs(61))),
        _ => Hlc::at(wall.after(Duration::from_millis(u64::from(u.arbitrary::<u8>()?)))),
    })
}

fn fact(u: Input<'_, '_>, host: &Host, from: usize) -> Result<Arc<Fact>> {
    // As a rule of its own; what others have said is passed on.
    let by = if u.ratio(1, 4)? { u.choose_index(members().len())? } else { from };
    let author = members()[by].id;
    let chain = || members()[by].chain.clone();
    let (key, body) = match u.int_in_range(0..=9)? {
        0 => {
            let mut report = report(by);
            report.images.truncate(u.int_in_range(0..=1)?);
            report.fetching = vec![image(u)?];
            if u.ratio(1, 4)? {
                // Its name is taken back, or said to be made of something.
                let named = report.images.pop().map(|image| (image.reference, image.named));
                report.unnamed.extend(named);
            } else if let Some(held) = report.images.first_mut() {
                let (root, digest) = (image(u)?, held.id);
                held.original = Some(OriginalHeld { root, digest, size: 1, here: u.arbitrary()? });
            }
            report.capacity.cpu_milli = number(u)?;
            (Key::Node(author), Body::Node(report))
        }
        1..=3 => {
            let placement = placement(u, host)?;
            let fact = running(u, host, &placement, by)?;
            (Key::Placement(author, placement.workload, placement.replica), Body::Placement(fact))
        }
        4 => (Key::Journal(author, workload(u, host)?), Body::Journal(journal(u, host)?)),
        5 => {
            let order = OrderFact { holds: u.arbitrary()?, reason: String::new(), target: None, author: chain() };
            (Key::Drain(node(u)?), Body::Order(order))
        }
        6 => {
            let target = &members()[u.choose_index(members().len())?];
            let shown = (target.chain.clone(), catalog::vouch(&target.key, &target.chain));
            let (reason, author) = ("leaves".to_owned(), chain());
            let order = OrderFact { holds: true, reason, target: Some(shown), author };
            (Key::Revoked(target.id), Body::Order(order))
        }
        7 => (Key::Seats(author, workload(u, host)?), Body::Seats(seats(u)?)),
        8 => {
            let placement = placement(u, host)?;
            let key = match u.arbitrary()? {
                true => Key::Placement(author, placement.workload, placement.replica),
                false => Key::Journal(author, placement.workload),
            };
            (key, Body::Gone)
        }
        _ => return wanted(u, host, by),
    };
    Ok(Arc::new(sign_fact(key, version(u, host)?, codec::encode(&body), by)))
}

/// A workload, new or changed.
fn wanted(u: Input<'_, '_>, host: &Host, by: usize) -> Result<Arc<Fact>> {
    let id = workload(u, host)?;
    let known = host.node.catalog().get(&Key::Workload(id)).map(|entry| &entry.said);
    let mut fact = match known {
        Some(Said::Workload { fact, .. }) if !u.ratio(1, 4)? => {
            WorkloadFact { author: members()[by].chain.clone(), ..fact.clone() }
        }
        _ => {
            let mut spec = wish(u)?;
            // Whoever wants another's workload to be something else says so under its id.
            if u.ratio(1, 2)? {
                spec.id = id;
            }
            workload_fact(&spec, by)
        }
    };
    let changes: u8 = u.arbitrary()?;
    let has = |bit: u8| changes & 1 << bit != 0;
    if has(0) {
        fact.generation = number(u)?;
    }
    if has(1) {
        fact.revived = number(u)?;
    }
    if has(2) {
        fact.replicas = replicas(u)?;
    }
    if has(3) {
        fact.removed = true;
    }
    if has(4) {
        let mut spec = wish(u)?;
        if let Ok(now) = serde_json::from_slice::<Spec>(&fact.spec.bytes) {
            (spec.id, spec.name) = (now.id, now.name);
        }
        fact.previous = Some(std::mem::replace(&mut fact.spec, workload_fact(&spec, by).spec));
    }
    if has(5) {
        fact.rollout = Rollout { max_surge: count(u)?, max_unavailable: count(u)? };
    }
    if has(6) {
        fact.seats = Some(seats(u)?);
    }
    if has(7) {
        fact.setback = "it does not stay up".to_owned();
    }
    let id = serde_json::from_slice::<Spec>(&fact.spec.bytes).map_or(id, |spec| spec.id);
    let content = codec::encode(&Body::Workload(fact));
    Ok(Arc::new(sign_fact(Key::Workload(id), version(u, host)?, content, by)))
}

fn running(u: Input<'_, '_>, host: &Host, placement: &PlacementId, by: usize) -> Result<PlacementFact> {
    let auctioneer = &members()[u.choose_index(members().len())?];
    let status = ExitStatus { code: i32::from(u.arbitrary::<u8>()?) % 2, out_of_memory: false };
    let states = [
        PlacementState::Running,
        PlacementState::Fetching,
        PlacementState::Blocked,
        PlacementState::Starting,
        PlacementState::Waiting,
        PlacementState::Stopping,
        PlacementState::Exited(status),
        PlacementState::Failed,
        PlacementState::Lost,
        PlacementState::Evicted,
    ];
    let known = host.node.catalog().workload(&placement.workload);
    let form = known.as_ref().map_or(0, |known| known.fact.form());
    let chain = Arc::new(auctioneer.chain.clone());
    Ok(PlacementFact {
        epoch: placement.epoch,
        state: u.choose(&states)?.clone(),
        detail: String::new(),
        restarts: count(u)?,
        stopped: u.arbitrary()?,
        generation: known.map_or(0, |known| known.fact.generation),
        form: if u.ratio(1, 4)? { number(u)? } else { form },
        accepted: number(u)?,
        started: number(u)?,
        award: Award::sign(placement, &members()[by].id, host.wall(), &auctioneer.key, chain),
    })
}

fn journal(u: Input<'_, '_>, host: &Host) -> Result<Journal> {
    let causes = [Cause::Submitted, Cause::NodeDown(node(u)?), Cause::Evicted(node(u)?), Cause::Missing];
    let record = Record {
        auctioneer: node(u)?,
        at: if u.arbitrary()? { host.wall() } else { UnixMillis(number(u)?) },
        cause: *u.choose(&causes)?,
        members: count(u)?,
        asked: count(u)?,
        took: count(u)?,
        quotes: Vec::new(),
        more_quotes: count(u)?,
        refusals: vec![(node(u)?, Refusal::Full)],
        refused: vec![(Refusal::Full.kind(), count(u)?)],
        placed: vec![(u.int_in_range(0..=2)?, number(u)?, node(u)?)],
    };
    let records = vec![record; u.int_in_range(0..=9)?];
    Ok(Journal { records, pending: u.arbitrary()? })
}

//! A mesh with fixed keys that the fuzzer owns. Random bytes never carry a good signature, so what is behind one would never
//! be reached: here the input says what is said, and its author signs it. Nothing of this reads a clock or asks for
//! randomness: one input is one history.

pub mod history;
pub mod host;
pub mod speech;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use ed25519_dalek::SigningKey;
use moyai_protocol::auction::Award;
use moyai_protocol::catalog::{self, Body, Fact, Hlc, ImageHeld, Key, NodeFact, Rollout, WorkloadFact};
use moyai_protocol::codec;
use moyai_protocol::id::{ChunkId, ImageId, MeshId, NodeId, Signature, WorkloadId};
use moyai_protocol::membership::{State, Update};
use moyai_protocol::message::Message;
use moyai_protocol::time::UnixMillis;
use moyai_protocol::trust::{Chain, Role, mesh_of, node_of, sign};
use moyai_protocol::workload::{ImagePin, Layout, PRIORITY, PlacementId, Resources, Restart, SignedSpec, Spec};

/// The wall clock when the node under test starts.
pub const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
/// What every machine has.
pub const CAPACITY: Resources = Resources { cpu_milli: 4000, memory: 1 << 30 };
/// Images of the mesh.
pub const IMAGES: u8 = 3;

/// The node under test, among [`members`].
pub const ME: usize = 0;
/// Those that it knows from the start: an admin and a submitter.
pub const KNOWN: [usize; 2] = [1, 2];
/// Those that may submit.
pub const SUBMITTERS: [usize; 3] = [0, 1, 2];
/// An admin, with its certificate from the root; not the node under test.
pub const ADMIN: usize = 1;
/// A submitter that [`ADMIN`] certified.
pub const SUBMITTER: usize = 2;
/// A worker with a good certificate, of which the node under test has not heard.
pub const WORKER: usize = 3;
/// A key without any certificate; it shows the worker's.
pub const STRANGER: usize = 4;

/// A key of the mesh, and what it shows.
pub struct Member {
    /// Its key.
    pub key: SigningKey,
    /// The public half.
    pub id: NodeId,
    /// Its certificates.
    pub chain: Chain,
}

/// Everybody.
pub fn members() -> &'static [Member; 5] {
    static MEMBERS: LazyLock<[Member; 5]> = LazyLock::new(|| {
        let keys = [11, 12, 13, 14, 15].map(|seed| SigningKey::from_bytes(&[seed; 32]));
        let since = NOW.as_secs() - 3600;
        let admin = |at: usize| Chain::root(root(), node_of(&keys[at]), since, 1 << 30);
        let below = |at: usize, role| admin(ADMIN).issue(&keys[ADMIN], node_of(&keys[at]), role, since, 1 << 25, 1);
        let worker = below(WORKER, Role::Worker);
        let chains = [admin(ME), admin(ADMIN), below(SUBMITTER, Role::Submitter), worker.clone(), worker];
        let mut chains = chains.into_iter();
        keys.clone().map(|key| Member { id: node_of(&key), chain: chains.next().expect("one for each"), key })
    });
    &MEMBERS
}

/// The root key of the mesh.
pub fn root() -> &'static SigningKey {
    static ROOT: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[200; 32]));
    &ROOT
}

/// The mesh.
pub fn mesh() -> MeshId {
    static MESH: LazyLock<MeshId> = LazyLock::new(|| mesh_of(&node_of(root())));
    *MESH
}

/// Which member this is; of an id that is nobody's, one that it stands for.
pub fn at(node: &NodeId) -> usize {
    let known = members().iter().position(|member| member.id == *node);
    known.unwrap_or(usize::from(node.0[0]) % members().len())
}

/// The root chunk of an image of the mesh.
pub fn image(at: u8) -> ChunkId {
    ChunkId([0x40 + at % IMAGES; 32])
}

/// One of the workloads that members may submit: plain, a gang, a singleton, one that shuns the first, one that makes
/// others go, and one that asks for nothing.
pub fn spec(kind: u8) -> Spec {
    let kind = kind % 6;
    let name = |kind: u8| format!("w{kind}");
    Spec {
        id: workload(kind),
        name: name(kind),
        image: ImagePin {
            reference: "alpine".parse().expect("a good reference"),
            id: ImageId([1; 32]),
            root: image(kind),
            size: 1 << 20,
        },
        entrypoint: None,
        command: vec!["serve".to_owned()],
        env: Vec::new(),
        user: None,
        workdir: None,
        hostname: None,
        resources: if kind == 5 { Resources::default() } else { Resources { cpu_milli: 900, memory: 64 << 20 } },
        pids: 0,
        replicas: if kind == 2 { 1 } else { 2 },
        restart: [Restart::Always, Restart::No, Restart::OnFailure { max: 2 }][usize::from(kind) % 3],
        on: BTreeMap::new(),
        stop_signal: None,
        stop_timeout: 1,
        auto_remove: kind == 3,
        gang: kind == 1,
        singleton: kind == 2,
        lazy: kind == 4,
        priority: if kind == 4 { 90 } else { PRIORITY },
        layout: Layout::Balance,
        near: if kind == 4 { vec![name(0)] } else { Vec::new() },
        apart: if kind == 3 { vec![name(0)] } else { Vec::new() },
        terminal: false,
        input: false,
        health: None,
        confinement: Default::default(),
        requires: Vec::new(),
    }
}

/// The id of a workload that a member submitted.
pub fn workload(kind: u8) -> WorkloadId {
    WorkloadId([0x80 + kind % 6; 16])
}

/// A workload, as `author` would have it.
pub fn workload_fact(spec: &Spec, author: usize) -> WorkloadFact {
    let bytes = serde_json::to_vec(spec).expect("plain data");
    WorkloadFact {
        spec: sign_spec(bytes, NOW.as_secs(), author),
        generation: 0,
        revived: 0,
        replicas: spec.replicas,
        removed: false,
        previous: None,
        rollout: Rollout::default(),
        setback: String::new(),
        seats: None,
        author: members()[author].chain.clone(),
    }
}

/// What a member says of itself: it has one of the images, and gets another.
pub fn report(by: usize) -> NodeFact {
    let held = |root| ImageHeld {
        reference: "alpine".parse().expect("a good reference"),
        id: ImageId([1; 32]),
        root,
        size: 1 << 20,
        named: Hlc::default(),
        here: true,
        original: None,
    };
    NodeFact {
        name: format!("n{by}"),
        version: "fuzz".to_owned(),
        capacity: CAPACITY,
        labels: BTreeMap::from([("number".to_owned(), by.to_string())]),
        data: Vec::new(),
        images: vec![held(image(by as u8))],
        unnamed: Vec::new(),
        fetching: vec![image(by as u8 + 1)],
        chain: members()[by].chain.clone(),
        vouch: catalog::vouch(&members()[by].key, &members()[by].chain),
    }
}

// Signatures over bytes that need not be well formed. Their purposes are the product's: if one is changed there, nothing
// signed here is believed, and `handle` says so before it begins.

/// These bytes as a specification that a member signed.
pub fn sign_spec(bytes: Vec<u8>, signed_at: u64, by: usize) -> SignedSpec {
    let submitter = &members()[by];
    let signed = [&signed_at.to_be_bytes(), bytes.as_slice()].concat();
    let signature = sign(&submitter.key, "moyai workload v1", &signed);
    SignedSpec { bytes, signed_at, submitter: submitter.chain.clone(), signature }
}

/// This content as a fact that a member signed.
pub fn sign_fact(key: Key, version: Hlc, content: Vec<u8>, by: usize) -> Fact {
    let Member { key: key_pair, id: author, .. } = &members()[by];
    let mut signed = codec::encode(&(&key, version, author));
    signed.extend_from_slice(&content);
    let signature = sign(key_pair, "moyai fact v1", &signed);
    Fact { key, version, author: *author, content, signature }
}

/// What a member says of itself, and what is said of it.
pub fn sign_update(mut update: Update, by: usize) -> Update {
    let Member { key, id, .. } = &members()[by];
    let leaves = update.state == State::Left;
    // Only so much of it is kept, and that is what is signed.
    update.addresses.retain(|address| address.len() <= 128);
    update.addresses.truncate(8);
    let signed = codec::encode(&(id, update.incarnation, update.boot, &update.addresses, leaves));
    Update { node: *id, signature: sign(key, "moyai member v1", &signed), ..update }
}

/// Certificates that this node may show: as they are if they are somebody's, else those of the node.
fn mend_chain(chain: &mut Chain, of: usize) {
    if chain.verify_shown_by(&members()[of].id, &mesh(), NOW.as_secs()).is_err() {
        *chain = members()[of].chain.clone();
    }
}

fn mend_spec(spec: &mut SignedSpec) {
    let by = spec.submitter.leaf().map_or(SUBMITTER, |leaf| at(&leaf.node));
    *spec = sign_spec(std::mem::take(&mut spec.bytes), spec.signed_at, by);
}

/// An award of this placement to this node, by who is said to have given it.
pub fn mend_award(award: &mut Award, placement: &PlacementId, winner: &NodeId) {
    let by = &members()[at(&award.auctioneer)];
    *award = Award::sign(placement, winner, award.at, &by.key, Arc::new(by.chain.clone()));
}

/// What a member says, with the signatures that it needs, and under the key that it is about.
pub fn mend_body(body: &mut Body, key: &mut Key, by: usize) {
    let author = members()[by].id;
    match key {
        Key::Node(node) | Key::Placement(node, ..) | Key::Journal(node, _) | Key::Seats(node, _) => *node = author,
        Key::Drain(node) | Key::Revoked(node) => *node = members()[at(node)].id,
        Key::Workload(_) => {}
    }
    match body {
        Body::Node(report) => {
            mend_chain(&mut report.chain, by);
            report.vouch = catalog::vouch(&members()[by].key, &report.chain);
        }
        Body::Placement(fact) => {
            if let Key::Placement(node, workload, replica) = key {
                let placement = PlacementId { workload: *workload, replica: *replica, epoch: fact.epoch };
                mend_award(&mut fact.award, &placement, node);
            }
        }
        Body::Workload(fact) => {
            mend_chain(&mut fact.author, by);
            mend_spec(&mut fact.spec);
            fact.previous.as_mut().map(mend_spec);
            if let Ok(spec) = serde_json::from_slice::<Spec>(&fact.spec.bytes) {
                *key = Key::Workload(spec.id);
            }
            if let Some(seats) = &mut fact.seats {
                mend_nodes(&mut seats.nodes);
            }
        }
        Body::Order(order) => {
            mend_chain(&mut order.author, by);
            if let (Some((target, shown)), Key::Revoked(node)) = (&mut order.target, &*key) {
                mend_chain(target, at(node));
                *shown = catalog::vouch(&members()[at(node)].key, target);
            }
        }
        Body::Seats(seats) => mend_nodes(&mut seats.nodes),
        Body::Journal(_) | Body::Gone => {}
    }
}

fn mend_nodes(nodes: &mut [NodeId]) {
    for node in nodes {
        *node = members()[at(node)].id;
    }
}

/// The same fact, as its author would have signed it.
pub fn mend_fact(fact: &Fact) -> Fact {
    let by = at(&fact.author);
    let mut key = fact.key;
    let content = match codec::decode::<Body>(&fact.content) {
        Ok(mut body) => {
            mend_body(&mut body, &mut key, by);
            codec::encode(&body)
        }
        Err(_) => fact.content.clone(),
    };
    sign_fact(key, fact.version, content, by)
}

/// The same message with every signature in it good, about the nodes that there are.
pub fn mend(message: &mut Message, from: usize) {
    let me = members()[ME].id;
    match message {
        Message::Ping { target, updates, .. } | Message::PingReq { target, updates, .. } => {
            *target = members()[at(target)].id;
            mend_updates(updates);
        }
        Message::Ack { updates, .. } | Message::MembersPush { updates } => mend_updates(updates),
        Message::Leave { update } => mend_updates(std::slice::from_mut(update)),
        Message::Facts { facts } => facts.iter_mut().for_each(mend_shared),
        Message::Announcement { workload, .. } | Message::Hold { workload, .. } => mend_shared(workload),
        Message::Award { placement, workload, award } => {
            mend_shared(workload);
            if let Key::Workload(id) = workload.key {
                placement.workload = id;
            }
            award.auctioneer = members()[from].id;
            mend_award(award, placement, &me);
        }
        Message::Renew { chain } => mend_chain(chain, from),
        Message::Renewed { chain } => mend_chain(chain, ME),
        Message::LeaseRequest { seats, .. } => mend_nodes(&mut seats.nodes),
        Message::LeaseDenied { seats: Some(seats), .. } => mend_nodes(&mut seats.nodes),
        Message::SeatsAccept { ballot, seats, .. } => {
            ballot.1 = members()[from].id;
            mend_nodes(&mut seats.nodes);
        }
        Message::SeatsPrepare { ballot, .. } => ballot.1 = members()[from].id,
        Message::SeatsPromise { ballot, accepted, .. } => {
            ballot.1 = me;
            if let Some((_, seats)) = accepted {
                mend_nodes(&mut seats.nodes);
            }
        }
        Message::SeatsAccepted { ballot, .. } => ballot.1 = me,
        Message::SeatsDecided { seats, .. } => mend_nodes(&mut seats.nodes),
        _ => {}
    }
}

fn mend_shared(fact: &mut Arc<Fact>) {
    *fact = Arc::new(mend_fact(fact));
}

fn mend_updates(updates: &mut [Update]) {
    for update in updates {
        *update = sign_update(update.clone(), at(&update.node));
    }
}

/// What a member says when it starts.
pub fn hello(by: usize) -> Update {
    let (incarnation, boot) = (NOW.0 - 1000, NOW.0 - 1000);
    let addresses = vec![format!("/memory/{by}")];
    let signature = Signature([0; 64]);
    let update =
        Update { node: members()[by].id, incarnation, boot, state: State::Alive, accuser: None, addresses, signature };
    sign_update(update, by)
}

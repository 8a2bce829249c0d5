//! Writes the corpus: small inputs from which the fuzzer starts, each a real encoding of something. Messages are those that
//! a node says and hears in short histories, one of each kind. What was put into the corpus by hand stays.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use arbitrary::Unstructured;
use mesh::history::{self, BETWEEN};
use mesh::{ADMIN, ME, NOW, SUBMITTER, WORKER, members, mesh as mesh_id, speech};
use moyai_protocol::catalog::{Body, Fact};
use moyai_protocol::codec;
use moyai_protocol::lease::Seats;
use moyai_protocol::message::Message;
use moyai_protocol::reconcile::{Content, Range};
use moyai_protocol::trust::{Chain, Role, Ticket, Vouchers};
use moyai_protocol::workload::PlacementId;

fn main() -> io::Result<()> {
    let said = Said::listen();
    let mut corpus: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    corpus.insert("message", said.messages.values().cloned().collect());
    corpus.insert("fact", facts(&said));
    corpus.insert("spec", specs());
    corpus.insert("ticket", tickets());
    corpus.insert("chain", chains());
    corpus.insert("reference", references());
    corpus.insert("reconcile", ranges());
    corpus.insert("handle", histories(&said));
    for (target, inputs) in corpus {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        fs::create_dir_all(&folder)?;
        for old in fs::read_dir(&folder)?.collect::<io::Result<Vec<_>>>()? {
            if old.file_name().to_string_lossy().starts_with("seed-") {
                fs::remove_file(old.path())?;
            }
        }
        for (at, input) in inputs.iter().enumerate() {
            fs::write(folder.join(format!("seed-{at:02}")), input)?;
        }
        println!("{target}: {} inputs, {} bytes", inputs.len(), inputs.iter().map(Vec::len).sum::<usize>());
    }
    Ok(())
}

/// What was said in many short histories: the shortest message of each kind that is not trivial, and the same of facts, by
/// their numbers on the wire.
#[derive(Default)]
struct Said {
    messages: BTreeMap<u8, Vec<u8>>,
    facts: BTreeMap<u8, Fact>,
}

impl Said {
    fn listen() -> Said {
        let mut said = Said::default();
        for life in 0..200u32 {
            let mut host = history::among_members();
            if life % 8 == 7 {
                host.crowd();
            }
            for at in 0..68u32 {
                let mut bytes = noise(life * 1000 + at);
                // Every kind comes to word.
                bytes[0] = (at / 2 % 34) as u8;
                let mut u = Unstructured::new(&bytes);
                if at % 2 == 0 {
                    said.note(speech::message(&mut u, &host, 1 + at as usize % 3).ok());
                } else {
                    said.note(speech::answer(&mut u, &host).ok().flatten().map(|(_, message)| message));
                }
                let _ = (history::step(&mut host, &bytes), host.work());
                said.note(host.heard.iter().map(|(_, message)| message.clone()));
            }
        }
        // What only custodians of singletons say, which short histories hardly come to.
        let (workload, term, ballot) = (mesh::workload(2), 1, (3, members()[ADMIN].id));
        let placement = PlacementId { workload, replica: 0, epoch: 1 };
        let seats = Seats { term: 2, nodes: members()[..3].iter().map(|member| member.id).collect() };
        said.note([
            Message::LeaseGranted { placement, term, seq: 7 },
            Message::SeatsPromise { workload, term, ballot, accepted: Some((ballot, seats)) },
            Message::SeatsAccepted { workload, term, ballot },
        ]);
        said
    }

    fn note(&mut self, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            let bytes = codec::encode_message(&message);
            let long = |known: &Vec<u8>| known.len() > bytes.len().max(40);
            if self.messages.get(&bytes[1]).is_none_or(long) {
                self.messages.insert(bytes[1], bytes);
            }
            let facts = match message {
                Message::Facts { facts } => facts,
                Message::Announcement { workload, .. } => vec![workload],
                _ => Vec::new(),
            };
            for fact in facts.into_iter().filter(|fact| fact.open(&mesh_id()).is_ok()) {
                let long = |known: &Fact| known.content.len() > fact.content.len().max(40);
                let kind = codec::encode(&fact.key)[0];
                if self.facts.get(&kind).is_none_or(long) {
                    self.facts.insert(kind, Fact::clone(&fact));
                }
            }
        }
    }
}

/// Bytes that are the same each time.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = u64::from(seed) | 1 << 40;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..72).map(|_| next()).skip(8).collect()
}

/// A fact of each kind, as it travels; and its content, behind who signs it and what it is about.
fn facts(said: &Said) -> Vec<Vec<u8>> {
    let whole = said.facts.values().map(codec::encode);
    // The kinds of keys are numbered as `fact` numbers them, but for the last of theirs.
    let about = [0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86];
    let contents = said.facts.iter().map(|(kind, fact)| {
        let by = mesh::at(&fact.author) as u8;
        [&[by, about[usize::from(*kind)]], fact.content.as_slice()].concat()
    });
    let gone = vec![ME as u8, 0x82, codec::encode(&Body::Gone)[0]];
    whole.chain(contents).chain([gone]).collect()
}

fn specs() -> Vec<Vec<u8>> {
    let json = |kind| serde_json::to_vec(&mesh::spec(kind)).expect("plain data");
    (0..6).map(|kind| [&[kind % 4][..], &json(kind)].concat()).collect()
}

fn tickets() -> Vec<Vec<u8>> {
    let ticket = Ticket {
        mesh: mesh_id(),
        inviter: members()[ADMIN].id,
        secret: [3; 16],
        expires: NOW.as_secs() + 3600,
        role: Role::Submitter,
        addresses: vec!["/ip4/10.77.0.1/tcp/7788".to_owned(), "/ip4/10.77.0.1/udp/7788/quic-v1".to_owned()],
    };
    let mut vouchers = Vouchers::default();
    vouchers.add(&[3; 16], Role::Worker, 2, 200, 1).expect("there is room");
    vouchers.redeem(&[3; 16], members()[WORKER].id, 1).expect("it is good");
    let used = [0, 0, 2, 200, 1, 1, 0, 1, 1, 1, 0, 2, 1, 1, 0, 3, 201, 1, 0, 1];
    vec![ticket.to_string().into_bytes(), codec::encode(&ticket), codec::encode(&vouchers), used.to_vec()]
}

fn chains() -> Vec<Vec<u8>> {
    let encoded = [ADMIN, SUBMITTER, WORKER].map(|at| codec::encode(&members()[at].chain));
    // Fields of certificates; most are as they should be.
    let fields = [vec![15, 1, 1, 0], vec![15; 64], vec![15, 3, 1, 3, 1, 2, 1, 15, 15, 9], vec![255; 90]];
    encoded.into_iter().chain([codec::encode(&Chain(Vec::new()))]).chain(fields).collect()
}

fn references() -> Vec<Vec<u8>> {
    let texts = [
        "alpine",
        "index.docker.io/library/alpine:3.20",
        "bitnami/redis",
        "localhost/a",
        "lab:5000/a/b:v1",
        "ghcr.io/x/y_z.0-1:latest",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

fn ranges() -> Vec<Vec<u8>> {
    let host = history::among_members();
    let index = host.node.catalog().index();
    let open = moyai_protocol::reconcile::open(index);
    let answer =
        moyai_protocol::reconcile::compare(index, vec![Range { end: None, content: Content::Items(Vec::new()) }]);
    // Of all kinds, short: to be split, to be listed, and to be settled.
    let split: Vec<u8> = [[1, 210]; 28].concat();
    let listed: Vec<u8> = [[1, 60]; 60].concat();
    let settled: Vec<u8> = [[3, 200, 2, 10, 3, 1, 2, 200, 9, 0]; 12].concat();
    let mixed: Vec<u8> = [[0, 20, 1, 255, 2, 90, 1, 9]; 20].concat();
    let short = [split, listed, settled, mixed].map(|bytes| [&[0][..], &bytes].concat());
    let skipped = vec![Range { end: None, content: Content::Skip }];
    let encoded = [open, answer.ranges, skipped].map(|ranges| codec::encode(&ranges));
    short.into_iter().chain(encoded).collect()
}

/// Histories of a node: each a list of steps, as [`history::step`] reads them.
fn histories(said: &Said) -> Vec<Vec<u8>> {
    // What a user asks for: `[10, workload, command, …]`; what comes of it: 4 answers, 7 works, 9 waits, 8 sleeps.
    let submit = |kind: u8| vec![10, 0, 0, kind, 0];
    let answer = |back: u8, how: &[u8]| [&[4, back], how].concat();
    let (work, wait, sleep) = (vec![7], vec![9], |scale: u8, ticks: u8| vec![8, scale, ticks]);
    let turns = |count: usize| vec![[vec![9], vec![7], vec![9], vec![4, 0, 9, 2, 9, 9]]; count].concat();
    let mut inputs = Vec::new();
    // Each workload is submitted after the warm-up, bid for by this node, and runs; then it is changed.
    for kind in 0..6 {
        let steps = [
            vec![sleep(10, 7), work.clone(), submit(kind), work.clone(), wait.clone(), answer(0, &[9, 2, 9, 9])],
            turns(4),
            vec![
                vec![10, 6, 3, 3, 3],
                work.clone(),
                wait.clone(),
                vec![10, 6, 4, 8, 1, 8, 1, kind, 0x80, 1, 2],
                work.clone(),
            ],
            turns(3),
            vec![vec![10, 6, 5], work.clone(), wait.clone(), vec![10, 6, 9], work.clone(), wait.clone()],
        ];
        inputs.push(steps.concat());
    }
    // A daemon, then the machine, dies in the middle of it, and others move meanwhile.
    inputs.push(
        [
            vec![sleep(10, 7), submit(0), work.clone(), wait.clone(), answer(0, &[9, 1, 9]), work.clone()],
            turns(2),
            vec![vec![11, 0, 2], work.clone(), vec![10, 0, 17, 0], wait.clone(), sleep(10, 8), work.clone()],
            vec![vec![11, 1, 1], work.clone(), vec![10, 0, 17, 1], wait.clone(), sleep(10, 30), work.clone()],
            vec![vec![10, 0, 6, 0, 1], wait.clone(), vec![10, 0, 7, 2, 1], work.clone(), sleep(20, 200), wait.clone()],
        ]
        .concat(),
    );
    // Real messages, as they are and with their signatures made good, a few in each.
    let messages: Vec<&Vec<u8>> = said.messages.values().collect();
    for group in messages.chunks(5) {
        let steps =
            group.iter().enumerate().map(|(at, bytes)| [&[at as u8 % 2, at as u8 % 3], bytes.as_slice()].concat());
        inputs.push(steps.flat_map(|step| [step, work.clone(), wait.clone()]).collect());
    }
    // And short forms of every kind of message, in two orders.
    for first in [0u8, 14] {
        let kinds = (first..first + 14).chain(28..31);
        inputs.push(kinds.map(|kind| vec![2, kind % 3, kind, kind, 9, 1, 8, 2, 9, 1, 9, 3, 8, 1, 9, 7]).collect());
    }
    inputs.into_iter().map(|steps: Vec<Vec<u8>>| steps.join(&BETWEEN[..])).collect()
}

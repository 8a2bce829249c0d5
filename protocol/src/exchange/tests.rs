//! Nodes in memory that pass images on: virtual time, links of one speed, providers that lie, hang or are away.

use std::collections::BTreeSet;

use super::*;

const PIECES: usize = 100;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn node(at: usize) -> NodeId {
    NodeId([at as u8; 32])
}

fn image(n: u8) -> ChunkId {
    ChunkId([n; 32])
}

fn contents(root: ChunkId) -> Vec<Piece> {
    let chunk = |at: usize| {
        let mut id = root;
        id.0[30..].copy_from_slice(&[255, at as u8]);
        id
    };
    (0..PIECES).map(|at| Piece { chunk: chunk(at), len: 65_536 }).collect()
}

fn everything(root: ChunkId) -> impl Iterator<Item = ChunkId> {
    contents(root).into_iter().map(|piece| piece.chunk).chain([root])
}

/// How a node gives, or takes.
#[derive(Copy, Clone, Debug, PartialEq)]
enum Manner {
    Honest,
    Lies,
    Away,
    Hangs,
    DiskFull,
}

struct Host {
    exchange: Exchange,
    manner: Manner,
    kept: BTreeSet<ChunkId>,
    served: usize,
    /// When what it was asked for so far has been sent.
    busy: Instant,
    asked: Vec<(Instant, NodeId, Vec<Piece>)>,
    complete: Vec<ChunkId>,
    failed: Vec<(ChunkId, String)>,
    lied: Vec<NodeId>,
}

enum Due {
    Surveyed(ChunkId),
    Fetched { root: ChunkId, batch: u64, provider: usize, pieces: Vec<Piece>, asked: Instant },
    Message(NodeId, Message),
}

struct Mesh {
    now: Instant,
    hosts: Vec<Host>,
    due: BTreeMap<(Instant, u64), (usize, Due)>,
    count: u64,
    rng: Rng,
    loss: f64,
}

impl Mesh {
    /// All but the first have image 0.
    fn new(manners: &[Manner], seed: u64) -> Mesh {
        let host = |manner: &Manner| Host {
            exchange: Exchange::default(),
            manner: *manner,
            kept: everything(image(0)).collect(),
            served: 0,
            busy: Instant::ZERO,
            asked: Vec::new(),
            complete: Vec::new(),
            failed: Vec::new(),
            lied: Vec::new(),
        };
        let mut hosts: Vec<Host> = manners.iter().map(host).collect();
        hosts[0].kept.clear();
        Mesh { now: Instant::ZERO, hosts, due: BTreeMap::new(), count: 0, rng: Rng::with_seed(seed), loss: 0.0 }
    }

    /// The first has image 0, and so say those who lie.
    fn swarm(manners: &[Manner], seed: u64) -> Mesh {
        let mut mesh = Mesh::new(manners, seed);
        mesh.hosts[1..].iter_mut().filter(|host| host.manner == Manner::Honest).for_each(|host| host.kept.clear());
        mesh.hosts[0].kept = everything(image(0)).collect();
        mesh
    }

    fn all_have_it(&self) -> bool {
        (0..self.hosts.len()).all(|at| self.has(at, image(0)))
    }

    fn later(&mut self, to: usize, wait: Duration, due: Due) {
        self.count += 1;
        self.due.insert((self.now + wait, self.count), (to, due));
    }

    fn has(&self, at: usize, root: ChunkId) -> bool {
        everything(root).all(|chunk| self.hosts[at].kept.contains(&chunk))
    }

    /// Lets one node do something, and carries out what it wants.
    fn on(&mut self, at: usize, act: impl FnOnce(&mut Exchange, Instant, &mut Rng)) {
        let host = &mut self.hosts[at];
        act(&mut host.exchange, self.now, &mut self.rng);
        host.exchange.invariants();
        for download in host.exchange.downloads.values() {
            let have = download.pieces.iter().enumerate().filter(|(piece, _)| download.have.has(*piece));
            assert!(have.into_iter().all(|(_, piece)| host.kept.contains(&piece.chunk)), "what it has was checked");
        }
        for action in host.exchange.take_actions() {
            let wait = ms(self.rng.u64(1..20));
            let host = &mut self.hosts[at];
            match action {
                Action::Complete(root) => {
                    host.complete.push(root);
                    assert!(self.has(at, root));
                }
                Action::Failed(root, reason) => host.failed.push((root, reason)),
                Action::Lied(provider, _) => host.lied.push(provider),
                Action::Measured(bytes, _) => assert!(bytes > 0),
                Action::Survey(root) => self.later(at, wait, Due::Surveyed(root)),
                Action::Send(to, message) => {
                    if self.rng.f64() >= self.loss {
                        self.later(usize::from(to.0[0]), wait, Due::Message(node(at), message));
                    }
                }
                Action::Fetch { root, batch, provider, pieces } => {
                    host.asked.push((self.now, provider, pieces.clone()));
                    let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
                    assert!(bytes <= BATCH_BYTES);
                    let provider = usize::from(provider.0[0]);
                    let from = &mut self.hosts[provider];
                    // Ten megabytes a second.
                    from.busy = from.busy.max(self.now) + Duration::from_nanos(100 * bytes);
                    let hangs = if from.manner == Manner::Hangs { ms(20_000) } else { Duration::ZERO };
                    let wait = from.busy.since(self.now) + wait + hangs;
                    self.later(at, wait, Due::Fetched { root, batch, provider, pieces, asked: self.now });
                }
            }
        }
    }

    fn deliver(&mut self, at: usize, due: Due) {
        match due {
            Due::Surveyed(root) => {
                let survey = self.survey(at, root);
                self.on(at, |exchange, now, rng| exchange.surveyed(root, Ok(survey), now, rng));
            }
            Due::Fetched { root, batch, provider, pieces, asked } => {
                let result = self.fetched(at, provider, &pieces, asked);
                self.on(at, |exchange, now, rng| exchange.fetched(root, batch, result, now, rng));
            }
            Due::Message(from, Message::BitfieldRequest { root }) => {
                let complete = self.has(at, root);
                let Survey { present, contents, .. } = self.survey(at, root);
                let mut bits = Bitfield::default();
                present.iter().enumerate().filter(|(_, here)| **here && contents).for_each(|(at, _)| bits.set(at));
                let bits = self.hosts[at].exchange.bitfield(&root).unwrap_or(&bits).as_bytes().to_vec();
                let (to, wait) = (usize::from(from.0[0]), ms(self.rng.u64(1..20)));
                self.later(to, wait, Due::Message(node(at), Message::Bitfield { root, bits, complete }));
            }
            Due::Message(from, Message::Bitfield { root, bits, complete }) => {
                self.on(at, |exchange, now, rng| exchange.bitfield_from(from, &root, bits, complete, now, rng));
            }
            Due::Message(_, other) => panic!("{other:?}"),
        }
    }

    /// The image's list first, then its contents.
    fn survey(&self, at: usize, root: ChunkId) -> Survey {
        let contents = self.hosts[at].kept.contains(&root);
        let pieces = if contents { self::contents(root) } else { vec![Piece { chunk: root, len: 4096 }] };
        let present = pieces.iter().map(|piece| self.hosts[at].kept.contains(&piece.chunk)).collect();
        Survey { complete: self.has(at, root), contents, pieces, present }
    }

    fn fetched(&mut self, at: usize, provider: usize, pieces: &[Piece], asked: Instant) -> Fetched {
        let mut result = Fetched { got: Vec::new(), bytes: 0, elapsed: self.now.since(asked), fault: None };
        for piece in pieces {
            result.fault = match (self.hosts[provider].manner, self.hosts[at].manner) {
                (_, Manner::DiskFull) => Some(FetchFault::Storage("no space left".to_owned())),
                (Manner::Away, _) => Some(FetchFault::Unreachable("no route".to_owned())),
                (Manner::Lies, _) => Some(FetchFault::WrongChunk(piece.chunk)),
                _ if self.hosts[provider].kept.contains(&piece.chunk) => None,
                _ => Some(FetchFault::Missing(piece.chunk)),
            };
            if result.fault.is_some() {
                break;
            }
            result.got.push(piece.chunk);
            result.bytes += u64::from(piece.len);
            self.hosts[provider].served += 1;
        }
        self.hosts[at].kept.extend(&result.got);
        result
    }

    fn want(&mut self, at: usize, root: ChunkId, need: Need) {
        self.on(at, |exchange, now, _| exchange.want(root, need, now));
    }

    /// Tells everybody who has what, as the catalog does.
    fn tell(&mut self) {
        for at in 0..self.hosts.len() {
            let wanted: Vec<ChunkId> = self.hosts[at].exchange.downloads().map(|(root, _)| *root).collect();
            for root in wanted {
                let others = (0..self.hosts.len()).filter(|other| *other != at);
                let some = |other: &usize| self.hosts[*other].kept.contains(&root);
                let providers: Vec<_> = others.filter(some).map(|other| (node(other), self.has(other, root))).collect();
                self.on(at, |exchange, now, rng| exchange.set_providers(&root, &providers, now, rng));
            }
        }
    }

    /// Whether `condition` came true within `limit`; news of who has what come each second.
    fn run_until(&mut self, limit: Duration, condition: impl Fn(&Mesh) -> bool) -> bool {
        let (end, mut news) = (self.now + limit, self.now);
        while !condition(self) {
            let due = self.due.keys().next().copied();
            let timer = self.hosts.iter().filter_map(|host| host.exchange.poll_timeout()).min();
            let next = [due.map(|(at, _)| at), timer, Some(news)].into_iter().flatten().min().unwrap();
            if next > end {
                return false;
            }
            self.now = next;
            if next == news {
                news = news + ms(1000);
                self.tell();
            } else if let Some((to, what)) = due.filter(|(at, _)| *at == next).and_then(|id| self.due.remove(&id)) {
                self.deliver(to, what);
            } else {
                for at in 0..self.hosts.len() {
                    self.on(at, |exchange, now, rng| exchange.handle_timeout(now, rng));
                    assert!(self.hosts[at].exchange.poll_timeout().is_none_or(|at| at > next), "what was due is done");
                }
            }
        }
        true
    }

    fn gets(&mut self, limit: Duration) -> bool {
        self.want(0, image(0), Need::Use);
        self.run_until(limit, |mesh| mesh.hosts[0].complete == [image(0)])
    }
}

#[test]
fn two_providers_that_have_everything_are_both_used() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    assert!(mesh.gets(ms(2000)));
    let (one, two) = (mesh.hosts[1].served, mesh.hosts[2].served);
    assert!(one.min(two) > PIECES / 3, "{one} and {two}");
    assert_eq!(one + two, PIECES + 1, "nothing comes twice");
    assert_eq!(mesh.hosts[0].exchange.poll_timeout(), None);
}

#[test]
fn providers_with_a_part_each_complement_one_another() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    for (at, lacks) in [(1, 0..30), (2, 30..PIECES)] {
        contents(image(0))[lacks].iter().for_each(|piece| _ = mesh.hosts[at].kept.remove(&piece.chunk));
    }
    mesh.loss = 0.2;
    assert!(mesh.gets(ms(5000)));
    assert_eq!(mesh.hosts[1].served + mesh.hosts[2].served, PIECES + 1);
    assert!(mesh.hosts[0].failed.is_empty());
}

#[test]
fn who_lies_is_told_of_and_not_asked_again() {
    for seed in 0..10 {
        let mut mesh = Mesh::new(&[Manner::Honest, Manner::Lies, Manner::Honest, Manner::Lies], seed);
        assert!(mesh.gets(ms(3000)), "seed {seed}");
        let host = &mesh.hosts[0];
        for liar in [node(1), node(3)] {
            assert!(host.asked.iter().filter(|(_, provider, _)| *provider == liar).count() <= PER_PROVIDER);
            assert!(host.lied.contains(&liar), "seed {seed}");
        }
    }
    let mut mesh = Mesh::new(&[Manner::Honest, Manner::Lies, Manner::Lies], 1);
    assert!(!mesh.gets(ms(1000)));
    let [(root, reason)] = &mesh.hosts[0].failed[..] else { panic!("nobody else is left") };
    assert_eq!(*root, image(0));
    assert!(reason.starts_with("every node that has it sent wrong bytes"), "{reason}");
}

#[test]
fn who_is_away_rests_and_is_asked_again() {
    let mut mesh = Mesh::new(&[Manner::Honest, Manner::Away], 1);
    assert!(!mesh.gets(ms(7500)));
    let asked: Vec<Instant> = mesh.hosts[0].asked.iter().map(|(at, ..)| *at).collect();
    assert!(asked.len() > 1 && asked.windows(2).all(|two| two[1].since(two[0]) >= REST), "{asked:?}");
    mesh.hosts[1].manner = Manner::Honest;
    assert!(mesh.gets(REST + LOOK + ms(1000)), "asked for again, it is the same download");
}

#[test]
fn without_anything_for_a_minute_it_has_failed_and_may_be_wanted_again() {
    for manners in [&[Manner::Honest, Manner::Away][..], &[Manner::Honest]] {
        let mut mesh = Mesh::new(manners, 1);
        assert!(!mesh.gets(GIVE_UP - ms(1)));
        assert!(mesh.hosts[0].failed.is_empty());
        assert!(mesh.run_until(REST + LOOK, |mesh| !mesh.hosts[0].failed.is_empty()));
        assert!(mesh.hosts[0].exchange.failure(&image(0)).is_some());
        mesh.want(0, image(0), Need::Copy);
        assert_eq!(mesh.hosts[0].exchange.failure(&image(0)), None);
    }
}

#[test]
fn what_cannot_be_kept_fails_at_once() {
    let mut mesh = Mesh::new(&[Manner::DiskFull, Manner::Honest, Manner::Honest], 1);
    assert!(!mesh.gets(ms(100)));
    assert_eq!(mesh.hosts[0].failed, [(image(0), "no space left".to_owned())]);
    assert_eq!(mesh.hosts[0].exchange.downloads().count(), 0);
}

#[test]
fn what_hangs_at_the_end_is_asked_for_elsewhere_too() {
    for seed in 0..10 {
        let mut mesh = Mesh::new(&[Manner::Honest, Manner::Hangs, Manner::Honest], seed);
        assert!(mesh.gets(ms(5000)), "seed {seed}");
        let asked: usize = mesh.hosts[0].asked.iter().map(|(_, _, pieces)| pieces.len()).sum();
        assert!(asked > PIECES + 1 && asked <= 2 * (PIECES + 1), "seed {seed}: {asked}");
        // The late answers change nothing.
        assert!(!mesh.run_until(ms(30_000), |mesh| mesh.hosts[0].complete.len() > 1));
    }
}

#[test]
fn what_is_used_takes_the_place_of_a_copy_which_goes_on_later() {
    let mut mesh = Mesh::new(&[Manner::Honest; 3], 1);
    let most = MAX_DOWNLOADS as u8;
    for at in 1..3 {
        mesh.hosts[at].kept = (0..most + 3).map(image).flat_map(everything).collect();
    }
    (0..=most).for_each(|n| mesh.want(0, image(n), Need::Copy));
    assert!(mesh.hosts[0].exchange.is_waiting(&image(most)));
    // What is to be used after all keeps its place.
    mesh.want(0, image(0), Need::Use);
    assert!(!mesh.run_until(ms(100), |mesh| !mesh.hosts[0].complete.is_empty()));
    mesh.want(0, image(most + 1), Need::Use);
    assert!(mesh.hosts[0].exchange.waiting.iter().map(|(root, _)| *root).eq([most, 1].map(image)));
    (2..most).for_each(|n| mesh.want(0, image(n), Need::Use));
    mesh.want(0, image(most + 2), Need::Use);
    // There is no copy left to make room, so it is the next.
    assert!(mesh.hosts[0].exchange.waiting.iter().map(|(root, _)| *root).eq([most + 2, most, 1].map(image)));
    assert!(mesh.run_until(ms(60_000), |mesh| mesh.hosts[0].complete.len() == MAX_DOWNLOADS + 3));
    assert!(mesh.hosts[0].failed.is_empty());
}

#[test]
fn those_who_receive_an_image_pass_it_on() {
    for seed in 0..5 {
        let mut mesh = Mesh::swarm(&[Manner::Honest; 9], seed);
        (1..9).for_each(|at| mesh.want(at, image(0), Need::Copy));
        assert!(mesh.run_until(ms(20_000), Mesh::all_have_it), "seed {seed}");
        assert!(mesh.hosts[0].served < 8 * PIECES * 2 / 3, "seed {seed}: the first served {}", mesh.hosts[0].served);
    }
}

#[test]
fn whoever_lies_hangs_or_goes_away_all_others_get_the_image_whole() {
    for seed in 0..100 {
        let mut rng = Rng::with_seed(seed);
        let mut manners = vec![Manner::Honest; rng.usize(2..10)];
        manners[1..].iter_mut().filter(|_| rng.u8(..4) == 0).for_each(|manner| *manner = Manner::Lies);
        let mut mesh = Mesh::swarm(&manners, seed);
        mesh.loss = rng.f64() * 0.3;
        for _ in 0..10 {
            let at = rng.usize(..manners.len());
            if manners[at] == Manner::Honest {
                mesh.hosts[at].manner = [Manner::Honest, Manner::Away, Manner::Hangs][rng.usize(..3)];
                mesh.want(at, image(0), Need::Copy);
            }
            mesh.run_until(ms(rng.u64(..2000)), |_| false);
        }
        for (at, manner) in manners.iter().enumerate() {
            mesh.hosts[at].manner = *manner;
            if *manner == Manner::Honest && !mesh.has(at, image(0)) {
                mesh.want(at, image(0), Need::Use);
            }
        }
        assert!(mesh.run_until(ms(120_000), Mesh::all_have_it), "seed {seed}");
        for host in &mesh.hosts {
            assert_eq!(host.failed, [], "seed {seed}");
            assert!(host.lied.iter().all(|liar| manners[usize::from(liar.0[0])] == Manner::Lies), "seed {seed}");
            let liars = manners.iter().filter(|manner| **manner == Manner::Lies).count();
            assert!(host.lied.len() <= PER_PROVIDER * liars, "seed {seed}: not asked again");
        }
    }
}

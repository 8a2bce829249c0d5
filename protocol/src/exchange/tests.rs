//! Nodes in memory that pass images on: virtual time, links of one speed, providers that lie, hang or are away.

mod transfers;

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

/// The first image of 256 MiB.
const LARGE: u8 = 200;

fn contents(root: ChunkId) -> Vec<Piece> {
    let chunk = |at: usize| {
        let mut id = root;
        id.0[29..].copy_from_slice(&[255, (at >> 8) as u8, at as u8]);
        id
    };
    let (pieces, len) = if root.0[0] >= LARGE { (1024, 262_144) } else { (PIECES, 65_536) };
    (0..pieces).map(|at| Piece { chunk: chunk(at), len }).collect()
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
    /// Says that it has what it has not.
    Boasts,
    /// The same, and gives nothing for as long as a batch may take.
    Traps,
    /// Gives and takes a tenth of what others do.
    Slow,
}

struct Host {
    exchange: Exchange,
    manner: Manner,
    kept: BTreeSet<ChunkId>,
    served: usize,
    /// When what it was asked for so far has been sent.
    busy: Instant,
    /// When what it asked for so far has come.
    receives: Instant,
    asked: Vec<(Instant, NodeId, Vec<Piece>)>,
    given: BTreeMap<ChunkId, Bitfield>,
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
        let host = |(at, manner): (usize, &Manner)| Host {
            exchange: Exchange::new(node(at)),
            manner: *manner,
            kept: everything(image(0)).collect(),
            served: 0,
            given: BTreeMap::new(),
            busy: Instant::ZERO,
            receives: Instant::ZERO,
            asked: Vec::new(),
            complete: Vec::new(),
            failed: Vec::new(),
            lied: Vec::new(),
        };
        let mut hosts: Vec<Host> = manners.iter().enumerate().map(host).collect();
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
                Action::Failed { root, reason, .. } => host.failed.push((root, reason)),
                Action::Listed(_) | Action::Faulty(..) => {}
                Action::Lied(provider, _) => host.lied.push(provider),
                Action::Measured(bytes, _) => assert!(bytes > 0),
                Action::Survey(root) => self.later(at, wait, Due::Surveyed(root)),
                // What is on its way comes.
                Action::Cancel { .. } => {}
                Action::Send(to, message) => {
                    if self.rng.f64() >= self.loss {
                        self.later(usize::from(to.0[0]), wait, Due::Message(node(at), message));
                    }
                }
                Action::Fetch { root, batch, provider, pieces, at: places } => {
                    host.asked.push((self.now, provider, pieces.clone()));
                    let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
                    assert!(bytes <= BATCH_BYTES);
                    let provider = usize::from(provider.0[0]);
                    let from = &mut self.hosts[provider];
                    let given = from.given.entry(root).or_default();
                    places.iter().for_each(|at| given.set(*at as usize));
                    // Ten megabytes a second, out of one and into the other.
                    let takes = Duration::from_nanos(100 * bytes);
                    let pace = |manner| if manner == Manner::Slow { 10 } else { 1 };
                    from.busy = from.busy.max(self.now) + takes * pace(from.manner);
                    let hangs = match from.manner {
                        Manner::Hangs => ms(20_000),
                        Manner::Traps => ms(120_000),
                        _ => Duration::ZERO,
                    };
                    let sent = from.busy + hangs;
                    let to = &mut self.hosts[at];
                    to.receives = to.receives.max(self.now) + takes * pace(to.manner);
                    let wait = to.receives.max(sent).since(self.now) + wait;
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
                let mut result = self.fetched(at, provider, &pieces, asked);
                if !matches!(result.fault, Some(FetchFault::Unreachable(_))) {
                    let given = || self.hosts[provider].given.get(&root).map(Bitfield::to_bytes);
                    result.has = self.says(provider, root).or_else(given).filter(|bits| bits.len() <= 2048);
                }
                self.on(at, |exchange, now, rng| exchange.fetched(root, batch, result, now, rng));
            }
            Due::Message(from, Message::BitfieldRequest { root, bits }) => {
                if let Some(bits) = bits {
                    self.on(at, |exchange, now, rng| exchange.bitfield_from(from, &root, &bits, false, now, rng));
                }
                let complete = self.has(at, root);
                let Survey { present, contents, .. } = self.survey(at, root);
                let mut bits = Bitfield::default();
                present.iter().enumerate().filter(|(_, here)| **here && contents).for_each(|(at, _)| bits.set(at));
                let bits = self.says(at, root).unwrap_or(bits.to_bytes());
                let (to, wait) = (usize::from(from.0[0]), ms(self.rng.u64(1..20)));
                self.later(to, wait, Due::Message(node(at), Message::Bitfield { root, bits, complete }));
            }
            Due::Message(from, Message::Bitfield { root, bits, complete }) => {
                self.on(at, |exchange, now, rng| exchange.bitfield_from(from, &root, &bits, complete, now, rng));
            }
            Due::Message(_, other) => panic!("{other:?}"),
        }
    }

    /// What it says that it has of an image that is still coming.
    fn says(&self, at: usize, root: ChunkId) -> Option<Vec<u8>> {
        match self.hosts[at].manner {
            Manner::Boasts | Manner::Traps => Some(vec![0xff; MAX_PIECES / 8 + 1]),
            _ => self.hosts[at].exchange.bitfield(&root).map(Bitfield::to_bytes),
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
        let mut result = Fetched { got: Vec::new(), bytes: 0, elapsed: self.now.since(asked), has: None, fault: None };
        for piece in pieces {
            result.fault = match (self.hosts[provider].manner, self.hosts[at].manner) {
                (_, Manner::DiskFull) => Some(FetchFault::Storage("no space left".to_owned())),
                (Manner::Away, _) => Some(FetchFault::Unreachable("no route".to_owned())),
                (Manner::Lies, _) => Some(FetchFault::WrongChunk(piece.chunk)),
                (Manner::Boasts | Manner::Traps, _) => Some(FetchFault::Missing(piece.chunk)),
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
                let fetches = |host: &Host| host.exchange.downloads().any(|(other, _)| *other == root);
                let some = |other: &usize| self.hosts[*other].kept.contains(&root) || fetches(&self.hosts[*other]);
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
            self.now = self.now.max(next);
            if next == news {
                news = news + ms(1000);
                self.tell();
            } else if let Some((to, what)) = due.filter(|(at, _)| *at == next).and_then(|id| self.due.remove(&id)) {
                self.deliver(to, what);
            } else {
                for at in 0..self.hosts.len() {
                    self.on(at, |exchange, now, rng| exchange.handle_timeout(now, rng));
                    assert!(
                        self.hosts[at].exchange.poll_timeout().is_none_or(|at| at > self.now),
                        "what was due is done"
                    );
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
fn what_somebody_waits_for_comes_before_everything_else() {
    let mut mesh = Mesh::new(&[Manner::Honest; 2], 7);
    mesh.hosts[1].kept.extend(everything(image(LARGE)));
    mesh.want(0, image(LARGE), Need::Use);
    assert!(mesh.run_until(ms(60_000), |mesh| mesh.hosts[0].exchange.is_listed(&image(LARGE))));
    let wanted: Vec<ChunkId> = contents(image(LARGE)).iter().rev().take(8).map(|piece| piece.chunk).collect();
    let here = |mesh: &Mesh| wanted.iter().all(|chunk| mesh.hosts[0].kept.contains(chunk));
    let before = mesh.hosts[0].kept.len();
    mesh.on(0, |exchange, now, rng| exchange.demand(&image(LARGE), &wanted, now, rng));
    assert!(mesh.run_until(ms(60_000), here));
    let besides = mesh.hosts[0].kept.len() - before - wanted.len();
    assert!(besides <= 8 * MAX_BATCHES, "{besides} others came first: only what was in flight may");
    // Whoever demands without end does not keep the image from being whole.
    let begun = mesh.now;
    while mesh.hosts[0].complete.is_empty() {
        assert!(mesh.now.since(begun) < MAX_QUIET * 3, "it never gets whole");
        mesh.on(0, |exchange, now, rng| exchange.demand(&image(LARGE), &wanted, now, rng));
        let until = mesh.now + ms(300);
        mesh.run_until(ms(300), |mesh| !mesh.hosts[0].complete.is_empty());
        mesh.now = mesh.now.max(until);
    }
}

/// One that has all, one that is to have it within `limit`, and two that receive too, and boast of every piece, and of more than
/// there are.
fn is_not_held_up(boasters: Manner, limit: Duration) {
    for seed in 0..10 {
        let mut mesh = Mesh::swarm(&[Manner::Honest, Manner::Honest, boasters, boasters], seed);
        mesh.hosts[2..].iter_mut().for_each(|host| host.kept = [image(0)].into());
        for at in 1..4 {
            mesh.want(at, image(0), Need::Use);
        }
        assert!(mesh.run_until(limit, |mesh| mesh.has(1, image(0))), "seed {seed}");
    }
}

#[test]
fn who_says_that_it_has_what_it_has_not_holds_nobody_up() {
    is_not_held_up(Manner::Boasts, ms(60_000));
}

#[test]
fn who_says_that_it_has_what_it_has_not_and_hangs_holds_nobody_up() {
    is_not_held_up(Manner::Traps, ms(20_000));
}

#[test]
fn who_has_everything_is_asked_for_it_where_others_are_slow() {
    for seed in 0..3 {
        let mut mesh = Mesh::swarm(&[Manner::Honest, Manner::Honest, Manner::Slow], seed);
        mesh.hosts[0].kept = everything(image(LARGE)).collect();
        (1..3).for_each(|at| mesh.want(at, image(LARGE), Need::Use));
        // It takes 27 s at the least.
        assert!(mesh.run_until(ms(35_000), |mesh| mesh.has(1, image(LARGE))), "seed {seed}");
    }
}

/// The exchange of a node that has nothing of an image but what names its contents.
fn begun(root: ChunkId, providers: &[(NodeId, bool)], now: Instant, rng: &mut Rng) -> Exchange {
    let mut exchange = Exchange::new(node(0));
    exchange.want(root, Need::Use, now);
    let pieces = contents(root);
    let survey = Survey { complete: false, contents: true, present: vec![false; pieces.len()], pieces };
    exchange.surveyed(root, Ok(survey), now, rng);
    exchange.set_providers(&root, providers, now, rng);
    exchange
}

/// The batches that it asks a provider for now, and where their pieces are in the list of its contents.
fn asked(exchange: &mut Exchange, of: NodeId) -> Vec<(u64, Vec<u32>)> {
    let fetches = exchange.take_actions().into_iter().filter_map(|action| match action {
        Action::Fetch { root, batch, provider, pieces, at } if provider == of => {
            assert!(pieces.into_iter().eq(at.iter().map(|at| contents(root)[*at as usize])), "these are those");
            Some((batch, at))
        }
        _ => None,
    });
    fetches.collect()
}

#[test]
fn what_a_provider_tells_behind_a_batch_is_fetched_without_asking() {
    let (root, provider, now, mut rng) = (image(0), node(1), Instant::ZERO, Rng::with_seed(1));
    let mut exchange = begun(root, &[(provider, false)], now, &mut rng);
    exchange.bitfield_from(provider, &root, &[0b1], false, now, &mut rng);
    let first = asked(&mut exchange, provider);
    let [(batch, wanted)] = &first[..] else { panic!("one batch: {first:?}") };
    assert_eq!(wanted[..], [0]);
    // While that was written it has said more.
    exchange.bitfield_from(provider, &root, &[0b101], false, now, &mut rng);
    let got = vec![contents(root)[0].chunk];
    let told = Fetched { got, bytes: 65_536, elapsed: ms(10), has: Some(vec![0b11]), fault: None };
    exchange.fetched(root, *batch, told, now, &mut rng);
    let mut second: Vec<u32> = asked(&mut exchange, provider).into_iter().flat_map(|(_, at)| at).collect();
    second.sort();
    assert_eq!(second, [1, 2]);
    let has = &exchange.downloads[&root].providers[&provider].has;
    assert!((0..3).all(|at| has.has(at)), "a batch takes nothing back");
}

#[test]
fn what_others_were_given_is_not_asked_of_the_first_while_they_are() {
    let (root, first, mut now, mut rng) = (image(LARGE), node(1), Instant::ZERO + ms(10_000), Rng::with_seed(1));
    let pieces = contents(root);
    let mut exchange = begun(root, &[(first, true), (node(2), false)], now, &mut rng);
    let share = exchange.downloads[&root].share.clone();
    let (own, mut others): (Vec<usize>, Vec<usize>) = (0..pieces.len()).partition(|at| share.has(*at));
    let mut given = Bitfield::default();
    let told = |at: &[u32], given: &mut Bitfield| {
        at.iter().for_each(|at| given.set(*at as usize));
        let got = at.iter().map(|at| pieces[*at as usize].chunk).collect();
        Fetched { got, bytes: 262_144, elapsed: ms(10), has: Some(given.to_bytes()), fault: None }
    };
    let mut batches = asked(&mut exchange, first);
    assert_eq!(batches.len(), PER_PROVIDER, "it has given nothing yet");
    let (batch, at) = batches.remove(0);
    exchange.fetched(root, batch, told(&at, &mut given), now, &mut rng);
    batches.extend(asked(&mut exchange, first));
    // The other receiver takes most of this node's share, which it takes for slow, and goes on with its own.
    let taken = own.len() * 3 / 4;
    own[..taken].iter().for_each(|at| given.set(*at));
    while let Some((batch, at)) = batches.pop() {
        others.drain(..(2 * at.len()).min(others.len())).for_each(|at| given.set(at));
        exchange.fetched(root, batch, told(&at, &mut given), now, &mut rng);
        let next = asked(&mut exchange, first);
        let unknown = |at: &u32| share.has(*at as usize) && !given.has(*at as usize);
        assert!(next.iter().flat_map(|(_, at)| at).all(unknown), "{next:?}");
        batches.extend(next);
    }
    let rest = own.iter().filter(|at| !exchange.downloads[&root].have.has(**at)).count();
    assert!(rest.abs_diff(taken) <= 2 * PER_PROVIDER, "{rest} of {} are for the other to give", own.len());
    // A batch now and then tells how it goes on; and where nobody else asks, the first is asked for all that nobody has.
    now = now + BELIEVED;
    exchange.handle_timeout(now, &mut rng);
    let mut batches = asked(&mut exchange, first);
    while let Some((batch, at)) = batches.pop() {
        exchange.fetched(root, batch, told(&at, &mut given), now, &mut rng);
        batches.extend(asked(&mut exchange, first));
    }
    assert!(given.is_full(pieces.len()));
}

#[test]
fn what_was_given_before_or_in_vain_or_is_taken_back_tells_nothing() {
    let (root, first, now, mut rng) = (image(LARGE), node(1), Instant::ZERO + ms(10_000), Rng::with_seed(1));
    let mut exchange = begun(root, &[(first, true), (node(2), false)], now, &mut rng);
    let share = exchange.downloads[&root].share.clone();
    let mut batches = asked(&mut exchange, first);
    let is_asked = |at: &u32| batches.iter().any(|(_, asked)| asked.contains(at));
    let own: Vec<u32> = (0..1024).filter(|at| share.has(*at as usize) && !is_asked(at)).collect();
    let (earlier, meanwhile) = (&own[..20], &own[20..30]);
    let mut report = |given: &[&[u32]], comes: bool| -> Vec<u32> {
        let (batch, at) = batches.pop().unwrap();
        let mut bits = Bitfield::default();
        given.iter().copied().chain([&at[..]]).flatten().for_each(|at| bits.set(*at as usize));
        let got = at.iter().filter(|_| comes).map(|at| contents(root)[*at as usize].chunk).collect();
        let fault = (!comes).then(|| FetchFault::Unreachable("it went".to_owned()));
        let told = Fetched { got, bytes: 262_144, elapsed: ms(10), has: Some(bits.to_bytes()), fault };
        exchange.fetched(root, batch, told, now, &mut rng);
        batches.extend(asked(&mut exchange, first));
        let Download { partly, have, .. } = &exchange.downloads[&root];
        (0..1024).filter(|at| partly[*at as usize] > 0 && !have.has(*at as usize)).collect::<Vec<u32>>()
    };
    assert!(report(&[earlier], true).is_empty());
    assert_eq!(report(&[earlier, meanwhile], true), meanwhile);
    // One that says less may be older than the one before; two are not.
    assert_eq!(report(&[earlier], true), meanwhile);
    assert!(report(&[earlier], true).is_empty());
    assert_eq!(report(&[earlier, meanwhile], false), meanwhile);
}

#[test]
fn the_only_provider_has_more_batches_until_somebody_waits() {
    let flight = |mesh: &Mesh| mesh.hosts[0].exchange.downloads[&image(LARGE)].batches.len();
    for (providers, most) in [(1, WITH_THE_ONLY_ONE), (2, 2 * PER_PROVIDER)] {
        let mut mesh = Mesh::new(&vec![Manner::Honest; providers + 1], 3);
        mesh.hosts[1..].iter_mut().for_each(|host| host.kept.extend(everything(image(LARGE))));
        mesh.want(0, image(LARGE), Need::Use);
        mesh.run_until(ms(5000), |_| false);
        assert_eq!(flight(&mesh), most, "{providers} providers");
        let last = contents(image(LARGE)).last().map(|piece| piece.chunk).into_iter().collect::<Vec<_>>();
        mesh.on(0, |exchange, now, rng| exchange.demand(&image(LARGE), &last, now, rng));
        mesh.run_until(ms(5000), |_| false);
        assert_eq!(flight(&mesh), providers * PER_PROVIDER, "{providers} providers, and somebody waits");
    }
}

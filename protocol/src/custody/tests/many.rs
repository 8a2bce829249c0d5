//! Custodians that each have their own view: news come late and out of order.

use super::*;

enum News {
    Fact(Arc<Fact>),
    Down(NodeId),
}

/// One custodian with its own view.
struct Host {
    custody: Custody,
    catalog: Catalog,
    live: BTreeSet<NodeId>,
    /// What has not come to it yet.
    news: Vec<News>,
    /// What the auction it holds is about.
    auction: Vec<Missing>,
}

struct Mesh {
    now: Instant,
    author: Author,
    hosts: BTreeMap<usize, Host>,
    rng: Rng,
    auctions: u32,
}

impl Mesh {
    fn new(count: u8, seed: u64) -> Mesh {
        let mut author = Author::new(count);
        let known = author.catalog(4, 1, 0);
        let mut hosts = BTreeMap::new();
        for at in 0..usize::from(count) {
            let mut catalog = Catalog::new(mesh_of(&author.id(0)), None);
            for (_, entry) in known.iter() {
                catalog.offer(Arc::clone(&entry.fact), WALL).unwrap();
            }
            let (custody, live) = (Custody::default(), author.ids());
            hosts.insert(at, Host { custody, catalog, live, news: Vec::new(), auction: Vec::new() });
        }
        Mesh { now: Instant::ZERO, author, hosts, rng: Rng::with_seed(seed), auctions: 0 }
    }

    fn publish(&mut self, at: usize, fact: &Arc<Fact>) {
        self.hosts.get_mut(&at).unwrap().catalog.offer(Arc::clone(fact), WALL).unwrap();
        self.hosts.values_mut().for_each(|host| host.news.push(News::Fact(Arc::clone(fact))));
    }

    /// A tenth of a second, in which each node hears some of what it has not heard yet.
    fn tick(&mut self) {
        self.now = self.now + ms(100);
        for at in self.hosts.keys().copied().collect::<Vec<usize>>() {
            let host = self.hosts.get_mut(&at).unwrap();
            self.rng.shuffle(&mut host.news);
            for news in host.news.split_off(self.rng.usize(..=host.news.len())) {
                match news {
                    News::Fact(fact) => _ = host.catalog.offer(fact, WALL).unwrap(),
                    News::Down(node) => _ = host.live.remove(&node),
                }
            }
            host.custody.handle_timeout(self.now);
            let ended = if self.rng.u8(..3) == 0 { std::mem::take(&mut host.auction) } else { Vec::new() };
            if let Some(replica) = self.beaten(at) {
                let key = Key::Placement(self.author.id(at), web(), replica);
                let gone = self.author.sign(at, key, &Body::Gone);
                self.publish(at, &gone);
            }
            for Missing { replica, epoch, .. } in ended {
                let winner = self.rng.choice(self.hosts.keys().copied().collect::<Vec<usize>>()).unwrap();
                let placed = self.author.placement(winner, replica, epoch, PlacementState::Running, false);
                self.publish(winner, &placed);
                // The verdict came first.
                self.publish(at, &placed);
            }
            self.look_after(at);
        }
    }

    /// A replica here that another node holds with more right.
    fn beaten(&self, at: usize) -> Option<u32> {
        let (me, host) = (self.author.id(at), &self.hosts[&at]);
        let standing: Vec<Placement<'_>> = host.catalog.placements_of(&web()).collect();
        let beats = |own: &Placement<'_>, other: &Placement<'_>| {
            other.replica == own.replica
                && host.live.contains(&other.node)
                && keeps((other.fact.epoch, other.node), (own.fact.epoch, me))
        };
        let own = standing.iter().find(|own| own.node == me && standing.iter().any(|other| beats(own, other)));
        own.map(|own| own.replica)
    }

    /// As a node does: the first custodian holds an auction for what is missing.
    fn look_after(&mut self, at: usize) {
        let (me, host) = (self.author.id(at), self.hosts.get_mut(&at).unwrap());
        host.custody.take_dirty();
        let wanted = host.catalog.workload(&web()).unwrap();
        let mut missing = missing(&wanted, &host.catalog, |node| host.live.contains(node), WALL);
        missing.retain(|missing| host.auction.iter().all(|held| held.replica != missing.replica));
        if missing.is_empty() || first(&web(), host.live.iter().copied()) != Some(me) {
            return host.custody.settled(&web());
        }
        let urgent = missing.iter().any(|missing| matches!(missing.cause, Cause::NodeDown(_)));
        if host.custody.is_due(web(), urgent, self.now) {
            host.auction.extend(missing);
            self.auctions += 1;
        }
    }
}

#[test]
fn custodians_that_die_and_disagree_leave_each_replica_running_once() {
    for seed in 0..20 {
        let mut mesh = Mesh::new(8, seed);
        (0..20).for_each(|_| mesh.tick());
        assert_eq!(mesh.auctions, 0, "seed {seed}: the submitter's own auction is waited for");
        for _ in 0..5 {
            // The first custodian, in the middle of whatever it is doing.
            (0..mesh.rng.u32(..30)).for_each(|_| mesh.tick());
            let rank = |at: &usize| rank(&web(), &mesh.author.id(*at));
            let dead = mesh.hosts.keys().copied().max_by_key(rank).unwrap();
            mesh.hosts.remove(&dead);
            let id = mesh.author.id(dead);
            mesh.hosts.values_mut().for_each(|host| host.news.push(News::Down(id)));
        }
        (0..100).for_each(|_| mesh.tick());
        for host in mesh.hosts.values() {
            assert_eq!(missing_in(&host.catalog, &host.live), [], "seed {seed}");
            let web = web();
            let running = host.catalog.placements_of(&web).filter(|one| host.live.contains(&one.node));
            assert_eq!(running.count(), 4, "seed {seed}");
            assert_eq!(host.custody.poll_timeout(), None, "seed {seed}: nothing is waited for");
        }
    }
}

//! The rule of who acts, what is missing, and how long is waited; and custodians in memory that follow it.

mod many;

use std::sync::Arc;

use ed25519_dalek::SigningKey;
use fastrand::Rng;

use super::*;
use crate::auction::Award;
use crate::catalog::{Body, Clock, Fact, Key, NodeFact, PlacementFact, Rollout, WorkloadFact};
use crate::time::UnixMillis;
use crate::trust::{Chain, mesh_of, node_of};
use crate::worker::ExitStatus;
use crate::workload::{PlacementId, Resources, SignedSpec, tests::spec};

const WALL: UnixMillis = UnixMillis(1_800_000_000_000);
const EXITED: PlacementState = PlacementState::Exited(ExitStatus { code: 0, out_of_memory: false });

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn ids(count: u64) -> Vec<NodeId> {
    (0..count).map(|n| NodeId(*blake3::hash(&n.to_be_bytes()).as_bytes())).collect()
}

fn workload(n: u64) -> WorkloadId {
    WorkloadId(u128::from(n).to_be_bytes())
}

/// Writes the facts that custodians judge by.
struct Author {
    keys: Vec<SigningKey>,
    clock: Clock,
    /// Of the placements it writes.
    form: u64,
}

impl Author {
    fn new(count: u8) -> Author {
        let keys: Vec<SigningKey> = (1..=count).map(|n| SigningKey::from_bytes(&[n; 32])).collect();
        let mut author = Author { keys, clock: Clock::default(), form: 0 };
        author.form = crate::catalog::form(&author.signed());
        author
    }

    fn id(&self, at: usize) -> NodeId {
        node_of(&self.keys[at])
    }

    fn signed(&self) -> SignedSpec {
        SignedSpec::sign(&spec("web"), &self.keys[0], self.chain(0), WALL.as_secs()).unwrap()
    }

    fn ids(&self) -> BTreeSet<NodeId> {
        self.keys.iter().map(node_of).collect()
    }

    fn chain(&self, at: usize) -> Chain {
        Chain::root(&self.keys[0], self.id(at), WALL.as_secs(), 1000)
    }

    fn sign(&mut self, at: usize, key: Key, body: &Body) -> Arc<Fact> {
        Arc::new(Fact::sign(key, self.clock.stamp(WALL), body, &self.keys[at]))
    }

    /// A catalog in which every node has reported itself and `replicas` are wanted.
    fn catalog(&mut self, replicas: u32, generation: u64, revived: u64) -> Catalog {
        let mut catalog = Catalog::new(mesh_of(&self.id(0)), None);
        for at in 0..self.keys.len() {
            let fact = NodeFact {
                name: format!("n{at}"),
                version: String::new(),
                capacity: Resources::default(),
                labels: BTreeMap::new(),
                data: Vec::new(),
                images: Vec::new(),
                unnamed: Vec::new(),
                fetching: Vec::new(),
                chain: self.chain(at),
                vouch: crate::catalog::vouch(&self.keys[at], &self.chain(at)),
            };
            let report = self.sign(at, Key::Node(self.id(at)), &Body::Node(fact));
            catalog.offer(report, WALL).unwrap();
        }
        let spec = self.signed();
        let (previous, setback, seats) = (None, String::new(), None);
        let (author, rollout, removed) = (self.chain(0), Rollout::default(), false);
        let fact =
            WorkloadFact { spec, generation, revived, replicas, removed, previous, rollout, setback, seats, author };
        let wanted = self.sign(0, Key::Workload(web()), &Body::Workload(fact));
        catalog.offer(wanted, WALL).unwrap();
        catalog
    }

    fn placement(&mut self, at: usize, replica: u32, epoch: u64, state: PlacementState, stopped: bool) -> Arc<Fact> {
        let placement = PlacementId { workload: web(), replica, epoch };
        let award = Award::sign(&placement, &self.id(at), WALL, &self.keys[at], Arc::new(self.chain(at)));
        let (detail, generation) = (String::new(), 1);
        let (restarts, accepted, started) = (0, 0, 0);
        let form = self.form;
        let fact =
            PlacementFact { epoch, state, detail, restarts, stopped, generation, form, accepted, started, award };
        self.sign(at, Key::Placement(self.id(at), web(), replica), &Body::Placement(fact))
    }
}

fn web() -> WorkloadId {
    spec("web").id
}

fn missing_in(catalog: &Catalog, live: &BTreeSet<NodeId>) -> Vec<(u32, u64, Cause)> {
    let missing = missing(&catalog.workload(&web()).unwrap(), catalog, |node| live.contains(node), WALL);
    missing.iter().map(|missing| (missing.replica, missing.epoch, missing.cause)).collect()
}

#[test]
fn the_first_custodian_is_the_same_for_any_order_of_the_nodes() {
    let mut rng = Rng::with_seed(1);
    let mut nodes = ids(20);
    for n in 0..100 {
        let known = first(&workload(n), nodes.iter().copied());
        rng.shuffle(&mut nodes);
        assert_eq!(first(&workload(n), nodes.iter().copied()), known);
    }
    assert_eq!(first(&workload(1), [].into_iter()), None);
}

#[test]
fn when_a_node_leaves_or_comes_no_workload_moves_but_its_own() {
    let (nodes, gone) = (ids(10), ids(10)[3]);
    let mut shares: BTreeMap<NodeId, u32> = BTreeMap::new();
    for n in 0..2000 {
        let with = first(&workload(n), nodes.iter().copied()).unwrap();
        let without = first(&workload(n), nodes.iter().copied().filter(|node| *node != gone)).unwrap();
        assert_eq!(with != without, with == gone);
        *shares.entry(with).or_default() += 1;
    }
    assert!(nodes.iter().all(|node| (130..280).contains(&shares[node])), "evenly, 200 each: {shares:?}");
}

#[test]
fn of_two_placements_one_stays_whoever_judges() {
    let nodes = ids(4);
    let all: Vec<(u64, NodeId)> = (1..4).flat_map(|epoch| nodes.iter().map(move |node| (epoch, *node))).collect();
    for a in &all {
        assert!(!keeps(*a, *a));
        for b in all.iter().filter(|b| *b != a) {
            assert_ne!(keeps(*a, *b), keeps(*b, *a), "one of the two");
            assert!(a.0 <= b.0 || keeps(*a, *b), "the higher epoch");
            assert!(all.iter().all(|c| !(keeps(*a, *b) && keeps(*b, *c)) || keeps(*a, *c)), "no circles");
        }
    }
}

#[test]
fn what_is_missing_depends_on_what_became_of_the_last_try() {
    let mut author = Author::new(3);
    let (all, without_one) = (author.ids(), author.ids().into_iter().filter(|id| *id != author.id(1)).collect());
    let mut catalog = author.catalog(2, 0, 0);
    assert_eq!(missing_in(&catalog, &all), [(0, 1, Cause::Submitted), (1, 1, Cause::Submitted)]);
    catalog.offer(author.placement(1, 0, 4, PlacementState::Fetching, false), WALL).unwrap();
    // Beyond what is wanted by now, so nobody misses it.
    catalog.offer(author.placement(1, 2, 1, PlacementState::Lost, false), WALL).unwrap();
    assert_eq!(missing_in(&catalog, &all), [(1, 1, Cause::Submitted)]);
    let down = Cause::NodeDown(author.id(1));
    assert_eq!(missing_in(&catalog, &without_one), [(0, 5, down), (1, 1, Cause::Submitted)]);
    for state in [PlacementState::Failed, PlacementState::Lost] {
        catalog.offer(author.placement(2, 1, 7, state, false), WALL).unwrap();
        assert_eq!(missing_in(&catalog, &all), [(1, 8, Cause::Lost(author.id(2)))]);
    }
    // An earlier try that still stands is as good as a later one that failed.
    catalog.offer(author.placement(2, 0, 9, PlacementState::Failed, false), WALL).unwrap();
    assert_eq!(missing_in(&catalog, &all).len(), 1);
    assert_eq!(missing_in(&catalog, &without_one)[0], (0, 10, Cause::Lost(author.id(2))));
    let more = author.catalog(1, 3, 0);
    assert_eq!(missing_in(&more, &all), [(0, 1, Cause::Missing)], "wanted since a change, not since it was submitted");
}

#[test]
fn what_has_finished_is_missing_only_when_it_was_stopped_and_is_wanted_again() {
    for (stopped, revived, stands) in [(false, 0, true), (false, 1, true), (false, 2, false), (true, 0, false)] {
        let mut author = Author::new(2);
        let mut catalog = author.catalog(1, 2, revived);
        catalog.offer(author.placement(1, 0, 3, EXITED, stopped), WALL).unwrap();
        // What it has done it has done, wherever its node is now.
        for live in [author.ids(), BTreeSet::from([author.id(0)])] {
            let missing = missing_in(&catalog, &live);
            assert_eq!(missing.is_empty(), stands, "stopped {stopped}, revived in {revived}: {missing:?}");
            assert!(missing.iter().all(|(_, epoch, _)| *epoch == 4));
        }
    }
}

#[test]
fn news_are_waited_for_unless_it_is_urgent_and_a_failure_waits_for_hope() {
    let (mut custody, web, start) = (Custody::default(), workload(1), Instant::ZERO + ms(5000));
    assert!(!custody.is_due(web, false, start));
    assert_eq!(custody.poll_timeout(), Some(start + SETTLE));
    assert!(!custody.is_due(web, false, start + ms(1999)));
    assert!(custody.is_due(web, true, start + ms(1999)), "a dead node's replicas do not wait");
    assert!(custody.is_due(web, false, start + SETTLE));
    custody.settled(&web);
    assert_eq!(custody.poll_timeout(), None);

    custody.hope();
    assert!(custody.take_dirty().is_empty(), "nothing waits for hope");
    assert!(custody.is_due(web, true, start), "at once");
    custody.no_taker(web, start);
    for urgent in [false, true] {
        assert!(!custody.is_due(web, urgent, start + ms(29_999)));
        assert!(custody.is_due(web, urgent, start + RETRY_ANYWAY));
    }
    custody.hope();
    assert_eq!(custody.take_dirty(), BTreeSet::from([web]));
    assert!(!custody.is_due(web, true, start + ms(499)));
    assert_eq!(custody.poll_timeout(), Some(start + RETRY));
    assert!(custody.is_due(web, true, start + RETRY));
    custody.no_taker(web, start + RETRY);
    assert!(!custody.is_due(web, true, start + ms(10_000)), "one hope is for one try");
}

#[test]
fn no_timer_stays_in_the_past() {
    for seed in 0..50 {
        let (mut rng, mut custody, mut now) = (Rng::with_seed(seed), Custody::default(), Instant::ZERO);
        for _ in 0..200 {
            let workload = workload(rng.u64(..5));
            match rng.u8(..6) {
                0 => custody.touch(workload),
                1 => custody.settled(&workload),
                2 => custody.no_taker(workload, now),
                3 => custody.hope(),
                _ => assert!(custody.is_due(workload, rng.bool(), now) == (custody.watches[&workload].due <= now)),
            }
            now = if rng.bool() {
                now + ms(rng.u64(..1000))
            } else {
                custody.poll_timeout().map_or(now, |at| now.max(at))
            };
            custody.handle_timeout(now);
            assert!(custody.poll_timeout().is_none_or(|at| at > now), "seed {seed}: what was due is done");
        }
    }
}

#[test]
fn what_is_to_be_moved_goes_on_until_its_successor_runs() {
    let nodes = ids(2);
    let rival = |epoch, at: usize, running, stays| Rival { epoch, node: nodes[at], running, waited: false, stays };
    let old = rival(1, 0, true, false);
    for (running, gives) in [(false, false), (true, true)] {
        let new = rival(2, 1, running, true);
        assert_eq!(gives_way(&old, &new, false), gives);
        assert!(!gives_way(&new, &old, false), "a successor does not end for what it replaces");
        assert!(gives_way(&old, &new, true), "a singleton cannot run twice, not even for that");
    }
    // Gone back to: what was the old form is wanted again, whatever epoch its successor had.
    let (back, failing) = (rival(1, 0, true, true), rival(2, 1, true, false));
    assert!(gives_way(&failing, &back, false) && !gives_way(&back, &failing, false));
    // Placed anew on a node that is then drained, while an earlier try elsewhere still waits: that one does not start.
    let (late, early) = (rival(3, 0, false, false), rival(2, 1, false, true));
    assert!(gives_way(&early, &late, true) && gives_way(&late, &early, true), "a third try comes after both");
    // Of two that both stay, or both go, one gives way.
    for stays in [true, false] {
        let (a, b) = (rival(3, 0, true, stays), rival(3, 1, true, stays));
        assert_ne!(gives_way(&a, &b, false), gives_way(&b, &a, false));
    }
}

#[test]
fn an_update_counts_what_is_new_and_up_what_is_old_and_what_fails() {
    let mut author = Author::new(3);
    let new = author.form;
    let mut catalog = author.catalog(3, 1, 1);
    let all = author.ids();
    author.form = 1;
    for at in 0..3 {
        catalog.offer(author.placement(at, at as u32, 1, PlacementState::Running, false), WALL).unwrap();
    }
    let web = web();
    let look = |catalog: &Catalog, at: UnixMillis| {
        let wanted = catalog.workload(&web).unwrap();
        let live = |node: &NodeId| all.contains(node);
        let moved: Vec<(u32, u64)> =
            moves(&wanted, catalog, live, WALL).iter().map(|(missing, _)| (missing.replica, missing.epoch)).collect();
        (progress(&wanted, catalog, live, at), moved)
    };
    let (progress, moved) = look(&catalog, WALL);
    assert_eq!((progress.outdated, progress.steady, moved), (3, 0, vec![(0, 2), (1, 2), (2, 2)]));
    author.form = new;
    catalog.offer(author.placement(0, 0, 2, PlacementState::Running, false), WALL).unwrap();
    let (progress, moved) = look(&catalog, UnixMillis(0));
    assert_eq!((progress.outdated, progress.unsteady, moved.len()), (2, 1, 2), "it has just started");
    let (progress, _) = look(&catalog, WALL);
    assert_eq!((progress.steady, progress.unsteady, progress.failing), (1, 0, None));
    catalog.offer(author.placement(1, 1, 2, PlacementState::Failed, false), WALL).unwrap();
    let (progress, _) = look(&catalog, WALL);
    assert_eq!(progress.failing.map(|(replica, _)| replica), Some(1));
}

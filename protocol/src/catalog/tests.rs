use std::collections::BTreeMap;

use ed25519_dalek::SigningKey;

use super::*;
use crate::trust::{Chain, mesh_of, node_of};
use crate::workload::Resources;

#[test]
fn a_clock_never_stamps_twice_and_follows_what_it_saw() {
    let mut clock = Clock::default();
    let first = clock.stamp(UnixMillis(1000));
    let second = clock.stamp(UnixMillis(999));
    assert!(second > first);
    clock.observe(Hlc::at(UnixMillis(5000)));
    let third = clock.stamp(UnixMillis(1001));
    assert!(third > Hlc::at(UnixMillis(5000)));
    assert_eq!(third.ahead_of(UnixMillis(1001)), 3999);
}

/// A member and what it says.
struct Author {
    root: SigningKey,
    key: SigningKey,
}

impl Author {
    fn new() -> Author {
        Author { root: SigningKey::from_bytes(&[1; 32]), key: SigningKey::from_bytes(&[2; 32]) }
    }

    fn catalog(&self) -> Catalog {
        Catalog::new(mesh_of(&node_of(&self.root)), None)
    }

    fn says(&self, key: Key, at: u64, body: &Body) -> Arc<Fact> {
        Arc::new(Fact::sign(key, Hlc::at(UnixMillis(at)), body, &self.key))
    }

    fn report(&self, at: u64, memory: u64) -> Arc<Fact> {
        let chain = Chain::root(&self.root, node_of(&self.key), 0, u64::MAX / 2);
        let vouch = vouch(&self.key, &chain);
        let fact = NodeFact {
            name: "n".to_owned(),
            version: String::new(),
            capacity: Resources { cpu_milli: 1, memory },
            labels: BTreeMap::new(),
            data: Vec::new(),
            images: Vec::new(),
            unnamed: Vec::new(),
            fetching: Vec::new(),
            chain,
            vouch,
        };
        self.says(Key::Node(node_of(&self.key)), at, &Body::Node(fact))
    }

    fn gone(&self, at: u64) -> Arc<Fact> {
        self.says(Key::Journal(node_of(&self.key), WorkloadId([7; 16])), at, &Body::Gone)
    }
}

#[test]
fn what_was_forgotten_is_not_brought_back_by_a_node_that_has_not_forgotten_it_yet() {
    let (author, start) = (Author::new(), 1_800_000_000_000);
    let mut catalog = author.catalog();
    catalog.offer(author.report(start, 1), UnixMillis(start)).unwrap();
    catalog.offer(author.gone(start), UnixMillis(start)).unwrap();
    let late = UnixMillis(start).after(TOMBSTONE * 2);
    assert_eq!(catalog.expire(late, |_| true).len(), 1);
    assert_eq!(catalog.offer(author.gone(start), late), Ok(Taken::Known));
    assert_eq!(catalog.index().len(), 1);
    // Its own node restarts with what it wrote down, however long ago.
    let mut again = author.catalog();
    assert_eq!(again.offer(author.report(start, 1), UnixMillis(start)), Ok(Taken::New));
    again.invariants();
}

#[test]
fn no_author_comes_further_ahead_than_the_limit_step_by_step() {
    let (author, start) = (Author::new(), 1_800_000_000_000);
    let mut catalog = author.catalog();
    let skew = MAX_SKEW.as_millis() as u64;
    let now = UnixMillis(start);
    assert_eq!(catalog.offer(author.report(start + skew, 1), now), Ok(Taken::New));
    assert!(matches!(catalog.offer(author.report(start + 2 * skew, 2), now), Err(NotTaken::Future { .. })));
    // What this node took when its own clock was wrong may be followed.
    let day = 86_400_000;
    let mut wrong = author.catalog();
    wrong.offer(author.report(start + day, 1), UnixMillis(start + day)).unwrap();
    assert_eq!(wrong.offer(author.report(start + day + 1, 2), now), Ok(Taken::New));
}

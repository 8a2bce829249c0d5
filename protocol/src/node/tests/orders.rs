//! Who may cast out whom, and whose word counts about a singleton's custodians.

use super::*;
use crate::catalog::{Body, OrderFact};
use crate::lease::Seats;

fn knows(mesh: &Mesh, at: usize, other: usize) -> bool {
    mesh.node(at).membership().member(&mesh.id(other)).is_some()
}

fn singleton_among_five(seed: u64) -> (Mesh, WorkloadId) {
    let mut mesh = Mesh::new(5, seed);
    for at in 0..5 {
        mesh.load_image(at);
    }
    mesh.run(secs(10));
    let ledger = mesh.submit(0, Spec { singleton: true, ..service("ledger") });
    mesh.wait("running", secs(15), |mesh| mesh.running(&ledger).len() == 1);
    mesh.run(secs(1));
    (mesh, ledger)
}

#[test]
fn an_admin_is_cast_out_by_the_root_key_and_by_no_other_admin() {
    let mut mesh = Mesh::new(3, 40);
    for at in 0..3 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let web = mesh.submit(2, Spec { on: BTreeMap::new(), ..service("web") });
    mesh.wait("running", secs(5), |mesh| mesh.running(&web).len() == 1);
    let (node, reason) = (mesh.id(2), "stolen".to_owned());
    let id = mesh.command(1, Command::Revoke { node, reason: reason.clone(), root: None });
    assert!(matches!(mesh.hosts[1].replies.remove(&id), Some(Err(Refused::NotAllowed(_)))), "all are the root's own");

    // It cannot make itself stand above another by certificates that it signs, and the root is nobody's to revoke.
    let (from, now, wall) = (mesh.id(1), mesh.now, mesh.wall());
    let thief = &mesh.hosts[1];
    let made = thief.chain.issue(&thief.key, node, Role::Worker, wall.as_secs(), 1000, 1);
    let say = |about: NodeId, chain: Chain| {
        let target = Some((chain.clone(), catalog::vouch(&thief.key, &chain)));
        let order = OrderFact { holds: true, reason: String::new(), target, author: thief.chain.clone() };
        let fact = Fact::sign(Key::Revoked(about), catalog::Hlc::at(wall), &Body::Order(order), &thief.key);
        codec::encode_message(&Message::Facts { facts: vec![Arc::new(fact)] })
    };
    let root = node_of(&mesh.root);
    let forged = [say(node, made.clone()), say(root, made)];
    for bytes in forged {
        mesh.hosts[0].node.as_mut().unwrap().handle(now, Input::Message { from, bytes });
        mesh.drain(0);
    }
    assert_eq!((mesh.node(0).dropped().facts, mesh.node(0).catalog().revoked().len()), (2, 0));

    let root = Some(Box::new(mesh.root.clone()));
    let id = mesh.command(1, Command::Revoke { node, reason, root });
    assert!(matches!(mesh.hosts[1].replies.remove(&id), None | Some(Ok(_))));
    mesh.wait("cast out everywhere", secs(3), |mesh| !knows(mesh, 0, 2) && !knows(mesh, 1, 2));
    // What it submitted is not lost with it, and what it says is not heard.
    mesh.wait("its work on the others", secs(20), |mesh| mesh.running(&web).iter().any(|at| *at < 2));
    mesh.run(secs(10));
    assert!(mesh.node(0).dropped().revoked > 0);
    assert!(!knows(&mesh, 0, 2) && mesh.node(0).catalog().node(&node).is_none());
    assert_eq!(mesh.node(0).catalog().fingerprint(), mesh.node(1).catalog().fingerprint());
}

#[test]
fn nobody_takes_a_seat_by_saying_so() {
    let (mut mesh, ledger) = singleton_among_five(41);
    let seats = mesh.node(0).catalog().seats_of(&ledger).unwrap().clone();
    assert_eq!((seats.term, seats.nodes.len()), (1, 3));
    let liar = (0..5).find(|at| !seats.nodes.contains(&mesh.id(*at))).unwrap();
    // An admin may say so. This one is none.
    let (founder, wall) = (&mesh.hosts[(liar + 1) % 5], mesh.wall().as_secs());
    mesh.hosts[liar].chain = founder.chain.issue(&founder.key, mesh.id(liar), Role::Submitter, wall, 100_000_000, 1);
    mesh.kill(liar, false);
    mesh.start(liar);
    mesh.introduce(liar, (liar + 1) % 5);
    mesh.run(secs(5));
    let victim = mesh.at(&seats.nodes[0]);
    let (from, now, wall) = (mesh.id(liar), mesh.now, mesh.wall());
    for term in [2, u64::MAX] {
        let seats = Seats { term, nodes: vec![from] };
        let body = Body::Seats(seats.clone());
        let fact = Fact::sign(Key::Seats(from, ledger), catalog::Hlc::at(wall), &body, &mesh.hosts[liar].key);
        let placement = PlacementId { workload: ledger, replica: 0, epoch: 9 };
        for message in [
            Message::SeatsDecided { workload: ledger, seats: seats.clone() },
            Message::LeaseDenied { placement, seq: 1, seats: Some(seats.clone()) },
            Message::LeaseRequest { placement, seats, seq: 1 },
            Message::Facts { facts: vec![Arc::new(fact)] },
        ] {
            let bytes = codec::encode_message(&message);
            mesh.hosts[victim].node.as_mut().unwrap().handle(now, Input::Message { from, bytes });
            mesh.drain(victim);
        }
    }
    mesh.run(secs(10));
    let node = mesh.node(victim);
    assert_eq!(node.custodian.seats(&ledger), Some(&seats));
    assert_eq!(node.catalog().seats_of(&ledger), Some(&seats));
    assert_eq!(mesh.running(&ledger).len(), 1, "and its lease goes on");
}

#[test]
fn a_custodian_that_dies_is_replaced_and_the_singleton_goes_on() {
    let (mut mesh, ledger) = singleton_among_five(42);
    let at = mesh.running(&ledger)[0];
    let seats = mesh.node(at).catalog().seats_of(&ledger).unwrap().clone();
    let dead = *seats.nodes.iter().find(|node| mesh.at(node) != at).unwrap();
    let dead_at = mesh.at(&dead);
    mesh.kill(dead_at, true);
    mesh.wait("another in its seat", secs(30), |mesh| {
        let known = mesh.node(at).catalog().seats_of(&ledger).unwrap();
        known.term == 2 && !known.nodes.contains(&dead) && known.nodes.len() == 3
    });
    mesh.run(secs(20));
    assert_eq!(mesh.running(&ledger), [at], "it has never stopped");
    assert_eq!(mesh.node(at).worker().placement(&ledger, 0).unwrap().fact.epoch, 1);
}

/// Each link from the first custodians to the present ones is said by a node; those who said them may be long gone.
#[test]
fn custodians_are_known_when_those_who_named_them_are_gone() {
    let (mut mesh, ledger) = singleton_among_five(43);
    let at = mesh.running(&ledger)[0];
    let first = mesh.node(at).catalog().seats_of(&ledger).unwrap().clone();
    let dead = *first.nodes.iter().find(|node| mesh.at(node) != at).unwrap();
    let dead_at = mesh.at(&dead);
    mesh.kill(dead_at, true);
    mesh.wait("another in its seat", secs(30), |mesh| {
        mesh.node(at).catalog().seats_of(&ledger).is_some_and(|seats| seats.term == 2)
    });
    // Two of three custodians lost at once, with a decision that nobody has heard of, are an admin's business.
    mesh.run(secs(1));
    let told: Vec<NodeId> = mesh.node(at).catalog().told_seats(&ledger).map(|(author, _)| *author).collect();
    let author = told[0];
    let admin = (0..5).find(|other| mesh.hosts[*other].node.is_some() && mesh.id(*other) != author).unwrap();
    let root = Some(Box::new(mesh.root.clone()));
    mesh.command(admin, Command::Revoke { node: author, reason: "sold".to_owned(), root });
    mesh.run(secs(2));
    for at in (0..5).filter(|at| *at != dead_at && mesh.id(*at) != author) {
        let seats = mesh.node(at).catalog().seats_of(&ledger).unwrap();
        assert!(seats.term >= 2, "node {at} is back at {seats:?}");
    }
}

/// Whoever scales it meanwhile, without having heard of it, does not put the old custodians back.
#[test]
fn forced_custodians_stay_whatever_else_is_changed() {
    let (mut mesh, ledger) = singleton_among_five(44);
    let seats = mesh.node(0).catalog().seats_of(&ledger).unwrap().clone();
    for node in &seats.nodes[..2] {
        let at = mesh.at(node);
        mesh.kill(at, true);
    }
    let left: Vec<usize> = (0..5).filter(|at| mesh.hosts[*at].node.is_some()).collect();
    mesh.run(secs(6));
    let id = mesh.command(left[0], Command::Reseat { workload: ledger });
    mesh.command(left[1], Command::Scale { workload: ledger, replicas: 2 });
    mesh.wait("two of it", secs(40), |mesh| mesh.running(&ledger).len() == 2);
    assert!(matches!(mesh.hosts[left[0]].replies.remove(&id), Some(Ok(_))));
    for at in left {
        assert_eq!(mesh.node(at).catalog().seats_of(&ledger).unwrap().era(), 1);
    }
}

fn update(mesh: &mut Mesh, at: usize, workload: WorkloadId, command: &[&str], rollout: catalog::Rollout) {
    let mut spec = (**mesh.node(at).catalog().workload(&workload).unwrap().spec).clone();
    spec.command = command.iter().map(|word| (*word).to_owned()).collect();
    mesh.command(at, Command::Update { workload, spec: Box::new(spec), rollout });
}

/// Replaced in place, its new form exits and is not started again: what ran before does run again.
#[test]
fn what_an_update_ended_comes_back_with_the_rollback() {
    let mut mesh = Mesh::new(3, 45);
    for at in 0..3 {
        mesh.load_image(at);
    }
    mesh.run(secs(8));
    let web = mesh.submit(0, Spec { restart: Restart::No, ..service("web") });
    mesh.wait("running", secs(5), |mesh| mesh.running(&web).len() == 1);
    mesh.run(secs(5));
    let in_place = catalog::Rollout { max_surge: 0, max_unavailable: 1 };
    update(&mut mesh, 0, web, &["exit"], in_place);
    mesh.wait("the rollback", secs(30), |mesh| !mesh.node(0).catalog().workload(&web).unwrap().fact.setback.is_empty());
    mesh.wait("what was before", secs(30), |mesh| mesh.running(&web).len() == 1);

    // And one that went well is not judged again by what happens weeks later, when something else is changed.
    update(&mut mesh, 0, web, &["first"], in_place);
    mesh.wait("the new form", secs(30), |mesh| {
        let known = mesh.node(0).catalog().workload(&web).unwrap();
        let form = known.fact.form();
        known.fact.setback.is_empty()
            && mesh
                .node(0)
                .catalog()
                .placements_of(&web)
                .any(|place| place.fact.form == form && place.fact.state == crate::worker::PlacementState::Running)
    });
    mesh.run(secs(200));
    let form = mesh.node(0).catalog().workload(&web).unwrap().fact.form();
    mesh.command(0, Command::Scale { workload: web, replicas: 2 });
    mesh.run(secs(30));
    let known = mesh.node(0).catalog().workload(&web).unwrap();
    assert_eq!((known.fact.form(), &*known.fact.setback), (form, ""));
}

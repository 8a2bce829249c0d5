//! What is believed of nodes that are silent, lossy, accused, leaving or cut off.

use super::*;

#[test]
fn a_silent_node_is_suspected_and_then_down_everywhere_within_bounds() {
    for seed in 0..5 {
        let mut mesh = Mesh::joined(10, seed);
        mesh.nodes[3] = None;
        let silent = mesh.now;
        assert!(mesh.run_until(secs(10), |mesh| mesh.all_say(3, State::Down)), "seed {seed}");
        let (suspected, down) = (mesh.said(3, State::Suspect)[0], mesh.said(3, State::Down)[0]);
        assert!(suspected.since(silent) >= PROBE_TIMEOUT, "seed {seed}");
        assert!(down.since(suspected) >= PROBE_INTERVAL.mul_f64(SUSPICION_MULT), "seed {seed}: time to refute");
        assert!((0..10).filter(|at| *at != 3).all(|at| mesh.said(at, State::Down).is_empty()), "seed {seed}");
    }
}

#[test]
fn a_suspect_that_hears_of_it_refutes_in_time() {
    for seed in 0..20 {
        let mut mesh = Mesh::joined(6, seed);
        mesh.loss[4] = 1.0;
        assert!(mesh.run_until(secs(10), |mesh| !mesh.said(4, State::Suspect).is_empty()), "seed {seed}");
        mesh.loss[4] = 0.2;
        mesh.run(secs(5));
        mesh.loss[4] = 0.0;
        assert!(mesh.run_until(secs(10), Mesh::all_alive), "seed {seed}");
        assert_eq!(mesh.said(4, State::Down), [], "seed {seed}");
        assert!(mesh.node(4).incarnation > BOOT, "only a higher incarnation refutes");
    }
}

#[test]
fn a_node_with_bad_links_of_its_own_doubts_itself_and_brings_nobody_down() {
    let mut doubted = 0;
    for seed in 0..10 {
        let mut mesh = Mesh::joined(12, seed);
        mesh.loss[7] = 0.2;
        // It becomes slow to accuse.
        doubted += usize::from(mesh.run_until(secs(60), |mesh| mesh.node(7).health > 0));
        mesh.run(secs(30));
        for at in (0..12).filter(|at| *at != 7) {
            assert_eq!(mesh.said(at, State::Down), [], "seed {seed}: {at} was up all the time");
            assert_eq!(mesh.node(at).health, 0, "seed {seed}: the links of {at} are good");
        }
        mesh.loss[7] = 0.0;
        assert!(mesh.run_until(secs(60), |mesh| mesh.all_alive() && mesh.node(7).health == 0), "seed {seed}");
    }
    assert!(doubted >= 7, "{doubted} of 10");
}

#[test]
fn who_leaves_has_left_and_is_not_down() {
    for seed in 0..3 {
        // More than are told at once: the others hear of it from these.
        let mut mesh = Mesh::joined(24, seed);
        mesh.on(5, |node, cx| node.leave(cx));
        mesh.nodes[5] = None;
        assert!(mesh.run_until(secs(10), |mesh| mesh.all_say(5, State::Left)), "seed {seed}");
        mesh.run(secs(20));
        assert!(mesh.all_say(5, State::Left) && mesh.said(5, State::Down).is_empty(), "seed {seed}");
    }
}

#[test]
fn an_accusation_counts_only_against_the_last_word_of_the_accused() {
    let mut mesh = Mesh::joined(3, 1);
    let accused = mesh.ids[2];
    let word = |mesh: &Mesh| mesh.node(0).member(&accused).and_then(Member::update).unwrap();
    let old = word(&mesh);
    mesh.on(2, |node, _| node.set_addresses(vec!["/memory/new".to_owned()]));
    assert!(mesh.run_until(secs(5), |mesh| word(mesh).incarnation > old.incarnation));
    let last = word(&mesh);
    let beyond = Update { incarnation: last.incarnation + 1, state: State::Down, ..last.clone() };
    let left = Update { state: State::Left, ..last.clone() };
    let suspect = Update { state: State::Suspect, ..old.clone() };
    for accusation in [suspect, Update { state: State::Down, ..old }, beyond, left] {
        mesh.news(0, vec![accusation]);
        assert_eq!(mesh.state(0, 2), Some(State::Alive));
    }
    mesh.news(0, vec![Update { state: State::Down, ..last }]);
    assert_eq!(mesh.state(0, 2), Some(State::Down));
    assert!(mesh.run_until(secs(10), Mesh::all_alive), "it is there, and says so when it hears of it");
}

#[test]
fn two_halves_that_took_each_other_for_dead_meet_again() {
    for seed in 0..3 {
        let mut mesh = Mesh::joined(10, seed);
        mesh.side = (0..10).map(|at| at / 5).collect();
        let split = |mesh: &Mesh| (0..10).all(|at| mesh.node(at).live().count() == 4);
        assert!(mesh.run_until(secs(40), split), "seed {seed}");
        mesh.side = vec![0; 10];
        assert!(mesh.run_until(secs(20), Mesh::all_alive), "seed {seed}");
    }
}

#[test]
fn silence_before_a_restart_accuses_nobody_after_it() {
    let mut mesh = Mesh::joined(2, 1);
    mesh.loss[1] = 1.0;
    assert!(mesh.run_until(secs(2), |mesh| !mesh.node(0).probes.is_empty()));
    let (node, incarnation) = (mesh.ids[1], mesh.node(1).incarnation + 1);
    let (state, signature) = (State::Alive, Signature([0; 64]));
    let word = Update { node, incarnation, boot: BOOT, state, accuser: None, addresses: Vec::new(), signature };
    mesh.news(0, vec![word.sign(&key(1))]);
    mesh.run(PROBE_TIMEOUT * 2 + Duration::from_millis(20));
    assert_eq!(mesh.state(0, 1), Some(State::Alive));
}

//! Whole meshes, through faults and after them. Each failing seed found is kept here with its fix.

use moyai_sim::{Options, run};

fn holds(seed: u64, nodes: usize) {
    let report = run(Options::random(seed, nodes));
    assert!(report.violations.is_empty(), "seed {seed}: {:?}", report.violations);
    assert!(report.workloads > 0, "seed {seed} submitted nothing");
}

#[test]
fn a_hundred_nodes_come_through_loss_and_crashes() {
    holds(1, 100);
}

#[test]
fn small_meshes_hold_for_many_seeds() {
    for seed in 0..12 {
        holds(seed, 3 + (seed as usize % 10));
    }
}

#[test]
fn one_seed_is_one_history() {
    let once = |seed| run(Options::random(seed, 12));
    let (first, again, other) = (once(5), once(5), once(6));
    assert_eq!((first.messages, first.down_ms), (again.messages, again.down_ms));
    assert_ne!(again.messages, other.messages);
}

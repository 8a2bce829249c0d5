//! Whole meshes, through faults and after them. Each failing seed found is kept here with its fix.

use moyai_sim::{Options, Report, Scenario, run};

fn holds(scenario: Scenario, seed: u64, nodes: usize) -> Report {
    let report = run(Options::new(scenario, seed, nodes));
    assert!(report.violations.is_empty(), "{scenario}, seed {seed}, {nodes} nodes: {:?}", report.violations);
    report
}

#[test]
fn a_hundred_nodes_come_through_whatever_happens() {
    assert!(holds(Scenario::Chaos, 1, 100).workloads > 0);
}

#[test]
fn small_meshes_hold_for_many_seeds() {
    for seed in 0..20 {
        holds(Scenario::Chaos, seed, 2 + (seed as usize % 12));
    }
}

#[test]
fn one_seed_is_one_history() {
    let once = |seed| run(Options::new(Scenario::Chaos, seed, 12));
    let (first, again, other) = (once(5), once(5), once(6));
    assert_eq!((first.messages, first.bytes_per_node_s), (again.messages, again.bytes_per_node_s));
    assert_eq!((first.placement_ms, first.failover_ms), (again.placement_ms, again.failover_ms));
    assert_ne!(again.messages, other.messages);
}

#[test]
fn every_scenario_holds_and_measures_what_it_is_for() {
    for scenario in Scenario::ALL {
        let report = holds(scenario, 3, 24);
        let measured = match scenario {
            Scenario::Spread => report.spread_ms.is_some(),
            Scenario::Failover => report.failover_ms.is_some(),
            Scenario::Storm => report.placements_per_s.is_some(),
            Scenario::Load50 | Scenario::Load90 => report.quality.is_some_and(|quality| quality > 0.8),
            Scenario::Idle => report.false_deaths == 0 && report.bytes_per_node_s > 0.0,
            Scenario::Chaos | Scenario::Split | Scenario::Churn => report.placement_ms.is_some(),
        };
        assert!(measured, "{scenario}: {report:?}");
    }
}

#[test]
fn a_start_that_waits_for_the_disk_is_dropped_when_a_later_epoch_comes_up_elsewhere() {
    holds(Scenario::Chaos, 208, 20);
    holds(Scenario::Chaos, 355, 15);
}

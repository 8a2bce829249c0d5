//! Each property is broken on purpose, by a modelled machine that does what no honest one does, and its checker says so.

use moyai_sim::{Options, Sabotage, Scenario, run};

/// What the checkers say first of a mesh of machines that all do this, or only the first of them. The seeds go on until
/// the fault shows: not each history gives it an occasion.
fn violations(scenario: Scenario, sabotage: Sabotage) -> Vec<String> {
    for seed in 1..20 {
        let mut honest = Options::new(scenario, seed, 9);
        honest.workloads = honest.workloads.min(3);
        assert!(run(honest.clone()).violations.is_empty(), "an honest mesh holds");
        let report = run(Options { sabotage: Some(sabotage), ..honest });
        if !report.violations.is_empty() {
            return report.violations.into_iter().map(|(checker, _)| checker).collect();
        }
    }
    Vec::new()
}

#[test]
fn containers_that_do_not_stop_are_seen_to_run_twice() {
    assert_eq!(violations(Scenario::Split, Sabotage::NeverStops), ["no replica runs twice"]);
}

#[test]
fn containers_that_outlive_their_leases_are_seen() {
    assert_eq!(violations(Scenario::Singleton, Sabotage::OutlivesLeases), ["a singleton never runs twice"]);
}

#[test]
fn machines_that_take_more_than_they_have_are_seen() {
    assert_eq!(violations(Scenario::Load50, Sabotage::Overbooks), ["no node over its capacity"]);
}

#[test]
fn work_that_runs_nowhere_is_missed() {
    assert_eq!(violations(Scenario::Split, Sabotage::RunsNothing), ["nothing accepted is lost"]);
}

#[test]
fn a_node_that_hears_no_facts_is_seen_to_differ() {
    assert!(violations(Scenario::Spread, Sabotage::IsDeaf).contains(&"the catalog converges".to_owned()));
}

#[test]
fn a_node_that_sends_nothing_is_seen_to_be_gone() {
    assert!(violations(Scenario::Idle, Sabotage::IsMute).contains(&"membership converges".to_owned()));
}

#[test]
fn a_machine_that_brings_back_what_ran_is_seen() {
    assert_eq!(violations(Scenario::Churn, Sabotage::Revives), ["no old epoch is revived"]);
}

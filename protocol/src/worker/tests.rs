use super::*;
use crate::auction::Record;
use crate::trust::Chain;
use crate::workload::tests::spec;

fn award() -> Award {
    let record = Record::new(
        NodeId([9; 32]),
        UnixMillis(0),
        crate::auction::Cause::Submitted,
        (1, 1),
        Duration::ZERO,
        Vec::new(),
        Vec::new(),
    );
    Award { record: Arc::new(record), chain: Arc::new(Chain(Vec::new())), signature: crate::id::Signature([0; 64]) }
}

fn worker() -> Worker {
    let mut worker = Worker::new(BTreeMap::new());
    worker.set_load(Resources { cpu_milli: 1000, memory: 256 << 20 }, 0);
    worker
}

const ME: NodeId = NodeId([1; 32]);
const T: (Instant, UnixMillis) = (Instant::ZERO, UnixMillis(1));

fn placement(replica: u32, epoch: u64) -> PlacementId {
    PlacementId { workload: spec("web").id, replica, epoch }
}

#[test]
fn awards_are_idempotent_and_never_exceed_the_machine() {
    let mut worker = worker();
    let spec = Arc::new(spec("web"));
    assert_eq!(worker.award(ME, placement(0, 1), &spec, award(), 0, true, T), Ok(()));
    assert_eq!(worker.award(ME, placement(0, 1), &spec, award(), 0, true, T), Ok(()));
    assert_eq!(worker.award(ME, placement(1, 1), &spec, award(), 0, true, T), Ok(()));
    let refused = worker.award(ME, placement(2, 1), &spec, award(), 0, true, T);
    assert!(matches!(refused, Err(Refusal::Cpu { .. })));
    let starts = |action: &&Action| matches!(action, Action::Effect(_, Effect::Start { .. }));
    assert_eq!(worker.take_actions().iter().filter(starts).count(), 2);
    worker.invariants();
}

#[test]
fn an_award_asked_about_before_it_came_is_refused_when_it_comes() {
    let mut worker = worker();
    assert_eq!(worker.query(ME, placement(0, 1)), Err(Refusal::NotSeen));
    let refused = worker.award(ME, placement(0, 1), &Arc::new(spec("web")), award(), 0, true, T);
    assert_eq!(refused, Err(Refusal::NotSeen));
    assert_eq!(worker.award(ME, placement(0, 2), &Arc::new(spec("web")), award(), 0, true, T), Ok(()));
    assert_eq!(worker.query(ME, placement(0, 2)), Ok(()));
}

#[test]
fn bids_cover_only_what_fits_and_dearer_is_what_comes_later() {
    let worker = worker();
    let (prices, basis) = worker.bid(&spec("web"), 5, 0, Instant::ZERO).unwrap();
    assert_eq!(prices.len(), 2);
    assert!(prices[0] < prices[1]);
    assert_eq!(basis.missing, 0);
    let (far, _) = worker.bid(&spec("web"), 1, 100 << 20, Instant::ZERO).unwrap();
    assert!(far[0] > prices[0] + 900, "100 MiB at 100 MB/s is about a second: {far:?}");
}

#[test]
fn a_crashing_container_waits_longer_each_time() {
    let mut worker = worker();
    let spec = Arc::new(Spec { restart: crate::workload::Restart::OnFailure { max: 3 }, ..spec("web") });
    worker.award(ME, placement(0, 1), &spec, award(), 0, true, T).unwrap();
    let mut now = Instant::ZERO;
    let mut waits = Vec::new();
    loop {
        worker.ended(placement(0, 1), Outcome::Started(Ok(())), now, UnixMillis(1));
        let status = ExitStatus { code: 1, out_of_memory: false };
        worker.ended(placement(0, 1), Outcome::Exited(status), now, UnixMillis(1));
        worker.invariants();
        let Some(due) = worker.poll_timeout() else { break };
        waits.push(due.since(now).as_millis());
        now = due;
        worker.handle_timeout(now);
    }
    assert_eq!(waits, [100, 200, 400]);
    let held = worker.placement(&spec.id, 0).unwrap();
    assert_eq!(held.fact.state, PlacementState::Exited(ExitStatus { code: 1, out_of_memory: false }));
    assert_eq!(held.fact.restarts, 3);
}

#[test]
fn a_removal_while_it_starts_is_carried_out_when_it_has_started() {
    let mut worker = worker();
    let spec = Arc::new(spec("web"));
    worker.award(ME, placement(0, 1), &spec, award(), 0, true, T).unwrap();
    worker.want(&spec.id, 0, true);
    worker.take_actions();
    worker.ended(placement(0, 1), Outcome::Started(Ok(())), Instant::ZERO, UnixMillis(1));
    let stops = |action: &Action| matches!(action, Action::Effect(_, Effect::Stop { .. }));
    assert!(worker.take_actions().iter().any(stops));
    let status = ExitStatus { code: 143, out_of_memory: false };
    worker.ended(placement(0, 1), Outcome::Exited(status), Instant::ZERO, UnixMillis(1));
    let removes = |action: &Action| matches!(action, Action::Effect(_, Effect::Remove { .. }));
    assert!(worker.take_actions().iter().any(removes));
    worker.ended(placement(0, 1), Outcome::Done, Instant::ZERO, UnixMillis(1));
    assert!(matches!(worker.take_actions()[..], [Action::Retract(..)]));
    assert_eq!(worker.placements().count(), 0);
}

use super::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::confinement::{Confinement, Device, Mount, MountKind, Network, Port, Sandbox};
use crate::limits::{UNLIMITED, Ulimit};
use crate::trust::Chain;
use crate::workload::tests::spec;

fn award() -> Award {
    let (auctioneer, at, chain) = (NodeId([9; 32]), UnixMillis(0), Arc::new(Chain(Vec::new())));
    Award { auctioneer, at, chain, signature: crate::id::Signature([0; 64]) }
}

fn worker() -> Worker {
    let mut worker = Worker::new(BTreeMap::new(), Offers::default());
    worker.set_load(Resources { cpu_milli: 1000, memory: 256 << 20 }, 0, Instant::ZERO);
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
    assert_eq!(worker.award(ME, placement(0, 1), &spec, award(), (0, 0), true, T), Ok(()));
    assert_eq!(worker.award(ME, placement(0, 1), &spec, award(), (0, 0), true, T), Ok(()));
    assert_eq!(worker.award(ME, placement(1, 1), &spec, award(), (0, 0), true, T), Ok(()));
    let refused = worker.award(ME, placement(2, 1), &spec, award(), (0, 0), true, T);
    assert!(matches!(refused, Err(Refusal::Cpu { .. })));
    let starts = |action: &&Action| matches!(action, Action::Effect(_, Effect::Start { .. }));
    assert_eq!(worker.take_actions().iter().filter(starts).count(), 2);
    worker.invariants();
}

#[test]
fn an_award_asked_about_before_it_came_is_refused_when_it_comes() {
    let mut worker = worker();
    assert_eq!(worker.query(ME, placement(0, 1), UnixMillis(0)), Err(Refusal::NotSeen));
    let refused = worker.award(ME, placement(0, 1), &Arc::new(spec("web")), award(), (0, 0), true, T);
    assert_eq!(refused, Err(Refusal::NotSeen));
    assert_eq!(worker.award(ME, placement(0, 2), &Arc::new(spec("web")), award(), (0, 0), true, T), Ok(()));
    assert_eq!(worker.query(ME, placement(0, 2), UnixMillis(0)), Ok(()));
}

/// Where one node alone may take a workload, nobody else's placement raises the epoch: the next auction has the same one.
#[test]
fn an_award_that_was_lost_once_may_be_given_again_by_the_next_auction() {
    let mut worker = worker();
    assert_eq!(worker.query(ME, placement(0, 1), UnixMillis(5)), Err(Refusal::NotSeen));
    let again = |at| Award { at: UnixMillis(at), ..award() };
    let web = Arc::new(spec("web"));
    let late = worker.award(ME, placement(0, 1), &web, again(5), (0, 0), true, T);
    assert_eq!(late, Err(Refusal::NotSeen), "the one that was asked about");
    assert_eq!(worker.award(ME, placement(0, 1), &web, again(6), (0, 0), true, T), Ok(()));
}

#[test]
fn bids_cover_only_what_fits_and_dearer_is_what_comes_later() {
    let worker = worker();
    let (prices, basis) = worker.bid(&spec("web"), 5, 0, false, Instant::ZERO).unwrap();
    assert_eq!(prices.len(), 2);
    assert!(prices[0] < prices[1]);
    assert_eq!(basis.missing, 0);
    let (far, _) = worker.bid(&spec("web"), 1, 100 << 20, false, Instant::ZERO).unwrap();
    assert!(far[0] > prices[0] + 900, "100 MiB at 100 MB/s is about a second: {far:?}");
}

#[test]
fn a_crashing_container_waits_longer_each_time() {
    let mut worker = worker();
    let spec = Arc::new(Spec { restart: crate::workload::Restart::OnFailure { max: 3 }, ..spec("web") });
    worker.award(ME, placement(0, 1), &spec, award(), (0, 0), true, T).unwrap();
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
    worker.award(ME, placement(0, 1), &spec, award(), (0, 0), true, T).unwrap();
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

fn started(actions: &[Action]) -> Vec<PlacementId> {
    let start = |action: &Action| match action {
        Action::Effect(placement, Effect::Start { .. }) => Some(*placement),
        _ => None,
    };
    actions.iter().filter_map(start).collect()
}

#[test]
fn what_makes_way_has_ended_before_its_place_is_taken() {
    let mut worker = worker();
    let low = Arc::new(Spec { priority: 10, ..spec("web") });
    let high = Arc::new(Spec { priority: 90, ..spec("urgent") });
    for replica in 0..2 {
        worker.award(ME, placement(replica, 1), &low, award(), (0, 1), true, T).unwrap();
        worker.ended(placement(replica, 1), Outcome::Started(Ok(())), T.0, T.1);
    }
    let (prices, basis) = worker.bid(&high, 3, 0, false, T.0).unwrap();
    assert_eq!((prices.len(), basis.evicts), (1, 1), "one at a time, and dearer than any free place");
    assert!(prices[0] > 600_000);
    assert!(worker.bid(&Spec { priority: 10, ..spec("other") }, 1, 0, false, T.0).is_err(), "not for its equal");
    worker.take_actions();
    let urgent = PlacementId { workload: high.id, replica: 0, epoch: 1 };
    worker.award(ME, urgent, &high, award(), (0, 2), true, T).unwrap();
    worker.invariants();
    let actions = worker.take_actions();
    assert!(started(&actions).is_empty(), "it waits");
    let stopped = |action: &Action| match action {
        Action::Effect(placement, Effect::Stop { .. }) => Some(*placement),
        _ => None,
    };
    let victim = actions.iter().find_map(stopped).expect("one makes way");
    worker.ended(victim, Outcome::Exited(ExitStatus::default()), T.0, T.1);
    assert_eq!(worker.placement(&victim.workload, victim.replica).unwrap().fact.state, PlacementState::Evicted);
    assert_eq!(started(&worker.take_actions()), [urgent]);
    worker.invariants();
}

/// What makes way says so in its fact at once: the next life, which has nothing else, must not count it again.
#[test]
fn what_makes_way_while_it_starts_still_does_after_a_restart() {
    let mut worker = worker();
    let low =
        Arc::new(Spec { priority: 10, resources: Resources { cpu_milli: 1000, memory: 64 << 20 }, ..spec("web") });
    let high = Arc::new(Spec { priority: 90, ..spec("urgent") });
    worker.award(ME, placement(0, 1), &low, award(), (0, 1), true, T).unwrap();
    let urgent = PlacementId { workload: high.id, replica: 0, epoch: 1 };
    worker.award(ME, urgent, &high, award(), (0, 2), true, T).unwrap();
    let written: Vec<_> =
        worker.placements().map(|(key, held)| (*key, Arc::clone(&held.spec), held.fact.clone())).collect();
    let mut next = self::worker();
    for ((workload, replica), spec, fact) in written {
        next.restore(workload, replica, spec, fact);
    }
    next.invariants();
    next.ended(placement(0, 1), Outcome::Adopted(Adopted::Running), T.0, T.1);
    let stops = |action: &Action| matches!(action, Action::Effect(_, Effect::Stop { .. }));
    assert!(next.take_actions().iter().any(stops));
}

#[test]
fn a_successor_in_place_starts_when_its_predecessor_is_deleted() {
    let mut worker = worker();
    let (old, new) = (Arc::new(spec("web")), Arc::new(Spec { command: vec!["other".to_owned()], ..spec("web") }));
    worker.award(ME, placement(0, 1), &old, award(), (0, 1), true, T).unwrap();
    worker.ended(placement(0, 1), Outcome::Started(Ok(())), T.0, T.1);
    worker.take_actions();
    let refused = worker.award(ME, placement(0, 2), &old, award(), (0, 1), true, T);
    assert_eq!(refused, Err(Refusal::FailedHere), "the same form is not replaced by itself");
    worker.award(ME, placement(0, 2), &new, award(), (1, 2), true, T).unwrap();
    assert!(started(&worker.take_actions()).is_empty());
    worker.ended(placement(0, 1), Outcome::Exited(ExitStatus::default()), T.0, T.1);
    assert!(started(&worker.take_actions()).is_empty());
    worker.ended(placement(0, 1), Outcome::Done, T.0, T.1);
    assert_eq!(started(&worker.take_actions()), [placement(0, 2)]);
    worker.invariants();
}

#[test]
fn a_singleton_starts_with_a_lease_and_ends_without() {
    let mut worker = worker();
    let single = Arc::new(Spec { singleton: true, restart: crate::workload::Restart::Always, ..spec("web") });
    let now = T.0 + Duration::from_secs(100);
    worker.award(ME, placement(0, 1), &single, award(), (0, 1), true, (now, T.1)).unwrap();
    let actions = worker.take_actions();
    assert!(started(&actions).is_empty() && actions.iter().any(|action| matches!(action, Action::Lease(_))));
    worker.leased(placement(0, 1), now + MARGIN, now);
    assert!(started(&worker.take_actions()).is_empty(), "one that ends at once is not worth starting with");
    worker.leased(placement(0, 1), now + crate::lease::SHORT, now);
    assert_eq!(started(&worker.take_actions()), [placement(0, 1)]);
    worker.ended(placement(0, 1), Outcome::Started(Ok(())), now, T.1);
    worker.take_actions();
    worker.lapsed(placement(0, 1));
    let stops = |action: &Action| matches!(action, Action::Effect(_, Effect::Stop { grace: Duration::ZERO, .. }));
    assert!(worker.take_actions().iter().any(stops));
    worker.ended(placement(0, 1), Outcome::Exited(ExitStatus { code: 137, out_of_memory: false }), now, T.1);
    assert_eq!(worker.placement(&single.id, 0).unwrap().fact.state, PlacementState::Lost, "not started again here");
    assert!(worker.take_actions().iter().any(|action| matches!(action, Action::Unlease(_))));
}

#[test]
fn room_that_is_held_for_a_gang_is_nobody_else_s_until_it_is_used_or_the_time_is_over() {
    let mut worker = worker();
    let gang = Spec { gang: true, ..spec("gang") };
    assert_eq!(worker.hold(ME, 1, &gang, 2, T.0), Ok(()));
    assert!(worker.bid(&spec("web"), 1, 0, false, T.0).is_err());
    assert_eq!(worker.hold(ME, 2, &gang, 1, T.0), Err(Refusal::OnHold), "but for the other gang there were room");
    let member = PlacementId { workload: gang.id, replica: 0, epoch: 1 };
    let gang = Arc::new(gang);
    assert_eq!(worker.award(ME, member, &gang, award(), (0, 1), true, T), Ok(()), "its own award uses it");
    assert!(worker.bid(&spec("web"), 1, 0, false, T.0).is_err(), "the other half is still held");
    let later = worker.poll_timeout().unwrap();
    worker.handle_timeout(later);
    assert!(worker.bid(&spec("web"), 1, 0, false, later).is_ok());
    worker.invariants();
}

/// The small workload, with what a test wants of a machine.
fn asking(name: &str, change: impl FnOnce(&mut Confinement)) -> Arc<Spec> {
    let mut spec = spec(name);
    spec.resources = Resources { cpu_milli: 10, memory: 1 << 20 };
    change(&mut spec.confinement);
    assert_eq!(spec.check(), Ok(()));
    Arc::new(spec)
}

fn published(host: u16) -> Port {
    Port { host_ip: None, host, container: 80, udp: false }
}

#[test]
fn a_port_leads_to_one_workload_at_a_time() {
    let mut worker = worker();
    let web = asking("web", |asked| asked.ports = vec![published(8080)]);
    let (prices, _) = worker.bid(&web, 3, 0, false, Instant::ZERO).unwrap();
    assert_eq!(prices.len(), 1, "two replicas would want the same port");
    assert_eq!(worker.award(ME, placement(0, 1), &web, award(), (0, 0), true, T), Ok(()));
    let refused = worker.award(ME, placement(1, 1), &web, award(), (0, 0), true, T);
    assert_eq!(refused, Err(Refusal::Port { port: "8080:80".to_owned(), by: "web".to_owned() }));
    for (port, clashes) in [
        (Port { host_ip: Some(Ipv4Addr::LOCALHOST), ..published(8080) }, true),
        (Port { udp: true, ..published(8080) }, false),
        (published(8081), false),
    ] {
        let other = asking("other", |asked| asked.ports = vec![port]);
        assert_eq!(worker.bid(&other, 1, 0, false, Instant::ZERO).is_err(), clashes, "{port}");
    }
    // A later form takes it over in its place, and not beside it.
    let mut newer = Spec::clone(&web);
    newer.env = vec!["A=b".to_owned()];
    let newer = Arc::new(newer);
    assert!(worker.bid(&newer, 1, 0, true, Instant::ZERO).is_ok());
    assert!(worker.award(ME, placement(1, 2), &newer, award(), (0, 1), true, T).is_err());
    assert_eq!(worker.award(ME, placement(0, 2), &newer, award(), (0, 1), true, T), Ok(()));
}

#[test]
fn what_a_machine_does_not_offer_is_refused() {
    let offers = Offers {
        paths: vec!["/srv/data".to_owned(), "/dev/kvm".to_owned()],
        host_network: false,
        devices: BTreeMap::from([("example.org/gpu".to_owned(), vec!["a".to_owned(), "b".to_owned()])]),
        runtimes: vec!["crun".to_owned()],
        processors: BTreeSet::from([0, 1]),
        memory_nodes: BTreeSet::from([0]),
        ulimits: BTreeMap::from([("nofile".to_owned(), 1024)]),
        missing_controllers: BTreeSet::from(["io".to_owned()]),
        missing_capabilities: BTreeSet::from(["BPF".to_owned()]),
        ordinary: false,
    };
    let mut worker = Worker::new(BTreeMap::new(), offers);
    worker.set_load(Resources { cpu_milli: 1000, memory: 256 << 20 }, 0, Instant::ZERO);
    let bind = |source: &str| Mount {
        kind: MountKind::Bind,
        source: source.to_owned(),
        target: "/in".to_owned(),
        read_only: false,
        size: 0,
    };
    let node =
        |source: &str| Device::Node { source: source.to_owned(), target: source.to_owned(), access: "rw".to_owned() };
    let refused =
        |change: &dyn Fn(&mut Confinement)| worker.bid(&asking("job", change), 1, 0, false, Instant::ZERO).err();
    let lacks = |what: &str| Some(Refusal::NotOffered(what.to_owned()));
    assert_eq!(refused(&|asked| asked.network = Some(Network::Host)), lacks("its own network"));
    assert_eq!(refused(&|asked| asked.network = Some(Network::None)), None);
    assert_eq!(refused(&|asked| asked.mounts = vec![bind("/srv/data/in")]), None);
    assert_eq!(refused(&|asked| asked.mounts = vec![bind("/srv/database")]), lacks("/srv/database"));
    assert_eq!(refused(&|asked| asked.devices = vec![node("/dev/kvm")]), None);
    assert_eq!(refused(&|asked| asked.devices = vec![node("/dev/sda")]), lacks("/dev/sda"));
    assert_eq!(refused(&|asked| asked.runtime = Some("crun".to_owned())), None);
    assert_eq!(refused(&|asked| asked.runtime = Some("runsc".to_owned())), lacks("the OCI runtime runsc"));
    assert_eq!(refused(&|asked| asked.limits.cpus = Some("0-1".to_owned())), None);
    assert_eq!(refused(&|asked| asked.limits.cpus = Some("1-2,7".to_owned())), lacks("processor 2"));
    assert_eq!(refused(&|asked| asked.limits.mems = Some("1".to_owned())), lacks("memory node 1"));
    let with = |name: &str| vec![name.to_owned()];
    assert_eq!(refused(&|asked| asked.cap_add = with("ALL")), None);
    let bpf = lacks("the capability BPF, as its node has not got it");
    assert_eq!(refused(&|asked| asked.cap_add = with("BPF")), bpf);
    let ulimit = |name: &str, hard| vec![Ulimit { name: name.to_owned(), soft: 1, hard }];
    assert_eq!(refused(&|asked| asked.limits.ulimits = ulimit("nofile", 1024)), None);
    assert_eq!(refused(&|asked| asked.limits.ulimits = ulimit("nproc", UNLIMITED)), None);
    let too_high = lacks("a limit of 1025 for nofile, as it may not give more than 1024");
    assert_eq!(refused(&|asked| asked.limits.ulimits = ulimit("nofile", 1025)), too_high);
    let none = lacks("no limit for nofile, as it may not give more than 1024");
    assert_eq!(refused(&|asked| asked.limits.ulimits = ulimit("nofile", UNLIMITED)), none);
    let slow = lacks("limits of its disks, as it has no io controller in its cgroups");
    assert_eq!(refused(&|asked| asked.io.weight = Some(100)), slow);
    let count = |kind: &str, count| Device::Count { kind: kind.to_owned(), count };
    assert_eq!(refused(&|asked| asked.devices = vec![count("gpu", 3)]), lacks("3 gpu"));
    assert_eq!(refused(&|asked| asked.devices = vec![count("fpga", 0)]), lacks("1 fpga"));

    let first = asking("first", |asked| asked.devices = vec![count("gpu", 1)]);
    let first_placement = PlacementId { workload: first.id, replica: 0, epoch: 1 };
    assert_eq!(worker.award(ME, first_placement, &first, award(), (0, 0), true, T), Ok(()));
    let bid = |worker: &Worker, device| {
        worker.bid(&asking("job", |asked| asked.devices = vec![device]), 1, 0, false, Instant::ZERO).err()
    };
    assert_eq!(bid(&worker, count("example.org/gpu", 1)), None);
    assert_eq!(bid(&worker, count("gpu", 2)), Some(Refusal::Devices("gpu".to_owned())));
    assert_eq!(bid(&worker, count("gpu", 0)), Some(Refusal::Devices("gpu".to_owned())));
}

/// A node with two GPUs.
fn with_gpus() -> Worker {
    let devices = BTreeMap::from([("example.org/gpu".to_owned(), vec!["a".to_owned(), "b".to_owned()])]);
    let mut worker = Worker::new(BTreeMap::new(), Offers { devices, ..Offers::default() });
    worker.set_load(Resources { cpu_milli: 1000, memory: 256 << 20 }, 0, Instant::ZERO);
    worker
}

fn one_gpu(asked: &mut Confinement) {
    asked.devices = vec![Device::Count { kind: "gpu".to_owned(), count: 1 }];
}

fn starts(worker: &mut Worker) -> Vec<PlacementId> {
    let started = |action| match action {
        Action::Effect(placement, Effect::Start { .. }) => Some(placement),
        _ => None,
    };
    worker.take_actions().into_iter().filter_map(started).collect()
}

#[test]
fn a_gang_holds_devices_and_ports_as_it_holds_room() {
    let mut worker = with_gpus();
    let gang = asking("gang", one_gpu);
    assert_eq!(worker.bid(&gang, 5, 0, false, Instant::ZERO).unwrap().0.len(), 2, "one for each device");
    assert_eq!(worker.hold(ME, 1, &gang, 3, Instant::ZERO), Err(Refusal::OnHold));
    assert_eq!(worker.hold(ME, 1, &gang, 2, Instant::ZERO), Ok(()));
    let other = asking("other", one_gpu);
    assert!(matches!(worker.bid(&other, 1, 0, false, Instant::ZERO), Err(Refusal::Devices(_))));
    let gang_placement = PlacementId { workload: gang.id, replica: 0, epoch: 1 };
    assert_eq!(worker.award(ME, gang_placement, &gang, award(), (0, 0), true, T), Ok(()), "its own");
    worker.unhold(ME, 1);
    assert!(worker.bid(&other, 1, 0, false, Instant::ZERO).is_ok());

    let ported = asking("ported", |asked| asked.ports = vec![published(8080)]);
    assert_eq!(worker.hold(ME, 2, &ported, 1, Instant::ZERO), Ok(()));
    let other = asking("rival", |asked| asked.ports = vec![published(8080)]);
    assert_eq!(worker.bid(&other, 1, 0, false, Instant::ZERO).err(), Some(Refusal::OnHold));
}

#[test]
fn an_update_is_not_awarded_devices_that_its_earlier_form_still_has() {
    let mut worker = with_gpus();
    let old = asking("job", one_gpu);
    let place = |replica, epoch| PlacementId { workload: old.id, replica, epoch };
    for replica in 0..2 {
        assert_eq!(worker.award(ME, place(replica, 1), &old, award(), (0, 0), true, T), Ok(()));
    }
    let mut new = Spec::clone(&old);
    new.env = vec!["A=b".to_owned()];
    let new = Arc::new(new);
    assert!(worker.bid(&new, 1, 0, false, Instant::ZERO).is_err(), "not beside them");
    assert!(worker.bid(&new, 1, 0, true, Instant::ZERO).is_ok(), "in the place of one");
    assert!(worker.award(ME, place(2, 2), &new, award(), (0, 1), true, T).is_err());
    assert_eq!(worker.award(ME, place(1, 2), &new, award(), (0, 1), true, T), Ok(()));
}

#[test]
fn what_a_predecessor_still_has_is_waited_for() {
    let mut worker = worker();
    let ended = |worker: &mut Worker, placement, outcome| worker.ended(placement, outcome, T.0, T.1);
    let old = asking("web", |asked| asked.ports = vec![published(8080)]);
    assert_eq!(worker.award(ME, placement(0, 1), &old, award(), (0, 0), true, T), Ok(()));
    ended(&mut worker, placement(0, 1), Outcome::Started(Ok(())));
    assert_eq!(starts(&mut worker), [placement(0, 1)]);
    let mut new = Spec::clone(&old);
    new.confinement.ports = vec![published(9090)];
    assert_eq!(worker.award(ME, placement(0, 2), &Arc::new(new), award(), (0, 1), true, T), Ok(()));
    let other = asking("other", |asked| asked.ports = vec![published(8080)]);
    let other_placement = PlacementId { workload: other.id, replica: 0, epoch: 1 };
    assert_eq!(worker.award(ME, other_placement, &other, award(), (0, 0), true, T), Ok(()));
    assert_eq!(starts(&mut worker), [], "the port is being given up");
    ended(&mut worker, placement(0, 1), Outcome::Exited(ExitStatus { code: 0, out_of_memory: false }));
    ended(&mut worker, placement(0, 1), Outcome::Done);
    let mut started = starts(&mut worker);
    started.sort();
    let mut both = [placement(0, 2), other_placement];
    both.sort();
    assert_eq!(started, both);
}

#[test]
fn what_is_said_of_a_container_is_forgotten_with_its_end_and_shown_as_plain_text() {
    let mut worker = worker();
    let spec = asking("web", |_| ());
    assert_eq!(worker.award(ME, placement(0, 1), &spec, award(), (0, 0), true, T), Ok(()));
    worker.ended(placement(0, 1), Outcome::Started(Ok(())), T.0, T.1);
    worker.note(placement(0, 1), "healthy\u{1b}[31m".to_owned());
    assert_eq!(worker.placement(&spec.id, 0).unwrap().fact.detail, "healthy [31m");
    worker.ended(placement(0, 1), Outcome::Exited(ExitStatus { code: 1, out_of_memory: false }), T.0, T.1);
    assert_eq!(worker.placement(&spec.id, 0).unwrap().fact.detail, "");
}

#[test]
fn an_ordinary_user_s_node_refuses_what_it_cannot_hold_to() {
    let mut worker = Worker::new(BTreeMap::new(), Offers { ordinary: true, ..Offers::default() });
    worker.set_load(Resources { cpu_milli: 1000, memory: 256 << 20 }, 0, Instant::ZERO);
    let refused = |change: &dyn Fn(&mut Spec)| {
        let mut spec = Spec::clone(&asking("job", |_| ()));
        spec.resources = Resources::default();
        change(&mut spec);
        worker.bid(&spec, 1, 0, false, Instant::ZERO).err().map(|refusal| refusal.to_string())
    };
    assert_eq!(refused(&|_| ()), None);
    assert_eq!(refused(&|spec| spec.confinement.network = Some(Network::None)), None);
    let lacks = |what: &str| Some(format!("does not offer {what}, as it runs as an ordinary user"));
    assert_eq!(refused(&|spec| spec.confinement.network = Some(Network::Bridge)), lacks("a bridge"));
    assert_eq!(refused(&|spec| spec.confinement.ports = vec![published(80)]), lacks("a bridge"));
    assert_eq!(refused(&|spec| spec.confinement.sandbox = Sandbox::Strict), lacks("a strict sandbox"));
    assert_eq!(refused(&|spec| spec.resources.memory = 1 << 20), lacks("limits"));
    assert_eq!(refused(&|spec| spec.pids = 5), lacks("limits"));
}

/// It reads of an image that is still coming; a plain one waits for all of it.
#[test]
fn what_is_lazy_starts_with_the_lists_and_is_killed_when_they_lied() {
    let (mut worker, now) = (worker(), Instant::ZERO);
    let lazy = Arc::new(Spec { lazy: true, restart: crate::workload::Restart::Always, ..spec("web") });
    let plain = Arc::new(Spec { id: spec("other").id, ..spec("web") });
    let root = lazy.image.root;
    let other = PlacementId { workload: plain.id, replica: 0, epoch: 1 };
    worker.award(ME, placement(0, 1), &lazy, award(), (0, 0), false, T).unwrap();
    worker.award(ME, other, &plain, award(), (0, 0), false, T).unwrap();
    assert_eq!(started(&worker.take_actions()), []);
    worker.image_listed(&root, now);
    assert_eq!(started(&worker.take_actions()), [placement(0, 1)]);
    // It cannot be had for now: what runs reads what there is. That it lies is another matter, also while it starts.
    worker.image_failed(&root, false, "no live node has it", now);
    assert_eq!(worker.placement(&lazy.id, 0).unwrap().fact.state, PlacementState::Starting);
    assert_eq!(worker.placement(&plain.id, 0).unwrap().fact.state, PlacementState::Failed);
    worker.image_failed(&root, true, "a tree that is none", now);
    worker.take_actions();
    worker.ended(placement(0, 1), Outcome::Started(Ok(())), now, UnixMillis(1));
    let kills = |action: &Action| matches!(action, Action::Effect(_, Effect::Stop { grace: Duration::ZERO, .. }));
    assert_eq!(worker.take_actions().iter().filter(|action| kills(action)).count(), 1);
    worker.ended(placement(0, 1), Outcome::Exited(ExitStatus { code: 137, out_of_memory: false }), now, UnixMillis(1));
    let held = worker.placement(&lazy.id, 0).unwrap();
    assert_eq!(held.fact.state, PlacementState::Failed, "and is not started again here");
    assert!(held.fact.detail.contains("a tree that is none"), "{}", held.fact.detail);
    worker.invariants();
}

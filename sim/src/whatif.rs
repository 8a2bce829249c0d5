//! What would happen to a real mesh: its catalog loaded into the simulator, some of its machines killed, and watched.
//!
//! A [`Model`] is what matters of a mesh for that: machines with what they have, images and who has them, workloads, and
//! where each replica runs. The simulated machines have keys of their own, so its facts are said anew, by them; the
//! protocol nodes that judge, bid and start are the real code. What a model does not know is guessed: 5 ms a way and
//! 100 MB/s between any two machines, no pressure, starts of 10 ms.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use moyai_protocol::auction::Award;
use moyai_protocol::catalog::{
    Body, Fact, Hlc, ImageHeld, Key, NodeFact, PlacementFact, Rollout, WorkloadFact, form, vouch,
};
use moyai_protocol::codec;
use moyai_protocol::contract::{Command, RecordKey};
use moyai_protocol::id::ChunkId;
use moyai_protocol::lease::{Seats, seats_for};
use moyai_protocol::time::{Instant, UnixMillis};
use moyai_protocol::worker::{ExitStatus, PlacementState};
use moyai_protocol::workload::{ImagePin, PlacementId, Resources, SignedSpec, Spec};
use serde::{Deserialize, Serialize};

use crate::Simulator;
use crate::checkers::Happened;
use crate::host::FakeContainer;
use crate::options::{Options, Scenario};
use crate::simulator::EPOCH;

/// The longest that is watched after the deaths.
const WATCH: Duration = Duration::from_secs(120);
/// When nothing has started for so long and nothing is on its way, nothing more will.
const QUIET: Duration = Duration::from_secs(40);
/// When the machines die: the mesh has settled by then.
const DEATH: Duration = Duration::from_secs(3);

/// A machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// What people call it.
    pub name: String,
    /// All it can give.
    pub capacity: Resources,
    /// What constraints are matched against.
    pub labels: BTreeMap<String, String>,
    /// Images that are complete on it.
    pub images: Vec<ChunkId>,
    /// Whether it is being emptied.
    pub draining: bool,
}

/// A mesh, as far as it matters for what would move where.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Model {
    /// Its machines.
    pub machines: Vec<Machine>,
    /// Its images.
    pub images: Vec<ImagePin>,
    /// What is wanted, and how many of each.
    pub workloads: Vec<(Spec, u32)>,
    /// What runs: by number, which machine, which workload, which replica, and its epoch.
    pub placements: Vec<(usize, usize, u32, u64)>,
    /// What has run to its end, in the same way; it is not wanted again.
    pub finished: Vec<(usize, usize, u32, u64)>,
    /// The custodians of singletons, by workload, as far as they are among the machines.
    pub custodians: BTreeMap<usize, Vec<usize>>,
}

/// Something that would come up elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// `name.replica`.
    pub replica: String,
    /// Where it ran.
    pub from: String,
    /// Where it would run.
    pub to: String,
    /// Milliseconds from the death of its machine.
    pub after_ms: u64,
}

/// What would happen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// What would come up elsewhere, in this order.
    pub moved: Vec<Moved>,
    /// What would not: `name.replica`, and why.
    pub stuck: Vec<(String, String)>,
    /// What would have ended for it on a machine that lives: `name.replica`, where.
    pub evicted: Vec<(String, String)>,
}

/// What would happen if these machines died at once.
pub fn ask(model: &Model, kill: &[usize], seed: u64) -> Answer {
    let options = Options {
        cold: true,
        safety: DEATH + WATCH,
        liveness: Duration::ZERO,
        ..Options::new(Scenario::Idle, seed, model.machines.len())
    };
    let mut mesh = Simulator::bare(options, model.images.iter().map(|image| (image.root, image.size)).collect());
    let names = load(&mut mesh, model);
    let name = |placement: &PlacementId| {
        names
            .get(&placement.workload)
            .map_or_else(|| placement.to_string(), |name| format!("{name}.{}", placement.replica + 1))
    };
    let dead: BTreeSet<usize> = kill.iter().copied().collect();
    while mesh.step(Instant::ZERO + DEATH) {}
    // What a drain has moved meanwhile is not lost with the machine it was on.
    let runs = mesh.running();
    let only = runs.iter().filter(|(_, places)| places.iter().all(|place| dead.contains(place)));
    let lost: BTreeMap<_, usize> = only.map(|(replica, places)| (*replica, places[0])).collect();
    for machine in &dead {
        mesh.kill_machine(*machine);
    }
    mesh.take_happened();
    let began = mesh.now();
    let (mut answer, mut last, mut back) = (Answer::default(), began, BTreeSet::new());
    let end = began + WATCH;
    while mesh.step(end) && mesh.now().since(last) < QUIET && back.len() < lost.len() {
        for what in mesh.take_happened() {
            match what {
                Happened::Started { at, placement } => {
                    last = mesh.now();
                    let replica = (placement.workload, placement.replica);
                    let (Some(from), to) = (lost.get(&replica), model.machines[at].name.clone()) else { continue };
                    if back.insert(replica) {
                        let from = model.machines[*from].name.clone();
                        let after_ms = mesh.now().since(began).as_millis() as u64;
                        answer.moved.push(Moved { replica: name(&placement), from, to, after_ms });
                    }
                }
                Happened::Ended { .. } | Happened::Disturbed => {}
            }
        }
    }
    for (at, node) in mesh.up() {
        let held = node.worker().placements().filter(|(_, held)| held.fact.state == PlacementState::Evicted);
        for ((workload, replica), held) in held {
            let placement = PlacementId { workload: *workload, replica: *replica, epoch: held.fact.epoch };
            answer.evicted.push((name(&placement), model.machines[at].name.clone()));
        }
    }
    for (workload, replica) in lost.keys().filter(|replica| !back.contains(replica)) {
        let known = mesh.up().find_map(|(_, node)| node.catalog().pending(workload));
        let reasons = known.map(|record| &record.refused[..]).unwrap_or_default();
        let reasons: Vec<String> = reasons.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
        let why = if reasons.is_empty() { "nobody would take it in time".to_owned() } else { reasons.join(", ") };
        answer.stuck.push((format!("{}.{}", names[workload], replica + 1), why));
    }
    answer
}

/// Says everything of a model to a mesh that knows nothing yet; names by workload.
fn load(mesh: &mut Simulator, model: &Model) -> BTreeMap<moyai_protocol::id::WorkloadId, String> {
    let (facts, names) = facts(mesh, model);
    for (at, machine) in model.machines.iter().enumerate() {
        let host = mesh.host_mut(at);
        (host.name, host.capacity, host.labels) = (machine.name.clone(), machine.capacity, machine.labels.clone());
        machine.images.iter().for_each(|root| host.give_image(root));
        // Its own, and what they rest on; the rest everybody is told of at once.
        let (id, own) = (host.id, |key: &Key| key.owner());
        let mine: BTreeSet<_> = facts
            .iter()
            .filter_map(|fact| match fact.key {
                Key::Placement(node, workload, _) if node == id => Some(workload),
                _ => None,
            })
            .collect();
        for fact in &facts {
            let needed = own(&fact.key) == Some(id)
                || matches!(fact.key, Key::Workload(workload) if at == 0 || mine.contains(&workload))
                || fact.key == Key::Node(facts[0].author);
            if needed {
                host.write(RecordKey::Fact(fact.key), codec::encode(&**fact));
            }
        }
        for (_, workload, replica, epoch) in model.placements.iter().filter(|(machine, ..)| *machine == at) {
            let placement = PlacementId { workload: model.workloads[*workload].0.id, replica: *replica, epoch: *epoch };
            host.running.insert(placement, FakeContainer::default());
        }
    }
    for at in 0..model.machines.len() {
        mesh.boot(at);
        for image in model.images.iter().filter(|image| model.machines[at].images.contains(&image.root)) {
            let (reference, id, root, size) = (image.reference.clone(), image.id, image.root, image.size);
            mesh.command(
                at,
                Command::ImageAdded(ImageHeld {
                    reference,
                    id,
                    root,
                    size,
                    named: Hlc::default(),
                    here: true,
                    original: None,
                }),
            );
        }
    }
    mesh.know_one_another();
    for (at, _) in model.machines.iter().enumerate().filter(|(_, machine)| machine.draining) {
        let node = mesh.hosts()[at].id;
        mesh.command(at, Command::Drain { node, draining: true });
    }
    names
}

type Names = BTreeMap<moyai_protocol::id::WorkloadId, String>;

/// The facts of a model, as said by the simulated machines.
fn facts(mesh: &Simulator, model: &Model) -> (Vec<Arc<Fact>>, Names) {
    let (mut facts, mut names, mut forms) = (Vec::new(), Names::new(), Vec::new());
    let version = Hlc::at(UnixMillis(EPOCH));
    let Some(first) = mesh.hosts().first() else { return (facts, names) };
    let (key, chain) = first.keys();
    let members: Vec<_> = mesh.hosts().iter().map(|host| host.id).collect();
    // Without its report nothing else that a node says is believed.
    for (host, machine) in mesh.hosts().iter().zip(&model.machines) {
        let (key, chain) = host.keys();
        let report = NodeFact {
            name: machine.name.clone(),
            version: String::new(),
            capacity: machine.capacity,
            labels: machine.labels.clone(),
            data: Vec::new(),
            images: Vec::new(),
            unnamed: Vec::new(),
            fetching: Vec::new(),
            chain: chain.clone(),
            vouch: vouch(key, chain),
        };
        facts.push(Arc::new(Fact::sign(Key::Node(host.id), version, &Body::Node(report), key)));
    }
    for (number, (spec, replicas)) in model.workloads.iter().enumerate() {
        names.insert(spec.id, spec.name.clone());
        let signed = SignedSpec::sign(spec, key, chain.clone(), EPOCH / 1000).ok();
        forms.push(signed.as_ref().map(form));
        // One that cannot be signed again could not have been submitted.
        let Some(signed) = signed else { continue };
        let known = model.custodians.get(&number).filter(|known| !known.is_empty());
        let seats = match known {
            Some(known) => known.iter().filter_map(|at| members.get(*at).copied()).collect(),
            None => members.iter().copied().take(seats_for(members.len())).collect(),
        };
        let fact = WorkloadFact {
            spec: signed,
            generation: 0,
            revived: 0,
            replicas: *replicas,
            removed: false,
            previous: None,
            rollout: Rollout::default(),
            setback: String::new(),
            seats: spec.singleton.then(|| Seats::first(seats)),
            author: chain.clone(),
        };
        facts.push(Arc::new(Fact::sign(Key::Workload(spec.id), version, &Body::Workload(fact), key)));
    }
    let auctioneer = Arc::new(chain.clone());
    let running = model.placements.iter().map(|placement| (placement, PlacementState::Running));
    let exited = PlacementState::Exited(ExitStatus::default());
    let finished = model.finished.iter().map(|placement| (placement, exited.clone()));
    for ((machine, workload, replica, epoch), state) in running.chain(finished) {
        let Some(form) = forms.get(*workload).copied().flatten() else { continue };
        let host = &mesh.hosts()[*machine];
        let id = model.workloads[*workload].0.id;
        let placement = PlacementId { workload: id, replica: *replica, epoch: *epoch };
        let fact = PlacementFact {
            epoch: *epoch,
            state,
            detail: String::new(),
            restarts: 0,
            stopped: false,
            generation: 0,
            form,
            accepted: EPOCH,
            started: EPOCH,
            award: Award::sign(&placement, &host.id, UnixMillis(EPOCH), key, Arc::clone(&auctioneer)),
        };
        let key = Key::Placement(host.id, id, *replica);
        facts.push(Arc::new(Fact::sign(key, version, &Body::Placement(fact), host.keys().0)));
    }
    (facts, names)
}

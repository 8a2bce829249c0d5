//! How the node's state becomes what the API shows. Pure: each function looks at a node and returns plain data.

use moyai_protocol::auction::{Cause, Journal, Record};
use moyai_protocol::catalog::{Hlc, ImageHeld, NodeFact, Placement, Workload};
use moyai_protocol::custody;
use moyai_protocol::exchange::Receipt;
use moyai_protocol::id::{ChunkId, NodeId, WorkloadId};
use moyai_protocol::membership::State;
use moyai_protocol::node::Node;
use moyai_protocol::reference::Reference;
use moyai_protocol::trust::{Role, mesh_name};
use moyai_protocol::worker::PlacementState;
use moyai_protocol::workload::{ImagePin, PlacementId, Resources};

use moyai_sim::whatif::{Machine, Model};

use super::types::{
    Came, EpochRow, Failure, ImageRow, NodeRow, Ordered, PlaceRow, QuoteRow, RolloutRow, Row, Status, WhyRow,
};
use crate::daemon::driver::wall_now;
use moyai_protocol::id::MeshId;

/// What people call a node.
pub(super) fn name_of(node: &Node, id: &NodeId) -> String {
    match node.catalog().node(id) {
        Some(fact) if !fact.name.is_empty() => fact.name.clone(),
        _ => id.short(),
    }
}

fn state_name(state: &PlacementState) -> String {
    match state {
        PlacementState::Fetching => "fetching",
        PlacementState::Blocked => "blocked",
        PlacementState::Starting => "starting",
        PlacementState::Running => "running",
        PlacementState::Waiting => "waiting",
        PlacementState::Stopping => "stopping",
        PlacementState::Exited(_) => "exited",
        PlacementState::Failed => "failed",
        PlacementState::Lost => "lost",
        PlacementState::Evicted => "evicted",
    }
    .to_owned()
}

/// The placement that counts for a replica: the latest try on a live node, else the latest that has finished, else the
/// latest of all.
fn standing<'a>(node: &'a Node, workload: &WorkloadId, replica: u32) -> Option<Placement<'a>> {
    let live = |placement: &Placement<'_>| node.membership().is_live(&placement.node);
    node.catalog().placements_of(workload).filter(|placement| placement.replica == replica).max_by_key(|placement| {
        let exited = matches!(placement.fact.state, PlacementState::Exited(_));
        // While it is being moved, what runs is shown, not what is to follow it.
        let running = placement.fact.state == PlacementState::Running;
        let active = live(placement) && placement.fact.state.is_active();
        let rank = if active { 2 + u8::from(running) } else { u8::from(exited) };
        (rank, placement.fact.epoch, std::cmp::Reverse(placement.node))
    })
}

/// Every replica of every workload.
pub(super) fn rows(node: &Node) -> Vec<Row> {
    let mut rows: Vec<Row> = node.catalog().workloads().flat_map(|workload| rows_of(node, &workload)).collect();
    rows.sort_by(|a, b| (a.submitted, &a.name, a.replica).cmp(&(b.submitted, &b.name, b.replica)));
    rows
}

/// Every replica of one workload: those wanted, and those that have ended and are kept.
pub(super) fn rows_of(node: &Node, workload: &Workload<'_>) -> Vec<Row> {
    let spec = workload.spec;
    let known = node.catalog().placements_of(&spec.id).map(|placement| placement.replica + 1).max().unwrap_or(0);
    let count = workload.fact.replicas.max(known);
    (0..count)
        .filter_map(|replica| {
            let placement = standing(node, &spec.id, replica);
            let wanted = replica < workload.fact.replicas;
            if placement.is_none() && !wanted {
                return None;
            }
            let mut row = Row {
                id: spec.id.short(),
                name: spec.name.clone(),
                image: spec.image.reference.brief(),
                node: String::new(),
                state: "pending".to_owned(),
                replica: replica + 1,
                epoch: 0,
                started: 0,
                wanted: workload.fact.replicas,
                restarts: 0,
                exit_code: None,
                detail: String::new(),
                submitted: workload.fact.spec.signed_at * 1000,
                command: spec.entrypoint.iter().flatten().chain(&spec.command).cloned().collect(),
                terminal: spec.terminal,
                ports: spec.confinement.ports.iter().map(ToString::to_string).collect(),
            };
            match placement {
                Some(placement) => fill(node, &mut row, &placement),
                None => row.detail = pending_reason(node, &spec.id),
            }
            Some(row)
        })
        .collect()
}

fn fill(node: &Node, row: &mut Row, placement: &Placement<'_>) {
    let fact = placement.fact;
    row.node = name_of(node, &placement.node);
    row.state = state_name(&fact.state);
    row.epoch = fact.epoch;
    row.started = fact.started;
    row.restarts = fact.restarts;
    row.detail = fact.detail.clone();
    if let PlacementState::Exited(status) = fact.state {
        row.exit_code = Some(status.code);
        if status.out_of_memory && row.detail.is_empty() {
            row.detail = "killed: out of memory".to_owned();
        }
    } else if matches!(fact.state, PlacementState::Lost | PlacementState::Evicted) {
        // It is placed anew, unless that was tried in vain.
        let pending = pending_reason(node, &placement.workload);
        if !pending.is_empty() {
            row.state = "pending".to_owned();
            row.detail = format!("{}; {pending}", row.detail);
        }
    } else if !node.membership().is_live(&placement.node) {
        row.state = "lost".to_owned();
        row.detail = format!("{} is down", row.node);
        let pending = pending_reason(node, &placement.workload);
        if !pending.is_empty() {
            row.state = "pending".to_owned();
            row.detail = pending;
        }
    }
}

fn pending_reason(node: &Node, workload: &WorkloadId) -> String {
    node.catalog().pending(workload).map_or_else(String::new, |record| match record.refused.as_slice() {
        [] => "no node could be asked".to_owned(),
        refused => {
            let reasons: Vec<String> = refused.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
            format!("no node takes it: {}", reasons.join(", "))
        }
    })
}

/// Every node this one knows of.
pub(super) fn nodes(node: &Node) -> Vec<NodeRow> {
    let mut rows = vec![node_row(node, &node.id(), "alive".to_owned(), node.membership().own_addresses().to_vec())];
    for (id, member) in node.membership().members() {
        // Never heard of and never answered: an address from an old invitation, not a node.
        if member.incarnation == 0 && node.catalog().node(id).is_none() {
            continue;
        }
        let state = match member.state {
            State::Alive => "alive",
            State::Suspect => "suspect",
            State::Down => "down",
            State::Left => "left",
        };
        rows.push(node_row(node, id, state.to_owned(), member.addresses.clone()));
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

fn node_row(node: &Node, id: &NodeId, state: String, addresses: Vec<String>) -> NodeRow {
    let fact = node.catalog().node(id);
    let active: Vec<Placement<'_>> = node
        .catalog()
        .placements()
        .filter(|placement| placement.node == *id && placement.fact.state.is_active())
        .filter(|placement| node.membership().is_live(&placement.node))
        .collect();
    let reserved = active.iter().filter_map(|placement| node.catalog().workload(&placement.workload));
    let reserved = reserved.fold(Resources::default(), |sum, workload| sum.plus(&workload.spec.resources));
    let capacity = fact.map(|fact| fact.capacity).unwrap_or_default();
    let role = fact.and_then(NodeFact::role);
    NodeRow {
        id: id.short(),
        name: name_of(node, id),
        state,
        role: role.map_or_else(String::new, |role| role.to_string()),
        here: *id == node.id(),
        cpu_milli: (capacity.cpu_milli, reserved.cpu_milli),
        memory: (capacity.memory, reserved.memory),
        placements: active.len() as u32,
        images: fact.map_or(0, |fact| fact.images.len() as u32),
        addresses,
        version: fact.map_or_else(String::new, |fact| fact.version.clone()),
        labels: fact.map(|fact| fact.labels.clone()).unwrap_or_default(),
        draining: node.catalog().is_draining(id),
    }
}

/// What live nodes have, under names that have not been taken back since.
fn named(node: &Node) -> impl Iterator<Item = (NodeId, &NodeFact, &ImageHeld)> {
    let taken_back = moyai_protocol::node::taken_back(node.catalog());
    let live = node.catalog().nodes().filter(|(id, _)| node.membership().is_live(id));
    live.flat_map(|(id, fact)| fact.images.iter().map(move |image| (id, fact, image)))
        .filter(move |(.., image)| taken_back.get(&image.reference).is_none_or(|at| image.named > *at))
}

/// Every image that some live node has.
pub(super) fn images(node: &Node) -> Vec<ImageRow> {
    let mut rows: std::collections::BTreeMap<&Reference, (&ImageHeld, Vec<String>)> = Default::default();
    for (id, _, image) in named(node) {
        let entry = rows.entry(&image.reference).or_insert_with(|| (image, Vec::new()));
        if (image.named, image.root) > (entry.0.named, entry.0.root) {
            *entry = (image, Vec::new());
        }
        if image.root == entry.0.root && image.holds(&image.root) {
            entry.1.push(name_of(node, &id));
        }
    }
    rows.into_values()
        .map(|(image, mut nodes)| {
            nodes.sort();
            ImageRow {
                reference: image.reference.familiar(),
                id: format!("sha256:{}", image.id),
                size: image.size,
                nodes,
            }
        })
        .collect()
}

/// The image that a text names, to be run.
pub(super) fn find_image(node: &Node, text: &str) -> Result<ImagePin, Failure> {
    let held = find_held(node, text)?;
    if !held.is_image() {
        return Err(Failure {
            error: format!("`{text}` is not an image that this kind of machine can run"),
            hint: "`moyai image save` gives it back as it came".to_owned(),
        });
    }
    Ok(ImagePin { reference: held.reference, id: held.id, root: held.root, size: held.size })
}

/// What a text names: a reference, or the beginning of an id.
pub(crate) fn find_held(node: &Node, text: &str) -> Result<ImageHeld, Failure> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let is_id = hex.len() >= 4 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    let reference = text.parse::<Reference>();
    if let Ok(reference) = &reference
        && let Some(held) = find_reference(node, reference)
    {
        return Ok(held);
    }
    if is_id {
        let found: std::collections::BTreeMap<_, &ImageHeld> = named(node)
            .map(|(.., image)| image)
            .filter(|image| image.id.to_string().starts_with(&hex.to_lowercase()))
            .map(|image| (image.id, image))
            .collect();
        match found.values().collect::<Vec<_>>().as_slice() {
            [] => {}
            [held] => return Ok((**held).clone()),
            many => {
                let error = format!("`{text}` is the beginning of {} images' ids", many.len());
                return Err(Failure { error, hint: "write more of it; `moyai images` shows them".to_owned() });
            }
        }
    }
    match reference {
        Err(error) if !is_id => Err(Failure {
            error: error.to_string(),
            hint: "an image is named like alpine, alpine:3.20 or host/name:tag".to_owned(),
        }),
        _ => Err(no_image(node, text)),
    }
}

/// What has this name.
pub(crate) fn find_reference(node: &Node, reference: &Reference) -> Option<ImageHeld> {
    // A worker may hold an image under a name, and may not decide what the name means.
    let all = named(node).filter(|(.., image)| image.reference == *reference);
    let last = all.max_by_key(|(_, fact, image)| (fact.role() >= Some(Role::Submitter), image.named, image.root));
    last.map(|(.., image)| image.clone())
}

/// Every name of the mesh, each with what has it.
pub(crate) fn all_named(node: &Node) -> Vec<ImageHeld> {
    type Rank = (bool, Hlc, ChunkId);
    let mut best: std::collections::BTreeMap<&Reference, (Rank, &ImageHeld)> = Default::default();
    for (_, fact, image) in named(node) {
        let rank = (fact.role() >= Some(Role::Submitter), image.named, image.root);
        let entry = best.entry(&image.reference).or_insert((rank, image));
        if rank > entry.0 {
            *entry = (rank, image);
        }
    }
    best.into_values().map(|(_, image)| image.clone()).collect()
}

/// Workloads that need an image which has no other name than this one, now or before it was given anew.
pub(crate) fn users_of(node: &Node, reference: &Reference) -> Vec<String> {
    let roots = |own: bool| {
        let all = named(node).filter(move |(.., image)| (image.reference == *reference) == own);
        all.map(|(.., image)| image.root).collect::<std::collections::BTreeSet<_>>()
    };
    let (own, others) = (roots(true), roots(false));
    let lost = |root: &ChunkId| own.contains(root) && !others.contains(root);
    let users = node.catalog().workloads().filter(|known| known.fact.replicas > 0 && lost(&known.spec.image.root));
    users.map(|known| known.spec.name.clone()).collect()
}

/// What is said of a node that is getting an image.
pub(super) const FETCHING: &str = "fetching";

/// Nodes that have an image, or are getting it. `all` is how many chunks its files have.
pub(super) fn places(node: &Node, held: &ImageHeld, all: Option<u32>) -> Vec<PlaceRow> {
    let parts = node.parts(&held.root);
    let original = held.original.as_ref().map(|original| original.root);
    let mut rows: Vec<PlaceRow> = Vec::new();
    for (id, fact) in node.catalog().nodes().filter(|(id, _)| node.membership().is_live(id)) {
        let word =
            |root: &ChunkId| match (fact.images.iter().any(|image| image.holds(root)), fact.fetching.contains(root)) {
                (true, _) => "whole".to_owned(),
                (false, true) => FETCHING.to_owned(),
                (false, false) => String::new(),
            };
        let row = PlaceRow {
            node: name_of(node, &id),
            image: word(&held.root),
            chunks: parts
                .get(&id)
                .filter(|_| fact.fetching.contains(&held.root))
                .map(|here| (all.map_or(*here, |all| all.min(*here)), all)),
            original: original.as_ref().map(word).unwrap_or_default(),
        };
        if !(row.image.is_empty() && row.original.is_empty()) {
            rows.push(row);
        }
    }
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    rows
}

/// How an image came, with the nodes' names.
pub(super) fn came(node: &Node, receipt: &Receipt) -> Came {
    let mut from: Vec<(String, u64)> = receipt.from.iter().map(|(id, bytes)| (name_of(node, id), *bytes)).collect();
    from.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    Came { from, had: receipt.had, took: receipt.took.as_millis() as u64 }
}

fn no_image(node: &Node, text: &str) -> Failure {
    let near = images(node).into_iter().map(|row| row.reference.trim_end_matches(":latest").to_owned());
    let near = near.map(|name| (distance(&name, text), name)).filter(|(far, name)| *far <= 2.max(name.len() / 4)).min();
    let hint = match near {
        Some((_, name)) => {
            format!(
                "did you mean `{name}`? `moyai images` lists what the mesh has; `moyai pull` fetches from a registry"
            )
        }
        None => format!("`moyai pull {text}` fetches it from its registry; `moyai load FILE` adds one from a file"),
    };
    Failure { error: format!("no image `{text}` in this mesh"), hint }
}

/// Edits from one word to another (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

/// A workload, and one replica of it where the text names one (`web.2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) workload: WorkloadId,
    pub(super) replica: Option<u32>,
}

/// The workload that a text names: a name, a name with a replica, or the beginning of an id.
pub(super) fn find_workload(node: &Node, text: &str) -> Result<Found, Failure> {
    let by_name = |name: &str| -> Vec<WorkloadId> {
        node.catalog()
            .workloads()
            .filter(|workload| workload.spec.name == name)
            .map(|workload| workload.spec.id)
            .collect()
    };
    let by_id = |text: &str| -> Vec<WorkloadId> {
        let begins = |id: &WorkloadId| text.len() >= 2 && id.to_string().starts_with(&text.to_lowercase());
        node.catalog().workloads().map(|workload| workload.spec.id).filter(begins).collect()
    };
    let with_replica =
        text.rsplit_once('.').and_then(|(name, number)| Some((name, number.parse::<u32>().ok()?.checked_sub(1)?)));
    // A name may end like a replica, and begin like an id: what it is whole comes first.
    let mut ways = vec![(by_name(text), None)];
    ways.extend(with_replica.map(|(name, replica)| (by_name(name), Some(replica))));
    ways.push((by_id(text), None));
    ways.extend(with_replica.map(|(id, replica)| (by_id(id), Some(replica))));
    let (found, replica) = ways.into_iter().find(|(found, _)| !found.is_empty()).unwrap_or_default();
    match found.as_slice() {
        [workload] => Ok(Found { workload: *workload, replica }),
        [] => Err(Failure {
            error: format!("no workload `{text}` in this mesh"),
            hint: "`moyai ps -a` lists them all".to_owned(),
        }),
        many => Err(Failure {
            error: format!(
                "`{text}` may be any of {} workloads: {}",
                many.len(),
                many.iter().map(WorkloadId::short).collect::<Vec<_>>().join(", ")
            ),
            hint: "write one of these ids".to_owned(),
        }),
    }
}

/// Where the logs of a workload's replicas are.
pub(super) fn log_places(node: &Node, found: Found) -> Vec<(u32, NodeId, PlacementId)> {
    let Some(workload) = node.catalog().workload(&found.workload) else { return Vec::new() };
    let known = node.catalog().placements_of(&found.workload).map(|placement| placement.replica + 1).max().unwrap_or(0);
    (0..workload.fact.replicas.max(known))
        .filter(|replica| found.replica.is_none_or(|only| only == *replica))
        .filter_map(|replica| standing(node, &found.workload, replica))
        .map(|placement| {
            let id =
                PlacementId { workload: placement.workload, replica: placement.replica, epoch: placement.fact.epoch };
            (placement.replica, placement.node, id)
        })
        .collect()
}

/// Why each replica is where it is.
pub(super) fn why(node: &Node, found: Found) -> Vec<WhyRow> {
    let Some(workload) = node.catalog().workload(&found.workload) else { return Vec::new() };
    let rows = rows_of(node, &workload);
    rows.into_iter()
        .filter(|row| found.replica.is_none_or(|only| only + 1 == row.replica))
        .map(|row| {
            let placement = standing(node, &found.workload, row.replica - 1);
            let pending = node.catalog().pending(&found.workload).filter(|_| row.state == "pending");
            let award = placement.as_ref().map(|placement| &placement.fact.award);
            let record = pending.or_else(|| {
                let award = award?;
                let journal = node.catalog().journal(&award.auctioneer, &found.workload)?;
                journal.records.iter().find(|record| record.at == award.at)
            });
            let mut why = why_row(node, row, record);
            if let Some(award) = award.filter(|_| record.is_none()) {
                // Its auctioneer has forgotten the rest.
                (why.auctioneer, why.at) = (name_of(node, &award.auctioneer), award.at.0);
            }
            why.history = history(node, &found.workload, &why.replica);
            why.custodians = custodians(node, &found.workload);
            why
        })
        .collect()
}

fn why_row(node: &Node, row: Row, record: Option<&Record>) -> WhyRow {
    let mut why = WhyRow {
        replica: format!("{}.{}", row.name, row.replica),
        state: row.state,
        node: row.node,
        epoch: row.epoch,
        cause: String::new(),
        auctioneer: String::new(),
        at: 0,
        took: 0,
        asked: (0, 0),
        quotes: Vec::new(),
        more_quotes: 0,
        refusals: Vec::new(),
        refused: Vec::new(),
        detail: row.detail,
        history: Vec::new(),
        custodians: Vec::new(),
    };
    let Some(record) = record else { return why };
    why.cause = cause(node, record.cause);
    why.auctioneer = name_of(node, &record.auctioneer);
    why.at = record.at.0;
    why.took = record.took;
    why.asked = (record.asked, record.members);
    why.more_quotes = record.more_quotes;
    why.quotes = record
        .quotes
        .iter()
        .map(|quote| QuoteRow {
            node: name_of(node, &quote.node),
            price: quote.price,
            because: because(&quote.basis),
            won: quote.won.iter().map(|replica| replica + 1).collect(),
        })
        .collect();
    why.refusals = record.refusals.iter().map(|(id, refusal)| (name_of(node, id), refusal.to_string())).collect();
    why.refused = record.refused.clone();
    why
}

fn cause(node: &Node, cause: Cause) -> String {
    match cause {
        Cause::Submitted => "it was asked for".to_owned(),
        Cause::NodeDown(down) => format!("{} went down", name_of(node, &down)),
        Cause::Lost(from) => format!("{} lost it or could not start it", name_of(node, &from)),
        Cause::Evicted(from) => format!("it made way on {} for a higher priority", name_of(node, &from)),
        Cause::Drained(from) => format!("{} is being drained", name_of(node, &from)),
        Cause::Updated(from) => format!("it ran on {} as before the update", name_of(node, &from)),
        Cause::Missing => "a replica was missing".to_owned(),
    }
}

/// Every epoch of a replica that some auctioneer remembers.
fn history(node: &Node, workload: &WorkloadId, replica: &str) -> Vec<EpochRow> {
    let Some(number) = replica.rsplit('.').next().and_then(|text| text.parse::<u32>().ok()) else { return Vec::new() };
    let records = |(_, journal): (NodeId, &'_ Journal)| journal.records.clone();
    let mut rows: Vec<EpochRow> = node
        .catalog()
        .journals_of(workload)
        .flat_map(records)
        .flat_map(|record| {
            let placed: Vec<_> = record.placed.iter().filter(|(replica, ..)| replica + 1 == number).copied().collect();
            placed.into_iter().map(move |(_, epoch, winner)| (record.clone(), epoch, winner))
        })
        .map(|(record, epoch, winner)| EpochRow {
            epoch,
            node: name_of(node, &winner),
            at: record.at.0,
            cause: cause(node, record.cause),
            auctioneer: name_of(node, &record.auctioneer),
            price: record.quotes.iter().find(|quote| quote.node == winner).map(|quote| quote.price),
            bids: record.quotes.len() as u32 + record.more_quotes,
        })
        .collect();
    rows.sort_by_key(|row| (row.epoch, row.at));
    rows
}

/// Who grants a singleton's leases.
fn custodians(node: &Node, workload: &WorkloadId) -> Vec<(String, bool)> {
    let seats = node.catalog().seats_of(workload);
    let nodes = seats.map(|seats| seats.nodes.clone()).unwrap_or_default();
    nodes.iter().map(|custodian| (name_of(node, custodian), node.membership().is_live(custodian))).collect()
}

/// How far the last update of a workload is.
pub(super) fn rollout(node: &Node, workload: &WorkloadId, now: moyai_protocol::time::UnixMillis) -> Option<RolloutRow> {
    let known = node.catalog().workload(workload)?;
    let progress = custody::progress(&known, node.catalog(), |id| node.membership().is_live(id), now);
    Some(RolloutRow {
        wanted: known.fact.replicas,
        updated: progress.steady,
        coming: progress.unsteady,
        outdated: progress.outdated,
        setback: known.fact.setback.clone(),
        waits: pending_reason(node, workload),
    })
}

/// What is still on a node that is being emptied.
pub(super) fn ordered(node: &Node, about: &NodeId) -> Ordered {
    // What a dead node says of itself is nothing to wait for.
    let live = node.membership().is_live(about);
    let active = node.catalog().placements_on(about).filter(|placement| live && placement.fact.state.is_active());
    let mut stuck = Vec::new();
    let mut placements = 0;
    for placement in active {
        placements += 1;
        let name = match node.catalog().workload(&placement.workload) {
            Some(known) => format!("{}.{}", known.spec.name, placement.replica + 1),
            None => continue,
        };
        let pending = pending_reason(node, &placement.workload);
        if !pending.is_empty() {
            stuck.push((name, pending));
        }
    }
    let state = if live { "alive" } else { "down" }.to_owned();
    Ordered { node: name_of(node, about), state, draining: node.catalog().is_draining(about), placements, stuck }
}

/// The node that a text names: a name, or the beginning of an id.
pub(super) fn find_node(node: &Node, text: &str) -> Result<NodeId, Failure> {
    if let Ok(id) = text.parse::<NodeId>() {
        // Also one that is not known any more: it may still be revoked.
        return Ok(id);
    }
    let known: Vec<NodeId> = node.catalog().nodes().map(|(id, _)| id).collect();
    let mut found: Vec<NodeId> = known.iter().filter(|id| name_of(node, id) == text).copied().collect();
    if found.is_empty() && text.len() >= 4 {
        found = known.into_iter().filter(|id| id.to_string().starts_with(&text.to_lowercase())).collect();
    }
    match found.as_slice() {
        [id] => Ok(*id),
        [] => Err(Failure {
            error: format!("no node `{text}` in this mesh"),
            hint: "`moyai nodes` lists them".to_owned(),
        }),
        many => Err(Failure {
            error: format!("{} nodes are called `{text}`", many.len()),
            hint: format!("write the id of one: {}", many.iter().map(NodeId::short).collect::<Vec<_>>().join(", ")),
        }),
    }
}

/// Names of live members whose certificates would fall with those of `node`.
pub(super) fn certified_by(node: &Node, issuer: &NodeId) -> Vec<String> {
    let nodes = node.catalog().nodes().filter(|(id, _)| id != issuer && node.membership().is_live(id));
    let fallen = nodes.filter(|(_, fact)| fact.chain.issuers().any(|other| other == *issuer));
    fallen.map(|(id, _)| name_of(node, &id)).collect()
}

/// This mesh, as far as it matters for what would move where: its live nodes, and what runs on them.
pub(super) fn model(node: &Node) -> Model {
    let live: Vec<(NodeId, &NodeFact)> =
        node.catalog().nodes().filter(|(id, _)| node.membership().is_live(id)).collect();
    let machine = |(id, fact): &(NodeId, &NodeFact)| Machine {
        name: name_of(node, id),
        capacity: fact.capacity,
        labels: fact.labels.clone(),
        images: fact.images.iter().filter(|image| image.here).map(|image| image.root).collect(),
        draining: node.catalog().is_draining(id),
    };
    let mut images: std::collections::BTreeMap<_, ImagePin> = Default::default();
    for image in live.iter().flat_map(|(_, fact)| &fact.images) {
        let (reference, id, root, size) = (image.reference.clone(), image.id, image.root, image.size);
        images.insert(root, ImagePin { reference, id, root, size });
    }
    let workloads: Vec<Workload<'_>> = node.catalog().workloads().collect();
    let (mut placements, mut finished) = (Vec::new(), Vec::new());
    let mut custodians = std::collections::BTreeMap::new();
    let at = |node: &NodeId| live.iter().position(|(id, _)| id == node);
    for (number, workload) in workloads.iter().enumerate() {
        for placement in node.catalog().placements_of(&workload.spec.id) {
            let (replica, epoch) = (placement.replica, placement.fact.epoch);
            match placement.fact.state {
                PlacementState::Running => {
                    placements.extend(at(&placement.node).map(|at| (at, number, replica, epoch)));
                }
                // Wherever it was: on some machine of the copy.
                PlacementState::Exited(_) if !placement.fact.stopped => {
                    finished.push((at(&placement.node).unwrap_or(0), number, replica, epoch));
                }
                _ => {}
            }
        }
        if let Some(seats) = node.catalog().seats_of(&workload.spec.id) {
            custodians.insert(number, seats.nodes.iter().filter_map(at).collect());
        }
    }
    Model {
        machines: live.iter().map(machine).collect(),
        images: images.into_values().collect(),
        workloads: workloads
            .iter()
            .map(|known| (moyai_protocol::workload::Spec::clone(known.spec), known.fact.replicas))
            .collect(),
        placements,
        finished,
        custodians,
    }
}

fn because(basis: &moyai_protocol::auction::Basis) -> String {
    let image = if basis.missing == 0 {
        "image here".to_owned()
    } else {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!("{:.0} MiB to fetch at {:.0} MB/s", mib(basis.missing), basis.bandwidth as f64 / 1e6)
    };
    let mut text = format!(
        "{image}, {} starting, cpu {} % reserved, {} % pressure",
        basis.starting, basis.reserved, basis.pressure
    );
    if basis.far > 0 {
        text.push_str(", not near what it would be near to");
    }
    if basis.evicts > 0 {
        text.push_str(&format!(", {} of lower priority would make way", basis.evicts));
    }
    text
}

/// This node and its mesh.
pub(super) fn status(node: &Node, mesh: &MeshId) -> Status {
    let all = nodes(node);
    let alive: Vec<&NodeRow> = all.iter().filter(|row| row.state == "alive").collect();
    let leaf = node.chain().leaf();
    let running = node.worker().placements().filter(|(_, held)| held.fact.state == PlacementState::Running).count();
    Status {
        mesh: mesh_name(mesh),
        mesh_id: mesh.to_string(),
        node: name_of(node, &node.id()),
        node_id: node.id().to_string(),
        role: leaf.map_or(Role::Worker, |leaf| leaf.role).to_string(),
        certified_until: leaf.map_or(0, |leaf| leaf.not_after),
        nodes: alive.len() as u32,
        cpu_milli: alive.iter().map(|row| row.cpu_milli.0).sum(),
        memory: alive.iter().map(|row| row.memory.0).sum(),
        running_here: running as u32,
        addresses: node.catalog().node(&node.id()).map(|fact| fact.data.clone()).unwrap_or_default(),
        pid: std::process::id(),
    }
}

/// Whether something of a workload is still to be decided: a replica that is wanted and neither runs nor has ended nor
/// has been found impossible.
pub(super) fn is_undecided(node: &Node, workload: &WorkloadId) -> bool {
    let Some(known) = node.catalog().workload(workload) else { return false };
    let missing = custody::missing(&known, node.catalog(), |id| node.membership().is_live(id), wall_now());
    if !missing.is_empty() {
        return node.catalog().pending(workload).is_none();
    }
    rows_of(node, &known).iter().any(|row| matches!(row.state.as_str(), "fetching" | "blocked" | "starting"))
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn near_words_are_near() {
        assert_eq!(distance("alpine", "alpin"), 1);
        assert_eq!(distance("alpine", "alpine"), 0);
        assert_eq!(distance("alpine", "debian"), 5);
        assert_eq!(distance("", "abc"), 3);
    }
}

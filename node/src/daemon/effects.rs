//! What the node wants done outside: containers, images, records. Each effect ends in exactly one completion.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moyai_protocol::confinement::{Confinement, Device, Mount, MountKind, Offers, Sandbox};
use moyai_protocol::contract::{Completion, Effect, EffectId, Outcome, Survey, SurveyFault};
use moyai_protocol::id::{ChunkId, NodeId, WorkloadId};
use moyai_protocol::limits::{IoKind, IoLimit, OWN_DISK};
use moyai_protocol::node::Node;
use moyai_protocol::time::Instant;
use moyai_protocol::worker::{Adopted, ExitStatus, StartError};
use moyai_protocol::workload::{PlacementId, Spec};
use moyai_runtime::cdi::Edits;
use moyai_runtime::container::{self, Exit, Failure, Found, Report, Request};
use moyai_runtime::launch::Launcher;
use moyai_runtime::store::{Runnable, Store, StoreError};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use super::devices::Devices;
use super::driver::Handle;
use super::health::LookedAfter;
use super::lazy::Reads;
use super::networks::{Joined, Networks};
use super::records::Writer;
use crate::net::data::{Batch, DataPlane, addresses_of};

/// The line to one shim: reports come one way, signals go the other.
pub(super) struct Line {
    reports: Option<BufReader<OwnedReadHalf>>,
    signals: Option<OwnedWriteHalf>,
    stop_signal: i32,
    /// Ends with the line: its health is one life's.
    _looked_after: Option<LookedAfter>,
}

/// A container that is being started.
struct Begun {
    stream: std::os::unix::net::UnixStream,
    stop_signal: i32,
    joined: Joined,
}

pub(super) type Lines = Arc<Mutex<HashMap<PlacementId, Line>>>;

/// Whatever effects need.
#[derive(Clone)]
pub(super) struct Effects {
    pub(super) handle: Handle,
    pub(super) store: Arc<Store>,
    pub(super) launcher: Arc<Launcher>,
    pub(super) containers: PathBuf,
    pub(super) plane: Arc<DataPlane>,
    pub(super) records: Writer,
    pub(super) node: NodeId,
    /// Folders of the machine that containers may be given.
    pub(super) offers: Vec<PathBuf>,
    /// What this node says it gives.
    pub(super) given: Offers,
    pub(super) networks: Arc<Networks>,
    pub(super) devices: Arc<Devices>,
    pub(super) volumes: PathBuf,
    /// OCI runtimes of this machine, by name.
    pub(super) runtimes: BTreeMap<String, PathBuf>,
    pub(super) lines: Lines,
    /// The node's zero, by [`moyai_runtime::host::boot_time`].
    pub(super) zero: Duration,
    /// Until when singletons may run. Bounded by the placements of this node.
    pub(super) deadlines: Arc<Mutex<HashMap<PlacementId, Duration>>>,
    /// What containers read of images that are not all here.
    pub(super) reads: Reads,
    /// What is being fetched, and may be called off. Bounded by the exchange.
    pub(super) fetches: Arc<Mutex<HashMap<EffectId, Arc<Notify>>>>,
}

/// What root of a strict sandbox is on this machine: ids that no user has, others for each container as far as there are any.
fn ids_of(placement: &PlacementId) -> u32 {
    const FIRST: u32 = 0x1000_0000;
    const RANGES: u32 = 20_000;
    let name = format!("{placement:?}");
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    FIRST + hash % RANGES * 65_536
}

/// A container's folder in `containers`.
pub(super) fn folder(placement: &PlacementId) -> String {
    format!("{}-{}-{}", placement.workload, placement.replica + 1, placement.epoch)
}

impl Effects {
    /// Deletes containers that no placement accounts for: a daemon that was killed between starting one and writing it
    /// down leaves such.
    /// They are gone when this returns: one of them may be the predecessor of what is about to be started.
    pub(super) async fn sweep(&self, node: &Node) {
        let known: std::collections::BTreeSet<String> = node
            .worker()
            .placements()
            .map(|((workload, replica), held)| {
                folder(&PlacementId { workload: *workload, replica: *replica, epoch: held.fact.epoch })
            })
            .collect();
        let (containers, networks, devices) =
            (self.containers.clone(), Arc::clone(&self.networks), Arc::clone(&self.devices));
        let swept = tokio::task::spawn_blocking(move || {
            for entry in std::fs::read_dir(&containers).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !known.contains(&name) {
                    devices.release(&entry.path());
                    networks.leave(&entry.path());
                    tracing::info!(name, "deleting a container that nothing accounts for");
                    if let Err(error) = container::remove(&entry.path()) {
                        tracing::warn!(name, %error, "cannot delete all that it left");
                    }
                }
            }
            networks.resume();
        });
        if let Err(error) = swept.await {
            tracing::warn!(%error, "cannot look for what nothing accounts for");
        }
    }

    /// Ends every container here at once: this node is a member no more.
    pub(super) fn end_all(&self) {
        for entry in std::fs::read_dir(&self.containers).into_iter().flatten().flatten() {
            if let Err(error) = container::remove(&entry.path()) {
                tracing::warn!(name = ?entry.file_name(), %error, "cannot end it");
            }
        }
        self.networks.end();
    }

    /// Begins an effect.
    pub(super) fn carry_out(&self, node: &Node, id: EffectId, effect: Effect) {
        match effect {
            Effect::Persist(records) => self.records.write(id, records),
            Effect::Start { placement, spec, until } => {
                if let Some(until) = until {
                    self.promise(placement, until);
                }
                self.spawn(id, move |effects| async move { Outcome::Started(effects.start(placement, &spec).await) })
            }
            Effect::Extend { placement, until } => self.spawn(id, move |effects| async move {
                let extended = tokio::task::spawn_blocking(move || effects.extend(placement, until)).await;
                if let Err(error) = extended {
                    tracing::warn!(%placement, %error, "cannot tell of a renewed lease");
                }
                Outcome::Extended
            }),
            Effect::Adopt { placement } => {
                let held = node.worker().placement(&placement.workload, placement.replica);
                let spec = held.map(|held| Arc::clone(&held.spec));
                self.spawn(id, move |effects| async move { Outcome::Adopted(effects.adopt(placement, spec).await) });
            }
            Effect::Watch { placement } => {
                self.spawn(id, move |effects| async move { Outcome::Exited(effects.watch(placement).await) })
            }
            Effect::Stop { placement, grace } => self.spawn(id, move |effects| async move {
                effects.stop(placement, grace).await;
                Outcome::Asked
            }),
            Effect::Remove { placement } => self.spawn(id, move |effects| async move {
                effects.lines().remove(&placement);
                effects.deadlines().remove(&placement);
                let dir = effects.containers.join(folder(&placement));
                let removed = tokio::task::spawn_blocking(move || {
                    effects.networks.leave(&dir);
                    effects.devices.release(&dir);
                    container::remove(&dir)
                });
                let removed = removed.await;
                if let Ok(Err(error)) = removed {
                    tracing::warn!(%placement, %error, "cannot delete all that a container left");
                }
                Outcome::Done
            }),
            Effect::Survey { root } => {
                self.spawn(id, move |effects| async move { Outcome::Surveyed(effects.survey(root).await) })
            }
            Effect::Fetch { root, provider, pieces, at } => {
                let addresses = addresses_of(node, &provider);
                let enough = Arc::new(Notify::new());
                self.fetches().insert(id, Arc::clone(&enough));
                self.spawn(id, move |effects| async move {
                    let fetched = effects.plane.fetch(provider, &addresses, Batch { root, pieces, at }, &enough).await;
                    effects.fetches().remove(&id);
                    effects.reads.arrived();
                    Outcome::Fetched(fetched)
                });
            }
        }
    }

    /// What an effect does is wanted no more.
    pub(super) fn call_off(&self, id: EffectId) {
        if let Some(enough) = self.fetches().get(&id) {
            enough.notify_one();
        }
    }

    fn fetches(&self) -> std::sync::MutexGuard<'_, HashMap<EffectId, Arc<Notify>>> {
        self.fetches.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn spawn<F: Future<Output = Outcome> + Send>(
        &self,
        id: EffectId,
        effect: impl FnOnce(Effects) -> F + Send + 'static,
    ) {
        let effects = self.clone();
        tokio::spawn(async move {
            let handle = effects.handle.clone();
            let outcome = effect(effects).await;
            handle.complete(Completion { id, outcome }).await;
        });
    }

    fn deadlines(&self) -> std::sync::MutexGuard<'_, HashMap<PlacementId, Duration>> {
        self.deadlines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A singleton may run until then. What ends it knows no leases, and is told of a margin before.
    fn promise(&self, placement: PlacementId, until: Instant) {
        let end = self.zero + Duration::from_nanos(until.as_nanos());
        let end = end.saturating_sub(moyai_protocol::lease::MARGIN);
        let mut deadlines = self.deadlines();
        let known = deadlines.entry(placement).or_insert(end);
        *known = end.max(*known);
    }

    /// As [`Effects::promise`], for one that runs: what ends it is told. Before a container has its folder its start does
    /// that; after it was deleted there is nothing to be promised.
    fn extend(&self, placement: PlacementId, until: Instant) {
        let dir = self.containers.join(folder(&placement));
        if !self.deadlines().contains_key(&placement) && !dir.exists() {
            return;
        }
        self.promise(placement, until);
        // Under the lock, so that an earlier time never replaces a later one.
        let deadlines = self.deadlines();
        if let Some(end) = deadlines.get(&placement).filter(|_| dir.exists())
            && let Err(error) = container::write_deadline(&dir, *end)
        {
            tracing::warn!(%placement, %error, "cannot tell of a renewed lease");
        }
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, HashMap<PlacementId, Line>> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn start(&self, placement: PlacementId, spec: &Arc<Spec>) -> Result<(), StartError> {
        let machine = |error: &dyn std::fmt::Display| StartError::Node(error.to_string());
        let image = self.reads.runnable(spec.image.root, spec.lazy).await.map_err(StartError::Node)?;
        let (effects, spec, wanted) = (self.clone(), Arc::clone(spec), Arc::clone(spec));
        let begun = tokio::task::spawn_blocking(move || effects.begin(&placement, &spec, &image)).await;
        let Begun { stream, stop_signal, joined } = begun.map_err(|error| machine(&error))??;
        let (read, write) = match into_tokio(stream) {
            Ok(halves) => halves,
            Err(error) => {
                self.left(&placement).await;
                return Err(machine(&error));
            }
        };
        let mut reports = BufReader::new(read);
        let report = next_report(&mut reports).await;
        // Whether it is in its network namespace or not: it needs it from here no more.
        drop(joined);
        if !matches!(report, Some(Report::Running { .. })) {
            self.left(&placement).await;
        }
        match report {
            Some(Report::Running { .. }) => {
                let looked_after = self.look_after(placement, &wanted);
                let line =
                    Line { reports: Some(reports), signals: Some(write), stop_signal, _looked_after: looked_after };
                self.lines().insert(placement, line);
                Ok(())
            }
            Some(Report::Failed(Failure { machine: true, reason, .. })) => Err(StartError::Node(reason)),
            Some(Report::Failed(Failure { code, reason, .. })) => Err(StartError::Workload { code, reason }),
            Some(Report::Exited(_)) | None => Err(StartError::Node("its shim died".to_owned())),
        }
    }

    /// The part of a start that blocks: writes the bundle and asks the zygote.
    fn begin(&self, placement: &PlacementId, spec: &Spec, image: &Runnable) -> Result<Begun, StartError> {
        if image.id != spec.image.id.0 {
            let reason = format!(
                "its image has the id {}, not the one it was asked for by",
                moyai_protocol::id::ImageId(image.id)
            );
            return Err(StartError::Workload { code: 125, reason });
        }
        let signal = spec.stop_signal.clone().or(image.config.process().stop_signal);
        let name = folder(placement);
        let dir = self.containers.join(&name);
        // First of all, since what cannot be had here is to leave nothing behind.
        let puts = self.puts(&spec.confinement)?;
        if let Some(what) = self.given.lacks(&spec.confinement) {
            // It may have been offered when it was awarded.
            return Err(StartError::Node(format!("this node does not offer {what}")));
        }
        let devices = self.devices.grant(&dir, &self.plain_devices(&spec.confinement.devices)?)?;
        let joined = self.networks.join(&dir, spec, placement.replica);
        let begun = joined.and_then(|joined| self.launch(placement, spec, &dir, image, (puts, devices), joined));
        if begun.is_err() {
            self.networks.leave(&dir);
            self.devices.release(&dir);
        }
        begun.map(|(stream, joined)| Begun { stream, stop_signal: stop_number(signal), joined })
    }

    fn launch(
        &self,
        placement: &PlacementId,
        spec: &Spec,
        dir: &Path,
        image: &Runnable,
        (puts, devices): (Vec<container::Put>, Vec<Edits>),
        joined: Joined,
    ) -> Result<(std::os::unix::net::UnixStream, Joined), StartError> {
        let machine = |error: &dyn std::fmt::Display| StartError::Node(error.to_string());
        let asked = &spec.confinement.limits;
        let request = Request {
            entrypoint: spec.entrypoint.clone(),
            command: spec.command.clone(),
            env: environment(placement, spec),
            user: spec.user.clone(),
            workdir: spec.workdir.clone(),
            hostname: spec.hostname.clone().unwrap_or_else(|| own_hostname(&spec.id)),
            limits: container::Limits {
                cpu_milli: spec.resources.cpu_milli,
                memory: spec.resources.memory,
                pids: spec.pids,
                cpu_shares: asked.cpu_shares.map(u64::from),
                cpus: asked.cpus.clone(),
                mems: asked.mems.clone(),
                memory_and_swap: asked.memory_swap,
            },
            storage: asked.storage,
            shm_size: asked.shm_size,
            rlimits: asked.ulimits.iter().map(|limit| (limit.name.clone(), limit.soft, limit.hard)).collect(),
            sysctls: asked.sysctls.clone().into_iter().collect(),
            cgroup: format!("moyai-{}-{}-{}-{}", self.node.short(), spec.id, placement.replica + 1, placement.epoch),
            puts,
            read_only: spec.confinement.read_only,
            cap_add: spec.confinement.cap_add.clone(),
            cap_drop: spec.confinement.cap_drop.clone(),
            strict: (spec.confinement.sandbox == Sandbox::Strict).then(|| ids_of(placement)),
            network: joined.network.clone(),
            lookup: lookup(&spec.confinement.lookup),
            devices,
            init: spec.confinement.init,
            terminal: spec.terminal,
            input: spec.input,
            runtime: spec.confinement.runtime.as_deref().map(|name| self.runtime(name)).transpose()?,
            io_weight: spec.confinement.io.weight,
            throttles: spec.confinement.io.limits.iter().map(|limit| self.throttle(limit)).collect(),
        };
        container::write_bundle(dir, image, &request).map_err(|error| match error {
            // Another machine may have what this one has not.
            container::BundleError::Io { .. } | container::BundleError::Device(_) | container::BundleError::Disk(_) => {
                StartError::Node(error.to_string())
            }
            error => StartError::Workload { code: 125, reason: error.to_string() },
        })?;
        if spec.singleton {
            let deadlines = self.deadlines();
            // Without a lease it would not have been started; a shim without a deadline would let it run for ever.
            let end = deadlines.get(placement).copied().unwrap_or_default();
            container::write_deadline(dir, end).map_err(|error| machine(&error))?;
        }
        let launched = self.launcher.launch(dir, request.kind(image));
        let stream = launched.map_err(|error| machine(&format!("cannot start a shim: {error}")))?;
        Ok((stream, joined))
    }

    /// Takes a container's network back: it has ended, or has never begun.
    async fn left(&self, placement: &PlacementId) {
        let (networks, dir) = (Arc::clone(&self.networks), self.containers.join(folder(placement)));
        self.devices.release(&dir);
        if let Err(error) = tokio::task::spawn_blocking(move || networks.leave(&dir)).await {
            tracing::warn!(%placement, %error, "cannot take a container's network back");
        }
    }

    /// Where an OCI runtime is.
    fn runtime(&self, name: &str) -> Result<PathBuf, StartError> {
        let found = self.runtimes.get(name).cloned();
        found.ok_or_else(|| StartError::Node(format!("this node has no OCI runtime {name}")))
    }

    /// Devices as they are without links, below what this node offers.
    fn plain_devices(&self, asked: &[Device]) -> Result<Vec<Device>, StartError> {
        let plain = |device: &Device| match device {
            Device::Node { source, target, access } => {
                let found = self.offered(source)?;
                if !found.starts_with("/dev") {
                    // Whoever may write to an offered folder could make one there.
                    return Err(StartError::Node(format!("{} is not below /dev", found.display())));
                }
                let source = found.to_string_lossy().into_owned();
                Ok(Device::Node { source, target: target.clone(), access: access.clone() })
            }
            other => Ok(other.clone()),
        };
        asked.iter().map(plain).collect()
    }

    fn throttle(&self, limit: &IoLimit) -> container::Throttle {
        let kind = match limit.kind {
            IoKind::ReadBytes => container::ThrottleKind::ReadBytes,
            IoKind::WriteBytes => container::ThrottleKind::WriteBytes,
            IoKind::Reads => container::ThrottleKind::Reads,
            IoKind::Writes => container::ThrottleKind::Writes,
        };
        let path = if limit.path == OWN_DISK { self.containers.clone() } else { limit.path.clone().into() };
        container::Throttle { path, kind, rate: limit.rate }
    }

    /// What of this machine a container is given. Another machine may have what this one has not.
    fn puts(&self, confinement: &Confinement) -> Result<Vec<container::Put>, StartError> {
        let put = |mount: &Mount| {
            let source = match mount.kind {
                MountKind::Tmpfs => None,
                MountKind::Volume => {
                    let path = self.volumes.join(&mount.source);
                    std::fs::create_dir_all(&path).map_err(|error| {
                        StartError::Node(format!("cannot make the volume {}: {error}", mount.source))
                    })?;
                    Some(std::fs::canonicalize(&path).unwrap_or(path))
                }
                MountKind::Bind => Some(self.offered(&mount.source)?),
            };
            let (target, read_only, size) = (mount.target.clone(), mount.read_only, mount.size);
            Ok(container::Put { source, target, read_only, size })
        };
        confinement.mounts.iter().map(put).collect()
    }

    /// A folder of the machine as it is without links, if this node offers it. A link that is put there later is refused when
    /// it is bound.
    fn offered(&self, source: &str) -> Result<PathBuf, StartError> {
        let found = std::fs::canonicalize(source)
            .map_err(|error| StartError::Node(format!("this node has no {source} to be mounted: {error}")))?;
        match self.offers.iter().any(|offer| found.starts_with(offer)) {
            true => Ok(found),
            false => Err(StartError::Node(format!(
                "this node does not offer {source} (`moyai init --offer {source}` on it would, to everybody who may submit)"
            ))),
        }
    }

    async fn adopt(&self, placement: PlacementId, spec: Option<Arc<Spec>>) -> Adopted {
        let dir = self.containers.join(folder(&placement));
        let (store, wanted) = (Arc::clone(&self.store), spec.clone());
        let found = tokio::task::spawn_blocking(move || {
            let image = spec.as_ref().and_then(|spec| store.config(&spec.image.root.0).ok());
            let stop = spec.and_then(|spec| spec.stop_signal.clone());
            let stop = stop.or_else(|| image.and_then(|image| image.process().stop_signal));
            (container::find(&dir), stop)
        });
        let Ok((found, stop)) = found.await else { return Adopted::Gone };
        if !matches!(found, Ok(Found::Running(_))) {
            self.left(&placement).await;
        }
        match found {
            Ok(Found::Exited(exit)) => Adopted::Exited(status(exit)),
            Ok(Found::Running(stream)) => match into_tokio(stream) {
                Ok((read, write)) => {
                    let mut reports = BufReader::new(read);
                    let first = next_report(&mut reports).await;
                    if let Some(Report::Exited(exit)) = first {
                        self.left(&placement).await;
                        return Adopted::Exited(status(exit));
                    }
                    let looked_after = wanted.as_ref().and_then(|spec| self.look_after(placement, spec));
                    let stop_signal = stop_number(stop);
                    let line =
                        Line { reports: Some(reports), signals: Some(write), stop_signal, _looked_after: looked_after };
                    self.lines().insert(placement, line);
                    Adopted::Running
                }
                Err(_) => Adopted::Gone,
            },
            Ok(Found::Gone) | Err(_) => Adopted::Gone,
        }
    }

    async fn watch(&self, placement: PlacementId) -> ExitStatus {
        let reports = self.lines().get_mut(&placement).and_then(|line| line.reports.take());
        let mut reported = None;
        if let Some(mut reports) = reports {
            while let Some(report) = next_report(&mut reports).await {
                if let Report::Exited(exit) = report {
                    reported = Some(exit);
                    break;
                }
            }
        }
        self.lines().remove(&placement);
        self.left(&placement).await;
        if let Some(exit) = reported {
            return status(exit);
        }
        // The line broke; the file has the last word. What a shim that was killed left running is ended.
        let dir = self.containers.join(folder(&placement));
        let found = tokio::task::spawn_blocking(move || {
            let found = container::find(&dir);
            if !matches!(found, Ok(Found::Exited(_))) {
                container::end_left_over(&dir);
            }
            found
        });
        match found.await {
            Ok(Ok(Found::Exited(exit))) => status(exit),
            // A shim that was killed took its container with it.
            _ => ExitStatus { code: 137, out_of_memory: false },
        }
    }

    async fn stop(&self, placement: PlacementId, grace: Duration) {
        let signal = self.lines().get(&placement).map(|line| line.stop_signal);
        let Some(signal) = signal else { return };
        // What stands still cannot end.
        let dir = self.containers.join(folder(&placement));
        let thawed = tokio::task::spawn_blocking(move || container::freeze(&dir, false)).await;
        if let Ok(Err(error)) = thawed {
            tracing::debug!(%placement, %error, "cannot let a container go on that is to stop");
        }
        self.signal(&placement, signal).await;
        let effects = self.clone();
        // The exit ends the watch, and takes the line away; until then the second signal waits.
        tokio::spawn(async move {
            let until = tokio::time::Instant::now() + grace;
            while effects.lines().contains_key(&placement) {
                if tokio::time::Instant::now() >= until {
                    effects.signal(&placement, 9).await;
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100).min(grace)).await;
            }
        });
    }

    pub(super) async fn signal(&self, placement: &PlacementId, signal: i32) {
        // Taken out while it is written to: the lock is not held across a wait.
        let writer = self.lines().get_mut(placement).and_then(|line| line.signals.take());
        if let Some(mut writer) = writer {
            let sent = writer.write_all(format!("{signal}\n").as_bytes()).await;
            if let Some(line) = self.lines().get_mut(placement).filter(|_| sent.is_ok()) {
                line.signals = Some(writer);
            }
        }
    }

    async fn survey(&self, root: ChunkId) -> Result<Survey, SurveyFault> {
        let store = Arc::clone(&self.store);
        let surveyed = tokio::task::spawn_blocking(move || store.survey(&root.0)).await;
        let surveyed = surveyed.map_err(|error| SurveyFault { damaged: false, reason: error.to_string() })?;
        let missing = surveyed.map_err(|error| SurveyFault {
            damaged: matches!(error, StoreError::Damaged(_)),
            reason: error.to_string(),
        })?;
        let piece =
            |(chunk, len): &([u8; 32], u32)| moyai_protocol::contract::Piece { chunk: ChunkId(*chunk), len: *len };
        Ok(Survey {
            complete: missing.complete,
            contents: missing.contents,
            pieces: missing.pieces.iter().map(piece).collect(),
            present: missing.present,
        })
    }
}

/// The first digits of a workload's id, up to a letter: a host's name of decimal digits alone is taken for an address wherever
/// it is looked up, also in its own hosts file (inet_aton(3)).
fn own_hostname(id: &WorkloadId) -> String {
    let all = id.to_string();
    let len = all.find(|digit: char| digit.is_ascii_alphabetic()).map_or(all.len(), |at| at + 1);
    all[..len.max(id.short().len())].to_owned()
}

fn lookup(asked: &moyai_protocol::lookup::Lookup) -> container::Lookup {
    container::Lookup {
        hosts: asked.hosts.iter().map(|host| (host.name.clone(), host.address)).collect(),
        servers: asked.servers.clone(),
        search: asked.search.clone(),
        options: asked.options.clone(),
    }
}

/// What the workload asks for, and what tells it who it is. The epoch is a fencing token: whatever the container writes
/// to can refuse what comes with an earlier one.
fn environment(placement: &PlacementId, spec: &Spec) -> Vec<String> {
    let mut env = spec.env.clone();
    env.extend([
        format!("MOYAI_WORKLOAD={}", spec.name),
        format!("MOYAI_REPLICA={}", placement.replica + 1),
        format!("MOYAI_EPOCH={}", placement.epoch),
    ]);
    env
}

fn into_tokio(stream: std::os::unix::net::UnixStream) -> std::io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
    stream.set_nonblocking(true)?;
    Ok(UnixStream::from_std(stream)?.into_split())
}

async fn next_report(reports: &mut BufReader<OwnedReadHalf>) -> Option<Report> {
    let mut line = String::new();
    match reports.read_line(&mut line).await {
        Ok(1..) => serde_json::from_str(&line).ok(),
        _ => None,
    }
}

fn stop_number(name: Option<String>) -> i32 {
    const SIGTERM: i32 = 15;
    name.and_then(|name| container::signal_number(&name)).unwrap_or(SIGTERM)
}

fn status(exit: Exit) -> ExitStatus {
    ExitStatus { code: exit.code, out_of_memory: exit.out_of_memory }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_s_own_name_has_a_letter_where_its_id_has_one() {
        let mut id = WorkloadId([0x42; 16]);
        assert_eq!(own_hostname(&id), "42".repeat(16), "there is no letter to be had");
        id.0[9] = 0x4b;
        assert_eq!(own_hostname(&id), "4242424242424242424b");
        id.0[0] = 0xf0;
        assert_eq!(own_hostname(&id), id.short());
    }
}

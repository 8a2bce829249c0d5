//! What the node wants done outside: containers, images, records. Each effect ends in exactly one completion.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moyai_protocol::contract::{Completion, Effect, EffectId, Outcome, Survey};
use moyai_protocol::id::{ChunkId, NodeId};
use moyai_protocol::node::Node;
use moyai_protocol::worker::{Adopted, ExitStatus, StartError};
use moyai_protocol::workload::{PlacementId, Spec};
use moyai_runtime::container::{self, Exit, Failure, Found, Report, Request};
use moyai_runtime::launch::Launcher;
use moyai_runtime::store::Store;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::driver::Handle;
use super::records::Writer;
use crate::net::data::DataPlane;

/// The line to one shim: reports come one way, signals go the other.
pub(super) struct Line {
    reports: Option<BufReader<OwnedReadHalf>>,
    signals: Option<OwnedWriteHalf>,
    stop_signal: i32,
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
    pub(super) lines: Lines,
}

/// A container's folder in `containers`.
pub(super) fn folder(placement: &PlacementId) -> String {
    format!("{}-{}-{}", placement.workload, placement.replica + 1, placement.epoch)
}

impl Effects {
    /// Deletes containers that no placement accounts for: a daemon that was killed between starting one and writing it
    /// down leaves such.
    pub(super) fn sweep(&self, node: &Node) {
        let known: std::collections::BTreeSet<String> = node
            .worker()
            .placements()
            .map(|((workload, replica), held)| {
                folder(&PlacementId { workload: *workload, replica: *replica, epoch: held.fact.epoch })
            })
            .collect();
        let containers = self.containers.clone();
        tokio::task::spawn_blocking(move || {
            for entry in std::fs::read_dir(&containers).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !known.contains(&name) {
                    tracing::info!(name, "deleting a container that nothing accounts for");
                    if let Err(error) = container::remove(&entry.path()) {
                        tracing::warn!(name, %error, "cannot delete all that it left");
                    }
                }
            }
        });
    }

    /// Begins an effect.
    pub(super) fn carry_out(&self, node: &Node, id: EffectId, effect: Effect) {
        match effect {
            Effect::Persist(records) => self.records.write(id, records),
            Effect::Start { placement, spec } => {
                self.spawn(id, move |effects| async move { Outcome::Started(effects.start(placement, &spec).await) })
            }
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
                Outcome::Done
            }),
            Effect::Remove { placement } => self.spawn(id, move |effects| async move {
                effects.lines().remove(&placement);
                let dir = effects.containers.join(folder(&placement));
                let removed = tokio::task::spawn_blocking(move || container::remove(&dir)).await;
                if let Ok(Err(error)) = removed {
                    tracing::warn!(%placement, %error, "cannot delete all that a container left");
                }
                Outcome::Done
            }),
            Effect::Survey { root } => {
                self.spawn(id, move |effects| async move { Outcome::Surveyed(effects.survey(root).await) })
            }
            Effect::Fetch { provider, pieces } => {
                let addresses: Vec<SocketAddr> = node
                    .catalog()
                    .node(&provider)
                    .map(|fact| fact.data.iter().filter_map(|text| text.parse().ok()).collect())
                    .unwrap_or_default();
                self.spawn(id, move |effects| async move {
                    Outcome::Fetched(effects.plane.fetch(provider, &addresses, pieces).await)
                });
            }
        }
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

    fn lines(&self) -> std::sync::MutexGuard<'_, HashMap<PlacementId, Line>> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn start(&self, placement: PlacementId, spec: &Arc<Spec>) -> Result<(), StartError> {
        let machine = |error: &dyn std::fmt::Display| StartError::Node(error.to_string());
        let (effects, spec) = (self.clone(), Arc::clone(spec));
        let begun = tokio::task::spawn_blocking(move || effects.begin(&placement, &spec)).await;
        let (stream, stop_signal) = begun.map_err(|error| machine(&error))??;
        let (read, write) = into_tokio(stream).map_err(|error| machine(&error))?;
        let mut reports = BufReader::new(read);
        match next_report(&mut reports).await {
            Some(Report::Running { .. }) => {
                self.lines().insert(placement, Line { reports: Some(reports), signals: Some(write), stop_signal });
                Ok(())
            }
            Some(Report::Failed(Failure { machine: true, reason, .. })) => Err(StartError::Node(reason)),
            Some(Report::Failed(Failure { code, reason, .. })) => Err(StartError::Workload { code, reason }),
            Some(Report::Exited(_)) | None => Err(StartError::Node("its shim died".to_owned())),
        }
    }

    /// The part of a start that blocks: writes the bundle and asks the zygote.
    fn begin(&self, placement: &PlacementId, spec: &Spec) -> Result<(std::os::unix::net::UnixStream, i32), StartError> {
        let machine = |error: &dyn std::fmt::Display| StartError::Node(error.to_string());
        let image = self.store.runnable(&spec.image.root.0).map_err(|error| machine(&error))?;
        let image = image.ok_or_else(|| StartError::Node("its image is not complete here".to_owned()))?;
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
        let request = Request {
            entrypoint: spec.entrypoint.clone(),
            command: spec.command.clone(),
            env: spec.env.clone(),
            user: spec.user.clone(),
            workdir: spec.workdir.clone(),
            hostname: spec.hostname.clone().unwrap_or_else(|| spec.id.short()),
            limits: moyai_runtime::cgroup::Limits {
                cpu_milli: spec.resources.cpu_milli,
                memory: spec.resources.memory,
                pids: spec.pids,
            },
            cgroup: format!("moyai-{}-{}-{}-{}", self.node.short(), spec.id, placement.replica + 1, placement.epoch),
        };
        container::write_bundle(&dir, &image, &request).map_err(|error| match error {
            container::BundleError::Io { .. } => StartError::Node(error.to_string()),
            error => StartError::Workload { code: 125, reason: error.to_string() },
        })?;
        let stream = self.launcher.launch(&dir).map_err(|error| machine(&format!("cannot start a shim: {error}")))?;
        Ok((stream, stop_number(signal)))
    }

    async fn adopt(&self, placement: PlacementId, spec: Option<Arc<Spec>>) -> Adopted {
        let dir = self.containers.join(folder(&placement));
        let store = Arc::clone(&self.store);
        let found = tokio::task::spawn_blocking(move || {
            let image = spec.as_ref().and_then(|spec| store.runnable(&spec.image.root.0).ok().flatten());
            let stop = spec.and_then(|spec| spec.stop_signal.clone());
            let stop = stop.or_else(|| image.and_then(|image| image.config.process().stop_signal));
            (container::find(&dir), stop)
        });
        let Ok((found, stop)) = found.await else { return Adopted::Gone };
        match found {
            Ok(Found::Exited(exit)) => Adopted::Exited(status(exit)),
            Ok(Found::Running(stream)) => match into_tokio(stream) {
                Ok((read, write)) => {
                    let mut reports = BufReader::new(read);
                    let first = next_report(&mut reports).await;
                    if let Some(Report::Exited(exit)) = first {
                        return Adopted::Exited(status(exit));
                    }
                    let line = Line { reports: Some(reports), signals: Some(write), stop_signal: stop_number(stop) };
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
        if let Some(exit) = reported {
            return status(exit);
        }
        // The line broke; the file has the last word.
        let dir = self.containers.join(folder(&placement));
        match tokio::task::spawn_blocking(move || container::find(&dir)).await {
            Ok(Ok(Found::Exited(exit))) => status(exit),
            // A shim that was killed took its container with it.
            _ => ExitStatus { code: 137, out_of_memory: false },
        }
    }

    async fn stop(&self, placement: PlacementId, grace: Duration) {
        let signal = self.lines().get(&placement).map(|line| line.stop_signal);
        let Some(signal) = signal else { return };
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

    async fn signal(&self, placement: &PlacementId, signal: i32) {
        // Taken out while it is written to: the lock is not held across a wait.
        let writer = self.lines().get_mut(placement).and_then(|line| line.signals.take());
        if let Some(mut writer) = writer {
            let sent = writer.write_all(format!("{signal}\n").as_bytes()).await;
            if let Some(line) = self.lines().get_mut(placement).filter(|_| sent.is_ok()) {
                line.signals = Some(writer);
            }
        }
    }

    async fn survey(&self, root: ChunkId) -> Result<Survey, String> {
        let store = Arc::clone(&self.store);
        let surveyed = tokio::task::spawn_blocking(move || store.survey(&root.0)).await;
        let missing = surveyed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
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

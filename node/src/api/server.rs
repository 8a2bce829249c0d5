//! The daemon's side of the local API.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Query, State as AxumState};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use futures::StreamExt;
use moyai_protocol::catalog::{Hlc, ImageHeld, OriginalHeld};
use moyai_protocol::contract::{Command, Refused, Reply};
use moyai_protocol::id::{ChunkId, ImageId, MeshId, NodeId, WorkloadId};
use moyai_protocol::reference::Reference;
use moyai_protocol::trust::Ticket;
use moyai_protocol::workload::{Layout, PRIORITY, Resources, Restart, Spec};
use moyai_runtime::image::{self, Imported, Limits, Progress};
use moyai_runtime::store::Store;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::changes;
use super::json::Json;
use super::types::{Failure, Invitation, InviteRequest, LoadStep, LogRow, RunRequest, Submitted};
use super::view::{self, Found};
use crate::daemon::driver::{Handle, Stopping};
use crate::daemon::home::random;
use crate::daemon::images::Images;
use crate::daemon::problem;
use crate::net::admission::{Gate, InviteError, unix_now};
use crate::net::data::{DataPlane, ExecSource, LogRequest, LogSource, addresses_of};
use crate::pieces::Pieces;
use crate::registry::outside::Outside;

/// The least memory a container can be started with: its own first pages and the kernel's bookkeeping.
const LEAST_MEMORY: u64 = 6 << 20;
/// Pieces of a body on their way to the thread that imports.
const BODY_QUEUE: usize = 16;

/// What requests need.
#[derive(Clone)]
pub struct State {
    /// The way to the loop.
    pub handle: Handle,
    /// Images.
    pub store: Arc<Store>,
    /// What is done with them.
    pub images: Images,
    /// Registries outside of the mesh.
    pub outside: Outside,
    /// Invitations.
    pub gate: Arc<Gate>,
    /// Other nodes' logs.
    pub plane: Arc<DataPlane>,
    /// This node's logs.
    pub logs: Arc<dyn LogSource>,
    /// Adds processes to this node's containers.
    pub execs: Arc<dyn ExecSource>,
    /// Ends the daemon.
    pub stop: watch::Sender<bool>,
    /// Which mesh.
    pub mesh: MeshId,
    /// Which node.
    pub me: NodeId,
    /// Where images lie, for messages about full disks.
    pub store_dir: PathBuf,
}

/// Starts to serve on `socket`, which only root may open.
pub fn start(socket: &Path, state: State) -> anyhow::Result<()> {
    if let Some(folder) = socket.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
    }
    // The lock on the data folder says that no other daemon of it lives; one of another folder may.
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(problem(
            format!("another daemon answers at {} already", socket.display()),
            "choose another with --socket",
        ));
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", socket.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/nodes", get(nodes))
        .route("/v1/images", get(images).delete(super::images::remove))
        .route("/v1/images/save", post(super::images::save))
        .route("/v1/images/prune", post(super::images::prune))
        .route("/v1/images/tag", post(super::images::tag))
        .route("/v1/images/verify", post(super::images::verify))
        .route("/v1/images/where", get(super::images::places))
        .route("/v1/images/usage", get(super::images::usage))
        .route("/v1/images/load", post(load))
        .route("/v1/images/pull", post(super::pull::pull))
        .route("/v1/workloads", get(workloads).post(run))
        .route("/v1/workloads/{name}", get(workload).delete(remove))
        .route("/v1/workloads/{name}/scale", post(scale))
        .route("/v1/workloads/{name}/update", post(changes::update))
        .route("/v1/workloads/{name}/rollback", post(changes::rollback))
        .route("/v1/workloads/{name}/rollout", get(changes::rollout))
        .route("/v1/workloads/{name}/reseat", post(changes::reseat))
        .route("/v1/nodes/{name}/drain", get(changes::drained).post(changes::drain))
        .route("/v1/nodes/{name}/revoke", post(changes::revoke))
        .route("/v1/workloads/{name}/decided", get(decided))
        .route("/v1/workloads/{name}/ended", get(ended))
        .route("/v1/workloads/{name}/why", get(why))
        .route("/v1/workloads/{name}/logs", get(logs))
        .route("/v1/workloads/{name}/exec", post(super::exec::exec))
        .route("/v1/whatif", get(changes::whatif))
        .route("/v1/invite", post(invite))
        .route("/v1/events", get(events))
        .route("/v1/leave", post(leave))
        .route("/v1/daemon", delete(shut_down))
        .with_state(state);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the local API ended");
        }
    });
    Ok(())
}

pub(super) type Answer<T> = Result<Json<T>, Failed>;

pub(super) struct Failed(StatusCode, Failure);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<Stopping> for Failed {
    fn from(error: Stopping) -> Self {
        let hint = "`moyai up` starts it again".to_owned();
        Failed(StatusCode::SERVICE_UNAVAILABLE, Failure { error: error.to_string(), hint })
    }
}

impl From<Failed> for Failure {
    fn from(failed: Failed) -> Self {
        failed.1
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Failed(StatusCode::NOT_FOUND, failure)
    }
}

pub(super) fn failed(error: impl Into<String>, hint: impl Into<String>) -> Failed {
    Failed(StatusCode::BAD_REQUEST, Failure { error: error.into(), hint: hint.into() })
}

pub(super) fn refused(refused: &Refused) -> Failed {
    let hint = match refused {
        Refused::NoWorkload(_) => "`moyai ps -a` lists them all",
        Refused::NameTaken { .. } => "choose another name, or remove that one: `moyai rm NAME`",
        Refused::Role { .. } => "ask an admin for an invitation as submitter, and join again",
        Refused::Certificate(_) => "ask an admin for an invitation, and join again",
        Refused::Spec(_) => "`moyai run --help` says what is possible",
        Refused::NoNode(_) => "`moyai nodes` lists them",
        Refused::NotAllowed(_) => "`moyai nodes` shows who is an admin; `moyai revoke` also takes the mesh's root key",
        Refused::Nothing(_) => "`moyai update NAME --image IMAGE` changes what it runs",
        Refused::Names(_) => "take some back: `moyai image rm NAME`; `moyai images` lists them",
        Refused::Full { .. } => "remove workloads that have ended: `moyai rm NAME`",
    };
    failed(refused.to_string(), hint)
}

async fn status(AxumState(state): AxumState<State>) -> Answer<super::types::Status> {
    let mesh = state.mesh;
    Ok(Json(state.handle.ask(move |node, _| view::status(node, &mesh)).await?))
}

async fn nodes(AxumState(state): AxumState<State>) -> Answer<Vec<super::types::NodeRow>> {
    Ok(Json(state.handle.ask(|node, _| view::nodes(node)).await?))
}

async fn images(AxumState(state): AxumState<State>) -> Answer<Vec<super::types::ImageRow>> {
    Ok(Json(state.handle.ask(|node, _| view::images(node)).await?))
}

async fn workloads(AxumState(state): AxumState<State>) -> Answer<Vec<super::types::Row>> {
    Ok(Json(state.handle.ask(|node, _| view::rows(node)).await?))
}

pub(super) async fn find(state: &State, name: String) -> Result<Found, Failed> {
    Ok(state.handle.ask(move |node, _| view::find_workload(node, &name)).await??)
}

/// For what is done to all replicas of a workload or to none.
pub(super) async fn find_whole(state: &State, name: &str) -> Result<Found, Failed> {
    let found = find(state, name.to_owned()).await?;
    if found.replica.is_some() {
        let whole = name.rsplit_once('.').map_or(name, |(whole, _)| whole);
        let hint = format!("name all of it: {whole}; `moyai scale {whole} N` changes how many run");
        return Err(failed(format!("{name} is one replica, and is not stopped or removed by itself"), hint));
    }
    Ok(found)
}

async fn rows_of(state: &State, workload: WorkloadId) -> Result<Vec<super::types::Row>, Failed> {
    let rows = state.handle.ask(move |node, _| {
        node.catalog().workload(&workload).map(|known| view::rows_of(node, &known)).unwrap_or_default()
    });
    Ok(rows.await?)
}

async fn workload(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
) -> Answer<Vec<super::types::Row>> {
    let found = find(&state, name).await?;
    Ok(Json(rows_of(&state, found.workload).await?))
}

async fn run(AxumState(state): AxumState<State>, Json(request): Json<RunRequest>) -> Answer<Submitted> {
    let image = request.image.clone();
    let image = state.handle.ask(move |node, _| view::find_image(node, &image)).await??;
    let name = if request.name.is_empty() {
        invented_name().map_err(|error| failed(error.to_string(), ""))?
    } else {
        request.name
    };
    let restart = parse_restart(&request.restart)?;
    if request.memory > 0 && request.memory < LEAST_MEMORY {
        let asked = crate::cli::output::size(request.memory);
        return Err(failed(
            format!("--memory {asked} is below the least a container can start with here (6 MiB)"),
            "give it at least --memory 6m",
        ));
    }
    if let Some(signal) =
        request.stop_signal.iter().find(|signal| moyai_runtime::container::signal_number(signal).is_none())
    {
        return Err(failed(format!("`{signal}` is no signal"), "write it like SIGTERM, TERM or 15"));
    }
    if let Some(name) = request
        .confinement
        .cap_add
        .iter()
        .chain(&request.confinement.cap_drop)
        .find(|name| *name != "ALL" && !moyai_runtime::container::is_capability(name))
    {
        return Err(failed(
            format!("`{name}` is no capability"),
            "write it like NET_ADMIN; `man 7 capabilities` has them",
        ));
    }
    let spec = Spec {
        // Chosen by the node.
        id: WorkloadId([0; 16]),
        name: name.clone(),
        image,
        entrypoint: request.entrypoint,
        command: request.command,
        env: request.env,
        user: request.user,
        workdir: request.workdir,
        hostname: request.hostname,
        resources: Resources { cpu_milli: request.cpu_milli, memory: request.memory },
        pids: request.pids,
        replicas: request.replicas.max(1),
        restart,
        on: request.on,
        stop_signal: request.stop_signal,
        stop_timeout: request.stop_timeout,
        auto_remove: request.auto_remove,
        gang: request.gang,
        singleton: request.singleton,
        lazy: request.lazy,
        priority: request.priority.unwrap_or(PRIORITY),
        layout: parse_layout(&request.layout)?,
        near: request.near,
        apart: request.apart,
        terminal: request.terminal,
        input: request.input,
        health: request.health,
        confinement: request.confinement,
        requires: Vec::new(),
    };
    match state.handle.command(Command::Submit(Box::new(spec))).await? {
        Ok(Reply::Submitted(id)) => Ok(Json(Submitted { id: id.short(), name })),
        Ok(Reply::Done) => Err(failed("the node gave an answer that does not fit", "")),
        Err(refusal) => Err(refused(&refusal)),
    }
}

fn parse_layout(text: &str) -> Result<Layout, Failed> {
    match text {
        "" | "balance" => Ok(Layout::Balance),
        "spread" => Ok(Layout::Spread),
        "pack" => Ok(Layout::Pack),
        _ => Err(failed(format!("`{text}` is no layout"), "one of balance, spread, pack")),
    }
}

fn parse_restart(text: &str) -> Result<Restart, Failed> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("" | "no", _) => Ok(Restart::No),
        ("always" | "unless-stopped", _) => Ok(Restart::Always),
        ("on-failure", max) if max.parse::<u32>().is_ok() => Ok(Restart::OnFailure { max: max.parse().unwrap_or(0) }),
        _ => Err(failed(format!("`{text}` is no restart policy"), "one of no, always, on-failure, on-failure:N")),
    }
}

fn invented_name() -> anyhow::Result<String> {
    const FIRST: [&str; 16] = [
        "amber", "bold", "brisk", "calm", "clever", "deft", "eager", "fair", "gentle", "keen", "lucid", "merry",
        "nimble", "quiet", "steady", "swift",
    ];
    const SECOND: [&str; 16] = [
        "anchor", "barge", "buoy", "canoe", "cutter", "dinghy", "ferry", "heron", "kayak", "ketch", "lantern", "oar",
        "raft", "sail", "sloop", "tide",
    ];
    let bytes: [u8; 4] = random()?;
    let number = u16::from_le_bytes([bytes[2], bytes[3]]) % 1000;
    Ok(format!("{}-{}-{number}", FIRST[usize::from(bytes[0]) % 16], SECOND[usize::from(bytes[1]) % 16]))
}

#[derive(Deserialize)]
struct ScaleQuery {
    replicas: u32,
}

async fn scale(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<ScaleQuery>,
) -> Answer<Submitted> {
    let found = find_whole(&state, &name).await?;
    let command = Command::Scale { workload: found.workload, replicas: query.replicas };
    match state.handle.command(command).await? {
        Ok(_) => Ok(Json(Submitted { id: found.workload.short(), name })),
        Err(refusal) => Err(refused(&refusal)),
    }
}

async fn remove(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Submitted> {
    let found = find_whole(&state, &name).await?;
    match state.handle.command(Command::Remove { workload: found.workload }).await? {
        Ok(_) => Ok(Json(Submitted { id: found.workload.short(), name })),
        Err(refusal) => Err(refused(&refusal)),
    }
}

/// Answers when every replica runs, has ended, or has found no taker.
async fn decided(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Vec<super::types::Row>> {
    let found = find(&state, name).await?;
    wait_until(&state, move |node| !view::is_undecided(node, &found.workload)).await?;
    Ok(Json(rows_of(&state, found.workload).await?))
}

/// Answers when every replica has ended, or the workload is gone.
async fn ended(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Vec<super::types::Row>> {
    let found = find(&state, name).await?;
    wait_until(&state, move |node| match node.catalog().workload(&found.workload) {
        Some(known) => view::rows_of(node, &known).iter().all(|row| match row.state.as_str() {
            "exited" => true,
            // Nothing more will come of these once nobody wants them.
            "failed" | "lost" | "evicted" | "pending" => row.wanted == 0,
            _ => false,
        }),
        None => true,
    })
    .await?;
    Ok(Json(rows_of(&state, found.workload).await?))
}

async fn wait_until(
    state: &State,
    done: impl Fn(&moyai_protocol::Node) -> bool + Clone + Send + 'static,
) -> Result<(), Failed> {
    let mut changes = state.handle.changes();
    loop {
        changes.mark_unchanged();
        let done = done.clone();
        if state.handle.ask(move |node, _| done(node)).await? {
            return Ok(());
        }
        if changes.changed().await.is_err() {
            return Err(Stopping.into());
        }
    }
}

async fn why(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Vec<super::types::WhyRow>> {
    let found = find(&state, name).await?;
    Ok(Json(state.handle.ask(move |node, _| view::why(node, found)).await?))
}

#[derive(Deserialize)]
struct LogQuery {
    #[serde(default)]
    follow: bool,
    tail: Option<u32>,
    #[serde(default)]
    audit: bool,
}

async fn logs(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failed> {
    let found = find(&state, name.clone()).await?;
    if query.follow {
        // A workload that has just been submitted has no container yet: its first line will come.
        wait_until(&state, move |node| {
            let gone = node.catalog().workload(&found.workload).is_none();
            gone || !view::log_places(node, found).is_empty() || !view::is_undecided(node, &found.workload)
        })
        .await?;
    }
    let places = state.handle.ask(move |node, _| {
        let places = view::log_places(node, found).into_iter();
        places
            .map(|(replica, place, placement)| (replica, place, addresses_of(node, &place), placement))
            .collect::<Vec<_>>()
    });
    let places = places.await?;
    if places.is_empty() {
        return Err(failed(
            format!("{name} has not run anywhere yet"),
            format!("`moyai why {name}` says what it waits for"),
        ));
    }
    let (lines, receiver) = mpsc::channel::<Result<Bytes, io::Error>>(256);
    for (replica, place, addresses, placement) in places {
        let request = LogRequest { placement, follow: query.follow, tail: query.tail, audit: query.audit };
        tokio::spawn(copy_log(state.clone(), replica, place, addresses, request, lines.clone()));
    }
    Ok(Body::from_stream(ReceiverStream::new(receiver)).into_response())
}

async fn copy_log(
    state: State,
    replica: u32,
    place: NodeId,
    addresses: Vec<SocketAddr>,
    request: LogRequest,
    lines: mpsc::Sender<Result<Bytes, io::Error>>,
) {
    let (sink, mut frames) = mpsc::channel(64);
    let source = async {
        if place == state.me {
            state.logs.send(request, sink).await;
            Ok(())
        } else {
            state.plane.logs(place, &addresses, request, sink).await
        }
    };
    let copy = async {
        while let Some(frame) = frames.recv().await {
            let row = LogRow {
                replica: replica + 1,
                stream: frame.stream,
                time: frame.time,
                text: String::from_utf8_lossy(&frame.text).into_owned(),
            };
            if lines.send(Ok(line(&row))).await.is_err() {
                break;
            }
        }
        // Whoever asked has gone; the source sees it by the closed sink.
        drop(frames);
    };
    let (result, ()) = tokio::join!(source, copy);
    if let Err(error) = result {
        let failure =
            Failure { error: format!("cannot read its log on node {}: {error:#}", place.short()), hint: String::new() };
        let _gone = lines.send(Ok(line(&failure))).await;
    }
}

pub(super) fn line(value: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

#[derive(Deserialize)]
struct LoadQuery {
    /// What an image is called that has no name of its own.
    name: String,
    /// Replaces the names in the archive.
    tag: Option<String>,
    /// Bytes of files, decompressed.
    limit: Option<u64>,
}

async fn load(
    AxumState(state): AxumState<State>,
    Query(query): Query<LoadQuery>,
    body: Body,
) -> Result<Response, Failed> {
    if let Some(tag) = &query.tag {
        tag.parse::<Reference>().map_err(|error| failed(error.to_string(), "name it like alpine or alpine:3.20"))?;
    }
    let (steps, receiver) = mpsc::channel::<Result<Bytes, io::Error>>(16);
    let (pieces, archive) = mpsc::channel::<Bytes>(BODY_QUEUE);
    tokio::spawn(async move {
        let mut body = body.into_data_stream();
        while let Some(Ok(piece)) = body.next().await {
            // After a failed import the rest is still read: a client that is writing would not see the answer.
            let _unwanted = pieces.send(piece).await;
        }
    });
    tokio::spawn(async move {
        let progress = Arc::new(Progress::default());
        // Until they have their names, nothing else says that they are needed.
        let _kept = state.store.hold();
        let limits = query.limit.map_or_else(Limits::default, |bytes| Limits { bytes });
        let mut import = {
            let (store, progress) = (Arc::clone(&state.store), Arc::clone(&progress));
            let archive = Pieces::new(archive);
            tokio::task::spawn_blocking(move || image::import(archive, &store, limits, &progress))
        };
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        let imported = loop {
            tokio::select! {
                done = &mut import => break done,
                _ = tick.tick() => {
                    let chunks = (progress.chunks.load(Ordering::Relaxed), progress.new_chunks.load(Ordering::Relaxed));
                    let step = LoadStep::Progress { bytes: progress.bytes.load(Ordering::Relaxed), chunks };
                    // An import goes on when its reader is gone only until its archive ends.
                    let _gone = steps.send(Ok(line(&step))).await;
                }
            }
        };
        let end = match imported {
            Ok(Ok(images)) => keep_images(&state, images, &query).await,
            Ok(Err(error)) => vec![LoadStep::Failed(import_failure(&error, &state.store_dir))],
            Err(error) => {
                let error = format!("the import broke off: {error}");
                vec![LoadStep::Failed(Failure {
                    error,
                    hint: "nothing was stored; the daemon's log has more".to_owned(),
                })]
            }
        };
        for step in end {
            let _gone = steps.send(Ok(line(&step))).await;
        }
    });
    Ok(Body::from_stream(ReceiverStream::new(receiver)).into_response())
}

async fn keep_images(state: &State, images: Vec<Imported>, query: &LoadQuery) -> Vec<LoadStep> {
    let mut steps = Vec::new();
    for image in images {
        for reference in references(&image, query) {
            let held = ImageHeld {
                reference: reference.clone(),
                id: ImageId(image.id),
                root: ChunkId(image.root),
                size: image.size,
                named: Hlc::default(),
                here: true,
                original: Some(original_held(&image.original)),
            };
            if let Err(error) = state.handle.command(Command::ImageAdded(held)).await {
                return vec![LoadStep::Failed(Failure {
                    error: error.to_string(),
                    hint: "`moyai up` starts it again".to_owned(),
                })];
            }
            steps.push(LoadStep::Image {
                reference: reference.familiar(),
                id: format!("sha256:{}", ImageId(image.id)),
                size: image.size,
                chunks: image.chunks,
            });
        }
    }
    steps
}

/// What an image was made of, all of which is here.
pub(crate) fn original_held(original: &moyai_runtime::store::HeldOriginal) -> OriginalHeld {
    let (root, digest) = (ChunkId(original.root), ImageId(original.digest));
    OriginalHeld { root, digest, size: original.size, here: true }
}

/// The names an image gets: those it has, a bare tag being one of the archive's own name.
fn references(image: &Imported, query: &LoadQuery) -> Vec<Reference> {
    if let Some(tag) = query.tag.as_ref().and_then(|tag| tag.parse().ok()) {
        return vec![tag];
    }
    let named = |name: &String| {
        let full = if name.contains([':', '/']) { name.clone() } else { format!("{}:{name}", query.name) };
        full.parse().ok()
    };
    let found: Vec<Reference> = image.names.iter().filter_map(named).collect();
    if found.is_empty() { query.name.parse().or_else(|_| "unnamed".parse()).into_iter().collect() } else { found }
}

pub(super) fn import_failure(error: &image::ImportError, store: &Path) -> Failure {
    use image::ImportError as E;
    let hint = match error {
        E::Read(_) | E::Damaged { .. } | E::Digest { .. } | E::Missing { .. } | E::Document { .. } => {
            "the file is damaged or was changed; nothing was stored".to_owned()
        }
        E::NotAnImage => "`docker save`, `skopeo copy` and `umoci` write what can be loaded".to_owned(),
        E::Escape { .. } | E::ThroughLink { .. } | E::BadLink { .. } => {
            "no honest tool writes such an archive; nothing was stored".to_owned()
        }
        E::TooLarge { .. } => {
            "if it is what you want, raise it: `moyai load --limit 100g`; nothing was stored".to_owned()
        }
        E::TooMany { .. } | E::Metadata { .. } => {
            "no honest tool writes such an archive; nothing was stored".to_owned()
        }
        E::Config(_) => "nothing was stored".to_owned(),
        E::Store(error) if error.is_full() => {
            format!("make room on the disk of {}; nothing was stored", store.display())
        }
        E::Store(_) => "nothing was stored; the daemon's log has more".to_owned(),
    };
    Failure { error: error.to_string(), hint }
}

async fn invite(AxumState(state): AxumState<State>, Json(request): Json<InviteRequest>) -> Answer<Invitation> {
    let role = request.role.parse().map_err(|error: String| failed(error, "`moyai invite --role submitter`"))?;
    if request.uses == 0 || request.ttl == 0 {
        return Err(failed(
            "an invitation without uses or time would let nobody in",
            "give it --uses and --ttl above zero",
        ));
    }
    let secret: [u8; 16] = random().map_err(|error| failed(error.to_string(), ""))?;
    let expires = unix_now().saturating_add(request.ttl);
    state.gate.invite(&secret, role, request.uses, expires).map_err(|error| match error {
        InviteError::NotAdmin => {
            failed(error.to_string(), "run it on an admin's machine; `moyai nodes` shows who is one")
        }
        error => failed(error.to_string(), ""),
    })?;
    let addresses = state.handle.ask(|node, _| node.membership().own_addresses().to_vec()).await?;
    let ticket = Ticket { mesh: state.mesh, inviter: state.me, secret, expires, role, addresses };
    let ticket = ticket.bounded().to_string();
    Ok(Json(Invitation { ticket, uses: request.uses, expires, role: role.to_string() }))
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default)]
    follow: bool,
}

async fn events(AxumState(state): AxumState<State>, Query(query): Query<EventsQuery>) -> Response {
    let (past, mut events) = state.handle.events();
    let (sender, receiver) = mpsc::channel::<Result<Bytes, io::Error>>(64);
    tokio::spawn(async move {
        for told in past {
            if sender.send(Ok(line(&told))).await.is_err() {
                return;
            }
        }
        if !query.follow {
            return;
        }
        loop {
            match events.recv().await {
                Ok(told) => {
                    if sender.send(Ok(line(&told))).await.is_err() {
                        return;
                    }
                }
                Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    Body::from_stream(ReceiverStream::new(receiver)).into_response()
}

async fn leave(AxumState(state): AxumState<State>) -> Answer<()> {
    let _done = state.handle.command(Command::Leave).await?;
    Ok(Json(()))
}

async fn shut_down(AxumState(state): AxumState<State>) -> Answer<()> {
    state.stop.send_replace(true);
    Ok(Json(()))
}

//! Bringing an image here: from other nodes, or, when they have none of that name, from its registry.
//!
//! Of the nodes that want the same from a registry at one time one fetches it; the others wait, show who, and have it from that
//! one (the protocol's `turns`). A registry on the loopback address is each machine's own, and fetched from by whoever is
//! asked; so is any by who wants what it has now, whatever the mesh has (`--fresh`), and takes no other node's word for it. **If the fetcher dies,** its turn ends [`TURN`] after it asked last, and another's begins.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Query, State as AxumState};
use axum::response::{IntoResponse, Response};
use moyai_protocol::catalog::ImageHeld;
use moyai_protocol::contract::Command;
use moyai_protocol::id::ChunkId;
use moyai_protocol::reference::Reference;
use moyai_protocol::turns::{TURN, Turn};
use moyai_protocol::workload::ImagePin;
use moyai_runtime::image::{ImportError, Limits, import_pushed};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_stream::wrappers::ReceiverStream;

use super::server::{Failed, State, failed, import_failure, line, refused};
use super::types::{Failure, PullStep};
use super::view;
use crate::daemon::images::Fetching;
use crate::registry::outside::{Credentials, OutsideError, Progress, is_of_this_machine};
use crate::registry::{held_as, read_held};

/// Steps on their way to whoever asked.
const QUEUE: usize = 16;
/// Between two looks at how far a pull is.
const LOOK: Duration = Duration::from_millis(100);
/// A steward that has not answered for so long is not waited for.
const ANSWER: Duration = Duration::from_secs(3);
/// Whose turn it is not asks again after so long.
const AGAIN: Duration = Duration::from_secs(1);
/// What another node has fetched is heard of within this, or fetched here too.
const HEARD: Duration = Duration::from_secs(3);
/// Whoever has waited for another so long fetches too: a steward may say what it likes.
const MAX_WAIT: Duration = Duration::from_secs(1800);

#[derive(Deserialize)]
pub(super) struct PullQuery {
    name: String,
    /// From its registry even if the mesh has something of that name.
    #[serde(default)]
    fresh: bool,
}

type Steps = mpsc::Sender<io::Result<Bytes>>;

/// Whoever asked has gone.
struct Gone;

pub(super) async fn pull(
    AxumState(state): AxumState<State>,
    Query(query): Query<PullQuery>,
    body: Bytes,
) -> Result<Response, Failed> {
    let found = find(&state, &query.name).await?;
    let (steps, receiver) = mpsc::channel(QUEUE);
    match (found, query.name.parse::<Reference>()) {
        (Ok(pin), _) if !query.fresh => {
            tokio::spawn(async move { finish(&steps, from_mesh(&state, pin, &steps).await).await });
        }
        (found, Err(_)) => {
            let pin = found?;
            tokio::spawn(async move { finish(&steps, from_mesh(&state, pin, &steps).await).await });
        }
        // What names nothing here may name something outside.
        (_, Ok(reference)) => {
            let credentials: Option<Credentials> = match &*body {
                [] => None,
                body => serde_json::from_slice(body).map_err(|error| failed(error.to_string(), ""))?,
            };
            let wish = Wish { reference, credentials, fresh: query.fresh };
            tokio::spawn(async move { finish(&steps, from_outside(&state, wish, &steps).await).await });
        }
    }
    Ok(Body::from_stream(ReceiverStream::new(receiver)).into_response())
}

async fn find(state: &State, name: &str) -> Result<Result<ImagePin, Failure>, Failed> {
    let name = name.to_owned();
    Ok(state.handle.ask(move |node, _| view::find_image(node, &name)).await?)
}

async fn tell(steps: &Steps, step: &PullStep) -> Result<(), Gone> {
    steps.send(Ok(line(step))).await.map_err(|_| Gone)
}

async fn finish(steps: &Steps, last: Result<PullStep, Gone>) {
    if let Ok(last) = last {
        let _gone = tell(steps, &last).await;
    }
}

/// Has an image here that the mesh has.
async fn from_mesh(state: &State, pin: ImagePin, steps: &Steps) -> Result<PullStep, Gone> {
    let root = pin.root;
    match state.handle.command(Command::FetchImage { root }).await {
        Ok(Ok(_)) => {}
        Ok(Err(refusal)) => return Ok(PullStep::Failed(refused(&refusal).into())),
        Err(stopping) => return Ok(PullStep::Failed(Failed::from(stopping).into())),
    }
    let mut tick = tokio::time::interval(LOOK);
    // What was here already did not come.
    let mut at_once = true;
    loop {
        tick.tick().await;
        match state.images.look(root).await {
            Fetching::Done(receipt) => {
                let (reference, id) = (pin.reference.familiar(), format!("sha256:{}", pin.id));
                let came = match receipt.filter(|_| !at_once) {
                    Some(receipt) => state.handle.ask(move |node, _| view::came(node, &receipt)).await.ok(),
                    None => None,
                };
                return Ok(PullStep::Done { reference, id, size: pin.size, came });
            }
            Fetching::Failed(error) => {
                let hint = "`moyai images` shows which nodes have it, `moyai nodes` which are alive".to_owned();
                return Ok(PullStep::Failed(Failure { error, hint }));
            }
            Fetching::Progress(here, all, sources) => tell(steps, &PullStep::Progress(here, all, sources)).await?,
        }
        at_once = false;
    }
}

/// What somebody wants of a registry.
struct Wish {
    reference: Reference,
    credentials: Option<Credentials>,
    /// Though the mesh has something of that name.
    fresh: bool,
}

async fn from_outside(state: &State, wish: Wish, steps: &Steps) -> Result<PullStep, Gone> {
    let reference = &wish.reference;
    let shared = !wish.fresh && !is_of_this_machine(reference);
    // What another has brought may be gone again, or never have been.
    let mut takes = true;
    let since = Instant::now();
    loop {
        let waits = shared && since.elapsed() < MAX_WAIT;
        let turn = if waits { whose_turn(state, reference, takes).await } else { Turn::Yours };
        let found = match turn {
            Turn::Yours => break,
            Turn::Over(root) if takes => {
                let found = named(state, reference, root).await;
                takes = found.is_some();
                found
            }
            Turn::Over(_) => break,
            Turn::Theirs(node) => {
                let name = state.handle.ask(move |own, _| view::name_of(own, &node)).await.unwrap_or_default();
                tell(steps, &PullStep::Waits(name)).await?;
                tokio::time::sleep(AGAIN).await;
                find(state, &reference.to_string()).await.ok().and_then(Result::ok)
            }
        };
        if let Some(pin) = found {
            // Nothing is to be ended: it is another's turn, or over.
            return from_mesh(state, pin, steps).await;
        }
    }
    let brought = brought(state, &wish, shared, steps).await;
    let root = brought.as_ref().ok().and_then(|held| held.as_ref().ok()).map(|held| held.root);
    if shared {
        // When the daemon ends, the turn does by itself.
        let _ended = state.handle.command(Command::EndTurn { reference: wish.reference, root }).await;
    }
    Ok(match brought? {
        Ok(held) => PullStep::Done {
            reference: held.reference.familiar(),
            id: format!("sha256:{}", held.id),
            size: held.size,
            came: None,
        },
        Err(failure) => PullStep::Failed(failure),
    })
}

/// Asks whose turn it is; one's own when nobody says.
async fn whose_turn(state: &State, reference: &Reference, shares: bool) -> Turn {
    let until = Instant::now() + ANSWER;
    while Instant::now() < until {
        let ask = Command::AskTurn { reference: reference.clone(), shares };
        if !matches!(state.handle.command(ask).await, Ok(Ok(_))) {
            break;
        }
        // A message may be lost, as the first one to a node that has just started anew.
        let again = Instant::now() + ANSWER / 5;
        while Instant::now() < again {
            let reference = reference.clone();
            match state.handle.ask(move |node, _| node.turn(&reference)).await {
                Ok(Some(turn)) => return turn,
                Ok(None) => tokio::time::sleep(LOOK / 10).await,
                Err(_) => return Turn::Yours,
            }
        }
    }
    Turn::Yours
}

/// The image that another node has fetched under this name, once it is heard of.
async fn named(state: &State, reference: &Reference, root: ChunkId) -> Option<ImagePin> {
    let since = Instant::now();
    while since.elapsed() < HEARD {
        let found = find(state, &reference.to_string()).await.ok()?;
        if let Some(pin) = found.ok().filter(|pin| pin.root == root) {
            return Some(pin);
        }
        tokio::time::sleep(LOOK).await;
    }
    None
}

/// Fetches an image from its registry, and says how far that is, to whoever asked and to whoever decides whose turn it is.
async fn brought(state: &State, wish: &Wish, shared: bool, steps: &Steps) -> Result<Result<ImageHeld, Failure>, Gone> {
    let progress = Progress::default();
    let mut brought = std::pin::pin!(bring_in(state, wish, &progress));
    let mut tick = tokio::time::interval(LOOK);
    let mut asked = Instant::now();
    loop {
        tokio::select! {
            brought = &mut brought => return Ok(brought),
            _ = tick.tick() => {}
        }
        // When whoever asked has gone: what is here already is gone on with at the next pull.
        let (here, all) = (progress.here.load(Ordering::Relaxed), progress.all.load(Ordering::Relaxed));
        // Nobody waits for who does not read: others may want what this fetches.
        if let Err(TrySendError::Closed(_)) = steps.try_send(Ok(line(&PullStep::Progress(here, all, 0)))) {
            return Err(Gone);
        }
        if shared && asked.elapsed() > TURN / 4 {
            asked = Instant::now();
            // Whatever the answer is: it goes on.
            let ask = Command::AskTurn { reference: wish.reference.clone(), shares: false };
            let _answered = state.handle.command(ask).await;
        }
    }
}

/// Fetches an image from its registry, and gives it its name.
async fn bring_in(state: &State, wish: &Wish, progress: &Progress) -> Result<ImageHeld, Failure> {
    let reference = &wish.reference;
    let has = |digest: &[u8; 32]| state.store.blob(digest).is_ok_and(|found| found.is_some());
    let pulled = state.outside.pull(reference, wish.credentials.as_ref(), &has, progress).await.map_err(|error| {
        let hint = match &error {
            OutsideError::Denied(host) => {
                format!("`docker login {host}` (or podman's) first: its file is read; or the name is wrong")
            }
            OutsideError::Unreachable { .. } => {
                "`moyai images` lists what the mesh has itself; pull again to go on".to_owned()
            }
            OutsideError::Certificates { .. } => "install ca-certificates; there is no need to restart".to_owned(),
            OutsideError::Unknown { .. } => "`moyai images` lists what the mesh has itself".to_owned(),
            _ => String::new(),
        };
        Failure { error: error.to_string(), hint }
    })?;
    let (store, outside) = (Arc::clone(&state.store), state.outside.clone());
    // Until it has its name, nothing else says that it is needed.
    let _kept = store.hold();
    let imported = tokio::task::spawn_blocking(move || {
        let open = |digest: &[u8; 32]| outside.read(digest).or_else(|| read_held(&store, digest));
        let imported = import_pushed(&pulled.manifest, &pulled.media_type, &open, &store, Limits::default());
        // What no import takes is not kept either: else the next pull would find it.
        if !matches!(imported, Err(ImportError::Store(_))) {
            outside.forget(&pulled);
        }
        imported
    });
    let broken = |error: &dyn std::fmt::Display| Failure { error: error.to_string(), hint: String::new() };
    let imported = imported.await.map_err(|error| broken(&error))?;
    let imported = imported.map_err(|error| {
        let hint = match &error {
            ImportError::Store(_) | ImportError::NotAnImage => return import_failure(&error, &state.store_dir),
            ImportError::TooLarge { .. } => "`skopeo copy` it to an archive, and `moyai load --limit` takes it",
            _ => "its registry has it so, or it came damaged: pull again; nothing was stored",
        };
        Failure { error: error.to_string(), hint: hint.to_owned() }
    })?;
    let held = held_as(reference.clone(), &imported);
    match state.handle.command(Command::ImageAdded(held.clone())).await {
        Ok(Ok(_)) => Ok(held),
        Ok(Err(refusal)) => Err(broken(&refusal)),
        Err(stopping) => Err(broken(&stopping)),
    }
}

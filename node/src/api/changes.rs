//! What is asked of work that runs and of nodes: to be updated, moved, given other custodians, cast out; and what if.

use axum::extract::{Path as UrlPath, Query, State as AxumState};
use moyai_protocol::catalog::Rollout;
use moyai_protocol::contract::{Command, Refused};
use moyai_protocol::workload::Spec;
use serde::Deserialize;

use super::json::Json;
use super::server::{Answer, State, failed, find_whole, refused};
use super::types::{Ordered, RevokeRequest, RolloutRow, Submitted, UpdateRequest};
use super::view;

/// Changes what a workload runs; what is not named stays.
pub(super) async fn update(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<UpdateRequest>,
) -> Answer<Submitted> {
    let workload = find_whole(&state, &name).await?.workload;
    let image = match request.image.clone() {
        Some(image) => Some(state.handle.ask(move |node, _| view::find_image(node, &image)).await??),
        None => None,
    };
    let spec = state.handle.ask(move |node, _| node.catalog().workload(&workload).map(|known| Spec::clone(known.spec)));
    let Some(mut spec) = spec.await? else { return Err(refused(&Refused::NoWorkload(workload))) };
    let before = spec.clone();
    spec.image = image.unwrap_or(spec.image);
    spec.command = request.command.unwrap_or(spec.command);
    spec.resources.cpu_milli = request.cpu_milli.unwrap_or(spec.resources.cpu_milli);
    spec.resources.memory = request.memory.unwrap_or(spec.resources.memory);
    for entry in request.env {
        let variable = |entry: &str| entry.split_once('=').map(|(variable, _)| variable.to_owned());
        spec.env.retain(|known| variable(known) != variable(&entry));
        spec.env.push(entry);
    }
    if spec == before {
        return Err(failed(format!("{name} runs so already"), "name what is to change: `moyai update --help`"));
    }
    let rollout = Rollout { max_surge: request.max_surge, max_unavailable: request.max_unavailable };
    let command = Command::Update { workload, spec: Box::new(spec), rollout };
    done(&state, command, Submitted { id: workload.short(), name }).await
}

pub(super) async fn rollback(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Submitted> {
    let workload = find_whole(&state, &name).await?.workload;
    done(&state, Command::Rollback { workload }, Submitted { id: workload.short(), name }).await
}

pub(super) async fn rollout(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<RolloutRow> {
    let workload = find_whole(&state, &name).await?.workload;
    let row = state.handle.ask(move |node, now| view::rollout(node, &workload, node.wall_at(now))).await?;
    row.map(Json).ok_or_else(|| refused(&Refused::NoWorkload(workload)))
}

pub(super) async fn reseat(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Submitted> {
    let workload = find_whole(&state, &name).await?.workload;
    done(&state, Command::Reseat { workload }, Submitted { id: workload.short(), name }).await
}

/// Of `drain`.
#[derive(Deserialize)]
pub(super) struct DrainQuery {
    #[serde(default)]
    undo: bool,
}

pub(super) async fn drain(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<DrainQuery>,
) -> Answer<Ordered> {
    let node = state.handle.ask(move |node, _| view::find_node(node, &name)).await??;
    state.handle.command(Command::Drain { node, draining: !query.undo }).await?.map_err(|refusal| refused(&refusal))?;
    Ok(Json(state.handle.ask(move |own, _| view::ordered(own, &node)).await?))
}

pub(super) async fn drained(AxumState(state): AxumState<State>, UrlPath(name): UrlPath<String>) -> Answer<Ordered> {
    let node = state.handle.ask(move |node, _| view::find_node(node, &name)).await??;
    Ok(Json(state.handle.ask(move |own, _| view::ordered(own, &node)).await?))
}

pub(super) async fn revoke(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<RevokeRequest>,
) -> Answer<Ordered> {
    let node = state.handle.ask(move |node, _| view::find_node(node, &name)).await??;
    let (fallen, ordered) =
        state.handle.ask(move |own, _| (view::certified_by(own, &node), view::ordered(own, &node))).await?;
    if !fallen.is_empty() && !request.force {
        return Err(failed(
            format!("{} certified {}: they would be members no more either", ordered.node, fallen.join(", ")),
            "invite them again from another admin first, or say --force",
        ));
    }
    let root = request.root_key.map(|bytes| Box::new(ed25519_dalek::SigningKey::from_bytes(&bytes)));
    let command = Command::Revoke { node, reason: request.reason, root };
    done(&state, command, ordered).await
}

/// Gives a command; `answer` is what comes of it when it is not refused.
async fn done<T>(state: &State, command: Command, answer: T) -> Answer<T> {
    match state.handle.command(command).await? {
        Ok(_) => Ok(Json(answer)),
        Err(refusal) => Err(refused(&refusal)),
    }
}

/// What a simulated copy of this mesh begins with.
pub(super) async fn whatif(AxumState(state): AxumState<State>) -> Answer<moyai_sim::whatif::Model> {
    Ok(Json(state.handle.ask(|node, _| view::model(node)).await?))
}

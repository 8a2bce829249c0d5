//! `moyai exec`, `attach`, `cp`, `stats`, `pause`: the user's frames go to the node that runs the container, and those of the process come back, unread.

use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State as AxumState};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use moyai_protocol::worker::PlacementState;
use moyai_protocol::workload::PlacementId;
use moyai_runtime::launch::exec::Task;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use super::server::{Failed, State, failed, find};
use crate::net::data::{ExecRequest, addresses_of};

#[derive(Deserialize)]
pub(super) struct ExecQuery {
    /// A [`Task`] as JSON, since the body has what goes in.
    task: String,
}

pub(super) async fn exec(
    AxumState(state): AxumState<State>,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<ExecQuery>,
    body: Body,
) -> Result<Response, Failed> {
    let task: Task = serde_json::from_str(&query.task).map_err(|error| failed(error.to_string(), ""))?;
    let found = find(&state, name.clone()).await?;
    let place = state.handle.ask(move |node, _| {
        let mut running = node.catalog().placements_of(&found.workload).filter(|placement| {
            let replica = found.replica.is_none_or(|only| only == placement.replica);
            let live = placement.node == node.id() || node.membership().is_live(&placement.node);
            replica && live && placement.fact.state == PlacementState::Running
        });
        running.next().map(|placement| {
            let (workload, replica, epoch) = (placement.workload, placement.replica, placement.fact.epoch);
            (placement.node, addresses_of(node, &placement.node), PlacementId { workload, replica, epoch })
        })
    });
    let Some((node, addresses, placement)) = place.await? else {
        return Err(failed(format!("{name} does not run anywhere"), format!("`moyai why {name}` says why")));
    };
    let request = ExecRequest { placement, task };
    if node == state.me {
        let execs = std::sync::Arc::clone(&state.execs);
        let line = tokio::task::spawn_blocking(move || execs.exec(request)).await;
        let line = line.map_err(std::io::Error::other).and_then(|line| line);
        let line = line.map_err(|error| failed(format!("cannot reach into it: {error}"), ""))?;
        let (read, write) = line.into_split();
        return Ok(joined(body, read, write));
    }
    let (send, receive) = state.plane.exec(node, &addresses, request).await.map_err(|error| {
        failed(format!("the node that runs it does not answer: {error}"), "`moyai nodes` shows which are alive")
    })?;
    Ok(joined(body, receive, send))
}

/// The body goes to `write`, and the answer is what `read` has.
fn joined(
    body: Body,
    read: impl AsyncRead + Send + 'static,
    mut write: impl AsyncWrite + Send + Unpin + 'static,
) -> Response {
    tokio::spawn(async move {
        let mut frames = body.into_data_stream();
        while let Some(Ok(bytes)) = frames.next().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The user's end is gone; so is what it would have said.
        let _ended = write.shutdown().await;
    });
    Body::from_stream(ReaderStream::new(read)).into_response()
}

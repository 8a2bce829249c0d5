//! What this node's containers wrote, for the local API and for other nodes.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use moyai_protocol::worker::PlacementState;
use moyai_protocol::workload::PlacementId;
use moyai_runtime::container::{LogLine, LogReader};
use tokio::sync::mpsc;

use super::driver::Handle;
use super::effects::folder;
use crate::net::data::{LogFrame, LogRequest, LogSource};

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(50);
/// The same after something changed, which may be the container's end.
const SOON: Duration = Duration::from_millis(2);
/// Lines read at a time.
const PIECE: usize = 256;

/// The logs of this node's containers.
pub struct Logs {
    containers: PathBuf,
    handle: Handle,
}

impl Logs {
    /// Those of the containers in this folder.
    pub(super) fn new(containers: PathBuf, handle: Handle) -> Logs {
        Logs { containers, handle }
    }

    async fn has_ended(handle: &Handle, placement: PlacementId) -> bool {
        let state = handle.ask(move |node, _| {
            let held = node.worker().placement(&placement.workload, placement.replica);
            held.filter(|held| held.fact.epoch == placement.epoch).map(|held| held.fact.state.clone())
        });
        !matches!(state.await, Ok(Some(state)) if state.is_active() && state != PlacementState::Fetching)
    }
}

impl LogSource for Logs {
    fn send(&self, request: LogRequest, sink: mpsc::Sender<LogFrame>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let dir = self.containers.join(folder(&request.placement));
        let handle = self.handle.clone();
        let mut changes = handle.changes();
        Box::pin(async move {
            let mut reader = LogReader::open(&dir, request.audit);
            if let Some(tail) = request.tail {
                let kept = tokio::task::spawn_blocking(move || (reader.tail(tail as usize), reader)).await;
                let Ok((Ok(lines), rest)) = kept else { return };
                reader = rest;
                for line in lines {
                    if sink.send(frame(line)).await.is_err() {
                        return;
                    }
                }
            }
            loop {
                // Asked before reading: what was written before the end is read after it.
                let ended = !request.follow || Logs::has_ended(&handle, request.placement).await;
                let mut more = true;
                while more {
                    let read = tokio::task::spawn_blocking(move || (read_some(&mut reader), reader)).await;
                    let Ok((lines, rest)) = read else { return };
                    reader = rest;
                    more = lines.len() == PIECE;
                    for line in lines {
                        if sink.send(frame(line)).await.is_err() {
                            return;
                        }
                    }
                }
                if ended || sink.is_closed() {
                    return;
                }
                // An end is known by a change of state; in a mesh where much changes it is still not looked for all the time.
                tokio::select! {
                    () = tokio::time::sleep(LOOK) => {}
                    _ = changes.changed() => tokio::time::sleep(SOON).await,
                }
            }
        })
    }
}

fn read_some(reader: &mut LogReader) -> Vec<LogLine> {
    // A log that cannot be read has no lines; the container's state is what tells.
    std::iter::from_fn(|| reader.next_line().ok().flatten()).take(PIECE).collect()
}

fn frame(line: LogLine) -> LogFrame {
    LogFrame { stream: line.stream.name().to_owned(), time: line.time, text: line.text }
}

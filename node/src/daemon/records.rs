//! What the node wants remembered, in redb, written by one thread.
//!
//! Requests that have come meanwhile are written in one transaction: a burst of facts costs one sync. A completion is
//! sent when its records are on the disk. When the disk fails, the daemon cannot keep its word any more and ends; its
//! containers go on.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::Context;
use moyai_protocol::codec;
use moyai_protocol::contract::{Completion, EffectId, Outcome, RecordKey};
use moyai_protocol::node::Restored;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::{error, warn};

use super::driver::Handle;

const RECORDS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("records");
/// Requests waiting for the thread; the driver's loop is held up beyond it, as it must be.
const QUEUE: usize = 1024;
const CACHE: usize = 2 << 20;

type Request = (EffectId, Vec<(RecordKey, Option<Vec<u8>>)>);

/// The file.
pub(super) struct Records {
    db: Database,
}

/// The way to the thread that writes it.
#[derive(Clone)]
pub(super) struct Writer {
    queue: SyncSender<Request>,
}

impl Writer {
    /// Has records written; the completion comes by itself.
    pub(super) fn write(&self, id: EffectId, records: Vec<(RecordKey, Option<Vec<u8>>)>) {
        if self.queue.send((id, records)).is_err() {
            error!("the thread that writes records has ended");
        }
    }
}

impl Records {
    pub(super) fn open(path: &Path) -> anyhow::Result<Records> {
        let db = Database::builder().set_cache_size(CACHE).create(path);
        let db = db.with_context(|| format!("cannot open {}", path.display()))?;
        let write = db.begin_write()?;
        write.open_table(RECORDS)?;
        write.commit()?;
        Ok(Records { db })
    }

    /// Everything an earlier life wrote.
    pub(super) fn restore(&self) -> anyhow::Result<Restored> {
        let mut restored = Restored::default();
        let read = self.db.begin_read()?;
        for entry in read.open_table(RECORDS)?.iter()? {
            let (key, value) = entry?;
            let taken = match codec::decode(key.value()) {
                Ok(RecordKey::Fact(_)) => codec::decode(value.value()).map(|fact| restored.facts.push(fact)),
                Ok(RecordKey::Member(node)) => codec::decode(value.value()).map(|at| restored.members.push((node, at))),
                Ok(RecordKey::Seat(workload)) => {
                    codec::decode(value.value()).map(|record| restored.seats.push((workload, record)))
                }
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                // Written by a newer release perhaps; the others still know it.
                warn!(%error, "a record cannot be read");
            }
        }
        Ok(restored)
    }

    /// Starts the thread that writes.
    pub(super) fn writer(self, handle: Handle) -> Writer {
        let (queue, requests) = sync_channel(QUEUE);
        let tasks = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name("records".to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                if let Err(problem) = self.write_all(&requests, &handle, &tasks) {
                    // The loop may be waiting for room in this queue, and would not hear.
                    drop(requests);
                    error!("cannot write the node's state: {problem:#}; the daemon ends, containers go on");
                    handle.fail();
                }
            })
            .expect("a thread can be started");
        Writer { queue }
    }

    fn write_all(
        &self,
        requests: &Receiver<Request>,
        handle: &Handle,
        tasks: &tokio::runtime::Handle,
    ) -> anyhow::Result<()> {
        while let Ok(first) = requests.recv() {
            let batch: Vec<Request> = std::iter::once(first).chain(requests.try_iter().take(QUEUE)).collect();
            let write = self.db.begin_write()?;
            {
                let mut table = write.open_table(RECORDS)?;
                for (key, value) in batch.iter().flat_map(|(_, records)| records) {
                    let key = codec::encode(key);
                    match value {
                        Some(value) => table.insert(key.as_slice(), value.as_slice())?,
                        None => table.remove(key.as_slice())?,
                    };
                }
            }
            write.commit()?;
            // By a task, not by this thread: the loop may be waiting for room in this thread's queue at this moment.
            let handle = handle.clone();
            tasks.spawn(async move {
                for (id, _) in batch {
                    handle.complete(Completion { id, outcome: Outcome::Persisted }).await;
                }
            });
        }
        Ok(())
    }
}

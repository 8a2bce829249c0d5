//! What is done in this node's containers, for the local API and for other nodes.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use moyai_protocol::contract::Command;
use moyai_runtime::container;
use moyai_runtime::launch::Launcher;
use moyai_runtime::launch::exec::{Exec, FromProcess, Task};
use tokio::net::UnixStream;

use super::driver::Handle;
use super::effects::folder;
use crate::net::data::{ExecRequest, ExecSource};

/// Reaches into the containers of this node.
pub struct Execs {
    launcher: Arc<Launcher>,
    containers: PathBuf,
    handle: Handle,
}

impl Execs {
    /// Those of the containers in this folder.
    pub(super) fn new(launcher: Arc<Launcher>, containers: PathBuf, handle: Handle) -> Execs {
        Execs { launcher, containers, handle }
    }

    /// Stops a container where it is, or lets it go on, and says so with its placement.
    fn freeze(&self, request: &ExecRequest, frozen: bool) -> io::Result<std::os::unix::net::UnixStream> {
        let done = container::freeze(&self.containers.join(folder(&request.placement)), frozen);
        let (mut mine, its) = std::os::unix::net::UnixStream::pair()?;
        let told = match done {
            Ok(()) => {
                let detail = if frozen { "paused".to_owned() } else { String::new() };
                let (handle, placement) = (self.handle.clone(), request.placement);
                tokio::spawn(async move {
                    // The loop has ended, and with it all that could be said.
                    let _ended = handle.command(Command::Note { placement, detail }).await;
                });
                FromProcess::Exit(0)
            }
            Err(error) => FromProcess::NotStarted(1, format!("cannot do that: {error}")),
        };
        mine.write_all(&told.encode())?;
        Ok(its)
    }
}

impl ExecSource for Execs {
    fn exec(&self, request: ExecRequest) -> io::Result<UnixStream> {
        let line = match request.task {
            Task::Freeze(frozen) => self.freeze(&request, frozen)?,
            task => self.launcher.exec(Exec { dir: self.containers.join(folder(&request.placement)), task })?,
        };
        line.set_nonblocking(true)?;
        UnixStream::from_std(line)
    }
}

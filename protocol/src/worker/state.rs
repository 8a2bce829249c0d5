//! How far a placement is, and how containers end.

use serde::{Deserialize, Serialize};

/// How far a placement is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlacementState {
    /// The image is on its way.
    Fetching,
    /// It is accepted, and waits: for what makes room for it, for its predecessor to end, or for its lease.
    Blocked,
    /// The container is being made.
    Starting,
    /// Its process runs.
    Running,
    /// It exited and is started again after a wait.
    Waiting,
    /// It is being stopped.
    Stopping,
    /// It ended by itself or was stopped.
    Exited(ExitStatus),
    /// This node could not start it.
    Failed,
    /// Its container vanished with the machine's last boot, or its lease lapsed.
    Lost,
    /// It made way for something of a higher priority.
    Evicted,
}

impl PlacementState {
    /// Whether a replica in this state counts as present.
    pub fn is_active(&self) -> bool {
        use PlacementState::{Evicted, Exited, Failed, Lost};
        !matches!(self, Exited(_) | Failed | Lost | Evicted)
    }

    /// Whether a container may be running in this state.
    pub fn may_run(&self) -> bool {
        matches!(self, PlacementState::Starting | PlacementState::Running | PlacementState::Stopping)
    }
}

/// How a container ended.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// As a shell says it: 128 + n for signal n.
    pub code: i32,
    /// The kernel killed it for memory.
    pub out_of_memory: bool,
}

/// Why a container did not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartError {
    /// What was asked for cannot run anywhere: no such command, say. `code` is docker's: 126 or 127, else 125.
    Workload {
        /// The exit code to report.
        code: i32,
        /// In words.
        reason: String,
    },
    /// This machine could not: no space, no permission. Another may.
    Node(String),
}

/// What an earlier life's container is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It runs.
    Running,
    /// It ended meanwhile.
    Exited(ExitStatus),
    /// Nothing is left of it.
    Gone,
}

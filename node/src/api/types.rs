//! What travels over the local API. Field names are stable: scripts read them through `--json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why a request was not carried out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// A sentence.
    pub error: String,
    /// What to do.
    pub hint: String,
}

/// One replica, as `ps` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The workload's id, 12 digits.
    pub id: String,
    /// The workload's name.
    pub name: String,
    /// What it runs, as people write it.
    pub image: String,
    /// The name of the node that runs it; empty while none does.
    pub node: String,
    /// pending, fetching, blocked, starting, running, waiting, stopping, exited, failed, lost, evicted.
    pub state: String,
    /// From 1.
    pub replica: u32,
    /// Which try, from 1; 0 is none yet.
    pub epoch: u64,
    /// When its container started last, in milliseconds since 1970; 0 is not yet.
    pub started: u64,
    /// Replicas wanted.
    pub wanted: u32,
    /// Starts after the first.
    pub restarts: u32,
    /// Once it has exited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Why, where the state does not say it.
    pub detail: String,
    /// When it was submitted, in milliseconds since 1970.
    pub submitted: u64,
    /// What it runs inside.
    pub command: Vec<String>,
    /// Whether it runs on a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// Ports of its node that lead into it, as they are published.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// One node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its id, 12 digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// alive, suspect, down, left.
    pub state: String,
    /// worker, submitter, admin.
    pub role: String,
    /// Whether it is the one that was asked.
    pub here: bool,
    /// Thousandths of a core: all, reserved.
    pub cpu_milli: (u64, u64),
    /// Bytes: all, reserved.
    pub memory: (u64, u64),
    /// Placements that are not over.
    pub placements: u32,
    /// Images that are complete there.
    pub images: u32,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// Release.
    pub version: String,
    /// What constraints are matched against.
    pub labels: BTreeMap<String, String>,
    /// Whether it is being emptied.
    pub draining: bool,
}

/// One image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageRow {
    /// As people write it.
    pub reference: String,
    /// `sha256:…` of its config.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// Names of nodes that have all of it.
    pub nodes: Vec<String>,
}

/// A node that has an image, or is getting it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlaceRow {
    /// Its name.
    pub node: String,
    /// `whole`, or `fetching`.
    pub image: String,
    /// Of one that is fetching: chunks of the image's files that are there, and how many there are, as far as it is known.
    #[serde(default)]
    pub chunks: Option<(u32, Option<u32>)>,
    /// The same of what it was made of: `whole`, `fetching`, or nothing.
    pub original: String,
}

/// What an image takes on this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UsageRow {
    /// Its names.
    pub names: Vec<String>,
    /// Bytes that it needs.
    pub size: u64,
    /// Of those, what would be free without it.
    pub own: u64,
}

/// What reading all of an image has shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verified {
    /// What was read: the image, and what it was made of.
    pub parts: u32,
    /// What is not what it should be.
    pub wrong: Vec<String>,
    /// Whether some of that is fetched again from other nodes; what is not, and not lost, is whole again already.
    pub coming: bool,
    /// Whether no other node has some of it.
    pub lost: bool,
}

/// This node and its mesh.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The mesh's name.
    pub mesh: String,
    /// The mesh's id.
    pub mesh_id: String,
    /// This node's name.
    pub node: String,
    /// This node's id.
    pub node_id: String,
    /// This node's role.
    pub role: String,
    /// When its certificate ends, in seconds since 1970.
    pub certified_until: u64,
    /// Nodes that are alive.
    pub nodes: u32,
    /// Thousandths of a core, of all of them.
    pub cpu_milli: u64,
    /// Bytes of memory, of all of them.
    pub memory: u64,
    /// Containers that run here.
    pub running_here: u32,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// The daemon's process.
    pub pid: u32,
}

/// What `run` asks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunRequest {
    /// Empty is chosen by the node.
    pub name: String,
    /// As people write it, or an id.
    pub image: String,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Replaces the image's working folder.
    pub workdir: Option<String>,
    /// Replaces the host name inside.
    pub hostname: Option<String>,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory: u64,
    /// Processes.
    pub pids: u64,
    /// How many.
    pub replicas: u32,
    /// no, always, on-failure, on-failure:N.
    pub restart: String,
    /// Labels a node must have.
    pub on: BTreeMap<String, String>,
    /// Replaces the image's stop signal.
    pub stop_signal: Option<String>,
    /// Seconds from the stop signal to SIGKILL.
    pub stop_timeout: u32,
    /// Whether it is forgotten once all of it has ended.
    #[serde(default)]
    pub auto_remove: bool,
    /// All replicas or none.
    pub gang: bool,
    /// Never two of one replica at once.
    pub singleton: bool,
    /// It starts before all of its image is there.
    #[serde(default)]
    pub lazy: bool,
    /// What has a lower one makes way when there is no room; none is the usual one.
    pub priority: Option<u8>,
    /// balance, spread, pack; empty is balance.
    pub layout: String,
    /// Names of workloads on whose nodes it would rather be.
    pub near: Vec<String>,
    /// Names of workloads on whose nodes it must not be.
    pub apart: Vec<String>,
    /// Whether it runs on a terminal.
    pub terminal: bool,
    /// Whether somebody may write to its standard input.
    pub input: bool,
    /// How it is known to be well; none is as its image says.
    pub health: Option<moyai_protocol::workload::Health>,
    /// What it is given of its machine, and kept from.
    pub confinement: moyai_protocol::confinement::Confinement,
}

/// What `update` asks for: what is not named stays as it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateRequest {
    /// As people write it, or an id.
    pub image: Option<String>,
    /// Replaces the command.
    pub command: Option<Vec<String>>,
    /// `NAME=value`, set or replaced.
    pub env: Vec<String>,
    /// Thousandths of a core.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory: Option<u64>,
    /// How many may run besides those wanted.
    pub max_surge: u32,
    /// How many of those wanted may be missing.
    pub max_unavailable: u32,
}

impl Default for UpdateRequest {
    fn default() -> Self {
        let moyai_protocol::catalog::Rollout { max_surge, max_unavailable } = Default::default();
        let (image, command, env, cpu_milli, memory) = (None, None, Vec::new(), None, None);
        UpdateRequest { image, command, env, cpu_milli, memory, max_surge, max_unavailable }
    }
}

/// How far an update is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RolloutRow {
    /// Replicas wanted.
    pub wanted: u32,
    /// Replicas that run as they are to, and stay up.
    pub updated: u32,
    /// Replicas of the new form that have just come up, or not yet.
    pub coming: u32,
    /// Replicas of the old form.
    pub outdated: u32,
    /// Why it was taken back; empty when it was not.
    pub setback: String,
    /// What it waits for, where it does.
    pub waits: String,
}

/// What `revoke` asks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RevokeRequest {
    /// In the admin's words.
    pub reason: String,
    /// The mesh's root key.
    pub root_key: Option<[u8; 32]>,
    /// Also where others fall with it.
    pub force: bool,
}

/// What became of an order about a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ordered {
    /// The node's name.
    pub node: String,
    /// alive, suspect, down, left.
    pub state: String,
    /// Whether it is to be emptied.
    pub draining: bool,
    /// Placements that are still there.
    pub placements: u32,
    /// Those of them that find no place elsewhere, each with the reason.
    pub stuck: Vec<(String, String)>,
}

/// What `run` gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submitted {
    /// The workload's id.
    pub id: String,
    /// The workload's name.
    pub name: String,
}

/// How far an import is, and its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadStep {
    /// It goes on.
    Progress {
        /// Bytes of files read.
        bytes: u64,
        /// Chunks met, and how many were new.
        chunks: (u64, u64),
    },
    /// One image is in.
    Image {
        /// As people write it.
        reference: String,
        /// `sha256:…` of its config.
        id: String,
        /// Bytes.
        size: u64,
        /// Chunks, and how many were new.
        chunks: (u64, u64),
    },
    /// It failed; nothing was stored.
    Failed(Failure),
}

/// How an image came from other nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Came {
    /// Bytes from each node, by name; who gave most comes first.
    pub from: Vec<(String, u64)>,
    /// Bytes of its files that were here before, in other images.
    pub had: u64,
    /// In milliseconds.
    pub took: u64,
}

/// How far a pull is, and its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullStep {
    /// Bytes of this stage that are here, and all of them; nodes that gave some.
    Progress(u64, u64, u32),
    /// The node of this name fetches it from its registry; it comes from there.
    Waits(String),
    /// All of it is here.
    Done {
        /// As people write it.
        reference: String,
        /// `sha256:…` of its config.
        id: String,
        /// Bytes.
        size: u64,
        /// How it came from other nodes, if it had to.
        came: Option<Came>,
    },
    /// It cannot be had.
    Failed(Failure),
}

/// What `invite` asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InviteRequest {
    /// worker, submitter, admin.
    pub role: String,
    /// How many nodes may use it.
    pub uses: u32,
    /// Seconds it is good for.
    pub ttl: u64,
}

/// What `invite` gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Invitation {
    /// The line for `moyai join`.
    pub ticket: String,
    /// How many nodes may use it.
    pub uses: u32,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// What a joiner becomes.
    pub role: String,
}

/// One bid in a record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuoteRow {
    /// Whose.
    pub node: String,
    /// Expected milliseconds.
    pub price: u32,
    /// What it is made of, in words.
    pub because: String,
    /// Replicas it was given, from 1.
    pub won: Vec<u32>,
}

/// Why one replica is where it is, or nowhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WhyRow {
    /// `name.replica`.
    pub replica: String,
    /// As in [`Row`].
    pub state: String,
    /// Where.
    pub node: String,
    /// Which try.
    pub epoch: u64,
    /// In words, why the auction was held.
    pub cause: String,
    /// Who held it.
    pub auctioneer: String,
    /// When it was opened, in milliseconds since 1970.
    pub at: u64,
    /// How long it took, in milliseconds.
    pub took: u32,
    /// Nodes asked, of how many.
    pub asked: (u32, u32),
    /// Bids, best first.
    pub quotes: Vec<QuoteRow>,
    /// Bids beyond those.
    pub more_quotes: u32,
    /// Some refusals: node, reason with amounts.
    pub refusals: Vec<(String, String)>,
    /// All refusals, counted by kind.
    pub refused: Vec<(String, u32)>,
    /// Why the state is what it is.
    pub detail: String,
    /// Every epoch that is remembered, the first one first.
    pub history: Vec<EpochRow>,
    /// Custodians of a singleton: name, and whether it is alive.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub custodians: Vec<(String, bool)>,
}

/// One epoch of one replica.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EpochRow {
    /// Which try.
    pub epoch: u64,
    /// Who took it.
    pub node: String,
    /// When the auction was opened, in milliseconds since 1970.
    pub at: u64,
    /// In words, why it was held.
    pub cause: String,
    /// Who held it.
    pub auctioneer: String,
    /// Expected milliseconds that the winner bid; none where its bid is not kept.
    pub price: Option<u32>,
    /// Nodes that bid.
    pub bids: u32,
}

/// One line of a log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogRow {
    /// Which replica, from 1.
    pub replica: u32,
    /// stdout, stderr, or audit: what a strict sandbox refused.
    pub stream: String,
    /// RFC 3339.
    pub time: String,
    /// With its newline; bytes that are no UTF-8 are replaced.
    pub text: String,
}

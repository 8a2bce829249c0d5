//! What can be asked, and how it is explained.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Moyai: machines lashed together to run containers, with no controller.
#[derive(Debug, Parser)]
#[command(name = "moyai", version, about, max_term_width = 110)]
#[command(after_help = "Five minutes on two machines:
  one$ moyai init
  one$ moyai invite                 # prints a line for the other machine
  two$ moyai join moyai1…
  one$ moyai load alpine.tar
  two$ moyai run alpine echo hello

On one machine: `moyai demo`")]
pub struct Args {
    /// The node's folder [default: /var/lib/moyai]
    #[arg(long, global = true, value_name = "DIR", env = "MOYAI_DATA")]
    pub data: Option<PathBuf>,
    /// The daemon's socket [default: /run/moyai/moyai.sock, or moyai.sock in the folder named by --data]
    #[arg(long, global = true, value_name = "PATH", env = "MOYAI_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Where the daemon listens, for init, join and up [default: 0.0.0.0:4755]
    #[arg(long, global = true, value_name = "ADDR:PORT", env = "MOYAI_LISTEN")]
    pub listen: Option<String>,
    /// One JSON object a line, with stable field names
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Start a mesh, with this machine as its first node
    Init(InitWish),
    /// Print a line with which other machines join
    Invite(InviteWish),
    /// Join the mesh that an invitation is for
    Join(JoinWish),
    /// Start this machine's daemon again
    Up(UpWish),
    /// Stop this machine's daemon; its containers go on
    Down(DownWish),
    /// List the nodes of the mesh
    Nodes,
    /// Show this node and its mesh
    Status,
    /// Show what happens in the mesh as this node sees it
    Events(EventsWish),
    /// Load an image from an archive (docker save, OCI layout; .gz and .zst too)
    Load(LoadWish),
    /// Fetch an image from the nodes that have it to this one
    Pull(PullWish),
    /// List the images of the mesh
    Images,
    /// Run a container somewhere in the mesh
    Run(Box<RunWish>),
    /// List what runs
    Ps(PsWish),
    /// Show what a container wrote
    Logs(LogsWish),
    /// Show why something runs where it runs, or does not run
    Why(OneWish),
    /// Stop workloads; their names and logs stay
    Stop(ManyWish),
    /// Start stopped workloads again
    Start(ManyWish),
    /// Change how many replicas are wanted
    Scale(ScaleWish),
    /// Stop workloads and forget them
    Rm(ManyWish),
    /// Wait until a workload has ended, and exit as it did
    Wait(OneWish),
    /// Show all of it on this machine: three virtual hosts, one container, one failure
    Demo(DemoWish),
    #[command(hide = true)]
    Daemon(DaemonWish),
    #[command(hide = true)]
    VirtualHost(VirtualHostWish),
}

/// How a node is set up.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct NodeWish {
    /// What this node is called [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Stay in front, for service managers
    #[arg(long)]
    pub foreground: bool,
    /// Give the node a label that --on can ask for
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Do not look for other nodes on the LAN
    #[arg(long)]
    pub no_mdns: bool,
    /// Cores this node gives to the mesh [default: all]
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Memory this node gives to the mesh [default: all]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
}

/// `init`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai init
  moyai init --listen 10.0.0.5:4755 --label gpu=a100
  moyai --data /srv/other --listen 0.0.0.0:5000 init     # a second node on this machine")]
pub struct InitWish {
    #[command(flatten)]
    pub node: NodeWish,
}

/// `join`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:
  moyai join moyai1qf0…")]
pub struct JoinWish {
    /// The line that `moyai invite` printed
    pub ticket: String,
    #[command(flatten)]
    pub node: NodeWish,
}

/// `up`.
#[derive(Debug, ClapArgs)]
pub struct UpWish {
    /// Stay in front, for service managers
    #[arg(long)]
    pub foreground: bool,
}

/// `down`.
#[derive(Debug, ClapArgs)]
pub struct DownWish {
    /// Tell the others that this node goes, so that its work moves at once
    #[arg(long)]
    pub leave: bool,
}

/// `invite`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai invite
  moyai invite --role worker --uses 10 --ttl 24h

Roles: a worker runs what others submit; a submitter also submits; an admin also invites.")]
pub struct InviteWish {
    /// What joiners become: worker, submitter or admin
    #[arg(long, default_value = "submitter", value_name = "ROLE")]
    pub role: String,
    /// How many machines may use it
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub uses: u32,
    /// How long it is good for: 30s, 15m, 2h, 7d
    #[arg(long, default_value = "1h", value_name = "TIME")]
    pub ttl: String,
}

/// `events`.
#[derive(Debug, ClapArgs)]
pub struct EventsWish {
    /// For docker's sake: events are always followed
    #[arg(long, short)]
    pub follow: bool,
}

/// `load`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai load alpine.tar.gz
  moyai load --tag lab/tools:2 ./oci-layout
  skopeo copy … docker-archive:/dev/stdout | moyai load --tag alpine -")]
pub struct LoadWish {
    /// An archive, a folder with an OCI layout, or - for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Call the image this, whatever the archive calls it
    #[arg(long, value_name = "NAME[:TAG]")]
    pub tag: Option<String>,
    /// The most bytes its files may have, decompressed
    #[arg(long, default_value = "32g", value_name = "SIZE")]
    pub limit: String,
}

/// `pull`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:
  moyai pull alpine            # so that a later run here starts at once")]
pub struct PullWish {
    /// A name, or the beginning of an id
    pub image: String,
}

/// `run`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai run alpine echo hello
  moyai run -d --name web --cpus 0.5 --memory 64m alpine httpd -f -p 8080
  moyai run -d --replicas 3 --restart always --on arch=x86_64 worker:2")]
pub struct RunWish {
    /// Return once it runs
    #[arg(long, short)]
    pub detach: bool,
    /// What to call it [default: two words and a number]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Set a variable; NAME alone passes this shell's value on
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Read variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Cores it may use, and which the node reserves for it
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Memory it may use, and which the node reserves for it: 64m, 2g
    #[arg(long, short, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Processes it may have
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub pids_limit: u64,
    /// How many of it
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub replicas: u32,
    /// When it exits: no, always, on-failure, on-failure:N
    #[arg(long, default_value = "no", value_name = "POLICY")]
    pub restart: String,
    /// Only on nodes with this label
    #[arg(long, value_name = "NAME=VALUE")]
    pub on: Vec<String>,
    /// Run this instead of the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Run as this user
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Start in this folder
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<String>,
    /// What it calls itself
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// What asks it to stop
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// Seconds between that and SIGKILL
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    pub stop_timeout: u32,
    /// Remove it when it has ended
    #[arg(long)]
    pub rm: bool,
    /// The image
    pub image: String,
    /// What to run in it instead of the image's command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `ps`.
#[derive(Debug, ClapArgs)]
pub struct PsWish {
    /// Also what has ended
    #[arg(long, short)]
    pub all: bool,
    /// Ids only
    #[arg(long, short)]
    pub quiet: bool,
}

/// `logs`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai logs -f web
  moyai logs --tail 20 web.2")]
pub struct LogsWish {
    /// A name, a name with a replica (web.2), or the beginning of an id
    pub name: String,
    /// Go on as it grows
    #[arg(long, short)]
    pub follow: bool,
    /// Only so many of the last lines
    #[arg(long, short = 'n', value_name = "LINES")]
    pub tail: Option<u32>,
    /// Show when each line was written
    #[arg(long, short)]
    pub timestamps: bool,
}

/// One workload.
#[derive(Debug, ClapArgs)]
pub struct OneWish {
    /// A name, a name with a replica (web.2), or the beginning of an id
    pub name: String,
}

/// Some workloads.
#[derive(Debug, ClapArgs)]
pub struct ManyWish {
    /// Names, or beginnings of ids
    #[arg(required = true)]
    pub names: Vec<String>,
    /// For docker's sake: rm always stops what runs
    #[arg(long, short)]
    pub force: bool,
}

/// `scale`.
#[derive(Debug, ClapArgs)]
pub struct ScaleWish {
    /// A name, or the beginning of an id
    pub name: String,
    /// How many are wanted
    pub replicas: u32,
}

/// `demo`.
#[derive(Debug, ClapArgs)]
pub struct DemoWish {
    /// An image archive to show it with [default: one made from this program]
    pub image: Option<PathBuf>,
}

/// The daemon itself.
#[derive(Debug, ClapArgs)]
pub struct DaemonWish {
    /// Tell whoever started it, over descriptor 3, how the start went
    #[arg(long)]
    pub ready: bool,
}

/// A process as if on another host.
#[derive(Debug, ClapArgs)]
pub struct VirtualHostWish {
    /// A network namespace
    #[arg(long)]
    pub network: PathBuf,
    /// Its cgroup subtree
    #[arg(long)]
    pub cgroup: String,
    /// What the host is called
    #[arg(long)]
    pub name: String,
    /// What to run there
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

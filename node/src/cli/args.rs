//! What can be asked, and how it is explained.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use moyai_runtime::store::Form;

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
    /// Empty a node: what it runs moves to others
    Drain(DrainWish),
    /// Make a node a member no more, wherever it is
    Revoke(RevokeWish),
    /// Give a singleton new custodians when most of the old ones are gone for good
    Reseat(ReseatWish),
    /// Show what would move where if nodes died, on a simulated copy of this mesh
    Whatif(WhatifWish),
    /// Show this node and its mesh
    Status,
    /// Show what happens in the mesh as this node sees it
    Events(EventsWish),
    /// Load an image from an archive (docker save, OCI layout; .gz and .zst too)
    Load(LoadWish),
    /// Fetch an image to this node: from those that have it, or else from its registry
    Pull(PullWish),
    /// List the images of the mesh
    Images,
    /// Save, tag, remove, verify an image; see where it is
    #[command(subcommand)]
    Image(ImageVerb),
    /// Show what the images on this node take, and what would be free without each
    Df,
    /// Run a container somewhere in the mesh
    Run(Box<RunWish>),
    /// List what runs
    Ps(PsWish),
    /// Show what a container wrote
    Logs(LogsWish),
    /// Run another process in a container, wherever it is
    Exec(ExecWish),
    /// Show what a container writes, and write to it
    Attach(AttachWish),
    /// Copy files into a container, or out of one
    Cp(CpWish),
    /// Show what containers use
    Stats(StatsWish),
    /// Stop all processes of containers where they are
    Pause(NamesWish),
    /// Let them go on
    Unpause(NamesWish),
    /// Show why something runs where it runs, or does not run
    Why(OneWish),
    /// Stop workloads; their names and logs stay
    Stop(ManyWish),
    /// Start stopped workloads again
    Start(ManyWish),
    /// Change how many replicas are wanted
    Scale(ScaleWish),
    /// Run something else under a name, one replica after the other
    Update(UpdateWish),
    /// Go back to what ran before the last update
    Rollback(OneWish),
    /// Stop workloads and forget them
    Rm(ManyWish),
    /// Wait until a workload has ended, and exit as it did
    Wait(OneWish),
    /// Show all of it on this machine: three virtual hosts, one container, one failure
    Demo(DemoWish),
    /// Run OCI bundles without a daemon, with runc's verbs: `moyai oci --help`
    Oci(OciWish),
    #[command(hide = true)]
    Daemon(DaemonWish),
    #[command(hide = true)]
    VirtualHost(VirtualHostWish),
}

/// `oci`, which has a command line of its own.
#[derive(Debug, ClapArgs)]
#[command(disable_help_flag = true)]
pub struct OciWish {
    /// See `moyai oci --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<String>,
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
    /// A folder or device of this machine that containers may be given, with all below it; whoever may submit can then read and change it
    #[arg(long, value_name = "DIR")]
    pub offer: Vec<PathBuf>,
    /// Where docker, podman, skopeo and others push to and pull from the mesh; `off` for nowhere [default: 127.0.0.1:5000]
    #[arg(long, value_name = "ADDR")]
    pub registry: Option<String>,
    /// What images become on this node: `image`, an EROFS image whose files are the store's own (Linux 6.12 and root), or `folders`, unpacked layers [default: what the kernel can]
    #[arg(long, value_name = "FORM")]
    pub rootfs: Option<Form>,
    /// How much room images may take here, like 50G: beyond it what other nodes have too is given up [default: as much as there is]
    #[arg(long, value_name = "SIZE")]
    pub image_budget: Option<String>,
    /// The most bytes a second that this node gives of its images to others, like 2M [default: as fast as it goes]
    #[arg(long, value_name = "RATE")]
    pub upload_limit: Option<String>,
    /// Containers may be given this machine's own network; whoever may submit can then reach all that the machine reaches
    #[arg(long)]
    pub offer_host_network: bool,
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
#[command(after_help = "Examples:
  moyai events           # what this node has seen since its daemon started
  moyai events -f        # and what happens from now on")]
pub struct EventsWish {
    /// Go on as things happen
    #[arg(long, short)]
    pub follow: bool,
}

/// `drain`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai drain lab-7             # returns when nothing runs there any more
  moyai drain --undo lab-7      # it takes work again

A drained node may leave: `moyai down --leave` on it.")]
pub struct DrainWish {
    /// A name, or the beginning of an id
    pub node: String,
    /// Let it take work again
    #[arg(long)]
    pub undo: bool,
    /// Do not wait until it is empty
    #[arg(long, short)]
    pub detach: bool,
}

/// `revoke`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai revoke lab-7 --reason 'stolen'
  moyai revoke founder --root-key /mnt/safe/root.key

Every node cuts its connections to it, believes nothing more of it, and its work comes up elsewhere. It cannot be taken
back; the machine may join again with a new key. An admin is revoked by who certified it, or with the root key.")]
pub struct RevokeWish {
    /// A name, or the beginning of an id
    pub node: String,
    /// Why, for whoever asks later
    #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
    pub reason: String,
    /// The mesh's root key
    #[arg(long, value_name = "FILE")]
    pub root_key: Option<PathBuf>,
    /// Also where nodes that it certified fall with it
    #[arg(long)]
    pub force: bool,
}

/// `reseat`.
#[derive(Debug, ClapArgs)]
pub struct ReseatWish {
    /// A singleton's name, or the beginning of its id
    pub name: String,
    /// Do it, knowing that two may run at once if the old custodians are only cut off
    #[arg(long)]
    pub force: bool,
}

/// `whatif`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai whatif --kill lab-7
  moyai whatif --kill lab-7 --kill lab-8 --json")]
pub struct WhatifWish {
    /// A node that would die; may be given again
    #[arg(long, value_name = "NODE", required = true, num_args = 1..)]
    pub kill: Vec<String>,
    /// Decides the simulated delays
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
}

/// `update`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai update web --image nginx:2
  moyai update web -e COLOUR=blue --max-surge 3 --max-unavailable 0
  moyai update web httpd -f -p 8081

A new replica comes up elsewhere before its predecessor ends; where no other node has room, in its place. If one does not
stay up, all of it goes back to what ran before.")]
pub struct UpdateWish {
    /// A name, or the beginning of an id
    pub name: String,
    /// Run this image
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Set a variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Cores it may use
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Memory it may use
    #[arg(long, short, value_name = "SIZE")]
    pub memory: Option<String>,
    /// How many may run besides those wanted
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub max_surge: u32,
    /// How many of those wanted may be missing
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub max_unavailable: u32,
    /// Do not wait until it is done
    #[arg(long, short)]
    pub detach: bool,
    /// What to run instead of the command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
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
#[command(after_help = "Examples:
  moyai pull alpine                     # so that a later run here starts at once
  moyai pull registry.example/app:2     # what the mesh has not comes from its registry; `docker login` is minded")]
pub struct PullWish {
    /// From its registry even if the mesh has something of that name
    #[arg(long)]
    pub fresh: bool,
    /// A name, or the beginning of an id
    pub image: String,
}

/// `image`.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  moyai image save alpine -o alpine.tar     # bit for bit what was loaded; docker, podman and skopeo read it
  moyai image tag alpine:3.20 base:1
  moyai image rm base:1                     # on every node")]
pub enum ImageVerb {
    /// Write images to an archive, bit for bit what they were made of
    Save {
        /// Where to [default: standard output]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Names, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Give an image another name
    Tag {
        /// A name, or the beginning of an id
        image: String,
        /// The new name
        name: String,
    },
    /// Take names back on every node, and give up what nothing needs then
    Rm {
        /// Also when something runs it
        #[arg(long, short)]
        force: bool,
        /// Names
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove what belongs to no image on this node: what downloads left that were given up
    Prune,
    /// Read all of an image on this node, and compare it with its digests
    Verify {
        /// A name, or the beginning of an id
        image: String,
    },
    /// Show which nodes have an image, and what it was made of
    Where {
        /// A name, or the beginning of an id
        image: String,
    },
}

/// `run`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai run alpine echo hello
  moyai run -d --name web --cpus 0.5 --memory 64m alpine httpd -f -p 8080
  moyai run -d --name web -p 8080:80 nginx              # port 8080 of the node it runs on
  moyai run -d --replicas 3 --restart always --on arch=x86_64 worker:2
  moyai run -d --replicas 64 --gang --spread mpi:4      # all 64 or none
  moyai run -d --singleton --restart always ledger      # never two at once")]
pub struct RunWish {
    /// Return once it runs
    #[arg(long, short)]
    pub detach: bool,
    /// Give it a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// Keep its standard input open, and pass this command's on
    #[arg(long, short)]
    pub interactive: bool,
    /// Keys that leave it running
    #[arg(long, default_value = "ctrl-p,ctrl-q", value_name = "KEYS", hide_default_value = true)]
    pub detach_keys: String,
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
    /// All replicas or none
    #[arg(long)]
    pub gang: bool,
    /// Never two of one replica at once, not even when the network is cut; it runs where a majority of its custodians is
    #[arg(long)]
    pub singleton: bool,
    /// Start as soon as the list of the image's files is there; what is read of them comes first, the rest meanwhile (Linux 6.12 and root;
    /// elsewhere it waits for all of the image)
    #[arg(long)]
    pub lazy: bool,
    /// What has a lower one makes way when there is no room: 0 to 100 [default: 50]
    #[arg(long, value_name = "N")]
    pub priority: Option<u8>,
    /// On as many nodes as possible
    #[arg(long, conflicts_with = "pack")]
    pub spread: bool,
    /// On as few nodes as possible
    #[arg(long)]
    pub pack: bool,
    /// Rather on the nodes of this workload
    #[arg(long, value_name = "NAME")]
    pub near: Vec<String>,
    /// Never on a node with this workload; its own name keeps its replicas apart
    #[arg(long, value_name = "NAME")]
    pub apart: Vec<String>,
    #[command(flatten)]
    pub health: HealthWish,
    #[command(flatten)]
    pub confinement: ConfinementWish,
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

/// How a container is known to be well.
#[derive(Debug, ClapArgs)]
pub struct HealthWish {
    /// A line for its shell; it is well when that ends with 0 [default: as the image says]
    #[arg(long, value_name = "COMMAND", conflicts_with = "no_healthcheck")]
    pub health_cmd: Option<String>,
    /// Between two checks
    #[arg(long, default_value = "30s", value_name = "TIME", hide_default_value = true)]
    pub health_interval: String,
    /// What one may take
    #[arg(long, default_value = "30s", value_name = "TIME", hide_default_value = true)]
    pub health_timeout: String,
    /// Failures in a row, until it is not well; with a restart policy it is started anew then
    #[arg(long, default_value_t = 3, value_name = "N", hide_default_value = true)]
    pub health_retries: u32,
    /// From its start, in which failures do not count
    #[arg(long, default_value = "0s", value_name = "TIME", hide_default_value = true)]
    pub health_start_period: String,
    /// Do not check it, whatever the image says
    #[arg(long)]
    pub no_healthcheck: bool,
}

/// What a container is given of its machine, and kept from.
#[derive(Debug, ClapArgs)]
pub struct ConfinementWish {
    /// Put a volume or a folder of the machine into it; the node must offer the folder (`moyai init --offer DIR`)
    #[arg(long, short, value_name = "NAME|/DIR:/INSIDE[:ro]")]
    pub volume: Vec<String>,
    /// Put memory into it
    #[arg(long, value_name = "/INSIDE[:size=64m]")]
    pub tmpfs: Vec<String>,
    /// Its own files cannot be changed
    #[arg(long)]
    pub read_only: bool,
    /// Give it a capability beyond docker's usual
    #[arg(long, value_name = "NAME")]
    pub cap_add: Vec<String>,
    /// Take one of the usual capabilities from it; ALL takes every one
    #[arg(long, value_name = "NAME")]
    pub cap_drop: Vec<String>,
    /// Let a port of the node lead into it
    #[arg(long, short, value_name = "[IP:]PORT:PORT[/udp]")]
    pub publish: Vec<String>,
    /// bridge, none, or the node's own: host [default: bridge; none in a strict sandbox]
    #[arg(long, value_name = "KIND")]
    pub network: Option<String>,
    /// Have process 1 in it be no program of its own, but one that waits for orphans and passes signals on; nothing can be
    /// written to /proc/1/fd/1 then
    #[arg(long)]
    pub init: bool,
    /// Give a name an address in its hosts file; host-gateway is the node, as it is reached from the bridge
    #[arg(long, value_name = "NAME:IP")]
    pub add_host: Vec<String>,
    /// Ask this server for names, instead of those that the node asks; names of workloads are found all the same
    #[arg(long, value_name = "IP")]
    pub dns: Vec<std::net::IpAddr>,
    /// Look for names without a dot in this domain, instead of the node's; `.` is in none
    #[arg(long, value_name = "DOMAIN")]
    pub dns_search: Vec<String>,
    /// What its resolver minds, instead of the node's: ndots:2
    #[arg(long, value_name = "OPTION")]
    pub dns_option: Vec<String>,
    /// Give it a device of the node: one that the node offers (`moyai init --offer /dev/kvm`), or one that its CDI files name
    #[arg(long, value_name = "/DEV[:/INSIDE][:rwm]|VENDOR/CLASS=NAME")]
    pub device: Vec<String>,
    /// Give it GPUs that are nobody else's: so many, all, or device=NAME
    #[arg(long, value_name = "N")]
    pub gpus: Option<String>,
    /// Its share of the processors where others want them too, 2 to 262144 [default: 1024]
    #[arg(long, value_name = "N")]
    pub cpu_shares: Option<u32>,
    /// Run it on these of the node's processors: 0-3,6
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Give it memory of these memory nodes (NUMA)
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Memory and swap together, -1 for any [default: as much as --memory, and so no swap]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// Memory at /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE")]
    pub shm_size: Option<String>,
    /// The most that it may write to its own files, on a disk of its own: size=1g
    #[arg(long, value_name = "size=SIZE")]
    pub storage_opt: Vec<String>,
    /// What each of its processes may have: nofile=1024:4096, memlock=-1
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<String>,
    /// A setting of the kernel for its own namespaces: net.core.somaxconn=1024
    #[arg(long, value_name = "NAME=VALUE")]
    pub sysctl: Vec<String>,
    /// Its share of the disks where others want them too, 10 to 1000 [default: 100]; only where the machine's disks have shares
    /// (BFQ, io.cost)
    #[arg(long, value_name = "N")]
    pub blkio_weight: Option<u16>,
    /// Read no more than so many bytes a second of a disk: /dev/sda:10m; .:10m is the one that containers lie on
    #[arg(long, value_name = "PATH:SIZE")]
    pub device_read_bps: Vec<String>,
    /// Write no more than so many (on cgroup v1 only what goes past the cache is held back)
    #[arg(long, value_name = "PATH:SIZE")]
    pub device_write_bps: Vec<String>,
    /// Read no more often than so many times a second
    #[arg(long, value_name = "PATH:N")]
    pub device_read_iops: Vec<String>,
    /// Write no more often than so many times a second
    #[arg(long, value_name = "PATH:N")]
    pub device_write_iops: Vec<String>,
    /// The OCI runtime that makes it: crun, runc, runsc [default: the built-in one]
    #[arg(long, value_name = "NAME")]
    pub runtime: Option<String>,
    /// standard, or strict for hostile code: see `moyai logs --audit`
    #[arg(long, default_value = "standard", value_name = "KIND")]
    pub sandbox: String,
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
    /// Show what a strict sandbox refused, instead of what the container wrote
    #[arg(long)]
    pub audit: bool,
}

/// `exec`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai exec -it web sh
  moyai exec web.2 cat /etc/hostname
  tar c files | moyai exec -i web tar x -C /srv")]
pub struct ExecWish {
    /// Give it a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// Pass this command's input on
    #[arg(long, short)]
    pub interactive: bool,
    /// Set a variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Run as this user
    #[arg(long, short, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Start in this folder
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<String>,
    /// A name, a name with a replica (web.2), or the beginning of an id
    pub name: String,
    /// What to run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

/// `attach`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Ctrl-P Ctrl-Q leaves a container that was run with -t, and it goes on.")]
pub struct AttachWish {
    /// Only show what it writes
    #[arg(long)]
    pub no_stdin: bool,
    /// Keys that leave it
    #[arg(long, default_value = "ctrl-p,ctrl-q", value_name = "KEYS")]
    pub detach_keys: String,
    /// A name, a name with a replica (web.2), or the beginning of an id
    pub name: String,
}

/// `cp`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  moyai cp web:/etc/nginx.conf .
  moyai cp ./site web.2:/srv
  moyai cp ./site/. web:/srv              # what is in it
  moyai cp web:/var/log - | tar t         # as a tar stream")]
pub struct CpWish {
    /// Keep owners
    #[arg(long, short)]
    pub archive: bool,
    /// NAME:PATH, a path on this machine, or - for a tar stream
    pub from: String,
    /// The same
    pub to: String,
}

/// `stats`.
#[derive(Debug, ClapArgs)]
pub struct StatsWish {
    /// Once, and not again and again
    #[arg(long)]
    pub no_stream: bool,
    /// Names, or beginnings of ids [default: all that runs]
    pub names: Vec<String>,
}

/// Some workloads, or replicas.
#[derive(Debug, ClapArgs)]
pub struct NamesWish {
    /// Names, names with a replica (web.2), or beginnings of ids
    #[arg(required = true)]
    pub names: Vec<String>,
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

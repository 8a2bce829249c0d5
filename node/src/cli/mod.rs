//! The command line.
//!
//! - [`args`]: what can be asked
//! - [`mesh`]: init, invite, join, up, down, leave, nodes, drain, revoke
//! - [`exec`]: another process in a container, or at its own input and output
//! - [`copy`], [`stats`]: cp; stats, pause, unpause
//! - [`images`]: load, pull, images
//! - [`workloads`]: run, ps, logs, why, stop, start, scale, update, rollback, rm, wait
//! - [`oci`]: the built-in runtime for other tools; a command line of its own
//! - [`whatif`]: what would move where, by the simulator
//! - [`output`]: sizes, times, tables, errors
//!
//! Exit codes are docker's: 125 the mesh or the daemon could not, 126 and 127 the command in the image could not be
//! started, else what the container ended with. For commands that run nothing: 0, or 1.

pub mod args;
mod copy;
mod exec;
mod images;
mod mesh;
pub mod oci;
pub mod output;
mod stats;
mod whatif;
mod workloads;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::api::client::Client;
use crate::daemon::Options;
use crate::net::chunks::ChunkTamper;
use args::{Args, Verb};

/// The daemon's folder unless told otherwise.
const DEFAULT_DATA: &str = "/var/lib/moyai";
const DEFAULT_SOCKET: &str = "/run/moyai/moyai.sock";

/// What every command needs.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where the node and its socket are.
    pub options: Options,
    /// What `--listen` said.
    pub listen: Option<String>,
    /// One object a line.
    pub json: bool,
}

impl Context {
    /// The way to the daemon.
    pub fn client(&self) -> Client {
        Client::new(&self.options.socket)
    }
}

/// Runs the command line.
pub fn main(tamper: Option<ChunkTamper>) -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    let data = args.data.unwrap_or_else(default_data);
    let makes_daemon = matches!(args.verb, Verb::Daemon(_) | Verb::Init(_) | Verb::Join(_) | Verb::Up(_));
    if makes_daemon && moyai_runtime::rootless::is_ordinary() {
        return as_root_of_a_namespace(&data);
    }
    // A node that lives elsewhere has its socket there, so that two on one machine do not meet.
    let socket = args.socket.unwrap_or_else(|| {
        if data == std::path::Path::new(DEFAULT_DATA) { PathBuf::from(DEFAULT_SOCKET) } else { data.join("moyai.sock") }
    });
    let context = Context { options: Options { data, socket, tamper }, listen: args.listen, json: args.json };
    let runs = matches!(args.verb, Verb::Run(_) | Verb::Exec(_));
    let result = match args.verb {
        // These start a daemon, or are one: no thread may be there yet.
        Verb::Daemon(wish) => mesh::daemon(&context, wish.ready),
        Verb::Init(wish) => mesh::init(&context, &wish),
        Verb::Join(wish) => mesh::join(&context, &wish),
        Verb::Up(wish) => mesh::up(&context, &wish),
        Verb::Demo(wish) => crate::demo::run(&wish.image),
        Verb::VirtualHost(wish) => crate::demo::virtual_host(&wish),
        // After options of the mesh's; without, it has not come here.
        Verb::Oci(_) => Err(crate::daemon::problem("`oci` comes first", "write `moyai oci …`")),
        verb => on_tokio(other(&context, verb)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::show_error(&error);
            ExitCode::from(if runs { 125 } else { 1 })
        }
    }
}

/// Where a node lives that nobody says a place for: an ordinary user's is in its home (XDG Base Directory Specification).
fn default_data() -> PathBuf {
    if !moyai_runtime::rootless::is_ordinary() {
        return PathBuf::from(DEFAULT_DATA);
    }
    let of_user = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let at_home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share"));
    of_user.or_else(at_home).map_or_else(|| PathBuf::from(DEFAULT_DATA), |path| path.join("moyai"))
}

/// An ordinary user's daemon is root of a user namespace: this command goes on there.
fn as_root_of_a_namespace(data: &std::path::Path) -> ExitCode {
    let warn = |text: &str| eprintln!("warning: {text}");
    let data = data.to_string_lossy();
    match moyai_runtime::rootless::enter(&[("MOYAI_DATA", &*data)], &warn) {
        Ok(ended) => ExitCode::from(ended.code as u8),
        Err(error) => {
            output::show_error(&crate::daemon::problem(
                format!("cannot make a user namespace: {error}"),
                "run it as root, or allow user namespaces (sysctl user.max_user_namespaces; Debian: kernel.unprivileged_userns_clone)",
            ));
            ExitCode::from(1)
        }
    }
}

/// What clap says, and a hint where it is an error and not the help that was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    // Nobody may be reading.
    let _unread = error.print();
    if error.use_stderr() {
        eprintln!("hint: `moyai --help` lists the commands, `moyai COMMAND --help` their options");
    }
    ExitCode::from(error.exit_code() as u8)
}

/// Runs one command's future; the command line needs no second thread.
fn on_tokio<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

async fn other(context: &Context, verb: Verb) -> anyhow::Result<u8> {
    match verb {
        Verb::Invite(wish) => mesh::invite(context, &wish).await,
        Verb::Down(wish) => mesh::down(context, &wish).await,
        Verb::Nodes => mesh::nodes(context).await,
        Verb::Status => mesh::status(context).await,
        Verb::Events(wish) => mesh::events(context, &wish).await,
        Verb::Load(wish) => images::load(context, &wish).await,
        Verb::Pull(wish) => images::pull(context, &wish).await,
        Verb::Images => images::list(context).await,
        Verb::Image(verb) => images::image(context, verb).await,
        Verb::Df => images::df(context).await,
        Verb::Run(wish) => workloads::run(context, *wish).await,
        Verb::Ps(wish) => workloads::ps(context, &wish).await,
        Verb::Exec(wish) => exec::run(context, &wish).await,
        Verb::Attach(wish) => exec::attach(context, &wish).await,
        Verb::Cp(wish) => copy::run(context, &wish).await,
        Verb::Stats(wish) => stats::run(context, &wish).await,
        Verb::Pause(wish) => stats::pause(context, &wish, true).await,
        Verb::Unpause(wish) => stats::pause(context, &wish, false).await,
        Verb::Logs(wish) => workloads::logs(context, &wish).await,
        Verb::Why(wish) => workloads::why(context, &wish).await,
        Verb::Stop(wish) => workloads::stop(context, &wish).await,
        Verb::Start(wish) => workloads::start(context, &wish).await,
        Verb::Scale(wish) => workloads::scale(context, &wish).await,
        Verb::Update(wish) => workloads::update(context, wish).await,
        Verb::Rollback(wish) => workloads::rollback(context, &wish).await,
        Verb::Reseat(wish) => workloads::reseat(context, &wish).await,
        Verb::Drain(wish) => mesh::drain(context, &wish).await,
        Verb::Revoke(wish) => mesh::revoke(context, &wish).await,
        Verb::Whatif(wish) => whatif::run(context, &wish).await,
        Verb::Rm(wish) => workloads::rm(context, &wish).await,
        Verb::Wait(wish) => workloads::wait(context, &wish).await,
        Verb::Oci(_)
        | Verb::Daemon(_)
        | Verb::Init(_)
        | Verb::Join(_)
        | Verb::Up(_)
        | Verb::Demo(_)
        | Verb::VirtualHost(_) => {
            unreachable!("handled before")
        }
    }
}

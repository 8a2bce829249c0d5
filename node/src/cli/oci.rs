//! `moyai oci`: the built-in runtime for other tools, with runc's verbs and flags.
//!
//! It is decided on before anything else of the command line, starts no thread, and knows no mesh.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use moyai_runtime::container::{Failure, signal_number, timestamp};
use moyai_runtime::oci::container::{Addition, Containers, Creation, Description, ROOT};

/// The word by which the program knows.
pub const NAME: &str = "oci";

/// Containers of OCI bundles, without a daemon; with runc's verbs and flags.
#[derive(Debug, Parser)]
#[command(name = "moyai oci", bin_name = "moyai oci", max_term_width = 110, disable_version_flag = true)]
#[command(after_help = "Examples:
  moyai oci run --bundle ./bundle one         # in front, deleted when it has ended
  moyai oci create --bundle ./bundle two; moyai oci start two; moyai oci kill two TERM; moyai oci delete two
  podman --runtime /usr/local/bin/moyai-oci …        # the same as a program of its own")]
struct Wish {
    /// Where containers are kept
    #[arg(long, value_name = "DIR", default_value = ROOT, global = true)]
    root: PathBuf,
    /// Also write errors to this file
    #[arg(long, value_name = "FILE", global = true)]
    log: Option<PathBuf>,
    /// How they are written there
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT", global = true)]
    log_format: LogFormat,
    /// For runc's sake: there is nothing more to be said
    #[arg(long, global = true, hide = true)]
    debug: bool,
    /// For runc's sake: groups are made without systemd, where it would make them
    #[arg(long, global = true, hide = true)]
    systemd_cgroup: bool,
    /// For runc's sake: it is found out
    #[arg(long, global = true, hide = true, value_name = "BOOL")]
    rootless: Option<String>,
    /// What version this is
    #[arg(long, short)]
    version: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
enum ListFormat {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Verb {
    /// Make a container that waits to be started
    Create {
        #[command(flatten)]
        how: CreationWish,
        /// What to call it
        id: String,
    },
    /// Let a created container run its program
    Start { id: String },
    /// Make a container and run it
    Run {
        #[command(flatten)]
        how: CreationWish,
        /// Return when it runs
        #[arg(long, short)]
        detach: bool,
        /// Do not delete it when it has ended
        #[arg(long)]
        keep: bool,
        /// For runc's sake
        #[arg(long, hide = true)]
        no_subreaper: bool,
        /// What to call it
        id: String,
    },
    /// Show what a container is, as JSON
    State { id: String },
    /// Send a signal to a container's first process
    Kill {
        /// To all of its processes
        #[arg(long, short)]
        all: bool,
        id: String,
        /// By name or number
        #[arg(default_value = "SIGTERM")]
        signal: String,
    },
    /// Delete what is left of a container
    Delete {
        /// Kill it first if it runs
        #[arg(long, short)]
        force: bool,
        id: String,
    },
    /// Run another process in a container
    Exec(Box<ExecWish>),
    /// List containers
    List {
        #[arg(long, short, value_enum, default_value_t = ListFormat::Table)]
        format: ListFormat,
        /// Names only
        #[arg(long, short)]
        quiet: bool,
    },
    /// List the processes of a container
    Ps {
        #[arg(long, short, value_enum, default_value_t = ListFormat::Table)]
        format: ListFormat,
        id: String,
    },
    /// Stop all processes of a container where they are
    Pause { id: String },
    /// Let them go on
    Resume { id: String },
    /// Change a container's limits
    Update {
        /// A file with `linux.resources` of the runtime-spec, or - for standard input
        #[arg(long, short, value_name = "FILE")]
        resources: PathBuf,
        id: String,
    },
    /// Write a config.json to begin with: an ordinary container that runs a shell
    Spec {
        /// The bundle's folder
        #[arg(long, short, value_name = "DIR", default_value = ".")]
        bundle: PathBuf,
    },
    /// Show what this runtime can do, as JSON
    Features,
}

#[derive(Debug, ClapArgs)]
struct CreationWish {
    /// The bundle's folder
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// A socket that the terminal's master is sent to
    #[arg(long, value_name = "PATH")]
    console_socket: Option<PathBuf>,
    /// Where the number of its first process is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Do not use pivot_root: on an initramfs there is nothing to pivot
    #[arg(long)]
    no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Descriptors after the first three that it gets
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
}

#[derive(Debug, ClapArgs)]
struct ExecWish {
    /// A file with the process, as `process` of the runtime-spec
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(long, short)]
    tty: bool,
    /// Start in this folder
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set a variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Run as this user
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Another group
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<u32>,
    /// A capability besides the container's
    #[arg(long, short, value_name = "CAP_NAME")]
    cap: Vec<String>,
    /// It cannot gain rights
    #[arg(long)]
    no_new_privs: bool,
    /// Return when it runs
    #[arg(long, short)]
    detach: bool,
    /// Where its number is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// A socket that the terminal's master is sent to
    #[arg(long, value_name = "PATH")]
    console_socket: Option<PathBuf>,
    /// Descriptors after the first three that it gets
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    id: String,
    /// What to run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl From<CreationWish> for Creation {
    fn from(wish: CreationWish) -> Creation {
        Creation {
            bundle: wish.bundle,
            console_socket: wish.console_socket,
            pid_file: wish.pid_file,
            no_pivot: wish.no_pivot,
            no_new_keyring: wish.no_new_keyring,
            preserve_fds: wish.preserve_fds,
        }
    }
}

/// Runs the command line, whose first two words are this program's and [`NAME`]; the small program's begins without the second. Its exit
/// code, when all is said.
pub fn main() -> u8 {
    // Before anything is read or opened.
    let named = std::env::args().nth(1).as_deref() == Some(NAME);
    // `run` begins once and stays what it is, unless it has to begin again after all.
    if std::env::args().any(|word| ["create", "exec"].contains(&word.as_str())) {
        if named {
            // Where it is not, this one does as well.
            let _missing = moyai_runtime::small::become_it(std::env::args_os().skip(2));
        }
        // Where it cannot be, an ordinary user's containers have nobody who is root.
        let _refused = moyai_runtime::oci::seal();
    }
    let wish = match Wish::try_parse_from(std::env::args_os().skip(usize::from(named))) {
        Ok(wish) => wish,
        Err(error) => {
            // Nobody may be reading.
            let _unread = error.print();
            return error.exit_code() as u8;
        }
    };
    if wish.version {
        say(&format!("moyai version {}\nspec: {}", env!("CARGO_PKG_VERSION"), moyai_runtime::oci::VERSION));
        return 0;
    }
    let Some(verb) = wish.verb else {
        eprintln!("error: no command\nhint: `moyai oci --help` lists them");
        return 2;
    };
    let runs = matches!(verb, Verb::Run { .. } | Verb::Exec(_));
    match carry_out(&Containers::new(&wish.root), verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.reason);
            if let Some(path) = &wish.log {
                log(path, wish.log_format, &error.reason);
            }
            if runs { error.code as u8 } else { 1 }
        }
    }
}

fn log(path: &PathBuf, format: LogFormat, reason: &str) {
    let time = timestamp(SystemTime::now());
    let line = match format {
        LogFormat::Json => serde_json::json!({"level": "error", "msg": reason, "time": time}).to_string(),
        LogFormat::Text => format!("time=\"{time}\" level=error msg={reason:?}"),
    };
    // It has been said on standard error already.
    let _unwritten = File::options().create(true).append(true).open(path).and_then(|mut file| writeln!(file, "{line}"));
}

fn carry_out(containers: &Containers, verb: Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Create { how, id } => warn(containers.create(&id, &how.into())?),
        Verb::Start { id } => containers.open(&id)?.start()?,
        Verb::Run { how, detach, keep, id, .. } => {
            let (code, warnings) = containers.run(&id, &how.into(), detach, keep)?;
            warn(warnings);
            return Ok(code as u8);
        }
        Verb::State { id } => say(&json(&containers.state(&id)?)),
        Verb::Kill { all, id, signal } => {
            let number = signal_number(&signal).ok_or_else(|| Failure {
                code: 1,
                machine: false,
                reason: format!("`{signal}` is no signal: TERM, SIGKILL, 9, RTMIN+1"),
            })?;
            containers.open(&id)?.kill(number, all)?;
        }
        Verb::Delete { force, id } => containers.delete(&id, force)?,
        Verb::Exec(wish) => {
            let container = containers.open(&wish.id)?;
            let (code, warnings) = container.exec(&addition(*wish))?;
            warn(warnings);
            return Ok(code as u8);
        }
        Verb::List { format, quiet } => list(&containers.list(), format, quiet),
        Verb::Ps { format, id } => {
            let pids = containers.open(&id)?.processes();
            match format {
                ListFormat::Json => say(&serde_json::json!(pids).to_string()),
                ListFormat::Table => pids.iter().for_each(|pid| say(&pid.to_string())),
            }
        }
        Verb::Pause { id } => containers.open(&id)?.freeze(true)?,
        Verb::Resume { id } => containers.open(&id)?.freeze(false)?,
        Verb::Update { resources, id } => {
            let text = if resources.as_os_str() == "-" {
                std::io::read_to_string(std::io::stdin())
            } else {
                std::fs::read_to_string(&resources)
            };
            let wrong = |error: &dyn std::fmt::Display| Failure {
                code: 1,
                machine: false,
                reason: format!("{}: {error}", resources.display()),
            };
            let text = text.map_err(|error| wrong(&error))?;
            let resources = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
            warn(containers.open(&id)?.update(&resources)?);
        }
        Verb::Spec { bundle } => {
            let path = bundle.join("config.json");
            let failed = |error: &dyn std::fmt::Display| Failure {
                code: 1,
                machine: false,
                reason: format!("cannot write {}: {error}", path.display()),
            };
            let spec = moyai_runtime::container::example_spec().map_err(|error| failed(&error))?;
            let mut file = File::create_new(&path).map_err(|error| failed(&error))?;
            file.write_all(json(&spec).as_bytes()).map_err(|error| failed(&error))?;
        }
        Verb::Features => say(&json(&moyai_runtime::oci::features())),
    }
    Ok(0)
}

fn addition(wish: ExecWish) -> Addition {
    Addition {
        process: wish.process,
        args: wish.command,
        env: wish.env,
        cwd: wish.cwd,
        user: wish.user,
        additional_gids: wish.additional_gids,
        tty: wish.tty,
        capabilities: wish.cap,
        no_new_privileges: wish.no_new_privs,
        console_socket: wish.console_socket,
        pid_file: wish.pid_file,
        detach: wish.detach,
        preserve_fds: wish.preserve_fds,
    }
}

fn warn(warnings: Vec<String>) {
    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
}

/// Whoever reads may have seen enough.
fn say(line: &str) {
    let _unread = writeln!(std::io::stdout(), "{line}");
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).expect("plain data")
}

fn list(all: &[Description], format: ListFormat, quiet: bool) {
    if quiet {
        return all.iter().for_each(|one| say(&one.id));
    }
    if format == ListFormat::Json {
        return say(&json(&all));
    }
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|one| {
            let (id, bundle) = (one.id.clone(), one.bundle.display().to_string());
            vec![id, one.pid.to_string(), one.status.clone(), bundle, one.created.clone()]
        })
        .collect();
    say(super::output::table(&["ID", "PID", "STATUS", "BUNDLE", "CREATED"], &rows).trim_end());
}

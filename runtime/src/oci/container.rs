//! Containers by name, for other tools: what `moyai oci` does, with runc's verbs (runtime-spec runtime.md, "Lifecycle").
//!
//! ```text
//! ROOT/<id>/state.json     what it is: pid and start time of its first process, bundle, cgroup; written by `create`
//!           config.json    the bundle's, as it was then: `exec` and hooks go by it, whatever becomes of the bundle
//!           cgroup         written before there is a process: what a `create` that died has left is found by it
//!           bundle         the bundle's folder, told of while there is no `state.json`
//!           mounted        its root's mount, of one that has others' mounts; written before anything is mounted inside
//!           gate           a socket where its first process waits; deleted by `start`, so that there is one start
//!      ~filters/           system call filters, compiled (crate::seccomp::kept)
//! ```
//!
//! **States.** creating (a folder without `state.json`) → created (the gate is there) → running → stopped (the process has
//! ended); paused is running in a cgroup that is frozen. They are read off what there is, and written down nowhere.
//!
//! **If two act at once.** `create` makes the folder, which one of two can; every other verb that changes something holds a
//! lock on `state.json`, until all that is left is to wait for a process.
//!
//! **If one dies** in `create`, a folder without a state is left, which `delete --force` removes; the process inside ends by itself with
//! the channel.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use super::config::load_process;
use super::exec::{Added, add};
use super::others::Mounted;
use super::relay::{follow_size, receive_fd, relay};
use super::seal::{is_sealed, seal};
use super::spawn::{Job, Message, Spawned, Stdio, receive, spawn, state as state_of};
use super::trampoline::Trampoline;
use super::{Config, Failure, failure, hooks, kill_and_reap, reap};
use crate::cgroup::{Group, Planned};
use crate::seccomp::Kept;
use crate::sys;

/// Where containers are kept when nothing else is said.
pub const ROOT: &str = "/run/moyai/oci";
/// The longest name.
const MAX_ID: usize = 255;

/// What `state.json` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    id: String,
    pid: i32,
    /// In clock ticks since the machine started, so that another process with its number is not taken for it.
    started: u64,
    bundle: PathBuf,
    root: PathBuf,
    cgroup: String,
    /// RFC 3339.
    created: String,
}

/// What a container is now.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// Of the runtime-spec.
    pub oci_version: String,
    /// Its name.
    pub id: String,
    /// Of its first process; 0 when it has ended.
    pub pid: i32,
    /// creating, created, running, paused or stopped.
    pub status: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// Of its bundle.
    pub annotations: std::collections::HashMap<String, String>,
}

/// How a container is created.
#[derive(Clone, Debug, Default)]
pub struct Creation {
    /// Its bundle.
    pub bundle: PathBuf,
    /// Where the master of its terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// Where the number of its first process is written.
    pub pid_file: Option<PathBuf>,
    /// On an initramfs nothing can be pivoted.
    pub no_pivot: bool,
    /// It keeps the caller's session keyring.
    pub no_new_keyring: bool,
    /// Descriptors after the first three that it gets.
    pub preserve_fds: u32,
}

/// The containers below one folder.
#[derive(Clone, Debug)]
pub struct Containers {
    root: PathBuf,
}

/// One of them.
pub struct Container {
    dir: PathBuf,
    record: Record,
    /// Locked, until something takes its time.
    file: File,
    group: OnceCell<Group>,
}

impl Containers {
    /// Those below `root`.
    pub fn new(root: &Path) -> Containers {
        Containers { root: root.to_owned() }
    }

    fn dir(&self, id: &str) -> Result<PathBuf, Failure> {
        let good = |letter: char| letter.is_ascii_alphanumeric() || "_+-.".contains(letter);
        if id.is_empty() || id.len() > MAX_ID || !id.chars().all(good) || id == "." || id == ".." {
            return Err(failure(format!(
                "`{id}` is no name for a container: letters, digits and _+-. ({MAX_ID} at most)"
            )));
        }
        Ok(self.root.join(id))
    }

    fn load(&self, creation: &Creation) -> Result<Config, Failure> {
        Config::load_with(&creation.bundle, Some(&Kept::below(&self.root))).map_err(|error| failure(error.to_string()))
    }

    /// Makes a container that waits to be started. What could not be done and does not matter is returned.
    pub fn create(&self, id: &str, creation: &Creation) -> Result<Vec<String>, Failure> {
        let config = self.load(creation)?;
        self.make(id, config, creation, Way { waits: true, attends: false, trampoline: None })
            .map(|made| made.spawned.warnings)
    }

    fn make(&self, id: &str, mut config: Config, creation: &Creation, way: Way) -> Result<Made, Failure> {
        if let Some(process) = config.spec.process_mut().as_mut().filter(|_| way.attends) {
            own_size(process);
        }
        let dir = self.dir(id)?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(&self.root);
        made.map_err(|error| failure(format!("cannot make {}: {error}", self.root.display())))?;
        match fs::DirBuilder::new().mode(0o711).create(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(failure(format!("there is a container `{id}` already")));
            }
            made => made.map_err(|error| failure(format!("cannot make {}: {error}", dir.display())))?,
        }
        let made = make_in(&dir, id, config, creation, &way);
        if made.is_err() && !dir.join("mounted").exists() {
            // Nothing of it is to be found again; but for what could not be taken away.
            drop(fs::remove_dir_all(&dir));
        }
        made
    }

    /// Opens one, for this process alone.
    pub fn open(&self, id: &str) -> Result<Container, Failure> {
        let dir = self.dir(id)?;
        let path = dir.join("state.json");
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failure(format!("there is no container `{id}`")),
            _ => failure(format!("cannot open {}: {error}", path.display())),
        })?;
        file.lock().map_err(|error| failure(format!("cannot lock {}: {error}", path.display())))?;
        let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        if !file.metadata().ok().zip(fs::metadata(&path).ok()).is_some_and(|(locked, there)| same(locked, there)) {
            // It was deleted, and perhaps made again, while this waited.
            return Err(failure(format!("there is no container `{id}`")));
        }
        let record = serde_json::from_reader(&file)
            .map_err(|error| failure(format!("{} is damaged: {error}", path.display())))?;
        Ok(Container { dir, record, file, group: OnceCell::new() })
    }

    /// What one is, without waiting for whoever changes it.
    pub fn state(&self, id: &str) -> Result<Description, Failure> {
        let dir = self.dir(id)?;
        if !dir.exists() {
            return Err(failure(format!("there is no container `{id}`")));
        }
        describe(&dir, id)
    }

    /// All of them.
    pub fn list(&self) -> Vec<Description> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            // What has no container's name is none. One may be deleted meanwhile.
            all.extend(self.dir(&id).and_then(|dir| describe(&dir, &id)));
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    /// Makes one, starts it, and when `wait` says so waits for its end and deletes it; its exit code.
    pub fn run(&self, id: &str, creation: &Creation, detach: bool, keep: bool) -> Result<(i32, Vec<String>), Failure> {
        let config = self.load(creation)?;
        let trampoline = stay_out_of_reach(&config);
        // Before anything is started, so that no signal is lost: they are read from a descriptor.
        let signals = if detach { None } else { Some(Signals::take().map_err(|error| failure(error.to_string()))?) };
        let Made { container, spawned, terminal, config } =
            self.make(id, config, creation, Way { waits: false, attends: !detach, trampoline })?;
        container.let_others()?;
        run_hooks_after(&config, id, "poststart", "running", spawned.pid);
        let Some(signals) = signals else { return Ok((0, spawned.warnings)) };
        signals.attend_until_end(&spawned.pidfd, terminal);
        let code = reap(&spawned.pidfd);
        let mut warnings = spawned.warnings;
        if !keep && let Err(error) = container.remove(&config, false) {
            // Its exit code says more.
            warnings.push(error.reason);
        }
        // This process has nothing more to do, and ends sooner than it could put all of that in order.
        std::mem::forget(config);
        Ok((code, warnings))
    }

    /// Deletes what is left of one that has ended; `force` ends it first.
    pub fn delete(&self, id: &str, force: bool) -> Result<(), Failure> {
        let dir = self.dir(id)?;
        if !dir.join("state.json").exists() {
            return match (dir.exists(), force) {
                // Its `create` died.
                (true, true) => {
                    if let Ok(cgroup) = fs::read_to_string(dir.join("cgroup")) {
                        let group = Group::load(&cgroup);
                        group.kill();
                        drop(group.delete());
                    }
                    if let Err(left) = unmount(&dir) {
                        eprintln!("warning: {}", left.reason);
                    }
                    fs::remove_dir_all(&dir).map_err(|error| failure(error.to_string()))
                }
                (true, false) => Err(failure(format!("`{id}` is being created; `delete --force` deletes it anyway"))),
                (false, true) => Ok(()),
                (false, false) => Err(failure(format!("there is no container `{id}`"))),
            };
        }
        let container = self.open(id)?;
        let status = container.status();
        if status != "stopped" {
            // Also of one that was never started (runtime.md, "Delete").
            if !force {
                return Err(failure(format!(
                    "`{id}` is {status}: it can be deleted when it is stopped, or with --force"
                )));
            }
            container.end()?;
        }
        let config = container.config()?;
        container.remove(&config, force)
    }
}

fn read_record(path: &Path) -> Result<Record, Failure> {
    let bytes = fs::read(path).map_err(|error| failure(format!("cannot read {}: {error}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| failure(format!("{} is damaged: {error}", path.display())))
}

/// Keeps this program where no container that is started at once can write to it, by a trampoline or by becoming itself again.
fn stay_out_of_reach(config: &Config) -> Option<Trampoline> {
    if is_sealed() {
        return None;
    }
    let suffices = Trampoline::suffices(&config.spec);
    let trampoline = if suffices { Trampoline::new() } else { None };
    if trampoline.is_none() {
        // Where it cannot be, an ordinary user's containers have nobody who is root.
        let _refused = seal();
    }
    trampoline
}

/// How one is made.
struct Way {
    /// Until somebody starts it.
    waits: bool,
    /// This process looks after its terminal.
    attends: bool,
    trampoline: Option<Trampoline>,
}

/// What was made.
struct Made {
    container: Container,
    spawned: Spawned,
    /// If whoever made it is to attend to that.
    terminal: Option<File>,
    config: Config,
}

/// Where a terminal goes: to who listens at a path, or to this process itself.
struct Console {
    away: UnixStream,
    own: Option<UnixStream>,
}

impl Console {
    fn of(terminal: bool, path: Option<&PathBuf>, attends: bool) -> Result<Option<Console>, Failure> {
        if !terminal {
            return Ok(None);
        }
        if let Some(path) = path {
            let away = UnixStream::connect(path)
                .map_err(|error| failure(format!("cannot send the terminal to {}: {error}", path.display())))?;
            return Ok(Some(Console { away, own: None }));
        }
        if !attends {
            return Err(failure("it has a terminal, and no --console-socket takes the other end of it".to_owned()));
        }
        let (away, own) = UnixStream::pair().map_err(|error| failure(format!("cannot make a socket: {error}")))?;
        Ok(Some(Console { away, own: Some(own) }))
    }

    fn master(self) -> Result<Option<File>, Failure> {
        // Its other end is the process's alone: when that has sent nothing, nothing comes.
        drop(self.away);
        let Some(own) = self.own else { return Ok(None) };
        let master = receive_fd(&own).map_err(|error| failure(format!("process.terminal: {error}")))?;
        let master = File::from(master);
        follow_size(&master);
        Ok(Some(master))
    }
}

fn make_in(dir: &Path, id: &str, config: Config, creation: &Creation, way: &Way) -> Result<Made, Failure> {
    let failed = |what: &str, error: io::Error| failure(format!("cannot {what} in {}: {error}", dir.display()));
    let copied = fs::copy(config.bundle.join("config.json"), dir.join("config.json"));
    copied.map_err(|error| failed("keep the bundle's config.json", error))?;
    let cgroup = cgroup_of(&config.spec, id);
    let linux = config.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    // Whoever deletes what a `create` that died has left finds its processes by it.
    fs::write(dir.join("cgroup"), &cgroup).map_err(|error| failed("write", error))?;
    fs::write(dir.join("bundle"), config.bundle.as_os_str().as_bytes()).map_err(|error| failed("write", error))?;
    let planned = Planned::new(&cgroup, resources);
    let started = (|| {
        let terminal = config.spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false));
        let console = Console::of(terminal, creation.console_socket.as_ref(), way.attends)?;
        let gate = match way.waits {
            true => Some(sys::bind(&dir.join("gate")).map_err(|error| failed("listen", error))?),
            false => None,
        };
        let rooted = |mount| {
            let text = serde_json::to_vec(&Mounted { mount, root: config.root.clone() }).map_err(io::Error::from);
            let written = text.and_then(|text| write_whole(&dir.join("mounted"), &text));
            written.map_err(|error| failed("write", error))
        };
        let spawned = spawn(&Job {
            config: &config,
            id,
            cgroup: &planned,
            stdio: Stdio::Inherit,
            console: console.as_ref().map(|console| &console.away),
            gate: gate.as_ref(),
            tied: false,
            pivot: !creation.no_pivot,
            keyring: !creation.no_new_keyring,
            preserve: creation.preserve_fds,
            questions: None,
            plain_sources: false,
            trampoline: way.trampoline.as_ref(),
            born: None,
            rooted: Some(&rooted),
            root: None,
            ahead: None,
        })?;
        match console.map(Console::master).transpose() {
            Ok(master) => Ok((spawned, master.flatten())),
            Err(error) => {
                kill_and_reap(&spawned.pidfd);
                Err(error)
            }
        }
    })();
    let (mut spawned, terminal) = match started {
        Ok(started) => started,
        Err(error) => {
            let left = unmount(dir);
            drop(planned.group().delete());
            return Err(together(error, left));
        }
    };
    let group = planned.into_group();
    let record = Record {
        id: id.to_owned(),
        pid: spawned.pid,
        started: start_time(spawned.pid).unwrap_or(0),
        bundle: config.bundle.clone(),
        root: config.root.clone(),
        cgroup,
        created: crate::container::timestamp(SystemTime::now()),
    };
    let written = write_record(dir, &record).and_then(|file| match &creation.pid_file {
        Some(path) => write_whole(path, spawned.pid.to_string().as_bytes()).map(|()| file),
        None => Ok(file),
    });
    let recorded = |file| spawned.recorded().map(|()| file).map_err(|error| io::Error::other(error.reason));
    match written.and_then(recorded) {
        Ok(file) => {
            let container = Container { dir: dir.to_owned(), record, file, group: group.into() };
            Ok(Made { container, spawned, terminal, config })
        }
        Err(error) => {
            kill_and_reap(&spawned.pidfd);
            let left = unmount(dir);
            drop(group.delete());
            Err(together(failure(format!("cannot write down that `{id}` was made: {error}")), left))
        }
    }
}

/// The config of a container that was created, whose folder that is.
fn load_started(dir: &Path) -> Result<Config, Failure> {
    let kept = dir.parent().map(Kept::below);
    Config::load_started_with(dir, kept.as_ref()).map_err(|error| failure(error.to_string()))
}

/// Takes away what is mounted of one that has others' mounts.
fn unmount(dir: &Path) -> Result<(), Failure> {
    let path = dir.join("mounted");
    let failed = |reason: String| failure(format!("{}: {reason}", path.display()));
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read.map_err(|error| failed(error.to_string()))?,
    };
    let mounted: Mounted = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    let config = load_started(dir)?;
    mounted.unmount(&config.spec)?;
    fs::remove_file(&path).map_err(|error| failed(error.to_string()))
}

/// What failed, and what could not be taken back of it.
fn together(mut error: Failure, left: Result<(), Failure>) -> Failure {
    if let Err(left) = left {
        error.reason = format!("{}; and {}", error.reason, left.reason);
    }
    error
}

fn write_record(dir: &Path, record: &Record) -> io::Result<File> {
    write_whole(&dir.join("state.json"), &serde_json::to_vec(record)?)?;
    let file = File::open(dir.join("state.json"))?;
    file.lock()?;
    Ok(file)
}

/// A terminal that is shown on this process's own begins with its size.
fn own_size(process: &mut Process) {
    if process.terminal().unwrap_or(false)
        && process.console_size().is_none()
        && let Ok((rows, columns)) = sys::terminal_size(&io::stdout())
    {
        process.set_console_size(super::terminal_size(rows, columns));
    }
}

/// Nobody sees a part of it.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}

/// Below the hierarchies' roots, without a leading slash.
fn cgroup_of(spec: &Spec, id: &str) -> String {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    let path = path.map(|path| path.to_string_lossy().trim_matches('/').to_owned()).filter(|path| !path.is_empty());
    // systemd's way of saying it, SLICE:PREFIX:NAME, for callers that expect a systemd to make the group.
    let path = path.map(|path| path.replace(':', "/"));
    path.unwrap_or_else(|| format!("moyai-oci/{id}"))
}

/// Field 22 of /proc/PID/stat (proc(5)); `None` when there is no such process, or it has ended and was not waited for.
fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    fields.nth(18)?.parse().ok().filter(|_| !["Z", "X"].contains(&state))
}

fn describe(dir: &Path, id: &str) -> Result<Description, Failure> {
    let path = dir.join("state.json");
    let oci_version = super::VERSION.to_owned();
    let Ok(record) = read_record(&path) else {
        let (pid, status, created) = (0, "creating".to_owned(), String::new());
        let bundle = fs::read(dir.join("bundle")).unwrap_or_default();
        let (bundle, rootfs) = (PathBuf::from(OsString::from_vec(bundle)), PathBuf::new());
        let annotations = Default::default();
        return Ok(Description { oci_version, id: id.to_owned(), pid, status, bundle, rootfs, created, annotations });
    };
    let annotations =
        fs::read(dir.join("config.json")).ok().and_then(|bytes| serde_json::from_slice::<Spec>(&bytes).ok());
    let annotations = annotations.and_then(|spec| spec.annotations().clone()).unwrap_or_default();
    let status = record.status(dir);
    let pid = if status == "stopped" { 0 } else { record.pid };
    let (id, bundle, rootfs, created) = (record.id, record.bundle, record.root, record.created);
    Ok(Description { oci_version, id, pid, status: status.to_owned(), bundle, rootfs, created, annotations })
}

impl Record {
    fn status(&self, dir: &Path) -> &'static str {
        if start_time(self.pid) != Some(self.started) {
            "stopped"
        } else if dir.join("gate").exists() {
            "created"
        } else if Group::load(&self.cgroup).is_frozen() {
            "paused"
        } else {
            "running"
        }
    }
}

impl Container {
    /// creating, created, running, paused or stopped.
    pub fn status(&self) -> &'static str {
        self.record.status(&self.dir)
    }

    /// The bundle's config, as it was when the container was created.
    fn config(&self) -> Result<Config, Failure> {
        let config = load_started(&self.dir)?;
        Ok(Config { bundle: self.record.bundle.clone(), root: self.record.root.clone(), ..config })
    }

    fn group(&self) -> &Group {
        self.group.get_or_init(|| Group::load(&self.record.cgroup))
    }

    /// From here on it changes nothing: whoever waits for the lock may go on.
    fn let_others(&self) -> Result<(), Failure> {
        self.file.unlock().map_err(|error| failure(format!("cannot unlock `{}`: {error}", self.record.id)))
    }

    fn pidfd(&self) -> Result<OwnedFd, Failure> {
        let gone = || failure(format!("`{}` is not running: its process has ended", self.record.id));
        let pidfd = sys::pidfd_open(self.record.pid).map_err(|_| gone())?;
        // Another may have got its number; seen after the descriptor was opened, it is the one that is meant.
        match start_time(self.record.pid) == Some(self.record.started) {
            true => Ok(pidfd),
            false => Err(gone()),
        }
    }

    fn require(&self, wanted: &[&str], verb: &str) -> Result<(), Failure> {
        let status = self.status();
        match wanted.contains(&status) {
            true => Ok(()),
            false => Err(failure(format!(
                "`{}` is {status}: {verb} needs one that is {}",
                self.record.id,
                wanted.join(" or ")
            ))),
        }
    }

    /// Lets it run its program.
    pub fn start(&self) -> Result<(), Failure> {
        self.require(&["created"], "start")?;
        let gate = self.dir.join("gate");
        let mut line = sys::connect(&gate)
            .and_then(|mut line| line.write_all(&[0]).map(|()| line))
            .map_err(|error| failure(format!("`{}` does not answer: {error}", self.record.id)))?;
        drop(fs::remove_file(&gate));
        self.let_others()?;
        // Until it has become its program, or says why not.
        if let Ok(Some(Message::Error(error))) = receive(&mut line) {
            return Err(error);
        }
        let config = self.config()?;
        run_hooks_after(&config, &self.record.id, "poststart", "running", self.record.pid);
        Ok(())
    }

    /// Sends a signal to its first process, or to all.
    pub fn kill(&self, signal: i32, all: bool) -> Result<(), Failure> {
        let failed = |error: io::Error| failure(format!("cannot send signal {signal}: {error}"));
        if all {
            for pid in self.group().processes() {
                // It may have ended a moment ago.
                match sys::pidfd_open(pid).and_then(|pidfd| sys::signal_pidfd(pidfd.as_fd(), signal)) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(failed(error)),
                    _ => {}
                }
            }
            return Ok(());
        }
        self.require(&["created", "running", "paused"], "kill")?;
        sys::signal_pidfd(self.pidfd()?.as_fd(), signal).map_err(failed)
    }

    /// Kills it, and waits until all of it has ended.
    fn end(&self) -> Result<(), Failure> {
        let group = self.group();
        if let Ok(pidfd) = self.pidfd() {
            drop(sys::signal_pidfd(pidfd.as_fd(), libc::SIGKILL));
            // Frozen ones do not die on v1.
            drop(group.freeze(false));
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(10_000u16)) {
                Ok(0) => return Err(failure(format!("`{}` does not die", self.record.id))),
                _ => drop(reap_if_child(&pidfd)),
            }
        }
        // Without a pid namespace of its own it may have left others.
        match group.kill() {
            true => Ok(()),
            false => Err(failure(format!("processes of `{}` do not die", self.record.id))),
        }
    }

    /// Stops all its processes where they are, or lets them go on.
    pub fn freeze(&self, frozen: bool) -> Result<(), Failure> {
        self.require(
            if frozen { &["running", "created"] } else { &["paused"] },
            if frozen { "pause" } else { "resume" },
        )?;
        self.group().freeze(frozen).map_err(|error| failure(format!("cannot do that: {error}")))
    }

    /// Changes its limits, and says which this machine has not.
    pub fn update(&self, resources: &oci_spec::runtime::LinuxResources) -> Result<Vec<String>, Failure> {
        self.group().update(resources).map_err(|error| failure(error.to_string()))
    }

    /// Every process of it, as the host numbers them.
    pub fn processes(&self) -> Vec<i32> {
        self.group().processes()
    }

    /// Adds a process. With `detach` it returns at once, else with its exit code.
    pub fn exec(&self, added: &Addition) -> Result<(i32, Vec<String>), Failure> {
        self.require(&["running", "created"], "exec")?;
        let config = self.config()?;
        let (mut process, mut warnings) = match &added.process {
            Some(path) => load_process(path).map_err(|error| failure(error.to_string()))?,
            None => (added.of(config.spec.process().as_ref())?, Vec::new()),
        };
        if !added.detach {
            own_size(&mut process);
        }
        let terminal = process.terminal().unwrap_or(false);
        let console = Console::of(terminal, added.console_socket.as_ref(), !added.detach)?;
        let signals =
            if added.detach { None } else { Some(Signals::take().map_err(|error| failure(error.to_string()))?) };
        let pidfd = self.pidfd()?;
        let group = self.group();
        let new = add(&Added {
            config: &config,
            process: &process,
            container: (self.record.pid, &pidfd),
            group,
            stdio: Stdio::Inherit,
            console: console.as_ref().map(|console| &console.away),
            preserve: added.preserve_fds,
        })?;
        let settled = console.map(Console::master).transpose().and_then(|terminal| {
            if let Some(path) = &added.pid_file {
                write_whole(path, new.pid.to_string().as_bytes())
                    .map_err(|error| failure(format!("cannot write {}: {error}", path.display())))?;
            }
            self.let_others()?;
            Ok(terminal.flatten())
        });
        // Whoever is told that it failed must not find it running.
        let terminal = settled.inspect_err(|_| kill_and_reap(&new.pidfd))?;
        warnings.extend(new.warnings);
        let Some(signals) = signals else { return Ok((0, warnings)) };
        signals.attend_until_end(&new.pidfd, terminal);
        Ok((reap(&new.pidfd), warnings))
    }

    fn remove(&self, config: &Config, force: bool) -> Result<(), Failure> {
        // Its first process has ended. Without a pid namespace of its own it may have left others.
        self.group().kill();
        // What is left of the group stands in nobody's way; the next of this name takes it over.
        drop(self.group().delete_soon());
        match unmount(&self.dir) {
            Err(left) if force => eprintln!("warning: {}", left.reason),
            unmounted => unmounted?,
        }
        let removed = fs::remove_dir_all(&self.dir);
        removed.map_err(|error| failure(format!("cannot delete {}: {error}", self.dir.display())))?;
        run_hooks_after(config, &self.record.id, "poststop", "stopped", 0);
        Ok(())
    }
}

/// Hooks whose failure changes nothing any more (runtime.md, "Lifecycle", steps 9 and 13).
fn run_hooks_after(config: &Config, id: &str, point: &str, status: &str, pid: i32) {
    let Some(own) = config.spec.hooks() else { return };
    let list = if point == "poststart" { own.poststart() } else { own.poststop() };
    for hook in list.iter().flatten() {
        let one = vec![hook.clone()];
        let state = || state_of(config, id, status, pid).to_string().into_bytes();
        if let Err(error) = hooks::run(point, Some(&one), &state) {
            eprintln!("warning: {}", error.reason);
        }
    }
}

/// A process that was made by another one is that one's to wait for.
fn reap_if_child(pidfd: &OwnedFd) -> Option<i32> {
    let mut info: libc::siginfo_t = {
        // SAFETY: siginfo_t is plain data; zero is a valid value for it.
        unsafe { std::mem::zeroed() }
    };
    // SAFETY: the kernel writes one siginfo_t, which lives for the whole call.
    let result = unsafe {
        libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, &mut info, libc::WEXITED | libc::WNOHANG)
    };
    (result == 0).then_some(0)
}

/// What is added to a container.
#[derive(Clone, Debug, Default)]
pub struct Addition {
    /// From a file, whole.
    pub process: Option<PathBuf>,
    /// Else the container's own process with these changes.
    pub args: Vec<String>,
    /// `NAME=value`, over its own.
    pub env: Vec<String>,
    /// Where it starts.
    pub cwd: Option<PathBuf>,
    /// `UID[:GID]`.
    pub user: Option<String>,
    /// More groups.
    pub additional_gids: Vec<u32>,
    /// On a terminal of its own.
    pub tty: bool,
    /// Capabilities besides the container's.
    pub capabilities: Vec<String>,
    /// It cannot gain rights.
    pub no_new_privileges: bool,
    /// Where the master of its terminal is sent.
    pub console_socket: Option<PathBuf>,
    /// Where its number is written.
    pub pid_file: Option<PathBuf>,
    /// Do not wait for its end.
    pub detach: bool,
    /// Descriptors after the first three that it gets.
    pub preserve_fds: u32,
}

impl Addition {
    /// The process that is added, going by the container's own.
    pub(crate) fn of(&self, own: Option<&Process>) -> Result<Process, Failure> {
        let mut process = own
            .cloned()
            .ok_or_else(|| failure("the container has no process to go by: give one with --process".to_owned()))?;
        if self.args.is_empty() {
            return Err(failure("there is nothing to run: give a command, or --process".to_owned()));
        }
        process.set_args(Some(self.args.clone()));
        process.set_terminal(Some(self.tty));
        let mut env = process.env().clone().unwrap_or_default();
        for entry in &self.env {
            let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
            env.retain(|old| name(old) != name(entry));
            env.push(entry.clone());
        }
        process.set_env(Some(env));
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if self.no_new_privileges {
            process.set_no_new_privileges(Some(true));
        }
        if let Some(user) = &self.user {
            let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
            let number =
                |text: &str| text.parse::<u32>().map_err(|_| failure(format!("--user {user}: numbers, UID[:GID]")));
            process.user_mut().set_uid(number(uid)?);
            if !gid.is_empty() {
                process.user_mut().set_gid(number(gid)?);
            }
        }
        if !self.additional_gids.is_empty() {
            process.user_mut().set_additional_gids(Some(self.additional_gids.clone()));
        }
        if !self.capabilities.is_empty() {
            let mut sets = process.capabilities().clone().unwrap_or_default();
            for name in &self.capabilities {
                let known = serde_json::from_value(serde_json::Value::String(name.to_ascii_uppercase()));
                let capability: oci_spec::runtime::Capability =
                    known.map_err(|_| failure(format!("--cap {name}: no such capability")))?;
                let with = |set: &Option<oci_spec::runtime::Capabilities>| {
                    let mut set = set.clone().unwrap_or_default();
                    set.insert(capability);
                    Some(set)
                };
                sets.set_bounding(with(sets.bounding()));
                sets.set_permitted(with(sets.permitted()));
                sets.set_effective(with(sets.effective()));
            }
            process.set_capabilities(Some(sets));
        }
        Ok(process)
    }
}

/// Signals that this process passes on instead of obeying.
struct Signals(OwnedFd);

impl Signals {
    /// From here on they are read, not obeyed.
    fn take() -> io::Result<Signals> {
        // SAFETY: the set is initialised before it is read; signalfd makes a new descriptor of it.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigfillset(&mut set);
            for own in
                [libc::SIGCHLD, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP]
            {
                libc::sigdelset(&mut set, own);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(Signals(OwnedFd::from_raw_fd(fd))) }
        }
    }

    /// Passes on what comes, until the process has ended; and what goes in and out of its terminal, if it has one here.
    fn attend_until_end(&self, pidfd: &OwnedFd, terminal: Option<File>) {
        if let Some(mut master) = terminal {
            return relay(&mut master, pidfd, &self.0, |master| {
                for signal in self.pending() {
                    if signal == libc::SIGWINCH { follow_size(master) } else { pass_on(pidfd, signal) }
                }
            });
        }
        loop {
            let mut fds =
                [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            if fds[0].revents().is_some_and(|events| !events.is_empty()) {
                return;
            }
            self.pending().into_iter().for_each(|signal| pass_on(pidfd, signal));
        }
    }

    /// What has come.
    fn pending(&self) -> Vec<i32> {
        let mut signals = Vec::new();
        let mut info = [0; std::mem::size_of::<libc::signalfd_siginfo>()];
        while nix::unistd::read(&self.0, &mut info) == Ok(info.len()) {
            // Its number comes first (signalfd(2)).
            signals.push(u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32);
        }
        signals
    }
}

fn pass_on(pidfd: &OwnedFd, signal: i32) {
    if ![libc::SIGURG, libc::SIGWINCH, libc::SIGPIPE].contains(&signal) {
        // It may have ended a moment ago.
        drop(sys::signal_pidfd(pidfd.as_fd(), signal));
    }
}

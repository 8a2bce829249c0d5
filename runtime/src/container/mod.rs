//! The daemon's side of a container: its folder, its bundle, its logs, and the line to its shim.
//!
//! ```text
//! containers/<name>/config.json    OCI runtime-spec bundle
//!                   rootfs/        where the overlay is mounted, in the container's mount namespace or its shim's
//!                   upper/ work/   the writable layer
//!                   launch.json    what the bundle format has no place for: layers
//!                   log, log.1 …   what it wrote, in the CRI format
//!                   deadline       until when it may run, by the boot clock; only of what runs by a lease
//!                   shim.sock      where a later daemon finds the shim
//!                   last.sock      where the next life finds the shim of the last one, while that holds its mounts
//!                   exit.json      how it ended, written before anybody is told
//! ```
//!
//! **States** (OCI runtime-spec): creating → running → stopped. The shim alone writes `exit.json`; while neither it
//! nor a shim that answers is there, the container is gone.

mod bundle;
mod disks;
mod log;
mod user;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use crate::store::ImageFile;
use crate::sys;

pub use bundle::{BundleError, Limits, Lookup, Network, Put, Request, example as example_spec, write as write_bundle};
pub(crate) use bundle::{limit_kind, usual};
pub use disks::{DiskError, Throttle, ThrottleKind};
pub use log::{LogLine, LogReader, LogWriter, Stream, timestamp};

/// What a bundle has no place for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// Lower layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// Or one file system for all of them.
    #[serde(default)]
    pub file: Option<ImageFile>,
    /// Its cgroup, below the hierarchies' roots.
    pub cgroup: String,
    /// Of a strict sandbox: what its root is on the machine. Its ids follow from there.
    #[serde(default)]
    pub shifted_by: Option<u32>,
    /// Whether somebody may write to its standard input.
    #[serde(default)]
    pub input: bool,
    /// The OCI runtime that makes it, instead of this program.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
    /// Bytes of the disk that its writable layer has to itself.
    #[serde(default)]
    pub storage: Option<u64>,
    /// Its mounts may stay for a moment after its end: they hold no folder of the machine, and little memory.
    #[serde(default)]
    pub lingers: bool,
}

/// Where its shim is found.
pub(crate) const SOCKET: &str = "shim.sock";
/// How many ids a strict sandbox has.
pub(crate) const IDS: u32 = 65_536;
/// Where the root file system of a strict sandbox is mounted, in its shim's own mount namespace: unlike the node's folder,
/// every user may walk there.
pub(crate) const OPEN_ROOT: &str = "/run/moyai-root";

/// Whether there is a capability of this name, without `CAP_`.
pub fn is_capability(name: &str) -> bool {
    bundle::capability(name).is_some()
}

/// What a shim tells, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// The program was started.
    Running {
        /// Of the first process inside, as the host numbers it.
        pid: i32,
    },
    /// It was not.
    Failed(Failure),
    /// It ended.
    Exited(Exit),
}

/// Why a container did not start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Docker's exit code for it: 126 cannot be executed, 127 not found, 125 anything else.
    pub code: i32,
    /// Whether another machine might have started it.
    pub machine: bool,
    /// In words.
    pub reason: String,
}

/// How a container ended.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell says it: 128 + n for signal n.
    pub code: i32,
    /// The kernel killed in it for memory.
    pub out_of_memory: bool,
}

/// What a daemon that starts finds of a container.
pub enum Found {
    /// Its shim answers here.
    Running(UnixStream),
    /// It ended.
    Exited(Exit),
    /// Nothing.
    Gone,
}

/// Looks for a container that an earlier daemon started in `dir`.
pub fn find(dir: &Path) -> io::Result<Found> {
    if let Some(exit) = read_exit(dir)? {
        return Ok(Found::Exited(exit));
    }
    match connect(dir) {
        Ok(stream) => Ok(Found::Running(stream)),
        // It may have ended between the two looks.
        Err(_) => Ok(read_exit(dir)?.map_or(Found::Gone, Found::Exited)),
    }
}

fn read_exit(dir: &Path) -> io::Result<Option<Exit>> {
    match fs::read(dir.join("exit.json")) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn connect(dir: &Path) -> io::Result<UnixStream> {
    sys::connect(&dir.join(SOCKET))
}

/// Until when the container in `dir` may run, by [`boot_time`](crate::host::boot_time): it is killed then, unless a later time is
/// written before. Eight bytes in place, which whoever has it open sees whole; nothing is synced: after a power cut there
/// is no container either.
pub fn write_deadline(dir: &Path, end: Duration) -> io::Result<()> {
    let file = fs::File::options().write(true).create(true).truncate(false).open(dir.join("deadline"))?;
    file.write_all_at(&(end.as_nanos() as u64).to_le_bytes(), 0)
}

/// The deadline of the container in `dir`, to be read again and again; `None` is without end.
pub(crate) fn open_deadline(dir: &Path) -> io::Result<Option<fs::File>> {
    match fs::File::open(dir.join("deadline")) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What it says now.
pub(crate) fn deadline_in(file: &fs::File) -> io::Result<Duration> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Duration::from_nanos(u64::from_le_bytes(bytes)))
}

/// Reads the next report; `None` when the shim is gone. Blocks.
pub fn next_report(stream: &UnixStream) -> io::Result<Option<Report>> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        // Nothing is taken that is beyond the line.
        let mut piece = [0; 512];
        let there = match recv(stream.as_raw_fd(), &mut piece, MsgFlags::MSG_PEEK) {
            Err(Errno::EINTR) => continue,
            there => there?,
        };
        let end = piece[..there].iter().position(|byte| *byte == b'\n').map_or(there, |at| at + 1);
        if end == 0 {
            break;
        }
        let mut stream = stream;
        stream.read_exact(&mut piece[..end])?;
        line.extend_from_slice(&piece[..end]);
    }
    if line.is_empty() { Ok(None) } else { serde_json::from_slice(&line).map(Some).map_err(io::Error::other) }
}

/// Asks a shim to send a signal to the first process inside.
pub fn signal(mut stream: &UnixStream, signal: i32) -> io::Result<()> {
    writeln!(stream, "{signal}")
}

/// Stops all processes of the container in `dir` where they are, or lets them go on.
pub fn freeze(dir: &Path, frozen: bool) -> io::Result<()> {
    let launch: Launch = serde_json::from_slice(&fs::read(dir.join("launch.json"))?)?;
    crate::cgroup::Group::load(&launch.cgroup).freeze(frozen)
}

/// Whether they stand still.
pub fn is_frozen(dir: &Path) -> bool {
    let launch = fs::read(dir.join("launch.json")).ok();
    let launch = launch.and_then(|bytes| serde_json::from_slice::<Launch>(&bytes).ok());
    launch.is_some_and(|launch| crate::cgroup::Group::load(&launch.cgroup).is_frozen())
}

/// Ends what is left of the container in `dir` whose shim was killed.
pub fn end_left_over(dir: &Path) {
    let launch = fs::read(dir.join("launch.json")).ok();
    if let Some(launch) = launch.and_then(|bytes| serde_json::from_slice::<Launch>(&bytes).ok()) {
        crate::cgroup::Group::load(&launch.cgroup).kill();
    }
}

/// Deletes all that a container left; one that still runs is killed first. Nothing left is no error.
pub fn remove(dir: &Path) -> io::Result<()> {
    if let Ok(Found::Running(stream)) = find(dir) {
        const SIGKILL: i32 = 9;
        // On v1 what stands still does not die.
        drop(freeze(dir, false));
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        signal(&stream, SIGKILL)?;
        while let Ok(Some(report)) = next_report(&stream) {
            if matches!(report, Report::Exited(_)) {
                break;
            }
        }
    }
    if let Ok(bytes) = fs::read(dir.join("launch.json"))
        && let Ok(launch) = serde_json::from_slice::<Launch>(&bytes)
    {
        // Usually the shim has done it; one that was killed has not, and what it should have ended may go on: a change of user
        // takes away what ties a process to its parent (prctl(2), PR_SET_PDEATHSIG).
        let group = crate::cgroup::Group::load(&launch.cgroup);
        group.kill();
        drop(group.delete_soon());
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The number of a signal by name (`SIGTERM`, `TERM`, `15`).
pub fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let full = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    if let Some(offset) = full.strip_prefix("SIGRTMIN+") {
        return offset.parse::<i32>().ok().map(|offset| 34 + offset).filter(|number| *number <= 64);
    }
    full.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

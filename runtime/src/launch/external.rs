//! Containers that another OCI runtime makes: crun, runc, runsc, or whatever takes the same command line.
//!
//! It is given the bundle that this program would take itself. The container's process becomes the shim's child when the
//! runtime has ended (PR_SET_CHILD_SUBREAPER), so that its exit code is the shim's to read as of any other.
//!
//! **If the runtime fails**, the last error of its log says why; **if the shim dies**, the daemon ends what is left by its cgroup,
//! since nothing ties it to the shim.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::container::Failure;
use crate::oci::failure;
use crate::sys;

const LOG: &str = "runtime.log";
const PID: &str = "runtime.pid";
const CONSOLE: &str = "console.sock";

/// Another OCI runtime, and the container that it makes of the bundle in the current folder.
pub(super) struct External {
    program: PathBuf,
    id: String,
}

impl External {
    pub(super) fn new(program: &Path, id: &str) -> External {
        External { program: program.to_owned(), id: id.to_owned() }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--root", "runtime", "--log", LOG, "--log-format", "json", verb]);
        command
    }

    /// Makes the container; it waits for its start.
    pub(super) fn create(&self, input: Option<OwnedFd>, output: [OwnedFd; 2]) -> Result<(i32, OwnedFd), Failure> {
        let [stdout, stderr] = output;
        let mut command = self.command("create");
        command.args(["--bundle", ".", "--pid-file", PID, &self.id]);
        command.stdin(input.map_or_else(Stdio::null, Stdio::from)).stdout(stdout).stderr(stderr);
        self.made(command)
    }

    /// The same on a terminal, whose master comes by the listener.
    pub(super) fn create_with_terminal(&self) -> Result<(UnixListener, i32, OwnedFd), Failure> {
        drop(fs::remove_file(CONSOLE));
        let listener =
            UnixListener::bind(CONSOLE).map_err(|error| failure(format!("cannot listen on {CONSOLE}: {error}")))?;
        let mut command = self.command("create");
        command.args(["--bundle", ".", "--pid-file", PID, "--console-socket", CONSOLE, &self.id]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (pid, pidfd) = self.made(command)?;
        Ok((listener, pid, pidfd))
    }

    fn made(&self, command: Command) -> Result<(i32, OwnedFd), Failure> {
        sys::adopt_orphans().map_err(|error| failure(format!("cannot be the parent of what it makes: {error}")))?;
        [LOG, PID].iter().for_each(|file| drop(fs::remove_file(file)));
        self.run(command)?;
        let pid = fs::read_to_string(PID).ok().and_then(|text| text.trim().parse().ok());
        let pid = pid.ok_or_else(|| failure(format!("{} wrote no {PID}", self.program.display())))?;
        let pidfd = sys::pidfd_open(pid).map_err(|_| failure("it ended before it was started".to_owned()))?;
        Ok((pid, pidfd))
    }

    /// Lets it run its program.
    pub(super) fn start(&self) -> Result<(), Failure> {
        let mut command = self.command("start");
        command.arg(&self.id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.run(command)
    }

    /// Deletes what is left of it.
    pub(super) fn delete(&self) {
        let mut command = self.command("delete");
        command.args(["--force", &self.id]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What it does not delete goes with the container's folder and group.
        drop(command.status());
    }

    fn run(&self, mut command: Command) -> Result<(), Failure> {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let status = command.status();
        let status = status.map_err(|error| failure(format!("cannot run {}: {error}", self.program.display())))?;
        if status.success() {
            return Ok(());
        }
        let reason = said().unwrap_or_else(|| status.to_string());
        // What runtimes say of a program that is not there, by which a shell's code is chosen; another machine has no other image.
        let text = reason.to_lowercase();
        let of_program = text.contains("executable file") || text.contains("exec:");
        let code = match of_program {
            true if text.contains("not found") || text.contains("no such file") => 127,
            true if text.contains("permission denied") => 126,
            _ => 125,
        };
        Err(Failure { code, machine: code == 125, reason: format!("{name}: {reason}") })
    }
}

/// The last error in the log: of a line of JSON the message, else the line.
fn said() -> Option<String> {
    /// The most of a log that is read.
    const MOST: u64 = 64 * 1024;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(File::open(LOG).ok()?, MOST), &mut text).ok()?;
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    let message =
        serde_json::from_str::<serde_json::Value>(line).ok().and_then(|line| Some(line["msg"].as_str()?.to_owned()));
    Some(message.unwrap_or_else(|| line.to_owned()))
}

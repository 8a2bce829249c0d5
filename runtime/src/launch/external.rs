//! Containers that another OCI runtime makes: crun, runc, runsc, or whatever takes the same command line.
//!
//! It is given the bundle that this program would take itself. The container's process becomes the shim's child when the
//! runtime has ended (PR_SET_CHILD_SUBREAPER), so that its exit code is the shim's to read as of any other.
//!
//! runsc has its containers in a kernel of its own (gVisor): nobody enters them from outside, so it is asked to add processes too,
//! and told which network they have, since it makes that itself from what it finds in the namespace.
//!
//! **If the runtime fails**, the last error of its log says why; **if the shim dies**, the daemon ends what is left by its cgroup,
//! since nothing ties it to the shim.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use crate::container::Failure;
use crate::oci::failure;
use crate::{small, sys};

const LOG: &str = "runtime.log";
const PID: &str = "runtime.pid";
const CONSOLE: &str = "console.sock";
/// How runsc ends when it could not do what it was asked to.
const REFUSED: i32 = 128;

/// Another OCI runtime, and the container that it makes of the bundle in the current folder.
#[derive(Clone)]
pub(super) struct External {
    program: PathBuf,
    id: String,
    /// What runsc is told of the network.
    network: &'static str,
}

/// A process that another runtime has added: what stands for it on this machine, which passes signals on and ends as it does.
pub(super) struct Added {
    pub(super) pidfd: OwnedFd,
    /// Where the runtime wrote why it could not.
    log: PathBuf,
}

impl Drop for Added {
    fn drop(&mut self) {
        // It may not have been written.
        drop(fs::remove_file(&self.log));
    }
}

impl Added {
    /// The process's exit code; docker's for one that never ran, of which the runtime has said why on its error output.
    pub(super) fn code(&self, code: i32) -> i32 {
        match said(&self.log) {
            Some(reason) if code == REFUSED => code_of(&reason),
            _ => code,
        }
    }
}

impl External {
    pub(super) fn new(program: &Path, id: &str, spec: &Spec) -> External {
        let linux = spec.linux().as_ref();
        let mut namespaces = linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
        let network = match namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
            None => "host",
            Some(own) if own.path().is_none() => "none",
            Some(_) => "sandbox",
        };
        External { program: program.to_owned(), id: id.to_owned(), network }
    }

    /// Whether its containers are where nobody can enter them from outside.
    pub(super) fn has_a_kernel(&self) -> bool {
        self.program.file_name().is_some_and(|name| name == "runsc")
    }

    fn command(&self, verb: &str) -> Command {
        self.logging(Path::new(LOG), verb)
    }

    fn logging(&self, log: &Path, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        // What this program was told is not for another.
        command.env_remove(small::STARTED_BY);
        command.args(["--root", "runtime", "--log-format", "json", "--log"]).arg(log);
        if self.has_a_kernel() {
            command.args(["--network", self.network]);
        }
        command.arg(verb);
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

    /// Adds a process, in the current folder; a terminal that it is given controls it.
    pub(super) fn exec(&self, process: &Process, stdio: [OwnedFd; 3], terminal: bool) -> Result<Added, Failure> {
        let failed = |error: io::Error| failure(format!("cannot run {}: {error}", self.program.display()));
        let log = PathBuf::from(format!("exec-{}.log", std::process::id()));
        let mut command = self.logging(&log, "exec");
        let [input, output, errors] = stdio;
        command.stdin(input).stdout(output).stderr(errors);
        if terminal {
            sys::on_own_terminal(&mut command);
        }
        // It is inherited, and gone with its last reader.
        let file = memfd_create(c"process.json", MFdFlags::empty()).map_err(|error| failed(error.into()))?;
        let mut file = File::from(file);
        serde_json::to_vec(process).map_err(io::Error::from).and_then(|text| file.write_all(&text)).map_err(failed)?;
        command.arg("--process").arg(format!("/proc/self/fd/{}", file.as_raw_fd())).arg(&self.id);
        let child = command.spawn().map_err(failed)?;
        let pidfd = sys::pidfd_open(child.id() as i32);
        Ok(Added { pidfd: pidfd.map_err(|error| failure(format!("what adds it is gone already: {error}")))?, log })
    }

    /// Deletes what is left of it.
    pub(super) fn delete(&self) {
        let mut command = self.command("delete");
        command.args(["--force", &self.id]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What it does not delete goes with the container's folder and group.
        drop(command.spawn().map(|child| reap_until(&child)));
    }

    fn run(&self, mut command: Command) -> Result<(), Failure> {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let status = command.status();
        let status = status.map_err(|error| failure(format!("cannot run {}: {error}", self.program.display())))?;
        if status.success() {
            return Ok(());
        }
        let mut reason = said(Path::new(LOG)).unwrap_or_else(|| status.to_string());
        if reason.contains("in root network namespace") {
            // It goes by a file that newer kernels show in every network namespace.
            reason.push_str(" (this runsc is older than the kernel: `--network none` works)");
        }
        // Another machine has no other image.
        let code = code_of(&reason);
        Err(Failure { code, machine: code == 125, reason: format!("{name}: {reason}") })
    }
}

/// Reaps every child until this one has ended: runsc waits for its own processes to be gone, and this one is their parent by now.
fn reap_until(child: &Child) {
    let own = nix::unistd::Pid::from_raw(child.id() as i32);
    while let Ok(status) = nix::sys::wait::wait() {
        if status.pid() == Some(own) {
            return;
        }
    }
}

/// What a shell's code is for what runtimes say of a program that is not there.
fn code_of(reason: &str) -> i32 {
    let text = reason.to_lowercase();
    let of_program = ["executable", "exec:"].iter().any(|word| text.contains(word));
    match of_program {
        true if text.contains("not found") || text.contains("no such file") => 127,
        true if text.contains("permission denied") => 126,
        _ => 125,
    }
}

/// The last error in a log: of a line of JSON the message, else the line.
fn said(log: &Path) -> Option<String> {
    /// The most of a log that is read.
    const MOST: u64 = 64 * 1024;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(File::open(log).ok()?, MOST), &mut text).ok()?;
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    let message =
        serde_json::from_str::<serde_json::Value>(line).ok().and_then(|line| Some(line["msg"].as_str()?.to_owned()));
    Some(message.unwrap_or_else(|| line.to_owned()))
}

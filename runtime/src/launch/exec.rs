//! What is done in a container from far away: `moyai exec`, and others ([`Task`]).
//!
//! A fork of the zygote does it; a process it adds ([`crate::oci`]) and stands between it and a socket, on which the user's end speaks the frames
//! below, through one or two daemons that pass them on unread. It outlives the daemon; when the socket ends the process goes
//! on, as with ssh, with nothing to read and nobody to read it.
//!
//! ```text
//! frame: kind (1 byte), length (4 bytes, big-endian, at most MAX_FRAME), content
//! user → process   0 input   1 end of input   2 size of the terminal: rows, columns (2 bytes each)   3 signal (4 bytes)
//!                  4 attach: whether what was written before is wanted (1 byte)
//! process → user   16 output   17 error output   18 exit code (4 bytes)   19 why it did not start: code (4 bytes), text
//! ```
//!
//! **Bounds.** Two frames of [`MAX_FRAME`] bytes in, one out; output is not read while the user's end does not take it, and the
//! user's end not while the process does not read.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use super::external::{self, External};
use super::input::Input;
use super::task;
use crate::cgroup::Group;
use crate::container::{self, Failure, Found, Launch, Report};
use crate::oci::container::Addition;
use crate::oci::{self, Added, Config, Stdio, failure, reap};
use crate::rootless::is_rootless;
use crate::sys;

/// The longest content of a frame.
pub const MAX_FRAME: usize = 64 * 1024;

/// What is to be added, and to what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exec {
    /// The container's folder.
    pub dir: PathBuf,
    /// What to do.
    pub task: Task,
}

/// What is done in a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Task {
    /// Another process runs in it.
    Run(Wish),
    /// What its first process writes is shown, and it can be written to; by its shim, see [`super::attach`].
    Attach,
    /// A file or folder of it comes out, as a tar stream; `true` is what is in the folder.
    CopyOut(String, bool),
    /// A tar stream goes in there; owners are kept if `true`.
    CopyIn(String, bool),
    /// It stands still, or goes on.
    Freeze(bool),
    /// What it uses, a line of JSON ([`super::Usage`]) at once and, if `true`, each second.
    Usage(bool),
}

/// What to run, as its user asks for it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Wish {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `UID[:GID]`; the container's own user when there is none.
    pub user: Option<String>,
    /// Where it starts; the container's own folder when there is none.
    pub workdir: Option<String>,
    /// On a terminal of this many rows and columns.
    pub terminal: Option<(u16, u16)>,
    /// Whether it has something to read.
    pub input: bool,
}

const INPUT: u8 = 0;
const INPUT_END: u8 = 1;
const SIZE: u8 = 2;
const SIGNAL: u8 = 3;
const ATTACH: u8 = 4;
const OUTPUT: u8 = 16;
const ERROR_OUTPUT: u8 = 17;
const EXIT: u8 = 18;
const NOT_STARTED: u8 = 19;

/// What the user's end says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToProcess {
    /// Something to read.
    Input(Vec<u8>),
    /// Nothing more.
    InputEnd,
    /// Rows and columns.
    Size(u16, u16),
    /// A signal.
    Signal(i32),
    /// What is written from now on is to be shown; and what was written before, as far as it was kept.
    Attach(bool),
}

/// What it hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromProcess {
    /// Standard output, or all output of a terminal.
    Output(Vec<u8>),
    /// Standard error.
    ErrorOutput(Vec<u8>),
    /// It ended.
    Exit(i32),
    /// It never ran: docker's code for why, and why.
    NotStarted(i32, String),
}

impl ToProcess {
    /// As it travels.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            ToProcess::Input(bytes) => frame(INPUT, bytes),
            ToProcess::InputEnd => frame(INPUT_END, &[]),
            ToProcess::Size(rows, columns) => frame(SIZE, &[rows.to_be_bytes(), columns.to_be_bytes()].concat()),
            ToProcess::Signal(signal) => frame(SIGNAL, &signal.to_be_bytes()),
            ToProcess::Attach(before) => frame(ATTACH, &[u8::from(*before)]),
        }
    }

    pub(super) fn decode(kind: u8, content: &[u8]) -> Option<ToProcess> {
        match (kind, content) {
            (INPUT, bytes) => Some(ToProcess::Input(bytes.to_vec())),
            (INPUT_END, []) => Some(ToProcess::InputEnd),
            (SIZE, [a, b, c, d]) => Some(ToProcess::Size(u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))),
            (ATTACH, [before]) => Some(ToProcess::Attach(*before != 0)),
            (SIGNAL, bytes) => Some(ToProcess::Signal(i32::from_be_bytes(bytes.try_into().ok()?))),
            _ => None,
        }
    }
}

impl FromProcess {
    /// As it travels.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            FromProcess::Output(bytes) => frame(OUTPUT, bytes),
            FromProcess::ErrorOutput(bytes) => frame(ERROR_OUTPUT, bytes),
            FromProcess::Exit(code) => frame(EXIT, &code.to_be_bytes()),
            FromProcess::NotStarted(code, text) => frame(NOT_STARTED, &[&code.to_be_bytes(), text.as_bytes()].concat()),
        }
    }

    /// From a frame's kind and content; `None` is nothing that is known.
    pub fn decode(kind: u8, content: &[u8]) -> Option<FromProcess> {
        match kind {
            OUTPUT => Some(FromProcess::Output(content.to_vec())),
            ERROR_OUTPUT => Some(FromProcess::ErrorOutput(content.to_vec())),
            EXIT => Some(FromProcess::Exit(i32::from_be_bytes(content.try_into().ok()?))),
            NOT_STARTED => {
                let (code, text) = content.split_at_checked(4)?;
                let code = i32::from_be_bytes(code.try_into().ok()?);
                Some(FromProcess::NotStarted(code, String::from_utf8_lossy(text).into_owned()))
            }
            _ => None,
        }
    }
}

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind], &(content.len() as u32).to_be_bytes()[..], content].concat()
}

/// The length that a frame's first five bytes say, with its kind; an error when it is longer than any is.
pub fn head(bytes: [u8; 5]) -> io::Result<(u8, usize)> {
    let len = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    Ok((bytes[0], len))
}

/// Runs to the end of the process. Never returns: it is a fork of the zygote.
pub(super) fn run(exec: &Exec, mut line: UnixStream) -> ! {
    sys::reset_signals();
    sys::ignore_signals(&[libc::SIGPIPE, libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
    sys::name_process(c"moyai-exec");
    // Where it fails nobody is in its way either.
    let _own = nix::unistd::setsid();
    let done = match &exec.task {
        Task::Run(wish) => start(&exec.dir, wish).map(|mut process| process.serve(&mut line)),
        task => reach(&exec.dir).and_then(|reached| task::run(task, &reached, &mut line)),
    };
    if let Err(error) = done {
        let told = FromProcess::NotStarted(error.code, error.reason).encode();
        // Whoever asked has gone.
        drop(line.write_all(&told));
    }
    std::process::exit(0)
}

/// A container that runs.
pub(super) struct Reached {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) group: Group,
    pub(super) config: Config,
    /// The OCI runtime that has it where nobody can enter it from here.
    elsewhere: Option<External>,
}

impl Reached {
    /// That it can be entered, as what is to be done needs.
    pub(super) fn enterable(&self) -> Result<(), Failure> {
        match self.elsewhere {
            Some(_) => {
                Err(failure("its OCI runtime has it in a kernel of its own, where nothing can be copied".to_owned()))
            }
            None => Ok(()),
        }
    }
}

/// The container whose folder is `dir`, if it runs.
fn reach(dir: &Path) -> Result<Reached, Failure> {
    let not_running = || failure("it is not running".to_owned());
    let failed = |error: io::Error| failure(format!("cannot reach the container: {error}"));
    let Found::Running(stream) = container::find(dir).map_err(failed)? else { return Err(not_running()) };
    let Some(Report::Running { pid }) = container::next_report(&stream).map_err(failed)? else {
        return Err(not_running());
    };
    let pidfd = sys::pidfd_open(pid).map_err(|_| not_running())?;
    let launch = std::fs::read(dir.join("launch.json")).map_err(failed)?;
    let launch: Launch = serde_json::from_slice(&launch).map_err(|error| failed(error.into()))?;
    // The number may be another's by now; the group is its own. An ordinary user has none, and reaches only its own.
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    if !is_rootless() && !groups.lines().any(|line| line.ends_with(&format!("/{}", launch.cgroup))) {
        return Err(not_running());
    }
    let config = Config::load_started(dir).map_err(|error| failure(error.to_string()))?;
    let external = launch.runtime.as_ref().map(|runtime| External::new(runtime, &launch.cgroup, &config.spec));
    let elsewhere = external.filter(External::has_a_kernel);
    let mounts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let theirs = mounts(&pid.to_string()).ok_or_else(not_running)?;
    if elsewhere.is_none() && Some(theirs) == mounts("self") {
        // Whoever made it has it where this process is: to enter would be to stay on the machine.
        return Err(failure("its OCI runtime has it where nobody can enter".to_owned()));
    }
    Ok(Reached { pid, pidfd, group: Group::load(&launch.cgroup), config, elsewhere })
}

/// Both ends of its input and output, as this process has them.
struct Process {
    pidfd: OwnedFd,
    input: Input,
    /// Output and error output; a terminal has the first alone.
    output: [Option<File>; 2],
    terminal: bool,
    /// Of one that another runtime added.
    added: Option<external::Added>,
}

impl Process {
    fn new(pidfd: OwnedFd, input: Option<File>, output: [Option<File>; 2], terminal: bool) -> io::Result<Process> {
        Ok(Process { pidfd, input: Input::new(input, terminal)?, output, terminal, added: None })
    }
}

fn start(dir: &Path, wish: &Wish) -> Result<Process, Failure> {
    let failed = |error: io::Error| failure(format!("cannot reach the container: {error}"));
    let Reached { pid, pidfd, group, config, elsewhere } = reach(dir)?;
    if group.is_frozen() {
        // What is added would stand still too, and nobody could end it.
        return Err(failure("it is paused".to_owned()));
    }
    let addition = Addition {
        args: wish.args.clone(),
        env: wish.env.clone(),
        cwd: wish.workdir.as_ref().map(PathBuf::from),
        user: wish.user.clone(),
        tty: wish.terminal.is_some(),
        ..Addition::default()
    };
    let mut process = addition.of(config.spec.process().as_ref())?;
    if let Some((rows, columns)) = wish.terminal {
        // Before it runs: what it asks first is how large its terminal is.
        process.set_console_size(oci::terminal_size(rows, columns));
    }
    if let Some(external) = &elsewhere {
        std::env::set_current_dir(dir).map_err(failed)?;
        return start_by(external, &process, wish);
    }
    let add = |stdio, console: Option<&UnixStream>| {
        let (container, preserve) = ((pid, &pidfd), 0);
        oci::add(&Added { config: &config, process: &process, container, group: &group, stdio, console, preserve })
    };
    if wish.terminal.is_some() {
        let (mine, its) = UnixStream::pair().map_err(failed)?;
        let spawned = add(Stdio::Inherit, Some(&its))?;
        let master = File::from(oci::receive_fd(&mine).map_err(failed)?);
        let input = master.try_clone().map_err(failed)?;
        let output = [Some(master), None];
        return Process::new(spawned.pidfd, Some(input), output, true).map_err(failed);
    }
    let ([input, output, errors], inside) = pipes()?;
    let spawned = add(Stdio::Pipes(inside.each_ref().map(AsRawFd::as_raw_fd)), None)?;
    Process::new(spawned.pidfd, wish.input.then_some(input), [Some(output), Some(errors)], false).map_err(failed)
}

/// Its input, output and error output: this side, and the process's.
fn pipes() -> Result<([File; 3], [OwnedFd; 3]), Failure> {
    let pipe = || {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|error| failure(format!("cannot make a pipe: {error}")))
    };
    let (input_inside, input) = pipe()?;
    let (output, output_inside) = pipe()?;
    let (errors, errors_inside) = pipe()?;
    Ok(([input, output, errors].map(File::from), [input_inside, output_inside, errors_inside]))
}

/// The same by the OCI runtime that has the container, in whose folder this is.
fn start_by(external: &External, process: &oci_spec::runtime::Process, wish: &Wish) -> Result<Process, Failure> {
    let failed = |error: io::Error| failure(format!("cannot reach the container: {error}"));
    let (input, output, inside) = match wish.terminal {
        Some((rows, columns)) => {
            let (master, terminal) = sys::open_terminal().map_err(failed)?;
            sys::set_terminal_size(&master, rows, columns).map_err(failed)?;
            let copy = || terminal.try_clone().map_err(failed);
            let inside = [copy()?, copy()?, copy()?];
            (Some(master.try_clone().map_err(failed)?), [Some(master), None], inside)
        }
        None => {
            let ([input, output, errors], inside) = pipes()?;
            (wish.input.then_some(input), [Some(output), Some(errors)], inside)
        }
    };
    let added = external.exec(process, inside, wish.terminal.is_some())?;
    let pidfd = added.pidfd.try_clone().map_err(failed)?;
    let serving = Process::new(pidfd, input, output, wish.terminal.is_some()).map_err(failed)?;
    Ok(Process { added: Some(added), ..serving })
}

impl Process {
    /// Passes on until it has ended and all that it wrote was taken, or the user's end is gone.
    fn serve(&mut self, line: &mut UnixStream) {
        let mut buffer = vec![0; MAX_FRAME];
        let mut heard = Some(Vec::new());
        loop {
            // 0: its end, then its output, then the user, then its input.
            let mut fds = vec![PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            let open: Vec<usize> = (0..2).filter(|at| self.output[*at].is_some()).collect();
            fds.extend(self.output.iter().flatten().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)));
            let user = (heard.is_some() && !self.input.is_full()).then(|| {
                fds.push(PollFd::new(line.as_fd(), PollFlags::POLLIN));
                fds.len() - 1
            });
            let feeds = self.input.waits().map(|input| {
                fds.push(PollFd::new(input, PollFlags::POLLOUT));
                fds.len() - 1
            });
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
            drop(fds);
            let mut wrote = false;
            for (slot, at) in open.iter().enumerate() {
                if ready[1 + slot] {
                    wrote = true;
                    if !self.pass_output(*at, &mut buffer, line) {
                        return;
                    }
                }
            }
            if let Some(frames) = heard.as_mut().filter(|_| user.is_some_and(|at| ready[at]))
                && !self.hear(line, frames)
            {
                // Nobody is there any more: nothing to read, and nobody to read.
                self.input.close();
                heard = None;
            }
            if feeds.is_some_and(|at| ready[at]) {
                self.input.feed();
            }
            if ready[0] && !wrote {
                let code = reap(&self.pidfd);
                let code = self.added.as_ref().map_or(code, |added| added.code(code));
                drop(line.write_all(&FromProcess::Exit(code).encode()));
                return;
            }
        }
    }

    /// Reads what the user's end says, without waiting for more of it; whether it is still there.
    fn hear(&mut self, line: &UnixStream, frames: &mut Vec<u8>) -> bool {
        let mut buffer = vec![0; MAX_FRAME];
        match recv(line.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return false,
            Ok(len) => frames.extend_from_slice(&buffer[..len]),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return true,
            Err(_) => return false,
        }
        while let Some(first) = frames.first_chunk::<5>() {
            let Ok((kind, len)) = head(*first) else { return false };
            if frames.len() < 5 + len {
                break;
            }
            let said = ToProcess::decode(kind, &frames[5..5 + len]);
            frames.drain(..5 + len);
            self.obey(said);
        }
        self.input.feed();
        true
    }

    /// Whether the user's end is still there.
    fn pass_output(&mut self, at: usize, buffer: &mut [u8], line: &mut UnixStream) -> bool {
        let Some(file) = &mut self.output[at] else { return true };
        match file.read(buffer) {
            Ok(len) if len > 0 => {
                let bytes = buffer[..len].to_vec();
                let told = if at == 0 { FromProcess::Output(bytes) } else { FromProcess::ErrorOutput(bytes) };
                line.write_all(&told.encode()).is_ok()
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => true,
            // The end of a pipe; EIO is that of a terminal.
            Ok(_) | Err(_) => {
                self.output[at] = None;
                true
            }
        }
    }

    /// Does what the user's end says.
    fn obey(&mut self, said: Option<ToProcess>) {
        match said {
            Some(ToProcess::Input(bytes)) => self.input.push(&bytes),
            Some(ToProcess::InputEnd) => self.input.end(),
            Some(ToProcess::Size(rows, columns)) => {
                if let Some(master) = self.output[0].as_ref().filter(|_| self.terminal) {
                    drop(sys::set_terminal_size(master, rows, columns));
                }
            }
            // It may have ended a moment ago.
            Some(ToProcess::Signal(signal)) => drop(sys::signal_pidfd(self.pidfd.as_fd(), signal)),
            // Of another kind of line, or from a later release.
            Some(ToProcess::Attach(_)) | None => {}
        }
    }
}

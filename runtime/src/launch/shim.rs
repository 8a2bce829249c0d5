//! The parent of one container.
//!
//! Steps: cgroup, mount namespace, overlay; clone init; wait until it has become the program or says why not; then
//! serve three things until the container has ended: its output, whoever asks at the socket, and its pidfd. Signals
//! are not waited for: a lost SIGCHLD has hung other runtimes (runc #5208), a pidfd cannot be lost.
//!
//! **Order at the end.** `exit.json` is on the disk before anybody is told, so a daemon that dies in between reads the
//! same from the file.
//!
//! **Bounds.** [`MAX_CLIENTS`] daemons on the socket; output is read in pieces of [`PIECE`] bytes and never held.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use oci_spec::runtime::Spec;

use super::init::{self, InitError};
use super::{rootfs, sys};
use crate::cgroup::Group;
use crate::container::{Exit, Failure, Launch, LogWriter, Report, Stream};

const MAX_CLIENTS: usize = 8;
const PIECE: usize = 64 * 1024;

/// Runs a shim to its end. Never returns: it is a fork of the zygote.
pub(super) fn run(dir: &Path, line: UnixStream) -> ! {
    sys::reset_signals();
    sys::ignore_signals(&[libc::SIGPIPE, libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
    sys::name_process(c"moyai-shim");
    // The folder is the current one from here on: the socket's path must be short.
    let result = nix::unistd::setsid()
        .map_err(io::Error::from)
        .and_then(|_| std::env::set_current_dir(dir))
        .map_err(|error| failure(format!("cannot enter {}: {error}", dir.display())))
        .and_then(|()| start());
    let code = match result {
        Ok(container) => container.serve(line),
        Err(error) => {
            tell(&line, &Report::Failed(error));
            1
        }
    };
    std::process::exit(code)
}

struct Container {
    group: Group,
    pid: i32,
    pidfd: OwnedFd,
    stdout: Option<File>,
    stderr: Option<File>,
    listener: UnixListener,
}

fn failure(reason: String) -> Failure {
    Failure { code: 125, machine: true, reason }
}

fn start() -> Result<Container, Failure> {
    let read = |name: &str| fs::read(name).map_err(|error| failure(format!("cannot read {name}: {error}")));
    let malformed = |name: &str, error: serde_json::Error| failure(format!("{name} is malformed: {error}"));
    let spec: Spec = serde_json::from_slice(&read("config.json")?).map_err(|error| malformed("config.json", error))?;
    let launch: Launch =
        serde_json::from_slice(&read("launch.json")?).map_err(|error| malformed("launch.json", error))?;
    let filter = init::parse_filter(&read("seccomp.bpf")?);
    let group = Group::create(&launch.cgroup, &launch.limits).map_err(|error| failure(error.to_string()))?;
    let started = start_in(&spec, &launch, &group, &filter);
    match started {
        Ok((pid, pidfd, stdout, stderr)) => {
            let listener = UnixListener::bind("shim.sock")
                .map_err(|error| failure(format!("cannot listen on shim.sock: {error}")))?;
            Ok(Container { group, pid, pidfd, stdout: Some(stdout), stderr: Some(stderr), listener })
        }
        Err(error) => {
            drop(group.delete());
            Err(error)
        }
    }
}

fn start_in(
    spec: &Spec,
    launch: &Launch,
    group: &Group,
    filter: &[crate::seccomp::Instruction],
) -> Result<(i32, OwnedFd, File, File), Failure> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)
        .map_err(|error| failure(format!("cannot make a mount namespace: {error}")))?;
    rootfs::mount_overlay(launch).map_err(|error| failure(error.to_string()))?;
    let pipe = || {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|error| failure(format!("cannot make a pipe: {error}")))
    };
    let (stdout, stdout_inside) = pipe()?;
    let (stderr, stderr_inside) = pipe()?;
    let (errors, errors_inside) = pipe()?;
    let namespaces = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    // SAFETY: a shim is a fork of the single-threaded zygote and starts no thread.
    let cloned = unsafe { sys::clone_into(namespaces.bits() as u64) };
    match cloned.map_err(|error| failure(format!("cannot make the container's namespaces: {error}")))? {
        sys::Cloned::Child => {
            drop((stdout, stderr, errors));
            let error = init::run(spec, group.dirs(), filter, [&stdout_inside, &stderr_inside]);
            // Whoever reads this is the parent; when it is gone there is nobody to tell.
            drop(File::from(errors_inside).write_all(&serde_json::to_vec(&error).unwrap_or_default()));
            std::process::exit(1)
        }
        sys::Cloned::Parent { pid, pidfd } => {
            drop((stdout_inside, stderr_inside, errors_inside));
            let mut text = Vec::new();
            let read = File::from(errors).read_to_end(&mut text);
            if read.is_ok() && text.is_empty() {
                return Ok((pid, pidfd, File::from(stdout), File::from(stderr)));
            }
            reap(&pidfd);
            let error: InitError = serde_json::from_slice(&text).unwrap_or_else(|_| InitError {
                code: 125,
                machine: true,
                reason: "the container's first process died before it could say why".to_owned(),
            });
            Err(Failure { code: error.code, machine: error.machine, reason: error.reason })
        }
    }
}

impl Container {
    fn serve(mut self, line: UnixStream) -> i32 {
        let running = Report::Running { pid: self.pid };
        let mut log = LogWriter::open(Path::new("."));
        let mut clients = Vec::new();
        if tell(&line, &running) && line.set_nonblocking(true).is_ok() {
            clients.push(line);
        }
        drop(self.listener.set_nonblocking(true));
        let mut buffer = vec![0; PIECE];
        let mut ended = false;
        while !ended {
            // 0: pidfd, 1: listener, 2 and 3: output, then clients.
            let output = [&self.stdout, &self.stderr];
            let mut fds = vec![
                PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            let open: Vec<usize> = (0..2).filter(|at| output[*at].is_some()).collect();
            fds.extend(
                open.iter()
                    .filter_map(|at| output[*at].as_ref())
                    .map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)),
            );
            fds.extend(clients.iter().map(|client| PollFd::new(client.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(_) => break,
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
            drop(fds);
            for (slot, at) in open.iter().enumerate() {
                if ready[2 + slot] {
                    self.copy_output(*at, &mut buffer, &mut log);
                }
            }
            let mut asked = ready[2 + open.len()..].iter();
            let pidfd = self.pidfd.as_raw_fd();
            clients.retain_mut(|client| !asked.next().is_some_and(|ready| *ready) || obey(client, pidfd));
            if ready[1]
                && clients.len() < MAX_CLIENTS
                && let Ok((client, _)) = self.listener.accept()
                && tell(&client, &running)
                && client.set_nonblocking(true).is_ok()
            {
                clients.push(client);
            }
            ended = ready[0];
        }
        self.finish(&mut buffer, &mut log, clients)
    }

    /// Copies what is there; an end of file closes.
    fn copy_output(&mut self, at: usize, buffer: &mut [u8], log: &mut LogWriter) -> bool {
        let (slot, stream) =
            if at == 0 { (&mut self.stdout, Stream::Stdout) } else { (&mut self.stderr, Stream::Stderr) };
        let Some(file) = slot else { return false };
        match file.read(buffer) {
            Ok(0) => *slot = None,
            Ok(len) => {
                log.write(stream, &buffer[..len]);
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(_) => *slot = None,
        }
        false
    }

    fn finish(mut self, buffer: &mut [u8], log: &mut LogWriter, clients: Vec<UnixStream>) -> i32 {
        let code = reap(&self.pidfd);
        // With the first process, everything in its pid namespace was killed: the pipes end.
        for at in 0..2 {
            while self.copy_output(at, buffer, log) {}
        }
        log.finish();
        let exit = Exit { code, out_of_memory: self.group.oom_kills() > 0 };
        let written = write_exit(&exit);
        drop(fs::remove_file("shim.sock"));
        // A cgroup is busy for a moment after its last process died.
        for _ in 0..50 {
            if self.group.delete().is_ok() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for client in &clients {
            drop(client.set_nonblocking(false));
            tell(client, &Report::Exited(exit));
        }
        i32::from(written.is_err())
    }
}

fn write_exit(exit: &Exit) -> io::Result<()> {
    let mut file = File::create("exit.json.new")?;
    file.write_all(&serde_json::to_vec(exit)?)?;
    file.sync_all()?;
    fs::rename("exit.json.new", "exit.json")?;
    File::open(".")?.sync_all()
}

fn tell(mut line: &UnixStream, report: &Report) -> bool {
    let mut text = serde_json::to_vec(report).unwrap_or_default();
    text.push(b'\n');
    line.write_all(&text).is_ok()
}

/// Carries out what a daemon asks: each line is the number of a signal. Whether it is still there.
fn obey(client: &mut UnixStream, pidfd: i32) -> bool {
    let mut text = [0; 64];
    match client.read(&mut text) {
        Ok(0) => false,
        Ok(len) => {
            for signal in String::from_utf8_lossy(&text[..len]).lines().filter_map(|line| line.parse().ok()) {
                // It may have ended a moment ago.
                drop(sys::signal_pidfd(pidfd, signal));
            }
            true
        }
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}

/// Waits for the container's first process and says how it ended.
fn reap(pidfd: &OwnedFd) -> i32 {
    loop {
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED) {
            Ok(WaitStatus::Exited(_, code)) => return code,
            Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return 255,
        }
    }
}

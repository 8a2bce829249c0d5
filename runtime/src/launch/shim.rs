//! The parent of one container.
//!
//! Steps: overlay, where the first process does not mount that itself; clone init, or give the bundle to one that waits
//! ([`super::spare`]); cgroup; wait until it has become the program or says why not; then serve until the container has ended: its
//! output, who is attached to it ([`super::attach`]), whoever asks at the socket, and its pidfd. Signals are not waited for: a lost
//! SIGCHLD has hung other runtimes (runc #5208), a pidfd cannot be lost.
//!
//! **Order at the end.** `exit.json` is there before anybody is told, so a daemon that dies in between reads the
//! same from the file. On the disk it is waited for only where no daemon hears it: one that does writes it down itself before
//! it tells others, and to lose the power in between is to have lost it before the end. Before anybody is told the cgroup has gone, or
//! has another name: the container's next life has one of its own. What nobody waits for goes [`AFTERWARDS`]: that cgroup, a network
//! namespace, mounts that hold nothing of others', this process. The next life, which has the same writable layer, has the mounts go at
//! once: it finds this process at [`LAST`], which closes then.
//!
//! **Leases.** A container whose folder has a `deadline` is killed at that time, by a process that does nothing else (see
//! [`super::lease`]). The daemon moves the deadline as the lease is renewed; a daemon that is dead, stopped or cut off from
//! the mesh does not, and the container is gone before another machine may run it.
//!
//! **Bounds.** [`MAX_CLIENTS`] daemons on the socket; output is read in pieces of [`PIECE`] bytes and never held.

use std::cell::RefCell;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;

use super::attach::{Users, Wait};
use super::external::External;
use super::{lease, overlay, spare};
use crate::cgroup::{Group, Planned};
use crate::container::{Exit, Failure, Launch, LogWriter, Report, SOCKET, Stream, open_deadline};
use crate::oci::{self, Config, Job, Stdio, failure, reap};
use crate::seccomp::questions;
use crate::sys;

/// What it is called.
pub(super) const NAME: &CStr = c"moyai-shim";
/// Where it is found while it holds the mounts of a container that has ended.
pub(super) const LAST: &str = "last.sock";
const MAX_CLIENTS: usize = 8;
/// How long after the end of a container what nobody waits for is taken away.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// So much that the allocator maps it by itself: what a container does not write is never touched (mallopt(3), M_MMAP_THRESHOLD).
const PIECE: usize = 128 * 1024;

/// Has a fork of the zygote be nobody's but its own, and be called so.
pub(super) fn begin(name: &CStr) {
    sys::reset_signals();
    sys::ignore_signals(&[libc::SIGPIPE, libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
    sys::name_process(name);
    // A fork leads no group of processes: it may lead a session.
    let _own = nix::unistd::setsid();
}

/// Runs a shim to its end. Never returns: it is a fork of the zygote.
pub(super) fn run(dir: &Path, line: UnixStream, made: Option<spare::Made>) -> ! {
    if made.is_some() {
        sys::name_process(NAME);
    }
    // The folder is the current one from here on: the socket's path must be short.
    let entered = std::env::set_current_dir(dir)
        .map_err(|error| failure(format!("cannot enter {}: {error}", dir.display())))
        .and_then(|()| Ok((here()?, read_launch()?, deadline()?)));
    let result = match entered {
        Ok((here, launch, deadline)) => start(&here, &launch, deadline.as_ref(), made),
        Err(error) => {
            made.into_iter().for_each(spare::Made::end);
            Err(error)
        }
    };
    let code = match result {
        Ok(container) => container.serve(line),
        Err(error) => {
            tell(&line, &Report::Failed(error));
            1
        }
    };
    sys::end(code)
}

struct Container {
    group: Group,
    pid: i32,
    pidfd: OwnedFd,
    /// Who ends it with its lease.
    watcher: Option<OwnedFd>,
    /// Standard output and error; a terminal has the first alone.
    output: [Option<File>; 2],
    /// What its filter asks.
    questions: Option<OwnedFd>,
    listener: UnixListener,
    users: Users,
    /// Who made it, where that was not this program.
    external: Option<External>,
    /// Its root is mounted in this process's mount namespace too.
    holds_root: bool,
    /// What is left of it afterwards.
    left: Namespaces,
}

/// Namespaces of a container that stay for a moment after its end: to take them down is the longest of what is to be done then.
#[derive(Default)]
pub(super) struct Namespaces {
    pub(super) network: Option<OwnedFd>,
    pub(super) mounts: Option<OwnedFd>,
}

impl Namespaces {
    /// Takes hold of those of the first process. What cannot be held goes with the container.
    pub(super) fn of(pidfd: BorrowedFd<'_>, pid: i32, network: bool, mounts: bool) -> Namespaces {
        let open = |wanted: bool, kind| wanted.then(|| sys::namespace_of(pidfd, pid, kind).ok()).flatten();
        Namespaces { network: open(network, sys::Namespace::Network), mounts: open(mounts, sys::Namespace::Mounts) }
    }
}

/// The container's folder, as it is called.
fn here() -> Result<PathBuf, Failure> {
    std::env::current_dir().map_err(|error| failure(format!("cannot find the container's folder: {error}")))
}

fn read_launch() -> Result<Launch, Failure> {
    let bytes = fs::read("launch.json").map_err(|error| failure(format!("cannot read launch.json: {error}")))?;
    serde_json::from_slice(&bytes).map_err(|error| failure(format!("launch.json is malformed: {error}")))
}

/// Starts it, with what was made ahead if there is such and it suits; with its lease until a time in `deadline`.
fn start(
    here: &Path,
    launch: &Launch,
    deadline: Option<&File>,
    made: Option<spare::Made>,
) -> Result<Container, Failure> {
    if let Some(made) = made {
        let mut watcher = None;
        let born = |container: BorrowedFd<'_>| {
            watcher = watched(deadline, container)?;
            Ok(())
        };
        if let Some(spare::Started { pid, pidfd, group, ends, left }) = made.start(here, launch, born)? {
            let started = Started { pid, pidfd, watcher, ends, questions: None };
            return started.serve_from(group, None, false).map(|container| Container { left, ..container });
        }
        // It has ended with what it watched.
        if let Some(watcher) = &watcher {
            reap(watcher);
        }
    }
    if overlay::is_the_shims(launch) {
        let made = nix::sched::unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
            // What the machine unmounts goes here too.
            let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        });
        made.map_err(|error| failure(format!("cannot make a mount namespace: {error}")))?;
    }
    let external = launch.runtime.as_ref().map(|runtime| {
        let config = Config::load_started(Path::new(".")).map_err(|error| failure(error.to_string()))?;
        // It makes the group itself.
        let external = External::new(runtime, &launch.cgroup, &config.spec);
        // What a shim that was killed left of an earlier life, which may hold what is mounted next.
        external.delete();
        Group::load(&launch.cgroup).kill();
        Ok(external)
    });
    let external = external.transpose()?;
    if overlay::is_the_shims(launch) {
        overlay::mount_overlay(launch, here).map_err(|error| failure(error.to_string()))?;
    }
    let config = Config::load(here).map_err(|error| failure(error.to_string()))?;
    if let Some(external) = external {
        let started = start_by(&external, &config, launch, deadline);
        let serving =
            started.and_then(|started| started.serve_from(Group::load(&launch.cgroup), Some(external.clone()), true));
        return serving.inspect_err(|_| external.delete());
    }
    let resources = config.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let planned = Planned::new(&launch.cgroup, resources);
    match start_in(&config, launch, &planned, deadline) {
        Ok(started) => {
            let group = planned.into_group();
            // It lies in pages that the first process has too: to give it back would copy them.
            std::mem::forget(config);
            let holds_root = overlay::is_the_shims(launch);
            let left = Namespaces::of(started.pidfd.as_fd(), started.pid, false, launch.lingers && !holds_root);
            started.serve_from(group, None, holds_root).map(|container| Container { left, ..container })
        }
        Err(error) => {
            drop(planned.group().delete());
            Err(error)
        }
    }
}

struct Started {
    pid: i32,
    pidfd: OwnedFd,
    watcher: Option<OwnedFd>,
    ends: Ends,
    questions: Option<OwnedFd>,
}

impl Started {
    fn serve_from(self, group: Group, external: Option<External>, holds_root: bool) -> Result<Container, Failure> {
        let failed = |error: io::Error| failure(format!("cannot listen in the container's folder: {error}"));
        let listener = UnixListener::bind(SOCKET).map_err(failed)?;
        let Started { pid, pidfd, watcher, ends: Ends { output, input, terminal }, questions } = self;
        let users = Users::listen(input, terminal).map_err(failed)?;
        Ok(Container {
            group,
            pid,
            pidfd,
            watcher,
            output,
            questions,
            listener,
            users,
            external,
            holds_root,
            left: Namespaces::default(),
        })
    }
}

/// This side of what a container reads and writes.
pub(super) struct Ends {
    output: [Option<File>; 2],
    input: Option<File>,
    terminal: bool,
}

/// Pipes for its input, if it has one, and its output: this side, and the container's.
pub(super) fn pipes(input: bool) -> Result<(Ends, Option<OwnedFd>, [OwnedFd; 2]), Failure> {
    let pipe = || {
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
            .map_err(|error| failure(format!("cannot make a pipe: {error}")))
    };
    let (stdout, stdout_inside) = pipe()?;
    let (stderr, stderr_inside) = pipe()?;
    let (input_inside, input) =
        if input { pipe().map(|(inside, end)| (Some(inside), Some(end.into())))? } else { (None, None) };
    let output = [Some(stdout.into()), Some(stderr.into())];
    Ok((Ends { output, input, terminal: false }, input_inside, [stdout_inside, stderr_inside]))
}

/// This side of a terminal, which came over `line`.
fn terminal(line: &UnixStream) -> Result<Ends, Failure> {
    let failed = |error: io::Error| failure(format!("process.terminal: {error}"));
    let master = File::from(oci::receive_fd(line).map_err(failed)?);
    let input = master.try_clone().map_err(failed)?;
    Ok(Ends { output: [Some(master), None], input: Some(input), terminal: true })
}

/// What is started with its lease, if it has one.
fn watched(deadline: Option<&File>, container: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Failure> {
    let Some(deadline) = deadline else { return Ok(None) };
    // SAFETY: a shim is a fork of the single-threaded zygote and starts no thread.
    let watching = unsafe { lease::watch(container, deadline) };
    watching.map(Some).map_err(|error| failure(format!("cannot start what ends it with its lease: {error}")))
}

fn deadline() -> Result<Option<File>, Failure> {
    open_deadline(Path::new(".")).map_err(|error| failure(format!("cannot read deadline: {error}")))
}

fn is_terminal(config: &Config) -> bool {
    config.spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false))
}

fn start_in(
    config: &Config,
    launch: &Launch,
    cgroup: &Planned<'_>,
    deadline: Option<&File>,
) -> Result<Started, Failure> {
    let watcher = RefCell::new(None);
    let watch = |container: BorrowedFd<'_>| {
        watcher.replace(watched(deadline, container)?);
        Ok(())
    };
    let line = || UnixStream::pair().map_err(|error| failure(format!("cannot make a socket: {error}")));
    let root = || overlay::mount_overlay(launch, &config.bundle);
    let asks = config.filter.as_ref().is_some_and(|filter| filter.asks);
    let (answers, asked) = if asks { line().map(|(mine, its)| (Some(mine), Some(its)))? } else { (None, None) };
    let consoles = if is_terminal(config) { Some(line()?) } else { None };
    let pipes = if consoles.is_none() { Some(pipes(launch.input)?) } else { None };
    let stdio = match &pipes {
        Some((_, Some(input), [output, errors])) => Stdio::Pipes([input, output, errors].map(AsRawFd::as_raw_fd)),
        Some((_, None, inside)) => Stdio::Output(inside.each_ref().map(AsRawFd::as_raw_fd)),
        None => Stdio::Inherit,
    };
    let spawned = oci::spawn(&Job {
        config,
        id: launch.cgroup.as_str(),
        cgroup,
        stdio,
        console: consoles.as_ref().map(|(_, its)| its),
        gate: None,
        // Nobody could say how it ends, without its shim.
        tied: true,
        pivot: true,
        keyring: true,
        preserve: 0,
        questions: asked,
        plain_sources: true,
        trampoline: None,
        born: Some(&watch),
        rooted: None,
        root: if overlay::is_the_shims(launch) { None } else { Some(&root) },
        ahead: None,
    })?;
    let ended = |error: Failure| {
        // Whoever is told that it failed must not find it running.
        drop(sys::signal_pidfd(spawned.pidfd.as_fd(), libc::SIGKILL));
        reap(&spawned.pidfd);
        error
    };
    let questions = answers.map(|line| oci::receive_fd(&line)).transpose();
    let questions = questions.map_err(|error| ended(failure(format!("cannot hear what its filter asks: {error}"))))?;
    let ends = match (pipes, consoles) {
        (Some((ends, ..)), _) => ends,
        (None, Some((mine, _))) => terminal(&mine).map_err(ended)?,
        (None, None) => unreachable!("it has the one or the other"),
    };
    Ok(Started { pid: spawned.pid, pidfd: spawned.pidfd, watcher: watcher.into_inner(), ends, questions })
}

/// The same by another OCI runtime.
fn start_by(
    external: &External,
    config: &Config,
    launch: &Launch,
    deadline: Option<&File>,
) -> Result<Started, Failure> {
    let (ends, pid, pidfd) = if is_terminal(config) {
        let (listener, pid, pidfd) = external.create_with_terminal()?;
        let (line, _) = listener.accept().map_err(|error| failure(format!("process.terminal: {error}")))?;
        (terminal(&line)?, pid, pidfd)
    } else {
        let (ends, input, inside) = pipes(launch.input)?;
        let (pid, pidfd) = external.create(input, inside)?;
        (ends, pid, pidfd)
    };
    // It waits for its start until here.
    let watcher = watched(deadline, pidfd.as_fd())?;
    external.start()?;
    Ok(Started { pid, pidfd, watcher, ends, questions: None })
}

/// What a shim waits for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Source {
    End,
    Newcomer,
    Watcher,
    Questions,
    Output(usize),
    Daemon(usize),
    Users(Wait),
}

impl Container {
    fn serve(mut self, line: UnixStream) -> i32 {
        let running = Report::Running { pid: self.pid };
        let mut log = LogWriter::open(Path::new("."));
        let mut daemons = Vec::new();
        if tell(&line, &running) && line.set_nonblocking(true).is_ok() {
            daemons.push(line);
        }
        drop(self.listener.set_nonblocking(true));
        let mut buffer = vec![0; PIECE];
        while let Ok(ready) = self.wait(&daemons) {
            let is_ready = |source| ready.contains(&source);
            if is_ready(Source::Questions) {
                self.answer(&mut log);
            }
            if is_ready(Source::Watcher) {
                // It has killed the container, or was killed: without it the container must not run.
                drop(sys::signal_pidfd(self.pidfd.as_fd(), libc::SIGKILL));
                self.watcher = None;
            }
            for at in 0..2 {
                if is_ready(Source::Output(at)) {
                    self.copy_output(at, &mut buffer, &mut log);
                }
            }
            let users: Vec<Wait> = ready
                .iter()
                .filter_map(|source| if let Source::Users(wait) = source { Some(*wait) } else { None })
                .collect();
            for signal in self.users.handle(&users, self.output[0].as_ref()) {
                // It may have ended a moment ago.
                drop(sys::signal_pidfd(self.pidfd.as_fd(), signal));
            }
            let (mut at, pidfd) = (0, self.pidfd.as_fd());
            daemons.retain_mut(|daemon| {
                at += 1;
                !is_ready(Source::Daemon(at - 1)) || obey(daemon, pidfd)
            });
            if is_ready(Source::Newcomer)
                && daemons.len() < MAX_CLIENTS
                && let Ok((daemon, _)) = self.listener.accept()
                && tell(&daemon, &running)
                && daemon.set_nonblocking(true).is_ok()
            {
                daemons.push(daemon);
            }
            if is_ready(Source::End) {
                break;
            }
        }
        self.finish(&mut buffer, &mut log, daemons)
    }

    /// Waits until there is something to do.
    fn wait(&self, daemons: &[UnixStream]) -> io::Result<Vec<Source>> {
        let mut sources = vec![Source::End, Source::Newcomer];
        let mut fds = vec![
            PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let mut add = |source, fd, flags| {
            sources.push(source);
            fds.push(PollFd::new(fd, flags));
        };
        if let Some(watcher) = &self.watcher {
            add(Source::Watcher, watcher.as_fd(), PollFlags::POLLIN);
        }
        if let Some(questions) = &self.questions {
            add(Source::Questions, questions.as_fd(), PollFlags::POLLIN);
        }
        if self.users.take_output() {
            for (at, file) in self.output.iter().enumerate() {
                if let Some(file) = file {
                    add(Source::Output(at), file.as_fd(), PollFlags::POLLIN);
                }
            }
        }
        for (at, daemon) in daemons.iter().enumerate() {
            add(Source::Daemon(at), daemon.as_fd(), PollFlags::POLLIN);
        }
        for (wait, fd, read, write) in self.users.waits() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, read);
            flags.set(PollFlags::POLLOUT, write);
            add(Source::Users(wait), fd, flags);
        }
        let timeout = self.users.deadline().map_or(PollTimeout::NONE, |at| {
            // Rounded up, so that it is over when this returns.
            let left = at.saturating_duration_since(std::time::Instant::now()).as_millis() as i32 + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let came = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        Ok(sources.into_iter().zip(&fds).filter(|(_, fd)| came(fd)).map(|(source, _)| source).collect())
    }

    /// Refuses what the filter asks, and writes it down.
    fn answer(&mut self, log: &mut LogWriter) {
        let Some(questions) = &self.questions else { return };
        match questions::refuse(questions.as_fd()) {
            Ok(Some(text)) => log.write(Stream::Audit, text.as_bytes()),
            Ok(None) => {}
            // Nobody who could ask is left.
            Err(_) => self.questions = None,
        }
    }

    /// Copies what is there; an end of file closes. Whether there was something.
    fn copy_output(&mut self, at: usize, buffer: &mut [u8], log: &mut LogWriter) -> bool {
        let Some(file) = &mut self.output[at] else { return false };
        let stream = if at == 0 { Stream::Stdout } else { Stream::Stderr };
        match file.read(buffer) {
            Ok(len) if len > 0 => {
                log.write(stream, &buffer[..len]);
                self.users.output(stream, &buffer[..len]);
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            // A terminal's master, which does not wait.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The end of a pipe; EIO is that of a terminal.
            Ok(_) | Err(_) => self.output[at] = None,
        }
        false
    }

    fn finish(mut self, buffer: &mut [u8], log: &mut LogWriter, daemons: Vec<UnixStream>) -> i32 {
        let code = reap(&self.pidfd);
        // With the first process, everything in its pid namespace was killed: the pipes end.
        for at in 0..2 {
            // Others may have it open still, whom it was given to; what was written is there.
            drop(self.output[at].as_ref().map(sys::set_nonblocking));
            while self.copy_output(at, buffer, log) {}
        }
        log.finish();
        let exit = Exit { code, out_of_memory: self.group.oom_kills() > 0 };
        if self.left.mounts.is_some() {
            // Before the end can be read: the next life may begin then.
            drop(fs::remove_file(LAST));
            self.left.mounts.take_if(|_| fs::hard_link(SOCKET, LAST).is_err());
        }
        let written = write_exit(&exit, daemons.is_empty());
        drop(fs::remove_file(SOCKET));
        // Before anybody is told: the next life of it has one of that name.
        self.users.close();
        if let Some(external) = &self.external {
            external.delete();
        }
        // Its next life has a group of that name. What another runtime has left running is found by the name still, and killed, when the
        // container's folder is deleted.
        let name = format!("{}{}", spare::NAME, std::process::id());
        let aside = if self.external.is_some() { None } else { self.group.set_aside(&name) };
        if aside.is_none() {
            drop(self.group.delete_soon());
        }
        for daemon in &daemons {
            drop(daemon.set_nonblocking(false));
            tell(daemon, &Report::Exited(exit));
        }
        self.users.tell_end(code);
        let Container { left: Namespaces { network, mounts }, listener, users, holds_root, .. } = self;
        // What is left takes the kernel as long as a start, and the locks that a start needs. It waits, but not where the container's next
        // life waits for this process; nor where this process waits for others.
        let slow = Some(users).filter(Users::are_behind);
        if let Some(mounts) = mounts {
            if slow.is_none() {
                let newcomer = PollFd::new(listener.as_fd(), PollFlags::POLLIN);
                let _woken = poll(&mut [newcomer], AFTERWARDS.as_millis() as u16);
            }
            drop(mounts);
            drop(fs::remove_file(LAST));
            drop(listener);
            slow.into_iter().for_each(Users::finish);
        } else {
            slow.into_iter().for_each(Users::finish);
            if !holds_root && (aside.is_some() || network.is_some()) {
                std::thread::sleep(AFTERWARDS);
            }
        }
        if let Some(group) = aside {
            drop(group.delete_soon());
        }
        drop(network);
        i32::from(written.is_err())
    }
}

fn write_exit(exit: &Exit, to_disk: bool) -> io::Result<()> {
    let mut file = File::create("exit.json.new")?;
    file.write_all(&serde_json::to_vec(exit)?)?;
    if to_disk {
        file.sync_all()?;
    }
    fs::rename("exit.json.new", "exit.json")?;
    if to_disk { File::open(".")?.sync_all() } else { Ok(()) }
}

fn tell(mut line: &UnixStream, report: &Report) -> bool {
    let mut text = serde_json::to_vec(report).unwrap_or_default();
    text.push(b'\n');
    line.write_all(&text).is_ok()
}

/// Carries out what a daemon asks: each line is the number of a signal. Whether it is still there.
fn obey(client: &mut UnixStream, pidfd: BorrowedFd<'_>) -> bool {
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

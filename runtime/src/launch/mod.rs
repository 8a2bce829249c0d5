//! Starting containers from a threaded daemon without forking it.
//!
//! Three kinds of process, each single-threaded:
//! - the **zygote**, started before the daemon has threads, waits on a socket and forks a shim for each request: a
//!   fork from a daemon with 200 MB takes 25 ms and may only run async-signal-safe code, one from the zygote is cheap
//!   and may run anything. Where containers were asked for lately it has shims made ahead, its *spares*;
//! - a **shim** is the parent of one container: it clones its first process, makes its cgroup, keeps its output, and writes down
//!   how it ended. It outlives the daemon and the zygote;
//! - **init** is the first process inside, until it becomes the container's program ([`crate::oci`]).
//!
//! The zygote is the small program ([`crate::small`]) where that is there and says that it is ready, else this program itself.
//!
//! **If one dies.** The daemon: the zygote sees its socket close and ends; shims go on, and a later daemon finds them by
//! their sockets. The zygote: the daemon fails to start containers and says so. A shim: its container is killed with it
//! (PR_SET_PDEATHSIG), since nobody could say how it ends. Init, before its program runs: the shim reports why.

mod attach;
mod disk;
pub mod exec;
mod external;
mod input;
mod lease;
mod mounts;
mod overlay;
mod shim;
mod spare;
mod task;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg, send, sendmsg,
    socketpair,
};
use nix::unistd::ForkResult;
use serde::{Deserialize, Serialize};

use spare::Stock;
pub use task::Usage;

use crate::{seccomp, small, sys};

/// The first argument by which the program knows that it is to be a zygote.
pub const ZYGOTE: &str = "__zygote";
/// Where the zygote finds its socket.
const ZYGOTE_FD: RawFd = 3;
/// What a zygote says when it is one; what it says that was to be the small program and has become this one again; and for how many
/// milliseconds that is waited for.
const READY: &[u8] = b"ready";
const RETURNED: &[u8] = b"again";
const READY_PATIENCE: u16 = 10_000;
/// The longest request to the zygote.
const MAX_REQUEST: usize = 128 * 1024;

/// What the daemon asks the zygote for.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// A shim for the container in a folder.
    Launch(PathBuf),
    /// Another process in a container.
    Exec(exec::Exec),
}

/// What a container has in common with others, so that a part of it can be there before it is asked for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All that is usual, and a network namespace of its own with nothing in it.
    Alone,
    /// All that is usual but the network, which is somebody else's.
    Joined,
    /// Nothing.
    Other,
}

impl Kind {
    /// As the first byte of a request says it; what is no kind has nothing in common.
    fn byte(self) -> u8 {
        match self {
            Kind::Alone => b'a',
            Kind::Joined => b'j',
            Kind::Other => b'o',
        }
    }

    fn of(byte: u8) -> Kind {
        spare::KINDS.into_iter().find(|kind| kind.byte() == byte).unwrap_or(Kind::Other)
    }
}

/// The daemon's end of the zygote.
pub struct Launcher {
    socket: Mutex<OwnedFd>,
    _zygote: Child,
}

impl Launcher {
    /// Starts a zygote. `refused` hears why it is not the small program, where that is there. To be called before the process has
    /// threads.
    pub fn start(refused: impl Fn(&io::Error)) -> io::Result<Launcher> {
        match small::beside() {
            Ok(None) => {}
            Ok(Some(small)) => match Launcher::start_by(small.command(), Some(READY_PATIENCE)) {
                Ok((launcher, is_it)) => {
                    if !is_it {
                        refused(&io::Error::other("it is of another build"));
                    }
                    return Ok(launcher);
                }
                Err(error) => refused(&error),
            },
            Err(error) => refused(&error),
        }
        // It does as well.
        let mut command = Command::new("/proc/self/exe");
        command.env_clear();
        Launcher::start_by(command, None).map(|(launcher, _)| launcher)
    }

    /// And whether it is still what was started.
    fn start_by(mut command: Command, patience: Option<u16>) -> io::Result<(Launcher, bool)> {
        let (mine, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let its_fd = its.as_raw_fd();
        command.arg(ZYGOTE).current_dir("/");
        // SAFETY: between fork and exec only dup2 and fcntl run, which are async-signal-safe, on a descriptor that the
        // parent keeps open until the child has been started.
        unsafe {
            command.pre_exec(move || {
                if its_fd == ZYGOTE_FD {
                    sys::keep_on_exec(its_fd)
                } else if libc::dup2(its_fd, ZYGOTE_FD) < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            });
        }
        let mut zygote = command.spawn()?;
        drop(its);
        match wait_for_ready(&mine, patience) {
            Ok(is_it) => Ok((Launcher { socket: Mutex::new(mine), _zygote: zygote }, is_it)),
            Err(error) => {
                drop(zygote.kill());
                drop(zygote.wait());
                Err(error)
            }
        }
    }

    /// Starts the container whose bundle is in `dir`, and returns the line to its shim. It is of that kind or of none.
    pub fn launch(&self, dir: &Path, kind: Kind) -> io::Result<UnixStream> {
        self.ask(kind, &Request::Launch(dir.to_owned()))
    }

    /// Has something done in a container; what comes and goes on the line is in [`exec`].
    pub fn exec(&self, exec: exec::Exec) -> io::Result<UnixStream> {
        if let exec::Task::Attach = exec.task {
            return attach::connect(&exec.dir);
        }
        self.ask(Kind::Other, &Request::Exec(exec))
    }

    fn ask(&self, kind: Kind, request: &Request) -> io::Result<UnixStream> {
        let (mine, its) = UnixStream::pair()?;
        let socket = self.socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut text = vec![kind.byte()];
        serde_json::to_writer(&mut text, request)?;
        if text.len() > MAX_REQUEST {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a request of {} bytes", text.len())));
        }
        pass(&socket, &text, &its)?;
        Ok(mine)
    }
}

/// Sends a request with its line.
fn pass(socket: &OwnedFd, text: &[u8], line: &UnixStream) -> io::Result<()> {
    let (fds, flags) = ([line.as_raw_fd()], MsgFlags::MSG_NOSIGNAL);
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], &[ControlMessage::ScmRights(&fds)], flags, None)?;
    Ok(())
}

/// What was asked for.
fn request(text: &[u8]) -> io::Result<Request> {
    Ok(serde_json::from_slice(text.get(1..).unwrap_or_default())?)
}

/// Waits for a zygote's word that it is one, for so many milliseconds, or for ever; and whether it is still what was started.
fn wait_for_ready(socket: &OwnedFd, patience: Option<u16>) -> io::Result<bool> {
    let patience = patience.map_or(PollTimeout::NONE, PollTimeout::from);
    if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], patience)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer"));
    }
    let mut word = [0; READY.len()];
    match recv(socket.as_raw_fd(), &mut word, MsgFlags::empty())? {
        0 => Err(io::Error::other("it ended at once")),
        len if word[..len] == *READY => Ok(true),
        len if word[..len] == *RETURNED => Ok(false),
        _ => Err(io::Error::other("it is something else")),
    }
}

/// The zygote's whole life. Returns when the daemon is gone.
pub fn zygote() -> io::Result<()> {
    // SAFETY: `Launcher::start` has put a socket there, and nothing else in this process knows of it.
    let socket = unsafe { OwnedFd::from_raw_fd(ZYGOTE_FD) };
    sys::close_on_exec(socket.as_raw_fd())?;
    sys::name_process(c"moyai-zygote");
    sys::ignore_signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE]);
    let word = if small::has_returned() { RETURNED } else { READY };
    send(socket.as_raw_fd(), word, MsgFlags::MSG_NOSIGNAL)?;
    seccomp::prepare();
    // Shims that end are nobody's to wait for.
    sys::ignore_signals(&[libc::SIGCHLD]);
    // What is asked for is read by the child alone, and forgotten here: the next one may stay inside a container ([`crate::oci`]'s
    // init), and is not to have the words of others in its memory.
    let mut text = vec![0; MAX_REQUEST];
    let mut stock = Stock::new();
    loop {
        stock.wait(&socket)?;
        let Some((len, line)) = receive(&socket, &mut text)? else { return Ok(()) };
        if stock.give(Kind::of(text[0]), &text[..len], &line) {
            text[..len].fill(0);
            continue;
        }
        // SAFETY: this process has one thread, so the child may run any code.
        match unsafe { nix::unistd::fork() } {
            // The line closes, and the daemon sees that nothing was started; the next request may be luckier.
            Err(_) | Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => {
                drop(socket);
                stock.leave();
                match request(&text[..len])? {
                    Request::Launch(dir) => {
                        shim::begin(shim::NAME);
                        shim::run(&dir, line, None)
                    }
                    Request::Exec(exec) => exec::run(&exec, line),
                }
            }
        }
        text[..len].fill(0);
    }
}

/// How long the request is, and its line.
fn receive(socket: &OwnedFd, text: &mut [u8]) -> io::Result<Option<(usize, UnixStream)>> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (len, fd) = {
        let mut parts = [IoSliceMut::new(text)];
        let message = loop {
            match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(nix::errno::Errno::EINTR) => {}
                result => break result?,
            }
        };
        let mut received = None;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                received = fds.first().copied();
            }
        }
        (message.bytes, received)
    };
    let Some(fd) = fd.filter(|_| len > 0) else { return Ok(None) };
    // SAFETY: the kernel has just installed this descriptor for us.
    let line = unsafe { UnixStream::from_raw_fd(fd) };
    Ok(Some((len, line)))
}

/// Starts a program that goes on when this one ends: its own session, its own log for output, nothing inherited but
/// `keep`, which it finds as descriptor 3.
pub fn spawn_detached(mut command: Command, keep: &OwnedFd) -> io::Result<Child> {
    let keep = keep.as_raw_fd();
    // SAFETY: between fork and exec only setsid, dup2 and fcntl run, which are async-signal-safe, on a descriptor that
    // the caller keeps open.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            if keep == ZYGOTE_FD {
                sys::keep_on_exec(keep)
            } else if libc::dup2(keep, ZYGOTE_FD) < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    command.spawn()
}

/// The descriptor that [`spawn_detached`] passed on. To be called once, by a program started that way.
pub fn inherited() -> io::Result<OwnedFd> {
    sys::close_on_exec(ZYGOTE_FD)?;
    // SAFETY: the program was started with it open, which close_on_exec has just seen, and asks once.
    Ok(unsafe { OwnedFd::from_raw_fd(ZYGOTE_FD) })
}

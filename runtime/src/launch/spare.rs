//! Spares: shims made ahead of the containers that they will be the parents of.
//!
//! Most of a start is alike for all containers: a shim, namespaces, their cgroup, the mounts of `/proc`, `/dev` and `/sys`. The
//! zygote has some shims with all of that ([`crate::oci`]'s `ahead`) wait for a container, of the *kinds* that were asked for lately.
//!
//! **States** of a spare: being made → ready (it has said so) → a shim like any other, when the zygote has passed a request on to it.
//!
//! **How many.** Of each kind as many as were asked for in this [`WINDOW`] or the last one, [`FEW`] at least where any was, and all
//! together [`MOST`] at the most, or as many as a 128th of the machine's memory holds. So a node that starts nothing has none after
//! two windows; and since the oldest is taken first, what a spare has taken from the machine when it was made (sysctls of the network)
//! is not much older. They are made one at a time, when it has been quiet for [`QUIET`]; a request that finds none is served by a fork
//! of the zygote, as if there were no spares.
//!
//! **What they have seen.** A spare's first process has the machine's mounts as they were when it was made ([`Mounts`]). Before the zygote
//! looks at a request it hears whether they have changed. If one of them has gone or is another, it does away with all spares, which
//! would hold it; while there are others too, it gives none away. They are of use again when what came has gone, as it does where other
//! runtimes start containers; if it stays for [`SETTLED`], others are made instead.
//!
//! **Who writes.** The zygote alone counts. A spare hears of nothing but its own request, over a socket of its own.
//!
//! **If one dies.** The zygote: spares read the end of their sockets, remove their groups and end. A spare before it is given a
//! request: the zygote, which finds that its socket takes nothing, takes another one. After that: the user's line closes, as with any
//! shim. The first process of one: the spare starts the container in the ordinary way. One that was killed leaves an empty
//! cgroup, which this zygote removes when it has found it dead and made another one, or else the next zygote.
//!
//! **If one cannot be made** it says why on the daemon's error output, where it can, and none is tried before the next window: starts
//! take longer.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::ForkResult;

use super::mounts::{Mounts, Watch};
use super::shim::{Ends, Namespaces};
use super::{Kind, MAX_REQUEST, READY, Request, overlay, pass, receive, request, shim};
use crate::cgroup::{Group, Planned, Spare as SpareGroup};
use crate::container::{Failure, Launch, usual};
use crate::oci::{Order, RootfsError, Step, Waiting, Wish, failure};
use crate::rootless::is_rootless;
use crate::{host, sys};

/// How long demand is remembered.
const WINDOW: Duration = Duration::from_secs(60);
/// For so long each request keeps the machine busy, one after the other, and after that it is quiet before one is made.
const BUSY: Duration = Duration::from_millis(3);
const QUIET: Duration = Duration::from_millis(10);
/// For so long the machine's mounts have not changed before one is made.
const SETTLED: Duration = Duration::from_secs(1);
const FEW: usize = 2;
const MOST: usize = 128;
/// What one takes at the most, in processes and in the kernel.
const BYTES: u64 = 1 << 20;
/// Of a machine's memory for all of them.
const SHARE: u64 = 128;
/// Of their cgroups, and of those that a shim has yet to remove; the number of the process follows.
pub(super) const NAME: &str = "moyai-spare-";

/// The kinds of which there are spares.
pub(super) const KINDS: [Kind; 2] = [Kind::Alone, Kind::Joined];

/// What a spare has.
pub(super) struct Made {
    waiting: Waiting,
    group: Option<SpareGroup>,
    ends: Ends,
    left: Namespaces,
}

/// A container that was made of it.
pub(super) struct Started {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) group: Group,
    pub(super) ends: Ends,
    pub(super) left: Namespaces,
}

impl Made {
    fn new(kind: Kind) -> Result<Made, Failure> {
        let (ends, _, inside) = shim::pipes(false)?;
        let group = SpareGroup::make(&format!("{NAME}{}", std::process::id()));
        let group = group.map_err(|error| failure(error.to_string()))?;
        let waiting = Waiting::make(&Wish {
            network: kind == Kind::Alone,
            mounts: usual(kind == Kind::Alone, group.is_some()),
            group: group.as_ref().map(SpareGroup::group),
            output: inside.each_ref().map(AsRawFd::as_raw_fd),
            root: &mount_root,
        });
        let waiting = waiting.inspect_err(|_| group.iter().for_each(|group| drop(group.group().delete_soon())))?;
        let left = Namespaces::of(waiting.pidfd.as_fd(), waiting.pid, kind == Kind::Alone, true);
        Ok(Made { waiting, group, ends, left })
    }

    /// Makes it the container of a bundle; none where it does not suit that, or its first process is dead.
    pub(super) fn start(
        self,
        here: &Path,
        launch: &Launch,
        born: impl FnOnce(BorrowedFd<'_>) -> Result<(), Failure>,
    ) -> Result<Option<Started>, Failure> {
        if overlay::is_the_shims(launch) || launch.input {
            self.end();
            return Ok(None);
        }
        let Made { mut waiting, group, ends, mut left } = self;
        left.mounts.take_if(|_| !launch.lingers);
        let group = match group.map(|group| group.rename(&launch.cgroup)).transpose() {
            Ok(group) => group.unwrap_or_else(|| Planned::new(&launch.cgroup, None).into_group()),
            Err(group) => {
                waiting.end();
                drop(group.group().delete_soon());
                return Ok(None);
            }
        };
        let order = Order { bundle: here.to_owned(), cgroup: launch.cgroup.clone() };
        let started = match born(waiting.pidfd.as_fd()) {
            Ok(()) => waiting.start(&order),
            Err(error) => Err(error),
        };
        if matches!(started, Ok(true)) {
            return Ok(Some(Started { pid: waiting.pid, pidfd: waiting.pidfd, group, ends, left }));
        }
        waiting.end();
        drop(group.delete_soon());
        started.map(|_| None)
    }

    /// Does away with it.
    pub(super) fn end(self) {
        self.waiting.end();
        if let Some(group) = self.group {
            drop(group.group().delete_soon());
        }
    }
}

/// Mounts the root of the container whose folder is `dir`.
fn mount_root(dir: &Path) -> Result<(), RootfsError> {
    let path = dir.join("launch.json");
    let launch = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?)).step("read", &path)?;
    overlay::mount_overlay(&launch, dir)
}

/// What the zygote has of one kind.
#[derive(Default)]
struct Shelf {
    /// The oldest first, which is taken first.
    ready: VecDeque<OwnedFd>,
    /// Requests in this window and in the one before.
    asked: usize,
    before: usize,
}

impl Shelf {
    fn wanted(&self, most: usize) -> usize {
        match self.asked.max(self.before) {
            0 => 0,
            asked => asked.max(FEW).min(most),
        }
    }

    fn lacks(&self, most: usize) -> bool {
        self.ready.len() < self.wanted(most)
    }
}

/// One that is being made.
struct Making {
    /// Where it says that it is ready.
    socket: OwnedFd,
    /// The place of its kind among all.
    at: usize,
    since: Instant,
}

/// What the zygote has.
pub(super) struct Stock {
    /// Where it hears that the machine's mounts have changed; without that there are no spares.
    watch: Option<Watch>,
    /// The mounts that all spares have seen, where they can be told from others.
    seen: Option<Mounts>,
    /// Whether the machine has just those.
    settled: bool,
    most: usize,
    shelves: [Shelf; KINDS.len()],
    making: Option<Making>,
    /// When this window began, while anything was asked for in it or the last one.
    since: Option<Instant>,
    /// Until when the machine is busy with the requests so far, or with its mounts.
    busy: Instant,
    /// When the machine's mounts last changed.
    changed: Option<Instant>,
    /// One could not be made in this window.
    failed: bool,
    /// One was found dead, whose group is left.
    died: bool,
}

impl Stock {
    pub(super) fn new() -> Stock {
        SpareGroup::sweep(NAME);
        let room = usize::try_from(host::capacity().memory / SHARE / BYTES).unwrap_or(MOST);
        // An ordinary user's containers have no cgroups, and few of them start at once.
        let watch = if is_rootless() { None } else { Watch::open().ok() };
        let most = watch.as_ref().map_or(0, |_| room.min(MOST));
        let busy = Instant::now();
        Stock {
            watch,
            seen: None,
            settled: false,
            most,
            shelves: Default::default(),
            making: None,
            since: None,
            busy,
            changed: None,
            failed: false,
            died: false,
        }
    }

    /// Looks after the stock until there is a request on `socket`.
    pub(super) fn wait(&mut self, socket: &OwnedFd) -> io::Result<()> {
        loop {
            let timeout = self.tick(Instant::now());
            let timeout = timeout.map_or(PollTimeout::NONE, |left| {
                // Rounded up, so that it is over when this returns.
                PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap_or(PollTimeout::MAX)
            });
            let making = self.making.as_ref().map(|making| making.socket.as_fd());
            // Not where there are none to have seen anything.
            let mounts = self.since.and(self.watch.as_ref()).map(Watch::as_fd);
            let waited =
                [(Some(socket.as_fd()), PollFlags::POLLIN), (making, PollFlags::POLLIN), (mounts, PollFlags::POLLPRI)];
            let came = wait_for(waited, timeout)?;
            if came[2] {
                // Before what came is given to one that has not seen it.
                self.compare();
            } else if came[1] {
                self.made();
            }
            if came[0] {
                return Ok(());
            }
        }
    }

    /// The one that was being made is ready, or could not be made.
    fn made(&mut self) {
        let Some(Making { socket, at, .. }) = self.making.take() else { return };
        let mut word = [0; READY.len()];
        if recv(socket.as_raw_fd(), &mut word, MsgFlags::empty()) != Ok(READY.len()) {
            self.failed = true;
        } else if self.shelves[at].lacks(self.most) {
            self.shelves[at].ready.push_back(socket);
        }
        if std::mem::take(&mut self.died) {
            SpareGroup::sweep(NAME);
        }
    }

    /// The machine's mounts have changed.
    fn compare(&mut self) {
        let there = self.watch.as_mut().and_then(Watch::read);
        self.settled = self.seen.is_some() && self.seen == there;
        let now = Instant::now();
        self.changed = Some(now);
        // What it sees nobody knows. The next one is not tried at once, or mounts that come and go all the time would keep this busy.
        if self.making.take().is_some() {
            self.busy = self.busy.max(now + SETTLED);
        }
        if !self.seen.as_ref().zip(there.as_ref()).is_some_and(|(seen, there)| seen.are_in(there)) {
            self.clear();
        }
    }

    /// Does with the machine's mounts as they are now.
    fn settle(&mut self) {
        self.clear();
        self.seen = self.watch.as_mut().and_then(Watch::read);
        self.settled = true;
    }

    /// Begins what is due at `now`; for how long nothing more is.
    fn tick(&mut self, now: Instant) -> Option<Duration> {
        let since = self.since?;
        if now.duration_since(since) >= WINDOW {
            let mut any = false;
            for shelf in &mut self.shelves {
                (shelf.before, shelf.asked) = (shelf.asked, 0);
                let wanted = shelf.wanted(self.most);
                // They read the end of their sockets.
                shelf.ready.drain(..shelf.ready.len().saturating_sub(wanted));
                any |= wanted > 0;
            }
            // One that takes so long is given up.
            let stuck = self.making.take_if(|making| now.duration_since(making.since) >= WINDOW);
            self.failed = stuck.is_some();
            self.since = any.then_some(now);
            return self.tick(now);
        }
        let rest = WINDOW - now.duration_since(since);
        if !self.settled {
            let due = self.changed.map_or(now, |changed| changed + SETTLED);
            if now < due {
                return Some(rest.min(due - now));
            }
            self.settle();
        }
        let there: usize = self.shelves.iter().map(|shelf| shelf.ready.len()).sum();
        let lacking = self.shelves.iter().position(|shelf| shelf.lacks(self.most));
        let Some(at) = lacking.filter(|_| self.making.is_none() && !self.failed && there < self.most) else {
            return Some(rest);
        };
        let due = self.busy + QUIET;
        if now < due {
            return Some(rest.min(due - now));
        }
        match self.make(KINDS[at]) {
            Ok(socket) => self.making = Some(Making { socket, at, since: now }),
            Err(_) => self.failed = true,
        }
        Some(rest)
    }

    fn make(&mut self, kind: Kind) -> io::Result<OwnedFd> {
        let (mine, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the zygote has one thread, so the child may run any code.
        match unsafe { nix::unistd::fork()? } {
            ForkResult::Parent { .. } => Ok(mine),
            ForkResult::Child => {
                // Nothing of the others stays open here, or they would not see the zygote's end.
                drop(mine);
                self.leave();
                sys::close_all_but(&[its.as_raw_fd()]);
                run(kind, its)
            }
        }
    }

    /// Does without those that are there: they read the end of their sockets.
    fn clear(&mut self) {
        self.making = None;
        self.shelves.iter_mut().for_each(|shelf| shelf.ready.clear());
    }

    /// In a child of the zygote: closes what is not its own.
    pub(super) fn leave(&mut self) {
        self.clear();
        self.watch = None;
    }

    /// Gives a request to a spare, if there is one.
    pub(super) fn give(&mut self, kind: Kind, request: &[u8], line: &UnixStream) -> bool {
        let now = Instant::now();
        self.busy = self.busy.max(now) + BUSY;
        let Some(shelf) = KINDS.iter().position(|known| *known == kind).map(|at| &mut self.shelves[at]) else {
            return false;
        };
        shelf.asked += 1;
        self.since.get_or_insert(now);
        if !self.settled {
            return false;
        }
        while let Some(spare) = shelf.ready.pop_front() {
            if pass(&spare, request, line).is_ok() {
                return true;
            }
            // It was killed. Its group is busy until its first process has gone too.
            self.died = true;
        }
        false
    }
}

/// Which of these there is something from.
fn wait_for<const N: usize>(
    waited: [(Option<BorrowedFd<'_>>, PollFlags); N],
    timeout: PollTimeout,
) -> io::Result<[bool; N]> {
    let mut fds: Vec<PollFd<'_>> =
        waited.iter().filter_map(|(fd, flags)| fd.map(|fd| PollFd::new(fd, *flags))).collect();
    match poll(&mut fds, timeout) {
        Err(nix::errno::Errno::EINTR) => return Ok([false; N]),
        polled => polled?,
    };
    let mut events = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
    Ok(waited.map(|(fd, _)| fd.is_some() && events.next() == Some(true)))
}

/// A spare's whole life. Never returns: it is a fork of the zygote.
fn run(kind: Kind, socket: OwnedFd) -> ! {
    shim::begin(c"moyai-spare");
    let made = match Made::new(kind) {
        Ok(made) => made,
        Err(error) => {
            eprintln!("cannot make a part of containers ahead, which makes starts slower: {}", error.reason);
            sys::end(1)
        }
    };
    let mut text = vec![0; MAX_REQUEST];
    let said = send(socket.as_raw_fd(), READY, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from);
    let received = said.and_then(|_| receive(&socket, &mut text));
    drop(socket);
    match received.map(|received| received.map(|(len, line)| (request(&text[..len]), line))) {
        Ok(Some((Ok(Request::Launch(dir)), line))) => shim::run(&dir, line, Some(made)),
        _ => {
            made.end();
            sys::end(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_wanted_as_were_asked_for_lately() {
        let wanted = |asked, before| Shelf { asked, before, ..Shelf::default() }.wanted(MOST);
        assert_eq!(wanted(0, 0), 0);
        assert_eq!((wanted(1, 0), wanted(0, 1)), (FEW, FEW));
        assert_eq!((wanted(9, 30), wanted(30, 9)), (30, 30));
        assert_eq!(wanted(1_000, 0), MOST);
        // Where there is room for one, or none.
        let of_most = |most| Shelf { asked: 9, ..Shelf::default() }.wanted(most);
        assert_eq!((of_most(1), of_most(0)), (1, 0));
    }
}

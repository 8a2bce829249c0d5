//! A first process that is there before its bundle: in namespaces, a cgroup and mounts that most containers have alike.
//!
//! ```text
//! parent (a spare of `crate::launch`)          init
//! clone3 ─────────────────────────────────────→ a network namespace (of one that is to be alone), the spare cgroup,
//!                                               a cgroup namespace, mounts of /proc, /dev, /sys and its cgroups
//!                          ←─────────────────── Created
//! … until there is a bundle …
//! Order                    ───────────────────→ reads the bundle: Unsuited, or goes on as any other (`init`):
//!                                               limits, what is bound in, its root, where the mounts are moved to,
//!                                               masks, user, filter, exec
//!                          ←─────────────────── the end of the channel, or Error
//! ```
//!
//! **What is alike** comes from this program alone: until the order nobody here has seen a bundle, an image or another container. A
//! list of mounts that was made ahead takes the place of the very same in a bundle, with what is hidden in them, where nothing else is
//! mounted there; what differs is made as ever.
//!
//! **What it is not for** ([`Ahead::suits`]): users of its own, namespaces that are others' but for the network, hooks, terminals,
//! questions of a filter; nor for limits that cannot be set, or for which the spare cgroup has no controller. Init says so before it has
//! changed anything but that cgroup, and ends; the parent starts another one.
//!
//! **Who writes.** The parent renames the spare cgroup, init sets its limits; on v2, where a group has one name for ever, init makes it.
//! The parent removes it in any case.
//!
//! **What becomes old.** Init's mounts are those of the machine when it was made, so whoever keeps it does away with it when those
//! change. What a network namespace takes from the machine (sysctls) stays as it was then. A path that was not there to be hidden is
//! looked for again.
//!
//! **If one dies.** The parent: init is killed with it. Init: before `Created` the parent reads the end of the channel, before the order
//! it cannot write that, and there is none; after the order, the end with nothing said means that it became the program, or was killed
//! as that.

use std::convert::Infallible;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{Linux, Mount, Spec};
use serde::{Deserialize, Serialize};

use super::config::parse_known;
use super::init::{Init, join_groups};
use super::namespaces::Namespaces;
use super::rootfs::{Hidden, Plan, Rootfs, RootfsError, Sources, Step, destination};
use super::spawn::{Job, Message, Stdio, framed, receive, tell};
use super::{Config, Failure, failure, kill_and_reap, process};
use crate::cgroup::{Group, Planned};
use crate::sys;

/// Where mounts are put together, in a mount namespace of its own: a folder that every machine has.
const PLACE: &str = "/dev";

/// Longer than it takes on any machine that works.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is to be made ahead.
pub(crate) struct Wish<'a> {
    /// A network namespace.
    pub(crate) network: bool,
    /// What is mounted.
    pub(crate) mounts: Vec<Usual>,
    /// The group that will be the container's.
    pub(crate) group: Option<&'a Group>,
    /// Where its program writes.
    pub(crate) output: [RawFd; 2],
    /// Mounts the root of the bundle in a folder.
    pub(crate) root: &'a dyn Fn(&Path) -> Result<(), RootfsError>,
}

/// Mounts that lie in each other and are made one after the other, and what is hidden in them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Usual {
    /// As a bundle has them.
    pub(crate) entries: Vec<Mount>,
    /// As `linux.maskedPaths` has them, all that are in there.
    pub(crate) masked: Vec<String>,
    /// As `linux.readonlyPaths` has them.
    pub(crate) read_only: Vec<String>,
}

impl Usual {
    /// Whether a bundle has the same, with these mounts from the place `at` in its list on, and no other at or below the first of them
    /// by name: what is hidden is hidden after all mounts.
    pub(super) fn is_at(&self, at: usize, entries: &[Mount], linux: Option<&Linux>) -> bool {
        let top = self.top();
        let others = entries.iter().take(at).chain(entries.iter().skip(at + self.entries.len()));
        let has = |all: Option<&Vec<String>>, own: &[String]| {
            own.iter().all(|path| all.is_some_and(|all| all.contains(path)))
        };
        entries[at..].starts_with(&self.entries)
            && !others.map(destination).any(|other| other.starts_with(&top))
            && has(linux.and_then(|linux| linux.masked_paths().as_ref()), &self.masked)
            && has(linux.and_then(|linux| linux.readonly_paths().as_ref()), &self.read_only)
    }

    /// Where the first of them is.
    fn top(&self) -> PathBuf {
        self.entries.first().map(destination).unwrap_or_default()
    }
}

/// What is there of a container, for the first process itself.
pub(crate) struct Ahead {
    network: bool,
    /// Its cgroup namespace is there, and what shows it.
    pub(super) cgroups: bool,
    pub(super) trees: Vec<Tree>,
}

/// Mounts that lie in each other, detached.
pub(super) struct Tree {
    /// What they were made by.
    pub(super) of: Usual,
    pub(super) mount: OwnedFd,
    /// What of its paths was there to be hidden.
    pub(super) hidden: Hidden,
}

/// Which bundle it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Its folder, absolute.
    pub(crate) bundle: PathBuf,
    /// Its cgroup, which the spare one has become, if there was one.
    pub(crate) cgroup: String,
}

/// A first process that waits for its bundle.
pub(crate) struct Waiting {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    channel: UnixStream,
}

impl Waiting {
    /// Makes one. This process must have one thread.
    pub(crate) fn make(wish: &Wish<'_>) -> Result<Waiting, Failure> {
        let failed = |error: std::io::Error| failure(format!("cannot make a first process: {error}"));
        let (mut channel, mut its) = UnixStream::pair().map_err(failed)?;
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        // SAFETY: by this function's contract there is one thread.
        let (pid, pidfd) = match unsafe { sys::clone_into(namespaces as u64) }.map_err(failed)? {
            sys::Cloned::Child => {
                drop(channel);
                sys::name_process(c"moyai-init");
                sys::die_with_parent();
                let Err(error) = live(wish, &mut its);
                tell(&mut its, &Message::Error(error));
                sys::end(1)
            }
            sys::Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop(its);
        // Whoever waits for this process too is not to wait for ever.
        let limited = channel.set_read_timeout(Some(PATIENCE));
        let created = match limited.and_then(|()| receive(&mut channel)) {
            Ok(Some(Message::Created)) => {
                channel.set_read_timeout(None).map_err(failed)?;
                return Ok(Waiting { pid, pidfd, channel });
            }
            Ok(Some(Message::Error(error))) => error,
            Ok(_) => failure("the first process died before it could say why".to_owned()),
            Err(error) => failed(error),
        };
        kill_and_reap(&pidfd);
        Err(created)
    }

    /// Makes it the bundle's program. Whether it became that: not if it was dead or does not suit, and then it is to be ended.
    pub(crate) fn start(&mut self, order: &Order) -> Result<bool, Failure> {
        let failed = |error: std::io::Error| failure(format!("cannot hear from the first process: {error}"));
        if self.channel.write_all(&framed(order)).is_err() {
            // It was killed while it waited.
            return Ok(false);
        }
        loop {
            match receive(&mut self.channel) {
                Ok(None) => return Ok(true),
                Ok(Some(Message::Unsuited)) => return Ok(false),
                Ok(Some(Message::Error(error))) => return Err(error),
                // Warnings: the daemon's bundles ask for nothing that a node has not looked at before it bid.
                Ok(Some(_)) => {}
                // The same, a moment later: it has not read all that it was told.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Does away with it.
    pub(crate) fn end(self) {
        kill_and_reap(&self.pidfd);
    }
}

impl Ahead {
    /// Makes it, in a process that has its other namespaces.
    fn make(wish: &Wish<'_>) -> Result<Ahead, Failure> {
        let told = |error: RootfsError| failure(error.to_string());
        if wish.network {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| failure(format!("cannot make a network namespace: {error}")))?;
            sys::loopback_up().map_err(|error| failure(format!("cannot bring the loopback device up: {error}")))?;
        }
        let mut spec = Spec::default();
        spec.set_mounts(Some(wish.mounts.iter().flat_map(|usual| usual.entries.clone()).collect())).set_linux(None);
        let sources = Sources::take(&spec, Path::new("/"), false, true).map_err(told)?;
        sources.enter_proc().map_err(told)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).step("make private", "/").map_err(told)?;
        let groups = wish.group.map(Group::dirs).unwrap_or_default();
        if wish.group.is_some() {
            join_groups(groups)?;
            unshare(CloneFlags::CLONE_NEWCGROUP)
                .map_err(|error| failure(format!("cannot make a cgroup namespace: {error}")))?;
        }
        let place = Path::new(PLACE);
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(Some("tmpfs"), place, Some("tmpfs"), flags, None::<&str>).step("mount on", place).map_err(told)?;
        let root = Rootfs::at(place).map_err(told)?;
        let plan = Plan {
            spec: &spec,
            root: place,
            mount_root: None,
            sources: &sources,
            own_cgroups: true,
            groups,
            owns_mounts: true,
            ahead: &[],
        };
        plan.fill(&root).map_err(told)?;
        let read_only = wish.mounts.iter().flat_map(|usual| &usual.read_only).enumerate();
        let masked = wish.mounts.iter().flat_map(|usual| &usual.masked).enumerate();
        let hidden = root.hide(read_only, masked).map_err(told)?;
        // Not in what was hidden last, where this process is by now.
        sources.enter_proc().map_err(told)?;
        let tree = |usual: &Usual| {
            let hidden = hidden.below(&usual.top());
            Ok(Tree { of: usual.clone(), mount: root.tree(&usual.entries)?, hidden })
        };
        let trees = wish.mounts.iter().map(tree).collect::<Result<_, _>>().map_err(told)?;
        // What is there of the machine's may be wanted.
        umount2(place, MntFlags::MNT_DETACH).step("unmount", place).map_err(told)?;
        Ok(Ahead { network: wish.network, cgroups: wish.group.is_some(), trees })
    }

    /// Whether it is what a bundle asks for.
    fn suits(&self, config: &Config, namespaces: &Namespaces) -> bool {
        let spec = &config.spec;
        let made = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let process = spec.process().as_ref();
        namespaces.new & made as u64 == made as u64
            && namespaces.makes(libc::CLONE_NEWNET) == self.network
            && (namespaces.makes(libc::CLONE_NEWCGROUP) || !self.cgroups)
            && namespaces.all & libc::CLONE_NEWUSER as u64 == 0
            && !namespaces.needs_usher()
            && spec.hooks().is_none()
            && !process.is_some_and(|process| process.terminal().unwrap_or(false))
            && !config.filter.as_ref().is_some_and(|filter| filter.asks)
    }
}

/// Reads a bundle, so that what this takes of the program and of memory is there.
fn rehearse() {
    let text = crate::container::example_spec().ok().and_then(|spec| serde_json::to_vec(&spec).ok());
    drop(text.and_then(|text| parse_known(&text, None)));
}

/// Goes through all steps, waits for the bundle in between, and becomes the program; returns only why not.
fn live(wish: &Wish<'_>, channel: &mut UnixStream) -> Result<Infallible, Failure> {
    let told = |error: RootfsError| failure(error.to_string());
    // Nothing of whoever made it: what it waits on ends with that one, and is closed nowhere else.
    sys::close_all_but(&[channel.as_raw_fd(), wish.output[0], wish.output[1]]);
    let ahead = Ahead::make(wish)?;
    rehearse();
    tell(channel, &Message::Created);
    let order: Order = match receive(channel) {
        Ok(Some(order)) => order,
        // It is not needed.
        Ok(None) | Err(_) => sys::end(0),
    };
    let config = Config::load(&order.bundle).map_err(|error| failure(error.to_string()))?;
    let namespaces = Namespaces::of(&config.spec)?;
    let resources = config.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let planned = match wish.group {
        Some(spare) => Planned::of_spare(&order.cgroup, spare, resources),
        None => Some(Planned::new(&order.cgroup, resources)),
    };
    let Some(planned) = planned.filter(|_| ahead.suits(&config, &namespaces)) else {
        tell(channel, &Message::Unsuited);
        sys::end(0);
    };
    let sources = Sources::take(&config.spec, &config.bundle, false, true).map_err(told)?;
    let root = || (wish.root)(&config.bundle);
    let job = Job {
        config: &config,
        id: &order.cgroup,
        cgroup: &planned,
        stdio: Stdio::Output(wish.output),
        console: None,
        gate: None,
        tied: true,
        pivot: true,
        keyring: true,
        preserve: 0,
        questions: None,
        plain_sources: true,
        trampoline: None,
        born: None,
        rooted: None,
        root: Some(&root),
        ahead: Some(&ahead),
    };
    if planned.make().is_err() {
        // One that this process is too large for already, perhaps; or whoever starts another one hears why not.
        tell(channel, &Message::Unsuited);
        sys::end(0);
    }
    if !ahead.cgroups {
        join_groups(planned.group().dirs())?;
    }
    if let Some(process) = config.spec.process() {
        process::raise_limits(process);
    }
    namespaces.join()?;
    let init = Init { job: &job, namespaces: &namespaces, sources, listener: None };
    let error = init.go_on(channel);
    // Here, where nothing is dropped: it has closed what these own.
    tell(channel, &Message::Error(error));
    sys::end(1)
}

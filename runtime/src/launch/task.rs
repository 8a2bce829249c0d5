//! What a fork of the zygote does in a container without adding a process to it: copies, its usage.
//!
//! A copy enters the container's mount namespace, and is then on its root: whatever its links say leads nowhere else. It enters
//! the user namespace too where there is one, and gives up every capability that a copy does not need. It cannot be seen from inside: it stays in the machine's pid namespace.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};

use super::exec::{FromProcess, MAX_FRAME, Reached, Task, ToProcess, head};
use crate::cgroup::Group;
use crate::container::Failure;
use crate::copy;
use crate::oci::failure;
use crate::sys;

/// Between two looks at what a container uses.
const LOOK: Duration = Duration::from_secs(1);

/// What a container uses.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// When this was read, in nanoseconds of the boot clock.
    pub at: u64,
    /// Processor time so far, in nanoseconds.
    pub cpu: u64,
    /// Bytes of memory, without file pages that could be dropped.
    pub memory: u64,
    /// The most it may have; zero is no limit.
    pub memory_limit: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes read from block devices.
    pub read: u64,
    /// Bytes written to them.
    pub written: u64,
    /// Bytes that came over its network, not counting its loopback.
    pub received: u64,
    /// Bytes that it sent.
    pub sent: u64,
    /// Share of the last ten seconds in which some task of it waited for a processor, in hundredths of a percent (PSI); v2 only.
    pub cpu_pressure: Option<u32>,
    /// The same for memory.
    pub memory_pressure: Option<u32>,
}

/// Carries a task out, and tells its end.
pub(super) fn run(task: &Task, reached: &Reached, line: &mut UnixStream) -> Result<(), Failure> {
    match task {
        Task::CopyOut(path, contents) => {
            enter(reached)?;
            let packed = copy::pack(Path::new(path), *contents, Frames { line });
            if let Ok(left_out @ 1..) = packed {
                let told = format!("{left_out} sockets, pipes or devices were left out").into_bytes();
                line.write_all(&FromProcess::ErrorOutput(told).encode()).map_err(broken)?;
            }
            end(line, packed.map(drop).map_err(|error| error.to_string()))
        }
        Task::CopyIn(path, keep_owners) => {
            enter(reached)?;
            let input = Input { line: line.try_clone().map_err(broken)?, rest: Vec::new(), at: 0, ended: false };
            let unpacked = copy::unpack(input, Path::new(path), None, *keep_owners).map(drop);
            end(line, unpacked.map_err(|error| error.to_string()))
        }
        Task::Usage(follow) => {
            follow_usage(reached, *follow, line);
            Ok(())
        }
        // These are done by others: see `exec`, `attach`, and the daemon, which says it with the placement.
        Task::Run(_) | Task::Attach | Task::Freeze(_) => Err(failure("this is not done here".to_owned())),
    }
}

fn broken(error: io::Error) -> Failure {
    failure(format!("the line broke: {error}"))
}

fn end(line: &mut UnixStream, result: Result<(), String>) -> Result<(), Failure> {
    let code = i32::from(result.is_err());
    if let Err(reason) = result {
        line.write_all(&FromProcess::ErrorOutput(reason.into_bytes()).encode()).map_err(broken)?;
    }
    line.write_all(&FromProcess::Exit(code).encode()).map_err(broken)
}

/// From here on this process is on the container's root, as its root user, and may do no more than copy.
fn enter(reached: &Reached) -> Result<(), Failure> {
    // linux/capability.h: to give files away, to write those of others, to set modes of those, and to keep set-group-ID bits.
    const CAP_CHOWN: u32 = 0;
    const CAP_DAC_OVERRIDE: u32 = 1;
    const CAP_FOWNER: u32 = 3;
    const CAP_FSETID: u32 = 4;
    let failed = |error: io::Error| failure(format!("cannot enter the container: {error}"));
    reached.enterable()?;
    let linux = reached.config.spec.linux().as_ref();
    let users = linux.and_then(|linux| linux.uid_mappings().as_ref()).is_some_and(|mappings| !mappings.is_empty());
    let mut kinds = CloneFlags::CLONE_NEWNS;
    if users {
        kinds |= CloneFlags::CLONE_NEWUSER;
    }
    // What it writes to memory there counts as the container's; in one that stands still it would stand still too.
    if !reached.group.is_frozen() {
        reached.group.join().map_err(failed)?;
    }
    sys::enter_namespaces(reached.pidfd.as_fd(), kinds.bits() as u64).map_err(failed)?;
    if users {
        nix::unistd::setgid(0.into())
            .and_then(|()| nix::unistd::setuid(0.into()))
            .map_err(|error| failed(error.into()))?;
    }
    std::env::set_current_dir("/").map_err(failed)?;
    let kept = [CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID].iter().fold(0, |set, bit| set | 1 << bit);
    sys::set_capabilities(kept, kept, 0).map_err(failed)?;
    sys::no_new_privileges().map_err(failed)
}

/// Bytes that go to the user's end as output.
struct Frames<'a> {
    line: &'a UnixStream,
}

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_FRAME)];
        self.line.write_all(&FromProcess::Output(piece.to_vec()).encode())?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that come from the user's end as input.
struct Input {
    line: UnixStream,
    rest: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.rest.len() {
            if self.ended {
                return Ok(0);
            }
            let mut first = [0; 5];
            self.line.read_exact(&mut first)?;
            let (kind, len) = head(first)?;
            let mut content = vec![0; len];
            self.line.read_exact(&mut content)?;
            match ToProcess::decode(kind, &content) {
                Some(ToProcess::Input(bytes)) => (self.rest, self.at) = (bytes, 0),
                Some(ToProcess::InputEnd) => self.ended = true,
                // Ctrl-C at the user's end.
                Some(ToProcess::Signal(_)) => return Err(io::Error::other("it was given up")),
                _ => {}
            }
        }
        let len = buffer.len().min(self.rest.len() - self.at);
        buffer[..len].copy_from_slice(&self.rest[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

fn follow_usage(reached: &Reached, follow: bool, line: &mut UnixStream) {
    loop {
        let mut text = serde_json::to_vec(&usage(&reached.group, reached.pid)).expect("plain data");
        text.push(b'\n');
        if line.write_all(&FromProcess::Output(text).encode()).is_err() {
            return;
        }
        let wait = if follow { LOOK } else { Duration::ZERO };
        // Its end, or the user's: nothing that is said here is of interest.
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds =
            [PollFd::new(reached.pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        if poll(&mut fds, timeout) != Ok(0) || !follow {
            break;
        }
    }
    // Whoever asked may have gone.
    drop(line.write_all(&FromProcess::Exit(0).encode()));
}

/// What a group uses, and its network as its process `pid` sees it. What a machine does not count is zero.
fn usage(group: &Group, pid: i32) -> Usage {
    let number = |controller: &str, file: &str| group.read(controller, file)?.trim().parse::<u64>().ok();
    let field = |controller: &str, file: &str, name: &str| {
        let text = group.read(controller, file)?;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
    };
    let pressure = |controller: &str, file: &str| {
        let text = group.read(controller, file)?;
        let some =
            text.lines().find_map(|line| line.strip_prefix("some avg10=")?.split(' ').next()?.parse::<f64>().ok())?;
        Some((some * 100.0) as u32)
    };
    let (received, sent) = traffic(pid);
    let mut usage = Usage { at: crate::host::boot_time().as_nanos() as u64, received, sent, ..Usage::default() };
    let (inactive, limit);
    if group.is_v2() {
        usage.cpu = field("cpu", "cpu.stat", "usage_usec").unwrap_or(0) * 1000;
        usage.memory = number("memory", "memory.current").unwrap_or(0);
        inactive = field("memory", "memory.stat", "inactive_file");
        limit = number("memory", "memory.max");
        let io = group.read("io", "io.stat").unwrap_or_default();
        let sum =
            |key: &str| io.split_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok()).sum();
        (usage.read, usage.written) = (sum("rbytes="), sum("wbytes="));
        usage.cpu_pressure = pressure("cpu", "cpu.pressure");
        usage.memory_pressure = pressure("memory", "memory.pressure");
    } else {
        usage.cpu = number("cpuacct", "cpuacct.usage").unwrap_or(0);
        usage.memory = number("memory", "memory.usage_in_bytes").unwrap_or(0);
        inactive = field("memory", "memory.stat", "total_inactive_file");
        // PAGE_COUNTER_MAX, rounded to pages, is no limit.
        limit = number("memory", "memory.limit_in_bytes").filter(|limit| *limit < 1 << 60);
        let io = group.read("blkio", "blkio.throttle.io_service_bytes").unwrap_or_default();
        let sum = |kind: &str| io.lines().filter_map(|line| line.split_once(kind)?.1.trim().parse::<u64>().ok()).sum();
        (usage.read, usage.written) = (sum(" Read "), sum(" Write "));
    }
    usage.memory = usage.memory.saturating_sub(inactive.unwrap_or(0));
    usage.memory_limit = limit.unwrap_or(0);
    usage.pids = number("pids", "pids.current").unwrap_or_else(|| group.processes().len() as u64);
    usage
}

/// Bytes received and sent in the network namespace of a process (proc(5), /proc/pid/net/dev).
fn traffic(pid: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let links = text.lines().filter_map(|line| line.split_once(':')).filter(|(name, _)| name.trim() != "lo");
    links.fold((0, 0), |(received, sent), (_, counts)| {
        let counts: Vec<u64> = counts.split_whitespace().filter_map(|count| count.parse().ok()).collect();
        let count = |at: usize| counts.get(at).copied().unwrap_or(0);
        (received + count(0), sent + count(8))
    })
}

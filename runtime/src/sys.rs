//! System calls that nix does not have, each in the safest shape it can be given.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::seccomp::Instruction;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Lets a descriptor survive exec.
pub(crate) fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer and no pointer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop)
}

/// Closes a descriptor at exec; fails when it is not open.
pub(crate) fn close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer and no pointer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into()).map(drop)
}

/// The same as a descriptor, by a number from `first` on.
pub(crate) fn duplicate_from(fd: &impl AsFd, first: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer and no pointer, on a descriptor that is open for the whole call.
    let fd = check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, first) }.into())?;
    // SAFETY: the kernel has just made it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Closes every descriptor from `first` on at exec.
pub(crate) fn close_all_on_exec(first: u32) -> io::Result<()> {
    // SAFETY: close_range takes integers.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Closes every descriptor but standard ones and these.
pub(crate) fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().map(|fd| *fd as u32).collect();
    keep.sort_unstable();
    let mut first = 3;
    for last in keep.iter().map(|fd| fd - 1).chain([u32::MAX]) {
        if first <= last {
            // SAFETY: close_range takes integers; nothing in this process uses what it closes.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = last.saturating_add(2);
    }
}

/// Processes whose parent ends become this one's children, below which they were made.
pub(crate) fn adopt_orphans() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into()).map(drop)
}

/// Reads and writes return instead of waiting.
pub(crate) fn set_nonblocking(file: &impl AsFd) -> io::Result<()> {
    set_status_flag(file, OFlag::O_NONBLOCK, true)
}

/// Sets a status flag of an open file, or takes it back (fcntl(2)).
pub(crate) fn set_status_flag(file: &impl AsFd, flag: OFlag, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(flag, on);
    Ok(fcntl(file, FcntlArg::F_SETFL(flags)).map(drop)?)
}

/// What `ps` shows of this process.
pub(crate) fn name_process(name: &CStr) {
    // SAFETY: the kernel copies at most 16 bytes of a string that ends with NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Sets signals to be ignored; the kernel then reaps children by itself for SIGCHLD.
pub(crate) fn ignore_signals(signals: &[i32]) {
    for signal in signals {
        // SAFETY: SIG_IGN is no function of ours.
        unsafe { libc::signal(*signal, libc::SIG_IGN) };
    }
}

/// Every signal back to what a fresh process has, and none blocked.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is no function of ours; the kernel refuses for SIGKILL and SIGSTOP, which is right.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Waits for a signal, of those that are blocked.
pub(crate) fn wait_for_signal() -> io::Result<i32> {
    let all = nix::sys::signal::SigSet::all();
    loop {
        // SAFETY: the set lives for the whole call, and nothing else is asked for.
        let waited = check(unsafe { libc::sigwaitinfo(all.as_ref(), std::ptr::null_mut()) }.into());
        match waited {
            // It was stopped, or frozen, and goes on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            waited => return waited.map(|signal| signal as i32),
        }
    }
}

/// A child that has ended, and with what, as shells count it; none when all go on and it is not `patient`.
pub(crate) fn reap(patient: bool) -> io::Result<Option<(nix::unistd::Pid, i32)>> {
    let mut status = 0;
    let flags = if patient { 0 } else { libc::WNOHANG };
    // SAFETY: the kernel writes an int, which lives for the whole call.
    let pid = check(unsafe { libc::waitpid(-1, &mut status, flags) }.into())? as i32;
    let code = if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    Ok((pid != 0).then_some((nix::unistd::Pid::from_raw(pid), code)))
}

/// Sends one, also of those that have no name.
pub(crate) fn signal(process: nix::unistd::Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::kill(process.as_raw(), signal) }.into()).map(drop)
}

/// Kills this process when its parent dies.
pub(crate) fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes an integer.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Gives the kernel back what this process has freed. Threads that come and go each leave theirs to the allocator (mallopt(3),
/// M_ARENA_MAX): three imports held 60 MiB that nothing used.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and locks each of the allocator's parts itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Ends this process at once, without what its program does at its end: whoever has something to flush does so first.
pub(crate) fn end(code: i32) -> ! {
    // SAFETY: takes an integer.
    unsafe { libc::_exit(code) }
}

/// Which side of a clone this is.
pub(crate) enum Cloned {
    /// The new process.
    Child,
    /// The old one: the child's number and a descriptor for it.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// A new process in new namespaces (clone3, Linux 5.3), with a pidfd.
///
/// # Safety
/// The calling process must have one thread, so that the child may go on running Rust code.
pub(crate) unsafe fn clone_into(namespaces: u64) -> io::Result<Cloned> {
    // SAFETY: the caller has one thread.
    unsafe { clone3(namespaces, libc::SIGCHLD as u64) }
}

/// The same, as a child of this process's parent, to which it is what this process is.
///
/// # Safety
/// As for [`clone_into`].
pub(crate) unsafe fn clone_sibling(namespaces: u64) -> io::Result<Cloned> {
    // With CLONE_PARENT the exit signal is this process's own.
    // SAFETY: the caller has one thread.
    unsafe { clone3(namespaces | libc::CLONE_PARENT as u64, 0) }
}

unsafe fn clone3(flags: u64, exit_signal: u64) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: a zeroed clone_args asks for nothing.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = exit_signal;
    // SAFETY: args and pidfd outlive the call; without CLONE_VM the child has its own copy of this stack, and by the
    // caller's promise no other thread's lock is copied with it.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &args, std::mem::size_of_val(&args)) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel has stored a fresh descriptor there.
    Ok(Cloned::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

/// A descriptor for the process `pid`.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Enters namespaces: of one kind by its own descriptor, or several kinds of a process by its pidfd (Linux 5.8).
pub(crate) fn enter_namespaces(fd: BorrowedFd<'_>, kinds: u64) -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds as libc::c_int) }.into()).map(drop)
}

/// Kinds of namespaces that a pidfd can be asked for.
#[derive(Copy, Clone)]
pub(crate) enum Namespace {
    Mounts,
    Network,
}

/// A namespace of the process behind a pidfd, which is `pid` (Linux 6.11; through /proc before, which then has an entry to forget).
pub(crate) fn namespace_of(pidfd: BorrowedFd<'_>, pid: i32, kind: Namespace) -> io::Result<OwnedFd> {
    let (request, name) = match kind {
        Namespace::Mounts => (libc::PIDFD_GET_MNT_NAMESPACE, "mnt"),
        Namespace::Network => (libc::PIDFD_GET_NET_NAMESPACE, "net"),
    };
    // SAFETY: takes integers.
    match check(unsafe { libc::ioctl(pidfd.as_raw_fd(), request as _, 0) }.into()) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
        Err(_) => std::fs::File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from),
    }
}

/// Sends a signal to the process behind a pidfd: never to another that got its number.
pub(crate) fn signal_pidfd(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no siginfo is passed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0) })
        .map(drop)
}

/// A session keyring of its own, so that the host's is not inherited. Hosts without keyrings have none to hide.
pub(crate) fn own_keyring() {
    // SAFETY: a null name asks for an anonymous keyring.
    unsafe {
        libc::syscall(libc::SYS_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, std::ptr::null::<u8>())
    };
}

/// Brings `lo` up in this network namespace.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    use std::os::fd::AsRawFd;
    // SAFETY: ifreq is plain data; zero is a valid value for it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives for the whole call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) }.into()).map(drop)
}

const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const AT_RECURSIVE: libc::c_int = 0x8000;

/// A detached copy of the mount that `at` lies on, from `at` on (open_tree(2), Linux 5.2).
pub(crate) fn clone_mount(at: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    let flags = if recursive { flags | AT_RECURSIVE as libc::c_uint } else { flags };
    // SAFETY: the path is an empty string that ends with NUL.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), c"".as_ptr(), flags) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a detached mount on what `to` refers to (move_mount(2), Linux 5.2).
pub(crate) fn attach_mount(mount: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to, none) = (mount.as_raw_fd(), to.as_raw_fd(), c"".as_ptr());
    // SAFETY: both paths are empty strings that end with NUL.
    check(unsafe { libc::syscall(libc::SYS_move_mount, from, none, to, none, flags) }).map(drop)
}

/// The numbers of all mounts that this process can see, sorted; none is ever given again (listmount(2), Linux 6.8).
pub(crate) fn mount_numbers() -> io::Result<Vec<u64>> {
    // As nearly every architecture numbers it; libc has it for few.
    const SYS_LISTMOUNT: libc::c_long = 458;
    /// `struct mnt_id_req`, its first version.
    #[repr(C)]
    struct Request {
        size: u32,
        spare: u32,
        of: u64,
        after: u64,
    }
    const ROOT: u64 = u64::MAX;
    const PIECE: usize = 512;
    let mut numbers: Vec<u64> = Vec::new();
    loop {
        let known = numbers.len();
        let after = numbers.last().copied().unwrap_or(0);
        let request = Request { size: std::mem::size_of::<Request>() as u32, spare: 0, of: ROOT, after };
        numbers.resize(known + PIECE, 0);
        let place = numbers[known..].as_mut_ptr();
        // SAFETY: the request lives for the whole call, and there is place for as many numbers as it is told.
        let count = check(unsafe { libc::syscall(SYS_LISTMOUNT, &request, place, PIECE, 0) })?;
        numbers.truncate(known + count as usize);
        if (count as usize) < PIECE {
            numbers.sort_unstable();
            return Ok(numbers);
        }
    }
}

/// A file system to be, as fsopen(2) has it (Linux 5.2).
pub(crate) fn open_filesystem(kind: &CStr) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    // SAFETY: the name ends with NUL.
    let fd = check(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Gives it an option (fsconfig(2)).
pub(crate) fn set_option(filesystem: BorrowedFd<'_>, key: &CStr, value: &CStr) -> io::Result<()> {
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    let fd = filesystem.as_raw_fd();
    // SAFETY: both strings end with NUL, and live for the whole call.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0) })
        .map(drop)
}

/// The same, an option without a value.
pub(crate) fn set_flag(filesystem: BorrowedFd<'_>, key: &CStr) -> io::Result<()> {
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    let (fd, none) = (filesystem.as_raw_fd(), std::ptr::null::<libc::c_char>());
    // SAFETY: the string ends with NUL, and lives for the whole call.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_FLAG, key.as_ptr(), none, 0) }).map(drop)
}

/// Makes it, and a detached mount of it with these `MOUNT_ATTR_*` (fsmount(2)).
pub(crate) fn mount_filesystem(filesystem: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let (fd, none) = (filesystem.as_raw_fd(), std::ptr::null::<libc::c_char>());
    // SAFETY: this command takes neither key nor value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, none, none, 0) })?;
    // SAFETY: there is no pointer.
    let mount = check(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(mount as RawFd) })
}

/// A socket's path has 108 bytes at most; through its folder's descriptor it is short wherever that is.
fn short_path(folder: &File, socket: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(socket.file_name().unwrap_or_default())
}

/// Listens on a Unix socket that is to be made, however long its path is.
pub(crate) fn bind(socket: &Path) -> io::Result<UnixListener> {
    let folder = File::open(socket.parent().unwrap_or(Path::new(".")))?;
    UnixListener::bind(short_path(&folder, socket))
}

/// Connects to a Unix socket, however long its path is.
pub(crate) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let folder = File::open(socket.parent().unwrap_or(Path::new(".")))?;
    UnixStream::connect(short_path(&folder, socket))
}

/// What is changed of a mount: `MOUNT_ATTR_*` to set and to clear, its propagation (`MS_SHARED` …, or 0), and the user
/// namespace that its owners are shifted by.
#[derive(Copy, Clone, Default)]
pub(crate) struct MountChange<'a> {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) shifted_by: Option<BorrowedFd<'a>>,
}

/// Changes the mount whose root `mount` is, and those below it (mount_setattr(2), Linux 5.12).
pub(crate) fn change_mount(mount: BorrowedFd<'_>, change: &MountChange<'_>, recursive: bool) -> io::Result<()> {
    let idmap = if change.shifted_by.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: change.set | idmap,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: change.shifted_by.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    let (fd, size) = (mount.as_raw_fd(), std::mem::size_of_val(&attributes));
    // SAFETY: the path is an empty string that ends with NUL; the attributes live for the whole call.
    check(unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &attributes, size) }).map(drop)
}

/// The other end of the terminal whose master this is, by descriptor: no path of it can be swapped (TIOCGPTPEER, Linux 4.13).
pub(crate) fn terminal_peer(master: &impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags as an integer.
    let fd = check(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Lets the other end of a terminal be opened (unlockpt(3)).
pub(crate) fn unlock_terminal(master: &impl AsFd) -> io::Result<()> {
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int, which lives for the whole call.
    check(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &unlocked) }.into()).map(drop)
}

/// Rows and columns of a terminal.
pub(crate) fn set_terminal_size(terminal: &impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives for the whole call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) }.into()).map(drop)
}

/// Rows and columns of a terminal; an error when it is none.
pub(crate) fn terminal_size(terminal: &impl AsFd) -> io::Result<(u16, u16)> {
    // SAFETY: winsize is plain data; zero is a valid value for it.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize, which lives for the whole call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &mut size) }.into())?;
    Ok((size.ws_row, size.ws_col))
}

/// Has a socket be ready to read from when there are so many bytes.
pub(crate) fn set_low_water_mark(socket: RawFd, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let (value, len) = ((&raw const bytes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the kernel reads an int, which lives for the whole call.
    check(unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len) }.into()).map(drop)
}

/// Adds `len` bytes of a file to `all`, without clearing the memory that they come into; when it fails there may be some of them.
pub(crate) fn append_at(file: &std::fs::File, all: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
    let before = all.len();
    all.reserve(len);
    while all.len() < before + len {
        let done = all.len() - before;
        let room = &mut all.spare_capacity_mut()[..len - done];
        let at = libc::off_t::try_from(offset + done as u64).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most as many bytes as there is room for, which lives for the whole call.
        let count = unsafe { libc::pread(file.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), at) };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            // SAFETY: the kernel has written so many of them.
            Ok(count) => unsafe { all.set_len(all.len() + count) },
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Puts a file on a loop device, which frees itself when nobody has it open or mounted: the device, open, and its path.
pub(crate) fn loop_device(file: &std::fs::File) -> io::Result<(std::fs::File, std::path::PathBuf)> {
    // linux/loop.h.
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
    const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    const LO_FLAGS_DIRECT_IO: u32 = 16;
    /// Others look for a free one too.
    const TRIES: usize = 64;
    #[repr(C)]
    struct LoopConfig {
        fd: u32,
        block_size: u32,
        places: [u64; 5],
        numbers: [u32; 3],
        flags: u32,
        names: [u8; 160],
        rest: [u64; 2 + 8],
    }
    let open = |path: &std::path::Path| std::fs::File::options().read(true).write(true).open(path);
    let control = open("/dev/loop-control".as_ref())?;
    let mut flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
    for _ in 0..TRIES {
        // SAFETY: it takes nothing, and returns a number.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) }.into())?;
        let path = std::path::PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path)?;
        let config = LoopConfig {
            fd: file.as_raw_fd() as u32,
            block_size: 0,
            places: [0; 5],
            numbers: [0; 3],
            flags,
            names: [0; 160],
            rest: [0; 10],
        };
        // SAFETY: it reads a loop_config, which lives for the whole call.
        match check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &config) }.into()) {
            Ok(_) => return Ok((device, path)),
            // Another has it by now.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            // A file system that cannot be read and written past its cache.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && flags & LO_FLAGS_DIRECT_IO != 0 => {
                flags = LO_FLAGS_AUTOCLEAR;
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("others take every loop device that is free"))
}

/// A new terminal of the machine: its master, and the end for a program.
pub(crate) fn open_terminal() -> io::Result<(std::fs::File, OwnedFd)> {
    let terminal = nix::pty::openpty(None, None)?;
    for end in [&terminal.master, &terminal.slave] {
        nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    Ok((terminal.master.into(), terminal.slave))
}

/// Makes it the terminal that controls this session.
pub(crate) fn control_terminal(terminal: &impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Has a command begin a session that its standard input, a terminal, controls.
pub(crate) fn on_own_terminal(command: &mut std::process::Command) {
    let begin = || {
        // SAFETY: it takes nothing.
        check(i64::from(unsafe { libc::setsid() }))?;
        // SAFETY: TIOCSCTTY takes an integer.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into()).map(drop)
    };
    // SAFETY: what is called between fork and exec is two system calls, which are async-signal-safe.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, begin) };
}

/// Makes an open descriptor one of the first three.
pub(crate) fn pass(fd: RawFd, to: RawFd) -> io::Result<()> {
    if fd == to {
        return keep_on_exec(fd);
    }
    // SAFETY: dup2 takes integers; whoever calls knows that `to` is not in use for anything else.
    check(unsafe { libc::dup2(fd, to) }.into()).map(drop)
}

/// A limit of this process and what it becomes.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the limit lives for the whole call; no old one is asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, &limit, std::ptr::null::<u8>()) }).map(drop)
}

/// The soft and the hard limit of this process.
pub(crate) fn limits(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: no new limit is given; the old one is written to a structure that lives for the whole call.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, std::ptr::null::<u8>(), &mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Whether this process may raise hard limits.
pub(crate) fn may_raise_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let mut sets = [CapabilitySets::default(), CapabilitySets::default()];
    // SAFETY: version 3 reads one header and writes two blocks of sets, all of which live for the whole call.
    let got = check(unsafe { libc::syscall(libc::SYS_capget, &OWN_CAPABILITIES, sets.as_mut_ptr()) });
    got.is_ok() && sets[0].effective & 1 << CAP_SYS_RESOURCE != 0
}

/// The execution domain of this process (personality(2)).
pub(crate) fn set_personality(domain: u64) -> io::Result<()> {
    // SAFETY: takes an integer.
    check(unsafe { libc::personality(domain) }.into()).map(drop)
}

/// Its class and level for block devices (ioprio_set(2)).
pub(crate) fn set_io_priority(class: i32, level: i32) -> io::Result<()> {
    // SAFETY: takes integers; 1 is IOPRIO_WHO_PROCESS, 0 this one, and the class begins at bit 13.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, class << 13 | level) }).map(drop)
}

/// Processors by number, as the kernel takes them.
pub(crate) struct Processors([u64; Processors::MAX / 64]);

impl Processors {
    /// As many as Linux can be built for (CONFIG_NR_CPUS).
    pub(crate) const MAX: usize = 8192;

    /// One more, whose number is below [`Processors::MAX`].
    pub(crate) fn insert(&mut self, processor: usize) {
        self.0[processor / 64] |= 1 << (processor % 64);
    }
}

impl Default for Processors {
    fn default() -> Processors {
        Processors([0; Processors::MAX / 64])
    }
}

/// Has this process run on these processors only (sched_setaffinity(2)).
pub(crate) fn run_on(processors: &Processors) -> io::Result<()> {
    let set = &processors.0;
    // SAFETY: the kernel reads as many bytes as it is told, which the array has. Where its own set is shorter, the rest means nothing.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(set), set.as_ptr().cast()) };
    check(result.into()).map(drop)
}

/// How it is scheduled (sched_setattr(2)).
#[repr(C)]
#[derive(Clone)]
pub(crate) struct Scheduling {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

impl Scheduling {
    /// What a process begins with.
    pub(crate) fn unset() -> Scheduling {
        let size = std::mem::size_of::<Scheduling>() as u32;
        Scheduling { size, policy: 0, flags: 0, nice: 0, priority: 0, runtime: 0, deadline: 0, period: 0 }
    }
}

/// Sets how this process is scheduled.
pub(crate) fn set_scheduling(scheduling: &Scheduling) -> io::Result<()> {
    // SAFETY: the structure is laid out as sched_attr in its first version, says its size, and lives for the whole call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, scheduling, 0) }).map(drop)
}

/// Whether other processes of this user may look into this one (PR_SET_DUMPABLE): not while it is in a container and still
/// has the host's program, which they could reach through it (CVE-2016-9962, CVE-2019-5736).
pub(crate) fn hide_from_others() {
    // SAFETY: takes integers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Raises a capability in the ambient set, so that exec keeps it for a user that is not root.
pub(crate) fn raise_ambient(capability: u32) -> io::Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, libc::c_ulong::from(capability), 0, 0) }.into()).map(drop)
}

/// The NIS domain name of this uts namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: the kernel reads `len` bytes of the string.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}

/// Takes a capability out of what this process, and anything it becomes, could ever have.
pub(crate) fn drop_bounding(capability: u32) {
    // SAFETY: takes integers; fails for capabilities this kernel does not know, which nobody can have then.
    unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
}

/// What this process, and anything it becomes, could have; everything, where that cannot be read.
pub(crate) fn bounding_set() -> u64 {
    let read = |capability: u32| {
        // SAFETY: takes integers; fails for what this kernel does not know.
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(capability), 0, 0, 0) }
    };
    if read(0) < 0 {
        return u64::MAX;
    }
    // Those that it knows have the lowest numbers.
    let known = (0..64).map(|capability| (capability, read(capability))).take_while(|(_, has)| *has >= 0);
    known.fold(0, |mask, (capability, has)| mask | (u64::from(has == 1) << capability))
}

/// Keeps permitted capabilities over a change from root to another user.
pub(crate) fn keep_capabilities() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into()).map(drop)
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Of this thread, version 3.
const OWN_CAPABILITIES: CapabilityHeader = CapabilityHeader { version: 0x2008_0522, pid: 0 };

/// `struct __user_cap_data_struct`: 32 capabilities of each set.
#[repr(C)]
#[derive(Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets the three capability sets of this thread (capset(2), version 3).
pub(crate) fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let half = |shift: u32| CapabilitySets {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads one header and two blocks of sets, all of which live for the whole call.
    check(unsafe { libc::syscall(libc::SYS_capset, &OWN_CAPABILITIES, data.as_ptr()) }).map(drop)
}

/// From here on, exec gives no more rights than this process has.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Installs a system call filter for this process and what it becomes, with `SECCOMP_FILTER_FLAG_*`; with
/// SECCOMP_FILTER_FLAG_NEW_LISTENER among them the result is the descriptor on which its questions arrive.
pub(crate) fn install_filter(program: &[Instruction], flags: u64) -> io::Result<Option<OwnedFd>> {
    #[repr(C)]
    struct Program {
        len: libc::c_ushort,
        filter: *const Instruction,
    }
    let len = libc::c_ushort::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = Program { len, filter: program.as_ptr() };
    const SET_MODE_FILTER: libc::c_uint = 1;
    // SAFETY: `filter` points to `len` instructions laid out as sock_filter; the kernel copies them.
    let result = check(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &program) })?;
    let listens = flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0;
    // SAFETY: with that flag the kernel has just made this descriptor for us.
    Ok(listens.then(|| unsafe { OwnedFd::from_raw_fd(result as RawFd) }))
}

/// As exec takes them: an array that ends with null.
fn pointers(list: &[CString]) -> Vec<*const libc::c_char> {
    list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}

/// An empty file in memory that can be executed, where programs may be in memory (memfd_create(2), "MFD_EXEC", Linux 6.3).
pub(crate) fn program_in_memory(name: &CStr) -> io::Result<OwnedFd> {
    let make = |flags| memfd_create(name, MFdFlags::MFD_CLOEXEC | flags);
    Ok(match make(MFdFlags::from_bits_retain(libc::MFD_EXEC)) {
        // Older ones make none that cannot.
        Err(nix::errno::Errno::EINVAL) => make(MFdFlags::empty()),
        made => made,
    }?)
}

/// Becomes the program behind a descriptor; returns only why it could not.
pub(crate) fn exec_fd(program: BorrowedFd<'_>, args: &[CString], env: &[CString]) -> io::Error {
    let (args, env, fd) = (pointers(args), pointers(env), program.as_raw_fd());
    // SAFETY: the path is an empty string; both arrays end with null and point to strings that live until exec has copied
    // them.
    unsafe { libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), args.as_ptr(), env.as_ptr(), libc::AT_EMPTY_PATH) };
    io::Error::last_os_error()
}

/// Becomes another program; returns only why it could not.
pub(crate) fn exec(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null and point to strings that live until exec has copied them.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

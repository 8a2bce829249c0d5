//! System calls that nix does not have, each in the safest shape it can be given.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::seccomp::Instruction;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Lets a descriptor survive exec.
pub(super) fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer and no pointer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop)
}

/// Closes a descriptor at exec; fails when it is not open.
pub(super) fn close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer and no pointer.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into()).map(drop)
}

/// Closes every descriptor from `first` on at exec.
pub(super) fn close_all_on_exec(first: u32) -> io::Result<()> {
    // SAFETY: close_range takes integers.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// What `ps` shows of this process.
pub(super) fn name_process(name: &CStr) {
    // SAFETY: the kernel copies at most 16 bytes of a string that ends with NUL.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Sets signals to be ignored; the kernel then reaps children by itself for SIGCHLD.
pub(super) fn ignore_signals(signals: &[i32]) {
    for signal in signals {
        // SAFETY: SIG_IGN is no function of ours.
        unsafe { libc::signal(*signal, libc::SIG_IGN) };
    }
}

/// Every signal back to what a fresh process has, and none blocked.
pub(super) fn reset_signals() {
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

/// Kills this process when its parent dies.
pub(super) fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes an integer.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Which side of a clone this is.
pub(super) enum Cloned {
    /// The new process.
    Child,
    /// The old one: the child's number and a descriptor for it.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// A new process in new namespaces (clone3, Linux 5.3), with a pidfd.
///
/// # Safety
/// The calling process must have one thread, so that the child may go on running Rust code.
pub(super) unsafe fn clone_into(namespaces: u64) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: a zeroed clone_args asks for nothing.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: args and pidfd outlive the call; without CLONE_VM the child has its own copy of this stack.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &args, std::mem::size_of_val(&args)) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel has stored a fresh descriptor there.
    Ok(Cloned::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
}

/// Sends a signal to the process behind a pidfd: never to another that got its number.
pub(super) fn signal_pidfd(pidfd: RawFd, signal: i32) -> io::Result<()> {
    // SAFETY: no siginfo is passed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, std::ptr::null::<u8>(), 0) }).map(drop)
}

/// A session keyring of its own, so that the host's is not inherited. Hosts without keyrings have none to hide.
pub(super) fn own_keyring() {
    // SAFETY: a null name asks for an anonymous keyring.
    unsafe {
        libc::syscall(libc::SYS_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, std::ptr::null::<u8>())
    };
}

/// Brings `lo` up in this network namespace.
pub(super) fn loopback_up() -> io::Result<()> {
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

/// Takes a capability out of what this process, and anything it becomes, could ever have.
pub(super) fn drop_bounding(capability: u32) {
    // SAFETY: takes integers; fails for capabilities this kernel does not know, which nobody can have then.
    unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
}

/// Keeps permitted capabilities over a change from root to another user.
pub(super) fn keep_capabilities() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Sets the three capability sets of this thread (capset(2), version 3).
pub(super) fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads one header and two data blocks, all of which live for the whole call.
    check(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) }).map(drop)
}

/// From here on, exec gives no more rights than this process has.
pub(super) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: takes integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Installs a system call filter for this process and what it becomes.
pub(super) fn install_filter(program: &[Instruction]) -> io::Result<()> {
    #[repr(C)]
    struct Program {
        len: libc::c_ushort,
        filter: *const Instruction,
    }
    let program = Program { len: program.len() as libc::c_ushort, filter: program.as_ptr() };
    // SAFETY: `filter` points to `len` instructions laid out as sock_filter; the kernel copies them.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, 1 /* SECCOMP_SET_MODE_FILTER */, 0, &program)
    })
    .map(drop)
}

/// Becomes another program; returns only why it could not.
pub(super) fn exec(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers =
        |list: &[CString]| list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null and point to strings that live until exec has copied them.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

//! Which system calls a container may make: what Docker's default profile allows to a process with Docker's default
//! capabilities, as of Docker 28.
//!
//! Not in the list, and why: what changes mounts, namespaces or the kernel itself (mount, unshare, setns, pivot_root,
//! bpf, perf_event_open, module and kexec calls, all of which need CAP_SYS_ADMIN or more, and have been the way to many
//! an escape, such as CVE-2022-0185); keyrings, which are not namespaced; userfaultfd and io_uring, which widen
//! kernel races; memory policy, which is the host's.

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
    LinuxSyscallBuilder,
};

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET; the low byte is the exit signal, so clone cannot
/// make a time namespace.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

/// Linux, Linux with 32-bit addresses, the same without address randomisation, and the question what it is.
const PERSONALITIES: [u64; 5] = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Calls that are allowed whatever their arguments; those of another architecture have no number here.
pub(super) const ALLOWED: &str = "\
    accept accept4 adjtimex bind brk capget capset chdir chroot clock_adjtime clock_getres clock_gettime \
    clock_nanosleep close close_range connect copy_file_range dup dup3 epoll_create1 epoll_ctl epoll_pwait \
    epoll_pwait2 eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fanotify_mark \
    fchdir fchmod fchmodat fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr \
    fstat fstatfs fsync ftruncate futex futex_waitv get_robust_list getcpu getcwd getdents64 getegid geteuid \
    getgid getgroups getitimer getpeername getpgid getpid getppid getpriority getrandom getresgid getresuid \
    getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init1 \
    inotify_rm_watch io_cancel io_destroy io_getevents io_setup io_submit ioctl ioprio_get ioprio_set kill \
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lgetxattr linkat listen listxattr llistxattr \
    lremovexattr lseek lsetxattr madvise membarrier memfd_create memfd_secret mincore mkdirat mknodat mlock \
    mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap \
    mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat \
    openat openat2 pidfd_open pidfd_send_signal pipe2 pkey_alloc pkey_free pkey_mprotect ppoll prctl pread64 \
    preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev \
    pwritev2 read readahead readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr renameat2 \
    restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend \
    rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity \
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr \
    sched_setparam sched_setscheduler sched_yield seccomp semctl semget semop semtimedop sendfile sendmmsg \
    sendmsg sendto set_robust_list set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid \
    setpriority setregid setresgid setresuid setreuid setsid setsockopt setuid setxattr shmat shmctl shmdt shmget \
    shutdown sigaltstack signalfd4 socketpair splice statfs statx symlinkat sync syncfs sysinfo tee tgkill \
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime \
    timerfd_settime times tkill truncate umask uname unlinkat utimensat vmsplice wait4 waitid write writev access \
    alarm arch_prctl chmod chown creat dup2 epoll_create epoll_ctl_old epoll_wait epoll_wait_old eventfd fork \
    futimesat get_thread_area getdents getpgrp getrlimit inotify_init lchown link lstat mkdir mknod modify_ldt \
    open pause pipe poll readlink rename renameat rmdir select set_thread_area setrlimit signalfd stat symlink \
    sync_file_range time unlink utime utimes vfork cachestat fchmodat2 map_shadow_stack futex_wake futex_wait \
    futex_requeue io_pgetevents";

/// The profile as a bundle has it.
pub fn default_profile() -> LinuxSeccomp {
    use LinuxSeccompOperator::{ScmpCmpEq, ScmpCmpMaskedEq};
    let allow = LinuxSeccompAction::ScmpActAllow;
    let mut calls = vec![call(ALLOWED, allow, None, Vec::new())];
    calls.push(call("clone", allow, None, vec![arg(0, ScmpCmpMaskedEq, NEW_NAMESPACES, 0)]));
    // Its flags are behind a pointer, where a filter cannot look; ENOSYS makes libc fall back to clone.
    let absent = Some(libc::ENOSYS as u32);
    calls.push(call("clone3", LinuxSeccompAction::ScmpActErrno, absent, Vec::new()));
    // AF_VSOCK is not namespaced: it reaches the hypervisor's host. A family below 64 differs from it in one of six bits;
    // "not equal" would compare 64 bits where the kernel takes 32, and let a high bit hide it.
    let vsock = libc::AF_VSOCK as u64;
    for bit in (0..6).map(|bit| 1 << bit) {
        calls.push(call("socket", allow, None, vec![arg(0, ScmpCmpMaskedEq, 0xffff_ffc0 | bit, !vsock & bit)]));
    }
    for value in PERSONALITIES {
        calls.push(call("personality", allow, None, vec![arg(0, ScmpCmpEq, value, 0)]));
    }
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno);
    profile.set_default_errno_ret(Some(libc::EPERM as u32));
    profile.set_syscalls(Some(calls));
    profile
}

/// What the strict sandbox refuses of [`ALLOWED`]: what looks into or steers other processes, makes devices or other roots,
/// sets clocks and priorities, and what kernels have had their worst bugs in.
const NOT_STRICT: &str = "\
    ptrace process_vm_readv process_vm_writev process_mrelease pidfd_send_signal kcmp name_to_handle_at fanotify_mark \
    chroot mknod mknodat adjtimex clock_adjtime sched_setattr sched_setscheduler sched_setparam ioprio_set mlockall \
    memfd_secret modify_ldt remap_file_pages vmsplice io_setup io_submit io_getevents io_cancel io_destroy io_pgetevents \
    pkey_alloc pkey_free pkey_mprotect msgget msgsnd msgrcv msgctl semget semop semctl semtimedop shmget shmat shmctl shmdt \
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr";

/// For hostile code: a short list of calls, and every other that this architecture has is put to whoever listens at
/// `listener`, who writes it down and refuses it.
pub fn strict_profile(listener: &str) -> LinuxSeccomp {
    use LinuxSeccompOperator::{ScmpCmpEq, ScmpCmpMaskedEq};
    let (allow, ask) = (LinuxSeccompAction::ScmpActAllow, LinuxSeccompAction::ScmpActNotify);
    let allowed: Vec<&str> =
        ALLOWED.split_whitespace().filter(|name| !NOT_STRICT.split_whitespace().any(|other| other == *name)).collect();
    let mut calls = vec![call(&allowed.join(" "), allow, None, Vec::new())];
    calls.push(call("clone", allow, None, vec![arg(0, ScmpCmpMaskedEq, NEW_NAMESPACES, 0)]));
    calls.push(call("clone3", LinuxSeccompAction::ScmpActErrno, Some(libc::ENOSYS as u32), Vec::new()));
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        calls.push(call("socket", allow, None, vec![arg(0, ScmpCmpMaskedEq, 0xffff_ffff, family as u64)]));
    }
    calls.push(call("personality", allow, None, vec![arg(0, ScmpCmpEq, 0xffff_ffff, 0)]));
    let rest: Vec<String> =
        super::calls::names().filter(|name| *name != "clone3" && !allowed.contains(name)).map(str::to_owned).collect();
    calls.push(call(&rest.join(" "), ask, None, Vec::new()));
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno);
    profile.set_default_errno_ret(Some(libc::EPERM as u32));
    profile.set_listener_path(Some(listener.into()));
    profile.set_syscalls(Some(calls));
    profile
}

fn call(names: &str, action: LinuxSeccompAction, errno: Option<u32>, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let mut call =
        LinuxSyscallBuilder::default().names(names.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    call = call.action(action);
    if let Some(errno) = errno {
        call = call.errno_ret(errno);
    }
    if !args.is_empty() {
        call = call.args(args);
    }
    call.build().expect("every field has a default")
}

fn arg(index: usize, op: LinuxSeccompOperator, value: u64, value_two: u64) -> LinuxSeccompArg {
    let arg = LinuxSeccompArgBuilder::default().index(index).op(op).value(value).value_two(value_two);
    arg.build().expect("every field has a default")
}

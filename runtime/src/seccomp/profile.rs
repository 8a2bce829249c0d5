//! Which system calls a container may make: what Docker's default profile allows to a process with Docker's default
//! capabilities, as of Docker 28.
//!
//! Not in the list, and why: what changes mounts, namespaces or the kernel itself (mount, unshare, setns, pivot_root,
//! bpf, perf_event_open, module and kexec calls, all of which need CAP_SYS_ADMIN or more, and have been the way to many
//! an escape, such as CVE-2022-0185); keyrings, which are not namespaced; userfaultfd and io_uring, which widen
//! kernel races; memory policy, which is the host's.

use std::ffi::c_long;

macro_rules! calls {
    ($($name:ident)*) => { [$(libc::$name),*] };
}

/// A test of one argument.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Arg {
    /// Which, from 0.
    pub index: u8,
    /// Of its low half.
    pub test: Test,
}

/// What is compared.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// It is this.
    Equals(u32),
    /// It is not this.
    Differs(u32),
    /// It has none of these bits.
    NoneOf(u32),
}

/// One line of a conditional call's rules; the first that applies decides.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Allowed if so.
    AllowIf(Arg),
    /// Not allowed, with this error.
    Deny(i32),
}

const fn allow_if(index: u8, test: Test) -> Condition {
    Condition::AllowIf(Arg { index, test })
}

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET; the low byte is the exit signal, so clone cannot
/// make a time namespace.
const NEW_NAMESPACES: u32 = 0x7e02_0000;

/// Calls whose arguments decide.
pub const CONDITIONAL: &[(c_long, &[Condition])] = &[
    (libc::SYS_clone, &[allow_if(0, Test::NoneOf(NEW_NAMESPACES))]),
    // Its flags are behind a pointer, where a filter cannot look; ENOSYS makes libc fall back to clone.
    (libc::SYS_clone3, &[Condition::Deny(libc::ENOSYS)]),
    // AF_VSOCK is not namespaced: it reaches the hypervisor's host.
    (libc::SYS_socket, &[allow_if(0, Test::Differs(libc::AF_VSOCK as u32))]),
    // Linux, Linux with 32-bit addresses, the same without address randomisation, and the question what it is.
    (
        libc::SYS_personality,
        &[
            allow_if(0, Test::Equals(0)),
            allow_if(0, Test::Equals(0x0008)),
            allow_if(0, Test::Equals(0x2_0000)),
            allow_if(0, Test::Equals(0x2_0008)),
            allow_if(0, Test::Equals(0xffff_ffff)),
        ],
    ),
];

/// The newest call that this list has judged (mseal); what is above gets ENOSYS.
pub const NEWEST: c_long = 462;

/// Calls that every architecture has.
pub const ALLOWED: &[c_long] = &calls![
    SYS_accept SYS_accept4 SYS_adjtimex SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_chroot
    SYS_clock_adjtime SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_close SYS_close_range
    SYS_connect SYS_copy_file_range SYS_dup SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait
    SYS_epoll_pwait2 SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_faccessat
    SYS_faccessat2 SYS_fadvise64 SYS_fallocate SYS_fanotify_mark SYS_fchdir SYS_fchmod SYS_fchmodat
    SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr SYS_flock SYS_fremovexattr
    SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex SYS_futex_waitv
    SYS_get_robust_list SYS_getcpu SYS_getcwd SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid
    SYS_getgroups SYS_getitimer SYS_getpeername SYS_getpgid SYS_getpid SYS_getppid SYS_getpriority
    SYS_getrandom SYS_getresgid SYS_getresuid SYS_getrusage SYS_getsid SYS_getsockname SYS_getsockopt
    SYS_gettid SYS_gettimeofday SYS_getuid SYS_getxattr SYS_inotify_add_watch SYS_inotify_init1
    SYS_inotify_rm_watch SYS_io_cancel SYS_io_destroy SYS_io_getevents SYS_io_setup SYS_io_submit SYS_ioctl
    SYS_ioprio_get SYS_ioprio_set SYS_kill SYS_landlock_add_rule SYS_landlock_create_ruleset
    SYS_landlock_restrict_self SYS_lgetxattr SYS_linkat SYS_listen SYS_listxattr SYS_llistxattr
    SYS_lremovexattr SYS_lseek SYS_lsetxattr SYS_madvise SYS_membarrier SYS_memfd_create SYS_memfd_secret
    SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap SYS_mprotect
    SYS_mq_getsetattr SYS_mq_notify SYS_mq_open SYS_mq_timedreceive SYS_mq_timedsend SYS_mq_unlink SYS_mremap
    SYS_mseal SYS_msgctl SYS_msgget SYS_msgrcv SYS_msgsnd SYS_msync SYS_munlock SYS_munlockall SYS_munmap
    SYS_name_to_handle_at SYS_nanosleep SYS_newfstatat SYS_openat SYS_openat2 SYS_pidfd_open
    SYS_pidfd_send_signal SYS_pipe2 SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_ppoll SYS_prctl
    SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64 SYS_process_mrelease SYS_process_vm_readv
    SYS_process_vm_writev SYS_pselect6 SYS_ptrace SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read
    SYS_readahead SYS_readlinkat SYS_readv SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_remap_file_pages
    SYS_removexattr SYS_renameat2 SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigpending
    SYS_rt_sigprocmask SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait
    SYS_rt_tgsigqueueinfo SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_getaffinity
    SYS_sched_getattr SYS_sched_getparam SYS_sched_getscheduler SYS_sched_rr_get_interval SYS_sched_setaffinity
    SYS_sched_setattr SYS_sched_setparam SYS_sched_setscheduler SYS_sched_yield SYS_seccomp SYS_semctl
    SYS_semget SYS_semop SYS_semtimedop SYS_sendfile SYS_sendmmsg SYS_sendmsg SYS_sendto SYS_set_robust_list
    SYS_set_tid_address SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setpgid
    SYS_setpriority SYS_setregid SYS_setresgid SYS_setresuid SYS_setreuid SYS_setsid SYS_setsockopt
    SYS_setuid SYS_setxattr SYS_shmat SYS_shmctl SYS_shmdt SYS_shmget SYS_shutdown SYS_sigaltstack
    SYS_signalfd4 SYS_socketpair SYS_splice SYS_statfs SYS_statx SYS_symlinkat SYS_sync SYS_syncfs
    SYS_sysinfo SYS_tee SYS_tgkill SYS_timer_create SYS_timer_delete SYS_timer_getoverrun SYS_timer_gettime
    SYS_timer_settime SYS_timerfd_create SYS_timerfd_gettime SYS_timerfd_settime SYS_times SYS_tkill
    SYS_truncate SYS_umask SYS_uname SYS_unlinkat SYS_utimensat SYS_vmsplice SYS_wait4 SYS_waitid SYS_write
    SYS_writev
];

/// Calls that only x86-64 still has, and io_pgetevents, whose number differs.
#[cfg(target_arch = "x86_64")]
pub const ALLOWED_HERE: &[c_long] = &calls![
    SYS_access SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create
    SYS_epoll_ctl_old SYS_epoll_wait SYS_epoll_wait_old SYS_eventfd SYS_fork SYS_futimesat
    SYS_get_thread_area SYS_getdents SYS_getpgrp SYS_getrlimit SYS_inotify_init SYS_lchown SYS_link
    SYS_lstat SYS_mkdir SYS_mknod SYS_modify_ldt SYS_open SYS_pause SYS_pipe SYS_poll SYS_readlink
    SYS_rename SYS_renameat SYS_rmdir SYS_select SYS_set_thread_area SYS_setrlimit SYS_signalfd SYS_stat
    SYS_symlink SYS_sync_file_range SYS_time SYS_unlink SYS_utime SYS_utimes SYS_vfork
];

/// io_pgetevents.
#[cfg(target_arch = "aarch64")]
pub const ALLOWED_HERE: &[c_long] = &[292];

/// Calls newer than libc's list, with one number everywhere: cachestat, fchmodat2, map_shadow_stack, futex_wake,
/// futex_wait, futex_requeue.
pub const RECENT: &[c_long] = &[451, 452, 453, 454, 455, 456];

//! A program of a few instructions between this one and the container's: what is found by /proc/self/exe inside is never this
//! program, so nobody can write to it (CVE-2019-5736), and it need not begin a second time for that as with [`super::seal()`].
//!
//! ```text
//! parent         memfd_create
//! init           writes the image: an ELF program, and behind it a header, the path and what to say when that cannot be executed
//!                rights, user, filter
//!                execveat(image)
//! trampoline     closes the channel on exec, execve(path); or says why not on the channel, and ends
//! ```
//!
//! **For whom** ([`Trampoline::suffices`]). Nobody else is in the container while init is still this program: a new PID namespace
//! and no hooks inside; whoever sees it from a namespace around that has fewer rights than it, and from where it has no more than
//! its program on it is not dumpable. Its process 1 becomes the program, the kernel takes no label for the next exec, and its filter
//! lets the trampoline's own calls pass.
//!
//! **Rights.** The kernel works them out twice (capabilities(7), "Transformation of capabilities during execve()"). For root that is
//! as once, but that the program is looked for with all that it may have; any other user keeps ambient ones alone, so one that has
//! others, for a program with file capabilities or of somebody else's, has no trampoline.
//!
//! **If the program is the trampoline** (`/proc/self/exe`, also by `#!`): the channel is closed by then, at which it ends.
//!
//! **Bounds.** A file in memory of a page or two for each start, gone when the program begins.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Spec};

use super::init::is_labelled;
use super::process::raisable;
use super::reaper;
use crate::seccomp;
use crate::sys;

/// What it calls, as filters name it; the first is how it begins.
const CALLS: [&str; 5] = ["execveat", "fcntl", "execve", "write", "exit_group"];
/// Where it lies in memory: where linkers put programs.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// The file that it is in.
#[derive(Debug)]
pub(crate) struct Trampoline(File);

impl Trampoline {
    /// `None` where programs cannot be in memory (vm.memfd_noexec), or none is written for the machine.
    pub(super) fn new() -> Option<Trampoline> {
        code()?;
        sys::program_in_memory(c"moyai-start").ok().map(|fd| Trampoline(File::from(fd)))
    }

    /// Whether it keeps this program out of a container's reach. A spec without a profile has none, or one that was found
    /// to let it pass before its filter was kept ([`crate::seccomp::Kept`], [`super::Config::spec`]).
    pub(super) fn suffices(spec: &Spec) -> bool {
        let hooks = spec.hooks().as_ref();
        let runs_inside = hooks.is_some_and(|hooks| {
            [hooks.create_container(), hooks.start_container()].into_iter().flatten().any(|list| !list.is_empty())
        });
        let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let is_new = |one: &LinuxNamespace| one.typ() == LinuxNamespaceType::Pid && one.path().is_none();
        let keeps_rights = spec.process().as_ref().is_none_or(|process| {
            let sets = process.capabilities().iter().flat_map(|sets| [sets.permitted(), sets.effective()]);
            let ambient = raisable(process, !0).0;
            process.user().uid() == 0 || sets.flatten().flatten().all(|one| ambient.contains(one))
        });
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        listed.is_some_and(|all| all.iter().any(is_new))
            && !runs_inside
            && keeps_rights
            && !reaper::is_wanted(spec)
            && !spec.process().as_ref().is_some_and(is_labelled)
            && profile.is_none_or(Trampoline::is_let_pass)
    }

    /// Whether it can do its work under a profile.
    pub(super) fn is_let_pass(profile: &LinuxSeccomp) -> bool {
        CALLS.iter().all(|call| seccomp::lets_pass(profile, call))
    }

    /// Makes it the way to the program at `path`. When that cannot be executed it writes `unstarted` to the channel, and behind it
    /// the errno, of four bytes.
    pub(super) fn lead_to(&self, path: &CStr, channel: RawFd, unstarted: &[u8]) -> io::Result<()> {
        let code = code().ok_or(io::ErrorKind::Unsupported)?;
        let path = path.to_bytes_with_nul();
        // What the code finds behind itself, in this order: see there.
        let behind = 3 * size_of::<u32>();
        let header = [channel as u32, (behind + path.len()) as u32, unstarted.len() as u32];
        let header: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
        let image = elf(&[code, &header, path, unstarted].concat());
        (&self.0).write_all(&image)
    }

    /// Goes that way, with the channel open; returns only why it could not.
    pub(super) fn exec(&self, channel: RawFd, args: &[CString], env: &[CString]) -> io::Error {
        if let Err(error) = sys::keep_on_exec(channel) {
            return error;
        }
        sys::exec_fd(self.0.as_fd(), args, env)
    }

    pub(super) fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A program of one segment that begins with its first byte (ELF-64, System V ABI chapters 4 and 5).
fn elf(program: &[u8]) -> Vec<u8> {
    let begin = u64::from(ELF_HEADER) + 2 * u64::from(PROGRAM_HEADER);
    let len = begin + program.len() as u64;
    let segment = |kind: u32, flags: u32, address: u64, len: u64, align: u64| {
        let mut header = [kind, flags].map(u32::to_ne_bytes).concat();
        header.extend([0, address, address, len, len, align].into_iter().flat_map(u64::to_ne_bytes));
        header
    };
    let mut file = Vec::with_capacity(len as usize);
    // 64 bits, least significant byte first, version 1, System V.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([libc::ET_EXEC, libc::EM_X86_64].into_iter().flat_map(u16::to_ne_bytes));
    file.extend(1u32.to_ne_bytes());
    file.extend([BASE + begin, u64::from(ELF_HEADER), 0].into_iter().flat_map(u64::to_ne_bytes));
    file.extend(0u32.to_ne_bytes());
    file.extend([ELF_HEADER, PROGRAM_HEADER, 2, 0, 0, 0].into_iter().flat_map(u16::to_ne_bytes));
    file.extend(segment(libc::PT_LOAD, libc::PF_R | libc::PF_X, BASE, len, 0x1000));
    // A stack that is no code.
    file.extend(segment(libc::PT_GNU_STACK, libc::PF_R | libc::PF_W, 0, 0, 16));
    file.extend(program);
    file
}

#[cfg(target_arch = "x86_64")]
fn code() -> Option<&'static [u8]> {
    unsafe extern "C" {
        static moyai_trampoline: u8;
        static moyai_trampoline_end: u8;
    }
    // SAFETY: both are labels below, around code that is never written to.
    unsafe {
        let (begin, end) = (&raw const moyai_trampoline, &raw const moyai_trampoline_end);
        Some(std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)))
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn code() -> Option<&'static [u8]> {
    None
}

// Behind it: the channel's number, where its message begins (from here on), how long that is, the path, the message.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .text.moyai_trampoline, \"ax\", @progbits",
    ".hidden moyai_trampoline",
    ".globl moyai_trampoline",
    "moyai_trampoline:",
    "lea rbx, [rip + moyai_trampoline_end]",
    // fcntl(channel, F_SETFD, FD_CLOEXEC); fails on a second pass
    "mov edi, [rbx]",
    "mov esi, {set_flags}",
    "mov edx, {close_on_exec}",
    "mov eax, {fcntl}",
    "syscall",
    "test eax, eax",
    "jnz 2f",
    // execve(path, argv, envp), as the kernel has laid them upon the stack behind argc
    "lea rdi, [rbx + 12]",
    "mov rax, [rsp]",
    "lea rsi, [rsp + 8]",
    "lea rdx, [rsi + rax * 8 + 8]",
    "mov eax, {execve}",
    "syscall",
    "neg eax",
    "push rax",
    // write(channel, message, length), write(channel, &errno, 4)
    "mov edi, [rbx]",
    "mov esi, [rbx + 4]",
    "add rsi, rbx",
    "mov edx, [rbx + 8]",
    "mov eax, {write}",
    "syscall",
    "mov edi, [rbx]",
    "mov rsi, rsp",
    "mov edx, 4",
    "mov eax, {write}",
    "syscall",
    "2:",
    "mov edi, 126",
    "mov eax, {exit_group}",
    "syscall",
    "ud2",
    ".hidden moyai_trampoline_end",
    ".globl moyai_trampoline_end",
    "moyai_trampoline_end:",
    ".popsection",
    set_flags = const libc::F_SETFD,
    close_on_exec = const libc::FD_CLOEXEC,
    fcntl = const libc::SYS_fcntl,
    execve = const libc::SYS_execve,
    write = const libc::SYS_write,
    exit_group = const libc::SYS_exit_group,
);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Whether it suffices for a container of its own with one thing more.
    fn suffices_with(path: &str, value: Value) -> bool {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
            "hooks": {"prestart": [{"path": "/bin/true"}], "poststop": [{"path": "/bin/true"}]},
        });
        if let Some((parent, name)) = path.rsplit_once('/') {
            spec.pointer_mut(parent).expect("a parent")[name] = value;
        }
        Trampoline::suffices(&serde_json::from_value(spec).expect("a spec"))
    }

    #[test]
    fn the_profiles_that_are_usual_let_it_pass() {
        // The filters of both are known without their profiles.
        for profile in [seccomp::default_profile(), seccomp::strict_profile("shim")] {
            assert!(Trampoline::is_let_pass(&profile));
        }
    }

    #[test]
    fn it_suffices_where_nobody_else_is_inside_and_nothing_is_lost_on_the_way() {
        let hook = json!([{"path": "/bin/true"}]);
        let user = |capabilities: Value| json!({"user": {"uid": 1000, "gid": 1000}, "args": ["sh"], "cwd": "/", "capabilities": capabilities});
        let filter = |calls: Value| json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": calls});
        let called = json!({"names": CALLS, "action": "SCMP_ACT_ALLOW"});
        let root = json!({"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "capabilities": {"permitted": ["CAP_CHOWN"]}});
        let ambient = |sets: [&str; 4]| user(sets.iter().map(|set| (set.to_string(), json!(["CAP_CHOWN"]))).collect());
        for (path, value) in [
            ("", json!(null)),
            ("/process", root),
            ("/process", user(json!({"bounding": ["CAP_CHOWN"], "inheritable": ["CAP_CHOWN"]}))),
            ("/process", ambient(["permitted", "effective", "inheritable", "ambient"])),
            ("/linux/seccomp", filter(json!([called]))),
            ("/annotations", json!({reaper::ANNOTATION: "false"})),
        ] {
            assert!(suffices_with(path, value.clone()), "{path}: {value}");
        }
        for (path, value) in [
            ("/linux/namespaces", json!([{"type": "mount"}])),
            ("/linux/namespaces", json!([{"type": "pid", "path": "/proc/1/ns/pid"}])),
            ("/hooks/createContainer", hook.clone()),
            ("/hooks/startContainer", hook),
            ("/annotations", json!({reaper::ANNOTATION: "true"})),
            ("/process/apparmorProfile", json!("docker-default")),
            ("/process/selinuxLabel", json!("system_u:system_r:container_t:s0")),
            ("/process", user(json!({"permitted": ["CAP_CHOWN"]}))),
            // What is not inheritable is not raised.
            ("/process", ambient(["permitted", "effective", "bounding", "ambient"])),
            ("/process", user(json!({"effective": ["CAP_CHOWN"], "ambient": ["CAP_KILL"]}))),
            ("/linux/seccomp", filter(json!([]))),
            ("/linux/seccomp", filter(json!([{"names": CALLS[1..], "action": "SCMP_ACT_ALLOW"}]))),
            ("/linux/seccomp", filter(json!([called, {"names": ["fcntl"], "action": "SCMP_ACT_LOG"}]))),
            (
                "/linux/seccomp",
                filter(json!([{
                    "names": CALLS, "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
                }])),
            ),
        ] {
            assert!(!suffices_with(path, value.clone()), "{path}: {value}");
        }
    }
}

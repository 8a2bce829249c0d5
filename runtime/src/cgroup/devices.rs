//! Which devices a container may use: `devices.allow` and `devices.deny` on v1, an eBPF program on v2
//! (Documentation/admin-guide/cgroup-v1/devices.rst, cgroup-v2.rst "Device controller").
//!
//! Nothing is allowed but what the bundle lists, in its order, and what every container has: the pseudo-devices, its
//! terminals, and making nodes, which is harmless as long as they may not be opened.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// One rule; the last that applies decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    /// `a` is both.
    kind: char,
    /// None is any.
    major: Option<u32>,
    minor: Option<u32>,
    /// [`READ`], [`WRITE`], [`MKNOD`].
    access: u32,
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

const fn usual(kind: char, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule { allow: true, kind, major, minor, access }
}

/// What every container may use: making nodes; null, zero, full, tty, random, urandom, console, terminals.
const USUAL: [Rule; 11] = [
    usual('c', None, None, MKNOD),
    usual('b', None, None, MKNOD),
    usual('c', Some(1), Some(3), ALL),
    usual('c', Some(1), Some(5), ALL),
    usual('c', Some(1), Some(7), ALL),
    usual('c', Some(5), Some(0), ALL),
    usual('c', Some(1), Some(8), ALL),
    usual('c', Some(1), Some(9), ALL),
    usual('c', Some(5), Some(1), ALL),
    usual('c', Some(136), None, ALL),
    usual('c', Some(5), Some(2), ALL),
];

/// The rules of a container, in order.
pub(crate) fn rules(listed: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    let nothing = Rule { allow: false, kind: 'a', major: None, minor: None, access: ALL };
    let own = listed.iter().map(|rule| Rule {
        allow: rule.allow(),
        kind: match rule.typ() {
            Some(LinuxDeviceType::B) => 'b',
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => 'c',
            _ => 'a',
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: rule.access().as_deref().map_or(ALL, |text| {
            text.chars().fold(0, |access, letter| {
                access
                    | match letter {
                        'r' => READ,
                        'w' => WRITE,
                        'm' => MKNOD,
                        _ => 0,
                    }
            })
        }),
    });
    std::iter::once(nothing).chain(own).chain(USUAL).collect()
}

/// Sets them on v1.
pub(super) fn write(dir: &Path, rules: &[Rule]) -> io::Result<()> {
    let open = |name: &str| File::options().write(true).open(dir.join(name));
    let (allow, deny) = (open("devices.allow")?, open("devices.deny")?);
    let mut allowed_all = false;
    for rule in rules {
        let mut file = if rule.allow { &allow } else { &deny };
        if rule.kind == 'a' {
            // All or nothing is all that v1 knows of it.
            allowed_all = rule.allow;
            file.write_all(b"a")?;
            continue;
        }
        if rule.allow && allowed_all {
            continue;
        }
        let number = |number: Option<u32>| number.map_or("*".to_owned(), |number| number.to_string());
        let access = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')];
        let access: String =
            access.iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, letter)| *letter).collect();
        // A rule a call: the kernel reads no more of one.
        let text = format!("{} {}:{} {access}", rule.kind, number(rule.major), number(rule.minor));
        file.write_all(text.as_bytes())?;
    }
    Ok(())
}

/// One instruction, laid out as the kernel's `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

// linux/bpf.h, linux/bpf_common.h
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xbc;
const SET: u8 = 0xb7;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const JUMP_UNLESS_EQUAL_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// The same as a program: `r1` points to kind and access in one word, major, minor; it answers 1 for yes.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut out = vec![
        // r2: kind, r3: access, r4: major, r5: minor.
        op(LOAD_WORD, 2, 1, 0, 0),
        op(MOVE, 3, 2, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    // The last that applies decides: that one is asked first.
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        if rule.kind != 'a' {
            // BPF_DEVCG_DEV_BLOCK, BPF_DEVCG_DEV_CHAR
            tests.push(op(JUMP_UNLESS_EQUAL, 2, 0, 0, if rule.kind == 'b' { 1 } else { 2 }));
        }
        if rule.access != ALL {
            // An allowance must cover all that is wanted; a prohibition of any of it is enough.
            tests.push(op(MOVE, 1, 3, 0, 0));
            tests.push(op(AND, 1, 0, 0, rule.access as i32));
            tests.push(match rule.allow {
                true => op(JUMP_UNLESS_EQUAL_REGISTER, 1, 3, 0, 0),
                false => op(JUMP_IF_EQUAL, 1, 0, 0, 0),
            });
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                tests.push(op(JUMP_UNLESS_EQUAL, register, 0, 0, number as i32));
            }
        }
        let len = tests.len();
        for (at, test) in tests.into_iter().enumerate() {
            let jumps = matches!(test.code, JUMP_UNLESS_EQUAL | JUMP_UNLESS_EQUAL_REGISTER | JUMP_IF_EQUAL);
            // Past the other tests and the answer.
            out.push(Instruction { offset: if jumps { (len - at - 1 + 2) as i16 } else { 0 }, ..test });
        }
        out.push(op(SET, 0, 0, 0, rule.allow.into()));
        out.push(op(EXIT, 0, 0, 0, 0));
        if len == 0 {
            // It applies to everything: nothing after it is reached, and the verifier wants no such code.
            return out;
        }
    }
    out.push(op(SET, 0, 0, 0, 0));
    out.push(op(EXIT, 0, 0, 0, 0));
    out
}

/// Attaches them to a group of v2, beside what its parents have.
pub(super) fn attach(dir: &Path, rules: &[Rule]) -> io::Result<()> {
    let program = program(rules);
    let group = File::open(dir)?;
    let loaded = load(&program)?;
    /// `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attributes = Attach {
        target: group.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    let size = std::mem::size_of_val(&attributes);
    // SAFETY: the attributes are laid out as the kernel's for this command, and live for the whole call.
    if unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attributes, size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    /// The head of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attributes = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
    };
    let size = std::mem::size_of_val(&attributes);
    // SAFETY: the attributes are laid out as the kernel's for this command; they, the program and the licence live for the
    // whole call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &attributes, size) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// The v2 tree of this machine, also of one that has its controllers on v1; none for an ordinary user.
    fn v2() -> Option<PathBuf> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        let root = nix::unistd::geteuid().is_root();
        roots.into_iter().find(|dir| root && dir.join("cgroup.controllers").exists())
    }

    /// What a process in a group with these rules can open: null, zero and the kernel's log.
    fn opens(rules: &[Rule], name: &str) -> Option<Vec<bool>> {
        let dir = v2()?.join(format!("moyai-test-devices-{}-{name}", std::process::id()));
        fs::create_dir(&dir).expect("make a group");
        let attached = attach(&dir, rules);
        let script = "echo $$ > \"$0/cgroup.procs\"; for d in null zero kmsg; do \
            (: < /dev/$d) 2>&- && echo yes || echo no; done; (echo x > /dev/zero) 2>&- && echo yes || echo no";
        let output = Command::new("sh").arg("-c").arg(script).arg(&dir).output();
        fs::remove_dir(&dir).expect("remove the group");
        attached.expect("the kernel takes the program");
        let text = String::from_utf8(output.expect("run a shell").stdout).expect("text");
        Some(text.lines().map(|line| line == "yes").collect())
    }

    fn listed(json: &str) -> Vec<Rule> {
        rules(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).expect("rules"))
    }

    #[test]
    fn the_kernel_takes_the_program_and_it_decides_as_the_rules_say() {
        let Some(usual) = opens(&listed("[]"), "usual") else { return };
        assert_eq!(usual, [true, true, false, true], "the usual devices and no other");
        let more = listed(r#"[{"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}]"#);
        assert_eq!(opens(&more, "more").unwrap(), [true, true, true, true]);
        let all = listed(r#"[{"allow": true, "access": "rwm"}]"#);
        assert_eq!(opens(&all, "all").unwrap(), [true, true, true, true]);
        // Without the usual ones, the last that applies decides, and reading is not writing.
        let zero = |allow, access| Rule { allow, kind: 'c', major: Some(1), minor: Some(5), access };
        let nothing = Rule { allow: false, kind: 'a', major: None, minor: None, access: ALL };
        assert_eq!(opens(&[nothing.clone(), zero(true, READ)], "read").unwrap(), [false, true, false, false]);
        let taken_back = [nothing, zero(true, ALL), zero(false, WRITE)];
        assert_eq!(opens(&taken_back, "back").unwrap(), [false, true, false, false]);
    }
}

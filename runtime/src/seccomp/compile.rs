//! From a profile to a BPF program (Documentation/userspace-api/seccomp_filter.rst).
//!
//! Layout: wrong architecture or the x32 ABI → ENOSYS, as if the kernel had none; number above any that the profile
//! knows → ENOSYS, so that programs fall back to older calls; then a binary search over runs of allowed numbers, each
//! leaf ending in ALLOW or EPERM; then the conditional calls, each with its own test of an argument.

use super::profile::{ALLOWED, ALLOWED_HERE, Arg, CONDITIONAL, Condition, NEWEST, RECENT, Test};

/// One instruction, laid out as the kernel's `struct sock_filter`.
#[repr(C)]
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How far to jump if so.
    pub jt: u8,
    /// How far to jump if not.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

// linux/bpf_common.h
const LD_W_ABS: u16 = 0x20;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const JSET: u16 = 0x45;
const JA: u16 = 0x05;
const RET: u16 = 0x06;

// linux/seccomp.h
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
/// Set in the number of an x32 call on x86-64; no call of another architecture is that high.
const X32: u32 = 0x4000_0000;

const fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn errno(number: i32) -> Instruction {
    op(RET, ERRNO | number as u32)
}

/// The program for the default profile.
pub fn program() -> Vec<Instruction> {
    let mut out = vec![
        op(LD_W_ABS, ARCH),
        jump(JEQ, NATIVE, 1, 0),
        errno(libc::ENOSYS),
        op(LD_W_ABS, NR),
        jump(JGE, X32, 0, 1),
        errno(libc::ENOSYS),
    ];
    for (number, conditions) in CONDITIONAL {
        conditional(*number as u32, conditions, &mut out);
    }
    let mut allowed: Vec<u32> = ALLOWED.iter().chain(ALLOWED_HERE).chain(RECENT).map(|number| *number as u32).collect();
    allowed.sort_unstable();
    allowed.dedup();
    let mut edges = vec![(0, false)];
    for number in allowed {
        push_edge(&mut edges, number, true);
        push_edge(&mut edges, number + 1, false);
    }
    let newest = NEWEST as u32 + 1;
    edges.push((newest, false));
    search(&edges, newest, &mut out);
    out
}

/// From `number` on, the verdict is `allowed`, until the next edge.
fn push_edge(edges: &mut Vec<(u32, bool)>, number: u32, allowed: bool) {
    match edges.last() {
        Some((last, _)) if *last == number => {
            edges.pop();
            if edges.last().is_none_or(|(_, before)| *before != allowed) {
                edges.push((number, allowed));
            }
        }
        Some((_, before)) if *before == allowed => {}
        _ => edges.push((number, allowed)),
    }
}

/// A balanced tree of comparisons; the number is in the accumulator.
fn search(edges: &[(u32, bool)], newest: u32, out: &mut Vec<Instruction>) {
    if let [(from, allowed)] = edges {
        out.push(match (*from >= newest, allowed) {
            (true, _) => errno(libc::ENOSYS),
            (false, true) => op(RET, ALLOW),
            (false, false) => errno(libc::EPERM),
        });
        return;
    }
    let (low, high) = edges.split_at(edges.len() / 2);
    let (mut below, mut above) = (Vec::new(), Vec::new());
    search(low, newest, &mut below);
    search(high, newest, &mut above);
    // A conditional jump reaches 255 instructions and JA reaches all. Every path through `below` ends in a return, so
    // nothing falls from it into `above`.
    out.push(jump(JGE, high[0].0, 0, 1));
    out.push(op(JA, below.len() as u32));
    out.extend(below);
    out.extend(above);
}

/// Tests of one call's arguments; what passes one of them is allowed, else EPERM or what the last says.
fn conditional(number: u32, conditions: &[Condition], out: &mut Vec<Instruction>) {
    let mut body = Vec::new();
    for condition in conditions {
        match *condition {
            Condition::Deny(error) => body.push(errno(error)),
            Condition::AllowIf(Arg { index, test }) => {
                // Little-endian: the low half comes first. The calls here take 32-bit arguments.
                body.push(op(LD_W_ABS, ARGS + 8 * u32::from(index)));
                match test {
                    Test::Equals(value) => body.push(jump(JEQ, value, 0, 1)),
                    Test::Differs(value) => body.push(jump(JEQ, value, 1, 0)),
                    Test::NoneOf(mask) => body.push(jump(JSET, mask, 1, 0)),
                }
                body.push(op(RET, ALLOW));
            }
        }
    }
    if !matches!(conditions.last(), Some(Condition::Deny(_))) {
        body.push(errno(libc::EPERM));
    }
    out.push(jump(JEQ, number, 0, body.len() as u8));
    out.extend(body);
}

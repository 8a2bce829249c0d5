//! From a profile to a BPF program (Documentation/userspace-api/seccomp_filter.rst).
//!
//! Layout: for each architecture a binary search over runs of numbers with one verdict. A leaf is an action, or tests of
//! arguments: the rules for one call in the profile's order, the first that applies decides; one without tests comes last
//! whatever its place, as libseccomp has it. Several tests of one argument in a rule are alternatives, as runc has it.
//!
//! What the profile does not know gets ENOSYS, so that programs fall back to what they used before: other architectures,
//! the x32 ABI, and, where the default action is an error, numbers above any that the profile names.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};

use serde::{Deserialize, Serialize};

use super::calls::{Abi, abis};

/// One instruction, laid out as the kernel's `struct sock_filter`.
#[repr(C)]
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// A profile as the kernel takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The program.
    pub program: Vec<Instruction>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u64,
    /// Whether some call is put to a listener.
    pub asks: bool,
}

/// Why a profile cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// An error number for an action that has none.
    #[error("linux.seccomp.syscalls[{rule}].errnoRet: the action {action} has no error number")]
    NoErrno {
        /// Which entry.
        rule: usize,
        /// Its action.
        action: String,
    },
    /// An error number that is none.
    #[error("linux.seccomp.{field}: {errno} is no error number")]
    Errno {
        /// Where it stands.
        field: String,
        /// What it says.
        errno: u32,
    },
    /// A call has six arguments.
    #[error("linux.seccomp.syscalls[{rule}].args[{arg}].index: a call has arguments 0 to 5, not {index}")]
    Argument {
        /// Which entry.
        rule: usize,
        /// Which test.
        arg: usize,
        /// What it says.
        index: usize,
    },
    /// SCMP_ACT_NOTIFY for every call cannot be served: the listener's own message would be one of them.
    #[error("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY for every call leaves none to tell the listener with")]
    AsksAll,
    /// Questions without a listener.
    #[error("linux.seccomp.listenerPath: missing, and some action is SCMP_ACT_NOTIFY")]
    NoListener,
    /// The kernel's limit.
    #[error("linux.seccomp: the filter has {len} instructions, and the kernel takes {MAX_PROGRAM}")]
    TooLong {
        /// How many.
        len: usize,
    },
}

/// BPF_MAXINSNS (linux/bpf_common.h).
const MAX_PROGRAM: usize = 4096;

// linux/bpf_common.h
const LD_W_ABS: u16 = 0x20;
const AND: u16 = 0x54;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const JA: u16 = 0x05;
const RET: u16 = 0x06;

// linux/seccomp.h
const ERRNO: u32 = 0x0005_0000;

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// Set in the number of an x32 call on x86-64; no call of another architecture is that high.
const X32: u32 = 0x4000_0000;

const fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

const ABSENT: u32 = ERRNO | libc::ENOSYS as u32;

/// What becomes of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Verdict {
    /// Rules with tests.
    tested: Vec<(Vec<LinuxSeccompArg>, u32)>,
    /// What applies when none of them does; the default when there is nothing.
    otherwise: Option<u32>,
}

impl Filter {
    /// Compiles a profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, FilterError> {
        let calls = profile.syscalls().as_deref().unwrap_or_default();
        let notify = LinuxSeccompAction::ScmpActNotify;
        let asks = calls.iter().any(|call| call.action() == notify);
        if profile.default_action() == notify {
            return Err(FilterError::AsksAll);
        }
        if asks && profile.listener_path().is_none() {
            return Err(FilterError::NoListener);
        }
        check_errno("defaultErrnoRet", profile.default_errno_ret())?;
        let default = profile.default_action().as_u32(profile.default_errno_ret());
        let mut program = vec![op(LD_W_ABS, ARCH)];
        for abi in abis(profile.architectures().as_deref().unwrap_or_default()) {
            let section = section(&abi, calls, profile.default_action(), default)?;
            // A conditional jump reaches 255 instructions and JA reaches all.
            program.push(jump(JEQ, abi.token, 1, 0));
            program.push(op(JA, section.len() as u32));
            program.extend(section);
        }
        program.push(op(RET, ABSENT));
        if program.len() > MAX_PROGRAM {
            return Err(FilterError::TooLong { len: program.len() });
        }
        let flags = profile.flags().iter().flatten().fold(0, |flags, flag| flags | number(*flag));
        Ok(Filter { program, flags, asks })
    }
}

fn number(flag: LinuxSeccompFilterFlag) -> u64 {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
    }
}

/// What decides over the calls of one architecture. Every path through it ends in a return.
fn section(
    abi: &Abi,
    calls: &[LinuxSyscall],
    default_action: LinuxSeccompAction,
    default: u32,
) -> Result<Vec<Instruction>, FilterError> {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    for (rule, call) in calls.iter().enumerate() {
        let action = action(rule, call)?;
        if action == default {
            // As runc has it: it says nothing that is not so anyway, and does not hide another rule.
            call.args().iter().try_for_each(|tests| check_arguments(rule, tests))?;
            continue;
        }
        for name in call.names() {
            let Some(number) = (abi.number)(name) else { continue };
            let verdict = verdicts.entry(number).or_default();
            match call.args().as_deref().unwrap_or_default() {
                [] => verdict.otherwise = verdict.otherwise.or(Some(action)),
                tests => {
                    check_arguments(rule, tests)?;
                    verdict.tested.extend(alternatives(tests).into_iter().map(|tests| (tests, action)));
                }
            }
        }
    }
    // What is newer than the profile gets ENOSYS where the profile refuses by an error; an action that kills stays one.
    let newest = verdicts.keys().next_back().map_or(0, |newest| newest + 1);
    let beyond = if default_action == LinuxSeccompAction::ScmpActErrno { ABSENT } else { default };
    let plain = |action| Verdict { tested: Vec::new(), otherwise: Some(action) };
    let mut edges = vec![(0, plain(default))];
    let mut push = |from: u32, verdict: Verdict| match edges.last_mut() {
        Some((last, known)) if *last == from => *known = verdict,
        Some((_, known)) if *known == verdict => {}
        _ => edges.push((from, verdict)),
    };
    for (number, verdict) in verdicts {
        push(number, Verdict { otherwise: verdict.otherwise.or(Some(default)), ..verdict });
        push(number + 1, plain(default));
    }
    push(newest, plain(beyond));
    push(X32, plain(ABSENT));
    // Neighbours with one verdict are one run.
    edges.dedup_by(|next, before| next.1 == before.1);
    let mut out = vec![op(LD_W_ABS, NR)];
    search(&edges, &mut out);
    Ok(out)
}

fn action(rule: usize, call: &LinuxSyscall) -> Result<u32, FilterError> {
    let has_errno = matches!(call.action(), LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace);
    if call.errno_ret().is_some_and(|errno| errno != 0) && !has_errno {
        return Err(FilterError::NoErrno { rule, action: call.action().to_string() });
    }
    check_errno(&format!("syscalls[{rule}].errnoRet"), call.errno_ret())?;
    Ok(call.action().as_u32(call.errno_ret()))
}

/// Its 16 bits are all that an action has room for: more would make another action of it.
fn check_errno(field: &str, errno: Option<u32>) -> Result<(), FilterError> {
    match errno.filter(|errno| *errno > 0xffff) {
        Some(errno) => Err(FilterError::Errno { field: field.to_owned(), errno }),
        None => Ok(()),
    }
}

fn check_arguments(rule: usize, tests: &[LinuxSeccompArg]) -> Result<(), FilterError> {
    match tests.iter().enumerate().find(|(_, test)| test.index() > 5) {
        Some((arg, test)) => Err(FilterError::Argument { rule, arg, index: test.index() }),
        None => Ok(()),
    }
}

/// A rule with several tests of one argument stands for as many rules.
fn alternatives(tests: &[LinuxSeccompArg]) -> Vec<Vec<LinuxSeccompArg>> {
    let twice =
        tests.iter().enumerate().any(|(at, test)| tests[..at].iter().any(|other| other.index() == test.index()));
    if twice { tests.iter().map(|test| vec![*test]).collect() } else { vec![tests.to_vec()] }
}

/// A balanced tree of comparisons; the number is in the accumulator.
fn search(edges: &[(u32, Verdict)], out: &mut Vec<Instruction>) {
    if let [(_, verdict)] = edges {
        for (tests, action) in &verdict.tested {
            rule(tests, *action, out);
        }
        // A verdict in the tree always has one.
        out.push(op(RET, verdict.otherwise.unwrap_or(ABSENT)));
        return;
    }
    let (low, high) = edges.split_at(edges.len() / 2);
    let (mut below, mut above) = (Vec::new(), Vec::new());
    search(low, &mut below);
    search(high, &mut above);
    match u8::try_from(below.len()) {
        Ok(len) => out.push(jump(JGE, high[0].0, len, 0)),
        Err(_) => out.extend([jump(JGE, high[0].0, 0, 1), op(JA, below.len() as u32)]),
    }
    out.extend(below);
    out.extend(above);
}

/// Where a comparison leads.
#[derive(Copy, Clone, PartialEq, Eq)]
enum To {
    /// To the next instruction.
    Next,
    /// To the next test, or to the action after the last.
    Holds,
    /// To the next rule.
    Fails,
}

/// A rule: the action if all tests hold, else on to what follows.
fn rule(tests: &[LinuxSeccompArg], action: u32, out: &mut Vec<Instruction>) {
    let bodies: Vec<Vec<(Instruction, To, To)>> = tests.iter().map(test).collect();
    let mut left: usize = bodies.iter().map(Vec::len).sum();
    for body in bodies {
        for (at, (instruction, yes, no)) in body.iter().enumerate() {
            // Six tests of six instructions: every distance fits.
            let distance = |to: &To| match to {
                To::Next => 0,
                To::Holds => (body.len() - at - 1) as u8,
                To::Fails => left as u8,
            };
            out.push(Instruction { jt: distance(yes), jf: distance(no), ..*instruction });
            left -= 1;
        }
    }
    out.push(op(RET, action));
}

/// One test of a 64-bit argument, in halves; little-endian: the low half comes first. A step that jumps nowhere goes on.
fn test(arg: &LinuxSeccompArg) -> Vec<(Instruction, To, To)> {
    use To::{Fails, Holds, Next};
    let low = ARGS + 8 * arg.index() as u32;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high_value, low_value) = halves(arg.value());
    let load = |half: u32| (op(LD_W_ABS, half), Next, Next);
    let when = |code: u16, k: u32, yes: To, no: To| (op(code, k), yes, no);
    // Whether the argument is above (`code` JGT) or not below (JGE) the value.
    let compare = |code: u16, yes: To, no: To| {
        vec![
            load(low + 4),
            when(JGT, high_value, yes, Next),
            when(JEQ, high_value, Next, no),
            load(low),
            when(code, low_value, yes, no),
        ]
    };
    match arg.op() {
        LinuxSeccompOperator::ScmpCmpEq => {
            vec![load(low + 4), when(JEQ, high_value, Next, Fails), load(low), when(JEQ, low_value, Holds, Fails)]
        }
        LinuxSeccompOperator::ScmpCmpNe => {
            vec![load(low + 4), when(JEQ, high_value, Next, Holds), load(low), when(JEQ, low_value, Fails, Holds)]
        }
        LinuxSeccompOperator::ScmpCmpGt => compare(JGT, Holds, Fails),
        LinuxSeccompOperator::ScmpCmpGe => compare(JGE, Holds, Fails),
        LinuxSeccompOperator::ScmpCmpLe => compare(JGT, Fails, Holds),
        LinuxSeccompOperator::ScmpCmpLt => compare(JGE, Fails, Holds),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The first value is the mask, the second what is left under it.
            let (high_wanted, low_wanted) = halves(arg.value_two().unwrap_or(0));
            vec![
                load(low + 4),
                (op(AND, high_value), Next, Next),
                when(JEQ, high_wanted, Next, Fails),
                load(low),
                (op(AND, low_value), Next, Next),
                when(JEQ, low_wanted, Holds, Fails),
            ]
        }
    }
}

use fastrand::Rng;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};

use super::calls::{COMPAT, NATIVE};
use super::profile::ALLOWED;
use super::{
    ASKS_SHIM, COMPILED, Filter, FilterError, Instruction, default_profile, filter_of, prepare, strict_profile,
};

const ALLOW: u32 = 0x7fff_0000;

/// Runs the program as the kernel would.
fn verdict(program: &[Instruction], arch: u32, nr: u32, args: [u64; 2]) -> u32 {
    let (mut at, mut a) = (0usize, 0u32);
    loop {
        let step = program[at];
        at += 1;
        match step.code {
            0x20 => {
                a = match step.k {
                    0 => nr,
                    4 => arch,
                    16 => args[0] as u32,
                    20 => (args[0] >> 32) as u32,
                    24 => args[1] as u32,
                    28 => (args[1] >> 32) as u32,
                    other => panic!("offset {other}"),
                }
            }
            0x54 => a &= step.k,
            0x15 => at += usize::from(if a == step.k { step.jt } else { step.jf }),
            0x25 => at += usize::from(if a > step.k { step.jt } else { step.jf }),
            0x35 => at += usize::from(if a >= step.k { step.jt } else { step.jf }),
            0x05 => at += step.k as usize,
            0x06 => return step.k,
            other => panic!("code {other:#x}"),
        }
    }
}

fn default_program() -> Vec<Instruction> {
    Filter::compile(&default_profile()).expect("the default profile").program
}

fn native(nr: libc::c_long, args: [u64; 2]) -> u32 {
    verdict(&default_program(), NATIVE.token, nr as u32, args)
}

const fn errno(number: i32) -> u32 {
    0x0005_0000 | number as u32
}

fn profile(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).expect("a profile")
}

#[test]
fn every_listed_call_is_allowed_and_no_other() {
    let program = default_program();
    let tested = ["clone", "clone3", "socket", "personality"].map(|name| (NATIVE.number)(name).unwrap());
    let listed: Vec<u32> = ALLOWED.split_whitespace().filter_map(|name| (NATIVE.number)(name)).collect();
    for nr in (0..=462).filter(|nr| !tested.contains(nr)) {
        let expected = if listed.contains(&nr) { ALLOW } else { errno(libc::EPERM) };
        assert_eq!(verdict(&program, NATIVE.token, nr, [0, 0]), expected, "call {nr}");
    }
}

#[test]
fn what_escapes_is_refused() {
    for nr in [
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_pivot_root,
        libc::SYS_bpf,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_userfaultfd,
        libc::SYS_open_by_handle_at,
        libc::SYS_io_uring_setup,
        libc::SYS_fsopen,
    ] {
        assert_eq!(native(nr, [0, 0]), errno(libc::EPERM), "call {nr}");
    }
}

#[test]
fn arguments_decide_where_they_must() {
    assert_eq!(native(libc::SYS_clone, [0x0100_0011, 0]), ALLOW);
    assert_eq!(native(libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0]), errno(libc::EPERM));
    assert_eq!(native(libc::SYS_clone3, [0, 0]), errno(libc::ENOSYS));
    assert_eq!(native(libc::SYS_personality, [0xffff_ffff, 0]), ALLOW);
    assert_eq!(native(libc::SYS_personality, [0x0004_0000, 0]), errno(libc::EPERM));
    let vsock = libc::AF_VSOCK as u64;
    for family in (0..64).filter(|family| *family != vsock) {
        assert_eq!(native(libc::SYS_socket, [family, 0]), ALLOW, "family {family}");
    }
    // The kernel takes 32 bits of it.
    for high in [0, 1 << 32, 0xffff_ffff << 32] {
        assert_eq!(native(libc::SYS_socket, [high | vsock, 0]), errno(libc::EPERM));
    }
}

#[test]
fn foreign_and_future_calls_do_not_exist() {
    let program = default_program();
    assert_eq!(verdict(&program, COMPAT.token, 1, [0, 0]), errno(libc::ENOSYS));
    assert_eq!(verdict(&program, NATIVE.token, 0x4000_0001, [0, 0]), errno(libc::ENOSYS), "x32");
    assert_eq!(verdict(&program, NATIVE.token, 463, [0, 0]), errno(libc::ENOSYS));
    assert_eq!(verdict(&program, NATIVE.token, 9999, [0, 0]), errno(libc::ENOSYS));
}

#[test]
fn every_action_is_there_and_each_architecture_has_its_numbers() {
    let filter = Filter::compile(&profile(
        r#"{"defaultAction": "SCMP_ACT_LOG", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64",
            "SCMP_ARCH_ARM"], "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/run/l", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_KILL_PROCESS"}, {"names": ["write"], "action": "SCMP_ACT_TRAP"},
            {"names": ["close"], "action": "SCMP_ACT_NOTIFY"}, {"names": ["kill"], "action": "SCMP_ACT_KILL"},
            {"names": ["dup"], "action": "SCMP_ACT_TRACE", "errnoRet": 9},
            {"names": ["mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#,
    ))
    .unwrap();
    assert!(filter.asks);
    assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_LOG);
    for abi in [NATIVE, COMPAT] {
        let calls = [("read", 0x8000_0000), ("write", 0x0003_0000), ("close", 0x7fc0_0000), ("kill", 0)];
        let calls = calls.into_iter().chain([("dup", 0x7ff0_0009), ("mkdirat", errno(95)), ("getpid", 0x7ffc_0000)]);
        for (name, expected) in calls {
            let nr = (abi.number)(name).unwrap();
            assert_eq!(verdict(&filter.program, abi.token, nr, [0, 0]), expected, "{name} of {:#x}", abi.token);
        }
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let compile = |json| Filter::compile(&profile(json)).unwrap_err().to_string();
    let wrong = compile(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]}"#,
    );
    assert!(wrong.contains("syscalls[0].errnoRet"), "{wrong}");
    let wrong = compile(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
    );
    assert!(wrong.contains("syscalls[0].args[0].index"), "{wrong}");
    let asks = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}"#;
    assert_eq!(Filter::compile(&profile(asks)), Err(FilterError::NoListener));
}

/// What the profile says, read slowly.
fn meaning(profile: &LinuxSeccomp, name: &str, args: [u64; 2]) -> u32 {
    let holds = |test: &LinuxSeccompArg| {
        let (have, value) = (args[test.index()], test.value());
        match test.op() {
            LinuxSeccompOperator::ScmpCmpEq => have == value,
            LinuxSeccompOperator::ScmpCmpNe => have != value,
            LinuxSeccompOperator::ScmpCmpLt => have < value,
            LinuxSeccompOperator::ScmpCmpLe => have <= value,
            LinuxSeccompOperator::ScmpCmpGt => have > value,
            LinuxSeccompOperator::ScmpCmpGe => have >= value,
            LinuxSeccompOperator::ScmpCmpMaskedEq => have & value == test.value_two().unwrap_or(0),
        }
    };
    let calls = || profile.syscalls().iter().flatten().filter(|call| call.names().iter().any(|other| other == name));
    for call in calls() {
        let tests = call.args().as_deref().unwrap_or_default();
        let either = tests.len() == 2 && tests[0].index() == tests[1].index();
        let all = if either { tests.iter().any(holds) } else { tests.iter().all(holds) };
        if !tests.is_empty() && all {
            return call.action().as_u32(call.errno_ret());
        }
    }
    let plain = calls().find(|call| call.args().is_none());
    plain.map_or(profile.default_action().into(), |call| call.action().as_u32(call.errno_ret()))
}

#[test]
fn a_program_says_what_its_profile_says() {
    const NAMES: [&str; 6] = ["read", "write", "openat", "close", "mmap", "futex"];
    const OPS: [&str; 7] = ["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"];
    const EDGES: [u64; 7] = [0, 1, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0001, u64::MAX - 1, u64::MAX];
    for seed in 0..400 {
        let mut rng = Rng::with_seed(seed);
        let any = |rng: &mut Rng| EDGES[rng.usize(..EDGES.len())];
        let mut calls = Vec::new();
        for _ in 0..rng.usize(1..8) {
            let tests: Vec<_> = (0..rng.usize(0..3))
                .map(|_| {
                    let (op, index) = (OPS[rng.usize(..OPS.len())], rng.usize(0..2));
                    serde_json::json!({"index": index, "op": format!("SCMP_CMP_{op}"), "value": any(&mut rng), "valueTwo": any(&mut rng)})
                })
                .collect();
            let mut call = serde_json::json!({"names": [NAMES[rng.usize(..NAMES.len())]], "action": "SCMP_ACT_ERRNO",
                "errnoRet": rng.u32(1..100)});
            if !tests.is_empty() {
                call["args"] = tests.into();
            }
            calls.push(call);
        }
        let json = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": calls});
        let profile = profile(&json.to_string());
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActAllow);
        let program = Filter::compile(&profile).unwrap().program;
        for name in NAMES {
            let nr = (NATIVE.number)(name).unwrap();
            for first in EDGES {
                for second in EDGES {
                    let said = verdict(&program, NATIVE.token, nr, [first, second]);
                    assert_eq!(
                        said,
                        meaning(&profile, name, [first, second]),
                        "seed {seed}: {name}({first:#x}, {second:#x})"
                    );
                }
            }
        }
    }
}

#[test]
fn a_usual_profile_out_of_a_bundle_is_compiled_once() {
    prepare();
    let compiled = COMPILED.get().expect("some");
    assert_eq!(compiled.len(), 2);
    for profile in [default_profile(), strict_profile(ASKS_SHIM)] {
        let text = serde_json::to_string(&profile).expect("JSON");
        let again: LinuxSeccomp = serde_json::from_str(&text).expect("a profile");
        assert!(compiled.iter().any(|known| known.profile == again));
        assert_eq!(filter_of(&again), Filter::compile(&profile));
    }
}

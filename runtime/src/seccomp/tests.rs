use super::compile::Instruction;
use super::program;

const ALLOW: u32 = 0x7fff_0000;
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// Runs the program as the kernel would.
fn verdict(program: &[Instruction], arch: u32, nr: u32, args: [u32; 2]) -> u32 {
    let (mut at, mut a) = (0usize, 0u32);
    loop {
        let step = program[at];
        at += 1;
        match step.code {
            0x20 => {
                a = match step.k {
                    0 => nr,
                    4 => arch,
                    16 => args[0],
                    24 => args[1],
                    other => panic!("offset {other}"),
                }
            }
            0x15 => at += usize::from(if a == step.k { step.jt } else { step.jf }),
            0x35 => at += usize::from(if a >= step.k { step.jt } else { step.jf }),
            0x45 => at += usize::from(if a & step.k != 0 { step.jt } else { step.jf }),
            0x05 => at += step.k as usize,
            0x06 => return step.k,
            other => panic!("code {other:#x}"),
        }
    }
}

fn native(nr: libc::c_long, args: [u32; 2]) -> u32 {
    verdict(&program(), NATIVE, nr as u32, args)
}

const fn errno(number: i32) -> u32 {
    0x0005_0000 | number as u32
}

#[test]
fn every_listed_call_is_allowed_and_no_other() {
    let program = program();
    assert!(program.len() < 4096, "the kernel's limit");
    let conditional: Vec<u32> = super::profile::CONDITIONAL.iter().map(|(number, _)| *number as u32).collect();
    let listed = [super::profile::ALLOWED, super::profile::ALLOWED_HERE, super::profile::RECENT].concat();
    for nr in (0..=super::profile::NEWEST as u32).filter(|nr| !conditional.contains(nr)) {
        let expected = if listed.contains(&libc::c_long::from(nr)) { ALLOW } else { errno(libc::EPERM) };
        assert_eq!(verdict(&program, NATIVE, nr, [0, 0]), expected, "call {nr}");
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
    assert_eq!(native(libc::SYS_clone, [libc::CLONE_NEWUSER as u32, 0]), errno(libc::EPERM));
    assert_eq!(native(libc::SYS_clone3, [0, 0]), errno(libc::ENOSYS));
    assert_eq!(native(libc::SYS_socket, [libc::AF_INET as u32, 0]), ALLOW);
    assert_eq!(native(libc::SYS_socket, [libc::AF_VSOCK as u32, 0]), errno(libc::EPERM));
    assert_eq!(native(libc::SYS_personality, [0xffff_ffff, 0]), ALLOW);
    assert_eq!(native(libc::SYS_personality, [0x0004_0000, 0]), errno(libc::EPERM));
}

#[test]
fn foreign_and_future_calls_do_not_exist() {
    let program = program();
    assert_eq!(verdict(&program, 0x4000_0003, 1, [0, 0]), errno(libc::ENOSYS), "i386");
    assert_eq!(verdict(&program, NATIVE, 0x4000_0001, [0, 0]), errno(libc::ENOSYS), "x32");
    assert_eq!(verdict(&program, NATIVE, 463, [0, 0]), errno(libc::ENOSYS));
    assert_eq!(verdict(&program, NATIVE, 9999, [0, 0]), errno(libc::ENOSYS));
}

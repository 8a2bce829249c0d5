//! The numbers of system calls by name, for the architectures that a process on this machine can use.

use std::str::FromStr;

use oci_spec::runtime::Arch;

/// An architecture as the kernel tells a filter of it, and its numbers.
#[derive(Copy, Clone)]
pub(super) struct Abi {
    /// AUDIT_ARCH_* (linux/audit.h).
    pub(super) token: u32,
    /// The number of a call; `None` when this architecture has none of that name.
    pub(super) number: fn(&str) -> Option<u32>,
}

#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE: Abi =
    Abi { token: 0xc000_003e, number: |name| syscalls::x86_64::Sysno::from_str(name).ok().map(|call| call as u32) };
#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE: Abi =
    Abi { token: 0xc000_00b7, number: |name| syscalls::aarch64::Sysno::from_str(name).ok().map(|call| call as u32) };

/// The 32-bit architecture beside it.
#[cfg(target_arch = "x86_64")]
pub(super) const COMPAT: Abi =
    Abi { token: 0x4000_0003, number: |name| syscalls::x86::Sysno::from_str(name).ok().map(|call| call as u32) };
#[cfg(target_arch = "aarch64")]
pub(super) const COMPAT: Abi =
    Abi { token: 0x4000_0028, number: |name| syscalls::arm::Sysno::from_str(name).ok().map(|call| call as u32) };

/// Those that a profile is for and this machine has; the native one always.
pub(super) fn abis(listed: &[Arch]) -> Vec<Abi> {
    #[cfg(target_arch = "x86_64")]
    let compat = Arch::ScmpArchX86;
    #[cfg(target_arch = "aarch64")]
    let compat = Arch::ScmpArchArm;
    if listed.contains(&compat) { vec![NATIVE, COMPAT] } else { vec![NATIVE] }
}

/// Every call of the native architecture.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    (0..512).filter_map(name)
}

/// What a call of the native architecture is called.
#[cfg(target_arch = "x86_64")]
pub(super) fn name(number: u32) -> Option<&'static str> {
    syscalls::x86_64::Sysno::new(number as usize).map(|call| call.name())
}
/// What a call of the native architecture is called.
#[cfg(target_arch = "aarch64")]
pub(super) fn name(number: u32) -> Option<&'static str> {
    syscalls::aarch64::Sysno::new(number as usize).map(|call| call.name())
}

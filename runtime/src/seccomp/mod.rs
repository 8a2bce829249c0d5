//! The default system call filter: Docker's, for the capabilities a container has by default.
//!
//! [`profile`] lists what is allowed and why the rest is not; [`compile`] turns it into a BPF program. seccompiler has
//! one action for what matches and cannot say "EPERM, but ENOSYS for clone3 and for what is newer than this list";
//! libseccomp is a C library that takes 2.5 ms to compile this and could not be linked into a static binary easily.

mod compile;
mod profile;
#[cfg(test)]
mod tests;

pub use compile::{Instruction, program};

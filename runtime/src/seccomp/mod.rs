//! System call filters: a bundle's `linux.seccomp`, compiled to BPF; and the default one, Docker's for the capabilities
//! that a container has by default.
//!
//! [`profile`] lists what is allowed by default and why the rest is not; [`compile`] makes a program of any profile.
//! seccompiler has one action for what matches and cannot say "EPERM, but ENOSYS for clone3 and for what is newer than
//! this list"; libseccomp is a C library that takes 2.5 ms for this profile and could not be linked into a static binary
//! easily.

mod calls;
mod compile;
mod profile;
pub(crate) mod questions;
#[cfg(test)]
mod tests;

pub use compile::{Filter, FilterError, Instruction};
pub use profile::{default_profile, strict_profile};

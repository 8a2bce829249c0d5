//! System call filters: a bundle's `linux.seccomp`, compiled to BPF; and the default one, Docker's for the capabilities
//! that a container has by default.
//!
//! [`profile`] lists what is allowed by default and why the rest is not; [`compile`] makes a program of any profile.
//! seccompiler has one action for what matches and cannot say "EPERM, but ENOSYS for clone3 and for what is newer than
//! this list"; libseccomp is a C library that takes 2.5 ms for this profile and could not be linked into a static binary
//! easily. What is compiled is [kept] for whoever starts the next container.

mod calls;
mod compile;
mod kept;
mod profile;
pub(crate) mod questions;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

pub use compile::{Filter, FilterError, Instruction};
pub(crate) use kept::Kept;
pub use profile::{default_profile, strict_profile};

/// Where a strict profile's questions go: to the shim, whatever path that would be.
pub(crate) const ASKS_SHIM: &str = "shim";

/// A profile that is compiled, and how this program writes it into bundles.
struct Known {
    profile: LinuxSeccomp,
    text: String,
    filter: Filter,
}

/// What this process, or what it is a fork of, has compiled already.
static COMPILED: OnceLock<Vec<Known>> = OnceLock::new();

/// Compiles the profiles that nearly all containers have, for a process whose forks start them.
pub(crate) fn prepare() {
    let compiled = |profile: LinuxSeccomp| {
        let (text, filter) = (serde_json::to_string(&profile).ok()?, Filter::compile(&profile).ok()?);
        Some(Known { profile, text, filter })
    };
    COMPILED.get_or_init(|| [default_profile(), strict_profile(ASKS_SHIM)].into_iter().filter_map(compiled).collect());
}

/// The filter of a profile's text, if it need not be compiled: what this process knows, then what is kept. Not of one that asks,
/// since who answers is found by the profile.
pub(crate) fn known(text: &str, kept: Option<&Kept>) -> Option<Filter> {
    let mut compiled = COMPILED.get().into_iter().flatten();
    match compiled.find(|known| !known.filter.asks && known.text == text) {
        Some(known) => Some(known.filter.clone()),
        None => kept?.find(text),
    }
}

/// Whether a profile lets a call pass whatever its arguments are.
pub(crate) fn lets_pass(profile: &LinuxSeccomp, name: &str) -> bool {
    let allows = |action| action == LinuxSeccompAction::ScmpActAllow;
    let mut about =
        profile.syscalls().iter().flatten().filter(|call| call.names().iter().any(|one| one == name)).peekable();
    match about.peek() {
        None => allows(profile.default_action()),
        Some(_) => about.all(|call| allows(call.action()) && call.args().as_ref().is_none_or(Vec::is_empty)),
    }
}

/// The filter of a profile.
pub(crate) fn filter_of(profile: &LinuxSeccomp) -> Result<Filter, FilterError> {
    let known = COMPILED.get().into_iter().flatten().find(|known| known.profile == *profile);
    known.map_or_else(|| Filter::compile(profile), |known| Ok(known.filter.clone()))
}

//! What the end-to-end tests stand on: virtual hosts on this machine, images made with the tools that people use, and
//! the built binary driven as its users drive it.
//!
//! - [`lab`]: hosts in network namespaces, joined by a switch with shaped links
//! - [`host`]: one of them: its daemon, its command line, its cable
//! - [`cgroups`]: the part of the machine's cgroups that a host takes for all of them
//! - [`container`]: a running container as the kernel shows it
//! - [`images`]: the images that the tests load
//! - [`hostile`]: archives that no honest tool writes
//! - [`output`]: what a command printed, and how it ended
//!
//! The tests need root, and the packages that `tests/run` installs. Every wait has a deadline, which decides nothing
//! but when to give up.

pub mod bundle;
pub mod cgroups;
pub mod container;
pub mod host;
pub mod hostile;
pub mod images;
pub mod lab;
pub mod output;

pub use host::Host;
pub use lab::{Lab, PATIENCE, wait_for};
pub use output::Output;

/// Whether this machine's Linux is of that version, or later.
pub fn has_linux(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

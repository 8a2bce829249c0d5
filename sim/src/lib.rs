//! A deterministic simulator of whole meshes.
//!
//! The protocol code is the daemon's own, behind the same driver contract; the network, the disks, the images and the
//! containers are modelled, and named so ([`FakeHost`]). One seed decides everything: the options, the delays, what is
//! lost, who crashes and when. There are no threads and no wall clock, so a failing seed fails again.
//!
//! A run has a *safety* phase, in which nodes crash and messages are lost, and a *liveness* phase, in which nothing
//! fails any more and everything must come right. [`checkers`] say what must hold, a file each: some after every step,
//! some at the end.

pub mod checkers;
mod host;
mod measure;
mod network;
mod options;
pub mod report;
mod scenario;
mod simulator;
pub mod whatif;

pub use host::FakeHost;
pub use measure::{Distribution, Report};
pub use options::{Options, Sabotage, Scenario};
pub use scenario::service;
pub use simulator::{Simulator, run};

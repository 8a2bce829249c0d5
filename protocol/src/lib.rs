//! The protocol of a Moyai mesh: state machines that do no IO, read no clock and own no randomness.
//!
//! A reader starts at [`contract`], which says how a driver and a [`Node`] talk; then [`node`], which composes the
//! machines:
//!
//! | module | what it settles |
//! |---|---|
//! | [`trust`] | who is in the mesh, and what each may do |
//! | [`membership`] | who is alive (SWIM with Lifeguard) |
//! | [`catalog`] | what the mesh knows, the same everywhere |
//! | [`auction`] | which node runs a replica |
//! | [`worker`] | what this node runs, and at what price it would run more |
//! | [`custody`] | who makes up for what is missing |
//! | [`lease`] | that a singleton never runs twice |
//! | [`exchange`] | how an image's chunks get here |
//! | [`reconcile`] | how two nodes find what one of them lacks |
//!
//! Architecture invariant: nothing here depends on another crate of the workspace, and nothing here blocks.

pub mod auction;
pub mod catalog;
pub mod codec;
pub mod confinement;
pub mod contract;
pub mod custody;
pub mod exchange;
pub mod id;
pub mod lease;
pub mod limits;
pub mod lookup;
pub mod membership;
pub mod memo;
pub mod message;
pub mod node;
pub mod reconcile;
pub mod reference;
pub mod time;
pub mod trust;
pub mod turns;
pub mod worker;
pub mod workload;

pub use contract::{Command, Completion, Effect, EffectId, Event, Input, Outcome, Output};
pub use node::{Config, Node};

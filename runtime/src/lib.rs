//! Linux containers and the image store.
//!
//! | module | what it does |
//! |---|---|
//! | [`store`] | keeps contents, chunks and images on disk; says what of an image is missing; serves chunks |
//! | [`image`] | reads image archives, checks every digest, turns layers into trees of entries, unpacks trees |
//! | [`container`] | the daemon's side of a container: its bundle, its logs, the way to its shim |
//! | [`launch`] | the other side: zygote, shim, overlay |
//! | [`oci`] | the OCI runtime: makes a container of any bundle, for a shim or for the command line `moyai oci` |
//! | [`seccomp`] | system call filters: the default one, and the compiler of any |
//! | [`cgroup`] | limits, on v1, hybrid and v2 hosts |
//! | [`small`] | the program that starts containers and nothing else, if it is there |
//! | [`host`] | the machine: what it has, how busy it is, what this process may do on it |
//!
//! Architecture invariants: this crate depends on no other of the workspace; only here are system calls made, and
//! `unsafe` is found nowhere else; nothing here knows tokio, and what blocks is called from a thread that may.

pub mod cdi;
pub mod cgroup;
pub mod container;
pub mod copy;
pub mod host;
pub mod image;
pub mod launch;
pub mod lazy;
pub mod network;
pub mod oci;
pub mod rootless;
pub mod seccomp;
pub mod small;
pub mod store;
mod sys;

//! Moyai: the command line, the daemon, and what starts containers, in one program.
//!
//! What it is to be is decided before anything else, because the zygote must stay small and the daemon must start it
//! while it has one thread. Everything is in this library so that the tests can build a daemon that misbehaves
//! (`examples/lying_peer.rs`); the program users install is [`main`] and nothing else.

mod api;
mod cli;
mod daemon;
mod demo;
mod net;
mod pieces;
mod registry;

use std::process::ExitCode;

pub use net::chunks::ChunkTamper;
/// For `examples/quinn.rs`.
#[doc(hidden)]
pub use net::tls;

/// Runs the program that users install.
pub fn main() -> ExitCode {
    main_tampering(None)
}

/// As [`main`]; what its daemon serves to peers goes through `tamper`, when there is one.
pub fn main_tampering(tamper: Option<ChunkTamper>) -> ExitCode {
    let first = std::env::args().nth(1);
    if first.as_deref() == Some(moyai_runtime::launch::ZYGOTE) {
        if let Err(error) = moyai_runtime::oci::seal() {
            eprintln!("warning: the program itself stays within reach of containers that are root: {error}");
        }
        return match moyai_runtime::launch::zygote() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: the process that starts containers: {error}");
                ExitCode::FAILURE
            }
        };
    }
    if first.as_deref() == Some(demo::BUILT_IN) {
        return demo::built_in();
    }
    if first.as_deref() == Some(cli::oci::NAME) {
        return cli::oci::main();
    }
    cli::main(tamper)
}

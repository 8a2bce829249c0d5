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
        return zygote();
    }
    if first.as_deref() == Some(demo::BUILT_IN) {
        return demo::built_in();
    }
    if first.as_deref() == Some(cli::oci::NAME) {
        moyai_runtime::oci::end(cli::oci::main());
    }
    cli::main(tamper)
}

/// Runs the small program ([`moyai_runtime::small`]): what starts containers, for the daemon, `moyai oci` and other tools.
pub fn main_small() -> ExitCode {
    let is_zygote = std::env::args().nth(1).as_deref() == Some(moyai_runtime::launch::ZYGOTE);
    let before = if is_zygote { None } else { Some(cli::oci::NAME) };
    if let Err(error) = moyai_runtime::small::become_what_started_it(before) {
        eprintln!("error: this program is of another build than what started it, which it cannot become: {error}");
        return ExitCode::FAILURE;
    }
    if is_zygote { zygote() } else { moyai_runtime::oci::end(cli::oci::main()) }
}

fn zygote() -> ExitCode {
    if let Err(error) = moyai_runtime::oci::seal() {
        eprintln!("warning: the program itself stays within reach of containers that are root: {error}");
    }
    match moyai_runtime::launch::zygote() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: the process that starts containers: {error}");
            ExitCode::FAILURE
        }
    }
}

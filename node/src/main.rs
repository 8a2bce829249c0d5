//! The one program users install: the command line, the daemon, and what starts containers.
//!
//! What it is to be is decided before anything else, because the zygote must stay small and the daemon must start it
//! while it has one thread.

mod api;
mod cli;
mod daemon;
mod demo;
mod net;

use std::process::ExitCode;

fn main() -> ExitCode {
    let first = std::env::args().nth(1);
    if first.as_deref() == Some(moyai_runtime::launch::ZYGOTE) {
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
    cli::main()
}

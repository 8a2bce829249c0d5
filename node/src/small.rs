//! What starts containers, alone: beside `moyai` it makes that faster, and by itself it is an OCI runtime for other tools.

fn main() -> std::process::ExitCode {
    moyai::main_small()
}

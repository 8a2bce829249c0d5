//! The one program users install.

fn main() -> std::process::ExitCode {
    moyai::main()
}

//! Moyai, but its daemon lies: each chunk it serves has one bit wrong. The end-to-end tests let it join a mesh, with a
//! good certificate, and see that nobody keeps a byte of what it sends.

fn main() -> std::process::ExitCode {
    moyai::main_tampering(Some(|mut bytes| {
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        bytes
    }))
}

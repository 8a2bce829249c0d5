//! Moyai, but its daemon lies about the chunks it serves, as `MOYAI_LIE` says. The end-to-end tests let it join a mesh, with a good
//! certificate, and see that nobody keeps a byte of what it sends, and that pulls end all the same.

use std::time::Duration;

/// Longer than anybody waits for the next byte.
const LATE: Duration = Duration::from_secs(25);

fn main() -> std::process::ExitCode {
    let lie: moyai::ChunkTamper = match std::env::var("MOYAI_LIE").as_deref() {
        Ok("short") => |bytes| {
            let bytes = bytes.unwrap_or_default();
            framed(bytes.len() / 2, &bytes[..bytes.len() / 2])
        },
        // It promises more than it sends.
        Ok("less") => |bytes| {
            let bytes = bytes.unwrap_or_default();
            framed(bytes.len(), &bytes[..bytes.len() / 2])
        },
        Ok("endless") => |bytes| {
            let bytes = bytes.unwrap_or_default();
            framed(u32::MAX as usize - 10, &bytes)
        },
        Ok("late") => |bytes| {
            std::thread::sleep(LATE);
            let bytes = bytes.unwrap_or_default();
            framed(bytes.len(), &bytes)
        },
        Ok("none") => |_| u32::MAX.to_be_bytes().to_vec(),
        _ => |bytes| {
            let mut bytes = bytes.unwrap_or_default();
            if let Some(last) = bytes.last_mut() {
                *last ^= 1;
            }
            framed(bytes.len(), &bytes)
        },
    };
    moyai::main_tampering(Some(lie))
}

fn framed(len: usize, bytes: &[u8]) -> Vec<u8> {
    [&(len as u32).to_be_bytes()[..], bytes].concat()
}

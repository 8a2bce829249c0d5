//! Memory for what goes to the disk, and the way there: large pieces past the kernel's cache (open(2), O_DIRECT).
//!
//! A copy into pages that are new costs an import more processor time than to hash what it copies, above all on a virtual machine,
//! and what one has just loaded is mostly not what is read next. Small pieces go by the cache: the disk takes them many at a time.
//! Where a file system cannot do without its cache, all of them do.

use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};

use nix::fcntl::OFlag;

use crate::sys::set_status_flag;

/// Where memory, length and place in the file are multiples of this, every disk takes them as they are.
const BLOCK: usize = 4096;
/// A piece from this length on goes past the cache.
const LARGE: usize = 1 << 20;

/// Bytes that begin where a block does.
#[derive(Default)]
pub(super) struct Buffer {
    memory: Vec<u8>,
    used: Range<usize>,
}

impl Buffer {
    /// Empties it, and makes room for `len` bytes.
    pub(super) fn begin(&mut self, len: usize) {
        // What is small has no need of a place.
        let slack = if len < LARGE { 0 } else { BLOCK };
        if self.memory.len() < len + slack {
            self.memory = vec![0; len + slack];
        }
        let start = self.memory.as_ptr().align_offset(BLOCK);
        let start = if start < slack { start } else { 0 };
        self.used = start..start;
    }

    /// How much memory it has.
    pub(super) fn room(&self) -> usize {
        self.memory.len()
    }

    /// Adds bytes, as there is room for.
    pub(super) fn fill(&mut self, bytes: &[u8]) {
        self.grow(bytes.len()).copy_from_slice(bytes);
    }

    /// Adds `len` bytes, as there is room for, and returns them to be written to.
    pub(super) fn grow(&mut self, len: usize) -> &mut [u8] {
        let from = self.used.end;
        self.used.end += len;
        &mut self.memory[from..self.used.end]
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.used.clone()]
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::default();
        buffer.begin(bytes.len());
        buffer.fill(bytes);
        buffer
    }
}

/// Adds `bytes` to a file; how many of them are in the kernel's cache, to be brought to the disk.
pub(super) fn append(file: &File, bytes: &Buffer) -> io::Result<usize> {
    let direct = if bytes.len() < LARGE { 0 } else { append_direct(file, &bytes[..bytes.len() / BLOCK * BLOCK])? };
    let mut file = file;
    file.write_all(&bytes[direct..])?;
    Ok(bytes.len() - direct)
}

/// Adds what it can past the cache; how many bytes.
fn append_direct(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    if set_status_flag(&file, OFlag::O_DIRECT, true).is_err() {
        return Ok(0);
    }
    let mut done = 0;
    let written = loop {
        match file.write(&bytes[done..]) {
            Ok(0) => break Ok(()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Not so, says the file system: the cache can.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    set_status_flag(&file, OFlag::O_DIRECT, false)?;
    written.map(|()| done)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn a_used_buffer_is_written_as_a_new_one_and_large_ones_past_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut block = Buffer::default();
        block.begin(LARGE);
        block.grow(BLOCK);
        let by_itself = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .custom_flags(libc::O_DIRECT)
            .open(dir.path().join("direct"))
            .and_then(|mut file| file.write(&block));
        let mut buffer = Buffer::default();
        // Shorter ones after longer ones, with what those left in memory.
        for (at, len) in [3 * LARGE + 5, LARGE, 17, LARGE + BLOCK, 0, LARGE - 1, 4 * LARGE].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|byte| (byte * 31 + byte / 251 + at) as u8).collect();
            buffer.begin(len);
            assert!(buffer.is_empty());
            bytes.chunks(LARGE / 3).for_each(|piece| buffer.fill(piece));
            let path = dir.path().join(at.to_string());
            let cached = append(&File::create(&path).unwrap(), &buffer).unwrap();
            assert!(fs::read(&path).unwrap() == bytes, "{len} bytes");
            if len >= LARGE && by_itself.is_ok() {
                assert_eq!(cached, len % BLOCK);
            }
        }
    }
}

//! The machine's mounts, as this process sees them: whether they are what they were.
//!
//! The kernel says that something has changed (proc_pid_mountinfo(5)), not what: a mount that has come and gone, as some runtimes make one
//! for every container, leaves the list as it was. Its text alone does not tell: another mount in the same place may have
//! all the numbers of the one before. So the numbers that are never given again are compared too (listmount(2), Linux 6.8); where
//! the kernel has none, every change counts.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};

use crate::sys;

/// So many bytes of a list are compared.
const LONGEST: u64 = 1 << 20;

/// Where the kernel says it: POLLPRI, once for all changes since it was last asked.
pub(super) struct Watch(File);

/// A list of them, without their words: whoever is forked off may stay inside a container. Both are sorted.
#[derive(Debug, PartialEq)]
pub(super) struct Mounts {
    /// A hash of each line.
    lines: Vec<u64>,
    numbers: Vec<u64>,
}

impl Watch {
    pub(super) fn open() -> io::Result<Watch> {
        File::open("/proc/self/mountinfo").map(Watch)
    }

    /// The mounts now; none where they cannot be told from others.
    pub(super) fn read(&mut self) -> Option<Mounts> {
        let numbers = sys::mount_numbers().ok()?;
        // Long enough for most machines, so that it is not moved as it grows.
        let mut text = Vec::with_capacity(64 * 1024);
        self.0.rewind().ok()?;
        let read = self.0.by_ref().take(LONGEST).read_to_end(&mut text);
        let mounts = Mounts::new(&text, numbers);
        text.fill(0);
        // Or it would be as good as never written.
        std::hint::black_box(&text);
        read.is_ok_and(|len| (len as u64) < LONGEST).then_some(mounts)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Mounts {
    fn new(text: &[u8], numbers: Vec<u64>) -> Mounts {
        let hash = |line: &[u8]| {
            let mut hasher = DefaultHasher::new();
            hasher.write(line);
            hasher.finish()
        };
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let mut lines: Vec<u64> = lines.map(hash).collect();
        lines.sort_unstable();
        Mounts { lines, numbers }
    }

    /// Whether each of them is there as it was, whatever else is.
    pub(super) fn are_in(&self, others: &Mounts) -> bool {
        let all = |own: &[u64], others: &[u64]| own.iter().all(|one| others.binary_search(one).is_ok());
        all(&self.lines, &others.lines) && all(&self.numbers, &others.numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_the_same_by_text_and_by_number() {
        let list = |text: &str, numbers: &[u64]| Mounts::new(text.as_bytes(), numbers.to_vec());
        let two = list("1 /\n2 /x\n", &[10, 20]);
        assert!(two.are_in(&list("1 /\n3 /y\n2 /x\n", &[10, 20, 30])));
        assert!(!two.are_in(&list("1 /\n", &[10])));
        assert!(!two.are_in(&list("1 /\n2 /x ro\n", &[10, 20])));
        assert!(!two.are_in(&list("1 /\n2 /x\n", &[10, 21])));
    }

    #[test]
    fn this_machines_mounts_are_read() {
        let mut watch = Watch::open().expect("a list");
        // None before Linux 6.8.
        let Some(mounts) = watch.read() else { return };
        assert!(!mounts.lines.is_empty());
        // Others may mount something between two looks, but not all the time.
        let mut looks = (0..100).filter_map(|_| watch.read().zip(watch.read()));
        assert!(looks.any(|(one, two)| one == two && one.lines.len() == one.numbers.len()));
    }
}

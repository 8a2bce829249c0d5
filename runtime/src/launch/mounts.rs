//! The machine's mounts, as this process sees them: whether they are what they were.
//!
//! The kernel says that something has changed (proc_pid_mountinfo(5)), not what: a mount that has come and gone, as some runtimes make one
//! for every container, leaves the list as it was. Its text alone does not tell: another mount in the same place may have
//! all the numbers of the one before. So the numbers that are never given again are compared too (listmount(2), Linux 6.8); where
//! the kernel has none, every change counts.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};

use crate::sys;

/// So many bytes of a list are compared.
const LONGEST: u64 = 1 << 20;

/// Where the kernel says it: POLLPRI, once for all changes since it was last asked.
pub(super) struct Watch(File);

/// A list of them.
#[derive(Debug, PartialEq)]
pub(super) struct Mounts {
    text: String,
    /// Sorted.
    numbers: Vec<u64>,
}

impl Watch {
    pub(super) fn open() -> io::Result<Watch> {
        File::open("/proc/self/mountinfo").map(Watch)
    }

    /// The mounts now; none where they cannot be told from others.
    pub(super) fn read(&mut self) -> Option<Mounts> {
        let numbers = sys::mount_numbers().ok()?;
        let mut text = String::new();
        self.0.rewind().ok()?;
        let len = self.0.by_ref().take(LONGEST).read_to_string(&mut text).ok()?;
        ((len as u64) < LONGEST).then_some(Mounts { text, numbers })
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Mounts {
    /// Whether each of them is there as it was, whatever else is.
    pub(super) fn are_in(&self, others: &Mounts) -> bool {
        let lines: HashSet<&str> = others.text.lines().collect();
        self.text.lines().all(|line| lines.contains(line))
            && self.numbers.iter().all(|number| others.numbers.binary_search(number).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_the_same_by_text_and_by_number() {
        let list = |text: &str, numbers: &[u64]| Mounts { text: text.to_owned(), numbers: numbers.to_vec() };
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
        assert!(mounts.text.lines().any(|line| line.split(' ').nth(4) == Some("/")), "{mounts:?}");
        assert_eq!(mounts.text.lines().count(), mounts.numbers.len());
        assert_eq!(watch.read(), Some(mounts));
    }
}

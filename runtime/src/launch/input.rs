//! What a process reads, given to it as it takes it: whoever waited for it to read would not see that it waits to be read.
//!
//! **Bounds.** Whoever pushes asks [`Input::is_full`] first: then [`MAX_FRAME`] bytes wait, and one frame more at the most.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use super::exec::MAX_FRAME;
use crate::sys;

/// This side of a process's input: of a pipe, or of a terminal, which has no end.
pub(super) struct Input {
    file: Option<File>,
    terminal: bool,
    unread: VecDeque<u8>,
    /// It ends when what is unread has been taken.
    ending: bool,
}

impl Input {
    /// Nothing has been said yet; without a file it reads nothing.
    pub(super) fn new(file: Option<File>, terminal: bool) -> io::Result<Input> {
        file.iter().try_for_each(sys::set_nonblocking)?;
        Ok(Input { file, terminal, unread: VecDeque::new(), ending: false })
    }

    /// Whether it reads anything at all.
    pub(super) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Whether no more is to be pushed for now.
    pub(super) fn is_full(&self) -> bool {
        self.unread.len() >= MAX_FRAME
    }

    /// What to wait for until it takes something.
    pub(super) fn waits(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().filter(|_| !self.unread.is_empty()).map(AsFd::as_fd)
    }

    /// More for it to read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.is_open() {
            self.unread.extend(bytes);
        }
    }

    /// Nothing more comes. A terminal does not end: its other end has a key for that.
    pub(super) fn end(&mut self) {
        self.ending = !self.terminal;
    }

    /// Nobody is there any more who could say something.
    pub(super) fn close(&mut self) {
        (self.file, self.unread) = (None, VecDeque::new());
    }

    /// Gives it what it takes.
    pub(super) fn feed(&mut self) {
        while let Some(file) = self.file.as_mut().filter(|_| !self.unread.is_empty()) {
            match file.write(self.unread.make_contiguous()) {
                Ok(len) => drop(self.unread.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It reads no more.
                Err(_) => self.close(),
            }
        }
        if self.ending {
            self.file = None;
        }
    }
}

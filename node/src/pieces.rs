//! Bytes that come piece by piece over a channel, for a thread that reads them as a file.

use std::io::{self, Read};

use bytes::Bytes;
use tokio::sync::mpsc;

/// Waits for pieces, and ends when nobody sends any more.
pub struct Pieces {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Pieces {
    /// Of a channel, whose bound is the sender's to choose.
    pub fn new(pieces: mpsc::Receiver<Bytes>) -> Pieces {
        Pieces { pieces, piece: Bytes::new() }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.piece.len());
        buffer[..len].copy_from_slice(&self.piece.split_to(len));
        Ok(len)
    }
}

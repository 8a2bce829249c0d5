//! Bytes that go piece by piece over a channel, for a thread that reads or writes them as a file.

use std::io::{self, Read, Write};

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

/// Sends each piece that is written, and fails when nobody takes them any more.
pub struct Outgoing {
    pieces: mpsc::Sender<io::Result<Bytes>>,
}

impl Outgoing {
    /// Into a channel, whose bound is its maker's to choose.
    pub fn new(pieces: mpsc::Sender<io::Result<Bytes>>) -> Outgoing {
        Outgoing { pieces }
    }
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.pieces.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

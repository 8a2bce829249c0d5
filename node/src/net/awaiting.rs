//! A TCP stream whose reader is woken for many bytes at a time while many are still to come.
//!
//! A link that several streams share brings each of them a few packets at once, and to be woken for those takes more processor
//! time than what is in them. So while it is known that more must come the kernel is told to wait for it (SO_RCVLOWAT, tcp(7)).
//!
//! **States.** Nothing expected: the mark is one byte, as any socket's. So many bytes expected: the mark is [`MARK`], or what is left.
//! Whoever sends may send less than is expected, or slowly, so after [`PATIENCE`] the mark is one byte until something is read.
//!
//! **If the other side dies** the kernel wakes the reader whatever the mark is.
//!
//! **Bounds.** Nothing is kept here; the kernel's buffer is as large as it would be anyway, or twice the mark.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

/// Bytes for which it is worth to be woken.
const MARK: u64 = 32 << 10;
/// How long it may take until there are so many: at 10 Mbit/s, about.
const PATIENCE: Duration = Duration::from_millis(25);

pub(super) struct Awaiting {
    stream: TcpStream,
    /// At least so many bytes come.
    expected: u64,
    /// What the kernel was told.
    mark: u64,
    late: Pin<Box<Sleep>>,
    /// Whether `late` is waited for.
    is_waiting: bool,
}

impl Awaiting {
    pub(super) fn new(stream: TcpStream) -> Awaiting {
        Awaiting { stream, expected: 0, mark: 1, late: Box::pin(tokio::time::sleep(Duration::ZERO)), is_waiting: false }
    }

    /// At least so many bytes come from here on.
    pub(super) fn expect(&mut self, bytes: u64) {
        self.expected = bytes;
        self.set_mark(MARK.min(bytes));
    }

    fn set_mark(&mut self, mark: u64) {
        let mark = mark.max(1);
        // Where the kernel does not take it, it wakes its reader as it always did.
        if mark != self.mark && moyai_runtime::host::wake_for(self.stream.as_fd(), mark as u32).is_ok() {
            self.mark = mark;
        }
    }
}

impl AsyncRead for Awaiting {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        loop {
            if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
                let count = buffer.filled().len() - before;
                this.is_waiting = false;
                this.expect(this.expected.saturating_sub(count as u64));
                return Poll::Ready(read);
            }
            if this.mark == 1 {
                return Poll::Pending;
            }
            if !this.is_waiting {
                this.late.as_mut().reset(Instant::now() + PATIENCE);
                this.is_waiting = true;
            }
            ready!(this.late.as_mut().poll(context));
            // What is there now wakes the reader at once.
            this.set_mark(1);
        }
    }
}

impl AsyncWrite for Awaiting {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, Awaiting) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        sender.set_nodelay(true).unwrap();
        (sender, Awaiting::new(listener.accept().await.unwrap().0))
    }

    #[tokio::test]
    async fn no_more_is_waited_for_than_is_expected() {
        let (mut sender, mut receiver) = pair().await;
        receiver.expect(2 * MARK + 5);
        assert_eq!(receiver.mark, MARK);
        for (sent, left) in [(MARK, MARK), (MARK, 5), (5, 1), (3, 1)] {
            sender.write_all(&vec![7; sent as usize]).await.unwrap();
            receiver.read_exact(&mut vec![0; sent as usize]).await.unwrap();
            assert_eq!(receiver.mark, left);
        }
    }

    #[tokio::test]
    async fn whoever_sends_less_than_expected_is_read_all_the_same() {
        let (mut sender, mut receiver) = pair().await;
        receiver.expect(10 * MARK);
        let mut buffer = [0; 16];
        for _ in 0..2 {
            sender.write_all(b"little").await.unwrap();
            assert_eq!(receiver.read(&mut buffer).await.unwrap(), 6);
        }
        drop(sender);
        assert_eq!(receiver.read(&mut buffer).await.unwrap(), 0, "it has ended");
    }
}

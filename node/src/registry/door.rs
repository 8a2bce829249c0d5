//! The registry's connections, which are counted: strangers may reach its address where it is not loopback.
//!
//! **Bounds.** [`MAX_CONNECTIONS`] of others in all and [`MAX_PER_ADDRESS`] of one address (an IPv6 address by its /64); of this
//! machine as many, which are nobody else's: root pushes from here. One more is closed at once, which tools take for "busy"
//! and try again. Between two requests, and for the head of one, a connection has [`IDLE`]; while one is answered [`BUSY`] since the
//! last byte went either way.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

use crate::net::doorstep::{Place, Places, network_of};

const MAX_CONNECTIONS: usize = 256;
/// As many as a machine's tools open side by side, several times.
const MAX_PER_ADDRESS: usize = 64;
const IDLE: Duration = Duration::from_secs(60);
/// An import at the end of a push, or an image that comes from far away, may take long, and says nothing meanwhile.
const BUSY: Duration = Duration::from_secs(3600);

/// Listens, and counts.
pub(super) struct Door {
    listener: TcpListener,
    all: Places<bool>,
    by_address: Places<IpAddr>,
    idle: Duration,
}

/// A connection that was let in.
pub(super) struct Guest {
    stream: TcpStream,
    most: Duration,
    answering: Answering,
    was_busy: bool,
    until: Pin<Box<Sleep>>,
    _places: (Place<bool>, Option<Place<IpAddr>>),
}

/// How many requests of a connection are being answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Answering(Arc<AtomicUsize>);

/// One of them.
pub(super) struct Answered(Answering);

impl Answering {
    pub(super) fn begin(&self) -> Answered {
        self.0.fetch_add(1, Ordering::Relaxed);
        Answered(self.clone())
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Door {
    pub(super) fn new(listener: TcpListener) -> Door {
        Door { listener, all: Places::default(), by_address: Places::default(), idle: IDLE }
    }
}

impl Listener for Door {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        loop {
            let (stream, from) = Listener::accept(&mut self.listener).await;
            let here = from.ip().to_canonical().is_loopback();
            let own = || self.by_address.enter(network_of(from.ip()), MAX_PER_ADDRESS);
            let Some(place) = self.all.enter(here, MAX_CONNECTIONS) else { continue };
            let own = if here { None } else { Some(own()) };
            if matches!(own, Some(None)) {
                continue;
            }
            let until = Box::pin(tokio::time::sleep(self.idle));
            let (most, answering, _places) = (self.idle, Answering::default(), (place, own.flatten()));
            return (Guest { stream, most, answering, was_busy: false, until, _places }, from);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Guest {
    /// This machine's end of it.
    pub(super) fn local(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// What of it is being answered.
    pub(super) fn answering(&self) -> &Answering {
        &self.answering
    }

    /// Passes on what came of a read or a write: an error in place of nothing, when that has gone on for too long. A byte now
    /// and then does not make the time for a request's head longer.
    fn unless_idle<T>(&mut self, cx: &mut Context<'_>, wrote: bool, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let busy = self.answering.is_on();
        let moved = done.is_ready() && (busy || wrote);
        if moved || busy != self.was_busy {
            self.was_busy = busy;
            let until = Instant::now() + if busy { BUSY } else { self.most };
            self.until.as_mut().reset(until);
        }
        if done.is_ready() {
            return done;
        }
        ready!(self.until.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.unless_idle(cx, false, read)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.unless_idle(cx, true, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.unless_idle(cx, true, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn let_in(door: &mut Door) -> (TcpStream, Guest) {
        let client = TcpStream::connect(door.listener.local_addr().expect("an address")).await.expect("connect");
        (client, door.accept().await.0)
    }

    #[tokio::test]
    async fn there_are_so_many_places_and_no_more() {
        let mut door = Door::new(TcpListener::bind("127.0.0.1:0").await.expect("bind"));
        let address = Listener::local_addr(&door).expect("an address");
        let mut inside = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            inside.push(let_in(&mut door).await);
        }
        let serving = tokio::spawn(async move { (door.accept().await, door) });
        let mut refused = TcpStream::connect(address).await.expect("connect");
        assert!(!matches!(refused.read(&mut [0]).await, Ok(1..)), "it is closed at once");
        inside.pop();
        let _let_in = TcpStream::connect(address).await.expect("connect");
        serving.await.expect("the place that is free again is given");
    }

    #[tokio::test]
    async fn who_says_nothing_or_little_is_closed() {
        let mut door = Door::new(TcpListener::bind("127.0.0.1:0").await.expect("bind"));
        door.idle = Duration::from_millis(50);
        let (mut client, mut guest) = let_in(&mut door).await;
        let slowly = tokio::spawn(async move {
            while client.write_all(b"G").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let mut all = Vec::new();
        let read = guest.read_to_end(&mut all).await;
        assert_eq!(read.expect_err("a head without end").kind(), io::ErrorKind::TimedOut);
        drop(guest);
        slowly.await.expect("it was closed");
        // Who waits for an answer is not.
        let (mut client, mut guest) = let_in(&mut door).await;
        let answered = guest.answering().begin();
        let waits = tokio::time::timeout(Duration::from_millis(200), guest.read(&mut [0])).await;
        assert!(waits.is_err(), "it was closed while it was answered");
        guest.write_all(b"x").await.expect("the answer");
        drop(answered);
        client.read_exact(&mut [0]).await.expect("the answer");
        let read = guest.read(&mut [0]).await;
        assert_eq!(read.expect_err("no other request").kind(), io::ErrorKind::TimedOut);
    }
}

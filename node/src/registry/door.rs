//! The registry's connections, which are counted: strangers may reach its address where it is not loopback.
//!
//! **Bounds.** [`MAX_CONNECTIONS`] in all and [`MAX_PER_ADDRESS`] of one address (an IPv6 address by its /64); one more is closed
//! at once, which tools take for "busy" and try again. A connection on which nothing is read or written for [`IDLE`] is closed;
//! an import that ends a push may take that long, and not longer.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
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
const IDLE: Duration = Duration::from_secs(600);

/// Listens, and counts.
pub(super) struct Door {
    listener: TcpListener,
    all: Places<()>,
    by_address: Places<IpAddr>,
    idle: Duration,
}

/// A connection that was let in.
pub(super) struct Guest {
    stream: TcpStream,
    most: Duration,
    idle: Pin<Box<Sleep>>,
    _places: (Place<()>, Place<IpAddr>),
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
            let own = self.by_address.enter(network_of(from.ip()), MAX_PER_ADDRESS);
            if let Some(places) = self.all.enter((), MAX_CONNECTIONS).zip(own) {
                let idle = Box::pin(tokio::time::sleep(self.idle));
                return (Guest { stream, most: self.idle, idle, _places: places }, from);
            }
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

    /// Passes on what came of a read or a write: an error in place of nothing, when that has gone on for too long.
    fn unless_idle<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            let until = Instant::now() + self.most;
            self.idle.as_mut().reset(until);
            return done;
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.unless_idle(cx, read)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.unless_idle(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.unless_idle(cx, written)
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
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn one_address_has_its_places_and_no_more() {
        let mut door = Door::new(TcpListener::bind("127.0.0.1:0").await.expect("bind"));
        let address = Listener::local_addr(&door).expect("an address");
        let (mut clients, mut guests) = (Vec::new(), Vec::new());
        for _ in 0..MAX_PER_ADDRESS {
            clients.push(TcpStream::connect(address).await.expect("connect"));
            guests.push(door.accept().await);
        }
        let serving = tokio::spawn(async move { (door.accept().await, door) });
        let mut refused = TcpStream::connect(address).await.expect("connect");
        let mut nothing = [0];
        assert!(!matches!(refused.read(&mut nothing).await, Ok(1..)), "it is closed at once");
        guests.pop();
        let _let_in = TcpStream::connect(address).await.expect("connect");
        serving.await.expect("the place that is free again is given");
    }

    #[tokio::test]
    async fn who_says_nothing_is_closed() {
        let mut door = Door::new(TcpListener::bind("127.0.0.1:0").await.expect("bind"));
        let address = Listener::local_addr(&door).expect("an address");
        door.idle = Duration::from_millis(50);
        let _client = TcpStream::connect(address).await.expect("connect");
        let (mut guest, _) = door.accept().await;
        let read = guest.read(&mut [0]).await;
        assert_eq!(read.expect_err("nothing came").kind(), io::ErrorKind::TimedOut);
    }
}
